"""``afl-jax train``: a config to a run, its best epoch evaluated and drawn."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from afl_jax import figures, loop, parallel, reports, training
from afl_jax.checkpoint import CheckpointStore, EpochTotals
from afl_jax.commands import construct
from afl_jax.commands.distributed import run_distributed
from afl_jax.commands.run_folder import check_run_folder, take_fingerprint
from afl_jax.config import Config, check_config, to_json
from afl_jax.data.cases import Case
from afl_jax.errors import InputError, print_error
from afl_jax.fingerprint import describe_session
from afl_jax.models.pretrained import from_torch, read_weights
from afl_jax.signals import StopRequest, deferred_signals

_NUM_OVERLAY_CASES = 4


def train(
    *,
    out: Path,
    config: Annotated[Config, tyro.conf.arg(name="")] = Config(),
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None,
    resume: bool = False,
    allow_changes: bool = False,
    distributed: bool = False,
) -> int:
    """Train a network, then evaluate and draw its best epoch.

    A name in front of the options, such as picai2022, stands for that run, of which options
    change fields; afl-jax --help lists them.

    Args:
        out: Folder of the run, made by this command.
        config: The run.
        config_file: A config.json, such as another run's; options beside it override it.
        resume: Go on with the run in --out from its newest checkpoint.
        allow_changes: With --resume, though the config or the data set are not as they were.
        distributed: Be one of several processes of the run, which find each other by the
            environment of a cluster, or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
            JAX_PROCESS_ID; data and run lie where all of them reach them, and process 0 writes.

    Returns:
        The exit code.
    """
    del config_file  # The command line made it the default of `config`.
    check_config(config)
    run = functools.partial(
        _train, out=out, config=config, resume=resume, allow_changes=allow_changes
    )
    return run_distributed(run) if distributed else run()


def _train(*, out: Path, config: Config, resume: bool, allow_changes: bool) -> int:
    is_writer = parallel.process_index() == 0
    console = reports.create_console(quiet=not is_writer)
    if is_writer:
        check_run_folder(out, config, resume=resume, allow_changes=allow_changes)
    # Whatever a mistake in the config could break comes before the first long work.
    devices = parallel.select_devices(
        config.num_devices, batch_size=config.batch_size // config.num_microbatches
    )
    axis_name = parallel.axis_name(devices)
    model = construct.create_model(config, axis_name=axis_name)
    loss_fn = construct.create_loss(config.loss, num_classes=config.model.num_classes)
    log_fn = construct.create_tensorboard_log(out) if config.tensorboard and is_writer else None
    weights = read_weights(config.init_weights) if config.init_weights else None
    if is_writer:
        fingerprint = take_fingerprint(out, config, resume=resume, allow_changes=allow_changes)
        builder = construct.prepare_data(config.data, console)
    parallel.wait_for_all("the data are prepared")
    if not is_writer:
        builder = construct.prepare_data(config.data, console)
    if 2 < config.model.num_classes < builder.num_classes:
        raise InputError(
            f"model.num_classes must be at least {builder.num_classes}, the classes of the data, "
            f"or 2 to take all foreground as one, got {config.model.num_classes}."
        )
    num_cases, num_val = map(builder.num_cases, ("train", "val"))
    num_steps = num_cases // config.batch_size
    if num_steps == 0:
        raise InputError(
            f"batch_size must be at most {num_cases}, the number of training cases, got "
            f"{config.batch_size}."
        )
    optimizer = construct.create_optimizer(config, num_steps=num_steps)

    @jax.jit
    def create_state(key: jax.Array) -> training.TrainState:
        image = jnp.zeros((1, *config.data.shape, builder.num_channels))
        return training.create_train_state(model.apply, model.init(key, image), optimizer)

    weights_key, augment_key = jax.random.split(jax.random.key(config.seed))
    state = create_state(weights_key)
    if weights is not None:
        variables = from_torch(weights, state.variables, source=str(config.init_weights))
        state = state.replace(**variables)
    batches = construct.create_loader(builder, "train", config, shared=True)
    history, totals = [], EpochTotals()
    if is_writer:
        out.mkdir(parents=True, exist_ok=True)
        reports.write_text(out / "config.json", to_json(config))
    else:
        parallel.wait_for_all("damaged checkpoints are set aside")
    store = CheckpointStore(
        out / "checkpoints", num_kept=config.num_checkpoints, read_only=not is_writer
    )
    if resume and not store.is_empty:
        restored = store.restore_newest(
            optimizer={"step": state.step, "opt_state": state.opt_state}, warn=print_error
        )
        state = state.replace(**restored.variables, **restored.optimizer)
        batches.set_state(restored.iterator)
        augment_key, history, totals = restored.key, restored.history, restored.totals
        console.print(f"resumed after {restored.place}", highlight=False)
    elif resume:
        console.print("there is no checkpoint yet: the run begins anew", highlight=False)
    if is_writer:
        fingerprint["sessions"].append(describe_session(step=int(state.step)))
        reports.write_json(out / "fingerprint.json", fingerprint)
        parallel.wait_for_all("damaged checkpoints are set aside")

    train_step, eval_step = construct.compile_steps(
        config, model, loss_fn=loss_fn, devices=devices, across_processes=True
    )

    def validate(variables: Any, stop: StopRequest, *, shared: bool) -> list[loop.Row]:
        batches = stop.between(construct.create_loader(builder, "val", config, shared=shared))
        rows = loop.evaluate(variables, batches, eval_step=eval_step, devices=devices)
        return _gather_rows(rows, builder.split_cases()["val"]) if shared else rows

    num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    console.print(
        f"{config.model.name}, {num_parameters:,} parameters, {config.loss.name} loss; "
        f"{num_cases} cases to train and {num_val} to validate; {parallel.process_count()} "
        f"process(es) of {len(devices)} {devices[0].platform} device(s), batch "
        f"{config.batch_size}; compiling the first step",
        highlight=False,
        soft_wrap=True,
    )
    try:
        with deferred_signals() as stop:
            stop.agree_fn = parallel.create_agreement(devices)
            history = loop.fit(
                state,
                config=config,
                batches=batches,
                num_steps=num_steps,
                train_step=train_step,
                evaluate_fn=functools.partial(validate, stop=stop, shared=True),
                key=augment_key,
                devices=devices,
                store=store,
                run_dir=out,
                console=console,
                stop=stop,
                history=history,
                totals=totals,
                log_fn=log_fn,
            )
        store.wait()
        if is_writer:
            best = store.restore_best()
    finally:
        store.close()
    if is_writer:
        variables = parallel.replicate(best.variables, devices)
        rows = validate(variables, StopRequest(), shared=False)
        batches = construct.create_loader(builder, "val", config)
        cases = _overlay_cases(variables, rows, batches, eval_step=eval_step, devices=devices)
        reports.write_csv(out / "validation.csv", rows)
        figures.overlay_figure(cases, out / "overlay.png")
        figures.curves_figure(
            history,
            out / "curves.png",
            loss_columns=("loss", "val_loss"),
            metric_columns=[f"val_{name}" for name in loop.METRICS],
        )
        console.print(reports.case_table(rows, title=f"validation at epoch {best.epoch}, the best"))
        console.print(
            f"{out}: checkpoints, config.json, metrics.csv, validation.csv, curves.png, "
            "overlay.png",
            highlight=False,
            soft_wrap=True,
        )
    parallel.wait_for_all("the run is written")
    return 0


def _gather_rows(rows: Sequence[loop.Row], cases: Sequence[Case]) -> list[loop.Row]:
    """The rows of all processes, in the order of the cases."""
    shares = parallel.gather_bytes(json.dumps(rows).encode())
    by_case = {row["case_id"]: row for share in shares for row in json.loads(share)}
    return [by_case[case.case_id] for case in cases]


def _overlay_cases(
    variables: Any,
    rows: Sequence[loop.Row],
    batches: Any,
    *,
    eval_step: Callable[..., Any],
    devices: Sequence[jax.Device],
) -> list[figures.OverlayCase]:
    """Cases from the best to the worst Dice, evenly spread, with their predictions."""
    ranked = sorted((row for row in rows if row["dice"] == row["dice"]), key=lambda r: -r["dice"])
    ranked = ranked or list(rows)
    places = np.linspace(0, len(ranked) - 1, min(_NUM_OVERLAY_CASES, len(ranked))).round()
    chosen = [ranked[int(place)] for place in places]
    dice = {row["case_id"]: row["dice"] for row in chosen}
    cases = {}
    for batch, output in loop.run_eval_step(
        variables, batches, eval_step=eval_step, devices=devices
    ):
        for i in np.flatnonzero(batch["valid"]):
            case_id = str(batch["case_id"][i])
            if case_id in dice:
                cases[case_id] = figures.OverlayCase(
                    case_id=case_id,
                    image=batch["image"][i],
                    truth=batch["labels"][i],
                    prediction=output["prediction"][i],
                    spacing=tuple(float(mm) for mm in batch["spacing"][i]),
                    dice=dice[case_id],
                )
    return [cases[row["case_id"]] for row in chosen]
