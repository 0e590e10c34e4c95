"""Models: the papers' parameter counts, named axes on every parameter, references in float64,
shapes that fit and shapes that do not."""

import math
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import adapters, models
from jaxtrain.models import layers, resnet, vit
from jaxtrain.models.attention import attention
from jaxtrain.models.convnet import ConvNet
from jaxtrain.models.fitted import Fitted
from jaxtrain.models.mlp import MLP
from jaxtrain.models.resnet import ResNet
from jaxtrain.models.vit import ViT
from jaxtrain.train import hyper

SMALL, IMAGENET = (1, 32, 32, 3), (1, 224, 224, 3)

# Small ResNets: He et al. give 0.27M, 0.46M, 0.85M, 1.7M (shortcut option A); WRN-28-10: 36.5M.
# ImageNet ResNets as published in torchvision, ViTs as in timm and big_vision (1000 classes, class
# token, no pre-logits).
COUNTS = {
    "resnet20": (SMALL, 269_722),
    "resnet32": (SMALL, 464_154),
    "resnet56": (SMALL, 853_018),
    "resnet110": (SMALL, 1_727_962),
    "wrn_28_10": (SMALL, 36_479_194),
    "resnet18": (IMAGENET, 11_689_512),
    "resnet34": (IMAGENET, 21_797_672),
    "resnet50": (IMAGENET, 25_557_032),
    "resnet101": (IMAGENET, 44_549_160),
    "vit_ti16": (IMAGENET, 5_717_416),
    "vit_s16": (IMAGENET, 22_050_664),
    "vit_b16": (IMAGENET, 86_567_656),
    "vit_l16": (IMAGENET, 304_326_632),
    "mlp": ((1, 8, 8, 1), 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10),
    "convnet": ((1, 28, 28, 1), 98_682),
}

TINY = {
    "mlp": (MLP(widths=(8,), norm="batch"), (2, 4, 4, 1)),
    "mlp_layer": (MLP(widths=(8,), norm="layer"), (2, 5)),
    "convnet": (ConvNet(widths=(4, 8)), (2, 8, 8, 1)),
    "convnet1d": (ConvNet(widths=(4, 8), padding="circular", kernel=5), (2, 10)),
    "convnet_bias": (
        ConvNet(widths=(4,), depth=2, norm="none", block=2, pool="mean"),
        (2, 6, 6, 3),
    ),
    "fitted": (Fitted(10, widths=(8,), input_mean=(9.0,), input_deviation=(2.0,)), (2, 5)),
    "fitted_convnet": (Fitted(10, "convnet", (4, 8), mean=(1.0,), deviation=(3.0,)), (2, 10)),
    "resnet": (ResNet(stages=(1, 1), width=4, stem_width=4), (2, 7, 7, 3)),
    "resnet_project": (
        ResNet(stages=(1, 1), width=4, shortcut="project", stem="imagenet", zero_init=True),
        (2, 16, 16, 3),
    ),
    "bottleneck": (
        ResNet(stages=(1, 1), width=4, block="bottleneck", shortcut="project"),
        (2, 8, 8, 3),
    ),
    "wide": (ResNet(stages=(1, 1), width=8, stem_width=4, block="preactivation"), (2, 8, 8, 3)),
    "vit": (ViT(patch=4, width=16, depth=1, heads=2), (2, 8, 8, 3)),
    "vit_mean": (
        ViT(patch=4, width=16, depth=1, heads=2, pool="mean", positions="sincos"),
        (2, 8, 4, 1),
    ),
}


def abstract(model: Any, shape: tuple[int, ...]) -> Any:
    return jax.eval_shape(
        adapters.functions(model).init,
        jax.eval_shape(lambda: jax.random.key(0)),
        jax.ShapeDtypeStruct(shape, "float32"),
    )


