"""The formulas of the paper in float64 numpy, one volume at a time, to test the package against.

Written from the formulas and not from the package: loops over channels, `numpy.gradient`, powers
of probabilities as printed. Logits must be moderate (below about 30), since nothing here is
guarded against overflow.
"""

import numpy as np

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
) -> float:
    """A-FL; gamma and alpha are a number or one for each channel."""
    num_channels = logits.shape[-1]
    maps = []
    for c, truth in enumerate(channel_truths(labels, num_channels)):
        is_background = num_channels > 1 and c == 0
        # The lesion whose size and smoothness count: all foreground for the background channel.
        lesion = labels > 0 if is_background else truth
        own_gamma = focusing_gamma(lesion) if gamma is None else _of_channel(gamma, c)
        own_alpha = balancing_alpha(lesion) if alpha is None else _of_channel(alpha, c)
        weight = {
            "voxel": np.where(lesion, own_alpha, 1 - own_alpha),
            "volume": own_alpha,
            "channel": own_alpha if is_background else 1 - own_alpha,
        }[balance]
        maps.append(weight * _focal_map(logits[..., c], truth, own_gamma))
    return float(np.mean(maps))


def focal(
    logits: np.ndarray, labels: np.ndarray, *, gamma: float = 2.0, alpha: float | None = None
) -> float:
    maps = []
    for c, truth in enumerate(channel_truths(labels, logits.shape[-1])):
        weight = 1.0 if alpha is None else np.where(truth, alpha, 1 - alpha)
        maps.append(weight * _focal_map(logits[..., c], truth, gamma))
    return float(np.mean(maps))


LOSSES = {"adaptive_focal": adaptive_focal, "focal": focal}


def _focal_map(logit: np.ndarray, truth: np.ndarray, gamma: float) -> np.ndarray:
    p = 1 / (1 + np.exp(-logit.astype(np.float64)))
    p_t = np.where(truth, p, 1 - p)
    return -((1 - p_t) ** gamma) * np.log(p_t)


def _of_channel(value: float | np.ndarray, c: int) -> float:
    return float(value if np.ndim(value) == 0 else value[c])
