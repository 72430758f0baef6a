"""Where the names of a config become objects: data, network, loss, optimizer."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from rich.console import Console

from afl_jax import inference, loop, metrics, parallel, reports, statistics, training
from afl_jax.config import Config, DataConfig, LossConfig
from afl_jax.data import augment, loader
from afl_jax.errors import InputError, print_error
from afl_jax.losses import LOSSES
from afl_jax.models import zoo

# Arrays of a batch that a loss may ask for by name.
_LOSS_FIELDS = ("spacing",)


@contextmanager
def as_input_error(where: str) -> Iterator[None]:
    """Turns the ValueError of a library function into bad input.

    Args:
        where: Field, argument or file at fault.

    Returns:
        A context manager.
    """
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error


def create_loss(config: LossConfig, *, num_classes: int) -> Callable[..., jax.Array]:
    """The loss with its options, tried on a volume of one voxel.

    Args:
        config: Name and options.
        num_classes: Channels of the logits.

    Returns:
        ``(logits, labels, *, voxel_mask) -> [B]``; see `loss_fields` and `loss_activation`.

    Raises:
        InputError: If the name, an option or its value is unknown.
    """
    loss_fn = _find_loss(config.name)
    allowed = [
        name
        for name, parameter in inspect.signature(loss_fn).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("voxel_mask", *_LOSS_FIELDS)
    ]
    options = dict(config.options)
    if unknown := [name for name in options if name not in allowed]:
        raise InputError(
            f"loss.options {unknown[0]!r} is not an option of {config.name}: choose from "
            f"{', '.join(allowed)}."
        )
    loss_fn = functools.partial(loss_fn, **options)
    with as_input_error("loss.options"):
        jax.eval_shape(loss_fn, jnp.zeros((1, 1, 1, 1, num_classes)), jnp.zeros((1, 1, 1, 1), int))
    return loss_fn


def _find_loss(name: str) -> Callable[..., jax.Array]:
    if name not in LOSSES:
        raise InputError(f"loss.name {name!r} is unknown: choose from {', '.join(LOSSES)}.")
    return LOSSES[name]


def loss_fields(loss_fn: Callable[..., jax.Array]) -> tuple[str, ...]:
    """What of a batch a loss takes besides logits, labels and voxel mask.

    Args:
        loss_fn: From `create_loss`.

    Returns:
        ``("spacing",)`` for a loss that measures in mm, else nothing.
    """
    parameters = inspect.signature(loss_fn).parameters
    return tuple(name for name in _LOSS_FIELDS if name in parameters)


def loss_activation(config: LossConfig, *, num_classes: int) -> Literal["sigmoid", "softmax"]:
    """The activation with which a network is read that was trained with a loss.

    Args:
        config: Name and options.
        num_classes: Channels of the logits.

    Returns:
        ``"softmax"`` where the loss has it, by its default or by option, for several channels.

    Raises:
        InputError: If the name is unknown.
    """
    parameter = inspect.signature(_find_loss(config.name)).parameters.get("activation")
    if parameter is None or num_classes == 1:
        return "sigmoid"
    return dict(config.options).get("activation", parameter.default)


def create_predict_fn(config: Config) -> Callable[[jax.Array], jax.Array]:
    """The function from logits to a class map.

    Args:
        config: The run's.

    Returns:
        ``[..., K]`` to int32 ``[...]``; see `inference.labels_from_probs`.
    """
    activation = loss_activation(config.loss, num_classes=config.model.num_classes)

    def predict(logits: jax.Array) -> jax.Array:
        return inference.labels_from_probs(inference.class_probs(logits, activation=activation))

    return predict


def create_model(config: Config, *, axis_name: str | None = None) -> nn.Module:
    """The network, which fits the shapes of the data.

    Args:
        config: The run's.
        axis_name: Mapped axis over which batch normalisation averages, or None.

    Returns:
        The Flax module.

    Raises:
        InputError: If the name is unknown or a shape does not fit the strides.
    """
    options = {
        key: value for key, value in asdict(config.model).items() if key not in ("name", "dtype")
    }
    # The default, None, computes in the dtype of the parameters: float32.
    dtype = jnp.bfloat16 if config.model.dtype == "bfloat16" else None
    with as_input_error("model"):
        model = zoo.create_model(config.model.name, **options, dtype=dtype, axis_name=axis_name)
        for shape in (config.data.shape, config.data.patch_shape or config.data.shape):
            zoo.check_image_shape((1, *shape, 1), strides=config.model.strides)
    return model


def compile_steps(
    config: Config,
    model: nn.Module,
    *,
    loss_fn: Callable[..., jax.Array],
    devices: Sequence[jax.Device],
    across_processes: bool = False,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The training and the evaluation step, compiled for devices.

    Args:
        config: The run's.
        model: From `create_model`, with the name of the devices' mapped axis.
        loss_fn: From `create_loss`.
        devices: From `parallel.select_devices`.
        across_processes: Whether the training step averages over all processes.

    Returns:
        `training.train_step` and `training.eval_step`, see `parallel.compile_step`.
    """
    fields = loss_fields(loss_fn)
    train_step = functools.partial(
        training.train_step,
        loss_fn=loss_fn,
        loss_fields=fields,
        augment_fn=functools.partial(
            augment.augment, patch_shape=config.data.patch_shape, **asdict(config.augment)
        ),
        statistics_fn=loss_statistics,
        axis_name=parallel.axis_name(devices),
        num_microbatches=config.num_microbatches,
        skip_non_finite=config.non_finite == "skip",
    )
    eval_step = functools.partial(
        training.eval_step,
        apply_fn=model.apply,
        loss_fn=loss_fn,
        loss_fields=fields,
        predict_fn=create_predict_fn(config),
        counts_fn=functools.partial(count, num_classes=config.model.num_classes),
    )
    return (
        parallel.compile_step(
            train_step, devices, donate_state=True, across_processes=across_processes
        ),
        parallel.compile_step(eval_step, devices),
    )


