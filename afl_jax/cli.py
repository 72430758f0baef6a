"""The command line, ``afl-jax``: the only place where names become objects."""

import argparse
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn
from rich.console import Console

from afl_jax import inference, lesions, loop, metrics, parallel, reports, statistics, training
from afl_jax.checkpoint import CheckpointStore
from afl_jax.config import Config, DataConfig, LossConfig, read_config, to_json
from afl_jax.data import augment, loader, preprocess, volume
from afl_jax.errors import InputError
from afl_jax.losses import LOSSES
from afl_jax.models.pretrained import from_torch, read_weights
from afl_jax.models.zoo import check_image_shape, create_model

_NUM_OVERLAY_CASES = 4
# What a resumed run may change of the config that it began with.
_FREE_ON_RESUME = ("num_epochs", "eval_every", "num_devices", "tensorboard")

ConfigFlags = Annotated[Config, tyro.conf.arg(name="")]


def main(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: The command and its options.

    Returns:
        The exit code: 0, 2 after bad input, or 130 if interrupted.
    """
    _enable_compilation_cache()
    try:
        return tyro.extras.subcommand_cli_from_dict(
            {
                "prepare": prepare,
                "train": _with_base_config(train, arguments),
                "predict": predict,
                "evaluate": evaluate,
            },
            prog="afl-jax",
            description="Segment small, irregular lesions with the adaptive focal loss.",
            args=list(arguments),
        )
    except InputError as error:
        _print_error(error)
        return 2
    except OSError as error:
        # A file that cannot be made or written, or a disk that is full.
        place = f"{error.filename}: " if error.filename else ""
        _print_error(f"{place}{error.strerror or error}; check the path, its rights and the disk.")
        return 2
    except KeyboardInterrupt:
        print("afl-jax: interrupted", file=sys.stderr)
        return 130


def prepare(*, data: DataConfig = DataConfig()) -> int:
    """Prepare a data set, so that runs with the same --data options find it ready.

    Args:
        data: Which data set, and how.

    Returns:
        The exit code.
    """
    console = Console()
    builder = _prepare_data(data, console)
    sizes = ", ".join(f"{split.num_examples} {name}" for name, split in builder.info.splits.items())
    console.print(f"{sizes} cases in {builder.data_dir}", highlight=False, soft_wrap=True)
    return 0


def train(
    *,
    out: Path,
    config: ConfigFlags = Config(),
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None,
    resume: bool = False,
) -> int:
    """Train a network, then evaluate and draw its best epoch.

    Args:
        out: Folder of the run, made by this command.
        config: The run.
        config_file: A config.json, such as another run's; options beside it override it.
        resume: Go on with the run in --out from its newest checkpoint.

    Returns:
        The exit code.
    """
    del config_file  # `_with_base_config` made it the default of `config`.
    console = Console()
    _check_config(config)
    _check_run_folder(out, config, resume=resume)
    # Whatever a mistake in the config could break comes before the first long work.
    devices = parallel.select_devices(
        config.num_devices, batch_size=config.batch_size // config.num_microbatches
    )
    axis_name = parallel.axis_name(devices)
    model = _create_model(config, axis_name=axis_name)
    loss_fn = _create_loss(config.loss, num_classes=config.model.num_classes)
    log_fn = _create_tensorboard_log(out) if config.tensorboard else None
    weights = read_weights(config.init_weights) if config.init_weights else None
    builder = _prepare_data(config.data, console)
    if 2 < config.model.num_classes < builder.num_classes:
        raise InputError(
            f"model.num_classes must be at least {builder.num_classes}, the classes of the data, "
            f"or 2 to take all foreground as one, got {config.model.num_classes}."
        )
    num_cases, num_val = (builder.info.splits[name].num_examples for name in ("train", "val"))
    num_steps = num_cases // config.batch_size
    if num_steps == 0:
        raise InputError(
            f"batch_size must be at most {num_cases}, the number of training cases, got "
            f"{config.batch_size}."
        )
    optimizer = _create_optimizer(config, num_steps=num_steps)
    num_channels = builder.info.features["image"].shape[-1]

    @jax.jit
    def create_state(key: jax.Array) -> training.TrainState:
        image = jnp.zeros((1, *config.data.shape, num_channels))
        return training.create_train_state(model.apply, model.init(key, image), optimizer)

    weights_key, augment_key = jax.random.split(jax.random.key(config.seed))
    state = create_state(weights_key)
    if weights is not None:
        variables = from_torch(weights, state.variables, source=str(config.init_weights))
        state = state.replace(**variables)
    batches = _create_loader(builder, "train", config)
    history = []
    out.mkdir(parents=True, exist_ok=True)
    reports.write_text(out / "config.json", to_json(config))
    store = CheckpointStore(out / "checkpoints")
    if resume and not store.is_empty:
        restored = store.restore(
            "latest", optimizer={"step": state.step, "opt_state": state.opt_state}
        )
        state = state.replace(**restored.variables, **restored.optimizer)
        batches.set_state(restored.iterator)
        history = restored.history
        console.print(f"resumed after epoch {restored.epoch}", highlight=False)
    elif resume:
        console.print("no epoch was validated before: the run begins anew", highlight=False)

    train_step = parallel.compile_step(
        functools.partial(
            training.train_step,
            loss_fn=loss_fn,
            augment_fn=functools.partial(augment.augment, **asdict(config.augment)),
            statistics_fn=_loss_statistics,
            axis_name=axis_name,
            num_microbatches=config.num_microbatches,
        ),
        devices,
        donate_state=True,
    )
    eval_step = parallel.compile_step(
        functools.partial(
            training.eval_step,
            apply_fn=model.apply,
            loss_fn=loss_fn,
            predict_fn=lambda logits: inference.labels_from_probs(inference.class_probs(logits)),
            counts_fn=functools.partial(_count, num_classes=config.model.num_classes),
        ),
        devices,
    )

    def validate(variables: Any) -> list[loop.Row]:
        batches = _create_loader(builder, "val", config)
        return loop.evaluate(variables, batches, eval_step=eval_step, devices=devices)

    num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    console.print(
        f"{config.model.name}, {num_parameters:,} parameters, {config.loss.name} loss; "
        f"{num_cases} cases to train and {num_val} to validate; {len(devices)} "
        f"{devices[0].platform} device(s), batch {config.batch_size}; compiling the first step",
        highlight=False,
        soft_wrap=True,
    )
    try:
        history = loop.fit(
            state,
            config=config,
            batches=batches,
            num_steps=num_steps,
            train_step=train_step,
            evaluate_fn=validate,
            key=augment_key,
            devices=devices,
            store=store,
            run_dir=out,
            console=console,
            history=history,
            log_fn=log_fn,
        )
        store.wait()
        best = store.restore("best")
    finally:
        store.close()
    variables = parallel.replicate(best.variables, devices)
    rows = validate(variables)
    batches = _create_loader(builder, "val", config)
    cases = _overlay_cases(variables, rows, batches, eval_step=eval_step, devices=devices)
    reports.write_csv(out / "validation.csv", rows)
    reports.overlay_figure(cases, out / "overlay.png")
    reports.curves_figure(
        history,
        out / "curves.png",
        loss_columns=("loss", "val_loss"),
        metric_columns=[f"val_{name}" for name in loop.METRICS],
    )
    console.print(reports.case_table(rows, title=f"validation at epoch {best.epoch}, the best"))
    console.print(
        f"{out}: checkpoints, config.json, metrics.csv, validation.csv, curves.png, overlay.png",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def predict(
    *,
    images: tuple[str, ...],
    out: Path,
    run: Path | None = None,
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None,
    init_weights: Path | None = None,
    overlap: float = 0.5,
) -> int:
    """Segment images with the best network of a run; masks lie on the images' own grids.

    Args:
        images: One argument a case: a file, whose fourth dimension, if any, is channels, or a
            file a channel, joined by commas.
        out: Folder of the masks, each named after the first file of its case.
        run: Folder of the run whose network and preparation are used.
        config_file: A config.json in place of a run, with --init-weights.
        init_weights: Weights of a whole network in place of the run's.
        overlap: Share of a patch that its neighbour covers too, from 0 to less than 1.

    Returns:
        The exit code: 2 if a case could not be predicted; the others are.
    """
    console = Console()
    if not 0 <= overlap < 1:
        raise InputError(f"--overlap must be from 0 to less than 1, got {overlap}.")
    cases = _name_predictions(images, out)
    config, variables = _restore_network(run, config_file, init_weights)
    data, model = config.data, _create_model(config)
    # The builder's own defaults stand where the config leaves them open.
    preparation = {
        key: value
        for key, value in (("spacing", data.spacing), ("normalisation", data.normalisation))
        if value is not None
    }
    num_channels = variables["params"]["encoder"]["conv1"]["kernel"].shape[-2]

    # The variables are an argument: closed over, they would be constants of the program, and lie
    # in the compilation cache.
    @jax.jit
    def class_probs(variables: Any, patch: jax.Array) -> jax.Array:
        return inference.class_probs(model.apply(variables, patch, train=False))

    apply_fn = functools.partial(class_probs, jax.device_put(variables))
    out.mkdir(parents=True, exist_ok=True)
    num_failed = 0
    with reports.progress_bar(console) as progress:
        for path, files in progress.track(cases.items(), description="predicting"):
            try:
                image = volume.read_channels(files, num_channels=num_channels)
                prepared = preprocess.prepare_image(image, **preparation)
                probs = inference.sliding_window(
                    apply_fn, prepared.array, patch_shape=data.shape, overlap=overlap
                )
                probs = preprocess.restore(
                    replace(prepared, array=probs), image, interpolation="linear"
                )
                mask = np.asarray(inference.labels_from_probs(probs.array), np.uint8)
                volume.write_volume(path, replace(probs, array=mask))
                progress.console.print(
                    f"{path}: {np.count_nonzero(mask):,} of {mask.size:,} voxels",
                    highlight=False,
                    soft_wrap=True,
                )
            except InputError as error:
                _print_error(error)
                num_failed += 1
    return 2 if num_failed else 0


def evaluate(
    *,
    predictions: Path,
    labels: Path,
    out: Path | None = None,
    num_classes: int = 2,
    label_map: tuple[tuple[int, int], ...] = (),
) -> int:
    """Compare masks with labels of the same file names, voxel by voxel and lesion by lesion.

    Args:
        predictions: Folder of predicted masks.
        labels: Folder of labels; those without a prediction are left out.
        out: CSV of the metrics; evaluation.csv among the predictions if None.
        num_classes: Background included; 2 takes all foreground as one class.
        label_map: Pairs of value in the labels and class, e.g. 0 0 1 1 2 1; as they are if empty.

    Returns:
        The exit code: 2 if a case could not be evaluated; the others are.
    """
    console = Console()
    files = {path: _volume_files(path) for path in (predictions, labels)}
    if missing := sorted(set(files[predictions]) - set(files[labels])):
        raise InputError(
            f"{files[predictions][missing[0]]} has no label of that name in {labels}: add it, or "
            "move the prediction away."
        )
    rows, num_failed = [], 0
    with reports.progress_bar(console) as progress:
        for case_id, path in progress.track(files[predictions].items(), description="evaluating"):
            try:
                rows.append(
                    _evaluate_case(
                        case_id,
                        path,
                        files[labels][case_id],
                        num_classes=num_classes,
                        label_map=dict(label_map),
                    )
                )
            except InputError as error:
                _print_error(error)
                num_failed += 1
    if rows:
        path = out or predictions / "evaluation.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        reports.write_csv(path, rows)
        console.print(reports.case_table(rows, title=f"{predictions} against {labels}"))
        console.print(f"written to {path}", highlight=False, soft_wrap=True)
    return 2 if num_failed else 0


def _enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless told otherwise.

    ``AFL_JAX_COMPILATION_CACHE=0`` switches it off; JAX's own ``JAX_COMPILATION_CACHE_DIR`` names
    another folder.
    """
    if os.environ.get("AFL_JAX_COMPILATION_CACHE") == "0" or jax.config.jax_compilation_cache_dir:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "afl_jax" / "xla"))


