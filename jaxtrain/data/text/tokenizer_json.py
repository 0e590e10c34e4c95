"""Hugging Face's `tokenizer.json`: read as the files beside it say, trained here, or made of what a
GGUF file holds.

N: tokens
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain import extras
from jaxtrain.data.text.plain_tokenizers import END_OF_TEXT, checked_ids
from jaxtrain.data.text.protocol import digest, valid_text
from jaxtrain.data.text.word_cache import GPT4_PATTERN, WordCache, is_cut_at_words
from jaxtrain.errors import UserError
from jaxtrain.messages import one_line, printable

_ADDS_BY_CONFIG = ("Llama", "Gemma", "Cohere")
"""Classes of tokenizers for which `add_bos_token` of tokenizer_config.json counts; for all others
transformers goes by what tokenizer.json itself puts around a text, and ignores it."""
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class TokenizerJson:
    """A tokenizer of the library `tokenizers`: `text` is its tokenizer.json; `special`, `bos`,
    `eos` and `chat_template` come from the files beside it."""

    text: str = dataclasses.field(repr=False)
    name: str = "tokenizer.json"
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bos: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()
    chat_template: str | None = dataclasses.field(default=None, repr=False)

    def _made(self, plain: bool) -> Any:
        extras.require(printable(self.name), "tokenizers")
        import tokenizers

        try:
            made = tokenizers.Tokenizer.from_str(self.text)
        except Exception as error:  # the library raises no narrower one
            raise UserError(
                f"{printable(self.name)}: is no tokenizer.json that `tokenizers` reads"
                f" ({one_line(str(error))}); download it again, or update `tokenizers`"
            ) from error
        # A model's own file may cut texts off and fill them up; a corpus is neither.
        made.no_truncation()
        made.no_padding()
        made.encode_special_tokens = plain
        return made

    @functools.cached_property
    def _plain(self) -> Any:
        return self._made(plain=True)

    @functools.cached_property
    def _parsing(self) -> Any:
        return self._made(plain=False)

    @functools.cached_property
    def _words(self) -> WordCache | None:
        tokenizer = json.loads(self.text)
        return WordCache(self._plain, tokenizer) if is_cut_at_words(tokenizer) else None

    @property
    def vocabulary(self) -> int:
        """One more than the largest id."""
        return self._vocabulary

    @functools.cached_property
    def _vocabulary(self) -> int:
        return max(self._plain.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def fingerprint(self) -> str:
        """Of its parts and of what stands before and after a text."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return digest([json.loads(self.text), list(self.bos), list(self.eos)])

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The ids of a text."""
        text = valid_text(text)
        if not special and self._words is not None:
            ids_N = self._words.encode(text)
            if ids_N is not None:
                return ids_N
        made = self._parsing if special else self._plain
        return np.array(made.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    def decode(self, ids_N: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
        """The text of ids."""
        ids_N = checked_ids(ids_N, self.vocabulary, self.name)
        return self._plain.decode(ids_N.tolist(), skip_special_tokens=not special)

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it."""
        return self._plain.token_to_id(token)

    def record(self) -> dict[str, Any]:
        """The text of its file and what was read beside it."""
        return {
            "kind": "tokenizer.json",
            "text": self.text,
            "name": self.name,
            "special": dict(self.special),
            "bos": list(self.bos),
            "eos": list(self.eos),
            "chat_template": self.chat_template,
        }


