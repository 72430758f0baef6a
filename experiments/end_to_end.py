"""From raw files to a table: prepare, train, predict the test cases on their own grids, evaluate.

What the experiments on PI-CAI and BraTS share. A run that was interrupted goes on; masks and tables
are made anew.
"""

import csv
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from afl_jax import reports
from afl_jax.commands.evaluate import evaluate
from afl_jax.commands.predict import predict
from afl_jax.commands.train import train
from afl_jax.config import Config, LossConfig, ModelConfig
from afl_jax.errors import InputError, print_error

# Metric and its heading.
METRICS = {
    "dice": "Dice",
    "iou": "IoU",
    "sensitivity": "sens",
    "specificity": "spec",
    "lesion_f1": "lesion F1",
}


def run_script(main: Callable[..., int]) -> int:
    """Runs the function of a script with the arguments of the command line.

    Args:
        main: Takes them.

    Returns:
        The exit code; 2 after bad input.
    """
    try:
        return tyro.cli(main)
    except InputError as error:
        print_error(error)
        return 2


def run_chosen(
    runs: Mapping[str, Config],
    names: Sequence[str],
    *,
    source: Path | None,
    smoke: bool,
    make_fn: Callable[..., Path],
    shrink_fn: Callable[[Config], Config],
    out: Path,
    data_dir: Path,
) -> int:
    """Takes the runs that a user chose from raw or generated files to their table.

    Args:
        runs: All of the experiment, the paper's first.
        names: Of those to run; all if empty, and on generated files the first.
        source: Folder of the raw files, or None.
        smoke: Whether files are to be generated.
        make_fn: Generates them, ``(folder, *, real_data)``.
        shrink_fn: A run to one for the generated files.
        out: Folder of the runs.
        data_dir: Where prepared data sets are kept; those of generated files are not.

    Returns:
        The exit code.

    Raises:
        InputError: If a name is unknown, or both or neither kind of files is asked for.
    """
    if unknown := sorted(set(names) - set(runs)):
        raise InputError(f"no run is called {unknown[0]!r}: choose from {', '.join(runs)}.")
    if (source is None) != smoke:
        raise InputError("give either --source or --smoke.")
    chosen = {name: runs[name] for name in names or tuple(runs)[: 1 if smoke else None]}
    if not smoke:
        return run_all(chosen, source=source, out=out, data_dir=data_dir)
    real_data = os.environ.get("AFL_JAX_REAL_DATA")
    with tempfile.TemporaryDirectory() as folder:
        made = make_fn(Path(folder, "raw"), real_data=Path(real_data) if real_data else None)
        chosen = {name: shrink_fn(config) for name, config in chosen.items()}
        return run_all(chosen, source=made, out=out, data_dir=Path(folder, "data"))


def run_all(runs: Mapping[str, Config], *, source: Path, out: Path, data_dir: Path) -> int:
    """Takes every run from the raw files to its table, and prints all tables side by side.

    Args:
        runs: Config by name; where the raw files lie is filled in.
        source: Folder of the raw files.
        out: Folder of the runs.
        data_dir: Where prepared data sets are kept.

    Returns:
        The exit code.
    """
    console, columns = Console(), {}
    for name, config in runs.items():
        start = time.monotonic()
        data = dataclasses.replace(config.data, source=str(source), data_dir=str(data_dir))
        config, run = dataclasses.replace(config, data=data), out / name
        console.rule(name)
        code = train(out=run, config=config, resume=(run / "config.json").exists())
        code = code or predict(run=(run,), split="test", out=run / "test", overwrite=True)
        code = code or evaluate(predictions=run / "test", run=run)
        if code:
            return code
        with (run / "test" / "evaluation" / "cases.csv").open(newline="") as file:
            rows = [{m: float(row[m]) for m in METRICS} for row in csv.DictReader(file)]
        summaries = reports.summarise(rows)
        minutes = f"{(time.monotonic() - start) / 60:.1f}"
        dice = summaries["dice"]
        means = [f"{summary.mean:.3f}" for summary in summaries.values()]
        columns[name] = [f"{dice.low:.3f} to {dice.high:.3f}", *means, str(len(rows)), minutes]
    table = Table(title="test cases, means", box=box.SIMPLE_HEAD)
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    names = ("Dice, 95 % interval", *METRICS.values(), "cases", "minutes")
    for name, *values in zip(names, *columns.values(), strict=True):
        table.add_row(name, *values)
    console.print(table)
    return 0


def shrink(config: Config, *, num_epochs: int) -> Config:
    """A run with the same data and path, but a network and a budget for a trial on two cores.

    Args:
        config: The run.
        num_epochs: In place of the run's.

    Returns:
        The run with a narrow ResNet18 encoder, AdamW, and a loss that balances the voxels of a
        case, so that it finds lesions within a few dozen steps.
    """
    model = ModelConfig(
        name="resnet18_unet",
        num_classes=config.model.num_classes,
        strides=config.model.strides,
        width=16,
        decoder_features=(64, 32, 16, 16, 8),
    )
    optimizer = dataclasses.replace(
        config.optimizer, name="adamw", learning_rate=3e-3, num_warmup_steps=0
    )
    return dataclasses.replace(
        config,
        model=model,
        loss=LossConfig(name="adaptive_focal", options=(("balance", "voxel"),)),
        optimizer=optimizer,
        num_epochs=num_epochs,
        eval_every=num_epochs,
        batch_size=1,
    )
