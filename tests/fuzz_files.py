"""Damaged and hostile files, drawn by hypothesis, and the readers that must stand them.

A program of its own, ``python fuzz_files.py COUNT FOLDER KIND...``, so that the memory that it
takes is that of the readers: it prints the outcomes and the growth of its resident memory as JSON.
A reader may return or raise `InputError` with a message of one line, within seconds, and leaves the
folder as it was; anything else ends the program with a traceback.
"""

import collections
import copy
import functools
import gzip
import json
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from afl_jax.cli import report_unraisable
from afl_jax.config import Config, check_config, read_config, to_json
from afl_jax.data.folder import list_folder_cases, read_dataset_json
from afl_jax.data.volume import Volume, read_volume, write_volume
from afl_jax.errors import InputError
from afl_jax.fingerprint import describe_data, describe_session, read_fingerprint
from afl_jax.models.pretrained import read_weights

MAX_SECONDS = 20

# --- what is done to a file ------------------------------------------------------------------


@st.composite
def damaged(draw, content: bytes, *, header: int = 0) -> bytes:
    """The bytes with a few of them changed, taken out or put in, or cut off.

    With a header, most edits fall into that many first bytes.
    """
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        reach = min(header, len(data)) if header and draw(st.integers(0, 3)) else len(data)
        place = draw(st.integers(0, max(reach - 1, 0)))
        length = draw(st.integers(1, 8))
        match draw(st.sampled_from(["change", "change", "remove", "insert", "cut", "repeat"])):
            case "change":
                data[place : place + length] = draw(st.binary(min_size=length, max_size=length))
            case "remove":
                del data[place : place + length]
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=8))
            case "cut":
                del data[place:]
            case "repeat":
                data += data[place:]
    return bytes(data)


# Offset and format of fields of a NIfTI-1 header, and hostile values for each kind.
_NIFTI_FIELDS = [
    (0, "i"), *((40 + 2 * i, "h") for i in range(8)), (70, "h"), (72, "h"),
    *((76 + 4 * i, "f") for i in range(8)), (108, "f"), (112, "f"), (116, "f"), (252, "h"),
    (254, "h"), *((256 + 4 * i, "f") for i in range(6)), *((280 + 4 * i, "f") for i in range(12)),
]  # fmt: skip
_HOSTILE_NUMBERS = {
    "i": [0, -1, 1, 2**31 - 1, -(2**31)],
    "h": [0, -1, 1, 2, 7, 8, 16, 64, 128, 512, 32767, -32768],
    "f": [0.0, -1.0, 1e-38, 1e38, -1e38, float("nan"), float("inf"), 352.0, 1e9],
}


@st.composite
def hostile_nifti(draw, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        offset, kind = draw(st.sampled_from(_NIFTI_FIELDS))
        struct.pack_into(f"<{kind}", data, offset, draw(st.sampled_from(_HOSTILE_NUMBERS[kind])))
    return bytes(data)


_HOSTILE_LINES = {
    b"NDims": ["0", "-1", "2", "4", "1000000000", "x", "99999999999999999999"],
    b"DimSize": ["0 0 0", "-1 4 3", "99999 99999 99999", "1000000000 1 1", "5", "5 4 x", "5 4 3 2"],
    b"ElementType": ["MET_DOUBLE", "MET_UCHAR", "MET_STRING", "MET_NONSENSE", ""],
    b"ElementSpacing": ["0 0 0", "-1 1 1", "nan 1 1", "inf 1 1", "1e-320 1 1", "1"],
    b"TransformMatrix": ["0 0 0 0 0 0 0 0 0", "nan 0 0 0 1 0 0 0 1", "1 1 0 1 1 0 0 0 1", "1"],
    b"Offset": ["nan 0 0", "1e308 1e308 1e308", "x"],
    b"CompressedData": ["True", "False", "maybe"],
    b"CompressedDataSize": ["0", "-1", "1", "99999999999999", "4611686018427387904"],
    b"BinaryDataByteOrderMSB": ["True"],
    b"ElementNumberOfChannels": ["0", "-1", "3", "1000000000"],
    b"HeaderSize": ["-1", "999999999999", "3"],
    b"ElementDataFile": ["/etc/passwd", "LIST", "../other.raw", "%d 1 9999999 1", "", "Local"],
}


@st.composite
def hostile_meta(draw, content: bytes) -> bytes:
    """Lines of the header changed, doubled or added, in front of the pixels."""
    mark = content.index(b"ElementDataFile")
    end = content.index(b"\n", mark) + 1
    lines = content[:end].splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(_HOSTILE_LINES)))
        line = name + b" = " + draw(st.sampled_from(_HOSTILE_LINES[name])).encode() + b"\n"
        places = [i for i, old in enumerate(lines) if old.split(b"=")[0].strip() == name]
        if places and draw(st.booleans()):
            lines[places[0]] = line
        else:
            lines.insert(draw(st.integers(0, len(lines) - 1)), line)
    return b"".join(lines) + content[end:]


