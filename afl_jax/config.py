"""One run, whole, as frozen dataclasses: hashable, compared by value, to and from JSON.

A config holds names and numbers only; the command line turns them into functions and objects.
A variation is ``dataclasses.replace``; a typo fails where it stands.
"""

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from afl_jax.errors import InputError, check_rules

Ints = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data set, and how its cases are prepared."""

    name: str = "phantom"
    """Builder of the data set: phantom, folder, picai2022 or brats2018."""
    source: str | None = None
    """Folder of the raw data (not for the phantom)."""
    data_dir: str = "data"
    """Where prepared data sets are kept; made if it does not exist."""
    shape: tuple[int, int, int] = (32, 32, 16)
    """Grid in voxels, x y z, to which a volume is cropped or padded."""
    spacing: tuple[float, float, float] | None = None
    """Voxel size in mm, x y z, to which a volume is resampled; its own if None."""
    resize: bool | None = None
    """Stretch a whole volume to the shape, in place of cropping or padding it."""
    patch_shape: tuple[int, int, int] | None = None
    """Voxels of the random crop that the network is trained on; all of the shape if None."""
    normalisation: Literal["zscore_nonzero", "zscore", "none"] | None = None
    """Of the intensities of each channel; zscore_nonzero if None."""
    clip_percentiles: tuple[float, float] | None = None
    """To which the intensities of each channel are clipped first, e.g. 0.5 99.5 (picai2022)."""
    label_map: tuple[tuple[int, int], ...] | None = None
    """Pairs of label in the file and class, e.g. 0 0 1 1 2 1; each its own class if None."""
    num_train: int | None = None
    """Cases to train on (phantom only)."""
    num_val: int | None = None
    """Cases to validate on; the builder's default if None."""
    fold: int | None = None
    """Official fold to test on, from 0 to 4 (picai2022)."""
    labels: Literal["human_expert", "human_expert+Pooch25", "Bosma22a"] | None = None
    """Whose delineations (picai2022)."""
    cases: Literal["all", "positive"] | None = None
    """All cases, or those with a lesion that is significant (picai2022)."""
    target: Literal["WT", "TC", "ET", "regions"] | None = None
    """Whole tumour, its core, what of it enhances, or all three as classes (brats2018)."""
    numbering: Literal["brats2018", "msd"] | None = None
    """Of the labels in the files (brats2018)."""
    exclude: tuple[str, ...] | None = None
    """Cases to leave out, by name."""
    seed: int = 0
    """Of the split, and of what the phantom draws."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "resnet50_unet"
    """One of afl_jax.MODELS."""
    num_classes: int = 2
    """Output channels, background included; 1 for a single sigmoid."""
    strides: tuple[tuple[int, int, int], ...] = (
        (2, 2, 1),
        (2, 2, 2),
        (2, 2, 2),
        (2, 2, 2),
        (1, 1, 1),
    )
    """Of the first convolution, the max-pool and stages 2 to 4, along x y z."""
    width: int = 64
    """Channels of the first convolution; the stages follow."""
    decoder_features: Ints = (256, 128, 64, 32, 16)
    """Channels of the decoder's blocks, from the deepest up."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the network's computation; parameters, loss and statistics are float32."""
    gradient_checkpointing: bool = False
    """Compute the blocks again in the backward pass: less memory on a GPU or TPU, more time."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss."""

    name: str = "adaptive_focal"
    """One of afl_jax.LOSSES."""
    options: tuple[tuple[str, float | str], ...] = ()
    """Pairs of keyword and value for the loss, e.g. balance volume."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    """The paper's is sgd (Nesterov)."""
    learning_rate: float = 1e-3
    """The largest of the schedule; 0.1 in the paper."""
    schedule: Literal["constant", "cosine", "polynomial"] = "cosine"
    """Of the learning rate; constant in the paper."""
    num_warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    momentum: float = 0.9
    """Of sgd; decay of the first moment of the others."""
    weight_decay: float = 1e-5
    """L2 for sgd and adam, decoupled for adamw."""
    max_gradient_norm: float | None = None
    """Global norm to which gradients are clipped; not if None."""
    freeze_encoder: bool = False
    """Keep the encoder's parameters; its running statistics follow the data all the same."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random augmentations, a draw a volume; a probability of 0 leaves one out."""

    foreground_probability: float = 0.5
    """That a crop is centred on a foreground voxel (with a data.patch_shape only)."""
    affine_probability: float = 0.0
    """Of a translation, rotation and scaling."""
    max_translation: float = 0.1
    """Largest translation, as a share of the volume's extent, along each axis."""
    max_rotation_degrees: float = 0.0
    """Largest rotation, about the third axis."""
    max_zoom: float = 0.0
    """Largest relative change of size."""
    flip_probability: float = 0.5
    """Of a flip, for each axis."""
    noise_probability: float = 0.4
    """Of Gaussian noise."""
    intensity_probability: float = 0.4
    """Of a change of scale and shift of intensity."""
    gamma_probability: float = 0.0
    """Of a gamma curve, with an exponent between 0.7 and 1.5."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    augment: AugmentConfig = AugmentConfig()
    init_weights: str | None = None
    """Weights to begin with, .safetensors, .npz, .pth: an ImageNet ResNet or a whole U-Net."""
    num_epochs: int = 12
    """Passes over the training cases."""
    batch_size: int = 4
    """Cases a step, over all devices."""
    num_microbatches: int = 1
    """Parts in which a device takes its share of the batch, to save memory."""
    eval_every: int = 1
    """Epochs between two validations; the last epoch is always validated."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints within an epoch; only at the end of each epoch if None."""
    num_checkpoints: int = 2
    """Newest checkpoints that are kept, beside the best one; at least 2, should one be damaged."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What follows a loss or gradient that is not finite: the end, or the step is left out."""
    tensorboard: bool = False
    """Write the epochs' metrics for TensorBoard too (extra: tensorboard)."""
    num_devices: int | None = None
    """Devices to train on; as many as there are and divide the batch if None."""
    seed: int = 0
    """Of the initial weights, the order of the cases and the augmentation."""


