r"""How irregular the surface of lesions is, whatever their size, their number and their grid.

A digital surface has no normal and no area of its own: a staircase of voxel faces is half again as
large as the ball that it approximates, and a lesion of thirty voxels is mostly staircase. So areas
are estimated by Crofton's formula. A line in direction d meets a surface as often as the mask
changes along it, and the mean over all directions of the area swept, counted as often as it is met,
is half the area of the surface (in a plane: :math:`2 / \pi` of the length of a curve):

.. math:: A = 2 \sum_d w_d \, T_d \, \frac{V_{voxel}}{\ell_d}

over the 13 directions of the 26 neighbours (4 directions in a plane), with :math:`T_d` the changes
between neighbours in direction d, :math:`\ell_d` the length of that step in mm, and :math:`w_d` the
share of the sphere that is nearest to d. Samples a step apart miss chords shorter than the step, so
that small and thin things come out too small; for a ball of radius r the expected share that is
seen is exact,

.. math:: F(x) = 1 - \frac{x^2}{3} \; (x \le 1), \quad \frac{2}{3 x} \; (x > 1),
          \qquad x = \frac{\ell_d}{2 r}

and the ball with which a lesion is compared is measured through the same samples. The ratio of
the two is close to 1 for a ball of a single voxel as of ten thousand.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from afl_jax.distance import spacing_or_ones
from afl_jax.statistics import foreground_and_valid

# Directions that measure the share of each step: on half a circle, and on half a sphere, where each
# stands for the 24 that swapping and turning the axes makes of it.
_NUM_POINTS_2D, _NUM_POINTS_3D = 1000, 100


def surface_irregularity(
    labels: jax.Array,
    *,
    spacing: jax.Array | None = None,
    voxel_mask: jax.Array | None = None,
) -> jax.Array:
    r"""By how much the surface of the lesions exceeds that of balls of the same volumes.

    .. math:: \rho = \max\left(\frac{A}{\sum_i A_{ball}(V_i)} - 1, \; 0\right)

    where A is the area of the surface of the foreground and :math:`V_i` the volume of its i-th
    26-connected component (8-connected in a plane, where area and volume mean length and area).
    Both areas are what the same samples see of them (see the module). It depends on no size: a
    ball has 0, an ellipsoid of axes 2 : 1 : 1 has 0.08, a ragged or branched lesion 0.3 and more.

    Args:
      labels: ``[B, X, Y, Z]`` or ``[B, X, Y]``; foreground where greater than 0.
      spacing: Size of a voxel in mm, ``[B, 3]`` or ``[B, 2]``; 1 along each axis if None.
      voxel_mask: Voxels that exist, of the shape of ``labels``; all if None. Beyond them, as
        beyond the array, is background: a lesion that is cut off ends there.

    Returns:
      ``[B]``, not negative, without gradient; 0 for a volume without foreground.

    Raises:
      ValueError: If a shape is not as stated.

    References:
      Legland, Kieu, Devaux, Computation of Minkowski Measures on 2D and 3D Binary Images, 2007,
      https://doi.org/10.5566/ias.v26.p83-92
    """
    foreground, valid = foreground_and_valid(labels, voxel_mask)
    if valid is not None:
        foreground &= valid
    spacing = spacing_or_ones(labels, spacing)
    return jax.lax.stop_gradient(jax.vmap(_irregularity)(foreground, spacing))


def _irregularity(mask: jax.Array, spacing: jax.Array) -> jax.Array:
    steps, weights = _directions(spacing)
    voxel = jnp.prod(spacing)
    factor = 2.0 if mask.ndim == 3 else math.pi / 2
    area = factor * jnp.sum(weights * _changes(mask) * voxel / steps)
    areas_of_balls = _area_of_ball(component_sizes(mask) * voxel, steps, weights, mask.ndim)
    balls = jnp.sum(areas_of_balls)
    return jnp.maximum(area / jnp.where(balls > 0, balls, 1.0) - 1, 0.0)


def _offsets(num_axes: int) -> NDArray[np.int_]:
    """Steps to half of the 3^n - 1 neighbours: those whose first entry that is not 0 is 1."""
    steps = itertools.product((-1, 0, 1), repeat=num_axes)
    return np.array([step for step in steps if step > (0,) * num_axes])


def _directions(spacing: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Length of each step in mm, and the share of all directions that is nearest to it."""
    num_axes = len(spacing)
    steps_mm = _offsets(num_axes) * spacing[None]
    lengths = jnp.linalg.norm(steps_mm, axis=1)
    cosines = jnp.abs(_points(num_axes) @ (steps_mm / lengths[:, None]).T)
    nearest = jnp.argmax(cosines, axis=1)
    return lengths, jnp.mean(nearest[:, None] == jnp.arange(len(lengths))[None], axis=0)