def create_optimizer(config: Config, *, num_steps: int) -> Any:
    """The optimizer with its schedule.

    Args:
        config: The run's.
        num_steps: Steps an epoch.

    Returns:
        An optax transformation.

    Raises:
        InputError: If an option is out of its range.
    """
    options = asdict(config.optimizer)
    name, learning_rate = options.pop("name"), options.pop("learning_rate")
    frozen = ("encoder",) if options.pop("freeze_encoder") else ()
    with as_input_error("optimizer"):
        schedule = training.create_schedule(
            options.pop("schedule"),
            learning_rate=learning_rate,
            num_steps=config.num_epochs * num_steps,
            num_warmup_steps=options.pop("num_warmup_steps"),
        )
        return training.create_optimizer(name, learning_rate=schedule, frozen=frozen, **options)


def create_tensorboard_log(out: Path) -> Callable[[loop.Row], None]:
    """A function that writes a row of metrics where TensorBoard finds it.

    Args:
        out: Folder of the run.

    Returns:
        Takes the row of an epoch.

    Raises:
        InputError: If tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(
            '--tensorboard needs an extra package: pip install "afl-jax[tensorboard]".'
        ) from error

    def log(row: loop.Row) -> None:
        with SummaryWriter(str(out / "tensorboard")) as writer:
            for name, value in row.items():
                writer.add_scalar(name, value, row["epoch"])

    return log


def run_config_path(run: Path) -> Path:
    """The config of a run.

    Args:
        run: Its folder.

    Returns:
        The path of its config.json.

    Raises:
        InputError: If there is none.
    """
    path = run / "config.json"
    if not path.is_file():
        raise InputError(f"--run {run} is not the folder of a run: it has no config.json.")
    return path


def create_builder(config: DataConfig, *, source: str | None = None) -> loader.RecordsBuilder:
    """The builder of a data set; nothing is prepared.

    Args:
        config: Which data set, and how.
        source: Folder of the raw data, in place of the config's.

    Returns:
        The builder.
    """
    if source is not None:
        config = replace(config, source=source)
    return loader.create_records_builder(config.name, data_dir=config.data_dir, **_settings(config))


def prepare_data(config: DataConfig, console: Console) -> loader.RecordsBuilder:
    """The builder of a data set, which is prepared unless it was before.

    Args:
        config: Which data set, and how.
        console: Where progress is shown.

    Returns:
        The builder.
    """
    with reports.progress_bar(console) as progress:
        task = progress.add_task(f"preparing {config.name}", total=None)
        return loader.prepare(
            config.name,
            data_dir=config.data_dir,
            num_workers=os.cpu_count() or 1,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            warn=print_error,
            **_settings(config),
        )


def _settings(config: DataConfig) -> dict[str, Any]:
    """What of a config the builder takes."""
    ours = ("name", "data_dir", "patch_shape")
    return {
        key: value for key, value in asdict(config).items() if key not in ours and value is not None
    }


def create_loader(builder: Any, split: str, config: Config, *, shared: bool = False) -> Any:
    """Batches: endless and shuffled to train, in order and once otherwise.

    Args:
        builder: Of a prepared data set.
        split: ``"train"``, ``"val"`` or ``"test"``.
        config: The run's.
        shared: Whether this process reads its share of each batch, and not all of it.

    Returns:
        See `loader.create_loader`.
    """
    is_train = split == "train"
    return loader.create_loader(
        builder.as_data_source(split),
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=is_train,
        num_epochs=None if is_train else 1,
        process_index=parallel.process_index() if shared else 0,
        process_count=parallel.process_count() if shared else 1,
    )


def loss_statistics(labels: jax.Array, *, voxel_mask: jax.Array) -> dict[str, jax.Array]:
    """What is logged of the labels of a batch.

    Args:
        labels: ``[B, *spatial]``.
        voxel_mask: ``[B, *spatial]``, the voxels that exist.

    Returns:
        ``gamma`` ``[B]``.
    """
    return {"gamma": statistics.focusing_gamma(labels, voxel_mask=voxel_mask)}


def count(
    prediction: jax.Array, labels: jax.Array, *, voxel_mask: jax.Array | None, num_classes: int
) -> metrics.ConfusionCounts:
    """Confusion counts; with up to two classes all foreground is one.

    Args:
        prediction: ``[B, *spatial]``.
        labels: ``[B, *spatial]``.
        voxel_mask: ``[B, *spatial]``, the voxels that exist; all if None.
        num_classes: Background included.

    Returns:
        See `metrics.confusion_counts`.
    """
    if num_classes <= 2:
        prediction, labels = prediction > 0, labels > 0
    return metrics.confusion_counts(
        prediction, labels, num_classes=num_classes, voxel_mask=voxel_mask
    )
