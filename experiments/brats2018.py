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
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tyro

from afl_jax.config import Config
from afl_jax.errors import InputError, print_error
from afl_jax.presets import PRESETS
from experiments.end_to_end import run_all, shrink

RUNS = {name: PRESETS[name] for name in ("brats2018", "brats2018-recommended")}
# Of generated cases, 60 x 60 x 39 voxels, a quarter of the real ones along each axis.
_SMOKE_SHAPES = {"brats2018": (64, 64, 48), "brats2018-recommended": (32, 32, 32)}


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
    if unknown := sorted(set(runs) - set(RUNS)):
        raise InputError(f"no run is called {unknown[0]!r}: choose from {', '.join(RUNS)}.")
    runs = runs or tuple(RUNS)[: 1 if smoke else None]
    if (source is None) != smoke:
        raise InputError("give either --source or --smoke.")
    configs = {name: RUNS[name] for name in runs}
    if not smoke:
        return run_all(configs, source=source, out=out, data_dir=data_dir)
    from tests.official_layouts import make_brats2018

    real_data = os.environ.get("AFL_JAX_REAL_DATA")
    with tempfile.TemporaryDirectory() as folder:
        made = make_brats2018(
            Path(folder, "raw"),
            shape=(60, 60, 39),
            real_data=Path(real_data) if real_data else None,
        )
        configs = {
            name: shrink_volumes(shrink(config, num_epochs=8), _SMOKE_SHAPES[name])
            for name, config in configs.items()
        }
        return run_all(configs, source=made, out=out, data_dir=Path(folder, "data"))


def shrink_volumes(config: Config, patch_shape: tuple[int, int, int]) -> Config:
    """The run for volumes of a quarter of the size.

    Args:
        config: The run.
        patch_shape: Of its crops.

    Returns:
        The run.
    """
    data = dataclasses.replace(config.data, shape=(64, 64, 48), patch_shape=patch_shape)
    return dataclasses.replace(config, data=data)


def run(arguments: Sequence[str] | None = None) -> int:
    """The script: `main` with the arguments of the command line.

    Args:
        arguments: In place of the command line's.

    Returns:
        The exit code; 2 after bad input.
    """
    try:
        return tyro.cli(main, args=arguments)
    except InputError as error:
        print_error(error)
        return 2


if __name__ == "__main__":
    sys.exit(run())
