"""Softmax attention, with every mask that the families need; by cuDNN on GPUs where that is right.

cuDNN's fused attention never writes the T x S products of queries and keys to memory.
`why_not_fused` says which calls it cannot answer; these print one line where their program is
lowered for an NVIDIA card. All else is computed as it stands here, softmax in float32. What decides
is the platform that a program is lowered for, so one compiled for a card that is not here is the
one that runs there.

Dims: B batch, T queries, S keys, N heads, M heads of keys and values, R rows of queries that share
keys (those of N / M heads), K head width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxtrain import messages
from jaxtrain.errors import UserError

MASKED = -0.7 * float(np.finfo(np.float32).max)
"""The product of a key that is not seen: its weight is 0, and sums with it stay finite."""
WIDEST_HEAD = 128
"""Of cuDNN's, on every card; on Hopper some kernels take 256."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a call asks for, besides its arrays."""

    causal: bool
    window: int
    """0: all."""
    cap: float
    scale: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Marks:
    """What is known of each query, and of each key where that is something else."""

    segments_BT: jax.Array | None = None
    segments_BS: jax.Array | None = None
    positions_BT: jax.Array | None = None
    positions_BS: jax.Array | None = None


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
    """What each query finds (B, T, N, K): the mean of the values that it sees, weighted by the
    softmax of its products with their keys.

    >>> attention(*[jnp.ones((1, 2, 1, 4))] * 3, causal=True).shape
    (1, 2, 1, 4)

    M divides N: as many queries in a row share a key. A key is seen if it has the query's segment
    (B, T) and (B, S), which is not 0; if `causal`, it stands no later; and with a `window`, less
    than that many places away. Places count from 0, or are `positions` (B, T) and `key_positions`
    (B, S), where -1 is an empty slot. Keys have the segments and positions of the queries unless
    they are given their own. Products are multiplied by `scale` (1 / sqrt(K) by default), and with
    a `cap` go through cap * tanh(x / cap). A query that sees nothing finds 0, and has no gradient.
    """
    key_segments = None if key_segments is segments else key_segments
    key_positions = None if key_positions is positions else key_positions
    marks = Marks(segments, key_segments, positions, key_positions)
    _check(query_BTNK, key_BSMK, marks)
    placed = positions is not None or key_positions is not None
    if not placed and window >= max(query_BTNK.shape[1], key_BSMK.shape[1]):
        window = 0
    # not head_dim**-0.5, which differs in the last bit
    scale = float(1.0 / np.sqrt(query_BTNK.shape[-1])) if scale is None else scale
    rule = Rule(causal, window, cap, scale)
    by_platform: dict[str, Any] = {}
    if query_BTNK.dtype == jnp.float16:
        by_platform["cpu"] = functools.partial(_in_float32, rule)
    reason = why_not_fused(rule, query_BTNK, key_BSMK, marks)
    if reason is None:
        by_platform["cuda"] = functools.partial(_fused, rule)
    elif reason:
        query_BTNK = _said.bind(query_BTNK, reason=reason)
    plain = functools.partial(_plain, rule)
    arrays = (query_BTNK, key_BSMK, value_BSMK, marks)
    if not by_platform:
        return plain(*arrays)
    return jax.lax.platform_dependent(*arrays, **by_platform, default=plain)


def why_not_fused(rule: Rule, query_BTNK: Any, key_BSMK: Any, marks: Marks) -> str | None:
    """Why cuDNN cannot compute this, and what would change that; None if it can, "" if there is
    nothing to say.

    >>> query = jax.ShapeDtypeStruct((1, 8, 2, 64), "float32")
    >>> why_not_fused(Rule(True, 0, 0.0, 0.125), query, query, Marks())
    'it computes in bfloat16, and this is float32; --precision=bf16 is'
    """
    length, head_dim = query_BTNK.shape[1], query_BTNK.shape[-1]
    if marks.positions_BT is not None or marks.positions_BS is not None:
        return ""  # decoding: the scores of a few queries are small
    if query_BTNK.dtype != jnp.bfloat16:
        # Cards that lack bfloat16 lack the kernel too, so float16 says nothing of the card.
        return f"it computes in bfloat16, and this is {query_BTNK.dtype}; --precision=bf16 is"
    if rule.cap:
        return f"it has no soft cap, and this one is {rule.cap:g}; a model without one can use it"
    if rule.window and not rule.causal:
        return "its windows look back only; a causal model, or one without a window, can use it"
    if rule.causal and length != key_BSMK.shape[1]:
        return (
            f"causal, it wants as many queries as keys, not {length} and {key_BSMK.shape[1]};"
            " without `causal` any numbers will do"
        )
    if head_dim % 8 or head_dim > WIDEST_HEAD:
        return (
            f"heads are {head_dim} wide, not a multiple of 8 up to {WIDEST_HEAD}; choose another"
            " width or number of heads"
        )
    if marks.segments_BT is not None and (length % 2 or key_BSMK.shape[1] % 2):
        return f"with segments it wants even lengths, not {length}; add or take away one token"
    return _why_no_cudnn()


