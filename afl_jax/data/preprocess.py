"""From a scanner's volume to a network's grid, and back.

A case is prepared in four steps: its axes are put in the order and sense of LPS, it is resampled
to a spacing, its intensities are normalised channel by channel, and it is cropped or padded about
its centre to a shape. Intensities come before padding, so that padding is 0 in the normalised
scale. Each step moves the geometry with the voxels; the inverse of the whole is therefore one
resampling onto the original grid, `restore`. Labels are taken straight to the prepared grid of
their image, once, lesion by lesion, by `resample_labels`: none grows, shrinks or is lost.

A step that moves voxels by whole voxels copies them: as long as the spacing is kept, a prediction
returns to its image voxel for voxel, whatever the orientation of the axes.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
from scipy import ndimage

from afl_jax.data.headers import MAX_NUM_VALUES
from afl_jax.data.volume import Interpolation, Vector, Volume, interpolate
from afl_jax.errors import InputError
from afl_jax.lesions import label_components

Normalisation = Literal["zscore_nonzero", "zscore", "none"]
# Of the options of `prepare_image`, by the names that settings and configs have for them too.
PREPARATION = ("shape", "spacing", "resize", "normalisation", "clip_percentiles")

# Towards +x, +y and +z of the LPS frame, the negative sense of each is the other letter.
_AXIS_LETTERS = (("L", "R"), ("P", "A"), ("S", "I"))
# Two grids that are this close, in voxels, are one: headers hold float32.
_TOLERANCE_VOXELS = 1e-3
# Along one axis of one voxel, to find how much of it a lesion covers.
_MAX_SAMPLES = 16


def prepare_image(
    image: Volume,
    *,
    shape: tuple[int, int, int] | None = None,
    spacing: Vector | None = None,
    resize: bool = False,
    normalisation: Normalisation = "zscore_nonzero",
    clip_percentiles: tuple[float, float] | None = None,
) -> Volume:
    """Takes an image to the network's grid.

    Args:
      image: ``[X, Y, Z]`` or ``[X, Y, Z, C]``, any orientation.
      shape: Voxels of the grid, to which the resampled image is cropped or padded; kept if None.
      spacing: Of the grid, mm, along LPS; the image's own if None.
      resize: Whether to choose the spacing such that the whole image fills the shape.
      normalisation: See `normalise`.
      clip_percentiles: Of each channel, to which its intensities are clipped first; not if None.

    Returns:
      float32 ``[*shape, C]``, axes along LPS as nearly as an image that is oblique can be; C = 1
      for an image without channels. 0 where padded.

    Raises:
      InputError: If the spacing makes an absurd grid, or is given beside ``resize``.
    """
    volume = reorient(image)
    if resize:
        if shape is None or spacing is not None:
            raise InputError(f"resize needs a shape and no spacing, got {shape} and {spacing}.")
        spacing = tuple((np.multiply(volume.shape, volume.spacing) / shape).tolist())
    if spacing is not None:
        volume = resample(volume, spacing=spacing, interpolation="linear")
    array = volume.array if volume.array.ndim == 4 else volume.array[..., None]
    if clip_percentiles is not None:
        low, high = np.percentile(array, clip_percentiles, axis=(0, 1, 2))
        array = np.clip(array, low.astype(np.float32), high.astype(np.float32))
    volume = dataclasses.replace(volume, array=normalise(array, method=normalisation))
    return volume if shape is None else crop_or_pad(volume, shape)


def prepare_labels(
    labels: Volume, prepared: Volume, *, label_map: Mapping[int, int] | None = None
) -> Volume:
    """Takes the labels of an image to the grid on which the image was prepared.

    Args:
      labels: ``[X, Y, Z]``, whole numbers.
      prepared: What `prepare_image` made of the image.
      label_map: See `remap_labels`; every value from 0 to 255 is kept if None.

    Returns:
      uint8 ``[X, Y, Z]`` on the grid of ``prepared``; 0 where padded.

    Raises:
      InputError: If a label value is outside of the map.
    """
    label_map = {value: value for value in range(256)} if label_map is None else label_map
    mapped = dataclasses.replace(labels, array=remap_labels(labels.array, label_map))
    return resample_labels(mapped, prepared)


def restore(
    prediction: Volume, original: Volume, *, interpolation: Interpolation, fill: float = 0.0
) -> Volume:
    """Takes a prediction on a prepared grid back to the original image's grid: the inverse.

    Args:
      prediction: A class map or probabilities, ``[X, Y, Z]`` or ``[X, Y, Z, K]``.
      original: The image that was prepared.
      interpolation: ``"nearest"`` for a class map, ``"linear"`` for probabilities.
      fill: Value of the original's voxels that the prepared grid had cropped away.

    Returns:
      The prediction with the spatial shape and the very geometry of ``original``; exact, voxel
      for voxel, when preparation kept the spacing.
    """
    return resample_to(prediction, original, interpolation=interpolation, fill=fill)


def reorient(volume: Volume, *, orientation: str = "LPS") -> Volume:
    """Permutes and flips the axes; values are untouched, and stay where they are in the patient.

    Args:
      volume: Any orientation; of an oblique one each axis goes by the direction nearest to it.
      orientation: Three letters, the sense in which each axis grows: L or R, P or A, S or I.

    Returns:
      The volume with its axes in that order and sense.

    Raises:
      ValueError: If the orientation is not three such letters, one of each pair.
    """
    target = np.zeros((3, 3))
    for axis, letter in enumerate(orientation):
        for world, pair in enumerate(_AXIS_LETTERS):
            if letter in pair:
                target[world, axis : axis + 1] = 1 - 2 * pair.index(letter)
    if len(orientation) != 3 or abs(np.linalg.det(target)) != 1:
        raise ValueError(
            f"orientation must have one letter of each of {_AXIS_LETTERS}, got {orientation!r}."
        )
    return _align_axes(volume, target)


def resample(volume: Volume, *, spacing: Vector, interpolation: Interpolation) -> Volume:
    """Resamples to a spacing, on a grid of the same centre and axes that covers the same extent.

    The number of voxels is the extent divided by the spacing, rounded up, so that nothing at the
    rim is lost; the outermost centres still lie inside of the volume.

    Args:
      volume: ``[X, Y, Z]`` or ``[X, Y, Z, C]``.
      spacing: Along each array axis, mm.
      interpolation: ``"nearest"`` keeps the data type, the others give float32.

    Returns:
      The resampled volume; the volume itself if it has that spacing.

    Raises:
      InputError: If the spacing is not positive or makes a grid that is too large to hold.
    """
    spacing = tuple(float(value) for value in spacing)
    if len(spacing) != 3 or not all(0 < value < math.inf for value in spacing):
        raise InputError(f"spacing must be three positive numbers in mm, got {spacing}.")
    if np.allclose(spacing, volume.spacing, rtol=0, atol=1e-6):
        return volume
    extent = np.multiply(volume.shape, volume.spacing)
    shape = tuple(
        max(1, math.ceil(length - _TOLERANCE_VOXELS)) for length in (extent / spacing).tolist()
    )
    if math.prod(shape) * math.prod(volume.array.shape[3:]) > MAX_NUM_VALUES:
        raise InputError(
            f"spacing {spacing} mm makes a grid of {shape} voxels of a volume of {volume.shape} "
            f"at {volume.spacing} mm, more than {MAX_NUM_VALUES} values: choose a coarser one."
        )
    centre = volume.origin + volume.matrix @ ((np.array(volume.shape) - 1) / 2)
    rotation = np.reshape(volume.direction, (3, 3))
    origin = centre - (rotation * spacing) @ ((np.array(shape) - 1) / 2)
    grid = _empty_grid(shape, spacing, tuple(origin), volume.direction)
    return dataclasses.replace(
        grid, array=interpolate(volume, grid, interpolation=interpolation, fill=0.0)
    )


def resample_to(
    volume: Volume, reference: Volume, *, interpolation: Interpolation, fill: float = 0.0
) -> Volume:
    """Resamples onto the grid of another volume.

    Args:
      volume: ``[X, Y, Z]`` or ``[X, Y, Z, C]``.
      reference: Whose grid is taken; its values and channels do not matter.
      interpolation: ``"nearest"`` keeps the data type, the others give float32.
      fill: Value of the voxels that lie outside of the volume.

    Returns:
      The volume with the spatial shape, spacing, origin and direction of ``reference``. Where the
      grids differ by whole voxels and by the order and sense of axes only, values are copied, in
      their own data type.
    """
    array = _copy_voxels(volume, reference, fill=fill)
    if array is None:
        array = interpolate(volume, reference, interpolation=interpolation, fill=fill)
    return dataclasses.replace(reference, array=array)


def resample_labels(labels: Volume, reference: Volume) -> Volume:
    r"""Resamples a class map onto another grid so that every lesion keeps its volume.

    A lesion is a 26-connected component of the foreground, of volume V. It takes the

    .. math:: n = \max(1, \mathrm{round}(V / v))

    voxels of volume v that it covers most; of a lesion that the grid cuts off, V is what lies
    inside. A threshold on the covered share, such as nearest interpolation is, would lose lesions
    that are thinner than a voxel; to take every voxel that is touched makes all of them grow. Each
    voxel gets the class that covers most of it.

    Args:
      labels: uint8 ``[X, Y, Z]``, 0 = background.
      reference: Whose grid is taken; its values and channels do not matter.

    Returns:
      uint8 with the spatial shape and geometry of ``reference``; 0 outside of the labels. Values
      are copied where the grids differ by whole voxels and by the order and sense of axes only.
      Lesions closer to each other than the voxels of the reference may touch.
    """
    array = _copy_voxels(labels, reference, fill=0)
    if array is None:
        array = np.zeros(reference.shape, np.uint8)
        components, _ = label_components(labels.array)
        for index, box in enumerate(ndimage.find_objects(components), start=1):
            classes = np.where(components[box] == index, labels.array[box], 0)
            start = np.array([side.start for side in box])
            origin = tuple(labels.origin + labels.matrix @ start)
            _paint_lesion(
                array, dataclasses.replace(labels, array=classes, origin=origin), reference
            )
    return dataclasses.replace(reference, array=array)


def crop_or_pad(volume: Volume, shape: tuple[int, int, int], *, fill: float = 0.0) -> Volume:
    """Crops and pads about the centre, each axis as it needs; the origin moves along.

    Args:
      volume: ``[X, Y, Z]`` or ``[X, Y, Z, C]``.
      shape: Voxels that the result has.
      fill: Value of the padding.

    Returns:
      The volume on the new grid; an odd difference leaves its extra voxel at the far end.

    Raises:
      InputError: If the shape is not three positive whole numbers.
    """
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(f"shape must be three positive whole numbers of voxels, got {shape}.")
    start = np.fix(np.subtract(volume.shape, shape) / 2).astype(int)
    origin = tuple(volume.origin + volume.matrix @ start)
    array = _window(volume.array, start, shape, fill=fill)
    return dataclasses.replace(volume, array=array, origin=origin)


def content_box(original: Volume, prepared: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Which voxels of a prepared volume hold something of the original, and which are padding.

    Args:
      original: The image as it was read.
      prepared: What `prepare_image` made of it.

    Returns:
      ``start, stop``, two int32 ``[3]``: the box ``[start, stop)`` of the prepared voxels whose
      centres lie inside of the original; empty, with stop = start, if there are none.
    """
    corners = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in original.shape)))).T
    points = np.reshape(original.origin, (3, 1)) + original.matrix @ corners
    indices = np.linalg.solve(prepared.matrix, points - np.reshape(prepared.origin, (3, 1)))
    start = np.ceil(indices.min(axis=1) - _TOLERANCE_VOXELS)
    stop = np.floor(indices.max(axis=1) - _TOLERANCE_VOXELS) + 1
    start = np.clip(start, 0, prepared.shape).astype(np.int32)
    return start, np.maximum(start, np.clip(stop, 0, prepared.shape)).astype(np.int32)


