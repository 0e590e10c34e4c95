"""Tokens of text files, made once and kept: memory-mapped ids, where each document begins, and how
many bytes of text it was.

D: documents, U: units, which are files or parts of them
"""

import bisect
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain import durable_files
from jaxtrain.data.text import documents, token_shards
from jaxtrain.data.text.formats import Documents, Format
from jaxtrain.data.text.protocol import Tokenizer, digest
from jaxtrain.data.text.text_files import TextFile, TextFiles, find_files
from jaxtrain.data.text.token_shards import Column, Job, Unit, id_dtype
from jaxtrain.data.text.token_workers import Progress, tokenize
from jaxtrain.data.text.tokenizers import SAVED, is_learned, learn, open_tokenizer, save
from jaxtrain.errors import UserError
from jaxtrain.messages import Note, bytes_text, printable


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a corpus, in the order of its documents.

    >>> from jaxtrain.data.text.tokenizers import Bytes
    >>> tokens = in_memory(["ab", "c"], Bytes())
    >>> len(tokens), tokens.read(0, 5).tolist(), tokens.offsets_D1.tolist()
    (5, [97, 98, 256, 99, 256], [0, 3, 5])
    >>> tokens.bytes_D.tolist()
    [2, 1]

    Document d is `read(offsets_D1[d], offsets_D1[d + 1])`: `tokenizer.bos`, its text, and the first
    of `tokenizer.eos`, where the tokenizer has them. `bytes_D` counts the UTF-8 bytes of its text.
    """

    shards: tuple[np.ndarray, ...]
    """The ids, uint16 or uint32, in files mapped into memory; `read` hides where one ends."""
    offsets_D1: np.ndarray
    bytes_D: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str
    """Of the tokenizer and of the contents of all files: changes when any token may."""
    modified_ns: int | None
    """When the newest of the files was changed."""
    notes: tuple[str, ...] = ()
    files: tuple[TextFile, ...] = ()
    file_D: np.ndarray | None = None
    row_D: np.ndarray | None = None
    labels_D: tuple[str, ...] = ()
    """Of labelled texts whose files hold the labels."""
    left_out: int = 0
    """How many broken documents were left out."""

    @functools.cached_property
    def _starts(self) -> list[int]:
        return np.cumsum([0, *map(len, self.shards)]).tolist()

    def __len__(self) -> int:
        return int(self.offsets_D1[-1])

    @property
    def dtype(self) -> np.dtype:
        """uint16 where every id fits, else uint32."""
        return id_dtype(self.tokenizer.vocabulary)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids of places start..stop; not to be written to, for it may be the file itself."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        starts, parts = self._starts, []
        shard = max(bisect.bisect_right(starts, start) - 1, 0)
        while start < stop:
            end = min(stop, starts[shard + 1])
            parts.append(self.shards[shard][start - starts[shard] : end - starts[shard]])
            start, shard = end, shard + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def place(self, document: int) -> str:
        """Where a document stands, for messages: `corpus.jsonl:17`."""
        if self.file_D is None or self.row_D is None:
            return f"document {document}"
        return documents.place(self.files[self.file_D[document]], int(self.row_D[document]))


METHOD = token_shards.METHOD


def open_tokens(
    paths: str | Sequence[str],
    tokenizer: str | Tokenizer,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    key: str = "text",
    separator: str = "",
    bad: str = "error",
    processes: int = 0,
    say: Callable[[str], None] | None = None,
) -> Tokens:
    """The tokens of files, folders and globs: read from the cache, or made now and kept there.

    `tokenizer` is one, or its short text (`tokenizers.open_tokenizer`; `characters` and `bpe:N` are
    learned from these files and kept); `key` the field of JSON lines or the column of Parquet;
    `separator` what stands between documents of plain text (empty: a file is one document); `bad`
    is `error` or `skip`: what happens to broken or empty documents, which are counted in `notes`;
    `processes` 0 is one a CPU; `say` takes the lines of progress (stderr if None).

    A file that has changed is tokenised anew, and no other; a process that is killed leaves what
    it finished to the next; two at once make everything once. `UserError` names file and line.
    """
    if bad not in ("error", "skip"):
        raise UserError(f"bad={bad!r}: valid: error, skip")
    found = find_files(paths)
    tokens = open_corpus(
        [paths] if isinstance(paths, str) else paths,
        found,
        Documents(key, separator),
        tokenizer,
        cache_dir=cache_dir,
        stop_at_bad=bad == "error",
        processes=processes,
        say=say,
    )
    if len(tokens.offsets_D1) == 1:
        raise UserError(f"{printable(found.files[0].path)}: holds no document; give a text")
    return tokens


def open_corpus(
    paths: Sequence[str],
    found: TextFiles,
    how: Format,
    tokenizer: str | Tokenizer,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    stop_at_bad: bool = True,
    processes: int = 0,
    say: Callable[[str], None] | None = None,
) -> Tokens:
    """`open_tokens` of whatever a `Format` finds in the files that were found at these paths; there
    may be nothing."""
    folder = (
        Path.home() / ".cache" / "jaxtrain" / "tokens" if cache_dir is None else Path(cache_dir)
    )
    work = _Work(folder.expanduser(), found, how, stop_at_bad, processes, say or _print)
    try:
        return work.open(paths, tokenizer)
    except OSError as error:
        where = str(error.filename or folder)
        why = f"{printable(where)}: {error.strerror}"
        if not where.startswith(str(folder)):
            raise UserError(why) from error
        raise UserError(f"token cache: {why}; give another cache_dir") from error


_LOOKED_AT = 1000
"""Broken examples with no good one among them, after which all are taken for broken."""


def _without_skipping(line: str, noun: str) -> str:
    """A line about a broken example, where leaving such out would leave none."""
    line = line.removesuffix(documents.skipping(noun))
    if "--data=conversations" in line or " by key=" in line or "_key names it)" in line:
        return line
    if "has no key " in line:
        return f"{line}; name the key of the texts by key=NAME"
    return f"{line}; no other {noun} can be used: mend it, or give other files"


@dataclasses.dataclass
class _Work:
    """One opening of a corpus."""

    folder: Path
    found: TextFiles
    how: Format
    stop_at_bad: bool
    processes: int
    say: Callable[[str], None]

    def open(self, paths: Sequence[str], tokenizer: str | Tokenizer) -> Tokens:
        """The tokens, kept or made now."""
        try:
            return self._open(paths, tokenizer)
        except UserError as error:
            if str(error).endswith(documents.skipping(self.how.noun)) and self._all_bad(tokenizer):
                raise UserError(_without_skipping(str(error), self.how.noun)) from error
            raise

    def _all_bad(self, tokenizer: str | Tokenizer) -> bool:
        """Whether the first examples, over all files, are broken, every one of them."""
        seen = 0
        for file in self.found.files:
            learned = isinstance(tokenizer, str) and is_learned(tokenizer)
            if isinstance(tokenizer, str) and not learned:
                tokenizer = open_tokenizer(tokenizer)
            examples = (
                self.how.texts(file)
                if isinstance(tokenizer, str)
                else self.how.encoded(file, documents.WHOLE, tokenizer)
            )
            for one in examples:
                if not isinstance(one, documents.Bad):
                    return False
                if (seen := seen + 1) == _LOOKED_AT:
                    return True
        return True

    def _open(self, paths: Sequence[str], tokenizer: str | Tokenizer) -> Tokens:
        places = [os.path.abspath(os.path.expanduser(path)) for path in paths]
        learned = isinstance(tokenizer, str) and is_learned(tokenizer)
        if isinstance(tokenizer, str) and not learned:
            tokenizer = open_tokenizer(tokenizer)
        who = tokenizer if isinstance(tokenizer, str) else tokenizer.fingerprint
        corpus = digest([METHOD, who, places, *self.how.identity])
        path = self.folder / "corpora" / f"{corpus}.json"
        kept = _read_json(path)
        if kept is not None and (tokens := self._current(kept, path, tokenizer)) is not None:
            return tokens
        for name in ("corpora", "shards", "learned"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        with _Lock(path.with_suffix(".lock"), self.say):
            kept = _read_json(path)  # whoever held the lock may have made it
            if kept is not None and (tokens := self._current(kept, path, tokenizer)) is not None:
                return tokens
            return self._make(kept or {}, path, tokenizer)

    @property
    def _shards(self) -> Path:
        return self.folder / "shards"

    # ---- what is there already

    def _current(
        self, kept: Mapping[str, Any], path: Path, tokenizer: str | Tokenizer
    ) -> Tokens | None:
        """The tokens that were kept, if every file and every shard is what it was."""
        try:
            files = kept["files"]
            if [file["path"] for file in files] != self._paths() or kept["method"] != METHOD:
                return None
            changed = False
            for entry, file in zip(files, self.found.files, strict=True):
                identity = list(token_shards.identity_of(file.path))
                if entry["identity"] != identity or not _settled(identity, entry["seen_ns"]):
                    seen_ns = time.time_ns()
                    if documents.file_digest(file.path) != entry["digest"]:
                        return None
                    if list(token_shards.identity_of(file.path)) != identity:
                        return None
                    entry.update(identity=identity, seen_ns=seen_ns)
                    changed = True
            summaries = []
            for shard in kept["shards"]:
                summary = token_shards.read_summary(self._shards, shard["name"])
                if summary is None:
                    return None
                identity = token_shards.shard_identity(self._shards, shard["name"])
                if shard["identity"] != identity:
                    token_shards.verify(self._shards, summary)
                    shard["identity"], changed = identity, True
                summaries.append(summary)
            tokens = self._assembled(kept, summaries, self._tokenizer(kept, tokenizer))
        except (KeyError, TypeError, AttributeError, FileNotFoundError, token_shards.Damaged):
            return None
        if changed:
            with contextlib.suppress(OSError):  # a cache that only others may write is as good
                durable_files.write_json(path, dict(kept))
        return tokens

    def _paths(self) -> list[str]:
        return [os.path.abspath(file.path) for file in self.found.files]

    def _tokenizer(self, kept: Mapping[str, Any], tokenizer: str | Tokenizer) -> Tokenizer:
        if isinstance(tokenizer, str):
            return open_tokenizer(self.folder / "learned" / kept["learned"] / SAVED)
        return tokenizer

    def _assembled(
        self, kept: Mapping[str, Any], summaries: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
    ) -> Tokens:
        ids, rows, first_units = [], [], [0]
        for summary in summaries:
            shard, rows_D4 = token_shards.open_arrays(self._shards, summary)
            ids.append(shard)
            rows.append(rows_D4)
            first_units.append(first_units[-1] + len(summary["units"]))
        units = [unit for summary in summaries for unit in summary["units"]]
        rows_D4 = np.concatenate(rows)
        unit_D = rows_D4[:, Column.UNIT] + np.repeat(first_units[:-1], list(map(len, rows)))
        begins_U = np.array([part["begins"] for part in kept["parts"]], bool)
        files_U = np.array([part["file"] for part in kept["parts"]], np.int32)
        # a unit that goes on with a document adds to it
        (first_D,) = np.nonzero(begins_U[unit_D])
        tokens_D, bytes_D = (
            np.add.reduceat(rows_D4[:, column], first_D) if len(first_D) else np.zeros(0, np.int64)
            for column in (Column.TOKENS, Column.BYTES)
        )
        of_files = [self.found.files[place] for place in files_U]
        bad_units = list(zip(of_files, units, strict=True))
        if self.stop_at_bad:
            for file, unit in bad_units:
                if unit["bad_count"]:
                    row, why = unit["bad"][0]
                    raise UserError(documents.bad_words(file, row, why, self.how.noun))
        bad_notes = token_shards.bad_notes(bad_units, self.how.noun)
        left_out = sum(unit["bad_count"] for unit in units)
        marks = sum(unit["marks"] for unit in units)
        own_notes = self.how.notes(tokenizer, len(first_D), marks)
        return Tokens(
            shards=tuple(ids),
            offsets_D1=np.concatenate([[0], np.cumsum(tokens_D)]).astype(np.int64),
            bytes_D=bytes_D,
            tokenizer=tokenizer,
            fingerprint=digest(
                [
                    *(METHOD, tokenizer.fingerprint, *self.how.identity),
                    [file["digest"] for file in kept["files"]],
                    left_out,
                ]
            ),
            modified_ns=max(file["identity"][1] for file in kept["files"]),
            notes=(*self.found.notes, *bad_notes, *map(Note, kept.get("notes", [])), *own_notes),
            files=tuple(self.found.files),
            file_D=files_U[unit_D[first_D]],
            row_D=rows_D4[first_D, Column.ROW],
            # shards of before labels were kept are of documents
            labels_D=tuple(label for unit in units for label in unit.get("labels", ())),
            left_out=left_out,
        )

    # ---- what is made

    def _make(self, kept: Mapping[str, Any], path: Path, tokenizer: str | Tokenizer) -> Tokens:
        files = self.found.files
        seen_ns = time.time_ns()
        identities = [token_shards.identity_of(file.path) for file in files]
        part_bytes = _part_bytes(sum(identity[0] for identity in identities))
        with concurrent.futures.ThreadPoolExecutor(self._processes()) as pool:
            surveys = list(pool.map(lambda f: self.how.survey(f, part_bytes), files))
        for file, identity, found in zip(files, identities, surveys, strict=True):
            if token_shards.identity_of(file.path) != identity or found.size != identity[0]:
                raise UserError(token_shards.CHANGED.format(printable(file.path)))
        learned, notes = "", []
        if isinstance(tokenizer, str):
            learned, tokenizer, notes = self._learn(tokenizer, surveys)
        units = self._units(tokenizer, surveys, identities, part_bytes)
        jobs = _jobs(tokenizer.fingerprint, self.how, units, part_bytes)
        summaries = self._run(jobs, tokenizer, self._taken(kept, tokenizer))
        record = {
            "method": METHOD,
            "learned": learned,
            "tokenizer": tokenizer.fingerprint,
            "notes": notes,
            "files": [
                {"path": name, "identity": list(i), "digest": s.digest, "seen_ns": seen_ns}
                for name, i, s in zip(self._paths(), identities, surveys, strict=True)
            ],
            "parts": [{"file": file, "begins": unit.part.begins} for file, unit in units],
            "shards": [
                {"name": job.name, "identity": token_shards.shard_identity(self._shards, job.name)}
                for job in jobs
            ],
        }
        tokens = self._assembled(record, summaries, tokenizer)
        durable_files.write_json(path, record)
        self._remove_unused(kept)
        return tokens

    def _processes(self) -> int:
        if self.processes:
            return self.processes
        mine = getattr(os, "sched_getaffinity", None)  # not on every system
        return len(mine(0)) if mine else os.cpu_count() or 1

    def _learn(
        self, spec: str, surveys: Sequence[documents.Survey]
    ) -> tuple[str, Tokenizer, list[str]]:
        """The tokenizer that is made of this corpus, kept under the digest of its contents."""
        stride, notes = 1, list[str]()
        total = sum(found.size for found in surveys)
        if total > _LEARNED_BYTES and spec != "characters":
            stride = -(-total // _LEARNED_BYTES)
            notes.append(f"tokenizer {spec}: learned from one of {stride} documents, evenly spread")
        contents = [found.digest for found in surveys]
        name = digest([METHOD, spec, *self.how.identity, stride, contents])
        folder = self.folder / "learned" / name
        if not (folder / SAVED).is_file():
            if total >= _LONG_LEARNED_BYTES:
                self.say(f"jaxtrain: learning the tokenizer {spec} from {bytes_text(total)}, once")
            made = learn(spec, itertools.islice(self._texts(), 0, None, stride))
            folder.mkdir(exist_ok=True)
            save(made, folder)
        return name, open_tokenizer(folder / SAVED), notes

    def _texts(self) -> Iterator[str]:
        for file in self.found.files:
            for text in self.how.texts(file):
                if isinstance(text, str):
                    yield text
                elif self.stop_at_bad:
                    raise UserError(documents.bad_words(file, text.row, text.why, self.how.noun))

    def _units(
        self,
        tokenizer: Tokenizer,
        surveys: Sequence[documents.Survey],
        identities: Sequence[tuple[int, ...]],
        part_bytes: int,
    ) -> list[tuple[int, Unit]]:
        units = []
        for place, (file, found) in enumerate(zip(self.found.files, surveys, strict=True)):
            parts = self.how.parts(file, found, tokenizer, part_bytes)
            size = found.size // len(parts)
            units += [
                (place, Unit(file, part, found.digest, identities[place], size)) for part in parts
            ]
        return units

    def _taken(self, kept: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, list[Any]]:
        """Where units lie that an earlier opening made, in shards that are whole."""
        taken: dict[str, list[Any]] = {}
        if kept.get("tokenizer") != tokenizer.fingerprint:
            return taken  # it was learned from the contents before
        for shard in kept.get("shards", ()):
            summary = token_shards.read_summary(self._shards, shard["name"])
            with contextlib.suppress(token_shards.Damaged):
                if summary is not None:
                    token_shards.verify(self._shards, summary)
                    taken |= dict(token_shards.unit_ranges(summary))
        return taken

    def _run(
        self, jobs: Sequence[Job], tokenizer: Tokenizer, taken: Mapping[str, Any]
    ) -> list[Mapping[str, Any]]:
        """Makes the shards that are not there; the summaries of all."""
        done: dict[str, Mapping[str, Any]] = {}
        for job in jobs:
            summary = token_shards.read_summary(self._shards, job.name)
            if summary is None:
                continue
            try:
                token_shards.verify(self._shards, summary)
                done[job.name] = summary
            except token_shards.Damaged as error:
                self.say(f"jaxtrain: token cache: {error}; made again")
        left = {
            job.name: dataclasses.replace(
                job, taken={unit.key: taken[unit.key] for unit in job.units if unit.key in taken}
            )
            for job in jobs
            if job.name not in done
        }
        if left:
            _remove_old_temporaries(self._shards)
            report = Progress(
                sum(unit.size for job in left.values() for unit in job.units), self.say
            )
            made = tokenize(
                list(left.values()),
                tokenizer,
                self.how,
                folder=self._shards,
                stop_at_bad=self.stop_at_bad,
                processes=self._processes(),
                report=report,
            )
            report.finish(sum(unit["tokens"] for each in made for unit in each["units"]))
            done |= {summary["name"]: summary for summary in made}
        return [done[job.name] for job in jobs]

    def _remove_unused(self, before: Mapping[str, Any]) -> None:
        """Deletes the shards of the contents before, unless another corpus has them too."""
        used = set[str]()
        for path in (self.folder / "corpora").glob("*.json"):
            kept = _read_json(path) or {}
            used |= {shard["name"] for shard in kept.get("shards", ())}
        for shard in before.get("shards", ()):
            if shard["name"] not in used:
                token_shards.remove_shard(self._shards, shard["name"])


def _jobs(fingerprint: str, how: Format, units: Sequence[tuple[int, Unit]], size: int) -> list[Job]:
    """Units in shards of about that many bytes, in order."""
    groups: list[list[Unit]] = []
    filled = size
    for _, unit in units:
        if filled >= size:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += unit.size
    return [Job(token_shards.shard_name(fingerprint, how, group), tuple(group)) for group in groups]


def _part_bytes(total: int) -> int:
    """How large a shard's share of the text is: small enough that two processes share little data
    and that a kill costs seconds, and never thousands of files. Powers of two, for a corpus that
    grows a little shall be cut where it was."""
    wanted = min(max(total // 64, 1 << 20), max(32 << 20, total // 2048))
    return 1 << (wanted.bit_length() - 1)


_LEARNED_BYTES, _LONG_LEARNED_BYTES = 1 << 28, 4 << 20
"""How much text a BPE is learned from at most, and from where on that is said."""
_SETTLED_NS = 2_000_000_000
"""A file that was changed so shortly before it was looked at may change again within the same tick
of its file system's clock."""


