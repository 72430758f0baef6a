"""From networks to a prediction of a whole volume: sliding window, mirroring, ensembles.

Functions that take functions: a network arrives as `apply_fn`, [N, X, Y, Z, C] to
[N, X, Y, Z, K]; `ensemble` and `with_mirroring` make another such function of it. To average
probabilities rather than logits, put `class_probs` inside `apply_fn`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import combinations, product
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

ApplyFn = Callable[[jax.Array], jax.Array]

# Width of the Gaussian blending window as a fraction of the patch: nnU-Net's and MONAI's value.
_SIGMA_FRACTION = 0.125


def class_probs(
    logits: jax.Array, *, activation: Literal["sigmoid", "softmax"] = "sigmoid"
) -> jax.Array:
    """Probabilities of the classes.

    Args:
        logits: [..., K].
        activation: "sigmoid" treats every channel by itself, as the paper's network does;
            "softmax" makes the channels add up to 1.

    Returns:
        float32 [..., K].

    Raises:
        ValueError: unknown activation, or "softmax" of a single channel, which is always 1.
    """
    logits = logits.astype(jnp.float32)
    if activation == "sigmoid":
        return jax.nn.sigmoid(logits)
    if activation != "softmax":
        raise ValueError(f'activation must be "sigmoid" or "softmax", got "{activation}".')
    if logits.shape[-1] == 1:
        raise ValueError('activation must be "sigmoid" for K = 1 channel, got "softmax".')
    return jax.nn.softmax(logits, axis=-1)


def labels_from_probs(probs: jax.Array) -> jax.Array:
    """Class map of a probability map.

    Args:
        probs: [..., K]. K = 1: the foreground; K >= 2: background first.

    Returns:
        int32 [...]: the foreground where its probability is above 0.5 for K = 1 and 2 (for
        K = 2 the background channel is not read: the authors' rule), else the first class of
        the largest probability.
    """
    if probs.shape[-1] <= 2:
        return (probs[..., -1] > 0.5).astype(jnp.int32)
    return jnp.argmax(probs, axis=-1).astype(jnp.int32)


def sliding_window(
    apply_fn: ApplyFn,
    image: ArrayLike,
    *,
    patch_shape: Sequence[int],
    overlap: float = 0.5,
    blend: Literal["gaussian", "constant"] = "gaussian",
    patch_batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    r"""Apply a network to one image of any size, patch by patch.

    .. math:: y(v) = \sum_i w_i(v) f_i(v), \qquad \sum_i w_i(v) = 1

    over the patches i that cover voxel v. The windows are products of one window per axis, each
    divided by its own sum over the axis; so they sum to 1 at every voxel, no second accumulator
    is needed, and corners, where a 3D Gaussian is tiny, lose no precision.

    `apply_fn` only ever sees arrays of shape [patch_batch, *patch_shape, C]. Pass a jitted
    function, the same for all images, and it compiles once whatever their sizes. It is called for
    the next patches before the last ones are read, so that a device computes while the host adds
    up. Memory beside the image and the network's own: two batches of patches and one sum of the
    size of the image.

    Args:
        apply_fn: [N, *patch_shape, C] to [N, *patch_shape, K].
        image: [X, Y, Z, C] or [X, Y, C]. Smaller than the patch: zeros are added on both sides,
            and the result is cropped back.
        patch_shape: voxels, one per spatial axis.
        overlap: share of a patch that its neighbour also covers, in [0, 1); the last patch of an
            axis is moved back to end at the border.
        blend: weight of a patch's voxels: "gaussian" trusts the centre more (sigma: an eighth of
            the patch), "constant" trusts all alike.
        patch_batch: number of patches in one call; the last call is filled up with zeros.
        progress: called with (patches done, patches in all) after each call.

    Returns:
        float32 [X, Y, Z, K] or [X, Y, K], on the host.

    Raises:
        ValueError: an argument out of its range, or `apply_fn` returns another shape.

    References:
        Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical
        image segmentation", 2021, https://doi.org/10.1038/s41592-020-01008-z
    """
    image, patch_shape = np.asarray(image, np.float32), tuple(patch_shape)
    if len(patch_shape) != image.ndim - 1 or min(patch_shape) < 1:
        raise ValueError(
            f"patch_shape must have {image.ndim - 1} positive sizes for an image of shape "
            f"{image.shape}, got {patch_shape}."
        )
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be in [0, 1), got {overlap}.")
    if blend not in ("gaussian", "constant"):
        raise ValueError(f'blend must be "gaussian" or "constant", got "{blend}".')
    if patch_batch < 1:
        raise ValueError(f"patch_batch must be at least 1, got {patch_batch}.")

    shape = image.shape[:-1]
    missing = [max(patch - size, 0) for patch, size in zip(patch_shape, shape, strict=True)]
    pads = [(gap // 2, gap - gap // 2) for gap in missing]
    image = np.pad(image, [*pads, (0, 0)])

    axis_windows = [
        _axis_windows(size, patch, overlap=overlap, blend=blend)
        for size, patch in zip(image.shape, patch_shape, strict=False)
    ]
    windows = list(product(*axis_windows))

    def apply_to_batches() -> Iterator[tuple[list, ArrayLike]]:
        for first in range(0, len(windows), patch_batch):
            chosen = windows[first : first + patch_batch]
            patches = np.zeros((patch_batch, *patch_shape, image.shape[-1]), np.float32)
            for patch, window in zip(patches, chosen, strict=False):
                patch[:] = image[tuple(region for region, _ in window)]
            yield chosen, apply_fn(patches)

    total, num_done = None, 0
    for chosen, outputs in _one_behind(apply_to_batches()):
        outputs = np.asarray(outputs, np.float32)
        if outputs.shape[:-1] != (patch_batch, *patch_shape):
            raise ValueError(
                f"apply_fn must return [N, *patch_shape, K] = {(patch_batch, *patch_shape)} + "
                f"(K,), got {outputs.shape}."
            )
        if total is None:
            # float64: hundreds of overlapping patches would cost float32 its sixth digit.
            total = np.zeros((*image.shape[:-1], outputs.shape[-1]), np.float64)
        for window, output in zip(chosen, outputs, strict=False):
            regions, weights = zip(*window, strict=True)
            _add_weighted(total[regions], output, weights)
        num_done += len(chosen)
        if progress is not None:
            progress(num_done, len(windows))
    inside = tuple(slice(low, low + size) for (low, _), size in zip(pads, shape, strict=True))
    return total[inside].astype(np.float32)


def _add_weighted(
    total: NDArray[np.float64], output: NDArray[np.float32], weights: Sequence[NDArray]
) -> None:
    """Adds a patch times its window to its part of the sum, slice by slice: these stay in cache."""
    first, *rest = weights
    plane = reduce(np.multiply.outer, rest).astype(np.float32)
    plane = np.repeat(plane[..., None], output.shape[-1], axis=-1)
    for part, values, weight in zip(total, output, first.astype(np.float32), strict=True):
        part += values * (weight * plane)


def _axis_windows(
    size: int, patch: int, *, overlap: float, blend: str
) -> list[tuple[slice, NDArray[np.float64]]]:
    """Where the patches lie along one axis, and their weights, which sum to 1 at every voxel."""
    step = max(1, round(patch * (1 - overlap)))
    starts = [*range(0, size - patch, step), size - patch]
    window = np.ones(patch)
    if blend == "gaussian":
        distance = np.arange(patch) - (patch - 1) / 2
        window = np.exp(-0.5 * (distance / (_SIGMA_FRACTION * patch)) ** 2)
    regions = [slice(start, start + patch) for start in starts]
    total = np.zeros(size)
    for region in regions:
        total[region] += window
    return [(region, window / total[region]) for region in regions]


def _one_behind(items: Iterator) -> Iterator:
    """Yields each item once the next one has been asked for."""
    previous = next(items)
    for item in items:
        yield previous
        previous = item
    yield previous


def ensemble(apply_fns: Sequence[ApplyFn]) -> ApplyFn:
    """Average several networks.

    Args:
        apply_fns: each [N, X, Y, Z, C] to [N, X, Y, Z, K], best with probabilities.

    Returns:
        A function like each of them, their mean.

    Raises:
        ValueError: there is none.
    """
    if not apply_fns:
        raise ValueError("apply_fns must hold at least one network, got none.")
    return lambda image: sum(apply_fn(image) for apply_fn in apply_fns) / len(apply_fns)


def with_mirroring(apply_fn: ApplyFn, axes: Sequence[int]) -> ApplyFn:
    """Test-time augmentation: average a network over all flips of the image.

    Leave the result unjitted and pass a jitted `apply_fn`: it then compiles once for all flips.

    Args:
        apply_fn: [N, X, Y, Z, C] to [N, X, Y, Z, K], best with probabilities.
        axes: the spatial axes to mirror, 0 = x, 1 = y, 2 = z; n axes cost 2^n calls. No axes:
            the network as it is.

    Returns:
        A function like `apply_fn`.

    Raises:
        ValueError: an axis is negative or named twice.
    """
    if len(set(axes)) != len(axes) or min(axes, default=0) < 0:
        raise ValueError(f"axes must be different spatial axes from 0, got {tuple(axes)}.")
    array_axes = [axis + 1 for axis in axes]
    flips = [flip for n in range(len(axes) + 1) for flip in combinations(array_axes, n)]

    def mirrored(image: jax.Array) -> jax.Array:
        # Every flip undoes itself.
        total = sum(jnp.flip(apply_fn(jnp.flip(image, flip)), flip) for flip in flips)
        return total / len(flips)

    return mirrored
