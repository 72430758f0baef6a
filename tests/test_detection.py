import math

import numpy as np
import pytest

from afl_jax import detection

pytest.importorskip("picai_eval", reason="the extra picai is not installed")


def volume(*boxes: tuple[float, slice]) -> np.ndarray:
    """Boxes of 4 x 4 x 3 voxels along x, each with a value."""
    array = np.zeros((24, 6, 5))
    for value, along_x in boxes:
        array[along_x, 1:5, 1:4] = value
    return array


FIRST, SECOND, THIRD = slice(1, 5), slice(9, 13), slice(17, 21)


def test_candidates_are_matched_with_lesions():
    labels = volume((1, FIRST), (1, THIRD))
    case = detection.detect_lesions(volume((0.9, FIRST), (0.6, SECOND), (0.2, THIRD)), labels)
    # 0.2 is below 0.9 / 2.5: the third lesion is missed.
    assert sorted(case.lesions) == [
        (0, pytest.approx(0.6), 0),
        (1, 0, 0),
        (1, pytest.approx(0.9), 1),
    ]
    assert case.confidence == pytest.approx(0.9)


def test_the_margin_of_a_volume_changes_nothing():
    labels, probs = volume((1, SECOND)), volume((0.8, slice(8, 12)))
    small = detection.detect_lesions(probs, labels)
    pads = [(5, 0), (3, 4), (2, 2)]
    large = detection.detect_lesions(np.pad(probs, pads), np.pad(labels, pads))
    assert small == large
    assert small.lesions[0][:2] == (1, pytest.approx(0.8))


def test_nothing_predicted_is_no_candidate():
    assert detection.detect_lesions(volume(), volume()) == ([], 0)
    assert detection.detect_lesions(volume(), volume((1, FIRST))) == ([(1, 0, 0)], 0)


def test_scores_of_known_ranks():
    cases = {
        "found": detection.CaseDetections([(1, 0.9, 0.5)], 0.9),
        "alarm": detection.CaseDetections([(0, 0.8, 0.0)], 0.8),
        "late": detection.CaseDetections([(1, 0.7, 0.5)], 0.7),
        "quiet": detection.CaseDetections([], 0.0),
    }
    scores = detection.detection_scores(cases)
    # Of four pairs of a positive and a negative case, "late" against "alarm" is in wrong order.
    assert scores.auroc == pytest.approx(3 / 4)
    # Precision 1 up to half of the lesions, then 2 of 3.
    assert scores.ap == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert scores.score == pytest.approx((scores.auroc + scores.ap) / 2)


def test_scores_need_cases_of_both_kinds():
    positive = {"a": detection.CaseDetections([(1, 0.9, 0.5)], 0.9)}
    scores = detection.detection_scores(positive)
    assert math.isnan(scores.auroc)
    assert math.isnan(scores.score)
    assert scores.ap == 1
    negative = {"b": detection.CaseDetections([], 0.0)}
    assert all(math.isnan(value) for value in detection.detection_scores(negative))


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "picai_eval", None)
    with pytest.raises(detection.InputError, match=r'pip install "afl-jax\[picai\]"'):
        detection.require_picai_eval()
