import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from afl_jax import adaptive_focal_loss, create_model, parallel, training
from afl_jax.data.augment import augment
from afl_jax.models import blocks


class TwoLayers(nn.Module):
    """What compiles in a second and has all that devices must agree on."""

    axis_name: str | None

    @nn.compact
    def __call__(self, x, *, train=False):
        x = blocks.Conv(4, (3, 3, 3))(x)
        x = nn.relu(blocks.BatchNorm(axis_name=self.axis_name)(x, train=train))
        return blocks.Conv(2, (1, 1, 1), use_bias=True)(x)


def linear_apply(variables, image, *, train, mutable=()):
    """Logits w * image: gradients can be written down."""
    logits = variables["params"]["w"] * image
    return (logits, {"batch_stats": variables["batch_stats"]}) if train else logits


def mean_square_loss(logits, labels, *, voxel_mask):
    error = jnp.square(logits[..., 0] - labels) * voxel_mask
    return error.reshape(error.shape[0], -1).sum(axis=1) / voxel_mask.reshape(
        voxel_mask.shape[0], -1
    ).sum(axis=1)


def make_batch(batch_size: int = 4, shape=(8, 8, 4), channels: int = 1, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = np.zeros((batch_size, *shape), np.uint8)
    for i in range(batch_size):
        labels[i, 1 : 3 + i % 3, 2:6, 1:3] = 1
    image = rng.standard_normal((batch_size, *shape, channels), dtype=np.float32)
    return {
        "image": image + labels[..., None],
        "labels": labels,
        "voxel_mask": np.ones(labels.shape, bool),
        "epoch": np.zeros(batch_size, np.int32),
        "case_index": np.arange(batch_size, dtype=np.int32),
        "spacing": np.tile(np.float32([1, 1, 3]), (batch_size, 1)),
    }


def linear_state(optimizer, w: float = 0.5):
    variables = {"params": {"w": jnp.float32(w)}, "batch_stats": {}}
    return training.create_train_state(linear_apply, variables, optimizer)


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("constant", 0, 0.1),
        ("constant", 99, 0.1),
        ("cosine", 0, 0.1),
        ("cosine", 50, 0.1 * (1 + np.cos(np.pi / 2)) / 2),
        ("cosine", 100, 0.0),
        ("polynomial", 50, 0.1 * 0.5**0.9),
    ],
)
def test_schedules_follow_their_formula(name, step, expected):
    schedule = training.create_schedule(name, learning_rate=0.1, num_steps=100)
    np.testing.assert_allclose(schedule(step), expected, atol=1e-8)


def test_warmup_rises_linearly_and_then_the_schedule_begins():
    schedule = training.create_schedule(
        "cosine", learning_rate=1.0, num_steps=110, num_warmup_steps=10
    )
    np.testing.assert_allclose(schedule(np.array([0, 5, 10, 60])), [0, 0.5, 1.0, 0.5], atol=1e-6)


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match="num_warmup_steps must be less than num_steps = 5, got 5"):
        training.create_schedule("cosine", learning_rate=1.0, num_steps=5, num_warmup_steps=5)


@pytest.mark.parametrize("function", ["create_schedule", "create_optimizer"])
def test_unknown_names_list_the_choices(function):
    options = {"num_steps": 5} if function == "create_schedule" else {}
    with pytest.raises(ValueError, match=r"must be one of \('\w+', .*got 'nadam'"):
        getattr(training, function)("nadam", learning_rate=1.0, **options)


def test_sgd_is_nesterov_with_the_decay_inside_the_gradient():
    learning_rate, momentum, decay = 0.1, 0.9, 0.01
    optimizer = training.create_optimizer(
        "sgd", learning_rate=learning_rate, momentum=momentum, weight_decay=decay
    )
    w = velocity = 0.0
    w = 2.0
    params, state = jnp.float32(w), optimizer.init(jnp.float32(w))
    for gradient in (1.0, -0.5, 0.25):
        updates, state = optimizer.update(jnp.float32(gradient), state, params)
        params = optax.apply_updates(params, updates)
        # PyTorch: g <- g + decay w; v <- momentum v + g; w <- w - lr (g + momentum v).
        g = gradient + decay * w
        velocity = momentum * velocity + g
        w -= learning_rate * (g + momentum * velocity)
        np.testing.assert_allclose(params, w, rtol=1e-6)


def test_gradients_are_clipped_to_their_global_norm():
    optimizer = training.create_optimizer(
        "sgd", learning_rate=1.0, momentum=0.0, max_gradient_norm=1.0
    )
    gradient = {"a": jnp.float32(3.0), "b": jnp.float32(4.0)}
    updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    np.testing.assert_allclose([updates["a"], updates["b"]], [-3 / 5, -4 / 5], rtol=1e-6)


def test_frozen_modules_stay_as_they_are():
    optimizer = training.create_optimizer("adamw", learning_rate=0.1, frozen=["encoder"])
    params = {"encoder": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2)}}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["encoder"]["w"], 0)
    # Adam's first step has the size of the learning rate.
    np.testing.assert_allclose(updates["head"]["w"], -0.1, rtol=1e-5)


