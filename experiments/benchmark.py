"""Speed and memory of training, inference, loss and input, beside PyTorch if asked.

Claim: the step and the inference of the paper's PI-CAI configuration take at most 1.3 times as
long as PyTorch's on a CPU, and the loss with its statistics at most half as long as MONAI's focal
loss with statistics on the host.

    python -m experiments.benchmark --peer torch --out benchmark.md

Ours and theirs take turns in one process, each with a run before that is not timed; a ratio is the
median of the ratios of the turns, with the lowest and the highest. FLOPs are those of the network
as written (native convolutions), by XLA's cost analysis, the same for both; the peak is that of a
product of two square matrices, measured here. Memory is what XLA plans for the step: state, batch
and temporaries.

The share that the loss has in a training step needs the step of its volume in the same run:
``--setups picai brats``. What the forward pass keeps for the backward pass is counted, not
measured: it can be told of any device, whatever runs this.

It needs jax, flax, optax and numpy alone; PyTorch and MONAI for the peer
(``pip install torch monai``), the whole of afl_jax for the input pipeline. Cost on two CPU cores
with ``--peer torch``: about 5 minutes. On Linux set ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1``
before it: without huge pages, page faults took 10 to 16 % of our step where it was measured.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from afl_jax import adaptive_focal_loss, create_model, parallel, training
from afl_jax.models.zoo import BRATS_STRIDES, PICAI_STRIDES


@dataclasses.dataclass(frozen=True)
class Setup:
    """A network and the batch that it is timed on."""

    batch_size: int
    spatial: tuple[int, int, int]
    num_channels: int
    strides: tuple[tuple[int, int, int], ...]
    depth: int = 50
    width: int = 64
    decoder_features: tuple[int, ...] = (256, 128, 64, 32, 16)


_PHANTOM_STRIDES = ((2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))
SETUPS = {
    # The paper's two.
    "picai": Setup(1, (160, 128, 24), 3, PICAI_STRIDES),
    "brats": Setup(1, (224, 224, 144), 4, BRATS_STRIDES),
    # The README's phantom, and MSD hippocampus at half width.
    "phantom": Setup(4, (32, 32, 16), 1, _PHANTOM_STRIDES),
    "hippocampus": Setup(
        2, (48, 64, 48), 1, BRATS_STRIDES, width=32, decoder_features=(128, 64, 32, 16, 16)
    ),
    # Networks small enough to compare losses on two cores.
    "small_phantom": Setup(
        4, (32, 32, 16), 1, _PHANTOM_STRIDES, 18, width=16, decoder_features=(64, 32, 16, 16, 8)
    ),
    "small_hippocampus": Setup(
        2, (48, 64, 48), 1, BRATS_STRIDES, 18, width=16, decoder_features=(64, 32, 16, 16, 8)
    ),
}
LOSS_SHAPES = ((160, 128, 24), (224, 224, 144))
SECTIONS = ("step", "loss", "memory", "pipeline")

Row = dict[str, str]
Step = Callable[[], None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the arguments ask for, prints its tables, and writes them as Markdown."""
    options = _parse(arguments)
    if options.peer:
        # JAX would take most of a GPU's memory beforehand, and the peer lives on the same one.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    peak = measure_peak(options.dtype)
    parts = [
        f"{_device_name()}; JAX {jax.__version__}; {options.dtype}; matrix products reach "
        f"{peak / 1e9:.0f} GFLOP/s; medians of {options.rounds} rounds."
    ]
    print(parts[0], flush=True)
    step_seconds: dict[tuple[int, ...], float] = {}
    for section in options.sections:
        if section == "step":
            rows = [
                row
                for name in options.setups
                for batch_size in options.batch_sizes or [SETUPS[name].batch_size]
                for row in bench_network(name, batch_size, options=options, peak=peak)
            ]
            step_seconds = {
                SETUPS[row["network"]].spatial: float(row["seconds"])
                for row in rows
                if row["program"] == "training step" and row["batch"] == "1"
            }
        elif section == "loss":
            rows = [
                bench_loss(shape, step_s=step_seconds.get(shape), options=options)
                for shape in LOSS_SHAPES
            ]
        elif section == "memory":
            rows = [row for name in ("picai", "brats") for row in count_memory(name)]
        elif importlib.util.find_spec("grain") is None:
            print("input pipeline: left out, it needs the whole of afl_jax (grain).")
            continue
        else:
            rows = [bench_pipeline(options=options)]
        parts.append(markdown(rows))
        print("\n" + parts[-1], flush=True)
    if options.out is not None:
        partial = options.out.with_name(options.out.name + ".partial")
        partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        partial.replace(options.out)