def _with_base_config(command: Callable[..., int], arguments: Sequence[str]) -> Callable[..., int]:
    """The command with the config of ``--config``, or of a run to resume, as its default."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    try:
        known, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return command  # tyro says what is wrong.
    path = known.config
    if path is None and known.resume and known.out and (known.out / "config.json").exists():
        path = known.out / "config.json"
    if path is None:
        return command
    base = read_config(path)
    signature = inspect.signature(command)
    parameters = [
        parameter.replace(default=base) if name == "config" else parameter
        for name, parameter in signature.parameters.items()
    ]
    # tyro reads defaults from the signature.
    wrapped = functools.wraps(command)(lambda *args, **kwargs: command(*args, **kwargs))
    wrapped.__signature__ = signature.replace(parameters=parameters)
    return wrapped


def _check_config(config: Config) -> None:
    """What the types of the config's fields do not say."""
    model, strides = config.model, config.model.strides
    rules = {
        "num_epochs": ("at least 1", config.num_epochs, config.num_epochs >= 1),
        "batch_size": ("at least 1", config.batch_size, config.batch_size >= 1),
        "num_microbatches": (
            f"a divisor of batch_size = {config.batch_size}",
            config.num_microbatches,
            config.num_microbatches >= 1 and config.batch_size % config.num_microbatches == 0,
        ),
        "eval_every": ("at least 1", config.eval_every, config.eval_every >= 1),
        "seed": ("at least 0", config.seed, config.seed >= 0),
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
    for name, value in asdict(config.augment).items():
        rules[f"augment.{name}"] = ("from 0 to 1", value, 0 <= value <= 1)
    for name, (rule, value, holds) in rules.items():
        if not holds:
            raise InputError(f"{name} must be {rule}, got {value}.")


def _check_run_folder(out: Path, config: Config, *, resume: bool) -> None:
    """A new run needs a new folder; a resumed one, the config that it began with."""
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(
                f"--out {out} exists already: choose another folder, or go on with --resume."
            )
        return
    path = out / "config.json"
    if not path.exists():
        raise InputError(f"--out {out} is not a run that could be resumed: it has no config.json.")
    before = read_config(path)
    for field in fields(Config):
        old, new = getattr(before, field.name), getattr(config, field.name)
        if old != new and field.name not in _FREE_ON_RESUME:
            raise InputError(
                f"--resume goes on with the config of {path}, where {field.name} is {old}, got "
                f"{new}: leave the option out, or start a new run."
            )


@contextmanager
def _as_input_error(where: str) -> Iterator[None]:
    """Turns the ValueError of a library function into bad input of the config."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error


def _create_loss(config: LossConfig, *, num_classes: int) -> Callable[..., jax.Array]:
    """The loss with its options, tried on a volume of one voxel."""
    if config.name not in LOSSES:
        raise InputError(f"loss.name {config.name!r} is unknown: choose from {', '.join(LOSSES)}.")
    loss_fn = LOSSES[config.name]
    allowed = [
        name
        for name, parameter in inspect.signature(loss_fn).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "voxel_mask"
    ]
    options = dict(config.options)
    if unknown := [name for name in options if name not in allowed]:
        raise InputError(
            f"loss.options {unknown[0]!r} is not an option of {config.name}: choose from "
            f"{', '.join(allowed)}."
        )
    loss_fn = functools.partial(loss_fn, **options)
    with _as_input_error("loss.options"):
        jax.eval_shape(loss_fn, jnp.zeros((1, 1, 1, 1, num_classes)), jnp.zeros((1, 1, 1, 1), int))
    return loss_fn


def _create_model(config: Config, *, axis_name: str | None = None) -> nn.Module:
    options = {
        key: value for key, value in asdict(config.model).items() if key not in ("name", "dtype")
    }
    # The default, None, computes in the dtype of the parameters: float32.
    dtype = jnp.bfloat16 if config.model.dtype == "bfloat16" else None
    with _as_input_error("model"):
        model = create_model(config.model.name, **options, dtype=dtype, axis_name=axis_name)
        check_image_shape((1, *config.data.shape, 1), strides=config.model.strides)
    return model


def _create_optimizer(config: Config, *, num_steps: int) -> Any:
    options = asdict(config.optimizer)
    name, learning_rate = options.pop("name"), options.pop("learning_rate")
    frozen = ("encoder",) if options.pop("freeze_encoder") else ()
    with _as_input_error("optimizer"):
        schedule = training.create_schedule(
            options.pop("schedule"),
            learning_rate=learning_rate,
            num_steps=config.num_epochs * num_steps,
            num_warmup_steps=options.pop("num_warmup_steps"),
        )
        return training.create_optimizer(name, learning_rate=schedule, frozen=frozen, **options)


def _create_tensorboard_log(out: Path) -> Callable[[loop.Row], None]:
    """A function that writes a row of metrics where TensorBoard finds it."""
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


def _prepare_data(config: DataConfig, console: Console) -> Any:
    """The builder of a data set, which is prepared unless it was before."""
    settings = {
        key: value
        for key, value in asdict(config).items()
        if key not in ("name", "data_dir") and value is not None
    }
    with reports.progress_bar(console) as progress:
        task = progress.add_task(f"preparing {config.name}", total=None)
        return loader.prepare(
            config.name,
            data_dir=config.data_dir,
            num_workers=os.cpu_count() or 1,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            **settings,
        )


def _create_loader(builder: Any, split: str, config: Config) -> Any:
    """Endless and shuffled to train, in order and once to validate."""
    is_train = split == "train"
    return loader.create_loader(
        builder.as_data_source(split),
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=is_train,
        num_epochs=None if is_train else 1,
    )


def _loss_statistics(labels: jax.Array, *, voxel_mask: jax.Array) -> dict[str, jax.Array]:
    return {"gamma": statistics.focusing_gamma(labels, voxel_mask=voxel_mask)}


def _count(
    prediction: jax.Array, labels: jax.Array, *, voxel_mask: jax.Array | None, num_classes: int
) -> metrics.ConfusionCounts:
    """Confusion counts; with up to two classes all foreground is one."""
    if num_classes <= 2:
        prediction, labels = prediction > 0, labels > 0
    return metrics.confusion_counts(
        prediction, labels, num_classes=num_classes, voxel_mask=voxel_mask
    )


def _overlay_cases(
    variables: Any,
    rows: Sequence[loop.Row],
    batches: Any,
    *,
    eval_step: Callable[..., Any],
    devices: Sequence[jax.Device],
) -> list[reports.OverlayCase]:
    """Cases from the best to the worst Dice, evenly spread, with their predictions."""
    ranked = sorted((row for row in rows if row["dice"] == row["dice"]), key=lambda r: -r["dice"])
    ranked = ranked or list(rows)
    places = np.linspace(0, len(ranked) - 1, min(_NUM_OVERLAY_CASES, len(ranked))).round()
    chosen = [ranked[int(place)] for place in places]
    dice = {row["case_id"]: row["dice"] for row in chosen}
    cases = {}
    for batch, output in loop.run_eval_step(
        variables, batches, eval_step=eval_step, devices=devices
    ):
        for i in np.flatnonzero(batch["valid"]):
            case_id = str(batch["case_id"][i])
            if case_id in dice:
                cases[case_id] = reports.OverlayCase(
                    case_id=case_id,
                    image=batch["image"][i],
                    truth=batch["labels"][i],
                    prediction=output["prediction"][i],
                    spacing=tuple(float(mm) for mm in batch["spacing"][i]),
                    dice=dice[case_id],
                )
    return [cases[row["case_id"]] for row in chosen]


def _restore_network(
    run: Path | None, config_file: Path | None, init_weights: Path | None
) -> tuple[Config, Any]:
    """Config and variables: of a run's best epoch, or of a config and a file of weights."""
    if (run is None) == (config_file is None):
        raise InputError("give either --run, or --config with --init-weights.")
    if run is not None and not (run / "config.json").is_file():
        raise InputError(f"--run {run} is not the folder of a run: it has no config.json.")
    if init_weights is None:
        if run is None:
            raise InputError("--config needs --init-weights: it holds no network of its own.")
        store = CheckpointStore(run / "checkpoints", read_only=True)
        try:
            best = store.restore("best")
        finally:
            store.close()
        return best.config, best.variables
    config = read_config(config_file or run / "config.json")
    weights = read_weights(init_weights)
    stem = weights.get("encoder.conv1.weight", np.empty(0))
    image = jnp.zeros((1, *config.data.shape, stem.shape[1] if stem.ndim > 1 else 1))
    shapes = jax.eval_shape(_create_model(config).init, jax.random.key(0), image)
    return config, from_torch(weights, shapes, source=str(init_weights))


def _name_predictions(images: Sequence[str], out: Path) -> dict[Path, list[Path]]:
    """Mask to write for each case, and the case's files; no two masks and no image alike."""
    cases: dict[Path, list[Path]] = {}
    for argument in images:
        files = [Path(name) for name in argument.split(",") if name]
        if not files:
            raise InputError("--images has an empty argument: give a file for each case.")
        path = out / f"{volume.case_name(files[0])}.nii.gz"
        if path in cases:
            raise InputError(
                f"--images {cases[path][0]} and {files[0]} would both be written to {path}: "
                "predict them into different folders."
            )
        if any(path.resolve() == file.resolve() for file in files):
            raise InputError(
                f"--out {out} would overwrite the image {path}: choose another folder."
            )
        cases[path] = files
    if not cases:
        raise InputError("--images is empty: give a file for each case.")
    return cases


def _volume_files(folder: Path) -> dict[str, Path]:
    """Volumes of a folder by case, sorted."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder.")
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(volume.SUFFIXES) and not path.name.startswith("."):
            case_id = volume.case_name(path)
            if case_id in files:
                raise InputError(f"{files[case_id]} and {path} are the same case: keep one.")
            files[case_id] = path
    if not files:
        raise InputError(f"{folder} holds no volumes ({', '.join(volume.SUFFIXES)}).")
    return files


def _evaluate_case(
    case_id: str,
    prediction_path: Path,
    labels_path: Path,
    *,
    num_classes: int,
    label_map: dict[int, int],
) -> loop.Row:
    """Metrics of one case: voxels by class, lesions and distances of all foreground."""
    prediction, labels = volume.read_volume(prediction_path), volume.read_volume(labels_path)
    for path, item in ((prediction_path, prediction), (labels_path, labels)):
        if item.array.ndim != 3:
            raise InputError(f"{path}: a mask must have 3 dimensions, found 4 (channels).")
    if difference := volume.grid_difference(prediction, labels):
        raise InputError(
            f"{prediction_path}: expected the grid of its label {labels_path}, found {difference}."
        )
    identity = {value: value for value in range(256)}
    maps = {}
    for path, item, mapping in (
        (prediction_path, prediction, identity),
        (labels_path, labels, label_map or identity),
    ):
        with _as_input_error(str(path)):
            maps[path] = preprocess.remap_labels(item.array, mapping)
    predicted, true = maps[prediction_path], maps[labels_path]
    row: loop.Row = {"case_id": case_id}
    counts = _count(predicted[None], true[None], voxel_mask=None, num_classes=num_classes)
    (values,) = loop.metric_rows(counts)
    row |= values
    found = lesions.match_lesions(predicted > 0, true > 0)
    distances = lesions.surface_distances(predicted > 0, true > 0, spacing=labels.spacing)
    row |= {
        "lesion_tp": found.tp,
        "lesion_fp": found.fp,
        "lesion_fn": found.fn,
        "lesion_f1": lesions.lesion_f1(found),
        "hd95_mm": lesions.hausdorff_distance_95(distances),
        "assd_mm": lesions.average_symmetric_surface_distance(distances),
    }
    return row


def _print_error(error: InputError | str) -> None:
    print(f"afl-jax: error: {' '.join(str(error).split())}", file=sys.stderr)


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main(sys.argv[1:]))
