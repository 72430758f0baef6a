"""The ResNet encoder: an image to a pyramid of features, in 2D or 3D.

He et al., Deep Residual Learning for Image Recognition, 2015, https://arxiv.org/abs/1512.03385;
the stride lies in the 3-wide convolution of a bottleneck, as in torchvision.
"""

from typing import Any

import flax.linen as nn
import jax

from afl_jax.models.blocks import BatchNorm, Conv, Ints, max_pool, run_block

# depth -> (blocks in each of the four stages, whether a block is a bottleneck)
STAGES: dict[int, tuple[Ints, bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}


class BasicBlock(nn.Module):
    """Two 3-wide convolutions around which the input is added.

    Attributes:
      features: Channels of the convolutions and of the output.
      strides: Step of the first convolution along each spatial axis.
      axis_name: Mapped axis of synchronised batch normalisation, or None.
      dtype: Computation dtype.
    """

    features: int
    strides: Ints
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps ``[B, *spatial, C]`` to ``[B, *spatial / strides, features]``."""
        wide = (3,) * len(self.strides)
        y = Conv(self.features, wide, self.strides, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(BatchNorm(self.axis_name, name="bn1")(y, train=train))
        y = Conv(self.features, wide, dtype=self.dtype, name="conv2")(y)
        y = BatchNorm(self.axis_name, name="bn2")(y, train=train)
        return nn.relu(y + _shortcut(self, x, self.features, train=train))


class Bottleneck(nn.Module):
    """A 3-wide convolution between two 1-wide ones, around which the input is added.

    Attributes:
      features: Channels inside; the output has 4 times as many.
      strides: Step of the 3-wide convolution along each spatial axis.
      axis_name: Mapped axis of synchronised batch normalisation, or None.
      dtype: Computation dtype.
    """

    features: int
    strides: Ints
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps ``[B, *spatial, C]`` to ``[B, *spatial / strides, 4 * features]``."""
        narrow, wide = (1,) * len(self.strides), (3,) * len(self.strides)
        y = Conv(self.features, narrow, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(BatchNorm(self.axis_name, name="bn1")(y, train=train))
        y = Conv(self.features, wide, self.strides, dtype=self.dtype, name="conv2")(y)
        y = nn.relu(BatchNorm(self.axis_name, name="bn2")(y, train=train))
        y = Conv(4 * self.features, narrow, dtype=self.dtype, name="conv3")(y)
        y = BatchNorm(self.axis_name, name="bn3")(y, train=train)
        return nn.relu(y + _shortcut(self, x, 4 * self.features, train=train))


def _shortcut(
    block: BasicBlock | Bottleneck, x: jax.Array, features: int, *, train: bool
) -> jax.Array:
    """The input, projected where the block changes its shape; called in the block's scope."""
    if x.shape[-1] == features and max(block.strides) == 1:
        return x
    narrow = (1,) * len(block.strides)
    x = Conv(features, narrow, block.strides, dtype=block.dtype, name="downsample_conv")(x)
    return BatchNorm(block.axis_name, name="downsample_bn")(x, train=train)


class ResNetEncoder(nn.Module):
    """ResNet without its classifier.

    Attributes:
      depth: 18, 34, 50 or 101.
      strides: Five steps along each spatial axis: of the first convolution, of the max-pool, and
        of stages 2, 3 and 4 (stage 1 keeps its resolution).
      width: Channels of the first convolution; stages have width, 2, 4 and 8 times it (and 4
        times that at their ends where blocks are bottlenecks).
      axis_name: Mapped axis of synchronised batch normalisation, or None.
      dtype: Computation dtype.
      gradient_checkpointing: Whether blocks are computed again in the backward pass.
    """

    depth: int
    strides: tuple[Ints, ...]
    width: int = 64
    axis_name: str | None = None
    dtype: Any = None
    gradient_checkpointing: bool = False

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> tuple[jax.Array, ...]:
        """Maps ``[B, *spatial, C]`` to five features, each reduced by one more of the strides."""
        num_blocks, is_bottleneck = STAGES[self.depth]
        block = Bottleneck if is_bottleneck else BasicBlock
        num_axes = len(self.strides[0])
        unit = (1,) * num_axes
        x = Conv(self.width, (7,) * num_axes, self.strides[0], dtype=self.dtype, name="conv1")(
            image
        )
        x = nn.relu(BatchNorm(self.axis_name, name="bn1")(x, train=train))
        features = [x]
        x = max_pool(x, window=(3,) * num_axes, strides=self.strides[1])
        for stage, (count, strides) in enumerate(
            zip(num_blocks, (unit, *self.strides[2:]), strict=True)
        ):
            for i in range(count):
                layer = block(
                    features=self.width * 2**stage,
                    strides=strides if i == 0 else unit,
                    axis_name=self.axis_name,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{i}",
                )
                x = run_block(
                    layer, x, train=train, gradient_checkpointing=self.gradient_checkpointing
                )
            features.append(x)
        return tuple(features)
