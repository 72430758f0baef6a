"""Losses x seeds, cell by cell, with equal budgets: what the comparison and the ablation share.

A cell is one loss trained with one seed, which gives the initial weights, the order of the cases
and every draw of the augmentation: cells of one seed differ in their loss alone. The last epoch is
what is reported, so that no case chooses anything; of a data set with a ``test`` split these cases
are reported, else those of ``val``.

A cell is done once its file of cases is there, which is written beside and renamed. A run that was
killed goes on with the cells that are not done, one that was underway from its last checkpoint; the
tables follow from the files alone.
"""

import csv
import dataclasses
import functools
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from afl_jax import lesions, loop, parallel, reports, training
from afl_jax.checkpoint import CheckpointStore, EpochTotals
from afl_jax.commands import construct
from afl_jax.config import Config, LossConfig, check_config, to_json
from afl_jax.errors import InputError
from afl_jax.irregularity import surface_irregularity
from afl_jax.signals import StopRequest

Columns = Mapping[str, LossConfig]


def run_cells(
    columns: Columns, base: Config, *, num_seeds: int, out: Path, num_processes: int = 1
) -> None:
    """Trains and evaluates every cell that is not done.

    Args:
        columns: Loss of each column of the table.
        base: The run, but for its loss and seed.
        num_seeds: Seeds 0, 1, ... of each column.
        out: Folder of the comparison.
        num_processes: Processes that share the columns; each has a GPU of its own, where there
            are any.

    Raises:
        InputError: If the folder holds another comparison, or a config is not valid.
    """
    configs = {name: dataclasses.replace(base, loss=loss) for name, loss in columns.items()}
    for config in configs.values():
        check_config(config)
        construct.create_loss(config.loss, num_classes=config.model.num_classes)
    for name, config in configs.items():
        path = out / "cells" / f"{name}.json"
        # Where the data lie makes no other comparison.
        data = dataclasses.replace(config.data, source=None, data_dir="")
        text = to_json(dataclasses.replace(config, data=data))
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise InputError(
                f"{path} is of another comparison than this one: choose another --out."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        reports.write_text(path, text)
    construct.prepare_data(base.data, Console())
    run = functools.partial(_run_column, num_seeds=num_seeds, out=out)
    if num_processes == 1:
        for item in configs.items():
            run(item)
        return
    # Forked processes would share the threads of JAX, which do not survive it.
    context = multiprocessing.get_context("spawn")
    numbers = context.Value("i", 0)
    with ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=_take_device, initargs=(numbers,)
    ) as pool:
        list(pool.map(run, configs.items()))


def read_cells(columns: Columns, *, num_seeds: int, out: Path) -> dict[str, list[list[loop.Row]]]:
    """The cases of every cell.

    Args:
        columns: As in `run_cells`.
        num_seeds: As in `run_cells`.
        out: As in `run_cells`.

    Returns:
        Column to its seeds, each a row for every case: ``case_id``, the metrics, ``lesion_tp``,
        ``lesion_fp`` and ``lesion_fn``, and of the label ``lesion_volume_mm3``, ``roughness`` and
        ``irregularity``, NaN without lesion.
    """
    cells = {}
    for name in columns:
        cells[name] = []
        for seed in range(num_seeds):
            with _cell_path(out, name, seed).open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            cells[name].append(
                [{k: v if k == "case_id" else float(v) for k, v in row.items()} for row in rows]
            )
    return cells


def _cell_path(out: Path, name: str, seed: int) -> Path:
    return out / "cells" / f"{name}-{seed}.csv"


def _take_device(numbers: Any) -> None:
    """Gives a process the GPU of its number, before JAX looks for one."""
    with numbers.get_lock():
        os.environ["CUDA_VISIBLE_DEVICES"] = str(numbers.value)
        numbers.value += 1


