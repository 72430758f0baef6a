import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afl_jax.models.encoder import ResNetEncoder
from afl_jax.models.zoo import BRATS_STRIDES, MODELS, check_image_shape, create_model

STRIDES_2D = ((2, 2),) * 5
TINY = {"num_classes": 2, "strides": STRIDES_2D, "width": 4, "decoder_features": (8, 8, 4, 4, 4)}


def shapes_of(model, *image_shape: int):
    image = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def num_parameters(variables) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def random_image(*shape: int):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape))


@pytest.fixture(scope="module")
def tiny_variables():
    """As `init` gives them, by numpy: compiling it takes longer than the tests."""
    rng = np.random.default_rng(0)

    def initial(path, leaf):
        last = path[-1].key
        if last == "kernel":
            he = np.sqrt(2 / (leaf.size / leaf.shape[-2]))
            return (he * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        return np.full(leaf.shape, 1 if last in ("scale", "var") else 0, leaf.dtype)

    model = create_model("resnet18_unet", **TINY)
    return jax.tree.map_with_path(initial, shapes_of(model, 1, 32, 32, 3))


@pytest.fixture(scope="module")
def predict():
    return jax.jit(create_model("resnet18_unet", **TINY).apply)


def test_the_papers_network_has_its_number_of_parameters():
    model = create_model("resnet50_unet", num_classes=2)
    assert num_parameters(shapes_of(model, 1, 160, 128, 24, 3)) == 73_234_658


@pytest.mark.parametrize(
    ("depth", "with_classifier", "last_channels"),
    [(18, 11_689_512, 512), (34, 21_797_672, 512), (50, 25_557_032, 2048), (101, 44_549_160, 2048)],
)
def test_a_2d_encoder_has_the_parameters_of_torchvisions(depth, with_classifier, last_channels):
    encoder = ResNetEncoder(depth, STRIDES_2D)
    expected = with_classifier - (last_channels * 1000 + 1000)
    assert num_parameters(shapes_of(encoder, 1, 32, 32, 3)) == expected


@pytest.mark.parametrize("name", MODELS)
def test_logits_lie_on_the_grid_of_the_image(name):
    model = create_model(name, num_classes=3, strides=BRATS_STRIDES)
    shape = (2, 32, 16, 48, 4)
    variables = shapes_of(model, *shape)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert jax.eval_shape(model.apply, variables, image).shape == (2, 32, 16, 48, 3)


def test_features_are_reduced_by_one_more_of_the_strides_each():
    strides = ((2, 2, 2), (4, 2, 1), (2, 2, 2), (2, 2, 1), (1, 2, 3))
    encoder = ResNetEncoder(18, strides, width=4)
    image = jax.ShapeDtypeStruct((1, 64, 32, 12, 1), jnp.float32)
    features, _ = jax.eval_shape(encoder.init_with_output, jax.random.key(0), image)
    assert [feature.shape[1:] for feature in features] == [
        (32, 16, 6, 4),
        (8, 8, 6, 4),
        (4, 4, 3, 8),
        (2, 2, 3, 16),
        (2, 1, 1, 32),
    ]


def test_an_unknown_model_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown model 'unet': choose from resnet18_unet, "):
        create_model("unet", num_classes=2)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 160, 128, 25, 3), r"multiple of \(32, 32, 12\), .* got \(160, 128, 25\): "),
        ((1, 160, 128, 25, 3), r"\(160, 128, 24\) or \(160, 128, 36\) would do"),
        ((1, 8, 128, 24, 3), r": \(32, 128, 24\) would do"),
        ((1, 0, 128, 24, 3), r"got \(0, 128, 24\)"),
        ((1, 128, 24, 3), r"must have shape \[B, X, Y, Z, C\], got \(1, 128, 24, 3\)"),
    ],
)
def test_an_image_that_the_strides_do_not_divide_is_refused(shape, message):
    model = create_model("resnet18_unet", num_classes=2)
    with pytest.raises(ValueError, match=message):
        shapes_of(model, *shape)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 32, 40, 3), r"\(32, 32\) or \(32, 64\) would do"),
        ((1, 32, 32, 32, 3), r"must have shape \[B, X, Y, C\]"),
    ],
)
def test_a_2d_image_is_checked_likewise(shape, message):
    with pytest.raises(ValueError, match=message):
        check_image_shape(shape, strides=STRIDES_2D)


