"""``afl-jax evaluate`` on real files: its tables, its summary and its report."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from afl_jax.cli import main
from afl_jax.data.preprocess import reorient
from afl_jax.data.volume import Volume, read_volume, write_volume

SPACING = (0.5, 0.5, 3.0)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def a_case(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and prediction: a lesion that grows with the index, and is found ever better."""
    labels, prediction = np.zeros((2, 24, 20, 6), np.uint8)
    labels[4 : 7 + index, 4:10, 1:4] = 1
    prediction[6 : 7 + index, 4:10, 1:4] = 1
    return labels, prediction


@pytest.fixture
def folders(tmp_path) -> Path:
    """Labels, predictions with probabilities, and images of five cases; the last has no lesion."""
    for name in ("labels", "predictions/probabilities", "images"):
        (tmp_path / name).mkdir(parents=True)
    for index in range(5):
        labels, prediction = a_case(index) if index < 4 else np.zeros((2, 24, 20, 6), np.uint8)
        name = f"case_{index}.nii.gz"
        write_volume(tmp_path / "labels" / name, Volume(labels, SPACING))
        write_volume(tmp_path / "predictions" / name, Volume(prediction, SPACING))
        probs = np.stack([1 - prediction, prediction], axis=-1) * np.float32(0.9) + np.float32(0.05)
        write_volume(tmp_path / "predictions/probabilities" / name, Volume(probs, SPACING))
        image = labels + np.random.default_rng(index).random(labels.shape, np.float32)
        path = tmp_path / "images" / f"case_{index}_t2w.nii.gz"
        write_volume(path, Volume(image.astype(np.float32), SPACING))
    return tmp_path


def evaluate(folders: Path, *options: str, code: int = 0) -> Path:
    arguments = [f"--{name}={folders / name}" for name in ("predictions", "labels")]
    assert main(["evaluate", *arguments, *options]) == code
    return folders / "predictions" / "evaluation"


