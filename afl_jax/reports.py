"""What a run says about itself: tables, intervals over cases, figures.

A table is a list of rows, a row is a dict from column to value. Numbers are metrics; NaN is an
undefined metric (see `metrics`) and stays out of means, which carry their number of cases.
Files are written beside their place and renamed, so that a reader never sees half of one.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Okabe and Ito's palette, which colour-blind readers tell apart.
_SKY_BLUE, _ORANGE, _GREEN, _PURPLE = "#56B4E9", "#E69F00", "#009E73", "#CC79A7"
_TRUTH_COLOUR, _PREDICTION_COLOUR = _SKY_BLUE, _ORANGE
_CURVE_COLOURS = ["#0072B2", "#D55E00", _GREEN, _PURPLE, _ORANGE, _SKY_BLUE]


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


def _format(value: Any) -> str:
    """A table cell: three decimals, fewer for large numbers; undefined is a dash."""
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
        table.add_row(*[_format(row.get(column)) for column in columns])
    table.add_section()
    for name, field, style in [
        ("mean", "mean", "bold"),
        ("95 % from", "low", ""),
        ("95 % to", "high", ""),
        ("cases", "count", "dim"),
    ]:
        cells = {column: _format(getattr(summaries[column], field)) for column in summaries}
        # The first column names the case, so it names the summary too.
        table.add_row(name, *[cells.get(column, "") for column in columns[1:]], style=style)
    return table


def _metric_table(summaries: Mapping[str, Summary], *, title: str) -> Table:
    """One row per metric: mean, 95 % interval and number of cases."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    for column in ("metric", "mean", "95 % from", "to", "cases"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, summary in summaries.items():
        table.add_row(name, *[_format(value) for value in summary])
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


@dataclass(frozen=True)
class OverlayCase:
    """One row of `overlay_figure`.

    Attributes:
        case_id: shown in the title.
        image: [X, Y, Z, C] or [X, Y, C]; the first channel is shown.
        truth: [X, Y, Z] or [X, Y] integer classes.
        prediction: like `truth`.
        spacing: mm, one per axis.
        dice: shown in the title; NaN shows as undefined.
    """

    case_id: str
    image: NDArray
    truth: NDArray
    prediction: NDArray
    spacing: Sequence[float]
    dice: float

    @property
    def slice_index(self) -> int | None:
        """The z with most foreground in the truth, else in the prediction, else the middle."""
        if self.truth.ndim == 2:
            return None
        for labels in (self.truth, self.prediction):
            area = (labels > 0).sum(axis=(0, 1))
            if area.any():
                return int(area.argmax())
        return self.truth.shape[2] // 2

    @property
    def planes(self) -> tuple[NDArray, NDArray, NDArray]:
        """Image, truth and prediction of the slice shown, each [X, Y]."""
        plane = (..., self.slice_index) if self.truth.ndim == 3 else ...
        return self.image[..., 0][plane], self.truth[plane], self.prediction[plane]


