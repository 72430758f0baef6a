"""The size and smoothness statistics: hand-computed values, an oracle, the authors' numbers."""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from afl_jax.statistics import (
    balancing_alpha,
    focusing_gamma,
    foreground_fraction,
    surface_smoothness,
)

STATISTICS = {
    "foreground_fraction": (foreground_fraction, oracles.foreground_fraction),
    "balancing_alpha": (balancing_alpha, oracles.balancing_alpha),
    "surface_smoothness": (surface_smoothness, oracles.surface_smoothness),
    "surface_smoothness_surface": (
        functools.partial(surface_smoothness, region="surface"),
        functools.partial(oracles.surface_smoothness, region="surface"),
    ),
    "focusing_gamma": (focusing_gamma, oracles.focusing_gamma),
    "focusing_gamma_surface_scaled": (
        functools.partial(focusing_gamma, region="surface", scale=2.5),
        functools.partial(oracles.focusing_gamma, region="surface", scale=2.5),
    ),
}
every_statistic = pytest.mark.parametrize("name", STATISTICS)


@jax.jit
def measure(labels: jax.Array, voxel_mask: jax.Array | None = None) -> dict[str, jax.Array]:
    """All of them at once, so that a shape is compiled once."""
    return {name: f(labels, voxel_mask=voxel_mask) for name, (f, _) in STATISTICS.items()}


# A float32 sum of a few thousand gradients that a compiler may order as it likes. Relative and
# without an absolute part, so that a gamma of 0.004 is tested like one of 1, and 0 is 0.
RTOL = 3e-6


def assert_close(actual: dict, expected: dict):
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=RTOL, err_msg=name)


def expected_of(masks: Iterable[np.ndarray]) -> dict[str, list[float]]:
    masks = list(masks)
    return {name: [oracle(mask) for mask in masks] for name, (_, oracle) in STATISTICS.items()}


def random_masks(*shape: int, seed: int = 0, share: float = 0.3) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) < share).astype(np.int32)


def volume_with(shape: tuple[int, ...], *voxels) -> jax.Array:
    """One volume of zeros, ``[1, *shape]``, with ones at the given indices or slices."""
    mask = np.zeros((1, *shape), np.int32)
    for voxel in voxels:
        mask[(0, *voxel)] = 1
    return jnp.asarray(mask)


# --- the authors' numbers -------------------------------------------------------------------


def assert_golden(path):
    golden = dict(np.load(path))
    for index, name in enumerate(golden["names"]):
        shape = golden[f"shape_{name}"]
        mask = np.unpackbits(golden[f"mask_{name}"])[: np.prod(shape)].reshape(1, *shape)
        fore, back = golden["fore"][index], golden["back"][index]
        # The authors' weights divide by the count of each class: NaN where a class is absent.
        alpha = golden["weights"][index, 0] if fore else 1.0
        ours = measure(mask)
        for statistic, theirs, label in [
            ("foreground_fraction", golden["ratio"][index], "ratio"),
            ("balancing_alpha", alpha, "weights[0]"),
            ("balancing_alpha", back / (fore + back), "back / (fore + back)"),
            ("surface_smoothness", golden["smoothness_train_f32"][index], "smoothness, float32"),
            ("surface_smoothness", golden["smoothness_f64"][index], "smoothness, float64"),
            ("focusing_gamma", golden["gamma_train"][index], "gamma, float32"),
            ("focusing_gamma", golden["gamma_f64"][index], "gamma, float64"),
        ]:
            np.testing.assert_allclose(
                ours[statistic],
                [theirs],
                rtol=0,
                atol=min(1e-6, RTOL * theirs),
                err_msg=f"{name}: {label}",
            )


def test_the_authors_numbers():
    assert_golden(GOLDEN / "statistics.npz")


@pytest.mark.real_data
def test_the_authors_numbers_on_real_masks(reference):
    assert_golden(reference / "statistics.npz")


