"""``afl-jax evaluate``: masks against labels, as tables and as a report to read."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from afl_jax import detection, evaluation, html_report, reports
from afl_jax.commands import construct
from afl_jax.commands.predict import PROBABILITIES_FOLDER, read_settings
from afl_jax.config import read_config
from afl_jax.data import preprocess, volume
from afl_jax.data.cases import Case
from afl_jax.errors import InputError, print_error
from afl_jax.figures import OverlayCase


class _Evaluated(NamedTuple):
    """A case that was evaluated; ``detections`` are PI-CAI's."""

    evaluation: evaluation.CaseEvaluation
    detections: detection.CaseDetections | None


class _Truths(NamedTuple):
    """Where labels, and images for pictures, come from; each is read by case id."""

    where: str
    case_ids: set[str]
    read_labels: Callable[[str], volume.Volume]
    read_image: Callable[[str], volume.Volume | None]


def evaluate(
    *,
    predictions: Path,
    labels: Path | None = None,
    run: Path | None = None,
    source: str | None = None,
    images: Path | None = None,
    out: Path | None = None,
    num_classes: int | None = None,
    label_map: tuple[tuple[int, int], ...] = (),
    regions: tuple[str, ...] = (),
    tolerance_mm: float = 1.0,
    picai: bool = False,
) -> int:
    """Compare masks with labels of the same file names, voxel by voxel and lesion by lesion.

    Writes cases.csv (a row a case), lesions.csv (a row a lesion), summary.json and report.html,
    which opens in any browser. Where predict left probabilities, the paper's soft metrics are
    computed too.

    Args:
        predictions: Folder of predicted masks.
        labels: Folder of labels; those without a prediction are left out, and counted.
        run: In place of labels, a run, whose data set has the cases that were predicted.
        source: Folder of the raw data for --run, if it has moved.
        images: Folder of the images, for the report's pictures; with --run they are known.
        out: Folder to write to; evaluation, among the predictions, if None.
        num_classes: Background included; 2 takes all foreground as one class. The run's, or 2,
            if None.
        label_map: Pairs of value in the labels and class, e.g. 0 0 1 1 2 1; as they are if empty.
        regions: Sets of classes to measure in place of each class, e.g. WT=1,2,3 TC=2,3 ET=3.
        tolerance_mm: Of the surface Dice.
        picai: Also compute PI-CAI's score, AP and AUROC from the probabilities (extra: picai).

    Returns:
        The exit code: 2 if a case could not be evaluated; the others are.
    """
    console = reports.create_console()
    if (labels is None) == (run is None):
        raise InputError("give either --labels or --run.")
    if run is not None and label_map:
        raise InputError("--label-map goes with --labels: with --run the run's data set maps them.")
    if not 0 <= tolerance_mm < math.inf:
        raise InputError(f"--tolerance-mm must be at least 0, got {tolerance_mm}.")
    if picai:
        detection.require_picai_eval()
    files = _volume_files(predictions)
    structures = _parse_regions(regions)
    if labels is not None:
        truths = _labels_in_folder(labels, images, label_map=dict(label_map))
    else:
        config = read_config(construct.run_config_path(run))
        builder = construct.create_builder(config.data, source=source)
        truths = _labels_of_data_set(builder.name, builder.cases, builder.read_case)
        num_classes = num_classes or config.model.num_classes
        if num_classes > 2:
            structures = structures or builder.regions
    structures = structures or evaluation.class_structures(num_classes or 2)

    def evaluate_case(case_id: str) -> _Evaluated:
        if case_id not in truths.case_ids:
            raise InputError(
                f"{files[case_id]} has no label of that name in {truths.where}: add it, or move "
                "the prediction away."
            )
        return _evaluate_case(
            files[case_id],
            truths.read_labels(case_id),
            structures=structures,
            tolerance_mm=tolerance_mm,
            picai=picai,
        )

    evaluated, errors = _evaluate_all(files, evaluate_case, console)
    if not evaluated:
        return 2
    rows = [{"case_id": case_id} | case.evaluation.row for case_id, case in evaluated.items()]
    lesion_rows = [
        {"case_id": case_id} | row
        for case_id, case in evaluated.items()
        for row in case.evaluation.lesions
    ]
    summary = evaluation.summarise(rows, lesion_rows)
    if picai:
        detections = {case_id: case.detections for case_id, case in evaluated.items()}
        summary["picai"] = detection.detection_scores(detections)
    notes = list(map(str, errors))
    if skipped := sorted(truths.case_ids - set(files)) if labels is not None else []:
        notes.append(f"{len(skipped)} labels have no prediction: {_shortened(skipped)}.")
    out = out or predictions / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    reports.write_csv(out / "cases.csv", rows)
    reports.write_csv(out / "lesions.csv", lesion_rows)
    reports.write_json(out / "summary.json", summary | {"num_cases": len(rows), "notes": notes})
    page = html_report.evaluation_html(
        title=f"Evaluation of {predictions.resolve().name}",
        facts=_facts(predictions, truths.where, num_cases=len(rows)),
        tolerance_mm=tolerance_mm,
        summary={"picai": None} | summary,
        cases=rows,
        pictures=[
            (what, _overlay_case(files[row["case_id"]], row, truths))
            for what, row in _choose_pictures(rows)
        ],
        notes=notes,
    )
    reports.write_text(out / "report.html", page)
    _print_summary(console, rows, summary, title=f"{predictions} against {truths.where}")
    for note in notes[len(errors) :]:
        console.print(note, highlight=False, soft_wrap=True)
    written = "report.html, cases.csv, lesions.csv, summary.json"
    console.print(f"{out}: {written}", highlight=False, soft_wrap=True)
    return 2 if errors else 0


