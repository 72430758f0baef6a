"""Voxel-wise metrics of a batch of segmentations, jitted.

Counts first, ratios second: `confusion_counts` gives one integer count per case and foreground
class, and every metric is a ratio of counts. The ratios are per case; a mean over cases is
`nan_mean`, which divides once and says over how many cases.

Empty masks, here and in `lesions`. A value that would divide by zero, or that needs a surface
which is not there, is NaN: undefined for this case, left out of means, and its absence shows in
the count beside the mean. No metric is ever infinite.

| metric                                  | both empty | only prediction empty | only label empty |
|-----------------------------------------|------------|-----------------------|------------------|
| `dice`, `iou`                           | NaN        | 0                     | 0                |
| `sensitivity`                           | NaN        | 0                     | NaN              |
| `precision`                             | NaN        | NaN                   | 0                |
| `specificity` (NaN if the label is full)| 1          | 1                     | tn / (tn + fp)   |
| `soft_dice`, `soft_iou`                 | finite     | finite                | finite           |
| `lesions.lesion_f1`                     | NaN        | 0                     | 0                |
| `lesions.surface_dice`                  | NaN        | 0                     | 0                |
| `lesions.hausdorff_distance`, `..._95`  | NaN        | NaN                   | NaN              |
| `lesions.average_symmetric_surface_distance` | NaN   | NaN                   | NaN              |

Where the authors' code says otherwise:

- Dice, both empty: 0. Ours: NaN, for there was nothing to find and nothing was claimed.
- Lesion F1, both empty: 1. Ours: NaN, so that healthy cases do not raise the mean.
- Hausdorff distance, both empty: 0 (MONAI: NaN). Ours: NaN.
- Hausdorff and average surface distance, one mask empty: infinity. Ours: NaN.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

# MONAI's `smooth_nr` and `smooth_dr`: part of the paper's soft metric.
SMOOTHING = 1e-5


class ConfusionCounts(NamedTuple):
    """Voxel counts [B, F], int32, one column per foreground class against the rest."""

    tp: jax.Array
    fp: jax.Array
    fn: jax.Array
    tn: jax.Array


@partial(jax.jit, static_argnames="num_classes")
def confusion_counts(
    prediction: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int = 2,
    voxel_mask: jax.Array | None = None,
) -> ConfusionCounts:
    """Count agreeing and disagreeing voxels, each foreground class against the rest.

    Args:
        prediction: [B, X, Y, Z] or [B, X, Y] integer or bool, the predicted class of each voxel.
        labels: the true classes, like `prediction`.
        num_classes: K, background included; 1 and 2 both mean one foreground class.
        voxel_mask: bool, like `labels`; False leaves a voxel out of all four counts.

    Returns:
        int32 counts [B, F] with F = max(K - 1, 1); column f belongs to class f + 1. They are
        exact, and add up to the number of voxels counted.

    Raises:
        ValueError: shapes differ, or an argument is not a map of classes.
    """
    if prediction.shape != labels.shape:
        raise ValueError(
            f"prediction must have the shape of labels, {labels.shape}, got {prediction.shape}."
        )
    for name, array in (("prediction", prediction), ("labels", labels)):
        if not (jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == jnp.bool_):
            raise ValueError(f"{name} must hold classes, integer or bool, got {array.dtype}.")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
    if voxel_mask is None:
        voxel_mask = jnp.ones(labels.shape, bool)
    elif voxel_mask.shape != labels.shape:
        raise ValueError(
            f"voxel_mask must have the shape of labels, {labels.shape}, got {voxel_mask.shape}."
        )
    spatial = tuple(range(1, labels.ndim))

    def count(voxels: jax.Array) -> jax.Array:
        return jnp.sum(voxels & voxel_mask.astype(bool), axis=spatial, dtype=jnp.int32)

    def one_against_rest(foreground_class: jax.Array) -> ConfusionCounts:
        predicted, true = prediction == foreground_class, labels == foreground_class
        return ConfusionCounts(
            tp=count(predicted & true),
            fp=count(predicted & ~true),
            fn=count(~predicted & true),
            tn=count(~predicted & ~true),
        )

    foreground_classes = jnp.arange(1, max(num_classes - 1, 1) + 1)
    return jax.vmap(one_against_rest, out_axes=1)(foreground_classes)


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divide counts; NaN where the denominator is 0."""
    return jnp.where(denominator > 0, numerator / jnp.maximum(denominator, 1), jnp.nan)


@jax.jit
def dice(counts: ConfusionCounts) -> jax.Array:
    r"""Dice coefficient :math:`2TP / (2TP + FP + FN)`.

    Args:
        counts: [B, F], from `confusion_counts`.

    Returns:
        float32 [B, F]; NaN where the class is absent from both masks.
    """
    return _ratio(2 * counts.tp, 2 * counts.tp + counts.fp + counts.fn)


@jax.jit
def iou(counts: ConfusionCounts) -> jax.Array:
    r"""Intersection over union (Jaccard index) :math:`TP / (TP + FP + FN)`.

    Args:
        counts: [B, F], from `confusion_counts`.

    Returns:
        float32 [B, F]; NaN where the class is absent from both masks.
    """
    return _ratio(counts.tp, counts.tp + counts.fp + counts.fn)


