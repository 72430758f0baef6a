"""An evaluation as one HTML file that needs no network: tables, figures, cases, definitions.

The page is a Jinja template, ``evaluation.html.jinja`` beside this file, which escapes whatever
comes from file names and headers.
"""

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from afl_jax.figures import OverlayCase, case_figure, distribution_figure, trend_figure
from afl_jax.reports import format_cell

Row = Mapping[str, Any]

# Column to name and unit.
METRIC_NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "precision": "Precision",
    "surface_dice": "Surface Dice",
    "hd_mm": "Hausdorff distance, mm",
    "hd95_mm": "95 % Hausdorff distance, mm",
    "assd_mm": "Average surface distance, mm",
    "soft_dice": "The paper's soft Dice",
    "soft_iou": "The paper's soft IoU",
    "lesion_f1": "Lesion-wise F1",
    "strict_lesion_f1": "Lesion-wise F1, IoU above 0.1",
    "lesions": "Lesions",
    "volume_mm3": "Lesion volume, mm³",
    "irregularity": "Irregularity of the boundary",
    "detected": "Detected",
    "strictly_detected": "IoU above 0.1",
}
_FRACTIONS = (
    *("dice", "iou", "sensitivity", "specificity", "precision"),
    *("surface_dice", "lesion_f1", "strict_lesion_f1"),
)
# Of lesions, whose sums over cases are shown in place of their means.
_COUNTS = ("_tp", "_fp", "_fn", "lesions")
_DISTANCES = ("hd_mm", "hd95_mm", "assd_mm")


def evaluation_html(
    *,
    title: str,
    facts: Mapping[str, str],
    tolerance_mm: float,
    summary: Mapping[str, Any],
    cases: Sequence[Row],
    pictures: Sequence[tuple[str, OverlayCase]],
    notes: Sequence[str] = (),
) -> str:
    """The page of an evaluation.

    Args:
        title: Of the page.
        facts: What was compared and by what: name to text.
        tolerance_mm: Of the surface Dice.
        summary: From `evaluation.summarise`; ``picai``, if there, is a
            `detection.DetectionScores`.
        cases: Rows by case.
        pictures: Cases to be drawn, each with what it stands for.
        notes: What a reader must know, such as cases that could not be evaluated.

    Returns:
        HTML.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": format_cell, "metric": metric_name}
    environment.tests["count"] = lambda column: column.endswith(_COUNTS)
    template = environment.from_string(
        resources.files("afl_jax").joinpath("evaluation.html.jinja").read_text(encoding="utf-8")
    )
    columns = cases[0].keys()
    groups = [
        {name: METRIC_NAMES[name] for name in names if name in columns}
        for names in (_FRACTIONS, _DISTANCES)
    ]
    properties = {name: METRIC_NAMES[name] for name in ("volume_mm3", "irregularity")}
    return template.render(
        title=title,
        facts=facts,
        notes=notes,
        tolerance_mm=tolerance_mm,
        summary=summary,
        cases=cases,
        columns=list(columns)[1:],
        distribution=Markup(distribution_figure(cases, groups)),
        trend=Markup(trend_figure(cases, properties, metric="dice")),
        pictures=[
            (what, case, base64.b64encode(case_figure(case)).decode()) for what, case in pictures
        ],
    )


def metric_name(column: str) -> str:
    """The name of a metric for people.

    Args:
        column: Such as ``hd95_mm``, or ``hd95_mm_WT`` of one structure.

    Returns:
        Its name; the column itself if it has none.
    """
    for name in sorted(METRIC_NAMES, key=len, reverse=True):
        if column == name:
            return METRIC_NAMES[name]
        if column.startswith(f"{name}_"):
            return f"{METRIC_NAMES[name]} ({column.removeprefix(f'{name}_')})"
    return column