def bench_network(
    name: str, batch_size: int, *, options: argparse.Namespace, peak: float
) -> list[Row]:
    """A row for the training step and one for inference.

    Args:
      name: One of `SETUPS`.
      batch_size: Cases, over all devices.
      options: Of the command line.
      peak: FLOP/s of a matrix product.

    Returns:
      Two rows of a table.
    """
    setup = SETUPS[name]
    print(f"compiling and timing {name}, batch {batch_size}", file=sys.stderr, flush=True)
    devices = parallel.select_devices(options.num_devices, batch_size=batch_size)
    axis_name = parallel.axis_name(devices)
    rng = np.random.default_rng(0)
    image = rng.standard_normal((batch_size, *setup.spatial, setup.num_channels), np.float32)
    labels = (rng.random(image.shape[:-1]) < 0.02).astype(np.uint8)
    host_batch = {
        "image": image,
        "labels": labels,
        "voxel_mask": np.ones(labels.shape, bool),
        "epoch": np.zeros(batch_size, np.int32),
        "case_index": np.arange(batch_size, dtype=np.int32),
    }
    create = functools.partial(
        _create_model,
        setup,
        dtype=jnp.bfloat16 if options.dtype == "bfloat16" else None,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    model = create(axis_name=axis_name)
    optimizer = training.create_optimizer("sgd", learning_rate=1e-3, weight_decay=1e-5)

    @jax.jit
    def create_state(key: jax.Array) -> training.TrainState:
        return training.create_train_state(model.apply, model.init(key, image[:1]), optimizer)

    train_step = functools.partial(
        training.train_step, loss_fn=adaptive_focal_loss, axis_name=axis_name
    )
    infer = functools.partial(model.apply, train=False)

    state, key = parallel.replicate((create_state(jax.random.key(0)), jax.random.key(1)), devices)
    batch = parallel.shard_batch(host_batch, devices)
    step, compile_s = _compile(
        parallel.compile_step(train_step, devices, donate_state=True), state, batch, key
    )
    variables = jax.tree.map(jnp.copy, state.variables)
    predict, predict_compile_s = _compile(
        parallel.compile_step(infer, devices), variables, batch["image"]
    )

    def run_step() -> None:
        nonlocal state
        state, metrics = step(state, batch, key)
        jax.block_until_ready(metrics)

    runs: dict[str, Step] = {
        "step": run_step,
        "inference": lambda: jax.block_until_ready(predict(variables, batch["image"])),
    }
    if options.peer == "torch":
        from experiments import torch_peer

        runs["peer step"], runs["peer inference"] = torch_peer.create_steps(
            image,
            labels,
            bfloat16=options.dtype == "bfloat16",
            learning_rate=1e-3,
            depth=setup.depth,
            strides=setup.strides,
            width=setup.width,
            decoder_features=setup.decoder_features,
            num_classes=2,
        )
    seconds = alternate(runs, options.rounds)
    # Counted for the whole batch on one device, whatever the number of devices.
    alone = create().apply
    whole_state = jax.eval_shape(create_state, jax.random.key(0)).replace(apply_fn=alone)
    train_flops = count_flops(
        functools.partial(training.train_step, loss_fn=adaptive_focal_loss),
        whole_state,
        host_batch,
        jax.random.key(1),
    )
    infer_flops = count_flops(functools.partial(alone, train=False), whole_state.variables, image)
    rows = []
    for kind, program, compiling, flops in (
        ("step", step, compile_s, train_flops),
        ("inference", predict, predict_compile_s, infer_flops),
    ):
        median = np.median(seconds[kind])
        row = {
            "network": name,
            "batch": str(batch_size),
            "devices": str(len(devices)),
            "program": "training step" if kind == "step" else kind,
            "seconds": f"{median:.3f}",
            "GFLOP": f"{flops / 1e9:.0f}" if flops else "?",
            "share of peak": f"{flops / median / peak / len(devices):.0%}" if flops else "?",
            "compilation, s": f"{compiling:.0f}",
            "memory, GB": _planned_memory(program),
        }
        if options.peer is not None:
            row |= compared(seconds[kind], seconds[f"peer {kind}"])
        rows.append(row)
    return rows


def bench_loss(
    shape: tuple[int, int, int], *, step_s: float | None, options: argparse.Namespace
) -> Row:
    """The adaptive focal loss with its statistics, value and gradient.

    Args:
      shape: Voxels of the volume, with a ball of radius 12 as its lesion.
      step_s: Seconds of a training step on such a volume, of which the loss is a part, if known.
      options: Of the command line.

    Returns:
      A row of a table.
    """
    logits = np.random.default_rng(0).standard_normal((1, *shape, 2), np.float32)
    offsets = np.indices(shape) - np.reshape(shape, (3, 1, 1, 1)) // 2
    labels = (np.square(offsets).sum(axis=0) < 12**2)[None].astype(np.uint8)
    value_and_grad = jax.jit(
        jax.value_and_grad(lambda logits, labels: adaptive_focal_loss(logits, labels).mean())
    )
    on_device = jax.device_put((logits, labels))
    runs: dict[str, Step] = {"loss": lambda: jax.block_until_ready(value_and_grad(*on_device))}
    if options.peer == "torch":
        from experiments import torch_peer

        runs["peer"] = torch_peer.create_loss(logits, labels)
    seconds = alternate(runs, options.rounds)
    row = {
        "loss": "A-FL, value and gradient",
        "volume": " x ".join(map(str, shape)),
        "seconds": f"{np.median(seconds['loss']):.4f}",
        "share of a step": f"{np.median(seconds['loss']) / step_s:.1%}" if step_s else "?",
    }
    return row | (compared(seconds["loss"], seconds["peer"]) if options.peer else {})


def count_memory(name: str) -> list[Row]:
    """What a training step of batch 1 keeps from its forward to its backward pass, on a GPU or TPU.

    Gradient checkpointing computes one block at a time again: what that block keeps comes on top.

    Args:
      name: One of `SETUPS`.

    Returns:
      A row of a table for each dtype, with gradient checkpointing and without.
    """
    setup = SETUPS[name]
    image = jax.ShapeDtypeStruct((1, *setup.spatial, setup.num_channels), jnp.float32)
    labels = jax.ShapeDtypeStruct((1, *setup.spatial), jnp.uint8)
    rows = []
    for dtype in (jnp.float32, jnp.bfloat16):
        for gradient_checkpointing in (False, True):
            model = _create_model(setup, dtype=dtype, gradient_checkpointing=gradient_checkpointing)
            variables = jax.eval_shape(model.init, jax.random.key(0), image)

            def loss_fn(params, batch_stats, image, labels, model=model):
                logits, _ = model.apply(
                    {"params": params, "batch_stats": batch_stats},
                    image,
                    train=True,
                    mutable=["batch_stats"],
                )
                return adaptive_focal_loss(logits, labels).mean()

            params = variables["params"]
            kept = count_residuals(loss_fn, params, variables["batch_stats"], image, labels)
            # Parameters, their momentum and their gradient.
            state = 3 * sum(4 * leaf.size for leaf in jax.tree.leaves(params))
            rows.append(
                {
                    "network": name,
                    "dtype": jnp.dtype(dtype).name,
                    "gradient checkpointing": "yes" if gradient_checkpointing else "no",
                    "kept for the backward pass, GB": f"{kept / 1e9:.2f}",
                    "parameters, momentum, gradient, GB": f"{state / 1e9:.2f}",
                }
            )
    return rows


def count_residuals(fn: Callable[..., jax.Array], params: Any, *args: Any) -> int:
    """Bytes of what a function computes and keeps for its gradient, its arguments not counted.

    Args:
      fn: Called as ``fn(params, *args)``; differentiated by its first argument.
      params: A pytree of arrays, or of their shapes.
      *args: More of them.

    Returns:
      Bytes.
    """

    def residuals(params: Any, *args: Any) -> Any:
        return jax.vjp(lambda params: fn(params, *args), params)[1]

    # Traced as for an accelerator; else what the CPU's branches keep would be counted as well.
    def choose_default(*args: Any, cpu: Callable, default: Callable) -> Any:
        return default(*args)

    with mock.patch.object(jax.lax, "platform_dependent", choose_default):
        jaxpr = jax.make_jaxpr(residuals)(params, *args).jaxpr
    kept = {var for var in jaxpr.outvars if not isinstance(var, Literal)} - set(jaxpr.invars)
    return sum(var.aval.size * var.aval.dtype.itemsize for var in kept)


def bench_pipeline(*, options: argparse.Namespace) -> Row:
    """Volumes a second from prepared records to batches, at the grid of the PI-CAI recipe.

    Args:
      options: Of the command line.

    Returns:
      A row of a table.
    """
    from afl_jax.data import loader

    shape, num_cases = SETUPS["picai"].spatial, 16
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        builder = loader.prepare(
            "phantom",
            data_dir=folder,
            num_workers=os.cpu_count() or 1,
            shape=shape,
            num_train=num_cases,
            num_val=1,
        )
        prepare_s = time.perf_counter() - start
        batches = loader.create_loader(
            builder.as_data_source("train"), batch_size=1, shuffle=True, num_epochs=None
        )
        read = functools.partial(_read, batches, num_cases)
        seconds = alternate({"read": read}, options.rounds)["read"]
    return {
        "input pipeline": "phantom, " + " x ".join(map(str, shape)),
        "prepared, cases/s": f"{(num_cases + 1) / prepare_s:.1f}",
        "a case, s": f"{prepare_s / (num_cases + 1):.2f}",
        "read, volumes/s": f"{num_cases / np.median(seconds):.0f}",
    }


def alternate(runs: dict[str, Step], rounds: int) -> dict[str, np.ndarray]:
    """Times functions in turn, so that what slows the machine down slows all of them.

    A turn calls its function twice and times the second call, as a step of training follows a step.
    The first call pays for what the others left: a virtual machine may give memory that they freed
    back to its host after seconds (Linux' free page reporting), and getting it again costs as much
    as a step.

    Args:
      runs: Functions that return when their work is done.
      rounds: Turns of each.

    Returns:
      Seconds of each turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def measure_peak(dtype: str) -> float:
    """FLOP/s of the product of two square matrices, the best of ten.

    Args:
      dtype: Of the matrices.

    Returns:
      FLOP/s.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    run = lambda: jax.block_until_ready(product(matrix, matrix))  # noqa: E731
    return 2 * size**3 / alternate({"product": run}, 10)["product"].min()


def count_flops(fn: Callable[..., Any], *args: Any) -> float | None:
    """FLOPs of a function with native convolutions, by XLA's cost analysis.

    Args:
      fn: The function.
      *args: Its arguments, or their shapes.

    Returns:
      FLOPs; None where XLA gives none.
    """
    # Lowered for a GPU, the convolutions are as written; that needs no GPU.
    lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
    return (lowered.cost_analysis() or {}).get("flops")


def _create_model(setup: Setup, **options: Any) -> Any:
    return create_model(
        f"resnet{setup.depth}_unet",
        num_classes=2,
        strides=setup.strides,
        width=setup.width,
        decoder_features=setup.decoder_features,
        **options,
    )


def _read(batches: Any, count: int) -> None:
    for _ in range(count):
        next(batches)


def _compile(fn: Any, *args: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    compiled = fn.lower(*args).compile()
    return compiled, time.perf_counter() - start


def _planned_memory(program: Any) -> str:
    plan = program.memory_analysis()
    if plan is None:
        return "?"
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return f"{(total - plan.alias_size_in_bytes) / 1e9:.2f}"


def compared(ours: np.ndarray, theirs: np.ndarray, *, peer: str = "PyTorch") -> Row:
    """Columns that compare the seconds of alternating turns.

    Args:
      ours: Seconds of each turn.
      theirs: Likewise.
      peer: Whose they are.

    Returns:
      Their median, and the median of the ratios with the lowest and the highest.
    """
    ratios = ours / theirs
    return {
        f"{peer}, s": f"{np.median(theirs):.4g}",
        "ratio": f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
    }


def _device_name() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{len(jax.devices())} x {device.device_kind}"
    extensions = np.show_config(mode="dicts")["SIMD Extensions"].get("found", ["?"])
    return f"No GPU or TPU here; CPU with {os.cpu_count()} cores ({extensions[-1]})"


def markdown(rows: Sequence[Row]) -> str:
    """A table.

    Args:
      rows: Column to text, all with the same columns.

    Returns:
      Markdown.
    """
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmark", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--setups", nargs="+", choices=SETUPS, metavar="SETUP",
                        default=[name for name in SETUPS if name != "brats"],
                        help=f"of {', '.join(SETUPS)}; all but brats by default")  # fmt: skip
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="in place of each setup's own")
    parser.add_argument("--num-devices", type=int,
                        help="as many as divide the batch by default; 1 beside a peer")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--peer", choices=("torch",), help="run PyTorch in turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or min(options.batch_sizes or [1]) < 1:
        parser.error("--rounds and --batch-sizes must be at least 1.")
    missing = [name for name in ("torch", "monai") if importlib.util.find_spec(name) is None]
    if options.peer and missing:
        parser.error(f"--peer torch needs {' and '.join(missing)}: pip install torch monai")
    if options.peer and options.num_devices is None:
        options.num_devices = 1
    return options


if __name__ == "__main__":
    main()
