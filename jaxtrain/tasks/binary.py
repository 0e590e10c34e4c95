"""Yes or no: one question an example, or several at once, each by a sigmoid of its own.

Dims: B batch, C labels of an example, N examples of a set.
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
class Binary:
    """One label 0 or 1 an example, by the cross-entropy of a sigmoid.

    >>> import jax.numpy as jnp
    >>> sums = Binary().loss(jnp.array([[2.0], [-1.0]]), {"label": jnp.array([1, 1])})
    >>> [float(part) for part in sums["accuracy"]]
    [1.0, 2.0]

    The model gives one logit an example, (B,) or (B, 1); labels are (B,) or (B, 1). A label other
    than 0 and 1 makes loss and accuracy nan, unless it is `ignore`. A batch may hold `weight` (B,),
    0 for padding.
    """

    label_smoothing: fields.Probability = 0.0
    """How far labels are moved towards each other while training: 0 and 1 to half of it and 1 less
    half of it."""
    input: str = "image"
    """The batch's field that the model sees; several as tokens,lengths by position, or as
    ids=tokens,mask=attention_mask by the names of the model's arguments."""
    output: str = ""
    """Which of the model's outputs is the logit, as logits, 0 or head.logits; empty for a model
    that gives nothing else."""
    target: str = "label"
    """The batch's field that holds the labels."""
    ignore: int | None = None
    """A label that is left out of loss, accuracy and count, such as -1."""
    class_weights: tuple[Annotated[float, fields.AtLeast(0)], ...] = ()
    """How much the loss of label 0 and that of label 1 count; the loss is the weighted mean, in
    evaluation too. Empty for both alike."""
    metrics: tuple[
        Literal["auc", "f1", "precision", "recall", "balanced_accuracy", "per_class"], ...
    ] = ()
    """Metrics of a whole set that evaluations add; f1, precision and recall are those of label 1,
    per_class the accuracy of both labels."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", picking.as_text(self.input))

    def inputs(self, batch: Batch) -> Any:
        """The fields named by `input`; `UserError` if the batch lacks one."""
        return picking.inputs_of(batch, self.input)

    def loss(self, outputs: Any, batch: Batch, *, train: bool = True) -> Sums:
        """Cross-entropy and accuracy of logits (B,) or (B, 1); smoothing only counts while
        training."""
        logit_B, label_B = self._pair(outputs, batch)
        label_B, weights_B = labels.left_out(label_B, batch.get("weight"), self.ignore)
        smoothing = self.label_smoothing if train else 0.0
        loss_B = losses.binary_cross_entropy(logit_B, label_B, label_smoothing=smoothing)
        if "label_other" in batch:
            _check_mixed(self, batch, plain=not self.class_weights)
            share_B, other_B = batch["label_weight"], batch["label_other"].reshape(label_B.shape)
            other = losses.binary_cross_entropy(logit_B, other_B, label_smoothing=smoothing)
            loss_B = share_B * loss_B + (1.0 - share_B) * other
            label_B = jnp.where(share_B >= 0.5, label_B, other_B)
        right_B = ((logit_B > 0) == (label_B == 1)).astype(jnp.float32)
        known_B = (label_B == 0) | (label_B == 1)
        return {
            "loss": weighted(loss_B, self._loss_weights(label_B, weights_B)),
            "accuracy": weighted(losses.nan_unless(known_B, right_B), weights_B),
        }

    def check(self, outputs: Any, num_classes: int | None) -> None:
        """`UserError` if the data has more than two classes."""
        if num_classes is not None and num_classes > 2:
            raise UserError(
                f"--task=binary: the data has {num_classes} classes; use --task=classification and"
                f" --model.num_classes={num_classes}"
            )

    def wrong_labels(
        self, rows: labels.Rows, outputs: Any, *, whole: bool = False
    ) -> labels.Wrong | None:
        """The rows whose labels are neither 0 nor 1, or their weights none."""
        found = labels.wrong_bits(rows, self.target, self.ignore, whole=whole)
        return found or labels.wrong_weights(rows)

    def examine(self, outputs: Any, batch: Batch) -> dict[str, jax.Array]:
        """For each example: its label, the prediction, the label's probability, the loss and the
        logit, all (B,); and `weight` 0 where the label is to be ignored."""
        logit_B, label_B = self._pair(outputs, batch)
        label_B, weights_B = labels.left_out(label_B, None, self.ignore)
        loss_B = losses.binary_cross_entropy(logit_B, label_B)
        found = {
            "label": label_B.astype(jnp.int32),
            "prediction": (logit_B > 0).astype(jnp.int32),
            "probability": jnp.exp(-loss_B),
            "loss": loss_B,
            "logit": logit_B,
        }
        return found if weights_B is None else found | {"weight": weights_B}

    def evaluate(self, examined: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The `metrics` of a whole set, from what `examine` gave of every example."""
        label_N, prediction_N = examined["label"], examined["prediction"]
        weights_N = exact.weights_of(examined, label_N.shape)
        values = exact.of_classes(self.metrics, label_N, prediction_N, weights_N)
        right, found, there = (
            part[0]
            for part in exact.counts(label_N[:, None], prediction_N[:, None], weights_N[:, None])
        )
        more = {
            "auc": exact.auc(examined["logit"], label_N, weights_N),
            "f1": float(exact.f1(right, found, there)),
            "precision": float(exact.share(right, found)),
            "recall": float(exact.share(right, there)),
        }
        return values | {name: more[name] for name in self.metrics if name in more}

    def _pair(self, outputs: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The logits and the labels, both (B,)."""
        logits = picking.output_of(outputs, self.output)
        label = losses.whole_numbers(picking.field_of(batch, self.target, "--task.target"))
        rows = logits.shape[:1]
        for what, array in (("outputs", logits), ("labels", label)):
            if array.shape not in (rows, (*rows, 1)):
                raise UserError(
                    f"{what} have shape {array.shape}; the task Binary wants one number an"
                    f" example, {rows} or {(*rows, 1)}, as --model.num_classes=1 gives; for several"
                    " there are the tasks Classification and MultiLabel (--task=multi_label)"
                )
        return logits.reshape(rows), label.reshape(rows)

    def _loss_weights(self, label_B: jax.Array, weights_B: jax.Array | None) -> jax.Array | None:
        if not self.class_weights:
            return weights_B
        if len(self.class_weights) != 2:
            raise UserError(
                f"--task.class_weights={','.join(map(str, self.class_weights))}: has"
                f" {len(self.class_weights)} numbers; give two, for labels 0 and 1"
            )
        each_B = jnp.where(label_B == 1, self.class_weights[1], self.class_weights[0])
        # Of a label that is none the loss is nan, which must count whatever the weights are.
        each_B = jnp.where((label_B == 0) | (label_B == 1), each_B, 1.0)
        return each_B if weights_B is None else each_B * weights_B


@dataclasses.dataclass(frozen=True)
class MultiLabel:
    """Several labels an example, each 0 or 1, by the cross-entropy of a sigmoid for each.

    >>> import jax.numpy as jnp
    >>> batch = {"label": jnp.array([[1, 0], [1, 1]])}
    >>> sums = MultiLabel().loss(jnp.array([[2.0, -1.0], [1.0, -1.0]]), batch)
    >>> [float(part) for part in sums["accuracy"]], [float(part) for part in sums["exact_match"]]
    ([1.5, 2.0], [1.0, 2.0])

    The model gives logits (B, C) for labels (B, C). The loss is the mean over all labels, accuracy
    the share of labels that are right, exact match that of examples of which all are. A label other
    than 0 and 1 makes them nan, unless it is `ignore`. A batch may hold `weight` (B,), 0 for
    padding.
    """

    label_smoothing: fields.Probability = 0.0
    """How far labels are moved towards each other while training: 0 and 1 to half of it and 1 less
    half of it."""
    input: str = "image"
    """The batch's field that the model sees; several as tokens,lengths by position, or as
    ids=tokens,mask=attention_mask by the names of the model's arguments."""
    output: str = ""
    """Which of the model's outputs are the logits, as logits, 0 or head.logits; empty for a model
    that gives nothing else."""
    target: str = "label"
    """The batch's field that holds the labels."""
    ignore: int | None = None
    """A label that is left out of loss, accuracy and count, such as -1 for one that is unknown."""
    metrics: tuple[Literal["auc", "f1_micro", "f1_macro", "per_class"], ...] = ()
    """Metrics of a whole set that evaluations add; auc and f1_macro are means over the labels,
    per_class the accuracy of every label."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", picking.as_text(self.input))

    def inputs(self, batch: Batch) -> Any:
        """The fields named by `input`; `UserError` if the batch lacks one."""
        return picking.inputs_of(batch, self.input)

    def loss(self, outputs: Any, batch: Batch, *, train: bool = True) -> Sums:
        """Cross-entropy, accuracy and exact match of logits (B, C); smoothing only counts while
        training."""
        logits_BC, labels_BC = self._pair(outputs, batch)
        labels_BC, kept_BC = labels.left_out(labels_BC, None, self.ignore)
        smoothing = self.label_smoothing if train else 0.0
        loss_BC = losses.binary_cross_entropy(logits_BC, labels_BC, label_smoothing=smoothing)
        if "label_other" in batch:
            _check_mixed(self, batch, plain=True)
            share_B1, other_BC = batch["label_weight"][:, None], batch["label_other"]
            other = losses.binary_cross_entropy(logits_BC, other_BC, label_smoothing=smoothing)
            loss_BC = share_B1 * loss_BC + (1.0 - share_B1) * other
            labels_BC = jnp.where(share_B1 >= 0.5, labels_BC, other_BC)
        known_BC = (labels_BC == 0) | (labels_BC == 1)
        right_BC = ((logits_BC > 0) == (labels_BC == 1)).astype(jnp.float32)
        right_BC = losses.nan_unless(known_BC, right_BC)
        weights_B = batch.get("weight")
        if kept_BC is None:
            every_B = weights_B
            means = jnp.mean(loss_BC, axis=1), jnp.mean(right_BC, axis=1)
            exact_B = jnp.min(right_BC, axis=1)
        else:
            # Labels that are known count alike, in whichever example they stand.
            share_B = jnp.mean(kept_BC, axis=1)
            count_B = jnp.maximum(jnp.sum(kept_BC, axis=1), 1.0)
            means = tuple(jnp.sum(part * kept_BC, axis=1) / count_B for part in (loss_BC, right_BC))
            every_B = share_B if weights_B is None else weights_B * share_B
            exact_B = jnp.min(jnp.where(kept_BC > 0, right_BC, 1.0), axis=1)
            some_B = (share_B > 0).astype(jnp.float32)
            weights_B = some_B if weights_B is None else weights_B * some_B
        return {
            "loss": weighted(means[0], every_B),
            "accuracy": weighted(means[1], every_B),
            "exact_match": weighted(exact_B, weights_B),
        }

    def wrong_labels(
        self, rows: labels.Rows, outputs: Any, *, whole: bool = False
    ) -> labels.Wrong | None:
        """The rows whose labels are neither 0 nor 1, or their weights none."""
        found = labels.wrong_bits(rows, self.target, self.ignore, whole=whole)
        return found or labels.wrong_weights(rows)

    def examine(self, outputs: Any, batch: Batch) -> dict[str, jax.Array]:
        """For each example: its labels, the predictions, the logits and the losses, all (B, C), and
        `known` (B, C), 0 where a label is to be ignored."""
        logits_BC, labels_BC = self._pair(outputs, batch)
        labels_BC, kept_BC = labels.left_out(labels_BC, None, self.ignore)
        return {
            "label": labels_BC.astype(jnp.int32),
            "prediction": (logits_BC > 0).astype(jnp.int32),
            "logits": logits_BC,
            "loss": losses.binary_cross_entropy(logits_BC, labels_BC),
            "known": jnp.ones(logits_BC.shape, jnp.float32) if kept_BC is None else kept_BC,
        }

    def evaluate(self, examined: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The `metrics` of a whole set, from what `examine` gave of every example."""
        label_NC, prediction_NC = examined["label"], examined["prediction"]
        weights_NC = exact.weights_of(examined, label_NC.shape) * examined["known"]
        right_C, found_C, there_C = exact.counts(label_NC, prediction_NC, weights_NC)
        values: dict[str, float] = {}
        for name in self.metrics:
            if name == "auc":
                values[name] = exact.macro_auc(examined["logits"], label_NC, weights_NC)
            elif name == "f1_micro":
                sums = (part.sum() for part in (right_C, found_C, there_C))
                values[name] = float(exact.f1(*sums))
            elif name == "f1_macro":
                values[name] = float(exact.f1(right_C, found_C, there_C).mean())
            else:
                hits_C = (weights_NC * (label_NC == prediction_NC)).sum(0)
                share_C = exact.share(hits_C, weights_NC.sum(0))
                values |= {
                    f"accuracy_class_{place}": float(each) for place, each in enumerate(share_C)
                }
        return values

    def _pair(self, outputs: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = picking.output_of(outputs, self.output)
        label = losses.whole_numbers(picking.field_of(batch, self.target, "--task.target"))
        if logits.ndim != 2 or label.shape != logits.shape:
            width = label.shape[-1] if label.ndim == 2 else "labels"
            remedy = (
                f"give the model {width} outputs (--model.num_classes={width})"
                if label.ndim == 2
                else "one label an example is the task Classification or Binary"
            )
            raise UserError(
                f"outputs have shape {logits.shape}, labels {label.shape}; the task MultiLabel"
                f" wants (batch, labels) of both; {remedy}"
            )
        return logits, label


def _check_mixed(task: Binary | MultiLabel, batch: Batch, *, plain: bool) -> None:
    """`UserError` where the shares of two mixed labels would not be all that counts."""
    if task.target != "label":
        labels.refuse_mixed(batch, f"mix the field label, not {task.target}")
    if task.ignore is not None or not plain:
        labels.refuse_mixed(batch, "do not go with ignore or class_weights of this task")
