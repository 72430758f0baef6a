"""Weights in PyTorch's names: read from files, taken over by the networks, and given back.

The names are those of segmentation-models-pytorch, whose 3D offspring the authors used::

    encoder.layer1.0.downsample.0.weight   params/encoder/layer1_0/downsample_conv/kernel
    decoder.blocks.4.conv1.1.running_var   batch_stats/decoder/block4/bn1/var
    segmentation_head.0.bias               params/head/bias

A ResNet of torchvision has the encoder's names without ``encoder.``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from afl_jax.errors import InputError

Variables = dict[str, Any]
Weights = dict[str, np.ndarray]

# Applied in order to a path of ours, joined by dots.
_TO_TORCH_NAME = (
    (r"^encoder\.layer(\d+)_(\d+)", r"encoder.layer\1.\2"),
    (r"\.downsample_conv\b", ".downsample.0"),
    (r"\.downsample_bn\b", ".downsample.1"),
    (r"^decoder\.block(\d+)\.conv(\d)", r"decoder.blocks.\1.conv\2.0"),
    (r"^decoder\.block(\d+)\.bn(\d)", r"decoder.blocks.\1.conv\2.1"),
    (r"^head\b", "segmentation_head.0"),
    (r"\.(kernel|scale)$", ".weight"),
    (r"\.mean$", ".running_mean"),
    (r"\.var$", ".running_var"),
)
# PyTorch's counters of the batches that each BatchNorm has seen: absent from older files.
_COUNTER = "num_batches_tracked"
# Under which a training script may keep the weights beside its optimiser and the like.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# The first kernel of a ResNet; in a U-Net it is the encoder's, and named so.
_RESNET_STEM = "conv1.weight"
_LISTED_NAMES = 8


def from_torch(
    state_dict: Mapping[str, np.ndarray], variables: Variables, *, source: str = "state_dict"
) -> Variables:
    """Fills a network with weights in PyTorch's names.

    Either the weights are those of a whole U-Net, which must fit exactly, or those of a ResNet as
    torchvision names it (``conv1.weight``, ``layer1.0.conv1.weight``), which fill the encoder
    alone. A ResNet, and only that, is adapted to the network as the authors do it:

    - A 2D kernel w becomes w / k, repeated k times along the new last axis: the answer to an image
      that is constant along Z stays the same.
    - From its C' input channels to C, the first kernel becomes ``w[:, i % C'] * C' / C`` for
      channel i. For C = 1 it is the sum of all channels, which a grey image would see.

    Args:
      state_dict: Arrays by name, such as `read_weights` gives. The counters of BatchNorm
        (``num_batches_tracked``) may be absent: they are 0 then. The classifier of a ResNet
        (``fc``) is ignored.
      variables: The network's ``params`` and ``batch_stats``, as ``model.init`` gives them; or
        their shapes (``jax.eval_shape``), which only the weights of a whole network can fill.
      source: What error messages call the weights, such as the path of their file.

    Returns:
      ``variables`` with every array that the weights have in its place, and of its dtype. Without
      a decoder in the weights, the decoder and the head remain as they were.

    Raises:
      InputError: If names are missing or unexpected, or shapes are wrong: it lists the first few
        of each kind. Also if a ResNet is to fill shapes.

    References:
      Islam et al., 2024, https://arxiv.org/abs/2407.09828; their first convolution and inflation
      are those of https://github.com/ZFTurbo/segmentation_models_pytorch_3d
    """
    leaves = flatten_dict(variables)
    paths = {_torch_name(path): path for path in leaves}
    weights = {name: np.asarray(weight) for name, weight in _without_extras(state_dict).items()}
    is_resnet = _RESNET_STEM in weights
    if is_resnet:
        prefix = "encoder."
        paths = {n.removeprefix(prefix): path for n, path in paths.items() if n.startswith(prefix)}
    shapes = {name: _torch_shape(leaves[path].shape) for name, path in paths.items()}
    weights = {name: np.zeros((), np.int64) for name in paths if name.endswith(_COUNTER)} | weights
    if is_resnet:
        weights = {
            name: _adapted(name, weight, shapes.get(name, ())) for name, weight in weights.items()
        }
    _check_fit(weights, shapes, source=source)
    if is_resnet and any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values()):
        raise InputError(
            f"{source}: expected the weights of a whole network, found those of a ResNet, which is "
            "only its encoder: start a training from them, and use the network that it gives."
        )
    for name, path in paths.items():
        leaves[path] = _from_torch_layout(weights[name]).astype(leaves[path].dtype)
    return unflatten_dict(leaves)


def to_torch(variables: Variables) -> Weights:
    """Gives a network's weights in the names and layout of the authors' PyTorch code.

    The inverse of `from_torch` for a whole network.

    Args:
      variables: ``params`` and ``batch_stats``.

    Returns:
      Contiguous arrays by name, ready for ``load_state_dict`` of the same network.
    """
    weights = {}
    for path, leaf in flatten_dict(variables).items():
        name = _torch_name(path)
        weight = _to_torch_layout(np.asarray(leaf))
        # Contiguous: safetensors writes a buffer as it lies in memory, whatever its strides.
        weights[name] = np.array(weight, np.int64 if name.endswith(_COUNTER) else None, order="C")
    return weights


def read_weights(path: str | Path) -> Weights:
    """Reads a file of weights. No code in it is ever run, whatever it holds.

    Args:
      path: A ``.safetensors`` or ``.npz`` file, or a ``.pth`` or ``.pt`` file (which needs
        PyTorch) of a state dict, alone or under ``state_dict``, ``model_state_dict`` or ``model``.

    Returns:
      Arrays by name, without the prefix ``module.`` of parallel training and without the
      classifier of a ResNet (``fc``). PyTorch's bfloat16 becomes float32.

    Raises:
      InputError: If the file is absent, of another kind, broken, or holds more than arrays; or if
        it needs PyTorch and that is not installed.
    """
    path = Path(path)
    readers = {
        ".safetensors": load_file,
        ".npz": _read_npz,
        ".pth": _read_torch,
        ".pt": _read_torch,
    }
    if path.suffix not in readers:
        raise InputError(
            f"{path}: expected weights in a file {', '.join(readers)}, found {path.suffix!r}: "
            "convert them to one of these."
        )
    if not path.is_file():
        raise InputError(f"{path}: expected a file of weights, found none: check the path.")
    try:
        weights = _without_extras(readers[path.suffix](path))
    except InputError:
        raise
    except Exception as error:  # Each format has a dozen ways to be broken, and its own errors.
        raise InputError(
            f"{path}: expected arrays by name in a {path.suffix} file, found one that is "
            f"corrupted, truncated, or holds something else ({type(error).__name__}): download it "
            "again, or save the network's weights alone."
        ) from error
    others = [name for name, weight in weights.items() if not isinstance(weight, np.ndarray)]
    if others:
        raise InputError(
            f"{path}: expected arrays by name, alone or (.pth, .pt) under {', '.join(_WRAPPERS)}, "
            f"found other things under {_listed(others)}: save the network's weights alone."
        )
    return weights


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path}: a {path.suffix} file is read by PyTorch, which is not installed: "
            'pip install "afl-jax[torch]", or save the weights as .safetensors or .npz.'
        ) from error

    def to_numpy(tensor: torch.Tensor) -> np.ndarray:
        # NumPy has no bfloat16.
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        return tensor.detach().numpy()

    state_dict = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in _WRAPPERS:
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    return {
        name: to_numpy(value) if isinstance(value, torch.Tensor) else value
        for name, value in state_dict.items()
    }


def _without_extras(state_dict: Mapping[str, np.ndarray]) -> Weights:
    weights = {name.removeprefix("module."): weight for name, weight in state_dict.items()}
    return {name: weight for name, weight in weights.items() if not name.startswith("fc.")}


def _torch_name(path: tuple[str, ...]) -> str:
    _collection, *modules = path
    name = ".".join(modules)
    for pattern, replacement in _TO_TORCH_NAME:
        name = re.sub(pattern, replacement, name)
    return name


# Only kernels have more than one axis: [O, I, *taps] in PyTorch, [*taps, I, O] here.


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*reversed(shape[-2:]), *shape[:-2])


def _to_torch_layout(weight: np.ndarray) -> np.ndarray:
    return np.moveaxis(weight, (-1, -2), (0, 1)) if weight.ndim > 1 else weight


def _from_torch_layout(weight: np.ndarray) -> np.ndarray:
    return np.moveaxis(weight, (0, 1), (-1, -2)) if weight.ndim > 1 else weight


def _adapted(name: str, weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A weight of a ResNet, fitted to the axes of the network and to its input channels."""
    if weight.ndim == 4 and len(shape) == 5:
        taps = shape[-1]
        weight = np.repeat(weight[..., None], taps, axis=-1) / taps
    if name == _RESNET_STEM and weight.ndim == len(shape):
        channels, wanted = weight.shape[1], shape[1]
        if wanted == 1:
            weight = weight.sum(axis=1, keepdims=True)
        elif wanted != channels:
            weight = weight[:, np.arange(wanted) % channels] * (channels / wanted)
    return weight


def _check_fit(weights: Weights, shapes: dict[str, tuple[int, ...]], *, source: str) -> None:
    missing = [name for name in shapes if name not in weights]
    unexpected = [name for name in weights if name not in shapes]
    wrong_shape = [
        f"{name} (expected {shape}, found {weights[name].shape})"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    if missing or unexpected or wrong_shape:
        raise InputError(
            f"{source}: the weights do not fit the network. Missing: {_listed(missing)}. "
            f"Unexpected: {_listed(unexpected)}. Wrong shape: {_listed(wrong_shape)}. Choose the "
            "model, its strides, channels and classes as they were when the weights were trained."
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(str, names[:_LISTED_NAMES])) or "none"
    rest = len(names) - _LISTED_NAMES
    return f"{shown} and {rest} more" if rest > 0 else shown