def read_tokenizer_json(path: str | Path) -> TokenizerJson:
    """A tokenizer.json with what the files beside it say: tokenizer_config.json (its special
    tokens, whether BOS and EOS are added, its chat template), special_tokens_map.json,
    chat_template.jinja, generation_config.json and config.json (further ids that end a text)."""
    path = Path(path)
    text = read_small(path)
    parse_json(path, text)
    beside = {name: read_json(path.parent / name) for name in BESIDE}
    bare = TokenizerJson(text, name=str(path))
    special = special_texts(beside)
    before, after = _around(bare)
    bos, eos = special.get("bos_token"), special.get("eos_token")
    config = beside["tokenizer_config.json"]
    if any(name in str(config.get("tokenizer_class")) for name in _ADDS_BY_CONFIG):
        if config.get("add_bos_token") is False:
            before = ()
        elif config.get("add_bos_token") and not before and bos is not None:
            before = (_id_of(bare, bos),)
    ends = [] if eos is None else [_id_of(bare, eos)]
    ends += [*after, *further_ends(beside)]
    ends = [end for end in dict.fromkeys(ends) if end < bare.vocabulary]
    return dataclasses.replace(
        bare,
        special=special,
        bos=before,
        eos=tuple(ends),
        chat_template=chat_template(path.parent, config),
    )


BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)
"""Files beside a tokenizer that say more of it."""


def special_texts(beside: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The texts of special tokens by role; tokenizer_config.json has the last word."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for role in ROLES:
            value = beside[name].get(role)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[role] = value
    return found


def further_ends(beside: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """The ids that end a text by generation_config.json, or config.json where that says nothing."""
    for name in ("generation_config.json", "config.json"):
        value = beside[name].get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if ids := [each for each in ids if isinstance(each, int) and each >= 0]:
            return ids
    return []


def chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of a folder: a file of its own, or the one of tokenizer_config.json (of
    several the `default`)."""
    if (folder / "chat_template.jinja").is_file():
        return read_small(folder / "chat_template.jinja")
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
        value = named.get("default") or next(iter(named.values()), None)
    return value if isinstance(value, str) else None


def read_small(path: Path) -> str:
    """The text of a file; `UserError` in one line where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{printable(str(path))}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(str(path))}: is no UTF-8 text; save it as that") from error


def parse_json(path: Path, text: str) -> dict[str, Any]:
    """A JSON object; `UserError` in one line where the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{printable(str(path))}: is no JSON ({one_line(str(error))}); download it again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{printable(str(path))}: is no JSON object; download it again")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty if there is no such file."""
    return parse_json(path, read_small(path)) if path.is_file() else {}


def _around(tokenizer: TokenizerJson) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the file's own post-processor puts before and after a text."""
    ids_N = tokenizer._plain.encode("a", add_special_tokens=False).ids
    whole = tokenizer._plain.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(ids_N) + 1):
        if whole[start : start + len(ids_N)] == ids_N:
            return tuple(whole[:start]), tuple(whole[start + len(ids_N) :])
    return (), ()


def _id_of(tokenizer: TokenizerJson, token: str) -> int:
    found = tokenizer.token_id(token)
    if found is None:
        raise UserError(
            f"{printable(tokenizer.name)}: has no token {token!r}, which tokenizer_config.json"
            " names; the two files do not belong together"
        )
    return found


def train_bpe(texts: Iterable[str], vocabulary: int, name: str = "bpe") -> TokenizerJson:
    """A byte-level BPE of that many ids, learned from texts; id 0 is `<|endoftext|>`, which ends a
    text, then the 256 bytes, then what was merged.

    Words are cut by `GPT4_PATTERN`. `UserError` if the texts are too few for so many ids.
    """
    if vocabulary < 257:
        raise UserError(f"bpe:{vocabulary}: needs at least 257: 256 bytes and {END_OF_TEXT}")
    extras.require(f"bpe:{vocabulary}", "tokenizers")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT4_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(_pieces(texts), trainer)
    if (size := made.get_vocab_size()) != vocabulary:
        raise UserError(
            f"bpe:{vocabulary}: these texts give {size} ids only; use bpe:{size}, or more text"
        )
    return TokenizerJson(made.to_str(), name=name, special={"eos_token": END_OF_TEXT}, eos=(0,))


def _pieces(texts: Iterable[str], length: int = 1 << 16) -> Iterator[str]:
    """Long texts in pieces that end with a line, which the library can count without holding
    many times the whole."""
    for text in texts:
        start = 0
        while start < len(text):
            stop = text.find("\n", start + length) + 1 or len(text)
            yield text[start:stop]
            start = stop
