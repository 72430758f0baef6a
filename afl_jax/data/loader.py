"""From a prepared data set to batches: the builders by name, and a resumable iterator.

The order of cases is a function of (seed, epoch): every epoch is a new permutation, and a batch may
reach from one epoch into the next, so that none is dropped. What a process reads is its rows of the
batch that all processes share, so that a run does not depend on how many there are. Batches are
read and decoded by threads, ahead of their use.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from afl_jax.data.brats2018 import Brats2018
from afl_jax.data.folder import Folder
from afl_jax.data.phantom import Phantom
from afl_jax.data.picai2022 import Picai2022
from afl_jax.data.records import Progress, RecordsBuilder
from afl_jax.errors import InputError

BUILDERS: dict[str, type[RecordsBuilder]] = {
    "brats2018": Brats2018,
    "folder": Folder,
    "phantom": Phantom,
    "picai2022": Picai2022,
}


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike,
    num_workers: int = 1,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    **settings: Any,
) -> RecordsBuilder:
    """Prepares a data set, or finds the one that these settings made before.

    Args:
      name: Of the builder, one of ``BUILDERS``.
      data_dir: Folder of prepared data sets.
      num_workers: Threads that prepare cases.
      progress: Called with (cases done, cases in all) while cases are prepared.
      warn: See `RecordsBuilder.prepare`.
      **settings: Of the builder, such as `FolderSettings`.

    Returns:
      The builder, prepared: ``builder.as_data_source("train")`` is a source for `create_loader`.

    Raises:
      InputError: If there is no such builder or setting, or the input is not as it must be.
    """
    builder = create_records_builder(name, data_dir=data_dir, **settings)
    builder.prepare(num_workers=num_workers, progress=progress, warn=warn)
    return builder


def create_records_builder(
    name: str, *, data_dir: str | os.PathLike, **settings: Any
) -> RecordsBuilder:
    """Makes the builder of a data set; nothing is prepared.

    Args:
      name: Of the builder, one of ``BUILDERS``.
      data_dir: Folder of prepared data sets.
      **settings: Of the builder, such as `FolderSettings`.

    Returns:
      The builder.

    Raises:
      InputError: If there is no such builder or setting, or the input is not as it must be.
    """
    if name not in BUILDERS:
        raise InputError(f"no data set is called {name!r}; choose one of {sorted(BUILDERS)}.")
    builder_class = BUILDERS[name]
    fields = dataclasses.fields(builder_class.SETTINGS)
    known = sorted(field.name for field in fields)
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    if unknown := sorted(set(settings) - set(known)):
        raise InputError(f"data set {name!r} has no setting {unknown[0]!r}; choose among {known}.")
    if missing := sorted(required - set(settings)):
        raise InputError(f"data set {name!r} needs the setting {missing[0]!r}: give it.")
    return builder_class.create(builder_class.SETTINGS(**settings), data_dir=data_dir)


def create_loader(
    source: Sequence[dict[str, Any]],
    *,
    batch_size: int,
    shuffle: bool,
    num_epochs: int | None,
    seed: int = 0,
    num_threads: int = 2,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Iterates over batches.

    Args:
      source: Records by index, such as ``builder.as_data_source("train")``.
      batch_size: Cases of a batch, those of all processes together.
      shuffle: Whether every epoch is a new permutation; else cases come in order.
      num_epochs: After how many to stop; None goes on for ever.
      seed: Of the permutations.
      num_threads: Threads that read ahead, a batch each; with 0 nothing is read ahead.
      process_index: Which process this is.
      process_count: How many share a batch; each reads ``batch_size // process_count`` rows.

    Returns:
      An iterator whose ``get_state`` and ``set_state`` resume it exactly, over dicts of arrays
      with B rows: ``image`` float32 ``[B, X, Y, Z, C]``; ``labels`` uint8 ``[B, X, Y, Z]``;
      ``voxel_mask`` bool ``[B, X, Y, Z]``, False where a volume was padded; ``valid`` bool
      ``[B]``, False in the rows that fill up the last batch with a repeated case; ``epoch`` and
      ``case_index`` int32 ``[B]``, the index in ``source``; ``spacing`` float32 ``[B, 3]``, mm;
      ``lesion_volume_mm3`` and ``roughness`` float32 ``[B]``; and ``case_id``, an array of
      strings, which is no array of JAX.

    Raises:
      InputError: If the batch size is not a positive multiple of the number of processes.
    """
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"batch_size must be a positive multiple of the {process_count} processes, "
            f"got {batch_size}."
        )
    num_cases = len(source)
    rows = batch_size // process_count
    own_rows = slice(process_index * rows, (process_index + 1) * rows)

    def locate(position: int, case_index: int) -> np.ndarray:
        return np.array([position // num_cases, case_index], np.int32)

    def read_batch(located: np.ndarray) -> dict[str, np.ndarray]:
        valid = np.arange(batch_size) < len(located)
        filled = np.concatenate([located, np.repeat(located[:1], batch_size - len(located), 0)])
        epoch, case_index = filled[own_rows].T
        records = [source[index] for index in case_index.tolist()]
        return _stack(records) | {
            "valid": valid[own_rows],
            "epoch": epoch,
            "case_index": case_index,
        }

    cases = grain.MapDataset.range(num_cases).seed(seed)
    if shuffle:
        cases = cases.shuffle()
    # Indices are batched before records are read, so that a process reads its own rows only.
    batches = (
        cases.repeat(num_epochs)
        .map_with_index(locate)
        # Without an end nothing remains; and grain rounds that length up, in float, too far.
        .batch(batch_size, drop_remainder=num_epochs is None)
        .map(read_batch)
    )
    # grain's own default reads 500 elements ahead, which here are batches of volumes.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(batches.to_iter_dataset(options))


def _stack(records: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    dtypes = {
        "image": np.float32,
        "labels": np.uint8,
        "spacing": np.float32,
        "lesion_volume_mm3": np.float32,
        "roughness": np.float32,
    }
    batch = {
        name: np.stack([record[name] for record in records]).astype(dtype, copy=False)
        for name, dtype in dtypes.items()
    }
    batch["voxel_mask"] = np.stack([_voxel_mask(record) for record in records])
    batch["case_id"] = np.array([record["case_id"].decode() for record in records])
    return batch


def _voxel_mask(record: dict[str, Any]) -> np.ndarray:
    mask = np.zeros(record["labels"].shape, bool)
    start, stop = record["content_start"], record["content_stop"]
    mask[tuple(slice(*ends) for ends in zip(start, stop, strict=True))] = True
    return mask
