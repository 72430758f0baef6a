import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afl_jax.checkpoint import Checkpoint, CheckpointStore, EpochTotals
from afl_jax.config import Config
from afl_jax.errors import InputError


def make_checkpoint(epoch: int) -> Checkpoint:
    return Checkpoint(
        step=10 * epoch,
        variables={"params": {"w": jnp.full((2, 3), epoch, jnp.float32)}, "batch_stats": {}},
        optimizer={"step": jnp.int32(10 * epoch), "opt_state": ({"m": jnp.arange(3.0)}, ())},
        key=jax.random.key(epoch),
        iterator={"next_index": epoch},
        history=[{"epoch": e, "loss": float("nan")} for e in range(1, epoch + 1)],
        totals=EpochTotals({"loss": 0.1}, num_steps=1),
        config=Config(num_epochs=9),
    )


def shapes_of(checkpoint: Checkpoint):
    return jax.eval_shape(lambda: checkpoint.optimizer)


def write(folder, scores, **options):
    """A checkpoint for each score, numbered from 1."""
    store = CheckpointStore(folder, **options)
    for epoch, score in enumerate(scores, start=1):
        store.save(make_checkpoint(epoch), score=score)
        store.wait()
    store.close()
    return CheckpointStore(folder)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(path) -> None:
    """Changes one bit in the middle of every file of arrays."""
    files = [file for file in path.rglob("d/*") if file.is_file()]
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def test_the_newest_and_the_best_are_kept_and_found(tmp_path):
    store = write(tmp_path, [0.5, 0.9, 0.7, 0.8, None])
    assert store.restore_newest(optimizer=shapes_of(make_checkpoint(1))).epoch == 5
    assert store.restore_best().epoch == 2
    assert names(tmp_path) == ["2", "4", "5"]
    store.close()


def test_as_many_are_kept_as_asked_for(tmp_path):
    write(tmp_path, [0.9, None, None, None, None], num_kept=3).close()
    assert names(tmp_path) == ["1", "3", "4", "5"]


def test_everything_returns_as_it_was(tmp_path):
    store, saved = write(tmp_path, [0.5]), make_checkpoint(1)
    restored = store.restore_newest(optimizer=shapes_of(saved))
    assert jax.tree.structure(restored.optimizer) == jax.tree.structure(saved.optimizer)
    jax.tree.map(np.testing.assert_array_equal, restored.optimizer, saved.optimizer)
    jax.tree.map(np.testing.assert_array_equal, restored.variables, saved.variables)
    assert restored.step == 10
    assert restored.key == saved.key
    assert restored.iterator == saved.iterator
    assert restored.history[0]["epoch"] == 1
    assert np.isnan(restored.history[0]["loss"])
    assert restored.totals == saved.totals
    assert restored.config == saved.config
    store.close()


def test_what_is_written_is_what_was_there_though_the_arrays_are_given_away(tmp_path):
    """The next step reuses the memory of the state while the checkpoint is still written."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    store = CheckpointStore(tmp_path, num_kept=20)
    state = jnp.zeros(2**18)
    for epoch in range(1, 9):
        state = step(state)
        checkpoint = replace(make_checkpoint(epoch), variables={"params": state})
        store.save(checkpoint, score=None)
        del checkpoint
    store.wait()
    for epoch in range(8, 0, -1):
        restored = store.restore_newest(optimizer=shapes_of(make_checkpoint(1)))
        assert restored.epoch == epoch
        assert np.all(restored.variables["params"] == epoch)
        damage(tmp_path / str(epoch))
    store.close()


def test_an_undefined_score_is_the_worst(tmp_path):
    store = write(tmp_path, [float("nan"), 0.0, float("nan")])
    assert store.restore_best().epoch == 2
    store.close()


def test_the_optimizer_is_read_only_when_asked_for(tmp_path):
    store = write(tmp_path, [0.5])
    assert store.restore_best().optimizer is None
    store.close()


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(InputError, match="holds no checkpoint: train first"):
        store.restore_best()
    with pytest.raises(InputError, match="holds no checkpoint: train first"):
        store.restore_newest(optimizer=None)
    assert store.newest is None
    store.close()


def cut(path) -> None:
    for file in (path / "variables").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("spoil", [damage, cut, lambda path: shutil.rmtree(path / "optimizer")])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(spoil, tmp_path):
    store, warnings = write(tmp_path, [0.5, 0.6, 0.7]), []
    spoil(tmp_path / "3")
    shapes = shapes_of(make_checkpoint(1))
    assert store.restore_newest(optimizer=shapes, warn=warnings.append).epoch == 2
    (warning,) = warnings
    assert f"{tmp_path / '3'} cannot be read as a checkpoint" in warning
    assert "checkpoint 2 is used" in warning
    assert names(tmp_path) == ["2", "damaged-3"]
    # The next one has a number of its own.
    store.save(make_checkpoint(3), score=None)
    store.wait()
    assert names(tmp_path) == ["2", "4", "damaged-3"]
    store.close()


def test_where_all_are_damaged_none_is_set_aside(tmp_path):
    store = write(tmp_path, [0.5, 0.6])
    damage(tmp_path / "1")
    damage(tmp_path / "2")
    with pytest.raises(InputError, match=r"2 cannot be read as a checkpoint") as error:
        store.restore_newest(optimizer=shapes_of(make_checkpoint(1)))
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["1", "2"]
    store.close()


def test_a_damaged_best_checkpoint_is_never_replaced_by_another(tmp_path):
    store = write(tmp_path, [0.9, 0.6])
    cut(tmp_path / "1")
    with pytest.raises(InputError, match=r"1 cannot be read as a checkpoint"):
        store.restore_best()
    store.close()


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    write(tmp_path, [0.5]).close()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    write_again = CheckpointStore(tmp_path)
    write_again.save(make_checkpoint(2), score=None)
    write_again.close()
    assert names(tmp_path) == ["1", "2"]
