import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from afl_jax.data import augment

KEYS = jax.random.split(jax.random.key(0), 400)
IMAGE = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 2, 2)), jnp.float32)
LABELS = jnp.arange(24).reshape(4, 3, 2)
MASK = LABELS % 5 > 0
SPACING = jnp.array([0.5, 0.5, 3.0])


def test_a_flip_moves_image_labels_and_mask_together():
    # Labels and mask are functions of the image here, and remain so wherever the voxels go.
    image = jnp.stack([LABELS, MASK], axis=-1).astype(jnp.float32)
    flip = jax.vmap(lambda key: augment.random_flip(key, (image, LABELS, MASK), num_axes=3))
    images, labels, masks = flip(KEYS)
    np.testing.assert_array_equal(images[..., 0], labels)
    np.testing.assert_array_equal(images[..., 1], masks)
    assert len({np.asarray(x).tobytes() for x in labels}) == 2**3


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_each_axis_is_flipped_with_its_probability(probability):
    position = jnp.stack(jnp.meshgrid(*map(jnp.arange, (4, 3, 2)), indexing="ij"), axis=-1)
    (flipped,) = jax.vmap(
        lambda key: augment.random_flip(key, (position,), num_axes=3, probability=probability)
    )(KEYS)
    share = np.mean(np.asarray(flipped)[:, 0, 0, 0] > 0, axis=0)
    # Five standard deviations of a share of 400 draws.
    assert np.all(np.abs(share - probability) <= 5 * np.sqrt(probability * (1 - probability) / 400))


def test_noise_has_its_standard_deviation_and_its_share_of_volumes():
    image = jnp.zeros((8, 8, 8, 1))
    noisy = np.asarray(jax.vmap(lambda key: augment.random_noise(key, image))(KEYS))
    changed = noisy.reshape(400, -1).any(axis=1)
    assert abs(changed.mean() - 0.4) < 5 * np.sqrt(0.4 * 0.6 / 400)
    np.testing.assert_allclose(noisy[changed].std(), 0.1, rtol=0.01)


def test_intensity_is_scaled_and_shifted_within_its_ranges():
    image = jnp.stack([jnp.zeros((2, 2, 2)), jnp.ones((2, 2, 2))], axis=-1)
    out = np.asarray(
        jax.vmap(lambda key: augment.random_intensity(key, image, probability=1.0))(KEYS)
    )
    shift, scale = out[:, 0, 0, 0, 0], out[:, 0, 0, 0, 1] - out[:, 0, 0, 0, 0]
    assert -0.1 <= shift.min() < -0.09 < 0.09 < shift.max() <= 0.1
    assert 0.9 - 1e-6 <= scale.min() < 0.91 < 1.09 < scale.max() <= 1.1 + 1e-6
    # One draw a volume: every voxel of a channel is the same.
    assert np.ptp(out, axis=(1, 2, 3)).max() == 0


def test_all_probabilities_at_zero_change_nothing():
    image, labels, mask = augment.augment(
        KEYS[0],
        IMAGE,
        LABELS,
        MASK,
        SPACING,
        flip_probability=0.0,
        noise_probability=0.0,
        intensity_probability=0.0,
    )
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_array_equal(mask, MASK)


def test_augmentation_is_a_function_of_its_key_and_the_same_under_jit_and_vmap():
    def everything(key, image, labels, mask, spacing):
        return augment.augment(
            key,
            image,
            labels,
            mask,
            spacing,
            patch_shape=(3, 3, 2),
            affine_probability=0.7,
            max_rotation_degrees=20.0,
            max_zoom=0.2,
            gamma_probability=0.5,
        )

    single = [everything(key, IMAGE, LABELS, MASK, SPACING) for key in KEYS[:3]]
    batched = jax.jit(jax.vmap(everything, in_axes=(0, None, None, None, None)))(
        KEYS[:3], IMAGE, LABELS, MASK, SPACING
    )
    for i, arrays in enumerate(single):
        for one, many in zip(arrays, batched, strict=True):
            np.testing.assert_allclose(one, many[i], rtol=1e-6, atol=1e-6)
    assert not np.array_equal(single[0][0], single[1][0])


