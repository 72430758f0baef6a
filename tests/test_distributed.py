"""One run of two processes of two devices each: real processes, that find each other by a port."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from resumable_run import assert_same_run, command, read_log

from afl_jax.cli import main

# A step of four cases: one on each of the four devices; two steps an epoch.
BATCH = ["--batch-size", "4", "--data.num-train", "8", "--checkpoint-every", "1"]
# What a process does to itself at one of its steps.
PROGRAM = """
import os, sys
from afl_jax import loop
from afl_jax.cli import main

step, signum = map(int, sys.argv[1:3])
device_fields, calls = loop._device_fields, []

def counted(batch):
    calls.append(1)
    if len(calls) == step:
        os.kill(os.getpid(), signum)
    return device_fields(batch)

loop._device_fields = counted
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_dir) -> Path:
    """The same run by one process, on four devices."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert main([*command(out, data_dir), *BATCH, "--num-devices", "4"]) == 0
    return out


@pytest.fixture(autouse=True)
def compiled_programs_are_kept(tmp_path_factory, monkeypatch) -> None:
    """From one pair of processes to the next."""
    cache = tmp_path_factory.getbasetemp() / "programs"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))


def start(
    arguments: list[str],
    *,
    process_id: int,
    port: int,
    step: int = 0,
    signum: int = 0,
) -> subprocess.Popen:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(process_id),
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(step), str(int(signum)), *arguments, "--distributed"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run_both(
    arguments: list[str], *, signalled: int | None = None, **at: int
) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of both processes, of which one may signal itself."""
    port = free_port()
    processes = [
        start(arguments, process_id=index, port=port, **(at if index == signalled else {}))
        for index in range(2)
    ]
    try:
        results = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, results, strict=True)]


def run_arguments(out: Path, data_dir: Path) -> list[str]:
    return [*command(out, data_dir), *BATCH, "--num-devices", "2"]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_are_the_run_of_one_and_process_0_writes(alone, tmp_path):
    """With a data set of their own, which process 0 prepares."""
    out = tmp_path / "run"
    first, second = run_both(run_arguments(out, tmp_path / "data"))
    assert first[0] == second[0] == 0, (first[2][-2000:], second[2][-2000:])
    assert "2 process(es) of 2 cpu device(s), batch 4" in first[1]
    # But for what the library that connects CPUs says of itself.
    assert [line for line in second[1].splitlines() if "[Gloo]" not in line] == []
    for row, expected in zip(read_log(out), read_log(alone), strict=True):
        for name in ("loss", "gradient_norm", "gamma", "val_loss", "val_dice"):
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=2e-3, abs=1e-6)
    cases = [row["case_id"] for row in read_rows(out / "validation.csv")]
    assert cases == [row["case_id"] for row in read_rows(alone / "validation.csv")]
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()}


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_step_and_the_run_goes_on(data_dir, tmp_path):
    uninterrupted, out = tmp_path / "uninterrupted", tmp_path / "run"
    for code, _, error in run_both(run_arguments(uninterrupted, data_dir)):
        assert code == 0, error
    # Process 1 is asked to stop; process 0 writes the checkpoint.
    stopped = run_both(run_arguments(out, data_dir), signalled=1, step=1, signum=signal.SIGTERM)
    assert [code for code, *_ in stopped] == [143, 143], stopped
    places = {error.split("after ")[1].split(" of")[0] for *_, error in stopped}
    assert len(places) == 1
    for code, _, error in run_both(["train", "--out", str(out), "--resume"]):
        assert code == 0, error
    assert_same_run(out, uninterrupted)


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_where_one_is_killed_the_other_ends_and_says_so(killed, data_dir, tmp_path):
    out = tmp_path / "run"
    begun = time.monotonic()
    results = run_both(
        run_arguments(out, data_dir), signalled=killed, step=2, signum=signal.SIGKILL
    )
    assert time.monotonic() - begun < 200
    assert results[killed][0] == -signal.SIGKILL
    code, _, error = results[1 - killed]
    assert code not in (0, None)
    last = error.strip().splitlines()[-1]
    assert last.startswith(("afl-jax: error: process", "afl-jax: error: this process"))
    assert last.endswith("with --resume.")
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_mistake_in_one_ends_both(data_dir, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "something").write_text("in the way")
    results = run_both(run_arguments(out, data_dir))
    assert results[0][0] == 2
    assert "exists already" in results[0][2]
    assert results[1][0] not in (0, None)
    assert "afl-jax: error: " in results[1][2].strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "--distributed: the processes of the run cannot be joined"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES must be a whole number from 0"),
    ],
)
def test_an_environment_that_says_nothing_is_one_line(variables, message, data_dir, tmp_path):
    arguments = run_arguments(tmp_path / "run", data_dir)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "0", "0", *arguments, "--distributed"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
