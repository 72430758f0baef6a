"""The networks that predict: restored from runs or weights, and made functions of patches."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afl_jax import inference, parallel
from afl_jax.checkpoint import CheckpointStore
from afl_jax.commands import construct
from afl_jax.config import Config, read_config
from afl_jax.data import preprocess
from afl_jax.errors import InputError
from afl_jax.models.pretrained import from_torch, read_weights


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that was trained.

    Attributes:
        source: The run or the file that it is from.
        config: The run's.
        variables: Its collections ``params`` and ``batch_stats``.
        epoch: Of the run; None if it is from a file of weights.
    """

    source: Path
    config: Config
    variables: Any
    epoch: int | None = None

    @property
    def num_channels(self) -> int:
        """Channels of an image."""
        return self.variables["params"]["encoder"]["conv1"]["kernel"].shape[-2]

    @property
    def description(self) -> dict[str, Any]:
        """What tells it from others, JSON-able: where it is from, and a digest of its weights."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self.variables):
            digest.update(np.ascontiguousarray(leaf))
        return {
            "source": str(self.source),
            "epoch": self.epoch,
            "weights": digest.hexdigest()[:12],
        }


def restore_networks(
    runs: Sequence[Path], config_file: Path | None, init_weights: Path | None
) -> list[Network]:
    """The networks of runs' best epochs, or that of a config and a file of weights.

    Args:
        runs: Their folders.
        config_file: A config.json in place of runs.
        init_weights: Weights of a whole network, in place of those of the one run.

    Returns:
        At least one; all of them take and give the same.

    Raises:
        InputError: If there is too little or too much given, something cannot be read, or the
            networks do not go together.
    """
    if bool(runs) == (config_file is not None):
        raise InputError("give either --run, or --config with --init-weights.")
    if config_file is not None and init_weights is None:
        raise InputError("--config needs --init-weights: it holds no network of its own.")
    if init_weights is not None:
        if len(runs) > 1:
            raise InputError("--init-weights goes with one --run.")
        path = config_file or construct.run_config_path(runs[0])
        return [_read_network(read_config(path), init_weights)]
    networks = [_restore_best(run) for run in runs]
    for network in networks[1:]:
        if difference := _difference(networks[0], network):
            raise InputError(
                f"--run {network.source} does not go with {networks[0].source}: {difference}."
            )
    return networks


def create_class_probs(
    networks: Sequence[Network], devices: Sequence[jax.Device]
) -> list[inference.ApplyFn]:
    """Each network as a function from patches to probabilities, compiled for the devices.

    Args:
        networks: From `restore_networks`.
        devices: From `parallel.select_devices`; they share the patches of a call.

    Returns:
        Functions from ``[N, *spatial, C]`` to ``[N, *spatial, K]``.
    """
    # Networks of one architecture are one program. Their variables are its argument: closed over,
    # they would be constants of the program, and lie in the compilation cache.
    steps: dict[Any, Any] = {}

    def create(network: Network) -> inference.ApplyFn:
        config = network.config
        model = construct.create_model(config)
        activation = construct.loss_activation(config.loss, num_classes=config.model.num_classes)

        def class_probs(variables: Any, batch: dict[str, jax.Array]) -> jax.Array:
            logits = model.apply(variables, batch["image"], train=False)
            return inference.class_probs(logits, activation=activation)

        program = (model, activation)
        step = steps.setdefault(program, parallel.compile_step(class_probs, devices))
        variables = parallel.replicate(network.variables, devices)

        def apply_fn(patches: jax.Array) -> jax.Array:
            probs = step(variables, parallel.shard_batch({"image": patches}, devices))
            return probs.reshape(*patches.shape[:-1], -1)

        return apply_fn

    return [create(network) for network in networks]


def _restore_best(run: Path) -> Network:
    construct.run_config_path(run)  # Says if this is no run.
    store = CheckpointStore(run / "checkpoints", read_only=True)
    try:
        best = store.restore_best()
    finally:
        store.close()
    return Network(run, best.config, best.variables, best.epoch)


def _read_network(config: Config, path: Path) -> Network:
    weights = read_weights(path)
    stem = weights.get("encoder.conv1.weight", np.empty(0))
    image = jnp.zeros((1, *config.data.shape, stem.shape[1] if stem.ndim > 1 else 1))
    shapes = jax.eval_shape(construct.create_model(config).init, jax.random.key(0), image)
    return Network(path, config, from_torch(weights, shapes, source=str(path)))


def _difference(a: Network, b: Network) -> str:
    """Why the probabilities of two networks cannot be averaged, in words; empty if they can."""
    if a.num_channels != b.num_channels:
        return f"it takes {b.num_channels} channels, not {a.num_channels}"
    classes = [network.config.model.num_classes for network in (a, b)]
    if classes[0] != classes[1]:
        return f"it has {classes[1]} classes, not {classes[0]}"
    for name in preprocess.PREPARATION:
        ours, theirs = (getattr(network.config.data, name) for network in (a, b))
        if ours != theirs:
            return f"its data.{name} is {theirs}, not {ours}"
    return ""
