import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afl_jax.inference import (
    class_probs,
    ensemble,
    labels_from_probs,
    sliding_window,
    with_mirroring,
)


def test_class_probs():
    logits = jnp.log(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(class_probs(logits), [1 / (1 + 1), 3 / (3 + 1)], rtol=1e-6)
    softmax = class_probs(logits, activation="softmax")
    np.testing.assert_allclose(softmax, [1 / (1 + 3), 3 / (1 + 3)], rtol=1e-6)
    assert class_probs(logits.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("num_channels", "activation", "message"),
    [
        (2, "tanh", r'^activation must be "sigmoid" or "softmax", got "tanh"\.$'),
        (1, "softmax", r'^activation must be "sigmoid" for K = 1 channel, got "softmax"\.$'),
    ],
)
def test_bad_activations_are_refused(num_channels, activation, message):
    with pytest.raises(ValueError, match=message):
        class_probs(jnp.zeros((3, num_channels)), activation=activation)


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        ([[0.5], [0.51]], [0, 1]),
        # The background channel is not read, even where it is the larger one.
        ([[0.9, 0.6], [0.1, 0.5], [0.1, 0.4]], [1, 0, 0]),
        ([[0.2, 0.3, 0.1], [0.2, 0.1, 0.3], [0.4, 0.4, 0.4]], [1, 2, 0]),
    ],
    ids=["K=1", "K=2", "K=3"],
)
def test_labels_from_probs(probs, expected):
    labels = labels_from_probs(jnp.array(probs))
    assert labels.dtype == jnp.int32
    np.testing.assert_array_equal(labels, expected)


@st.composite
def windows(draw):
    ndim = draw(st.integers(2, 3))
    sizes = st.lists(st.integers(1, 14), min_size=ndim, max_size=ndim)
    return {
        "shape": (*draw(sizes), draw(st.integers(1, 3))),
        "patch_shape": draw(st.lists(st.integers(1, 8), min_size=ndim, max_size=ndim)),
        "overlap": draw(st.sampled_from([0.0, 0.25, 0.5, 0.7, 0.9]) | st.floats(0, 0.95)),
        "blend": draw(st.sampled_from(["gaussian", "constant"])),
        "patch_batch": draw(st.integers(1, 5)),
    }


@settings(max_examples=300, deadline=None)
@given(windows())
def test_the_identity_returns_its_input(window):
    image = np.random.default_rng(0).uniform(-1, 1, window.pop("shape")).astype(np.float32)
    patches_shape = (window["patch_batch"], *window["patch_shape"], image.shape[-1])

    def identity(patches):
        assert patches.shape == patches_shape
        return patches

    output = sliding_window(identity, image, **window)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, image, rtol=0, atol=1e-6)


def test_hundreds_of_overlapping_patches_keep_six_digits():
    image = np.full((24, 24, 24, 1), 0.7, np.float32)
    output = sliding_window(
        lambda patches: patches, image, patch_shape=(10, 10, 10), overlap=0.9, blend="constant"
    )
    np.testing.assert_allclose(output, image, rtol=0, atol=1e-6)


def test_patches_advance_by_their_step_and_end_at_the_border():
    ramp = np.arange(10, dtype=np.float32).reshape(10, 1, 1)
    firsts = []

    def record(patches):
        firsts.extend(patches[:, 0, 0, 0].tolist())
        return patches

    sliding_window(record, ramp, patch_shape=(4, 1), overlap=0.25)
    # A step of 4 * (1 - 0.25) = 3; the last patch ends at voxel 9.
    assert firsts == [0, 3, 6]
    firsts.clear()
    sliding_window(record, ramp, patch_shape=(4, 1), overlap=0.0)
    assert firsts == [0, 4, 6]
    firsts.clear()
    # A step of 20 * (1 - 0.9) = 2, which floating point makes a little less.
    sliding_window(record, np.arange(25.0).reshape(25, 1, 1), patch_shape=(20, 1), overlap=0.9)
    assert firsts == [0, 2, 4, 5]


