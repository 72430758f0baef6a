"""The training and the evaluation step: pure functions of (state, batch, key).

They never mention a device: compiled by ``jax.jit`` they run on one, and mapped with an
``axis_name`` on several. Model, loss, augmentation and metrics arrive as functions.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, get_args

import flax
import jax
import jax.numpy as jnp
import optax

Batch = Mapping[str, jax.Array]
Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["constant", "cosine", "polynomial"]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a training step changes, and the two functions that it needs.

    Attributes:
      step: Steps taken, int32 scalar.
      params: Parameters of the network.
      batch_stats: Running statistics of its batch normalisation.
      opt_state: State of the optimizer.
      apply_fn: The network's ``apply``.
      optimizer: The gradient transformation.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    apply_fn: Callable[..., Any] = flax.struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = flax.struct.field(pytree_node=False)

    @property
    def variables(self) -> dict[str, Any]:
        """The collections that ``apply_fn`` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_train_state(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The state before the first step.

    Args:
      apply_fn: The network's ``apply(variables, image, train=..., mutable=...)``.
      variables: Collections ``params`` and ``batch_stats``.
      optimizer: For example from `create_optimizer`.

    Returns:
      A state at step 0.
    """
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(params),
        apply_fn=apply_fn,
        optimizer=optimizer,
    )


def create_schedule(
    name: Schedule, *, learning_rate: float, num_steps: int, num_warmup_steps: int = 0
) -> optax.Schedule:
    r"""Learning rate as a function of the step.

    After a linear warm-up from 0, with :math:`u` the share of the remaining steps that is done:

    .. math:: \eta \;\text{(constant)}, \quad \eta \tfrac{1 + \cos \pi u}{2} \;\text{(cosine)},
              \quad \eta (1 - u)^{0.9} \;\text{(polynomial)}

    Args:
      name: ``"constant"`` (the paper's), ``"cosine"`` or ``"polynomial"``.
      learning_rate: :math:`\eta`, the largest.
      num_steps: Steps of the whole run.
      num_warmup_steps: Steps of the warm-up, fewer than ``num_steps``.

    Returns:
      A function of the step.

    Raises:
      ValueError: If the name is unknown or the warm-up is not shorter than the run.
    """
    if num_warmup_steps >= num_steps:
        raise ValueError(
            f"num_warmup_steps must be less than num_steps = {num_steps}, got {num_warmup_steps}."
        )
    num_decay_steps = num_steps - num_warmup_steps
    if name == "constant":
        schedule = optax.constant_schedule(learning_rate)
    elif name == "cosine":
        schedule = optax.cosine_decay_schedule(learning_rate, num_decay_steps)
    elif name == "polynomial":
        schedule = optax.polynomial_schedule(learning_rate, 0.0, 0.9, num_decay_steps)
    else:
        raise ValueError(f"schedule must be one of {get_args(Schedule)}, got {name!r}.")
    if num_warmup_steps == 0:
        return schedule
    warmup = optax.linear_schedule(0.0, learning_rate, num_warmup_steps)
    return optax.join_schedules([warmup, schedule], [num_warmup_steps])


def create_optimizer(
    name: Optimizer,
    *,
    learning_rate: float | optax.Schedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    max_gradient_norm: float | None = None,
    frozen: Collection[str] = (),
) -> optax.GradientTransformation:
    """An optax optimizer by name.

    Args:
      name: ``"sgd"`` with Nesterov momentum, the paper's; ``"adam"``; or ``"adamw"``.
      learning_rate: A number or a schedule.
      momentum: Of ``"sgd"``; decay of the first moment of the others.
      weight_decay: L2 term inside the gradient, on every parameter, as PyTorch's SGD and Adam
        have it; decoupled from the gradient in ``"adamw"``.
      max_gradient_norm: Global norm to which gradients are clipped first; not if None.
      frozen: Top-level modules, such as ``"encoder"``, whose parameters stay as they are; they
        have no part in the norm and no optimizer state.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: If the name is unknown.
    """
    if name == "sgd":
        steps = [
            optax.add_decayed_weights(weight_decay),
            optax.sgd(learning_rate, momentum=momentum, nesterov=True),
        ]
    elif name == "adam":
        steps = [optax.add_decayed_weights(weight_decay), optax.adam(learning_rate, b1=momentum)]
    elif name == "adamw":
        steps = [optax.adamw(learning_rate, b1=momentum, weight_decay=weight_decay)]
    else:
        raise ValueError(f"optimizer must be one of {get_args(Optimizer)}, got {name!r}.")
    if max_gradient_norm is not None:
        steps = [optax.clip_by_global_norm(max_gradient_norm), *steps]
    optimizer = optax.chain(*steps)
    if not frozen:
        return optimizer
    return optax.partition(
        {"train": optimizer, "freeze": optax.set_to_zero()},
        lambda params: {name: "freeze" if name in frozen else "train" for name in params},
    )


def sample_keys(key: jax.Array, epoch: jax.Array, case_index: jax.Array) -> jax.Array:
    """One key a sample, a function of (key, epoch, case) alone.

    So augmentation does not depend on the order of the batch, the number of devices, or that of
    the loader's workers.

    Args:
      key: The run's key.
      epoch: ``[B]`` int.
      case_index: ``[B]`` int, the number of the case in its data set.

    Returns:
      ``[B]`` keys.
    """
    return jax.vmap(lambda e, i: jax.random.fold_in(jax.random.fold_in(key, e), i))(
        epoch, case_index
    )


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    loss_fn: Callable[..., jax.Array],
    loss_fields: Collection[str] = (),
    augment_fn: Callable[..., tuple[jax.Array, ...]] | None = None,
    statistics_fn: Callable[..., Mapping[str, jax.Array]] | None = None,
    axis_name: str | None = None,
    num_microbatches: int = 1,
    skip_non_finite: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of gradient descent on the mean loss of a batch.

    Args:
      state: The state before.
      batch: ``image`` ``[B, *spatial, C]``, ``labels`` and ``voxel_mask`` ``[B, *spatial]``,
        ``epoch`` and ``case_index`` ``[B]``, ``spacing`` ``[B, number of spatial axes]``; the last
        three are read by the augmentation and ``loss_fields`` only.
      key: The run's key, the same in every step.
      loss_fn: ``(logits, labels, *, voxel_mask) -> [B]``.
      loss_fields: Arrays of the batch that the loss takes by keyword besides, such as
        ``"spacing"``: that of the scan, which a zoom by the augmentation does not change.
      augment_fn: ``(key, image, labels, voxel_mask, spacing) -> (image, labels, voxel_mask)``, for
        one volume.
      statistics_fn: ``(labels, *, voxel_mask) -> {name: [B]}``, reported beside the loss.
      axis_name: Mapped axis over which gradients and metrics are averaged, or None.
      num_microbatches: Parts of the batch that go through the network one after the other, whose
        gradients are averaged: the memory of one, the step of all. Batch normalisation sees one
        part at a time.
      skip_non_finite: Whether a step whose loss or gradient norm is not finite leaves parameters,
        running statistics and the optimizer's state as they were; it is counted all the same.

    Returns:
      The state after, and the metrics: ``loss``, ``gradient_norm`` and the means of the
      statistics, scalars.

    Raises:
      ValueError: If the number of microbatches does not divide the batch.
    """
    image, labels, voxel_mask = batch["image"], batch["labels"], batch["voxel_mask"]
    if augment_fn is not None:
        keys = sample_keys(key, batch["epoch"], batch["case_index"])
        image, labels, voxel_mask = jax.vmap(augment_fn)(
            keys, image, labels, voxel_mask, batch["spacing"]
        )

    def mean_loss(params: Any, batch_stats: Any, part: Any) -> tuple[jax.Array, Any]:
        image, labels, voxel_mask, fields = part
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = state.apply_fn(variables, image, train=True, mutable=["batch_stats"])
        loss = loss_fn(logits, labels, voxel_mask=voxel_mask, **fields).mean()
        metrics = {"loss": loss}
        if statistics_fn is not None:
            statistics = statistics_fn(labels, voxel_mask=voxel_mask)
            metrics |= {name: value.mean() for name, value in statistics.items()}
        return loss, (updated["batch_stats"], metrics)

    def gradients_of(batch_stats: Any, part: Any) -> tuple[Any, tuple[Any, Any]]:
        gradients, (batch_stats, metrics) = jax.grad(mean_loss, has_aux=True)(
            state.params, batch_stats, part
        )
        return batch_stats, (gradients, metrics)

    fields = {name: batch[name] for name in loss_fields}
    batch_stats, (gradients, metrics) = _mean_over_microbatches(
        gradients_of, state.batch_stats, (image, labels, voxel_mask, fields), num_microbatches
    )
    if axis_name is not None:
        gradients, metrics = jax.lax.pmean((gradients, metrics), axis_name)
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    updates, opt_state = state.optimizer.update(gradients, state.opt_state, state.params)
    before = (state.params, state.batch_stats, state.opt_state)
    after = (optax.apply_updates(state.params, updates), batch_stats, opt_state)
    if skip_non_finite:
        is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        after = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), after, before)
    params, batch_stats, opt_state = after
    state = state.replace(
        step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state
    )
    return state, metrics