def starts(labels: jax.Array, keys: jax.Array = KEYS, **options) -> np.ndarray:
    draw = jax.jit(jax.vmap(lambda key: augment.random_crop_start(key, labels, **options)))
    return np.asarray(draw(keys))


def test_a_crop_may_begin_at_every_offset_and_nowhere_else():
    found = starts(jnp.zeros((5, 4, 3), int), patch_shape=(3, 4, 2))
    assert {tuple(start) for start in found.tolist()} == set(
        itertools.product(range(3), range(1), range(2))
    )
    # Five standard deviations of a share of 400 draws.
    shares = np.unique(found[:, 0], return_counts=True)[1] / 400
    assert np.all(np.abs(shares - 1 / 3) < 5 * np.sqrt(2 / 9 / 400))


def test_a_crop_about_foreground_has_each_of_its_voxels_at_the_centre_as_often():
    # Five voxels of foreground, unevenly over the axes, far from the rim.
    voxels = [(4, 4, 4), (4, 4, 5), (4, 5, 4), (4, 6, 4), (5, 4, 4)]
    labels = jnp.zeros((10, 10, 10), int).at[tuple(np.transpose(voxels))].set(2)
    found = starts(labels, patch_shape=(4, 4, 4), foreground_probability=1.0)
    centres, counts = np.unique(found + 2, axis=0, return_counts=True)
    assert sorted(map(tuple, centres.tolist())) == voxels
    assert np.all(np.abs(counts / 400 - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 400))


def test_a_share_of_the_crops_is_about_foreground():
    labels = jnp.zeros((64, 64, 1), int).at[60, 1, 0].set(1)
    found = starts(labels, patch_shape=(8, 8, 1), foreground_probability=0.3)
    # Moved inside of the volume.
    centred = np.all(found == [56, 0, 0], axis=1).mean()
    assert abs(centred - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 400)


def test_without_foreground_a_crop_falls_anywhere():
    empty = jnp.zeros((5, 4, 3), int)
    found = starts(empty, patch_shape=(3, 4, 2), foreground_probability=1.0)
    assert len({tuple(start) for start in found.tolist()}) == 6


def test_a_crop_larger_than_its_volume_is_refused():
    with pytest.raises(ValueError, match=r"patch_shape must be at most the volume's \(4, 3, 2\)"):
        augment.random_crop_start(KEYS[0], LABELS, patch_shape=(4, 4, 2))


def random_volume(shape=(9, 8, 7)) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.standard_normal((*shape, 2)), jnp.float32)
    return image, jnp.asarray(rng.integers(0, 3, shape)), jnp.asarray(rng.random(shape) > 0.5)


def test_sampling_is_that_of_scipy():
    image, labels, mask = random_volume()
    matrix = np.array([[0.9, -0.2, 0.05], [0.15, 1.1, 0.0], [0.0, 0.1, 0.8]])
    translation, start, shape = np.array([0.317, -0.423, 0.731]), np.array([1, 2, 0]), (6, 5, 7)
    found = augment.sample(
        image,
        labels,
        mask,
        start=jnp.asarray(start),
        shape=shape,
        matrix=jnp.asarray(matrix),
        translation=jnp.asarray(translation),
    )
    centre = (np.array(shape) - 1) / 2
    offset = centre + start + translation - matrix @ centre
    options = {"offset": offset, "output_shape": shape, "mode": "grid-constant"}
    for channel in range(2):
        expected = ndimage.affine_transform(
            np.asarray(image[..., channel]), matrix, order=1, **options
        )
        np.testing.assert_allclose(found[0][..., channel], expected, atol=1e-5)
    np.testing.assert_array_equal(
        found[1], ndimage.affine_transform(np.asarray(labels), matrix, order=0, **options)
    )
    np.testing.assert_array_equal(
        found[2], ndimage.affine_transform(np.asarray(mask, np.uint8), matrix, order=0, **options)
    )