def test_a_small_volume_lies_in_the_middle_of_the_patch():
    def record(patches):
        np.testing.assert_array_equal(patches.ravel(), [0, 0, 1, 2, 0, 0, 0])
        return patches

    image = np.array([1.0, 2.0]).reshape(2, 1, 1)
    output = sliding_window(record, image, patch_shape=(7, 1))
    np.testing.assert_array_equal(output, image)


def test_constant_blending_averages_the_patches_that_cover_a_voxel():
    patch_numbers = itertools.count(1.0)

    def numbered(patches):
        return np.full_like(patches, next(patch_numbers))

    image = np.zeros((6, 1, 1), np.float32)
    output = sliding_window(numbered, image, patch_shape=(4, 1), overlap=0.5, blend="constant")
    # Patch 1 covers voxels 0 to 3, patch 2 covers 2 to 5.
    np.testing.assert_allclose(output.ravel(), [1, 1, 1.5, 1.5, 2, 2])


def test_gaussian_blending_trusts_the_nearer_centre():
    patch_numbers = itertools.count(1.0)

    def numbered(patches):
        return np.full_like(patches, next(patch_numbers))

    image = np.zeros((6, 1, 1), np.float32)
    output = sliding_window(numbered, image, patch_shape=(4, 1), overlap=0.5, blend="gaussian")
    # sigma = 4 / 8; voxel 2 lies 0.5 from the first centre and 1.5 from the second.
    near, far = np.exp(-0.5 * (0.5 / 0.5) ** 2), np.exp(-0.5 * (1.5 / 0.5) ** 2)
    voxel_2, voxel_3 = (near * 1 + far * 2) / (near + far), (far * 1 + near * 2) / (near + far)
    np.testing.assert_allclose(output.ravel(), [1, 1, voxel_2, voxel_3, 2, 2], rtol=1e-6)


def test_one_compilation_for_volumes_of_every_size():
    num_traces = 0

    @jax.jit
    def network(patches):
        nonlocal num_traces
        num_traces += 1
        return jnp.concatenate([-patches, patches], axis=-1)

    for shape in [(8, 8, 8), (9, 12, 8), (3, 20, 5), (17, 9, 11)]:
        output = sliding_window(network, np.ones((*shape, 1)), patch_shape=(8, 8, 8), patch_batch=2)
        assert output.shape == (*shape, 2)
    assert num_traces == 1
    assert network._cache_size() == 1


def test_padding_a_volume_changes_nothing_away_from_the_rim():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 3, 1, 2))

    @jax.jit
    def network(patches):
        return jax.lax.conv_general_dilated(
            patches, kernel, (1, 1, 1), "SAME", dimension_numbers=("NXYZC", "XYZIO", "NXYZC")
        )

    image = np.random.default_rng(0).standard_normal((20, 16, 16, 1)).astype(np.float32)
    # By whole steps of 4 voxels, so that the same patches lie over the same voxels.
    padded = np.pad(image, [(4, 8), (4, 4), (8, 4), (0, 0)])
    window = {"patch_shape": (8, 8, 8), "overlap": 0.5, "patch_batch": 4}
    output = sliding_window(network, image, **window)
    padded_output = sliding_window(network, padded, **window)[4:-8, 4:-4, 8:-4]
    inner = (slice(4, -4),) * 3
    np.testing.assert_allclose(padded_output[inner], output[inner], rtol=0, atol=1e-6)


def test_a_network_of_local_reach_sees_no_seams():
    def blur(patches):
        return sum(jnp.roll(patches, shift, axis=1) for shift in (-1, 0, 1)) / 3

    image = np.random.default_rng(0).standard_normal((40, 1, 1)).astype(np.float32)
    output = sliding_window(blur, image, patch_shape=(16, 1), overlap=0.5)
    whole = np.asarray(blur(image[None]))[0]
    # Only a patch's first and last voxel are wrong, by one wrong neighbour of three. They lie
    # 7.5 voxels from the centre, and 0.5 from that of the next patch; sigma = 16 / 8.
    share = np.exp(-0.5 * (7.5 / 2) ** 2) / np.exp(-0.5 * (0.5 / 2) ** 2)
    worst = share * 2 * np.abs(image).max() / 3
    np.testing.assert_allclose(output[1:-1], whole[1:-1], rtol=0, atol=worst)
    # Without the Gaussian the same voxels count half.
    constant = sliding_window(blur, image, patch_shape=(16, 1), overlap=0.5, blend="constant")
    assert np.abs(constant[1:-1] - whole[1:-1]).max() > 100 * worst


