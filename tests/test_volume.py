"""Files of volumes: what is written is read back, and what is damaged is refused in one line."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from messages import one_line

from afl_jax.data.volume import Volume, grid_difference, read_volume, same_grid, write_volume
from afl_jax.errors import InputError

SUFFIXES = [".nii", ".nii.gz", ".mha"]
# A rotation by 30 degrees about z, row by row.
OBLIQUE = (0.75**0.5, -0.5, 0.0, 0.5, 0.75**0.5, 0.0, 0.0, 0.0, 1.0)


def create_volume(shape=(4, 5, 6), dtype=np.int16) -> Volume:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    return Volume(array, (0.5, 0.75, 3.0), (-10.0, 20.0, 5.0), OBLIQUE)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 3), (3, 1, 2)], ids=str)
def test_what_is_written_is_read_back(tmp_path, suffix, dtype, shape):
    volume = create_volume(shape, dtype)
    write_volume(tmp_path / f"case{suffix}", volume)
    found = read_volume(tmp_path / f"case{suffix}")
    assert found.array.dtype == dtype
    np.testing.assert_array_equal(found.array, volume.array)
    assert same_grid(found, volume, tolerance_mm=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == [f"case{suffix}"]


def test_axes_are_x_y_z_as_itk_indexes_them(tmp_path):
    image = SimpleITK.Image([2, 3, 4], SimpleITK.sitkUInt8)
    image[1, 2, 3] = 7
    SimpleITK.WriteImage(image, str(tmp_path / "case.nii"))
    volume = read_volume(tmp_path / "case.nii")
    assert volume.shape == (2, 3, 4)
    assert volume.array[1, 2, 3] == 7


def test_vector_voxels_are_channels(tmp_path):
    image = SimpleITK.Image([2, 3, 4], SimpleITK.sitkVectorFloat32, 2)
    image[1, 2, 3] = (5.0, 6.0)
    SimpleITK.WriteImage(image, str(tmp_path / "case.mha"))
    volume = read_volume(tmp_path / "case.mha")
    assert volume.array.shape == (2, 3, 4, 2)
    np.testing.assert_array_equal(volume.array[1, 2, 3], [5.0, 6.0])


def test_bool_is_written_as_uint8(tmp_path):
    write_volume(tmp_path / "mask.nii.gz", Volume(np.ones((2, 2, 2), bool)))
    assert read_volume(tmp_path / "mask.nii.gz").array.dtype == np.uint8


def nifti_affine(path: Path) -> np.ndarray:
    """The sform of a NIfTI-1 header, as any reader finds it: 12 floats at byte 280."""
    with gzip.open(path) as file:
        header = file.read(348)
    assert struct.unpack_from("<h", header, 254)[0] > 0, "no sform"
    return np.array(struct.unpack_from("<12f", header, 280)).reshape(3, 4)


@pytest.mark.real_data
def test_a_real_image_keeps_its_affine(real_data, tmp_path):
    source = sorted((real_data / "Task04_Hippocampus" / "imagesTr").glob("*.nii.gz"))[0]
    write_volume(tmp_path / "copy.nii.gz", read_volume(source))
    np.testing.assert_allclose(
        nifti_affine(tmp_path / "copy.nii.gz"), nifti_affine(source), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
def test_a_truncated_file_is_refused(tmp_path, suffix, share):
    path = tmp_path / f"truncated{suffix}"
    noise = np.random.default_rng(0).integers(0, 30000, (16, 16, 16)).astype(np.int16)
    write_volume(path, Volume(noise))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=one_line(path.name)):
        read_volume(path)


def test_a_damaged_byte_in_a_packed_file_is_refused(tmp_path):
    path = tmp_path / "damaged.nii.gz"
    write_volume(path, create_volume((16, 16, 16)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match=one_line("damaged.nii.gz")):
        read_volume(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, suffix, dtype, value):
    array = np.ones((3, 4, 5), dtype)
    array[2, 3, 4] = value
    write_volume(tmp_path / f"case{suffix}", Volume(array))
    with pytest.raises(InputError, match=one_line("has voxels that are not finite")):
        read_volume(tmp_path / f"case{suffix}")


def test_a_file_in_the_other_byte_order_is_read(tmp_path):
    path = tmp_path / "case.nii"
    volume = create_volume(dtype=np.float32)
    write_volume(path, volume)
    header, voxels = path.read_bytes()[:352], path.read_bytes()[352:]
    # The fields of a NIfTI-1 header up to the affine, as struct counts them.
    fields = "i10s18sihss8h3f4h8f3fhss4f2i80s24s2h6f12f16s4s4s"
    swapped = struct.pack(f">{fields}", *struct.unpack(f"<{fields}", header))
    path.write_bytes(swapped + np.frombuffer(voxels, "<f4").astype(">f4").tobytes())
    np.testing.assert_array_equal(read_volume(path).array, volume.array)


def test_an_absurd_size_is_refused_from_the_header(tmp_path):
    path = tmp_path / "huge.nii"
    write_volume(path, create_volume())
    data = bytearray(path.read_bytes())
    struct.pack_into("<4h", data, 40, 3, 32767, 32767, 32767)
    path.write_bytes(data)
    with pytest.raises(InputError, match=one_line(f"{32767**3} values")):
        read_volume(path)


def test_axes_that_are_not_at_right_angles_are_refused(tmp_path):
    path = tmp_path / "sheared.nii"
    write_volume(path, create_volume())
    data = bytearray(path.read_bytes())
    struct.pack_into("<2h", data, 252, 0, 1)  # No qform; the sform decides.
    struct.pack_into("<4f", data, 280, 1.0, 0.5, 0.0, 0.0)
    path.write_bytes(data)
    with pytest.raises(InputError, match=one_line("right angles")):
        read_volume(path)


def test_a_metaimage_that_points_at_another_file_is_refused(tmp_path):
    (tmp_path / "other.raw").write_bytes(bytes(8))
    path = tmp_path / "pointer.mha"
    path.write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\n"
        f"ElementDataFile = {tmp_path / 'other.raw'}\n"
    )
    with pytest.raises(InputError, match=one_line("other.raw")):
        read_volume(path)


@pytest.mark.parametrize("name", ["missing.nii.gz", "image.png", "text.nii", "folder.nii"])
def test_what_is_no_volume_is_refused_by_name(tmp_path, name):
    (tmp_path / "image.png").write_bytes(b"png")
    (tmp_path / "text.nii").write_text("not an image\n" * 100)
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(InputError, match=one_line(name)):
        read_volume(tmp_path / name)


def test_a_flat_image_is_refused(tmp_path):
    SimpleITK.WriteImage(SimpleITK.Image([4, 4], SimpleITK.sitkUInt8), str(tmp_path / "flat.mha"))
    with pytest.raises(InputError, match=one_line("flat.mha: expected a volume of 3 dimensions")):
        read_volume(tmp_path / "flat.mha")


def test_a_write_into_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=one_line("does not exist")):
        write_volume(tmp_path / "no" / "case.nii", create_volume())


def test_a_disk_that_fills_up_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "case.nii"
    write_volume(path, create_volume())
    earlier = path.read_bytes()
    write = SimpleITK.WriteImage

    def write_half(image, name, **options):
        write(image, name, **options)
        data = Path(name).read_bytes()
        Path(name).write_bytes(data[: len(data) // 2])

    monkeypatch.setattr(SimpleITK, "WriteImage", write_half)
    with pytest.raises(InputError, match=one_line("case.nii: cannot be written")):
        write_volume(path, create_volume())
    assert path.read_bytes() == earlier
    assert list(tmp_path.iterdir()) == [path]


def test_grid_difference_says_what_differs():
    volume = create_volume()
    moved = Volume(volume.array, volume.spacing, (-10.0, 20.0, 7.0), volume.direction)
    coarser = Volume(volume.array, (0.5, 0.75, 3.5), volume.origin, volume.direction)
    longer = Volume(np.zeros((4, 5, 7)))
    assert grid_difference(volume, volume) == ""
    assert grid_difference(volume, moved) == (
        "origin (-10.0, 20.0, 5.0) against (-10.0, 20.0, 7.0) (2 mm apart)"
    )
    # The last of 6 slices lies 5 * 0.5 mm away.
    assert grid_difference(volume, coarser) == (
        "spacing (0.5, 0.75, 3.0) against (0.5, 0.75, 3.5) (2.5 mm apart)"
    )
    assert grid_difference(volume, longer) == "shape (4, 5, 6) against (4, 5, 7)"
    assert same_grid(volume, moved, tolerance_mm=2.1)
    assert not same_grid(volume, moved)


@pytest.mark.parametrize(
    "arguments",
    [
        {"array": np.zeros((2, 2))},
        {"array": np.zeros((2, 0, 2))},
        {"array": np.zeros((2, 2, 2)), "spacing": (1.0, 0.0, 1.0)},
        {"array": np.zeros((2, 2, 2)), "origin": (np.nan, 0.0, 0.0)},
        {"array": np.zeros((2, 2, 2)), "direction": (1.0, 0.0)},
    ],
    ids=["flat", "empty", "spacing", "origin", "direction"],
)
def test_a_volume_without_a_place_is_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        Volume(**arguments)
