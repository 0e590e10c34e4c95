"""Synthetic tokens: sequences of a random Markov chain, whose entropy is known, so that a learnt
loss can be judged against the truth.

Dims: N examples, V vocabulary, S states of the chain (each the last `order` tokens, the oldest
counting most).
"""

import dataclasses
import math
from typing import Annotated

import numpy as np

from jaxtrain.data.splits import Splits, choose, digest_of_tables
from jaxtrain.data.table import ArrayTable
from jaxtrain.errors import UserError
from jaxtrain.fields import Above, AtLeast, Count

EVEN = 0.01
"""The share of every row of the chain that is spread evenly, so that any token may follow and the
chain forgets how it began."""
MOST = 2**22
"""How many numbers the table of a chain may hold."""


@dataclasses.dataclass(frozen=True)
class SyntheticTokens:
    """Sequences drawn from one random chain, in memory; field `tokens` int32 (length + 1,), so that
    there are `length` tokens to predict.

    >>> source = SyntheticTokens(vocabulary=4, order=1, length=8, examples=5)
    >>> source.open().train.fields["tokens"].shape, 0 < source.entropy_rate() < math.log(4)
    ((9,), True)

    Both splits are of the same chain, and more examples change no sequence that was there before.
    """

    vocabulary: Annotated[int, AtLeast(2)] = 32
    """How many tokens there are"""
    order: Count = 2
    """How many tokens the next one depends on; with more than 1 a model must attend to learn it"""
    concentration: Annotated[float, Above(0)] = 0.1
    """How even the choice of the next token is: near 0 almost certain, 1 any distribution alike,
    large nearly uniform"""
    length: Count = 64
    """Tokens to predict in each sequence"""
    examples: Count = 2048
    """How many sequences the train split has; they are held in memory"""
    test_examples: Count = 512
    """How many sequences the test split has"""
    seed: Annotated[int, AtLeast(0)] = 0
    """What is drawn, the chain included; independent of --seed"""
    train: str = "train"
    """Split to train on"""
    validation: str = ""
    """Split to evaluate on while training, e.g. train[90%:]; empty for none"""
    test: str = "test"
    """Split to evaluate on at the end; empty for none"""

    def open(self) -> Splits:
        """Draws the chain, then the sequences; `UserError` if the chain's table would be too
        large."""
        chain_SV = self.chain()
        starts_S = stationary(chain_SV)
        tables = {
            split: ArrayTable(
                {"tokens": self._draw(number, chain_SV, starts_S, size)},
                num_classes=self.vocabulary,
            )
            for number, (split, size) in enumerate(
                {"train": self.examples, "test": self.test_examples}.items(), start=1
            )
        }
        return choose(
            tables,
            train=self.train,
            validation=self.validation,
            test=self.test,
            fingerprint=digest_of_tables(tables),
        )

    def chain(self) -> np.ndarray:
        """The probability (S, V) of each token after each state, float64; every row is drawn from a
        symmetric Dirichlet distribution."""
        largest = int(math.log(MOST, self.vocabulary) + 1e-9) - 1
        if self.order > largest:
            remedy = (
                f"use <= {largest}"
                if largest > 0
                else f"use --data.vocabulary <= {math.isqrt(MOST)}"
            )
            raise UserError(
                f"--data.order={self.order}: a table of {self.vocabulary}^{self.order + 1} numbers,"
                f" more than {MOST}; {remedy}"
            )
        shape = self.vocabulary**self.order, self.vocabulary
        # A row whose numbers are all too small to be held becomes even.
        weights_SV = (
            self._random(0).standard_gamma(self.concentration, shape) + np.finfo(np.float64).tiny
        )
        return (1 - EVEN) * weights_SV / weights_SV.sum(
            axis=1, keepdims=True
        ) + EVEN / self.vocabulary

    def entropy_rate(self) -> float:
        """How much of a token cannot be known from all before it, in nats: the loss that no model
        can beat on long sequences."""
        return self._entropies()[-1]

    def best_loss(self) -> float:
        """The expected loss, in nats a token, of whoever knows the chain: a little above the rate,
        for the first tokens have less before them."""
        entropies = self._entropies()
        # the first token of all is not predicted
        following = [*entropies[1:], *[entropies[-1]] * self.length][: self.length]
        return math.fsum(following) / self.length

    def _entropies(self) -> list[float]:
        """The entropy of a token given 0, 1, ..., `order` tokens before it."""
        chain_SV = self.chain()
        blocks_SV = stationary(chain_SV)[:, None] * chain_SV
        # Entropy of k tokens in a row, for k from 1 to order + 1: the last k of a block, the older
        # ones summed away.
        blocks = [
            _entropy(blocks_SV.reshape(-1, self.vocabulary**count).sum(axis=0))
            for count in range(1, self.order + 2)
        ]
        return [after - before for before, after in zip([0.0, *blocks], blocks, strict=False)]

    def _random(self, number: int) -> np.random.Generator:
        # Philox is NumPy's counter-based generator; its jumps are streams that never meet, so no
        # split depends on the size of another.
        return np.random.Generator(np.random.Philox(self.seed).jumped(number))

    def _draw(
        self, number: int, chain_SV: np.ndarray, starts_S: np.ndarray, size: int
    ) -> np.ndarray:
        """The sequences of one split, all of them a token further at a time; they start in the
        stationary distribution."""
        uniform = self._random(number).random((size, self.length + 1))
        state_N = np.minimum(
            np.searchsorted(np.cumsum(starts_S), uniform[:, 0], side="right"), len(starts_S) - 1
        )
        ends_SV = np.cumsum(chain_SV, axis=1)[:, :-1]
        tokens = np.empty((size, max(self.order, self.length + 1)), np.int32)
        for place in range(self.order):
            tokens[:, place] = (
                state_N // self.vocabulary ** (self.order - 1 - place) % self.vocabulary
            )
        for place in range(self.order, self.length + 1):
            tokens[:, place] = (uniform[:, place, None] >= ends_SV[state_N]).sum(axis=1)
            state_N = state_N * self.vocabulary % len(starts_S) + tokens[:, place]
        return np.ascontiguousarray(tokens[:, : self.length + 1])


def stationary(chain_SV: np.ndarray) -> np.ndarray:
    """The share of time (S,) that a chain spends in each state, float64, exact but for rounding.

    >>> stationary(np.array([[0.5, 0.5], [0.25, 0.75]])).round(6).tolist()
    [0.333333, 0.666667]
    """
    states, vocabulary = chain_SV.shape
    share_S = np.full(states, 1 / states)
    # EVEN alone makes what is left of the start 1e-16 in 3,700 rounds for each token of the order
    for _ in range(10_000):
        # The oldest token of a state is forgotten, and the new one comes last.
        following_S = (share_S[:, None] * chain_SV).reshape(vocabulary, -1).sum(axis=0)
        following_S /= following_S.sum()
        change, share_S = np.abs(following_S - share_S).sum(), following_S
        if change < 1e-14:
            break
    return share_S


def _entropy(share: np.ndarray) -> float:
    """The entropy of a distribution, in nats; what is 0 adds nothing."""
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())
