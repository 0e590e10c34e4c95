"""Masked language modelling: tokens that are hidden, from all that stand around them.

Dims: B batch, T tokens of a sequence, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from jaxtrain import fields, losses, vocabulary_loss
from jaxtrain.errors import UserError
from jaxtrain.metrics import Sums, weighted
from jaxtrain.tasks import labels, of_tokens, picking
from jaxtrain.tasks.classification import check_width
from jaxtrain.tree import Batch, Shapes

HIDING = ("[MASK]", "<mask>")
"""How the tokens that hide others are written."""
SPECIAL = (*HIDING, "[CLS]", "[SEP]", "[PAD]", "[UNK]", "<s>", "</s>", "<pad>", "<unk>")
"""Tokens that are special in a tokenizer whose files do not say so."""
Share = Annotated[float, fields.Between(0, 1)]


@dataclasses.dataclass(frozen=True)
class MaskedLanguage:
    """Hidden tokens from those around them, by cross-entropy: BERT's task (Devlin et al. 2019).

    >>> task = MaskedLanguage(mask_token=4, vocabulary=4, mask_share=0.5)
    >>> batch = {"tokens": jnp.array([[0, 1, 2, 3]])}
    >>> drawn = task.draw(batch, jax.random.split(jax.random.key(2), 1))
    >>> task.inputs(drawn).tolist(), drawn["masked"].astype(int).tolist()
    ([[0, 4, 2, 4]], [[0, 1, 0, 1]])

    Of tokens (B, T) a share is chosen anew at each step, of each example by its own key, so that
    neither the batch around it nor the mesh matters; in evaluation always the same ones. Of those
    80% are replaced by `mask_token`, 10% by any token, and 10% stay; the model is asked for them
    alone. Special tokens and padding (`weight` 0, (B,) or (B, T), or `segments` 0) are never
    chosen. Losses are in nats and count by the chosen token.
    """

    unit: ClassVar[str] = "tokens"
    """What speed is counted in."""

    input: str = "tokens"
    """The batch's field that holds the tokens; further fields that the model sees follow it, as
    tokens,mask by position or tokens=tokens,segments=segments by name. Segments of the data must
    be named, or kept back, as tokens,-segments."""
    output: str = ""
    """Which of the model's outputs are the logits, as logits, 0 or head.logits; empty for a model
    that gives nothing else."""
    mask_token: int | None = None
    """The token that hides others; none = that of the data's tokenizer, or if it has none one more
    than there are, which needs a model with a token more."""
    special: tuple[int, ...] = ()
    """Tokens that are never chosen, such as those of begin, end and padding; those of the data's
    tokenizer are added."""
    vocabulary: int = 0
    """How many tokens there are to replace others by; 0 for those of the data."""
    mask_share: Share = 0.15
    """The share of tokens that is asked for."""
    hidden_share: Share = 0.8
    """The share of those that is replaced by `mask_token`."""
    random_share: Share = 0.1
    """The share of those that is replaced by any token."""
    sources: tuple[str, ...] = ()
    """Names of the sources of a mixture, in their order: each has a loss of its own beside the
    common one, as loss_NAME. A mixture of texts brings its names by itself."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", picking.as_text(self.input))
        if self.hidden_share + self.random_share > 1:
            raise UserError(
                f"--task.hidden_share={self.hidden_share:g}, --task.random_share="
                f"{self.random_share:g}: are more than 1 together; lower one"
            )

    def with_data(self, table: Any) -> "MaskedLanguage":
        """Knows the vocabulary of the data, the special tokens of its tokenizer, and what the
        sources of a mixture are called."""
        tokenizer, task = getattr(table, "tokenizer", None), of_tokens.named_by(self, table)
        vocabulary = task.vocabulary or table.num_classes or 0
        mask, special = task.mask_token, set(task.special)
        if tokenizer is not None:
            hides = [tokenizer.special.get("mask_token", ""), *HIDING]
            found = {
                text: tokenizer.token_id(text) for text in (*tokenizer.special.values(), *SPECIAL)
            }
            special |= {number for number in found.values() if number is not None}
            known = [found[text] for text in hides if found.get(text) is not None]
            mask = known[0] if mask is None and known else mask
        if mask is None and vocabulary:
            mask = vocabulary
        return dataclasses.replace(
            task, vocabulary=vocabulary, mask_token=mask, special=tuple(sorted(special))
        )

    def inputs(self, batch: Batch) -> Any:
        """The fields named by `input`; `UserError` if the batch lacks one, or the tokens are no
        (batch, length)."""
        tokens = picking.field_of(batch, self._field, picking.FLAG)
        if tokens.ndim != 2:
            raise UserError(
                f"{self._field!r} has shape {tokens.shape}; the task wants (batch, length); give it"
                " such tokens, or set --task.input"
            )
        return picking.inputs_of(batch, self.input)

    def score(self, values: Mapping[str, float]) -> float:
        """The loss decides which checkpoint is best: it sees how sure the model is, which the
        share of right guesses does not."""
        return -values["loss"]

    def units(self, batch: Batch | Shapes) -> int:
        """How many tokens a batch holds."""
        rows, length = batch[self._field].shape
        return rows * length

    def draw(self, batch: Batch, keys_B: jax.Array) -> Batch:
        """The batch with tokens hidden in their field; `original` are all as they were, `masked`
        (B, T) says which of them are asked for."""
        if self.mask_token is None or not self.vocabulary:
            what, flag = ("token that hides others", "mask_token")
            if self.mask_token is not None:
                what, flag = ("number of tokens", "vocabulary")
            raise UserError(f"--task.{flag}: the data does not say the {what}; set it")
        tokens_BT = losses.whole_numbers(picking.field_of(batch, self._field, picking.FLAG))
        shape = tokens_BT.shape[1:]

        def draws(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            uniform, other = jax.random.split(key)
            return (
                jax.random.uniform(uniform, (2, *shape)),
                jax.random.randint(other, shape, 0, self.vocabulary, tokens_BT.dtype),
            )

        uniform_B2T, other_BT = jax.vmap(draws)(keys_B)
        masked_BT = (uniform_B2T[:, 0] < self.mask_share) & self._can_be_masked(batch, tokens_BT)
        how_BT = uniform_B2T[:, 1]
        new_BT = jnp.where(how_BT < self.hidden_share + self.random_share, other_BT, tokens_BT)
        new_BT = jnp.where(how_BT < self.hidden_share, self.mask_token, new_BT)
        hidden_BT = jnp.where(masked_BT, new_BT, tokens_BT)
        return {**batch, self._field: hidden_BT, "original": tokens_BT, "masked": masked_BT}

    def check(self, outputs: Any, num_classes: int | None) -> None:
        """`UserError` if the (abstract) outputs have fewer tokens than the data, or not the one
        that hides others."""
        logits = picking.output_of(outputs, self.output)
        check_width(logits, num_classes, "vocabulary", "tokens")
        highest = max(self.mask_token or 0, self.vocabulary - 1, *self.special)
        if highest >= logits.shape[-1]:
            other = ", or --task.mask_token=TOKEN" if highest == self.mask_token else ""
            raise UserError(
                f"--model.vocabulary={logits.shape[-1]}: the task has a token {highest}; set"
                f" --model.vocabulary={highest + 1}{other}"
            )

    def wrong_labels(
        self, rows: labels.Rows, outputs: Any, *, whole: bool = False
    ) -> labels.Wrong | None:
        """The rows that hold tokens outside the vocabulary, or whose weights are none."""
        shape = picking.output_of(outputs, self.output).shape
        found = labels.wrong_classes(rows, self._field, shape, None, whole=whole, what="tokens")
        return found or labels.wrong_weights(rows)

    def loss(self, outputs: Any, batch: Batch, *, train: bool = True) -> Sums:
        """Cross-entropy and accuracy of logits (B, T, V), summed over the tokens asked for."""
        del train  # the same in both
        labels.refuse_mixed(batch)
        logits = picking.output_of(outputs, self.output)
        if "masked" not in batch:
            raise UserError(
                "the batch has no 'masked': nothing was hidden; call the task's draw(batch, keys)"
                " first, as a step does"
            )
        tokens_BT, masked_BT = batch["original"], batch["masked"]
        if logits.ndim != 3 or logits.shape[:2] != tokens_BT.shape:
            raise UserError(
                f"outputs have shape {logits.shape}; the task wants {tokens_BT.shape} and the"
                " vocabulary; the model must answer at every place"
            )
        weights_BT = labels.spread(batch.get("weight"), tokens_BT.shape)
        weights_BT = jnp.where(masked_BT, 1.0 if weights_BT is None else weights_BT, 0.0)
        found = vocabulary_loss.scores(
            logits, tokens_BT, weights_BT, known_BT=self._sees_words(batch, logits.shape[-1])
        )
        accuracy = weighted(found.right_BT, weights_BT)
        sums = {"loss": (found.total, accuracy[1]), "accuracy": accuracy}
        if "source" in batch:
            sums |= of_tokens.by_source(self.sources, found.loss_BT, weights_BT, batch["source"])
        return sums

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """The perplexity of a whole set, at the tokens asked for."""
        return {"perplexity": of_tokens.perplexity(means["loss"])}

    @property
    def _field(self) -> str:
        return picking.first_field(self.input)

    def _counts(self, batch: Batch, tokens_BT: jax.Array) -> jax.Array:
        """Which tokens are no padding."""
        counts_BT = jnp.ones(tokens_BT.shape, bool)
        if "segments" in batch:
            of_tokens.check_segments(batch["segments"], tokens_BT.shape)
            counts_BT &= batch["segments"] != 0
        weights_BT = labels.spread(batch.get("weight"), tokens_BT.shape)
        if weights_BT is None:
            return counts_BT
        if weights_BT.shape != tokens_BT.shape:
            raise UserError(
                f"weight has shape {weights_BT.shape}; the task wants {tokens_BT.shape[:1]} or"
                f" {tokens_BT.shape}"
            )
        return counts_BT & (weights_BT > 0)

    def _can_be_masked(self, batch: Batch, tokens_BT: jax.Array) -> jax.Array:
        can_BT = self._counts(batch, tokens_BT)
        for token in (*self.special, self.mask_token):
            can_BT &= tokens_BT != token
        return can_BT

    def _sees_words(self, batch: Batch, vocabulary: int) -> jax.Array:
        """Where all tokens of the sequence are in the vocabulary, (B, T); an embedding would take
        the nearest, or none, without a word."""
        tokens_BT = batch["original"]
        known_BT = losses.are_classes(tokens_BT, (*tokens_BT.shape, vocabulary))
        known_B1 = jnp.all(known_BT | ~self._counts(batch, tokens_BT), axis=1, keepdims=True)
        return jnp.broadcast_to(known_B1, tokens_BT.shape)
