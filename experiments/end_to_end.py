"""From raw files to a table: prepare, train, predict the test cases on their own grids, evaluate.

What the experiments on PI-CAI and BraTS share. A run that was interrupted goes on; masks and tables
are made anew.
"""

import csv
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from afl_jax import reports
from afl_jax.commands.evaluate import evaluate
from afl_jax.commands.predict import predict
from afl_jax.commands.train import train
from afl_jax.config import Config, LossConfig, ModelConfig

# Metric and its heading.
METRICS = {
    "dice": "Dice",
    "iou": "IoU",
    "sensitivity": "sens",
    "specificity": "spec",
    "lesion_f1": "lesion F1",
}


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
        code = code or predict(run=run, split="test", out=run / "test")
        code = code or evaluate(predictions=run / "test", run=run, out=run / "test.csv")
        if code:
            return code
        with (run / "test.csv").open(newline="") as file:
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