# --- visible arithmetic ---------------------------------------------------------------------

# mask, number of voxels, sum of the gradient magnitudes, number of voxels where it is not 0.
BY_HAND = {
    # Inside, each of the six neighbours sees half a step; the voxel itself is symmetric.
    "single_voxel": (volume_with((5, 6, 7), (2, 3, 3)), 5 * 6 * 7, 6 * 1 / 2, 6),
    # In a corner the voxel itself has a one-sided step of 1 along each of the three axes.
    "corner_voxel": (volume_with((5, 6, 7), (0, 0, 0)), 5 * 6 * 7, 3 * 1 / 2 + math.sqrt(3), 4),
    # One slice of 5 x 6 voxels: half a step in the slice before and in the one after.
    "plate": (volume_with((5, 6, 7), np.s_[:, :, 3]), 5 * 6 * 7, 5 * 6 * 2 * 1 / 2, 5 * 6 * 2),
    # The first slice: a one-sided step of 1 in it, and half a step in the next.
    "plate_at_the_rim": (
        volume_with((5, 6, 7), np.s_[:, :, 0]),
        5 * 6 * 7,
        5 * 6 * (1 + 1 / 2),
        5 * 6 * 2,
    ),
    # Corner of 2 x 3 x 4. X has two slices, so both are one-sided: the voxel and its X neighbour
    # see a full step; the Y and Z neighbours see half a step.
    "tiny": (volume_with((2, 3, 4), (0, 0, 0)), 2 * 3 * 4, math.sqrt(3) + 1 + 1 / 2 + 1 / 2, 4),
    # An axis of length 1 adds nothing: this is a corner in 2D.
    "axis_of_length_1": (volume_with((4, 1, 5), (0, 0, 0)), 4 * 5, math.sqrt(2) + 2 * 1 / 2, 3),
    "only_axes_of_length_1": (volume_with((1, 1, 1), (0, 0, 0)), 1, 0, 0),
    "2d_single": (volume_with((5, 6), (2, 3)), 5 * 6, 4 * 1 / 2, 4),
    "2d_corner": (volume_with((5, 6), (4, 5)), 5 * 6, math.sqrt(2) + 2 * 1 / 2, 3),
    "empty": (volume_with((3, 4, 5)), 3 * 4 * 5, 0, 0),
    "full": (volume_with((3, 4, 5), np.s_[:, :, :]), 3 * 4 * 5, 0, 0),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_smoothness_by_hand(case):
    mask, num_voxels, total, num_surface = BY_HAND[case]
    expected = {
        "surface_smoothness": [total / num_voxels],
        "surface_smoothness_surface": [total / max(num_surface, 1)],
    }
    assert_close(measure(mask), expected)


def test_size_and_balance_by_hand():
    mask = volume_with((5, 6, 7), np.s_[:, :, 0], (4, 5, 6))
    np.testing.assert_allclose(foreground_fraction(mask), [(5 * 6 + 1) / (5 * 6 * 7)], rtol=1e-6)
    np.testing.assert_allclose(balancing_alpha(mask), [(5 * 6 * 6 - 1) / (5 * 6 * 7)], rtol=1e-6)


def test_gamma_is_scale_times_size_plus_smoothness():
    mask = volume_with((5, 6, 7), (2, 3, 3))
    for options, expected in [
        ({}, 1 / 210 + 3 / 210),
        ({"scale": 10.0}, 10 * (1 / 210 + 3 / 210)),
        ({"region": "surface"}, 1 / 210 + 1 / 2),
        ({"region": "surface", "scale": 3.0}, 3 * (1 / 210 + 1 / 2)),
    ]:
        np.testing.assert_allclose(focusing_gamma(mask, **options), [expected], rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4, 5), (7, 1, 3), (3, 3)])
