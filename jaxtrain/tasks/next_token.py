"""Language modelling: each token of a sequence from those before it.

Dims: B batch, T tokens to predict, V vocabulary, N examples of a set.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxtrain import losses
from jaxtrain.errors import UserError
from jaxtrain.metrics import Sums, weighted
from jaxtrain.tasks import labels, picking
from jaxtrain.tasks.classification import check_width
from jaxtrain.tree import Batch, Shapes


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Each token of a sequence from those before it, by cross-entropy.

    >>> import jax.numpy as jnp
    >>> batch = {"tokens": jnp.array([[0, 1, 2]])}
    >>> sums = NextToken().loss(jnp.eye(4)[None, 1:3], batch)
    >>> [float(part) for part in sums["accuracy"]]
    [2.0, 2.0]

    Of tokens (B, T + 1) the model sees all but the last and is asked for all but the first. Losses
    are in nats and count by the token; a token that is outside the vocabulary makes them nan,
    unless it is `ignore`. A batch may hold `weight`, 0 for padding: (B,), which all tokens of a
    sequence have, (B, T + 1) for its tokens, or (B, T) for those to predict.
    """

    unit: ClassVar[str] = "tokens"
    """What speed is counted in."""

    input: str = "tokens"
    """The batch's field that holds the tokens; further fields that the model sees follow it, as
    tokens,mask by position or ids=tokens,mask=mask by name, cut as the tokens are where they have
    a value for each."""
    output: str = ""
    """Which of the model's outputs are the logits, as logits, 0 or head.logits; empty for a model
    that gives nothing else."""
    ignore: int | None = None
    """A token that is not asked for and not counted, such as -100 or the id of padding; the model
    sees 0 in the place of a negative one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", picking.as_text(self.input))

    def inputs(self, batch: Batch) -> Any:
        """All tokens but the last, (B, T), and the further fields of `input`; `UserError` if the
        batch has none, or none to predict."""
        tokens = self._tokens(batch)
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise UserError(
                f"{self._field!r} has shape {tokens.shape}; the task wants (batch, length) with a"
                " length of 2 or more; give it such tokens, or set --task.input"
            )
        if self.ignore is not None and self.ignore < 0:
            tokens = jnp.where(tokens == self.ignore, jnp.zeros_like(tokens), tokens)
        shape = tokens.shape
        cut = {
            name: array[:, :-1] if array.shape[:2] == shape else array
            for name, array in (dict(batch) | {self._field: tokens}).items()
        }
        return picking.inputs_of(cut, self.input)

    def units(self, batch: Batch | Shapes) -> int:
        """How many tokens are predicted in a batch."""
        rows, length = batch[self._field].shape
        return rows * (length - 1)

    def check(self, outputs: Any, num_classes: int | None) -> None:
        """`UserError` if the (abstract) outputs have fewer tokens than the data."""
        check_width(picking.output_of(outputs, self.output), num_classes, "vocabulary", "tokens")

    def wrong_labels(
        self, rows: labels.Rows, outputs: Any, *, whole: bool = False
    ) -> labels.Wrong | None:
        """The rows that hold tokens outside the vocabulary, or whose weights are none."""
        shape = picking.output_of(outputs, self.output).shape
        found = labels.wrong_classes(
            rows, self._field, shape, self.ignore, whole=whole, what="tokens"
        )
        return found or labels.wrong_weights(rows)

    def loss(self, outputs: Any, batch: Batch, *, train: bool = True) -> Sums:
        """Cross-entropy and accuracy of logits (B, T, V), summed over tokens."""
        del train  # the same in both
        labels.refuse_mixed(batch)
        outputs = picking.output_of(outputs, self.output)
        targets_BT = self._tokens(batch)[:, 1:]
        if outputs.ndim != 3 or outputs.shape[:2] != targets_BT.shape:
            raise UserError(
                f"outputs have shape {outputs.shape}; the task wants {targets_BT.shape} and the"
                " vocabulary; the model must answer at every place"
            )
        weights = self._weights(batch.get("weight"), targets_BT.shape)
        logits, targets = outputs.reshape(-1, outputs.shape[-1]), targets_BT.ravel()
        targets, weights = labels.left_out(targets, weights, self.ignore)
        known = losses.are_classes(targets, logits.shape) & self._sees_words(batch, logits).ravel()
        right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        loss = losses.cross_entropy(logits, targets)
        return {
            "loss": weighted(losses.nan_unless(known, loss), weights),
            "accuracy": weighted(losses.nan_unless(known, right), weights),
        }

    @property
    def _field(self) -> str:
        return picking.first_field(self.input)

    def _tokens(self, batch: Batch) -> jax.Array:
        return losses.whole_numbers(picking.field_of(batch, self._field, picking.FLAG))

    def _sees_words(self, batch: Batch, logits: jax.Array) -> jax.Array:
        """Where the token just before is in the vocabulary, (B, T); an embedding would take the
        nearest, or none, without a word."""
        seen_BT = self._tokens(batch)[:, :-1]
        known_BT = losses.are_classes(seen_BT, (*seen_BT.shape, logits.shape[-1]))
        return known_BT if self.ignore is None else known_BT | (seen_BT == self.ignore)

    def _weights(self, weights: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
        """The weights of the tokens to predict, in one row."""
        if weights is None:
            return None
        whole = weights.shape
        if whole == (shape[0], shape[1] + 1):
            weights = weights[:, 1:]
        elif whole not in (shape, shape[:1]):
            raise UserError(
                f"weight has shape {whole}; the task wants {shape[:1]}, {shape} or"
                f" {(shape[0], shape[1] + 1)}"
            )
        spread = labels.spread(weights, shape)
        return None if spread is None else spread.ravel()
