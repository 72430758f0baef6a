"""The paper's comparison: losses x seeds, one network, one budget, one table."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from afl_jax.config import Config, DataConfig, LossConfig, OptimizerConfig
from afl_jax.errors import InputError
from afl_jax.losses import LOSSES
from afl_jax.presets import PRESETS, with_narrow_network
from experiments import msd_hippocampus
from experiments.cells import run_cells
from experiments.end_to_end import run_script

# The forms of A-FL that are columns of their own, beside every loss by its name.
VOLUME = LossConfig(name="adaptive_focal", options=(("balance", "volume"),))
COLUMNS = {name: LossConfig(name=name) for name in LOSSES} | {"adaptive_focal_volume": VOLUME}

DATASETS: dict[str, Config] = {
    "phantom": Config(
        data=DataConfig(shape=(32, 32, 8), num_train=160, num_val=100),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        num_epochs=12,
        eval_every=12,
    ),
    "hippocampus": dataclasses.replace(
        msd_hippocampus.ADAPTIVE_FOCAL,
        optimizer=OptimizerConfig(learning_rate=3e-3),
        num_epochs=4,
        eval_every=4,
    ),
    "picai2022": PRESETS["picai2022"],
    "brats2018": PRESETS["brats2018"],
}


def main(
    out: Path,
    dataset: Literal["phantom", "hippocampus", "picai2022", "brats2018"] = "phantom",
    losses: tuple[str, ...] = tuple(COLUMNS),
    num_seeds: int = 5,
    network: Literal["narrow", "full"] = "narrow",
    num_epochs: int | None = None,
    source: Path | None = None,
    data_dir: Path = Path("data"),
    num_processes: int = 1,
) -> int:
    if unknown := sorted(set(losses) - set(COLUMNS)):
        raise InputError(f"no loss is called {unknown[0]!r}: choose from {', '.join(COLUMNS)}.")
    config = DATASETS[dataset]
    if network == "narrow":
        config = with_narrow_network(config)
    data = dataclasses.replace(
        config.data, source=None if source is None else str(source), data_dir=str(data_dir)
    )
    config = dataclasses.replace(config, data=data)
    if num_epochs:
        config = dataclasses.replace(config, num_epochs=num_epochs, eval_every=num_epochs)
    columns = {name: COLUMNS[name] for name in losses}
    run_cells(columns, config, num_seeds=num_seeds, out=out, num_processes=num_processes)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
