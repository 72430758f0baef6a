"""Preparation and its inverse: voxels stay where they are in the patient."""

import numpy as np
import pytest
from orientations import ORIENTATIONS, TILT, create_volume

from afl_jax.data.preprocess import (
    content_box,
    crop_or_pad,
    normalise,
    prepare_image,
    prepare_labels,
    remap_labels,
    reorient,
    resample,
    resample_to,
    restore,
)
from afl_jax.data.volume import Volume, read_volume, same_grid
from afl_jax.errors import InputError


def centre_of(volume: Volume, value: int) -> np.ndarray:
    """Physical point, mm, of the voxel that has a value."""
    (index,) = np.argwhere(volume.array == value)
    return volume.origin + volume.matrix @ index


@pytest.mark.parametrize("rotation", [None, TILT], ids=["aligned", "oblique"])
@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=str)
def test_restore_inverts_preparation_voxel_for_voxel(orientation, rotation):
    original = create_volume(*orientation, rotation)
    prepared = prepare_image(original, shape=(9, 8, 10), normalisation="none")
    assert prepared.array.shape == (9, 8, 10, 1)
    restored = restore(prepared, original, interpolation="linear")
    np.testing.assert_array_equal(restored.array[..., 0], original.array)
    assert restored.spacing == original.spacing
    assert restored.origin == original.origin
    assert restored.direction == original.direction
    labels = prepare_labels(
        create_volume(*orientation, rotation, shape=(5, 6, 7)),
        prepared,
        label_map={value: value % 251 for value in range(1, 211)},
    )
    back = restore(labels, original, interpolation="nearest")
    np.testing.assert_array_equal(back.array, original.array % 251)


@pytest.mark.parametrize("rotation", [None, TILT], ids=["aligned", "oblique"])
def test_reorient_keeps_every_voxel_in_its_place(rotation):
    for orientation in ORIENTATIONS:
        original = create_volume(*orientation, rotation, shape=(2, 3, 4))
        found = reorient(original)
        cosines = np.diag(np.reshape(found.direction, (3, 3)))
        assert cosines.min() > 0.9, "each axis grows towards L, P, S"
        for value in (1, 5, 24):
            np.testing.assert_allclose(centre_of(found, value), centre_of(original, value))


def test_reorient_to_ras_flips_two_axes_of_lps():
    original = create_volume()
    found = reorient(original, orientation="RAS")
    np.testing.assert_array_equal(found.array, original.array[::-1, ::-1])
    assert found.direction == (-1, 0, 0, 0, -1, 0, 0, 0, 1)
    assert found.origin == (12.0 + 4 * 0.5, -7.0 + 5 * 1.0, 30.0)


@pytest.mark.parametrize("orientation", ["LP", "LPP", "LPX", "LRS", "LPSS"])
def test_reorient_refuses_what_is_no_orientation(orientation):
    with pytest.raises(ValueError, match="orientation"):
        reorient(create_volume(), orientation=orientation)


def test_a_prediction_outside_of_the_prepared_grid_is_fill():
    original = Volume(np.ones((6, 4, 4), np.int16))
    prepared = prepare_image(original, shape=(2, 4, 4), normalisation="none")
    restored = restore(prepared, original, interpolation="linear", fill=-1.0)
    np.testing.assert_array_equal(restored.array[:, 0, 0, 0], [-1, -1, 1, 1, -1, -1])


def test_resample_to_the_same_spacing_is_the_volume_itself():
    volume = create_volume()
    assert resample(volume, spacing=(0.5, 1.0, 3.0), interpolation="linear") is volume


@pytest.mark.parametrize("interpolation", ["linear", "bspline"])
def test_resample_samples_the_same_physical_points(interpolation):
    index = np.indices((12, 12, 12)).transpose(1, 2, 3, 0)
    shape_only = Volume(np.zeros((12, 12, 12)), (2, 2, 2), (5, 6, 7), tuple(TILT.ravel()))
    points = index @ shape_only.matrix.T + shape_only.origin
    volume = Volume(points.astype(np.float32), (2, 2, 2), (5, 6, 7), tuple(TILT.ravel()))
    found = resample(volume, spacing=(1, 3, 2), interpolation=interpolation)
    assert found.array.shape == (24, 8, 12, 3)
    inner = (slice(4, -4), slice(2, -2), slice(3, -3))
    index = np.indices(found.shape).transpose(1, 2, 3, 0)
    expected = index @ found.matrix.T + found.origin
    # A coordinate is linear in the index, so that interpolation reproduces it; a spline feels the
    # rim a little, by far less than a wrong voxel.
    atol = 1e-4 if interpolation == "linear" else 0.1
    np.testing.assert_allclose(found.array[inner], expected[inner], atol=atol)


