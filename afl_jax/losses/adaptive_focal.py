"""The adaptive focal loss (A-FL), and a form of it whose focus follows irregularity alone."""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from afl_jax.irregularity import surface_irregularity
from afl_jax.losses.channels import focal_cross_entropy, logits_and_target, mean_over_voxels
from afl_jax.statistics import Region, balancing_alpha, focusing_gamma

Balance = Literal["voxel", "volume", "channel"]


def adaptive_focal_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    gamma: jax.Array | float | None = None,
    alpha: jax.Array | float | None = None,
    balance: Balance = "voxel",
    region: Region = "volume",
    scale: float = 1.0,
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Adaptive focal loss (A-FL): a focal loss whose focus and balance follow the volume.

    .. math:: \mathrm{AFL}(p_t) = -w \, (1 - p_t)^{\gamma} \log p_t

    averaged over voxels and channels, where :math:`p_t` is the probability that a channel's
    sigmoid gives to the truth, :math:`\gamma` is `statistics.focusing_gamma` (size plus
    smoothness) and the weight :math:`w` follows from :math:`\alpha`,
    `statistics.balancing_alpha` (the background's share), by ``balance``:

    - ``"voxel"``: :math:`\alpha` on foreground voxels, :math:`1 - \alpha` on background voxels,
      so that both have the same total weight;
    - ``"volume"``: :math:`\alpha` on every voxel, the formula as printed in the paper;
    - ``"channel"``: :math:`\alpha` on the background channel, :math:`1 - \alpha` on the
      foreground channel: the authors' published code, for exact reproduction.

    For K >= 3 each foreground class has the gamma and alpha of its own mask, and the background
    channel those of the union of all foreground.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      gamma: Overrides the statistics: a number, ``[B]``, or ``[B, K]``.
      alpha: Overrides the statistics, likewise.
      balance: Where alpha weighs; see above.
      region: Of the smoothness, ``"volume"`` in the paper; see `statistics.surface_smoothness`.
      scale: Of gamma, 1 in the paper; as ``region``, of no effect on a gamma that is given.
      voxel_mask: Voxels that count, of the shape of ``labels``, in the mean of the loss and in
        the statistics; all if None.

    Returns:
      ``[B]``, finite and not negative. A volume without foreground has alpha = 1 and gamma = 0:
      ``"volume"`` gives its plain cross-entropy, ``"voxel"`` gives it no weight at all. 0 where
      no voxel counts.

    Raises:
      ValueError: If a shape, ``balance`` or ``region`` is not as stated, or ``"channel"`` is asked
        of K >= 3.

    References:
      Islam et al., Size and Smoothness Aware Adaptive Focal Loss for Small Tumor Segmentation,
      2024, https://arxiv.org/abs/2407.09828
    """
    if gamma is None:
        gamma = functools.partial(focusing_gamma, region=region, scale=scale)
    loss, _ = _balanced_focal(logits, labels, gamma, alpha, balance, voxel_mask)
    return mean_over_voxels(loss, voxel_mask)


def irregularity_focal_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    scale: float = 5.0,
    base: float = 0.0,
    alpha: jax.Array | float | None = 0.7,
    balance: Balance = "voxel",
    spacing: jax.Array | None = None,
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Adaptive focal loss whose focus follows the irregularity of the lesions, not their size.

    .. math:: -w \, (1 + \gamma) (1 - p_t)^{\gamma} \log p_t, \qquad \gamma = \gamma_0 + s \, \rho

    averaged over voxels and channels, where :math:`\rho` is `irregularity.surface_irregularity`:
    by how much the surface of the lesions, in mm, exceeds that of balls of their volumes. It is 0
    for a ball of any size and on any grid. Three things are not as in `adaptive_focal_loss`:

    - *Focus.* The published gamma is a share of the volume: near 0 for every small lesion, larger
      for a larger one, and much the same for a smooth and a ragged one. :math:`\rho` depends on
      shape alone, so that at s = 5 a lesion whose surface is 40 % larger than its ball's has
      gamma 2, the usual focal loss, and a smooth one cross-entropy.
    - *Scale.* The focal factor is at most 1: by itself it takes weight from the very volumes on
      which it is to focus. :math:`1 / (1 + \gamma)` is its mean over p_t from 0 to 1; divided by
      it, the factor moves weight from easy voxels to hard ones, at most :math:`1 + \gamma` times.
    - *Balance.* The published alpha is a share of the volume too; by voxel it gives a volume a
      total weight in proportion to its lesions. Here it is a constant. Dice is largest if a voxel
      is marked where the probability of lesion exceeds half the Dice that can be reached, and
      weights alpha and 1 - alpha move that threshold to p = 1/2 if it is 1 - alpha: 0.3 at
      alpha = 0.7, for a Dice of 0.6.

    What was measured speaks against it (``experiments/ablation.py``): on the phantom the constant
    alpha is what helps, and `adaptive_focal_loss` with alpha = 0.7 is better still; on the
    hippocampus two of three short runs learned nothing. The focus follows irregularity, as it is
    made to, and that made nothing better, irregular lesions included.

    For K >= 3 each foreground class has the gamma of its own mask, and the background channel that
    of the union of all foreground.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      scale: s, not negative.
      base: :math:`\gamma_0`, the gamma of a ball, not negative.
      alpha: As in `adaptive_focal_loss`; None is the background's share of the volume.
      balance: Where alpha weighs; see `adaptive_focal_loss`.
      spacing: Size of a voxel in mm, ``[B, 3]`` or ``[B, 2]``; 1 along each axis if None.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]``, finite and not negative. A volume without foreground has :math:`\rho` = 0. 0 where
      no voxel counts.

    Raises:
      ValueError: If a shape, ``balance``, ``scale`` or ``base`` is not as stated.

    References:
      Optimal threshold: Lipton et al., Optimal Thresholding of Classifiers to Maximize F1
      Measure, 2014, https://arxiv.org/abs/1402.1892
    """
    if scale < 0 or base < 0:
        raise ValueError(f"scale and base must not be negative, got {scale} and {base}.")

    def gamma_of(mask: jax.Array, *, voxel_mask: jax.Array | None) -> jax.Array:
        return base + scale * surface_irregularity(mask, spacing=spacing, voxel_mask=voxel_mask)

    loss, gamma = _balanced_focal(logits, labels, gamma_of, alpha, balance, voxel_mask)
    return mean_over_voxels((1.0 + gamma) * loss, voxel_mask)


def _balanced_focal(
    logits: jax.Array,
    labels: jax.Array,
    gamma: jax.Array | float | Callable[..., jax.Array],
    alpha: jax.Array | float | None,
    balance: Balance,
    voxel_mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The weighted focal cross-entropy ``[B, ..., K]``, and gamma in a shape that broadcasts."""
    if balance not in get_args(Balance):
        raise ValueError(f"balance must be one of {get_args(Balance)}, got {balance!r}.")
    logits, target = logits_and_target(logits, labels)
    num_channels = logits.shape[-1]
    if balance == "channel" and num_channels > 2:
        raise ValueError(
            f"balance='channel' is defined for 1 or 2 channels, got {num_channels}: "
            "use 'voxel' or 'volume'."
        )
    gamma = _per_channel(gamma, labels, num_channels, voxel_mask, name="gamma")
    alpha = _per_channel(
        balancing_alpha if alpha is None else alpha, labels, num_channels, voxel_mask, name="alpha"
    )
    # In the background channel the target is the background: there alpha goes where it is False.
    is_background = (jnp.arange(num_channels) == 0) & (num_channels > 1)
    is_background = is_background.reshape((1,) * labels.ndim + (num_channels,))
    if balance == "voxel":
        weight = jnp.where(target != is_background, alpha, 1.0 - alpha)
    elif balance == "volume":
        weight = alpha
    else:
        # Paper: alpha balances the classes; the authors' code: alpha, the share of the majority,
        # multiplies the whole background channel, and 1 - alpha the channel that is read.
        weight = jnp.where(is_background, alpha, 1.0 - alpha)
    return weight * focal_cross_entropy(logits, target, gamma), gamma


def _per_channel(
    value: jax.Array | float | Callable[..., jax.Array],
    labels: jax.Array,
    num_channels: int,
    voxel_mask: jax.Array | None,
    *,
    name: str,
) -> jax.Array:
    """A statistic, or what overrides it, as ``[B, 1, ..., K]`` (or 1 in place of B or K)."""
    if callable(value):
        masks = [labels > 0]
        if num_channels > 2:
            masks += [labels == c for c in range(1, num_channels)]
        value = jnp.stack([value(mask, voxel_mask=voxel_mask) for mask in masks], axis=-1)
    else:
        value = jnp.asarray(value)
        batch = labels.shape[0]
        if value.shape not in ((), (batch,), (batch, num_channels)):
            raise ValueError(
                f"{name} must be a number or have shape [B] = ({batch},) or "
                f"[B, K] = ({batch}, {num_channels}), got {value.shape}."
            )
        value = jnp.atleast_1d(value)
        value = value.reshape(value.shape[0], -1)
    return value.reshape(value.shape[:1] + (1,) * (labels.ndim - 1) + value.shape[1:])
