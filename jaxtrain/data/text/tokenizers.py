"""Tokenizers by a short text, such as a flag holds: `bytes`, `characters`, `bpe:4096`, a
`tokenizer.json`, the folder of a model, a SentencePiece `FILE.model` or a `FILE.gguf`."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtrain import durable_files
from jaxtrain.data.text.gguf_tokenizer import from_gguf
from jaxtrain.data.text.plain_tokenizers import Bytes, Characters
from jaxtrain.data.text.protocol import TextStream, Tokenizer
from jaxtrain.data.text.sentencepiece_model import SentencePiece, read_sentencepiece
from jaxtrain.data.text.tokenizer_json import (
    TokenizerJson,
    parse_json,
    read_small,
    read_tokenizer_json,
    train_bpe,
)
from jaxtrain.errors import UserError
from jaxtrain.gguf_header import read_header
from jaxtrain.messages import did_you_mean, did_you_mean_path

__all__ = [
    "Bytes",
    "Characters",
    "SentencePiece",
    "TextStream",
    "Tokenizer",
    "TokenizerJson",
    "from_gguf",
    "from_record",
    "learn",
    "open_tokenizer",
    "save",
    "train_bpe",
]

SAVED = "jaxtrain_tokenizer.json"
"""What `save` writes and `open_tokenizer` finds in a folder first."""
_WORDS = ("bytes", "characters", "bpe:4096")
_SHORT = {"char": "characters", "chars": "characters", "utf8": "bytes", "utf-8": "bytes"}
_LEARNED = {"bpe", "bytelevel-bpe", "byte-level bpe", "train", "learn", "learned"}


def is_learned(spec: str) -> bool:
    """Whether a short text names a tokenizer that is made of the corpus itself.

    >>> is_learned("characters"), is_learned("bpe:4096"), is_learned("bytes")
    (True, True, False)
    """
    if spec.startswith("bpe:") and not re.fullmatch(r"bpe:\d+", spec):
        raise UserError(f"tokenizer {spec!r}: needs a whole number of ids, e.g. bpe:4096")
    return spec == "characters" or spec.startswith("bpe:")


def open_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that a short text names.

    >>> open_tokenizer("bytes").vocabulary
    257

    Those that are learned from a corpus (`characters`, `bpe:4096`) are made by `learn`. `UserError`
    if it names nothing that is there, or a file that is no tokenizer.
    """
    spec = os.fspath(spec)
    if spec == "bytes":
        return Bytes()
    if is_learned(spec):
        raise UserError(
            f"tokenizer {spec!r} is learned from a corpus; give the corpus too, or the folder in"
            " which the tokenizer was kept"
        )
    path = Path(spec).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if not path.exists():
        raise UserError(
            f"tokenizer {spec!r}: no such file or folder; valid: {', '.join(_WORDS)},"
            f" a tokenizer.json, a .model, a .gguf, or a folder with one{_meant(spec, path)}"
        )
    if path.name == SAVED:
        return from_record(parse_json(path, read_small(path)))
    if path.suffix == ".json":
        return read_tokenizer_json(path)
    if path.suffix == ".model":
        return read_sentencepiece(path)
    if path.suffix == ".gguf":
        return from_gguf(read_header(path).fields, str(path))
    raise UserError(
        f"tokenizer {spec!r}: is neither a tokenizer.json nor a .model nor a .gguf file; give one"
    )


def _meant(spec: str, path: Path) -> str:
    """What was probably meant by a text that names no tokenizer: one of our words, a path, or a
    model of Hugging Face, which nothing is downloaded of."""
    word = spec.lower()
    if word in _LEARNED:
        return "; did you mean 'bpe:4096', learned from the text, with so many ids?"
    if near := did_you_mean(_SHORT.get(word, word), _WORDS) or did_you_mean_path(str(path)):
        return near
    if path.is_absolute() or path.suffix or spec.startswith("."):
        return ""
    name = re.sub(r"[^\w/.-]", "", spec) or "MODEL"
    return (
        "; nothing is downloaded: for that of a Hugging Face model, hf download"
        f" {name} tokenizer.json --local-dir DIR, then give DIR"
    )


def _in_folder(folder: Path) -> Tokenizer:
    for name in (SAVED, "tokenizer.json", "tokenizer.model", "spiece.model", "spm.model"):
        if (folder / name).is_file():
            return open_tokenizer(folder / name)
    models = sorted(path for end in ("*.model", "*.gguf") for path in folder.glob(end))
    if len(models) == 1:
        return open_tokenizer(models[0])
    nothing = "nor another .model or .gguf file; give a folder with one"
    held = f"but {len(models)} others; name one" if models else nothing
    old = (folder / "vocab.json").is_file() or (folder / "vocab.txt").is_file()
    more = (
        "; it has an older vocab file: transformers' AutoTokenizer.from_pretrained(DIR)"
        ".save_pretrained(DIR) writes a tokenizer.json"
    )
    raise UserError(
        f"tokenizer {str(folder)!r}: holds no tokenizer.json or tokenizer.model, {held}"
        f"{more if old else ''}"
    )


def learn(spec: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that is made of the texts of a corpus.

    >>> learn("characters", ["ab", "ca"]).vocabulary
    3
    """
    if spec == "characters":
        return Characters.of(texts)
    if not is_learned(spec):
        raise UserError(f"tokenizer {spec!r}: is not learned; open_tokenizer opens it")
    return train_bpe(texts, int(spec.removeprefix("bpe:")), name=spec)


def from_record(record: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `Tokenizer.record` describes.

    >>> from_record(Characters("abc").record()) == Characters("abc")
    True
    """
    values = {name: value for name, value in record.items() if name != "kind"}
    values |= {name: tuple(values[name]) for name in ("bos", "eos") if name in values}
    kinds: dict[str, Callable[..., Tokenizer]] = {
        "bytes": Bytes,
        "characters": Characters,
        "tokenizer.json": TokenizerJson,
        "sentencepiece": SentencePiece,
    }
    kind = record.get("kind")
    if kind not in kinds:
        raise UserError(
            f"a kept tokenizer is of the unknown kind {kind!r}; made by a newer jaxtrain?"
        )
    return kinds[kind](**values)


def save(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Writes a tokenizer into a folder, durably, whole or not at all, from which `open_tokenizer`
    makes the same one again."""
    path = Path(folder) / SAVED
    temporary = path.with_name(f".{SAVED}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(tokenizer.record(), allow_nan=False), encoding="utf-8")
        durable_files.publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
