"""BraTS 2018: gliomas in four MRI sequences, from its download.

The training data of the challenge: 285 patients, 210 with high-grade (HGG) and 75 with low-grade
glioma (LGG). It is given to those who register, and must not be passed on
(https://www.med.upenn.edu/sbia/brats2018/registration.html). The source is the folder that the
archive unpacks to::

    MICCAI_BraTS_2018_Data_Training/{HGG,LGG}/{case}/{case}_{t1,t1ce,t2,flair,seg}.nii.gz

``.nii`` does as well. All images of a case lie on one grid, 240 x 240 x 155 voxels of 1 mm, free of
the skull. Labels are 0, 1 (necrotic and non-enhancing core), 2 (oedema) and 4 (enhancing tumour);
the regions that are scored contain each other:

- WT, the whole tumour: 1, 2, 4;
- TC, its core: 1, 4;
- ET, what of it enhances: 4.

Task01 of the Medical Segmentation Decathlon holds the same kind of images with other numbers: 1
oedema, 2 non-enhancing core, 3 enhancing tumour. Read as BraTS 2018 it would give wrong regions, so
a 3 is refused unless ``numbering`` says that it is meant.

References:
  Menze et al., "The Multimodal Brain Tumor Image Segmentation Benchmark (BRATS)", IEEE
  Transactions on Medical Imaging, 2015, https://doi.org/10.1109/TMI.2014.2377694
"""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from afl_jax.data.cases import Case, SourceSettings, require_files, split_by_group
from afl_jax.data.preprocess import remap_labels
from afl_jax.data.records import ReadCase, RecordsBuilder
from afl_jax.data.volume import grid_difference, read_channels, read_single_channel
from afl_jax.errors import InputError

# tfds shows them to someone who has not downloaded the data.
_INSTRUCTIONS = __doc__
SEQUENCES = ("t1", "t1ce", "t2", "flair")
GRADES = ("HGG", "LGG")
Target = Literal["WT", "TC", "ET", "regions"]
Numbering = Literal["brats2018", "msd"]

# From the labels of BraTS 2018 to classes. As classes, the three regions are those of at least 1,
# at least 2, and 3.
_CLASSES: dict[str, dict[int, int]] = {
    "WT": {0: 0, 1: 1, 2: 1, 4: 1},
    "TC": {0: 0, 1: 1, 2: 0, 4: 1},
    "ET": {0: 0, 1: 0, 2: 0, 4: 1},
    "regions": {0: 0, 2: 1, 1: 2, 4: 3},
}
# From the numbers in the files to those of BraTS 2018.
_NUMBERINGS: dict[str, dict[int, int]] = {
    "brats2018": {0: 0, 1: 1, 2: 2, 4: 4},
    "msd": {0: 0, 1: 2, 2: 1, 3: 4},
}
# Headers of one case are rounded, each in its own way.
_MAX_ROUNDING_MM = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brats2018Settings(SourceSettings):
    """What to make of BraTS 2018.

    Attributes:
      source: The folder with ``HGG`` and ``LGG``.
      shape: Voxels of the prepared grid, to which volumes are cropped and padded.
      spacing: Of the prepared grid, mm; the images' own, 1 mm, if None.
      normalisation: Of the intensities, see `preprocess.normalise`.
      target: A region, as one foreground class; or all three as classes 1 (oedema), 2
        (non-enhancing core) and 3 (enhancing tumour).
      numbering: Of the labels in the files.
      val_fraction: Share of the patients of each grade to validate on.
      test_fraction: Share of the patients of each grade to test on.
      seed: Of the split.
      exclude: Names of cases to leave out.
    """

    shape: tuple[int, int, int] = (240, 240, 160)
    target: Target = "WT"
    numbering: Numbering = "brats2018"
    val_fraction: float = 0.1
    test_fraction: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        val, test = self.val_fraction, self.test_fraction
        targets, numberings = get_args(Target), get_args(Numbering)
        rules = {
            "target": (f"one of {targets}", self.target, self.target in targets),
            "numbering": (f"one of {numberings}", self.numbering, self.numbering in numberings),
            "val_fraction": ("between 0 and 1", val, 0 < val < 1),
            "test_fraction": (
                "from 0 to less than what val_fraction leaves",
                test,
                0 <= test < 1 - val,
            ),
        }
        self.check(rules, name="brats2018")


