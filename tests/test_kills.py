"""Runs that are killed, again and again, at random: what is resumed is the run that was not.

The program is a process of its own, which sends itself the signal, at a random moment after one of
the calls at which it stands in the middle of something, at random which.
"""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from resumable_run import assert_same_run
from tiny_run import PHANTOM, TINY

CHECKPOINT_EVERY = 2
NUM_STEPS = 5  # An epoch.
# Where a call is counted, and how often it is called in an uninterrupted run.
MOMENTS = {
    "preparation": ("afl_jax.data.records", "RecordsBuilder._stage_case", 13),
    "joining": ("afl_jax.data.records", "RecordsBuilder._download_and_prepare", 1),
    "step": ("afl_jax.loop", "_read_metrics", 10),
    "checkpoint": ("afl_jax.checkpoint", "CheckpointStore.save", 6),
    "validation": ("afl_jax.loop", "evaluate", 2),
    "log": ("afl_jax.loop", "_write_history", 2),
}
PROGRAM = """
import functools, importlib, os, sys, threading
from afl_jax.cli import main

place, call, delay, signum = sys.argv[1:5]
module, _, name = place.partition(":")
*owners, name = name.split(".")
owner = functools.reduce(getattr, owners, importlib.import_module(module))
function, calls = getattr(owner, name), []

def counted(*args, **options):
    calls.append(1)
    if len(calls) == int(call):
        threading.Timer(float(delay), os.kill, (os.getpid(), int(signum))).start()
    return function(*args, **options)

setattr(owner, name, counted)
from afl_jax import loop
read_metrics = loop._read_metrics

def said(*args):
    values = read_metrics(*args)
    print("read a step", file=sys.stderr, flush=True)
    return values

loop._read_metrics = said
sys.exit(main(sys.argv[5:]))
"""


def arguments(out: Path, data_dir: Path) -> list[str]:
    cases = ["--data.num-train", str(2 * NUM_STEPS), "--checkpoint-every", str(CHECKPOINT_EVERY)]
    return ["train", "--out", str(out), "--data.data-dir", str(data_dir), *TINY, *PHANTOM, *cases]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Compiled programs are kept, so that only the first process compiles."""
    cache = tmp_path_factory.mktemp("cache")
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, environment) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run(arguments(folder / "run", folder / "data"), environment)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def run(
    options: list[str],
    environment: dict[str, str],
    *,
    moment: str = "step",
    call: int = 0,
    delay: float = 0.0,
    signum: int = signal.SIGKILL,
) -> subprocess.CompletedProcess:
    module, name, _ = MOMENTS[moment]
    command = [sys.executable, "-c", PROGRAM, f"{module}:{name}", str(call), str(delay)]
    return subprocess.run(
        [*command, str(int(signum)), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def kill_and_resume(
    folder: Path, environment: dict[str, str], draws: list[tuple[str, int, float, int]]
) -> int:
    """A run that is killed once for each draw, then ends; how many kills came before the end."""
    out, num_kills, num_done = folder / "run", 0, 0
    for moment, call, delay, signum in [*draws, ("step", 0, 0.0, signal.SIGKILL)]:
        begun = (out / "config.json").exists()
        options = ["train", "--out", str(out), "--resume"] if begun else None
        done = run(
            options or arguments(out, folder / "data"),
            environment,
            moment=moment,
            call=call,
            delay=delay,
            signum=signum,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGTERM), done.stderr
        num_kills += done.returncode != 0
        # Between two checkpoints a step is lost, or both while the second was being written; and
        # no more than two steps are ahead of those whose metrics were read.
        resumed = re.search(r"resumed after epoch \d+, step (\d+)", done.stdout)
        first = int(resumed.group(1)) if resumed else 0
        if begun:
            assert first >= num_done - 2 * CHECKPOINT_EVERY
        num_done = first + done.stderr.count("read a step")
        if signum == signal.SIGTERM and done.returncode != 0 and "after" in done.stderr:
            num_done = int(re.search(r"after (\d+) of", done.stderr).group(1))
    assert done.returncode == 0
    left = [path.name for path in folder.rglob("*") if path.name.startswith((".", "incomplete"))]
    assert left == []
    assert not list((out / "checkpoints").glob("*tmp*"))
    return num_kills


def draw(rng: random.Random, moment: str) -> tuple[str, int, float, int]:
    call = rng.randint(1, MOMENTS[moment][2])
    return moment, call, rng.uniform(0, 0.1), rng.choice([signal.SIGKILL, signal.SIGTERM])


def test_a_run_that_is_killed_four_times_is_the_run_that_was_not(
    uninterrupted, environment, tmp_path
):
    draws = [
        ("preparation", 7, 0.0, signal.SIGKILL),
        ("checkpoint", 2, 0.01, signal.SIGKILL),
        ("step", 2, 0.0, signal.SIGTERM),
        ("validation", 1, 0.0, signal.SIGKILL),
    ]
    assert kill_and_resume(tmp_path, environment, draws) == 4
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_runs_that_are_killed_fifty_times_at_random(uninterrupted, environment, tmp_path):
    rng, num_kills, num_runs = random.Random(0), 0, 0
    by_moment = dict.fromkeys(MOMENTS, 0)
    while num_kills < 50:
        # The later moments of a run come after the earlier ones.
        moments = sorted(rng.choices(list(MOMENTS), k=5), key=list(MOMENTS).index)
        draws = [draw(rng, moment) for moment in moments]
        folder = tmp_path / str(num_runs)
        folder.mkdir()
        num_kills += kill_and_resume(folder, environment, draws)
        for moment in moments:
            by_moment[moment] += 1
        assert_same_run(folder / "run", uninterrupted)
        num_runs += 1
    print(f"{num_kills} kills of {num_runs} runs, drawn {by_moment}")
    assert all(by_moment.values())
