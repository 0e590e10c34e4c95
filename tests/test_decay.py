"""What decays and what Muon takes: every model of `models.NAMES`, Flax's own layers, trees of other
libraries; and the singular values of one update of Muon."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxtrain import adapters, models, tasks, tree
from jaxtrain.models import convnet, encoder, fitted, mlp, resnet, sizes, transformer, vit
from jaxtrain.optimizers import AdamW, Lamb, Muon, match_table, parameters
from jaxtrain.train.state import init_state
from jaxtrain.train.steps import make_train_step

MODELS = [name for name in models.NAMES if name != "hf"]
"""All that can be made without files."""
Sides = tuple[int, int, int]
"""How many matrices there are, their inputs, their outputs."""


def shrunk(name: str) -> tuple[nn.Module, jax.ShapeDtypeStruct]:
    """A model of `models.NAMES` with every kind of layer that it has, but few and narrow, and an
    input for it."""
    model = models.NAMES[name]
    if isinstance(model, mlp.MLP):
        return model.clone(widths=(24, 16)), jax.ShapeDtypeStruct((2, 6, 6), jnp.float32)
    if isinstance(model, convnet.ConvNet):
        shape = (2, 16) if name == "convnet1d" else (2, 8, 8, 3)
        return model.clone(widths=(8, 12)), jax.ShapeDtypeStruct(shape, jnp.float32)
    if isinstance(model, resnet.ResNet):
        small = model.clone(stages=(1, 1), width=8, stem_width=8, num_classes=10)
        return small, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    if isinstance(model, vit.ViT):
        small = model.clone(patch=2, width=24, depth=1, heads=3, num_classes=10)
        return small, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    if isinstance(model, fitted.Fitted):
        return model.clone(widths=(24, 16)), jax.ShapeDtypeStruct((2, 6), jnp.float32)
    small = model.clone(width=32, depth=1, heads=4, max_length=16, vocabulary=64)
    if name in sizes.NAMES:
        small = small.clone(hidden=48)
    if isinstance(model, transformer.Transformer) and name in sizes.NAMES:
        small = small.clone(key_heads=2, head_dim=0)
    return small, jax.ShapeDtypeStruct((2, 8), jnp.int32)


def described(model: Any, inputs: Any) -> tuple[tree.PyTree, tree.PyTree]:
    """The abstract parameters of a model and their logical axes."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(
        lambda key, inputs: adapters.functions(model).init(key, inputs), key, inputs
    )
    return shapes["params"], adapters.logical_axes(model, inputs)["params"]


def sides_by_hand(path: str, shape: tuple[int, ...]) -> Sides:
    """The matrices of a kernel of our models, as the papers have them, told by the path alone."""
    *_, layer, last = path.split("/")
    assert last == "kernel"
    if layer == "attention":  # query, key and value in one array (D, 3, N, K)
        return shape[1], shape[0], shape[2] * shape[3]
    if layer in ("query", "key", "value"):  # (D, N, K)
        return 1, shape[0], math.prod(shape[1:])
    return 1, math.prod(shape[:-1]), shape[-1]  # out (N, K, D), dense, convolutions


def in_order(path: str, array: np.ndarray) -> np.ndarray:
    """A kernel of our models as matrices (count, inputs, outputs)."""
    count, rows, columns = sides_by_hand(path, array.shape)
    if count > 1:
        array = np.moveaxis(array, 1, 0)
    return array.reshape(count, rows, columns)


def sides_found(parameter: parameters.Parameter) -> Sides | None:
    """What `describe` says of a parameter that Muon takes, in the same words."""
    if not parameter.hidden:
        return None
    assert parameter.matrix is not None
    inputs, outputs = (
        math.prod(parameter.shape[dim] for dim in dims)
        for dims in (parameter.matrix.inputs, parameter.matrix.outputs)
    )
    return math.prod(parameter.shape) // (inputs * outputs), inputs, outputs