def test_sampling_with_the_identity_is_the_crop_itself():
    image, labels, mask = random_volume()
    found = augment.sample(
        image,
        labels,
        mask,
        start=jnp.array([2, 1, 0]),
        shape=(5, 6, 7),
        matrix=jnp.eye(3),
        translation=jnp.zeros(3),
    )
    for array, expected in zip(found, (image, labels, mask), strict=True):
        np.testing.assert_array_equal(array, expected[2:7, 1:7])


def affine(keys: jax.Array, **options) -> tuple[np.ndarray, np.ndarray]:
    options = {
        "extent": (20, 10, 30),
        "max_translation": 0.1,
        "max_rotation_degrees": 30.0,
        "max_zoom": 0.2,
        "probability": 1.0,
    } | options
    draw = jax.vmap(lambda key: augment.random_affine(key, SPACING, **options))
    return tuple(map(np.asarray, draw(keys)))


def test_an_affine_map_turns_and_scales_in_millimetres_within_its_ranges():
    matrices, translations = affine(KEYS)
    spacing = np.asarray(SPACING)
    in_mm = spacing[:, None] * matrices / spacing
    zoom = 1 / in_mm[:, 2, 2]
    assert 0.8 <= zoom.min() < 0.82 < 1.18 < zoom.max() <= 1.2
    rotations = in_mm * zoom[:, None, None]
    products = rotations @ rotations.transpose(0, 2, 1)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(3), (400, 3, 3)), atol=1e-5)
    angles = np.degrees(np.arctan2(rotations[:, 1, 0], rotations[:, 0, 0]))
    assert -30.01 <= angles.min() < -28 < 28 < angles.max() <= 30.01
    largest = np.abs(translations).max(axis=0)
    assert np.all(largest <= [2, 1, 3])
    assert np.all(largest > 0.95 * np.array([2, 1, 3]))


def test_an_affine_map_has_its_share_of_volumes():
    matrices, translations = affine(KEYS, probability=0.2)
    changed = np.any(translations != 0, axis=1)
    assert abs(changed.mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 400)
    assert np.all(matrices[~changed] == np.eye(3))


def test_gamma_bends_between_the_extremes_of_each_channel():
    channel = jnp.linspace(0.0, 1.0, 8).reshape(2, 2, 2)
    image = jnp.stack([channel - 3, 5 * channel, jnp.full((2, 2, 2), 2.0)], axis=-1)
    out = np.asarray(jax.vmap(lambda key: augment.random_gamma(key, image, probability=1.0))(KEYS))
    np.testing.assert_allclose(out[..., 2], 2)
    np.testing.assert_allclose(out[:, 0, 0, 0, :2], np.broadcast_to([-3, 0], (400, 2)), atol=1e-6)
    np.testing.assert_allclose(out[:, 1, 1, 1, :2], np.broadcast_to([-2, 5], (400, 2)), atol=1e-5)
    exponents = np.log(out[:, 0, 0, 1, 1] / 5) / np.log(1 / 7)
    assert 0.7 - 1e-4 <= exponents.min() < 0.72 < 1.45 < exponents.max() <= 1.5 + 1e-4
    # One exponent a volume.
    np.testing.assert_allclose(out[:, 1, 1, 0, 0], (6 / 7) ** exponents - 3, atol=1e-5)


def test_two_dimensional_volumes_are_augmented_too():
    image, labels, mask = (x[:, :, 0] for x in random_volume())
    out = augment.augment(
        KEYS[0],
        image,
        labels,
        mask,
        SPACING[:2],
        patch_shape=(6, 5),
        affine_probability=1.0,
        max_rotation_degrees=10.0,
        gamma_probability=1.0,
    )
    assert [x.shape for x in out] == [(6, 5, 2), (6, 5), (6, 5)]
    assert np.all(np.isfinite(out[0]))
