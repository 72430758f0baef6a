"""Random augmentation of one volume, on the device: ``(key, image, labels) -> the same``.

Each function is jax only and made for ``jax.vmap`` over a batch of keys. Geometry moves image,
labels and voxel mask together; intensity changes the image alone, one draw a volume.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


def random_crop_start(
    key: jax.Array,
    labels: jax.Array,
    *,
    patch_shape: Sequence[int],
    foreground_probability: float = 0.0,
) -> jax.Array:
    """Draws where a crop begins: anywhere, or such that a foreground voxel is at its centre.

    Every offset from 0 to the last, at which the crop ends with the volume, can be drawn. Of the
    foreground each voxel is as likely as any other; a crop about one near the rim is moved inside.

    Args:
      key: PRNG key.
      labels: ``[*spatial]``, 0 = background.
      patch_shape: Voxels of the crop, at most those of the volume along each axis.
      foreground_probability: That the crop is centred on foreground, if there is any.

    Returns:
      int32 ``[number of spatial axes]``.

    Raises:
      ValueError: If the crop is larger than the volume.
    """
    if any(patch > size for patch, size in zip(patch_shape, labels.shape, strict=True)):
        raise ValueError(
            f"patch_shape must be at most the volume's {labels.shape}, got {tuple(patch_shape)}."
        )
    chosen, anywhere, *axis_keys = jax.random.split(key, 2 + labels.ndim)
    last = jnp.array(labels.shape) - jnp.array(patch_shape)
    start = jax.random.randint(anywhere, (labels.ndim,), 0, last + 1)
    if foreground_probability == 0:
        return start
    # A voxel at random, axis by axis: each index in proportion to the foreground behind it.
    remaining, voxel = labels > 0, []
    has_foreground = remaining.any()
    for axis_key in axis_keys:
        counts = remaining.sum(axis=tuple(range(1, remaining.ndim)))
        index = jax.random.categorical(axis_key, jnp.log(counts.astype(jnp.float32)))
        voxel.append(index)
        remaining = jnp.take(remaining, index, axis=0)
    centred = jnp.clip(jnp.stack(voxel) - jnp.array(patch_shape) // 2, 0, last)
    is_centred = jax.random.bernoulli(chosen, foreground_probability) & has_foreground
    return jnp.where(is_centred, centred, start)


def random_affine(
    key: jax.Array,
    spacing: jax.Array,
    *,
    extent: Sequence[int],
    max_translation: float,
    max_rotation_degrees: float,
    max_zoom: float,
    probability: float,
) -> tuple[jax.Array, jax.Array]:
    r"""Draws an affine map from voxels of the result to voxels of the volume.

    .. math:: v \mapsto S^{-1} R(\phi) S v / (1 + z) + t

    with the diagonal matrix S of the spacing, so that a rotation is one in the patient.

    Args:
      key: PRNG key.
      spacing: ``[number of spatial axes]``, mm.
      extent: Voxels of the volume along each axis.
      max_translation: Largest translation, as a share of the extent of each axis.
      max_rotation_degrees: Largest rotation phi, in the plane of the first two axes.
      max_zoom: Largest z, in absolute value.
      probability: That a volume is changed.

    Returns:
      The matrix ``[n, n]`` and the translation ``[n]``, voxels, about any centre; the identity
      and 0 for a volume that is not changed.
    """
    chosen, translated, rotated, zoomed = jax.random.split(key, 4)
    num_axes = len(extent)
    translation = jax.random.uniform(translated, (num_axes,), minval=-1.0, maxval=1.0)
    translation = max_translation * translation * jnp.array(extent, jnp.float32)
    angle = jax.random.uniform(rotated, (), minval=-1.0, maxval=1.0)
    angle = math.radians(max_rotation_degrees) * angle
    zoom = 1.0 + max_zoom * jax.random.uniform(zoomed, (), minval=-1.0, maxval=1.0)
    rotation = (
        jnp.eye(num_axes)
        .at[:2, :2]
        .set(jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]]))
    )
    matrix = rotation * spacing[None, :] / spacing[:, None] / zoom
    is_changed = jax.random.bernoulli(chosen, probability)
    return (
        jnp.where(is_changed, matrix, jnp.eye(num_axes)),
        jnp.where(is_changed, translation, 0.0),
    )


def sample(
    image: jax.Array,
    labels: jax.Array,
    voxel_mask: jax.Array,
    *,
    start: jax.Array,
    shape: Sequence[int],
    matrix: jax.Array,
    translation: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reads a crop of a volume through an affine map about the centre of the crop.

    Args:
      image: ``[*spatial, C]``; interpolated linearly.
      labels: ``[*spatial]``; the nearest voxel's.
      voxel_mask: ``[*spatial]``; the nearest voxel's.
      start: Where the crop begins, ``[n]``.
      shape: Its voxels.
      matrix: ``[n, n]``, see `random_affine`.
      translation: ``[n]``.

    Returns:
      Image, labels and voxel mask of the crop; 0, background and False outside of the volume.
    """
    grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, shape), indexing="ij"))
    centre = (jnp.array(shape, jnp.float32) - 1) / 2
    offsets = grid.reshape(len(shape), -1) - centre[:, None]
    points = matrix @ offsets + (centre + start + translation)[:, None]
    points = points.reshape(grid.shape)

    def read(array: jax.Array, order: int) -> jax.Array:
        return map_coordinates(array, list(points), order=order, mode="constant", cval=0)

    image = jax.vmap(lambda channel: read(channel, 1), in_axes=-1, out_axes=-1)(image)
    voxel_mask = read(voxel_mask.astype(jnp.uint8), 0).astype(bool)
    return image, read(labels, 0), voxel_mask