def _run_column(item: tuple[str, Config], *, num_seeds: int, out: Path) -> None:
    """All seeds of one loss, whose steps are compiled once."""
    name, config = item
    todo = [seed for seed in range(num_seeds) if not _cell_path(out, name, seed).exists()]
    if not todo:
        return
    console, start = Console(), time.monotonic()
    train_cell = _compile_cell(config, console)
    for seed in todo:
        path = _cell_path(out, name, seed)
        folder = path.with_suffix("")
        rows = train_cell(dataclasses.replace(config, seed=seed), folder)
        reports.write_csv(path, rows)
        shutil.rmtree(folder)
        dice = np.nanmean([row["dice"] for row in rows])
        seconds = time.monotonic() - start
        console.print(f"{name}, seed {seed}: Dice {dice:.3f}, {seconds:.0f} s", highlight=False)
        start = time.monotonic()


def _compile_cell(config: Config, console: Console) -> Callable[[Config, Path], list[loop.Row]]:
    """A function from (config with its seed, folder of the cell) to a row for each case."""
    builder = construct.prepare_data(config.data, console)
    split = "test" if builder.num_cases("test") else "val"
    num_steps = builder.num_cases("train") // config.batch_size
    devices = parallel.select_devices(
        config.num_devices, batch_size=config.batch_size // config.num_microbatches
    )
    axis_name = parallel.axis_name(devices)
    model = construct.create_model(config, axis_name=axis_name)
    optimizer = construct.create_optimizer(config, num_steps=num_steps)
    loss_fn = construct.create_loss(config.loss, num_classes=config.model.num_classes)

    @jax.jit
    def create_state(key: jax.Array) -> training.TrainState:
        image = jnp.zeros((1, *config.data.shape, builder.num_channels))
        return training.create_train_state(model.apply, model.init(key, image), optimizer)

    train_step, eval_step = construct.compile_steps(config, model, loss_fn=loss_fn, devices=devices)

    def train_cell(config: Config, folder: Path) -> list[loop.Row]:
        weights_key, augment_key = jax.random.split(jax.random.key(config.seed))
        state = create_state(weights_key)
        batches = construct.create_loader(builder, "train", config)
        rows, history, totals = [], [], EpochTotals()

        def evaluate(variables: Any) -> list[loop.Row]:
            cases = construct.create_loader(builder, split, config)
            rows[:] = _case_rows(variables, cases, eval_step=eval_step, devices=devices)
            return rows

        folder.mkdir(parents=True, exist_ok=True)
        store = CheckpointStore(folder / "checkpoints")
        try:
            if not store.is_empty:
                restored = store.restore_newest(
                    optimizer={"step": state.step, "opt_state": state.opt_state}
                )
                state = state.replace(**restored.variables, **restored.optimizer)
                batches.set_state(restored.iterator)
                history, totals = restored.history, restored.totals
            if len(history) == config.num_epochs:
                return evaluate(parallel.replicate(state.variables, devices))
            loop.fit(
                state,
                config=config,
                batches=batches,
                num_steps=num_steps,
                train_step=train_step,
                evaluate_fn=evaluate,
                key=augment_key,
                devices=devices,
                store=store,
                run_dir=folder,
                console=Console(quiet=True),
                stop=StopRequest(),
                history=history,
                totals=totals,
            )
        finally:
            store.close()
        return rows

    return train_cell


def _case_rows(
    variables: Any,
    batches: Any,
    *,
    eval_step: Callable[..., Any],
    devices: Sequence[jax.Device],
) -> list[loop.Row]:
    """A row for each case; lesions are those of all foreground."""
    irregularity_of = jax.jit(surface_irregularity)
    rows = []
    for batch, output in loop.run_eval_step(
        variables, batches, eval_step=eval_step, devices=devices
    ):
        metrics = loop.metric_rows(output["counts"])
        irregularity = np.asarray(irregularity_of(batch["labels"], spacing=batch["spacing"]))
        for i in np.flatnonzero(batch["valid"]):
            counts = lesions.match_lesions(output["prediction"][i], batch["labels"][i])
            has_lesion = batch["labels"][i].any()
            rows.append(
                {"case_id": str(batch["case_id"][i]), "loss": float(output["loss"][i])}
                | {name: metrics[i][name] for name in loop.METRICS}
                | {f"lesion_{name}": count for name, count in counts._asdict().items()}
                | {
                    "lesion_volume_mm3": float(batch["lesion_volume_mm3"][i]),
                    "roughness": float(batch["roughness"][i]),
                    "irregularity": float(irregularity[i]) if has_lesion else float("nan"),
                }
            )
    return rows
