"""The two data sets of the paper from raw files to a table, by the program and by the scripts."""

import csv
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from official_layouts import make_brats2018, make_picai2022

from afl_jax.cli import main
from afl_jax.data.volume import read_volume, same_grid, write_volume
from afl_jax.presets import PRESETS

ROOT = Path(__file__).parent.parent
# A network that compiles in seconds; the rest is the preset's.
TINY = [
    *("--model.name", "resnet18_unet", "--model.width", "4"),
    *("--model.decoder-features", "8", "8", "4", "4", "4"),
    *("--num-epochs", "2", "--eval-every", "1", "--num-devices", "1", "--batch-size", "1"),
]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def picai_run(tmp_path_factory) -> tuple[Path, Path]:
    """Raw files and a run on them, prepared beforehand."""
    folder = tmp_path_factory.mktemp("picai")
    source = make_picai2022(folder / "raw", num_cases=10)
    data = ["--data.source", str(source), "--data.data-dir", str(folder / "data")]
    data += ["--data.shape", "32", "32", "12"]
    assert main(["prepare", "picai2022", *data]) == 0
    assert main(["train", "picai2022", "--out", str(folder / "run"), *data, *TINY]) == 0
    return source, folder / "run"


def test_picai_goes_from_raw_files_to_masks_on_t2w_and_a_table(picai_run, capsys):
    source, run = picai_run
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["labels"] == "human_expert"
    assert config["optimizer"]["learning_rate"] == 0.1
    masks = run / "test"
    assert main(["predict", "--run", str(run), "--split", "test", "--out", str(masks)]) == 0
    assert main(["evaluate", "--predictions", str(masks), "--run", str(run)]) == 0
    output = capsys.readouterr().out
    assert "lesion_f1" in output
    rows = read_rows(masks / "evaluation" / "cases.csv")
    # Of the two cases of fold 0, both have a lesion.
    assert len(rows) == 2
    for row in rows:
        patient = row["case_id"].split("_")[0]
        mask = read_volume(masks / f"{row['case_id']}.nii.gz")
        t2w = read_volume(source / "images" / patient / f"{row['case_id']}_t2w.mha")
        assert same_grid(mask, t2w)
        assert mask.array.dtype == np.uint8
        assert 0 <= float(row["dice"]) <= 1


def test_labels_as_predictions_are_perfect_on_their_own_grid(picai_run, tmp_path):
    # The labels of the data set, read by another road, written as masks.
    source, run = picai_run
    for row in read_rows(source / "picai_labels" / "clinical_information" / "marksheet.csv"):
        name = f"{row['patient_id']}_{row['study_id']}.nii.gz"
        path = source / "picai_labels/csPCa_lesion_delineations/human_expert/resampled" / name
        if row["case_csPCa"] == "YES" and path.exists():
            label = read_volume(path)
            write_volume(tmp_path / name, dataclasses.replace(label, array=label.array > 0))
    assert main(["evaluate", "--predictions", str(tmp_path), "--run", str(run)]) == 0
    rows = read_rows(tmp_path / "evaluation" / "cases.csv")
    assert len(rows) == 7
    for row in rows:
        assert float(row["dice"]) == float(row["lesion_f1"]) == 1
        assert float(row["hd95_mm"]) == 0


