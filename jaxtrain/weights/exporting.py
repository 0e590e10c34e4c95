"""A model of ours as a folder that `transformers` loads unchanged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain import tree
from jaxtrain.errors import UserError
from jaxtrain.weights import config, names, safetensors_files

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

    Files of the tokenizer, and `generation_config.json`, are copied from the folder `tokenizer`.
    Arrays come from the devices one tensor at a time. `UserError` for a model that is of no family,
    for values that the dtype cannot hold, and if the folder is not empty.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: unknown; valid: {', '.join(DTYPES)}")
    target = np.dtype(safetensors_files.DTYPES[_word(dtype)])
    specs: dict[str, tuple[tuple[int, ...], Any]] = {
        row.name: (row.stored, target) for row in names.rows(model)
    }
    said = _read(tokenizer, safetensors_files.CONFIG)
    keep = {name: said[name] for name in KEPT if said.get(name) is not None}
    generation = _read(tokenizer, safetensors_files.GENERATION)
    safetensors_files.write(
        folder,
        specs,
        ((name, _cast(name, array, target)) for name, array in names.tensors(model, params)),
        config=config.write(model, dtype=dtype, keep=keep),
        generation=generation or None,
        copies=safetensors_files.tokenizer_files(tokenizer) if tokenizer else (),
        shard_bytes=shard_bytes,
    )
    return len(specs)


def _word(dtype: str) -> str:
    return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]


def _cast(name: str, array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        raise UserError(f"{name}: its values do not fit into {dtype}, or are not finite")
    return cast


def _read(folder: Path | None, name: str) -> Mapping[str, Any]:
    if folder is None or not (folder / name).is_file():
        return {}
    return safetensors_files.read_json(folder / name)