def test_microbatches_take_the_step_of_the_whole_batch():
    state, batch = linear_state(optax.sgd(0.1)), make_batch()
    step = functools.partial(training.train_step, loss_fn=mean_square_loss)
    want, want_metrics = jax.jit(step)(state, batch, jax.random.key(0))
    for num_microbatches in (2, 4):
        step_in_parts = functools.partial(step, num_microbatches=num_microbatches)
        got, metrics = jax.jit(step_in_parts)(state, batch, jax.random.key(0))
        np.testing.assert_allclose(got.params["w"], want.params["w"], rtol=1e-6)
        for name, value in want_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-6)


def test_a_loss_gets_the_fields_that_it_asks_for():
    """Each volume its own, also when the batch is taken in parts."""

    def weighted_loss(logits, labels, *, voxel_mask, spacing):
        return spacing[:, 0] * mean_square_loss(logits, labels, voxel_mask=voxel_mask)

    state = linear_state(optax.sgd(0.1))
    batch = make_batch() | {"spacing": np.arange(12, dtype=np.float32).reshape(4, 3)}
    each = mean_square_loss(0.5 * batch["image"], batch["labels"], voxel_mask=batch["voxel_mask"])
    expected = np.asarray(each) * [0, 3, 6, 9]
    options = {"loss_fn": weighted_loss, "loss_fields": ("spacing",)}
    for num_microbatches in (1, 2):
        _, metrics = training.train_step(
            state, batch, jax.random.key(0), num_microbatches=num_microbatches, **options
        )
        np.testing.assert_allclose(metrics["loss"], expected.mean(), rtol=1e-5)
    output = training.eval_step(
        {"params": {"w": jnp.float32(0.5)}, "batch_stats": {}},
        batch,
        apply_fn=linear_apply,
        predict_fn=lambda logits: (logits[..., 0] > 0.5).astype(jnp.int32),
        counts_fn=lambda prediction, labels, *, voxel_mask: (prediction == labels).sum((1, 2, 3)),
        **options,
    )
    np.testing.assert_allclose(output["loss"], expected, rtol=1e-5)


def test_microbatches_must_divide_the_batch():
    with pytest.raises(ValueError, match="num_microbatches must divide the batch of 4, got 3"):
        training.train_step(
            linear_state(optax.sgd(0.1)),
            make_batch(),
            jax.random.key(0),
            loss_fn=mean_square_loss,
            num_microbatches=3,
        )


def test_a_step_is_gradient_descent_on_the_mean_over_volumes():
    batch = make_batch()
    state = linear_state(optax.sgd(0.1))
    after, metrics = training.train_step(state, batch, jax.random.key(0), loss_fn=mean_square_loss)
    x, t = batch["image"][..., 0].astype(np.float64), batch["labels"].astype(np.float64)
    np.testing.assert_allclose(metrics["loss"], np.mean((0.5 * x - t) ** 2), rtol=1e-5)
    gradient = np.mean(2 * (0.5 * x - t) * x)
    np.testing.assert_allclose(metrics["gradient_norm"], abs(gradient), rtol=1e-5)
    np.testing.assert_allclose(after.params["w"], 0.5 - 0.1 * gradient, rtol=1e-5)
    assert after.step == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_if_it_is_to_be_skipped(value):
    state = linear_state(training.create_optimizer("adam", learning_rate=0.1))
    step = jax.jit(
        functools.partial(training.train_step, loss_fn=mean_square_loss, skip_non_finite=True)
    )
    batch = make_batch()
    state, _ = step(state, batch, jax.random.key(0))
    batch["image"][2, 3, 3, 3] = value
    skipped, metrics = step(state, batch, jax.random.key(0))
    assert not np.isfinite(metrics["loss"])
    assert skipped.step == state.step + 1
    jax.tree.map(
        np.testing.assert_array_equal,
        (skipped.params, skipped.batch_stats, skipped.opt_state),
        (state.params, state.batch_stats, state.opt_state),
    )


def test_running_statistics_of_a_skipped_step_are_dropped_too():
    model, batch = TwoLayers(axis_name=None), make_batch()
    variables = model.init(jax.random.key(0), batch["image"])
    optimizer = training.create_optimizer("sgd", learning_rate=0.1)
    state = training.create_train_state(model.apply, variables, optimizer)
    step = functools.partial(training.train_step, loss_fn=adaptive_focal_loss)
    batch["image"][0, 0, 0, 0] = np.nan
    applied, _ = jax.jit(step)(state, batch, jax.random.key(0))
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves(applied.batch_stats))
    skipped, _ = jax.jit(functools.partial(step, skip_non_finite=True))(
        state, batch, jax.random.key(0)
    )
    jax.tree.map(np.testing.assert_array_equal, skipped.variables, state.variables)


def test_masked_voxels_do_not_reach_the_loss():
    batch = make_batch()
    batch["voxel_mask"][:, :, :, 3] = False
    spoilt = batch | {"image": np.where(batch["voxel_mask"][..., None], batch["image"], 1e6)}
    step = functools.partial(training.train_step, loss_fn=mean_square_loss)
    state = linear_state(optax.sgd(0.1))
    clean, _ = step(state, batch, jax.random.key(0))
    dirty, _ = step(state, spoilt, jax.random.key(0))
    np.testing.assert_allclose(dirty.params["w"], clean.params["w"], rtol=1e-6)


