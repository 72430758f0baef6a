"""Logits and labels, channel by channel: what every loss begins and ends with."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

Activation = Literal["sigmoid", "softmax"]

# Logits beyond this are taken as this, so that sums over a volume stay finite in float32.
_LARGEST_LOGIT = 1e30


def logits_and_target(
    logits: jax.Array, labels: jax.Array, *, activation: Activation = "sigmoid"
) -> tuple[jax.Array, jax.Array]:
    r"""Each channel's own logit, and what its sigmoid should say.

    A softmax is a sigmoid of each channel against the rest,

    .. math:: \mathrm{softmax}(x)_c = \sigma\Bigl(x_c - \log \sum_{j \ne c} e^{x_j}\Bigr),

    so that a loss needs no second form for it, and no 1 - p that loses its digits.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      activation: ``"softmax"`` of a single channel is its sigmoid.

    Returns:
      Logits in float32 at least, within 1e30 (2e30 for a softmax), and the one-hot target as
      bool, both ``[B, ..., K]``.

    Raises:
      ValueError: If a shape or the activation is not as stated.
    """
    if activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {get_args(Activation)}, got {activation!r}.")
    if logits.ndim not in (4, 5):
        raise ValueError(
            f"logits must have shape [B, X, Y, Z, K] or [B, X, Y, K], got {logits.shape}."
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have shape {logits.shape[:-1]}, that of the logits without channels, "
            f"got {labels.shape}."
        )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    logits = jnp.clip(logits, -_LARGEST_LOGIT, _LARGEST_LOGIT)
    num_channels = logits.shape[-1]
    if activation == "softmax" and num_channels > 1:
        others = [jnp.delete(logits, c, axis=-1) for c in range(num_channels)]
        logits -= jnp.stack([jax.nn.logsumexp(other, axis=-1) for other in others], axis=-1)
    return logits, _one_hot(labels, num_channels)


def focal_cross_entropy(
    logits: jax.Array, target: jax.Array, gamma: jax.Array | float
) -> jax.Array:
    r"""Focal cross-entropy of each voxel and channel, from log-sigmoids alone.

    .. math:: -(1 - p_t)^{\gamma} \log p_t

    ``(1 - p_t) ** gamma`` has an unbounded gradient for gamma < 1 where p_t rounds to 1.

    Args:
      logits: ``[B, ..., K]``, from `logits_and_target`.
      target: ``[B, ..., K]`` bool.
      gamma: Focusing parameter, not negative; a number or an array that broadcasts.

    Returns:
      ``[B, ..., K]``.
    """
    u = jnp.where(target, logits, -logits)
    return jnp.exp(-gamma * jax.nn.softplus(u)) * jax.nn.softplus(-u)


def mean_over_voxels(loss: jax.Array, voxel_mask: jax.Array | None) -> jax.Array:
    """Mean over channels and the voxels that count.

    Args:
      loss: ``[B, ..., C]``.
      voxel_mask: Voxels that count, of the shape of ``loss`` without channels; all if None.

    Returns:
      ``[B]``; 0 where no voxel counts.

    Raises:
      ValueError: If the shape of ``voxel_mask`` is not as stated.
    """
    # Summed as [B, N]: over several axes at once, XLA on a CPU loses digits of a small volume.
    batch = loss.shape[0]
    if voxel_mask is None:
        return loss.reshape(batch, -1).mean(axis=1)
    counts = counted_voxels(loss.shape[:-1], voxel_mask)
    total = jnp.sum(loss.reshape(batch, -1, loss.shape[-1]), axis=(1, 2), where=counts[..., None])
    return total / (jnp.maximum(jnp.sum(counts, axis=1, dtype=jnp.int32), 1) * loss.shape[-1])


def sum_over_voxels(values: jax.Array, voxel_mask: jax.Array | None) -> jax.Array:
    """Sum over the voxels that count, channel by channel.

    Args:
      values: ``[B, ..., C]``.
      voxel_mask: Voxels that count, of the shape of ``values`` without channels; all if None.

    Returns:
      ``[B, C]``.

    Raises:
      ValueError: If the shape of ``voxel_mask`` is not as stated.
    """
    counts = counted_voxels(values.shape[:-1], voxel_mask)[..., None]
    return values.reshape(values.shape[0], -1, values.shape[-1]).sum(axis=1, where=counts)


def counted_voxels(shape: tuple[int, ...], voxel_mask: jax.Array | None) -> jax.Array:
    """The voxels that count, as one axis.

    Args:
      shape: Of the labels, ``[B, ...]``.
      voxel_mask: Of this shape; all voxels if None.

    Returns:
      ``[B, N]`` bool.

    Raises:
      ValueError: If the shape of ``voxel_mask`` is another.
    """
    if voxel_mask is None:
        voxel_mask = jnp.ones(shape, bool)
    if voxel_mask.shape != shape:
        raise ValueError(
            f"voxel_mask must have the shape of labels = {shape}, got {voxel_mask.shape}."
        )
    return voxel_mask.reshape(shape[0], -1) > 0


def _one_hot(labels: jax.Array, num_channels: int) -> jax.Array:
    """``[B, ..., K]`` bool; up to two channels all foreground is one class."""
    foreground = labels > 0
    if num_channels == 1:
        return foreground[..., None]
    if num_channels == 2:
        return jnp.stack([~foreground, foreground], axis=-1)
    return jnp.stack([labels == c for c in range(num_channels)], axis=-1)
