"""The encoder: segments that never see one another, padding on either side, heads, and mistakes
said by name. tests/test_golden_logits.py holds its numbers against `transformers`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers_oracle as oracle

from jaxtrain import adapters
from jaxtrain.errors import UserError
from jaxtrain.models.encoder import Encoder, sentence_embeddings
from jaxtrain.weights import config

TINY = Encoder(vocabulary=61, width=16, depth=1, heads=2, max_length=12, head="states", pooler=True)
TOKENS_BT = oracle.tokens(2, 6)


def params_of(model: Any) -> Any:
    made = jax.eval_shape(adapters.functions(model).init, jax.random.key(0), TOKENS_BT)["params"]
    generator = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: (0.3 * generator.normal(size=leaf.shape)).astype(np.float32), made
    )


@functools.partial(jax.jit, static_argnums=0)
def apply(model: Any, params: Any, tokens: Any, **options: Any) -> jax.Array:
    return model.apply({"params": params}, tokens, **options)


def test_packed_sentences_are_as_alone() -> None:
    params = params_of(TINY)
    row_BT = np.concatenate([TOKENS_BT[0, :4], TOKENS_BT[1, :5], [0, 0]])[None]
    segments_BT = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]])
    packed = apply(TINY, params, row_BT, segments=segments_BT)
    for tokens, part in ((TOKENS_BT[:1, :4], packed[:, :4]), (TOKENS_BT[1:, :5], packed[:, 4:9])):
        np.testing.assert_allclose(part, apply(TINY, params, tokens), atol=2e-6)


def test_padding_on_the_left_is_not_pooled() -> None:
    model = TINY.clone(head="classes", num_classes=3)
    params = params_of(model)
    padded_BT = np.pad(TOKENS_BT, ((0, 0), (3, 0)))
    found = apply(model, params, padded_BT, segments=(padded_BT > 0) * 1)
    np.testing.assert_allclose(found, apply(model, params, TOKENS_BT), atol=2e-6)


def test_the_mean_of_all_that_is_no_padding_enters_the_classes() -> None:
    model = TINY.clone(head="classes", num_classes=3, pool="mean", pooler=False)
    params = params_of(model)
    padded_BT = np.pad(TOKENS_BT, ((0, 0), (3, 2)))
    found = apply(model, params, padded_BT, segments=(padded_BT > 0) * 1)
    body = {name: leaf for name, leaf in params.items() if name != "head"}
    states = np.asarray(apply(model.clone(head="states"), body, TOKENS_BT)).astype(np.float64)
    want = states.mean(1) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(found, want, atol=2e-5)
    np.testing.assert_allclose(apply(model, params, TOKENS_BT), want, atol=2e-5)
    with pytest.raises(UserError, match=r"which cannot say pool"):
        config.write(model)


def test_a_place_sees_what_comes_after_it() -> None:
    params = params_of(TINY)
    changed = TOKENS_BT.copy()
    changed[:, -1] = 3
    assert np.abs(apply(TINY, params, changed) - apply(TINY, params, TOKENS_BT))[:, 0].max() > 1e-3


def test_sentence_embeddings_are_means_of_length_one() -> None:
    states = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    states[1, 2:] = np.nan  # padding means nothing
    real = np.array([[1, 1, 1, 1], [2, 2, 0, 0]])
    found = np.asarray(sentence_embeddings(jnp.asarray(states), jnp.asarray(real)))
    for row, count in ((0, 4), (1, 2)):
        mean = states[row, :count].astype(np.float64).mean(0)
        np.testing.assert_allclose(found[row], mean / np.linalg.norm(mean), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "tokens", "said"),
    [
        (TINY.clone(heads=3), TOKENS_BT, "Encoder.heads=3: does not divide width=16"),
        (TINY, np.zeros((1, 13), np.int32), "Encoder.max_length=12: the input has 13 tokens"),
        (TINY, np.zeros((1, 4), np.float32), "is not (batch, length) of integers"),
        (TINY.clone(pool="mean"), TOKENS_BT, "Encoder.pool=mean: a pooler sees the first token's"),
        (TINY.clone(head="pooled", pooler=False), TOKENS_BT, "there is no pooler; set pooler=True"),
    ],
)
def test_mistakes_are_said_by_name(model: Any, tokens: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        jax.eval_shape(adapters.functions(model).init, jax.random.key(0), tokens)
    assert said in str(raised.value)
