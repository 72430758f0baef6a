"""Figures: overlays of truth and prediction, curves of a run, metrics over cases.

Each is drawn by matplotlib without a display and written beside its place and renamed. Colours are
those of Okabe and Ito, which colour-blind readers tell apart.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from afl_jax.files import written_beside
from afl_jax.reports import by_tercile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_SKY_BLUE, _ORANGE, _GREEN, _PURPLE = "#56B4E9", "#E69F00", "#009E73", "#CC79A7"
_BLUE, _VERMILION = "#0072B2", "#D55E00"
_TRUTH_COLOUR, _PREDICTION_COLOUR = _SKY_BLUE, _ORANGE
_CLOSE_UP_MARGIN_MM = 10.0
_CURVE_COLOURS = [_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE, _SKY_BLUE]


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


def case_figure(case: OverlayCase) -> bytes:
    """Draw one case for a report: the slice with both outlines, and a closer view without and with.

    The closer view holds all that is marked on the slice, and `_CLOSE_UP_MARGIN_MM` around it.

    Args:
        case: its image, truth and prediction.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure

    image, truth, prediction = case.planes
    spacing = np.asarray(case.spacing[:2], float)
    size_mm = np.array(truth.shape) * spacing
    low, high = np.zeros(2), size_mm
    marked = np.argwhere((truth > 0) | (prediction > 0))
    if len(marked):
        # A square, so that the panels of all cases are of one height; inside of the image.
        half = ((np.ptp(marked, axis=0) + 1) * spacing).max() / 2 + _CLOSE_UP_MARGIN_MM
        half = min(half, size_mm.min() / 2)
        centre = (marked.min(axis=0) + marked.max(axis=0) + 1) / 2 * spacing
        centre = np.clip(centre, half, size_mm - half)
        low, high = centre - half, centre + half
    figure = Figure(figsize=(9, 3), dpi=130, facecolor="white")
    for column in range(3):
        axes = figure.add_axes((column / 3, 0, 0.33, 1))
        _draw_slice(axes, image, case.spacing)
        if column != 1:
            _draw_outline(axes, truth, case.spacing, _TRUTH_COLOUR)
            _draw_outline(axes, prediction, case.spacing, _PREDICTION_COLOUR)
        if column:
            axes.set_xlim(low[0], high[0])
            axes.set_ylim(high[1], low[1])
    return _as_png(figure)


def distribution_figure(rows: Sequence[Row], groups: Sequence[Mapping[str, str]]) -> str:
    """Draw how metrics are distributed over cases: every case a dot, with quartiles and mean.

    Args:
        rows: one per case.
        groups: a panel each, of one unit: column to the name that is shown. NaN is left out.

    Returns:
        An SVG.
    """
    from matplotlib.figure import Figure

    heights = [len(group) for group in groups]
    figure = Figure(figsize=(8, 0.8 + 0.42 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    rng = np.random.default_rng(0)
    for axes, group in zip(panels, groups, strict=True):
        for place, column in enumerate(group):
            values = np.array([row[column] for row in rows], float)
            values = values[~np.isnan(values)]
            if not values.size:
                continue
            heights = place + rng.uniform(-0.28, 0.28, values.size)
            axes.plot(values, heights, "o", color=_SKY_BLUE, ms=4, alpha=0.7, mew=0)
            low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
            axes.plot([low, high], [place, place], color=_BLUE, lw=2)
            axes.plot([median, median], [place - 0.3, place + 0.3], color=_BLUE, lw=2)
            axes.plot(values.mean(), place, "D", color=_VERMILION, ms=5)
        axes.set_yticks(range(len(group)), list(group.values()))
        axes.set_ylim(len(group) - 0.5, -0.5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
        axes.grid(axis="x", alpha=0.3)
    return _as_svg(figure)


def trend_figure(rows: Sequence[Row], columns: Mapping[str, str], *, metric: str) -> str:
    """Draw a metric of each case against properties of the case, with the means of thirds.

    Args:
        rows: one per case; a case without a value is left out.
        columns: a panel each: column to the name that is shown. Volumes have a logarithmic axis.
        metric: a fraction.

    Returns:
        An SVG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (column, name) in zip(panels, columns.items(), strict=True):
        points = np.array([(row[column], row[metric]) for row in rows], float).reshape(-1, 2)
        points = points[~np.isnan(points).any(axis=1)]
        if column.endswith("_mm3"):
            axes.set_xscale("log")
        axes.plot(*points.T, "o", color=_SKY_BLUE, ms=5, alpha=0.7, mew=0)
        kept = [row for row in rows if not (math.isnan(row[column]) or math.isnan(row[metric]))]
        for tercile in by_tercile(kept, of=column, metrics=(metric,)):
            mean, low, high, _ = tercile.metrics[metric]
            ends = [tercile.low, tercile.high]
            axes.fill_between(ends, low, high, color=_BLUE, alpha=0.15, lw=0)
            axes.plot(ends, [mean, mean], color=_BLUE, lw=2)
        axes.set_xlabel(name)
        axes.set_ylim(-0.03, 1.03)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel(metric.capitalize())
    return _as_svg(figure)


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
            if isinstance(row.get(column), Real) and math.isfinite(row[column])
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


def _as_png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _as_svg(figure: "Figure") -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Text stays text, in the reader's own font, and the same figure is the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "afl_jax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
