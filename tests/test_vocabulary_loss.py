"""Losses over a vocabulary: chunks against whole logits and against NumPy in float64, values,
gradients, layouts on a mesh, and what memory holds.

Dims: B batch, T tokens, D model width, V rows of the table, N tokens in one row.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain import vocabulary_loss
from jaxtrain.late_logits import LateLogits
from jaxtrain.models.transformer import Transformer
from jaxtrain.optimizers import SGD
from jaxtrain.parallel import mesh as meshes
from jaxtrain.parallel import sharding
from jaxtrain.plan import collectives
from jaxtrain.tasks import NextToken
from jaxtrain.train import state, steps

RANDOM = np.random.default_rng(0)
B, T, D, V, KNOWN = 8, 5, 4, 16, 13  # three rows of the table are padding
STATES_BTD = RANDOM.normal(size=(B, T, D)).astype(np.float32)
KERNEL_DV = RANDOM.normal(size=(D, V)).astype(np.float32)
LABELS_BT = RANDOM.integers(0, KNOWN, (B, T)).astype(np.int32)
WEIGHTS_BT = RANDOM.choice([0.0, 0.5, 1.0], (B, T)).astype(np.float32)


def oracle(
    *, cap: float | None = None, z_loss: float = 0.0, smoothing: float = 0.0
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """In float64: the sum, nats and hits of each token (N,), gradients of states and kernel."""
    states, kernel = STATES_BTD.reshape(-1, D).astype(np.float64), KERNEL_DV.astype(np.float64)
    raw = (states @ kernel)[:, :KNOWN]
    logits = raw if cap is None else cap * np.tanh(raw / cap)
    labels, weights = LABELS_BT.ravel(), WEIGHTS_BT.ravel().astype(np.float64)
    log_z = np.log(np.exp(logits).sum(1))
    share = np.exp(logits - log_z[:, None])
    hit = np.eye(KNOWN)[labels]
    target = (1 - smoothing) * hit + smoothing / KNOWN
    nats = log_z - (hit * logits).sum(1)
    minimised = log_z - (target * logits).sum(1) + z_loss * log_z**2
    slope = weights[:, None] * ((1 + 2 * z_loss * log_z[:, None]) * share - target)
    if cap is not None:
        slope = slope / np.cosh(raw / cap) ** 2
    by_kernel = np.zeros((D, V))
    by_kernel[:, :KNOWN] = states.T @ slope
    by_states = (slope @ kernel[:, :KNOWN].T).reshape(B, T, D)
    return (weights @ minimised), nats, logits.argmax(1) == labels, by_states, by_kernel


def late(chunk: int, cap: float | None = None, dtype: Any = np.float32) -> LateLogits:
    """Late logits of the states and kernel above."""
    arrays = (jnp.asarray(array, dtype) for array in (STATES_BTD, KERNEL_DV))
    return LateLogits(*arrays, cap=cap, vocabulary=KNOWN, chunk=chunk)


@functools.partial(jax.jit, static_argnames=("whole",))
def value_and_gradients(
    logits: LateLogits, factors: dict[str, Any], weights_BT: Any = WEIGHTS_BT, whole: bool = False
) -> Any:
    """Scores, and gradients of three times the sum by states and kernel."""

    def loss(logits: LateLogits) -> tuple[jax.Array, vocabulary_loss.Scores]:
        found = vocabulary_loss.scores(
            logits.logits() if whole else logits,
            jnp.asarray(LABELS_BT),
            jnp.asarray(weights_BT),
            **factors,
        )
        return 3 * found.total, found

    (_, found), by = jax.value_and_grad(loss, has_aux=True)(logits)
    return found, by.states_BTD, by.kernel_DV


@pytest.mark.parametrize("chunk", [1, 2, 5, 9])
def test_chunks_give_the_numbers_of_whole_logits(chunk: int) -> None:
    """Chunks that divide the length, that do not, and that are longer; 9 is one of 5."""
    factors = {"z_loss": jnp.float32(0.1), "label_smoothing": jnp.float32(0.2)}
    found, by_states, by_kernel = value_and_gradients(late(chunk, 2.0), factors)
    whole, states, kernel = value_and_gradients(late(chunk, 2.0), factors, whole=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, whole)
    np.testing.assert_allclose(by_states, states, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_kernel, kernel, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("factors", [{}, {"z_loss": 0.1}, {"z_loss": 0.1, "label_smoothing": 0.2}])
def test_values_and_gradients_are_those_of_float64(
    factors: dict[str, float], cap: float | None, whole: bool
) -> None:
    traced = {name: jnp.float32(value) for name, value in factors.items()}
    found, by_states, by_kernel = value_and_gradients(late(2, cap), traced, whole=whole)
    total, nats, right, states, kernel = oracle(
        cap=cap, z_loss=factors.get("z_loss", 0), smoothing=factors.get("label_smoothing", 0)
    )
    np.testing.assert_allclose(found.total, total, rtol=1e-6)
    np.testing.assert_allclose(found.loss_BT.ravel(), nats, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.right_BT.ravel(), right)
    np.testing.assert_allclose(by_states, 3 * states, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(by_kernel, 3 * kernel, rtol=1e-5, atol=2e-6)
    assert not np.asarray(by_kernel)[:, KNOWN:].any()  # padding is not trained


@pytest.mark.parametrize(("dtype", "close"), [(jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)])
def test_narrow_floats_are_summed_in_float32(dtype: Any, close: float) -> None:
    found, by_states, by_kernel = value_and_gradients(late(1, None, dtype), {})
    total, _, _, states, kernel = oracle()
    assert found.total.dtype == jnp.float32 and by_states.dtype == by_kernel.dtype == dtype
    np.testing.assert_allclose(found.total, total, rtol=close)
    np.testing.assert_allclose(by_states, 3 * states, atol=4 * close)
    np.testing.assert_allclose(by_kernel, 3 * kernel, atol=12 * close)


def test_a_sum_over_many_chunks_loses_no_digits_in_bfloat16() -> None:
    """1,024 equal chunks: a sum in bfloat16 would stop at 256 times the first."""
    states = jnp.ones((1, 1024, 1), jnp.bfloat16)
    logits = LateLogits(states, jnp.zeros((1, 2), jnp.bfloat16), None, vocabulary=2, chunk=1)

    def total(logits: LateLogits) -> jax.Array:
        return vocabulary_loss.scores(logits, jnp.zeros((1, 1024), jnp.int32)).total

    assert jax.grad(total)(logits).kernel_DV.tolist() == [[-512.0, 512.0]]


@pytest.mark.parametrize("whole", [False, True])
def test_of_equal_logits_the_first_is_the_answer(whole: bool) -> None:
    """As argmax has it: a head of zeros is right about token 0 alone."""
    zeros = LateLogits(jnp.ones((1, 3, 2)), jnp.zeros((2, 4)), None, vocabulary=3, chunk=1)
    logits = zeros.logits() if whole else zeros
    found = vocabulary_loss.scores(logits, jnp.array([[0, 1, 2]]))
    assert found.right_BT.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("whole", [False, True])
def test_a_label_beyond_the_vocabulary_is_nan_and_never_0(whole: bool) -> None:
    """Rows of the table that are padding are no tokens. Weight 0 leaves all that out, nan states
    too; the gradient of the other tokens stays what it is."""
    labels_BT = LABELS_BT.copy()
    labels_BT[0, 1], labels_BT[2, 2], labels_BT[3, 0] = KNOWN, -1, V
    logits = late(2)
    logits = logits.logits() if whole else logits
    found = vocabulary_loss.scores(logits, jnp.asarray(labels_BT), jnp.ones((B, T)))
    wrong_BT = labels_BT != LABELS_BT
    np.testing.assert_array_equal(np.isnan(found.loss_BT), wrong_BT)
    np.testing.assert_array_equal(np.isnan(found.right_BT), wrong_BT)
    assert np.isnan(found.total)

    def total(late_logits: LateLogits, weights_BT: jax.Array) -> jax.Array:
        logits = late_logits.logits() if whole else late_logits
        return vocabulary_loss.scores(logits, jnp.asarray(labels_BT), weights_BT).total

    out_BT = jnp.asarray(~wrong_BT, jnp.float32)
    (value, by), plain = (
        jax.value_and_grad(total)(late(2), out_BT),
        jax.grad(lambda each: vocabulary_loss.scores(each, LABELS_BT, out_BT).total)(late(2)),
    )
    assert np.isfinite(value)
    np.testing.assert_allclose(by.states_BTD, plain.states_BTD, atol=1e-6)
    worse = jax.grad(total)(late(2), jnp.ones((B, T)))
    np.testing.assert_allclose(worse.kernel_DV, plain.kernel_DV, atol=1e-5)


def test_no_chunk_of_no_tokens() -> None:
    with pytest.raises(ValueError, match="^LateLogits.chunk=0: must be at least 1 token of each"):
        vocabulary_loss.scores(late(0), jnp.asarray(LABELS_BT))


# --- on a mesh, and in memory
# --------------------------------------------------------------------------------------------------


def arrays_of(text: str) -> set[tuple[int, ...]]:
    """The shapes of all arrays in a compiled program."""
    return {
        tuple(map(int, shape.split(","))) for shape in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)
    }


@pytest.mark.parametrize("text", ["data:8", "fsdp:4,tensor:2", "data:2,fsdp:2,tensor:2"])
def test_on_a_mesh_no_logits_are_gathered(text: str) -> None:
    """The batch split over data and fsdp, the kernel over tensor: the numbers of one device, and
    all that is sent is the kernel's gradient once, and a few numbers a token."""
    mesh = meshes.make(text)
    split = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    logits = late(2, 2.0)
    placed = LateLogits(
        jax.device_put(logits.states_BTD, sharding.batch(mesh)),
        jax.device_put(logits.kernel_DV, split),
        cap=2.0,
        vocabulary=KNOWN,
        chunk=2,
    )
    factors = {"z_loss": jnp.float32(0.1)}
    found, expected = (
        value_and_gradients(each, factors, weights_BT=jax.device_put(WEIGHTS_BT, where))
        for each, where in ((placed, sharding.batch(mesh)), (logits, jax.devices()[0]))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )
    program = value_and_gradients.lower(placed, factors, weights_BT=WEIGHTS_BT).compile().as_text()
    sent = collectives.read(program)
    # of a chunk: 16 rows, all logits of which are 1 KiB
    assert max(each.bytes for each in sent) <= 16 * max(D, V) * 4 // 2, sent
    assert not any(each.kind == "all-gather" and each.bytes >= 16 * KNOWN * 4 for each in sent)


