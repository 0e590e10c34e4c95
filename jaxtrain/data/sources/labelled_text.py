"""Texts with classes: files of labelled texts as padded rows of tokens, one text a row.

N: texts, T: tokens of a row, D: texts of the files
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np

from jaxtrain.data.sources.text import cache_folder, in_flags
from jaxtrain.data.splits import Splits, choose, digest_of_tables
from jaxtrain.data.table import ArrayTable
from jaxtrain.data.text import documents, labelled_files
from jaxtrain.data.text.documents import Bad
from jaxtrain.data.text.formats import LabelledTexts
from jaxtrain.data.text.labelled_files import find_labelled
from jaxtrain.data.text.protocol import Tokenizer
from jaxtrain.data.text.text_files import TextFiles
from jaxtrain.data.text.token_cache import Tokens, open_corpus
from jaxtrain.errors import UserError
from jaxtrain.fields import AtLeast, Count, Public
from jaxtrain.messages import Note, did_you_mean, printable


@dataclasses.dataclass(frozen=True)
class _Text:
    """A text as ids, its label as it is written, and the place that messages to the user name."""

    ids_N: np.ndarray
    label: str
    place: str


@dataclasses.dataclass(frozen=True)
class LabelledText:
    """Texts with one class each, from CSV, JSON lines or Parquet with a column of texts and one of
    labels, or from a folder that holds a folder of .txt files for each class.

    Fields: `tokens` int32 (length,), with what the tokenizer puts before and after a text;
    `segments` int32 (length,), 1 for those and 0 for padding; `label`.
    """

    path: str = ""
    """A file of CSV, TSV, JSON lines or Parquet, a glob, or a folder of such files or of folders of
    .txt, one for each class; files or folders called train, validation and test are splits of those
    names, else there is one, called all"""
    text_key: Annotated[str, Public()] = "text"
    """The column, or the key of JSON lines, that holds the text"""
    label_key: Annotated[str, Public()] = "label"
    """The column, or the key of JSON lines, that holds the class"""
    classes: tuple[str, ...] = ()
    """The classes in the order of their numbers; empty = all labels that there are, sorted"""
    tokenizer: Annotated[str, Public()] = "bytes"
    """bytes, characters, bpe:4096 (learned from the text), a tokenizer.json, a SentencePiece
    .model, a .gguf, or the folder of a model"""
    length: Count = 128
    """Tokens of each row"""
    too_long: Literal["error", "cut", "skip"] = "error"
    """What becomes of texts that are longer than a row: cut takes their beginning, skip leaves them
    out; both say how many"""
    bad: Literal["error", "skip"] = "error"
    """What becomes of rows that hold no text or no class; skip leaves them out and says how many"""
    split_seed: Annotated[int | None, AtLeast(0)] = 0
    """In which random order the texts of a split are counted below, the same for every --seed; none
    = that of the files"""
    train: str = "all[:80%]"
    """Part to train on"""
    validation: str = "all[80%:90%]"
    """Part to evaluate on while training; empty for none"""
    test: str = "all[90%:]"
    """Part to evaluate on at the end; empty for none"""
    cache: str = ""
    """Folder that keeps the tokens; empty = ~/.cache/jaxtrain/tokens"""

    def open(self) -> Splits:
        """Tokenises what is not in the cache yet; `UserError`, with file and row, for what is no
        text with a class."""
        if not self.path:
            raise UserError(
                "--data.path='': no file given; give CSV, JSON lines or Parquet, or a folder that"
                " holds a folder of .txt files for each class"
            )
        files, notes = find_labelled(self.path)
        tokens = self._tokens(files, notes)
        notes = [*tokens.notes]
        texts = self._read(files, tokens)
        everything = [one for split in texts.values() for one in split]
        classes = self._classes(everything)
        tables: dict[str, ArrayTable] = {}
        long = 0
        for split, found in texts.items():
            tables[split], too_long = self._table(found, classes, tokens.tokenizer)
            long += too_long
        if long:
            what = "cut" if self.too_long == "cut" else "left out"
            verb = "is" if long == 1 else "are"
            notes.append(
                f"{_count(long, 'text')} ({long / len(everything):.0%}) {verb} longer than"
                f" {self.length} tokens and {verb} {what}"
            )
        parts = choose(
            tables,
            train=self.train,
            validation=self.validation,
            test=self.test,
            fingerprint=digest_of_tables(tables),
            notes=tuple(notes),
            modified_ns=tokens.modified_ns,
            origin=f"--data.path={self.path!r}",
        )
        return dataclasses.replace(parts, notes=(*parts.notes, *_shared(parts)))

    def unlabelled(
        self, path: str, tokenizer: Tokenizer
    ) -> tuple[ArrayTable, list[str], list[str]]:
        """The texts of other files, in their order, as rows that a model takes, the place of each,
        and notes; labels are not read. `UserError` for a row that holds no text, and for a text
        that is longer than a row unless `too_long` is cut, which a note counts."""
        files, notes = find_labelled(path)
        texts: list[_Text] = []
        for each in files:
            whole = bool(each.label)
            read = labelled_files.read_whole(each.file) if whole else None
            for found in read or labelled_files.read_texts(each.file, self.text_key):
                place = documents.place(each.file, found.row)
                if isinstance(found, Bad):
                    raise UserError(f"{place}: {found.why}; mend the row, or remove it")
                texts.append(_Text(tokenizer.encode(found.text), "", place))
        if not texts:
            raise UserError(f"{printable(path)}: holds no text; give a file with rows")
        room = self.length - len(tokenizer.bos) - len(tokenizer.eos[:1])
        longer = [one for one in texts if len(one.ids_N) > room]
        if longer and self.too_long != "cut":
            raise UserError(
                f"{longer[0].place}: has {len(longer[0].ids_N) + self.length - room} tokens, the"
                f" run's rows have {self.length}; shorten it"
            )
        if longer:
            what = f"{_count(len(longer), 'text')} longer than {self.length} tokens"
            notes = [*notes, Note(f"{what}, cut as in training")]
        table, _ = dataclasses.replace(self, split_seed=None)._table(texts, ("",), tokenizer)
        arrays = {name: table.arrays[name] for name in ("tokens", "segments")}
        return ArrayTable(arrays, origin=path), [one.place for one in texts], notes

    def _tokens(self, files: Sequence[labelled_files.LabelledFile], notes: Sequence[str]) -> Tokens:
        """All texts as ids, from the cache or made now."""
        whole = bool(files[0].label)
        try:
            return open_corpus(
                [self.path],
                TextFiles(tuple(each.file for each in files), tuple(notes)),
                LabelledTexts(self.text_key, self.label_key, whole),
                self.tokenizer,
                cache_dir=cache_folder(self.cache),
                stop_at_bad=self.bad == "error",
            )
        except UserError as error:
            raise in_flags(error) from error

    def _read(
        self, files: Sequence[labelled_files.LabelledFile], tokens: Tokens
    ) -> dict[str, list[_Text]]:
        """The texts of each split, in the order of the files."""
        texts: dict[str, list[_Text]] = {each.split: [] for each in files}
        assert tokens.file_D is not None
        for number, (start, stop) in enumerate(itertools.pairwise(tokens.offsets_D1.tolist())):
            file = files[tokens.file_D[number]]
            label = file.label or tokens.labels_D[number]
            texts[file.split].append(_Text(tokens.read(start, stop), label, tokens.place(number)))
        for split, found in texts.items():
            if not found:
                where = "" if split == "all" else f" in split {split}"
                left = f" ({_count(tokens.left_out, 'row')} left out)" if tokens.left_out else ""
                raise UserError(
                    f"--data.path={self.path!r}: holds no text with a class{where}{left}; give"
                    " other files"
                )
        return texts

    def _classes(self, texts: Sequence[_Text]) -> tuple[str, ...]:
        """The classes in the order of their numbers; `UserError` if the labels are no classes."""
        counts = collections.Counter(one.label for one in texts)
        if self.classes:
            if len(set(self.classes)) < len(self.classes):
                raise UserError(
                    f"--data.classes={','.join(self.classes)}: names a class twice; drop one"
                )
            odd = next((one for one in texts if one.label not in self.classes), None)
            if odd is not None:
                raise UserError(
                    f"{odd.place}: {odd.label!r:.60} is no class; valid: {', '.join(self.classes)}"
                    f"{did_you_mean(odd.label, self.classes)}; mend it, or add it to --data.classes"
                )
            return self.classes
        _check_classes(counts, f"--data.label_key={self.label_key}", len(texts))
        whole = all(label.isascii() and label.lstrip("-").isdigit() for label in counts)
        return tuple(sorted(counts, key=int) if whole else sorted(counts))

    def _table(
        self, texts: Sequence[_Text], classes: tuple[str, ...], tokenizer: Tokenizer
    ) -> tuple[ArrayTable, int]:
        """Texts as rows in a random order that is always the same, and how many of them are longer
        than a row."""
        bos, eos = tokenizer.bos, tokenizer.eos[:1]
        room = self.length - len(bos) - len(eos)
        if room < 1:
            raise UserError(
                f"--data.length={self.length}: the tokenizer puts {len(bos) + len(eos)} tokens"
                f" around a text; use >= {len(bos) + len(eos) + 1}"
            )
        numbers = {name: number for number, name in enumerate(classes)}
        rows: list[np.ndarray] = []
        labels: list[int] = []
        long = 0
        for one in texts:
            ids_N = one.ids_N
            if not len(ids_N):
                raise UserError(
                    f"{one.place}: the tokenizer makes no token of its text; mend it, or leave it"
                    " out of the file"
                )
            if len(ids_N) > room:
                long += 1
                if self.too_long == "error":
                    raise UserError(
                        f"--data.length={self.length}: {one.place} has"
                        f" {len(ids_N) + self.length - room} tokens; raise it, or choose"
                        " --data.too_long=cut or skip"
                    )
                if self.too_long == "skip":
                    continue
            rows.append(np.array([*bos, *ids_N[:room].tolist(), *eos], np.int32))
            labels.append(numbers[one.label])
        if not rows:
            raise UserError(
                f"--data.length={self.length}: every text is longer; raise it, or choose"
                " --data.too_long=cut"
            )
        tokens_NT = np.zeros((len(rows), self.length), np.int32)
        segments_NT = np.zeros_like(tokens_NT)
        for number, row in enumerate(rows):
            tokens_NT[number, : len(row)], segments_NT[number, : len(row)] = row, 1
        label_N, order_N = np.array(labels, np.int32), np.arange(len(rows))
        if self.split_seed is not None:
            order_N = np.random.Generator(np.random.Philox(self.split_seed)).permutation(len(rows))
        arrays = {"tokens": tokens_NT, "segments": segments_NT, "label": label_N}
        arrays = {name: array[order_N] for name, array in arrays.items()}
        origin = f"--data.path={self.path!r}"
        return ArrayTable(arrays, len(classes), classes, origin, tokenizer=tokenizer), long


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _check_classes(counts: collections.Counter[str], flag: str, texts: int) -> None:
    """`UserError` unless the labels tell classes apart."""
    if len(counts) == 1:
        raise UserError(
            f"{flag}: every label is {next(iter(counts))!r}, so there is nothing to tell apart;"
            " give texts of 2 classes or more, or name them all by --data.classes"
        )
    if 2 * len(counts) > texts and len(counts) > 8:
        raise UserError(
            f"{flag}: {len(counts):,} different labels in {texts:,} texts are no classes, e.g."
            f" {min(counts)!r:.40}; name the column of the classes, or the classes by"
            " --data.classes"
        )
    seen: dict[str, str] = {}
    for label in sorted(counts):
        other = seen.setdefault(" ".join(label.split()).casefold(), label)
        if other != label:
            raise UserError(
                f"{flag}: {other!r} and {label!r} differ by spaces or capitals only; write them"
                " alike, or say that both are classes by --data.classes"
            )


def _shared(parts: Splits) -> list[str]:
    """Notes on held-out parts that hold texts, or classes, as they should not."""
    notes: list[str] = []
    train = parts.train.read(np.arange(len(parts.train)))
    seen = {row.tobytes() for row in train["tokens"]}
    known = set(train["label"].tolist())
    for name, table in parts.held_out.items():
        rows = table.read(np.arange(len(table)))
        both = sum(row.tobytes() in seen for row in rows["tokens"])
        if both:
            notes.append(f"{both:,} of the {len(table):,} texts of {name} in train, too")
        for number in sorted(set(rows["label"].tolist()) - known):
            names = table.class_names or ()
            notes.append(f"class {names[number]!r} of {name} has no text in train")
    return notes
