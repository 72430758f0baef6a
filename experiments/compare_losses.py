"""The paper's comparison: losses x seeds with one network, one budget and one order of the cases.

Claim, of the paper: A-FL is ahead of focal, Dice, Dice-Focal and the others for small, irregular
lesions. Found, with 5 seeds on the phantom: the losses with a Dice term are ahead (0.68 to 0.72);
A-FL by voxel (0.52) is ahead of focal (0.34) and of itself by volume (0.35), and finds the most
lesions of all, small ones above all, at the price of marking too much. See the README.

    python -m experiments.compare_losses --out runs/losses
    python -m experiments.compare_losses --out runs/losses_hippocampus --dataset hippocampus \
        --source Task04_Hippocampus --num-seeds 3 \
        --losses adaptive_focal irregularity_focal focal dice_cross_entropy

It ends with ``report.md`` (also on the screen), ``table.csv``, ``thirds.csv`` and
``comparison.png``; ``cells`` holds every case of every cell. Run again after an interruption, it
goes on. ``--num-processes`` shares the losses among processes, each with a GPU of its own where
there are any; with one process every GPU takes a part of each batch. ``--network full`` trains the
data set's own network, the ResNet50 U-Net, in place of the narrow one, and ``--dataset picai2022``
or ``brats2018`` the paper's data with the paper's recipe; both want a GPU.

What is reported: the last epoch, of the ``test`` cases if the data set has them, else of ``val``;
no case chooses an epoch, a threshold or a setting. Every loss is read with the activation with
which it was trained. All share one learning rate, which is tuned for none of them.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rich.console import Console

from afl_jax.config import Config, DataConfig, LossConfig, OptimizerConfig
from afl_jax.errors import InputError
from afl_jax.losses import LOSSES
from afl_jax.presets import PRESETS, with_narrow_network
from experiments import msd_hippocampus
from experiments.cells import read_cells, run_cells
from experiments.comparison_report import write_report
from experiments.end_to_end import run_script

Dataset = Literal["phantom", "hippocampus", "picai2022", "brats2018"]
Network = Literal["narrow", "full"]

REFERENCE = "adaptive_focal"
# Every loss by its name, and of the published A-FL the form that the paper prints.
COLUMNS = {name: LossConfig(name=name) for name in LOSSES} | {
    "adaptive_focal_volume": LossConfig(name="adaptive_focal", options=(("balance", "volume"),))
}
# The paper's seven baselines, A-FL in both forms, and the form of our own.
DEFAULT = (
    *("adaptive_focal", "adaptive_focal_volume", "irregularity_focal", "cross_entropy", "focal"),
    *("dice", "iou", "tversky", "dice_cross_entropy", "dice_focal"),
)
# A rate at which a narrow network learns in few steps.
_OPTIMIZER = OptimizerConfig(learning_rate=1e-2)
DATASETS: dict[Dataset, Config] = {
    "phantom": Config(
        data=DataConfig(shape=(32, 32, 8), num_train=160, num_val=100),
        optimizer=_OPTIMIZER,
        num_epochs=10,
        eval_every=10,
    ),
    "hippocampus": dataclasses.replace(
        msd_hippocampus.ADAPTIVE_FOCAL, optimizer=_OPTIMIZER, num_epochs=4, eval_every=4
    ),
    "picai2022": PRESETS["picai2022"],
    "brats2018": PRESETS["brats2018"],
}


def main(
    out: Path,
    dataset: Dataset = "phantom",
    losses: tuple[str, ...] = DEFAULT,
    num_seeds: int = 5,
    network: Network = "narrow",
    num_epochs: int | None = None,
    source: Path | None = None,
    data_dir: Path = Path("data"),
    num_processes: int = 1,
) -> int:
    """Trains what is not done yet, then compares.

    Args:
        out: Folder of the comparison.
        dataset: What to train on.
        losses: Columns; the first is what the others are compared with, unless adaptive_focal
            is among them.
        num_seeds: Seeds of each loss.
        network: The narrow ResNet18 U-Net, or the data set's own.
        num_epochs: In place of the data set's own.
        source: Folder of the raw files; not for the phantom.
        data_dir: Where prepared data sets are kept.
        num_processes: Processes that share the losses.

    Returns:
        The exit code.
    """
    if unknown := sorted(set(losses) - set(COLUMNS)):
        raise InputError(f"no loss is called {unknown[0]!r}: choose from {', '.join(COLUMNS)}.")
    return compare(
        {name: COLUMNS[name] for name in losses},
        configure(
            dataset, network=network, num_epochs=num_epochs, source=source, data_dir=data_dir
        ),
        reference=REFERENCE if REFERENCE in losses else losses[0],
        num_seeds=num_seeds,
        out=out,
        num_processes=num_processes,
    )


def configure(
    dataset: Dataset,
    *,
    network: Network,
    num_epochs: int | None,
    source: Path | None,
    data_dir: Path,
) -> Config:
    """The run that the cells share.

    Args:
        dataset: See `main`.
        network: See `main`.
        num_epochs: See `main`.
        source: See `main`.
        data_dir: See `main`.

    Returns:
        The config, but for loss and seed.
    """
    config = DATASETS[dataset]
    if network == "narrow":
        config = with_narrow_network(config)
    if num_epochs is not None:
        config = dataclasses.replace(config, num_epochs=num_epochs, eval_every=num_epochs)
    data = dataclasses.replace(
        config.data, source=None if source is None else str(source), data_dir=str(data_dir)
    )
    return dataclasses.replace(config, data=data)


def compare(
    columns: Mapping[str, LossConfig],
    config: Config,
    *,
    reference: str,
    num_seeds: int,
    out: Path,
    num_processes: int,
) -> int:
    """Trains the cells that are not done, writes the report and prints it.

    Args:
        columns: Loss of each column.
        config: The run that the cells share.
        reference: The column with which the others are compared.
        num_seeds: Seeds of each column.
        out: Folder of the comparison.
        num_processes: Processes that share the columns.

    Returns:
        The exit code.
    """
    run_cells(columns, config, num_seeds=num_seeds, out=out, num_processes=num_processes)
    cells = read_cells(columns, num_seeds=num_seeds, out=out)
    Console().print(
        write_report(cells, reference=reference, out=out), highlight=False, soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