def random_flip(
    key: jax.Array, arrays: Sequence[jax.Array], *, num_axes: int, probability: float = 0.5
) -> tuple[jax.Array, ...]:
    """Flips each spatial axis with a probability of its own, all arrays alike.

    Args:
      key: PRNG key.
      arrays: Each begins with the spatial axes: image ``[*spatial, C]``, labels ``[*spatial]``.
      num_axes: Number of spatial axes.
      probability: That an axis is flipped.

    Returns:
      The arrays, in the same order.
    """
    flips = jax.random.bernoulli(key, probability, (num_axes,))
    for axis in range(num_axes):
        arrays = [jnp.where(flips[axis], jnp.flip(x, axis), x) for x in arrays]
    return tuple(arrays)


def random_noise(
    key: jax.Array, image: jax.Array, *, standard_deviation: float = 0.1, probability: float = 0.4
) -> jax.Array:
    """Adds Gaussian noise, with a probability.

    Args:
      key: PRNG key.
      image: ``[*spatial, C]``, normalised.
      standard_deviation: Of the noise, in units of the image.
      probability: That a volume gets any.

    Returns:
      The image.
    """
    chosen, drawn = jax.random.split(key)
    noise = standard_deviation * jax.random.normal(drawn, image.shape, image.dtype)
    return image + jnp.where(jax.random.bernoulli(chosen, probability), noise, 0.0)


def random_intensity(
    key: jax.Array,
    image: jax.Array,
    *,
    max_scale: float = 0.1,
    max_shift: float = 0.1,
    probability: float = 0.4,
) -> jax.Array:
    r"""Scales and shifts all intensities, with a probability.

    .. math:: x \mapsto (1 + a) \, x + b, \quad a \sim U(-s, s), \; b \sim U(-t, t)

    Args:
      key: PRNG key.
      image: ``[*spatial, C]``, normalised.
      max_scale: s.
      max_shift: t, in units of the image.
      probability: That a volume is changed.

    Returns:
      The image.
    """
    chosen, scaled, shifted = jax.random.split(key, 3)
    scale = 1.0 + jax.random.uniform(scaled, (), image.dtype, -max_scale, max_scale)
    shift = jax.random.uniform(shifted, (), image.dtype, -max_shift, max_shift)
    return jnp.where(jax.random.bernoulli(chosen, probability), scale * image + shift, image)


