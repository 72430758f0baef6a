"""Size and smoothness of a labelled volume: what makes the focal loss adaptive.

Every function maps labels ``[B, X, Y, Z]`` or ``[B, X, Y]`` to one number a volume, ``[B]``, runs
under ``jax.jit`` and carries no gradient. Labels may be integer, bool or float; foreground is
whatever is greater than 0. ``voxel_mask``, of the shape of the labels, says which voxels exist: a
volume that was padded to a grid has, under its mask, exactly the statistics that it had before.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

Region = Literal["volume", "surface"]


def foreground_fraction(labels: jax.Array, *, voxel_mask: jax.Array | None = None) -> jax.Array:
    r"""Share of the voxels that is foreground, the paper's :math:`\gamma_{va}`.

    .. math:: \frac{P_{fg}}{P_{fg} + P_{bg}}

    Args:
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``; foreground where greater than 0.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]`` in [0, 1]; 0 where no voxel counts.

    Raises:
      ValueError: If a shape is not as stated.

    References:
      Islam et al., Size and Smoothness Aware Adaptive Focal Loss for Small Tumor Segmentation,
      2024, https://arxiv.org/abs/2407.09828
    """
    num_foreground, num_background = _class_counts(labels, voxel_mask)
    return num_foreground / jnp.maximum(num_foreground + num_background, 1.0)


def balancing_alpha(labels: jax.Array, *, voxel_mask: jax.Array | None = None) -> jax.Array:
    r"""Share of the voxels that is background, the paper's :math:`\alpha_{va}`.

    .. math:: \frac{P_{bg}}{P_{fg} + P_{bg}} = 1 - \gamma_{va}

    Args:
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``; foreground where greater than 0.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]`` in [0, 1]; 1 for a volume without foreground, and where no voxel counts.

    Raises:
      ValueError: If a shape is not as stated.

    References:
      Islam et al., 2024, https://arxiv.org/abs/2407.09828
    """
    # Not 1 - fraction, which XLA may round to less than 0 for a volume that is all foreground.
    num_foreground, num_background = _class_counts(labels, voxel_mask)
    total = num_foreground + num_background
    return jnp.where(total > 0, num_background / jnp.maximum(total, 1), 1.0)


def surface_smoothness(
    labels: jax.Array,
    *,
    region: Region = "volume",
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Mean gradient magnitude of the 0/1 foreground mask, the paper's :math:`\gamma_{mSa}`.

    .. math:: \frac{1}{|R|} \sum_{v \in R} \lVert \nabla m(v) \rVert_2

    The gradient is in voxels: a central difference, and a one-sided one where only one neighbour
    exists, on the first and last slice as at the rim of ``voxel_mask``.

    Args:
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``; foreground where greater than 0.
      region: R. ``"volume"`` is every voxel, as the paper has it; ``"surface"`` is the voxels
        whose gradient is not zero, so that the size of the volume does not dilute the surface.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]``; 0 for a volume without foreground or without background. An axis of length 1
      contributes a gradient of 0.

    Raises:
      ValueError: If a shape or the region is not as stated.

    References:
      Islam et al., 2024, https://arxiv.org/abs/2407.09828
    """
    if region not in get_args(Region):
        raise ValueError(f"region must be one of {get_args(Region)}, got {region!r}.")
    foreground, valid = foreground_and_valid(labels, voxel_mask)
    mask = foreground.astype(jnp.result_type(float))
    squared = sum(
        jnp.square(_gradient(mask, valid, axis=axis)) for axis in range(1, foreground.ndim)
    )
    magnitude = _flat(jnp.sqrt(squared))
    if region == "surface":
        count = jnp.sum(magnitude > 0, axis=1, dtype=jnp.int32)
    elif valid is not None:
        count = jnp.sum(_flat(valid), axis=1, dtype=jnp.int32)
    else:
        count = magnitude.shape[1]
    # The gradient of a voxel that does not count is 0.
    return magnitude.sum(axis=1) / jnp.maximum(count, 1)


def focusing_gamma(
    labels: jax.Array,
    *,
    region: Region = "volume",
    scale: float = 1.0,
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Focusing parameter of the adaptive focal loss, :math:`\gamma_{adaptive}`.

    .. math:: \gamma_{adaptive} = s \, (\gamma_{va} + \gamma_{mSa})

    Args:
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``; foreground where greater than 0.
      region: Where the smoothness is averaged; see `surface_smoothness`.
      scale: s; 1 in the paper.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]``, not negative for a scale that is not; 0 for a volume without foreground.

    Raises:
      ValueError: If a shape or the region is not as stated.

    References:
      Islam et al., 2024, https://arxiv.org/abs/2407.09828
    """
    size = foreground_fraction(labels, voxel_mask=voxel_mask)
    return scale * (size + surface_smoothness(labels, region=region, voxel_mask=voxel_mask))


def foreground_and_valid(
    labels: jax.Array, voxel_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The labels as a bool mask and the voxel mask as bool, both without gradient.

    Args:
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``; foreground where greater than 0.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      Two bool arrays of the shape of ``labels``; the second is None if ``voxel_mask`` is.

    Raises:
      ValueError: If a shape is not as stated.
    """
    if labels.ndim not in (3, 4):
        raise ValueError(f"labels must have shape [B, X, Y, Z] or [B, X, Y], got {labels.shape}.")
    if voxel_mask is not None and voxel_mask.shape != labels.shape:
        raise ValueError(
            f"voxel_mask must have the shape of labels = {labels.shape}, got {voxel_mask.shape}."
        )
    return labels > 0, None if voxel_mask is None else voxel_mask > 0


def _gradient(mask: jax.Array, valid: jax.Array | None, *, axis: int) -> jax.Array:
    """Mean of the forward and the backward difference, of those whose neighbour exists."""
    if valid is None:
        pair_shape = [1] * mask.ndim
        pair_shape[axis] = mask.shape[axis] - 1
        pair_exists = jnp.ones(pair_shape, mask.dtype)
    else:
        lower = jax.lax.slice_in_dim(valid, 0, -1, axis=axis)
        upper = jax.lax.slice_in_dim(valid, 1, None, axis=axis)
        pair_exists = (lower & upper).astype(mask.dtype)
    difference = jnp.diff(mask, axis=axis) * pair_exists
    num_neighbours = _sum_of_neighbours(pair_exists, axis=axis)
    return _sum_of_neighbours(difference, axis=axis) / jnp.maximum(num_neighbours, 1.0)


def _sum_of_neighbours(pairs: jax.Array, *, axis: int) -> jax.Array:
    """Pairs (i, i + 1) along an axis, [n - 1], to the sum of the two at each voxel, [n]."""
    before, after = [[(0, 0)] * pairs.ndim for _ in range(2)]
    before[axis], after[axis] = (1, 0), (0, 1)
    return jnp.pad(pairs, before) + jnp.pad(pairs, after)


def _class_counts(labels: jax.Array, voxel_mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Number of foreground and of background voxels, ``[B]``: counted exactly, then floats."""
    foreground, valid = foreground_and_valid(labels, voxel_mask)
    background = ~foreground
    if valid is not None:
        foreground, background = foreground & valid, background & valid
    counts = [_flat(mask).sum(axis=1, dtype=jnp.int32) for mask in (foreground, background)]
    # A quotient of int32 would be float32 even where the default is float64.
    return tuple(count.astype(jnp.result_type(float)) for count in counts)


def _flat(values: jax.Array) -> jax.Array:
    """``[B, ...]`` to ``[B, N]``; XLA on a CPU loses digits of small sums over several axes."""
    return values.reshape(values.shape[0], -1)
