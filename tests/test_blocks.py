import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from afl_jax.models import blocks


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def native_conv(x, kernel, *, strides):
    spatial = "XYZ"[: x.ndim - 2]
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        [(taps // 2, taps // 2) for taps in kernel.shape[:-2]],
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )


def assert_same_function(ours, theirs, *args):
    """Equal values, and equal gradients of their product with a fixed random array."""
    cotangent = random(9, *jax.eval_shape(theirs, *args).shape)
    differentiable = tuple(i for i, arg in enumerate(args) if arg is not None)

    def value_and_gradients(fn):
        loss = lambda *args: jnp.sum(fn(*args) * cotangent)  # noqa: E731
        return jax.jit(lambda *args: (fn(*args), jax.grad(loss, differentiable)(*args)))(*args)

    for got, want in zip(
        jax.tree.leaves(value_and_gradients(ours)),
        jax.tree.leaves(value_and_gradients(theirs)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.abs(want).max())


# spatial, taps, strides, input channels, output channels
CONVOLUTIONS = {
    "3-wide": ((5, 6, 7), (3, 3, 3), (1, 1, 1), 2, 3),
    "many channels": ((4, 5, 3), (3, 3, 3), (1, 1, 1), 25, 9),
    "stride 2": ((7, 8, 9), (3, 3, 3), (2, 2, 2), 3, 4),
    "thin strides": ((6, 7, 9), (3, 3, 3), (1, 2, 3), 3, 4),
    "strides that skip voxels": ((10, 8, 7), (3, 3, 3), (4, 2, 1), 3, 4),
    "first layer": ((9, 8, 7), (7, 7, 7), (2, 2, 2), 2, 3),
    "pointwise": ((3, 4, 5), (1, 1, 1), (1, 1, 1), 3, 4),
    "pointwise strided": ((5, 4, 7), (1, 1, 1), (2, 2, 3), 3, 4),
    "few channels to many": ((5, 4, 6), (3, 3, 3), (1, 1, 1), 2, 16),
    "few channels to many, strided": ((6, 4, 7), (3, 3, 3), (1, 2, 2), 1, 16),
    "2D 3-wide": ((5, 8), (3, 3), (1, 1), 2, 3),
    "2D stride 2": ((7, 8), (3, 3), (2, 2), 3, 4),
    "2D first layer": ((11, 8), (7, 7), (2, 2), 3, 4),
    "2D pointwise strided": ((5, 4), (1, 1), (2, 1), 3, 4),
}


@pytest.mark.parametrize(
    ("name", "max_im2col_voxels", "avoid_ynnpack", "max_offset_channels"),
    [(name, 0, True, 0) for name in CONVOLUTIONS]
    + [(name, 0, False, 10**9) for name in CONVOLUTIONS]
    # 343 taps take long to compile one by one.
    + [(name, 10**9, False, 0) for name in CONVOLUTIONS if name != "first layer"],
)
def test_a_convolution_is_the_native_one(
    x64, monkeypatch, name, max_im2col_voxels, avoid_ynnpack, max_offset_channels
):
    monkeypatch.setattr(blocks, "_MAX_IM2COL_VOXELS", max_im2col_voxels)
    monkeypatch.setattr(blocks, "_AVOID_YNNPACK", avoid_ynnpack)
    monkeypatch.setattr(blocks, "_MAX_OFFSET_CHANNELS", max_offset_channels)
    spatial, taps, strides, c_in, c_out = CONVOLUTIONS[name]
    assert_same_function(
        lambda x, kernel: blocks.conv(x, kernel, strides=strides),
        lambda x, kernel: native_conv(x, kernel, strides=strides),
        random(0, 2, *spatial, c_in),
        random(1, *taps, c_in, c_out),
    )


# A slice of the volume below takes about 4 kB gathered, a voxel about 0.2 kB: parts of two slices,
# of six, or of some hundred voxels, of 420.
@pytest.mark.parametrize(
    "formulation",
    [
        {"_MAX_OFFSET_CHANNELS": 0, "_SLAB_BYTES": 8640},
        {"_MAX_OFFSET_CHANNELS": 6, "_SLAB_BYTES": 21600},
    ],
    ids=["slabs", "offsets"],
)
@pytest.mark.parametrize("channels", [(2, 3), (3, 2)])
@pytest.mark.parametrize("padding", [((1, 1),) * 3, ((0, 2), (2, 1), (1, 0))])
def test_a_kernel_gradient_summed_over_parts_is_the_native_one(
    x64, monkeypatch, formulation, channels, padding
):
    for name, value in formulation.items():
        monkeypatch.setattr(blocks, name, value)
    x, kernel = random(0, 2, 6, 5, 4, channels[0]), random(1, 3, 3, 3, *channels)
    conv = lambda x, kernel: blocks._conv_unit(x, kernel, padding)  # noqa: E731
    native = lambda x, kernel: blocks._conv_native(  # noqa: E731
        x, kernel, strides=(1, 1, 1), padding=padding
    )
    of_one_volume = jax.grad(lambda kernel: conv(x[:1], kernel).sum())
    assert " scan[" in str(jax.make_jaxpr(of_one_volume)(kernel)), "there is only one part"
    assert_same_function(conv, native, x, kernel)


@pytest.mark.parametrize("has_skip", [True, False], ids=["skip", "no skip"])
@pytest.mark.parametrize("scale", [(2, 2, 2), (1, 2, 3), (4, 2, 1), (1, 1, 1), (2, 2), (3, 1)])
def test_upsample_concat_conv_is_what_its_name_says(x64, scale, has_skip):
    size = (3, 2, 4)[: len(scale)]
    fine = [n * s for n, s in zip(size, scale, strict=True)]
    skip = random(1, 2, *fine, 2) if has_skip else None

    def written_out(x, skip, kernel):
        for axis, factor in enumerate(scale, start=1):
            x = jnp.repeat(x, factor, axis)
        x = x if skip is None else jnp.concatenate([x, skip], axis=-1)
        return native_conv(x, kernel, strides=(1,) * len(scale))

    assert_same_function(
        lambda x, skip, kernel: blocks.upsample_concat_conv(x, skip, kernel, scale=scale),
        written_out,
        random(0, 2, *size, 3),
        skip,
        random(2, *(3,) * len(scale), 5 if has_skip else 3, 4),
    )


def test_upsample_concat_conv_with_a_large_kernel_is_the_same(x64, monkeypatch):
    x, skip = random(0, 1, 3, 2, 4, 3), random(1, 1, 6, 4, 4, 2)
    kernel = random(2, 3, 3, 3, 5, 4)
    by_phases = blocks.upsample_concat_conv(x, skip, kernel, scale=(2, 2, 1))
    monkeypatch.setattr(blocks, "_MAX_PHASE_KERNEL", 0)
    whole = blocks.upsample_concat_conv(x, skip, kernel, scale=(2, 2, 1))
    np.testing.assert_allclose(whole, by_phases, rtol=0, atol=1e-12)


def test_max_pool_pads_with_minus_infinity_and_may_skip_voxels():
    x = -np.abs(np.asarray(random(0, 2, 9, 5, 4, 3), np.float32)) - 1
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (1, 1), (0, 0)], constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3), axis=(1, 2, 3))
    expected = windows.max(axis=(-3, -2, -1))[:, ::4, ::2, ::1]
    pooled = blocks.max_pool(jnp.asarray(x), window=(3, 3, 3), strides=(4, 2, 1))
    np.testing.assert_array_equal(pooled, expected)


