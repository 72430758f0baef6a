"""The same step on several devices: the only file that names ``pmap``.

The state is replicated, a batch is split along its first axis, and the step averages gradients,
metrics and batch statistics over the mapped axis. The result is that of one device, up to the
rounding of sums taken in another order.

Several processes, on one machine or many, are one run: each holds its share of a batch on its own
devices, and the training step is mapped over the devices of all. What `replicate`, `shard_batch`,
`unreplicate` and `gather` take and return is always that of this process.
"""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from afl_jax.errors import InputError

AXIS_NAME = "devices"
# After which a process that is not heard of is taken for dead, and the others end.
_HEARTBEAT_SECONDS = 30
# Of waiting for another process, such as for one that prepares the data.
_MAX_WAIT_SECONDS = 7 * 24 * 3600
# Waits for the end of the process that holds its input, and speaks if that did not say goodbye.
_LAST_WORDS = """
import sys
if sys.stdin.read() != "done":
    print("afl-jax: error: this process ended in the middle of its work: it was killed, or JAX "
          "ended it since another process of the run is gone, or never came; go on from the last "
          "checkpoint with --resume.", file=sys.stderr)
"""


def start_processes() -> Callable[[], None]:
    """Joins the processes of a run, before anything is computed.

    They find each other by the environment of a cluster, as `jax.distributed.initialize` reads it
    (Slurm, Open MPI, Kubernetes, Cloud TPU), or by ``JAX_COORDINATOR_ADDRESS``,
    ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``. A process that dies ends the others, within half
    a minute and with a line that says so.

    Returns:
      To be called when the work of this process is done.

    Raises:
      InputError: If the environment does not say who takes part.
    """
    numbers = {}
    for option, variable in (
        ("num_processes", "JAX_NUM_PROCESSES"),
        ("process_id", "JAX_PROCESS_ID"),
    ):
        if (value := os.environ.get(variable)) is not None:
            if not value.isdigit():
                raise InputError(f"{variable} must be a whole number from 0, got {value!r}.")
            numbers[option] = int(value)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX would take SIGTERM for itself; `signals` handles it.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX ends a process that others have left from a thread of its own, with a stack trace of C++:
    # what that means can be said from outside only.
    speaker = subprocess.Popen(
        [sys.executable, "-S", "-c", _LAST_WORDS],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def say_goodbye() -> None:
        speaker.communicate("done")

    try:
        jax.distributed.initialize(**numbers, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, TypeError, ValueError) as error:
        say_goodbye()
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--distributed: the processes of the run cannot be joined ({reason}): start it by a "
            "cluster's launcher, or set JAX_COORDINATOR_ADDRESS to host:port of process 0, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from error
    return say_goodbye


def process_index() -> int:
    """Which of the processes this is; process 0 alone writes.

    Returns:
      Its number.
    """
    return jax.process_index()


def process_count() -> int:
    """How many processes the run has.

    Returns:
      Their number.
    """
    return jax.process_count()


def wait_for_all(name: str) -> None:
    """Waits until every process has come here.

    Args:
      name: Of the place, which each process comes to once.
    """
    if jax.process_count() > 1:
        # The only barrier that may take long: one among devices gives up after seconds.
        from jax._src.distributed import global_state

        global_state.client.wait_at_barrier(f"afl_jax/{name}", _MAX_WAIT_SECONDS * 1000)


def gather_bytes(content: bytes) -> list[bytes]:
    """What each process has, for all of them.

    Args:
      content: Of this process.

    Returns:
      That of each, in the order of their numbers.
    """
    if jax.process_count() == 1:
        return [content]
    own = np.frombuffer(content, np.uint8)
    lengths = multihost_utils.process_allgather(np.array([own.size], np.int32))[:, 0]
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: own.size] = own
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths.tolist(), strict=True)]


