import csv
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from afl_jax import reports

NAN = float("nan")


def test_interval_of_equal_values_is_that_value():
    assert reports.bootstrap_interval([0.5, 0.5, NAN, 0.5]) == (0.5, 0.5)


def test_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(10.0, 2.0, 400)
    low, high = reports.bootstrap_interval(values)
    error = values.std() / math.sqrt(400)
    # 1.96 standard errors to each side; the bootstrap's own noise is a few percent of one.
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_interval_widens_with_confidence_and_repeats_with_its_seed():
    values = np.random.default_rng(0).random(30)
    narrow, wide = (reports.bootstrap_interval(values, confidence=c) for c in (0.5, 0.99))
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]
    assert reports.bootstrap_interval(values) == reports.bootstrap_interval(values)
    assert reports.bootstrap_interval(values) != reports.bootstrap_interval(values, seed=1)


@pytest.mark.parametrize("values", [[], [0.5], [NAN, 0.5, NAN]])
def test_fewer_than_two_values_have_no_interval(values):
    low, high = reports.bootstrap_interval(values)
    assert math.isnan(low)
    assert math.isnan(high)


ROWS = [
    {"case_id": "a", "dice": 0.25, "hd95_mm": NAN, "num_lesions": 1},
    {
        "case_id": "b",
        "dice": np.float32(0.75),
        "hd95_mm": NAN,
        "num_lesions": 2,
        "volume_mm3": 1500.5,
    },
    {"case_id": "c", "dice": NAN, "hd95_mm": NAN, "num_lesions": 6},
]


def test_summary_averages_what_is_defined_and_counts_it():
    summary = reports.summarise(ROWS)
    assert list(summary) == ["dice", "hd95_mm", "num_lesions", "volume_mm3"]
    assert summary["dice"].mean == (0.25 + 0.75) / 2
    assert summary["dice"].count == 2
    assert 0.25 <= summary["dice"].low <= summary["dice"].high <= 0.75
    assert summary["num_lesions"][::3] == ((1 + 2 + 6) / 3, 3)
    assert summary["volume_mm3"][::3] == (1500.5, 1)
    assert summary["hd95_mm"].count == 0
    assert math.isnan(summary["hd95_mm"].mean)


def test_csv_has_every_column_and_marks_what_is_undefined(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_text("an older and much longer file\n" * 20)
    reports.write_csv(path, ROWS)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["case_id", "dice", "hd95_mm", "num_lesions", "volume_mm3"]
    assert [row["dice"] for row in rows] == ["0.25", "0.75", "nan"]
    assert [row["volume_mm3"] for row in rows] == ["", "1500.5", ""]
    assert [child.name for child in tmp_path.iterdir()] == ["cases.csv"]


def test_json_turns_what_it_lacks_into_null(tmp_path):
    path = tmp_path / "summary.json"
    content = {
        "summary": reports.Summary(0.5, NAN, math.inf, np.int64(3)),
        "values": np.array([1.0, NAN]),
        "names": ("Zürich", None, True),
    }
    reports.write_json(path, content)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "summary": {"mean": 0.5, "low": None, "high": None, "count": 3},
        "values": [1.0, None],
        "names": ["Zürich", None, True],
    }


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "cases.csv"
    reports.write_csv(path, ROWS)
    before = path.read_text()

    class Broken:
        def __str__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        reports.write_csv(path, [*ROWS, {"case_id": Broken()}])
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def printed(rows, width=100) -> list[list[str]]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(reports.case_table(rows, title="validation"))
    return [line.split() for line in console.export_text().splitlines() if line.strip()]


def test_table_lists_cases_then_mean_interval_and_count():
    rows = [{"case_id": "a", "dice": 0.5, "n": 2}, {"case_id": "b", "dice": 0.5, "n": 2}]
    rows.append({"case_id": "c", "dice": NAN, "n": 1234.5})
    title, header, _rule, *lines = printed(rows)
    assert title == ["validation"]
    assert header == ["case_id", "dice", "n"]
    assert lines[:3] == [["a", "0.500", "2"], ["b", "0.500", "2"], ["c", "-", "1,234"]]
    assert lines[3] == ["mean", "0.500", "413"]  # (2 + 2 + 1234.5) / 3 = 412.8
    assert lines[4] == ["95", "%", "from", "0.500", "2.000"]
    assert lines[5][:4] == ["95", "%", "to", "0.500"]
    assert lines[6] == ["cases", "2", "3"]


def test_a_table_of_many_metrics_has_a_row_for_each():
    names = [f"metric_{index}" for index in range(9)]
    rows = [{"case_id": case} | dict.fromkeys(names, value) for case, value in (("a", 1), ("b", 3))]
    _title, header, _rule, *lines = printed(rows, width=60)
    assert header == ["metric", "mean", "95", "%", "from", "to", "cases"]
    assert lines == [[name, "2.000", "1.000", "3.000", "2"] for name in names]


def test_a_narrow_table_cuts_nothing_off():
    rows = [{"case_id": "prostate_10000_1000000", "dice": 0.123, "sensitivity": 0.456}]
    text = "".join("".join(line) for line in printed(rows, width=32))
    assert "0.123" in text
    assert "0.456" in text
    assert "…" not in text


def test_terciles_are_thirds_by_rank():
    indices = reports.tercile_indices([5.0, NAN, 1.0, 3.0, 3.0, 9.0, 7.0, 2.0])
    # 1 2 3 | 3 5 | 7 9: sizes equal to one, the larger ones first.
    assert indices.tolist() == [1, -1, 0, 0, 1, 2, 2, 0]
    assert reports.tercile_indices([2.0, 1.0]).tolist() == [1, 0]
    assert reports.tercile_indices([]).tolist() == []


def test_means_by_tercile():
    rows = [{"size": size, "dice": dice} for size, dice in ((3, 0.9), (1, 0.1), (2, NAN), (4, 0.7))]
    small, middle, large = reports.by_tercile(rows, of="size", metrics=("dice",))
    assert (small.low, small.high, small.count) == (1, 2, 2)
    assert small.metrics["dice"][::3] == (0.1, 1)
    assert (middle.low, middle.metrics["dice"].mean) == (3, 0.9)
    assert (large.low, large.metrics["dice"].mean) == (4, 0.7)
    assert reports.by_tercile([], of="size", metrics=("dice",)) == []
