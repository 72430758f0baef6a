"""Every loss goes through one table; then what each loss promises for itself."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import GOLDEN, golden_case
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from afl_jax.losses import LOSSES, adaptive_focal_loss, focal_loss
from afl_jax.statistics import focusing_gamma

# Against float64: a float32 mean over a small volume, in whatever order a compiler sums it.
RTOL = 3e-6

# --- the table ------------------------------------------------------------------------------

# id -> name in LOSSES, options, numbers of channels. A new loss gets at least one row here and an
# oracle of the same name in oracles.LOSSES, and so every test below.
TABLE = {
    "afl_voxel": ("adaptive_focal", {"balance": "voxel"}, (1, 2, 3)),
    "afl_volume": ("adaptive_focal", {"balance": "volume"}, (1, 2, 3)),
    "afl_channel": ("adaptive_focal", {"balance": "channel"}, (1, 2)),
    "afl_surface": ("adaptive_focal", {"region": "surface", "scale": 4.0}, (2,)),
    "irregularity": ("irregularity_focal", {}, (1, 2, 3)),
    "irregularity_volume": (
        "irregularity_focal",
        {"scale": 2.0, "base": 0.5, "alpha": None, "balance": "volume"},
        (2,),
    ),
    "focal": ("focal", {}, (1, 2, 3)),
    "focal_alpha": ("focal", {"gamma": 0.5, "alpha": 0.8}, (1, 2, 3)),
    "ce": ("cross_entropy", {}, (1, 2, 3)),
    "bce": ("cross_entropy", {"activation": "sigmoid"}, (2, 3)),
    "top_k": ("top_k_cross_entropy", {}, (1, 2, 3)),
    "top_k_bce": ("top_k_cross_entropy", {"fraction": 0.3, "activation": "sigmoid"}, (2,)),
    "dice": ("dice", {}, (1, 2, 3)),
    "dice_softmax": ("dice", {"exponent": 1, "activation": "softmax"}, (2, 3)),
    "iou": ("iou", {}, (1, 2, 3)),
    "iou_plain": ("iou", {"exponent": 1}, (2,)),
    "generalised_dice": ("generalised_dice", {}, (1, 2, 3)),
    "tversky": ("tversky", {}, (1, 2, 3)),
    "tversky_uneven": ("tversky", {"alpha": 0.2, "beta": 0.8}, (2,)),
    "focal_tversky": ("focal_tversky", {}, (1, 2, 3)),
    "dice_ce": ("dice_cross_entropy", {}, (1, 2, 3)),
    "dice_focal": ("dice_focal", {}, (1, 2, 3)),
    "unified_focal": ("unified_focal", {}, (1, 2, 3)),
    "boundary": ("boundary", {}, (1, 2, 3)),
    "dice_boundary": ("dice_boundary", {}, (2,)),
}
# Losses between 0 and a bound, which do not grow with a wrong logit.
BOUNDED = {
    *("boundary", "dice", "dice_boundary", "dice_softmax", "focal_tversky", "generalised_dice"),
    *("iou", "iou_plain", "tversky", "tversky_uneven"),
}
# Under a softmax of three and more channels a region loss may gain by moving a voxel from one
# wrong class to another.
COMPETING = {"dice_ce", "dice_softmax", "unified_focal"}
# Losses that see some of the voxels only.
SPARSE = {"top_k", "top_k_bce"}
BATCH = 2
SPATIAL = {"2d": (5, 6), "3d": (4, 5, 3)}
ROWS = [
    (row, num_channels, rank)
    for row, (_, _, channels) in TABLE.items()
    for num_channels in channels
    for rank in SPATIAL
    if rank == "3d" or num_channels == 2  # every compilation costs time
]
every_row = pytest.mark.parametrize(
    ("row", "num_channels", "rank"), ROWS, ids=["-".join(map(str, row)) for row in ROWS]
)
every_loss = pytest.mark.parametrize("row", TABLE)
# With a voxel mask: 2D with 2 channels and 3D with as many as the loss takes.
MASKED_ROWS = [
    (row, num_channels, rank)
    for row, num_channels, rank in ROWS
    if num_channels == (2 if rank == "2d" else max(TABLE[row][2]))
]
every_loss_masked = pytest.mark.parametrize(("row", "num_channels", "rank"), MASKED_ROWS)


def loss_of(row: str):
    name, options, _ = TABLE[row]
    return functools.partial(LOSSES[name], **options)


def expected_of(row: str, logits: np.ndarray, labels: np.ndarray) -> list[float]:
    name, options, _ = TABLE[row]
    return [oracles.LOSSES[name](x, y, **options) for x, y in zip(logits, labels, strict=True)]


@functools.cache
def compiled(row: str):
    """``(logits, labels) -> ([B], gradient of their sum)``, compiled once for all tests."""

    def total(logits, labels):
        values = loss_of(row)(logits, labels)
        return values.sum(), values

    gradient = jax.grad(total, has_aux=True)
    return jax.jit(lambda logits, labels: gradient(logits, labels)[::-1])


@functools.cache
def compiled_masked(row: str):
    """``(logits, float labels, voxel_mask) -> ([B], gradient of their sum for both)``."""

    def total(logits, labels, voxel_mask):
        values = loss_of(row)(logits, labels, voxel_mask=voxel_mask)
        return values.sum(), values

    gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
    return jax.jit(lambda *arguments: gradient(*arguments)[::-1])


def random_labels(
    num_channels: int, spatial: tuple[int, ...], *, seed: int = 0, batch: int = BATCH
):
    """Labels in which every class occurs in every volume."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, max(num_channels, 2), (batch, *spatial), dtype=np.int32)
    labels.reshape(batch, -1)[:, : max(num_channels, 2)] = np.arange(max(num_channels, 2))
    return labels


