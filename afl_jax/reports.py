"""What a run says about itself: tables, and intervals over cases.

A table is a list of rows, a row is a dict from column to value. Numbers are metrics; NaN is an
undefined metric (see `metrics`) and stays out of means, which carry their number of cases.
Files are written beside their place and renamed, so that a reader never sees half of one.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from afl_jax.files import written_beside

Row = Mapping[str, Any]

# Of a table with a row per case, which fits 80 characters.
_MAX_COLUMNS = 7


class Summary(NamedTuple):
    """Mean of a metric over the cases where it is defined, with its interval."""

    mean: float
    low: float
    high: float
    count: int


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over cases.

    Args:
        values: [N], one per case; NaN is left out.
        confidence: in (0, 1).
        num_resamples: number of bootstrap samples.
        seed: the interval is a function of its arguments.

    Returns:
        The bounds; (NaN, NaN) for fewer than two defined values, which say nothing of spread.

    References:
        Efron, Tibshirani, "An Introduction to the Bootstrap", 1993,
        https://doi.org/10.1201/9780429246593
    """
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    if values.size < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, values.size).mean() for _ in range(num_resamples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _columns(rows: Sequence[Row]) -> list[str]:
    """All columns of the rows, in the order of first appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def summarise(rows: Sequence[Row]) -> dict[str, Summary]:
    """Mean, 95 % interval and number of defined cases of every metric.

    Args:
        rows: one per case. A column is a metric if all its values are numbers; a row may lack it.

    Returns:
        Column to `Summary`, in column order. A metric that no case defines has mean NaN, count 0.
    """
    summaries = {}
    for column in _columns(rows):
        values = [row[column] for row in rows if column in row]
        if not all(_is_number(value) for value in values):
            continue
        defined = [float(value) for value in values if not math.isnan(value)]
        mean = sum(defined) / len(defined) if defined else math.nan
        summaries[column] = Summary(mean, *bootstrap_interval(defined), len(defined))
    return summaries


class Tercile(NamedTuple):
    """One third of the rows, in the order of a column."""

    low: float
    high: float
    count: int
    metrics: dict[str, Summary]


def tercile_indices(values: ArrayLike) -> NDArray[np.int_]:
    """Which third of the values each belongs to, by rank.

    Args:
        values: [N]; of equal ones the first has the lower rank.

    Returns:
        [N]: 0, 1 or 2, sizes equal to one, the larger ones first; -1 for NaN.
    """
    values = np.asarray(values, np.float64)
    indices = np.full(values.shape, -1)
    order = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))]
    for index, part in enumerate(np.array_split(order, 3)):
        indices[part] = index
    return indices


def by_tercile(rows: Sequence[Row], *, of: str, metrics: Sequence[str]) -> list[Tercile]:
    """Means of metrics in thirds of the rows.

    Args:
        rows: one per case, or lesion.
        of: the column by which they are ranked; a row whose value is NaN is left out.
        metrics: columns of which the mean is taken.

    Returns:
        From the lowest third to the highest; empty thirds are left out.
    """
    indices = tercile_indices([row[of] for row in rows])
    terciles = []
    for index in range(3):
        part = [row for row, i in zip(rows, indices, strict=True) if i == index]
        if part:
            values = [float(row[of]) for row in part]
            summaries = summarise([{name: row[name] for name in metrics} for row in part])
            terciles.append(Tercile(min(values), max(values), len(part), summaries))
    return terciles


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV, with a header.

    Args:
        path: replaced if it exists.
        rows: the columns are those of all rows, in the order of first appearance. NaN is written
            as `nan`; a value that a row lacks stays empty.
    """
    with written_beside(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _columns(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8.

    Args:
        path: replaced if it exists.
        text: the whole content.
    """
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write a tree of dicts, lists, named tuples, numbers and strings as JSON.

    Args:
        path: replaced if it exists.
        content: numpy numbers and arrays are welcome; named tuples become objects; NaN and
            infinities, which JSON lacks, become null.
    """
    write_text(path, _to_json(content, indent=2) + "\n")


def write_jsonl(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines, one object a row; values as in `write_json`.

    Args:
        path: replaced if it exists.
        rows: any number.
    """
    write_text(path, "".join(_to_json(row, indent=None) + "\n" for row in rows))


def _to_json(content: Any, *, indent: int | None) -> str:
    return json.dumps(_jsonable(content), indent=indent, ensure_ascii=False, allow_nan=False)


def _jsonable(content: Any) -> Any:
    if isinstance(content, np.ndarray | np.generic):
        content = content.tolist()
    if hasattr(content, "_asdict"):
        content = content._asdict()
    if isinstance(content, Mapping):
        return {str(name): _jsonable(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_jsonable(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def format_cell(value: Any) -> str:
    """A table cell.

    Args:
        value: anything; what is no number is given as its text.

    Returns:
        A number with three decimals, a large one with none; a dash for what is undefined.
    """
    if value is None or (_is_number(value) and math.isnan(value)):
        return "-"
    if _is_number(value) and not isinstance(value, Integral):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def case_table(rows: Sequence[Row], *, title: str) -> Table:
    """A table to print: one row per case, then mean, 95 % interval and number of cases.

    Args:
        rows: at least one, each a case, as for `summarise`; the first column names the case.
        title: above the table.

    Returns:
        A table for `rich.console.Console.print`; with more metrics than fit a narrow terminal,
        one row per metric, without the cases.
    """
    columns, summaries = _columns(rows), summarise(rows)
    if len(columns) > _MAX_COLUMNS:
        return _metric_table(summaries, title=title)
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_style="bold",
        title_justify="left",
    )
    for column in columns:
        # A narrow terminal breaks long names; it never cuts a number or a case off.
        justify = "right" if column in summaries else "left"
        is_metric = column in summaries
        table.add_column(
            column, justify=justify, overflow="fold", min_width=5 if is_metric else None
        )
    for row in rows:
        table.add_row(*[format_cell(row.get(column)) for column in columns])
    table.add_section()
    for name, field, style in [
        ("mean", "mean", "bold"),
        ("95 % from", "low", ""),
        ("95 % to", "high", ""),
        ("cases", "count", "dim"),
    ]:
        cells = {column: format_cell(getattr(summaries[column], field)) for column in summaries}
        # The first column names the case, so it names the summary too.
        table.add_row(name, *[cells.get(column, "") for column in columns[1:]], style=style)
    return table


def _metric_table(summaries: Mapping[str, Summary], *, title: str) -> Table:
    """One row per metric: mean, 95 % interval and number of cases."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    for column in ("metric", "mean", "95 % from", "to", "cases"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, summary in summaries.items():
        table.add_row(name, *[format_cell(value) for value in summary])
    return table


def note_table(rows: Sequence[Row], *, title: str, max_rows: int = 20) -> Table:
    """A table of cases and what is to be said of each.

    Args:
        rows: With ``case_id`` and ``notes``.
        title: Of the table.
        max_rows: How many are shown; the rest is counted.

    Returns:
        A table for a rich console.
    """
    table = Table(title=title)
    table.add_column("case")
    table.add_column("note", overflow="fold")
    for row in rows[:max_rows]:
        table.add_row(str(row["case_id"]), str(row["notes"]))
    if len(rows) > max_rows:
        table.add_row("...", f"{len(rows) - max_rows} more in cases.csv")
    return table


def create_console(*, quiet: bool = False) -> Console:
    """Where commands print.

    Args:
        quiet: Whether nothing is printed.

    Returns:
        A console that prints text as it stands: a square bracket in the name of a case is no
        markup.
    """
    return Console(markup=False, quiet=quiet)


def progress_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """A bar with what is done, the time that it took and the time left.

    Args:
        console: where it is shown, if that is a terminal.
        columns: of the caller's own, in front of the times.

    Returns:
        A context manager; see `rich.progress.Progress`.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