def _mean_over_microbatches(
    fn: Callable[[Any, Any], tuple[Any, Any]], carry: Any, batch: Any, num_microbatches: int
) -> tuple[Any, Any]:
    """``fn(carry, part) -> (carry, value)`` over equal parts of a batch; the mean of the values."""
    if num_microbatches == 1:
        return fn(carry, batch)
    num_cases = len(jax.tree.leaves(batch)[0])
    if num_cases % num_microbatches:
        raise ValueError(
            f"num_microbatches must divide the batch of {num_cases}, got {num_microbatches}."
        )
    parts = jax.tree.map(lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), batch)
    _, shapes = jax.eval_shape(fn, carry, jax.tree.map(lambda x: x[0], parts))

    def add(carry_and_total: Any, part: Any) -> tuple[Any, None]:
        carry, total = carry_and_total
        carry, value = fn(carry, part)
        return (carry, jax.tree.map(jnp.add, total, value)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (carry, total), _ = jax.lax.scan(add, (carry, zeros), parts)
    return carry, jax.tree.map(lambda x: x / num_microbatches, total)


def eval_step(
    variables: Mapping[str, Any],
    batch: Batch,
    *,
    apply_fn: Callable[..., jax.Array],
    loss_fn: Callable[..., jax.Array],
    loss_fields: Collection[str] = (),
    predict_fn: Callable[[jax.Array], jax.Array],
    counts_fn: Callable[..., Any],
) -> dict[str, Any]:
    """Loss, class map and confusion counts of every case of a batch.

    Args:
      variables: Collections ``params`` and ``batch_stats``.
      batch: As `train_step` takes it; ``epoch`` and ``case_index`` are not read.
      apply_fn: The network's ``apply``.
      loss_fn: ``(logits, labels, *, voxel_mask) -> [B]``.
      loss_fields: As `train_step` takes them.
      predict_fn: Logits ``[B, *spatial, K]`` to a class map ``[B, *spatial]``.
      counts_fn: ``(prediction, labels, *, voxel_mask) -> counts``, arrays that begin with B.

    Returns:
      ``loss`` ``[B]``, ``counts``, and the class map ``prediction`` as uint8, 0 on padding.
    """
    logits = apply_fn(variables, batch["image"], train=False)
    prediction = predict_fn(logits)
    labels, voxel_mask = batch["labels"], batch["voxel_mask"]
    return {
        "loss": loss_fn(
            logits, labels, voxel_mask=voxel_mask, **{name: batch[name] for name in loss_fields}
        ),
        "counts": counts_fn(prediction, labels, voxel_mask=voxel_mask),
        # What the network says of padding means nothing: no loss reaches it.
        "prediction": jnp.where(voxel_mask, prediction, 0).astype(jnp.uint8),
    }
