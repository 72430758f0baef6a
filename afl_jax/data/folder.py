"""A folder of NIfTI files in the layout of the Medical Segmentation Decathlon, as a data set.

``dataset.json`` at the top of the folder says what there is::

    {"modality": {"0": "T2W", "1": "ADC"},
     "labels": {"0": "background", "1": "lesion"},
     "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}, ...]}

``image`` is one file, whose fourth dimension, if any, is channels, or a list of files on one grid,
whose channels are joined in that order; there must be as many channels as ``modality`` names. Image
and label belong together because an entry says so, and must lie on the same grid. A case is named
after its label file, without suffix. Files whose name begins with ``._`` are droppings of another
operating system and are skipped. No path may leave the folder.

The cases, sorted by name, are split by a seeded permutation into ``train`` and ``val``.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from afl_jax.data.cases import Case
from afl_jax.data.preprocess import Normalisation, remap_labels
from afl_jax.data.records import ReadCase, RecordsBuilder
from afl_jax.data.volume import (
    Vector,
    case_name,
    grid_difference,
    read_channels,
    read_single_channel,
)
from afl_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderSettings:
    """What to make of a folder.

    Attributes:
      source: The folder that holds ``dataset.json``.
      shape: Voxels of the prepared grid; volumes are cropped and padded to it.
      spacing: Of the prepared grid, mm, along LPS; each image's own if None.
      resize: Stretch every image to the shape, in place of cropping and padding it.
      label_map: Pairs (value in the files, class); the labels of ``dataset.json`` as they are if
        empty. ``((0, 0), (1, 1), (2, 1))`` makes one foreground of two labels.
      normalisation: Of the intensities, see `preprocess.normalise`.
      val_fraction: Share of the cases to validate on, rounded to whole cases, at least one.
      num_val: Number of cases to validate on; overrides ``val_fraction`` if not None.
      seed: Of the split.
      exclude: Names of cases to leave out.
    """

    source: str
    shape: tuple[int, int, int]
    spacing: Vector | None = None
    resize: bool = False
    label_map: tuple[tuple[int, int], ...] = ()
    normalisation: Normalisation = "zscore_nonzero"
    val_fraction: float = 0.2
    num_val: int | None = None
    seed: int = 0
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        # Lists, as JSON has them, become tuples: the settings are hashable.
        object.__setattr__(self, "source", str(Path(self.source).resolve()))
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "label_map", tuple(tuple(pair) for pair in self.label_map))
        object.__setattr__(self, "exclude", tuple(self.exclude))
        if self.spacing is not None:
            object.__setattr__(self, "spacing", tuple(float(value) for value in self.spacing))
        if len(self.shape) != 3 or not all(isinstance(n, int) and n > 0 for n in self.shape):
            raise InputError(f"shape must be three positive whole numbers, got {self.shape}.")
        if self.spacing is not None and (len(self.spacing) != 3 or min(self.spacing) <= 0):
            raise InputError(f"spacing must be three positive numbers in mm, got {self.spacing}.")
        if not all(len(pair) == 2 and 0 <= pair[1] <= 255 for pair in self.label_map):
            raise InputError(
                "label_map must be pairs (value in the files, class from 0 to 255), "
                f"got {self.label_map}."
            )
        if self.normalisation not in get_args(Normalisation):
            raise InputError(
                f"normalisation must be one of {get_args(Normalisation)}, "
                f"got {self.normalisation!r}."
            )
        if not 0 < self.val_fraction < 1:
            raise InputError(f"val_fraction must lie between 0 and 1, got {self.val_fraction}.")


@dataclasses.dataclass(frozen=True)
class FolderCase(Case):
    """One entry of ``dataset.json``; the files are those of the image, then that of the label."""

    @property
    def images(self) -> tuple[Path, ...]:
        """Files of the channels."""
        return self.files[:-1]

    @property
    def label(self) -> Path:
        """File of the label."""
        return self.files[-1]


class Folder(RecordsBuilder):
    """Cases of a folder with ``dataset.json``, in the layout of the Medical Decathlon."""

    SETTINGS = FolderSettings
    FREE_SETTINGS = ("source", "val_fraction", "num_val", "seed")

    @classmethod
    def find_cases(cls, settings: FolderSettings) -> list[FolderCase]:
        """The entries of ``dataset.json``, sorted by name.

        A file that is missing is an error of its case, not of the data set.

        Raises:
          InputError: If the folder or its ``dataset.json`` is not as it must be.
        """
        source = Path(settings.source)
        return list_folder_cases(source, read_dataset_json(source))

    @classmethod
    def config_name(cls, settings: FolderSettings) -> str:
        """The folder's name and the grid."""
        readable = re.sub(r"[^A-Za-z0-9_]+", "_", Path(settings.source).name)
        return f"{readable}-{'x'.join(str(n) for n in settings.shape)}"

    @property
    def num_classes(self) -> int:
        """Classes of the labels, background included."""
        return max(self._label_map.values()) + 1

    @property
    def num_channels(self) -> int:
        """Channels that ``modality`` names."""
        return len(self._dataset["modality"])

    def split_cases(self) -> dict[str, list[FolderCase]]:
        """The cases of ``train`` and ``val``, by a seeded permutation."""
        cases, num_val = list(self.cases), self.settings.num_val
        if num_val is None:
            num_val = max(1, round(self.settings.val_fraction * len(cases)))
        if not 0 < num_val < len(cases):
            raise InputError(
                f"{self.settings.source}: expected cases both to train and to validate on, found "
                f"{len(cases)} in all, {num_val} of them to validate on; add cases or change "
                "num_val."
            )
        order = np.random.default_rng(self.settings.seed).permutation(len(cases))
        val = set(order[:num_val].tolist())
        return {
            "train": [case for index, case in enumerate(cases) if index not in val],
            "val": [case for index, case in enumerate(cases) if index in val],
        }

    def read_case(self, case: FolderCase) -> ReadCase:
        """Reads and checks one case."""
        for kind, path in (*(("image", path) for path in case.images), ("label", case.label)):
            if not path.is_file():
                raise InputError(
                    f"case {case.case_id}: its {kind} {path} is missing; add the file, or remove "
                    "the case from dataset.json."
                )
        image = read_channels(case.images, num_channels=self.num_channels)
        labels = read_single_channel(case.label, kind="label")
        if difference := grid_difference(labels, image):
            raise InputError(
                f"{case.label}: expected the grid of its image {case.images[0].name}, "
                f"found {difference}; check that they belong together."
            )
        try:
            classes = remap_labels(labels.array, self._label_map)
        except InputError as error:
            raise InputError(f"{case.label}: {error}") from error
        return ReadCase(image, dataclasses.replace(image, array=classes))

    @property
    def _label_map(self) -> dict[int, int]:
        if self.settings.label_map:
            return dict(self.settings.label_map)
        return {int(value): int(value) for value in self._dataset["labels"]}

    @functools.cached_property
    def _dataset(self) -> dict[str, Any]:
        return read_dataset_json(Path(self.settings.source))