def random_case(
    num_channels: int, rank: str, *, seed: int = 0, scale: float = 2.0, batch: int = BATCH
):
    """Logits and labels as numpy; in float32."""
    labels = random_labels(num_channels, SPATIAL[rank], seed=seed, batch=batch)
    rng = np.random.default_rng(seed + 1)
    logits = scale * rng.standard_normal((*labels.shape, num_channels))
    return logits.astype(np.float32), labels


def correct_sign(labels: np.ndarray, num_channels: int) -> np.ndarray:
    """+1 for a channel that should be high at a voxel, -1 for one that should be low."""
    truths = np.stack(oracles.channel_truths(labels, num_channels), axis=-1)
    return np.where(truths, 1.0, -1.0).astype(np.float32)


def test_every_loss_is_in_the_table_and_has_an_oracle():
    assert {name for name, _, _ in TABLE.values()} == set(LOSSES) == set(oracles.LOSSES)
    balances = inspect.signature(adaptive_focal_loss, eval_str=True).parameters["balance"]
    in_table = {options["balance"] for _, options, _ in TABLE.values() if "balance" in options}
    assert in_table == set(balances.annotation.__args__)


# --- value and gradient ------------------------------------------------------------------------


@every_row
def test_value_is_the_oracle(row, num_channels, rank):
    logits, labels = random_case(num_channels, rank)
    values, _ = compiled(row)(logits, labels)
    assert (values.shape, values.dtype) == ((BATCH,), jnp.float32)
    np.testing.assert_allclose(values, expected_of(row, logits, labels), rtol=RTOL)


