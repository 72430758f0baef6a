import math

import numpy as np
import pytest

from afl_jax import evaluation, metrics


def blocks(*boxes: tuple[slice, ...], shape=(12, 10, 6)) -> np.ndarray:
    """Classes 1, 2, ... in boxes."""
    array = np.zeros(shape, np.uint8)
    for value, box in enumerate(boxes, start=1):
        array[box] = value
    return array


CUBE = (slice(2, 6), slice(2, 6), slice(1, 5))
SHIFTED = (slice(3, 7), slice(2, 6), slice(1, 5))
FAR = (slice(9, 11), slice(7, 9), slice(1, 3))


def evaluate(prediction, labels, **options) -> evaluation.CaseEvaluation:
    defaults = {
        "spacing": (2.0, 1.0, 1.0),
        "structures": evaluation.class_structures(2),
        "tolerance_mm": 1.0,
    }
    return evaluation.evaluate_case(prediction, labels, **{**defaults, **options})


def test_a_shifted_cube_and_a_missed_lesion():
    labels = np.minimum(blocks(CUBE, FAR), 1)
    row, lesions = evaluate(blocks(SHIFTED), labels)
    # 4^3 voxels shifted by one of four slices; a lesion of 2^3 is missed.
    tp, fp, fn = 3 * 16, 16, 16 + 8
    assert row["dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert row["sensitivity"] == pytest.approx(tp / (tp + fn))
    assert row["precision"] == pytest.approx(tp / (tp + fp))
    assert [row[f"lesion_{name}"] for name in ("tp", "fp", "fn", "f1")] == [1, 0, 1, 1 / 1.5]
    assert row["strict_lesion_tp"] == 1
    assert row["lesions"] == 2
    assert row["volume_mm3"] == (64 + 8) * 2
    # The farthest corner of the missed lesion: (10, 8) to (6, 5) and z inside; x is 2 mm.
    assert row["hd_mm"] == pytest.approx(math.hypot(4 * 2, 3))
    # Half of the moved cube's surface moved by 2 mm, beyond the tolerance.
    assert 0 < row["surface_dice"] < 1
    assert "soft_dice" not in row
    assert not any("_1" in name for name in row)
    assert [lesion["volume_mm3"] for lesion in lesions] == [128, 16]
    assert [lesion["detected"] for lesion in lesions] == [1, 0]
    # The two surfaces over those of two balls: between what each is alone.
    low, high = sorted(lesion["irregularity"] for lesion in lesions)
    assert 0 <= low <= row["irregularity"] <= high


def test_a_lesion_that_is_barely_touched_is_found_by_one_criterion():
    touching = (slice(5, 9), slice(5, 9), slice(4, 6))
    row, (lesion,) = evaluate(blocks(touching), blocks(CUBE))
    assert (row["lesion_tp"], row["strict_lesion_tp"]) == (1, 0)
    assert (row["strict_lesion_fp"], row["strict_lesion_fn"]) == (1, 1)
    assert (lesion["detected"], lesion["strictly_detected"]) == (1, 0)


def test_regions_are_measured_each_and_averaged():
    labels, prediction = blocks(CUBE, FAR), blocks(CUBE, (slice(0, 1),) * 3)
    structures = {"whole": (1, 2), "core": (2,)}
    row, _ = evaluate(prediction, labels, structures=structures)
    assert row["dice_whole"] == pytest.approx(2 * 64 / (2 * 64 + 1 + 8))
    assert row["dice_core"] == 0
    assert row["dice"] == pytest.approx(row["dice_whole"] / 2)
    assert row["hd_mm"] == pytest.approx((row["hd_mm_whole"] + row["hd_mm_core"]) / 2)
    each, _ = evaluate(prediction, labels, structures=evaluation.class_structures(3))
    assert (each["dice_1"], each["dice_2"]) == (1, 0)


def test_a_structure_that_is_nowhere_is_left_out_of_the_mean():
    labels = blocks(CUBE)
    row, _ = evaluate(labels, labels, structures=evaluation.class_structures(3))
    assert math.isnan(row["dice_2"])
    assert row["dice"] == row["dice_1"] == 1


def test_empty_masks_are_undefined_and_never_infinite():
    empty = blocks()
    row, lesions = evaluate(empty, empty)
    assert lesions == []
    undefined = {name for name, value in row.items() if math.isnan(value)}
    assert undefined == {
        *("dice", "iou", "sensitivity", "precision"),
        *("hd_mm", "hd95_mm", "assd_mm", "surface_dice"),
        *("lesion_f1", "strict_lesion_f1", "irregularity"),
    }
    for pair in ((blocks(CUBE), empty), (empty, blocks(CUBE)), (empty, empty)):
        assert not any(math.isinf(value) for value in evaluate(*pair).row.values())
    assert evaluate(empty, blocks(CUBE)).row["dice"] == 0


def test_probabilities_bring_the_papers_soft_metrics():
    labels = blocks(CUBE)
    probs = np.random.default_rng(0).random((*labels.shape, 2)).astype(np.float32)
    row, _ = evaluate(labels, labels, probs=probs)
    assert row["soft_dice"] == pytest.approx(metrics.soft_dice(probs[None], labels[None]).item())
    assert row["soft_iou"] == pytest.approx(metrics.soft_iou(probs[None], labels[None]).item())


def test_summary_pools_lesions_and_ranks_by_thirds():
    labels = np.minimum(blocks(CUBE, FAR), 1)
    results = [evaluate(prediction, labels) for prediction in (blocks(CUBE), labels, blocks(FAR))]
    results.append(evaluate(blocks(), blocks()))
    cases = [{"case_id": str(i)} | result.row for i, result in enumerate(results)]
    lesion_rows = [row for result in results for row in result.lesions]
    summary = evaluation.summarise(cases, lesion_rows)
    assert summary["metrics"]["dice"].count == 3
    lesions = summary["lesions"]["lesion"]
    assert (lesions["tp"], lesions["fp"], lesions["fn"]) == (4, 0, 2)
    assert lesions["sensitivity"] == 4 / 6
    assert lesions["f1"] == 4 / (4 + 2 / 2)
    # Six lesions: three of 16 mm3, of which two are found, and three of 128, likewise.
    small, middle, large = summary["lesions_by_volume"]
    assert (small.low, small.high, small.count) == (16, 16, 2)
    assert (middle.low, middle.high) == (16, 128)
    assert (large.low, large.high) == (128, 128)
    shares = [tercile.metrics["detected"].mean for tercile in (small, middle, large)]
    assert sum(shares) * 2 == 4
    # The case without lesions has no size.
    assert sum(tercile.count for tercile in summary["cases_by_volume"]) == 3
