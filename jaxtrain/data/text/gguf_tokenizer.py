"""The tokenizer inside a GGUF file, out of its fields `tokenizer.ggml.*`: a byte-level BPE as a
tokenizer.json, or a SentencePiece model written anew."""

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain import extras
from jaxtrain.data.text.sentencepiece_model import SentencePiece
from jaxtrain.data.text.tokenizer_json import TokenizerJson
from jaxtrain.data.text.word_cache import LLAMA3_PATTERN, QWEN2_PATTERN
from jaxtrain.errors import UserError
from jaxtrain.messages import printable

_PATTERNS = {
    "gpt-2": "",
    "olmo": "",
    "llama-bpe": LLAMA3_PATTERN,
    "llama3": LLAMA3_PATTERN,
    "llama-v3": LLAMA3_PATTERN,
    "dbrx": LLAMA3_PATTERN,
    "smaug-bpe": LLAMA3_PATTERN,
    "qwen2": QWEN2_PATTERN,
    "smollm": r"\p{N}",
    "starcoder": r"\p{N}",
    "refact": r"\p{N}",
}
"""What `tokenizer.ggml.pre` stands for, as llama.cpp has it; empty: GPT-2's own, and of a digit
alone: digits one by one, then GPT-2's own."""
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
"""Those after whose names a BOS stands before a text, if the file says nothing of it."""
_COMPOSED = ("qwen2", "olmo")
"""Those of models whose tokenizer.json composes characters (NFC), which no field of a file says."""
_CONTROL, _USER = 3, 4
"""Kinds of tokens in `tokenizer.ggml.token_type`, numbered as in SentencePiece."""


def from_gguf(fields: Mapping[str, Any], name: str) -> TokenizerJson | SentencePiece:
    """The tokenizer that the fields of a GGUF file describe, by their names.

    `UserError` for a kind of tokenizer that is not known, or fields that are missing.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    known = {"gpt2": _byte_level, "llama": _pieces}
    # without `pre` nothing tells how words are cut, and another cut gives other ids: a KeyError
    if kind not in known or (kind == "gpt2" and pre not in (*_PATTERNS, None)):
        cut = "" if pre is None else f", {pre!r}"
        raise UserError(
            f"{printable(name)}: its tokenizer is of the kind {kind!r}{cut}; known are llama,"
            f" and gpt2 with {', '.join(_PATTERNS)}; use the tokenizer.json of the model"
        )
    try:
        return known[kind](fields, name)
    except KeyError as error:
        raise UserError(
            f"{printable(name)}: has no field {error.args[0]}; use the tokenizer.json of the model"
        ) from error


def _around(fields: Mapping[str, Any], adds_bos: bool) -> dict[str, Any]:
    """What both kinds have beside their vocabulary."""
    tokens = fields["tokenizer.ggml.tokens"]

    def number(role: str) -> int | None:
        value = fields.get(f"tokenizer.ggml.{role}_token_id")
        return None if value is None or not 0 <= value < len(tokens) else int(value)

    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{role}_token": tokens[place]
        for role, key in keys.items()
        if (place := number(key)) is not None
    }
    bos, ends = number("bos"), [number("eos"), number("eot"), number("eom")]
    adds_bos = fields.get("tokenizer.ggml.add_bos_token", adds_bos)
    return {
        "special": special,
        "bos": (bos,) if adds_bos and bos is not None else (),
        "eos": tuple(dict.fromkeys(end for end in ends if end is not None)),
        "chat_template": fields.get("tokenizer.chat_template"),
    }


def _byte_level(fields: Mapping[str, Any], name: str) -> TokenizerJson:
    extras.require(printable(name), "tokenizers")
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    pre = fields["tokenizer.ggml.pre"]
    tokens = list(fields["tokenizer.ggml.tokens"])
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    ids = {token: place for place, token in enumerate(tokens)}
    # Llama 3's vocabulary has words that no sequence of its merges leads to.
    made = Tokenizer(models.BPE(ids, merges, ignore_merges=pre in _LLAMA3))
    if pre in _COMPOSED:
        made.normalizer = normalizers.NFC()
    pattern = _PATTERNS[pre]
    if pattern in ("", r"\p{N}"):
        cuts = [pre_tokenizers.Digits(individual_digits=True)] if pattern else []
        cuts = [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        words = pre_tokenizers.Split(Regex(pattern), "isolated")
        cuts = [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    made.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, fields.get("tokenizer.ggml.token_type", ()), strict=False):
        if kind in (_CONTROL, _USER):
            made.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    return TokenizerJson(made.to_str(), name=name, **_around(fields, adds_bos=pre in _LLAMA3))


def _pieces(fields: Mapping[str, Any], name: str) -> SentencePiece:
    """The model as SentencePiece's own format (Protocol Buffers) has it, field by field."""
    tokens = fields["tokenizer.ggml.tokens"]
    scores, kinds = fields["tokenizer.ggml.scores"], fields["tokenizer.ggml.token_type"]
    pieces = [
        _bytes_field(1, _bytes_field(1, token.encode()) + _float_field(2, score) + _field(3, kind))
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    ]
    places = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2)}
    ids = [
        _field(number, int(fields.get(f"tokenizer.ggml.{role}_token_id", default)))
        for role, (number, default) in places.items()
    ]
    byte_fallback = any(kind == 6 for kind in kinds)
    merges = _field(3, 2) + _field(4, len(tokens)) + _field(35, byte_fallback) + b"".join(ids)
    normalizer = (
        _bytes_field(1, b"identity")
        + _bytes_field(2, bytes(fields.get("tokenizer.ggml.precompiled_charsmap", b"")))
        + _field(3, bool(fields.get("tokenizer.ggml.add_space_prefix", True)))
        + _field(4, bool(fields.get("tokenizer.ggml.remove_extra_whitespaces", False)))
        + _field(5, True)
    )
    model = b"".join(pieces) + _bytes_field(2, merges) + _bytes_field(3, normalizer)
    return SentencePiece(
        base64.b64encode(model).decode(), name=name, **_around(fields, adds_bos=True)
    )


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    parts = []
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(int(value))


def _float_field(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _bytes_field(number: int, value: bytes | Sequence[int]) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + bytes(value)
