"""Segmentation losses, to be read by comparison: ``(logits, labels, *, ...) -> [B]``.

Logits are ``[B, X, Y, Z, K]`` and labels ``[B, X, Y, Z]`` (or both without Z); each loss returns
one number a volume, finite and not negative, and leaves the mean over the batch to the caller. They
share four rules:

- K = 1: one sigmoid for the foreground, which is ``labels > 0``.
- K = 2: background and foreground; foreground is ``labels > 0``.
- K >= 3: each class against the rest; a label is the index of its channel.
- With the ``"sigmoid"`` activation every channel is a sigmoid of its own; with ``"softmax"`` the
  channels add up to 1. A loss without the option ``activation`` takes sigmoids. What a network
  says must be read with the activation with which it was trained.

They compute in float32 at least, whatever the dtype of the logits. A loss with the option
``spacing`` measures in mm; it is passed to no other.
"""

from collections.abc import Callable

import jax

from afl_jax.losses.adaptive_focal import adaptive_focal_loss, irregularity_focal_loss
from afl_jax.losses.boundary import boundary_loss
from afl_jax.losses.compound import (
    dice_boundary_loss,
    dice_cross_entropy_loss,
    dice_focal_loss,
    unified_focal_loss,
)
from afl_jax.losses.distribution import cross_entropy_loss, focal_loss, top_k_cross_entropy_loss
from afl_jax.losses.region import (
    dice_loss,
    focal_tversky_loss,
    generalised_dice_loss,
    iou_loss,
    tversky_loss,
)

LOSSES: dict[str, Callable[..., jax.Array]] = {
    "adaptive_focal": adaptive_focal_loss,
    "irregularity_focal": irregularity_focal_loss,
    # The paper's baselines.
    "cross_entropy": cross_entropy_loss,
    "focal": focal_loss,
    "dice": dice_loss,
    "iou": iou_loss,
    "tversky": tversky_loss,
    "dice_cross_entropy": dice_cross_entropy_loss,
    "dice_focal": dice_focal_loss,
    # What else the field uses for small structures.
    "focal_tversky": focal_tversky_loss,
    "unified_focal": unified_focal_loss,
    "generalised_dice": generalised_dice_loss,
    "top_k_cross_entropy": top_k_cross_entropy_loss,
    "boundary": boundary_loss,
    "dice_boundary": dice_boundary_loss,
}
