"""The training loop: cadence, evaluation, log and checkpoints of one run.

The loop reads nothing back from the devices while they work but the metrics of a step long done;
it stays two steps ahead of them. A row of metrics an epoch goes to ``metrics.csv`` and
``metrics.jsonl`` of the run, both rewritten whole, so that they agree with the checkpoint from
which a run was resumed.

A run that is resumed gives, on the same devices, bit for bit the parameters and the log of one that
was not interrupted, but for the two columns that are times: ``volumes_per_second`` and
``data_wait_fraction``.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import TextColumn

from afl_jax import metrics, parallel, reports
from afl_jax.checkpoint import Checkpoint, CheckpointStore, EpochTotals
from afl_jax.config import Config
from afl_jax.errors import InputError, print_error
from afl_jax.signals import Interrupted, StopRequest

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
    stop: StopRequest,
    history: Sequence[Row] = (),
    totals: EpochTotals = EpochTotals(),
    log_fn: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Trains until the config's number of epochs is done.

    Args:
        state: Training state on one device, where ``history`` and ``totals`` end.
        config: The run's.
        batches: Training data without end, with ``get_state``.
        num_steps: Steps an epoch.
        train_step: `training.train_step`, compiled for the devices.
        evaluate_fn: Replicated variables to a row of metrics for each validation case.
        key: The run's key for augmentation.
        devices: On which the step runs.
        store: Where checkpoints go: after every epoch, and as often as the config says.
        run_dir: Where the log goes.
        console: Where progress is shown.
        stop: Checked after every step.
        history: Rows of the epochs that are done.
        totals: Of the steps after them.
        log_fn: Called with the row of each epoch.

    Returns:
        A row an epoch.

    Raises:
        InputError: If the loss or the gradient of a step is not finite, or a checkpoint cannot be
            written.
        Interrupted: If ``stop`` asks for it, or ``evaluate_fn`` raises it; after a checkpoint.
    """
    history, step = list(history), int(state.step)
    pending: deque[_PendingStep] = deque()
    state, step_key = parallel.replicate((state, key), devices)
    # A random key reaches the devices of several processes by way of the host.
    guard = "disallow" if parallel.process_count() == 1 else "allow"

    saved_at = (step, len(history))

    def save(*, score: float | None) -> None:
        nonlocal saved_at
        saved_at = (step, len(history))
        if parallel.process_index() != 0:
            return
        one = parallel.unreplicate(state, devices)
        store.save(
            Checkpoint(
                step=step,
                variables=one.variables,
                optimizer={"step": one.step, "opt_state": one.opt_state},
                key=key,
                iterator=batches.get_state(),
                history=list(history),
                totals=totals,
                config=config,
            ),
            score=score,
        )

    if history:
        _write_history(run_dir, history)
    loss_column = TextColumn("loss {task.fields[loss]:.5f}")
    with reports.progress_bar(console, loss_column) as progress:
        task = progress.add_task(
            "training", total=config.num_epochs * num_steps, completed=step, loss=math.nan
        )

        def settle(*, num_ahead: int) -> None:
            """Reads the metrics of all steps but the last few."""
            nonlocal totals
            while len(pending) > num_ahead:
                done = pending.popleft()
                values = _read_metrics(done.output, devices)
                totals = _add(totals, values, done, config=config, store=store)
                progress.update(task, loss=values["loss"])

        try:
            for epoch in range(len(history) + 1, config.num_epochs + 1):
                start, wait, first_step = time.perf_counter(), 0.0, step
                while step < epoch * num_steps:
                    before = time.perf_counter()
                    batch = next(batches)
                    wait += time.perf_counter() - before
                    fields = parallel.shard_batch(_device_fields(batch), devices)
                    # Whatever the step needs lies on the devices; the guard proves it.
                    with jax.transfer_guard(guard):
                        state, output = train_step(state, fields, step_key)
                    step += 1
                    pending.append(_PendingStep(step, epoch, batch, output))
                    settle(num_ahead=2)
                    progress.advance(task)
                    stop.check()
                    every = config.checkpoint_every
                    if every is not None and step % every == 0 and step < epoch * num_steps:
                        settle(num_ahead=0)
                        save(score=None)
                settle(num_ahead=0)
                seconds = time.perf_counter() - start
                row = {"epoch": epoch, "step": step, **_means(totals, epoch)}
                if config.non_finite == "skip":
                    row["skipped_steps"] = totals.num_skipped
                row |= {
                    "volumes_per_second": (step - first_step) * config.batch_size / seconds,
                    "data_wait_fraction": wait / seconds,
                }
                validated = epoch % config.eval_every == 0 or epoch == config.num_epochs
                if validated:
                    row |= _summary(evaluate_fn(state.variables))
                history.append(row)
                totals = EpochTotals()
                _write_history(run_dir, history)
                if log_fn is not None:
                    log_fn(row)
                line = _epoch_line(row, config.num_epochs)
                progress.console.print(line, highlight=False, soft_wrap=True)
                save(score=row.get("val_dice"))
                stop.check()
        except Interrupted as interruption:
            settle(num_ahead=0)
            if saved_at != (step, len(history)):
                save(score=None)
            store.wait()
            parallel.wait_for_all("the last checkpoint is written")
            raise interruption.at(f"{step} of {config.num_epochs * num_steps} steps") from None
    return history


