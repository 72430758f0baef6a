"""The folder data set: what it makes of good input, and what it says of bad input."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from messages import one_line

from afl_jax.data import records
from afl_jax.data.folder import Folder, FolderSettings
from afl_jax.data.volume import Volume, write_volume
from afl_jax.errors import InputError

SPACING = (0.5, 0.5, 3.0)


def edit_json(source: Path, **changes) -> None:
    path = source / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def source(tmp_path) -> Path:
    """Five cases of 6 x 7 x 4 voxels; case_3 has labels 1 and 2, the others label 1."""
    source = tmp_path / "source"
    for name in ("imagesTr", "labelsTr"):
        (source / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    entries = []
    for index in range(5):
        image = rng.normal(100, 10, (6, 7, 4)).astype(np.float32)
        labels = np.zeros((6, 7, 4), np.uint8)
        labels[2:4, 2:5, 1 : 2 + index % 2] = 1
        if index == 3:
            labels[0, 0, 0] = 2
        name = f"case_{index}.nii.gz"
        write_volume(source / "imagesTr" / name, Volume(image, SPACING))
        write_volume(source / "labelsTr" / name, Volume(labels, SPACING))
        entries.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    content = {
        "name": "Tiny",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "lesion", "2": "core"},
        "training": entries[::-1],
    }
    (source / "dataset.json").write_text(json.dumps(content))
    return source


def prepare(source: Path, data_dir: Path, **settings) -> Folder:
    settings = {"shape": (8, 6, 4), "num_val": 2} | settings
    builder = Folder.create(FolderSettings(source=str(source), **settings), data_dir=data_dir)
    builder.prepare()
    return builder


def read_all(builder: Folder) -> dict[str, dict]:
    """Records of all splits by case."""
    records = [record for split in ("train", "val") for record in builder.as_data_source(split)]
    return {record["case_id"].decode(): record for record in records}


def test_records_hold_the_prepared_case(source, tmp_path):
    records = read_all(prepare(source, tmp_path / "data"))
    assert sorted(records) == [f"case_{index}" for index in range(5)]
    record = records["case_1"]
    assert record["image"].shape == (8, 6, 4, 1)
    assert record["image"].dtype == np.float32
    assert record["labels"].shape == (8, 6, 4)
    assert record["labels"].dtype == np.uint8
    # X is padded from 6 to 8, Y cropped from 7 to 6.
    np.testing.assert_array_equal(record["content_start"], [1, 0, 0])
    np.testing.assert_array_equal(record["content_stop"], [7, 6, 4])
    np.testing.assert_array_equal(np.argwhere(record["labels"])[[0, -1]], [[3, 2, 1], [4, 4, 2]])
    np.testing.assert_array_equal(record["image"][[0, -1]], 0)
    np.testing.assert_allclose(record["spacing"], SPACING)
    assert record["lesion_volume_mm3"] == 2 * 3 * 2 * 0.5 * 0.5 * 3.0
    assert np.isnan(record["roughness"])


def test_images_are_normalised_before_they_are_cropped(source, tmp_path):
    records = read_all(prepare(source, tmp_path / "data", shape=(6, 7, 4)))
    for record in records.values():
        assert record["image"].mean() == pytest.approx(0, abs=1e-5)
        assert record["image"].std() == pytest.approx(1, abs=1e-5)


def test_resampled_grids_have_the_spacing_asked_for(source, tmp_path):
    builder = prepare(source, tmp_path / "data", spacing=(1.0, 1.0, 3.0), shape=(4, 4, 4))
    record = read_all(builder)["case_0"]
    np.testing.assert_allclose(record["spacing"], (1, 1, 3))
    # 6 x 0.5 mm and 7 x 0.5 mm at 1 mm: 3 and 4 voxels.
    np.testing.assert_array_equal(record["content_stop"] - record["content_start"], [3, 4, 4])


def test_the_split_is_seeded_and_in_the_order_of_names(source, tmp_path):
    def split(**settings) -> tuple[list[str], list[str]]:
        cases = prepare(source, tmp_path / "data", **settings).split_cases()
        return tuple([case.case_id for case in cases[name]] for name in ("train", "val"))

    train, val = split()
    assert (len(train), len(val)) == (3, 2)
    assert sorted(train + val) == [f"case_{index}" for index in range(5)]
    assert train == sorted(train)
    assert split() == (train, val)
    assert any(split(seed=seed) != (train, val) for seed in (1, 2, 3))
    assert len(split(num_val=None, val_fraction=0.2)[1]) == 1


def test_records_come_in_the_order_of_their_split(source, tmp_path):
    builder = prepare(source, tmp_path / "data")
    for split, cases in builder.split_cases().items():
        assert builder.num_cases(split) == len(cases)
        found = [record["case_id"].decode() for record in builder.as_data_source(split)]
        assert found == [case.case_id for case in cases]


def test_a_label_map_merges_labels(source, tmp_path):
    kept = read_all(prepare(source, tmp_path / "data"))["case_3"]["labels"]
    label_map = ((0, 0), (1, 1), (2, 1))
    merged = read_all(prepare(source, tmp_path / "data", label_map=label_map))["case_3"]["labels"]
    assert set(np.unique(kept)) == {0, 1, 2}
    np.testing.assert_array_equal(merged, kept > 0)


@pytest.mark.parametrize("layout", ["files", "fourth dimension"])
def test_channels_come_from_files_and_from_the_fourth_dimension(source, tmp_path, layout):
    arrays = np.random.default_rng(1).normal(size=(6, 7, 4, 2)).astype(np.float32)
    if layout == "files":
        names = ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"]
        for name, channel in zip(names, np.moveaxis(arrays, -1, 0), strict=True):
            write_volume(source / name, Volume(channel, SPACING))
    else:
        names = "imagesTr/a.nii.gz"
        write_volume(source / names, Volume(arrays, SPACING))
    entries = [{"image": names, "label": f"labelsTr/case_{index}.nii.gz"} for index in range(2)]
    edit_json(source, modality={"0": "T2W", "1": "ADC"}, training=entries)
    settings = {"shape": (6, 7, 4), "normalisation": "none", "num_val": 1}
    records = read_all(prepare(source, tmp_path / "data", **settings))
    np.testing.assert_array_equal(records["case_0"]["image"], arrays)


def test_other_settings_and_other_files_make_another_data_set(source, tmp_path):
    def name(**settings) -> str:
        settings = {"source": str(source), "shape": (8, 6, 4)} | settings
        return Folder.create(FolderSettings(**settings), data_dir=tmp_path).builder_config.name

    names = [name(), name(shape=(8, 8, 4)), name(label_map=((0, 0), (1, 1)))]
    assert name() == name(seed=1) == name(num_val=1) == names[0], "the split changes no record"
    names.append(name(exclude=("case_1",)))
    write_volume(source / "labelsTr" / "case_0.nii.gz", Volume(np.ones((6, 7, 4)), SPACING))
    names.append(name())
    assert len(set(names)) == 5
    assert all(found.startswith("source-8x") for found in names)


def test_a_prepared_data_set_is_found_and_not_built_again(source, tmp_path):
    builder = prepare(source, tmp_path / "data")
    files = {path: path.stat().st_mtime_ns for path in Path(builder.data_dir).iterdir()}
    prepare(source, tmp_path / "data")
    assert {path: path.stat().st_mtime_ns for path in Path(builder.data_dir).iterdir()} == files


def test_workers_change_nothing_and_progress_counts_cases(source, tmp_path, capfd):
    one = read_all(prepare(source, tmp_path / "one"))
    settings = FolderSettings(source=str(source), shape=(8, 6, 4), num_val=2)
    builder = Folder.create(settings, data_dir=tmp_path / "three")
    calls = []
    builder.prepare(num_workers=3, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 5) for done in range(6)]
    three = read_all(builder)
    for case_id, record in one.items():
        np.testing.assert_array_equal(record["image"], three[case_id]["image"])
    assert "".join(capfd.readouterr()) == "", "tfds keeps quiet"


def test_droppings_of_another_operating_system_are_skipped(source, tmp_path):
    entries = json.loads((source / "dataset.json").read_text())["training"]
    dropping = {"image": "./imagesTr/._case_0.nii.gz", "label": "./labelsTr/._case_0.nii.gz"}
    edit_json(source, training=[*entries, dropping])
    assert len(read_all(prepare(source, tmp_path / "data"))) == 5


def remove_folder(source: Path) -> str:
    shutil.rmtree(source)
    return f"{source}: no such folder"


def remove_json(source: Path) -> str:
    (source / "dataset.json").unlink()
    return "dataset.json: no such file"


def break_json(source: Path) -> str:
    (source / "dataset.json").write_text('{"training": [')
    return "dataset.json: not valid JSON"


def remove_entries(source: Path) -> str:
    edit_json(source, training=[])
    return 'dataset.json: expected "training"'


def remove_label_key(source: Path) -> str:
    edit_json(source, training=[{"image": "imagesTr/case_0.nii.gz"}])
    return '"training" entry 0'


def name_labels(source: Path) -> str:
    edit_json(source, labels={"background": 0, "lesion": 1})
    return 'the keys of "labels"'


def remove_modality(source: Path) -> str:
    edit_json(source, modality=None)
    return 'dataset.json: expected "modality"'


def remove_label(source: Path) -> str:
    (source / "labelsTr" / "case_1.nii.gz").unlink()
    return "case case_1: its label"


def remove_image(source: Path) -> str:
    (source / "imagesTr" / "case_1.nii.gz").unlink()
    return "case case_1: its image"


def leave_the_folder(source: Path) -> str:
    edit_json(source, training=[{"image": "../../secret.nii", "label": "labelsTr/case_0.nii.gz"}])
    return "'../../secret.nii' leads out of the folder"


def leave_by_a_link(source: Path) -> str:
    path = source / "imagesTr" / "case_1.nii.gz"
    path.rename(source.parent / "elsewhere.nii.gz")
    path.symlink_to(source.parent / "elsewhere.nii.gz")
    return "case_1.nii.gz' leads out of the folder"


def list_twice(source: Path) -> str:
    entry = {"image": "imagesTr/case_0.nii.gz", "label": "labelsTr/case_0.nii.gz"}
    edit_json(source, training=[entry, entry])
    return "case case_0: listed twice"


def list_one(source: Path) -> str:
    entry = {"image": "imagesTr/case_0.nii.gz", "label": "labelsTr/case_0.nii.gz"}
    edit_json(source, training=[entry])
    return "expected cases both to train and to validate on, found 1"


def change_label_shape(source: Path) -> str:
    write_volume(source / "labelsTr" / "case_2.nii.gz", Volume(np.zeros((6, 7, 5)), SPACING))
    return "case_2.nii.gz: expected the grid of its image case_2.nii.gz, found shape (6, 7, 5)"


def move_label(source: Path) -> str:
    moved = Volume(np.zeros((6, 7, 4)), SPACING, (20.0, 0.0, 0.0))
    write_volume(source / "labelsTr" / "case_2.nii.gz", moved)
    return "found origin (20.0, 0.0, 0.0) against (0.0, 0.0, 0.0) (20 mm apart)"


def truncate_image(source: Path) -> str:
    path = source / "imagesTr" / "case_4.nii.gz"
    path.write_bytes(path.read_bytes()[:-100])
    return f"{path}: cannot be read as an image; it may be truncated"


def add_label_value(source: Path) -> str:
    write_volume(source / "labelsTr" / "case_2.nii.gz", Volume(np.full((6, 7, 4), 9), SPACING))
    return "case_2.nii.gz: label value 9 is not among [0, 1, 2]"


def add_channel(source: Path) -> str:
    write_volume(source / "imagesTr" / "case_2.nii.gz", Volume(np.zeros((6, 7, 4, 2)), SPACING))
    return "case_2.nii.gz: expected 1 channels"


def add_nan(source: Path) -> str:
    array = np.full((6, 7, 4), np.nan, np.float32)
    write_volume(source / "imagesTr" / "case_2.nii.gz", Volume(array, SPACING))
    return "case_2.nii.gz: has voxels that are not finite"


@pytest.mark.parametrize(
    "damage",
    [
        remove_folder,
        remove_json,
        break_json,
        remove_entries,
        remove_label_key,
        name_labels,
        remove_modality,
        remove_label,
        remove_image,
        leave_the_folder,
        leave_by_a_link,
        list_twice,
        list_one,
        change_label_shape,
        move_label,
        truncate_image,
        add_label_value,
        add_channel,
        add_nan,
    ],
    ids=lambda damage: damage.__name__,
)
def test_bad_input_is_named_in_one_line_and_leaves_good_cases_only(source, tmp_path, damage):
    text = damage(source)
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    with pytest.raises(InputError, match=one_line(text)):
        prepare(source, data_dir)
    left = [path for path in data_dir.rglob("*") if path.is_file()]
    assert all(path.suffix == ".record" and path.parent.name == ".cases" for path in left)
    assert len(left) in (0, 4)


def test_every_bad_case_is_named_and_a_mended_build_goes_on(source, tmp_path, monkeypatch):
    labels = [source / "labelsTr" / f"case_{index}.nii.gz" for index in (1, 2)]
    kept = [path.read_bytes() for path in labels]
    for path in labels:
        path.write_bytes(b"damaged")
    settings = FolderSettings(source=str(source), shape=(8, 6, 4), num_val=2)
    warnings = []
    with pytest.raises(InputError, match=one_line("2 of 5 cases cannot be prepared")) as error:
        Folder.create(settings, data_dir=tmp_path / "data").prepare(warn=warnings.append)
    assert len(warnings) == 1
    assert sum(path.name in text for path in labels for text in (*warnings, str(error.value))) >= 2
    assert "data.exclude: case_1 case_2" in str(error.value)

    read = []
    read_case = Folder.read_case
    monkeypatch.setattr(
        Folder, "read_case", lambda self, case: read.append(case.case_id) or read_case(self, case)
    )
    labels[0].write_bytes(kept[0])
    excluding = dataclasses.replace(settings, exclude=("case_2",))
    builder = Folder.create(excluding, data_dir=tmp_path / "data")
    builder.prepare()
    assert read == ["case_1"]
    assert sorted(read_all(builder)) == ["case_0", "case_1", "case_3", "case_4"]
    assert not list((tmp_path / "data").rglob("*.record")), "what was staged is removed"


def test_a_case_that_is_not_there_cannot_be_excluded(source, tmp_path):
    with pytest.raises(InputError, match=one_line("exclude names 'case_9'")):
        prepare(source, tmp_path / "data", exclude=("case_9",))


def test_the_table_says_what_became_of_every_case(source, tmp_path):
    # A crop that leaves lesions out: of case_3, its second lesion and half of the first.
    builder = prepare(source, tmp_path / "data", shape=(2, 6, 4))
    rows = {row["case_id"]: row for row in builder.read_table()}
    assert sorted(rows) == [f"case_{index}" for index in range(5)]
    row = rows["case_3"]
    assert (row["lesions"], row["lesions_prepared"]) == ("2", "1")
    assert float(row["volume_mm3"]) == pytest.approx((12 + 1) * 0.75)
    assert "2 lesions became 1" in row["notes"]
    assert "mm3 of lesions became" in row["notes"]
    assert rows["case_0"]["notes"] == ""


@pytest.mark.parametrize("moment", ["a case is written", "the cases are joined"])
def test_a_disk_that_fills_up_is_named_and_the_build_goes_on_later(source, tmp_path, moment):
    data_dir = tmp_path / "data"
    prepare(source, data_dir)
    earlier = sorted(data_dir.rglob("*"))
    settings = FolderSettings(source=str(source), shape=(8, 8, 4), num_val=2)
    builder = Folder.create(settings, data_dir=data_dir)
    if moment == "the cases are joined":
        builder._staging.mkdir(exist_ok=True)
        builder._stage_cases(num_workers=1, progress=None, warn=None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A record is 1.5 kB; compressed, all of them are more, too.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match=one_line("the data set cannot be written")):
            builder.prepare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not builder.is_prepared()
    left = sorted(path for path in data_dir.rglob("*") if path.suffix != ".record")
    assert [path for path in left if path.name != ".cases"] == earlier
    builder.prepare()
    assert len(read_all(builder)) == 5


def test_records_are_in_order_across_shards(source, tmp_path, monkeypatch):
    expected = read_all(prepare(source, tmp_path / "one"))
    monkeypatch.setattr(records, "_SHARD_BYTES", 4000)
    builder = prepare(source, tmp_path / "several")
    shards = sorted(Path(builder.data_dir).glob("*.array_record*"))
    assert len(shards) > 1
    found = read_all(builder)
    for case in (case for cases in builder.split_cases().values() for case in cases):
        np.testing.assert_array_equal(found[case.case_id]["image"], expected[case.case_id]["image"])


def test_a_killed_build_goes_on_and_no_case_is_prepared_twice(source, tmp_path):
    program = """
