"""Procedural MR-like volumes with lesions: the data set that needs no download.

A case has three channels, named after the sequences whose contrast they imitate: T2W, ADC and HBV
(high b-value diffusion). In the field of view lies a body with a rim of fat, muscle, and an organ
of two zones, each tissue with its own mean in each channel, varied from case to case. A smooth bias
field multiplies every channel, a correlated texture and Rician noise lie over it.

Lesions sit inside the organ. Compared with what surrounds them they are darker in T2W, darker in
ADC and brighter in HBV. Distractors of the same sizes are changed as much in *one* channel only,
and other tissues are as dark or as bright as lesions are, so that no threshold on a channel finds
the lesions: their channels must be combined, and compared with the neighbourhood. The boundary is
blurred by partial volume.

Sizes are drawn log-uniformly: there are as many lesions from 40 to 80 mm3 as from 1000 to 2000. The
surface of a lesion is an ellipsoid whose radius is modulated by a smooth random field; its relative
amplitude is the roughness of the case. Every number of a case follows from (seed, split, index).
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from afl_jax.data.cases import Case
from afl_jax.data.records import ReadCase, RecordsBuilder
from afl_jax.data.volume import Vector, Volume
from afl_jax.errors import check_rules

CHANNELS = ("t2w", "adc", "hbv")

_SPLITS = ("train", "val")
# Mean intensity of each tissue in each channel, and how lesions and distractors change it.
_AIR = np.array([0.03, 0.03, 0.03])
_FAT = np.array([0.80, 0.30, 0.60])
_MUSCLE = np.array([0.35, 0.50, 0.40])
_OUTER_ZONE = np.array([0.70, 0.75, 0.35])
_INNER_ZONE = np.array([0.50, 0.60, 0.45])
_LESION = np.array([-0.32, -0.38, 0.28])
_TISSUE_VARIATION = 0.03
_BIAS_AMPLITUDE = 0.08
_TEXTURE_AMPLITUDE = 0.05
_NOISE_AMPLITUDE = 0.035
# Relative radius, from the centre of the field of view, at which each tissue ends.
_BODY_RADIUS, _MUSCLE_RADIUS, _ORGAN_RADIUS, _INNER_RADIUS = 0.95, 0.85, 0.68, 0.34


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhantomSettings:
    """What to generate.

    Attributes:
      num_train: Cases to train on.
      num_val: Cases to validate on.
      shape: Voxels of a volume.
      spacing: mm; slices are thicker than pixels, as they are in prostate MRI.
      lesion_volume_mm3: Smallest and largest volume of a lesion before it is cut into voxels.
      roughness: Smallest and largest relative amplitude of a lesion's surface.
      max_num_lesions: A case with lesions has from 1 to this many, each number as often.
      empty_fraction: Expected share of cases without lesion.
      seed: Of everything.
    """

    num_train: int = 160
    num_val: int = 16
    shape: tuple[int, int, int] = (48, 48, 16)
    spacing: Vector = (1.0, 1.0, 3.0)
    lesion_volume_mm3: tuple[float, float] = (36.0, 3000.0)
    roughness: tuple[float, float] = (0.0, 0.3)
    max_num_lesions: int = 3
    empty_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self):
        for name in ("shape", "spacing", "lesion_volume_mm3", "roughness"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        low_mm3, high_mm3 = self.lesion_volume_mm3
        low_roughness, high_roughness = self.roughness
        rules = {
            "num_train": ("at least 1", self.num_train >= 1),
            "num_val": ("at least 1", self.num_val >= 1),
            "shape": ("three whole numbers from 8", len(self.shape) == 3 and min(self.shape) >= 8),
            "spacing": ("three positive numbers", len(self.spacing) == 3 and min(self.spacing) > 0),
            "lesion_volume_mm3": ("0 < smallest <= largest", 0 < low_mm3 <= high_mm3),
            "roughness": ("0 <= least <= most <= 0.4", 0 <= low_roughness <= high_roughness <= 0.4),
            "max_num_lesions": ("at least 1", self.max_num_lesions >= 1),
            "empty_fraction": ("from 0 to 1", 0 <= self.empty_fraction <= 1),
            "seed": ("at least 0", self.seed >= 0),
        }
        check_rules(
            {name: (rule, getattr(self, name), holds) for name, (rule, holds) in rules.items()},
            where="phantom: ",
        )


class PhantomCase(NamedTuple):
    """One generated case.

    Attributes:
      image: float32 ``[X, Y, Z, C]``, C = 3; intensities around 0 to 1.
      labels: uint8 ``[X, Y, Z]``, 1 in lesions.
      roughness: Amplitude of the lesions' surface; NaN without lesion.
    """

    image: Volume
    labels: Volume
    roughness: float


class Phantom(RecordsBuilder):
    """Procedural MR-like volumes with lesions of varied size and roughness."""

    SETTINGS = PhantomSettings

    @classmethod
    def find_cases(cls, settings: PhantomSettings) -> list[Case]:
        """The cases of both splits, which are nowhere until they are read."""
        counts = {"train": settings.num_train, "val": settings.num_val}
        return [
            Case(f"phantom_{split}_{index:04d}")
            for split in _SPLITS
            for index in range(counts[split])
        ]

    @classmethod
    def config_name(cls, settings: PhantomSettings) -> str:
        """The numbers of cases and the grid."""
        shape = "x".join(str(n) for n in settings.shape)
        return f"{settings.num_train}-{settings.num_val}-{shape}"

    @property
    def num_classes(self) -> int:
        """Background and lesion."""
        return 2

    @property
    def num_channels(self) -> int:
        """As many as `CHANNELS`."""
        return len(CHANNELS)

    def split_cases(self) -> dict[str, list[Case]]:
        """The cases of ``train`` and ``val``."""
        num_train = self.settings.num_train
        return {"train": list(self.cases[:num_train]), "val": list(self.cases[num_train:])}

    def read_case(self, case: Case) -> ReadCase:
        """Generates one case."""
        _, split, index = case.case_id.split("_")
        image, labels, roughness = random_case(self.settings, split, int(index))
        return ReadCase(image, labels, roughness=roughness)


def random_case(settings: PhantomSettings, split: str, index: int) -> PhantomCase:
    """Generates one case.

    Args:
      settings: Of the data set.
      split: ``"train"`` or ``"val"``.
      index: Of the case in its split.

    Returns:
      The case, the same for the same arguments.
    """
    rng = np.random.default_rng([settings.seed, _SPLITS.index(split), index])
    radius = _random_radius(rng, settings)
    organ = radius < _ORGAN_RADIUS
    means = _paint_tissues(rng, radius)

    roughness = rng.uniform(*settings.roughness)
    is_empty = rng.random() < settings.empty_fraction
    num_lesions = 0 if is_empty else int(rng.integers(1, settings.max_num_lesions + 1))
    num_distractors = int(rng.integers(3, 7))
    labels = np.zeros(settings.shape, bool)
    free = organ.copy()
    for blob in range(num_lesions + num_distractors):
        is_lesion = blob < num_lesions
        mask = _random_blob(rng, settings, free, roughness=roughness)
        if is_lesion:
            change = _LESION * rng.uniform(0.8, 1.2)
            labels |= mask
        else:
            channel = int(rng.integers(len(CHANNELS)))
            change = np.where(np.arange(len(CHANNELS)) == channel, 1.3 * _LESION, 0.0)
        # The share of the lesion in a voxel at its boundary.
        share = ndimage.gaussian_filter(mask.astype(np.float64), 0.5)
        means = means + share[..., None] * change
        free &= ~ndimage.binary_dilation(mask)

    image = np.stack(
        [_scan(rng, means[..., c], settings.spacing) for c in range(len(CHANNELS))], axis=-1
    )
    return PhantomCase(
        Volume(image.astype(np.float32), settings.spacing),
        Volume(labels.astype(np.uint8), settings.spacing),
        roughness if num_lesions else float("nan"),
    )


def _random_radius(rng: np.random.Generator, settings: PhantomSettings) -> np.ndarray:
    """Relative distance of each voxel from the centre of a body: 1 at the rim of the view."""
    shape = np.array(settings.shape)
    centre = (shape - 1) / 2 + rng.uniform(-0.04, 0.04, 3) * shape
    semi_axes = shape / 2 * rng.uniform(0.9, 1.1, 3)
    offset = np.moveaxis(np.indices(settings.shape), 0, -1) - centre
    distance = np.linalg.norm(offset / semi_axes, axis=-1)
    extent_mm = float(np.mean(shape * settings.spacing))
    bumps = _smooth_field(rng, settings.shape, settings.spacing, scale_mm=extent_mm / 8)
    return distance * (1 + 0.06 * np.clip(bumps, -2, 2))


def _paint_tissues(rng: np.random.Generator, radius: np.ndarray) -> np.ndarray:
    """Mean intensity of each voxel in each channel, ``[X, Y, Z, C]``, before lesions."""
    means = np.broadcast_to(_AIR, (*radius.shape, len(CHANNELS))).copy()
    # From the outside in, each tissue over the ones before.
    for tissue, end in (
        (_FAT, _BODY_RADIUS),
        (_MUSCLE, _MUSCLE_RADIUS),
        (_OUTER_ZONE, _ORGAN_RADIUS),
        (_INNER_ZONE, _INNER_RADIUS),
    ):
        means[radius < end] = tissue + rng.normal(0, _TISSUE_VARIATION, len(CHANNELS))
    return ndimage.gaussian_filter(means, (0.6, 0.6, 0.6, 0))


def _random_blob(
    rng: np.random.Generator, settings: PhantomSettings, free: np.ndarray, *, roughness: float
) -> np.ndarray:
    """A connected bool mask of random size in the free region, where there is room for it."""
    volume_mm3 = np.exp(rng.uniform(*np.log(settings.lesion_volume_mm3)))
    radius_mm = (3 * volume_mm3 / (4 * np.pi)) ** (1 / 3)
    room_mm = ndimage.distance_transform_edt(free, sampling=settings.spacing)
    if not room_mm.any():
        return np.zeros(free.shape, bool)
    # Where the blob fits, if anywhere; else nearly where most of it does.
    candidates = np.argwhere(room_mm >= min(radius_mm, 0.9 * room_mm.max()))
    centre = candidates[rng.integers(len(candidates))]

    stretch = np.exp(rng.normal(0, 0.15, 3))
    stretch /= np.prod(stretch) ** (1 / 3)
    offset_mm = (np.moveaxis(np.indices(free.shape), 0, -1) - centre) * settings.spacing
    distance_mm = np.linalg.norm(offset_mm / stretch, axis=-1)
    bumps = _smooth_field(rng, free.shape, settings.spacing, scale_mm=0.4 * radius_mm)
    # Clipped, so that with a roughness of at most 0.4 the centre stays inside.
    surface_mm = radius_mm * (1 + roughness * np.clip(bumps, -2, 2))
    parts, _ = ndimage.label((distance_mm < surface_mm) & free)
    return parts == parts[tuple(centre)]


def _scan(rng: np.random.Generator, means: np.ndarray, spacing: Vector) -> np.ndarray:
    """One channel as a scanner would show it: bias field, texture and Rician noise."""
    extent_mm = float(np.mean(np.multiply(means.shape, spacing)))
    bias = _smooth_field(rng, means.shape, spacing, scale_mm=extent_mm / 4)
    texture = _smooth_field(rng, means.shape, spacing, scale_mm=1.5)
    signal = means * np.exp(_BIAS_AMPLITUDE * bias + _TEXTURE_AMPLITUDE * texture)
    real, imaginary = rng.normal(0, _NOISE_AMPLITUDE, (2, *means.shape))
    return np.hypot(signal + real, imaginary)


def _smooth_field(
    rng: np.random.Generator, shape: tuple[int, ...], spacing: Vector, *, scale_mm: float
) -> np.ndarray:
    """White noise, blurred to a correlation length, with mean 0 and standard deviation 1."""
    field = rng.standard_normal(shape)
    field = ndimage.gaussian_filter(field, scale_mm / np.array(spacing), mode="wrap", truncate=3)
    return (field - field.mean()) / field.std()
