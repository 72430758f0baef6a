import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afl_jax.checkpoint import Checkpoint, CheckpointStore
from afl_jax.config import Config
from afl_jax.errors import InputError


def make_checkpoint(epoch: int) -> Checkpoint:
    return Checkpoint(
        epoch=epoch,
        variables={"params": {"w": jnp.full((2, 3), epoch, jnp.float32)}, "batch_stats": {}},
        optimizer={"step": jnp.int32(10 * epoch), "opt_state": ({"m": jnp.arange(3.0)}, ())},
        iterator={"next_index": epoch},
        history=[{"epoch": e, "loss": float("nan")} for e in range(1, epoch + 1)],
        config=Config(num_epochs=9),
    )


def write(folder, scores):
    store = CheckpointStore(folder)
    for epoch, score in enumerate(scores, start=1):
        store.save(make_checkpoint(epoch), score=score)
        store.wait()
    store.close()
    return CheckpointStore(folder)


def test_the_newest_and_the_best_are_kept_and_found(tmp_path):
    store = write(tmp_path, [0.5, 0.9, 0.7, 0.8])
    assert store.restore("latest").epoch == 4
    assert store.restore("best").epoch == 2
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "4"]
    store.close()


def test_everything_returns_as_it_was(tmp_path):
    store, saved = write(tmp_path, [0.5]), make_checkpoint(1)
    shapes = jax.eval_shape(lambda: saved.optimizer)
    restored = store.restore("latest", optimizer=shapes)
    assert jax.tree.structure(restored.optimizer) == jax.tree.structure(saved.optimizer)
    jax.tree.map(np.testing.assert_array_equal, restored.optimizer, saved.optimizer)
    jax.tree.map(np.testing.assert_array_equal, restored.variables, saved.variables)
    assert restored.iterator == saved.iterator
    assert restored.history[0]["epoch"] == 1
    assert np.isnan(restored.history[0]["loss"])
    assert restored.config == saved.config
    store.close()


def test_an_undefined_score_is_the_worst(tmp_path):
    store = write(tmp_path, [float("nan"), 0.0, float("nan")])
    assert store.restore("best").epoch == 2
    store.close()


def test_the_optimizer_is_read_only_when_asked_for(tmp_path):
    store = write(tmp_path, [0.5])
    assert store.restore("best").optimizer is None
    store.close()


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(InputError, match="holds no checkpoint: train first"):
        store.restore("best")
    store.close()


def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path):
    store = write(tmp_path, [0.5])
    for path in (tmp_path / "1" / "variables").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"1 cannot be read as a checkpoint") as error:
        store.restore("latest")
    assert "\n" not in str(error.value)
    store.close()