def start(name: str) -> tuple[adapters.Functions, Any, jax.Array]:
    """A tiny model with random variables, biases included, and inputs for it."""
    model, shape = TINY[name]
    net, inputs = adapters.functions(model), jax.random.normal(jax.random.key(1), shape)
    variables = jax.jit(net.init)(jax.random.key(0), inputs)
    generator = np.random.default_rng(2)
    noisy = jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.1 * generator.normal(size=leaf.shape).astype(np.float32),
        variables["params"],
    )
    return net, {**variables, "params": noisy}, inputs


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_papers(name: str) -> None:
    shape, count = COUNTS[name]
    params = abstract(models.NAMES[name], shape)["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


def test_a_pooled_vit_has_a_token_and_its_place_less() -> None:
    vits = [ViT(patch=4, width=16, depth=1, heads=2, pool=pool) for pool in ("token", "mean")]
    token, mean = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(model, SMALL)))
        for model in vits
    )
    assert token - mean == 2 * 16


def test_every_model_has_a_row() -> None:
    """Models over tokens have files of tests of their own: tests/test_transformer.py,
    tests/test_encoder.py; what stands for a model in files has tests/test_pretrained.py."""
    small = {type(model) for model, _ in TINY.values()} | {
        models.Transformer,
        models.Encoder,
        models.Pretrained,
    }
    assert {type(model) for model in models.NAMES.values()} <= small


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_names_its_axes(name: str) -> None:
    model, shape = TINY[name]
    inputs = jax.ShapeDtypeStruct(shape, "float32")
    params, axes = abstract(model, shape)["params"], adapters.logical_axes(model, inputs)["params"]
    words = {
        "embed",
        "heads",
        "head_dim",
        "mlp",
        "mlp_in",
        "conv_in",
        "conv_out",
        "position",
        "patch",
        "classes",
        None,
    }

    def check(leaf: Any, names: tuple[str | None, ...]) -> None:
        assert len(names) == leaf.ndim and set(names) <= words and any(names), names
        named = [name for name in names if name]
        assert len(set(named)) == len(named), f"{names}: one mesh axis cannot shard two dims"

    jax.tree.map(check, params, axes)


