"""Classification: one label an example, by cross-entropy over classes.

Dims: B batch, C classes, N examples of a set.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import fields, losses
from jaxtrain.errors import UserError
from jaxtrain.metrics import Sums, ratio, weighted
from jaxtrain.tasks import exact, labels, picking
from jaxtrain.tree import Batch


@dataclasses.dataclass(frozen=True)
class Classification:
    """One label an example, by cross-entropy.

    >>> import jax.numpy as jnp
    >>> batch = {"image": jnp.zeros((2, 8, 8, 1)), "label": jnp.array([1, 2])}
    >>> sums = Classification().loss(jnp.eye(4)[:2], batch)
    >>> [float(part) for part in sums["accuracy"]]
    [0.0, 2.0]

    Labels are class numbers (B,), or (B, ...) where the model answers at every place of an example,
    or probabilities for each class: one-hot or soft labels. A label that is no class makes loss and
    accuracy nan, unless it is `ignore`. A batch may hold `weight` (B,), 0 for padding, and
    `label_other` (B,) with `label_weight` (B,), the share of `label`, where mixup or cutmix made
    examples of two. Then accuracy counts the label of the greater share.
    """

    label_smoothing: fields.Probability = 0.0
    """Share of the target that is spread evenly over all classes while training."""
    input: str = "image"
    """The batch's field that the model sees; several as tokens,lengths by position, or as
    ids=tokens,mask=attention_mask by the names of the model's arguments. Segments of tokens must be
    named, or kept back, as tokens,-segments."""
    output: str = ""
    """Which of the model's outputs are the logits, as logits, 0 or head.logits; empty for a model
    that gives nothing else."""
    target: str = "label"
    """The batch's field that holds the labels."""
    ignore: int | None = None
    """A label that is left out of loss, accuracy and count, such as -1, -100 or 255."""
    class_weights: tuple[Annotated[float, fields.AtLeast(0)], ...] = ()
    """How much the loss of each class counts, one number a class; the loss is the weighted mean,
    in evaluation too. Empty for all alike."""
    top_k: tuple[fields.Count, ...] = ()
    """Also the share of labels among the k greatest logits, as top5 for 5."""
    metrics: tuple[
        Literal["auc", "f1_macro", "f1_micro", "balanced_accuracy", "per_class"], ...
    ] = ()
    """Metrics of a whole set that evaluations add: auc is the mean over classes of each against the
    rest (of two classes that of the second), per_class the accuracy of every class."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", picking.as_text(self.input))

    def inputs(self, batch: Batch) -> Any:
        """The fields named by `input`; `UserError` if the batch lacks one."""
        return picking.inputs_of(batch, self.input)

    def loss(self, outputs: Any, batch: Batch, *, train: bool = True) -> Sums:
        """Cross-entropy and accuracy of logits (B, C); smoothing only counts while training, so
        that evaluation is the true likelihood."""
        logits = self._logits(outputs)
        smoothing = self.label_smoothing if train else 0.0
        label, others = self._labels(batch, logits)
        parts: list[tuple[jax.Array, jax.Array | None]] = [(label, None)]
        if others is not None:
            parts = [(label, others[1]), (others[0], 1.0 - others[1])]
        weights = labels.spread(batch.get("weight"), logits.shape[:-1])
        main = label
        if others is not None:
            larger = (others[1] >= 0.5).reshape(-1, *(1,) * (label.ndim - 1))
            main = jnp.where(larger, label, others[0])
        main, kept = self._left_out(main, weights, logits)
        known = losses.are_classes(main, logits.shape)
        number = jnp.argmax(main, axis=-1) if main.ndim == logits.ndim else main
        right = (jnp.argmax(logits, axis=-1) == number).astype(jnp.float32)
        sums = {
            "loss": self._mean_loss(logits, parts, weights, smoothing),
            "accuracy": weighted(losses.nan_unless(known, right), kept),
        }
        for count in self.top_k:
            among = losses.nan_unless(known, _among_top(logits, number, count))
            sums[f"top{count}"] = weighted(among, kept)
        return sums

    def check(self, outputs: Any, num_classes: int | None) -> None:
        """`UserError` if the (abstract) outputs have fewer classes than the data."""
        check_width(picking.output_of(outputs, self.output), num_classes, "num_classes", "classes")

    def wrong_labels(
        self, rows: labels.Rows, outputs: Any, *, whole: bool = False
    ) -> labels.Wrong | None:
        """The rows whose labels are no classes of (abstract) outputs, or their weights none."""
        shape = picking.output_of(outputs, self.output).shape
        found = labels.wrong_classes(rows, self.target, shape, self.ignore, whole=whole)
        return found or labels.wrong_weights(rows)

    def examine(self, outputs: Any, batch: Batch) -> dict[str, jax.Array]:
        """For each example: its label, the prediction, the label's probability and the loss, all
        (B,); `weight` 0 where the label is to be ignored, and `logits` (B, C) if a metric needs
        them."""
        logits = self._logits(outputs)
        label, weights = self._left_out(self._labels(batch, logits)[0], None, logits)
        loss_B = losses.cross_entropy(logits, label)
        prediction_B = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        number = jnp.argmax(label, axis=-1) if label.ndim == logits.ndim else label
        found = {
            "label": number.astype(jnp.int32),
            "prediction": prediction_B,
            "probability": jnp.exp(-loss_B),
            "loss": loss_B,
        }
        if weights is not None:
            found["weight"] = weights
        return found | ({"logits": logits} if "auc" in self.metrics else {})

    def evaluate(self, examined: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The `metrics` of a whole set, from what `examine` gave of every example."""
        label_N, weights_N = (
            examined["label"].ravel(),
            exact.weights_of(examined, examined["label"].shape).ravel(),
        )
        values = exact.of_classes(self.metrics, label_N, examined["prediction"].ravel(), weights_N)
        if "auc" in self.metrics:
            scores_NC = exact.log_softmax(
                examined["logits"].reshape(-1, examined["logits"].shape[-1])
            )
            classes = scores_NC.shape[1]
            if classes == 2:
                # The difference of two log-probabilities orders as the probability does, without
                # its ties near 1.
                values["auc"] = exact.auc(scores_NC[:, 1] - scores_NC[:, 0], label_N, weights_N)
            else:
                values["auc"] = exact.macro_auc(
                    scores_NC,
                    label_N[:, None] == np.arange(classes),
                    np.broadcast_to(weights_N[:, None], scores_NC.shape),
                )
        return values

    def _logits(self, outputs: Any) -> jax.Array:
        logits = picking.output_of(outputs, self.output)
        if logits.ndim < 2 or logits.shape[-1] == 1:
            raise UserError(
                f"outputs have shape {logits.shape}: classes need (batch, classes), with 2 or"
                " more; give the model 2 outputs (--model.num_classes=2), or take the task Binary"
                " (--task=binary), which wants one"
            )
        return logits

    def _labels(
        self, batch: Batch, logits: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """The labels, and those of the other example and the share of the first, if mixed."""
        label = losses.whole_numbers(picking.field_of(batch, self.target, "--task.target"))
        losses.check_label_shape(logits.shape, label.shape)
        if "label_other" not in batch:
            return label, None
        if self.target != "label":
            labels.refuse_mixed(batch, f"mix the field label, not {self.target}")
        return label, (losses.whole_numbers(batch["label_other"]), batch["label_weight"])

    def _left_out(
        self, label: jax.Array, weights: jax.Array | None, logits: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        if label.ndim < logits.ndim or self.ignore is None:
            return labels.left_out(label, weights, self.ignore)
        out = jnp.all(label == self.ignore, axis=-1)
        kept = jnp.where(out, 0.0, 1.0 if weights is None else weights)
        return jnp.where(out[..., None], 1.0 / logits.shape[-1], label), kept

    def _mean_loss(
        self,
        logits: jax.Array,
        parts: list[tuple[jax.Array, jax.Array | None]],
        weights: jax.Array | None,
        smoothing: float | jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """The sum and the count of the loss over labels and the shares that they have of their
        examples."""
        plain = self.ignore is None and not self.class_weights
        loss, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
        for place, (label, share_B) in enumerate(parts):
            label, kept = self._left_out(label, None, logits)
            one = losses.cross_entropy(logits, label, label_smoothing=smoothing)
            if share_B is None and plain:
                return weighted(one, weights)
            share = 1.0 if share_B is None else share_B.reshape(-1, *(1,) * (one.ndim - 1))
            if not plain:
                share = share * self._class_weight(label, logits)
                share = share if kept is None else jnp.where(kept > 0, share, 0.0)
                # What counts nothing is left out, even where it is nan.
                one = jnp.where(share == 0, 0.0, one)
                count = count + share
            loss = share * one if place == 0 else loss + share * one
        return weighted(loss, weights) if plain else ratio(loss, count, weights)

    def _class_weight(self, label: jax.Array, logits: jax.Array) -> jax.Array:
        """How much each label counts by its class; nan where it is none."""
        num_classes = logits.shape[-1]
        known = losses.are_classes(label, logits.shape)
        if not self.class_weights:
            return losses.nan_unless(known, jnp.ones(label.shape[: logits.ndim - 1], jnp.float32))
        if len(self.class_weights) != num_classes:
            raise UserError(
                f"--task.class_weights={','.join(map(str, self.class_weights))}: has"
                f" {len(self.class_weights)} numbers, the model {num_classes} classes; give one for"
                " each"
            )
        soft = label.ndim == logits.ndim
        shares = label.astype(jnp.float32) if soft else losses.shares_of(label, num_classes)
        weights_C = jnp.asarray(self.class_weights, jnp.float32)
        each = jnp.sum(shares * weights_C.reshape((1,) * (shares.ndim - 1) + (-1,)), axis=-1)
        return losses.nan_unless(known, each)


def _among_top(logits: jax.Array, label: jax.Array, count: int) -> jax.Array:
    """1 where fewer than `count` classes are ahead of the label, equal ones in the order of their
    numbers, as argmax has it."""
    num_classes = logits.shape[-1]
    if count > num_classes:
        raise UserError(
            f"--task.top_k={count}: the model has {num_classes} classes; use <= {num_classes}"
        )
    chosen = losses.shares_of(label, num_classes) > 0
    own = jnp.sum(jnp.where(chosen, logits, 0), axis=-1, keepdims=True)
    numbers = jnp.arange(num_classes).reshape((1,) * label.ndim + (-1,))
    # Not "greater": of logits that are nan every class is ahead.
    ahead = ~(logits <= own) | ((logits == own) & (numbers < label[..., None]))
    return (jnp.sum(ahead, axis=-1) < count).astype(jnp.float32)


def check_width(outputs: Any, wanted: int | None, field: str, what: str) -> None:
    """`UserError` if (abstract) outputs have fewer classes, or tokens, than the data."""
    shape = getattr(outputs, "shape", ())
    if wanted is not None and shape and shape[-1] < wanted:
        raise UserError(
            f"--model.{field}={shape[-1]}: the data has {wanted} {what}; set"
            f" --model.{field}={wanted}"
        )
