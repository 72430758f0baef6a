"""Lesion-wise counts and surface distances of one case, on the host.

Masks are single-class arrays [X, Y, Z] or [X, Y]; every voxel above 0 is foreground. For several
classes call once per class with `labels == c`. What each metric gives for empty masks stands in
the table of `metrics`: undefined is NaN, and nothing is ever infinite.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

# Number of neighbours in 3D -> rank of scipy's structuring element.
_CONNECTIVITY_RANK = {6: 1, 18: 2, 26: 3}


class LesionCounts(NamedTuple):
    """Lesions found (tp), claimed in vain (fp) and missed (fn)."""

    tp: int
    fp: int
    fn: int


class LesionDetections(NamedTuple):
    """The label's lesions [L]: how large each is, and whether it was found."""

    volume_mm3: NDArray[np.float64]
    detected: NDArray[np.bool_]


class SurfaceDistances(NamedTuple):
    """Distance in mm from every surface voxel of one mask to the other mask's surface.

    A surface that does not exist has no entries; distances to it are NaN.
    """

    prediction_to_label_mm: NDArray[np.float64]
    label_to_prediction_mm: NDArray[np.float64]


def label_components(mask: ArrayLike, *, connectivity: int = 26) -> tuple[NDArray[np.int32], int]:
    """Number the connected components of a mask.

    Args:
        mask: [X, Y, Z] or [X, Y].
        connectivity: 6 (faces), 18 (and edges) or 26 (and corners). A 2D mask is one slice of
            a volume: 6 means 4 neighbours, 18 and 26 mean 8.

    Returns:
        int32 array like `mask`, 0 = background, components 1..n; and n.

    Raises:
        ValueError: `connectivity` is none of the three.
    """
    if connectivity not in _CONNECTIVITY_RANK:
        raise ValueError(f"connectivity must be 6, 18 or 26, got {connectivity}.")
    mask = np.asarray(mask) > 0
    rank = min(_CONNECTIVITY_RANK[connectivity], mask.ndim)
    structure = ndimage.generate_binary_structure(mask.ndim, rank)
    return ndimage.label(mask, structure, output=np.int32)


def lesion_volumes_mm3(
    mask: ArrayLike, *, spacing: Sequence[float], connectivity: int = 26
) -> NDArray[np.float64]:
    """Volume of every lesion, in the order of `label_components`.

    Args:
        mask: [X, Y, Z] or [X, Y].
        spacing: mm, one per axis; for a 2D mask the volumes are areas in mm^2.
        connectivity: as in `label_components`.

    Returns:
        [L] in mm^3; empty for an empty mask.

    Raises:
        ValueError: `spacing` does not fit the mask.
    """
    components, num_components = label_components(mask, connectivity=connectivity)
    _check_spacing(spacing, components)
    voxels = np.bincount(components.ravel(), minlength=num_components + 1)[1:]
    return voxels * math.prod(spacing)