def test_empty_and_full_masks_are_exact(shape):
    # Exact even where a compiler divides by a size such as 60 by multiplying with 1/60.
    values = measure(jnp.stack([jnp.zeros(shape), jnp.ones(shape)]))
    assert {name: value.tolist() for name, value in values.items()} == {
        "foreground_fraction": [0, 1],
        "balancing_alpha": [1, 0],
        "surface_smoothness": [0, 0],
        "surface_smoothness_surface": [0, 0],
        "focusing_gamma": [0, 1],
        "focusing_gamma_surface_scaled": [0, 2.5],
    }


# --- oracle, dtypes, voxel_mask -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 2, 3, 4), (2, 6, 1, 5), (2, 7, 8, 9), (3, 5, 6)])
def test_oracle(shape):
    masks = random_masks(*shape)
    assert_close(measure(masks), expected_of(masks))


@every_statistic
def test_eager_is_jit(name):
    masks = jnp.asarray(random_masks(2, 4, 5, 3))
    eager = STATISTICS[name][0](masks)
    assert (eager.shape, eager.dtype) == ((2,), jnp.float32)
    np.testing.assert_allclose(eager, measure(masks)[name], rtol=1e-6)


@pytest.mark.parametrize(
    "labels",
    [
        *[(3 * random_masks(2, 4, 5, 3)).astype(d) for d in ("int8", "int16", "int32", "uint8")],
        random_masks(2, 4, 5, 3).astype(bool),
        random_masks(2, 4, 5, 3).astype(np.float16),
        random_masks(2, 4, 5, 3) * np.float32(0.25),
        random_masks(2, 4, 5, 3) * 2 - 1,
    ],
    ids=["int8", "int16", "int32", "uint8", "bool", "float16", "a quarter", "minus one"],
)
def test_foreground_is_what_is_positive_in_every_dtype(labels):
    assert_close(measure(labels), expected_of(random_masks(2, 4, 5, 3)))


@every_statistic
def test_no_gradient_flows_to_the_labels(name):
    labels = jnp.asarray(random_masks(2, 4, 5, 3), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: STATISTICS[name][0](x).sum()))(labels)
    np.testing.assert_array_equal(gradient, np.zeros_like(labels))


def test_volumes_do_not_mix():
    masks = random_masks(2, 4, 5, 3)
    masks = np.stack([masks[0], np.zeros_like(masks[0]), masks[1], np.ones_like(masks[0])])
    assert_close(measure(masks), expected_of(masks))


@pytest.mark.parametrize("padding_label", [0, 1])
@pytest.mark.parametrize("mask_dtype", [bool, np.int32, np.float32])
def test_a_padded_volume_under_its_mask_is_the_volume(padding_label, mask_dtype):
    masks = random_masks(2, 4, 5, 3)
    widths = ((0, 0), (0, 3), (2, 1), (1, 0))
    padded = np.pad(masks, widths, constant_values=padding_label)
    inside = np.pad(np.ones(masks.shape, mask_dtype), widths)
    assert_close(measure(padded, inside), measure(masks))


def test_each_volume_has_its_own_voxel_mask():
    masks = random_masks(2, 6, 6, 6)
    inside = np.zeros(masks.shape, bool)
    inside[0, :4, :, 1:] = True
    inside[1, 2:, 1:5] = True
    cropped = [masks[0, :4, :, 1:], masks[1, 2:, 1:5]]
    assert_close(measure(masks, inside), expected_of(cropped))


def test_differences_are_one_sided_at_the_rim_of_a_voxel_mask():
    labels = jnp.array([[0, 1, 0, 0, 1, 1]]).reshape(1, 6, 1)
    inside = jnp.array([[1, 1, 0, 1, 1, 1]]).reshape(1, 6, 1)
    # Voxels 0 and 1: one step of 1 between them, one-sided in both. Voxel 3: one-sided, 1.
    # Voxel 4: (1 - 0) / 2. Voxel 5: 0.
    total = 1 + 1 + 1 + 1 / 2 + 0
    np.testing.assert_allclose(surface_smoothness(labels, voxel_mask=inside), [total / 5])
    surface = surface_smoothness(labels, voxel_mask=inside, region="surface")
    np.testing.assert_allclose(surface, [total / 4])


