"""What the focal losses and the statistics promise of any input, tried on drawn ones."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afl_jax import adaptive_focal_loss, parallel, statistics
from afl_jax.losses import focal_loss

FEW = settings(max_examples=8, deadline=None, derandomize=True)
MANY = settings(max_examples=60, deadline=None, derandomize=True)

LOSSES = {
    "adaptive, voxel": adaptive_focal_loss,
    "adaptive, volume": functools.partial(adaptive_focal_loss, balance="volume"),
    "adaptive, channel": functools.partial(adaptive_focal_loss, balance="channel"),
    "focal": focal_loss,
    "focal, balanced": functools.partial(focal_loss, gamma=0.5, alpha=0.75),
}
STATISTICS = {
    "fraction": statistics.foreground_fraction,
    "alpha": statistics.balancing_alpha,
    "smoothness": statistics.surface_smoothness,
    "surface": functools.partial(statistics.surface_smoothness, region="surface"),
    "gamma": statistics.focusing_gamma,
}
LABEL_TYPES = (np.uint8, np.int32, np.float32)
LOGIT_TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
every_loss = pytest.mark.parametrize("name", LOSSES)
every_statistic = pytest.mark.parametrize("name", STATISTICS)


class Drawn(NamedTuple):
    logits: jax.Array
    labels: jax.Array
    voxel_mask: jax.Array

    @property
    def target(self) -> np.ndarray:
        """One-hot, with the rules of `afl_jax.losses`."""
        labels, num_channels = np.asarray(self.labels), self.logits.shape[-1]
        if num_channels == 1:
            return (labels > 0)[..., None]
        classes = (labels > 0) if num_channels == 2 else labels
        return classes[..., None] == np.arange(num_channels)


@st.composite
def drawn(draw, *, batch_size: int | None = None, largest: float = 3e38) -> Drawn:
    """A batch: 2D or 3D, 1 to 4 channels, any dtype, logits from tiny to the largest there are."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spatial = draw(st.lists(st.integers(1, 6), min_size=2, max_size=3))
    shape = (batch_size or draw(st.integers(1, 3)), *spatial)
    num_channels = draw(st.integers(1, 4))
    share = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    classes = rng.integers(1, max(num_channels, 2), shape)
    labels = np.where(rng.random(shape) < share, classes, 0)
    dtype = draw(st.sampled_from(LOGIT_TYPES))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4, 1e30, 3e38]))
    scale = min(scale, largest, float(jnp.finfo(dtype).max) / 2)
    logits = scale * rng.uniform(-1, 1, (*shape, num_channels))
    exists = rng.random(shape) < draw(st.sampled_from([0.0, 0.7, 1.0]))
    return Drawn(
        jnp.asarray(logits, dtype),
        jnp.asarray(labels, draw(st.sampled_from(LABEL_TYPES))),
        jnp.asarray(exists),
    )


def loss_of(name: str, case: Drawn, logits: jax.Array | None = None) -> np.ndarray:
    """Float64 of what the compiled loss gives; NaN is for `channel`, undefined for K >= 3."""
    logits = case.logits if logits is None else logits
    return np.asarray(
        jax.jit(LOSSES[name])(logits, case.labels, voxel_mask=case.voxel_mask), np.float64
    )


def is_defined(name: str, case: Drawn) -> bool:
    return name != "adaptive, channel" or case.logits.shape[-1] <= 2


def few_and_many(**options):
    """The same property of a few drawn cases and, as a slow test, of many."""

    def decorate(holds):
        def test(effort, name):
            @effort
            @given(case=drawn(**options))
            def property_test(case):
                holds(name, case)

            property_test()

        test.__name__ = holds.__name__
        efforts = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]
        return pytest.mark.parametrize("effort", efforts, ids=["few", "many"])(test)

    return decorate


@every_loss
@few_and_many()
def test_a_loss_is_finite_and_not_negative_and_so_is_its_gradient_finite(name, case):
    if not is_defined(name, case):
        return
    values = loss_of(name, case)
    assert values.shape == case.labels.shape[:1]
    assert np.all(np.isfinite(values))
    assert np.all(values >= 0)
    gradient = jax.jit(
        jax.grad(
            lambda logits: LOSSES[name](logits, case.labels, voxel_mask=case.voxel_mask).mean()
        )
    )(case.logits)
    assert np.all(np.isfinite(np.asarray(gradient, np.float32)))


