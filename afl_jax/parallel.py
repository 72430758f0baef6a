"""The same step on several devices: the only file that names ``pmap``.

The state is replicated, a batch is split along its first axis, and the step averages gradients,
metrics and batch statistics over the mapped axis. The result is that of one device, up to the
rounding of sums taken in another order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afl_jax.errors import InputError

AXIS_NAME = "devices"


def select_devices(num_devices: int | None, *, batch_size: int) -> list[jax.Device]:
    """The devices of a run.

    Args:
      num_devices: How many; as many as there are and divide the batch if None.
      batch_size: Cases of a step, over all devices.

    Returns:
      The first ``num_devices`` of this process.

    Raises:
      InputError: If there are not as many, or they do not divide the batch.
    """
    devices = jax.local_devices()
    if num_devices is None:
        num_devices = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    if not 1 <= num_devices <= len(devices):
        raise InputError(
            f"num_devices must be between 1 and {len(devices)}, the devices of this machine "
            f"({devices[0].platform}), got {num_devices}."
        )
    if batch_size % num_devices:
        raise InputError(
            f"batch_size must be a multiple of num_devices = {num_devices}, got {batch_size}: "
            f"choose a batch of {-(-batch_size // num_devices) * num_devices} or fewer devices."
        )
    return devices[:num_devices]


def compile_step(
    step: Callable[..., Any],
    devices: Sequence[jax.Device],
    *,
    donate_state: bool = False,
) -> Callable[..., Any]:
    """Compiles a step: by ``jax.jit`` for one device, by ``jax.pmap`` for several.

    Args:
      step: Its first argument is the state, the second the batch; then others, replicated.
      devices: From `select_devices`.
      donate_state: Whether the memory of the state passed in is reused for the one returned.

    Returns:
      The compiled step, to be called with what `replicate` and `shard_batch` return.
    """
    donate = (0,) if donate_state else ()
    if len(devices) == 1:
        return jax.jit(step, donate_argnums=donate)
    return jax.pmap(step, axis_name=AXIS_NAME, devices=devices, donate_argnums=donate)


def axis_name(devices: Sequence[jax.Device]) -> str | None:
    """Name of the mapped axis, for the step and its model.

    Args:
      devices: From `select_devices`.

    Returns:
      The name; None on one device.
    """
    return AXIS_NAME if len(devices) > 1 else None


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """A copy of every array on each device.

    Args:
      tree: Arrays.
      devices: From `select_devices`.

    Returns:
      The arrays; ``[D, ...]`` if there are several devices.
    """
    if len(devices) == 1:
        return jax.device_put(tree, devices[0])
    stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(devices), *jnp.shape(x))), tree)
    return jax.device_put(stacked, _split_over(devices))


def unreplicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """The first device's copy of what `replicate` or a compiled step returned.

    Args:
      tree: Arrays.
      devices: From `select_devices`.

    Returns:
      The arrays, on the first device.
    """
    if len(devices) == 1:
        return tree
    return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)


def shard_batch(batch: dict[str, np.ndarray], devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Puts a batch on the devices.

    Args:
      batch: Arrays ``[B, ...]``.
      devices: From `select_devices`; they divide B.

    Returns:
      The arrays; ``[D, B / D, ...]`` if there are several devices.
    """
    if len(devices) == 1:
        return jax.device_put(batch, devices[0])
    split = {name: x.reshape(len(devices), -1, *x.shape[1:]) for name, x in batch.items()}
    return jax.device_put(split, _split_over(devices))


def gather(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Results of a compiled step, on the host.

    Args:
      tree: Arrays ``[B, ...]``, or ``[D, B / D, ...]`` if there are several devices.
      devices: From `select_devices`.

    Returns:
      The arrays, ``[B, ...]``.
    """
    tree = jax.device_get(tree)
    if len(devices) == 1:
        return tree
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _split_over(devices: Sequence[jax.Device]) -> jax.sharding.NamedSharding:
    """The layout that a mapped step takes and returns: the first axis is the device."""
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS_NAME,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS_NAME))