def test_resample_covers_the_extent_about_the_same_centre():
    volume = Volume(np.ones((10, 4, 1), np.float32))
    found = resample(volume, spacing=(3, 2, 1), interpolation="linear")
    # 10 mm at 3 mm takes 4 voxels, 12 mm: from -1.5 to 10.5 in voxel edges of the source.
    assert found.shape == (4, 2, 1)
    assert found.origin == pytest.approx((4.5 - 1.5 * 3, 1.5 - 0.5 * 2, 0.0))
    np.testing.assert_array_equal(found.array, 1.0)


def test_nearest_keeps_dtype_and_values():
    volume = Volume(np.array([0, 4, 0, 2], np.uint8).reshape(4, 1, 1))
    found = resample(volume, spacing=(0.5, 1, 1), interpolation="nearest")
    assert found.array.dtype == np.uint8
    np.testing.assert_array_equal(found.array.ravel(), [0, 0, 4, 4, 0, 0, 2, 2])


def test_labels_that_are_resampled_do_not_grow():
    radius = np.linalg.norm(np.indices((32, 32, 32)) - 15.5, axis=0)
    labels = Volume((radius < 9).astype(np.uint8))
    prepared = prepare_image(labels, spacing=(1.5, 1.5, 2.0), shape=(20, 20, 16))
    found = prepare_labels(labels, prepared)
    volume_mm3 = found.array.sum() * 1.5 * 1.5 * 2.0
    assert volume_mm3 == pytest.approx(labels.array.sum(), rel=0.05)


@pytest.mark.parametrize("spacing", [(0, 1, 1), (1, -1, 1), (1, 1), (float("inf"), 1, 1)], ids=str)
def test_resample_refuses_an_impossible_spacing(spacing):
    with pytest.raises(InputError, match="spacing must be three positive numbers"):
        resample(create_volume(), spacing=spacing, interpolation="linear")


def test_resample_refuses_a_grid_that_no_memory_holds():
    with pytest.raises(InputError, match="choose a coarser one"):
        resample(create_volume(), spacing=(1e-4, 1e-4, 1e-4), interpolation="linear")


def test_resample_to_takes_the_grid_and_fills_outside():
    volume = Volume(np.ones((2, 2, 2), np.float32))
    reference = Volume(np.zeros((4, 2, 2, 3)), (1, 1, 1), (-1.25, 0, 0))
    found = resample_to(volume, reference, interpolation="linear", fill=-9.0)
    assert same_grid(found, reference)
    # Centres at x = -1.25, -0.25, 0.75, 1.75; the volume reaches from -0.5 to 1.5.
    np.testing.assert_array_equal(found.array[:, 0, 0], [-9, 1, 1, -9])


@pytest.mark.parametrize(
    ("old", "new", "expected", "origin"),
    [
        (4, 4, [1, 2, 3, 4], 0.0),
        (4, 2, [2, 3], 2.0),
        (4, 1, [2], 2.0),
        (4, 6, [0, 1, 2, 3, 4, 0], -2.0),
        (4, 7, [0, 1, 2, 3, 4, 0, 0], -2.0),
        (1, 4, [0, 1, 0, 0], -2.0),
    ],
    ids=str,
)
def test_crop_or_pad_is_centred(old, new, expected, origin):
    volume = Volume(np.arange(1, old + 1).reshape(old, 1, 1), (2.0, 1.0, 1.0))
    found = crop_or_pad(volume, (new, 1, 1))
    np.testing.assert_array_equal(found.array.ravel(), expected)
    assert found.origin[0] == origin


