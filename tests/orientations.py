"""Volumes in all 48 orders and senses of axes, along the patient's or oblique to them."""

import itertools

import numpy as np

from afl_jax.data.volume import Volume

# Euler angles of about 20, 10 and 5 degrees.
_cx, _sx, _cy, _sy, _cz, _sz = (f(a) for a in (0.35, 0.17, 0.09) for f in (np.cos, np.sin))
TILT = (
    np.array([[1, 0, 0], [0, _cx, -_sx], [0, _sx, _cx]])
    @ np.array([[_cy, 0, _sy], [0, 1, 0], [-_sy, 0, _cy]])
    @ np.array([[_cz, -_sz, 0], [_sz, _cz, 0], [0, 0, 1]])
)
ORIENTATIONS = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def create_volume(order=(0, 1, 2), signs=(1, 1, 1), rotation=None, shape=(5, 6, 7)) -> Volume:
    """Every value is different, so that a voxel in a wrong place is seen."""
    direction = np.eye(3)[:, list(order)] * signs
    if rotation is not None:
        direction = rotation @ direction
    array = np.arange(1, np.prod(shape) + 1, dtype=np.int16).reshape(shape)
    return Volume(array, (0.5, 1.0, 3.0), (12.0, -7.0, 30.0), tuple(direction.ravel()))
