"""What a corpus is made of, and how each of it becomes ids: documents, conversations, or texts with
labels.

All three are found in parts of files, so that the token cache treats them alike.

N: tokens
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from jaxtrain.data.text import conversations, documents, labelled_files, long_text
from jaxtrain.data.text.documents import Bad, Document, Part, Survey
from jaxtrain.data.text.plain_tokenizers import END_OF_TEXT
from jaxtrain.data.text.protocol import Tokenizer
from jaxtrain.data.text.text_files import TEXT, TextFile
from jaxtrain.errors import UserError
from jaxtrain.messages import Note, printable


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A document, conversation or labelled text as ids, in pieces."""

    ids: Sequence[np.ndarray]
    size: int
    """The UTF-8 bytes of its text."""
    row: int
    """The place in its file, as messages name it."""
    marks: int = 0
    """How often the text holds `<|endoftext|>`."""
    label: str | None = None


class Format(Protocol):
    """How the examples of a corpus are found in its files and become ids."""

    noun: ClassVar[str]
    """What messages call one of its examples in a file."""

    @property
    def identity(self) -> list[Any]:
        """JSON of all that the ids depend on besides the files and the tokenizer."""
        ...

    def record(self) -> dict[str, Any]:
        """JSON from which `from_record` makes it again, in another process."""
        ...

    def num_ids(self, vocabulary: int) -> int:
        """What is kept as an id is below this."""
        ...

    def survey(self, file: TextFile, part_bytes: int) -> Survey:
        """The digest of a file, and the parts of about that many bytes that it can be read in."""
        ...

    def parts(
        self, file: TextFile, found: Survey, tokenizer: Tokenizer, part_bytes: int
    ) -> tuple[Part, ...]:
        """The parts of a file that are tokenised, once the tokenizer is known."""
        ...

    def texts(self, file: TextFile) -> Iterator[str | Bad]:
        """The texts that a tokenizer is learned from."""
        ...

    def encoded(self, file: TextFile, part: Part, tokenizer: Tokenizer) -> Iterator[Encoded | Bad]:
        """The examples of a part of a file, in order, and those that are broken."""
        ...

    def notes(self, tokenizer: Tokenizer, count: int, marks: int) -> list[str]:
        """What is to be said of a corpus of so many examples."""
        ...


@dataclasses.dataclass(frozen=True)
class Documents(documents.Format):
    """Documents, one behind the other, each between the tokenizer's BOS and EOS."""

    noun: ClassVar[str] = "document"

    @property
    def identity(self) -> list[Any]:
        """Where documents are found."""
        return [self.key, self.separator]

    def record(self) -> dict[str, Any]:
        """For another process."""
        return {"kind": "documents"} | dataclasses.asdict(self)

    def num_ids(self, vocabulary: int) -> int:
        """Those of the tokenizer."""
        return vocabulary

    def survey(self, file: TextFile, part_bytes: int) -> Survey:
        """Cut between documents."""
        return documents.survey(file, self, part_bytes)

    def parts(
        self, file: TextFile, found: Survey, tokenizer: Tokenizer, part_bytes: int
    ) -> tuple[Part, ...]:
        """A file that is one document is cut where no id changes."""
        if file.kind != TEXT or file.compression or self.separator:
            return found.parts
        try:
            cuts = long_text.file_cuts(tokenizer, file.path, part_bytes)
        except UserError as error:
            raise UserError(f"{printable(file.path)}: {error}") from error
        return documents.parts_of_one(file.path, cuts)

    def texts(self, file: TextFile) -> Iterator[str | Bad]:
        """Every document."""
        for found in documents.read_part(file, self):
            yield found.text if isinstance(found, Document) else found

    def encoded(self, file: TextFile, part: Part, tokenizer: Tokenizer) -> Iterator[Encoded | Bad]:
        """Documents, of which a part may hold a piece only."""
        bos, eos = np.array(tokenizer.bos, np.int32), np.array(tokenizer.eos[:1], np.int32)
        before = "" if part.begins else long_text.character_before(file.path, part.start)
        for found in documents.read_part(file, self, part):
            if isinstance(found, Bad):
                yield found
                continue
            place = f"{printable(file.path)}:{found.row}"
            ids = [_encode(tokenizer, place, found.text, before)]
            ids = [bos, *ids] if part.begins else ids
            ids = [*ids, eos] if part.ends else ids
            marks = found.text.count(END_OF_TEXT)
            yield Encoded(ids, len(found.text.encode()), found.row, marks)

    def notes(self, tokenizer: Tokenizer, count: int, marks: int) -> list[str]:
        """What may be meant otherwise of documents that follow one another."""
        notes: list[str] = []
        if marks and not self.separator:
            notes.append(
                f"the texts hold {END_OF_TEXT} {marks:,} times, as plain text; with"
                f" separator={END_OF_TEXT} documents end there"
            )
        if not tokenizer.eos and count > 1:
            notes.append(
                Note(
                    f"the tokenizer {printable(tokenizer.name)} has no token that ends a text: the"
                    f" {count:,} documents follow one another without a mark"
                )
            )
        return notes