@functools.cache
def _why_no_cudnn() -> str | None:
    """What jax lacks to trace cuDNN's attention in this process, or None."""
    array = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(
            functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
            array,
            array,
            array,
        )
    except (RuntimeError, NotImplementedError) as error:
        said = messages.one_line(str(error)).rstrip(".")
        return f"jax cannot use it here ({said}); pip install 'jax[cuda12]' brings cuDNN"
    return None


def _fused(
    rule: Rule,
    query_BTNK: jax.Array,
    key_BSMK: jax.Array,
    value_BSMK: jax.Array,
    marks: Marks,
) -> jax.Array:
    """cuDNN's fused attention; segments are a mask that all heads share, two bytes a number."""
    window = (rule.window - 1, 0) if rule.window else None
    mask_B1TS = None
    if marks.segments_BT is not None:
        # its windows beside a mask are untried, so the mask holds the window, too
        seen_BTS = _seen(rule, marks, query_BTNK.shape[1], key_BSMK.shape[1])
        assert seen_BTS is not None
        mask_B1TS, window = seen_BTS[:, None], None
    found_BTNK = jax.nn.dot_product_attention(
        query_BTNK,
        key_BSMK,
        value_BSMK,
        mask=mask_B1TS,
        is_causal=rule.causal,
        scale=rule.scale,
        local_window_size=window,
        implementation="cudnn",
    )
    return _zero_where_blind(found_BTNK, rule, marks, key_BSMK.shape[1])


def _plain(
    rule: Rule,
    query_BTNK: jax.Array,
    key_BSMK: jax.Array,
    value_BSMK: jax.Array,
    marks: Marks,
) -> jax.Array:
    """The sum as it is defined, all products at once.

    Queries that share a key are rows of one product, so the products have no dim of length 1 of
    their own (XLA's CPU reductions crawl over it), and the weights' sum divides what was found, not
    the weights: then the gradient has no sum over T x S either.
    """
    batch, queries, heads, _ = query_BTNK.shape
    keys, shared = key_BSMK.shape[1:3]
    seen_BTS = _seen(rule, marks, queries, keys)
    wide = jnp.promote_types(query_BTNK.dtype, jnp.float32)

    def product(dims: str, left: jax.Array, right: jax.Array) -> jax.Array:
        # Said outright: with the default the gradient's products have other dtypes (jax issue
        # 24047).
        algorithm = {
            "bfloat16": jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
            "float16": jax.lax.DotAlgorithmPreset.F16_F16_F32,
        }.get(jnp.promote_types(left.dtype, right.dtype).name)
        return jnp.einsum(dims, left, right, precision=algorithm, preferred_element_type=wide)

    rows_BMRK = query_BTNK.transpose(0, 2, 1, 3).reshape(batch, shared, -1, query_BTNK.shape[-1])
    products_BMRS = product("bmrk,bsmk->bmrs", rows_BMRK, key_BSMK) * jnp.asarray(rule.scale, wide)
    if rule.cap:
        products_BMRS = rule.cap * jnp.tanh(products_BMRS / rule.cap)
    products_BNTS = products_BMRS.reshape(batch, heads, queries, keys)
    if seen_BTS is not None:
        products_BNTS = jnp.where(seen_BTS[:, None], products_BNTS, MASKED)
    largest_BNT1 = jnp.max(products_BNTS, axis=-1, keepdims=True)
    weights_BNTS = jnp.exp(products_BNTS - jax.lax.stop_gradient(largest_BNT1))
    weights_BMRS = weights_BNTS.astype(value_BSMK.dtype).reshape(batch, shared, -1, keys)
    found_BMRK = product("bmrs,bsmk->bmrk", weights_BMRS, value_BSMK)
    found_BNTK = found_BMRK.reshape(batch, heads, queries, -1)
    found_BNTK /= jnp.sum(weights_BNTS, axis=-1, keepdims=True)
    found_BTNK = found_BNTK.transpose(0, 2, 1, 3).astype(value_BSMK.dtype)
    return _zero_where_blind(found_BTNK, rule, marks, keys)


