"""``afl-jax predict``: images to masks that lie on them."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from afl_jax import inference, reports
from afl_jax.checkpoint import CheckpointStore
from afl_jax.commands import construct
from afl_jax.config import Config, DataConfig, read_config
from afl_jax.data import preprocess, volume
from afl_jax.data.cases import Case
from afl_jax.data.picai2022 import read_scans
from afl_jax.data.records import RecordsBuilder
from afl_jax.errors import InputError, print_error
from afl_jax.models.pretrained import from_torch, read_weights


def predict(
    *,
    out: Path,
    images: tuple[str, ...] = (),
    split: Literal["train", "val", "test"] | None = None,
    run: Path | None = None,
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None,
    init_weights: Path | None = None,
    source: str | None = None,
    overlap: float = 0.5,
) -> int:
    """Segment images with the best network of a run; masks lie on the images' own grids.

    Args:
        out: Folder of the masks, each named after the first file of its case.
        images: One argument a case: a file, whose fourth dimension, if any, is channels, or a
            file a channel, joined by commas.
        split: In place of images, the raw cases of this split of the run's data set; masks are
            named after them.
        run: Folder of the run whose network and preparation are used.
        config_file: A config.json in place of a run, with --init-weights.
        init_weights: Weights of a whole network in place of the run's.
        source: Folder of the raw data for --split, if it has moved.
        overlap: Share of a patch that its neighbour covers too, from 0 to less than 1.

    Returns:
        The exit code: 2 if a case could not be predicted; the others are.
    """
    console = Console()
    if not 0 <= overlap < 1:
        raise InputError(f"--overlap must be from 0 to less than 1, got {overlap}.")
    if (split is None) == (not images):
        raise InputError("give either --images or --split.")
    cases = _name_predictions(images, out)
    config, variables = _restore_network(run, config_file, init_weights)
    if split is None:
        num_channels = variables["params"]["encoder"]["conv1"]["kernel"].shape[-2]
        read_fn = functools.partial(_read_image, config.data, num_channels=num_channels)
    else:
        builder = construct.create_builder(config.data, source=source)
        cases = {out / f"{case.case_id}.nii.gz": case for case in _cases_of(builder, split)}

        def read_fn(case: Case) -> volume.Volume:
            return builder.read_case(case).image

    model = construct.create_model(config)
    activation = construct.loss_activation(config.loss, num_classes=config.model.num_classes)
    # The builder's own defaults stand where the config leaves them open.
    preparation = {name: getattr(config.data, name) for name in preprocess.PREPARATION}
    preparation = {name: value for name, value in preparation.items() if value is not None}
    if not config.data.resize:
        # The shape is that of the sliding window's patch alone.
        del preparation["shape"]

    # The variables are an argument: closed over, they would be constants of the program, and lie
    # in the compilation cache.
    @jax.jit
    def class_probs(variables: Any, patch: jax.Array) -> jax.Array:
        logits = model.apply(variables, patch, train=False)
        return inference.class_probs(logits, activation=activation)

    apply_fn = functools.partial(class_probs, jax.device_put(variables))
    out.mkdir(parents=True, exist_ok=True)
    num_failed = 0
    with reports.progress_bar(console) as progress:
        for path, case in progress.track(cases.items(), description="predicting"):
            try:
                image = read_fn(case)
                prepared = preprocess.prepare_image(image, **preparation)
                probs = inference.sliding_window(
                    apply_fn, prepared.array, patch_shape=config.data.shape, overlap=overlap
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
                print_error(error)
                num_failed += 1
    return 2 if num_failed else 0


def _restore_network(
    run: Path | None, config_file: Path | None, init_weights: Path | None
) -> tuple[Config, Any]:
    """Config and variables: of a run's best epoch, or of a config and a file of weights."""
    if (run is None) == (config_file is None):
        raise InputError("give either --run, or --config with --init-weights.")
    path = config_file if run is None else construct.run_config_path(run)
    if init_weights is None:
        if run is None:
            raise InputError("--config needs --init-weights: it holds no network of its own.")
        store = CheckpointStore(run / "checkpoints", read_only=True)
        try:
            best = store.restore("best")
        finally:
            store.close()
        return best.config, best.variables
    config = read_config(path)
    weights = read_weights(init_weights)
    stem = weights.get("encoder.conv1.weight", np.empty(0))
    image = jnp.zeros((1, *config.data.shape, stem.shape[1] if stem.ndim > 1 else 1))
    shapes = jax.eval_shape(construct.create_model(config).init, jax.random.key(0), image)
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
    return cases


def _read_image(config: DataConfig, files: Sequence[Path], *, num_channels: int) -> volume.Volume:
    """The image of files given by hand, its channels joined as the run's data set has them."""
    if config.name == "picai2022" and len(files) > 1:
        return read_scans(files)
    return volume.read_channels(files, num_channels=num_channels)


def _cases_of(builder: RecordsBuilder, split: str) -> list[Case]:
    """The cases of a split, of which there must be any."""
    splits = builder.split_cases()
    if not splits.get(split):
        named = ", ".join(name for name, cases in splits.items() if cases)
        raise InputError(f"--split {split} has no cases: choose from {named}.")
    return splits[split]
