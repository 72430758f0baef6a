"""``afl-jax prepare``: raw files to records, once."""

from pathlib import Path
from typing import Annotated

import tyro

from afl_jax import reports
from afl_jax.commands.construct import prepare_data
from afl_jax.config import DataConfig


def prepare(
    *,
    data: Annotated[DataConfig, tyro.conf.arg(name="")] = DataConfig(),
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None,
) -> int:
    """Prepare a data set, so that runs with the same data options find it ready.

    A name in front of the options, such as picai2022, stands for the data of that run; afl-jax
    --help lists them. An interrupted build goes on where it stopped. Every case has a row in
    cases.csv, beside the records; those with a note are printed.

    Args:
        data: Which data set, and how.
        config_file: A config.json whose data are meant; options beside it override it.

    Returns:
        The exit code.
    """
    del config_file  # The command line made it the default of `data`.
    console = reports.create_console()
    builder = prepare_data(data, console)
    if noted := [row for row in builder.read_table() if row["notes"]]:
        console.print(reports.note_table(noted, title=f"{len(noted)} cases to look at"))
    sizes = ", ".join(f"{builder.num_cases(split)} {split}" for split in builder.split_cases())
    console.print(f"{sizes} cases in {builder.data_dir}", highlight=False, soft_wrap=True)
    return 0