@pytest.mark.parametrize("name", MODELS)
def test_kernels_decay_and_hidden_ones_are_muons(name: str) -> None:
    """In full size, of language models two blocks; run with `-rP` to read the table of each."""
    model = models.NAMES[name]
    inputs = {
        mlp.MLP: jax.ShapeDtypeStruct((1, 28, 28), jnp.float32),
        transformer.Transformer: jax.ShapeDtypeStruct((1, 16), jnp.int32),
        encoder.Encoder: jax.ShapeDtypeStruct((1, 16), jnp.int32),
    }.get(type(model), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    if name == "convnet1d":
        inputs = jax.ShapeDtypeStruct((1, 40), jnp.float32)
    params, axes = described(model.clone(depth=2) if name in sizes.NAMES else model, inputs)
    for row in parameters.table(params, axes):
        print("  ".join(row))
    found = tree.flatten(parameters.describe(params, axes))
    assert found.keys() == tree.flatten(params).keys()
    for path, parameter in found.items():
        kernel = path.endswith("/kernel")
        assert parameter.decays == kernel, path
        hidden = kernel and not path.endswith("head/kernel")
        assert sides_found(parameter) == (sides_by_hand(path, parameter.shape) if hidden else None)
    kinds = {path: parameter.kind for path, parameter in found.items()}
    if isinstance(models.NAMES[name], vit.ViT):
        assert (kinds["token"], kinds["positions"]) == ("token", "position")
    if isinstance(models.NAMES[name], transformer.Transformer):
        learned = models.NAMES[name].positions == "learned"
        assert kinds["embed"] == "embedding"
        assert kinds.get("positions") == ("position" if learned else None)


def spectrum(draw: np.random.Generator, count: int, rows: int, columns: int) -> np.ndarray:
    """Matrices whose singular values lie between 0.1 and 1, all sizes alike."""
    rank = min(rows, columns)
    left = np.linalg.qr(draw.normal(size=(count, rows, rank)))[0]
    right = np.linalg.qr(draw.normal(size=(count, columns, rank)))[0]
    values = 10.0 ** -draw.uniform(size=(count, rank))
    return np.einsum("nir,nr,nor->nio", left, values, right)


def kinds_of_models() -> dict[str, nn.Module]:
    """The shrunken models, one of those that are equal: sizes differ in width and depth only. Of
    language models a decoder with gates and an encoder: the others have the same kernels."""
    kinds: dict[str, nn.Module] = {}
    for name in MODELS:
        if name in sizes.NAMES and name not in ("llama3_8b", "bert_base"):
            continue
        if shrunk(name)[0] not in kinds.values():
            kinds[name] = shrunk(name)[0]
    return kinds


@pytest.mark.parametrize("name", kinds_of_models())
def test_an_update_of_muon_has_singular_values_near_one(name: str) -> None:
    """Of every matrix and convolution, heads on request included; run with `-rP` for the values.

    The update at rate 1 is divided by sqrt(max(1, outputs / inputs)), which Jordan's convention
    multiplies by. Five iterations bring singular values near 1, not to 1; very small ones of a
    gradient they leave small, so the gradient's lie within one order of magnitude.
    """
    model, inputs = shrunk(name)
    params, axes = described(model, inputs)
    gradients, draw = {}, np.random.default_rng(0)
    for path, leaf in tree.flatten(params).items():
        if not path.endswith("/kernel"):
            gradients[path] = draw.normal(size=leaf.shape)
            continue
        count, rows, columns = sides_by_hand(path, leaf.shape)
        matrices = spectrum(draw, count, rows, columns)
        if count > 1:
            matrices = np.moveaxis(matrices.reshape(count, rows, *leaf.shape[2:]), 0, 1)
        gradients[path] = matrices.reshape(leaf.shape)
    structure = jax.tree.structure(params)
    gradient = structure.unflatten([jnp.asarray(leaf, jnp.float32) for leaf in gradients.values()])
    heads = tuple(f"^{path}" for path in gradients if path.endswith("head/kernel"))
    transform = Muon(muon=heads).transform(params, 1.0, axes)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    updates, _ = jax.jit(transform.update)(gradient, transform.init(zeros), zeros)
    for path, update in tree.flatten(updates).items():
        if not path.endswith("/kernel"):
            continue
        matrices, given = in_order(path, -np.asarray(update)), in_order(path, gradients[path])
        _, rows, columns = matrices.shape
        matrices = matrices / math.sqrt(max(1.0, columns / rows))
        values = np.linalg.svd(matrices, compute_uv=False)
        print(f"{path}  {len(matrices)} of {rows}x{columns}  {values.min():.2f} {values.max():.2f}")
        assert 0.5 < values.min() and values.max() < 1.3, path
        # The gradient's own directions are kept: its polar factor is near.
        left, _, right = np.linalg.svd(given, full_matrices=False)
        turned = np.einsum("nir,nio,nro->nr", left, matrices, right)
        assert turned.min() > 0.5 and turned.max() < 1.3, path


class _Block(nn.Module):
    """One of a stack of layers."""

    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(2, use_bias=self.bias, name="attention")(y)
        y = nn.Conv(8, (3,), use_bias=self.bias, name="conv")(y)
        return x + nn.Dense(8, use_bias=self.bias, name="dense")(y), None


class _Layers(nn.Module):
    """A Flax layer, or a stack of blocks under `nn.scan`."""

    make: Callable[[], nn.Module] | None = None
    length: int = 3
    bias: bool = True
    axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        if self.make is not None:
            return self.make()(x)
        stack = nn.scan(
            _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.length,
            metadata_params={nn.PARTITION_NAME: self.axis},
        )
        return stack(bias=self.bias, name="layers")(x, None)[0]


ATTENTION = {
    "query/kernel": (1, 8, 8),
    "key/kernel": (1, 8, 8),
    "value/kernel": (1, 8, 8),
    "out/kernel": (1, 8, 8),
}
LSTM: dict[str, Sides] = {f"i{gate}/kernel": (1, 8, 4) for gate in "ifgo"} | {
    f"h{gate}/kernel": (1, 4, 4) for gate in "ifgo"
}
GRU: dict[str, Sides] = {f"i{gate}/kernel": (1, 8, 4) for gate in "rzn"} | {
    f"h{gate}/kernel": (1, 4, 4) for gate in "rzn"
}
LINEN: dict[str, tuple[Callable[[], nn.Module], dict[str, Sides]]] = {
    "dense": (lambda: nn.Dense(5), {"kernel": (1, 8, 5)}),
    "general_out": (lambda: nn.DenseGeneral((4, 3)), {"kernel": (1, 8, 12)}),
    "general_in": (lambda: nn.DenseGeneral(7, axis=(-2, -1)), {"kernel": (1, 48, 7)}),
    "conv_1d": (lambda: nn.Conv(5, (3,)), {"kernel": (1, 24, 5)}),
    "conv_2d": (lambda: nn.Conv(5, (3, 2)), {"kernel": (1, 48, 5)}),
    "conv_2d_bare": (lambda: nn.Conv(5, (3, 2), use_bias=False), {"kernel": (1, 48, 5)}),
    "conv_transpose": (lambda: nn.ConvTranspose(5, (3,)), {"kernel": (1, 24, 5)}),
    "embed": (lambda: nn.Embed(10, 4), {}),
    "layer_norm": (lambda: nn.LayerNorm(), {}),
    "layer_norm_2d": (lambda: nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1)), {}),
    "rms_norm": (lambda: nn.RMSNorm(), {}),
    "batch_norm": (lambda: nn.BatchNorm(use_running_average=True), {}),
    "group_norm": (lambda: nn.GroupNorm(num_groups=2), {}),
    "prelu": (lambda: nn.PReLU(), {}),
    "attention": (lambda: nn.MultiHeadDotProductAttention(2), ATTENTION),
    "attention_bare": (
        lambda: nn.MultiHeadDotProductAttention(2, use_bias=False, normalize_qk=True),
        ATTENTION,
    ),
    "lstm": (lambda: nn.RNN(nn.LSTMCell(4)), LSTM),
    "optimized_lstm": (lambda: nn.RNN(nn.OptimizedLSTMCell(4)), LSTM),
    "gru": (lambda: nn.RNN(nn.GRUCell(4)), GRU),
}


