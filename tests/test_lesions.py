import math

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from afl_jax import lesions

# Where our definition for empty masks departs from the authors' code or MONAI: case, array,
# theirs. All are NaN here. Every other golden number must agree.
EMPTY_MASK_DEPARTURES = [
    ("empty_pred", "hd_mm_monai", math.inf),
    ("empty_label", "hd_mm_monai", math.inf),
    ("empty_pred", "asd_mm_monai", math.inf),
    ("empty_label", "asd_mm_monai", math.inf),
    ("empty_pred", "asd_mm_authors", math.inf),
    ("empty_label", "asd_mm_authors", math.inf),
    ("empty_pred", "hd_mm_authors", math.inf),
    ("empty_label", "hd_mm_authors", math.inf),
    ("both_empty", "hd_mm_authors", 0.0),
    ("both_empty", "lesion_f1", 1.0),
    ("both_empty", "lesion_f1_conn6", 1.0),
]
# Not about empty masks: the authors' Hausdorff distance runs over all foreground voxels, ours
# (and MONAI's) over surfaces, and only a hole inside a mask tells them apart.
HOLE = ("hole", "hd_mm_authors", 1.0)


def lesionwise(golden: dict, name: str, spacing) -> dict:
    shape = golden[f"shape_{name}"]
    labels = np.unpackbits(golden[f"label_{name}"])[: np.prod(shape)].reshape(shape)
    prediction = golden[f"logits_{name}"][0, 1].astype(np.float32) > 0
    counts = lesions.match_lesions(prediction, labels)
    counts_6 = lesions.match_lesions(prediction, labels, connectivity=6)
    distances = lesions.surface_distances(prediction, labels, spacing=spacing)
    return {
        "lesion_tp_fp_fn": counts,
        "lesion_f1": lesions.lesion_f1(counts),
        "lesion_f1_conn6": lesions.lesion_f1(counts_6),
        "hd_mm_monai": lesions.hausdorff_distance(distances),
        "hd_mm_authors": lesions.hausdorff_distance(distances),
        "hd95_mm_monai": lesions.hausdorff_distance_95(distances),
        "asd_mm_monai": lesions.average_symmetric_surface_distance(distances),
        "asd_mm_authors": lesions.average_symmetric_surface_distance(distances),
    }


def assert_golden(path):
    golden = dict(np.load(path))
    departures = {(case, array): theirs for case, array, theirs in EMPTY_MASK_DEPARTURES}
    for index, name in enumerate(golden["names"]):
        for array, ours in lesionwise(golden, name, golden["spacing"][index]).items():
            theirs = golden[array][index]
            if (name, array) in departures:
                assert theirs == departures[name, array]
                assert math.isnan(ours)
            elif (name, array) == HOLE[:2]:
                assert (theirs, ours) == (HOLE[2], 3.0)
            else:
                np.testing.assert_allclose(
                    ours, theirs, rtol=0, atol=1e-6, err_msg=f"{name} {array}"
                )


def test_the_authors_numbers():
    assert_golden(GOLDEN / "metrics.npz")


@pytest.mark.real_data
def test_the_authors_numbers_on_real_masks(reference):
    assert_golden(reference / "metrics.npz")


def voxels(shape, *points) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for point in points:
        mask[point] = True
    return mask


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0, 0, 0), (0, 0, 1)], {6: 1, 18: 1, 26: 1}),
        ([(0, 0, 0), (0, 1, 1)], {6: 2, 18: 1, 26: 1}),
        ([(0, 0, 0), (1, 1, 1)], {6: 2, 18: 2, 26: 1}),
        ([(0, 0), (0, 1)], {6: 1, 18: 1, 26: 1}),
        ([(0, 0), (1, 1)], {6: 2, 18: 1, 26: 1}),
    ],
    ids=["face", "edge", "corner", "2d-face", "2d-corner"],
)
def test_connectivity(points, expected):
    mask = voxels((2,) * len(points[0]), *points)
    for connectivity, num_components in expected.items():
        components, found = lesions.label_components(mask, connectivity=connectivity)
        assert found == components.max() == num_components
        np.testing.assert_array_equal(components > 0, mask)


