"""Text: files of documents as rows of tokens, one corpus or a mixture of several.

Without a path it is Python's own library, which every machine has, so that a first run needs no
download.

P: pieces, D: documents
"""

import dataclasses
import functools
import hashlib
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np

from jaxtrain.data import mixture, order, splits
from jaxtrain.data.splits import Piece, Splits
from jaxtrain.data.table import Table
from jaxtrain.data.text import packing, token_cache
from jaxtrain.data.text.pieces import Pieces, documents_of, within
from jaxtrain.data.text.protocol import Tokenizer
from jaxtrain.data.text.token_cache import Tokens
from jaxtrain.data.text.tokenizers import is_learned
from jaxtrain.data.text.windows import is_ragged, windows
from jaxtrain.errors import RowsTooLong, UserError
from jaxtrain.fields import AtLeast, Count, Free, NamedFiles, Public
from jaxtrain.horizon import Horizon
from jaxtrain.messages import counted, printable

KEPT_DOCUMENTS = 100_000
"""From so many documents on a plan of packing is kept beside the tokens; making it anew takes a
second for 3 million."""
NO_LIBRARY = {"test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "antigravity", "this"}
"""Parts of Python's library that are tests, data or jokes."""
CACHE = "~/.cache/jaxtrain/tokens"


@dataclasses.dataclass(frozen=True)
class Rows:
    """How texts become rows, and which part is held out: what one corpus and a mixture share."""

    tokenizer: Annotated[str, Public()] = "bytes"
    """bytes, characters, bpe:4096 (learned from the text), a tokenizer.json, a SentencePiece
    .model, a .gguf, or the folder of a model"""
    length: Count = 256
    """Tokens to predict in each row"""
    layout: Literal["windows", "packed"] = "windows"
    """windows: all text as one long row, cut every length tokens; packed: whole documents side by
    side, which do not see one another"""
    stride: Count | None = None
    """Of windows: tokens from the beginning of one row to that of the next; none = length, 1 =
    every place begins a row"""
    key: Annotated[str, Public()] = "text"
    """The field of JSON lines, or the column of Parquet, that holds the text"""
    separator: str = ""
    """What stands between the documents of plain text, e.g. <|endoftext|>; empty: a file is one
    document"""
    bad: Literal["error", "skip"] = "error"
    """What becomes of broken and empty documents; skip leaves them out and says how many"""
    split_by: Literal["auto", "documents", "tokens"] = "auto"
    """What the expressions below count; auto = documents, but tokens where there is only one"""
    split_seed: Annotated[int | None, AtLeast(0)] = 0
    """In which random order documents are counted there, the same for every --seed; none = that of
    the files"""
    train: str = "all[:90%]"
    """Part to train on"""
    validation: str = "all[90%:]"
    """Part to evaluate on while training; empty for none"""
    test: str = ""
    """Part to evaluate on at the end; empty for none"""
    cache: str = ""
    """Folder that keeps the tokens; empty = ~/.cache/jaxtrain/tokens"""

    def tokens_of(self, paths: Sequence[str], tokenizer: Tokenizer | None = None) -> Tokens:
        """The tokens of files, from the cache or made now; `tokenizer` instead of the one named."""
        files = [str(Path(path).expanduser()) for path in paths] or list(python_library())
        try:
            return token_cache.open_tokens(
                files,
                tokenizer or self.tokenizer,
                cache_dir=self._folder(),
                key=self.key,
                separator=self.separator,
                bad=self.bad,
            )
        except UserError as error:
            raise in_flags(error, self.tokenizer) from error

    def _folder(self) -> Path:
        return cache_folder(self.cache)


def cache_folder(cache: str) -> Path:
    """The folder that keeps tokens, by the flag of a source."""
    return Path(cache or CACHE).expanduser()


def in_flags(error: UserError, tokenizer: str = "") -> UserError:
    """What the cache refuses, in the words of a source's flags; `tokenizer` is what its own says.

    >>> in_flags(UserError("a.jsonl:2: is empty; leave such rows out with bad=skip")).args[0]
    'a.jsonl:2: is empty; leave such rows out with --data.bad=skip'
    """
    words = str(error).replace(" bad=skip", " --data.bad=skip")
    words = words.replace(" by key=", " by --data.key=")
    words = words.replace(" separator=", " --data.separator=")
    if tokenizer:
        flag = f"--data.tokenizer={printable(tokenizer)}: "
        words = words.replace(f"tokenizer {tokenizer!r}: ", flag)
    return UserError(words.replace("another cache_dir", "another --data.cache"))


@dataclasses.dataclass(frozen=True)
class Text(Rows):
    """Files of text as rows of tokens; field `tokens` (length + 1,): int32, or of windows
    that are whole in memory the cache's uint16 or uint32.

    >>> Text(path=("corpus/*.jsonl",), tokenizer="bpe:4096", layout="packed").key
    'text'

    Further fields: `bytes`, the UTF-8 bytes of the text to predict; of packed rows `segments` and
    `weight`, of windows `weight` where the last row is not full (see `data/text/`).
    """

    path: tuple[str, ...] = ()
    """Files, folders or globs, separated by commas: plain text, .jsonl or .parquet; empty =
    Python's own library"""

    def open(self) -> Splits:
        """Tokenises what is not in the cache yet, and cuts rows; `UserError` for a part that holds
        too little text."""
        return of_tokens(self, self.tokens_of(self.path))


@dataclasses.dataclass(frozen=True)
class Mixture(Rows):
    """Several corpora, of which every batch holds its shares; field `source` int32 () says which
    corpus a row is of, besides the fields of `Text`.

    >>> mixed = Mixture(
    ...     sources=(("code", "src/**/*.py"), ("books", "books")),
    ...     weights="code=0.3,books=0.7/50%:code=0.6,books=0.4",
    ... )

    The parts are cut from every corpus alike. Weights may be others when a run goes on: every
    corpus goes on where it was.
    """

    sources: Annotated[tuple[tuple[str, str], ...], NamedFiles()] = ()
    """The corpora, NAME=FILES,...; FILES is a file, a folder or a glob, or python for Python's own
    library"""
    weights: Annotated[str, Free()] = ""
    """Their shares of the examples, e.g. code=0.3,books=0.7, and from a time on others:
    code=0.3,books=0.7/50%:code=0.6,books=0.4; empty = by their size"""

    @classmethod
    def like(cls, rows: Rows) -> Self:
        """A mixture whose rows are those of another source, so that an experiment says them once.

        >>> Mixture.like(Text(length=64, layout="packed")).length
        64
        """
        return cls(**{each.name: getattr(rows, each.name) for each in dataclasses.fields(Rows)})

    def open(self) -> Splits:
        """Opens every corpus; `UserError` for one that holds too little, or for weights that are no
        shares of 1."""
        names = [name for name, _ in self.sources]
        if len(names) < 2:
            raise UserError(
                f"--data.sources: {len(names)} corpora; a mixture has 2 or more, e.g."
                " code=src/**/*.py,books=books"
            )
        mixture.check_names(names, "--data.sources")
        weights = mixture.parse_weights(self.weights, names) if self.weights else ()
        corpora = self._corpora()
        cuts = {name: _cut(self, tokens) for name, tokens in corpora.items()}
        weighted = self.layout == "windows" and any(
            is_ragged(part, self.length, self.stride)
            for cut in cuts.values()
            for part in cut.parts.values()
        )
        opened = {
            name: of_tokens(self, corpora[name], cuts[name], name=name, weighted=weighted)
            for name in names
        }
        return _mixed(opened, weights)

    def _corpora(self) -> dict[str, Tokens]:
        """The tokens of each corpus; a tokenizer that is learned is learned from all of them."""
        paths = {name: () if path == "python" else (path,) for name, path in self.sources}
        if not is_learned(self.tokenizer):
            return {name: self.tokens_of(path) for name, path in paths.items()}
        everything = [file for path in paths.values() for file in (path or python_library())]
        learned = self.tokens_of(everything).tokenizer
        return {name: self.tokens_of(path, learned) for name, path in paths.items()}


@functools.cache
def python_library() -> tuple[str, ...]:
    """The files of Python's own library, without its tests, in an order that is the same
    everywhere.

    >>> any(path.endswith("dataclasses.py") for path in python_library())
    True
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Path] = []
    for name in sorted(sys.stdlib_module_names - NO_LIBRARY):
        place = root / name
        found += [root / f"{name}.py"] if (root / f"{name}.py").is_file() else []
        if (place / "__init__.py").is_file():
            found += sorted(
                path for path in place.rglob("*.py") if not {"test", "tests"} & {*path.parts}
            )
    return tuple(str(path) for path in found if path.stat().st_size)


@dataclasses.dataclass(frozen=True)
class Cut:
    """The parts of a corpus by their role, and what is to be said of them."""

    parts: Mapping[str, Pieces]
    notes: tuple[str, ...]
    flags: Mapping[str, str]
    """How each part was asked for."""


def _cut(rows: Rows, tokens: Tokens) -> Cut:
    """The pieces of the corpus that each role is made of."""
    documents = len(tokens.offsets_D1) - 1
    by_tokens = rows.split_by == "tokens" or (rows.split_by == "auto" and documents == 1)
    count = len(tokens) if by_tokens else documents
    expressions = {"train": rows.train, "validation": rows.validation, "test": rows.test}
    pieces = splits.cut(expressions, {"all": count})
    choose = functools.partial(_tokens if by_tokens else _documents, tokens, rows.split_seed)
    return Cut(
        {role: choose(chosen) for role, chosen in pieces.items()},
        splits.overlaps(expressions, pieces),
        {role: f"--data.{role}={expressions[role]}" for role in pieces},
    )


def _tokens(tokens: Tokens, seed: int | None, chosen: tuple[Piece, ...]) -> Pieces:
    del seed  # of tokens only their order makes a text
    parts = [within(tokens, start, stop) for _, start, stop in chosen]
    return Pieces(
        np.concatenate([part.starts_P for part in parts]),
        np.concatenate([part.lengths_P for part in parts]),
    )


def _documents(tokens: Tokens, seed: int | None, chosen: tuple[Piece, ...]) -> Pieces:
    count = len(tokens.offsets_D1) - 1
    numbers = np.concatenate([np.arange(start, stop) for _, start, stop in chosen])
    if seed is not None:
        numbers = order.permute(seed, 0, numbers.astype(np.uint32), count)
    return documents_of(tokens, np.sort(numbers))


def of_tokens(
    rows: Rows,
    tokens: Tokens,
    cut: Cut | None = None,
    *,
    name: str = "",
    weighted: bool = False,
) -> Splits:
    """The rows of each part of a corpus; `name` is what a mixture calls it."""
    cut = _cut(rows, tokens) if cut is None else cut
    tables: dict[str, Table] = {}
    notes = [*tokens.notes, *cut.notes]
    for role, part in cut.parts.items():
        flag = f"{name}: {cut.flags[role]}" if name else cut.flags[role]
        _check_enough(rows, part, role, flag)
        if rows.layout == "windows":
            tables[role] = windows(tokens, part, rows.length, rows.stride, weighted=weighted)
            continue
        planned = _planned(rows, tokens, part)
        tables[role] = packing.packed(tokens, planned)
        notes.append(planned.note(f"{name} {role}".strip(), len(part.starts_P)))
    if rows.layout == "packed" and rows.stride is not None:
        raise UserError(f"--data.stride={rows.stride}: belongs to --data.layout=windows; drop it")
    documents = len(tokens.offsets_D1) - 1
    return Splits(
        tables["train"],
        tables.get("validation"),
        tables.get("test"),
        fingerprint=f"{len(tokens)} tokens in {documents} documents, {tokens.fingerprint[:16]}",
        notes=tuple(
            type(note)(f"{name}: {note}") if name and note in tokens.notes else note
            for note in notes
        ),
        modified_ns=tokens.modified_ns,
    )


def _check_enough(rows: Rows, part: Pieces, role: str, flag: str) -> None:
    """`UserError` if a part has nothing to predict, or the train part not even one whole row."""
    if part.tokens < 2 or (rows.layout == "packed" and part.lengths_P.max() < 2):
        raise UserError(
            f"{flag}: holds {counted(part.tokens, 'token')}, so there is none to"
            " predict; give it more of the text"
        )
    if role == "train" and part.tokens <= rows.length:
        raise RowsTooLong(
            f"--data.length={rows.length}: {flag} holds {part.tokens} tokens, less than a row;"
            f" use <= {part.tokens - 1}",
            targets=part.tokens - 1,
            stride=rows.stride,
        )


def _planned(rows: Rows, tokens: Tokens, part: Pieces) -> packing.Plan:
    capacity = rows.length + 1

    def make() -> packing.Plan:
        return packing.plan(part, capacity)

    if len(part.starts_P) < KEPT_DOCUMENTS:
        return make()
    who = hashlib.sha256(f"{packing.METHOD} {tokens.fingerprint} {capacity}".encode())
    who.update(np.ascontiguousarray(part.starts_P).data)
    who.update(np.ascontiguousarray(part.lengths_P).data)
    return packing.kept_plan(rows._folder() / "plans", who.hexdigest()[:32], make)


def _mixed(
    opened: Mapping[str, Splits], weights: tuple[tuple[Horizon, mixture.Weights], ...]
) -> Splits:
    """The corpora as one set for each role."""
    roles: dict[str, dict[str, Table]] = {}
    for name, parts in opened.items():
        own = {"train": parts.train, "validation": parts.validation, "test": parts.test}
        for role, table in own.items():
            if table is not None:
                roles.setdefault(role, {})[name] = table
    tables = {
        role: mixture.MixedTable(found, weights if role == "train" else ())
        for role, found in roles.items()
    }
    changes = [parts.modified_ns for parts in opened.values() if parts.modified_ns is not None]
    return Splits(
        tables["train"],
        tables.get("validation"),
        tables.get("test"),
        fingerprint="; ".join(f"{name}: {parts.fingerprint}" for name, parts in opened.items()),
        notes=tuple(dict.fromkeys(note for parts in opened.values() for note in parts.notes)),
        modified_ns=max(changes, default=None),
    )