@every_loss
def test_jit_is_eager(row):
    logits, labels = random_case(2, "3d")
    eager = loss_of(row)(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(compiled(row)(logits, labels)[0], eager, rtol=RTOL)


@every_row
def test_gradient_is_that_of_the_oracle(row, num_channels, rank):
    logits, labels = random_case(num_channels, rank)
    _, gradient = compiled(row)(logits, labels)
    rng = np.random.default_rng(7)
    wide = logits.astype(np.float64)
    for direction in rng.standard_normal((3, *logits.shape)):
        step = 1e-5 * direction
        ahead, behind = (np.sum(expected_of(row, wide + s, labels)) for s in (step, -step))
        slope = (ahead - behind) / 2e-5
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(np.vdot(gradient, direction) - slope) < 1e-5 * scale


@every_loss
def test_check_grads(row, x64):
    num_channels = max(TABLE[row][2])
    logits, labels = random_case(num_channels, "3d")
    logits = jnp.asarray(logits, jnp.float64)
    loss = jax.jit(lambda x: loss_of(row)(x, labels))
    check_grads(loss, (logits,), order=1, modes=["rev"], atol=1e-8, rtol=1e-6)


@every_loss
def test_batch_is_stacked_singles(row):
    logits, labels = random_case(2, "3d")
    labels[1, 2:] = 0  # another size and smoothness
    values, gradient = compiled(row)(logits, labels)
    for b in range(BATCH):
        value, single = compiled(row)(logits[b : b + 1], labels[b : b + 1])
        np.testing.assert_allclose(values[b], value[0], rtol=RTOL)
        np.testing.assert_allclose(gradient[b], single[0], rtol=1e-5, atol=1e-9)


@every_loss
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_the_number_of_devices_does_not_matter(row, num_devices):
    logits, labels = random_case(2, "3d", batch=4)
    shards = [x.reshape(num_devices, -1, *x.shape[1:]) for x in (logits, labels)]
    values = jax.pmap(loss_of(row), devices=jax.devices()[:num_devices])(*shards)
    assert values.shape == (num_devices, 4 // num_devices)
    np.testing.assert_allclose(values.ravel(), expected_of(row, logits, labels), rtol=RTOL)


# --- extremes -----------------------------------------------------------------------------------


def labels_of_kind(kind: str, num_channels: int, rank: str) -> np.ndarray:
    labels = random_labels(num_channels, SPATIAL[rank])
    return {"mixed": labels, "no foreground": 0 * labels, "all foreground": 0 * labels + 1}[kind]


def assert_finite(row: str, logits: jax.Array, labels: np.ndarray):
    values, gradient = compiled(row)(logits, labels)
    assert gradient.dtype == logits.dtype
    assert np.isfinite(values).all()
    assert np.isfinite(gradient.astype(jnp.float32)).all()
    assert (np.asarray(values) >= 0).all()


@every_row
@pytest.mark.parametrize("kind", ["mixed", "no foreground", "all foreground"])
def test_finite_in_float32(row, num_channels, rank, kind):
    labels = labels_of_kind(kind, num_channels, rank)
    sign = correct_sign(labels, num_channels)
    noise = np.sign(random_case(num_channels, rank)[0])
    # 87 to 104 is where exp and its gradient leave the normal and the subnormal numbers.
    for size in (0.0, 1.0, 88.0, 104.0, 1e4, 1e30, float(jnp.finfo(jnp.float32).max)):
        for direction in (sign, -sign, noise):
            assert_finite(row, jnp.asarray(size * direction, jnp.float32), labels)


@every_loss
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(row, dtype):
    for kind in ("mixed", "no foreground", "all foreground"):
        labels = labels_of_kind(kind, 2, "3d")
        sign = correct_sign(labels, 2)
        for size in (0.0, 12.0, 1e4, float(jnp.finfo(dtype).max)):
            for direction in (sign, -sign):
                assert_finite(row, jnp.asarray(size * direction, dtype), labels)
    # Rounded logits, but float32 from there on.
    logits, labels = random_case(2, "3d")
    half = jnp.asarray(logits, dtype)
    values, _ = compiled(row)(half, labels)
    assert values.dtype == jnp.float32
    expected = expected_of(row, np.asarray(half, np.float64), labels)
    np.testing.assert_allclose(values, expected, rtol=RTOL)


@every_row
def test_a_wrong_extreme_logit_costs_its_size(row, num_channels, rank):
    """Far out a loss is linear, but for a constant, or constant: it never overflows."""
    labels = random_labels(num_channels, SPATIAL[rank])
    wrong = -correct_sign(labels, num_channels)
    at_1e4, gradient = compiled(row)(1e4 * wrong, labels)
    at_2e4, at_4e4 = (compiled(row)(size * wrong, labels)[0] for size in (2e4, 4e4))
    assert (np.asarray(at_1e4) > 0).all()
    np.testing.assert_allclose(at_4e4 - at_2e4, 2 * (at_2e4 - at_1e4), rtol=1e-5)
    np.testing.assert_allclose(
        np.vdot(gradient, 1e4 * wrong), np.sum(at_2e4 - at_1e4), rtol=1e-5, atol=1e-9
    )
    assert (np.asarray(at_2e4 - at_1e4) > 0).all() == (row not in BOUNDED)


@every_row
def test_a_perfect_prediction_costs_nothing_in_the_limit(row, num_channels, rank):
    for kind in ("mixed", "no foreground", "all foreground"):
        labels = labels_of_kind(kind, num_channels, rank)
        sign = correct_sign(labels, num_channels)
        sizes = [0.0, 1.0, 5.0, 10.0, 20.0, 40.0]
        values = np.array([compiled(row)(size * sign, labels)[0] for size in sizes])
        assert (np.diff(values, axis=0) <= 0).all()
        assert (values[-1] < 1e-8).all()
        if kind == "mixed":
            # Until a focal factor underflows.
            assert (np.diff(values[:4], axis=0) < 0).all()
        value, gradient = compiled(row)(1e4 * sign, labels)
        assert not value.any()
        assert not gradient.any()


# --- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "num_channels", "rank"),
    [case for case in ROWS if case[1] < 3 or case[0] not in COMPETING],
)
def test_decreasing_in_the_correct_logit(row, num_channels, rank):
    logits, labels = random_case(num_channels, rank)
    _, gradient = compiled(row)(logits, labels)
    slopes = np.asarray(gradient) * correct_sign(labels, num_channels)
    # No weight is 0 in a mixed volume.
    assert (slopes <= 0).all() if row in SPARSE else (slopes < 0).all()


@every_row
def test_flips_do_not_matter(row, num_channels, rank):
    logits, labels = random_case(num_channels, rank)
    values, gradient = compiled(row)(logits, labels)
    for axis in range(1, labels.ndim):
        flipped, flipped_gradient = compiled(row)(np.flip(logits, axis), np.flip(labels, axis))
        np.testing.assert_allclose(flipped, values, rtol=RTOL)
        np.testing.assert_allclose(np.flip(flipped_gradient, axis), gradient, rtol=3e-5, atol=1e-8)


@every_loss
@pytest.mark.parametrize("rank", SPATIAL)
def test_the_order_of_the_axes_does_not_matter(row, rank):
    logits, labels = random_case(2, rank)
    # One cyclic step moves every axis: for 2D that is the transpose.
    order = [0, *range(2, labels.ndim), 1]
    turned, _ = compiled(row)(logits.transpose(*order, labels.ndim), labels.transpose(order))
    np.testing.assert_allclose(turned, compiled(row)(logits, labels)[0], rtol=RTOL)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(ROWS),
    seed=st.integers(0, 2**31 - 1),
    scale=st.sampled_from([1e-3, 1.0, 10.0, 100.0, 1e4, 1e30, 3e38]),
    foreground=st.floats(0, 1),
    label_dtype=st.sampled_from([np.int8, np.uint8, np.int32]),
)
def test_properties(case, seed, scale, foreground, label_dtype):
    row, num_channels, rank = case
    rng = np.random.default_rng(seed)
    shape = (BATCH, *SPATIAL[rank])
    labels = rng.integers(1, max(num_channels, 2), shape) * (rng.random(shape) < foreground)
    labels = labels.astype(label_dtype)
    logits = (scale * rng.uniform(-1, 1, (*shape, num_channels))).astype(np.float32)
    values, gradient = map(np.asarray, compiled(row)(logits, labels))
    assert np.isfinite(values).all()
    assert np.isfinite(gradient).all()
    assert (values >= 0).all()
    if scale <= 10:
        np.testing.assert_allclose(values, expected_of(row, logits, labels), rtol=1e-5, atol=1e-12)
    if num_channels > 2 and row in COMPETING:
        return
    assert (gradient * correct_sign(labels, num_channels) <= 0).all()
    # Better at one voxel is never worse.
    voxel = tuple(rng.integers(0, shape))
    better = logits.copy()
    better[voxel] += np.float32(0.1 * scale) * correct_sign(labels, num_channels)[voxel]
    better = np.clip(better, -3.4e38, 3.4e38)
    improved = compiled(row)(better, labels)[0]
    assert (np.asarray(improved) <= values * (1 + 1e-6)).all()


