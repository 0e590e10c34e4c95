"""Split expressions (`train[:90%]`, `train[55000:]`, `train+test`) and the three parts of a data
set that a run works with.

The language is TFDS's, with its rounding, but strict: a slice past the end, an empty part or an
example named twice is an error.
"""

import dataclasses
import hashlib
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping

import numpy as np

from jaxtrain import messages
from jaxtrain.data import checks
from jaxtrain.data.table import ArrayTable, Table, join, select
from jaxtrain.errors import UserError

_PART = re.compile(
    r"\s*(?P<name>[\w.-]+)\s*(?:\[\s*(?P<start>-?\d+%?)?\s*:\s*(?P<stop>-?\d+%?)?\s*\])?\s*"
)
_SMALL_BYTES = 2**28  # what can be read in a moment, when a run starts
_LOOKED_AT = 10_000_000  # labels that are counted in a moment
_SHAPE_OF_ERROR = "not a split; expected e.g. train, train[:90%], train[55000:] or train+test"


@dataclasses.dataclass(frozen=True)
class Splits:
    """An opened data set: what to train on, what to choose by, what to report; and who it is."""

    train: Table
    validation: Table | None
    test: Table | None
    fingerprint: str
    """A short text that changes when the data does (`digest_of_arrays`, `digest_of_files`)."""
    notes: tuple[str, ...] = ()
    """Warnings for the user, one line each, such as parts that overlap."""
    modified_ns: int | None = None
    """When the newest of its files was changed (`newest_change`); None for data that is made, or
    lies in no file that is known. The fingerprint of large files does not read them, so whoever
    keeps what it derived from the data asks this too."""
    evaluate: Mapping[str, Table] = dataclasses.field(default_factory=dict)
    """Further sets that are evaluated on the way, by name."""

    @property
    def held_out(self) -> dict[str, Table]:
        """Every set that is evaluated but not trained on, by name."""
        own = {"validation": self.validation, "test": self.test}
        return {name: table for name, table in own.items() if table is not None} | dict(
            self.evaluate
        )

    @property
    def on_the_way(self) -> dict[str, Table]:
        """The sets that are evaluated while training: all held-out ones but the test split."""
        return {name: table for name, table in self.held_out.items() if name != "test"}


Piece = tuple[str, int, int]
"""A part of a split: its name, first row and the row past the last."""


def parse(
    expression: str, lengths: Mapping[str, int], flag: str = "--data.train"
) -> tuple[Piece, ...]:
    """What an expression stands for, given how many examples each split has.

    >>> parse("train[:90%]+test", {"train": 1000, "test": 10})
    (('train', 0, 900), ('test', 0, 10))

    `UserError` naming `flag` if it is no expression, names an unknown split, goes past an end,
    names an example twice or is empty.
    """
    problem = f"{flag}={expression!r}"
    pieces: list[Piece] = []
    for text in expression.split("+"):
        match = _PART.fullmatch(text)
        if match is None:
            raise UserError(f"{problem}: {_SHAPE_OF_ERROR}")
        name = match["name"]
        if name not in lengths:
            raise UserError(f"{problem}: {_unknown(name, lengths)}")
        start = _row(match["start"], lengths[name], 0)
        stop = _row(match["stop"], lengths[name], lengths[name])
        if start is None or stop is None:
            raise UserError(f"{problem}: past the end; {name} has {lengths[name]} examples")
        if any(
            other == name and max(first, start) < min(last, stop) for other, first, last in pieces
        ):
            raise UserError(
                f"{problem}: names examples of {name} twice, so an epoch would hold them twice"
            )
        pieces.append((name, start, max(start, stop)))
    if not sum(stop - start for _, start, stop in pieces):
        held = sum(lengths[name] for name in {name for name, _, _ in pieces})
        raise UserError(
            f"{problem}: 0 of {held} examples; take a larger part"
            if held
            else f"{problem}: 0 examples"
        )
    return tuple(piece for piece in pieces if piece[1] < piece[2])


def _row(text: str | None, length: int, default: int) -> int | None:
    """The row that one end of a slice stands for; None if it is past the end."""
    if text is None:
        return default
    # As in TFDS: percents are rounded to the closest row, and negative ends count from the last
    # one.
    percent = text.endswith("%")
    if percent and abs(int(text[:-1])) > 100:
        return None  # of few examples, 101% would be rounded to all of them
    row = round(int(text[:-1]) * length / 100) if percent else int(text)
    row = row + length if row < 0 else row
    return row if 0 <= row <= length else None


def _unknown(name: str, known: Iterable[str]) -> str:
    near = messages.did_you_mean(name, known)
    only = next(iter(known)) if len(list(known)) == 1 else None
    remedy = (
        f" only; cut a part off, e.g. {only}[:90%] and {only}[90%:]" if only and not near else ""
    )
    return f"unknown split {name!r}; valid: {', '.join(known)}{remedy}{near}"


def take(pieces: Iterable[Piece], tables: Mapping[str, Table]) -> Table:
    """The table that parsed pieces stand for."""
    return join(*(select(tables[name], range(start, stop)) for name, start, stop in pieces))


