"""``afl-jax train``: a config to a run, its best epoch evaluated and drawn."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from afl_jax import figures, loop, parallel, reports, training
from afl_jax.checkpoint import CheckpointStore, EpochTotals
from afl_jax.commands import construct
from afl_jax.config import Config, changed_fields, check_config, read_config, to_json
from afl_jax.data import augment
from afl_jax.errors import InputError, print_error
from afl_jax.files import remove_leftovers
from afl_jax.fingerprint import (
    data_difference,
    describe_data,
    describe_session,
    read_fingerprint,
)
from afl_jax.models.pretrained import from_torch, read_weights
from afl_jax.signals import StopRequest, deferred_signals

_NUM_OVERLAY_CASES = 4
# What a resumed run may change of the config that it began with.
_FREE_ON_RESUME = (
    *("num_epochs", "eval_every", "checkpoint_every", "num_checkpoints", "non_finite"),
    *("num_devices", "tensorboard"),
)


def train(
    *,
    out: Path,
    config: Annotated[Config, tyro.conf.arg(name="")] = Config(),
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None,
    resume: bool = False,
    allow_changes: bool = False,
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

    Returns:
        The exit code.
    """
    del config_file  # The command line made it the default of `config`.
    console = reports.create_console()
    check_config(config)
    _check_run_folder(out, config, resume=resume, allow_changes=allow_changes)
    # Whatever a mistake in the config could break comes before the first long work.
    devices = parallel.select_devices(
        config.num_devices, batch_size=config.batch_size // config.num_microbatches
    )
    axis_name = parallel.axis_name(devices)
    model = construct.create_model(config, axis_name=axis_name)
    loss_fn = construct.create_loss(config.loss, num_classes=config.model.num_classes)
    log_fn = construct.create_tensorboard_log(out) if config.tensorboard else None
    weights = read_weights(config.init_weights) if config.init_weights else None
    fingerprint = _take_fingerprint(out, config, resume=resume, allow_changes=allow_changes)
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
    batches = construct.create_loader(builder, "train", config)
    history, totals = [], EpochTotals()
    out.mkdir(parents=True, exist_ok=True)
    reports.write_text(out / "config.json", to_json(config))
    store = CheckpointStore(out / "checkpoints", num_kept=config.num_checkpoints)
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
    fingerprint["sessions"].append(describe_session(step=int(state.step)))
    reports.write_json(out / "fingerprint.json", fingerprint)

    train_step = parallel.compile_step(
        functools.partial(
            training.train_step,
            loss_fn=loss_fn,
            loss_fields=construct.loss_fields(loss_fn),
            augment_fn=functools.partial(
                augment.augment, patch_shape=config.data.patch_shape, **asdict(config.augment)
            ),
            statistics_fn=construct.loss_statistics,
            axis_name=axis_name,
            num_microbatches=config.num_microbatches,
            skip_non_finite=config.non_finite == "skip",
        ),
        devices,
        donate_state=True,
    )
    eval_step = parallel.compile_step(
        functools.partial(
            training.eval_step,
            apply_fn=model.apply,
            loss_fn=loss_fn,
            loss_fields=construct.loss_fields(loss_fn),
            predict_fn=construct.create_predict_fn(config),
            counts_fn=functools.partial(construct.count, num_classes=config.model.num_classes),
        ),
        devices,
    )

    def validate(variables: Any, stop: StopRequest) -> list[loop.Row]:
        batches = stop.between(construct.create_loader(builder, "val", config))
        return loop.evaluate(variables, batches, eval_step=eval_step, devices=devices)

    num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    console.print(
        f"{config.model.name}, {num_parameters:,} parameters, {config.loss.name} loss; "
        f"{num_cases} cases to train and {num_val} to validate; {len(devices)} "
        f"{devices[0].platform} device(s), batch {config.batch_size}; compiling the first step",
        highlight=False,
        soft_wrap=True,
    )
    try:
        with deferred_signals() as stop:
            history = loop.fit(
                state,
                config=config,
                batches=batches,
                num_steps=num_steps,
                train_step=train_step,
                evaluate_fn=functools.partial(validate, stop=stop),
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
        best = store.restore_best()
    finally:
        store.close()
    variables = parallel.replicate(best.variables, devices)
    rows = validate(variables, StopRequest())
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
        f"{out}: checkpoints, config.json, metrics.csv, validation.csv, curves.png, overlay.png",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _check_run_folder(out: Path, config: Config, *, resume: bool, allow_changes: bool) -> None:
    """A new run needs a new folder; a resumed one, the config that it began with."""
    remove_leftovers(out)
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(
                f"--out {out} exists already: choose another folder, or go on with --resume."
            )
        return
    path = out / "config.json"
    if not path.exists():
        raise InputError(f"--out {out} is not a run that could be resumed: it has no config.json.")
    differences = [
        f"{name} is {before}, got {now}"
        for name, (now, before) in changed_fields(config, read_config(path)).items()
        if name not in _FREE_ON_RESUME
    ]
    if differences and not allow_changes:
        raise InputError(
            f"--resume goes on with the config of {path}, where {'; '.join(differences)}: leave "
            "the options out, start a new run, or say --allow-changes."
        )


def _take_fingerprint(
    out: Path, config: Config, *, resume: bool, allow_changes: bool
) -> dict[str, Any]:
    """The data set of the run, as it must have been before, and its sessions before this one."""
    builder = construct.create_builder(config.data)
    keys = zip(builder.cases, builder.builder_config.keys, strict=True)
    splits = builder.split_cases().items()
    data = describe_data(
        config.data.name,
        keys={case.case_id: key for case, key in keys},
        splits={name: [case.case_id for case in cases] for name, cases in splits},
    )
    path, sessions = out / "fingerprint.json", []
    if resume and path.exists():
        before = read_fingerprint(path)
        difference = data_difference(before["data"], data)
        if difference and not allow_changes:
            raise InputError(
                f"--resume goes on with the data set of {path}, but {difference}: bring it back, "
                "start a new run, or say --allow-changes."
            )
        sessions = before["sessions"]
    return {"data": data, "sessions": sessions}


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
