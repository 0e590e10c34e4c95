"""Mixtures of sources: which source each example of a run is of, by weights that may change on the
way, and which of its own examples it is.

No coin is flipped. The list of sources is halved again and again, and each halving has a phase, to
which every example that comes to it adds the share of the first half, which takes those at which
the phase passes a whole number. So after any number of examples two sources have their shares to
within half an example, four to within one, eight to within one and a half; and any batch to within
twice that. The k-th example of a source is the k-th of its own shuffled epochs; phases and counts
are part of the position. So nothing is read again to go on, a source that is through begins its
next epoch, and weights may be others from any example on: no source loses its place.

S: sources, H: halvings, B: examples of a batch
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import messages
from jaxtrain.data import order
from jaxtrain.data.table import ArrayTable, Table, join, where
from jaxtrain.errors import UserError
from jaxtrain.horizon import Horizon

TOLERANCE = 1e-6
"""How far the sum of weights may be from 1."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_SYNTAX = "NAME=SHARE,NAME=SHARE, and for later other shares WHEN:NAME=SHARE,... behind a slash"

Weights = tuple[float, ...]
"""The share of each source, in their order."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedPosition:
    """Where a mixture stands: `drawn` + 2**32 `wraps` examples are consumed, and of each source
    `offset_S` examples of its epoch `epoch_S`; `phase_H` are the phases of the halvings, in 2**-32.
    All uint32."""

    seed: Any
    drawn: Any
    wraps: Any
    phase_H: Any
    epoch_S: Any
    offset_S: Any


@dataclasses.dataclass(frozen=True)
class Mixed:
    """The order of a mixture: example i is of some source, by the weights, and the next one of that
    source's own order.

    >>> mixed = Mixed(("a", "b"), (4, 3), ((0, (0.75, 0.25)),))
    >>> mixed.sources(mixed.start(0), 8).tolist()
    [0, 0, 1, 0, 0, 0, 1, 0]
    >>> ids = mixed.ids(mixed.start(0), 16)
    >>> sorted(ids[ids < 4][:4].tolist()), sorted(ids[ids >= 4][:3].tolist())
    ([0, 1, 2, 3], [4, 5, 6])

    Ids are those of the tables one after the other.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    """How many examples an epoch of each source has."""
    pieces: tuple[tuple[int, Weights], ...]
    """From which example on which weights hold; the first begins at 0."""

    def start(self, seed: Any) -> MixedPosition:
        """The position before the first example; `seed` may be traced."""
        xp: Any = np if isinstance(seed, int | np.integer) else jnp
        seed = np.uint32(seed) if xp is np else jnp.asarray(seed, jnp.uint32)
        zero, zeros_S = xp.uint32(0), xp.zeros(len(self.names), xp.uint32)
        phase_H = xp.full(len(self.names) - 1, 2**31, xp.uint32)
        return MixedPosition(seed, zero, zero, phase_H, zeros_S, zeros_S)

    def ids(self, position: MixedPosition, count: int, xp: ModuleType = np) -> Any:
        """The ids of the next `count` examples, int32 (count,)."""
        source_B = self.sources(position, count, xp)
        ids_B, first = xp.zeros(count, xp.int32), 0
        for place, (name, length) in enumerate(zip(self.names, self.lengths, strict=True)):
            mine_B = source_B == place
            rank_B = xp.cumsum(mine_B.astype(xp.uint32), dtype=xp.uint32)
            with np.errstate(over="ignore"):  # where the example is of another source
                at_B = _part(position.offset_S, place, xp) + rank_B - xp.uint32(1)
            epoch_B = _part(position.epoch_S, place, xp) + at_B // xp.uint32(length)
            seed = order.subseed(position.seed, name, xp)
            own_B = order.permute(seed, epoch_B, at_B % xp.uint32(length), length, xp)
            ids_B = xp.where(mine_B, own_B + xp.int32(first), ids_B)
            first += length
        return ids_B

    def sources(self, position: MixedPosition, count: int, xp: ModuleType = np) -> Any:
        """The source of each of the next `count` examples, int32 (count,)."""
        return self._draw(position, count, xp)[0]

    def advance(self, position: MixedPosition, count: int) -> MixedPosition:
        """The position after `count` further examples."""
        xp: Any = jnp if isinstance(position.drawn, jax.Array) else np
        source_B, phase_H = self._draw(position, count, xp)
        counts_S = (source_B[:, None] == xp.arange(len(self.names))[None]).sum(axis=0)
        lengths_S = xp.asarray(np.array(self.lengths, np.uint32))
        consumed_S = xp.asarray(position.offset_S) + counts_S.astype(xp.uint32)
        with np.errstate(over="ignore"):
            drawn = (xp.asarray(position.drawn) + xp.uint32(count)).astype(xp.uint32)
        return MixedPosition(
            position.seed,
            drawn,
            (position.wraps + (drawn < position.drawn)).astype(xp.uint32),
            phase_H,
            xp.asarray(position.epoch_S) + consumed_S // lengths_S,
            consumed_S % lengths_S,
        )

    def _draw(self, position: MixedPosition, count: int, xp: ModuleType) -> tuple[Any, Any]:
        """The source of each of the next examples, and the phases after them."""
        begins = self._begins(position, count, xp)
        source_B = xp.zeros(count, xp.int32)
        comes = {(0, len(self.names)): xp.ones(count, bool)}
        phases = []
        for number, (low, middle, high) in enumerate(_halvings(0, len(self.names))):
            here_B = comes.pop((low, high))
            share_B, all_B = xp.zeros(count, xp.uint32), xp.zeros(count, bool)
            for begins_B, (_, weights) in zip(begins, self.pieces, strict=True):
                share = _share(weights, low, middle, high)
                share_B = xp.where(begins_B, xp.uint32(share % 2**32), share_B)
                all_B = xp.where(begins_B, share == 2**32, all_B)
            added_B = xp.where(here_B, share_B, xp.uint32(0))
            with np.errstate(over="ignore"):
                phase_B = _part(position.phase_H, number, xp) + xp.cumsum(added_B, dtype=xp.uint32)
            # a sum that has passed 2**32 is smaller than what was added last
            takes_B = here_B & ((phase_B < share_B) | all_B)
            phases.append(phase_B[-1])
            for first, last, mine_B in ((low, middle, takes_B), (middle, high, here_B & ~takes_B)):
                comes[first, last] = mine_B
                if last == first + 1:
                    source_B = xp.where(mine_B, xp.int32(first), source_B)
        return source_B, xp.stack(phases).astype(xp.uint32)

    def _begins(self, position: MixedPosition, count: int, xp: ModuleType) -> list[Any]:
        """For each piece which of the next examples lie behind its beginning."""
        drawn = xp.asarray(position.drawn).astype(xp.uint32)
        with np.errstate(over="ignore"):
            place_B = drawn + xp.arange(count, dtype=xp.uint32)
            wraps_B = xp.asarray(position.wraps).astype(xp.uint32) + (place_B < drawn)
        found = []
        for first, _ in self.pieces:
            high, low = xp.uint32(first >> 32), xp.uint32(first & 0xFFFFFFFF)
            found.append((wraps_B > high) | ((wraps_B == high) & (place_B >= low)))
        return found