def _points(num_axes: int) -> NDArray[np.float32]:
    """Evenly spread directions, the same after a flip or a swap of axes."""
    if num_axes == 2:
        angle = math.pi * (np.arange(_NUM_POINTS_2D) + 0.5) / _NUM_POINTS_2D
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    # A Fibonacci lattice, whose rows are x, y, z, and its images.
    height = (np.arange(_NUM_POINTS_3D) + 0.5) / _NUM_POINTS_3D
    angle = math.pi * (1 + math.sqrt(5)) * np.arange(_NUM_POINTS_3D)
    radius = np.sqrt(1 - height**2)
    lattice = np.stack([radius * np.cos(angle), radius * np.sin(angle), height])
    images = [
        lattice[list(order)] * np.array([[1.0], [sign_y], [sign_z]])
        for order in itertools.permutations(range(3))
        for sign_y, sign_z in itertools.product((1, -1), repeat=2)
    ]
    return np.concatenate(images, axis=1).T.astype(np.float32)


def _changes(mask: jax.Array) -> jax.Array:
    """In each direction, the number of neighbours that differ."""
    padded = jnp.pad(mask, 1)
    counts = []
    for offset in _offsets(mask.ndim):
        # Rolled over the edge there is padding on either side: nothing changes.
        neighbour = jnp.roll(padded, offset, axis=range(mask.ndim))
        counts.append(jnp.sum(padded != neighbour, dtype=jnp.int32))
    return jnp.stack(counts)


def _area_of_ball(
    volume: jax.Array, steps: jax.Array, weights: jax.Array, num_axes: int
) -> jax.Array:
    """Expected area ``[N]`` that the samples see of balls (discs) at random places; 0 for none."""
    is_ball = volume > 0
    volume = jnp.where(is_ball, volume, 1.0)
    radius = jnp.cbrt(3 / (4 * math.pi) * volume) if num_axes == 3 else jnp.sqrt(volume / math.pi)
    seen = jnp.zeros_like(radius)
    for step, weight in zip(steps, weights, strict=True):
        x = step / (2 * radius)
        # Chords of sin(angle) diameters; those above `angle` are longer than the step.
        angle = jnp.arcsin(jnp.minimum(x, 1.0))
        if num_axes == 3:
            share = jnp.where(x <= 1, 1 - jnp.square(x) / 3, 2 / (3 * x))
        else:
            short = (angle - jnp.sin(angle) * jnp.cos(angle)) / (2 * x)
            share = jnp.cos(angle) + short
        seen += weight * share
    area = 4 * math.pi * jnp.square(radius) if num_axes == 3 else 2 * math.pi * radius
    return jnp.where(is_ball, area * seen, 0.0)


def component_sizes(mask: jax.Array) -> jax.Array:
    """Voxels of each connected component, with the corners connected.

    Every voxel takes the smallest number among its neighbours, then the number that the voxel of
    that number has, until nothing changes: about as many rounds as the diameter has binary digits.

    Args:
      mask: ``[X, Y, Z]`` or ``[X, Y]`` bool.

    Returns:
      ``[N]`` int32, N voxels: the size of a component at its first voxel, 0 elsewhere.
    """
    num_voxels = mask.size
    own = jnp.where(mask, jnp.arange(num_voxels).reshape(mask.shape), num_voxels)

    def spread(number: jax.Array) -> jax.Array:
        for axis in range(mask.ndim):
            before, after = [[(0, 0)] * mask.ndim for _ in range(2)]
            before[axis], after[axis] = (1, 0), (0, 1)
            lower = jax.lax.slice_in_dim(
                jnp.pad(number, before, constant_values=num_voxels), 0, -1, axis=axis
            )
            upper = jax.lax.slice_in_dim(
                jnp.pad(number, after, constant_values=num_voxels), 1, None, axis=axis
            )
            number = jnp.minimum(number, jnp.minimum(lower, upper))
        number = jnp.where(mask, number, num_voxels)
        return jnp.append(number.ravel(), num_voxels)[number]

    def is_changing(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return state[1]

    def round_of(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number = spread(state[0])
        return number, jnp.any(number != state[0])

    number, _ = jax.lax.while_loop(is_changing, round_of, (own, jnp.any(mask)))
    return jnp.zeros(num_voxels, jnp.int32).at[number.ravel()].add(1, mode="drop")
