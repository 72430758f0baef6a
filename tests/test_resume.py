"""A run that is interrupted and resumed is the run that was not, bit for bit."""

import functools
import os
import signal
from pathlib import Path

import pytest
from resumable_run import assert_same_run, checkpoint_numbers, command, read_log

from afl_jax import loop
from afl_jax.cli import main


@pytest.fixture
def data_dir(uninterrupted) -> Path:
    return uninterrupted.parent / "data"


def signal_at(patch: pytest.MonkeyPatch, name: str, call: int, signum: int) -> None:
    """Sends this process a signal at a call of one of the loop's functions."""
    function, calls = getattr(loop, name), []

    @functools.wraps(function)
    def wrapped(*args, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signum)
        return function(*args, **options)

    patch.setattr(loop, name, wrapped)


def interrupt(out: Path, data_dir: Path, name: str, call: int, signum: int) -> int:
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, name, call, signum)
        return main(command(out, data_dir))


@pytest.mark.parametrize(
    ("name", "call", "signum", "exit_code", "place"),
    [
        ("_device_fields", 1, signal.SIGTERM, 143, "1 of 6 steps"),
        ("_device_fields", 2, signal.SIGINT, 130, "2 of 6 steps"),
        # Calls 4 and 5 are the two batches of the validation.
        ("_device_fields", 4, signal.SIGTERM, 143, "3 of 6 steps"),
        ("_write_history", 1, signal.SIGINT, 130, "3 of 6 steps"),
        ("_device_fields", 6, signal.SIGTERM, 143, "4 of 6 steps"),
        ("_write_history", 2, signal.SIGTERM, 143, "6 of 6 steps"),
    ],
    ids=["first step", "step", "validation", "between epochs", "second epoch", "end"],
)
def test_a_signal_ends_in_a_checkpoint_from_which_the_run_goes_on(
    name, call, signum, exit_code, place, uninterrupted, tmp_path, data_dir, capsys
):
    out = tmp_path / "run"
    before = signal.getsignal(signum)
    assert interrupt(out, data_dir, name, call, signum) == exit_code
    assert signal.getsignal(signum) is before
    output = capsys.readouterr()
    expected = f"afl-jax: stopped by {signal.Signals(signum).name} after {place}"
    assert output.err == f"{expected}; go on with --resume\n"
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert f"step {place.split()[0]}" in capsys.readouterr().out
    assert_same_run(out, uninterrupted)


def test_checkpoints_are_written_as_often_and_kept_as_long_as_the_config_says(uninterrupted):
    # After steps 2, 3, 4 and 6; the second epoch begins at 3.
    numbers = checkpoint_numbers(uninterrupted)
    assert numbers[-3:] == [2, 3, 4]
    assert set(numbers[:-3]) <= {1}


def test_a_damaged_newest_checkpoint_costs_one_interval(uninterrupted, tmp_path, data_dir, capsys):
    out = tmp_path / "run"
    assert interrupt(out, data_dir, "_device_fields", 6, signal.SIGTERM) == 143
    newest = out / "checkpoints" / str(checkpoint_numbers(out)[-1])
    for file in (newest / "variables" / "d").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert main(["train", "--out", str(out), "--resume"]) == 0
    output = capsys.readouterr()
    assert f"afl-jax: error: {newest} cannot be read as a checkpoint" in output.err
    assert "resumed after epoch 1, step 3" in output.out
    assert_same_run(out, uninterrupted)


def test_on_another_number_of_devices_a_run_goes_on_up_to_rounding(
    uninterrupted, tmp_path, data_dir
):
    out = tmp_path / "run"
    assert interrupt(out, data_dir, "_device_fields", 1, signal.SIGTERM) == 143
    assert main(["train", "--out", str(out), "--resume", "--num-devices", "2"]) == 0
    first, expected = read_log(out)[0], read_log(uninterrupted)[0]
    for name in ("loss", "gamma", "val_loss"):
        assert float(first[name]) == pytest.approx(float(expected[name]), rel=1e-3)
