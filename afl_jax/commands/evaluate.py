"""``afl-jax evaluate``: masks against labels, voxel by voxel and lesion by lesion."""

import functools
from dataclasses import replace
from pathlib import Path

from afl_jax import lesions, loop, reports
from afl_jax.commands import construct
from afl_jax.config import read_config
from afl_jax.data import preprocess, volume
from afl_jax.data.cases import Case
from afl_jax.errors import InputError, print_error


def evaluate(
    *,
    predictions: Path,
    labels: Path | None = None,
    run: Path | None = None,
    source: str | None = None,
    out: Path | None = None,
    num_classes: int | None = None,
    label_map: tuple[tuple[int, int], ...] = (),
) -> int:
    """Compare masks with labels of the same file names, voxel by voxel and lesion by lesion.

    Args:
        predictions: Folder of predicted masks.
        labels: Folder of labels; those without a prediction are left out.
        run: In place of labels, a run, whose data set has the cases that were predicted.
        source: Folder of the raw data for --run, if it has moved.
        out: CSV of the metrics; evaluation.csv among the predictions if None.
        num_classes: Background included; 2 takes all foreground as one class. The run's, or 2,
            if None.
        label_map: Pairs of value in the labels and class, e.g. 0 0 1 1 2 1; as they are if empty.

    Returns:
        The exit code: 2 if a case could not be evaluated; the others are.
    """
    console = reports.create_console()
    if (labels is None) == (run is None):
        raise InputError("give either --labels or --run.")
    if run is not None and label_map:
        raise InputError("--label-map goes with --labels: with --run the run's data set maps them.")
    files = _volume_files(predictions)
    if labels is not None:
        where, truths = labels, _volume_files(labels)
        read_fn = functools.partial(_read_labels, label_map=dict(label_map))
    else:
        config = read_config(construct.run_config_path(run))
        builder = construct.create_builder(config.data, source=source)
        where, truths = builder.name, {case.case_id: case for case in builder.cases}

        def read_fn(case: Case) -> volume.Volume:
            return builder.read_case(case).labels

        num_classes = num_classes or config.model.num_classes
    if missing := sorted(set(files) - set(truths)):
        raise InputError(
            f"{files[missing[0]]} has no label of that name in {where}: add it, or move the "
            "prediction away."
        )
    rows, num_failed = [], 0
    with reports.progress_bar(console) as progress:
        for case_id, path in progress.track(files.items(), description="evaluating"):
            try:
                truth = read_fn(truths[case_id])
                values = _evaluate_case(path, truth, num_classes=num_classes or 2)
            except InputError as error:
                print_error(error)
                num_failed += 1
            else:
                rows.append({"case_id": case_id} | values)
    if rows:
        path = out or predictions / "evaluation.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        reports.write_csv(path, rows)
        console.print(reports.case_table(rows, title=f"{predictions} against {where}"))
        console.print(f"written to {path}", highlight=False, soft_wrap=True)
    return 2 if num_failed else 0


def _read_labels(path: Path, *, label_map: dict[int, int]) -> volume.Volume:
    """A file of labels as classes."""
    labels = volume.read_single_channel(path, kind="mask")
    label_map = label_map or {value: value for value in range(256)}
    with construct.as_input_error(str(path)):
        return replace(labels, array=preprocess.remap_labels(labels.array, label_map))


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


def _evaluate_case(path: Path, labels: volume.Volume, *, num_classes: int) -> loop.Row:
    """Metrics of one case: voxels by class, lesions and distances of all foreground."""
    prediction = _read_labels(path, label_map={})
    if difference := volume.grid_difference(prediction, labels):
        raise InputError(f"{path}: expected the grid of its label, found {difference}.")
    predicted, true = prediction.array, labels.array
    counts = construct.count(predicted[None], true[None], voxel_mask=None, num_classes=num_classes)
    (row,) = loop.metric_rows(counts)
    found = lesions.match_lesions(predicted > 0, true > 0)
    distances = lesions.surface_distances(predicted > 0, true > 0, spacing=labels.spacing)
    return row | {
        "lesion_tp": found.tp,
        "lesion_fp": found.fp,
        "lesion_fn": found.fn,
        "lesion_f1": lesions.lesion_f1(found),
        "hd95_mm": lesions.hausdorff_distance_95(distances),
        "assd_mm": lesions.average_symmetric_surface_distance(distances),
    }
