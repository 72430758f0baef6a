"""Distances on the device against scipy's exact transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from afl_jax.distance import distance_to_boundary

compiled = jax.jit(distance_to_boundary)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((7, 8), (1.0, 1.0)), ((9, 8, 7), (1.0, 1.0, 1.0)), ((9, 8, 7), (0.5, 0.7, 3.0))],
)
def test_distances_are_exact(shape, spacing):
    masks = np.random.default_rng(0).random((3, *shape)) < np.array([0.05, 0.5, 0.95]).reshape(
        3, *[1] * len(shape)
    )
    values = compiled(masks, spacing=jnp.tile(jnp.array(spacing), (3, 1)))
    for mask, value in zip(masks, values, strict=True):
        inside, outside = (
            ndimage.distance_transform_edt(x, sampling=spacing) for x in (mask, ~mask)
        )
        np.testing.assert_allclose(value, inside + outside, rtol=1e-6)


@pytest.mark.parametrize("fill", [0, 1])
def test_without_a_boundary_0(fill):
    assert not compiled(jnp.full((1, 4, 4, 4), fill)).any()


def test_voxels_that_do_not_exist_are_neither():
    labels = jnp.array([[[1, 0, 0, 1]]])
    mask = jnp.array([[[True, True, True, False]]])
    np.testing.assert_array_equal(compiled(labels, voxel_mask=mask)[0, 0, :3], [1, 1, 2])
    np.testing.assert_array_equal(compiled(labels)[0, 0], [1, 1, 1, 1])


def test_a_wrong_spacing_is_named():
    with pytest.raises(ValueError, match=r"^spacing must have shape \(1, 3\), a number for each"):
        distance_to_boundary(jnp.zeros((1, 4, 4, 4)), spacing=jnp.ones((1, 2)))