@pytest.mark.parametrize("name", TINY)
def test_a_model_takes_any_batch_and_integers_and_learns(name: str) -> None:
    net, variables, inputs = start(name)
    labels, bytes_in = jnp.array([1, 2]), (inputs > 0).astype(jnp.uint8)

    def loss(params: Any) -> jax.Array:
        outputs, _ = net.apply(
            {**variables, "params": params}, inputs, train=True, key=jax.random.key(0)
        )
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    @jax.jit  # one program: eager calls would compile every operation on its own
    def everything() -> Any:
        outputs = [
            net.apply(variables, x, train=False)[0]
            for x in (inputs, inputs[:1], bytes_in, bytes_in.astype(jnp.float32))
        ]
        value, gradients = jax.value_and_grad(loss)(variables["params"])
        return (
            outputs,
            gradients,
            value,
            loss(jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], gradients)),
        )

    (outputs, one, of_bytes, of_floats), gradients, value, lower = everything()
    assert outputs.shape == (2, 10) and outputs.dtype == jnp.float32
    np.testing.assert_allclose(one, outputs[:1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(of_bytes, of_floats)
    assert all(
        np.any(gradient)
        for path, gradient in jax.tree_util.tree_leaves_with_path(gradients)
        if not without_effect(path)
    )
    assert lower < value


def without_effect(path: Any) -> bool:
    """Parameters that a norm or a softmax cancels, or that two examples of one place leave at
    rest."""
    text = jax.tree_util.keystr(path, simple=True, separator="/")
    return text.startswith("hidden") and text.endswith("bias")


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet", "wide", "vit"])
def test_dropout_may_be_traced_and_off_costs_nothing(name: str) -> None:
    model, _ = TINY[name]
    net, variables, inputs = start(name)

    def outputs(rate: Any) -> jax.Array:
        bound = adapters.functions(
            hyper.bind(model.clone(dropout=0.5), {"model.dropout": rate}, "model")
        )
        return bound.apply(variables, inputs, train=True, key=jax.random.key(0))[0]

    traced = jax.jit(outputs)
    plain = jax.jit(lambda: net.apply(variables, inputs, train=True)[0])()
    np.testing.assert_allclose(traced(0.0), plain, rtol=1e-3, atol=1e-4)
    assert np.any(np.asarray(traced(0.5)) != plain) and traced._cache_size() == 1
    key = jax.random.key(0)
    program = str(
        jax.make_jaxpr(lambda key: net.apply(variables, inputs, train=True, key=key)[0])(key)
    )
    assert "random_bits" not in program and "random_fold_in" not in program


def test_dropout_keeps_the_mean() -> None:
    ones = jnp.ones((100, 100))
    kept = layers.Dropout(0.25).apply({}, ones, True, rngs={"dropout": jax.random.key(0)})
    assert abs(float(kept.mean()) - 1) < 0.02 and set(np.unique(kept)) == {0.0, np.float32(4 / 3)}


def test_batch_norm_is_that_of_numpy_in_float64() -> None:
    x = 3 + 2 * np.random.default_rng(0).normal(size=(16, 4, 4, 3))
    norm = layers.batch_norm(True)
    variables = layers.nn.meta.unbox(norm.init(jax.random.key(0), jnp.asarray(x, jnp.float32)))
    params = {"scale": jnp.array([1.0, 2.0, -1.0]), "bias": jnp.array([0.0, 1.0, 0.5])}
    y, changed = norm.apply(
        {**variables, "params": params}, jnp.asarray(x, jnp.float32), mutable=["batch_stats"]
    )
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    scale, bias = np.array([1.0, 2.0, -1.0]), np.array([0.0, 1.0, 0.5])
    np.testing.assert_allclose(
        y, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(changed["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(changed["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-5)
    y = layers.batch_norm(False).apply({"params": params, **changed}, jnp.asarray(x, jnp.float32))
    expected = (x - 0.1 * mean) / np.sqrt(0.9 + 0.1 * var + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def numpy_conv(x: np.ndarray, kernel: np.ndarray, stride: int = 1) -> np.ndarray:
    """A convolution by loops over places, padded by half its kernel."""
    side, height, width = kernel.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    half = side // 2
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    out = np.zeros((x.shape[0], height, width, kernel.shape[-1]))
    for row in range(height):
        for column in range(width):
            window = padded[
                :, row * stride : row * stride + side, column * stride : column * stride + side
            ]
            out[:, row, column] = np.tensordot(window, kernel, axes=3)
    return out


def numpy_norm(x: np.ndarray, params: Any, stats: Any) -> np.ndarray:
    scale, bias, mean, var = (
        np.asarray(a, np.float64)
        for a in (params["scale"], params["bias"], stats["mean"], stats["var"])
    )
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def test_resnet_is_that_of_numpy_in_float64() -> None:
    net, variables, inputs = start("resnet")
    params, stats = variables["params"], variables["batch_stats"]

    def unit(x: np.ndarray, where: Any, conv: str, norm: str, stride: int = 1) -> np.ndarray:
        params, stats = where
        return numpy_norm(
            numpy_conv(x, np.asarray(params[conv]["kernel"], np.float64), stride),
            params[norm],
            stats[norm],
        )

    x = np.maximum(
        unit(np.asarray(inputs, np.float64), (params, stats), "stem_conv", "stem_norm"), 0
    )
    for block, stride in (("stage0_block0", 1), ("stage1_block0", 2)):
        where = params[block], stats[block]
        branch = np.maximum(unit(x, where, "conv0", "norm0", stride), 0)
        branch = unit(branch, where, "conv1", "norm1")
        if stride == 2:
            x = np.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
        x = np.maximum(x + branch, 0)
    expected = x.mean((1, 2)) @ np.asarray(params["head"]["kernel"], np.float64) + np.asarray(
        params["head"]["bias"], np.float64
    )
    np.testing.assert_allclose(
        net.apply(variables, inputs, train=False)[0], expected, rtol=1e-4, atol=1e-5
    )


def test_attention_is_that_of_numpy_in_float64() -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 8))
    attention = vit.Attention(heads=2)
    params = layers.nn.meta.unbox(attention.init(jax.random.key(0), jnp.asarray(x, jnp.float32)))[
        "params"
    ]
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = np.zeros_like(x) + wide["out"]["bias"]
    for head in range(2):
        query, key, value = (
            x @ wide[name]["kernel"][:, head] + wide[name]["bias"][head]
            for name in ("query", "key", "value")
        )
        scores = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(4))
        expected += (scores / scores.sum(-1, keepdims=True)) @ value @ wide["out"]["kernel"][head]
    np.testing.assert_allclose(
        attention.apply({"params": params}, jnp.asarray(x, jnp.float32)),
        expected,
        rtol=1e-4,
        atol=1e-5,
    )


def test_attention_has_the_parameters_of_flax_and_finds_the_same() -> None:
    x = jax.random.normal(jax.random.key(1), (2, 5, 12))
    flax = layers.nn.MultiHeadDotProductAttention(num_heads=3, kernel_init=layers.LECUN)
    params = jax.tree.map(lambda leaf: leaf + 0.1, flax.init(jax.random.key(0), x)["params"])
    ours = layers.nn.meta.unbox(vit.Attention(heads=3).init(jax.random.key(0), x))["params"]
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(
        vit.Attention(heads=3).apply({"params": params}, x),
        flax.apply({"params": params}, x),
        rtol=1e-5,
        atol=1e-5,
    )


def test_each_of_query_key_and_value_starts_with_its_own_xavier_bound() -> None:
    width = 64
    params = layers.nn.meta.unbox(
        vit.Attention(heads=4).init(jax.random.key(0), jnp.zeros((1, 2, width)))
    )["params"]
    bound = math.sqrt(6 / (2 * width))
    kernels = [params[name]["kernel"] for name in ("query", "key", "value", "out")]
    for leaf in kernels:
        assert 0.98 * bound < float(jnp.abs(leaf).max()) <= bound
        assert float(leaf.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not np.array_equal(kernels[0], kernels[1]) and not np.array_equal(*kernels[1:3])


@pytest.mark.parametrize("causal", [False, True])
def test_fewer_keys_and_values_are_each_shared_by_queries_in_a_row(causal: bool) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))

    def projected(name: str, heads: int) -> jax.Array:
        layer = layers.head_projection(heads, 4, name=name)
        return layer.init_with_output(jax.random.key(heads), x)[0]

    query, key, value = projected("query", 6), projected("key", 2), projected("value", 2)
    assert key.shape == (2, 5, 2, 4)
    whole = (jnp.repeat(array, 3, axis=2) for array in (key, value))
    np.testing.assert_allclose(
        attention(query, key, value, causal=causal),
        attention(query, *whole, causal=causal),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_vit_without_positions_forgets_the_order_of_patches() -> None:
    net, variables, images = start("vit")
    images = np.asarray(images)
    swapped = np.concatenate([images[:, 4:], images[:, :4]], axis=1)
    places = variables["params"]["positions"]
    plain = {**variables, "params": {**variables["params"], "positions": np.zeros_like(places)}}
    run = jax.jit(lambda variables, inputs: net.apply(variables, inputs, train=False)[0])
    assert not np.allclose(run(variables, images), run(variables, swapped), atol=1e-4)
    np.testing.assert_allclose(run(plain, images), run(plain, swapped), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_halving_is_max_pooling(size: int) -> None:
    x = jax.random.normal(jax.random.key(0), (2, size, size, 3))
    if size == 1:
        np.testing.assert_array_equal(layers.halve(x), x)
        return
    np.testing.assert_array_equal(layers.halve(x), layers.nn.max_pool(x, (2, 2), (2, 2)))
    np.testing.assert_allclose(
        layers.halve(x, "mean"), layers.nn.avg_pool(x, (2, 2), (2, 2)), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    "shape", [(1, 8, 8, 1), (1, 28, 28, 3), (1, 33, 17, 1), (1, 1, 1, 1), (1, 40), (1, 40, 2)]
)
def test_the_convnet_takes_any_size(shape: tuple[int, ...]) -> None:
    model = ConvNet(widths=(4, 8, 8))
    assert jax.eval_shape(
        lambda key, x: model.init_with_output(key, x)[0], jax.random.key(0), jnp.zeros(shape)
    ).shape == (1, 10)


def test_a_circular_convnet_does_not_feel_a_turn() -> None:
    model = ConvNet(widths=(4, 8), padding="circular", kernel=5)
    signal = jax.random.normal(jax.random.key(0), (2, 16))
    variables = model.init(jax.random.key(1), signal)
    np.testing.assert_allclose(
        model.apply(variables, signal),
        model.apply(variables, jnp.roll(signal, 2, axis=1)),
        rtol=1e-4,
        atol=1e-5,
    )


ERRORS = [
    (
        ViT(patch=16),
        (1, 28, 28, 1),
        (
            r"ViT.patch=16: images of 28x28 cannot be cut into 16x16 patches; choose patch 2 or 4"
            r" or 7 or 14"
        ),
    ),
    (
        ViT(patch=4),
        (1, 31, 31, 1),
        r"images of 31x31 cannot be cut into 4x4 patches; crop or resize the images",
    ),
    (ViT(width=20), (1, 8, 8, 1), r"ViT.heads=3: does not divide width=20; choose a divisor of it"),
    (
        ViT(width=18, positions="sincos"),
        (1, 8, 8, 1),
        r"ViT.width=18: positions=sincos needs a multiple of 4; nearest: 16",
    ),
    (ViT(), (1, 8, 8), r"ViT: input shape \(1, 8, 8\) is not \(batch, height, width, channels\)"),
    (ResNet(), (1, 40), r"ResNet: input shape \(1, 40\) is not \(batch, height, width, channels\)"),
    (
        ResNet(width=8),
        (1, 8, 8, 1),
        (
            r"ResNet.shortcut=pad: cannot pad 16 channels to 8; set stem_width <= width, or"
            r" shortcut=project"
        ),
    ),
    (ConvNet(), (1, 2, 2, 2, 2), r"ConvNet: input shape \(1, 2, 2, 2, 2\) is neither"),
    (ConvNet(widths=(8, 0)), (1, 8, 8, 1), r"ConvNet.widths=\(8, 0\): every entry must be >= 1"),
    (MLP(widths=(-1,)), (1, 8), r"MLP.widths=\(-1,\): every entry must be >= 1"),
    (ResNet(stages=()), (1, 8, 8, 1), r"ResNet.stages=\(\): needs at least one entry, e.g. 3,3,3"),
    (ConvNet(block=3), (1, 8, 8, 1), r"input of 8x8: not divisible into blocks of 3"),
]


@pytest.mark.parametrize(("model", "shape", "message"), ERRORS)
def test_shapes_that_cannot_be_are_named(model: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        abstract(model, shape)


def test_a_model_imports_alone() -> None:
    program = (
        "import sys; from jaxtrain.models import MLP, ConvNet, ResNet, ViT, NAMES;"
        " print(*sys.modules)"
    )
    loaded = set(
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.split()
    )
    assert not loaded & {
        "tensorflow_datasets",
        "tensorflow",
        "grain",
        "orbax",
        "matplotlib",
        "jaxtrain.config.flags",
        "jaxtrain.config",
    }
    families = {
        f"jaxtrain.models.{name}"
        for name in (
            *(*models._FAMILIES, "layers", "attention", "cache"),
            *("rotary", "encoder", "token_inputs"),
        )
    }
    ours = {name for name in loaded if name.startswith("jaxtrain")}
    roots = {
        f"jaxtrain.{name}"
        for name in ("errors", "fields", "horizon", "late_logits", "block_loop", "messages", "tree")
    }
    assert ours <= {"jaxtrain", "jaxtrain.models"} | roots | families


def test_names_are_distinct_and_the_package_names_what_it_has() -> None:
    assert not set(resnet.NAMES) & set(vit.NAMES) and {"mlp", "convnet", "convnet1d"} <= set(
        models.NAMES
    )
    assert "ViT" in dir(models)
    with pytest.raises(AttributeError, match="has no attribute 'VIT'; it has MLP, NAMES"):
        _ = models.VIT
