"""The losses beside A-FL: the authors' numbers, and what each promises for itself."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import GOLDEN, golden_case

from afl_jax.irregularity import surface_irregularity
from afl_jax.losses import LOSSES, adaptive_focal_loss, irregularity_focal_loss
from afl_jax.losses.region import fractional_power

# --- the authors' numbers -----------------------------------------------------------------------

# Their name -> ours and its options.
BASELINES = {
    "focal": ("focal", {}),
    "tversky": ("tversky", {}),
    "dice": ("dice", {}),
    "dice_ce": ("dice_cross_entropy", {}),
    "dice_focal": ("dice_focal", {}),
    "iou_squared": ("iou", {}),
    "iou_plain": ("iou", {"exponent": 1}),
    "ce": ("cross_entropy", {}),
    "bce": ("cross_entropy", {"activation": "sigmoid"}),
}


def assert_golden_baselines(folder: Path):
    golden = dict(np.load(folder / "baseline_losses.npz"))
    inputs = dict(np.load(folder / "afl_loss.npz"))
    assert set(golden["losses"]) == set(BASELINES)
    for number, theirs in enumerate(golden["losses"]):
        name, options = BASELINES[theirs]
        loss_fn = functools.partial(LOSSES[name], **options)
        value_and_gradient = jax.jit(
            jax.value_and_grad(lambda x, y, loss_fn=loss_fn: loss_fn(x, y).mean())
        )
        for index, case in enumerate(golden["names"]):
            logits, labels = golden_case(inputs, case)
            value, gradient = value_and_gradient(logits, labels)
            where = f"{theirs}, {case}"
            # Theirs are float32, where 1 - x of a nearly perfect prediction is off by 1e-7.
            np.testing.assert_allclose(
                value, golden["values"][index, number], rtol=1e-5, atol=1e-7, err_msg=where
            )
            samples = golden["grad_samples"][index, number]
            ours = np.moveaxis(np.asarray(gradient), -1, 1).ravel()[golden["grad_idx"][index]]
            # And in the gradient by as much, over the number of elements.
            floor = 2e-7 / logits.size
            np.testing.assert_allclose(
                ours, samples, rtol=0, atol=1e-5 * np.abs(samples).max() + floor, err_msg=where
            )
            norm = np.linalg.norm(np.asarray(gradient, np.float64))
            np.testing.assert_allclose(
                norm,
                golden["grad_l2"][index, number],
                rtol=1e-5,
                atol=floor * math.sqrt(logits.size),
                err_msg=where,
            )


def test_the_authors_baselines():
    assert_golden_baselines(GOLDEN)


@pytest.mark.real_data
def test_the_authors_baselines_on_real_masks(reference):
    assert_golden_baselines(reference)


# --- by hand ------------------------------------------------------------------------------------

LOG_3 = math.log(3)


def by_hand(name: str, logits: list[float], labels: list[int], **options) -> float:
    """The loss of a volume of one row and one channel."""
    shape = (1, 1, len(labels))
    value = LOSSES[name](
        jnp.array(logits).reshape(*shape, 1), jnp.array(labels).reshape(shape), **options
    )
    return float(value[0])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # p = 3/4 and 1/4 on the lesion's two voxels, 1/4 on one of background.
        ("cross_entropy", {}, (2 * math.log(4 / 3) + math.log(4)) / 3),
        ("top_k_cross_entropy", {"fraction": 1 / 3}, math.log(4)),
        # The other two tie for the second place: half of each.
        ("top_k_cross_entropy", {"fraction": 2 / 3}, (math.log(4) + math.log(4 / 3)) / 2),
        ("dice", {"exponent": 1}, 1 - 2 * 1 / (5 / 4 + 2)),
        ("dice", {}, 1 - 2 * 1 / (11 / 16 + 2)),
        ("iou", {"exponent": 1}, 1 - 1 / (5 / 4 + 2 - 1)),
        ("generalised_dice", {}, 1 - 2 * 1 / (5 / 4 + 2)),
        ("tversky", {"alpha": 0.2, "beta": 0.8}, 1 - 1 / (1 + 0.2 / 4 + 0.8)),
        ("focal_tversky", {"gamma": 2.0}, math.sqrt(1 - 1 / (1 + 0.3 / 4 + 0.7))),
        # From the left: 2, 1 and 1 mm to a voxel of the other kind.
        ("boundary", {}, (2 / 4 + 1 * 3 / 4 + 1 / 4) / 3),
    ],
)
def test_by_hand(name, options, expected):
    value = by_hand(name, [LOG_3, -LOG_3, -LOG_3], [1, 1, 0], **options)
    assert value == pytest.approx(expected, rel=2e-5)


def test_generalised_dice_gives_an_absent_class_the_largest_weight():
    logits = np.random.default_rng(0).normal(size=(1, 4, 5, 3)).astype(np.float32)
    labels = np.zeros((1, 4, 5), int)
    labels[0, 0, :2] = 1  # Class 2 is absent.
    value = LOSSES["generalised_dice"](jnp.asarray(logits), jnp.asarray(labels))
    p = 1 / (1 + np.exp(-logits[0].astype(float)))
    t = np.stack([labels[0] == c for c in range(3)], axis=-1)
    weights = np.array([(2 / 18) ** 2, 1, 1])
    error, size = (weights @ x.sum((0, 1)) for x in (abs(p - t), p + t))
    np.testing.assert_allclose(value, [error / (size + 1e-5)], rtol=1e-5)


def test_softmax_of_two_channels_sees_their_difference_alone():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 3, 4, 2)).astype(np.float32)
    labels = jnp.asarray(rng.integers(0, 2, (1, 3, 4)))
    for name in ("cross_entropy", "top_k_cross_entropy", "dice_cross_entropy", "unified_focal"):
        loss = LOSSES[name](jnp.asarray(logits), labels)
        np.testing.assert_allclose(LOSSES[name](jnp.asarray(logits + 3), labels), loss, rtol=1e-5)


def test_a_fractional_power_has_a_finite_slope_at_0():
    power = functools.partial(fractional_power, exponent=0.5)
    value, slope = jax.vmap(jax.value_and_grad(power))(jnp.array([0.0, 0.25]))
    np.testing.assert_allclose(value, [0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(slope, [1e3, 1], rtol=1e-6)  # (1e-6)^(-1/2), then 1 / (2 * 0.5)


# --- in mm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["boundary", "dice_boundary"])
@pytest.mark.parametrize("num_channels", [1, 2, 3])
def test_a_boundary_in_mm_is_the_oracle(name, num_channels):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 6, 4, num_channels)).astype(np.float32)
    labels = rng.integers(0, max(num_channels, 2), logits.shape[:-1])
    spacings = [(0.5, 0.7, 3.0), (1.0, 1.0, 1.0)]
    values = jax.jit(LOSSES[name])(logits, labels, spacing=jnp.array(spacings))
    expected = [
        oracles.LOSSES[name](x, y, spacing=s)
        for x, y, s in zip(logits, labels, spacings, strict=True)
    ]
    np.testing.assert_allclose(values, expected, rtol=3e-6)


@pytest.mark.parametrize("balance", ["voxel", "volume"])
def test_the_irregularity_in_mm_is_that_of_gamma(balance):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 8, 8, 6, 2)).astype(np.float32))
    labels = np.zeros((2, 8, 8, 6), int)
    labels[0, 1:7, 2, 2:4] = labels[0, 2, 1:7, 2] = labels[1, 2:5, 2:5, 1:4] = 1
    labels, spacing = jnp.asarray(labels), jnp.array([[0.5, 0.5, 3.0], [1.0, 1.0, 1.0]])
    gamma = 0.5 + 2 * surface_irregularity(labels, spacing=spacing)
    assert gamma[0] > gamma[1] >= 0.5
    expected = (1 + gamma) * adaptive_focal_loss(
        logits, labels, gamma=gamma, alpha=0.6, balance=balance
    )
    options = {"scale": 2.0, "base": 0.5, "alpha": 0.6, "balance": balance}
    np.testing.assert_allclose(
        irregularity_focal_loss(logits, labels, spacing=spacing, **options), expected, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["boundary", "dice_boundary", "irregularity_focal"])
def test_a_wrong_spacing_is_named(name):
    with pytest.raises(ValueError, match=r"^spacing must have shape \(2, 3\), a number for each"):
        LOSSES[name](jnp.zeros((2, 4, 4, 4, 2)), jnp.zeros((2, 4, 4, 4)), spacing=jnp.ones(3))


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "top_k_cross_entropy",
            {"fraction": 0.0},
            "fraction must be above 0 and at most 1, got 0.0.",
        ),
        ("dice", {"exponent": 3}, "exponent must be 1 or 2, got 3."),
        ("iou", {"exponent": 0}, "exponent must be 1 or 2, got 0."),
        ("focal_tversky", {"gamma": 0.5}, "gamma must be at least 1, got 0.5."),
        ("unified_focal", {"gamma": 1.0}, "gamma must be from 0 to below 1, got 1.0."),
        (
            "irregularity_focal",
            {"scale": -1.0},
            "scale and base must not be negative, got -1.0 and 0.0.",
        ),
        (
            "cross_entropy",
            {"activation": "tanh"},
            "activation must be one of ('sigmoid', 'softmax'), got 'tanh'.",
        ),
    ],
)
def test_a_wrong_option_is_named(name, options, message):
    with pytest.raises(ValueError) as error:
        LOSSES[name](jnp.zeros((1, 2, 2, 2)), jnp.zeros((1, 2, 2)), **options)
    assert str(error.value) == message
