"""Thousands of damaged and hostile files: each is read or refused in one line; see `fuzz_files`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_files import KINDS

# The files have hundreds of bytes; the readers' libraries bring buffers and code of their own.
MAX_GROWTH_MB = 64
# At least 2,000 in all.
COUNTS = dict.fromkeys(KINDS, 250) | {"nii": 500, "mha": 500, "checkpoint": 150}


def fuzz(count: int, folder: Path, *kinds: str) -> dict[str, dict[str, float]]:
    program = Path(__file__).with_name("fuzz_files.py")
    done = subprocess.run(
        [sys.executable, str(program), str(count), str(folder), *kinds],
        capture_output=True,
        text=True,
        errors="replace",
    )
    # A signal would be the alarm that ends a hang, or a crash of a library.
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    for kind, outcome in outcomes.items():
        assert outcome["growth_mb"] < MAX_GROWTH_MB, kind
        assert outcome["refused"] > 0, kind
    return outcomes


def available(kinds) -> list[str]:
    has_torch = importlib.util.find_spec("torch") is not None
    return [kind for kind in kinds if has_torch or kind != "pth"]


def test_some_files_of_every_kind_are_read_or_refused(tmp_path):
    outcomes = fuzz(10, tmp_path, *available(KINDS))
    assert sorted(outcomes) == sorted(available(KINDS))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_files_are_read_or_refused(kind, tmp_path):
    if kind not in available([kind]):
        pytest.skip("PyTorch is not installed")
    (outcome,) = fuzz(COUNTS[kind], tmp_path, kind).values()
    print(kind, outcome)


def test_there_are_at_least_two_thousand():
    assert sum(COUNTS.values()) >= 2000
