"""Plain parameters as a safetensors file: the variables of a model by slash path, with a few words
on where they came from, for other programs and for `--init_from`."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain import durable_files, extras
from jaxtrain.checkpoints import variables
from jaxtrain.checkpoints.arrays import HostState, Specs
from jaxtrain.errors import CheckpointError, UserError
from jaxtrain.messages import one_line, printable

SUFFIX = ".safetensors"
KNOWN = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""The dtypes that go through NumPy, by the words of the format."""


def write(path: Path, arrays: HostState, metadata: Mapping[str, Any]) -> None:
    """Writes the arrays, whole or not at all; `metadata` is JSON by name.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
    >>> write(path, {"params/head/bias": np.zeros(3, np.float32)}, {"step": 5})
    >>> stored = read(path)
    >>> stored.step, stored.specs, stored.read()["params/head/bias"].tolist()
    (5, {'params/head/bias': ['float32', [3]]}, [0.0, 0.0, 0.0])
    """
    extras.require("a safetensors file", "safetensors")
    from safetensors.numpy import save_file

    for name, array in arrays.items():
        if str(array.dtype) not in KNOWN.values():
            raise UserError(
                f"{name} is {array.dtype}, which safetensors does not hold; export another run"
            )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    try:
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()},
            temporary,
            metadata=texts | {"format": "jaxtrain"},
        )
        durable_files.publish(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def read(path: Path) -> variables.Stored:
    """The variables in a file, not read yet; names with dots become slash paths, and names without
    a collection are parameters. `UserError` if it is no safetensors file."""
    extras.require("a safetensors file", "safetensors")
    from safetensors import SafetensorError, safe_open

    shown = printable(str(path))
    try:
        with safe_open(path, framework="numpy") as file:
            texts = file.metadata() or {}
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {
                name: (part.get_dtype(), list(part.get_shape())) for name, part in found.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{shown}: not a readable safetensors file ({one_line(str(error))}); give a workdir,"
            " WORKDIR/checkpoints/STEP, or a whole one"
        ) from error
    ours = texts.get("format") == "jaxtrain"
    names = {name: name if ours else _path_of(name) for name in shapes}
    for name, (dtype, _) in shapes.items():
        if dtype not in KNOWN:
            raise UserError(f"{shown}: {name} is {dtype}; convert it to F32 or BF16")
    if len(set(names.values())) < len(names):
        raise UserError(f"{shown}: two of its names stand for one path; rename one")
    specs: Specs = {
        names[name]: [KNOWN[dtype], shape] for name, (dtype, shape) in sorted(shapes.items())
    }

    def load() -> HostState:
        try:
            with safe_open(path, framework="numpy") as file:
                return {names[name]: file.get_tensor(name) for name in shapes}
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{shown}: {one_line(str(error))}") from error

    kept = {name: _json(text) for name, text in texts.items()} if ours else {}
    step = kept.get("step") if isinstance(kept.get("step"), int) else None
    return variables.Stored(
        specs, load, step, str(kept.get("params") or ""), variables.image_of(kept)
    )


def _path_of(name: str) -> str:
    path = name if "/" in name else name.replace(".", "/")
    collection = path.partition("/")[0]
    return path if collection in ("params", "batch_stats") else f"params/{path}"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