def to_json(config: Config) -> str:
    """The config as indented JSON, every field written out.

    Args:
      config: The config.

    Returns:
      Text that `from_json` reads.
    """
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, *, name: str = "config") -> Config:
    """Reads what `to_json` wrote; a field that is left out has its default.

    Args:
      text: JSON.
      name: What to call it in an error, such as its path.

    Returns:
      The config.

    Raises:
      InputError: If the text is not JSON, a field is unknown, or a value is of another type.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON ({error}): mend or delete it.") from None
    return _build(Config, values, where=name)


def read_config(path: Path) -> Config:
    """Reads a config file.

    Args:
      path: What `to_json` wrote.

    Returns:
      The config.

    Raises:
      InputError: If it cannot be read or is not valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a config: {error}.") from None
    return from_json(text, name=str(path))


def check_config(config: Config) -> None:
    """Checks what the types of the fields do not say.

    Args:
      config: The config.

    Raises:
      InputError: If a value is out of its range, or two do not go together.
    """
    model, data, strides = config.model, config.data, config.model.strides
    patch_shape = data.patch_shape or data.shape
    rules = {
        "num_epochs": ("at least 1", config.num_epochs, config.num_epochs >= 1),
        "batch_size": ("at least 1", config.batch_size, config.batch_size >= 1),
        "num_microbatches": (
            f"a divisor of batch_size = {config.batch_size}",
            config.num_microbatches,
            config.num_microbatches >= 1 and config.batch_size % config.num_microbatches == 0,
        ),
        "eval_every": ("at least 1", config.eval_every, config.eval_every >= 1),
        "checkpoint_every": (
            "at least 1",
            config.checkpoint_every,
            config.checkpoint_every is None or config.checkpoint_every >= 1,
        ),
        "num_checkpoints": ("at least 2", config.num_checkpoints, config.num_checkpoints >= 2),
        "seed": ("at least 0", config.seed, config.seed >= 0),
        "data.patch_shape": (
            f"at most data.shape = {data.shape}, along each axis",
            data.patch_shape,
            all(patch <= size for patch, size in zip(patch_shape, data.shape, strict=True)),
        ),
        "data.seed": ("at least 0", config.data.seed, config.data.seed >= 0),
        "model.num_classes": ("at least 1", model.num_classes, model.num_classes >= 1),
        "model.width": ("at least 1", model.width, model.width >= 1),
        "model.strides": (
            "five triples of numbers from 1",
            strides,
            len(strides) == 5 and min(map(min, strides)) >= 1,
        ),
        "model.decoder_features": (
            "five numbers from 1",
            model.decoder_features,
            len(model.decoder_features) == 5 and min(model.decoder_features) >= 1,
        ),
    }
    for name, value in dataclasses.asdict(config.augment).items():
        if name.endswith("_degrees"):
            rules[f"augment.{name}"] = ("from 0 to 180", value, 0 <= value <= 180)
        else:
            rules[f"augment.{name}"] = ("from 0 to 1", value, 0 <= value <= 1)
    check_rules(rules)


def changed_fields(config: Any, default: Any, *, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The fields of a config that are not as in another.

    Args:
        config: A config, or a part of one.
        default: Of the same kind.
        prefix: In front of the names.

    Returns:
        Name, such as ``optimizer.name``, to its value in each.
    """
    changed = {}
    for item in dataclasses.fields(config):
        ours, theirs = getattr(config, item.name), getattr(default, item.name)
        name = prefix + item.name
        if dataclasses.is_dataclass(ours):
            changed |= changed_fields(ours, theirs, prefix=f"{name}.")
        elif ours != theirs:
            changed[name] = (ours, theirs)
    return changed


def _build(kind: Any, value: Any, *, where: str) -> Any:
    """A value of JSON as the annotated type, lists as tuples; `where` is the path to it."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} must be an object, got {value!r}.")
        hints = typing.get_type_hints(kind)
        if unknown := sorted(set(value) - set(hints)):
            raise InputError(
                f"{where} has no field {unknown[0]!r}: choose from {', '.join(hints)}."
            )
        return kind(
            **{key: _build(hints[key], item, where=f"{where}.{key}") for key, item in value.items()}
        )
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _build(option, value, where=where)
            except InputError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, list):
            kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
            if len(kinds) == len(value):
                return tuple(
                    _build(k, item, where=f"{where}[{i}]")
                    for i, (k, item) in enumerate(zip(kinds, value, strict=True))
                )
    elif kind is float:
        # JSON's readers take NaN and Infinity, and whole numbers beyond every float.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and abs(value) <= sys.float_info.max:
            return float(value)
    elif kind is types.NoneType:
        if value is None:
            return None
    elif type(value) is kind:
        return value
    raise InputError(f"{where} must be {_describe(kind)}, got {value!r}.")


def _describe(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
