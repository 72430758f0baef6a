"""A run with checkpoints within its epochs, and what tells two such runs apart."""

import csv
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tiny_run import PHANTOM, TINY

NUM_STEPS = 3  # An epoch: six cases in batches of two.
TIMES = ("volumes_per_second", "data_wait_fraction")


def command(out: Path, data_dir: Path) -> list[str]:
    cases = ["--data.num-train", str(2 * NUM_STEPS)]
    run = ["train", "--out", str(out), "--data.data-dir", str(data_dir)]
    return [*run, *TINY, *PHANTOM, *cases, "--checkpoint-every", "2", "--num-checkpoints", "3"]


def read_log(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without those that are times."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: row[name] for name in row if name not in TIMES} for row in rows]


def checkpoint_numbers(run: Path) -> list[int]:
    names = [path.name for path in (run / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def read_arrays(run: Path) -> Any:
    """Parameters, running statistics and state of the optimizer of the newest checkpoint."""
    newest = run / "checkpoints" / str(checkpoint_numbers(run)[-1])
    with ocp.StandardCheckpointer() as checkpointer:
        return {name: checkpointer.restore(newest / name) for name in ("variables", "optimizer")}


def assert_same_run(run: Path, expected: Path) -> None:
    assert read_log(run) == read_log(expected)
    jax.tree.map(np.testing.assert_array_equal, read_arrays(run), read_arrays(expected))
