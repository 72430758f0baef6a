"""Comparisons: cells are done once, whatever happens, and the tables follow from them alone."""

import csv
import dataclasses
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from afl_jax import reports
from afl_jax.config import Config, DataConfig, LossConfig
from afl_jax.errors import InputError
from afl_jax.presets import with_narrow_network
from experiments import cells, compare_losses
from experiments.ablation import FORMS
from experiments.comparison_report import METRICS, write_report

LOSSES = {"a": LossConfig(name="focal"), "b": LossConfig(name="dice")}
NUM_CASES = 12


def tiny_config(data_dir: Path) -> Config:
    data = DataConfig(
        data_dir=str(data_dir), shape=(16, 16, 8), num_train=4, num_val=4, spacing=(2.0, 2.0, 3.0)
    )
    return with_narrow_network(Config(data=data, num_epochs=1, batch_size=2))


def fake_rows(seed: int, *, better: float) -> list[dict]:
    """Cases of which every third has no lesion; larger lesions are found better."""
    rng = np.random.default_rng(seed)
    rows = []
    for case in range(NUM_CASES):
        empty = case % 3 == 2
        dice = math.nan if empty else 0.3 + 0.04 * case + better + 0.01 * rng.random()
        rows.append(
            {"case_id": f"case_{case}", "loss": 0.1, "dice": dice, "iou": dice / 2}
            | {"sensitivity": dice, "specificity": 0.9}
            | {"lesion_tp": int(not empty), "lesion_fp": 0, "lesion_fn": 0}
            | {"lesion_volume_mm3": 0.0 if empty else 100.0 * (case + 1)}
            | {"roughness": math.nan if empty else (7 * case) % NUM_CASES / 100}
            | {"irregularity": math.nan if empty else (7 * case) % NUM_CASES / 50}
        )
    return rows


@pytest.fixture
def fake_training(monkeypatch):
    """In place of training: rows from the seed. Cells trained so far, and how many may be."""
    trained, limit = [], [math.inf]

    def compile_cell(config, console):
        def train_cell(config, folder):
            if len(trained) == limit[0]:
                raise KeyboardInterrupt
            trained.append(folder.name)
            folder.mkdir(parents=True)
            return fake_rows(config.seed, better=0.1 * (config.loss.name == "dice"))

        return train_cell

    monkeypatch.setattr(cells, "_compile_cell", compile_cell)
    monkeypatch.setattr(cells.construct, "prepare_data", lambda *args: None)
    return trained, limit


def compare(out: Path, **changes) -> str:
    config = dataclasses.replace(tiny_config(out / "data"), **changes)
    compare_losses.compare(LOSSES, config, reference="a", num_seeds=2, out=out, num_processes=1)
    return (out / "table.csv").read_text() + (out / "report.md").read_text()


def test_an_interrupted_comparison_goes_on_and_its_table_is_the_same(fake_training, tmp_path):
    trained, limit = fake_training
    whole = compare(tmp_path / "whole")
    assert trained == ["a-0", "a-1", "b-0", "b-1"]
    trained.clear()
    limit[0] = 3
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "parts")
    assert not (tmp_path / "parts" / "table.csv").exists()
    limit[0] = math.inf
    assert compare(tmp_path / "parts") == whole
    assert trained == ["a-0", "a-1", "b-0", "b-1"]
    assert compare(tmp_path / "parts") == whole
    assert len(trained) == 4


def test_another_config_needs_another_folder(fake_training, tmp_path):
    compare(tmp_path)
    compare(tmp_path, data=dataclasses.replace(tiny_config(tmp_path).data, data_dir="moved"))
    with pytest.raises(InputError, match=r"a\.json is of another comparison than this one"):
        compare(tmp_path, num_epochs=2)


def test_the_report(tmp_path):
    fakes = {
        name: [fake_rows(seed, better=better) for seed in (0, 1)]
        for name, better in (("a", 0.0), ("b", 0.1))
    }
    text = write_report(fakes, reference="a", out=tmp_path)
    with (tmp_path / "table.csv").open(newline="") as file:
        table = {row["loss"]: row for row in csv.DictReader(file)}
    assert list(table) == ["b", "a"]  # The best first.
    assert float(table["b"]["rank"]) == 1.0
    assert float(table["b"]["wins"]) == 8.0  # Of 12 cases 4 have no lesion.
    assert float(table["b"]["dice_difference"]) == pytest.approx(0.1, abs=1e-9)
    assert float(table["b"]["dice_effect_size"]) == 1.0
    assert float(table["b"]["dice_p_holm"]) == pytest.approx(2 / 2**8)  # All of 8 signs agree.
    for row in table.values():
        assert float(row["dice_low"]) < float(row["dice"]) < float(row["dice_high"])
        assert float(row["lesion_f1"]) == 1.0
    with (tmp_path / "thirds.csv").open(newline="") as file:
        thirds = list(csv.DictReader(file))
    small, _, large = [r for r in thirds if (r["by"], r["loss"]) == ("lesion volume", "a")]
    assert (small["cases"], large["cases"]) == ("3", "2")
    assert float(small["dice"]) < float(large["dice"])
    for heading in (*METRICS.values(), "rank", "by lesion volume", "by boundary irregularity"):
        assert heading in text
    assert "nan" not in text
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


@pytest.mark.parametrize("columns", [compare_losses.COLUMNS, FORMS], ids=["losses", "forms"])
def test_every_column_is_a_loss_that_can_be_made(columns):
    for loss in columns.values():
        assert callable(cells.construct.create_loss(loss, num_classes=2))


def test_an_unknown_loss_is_named(tmp_path):
    with pytest.raises(InputError, match=r"^no loss is called 'dise': choose from adaptive_focal"):
        compare_losses.main(tmp_path, losses=("dise",))


# --- the whole, with a real kill -----------------------------------------------------------------

_PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_compare_losses import LOSSES, tiny_config
from experiments.compare_losses import compare
if __name__ == "__main__":
    out = Path(sys.argv[1])
    compare(LOSSES, tiny_config(out.parent / "data"), reference="a", num_seeds=2, out=out,
            num_processes=int(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_its_table_is_the_same(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM.format(tests=str(Path(__file__).parent)))

    def command(out: str, num_processes: int) -> list[str]:
        return [sys.executable, str(program), str(tmp_path / out), str(num_processes)]

    process = subprocess.Popen(command("parts", 1))
    folder = tmp_path / "parts" / "cells"
    deadline = time.monotonic() + 500
    while not list(folder.glob("*.csv")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*.csv")}
    assert 1 <= len(done) < 4
    subprocess.run(command("parts", 1), check=True)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list(folder.glob("*.csv"))) == 4
    # In two processes, and never interrupted.
    subprocess.run(command("whole", 2), check=True)
    for name in ("table.csv", "thirds.csv", "report.md"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_cells_are_read_as_they_were_written(tmp_path):
    (tmp_path / "cells").mkdir()
    for seed in (0, 1):
        reports.write_csv(tmp_path / "cells" / f"a-{seed}.csv", fake_rows(seed, better=0.0))
    (read,) = cells.read_cells({"a": LOSSES["a"]}, num_seeds=2, out=tmp_path).values()
    for seed in (0, 1):
        for row, expected in zip(read[seed], fake_rows(seed, better=0.0), strict=True):
            assert list(row) == list(expected)
            for name, value in expected.items():
                assert row[name] == value or (math.isnan(row[name]) and math.isnan(value))
