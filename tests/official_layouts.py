"""Cases in exactly the layouts in which PI-CAI 2022 and BraTS 2018 are downloaded.

The lesions, their glands and the grids of T2W are real where a folder of them is given, and
procedural otherwise; the images are painted around them. `make_picai2022` and `make_brats2018`
write the files. It is a tool of the tests and of the experiments' ``--smoke``.
"""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from afl_jax.data.picai2022 import official_folds
from afl_jax.data.preprocess import resample_to
from afl_jax.data.volume import Volume, read_volume, write_volume

_LABELS = Path("csPCa_lesion_delineations", "human_expert", "resampled")
_POOCH25 = Path("csPCa_lesion_delineations", "human_expert", "Pooch25")
_GLANDS = Path("anatomical_delineations", "whole_gland", "AI", "Bosma22b")
# Larger files have finer grids, which take longer to paint.
_MAX_MASK_BYTES = 8000
# As they occur among the experts' files.
_LABEL_TYPES = (np.uint16, np.int32, np.float64)


def make_picai2022(
    root: Path,
    *,
    case_ids: Sequence[str] | None = None,
    num_cases: int = 6,
    real_data: Path | None = None,
    seed: int = 0,
) -> Path:
    """Writes examinations with T2W, ADC and HBV on grids of their own, labels and marksheet.

    Args:
        root: The folder to make.
        case_ids: Of the official folds; in turn from all five, and real ones first, if None.
        num_cases: How many, if they are not named.
        real_data: Folder with ``picai_labels``, whose masks, glands and grids are taken.
        seed: Of everything that is drawn.

    Returns:
        ``root``, as `Picai2022Settings.source` wants it. Of ten cases, the fourth is in Pooch25,
        with a shape of its own, and procedural ones in the fifth and tenth place have no lesion.
    """
    labels = _LABELS if real_data is None else real_data / "picai_labels" / _LABELS
    case_ids = case_ids or _choose_cases(labels, num_cases)
    (root / "images").mkdir(parents=True)
    for folder in (_LABELS, _POOCH25):
        (root / "picai_labels" / folder).mkdir(parents=True)
    positive = {}
    for index, case_id in enumerate(case_ids):
        rng = np.random.default_rng([seed, index])
        lesion, gland = _procedural_masks(rng, with_lesion=index % 5 != 4)
        if (path := labels / f"{case_id}.nii.gz").is_file():
            lesion = read_volume(path)
            gland = resample_to(
                read_volume(real_data / "picai_labels" / _GLANDS / path.name),
                lesion,
                interpolation="nearest",
            )
        patient = case_id.split("_")[0]
        (root / "images" / patient).mkdir(exist_ok=True)
        for name, scan in _paint_scans(rng, lesion, gland).items():
            write_volume(root / "images" / patient / f"{case_id}_{name}.mha", scan)
        if index % 10 == 3:
            folder, labelled = _POOCH25, _widen(lesion)
        else:
            # ISUP 2 to 5 where there is a lesion, as the experts' files have it.
            grade = np.where(lesion.array > 0, 2 + index % 4, 0).astype(_LABEL_TYPES[index % 3])
            folder, labelled = _LABELS, dataclasses.replace(lesion, array=grade)
        write_volume(root / "picai_labels" / folder / f"{case_id}.nii.gz", labelled)
        positive[case_id] = bool(lesion.array.any())
    write_marksheet(root, positive)
    return root


def write_marksheet(root: Path, positive: dict[str, bool]) -> None:
    """Writes the table of which cases have significant cancer.

    Args:
        root: The folder of the data set.
        positive: By case.
    """
    path = root / "picai_labels" / "clinical_information" / "marksheet.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient_id", "study_id", "mri_date", "case_csPCa"])
        for case_id, is_positive in positive.items():
            writer.writerow([*case_id.split("_"), "2019-07-02", "YES" if is_positive else "NO"])


