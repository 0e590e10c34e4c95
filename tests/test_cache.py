"""The cache: with it a decoder says what it says without, for the settings of every family; rings
keep what a window sees and no more; what has no slot is nan, not silently forgotten.

Dims: B batch, T tokens, V vocabulary, S slots.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxtrain.errors import UserError
from jaxtrain.inference.exact import exactly
from jaxtrain.models import Transformer, cache

VOCABULARY, LENGTH, CAPACITY = 23, 200, 208
MODERN: dict[str, Any] = {"norm": "rms", "gated": True, "bias": "none", "positions": "rotary"}
LLAMA = Transformer(
    vocabulary=VOCABULARY,
    width=16,
    depth=2,
    heads=4,
    key_heads=2,
    activation="silu",
    rotary_scaling="llama3",
    rotary_factor=8.0,
    rotary_length=32,
    **MODERN,
)
FAMILIES = {
    "gpt2": Transformer(vocabulary=VOCABULARY, width=16, depth=2, heads=2, max_length=CAPACITY),
    "llama3": LLAMA,
    "smollm3": LLAMA.clone(pattern=("full", "unrotated"), rotary_scaling="none"),
    "mistral": LLAMA.clone(pattern=("window",), window=6, rotary_scaling="none"),
    "qwen2": LLAMA.clone(bias="qkv", rotary_scaling="none", tied=False),
    "qwen3": LLAMA.clone(qk_norm="head", head_dim=6, rotary_scaling="none"),
    "gemma2": Transformer(
        vocabulary=VOCABULARY,
        width=16,
        depth=2,
        heads=2,
        key_heads=1,
        head_dim=6,
        norm_offset=True,
        arrangement="sandwich",
        pattern=("window", "full"),
        window=7,
        attention_cap=2.0,
        logit_cap=3.0,
        attention_scale=0.3,
        embed_scale=True,
        **MODERN,
    ),
    "gemma3": Transformer(
        vocabulary=VOCABULARY,
        width=16,
        depth=3,
        heads=2,
        norm_offset=True,
        arrangement="sandwich",
        qk_norm="head",
        pattern=("window", "window", "full"),
        window=5,
        window_rotary_base=100.0,
        embed_scale=True,
        **MODERN,
    ),
    "olmo2": LLAMA.clone(arrangement="output", qk_norm="all", rotary_scaling="none"),
}
"""Small, and no setting that a family has at the default that another has."""
QUICK = ("gemma3",)
TOKENS_BT = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH)).astype(np.int32)


def random_params(model: Transformer) -> Any:
    """Numbers for every parameter, biases and scales included."""
    generator = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return jax.tree.map(
        lambda leaf: (0.3 * generator.normal(size=leaf.shape)).astype(np.float32),
        nn.meta.unbox(shapes),
    )


@jax.jit(static_argnums=0)
def whole(model: Transformer, params: Any, tokens: Any, segments: Any = None) -> jax.Array:
    """The logits of one pass over all tokens."""
    return model.apply({"params": params}, tokens, segments=segments)


@jax.jit(static_argnums=0)
def beside(model: Transformer, params: Any, tokens: Any, held: Any, segments: Any = None) -> Any:
    """The logits of the next tokens, and the cache with them."""
    return model.apply({"params": params}, tokens, segments=segments, cache=held)


@pytest.mark.parametrize(
    "family",
    [
        family if family in QUICK else pytest.param(family, marks=pytest.mark.slow)
        for family in FAMILIES
    ],
)
def test_with_a_cache_the_logits_of_200_tokens_are_those_of_one_pass(family: str) -> None:
    model, params = FAMILIES[family], random_params(FAMILIES[family])
    held = cache.empty(model, 2, CAPACITY)
    found = []
    for start, stop in [(0, 20), *((place, place + 1) for place in range(20, LENGTH))]:
        logits, held = beside(model, params, TOKENS_BT[:, start:stop], held)
        found.append(logits)
    wanted = whole(model, params, TOKENS_BT)
    found = jnp.concatenate(found, axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.argmax(-1), wanted.argmax(-1))
    np.testing.assert_array_equal(held.length_B, [LENGTH, LENGTH])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_with_sums_in_one_order_the_logits_are_the_same_to_the_bit(family: str) -> None:
    """One pass over two texts, one over two of them packed in a row, and beside a cache with rings:
    row by row, with a beginning of the text at once, then token by token."""
    model, params = FAMILIES[family], random_params(FAMILIES[family])
    wanted = jax.jit(exactly(lambda params, tokens: whole(model, params, tokens)))(
        params, TOKENS_BT
    )
    step = jax.jit(exactly(lambda params, tokens, held: beside(model, params, tokens, held)))
    held, found = cache.empty(model, 1, CAPACITY, ordered=True), []
    for start, stop in [(0, 20), *((place, place + 1) for place in range(20, LENGTH))]:
        logits, held = step(params, TOKENS_BT[:1, start:stop], held)
        found.append(logits)
    np.testing.assert_array_equal(jnp.concatenate(found, axis=1), wanted[:1])
    packed = np.concatenate([TOKENS_BT[1:, :33], TOKENS_BT[:1, :90]], axis=1)
    segments = np.repeat([[1, 2, 0]], [33, 90, 7], axis=1)
    packed = np.pad(packed, ((0, 0), (0, 7)))
    apply = exactly(lambda params, tokens, segments: whole(model, params, tokens, segments))
    found = jax.jit(apply)(params, packed, segments)[0]
    np.testing.assert_array_equal(found[:33], wanted[1, :33])
    np.testing.assert_array_equal(found[33:123], wanted[0, :90])


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_unequal_lengths_are_each_as_if_alone(side: str) -> None:
    """Padding on either side, in pieces longer than the ring and shorter, and rows that pause."""
    model, params = FAMILIES["gemma3"], random_params(FAMILIES["gemma3"])
    texts = [TOKENS_BT[0, :30], TOKENS_BT[1, :13]]
    held = cache.empty(model, 2, 40)
    found: list[list[np.ndarray]] = [[], []]
    done = [0, 0]
    for counts in ([9, 2], [3, 3], [0, 7], [1, 0], [9, 1], [8, 0]):
        tokens, segments = np.zeros((2, 9), np.int32), np.zeros((2, 9), np.int32)
        for row, count in enumerate(counts):
            places = slice(9 - count, 9) if side == "left" else slice(0, count)
            tokens[row, places] = texts[row][done[row] : done[row] + count]
            segments[row, places] = 1
            done[row] += count
        logits, held = beside(model, params, tokens, held, segments)
        for row in range(2):
            found[row].append(np.asarray(logits)[row, segments[row] > 0])
    np.testing.assert_array_equal(held.length_B, [30, 13])
    for row, text in enumerate(texts):
        alone = whole(model, params, text[None])[0]
        np.testing.assert_allclose(np.concatenate(found[row]), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_documents_packed_in_one_row_are_each_as_beside_a_cache() -> None:
    model, params = FAMILIES["gemma2"], random_params(FAMILIES["gemma2"])
    segments = np.repeat([[1, 2, 0]], [11, 14, 5], axis=1)
    packed = whole(model, params, TOKENS_BT[:1, :30], segments)[0]
    for places in (slice(0, 11), slice(11, 25)):
        held, found = cache.empty(model, 1, 40), []
        for place in range(places.start, places.stop):
            logits, held = beside(model, params, TOKENS_BT[:1, place : place + 1], held)
            found.append(logits[0, 0])
        np.testing.assert_allclose(jnp.stack(found), packed[places], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_padding_between_tokens_of_a_segment_is_as_if_it_were_not_there(family: str) -> None:
    """A prompt and an answer, each padded to its own length, in one pass and beside a cache."""
    model, params = FAMILIES[family], random_params(FAMILIES[family])
    segments = np.repeat([[1, 0, 1, 0]], [7, 4, 9, 3], axis=1)
    real = segments[0] > 0
    found = whole(model, params, TOKENS_BT[:1, :23], segments)[0]
    held = cache.empty(model, 1, 40)
    logits, _ = beside(model, params, TOKENS_BT[:1, :23], held, segments)
    alone = whole(model, params, TOKENS_BT[:1, :23][:, real])[0]
    np.testing.assert_allclose(found[real], alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits[0, real], alone, rtol=1e-5, atol=1e-5)


def test_a_window_block_keeps_its_window_only() -> None:
    held = cache.empty(FAMILIES["gemma3"], batch=4, capacity=64, dtype=jnp.bfloat16)
    assert [block.positions_BS.shape for block in held.blocks] == [(4, 5), (4, 5), (4, 64)]
    assert [block.ring for block in held.blocks] == [True, True, False]
    assert held.blocks[0].key_BSMK.shape == (4, 5, 2, 8)
    assert held.blocks[0].key_BSMK.dtype == jnp.bfloat16
    # where all fits, nothing is a ring
    assert not any(block.ring for block in cache.empty(FAMILIES["gemma3"], 1, 5).blocks)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("mistral", marks=pytest.mark.slow)])
def test_more_tokens_than_a_cache_has_slots_are_nan(family: str) -> None:
    model, params = FAMILIES[family], random_params(FAMILIES[family])
    held = cache.empty(model, 2, 4)
    segments = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    logits, held = beside(model, params, TOKENS_BT[:, :5], held, segments)
    assert np.isnan(logits[0, 4]).all() and np.isfinite(logits[1, :3]).all()
    logits, held = beside(model, params, TOKENS_BT[:, 5:6], held)
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()
    logits, held = beside(model, params, TOKENS_BT[:, 6:7], held)
    assert np.isnan(logits).all()


def test_a_cache_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"a cache of 0 rows of 4 tokens: must be at least 1 of"):
        cache.empty(LLAMA, 0, 4)
    with pytest.raises(
        UserError, match=r"a cache of 300 tokens: the model has max_length=208 learned positions"
    ):
        cache.empty(FAMILIES["gpt2"], 1, 300)