def _in_float32(rule: Rule, query: Any, key: Any, value: Any, marks: Marks) -> jax.Array:
    """XLA's CPU backend has no float16 product of the kind that is asked for here."""
    wide = jnp.float32
    found = _plain(rule, query.astype(wide), key.astype(wide), value.astype(wide), marks)
    return found.astype(query.dtype)


def _seen(rule: Rule, marks: Marks, queries: int, keys: int) -> jax.Array | None:
    """Which keys each query sees, (B, T, S) or (1, T, S); None for all."""
    places, key_places = jnp.arange(queries)[None], jnp.arange(keys)[None]
    if marks.positions_BT is not None:
        places = marks.positions_BT
        key_places = places if marks.positions_BS is None else marks.positions_BS
    elif marks.positions_BS is not None:
        key_places = marks.positions_BS
    places, key_places = places[:, :, None], key_places[:, None, :]
    rules = []
    if rule.causal:
        rules.append(places >= key_places)
    if rule.window:
        rules.append(places - key_places < rule.window)
    if rule.window and not rule.causal:
        rules.append(key_places - places < rule.window)
    if marks.positions_BT is not None or marks.positions_BS is not None:
        rules.append(key_places >= 0)
    if marks.segments_BT is not None:
        of_keys = marks.segments_BT if marks.segments_BS is None else marks.segments_BS
        segments_BT1 = marks.segments_BT[:, :, None]
        rules.append((segments_BT1 == of_keys[:, None, :]) & (segments_BT1 > 0))
    return functools.reduce(jnp.logical_and, rules) if rules else None


def _zero_where_blind(found_BTNK: jax.Array, rule: Rule, marks: Marks, keys: int) -> jax.Array:
    """What was found, 0 for a query that sees nothing: of equal products softmax makes a mean."""
    queries = found_BTNK.shape[1]
    others = (marks.segments_BS, marks.positions_BT, marks.positions_BS)
    if queries == keys and all(other is None for other in others):  # each query sees itself
        if marks.segments_BT is None:
            return found_BTNK
        sees_BT = marks.segments_BT > 0
    else:
        seen_BTS = _seen(rule, marks, queries, keys)
        if seen_BTS is None:
            return found_BTNK
        sees_BT = seen_BTS.any(axis=-1)
    return jnp.where(sees_BT[:, :, None, None], found_BTNK, jnp.zeros((), found_BTNK.dtype))


def _check(query_BTNK: Any, key_BSMK: Any, marks: Marks) -> None:
    heads, shared = query_BTNK.shape[2], key_BSMK.shape[2]
    if heads % shared:
        raise UserError(
            f"attention: {heads} heads of queries cannot share {shared} of keys; their number must"
            f" be a divisor: {messages.nearest_divisors(heads, shared)}"
        )
    if marks.segments_BS is not None and marks.segments_BT is None:
        raise UserError("attention: key_segments without segments; give those of the queries, too")
    queries, keys = query_BTNK.shape[1], key_BSMK.shape[1]
    for name, array, length in (
        ("segments", marks.segments_BT, queries),
        (
            "key_segments",
            marks.segments_BT if marks.segments_BS is None else marks.segments_BS,
            keys,
        ),
        ("positions", marks.positions_BT, queries),
        (
            "key_positions",
            marks.positions_BT if marks.positions_BS is None else marks.positions_BS,
            keys,
        ),
    ):
        if array is not None and (array.ndim != 2 or array.shape[1] != length):
            raise UserError(
                f"attention: {name} of shape {list(array.shape)} do not mark {length} places; give"
                f" (batch, {length})"
            )


def _say(reason: str) -> None:
    messages.warn(
        f"attention without cuDNN's fused kernel is slower and takes more memory: {reason}"
    )


_say_once = functools.cache(_say)


def _lower_with_a_word(_: Any, array: Any, *, reason: str) -> list[Any]:
    _say_once(reason)
    return [array]


# The identity, with one line where a program that has it is lowered for an NVIDIA card. Only the
# lowering knows the platform.
_said = Primitive("attention_is_not_fused")
_said.def_impl(lambda array, *, reason: array)
_said.def_abstract_eval(lambda array, *, reason: array)
ad.primitive_jvps[_said] = lambda primals, tangents, *, reason: (
    _said.bind(*primals, reason=reason),
    tangents[0],
)
batching.defvectorized(_said)
mlir.register_lowering(_said, lambda _, array, *, reason: [array])
mlir.register_lowering(_said, _lower_with_a_word, platform="cuda")