def test_keys_are_a_function_of_run_epoch_and_case_alone():
    def draws(seed, epoch, case_index):
        keys = training.sample_keys(
            jax.random.key(seed), jnp.array(epoch, jnp.int32), jnp.array(case_index, jnp.int32)
        )
        return np.asarray(jax.vmap(jax.random.uniform)(keys))

    first = draws(0, [1, 1, 2], [5, 6, 5])
    np.testing.assert_array_equal(draws(0, [2, 1], [5, 6]), first[[2, 1]])
    assert len({*first, *draws(1, [1, 1, 2], [5, 6, 5])}) == 6


def test_statistics_are_reported_as_means_over_the_batch():
    batch = make_batch()
    _, metrics = training.train_step(
        linear_state(optax.sgd(0.1)),
        batch,
        jax.random.key(0),
        loss_fn=mean_square_loss,
        statistics_fn=lambda labels, *, voxel_mask: {"size": labels.sum(axis=(1, 2, 3))},
    )
    np.testing.assert_allclose(metrics["size"], batch["labels"].sum() / 4)


def test_eval_step_returns_loss_counts_and_class_map_of_every_case():
    batch = make_batch()
    batch["voxel_mask"][:, :, :, 3] = False
    output = training.eval_step(
        {"params": {"w": jnp.float32(1.0)}, "batch_stats": {}},
        batch,
        apply_fn=linear_apply,
        loss_fn=mean_square_loss,
        predict_fn=lambda logits: (logits[..., 0] > 0.5).astype(jnp.int32),
        counts_fn=lambda prediction, labels, *, voxel_mask: (prediction == labels).sum((1, 2, 3)),
    )
    expected = (batch["image"][..., 0] > 0.5) == batch["labels"]
    np.testing.assert_array_equal(output["counts"], expected.sum((1, 2, 3)))
    expected = (batch["image"][..., 0] > 0.5) & batch["voxel_mask"]
    np.testing.assert_array_equal(output["prediction"], expected)
    assert output["loss"].shape == (4,)


TINY = {
    "num_classes": 2,
    "strides": ((2, 2, 1), (2, 2, 2), (1, 1, 1), (2, 2, 2), (1, 1, 1)),
    "width": 4,
    "decoder_features": (8, 8, 4, 4, 4),
}


def run_steps(num_devices: int, create_fn, num_steps: int = 3):
    """A network with synchronised batch normalisation and augmentation, in float64."""
    devices = jax.local_devices()[:num_devices]
    axis_name = parallel.axis_name(devices)
    model = create_fn(axis_name=axis_name)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 4, 1)))
    variables = jax.tree.map(lambda x: x.astype(jnp.float64) if x.ndim else x, variables)
    state = training.create_train_state(
        model.apply, variables, training.create_optimizer("sgd", learning_rate=0.1)
    )
    # The volumes are of 8 x 8 x 6, the crops of what the network takes.
    augment_fn = functools.partial(
        augment,
        patch_shape=(8, 8, 4),
        affine_probability=0.5,
        max_rotation_degrees=15.0,
        max_zoom=0.1,
        gamma_probability=0.5,
    )
    num_traces = 0

    def counted_step(*arguments):
        nonlocal num_traces
        num_traces += 1
        return training.train_step(
            *arguments, loss_fn=adaptive_focal_loss, augment_fn=augment_fn, axis_name=axis_name
        )

    step = parallel.compile_step(counted_step, devices, donate_state=True)
    state, key = parallel.replicate((state, jax.random.key(1)), devices)
    losses = []
    for i in range(num_steps):
        batch = make_batch(8, (8, 8, 6), seed=i) | {"epoch": np.full(8, i, np.int32)}
        batch["image"] = batch["image"].astype(np.float64)
        batch = parallel.shard_batch(batch, devices)
        with jax.transfer_guard("disallow" if i else "allow"):
            state, metrics = step(state, batch, key)
        losses.append(np.asarray(metrics["loss"]).flat[0])
    assert num_traces == 1
    return np.array(losses), jax.device_get(parallel.unreplicate(state, devices).variables)


@pytest.mark.parametrize(
    ("create_fn", "nums_devices"),
    [
        (TwoLayers, (2, 4, 8)),
        pytest.param(
            functools.partial(create_model, "resnet18_unet", **TINY), (2,), marks=pytest.mark.slow
        ),
    ],
    ids=["two layers", "resnet18_unet"],
)
def test_one_and_several_devices_take_the_same_steps(x64, create_fn, nums_devices):
    losses, variables = run_steps(1, create_fn)
    assert len(set(losses)) == 3
    for num_devices in nums_devices:
        other_losses, other_variables = run_steps(num_devices, create_fn)
        np.testing.assert_allclose(other_losses, losses, rtol=1e-9)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9),
            other_variables,
            variables,
        )