def random_gamma(
    key: jax.Array,
    image: jax.Array,
    *,
    exponents: tuple[float, float] = (0.7, 1.5),
    probability: float = 0.4,
) -> jax.Array:
    r"""Bends the intensities of each channel between its extremes, with a probability.

    .. math:: x \mapsto l + (h - l) \left(\frac{x - l}{h - l}\right)^g

    with the lowest l and the highest h of the channel and one exponent a volume, drawn
    log-uniformly.

    Args:
      key: PRNG key.
      image: ``[*spatial, C]``.
      exponents: Smallest and largest g.
      probability: That a volume is changed.

    Returns:
      The image; a constant channel as it is.
    """
    chosen, drawn = jax.random.split(key)
    low_log, high_log = map(math.log, exponents)
    exponent = jnp.exp(jax.random.uniform(drawn, (), image.dtype, low_log, high_log))
    axes = tuple(range(image.ndim - 1))
    low, high = image.min(axes, keepdims=True), image.max(axes, keepdims=True)
    span = jnp.where(high > low, high - low, 1.0)
    bent = low + span * ((image - low) / span) ** exponent
    return jnp.where(jax.random.bernoulli(chosen, probability), bent, image)


def augment(
    key: jax.Array,
    image: jax.Array,
    labels: jax.Array,
    voxel_mask: jax.Array,
    spacing: jax.Array,
    *,
    patch_shape: Sequence[int] | None = None,
    foreground_probability: float = 0.5,
    affine_probability: float = 0.0,
    max_translation: float = 0.1,
    max_rotation_degrees: float = 0.0,
    max_zoom: float = 0.0,
    flip_probability: float = 0.5,
    noise_probability: float = 0.4,
    intensity_probability: float = 0.4,
    gamma_probability: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All augmentations, for one volume: crop, affine map, flips, then intensities.

    The paper's are the crop (BraTS), translation, flips, noise, and scale and shift of intensity.

    Args:
      key: PRNG key.
      image: ``[*spatial, C]``, normalised.
      labels: ``[*spatial]``.
      voxel_mask: ``[*spatial]``, the voxels that exist.
      spacing: ``[number of spatial axes]``, mm.
      patch_shape: Voxels of the crop; the whole volume if None.
      foreground_probability: See `random_crop_start`.
      affine_probability: See `random_affine`.
      max_translation: See `random_affine`.
      max_rotation_degrees: See `random_affine`.
      max_zoom: See `random_affine`.
      flip_probability: See `random_flip`.
      noise_probability: See `random_noise`.
      intensity_probability: See `random_intensity`.
      gamma_probability: See `random_gamma`.

    Returns:
      Image, labels and voxel mask, of the shape of the crop.

    References:
      The authors' recipe: Islam et al., 2024, https://arxiv.org/abs/2407.09828
    """
    flip, noise, intensity, crop, affine, gamma = jax.random.split(key, 6)
    shape = labels.shape if patch_shape is None else tuple(patch_shape)
    start = jnp.zeros(labels.ndim, jnp.int32)
    if patch_shape is not None:
        start = random_crop_start(
            crop, labels, patch_shape=shape, foreground_probability=foreground_probability
        )
    # What never happens is not compiled: under vmap, both sides of a condition are computed.
    if affine_probability > 0:
        matrix, translation = random_affine(
            affine,
            spacing,
            extent=labels.shape,
            max_translation=max_translation,
            max_rotation_degrees=max_rotation_degrees,
            max_zoom=max_zoom,
            probability=affine_probability,
        )
        image, labels, voxel_mask = sample(
            image,
            labels,
            voxel_mask,
            start=start,
            shape=shape,
            matrix=matrix,
            translation=translation,
        )
    elif patch_shape is not None:
        image = jax.lax.dynamic_slice(image, (*start, 0), (*shape, image.shape[-1]))
        labels, voxel_mask = (jax.lax.dynamic_slice(x, start, shape) for x in (labels, voxel_mask))
    if flip_probability > 0:
        image, labels, voxel_mask = random_flip(
            flip, (image, labels, voxel_mask), num_axes=labels.ndim, probability=flip_probability
        )
    if noise_probability > 0:
        image = random_noise(noise, image, probability=noise_probability)
    if intensity_probability > 0:
        image = random_intensity(intensity, image, probability=intensity_probability)
    if gamma_probability > 0:
        image = random_gamma(gamma, image, probability=gamma_probability)
    return image, labels, voxel_mask
