"""MSD hippocampus: the adaptive focal loss beside the focal loss, on real MRI, with equal budgets.

Claim: the whole pipeline learns real anatomy on two CPU cores, to a foreground Dice above 0.75 on
the 16 of 64 cases that are held out. Both labels of Task04 (anterior and posterior) are taken as
one foreground. That one loss does better than another here is not claimed: it is one seed.

    python -m experiments.msd_hippocampus --source Task04_Hippocampus --out runs/hippocampus

The data are Task04 of the Medical Segmentation Decathlon (http://medicaldecathlon.com, CC BY-SA
4.0); any folder in its layout does. Cost and result: see the README.
"""

import csv
import dataclasses
from pathlib import Path

import tyro
from rich.console import Console

from afl_jax import loop, reports
from afl_jax.commands.train import train
from afl_jax.config import AugmentConfig, Config, DataConfig, LossConfig, ModelConfig

ADAPTIVE_FOCAL = Config(
    data=DataConfig(
        name="folder",
        # The largest volume has 43 x 59 x 47 voxels, of 1 mm.
        shape=(48, 64, 48),
        label_map=((0, 0), (1, 1), (2, 1)),
        num_val=16,
    ),
    model=ModelConfig(
        strides=((2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1)),
        width=32,
        decoder_features=(128, 64, 32, 16, 16),
    ),
    loss=LossConfig(name="adaptive_focal", options=(("balance", "volume"),)),
    # A flip along x would make a left hippocampus of a right one.
    augment=AugmentConfig(flip_probability=0.0),
    num_epochs=12,
    batch_size=2,
    eval_every=3,
)
RUNS = {
    "adaptive_focal": ADAPTIVE_FOCAL,
    "adaptive_focal_voxel": dataclasses.replace(
        ADAPTIVE_FOCAL, loss=LossConfig(name="adaptive_focal", options=(("balance", "voxel"),))
    ),
    "focal": dataclasses.replace(ADAPTIVE_FOCAL, loss=LossConfig(name="focal")),
}


def main(source: Path, out: Path, data_dir: Path = Path("data")) -> None:
    """Trains every run, or goes on with it, and prints their validation side by side.

    Args:
        source: Folder with dataset.json, imagesTr and labelsTr.
        out: Folder of the runs.
        data_dir: Where the prepared data set is kept.
    """
    rows = []
    for name, config in RUNS.items():
        data = dataclasses.replace(config.data, source=str(source), data_dir=str(data_dir))
        run = out / name
        resume = (run / "config.json").exists()
        train(out=run, config=dataclasses.replace(config, data=data), resume=resume)
        with (run / "validation.csv").open(newline="") as file:
            cases = [{m: float(case[m]) for m in loop.METRICS} for case in csv.DictReader(file)]
        summaries = reports.summarise(cases)
        rows.append({"run": name} | {metric: s.mean for metric, s in summaries.items()})
    console = Console()
    for row in rows:
        console.print(
            "  ".join(f"{k} {v if isinstance(v, str) else f'{v:.3f}'}" for k, v in row.items())
        )


if __name__ == "__main__":
    tyro.cli(main)
