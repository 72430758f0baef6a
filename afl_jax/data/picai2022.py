"""PI-CAI 2022: clinically significant prostate cancer in biparametric MRI, from its download.

The public training and development set: 1500 examinations of 1476 patients, 425 of them with
clinically significant cancer. It is downloaded by hand, from two places, under CC BY-NC 4.0:

- images, https://zenodo.org/records/6624726: unzip the five ``picai_public_images_fold*.zip`` into
  ``images``;
- labels, ``git clone https://github.com/DIAGNijmegen/picai_labels``.

Both lie in one folder, the source::

    images/{patient}/{patient}_{study}_t2w.mha, ..._adc.mha, ..._hbv.mha
    picai_labels/csPCa_lesion_delineations/human_expert/resampled/{patient}_{study}.nii.gz
    picai_labels/csPCa_lesion_delineations/human_expert/Pooch25/{patient}_{study}.nii.gz
    picai_labels/csPCa_lesion_delineations/AI/Bosma22a/{patient}_{study}.nii.gz
    picai_labels/clinical_information/marksheet.csv

Folders between ``images`` and the patients do no harm. A case is an examination, ``patient_study``;
it is part of the data set if it has an image and a label of the source that was chosen.

ADC and HBV are resampled onto the grid of T2W, where they lie in the patient. Labels lie on that
grid already, up to a fraction of a millimetre of rounding in their headers; two of Pooch25 have a
shape of their own, and are resampled. Any positive value is a lesion.

References:
  Saha et al., "Artificial intelligence and radiologists in prostate cancer detection on MRI
  (PI-CAI)", The Lancet Oncology, 2024, https://doi.org/10.1016/S1470-2045(24)00220-1
"""

import csv
import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from afl_jax.data.cases import Case, SourceSettings, require_files, split_by_group
from afl_jax.data.preprocess import resample_labels, resample_to
from afl_jax.data.records import ReadCase, RecordsBuilder
from afl_jax.data.volume import Volume, case_name, grid_difference, read_single_channel
from afl_jax.errors import InputError

# tfds shows them to someone who has not downloaded the data.
_INSTRUCTIONS = __doc__
SEQUENCES = ("t2w", "adc", "hbv")
Labels = Literal["human_expert", "human_expert+Pooch25", "Bosma22a"]

_DELINEATIONS = Path("picai_labels", "csPCa_lesion_delineations")
_LABEL_FOLDERS: dict[str, tuple[Path, ...]] = {
    "human_expert": (_DELINEATIONS / "human_expert" / "resampled",),
    "human_expert+Pooch25": (
        _DELINEATIONS / "human_expert" / "resampled",
        _DELINEATIONS / "human_expert" / "Pooch25",
    ),
    "Bosma22a": (_DELINEATIONS / "AI" / "Bosma22a",),
}
_MARKSHEET = Path("picai_labels", "clinical_information", "marksheet.csv")
# Headers of one examination are rounded, each in its own way.
_MAX_ROUNDING_MM = 1.0
# The scans of one examination are planned on the same organ, with fields of view of their own.
_MAX_CENTRE_DISTANCE_MM = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picai2022Settings(SourceSettings):
    """What to make of PI-CAI.

    Attributes:
      source: The folder with ``images`` and ``picai_labels``.
      shape: Voxels of the prepared grid.
      spacing: Of the prepared grid, mm; T2W's own if None.
      resize: Stretch the field of view to the shape, in place of cropping and padding it.
      normalisation: Of the intensities, see `preprocess.normalise`.
      clip_percentiles: Of each channel, to which intensities are clipped first; not if None.
      labels: Whose delineations: 1295 cases of experts (220 with a lesion); the same and the 205
        other positives of Pooch25; or all 1500 by the algorithm Bosma22a.
      cases: All, or those with clinically significant cancer by the marksheet.
      fold: Official fold that is the test split.
      val_fraction: Share of the other folds' cases to validate on, whole patients.
      num_val: Number of cases to validate on; overrides ``val_fraction`` if not None.
      seed: Of the choice of the validation cases.
      exclude: Names of cases to leave out.
    """

    shape: tuple[int, int, int] = (160, 128, 24)
    resize: bool = False
    clip_percentiles: tuple[float, float] | None = None
    labels: Labels = "human_expert+Pooch25"
    cases: Literal["all", "positive"] = "all"
    fold: int = 0
    val_fraction: float = 0.2
    num_val: int | None = None

    def __post_init__(self):
        super().__post_init__()
        clip, fraction = self.clip_percentiles, self.val_fraction
        rules = {
            "clip_percentiles": (
                "two numbers from 0 to 100, the lower one first",
                clip,
                clip is None or (len(clip) == 2 and 0 <= clip[0] < clip[1] <= 100),
            ),
            "labels": (f"one of {get_args(Labels)}", self.labels, self.labels in get_args(Labels)),
            "cases": ("'all' or 'positive'", self.cases, self.cases in ("all", "positive")),
            "fold": ("from 0 to 4", self.fold, self.fold in range(5)),
            "val_fraction": ("between 0 and 1", fraction, 0 < fraction < 1),
        }
        self.check(rules, name="picai2022")