_HOSTILE_VALUES = st.sampled_from(
    [None, True, 0, -1, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 10**5, "\0", "\ud800",
     "../../etc/passwd", "/etc/passwd", "a/" * 5000, [], {}, [[]], ["x", 1, None], {"0": {}}]
)  # fmt: skip


@st.composite
def hostile_json(draw, content: Any) -> bytes:
    """A value somewhere in the tree changed, taken out or wrapped; or the text itself damaged."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        node, steps = content, draw(st.integers(0, 4))
        for _ in range(steps):
            child = node[draw(st.sampled_from(_keys(node)))] if _keys(node) else None
            if not _keys(child):
                break
            node = child
        if not _keys(node):
            continue
        key = draw(st.sampled_from(_keys(node)))
        match draw(st.sampled_from(["change", "change", "remove", "add", "wrap"])):
            case "change":
                node[key] = draw(_HOSTILE_VALUES)
            case "remove":
                del node[key]
            case "add" if isinstance(node, dict):
                node[draw(st.text(max_size=5))] = draw(_HOSTILE_VALUES)
            case "wrap":
                node[key] = [node[key]]
    text = json.dumps(content).encode("utf-8", "surrogatepass")
    match draw(st.integers(0, 5)):
        case 0:
            return draw(damaged(text))
        case 1:
            return b"[" * draw(st.sampled_from([10, 10**5])) + text
    return text


def _keys(node: Any) -> list:
    if isinstance(node, dict):
        return list(node)
    return list(range(len(node))) if isinstance(node, list) else []


# --- the kinds of files, each with its readers -----------------------------------------------


def _volume() -> Volume:
    rng = np.random.default_rng(0)
    return Volume(rng.normal(100, 20, (5, 4, 3)).astype(np.float32), (0.5, 0.5, 3.0))


def _nifti(folder: Path, suffix: str) -> tuple[st.SearchStrategy, Callable]:
    path = folder / f"a{suffix}"
    write_volume(folder / "a.nii", _volume())
    plain = (folder / "a.nii").read_bytes()
    (folder / "a.nii").unlink()
    contents = st.one_of(damaged(plain, header=352), hostile_nifti(plain))
    if suffix == ".nii.gz":
        packed = gzip.compress(plain, mtime=0)
        contents = st.one_of(contents.map(gzip.compress), damaged(packed))
    return contents, functools.partial(_write_and_call, path, read_volume)


def _meta(folder: Path) -> tuple[st.SearchStrategy, Callable]:
    path = folder / "a.mha"
    write_volume(path, _volume())
    packed = path.read_bytes()
    end = packed.index(b"LOCAL\n") + 6
    pixels = _volume().array.T.tobytes()
    header = packed[:end].replace(b"CompressedData = True", b"CompressedData = False")
    plain = b"".join(line for line in header.splitlines(True) if b"DataSize" not in line) + pixels
    # Both are sound before they are damaged.
    for content in (packed, plain):
        path.write_bytes(content)
        np.testing.assert_array_equal(read_volume(path).array, _volume().array)
    both = st.sampled_from([packed, plain])
    contents = both.flatmap(lambda c: st.one_of(damaged(c, header=end), hostile_meta(c)))
    return contents, functools.partial(_write_and_call, path, read_volume)


def _dataset_json(folder: Path) -> tuple[st.SearchStrategy, Callable]:
    files = [{"image": f"./imagesTr/{name}.nii", "label": f"labelsTr/{name}.nii"} for name in "ab"]
    content = {
        "modality": {"0": "T2W"},
        "labels": {"0": "background", "1": "lesion"},
        "training": [*files, {"image": ["x.nii", "y.nii"], "label": "z.nii"}],
    }

    def read(path: Path) -> None:
        list_folder_cases(path.parent, read_dataset_json(path.parent))

    return hostile_json(content), functools.partial(_write_and_call, folder / "dataset.json", read)


def _config(folder: Path) -> tuple[st.SearchStrategy, Callable]:
    def read(path: Path) -> None:
        check_config(read_config(path))

    content = json.loads(to_json(Config()))
    return hostile_json(content), functools.partial(_write_and_call, folder / "config.json", read)


def _fingerprint(folder: Path) -> tuple[st.SearchStrategy, Callable]:
    data = describe_data("folder", keys={"a": "1", "b": "2"}, splits={"train": ["a"]})
    content = {"data": data, "sessions": [describe_session(step=0)]}
    path = folder / "fingerprint.json"
    return hostile_json(content), functools.partial(_write_and_call, path, read_fingerprint)


def _weights(folder: Path, suffix: str) -> tuple[st.SearchStrategy, Callable]:
    path = folder / f"weights{suffix}"
    arrays = {"encoder.conv1.weight": np.ones((2, 3), np.float32), "b": np.arange(5)}
    if suffix == ".safetensors":
        save_file(arrays, path)
    elif suffix == ".npz":
        np.savez(path, **arrays)
    else:
        import torch

        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    contents = damaged(path.read_bytes(), header=200)
    return contents, functools.partial(_write_and_call, path, read_weights)


def _checkpoint(folder: Path) -> tuple[st.SearchStrategy, Callable]:
    """One file of a checkpoint is damaged or gone; the whole folder is written anew each time."""
    import jax
    import jax.numpy as jnp

    from afl_jax.checkpoint import Checkpoint, CheckpointStore, EpochTotals

    sound = folder.with_name(f"{folder.name}-sound")
    optimizer = {"step": jnp.int32(3), "opt_state": {"m": jnp.arange(3.0)}}
    store = CheckpointStore(sound)
    store.save(
        Checkpoint(
            step=3,
            variables={"params": {"w": jnp.arange(64.0)}, "batch_stats": {}},
            optimizer=optimizer,
            key=jax.random.key(0),
            iterator={"next_index": 3},
            history=[{"epoch": 1, "loss": 0.5}],
            totals=EpochTotals(),
            config=Config(),
        ),
        score=0.5,
    )
    store.close()
    paths = sorted(path for path in sound.rglob("*") if path.is_file())
    contents = st.sampled_from(paths).flatmap(
        lambda path: st.tuples(
            st.just(path.relative_to(sound)),
            st.one_of(st.none(), damaged(path.read_bytes()), st.just(b"")),
        )
    )

    def read(edit: tuple[Path, bytes | None]) -> None:
        place, content = edit
        shutil.copytree(sound, folder, dirs_exist_ok=True)
        (folder / place).unlink() if content is None else (folder / place).write_bytes(content)
        store = CheckpointStore(folder, read_only=True)
        try:
            for restore in (
                store.restore_best,
                functools.partial(store.restore_newest, optimizer=optimizer),
            ):
                restored = restore()
                # What is accepted is what was written.
                np.testing.assert_array_equal(restored.variables["params"]["w"], np.arange(64.0))
        finally:
            store.close()
            shutil.rmtree(folder)

    return contents, read


KINDS: dict[str, Callable[[Path], tuple[st.SearchStrategy, Callable]]] = {
    "nii": functools.partial(_nifti, suffix=".nii"),
    "nii.gz": functools.partial(_nifti, suffix=".nii.gz"),
    "mha": _meta,
    "dataset.json": _dataset_json,
    "config": _config,
    "fingerprint": _fingerprint,
    "safetensors": functools.partial(_weights, suffix=".safetensors"),
    "npz": functools.partial(_weights, suffix=".npz"),
    "pth": functools.partial(_weights, suffix=".pth"),
    "checkpoint": _checkpoint,
}


def _write_and_call(path: Path, reader: Callable[[Path], object], content: bytes) -> None:
    path.write_bytes(content)
    before = sorted(path.parent.iterdir())
    try:
        reader(path)
    finally:
        assert sorted(path.parent.iterdir()) == before


# --- the program -----------------------------------------------------------------------------


def fuzz(kind: str, count: int, folder: Path) -> dict[str, Any]:
    """Reads that many files of a kind.

    Returns:
        How many were ``accepted`` and ``refused``, and the growth of memory in ``growth_mb``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents, read = KINDS[kind](folder)
    outcomes = collections.Counter(accepted=0, refused=0)

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(content=contents)
    def every_file_is_read_or_refused(content):
        signal.alarm(MAX_SECONDS)  # Its default action ends the program.
        try:
            read(content)
            outcomes["accepted"] += 1
        except InputError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 2000
            outcomes["refused"] += 1
        finally:
            signal.alarm(0)

    @settings(max_examples=1, database=None)
    @given(st.text(min_size=1))
    def draw_text(text):
        """Before memory is measured: hypothesis makes a table of all characters, once."""

    draw_text()
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    every_file_is_read_or_refused()
    growth_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    return {**outcomes, "growth_mb": growth_kb / 1024}


if __name__ == "__main__":
    count, folder, *kinds = sys.argv[1:]
    sys.unraisablehook = report_unraisable  # As the command line does.
    print(json.dumps({kind: fuzz(kind, int(count), Path(folder, kind)) for kind in kinds}))
