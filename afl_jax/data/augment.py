"""Random augmentation of one volume, on the device: ``(key, image, labels) -> the same``.

Each function is jax only and made for ``jax.vmap`` over a batch of keys. Geometry moves image,
labels and voxel mask together; intensity changes the image alone, one draw a volume.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


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


def augment(
    key: jax.Array,
    image: jax.Array,
    labels: jax.Array,
    voxel_mask: jax.Array,
    *,
    flip_probability: float = 0.5,
    noise_probability: float = 0.4,
    intensity_probability: float = 0.4,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The paper's flips, noise, and scale and shift of intensity, for one volume.

    Args:
      key: PRNG key.
      image: ``[*spatial, C]``, normalised.
      labels: ``[*spatial]``.
      voxel_mask: ``[*spatial]``, the voxels that exist.
      flip_probability: See `random_flip`.
      noise_probability: See `random_noise`.
      intensity_probability: See `random_intensity`.

    Returns:
      Image, labels and voxel mask.

    References:
      The authors' recipe: Islam et al., 2024, https://arxiv.org/abs/2407.09828
    """
    flip, noise, intensity = jax.random.split(key, 3)
    image, labels, voxel_mask = random_flip(
        flip, (image, labels, voxel_mask), num_axes=labels.ndim, probability=flip_probability
    )
    image = random_noise(noise, image, probability=noise_probability)
    image = random_intensity(intensity, image, probability=intensity_probability)
    return image, labels, voxel_mask
