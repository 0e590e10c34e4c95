"""Texts as vectors: a sentence encoder, such as MiniLM, put to use.

B: texts at once, T: tokens of a row, D: width
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from jaxtrain import messages, tree
from jaxtrain.data.text.protocol import Tokenizer
from jaxtrain.errors import UserError
from jaxtrain.models.encoder import Encoder, sentence_embeddings

SHORTEST = 16
"""Tokens of the shortest rows; the next are twice as long, and so on."""


def embed(
    model: Encoder,
    params: tree.PyTree,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    pool: Literal["mean", "first"] = "mean",
    batch_size: int = 32,
) -> np.ndarray:
    """A vector of length 1 for each text, float32 (N, D).

    >>> from jaxtrain.data.text.tokenizers import Bytes
    >>> model = Encoder(vocabulary=257, width=8, depth=1, heads=2, max_length=32, head="states")
    >>> params = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    >>> embed(model, params, Bytes(), ["a cat", "the other cat"]).shape
    (2, 8)

    Each text gets what the tokenizer puts around one (`[CLS]` and `[SEP]`), and its vector is the
    mean of the states of its tokens, as MiniLM's, or with `pool="first"` the state of the first, as
    BGE's: a model's folder says which in `1_Pooling/config.json`. Texts of about one length are
    computed together, so that there are few programs and little padding.
    `UserError` for a text that is longer than the model sees, or that has no token.
    """
    if isinstance(texts, str):
        raise UserError("embed: texts is one text; give a list, e.g. [text]")
    if not isinstance(model, Encoder) or model.head != "states":
        head = getattr(model, "head", None)
        what = type(model).__name__ + (f" with head={head}" if isinstance(head, str) else "")
        raise UserError(
            f"embed: the model is {what}, which gives no states; give an Encoder, as"
            ' model.clone(head="states")'
        )
    if pool not in ("mean", "first"):
        raise UserError(f"embed: pool={messages.shown(pool)}: valid: mean, first")
    if batch_size < 1:
        raise UserError(f"embed: batch_size={batch_size}: must be 1 or more; 32 is the default")
    rows = [_ids(model, tokenizer, number, text) for number, text in enumerate(texts)]
    found = np.zeros((len(rows), model.width), np.float32)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        count_B = _at_least(len(chosen), 1, batch_size)
        length_T = _at_least(len(rows[chosen[-1]]), SHORTEST, model.max_length)
        tokens_BT = np.zeros((count_B, length_T), np.int32)
        segments_BT = np.zeros_like(tokens_BT)
        for place, number in enumerate(chosen):
            row = rows[number]
            tokens_BT[place, : len(row)], segments_BT[place, : len(row)] = row, 1
        vectors_BD = _vectors(model, pool, params, tokens_BT, segments_BT)
        found[chosen] = np.asarray(vectors_BD)[: len(chosen)]
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _vectors(
    model: Encoder,
    pool: Literal["mean", "first"],
    params: tree.PyTree,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
) -> jax.Array:
    states_BTD = model.apply({"params": params}, tokens_BT, segments=segments_BT)
    assert isinstance(states_BTD, jax.Array)
    return sentence_embeddings(states_BTD, segments_BT, pool)


def _ids(model: Encoder, tokenizer: Tokenizer, number: int, text: str) -> list[int]:
    """What the model sees of a text; `UserError`, with its number, if that cannot be."""
    ids = [*tokenizer.bos, *tokenizer.encode(text).tolist(), *tokenizer.eos[:1]]
    if not ids:
        raise UserError(f"embed: text {number} has no token; give it a word, or leave it out")
    if len(ids) > model.max_length:
        raise UserError(
            f"embed: text {number} has {len(ids)} tokens, the model sees"
            f" {model.max_length}; give its parts as texts of their own"
        )
    if max(ids) >= model.vocabulary:
        raise UserError(
            f"embed: text {number} has token {max(ids)}, the model knows 0..{model.vocabulary - 1};"
            " give the model's own tokenizer"
        )
    return ids


def _at_least(count: int, least: int, most: int) -> int:
    """The first of `least`, twice that, and so on, that is no less than a count; `most` at most.

    >>> _at_least(17, 16, 512), _at_least(300, 16, 384)
    (32, 384)
    """
    while least < count:
        least *= 2
    return min(least, most)