def test_unknown_connectivity_is_refused():
    with pytest.raises(ValueError, match=r"^connectivity must be 6, 18 or 26, got 8\.$"):
        lesions.label_components(np.zeros((2, 2, 2)), connectivity=8)


def line(text: str) -> np.ndarray:
    """A [1, 1, Z] mask drawn as text: '#' is foreground."""
    return np.array([[[character == "#" for character in text]]])


@pytest.mark.parametrize(
    ("prediction", "labels", "touching", "strict"),
    [
        # One voxel of ten: IoU = 1 / 10, not above 0.1.
        ("#.........", "##########", (1, 0, 0), (0, 1, 1)),
        ("##........", "##########", (1, 0, 0), (1, 0, 0)),
        # One prediction finds two lesions: IoU = 3 / 8 each.
        ("########", "###..###", (2, 0, 0), (2, 0, 0)),
        # Two predictions inside one lesion; the smaller has IoU = 1 / 11.
        ("#.........#", "###########", (1, 0, 0), (0, 2, 1)),
        ("##........#", "###########", (1, 0, 0), (1, 1, 0)),
        ("#..#", ".##.", (0, 2, 1), (0, 2, 1)),
        ("....", ".##.", (0, 0, 1), (0, 0, 1)),
        (".##.", "....", (0, 1, 0), (0, 1, 0)),
        ("....", "....", (0, 0, 0), (0, 0, 0)),
    ],
)
def test_matching_lesions(prediction, labels, touching, strict):
    prediction, labels = line(prediction), line(labels)
    assert lesions.match_lesions(prediction, labels) == touching
    assert lesions.match_lesions(prediction, labels, min_iou=0.1) == strict


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((3, 1, 2), 3 / (3 + (1 + 2) / 2)),
        ((0, 1, 0), 0.0),
        ((0, 0, 1), 0.0),
        ((0, 0, 0), math.nan),
    ],
)
def test_lesion_f1(counts, expected):
    f1 = lesions.lesion_f1(lesions.LesionCounts(*counts))
    assert f1 == pytest.approx(expected, nan_ok=True)


def test_volumes_are_voxels_times_spacing():
    volumes = lesions.lesion_volumes_mm3(line("##.#.###"), spacing=(0.5, 0.5, 3.0))
    np.testing.assert_allclose(volumes, [2 * 0.75, 1 * 0.75, 3 * 0.75])
    assert lesions.lesion_volumes_mm3(line("...."), spacing=(1, 1, 1)).size == 0


def test_detections_pair_each_lesion_with_its_size():
    found = lesions.lesion_detections(line("#....#.#"), line("##.#.###"), spacing=(1, 1, 2))
    np.testing.assert_allclose(found.volume_mm3, [2 * 2, 1 * 2, 3 * 2])
    np.testing.assert_array_equal(found.detected, [True, False, True])


def test_distances_are_in_mm_along_each_axis():
    shape, origin = (4, 4, 4), voxels((4, 4, 4), (0, 0, 0))
    for point, expected in [
        ((3, 0, 0), 3 * 0.5),
        ((0, 2, 0), 2 * 0.75),
        ((0, 0, 1), 1 * 3.0),
        ((3, 2, 1), math.hypot(1.5, 1.5, 3.0)),
    ]:
        distances = lesions.surface_distances(
            origin, voxels(shape, point), spacing=(0.5, 0.75, 3.0)
        )
        assert lesions.hausdorff_distance(distances) == pytest.approx(expected)
        assert lesions.average_symmetric_surface_distance(distances) == pytest.approx(expected)


def test_a_surface_is_a_mask_without_its_face_erosion():
    cube = np.ones((4, 4, 4), bool)  # touches every border: outside is background
    distances = lesions.surface_distances(cube, cube, spacing=(1, 1, 1))
    assert distances.prediction_to_label_mm.size == 4**3 - 2**3


