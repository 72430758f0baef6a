"""The program as a user runs it: real files, real checkpoints, real exit codes."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_run import PHANTOM, TINY, make_folder, some_labels

from afl_jax import training
from afl_jax.checkpoint import CheckpointStore
from afl_jax.cli import main
from afl_jax.data.volume import Volume, read_volume, same_grid, write_volume
from afl_jax.models.pretrained import to_torch


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir) -> Path:
    """A finished run on the phantom; the step is traced once in it."""
    out = tmp_path_factory.mktemp("runs") / "phantom"
    traces = []
    train_step = training.train_step

    def counted_step(*arguments, **options):
        traces.append(1)
        return train_step(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", counted_step)
        code = main(["train", "--out", str(out), "--data.data-dir", str(data_dir), *TINY, *PHANTOM])
    assert code == 0
    assert len(traces) == 1
    return out


def test_a_run_leaves_its_log_checkpoints_and_figures(run):
    rows = read_rows(run / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for name in (
        *("loss", "gamma", "val_dice", "val_iou", "val_sensitivity", "val_specificity"),
        *("volumes_per_second", "data_wait_fraction"),
    ):
        float(rows[-1][name])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [float(row["loss"]) for row in rows]
    assert len(read_rows(run / "validation.csv")) == 3
    for name in ("curves.png", "overlay.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "config.json").read_text())["num_epochs"] == 2
    assert list((run / "checkpoints").iterdir())


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, tmp_path, data_dir):
    shared = ["--data.data-dir", str(data_dir), *TINY, *PHANTOM]
    out = ["--out", str(tmp_path / "resumed")]
    assert main(["train", *out, *shared, "--num-epochs", "1"]) == 0
    assert main(["train", *out, "--resume", "--num-epochs", "2", "--tensorboard"]) == 0
    assert list((tmp_path / "resumed" / "tensorboard").glob("events.*"))
    first, resumed = read_rows(run / "metrics.csv"), read_rows(tmp_path / "resumed/metrics.csv")
    for name in ("loss", "gradient_norm", "gamma", "val_loss", "val_dice"):
        assert [row[name] for row in resumed] == [row[name] for row in first]


def test_masks_lie_on_their_images(run, tmp_path):
    rng = np.random.default_rng(0)
    # Larger than the patch, smaller than it, anisotropic, flipped and oblique.
    angle = 0.3
    oblique = (np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, 1)
    volumes = {
        "large": Volume(rng.random((21, 17, 9, 3), np.float32), (1, 1, 3)),
        "small": Volume(rng.random((9, 11, 5, 3), np.float32), (0.5, 0.7, 3), (5, -6, 7)),
        "flipped": Volume(
            rng.random((16, 18, 8, 3), np.float32), direction=(0, -1, 0, -1, 0, 0, 0, 0, 1)
        ),
        "oblique": Volume(rng.random((16, 16, 8, 3), np.float32), direction=oblique),
    }
    for name, volume in volumes.items():
        write_volume(tmp_path / f"{name}.nii.gz", volume)
    files = [str(tmp_path / f"{name}.nii.gz") for name in volumes]
    out = tmp_path / "masks"
    assert main(["predict", "--run", str(run), "--images", *files, "--out", str(out)]) == 0
    for file in files:
        image, mask = read_volume(file), read_volume(out / Path(file).name)
        assert mask.array.dtype == np.uint8
        assert same_grid(mask, image, tolerance_mm=1e-4)


def test_channels_may_come_from_several_files(run, tmp_path):
    array = np.random.default_rng(0).random((16, 16, 8, 3), np.float32)
    write_volume(tmp_path / "whole.nii.gz", Volume(array))
    for c in range(3):
        write_volume(tmp_path / f"part_{c}.nii.gz", Volume(array[..., c]))
    parts = ",".join(str(tmp_path / f"part_{c}.nii.gz") for c in range(3))
    whole = str(tmp_path / "whole.nii.gz")
    out = tmp_path / "masks"
    assert main(["predict", "--run", str(run), "--images", whole, parts, "--out", str(out)]) == 0
    np.testing.assert_array_equal(
        read_volume(out / "part_0.nii.gz").array, read_volume(out / "whole.nii.gz").array
    )


def test_evaluation_counts_what_is_there(tmp_path, capsys):
    truth, prediction = np.zeros((2, 8, 8, 4), np.uint8)
    truth[1:3, 1:3, 1:3] = 1
    truth[6, 6, 1] = 2
    prediction[1:3, 1:3, 1] = 1
    for folder, array in (("labels", truth), ("predictions", prediction)):
        (tmp_path / folder).mkdir()
        write_volume(tmp_path / folder / "a.nii.gz", Volume(array, (1, 1, 2)))
    (tmp_path / "labels" / "extra.nii.gz").write_bytes(b"not read")
    arguments = [
        "--predictions",
        str(tmp_path / "predictions"),
        "--labels",
        str(tmp_path / "labels"),
    ]
    assert main(["evaluate", *arguments]) == 0
    (row,) = read_rows(tmp_path / "predictions" / "evaluation" / "cases.csv")
    # 4 of 9 foreground voxels are found, and 1 of 2 lesions.
    assert float(row["dice"]) == pytest.approx(2 * 4 / (4 + 9))
    assert float(row["iou"]) == pytest.approx(4 / 9)
    assert float(row["sensitivity"]) == pytest.approx(4 / 9)
    assert float(row["specificity"]) == 1
    assert [row[f"lesion_{name}"] for name in ("tp", "fp", "fn")] == ["1", "0", "1"]
    assert "mean" in capsys.readouterr().out

    # Without the second label, half of the lesion is found.
    arguments += [
        "--label-map",
        *["0", "0", "1", "1", "2", "0"],
        "--out",
        str(tmp_path / "mapped"),
    ]
    assert main(["evaluate", *arguments]) == 0
    (row,) = read_rows(tmp_path / "mapped" / "cases.csv")
    assert float(row["dice"]) == pytest.approx(2 * 4 / (4 + 8))


def folder_arguments(source: Path, out: Path, data_dir: Path) -> list[str]:
    return [
        *("train", "--out", str(out), "--data.name", "folder", "--data.source", str(source)),
        *("--data.data-dir", str(data_dir), "--data.shape", "16", "16", "8", *TINY),
    ]


def without_label(source: Path) -> str:
    (source / "labelsTr" / "b.nii.gz").unlink()
    return "case b: its label"


def with_another_shape(source: Path) -> str:
    write_volume(source / "labelsTr" / "b.nii.gz", Volume(some_labels((16, 16, 9))))
    return "shape (16, 16, 9) against (16, 16, 8)"


def truncated(source: Path) -> str:
    path = source / "imagesTr" / "b.nii.gz"
    path.write_bytes(path.read_bytes()[:500])
    return f"{path}: "


def with_another_value(source: Path) -> str:
    write_volume(source / "labelsTr" / "b.nii.gz", Volume(some_labels(value=7)))
    return "b.nii.gz: "


@pytest.mark.parametrize(
    "damage", [without_label, with_another_shape, truncated, with_another_value]
)
def test_bad_data_is_one_line_and_only_good_cases_are_kept(damage, tmp_path, capsys):
    source = make_folder(tmp_path / "raw", {name: some_labels() for name in "abcd"})
    message = damage(source)
    out, data_dir = tmp_path / "run", tmp_path / "data"
    assert main(folder_arguments(source, out, data_dir)) == 2
    error = capsys.readouterr().err
    assert error.startswith("afl-jax: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()
    left = [path for path in data_dir.rglob("*") if path.is_file()]
    assert all(path.parent.name == ".cases" and path.suffix == ".record" for path in left)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.name", "folder", "--data.source", "/nowhere"], "/nowhere: no such folder"),
        (["--data.name", "imagenet"], "no data set is called 'imagenet'"),
        (["--data.source", "x"], "data set 'phantom' has no setting 'source'"),
        (["--loss.name", "dyce"], "loss.name 'dyce' is unknown: choose from adaptive_focal"),
        (["--loss.options", "gama", "2"], "'gama' is not an option of adaptive_focal"),
        (["--loss.options", "balance", "all"], "loss.options: balance must be one of"),
        (["--model.name", "vgg"], "model: unknown model 'vgg': choose from resnet18_unet"),
        (["--data.shape", "17", "16", "8"], "(16, 16, 8) or (24, 16, 8) would do"),
        (["--num-devices", "2", "--batch-size", "3"], "batch_size must be a multiple of"),
        (["--batch-size", "8"], "batch_size must be at most 4"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--eval-every", "0"], "eval_every must be at least 1, got 0"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--model.width", "0"], "model.width must be at least 1, got 0"),
        (["--model.strides", "2", "2", "2"], "model.strides must be five triples"),
        (["--model.decoder-features", "8", "0"], "model.decoder_features must be five numbers"),
        (["--augment.flip-probability", "2"], "augment.flip_probability must be from 0 to 1"),
        (["--loss.options", "gamma", "abc"], "loss.options: "),
        (["--optimizer.num-warmup-steps", "4"], "num_warmup_steps must be less than"),
        (["--config", "/nowhere.json"], "/nowhere.json cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, data_dir, capsys):
    out = tmp_path / "run"
    common = ["train", "--out", str(out), "--data.data-dir", str(data_dir), *TINY]
    phantom = [] if "--data.name" in arguments else PHANTOM
    assert main([*common, *phantom, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_run_folder_that_exists_is_left_alone(run, data_dir, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["train", "--out", str(run), "--data.data-dir", str(data_dir)]) == 2
    assert (
        "exists already: choose another folder, or go on with --resume" in capsys.readouterr().err
    )
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_resuming_with_another_config_is_refused(run, capsys):
    assert main(["train", "--out", str(run), "--resume", "--batch-size", "4"]) == 2
    assert "where batch_size is 2, got 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--run", "nowhere", "--images", "{tmp}/a.nii.gz"],
            "--run nowhere is not the folder of a",
        ),
        (["--run", "{run}", "--images", "{tmp}/a.nii.gz", "--overlap", "1"], "--overlap must be"),
        (["--run", "{run}", "--images", "{tmp}/masks/a.nii.gz"], "would overwrite the image"),
        (["--run", "{run}", "--images", "{tmp}/a.nii.gz", "{tmp}/b/a.nii.gz"], "would both be"),
        (["--run", "{run}", "--images", "{tmp}/a.nii.gz"], "expected 3 channels"),
    ],
)
def test_impossible_predictions_are_one_line(arguments, message, run, tmp_path, capsys):
    write_volume(tmp_path / "a.nii.gz", Volume(np.ones((4, 4, 4), np.float32)))
    arguments = [argument.format(run=run, tmp=tmp_path) for argument in arguments]
    assert main(["predict", *arguments, "--out", str(tmp_path / "masks")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_one_bad_image_does_not_stop_the_others(run, tmp_path, capsys):
    good, bad = tmp_path / "good.nii.gz", tmp_path / "bad.nii.gz"
    write_volume(good, Volume(np.ones((16, 16, 8, 3), np.float32)))
    bad.write_bytes(good.read_bytes()[:100])
    out = tmp_path / "masks"
    arguments = ["predict", "--run", str(run), "--out", str(out), "--images", str(bad), str(good)]
    assert main(arguments) == 2
    assert f"afl-jax: error: {bad}" in capsys.readouterr().err
    assert [path.name for path in out.glob("*.nii.gz")] == ["good.nii.gz"]


def test_a_run_that_never_came_to_a_checkpoint_begins_anew(run, tmp_path):
    out = tmp_path / "stopped"
    (out / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.json", out)
    assert main(["train", "--out", str(out), "--resume"]) == 0
    first, again = (read_rows(folder / "metrics.csv") for folder in (run, out))
    assert [row["loss"] for row in again] == [row["loss"] for row in first]


def test_three_classes_train_predict_and_evaluate(tmp_path):
    labels = some_labels()
    labels[10:13, 10:13, 3:6] = 2
    source = make_folder(tmp_path / "raw", dict.fromkeys("abc", labels), num_labels=3)
    out, masks = tmp_path / "run", tmp_path / "masks"
    arguments = folder_arguments(source, out, tmp_path / "data")
    assert main([*arguments, "--model.num-classes", "3"]) == 0
    (row,) = read_rows(out / "validation.csv")
    assert float(row["dice"]) == pytest.approx((float(row["dice_1"]) + float(row["dice_2"])) / 2)
    images = [str(source / "imagesTr" / "a.nii.gz")]
    assert main(["predict", "--run", str(out), "--images", *images, "--out", str(masks)]) == 0
    folders = ["--predictions", str(masks), "--labels", str(source / "labelsTr")]
    assert main(["evaluate", *folders, "--num-classes", "3"]) == 0
    (row,) = read_rows(masks / "evaluation" / "cases.csv")
    assert {"dice_1", "dice_2"} <= set(row)


def test_more_classes_in_the_data_than_in_the_network_are_refused(tmp_path, capsys):
    source = make_folder(tmp_path / "raw", {name: some_labels() for name in "abc"}, num_labels=4)
    arguments = folder_arguments(source, tmp_path / "run", tmp_path / "data")
    assert main([*arguments, "--model.num-classes", "3"]) == 2
    assert "model.num_classes must be at least 4" in capsys.readouterr().err


def test_a_prediction_without_label_is_named(tmp_path, capsys):
    for folder, name in (("labels", "a"), ("predictions", "b")):
        (tmp_path / folder).mkdir()
        write_volume(tmp_path / folder / f"{name}.nii.gz", Volume(some_labels()))
    folders = [f"--{name}={tmp_path / name}" for name in ("predictions", "labels")]
    assert main(["evaluate", *folders]) == 2
    assert "predictions/b.nii.gz has no label of that name" in capsys.readouterr().err


def test_the_console_script_exits_with_2_and_no_traceback(tmp_path):
    script = Path(sys.executable).with_name("afl-jax")
    if not script.exists():
        pytest.skip("afl_jax is not installed as a console script")
    for arguments in (["train", "--out", str(tmp_path), "--data.shap", "3"], ["predict"]):
        done = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_several_devices_train_the_same_network(run, tmp_path, data_dir):
    """In a process of its own, where several devices are all there are."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    program = "import sys; from afl_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    out = tmp_path / "two"
    arguments = ["train", "--out", str(out), "--data.data-dir", str(data_dir), *TINY, *PHANTOM]
    subprocess.run(
        [sys.executable, "-c", program, *arguments, "--num-devices", "2"],
        env=environment,
        check=True,
        capture_output=True,
    )
    one, two = read_rows(run / "metrics.csv"), read_rows(out / "metrics.csv")
    # The first epoch is two steps: rounding has no room yet to grow.
    assert float(two[0]["loss"]) == pytest.approx(float(one[0]["loss"]), rel=1e-3)