def choose(
    tables: Mapping[str, Table],
    *,
    train: str,
    validation: str,
    test: str,
    fingerprint: str,
    notes: tuple[str, ...] = (),
    modified_ns: int | None = None,
    origin: str = "--data",
    ranges: bool | None = None,
) -> Splits:
    """Cuts a source's tables into the parts that its three expressions name; an empty validation or
    test means none.

    >>> from jaxtrain.data.table import ArrayTable
    >>> parts = choose(
    ...     {"all": ArrayTable({"label": np.arange(10) % 2})},
    ...     train="all[:90%]",
    ...     validation="",
    ...     test="all[80%:]",
    ...     fingerprint="",
    ... )
    >>> len(parts.train), parts.validation, len(parts.test), parts.notes
    (9, None, 2, ('all[:90%] and all[80%:] share 10 % of examples',))

    The values of every split that is named are looked at first (`checks`): `UserError`, beginning
    with `origin`, if they are no numbers, or differ in dtype or (unless `ranges` is False) in
    scale; True means that the source has an image_range to set.
    """
    expressions = {"train": train, "validation": validation, "test": test}
    pieces = cut(expressions, {name: len(table) for name, table in tables.items()})
    used = {
        name: tables[name]
        for name in dict.fromkeys(name for chosen in pieces.values() for name, _, _ in chosen)
    }
    found = [*checks.check_values(used, origin), *checks.check_alike(used, origin, ranges=ranges)]
    parts = {role: take(chosen, tables) for role, chosen in pieces.items()}
    blocks = tuple(
        note
        for role, chosen in pieces.items()
        if (note := _sorted_note(tables, chosen, f"--data.{role}={expressions[role]}"))
    )
    return Splits(
        parts["train"],
        parts.get("validation"),
        parts.get("test"),
        fingerprint,
        (*notes, *found, *overlaps(expressions, pieces), *blocks),
        modified_ns,
    )


def cut(expressions: Mapping[str, str], lengths: Mapping[str, int]) -> dict[str, tuple[Piece, ...]]:
    """What the expression of each role stands for; an empty validation or test means none.

    >>> cut({"train": "all[:90%]", "validation": "", "test": "all[90%:]"}, {"all": 10})
    {'train': (('all', 0, 9),), 'test': (('all', 9, 10),)}
    """
    if not expressions["train"].strip():
        raise UserError(f"--data.train={expressions['train']!r}: {_SHAPE_OF_ERROR}")
    return {
        role: parse(text, lengths, f"--data.{role}")
        for role, text in expressions.items()
        if text.strip()
    }


def overlaps(
    expressions: Mapping[str, str], pieces: Mapping[str, tuple[Piece, ...]]
) -> tuple[str, ...]:
    """A note for each two parts that share examples."""
    return tuple(
        f"{expressions[one]} and {expressions[other]} share {_percent(share)} of examples"
        for one, other in itertools.combinations(pieces, 2)
        if (share := _shared_percent(pieces[one], pieces[other]))
    )


def _sorted_note(tables: Mapping[str, Table], part: tuple[Piece, ...], flag: str) -> str | None:
    """A note if a part is cut from rows that lie class by class, so that it lacks some of them:
    what is learnt of the others says nothing of it."""
    if len(part) != 1:
        return None
    ((name, start, stop),) = part
    labels_N = (tables[name].arrays or {}).get("label")
    if labels_N is None or labels_N.ndim != 1 or len(labels_N) > _LOOKED_AT:
        return None
    classes, held = len(np.unique(labels_N)), len(np.unique(labels_N[start:stop]))
    if held == classes or np.count_nonzero(np.diff(labels_N)) != classes - 1:
        return None
    return (
        f"{flag} holds {held} of {classes} classes, since the rows of {name} lie class by class;"
        " shuffle them before they are saved, x and y by the same"
        " np.random.default_rng(0).permutation(len(y))"
    )


def _shared_percent(one: tuple[Piece, ...], other: tuple[Piece, ...]) -> float:
    """How much of all that two parts cover is covered by both."""
    both = sum(
        max(0, min(a[2], b[2]) - max(a[1], b[1])) for a in one for b in other if a[0] == b[0]
    )
    covered = sum(stop - start for _, start, stop in (*one, *other)) - both
    return 100 * both / covered


def _percent(share: float) -> str:
    return f"{share:.0f} %" if share >= 1 else f"{share:.1g} %"


def digest_of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """A fingerprint of arrays: how many bytes, and a hash over names, dtypes, shapes and contents
    (of a memory map: of 16 rows).

    >>> digest_of_arrays({"x": np.zeros(4, np.uint8)})
    '4 bytes in 1 arrays, 187ecede5138c5fb'
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        # Rows of a memory map are far apart on the disk, and each costs a seek.
        part = (
            array[:: max(1, len(array) // 16)]
            if isinstance(array, np.memmap) and array.ndim
            else array
        )
        digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return (
        f"{sum(array.nbytes for array in arrays.values())} bytes in {len(arrays)} arrays,"
        f" {digest.hexdigest()}"
    )


def digest_of_tables(tables: Mapping[str, ArrayTable]) -> str:
    """A fingerprint of tables in memory, by the name of their split."""
    return digest_of_arrays(
        {
            f"{name}_{split}": array
            for split, table in tables.items()
            for name, array in table.arrays.items()
        }
    )


def digest_of_files(files: Mapping[str, pathlib.Path]) -> str:
    """A fingerprint of files: how many bytes, and a hash over names, sizes and, if all are small,
    contents.

    >>> digest_of_files({})
    '0 bytes in 0 files, e4a6a0577479b2b4'
    """
    sizes = {name: files[name].stat().st_size for name in sorted(files)}
    digest = hashlib.blake2b(digest_size=8)
    for name, size in sizes.items():
        digest.update(f"{name} {size};".encode())
        if sum(sizes.values()) <= _SMALL_BYTES:
            digest.update(files[name].read_bytes())
    return f"{sum(sizes.values())} bytes in {len(sizes)} files, {digest.hexdigest()}"


def newest_change(files: Iterable[pathlib.Path]) -> int | None:
    """When the newest of some files was changed, in nanoseconds since 1970; None without files."""
    return max((file.stat().st_mtime_ns for file in files), default=None)
