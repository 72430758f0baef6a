"""What a hostile file must not reach: code, other folders, other users, the memory."""

import ast
import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from messages import one_line
from tiny_run import PHANTOM, TINY, make_folder, some_labels

import afl_jax
from afl_jax.data.folder import list_folder_cases, read_dataset_json
from afl_jax.data.headers import MAX_NUM_VALUES
from afl_jax.data.volume import Volume, read_volume, write_volume
from afl_jax.errors import InputError, print_error

SOURCES = sorted(Path(afl_jax.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_is_unpickled_or_run(path):
    """By name: what unpickles, and what evaluates text; torch.load reads arrays alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {getattr(node, "module", ""), *(alias.name for alias in node.names)}
            assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in ("eval", "exec", "os.system", "compile")
        assert options.get("shell") != "True"
        if called == "torch.load":
            assert options["weights_only"] == "True"
        if called == "np.load":
            assert options["allow_pickle"] == "False"


@pytest.mark.parametrize("key", ["image", "label"])
@pytest.mark.parametrize(
    "name",
    ["../outside.nii.gz", "/etc/passwd", "imagesTr/../../outside.nii.gz", "imagesTr/link.nii.gz"],
)
def test_paths_of_a_data_set_cannot_leave_its_folder(name, key, tmp_path):
    source = make_folder(tmp_path / "raw", {"a": some_labels(), "b": some_labels()})
    outside = tmp_path / "outside.nii.gz"
    write_volume(outside, Volume(some_labels()))
    (source / "imagesTr" / "link.nii.gz").symlink_to(outside)
    content = json.loads((source / "dataset.json").read_text())
    content["training"][0][key] = name
    (source / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=one_line("leads out of the folder")):
        list_folder_cases(source, read_dataset_json(source))


@pytest.mark.parametrize(
    "umask",
    [
        0o077,
        pytest.param(0o022, marks=pytest.mark.slow),
        pytest.param(0o002, marks=pytest.mark.slow),
    ],
    ids=["private", "usual", "group"],
)
def test_files_are_created_with_the_umask_of_the_user(umask, tmp_path):
    """Of a whole run: prepared data, checkpoints, log, figures, masks."""
    program = "import os, sys; os.umask(int(sys.argv[1])); from afl_jax.cli import main; "
    program += "sys.exit(main(sys.argv[2:]))"
    out, image = tmp_path / "new" / "run", tmp_path / "image.nii.gz"
    write_volume(image, Volume(np.random.default_rng(0).random((16, 16, 8, 3), np.float32)))
    train = ["train", "--out", str(out), "--data.data-dir", str(tmp_path / "new" / "data")]
    predict = ["predict", "--run", str(out), "--out", str(tmp_path / "new" / "masks")]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "new" / "cache")}
    for arguments in (
        [*train, *TINY, *PHANTOM, "--num-epochs", "1"],
        [*predict, "--images", str(image)],
    ):
        command = [sys.executable, "-c", program, str(umask), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    paths = [tmp_path / "new", *(tmp_path / "new").rglob("*")]
    assert {path.suffix for path in paths} >= {".csv", ".json", ".jsonl", ".png", ".gz"}
    for path in paths:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, f"{path}: {mode:o}"


def absurd_nifti(path: Path) -> None:
    """float32, 32767 x 32767 x 1000 voxels."""
    write_volume(path, Volume(np.zeros((4, 4, 4), np.float32)))
    content = bytearray(path.read_bytes())
    struct.pack_into("<4h", content, 40, 3, 32767, 32767, 1000)
    path.write_bytes(content)


def absurd_meta(path: Path) -> None:
    write_volume(path, Volume(np.zeros((4, 4, 4), np.float32)))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"DimSize = 4 4 4", b"DimSize = 99999 99999 999"))


def large_nifti(path: Path) -> None:
    """Within what may be read, but of all the four gibibytes there are 256 bytes."""
    absurd_nifti(path)
    content = bytearray(path.read_bytes())
    struct.pack_into("<4h", content, 40, 3, 1024, 1024, 1024)
    path.write_bytes(content)


def large_meta(path: Path) -> None:
    write_volume(path, Volume(np.zeros((4, 4, 4), np.float32)))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"DimSize = 4 4 4", b"DimSize = 1024 1024 1024"))


@pytest.mark.parametrize(
    ("make", "suffix", "message"),
    [
        (absurd_nifti, ".nii", "the header claims size (32767, 32767, 1000)"),
        (absurd_meta, ".mha", "the header claims size (99999, 99999, 999"),
        (large_nifti, ".nii", "cannot be read as an image"),
        (large_meta, ".mha", "cannot be read as an image"),
    ],
    ids=["absurd nii", "absurd mha", "truncated nii", "truncated mha"],
)
def test_absurd_sizes_are_refused_before_memory_is_taken(make, suffix, message, tmp_path):
    """In a process of its own, of which the largest memory is measured."""
    path = tmp_path / f"a{suffix}"
    make(path)
    with pytest.raises(InputError, match=one_line(message)):
        read_volume(path)
    program = (
        "import resource, sys; from afl_jax.data.volume import read_volume\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = used()\n"
        "try: read_volume(sys.argv[1])\n"
        "except ValueError: print(used() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 50_000  # kB
    assert MAX_NUM_VALUES >= 1024**3


def test_a_name_cannot_write_control_characters_to_the_terminal(capsys):
    print_error("no such file: \x1b[2Jcase\x07.nii.gz\nsecond line")
    expected = "afl-jax: error: no such file: \\x1b[2Jcase\\x07.nii.gz second line\n"
    assert capsys.readouterr().err == expected


def test_a_dollar_in_a_name_is_no_formula_of_a_figure(tmp_path):
    from afl_jax import figures

    plane = np.zeros((8, 8, 4), np.uint8)
    case = figures.OverlayCase(
        case_id="$x^$",
        image=plane[..., None].astype(np.float32),
        truth=plane,
        prediction=plane,
        spacing=(1, 1, 1),
        dice=0.5,
    )
    figures.overlay_figure([case], tmp_path / "overlay.png")
    assert (tmp_path / "overlay.png").exists()
