"""Medical volumes with their place in the patient, and their files.

A voxel index (i, j, k) lies at the physical point ``origin + direction @ (spacing * (i, j, k))`` in
millimetres, in the LPS frame: x grows to the patient's left, y to the back, z to the head. That is
how SimpleITK reports geometry; a NIfTI header holds the same place in RAS, with x and y negated.

Arrays are ``[X, Y, Z]``, or ``[X, Y, Z, C]`` for several channels, such as the sequences of one
examination. SimpleITK's arrays run z, y, x: that order exists only inside this file. A NIfTI file
with channels is four-dimensional, channels last, as the Medical Segmentation Decathlon has it.

A file is looked at before ITK reads it, so that one that is truncated, or whose header is absurd,
is refused before memory is taken: see `headers`. A MetaImage file must hold its own pixels: one
that points at another file could point anywhere. Files are written beside their place and renamed,
so that a file of that name is always whole.
"""

import dataclasses
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK

from afl_jax.data.headers import (
    NIFTI_HEADER_BYTES,
    check_meta,
    check_nifti,
    find_data_file,
    read_bytes,
)
from afl_jax.errors import InputError
from afl_jax.files import written_beside

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)

SUFFIXES = (".nii", ".nii.gz", ".mha")
Vector = tuple[float, float, float]
Interpolation = Literal["linear", "nearest", "bspline"]

