"""All that is measured of a case, and what it comes to over cases.

Of a case: voxels by structure, surfaces in mm, lesions one by one. A structure is a set of classes
taken as one mask: all foreground, one class, or a region such as the whole tumour of BraTS. What
each metric gives for empty masks stands in the table of `metrics`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from afl_jax import irregularity, lesions, metrics, reports

Row = dict[str, Any]
Structures = Mapping[str, Sequence[int]]

VOXEL_METRICS = {
    "dice": metrics.dice,
    "iou": metrics.iou,
    "sensitivity": metrics.sensitivity,
    "specificity": metrics.specificity,
    "precision": metrics.precision,
}
# Whose means are given for thirds of the cases by size and by irregularity.
TERCILE_METRICS = ("dice", "sensitivity", "precision", "hd95_mm", "lesion_f1")
_SHAPE_STEP = 16
# IoU above which a lesion is found by the stricter of the two criteria.
STRICT_MIN_IOU = 0.1

_surface_irregularity = jax.jit(irregularity.surface_irregularity)


class CaseEvaluation(NamedTuple):
    """What is measured of a case.

    Attributes:
        row: Metric to value; NaN is undefined.
        lesions: A row for each lesion of the labels: its number, volume, irregularity, and
            whether it was detected.
    """

    row: Row
    lesions: list[Row]


def class_structures(num_classes: int) -> Structures:
    """The structures of a class map: all foreground of up to two classes, else each class.

    Args:
        num_classes: Background included.

    Returns:
        Name to classes; of a single structure the name is empty.
    """
    if num_classes <= 2:
        return {"": range(1, 256)}
    return {str(c): (c,) for c in range(1, num_classes)}


def evaluate_case(
    prediction: NDArray,
    labels: NDArray,
    *,
    spacing: Sequence[float],
    structures: Structures,
    tolerance_mm: float,
    probs: NDArray | None = None,
) -> CaseEvaluation:
    """Compares a class map with its labels.

    Args:
        prediction: ``[X, Y, Z]`` classes.
        labels: Like ``prediction``.
        spacing: mm, one per axis.
        structures: Name to classes, such as `class_structures` returns.
        tolerance_mm: Of the surface Dice.
        probs: ``[X, Y, Z, K]``, from which the paper's soft metrics are computed; they are left
            out if None.

    Returns:
        The row has, for the mean over structures where they are defined and with several of them
        for each, such as ``dice_WT``: `VOXEL_METRICS`, ``hd_mm``, ``hd95_mm``, ``assd_mm`` and
        ``surface_dice``. Then the paper's ``soft_dice`` and ``soft_iou``; and of all foreground
        ``lesion_tp``, ``lesion_fp``, ``lesion_fn`` and ``lesion_f1``, by one voxel of overlap and,
        as ``strict_lesion_...``, by an IoU above `STRICT_MIN_IOU`; ``lesions``, ``volume_mm3`` and
        ``irregularity`` of the labels, see `irregularity.surface_irregularity`.

    Raises:
        ValueError: If shapes do not fit.
    """
    masks = {
        name: (np.isin(prediction, classes), np.isin(labels, classes))
        for name, classes in structures.items()
    }
    by_structure = {
        name: _mask_metrics(*pair, spacing=spacing, tolerance_mm=tolerance_mm)
        for name, pair in masks.items()
    }
    row: Row = {
        metric: _nan_mean([values[metric] for values in by_structure.values()])
        for metric in next(iter(by_structure.values()))
    }
    if len(structures) > 1:
        for name, values in by_structure.items():
            row |= {f"{metric}_{name}": value for metric, value in values.items()}
    if probs is not None:
        true = labels if probs.shape[-1] > 2 else (labels > 0).astype(labels.dtype)
        row["soft_dice"] = float(metrics.soft_dice(probs[None], true[None])[0])
        row["soft_iou"] = float(metrics.soft_iou(probs[None], true[None])[0])
    predicted, true = _crop_to_foreground(prediction > 0, labels > 0)
    for prefix, min_iou in (("lesion", 0.0), ("strict_lesion", STRICT_MIN_IOU)):
        counts = lesions.match_lesions(predicted, true, min_iou=min_iou)
        row |= {f"{prefix}_{name}": count for name, count in counts._asdict().items()}
        row[f"{prefix}_f1"] = lesions.lesion_f1(counts)
    lesion_rows = _lesion_rows(predicted, true, spacing=spacing)
    row |= {
        "lesions": len(lesion_rows),
        "volume_mm3": float(sum(lesion["volume_mm3"] for lesion in lesion_rows)),
        "irregularity": _irregularity(true, spacing=spacing),
    }
    return CaseEvaluation(row, lesion_rows)


def summarise(cases: Sequence[Row], lesion_rows: Sequence[Row]) -> dict[str, Any]:
    """What the rows of all cases and all lesions come to.

    Args:
        cases: A `CaseEvaluation.row` for each case, with its ``case_id``.
        lesion_rows: The rows of all their lesions.

    Returns:
        ``metrics``, a `reports.Summary` of each; ``lesions``, under ``lesion`` and
        ``strict_lesion``, the counts over all cases with their sensitivity, precision and F1;
        ``cases_by_volume`` and ``cases_by_irregularity``, the means of `TERCILE_METRICS` in thirds
        of the cases that have lesions; ``lesions_by_volume``, the share of lesions that is
        detected, likewise.
    """
    pooled = {}
    for prefix in ("lesion", "strict_lesion"):
        tp, fp, fn = (
            sum(case[f"{prefix}_{name}"] for case in cases) for name in ("tp", "fp", "fn")
        )
        pooled[prefix] = {
            "tp": tp,
            "fp": fp,
            "fn": fn,
            "sensitivity": tp / (tp + fn) if tp + fn else math.nan,
            "precision": tp / (tp + fp) if tp + fp else math.nan,
            "f1": lesions.lesion_f1(lesions.LesionCounts(tp, fp, fn)),
        }
    with_lesions = [case for case in cases if case["lesions"]]
    detection = ("detected", "strictly_detected")
    return {
        "metrics": reports.summarise(cases),
        "lesions": pooled,
        "cases_by_volume": reports.by_tercile(
            with_lesions, of="volume_mm3", metrics=TERCILE_METRICS
        ),
        "cases_by_irregularity": reports.by_tercile(
            with_lesions, of="irregularity", metrics=TERCILE_METRICS
        ),
        "lesions_by_volume": reports.by_tercile(lesion_rows, of="volume_mm3", metrics=detection),
    }


def _mask_metrics(
    predicted: NDArray[np.bool_],
    true: NDArray[np.bool_],
    *,
    spacing: Sequence[float],
    tolerance_mm: float,
) -> Row:
    counts = metrics.confusion_counts(predicted[None], true[None])
    distances = lesions.surface_distances(predicted, true, spacing=spacing)
    return {name: metric(counts).item() for name, metric in VOXEL_METRICS.items()} | {
        "hd_mm": lesions.hausdorff_distance(distances),
        "hd95_mm": lesions.hausdorff_distance_95(distances),
        "assd_mm": lesions.average_symmetric_surface_distance(distances),
        "surface_dice": lesions.surface_dice(distances, tolerance_mm=tolerance_mm),
    }


def _crop_to_foreground(*masks: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Masks without the margin that is empty in all of them: most of a volume."""
    boxes = ndimage.find_objects(np.any(masks, axis=0).astype(np.int8))
    return [mask[boxes[0]] for mask in masks] if boxes else list(masks)


