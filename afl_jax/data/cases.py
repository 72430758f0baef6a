"""The cases of a source before they are read: its settings, one case, and how cases are split."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from afl_jax.data.preprocess import Normalisation
from afl_jax.data.volume import Vector
from afl_jax.errors import InputError, check_rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What the settings of a downloaded data set have in common.

    Attributes:
      source: The folder of the download.
      shape: Voxels of the prepared grid.
      spacing: Of the prepared grid, mm; the images' own if None.
      normalisation: Of the intensities, see `preprocess.normalise`.
      seed: Of the split.
      exclude: Names of cases to leave out.
    """

    source: str
    shape: tuple[int, int, int]
    spacing: Vector | None = None
    normalisation: Normalisation = "zscore_nonzero"
    seed: int = 0
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        # Lists, as JSON has them, become tuples: the settings are hashable.
        object.__setattr__(self, "source", str(Path(self.source).resolve()))
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), list | tuple):
                object.__setattr__(self, field.name, tuple(value))

    def check(self, rules: Mapping[str, tuple[str, Any, bool]], *, name: str) -> None:
        """Checks the fields, those of a subclass after those that all have.

        Args:
          rules: See `check_rules`; of the subclass.
          name: Of the data set.

        Raises:
          InputError: If a rule does not hold.
        """
        shape, spacing, normalisation = self.shape, self.spacing, self.normalisation
        common = {
            "shape": ("three whole numbers from 1", shape, len(shape) == 3 and min(shape) >= 1),
            "spacing": (
                "three positive numbers in mm",
                spacing,
                spacing is None or (len(spacing) == 3 and min(spacing) > 0),
            ),
            "normalisation": (
                f"one of {get_args(Normalisation)}",
                normalisation,
                normalisation in get_args(Normalisation),
            ),
        }
        check_rules(common | dict(rules), where=f"{name}: ")


@dataclasses.dataclass(frozen=True)
class Case:
    """One case of a source, not read yet.

    Attributes:
      case_id: Unique in the data set.
      files: All that are read for it; some may be missing.
      depends_on: JSON-able; whatever else its record depends on.
    """

    case_id: str
    files: tuple[Path, ...] = ()
    depends_on: Any = None


def require_files(case: Case, kinds: Sequence[str]) -> None:
    """Checks that the files of a case are there.

    Args:
      case: The case.
      kinds: What each of its files is.

    Raises:
      InputError: If one is missing.
    """
    for kind, path in zip(kinds, case.files, strict=True):
        if not path.is_file():
            raise InputError(
                f"case {case.case_id}: its {kind.upper()}, {path}, is missing; fetch it."
            )


def split_by_group(
    cases: Sequence[Case], groups: Mapping[str, str], *, num_held_out: int, seed: int
) -> tuple[list[Case], list[Case]]:
    """Holds out whole groups of cases, such as all studies of a patient, drawn by a seed.

    Args:
      cases: To be split.
      groups: The group of each case id.
      num_held_out: Cases to hold out; a few more if the last group drawn has several.
      seed: Of the order in which groups are drawn.

    Returns:
      The cases that remain and those held out, each in the order of ``cases``.
    """
    sizes = collections.Counter(groups[case.case_id] for case in cases)
    names = sorted(sizes)
    held_out, count = set(), 0
    for index in np.random.default_rng(seed).permutation(len(names)):
        if count >= num_held_out:
            break
        held_out.add(names[index])
        count += sizes[names[index]]
    return (
        [case for case in cases if groups[case.case_id] not in held_out],
        [case for case in cases if groups[case.case_id] in held_out],
    )