def test_the_sequences_may_be_given_by_hand(picai_run, tmp_path):
    source, run = picai_run
    case_id = next(path.name for path in sorted((source / "images").rglob("*_t2w.mha")))[:-8]
    files = [
        str(source / "images" / case_id.split("_")[0] / f"{case_id}_{name}.mha")
        for name in ("t2w", "adc", "hbv")
    ]
    out = tmp_path / "masks"
    code = main(["predict", "--run", str(run), "--images", ",".join(files), "--out", str(out)])
    assert code == 0
    assert same_grid(read_volume(out / f"{case_id}_t2w.nii.gz"), read_volume(files[0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--run", "RUN", "--out", "x"], "give either --images or --split"),
        (["evaluate", "--predictions", "x"], "give either --labels or --run"),
        (
            ["predict", "--run", "RUN", "--split", "test", "--source", "nowhere", "--out", "x"],
            "no such folder",
        ),
        (["train", "picai", "--out", "x"], "no run is called 'picai': choose from phantom"),
        (["prepare", "picai2022"], "data set 'picai2022' needs the setting 'source'"),
        (["prepare", "brats2018", "--source", "nowhere"], "expected folders HGG and LGG"),
        (
            ["train", "brats2018", "--out", "x", "--data.patch-shape", "256", "256", "160"],
            "data.patch_shape must be at most data.shape",
        ),
        (["train", "phantom", "--config", "c.json", "--out", "x"], "give either the name phantom"),
        (
            ["train", "phantom", "--out", "x", "--data.fold", "1"],
            "data set 'phantom' has no setting 'fold'",
        ),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(picai_run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(picai_run[1]) if argument == "RUN" else argument for argument in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("afl-jax: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_case_that_went_bad_does_not_stop_the_others(picai_run, tmp_path, capsys):
    source, run = picai_run
    moved = shutil.copytree(source, tmp_path / "moved")
    # The two test cases were predicted before; one of them is damaged now.
    bad, good = sorted(
        path.name.removesuffix(".nii.gz") for path in (run / "test").glob("*.nii.gz")
    )
    (path,) = moved.rglob(f"{bad}_t2w.mha")
    path.write_bytes(path.read_bytes()[:500])
    out = tmp_path / "masks"
    arguments = ["--run", str(run), "--source", str(moved), "--out", str(out), "--split", "test"]
    assert main(["predict", *arguments]) == 2
    assert [path.name for path in out.glob("*.nii.gz")] == [f"{good}.nii.gz"]
    assert f"{bad}_t2w.mha: cannot be read" in capsys.readouterr().err


def test_brats_goes_from_raw_files_to_masks_on_flair_and_a_table(tmp_path):
    source = make_brats2018(tmp_path / "raw", num_hgg=4, num_lgg=3, shape=(40, 40, 26))
    run, masks = tmp_path / "run", tmp_path / "masks"
    code = main(
        [
            *("train", "brats2018-recommended", "--out", str(run), *TINY),
            *("--data.source", str(source), "--data.data-dir", str(tmp_path / "data")),
            *("--data.shape", "48", "48", "32", "--data.patch-shape", "32", "32", "16"),
            *("--optimizer.num-warmup-steps", "0"),
        ]
    )
    assert code == 0
    assert main(["predict", "--run", str(run), "--split", "test", "--out", str(masks)]) == 0
    assert main(["evaluate", "--predictions", str(masks), "--run", str(run)]) == 0
    rows = read_rows(masks / "evaluation" / "cases.csv")
    assert len(rows) == 2
    assert {"dice_WT", "dice_TC", "dice_ET", "hd95_mm_ET"} <= set(rows[0])
    for row in rows:
        (flair,) = source.rglob(f"{row['case_id']}_flair.nii*")
        assert same_grid(read_volume(masks / f"{row['case_id']}.nii.gz"), read_volume(flair))


def test_presets_hold_the_recipe_of_the_paper():
    for name in ("picai2022", "brats2018"):
        config = PRESETS[name]
        optimizer = config.optimizer
        assert (optimizer.name, optimizer.learning_rate, optimizer.momentum) == ("sgd", 0.1, 0.9)
        assert (optimizer.weight_decay, optimizer.schedule) == (1e-5, "constant")
        assert (config.num_epochs, config.batch_size) == (200, 1)
        assert config.model.name == "resnet50_unet"
    assert PRESETS["picai2022"].data.shape == (160, 128, 24)
    assert PRESETS["brats2018"].data.patch_shape == (224, 224, 144)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["picai2022", "brats2018"])
def test_the_smoke_run_of_an_experiment(experiment, tmp_path):
    names = [experiment, f"{experiment}-recommended"]
    arguments = ["--smoke", "--out", str(tmp_path), "--runs", *names]
    run = subprocess.run(
        [sys.executable, "-m", f"experiments.{experiment}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    *_, dice = (line.split() for line in run.stdout.splitlines() if line.startswith("  Dice "))
    assert all(0 <= float(value) <= 1 for value in dice[1:])
    if experiment == "brats2018":
        # The tumours are plain, and found where they are.
        assert float(dice[1]) > 0.3
    for name in names:
        assert len(read_rows(tmp_path / name / "test" / "evaluation" / "cases.csv")) == 2