def test_a_2d_network_trains_and_predicts(tiny_variables, predict):
    model = create_model("resnet18_unet", **TINY)
    image = random_image(2, 32, 64, 3).astype(jnp.float32)
    labels = (image[..., 0] > 0).astype(jnp.int32)

    def loss_fn(params, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = model.apply(variables, image, train=True, mutable=["batch_stats"])
        target = jax.nn.one_hot(labels, 2)
        return -jnp.mean(target * jax.nn.log_softmax(logits)), updated["batch_stats"]

    @jax.jit
    def step(params, batch_stats):
        (loss, batch_stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            params, batch_stats
        )
        params = jax.tree.map(lambda param, gradient: param - 0.1 * gradient, params, gradients)
        return params, batch_stats, loss, gradients

    params, batch_stats = tiny_variables["params"], tiny_variables["batch_stats"]
    trained, updated, loss, gradients = step(params, batch_stats)
    *_, next_loss, _ = step(trained, updated)
    assert next_loss < loss
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.any(np.asarray(gradient) != 0), jax.tree_util.keystr(path)
    changed = jax.tree.map(lambda old, new: bool(np.any(old != new)), batch_stats, updated)
    assert all(jax.tree.leaves(changed))

    logits = predict({"params": trained, "batch_stats": updated}, image)
    assert logits.shape == (2, 32, 64, 2)
    assert np.isfinite(logits).all()


def test_prediction_does_not_depend_on_the_rest_of_the_batch(tiny_variables, predict):
    images = random_image(3, 32, 64, 3).astype(jnp.float32)
    beside_second = predict(tiny_variables, images[:2])[0]
    beside_third = predict(tiny_variables, images[::2])[0]
    largest = np.abs(beside_second).max()
    np.testing.assert_allclose(beside_third, beside_second, rtol=0, atol=1e-5 * largest)


def test_bfloat16_computes_with_float32_parameters_statistics_and_logits(tiny_variables):
    image = random_image(2, 32, 32, 3).astype(jnp.float32)

    def train(dtype):
        model = create_model("resnet18_unet", **TINY, dtype=dtype)
        logits, state = jax.jit(
            lambda variables, image: model.apply(
                variables,
                image,
                train=True,
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=lambda module, _: isinstance(module, ResNetEncoder),
            )
        )(tiny_variables, image)
        (features,) = state["intermediates"]["encoder"]["__call__"]
        return logits, features, state["batch_stats"]

    logits, features, batch_stats = train(jnp.bfloat16)
    model = create_model("resnet18_unet", **TINY, dtype=jnp.bfloat16)
    shapes = shapes_of(model, *image.shape)
    counters = {leaf.dtype for leaf in jax.tree.leaves(batch_stats) if leaf.ndim == 0}
    assert counters == {jnp.dtype(jnp.int32)}
    for leaf in jax.tree.leaves([shapes, batch_stats, logits]):
        assert leaf.ndim == 0 or leaf.dtype == jnp.float32
    assert {feature.dtype for feature in features} == {jnp.dtype(jnp.bfloat16)}
    # bfloat16 keeps 8 bits; the first feature is one convolution and one normalisation deep.
    exact_logits, exact, _ = train(None)
    error = np.abs(np.asarray(features[0], np.float32) - np.asarray(exact[0])).max()
    assert 0 < error < 2**-6 * np.abs(exact[0]).max()
    correlation = np.corrcoef(np.ravel(logits), np.ravel(exact_logits))[0, 1]
    assert correlation > 0.9


def test_synchronised_statistics_are_those_of_the_whole_batch(x64, tiny_variables):
    """Two devices with one image each see what one device sees with both."""
    image = random_image(2, 32, 64, 3)
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tiny_variables)

    def train(**options):
        model = create_model("resnet18_unet", **TINY, **options)
        return lambda image: model.apply(variables, image, train=True, mutable=["batch_stats"])

    want_logits, want_stats = jax.jit(train())(image)
    logits, stats = jax.pmap(train(axis_name="devices"), axis_name="devices")(image[:, None])
    np.testing.assert_allclose(logits[:, 0], want_logits, rtol=0, atol=1e-9)
    for got, want in zip(jax.tree.leaves(stats), jax.tree.leaves(want_stats), strict=True):
        np.testing.assert_allclose(got, np.stack([want, want]), rtol=0, atol=1e-10)


def test_gradient_checkpointing_stores_less_for_the_same_gradient(x64, tiny_variables):
    image = random_image(1, 64, 64, 3)
    variables = jax.tree.map(
        lambda x: np.asarray(x, np.float64 if x.ndim else x.dtype), tiny_variables
    )

    def run(*, gradient_checkpointing):
        model = create_model("resnet18_unet", **TINY, gradient_checkpointing=gradient_checkpointing)

        def loss_fn(params):
            logits, updated = model.apply(
                {**variables, "params": params}, image, train=True, mutable=["batch_stats"]
            )
            return jnp.square(logits).mean(), updated

        stored = jax.eval_shape(lambda params: jax.vjp(loss_fn, params)[1], variables["params"])
        num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stored))
        return num_bytes, jax.jit(jax.grad(loss_fn, has_aux=True))(variables["params"])

    (stored, want), (checkpointed, got) = (run(gradient_checkpointing=c) for c in (False, True))
    assert checkpointed < stored / 2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * max(np.abs(b).max(), 1e-9))


@pytest.mark.gpu
def test_a_gpu_computes_what_a_cpu_does():
    model = create_model("resnet18_unet", **TINY)
    image = np.random.default_rng(0).standard_normal((1, 32, 32, 2), dtype=np.float32)
    logits = []
    for platform in ("cpu", "gpu"):
        with jax.default_device(jax.devices(platform)[0]):
            variables = jax.jit(model.init)(jax.random.key(0), image)
            logits.append(np.asarray(jax.jit(model.apply)(variables, image)))
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-2 * np.abs(logits[0]).max())
