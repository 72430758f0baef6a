import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from afl_jax import metrics

# Where our definition for empty masks departs from the authors' code: case, array, theirs. All
# are NaN here. Every other golden number must agree.
EMPTY_MASK_DEPARTURES = [("both_empty", "dice_authors_h5asd", 0.0)]


def voxelwise(golden: dict, name: str) -> dict[str, float]:
    shape = golden[f"shape_{name}"]
    packed = golden[f"label_{name}"]
    labels = jnp.asarray(np.unpackbits(packed)[: np.prod(shape)].reshape(1, *shape), jnp.int32)
    logits = jnp.moveaxis(jnp.asarray(golden[f"logits_{name}"], jnp.float32), 1, -1)
    probs = jax.nn.sigmoid(logits)
    counts = metrics.confusion_counts((probs[..., 1] > 0.5).astype(jnp.int32), labels)
    return {
        "counts_tp_fp_fn_tn": np.array([count.item() for count in counts]),
        "dice_hard": metrics.dice(counts).item(),
        "dice_authors_h5asd": metrics.dice(counts).item(),
        "iou_hard": metrics.iou(counts).item(),
        "sensitivity": metrics.sensitivity(counts).item(),
        "specificity": metrics.specificity(counts).item(),
        "dice_metric_soft": metrics.soft_dice(probs, labels).item(),
        "iou_metric_soft": metrics.soft_iou(probs, labels).item(),
    }


def assert_golden(path):
    golden = dict(np.load(path))
    departures = {(case, array): theirs for case, array, theirs in EMPTY_MASK_DEPARTURES}
    for index, name in enumerate(golden["names"]):
        for array, ours in voxelwise(golden, name).items():
            theirs = golden[array][index]
            if (name, array) in departures:
                assert theirs == departures[name, array]
                assert np.isnan(ours)
            else:
                np.testing.assert_allclose(
                    ours, theirs, rtol=0, atol=1e-6, err_msg=f"{name} {array}"
                )


def test_the_authors_numbers():
    assert_golden(GOLDEN / "metrics.npz")


@pytest.mark.real_data
def test_the_authors_numbers_on_real_masks(reference):
    assert_golden(reference / "metrics.npz")


# One row: tp = 2, fp = 3, fn = 1, tn = 4.
PREDICTION = jnp.array([[1, 1, 1, 1, 1, 0, 0, 0, 0, 0]]).reshape(1, 5, 2)
LABELS = jnp.array([[1, 1, 0, 0, 0, 1, 0, 0, 0, 0]]).reshape(1, 5, 2)
EMPTY = jnp.zeros_like(LABELS)
FULL = jnp.ones_like(LABELS)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (metrics.dice, 2 * 2 / (2 * 2 + 3 + 1)),
        (metrics.iou, 2 / (2 + 3 + 1)),
        (metrics.sensitivity, 2 / (2 + 1)),
        (metrics.specificity, 4 / (4 + 3)),
        (metrics.precision, 2 / (2 + 3)),
    ],
)
def test_each_metric_is_its_ratio(metric, expected):
    value = metric(metrics.confusion_counts(PREDICTION, LABELS))
    assert value.shape == (1, 1)
    assert value.item() == pytest.approx(expected, rel=1e-6)


NAN = float("nan")


@pytest.mark.parametrize(
    ("metric", "both_empty", "no_prediction", "no_label", "full_label"),
    [
        (metrics.dice, NAN, 0, 0, 1),
        (metrics.iou, NAN, 0, 0, 1),
        (metrics.sensitivity, NAN, 0, NAN, 1),
        (metrics.precision, NAN, NAN, 0, 1),
        (metrics.specificity, 1, 1, 5 / 10, NAN),
    ],
)
def test_empty_masks_follow_the_table(metric, both_empty, no_prediction, no_label, full_label):
    prediction = jnp.concatenate([EMPTY, EMPTY, PREDICTION, FULL])
    labels = jnp.concatenate([EMPTY, LABELS, EMPTY, FULL])
    values = metric(metrics.confusion_counts(prediction, labels))[:, 0]
    np.testing.assert_allclose(values, [both_empty, no_prediction, no_label, full_label])


def test_every_foreground_class_is_counted_against_the_rest():
    prediction = jnp.array([[[0, 1, 2, 2, 3, 0]]])
    labels = jnp.array([[[0, 1, 1, 2, 2, 0]]])
    counts = metrics.confusion_counts(prediction, labels, num_classes=4)
    np.testing.assert_array_equal(counts.tp, [[1, 1, 0]])
    np.testing.assert_array_equal(counts.fp, [[0, 1, 1]])
    np.testing.assert_array_equal(counts.fn, [[1, 1, 0]])
    np.testing.assert_array_equal(counts.tn, [[4, 3, 5]])


@pytest.mark.parametrize("num_classes", [1, 2])
def test_one_and_two_channels_have_one_foreground_class(num_classes):
    counts = metrics.confusion_counts(PREDICTION, LABELS, num_classes=num_classes)
    assert [count.tolist() for count in counts] == [[[2]], [[3]], [[1]], [[4]]]


