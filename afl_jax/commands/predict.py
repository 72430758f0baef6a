"""``afl-jax predict``: images to masks that lie on them."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from afl_jax import inference, parallel, reports
from afl_jax.commands import construct, networks
from afl_jax.commands.images import find_images
from afl_jax.config import DataConfig
from afl_jax.data import preprocess, volume
from afl_jax.data.cases import Case
from afl_jax.data.picai2022 import read_scans
from afl_jax.data.records import RecordsBuilder
from afl_jax.errors import InputError, print_error

# In the folder of the masks: the settings that made them, and the probabilities.
SETTINGS_FILE = "predictions.json"
PROBABILITIES_FOLDER = "probabilities"


def predict(
    *,
    out: Path,
    images: tuple[str, ...] = (),
    channels: tuple[str, ...] = (),
    split: Literal["train", "val", "test"] | None = None,
    run: tuple[Path, ...] = (),
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None,
    init_weights: Path | None = None,
    source: str | None = None,
    probabilities: bool = False,
    overlap: float = 0.5,
    blend: Literal["gaussian", "constant"] = "gaussian",
    mirror_axes: tuple[int, ...] = (),
    patch_batch: int = 1,
    num_devices: int | None = None,
    overwrite: bool = False,
) -> int:
    """Segment images with the best network of a run; masks lie on the images' own grids.

    Cases whose mask is there already are left as they are, so that an interrupted prediction goes
    on where it stopped; predictions.json, beside the masks, says what made them.

    Args:
        out: Folder of the masks, each named after its case.
        images: Files, one a case, whose fourth dimension, if any, is channels; or the files of a
            case joined by commas; or folders of such files.
        channels: Endings of the names of a case's files in those folders, in the order of the
            run's channels, e.g. _0000 _0001, or _t2w _adc _hbv.
        split: In place of images, the raw cases of this split of the run's data set.
        run: Folder of the run whose network and preparation are used; of several, such as folds,
            the probabilities are averaged.
        config_file: A config.json in place of a run, with --init-weights.
        init_weights: Weights of a whole network in place of the run's.
        source: Folder of the raw data for --split, if it has moved.
        probabilities: Also write the probability of each class, to the folder probabilities among
            the masks.
        overlap: Share of a patch that its neighbour covers too, from 0 to less than 1.
        blend: Weights of overlapping patches: gaussian trusts their centres, constant all alike.
        mirror_axes: Axes along which the image is flipped too, e.g. 0 1, and the probabilities of
            all flips averaged; n axes take 2^n times as long.
        patch_batch: Patches that a device takes at a time.
        num_devices: Devices that share the patches; all GPUs or TPUs, and one CPU, if None.
        overwrite: Make masks anew that are there.

    Returns:
        The exit code: 2 if a case could not be predicted; the others are.
    """
    console = reports.create_console()
    _check_options(overlap=overlap, mirror_axes=mirror_axes, patch_batch=patch_batch)
    if (split is None) == (not images):
        raise InputError("give either --images or --split.")
    # A mistake in the names of files comes before the weights are read.
    cases = _name_masks(find_images(images, channels=channels), out)
    members = networks.restore_networks(run, config_file, init_weights)
    data = members[0].config.data
    if split is None:
        read_fn = functools.partial(_read_image, data, num_channels=members[0].num_channels)
    else:
        builder = construct.create_builder(data, source=source)
        cases = {out / f"{case.case_id}.nii.gz": case for case in _cases_of(builder, split)}

        def read_fn(case: Case) -> volume.Volume:
            return builder.read_case(case).image

    if num_devices is None:
        num_devices = 1 if jax.default_backend() == "cpu" else jax.local_device_count()
    devices = parallel.select_devices(num_devices, batch_size=patch_batch * num_devices)
    window = {"overlap": overlap, "blend": blend}
    settings = {
        "networks": [member.description for member in members],
        **window,
        "mirror_axes": list(mirror_axes),
    }
    wanted = {
        path: (path, _probabilities_path(path)) if probabilities else (path,) for path in cases
    }
    todo = _open_folder(out, settings, wanted, overwrite=overwrite)
    if len(todo) < len(cases):
        console.print(f"{len(cases) - len(todo)} of {len(cases)} cases are there already")

    apply_fn = inference.with_mirroring(
        inference.ensemble(networks.create_class_probs(members, devices)), mirror_axes
    )
    preparation = _preparation(data)

    def read_and_prepare(path: Path) -> tuple[volume.Volume, volume.Volume]:
        image = read_fn(cases[path])
        return image, preprocess.prepare_image(image, **preparation)

    num_failed = 0
    with reports.progress_bar(console) as progress:
        task = progress.add_task("predicting", total=len(todo))
        for num_done, (path, reading) in enumerate(_read_ahead(read_and_prepare, todo)):

            def show(done: int, total: int, num_done: int = num_done) -> None:
                progress.update(task, completed=num_done + done / total)

            try:
                image, prepared = reading.result()
                probs = predict_prepared(
                    prepared,
                    image,
                    apply_fn=apply_fn,
                    patch_shape=data.shape,
                    patch_batch=patch_batch * num_devices,
                    progress=show,
                    **window,
                )
                mask = np.asarray(inference.labels_from_probs(probs.array), np.uint8)
                if probabilities:
                    volume.write_volume(_probabilities_path(path), probs)
                volume.write_volume(path, replace(probs, array=mask))
                progress.console.print(
                    f"{path}: {np.count_nonzero(mask):,} of {mask.size:,} voxels",
                    highlight=False,
                    soft_wrap=True,
                )
            except InputError as error:
                print_error(error)
                num_failed += 1
            progress.update(task, completed=num_done + 1)
    return 2 if num_failed else 0


def predict_prepared(
    prepared: volume.Volume,
    original: volume.Volume,
    *,
    apply_fn: inference.ApplyFn,
    patch_shape: Sequence[int],
    **window: Any,
) -> volume.Volume:
    """Probabilities of an image that was prepared, on its own grid.

    Args:
        prepared: What `preprocess.prepare_image` made of the image.
        original: The image.
        apply_fn: Patches ``[N, *patch_shape, C]`` to probabilities ``[N, *patch_shape, K]``.
        patch_shape: Voxels of the prepared grid.
        **window: Other options of `inference.sliding_window`.

    Returns:
        float32 ``[X, Y, Z, K]`` with the shape and geometry of the original; where the prepared
        grid does not reach, all is background.
    """
    probs = inference.sliding_window(apply_fn, prepared.array, patch_shape=patch_shape, **window)
    # Restored as 1 - p, the background is 1 outside, and interpolation is the same.
    has_background = probs.shape[-1] > 1
    if has_background:
        probs[..., 0] = 1 - probs[..., 0]
    restored = preprocess.restore(replace(prepared, array=probs), original, interpolation="linear")
    if has_background:
        restored.array[..., 0] = 1 - restored.array[..., 0]
    return restored


def _check_options(*, overlap: float, mirror_axes: Sequence[int], patch_batch: int) -> None:
    if not 0 <= overlap < 1:
        raise InputError(f"--overlap must be from 0 to less than 1, got {overlap}.")
    if len(set(mirror_axes)) != len(mirror_axes) or not set(mirror_axes) <= {0, 1, 2}:
        raise InputError(f"--mirror-axes must be different axes of 0, 1, 2, got {mirror_axes}.")
    if patch_batch < 1:
        raise InputError(f"--patch-batch must be at least 1, got {patch_batch}.")


def _preparation(config: DataConfig) -> dict[str, Any]:
    """The options of `prepare_image` that a run's data had."""
    # The builder's own defaults stand where the config leaves them open.
    preparation = {name: getattr(config, name) for name in preprocess.PREPARATION}
    preparation = {name: value for name, value in preparation.items() if value is not None}
    if not config.resize:
        # The shape is that of the sliding window's patch alone.
        del preparation["shape"]
    return preparation