# --- voxel_mask ----------------------------------------------------------------------------------


@every_loss_masked
def test_a_padded_volume_under_its_mask_is_the_volume(row, num_channels, rank):
    logits, labels = random_case(num_channels, rank)
    inner = (slice(None), *[slice(1, None), slice(0, -1), slice(0, None)][: labels.ndim - 1])
    inside = np.zeros(labels.shape, bool)
    inside[inner] = True
    # The padding holds lesion and the worst of logits.
    labels[~inside] = 1
    logits[~inside] = -1e4
    values, (gradient, _) = compiled_masked(row)(logits, labels.astype(np.float32), inside)
    np.testing.assert_allclose(values, expected_of(row, logits[inner], labels[inner]), rtol=RTOL)
    gradient = np.array(gradient)
    assert gradient[inside].any() if row in SPARSE else gradient[inside].all()
    assert not gradient[~inside].any()
    if rank == "2d":
        _, expected = compiled(row)(logits[inner], labels[inner])
        np.testing.assert_allclose(gradient[inner], expected, rtol=1e-5, atol=1e-9)


@every_loss_masked
def test_a_volume_of_which_no_voxel_counts_costs_nothing(row, num_channels, rank):
    logits, labels = random_case(num_channels, rank)
    inside = np.ones(labels.shape, bool)
    inside[1] = False
    values, (gradient, _) = compiled_masked(row)(logits, labels.astype(np.float32), inside)
    np.testing.assert_allclose(values, [*expected_of(row, logits, labels)[:1], 0], rtol=RTOL)
    assert np.any(gradient[0]) if row in SPARSE else np.all(gradient[0])
    assert not np.any(gradient[1])