class Picai2022(RecordsBuilder):
    """PI-CAI 2022: prostate MRI (T2W, ADC, HBV) with lesions of clinically significant cancer."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = _INSTRUCTIONS
    SETTINGS = Picai2022Settings
    FREE_SETTINGS = ("source", "fold", "val_fraction", "num_val", "seed", "cases")

    @classmethod
    def find_cases(cls, settings: Picai2022Settings) -> list[Case]:
        """Examinations with an image and a label, sorted by name.

        The files of a case are those of the three sequences and of its label; a sequence that is
        missing is an error of that case, not of the data set.

        Raises:
          InputError: If a folder is missing or empty, a case is there twice or in no fold.
        """
        source = Path(settings.source)
        labels = _find_labels(source, settings.labels)
        positive = _read_positives(source) if settings.cases == "positive" else None
        folds = official_folds()
        cases = []
        for case_id, (folder, stem) in sorted(_find_images(source).items()):
            if case_id not in labels or (positive is not None and case_id not in positive):
                continue
            if case_id not in folds:
                raise InputError(
                    f"{folder / stem}: {case_id} is in none of the official folds of PI-CAI; move "
                    "it away, or use the data set 'folder' for images of your own."
                )
            scans = [folder / f"{case_id}_{sequence}.mha" for sequence in SEQUENCES]
            cases.append(Case(case_id, (*scans, labels[case_id])))
        if not cases:
            raise InputError(
                f"{source}: no examination in images has a label of {settings.labels}; check that "
                "images and picai_labels are whole."
            )
        return cases

    @classmethod
    def config_name(cls, settings: Picai2022Settings) -> str:
        """Whose labels, which cases, and the grid."""
        shape = "x".join(str(n) for n in settings.shape)
        return f"{settings.labels.replace('+', '_')}-{settings.cases}-{shape}"

    @property
    def num_classes(self) -> int:
        """Background and lesion."""
        return 2

    @property
    def num_channels(self) -> int:
        """As many as `SEQUENCES`."""
        return len(SEQUENCES)

    def split_cases(self) -> dict[str, list[Case]]:
        """The official fold as ``test``; of the others, some patients as ``val``."""
        settings, folds = self.settings, official_folds()
        test = [case for case in self.cases if folds[case.case_id] == settings.fold]
        rest = [case for case in self.cases if folds[case.case_id] != settings.fold]
        num_val = settings.num_val
        if num_val is None:
            num_val = max(1, round(settings.val_fraction * len(rest)))
        patients = {case.case_id: case.case_id.split("_")[0] for case in rest}
        train, val = split_by_group(rest, patients, num_held_out=num_val, seed=settings.seed)
        if not train or not val:
            raise InputError(
                f"{settings.source}: expected cases both to train and to validate on outside of "
                f"fold {settings.fold}, found {len(rest)}, {num_val} of them to validate on; add "
                "images of other folds, or change num_val."
            )
        return {"train": train, "val": val, "test": test}

    def read_case(self, case: Case) -> ReadCase:
        """Reads and checks one case."""
        require_files(case, (*SEQUENCES, "label"))
        *scans, label_path = case.files
        image = read_scans(scans)
        labels = read_single_channel(label_path, kind="label")
        if np.any(labels.array < 0) or np.any(labels.array != np.rint(labels.array)):
            raise InputError(
                f"{label_path}: expected whole numbers from 0, found others; fetch the file again."
            )
        labels = dataclasses.replace(labels, array=(labels.array >= 1).astype(np.uint8))
        notes = ()
        if labels.shape != image.shape:
            _require_near(label_path, labels, scans[0], image)
            notes = (f"label of shape {labels.shape} resampled onto T2W's, {image.shape}",)
            labels = resample_labels(labels, image)
        elif difference := grid_difference(labels, image, tolerance_mm=_MAX_ROUNDING_MM):
            raise InputError(
                f"{label_path}: expected the grid of its T2W {scans[0].name}, found {difference}; "
                "check that they belong together."
            )
        return ReadCase(image, dataclasses.replace(image, array=labels.array), notes)


def read_scans(paths: Sequence[Path]) -> Volume:
    """Reads the sequences of one examination and joins them on the grid of the first.

    Args:
      paths: T2W, ADC and HBV.

    Returns:
      float32 ``[X, Y, Z, C]``; 0 where a sequence does not reach.

    Raises:
      InputError: If a file cannot be read, has channels, or lies elsewhere in the patient.
    """
    volumes = [read_single_channel(path, kind="sequence") for path in paths]
    reference = volumes[0]
    channels = []
    for path, volume in zip(paths, volumes, strict=True):
        _require_near(path, volume, paths[0], reference)
        moved = resample_to(volume, reference, interpolation="linear")
        channels.append(moved.array.astype(np.float32))
    return dataclasses.replace(reference, array=np.stack(channels, axis=-1))


@functools.cache
def official_folds() -> dict[str, int]:
    """The fold, from 0 to 4, of each of the 1500 cases; no patient is in two.

    Returns:
      Case id to fold.
    """
    table = importlib.resources.files("afl_jax.data").joinpath("picai_folds.json")
    folds = json.loads(table.read_text(encoding="utf-8"))["folds"]
    return {case_id: fold for fold, case_ids in enumerate(folds) for case_id in case_ids}


def _require_near(path: Path, volume: Volume, reference_path: Path, reference: Volume) -> None:
    centres = [
        item.origin + item.matrix @ ((np.array(item.shape) - 1) / 2) for item in (volume, reference)
    ]
    distance_mm = float(np.linalg.norm(centres[0] - centres[1]))
    if distance_mm > _MAX_CENTRE_DISTANCE_MM:
        raise InputError(
            f"{path}: expected its centre within {_MAX_CENTRE_DISTANCE_MM:g} mm of that of "
            f"{reference_path.name}, found {distance_mm:.0f} mm; check that they belong together "
            "and that the header is right."
        )


def _find_images(source: Path) -> dict[str, tuple[Path, str]]:
    """Folder of each examination of which any sequence is there, and the name of that file."""
    root = source / "images"
    if not root.is_dir():
        raise InputError(
            f"{root}: no such folder; it must hold the unzipped images of PI-CAI, "
            "{patient}/{patient}_{study}_t2w.mha and so on, see afl_jax/data/picai2022.py."
        )
    found: dict[str, tuple[Path, str]] = {}
    for path in sorted(root.rglob("*.mha")):
        case_id, _, sequence = case_name(path).rpartition("_")
        if sequence not in SEQUENCES or path.name.startswith("."):
            continue
        folder, name = found.setdefault(case_id, (path.parent, path.name))
        if folder != path.parent:
            raise InputError(
                f"case {case_id} is there twice, as {folder / name} and {path}: keep one."
            )
    if not found:
        raise InputError(
            f"{root}: holds no images ({', '.join(f'*_{name}.mha' for name in SEQUENCES)}); unzip "
            "picai_public_images_fold*.zip into it."
        )
    return found


def _find_labels(source: Path, labels: str) -> dict[str, Path]:
    """Label of each case; of several the first folder's."""
    found: dict[str, Path] = {}
    for folder in (source / name for name in _LABEL_FOLDERS[labels]):
        if not folder.is_dir():
            raise InputError(
                f"{folder}: no such folder; clone https://github.com/DIAGNijmegen/picai_labels "
                f"into {source}."
            )
        for path in sorted(folder.glob("*.nii.gz")):
            if not path.name.startswith("."):
                found.setdefault(case_name(path), path)
    return found


def _read_positives(source: Path) -> set[str]:
    """Cases with clinically significant cancer."""
    path = source / _MARKSHEET
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {
                f"{row['patient_id']}_{row['study_id']}"
                for row in csv.DictReader(file)
                if row["case_csPCa"].upper() == "YES"
            }
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; it says which cases are positive. Clone picai_labels whole, or "
            "take all cases."
        ) from None
    except (KeyError, UnicodeDecodeError, csv.Error, AttributeError) as error:
        raise InputError(
            f"{path}: expected a table with patient_id, study_id and case_csPCa, found another "
            f"({error}); fetch it again."
        ) from error
