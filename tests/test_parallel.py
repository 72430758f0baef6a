import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afl_jax import parallel
from afl_jax.errors import InputError


def test_as_many_devices_as_divide_the_batch_are_the_default():
    # Tests run on 8 simulated devices.
    assert [len(parallel.select_devices(None, batch_size=b)) for b in (1, 2, 6, 7, 8, 24)] == [
        1, 2, 6, 7, 8, 8
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("num_devices", "batch_size", "message"),
    [
        (9, 18, "num_devices must be between 1 and 8, the devices of this machine .* got 9"),
        (0, 4, "num_devices must be between 1 and 8"),
        (4, 6, "batch_size must be a multiple of num_devices = 4, got 6: choose a batch of 8"),
    ],
)
def test_impossible_numbers_of_devices_are_refused(num_devices, batch_size, message):
    with pytest.raises(InputError, match=message):
        parallel.select_devices(num_devices, batch_size=batch_size)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_state_and_batch_make_the_round_trip(num_devices):
    devices = parallel.select_devices(num_devices, batch_size=4)
    state = {"w": jnp.arange(3.0), "n": jnp.int32(7)}
    batch = {"x": np.arange(8.0).reshape(4, 2)}

    def step(state, batch, offset):
        return state, {"y": batch["x"] * state["n"] + offset}

    compiled = parallel.compile_step(step, devices)
    state_after, output = compiled(
        parallel.replicate(state, devices),
        parallel.shard_batch(batch, devices),
        parallel.replicate(1.0, devices),
    )
    np.testing.assert_array_equal(parallel.gather(output, devices)["y"], batch["x"] * 7 + 1)
    np.testing.assert_array_equal(parallel.unreplicate(state_after, devices)["w"], [0, 1, 2])


def test_a_compiled_step_takes_nothing_from_the_host():
    devices = parallel.select_devices(2, batch_size=4)
    compiled = parallel.compile_step(lambda s, b: (s + b["x"].sum(), s), devices)
    state = parallel.replicate(jnp.float32(1.0), devices)
    batch = parallel.shard_batch({"x": np.ones((4, 2), np.float32)}, devices)
    state, _ = compiled(state, batch)
    with jax.transfer_guard("disallow"):
        state, _ = compiled(state, batch)
    # Each device added its 2 x 2 ones twice.
    np.testing.assert_array_equal(parallel.gather(state[:, None], devices), [9.0, 9.0])
