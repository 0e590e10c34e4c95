"""The decoder: a NumPy forward pass in float64, causality, rotations, dtypes of every product,
GPT-2's count, and marks between blocks.

Dims: B batch, T tokens, V vocabulary, D width, N heads, K head width.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import adapters
from jaxtrain.errors import UserError
from jaxtrain.models import layers, rotary, token_inputs, transformer
from jaxtrain.models.convnet import ConvNet
from jaxtrain.models.encoder import Encoder
from jaxtrain.models.resnet import ResNet
from jaxtrain.models.transformer import Transformer
from jaxtrain.models.vit import ViT
from jaxtrain.tasks import NextToken

TINY = Transformer(vocabulary=11, width=16, depth=2, heads=2, max_length=12)
KINDS = {"learned, tied": TINY, "rotary, untied": TINY.clone(positions="rotary", tied=False)}
TOKENS_BT = np.random.default_rng(0).integers(0, 11, (3, 8)).astype(np.int32)


def shapes_of(model: Any, inputs: Any = TOKENS_BT) -> Any:
    """The abstract parameters of a model."""
    return jax.eval_shape(adapters.functions(model).init, jax.random.key(0), inputs)["params"]


def random_params(model: Any) -> Any:
    """Numbers for every parameter, biases and scales included."""
    generator = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: (0.3 * generator.normal(size=leaf.shape)).astype(np.float32), shapes_of(model)
    )


def apply(model: Any, params: Any, tokens: Any, **options: Any) -> jax.Array:
    """The logits."""
    return model.apply({"params": params}, tokens, **options)


run = jax.jit(apply, static_argnums=0, static_argnames="train")


# --- numbers
# --------------------------------------------------------------------------------------------------


def numpy_norm(x: np.ndarray, params: Any) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6) * params["scale"]
        + params["bias"]
    )


def numpy_rotary(x_BTK: np.ndarray) -> np.ndarray:
    """Rotary positions as complex numbers."""
    pairs = x_BTK.shape[-1] // 2
    angles = np.arange(x_BTK.shape[1])[:, None] * (10000.0 ** -(np.arange(pairs) / pairs))[None]
    numbers = (x_BTK[..., :pairs] + 1j * x_BTK[..., pairs:]) * np.exp(1j * angles)[None]
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def numpy_attention(x_BTD: np.ndarray, params: Any, heads: int, rotary: bool) -> np.ndarray:
    """Head by head, and place by place only over what is not later."""
    out_BTD = np.zeros_like(x_BTD) + params["out"]["bias"]
    for head in range(heads):
        query, key, value = (
            x_BTD @ params[name]["kernel"][:, head] + params[name]["bias"][head]
            for name in ("query", "key", "value")
        )
        if rotary:
            query, key = numpy_rotary(query), numpy_rotary(key)
        for place in range(x_BTD.shape[1]):
            scores = np.einsum("bk,bsk->bs", query[:, place], key[:, : place + 1]) / math.sqrt(
                query.shape[-1]
            )
            share = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            out_BTD[:, place] += (
                np.einsum("bs,bsk->bk", share, value[:, : place + 1])
                @ params["out"]["kernel"][head]
            )
    return out_BTD


def numpy_forward(model: Transformer, params: Any, tokens_BT: np.ndarray) -> np.ndarray:
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    rotary = model.positions == "rotary"
    x_BTD = params["embed"][tokens_BT]
    x_BTD = x_BTD if rotary else x_BTD + params["positions"][None, : tokens_BT.shape[1]]
    for index in range(model.depth):
        block = params[f"block{index}"]
        x_BTD = x_BTD + numpy_attention(
            numpy_norm(x_BTD, block["norm0"]), block["attention"], model.heads, rotary
        )
        hidden = (
            numpy_norm(x_BTD, block["norm1"]) @ block["mlp_in"]["kernel"] + block["mlp_in"]["bias"]
        )
        hidden = (
            hidden / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        )
        x_BTD = x_BTD + hidden @ block["mlp_out"]["kernel"] + block["mlp_out"]["bias"]
    x_BTD = numpy_norm(x_BTD, params["norm"])
    return x_BTD @ (params["embed"].T if model.tied else params["head"]["kernel"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_is_that_of_numpy_in_float64(kind: str) -> None:
    model, params = KINDS[kind], random_params(KINDS[kind])
    logits_BTV = run(model, params, TOKENS_BT)
    assert logits_BTV.shape == (3, 8, 11) and logits_BTV.dtype == jnp.float32
    np.testing.assert_allclose(
        logits_BTV, numpy_forward(model, params, TOKENS_BT), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_changes_nothing_before_it(kind: str) -> None:
    model, params = KINDS[kind], random_params(KINDS[kind])
    before = run(model, params, TOKENS_BT)
    for place in (0, 3, 7):
        other = TOKENS_BT.copy()
        other[:, place] = (other[:, place] + 1) % 11
        after = run(model, params, other)
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        assert np.all(np.any(np.asarray(after != before)[:, place:], axis=-1))


def test_a_shorter_sequence_is_the_beginning_of_a_longer_one() -> None:
    params = random_params(TINY)
    np.testing.assert_allclose(
        run(TINY, params, TOKENS_BT[:, :5]),
        run(TINY, params, TOKENS_BT)[:, :5],
        rtol=1e-5,
        atol=1e-5,
    )


def test_rotary_scores_depend_on_the_distance_only() -> None:
    generator = np.random.default_rng(0)
    query, key = (
        np.tile(generator.normal(size=(1, 1, 2, 8)), (1, 20, 1, 1)).astype(np.float32)
        for _ in range(2)
    )
    waves = rotary.waves(jnp.arange(20), rotary.Rates(), 8)
    scores_NTS = np.einsum(
        "btnk,bsnk->nts",
        *(np.asarray(rotary.rotated(x, waves), np.float64) for x in (query, key)),
    )
    for distance in range(-19, 20):
        diagonals = np.diagonal(scores_NTS, distance, axis1=1, axis2=2)
        np.testing.assert_allclose(
            diagonals, np.broadcast_to(diagonals[:, :1], diagonals.shape), rtol=1e-4, atol=1e-4
        )
    assert np.ptp(scores_NTS[0, 0]) > 0.1


def test_without_positions_the_past_has_no_order() -> None:
    """What learned positions are for: set to zero, the last place sees a bag of tokens."""
    params = random_params(TINY)
    reversed_BT = np.concatenate([TOKENS_BT[:, 6::-1], TOKENS_BT[:, 7:]], axis=1)
    plain = params | {"positions": np.zeros_like(params["positions"])}
    one = TINY.clone(depth=1)
    np.testing.assert_allclose(
        run(one, plain, reversed_BT)[:, -1], run(one, plain, TOKENS_BT)[:, -1], rtol=1e-3, atol=1e-4
    )
    assert not np.allclose(
        run(one, params, reversed_BT)[:, -1], run(one, params, TOKENS_BT)[:, -1], atol=1e-2
    )


def test_dropout_acts_in_training_only() -> None:
    model, params = TINY.clone(dropout=0.5), random_params(TINY)
    plain = run(TINY, params, TOKENS_BT)
    np.testing.assert_array_equal(run(model, params, TOKENS_BT), plain)
    assert not np.allclose(
        run(model, params, TOKENS_BT, train=True, rngs={"dropout": jax.random.key(0)}), plain
    )


# --- parameters
# --------------------------------------------------------------------------------------------------


def count_of(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_by_a_formula(kind: str) -> None:
    model = KINDS[kind]
    vocabulary, width = model.vocabulary, model.width
    places = model.max_length * width if model.positions == "learned" else 0
    head = 0 if model.tied else width * vocabulary
    assert (
        count_of(shapes_of(model))
        == vocabulary * width
        + places
        + model.depth * (12 * width**2 + 13 * width)
        + 2 * width
        + head
    )


def test_gpt2_is_a_setting() -> None:
    gpt2 = Transformer(vocabulary=50257, width=768, depth=12, heads=12, max_length=1024)
    assert count_of(shapes_of(gpt2)) == 124_439_808


@pytest.mark.parametrize(
    ("name", "count"),
    [("decoder_tiny", 169_728), ("decoder_small", 932_608), ("decoder_medium", 11_065_344)],
)
def test_sizes_by_name_are_those_of_the_guide(name: str, count: int) -> None:
    assert count_of(shapes_of(transformer.NAMES[name])) == count


def test_a_tied_head_has_no_kernel_and_learns_by_the_embedding() -> None:
    params = random_params(TINY)
    assert "head" not in params and "head" in random_params(KINDS["rotary, untied"])
    unseen = 10 - TOKENS_BT % 10  # never 0
    gradient = jax.grad(lambda params: jax.nn.log_softmax(run(TINY, params, unseen)).sum())(params)[
        "embed"
    ]
    assert np.any(gradient[0] != 0), "a token that is not in the input is still an output"


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_names_its_axes(kind: str) -> None:
    model = KINDS[kind]
    axes = adapters.logical_axes(model, TOKENS_BT)["params"]
    words = {"vocab", "embed", "mlp", "heads", "head_dim", "position", None}

    def check(leaf: Any, names: tuple[str | None, ...]) -> None:
        named = [name for name in names if name]
        assert (
            len(names) == leaf.ndim
            and set(names) <= words
            and named
            and len(set(named)) == len(named)
        ), names

    jax.tree.map(check, shapes_of(model), axes)
    assert axes["embed"] == ("vocab", "embed")
    for name in ("query", "key", "value"):
        assert axes["block0"]["attention"][name] == {
            "kernel": ("embed", "heads", "head_dim"),
            "bias": ("heads", "head_dim"),
        }
    assert model.tied or axes["head"]["kernel"] == ("embed", "vocab")


ERRORS = [
    (
        TINY,
        (2, 13),
        "int32",
        (
            r"Transformer.max_length=12: the input has 13 tokens; make it 13, or choose"
            r" positions=rotary"
        ),
    ),
    (
        TINY,
        (2, 8, 8, 1),
        "int32",
        (
            r"Transformer: input int32\[2, 8, 8, 1\] is not \(batch, length\) of integers; give it"
            r" tokens"
        ),
    ),
    (
        TINY,
        (2, 8),
        "float32",
        r"Transformer: input float32\[2, 8\] is not \(batch, length\) of integers",
    ),
    (
        TINY.clone(heads=3),
        (2, 8),
        "int32",
        r"Transformer.heads=3: does not divide width=16; choose a divisor of it",
    ),
    (
        TINY.clone(heads=16, positions="rotary"),
        (2, 8),
        "int32",
        r"Transformer.heads=16: heads of 1 are odd, and positions=rotary rotates pairs",
    ),
    (
        TINY.clone(heads=4, key_heads=3),
        (2, 8),
        "int32",
        r"Transformer.key_heads=3: does not divide heads=4; choose a divisor of it",
    ),
    (
        TINY.clone(pattern=("window",)),
        (2, 8),
        "int32",
        r"Transformer.window=0: the pattern has window blocks; say how many places they see",
    ),
    (
        TINY.clone(positions="rotary", rotary_scaling="yarn"),
        (2, 8),
        "int32",
        r"Transformer.rotary_length=0: rotary_scaling=yarn needs the length that the model was",
    ),
    (
        TINY.clone(padded_vocabulary=8),
        (2, 8),
        "int32",
        r"Transformer.padded_vocabulary=8: less than vocabulary=11; make it at least that, or 0",
    ),
]


@pytest.mark.parametrize(("model", "shape", "dtype", "message"), ERRORS)
def test_what_does_not_fit_is_named(
    model: Any, shape: tuple[int, ...], dtype: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shapes_of(model, jax.ShapeDtypeStruct(shape, dtype))


def test_a_loop_carries_parameters_only() -> None:
    looped = TINY.clone(scan=True)

    def call(params: Any) -> Any:
        return looped.apply({"params": params, "kept": {"count": jnp.zeros(())}}, TOKENS_BT)

    line = (
        "Transformer.scan=True: blocks keep 'kept' besides their parameters, which a loop does not"
    )
    with pytest.raises(UserError, match=line):
        jax.eval_shape(call, shapes_of(looped))


def test_a_token_beyond_the_vocabulary_is_no_number() -> None:
    tokens = TOKENS_BT.copy()
    tokens[1, 2] = 11
    logits = np.asarray(run(TINY, random_params(TINY), tokens))
    assert np.isnan(logits[1, 2:]).all() and np.isfinite(logits[[0, 2]]).all()
    assert jnp.isnan(token_inputs.look_up(jnp.eye(3), jnp.array([[-1]]))).all(), (
        "padding is not the last token"
    )


# --- dtypes
# --------------------------------------------------------------------------------------------------


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those of its parts included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_float32_leaks_into_a_product(
    kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU: the CPU has no such product of halves, so there attention is computed in float32.
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays)
    )
    model = KINDS[kind].clone(dropout=0.1)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes_of(model))
    batch = {"tokens": np.concatenate([TOKENS_BT, TOKENS_BT[:, :1]], axis=1)}

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = apply(
            model,
            params,
            NextToken().inputs(batch),
            train=True,
            rngs={"dropout": jax.random.key(0)},
        )
        return NextToken().loss(logits, batch)["loss"][0], logits

    products = [
        each
        for each in equations(jax.make_jaxpr(jax.grad(loss, has_aux=True))(params).jaxpr)
        if each.primitive.name == "dot_general"
    ]
    leaks = [
        str(each)
        for each in products
        if {str(operand.aval.dtype) for operand in each.invars} != {dtype}
    ]
    # Attention goes back from float32 through both of its products, and asks for products of halves
    # by an algorithm of that name.
    algorithm = {"bfloat16": "BF16_BF16_F32", "float16": "F16_F16_F32"}[dtype]
    assert len(products) > 20 and not [leak for leak in leaks if algorithm not in leak], "\n".join(
        leaks
    )
    assert len(leaks) == 4 * model.depth
    gradients, logits = jax.eval_shape(jax.grad(loss, has_aux=True), params)
    assert {leaf.dtype for leaf in jax.tree.leaves((gradients, logits))} == {jnp.dtype(dtype)}


def test_bfloat16_is_near_float32() -> None:
    params = random_params(TINY)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    exact = numpy_forward(TINY, low, TOKENS_BT)
    error = np.asarray(run(TINY, low, TOKENS_BT), np.float64) - exact
    assert np.sqrt(np.square(error).mean() / np.square(exact).mean()) < 0.02


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_many_places_are_summed_in_float32(dtype: str) -> None:
    """4,096 halves added one by one to a half stop growing long before their sum."""
    tokens_BT, x_BTD = np.zeros((64, 64), np.int32), np.zeros((64, 64, 4), dtype)
    dense = layers.Dense(4, kernel_init=layers.ZEROS)
    params = {"kernel": np.zeros((4, 4), dtype), "bias": np.zeros(4, dtype)}

    @jax.jit
    def gradients(table: Any, params: Any) -> Any:
        looked_up = jax.grad(
            lambda table: (
                (token_inputs.look_up(table, tokens_BT) * jnp.asarray(0.01, dtype))
                .astype("float32")
                .sum()
            )
        )(table)
        dense_ = jax.grad(
            lambda p: (
                (dense.apply({"params": p}, x_BTD) * jnp.asarray(0.01, dtype))
                .astype("float32")
                .sum()
            )
        )(params)
        return looked_up[0], dense_["bias"]

    for gradient in gradients(np.zeros((2, 4), dtype), params):
        np.testing.assert_allclose(np.asarray(gradient, np.float64), 40.96, rtol=0.01)


def test_products_of_rows_are_those_of_einsum() -> None:
    generator = np.random.default_rng(0)
    x, kernel, back = (
        generator.normal(size=shape).astype(np.float32)
        for shape in ((2, 3, 4), (4, 5, 2), (2, 3, 5, 2))
    )
    y, pull = jax.vjp(layers.dot_general_by_rows, x, kernel)
    np.testing.assert_allclose(y, np.einsum("bld,dnk->blnk", x, kernel), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        pull(back),
        (np.einsum("blnk,dnk->bld", back, kernel), np.einsum("bld,blnk->dnk", x, back)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


# --- marks between blocks
# --------------------------------------------------------------------------------------------------

MARKED = {
    "transformer": (TINY, np.zeros((2, 8), np.int32), 2),
    "vit": (ViT(patch=4, width=16, depth=3, heads=2), np.ones((2, 8, 8, 1), np.float32), 3),
    "resnet": (ResNet(stages=(2, 1), width=4, stem_width=4), np.ones((2, 8, 8, 1), np.float32), 3),
    "convnet": (ConvNet(widths=(4, 8), depth=2), np.ones((2, 8, 8, 1), np.float32), 2),
}


@pytest.mark.parametrize("name", MARKED)
def test_every_block_is_marked(name: str) -> None:
    model, inputs, blocks = MARKED[name]
    net = adapters.functions(model)
    variables = jax.eval_shape(net.init, jax.random.key(0), inputs)
    program = jax.make_jaxpr(lambda variables: net.apply(variables, inputs, train=True)[0])(
        variables
    )
    names = Counter(
        each.params["name"] for each in equations(program.jaxpr) if each.primitive.name == "name"
    )
    assert names == {"block": blocks}


def test_marks_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    params = random_params(TINY)

    def numbers() -> list[np.ndarray]:
        loss = jax.jit(
            jax.value_and_grad(lambda params: jnp.sin(apply(TINY, params, TOKENS_BT)).sum())
        )
        return [np.asarray(leaf) for leaf in jax.tree.leaves(loss(params))]

    marked = numbers()
    monkeypatch.setattr(layers, "block_end", lambda x: x)
    for one, other in zip(marked, numbers(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rematerialisation_by_blocks_keeps_one_stream_a_block() -> None:
    params, blocks_only = (
        random_params(TINY),
        jax.checkpoint_policies.save_only_these_names("block"),
    )

    def loss(params: Any) -> jax.Array:
        return jnp.sin(apply(TINY, params, TOKENS_BT)).sum()

    def kept(function: Any) -> list[tuple[int, ...]]:
        shapes = [
            leaf.shape
            for leaf in jax.tree.leaves(
                jax.eval_shape(lambda params: jax.vjp(function, params)[1], params)
            )
        ]
        return [shape for shape in shapes if len(shape) > 2 and shape[:2] == TOKENS_BT.shape]

    again = jax.checkpoint(loss, policy=blocks_only)
    assert kept(again) == [(3, 8, 16)] * TINY.depth and len(kept(loss)) > 10
    gradients = jax.jit(lambda params: (jax.grad(loss)(params), jax.grad(again)(params)))(params)
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_sizes_by_name_are_known_to_the_package() -> None:
    from jaxtrain import models

    assert transformer.NAMES.keys() <= models.NAMES.keys() and models.Transformer is Transformer
    assert all(model.width % model.heads == 0 for model in transformer.NAMES.values())


@pytest.mark.parametrize(("dtype", "rows"), [(np.uint8, 256), (np.uint16, 65536)])
def test_narrow_ids_read_their_own_rows(dtype: Any, rows: int) -> None:
    """The table's size does not fit into the ids' own dtype."""
    table = jnp.arange(rows, dtype=jnp.float32)[:, None]
    ids_BT = np.array([[rows - 1, 0, 7]], dtype)
    assert token_inputs.look_up(table, jnp.asarray(ids_BT)).ravel().tolist() == [rows - 1, 0, 7]


# --- positions that are counted
# --------------------------------------------------------------------------------------------------


def test_a_position_is_how_many_tokens_of_the_segment_stand_before() -> None:
    fixed = [
        [1, 1, 2, 2, 3, 3, 0, 0],  # packed
        [0, 0, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 1, 1, 0],  # a prompt and an answer, each padded
        [3, 3, 0, 5, 5, 3, 3, 0],  # attention sees all four of 3, too
    ]
    drawn = np.random.default_rng(0).integers(0, 4, (20, 8))
    segments_BT = np.concatenate([fixed, drawn]).astype(np.int32)
    wanted_BT = [
        [sum(earlier == segment for earlier in row[:place]) for place, segment in enumerate(row)]
        for row in segments_BT.tolist()
    ]
    found_BT = jax.jit(token_inputs.places_in_segments)(segments_BT)
    np.testing.assert_array_equal(found_BT, wanted_BT)
    assert found_BT.dtype == jnp.int32
    mask_BT = segments_BT > 0
    np.testing.assert_array_equal(
        token_inputs.places_in_segments(jnp.asarray(mask_BT)),
        token_inputs.places_in_segments(mask_BT.astype(np.int32)),
    )


# --- given positions
# --------------------------------------------------------------------------------------------------


PLACED = {**KINDS, "encoder": Encoder(vocabulary=11, width=16, depth=2, heads=2, max_length=12)}


@pytest.mark.parametrize("kind", PLACED)
def test_a_negative_position_says_nothing_at_padding_and_makes_a_token_nan(kind: str) -> None:
    model = PLACED[kind]
    params = random_params(model)
    segments_BT = np.array([[0, 0, 1, 1, 1, 1, 1, 0]] * 3, np.int32)
    counted_BT = np.array([[0, 0, 0, 1, 2, 3, 4, 0]] * 3, np.int32)
    padded_BT = np.where(segments_BT, counted_BT, -1)
    real = segments_BT > 0

    def at(positions: np.ndarray, segments: np.ndarray | None = segments_BT) -> np.ndarray:
        options = {} if segments is None else {"segments": segments}
        return np.asarray(run(model, params, TOKENS_BT, positions=positions, **options))

    wanted = run(model, params, TOKENS_BT, segments=segments_BT)
    np.testing.assert_array_equal(at(padded_BT)[real], np.asarray(wanted)[real])
    wrong_BT = np.where(np.arange(8) == 3, -1, counted_BT)
    assert np.isnan(at(wrong_BT)[:, 3]).all()
    # without segments nothing is padding
    assert np.isnan(at(padded_BT, None)[:, :2]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_given_positions_are_the_places_that_a_model_sees(kind: str) -> None:
    model, params = KINDS[kind], random_params(KINDS[kind])
    places_BT = np.broadcast_to(np.arange(8, dtype=np.int32), (3, 8))
    found = run(model, params, TOKENS_BT, positions=places_BT)
    np.testing.assert_allclose(found, run(model, params, TOKENS_BT), rtol=1e-5, atol=1e-5)
    later = run(model, params, TOKENS_BT, positions=places_BT + 4)
    same = np.allclose(later, found, rtol=1e-4, atol=1e-4)
    assert same == (model.positions == "rotary")  # only distances count there


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("positions", np.arange(8, dtype=np.int32)),
        ("positions", np.zeros((3, 8), np.float32)),
        ("segments", np.ones((3, 7), np.int32)),
        ("segments", np.ones((1, 8), np.int32)),
    ],
)
@pytest.mark.parametrize("kind", ["learned, tied", "encoder"])
def test_marks_that_are_not_one_integer_a_token_are_refused(
    kind: str, name: str, mark: np.ndarray
) -> None:
    model = PLACED[kind]
    line = (
        f"{type(model).__name__}: {name} {mark.dtype}{list(mark.shape)} are not integers of the"
        " tokens' shape [3, 8]; give one for each token"
    )
    with pytest.raises(UserError, match=re.escape(line)):
        apply(model, shapes_of(model), TOKENS_BT, **{name: jnp.asarray(mark)})
    right = jnp.zeros(TOKENS_BT.shape, jnp.int32)
    jax.eval_shape(
        lambda params: apply(model, params, TOKENS_BT, **{name: right}), shapes_of(model)
    )