def _name_masks(images: Sequence[tuple[str, list[Path]]], out: Path) -> dict[Path, list[Path]]:
    """Mask to write for each case, and the case's files; no two masks and no image alike."""
    cases: dict[Path, list[Path]] = {}
    for case_id, files in images:
        path = out / f"{case_id}.nii.gz"
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


def _probabilities_path(mask: Path) -> Path:
    return mask.parent / PROBABILITIES_FOLDER / mask.name


def _open_folder(
    out: Path,
    settings: Mapping[str, Any],
    wanted: Mapping[Path, Sequence[Path]],
    *,
    overwrite: bool,
) -> list[Path]:
    """Makes the folder of the masks; the masks to write, whose files are not all there yet.

    No mask of other settings stays in it under the name of these.
    """
    path = out / SETTINGS_FILE
    before = read_settings(out)
    strangers = sorted(set(out.glob("*.nii.gz")) - set(wanted)) if out.is_dir() else []
    existing = [file for files in wanted.values() for file in files if file.exists()]
    if existing and not overwrite and before is None:
        raise InputError(
            f"{existing[0]} exists, and nothing says what made it: choose another --out, or make "
            "it anew with --overwrite."
        )
    if before not in (None, settings) and ((existing and not overwrite) or strangers):
        differing = next(k for k in settings if before.get(k) != settings[k])
        raise InputError(
            f"{(strangers + existing)[0]} was made with other settings ({differing}: "
            f"{before.get(differing)}, now {settings[differing]}): choose another --out"
            + ("." if strangers else ", or make it anew with --overwrite.")
        )
    if overwrite:
        for file in existing:
            file.unlink()
    out.mkdir(parents=True, exist_ok=True)
    for folder in {file.parent for files in wanted.values() for file in files}:
        folder.mkdir(exist_ok=True)
    if before != settings:
        reports.write_json(path, settings)
    return [mask for mask, files in wanted.items() if not all(file.exists() for file in files)]


def read_settings(predictions: Path) -> dict[str, Any] | None:
    """What made the masks of a folder.

    Args:
        predictions: Folder of the masks.

    Returns:
        The settings; None if nothing says.

    Raises:
        InputError: If they cannot be read.
    """
    path = predictions / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it.") from error


def _read_ahead(
    read_fn: Callable[[Path], Any], paths: Sequence[Path]
) -> Iterator[tuple[Path, Future]]:
    """Each path with the future of what is read for it, the next one read meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        readings = [pool.submit(read_fn, path) for path in paths[:1]]
        for index, path in enumerate(paths):
            readings += [pool.submit(read_fn, following) for following in paths[index + 1 :][:1]]
            yield path, readings.pop(0)