def test_memory_never_holds_all_logits() -> None:
    """Compiled for sizes at which they are most of it; only chunks, and one sequence in none of
    them, are as wide as the vocabulary."""
    rows, length, width, vocabulary, chunk = 4, 512, 16, 4096, 32
    logits = LateLogits(
        jax.ShapeDtypeStruct((rows, length, width), np.float32),
        jax.ShapeDtypeStruct((width, vocabulary), np.float32),
        cap=None,
        vocabulary=vocabulary,
        chunk=chunk,
    )

    def loss(logits: LateLogits, labels_BT: jax.Array, whole: bool) -> jax.Array:
        return vocabulary_loss.scores(logits.logits() if whole else logits, labels_BT).total

    labels = jax.ShapeDtypeStruct((rows, length), np.int32)
    compiled = {
        whole: jax.jit(jax.grad(functools.partial(loss, whole=whole)))
        .lower(logits, labels)
        .compile()
        for whole in (False, True)
    }
    peaks = {whole: each.memory_analysis().temp_size_in_bytes for whole, each in compiled.items()}
    wide = {shape for shape in arrays_of(compiled[False].as_text()) if vocabulary in shape}
    assert max(map(np.prod, wide)) == rows * chunk * vocabulary, wide
    whole_logits = 4 * rows * length * vocabulary
    assert peaks[False] < whole_logits / 4 < whole_logits < peaks[True], peaks


@pytest.mark.parametrize(("tied", "text"), [(True, "data:2,fsdp:2,tensor:2"), (False, "fsdp:8")])
def test_a_transformer_learns_the_same_in_chunks(tied: bool, text: str) -> None:
    """A step of it on a mesh, its head padded and capped, against whole logits on one device."""
    model = Transformer(
        vocabulary=KNOWN,
        padded_vocabulary=V,
        width=16,
        depth=1,
        heads=2,
        max_length=T,
        logit_cap=3.0,
        tied=tied,
    )
    batch = {"tokens": RANDOM.integers(0, KNOWN, (B, T + 1)).astype(np.int32)}
    found = []
    for chunk, where in ((0, None), (2, meshes.make(text))):
        parts = (model.clone(chunk=chunk), NextToken(z_loss=0.01), SGD(0.1))
        options = {"mesh": where, "shard": (("embed", "tensor:-"),) if where else ()}
        now = state.init_state(*parts, batch, **options)
        rows = batch if where is None else jax.device_put(batch, sharding.batch(where))
        found.append(jax.device_get(steps.make_gradients(*parts, **options)(now, rows)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[1], found[0]
    )
