"""Losses that compare two regions: one ratio of sums over the volume for each channel."""

import jax
import jax.numpy as jnp

from afl_jax.losses.channels import Activation, logits_and_target, sum_over_voxels

# Of MONAI and of the authors' code; it decides what a class that is absent from both costs.
_SMOOTHING = 1e-5
# Below this a fractional power goes on as a straight line, whose slope is finite.
_SMALLEST_BASE = 1e-6


def dice_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    exponent: int = 2,
    activation: Activation = "sigmoid",
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Soft Dice loss, averaged over channels, the background included.

    .. math:: 1 - \frac{2 \sum p t + \epsilon}{\sum p^q + \sum t + \epsilon}
              = \frac{\sum |p - t|^q}{\sum p^q + \sum t + \epsilon}

    with :math:`\epsilon = 10^{-5}`; the right side loses no digits of a prediction that is nearly
    perfect.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      exponent: q, 1 or 2; 2 in the authors' Dice baseline.
      activation: Of the channels.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]`` in [0, 1]. A class that is absent costs nearly 1 as long as the network claims more
      than epsilon of it in all; 0 where no voxel counts.

    Raises:
      ValueError: If a shape or an option is not as stated.

    References:
      Milletari et al., V-Net, 2016, https://arxiv.org/abs/1606.04797
    """
    error, size = _error_and_size(logits, labels, exponent, activation, voxel_mask)
    return jnp.mean(error / (size + _SMOOTHING), axis=-1)


def iou_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    exponent: int = 2,
    activation: Activation = "sigmoid",
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Soft intersection-over-union (Jaccard) loss, averaged over channels with the background.

    .. math:: 1 - \frac{2 \sum p t + \epsilon}
              {2 \left(\sum p^q + \sum t - \sum p t\right) + \epsilon}

    with :math:`\epsilon = 10^{-5}`. The paper does not say which form it used; at q = 2 this is
    one minus the authors' IoU metric.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      exponent: q, 1 or 2.
      activation: Of the channels.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]`` in [0, 1]; of an absent class see `dice_loss`; 0 where no voxel counts.

    Raises:
      ValueError: If a shape or an option is not as stated.

    References:
      Rahman, Wang, Optimizing Intersection-Over-Union in Deep Neural Networks for Image
      Segmentation, 2016, https://doi.org/10.1007/978-3-319-50835-1_22
    """
    error, size = _error_and_size(logits, labels, exponent, activation, voxel_mask)
    # Twice the union is size + error, since twice the intersection is size - error.
    return jnp.mean(2 * error / (size + error + _SMOOTHING), axis=-1)


def generalised_dice_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    activation: Activation = "sigmoid",
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Generalised Dice loss: one Dice of all channels, each weighed by its squared inverse size.

    .. math:: 1 - \frac{2 \sum_c w_c \sum p_c t_c}{\sum_c w_c \left(\sum p_c + \sum t_c\right)},
              \qquad w_c \propto \Bigl(\sum t_c\Bigr)^{-2}

    scaled so that the largest weight is 1, with 1e-5 added to the denominator. A class that is
    absent has the weight of the smallest that is there.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      activation: Of the channels.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]`` in [0, 1]; 0 where no voxel counts.

    Raises:
      ValueError: If a shape or the activation is not as stated.

    References:
      Sudre et al., Generalised Dice Overlap as a Deep Learning Loss Function for Highly
      Unbalanced Segmentations, 2017, https://arxiv.org/abs/1707.03237
    """
    true_positive, false_positive, false_negative = _soft_counts(
        logits, labels, activation, voxel_mask
    )
    # A probability and its complement, summed over the voxels of a class: as many as there are.
    count = jax.lax.stop_gradient(jnp.round(true_positive + false_negative))
    present = jnp.where(count > 0, count, jnp.inf)
    smallest = jnp.min(present, axis=-1, keepdims=True)
    weight = jnp.where(count > 0, jnp.square(smallest / jnp.maximum(count, 1)), 1.0)
    error = false_positive + false_negative
    size = 2 * true_positive + error
    return jnp.sum(weight * error, axis=-1) / (jnp.sum(weight * size, axis=-1) + _SMOOTHING)


def tversky_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    activation: Activation = "sigmoid",
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Tversky loss: Dice that prices false positives and false negatives apart.

    .. math:: 1 - \mathrm{TI}, \qquad \mathrm{TI} = \frac{\sum p t + \epsilon}
              {\sum p t + \alpha \sum p (1 - t) + \beta \sum (1 - p) t + \epsilon}

    averaged over channels, the background included, with :math:`\epsilon = 10^{-5}`.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      alpha: Price of a false positive; 0.5 and 0.5, as in the authors' baseline, give Dice.
      beta: Price of a false negative.
      activation: Of the channels.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]`` in [0, 1]; of an absent class see `dice_loss`; 0 where no voxel counts.

    Raises:
      ValueError: If a shape or the activation is not as stated.

    References:
      Salehi et al., Tversky loss function for image segmentation using 3D fully convolutional
      deep networks, 2017, https://arxiv.org/abs/1706.05721
    """
    return jnp.mean(
        tversky_distance(
            logits, labels, alpha=alpha, beta=beta, activation=activation, voxel_mask=voxel_mask
        ),
        axis=-1,
    )