def normalise(array: np.ndarray, *, method: Normalisation) -> np.ndarray:
    r"""Normalises intensities, each channel by itself.

    .. math:: z = (x - \mu) / \sigma

    with the mean and the population standard deviation of the region.

    Args:
      array: ``[X, Y, Z]`` or ``[X, Y, Z, C]``.
      method: ``"zscore_nonzero"`` takes the voxels that are not zero as the region, and leaves the
        others zero; ``"zscore"`` takes all voxels; ``"none"`` changes nothing but the data type.

    Returns:
      float32 of the same shape; a channel that is constant over its region becomes zero there.

    Raises:
      ValueError: If the method is another one.
    """
    if method not in get_args(Normalisation):
        raise ValueError(f"method must be one of {get_args(Normalisation)}, got {method!r}.")
    if method == "none":
        return array.astype(np.float32)
    result = np.zeros(array.shape, np.float32)
    channels = [...] if array.ndim == 3 else [(..., c) for c in range(array.shape[-1])]
    for channel in channels:
        values = array[channel].astype(np.float64)
        region = values != 0 if method == "zscore_nonzero" else np.ones(values.shape, bool)
        inside = values[region]
        if inside.size and inside.max() > inside.min():
            result[channel][region] = (inside - inside.mean()) / inside.std()
    return result