def test_crop_and_pad_mix_and_keep_places():
    volume = create_volume(rotation=TILT)
    found = crop_or_pad(volume, (3, 9, 7))
    value = volume.array[2, 3, 3]
    np.testing.assert_allclose(centre_of(found, value), centre_of(volume, value))


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, 1), (1.5, 1, 1)], ids=str)
def test_crop_or_pad_refuses_what_is_no_shape(shape):
    with pytest.raises(InputError, match="shape must be three positive whole numbers"):
        crop_or_pad(create_volume(), shape)


@pytest.mark.parametrize("orientation", ORIENTATIONS[::7], ids=str)
def test_content_box_is_where_the_image_is(orientation):
    original = create_volume(*orientation, TILT)
    prepared = prepare_image(original, shape=(4, 8, 10), normalisation="none")
    start, stop = content_box(original, prepared)
    box = np.zeros(prepared.shape, bool)
    box[tuple(slice(*ends) for ends in zip(start, stop, strict=True))] = True
    # No value of the original is zero.
    np.testing.assert_array_equal(box, prepared.array[..., 0] != 0)


def test_content_box_of_a_resampled_volume():
    original = Volume(np.ones((10, 10, 10)))
    prepared = prepare_image(original, spacing=(2, 2, 2), shape=(9, 5, 3))
    start, stop = content_box(original, prepared)
    np.testing.assert_array_equal(start, [2, 0, 0])
    np.testing.assert_array_equal(stop, [7, 5, 3])


def test_zscore_nonzero_leaves_zeros():
    # The mean of 1 and 3 is 2, their standard deviation 1.
    found = normalise(np.array([[[0, 1, 3]]]), method="zscore_nonzero")
    np.testing.assert_array_equal(found, [[[0, -1, 1]]])
    assert found.dtype == np.float32


def test_zscore_takes_all_voxels():
    # The mean of 0, 0, 3, 3 is 1.5, their standard deviation 1.5.
    found = normalise(np.array([[[0, 0, 3, 3]]]), method="zscore")
    np.testing.assert_array_equal(found, [[[-1, -1, 1, 1]]])


def test_each_channel_is_normalised_by_itself():
    first, second = np.array([0, 1, 3]), np.array([20, 0, 10])
    found = normalise(np.stack([first, second], -1).reshape(3, 1, 1, 2), method="zscore_nonzero")
    np.testing.assert_array_equal(found[:, 0, 0, 0], [0, -1, 1])
    np.testing.assert_array_equal(found[:, 0, 0, 1], [1, 0, -1])


@pytest.mark.parametrize("method", ["zscore", "zscore_nonzero"])
@pytest.mark.parametrize("value", [0.0, 7.0, 3e38])
def test_a_constant_channel_becomes_zero(method, value):
    found = normalise(np.full((2, 2, 2), value, np.float32), method=method)
    np.testing.assert_array_equal(found, 0)


def test_normalise_none_only_casts():
    found = normalise(np.array([[[0, 5]]], np.int16), method="none")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[[0, 5]]])


def test_normalise_names_the_methods():
    with pytest.raises(ValueError, match=r"'zscore_nonzero', 'zscore', 'none'.*'minmax'"):
        normalise(np.zeros((1, 1, 1)), method="minmax")


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float64])
def test_remap_merges_labels(dtype):
    found = remap_labels(np.array([[[0, 1, 2, 4]]], dtype), {0: 0, 1: 1, 2: 1, 4: 3})
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, [[[0, 1, 1, 3]]])


@pytest.mark.parametrize("value", [3, -1, 0.5, np.nan], ids=str)
def test_remap_names_a_value_outside_of_the_map(value):
    with pytest.raises(InputError, match=rf"^label value {value:g} is not among \[0, 1\]"):
        remap_labels(np.array([[[0, 1, value]]]), {0: 0, 1: 1})


@pytest.mark.real_data
def test_a_real_mask_returns_to_its_image(real_data):
    paths = sorted((real_data / "Task04_Hippocampus" / "labelsTr").glob("*.nii.gz"))[:4]
    picai = sorted((real_data / "picai_labels").rglob("csPCa*/**/*.nii.gz"))[:2]
    assert paths and picai
    for path in (*paths, *picai):
        labels = read_volume(path)
        shape = tuple(n + 8 for n in reorient(labels).shape)
        prepared = prepare_labels(labels, prepare_image(labels, shape=shape))
        np.testing.assert_array_equal(
            restore(prepared, labels, interpolation="nearest").array, labels.array
        )
