"""PI-CAI 2022: the paper's run, and the one that we would do in its place, from the raw files.

Claim: none yet. The paper reports a soft Dice of 0.769 for A-FL, chosen and measured on the test
cases; what stands here is measured once, on an official fold, on T2W's own grid.

    python -m experiments.picai2022 --source picai --out runs/picai2022

``--source`` holds ``images`` and ``picai_labels``, see ``afl_jax/data/picai2022.py``. The runs are
presets, so that ``afl-jax prepare picai2022`` and ``afl-jax train picai2022`` do the same by hand:

- ``picai2022``, the paper's: 220 positive cases of the experts, stretched to 160 x 128 x 24, SGD at
  0.1, batch 1, 200 epochs: 28,200 steps of 248 GFLOP for 141 training cases;
- ``picai2022-recommended``: all 1500 cases with 425 positives, 0.5 x 0.5 x 3 mm, 256 x 256 x 20,
  AdamW, batch 4, 100 epochs: 24,000 steps of 7,297 GFLOP for 960 training cases.

Cost: the first takes 28,200 x 4 s = 31 hours on two CPU cores, and the second is meant for a GPU.
Neither was run on one yet. ``--smoke`` runs the first on ten generated cases, with a narrow network
and a short budget, in about a minute on two cores: it shows that the path is whole, nothing else.
"""

import dataclasses
import functools
import sys
from pathlib import Path

from afl_jax.config import Config
from afl_jax.presets import PRESETS
from experiments.end_to_end import run_chosen, run_script, shrink
from tests.official_layouts import make_picai2022

RUNS = {name: PRESETS[name] for name in ("picai2022", "picai2022-recommended")}


def main(
    out: Path,
    source: Path | None = None,
    data_dir: Path = Path("data"),
    runs: tuple[str, ...] = (),
    fold: int = 0,
    smoke: bool = False,
) -> int:
    """Trains, predicts and evaluates; ends with one table.

    Args:
        out: Folder of the runs.
        source: Folder with images and picai_labels; not with --smoke.
        data_dir: Where prepared data sets are kept.
        runs: Which of the runs; all if empty, and with --smoke the paper's.
        fold: Official fold to test on, from 0 to 4.
        smoke: A trial of the whole path on generated cases.

    Returns:
        The exit code.
    """
    return run_chosen(
        {
            name: dataclasses.replace(config, data=dataclasses.replace(config.data, fold=fold))
            for name, config in RUNS.items()
        },
        runs,
        source=source,
        smoke=smoke,
        make_fn=functools.partial(make_picai2022, num_cases=10),
        shrink_fn=shrink_run,
        out=out,
        data_dir=data_dir,
    )


def shrink_run(config: Config) -> Config:
    """The run on a coarser grid, that its strides divide, with a small network and budget.

    Args:
        config: The run.

    Returns:
        The run.
    """
    if config.data.resize:
        data = dataclasses.replace(config.data, shape=(96, 64, 24))
    else:
        data = dataclasses.replace(config.data, shape=(96, 96, 20), spacing=(1.2, 1.2, 3.0))
    return dataclasses.replace(shrink(config, num_epochs=6), data=data)


if __name__ == "__main__":
    sys.exit(run_script(main))
