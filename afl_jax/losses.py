"""Segmentation losses, to be read by comparison: ``(logits, labels, *, ...) -> [B]``.

Logits are ``[B, X, Y, Z, K]`` and labels ``[B, X, Y, Z]`` (or both without Z); each loss returns
one number a volume and leaves the mean over the batch to the caller. They share three rules:

- K = 1: one sigmoid for the foreground, which is ``labels > 0``.
- K = 2: background and foreground, each with a sigmoid of its own; foreground is ``labels > 0``.
- K >= 3: one sigmoid a class, each class against the rest; a label is the index of its channel.

They compute in float32 at least, whatever the dtype of the logits.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from afl_jax.statistics import balancing_alpha, focusing_gamma

Balance = Literal["voxel", "volume", "channel"]

# Logits beyond this are taken as this, so that sums over a volume stay finite in float32.
_LARGEST_LOGIT = 1e30


def adaptive_focal_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    gamma: jax.Array | float | None = None,
    alpha: jax.Array | float | None = None,
    balance: Balance = "voxel",
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
      voxel_mask: Voxels that count, of the shape of ``labels``, in the mean of the loss and in
        the statistics; all if None.

    Returns:
      ``[B]``, finite and not negative. A volume without foreground has alpha = 1 and gamma = 0:
      ``"volume"`` gives its plain cross-entropy, ``"voxel"`` gives it no weight at all. 0 where
      no voxel counts.

    Raises:
      ValueError: If a shape or ``balance`` is not as stated, or ``"channel"`` is asked of K >= 3.

    References:
      Islam et al., Size and Smoothness Aware Adaptive Focal Loss for Small Tumor Segmentation,
      2024, https://arxiv.org/abs/2407.09828
    """
    if balance not in get_args(Balance):
        raise ValueError(f"balance must be one of {get_args(Balance)}, got {balance!r}.")
    logits, target = _logits_and_target(logits, labels)
    num_channels = logits.shape[-1]
    if balance == "channel" and num_channels > 2:
        raise ValueError(
            f"balance='channel' is defined for 1 or 2 channels, got {num_channels}: "
            "use 'voxel' or 'volume'."
        )
    gamma = _per_channel(
        focusing_gamma if gamma is None else gamma, labels, num_channels, voxel_mask, name="gamma"
    )
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
    return _mean_over_voxels(weight * _focal(logits, target, gamma), voxel_mask)


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
    logits, target = _logits_and_target(logits, labels)
    loss = _focal(logits, target, gamma)
    if alpha is not None:
        loss *= jnp.where(target, alpha, 1.0 - alpha)
    return _mean_over_voxels(loss, voxel_mask)


LOSSES: dict[str, Callable[..., jax.Array]] = {
    "adaptive_focal": adaptive_focal_loss,
    "focal": focal_loss,
}


def _focal(logits: jax.Array, target: jax.Array, gamma: jax.Array | float) -> jax.Array:
    """-(1 - p_t)^gamma log(p_t) for p_t = sigmoid(u), from log-sigmoids alone.

    `(1 - p_t) ** gamma` has an unbounded gradient for gamma < 1 where p_t rounds to 1.
    """
    u = jnp.where(target, logits, -logits)
    return jnp.exp(-gamma * jax.nn.softplus(u)) * jax.nn.softplus(-u)


def _logits_and_target(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits in float32 at least and the one-hot target as bool, both ``[B, ..., K]``."""
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
    return logits, _one_hot(labels, logits.shape[-1])


def _one_hot(labels: jax.Array, num_channels: int) -> jax.Array:
    """``[B, ..., K]`` bool; up to two channels all foreground is one class."""
    foreground = labels > 0
    if num_channels == 1:
        return foreground[..., None]
    if num_channels == 2:
        return jnp.stack([~foreground, foreground], axis=-1)
    return jnp.stack([labels == c for c in range(num_channels)], axis=-1)


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


def _mean_over_voxels(loss: jax.Array, voxel_mask: jax.Array | None) -> jax.Array:
    """``[B, ..., K]`` to ``[B]``: the mean over channels and the voxels that count.

    Summed as ``[B, N]``: over several axes at once, XLA on a CPU loses digits of a small volume.
    """
    batch = loss.shape[0]
    if voxel_mask is None:
        return loss.reshape(batch, -1).mean(axis=1)
    if voxel_mask.shape != loss.shape[:-1]:
        raise ValueError(
            f"voxel_mask must have the shape of labels = {loss.shape[:-1]}, got {voxel_mask.shape}."
        )
    counts = voxel_mask.reshape(batch, -1) > 0
    total = jnp.sum(loss.reshape(batch, -1, loss.shape[-1]), axis=(1, 2), where=counts[..., None])
    return total / (jnp.maximum(jnp.sum(counts, axis=1, dtype=jnp.int32), 1) * loss.shape[-1])
