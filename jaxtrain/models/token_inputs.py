"""What enters a model of tokens: the tokens, which segment each is of, and its place.

Dims: B batch, T tokens of a sequence, V rows of a table, D model width.
"""

import jax
import jax.numpy as jnp

from jaxtrain.errors import UserError


def check(kind: str, tokens: jax.Array, **marks: jax.Array | None) -> None:
    """`UserError` unless tokens, and each mark of them that is given, are (batch, length) of
    integers.

    >>> check("Encoder", jnp.zeros((1, 2), jnp.int32), positions=jnp.zeros((2,), jnp.int32))
    Traceback (most recent call last):
    ...
    jaxtrain.errors.UserError: Encoder: positions int32[2] are not integers of the tokens' shape [1,
    2]; give one for each token
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(
            f"{kind}: input {tokens.dtype}{list(tokens.shape)} is not (batch, length) of"
            " integers; give it tokens"
        )
    for name, mark in marks.items():
        if mark is None:
            continue
        # a mask of padding tells segments 0 and 1 apart
        whole = jnp.issubdtype(mark.dtype, jnp.integer) or (name, mark.dtype) == ("segments", bool)
        if mark.shape != tokens.shape or not whole:
            raise UserError(
                f"{kind}: {name} {mark.dtype}{list(mark.shape)} are not integers of the tokens'"
                f" shape {list(tokens.shape)}; give one for each token"
            )


def places_of(
    tokens_BT: jax.Array, segments_BT: jax.Array | None, positions_BT: jax.Array | None
) -> jax.Array:
    """The position of each token: (T,) where all rows have the same, otherwise (B, T); 0 at
    padding whose given position is negative."""
    if positions_BT is not None:
        return jnp.maximum(positions_BT, 0)
    if segments_BT is not None:
        return places_in_segments(segments_BT)
    return jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)


def places_in_segments(segments_BT: jax.Array) -> jax.Array:
    """How many tokens of the same segment stand before each, int32 (B, T), whatever stands between
    them: padding, or other segments.

    >>> places_in_segments(jnp.array([[1, 1, 0, 1, 2, 2, 0]])).tolist()
    [[0, 1, 0, 2, 0, 1, 1]]
    """
    places_BT = jnp.broadcast_to(
        jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None], segments_BT.shape
    )
    # sorted, the tokens of a segment are neighbours and keep their order
    sorted_BT, order_BT = jax.lax.sort((segments_BT, places_BT), num_keys=1)
    new_BT = jnp.pad(sorted_BT[:, 1:] != sorted_BT[:, :-1], ((0, 0), (1, 0)))
    starts_BT = jax.lax.cummax(jnp.where(new_BT, places_BT, 0), axis=1)
    return jax.lax.sort((order_BT, places_BT - starts_BT), num_keys=1)[1]


def nan_where_placeless(
    x_BTD: jax.Array, segments_BT: jax.Array | None, positions_BT: jax.Array | None
) -> jax.Array:
    """The stream, nan at tokens whose given position is negative; at padding (segment 0) it says
    nothing.

    >>> x, positions = jnp.ones((1, 3, 1)), jnp.array([[-1, -1, 0]])
    >>> nan_where_placeless(x, jnp.array([[0, 1, 1]]), positions).ravel().tolist()
    [1.0, nan, 1.0]
    """
    if positions_BT is None:
        return x_BTD
    wrong_BT = positions_BT < 0
    if segments_BT is not None:
        wrong_BT &= segments_BT > 0
    return jnp.where(wrong_BT[..., None], jnp.asarray(jnp.nan, x_BTD.dtype), x_BTD)


def look_up(embed_VD: jax.Array, tokens_BT: jax.Array, vocabulary: int | None = None) -> jax.Array:
    """The row of each token, in the dtype of the table; nan for a token that has none, or is not
    among the first `vocabulary`.

    >>> look_up(jnp.eye(3), jnp.array([[2, 0]])).tolist()
    [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]

    A gather, whose gradient is a scatter: on two CPU cores 0.2 ms, there and back, where a one-hot
    product took 2.1 ms (64 x 64 tokens of 16, width 64; larger vocabularies are worse for the
    product). It is summed in float32: in bfloat16 4,096 equal numbers made a tenth of their sum.
    """
    wide = jnp.promote_types(embed_VD.dtype, jnp.float32)
    rows = embed_VD.shape[0]
    tokens_BT = tokens_BT.astype(jnp.int32)  # `rows` does not fit into 8 or 16 bits
    known_BT = (tokens_BT >= 0) & (tokens_BT < (vocabulary or rows))
    # -1 is a common padding, and to `take` the last row
    tokens_BT = jnp.where(known_BT, tokens_BT, rows)
    return jnp.take(
        embed_VD.astype(wide), tokens_BT, axis=0, mode="fill", fill_value=jnp.nan
    ).astype(embed_VD.dtype)