def focal_tversky_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 4 / 3,
    activation: Activation = "sigmoid",
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""Focal Tversky loss: a power of the Tversky loss, steeper for a region that is nearly right.

    .. math:: (1 - \mathrm{TI})^{1 / \gamma}

    averaged over channels, the background included; TI as in `tversky_loss`. Below 1e-6 the power
    goes on as a straight line through the origin, since its slope has no bound there.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``, 0 for background.
      alpha: Price of a false positive.
      beta: Price of a false negative.
      gamma: Focusing parameter, at least 1.
      activation: Of the channels.
      voxel_mask: Voxels that count, of the shape of ``labels``; all if None.

    Returns:
      ``[B]`` in [0, 1]; of an absent class see `dice_loss`; 0 where no voxel counts.

    Raises:
      ValueError: If a shape or an option is not as stated.

    References:
      Abraham, Khan, A Novel Focal Tversky loss function with improved Attention U-Net for lesion
      segmentation, 2018, https://arxiv.org/abs/1810.07842 (there alpha prices false negatives)
    """
    if gamma < 1:
        raise ValueError(f"gamma must be at least 1, got {gamma}.")
    distance = tversky_distance(
        logits, labels, alpha=alpha, beta=beta, activation=activation, voxel_mask=voxel_mask
    )
    return jnp.mean(fractional_power(distance, 1 / gamma), axis=-1)


def tversky_distance(
    logits: jax.Array,
    labels: jax.Array,
    *,
    alpha: float,
    beta: float,
    activation: Activation,
    voxel_mask: jax.Array | None,
) -> jax.Array:
    """One minus the Tversky index of each channel; see `tversky_loss`.

    Args:
      logits: ``[B, X, Y, Z, K]`` or ``[B, X, Y, K]``.
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``.
      alpha: Price of a false positive.
      beta: Price of a false negative.
      activation: Of the channels.
      voxel_mask: Voxels that count, or None.

    Returns:
      ``[B, K]`` in [0, 1].

    Raises:
      ValueError: If a shape or the activation is not as stated.
    """
    true_positive, false_positive, false_negative = _soft_counts(
        logits, labels, activation, voxel_mask
    )
    error = alpha * false_positive + beta * false_negative
    return error / (true_positive + error + _SMOOTHING)


def fractional_power(base: jax.Array, exponent: float) -> jax.Array:
    """A power below 1, with a slope that is finite at 0.

    Args:
      base: Not negative.
      exponent: Above 0 and at most 1.

    Returns:
      The power; below a base of 1e-6, the straight line from 0 to the power of 1e-6.
    """
    is_small = base < _SMALLEST_BASE
    # The power is computed away from 0 in either case: its gradient there is not finite.
    power = jnp.where(is_small, 1.0, base) ** exponent
    return jnp.where(is_small, base * _SMALLEST_BASE ** (exponent - 1), power)


def _error_and_size(
    logits: jax.Array,
    labels: jax.Array,
    exponent: int,
    activation: Activation,
    voxel_mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Sums of |p - t|^q and of p^q + t, ``[B, K]``."""
    if exponent not in (1, 2):
        raise ValueError(f"exponent must be 1 or 2, got {exponent}.")
    logits, target = logits_and_target(logits, labels, activation=activation)
    error = jax.nn.sigmoid(jnp.where(target, -logits, logits))
    size = jax.nn.sigmoid(logits)
    if exponent == 2:
        error, size = jnp.square(error), jnp.square(size)
    size += target
    return sum_over_voxels(error, voxel_mask), sum_over_voxels(size, voxel_mask)


def _soft_counts(
    logits: jax.Array, labels: jax.Array, activation: Activation, voxel_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of p t, of p (1 - t) and of (1 - p) t, ``[B, K]``."""
    logits, target = logits_and_target(logits, labels, activation=activation)
    probs, complements = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
    return (
        sum_over_voxels(jnp.where(target, probs, 0.0), voxel_mask),
        sum_over_voxels(jnp.where(target, 0.0, probs), voxel_mask),
        sum_over_voxels(jnp.where(target, complements, 0.0), voxel_mask),
    )
