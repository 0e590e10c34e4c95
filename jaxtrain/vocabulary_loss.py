"""Cross-entropy over a vocabulary, of whole logits or of late ones, which never exist for the whole
batch.

Late logits are made for a few tokens of each sequence at a time, in one loop that takes the
gradient, too: while the logits of a chunk are there, their softmax less the labels is multiplied
back into the states and added up for the kernel. So no product is computed twice, and what is kept
is as large as the states and the kernel. Chunks cut sequences, not the batch, for that may be split
over devices.

Dims: B batch, T tokens of a sequence, D model width, V rows of the vocabulary's table, N tokens of
a chunk.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain import losses, metrics
from jaxtrain.errors import UserError
from jaxtrain.late_logits import LateLogits, logits_of

Factor = float | jax.Array
_Factors = tuple[jax.Array, jax.Array]
"""Of the z-loss and of smoothing."""


class Scores(NamedTuple):
    """What is minimised, and what else is known of each token."""

    total: jax.Array
    "The weighted sum of what is minimised; the only part of late logits that has a gradient."
    loss_BT: jax.Array
    "Nats, without smoothing and z-loss."
    right_BT: jax.Array
    "1 where the label has the greatest logit (of equal ones the first), else 0."
    log_z_BT: jax.Array
    "The logarithm of the softmax's denominator."


def scores(
    logits: jax.Array | LateLogits,
    labels_BT: jax.Array,
    weights_BT: jax.Array | None = None,
    *,
    known_BT: jax.Array | None = None,
    z_loss: Factor = 0.0,
    label_smoothing: Factor = 0.0,
) -> Scores:
    """The loss of each label (B, T), and the sum by weights (B, T) of what is minimised.

    >>> late = LateLogits(jnp.eye(3)[None], jnp.eye(3), cap=None, vocabulary=3, chunk=2)
    >>> labels_BT = jnp.array([[0, 1, 0]])
    >>> [round(float(scores(each, labels_BT).total), 4) for each in (late, late.logits())]
    [2.6543, 2.6543]

    `z_loss` is the factor of log² Z (Chowdhery et al. 2022, arXiv 2204.02311), `label_smoothing`
    the share of a label that is spread evenly over all; both are in `total` alone. Where `known_BT`
    is false, or a label is no token, its numbers are nan, and `total` is, unless its weight is 0.
    """
    inside_BT = losses.are_classes(labels_BT, logits.shape)
    known_BT = inside_BT if known_BT is None else inside_BT & known_BT
    if isinstance(logits, LateLogits):
        return _of_late(logits, labels_BT, weights_BT, known_BT, z_loss, label_smoothing)
    rows_NV = logits.reshape(-1, logits.shape[-1])
    labels_N, known_N = labels_BT.ravel(), known_BT.ravel()
    right_N = (jnp.argmax(rows_NV, axis=-1) == labels_N).astype(jnp.float32)
    loss_N = losses.cross_entropy(rows_NV, labels_N)
    log_z_N = jax.nn.logsumexp(rows_NV.astype(jnp.float32), axis=-1)
    minimised_N = loss_N
    if not is_off(label_smoothing):
        minimised_N = losses.cross_entropy(rows_NV, labels_N, label_smoothing=label_smoothing)
    if not is_off(z_loss):
        minimised_N = minimised_N + z_loss * jnp.square(log_z_N)
    weights_N = None if weights_BT is None else weights_BT.ravel()
    return Scores(
        metrics.weighted(losses.nan_unless(known_N, minimised_N), weights_N)[0],
        losses.nan_unless(known_N, loss_N).reshape(labels_BT.shape),
        losses.nan_unless(known_N, right_N).reshape(labels_BT.shape),
        log_z_N.reshape(labels_BT.shape),
    )


def is_off(factor: Factor) -> bool:
    """Whether a factor is 0 for good; a traced one never is, though its value may be 0."""
    return isinstance(factor, int | float) and factor == 0


def _of_late(
    late: LateLogits,
    labels_BT: jax.Array,
    weights_BT: jax.Array | None,
    known_BT: jax.Array,
    z_loss: Factor,
    label_smoothing: Factor,
) -> Scores:
    if late.chunk < 1:
        raise UserError(f"LateLogits.chunk={late.chunk}: must be at least 1 token of each sequence")
    weights_BT = jnp.ones(labels_BT.shape, jnp.float32) if weights_BT is None else weights_BT
    form = _Form(late.chunk, late.vocabulary, late.cap, not is_off(label_smoothing))
    found: tuple[jax.Array, _OfTokens] = _chunked(
        form,
        late.states_BTD,
        late.kernel_DV,
        jnp.where(known_BT, labels_BT, 0).astype(jnp.int32),
        jnp.where(known_BT, weights_BT, 0.0).astype(jnp.float32),
        (jnp.float32(z_loss), jnp.float32(label_smoothing)),
    )
    total, of_tokens = found[0], jax.lax.stop_gradient(found[1])
    # What is not known has no gradient, but makes the sum nan.
    unknown = metrics.weighted(losses.nan_unless(known_BT, jnp.zeros_like(weights_BT)), weights_BT)
    return Scores(
        total + unknown[0],
        losses.nan_unless(known_BT, of_tokens.loss),
        losses.nan_unless(known_BT, of_tokens.right),
        of_tokens.log_z,
    )


class _Form(NamedTuple):
    """What is part of the program."""

    chunk: int
    vocabulary: int
    cap: float | None
    smooths: bool


class _Tokens(NamedTuple):
    """What is known of tokens: states (B, T, D), labels and weights (B, T), or those of N."""

    states: jax.Array
    labels: jax.Array
    weights: jax.Array


class _OfTokens(NamedTuple):
    """Numbers of tokens, (N,) or (B, T)."""

    minimised: jax.Array
    loss: jax.Array
    right: jax.Array
    log_z: jax.Array


class _Gradients(NamedTuple):
    """Of the sum, by states and kernel."""

    states: jax.Array
    kernel_DV: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    form: _Form,
    states_BTD: jax.Array,
    kernel_DV: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    factors: _Factors,
) -> tuple[jax.Array, _OfTokens]:
    """The weighted sum of what is minimised, and the numbers of each token."""
    tokens = _Tokens(states_BTD, labels_BT, weights_BT)
    of_tokens, _ = _over_chunks(form, tokens, kernel_DV, factors, differentiates=False)
    return metrics.weighted(of_tokens.minimised, weights_BT)[0], of_tokens


def _forward(
    form: _Form,
    states_BTD: jax.Array,
    kernel_DV: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    factors: _Factors,
) -> tuple[tuple[jax.Array, _OfTokens], _Gradients]:
    tokens = _Tokens(states_BTD, labels_BT, weights_BT)
    of_tokens, gradients = _over_chunks(form, tokens, kernel_DV, factors, differentiates=True)
    assert gradients is not None
    gradients = gradients._replace(kernel_DV=gradients.kernel_DV.astype(kernel_DV.dtype))
    return (metrics.weighted(of_tokens.minimised, weights_BT)[0], of_tokens), gradients


def _backward(
    form: _Form, gradients: _Gradients, cotangents: tuple[jax.Array, Any]
) -> tuple[jax.Array | None, ...]:
    del form
    by_total, _ = cotangents  # the numbers of tokens have no gradient
    dtype = gradients.kernel_DV.dtype  # that of the states, too
    states, kernel = ((each.astype(jnp.float32) * by_total).astype(dtype) for each in gradients)
    return states, kernel, None, None, None


_chunked.defvjp(_forward, _backward)


def _over_chunks(
    form: _Form,
    tokens: _Tokens,
    kernel_DV: jax.Array,
    factors: _Factors,
    *,
    differentiates: bool,
) -> tuple[_OfTokens, _Gradients | None]:
    """All chunks, one after the other."""
    rows, length = tokens.labels.shape
    count = -(-length // form.chunk)
    size = -(-length // count)
    tokens = jax.tree.map(lambda array: _lengthened(array, count * size), tokens)

    def body(sum_DV: jax.Array | None, index: jax.Array) -> tuple[jax.Array | None, Any]:
        def cut(array: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice_in_dim(array, index * size, size, axis=1)
            return part.reshape(rows * size, *part.shape[2:])

        of_tokens, gradients = _of_chunk(
            form, jax.tree.map(cut, tokens), kernel_DV, factors, differentiates=differentiates
        )
        if sum_DV is None or gradients is None:
            return None, (of_tokens, None)
        return sum_DV + gradients.kernel_DV, (of_tokens, gradients.states)

    def joined(parts: jax.Array) -> jax.Array:
        apart = parts.reshape(count, rows, size, *parts.shape[2:]).swapaxes(0, 1)
        return apart.reshape(rows, count * size, *parts.shape[2:])[:, :length]

    # In float32 whatever the kernel is, for it is a sum over chunks.
    start = jnp.zeros(kernel_DV.shape, jnp.float32) if differentiates else None
    sum_DV, found = jax.lax.scan(body, start, jnp.arange(count))
    of_tokens, states = jax.tree.map(joined, found)
    return of_tokens, None if sum_DV is None else _Gradients(states, sum_DV)


def _lengthened(array: jax.Array, length: int) -> jax.Array:
    """With zeros behind its second dim; a token of weight 0 adds nothing."""
    missing = length - array.shape[1]
    rest = ((0, 0),) * (array.ndim - 2)
    return jnp.pad(array, ((0, 0), (0, missing), *rest)) if missing else array


def _of_chunk(
    form: _Form,
    tokens: _Tokens,
    kernel_DV: jax.Array,
    factors: _Factors,
    *,
    differentiates: bool,
) -> tuple[_OfTokens, _Gradients | None]:
    """Forward and, while the logits are there, backward."""
    (states_ND, labels_N, weights_N), (z_loss, smoothing) = tokens, factors
    logits_NV = logits_of(states_ND, kernel_DV, form.cap)
    column_NV = jax.lax.broadcasted_iota(jnp.int32, logits_NV.shape, 1)
    real_NV, hit_NV = column_NV < form.vocabulary, column_NV == labels_N[:, None]
    masked_NV = jnp.where(real_NV, logits_NV, -jnp.inf)
    most_N1 = jnp.max(masked_NV, axis=1, keepdims=True)
    label_N1 = jnp.sum(jnp.where(hit_NV, logits_NV, 0.0), axis=1, keepdims=True)
    above_NV = jnp.where(column_NV < labels_N[:, None], masked_NV >= label_N1, masked_NV > label_N1)
    sum_N1 = jnp.sum(jnp.exp(masked_NV - most_N1), axis=1, keepdims=True)
    log_z_N1 = most_N1 + jnp.log(sum_N1)
    log_z_N, loss_N = log_z_N1[:, 0], (log_z_N1 - label_N1)[:, 0]
    minimised_N, target_NV = loss_N, hit_NV.astype(jnp.float32)
    if form.smooths:
        mean_N = jnp.sum(jnp.where(real_NV, logits_NV, 0.0), axis=1) / form.vocabulary
        minimised_N = (1.0 - smoothing) * loss_N + smoothing * (log_z_N - mean_N)
        target_NV = (1.0 - smoothing) * target_NV + smoothing / form.vocabulary * real_NV
    minimised_N = minimised_N + z_loss * jnp.square(log_z_N)
    right_N = 1.0 - jnp.any(above_NV, axis=1).astype(jnp.float32)
    of_tokens = _OfTokens(minimised_N, loss_N, right_N, log_z_N)
    if not differentiates:
        return of_tokens, None
    slope_NV = (1.0 + 2.0 * z_loss * log_z_N1) * jnp.exp(masked_NV - log_z_N1) - target_NV
    if form.cap:
        slope_NV = slope_NV * (1.0 - jnp.square(logits_NV / form.cap))
    # A row that does not count may hold nan.
    slope_NV = jnp.where(weights_N[:, None] > 0, weights_N[:, None] * slope_NV, 0.0)
    slope_NV = slope_NV.astype(states_ND.dtype)
    wide = jnp.float32
    kept = wide if states_ND.dtype == jnp.float16 else states_ND.dtype  # before it is scaled
    return of_tokens, _Gradients(
        jnp.matmul(slope_NV, kernel_DV.T, preferred_element_type=wide).astype(kept),
        jnp.matmul(states_ND.T, slope_NV, preferred_element_type=wide),
    )
