"""The formulas of the paper in float64 numpy, one volume at a time, to test the package against.

Written from the formulas and not from the package: loops over channels, `numpy.gradient`, powers
of probabilities as printed. Logits must be moderate (below about 30), since nothing here is
guarded against overflow.
"""

import itertools
import math

import numpy as np
from scipy import ndimage
from scipy.special import expit, log_softmax, logsumexp

# --- statistics -----------------------------------------------------------------------------


def foreground_fraction(mask: np.ndarray) -> float:
    return np.count_nonzero(mask) / mask.size


def balancing_alpha(mask: np.ndarray) -> float:
    return np.count_nonzero(mask == 0) / mask.size


def surface_smoothness(mask: np.ndarray, *, region: str = "volume") -> float:
    longer_axes = [axis for axis, length in enumerate(mask.shape) if length > 1]
    squares = np.zeros(mask.shape)
    for axis in longer_axes:
        squares += np.gradient(mask.astype(np.float64), axis=axis) ** 2
    magnitude = np.sqrt(squares)
    if region == "volume":
        return magnitude.mean()
    return magnitude[magnitude > 0].mean() if magnitude.any() else 0.0


def focusing_gamma(mask: np.ndarray, *, region: str = "volume", scale: float = 1.0) -> float:
    return scale * (foreground_fraction(mask) + surface_smoothness(mask, region=region))


# --- irregularity ---------------------------------------------------------------------------


def seen_share(x: float, num_axes: int) -> float:
    """Share of a ball's (disc's) shadow that samples x diameters apart see."""
    if num_axes == 3:
        return 1 - x**2 / 3 if x <= 1 else 2 / (3 * x)
    if x > 1:
        return math.pi / (4 * x)
    return math.sqrt(1 - x**2) + (math.asin(x) - x * math.sqrt(1 - x**2)) / (2 * x)


def surface_irregularity(mask: np.ndarray, *, spacing: tuple[float, ...] | None = None) -> float:
    """Crofton's area over that of balls of the components' volumes, less 1."""
    num_axes = mask.ndim
    spacing = np.ones(num_axes) if spacing is None else np.asarray(spacing, float)
    if num_axes == 2:
        points = [(math.cos(a), math.sin(a)) for a in math.pi * (np.arange(1000) + 0.5) / 1000]
    else:
        points = []
        for i in range(100):
            height, angle = (i + 0.5) / 100, math.pi * (1 + math.sqrt(5)) * i
            ring = math.sqrt(1 - height**2)
            for order in itertools.permutations(
                (ring * math.cos(angle), ring * math.sin(angle), height)
            ):
                for signs in itertools.product((1, -1), repeat=3):
                    points.append(np.multiply(order, signs))
    points = np.array(points)

    steps = [
        np.array(s) for s in itertools.product((-1, 0, 1), repeat=num_axes) if s > (0,) * num_axes
    ]
    steps_mm = [step * spacing for step in steps]
    cosines = [abs(points @ step) / np.linalg.norm(step) for step in steps_mm]
    shares = np.bincount(np.argmax(cosines, axis=0), minlength=len(steps)) / len(points)
    components, num_components = ndimage.label(mask, np.ones((3,) * num_axes))
    voxel = math.prod(spacing)

    area = reference = 0.0
    padded = np.pad(mask, 1)
    for step, step_mm, share in zip(steps, steps_mm, shares, strict=True):
        length = np.linalg.norm(step_mm)
        num_changes = np.sum(padded != np.roll(padded, step, range(num_axes)))
        area += (2 if num_axes == 3 else math.pi / 2) * share * num_changes * voxel / length
        for c in range(1, num_components + 1):
            volume = np.sum(components == c) * voxel
            if num_axes == 3:
                radius = (3 * volume / (4 * math.pi)) ** (1 / 3)
                size = 4 * math.pi * radius**2
            else:
                radius = math.sqrt(volume / math.pi)
                size = 2 * math.pi * radius
            reference += share * size * seen_share(length / (2 * radius), num_axes)
    return max(area / reference - 1, 0.0) if reference else 0.0


# --- losses: logits [*spatial, K] and labels [*spatial] to a number ----------------------------


def channel_truths(labels: np.ndarray, num_channels: int) -> list[np.ndarray]:
    """What each channel's sigmoid should say, as bool."""
    if num_channels == 1:
        return [labels > 0]
    if num_channels == 2:
        return [labels == 0, labels > 0]
    return [labels == c for c in range(num_channels)]