class _Page(HTMLParser):
    """Text, addresses and tags of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.addresses, self.tags = "", [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_tables_summary_and_report_agree(folders, capsys):
    out = evaluate(folders, "--images", str(folders / "images"))
    rows = read_rows(out / "cases.csv")
    assert [row["case_id"] for row in rows] == [f"case_{i}" for i in range(5)]
    # The first lesion has 3 of its 3 slices along x, the prediction 1.
    assert float(rows[0]["dice"]) == pytest.approx(2 * 1 / (1 + 3))
    assert rows[4]["dice"] == "nan"
    assert {"soft_dice", "hd95_mm", "strict_lesion_f1", "surface_dice"} <= set(rows[0])
    assert [row["lesion"] for row in read_rows(out / "lesions.csv")] == ["1"] * 4
    summary = json.loads((out / "summary.json").read_text())
    dice = [float(row["dice"]) for row in rows[:4]]
    assert summary["metrics"]["dice"]["mean"] == pytest.approx(np.mean(dice))
    assert summary["metrics"]["dice"]["count"] == 4
    assert summary["lesions"]["lesion"] == {
        "tp": 4,
        "fp": 0,
        "fn": 0,
        "sensitivity": 1,
        "precision": 1,
        "f1": 1,
    }
    assert [third["count"] for third in summary["cases_by_volume"]] == [2, 1, 1]
    page = _Page((out / "report.html").read_text())
    assert f"{np.mean(dice):.3f}" in page.text
    text = re.sub(r"\s+", " ", page.text)
    for what in ("Best: case_3", "Median: case_2", "Second worst: case_1", "Worst: case_0"):
        assert f"{what}, Dice" in text
    printed = capsys.readouterr().out
    assert "4 found, 0 missed, 0 false alarms, F1 1.000" in printed


def test_the_report_needs_no_network_and_runs_nothing(folders):
    page = _Page((evaluate(folders) / "report.html").read_text())
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)


def test_names_cannot_write_into_the_report(folders):
    hostile = "<img src=x onerror=alert(1)>"
    for folder in ("labels", "predictions"):
        path = folders / folder / "case_0.nii.gz"
        path.rename(path.with_name(f"{hostile}.nii.gz"))
    html = (evaluate(folders) / "report.html").read_text()
    assert "<img src=x" not in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html


def test_a_prediction_without_label_does_not_stop_the_others(folders, capsys):
    (folders / "labels" / "case_1.nii.gz").unlink()
    (folders / "predictions" / "case_2.nii.gz").unlink()
    path = folders / "predictions" / "case_3.nii.gz"
    write_volume(path, Volume(np.zeros((24, 20, 7), np.uint8), SPACING))
    out = evaluate(folders, code=2)
    assert [row["case_id"] for row in read_rows(out / "cases.csv")] == ["case_0", "case_4"]
    output = capsys.readouterr()
    assert f"{folders / 'predictions' / 'case_1.nii.gz'} has no label of that name" in output.err
    assert "case_3.nii.gz: expected the grid of its label, found shape" in output.err
    assert output.err.count("\n") == 2
    assert "1 labels have no prediction: case_2." in output.out
    html = (out / "report.html").read_text()
    assert "case_1.nii.gz has no label of that name" in html
    assert "1 labels have no prediction: case_2." in html


def test_no_case_at_all_writes_nothing(folders, capsys):
    for path in (folders / "labels").iterdir():
        path.rename(path.with_name(f"other_{path.name}"))
    out = evaluate(folders, code=2)
    assert not out.exists()
    assert capsys.readouterr().err.count("\n") == 5


def test_regions_are_sets_of_classes(folders):
    path = folders / "labels" / "case_3.nii.gz"
    labels, prediction = a_case(3)
    labels[8:, 4:7] *= 2
    write_volume(path, Volume(labels, SPACING))
    write_volume(folders / "predictions" / "case_3.nii.gz", Volume(prediction, SPACING))
    out = evaluate(folders, "--regions", "whole=1,2", "core=2")
    row = read_rows(out / "cases.csv")[3]
    whole, predicted = int((labels > 0).sum()), int(prediction.sum())
    assert float(row["dice_whole"]) == pytest.approx(2 * predicted / (whole + predicted))
    assert float(row["dice_core"]) == 0
    assert float(row["dice"]) == pytest.approx(float(row["dice_whole"]) / 2)


def test_picai_scores_come_from_the_probabilities(folders, capsys):
    pytest.importorskip("picai_eval", reason="the extra picai is not installed")
    out = evaluate(folders, "--picai")
    picai = json.loads((out / "summary.json").read_text())["picai"]
    # Every lesion is found first, and the case without one has the lowest confidence.
    assert picai == {"auroc": 1, "ap": 1, "score": 1}
    assert "PI-CAI: auroc 1.000  ap 1.000  score 1.000" in capsys.readouterr().out
    assert "PI-CAI score" in (out / "report.html").read_text()
    (folders / "predictions" / "probabilities" / "case_0.nii.gz").unlink()
    evaluate(folders, "--picai", code=2)
    assert "predict with --probabilities, or leave --picai out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regions", "WT"], "--regions must be different names with classes"),
        (["--regions", "WT=1", "WT=2"], "--regions must be different names with classes"),
        (["--regions", "WT=a"], "--regions must be different names with classes"),
        (["--tolerance-mm", "-1"], "--tolerance-mm must be at least 0, got -1.0"),
        (["--run", "x"], "give either --labels or --run"),
        (["--images", "nowhere"], "nowhere is not a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(folders, capsys, options, message):
    assert not evaluate(folders, *options, code=2).exists()
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_image_stored_in_another_order_of_axes_is_drawn_the_same(folders):
    def pictures() -> list[str]:
        html = (evaluate(folders, "--images", str(folders / "images")) / "report.html").read_text()
        return re.findall('data:image/png;base64,[^"]+', html)

    before = pictures()
    assert len(before) == 4
    for path in (folders / "images").iterdir():
        write_volume(path, reorient(read_volume(path), orientation="SAR"))
    assert pictures() == before
