"""SentencePiece's `FILE.model`: prefix space, byte fallback and normalisation as the model itself
says, BOS and EOS as the files beside it say.

N: tokens
"""

import base64
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain import extras
from jaxtrain.data.text.plain_tokenizers import checked_ids
from jaxtrain.data.text.protocol import digest, valid_text
from jaxtrain.data.text.tokenizer_json import (
    BESIDE,
    chat_template,
    further_ends,
    read_json,
    special_texts,
)
from jaxtrain.errors import UserError
from jaxtrain.messages import one_line, printable


@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """A model of the library `sentencepiece`: `model` is its file in base64."""

    model: str = dataclasses.field(repr=False)
    name: str = "tokenizer.model"
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bos: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()
    chat_template: str | None = dataclasses.field(default=None, repr=False)

    @functools.cached_property
    def _processor(self) -> Any:
        extras.require(printable(self.name), "sentencepiece")
        import sentencepiece

        try:
            return sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(self.model))
        except Exception as error:  # whatever a broken file makes the library raise
            raise UserError(
                f"{printable(self.name)}: is no SentencePiece model"
                f" ({one_line(str(error))}); download it again"
            ) from error

    def _continued(self, text: str) -> list[int]:
        """The ids of a text behind a special token, where no space is put before it: behind a
        character of no script, which is one with nothing."""
        for before in ("\ue000", "\n"):
            head, both = self._processor.encode(before), self._processor.encode(before + text)
            if both[: len(head)] == head:
                return both[len(head) :]
        return self._processor.encode(text)

    @functools.cached_property
    def _controls(self) -> dict[str, int]:
        processor = self._processor
        return {
            processor.id_to_piece(place): place
            for place in range(processor.get_piece_size())
            if processor.is_control(place)
        }

    @property
    def vocabulary(self) -> int:
        """How many pieces there are."""
        return self._vocabulary

    @functools.cached_property
    def _vocabulary(self) -> int:
        return int(self._processor.get_piece_size())

    @property
    def fingerprint(self) -> str:
        """Of its file and of what stands before and after a text."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return digest([self.model, list(self.bos), list(self.eos)])

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The ids of a text."""
        text = valid_text(text)
        if not special or not self._controls:
            return np.array(self._processor.encode(text), np.int32)
        longest = sorted(self._controls, key=len, reverse=True)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, longest))})", text):
            if part in self._controls:
                ids.append(self._controls[part])
            elif part:
                ids += self._continued(part) if ids else self._processor.encode(part)
        return np.array(ids, np.int32)

    def decode(self, ids_N: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
        """The text of ids."""
        ids = checked_ids(ids_N, self.vocabulary, self.name).tolist()
        if not special:
            return str(self._processor.decode(ids))
        text, run = "", list[int]()
        names = {place: piece for piece, place in self._controls.items()}
        for each in [*ids, -1]:
            if each in names or each == -1:
                text += self._decoded(run, first=not text)
                text, run = text + names.get(each, ""), []
            else:
                run.append(each)
        return text

    def _decoded(self, ids: list[int], first: bool) -> str:
        text = str(self._processor.decode(ids)) if ids else ""
        starts = ids and self._processor.id_to_piece(ids[0]).startswith("\u2581")
        # the space before a first word is only the model's own at the head of a text
        return f" {text}" if starts and not first and not text.startswith(" ") else text

    def token_id(self, token: str) -> int | None:
        """The id of a piece as the vocabulary writes it."""
        place = int(self._processor.piece_to_id(token))
        return place if self._processor.id_to_piece(place) == token else None

    def record(self) -> dict[str, Any]:
        """Its file and what was read beside it."""
        return {
            "kind": "sentencepiece",
            "model": self.model,
            "name": self.name,
            "special": dict(self.special),
            "bos": list(self.bos),
            "eos": list(self.eos),
            "chat_template": self.chat_template,
        }


def read_sentencepiece(path: str | Path) -> SentencePiece:
    """A SentencePiece model with what the files beside it say.

    BOS is put before a text if tokenizer_config.json says so, or, where it does not speak of it,
    if the model has one; so it is for Llama.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{printable(str(path))}: cannot be read ({error.strerror})") from error
    bare = SentencePiece(base64.b64encode(data).decode(), name=str(path))
    beside = {name: read_json(path.parent / name) for name in BESIDE}
    config, processor = beside["tokenizer_config.json"], bare._processor
    roles = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(),
        "pad_token": processor.pad_id(),
    }
    special = {
        role: processor.id_to_piece(place) for role, place in roles.items() if place >= 0
    } | special_texts(beside)
    adds_bos = config.get("add_bos_token", True) and processor.bos_id() >= 0
    ends = [processor.eos_id(), *further_ends(beside)]
    return dataclasses.replace(
        bare,
        special=special,
        bos=(processor.bos_id(),) if adds_bos else (),
        eos=tuple(end for end in dict.fromkeys(ends) if 0 <= end < bare.vocabulary),
        chat_template=chat_template(path.parent, config),
    )