def adaptive_focal(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    balance: str = "voxel",
    gamma: float | np.ndarray | None = None,
    alpha: float | np.ndarray | None = None,
    region: str = "volume",
    scale: float = 1.0,
    channel: int | None = None,
) -> float:
    """A-FL; gamma and alpha are a number or one for each channel. Of one channel, if given."""
    num_channels = logits.shape[-1]
    maps = []
    for c, truth in enumerate(channel_truths(labels, num_channels)):
        is_background = num_channels > 1 and c == 0
        # The lesion whose size and smoothness count: all foreground for the background channel.
        lesion = labels > 0 if is_background else truth
        if gamma is None:
            own_gamma = focusing_gamma(lesion, region=region, scale=scale)
        else:
            own_gamma = _of_channel(gamma, c)
        own_alpha = balancing_alpha(lesion) if alpha is None else _of_channel(alpha, c)
        weight = {
            "voxel": np.where(lesion, own_alpha, 1 - own_alpha),
            "volume": own_alpha,
            "channel": own_alpha if is_background else 1 - own_alpha,
        }[balance]
        maps.append(weight * _focal_map(logits[..., c], truth, own_gamma))
    return float(np.mean(maps if channel is None else maps[channel]))


def focal(
    logits: np.ndarray, labels: np.ndarray, *, gamma: float = 2.0, alpha: float | None = None
) -> float:
    maps = []
    for c, truth in enumerate(channel_truths(labels, logits.shape[-1])):
        weight = 1.0 if alpha is None else np.where(truth, alpha, 1 - alpha)
        maps.append(weight * _focal_map(logits[..., c], truth, gamma))
    return float(np.mean(maps))


def irregularity_focal(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    scale: float = 5.0,
    base: float = 0.0,
    alpha: float | None = 0.7,
    balance: str = "voxel",
) -> float:
    num_channels = logits.shape[-1]
    total = 0.0
    for c, truth in enumerate(channel_truths(labels, num_channels)):
        lesion = labels > 0 if num_channels > 1 and c == 0 else truth
        gamma = base + scale * surface_irregularity(lesion)
        own = adaptive_focal(logits, labels, balance=balance, gamma=gamma, alpha=alpha, channel=c)
        total += (1 + gamma) * own / num_channels
    return total


def cross_entropy(logits: np.ndarray, labels: np.ndarray, *, activation: str = "softmax") -> float:
    return float(_cross_entropy_map(logits, labels, activation).mean())


def top_k_cross_entropy(
    logits: np.ndarray, labels: np.ndarray, *, fraction: float = 0.1, activation: str = "softmax"
) -> float:
    values = np.sort(_cross_entropy_map(logits, labels, activation).ravel())
    return float(values[-math.ceil(fraction * values.size) :].mean())


def dice(
    logits: np.ndarray, labels: np.ndarray, *, exponent: int = 2, activation: str = "sigmoid"
) -> float:
    return float(np.mean([
        1 - (2 * np.sum(p * t) + 1e-5) / (np.sum(p**exponent) + np.sum(t) + 1e-5)
        for p, t in _probs_and_truths(logits, labels, activation)
    ]))  # fmt: skip


def iou(
    logits: np.ndarray, labels: np.ndarray, *, exponent: int = 2, activation: str = "sigmoid"
) -> float:
    losses = []
    for p, t in _probs_and_truths(logits, labels, activation):
        intersection = np.sum(p * t)
        union = np.sum(p**exponent) + np.sum(t) - intersection
        losses.append(1 - (2 * intersection + 1e-5) / (2 * union + 1e-5))
    return float(np.mean(losses))


def tversky(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    activation: str = "sigmoid",
) -> float:
    return float(np.mean(_tversky_distances(logits, labels, alpha, beta, activation)))


def focal_tversky(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 4 / 3,
) -> float:
    distances = _tversky_distances(logits, labels, alpha, beta, "sigmoid")
    return float(np.mean([d ** (1 / gamma) for d in distances]))


def generalised_dice(
    logits: np.ndarray, labels: np.ndarray, *, activation: str = "sigmoid"
) -> float:
    pairs = _probs_and_truths(logits, labels, activation)
    counts = [t.sum() for _, t in pairs]
    smallest = min((n for n in counts if n), default=1)
    weights = [(smallest / n) ** 2 if n else 1.0 for n in counts]
    error = sum(w * np.abs(p - t).sum() for w, (p, t) in zip(weights, pairs, strict=True))
    size = sum(w * (p + t).sum() for w, (p, t) in zip(weights, pairs, strict=True))
    return float(error / (size + 1e-5))


