"""Tasks: what is learnt from a batch, as losses and metrics in (sum, count) form.

A task is two functions: `inputs(batch)` picks what the model sees, `loss(outputs, batch,
train=...)` gives `{name: (sum, count)}` with "loss" among the names; that one is minimised.
`examine` says what a prediction was, for confusion matrices and the worst mistakes; `check` refuses
outputs that cannot name every class of the data; `score` chooses the best checkpoint; `unit` and
`units` say what speed is counted in. Outputs may be any pytree that the task's own `loss`
understands.

Dims: B batch, C classes, D features, T tokens to predict, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from jaxtrain import fields, losses, metrics
from jaxtrain.errors import UserError
from jaxtrain.tree import Batch, Shapes


class Task(Protocol):
    """What the step asks of a task."""

    def inputs(self, batch: Batch) -> Any:
        """What the model is called with."""
        ...

    def loss(self, outputs: Any, batch: Batch, *, train: bool = True) -> metrics.Sums:
        """The loss, under "loss", and other metrics; `train` is False in evaluation."""
        ...


@dataclasses.dataclass(frozen=True)
class Classification:
    """One label an example, by cross-entropy.

    >>> import jax.numpy as jnp
    >>> batch = {"image": jnp.zeros((2, 8, 8, 1)), "label": jnp.array([1, 2])}
    >>> sums = Classification().loss(jnp.eye(4)[:2], batch)
    >>> [float(part) for part in sums["accuracy"]]
    [0.0, 2.0]

    A batch may hold `weight` (B,), 0 for padding, and `label_other` (B,) with `label_weight` (B,),
    the share of `label`, where mixup or cutmix made examples of two. Then accuracy counts the label
    of the greater share.
    """

    label_smoothing: fields.Probability = 0.0
    """Share of the target that is spread evenly over all classes while training."""
    input: str = "image"
    """The batch's field that the model sees."""

    def inputs(self, batch: Batch) -> jax.Array:
        """The field named by `input`; `UserError` if the batch has none."""
        return _field(batch, self.input, "; set --task.input")

    def loss(self, outputs: jax.Array, batch: Batch, *, train: bool = True) -> metrics.Sums:
        """Cross-entropy and accuracy of logits (B, C); smoothing only counts while training, so
        that evaluation is the true likelihood."""
        smoothing = self.label_smoothing if train else 0.0
        weights_B = batch.get("weight")
        labels_B = _field(batch, "label")
        loss_B = losses.cross_entropy(outputs, labels_B, label_smoothing=smoothing)
        if "label_other" in batch:
            share_B = batch["label_weight"]
            other_B = losses.cross_entropy(outputs, batch["label_other"], label_smoothing=smoothing)
            loss_B = share_B * loss_B + (1.0 - share_B) * other_B
            labels_B = jnp.where(share_B >= 0.5, labels_B, batch["label_other"])
        right_B = (jnp.argmax(outputs, axis=-1) == labels_B).astype(jnp.float32)
        return {
            "loss": metrics.weighted(loss_B, weights_B),
            "accuracy": metrics.weighted(right_B, weights_B),
        }

    def check(self, outputs: Any, num_classes: int | None) -> None:
        """`UserError` if the (abstract) outputs have fewer classes than the data."""
        _check_width(outputs, num_classes, "num_classes", "classes")

    def examine(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """For each example: its label, the prediction, the label's probability and the loss, all
        (B,)."""
        loss_B = losses.cross_entropy(outputs, batch["label"])
        prediction_B = jnp.argmax(outputs, axis=-1).astype(jnp.int32)
        return {
            "label": batch["label"],
            "prediction": prediction_B,
            "probability": jnp.exp(-loss_B),
            "loss": loss_B,
        }


@dataclasses.dataclass(frozen=True)
class Regression:
    """Targets (B, D) by squared error.

    >>> import jax.numpy as jnp
    >>> sums = Regression().loss(jnp.ones((2, 3)), {"target": jnp.zeros((2, 3))})
    >>> [float(part) for part in sums["loss"]]
    [2.0, 2.0]
    """

    input: str = "image"
    """The batch's field that the model sees."""
    target: str = "target"
    """The batch's field that the model should give."""

    def inputs(self, batch: Batch) -> jax.Array:
        """The field named by `input`; `UserError` if the batch has none."""
        return _field(batch, self.input, "; set --task.input")

    def loss(self, outputs: jax.Array, batch: Batch, *, train: bool = True) -> metrics.Sums:
        """The mean squared error over D, summed over the batch."""
        del train  # the same in both
        target = _field(batch, self.target, "; set --task.target")
        if outputs.shape != target.shape:
            raise UserError(
                f"outputs have shape {outputs.shape}, targets {target.shape}; they must be equal,"
                " so change the model's last layer or --task.target"
            )
        return {
            "loss": metrics.weighted(losses.squared_error(outputs, target), batch.get("weight"))
        }


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Each token of a sequence from those before it, by cross-entropy.

    >>> import jax.numpy as jnp
    >>> batch = {"tokens": jnp.array([[0, 1, 2]])}
    >>> sums = NextToken().loss(jnp.eye(4)[None, 1:3], batch)
    >>> [float(part) for part in sums["accuracy"]]
    [2.0, 2.0]

    Of tokens (B, T + 1) the model sees all but the last and is asked for all but the first. Losses
    are in nats and count by the token; a batch may hold `weight` (B,), which all tokens of a
    sequence have, 0 for padding.
    """

    unit: ClassVar[str] = "tokens"
    """What speed is counted in."""

    input: str = "tokens"
    """The batch's field that holds the tokens."""

    def inputs(self, batch: Batch) -> jax.Array:
        """All tokens but the last, (B, T); `UserError` if the batch has none, or none to
        predict."""
        tokens = _field(batch, self.input, "; set --task.input")
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise UserError(
                f"{self.input!r} has shape {tokens.shape}; the task wants (batch, length) with a"
                " length of 2 or more; give it such tokens, or set --task.input"
            )
        return tokens[:, :-1]

    def units(self, batch: Batch | Shapes) -> int:
        """How many tokens are predicted in a batch."""
        rows, length = batch[self.input].shape
        return rows * (length - 1)

    def check(self, outputs: Any, num_classes: int | None) -> None:
        """`UserError` if the (abstract) outputs have fewer tokens than the data."""
        _check_width(outputs, num_classes, "vocabulary", "tokens")

    def loss(self, outputs: jax.Array, batch: Batch, *, train: bool = True) -> metrics.Sums:
        """Cross-entropy and accuracy of logits (B, T, V), summed over tokens."""
        del train  # the same in both
        targets_BT = _field(batch, self.input, "; set --task.input")[:, 1:]
        if outputs.ndim != 3 or outputs.shape[:2] != targets_BT.shape:
            raise UserError(
                f"outputs have shape {outputs.shape}; the task wants {targets_BT.shape} and the"
                " vocabulary; the model must answer at every place"
            )
        weights = batch.get("weight")
        weights = (
            None
            if weights is None
            else jnp.broadcast_to(weights[:, None], targets_BT.shape).ravel()
        )
        logits, targets = outputs.reshape(-1, outputs.shape[-1]), targets_BT.ravel()
        right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        return {
            "loss": metrics.weighted(losses.cross_entropy(logits, targets), weights),
            "accuracy": metrics.weighted(right, weights),
        }


def _check_width(outputs: Any, wanted: int | None, field: str, what: str) -> None:
    shape = getattr(outputs, "shape", ())
    if wanted is not None and shape and shape[-1] < wanted:
        raise UserError(
            f"--model.{field}={shape[-1]}: the data has {wanted} {what}; set"
            f" --model.{field}={wanted}"
        )


def units_of(task: Any, batch: Batch | Shapes) -> tuple[str, int]:
    """What a task counts speed in, and how many of them a batch holds: its own `unit` and `units`,
    or examples.

    >>> units_of(NextToken(), {"tokens": jnp.zeros((2, 9), jnp.int32)})
    ('tokens', 16)
    """
    if hasattr(task, "units"):
        return task.unit, task.units(batch)
    return "examples", next(iter(batch.values())).shape[0]


def score_of(task: Any) -> Callable[[Mapping[str, float]], float]:
    """What the best checkpoint of a task is chosen by, greater is better: the task's own `score`,
    or the accuracy, or the loss where there is none.

    >>> score_of(Regression())({"loss": 0.25}), score_of(None)({"loss": 0.25, "accuracy": 0.9})
    (-0.25, 0.9)
    """

    def score(values: Mapping[str, float]) -> float:
        return values["accuracy"] if "accuracy" in values else -values["loss"]

    return getattr(task, "score", score)


def _field(batch: Batch, name: str, remedy: str = "") -> jax.Array:
    if name not in batch:
        raise UserError(
            f"batch has keys {', '.join(sorted(batch))}; the task wants {name!r}{remedy}"
        )
    return batch[name]


NAMES = {"classification": Classification(), "regression": Regression(), "next_token": NextToken()}