def overlay_figure(cases: Sequence[OverlayCase], path: str | Path) -> None:
    """Draw a few cases: image, image with the truth's outline, image with the prediction's.

    One row per case, on the axial slice with most foreground. Arrays are x, y, z in LPS order:
    x runs to the right and y down, in their true proportions.

    Args:
        cases: at least one.
        path: a PNG, replaced if it exists.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panel_width, gap, title_height, legend_height = 3.0, 0.08, 0.32, 0.42  # inches
    panel_heights = []
    for case in cases:
        num_x, num_y = case.truth.shape[:2]
        height = panel_width * num_y * case.spacing[1] / (num_x * case.spacing[0])
        panel_heights.append(min(height, 2 * panel_width))
    width = 3 * panel_width + 4 * gap
    height = sum(panel_heights) + len(cases) * title_height + legend_height
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")

    bottom = height
    for case, panel_height in zip(cases, panel_heights, strict=True):
        bottom -= title_height + panel_height
        image, truth, prediction = case.planes
        outlines = [
            (None, None),
            (truth, _TRUTH_COLOUR),
            (prediction, _PREDICTION_COLOUR),
        ]
        for column, (labels, colour) in enumerate(outlines):
            left = gap + column * (panel_width + gap)
            axes = figure.add_axes(
                (left / width, bottom / height, panel_width / width, panel_height / height)
            )
            _draw_slice(axes, image, case.spacing)
            if labels is not None:
                _draw_outline(axes, labels, case.spacing, colour)
        z = "" if case.slice_index is None else f", slice {case.slice_index}"
        dice = "undefined" if math.isnan(case.dice) else f"{case.dice:.3f}"
        # A name is no formula, whatever is in it.
        figure.axes[-3].set_title(f"{case.case_id}{z}", loc="left", fontsize=10, parse_math=False)
        figure.axes[-1].set_title(f"Dice {dice}", loc="right", fontsize=10)

    handles = [
        Line2D([], [], color=_TRUTH_COLOUR, linewidth=2, label="truth"),
        Line2D([], [], color=_PREDICTION_COLOUR, linewidth=2, label="prediction"),
    ]
    figure.legend(
        handles=handles,
        loc="center",
        bbox_to_anchor=(0.5, legend_height / 2 / height),
        ncols=2,
        frameon=False,
        fontsize=10,
    )
    _save(figure, path)


def _draw_slice(axes: "Axes", image: NDArray, spacing: Sequence[float]) -> None:
    """Show [X, Y] in mm, x to the right and y down, grey from the 1st to the 99th percentile."""
    low, high = np.percentile(image, [1, 99])
    axes.imshow(
        image.T,
        cmap="gray",
        vmin=low,
        vmax=high,
        extent=(0, image.shape[0] * spacing[0], image.shape[1] * spacing[1], 0),
    )
    axes.set_facecolor("black")
    axes.set_axis_off()


def _draw_outline(axes: "Axes", labels: NDArray, spacing: Sequence[float], colour: str) -> None:
    """Draw the edges of the voxels that bound each class: exact, also for a single voxel."""
    from matplotlib.collections import LineCollection

    segments = []
    for value in np.unique(labels[labels > 0]):
        mask = np.pad(labels == value, 1).astype(np.int8)
        # An edge lies between voxel i - 1 and i wherever the mask changes.
        for x, y in np.argwhere(np.diff(mask, axis=0)[:, 1:-1]):
            segments.append([(x, y), (x, y + 1)])
        for x, y in np.argwhere(np.diff(mask, axis=1)[1:-1]):
            segments.append([(x, y), (x + 1, y)])
    if segments:
        scaled = np.asarray(segments, float) * np.asarray(spacing[:2], float)
        axes.add_collection(
            LineCollection(scaled, colors=colour, linewidths=1.5, capstyle="projecting")
        )


def curves_figure(
    history: Sequence[Row],
    path: str | Path,
    *,
    loss_columns: Sequence[str] = ("loss",),
    metric_columns: Sequence[str] = ("dice", "iou", "sensitivity", "specificity"),
) -> None:
    """Draw the course of a run: losses on the left, validation metrics on the right.

    Args:
        history: one row per epoch with the column `epoch`. A column that no row has is left out;
            an epoch without a value, or with NaN, is a point left out.
        path: a PNG, replaced if it exists.
        loss_columns: drawn on the left.
        metric_columns: fractions, drawn on the right between 0 and 1.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), dpi=150, facecolor="white", layout="constrained")
    loss_axes, metric_axes = figure.subplots(1, 2)
    _draw_curves(loss_axes, history, loss_columns)
    loss_axes.set_title("loss", loc="left", fontsize=11)
    _draw_curves(metric_axes, history, metric_columns)
    metric_axes.set_title("validation", loc="left", fontsize=11)
    metric_axes.set_ylim(0, 1.02)
    _save(figure, path)


def _draw_curves(axes: "Axes", history: Sequence[Row], columns: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for column, colour in zip(columns, _CURVE_COLOURS, strict=False):
        points = [
            (row["epoch"], row[column])
            for row in history
            if _is_number(row.get(column)) and math.isfinite(row[column])
        ]
        if points:
            # A marker while points are few: a run of one epoch is a dot, not an empty panel.
            marker = "o" if len(points) <= 30 else None
            axes.plot(*zip(*points, strict=True), color=colour, label=column, marker=marker, ms=3)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)


def _save(figure: "Figure", path: str | Path) -> None:
    with written_beside(path) as beside:
        figure.savefig(beside, format="png")
