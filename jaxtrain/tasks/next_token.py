"""Language modelling: each token of a sequence from those before it.

Dims: B batch, T tokens to predict, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxtrain import fields, losses, vocabulary_loss
from jaxtrain.errors import UserError
from jaxtrain.metrics import Sums, weighted
from jaxtrain.tasks import labels, of_tokens, picking
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
    unless it is `ignore`. The model gives logits (B, T, V) or `LateLogits`. Evaluation adds the
    perplexity of the whole set.

    A batch may hold `weight`, 0 for padding: (B,), which all tokens of a sequence have, (B, T + 1)
    for its tokens, or (B, T) for those to predict; `segments` (B, T + 1), the number of the
    document that each token is of, 0 for padding: across documents nothing is asked for; `bytes`
    (B,), how long the text of the tokens to predict is in UTF-8, for bits per byte, and `source`
    (B,), the place of each sequence's source in `sources`.
    """

    unit: ClassVar[str] = "tokens"
    """What speed is counted in."""

    input: str = "tokens"
    """The batch's field that holds the tokens; further fields that the model sees follow it, as
    tokens,mask by position or ids=tokens,mask=mask by name, cut as the tokens are where they have
    a value for each. Segments of the data must be named, as tokens=tokens,segments=segments, or
    kept back, as tokens,-segments."""
    output: str = ""
    """Which of the model's outputs are the logits, as logits, 0 or head.logits; empty for a model
    that gives nothing else."""
    ignore: int | None = None
    """A token that is not asked for and not counted, such as -100 or the id of padding; the model
    sees 0 in the place of a negative one."""

    z_loss: fields.NonNegative = 0.0
    """While training, this factor times the squared logarithm of the softmax's denominator is
    added to each token's loss; 1e-4 keeps logits from drifting."""
    label_smoothing: fields.Probability = 0.0
    """Share of the target that is spread evenly over the vocabulary while training."""
    sources: tuple[str, ...] = ()
    """Names of the sources of a mixture, in their order: each has a loss of its own beside the
    common one, as loss_NAME. A mixture of texts brings its names by itself."""

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

    def with_data(self, table: Any) -> "NextToken":
        """Knows what the sources of a mixture are called."""
        return of_tokens.named_by(self, table)

    def score(self, values: Mapping[str, float]) -> float:
        """The loss decides which checkpoint is best: it sees how sure the model is, which the
        share of right guesses does not."""
        return -values["loss"]

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
        """Cross-entropy and accuracy of logits (B, T, V), summed over tokens; z-loss and smoothing
        count while training alone, so that evaluation is the true likelihood."""
        labels.refuse_mixed(batch)
        outputs = picking.output_of(outputs, self.output)
        targets_BT = self._tokens(batch)[:, 1:]
        if outputs.ndim != 3 or outputs.shape[:2] != targets_BT.shape:
            raise UserError(
                f"outputs have shape {outputs.shape}; the task wants {targets_BT.shape} and the"
                " vocabulary; the model must answer at every place"
            )
        weights_BT = self._weights(batch, targets_BT.shape)
        targets_BT, weights_BT = labels.left_out(targets_BT, weights_BT, self.ignore)
        found = vocabulary_loss.scores(
            outputs,
            targets_BT,
            weights_BT,
            known_BT=self._sees_words(batch, outputs.shape[-1]),
            z_loss=self.z_loss if train else 0.0,
            label_smoothing=self.label_smoothing if train else 0.0,
        )
        accuracy = weighted(found.right_BT, weights_BT)
        sums = {"loss": (found.total, accuracy[1]), "accuracy": accuracy}
        if train and not vocabulary_loss.is_off(self.z_loss):
            sums["z_loss"] = weighted(self.z_loss * jnp.square(found.log_z_BT), weights_BT)
        if "source" in batch:
            sums |= of_tokens.by_source(self.sources, found.loss_BT, weights_BT, batch["source"])
        if "bytes" in batch and self.ignore is None and not train:
            bits = of_tokens.bits_per_byte(found.loss_BT, weights_BT, batch["bytes"])
            sums["bits_per_byte"] = bits
        return sums

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """The perplexity of a whole set."""
        return {"perplexity": of_tokens.perplexity(means["loss"])}

    @property
    def _field(self) -> str:
        return picking.first_field(self.input)

    def _tokens(self, batch: Batch) -> jax.Array:
        return losses.whole_numbers(picking.field_of(batch, self._field, picking.FLAG))

    def _sees_words(self, batch: Batch, vocabulary: int) -> jax.Array:
        """Where the token just before is in the vocabulary, (B, T); an embedding would take the
        nearest, or none, without a word."""
        seen_BT = self._tokens(batch)[:, :-1]
        known_BT = losses.are_classes(seen_BT, (*seen_BT.shape, vocabulary))
        return known_BT if self.ignore is None else known_BT | (seen_BT == self.ignore)

    def _weights(self, batch: Batch, shape: tuple[int, ...]) -> jax.Array | None:
        """The weights of the tokens to predict, (B, T)."""
        weights, segments = batch.get("weight"), batch.get("segments")
        whole = (shape[0], shape[1] + 1)
        if weights is not None and weights.shape == whole:
            weights = weights[:, 1:]
        elif weights is not None and weights.shape not in (shape, shape[:1]):
            raise UserError(
                f"weight has shape {weights.shape}; the task wants {shape[:1]}, {shape} or {whole}"
            )
        weights_BT = labels.spread(weights, shape)
        if segments is None:
            return weights_BT
        of_tokens.check_segments(segments, whole)
        same_BT = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
        return jnp.where(same_BT, 1.0 if weights_BT is None else weights_BT, 0.0)
