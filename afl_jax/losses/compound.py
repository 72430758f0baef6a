"""Sums of a region loss and one of another kind."""

import jax
import jax.numpy as jnp

from afl_jax.losses.boundary import boundary_loss
from afl_jax.losses.channels import (
    Activation,
    focal_cross_entropy,
    logits_and_target,
    mean_over_voxels,
)
from afl_jax.losses.distribution import cross_entropy_loss, focal_loss
from afl_jax.losses.region import dice_loss, fractional_power, tversky_distance


def dice_cross_entropy_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    activation: Activation = "softmax",
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Dice plus cross-entropy: :math:`\mathrm{Dice}_{q=1} + \mathrm{CE}`.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      activation: Of the channels, in both terms.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]``, finite and not negative; 0 where no voxel counts.

    Raises:
      ValueError: If a shape or the activation is not as stated.

    References:
      Isensee et al., nnU-Net, 2018, https://arxiv.org/abs/1809.10486
    """
    dice = dice_loss(logits, labels, exponent=1, activation=activation, voxel_mask=voxel_mask)
    return dice + cross_entropy_loss(logits, labels, activation=activation, voxel_mask=voxel_mask)


def dice_focal_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    gamma: float = 2.0,
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Dice plus focal loss: :math:`\mathrm{Dice}_{q=1} + \mathrm{FL}`, of sigmoids.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      gamma: Focusing parameter of the focal loss.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]``, finite and not negative; 0 where no voxel counts.

    Raises:
      ValueError: If a shape is not as stated.

    References:
      Zhu et al., AnatomyNet, 2018, https://arxiv.org/abs/1808.05238
    """
    dice = dice_loss(logits, labels, exponent=1, voxel_mask=voxel_mask)
    return dice + focal_loss(logits, labels, gamma=gamma, voxel_mask=voxel_mask)


def dice_boundary_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    weight: float = 0.1,
    spacing: jax.Array | None = None,
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Dice plus boundary loss: :math:`\mathrm{Dice}_{q=1} + w \, \mathrm{Boundary}`, of sigmoids.

    The authors raise the weight of the boundary from epoch to epoch; here it is constant, since a
    loss knows no epoch.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      weight: w, per mm, not negative.
      spacing: Size of a voxel in mm, ``[B, 3]`` or ``[B, 2]``; 1 along each axis if None.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]``, finite and not negative; 0 where no voxel counts.

    Raises:
      ValueError: If a shape is not as stated.

    References:
      Kervadec et al., Boundary loss for highly unbalanced segmentation, 2019,
      https://arxiv.org/abs/1812.07032
    """
    dice = dice_loss(logits, labels, exponent=1, voxel_mask=voxel_mask)
    return dice + weight * boundary_loss(logits, labels, spacing=spacing, voxel_mask=voxel_mask)


def unified_focal_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    weight: float = 0.5,
    delta: float = 0.6,
    gamma: float = 0.5,
    activation: Activation = "softmax",
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Unified focal loss, in its asymmetric form: what is rare is never faded.

    .. math::
        \lambda L_{aFT} + (1 - \lambda) L_{aF}

        L_{aF} = -\frac1N \sum_v \Bigl( \delta \sum_{c > 0} t_c \log p_c
                 + (1 - \delta) \, t_0 (1 - p_0)^{\gamma} \log p_0 \Bigr)

        L_{aFT} = \frac1C \Bigl( (1 - \mathrm{TI}_0)
                  + \sum_{c > 0} (1 - \mathrm{TI}_c)^{1 - \gamma} \Bigr)

    with channel 0 the background and TI as in `tversky_loss`, where delta prices false negatives
    and 1 - delta false positives. A single channel stands for the two (1 - p, p), so that C = 2.
    The power is straightened below 1e-6, as in `focal_tversky_loss`.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      weight: :math:`\lambda`, of the Tversky term, in [0, 1].
      delta: Weight of the foreground, in [0, 1].
      gamma: Focusing parameter, in [0, 1).
      activation: Of the channels.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]``, finite and not negative; of an absent class see `dice_loss`; 0 where no voxel counts.

    Raises:
      ValueError: If a shape or an option is not as stated.

    References:
      Yeung et al., Unified Focal loss: Generalising Dice and cross entropy-based losses to handle
      class imbalanced medical image segmentation, 2022, https://arxiv.org/abs/2102.04525
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must be from 0 to below 1, got {gamma}.")
    own, target = logits_and_target(logits, labels, activation=activation)
    if own.shape[-1] == 1:
        own = jnp.concatenate([-own, own], axis=-1)
        target = jnp.concatenate([~target, target], axis=-1)
        logits, activation = own, "sigmoid"
    background = (1 - delta) * focal_cross_entropy(own[..., :1], target[..., :1], gamma)
    foreground = delta * focal_cross_entropy(own[..., 1:], target[..., 1:], 0.0)
    cross_entropy = jnp.concatenate([background, foreground], axis=-1)
    focal = jnp.sum(cross_entropy, axis=-1, keepdims=True, where=target)
    distance = tversky_distance(
        logits,
        labels,
        alpha=1 - delta,
        beta=delta,
        activation=activation,
        voxel_mask=voxel_mask,
    )
    focal_tversky = jnp.concatenate(
        [distance[:, :1], fractional_power(distance[:, 1:], 1 - gamma)], axis=-1
    ).mean(axis=-1)
    return weight * focal_tversky + (1 - weight) * mean_over_voxels(focal, voxel_mask)
