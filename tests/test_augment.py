import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afl_jax.data import augment

KEYS = jax.random.split(jax.random.key(0), 400)
IMAGE = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 2, 2)), jnp.float32)
LABELS = jnp.arange(24).reshape(4, 3, 2)
MASK = LABELS % 5 > 0


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
        flip_probability=0.0,
        noise_probability=0.0,
        intensity_probability=0.0,
    )
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_array_equal(mask, MASK)


def test_augmentation_is_a_function_of_its_key_and_the_same_under_jit_and_vmap():
    single = [augment.augment(key, IMAGE, LABELS, MASK) for key in KEYS[:3]]
    batched = jax.jit(jax.vmap(augment.augment, in_axes=(0, None, None, None)))(
        KEYS[:3], IMAGE, LABELS, MASK
    )
    for i, arrays in enumerate(single):
        for one, many in zip(arrays, batched, strict=True):
            np.testing.assert_allclose(one, many[i], rtol=1e-6, atol=1e-6)
    assert not np.array_equal(single[0][0], single[1][0])
