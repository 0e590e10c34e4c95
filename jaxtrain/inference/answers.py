"""What a task answers to an input: class, probability or value, from what the model says; no label
is needed.

Dims: B batch, C classes, T places.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain import tasks, tree


def answers(task: Any, outputs: Any) -> dict[str, jax.Array]:
    """Named arrays with a leading batch dim: the task's own `predict(outputs)`, or what fits its
    kind.

    >>> found = answers(tasks.Classification(), jnp.log(jnp.array([[0.25, 0.75]])))
    >>> found["prediction"].tolist(), [round(float(share), 2) for share in found["probability"][0]]
    ([1], [0.25, 0.75])

    Classification: `prediction` (B,), `probability` and `logits` (B, C). Next tokens: `prediction`
    and its `probability` (B, T). Regression: `value`. Anything else: the outputs themselves, by
    path.
    """
    if hasattr(task, "predict"):
        return dict(task.predict(outputs))
    if isinstance(task, tasks.Classification):
        logits_BC = outputs.astype(jnp.float32)
        return {
            "prediction": jnp.argmax(outputs, axis=-1).astype(jnp.int32),
            "probability": jax.nn.softmax(logits_BC, axis=-1),
            "logits": logits_BC,
        }
    if isinstance(task, tasks.NextToken):
        logits = outputs.astype(jnp.float32)
        return {
            "prediction": jnp.argmax(outputs, axis=-1).astype(jnp.int32),
            "probability": jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1),
        }
    if isinstance(task, tasks.Regression):
        return {"value": outputs}
    named = {f"output/{path}".rstrip("/"): leaf for path, leaf in tree.flatten(outputs).items()}
    return {"output": outputs} if list(named) == ["output"] else named