@every_loss
@few_and_many()
def test_a_perfect_prediction_costs_nothing_in_the_limit(name, case):
    if not is_defined(name, case):
        return
    sign = np.where(case.target, 1.0, -1.0)
    costs = [loss_of(name, case, jnp.asarray(u * sign, jnp.float32)) for u in (1, 10, 30, 1e30)]
    # softplus(-u) <= exp(-u), and no weight is more than 1.
    for u, cost in zip((1, 10, 30, 1e30), costs, strict=True):
        assert np.all(cost <= np.exp(-u) * (1 + 1e-5))
    assert np.all(costs[-1] == 0)


@every_loss
@few_and_many(largest=30.0)
def test_a_loss_decreases_as_the_correct_logits_grow(name, case):
    if not is_defined(name, case):
        return
    sign = jnp.asarray(np.where(case.target, 1.0, -1.0), jnp.float32)
    logits = case.logits.astype(jnp.float32)
    costs = [loss_of(name, case, logits + step * sign) for step in (0.0, 0.5, 2.0)]
    for before, after in itertools.pairwise(costs):
        # A volume that no weight reaches costs nothing before and after.
        assert np.all((after < before) | ((before == 0) & (after == 0)))


@every_loss
@few_and_many(largest=1e4)
def test_a_loss_does_not_depend_on_how_the_volume_lies(name, case):
    if not is_defined(name, case):
        return
    expected = loss_of(name, case)
    for moved in moves(case):
        np.testing.assert_allclose(loss_of(name, moved), expected, rtol=2e-5, atol=1e-30)


@every_statistic
@few_and_many()
def test_a_statistic_does_not_depend_on_how_the_volume_lies(name, case):
    def value(case: Drawn) -> np.ndarray:
        return np.asarray(jax.jit(STATISTICS[name])(case.labels, voxel_mask=case.voxel_mask))

    expected = value(case)
    assert np.all(np.isfinite(expected))
    assert np.all(expected >= 0)
    # A gradient is at most 1 along each of three axes.
    assert np.all(expected <= (1 if name in ("fraction", "alpha") else 1 + 3**0.5))
    for moved in moves(case):
        np.testing.assert_allclose(value(moved), expected, rtol=2e-6, atol=1e-7)


def moves(case: Drawn) -> list[Drawn]:
    """The case flipped along each spatial axis, and with its spatial axes in other orders."""
    axes = tuple(range(1, case.labels.ndim))
    moved = [Drawn(*(jnp.flip(array, axis) for array in case)) for axis in axes]
    for order in itertools.islice(itertools.permutations(axes), 1, None):
        moved.append(
            Drawn(
                case.logits.transpose(0, *order, case.logits.ndim - 1),
                *(array.transpose(0, *order) for array in case[1:]),
            )
        )
    return moved


@every_loss
@few_and_many(batch_size=4)
def test_a_loss_is_the_same_on_1_2_and_4_devices(name, case):
    if not is_defined(name, case):
        return
    fields = {"logits": case.logits, "labels": case.labels, "voxel_mask": case.voxel_mask}
    fields = jax.device_get(fields)

    def step(state, batch):
        logits = batch["logits"]
        loss = LOSSES[name](logits, batch["labels"], voxel_mask=batch["voxel_mask"])
        return state, {"loss": loss, "gamma": statistics.focusing_gamma(batch["labels"])}

    results = []
    for num_devices in (1, 2, 4):
        devices = parallel.select_devices(num_devices, batch_size=4)
        _, output = parallel.compile_step(step, devices)(
            parallel.replicate(0.0, devices), parallel.shard_batch(fields, devices)
        )
        results.append(parallel.gather(output, devices))
    for other in results[1:]:
        for key, expected in results[0].items():
            np.testing.assert_allclose(other[key], expected, rtol=1e-6, atol=1e-30)
