"""Softmax attention, with every mask that the families need.

Dims: B batch, T queries, S keys, N heads, M heads of keys and values, K head width, G queries that
share a key.
"""

import jax
import jax.numpy as jnp


def attention(
    query_BTNK: jax.Array,
    key_BSMK: jax.Array,
    value_BSMK: jax.Array,
    *,
    causal: bool = False,
    window: int = 0,
    cap: float = 0.0,
    scale: float | None = None,
    segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
) -> jax.Array:
    """What each query finds (B, T, N, K).

    >>> attention(*[jnp.ones((1, 2, 1, 4))] * 3).shape
    (1, 2, 1, 4)
    """
    masked = window or segments is not None or positions is not None
    if not (masked or cap):
        return _plain(query_BTNK, key_BSMK, value_BSMK, causal=causal, scale=scale)
    shared = query_BTNK.shape[2] // key_BSMK.shape[2]
    key, value = (jnp.repeat(array, shared, axis=2) for array in (key_BSMK, value_BSMK))
    factor = query_BTNK.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("btnk,bsnk->bnts", query_BTNK, key).astype(jnp.float32) * factor
    if cap:
        scores = cap * jnp.tanh(scores / cap)
    places = jnp.arange(query_BTNK.shape[1])[None] if positions is None else positions
    key_places = jnp.arange(key.shape[1])[None] if key_positions is None else key_positions
    apart = places[:, :, None] - key_places[:, None, :]
    seen = jnp.broadcast_to(key_places[:, None, :] >= 0, apart.shape)
    if causal:
        seen &= apart >= 0
    if window:
        seen &= apart < window
        seen &= apart > -window
    if segments is not None and key_segments is not None:
        seen &= segments[:, :, None] == key_segments[:, None, :]
        seen &= (segments > 0)[:, :, None]
    seen = seen[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    weights = jnp.where(seen, weights, 0.0).astype(value.dtype)
    return jnp.einsum("bnts,bsnk->btnk", weights, value)


def _plain(
    query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool, scale: float | None
) -> jax.Array:
    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, is_causal=causal, scale=scale)

    def widened(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return plain(*(array.astype(jnp.float32) for array in (query, key, value))).astype(
            query.dtype
        )

    if query.dtype != jnp.float16:
        return plain(query, key, value)
    return jax.lax.platform_dependent(query, key, value, cpu=widened, default=plain)
