"""What the data sets share: the features of a record, and how a builder writes them.

A record is one case on its prepared grid: the image, the labels, and what later steps need to know
of the case. Builders are tensorflow-datasets builders that write array_record files, all cases in
one stored split, in the order in which they are listed, and that neither write nor read with
TensorFlow. Which case belongs to ``train``, ``val`` and ``test`` is decided when records are read,
so that five folds share one set of records.

What is prepared lies in ``data_dir/builder/config/version``; the name of the config ends in a
digest of everything that the records depend on, so that other settings or other files make another
data set, and a prepared data set that is found is the one that was asked for. Beside the records,
``cases.csv`` has a row for each case: its lesions and their volume before and after, and whatever
should be known of it.

A build is whole or not there at all. Each case is first written to a file of its own in
``data_dir/builder/.cases``, beside its place and renamed; a build that was interrupted, or stopped
by a bad case, goes on from these. They are removed once the data set is whole, which until then
needs twice its room.
"""

import abc
import contextlib
import csv
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

from afl_jax.data.cases import Case
from afl_jax.data.preprocess import PREPARATION, content_box, prepare_image, prepare_labels
from afl_jax.data.volume import Volume
from afl_jax.errors import InputError
from afl_jax.files import remove_leftovers, written_beside
from afl_jax.lesions import label_components

Progress = Callable[[int, int], None]

_STORED_SPLIT = "cases"
_SHARD_BYTES = 2**29
# A change of the foreground's volume, by cropping, that is worth a note.
_MAX_VOLUME_CHANGE = 0.05


class ReadCase(NamedTuple):
    """One case as it was read, before it is prepared.

    Attributes:
      image: ``[X, Y, Z, C]``, all channels on one grid.
      labels: uint8 ``[X, Y, Z]``, classes, on the grid of the image.
      notes: What a user should know of the case, in words.
      roughness: Of the lesion surface; NaN where it is not known.
    """

    image: Volume
    labels: Volume
    notes: tuple[str, ...] = ()
    roughness: float = math.nan


@dataclasses.dataclass(eq=False)
class RecordsConfig(tfds.core.BuilderConfig):
    """A tfds config that carries the builder's own settings, its cases, and a key of each.

    The settings are a frozen dataclass; a key is a digest of what the case's record depends on.
    """

    settings: Any = None
    cases: Sequence[Case] = ()
    keys: Sequence[str] = ()