def test_each_summary_of_known_distances():
    distances = lesions.SurfaceDistances(np.array([0.0, 1.0, 2.0, 5.0]), np.array([0.0, 3.0]))
    assert lesions.hausdorff_distance(distances) == 5.0
    # Percentile 95 of four values: rank 0.95 * 3 = 2.85 lies between 2 and 5; of two: 0.95 * 3.
    expected = max(2 + 0.85 * (5 - 2), 0.95 * 3)
    assert lesions.hausdorff_distance_95(distances) == pytest.approx(expected)
    mean = lesions.average_symmetric_surface_distance(distances)
    assert mean == pytest.approx((0 + 1 + 2 + 5 + 0 + 3) / 6)
    assert lesions.surface_dice(distances, tolerance_mm=2.0) == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("prediction", "labels", "expected_surface_dice"),
    [("....", "....", math.nan), ("....", ".##.", 0.0), (".##.", "....", 0.0)],
    ids=["both_empty", "empty_prediction", "empty_label"],
)
def test_empty_masks_follow_the_table(prediction, labels, expected_surface_dice):
    distances = lesions.surface_distances(line(prediction), line(labels), spacing=(1, 1, 1))
    assert [d.size for d in distances] == [prediction.count("#"), labels.count("#")]
    assert np.isnan(np.concatenate(distances)).all()
    assert math.isnan(lesions.hausdorff_distance(distances))
    assert math.isnan(lesions.hausdorff_distance_95(distances))
    assert math.isnan(lesions.average_symmetric_surface_distance(distances))
    overlap = lesions.surface_dice(distances, tolerance_mm=1.0)
    assert overlap == pytest.approx(expected_surface_dice, nan_ok=True)


def face_surface(mask: np.ndarray) -> np.ndarray:
    """Coordinates of foreground voxels with a background face neighbour, by looking at each."""
    padded = np.pad(mask, 1)
    return np.array(
        [
            point
            for point in np.argwhere(mask)
            if any(
                not padded[tuple(point + 1 + sign * np.eye(mask.ndim, dtype=int)[axis])]
                for axis in range(mask.ndim)
                for sign in (-1, 1)
            )
        ]
    )


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=3),
    density=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**16),
)
def test_distances_agree_with_brute_force(shape, density, seed):
    rng = np.random.default_rng(seed)
    spacing = rng.uniform(0.3, 3.0, len(shape))
    prediction, labels = rng.random((2, *shape)) < density
    distances = lesions.surface_distances(prediction, labels, spacing=spacing)
    from_prediction, to_label = face_surface(prediction), face_surface(labels)
    assert [d.size for d in distances] == [len(from_prediction), len(to_label)]
    if len(from_prediction) and len(to_label):
        offsets = (from_prediction[:, None] - to_label[None]) * spacing
        table = np.sqrt((offsets**2).sum(-1))
        np.testing.assert_allclose(distances.prediction_to_label_mm, table.min(1))
        np.testing.assert_allclose(distances.label_to_prediction_mm, table.min(0))


def test_where_the_masks_lie_in_the_volume_changes_nothing():
    rng = np.random.default_rng(0)
    prediction, labels = rng.random((2, 5, 4, 3)) < 0.4
    small = lesions.surface_distances(prediction, labels, spacing=(1, 2, 3))
    pads = [(7, 2), (0, 9), (4, 4)]
    large = lesions.surface_distances(
        np.pad(prediction, pads), np.pad(labels, pads), spacing=(1, 2, 3)
    )
    for a, b in zip(small, large, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_arguments_are_refused():
    mask = np.zeros((3, 3, 3))
    with pytest.raises(ValueError, match=r"^prediction must have the shape .*got \(3, 3\)\.$"):
        lesions.match_lesions(mask[0], mask)
    with pytest.raises(ValueError, match=r"^spacing must have one entry per axis, 3, got \(1"):
        lesions.surface_distances(mask, mask, spacing=(1, 1))