def _halvings(low: int, high: int) -> Iterator[tuple[int, int, int]]:
    """How sources low..high are halved: first, middle and last, the whole list first.

    >>> list(_halvings(0, 3))
    [(0, 2, 3), (0, 1, 2)]
    """
    if high - low > 1:
        middle = (low + high + 1) // 2
        yield low, middle, high
        yield from _halvings(low, middle)
        yield from _halvings(middle, high)


def _share(weights: Weights, low: int, middle: int, high: int) -> int:
    """The share of sources low..middle in that of low..high, in 2**-32."""
    whole = math.fsum(weights[low:high])
    return round(math.fsum(weights[low:middle]) / whole * 2**32) if whole else 0


def _part(array_S: Any, place: int, xp: ModuleType) -> Any:
    return xp.asarray(array_S)[place].astype(xp.uint32)


# ---- weights as text


def parse_weights(
    text: str, names: Sequence[str], flag: str = "--data.weights"
) -> tuple[tuple[Horizon, Weights], ...]:
    """When which weights begin.

    >>> parse_weights("code=0.7,books=0.3/50%:code=0.2,books=0.8", ["books", "code"])[1]
    (Horizon(value=50.0, unit='percent'), (0.8, 0.2))

    `UserError` naming `flag` if a source is unknown or has no weight, or weights are no shares
    of 1.
    """
    pieces: list[tuple[Horizon, Weights]] = []
    shown = f"{flag}={messages.shown(text)}"
    for number, part in enumerate(text.split("/")):
        when, colon, shares = part.rpartition(":")
        if bool(colon) != bool(number):
            problem = "begins later, so say when" if number else "holds from the first step on"
            raise UserError(f"{shown}: {part!r} {problem}; expected {_SYNTAX}")
        try:
            start = Horizon.parse(when) if colon else Horizon(0)
        except ValueError as error:
            raise UserError(f"{shown}: {error}") from None
        pieces.append((start, _shares(shares, names, shown)))
    for place, name in enumerate(names):
        if not any(weights[place] for _, weights in pieces):
            raise UserError(f"{shown}: {name} has the weight 0 throughout; leave the source out")
    return tuple(pieces)


