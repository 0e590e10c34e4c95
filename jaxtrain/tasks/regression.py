"""Regression: numbers, by how far the model's are from them.

Dims: B batch, D features, N examples of a set.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import fields, losses
from jaxtrain.errors import UserError
from jaxtrain.metrics import Sums, weighted
from jaxtrain.tasks import exact, labels, picking
from jaxtrain.tree import Batch


@dataclasses.dataclass(frozen=True)
class Regression:
    """Targets (B, D) or (B,) by squared, absolute or Huber error.

    >>> import jax.numpy as jnp
    >>> sums = Regression().loss(jnp.ones((2, 3)), {"target": jnp.zeros((2, 3))})
    >>> [float(part) for part in sums["loss"]]
    [2.0, 2.0]

    Outputs and targets have one shape; of one number an example, (B,) and (B, 1) are the same.
    Whole targets are taken as float32. A batch may hold `weight` (B,), 0 for padding.
    """

    input: str = "image"
    """The batch's field that the model sees; several as tokens,lengths by position, or as
    ids=tokens,mask=attention_mask by the names of the model's arguments."""
    target: str = "target"
    """The batch's field that the model should give."""
    output: str = ""
    """Which of the model's outputs is meant, as value, 0 or head.value; empty for a model that
    gives nothing else."""
    error: Literal["squared", "absolute", "huber"] = "squared"
    """What the loss is of the difference; huber is half the square up to huber_delta, and linear
    beyond."""
    huber_delta: Annotated[float, fields.Above(0)] = 1.0
    """Difference from which the Huber loss is linear."""
    metrics: tuple[Literal["mae", "rmse", "r2"], ...] = ()
    """Metrics of a whole set that evaluations add; r2 is the mean over features."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", picking.as_text(self.input))

    def inputs(self, batch: Batch) -> Any:
        """The fields named by `input`; `UserError` if the batch lacks one."""
        return picking.inputs_of(batch, self.input)

    def loss(self, outputs: Any, batch: Batch, *, train: bool = True) -> Sums:
        """The mean error over D, summed over the batch."""
        del train  # the same in both
        labels.refuse_mixed(batch)
        return {"loss": weighted(self._error(*self._pair(outputs, batch)), batch.get("weight"))}

    def wrong_labels(
        self, rows: labels.Rows, outputs: Any, *, whole: bool = False
    ) -> labels.Wrong | None:
        """The rows whose targets are not finite, or their weights none."""
        return labels.wrong_numbers(rows, self.target) or labels.wrong_weights(rows)

    def examine(self, outputs: Any, batch: Batch) -> dict[str, jax.Array]:
        """For each example: its target and the prediction, both of the targets' shape, and the loss
        (B,)."""
        prediction, target = self._pair(outputs, batch)
        return {
            "target": target,
            "prediction": prediction.astype(jnp.float32),
            "loss": self._error(prediction, target),
        }

    def evaluate(self, examined: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The `metrics` of a whole set, from what `examine` gave of every example."""
        target_ND, prediction_ND = (
            examined[name].reshape(len(examined[name]), -1).astype(np.float64)
            for name in ("target", "prediction")
        )
        weights_N = exact.weights_of(examined, target_ND.shape[:1])
        weights_N1, total = weights_N[:, None], weights_N.sum() * target_ND.shape[1]
        difference_ND = target_ND - prediction_ND
        values = {
            "mae": float((weights_N1 * abs(difference_ND)).sum() / total),
            "rmse": float(np.sqrt((weights_N1 * difference_ND**2).sum() / total)),
            "r2": exact.r2(target_ND, prediction_ND, weights_N),
        }
        return {name: values[name] for name in self.metrics}

    def _error(self, outputs: jax.Array, target: jax.Array) -> jax.Array:
        if self.error == "squared":
            return losses.squared_error(outputs, target)
        if self.error == "absolute":
            return losses.absolute_error(outputs, target)
        return losses.huber(outputs, target, delta=self.huber_delta)

    def _pair(self, outputs: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The outputs and the targets in float32, of the targets' shape."""
        outputs = picking.output_of(outputs, self.output)
        target = picking.field_of(batch, self.target, "--task.target").astype(jnp.float32)
        rows = target.shape[:1]
        if {outputs.shape, target.shape} == {rows, (*rows, 1)}:
            outputs = outputs.reshape(target.shape)
        if outputs.shape != target.shape:
            count = target.shape[-1] if target.ndim == 2 else 1
            remedy = (
                f"give the model {count} outputs an example (--model.num_classes={count})"
                if target.ndim <= 2
                else "change the model's last layer"
            )
            raise UserError(
                f"outputs have shape {outputs.shape}, targets {target.shape}; they must be equal,"
                f" so {remedy}, or set --task.target"
            )
        return outputs, target