def muon_takes(params: tree.PyTree, axes: tree.PyTree) -> dict[str, Sides]:
    """The matrices that Muon takes; what decays must be these and no more."""
    found = tree.flatten(parameters.describe(params, axes))
    taken = {path: sides for path, each in found.items() if (sides := sides_found(each))}
    assert set(taken) == {path for path, each in found.items() if each.decays}
    return taken


@pytest.mark.parametrize("name", LINEN)
def test_layers_of_linen(name: str) -> None:
    make, expected = LINEN[name]
    shape = (2, 6, 6, 8) if "2d" in name else (2, 6, 8)
    inputs = jnp.zeros(shape, jnp.int32 if name == "embed" else jnp.float32)
    params, axes = described(_Layers(make), inputs)
    found = muon_takes(params, axes)
    assert len(found) == len(expected)
    for end, sides in expected.items():
        assert [value for path, value in found.items() if path.endswith(end)] == [sides]


class _StackOfNnx(nnx.Module):
    """Three attention layers and norms as one, by `nnx.vmap`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> nnx.Module:
            return nnx.Sequential(
                nnx.LayerNorm(8, rngs=rngs),
                nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
                nnx.Linear(8, 5, rngs=rngs),
            )

        self.blocks = make(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError("only its parameters are looked at")


NNX: dict[str, tuple[Callable[[nnx.Rngs], nnx.Module], set[Sides]]] = {
    "linear": (lambda rngs: nnx.Linear(8, 5, rngs=rngs), {(1, 8, 5)}),
    "general": (lambda rngs: nnx.LinearGeneral(8, (4, 3), rngs=rngs), {(1, 8, 12)}),
    "conv_1d": (lambda rngs: nnx.Conv(4, 5, (3,), rngs=rngs), {(1, 12, 5)}),
    "conv_2d": (lambda rngs: nnx.Conv(4, 5, (3, 2), rngs=rngs), {(1, 24, 5)}),
    "conv_transpose": (lambda rngs: nnx.ConvTranspose(4, 5, (3,), rngs=rngs), {(1, 12, 5)}),
    "embed": (lambda rngs: nnx.Embed(10, 4, rngs=rngs), set()),
    "layer_norm": (lambda rngs: nnx.LayerNorm(4, rngs=rngs), set()),
    "rms_norm": (lambda rngs: nnx.RMSNorm(4, rngs=rngs), set()),
    "batch_norm": (lambda rngs: nnx.BatchNorm(4, rngs=rngs), set()),
    "group_norm": (lambda rngs: nnx.GroupNorm(4, num_groups=2, rngs=rngs), set()),
    "attention": (
        lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
        {(1, 8, 8)},
    ),
    "lora": (lambda rngs: nnx.LoRA(3, 2, 5, rngs=rngs), {(1, 3, 2), (1, 2, 5)}),
    "lstm": (lambda rngs: nnx.LSTMCell(8, 4, rngs=rngs), {(1, 8, 4), (1, 4, 4)}),
    "gru": (lambda rngs: nnx.GRUCell(8, 4, rngs=rngs), {(1, 8, 12), (1, 4, 12)}),
    "stack": (_StackOfNnx, {(3, 8, 8), (3, 8, 5)}),
}


@pytest.mark.parametrize("name", NNX)
def test_layers_of_nnx(name: str) -> None:
    make, expected = NNX[name]
    assert set(muon_takes(*described(lambda rngs: make(rngs), None)).values()) == expected


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [2, 3, 8])
def test_stacked_layers_are_matrices_each(length: int, bias: bool) -> None:
    """Under `nn.scan` every array has one more dim, here also of the size of the width (8)."""
    params, axes = described(_Layers(length=length, bias=bias), jnp.zeros((2, 6, 8)))
    found = muon_takes(params, axes)
    expected = {f"layers/attention/{path}": (length, 8, 8) for path in ATTENTION}
    expected |= {"layers/conv/kernel": (length, 24, 8), "layers/dense/kernel": (length, 8, 8)}
    assert found == expected
    assert all(len(leaf.shape) > 1 for leaf in jax.tree.leaves(params))


def test_a_stacked_dim_with_a_name_needs_no_guess() -> None:
    kernel = np.zeros((3, 4, 8, 5))
    found = parameters.describe({"kernel": kernel}, {"kernel": ("layers", None, "conv_in", "x")})
    assert found["kernel"].matrix == parameters.Matrix((1, 2), (3,))
    experts = parameters.describe({"wi": kernel[0]}, {"wi": ("experts", "embed", "mlp")})
    assert experts["wi"].matrix == parameters.Matrix((1,), (2,))


@pytest.mark.parametrize(
    ("params", "decaying", "muon"),
    [
        # Haiku
        (
            {
                "linear": {"w": (8, 5), "b": (5,)},
                "conv2_d": {"w": (3, 3, 4, 6), "b": (6,)},
                "layer_norm": {"scale": (8,), "offset": (8,)},
                "embed": {"embeddings": (10, 4)},
            },
            {"linear/w", "conv2_d/w"},
            {"linear/w": (1, 8, 5), "conv2_d/w": (1, 36, 6)},
        ),
        # Equinox and PyTorch: outputs first, and biases of convolutions with dims of 1
        (
            {
                "linear": {"weight": (5, 8), "bias": (5,)},
                "conv": {"weight": (6, 4, 3, 3), "bias": (6, 1, 1)},
                "norm": {"weight": (8,), "bias": (8,)},
                "embedding": {"weight": (10, 4)},
                "lm_head": {"weight": (10, 4)},
            },
            {"linear/weight", "conv/weight", "lm_head/weight"},
            {"linear/weight": (1, 8, 5), "conv/weight": (1, 36, 6)},
        ),
        # names of one's own: two dims and more, not counting leading dims of 1, are a kernel
        (
            {"w1": (8, 5), "b1": (5,), "mix": (3, 4), "cls_token": (1, 1, 8), "seen": (1, 1, 8)},
            {"w1", "mix"},
            {"w1": (1, 8, 5), "mix": (1, 3, 4)},
        ),
        # positions and tables of other ViTs and language models
        (
            {
                "pos_embedding": (1, 50, 8),
                "wpe": {"embedding": (50, 8)},
                "wte": {"embedding": (50, 8)},
                "relative_position_bias_table": (9, 2),
                "patch_embedding": {"weight": (8, 3, 2, 2)},
                "logits": {"kernel": (8, 50)},
            },
            {"patch_embedding/weight", "logits/kernel"},
            {"patch_embedding/weight": (1, 12, 8)},
        ),
    ],
    ids=["haiku", "equinox", "own", "positions"],
)
def test_trees_without_axes(params: Any, decaying: set[str], muon: dict[str, Sides]) -> None:
    arrays = jax.tree.map(np.zeros, params, is_leaf=lambda leaf: isinstance(leaf, tuple))
    found = tree.flatten(parameters.describe(arrays))
    assert {path for path, each in found.items() if each.decays} == decaying
    assert {path: sides for path, each in found.items() if (sides := sides_found(each))} == muon


def test_the_rules_of_the_user_come_first() -> None:
    params = jax.tree.map(
        np.zeros, {"bias": (4,), "kernel": (3, 4)}, is_leaf=lambda x: type(x) is tuple
    )
    rules = (("bias", 0.5), (".*", 0.0))
    assert match_table(AdamW(decay=rules), params) == [
        ("bias", "(4,)", "1", "0.5"),
        ("kernel", "(3, 4)", "1", "0"),
    ]


@pytest.mark.parametrize("name", ["vit_ti4", "decoder_tiny", "convnet1d"])
def test_a_step_decays_kernels_and_nothing_else(name: str) -> None:
    """Through the training step: with decay and without it, only kernels differ."""
    model, inputs = shrunk(name)
    if inputs.dtype == jnp.int32:
        task: Any = tasks.NextToken()
        batch = {"tokens": jnp.arange(2 * 9, dtype=jnp.int32).reshape(2, 9) % 7}
    else:
        task = tasks.Classification()
        images = jax.random.normal(jax.random.key(1), inputs.shape)
        batch = {"image": images, "label": jnp.arange(2, dtype=jnp.int32)}
    optimizer = AdamW(0.1, weight_decay=0.5)
    state = init_state(model, task, optimizer, batch)
    step = make_train_step(model, task, optimizer)
    found = []
    for strength in (0.0, 0.5):
        numbers = state.hyper | {"optimizer.weight_decay": jnp.float32(strength)}
        # copied, for the step takes over what it is given
        start = jax.tree.map(jnp.copy, dataclasses.replace(state, hyper=numbers))
        found.append(tree.flatten(step(start, batch)[0].params))
    plain, decayed = found
    changed = {path for path in plain if not np.array_equal(plain[path], decayed[path])}
    # ViT's head begins at zero, where there is nothing to decay.
    assert changed == {path for path in plain if path.endswith("/kernel")} - (
        {"head/kernel"} if name == "vit_ti4" else set()
    )


def test_trust_ratios_are_for_kernels() -> None:
    """LAMB turns a kernel's step into a share of its norm; the biases of attention, of two dims,
    keep Adam's, which is the rate at first."""
    bias, kernel = (2, 4), (8, 2, 4)
    params = {"query": {"bias": jnp.full(bias, 5.0), "kernel": jnp.full(kernel, 5.0)}}
    transform = Lamb(0.1).transform(params, 0.1)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = transform.update(ones, transform.init(params), params)
    np.testing.assert_allclose(updates["query"]["bias"], -0.1, rtol=1e-3)
    np.testing.assert_allclose(updates["query"]["kernel"], -0.5, rtol=1e-3)