def remap_labels(array: np.ndarray, label_map: Mapping[int, int]) -> np.ndarray:
    """Replaces every label value by its partner in a map.

    Args:
      array: Whole numbers, in any data type.
      label_map: From every value that may occur to its class, 0 to 255.

    Returns:
      uint8 of the same shape.

    Raises:
      InputError: If a value is not in the map, or its class is out of range.
    """
    values = np.unique(array).tolist()
    outside = [value for value in values if value not in label_map]
    if outside:
        raise InputError(
            f"label value {outside[0]:g} is not among {sorted(label_map)}: "
            "correct the labels, or add the value to the label map."
        )
    if wrong := [label_map[value] for value in values if not 0 <= label_map[value] <= 255]:
        raise InputError(f"the label map must lead to classes from 0 to 255, got {wrong[0]}.")
    classes = np.zeros(array.shape, np.uint8)
    for value in values:
        classes[array == value] = label_map[value]
    return classes


def _align_axes(volume: Volume, direction: np.ndarray) -> Volume:
    """Permutes and flips axes so that each points as nearly along that column as it can."""
    cosines = np.reshape(volume.direction, (3, 3)).T @ direction
    order = max(
        itertools.permutations(range(3)),
        key=lambda axes: sum(abs(cosines[axis, column]) for column, axis in enumerate(axes)),
    )
    signs = [-1 if cosines[axis, column] < 0 else 1 for column, axis in enumerate(order)]
    array = np.transpose(volume.array, (*order, 3)[: volume.array.ndim])
    far_corner = np.array(
        [n - 1 if sign < 0 else 0 for n, sign in zip(array.shape[:3], signs, strict=True)]
    )
    matrix = volume.matrix[:, order]
    rotation = np.reshape(volume.direction, (3, 3))[:, order] * signs
    return Volume(
        array[tuple(slice(None, None, sign) for sign in signs)],
        tuple(volume.spacing[axis] for axis in order),
        tuple(volume.origin + matrix @ far_corner),
        tuple(rotation.ravel().tolist()),
    )


