"""The training loop: cadence, evaluation, log and checkpoints of one run.

The loop reads nothing back from the devices while they work but the loss of a step long done, for
the progress bar; it stays two steps ahead of them. A row of metrics an epoch goes to
``metrics.csv`` and ``metrics.jsonl`` of the run, both rewritten whole, so that they agree with the
checkpoint from which a run was resumed.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import TextColumn

from afl_jax import metrics, parallel, reports
from afl_jax.checkpoint import Checkpoint, CheckpointStore
from afl_jax.config import Config
from afl_jax.errors import InputError

Row = dict[str, Any]

METRICS: dict[str, Callable[[metrics.ConfusionCounts], jax.Array]] = {
    "dice": metrics.dice,
    "iou": metrics.iou,
    "sensitivity": metrics.sensitivity,
    "specificity": metrics.specificity,
}
# Host arrays of a batch that no device needs.
_HOST_FIELDS = ("case_id",)


def evaluate(
    variables: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    eval_step: Callable[..., Mapping[str, Any]],
    devices: Sequence[jax.Device],
) -> list[Row]:
    """Metrics of every case.

    Args:
        variables: The network's collections, as `parallel.replicate` returns them.
        batches: Of an evaluation loader; cases that are not ``valid`` are left out.
        eval_step: `training.eval_step`, compiled for the devices.
        devices: On which it runs.

    Returns:
        A row a case: ``case_id``, ``loss`` and what `metric_rows` gives.
    """
    rows = []
    for batch, output in run_eval_step(variables, batches, eval_step=eval_step, devices=devices):
        values = metric_rows(output["counts"])
        for i in np.flatnonzero(batch["valid"]):
            row = {"case_id": str(batch["case_id"][i]), "loss": float(output["loss"][i])}
            rows.append(row | values[i])
    return rows


def metric_rows(counts: metrics.ConfusionCounts) -> list[Row]:
    """The metrics of every case of a batch.

    Args:
        counts: Confusion counts ``[B, F]``, a column a foreground class.

    Returns:
        A row a case: `METRICS`, means over the foreground classes where they are defined; with
        several of those also one column for each, such as ``dice_2``.
    """
    values = {name: np.asarray(metric(counts)) for name, metric in METRICS.items()}
    num_cases, num_foreground = values["dice"].shape
    rows = []
    for i in range(num_cases):
        row = {name: _nan_mean(value[i]) for name, value in values.items()}
        if num_foreground > 1:
            for name, value in values.items():
                row |= {f"{name}_{c + 1}": float(value[i, c]) for c in range(num_foreground)}
        rows.append(row)
    return rows


def run_eval_step(
    variables: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    eval_step: Callable[..., Mapping[str, Any]],
    devices: Sequence[jax.Device],
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each batch with what the step makes of it, both on the host.

    Args:
        variables: The network's collections, as `parallel.replicate` returns them.
        batches: Of an evaluation loader.
        eval_step: `training.eval_step`, compiled for the devices.
        devices: On which it runs.

    Yields:
        A batch and the output of the step.
    """
    for batch in batches:
        output = eval_step(variables, parallel.shard_batch(_device_fields(batch), devices))
        yield batch, parallel.gather(output, devices)


