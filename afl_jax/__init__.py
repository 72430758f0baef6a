"""Adaptive Focal Loss (A-FL) and what segments small, irregular lesions with it, in JAX."""

from afl_jax.irregularity import surface_irregularity
from afl_jax.losses import LOSSES, adaptive_focal_loss, focal_loss, irregularity_focal_loss
from afl_jax.models.zoo import MODELS, create_model
from afl_jax.statistics import (
    balancing_alpha,
    focusing_gamma,
    foreground_fraction,
    surface_smoothness,
)

__all__ = [
    "LOSSES",
    "MODELS",
    "adaptive_focal_loss",
    "balancing_alpha",
    "create_model",
    "focal_loss",
    "focusing_gamma",
    "foreground_fraction",
    "irregularity_focal_loss",
    "surface_irregularity",
    "surface_smoothness",
]
