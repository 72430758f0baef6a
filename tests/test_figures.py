import math
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest

from afl_jax import figures

NAN = float("nan")


def overlay_case(shape=(24, 16, 6), spacing=(1.0, 1.0, 3.0), **changes) -> figures.OverlayCase:
    labels = np.zeros(shape, np.int32)
    labels[4:8, 6:12] = 1
    fields = {
        "case_id": "case_001",
        "image": np.random.default_rng(0).random((*shape, 2)),
        "truth": labels,
        "prediction": np.roll(labels, 2, axis=0),
        "spacing": spacing,
        "dice": 0.5,
    }
    return figures.OverlayCase(**{**fields, **changes})


def test_overlay_shows_the_slice_with_most_foreground():
    truth, prediction, empty = np.zeros((3, 4, 4, 5), np.int32)
    truth[0, 0, 2] = truth[:2, 0, 3] = prediction[:, :, 1] = 1
    images = np.zeros((4, 4, 5, 1))
    images[..., 0] = np.arange(5)
    shown = {"image": images, "truth": truth, "prediction": prediction}
    assert overlay_case(**shown).slice_index == 3
    assert overlay_case(**{**shown, "truth": empty}).slice_index == 1
    assert overlay_case(**{**shown, "truth": empty, "prediction": empty}).slice_index == 5 // 2
    image, truth_plane, prediction_plane = overlay_case(**shown).planes
    assert image.shape == (4, 4)
    assert image.min() == image.max() == 3
    assert (truth_plane.sum(), prediction_plane.sum()) == (2, 0)


@pytest.fixture
def drawn(monkeypatch):
    """The last figure that was saved, with its axes, for a look at what it holds."""
    seen = SimpleNamespace()
    savefig = matplotlib.figure.Figure.savefig

    def remember(figure, *args, **kwargs):
        seen.figure = figure
        return savefig(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", remember)
    return seen


@pytest.mark.parametrize(
    "cases",
    [
        [overlay_case()],
        [overlay_case(), overlay_case((10, 30, 4), (0.5, 0.5, 3.0)), overlay_case(dice=NAN)],
        [overlay_case((24, 16), (1.0, 2.0))],
        [overlay_case(truth=np.zeros((24, 16, 6)), prediction=np.zeros((24, 16, 6)))],
    ],
    ids=["one", "three", "2d", "empty"],
)
def test_overlay_draws_one_row_per_case(tmp_path, drawn, cases):
    path = tmp_path / "overlay.png"
    figures.overlay_figure(cases, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
    assert len(drawn.figure.axes) == 3 * len(cases)
    for case, axes in zip(cases, drawn.figure.axes[::3], strict=True):
        assert axes.get_title(loc="left").startswith(case.case_id)
    titles = [axes.get_title(loc="right") for axes in drawn.figure.axes[2::3]]
    assert titles == [
        "Dice undefined" if math.isnan(case.dice) else f"Dice {case.dice:.3f}" for case in cases
    ]


def test_overlay_panels_have_the_proportions_of_the_patient(tmp_path, drawn):
    figures.overlay_figure([overlay_case((24, 16), (1.0, 2.0))], tmp_path / "overlay.png")
    panel = drawn.figure.axes[0].get_position(original=True)
    width, height = drawn.figure.get_size_inches()
    assert panel.height * height / (panel.width * width) == pytest.approx(16 * 2.0 / (24 * 1.0))


def test_overlay_outlines_the_voxels_in_mm(tmp_path, drawn):
    truth, prediction = np.zeros((2, 8, 6), np.int32)
    truth[2, 3] = 1  # one voxel: x from 2 to 3 voxels, y from 3 to 4 voxels
    image = np.zeros((8, 6, 1))
    image[2, 3] = 1
    case = overlay_case(
        (8, 6), (0.5, 2.0), image=image, truth=truth, prediction=prediction, dice=0.0
    )
    figures.overlay_figure([case], tmp_path / "overlay.png")
    plain, with_truth, with_prediction = drawn.figure.axes
    (outline,) = with_truth.collections
    corners = {tuple(point) for segment in outline.get_segments() for point in segment}
    assert corners == {(x * 0.5, y * 2.0) for x in (2, 3) for y in (3, 4)}
    assert len(outline.get_segments()) == 4
    assert not with_prediction.collections
    # x runs right, y runs down: row 3, column 2 of the picture is voxel (2, 3).
    (picture,) = plain.images
    assert picture.get_array()[3, 2] == 1
    assert picture.get_extent() == [0, 8 * 0.5, 6 * 2.0, 0]
    assert plain.get_aspect() == 1


def test_curves_leave_undefined_points_out(tmp_path, drawn):
    history = [
        {"epoch": 1, "loss": 0.9},
        {"epoch": 2, "loss": 0.5, "dice": NAN},
        {"epoch": 3, "loss": NAN, "dice": 0.7},
    ]
    path = tmp_path / "curves.png"
    figures.curves_figure(history, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    loss_axes, metric_axes = drawn.figure.axes
    (loss,), (dice,) = loss_axes.lines, metric_axes.lines
    np.testing.assert_array_equal(loss.get_xydata(), [[1, 0.9], [2, 0.5]])
    np.testing.assert_array_equal(dice.get_xydata(), [[3, 0.7]])