@every_loss_masked
def test_no_gradient_flows_to_the_labels(row, num_channels, rank):
    logits, labels = random_case(num_channels, rank)
    inside = random_labels(1, SPATIAL[rank], seed=5) > 0
    _, (_, gradient) = compiled_masked(row)(logits, labels.astype(np.float32), inside)
    np.testing.assert_array_equal(gradient, np.zeros(labels.shape))


# --- the adaptive focal loss: the authors' numbers ---------------------------------------------


@functools.partial(jax.jit, static_argnames=("balance",))
def mean_and_gradient(logits, labels, gamma=None, alpha=None, *, balance="channel"):
    def mean(x):
        return adaptive_focal_loss(x, labels, gamma=gamma, alpha=alpha, balance=balance).mean()

    return jax.value_and_grad(mean)(logits)


def assert_golden(path):
    golden = dict(np.load(path))
    for index, name in enumerate(golden["names"]):
        logits, labels = golden_case(golden, name)
        overrides = ()
        if len(labels) > 1:
            # The authors pool a batch: smoothness of the first volume, counts of all of them.
            fore, back = golden["fore"][index], golden["back"][index]
            gamma = golden["smoothness"][index] + fore / (fore + back)
            overrides = (jnp.float32(gamma), jnp.float32(back / (fore + back)))
        value, gradient = mean_and_gradient(logits, labels, *overrides)
        theirs = golden["afl_value"][index]
        their_gradient = np.moveaxis(golden[f"grad_{name}"], 1, -1)
        if not 0 < golden["fore"][index] < labels.size:
            # The authors divide by the count of the absent class.
            assert np.isnan(theirs)
            assert np.isnan(their_gradient).any()
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()
            continue
        np.testing.assert_allclose(value, theirs, rtol=1e-5, err_msg=name)
        largest = np.abs(their_gradient).max()
        np.testing.assert_allclose(
            gradient / largest, their_gradient / largest, rtol=0, atol=1e-5, err_msg=name
        )