def fit(
    state: Any,
    *,
    config: Config,
    batches: Iterator[Mapping[str, Any]],
    num_steps: int,
    train_step: Callable[..., tuple[Any, Mapping[str, jax.Array]]],
    evaluate_fn: Callable[[Any], list[Row]],
    key: jax.Array,
    devices: Sequence[jax.Device],
    store: CheckpointStore,
    run_dir: Path,
    console: Console,
    history: Sequence[Row] = (),
    log_fn: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Trains until the config's number of epochs is done.

    Args:
        state: Training state on one device, at the end of ``history``.
        config: The run's.
        batches: Training data without end, with ``get_state``.
        num_steps: Steps an epoch.
        train_step: `training.train_step`, compiled for the devices.
        evaluate_fn: Replicated variables to a row of metrics for each validation case.
        key: The run's key for augmentation.
        devices: On which the step runs.
        store: Where checkpoints go, after each validation.
        run_dir: Where the log goes.
        console: Where progress is shown.
        history: Rows of the epochs that are done.
        log_fn: Called with the row of each epoch.

    Returns:
        A row an epoch.

    Raises:
        InputError: If the loss of an epoch is not finite.
    """
    history = list(history)
    state, key = parallel.replicate((state, key), devices)
    loss_column = TextColumn("loss {task.fields[loss]:.5f}")
    with reports.progress_bar(console, loss_column) as progress:
        done = len(history) * num_steps
        task = progress.add_task(
            "training", total=config.num_epochs * num_steps, completed=done, loss=math.nan
        )
        for epoch in range(len(history) + 1, config.num_epochs + 1):
            start, wait, steps = time.perf_counter(), 0.0, deque()
            outputs = []
            for _ in range(num_steps):
                before = time.perf_counter()
                batch = next(batches)
                wait += time.perf_counter() - before
                batch = parallel.shard_batch(_device_fields(batch), devices)
                # Whatever the step needs lies on the devices; the guard proves it.
                with jax.transfer_guard("disallow"):
                    state, output = train_step(state, batch, key)
                outputs.append(output)
                steps.append(output["loss"])
                if len(steps) > 2:
                    progress.update(task, loss=np.asarray(steps.popleft()).flat[0])
                progress.advance(task)
            means = _mean_outputs(outputs)
            seconds = time.perf_counter() - start
            if not math.isfinite(means["loss"]):
                raise InputError(
                    f"the training loss of epoch {epoch} is {means['loss']}: lower "
                    "optimizer.learning-rate or set optimizer.max-gradient-norm, in a new run."
                )
            row = {
                "epoch": epoch,
                "step": epoch * num_steps,
                **means,
                "volumes_per_second": num_steps * config.batch_size / seconds,
                "data_wait_fraction": wait / seconds,
            }
            validated = epoch % config.eval_every == 0 or epoch == config.num_epochs
            if validated:
                row |= _summary(evaluate_fn(state.variables))
            history.append(row)
            _write_history(run_dir, history)
            if log_fn is not None:
                log_fn(row)
            line = _epoch_line(row, config.num_epochs)
            progress.console.print(line, highlight=False, soft_wrap=True)
            if validated:
                store.save(
                    _checkpoint(parallel.unreplicate(state, devices), batches, history, config),
                    score=row["val_dice"],
                )
    return history


def _device_fields(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: value for name, value in batch.items() if name not in _HOST_FIELDS}


def _mean_outputs(outputs: Sequence[Mapping[str, jax.Array]]) -> dict[str, float]:
    """Means over the steps; a value of several devices is the same on each."""
    outputs = jax.device_get(outputs)
    return {
        name: float(np.mean([np.asarray(output[name]).flat[0] for output in outputs]))
        for name in outputs[0]
    }


def _summary(rows: Sequence[Row]) -> Row:
    """Means over the cases in which a metric is defined."""
    names = [name for name in rows[0] if name != "case_id"]
    return {f"val_{name}": _nan_mean([row[name] for row in rows]) for name in names}


def _nan_mean(values: Sequence[float] | np.ndarray) -> float:
    mean, _ = metrics.nan_mean(np.asarray(values, np.float32))
    return float(mean)


def _checkpoint(
    state: Any, batches: Iterator[Any], history: Sequence[Row], config: Config
) -> Checkpoint:
    return Checkpoint(
        epoch=len(history),
        variables=state.variables,
        optimizer={"step": state.step, "opt_state": state.opt_state},
        iterator=batches.get_state(),
        history=list(history),
        config=config,
    )


def _write_history(run_dir: Path, history: Sequence[Row]) -> None:
    reports.write_csv(run_dir / "metrics.csv", history)
    reports.write_jsonl(run_dir / "metrics.jsonl", history)


def _epoch_line(row: Row, num_epochs: int) -> str:
    parts = [
        f"epoch {row['epoch']:>{len(str(num_epochs))}}/{num_epochs}",
        f"loss {row['loss']:.5f}",
    ]
    if "gamma" in row:
        parts.append(f"gamma {row['gamma']:.4f}")
    if "val_dice" in row:
        parts.append(f"val loss {row['val_loss']:.5f}  val Dice {row['val_dice']:.3f}")
    parts.append(f"{row['volumes_per_second']:.2f} volumes/s")
    parts.append(f"waited {row['data_wait_fraction']:.0%} for data")
    return "  ".join(parts)
