"""Checkpoints of a run: weights, optimizer, data iterator, random key, history and config together.

A run keeps its newest checkpoints, to resume from, and the one with the best validation score, to
predict with. They are numbered in the order in which they were written. Orbax writes each beside
its place, while the run goes on, and renames it: one that exists is whole. A checksum of every
array tells one that was damaged later; the newest that is sound is resumed from.
"""

import dataclasses
import json
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from afl_jax.config import Config, from_json, to_json
from afl_jax.errors import InputError

# Orbax tells its users about its own internals on every save, and asyncio, with a traceback, of
# further errors of a checkpoint of which the first is raised.
logging.getLogger("absl").setLevel(logging.ERROR)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


@dataclasses.dataclass(frozen=True)
class EpochTotals:
    """What an epoch that is not at its end has added up.

    Attributes:
      sums: Of each metric of the training step, over the steps that count.
      num_steps: Steps that count.
      num_skipped: Steps that were skipped, since their loss or gradient was not finite.
    """

    sums: Mapping[str, float] = dataclasses.field(default_factory=dict)
    num_steps: int = 0
    num_skipped: int = 0


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
      step: Steps done.
      variables: The network's collections ``params`` and ``batch_stats``.
      optimizer: ``step`` and ``opt_state``; None if only the network was restored.
      key: The run's key for augmentation.
      iterator: State of the training data's iterator, JSON-able.
      history: A row of metrics for each epoch done.
      totals: Of the steps after those epochs.
      config: The run's.
    """

    step: int
    variables: Any
    optimizer: Any
    key: jax.Array
    iterator: Any
    history: list[dict[str, Any]]
    totals: EpochTotals
    config: Config

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    @property
    def place(self) -> str:
        """Where in the run it was written, in words."""
        return f"epoch {self.epoch}, step {self.step}"


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, num_kept: int = 2, read_only: bool = False):
        """Opens a folder of checkpoints; it is made unless it is there, or only read.

        ``num_kept`` newest checkpoints are kept beside the best one. A checkpoint of which orbax
        could not even tell the score is set aside, if there are others; else it is an
        `InputError`, as it is where the folder is only read.
        """
        self.folder = folder
        self._notices: list[str] = []
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
        self._set_unlisted_aside(read_only=read_only)

        def score(metrics: dict[str, float]) -> float:
            return metrics["score"]

        best = policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                create=False,
                read_only=read_only,
                # What a killed process left half-written.
                cleanup_tmp_directories=not read_only,
                # Each process by itself: one writes, the others read.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=jax.process_index(), active_processes={jax.process_index()}
                ),
                best_fn=score,
                best_mode="max",
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(num_kept), best]
                ),
            ),
        )

    @property
    def is_empty(self) -> bool:
        """Whether there is no checkpoint."""
        return self._manager.latest_step() is None

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that is written; None if there is none."""
        with self._written():
            self._manager.wait_until_finished()
        number = self._manager.latest_step()
        return None if number is None else self.folder / str(number)

    def save(self, checkpoint: Checkpoint, *, score: float | None) -> None:
        """Starts writing a checkpoint and returns once its arrays are copied.

        Args:
          checkpoint: What to write.
          score: By which the best is chosen, the greater the better; NaN is the worst. None if
            the network was not validated.

        Raises:
          InputError: If this checkpoint, or the one before, cannot be written.
        """
        # On the host, where a checksum is quick; orbax copies what it is still to write.
        arrays = jax.device_get(
            {"variables": checkpoint.variables, "optimizer": checkpoint.optimizer}
        )
        progress = {
            "step": checkpoint.step,
            "key": np.asarray(jax.random.key_data(checkpoint.key)).tolist(),
            "iterator": checkpoint.iterator,
            "history": checkpoint.history,
            "totals": dataclasses.asdict(checkpoint.totals),
            "config": to_json(checkpoint.config),
            "checksums": {name: _checksums(tree) for name, tree in arrays.items()},
        }
        if score is not None:
            score = -1.0 if math.isnan(score) else float(score)
        with self._written():
            self._manager.save(
                self._next_number(),
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()},
                    progress=ocp.args.JsonSave(progress),
                ),
                metrics=None if score is None else {"score": score},
            )

    def restore_newest(
        self, *, optimizer: Any, warn: Callable[[str], None] | None = None
    ) -> Checkpoint:
        """Reads the newest checkpoint that is sound.

        One that is damaged is set aside, as ``damaged-N``, once an older one is found sound.

        Args:
          optimizer: Arrays like the optimizer's part, or their shapes.
          warn: Called with a line for each checkpoint that is damaged.

        Returns:
          The checkpoint, its arrays on the first device.

        Raises:
          InputError: If there is none, or none can be read.
        """
        numbers = sorted(self._manager.all_steps(), reverse=True)
        if not numbers:
            raise self._no_checkpoint()
        damaged: dict[int, InputError] = {}
        for number in numbers:
            try:
                checkpoint = self._read(number, optimizer=optimizer)
            except InputError as error:
                damaged[number] = error
                continue
            for other, error in damaged.items():
                self._set_aside(other, error)
            if damaged:
                self._manager.reload()
            for notice in self._notices:
                if warn is not None:
                    warn(f"{notice}; checkpoint {number} is used.")
            self._notices = []
            return checkpoint
        raise damaged[numbers[0]]

    def restore_best(self) -> Checkpoint:
        """Reads the checkpoint with the best validation score, without the optimizer's part.

        Returns:
          The checkpoint, its arrays on the first device.

        Raises:
          InputError: If there is none, or it cannot be read.
        """
        number = self._manager.best_step()
        if number is None:
            raise self._no_checkpoint()
        return self._read(number, optimizer=None)

    def wait(self) -> None:
        """Waits until everything that was saved is on disk.

        Raises:
          InputError: If it cannot be written.
        """
        with self._written():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and releases the folder."""
        with self._written():
            self._manager.close()

    def _read(self, number: int, *, optimizer: Any) -> Checkpoint:
        device = jax.local_devices()[0]
        sharding = jax.sharding.SingleDeviceSharding(device)
        items = {"variables": ocp.args.StandardRestore(), "progress": ocp.args.JsonRestore()}
        if optimizer is not None:
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), optimizer
            )
            items["optimizer"] = ocp.args.StandardRestore(target)
        path = self.folder / str(number)
        try:
            restored = self._manager.restore(number, args=ocp.args.Composite(**items))
            progress = restored["progress"]
            for name in set(items) - {"progress"}:
                if _checksums(jax.device_get(restored[name])) != progress["checksums"][name]:
                    raise ValueError(f"the checksums of {name} differ from those written")
            return Checkpoint(
                step=progress["step"],
                variables=jax.device_put(restored["variables"], device),
                optimizer=restored.get("optimizer"),
                key=jax.random.wrap_key_data(np.array(progress["key"], np.uint32)),
                iterator=progress["iterator"],
                history=progress["history"],
                totals=EpochTotals(**progress["totals"]),
                config=from_json(progress["config"], name=str(path)),
            )
        except InputError:
            raise
        except Exception as error:  # Orbax raises many kinds for a damaged folder.
            raise _unreadable(path, error) from error

    def _set_aside(self, number: int, error: Exception) -> None:
        aside = self.folder / f"damaged-{number}"
        (self.folder / str(number)).rename(aside)
        self._notices.append(f"{error} It is set aside as {aside}")

    def _set_unlisted_aside(self, *, read_only: bool) -> None:
        """Orbax reads two small files of every checkpoint when it opens a folder; so do we."""
        faults, num_sound = {}, 0
        for path in self.folder.glob("*"):
            if not path.name.isdigit():
                continue
            try:
                _read_object(path / "_CHECKPOINT_METADATA")
                if (path / "metrics").exists():
                    float(_read_object(path / "metrics" / "metrics")["score"])
                num_sound += 1
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                faults[int(path.name)] = _unreadable(path, error)
        for number, error in faults.items():
            if read_only or num_sound == 0:
                raise error
            self._set_aside(number, error)

    def _next_number(self) -> int:
        """One more than the newest, which is being written, and than any that was set aside."""
        names = [path.name.removeprefix("damaged-") for path in self.folder.iterdir()]
        numbers = [int(name) for name in names if name.isdigit()]
        return max([*numbers, *self._manager.all_steps()], default=0) + 1

    def _no_checkpoint(self) -> InputError:
        return InputError(f"{self.folder} holds no checkpoint: train first, or name another run.")

    @contextmanager
    def _written(self) -> Iterator[None]:
        """What goes wrong while a checkpoint is written, some of it in another thread."""
        try:
            yield
        except Exception as error:  # Orbax and its storage raise many kinds for a full disk.
            raise InputError(
                f"{self.folder}: a checkpoint cannot be written ({_reason(error)}); check "
                "its permissions and that the disk has room, then go on with --resume: those "
                "before are kept."
            ) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} cannot be read as a checkpoint ({_reason(error)}): delete it, so that another one "
        "of the run is used, or train again."
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must be an object")
    return content


def _checksums(tree: Any) -> dict[str, int]:
    """CRC-32 of the bytes of each array of the host."""
    return {
        jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
