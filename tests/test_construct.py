"""What the name of a loss decides: its options, what it is given, how its network is read."""

import jax.numpy as jnp
import numpy as np
import pytest

from afl_jax.commands import construct
from afl_jax.config import Config, LossConfig, ModelConfig
from afl_jax.errors import InputError
from afl_jax.losses import LOSSES

SOFTMAX = {"cross_entropy", "dice_cross_entropy", "top_k_cross_entropy", "unified_focal"}


@pytest.mark.parametrize("name", LOSSES)
def test_a_network_is_read_as_it_was_trained(name):
    config = LossConfig(name=name)
    expected = "softmax" if name in SOFTMAX else "sigmoid"
    assert construct.loss_activation(config, num_classes=2) == expected
    assert construct.loss_activation(config, num_classes=1) == "sigmoid"


def test_an_option_changes_the_activation_and_with_it_the_prediction():
    # Channel 1 is above 0, and below channel 0.
    logits = jnp.array([[2.0, 1.0]])
    predictions = []
    for options in ((), (("activation", "sigmoid"),)):
        config = Config(
            loss=LossConfig(name="cross_entropy", options=options), model=ModelConfig(num_classes=2)
        )
        predictions.append(int(construct.create_predict_fn(config)(logits)[0]))
    assert predictions == [0, 1]


def test_the_spacing_goes_to_losses_that_measure_in_mm():
    measuring = {"boundary", "dice_boundary", "irregularity_focal"}
    for name in LOSSES:
        loss_fn = construct.create_loss(LossConfig(name=name), num_classes=2)
        assert construct.loss_fields(loss_fn) == (("spacing",) if name in measuring else ())


def test_the_spacing_is_no_option():
    config = LossConfig(name="dice_boundary", options=(("spacing", 1.0),))
    with pytest.raises(InputError, match=r"'spacing' is not an option of dice_boundary: .* weight"):
        construct.create_loss(config, num_classes=2)


def test_an_unknown_loss_is_named():
    for function in (construct.create_loss, construct.loss_activation):
        with pytest.raises(
            InputError, match=r"^loss\.name 'dise' is unknown: choose from adaptive"
        ):
            function(LossConfig(name="dise"), num_classes=2)


def test_options_of_the_config_reach_the_loss():
    loss_fn = construct.create_loss(
        LossConfig(name="adaptive_focal", options=(("region", "surface"), ("scale", 3.0))),
        num_classes=2,
    )
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 4, 2)).astype(np.float32))
    labels = jnp.zeros((1, 4, 4, 4), int).at[:, 1:3, 1:3].set(1)
    expected = LOSSES["adaptive_focal"](logits, labels, region="surface", scale=3.0)
    np.testing.assert_allclose(loss_fn(logits, labels), expected)
    with pytest.raises(InputError, match=r"^loss\.options: region must be one of"):
        construct.create_loss(
            LossConfig(name="adaptive_focal", options=(("region", "rim"),)), num_classes=2
        )
