"""BraTS 2018 from files in its official layout: classes, splits, and what is said of bad input."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from messages import one_line
from official_layouts import make_brats2018

from afl_jax.data.brats2018 import Brats2018, Brats2018Settings
from afl_jax.data.volume import Volume, read_volume, write_volume
from afl_jax.errors import InputError

SHAPE = (24, 24, 20)


@pytest.fixture(scope="module")
def download(tmp_path_factory) -> Path:
    """Six high-grade and four low-grade cases."""
    return make_brats2018(tmp_path_factory.mktemp("brats"), shape=(24, 24, 17))


@pytest.fixture
def source(download, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(download, tmp_path / "source"))


def create(source: Path, data_dir: Path, **settings) -> Brats2018:
    settings = {"shape": SHAPE} | settings
    return Brats2018.create(Brats2018Settings(source=str(source), **settings), data_dir=data_dir)


def case_files(source: Path, kind: str) -> list[Path]:
    return sorted(source.rglob(f"*_{kind}.nii*"))


def test_packed_and_unpacked_files_are_read(download, tmp_path):
    suffixes = {"".join(path.suffixes) for path in case_files(download, "seg")}
    assert suffixes == {".nii", ".nii.gz"}
    builder = create(download, tmp_path)
    builder.prepare(num_workers=2)
    assert len(builder.cases) == 10
    for split in ("train", "val", "test"):
        for record in builder.as_data_source(split):
            assert record["image"].shape == (*SHAPE, 4)
            assert record["labels"].any()
            # 17 slices, padded to 20.
            assert record["content_stop"][2] - record["content_start"][2] == 17
    assert all(row["notes"] == "" for row in builder.read_table())


@pytest.mark.parametrize(
    ("target", "classes"),
    [
        ("WT", {0: 0, 1: 1, 2: 1, 4: 1}),
        ("TC", {0: 0, 1: 1, 2: 0, 4: 1}),
        ("ET", {0: 0, 1: 0, 2: 0, 4: 1}),
        ("regions", {0: 0, 1: 2, 2: 1, 4: 3}),
    ],
)
def test_targets_are_made_of_the_four_labels(download, tmp_path, target, classes):
    builder = create(download, tmp_path, target=target)
    assert builder.num_classes == max(classes.values()) + 1
    case = builder.cases[0]
    label = read_volume(case.files[-1]).array
    assert sorted(np.unique(label)) == [0, 1, 2, 4]
    expected = np.vectorize(classes.get)(label)
    np.testing.assert_array_equal(builder.read_case(case).labels.array, expected)


def test_the_regions_that_are_scored_are_unions_of_classes(download, tmp_path):
    builder = create(download, tmp_path, target="regions")
    case = builder.cases[0]
    labels = builder.read_case(case).labels.array
    for target, classes in builder.regions.items():
        alone = create(download, tmp_path, target=target).read_case(case).labels.array
        np.testing.assert_array_equal(np.isin(labels, classes), alone > 0)
    assert set(builder.regions) == {"WT", "TC", "ET"}
    assert create(download, tmp_path, target="WT").regions == {}


def test_the_split_is_seeded_and_has_both_grades_everywhere(download, tmp_path):
    def split(seed: int) -> dict[str, list[str]]:
        cases = create(download, tmp_path, seed=seed).split_cases()
        return {name: [case.case_id for case in found] for name, found in cases.items()}

    splits = create(download, tmp_path).split_cases()
    assert {name: len(cases) for name, cases in splits.items()} == {"train": 6, "val": 2, "test": 2}
    for cases in splits.values():
        assert {case.depends_on for case in cases} == {"HGG", "LGG"}
    ids = [case.case_id for cases in splits.values() for case in cases]
    assert len(set(ids)) == len(ids) == 10
    assert split(0) == split(0)
    assert any(split(seed) != split(0) for seed in (1, 2, 3))


def test_the_official_numbers_give_a_tenth_and_a_fifth_of_each_grade(tmp_path):
    for grade, count in (("HGG", 210), ("LGG", 75)):
        for index in range(count):
            (tmp_path / grade / f"Brats18_{grade}_{index}_1").mkdir(parents=True)
    splits = create(tmp_path, tmp_path / "data").split_cases()
    counts = {
        name: [sum(case.depends_on == grade for case in cases) for grade in ("HGG", "LGG")]
        for name, cases in splits.items()
    }
    assert counts == {"train": [147, 52], "val": [21, 8], "test": [42, 15]}


def test_visits_of_a_patient_stay_together(source, tmp_path):
    first = source / "HGG" / "Brats18_TST_000_1"
    for visit in (2, 3):
        again = source / "HGG" / f"Brats18_TST_000_{visit}"
        again.mkdir()
        for path in first.iterdir():
            shutil.copy(path, again / path.name.replace("000_1", f"000_{visit}"))
    for seed in range(8):
        splits = create(source, tmp_path, seed=seed).split_cases()
        found = {n for n, cases in splits.items() for case in cases if "TST_000" in case.case_id}
        assert len(found) == 1


def test_labels_of_the_decathlon_are_refused_unless_asked_for(source, tmp_path):
    path = case_files(source, "seg")[0]
    label = read_volume(path)
    # The same parts in the other numbers: 1 oedema, 2 core, 3 enhancing.
    renumbered = np.vectorize({0: 0, 1: 2, 2: 1, 4: 3}.get)(label.array).astype(np.uint8)
    write_volume(path, dataclasses.replace(label, array=renumbered))
    builder = create(source, tmp_path, target="regions")
    with pytest.raises(InputError, match=one_line("found 3, as the Medical Segmentation")):
        builder.read_case(builder.cases[0])
    asked = create(source, tmp_path, target="regions", numbering="msd").read_case(builder.cases[0])
    expected = np.vectorize({0: 0, 1: 2, 2: 1, 4: 3}.get)(label.array)
    np.testing.assert_array_equal(asked.labels.array, expected)


def test_headers_may_differ_by_a_fraction_of_a_millimetre(source, tmp_path):
    path = case_files(source, "t2")[0]
    image = read_volume(path)
    write_volume(path, dataclasses.replace(image, origin=(0.4, image.origin[1] + 0.3, 0.2)))
    builder = create(source, tmp_path)
    read = builder.read_case(builder.cases[0])
    np.testing.assert_array_equal(read.image.array[..., 2], image.array)


def test_the_builder_says_where_the_data_are_and_under_which_terms():
    instructions = Brats2018.MANUAL_DOWNLOAD_INSTRUCTIONS
    for text in ("registration", "must not be passed on", "{HGG,LGG}"):
        assert text in instructions


# --- what a build says of bad input ---------------------------------------------------------------


def no_folders(source: Path) -> str:
    shutil.rmtree(source / "HGG")
    shutil.rmtree(source / "LGG")
    return "expected folders HGG and LGG with a folder for each case, found none"


def decathlon_layout(source: Path) -> str:
    (source / "dataset.json").write_text("{}")
    return "found the layout of the Medical Segmentation Decathlon, whose Task01 numbers its labels"


def twice(source: Path) -> str:
    shutil.copytree(source / "HGG" / "Brats18_TST_000_1", source / "LGG" / "Brats18_TST_000_1")
    return "case Brats18_TST_000_1 is there twice"


@pytest.mark.parametrize("damage", [no_folders, decathlon_layout, twice])
def test_a_wrong_source_is_one_line(source, tmp_path, damage):
    text = damage(source)
    with pytest.raises(InputError, match=one_line(text)):
        create(source, tmp_path / "data")


def remove_flair(source: Path) -> str:
    path = case_files(source, "flair")[1]
    path.unlink()
    return f"case {path.parent.name}: its FLAIR, {path.parent}"


def remove_label(source: Path) -> str:
    path = case_files(source, "seg")[1]
    path.unlink()
    return f"case {path.parent.name}: its SEG"


def crop_t1ce(source: Path) -> str:
    path = case_files(source, "t1ce")[1]
    image = read_volume(path)
    write_volume(path, dataclasses.replace(image, array=image.array[:-1]))
    return f"{path}: expected the grid of {path.name.replace('t1ce', 't1')}, found shape"


def move_label(source: Path) -> str:
    path = case_files(source, "seg")[1]
    write_volume(path, dataclasses.replace(read_volume(path), origin=(30.0, 0, 0)))
    return f"{path}: expected the grid of its images, found origin"


def add_value(source: Path) -> str:
    path = case_files(source, "seg")[1]
    write_volume(path, Volume(np.full((24, 24, 17), 5, np.uint8), origin=(0, -23.0, 0)))
    return f"{path}: label value 5 is not among [0, 1, 2, 4]"


def truncate(source: Path) -> str:
    path = case_files(source, "t1")[1]
    path.write_bytes(path.read_bytes()[:200])
    return f"{path}: cannot be read as an image"


@pytest.mark.parametrize(
    "damage", [remove_flair, remove_label, crop_t1ce, move_label, add_value, truncate]
)
def test_a_bad_case_is_named_and_the_others_are_kept(source, tmp_path, damage):
    text = damage(source)
    builder = create(source, tmp_path / "data")
    with pytest.raises(InputError, match=one_line(text)):
        builder.prepare()
    assert not builder.is_prepared()
    assert len(list((tmp_path / "data").rglob("*.record"))) == 9


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"target": "wt"}, "target must be one of"),
        ({"numbering": "2018"}, "numbering must be one of"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "test_fraction must be from 0 to less"),
        ({"shape": (1, 2)}, "shape must be three whole numbers"),
        ({"normalisation": "x"}, "normalisation must be one of"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_refused(settings, text):
    with pytest.raises(InputError, match=one_line(text)):
        Brats2018Settings(source="anywhere", **settings)
