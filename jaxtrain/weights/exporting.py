"""A model of ours as a folder that `transformers` loads unchanged."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn

from jaxtrain import extras, tree
from jaxtrain.data.text.tokenizer_json import TokenizerJson
from jaxtrain.data.text.tokenizers import open_tokenizer
from jaxtrain.errors import UserError
from jaxtrain.messages import printable
from jaxtrain.weights import config, gguf_file, names, safetensors_files

DTYPES = ("float32", "bfloat16", "float16")
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What a `config.json` says of the tokenizer."""


def save(
    folder: str | Path,
    model: Any,
    params: tree.PyTree,
    *,
    dtype: str = "float32",
    tokenizer: Path | None = None,
    shard_bytes: int = safetensors_files.SHARD,
) -> int:
    """Writes `config.json` and the parameters, whole or not at all; how many tensors they became.

        weights.save("out", model, params, tokenizer=Path("SmolLM2-135M-Instruct"))

    Files of the tokenizer, and `generation_config.json`, are copied from the folder `tokenizer`; of
    a GGUF file they are made.
    Arrays come from the devices one tensor at a time. `UserError` for a model that is of no family,
    for values that the dtype cannot hold, and if the folder is not empty.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: unknown; valid: {', '.join(DTYPES)}")
    target = np.dtype(safetensors_files.DTYPES[_word(dtype)])
    params = nn.meta.unbox(params)
    specs: dict[str, tuple[tuple[int, ...], Any]] = {
        row.name: (row.stored, target) for row in names.rows(model)
    }
    said, texts, copies = _read(tokenizer, safetensors_files.CONFIG), {}, []
    if tokenizer is not None and tokenizer.suffix == ".gguf":
        said, texts = gguf_file.open_model(tokenizer).config, _texts_of_gguf(tokenizer)
    elif tokenizer is not None:
        copies = safetensors_files.tokenizer_files(tokenizer)
    keep = {name: said[name] for name in KEPT if said.get(name) is not None}
    generation = _read(tokenizer, safetensors_files.GENERATION)
    safetensors_files.write(
        folder,
        specs,
        ((name, _cast(name, array, target)) for name, array in names.tensors(model, params)),
        config=config.write(model, dtype=dtype, keep=keep),
        generation=generation or None,
        copies=copies,
        texts=texts,
        shard_bytes=shard_bytes,
    )
    return len(specs)


def _texts_of_gguf(path: Path) -> dict[str, str]:
    """The tokenizer in a GGUF file as the two files that `transformers` reads it from."""
    extras.require(printable(str(path)), "tokenizers")
    import tokenizers
    from tokenizers import processors

    found = open_tokenizer(path)
    if not isinstance(found, TokenizerJson):
        raise UserError(
            f"{printable(str(path))}: its tokenizer has no tokenizer.json; give the folder of one"
        )
    made = tokenizers.Tokenizer.from_str(found.text)
    if found.bos:  # transformers puts it there only if the file says so
        word = found.special["bos_token"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{word} $A", pair=f"{word} $A $B", special_tokens=[(word, found.bos[0])]
        )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **found.special}
    if found.chat_template is not None:
        settings["chat_template"] = found.chat_template
    return {
        "tokenizer.json": made.to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False),
    }


def _word(dtype: str) -> str:
    return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]


def _cast(name: str, array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        raise UserError(
            f"{name}: its values do not fit into {dtype}, or are not finite; take float32, and look"
            " at the run if they do not fit there either"
        )
    return cast


def _read(folder: Path | None, name: str) -> Mapping[str, Any]:
    if folder is None or not (folder / name).is_file():
        return {}
    return safetensors_files.read_json(folder / name)
