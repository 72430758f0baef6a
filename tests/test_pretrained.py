import functools
import hashlib
import importlib.util
import json
import os
import pickle
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from afl_jax.errors import InputError
from afl_jax.models.encoder import STAGES, ResNetEncoder
from afl_jax.models.pretrained import from_torch, read_weights, to_torch
from afl_jax.models.zoo import BRATS_STRIDES, PICAI_STRIDES, create_model

STRIDES_2D = ((2, 2),) * 5
STRIDES_3D = ((2, 2, 2),) * 5


def shapes_of(model, *, num_channels: int):
    """The variables' shapes, without computing any."""
    factors = np.prod(model.strides, axis=0)
    image = jax.ShapeDtypeStruct((1, *factors, num_channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def zeros_of(shapes):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def tiny_unet(strides=STRIDES_2D):
    return create_model(
        "resnet18_unet", num_classes=2, strides=strides, width=4, decoder_features=(8, 8, 4, 4, 4)
    )


def random_state_dict(model, *, num_channels: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = to_torch(zeros_of(shapes_of(model, num_channels=num_channels)))
    return {name: random_like(rng, weight) for name, weight in names.items()}


def random_like(rng, weight):
    if weight.dtype == np.int64:
        return np.array(rng.integers(1, 2**31))
    return rng.standard_normal(weight.shape).astype(weight.dtype)


def torchvision_resnet(depth: int, *, width: int) -> dict[str, np.ndarray]:
    """A 2D ResNet of RGB images with random weights, under the names that torchvision gives."""
    rng = np.random.default_rng(0)
    state_dict = {}

    def add_conv(name, c_out, c_in, taps):
        he = np.sqrt(2 / (c_in * taps**2))
        kernel = rng.standard_normal((c_out, c_in, taps, taps), dtype=np.float32)
        state_dict[f"{name}.weight"] = kernel * np.float32(he)

    def add_bn(name, channels):
        for last, centre in ("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1):
            noise = rng.uniform(-0.2, 0.2, channels)
            state_dict[f"{name}.{last}"] = (centre + noise).astype(np.float32)
        state_dict[f"{name}.num_batches_tracked"] = np.array(7)

    num_blocks, is_bottleneck = STAGES[depth]
    add_conv("conv1", width, 3, 7)
    add_bn("bn1", width)
    c_in = width
    for stage, count in enumerate(num_blocks, start=1):
        inner = width * 2 ** (stage - 1)
        c_out = 4 * inner if is_bottleneck else inner
        for block in range(count):
            prefix = f"layer{stage}.{block}"
            if is_bottleneck:
                convs = [(inner, c_in, 1), (inner, inner, 3), (c_out, inner, 1)]
            else:
                convs = [(inner, c_in, 3), (inner, inner, 3)]
            for i, conv in enumerate(convs, start=1):
                add_conv(f"{prefix}.conv{i}", *conv)
                add_bn(f"{prefix}.bn{i}", conv[0])
            if block == 0 and c_in != c_out:
                add_conv(f"{prefix}.downsample.0", c_out, c_in, 1)
                add_bn(f"{prefix}.downsample.1", c_out)
            c_in = c_out
    state_dict["fc.weight"] = np.zeros((1000, c_in), np.float32)
    state_dict["fc.bias"] = np.zeros(1000, np.float32)
    return state_dict


def assert_same_weights(got, want):
    assert got.keys() == want.keys()
    for name, weight in want.items():
        assert got[name].dtype == weight.dtype, name
        np.testing.assert_array_equal(got[name], weight, err_msg=name, strict=True)


# ---- The authors' network ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(reference):
    return dict(np.load(reference / "resnet50_unet.npz"))


@pytest.fixture(scope="module")
def fill(reference):
    """The recipe of the golden weights: name and shape -> array."""
    spec = importlib.util.spec_from_file_location("recipe", reference / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe.fill


@pytest.fixture(scope="module")
def authors_shapes(reference):
    return json.loads((reference / "resnet50_unet_keys.json").read_text())


@pytest.fixture(scope="module")
def authors_weights(golden, fill, authors_shapes):
    weights = {name: fill(name, shape) for name, shape in authors_shapes["picai"].items()}
    for name, first in zip(golden["picai_check_keys"], golden["picai_check_first4"], strict=True):
        start = weights[name].ravel()[:4]
        np.testing.assert_array_equal(start, first[: start.size], err_msg=name)
    return weights


def run_authors_network(weights, golden, *, train: bool):
    """Logits [B, C, H, W, D], the features of the encoder, and the statistics, updated."""
    model = create_model("resnet50_unet", num_classes=2)
    variables = from_torch(weights, shapes_of(model, num_channels=3))
    image = np.random.default_rng(0).standard_normal(golden["picai_input_shape"])
    image = image.astype(np.float32)
    np.testing.assert_array_equal(image.ravel()[:8], golden["picai_input_first8"])
    image = np.moveaxis(image, 1, -1).astype(variables["params"]["head"]["bias"].dtype)
    logits, state = jax.jit(
        functools.partial(
            model.apply,
            train=train,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, ResNetEncoder),
        )
    )(variables, image)
    (features,) = state["intermediates"]["encoder"]["__call__"]
    to_golden_order = lambda x: np.moveaxis(np.asarray(x), -1, 1)  # noqa: E731
    statistics = to_torch({"batch_stats": state["batch_stats"]})
    return to_golden_order(logits), [*map(to_golden_order, features)], statistics


def assert_close(got, want, *, of_largest: float):
    np.testing.assert_allclose(got, want, rtol=0, atol=of_largest * np.abs(want).max())


def stats(x):
    x = x.astype(np.float64)
    return np.array([x.mean(), x.std(), np.abs(x).max(), np.abs(x).mean(), x.sum()])


def assert_stats_close(got, want, *, num_values: int, of_largest: float):
    largest = want[2]
    np.testing.assert_allclose(got[:4], want[:4], rtol=0, atol=of_largest * largest)
    np.testing.assert_allclose(got[4], want[4], rtol=0, atol=of_largest * largest * num_values)


def assert_features(features, golden, *, of_largest: float):
    for i, feature in enumerate(features, start=1):
        assert feature.shape == tuple(golden["picai_feature_shapes"][i])
        assert_stats_close(
            stats(feature),
            golden["picai_eval_feature_stats"][i],
            num_values=feature.size,
            of_largest=of_largest,
        )
        every = max(1, feature.shape[1] // 8)
        samples = feature[:, ::every, ::5, ::4, ::3]
        assert_close(samples, golden[f"picai_eval_feature{i}_sub"], of_largest=of_largest)


def assert_running_statistics(statistics, golden, *, rtol: float):
    for layer in golden["picai_bn_layers"]:
        for name in f"{layer}.running_mean", f"{layer}.running_var":
            want = golden[f"picai_after_{name}"]
            np.testing.assert_allclose(
                statistics[name], want, rtol=0, atol=rtol * np.abs(want).max(), err_msg=name
            )
    sums = [
        sum(w.astype(np.float64).sum() for name, w in statistics.items() if name.endswith(last))
        for last in ("running_mean", "running_var")
    ]
    np.testing.assert_allclose(sums, golden["picai_all_bn_after_sum"], rtol=rtol)


# The tolerances are 3 to 10 times the difference that was measured: 3e-6 of the largest logit in
# float32, which is torch's own rounding error, and 3e-14 in float64.


@pytest.mark.real_data
def test_the_authors_network_in_float32(authors_weights, golden):
    logits, features, _ = run_authors_network(authors_weights, golden, train=False)
    assert_close(logits[:, :, ::8, ::8, ::4], golden["picai_eval_logits_sub"], of_largest=2e-5)
    assert_stats_close(
        stats(logits), golden["picai_eval_logits_stats"], num_values=logits.size, of_largest=2e-5
    )
    assert_features(features, golden, of_largest=2e-5)


@pytest.mark.slow
@pytest.mark.real_data
def test_the_authors_network_in_float64(x64, authors_weights, golden):
    logits, features, _ = run_authors_network(authors_weights, golden, train=False)
    assert logits.dtype == np.float64
    assert_close(logits[:, :, ::16, ::16, ::4], golden["picai_eval_logits64_sub"], of_largest=1e-12)
    # The features are known in float32 alone.
    assert_features(features, golden, of_largest=2e-5)


@pytest.mark.slow
@pytest.mark.real_data
def test_the_authors_network_in_training_in_float32(authors_weights, golden):
    logits, _, statistics = run_authors_network(authors_weights, golden, train=True)
    assert_close(logits[:, :, ::8, ::8, ::4], golden["picai_train_logits_sub"], of_largest=5e-4)
    assert_running_statistics(statistics, golden, rtol=2e-4)


@pytest.mark.slow
@pytest.mark.real_data
def test_the_authors_network_in_training_in_float64(x64, authors_weights, golden):
    logits, _, statistics = run_authors_network(authors_weights, golden, train=True)
    sub = logits[:, :, ::16, ::16, ::4]
    assert_close(sub, golden["picai_train_logits64_sub"], of_largest=1e-11)
    for last in "running_mean", "running_var":
        want = golden[f"picai_train64_bn1_{last}"]
        np.testing.assert_allclose(statistics[f"encoder.bn1.{last}"], want, rtol=1e-12)
    # The other layers are known in float32 alone.
    assert_running_statistics(statistics, golden, rtol=2e-4)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("net", "strides", "num_channels"), [("picai", PICAI_STRIDES, 3), ("brats", BRATS_STRIDES, 4)]
)
def test_the_names_and_shapes_are_the_authors(authors_shapes, golden, net, strides, num_channels):
    names = "\n".join(sorted(authors_shapes[net]))
    sha256 = hashlib.sha256(names.encode()).hexdigest()
    assert net != "picai" or sha256 == golden["picai_sha256_sorted_keys"]
    model = create_model("resnet50_unet", num_classes=2, strides=strides)
    ours = to_torch(zeros_of(shapes_of(model, num_channels=num_channels)))
    assert {name: list(weight.shape) for name, weight in ours.items()} == authors_shapes[net]


@pytest.mark.real_data
def test_the_authors_weights_survive_the_round_trip_bit_for_bit(authors_weights):
    model = create_model("resnet50_unet", num_classes=2)
    variables = from_torch(authors_weights, shapes_of(model, num_channels=3))
    assert_same_weights(to_torch(variables), authors_weights)


# ---- Names and layout -------------------------------------------------------------------------


@pytest.mark.parametrize("strides", [STRIDES_2D, PICAI_STRIDES], ids=["2D", "3D"])
def test_the_round_trip_is_bit_for_bit(strides):
    model = tiny_unet(strides)
    weights = random_state_dict(model, num_channels=3)
    variables = from_torch(weights, shapes_of(model, num_channels=3))
    assert_same_weights(to_torch(variables), weights)


def test_every_kind_of_weight_has_its_name_and_place():
    model = tiny_unet(STRIDES_3D)
    weights = random_state_dict(model, num_channels=3)
    variables = from_torch(weights, shapes_of(model, num_channels=3))
    params, batch_stats = variables["params"], variables["batch_stats"]
    kernel = params["encoder"]["layer2_0"]["downsample_conv"]["kernel"]
    assert kernel.shape == (1, 1, 1, 4, 8)
    # Torch: [O, I, x, y, z]; ours: [x, y, z, I, O].
    assert kernel[0, 0, 0, 2, 5] == weights["encoder.layer2.0.downsample.0.weight"][5, 2, 0, 0, 0]
    stem = params["encoder"]["conv1"]["kernel"]
    assert stem[6, 1, 3, 2, 0] == weights["encoder.conv1.weight"][0, 2, 6, 1, 3]
    for ours, name in [
        (params["encoder"]["bn1"]["scale"], "encoder.bn1.weight"),
        (params["encoder"]["layer3_1"]["bn2"]["bias"], "encoder.layer3.1.bn2.bias"),
        (batch_stats["encoder"]["bn1"]["mean"], "encoder.bn1.running_mean"),
        (
            batch_stats["encoder"]["layer4_0"]["downsample_bn"]["var"],
            "encoder.layer4.0.downsample.1.running_var",
        ),
        (params["decoder"]["block4"]["bn1"]["scale"], "decoder.blocks.4.conv1.1.weight"),
        (batch_stats["decoder"]["block0"]["bn2"]["mean"], "decoder.blocks.0.conv2.1.running_mean"),
        (params["head"]["bias"], "segmentation_head.0.bias"),
    ]:
        np.testing.assert_array_equal(ours, weights[name], err_msg=name, strict=True)


def test_weights_take_the_dtype_of_the_network():
    model = tiny_unet()
    weights = random_state_dict(model, num_channels=1)
    halves = {
        name: weight if weight.dtype == np.int64 else weight.astype(np.float16)
        for name, weight in weights.items()
    }
    variables = from_torch(halves, shapes_of(model, num_channels=1))
    expected = shapes_of(model, num_channels=1)
    assert jax.tree.map(lambda x: x.dtype, variables) == jax.tree.map(lambda x: x.dtype, expected)


def test_counters_may_be_absent():
    model = tiny_unet()
    weights = random_state_dict(model, num_channels=1)
    older = {name: w for name, w in weights.items() if not name.endswith("num_batches_tracked")}
    got = to_torch(from_torch(older, shapes_of(model, num_channels=1)))
    assert_same_weights({name: got[name] for name in older}, older)
    assert {int(got[name]) for name in weights if name not in older} == {0}


def test_a_mismatch_lists_both_sides():
    model = tiny_unet()
    weights = random_state_dict(model, num_channels=1)
    del weights["encoder.layer1.0.conv1.weight"], weights["decoder.blocks.2.conv1.1.running_var"]
    weights["decoder.center.0.weight"] = np.zeros(3, np.float32)
    weights["segmentation_head.0.bias"] = np.zeros(5, np.float32)
    with pytest.raises(InputError) as error:
        from_torch(weights, shapes_of(model, num_channels=1), source="weights.pth")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("weights.pth: ")
    missing, rest = message.split("Missing: ")[1].split(". Unexpected: ")
    unexpected, wrong_shape = rest.split(". Wrong shape: ")
    assert sorted(missing.split(", ")) == [
        "decoder.blocks.2.conv1.1.running_var",
        "encoder.layer1.0.conv1.weight",
    ]
    assert unexpected == "decoder.center.0.weight"
    assert wrong_shape.startswith("segmentation_head.0.bias (expected (2,), found (5,)).")


def test_a_long_list_is_cut_short():
    shapes = shapes_of(tiny_unet(), num_channels=1)
    # Every name but those of the counters.
    num_names = sum(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    with pytest.raises(InputError, match=rf"and {num_names - 8} more\. Unexpected: other\."):
        from_torch({"other": np.zeros(3)}, shapes)


@pytest.mark.parametrize(
    ("strides", "num_channels"), [(STRIDES_3D, 3), (STRIDES_2D, 1)], ids=["2D for 3D", "channels"]
)
def test_a_whole_network_must_fit_as_it_is(strides, num_channels):
    weights = random_state_dict(tiny_unet(STRIDES_2D), num_channels=3)
    shapes = shapes_of(tiny_unet(strides), num_channels=num_channels)
    with pytest.raises(InputError, match=r"Missing: none\. Unexpected: none\. Wrong shape: \S+ \("):
        from_torch(weights, shapes)


# ---- ImageNet ---------------------------------------------------------------------------------


def numpy_conv(x, kernel, *, stride=1):
    taps = kernel.shape[-1]
    pad = taps // 2
    x = np.pad(x, [(0, 0), (pad, pad), (pad, pad)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (taps, taps), axis=(1, 2))
    return np.einsum("ixyhw,oihw->oxy", windows[:, ::stride, ::stride], kernel, optimize=True)


def numpy_batch_norm(x, weights, name):
    weight, bias, mean, var = (
        weights[f"{name}.{last}"].astype(np.float64)[:, None, None]
        for last in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


def numpy_bottleneck(x, weights, name, *, stride):
    y = x
    for i, step in (1, 1), (2, stride), (3, 1):
        y = numpy_conv(y, weights[f"{name}.conv{i}.weight"], stride=step)
        y = numpy_batch_norm(y, weights, f"{name}.bn{i}")
        y = np.maximum(y, 0) if i < 3 else y
    if f"{name}.downsample.0.weight" in weights:
        x = numpy_conv(x, weights[f"{name}.downsample.0.weight"], stride=stride)
        x = numpy_batch_norm(x, weights, f"{name}.downsample.1")
    return np.maximum(x + y, 0)


def test_a_torchvision_resnet50_has_the_features_of_its_numpy_evaluation(x64):
    weights = torchvision_resnet(50, width=16)
    model = create_model("resnet50_unet", num_classes=2, strides=STRIDES_2D, width=16)
    variables = from_torch(weights, zeros_of(shapes_of(model, num_channels=3)))
    image = np.random.default_rng(1).standard_normal((3, 32, 64))
    encoder = ResNetEncoder(50, STRIDES_2D, width=16)
    features = jax.jit(encoder.apply)(
        {collection: modules["encoder"] for collection, modules in variables.items()},
        np.moveaxis(image, 0, -1)[None],
    )

    x = numpy_batch_norm(numpy_conv(image, weights["conv1.weight"], stride=2), weights, "bn1")
    x = np.maximum(x, 0)
    expected = [x]
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, [(0, 0), (1, 1), (1, 1)]), (3, 3), axis=(1, 2)
    )
    x = windows[:, ::2, ::2].max(axis=(-2, -1))
    for stage, num_blocks in enumerate(STAGES[50][0], start=1):
        for block in range(num_blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            x = numpy_bottleneck(x, weights, f"layer{stage}.{block}", stride=stride)
        expected.append(x)
    for got, want in zip(features, expected, strict=True):
        assert_close(np.moveaxis(np.asarray(got[0]), -1, 0), want, of_largest=1e-12)


def test_a_resnet_fills_the_encoder_and_leaves_the_rest():
    shapes = shapes_of(tiny_unet(), num_channels=3)
    before = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), shapes)
    weights = torchvision_resnet(18, width=4)
    after = from_torch(weights, before)
    exported = to_torch(after)
    for name, weight in weights.items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(exported[f"encoder.{name}"], weight, strict=True)
    for collection, part in ("params", "decoder"), ("params", "head"), ("batch_stats", "decoder"):
        jax.tree.map(
            np.testing.assert_array_equal, after[collection][part], before[collection][part]
        )


def encoder_kernels(strides, *, num_channels: int):
    """Kernels of an encoder filled from a ResNet18: its first one, and one of layer 1."""
    weights = torchvision_resnet(18, width=4)
    shapes = shapes_of(tiny_unet(strides), num_channels=num_channels)
    encoder = from_torch(weights, zeros_of(shapes))["params"]["encoder"]
    stem, inner = encoder["conv1"]["kernel"], encoder["layer1_0"]["conv1"]["kernel"]
    return (stem, weights["conv1.weight"]), (inner, weights["layer1.0.conv1.weight"])


def test_2d_kernels_are_repeated_along_z_and_divided():
    for ours, theirs in encoder_kernels(STRIDES_3D, num_channels=3):
        taps = theirs.shape[-1]
        assert ours.shape[:3] == (taps, taps, taps)
        for z in range(taps):
            np.testing.assert_array_equal(ours[:, :, z], theirs.transpose(2, 3, 1, 0) / taps)
    (stem, theirs), _ = encoder_kernels(STRIDES_3D, num_channels=3)
    np.testing.assert_allclose(stem.sum(axis=2), theirs.transpose(2, 3, 1, 0), rtol=1e-6)


@pytest.mark.parametrize("num_channels", [2, 4, 5])
def test_the_first_kernel_is_tiled_over_the_input_channels(num_channels):
    (stem, theirs), (inner, their_inner) = encoder_kernels(STRIDES_2D, num_channels=num_channels)
    assert stem.shape == (7, 7, num_channels, 4)
    for i in range(num_channels):
        expected = theirs[:, i % 3].transpose(1, 2, 0) * np.float32(3 / num_channels)
        np.testing.assert_array_equal(stem[:, :, i], expected)
    np.testing.assert_array_equal(inner, their_inner.transpose(2, 3, 1, 0))


def test_the_first_kernel_for_one_channel_is_the_sum_of_all():
    (stem, theirs), _ = encoder_kernels(STRIDES_2D, num_channels=1)
    expected = (theirs[:, 0] + theirs[:, 1] + theirs[:, 2]).transpose(1, 2, 0)
    np.testing.assert_allclose(stem[:, :, 0], expected, rtol=0, atol=1e-6)


def test_a_resnet_of_four_channels_in_3d_is_both_inflated_and_tiled():
    (stem, theirs), _ = encoder_kernels(STRIDES_3D, num_channels=4)
    expected = theirs[:, 0].transpose(1, 2, 0) / 7 * 0.75
    np.testing.assert_allclose(stem[:, :, 2, 3], expected, rtol=1e-6)


def test_a_resnet_of_another_depth_is_refused_by_its_own_names():
    weights = torchvision_resnet(34, width=4)
    with pytest.raises(InputError, match=r"Missing: none\. Unexpected: layer1\.2\.conv1\.weight"):
        from_torch(weights, zeros_of(shapes_of(tiny_unet(), num_channels=3)))


def test_a_resnet_cannot_fill_shapes():
    with pytest.raises(InputError, match=r"resnet\.pth: expected the weights of a whole network"):
        from_torch(
            torchvision_resnet(18, width=4),
            shapes_of(tiny_unet(), num_channels=3),
            source="resnet.pth",
        )


# ---- Files ------------------------------------------------------------------------------------

WEIGHTS = {
    "encoder.conv1.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "encoder.bn1.num_batches_tracked": np.array(0),
    "segmentation_head.0.bias": np.array([0.5, -0.5], np.float64),
}


def write_torch(path, contents):
    torch = pytest.importorskip("torch")
    torch.save(
        jax.tree.map(lambda x: torch.tensor(x) if isinstance(x, np.ndarray) else x, contents), path
    )


WRITERS = {
    ".npz": lambda path, weights: np.savez(path, **weights),
    ".safetensors": lambda path, weights: save_file(weights, path),
    ".pth": write_torch,
    ".pt": write_torch,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_gives_back_what_was_written(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    WRITERS[suffix](path, WEIGHTS)
    assert_same_weights(read_weights(path), WEIGHTS)


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_prefix_of_parallel_training_and_the_classifier_are_dropped(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    weights = {f"module.{name}": weight for name, weight in WEIGHTS.items()}
    WRITERS[suffix](path, {**weights, "fc.weight": np.zeros((4, 2)), "module.fc.bias": np.zeros(4)})
    assert_same_weights(read_weights(str(path)), WEIGHTS)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_weights_are_found_beside_other_things(tmp_path, wrapper):
    path = tmp_path / "checkpoint.pth"
    write_torch(path, {"epoch": 3, wrapper: WEIGHTS, "optimizer": {"lr": 0.1}})
    assert_same_weights(read_weights(path), WEIGHTS)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bfloat16_is_read(tmp_path, suffix):
    torch = pytest.importorskip("torch")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, path)
    else:
        save_file({"a": np.array([1.5, -2.0], jnp.bfloat16)}, path)
    np.testing.assert_array_equal(read_weights(path)["a"].astype(np.float32), [1.5, -2.0])


def assert_refused(path, match: str):
    with pytest.raises(InputError, match=match) as error:
        read_weights(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}: ")


def test_other_things_than_weights_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pth"
    write_torch(path, {"epoch": 3, "net": WEIGHTS})
    assert_refused(path, r"found other things under epoch, net: save")
    write_torch(path, WEIGHTS["encoder.conv1.weight"])
    assert_refused(path, r"holds something else")


def test_an_absent_file_and_another_kind_are_refused(tmp_path):
    assert_refused(tmp_path / "none.npz", r"found none: check the path")
    assert_refused(tmp_path / "weights.h5", r"\.safetensors, \.npz, \.pth, \.pt, found '\.h5'")


def test_a_torch_file_without_torch_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "weights.pth"
    path.touch()
    assert_refused(path, r'pip install "afl-jax\[torch\]"')


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("damage", ["empty", "truncated", "noise"])
def test_a_broken_file_is_refused(tmp_path, suffix, damage):
    path = tmp_path / f"weights{suffix}"
    WRITERS[suffix](path, WEIGHTS)
    whole = path.read_bytes()
    noise = np.random.default_rng(0).bytes(len(whole))
    path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "noise": noise}[damage])
    assert_refused(path, r"corrupted, truncated")


def test_a_changed_byte_of_an_archive_is_noticed(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **WEIGHTS)
    whole = bytearray(path.read_bytes())
    whole[whole.index(np.float32(23).tobytes())] ^= 1
    path.write_bytes(whole)
    assert_refused(path, r"corrupted, truncated, or holds something else \(BadZipFile\)")


class MakesFolder:
    """Unpickled, it makes a folder: the code of a hostile file."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["pickle", "torch", "arrays"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_the_code_of_a_hostile_file_is_not_run(tmp_path, suffix, form):
    path, folder = tmp_path / f"weights{suffix}", tmp_path / "made"
    hostile = {"state_dict": {"conv1.weight": MakesFolder(folder)}}
    code = pickle.dumps(hostile, protocol=2)
    if form == "pickle":
        path.write_bytes(code)
    elif form == "arrays":
        with path.open("wb") as file:
            np.savez(file, **{"conv1.weight": np.array(MakesFolder(folder), object)})
    else:
        torch = pytest.importorskip("torch")
        torch.save(hostile, path)
    pickle.loads(code)
    assert folder.is_dir(), "the code does nothing: this test shows nothing"
    folder.rmdir()

    # A torch archive named .npz is read as raw bytes under the names of its members.
    refusal = r"corrupted, truncated, or holds something else|found other things under"
    if suffix in (".pth", ".pt") and importlib.util.find_spec("torch") is None:
        refusal = r"is read by PyTorch, which is not installed"
    assert_refused(path, refusal)
    assert not folder.exists()


def test_the_pickle_inside_an_archive_is_really_there(tmp_path):
    """The forms above are dangerous: a trusting reader of the same bytes runs their code."""
    path, folder = tmp_path / "weights.npz", tmp_path / "made"
    np.savez(path, **{"conv1.weight": np.array(MakesFolder(folder), object)})
    assert zipfile.is_zipfile(path)
    np.load(path, allow_pickle=True)["conv1.weight"]
    assert folder.is_dir()


def test_exported_weights_survive_a_file(tmp_path):
    state_dict = random_state_dict(tiny_unet(), num_channels=3)
    variables = from_torch(state_dict, shapes_of(tiny_unet(), num_channels=3))
    save_file(to_torch(variables), tmp_path / "weights.safetensors")
    for name, weight in read_weights(tmp_path / "weights.safetensors").items():
        np.testing.assert_array_equal(weight, state_dict[name])