def assert_golden_focal(path):
    golden = dict(np.load(path))
    for index, name in enumerate(golden["names"]):
        value = jax.jit(focal_loss)(*golden_case(golden, name)).mean()
        theirs = golden["focal_default_value"][index]
        # n_empty_confident is right everywhere, by up to 12.6: a loss of 2.761e-16, of which the
        # authors' float32 x - x * t + log(1 + exp(-x)) has lost digits by cancellation (2.764e-16).
        # The floor is 0.4 % of it, and nothing beside the other cases.
        np.testing.assert_allclose(value, theirs, rtol=1e-5, atol=1e-18, err_msg=name)


def test_the_authors_numbers():
    assert_golden(GOLDEN / "afl_loss.npz")


@pytest.mark.real_data
def test_the_authors_numbers_on_real_masks(reference):
    assert_golden(reference / "afl_loss.npz")


def test_the_authors_focal_loss():
    assert_golden_focal(GOLDEN / "afl_loss.npz")


@pytest.mark.real_data
def test_the_authors_focal_loss_on_real_masks(reference):
    assert_golden_focal(reference / "afl_loss.npz")


# --- the adaptive focal loss: where alpha weighs --------------------------------------------------

LOG_2 = math.log(2)
compiled_afl = jax.jit(adaptive_focal_loss, static_argnames="balance")


@pytest.mark.parametrize(
    ("balance", "num_channels", "mean_weight"),
    [
        # 6 of 60 voxels are foreground: alpha = 54 / 60.
        ("voxel", 1, 6 / 60 * 54 / 60 + 54 / 60 * 6 / 60),
        ("voxel", 2, 6 / 60 * 54 / 60 + 54 / 60 * 6 / 60),
        ("volume", 1, 54 / 60),
        ("volume", 2, 54 / 60),
        ("channel", 1, 6 / 60),
        ("channel", 2, (54 / 60 + 6 / 60) / 2),
        # Classes 1 and 2 of 4 and 2 voxels; background against their union of 6.
        ("voxel", 3, 2 * (6 * 54 + 4 * 56 + 2 * 58) / 60**2 / 3),
        ("volume", 3, (54 / 60 + 56 / 60 + 58 / 60) / 3),
    ],
)
def test_weights_by_hand(balance, num_channels, mean_weight):
    labels = jnp.zeros((1, 60), jnp.int32).at[0, :4].set(1).at[0, 4:6].set(2)
    labels = labels.reshape(1, 3, 4, 5)
    # At logit 0 every p_t is 1/2: each voxel costs (1/2)^gamma log 2 times its weight.
    logits = jnp.zeros((*labels.shape, num_channels))
    value = compiled_afl(logits, labels, gamma=3.0, balance=balance)
    np.testing.assert_allclose(value, [mean_weight * 0.5**3 * LOG_2], rtol=RTOL)


def test_alpha_weighs_foreground_and_its_complement_background():
    labels = jnp.array([[[1, 0]]])
    gradient = jax.grad(lambda x: compiled_afl(x, labels, gamma=0.0, alpha=0.9).sum())
    # At gamma 0 and logit 0 the slope of -log(p_t) is 1/2; the mean is over 2 voxels.
    np.testing.assert_allclose(
        gradient(jnp.zeros((1, 1, 2, 1))).ravel(), [-0.9 / 2 / 2, 0.1 / 2 / 2], rtol=1e-6
    )


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4])
@pytest.mark.parametrize("balance", ["voxel", "volume"])
def test_absent_classes_keep_the_loss_finite_and_as_stated(balance, num_channels):
    """No foreground: alpha = 1 and gamma = 0."""
    logits, labels = random_case(num_channels, "2d")
    value = compiled_afl(logits, 0 * labels, balance=balance)
    cross_entropy = [oracles.focal(x, np.zeros(x.shape[:-1]), gamma=0.0) for x in logits]
    expected = {"voxel": [0, 0], "volume": cross_entropy}[balance]
    np.testing.assert_allclose(value, expected, rtol=RTOL)