@jax.jit
def sensitivity(counts: ConfusionCounts) -> jax.Array:
    r"""Sensitivity (recall) :math:`TP / (TP + FN)`.

    Args:
        counts: [B, F], from `confusion_counts`.

    Returns:
        float32 [B, F]; NaN where the class is absent from the label.
    """
    return _ratio(counts.tp, counts.tp + counts.fn)


@jax.jit
def specificity(counts: ConfusionCounts) -> jax.Array:
    r"""Specificity :math:`TN / (TN + FP)`.

    Args:
        counts: [B, F], from `confusion_counts`.

    Returns:
        float32 [B, F]; NaN where the class fills the whole label.
    """
    return _ratio(counts.tn, counts.tn + counts.fp)


@jax.jit
def precision(counts: ConfusionCounts) -> jax.Array:
    r"""Precision (positive predictive value) :math:`TP / (TP + FP)`.

    Args:
        counts: [B, F], from `confusion_counts`.

    Returns:
        float32 [B, F]; NaN where the class is absent from the prediction.
    """
    return _ratio(counts.tp, counts.tp + counts.fp)


@partial(jax.jit, static_argnames="axis")
def nan_mean(
    values: jax.Array, *, axis: int | tuple[int, ...] | None = 0
) -> tuple[jax.Array, jax.Array]:
    """Mean of the defined values, and how many there are.

    Args:
        values: any shape; NaN marks an undefined value.
        axis: the axis or axes to average over; the default averages [B, F] over cases.

    Returns:
        The mean, NaN where no value is defined, and the int32 count of defined values.
    """
    defined = ~jnp.isnan(values)
    count = jnp.sum(defined, axis=axis, dtype=jnp.int32)
    return _ratio(jnp.sum(jnp.where(defined, values, 0), axis=axis), count), count


def _soft_sums(probs: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Soft intersection and soft size of every channel, background first, each [B, K]."""
    if probs.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have the shape of probs without its last axis, {probs.shape[:-1]}, "
            f"got {labels.shape}."
        )
    probs = probs.astype(jnp.promote_types(probs.dtype, jnp.float32))
    if probs.shape[-1] == 1:
        probs = jnp.concatenate([1 - probs, probs], axis=-1)
    one_hot = jax.nn.one_hot(labels, probs.shape[-1], dtype=probs.dtype)
    spatial = tuple(range(1, labels.ndim))
    intersection = jnp.sum(probs * one_hot, axis=spatial)
    return intersection, jnp.sum(probs**2 + one_hot, axis=spatial)


@jax.jit
def soft_dice(probs: jax.Array, labels: jax.Array) -> jax.Array:
    r"""The paper's "Dice": soft, on squared probabilities, background averaged in.

    .. math:: \frac1K \sum_k \frac{2 \sum p_k t_k + \epsilon}{\sum p_k^2 + \sum t_k + \epsilon}

    with :math:`\epsilon = 10^{-5}`. One minus MONAI's `DiceLoss(to_onehot_y=True, sigmoid=True,
    squared_pred=True)`. It is not the overlap of two masks: the background channel lifts it (a
    value of 0.769 can mean a foreground `dice` near 0.54). Report it only beside published values
    of the same definition.

    Args:
        probs: [B, X, Y, Z, K] or [B, X, Y, K]; K = 1 stands for the two channels (1 - p, p).
        labels: [B, X, Y, Z] or [B, X, Y] integer classes.

    Returns:
        [B], float32 at least, finite for every input; a channel whose probabilities and label are
        all zero contributes 1.

    Raises:
        ValueError: the shapes do not fit.

    References:
        Islam et al., "Size and Smoothness Aware Adaptive Focal Loss for Small Tumor
        Segmentation", 2024, https://arxiv.org/abs/2407.09828
    """
    intersection, size = _soft_sums(probs, labels)
    return jnp.mean((2 * intersection + SMOOTHING) / (size + SMOOTHING), axis=-1)


@jax.jit
def soft_iou(probs: jax.Array, labels: jax.Array) -> jax.Array:
    r"""The paper's "IoU": soft, on squared probabilities, background averaged in.

    .. math::
        \frac1K \sum_k \frac{2 \sum p_k t_k + \epsilon}
        {2 (\sum p_k^2 + \sum t_k - \sum p_k t_k) + \epsilon}

    with :math:`\epsilon = 10^{-5}`. One minus MONAI's `DiceLoss(to_onehot_y=True, sigmoid=True,
    squared_pred=True, jaccard=True)`. The warning of `soft_dice` holds here too.

    Args:
        probs: [B, X, Y, Z, K] or [B, X, Y, K]; K = 1 stands for the two channels (1 - p, p).
        labels: [B, X, Y, Z] or [B, X, Y] integer classes.

    Returns:
        [B], float32 at least, finite for every input; a channel whose probabilities and label are
        all zero contributes 1.

    Raises:
        ValueError: the shapes do not fit.

    References:
        Islam et al., "Size and Smoothness Aware Adaptive Focal Loss for Small Tumor
        Segmentation", 2024, https://arxiv.org/abs/2407.09828
    """
    intersection, size = _soft_sums(probs, labels)
    union = size - intersection
    return jnp.mean((2 * intersection + SMOOTHING) / (2 * union + SMOOTHING), axis=-1)