@pytest.mark.real_data
def test_hippocampus_is_prepared_trained_and_predicted(real_data, tmp_path):
    source = real_data / "Task04_Hippocampus"
    out, masks = tmp_path / "run", tmp_path / "masks"
    arguments = [
        *("train", "--out", str(out), "--data.name", "folder", "--data.source", str(source)),
        *("--data.data-dir", str(tmp_path / "data"), "--data.shape", "40", "56", "40"),
        *("--data.num-val", "60", "--data.label-map", *"001121", *TINY),
        *("--num-epochs", "1"),
    ]
    assert main(arguments) == 0
    images = sorted((source / "imagesTr").glob("*.nii.gz"))[:3]
    assert (
        main(["predict", "--run", str(out), "--out", str(masks), "--images", *map(str, images)])
        == 0
    )
    for path in images:
        assert same_grid(read_volume(masks / path.name), read_volume(path), tolerance_mm=1e-4)
    labels = source / "labelsTr"
    assert main(["evaluate", "--predictions", str(masks), "--labels", str(labels)]) == 0
    assert len(read_rows(masks / "evaluation" / "cases.csv")) == 3


def test_a_network_begins_with_given_weights_and_may_keep_its_encoder(run, tmp_path, data_dir):
    store = CheckpointStore(run / "checkpoints")
    given = to_torch(jax.device_get(store.restore_best().variables))
    store.close()
    weights = tmp_path / "weights.safetensors"
    save_file(given, weights)
    out = tmp_path / "tuned"
    arguments = [*("--data.data-dir", str(data_dir)), *TINY, *PHANTOM, "--num-epochs", "1"]
    options = ["--init-weights", str(weights), "--optimizer.freeze-encoder"]
    assert main(["train", "--out", str(out), *arguments, *options]) == 0
    store = CheckpointStore(out / "checkpoints")
    tuned = to_torch(jax.device_get(store.restore_best().variables))
    store.close()
    for name, weight in tuned.items():
        learnt = "running" not in name and not name.endswith("num_batches_tracked")
        if learnt and name.startswith("encoder."):
            np.testing.assert_array_equal(weight, given[name])
    assert np.any(tuned["segmentation_head.0.weight"] != given["segmentation_head.0.weight"])

    # The same weights predict with the run's config alone as they do in the run.
    image = tmp_path / "image.nii.gz"
    write_volume(image, Volume(np.random.default_rng(0).random((16, 16, 8, 3), np.float32)))
    common = ["predict", "--images", str(image), "--out"]
    from_run = ["--run", str(run)]
    from_file = ["--config", str(run / "config.json"), "--init-weights", str(weights)]
    for name, source in (("a", from_run), ("b", from_file)):
        assert main([*common, str(tmp_path / name), *source]) == 0
    np.testing.assert_array_equal(
        read_volume(tmp_path / "a" / image.name).array,
        read_volume(tmp_path / "b" / image.name).array,
    )


def test_weights_that_do_not_fit_are_one_line(tmp_path, data_dir, capsys):
    weights = tmp_path / "weights.npz"
    np.savez(weights, **{"encoder.conv1.weight": np.zeros((1, 1, 1, 1, 1), np.float32)})
    arguments = ["train", "--out", str(tmp_path / "run"), "--data.data-dir", str(data_dir)]
    assert main([*arguments, *TINY, *PHANTOM, "--init-weights", str(weights)]) == 2
    error = capsys.readouterr().err
    assert f"{weights}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
