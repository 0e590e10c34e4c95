"""Attention against sums by hand in float64: every mask with every other, and the gradients; and
what decides whether cuDNN computes it.

Dims: B batch, T queries, S keys, N heads, M heads of keys, K head width.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import messages
from jaxtrain.models import attention as module
from jaxtrain.models.attention import Marks, Rule, attention, why_not_fused

B, T, N, K = 2, 7, 4, 8
RANDOM = np.random.default_rng(0)
QUERY, GIVEN = (RANDOM.normal(size=(B, T, N, K)) for _ in range(2))
KEYS, VALUES = ({heads: RANDOM.normal(size=(B, T, heads, K)) for heads in (1, 2, 4)} for _ in "kv")
# Padding on the left, between and on the right; a segment number that comes twice.
SEGMENTS = np.array([[0, 1, 1, 2, 2, 2, 0], [3, 3, 0, 5, 5, 3, 3]], np.int32)
# What a cache holds: a ring, an empty slot, and padding among the queries.
POSITIONS = np.array([[4, 5, 6, 7, 8, 9, -1], [0, 1, 2, 3, 4, 5, 6]], np.int32)
KEY_POSITIONS = np.array([[8, 9, 2, 3, 4, 5, 6], [0, 1, 2, -1, 4, 5, -1]], np.int32)


def by_hand(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    given: np.ndarray,
    *,
    causal: bool = False,
    window: int = 0,
    cap: float = 0.0,
    scale: float | None = None,
    segments: np.ndarray | None = None,
    key_segments: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    key_positions: np.ndarray | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The sums, query by query, and the gradients of `(found * given).sum()`."""
    found = np.zeros_like(query)
    of_query, of_key, of_value = np.zeros_like(query), np.zeros_like(key), np.zeros_like(value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key_segments = segments if key_segments is None else key_segments
    key_positions = positions if key_positions is None else key_positions
    for b, t, n in itertools.product(*map(range, query.shape[:3])):
        m = n * key.shape[2] // query.shape[2]
        place = t if positions is None else positions[b, t]
        sees = []
        for s in range(key.shape[1]):
            key_place = s if key_positions is None else key_positions[b, s]
            apart = place - key_place
            sees.append(
                key_place >= 0
                and (not causal or apart >= 0)
                and (not window or abs(apart) < window)
                and (
                    segments is None
                    or (segments[b, t] > 0 and segments[b, t] == key_segments[b, s])
                )
            )
        sees = np.array(sees)
        if not sees.any():
            continue
        products = scale * key[b, sees, m] @ query[b, t, n]
        bent = cap * np.tanh(products / cap) if cap else products
        weights = np.exp(bent - bent.max())
        weights /= weights.sum()
        found[b, t, n] = weights @ value[b, sees, m]
        of_value[b, sees, m] += weights[:, None] * given[b, t, n]
        of_weights = value[b, sees, m] @ given[b, t, n]
        of_bent = weights * (of_weights - weights @ of_weights)
        of_products = scale * (of_bent * (1 - (bent / cap) ** 2) if cap else of_bent)
        of_query[b, t, n] = of_products @ key[b, sees, m]
        of_key[b, sees, m] += of_products[:, None] * query[b, t, n]
    return found, (of_query, of_key, of_value)


def by_us(
    query: Any, key: Any, value: Any, given: Any, *, dtype: Any = jnp.float32, **options: Any
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The same, as it is trained."""
    options = {
        name: jnp.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    arrays = [jnp.asarray(array, dtype) for array in (query, key, value)]
    found, pull = jax.vjp(lambda *arrays: attention(*arrays, **options), *arrays)
    assert found.dtype == dtype
    return np.asarray(found, np.float64), [
        np.asarray(gradient, np.float64) for gradient in pull(jnp.asarray(given, dtype))
    ]


def compare(found: Any, expected: Any, close: float) -> None:
    for ours, theirs in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=close, atol=close)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("marks", ["none", "segments", "positions", "both"])
def test_every_mask_with_every_other(causal: bool, marks: str) -> None:
    own: dict[str, Any] = {}
    if marks in ("segments", "both"):
        own["segments"] = SEGMENTS
    if marks in ("positions", "both"):
        own |= {"positions": POSITIONS, "key_positions": KEY_POSITIONS}
    for window, cap, scale, heads in itertools.product((0, 3), (0.0, 1.5), (None, 0.7), (4, 2)):
        options = {"causal": causal, "window": window, "cap": cap, "scale": scale} | own
        arrays = (QUERY, KEYS[heads], VALUES[heads], GIVEN)
        compare(by_us(*arrays, **options), by_hand(*arrays, **options), 2e-6)


def test_one_key_for_all_and_other_numbers_of_keys_than_queries() -> None:
    key, value = KEYS[1][:, :5], VALUES[1][:, :5]
    for options in (
        {},
        {"causal": True, "window": 2},  # the last query sees no key
        {"segments": SEGMENTS, "key_segments": SEGMENTS[:, 2:]},
        {"causal": True, "positions": POSITIONS, "key_positions": KEY_POSITIONS[:, 1:6]},
        {"causal": True, "key_positions": KEY_POSITIONS[:, 1:6]},
    ):
        arrays = (QUERY, key, value, GIVEN)
        compare(by_us(*arrays, **options), by_hand(*arrays, **options), 2e-6)


@pytest.mark.parametrize(("dtype", "close"), [(jnp.bfloat16, 3e-2), (jnp.float16, 4e-3)])
def test_narrow_numbers_have_a_wide_softmax(dtype: Any, close: float) -> None:
    """Compiled, for so it is trained; products of 300 have weights that a narrow exp would lose."""
    options = {"causal": True, "window": 4, "segments": SEGMENTS, "scale": 3.0}
    rounded = [
        np.asarray(jnp.asarray(array, dtype), np.float64)
        for array in (QUERY, KEYS[2], VALUES[2], GIVEN)
    ]
    found = jax.jit(lambda *arrays: attention(*arrays, **options))(
        *(jnp.asarray(array, dtype) for array in rounded[:3])
    )
    expected, _ = by_hand(*rounded, **options)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=close, atol=close)


def test_what_sees_nothing_finds_zero_and_moves_nothing() -> None:
    for options in (
        {"segments": SEGMENTS * 0},
        {"segments": SEGMENTS, "key_segments": SEGMENTS + 10},
        {"positions": POSITIONS, "key_positions": POSITIONS * 0 - 1},
        {"causal": True, "positions": POSITIONS, "key_positions": POSITIONS + 100},
    ):
        found, gradients = by_us(1e4 * QUERY, KEYS[2], VALUES[2], GIVEN, **options)
        assert not found.any() and not any(gradient.any() for gradient in gradients)


def other_segments_move(run: Callable[..., Any], *, dtype: Any) -> bool:
    """Whether a segment's bits depend on the numbers of others: forward, or in the gradients."""
    segments = jnp.asarray([[1] * 3 + [2] * 4 + [0], [4] * 5 + [7] * 3], jnp.int32)
    shape = (*segments.shape, 2, K)
    arrays = [jnp.asarray(RANDOM.normal(size=shape), dtype) for _ in range(4)]

    def bits(arrays: list[jax.Array]) -> list[jax.Array]:
        found, pull = jax.vjp(lambda *three: run(*three, segments=segments), *arrays[:3])
        return [found, *pull(arrays[3])]

    compiled = jax.jit(bits)
    before = compiled(arrays)
    for number in (2, 4):
        inside = (segments == number)[:, :, None, None]
        changed = compiled([jnp.where(inside, array, 100 + 7 * array) for array in arrays])
        for old, new in zip(before, changed, strict=True):
            if not bool(jnp.array_equal(jnp.where(inside, old, 0), jnp.where(inside, new, 0))):
                return True
    return False


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_packed_segments_never_see_one_another(dtype: Any) -> None:
    for options in ({"causal": True}, {"window": 3, "cap": 2.0}):
        assert not other_segments_move(
            lambda *arrays, options=options, **more: attention(*arrays, **options, **more),
            dtype=dtype,
        ), options


def test_the_test_of_packed_segments_finds_a_leak() -> None:
    def leaking(query: Any, key: Any, value: Any, segments: Any) -> jax.Array:
        return attention(query, key, value, causal=True, segments=(segments > 0) * 1)

    assert other_segments_move(leaking, dtype=jnp.float32)


CAUSAL = Rule(causal=True, window=0, cap=0.0, scale=0.1)


def array_of(length: int = 8, head_dim: int = 64, dtype: str = "bfloat16") -> Any:
    return jax.ShapeDtypeStruct((2, length, 4, head_dim), dtype)


@pytest.mark.parametrize(
    ("rule", "shape", "marks", "said"),
    [
        (CAUSAL, {"dtype": "float32"}, Marks(), "it computes in bfloat16, and this is float32"),
        (CAUSAL, {"dtype": "float16"}, Marks(), "it computes in bfloat16, and this is float16"),
        (Rule(True, 0, 50.0, 0.1), {}, Marks(), "it has no soft cap, and this one is 50"),
        (Rule(False, 4, 0.0, 0.1), {}, Marks(), "its windows look back only"),
        (CAUSAL, {"head_dim": 100}, Marks(), "heads are 100 wide, not a multiple of 8 up to 128"),
        (CAUSAL, {"head_dim": 256}, Marks(), "heads are 256 wide, not a multiple of 8 up to 128"),
        (CAUSAL, {"length": 7}, Marks(SEGMENTS), "with segments it wants even lengths, not 7"),
    ],
)
def test_what_cudnn_cannot_do_is_said(rule: Rule, shape: Any, marks: Marks, said: str) -> None:
    reason = why_not_fused(rule, array_of(**shape), array_of(**shape), marks)
    assert reason is not None and reason.startswith(said)
    assert ";" in reason, "what to change is missing"


def test_what_cudnn_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_why_no_cudnn", lambda: None)
    even = Marks(jnp.ones((2, 8), jnp.int32))
    for rule in (CAUSAL, Rule(False, 0, 0.0, 0.1), Rule(True, 4, 0.0, 0.1)):
        for marks in (Marks(), even):
            assert why_not_fused(rule, array_of(), array_of(), marks) is None
    assert "as many queries as keys, not 8 and 6" in str(
        why_not_fused(CAUSAL, array_of(8), array_of(6), Marks())
    )
    # a few queries over a cache: nothing to be said
    assert why_not_fused(CAUSAL, array_of(1), array_of(6), Marks(positions_BT=POSITIONS)) == ""


def test_the_line_is_said_once_and_where_it_runs_on_a_gpu_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(messages, "warn", lines.append)
    module._say_once.cache_clear()
    query, small = jnp.zeros((1, 4, 2, 8)), jnp.zeros((1, 4, 2, 8))

    def twice(query: jax.Array) -> jax.Array:
        return attention(attention(query, small, small), small, small, causal=True).sum()

    for platform, count in (("cpu", 0), ("tpu", 0), ("cuda", 1)):
        jax.jit(jax.grad(twice)).trace(query).lower(lowering_platforms=(platform,))
        assert len(lines) == count, platform
    (line,) = lines
    assert line == (
        "attention without cuDNN's fused kernel is slower and takes more memory: it computes in"
        " bfloat16, and this is float32; --precision=bf16 is"
    )
    module._say_once.cache_clear()


def test_the_mark_of_the_line_changes_no_program() -> None:
    query = jnp.asarray(QUERY, jnp.float32)
    both = jax.vmap(lambda row: attention(row[None], row[None], row[None])[0])(query)
    np.testing.assert_array_equal(both, attention(query, query, query))
    text = jax.jit(lambda query: attention(query, query, query)).lower(query).as_text()
    assert "attention_is_not_fused" not in text


def test_words_for_heads_and_marks_that_do_not_fit() -> None:
    array = jnp.zeros((1, 4, 6, 8))
    with pytest.raises(
        ValueError,
        match=(
            r"^attention: 6 heads of queries cannot share 4 of keys; their number must be a"
            r" divisor: 3 or 6$"
        ),
    ):
        attention(array, array[:, :, :4], array[:, :, :4])
    with pytest.raises(
        ValueError,
        match=(
            r"^attention: key_segments of shape \[1, 4\] do not mark 3 places; give \(batch, 3\)$"
        ),
    ):
        attention(array, array[:, :3], array[:, :3], segments=jnp.ones((1, 4), jnp.int32))
    with pytest.raises(
        ValueError,
        match=r"^attention: key_segments without segments; give those of the queries, too$",
    ):
        attention(array, array, array, key_segments=jnp.ones((1, 4), jnp.int32))


def test_products_of_halves_are_sums_in_float32() -> None:
    """The weights of a query are not divided by their sum before they meet the values, so in
    float16 2,048 values of 60 would be beyond its range."""
    array = jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.float16)
    program = jax.make_jaxpr(lambda *arrays: module._plain(CAUSAL, *arrays, Marks()))(*[array] * 3)
    products = [each for each in program.jaxpr.eqns if each.primitive.name == "dot_general"]
    assert [each.outvars[0].aval.dtype for each in products] == [jnp.float32] * 2


def test_values_wider_than_queries_are_not_narrowed() -> None:
    narrow, wide = (jax.ShapeDtypeStruct((1, 8, 2, 8), dtype) for dtype in ("bfloat16", "float32"))
    program = jax.make_jaxpr(lambda *arrays: module._plain(CAUSAL, *arrays, Marks()))(
        narrow, narrow, wide
    )
    products = [each for each in program.jaxpr.eqns if each.primitive.name == "dot_general"]
    precisions = [each.params["precision"] for each in products]
    assert precisions == [jax.lax.DotAlgorithmPreset.BF16_BF16_F32, None]
