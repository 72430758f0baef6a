"""PI-CAI from files in its official layout: what becomes of good input, and what is said of bad."""

import csv
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import oracles
import pytest
from messages import one_line
from official_layouts import make_picai2022, write_marksheet
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from afl_jax.data.picai2022 import Picai2022, Picai2022Settings, official_folds
from afl_jax.data.preprocess import prepare_image, prepare_labels, resample_to
from afl_jax.data.volume import Volume, read_volume, write_volume
from afl_jax.errors import InputError
from afl_jax.lesions import label_components

LABELS = Path("picai_labels", "csPCa_lesion_delineations", "human_expert")
GRIDS = {
    "paper": {"shape": (160, 128, 24), "resize": True},
    "baseline": {"shape": (256, 256, 20), "spacing": (0.5, 0.5, 3.0)},
}
SMALL = {"shape": (48, 48, 8), "resize": True, "num_val": 1}


@pytest.fixture(scope="module")
def download(tmp_path_factory) -> Path:
    """Ten cases, the fourth in Pooch25 with a shape of its own, the fifth and tenth negative."""
    return make_picai2022(tmp_path_factory.mktemp("picai"), num_cases=10)


@pytest.fixture
def source(download, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(download, tmp_path / "source"))


def create(source: Path, data_dir: Path, **settings) -> Picai2022:
    return Picai2022.create(
        Picai2022Settings(source=str(source), **(SMALL | settings)), data_dir=data_dir
    )


def prepare(source: Path, data_dir: Path, **settings) -> Picai2022:
    builder = create(source, data_dir, **settings)
    builder.prepare(num_workers=2)
    return builder


def case_ids(source: Path) -> list[str]:
    """In the order in which they were made: fold 0, 1, ..., 4, 0, ..."""
    with (source / "picai_labels/clinical_information/marksheet.csv").open() as file:
        return [f"{row['patient_id']}_{row['study_id']}" for row in csv.DictReader(file)]


def scan_path(source: Path, case_id: str, sequence: str) -> Path:
    return source / "images" / case_id.split("_")[0] / f"{case_id}_{sequence}.mha"


# --- folds and splits -----------------------------------------------------------------------------


def test_the_official_folds_hold_every_case_once_and_no_patient_twice():
    folds = official_folds()
    assert len(folds) == 1500
    assert sorted(set(folds.values())) == [0, 1, 2, 3, 4]
    by_patient: dict[str, set[int]] = {}
    for case_id, fold in folds.items():
        by_patient.setdefault(case_id.split("_")[0], set()).add(fold)
    assert len(by_patient) == 1476
    assert all(len(found) == 1 for found in by_patient.values())


def test_the_test_split_is_the_official_fold_and_val_is_held_out_of_the_others(download, tmp_path):
    folds = official_folds()
    for fold in range(5):
        splits = create(download, tmp_path, fold=fold, num_val=3).split_cases()
        ids = {name: [case.case_id for case in cases] for name, cases in splits.items()}
        assert {folds[case_id] for case_id in ids["test"]} == {fold}
        assert len(ids["test"]) == 2
        assert len(ids["val"]) == 3
        assert sorted(ids["train"] + ids["val"] + ids["test"]) == sorted(case_ids(download))
        assert fold not in {folds[case_id] for case_id in ids["train"] + ids["val"]}


def test_the_studies_of_a_patient_stay_together(tmp_path):
    folds = official_folds()
    patients: dict[str, list[str]] = {}
    for case_id in folds:
        patients.setdefault(case_id.split("_")[0], []).append(case_id)
    twice = next(ids for ids in patients.values() if len(ids) == 2 and folds[ids[0]] != 0)
    others = [ids[0] for ids in patients.values() if len(ids) == 1 and folds[ids[0]] != 0][:4]
    source = make_picai2022(tmp_path / "raw", case_ids=[*twice, *others])
    labels = "human_expert+Pooch25"
    sides = set()
    for seed in range(12):
        splits = create(source, tmp_path, seed=seed, num_val=2, labels=labels).split_cases()
        where = [name for name, cases in splits.items() for case in cases if case.case_id in twice]
        assert len(set(where)) == 1
        sides.add(where[0])
    assert sides == {"train", "val"}


