"""Irregularity: 0 for a ball of any size on any grid, and more for what is not a ball."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy import integrate, ndimage
from scipy.stats import special_ortho_group

from afl_jax.irregularity import component_sizes, surface_irregularity

SPACINGS = {"isotropic": (1.0, 1.0, 1.0), "thick": (1.0, 1.0, 3.0), "prostate": (0.5, 0.5, 3.0)}
every_spacing = pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
SHAPE = (48, 48, 24)


@functools.cache
def compiled():
    return jax.jit(surface_irregularity)


def irregularity(mask: np.ndarray, spacing: tuple[float, ...]) -> float:
    value = compiled()(mask[None], spacing=jnp.array([spacing]))
    assert value.shape == (1,)
    return float(value[0])


def blob(
    radius_mm: float,
    spacing: tuple[float, ...],
    *,
    seed: int,
    stretch: tuple[float, float, float] = (1.0, 1.0, 1.0),
    roughness: float = 0.0,
) -> np.ndarray:
    """An ellipsoid, turned and placed at random between voxels, with bumps of 0.4 radii."""
    rng = np.random.default_rng(seed)
    centre = (np.array(SHAPE) // 2 + rng.uniform(-0.5, 0.5, 3)) * spacing
    offset_mm = np.moveaxis(np.indices(SHAPE), 0, -1) * spacing - centre
    turned = offset_mm @ special_ortho_group.rvs(3, random_state=seed)
    field = rng.standard_normal(SHAPE)
    field = ndimage.gaussian_filter(field, 0.4 * radius_mm / np.array(spacing), mode="wrap")
    bumps = np.clip((field - field.mean()) / field.std(), -2, 2)
    distance_mm = np.linalg.norm(turned / stretch, axis=-1)
    return distance_mm < radius_mm * (1 + roughness * bumps)


def mean_irregularity(radius_mm: float, spacing: tuple[float, ...], **options) -> float:
    masks = [blob(radius_mm, spacing, seed=seed, **options) for seed in range(8)]
    return float(np.mean([irregularity(mask, spacing) for mask in masks]))


# --- the estimator ------------------------------------------------------------------------------


@every_spacing
@pytest.mark.parametrize("radius_mm", [2.0, 3.0, 4.5, 7.0, 10.0])
def test_a_ball_of_any_size_has_none(radius_mm, spacing):
    # From 11 voxels at 2 mm in thick slices to 4,189 at 10 mm.
    assert mean_irregularity(radius_mm, spacing) < 0.05


@every_spacing
@pytest.mark.parametrize("radius_mm", [3.0, 4.5, 7.0])
def test_an_ellipsoid_has_that_of_its_surface_at_any_size(radius_mm, spacing):
    # Axes 3 : 1 : 1, c = 3^(2/3) and a = 3^(-1/3): the surface of a prolate spheroid over 4 pi.
    a, c = 3 ** (-1 / 3), 3 ** (2 / 3)
    e = math.sqrt(1 - a**2 / c**2)
    exact = (a**2 + a * c * math.asin(e) / e) / 2 - 1
    value = mean_irregularity(radius_mm, spacing, stretch=(c, a, a))
    assert exact == pytest.approx(0.18, abs=0.01)
    assert value == pytest.approx(exact, abs=0.05)


@every_spacing
def test_bumps_count_the_same_at_any_size(spacing):
    """Within the noise of eight masks; and more bumps are more."""
    values = {
        (radius_mm, roughness): mean_irregularity(radius_mm, spacing, roughness=roughness)
        for radius_mm in (4.5, 7.0, 10.0)
        for roughness in (0.0, 0.15, 0.3)
    }
    for radius_mm in (4.5, 7.0, 10.0):
        smooth, bumpy, rough = (values[radius_mm, r] for r in (0.0, 0.15, 0.3))
        assert smooth < bumpy < rough
        assert 0.1 < rough < 0.3


def test_spacing_decides_not_the_grid():
    """A ball in mm is a pancake in voxels."""
    mask = blob(7.0, SPACINGS["thick"], seed=0)
    assert irregularity(mask, SPACINGS["thick"]) < 0.02
    assert irregularity(mask, SPACINGS["isotropic"]) > 0.1


def test_scaling_the_spacing_does_not_matter():
    mask = blob(5.0, SPACINGS["isotropic"], seed=1, roughness=0.3)
    one = irregularity(mask, (1.0, 1.0, 1.0))
    assert irregularity(mask, (0.25, 0.25, 0.25)) == pytest.approx(one, rel=1e-5)


def test_the_number_of_lesions_does_not_matter():
    ball = np.pad(blob(3.0, (1.0, 1.0, 1.0), seed=0)[16:32, 16:32, 4:20], 2)
    large = blob(7.0, (1.0, 1.0, 1.0), seed=0)[12:36, 12:36, 2:22]
    two = np.zeros((48, 24, 20), bool)
    two[:24] = large
    two[26:46, 2:22] = ball
    assert irregularity(two, (1.0, 1.0, 1.0)) < 0.01
    # As one lesion, the same surface and volume would be irregular.
    assert irregularity(large, (1.0, 1.0, 1.0)) < 0.01


@pytest.mark.parametrize("num_voxels", [1, 2, 3])
def test_a_few_voxels_are_nearly_smooth(num_voxels):
    mask = np.zeros((9, 9, 9), bool)
    mask[4, 4, 4 : 4 + num_voxels] = True
    assert irregularity(mask, (1.0, 1.0, 1.0)) < 0.15


def test_a_disc_has_none_and_a_bar_has_its_own():
    rows, columns = np.indices((40, 40))
    disc = np.hypot(rows - 20, columns - 20) < 12
    assert irregularity(disc, (1.0, 1.0)) < 0.02
    bar = (abs(rows - 20) < 3) & (abs(columns - 20) < 15)  # 5 x 29
    exact = 2 * (5 + 29) / (2 * math.sqrt(math.pi * 5 * 29))
    # Four directions see an edge along an axis 5 % too short.
    assert 1 + irregularity(bar, (1.0, 1.0)) == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("num_axes", [2, 3])
@pytest.mark.parametrize("x", [0.1, 0.7, 1.0, 1.8])
def test_the_share_that_is_seen_by_integration(x, num_axes):
    """A chord at r sin(t) from the centre has cos(t) diameters; a step of x sees min(1, c / x)."""

    def seen(t: float) -> float:
        shadow = math.cos(t) if num_axes == 2 else 2 * math.sin(t) * math.cos(t)
        return min(1.0, math.cos(t) / x) * shadow

    kink = [math.acos(x)] if x < 1 else None
    integral, _ = integrate.quad(seen, 0, math.pi / 2, points=kink)
    assert oracles.seen_share(x, num_axes) == pytest.approx(integral, rel=1e-8)


# --- the function -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((5, 6), (1.0, 1.0)),
        ((5, 6), (0.5, 2.0)),
        ((6, 5, 4), (1.0, 1.0, 1.0)),
        ((6, 5, 4), (0.5, 0.7, 3.0)),
    ],
)
def test_value_is_the_oracle(shape, spacing):
    masks = np.random.default_rng(0).random((4, *shape)) < np.array([0.1, 0.3, 0.5, 0.9]).reshape(
        4, *[1] * len(shape)
    )
    values = compiled()(masks, spacing=jnp.tile(jnp.array(spacing), (4, 1)))
    expected = [oracles.surface_irregularity(mask, spacing=spacing) for mask in masks]
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


def test_without_foreground_0_and_finite_when_full():
    for fill in (0, 1):
        value = compiled()(np.full((1, 6, 6, 6), fill), spacing=jnp.ones((1, 3)))
        assert np.isfinite(value).all()
    assert not compiled()(np.zeros((1, 6, 6, 6), int), spacing=jnp.ones((1, 3))).any()


def test_without_spacing_it_is_1():
    mask = blob(5.0, (1.0, 1.0, 1.0), seed=1, roughness=0.3)
    expected = irregularity(mask, (1.0, 1.0, 1.0))
    assert float(surface_irregularity(jnp.asarray(mask)[None])[0]) == pytest.approx(expected)


def test_a_padded_volume_under_its_mask_is_the_volume():
    mask = blob(5.0, (1.0, 1.0, 1.0), seed=1, roughness=0.3)
    padded = np.pad(mask, 4, constant_values=True)
    inside = np.pad(np.ones(mask.shape, bool), 4)
    value = surface_irregularity(jnp.asarray(padded)[None], voxel_mask=jnp.asarray(inside)[None])
    assert float(value[0]) == pytest.approx(irregularity(mask, (1.0, 1.0, 1.0)), rel=1e-6)


@pytest.mark.parametrize("shape", [(9, 10, 11), (15, 16)])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.4, 1.0])
def test_components_are_those_of_scipy(shape, density):
    mask = np.random.default_rng(3).random(shape) < density
    sizes = np.asarray(jax.jit(component_sizes)(mask))
    components, _ = ndimage.label(mask, np.ones((3,) * len(shape)))
    expected = np.bincount(components.ravel())[1:]
    np.testing.assert_array_equal(np.sort(sizes[sizes > 0]), np.sort(expected))


def test_a_winding_lesion_is_one():
    spiral = np.zeros((21, 21), bool)
    for ring in range(0, 10, 2):
        spiral[ring, ring : 21 - ring] = spiral[ring : 21 - ring, 20 - ring] = True
        spiral[20 - ring, ring : 21 - ring] = True
        spiral[ring + 2 : 21 - ring, ring] = True
        spiral[ring + 2, ring : ring + 3] = True
    sizes = np.asarray(component_sizes(jnp.asarray(spiral)))
    assert sizes[sizes > 0].tolist() == [spiral.sum()]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (jnp.zeros((4, 4)), {}, "labels must have shape [B, X, Y, Z] or [B, X, Y], got (4, 4)."),
        (
            jnp.zeros((2, 4, 4)),
            {"spacing": jnp.ones(3)},
            "spacing must have shape (2, 2), a number for each volume and axis, got (3,).",
        ),
        (
            jnp.zeros((2, 4, 4)),
            {"voxel_mask": jnp.ones((4, 4))},
            "voxel_mask must have the shape of labels = (2, 4, 4), got (4, 4).",
        ),
    ],
    ids=["rank", "spacing", "voxel_mask"],
)
def test_a_wrong_shape_is_named(labels, options, message):
    with pytest.raises(ValueError) as error:
        surface_irregularity(labels, **options)
    assert str(error.value) == message