@pytest.mark.parametrize("num_channels", [3, 4])
@pytest.mark.parametrize("balance", ["voxel", "volume"])
def test_each_class_has_statistics_of_its_own(balance, num_channels):
    logits, labels = random_case(num_channels, "3d", seed=3)
    labels[0] = np.where(labels[0] == 1, 0, labels[0])  # class 1 is absent from one volume
    values = compiled_afl(logits, labels, balance=balance)
    expected = [
        oracles.adaptive_focal(x, y, balance=balance) for x, y in zip(logits, labels, strict=True)
    ]
    np.testing.assert_allclose(values, expected, rtol=RTOL)


def test_up_to_two_channels_every_label_above_0_is_foreground():
    logits, labels = random_case(2, "3d")
    for loss in LOSSES.values():
        for num_channels in (1, 2):
            channels = jnp.asarray(logits[..., :num_channels])
            np.testing.assert_array_equal(
                loss(channels, jnp.asarray(5 * labels)), loss(channels, jnp.asarray(labels))
            )


# --- the adaptive focal loss: overrides ----------------------------------------------------------


def statistics_of(function, labels: np.ndarray, num_channels: int) -> np.ndarray:
    """``[B, K]``: of the union for the background channel, of its own mask for each class."""
    truths = oracles.channel_truths(labels, num_channels)
    masks = [labels > 0, *truths[1:]] if num_channels > 1 else truths
    return np.array([[function(m[b]) for m in masks] for b in range(len(labels))], np.float32)


@pytest.mark.parametrize("num_channels", [1, 2, 3])
@pytest.mark.parametrize("balance", ["voxel", "volume"])
def test_overrides_of_every_shape_reproduce_the_statistics(num_channels, balance):
    logits, labels = random_case(num_channels, "2d")
    # Two volumes of different size and smoothness: [B] must not be read as [K] where B = K.
    labels[1, 2:] = 0
    loss = functools.partial(compiled_afl, balance=balance)
    expected = loss(logits, labels)
    gamma = statistics_of(oracles.focusing_gamma, labels, num_channels)
    alpha = statistics_of(oracles.balancing_alpha, labels, num_channels)
    assert gamma[0, 0] != gamma[1, 0]
    close = functools.partial(np.testing.assert_allclose, rtol=RTOL)
    close(loss(logits, labels, gamma=gamma, alpha=alpha), expected)
    close(loss(logits, labels, gamma=gamma), expected)
    close(loss(logits, labels, alpha=alpha), expected)
    if num_channels < 3:
        close(loss(logits, labels, gamma=gamma[:, 0], alpha=alpha[:, 0]), expected)
        for b in range(BATCH):
            one = slice(b, b + 1)
            numbers = {"gamma": gamma[b, 0].item(), "alpha": alpha[b, 0].item()}
            close(loss(logits[one], labels[one], **numbers), expected[one])


@pytest.mark.parametrize("balance", ["voxel", "volume", "channel"])
@pytest.mark.parametrize(
    ("gamma", "alpha"),
    [(2, 0.25), ([0.5, 3.0], [0.2, 0.7]), ([[0.5, 1.0], [2.0, 0.0]], [[0.1, 0.2], [0.3, 0.9]])],
    ids=["number", "[B]", "[B, K]"],
)
def test_overrides_are_used_as_given(balance, gamma, alpha):
    logits, labels = random_case(2, "3d")
    if isinstance(gamma, list):
        per_volume = list(zip(np.array(gamma), np.array(alpha), strict=True))
        gamma, alpha = jnp.array(gamma), jnp.array(alpha)
    else:
        per_volume = [(gamma, alpha)] * BATCH
    values = compiled_afl(logits, labels, gamma=gamma, alpha=alpha, balance=balance)
    expected = [
        oracles.adaptive_focal(x, y, gamma=g, alpha=a, balance=balance)
        for x, y, (g, a) in zip(logits, labels, per_volume, strict=True)
    ]
    np.testing.assert_allclose(values, expected, rtol=RTOL)


