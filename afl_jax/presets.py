"""Whole runs by name, to begin from: the phantom's, and those of the paper's two data sets.

`afl-jax prepare picai2022 ...` and `afl-jax train picai2022 ...` start from one; every option
beside it overrides a field. A ``-recommended`` run is what we would do in place of the paper's.
"""

from dataclasses import replace

from afl_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
)

# The paper's optimizer: SGD with Nesterov momentum 0.9 at a constant rate, L2 on every parameter.
_PAPER_OPTIMIZER = OptimizerConfig(
    name="sgd", learning_rate=0.1, schedule="constant", momentum=0.9, weight_decay=1e-5
)
_HALVING = ((2, 2, 2),) * 4 + ((1, 1, 1),)

# The 220 positive cases of the experts, stretched to 160 x 128 x 24; batch 1, 200 epochs.
_PICAI2022 = Config(
    data=DataConfig(
        name="picai2022",
        shape=(160, 128, 24),
        resize=True,
        labels="human_expert",
        cases="positive",
        fold=0,
    ),
    model=ModelConfig(strides=((2, 2, 2), (4, 2, 1), (2, 2, 2), (2, 2, 1), (1, 2, 3))),
    loss=LossConfig(name="adaptive_focal", options=(("balance", "volume"),)),
    optimizer=_PAPER_OPTIMIZER,
    # Translation, flips, noise, scale and shift. How far the authors translate is not in the
    # paper: a tenth of the extent is ours.
    augment=AugmentConfig(affine_probability=0.2, max_translation=0.1),
    num_epochs=200,
    batch_size=1,
)

# All 425 positives among all 1500 cases, on the grid of the official baselines, kept to scale.
_PICAI2022_RECOMMENDED = replace(
    _PICAI2022,
    data=DataConfig(
        name="picai2022",
        shape=(256, 256, 20),
        spacing=(0.5, 0.5, 3.0),
        normalisation="zscore",
        clip_percentiles=(0.5, 99.5),
        labels="human_expert+Pooch25",
        cases="all",
        fold=0,
    ),
    # Slices are six times as thick as pixels are wide: they are halved twice, pixels four times.
    model=ModelConfig(strides=((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2), (1, 1, 1))),
    optimizer=OptimizerConfig(
        name="adamw",
        learning_rate=3e-4,
        schedule="cosine",
        num_warmup_steps=500,
        weight_decay=1e-2,
        max_gradient_norm=12.0,
    ),
    augment=AugmentConfig(
        affine_probability=0.5,
        max_translation=0.05,
        max_rotation_degrees=15.0,
        max_zoom=0.15,
        gamma_probability=0.3,
    ),
    num_epochs=100,
    batch_size=4,
    eval_every=5,
)

# Whole tumour at 1 mm, crops of 224 x 224 x 144; batch 1, 200 epochs.
_BRATS2018 = Config(
    data=DataConfig(
        name="brats2018",
        # 155 slices, padded to what the strides divide.
        shape=(240, 240, 160),
        patch_shape=(224, 224, 144),
        target="WT",
    ),
    model=ModelConfig(strides=_HALVING),
    loss=LossConfig(name="adaptive_focal", options=(("balance", "volume"),)),
    optimizer=_PAPER_OPTIMIZER,
    # Always scale and shift, no noise; the crop falls anywhere.
    augment=AugmentConfig(
        foreground_probability=0.0, noise_probability=0.0, intensity_probability=1.0
    ),
    num_epochs=200,
    batch_size=1,
)

_BRATS2018_RECOMMENDED = replace(
    _BRATS2018,
    data=replace(_BRATS2018.data, patch_shape=(128, 128, 128), target="regions"),
    model=ModelConfig(strides=_HALVING, num_classes=4),
    optimizer=_PICAI2022_RECOMMENDED.optimizer,
    # Half of the crops about the tumour, which are translations enough.
    augment=replace(_PICAI2022_RECOMMENDED.augment, affine_probability=0.3, max_translation=0.0),
    batch_size=2,
    eval_every=5,
)


def with_narrow_network(config: Config) -> Config:
    """A run with a network of which two CPU cores can train dozens: for comparisons.

    Args:
        config: The run.

    Returns:
        The run with a ResNet18 U-Net of an eighth of the width in place of its network, of the
        same strides, classes and precision.
    """
    model = replace(config.model, name="resnet18_unet", width=8, decoder_features=(32, 16, 8, 8, 4))
    return replace(config, model=model)


PRESETS: dict[str, Config] = {
    "phantom": Config(),
    "picai2022": _PICAI2022,
    "picai2022-recommended": _PICAI2022_RECOMMENDED,
    "brats2018": _BRATS2018,
    "brats2018-recommended": _BRATS2018_RECOMMENDED,
}
