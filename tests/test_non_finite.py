"""Numbers that go wrong in a run: they are named, and the run stops or leaves the step out."""

import csv
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import PHANTOM, TINY

from afl_jax import loop
from afl_jax.cli import main
from afl_jax.commands import construct
from afl_jax.config import Config
from afl_jax.data.loader import create_records_builder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """The phantom, prepared."""
    folder = tmp_path_factory.mktemp("data")
    assert main(["prepare", "--data-dir", str(folder), *PHANTOM]) == 0
    return folder


@pytest.fixture
def bad_case(data_dir, monkeypatch) -> str:
    """The name of a training case whose loss is NaN in every epoch; its lesions tell it."""
    builder = create_records_builder(
        "phantom", data_dir=data_dir, shape=(16, 16, 8), num_train=4, num_val=3
    )
    sizes = {
        record["case_id"].decode(): np.count_nonzero(record["labels"])
        for record in builder.as_data_source("train")
    }
    name, size = max(sizes.items(), key=lambda item: item[1])
    assert list(sizes.values()).count(size) == 1
    create_loss = construct.create_loss

    def create_bad_loss(config, *, num_classes):
        loss_fn = create_loss(config, num_classes=num_classes)

        def bad_loss(logits, labels, *, voxel_mask=None):
            is_bad = jnp.sum(labels > 0, axis=(1, 2, 3)) == size
            # Through the logits, so that the gradient is NaN as well.
            logits = jnp.where(is_bad[:, None, None, None, None], jnp.nan, 1.0) * logits
            return loss_fn(logits, labels, voxel_mask=voxel_mask)

        return bad_loss

    monkeypatch.setattr(construct, "create_loss", create_bad_loss)
    return name


def command(out: Path, data_dir: Path) -> list[str]:
    return ["train", "--out", str(out), "--data.data-dir", str(data_dir), *TINY, *PHANTOM]


def test_a_run_stops_with_the_cases_their_statistics_and_the_last_checkpoint(
    bad_case, data_dir, tmp_path, capsys
):
    out = tmp_path / "run"
    assert main([*command(out, data_dir), "--checkpoint-every", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "(epoch 1): the loss is nan" in error
    assert f"{bad_case} (image from " in error
    assert "0 values not finite" in error
    # The bad case is in the first or the second of two steps.
    last = "none yet" if "step 1 " in error else str(out / "checkpoints" / "1")
    assert f"the last good checkpoint is {last}: lower optimizer.learning-rate" in error


def test_the_last_good_checkpoint_is_sound_and_the_run_may_go_on_from_it(
    data_dir, tmp_path, capsys, monkeypatch
):
    """The loss of the fifth step is NaN; two more are on their way before that is seen."""
    out = tmp_path / "run"
    read_metrics, calls = loop._read_metrics, []

    def read_bad_metrics(*arguments):
        calls.append(1)
        values = read_metrics(*arguments)
        return values | {"loss": float("nan")} if len(calls) == 5 else values

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_read_metrics", read_bad_metrics)
        options = ["--checkpoint-every", "1", "--num-epochs", "3"]
        assert main([*command(out, data_dir), *options]) == 2
    error = capsys.readouterr().err
    assert "step 5 (epoch 3): the loss is nan" in error
    assert f"the last good checkpoint is {out / 'checkpoints' / '4'}" in error
    assert main(["train", "--out", str(out), "--resume", "--non-finite", "skip"]) == 0
    assert "resumed after epoch 2, step 4" in capsys.readouterr().out


def test_a_step_is_skipped_and_named_and_the_run_ends_well(bad_case, data_dir, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*command(out, data_dir), "--non-finite", "skip"]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2  # One an epoch.
    assert all(bad_case in error and "the step is skipped" in error for error in errors)
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["skipped_steps"] for row in rows] == ["1", "1"]
    assert all(np.isfinite(float(row["loss"])) for row in rows)


def test_a_run_whose_every_step_is_skipped_ends(data_dir, tmp_path, capsys, monkeypatch):
    def create_nan_loss(config, *, num_classes) -> Callable:
        return lambda logits, labels, *, voxel_mask: jnp.nan * logits.mean(axis=(1, 2, 3, 4))

    monkeypatch.setattr(construct, "create_loss", create_nan_loss)
    assert main([*command(tmp_path / "run", data_dir), "--non-finite", "skip"]) == 2
    assert "every step of epoch 1 was skipped" in capsys.readouterr().err


def test_statistics_of_a_batch_count_what_is_not_finite():
    image = np.zeros((2, 2, 2, 2, 1), np.float32)
    image[0, 0, 0, 0], image[0, 1, 1, 1], image[1] = 4.0, np.nan, np.inf
    labels = np.zeros((2, 2, 2, 2), np.uint8)
    labels[0, 0] = 1
    text = loop._describe_batch({"case_id": ["a", "b"], "image": image, "labels": labels})
    # One 4 among seven finite values: mean 4 / 7, variance 16 / 7 - 16 / 49.
    assert text == (
        "a (image from 0 to 4, mean 0.5714, standard deviation 1.4, 1 values not finite; "
        "4 foreground voxels), b (image from 0 to 0, mean 0, standard deviation 0, 8 values not "
        "finite; 0 foreground voxels)"
    )


def test_stopping_is_the_default():
    assert Config().non_finite == "stop"