def create_agreement(devices: Sequence[jax.Device]) -> Callable[[int], int]:
    """A function by which all processes come to the same number at the same call.

    Args:
      devices: From `select_devices`.

    Returns:
      Takes a number of this process. With one process it returns it; with several, the largest
      that any of them gave two calls before, so that no call waits for the devices.
    """
    if jax.process_count() == 1:
        return lambda number: number
    largest = jax.pmap(
        lambda x: jax.lax.pmax(x, AXIS_NAME),
        axis_name=AXIS_NAME,
        devices=_devices_of_all(devices),
    )
    pending = deque()

    def agree(number: int) -> int:
        pending.append(largest(np.full(len(devices), number, np.int32)))
        if len(pending) <= 2:
            return 0
        return int(jax.device_get(unreplicate(pending.popleft(), devices)))

    return agree


def select_devices(num_devices: int | None, *, batch_size: int) -> list[jax.Device]:
    """The devices of a run.

    Args:
      num_devices: How many in each process; as many as there are and divide the batch if None.
      batch_size: Cases of a step, over all devices of all processes.

    Returns:
      The first ``num_devices`` of this process.

    Raises:
      InputError: If there are not as many, or they do not divide the batch.
    """
    devices = jax.local_devices()
    if batch_size % jax.process_count():
        raise InputError(
            f"batch_size must be a multiple of the {jax.process_count()} processes, got "
            f"{batch_size}."
        )
    batch_size //= jax.process_count()
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
    across_processes: bool = False,
) -> Callable[..., Any]:
    """Compiles a step: by ``jax.jit`` for one device, by ``jax.pmap`` for several.

    Args:
      step: Its first argument is the state, the second the batch; then others, replicated.
      devices: From `select_devices`.
      donate_state: Whether the memory of the state passed in is reused for the one returned.
      across_processes: Whether the mapped axis is that of all processes' devices; otherwise each
        process takes the step by itself.

    Returns:
      The compiled step, to be called with what `replicate` and `shard_batch` return.
    """
    donate = (0,) if donate_state else ()
    if not _is_mapped(devices):
        return jax.jit(step, donate_argnums=donate)
    if across_processes:
        devices = _devices_of_all(devices)
    return jax.pmap(step, axis_name=AXIS_NAME, devices=devices, donate_argnums=donate)


def axis_name(devices: Sequence[jax.Device]) -> str | None:
    """Name of the mapped axis, for the step and its model.

    Args:
      devices: From `select_devices`.

    Returns:
      The name; None on one device.
    """
    return AXIS_NAME if _is_mapped(devices) else None


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """A copy of every array on each device.

    Args:
      tree: Arrays.
      devices: From `select_devices`.

    Returns:
      The arrays; ``[D, ...]`` if the step is mapped.
    """
    if not _is_mapped(devices):
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
    if not _is_mapped(devices):
        return tree
    return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)


def shard_batch(batch: dict[str, np.ndarray], devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Puts a batch on the devices.

    Args:
      batch: Arrays ``[B, ...]``.
      devices: From `select_devices`; they divide B.

    Returns:
      The arrays; ``[D, B / D, ...]`` if the step is mapped.
    """
    if not _is_mapped(devices):
        return jax.device_put(batch, devices[0])
    split = {name: x.reshape(len(devices), -1, *x.shape[1:]) for name, x in batch.items()}
    return jax.device_put(split, _split_over(devices))


def gather(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Results of a compiled step, on the host.

    Args:
      tree: Arrays ``[B, ...]``, or ``[D, B / D, ...]`` if the step is mapped.
      devices: From `select_devices`.

    Returns:
      The arrays, ``[B, ...]``.
    """
    tree = jax.device_get(tree)
    if not _is_mapped(devices):
        return tree
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _is_mapped(devices: Sequence[jax.Device]) -> bool:
    """Whether there are other devices, here or in another process."""
    return len(devices) > 1 or jax.process_count() > 1


def _devices_of_all(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """As many devices of each process as this one has, in the order of the processes."""
    chosen = []
    for index in range(jax.process_count()):
        chosen += [d for d in jax.devices() if d.process_index == index][: len(devices)]
    return chosen


def _split_over(devices: Sequence[jax.Device]) -> jax.sharding.NamedSharding:
    """The layout that a mapped step takes and returns: the first axis is the device."""
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS_NAME,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS_NAME))