def read_dataset_json(source: Path) -> dict[str, Any]:
    """Reads and checks the ``dataset.json`` of a folder.

    Args:
      source: The folder.

    Returns:
      The content, with ``modality``, ``labels`` and ``training`` of the right kinds.

    Raises:
      InputError: If there is no such folder or file, or it is not as the module says.
    """
    path = source / "dataset.json"
    if not source.is_dir():
        raise InputError(f"{source}: no such folder.")
    if not path.is_file():
        raise InputError(f"{path}: no such file; it must list the cases of the folder.")
    try:
        dataset = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); correct it.") from error

    def require(condition: bool, expected: str) -> None:
        if not condition:
            raise InputError(f"{path}: expected {expected}; correct it.")

    require(isinstance(dataset, Mapping), "an object with modality, labels and training")
    for key in ("modality", "labels"):
        require(
            isinstance(dataset.get(key), Mapping) and bool(dataset[key]),
            f'"{key}" as an object such as {{"0": "name"}}',
        )
    require(
        all(re.fullmatch(r"\d{1,3}", value) and int(value) < 256 for value in dataset["labels"]),
        'the keys of "labels" to be whole numbers from 0 to 255',
    )
    require(
        isinstance(dataset.get("training"), list) and bool(dataset["training"]),
        '"training" as a list of {"image": file, "label": file}',
    )
    for index, entry in enumerate(dataset["training"]):
        files = [entry.get("image"), entry.get("label")] if isinstance(entry, Mapping) else [None]
        images = files[0] if isinstance(files[0], list) else files[:1]
        require(
            bool(images) and all(isinstance(file, str) for file in (*images, *files[1:])),
            f'"training" entry {index} to have an "image" (a file or a list) and a "label"',
        )
    return dataset


def list_folder_cases(source: Path, dataset: Mapping[str, Any]) -> list[FolderCase]:
    """The cases of a folder, sorted by name; no file is outside.

    Args:
      source: The folder.
      dataset: What `read_dataset_json` returned for it.

    Returns:
      The cases, with absolute paths.

    Raises:
      InputError: If a file is outside of the folder, or two cases have one name.
    """
    cases: dict[str, FolderCase] = {}
    for entry in dataset["training"]:
        images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
        if Path(entry["label"]).name.startswith("._"):
            continue
        label = _inside(source, entry["label"])
        case_id = case_name(label)
        paths = tuple(_inside(source, image) for image in images)
        if case_id in cases:
            raise InputError(
                f"case {case_id}: listed twice in {source / 'dataset.json'}; names must differ."
            )
        depends_on = [dataset["modality"], dataset["labels"]]
        cases[case_id] = FolderCase(case_id, (*paths, label), depends_on)
    return [cases[case_id] for case_id in sorted(cases)]


def _inside(source: Path, name: str) -> Path:
    """A path that an entry names, resolved; neither ``..`` nor a link may lead out."""
    dataset = source / "dataset.json"
    try:
        path = (source / name).resolve()
        path.is_file()  # Says, too, whether the system takes it for a path.
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{dataset}: {name!r} is no path ({error}); correct it.") from error
    if not path.is_relative_to(source.resolve()):
        raise InputError(f"{dataset}: the path {name!r} leads out of the folder; move it inside.")
    return path