def test_a_voxel_without_neighbours_and_no_voxel_at_all():
    labels = jnp.ones((2, 3, 3), jnp.int32)
    inside = jnp.zeros((2, 3, 3), bool).at[0, 1, 1].set(True)
    values = measure(labels, inside)
    assert values["foreground_fraction"].tolist() == [1, 0]
    assert values["balancing_alpha"].tolist() == [0, 1]
    assert values["surface_smoothness"].tolist() == [0, 0]
    assert values["surface_smoothness_surface"].tolist() == [0, 0]


# --- errors -----------------------------------------------------------------------------------


@every_statistic
@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4, 4, 2)])
def test_labels_of_another_rank_are_refused(name, shape):
    with pytest.raises(ValueError) as error:
        STATISTICS[name][0](jnp.zeros(shape))
    assert str(error.value) == (f"labels must have shape [B, X, Y, Z] or [B, X, Y], got {shape}.")


@every_statistic
def test_a_voxel_mask_of_another_shape_is_refused(name):
    with pytest.raises(ValueError) as error:
        STATISTICS[name][0](jnp.zeros((2, 4, 5, 3)), voxel_mask=jnp.ones((4, 5, 3)))
    assert str(error.value) == (
        "voxel_mask must have the shape of labels = (2, 4, 5, 3), got (4, 5, 3)."
    )


@pytest.mark.parametrize("function", [surface_smoothness, focusing_gamma])
def test_an_unknown_region_is_refused(function):
    with pytest.raises(ValueError) as error:
        function(jnp.zeros((2, 4, 5, 3)), region="rim")
    assert str(error.value) == "region must be one of ('volume', 'surface'), got 'rim'."


# --- properties -------------------------------------------------------------------------------

# Few shapes, so that little is compiled; the masks are what varies.
SHAPES = [(2, 3, 4), (5, 1, 4), (4, 4, 4), (3, 7)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0, 1),
    data=st.data(),
)
def test_properties(shape, seed, share, data):
    masks = random_masks(1, *shape, seed=seed, share=share)
    values = measure(masks)
    assert_close(values, expected_of(masks))
    fraction, alpha = values["foreground_fraction"].item(), values["balancing_alpha"].item()
    assert 0 <= fraction <= 1
    assert 0 <= alpha <= 1
    assert fraction + alpha == pytest.approx(1, rel=1e-6)
    # A step is at most 1 along each axis, and at least 1/2 where it is not 0.
    volume = values["surface_smoothness"].item()
    surface = values["surface_smoothness_surface"].item()
    assert 0 <= volume <= surface + 1e-6 <= math.sqrt(len(shape)) + 2e-6
    assert surface == 0 or surface >= 0.5 - 1e-6
    # Neither the direction of an axis nor the order of the axes matters.
    order = data.draw(st.permutations(range(1, len(shape) + 1)))
    turned = np.flip(masks.transpose(0, *order), axis=data.draw(st.sampled_from(order)))
    assert_close(measure(turned), values)
    # The surface belongs to both sides; size and balance change places.
    other_side = measure(1 - masks)
    assert_close(
        other_side,
        {
            "surface_smoothness": [volume],
            "surface_smoothness_surface": [surface],
            "foreground_fraction": [alpha],
            "balancing_alpha": [fraction],
        },
    )


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_the_number_of_devices_does_not_matter(num_devices):
    masks = random_masks(4, 4, 5, 3)
    shards = masks.reshape(num_devices, -1, *masks.shape[1:])
    sharded = jax.pmap(measure, devices=jax.devices()[:num_devices])(shards)
    assert_close({name: value.ravel() for name, value in sharded.items()}, measure(masks))
