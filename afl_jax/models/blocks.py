"""Layers of the networks, for 2D and 3D alike; the only file that knows how one is computed.

Every function works on ``[B, *spatial, C]`` with kernels ``[*taps, C_in, C_out]``, where the
number of spatial axes is 2 or 3. Padding is explicit and symmetric, `taps // 2`, as PyTorch has it.

XLA computes a 3D convolution well on GPU and TPU, but on a CPU it has fast code for 2D alone. So
`conv` is chosen when the program is compiled: native elsewhere, and on a CPU rewritten as 2D
convolutions and matrix products of the same value. Which of its two libraries then computes a 2D
convolution, YNNPACK or Eigen, follows from its shape; see `_conv_2d`.
"""

import functools
import itertools
import math
import platform
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Ints = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]

# He initialisation for ReLU networks, fan-out: the variance of a kernel is 2 / (taps * C_out).
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """Convolution with explicit symmetric padding.

    Attributes:
      features: Output channels.
      kernel_size: Taps along each spatial axis, odd.
      strides: Step along each spatial axis; 1 if None.
      use_bias: Whether to add a bias.
      dtype: Computation dtype; that of the image and the kernel if None.
    """

    features: int
    kernel_size: Ints
    strides: Ints | None = None
    use_bias: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[B, *spatial, C]`` to ``[B, *spatial / strides, features]``."""
        kernel = self.param("kernel", he_normal, (*self.kernel_size, x.shape[-1], self.features))
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        )
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        x = conv(x, kernel, strides=self.strides or (1,) * len(self.kernel_size))
        return x if bias is None else x + bias.reshape((1,) * (x.ndim - 1) + (-1,))


class UpsampleConcatConv(nn.Module):
    """3-wide convolution of a nearest-upsampled volume concatenated with a skip connection.

    Attributes:
      features: Output channels.
      scale: Upsampling factor along each spatial axis.
      dtype: Computation dtype; that of the inputs and the kernel if None.
    """

    features: int
    scale: Ints
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array | None) -> jax.Array:
        """Maps ``[B, *spatial, C]`` and ``[B, *spatial * scale, C']`` to the skip's grid."""
        channels = x.shape[-1] + (0 if skip is None else skip.shape[-1])
        shape = (3,) * len(self.scale) + (channels, self.features)
        kernel = self.param("kernel", he_normal, shape)
        x, skip, kernel = nn.dtypes.promote_dtype(x, skip, kernel, dtype=self.dtype)
        return upsample_concat_conv(x, skip, kernel, scale=self.scale)


class BatchNorm(nn.Module):
    """Batch normalisation whose running variance is PyTorch's.

    Statistics are computed in float32 at least. Normalisation uses the biased variance; the
    running average stores the unbiased one, n / (n - 1) times it, as PyTorch does and Flax does
    not: n is a few dozen in the deepest layers.

    Attributes:
      axis_name: Mapped axis over which the statistics are averaged in training, or None.
      momentum: Share of the old running average that is kept (PyTorch's is 1 minus this).
      epsilon: Added to the variance.
    """

    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps ``[B, *spatial, C]`` to the same shape and dtype."""
        features = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_var = self.variable("batch_stats", "var", jnp.ones, features)
        # PyTorch counts, and so do weights that go back to it; nothing here reads it.
        num_batches = self.variable("batch_stats", "num_batches_tracked", jnp.zeros, (), jnp.int32)
        # [N, C]: XLA on a CPU loses digits of a small mean over several axes.
        flat = x.reshape(-1, *features)
        flat = flat.astype(jnp.promote_types(x.dtype, jnp.float32))
        if train:
            mean, mean_square = flat.mean(axis=0), jnp.square(flat).mean(axis=0)
            num_values = flat.shape[0]
            if self.axis_name is not None and not self.is_initializing():
                mean, mean_square = lax.pmean((mean, mean_square), self.axis_name)
                num_values *= lax.axis_size(self.axis_name)
            var = jnp.maximum(mean_square - jnp.square(mean), 0.0)
            if not self.is_initializing():
                unbiased = var * (num_values / max(num_values - 1, 1))
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * unbiased
                # Not `+=`, which would change a NumPy array of the caller's.
                num_batches.value = num_batches.value + 1
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * lax.rsqrt(var + self.epsilon)
        return (flat * factor[None] + (bias - mean * factor)[None]).astype(x.dtype).reshape(x.shape)


def run_block(
    block: nn.Module, *inputs: jax.Array | None, train: bool, gradient_checkpointing: bool
) -> jax.Array:
    """Calls a block of layers, storing all of its activations for the backward pass or none.

    Args:
      block: Called as ``block(*inputs, train=train)``.
      *inputs: What is stored in any case.
      train: As the block takes it.
      gradient_checkpointing: Whether the backward pass computes the block again.

    Returns:
      The output of the block.
    """
    if not gradient_checkpointing:
        return block(*inputs, train=train)
    return nn.remat(lambda block, *inputs: block(*inputs, train=train))(block, *inputs)


def max_pool(x: jax.Array, *, window: Ints, strides: Ints) -> jax.Array:
    """Maximum over a window, padded by half of it on both sides with minus infinity.

    Args:
      x: ``[B, *spatial, C]``.
      window: Voxels along each spatial axis, odd.
      strides: Step along each spatial axis; larger than the window, it skips voxels.

    Returns:
      ``[B, *spatial / strides, C]``.
    """
    padding = tuple((size // 2, size // 2) for size in window)

    def native(x: jax.Array) -> jax.Array:
        return nn.max_pool(x, window, strides, padding)

    def cpu(x: jax.Array) -> jax.Array:
        # Axis by axis, as maxima of slices: the gradient of a pooling window is a scatter, slow
        # on a CPU. Of equal maxima each gets a share of the gradient, not the first all of it:
        # behind a ReLU nearly all are zeros, which have none.
        lowest = jnp.array(-jnp.inf, x.dtype)
        x = lax.pad(x, lowest, [(0, 0, 0), *((n, n, 0) for n, _ in padding), (0, 0, 0)])
        for axis, (size, step) in enumerate(zip(window, strides, strict=True), start=1):
            end = x.shape[axis] - size + 1
            slices = [lax.slice_in_dim(x, i, i + end, step, axis) for i in range(size)]
            x = functools.reduce(jnp.maximum, slices)
        return x

    return lax.platform_dependent(x, cpu=cpu, default=native)


def upsample_nearest(x: jax.Array, *, scale: Ints) -> jax.Array:
    """Repeats every voxel along each spatial axis.

    Args:
      x: ``[B, *spatial, C]``.
      scale: How often, for each spatial axis.

    Returns:
      ``[B, *spatial * scale, C]``.
    """
    for axis, factor in enumerate(scale, start=1):
        x = jnp.repeat(x, factor, axis=axis)
    return x


def conv(x: jax.Array, kernel: jax.Array, *, strides: Ints) -> jax.Array:
    r"""Convolution (cross-correlation) with a zero padding of half the kernel on every side.

    .. math:: y_{v, o} = \sum_{t, c} x_{s v + t - \lfloor k / 2 \rfloor, c} \, w_{t, c, o}

    Args:
      x: ``[B, *spatial, C_in]``.
      kernel: ``[*taps, C_in, C_out]``.
      strides: s, for each spatial axis.

    Returns:
      ``[B, *spatial', C_out]`` with ``spatial' = (spatial + 2 (taps // 2) - taps) // s + 1``.
    """
    padding = tuple((taps // 2, taps // 2) for taps in kernel.shape[:-2])
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_conv_cpu, strides=strides, padding=padding),
        default=functools.partial(_conv_native, strides=strides, padding=padding),
    )


def upsample_concat_conv(
    x: jax.Array, skip: jax.Array | None, kernel: jax.Array, *, scale: Ints
) -> jax.Array:
    """The convolution `conv(concatenate([upsample_nearest(x), skip]), kernel)`.

    Args:
      x: ``[B, *spatial, C]``.
      skip: ``[B, *spatial * scale, C']``, or None.
      kernel: ``[3, ..., C + C', C_out]``.
      scale: Upsampling factor along each spatial axis.

    Returns:
      ``[B, *spatial * scale, C_out]``.
    """

    def native(x, skip, kernel):
        up = upsample_nearest(x, scale=scale)
        up = up if skip is None else jnp.concatenate([up, skip], axis=-1)
        return conv(up, kernel, strides=(1,) * len(scale))

    def cpu(x, skip, kernel):
        # A convolution is linear in its input channels, so the upsampled ones may be convolved
        # apart, at low resolution: 2 taps and `scale` phases an axis in place of 3 taps. Where
        # kernels are larger than volumes, rewriting the kernel costs more than it saves.
        channels = x.shape[-1]
        if channels * kernel.shape[-1] > _MAX_PHASE_KERNEL:
            return native(x, skip, kernel)
        y = _conv_of_upsampled(x, kernel[..., :channels, :], scale=scale)
        if skip is None:
            return y
        return y + conv(skip, kernel[..., channels:, :], strides=(1,) * len(scale))

    return lax.platform_dependent(x, skip, kernel, cpu=cpu, default=native)


def _conv_native(x: jax.Array, kernel: jax.Array, *, strides: Ints, padding: Padding) -> jax.Array:
    spatial = "XYZ"[: x.ndim - 2]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


# ---- On a CPU ---------------------------------------------------------------------------------

# Thresholds between formulations, measured on the layers of the ResNet50 U-Net.
_MAX_IM2COL_VOXELS = 400
_MAX_PHASE_KERNEL = 128 * 64
_SLAB_BYTES = 3 * 2**20
_CHUNK_BYTES = 3 * 2**18
_MAX_OFFSET_CHANNELS = 16 * 16


# On x86, Eigen computes these convolutions in less time than YNNPACK, to which XLA would give them:
# in half of it on a CPU with AVX2, in two thirds on one with AVX-512 (both AMD). On other CPUs
# XLA's own choice is left alone.
_AVOID_YNNPACK = platform.machine().lower() in ("x86_64", "amd64")
# YNNPACK wants more channels than 16 on one side; Eigen's products are blocks of 16 wide.
_MIN_FAST_CHANNELS = 16 if _AVOID_YNNPACK else 24


def _conv_cpu(x: jax.Array, kernel: jax.Array, *, strides: Ints, padding: Padding) -> jax.Array:
    taps = kernel.shape[:-2]
    num_voxels = x.shape[0] * math.prod(
        (size + low + high - k) // s + 1
        for size, k, s, (low, high) in zip(x.shape[1:-1], taps, strides, padding, strict=True)
    )
    if math.prod(taps) == 1 or num_voxels <= _MAX_IM2COL_VOXELS:
        return _conv_im2col(x, kernel, strides=strides, padding=padding)
    if math.prod(strides) > 1:
        x, kernel, padding = _strides_to_channels(x, kernel, strides=strides, padding=padding)
    if x.ndim == 4:
        return _conv_unit(x[:, None], kernel[None], ((0, 0), *padding))[:, 0]
    return _conv_unit(x, kernel, padding)


def _conv_im2col(x: jax.Array, kernel: jax.Array, *, strides: Ints, padding: Padding) -> jax.Array:
    """One matrix product with the taps gathered: any stride, and no transposed kernel."""
    taps = kernel.shape[:-2]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    # From the last axis to the first, so that the channels end in the order of the kernel.
    for axis, (k, s) in reversed([*enumerate(zip(taps, strides, strict=True), start=1)]):
        end = x.shape[axis] - k + 1
        shifted = [lax.slice_in_dim(x, t, t + end, s, axis) for t in range(k)]
        x = shifted[0] if k == 1 else jnp.concatenate(shifted, axis=-1)
    return x @ kernel.reshape(-1, kernel.shape[-1])


def _strides_to_channels(
    x: jax.Array, kernel: jax.Array, *, strides: Ints, padding: Padding
) -> tuple[jax.Array, jax.Array, Padding]:
    """A strided convolution as one of stride 1 over blocks of voxels: space to depth."""
    spatial, taps = x.shape[1:-1], kernel.shape[:-2]
    blocks = [-(-k // s) for k, s in zip(taps, strides, strict=True)]
    sizes = [
        (n + low + high - k) // s + 1
        for n, k, s, (low, high) in zip(spatial, taps, strides, padding, strict=True)
    ]
    # The last output block ends at voxel (size - 1 + blocks) * stride of the padded input, which
    # may lie before the end of the input (a stride that skips voxels) or behind it.
    ends = [(n + b - 1) * s for n, b, s in zip(sizes, blocks, strides, strict=True)]
    pad_input = [
        (low, end - low - n, 0) for n, (low, _), end in zip(spatial, padding, ends, strict=True)
    ]
    pad_kernel = [(0, b * s - k, 0) for b, s, k in zip(blocks, strides, taps, strict=True)]
    zero = jnp.zeros((), x.dtype)
    x = lax.pad(x, zero, [(0, 0, 0), *pad_input, (0, 0, 0)])
    kernel = lax.pad(kernel, zero, [*pad_kernel, (0, 0, 0), (0, 0, 0)])
    kernel = _space_to_depth(kernel[None], strides)[0]
    kernel = kernel.reshape(*blocks, -1, kernel.shape[-1])
    x = _space_to_depth(x[..., None], strides)[..., 0]
    x = x.reshape(*x.shape[: 1 + len(strides)], -1)
    return x, kernel, ((0, 0),) * len(strides)


def _space_to_depth(x: jax.Array, block: Ints) -> jax.Array:
    """``[B, *spatial, C, D]`` to ``[B, *spatial / block, *block, C, D]``."""
    split = [(n // b, b) for n, b in zip(x.shape[1:-2], block, strict=True)]
    x = x.reshape(x.shape[0], *itertools.chain(*split), *x.shape[-2:])
    outer = range(1, 2 * len(block), 2)
    inner = range(2, 2 * len(block) + 1, 2)
    return x.transpose(0, *outer, *inner, x.ndim - 2, x.ndim - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_unit(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """3D convolution of stride 1: the first axis joins the batch, its taps the channels.

    The taps join the input channels, by gathering, where these are far fewer. Else they join the
    output channels: the outputs of all taps are shifted against each other and added.
    """
    batch, first, *others = x.shape[:-1]
    k, *taps, c_in, c_out = kernel.shape
    low, high = padding[0]
    size = first + low + high - k + 1
    if k > 1 and 4 * c_in <= c_out and c_out >= _MIN_FAST_CHANNELS:
        x = jnp.pad(x, ((0, 0), (low, high), *((0, 0),) * 3))
        x = jnp.concatenate([x[:, i : i + size] for i in range(k)], axis=-1)
        kernel = jnp.moveaxis(kernel, 0, 2).reshape(*taps, k * c_in, c_out)
        y = _conv_2d(x.reshape(batch * size, *others, k * c_in), kernel, padding[1:])
        return y.reshape(batch, size, *y.shape[1:])
    kernel = jnp.moveaxis(kernel, 0, 3).reshape(*taps, c_in, k * c_out)
    channels = k * c_out
    if max(c_in, channels) < _MIN_FAST_CHANNELS:
        kernel = jnp.pad(kernel, [(0, 0)] * 3 + [(0, _MIN_FAST_CHANNELS - channels)])
    y = _conv_2d(x.reshape(batch * first, *others, c_in), kernel, padding[1:])
    y = y.reshape(batch, first, *y.shape[1:])
    zero = jnp.zeros((), y.dtype)
    rest = [(0, 0, 0)] * 3
    return sum(
        lax.pad(
            y[..., i * c_out : (i + 1) * c_out],
            zero,
            [(0, 0, 0), (low - i, high + i - k + 1, 0), *rest],
        )
        for i in range(k)
    )


def _conv_2d(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """2D convolution of stride 1, by whichever of XLA's two libraries is the faster one here.

    XLA leaves to Eigen a convolution whose output is larger than its unpadded input.
    """
    if _AVOID_YNNPACK:
        axis = int(x.shape[2] > x.shape[1])
        size, taps, (low, high) = x.shape[1 + axis], kernel.shape[axis], padding[axis]
        wanted = size + low + high - taps + 1
        high = max(high, taps - low)
        padding = tuple((low, high) if i == axis else pad for i, pad in enumerate(padding))
        y = _conv_native(x, kernel, strides=(1, 1), padding=padding)
        return lax.slice_in_dim(y, 0, wanted, axis=1 + axis)
    if any(low + high >= k for k, (low, high) in zip(kernel.shape, padding, strict=False)):
        # XLA would merge the padding into the convolution. The barrier keeps them apart.
        x = lax.optimization_barrier(jnp.pad(x, ((0, 0), *padding, (0, 0))))
        padding = ((0, 0),) * 2
    return _conv_native(x, kernel, strides=(1, 1), padding=padding)


def _conv_unit_forward(x, kernel, padding):
    return _conv_unit(x, kernel, padding), (x, kernel)


def _conv_unit_backward(padding, residuals, dy):
    x, kernel = residuals
    taps = kernel.shape[:3]
    transposed = jnp.flip(kernel, (0, 1, 2)).swapaxes(-1, -2)
    opposite = tuple(
        (k - 1 - low, k - 1 - high) for k, (low, high) in zip(taps, padding, strict=True)
    )
    dx = _conv_unit(dy, transposed, opposite)
    few_channels = kernel.shape[-1] * kernel.shape[-2] <= _MAX_OFFSET_CHANNELS
    kernel_gradient = _kernel_gradient_by_offsets if few_channels else _kernel_gradient_by_slabs
    return dx, kernel_gradient(x, dy, taps=taps, padding=padding)


_conv_unit.defvjp(_conv_unit_forward, _conv_unit_backward)


def _kernel_gradient_by_slabs(
    x: jax.Array, dy: jax.Array, *, taps: Ints, padding: Padding
) -> jax.Array:
    """Gradient of `_conv_unit` to its kernel: products of x and dy, summed slab by slab.

    The taps of the last axis are gathered on x and those of the first on dy, a few slices of the
    first axis at a time, so that they stay in the cache; each tap of the middle axis is a product.
    """
    batch, first, *_, c_in = x.shape
    sizes, c_out = dy.shape[1:-1], dy.shape[-1]
    k, middle, last = taps
    low = padding[0][0]
    x = jnp.pad(x, ((0, 0), (0, 0), *padding[1:], (0, 0)))
    # Slice i of x meets, under tap t, slice i + low - t of dy: slice i + k - 1 - t once padded.
    zero = jnp.zeros((), dy.dtype)
    rest = [(0, 0, 0)] * 3
    dy = lax.pad(dy, zero, [(0, 0, 0), (k - 1 - low, first + low - sizes[0], 0), *rest])

    slice_voxels = sizes[1] * sizes[2]
    slice_bytes = x.dtype.itemsize * slice_voxels * (last * c_in + k * c_out)
    depth = _largest_divisor(first, _SLAB_BYTES // slice_bytes)
    # Whole samples together, where they are small.
    samples = 1 if depth < first else _largest_divisor(batch, _SLAB_BYTES // (first * slice_bytes))
    slabs = first // depth
    num_voxels = samples * depth * slice_voxels

    def add_slab(n: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        columns, shifted, total = carry
        sample, start = n // slabs * samples, n % slabs * depth
        columns = _gather(columns, x, [(sample, start, 0, j, 0) for j in range(last)])
        starts = [(sample, start + k - 1 - t, 0, 0, 0) for t in range(k)]
        shifted = _gather(shifted, dy, starts)
        flat = shifted.reshape(num_voxels, -1)
        middles = [columns[:, :, i : i + sizes[1]].reshape(num_voxels, -1) for i in range(middle)]
        # Eigen wants the narrower factor on the left.
        if c_in < c_out:
            products = [_product_over_voxels(columns, flat) for columns in middles]
        else:
            products = [_product_over_voxels(flat, columns) for columns in middles]
        return columns, shifted, total + jnp.stack(products)

    factors = (last * c_in, k * c_out) if c_in < c_out else (k * c_out, last * c_in)
    init = (
        jnp.zeros((samples, depth, x.shape[2], sizes[2], last * c_in), x.dtype),
        jnp.zeros((samples, depth, *sizes[1:], k * c_out), dy.dtype),
        jnp.zeros((middle, *factors), x.dtype),
    )
    *_, total = lax.fori_loop(0, batch // samples * slabs, add_slab, init)
    if c_in < c_out:
        return total.reshape(middle, last, c_in, k, c_out).transpose(3, 0, 1, 2, 4)
    return total.reshape(middle, k, c_out, last, c_in).transpose(1, 0, 3, 4, 2)


def _kernel_gradient_by_offsets(
    x: jax.Array, dy: jax.Array, *, taps: Ints, padding: Padding
) -> jax.Array:
    """`_kernel_gradient_by_slabs` for few channels, where one product of all taps is still narrow.

    With x and dy on one grid, a tap is an offset between their voxels' numbers. The grid holds one
    margin an axis: behind the end of a row lies the start of the next. A chunk gathers the taps of
    the last axis on x, those of the first on dy, and those between on the one that then has fewer
    channels, so that a single product has them all.
    """
    c_in, c_out = x.shape[-1], dy.shape[-1]
    k, middle, last = taps
    grid = [n + max(pad) for n, pad in zip(x.shape[1:-1], padding, strict=True)]
    row = grid[2]
    step = grid[1] * row
    firsts, middles, lasts = (
        [tap * stride for tap in range(count)]
        for count, stride in ((k, step), (middle, row), (last, 1))
    )
    between_on_x = last * c_in < k * c_out
    if between_on_x:
        lasts = [i + j for i in middles for j in lasts]
    else:
        firsts = [t + i for t in firsts for i in middles]
    num_voxels = x.shape[0] * math.prod(grid) + firsts[-1]
    voxel_bytes = x.dtype.itemsize * (len(lasts) * c_in + len(firsts) * c_out)
    chunks = -(-num_voxels * voxel_bytes // _CHUNK_BYTES)
    size = -(-num_voxels // chunks)

    def on_grid(a: jax.Array, lows: Ints, *, before: int, behind: int) -> jax.Array:
        zero = jnp.zeros((), a.dtype)
        pads = [(low, n - m - low, 0) for low, m, n in zip(lows, a.shape[1:-1], grid, strict=True)]
        rows = lax.pad(a, zero, [(0, 0, 0), *pads, (0, 0, 0)]).reshape(-1, a.shape[-1])
        return jnp.pad(rows, ((before, chunks * size - rows.shape[0] + behind), (0, 0)))

    x = on_grid(x, tuple(low for low, _ in padding), before=0, behind=lasts[-1])
    dy = on_grid(dy, (0, 0, 0), before=firsts[-1], behind=0)

    def add_chunk(n: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        columns, shifted, total = carry
        columns = _gather(columns, x, [(n * size + tap, 0) for tap in lasts])
        shifted = _gather(shifted, dy, [(n * size + firsts[-1] - tap, 0) for tap in firsts])
        return columns, shifted, total + _product_over_voxels(columns, shifted)

    factors = len(lasts) * c_in, len(firsts) * c_out
    init = tuple(
        jnp.zeros(shape, x.dtype) for shape in ((size, factors[0]), (size, factors[1]), factors)
    )
    *_, total = lax.fori_loop(0, chunks, add_chunk, init)
    if between_on_x:
        return total.reshape(middle, last, c_in, k, c_out).transpose(3, 0, 1, 2, 4)
    return total.reshape(last, c_in, k, middle, c_out).transpose(2, 3, 0, 1, 4)


def _product_over_voxels(a: jax.Array, b: jax.Array) -> jax.Array:
    """``[N, C]`` and ``[N, D]`` to ``[C, D]``."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def _gather(buffer: jax.Array, x: jax.Array, starts: Sequence[tuple[Any, ...]]) -> jax.Array:
    """Blocks of x, side by side along the last axis of a buffer, which a loop carries.

    XLA on a CPU computes a concatenation of few parts element by element, in twice the time of
    these copies.
    """
    width = x.shape[-1]
    for i, start in enumerate(starts):
        block = lax.dynamic_slice(x, start, (*buffer.shape[:-1], width))
        buffer = lax.dynamic_update_slice_in_dim(buffer, block, i * width, axis=-1)
    return buffer


def _largest_divisor(number: int, bound: int) -> int:
    """The largest divisor that is not above a bound; 1 at least."""
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= max(bound, 1))


def _conv_of_upsampled(x: jax.Array, kernel: jax.Array, *, scale: Ints) -> jax.Array:
    """`conv(upsample_nearest(x), kernel)` for 3 taps an axis, computed at low resolution.

    Along an axis, the `scale` output voxels that end at voxel `scale * i` read none but voxels
    i - 1 and i: a kernel of 2 taps for each of these phases, whose weights are sums of the 3.
    """
    num_axes = len(scale)
    for axis, factor in enumerate(scale):
        kernel = jnp.tensordot(_phase_weights(factor), kernel, axes=(2, axis))
        # [phase, low tap, ...] -> the low tap back in place, the phase in front of C_out.
        kernel = jnp.moveaxis(kernel, (0, 1), (-2, axis))
    phases, c_out = kernel.shape[-1 - num_axes : -1], kernel.shape[-1]
    kernel = kernel.reshape(*kernel.shape[: num_axes + 1], -1).astype(x.dtype)
    unit = (1,) * num_axes
    y = _conv_cpu(x, kernel, strides=unit, padding=((1, 1),) * num_axes)
    blocks = y.shape[1:-1]
    y = y.reshape(*y.shape[:-1], *phases, c_out)
    order = itertools.chain(*((axis, axis + num_axes) for axis in range(1, 1 + num_axes)))
    y = y.transpose(0, *order, y.ndim - 1)
    y = y.reshape(x.shape[0], *(n * s for n, s in zip(blocks, scale, strict=True)), c_out)
    # Block i holds the voxels scale * (i - 1) + 1 to scale * i.
    starts = (0, *(s - 1 for s in scale), 0)
    ends = (n * s + s - 1 for n, s in zip(x.shape[1:-1], scale, strict=True))
    return lax.slice(y, starts, (x.shape[0], *ends, c_out))


def _phase_weights(scale: int) -> np.ndarray:
    """``[phase, low tap, tap]``: which of the 3 taps fall on which low-resolution voxel."""
    if scale == 1:
        return np.eye(3, dtype=np.float32)[None]
    weights = np.zeros((scale, 2, 3), np.float32)
    for phase, tap in itertools.product(range(scale), range(3)):
        # Voxels of the upsampled volume, numbered from the first of the earlier low-resolution one:
        # the phases are the voxels 1 to `scale`, their taps one to either side.
        weights[phase, (phase + tap) // scale, tap] = 1
    return weights