import os, signal, sys
from afl_jax.data import records
from afl_jax.data.folder import Folder, FolderSettings

read_case, num_read = Folder.read_case, 0
def counted(self, case):
    global num_read
    num_read += 1
    if num_read == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return read_case(self, case)
Folder.read_case = counted
settings = FolderSettings(source=sys.argv[1], shape=(8, 6, 4), num_val=2)
Folder.create(settings, data_dir=sys.argv[2]).prepare()
print(num_read)
"""

    def run(kill_at: int) -> subprocess.CompletedProcess:
        arguments = [sys.executable, "-c", program, str(source), str(tmp_path / "data")]
        return subprocess.run([*arguments, str(kill_at)], capture_output=True, text=True)

    assert run(4).returncode == -signal.SIGKILL
    resumed = run(0)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.split() == ["2"], "three of five were prepared before"
    found = read_all(prepare(source, tmp_path / "data"))
    for case_id, record in read_all(prepare(source, tmp_path / "other")).items():
        np.testing.assert_array_equal(found[case_id]["image"], record["image"])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"shape": (8, 8)}, "shape must be three positive whole numbers, got (8, 8)"),
        ({"shape": (8, 0, 8)}, "shape must be"),
        ({"spacing": (1, 1, 0)}, "spacing must be"),
        ({"label_map": ((0, 0), (1, 256))}, "label_map must be"),
        ({"normalisation": "minmax"}, "normalisation must be one of"),
        ({"val_fraction": 1.0}, "val_fraction must lie between"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_refused(settings, text):
    with pytest.raises(InputError, match=one_line(text)):
        FolderSettings(**({"source": "anywhere", "shape": (8, 8, 8)} | settings))


def test_settings_from_json_are_the_same_settings():
    given = {"source": "/s", "shape": (8, 8, 8), "spacing": (1, 1, 3), "label_map": ((0, 0),)}
    from_json = FolderSettings(**json.loads(json.dumps(given)))
    assert from_json == FolderSettings(**given)
    assert hash(from_json) == hash(FolderSettings(**given))


@pytest.mark.real_data
def test_real_hippocampus_volumes(real_data, tmp_path):
    source = real_data / "Task04_Hippocampus"
    label_map = ((0, 0), (1, 1), (2, 1))
    settings = {"shape": (48, 64, 48), "num_val": 16, "label_map": label_map}
    builder = prepare(source, tmp_path / "data", **settings)
    assert len(builder.as_data_source("train")) == 48
    assert len(builder.as_data_source("val")) == 16
    for record in builder.as_data_source("val"):
        # The grid holds every volume whole, at 1 mm: what was foreground is foreground.
        assert record["labels"].sum() == record["lesion_volume_mm3"]
        assert 1000 < record["lesion_volume_mm3"] < 6000