def test_muon_trains_every_convolution_of_a_signal() -> None:
    """Three kernels of convnet1d are Muon's in a training state, and the head is Adam's."""
    model, inputs = shrunk("convnet1d")
    batch = {"image": jnp.zeros(inputs.shape), "label": jnp.zeros(2, jnp.int32)}
    state = init_state(model, tasks.Classification(), Muon(), batch)
    paths = tree.flatten(state.opt_state)
    muon = {path.split("/mu/")[1] for path in paths if "/muon/" in path and "/mu/" in path}
    assert muon == {"stage0_0_conv/kernel", "stage1_0_conv/kernel"}
    assert any(path.endswith("/nu/head/kernel") for path in paths)


def test_muon_takes_and_leaves_what_patterns_say() -> None:
    params = jax.tree.map(
        np.zeros,
        {"embed": (6, 5), "body": {"kernel": (5, 5), "bias": (5,)}, "head": {"kernel": (5, 3)}},
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )

    def taken(optimizer: Muon) -> set[str]:
        paths = tree.flatten(optimizer.transform(params, 0.1).init(params))
        return {path.split("/mu/")[1] for path in paths if "/muon/" in path and "/mu/" in path}

    assert taken(Muon()) == {"body/kernel"}
    assert taken(Muon(muon=("head", "embed"))) == {"body/kernel", "head/kernel", "embed"}
    assert taken(Muon(muon=("head", "embed"), adam=("embed", "body"))) == {"head/kernel"}
    with pytest.raises(ValueError, match=r"--optimizer.muon=body: body/bias of shape \(5,\) is no"):
        Muon(muon=("body",)).transform(params, 0.1)


@pytest.mark.parametrize(
    "name",
    [
        *("cls_token", "query_tokens", "register_tokens", "mask_token", "latents", "prompt"),
        *("codebook", "wte", "wpe", "pos_embedding", "A_log", "relative_position_bias_table"),
    ],
)
def test_learnt_vectors_by_the_names_that_others_give_them(name: str) -> None:
    """Arrays of two dims and more that are looked up or put beside the inputs: no product takes
    them, so nothing about them is a matrix."""
    (found,) = jax.tree.leaves(parameters.describe({name: jnp.zeros((4, 8))}, None))
    assert not found.decays and not found.hidden, found
