"""Tests run under stricter JAX than users do, on several simulated devices."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same network compiles once in a session, and nothing reaches the user's own cache.
_CACHE = tempfile.mkdtemp(prefix="afl_jax_tests_")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", _CACHE)
os.environ["AFL_JAX_COMPILATION_CACHE"] = "0"

GOLDEN = Path(__file__).parent / "golden"


def golden_case(golden: dict, name: str) -> tuple[jax.Array, jax.Array]:
    """Of afl_loss.npz: channels-last float32 logits and the labels without their channel."""
    shape = golden[f"labelshape_{name}"]
    labels = np.unpackbits(golden[f"label_{name}"])[: np.prod(shape)].reshape(shape)[:, 0]
    logits = np.moveaxis(golden[f"logits_{name}"].astype(np.float32), 1, -1)
    return jnp.asarray(logits), jnp.asarray(labels)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="no GPU")
    has_gpu = jax.default_backend() == "gpu"
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(no_gpu)


def _folder_from_environment(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    return Path(value).resolve()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real volumes; tests that use it are marked `real_data`."""
    return _folder_from_environment("AFL_JAX_REAL_DATA")


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of golden numbers measured from the authors' code."""
    return _folder_from_environment("AFL_JAX_REFERENCE")


@pytest.fixture
def x64():
    """Float64 inside one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Path:
    """A run that nothing stopped, as `resumable_run` has it; ``data`` lies beside it."""
    from resumable_run import command

    from afl_jax.cli import main

    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main(command(out, out.parent / "data")) == 0
    return out
