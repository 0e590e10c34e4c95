"""Words that a byte-level BPE has encoded before are looked up: cutting text by a pattern costs the
library most of its time, and most words of a text come again.

A text is cut wherever a letter of ASCII is followed by another character of ASCII that is none. No
piece of the patterns below goes on there, whatever stands around it: each ends with the letters
that it has, none looks back, and the one look ahead (`\\s+(?!\\S)`) is at blanks. So the ids of the
parts, one after the other, are those of the whole.

N: tokens
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How `bpe:N` cuts text before bytes are merged: never across words; GPT-4's, of `tiktoken`."""
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
PATTERNS = (GPT4_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN)
"""Those for which the words above are true; GPT-2's own is inside `ByteLevel`."""

_CUT = re.compile(r"(?<=[A-Za-z])(?=[\x00-@\[-`{-\x7f])")
_MOST_WORDS, _MOST_CHARACTERS = 1 << 19, 1 << 24
"""What is kept at most, some 200 MB; then it begins anew."""


def is_cut_at_words(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is one whose text may be cut so."""
    model, normalizer = tokenizer.get("model") or {}, tokenizer.get("normalizer")
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    return (
        model.get("type") == "BPE"
        and not any(model.get(name) for name in _MODEL_OPTIONS)
        and (normalizer is None or normalizer.get("type") == "NFC")
        and all(_cuts_after_letters(step) for step in steps)
        and any(step.get("use_regex") or step.get("type") == "Split" for step in steps)
    )


_MODEL_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def _cuts_after_letters(step: Mapping[str, Any]) -> bool:
    match step.get("type"):
        case "Digits":
            return True
        case "ByteLevel":
            return step.get("add_prefix_space") is False
        case "Split":
            pattern = (step.get("pattern") or {}).get("Regex")
            isolated = step.get("behavior") == "Isolated" and not step.get("invert")
            return pattern in PATTERNS and isolated
    return False


class WordCache:
    """Encodes text with a tokenizer of the library, word by word."""

    def __init__(self, library: Any, tokenizer: Mapping[str, Any]) -> None:
        self._library = library
        self._ids: dict[str, list[int]] = {}
        self._characters = 0
        # Those are found in a text before it is cut; special ones are not, being text here.
        added = tokenizer.get("added_tokens") or ()
        self._whole = [token["content"] for token in added if not token.get("special")]

    def encode(self, text: str) -> np.ndarray | None:
        """The ids of a text; None if it holds an added token, which would be cut in two."""
        if any(token in text for token in self._whole):
            return None
        if len(self._ids) > _MOST_WORDS or self._characters > _MOST_CHARACTERS:
            # not emptied: another thread may be reading it
            self._ids, self._characters = {}, 0
        words, known = _CUT.split(text), self._ids
        new = [word for word in dict.fromkeys(words) if word not in known]
        encoded = self._library.encode_batch_fast(new, add_special_tokens=False) if new else []
        known.update((word, each.ids) for word, each in zip(new, encoded, strict=True))
        self._characters += sum(map(len, new))
        return np.fromiter(itertools.chain.from_iterable(map(known.__getitem__, words)), np.int32)