def test_voxel_mask_leaves_voxels_out_of_every_count():
    inside = jnp.arange(10).reshape(1, 5, 2) < 4
    counts = metrics.confusion_counts(PREDICTION, LABELS, voxel_mask=inside)
    # Of the first four voxels two are hits and two are false alarms.
    assert [count.item() for count in counts] == [2, 2, 0, 0]


@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 6, 5)], ids=["3d", "2d"])
def test_counts_agree_with_numpy_per_case(shape):
    rng = np.random.default_rng(0)
    prediction, labels = rng.integers(0, 3, (2, *shape))
    counts = metrics.confusion_counts(jnp.asarray(prediction), jnp.asarray(labels), num_classes=3)
    for case in range(2):
        for column, c in enumerate([1, 2]):
            p, t = prediction[case] == c, labels[case] == c
            expected = [(p & t).sum(), (p & ~t).sum(), (~p & t).sum(), (~p & ~t).sum()]
            assert [count[case, column] for count in counts] == expected


def test_counts_are_exact_where_float32_would_not_be():
    num_voxels = 2**24 + 1
    everything = jnp.ones((1, num_voxels, 1), jnp.uint8)
    counts = metrics.confusion_counts(everything, everything)
    assert counts.tp.dtype == jnp.int32
    assert counts.tp.item() == num_voxels


@pytest.mark.parametrize(
    ("prediction", "labels", "keywords", "message"),
    [
        (EMPTY, EMPTY[:, :4], {}, r"shape of labels, \(1, 4, 2\), got \(1, 5, 2\)\."),
        (EMPTY * 0.5, EMPTY, {}, r"prediction must hold classes, .*got float32\."),
        (EMPTY, EMPTY * 0.5, {}, r"labels must hold classes, .*got float32\."),
        (EMPTY, EMPTY, {"num_classes": 0}, r"num_classes must be at least 1, got 0\."),
        (EMPTY, EMPTY, {"voxel_mask": FULL[0] > 0}, r"voxel_mask must .*got \(5, 2\)\."),
    ],
    ids=["shape", "prediction", "labels", "num_classes", "voxel_mask"],
)
def test_bad_counts_are_refused(prediction, labels, keywords, message):
    with pytest.raises(ValueError, match=message):
        metrics.confusion_counts(prediction, labels, **keywords)


def test_nan_mean_leaves_undefined_values_out_and_counts_the_rest():
    values = jnp.array([[0.5, NAN, NAN], [1.0, 0.25, NAN]])
    mean, count = metrics.nan_mean(values)
    np.testing.assert_allclose(mean, [(0.5 + 1.0) / 2, 0.25, NAN])
    np.testing.assert_array_equal(count, [2, 1, 0])
    mean, count = metrics.nan_mean(values, axis=None)
    assert mean.item() == pytest.approx((0.5 + 1.0 + 0.25) / 3)
    assert count.item() == 3


def test_soft_metrics_are_their_formulas():
    probs = jnp.array([[[0.9, 0.2], [0.4, 0.7]]])  # [1, 2 voxels, 2 channels]
    labels = jnp.array([[0, 1]])
    background = (2 * 0.9 + 1e-5) / (0.9**2 + 0.4**2 + 1 + 1e-5)
    foreground = (2 * 0.7 + 1e-5) / (0.2**2 + 0.7**2 + 1 + 1e-5)
    expected = (background + foreground) / 2
    assert metrics.soft_dice(probs, labels).item() == pytest.approx(expected, rel=1e-6)

    background = (2 * 0.9 + 1e-5) / (2 * (0.9**2 + 0.4**2 + 1 - 0.9) + 1e-5)
    foreground = (2 * 0.7 + 1e-5) / (2 * (0.2**2 + 0.7**2 + 1 - 0.7) + 1e-5)
    expected = (background + foreground) / 2
    assert metrics.soft_iou(probs, labels).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("soft", [metrics.soft_dice, metrics.soft_iou])
def test_one_channel_stands_for_background_and_foreground(soft):
    foreground = jax.random.uniform(jax.random.key(0), (2, 4, 3, 2, 1))
    labels = jax.random.bernoulli(jax.random.key(1), 0.3, (2, 4, 3, 2)).astype(jnp.int32)
    both = jnp.concatenate([1 - foreground, foreground], axis=-1)
    np.testing.assert_allclose(soft(foreground, labels), soft(both, labels), rtol=1e-6)


@pytest.mark.parametrize("soft", [metrics.soft_dice, metrics.soft_iou])
def test_soft_metrics_are_finite_without_foreground(soft):
    labels = jnp.zeros((1, 4, 4), jnp.int32)
    perfect = jax.nn.one_hot(labels, 2)
    assert soft(perfect, labels).item() == pytest.approx(1.0)


def test_soft_metrics_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"labels must .*\(1, 4, 4\), got \(1, 4\)\."):
        metrics.soft_dice(jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 4), jnp.int32))