def test_five_folds_share_their_records(download, tmp_path):
    builder = prepare(download, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in Path(builder.data_dir).iterdir()}
    other = prepare(download, tmp_path, fold=3, seed=5)
    assert other.data_dir == builder.data_dir
    assert {path: path.stat().st_mtime_ns for path in Path(other.data_dir).iterdir()} == files
    found = [record["case_id"].decode() for record in other.as_data_source("test")]
    assert found == [case.case_id for case in other.split_cases()["test"]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # The fourth case is Pooch25's; the fifth and the tenth have no lesion.
        ({"labels": "human_expert"}, [0, 1, 2, 4, 5, 6, 7, 8, 9]),
        ({"labels": "human_expert", "cases": "positive"}, [0, 1, 2, 5, 6, 7, 8]),
        ({"labels": "human_expert+Pooch25"}, list(range(10))),
        ({"labels": "human_expert+Pooch25", "cases": "positive"}, [0, 1, 2, 3, 5, 6, 7, 8]),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_labels_and_cases_are_chosen(download, tmp_path, settings, expected):
    found = [case.case_id for case in create(download, tmp_path, **settings).cases]
    assert found == sorted(case_ids(download)[index] for index in expected)


def test_the_builder_says_where_the_data_are_and_under_which_licence():
    instructions = Picai2022.MANUAL_DOWNLOAD_INSTRUCTIONS
    for text in ("zenodo.org/records/6624726", "picai_labels", "CC BY-NC 4.0", "_t2w.mha"):
        assert text in instructions


# --- geometry -------------------------------------------------------------------------------------


def test_adc_and_hbv_lie_on_the_grid_of_t2w_where_they_lie_in_the_patient(tmp_path):
    case_id = next(iter(official_folds()))
    source = make_picai2022(tmp_path / "raw", case_ids=[case_id])
    t2w = read_volume(scan_path(source, case_id, "t2w"))
    # A scan that is a linear function of the place in the patient, on a grid of its own.
    grid = read_volume(scan_path(source, case_id, "adc"))
    assert grid.shape != t2w.shape
    assert grid.origin != t2w.origin
    slope = np.array([0.5, -0.3, 0.8])

    def field(volume: Volume) -> np.ndarray:
        indices = np.moveaxis(np.indices(volume.shape), 0, -1)
        return (indices @ volume.matrix.T + np.array(volume.origin)) @ slope + 500

    scan = dataclasses.replace(grid, array=field(grid).astype(np.float32))
    write_volume(scan_path(source, case_id, "adc"), scan)
    builder = create(source, tmp_path, normalisation="none")
    read = builder.read_case(builder.cases[0])
    assert read.image.array.shape == (*t2w.shape, 3)
    np.testing.assert_array_equal(read.image.array[..., 0], t2w.array)
    # Away from the rim, where the coarser scan reaches.
    inside = (slice(8, -8), slice(8, -8), slice(3, -3))
    np.testing.assert_allclose(
        read.image.array[..., 1][inside], field(t2w)[inside], rtol=0, atol=0.01
    )


def test_a_label_with_a_shape_of_its_own_is_resampled_and_noted(download, tmp_path):
    case_id = case_ids(download)[3]
    builder = prepare(download, tmp_path)
    case = next(case for case in builder.cases if case.case_id == case_id)
    read, label = builder.read_case(case), read_volume(case.files[-1])
    assert label.shape != read.labels.shape == read.image.shape
    # Two slices more at either end: the voxels are the same.
    np.testing.assert_array_equal(read.labels.array, label.array[:, :, 2:-2])
    rows = {row["case_id"]: row for row in builder.read_table()}
    assert "label of shape (160, 160, 24) resampled" in rows[case_id]["notes"]


def test_headers_may_differ_by_a_fraction_of_a_millimetre(source, tmp_path):
    case_id = case_ids(source)[0]
    path = source / LABELS / "resampled" / f"{case_id}.nii.gz"
    label = read_volume(path)
    moved = tuple(np.array(label.origin) + np.array([0.3, -0.2, 0.4]))
    write_volume(path, dataclasses.replace(label, origin=moved))
    builder = create(source, tmp_path)
    case = next(case for case in builder.cases if case.case_id == case_id)
    read = builder.read_case(case)
    np.testing.assert_array_equal(read.labels.array, label.array > 0)
    assert read.labels.origin == read.image.origin


# --- labels keep their volume ---------------------------------------------------------------------


def resized_by_area(mask: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The authors' way: area interpolation to the shape, then every voxel that is not 0."""
    cover = mask.astype(np.float64)
    for axis, size in enumerate(shape):
        # Adaptive average pooling: bin i reads floor(i n / m) to ceil((i + 1) n / m).
        n = cover.shape[axis]
        sums = np.concatenate([np.zeros_like(cover.take([0], axis)), cover.cumsum(axis)], axis)
        start = np.arange(size) * n // size
        stop = -(-(np.arange(size) + 1) * n // size)
        cover = sums.take(stop, axis) - sums.take(start, axis)
    return cover > 1e-9


def statistics_of(mask: np.ndarray) -> dict[str, float]:
    # By the oracle: every mask has a shape of its own, for which ours would be compiled. Two
    # voxels away from the lesions there is nothing to add.
    (box,) = ndimage.find_objects((mask > 0).astype(np.uint8))
    crop = mask[tuple(slice(max(side.start - 2, 0), side.stop + 2) for side in box)]
    smoothness = oracles.surface_smoothness(crop) * crop.size / mask.size
    return {"fraction": oracles.foreground_fraction(mask), "smoothness": smoothness}


@pytest.mark.real_data
@pytest.mark.parametrize("grid", GRIDS)
def test_real_lesions_keep_their_volume_and_none_is_lost(real_data, grid, capsys):
    files = sorted((real_data / LABELS / "resampled").glob("*.nii.gz"))
    assert len(files) == 52
    rows, ratios = [], {"ours": [], "nearest": [], "authors": []}
    for path in files:
        label = read_volume(path)
        mask = dataclasses.replace(label, array=(label.array >= 1).astype(np.uint8))
        if not mask.array.any():
            continue
        prepared = prepare_image(mask, normalisation="none", **GRIDS[grid])
        after = prepare_labels(mask, prepared)
        voxel_mm3 = [float(np.prod(volume.spacing)) for volume in (mask, after)]
        before_mm3 = np.count_nonzero(mask.array) * voxel_mm3[0]
        nearest = resample_to(mask, prepared, interpolation="nearest").array
        found = {"ours": after.array, "nearest": nearest}
        if grid == "paper":
            found["authors"] = resized_by_area(mask.array, GRIDS[grid]["shape"])
        for name, array in found.items():
            ratios[name].append(np.count_nonzero(array) * voxel_mm3[1] / before_mm3)
        lesions = [label_components(item.array)[1] for item in (mask, after)]
        assert lesions[0] == lesions[1], path.name
        stats = [statistics_of(item.array) for item in (mask, after)]
        rows.append(
            [
                path.name.split(".")[0],
                *(f"{s['fraction']:.2e}" for s in stats),
                *(f"{s['smoothness']:.2e}" for s in stats),
                *map(str, lesions),
                f"{before_mm3:.0f}",
                f"{before_mm3 * ratios['ours'][-1]:.0f}",
            ]
        )
    table = Table(title=f"{len(rows)} lesion masks, before and after preparation to {grid}")
    for column in ("case", "fraction", "", "smoothness", "", "lesions", "", "mm3", ""):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    with capsys.disabled():
        Console(width=110).print(table)
        for name, values in ratios.items():
            if values:
                print(
                    f"volume after / before, {name}: median {np.median(values):.3f}, "
                    f"{min(values):.3f} to {max(values):.3f}"
                )
    assert abs(np.median(ratios["ours"]) - 1) < 0.01
    if grid == "paper":
        # No lesion is cut off by this grid, so that each keeps its volume, not the median alone.
        assert np.all(np.abs(np.array(ratios["ours"]) - 1) < 0.05)
        assert np.median(ratios["authors"]) > 1.2


@pytest.mark.parametrize("zoom", [0.25, 0.5, 0.8, 1.5], ids=str)
def test_lesions_keep_their_volume_on_any_grid(zoom):
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.standard_normal((64, 56, 40)), 3)
    mask = Volume((smooth > 2.2 * smooth.std()).astype(np.uint8), (0.5, 0.5, 3.0))
    lesions = label_components(mask.array)[1]
    assert lesions > 5
    shape = tuple(max(1, round(zoom * n)) for n in mask.shape)
    after = prepare_labels(mask, prepare_image(mask, shape=shape, resize=True))
    volumes = [
        np.count_nonzero(volume.array) * float(np.prod(volume.spacing)) for volume in (mask, after)
    ]
    assert after.shape == shape
    # Rounded to whole voxels of the new grid, one at least, lesion by lesion.
    assert abs(volumes[1] - volumes[0]) <= lesions * float(np.prod(after.spacing))
    # Neighbours may touch on a coarse grid, but each is still where it was.
    if zoom > 0.5:
        assert label_components(after.array)[1] == lesions
    distance = ndimage.distance_transform_edt(after.array == 0)
    components, _ = label_components(mask.array)
    for index in range(1, lesions + 1):
        places = (np.argwhere(components == index) + 0.5) * shape / mask.shape
        assert distance[tuple(places.astype(int).T)].min() <= 1


# --- what a build says of bad input ---------------------------------------------------------------


def remove_images(source: Path) -> str:
    shutil.rmtree(source / "images")
    return "images: no such folder; it must hold the unzipped images of PI-CAI"


def empty_images(source: Path) -> str:
    shutil.rmtree(source / "images")
    (source / "images").mkdir()
    return "holds no images (*_t2w.mha, *_adc.mha, *_hbv.mha)"


def remove_labels(source: Path) -> str:
    shutil.rmtree(source / "picai_labels")
    return "resampled: no such folder; clone https://github.com/DIAGNijmegen/picai_labels"


def remove_marksheet(source: Path) -> str:
    (source / "picai_labels/clinical_information/marksheet.csv").unlink()
    return "marksheet.csv: no such file; it says which cases are positive"


def break_marksheet(source: Path) -> str:
    path = source / "picai_labels/clinical_information/marksheet.csv"
    path.write_text("a,b\n1,2\n")
    return "marksheet.csv: expected a table with patient_id, study_id and case_csPCa"


def duplicate_case(source: Path) -> str:
    case_id = case_ids(source)[0]
    shutil.copytree(scan_path(source, case_id, "t2w").parent, source / "images" / "fold1" / "again")
    return f"case {case_id} is there twice"


def unknown_case(source: Path) -> str:
    case_id = case_ids(source)[0]
    for path in [*source.rglob(f"{case_id}_*.mha"), *source.rglob(f"{case_id}.nii.gz")]:
        path.rename(path.with_name(path.name.replace(case_id, "99999_9999999")))
    write_marksheet(source, {"99999_9999999": True})
    return "99999_9999999 is in none of the official folds"


def no_partner(source: Path) -> str:
    write_marksheet(source, {"10000_1000000": False})
    return "no examination in images has a label of human_expert"


@pytest.mark.parametrize(
    "damage",
    [
        remove_images,
        empty_images,
        remove_labels,
        remove_marksheet,
        break_marksheet,
        duplicate_case,
        unknown_case,
        no_partner,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_wrong_source_is_one_line_before_any_work(source, tmp_path, damage):
    text = damage(source)
    data_dir = tmp_path / "data"
    with pytest.raises(InputError, match=one_line(text)):
        create(source, data_dir, labels="human_expert", cases="positive").prepare()
    assert not list(data_dir.rglob("*.record"))


def remove_adc(source: Path, case_id: str) -> str:
    scan_path(source, case_id, "adc").unlink()
    return f"case {case_id}: its ADC"


def truncate_t2w(source: Path, case_id: str) -> str:
    path = scan_path(source, case_id, "t2w")
    path.write_bytes(path.read_bytes()[:-1000])
    return f"{path}: cannot be read as an image"


def move_hbv(source: Path, case_id: str) -> str:
    path = scan_path(source, case_id, "hbv")
    scan = read_volume(path)
    write_volume(
        path,
        dataclasses.replace(scan, origin=tuple(np.array(scan.origin) + np.array([0, 0, 50.0]))),
    )
    return f"{path}: expected its centre within 30 mm of that of {case_id}_t2w.mha, found 4"


def label_path(source: Path, case_id: str) -> Path:
    return source / LABELS / "resampled" / f"{case_id}.nii.gz"


def move_label(source: Path, case_id: str) -> str:
    label = read_volume(label_path(source, case_id))
    moved = tuple(np.array(label.origin) + np.array([20.0, 0, 0]))
    write_volume(label_path(source, case_id), dataclasses.replace(label, origin=moved))
    return f"{case_id}.nii.gz: expected the grid of its T2W {case_id}_t2w.mha, found origin"


def move_label_of_another_shape(source: Path, case_id: str) -> str:
    label = read_volume(label_path(source, case_id))
    array = np.pad(label.array, ((0, 0), (0, 0), (0, 1)))
    moved = tuple(np.array(label.origin) + np.array([80.0, 0, 0]))
    write_volume(label_path(source, case_id), dataclasses.replace(label, array=array, origin=moved))
    return f"{case_id}.nii.gz: expected its centre within 30 mm"


def break_values(source: Path, case_id: str) -> str:
    label = read_volume(label_path(source, case_id))
    write_volume(
        label_path(source, case_id), dataclasses.replace(label, array=label.array * 1.0 + 0.5)
    )
    return f"{case_id}.nii.gz: expected whole numbers from 0, found others"


@pytest.mark.parametrize(
    "damage",
    [
        remove_adc,
        truncate_t2w,
        move_hbv,
        move_label,
        move_label_of_another_shape,
        break_values,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_bad_case_is_named_and_the_others_are_kept(source, tmp_path, damage):
    case_id = case_ids(source)[1]
    text = damage(source, case_id)
    builder = create(source, tmp_path / "data")
    with pytest.raises(InputError, match=one_line(text)) as error:
        builder.prepare()
    assert f"leave them out with data.exclude: {case_id}" in str(error.value)
    assert not builder.is_prepared()
    assert len(list((tmp_path / "data").rglob("*.record"))) == 9


def test_labels_of_experts_come_in_three_types_and_grades(download, tmp_path):
    paths = [label_path(download, case_id) for case_id in case_ids(download)[:3]]
    labels = [read_volume(path).array for path in paths]
    assert [array.dtype for array in labels] == [np.uint16, np.int32, np.float64]
    assert [array.max() for array in labels] == [2, 3, 4]
    builder = create(download, tmp_path)
    for case in builder.cases:
        assert builder.read_case(case).labels.array.max() <= 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"fold": 5}, "fold must be from 0 to 4, got 5"),
        ({"labels": "Pooch25"}, "labels must be one of"),
        ({"cases": "negative"}, "cases must be 'all' or 'positive'"),
        ({"clip_percentiles": (99.5, 0.5)}, "clip_percentiles must be two numbers"),
        ({"spacing": (0.5, 0.5)}, "spacing must be three positive numbers"),
        ({"shape": (0, 8, 8)}, "shape must be three whole numbers"),
        ({"val_fraction": 0}, "val_fraction must be between 0 and 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_refused(settings, text):
    with pytest.raises(InputError, match=one_line(text)):
        Picai2022Settings(source="anywhere", **settings)
