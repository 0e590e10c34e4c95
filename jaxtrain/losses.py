"""Pure losses, one number an example; a task turns them into (sum, count).

A label that is no class makes its loss nan, never 0: what is wrong must not train in silence.

Dims: B batch, C classes, D features.
"""

import jax
import jax.numpy as jnp

from jaxtrain.errors import UserError

SUM_TOLERANCE = 1e-3
"""How far the sum of one example's probabilities may lie from 1."""


def cross_entropy(
    logits_BC: jax.Array, labels_B: jax.Array, *, label_smoothing: float | jax.Array = 0.0
) -> jax.Array:
    """The negative log-likelihood of each label, in nats, in float32.

    >>> import jax.numpy as jnp
    >>> [round(float(one), 4) for one in cross_entropy(jnp.zeros((2, 4)), jnp.array([2, 4]))]
    [1.3863, nan]

    Labels are class numbers (B,), or one distribution over the classes an example (B, C): one-hot
    or soft labels. `label_smoothing` spreads that share of the target evenly over all classes
    (Szegedy et al. 2016, arXiv 1512.00567). Returns (B,), nan where a label is no class, or where
    probabilities do not sum to 1. `UserError` for labels of other shapes: they would be broadcast.
    """
    labels_B = whole_numbers(labels_B)
    check_label_shape(logits_BC.shape, labels_B.shape)
    num_classes = logits_BC.shape[-1]
    log_probabilities_BC = jax.nn.log_softmax(logits_BC.astype(jnp.float32))
    if labels_B.ndim == logits_BC.ndim:
        shares_BC = labels_B.astype(jnp.float32)
        # A class with no share costs nothing, even where its logit is -inf.
        part_BC = jnp.where(shares_BC == 0.0, 0.0, shares_BC * log_probabilities_BC)
        likelihood_B = jnp.sum(part_BC, axis=-1)
    else:
        # A comparison with the class numbers instead of a gather: the gather's gradient is a
        # scatter, which XLA runs slowly on CPU.
        chosen_BC = _chosen(labels_B, num_classes)
        likelihood_B = jnp.sum(jnp.where(chosen_BC, log_probabilities_BC, 0.0), axis=-1)
    known_B = are_classes(labels_B, logits_BC.shape)
    if isinstance(label_smoothing, float) and label_smoothing == 0.0:
        return nan_unless(known_B, -likelihood_B)
    mean_B = jnp.mean(log_probabilities_BC, axis=-1)
    loss_B = likelihood_B * -(1.0 - label_smoothing) - mean_B * label_smoothing
    return nan_unless(known_B, loss_B)


def binary_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float | jax.Array = 0.0
) -> jax.Array:
    """The negative log-likelihood of labels 0 or 1 under sigmoids of the logits, in float32.

    >>> import jax.numpy as jnp
    >>> [round(float(one), 4) for one in binary_cross_entropy(jnp.zeros(2), jnp.array([1, 2]))]
    [0.6931, nan]

    Of any shape, the same for both. `label_smoothing` moves labels by half of it towards each
    other. nan where a label is neither 0 nor 1. `UserError` if the shapes differ.
    """
    _check_same_shape(logits, labels, "labels")
    logits, targets = logits.astype(jnp.float32), labels.astype(jnp.float32)
    known = (labels == 0) | (labels == 1)
    if not (isinstance(label_smoothing, float) and label_smoothing == 0.0):
        targets = targets * (1.0 - label_smoothing) + 0.5 * label_smoothing
    # -log sigmoid(x) is softplus(-x), which neither overflows nor loses digits.
    loss = targets * jax.nn.softplus(-logits) + (1.0 - targets) * jax.nn.softplus(logits)
    return nan_unless(known, loss)


def squared_error(outputs_BD: jax.Array, targets_BD: jax.Array) -> jax.Array:
    """The mean over features of the squared difference, one number an example.

    >>> import jax.numpy as jnp
    >>> squared_error(jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 1.0]])).tolist()
    [2.5]

    `UserError` if the shapes differ: (B,) and (B, 1) would be broadcast to (B, B).
    """
    return _mean_over_features(jnp.square(_difference(outputs_BD, targets_BD)))


def absolute_error(outputs_BD: jax.Array, targets_BD: jax.Array) -> jax.Array:
    """The mean over features of the absolute difference, one number an example.

    >>> import jax.numpy as jnp
    >>> absolute_error(jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 1.0]])).tolist()
    [1.5]
    """
    return _mean_over_features(jnp.abs(_difference(outputs_BD, targets_BD)))


