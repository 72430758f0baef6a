"""Prediction of a whole BraTS volume: seconds beside MONAI's sliding window, and peak memory.

Claim: ``afl-jax predict`` takes an image of 240 x 240 x 155 x 4 to its mask with less than 4 GiB
beyond what XLA plans for the network itself, and a sliding window in no more time than MONAI's.

    pip install torch monai
    python -m experiments.benchmark_inference

Windows are of 128 x 128 x 128 with an overlap of a half and Gaussian weights, 18 of them; once
with a network that copies two channels, which leaves the cost of the window alone, and once with
the network, whose weights are drawn, and its equivalent in PyTorch. Both sides take turns, each
with a run before that is not timed; a ratio is ours to MONAI's, the median of the turns with the
lowest and the highest. Memory is the largest resident set of the process that ran ``predict``, with
the paper's window of the whole volume. ``--width 64 --depth 50`` is the paper's network. Cost on
two CPU cores: about 5 minutes.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from afl_jax import inference
from afl_jax.checkpoint import Checkpoint, CheckpointStore, EpochTotals
from afl_jax.commands import construct
from afl_jax.config import Config, ModelConfig, to_json
from afl_jax.data.volume import Volume, write_volume
from afl_jax.presets import PRESETS
from experiments.benchmark import alternate, compared, markdown

IMAGE_SHAPE = (240, 240, 155, 4)
PATCH_SHAPE = (128, 128, 128)
_GIB = 2**30


def main(*, depth: int = 18, width: int = 16, rounds: int = 3) -> None:
    """Runs both parts and prints their tables.

    Args:
        depth: Of the ResNet, 18 or 50.
        width: Channels of its first convolution; 64 in the paper.
        rounds: Turns of each side.
    """
    config = dataclasses.replace(
        PRESETS["brats2018"],
        model=ModelConfig(
            name=f"resnet{depth}_unet",
            strides=PRESETS["brats2018"].model.strides,
            width=width,
            decoder_features=tuple(max(f * width // 64, 8) for f in (256, 128, 64, 32, 16)),
        ),
    )
    image = np.random.default_rng(0).standard_normal(IMAGE_SHAPE, np.float32)
    print(markdown(bench_window(config, image, rounds=rounds)), flush=True)
    print("\n" + markdown([measure_memory(config, image)]), flush=True)


def bench_window(config: Config, image: np.ndarray, *, rounds: int) -> list[dict[str, str]]:
    """Sliding windows by us and by MONAI.

    Args:
        config: Of the network.
        image: ``[X, Y, Z, C]``.
        rounds: Turns of each side.

    Returns:
        A row for the window alone and one for the network.
    """
    import torch
    from monai.inferers import sliding_window_inference

    from experiments import torch_peer

    model = construct.create_model(config)
    variables = _initialise(config, image.shape[-1])
    class_probs = jax.jit(lambda v, patches: inference.class_probs(model.apply(v, patches)))
    network = functools.partial(class_probs, variables)
    peer = torch_peer.ResNetUNet(
        depth=int(config.model.name[6:8]),
        strides=config.model.strides,
        width=config.model.width,
        decoder_features=config.model.decoder_features,
        num_channels=image.shape[-1],
        num_classes=config.model.num_classes,
    ).eval()
    tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0)))[None]

    def window(apply_fn: Callable) -> None:
        inference.sliding_window(apply_fn, image, patch_shape=PATCH_SHAPE)

    def monai_window(predictor: Callable) -> None:
        with torch.inference_mode():
            sliding_window_inference(tensor, PATCH_SHAPE, 1, predictor, 0.5, mode="gaussian")

    rows = []
    copy = jax.jit(lambda patches: patches[..., :2])
    for name, ours, theirs in (
        ("window alone", copy, lambda patches: patches[:, :2].clone()),
        (config.model.name, network, lambda patches: peer(patches).sigmoid()),
    ):
        seconds = alternate(
            {
                "ours": lambda ours=ours: window(ours),
                "monai": lambda theirs=theirs: monai_window(theirs),
            },
            rounds,
        )
        row = {"network": name, "seconds": f"{np.median(seconds['ours']):.2f}"}
        rows.append(row | compared(seconds["ours"], seconds["monai"], peer="MONAI"))
    return rows


def measure_memory(config: Config, image: np.ndarray) -> dict[str, str]:
    """Peak memory of ``afl-jax predict``, in a process of its own.

    Args:
        config: Of the run.
        image: ``[X, Y, Z, C]``.

    Returns:
        A row of a table, in GiB.
    """
    model = construct.create_model(config)
    patch = jax.ShapeDtypeStruct((1, *config.data.shape, image.shape[-1]), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), patch)
    plan = jax.jit(model.apply).lower(variables, patch).compile().memory_analysis()
    network = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    with tempfile.TemporaryDirectory() as folder:
        run, path = Path(folder, "run"), Path(folder, "image.nii")
        run.mkdir()
        (run / "config.json").write_text(to_json(config))
        store = CheckpointStore(run / "checkpoints")
        checkpoint = Checkpoint(
            step=1,
            variables=_initialise(config, image.shape[-1]),
            optimizer={"step": jnp.zeros((), jnp.int32)},
            key=jax.random.key(0),
            iterator={},
            history=[],
            totals=EpochTotals(),
            config=config,
        )
        store.save(checkpoint, score=0.0)
        store.close()
        write_volume(path, Volume(image))
        arguments = ["predict", "--run", run, "--images", path, "--out", Path(folder, "masks")]
        program = "import sys; from afl_jax.cli import main; sys.exit(main(sys.argv[1:]))"
        process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)])
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"afl-jax predict ended with status {status}.")
    peak = usage.ru_maxrss * 1024
    return {
        "afl-jax predict": " x ".join(map(str, image.shape)),
        "peak memory, GiB": f"{peak / _GIB:.2f}",
        "network by XLA's plan, GiB": f"{network / _GIB:.2f}",
        "beyond the network, GiB": f"{(peak - network) / _GIB:.2f}",
        "seconds, whole process, CPU": f"{usage.ru_utime + usage.ru_stime:.0f}",
    }


def _initialise(config: Config, num_channels: int) -> dict:
    patch = jnp.zeros((1, 16, 16, 16, num_channels))
    return jax.jit(construct.create_model(config).init)(jax.random.key(0), patch)


if __name__ == "__main__":
    tyro.cli(main)