class _PendingStep(NamedTuple):
    """A step of which the metrics are not read yet."""

    step: int
    epoch: int
    batch: Mapping[str, Any]
    output: Mapping[str, jax.Array]


def _read_metrics(
    output: Mapping[str, jax.Array], devices: Sequence[jax.Device]
) -> dict[str, float]:
    values = jax.device_get(parallel.unreplicate(output, devices))
    return {name: float(value) for name, value in values.items()}


def _add(
    totals: EpochTotals,
    values: Mapping[str, float],
    done: _PendingStep,
    *,
    config: Config,
    store: CheckpointStore,
) -> EpochTotals:
    """The totals with one more step; a step that is not finite stops the run or is counted."""
    if math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]):
        sums = {name: totals.sums.get(name, 0.0) + value for name, value in values.items()}
        return replace(totals, sums=sums, num_steps=totals.num_steps + 1)
    what = (
        f"step {done.step} (epoch {done.epoch}): the loss is {values['loss']}, the norm of its "
        f"gradient {values['gradient_norm']}; the batch was {_describe_batch(done.batch)}"
    )
    if config.non_finite == "skip":
        print_error(f"{what}; the step is skipped.")
        return replace(totals, num_skipped=totals.num_skipped + 1)
    newest = store.newest or "none yet"
    raise InputError(
        f"{what}; the last good checkpoint is {newest}: lower optimizer.learning-rate or set "
        "optimizer.max-gradient-norm in a new run, mend the case, or go on with --resume "
        "--non-finite skip."
    )


def _describe_batch(batch: Mapping[str, Any]) -> str:
    """Each case of a batch with the statistics of its image, before augmentation."""
    parts = []
    for case_id, image, labels in zip(
        batch["case_id"], batch["image"], batch["labels"], strict=True
    ):
        finite = image[np.isfinite(image)]
        low, high, mean, deviation = (
            (finite.min(), finite.max(), finite.mean(), finite.std()) if finite.size else [0.0] * 4
        )
        parts.append(
            f"{case_id} (image from {low:.4g} to {high:.4g}, mean {mean:.4g}, standard deviation "
            f"{deviation:.4g}, {image.size - finite.size} values not finite; "
            f"{np.count_nonzero(labels)} foreground voxels)"
        )
    return ", ".join(parts)


def _means(totals: EpochTotals, epoch: int) -> dict[str, float]:
    if totals.num_steps == 0:
        raise InputError(
            f"every step of epoch {epoch} was skipped, since no loss or gradient was finite: lower "
            "optimizer.learning-rate or set optimizer.max-gradient-norm, in a new run."
        )
    return {name: value / totals.num_steps for name, value in totals.sums.items()}


def _device_fields(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: value for name, value in batch.items() if name not in _HOST_FIELDS}


def _summary(rows: Sequence[Row]) -> Row:
    """Means over the cases in which a metric is defined."""
    names = [name for name in rows[0] if name != "case_id"]
    return {f"val_{name}": _nan_mean([row[name] for row in rows]) for name in names}


def _nan_mean(values: Sequence[float] | np.ndarray) -> float:
    mean, _ = metrics.nan_mean(np.asarray(values, np.float32))
    return float(mean)


def _write_history(run_dir: Path, history: Sequence[Row]) -> None:
    if parallel.process_index() != 0:
        return
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