def _matches(
    prediction: ArrayLike, labels: ArrayLike, *, min_iou: float, connectivity: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For each predicted and each true lesion: does it overlap one of the other side enough?"""
    _check_same_shape(prediction, labels)
    predicted, num_predicted = label_components(prediction, connectivity=connectivity)
    true, num_true = label_components(labels, connectivity=connectivity)
    predicted_voxels = np.bincount(predicted.ravel(), minlength=num_predicted + 1)
    true_voxels = np.bincount(true.ravel(), minlength=num_true + 1)

    # Only the pairs that do overlap: a speckled prediction has too many lesions for a full table.
    both = (predicted > 0) & (true > 0)
    pair_ids, overlap = np.unique(
        predicted[both].astype(np.int64) * (num_true + 1) + true[both], return_counts=True
    )
    of_prediction, of_label = np.divmod(pair_ids, num_true + 1)
    union = predicted_voxels[of_prediction] + true_voxels[of_label] - overlap
    enough = overlap / union > min_iou

    prediction_matched = np.zeros(num_predicted + 1, bool)
    label_matched = np.zeros(num_true + 1, bool)
    prediction_matched[of_prediction[enough]] = True
    label_matched[of_label[enough]] = True
    return prediction_matched[1:], label_matched[1:]


def match_lesions(
    prediction: ArrayLike, labels: ArrayLike, *, min_iou: float = 0.0, connectivity: int = 26
) -> LesionCounts:
    """Count the lesions found, claimed in vain and missed.

    A true and a predicted lesion match if their IoU is above `min_iou`. TP and FN are the true
    lesions with and without a match, FP the predicted lesions without one. At the default one
    shared voxel is a match: the authors' criterion; a usual stricter one is 0.1. Matching is not
    one to one: a prediction that bridges two lesions finds both.

    Args:
        prediction: [X, Y, Z] or [X, Y].
        labels: like `prediction`.
        min_iou: a fraction in [0, 1).
        connectivity: as in `label_components`.

    Returns:
        The counts; all 0 if both masks are empty.

    Raises:
        ValueError: shapes differ.
    """
    prediction_matched, label_matched = _matches(
        prediction, labels, min_iou=min_iou, connectivity=connectivity
    )
    return LesionCounts(
        tp=int(label_matched.sum()),
        fp=int((~prediction_matched).sum()),
        fn=int((~label_matched).sum()),
    )


def lesion_detections(
    prediction: ArrayLike,
    labels: ArrayLike,
    *,
    spacing: Sequence[float],
    min_iou: float = 0.0,
    connectivity: int = 26,
) -> LesionDetections:
    """List the true lesions with their volumes, found or missed: detection by lesion size.

    Args:
        prediction: [X, Y, Z] or [X, Y].
        labels: like `prediction`.
        spacing: mm, one per axis.
        min_iou: as in `match_lesions`.
        connectivity: as in `label_components`.

    Returns:
        Volume and verdict of every true lesion; both empty for an empty label.

    Raises:
        ValueError: shapes differ, or `spacing` does not fit.
    """
    _, detected = _matches(prediction, labels, min_iou=min_iou, connectivity=connectivity)
    volume_mm3 = lesion_volumes_mm3(labels, spacing=spacing, connectivity=connectivity)
    return LesionDetections(volume_mm3, detected)


def lesion_f1(counts: LesionCounts) -> float:
    r"""Lesion-wise F1 score :math:`TP / (TP + (FP + FN) / 2)`.

    Args:
        counts: of one case, or the sum over cases.

    Returns:
        In [0, 1]; NaN without any lesion, true or predicted.
    """
    if not any(counts):
        # Paper: none; the authors' code: 1.0, which lets healthy cases raise the mean.
        return math.nan
    return counts.tp / (counts.tp + (counts.fp + counts.fn) / 2)


def surface_distances(
    prediction: ArrayLike, labels: ArrayLike, *, spacing: Sequence[float]
) -> SurfaceDistances:
    """Distances between the surfaces of two masks, in both directions.

    A surface voxel is a foreground voxel with a face neighbour in the background; outside the
    array everything is background. Distances run between centres of voxels. Every distance
    metric of this module is a summary of the result, so that it is computed once.

    Args:
        prediction: [X, Y, Z] or [X, Y].
        labels: like `prediction`.
        spacing: mm, one per axis.

    Returns:
        Distances in mm, one for every surface voxel; an empty mask has none, and the distances
        to it are NaN.

    Raises:
        ValueError: shapes differ, or `spacing` does not fit.
    """
    _check_same_shape(prediction, labels)
    prediction, labels = np.asarray(prediction) > 0, np.asarray(labels) > 0
    _check_spacing(spacing, labels)

    # Nothing outside the box around both masks can change a distance; most of a volume is outside.
    boxes = ndimage.find_objects((prediction | labels).astype(np.int8))
    if boxes:
        prediction, labels = prediction[boxes[0]], labels[boxes[0]]
    prediction_surface = prediction & ~ndimage.binary_erosion(prediction)
    label_surface = labels & ~ndimage.binary_erosion(labels)
    return SurfaceDistances(
        _distances_mm(prediction_surface, label_surface, spacing),
        _distances_mm(label_surface, prediction_surface, spacing),
    )


def _distances_mm(
    surface: NDArray[np.bool_], target: NDArray[np.bool_], spacing: Sequence[float]
) -> NDArray[np.float64]:
    """From every voxel of `surface` to the nearest of `target`; NaN if there is none."""
    if not target.any():
        return np.full(surface.sum(), np.nan)
    return ndimage.distance_transform_edt(~target, sampling=spacing)[surface]


def hausdorff_distance(distances: SurfaceDistances, *, percentile: float = 100.0) -> float:
    """Hausdorff distance: the larger of the two directions' largest distance.

    Args:
        distances: from `surface_distances`.
        percentile: take this percentile of each direction instead of its maximum; linear
            interpolation between ranks, as MONAI has it.

    Returns:
        mm; NaN if either mask is empty.

    References:
        Huttenlocher et al., "Comparing images using the Hausdorff distance", 1993,
        https://doi.org/10.1109/34.232073
    """
    if any(direction.size == 0 for direction in distances):
        return math.nan
    return float(max(np.percentile(direction, percentile) for direction in distances))


def hausdorff_distance_95(distances: SurfaceDistances) -> float:
    """Hausdorff distance with each direction's 95th percentile in place of its maximum.

    Args:
        distances: from `surface_distances`.

    Returns:
        mm; NaN if either mask is empty.
    """
    return hausdorff_distance(distances, percentile=95.0)


def average_symmetric_surface_distance(distances: SurfaceDistances) -> float:
    """Mean distance over the surface voxels of both masks, pooled.

    Args:
        distances: from `surface_distances`.

    Returns:
        mm; NaN if either mask is empty.
    """
    if any(direction.size == 0 for direction in distances):
        return math.nan
    return float(np.concatenate(distances).mean())


def surface_dice(distances: SurfaceDistances, *, tolerance_mm: float) -> float:
    """Share of the surface voxels of both masks that lie within a tolerance of the other surface.

    Counts voxels, as MONAI does; not areas of surface elements.

    Args:
        distances: from `surface_distances`.
        tolerance_mm: the largest distance that counts as agreement.

    Returns:
        In [0, 1]; 0 if one mask is empty, NaN if both are.

    References:
        Nikolov et al., "Deep learning to achieve clinically applicable segmentation of head and
        neck anatomy for radiotherapy", 2018, https://arxiv.org/abs/1809.04430
    """
    pooled = np.concatenate(distances)
    if pooled.size == 0:
        return math.nan
    # Distances to an empty mask are NaN, which is within no tolerance.
    return float(np.mean(pooled <= tolerance_mm))


def _check_same_shape(prediction: ArrayLike, labels: ArrayLike) -> None:
    if np.shape(prediction) != np.shape(labels):
        raise ValueError(
            f"prediction must have the shape of labels, {np.shape(labels)}, "
            f"got {np.shape(prediction)}."
        )


def _check_spacing(spacing: Sequence[float], mask: NDArray) -> None:
    if len(spacing) != mask.ndim:
        raise ValueError(f"spacing must have one entry per axis, {mask.ndim}, got {spacing}.")
