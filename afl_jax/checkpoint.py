"""Checkpoints of a run: weights, optimizer, data iterator, history and config together.

A run keeps the newest checkpoint, to resume from, and the one with the best validation score, to
predict with. Orbax writes each beside its place and renames it: one that exists is whole.
"""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from afl_jax.config import Config, from_json, to_json
from afl_jax.errors import InputError

# Orbax tells its users about its own internals on every save.
logging.getLogger("absl").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
      epoch: Epochs done.
      variables: The network's collections ``params`` and ``batch_stats``.
      optimizer: ``step`` and ``opt_state``; None if only the network was restored.
      iterator: State of the training data's iterator, JSON-able.
      history: A row of metrics for each epoch done.
      config: The run's.
    """

    epoch: int
    variables: Any
    optimizer: Any
    iterator: Any
    history: list[dict[str, Any]]
    config: Config


class CheckpointStore:
    """The checkpoints of one run, numbered by epoch."""

    def __init__(self, folder: Path, *, read_only: bool = False):
        """Opens a folder of checkpoints; it is made unless it is there, or only read."""
        self.folder = folder

        def score(metrics: dict[str, float]) -> float:
            return metrics["score"]

        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                read_only=read_only,
                best_fn=score,
                best_mode="max",
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(1), policies.BestN(get_metric_fn=score, n=1)]
                ),
            ),
        )

    @property
    def is_empty(self) -> bool:
        """Whether there is no checkpoint."""
        return self._manager.latest_step() is None

    def save(self, checkpoint: Checkpoint, *, score: float) -> None:
        """Starts writing a checkpoint and returns once its arrays are copied.

        Args:
          checkpoint: What to write.
          score: By which the best is chosen, the greater the better; NaN is the worst.
        """
        self._manager.save(
            checkpoint.epoch,
            args=ocp.args.Composite(
                variables=ocp.args.StandardSave(checkpoint.variables),
                optimizer=ocp.args.StandardSave(checkpoint.optimizer),
                progress=ocp.args.JsonSave(
                    {
                        "iterator": checkpoint.iterator,
                        "history": checkpoint.history,
                        "config": to_json(checkpoint.config),
                    }
                ),
            ),
            metrics={"score": -1.0 if math.isnan(score) else float(score)},
        )

    def restore(self, which: Literal["latest", "best"], *, optimizer: Any = None) -> Checkpoint:
        """Reads a checkpoint.

        Args:
          which: The newest, or the one with the best score.
          optimizer: Arrays like the optimizer's part, or their shapes; if None it is not read.

        Returns:
          The checkpoint, its arrays on the first device.

        Raises:
          InputError: If there is none, or it cannot be read.
        """
        newest, best = self._manager.latest_step(), self._manager.best_step()
        epoch = newest if which == "latest" else best
        if epoch is None:
            raise InputError(
                f"{self.folder} holds no checkpoint: train first, or name another run."
            )
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        items = {
            "variables": ocp.args.StandardRestore(fallback_sharding=device),
            "progress": ocp.args.JsonRestore(),
        }
        if optimizer is not None:
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), optimizer
            )
            items["optimizer"] = ocp.args.StandardRestore(target)
        path = self.folder / str(epoch)
        try:
            restored = self._manager.restore(epoch, args=ocp.args.Composite(**items))
            progress = restored["progress"]
            return Checkpoint(
                epoch=epoch,
                variables=restored["variables"],
                optimizer=restored.get("optimizer"),
                iterator=progress["iterator"],
                history=progress["history"],
                config=from_json(progress["config"], name=str(path)),
            )
        except InputError:
            raise
        except Exception as error:  # Orbax raises many kinds for a damaged folder.
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
            raise InputError(
                f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason}): "
                "delete it, so that another one of the run is used, or train again."
            ) from error

    def wait(self) -> None:
        """Waits until everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and releases the folder."""
        self._manager.close()