_INTERPOLATORS = {
    "linear": SimpleITK.sitkLinear,
    "nearest": SimpleITK.sitkNearestNeighbor,
    "bspline": SimpleITK.sitkBSpline,
}
_AXIS_ALIGNED = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """Voxels and where they lie.

    Attributes:
      array: ``[X, Y, Z]`` or ``[X, Y, Z, C]``, at least one voxel along every axis.
      spacing: Distance of neighbouring voxel centres along each array axis, mm.
      origin: Centre of voxel (0, 0, 0), mm, LPS.
      direction: Cosines, a 3x3 matrix row by row; column a is the direction of array axis a.
    """

    array: np.ndarray
    spacing: Vector = (1.0, 1.0, 1.0)
    origin: Vector = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = _AXIS_ALIGNED

    def __post_init__(self):
        if self.array.ndim not in (3, 4) or self.array.size == 0:
            raise ValueError(
                "array must have shape [X, Y, Z] or [X, Y, Z, C] without empty axes, "
                f"got {self.array.shape}."
            )
        for name, length in (("spacing", 3), ("origin", 3), ("direction", 9)):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != length or not np.all(np.isfinite(values)):
                raise ValueError(f"{name} must be {length} finite numbers, got {values}.")
            object.__setattr__(self, name, values)
        if min(self.spacing) <= 0:
            raise ValueError(f"spacing must be positive, got {self.spacing}.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along each axis, without channels."""
        return self.array.shape[:3]

    @property
    def matrix(self) -> np.ndarray:
        """``[3, 3]`` matrix that takes a step in voxels to a step in mm."""
        return np.reshape(self.direction, (3, 3)) * self.spacing


def read_volume(path: str | os.PathLike) -> Volume:
    """Reads a volume from a NIfTI or MetaImage file.

    Args:
      path: A ``.nii``, ``.nii.gz`` or ``.mha`` file: three-dimensional, or with channels as a
        fourth dimension or as vector voxels.

    Returns:
      The volume, in the data type of the file.

    Raises:
      InputError: If the file is missing, of another kind, truncated or otherwise unreadable, not
        three-dimensional, larger than `headers.MAX_NUM_VALUES`, or has values that are not finite.
    """
    path = Path(path)
    suffix = _suffix(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        if suffix == ".mha":
            _require_pixels_inside(path)
            check_meta(path)
        elif not check_nifti(path):
            _require_finite(path, is_finite=False)
        reader.ReadImageInformation()
        _require_volume(path, reader.GetSize(), reader.GetNumberOfComponents())
        volume = _from_image(reader.Execute())
    except InputError:
        raise
    except (
        *(RuntimeError, ValueError, KeyError, OverflowError, OSError, EOFError),
        *(zlib.error, MemoryError),
    ) as error:
        if "orthonormal" in str(error):
            raise InputError(
                f"{path}: the axes of its affine must be at right angles, found them oblique to "
                "each other; correct the sform of the header, or resample the image."
            ) from error
        raise InputError(
            f"{path}: cannot be read as an image; it may be truncated, damaged or of another "
            "kind: fetch it again."
        ) from error
    _require_finite(path, is_finite=bool(np.all(np.isfinite(volume.array))))
    return volume


def read_single_channel(path: str | os.PathLike, *, kind: str) -> Volume:
    """Reads a volume that must not have channels.

    Args:
      path: See `read_volume`.
      kind: What it is, for the error: a label, a mask, a sequence.

    Returns:
      ``[X, Y, Z]``.

    Raises:
      InputError: As `read_volume`, or if the volume has channels.
    """
    volume = read_volume(path)
    if volume.array.ndim != 3:
        raise InputError(f"{path}: a {kind} must have 3 dimensions, found 4 (channels).")
    return volume


def read_channels(
    paths: Sequence[Path], *, num_channels: int, tolerance_mm: float = 1e-2
) -> Volume:
    """Reads the files of one image and joins their channels.

    Args:
      paths: At least one; a file whose fourth dimension is channels brings all of them.
      num_channels: How many there must be in all.
      tolerance_mm: Of the files' grids, see `grid_difference`; the first file's is kept.

    Returns:
      ``[X, Y, Z, C]``, channels in the order of the files.

    Raises:
      InputError: If a file cannot be read, lies on another grid than the first, or the number of
        channels is another.
    """
    volumes = [read_volume(path) for path in paths]
    for path, volume in zip(paths, volumes, strict=True):
        if difference := grid_difference(volume, volumes[0], tolerance_mm=tolerance_mm):
            raise InputError(
                f"{path}: expected the grid of {paths[0].name}, found {difference}; "
                "resample the channels of a case onto one grid."
            )
    arrays = [
        volume.array if volume.array.ndim == 4 else volume.array[..., None] for volume in volumes
    ]
    array = np.concatenate(arrays, axis=-1)
    if array.shape[-1] != num_channels:
        raise InputError(
            f"{paths[0]}: expected {num_channels} channels (as the data set has), found "
            f"{array.shape[-1]}; give the files that it was made of."
        )
    return dataclasses.replace(volumes[0], array=array)


def case_name(path: Path) -> str:
    """The name of a volume's file without its suffix.

    Args:
      path: A path whose name may end in one of ``SUFFIXES``.

    Returns:
      The name, such as ``a`` for ``x/a.nii.gz``.
    """
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.name


def write_volume(path: str | os.PathLike, volume: Volume) -> None:
    """Writes a volume; the suffix of the path decides the format.

    The file is written beside its place and renamed: it is there whole or not at all.

    Args:
      path: Where to, a ``.nii``, ``.nii.gz`` or ``.mha`` file; its folder must exist.
      volume: What to write, in the data type of its array; bool is written as uint8.

    Raises:
      InputError: If the suffix is another one, or the file cannot be written.
    """
    path = Path(path)
    suffix = _suffix(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written, its folder does not exist: create it.")
    try:
        with written_beside(path) as partial:
            SimpleITK.WriteImage(_to_image(volume), str(partial), useCompression=suffix != ".nii")
            # ITK does not notice a disk that fills up: what was written is counted first.
            if suffix != ".mha":
                read_bytes(partial, NIFTI_HEADER_BYTES + volume.array.nbytes)
    except (RuntimeError, OSError, EOFError) as error:
        raise InputError(
            f"{path}: cannot be written; check its permissions and that the disk has room."
        ) from error


def grid_difference(a: Volume, b: Volume, *, tolerance_mm: float = 1e-2) -> str:
    """Says in words how the grids of two volumes differ; channels do not count.

    Args:
      a: One volume.
      b: The other.
      tolerance_mm: Largest distance that counts as none, between corresponding corner voxels.

    Returns:
      What differs, such as ``"shape (4, 4, 2) against (4, 4, 3)"``; empty for the same grid.
    """
    if a.shape != b.shape:
        return f"shape {a.shape} against {b.shape}"
    corners = np.indices((2, 2, 2)).reshape(3, 8) * (np.reshape(a.shape, (3, 1)) - 1)
    offset = np.subtract(a.origin, b.origin)[:, None] + (a.matrix - b.matrix) @ corners
    distance_mm = np.linalg.norm(offset, axis=0).max()
    if distance_mm <= tolerance_mm:
        return ""
    named = [
        f"{name} {_rounded(getattr(a, name))} against {_rounded(getattr(b, name))}"
        for name in ("spacing", "origin", "direction")
        if not np.allclose(getattr(a, name), getattr(b, name), rtol=0, atol=1e-4)
    ]
    return f"{', '.join(named) or 'geometry'} ({distance_mm:.3g} mm apart)"


def same_grid(a: Volume, b: Volume, *, tolerance_mm: float = 1e-2) -> bool:
    """Whether two volumes have the same shape and lie on the same voxels.

    Args:
      a: One volume.
      b: The other.
      tolerance_mm: See `grid_difference`.

    Returns:
      Whether `grid_difference` finds nothing.
    """
    return not grid_difference(a, b, tolerance_mm=tolerance_mm)


def interpolate(
    volume: Volume, reference: Volume, *, interpolation: Interpolation, fill: float
) -> np.ndarray:
    """Values of a volume at the voxel centres of another, channel by channel.

    Args:
      volume: What is sampled.
      reference: Whose voxel centres are the points; its values and channels do not matter.
      interpolation: ``"nearest"`` keeps the data type; ``"linear"`` and ``"bspline"`` (cubic)
        give float32.
      fill: Value of the points outside of the volume, that is further than half a voxel from its
        outermost voxel centres.

    Returns:
      ``[X, Y, Z]`` or ``[X, Y, Z, C]`` with the reference's spatial shape.
    """
    resampler = SimpleITK.ResampleImageFilter()
    resampler.SetSize(reference.shape)
    resampler.SetOutputSpacing(reference.spacing)
    resampler.SetOutputOrigin(reference.origin)
    resampler.SetOutputDirection(reference.direction)
    resampler.SetInterpolator(_INTERPOLATORS[interpolation])
    resampler.SetDefaultPixelValue(fill)
    resampler.SetOutputPixelType(
        SimpleITK.sitkUnknown if interpolation == "nearest" else SimpleITK.sitkFloat32
    )

    def one_channel(array: np.ndarray) -> np.ndarray:
        image = _to_image(dataclasses.replace(volume, array=array))
        return SimpleITK.GetArrayFromImage(resampler.Execute(image)).T

    if volume.array.ndim == 3:
        return one_channel(volume.array)
    channels = [one_channel(channel) for channel in np.moveaxis(volume.array, -1, 0)]
    return np.stack(channels, axis=-1)


def _from_image(image: SimpleITK.Image) -> Volume:
    array = SimpleITK.GetArrayFromImage(image)
    is_vector = image.GetNumberOfComponentsPerPixel() > 1
    array = array.transpose(2, 1, 0, 3) if is_vector else array.T
    dimension = image.GetDimension()
    direction = np.reshape(image.GetDirection(), (dimension, dimension))[:3, :3]
    return Volume(
        np.ascontiguousarray(array),
        image.GetSpacing()[:3],
        image.GetOrigin()[:3],
        tuple(direction.ravel().tolist()),
    )


def _to_image(volume: Volume) -> SimpleITK.Image:
    array = volume.array.astype(np.uint8) if volume.array.dtype == bool else volume.array
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T), isVector=False)
    direction = np.eye(array.ndim)
    direction[:3, :3] = np.reshape(volume.direction, (3, 3))
    padding = array.ndim - 3
    image.SetSpacing(volume.spacing + (1.0,) * padding)
    image.SetOrigin(volume.origin + (0.0,) * padding)
    image.SetDirection(direction.ravel().tolist())
    return image


def _suffix(path: Path) -> str:
    for suffix in reversed(SUFFIXES):
        if path.name.endswith(suffix):
            return suffix
    raise InputError(f"{path}: not a volume that can be used; its name must end in {SUFFIXES}.")


def _require_volume(path: Path, size: tuple[int, ...], num_components: int) -> None:
    if len(size) + (num_components > 1) not in (3, 4) or len(size) < 3:
        raise InputError(
            f"{path}: expected a volume of 3 dimensions, or 4 with channels, found size {size} "
            f"with {num_components} values a voxel."
        )


def _require_pixels_inside(path: Path) -> None:
    if (found := find_data_file(path)) != "LOCAL":
        raise InputError(
            f"{path}: expected a MetaImage file that holds its pixels (ElementDataFile = LOCAL), "
            f"found {found}; convert it to one file."
        )


def _require_finite(path: Path, *, is_finite: bool) -> None:
    if not is_finite:
        raise InputError(f"{path}: has voxels that are not finite; correct the image.")


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values)
