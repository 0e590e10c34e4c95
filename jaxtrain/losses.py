"""Pure losses, one number an example; a task turns them into (sum, count).

Dims: B batch, C classes, D features.
"""

import jax
import jax.numpy as jnp

from jaxtrain.errors import UserError


def cross_entropy(
    logits_BC: jax.Array, labels_B: jax.Array, *, label_smoothing: float | jax.Array = 0.0
) -> jax.Array:
    """The negative log-likelihood of each label, in nats, in float32.

    >>> import jax.numpy as jnp
    >>> round(float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))[0]), 4)
    1.3863

    `label_smoothing` spreads that share of the target evenly over all classes (Szegedy et al. 2016,
    arXiv 1512.00567). Returns (B,). `UserError` if labels are no (B,): others would be broadcast.
    """
    if labels_B.shape != logits_BC.shape[:-1]:
        raise UserError(
            f"labels have shape {labels_B.shape}, logits {logits_BC.shape}; expected labels of"
            f" shape {logits_BC.shape[:-1]}, one class number an example"
        )
    log_probabilities_BC = jax.nn.log_softmax(logits_BC.astype(jnp.float32))
    # A comparison with the class numbers instead of a gather: the gather's gradient is a scatter,
    # which XLA runs slowly on CPU.
    chosen_BC = labels_B[:, None] == jnp.arange(logits_BC.shape[-1], dtype=labels_B.dtype)[None, :]
    likelihood_B = jnp.sum(jnp.where(chosen_BC, log_probabilities_BC, 0.0), axis=-1)
    if isinstance(label_smoothing, float) and label_smoothing == 0.0:
        return -likelihood_B
    mean_B = jnp.mean(log_probabilities_BC, axis=-1)
    return likelihood_B * -(1.0 - label_smoothing) - mean_B * label_smoothing


def squared_error(outputs_BD: jax.Array, targets_BD: jax.Array) -> jax.Array:
    """The mean over features of the squared difference, one number an example.

    >>> import jax.numpy as jnp
    >>> squared_error(jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 1.0]])).tolist()
    [2.5]
    """
    error_BD = outputs_BD.astype(jnp.float32) - targets_BD.astype(jnp.float32)
    return jnp.mean(jnp.square(error_BD), axis=tuple(range(1, error_BD.ndim)))
