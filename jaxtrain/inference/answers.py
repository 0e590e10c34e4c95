"""What a task answers to an input: class, probability or value, from what the model says; no label
is needed.

Dims: B batch, C classes, T places.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain import late_logits, tasks, tree
from jaxtrain.tasks import picking


def answers(task: Any, outputs: Any) -> dict[str, jax.Array]:
    """Named arrays with a leading batch dim: the task's own `predict(outputs)`, or what fits its
    kind.

    >>> found = answers(tasks.Classification(), jnp.log(jnp.array([[0.25, 0.75]])))
    >>> found["prediction"].tolist(), [round(float(share), 2) for share in found["probability"][0]]
    ([1], [0.25, 0.75])

    Classification: `prediction` (B,), `probability` and `logits` (B, C). Binary and multi-label:
    `prediction`, `probability` of a yes and `logits`, (B,) and (B, C). Tokens, next
    or masked: `prediction` and its `probability` (B, T). Regression: `value`. Anything else: the
    outputs themselves, by path.
    """
    if hasattr(task, "predict"):
        return dict(task.predict(outputs))
    of_tokens = isinstance(task, tasks.NextToken | tasks.MaskedLanguage)
    if of_tokens or isinstance(task, tasks.Classification):
        logits = late_logits.whole(picking.output_of(outputs, task.output))
        prediction = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits.astype(jnp.float32)
        shares = jax.nn.softmax(logits, axis=-1)
        if of_tokens:
            return {"prediction": prediction, "probability": jnp.max(shares, axis=-1)}
        return {"prediction": prediction, "probability": shares, "logits": logits}
    if isinstance(task, tasks.Binary | tasks.MultiLabel):
        logits = picking.output_of(outputs, task.output)
        logits = logits.reshape(logits.shape[:1]) if isinstance(task, tasks.Binary) else logits
        logits = logits.astype(jnp.float32)
        return {
            "prediction": (logits > 0).astype(jnp.int32),
            "probability": jax.nn.sigmoid(logits),
            "logits": logits,
        }
    if isinstance(task, tasks.Regression):
        return {"value": picking.output_of(outputs, task.output)}
    named = {f"output/{path}".rstrip("/"): leaf for path, leaf in tree.flatten(outputs).items()}
    return {"output": outputs} if list(named) == ["output"] else named