@dataclasses.dataclass(frozen=True)
class Rows:
    """What conversations and labelled texts have in common: each stands in a row of its own."""

    noun: ClassVar[str] = "row"

    def survey(self, file: TextFile, part_bytes: int) -> Survey:
        """Cut between rows, where lines are rows."""
        return documents.survey(file, documents.Format(), part_bytes)

    def parts(
        self, file: TextFile, found: Survey, tokenizer: Tokenizer, part_bytes: int
    ) -> tuple[Part, ...]:
        """Those of the survey."""
        del file, tokenizer, part_bytes
        return found.parts

    def notes(self, tokenizer: Tokenizer, count: int, marks: int) -> list[str]:
        """Nothing: rows do not follow one another."""
        del tokenizer, count, marks
        return []


@dataclasses.dataclass(frozen=True)
class Chats(Rows):
    """Conversations as a chat template writes them. What is kept is twice the id, and one more
    where the token is learned: `split_codes` takes it apart."""

    template: str
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The texts of special tokens, which the template may write."""
    today: str = ""
    """The day, if the template writes it."""

    @property
    def identity(self) -> list[Any]:
        """All that the template reads."""
        return ["conversations", self.template, dict(self.special), self.today]

    def record(self) -> dict[str, Any]:
        """For another process."""
        return {"kind": "conversations"} | dataclasses.asdict(self)

    def num_ids(self, vocabulary: int) -> int:
        """Learned or not."""
        return 2 * vocabulary

    def texts(self, file: TextFile) -> Iterator[str | Bad]:
        """None: no tokenizer is learned from conversations."""
        raise AssertionError(file)

    def encoded(self, file: TextFile, part: Part, tokenizer: Tokenizer) -> Iterator[Encoded | Bad]:
        """Conversations; one that the template refuses is broken."""
        tokenizer.encode("")  # a library that is missing is no fault of a row
        for found in conversations.read_part(file, part):
            if isinstance(found, Bad):
                yield found
                continue
            try:
                one = conversations.tokenized(tokenizer, self.template, found.messages, found.tools)
            except UserError as error:
                yield Bad(found.row, str(error))
                continue
            codes_N = _known(tokenizer, one.ids_N).astype(np.int64) * 2 + one.supervised_N
            yield Encoded([codes_N], found.size, found.row)


def split_codes(codes_N: np.ndarray) -> conversations.Tokenized:
    """A conversation out of what is kept of it.

    >>> split_codes(np.array([14, 3], np.uint16))
    Tokenized(ids_N=array([7, 1], dtype=int32), supervised_N=array([False,  True]))
    """
    return conversations.Tokenized((codes_N >> 1).astype(np.int32), (codes_N & 1).astype(bool))


@dataclasses.dataclass(frozen=True)
class LabelledTexts(Rows):
    """Texts of which each has a label, without what a tokenizer puts around them."""

    text_key: str = "text"
    label_key: str = "label"
    whole_files: bool = False
    """A file is a text, and its folder tells the label."""

    @property
    def identity(self) -> list[Any]:
        """Where texts and labels are found."""
        return ["labelled texts", self.text_key, self.label_key, self.whole_files]

    def record(self) -> dict[str, Any]:
        """For another process."""
        return {"kind": "labelled texts"} | dataclasses.asdict(self)

    def num_ids(self, vocabulary: int) -> int:
        """Those of the tokenizer."""
        return vocabulary

    def survey(self, file: TextFile, part_bytes: int) -> Survey:
        """Cut between rows, where lines are rows; columns are looked at first."""
        labelled_files.check_columns(file, self.text_key, self.label_key)
        return documents.survey(file, documents.Format(self.text_key), part_bytes)

    def texts(self, file: TextFile) -> Iterator[str | Bad]:
        """Every text."""
        for found in self._read(file, documents.WHOLE):
            yield found if isinstance(found, Bad) else found.text

    def encoded(self, file: TextFile, part: Part, tokenizer: Tokenizer) -> Iterator[Encoded | Bad]:
        """Texts with their labels."""
        for found in self._read(file, part):
            if isinstance(found, Bad):
                yield found
                continue
            ids_N = _encode(tokenizer, documents.place(file, found.row), found.text, "")
            yield Encoded([ids_N], len(found.text.encode()), found.row, label=found.label)

    def _read(self, file: TextFile, part: Part) -> Iterator[labelled_files.Labelled | Bad]:
        if self.whole_files:
            return labelled_files.read_whole(file)
        return labelled_files.read_part(file, self.text_key, self.label_key, part)


_FORMATS = {"documents": Documents, "conversations": Chats, "labelled texts": LabelledTexts}


def from_record(record: Mapping[str, Any]) -> Format:
    """What `Format.record` was made of.

    >>> from_record(Documents("body").record())
    Documents(key='body', separator='')
    """
    fields = dict(record)
    return _FORMATS[fields.pop("kind")](**fields)


def _encode(tokenizer: Tokenizer, place: str, text: str, before: str) -> np.ndarray:
    try:
        if len(text) > long_text.LONG or before:
            ids_N = long_text.encode_long(tokenizer, text, before=before)
        else:
            ids_N = tokenizer.encode(text)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return _known(tokenizer, ids_N)


def _known(tokenizer: Tokenizer, ids_N: np.ndarray) -> np.ndarray:
    """The ids; `UserError` if one of them is none of the tokenizer's."""
    if len(ids_N) and not 0 <= ids_N.min() <= ids_N.max() < tokenizer.vocabulary:
        raise UserError(
            f"tokenizer {tokenizer.name}: gives id {ids_N.max()}, which is not in its vocabulary,"
            f" 0..{tokenizer.vocabulary - 1}"
        )
    return ids_N