def boundary(
    logits: np.ndarray, labels: np.ndarray, *, spacing: tuple[float, ...] | None = None
) -> float:
    num_channels = logits.shape[-1]
    losses = []
    for c, (p, t) in enumerate(_probs_and_truths(logits, labels, "sigmoid")):
        mask = labels > 0 if num_channels > 1 and c == 0 else t > 0
        distance = np.zeros(mask.shape)
        if mask.any() and not mask.all():
            inside = ndimage.distance_transform_edt(mask, sampling=spacing)
            distance = inside + ndimage.distance_transform_edt(~mask, sampling=spacing)
        losses.append(np.mean(distance * np.abs(p - t)))
    return float(np.mean(losses))


def dice_cross_entropy(
    logits: np.ndarray, labels: np.ndarray, *, activation: str = "softmax"
) -> float:
    return dice(logits, labels, exponent=1, activation=activation) + cross_entropy(
        logits, labels, activation=activation
    )


def dice_focal(logits: np.ndarray, labels: np.ndarray, *, gamma: float = 2.0) -> float:
    return dice(logits, labels, exponent=1) + focal(logits, labels, gamma=gamma)


def dice_boundary(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    weight: float = 0.1,
    spacing: tuple[float, ...] | None = None,
) -> float:
    return dice(logits, labels, exponent=1) + weight * boundary(logits, labels, spacing=spacing)


def unified_focal(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    weight: float = 0.5,
    delta: float = 0.6,
    gamma: float = 0.5,
    activation: str = "softmax",
) -> float:
    logits = logits.astype(np.float64)
    if logits.shape[-1] == 1:
        logits = np.concatenate([0 * logits, logits], axis=-1)  # softmax: (1 - p, p)
    pairs = _probs_and_truths(logits, labels, activation)
    tverskys = _tversky_distances(logits, labels, 1 - delta, delta, activation)
    cross_entropy_sum = 0.0
    for c, (p, t) in enumerate(pairs):
        factor = delta if c else (1 - delta) * (1 - p) ** gamma
        cross_entropy_sum += np.sum(-factor * t * np.log(p))
    focal_tversky = [tverskys[0], *[d ** (1 - gamma) for d in tverskys[1:]]]
    return float(weight * np.mean(focal_tversky) + (1 - weight) * cross_entropy_sum / labels.size)


LOSSES = {
    "adaptive_focal": adaptive_focal,
    "irregularity_focal": irregularity_focal,
    "cross_entropy": cross_entropy,
    "focal": focal,
    "dice": dice,
    "iou": iou,
    "tversky": tversky,
    "dice_cross_entropy": dice_cross_entropy,
    "dice_focal": dice_focal,
    "focal_tversky": focal_tversky,
    "unified_focal": unified_focal,
    "generalised_dice": generalised_dice,
    "top_k_cross_entropy": top_k_cross_entropy,
    "boundary": boundary,
    "dice_boundary": dice_boundary,
}


def _probs_and_truths(
    logits: np.ndarray, labels: np.ndarray, activation: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Probability and truth of each channel, in float64; a softmax of one channel is a sigmoid."""
    logits = logits.astype(np.float64)
    num_channels = logits.shape[-1]
    if activation == "softmax" and num_channels > 1:
        probs = np.exp(log_softmax(logits, axis=-1))
    else:
        probs = expit(logits)
    truths = channel_truths(labels, num_channels)
    return [(probs[..., c], truth.astype(np.float64)) for c, truth in enumerate(truths)]


def _cross_entropy_map(logits: np.ndarray, labels: np.ndarray, activation: str) -> np.ndarray:
    logits = logits.astype(np.float64)
    truths = np.stack(channel_truths(labels, logits.shape[-1]), axis=-1)
    if activation == "softmax" and logits.shape[-1] > 1:
        return logsumexp(logits, axis=-1) - np.sum(logits * truths, axis=-1)
    return -np.log(expit(np.where(truths, logits, -logits)))


def _tversky_distances(
    logits: np.ndarray, labels: np.ndarray, alpha: float, beta: float, activation: str
) -> list[float]:
    distances = []
    for p, t in _probs_and_truths(logits, labels, activation):
        tp, fp, fn = np.sum(p * t), np.sum(p * (1 - t)), np.sum((1 - p) * t)
        distances.append(1 - (tp + 1e-5) / (tp + alpha * fp + beta * fn + 1e-5))
    return distances


def _focal_map(logit: np.ndarray, truth: np.ndarray, gamma: float) -> np.ndarray:
    p = 1 / (1 + np.exp(-logit.astype(np.float64)))
    p_t = np.where(truth, p, 1 - p)
    return -((1 - p_t) ** gamma) * np.log(p_t)


def _of_channel(value: float | np.ndarray, c: int) -> float:
    return float(value if np.ndim(value) == 0 else value[c])
