"""What the data sets share: the features of a record, and how a builder writes them.

A record is one case on its prepared grid: the image, the labels, and what later steps need to know
of the case. Builders are tensorflow-datasets builders that write array_record files, in the order
in which they list their cases, and that neither write nor read with TensorFlow. What is prepared
lies in ``data_dir/builder/config/version``; the name of the config ends in a digest of everything
that the records depend on, so that other settings or another source make another data set, and a
prepared data set that is found is the one that was asked for.

A build is whole or not there at all: records are written to a folder beside, which is renamed at
the end and removed after any failure.
"""

import abc
import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from afl_jax.data.preprocess import content_box
from afl_jax.data.volume import Volume
from afl_jax.errors import InputError

Progress = Callable[[int, int], None]


@dataclasses.dataclass(eq=False)
class RecordsConfig(tfds.core.BuilderConfig):
    """A tfds config that carries the builder's own settings, a frozen dataclass."""

    settings: Any = None


class RecordsBuilder(tfds.core.GeneratorBasedBuilder, abc.ABC, skip_registration=True):
    """A builder of prepared cases; a subclass lists its cases and prepares one of them.

    Attributes:
      SETTINGS: The frozen dataclass of the builder's settings, set by the subclass.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there are no checksums. tfds would look for a file of them beside
    # this one, with a package that it does not install.
    url_infos: ClassVar[dict] = {}
    SETTINGS: type

    _num_workers = 1
    _progress: Progress | None = None

    @property
    def settings(self) -> Any:
        """The settings, an instance of ``SETTINGS``."""
        return self.builder_config.settings

    def prepare(self, *, num_workers: int = 1, progress: Progress | None = None) -> None:
        """Builds the data set, unless it is there already.

        Args:
          num_workers: Threads that prepare cases; the records do not depend on it.
          progress: Called with (cases done, cases in all) at the start and after each case.

        Raises:
          InputError: If anything about a case is wrong, or the files cannot be written. Nothing
            remains of the build.
        """
        with _quiet_log():
            if self.is_prepared():
                return
        self._num_workers, self._progress = num_workers, progress
        self._num_cases = sum(len(cases) for cases in self.list_cases().values())
        self._num_done = 0
        self._report()
        tfds.disable_progress_bar()
        try:
            with _quiet_log():
                self.download_and_prepare()
        except (OSError, RuntimeError) as error:
            # array_record has no type of its own for a disk that is full, but says what failed.
            if not isinstance(error, OSError) and "write() failed" not in str(error):
                raise
            raise InputError(
                f"{self.data_dir}: the data set cannot be written; "
                "check its permissions and that the disk has room."
            ) from error
        finally:
            root = Path(self.data_dir_root)
            for folder in (Path(self.data_dir).parent, root / "downloads" / "extracted"):
                _remove_empty_folders(folder, top=root)

    @classmethod
    @abc.abstractmethod
    def create(cls, settings: Any, *, data_dir: str | os.PathLike) -> "RecordsBuilder":
        """Makes the builder of these settings, by `create_builder`; nothing is built yet."""

    @property
    @abc.abstractmethod
    def num_classes(self) -> int:
        """Classes of the labels, background included."""

    @abc.abstractmethod
    def list_cases(self) -> dict[str, Sequence[Any]]:
        """The cases of each split, in the order of the records; cheap, and checks what it can."""

    @abc.abstractmethod
    def prepare_case(self, case: Any) -> dict[str, Any]:
        """One case as a record, by `create_record`; runs in several threads at once."""

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # Nothing is downloaded.
        return {split: self._generate_examples(cases) for split, cases in self.list_cases().items()}

    def _generate_examples(self, cases: Sequence[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        records = _map_in_order(self.prepare_case, cases, num_workers=self._num_workers)
        for index, record in enumerate(records):
            yield index, record
            self._num_done += 1
            self._report()

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._num_done, self._num_cases)

    # tfds prints a line before and after a build; whoever calls `prepare` reports in its own way.
    def _log_download_bytes(self) -> None: ...

    def _log_download_done(self) -> None: ...


def create_builder(
    builder_class: type[RecordsBuilder],
    settings: Any,
    *,
    name: str,
    fingerprint: Any,
    data_dir: str | os.PathLike,
) -> RecordsBuilder:
    """Makes a builder whose config name says on what its records depend.

    Args:
      builder_class: Of which data set.
      settings: Its settings, an instance of ``builder_class.SETTINGS``.
      name: Readable part of the config's name: letters, digits, dots, dashes, underscores.
      fingerprint: JSON-able; whatever the records depend on and the settings do not say.
      data_dir: Folder of prepared data sets.

    Returns:
      The builder; nothing is built yet.
    """
    depends_on = json.dumps([dataclasses.asdict(settings), fingerprint], sort_keys=True)
    digest = hashlib.sha256(depends_on.encode()).hexdigest()[:12]
    with _quiet_log():
        return builder_class(
            config=RecordsConfig(name=f"{name}-{digest}", settings=settings),
            data_dir=data_dir,
            file_format="array_record",
        )


def create_info(
    builder: RecordsBuilder, *, description: str, shape: tuple[int, int, int], num_channels: int
) -> tfds.core.DatasetInfo:
    """The features of a record.

    Args:
      builder: Whose records.
      description: Of the data set, in prose.
      shape: Voxels of the prepared grid.
      num_channels: Channels of an image.

    Returns:
      The info, with ``image`` float32 ``[X, Y, Z, C]``, normalised; ``labels`` uint8
      ``[X, Y, Z]``; ``case_id``; ``spacing`` float32 ``[3]``, mm; ``content_start`` and
      ``content_stop`` int32 ``[3]``, the box of voxels that are not padding;
      ``lesion_volume_mm3``, of the whole foreground before it was resampled or cropped; and
      ``roughness`` of the lesion surface, NaN where it is not known.
    """
    # Volumes as bytes: a list of floats in a protocol buffer is an order slower to decode.
    volume = {"encoding": tfds.features.Encoding.BYTES}
    vector = {"shape": (3,), "dtype": np.int32}
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Tensor(shape=(*shape, num_channels), dtype=np.float32, **volume),
            "labels": tfds.features.Tensor(shape=shape, dtype=np.uint8, **volume),
            "case_id": tfds.features.Text(),
            "spacing": tfds.features.Tensor(shape=(3,), dtype=np.float32),
            "content_start": tfds.features.Tensor(**vector),
            "content_stop": tfds.features.Tensor(**vector),
            "lesion_volume_mm3": tfds.features.Scalar(dtype=np.float32),
            "roughness": tfds.features.Scalar(dtype=np.float32),
        }
    )
    return tfds.core.DatasetInfo(
        builder=builder, description=description, features=features, disable_shuffling=True
    )


def create_record(
    image: Volume,
    labels: Volume,
    *,
    original: Volume,
    case_id: str,
    lesion_volume_mm3: float,
    roughness: float = math.nan,
) -> dict[str, Any]:
    """One case as a record of `create_info`.

    Args:
      image: Prepared, float32 ``[X, Y, Z, C]``.
      labels: Prepared, uint8 ``[X, Y, Z]``.
      original: The image before it was prepared, for the box of real voxels.
      case_id: Unique in the data set.
      lesion_volume_mm3: Volume of the foreground, at the source's resolution.
      roughness: Of the lesion surface, if known.

    Returns:
      The record, for tfds to encode.
    """
    start, stop = content_box(original, image)
    return {
        "image": image.array,
        "labels": labels.array,
        "case_id": case_id,
        "spacing": np.float32(image.spacing),
        "content_start": start,
        "content_stop": stop,
        "lesion_volume_mm3": np.float32(lesion_volume_mm3),
        "roughness": np.float32(roughness),
    }


def _map_in_order(
    function: Callable[[Any], Any], items: Sequence[Any], *, num_workers: int
) -> Iterator[Any]:
    """Results in the order of the items; at most a few wait, so that memory does not grow."""
    pending = collections.deque()
    pool = ThreadPoolExecutor(num_workers)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


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
