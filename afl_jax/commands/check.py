"""``afl-jax check``: what is wrong with a data set, all of it in one table."""

import collections
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from afl_jax import reports
from afl_jax.commands.construct import create_builder
from afl_jax.config import DataConfig
from afl_jax.data.cases import Case
from afl_jax.data.records import ReadCase, RecordsBuilder
from afl_jax.errors import InputError
from afl_jax.lesions import label_components


@dataclass(frozen=True)
class CheckedCase:
    """What reading a case has shown.

    Attributes:
      row: Of the table: ``case_id``, ``shape``, ``spacing``, ``classes``, ``lesions``.
      errors: What must be mended, in words.
      notes: What may be right, but should be known.
      channels: A digest of the voxels of each channel that is not constant, by its number.
    """

    row: Mapping[str, Any]
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    channels: Mapping[int, str] = field(default_factory=dict)


def check(
    *,
    data: Annotated[DataConfig, tyro.conf.arg(name="")] = DataConfig(),
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None,
    out: Path | None = None,
) -> int:
    """Read every case of a data set and print all that is wrong with it; nothing is prepared.

    In front of the options may stand a folder of raw data, in the layout of the Medical
    Segmentation Decathlon, PI-CAI or BraTS, or the name of a run, such as picai2022.

    Errors: a case that cannot be read (a file missing, damaged, on another grid, with values that
    are not finite, a label that is no class), a channel that is constant, a channel that is there
    twice, in one case or in two. Notes: a lesion of a single voxel, a class that no case has.

    Args:
        data: Which data set, and how its labels are read.
        config_file: A config.json whose data are meant; options beside it override it.
        out: A CSV file for the rows of all cases.

    Returns:
        The exit code: 2 if there are errors.
    """
    del config_file  # The command line made it the default of `data`.
    console = reports.create_console()
    builder = create_builder(data)
    cases = list(builder.cases)
    checked = {}
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        results = pool.map(functools.partial(check_case, builder), cases)
        with reports.progress_bar(console) as progress:
            for case in progress.track(cases, description=f"checking {data.name}"):
                checked[case.case_id] = next(results)
    finally:
        pool.shutdown(cancel_futures=True)
    duplicates = _find_duplicates(checked)
    rows = []
    for case_id, case in checked.items():
        errors = [*case.errors, *duplicates.get(case_id, ())]
        rows.append({**case.row, "errors": "; ".join(errors), "notes": "; ".join(case.notes)})
    if out is not None:
        reports.write_csv(out, rows)
    noted = [
        {"case_id": row["case_id"], "notes": _join_findings(row)}
        for row in rows
        if row["errors"] or row["notes"]
    ]
    num_errors = sum(bool(row["errors"]) for row in rows)
    if noted:
        title = f"{num_errors} cases with errors, {len(noted) - num_errors} to look at"
        console.print(reports.note_table(noted, title=title, max_rows=len(noted)))
    for line in _summary(builder, rows):
        console.print(line, highlight=False, soft_wrap=True)
    return 2 if num_errors else 0


def detect_data(source: Path) -> DataConfig:
    """Which data set a folder of raw data is, by what lies in it.

    Args:
        source: The folder.

    Returns:
        The config of its data, everything else as the builder has it.

    Raises:
        InputError: If it is none that is known.
    """
    layouts = {
        "folder": ("dataset.json",),
        "picai2022": ("images", "picai_labels"),
        "brats2018": ("HGG", "LGG"),
    }
    for name, entries in layouts.items():
        if any((source / entry).exists() for entry in entries):
            return DataConfig(name=name, source=str(source))
    raise InputError(
        f"{source}: expected a data set, with dataset.json, or images and picai_labels, or HGG and "
        "LGG in it, found none of these: give the folder that holds them."
    )


def check_case(builder: RecordsBuilder, case: Case) -> CheckedCase:
    """Reads a case and looks at it.

    Args:
        builder: Of the data set.
        case: One of its cases.

    Returns:
        What is to be said of it.
    """
    try:
        read = builder.read_case(case)
    except InputError as error:
        return CheckedCase({"case_id": case.case_id}, errors=(str(error),))
    errors, channels = [], {}
    for number, channel in enumerate(np.moveaxis(read.image.array, -1, 0)):
        if channel.min() == channel.max():
            errors.append(f"channel {number} is constant, {channel.flat[0]:g} everywhere")
        else:
            # The shape is part of it: the same numbers in another order are another image.
            content = np.ascontiguousarray(channel)
            digest = hashlib.sha256(content.view(np.uint8))
            channels[number] = f"{channel.shape} {channel.dtype} {digest.hexdigest()}"
    return CheckedCase(_row(case, read), tuple(errors), _notes(read), channels)


def _row(case: Case, read: ReadCase) -> dict[str, Any]:
    return {
        "case_id": case.case_id,
        "shape": "x".join(map(str, read.image.shape)),
        "spacing": "x".join(f"{mm:g}" for mm in read.image.spacing),
        "classes": " ".join(map(str, np.unique(read.labels.array).tolist())),
        "lesions": label_components(read.labels.array)[1],
    }


def _notes(read: ReadCase) -> tuple[str, ...]:
    components, _ = label_components(read.labels.array)
    num_single = np.count_nonzero(np.bincount(components.ravel())[1:] == 1)
    notes = list(read.notes)
    if num_single:
        notes.append(f"{num_single} lesions of a single voxel")
    return tuple(notes)


def _find_duplicates(checked: Mapping[str, CheckedCase]) -> dict[str, list[str]]:
    """Of each case, in words, its channels that have the voxels of another channel."""
    places = collections.defaultdict(list)
    for case_id, case in checked.items():
        for number, digest in case.channels.items():
            places[digest].append((case_id, number))
    found = collections.defaultdict(list)
    for same in places.values():
        for case_id, number in same:
            others = [
                f"channel {other}" if name == case_id else f"{name}, channel {other}"
                for name, other in same
                if (name, other) != (case_id, number)
            ]
            if others:
                named = " and of ".join(others)
                found[case_id].append(f"channel {number} has the voxels of {named}")
    return found


def _join_findings(row: Mapping[str, Any]) -> str:
    return "; ".join(f"{name[:-1]}: {row[name]}" for name in ("errors", "notes") if row[name])


def _summary(builder: RecordsBuilder, rows: list[dict[str, Any]]) -> Iterator[str]:
    """How many cases there are, how many can be read, and how many have each class."""
    read = [row for row in rows if "classes" in row]
    yield f"{len(rows)} cases, {len(read)} of which can be read"
    counts = collections.Counter(name for row in read for name in row["classes"].split())
    parts = [f"{number} in {counts[str(number)]}" for number in range(builder.num_classes)]
    yield f"cases that have each class: {', '.join(parts)}"
    if missing := [str(n) for n in range(builder.num_classes) if read and not counts[str(n)]]:
        yield f"note: no case has class {', '.join(missing)}"