def _evaluate_all(
    files: Mapping[str, Path], evaluate_case: Callable[[str], _Evaluated], console: Console
) -> tuple[dict[str, _Evaluated], list[InputError]]:
    """Every case by several threads, in order; a case that fails is named and left out."""
    evaluated, errors = {}, []
    with reports.progress_bar(console) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {case_id: pool.submit(evaluate_case, case_id) for case_id in files}
        for case_id, future in progress.track(futures.items(), description="evaluating"):
            try:
                evaluated[case_id] = future.result()
            except InputError as error:
                print_error(error)
                errors.append(error)
    return evaluated, errors


def _evaluate_case(
    path: Path,
    labels: volume.Volume,
    *,
    structures: evaluation.Structures,
    tolerance_mm: float,
    picai: bool,
) -> _Evaluated:
    prediction = _read_on_grid(path, labels).array
    probs = None
    probs_path = path.parent / PROBABILITIES_FOLDER / path.name
    if probs_path.is_file():
        probs = volume.read_volume(probs_path)
        _require_grid(probs_path, probs, labels)
        probs = probs.array.reshape(*labels.shape, -1)
    elif picai:
        raise InputError(
            f"{probs_path} is missing: PI-CAI's scores are computed from probabilities; predict "
            "with --probabilities, or leave --picai out."
        )
    case = evaluation.evaluate_case(
        prediction,
        labels.array,
        spacing=labels.spacing,
        structures=structures,
        tolerance_mm=tolerance_mm,
        probs=probs,
    )
    if not picai:
        return _Evaluated(case, None)
    # Of several classes the likeliest; the first is the background.
    lesion_probs = probs[..., min(1, probs.shape[-1] - 1) :].max(axis=-1)
    return _Evaluated(case, detection.detect_lesions(lesion_probs, labels.array))


def _labels_in_folder(
    labels: Path, images: Path | None, *, label_map: Mapping[int, int]
) -> _Truths:
    files = _volume_files(labels)
    image_files = {} if images is None else _volume_files(images)

    def read_image(case_id: str) -> volume.Volume | None:
        # A file of its name, or of several channels the first.
        names = [name for name in image_files if name.startswith(f"{case_id}_")]
        path = image_files.get(case_id) or (image_files[names[0]] if names else None)
        return None if path is None else volume.read_volume(path)

    return _Truths(
        str(labels),
        set(files),
        lambda case_id: _read_classes(files[case_id], label_map=label_map),
        read_image,
    )