def _lesion_rows(
    predicted: NDArray[np.bool_], true: NDArray[np.bool_], *, spacing: Sequence[float]
) -> list[Row]:
    found = lesions.lesion_detections(predicted, true, spacing=spacing)
    strictly = lesions.lesion_detections(predicted, true, spacing=spacing, min_iou=STRICT_MIN_IOU)
    components, _ = lesions.label_components(true)
    surfaces = [
        _irregularity(components[box] == index, spacing=spacing)
        for index, box in enumerate(ndimage.find_objects(components), start=1)
    ]
    columns = (found.volume_mm3, surfaces, found.detected, strictly.detected)
    return [
        {
            "lesion": number,
            "volume_mm3": float(volume_mm3),
            "irregularity": surface,
            "detected": int(detected),
            "strictly_detected": int(strict),
        }
        for number, (volume_mm3, surface, detected, strict) in enumerate(
            zip(*columns, strict=True), start=1
        )
    ]


def _irregularity(mask: NDArray[np.bool_], *, spacing: Sequence[float]) -> float:
    """Of the surface of a mask; NaN if it is empty."""
    if not mask.any():
        return math.nan
    # The measure is compiled for a shape: of the many boxes of lesions, few are different.
    mask = np.pad(mask, [(0, -size % _SHAPE_STEP) for size in mask.shape])
    return float(
        _surface_irregularity(mask[None], spacing=np.asarray(spacing, np.float32)[None])[0]
    )


def _nan_mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan
