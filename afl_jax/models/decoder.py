"""The U-Net decoder: a pyramid of features back to the image's grid.

Ronneberger et al., U-Net, 2015, https://arxiv.org/abs/1505.04597; nearest upsampling and two
convolutions a level, as in segmentation-models-pytorch.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from afl_jax.models.blocks import BatchNorm, Conv, Ints, UpsampleConcatConv, run_block


class DecoderBlock(nn.Module):
    """Upsamples, joins the skip connection, and convolves twice.

    Attributes:
      features: Output channels.
      scale: Upsampling factor along each spatial axis.
      axis_name: Mapped axis of synchronised batch normalisation, or None.
      dtype: Computation dtype.
    """

    features: int
    scale: Ints
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array | None, *, train: bool) -> jax.Array:
        """Maps ``[B, *spatial, C]`` to ``[B, *spatial * scale, features]``."""
        x = UpsampleConcatConv(self.features, self.scale, dtype=self.dtype, name="conv1")(x, skip)
        x = nn.relu(BatchNorm(self.axis_name, name="bn1")(x, train=train))
        x = Conv(self.features, (3,) * len(self.scale), dtype=self.dtype, name="conv2")(x)
        return nn.relu(BatchNorm(self.axis_name, name="bn2")(x, train=train))


class UNetDecoder(nn.Module):
    """Decoder blocks from the deepest feature up; the last one has no skip connection.

    Attributes:
      features: Channels of each block, from the deepest up.
      strides: The encoder's; a block undoes one of them.
      axis_name: Mapped axis of synchronised batch normalisation, or None.
      dtype: Computation dtype.
      gradient_checkpointing: Whether blocks are computed again in the backward pass.
    """

    features: Ints
    strides: tuple[Ints, ...]
    axis_name: str | None = None
    dtype: Any = None
    gradient_checkpointing: bool = False

    @nn.compact
    def __call__(self, pyramid: Sequence[jax.Array], *, train: bool = False) -> jax.Array:
        """Maps the encoder's features to ``[B, *spatial, features[-1]]`` on the image's grid."""
        *skips, x = pyramid
        levels = zip(self.features, self.strides[::-1], [*skips[::-1], None], strict=True)
        for i, (features, scale, skip) in enumerate(levels):
            block = DecoderBlock(features, scale, self.axis_name, self.dtype, name=f"block{i}")
            x = run_block(
                block, x, skip, train=train, gradient_checkpointing=self.gradient_checkpointing
            )
        return x
