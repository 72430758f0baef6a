"""``afl-jax check`` names everything that is wrong with a data set, not the first thing alone."""

import csv
import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from official_layouts import make_brats2018, make_picai2022
from tiny_run import make_folder, some_labels

from afl_jax.cli import main
from afl_jax.data.volume import Volume, read_volume, write_volume


def check(capsys, *arguments: object) -> tuple[int, str]:
    code = main(["check", *map(str, arguments)])
    output = capsys.readouterr()
    # A narrow terminal breaks the lines of the table.
    return code, " ".join((output.out + output.err).replace("│", " ").split())


def read_table(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["case_id"]: row for row in csv.DictReader(file)}


@pytest.fixture
def source(tmp_path) -> Path:
    return make_folder(tmp_path / "raw", {name: some_labels() for name in "abcd"})


def image_of(source: Path, name: str) -> Path:
    return source / "imagesTr" / f"{name}.nii.gz"


def label_of(source: Path, name: str) -> Path:
    return source / "labelsTr" / f"{name}.nii.gz"


def change(path: Path, edit) -> None:
    """Edits the array of a volume where it lies."""
    volume = read_volume(path)
    array = volume.array.copy()
    edit(array)
    write_volume(path, dataclasses.replace(volume, array=array))


def put_nan(path: Path) -> None:
    """Into the last voxel; no writer of ours would do that."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(gzip.compress(bytes(content)))


def test_a_sound_folder_has_nothing_to_report(source, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    code, output = check(capsys, source)
    assert code == 0
    assert output == ("4 cases, 4 of which can be read cases that have each class: 0 in 4, 1 in 4")
    assert sorted(tmp_path.rglob("*")) == before


def test_everything_wrong_is_named_at_once(source, tmp_path, capsys):
    names = [*"abcdefgh"]
    shutil.rmtree(source)
    make_folder(source, {name: some_labels() for name in names}, num_labels=3)
    put_nan(image_of(source, "a"))
    label_of(source, "b").unlink()
    write_volume(label_of(source, "c"), Volume(some_labels((16, 16, 9))))
    change(label_of(source, "d"), lambda array: array.fill(7))
    change(image_of(source, "e"), lambda array: array.fill(3))
    shutil.copy(image_of(source, "f"), image_of(source, "g"))

    def one_voxel(array):
        array[0, 0, 0] = 1

    change(label_of(source, "h"), one_voxel)
    out = tmp_path / "check.csv"
    code, output = check(capsys, source, "--out", out)
    assert code == 2
    assert "7 cases with errors, 1 to look at" in output
    rows = read_table(out)
    assert list(rows) == names
    for name, text in {
        "a": "has voxels that are not finite",
        "b": "its label",
        "c": "shape (16, 16, 9) against (16, 16, 8)",
        "d": "7",
        "e": "channel 0 is constant, 3 everywhere",
        "f": "channel 0 has the voxels of g, channel 0",
        "g": "channel 0 has the voxels of f, channel 0",
    }.items():
        assert text in rows[name]["errors"]
    assert rows["h"]["errors"] == ""
    assert rows["h"]["notes"] == "1 lesions of a single voxel"
    # The block of `some_labels`, and the voxel.
    assert rows["h"]["lesions"] == "2"
    assert rows["h"]["classes"] == "0 1"
    assert rows["h"]["shape"] == "16x16x8"
    for text in ("error: channel 0 is constant", "8 cases, 4 of which can be read"):
        assert text in output
    assert "note: no case has class 2" in output


def test_a_channel_that_is_there_twice_in_one_case_is_named(source, tmp_path, capsys):
    content = json.loads((source / "dataset.json").read_text())
    for entry in content["training"]:
        entry["image"] = [entry["image"], entry["image"]]
    content["modality"] = {"0": "T2W", "1": "ADC"}
    (source / "dataset.json").write_text(json.dumps(content))
    out = tmp_path / "check.csv"
    assert check(capsys, source, "--out", out)[0] == 2
    assert read_table(out)["a"]["errors"] == (
        "channel 0 has the voxels of channel 1; channel 1 has the voxels of channel 0"
    )


def test_square_brackets_in_names_are_no_markup(tmp_path, capsys):
    """The path of the damaged image holds what would close a tag: [/imagesTr/x]."""
    source = make_folder(tmp_path / "raw[", {"x]": some_labels(), "b": some_labels()})
    put_nan(image_of(source, "x]"))
    code, output = check(capsys, source)
    assert code == 2
    assert "[/imagesTr/x]" in output.replace(" ", "")


@pytest.mark.parametrize("arguments", ["folder", "options"])
def test_picai_is_found_by_its_layout_or_by_name(arguments, tmp_path, capsys):
    source = make_picai2022(tmp_path / "picai", num_cases=5)
    scans = sorted((source / "images").rglob("*_adc.mha"))
    scans[0].unlink()
    scans[1].write_bytes(scans[1].read_bytes()[:1000])
    given = [source] if arguments == "folder" else ["picai2022", "--source", source, "--cases=all"]
    given += [] if arguments == "folder" else ["--labels", "human_expert+Pooch25"]
    code, output = check(capsys, *given)
    assert code == 2
    assert "2 cases with errors" in output
    assert "5 cases, 3 of which can be read" in output
    # The fourth is of Pooch25, with a shape of its own.
    assert "note: label of shape" in output


def test_brats_is_found_by_its_layout(tmp_path, capsys):
    source = make_brats2018(tmp_path / "brats", num_hgg=2, num_lgg=1, shape=(40, 40, 31))
    label = next((source / "HGG").rglob("*_seg.nii.gz"))
    change(label, lambda array: array.__setitem__(array == 4, 3))
    code, output = check(capsys, source)
    assert code == 2
    assert "1 cases with errors" in output
    assert "as the Medical Segmentation Decathlon numbers" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}"], "expected a data set, with dataset.json, or images"),
        (["{tmp}/nowhere"], "no run is called"),
        (["--name", "folder", "--source", "{tmp}/nowhere"], "nowhere: no such folder"),
    ],
)
def test_what_is_no_data_set_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["check", *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
