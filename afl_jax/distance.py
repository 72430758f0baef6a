"""Exact Euclidean distances in mm, on the device and jitted, since augmentation moves labels."""

import jax
import jax.numpy as jnp

from afl_jax.statistics import foreground_and_valid


def distance_to_boundary(
    labels: jax.Array,
    *,
    spacing: jax.Array | None = None,
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Distance of every voxel to the nearest voxel of the other kind, foreground or background.

    .. math:: d(v) = \min_{u : m(u) \ne m(v)} \lVert S (v - u) \rVert_2

    between centres of voxels, S the spacing. The square separates: along each axis in turn,
    :math:`g(i) = \min_j f(j) + s^2 (i - j)^2`, in time proportional to the number of voxels times
    the sum of the sides, and in the memory of a few volumes.

    Args:
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``; foreground where greater than 0.
      spacing: Size of a voxel in mm, ``[B, 3]`` or ``[B, 2]``; 1 along each axis if None.
      voxel_mask: Voxels that exist, of the shape of ``labels``; all if None.

    Returns:
      Of the shape of ``labels``, in mm; without gradient. 0 in a volume that has no foreground or
      no background.

    Raises:
      ValueError: If a shape is not as stated.

    References:
      Felzenszwalb, Huttenlocher, Distance Transforms of Sampled Functions, 2012,
      https://doi.org/10.4086/toc.2012.v008a019
    """
    foreground, valid = foreground_and_valid(labels, voxel_mask)
    if valid is None:
        valid = jnp.ones(labels.shape, bool)
    spacing = spacing_or_ones(labels, spacing)
    to_foreground = jax.vmap(_squared_distance)(foreground & valid, spacing)
    to_background = jax.vmap(_squared_distance)(~foreground & valid, spacing)
    squared = jnp.where(foreground, to_background, to_foreground)
    return jax.lax.stop_gradient(jnp.sqrt(jnp.where(jnp.isfinite(squared), squared, 0.0)))


def spacing_or_ones(labels: jax.Array, spacing: jax.Array | None) -> jax.Array:
    """The spacing of each volume, checked against its labels.

    Args:
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``.
      spacing: In mm, ``[B, 3]`` or ``[B, 2]``, or None.

    Returns:
      The spacing; 1 along each axis if None.

    Raises:
      ValueError: If the shape of the spacing is not as stated.
    """
    shape = (labels.shape[0], labels.ndim - 1)
    if spacing is None:
        return jnp.ones(shape)
    if spacing.shape != shape:
        raise ValueError(
            f"spacing must have shape {shape}, a number for each volume and axis, "
            f"got {spacing.shape}."
        )
    return spacing


def _squared_distance(target: jax.Array, spacing: jax.Array) -> jax.Array:
    """To the nearest True voxel of one volume; infinite if there is none."""
    squared = jnp.where(target, 0.0, jnp.inf)
    for axis, length in enumerate(target.shape):
        squared = _min_along(squared, jnp.square(spacing[axis]), axis, length)
    return squared


def _min_along(squared: jax.Array, step: jax.Array, axis: int, length: int) -> jax.Array:
    """Min over j of squared(j) + step (i - j)^2, one j after the other to save memory."""
    position = jnp.arange(length).reshape([-1 if a == axis else 1 for a in range(squared.ndim)])

    def take(j: jax.Array, nearest: jax.Array) -> jax.Array:
        plane = jax.lax.dynamic_index_in_dim(squared, j, axis=axis)
        return jnp.minimum(nearest, plane + step * jnp.square(position - j))

    return jax.lax.fori_loop(0, length, take, squared)