def _labels_of_data_set(
    name: str, cases: Sequence[Case], read_case: Callable[[Case], Any]
) -> _Truths:
    by_id = {case.case_id: case for case in cases}
    return _Truths(
        name,
        set(by_id),
        lambda case_id: read_case(by_id[case_id]).labels,
        lambda case_id: read_case(by_id[case_id]).image,
    )


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


def _parse_regions(regions: Sequence[str]) -> evaluation.Structures:
    """``WT=1,2,3`` as name and classes."""
    parsed = {}
    for region in regions:
        name, _, classes = region.partition("=")
        values = classes.split(",")
        if not name.isidentifier() or name in parsed or not all(v.isdecimal() for v in values):
            raise InputError(
                f"--regions must be different names with classes, such as WT=1,2,3, got {region!r}."
            )
        parsed[name] = tuple(map(int, values))
    return parsed


def _read_classes(path: Path, *, label_map: Mapping[int, int]) -> volume.Volume:
    """A file of labels as classes; as they are if the map is empty."""
    labels = volume.read_single_channel(path, kind="mask")
    label_map = label_map or {value: value for value in range(256)}
    with construct.as_input_error(str(path)):
        return replace(labels, array=preprocess.remap_labels(labels.array, label_map))


def _read_on_grid(path: Path, labels: volume.Volume) -> volume.Volume:
    """A predicted mask, which must lie on its label."""
    prediction = _read_classes(path, label_map={})
    _require_grid(path, prediction, labels)
    return prediction


def _require_grid(path: Path, found: volume.Volume, labels: volume.Volume) -> None:
    if difference := volume.grid_difference(found, labels):
        raise InputError(f"{path}: expected the grid of its label, found {difference}.")


def _choose_pictures(rows: Sequence[evaluation.Row]) -> list[tuple[str, evaluation.Row]]:
    """The cases of the best, the median and the worst Dice, and what each is."""
    ranked = sorted((row for row in rows if not math.isnan(row["dice"])), key=lambda r: -r["dice"])
    last = len(ranked) - 1
    places = {0: "Best", 1: "Second best", last // 2: "Median", last - 1: "Second worst"}
    places |= {last: "Worst", 0: "Best"}
    return [(what, ranked[place]) for place, what in sorted(places.items()) if 0 <= place <= last]


def _overlay_case(path: Path, row: evaluation.Row, truths: _Truths) -> OverlayCase:
    """A case as it is drawn: axes along LPS, and a black image where there is none."""
    labels = truths.read_labels(row["case_id"])
    image = truths.read_image(row["case_id"])
    if image is None:
        image = replace(labels, array=np.zeros(labels.shape, np.float32))
    image = preprocess.resample_to(image, labels, interpolation="linear")
    image, truth, prediction = (
        preprocess.reorient(item) for item in (image, labels, _read_on_grid(path, labels))
    )
    return OverlayCase(
        case_id=row["case_id"],
        image=image.array.reshape(*truth.shape, -1),
        truth=truth.array,
        prediction=prediction.array,
        spacing=truth.spacing,
        dice=row["dice"],
    )


def _facts(predictions: Path, where: str, *, num_cases: int) -> dict[str, str]:
    facts = {"predictions": str(predictions), "labels": where, "cases": str(num_cases)}
    for name, value in (read_settings(predictions) or {}).items():
        facts[name.replace("_", " ")] = value if isinstance(value, str) else json.dumps(value)
    return facts


def _print_summary(
    console: Console, rows: Sequence[evaluation.Row], summary: Mapping[str, Any], *, title: str
) -> None:
    console.print(reports.case_table(rows, title=title))
    for prefix, criterion in (("lesion", "one voxel"), ("strict_lesion", "IoU above 0.1")):
        lesions = summary["lesions"][prefix]
        console.print(
            f"lesions of all cases, by {criterion}: {lesions['tp']} found, {lesions['fn']} missed, "
            f"{lesions['fp']} false alarms, F1 {reports.format_cell(lesions['f1'])}",
            highlight=False,
            soft_wrap=True,
        )
    if "picai" in summary:
        scores = summary["picai"]._asdict().items()
        line = "  ".join(f"{name} {reports.format_cell(value)}" for name, value in scores)
        console.print(f"PI-CAI: {line}", highlight=False)


def _shortened(names: Sequence[str], *, most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