def _copy_voxels(volume: Volume, reference: Volume, *, fill: float) -> np.ndarray | None:
    """Values on the reference's grid where no interpolation is needed; None where it is."""
    aligned = _align_axes(volume, np.reshape(reference.direction, (3, 3)))
    offset = np.linalg.solve(aligned.matrix, np.subtract(reference.origin, aligned.origin))
    step = np.linalg.solve(aligned.matrix, reference.matrix)
    start = np.rint(offset).astype(int)
    # How far apart the grids are at the far end of the reference, in voxels.
    drift = np.abs(offset - start).max() + np.abs((step - np.eye(3)) @ reference.shape).max()
    if drift >= _TOLERANCE_VOXELS:
        return None
    return _window(aligned.array, start, reference.shape, fill=fill)


def _paint_lesion(array: np.ndarray, lesion: Volume, reference: Volume) -> None:
    """Writes one lesion into the array of a class map on the reference's grid."""
    # Its voxels in indices of the reference, and how much of each lies inside of that grid.
    points = np.reshape(lesion.origin, (3, 1)) + lesion.matrix @ np.stack(np.nonzero(lesion.array))
    indices = np.linalg.solve(reference.matrix, points - np.reshape(reference.origin, (3, 1)))
    step = np.linalg.solve(reference.matrix, lesion.matrix)
    end = np.reshape(reference.shape, (3, 1)) - 0.5
    thirds = itertools.product((-1 / 3, 0, 1 / 3), repeat=3)
    parts_inside = [
        ((shifted >= -0.5) & (shifted < end)).all(axis=0)
        for shifted in (indices + np.reshape(step @ third, (3, 1)) for third in thirds)
    ]
    num_inside = float(np.mean(parts_inside, axis=0).sum())
    if num_inside == 0:
        return
    num_voxels = max(1, round(num_inside * abs(np.linalg.det(step))))

    reach = np.abs(step).sum(axis=1)
    start = np.clip(np.floor(indices.min(axis=1) - reach), 0, None).astype(int)
    stop = np.ceil(indices.max(axis=1) + reach).astype(int) + 1
    stop = np.minimum(stop, reference.shape)
    # Along each axis of each voxel, two points at least for every voxel of the lesion's grid.
    lesion_voxels = np.abs(np.linalg.inv(step)).max(axis=0)
    parts = np.clip(np.ceil(2 * lesion_voxels), 2, _MAX_SAMPLES).astype(int)
    samples = _empty_grid(
        tuple((stop - start) * parts),
        tuple(np.divide(reference.spacing, parts)),
        tuple(reference.origin + reference.matrix @ (start + 0.5 / parts - 0.5)),
        reference.direction,
    )
    padded = np.pad(lesion.array, 1)
    origin = tuple(lesion.origin - lesion.matrix.sum(axis=1))
    cover = {}
    for value in np.unique(padded[padded > 0]).tolist():
        part = dataclasses.replace(lesion, array=(padded == value).astype(np.uint8), origin=origin)
        # Linear, so that of two voxels at the rim the one nearer to the middle counts more.
        sampled = interpolate(part, samples, interpolation="linear", fill=0.0)
        blocks = itertools.chain(*zip(stop - start, parts, strict=True))
        cover[value] = sampled.reshape(*blocks).mean(axis=(1, 3, 5))
    total = sum(cover.values())
    target = array[tuple(slice(*ends) for ends in zip(start, stop, strict=True))]
    # What another lesion took stays its own.
    total[target > 0] = 0
    order = np.argsort(-total, axis=None, kind="stable")[:num_voxels]
    chosen = np.unravel_index(order[total.ravel()[order] > 0], total.shape)
    values = np.array(list(cover), np.uint8)
    target[chosen] = values[np.argmax([c[chosen] for c in cover.values()], axis=0)]


def _window(
    array: np.ndarray, start: np.ndarray, shape: tuple[int, int, int], *, fill: float
) -> np.ndarray:
    """Voxels ``[start, start + shape)`` of an array, ``fill`` where they lie outside of it."""
    result = np.full((*shape, *array.shape[3:]), fill, array.dtype)
    source, target = [], []
    for begin, length, available in zip(start.tolist(), shape, array.shape[:3], strict=True):
        low, high = max(begin, 0), max(min(begin + length, available), max(begin, 0))
        source.append(slice(low, high))
        target.append(slice(low - begin, high - begin))
    result[tuple(target)] = array[tuple(source)]
    return result


def _empty_grid(
    shape: tuple[int, ...], spacing: Vector, origin: Vector, direction: tuple[float, ...]
) -> Volume:
    """A volume that stands for its grid only: one byte, seen as many."""
    return Volume(np.broadcast_to(np.uint8(0), shape), spacing, origin, direction)