def make_brats2018(
    root: Path,
    *,
    num_hgg: int = 6,
    num_lgg: int = 4,
    shape: tuple[int, int, int] = (240, 240, 155),
    real_data: Path | None = None,
    seed: int = 0,
) -> Path:
    """Writes cases with four sequences and the labels 0, 1, 2 and 4, every third as ``.nii``.

    Args:
        root: The folder to make.
        num_hgg: High-grade cases.
        num_lgg: Low-grade cases.
        shape: Voxels of 1 mm.
        real_data: Folder with ``picai_labels``, whose lesions, enlarged, are the tumours.
        seed: Of everything that is drawn.

    Returns:
        ``root``, as `Brats2018Settings.source` wants it.
    """
    masks = []
    if real_data is not None:
        masks = sorted((real_data / "picai_labels" / _LABELS).glob("*.nii.gz"))
    for index in range(num_hgg + num_lgg):
        rng = np.random.default_rng([seed, index])
        lesion = read_volume(masks[index % len(masks)]).array > 0 if masks else None
        grade = "HGG" if index < num_hgg else "LGG"
        name = f"Brats18_TST_{index:03d}_1"
        folder = root / grade / name
        folder.mkdir(parents=True)
        suffix = ".nii" if index % 3 == 2 else ".nii.gz"
        labels, brain = _paint_tumour(rng, shape, lesion)
        # As the challenge has it: the patient's left and front at the origin.
        geometry = Volume(labels, origin=(0.0, -float(shape[1] - 1), 0.0))
        write_volume(folder / f"{name}_seg{suffix}", geometry)
        for sequence, image in _paint_sequences(rng, labels, brain).items():
            write_volume(
                folder / f"{name}_{sequence}{suffix}", dataclasses.replace(geometry, array=image)
            )
    return root


def _widen(lesion: Volume) -> Volume:
    """The same lesion, 0 or 1, on a grid with two slices more at either end."""
    array = np.pad((lesion.array > 0).astype(np.uint8), ((0, 0), (0, 0), (2, 2)))
    origin = tuple(lesion.origin - 2 * lesion.matrix[:, 2])
    return dataclasses.replace(lesion, array=array, origin=origin)


