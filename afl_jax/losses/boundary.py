"""A loss that measures how far from the true boundary a network is wrong."""

import jax
import jax.numpy as jnp

from afl_jax.distance import distance_to_boundary
from afl_jax.losses.channels import logits_and_target, mean_over_voxels


def boundary_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    spacing: jax.Array | None = None,
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Boundary loss: every wrong voxel costs its distance to the true boundary, in mm.

    .. math:: d(v) \, |p(v) - t(v)|

    averaged over voxels and channels, d from `distance.distance_to_boundary`. With the signed
    distance :math:`\phi` (negative inside) this is the published mean of :math:`\phi p` less the
    constant :math:`\phi t`: the same gradient, and 0 for a perfect prediction. Alone it is nearly
    blind to small lesions, of which no voxel is far from the boundary; `dice_boundary_loss` adds
    it to a region loss, as its authors do.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      spacing: Size of a voxel in mm, ``[B, 3]`` or ``[B, 2]``; 1 along each axis if None.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]``, finite and not negative; a class that is absent, or is everywhere, has no boundary
      and costs nothing. 0 where no voxel counts.

    Raises:
      ValueError: If a shape is not as stated.

    References:
      Kervadec et al., Boundary loss for highly unbalanced segmentation, 2019,
      https://arxiv.org/abs/1812.07032
    """
    logits, target = logits_and_target(logits, labels)
    num_channels = logits.shape[-1]
    # The background channel, and a single one, have the boundary of all foreground.
    masks = [labels > 0] + [labels == c for c in range(1, num_channels) if num_channels > 2]
    distance = jnp.stack(
        [distance_to_boundary(mask, spacing=spacing, voxel_mask=voxel_mask) for mask in masks],
        axis=-1,
    )
    error = jax.nn.sigmoid(jnp.where(target, -logits, logits))
    return mean_over_voxels(distance * error, voxel_mask)