class Brats2018(RecordsBuilder):
    """BraTS 2018: brain MRI (T1, contrast-enhanced T1, T2, FLAIR) with gliomas."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = _INSTRUCTIONS
    SETTINGS = Brats2018Settings
    FREE_SETTINGS = ("source", "val_fraction", "test_fraction", "seed")

    @classmethod
    def find_cases(cls, settings: Brats2018Settings) -> list[Case]:
        """The folders in ``HGG`` and ``LGG``, sorted by grade and name.

        A file that is missing is an error of that case, not of the data set.

        Raises:
          InputError: If the source is not such a folder, or a case is there twice.
        """
        source = Path(settings.source)
        if (source / "dataset.json").exists() or (source / "imagesTr").exists():
            raise InputError(
                f"{source}: expected the folders HGG and LGG of BraTS 2018, found the layout of "
                "the Medical Segmentation Decathlon, whose Task01 numbers its labels differently; "
                "use the data set 'folder' for it."
            )
        cases: dict[str, Case] = {}
        for grade in GRADES:
            for folder in sorted((source / grade).glob("*")):
                name = folder.name
                if not folder.is_dir() or name.startswith("."):
                    continue
                if name in cases:
                    raise InputError(f"case {name} is there twice, in HGG and in LGG: keep one.")
                files = [_find_file(folder, f"{name}_{kind}") for kind in (*SEQUENCES, "seg")]
                cases[name] = Case(name, tuple(files), depends_on=grade)
        if not cases:
            raise InputError(
                f"{source}: expected folders HGG and LGG with a folder for each case, found none; "
                "give the folder that BraTS 2018 unpacks to, see afl_jax/data/brats2018.py."
            )
        return list(cases.values())

    @classmethod
    def config_name(cls, settings: Brats2018Settings) -> str:
        """The target and the grid."""
        return f"{settings.target}-{'x'.join(str(n) for n in settings.shape)}"

    @property
    def num_classes(self) -> int:
        """Background and what the target makes."""
        return max(_CLASSES[self.settings.target].values()) + 1

    @property
    def regions(self) -> dict[str, tuple[int, ...]]:
        """The regions that contain each other, where all three are targets."""
        return {"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)} if self.num_classes > 2 else {}

    @property
    def num_channels(self) -> int:
        """As many as `SEQUENCES`."""
        return len(SEQUENCES)

    def split_cases(self) -> dict[str, list[Case]]:
        """Of each grade the same shares of patients, drawn by the seed."""
        settings = self.settings
        splits: dict[str, list[Case]] = {"train": [], "val": [], "test": []}
        for grade in GRADES:
            rest = [case for case in self.cases if case.depends_on == grade]
            # Brats18_{site}_{patient}_{time}: a patient may have come more than once.
            patients = {case.case_id: case.case_id.rpartition("_")[0] for case in rest}
            # Of a grade with few cases, one to validate and one to test on.
            num_val, num_test = (
                max(round(fraction * len(rest)), int(fraction > 0 and len(rest) > 2))
                for fraction in (settings.val_fraction, settings.test_fraction)
            )
            rest, test = split_by_group(rest, patients, num_held_out=num_test, seed=settings.seed)
            train, val = split_by_group(rest, patients, num_held_out=num_val, seed=settings.seed)
            for name, cases in (("train", train), ("val", val), ("test", test)):
                splits[name] += cases
        if not splits["train"] or not splits["val"]:
            raise InputError(
                f"{settings.source}: expected cases both to train and to validate on, found "
                f"{len(self.cases)} in all; add cases, or change val_fraction."
            )
        return splits

    def read_case(self, case: Case) -> ReadCase:
        """Reads and checks one case."""
        require_files(case, (*SEQUENCES, "seg"))
        *scans, label_path = case.files
        image = read_channels(scans, num_channels=len(SEQUENCES), tolerance_mm=_MAX_ROUNDING_MM)
        labels = read_single_channel(label_path, kind="label")
        if difference := grid_difference(labels, image, tolerance_mm=_MAX_ROUNDING_MM):
            raise InputError(
                f"{label_path}: expected the grid of its images, found {difference}; check that "
                "they belong together."
            )
        numbering = _NUMBERINGS[self.settings.numbering]
        if self.settings.numbering == "brats2018" and (labels.array == 3).any():
            raise InputError(
                f"{label_path}: expected the labels 0, 1, 2 and 4 of BraTS 2018, found 3, as the "
                "Medical Segmentation Decathlon numbers the enhancing tumour; fetch the original, "
                "or say --data.numbering msd."
            )
        label_map = {
            value: _CLASSES[self.settings.target][label] for value, label in numbering.items()
        }
        try:
            classes = remap_labels(labels.array, label_map)
        except InputError as error:
            raise InputError(f"{label_path}: {error}") from error
        return ReadCase(image, dataclasses.replace(image, array=classes))


def _find_file(folder: Path, stem: str) -> Path:
    """The file of that name, packed or not; packed if there is none."""
    unpacked = folder / f"{stem}.nii"
    return unpacked if unpacked.is_file() else folder / f"{stem}.nii.gz"