IMAGE = np.zeros((8, 8, 1), np.float32)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"patch_shape": (4, 4, 4)}, r"patch_shape must have 2 positive sizes .*\(4, 4, 4\)\.$"),
        ({"patch_shape": (4, 0)}, r"patch_shape must have 2 positive sizes .*\(4, 0\)\.$"),
        ({"overlap": 1.0}, r"^overlap must be in \[0, 1\), got 1.0\.$"),
        ({"blend": "linear"}, r'^blend must be "gaussian" or "constant", got "linear"\.$'),
        ({"patch_batch": 0}, r"^patch_batch must be at least 1, got 0\.$"),
    ],
    ids=["rank", "size", "overlap", "blend", "patch_batch"],
)
def test_bad_arguments_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        sliding_window(lambda patches: patches, IMAGE, **{"patch_shape": (4, 4), **keywords})


def test_a_network_that_changes_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"^apply_fn must return .*got \(1, 2, 4, 1\)\.$"):
        sliding_window(lambda patches: patches[:, ::2], IMAGE, patch_shape=(4, 4))


@pytest.mark.parametrize("axes", [(), (0,), (1, 2), (0, 1, 2)])
def test_mirroring_averages_over_all_flips(axes):
    image = jax.random.normal(jax.random.key(0), (2, 3, 4, 5, 1))
    ramp = jax.random.normal(jax.random.key(1), (1, 3, 4, 5, 1))

    def network(patches):
        return patches * jnp.broadcast_to(ramp, patches.shape)

    mirrored = with_mirroring(network, axes)(image)
    # The network scales by a fixed ramp; mirroring it replaces the ramp by its mean over flips.
    expected_ramp = np.asarray(ramp)
    for axis in axes:
        expected_ramp = (expected_ramp + np.flip(expected_ramp, axis + 1)) / 2
    np.testing.assert_allclose(mirrored, np.asarray(image) * expected_ramp, rtol=1e-5, atol=1e-6)


def test_mirroring_compiles_the_network_once():
    network = jax.jit(lambda patches: 2 * patches)
    with_mirroring(network, (0, 1))(jnp.ones((1, 4, 4, 1)))
    assert network._cache_size() == 1


@pytest.mark.parametrize("axes", [(0, 0), (-1,)])
def test_bad_axes_are_refused(axes):
    with pytest.raises(ValueError, match=r"^axes must be different spatial axes from 0, got "):
        with_mirroring(lambda patches: patches, axes)


def test_an_ensemble_is_the_mean_of_its_networks():
    image = np.array([1.0, 2.0]).reshape(1, 2, 1, 1)
    output = ensemble([lambda x: x, lambda x: 3 * x, lambda x: x + 5])(image)
    np.testing.assert_allclose(output, (5 * image + 5) / 3)
    with pytest.raises(ValueError, match=r"^apply_fns must hold at least one network, got none\.$"):
        ensemble([])


def test_the_next_patches_are_asked_for_before_the_last_are_read():
    events = []

    class Computing:
        """An array on a device, which is waited for when it is read."""

        def __init__(self, number, values):
            self.number, self.values = number, values

        def __array__(self, dtype=None, copy=None):
            events.append(f"read {self.number}")
            return np.asarray(self.values, dtype)

    def network(patches):
        number = sum(event.startswith("call") for event in events)
        events.append(f"call {number}")
        return Computing(number, patches)

    done = []
    sliding_window(
        network,
        np.zeros((6, 1, 1)),
        patch_shape=(2, 1),
        overlap=0.0,
        progress=lambda *counts: done.append(counts),
    )
    assert events == ["call 0", "call 1", "read 0", "call 2", "read 1", "read 2"]
    assert done == [(1, 3), (2, 3), (3, 3)]
