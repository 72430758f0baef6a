"""A disk that fills up costs one clear line, and nothing that was there before."""

import contextlib
import errno
import gc
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from resumable_run import assert_same_run, command

from afl_jax import cli
from afl_jax.checkpoint import CheckpointStore
from afl_jax.data.volume import Volume, write_volume


def main(arguments: list[str]) -> int:
    """The program, during which nothing is collected of what an earlier one left behind.

    CPython 3.11 fails to parse a source, as tyro does, if coroutines of orbax that failed are
    finalised meanwhile (SystemError: AST constructor recursion depth mismatch). A program of its
    own has none yet.
    """
    gc.collect()
    gc.disable()
    try:
        return cli.main(arguments)
    finally:
        gc.enable()
        gc.collect()


@pytest.fixture
def data_dir(uninterrupted) -> Path:
    return uninterrupted.parent / "data"


@contextlib.contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Writes zeros until there is no room left; returns the file."""
    filling = disk / "filling"
    with filling.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return filling


def sound_checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def assert_one_line(error: str, text: str) -> None:
    assert text in error
    assert error.count("\n") == 1, error


def before_save(patch: pytest.MonkeyPatch, number: int, action) -> None:
    """Calls something in front of one of the checkpoints of a run."""
    save, calls = CheckpointStore.save, []

    def wrapped(store, checkpoint, **options):
        calls.append(1)
        if len(calls) == number:
            store.wait()
            action()
        save(store, checkpoint, **options)

    patch.setattr(CheckpointStore, "save", wrapped)


def test_in_the_middle_of_a_checkpoint(
    uninterrupted,
    data_dir,
    small_disk,
    capsys,
    monkeypatch,
):
    out = small_disk / "run"
    with monkeypatch.context() as patch:
        before_save(patch, 3, lambda: fill(small_disk))
        assert main(command(out, data_dir)) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error or "No space left on device" in error
    assert error.count("\n") == 1, error
    assert sound_checkpoints(out) == ["1", "2"]
    (small_disk / "filling").unlink()
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert_same_run(out, uninterrupted)


def test_where_a_file_of_a_checkpoint_cannot_grow(
    uninterrupted,
    data_dir,
    tmp_path,
    capsys,
    monkeypatch,
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        before_save(patch, 3, lambda: stack.enter_context(no_file_larger_than(4000)))
        assert main(command(out, data_dir)) == 2
    assert_one_line(
        capsys.readouterr().err, f"{out / 'checkpoints'}: a checkpoint cannot be written"
    )
    assert sound_checkpoints(out) == ["1", "2"]
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert_same_run(out, uninterrupted)


def test_in_the_middle_of_preparation(small_disk, capsys):
    arguments = ["prepare", "--data-dir", str(small_disk / "data"), "--num-train", "8"]
    arguments += ["--num-val", "2", "--shape", "32", "32", "16"]
    # Room for some cases: each takes 220 kB.
    filling = fill(small_disk)
    os.truncate(filling, filling.stat().st_size - 10**6)
    assert main(arguments) == 2
    assert_one_line(capsys.readouterr().err, "the data set cannot be written")
    kept = [path for path in (small_disk / "data").rglob("*") if path.is_file()]
    assert 1 <= len(kept) <= 4
    assert {path.suffix for path in kept} == {".record"}
    filling.unlink()
    assert main(arguments) == 0
    assert "8 train, 2 val cases" in capsys.readouterr().out


@pytest.mark.parametrize("limit", ["size", "disk"])
def test_in_the_middle_of_prediction(limit, uninterrupted, tmp_path, capsys, request):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        write_volume(images / f"{name}.nii.gz", Volume(rng.random((16, 16, 8, 3), np.float32)))
    disk = request.getfixturevalue("small_disk") if limit == "disk" else tmp_path
    out = disk / "masks"
    run = ["predict", "--run", str(uninterrupted), "--out", str(out), "--images"]
    assert main([*run, str(images / "a.nii.gz")]) == 0
    before = (out / "a.nii.gz").read_bytes()
    with contextlib.ExitStack() as stack:
        if limit == "size":
            stack.enter_context(no_file_larger_than(50))
        else:
            fill(disk)
        assert main([*run, str(images / "b.nii.gz"), str(images / "a.nii.gz")]) == 2
    # The mask that was there is not made again.
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{out / 'b.nii.gz'}: cannot be written" in error
    assert sorted(path.name for path in out.iterdir()) == ["a.nii.gz", "predictions.json"]
    assert (out / "a.nii.gz").read_bytes() == before


def test_where_not_even_the_folder_of_a_run_can_be_made(data_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    assert main(command(tmp_path / "file" / "run", data_dir)) == 2
    assert_one_line(capsys.readouterr().err, str(tmp_path / "file"))
    shutil.rmtree(tmp_path)
