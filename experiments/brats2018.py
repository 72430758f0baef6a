"""BraTS 2018: the paper's run, and the one that we would do in its place, from the raw files.

Claim: none yet. The paper reports a soft Dice of 0.927 to 0.951 for A-FL on the whole tumour,
chosen and measured on randomly cropped test cases; what stands here is measured once, on whole
images of patients that were held out.

    python -m experiments.brats2018 --source MICCAI_BraTS_2018_Data_Training --out runs/brats2018

``--source`` holds ``HGG`` and ``LGG``, see ``afl_jax/data/brats2018.py``. The runs are presets, so
that ``afl-jax prepare brats2018`` and ``afl-jax train brats2018`` do the same by hand:

- ``brats2018``, the paper's: whole tumour, crops of 224 x 224 x 144, SGD at 0.1, batch 1, 200
  epochs: 39,800 steps of 3,840 GFLOP for 199 training cases;
- ``brats2018-recommended``: the three regions as classes, crops of 128 x 128 x 128, half of them
  about the tumour, AdamW, batch 2, 200 epochs: 19,800 steps of 2,203 GFLOP.

Cost: a step of the first takes a minute on two CPU cores; both are meant for a GPU, and were not
run on one yet. A prepared case is 156 MB; all 285 are 45 GB, and twice that while they are
prepared.
``--smoke`` runs the first on ten generated cases of 60 x 60 x 39 voxels, with a narrow network and
a short budget, in about a minute on two cores: it shows that the path is whole, nothing else.
"""

import dataclasses
import functools
import sys
from pathlib import Path

from afl_jax.config import Config
from afl_jax.presets import PRESETS
from experiments.end_to_end import run_chosen, run_script, shrink
from tests.official_layouts import make_brats2018

RUNS = {name: PRESETS[name] for name in ("brats2018", "brats2018-recommended")}


def main(
    out: Path,
    source: Path | None = None,
    data_dir: Path = Path("data"),
    runs: tuple[str, ...] = (),
    smoke: bool = False,
) -> int:
    """Trains, predicts and evaluates; ends with one table.

    Args:
        out: Folder of the runs.
        source: Folder with HGG and LGG; not with --smoke.
        data_dir: Where prepared data sets are kept.
        runs: Which of the runs; all if empty, and with --smoke the paper's.
        smoke: A trial of the whole path on generated cases.

    Returns:
        The exit code.
    """
    return run_chosen(
        RUNS,
        runs,
        source=source,
        smoke=smoke,
        make_fn=functools.partial(make_brats2018, shape=(60, 60, 39)),
        shrink_fn=shrink_run,
        out=out,
        data_dir=data_dir,
    )


def shrink_run(config: Config) -> Config:
    """The run for volumes of a quarter of the size, with a small network and budget.

    Args:
        config: The run.

    Returns:
        The run.
    """
    patch_shape = (64, 64, 48) if config.data.target == "WT" else (32, 32, 32)
    data = dataclasses.replace(config.data, shape=(64, 64, 48), patch_shape=patch_shape)
    return dataclasses.replace(shrink(config, num_epochs=8), data=data)


if __name__ == "__main__":
    sys.exit(run_script(main))