def _settled(identity: Sequence[int], seen_ns: int) -> bool:
    return max(identity[1], identity[2]) < seen_ns - _SETTLED_NS


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _remove_old_temporaries(folder: Path) -> None:
    """Removes what a killed process left half written."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 86_400:
                path.unlink()


def _print(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class _Lock:
    """Held while a corpus is tokenised; the kernel lets go of it with its process."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say

    def __enter__(self) -> None:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._say("jaxtrain: another process tokenises this text; waiting for it")
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def in_memory(texts: Sequence[str], tokenizer: Tokenizer) -> Tokens:
    """The tokens of a few texts, without files and cache: for tests, and for what is small."""
    dtype = id_dtype(tokenizer.vocabulary)
    per_document = [
        np.concatenate([tokenizer.bos, tokenizer.encode(text), tokenizer.eos[:1]]).astype(dtype)
        for text in texts
    ]
    ids = np.concatenate([np.zeros(0, dtype), *per_document])
    return Tokens(
        shards=(ids,),
        offsets_D1=np.cumsum([0, *map(len, per_document)], dtype=np.int64),
        bytes_D=np.array([len(text.encode()) for text in texts], np.int64),
        tokenizer=tokenizer,
        fingerprint=digest([tokenizer.fingerprint, ids.tobytes().hex()]),
        modified_ns=None,
    )
