"""The authors' training step and inference in PyTorch, for `experiments.benchmark` to run beside.

The network is that of `afl_jax.models.ResNetUNet`, with PyTorch's own operations; the loss is
MONAI's focal loss with the statistics computed on the host, as the authors compute them. It is
fed channels-first arrays; in bfloat16 it runs under autocast.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai.losses import FocalLoss
from torch import nn
from torch.nn import functional

Ints = tuple[int, ...]

NUM_BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


def _conv_bn(c_in: int, c_out: int, kernel: int, strides: Ints = (1, 1, 1)) -> nn.Sequential:
    conv = nn.Conv3d(c_in, c_out, kernel, strides, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(c_out))


class Block(nn.Module):
    """A basic block, or a bottleneck if ``expansion`` is 4."""

    def __init__(self, c_in: int, features: int, strides: Ints, *, expansion: int) -> None:
        super().__init__()
        c_out = expansion * features
        if expansion == 1:
            layers = [_conv_bn(c_in, features, 3, strides), _conv_bn(features, features, 3)]
        else:
            layers = [
                _conv_bn(c_in, features, 1),
                _conv_bn(features, features, 3, strides),
                _conv_bn(features, c_out, 1),
            ]
        self.layers = nn.ModuleList(layers)
        same = c_in == c_out and max(strides) == 1
        self.shortcut = nn.Identity() if same else _conv_bn(c_in, c_out, 1, strides)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[B, C, X, Y, Z]`` to ``[B, C', X', Y', Z']``."""
        y = x
        for layer in self.layers[:-1]:
            y = functional.relu(layer(y), inplace=True)
        return functional.relu(self.layers[-1](y) + self.shortcut(x), inplace=True)


class ResNetUNet(nn.Module):
    """The U-Net with a ResNet encoder; arguments as those of `afl_jax.models.ResNetUNet`."""

    def __init__(
        self,
        *,
        depth: int,
        strides: Sequence[Ints],
        width: int,
        decoder_features: Ints,
        num_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.stem = _conv_bn(num_channels, width, 7, strides[0])
        expansion = 1 if depth == 18 else 4
        skips, stages, c_in = [width], [], width
        for i, count in enumerate(NUM_BLOCKS[depth]):
            first = (1, 1, 1) if i == 0 else strides[i + 1]
            blocks = []
            for j in range(count):
                step = first if j == 0 else (1, 1, 1)
                blocks.append(Block(c_in, width * 2**i, step, expansion=expansion))
                c_in = width * 2**i * expansion
            stages.append(nn.Sequential(*blocks))
            skips.append(c_in)
        self.stages = nn.ModuleList(stages)
        decoder = []
        for features, skip in zip(decoder_features, [*skips[-2::-1], 0], strict=True):
            decoder.append(
                nn.ModuleList([_conv_bn(c_in + skip, features, 3), _conv_bn(features, features, 3)])
            )
            c_in = features
        self.decoder = nn.ModuleList(decoder)
        self.head = nn.Conv3d(c_in, num_classes, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Maps ``[B, C, X, Y, Z]`` to logits ``[B, K, X, Y, Z]``."""
        x = functional.relu(self.stem(image), inplace=True)
        pyramid = [x]
        x = functional.max_pool3d(x, 3, self.strides[1], padding=1)
        for stage in self.stages:
            x = stage(x)
            pyramid.append(x)
        skips = [*pyramid[-2::-1], None]
        for (first, second), scale, skip in zip(
            self.decoder, self.strides[::-1], skips, strict=True
        ):
            x = functional.interpolate(x, scale_factor=tuple(map(float, scale)), mode="nearest")
            x = x if skip is None else torch.cat([x, skip], dim=1)
            x = functional.relu(second(functional.relu(first(x), inplace=True)), inplace=True)
        return self.head(x)


def host_statistics(labels: torch.Tensor) -> tuple[float, list[float]]:
    """Gamma and the two class weights, by NumPy on the host, of the first volume and the batch.

    As the authors have it: smoothness from `numpy.gradient`, counts over the whole batch.
    """
    mask = labels.cpu().numpy() > 0
    gradient = np.gradient(mask[0, 0].astype(np.float32))
    smoothness = np.mean(np.sqrt(sum(np.square(g) for g in gradient)))
    num_foreground = max(int(mask.sum()), 1)
    num_background = max(mask.size - int(mask.sum()), 1)
    inverse = np.array([1 / num_foreground, 1 / num_background])
    gamma = float(smoothness) + num_foreground / mask.size
    return gamma, list(inverse / inverse.sum())


def adaptive_focal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """MONAI's focal loss with gamma and weights of the labels ``[B, 1, X, Y, Z]``."""
    gamma, weight = host_statistics(labels)
    loss_fn = FocalLoss(include_background=True, to_onehot_y=True, gamma=gamma, weight=weight)
    return loss_fn(logits.float(), labels)


def create_loss(logits: np.ndarray, labels: np.ndarray) -> Callable[[], None]:
    """The loss with its statistics, forward and backward, as a function.

    Args:
      logits: ``[B, X, Y, Z, K]``.
      labels: ``[B, X, Y, Z]``.
    """
    device = _device()
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(logits, -1, 1)))
    x = x.to(device).requires_grad_()
    y = torch.from_numpy(labels[:, None]).to(device)

    def run() -> None:
        x.grad = None
        adaptive_focal_loss(x, y).backward()
        _synchronise(device)

    return run


def create_steps(
    image: np.ndarray, labels: np.ndarray, *, bfloat16: bool, learning_rate: float, **model: Any
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step and an inference, each a function that returns when its work is done.

    Args:
      image: ``[B, X, Y, Z, C]``.
      labels: ``[B, X, Y, Z]``.
      bfloat16: Whether to compute under autocast.
      learning_rate: Of SGD with Nesterov momentum.
      **model: Arguments of `ResNetUNet`.
    """
    device = _device()
    torch.backends.cudnn.benchmark = True
    network = ResNetUNet(num_channels=image.shape[-1], **model).to(device)
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 1))).to(device)
    y = torch.from_numpy(labels[:, None]).to(device)
    if device.type == "cuda":
        network = network.to(memory_format=torch.channels_last_3d)
        x = x.to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=1e-5
    )

    def autocast() -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)

    def train() -> None:
        network.train()
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            logits = network(x)
        adaptive_focal_loss(logits, y).backward()
        optimizer.step()
        _synchronise(device)

    def infer() -> None:
        network.eval()
        with torch.inference_mode(), autocast():
            network(x)
        _synchronise(device)

    return train, infer


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
