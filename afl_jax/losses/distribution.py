"""Losses that are a mean over voxels of what the network says of each."""

import jax
import jax.numpy as jnp

from afl_jax.losses.channels import (
    Activation,
    counted_voxels,
    focal_cross_entropy,
    logits_and_target,
    mean_over_voxels,
)


def cross_entropy_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    activation: Activation = "softmax",
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Cross-entropy, averaged over voxels.

    .. math:: \mathrm{CE} = -\log p_t

    With ``"softmax"`` :math:`p_t` is the probability of the true class; with ``"sigmoid"`` it is
    what a channel gives to its truth, averaged over channels too (binary cross-entropy).

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      activation: Of the channels; both are the same for K = 1.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]``, finite and not negative; 0 where no voxel counts.

    Raises:
      ValueError: If a shape or the activation is not as stated.
    """
    loss = _cross_entropy(logits, labels, activation=activation)
    return mean_over_voxels(loss, voxel_mask)


def top_k_cross_entropy_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    fraction: float = 0.1,
    activation: Activation = "softmax",
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Cross-entropy of the hardest voxels of a volume: online hard example mining.

    .. math:: \frac{1}{|T|} \sum_{v \in T} -\log p_t(v)

    where T holds the :math:`k = \lceil f N \rceil` of the N voxels (and channels, with
    ``"sigmoid"``) whose cross-entropy is largest. Those that tie for the last places share them.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      fraction: f, in (0, 1]; 1 gives `cross_entropy_loss`.
      activation: See `cross_entropy_loss`.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]``, finite and not negative; 0 where no voxel counts.

    Raises:
      ValueError: If a shape or an option is not as stated.

    References:
      Wu et al., Bridging Category-level and Instance-level Semantic Image Segmentation, 2016,
      https://arxiv.org/abs/1605.06885
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}.")
    loss = _cross_entropy(logits, labels, activation=activation)
    counts = counted_voxels(labels.shape, voxel_mask)
    batch, num_channels = loss.shape[0], loss.shape[-1]
    loss = loss.reshape(batch, -1)
    counts = jnp.repeat(counts, num_channels, axis=1)
    # What does not count comes first in ascending order, so that the k largest are the last k.
    ascending = jnp.sort(jax.lax.stop_gradient(jnp.where(counts, loss, -1.0)), axis=1)
    num_counted = counts.sum(axis=1, dtype=jnp.int32)
    k = jnp.ceil(fraction * num_counted).astype(jnp.int32)
    smallest = jnp.take_along_axis(ascending, (loss.shape[1] - k)[:, None], axis=1, mode="clip")
    above, tied = counts & (loss > smallest), counts & (loss == smallest)
    num_above, num_tied = (x.sum(axis=1, dtype=jnp.int32) for x in (above, tied))
    share = (k - num_above) / jnp.maximum(num_tied, 1)
    total = jnp.sum(loss, axis=1, where=above) + share * jnp.sum(loss, axis=1, where=tied)
    return total / jnp.maximum(k, 1)


def focal_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Focal loss: cross-entropy that fades where a voxel is already right.

    .. math:: \mathrm{FL}(p_t) = -\alpha_t \, (1 - p_t)^{\gamma} \log p_t

    averaged over voxels and channels; one sigmoid a channel, the background channel included, as
    the authors' baseline has it. :math:`\alpha_t` is alpha where the channel's target is 1 and
    1 - alpha where it is 0.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      gamma: Focusing parameter; 0 gives binary cross-entropy.
      alpha: Balance of a channel's positives against its negatives; none if None.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]``, finite and not negative; 0 where no voxel counts.

    Raises:
      ValueError: If a shape is not as stated.

    References:
      Lin et al., Focal Loss for Dense Object Detection, 2017, https://arxiv.org/abs/1708.02002
    """
    logits, target = logits_and_target(logits, labels)
    loss = focal_cross_entropy(logits, target, gamma)
    if alpha is not None:
        loss *= jnp.where(target, alpha, 1.0 - alpha)
    return mean_over_voxels(loss, voxel_mask)


def _cross_entropy(logits: jax.Array, labels: jax.Array, *, activation: Activation) -> jax.Array:
    """-log(p_t) of each voxel: ``[B, ..., 1]`` for a softmax, ``[B, ..., K]`` for sigmoids."""
    logits, target = logits_and_target(logits, labels, activation=activation)
    if activation == "sigmoid" or logits.shape[-1] == 1:
        return focal_cross_entropy(logits, target, 0.0)
    return jnp.sum(jax.nn.softplus(-logits), axis=-1, keepdims=True, where=target)