def test_max_pool_sends_its_gradient_to_the_maximum(x64):
    window, strides, padding = (3, 3, 3), (2, 2, 1), ((1, 1),) * 3
    assert_same_function(
        lambda x: blocks.max_pool(x, window=window, strides=strides),
        lambda x: nn.max_pool(x, window, strides, padding),
        random(0, 2, 9, 5, 4, 3),
    )


def batch_norm(x, *, train: bool, **variables):
    norm = blocks.BatchNorm()
    initial = norm.init(jax.random.key(0), x, train=True)
    return norm.apply({**initial, **variables}, x, train=train, mutable=["batch_stats"])


def test_batch_norm_in_training_follows_pytorch(x64):
    x = np.asarray(3 + 2 * random(0, 2, 2, 3, 2))  # n = 12 voxels a channel
    scale, bias = np.array([1.5, 0.5]), np.array([0.1, -0.2])
    old_mean, old_var = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    y, updated = batch_norm(
        x,
        train=True,
        params={"scale": scale, "bias": bias},
        batch_stats={"mean": old_mean, "var": old_var},
    )
    flat = x.reshape(12, 2)
    mean, var = flat.mean(0), flat.var(0)
    expected = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
    running = updated["batch_stats"]
    np.testing.assert_allclose(running["mean"], 0.9 * old_mean + 0.1 * mean, rtol=1e-12)
    # Normalised with the biased variance, remembered with the unbiased one: n / (n - 1).
    np.testing.assert_allclose(running["var"], 0.9 * old_var + 0.1 * var * 12 / 11, rtol=1e-12)