def _choose_cases(labels: Path, num_cases: int) -> list[str]:
    """Ids in turn from the five folds; those with a small real mask first."""
    real = {
        path.name.removesuffix(".nii.gz")
        for path in labels.glob("*.nii.gz")
        if path.stat().st_size < _MAX_MASK_BYTES
    }
    by_fold: list[list[str]] = [[] for _ in range(5)]
    for case_id, fold in official_folds().items():
        by_fold[fold].append(case_id)
    for case_ids in by_fold:
        case_ids.sort(key=lambda case_id: (case_id not in real, case_id))
    return [by_fold[index % 5][index // 5] for index in range(num_cases)]


def _procedural_masks(rng: np.random.Generator, *, with_lesion: bool) -> tuple[Volume, Volume]:
    """A lesion in a gland, on an oblique grid of thick slices."""
    shape, spacing = (160, 160, 20), (0.6, 0.6, 3.0)
    angle = rng.uniform(0.05, 0.3)
    cos, sin = np.cos(angle), np.sin(angle)
    grid = Volume(
        np.zeros(shape, np.uint8),
        spacing,
        tuple(rng.uniform(-100, -40, 3)),
        (1, 0, 0, 0, cos, sin, 0, -sin, cos),
    )
    points = np.moveaxis(np.indices(shape), 0, -1) * np.array(spacing)
    centre = np.multiply(shape, spacing) / 2
    gland = np.linalg.norm((points - centre) / (24, 19, 20), axis=-1) < 1
    lesion = np.zeros(shape, bool)
    if with_lesion:
        for _ in range(int(rng.integers(1, 3))):
            bumps = ndimage.gaussian_filter(rng.standard_normal(shape), (4, 4, 1))
            radii = rng.uniform((3, 3, 4), (8, 6, 8))
            middle = centre + rng.uniform(-10, 10, 3)
            distance = np.linalg.norm((points - middle) / radii, axis=-1)
            lesion |= distance < 1 + 0.1 * bumps / bumps.std()
    return tuple(dataclasses.replace(grid, array=mask.astype(np.uint8)) for mask in (lesion, gland))


def _paint_scans(rng: np.random.Generator, lesion: Volume, gland: Volume) -> dict[str, Volume]:
    """T2W on the lesion's grid; ADC and HBV coarser, with an origin and a field of their own."""
    inside, organ = lesion.array > 0, gland.array > 0
    means = {  # Surroundings, gland, lesion; in the units of a scanner.
        "t2w": (200.0, 420.0, 230.0),
        "adc": (900.0, 1500.0, 750.0),
        "hbv": (25.0, 30.0, 60.0),
    }
    shift_mm = rng.uniform(-4, 4, 3)
    scans = {}
    for name, (outside, healthy, sick) in means.items():
        mean = np.where(inside, sick, np.where(organ, healthy, outside)).astype(np.float32)
        mean = ndimage.gaussian_filter(mean, (1, 1, 0))
        noise = rng.standard_normal(mean.shape, np.float32)
        scan = dataclasses.replace(lesion, array=np.maximum(mean * (1 + 0.1 * noise), 1.0))
        if name != "t2w":
            scan = resample_to(scan, _coarse_grid(lesion, shift_mm), interpolation="linear")
        scans[name] = dataclasses.replace(scan, array=np.rint(scan.array).astype(np.int16))
    return scans


def _coarse_grid(volume: Volume, shift_mm: np.ndarray) -> Volume:
    """2 mm pixels on the same slices, about a centre nearby, 16 mm wider than the volume."""
    spacing = (2.0, 2.0, volume.spacing[2])
    extent = np.multiply(volume.shape, volume.spacing) + np.array([16, 16, 0])
    shape = tuple(int(np.ceil(n)) for n in extent / spacing)
    centre = volume.origin + volume.matrix @ ((np.array(volume.shape) - 1) / 2)
    matrix = np.reshape(volume.direction, (3, 3)) * spacing
    origin = centre + shift_mm - matrix @ ((np.array(shape) - 1) / 2)
    return Volume(np.zeros(shape, np.uint8), spacing, tuple(origin), volume.direction)


def _paint_tumour(
    rng: np.random.Generator, shape: tuple[int, int, int], lesion: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Labels with oedema 2 around a core 1 with a rim 4 that enhances, and the brain."""
    points = np.moveaxis(np.indices(shape), 0, -1)
    middle = (np.array(shape) - 1) / 2
    brain = np.linalg.norm((points - middle) / (0.42 * np.array(shape)), axis=-1) < 1
    size = np.array(shape) // 3
    if lesion is not None and lesion.any():
        crop = lesion[ndimage.find_objects(lesion.astype(np.uint8))[0]].astype(np.float32)
        blob = ndimage.zoom(np.pad(crop, 1), size / (np.array(crop.shape) + 2), order=1) > 0.4
    else:
        bumps = ndimage.gaussian_filter(rng.standard_normal(size), size / 8)
        grid = (np.moveaxis(np.indices(size), 0, -1) - size / 2) / (size / 2)
        blob = np.linalg.norm(grid, axis=-1) < 0.8 + 0.1 * bumps / bumps.std()
    start = np.rint(middle - np.array(blob.shape) / 2 + rng.uniform(-0.1, 0.1, 3) * shape)
    where = tuple(slice(int(s), int(s) + n) for s, n in zip(start, blob.shape, strict=True))
    whole = np.zeros(shape, bool)
    whole[where] = blob
    depth = ndimage.distance_transform_edt(whole)
    labels = np.zeros(shape, np.uint8)
    labels[whole] = 2
    # Of the smallest tumours, too, the outermost voxels are oedema.
    labels[depth > max(1, 0.35 * depth.max())] = 4
    labels[depth > max(1.5, 0.65 * depth.max())] = 1
    return labels, brain | whole


def _paint_sequences(
    rng: np.random.Generator, labels: np.ndarray, brain: np.ndarray
) -> dict[str, np.ndarray]:
    """Four sequences, 0 outside of the brain, in which the parts of the tumour differ."""
    means = {  # Brain, label 1, label 2, label 4.
        "t1": (500, 300, 400, 420),
        "t1ce": (500, 300, 420, 900),
        "t2": (400, 700, 800, 600),
        "flair": (300, 350, 700, 550),
    }
    images = {}
    for name, values in means.items():
        by_label = np.array([values[0], values[1], values[2], 0, values[3]], np.float32)
        noise = 1 + 0.08 * rng.standard_normal(labels.shape, np.float32)
        images[name] = (np.where(brain, by_label[labels], 0) * noise).astype(np.int16)
    return images