class RecordsBuilder(FileReaderBuilder, abc.ABC, skip_registration=True):
    """A builder of prepared cases; a subclass finds its cases, splits them and reads one of them.

    Attributes:
      SETTINGS: The frozen dataclass of the builder's settings, set by the subclass.
      FREE_SETTINGS: Names of the settings on which no record depends: where the source lies, and
        who belongs to which split.
    """

    VERSION = tfds.core.Version("2.0.0")
    # Nothing is downloaded, so there are no checksums. tfds would look for a file of them beside
    # this one, with a package that it does not install.
    url_infos: ClassVar[dict] = {}
    SETTINGS: type
    FREE_SETTINGS: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def create(cls, settings: Any, *, data_dir: str | os.PathLike) -> "RecordsBuilder":
        """Makes the builder; nothing is built yet.

        Args:
          settings: An instance of ``SETTINGS``.
          data_dir: Folder of prepared data sets.

        Returns:
          The builder, whose config's name says on what its records depend: the settings, and
          every file's name, size and time of change.

        Raises:
          InputError: If the source is not as it must be.
        """
        cases = cls.find_cases(settings)
        excluded = set(getattr(settings, "exclude", ()))
        if unknown := sorted(excluded - {case.case_id for case in cases}):
            raise InputError(f"exclude names {unknown[0]!r}, which is no case of the data set.")
        cases = [case for case in cases if case.case_id not in excluded]
        keys = [_case_key(cls, settings, case) for case in cases]
        name = f"{cls.config_name(settings)}-{_digest(keys)}"
        with _quiet_log():
            return cls(
                config=RecordsConfig(name=name, settings=settings, cases=cases, keys=keys),
                data_dir=data_dir,
                file_format="array_record",
            )

    @classmethod
    @abc.abstractmethod
    def find_cases(cls, settings: Any) -> list[Case]:
        """All cases of the source, in the order of the records; cheap, and checks what it can."""

    @classmethod
    @abc.abstractmethod
    def config_name(cls, settings: Any) -> str:
        """Readable part of the config's name: letters, digits, dots, dashes, underscores."""

    @property
    @abc.abstractmethod
    def num_classes(self) -> int:
        """Classes of the labels, background included."""

    @abc.abstractmethod
    def split_cases(self) -> dict[str, list[Case]]:
        """The cases of ``train``, ``val`` and, where there is one, ``test``."""

    @abc.abstractmethod
    def read_case(self, case: Case) -> ReadCase:
        """Reads and checks one case; runs in several threads at once."""

    @property
    def regions(self) -> dict[str, tuple[int, ...]]:
        """Sets of classes that are scored in place of each class, by name; none by default."""
        return {}

    @property
    def preparation(self) -> dict[str, Any]:
        """Of the settings, those that are arguments of `prepare_image`."""
        settings = self.settings
        return {name: getattr(settings, name) for name in PREPARATION if hasattr(settings, name)}

    @property
    def settings(self) -> Any:
        """The settings, an instance of ``SETTINGS``."""
        return self.builder_config.settings

    @property
    def cases(self) -> Sequence[Case]:
        """All cases, in the order of the records."""
        return self.builder_config.cases

    def prepare(
        self,
        *,
        num_workers: int = 1,
        progress: Progress | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """Builds the data set, or goes on with its build; one that is there is left alone.

        Args:
          num_workers: Threads that prepare cases; the records do not depend on it.
          progress: Called with (cases done, cases in all) at the start and after each case.
          warn: Called with a line for every case that cannot be prepared but the first, which the
            error names.

        Raises:
          InputError: If cases cannot be prepared, once all others are; or if the files cannot be
            written. What was prepared is kept for the next time.
        """
        self.split_cases()  # Says if there are too few.
        with _quiet_log():
            prepared = self.is_prepared()
        try:
            if not prepared:
                self._remove_leftovers()
                self._stage_cases(num_workers=num_workers, progress=progress, warn=warn)
                tfds.disable_progress_bar()
                with _quiet_log():
                    self.download_and_prepare()
            self._write_table()
        except (OSError, RuntimeError) as error:
            # array_record has no type of its own for a disk that is full, but says what failed.
            if not isinstance(error, OSError) and "write() failed" not in str(error):
                raise
            raise InputError(
                f"{self.data_dir}: the data set cannot be written; check its permissions and that "
                "the disk has room. What was prepared is kept: the next attempt goes on from it."
            ) from error
        finally:
            root = Path(self.data_dir_root)
            for folder in (
                Path(self.data_dir).parent,
                self._staging,
                root / "downloads" / "extracted",
            ):
                _remove_empty_folders(folder, top=root)

    def prepare_case(self, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads and prepares one case.

        Args:
          case: Of ``cases``.

        Returns:
          Its record, for tfds to serialise, and its row of ``cases.csv``.

        Raises:
          InputError: If anything about the case is not as it must be.
        """
        read = self.read_case(case)
        image = prepare_image(read.image, **self.preparation)
        labels = prepare_labels(read.labels, image)
        start, stop = content_box(read.image, image)
        lesions = [label_components(item.array)[1] for item in (read.labels, labels)]
        volumes_mm3 = [
            np.count_nonzero(item.array) * float(np.prod(item.spacing))
            for item in (read.labels, labels)
        ]
        notes = list(read.notes)
        if lesions[0] != lesions[1]:
            notes.append(f"{lesions[0]} lesions became {lesions[1]}")
        if abs(volumes_mm3[1] - volumes_mm3[0]) > _MAX_VOLUME_CHANGE * volumes_mm3[0]:
            notes.append(f"{volumes_mm3[0]:.0f} mm3 of lesions became {volumes_mm3[1]:.0f} mm3")
        record = {
            "image": image.array,
            "labels": labels.array,
            "case_id": case.case_id,
            "spacing": np.float32(image.spacing),
            "content_start": start,
            "content_stop": stop,
            "lesion_volume_mm3": np.float32(volumes_mm3[0]),
            "roughness": np.float32(read.roughness),
        }
        row = {
            "case_id": case.case_id,
            "lesions": lesions[0],
            "lesions_prepared": lesions[1],
            "volume_mm3": volumes_mm3[0],
            "volume_prepared_mm3": volumes_mm3[1],
            "notes": "; ".join(notes),
        }
        return record, row

    def read_table(self) -> list[dict[str, str]]:
        """The rows of ``cases.csv`` of a data set that is prepared."""
        with (Path(self.data_dir) / "cases.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def num_cases(self, split: str) -> int:
        """How many cases a split has."""
        return len(self.split_cases().get(split, ()))

    def as_data_source(self, split: str, **options: Any) -> Any:
        """Records by index.

        Args:
          split: ``"train"``, ``"val"`` or ``"test"``; otherwise as tfds takes it, of ``cases``.
          **options: Of tfds.

        Returns:
          A sequence of decoded records.
        """
        splits = self.split_cases()
        if split not in splits:
            return super().as_data_source(split, **options)
        places = {case.case_id: index for index, case in enumerate(self.cases)}
        stored = super().as_data_source(_STORED_SPLIT, **options)
        return _Selection(stored, [places[case.case_id] for case in splits[split]])

    def _info(self) -> tfds.core.DatasetInfo:
        # Volumes as bytes: a list of floats in a protocol buffer is an order slower to decode.
        volume = {"encoding": tfds.features.Encoding.BYTES}
        vector = {"shape": (3,), "dtype": np.int32}
        shape = self.preparation["shape"]
        features = {
            "image": tfds.features.Tensor(
                shape=(*shape, self.num_channels), dtype=np.float32, **volume
            ),
            "labels": tfds.features.Tensor(shape=shape, dtype=np.uint8, **volume),
            "case_id": tfds.features.Text(),
            "spacing": tfds.features.Tensor(shape=(3,), dtype=np.float32),
            "content_start": tfds.features.Tensor(**vector),
            "content_stop": tfds.features.Tensor(**vector),
            "lesion_volume_mm3": tfds.features.Scalar(dtype=np.float32),
            "roughness": tfds.features.Scalar(dtype=np.float32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    @property
    @abc.abstractmethod
    def num_channels(self) -> int:
        """Channels of an image."""

    @property
    def _staging(self) -> Path:
        return Path(self.data_dir).parent.parent / ".cases"

    @property
    def _stages(self) -> list[Path]:
        """Where each case is kept until the data set is whole."""
        return [self._staging / f"{key}.record" for key in self.builder_config.keys]

    def _remove_leftovers(self) -> None:
        """Removes what a killed process had begun to write, of the cases and of the whole."""
        for key in self.builder_config.keys:
            remove_leftovers(self._staging, name=f"{key}.record")
        place = Path(self.data_dir)
        for folder in place.parent.glob(f"incomplete.*_{place.name}"):
            shutil.rmtree(folder, ignore_errors=True)

    def _stage_cases(
        self,
        *,
        num_workers: int,
        progress: Progress | None,
        warn: Callable[[str], None] | None,
    ) -> None:
        """Prepares the cases that were not before, each into a file of its own."""
        todo = [i for i, path in enumerate(self._stages) if not path.exists()]
        num_done, failures = len(self.cases) - len(todo), {}
        self._staging.mkdir(parents=True, exist_ok=True)
        pool = ThreadPoolExecutor(num_workers)
        try:
            if progress is not None:
                progress(num_done, len(self.cases))
            futures = {pool.submit(self._stage_case, index): index for index in todo}
            for future in as_completed(futures):
                try:
                    future.result()
                except InputError as error:
                    failures[self.cases[futures[future]].case_id] = str(error)
                    if len(failures) > 1 and warn is not None:
                        warn(str(error))
                    continue
                num_done += 1
                if progress is not None:
                    progress(num_done, len(self.cases))
        finally:
            pool.shutdown(cancel_futures=True)
        if failures:
            ids = sorted(failures)
            named = " ".join(ids[:10]) + (" ..." if len(ids) > 10 else "")
            raise InputError(
                f"{next(iter(failures.values()))} ({len(ids)} of {len(self.cases)} cases cannot be "
                "prepared, the others are kept: mend the cases and prepare again, or leave them "
                f"out with data.exclude: {named})"
            )

    def _stage_case(self, index: int) -> None:
        """Writes a case: its row of the table as a line of JSON, then its record as tfds has it."""
        record, row = self.prepare_case(self.cases[index])
        with written_beside(self._stages[index]) as partial, partial.open("wb") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.write(self.info.features.serialize_example(record))
            file.flush()
            os.fsync(file.fileno())

    def _write_table(self) -> None:
        """Writes ``cases.csv`` from what was staged, then removes that."""
        stages = [path for path in self._stages if path.exists()]
        path = Path(self.data_dir) / "cases.csv"
        if not path.exists() and len(stages) == len(self._stages):
            rows = []
            for stage in stages:
                with stage.open("rb") as file:
                    rows.append(json.loads(file.readline()))
            with (
                written_beside(path) as partial,
                partial.open("w", newline="", encoding="utf-8") as file,
            ):
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        for stage in stages:
            stage.unlink(missing_ok=True)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        """Joins the staged records; tfds calls it with a folder that it renames at the end.

        Not by tfds' own writer: that holds up to a gigabyte of records in memory, and beyond it
        needs TensorFlow.
        """
        del dl_manager, download_config  # Nothing is downloaded.
        self._stage_cases(num_workers=1, progress=None, warn=None)
        sizes = [path.stat().st_size for path in self._stages]
        num_shards = -(-sum(sizes) // _SHARD_BYTES)
        shards = np.array_split(np.arange(len(sizes)), min(num_shards, len(sizes)))
        template = tfds.core.ShardedFileTemplate(
            data_dir=self.data_path,
            dataset_name=self.name,
            split=_STORED_SPLIT,
            filetype_suffix="array_record",
        )
        for number, indices in enumerate(shards):
            path = template.sharded_filepath(shard_index=number, num_shards=len(shards))
            # Each record by itself, for reading in any order.
            writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
            for index in indices:
                with self._stages[index].open("rb") as file:
                    file.readline()
                    writer.write(file.read())
            writer.close()
        split = tfds.core.SplitInfo(
            name=_STORED_SPLIT,
            shard_lengths=[len(indices) for indices in shards],
            num_bytes=sum(sizes),
            filename_template=template,
        )
        self.info.set_splits(tfds.core.splits.SplitDict([split]))

    # tfds prints a line before and after a build; whoever calls `prepare` reports in its own way.
    def _log_download_bytes(self) -> None: ...

    def _log_download_done(self) -> None: ...


class _Selection(Sequence):
    """Some records of a source, in an order of their own."""

    def __init__(self, source: Sequence[Any], indices: Sequence[int]):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._source[self._indices[index]]


def _case_key(builder_class: type[RecordsBuilder], settings: Any, case: Case) -> str:
    """A digest of all that the record of a case depends on."""
    values = dataclasses.asdict(settings)
    free = (*builder_class.FREE_SETTINGS, "exclude")
    depends_on = {name: value for name, value in values.items() if name not in free}
    files = []
    for path in case.files:
        with contextlib.suppress(OSError):
            stat = path.stat()
            files.append((path.name, stat.st_size, stat.st_mtime_ns))
    version = str(builder_class.VERSION)
    return _digest(
        [builder_class.__name__, version, depends_on, case.case_id, files, case.depends_on]
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Keeps tfds' warnings, such as that a data set is not there yet, to itself."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _remove_empty_folders(folder: Path, *, top: Path) -> None:
    """Removes a folder and those above it, below ``top``, as far as they are empty."""
    while folder != top and top in folder.parents:
        with contextlib.suppress(OSError):
            folder.rmdir()
        folder = folder.parent