def test_batch_norm_in_evaluation_uses_the_running_statistics_and_keeps_them(x64):
    x = np.asarray(random(0, 1, 3, 2, 2))
    mean, var = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    y, updated = batch_norm(x, train=False, batch_stats={"mean": mean, "var": var})
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(updated["batch_stats"]["mean"], mean)
    np.testing.assert_array_equal(updated["batch_stats"]["var"], var)


def test_batch_norm_of_bfloat16_keeps_float32_statistics():
    x = (10 + random(0, 2, 16, 16, 16, 1)).astype(jnp.bfloat16)
    y, updated = batch_norm(x, train=True)
    running = updated["batch_stats"]
    exact = np.asarray(x, np.float64)
    assert y.dtype == jnp.bfloat16
    assert running["mean"].dtype == running["var"].dtype == jnp.float32
    np.testing.assert_allclose(running["mean"], [0.1 * exact.mean()], rtol=1e-5)
    np.testing.assert_allclose(running["var"], [0.9 + 0.1 * exact.var(ddof=1)], rtol=1e-5)


def test_batch_norm_of_a_single_value_is_finite():
    y, updated = batch_norm(jnp.full((1, 1, 1, 2), 5.0), train=True)
    np.testing.assert_array_equal(y, np.zeros((1, 1, 1, 2)))
    np.testing.assert_allclose(updated["batch_stats"]["var"], [0.9, 0.9], rtol=1e-6)


def test_kernels_start_with_the_variance_of_he():
    kernel = blocks.Conv(64, (3, 3, 3)).init(jax.random.key(0), jnp.zeros((1, 3, 3, 3, 16)))
    kernel = np.asarray(kernel["params"]["kernel"], np.float64)
    expected = 2 / (27 * 64)
    # The variance of n normal numbers has a relative standard deviation of sqrt(2 / n): 5 of them.
    assert abs(kernel.var() / expected - 1) < 5 * np.sqrt(2 / kernel.size)
    assert abs(kernel.mean()) < 5 * np.sqrt(expected / kernel.size)


def test_bfloat16_stays_bfloat16():
    x = jax.ShapeDtypeStruct((1, 4, 4, 4, 3), jnp.bfloat16)
    skip = jax.ShapeDtypeStruct((1, 8, 8, 4, 2), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 3, 4), jnp.bfloat16)
    wide_kernel = jax.ShapeDtypeStruct((3, 3, 3, 5, 4), jnp.bfloat16)
    same = jax.eval_shape(lambda *args: blocks.conv(*args, strides=(1, 1, 1)), x, kernel)
    assert same.dtype == jnp.bfloat16
    up = jax.eval_shape(
        lambda *args: blocks.upsample_concat_conv(*args, scale=(2, 2, 1)), x, skip, wide_kernel
    )
    assert up.dtype == jnp.bfloat16
