"""Networks by name."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from afl_jax.models.blocks import Conv, Ints
from afl_jax.models.decoder import UNetDecoder
from afl_jax.models.encoder import ResNetEncoder

# The paper's strides: of the first convolution, the max-pool and stages 2 to 4.
PICAI_STRIDES = ((2, 2, 2), (4, 2, 1), (2, 2, 2), (2, 2, 1), (1, 2, 3))
BRATS_STRIDES = ((2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))


class ResNetUNet(nn.Module):
    """U-Net whose encoder is a ResNet, for 2D and 3D images.

    Attributes:
      num_classes: Output channels, background included.
      strides: Five steps along each spatial axis (see `ResNetEncoder`); their length, 2 or 3, is
        the number of spatial axes.
      depth: Of the ResNet: 18, 34, 50 or 101.
      width: Channels of the encoder's first convolution.
      decoder_features: Channels of the five decoder blocks, from the deepest up.
      axis_name: Mapped axis over which batch normalisation is synchronised in training, or None.
      dtype: Computation dtype, such as bfloat16; parameters and logits are float32 all the same.
      gradient_checkpointing: Whether the blocks of the encoder and the decoder are computed again
        in the backward pass, in place of storing their activations: less memory, more time. On a
        CPU, XLA computes them again early, and its plan needs no less memory.

    References:
      The authors' network: Islam et al., 2024, https://arxiv.org/abs/2407.09828
    """

    num_classes: int
    strides: tuple[Ints, ...] = PICAI_STRIDES
    depth: int = 50
    width: int = 64
    decoder_features: Ints = (256, 128, 64, 32, 16)
    axis_name: str | None = None
    dtype: Any = None
    gradient_checkpointing: bool = False

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """Computes logits.

        Args:
          image: ``[B, *spatial, C]``; the product of the strides divides each spatial size.
          train: Whether batch normalisation uses, and learns from, the statistics of this batch.

        Returns:
          ``[B, *spatial, num_classes]``, in float32 at least.

        Raises:
          ValueError: If the image has another number of axes, or a size that is not divisible.
        """
        check_image_shape(image.shape, strides=self.strides)
        options = {
            "strides": self.strides,
            "axis_name": self.axis_name,
            "dtype": self.dtype,
            "gradient_checkpointing": self.gradient_checkpointing,
        }
        encoder = ResNetEncoder(depth=self.depth, width=self.width, **options, name="encoder")
        decoder = UNetDecoder(features=self.decoder_features, **options, name="decoder")
        x = decoder(encoder(image, train=train), train=train)
        wide = (3,) * len(self.strides[0])
        logits = Conv(self.num_classes, wide, use_bias=True, dtype=self.dtype, name="head")(x)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def check_image_shape(shape: Ints, *, strides: tuple[Ints, ...]) -> None:
    """Raises ValueError, naming the sizes that would do, unless the strides divide the image.

    Args:
      shape: ``[B, *spatial, C]``.
      strides: As the network has them.
    """
    factors = tuple(map(math.prod, zip(*strides, strict=True)))
    spatial = tuple(shape[1:-1])
    if len(spatial) != len(factors):
        axes = ", ".join("XYZ"[: len(factors)])
        raise ValueError(f"image must have shape [B, {axes}, C], got {tuple(shape)}.")
    if any(n == 0 or n % f for n, f in zip(spatial, factors, strict=True)):
        smaller = tuple(max(n // f, 1) * f for n, f in zip(spatial, factors, strict=True))
        larger = tuple(-(-n // f) * f for n, f in zip(spatial, factors, strict=True))
        near = f"{larger}" if smaller == larger else f"{smaller} or {larger}"
        raise ValueError(
            f"the spatial shape of the image must be a multiple of {factors}, the product of the "
            f"strides, got {spatial}: {near} would do."
        )


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18_unet": functools.partial(ResNetUNet, depth=18),
    "resnet34_unet": functools.partial(ResNetUNet, depth=34),
    "resnet50_unet": functools.partial(ResNetUNet, depth=50),
    "resnet101_unet": functools.partial(ResNetUNet, depth=101),
}


def create_model(name: str, **options: Any) -> nn.Module:
    """Builds a network by its name in `MODELS`.

    Args:
      name: One of `MODELS`.
      **options: Attributes of the network, such as ``num_classes`` and ``strides``.

    Returns:
      A Flax module: ``model.init(key, image)`` gives the collections ``params`` and
      ``batch_stats``, ``model.apply(variables, image, train=...)`` the logits.

    Raises:
      ValueError: If the name is unknown.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(MODELS)}.")
    return MODELS[name](**options)
