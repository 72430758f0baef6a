"""``afl-jax predict`` on real files, by networks that were initialised but not trained."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orientations import ORIENTATIONS, TILT, create_volume

from afl_jax.checkpoint import Checkpoint, CheckpointStore, EpochTotals
from afl_jax.cli import main
from afl_jax.commands import construct
from afl_jax.commands.predict import predict_prepared
from afl_jax.config import Config, DataConfig, ModelConfig, to_json
from afl_jax.data import preprocess
from afl_jax.data.volume import Volume, read_volume, same_grid, write_volume

CONFIG = Config(
    data=DataConfig(shape=(16, 16, 8), normalisation="none"),
    model=ModelConfig(
        name="resnet18_unet",
        strides=((2, 2, 1), (2, 2, 2), (1, 1, 1), (2, 2, 2), (1, 1, 1)),
        width=4,
        decoder_features=(8, 8, 4, 4, 4),
    ),
)


def make_run(
    folder: Path, *, config: Config = CONFIG, num_channels: int = 2, seed: int = 0
) -> Path:
    """A run with a checkpoint of weights that were drawn."""
    image = jnp.zeros((1, *config.data.shape, num_channels))
    model = construct.create_model(config)
    variables = jax.jit(model.init)(jax.random.key(seed), image)
    # Logits far from 0, so that the probabilities differ from 0.5 and from each other.
    head = variables["params"]["head"]
    head["kernel"], head["bias"] = 3 * head["kernel"], head["bias"] - 0.5 * seed
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(CONFIG))
    store = CheckpointStore(folder / "checkpoints")
    checkpoint = Checkpoint(
        step=1,
        variables=variables,
        optimizer={"step": jnp.zeros((), jnp.int32)},
        key=jax.random.key(0),
        iterator={},
        history=[],
        totals=EpochTotals(),
        config=CONFIG,
    )
    store.save(checkpoint, score=0.5)
    store.close()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three cases of two channels, each channel in a file of its own."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in "abc":
        for channel in range(2):
            array = rng.standard_normal((19, 16, 9), np.float32)
            write_volume(folder / f"{name}_000{channel}.nii.gz", Volume(array, (0.5, 0.5, 3.0)))
    return folder


def predict(
    run: Path | list[Path], images: Path, out: Path, *options: str, code: int = 0
) -> dict[str, Volume]:
    """Predicts all cases of the folder; its masks, and probabilities where there are any."""
    runs = map(str, run if isinstance(run, list) else [run])
    arguments = ["--images", str(images), "--channels", "_0000", "_0001", "--out", str(out)]
    assert main(["predict", "--run", *runs, *arguments, *options]) == code
    return {str(path.relative_to(out)): read_volume(path) for path in out.rglob("*.nii.gz")}


@pytest.mark.parametrize("rotation", [None, TILT], ids=["aligned", "oblique"])
@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=str)
def test_a_threshold_predicts_the_threshold_of_the_original(orientation, rotation, tmp_path):
    path, threshold = tmp_path / "image.nii.gz", 105
    write_volume(path, create_volume(*orientation, rotation))
    original = read_volume(path)

    def apply_fn(patches):
        return jnp.concatenate([patches <= threshold, patches > threshold], axis=-1) * 1.0

    prepared = preprocess.prepare_image(original, normalisation="none")
    probs = predict_prepared(
        prepared, original, apply_fn=apply_fn, patch_shape=(4, 4, 4), overlap=0.5
    )
    write_volume(tmp_path / "mask.nii.gz", replace(probs, array=probs.array[..., 1] > 0.5))
    mask = read_volume(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(mask.array, original.array > threshold)
    for name in ("spacing", "origin", "direction"):
        assert getattr(probs, name) == getattr(original, name)
        # The header holds float32, and the direction as a quaternion.
        np.testing.assert_allclose(getattr(mask, name), getattr(original, name), atol=1e-6)
    # The two classes still make up one.
    np.testing.assert_allclose(probs.array.sum(axis=-1), 1, atol=1e-6)


def test_what_the_prepared_grid_cuts_off_is_background():
    image = Volume(np.ones((9, 4, 4), np.float32))
    prepared = preprocess.prepare_image(image, shape=(5, 4, 4), normalisation="none")

    def sure(patches):
        return jnp.concatenate([0 * patches, patches], axis=-1)

    probs = predict_prepared(prepared, image, apply_fn=sure, patch_shape=(5, 4, 4))
    np.testing.assert_allclose(probs.array[:, 0, 0, 1], [0, 0, 1, 1, 1, 1, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(probs.array[:, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 1, 1], atol=1e-6)
    alone = predict_prepared(prepared, image, apply_fn=lambda x: x, patch_shape=(5, 4, 4))
    np.testing.assert_allclose(alone.array[:, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0, 0], atol=1e-6)


def test_the_channels_of_a_folder_are_joined_by_their_endings(run, images, tmp_path):
    found = predict(run, images, tmp_path / "all", "--probabilities")
    assert sorted(found) == [*(f"{x}.nii.gz" for x in "abc"),
                             *(f"probabilities/{x}.nii.gz" for x in "abc")]  # fmt: skip
    assert all(same_grid(v, read_volume(images / "a_0000.nii.gz")) for v in found.values())
    probs = found["probabilities/a.nii.gz"].array
    assert probs.shape == (19, 16, 9, 2)
    np.testing.assert_array_equal(found["a.nii.gz"].array, probs[..., 1] > 0.5)
    assert 0 < found["a.nii.gz"].array.mean() < 1
    # By hand, and in one file, it is the same case.
    files = ",".join(str(images / f"a_000{c}.nii.gz") for c in range(2))
    joined = np.stack([read_volume(images / f"a_000{c}.nii.gz").array for c in range(2)], axis=-1)
    (tmp_path / "whole").mkdir()
    write_volume(tmp_path / "whole" / "w.nii.gz", Volume(joined, (0.5, 0.5, 3.0)))
    out = tmp_path / "hand"
    arguments = ["--images", files, str(tmp_path / "whole"), "--out", str(out)]
    assert main(["predict", "--run", str(run), *arguments]) == 0
    for name in ("a_0000", "w"):
        mask = read_volume(out / f"{name}.nii.gz")
        np.testing.assert_array_equal(mask.array, found["a.nii.gz"].array)


def test_a_case_that_lacks_a_channel_does_not_stop_the_others(run, images, tmp_path, capsys):
    for path in images.iterdir():
        if path.name != "b_0001.nii.gz":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    found = predict(run, tmp_path, tmp_path / "masks", code=2)
    assert sorted(found) == ["a.nii.gz", "c.nii.gz"]
    error = capsys.readouterr().err
    assert f"{tmp_path / 'b_0001.nii.gz'}: no such file" in error
    assert error.count("\n") == 1


def test_an_image_with_other_channels_does_not_stop_the_others(run, tmp_path, capsys):
    for name, num_channels in (("good", 2), ("bad", 3)):
        array = np.ones((16, 16, 8, num_channels), np.float32)
        write_volume(tmp_path / f"{name}.nii.gz", Volume(array))
    out = tmp_path / "masks"
    arguments = ["--images", str(tmp_path), "--out", str(out)]
    assert main(["predict", "--run", str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'bad.nii.gz'}: expected 2 channels" in error
    assert error.count("\n") == 1
    assert [path.name for path in out.glob("*.nii.gz")] == ["good.nii.gz"]


def test_prediction_goes_on_where_it_stopped(run, images, tmp_path, capsys):
    predict(run, images, tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.nii.gz")}
    (tmp_path / "b.nii.gz").unlink()
    predict(run, images, tmp_path)
    assert "2 of 3 cases are there already" in capsys.readouterr().out
    again = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.nii.gz")}
    assert {name for name in times if again[name] != times[name]} == {"b.nii.gz"}
    # Probabilities were not asked for before: they are missing, so all is done once more.
    assert len(predict(run, images, tmp_path, "--probabilities")) == 6
    predict(run, images, tmp_path, "--overwrite")
    overwritten = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.nii.gz")}
    assert all(overwritten[name] != again[name] for name in times)


def test_masks_of_other_settings_are_not_mixed(run, images, tmp_path, capsys):
    predict(run, images, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    predict(run, images, tmp_path, "--overlap", "0.25", code=2)
    error = capsys.readouterr().err
    assert f"{tmp_path / 'a.nii.gz'} was made with other settings (overlap: 0.5, now 0.25)" in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    predict(run, images, tmp_path, "--overlap", "0.25", "--overwrite")
    assert json.loads((tmp_path / "predictions.json").read_text())["overlap"] == 0.25
    # A mask that is none of these cases would keep the settings of old.
    (tmp_path / "c.nii.gz").rename(tmp_path / "d.nii.gz")
    predict(run, images, tmp_path, "--overlap", "0.5", "--overwrite", code=2)
    assert "d.nii.gz was made with other settings" in capsys.readouterr().err
    (tmp_path / "predictions.json").unlink()
    predict(run, images, tmp_path, code=2)
    assert "a.nii.gz exists, and nothing says what made it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_prediction_goes_on(run, images, tmp_path):
    program = "import sys; from afl_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--images", str(images), "--channels", "_0000", "_0001", "--out", str(tmp_path)]
    command = [sys.executable, "-c", program, "predict", "--run", str(run), *arguments]
    # Slowed down by small steps, so that it is killed between two cases.
    process = subprocess.Popen([*command, "--overlap", "0.8"])
    while not list(tmp_path.glob("*.nii.gz")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.nii.gz")}
    whole = predict(run, images, tmp_path, "--overlap", "0.8")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    expected = predict(run, images, tmp_path / "again", "--overlap", "0.8")
    for name, mask in expected.items():
        np.testing.assert_array_equal(whole[name].array, mask.array)


def test_an_ensemble_averages_the_probabilities(run, images, tmp_path):
    other = make_run(tmp_path / "other", seed=1)
    each = [
        predict(r, images, tmp_path / f"out{i}", "--probabilities")["probabilities/a.nii.gz"].array
        for i, r in enumerate((run, other))
    ]
    assert np.abs(each[0] - each[1]).max() > 0.1
    both = predict([run, other], images, tmp_path / "both", "--probabilities")
    mean = (each[0] + each[1]) / 2
    np.testing.assert_allclose(both["probabilities/a.nii.gz"].array, mean, atol=1e-5)
    np.testing.assert_array_equal(both["a.nii.gz"].array, mean[..., 1] > 0.5)
    settings = json.loads((tmp_path / "both" / "predictions.json").read_text())
    assert [network["source"] for network in settings["networks"]] == [str(run), str(other)]


def test_networks_that_take_other_images_are_no_ensemble(run, images, tmp_path, capsys):
    other = make_run(tmp_path / "other", num_channels=3)
    arguments = ["--images", str(images / "a_0000.nii.gz"), "--out", str(tmp_path / "out")]
    assert main(["predict", "--run", str(run), str(other), *arguments]) == 2
    assert "does not go with" in (error := capsys.readouterr().err)
    assert "it takes 3 channels, not 2" in error
    assert not (tmp_path / "out").exists()


def test_mirroring_averages_over_flips(run, images, tmp_path):
    (tmp_path / "flipped").mkdir()
    for path in images.glob("a_*"):
        volume = read_volume(path)
        flipped = replace(volume, array=np.ascontiguousarray(volume.array[::-1]))
        for place in (tmp_path / path.name, tmp_path / "flipped" / path.name):
            write_volume(place, flipped if place.parent.name == "flipped" else volume)
    # Odd steps would move the patches of the flipped image: one patch that holds all.
    options = ["--probabilities", "--overlap", "0"]
    plain, flipped, mirrored = (
        predict(run, folder, tmp_path / name, *options, *more)["probabilities/a.nii.gz"].array
        for folder, name, more in (
            (images, "plain", ()),
            (tmp_path / "flipped", "back", ()),
            (images, "mirrored", ("--mirror-axes", "0")),
        )
    )
    assert np.abs(plain - flipped[::-1]).max() > 0.01
    np.testing.assert_allclose(mirrored, (plain + flipped[::-1]) / 2, atol=1e-5)


def test_several_devices_predict_the_same(run, images, tmp_path):
    one = predict(run, images, tmp_path / "one", "--probabilities")
    two = predict(run, images, tmp_path / "two", "--probabilities", "--num-devices", "2")
    assert set(one) == set(two)
    for name, volume in one.items():
        np.testing.assert_allclose(two[name].array, volume.array, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--channels", "_0000", "_0000"], "--channels must be endings of which none"),
        (["--channels", "_t2w", "_adc"], "whose names end in _t2w, _adc"),
        (["--mirror-axes", "3"], "--mirror-axes must be different axes of 0, 1, 2"),
        (["--patch-batch", "0"], "--patch-batch must be at least 1"),
        (["--num-devices", "9"], "num_devices must be between 1 and 8"),
        (["--blend", "linear"], "blend"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_leave_nothing(run, images, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    arguments = ["predict", "--run", str(run), "--images", str(images), "--out", str(out)]
    if options[0] != "--channels":
        options = [*options, "--channels", "_0000", "_0001"]
    try:
        assert main([*arguments, *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    except SystemExit as stop:  # the command line's own errors
        assert stop.code == 2
        assert message in "".join(capsys.readouterr())
    assert not out.exists()


def test_a_damaged_checkpoint_is_one_line(images, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    for path in (run / "checkpoints").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    predict(run, images, tmp_path / "out", code=2)
    error = capsys.readouterr().err
    assert f"{run / 'checkpoints' / '1'} cannot be read as a checkpoint" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