def _shares(text: str, names: Sequence[str], shown: str) -> Weights:
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, share = part.strip().partition("=")
        if not equals:
            raise UserError(f"{shown}: {part!r} is no share; expected {_SYNTAX}")
        if name not in names:
            near = messages.did_you_mean(name, names)
            raise UserError(f"{shown}: unknown source {name!r}; valid: {', '.join(names)}{near}")
        if name in found:
            raise UserError(f"{shown}: {name} has two weights; give one")
        if not messages.is_number(share) or not math.isfinite(float(share)):
            raise UserError(f"{shown}: {share!r} is no number; expected e.g. {name}=0.5")
        found[name] = float(share)
        if found[name] < 0:
            raise UserError(f"{shown}: the weight of {name} is {share}; must be >= 0")
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{shown}: no weight for {', '.join(missing)}; give one, or 0")
    total = math.fsum(found.values())
    if total == 0:
        raise UserError(f"{shown}: all weights are 0; they are shares of 1")
    if abs(total - 1) > TOLERANCE:
        right = ",".join(f"{name}={found[name] / total:.6g}" for name in found)
        raise UserError(f"{shown}: sum to {total:.6g}; they are shares of 1, so write {right}")
    return tuple(found[name] for name in names)


def check_names(names: Sequence[str], flag: str) -> None:
    """`UserError` for a source whose name no weight could give, or that is there twice."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{flag}: {name!r} is no name of a source; use letters, digits, points, - and _"
            )
        if list(names).count(name) > 1:
            raise UserError(f"{flag}: {name} is there twice; give each source a name of its own")


# ---- the table of a mixture


class MixedTable:
    """The tables of several sources as one, with a further field `source`, int32 (): the place of a
    row's source among `source_names`.

    `order` says in which order a run draws from them. An epoch is as many examples as all sources
    have together; of which source they are is up to the weights.
    """

    class_names = None

    def __init__(
        self,
        tables: Mapping[str, Table],
        weights: tuple[tuple[Horizon, Weights], ...] = (),
    ) -> None:
        self.source_names = tuple(tables)
        self.tokenizer = getattr(next(iter(tables.values())), "tokenizer", None)
        self._lengths = tuple(map(len, tables.values()))
        self._joined = join(*tables.values())
        self._ends_S = np.cumsum(self._lengths)
        by_size = tuple(length / sum(self._lengths) for length in self._lengths)
        self._weights = weights or ((Horizon(0), by_size),)
        self.num_classes = self._joined.num_classes
        self.arrays: Mapping[str, np.ndarray] | None = None
        if isinstance(self._joined, ArrayTable):
            sources = np.repeat(np.arange(len(tables), dtype=np.int32), self._lengths)
            self.arrays = {**self._joined.arrays, "source": sources}
        self._tables = tuple(tables.values())

    @property
    def fields(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """As in every source, and `source`."""
        source = jax.ShapeDtypeStruct((), np.dtype("int32"))
        return {**self._joined.fields, "source": source}

    def __len__(self) -> int:
        return sum(self._lengths)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows at `indices`, each from its source."""
        source = np.searchsorted(self._ends_S, indices, side="right").astype(np.int32)
        return {**self._joined.read(indices), "source": source}

    def where(self, index: int) -> str:
        """Where a row stands, and in which source."""
        source = int(np.searchsorted(self._ends_S, index, side="right"))
        first = int(self._ends_S[source]) - self._lengths[source]
        return f"{self.source_names[source]}: {where(self._tables[source], index - first)}"

    def order(
        self, *, batch_size: int, total_steps: float, tokens_per_step: float | None = None
    ) -> Mixed:
        """In which order a run of so many steps draws; `UserError` if weights begin beyond it."""
        pieces: list[tuple[int, Weights]] = []
        for start, weights in self._weights:
            step = round(
                start.steps(
                    total_steps=total_steps,
                    steps_per_epoch=len(self) / batch_size,
                    tokens_per_step=tokens_per_step,
                )
            )
            if pieces and step * batch_size <= pieces[-1][0]:
                raise UserError(
                    f"--data.weights: those from {start} on begin at step {step}, not after those"
                    f" before them (step {pieces[-1][0] // batch_size}); put them in order"
                )
            pieces.append((step * batch_size, weights))
        return Mixed(self.source_names, self._lengths, tuple(pieces))


def order_of(
    table: Table, *, batch_size: int, total_steps: float, tokens_per_step: float | None = None
) -> order.Order:
    """In which order a run draws the examples of a table: shuffled, or as a mixture says.

    >>> order_of(ArrayTable({"label": np.arange(5)}), batch_size=2, total_steps=9)
    Shuffled(length=5)
    """
    if isinstance(table, MixedTable):
        return table.order(
            batch_size=batch_size, total_steps=total_steps, tokens_per_step=tokens_per_step
        )
    return order.Shuffled(len(table))