def huber(outputs_BD: jax.Array, targets_BD: jax.Array, *, delta: float = 1.0) -> jax.Array:
    """The mean over features of the Huber loss (Huber 1964): half the squared difference up to
    `delta`, and linear beyond it.

    >>> import jax.numpy as jnp
    >>> huber(jnp.array([[0.5, 3.0]]), jnp.array([[0.0, 0.0]])).tolist()
    [1.3125]
    """
    size_BD = jnp.abs(_difference(outputs_BD, targets_BD))
    near_BD = jnp.minimum(size_BD, delta)
    return _mean_over_features(near_BD * (size_BD - 0.5 * near_BD))


def check_label_shape(logits: tuple[int, ...], labels: tuple[int, ...]) -> None:
    """`UserError` unless labels of this shape fit logits of that one: a class number for each row
    of logits, or as many probabilities as there are classes."""
    if labels in (logits[:-1], logits):
        return
    remedy = ""
    if labels == (*logits[:-1], 1):
        remedy = "; drop their last dim, as labels[..., 0] does"
    elif len(labels) == len(logits) and labels[:-1] == logits[:-1]:
        remedy = (
            f"; one-hot labels of {labels[-1]} classes want a model of {labels[-1]} outputs"
            f" (--model.num_classes={labels[-1]})"
        )
    raise UserError(
        f"labels have shape {labels}, logits {logits}; expected labels of"
        f" shape {logits[:-1]}, one class number an example, or {logits}, a probability"
        f" for each class{remedy}"
    )


def are_classes(labels_B: jax.Array, logits_shape: tuple[int, ...]) -> jax.Array:
    """Which labels are classes: whole numbers in 0..C-1, or probabilities (B, C) that sum to 1.

    >>> import jax.numpy as jnp
    >>> are_classes(jnp.array([0.0, 0.5, 3.0, jnp.nan]), (4, 3)).tolist()
    [True, False, False, False]
    """
    labels_B, num_classes = whole_numbers(labels_B), logits_shape[-1]
    if labels_B.ndim == len(logits_shape):
        total_B = jnp.sum(labels_B.astype(jnp.float32), axis=-1)
        return jnp.all(labels_B >= 0, axis=-1) & (jnp.abs(total_B - 1.0) <= SUM_TOLERANCE)
    known_B = (labels_B >= 0) & (labels_B < num_classes)
    if jnp.issubdtype(labels_B.dtype, jnp.floating):
        known_B &= labels_B == jnp.floor(labels_B)
    return known_B


def shares_of(labels_B: jax.Array, num_classes: int) -> jax.Array:
    """Class numbers as one-hot distributions (B, C) in float32; all 0 where a label is no class.

    >>> import jax.numpy as jnp
    >>> shares_of(jnp.array([1, -1]), 2).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    """
    return _chosen(whole_numbers(labels_B), num_classes).astype(jnp.float32)


def whole_numbers(labels: jax.Array) -> jax.Array:
    """Labels of 8 or 16 bits, or booleans, as int32: a class number must not wrap round."""
    if labels.dtype in (jnp.bool_, jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.uint32):
        return labels.astype(jnp.int32)
    return labels.astype(jnp.float32) if labels.dtype in (jnp.float16, jnp.bfloat16) else labels


def nan_unless(known: jax.Array, values: jax.Array) -> jax.Array:
    """The values, bit for bit, and nan where `known` is false; gradients there are 0.

    >>> import jax.numpy as jnp
    >>> nan_unless(jnp.array([True, False]), jnp.array([0.5, 0.5])).tolist()
    [0.5, nan]
    """
    # 0 / 0, not a constant: --debug_nans would blame the line that holds a nan.
    return jnp.where(known, values, 0.0) / known.astype(values.dtype)


def _chosen(labels_B: jax.Array, num_classes: int) -> jax.Array:
    classes_C = jnp.arange(num_classes, dtype=labels_B.dtype)
    return labels_B[..., None] == classes_C.reshape((1,) * labels_B.ndim + (num_classes,))


def _difference(outputs_BD: jax.Array, targets_BD: jax.Array) -> jax.Array:
    _check_same_shape(outputs_BD, targets_BD, "targets")
    return outputs_BD.astype(jnp.float32) - targets_BD.astype(jnp.float32)


def _check_same_shape(outputs: jax.Array, targets: jax.Array, what: str) -> None:
    if outputs.shape != targets.shape:
        raise UserError(
            f"outputs have shape {outputs.shape}, {what} {targets.shape}; they must be equal, for"
            " others would be broadcast; drop or add a dim, as array[..., 0] does"
        )


def _mean_over_features(values_BD: jax.Array) -> jax.Array:
    return jnp.mean(values_BD, axis=tuple(range(1, values_BD.ndim)))
