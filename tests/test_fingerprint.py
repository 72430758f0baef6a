"""What a run depends on is written down, shown, and asked for again when it goes on."""

import json
from pathlib import Path

import pytest
from tiny_run import PHANTOM, TINY, make_folder, some_labels

from afl_jax.cli import main
from afl_jax.config import Config, ModelConfig, changed_fields
from afl_jax.data.volume import read_volume, write_volume
from afl_jax.errors import InputError
from afl_jax.fingerprint import (
    data_difference,
    describe_data,
    describe_session,
    read_fingerprint,
    version_difference,
)


def describe(keys, splits=None, name="folder"):
    return describe_data(name, keys=keys, splits=splits or {"train": list(keys)})


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (describe({"a": "1", "b": "2"}), ""),
        (describe({"b": "2", "a": "1"}, {"train": ["a", "b"]}), ""),
        (describe({"a": "1", "b": "3"}), "cases changed: b"),
        (describe({"a": "1", "c": "3"}), "cases gone: b, new: c"),
        (describe({"a": "1", "b": "2"}, {"train": ["b", "a"]}), "the same cases are split"),
        (describe({"a": "1"}, name="phantom"), "the data set was folder, and is phantom"),
        (
            describe({"a": "1", "b": "2"} | {str(n): "0" for n in range(7)}),
            "cases new: 0 1 2 3 4 and 2 more",
        ),
    ],
)
def test_data_sets_differ_in_words(now, expected):
    before = describe({"a": "1", "b": "2"})
    difference = data_difference(before, now)
    assert difference.startswith(expected)
    assert bool(difference) == bool(expected)


def test_versions_differ_in_words():
    now = describe_session(step=7)
    assert version_difference(now, now) == ""
    before = {**now, "versions": {**now["versions"], "jax": "0.1"}}
    assert version_difference(before, now) == f"jax 0.1 is now {now['versions']['jax']}"


def test_changed_fields_are_named_with_their_path():
    changed = Config(model=ModelConfig(width=8), seed=3)
    assert changed_fields(changed, Config()) == {"model.width": (8, 64), "seed": (3, 0)}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"data": 3}', '{"data": {}, "sessions": []}', "[" * 10**5]
)
def test_a_file_that_is_no_fingerprint_is_one_line(text, tmp_path):
    path = tmp_path / "fingerprint.json"
    path.write_text(text)
    with pytest.raises(InputError, match="cannot be read as the fingerprint of a run") as error:
        read_fingerprint(path)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("raw") / "a", {n: some_labels() for n in "abcd"})


@pytest.fixture(scope="module")
def run(tmp_path_factory, source) -> Path:
    """A run of one epoch on a folder."""
    out = tmp_path_factory.mktemp("runs") / "run"
    data = ["--data.name", "folder", "--data.source", str(source), "--data.num-val", "1"]
    data += ["--data.data-dir", str(out.parent / "data"), "--data.shape", "16", "16", "8"]
    assert main(["train", "--out", str(out), *data, *TINY, "--num-epochs", "1"]) == 0
    return out


def test_report_shows_config_data_set_versions_and_history(run, capsys):
    content = json.loads((run / "fingerprint.json").read_text())
    assert content["data"]["splits"] == {"train": 3, "val": 1}
    assert main(["report", str(run)]) == 0
    output = capsys.readouterr().out
    for text in ("optimizer.schedule", "constant", "model.width", "1 of 1 epochs, finished"):
        assert text in output
    assert content["data"]["digest"] in output
    for name in ("afl-jax", "jax", "orbax-checkpoint", "numpy"):
        assert content["sessions"][0]["versions"][name] in output
    assert "val_dice" in output


def test_the_git_revision_is_that_of_the_checkout(run):
    (session,) = json.loads((run / "fingerprint.json").read_text())["sessions"]
    head = Path(__file__).parent.parent / ".git"
    if not head.exists():
        pytest.skip("not a git checkout")
    assert len(session["git"].split(",")[0]) == 40


def test_a_run_goes_on_with_its_own_data_set_and_config_alone(run, source, capsys):
    path = source / "imagesTr" / "b.nii.gz"
    write_volume(path, read_volume(path))  # The same voxels, but it might have been others.
    arguments = ["train", "--out", str(run), "--resume", "--num-epochs", "2"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "but cases changed: b: bring it back" in error
    assert error.count("\n") == 1
    assert main([*arguments, "--optimizer.weight-decay", "0.5"]) == 2
    assert "optimizer.weight_decay is 1e-05, got 0.5" in capsys.readouterr().err
    assert main([*arguments, "--optimizer.weight-decay", "0.5", "--allow-changes"]) == 0
    content = json.loads((run / "fingerprint.json").read_text())
    assert [session["step"] for session in content["sessions"]] == [0, 1]
    assert json.loads((run / "config.json").read_text())["optimizer"]["weight_decay"] == 0.5


@pytest.mark.parametrize("command", [["report", "{tmp}"], ["report", "{tmp}/nowhere"]])
def test_what_is_no_run_is_one_line(command, tmp_path, capsys):
    assert main([argument.format(tmp=tmp_path) for argument in command]) == 2
    error = capsys.readouterr().err
    assert "is not the folder of a run" in error
    assert error.count("\n") == 1


def test_the_report_of_a_run_of_the_phantom_that_has_no_epoch_yet(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", "--out", str(out), "--data.data-dir", str(tmp_path), *TINY, *PHANTOM]
    assert main([*arguments, "--num-epochs", "1"]) == 0
    (out / "metrics.jsonl").unlink()
    capsys.readouterr()
    assert main(["report", str(out)]) == 0
    assert "0 of 1 epochs, not finished" in capsys.readouterr().out