def test_scale_and_region_are_those_of_gamma():
    logits, labels = map(jnp.asarray, random_case(2, "3d"))
    options = {"region": "surface", "scale": 4.0}
    np.testing.assert_allclose(
        adaptive_focal_loss(logits, labels, **options),
        adaptive_focal_loss(logits, labels, gamma=focusing_gamma(labels, **options)),
        rtol=RTOL,
    )


# --- the focal loss by hand -----------------------------------------------------------------------


def test_focal_loss_by_hand():
    labels = jnp.array([[[1, 0, 0]]])
    # p = 3/4 for the foreground voxel, 1/4 and 1/2 for the background voxels.
    logits = jnp.array([math.log(3), -math.log(3), 0.0]).reshape(1, 1, 3, 1)
    costs = [(1 / 4) ** 2 * math.log(4 / 3)] * 2 + [(1 / 2) ** 2 * math.log(2)]
    np.testing.assert_allclose(focal_loss(logits, labels), [sum(costs) / 3], rtol=1e-6)
    weighted = (0.9 * costs[0] + 0.1 * costs[1] + 0.1 * costs[2]) / 3
    np.testing.assert_allclose(focal_loss(logits, labels, alpha=0.9), [weighted], rtol=1e-6)
    cross_entropy = (2 * math.log(4 / 3) + math.log(2)) / 3
    np.testing.assert_allclose(focal_loss(logits, labels, gamma=0), [cross_entropy], rtol=1e-6)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("logits_shape", "labels_shape", "mask_shape", "message"),
    [
        (
            (2, 4, 5),
            (2, 4),
            None,
            "logits must have shape [B, X, Y, Z, K] or [B, X, Y, K], got (2, 4, 5).",
        ),
        (
            (2, 4, 5, 3, 2),
            (2, 4, 5, 3, 1),
            None,
            "labels must have shape (2, 4, 5, 3), that of the logits without channels, "
            "got (2, 4, 5, 3, 1).",
        ),
        (
            (2, 4, 5, 3, 2),
            (1, 4, 5, 3),
            None,
            "labels must have shape (2, 4, 5, 3), that of the logits without channels, "
            "got (1, 4, 5, 3).",
        ),
        (
            (2, 4, 5, 3, 2),
            (2, 4, 5, 3),
            (4, 5, 3),
            "voxel_mask must have the shape of labels = (2, 4, 5, 3), got (4, 5, 3).",
        ),
    ],
    ids=["rank", "label channel", "label batch", "voxel_mask"],
)
def test_a_wrong_shape_is_named(name, logits_shape, labels_shape, mask_shape, message):
    mask = None if mask_shape is None else jnp.ones(mask_shape)
    with pytest.raises(ValueError) as error:
        LOSSES[name](jnp.zeros(logits_shape), jnp.zeros(labels_shape), voxel_mask=mask)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("num_channels", "options", "message"),
    [
        (
            2,
            {"balance": "none"},
            "balance must be one of ('voxel', 'volume', 'channel'), got 'none'.",
        ),
        (
            3,
            {"balance": "channel"},
            "balance='channel' is defined for 1 or 2 channels, got 3: use 'voxel' or 'volume'.",
        ),
        (
            2,
            {"gamma": jnp.ones(3)},
            "gamma must be a number or have shape [B] = (2,) or [B, K] = (2, 2), got (3,).",
        ),
        (
            3,
            {"alpha": jnp.ones((2, 1))},
            "alpha must be a number or have shape [B] = (2,) or [B, K] = (2, 3), got (2, 1).",
        ),
        (
            2,
            {"gamma": 1.0, "alpha": 0.5, "voxel_mask": jnp.ones((2, 5, 1))},
            "voxel_mask must have the shape of labels = (2, 5, 6), got (2, 5, 1).",
        ),
    ],
    ids=["balance", "channel", "gamma", "alpha", "voxel_mask without statistics"],
)
def test_a_wrong_option_is_named(num_channels, options, message):
    logits, labels = map(jnp.asarray, random_case(num_channels, "2d"))
    with pytest.raises(ValueError) as error:
        adaptive_focal_loss(logits, labels, **options)
    assert str(error.value) == message
