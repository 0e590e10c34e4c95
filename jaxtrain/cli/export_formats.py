"""The formats of `export`: a folder that `transformers` loads, a folder that PEFT loads, a file
with torchvision's or timm's names."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtrain import messages
from jaxtrain.errors import UserError

FOLDERS = ("hugging_face", "peft")
FORMATS = (*FOLDERS, "torch")
BELONG = {"to": FOLDERS, "dtype": ("hugging_face",), "tokenizer": ("hugging_face",)}
"""Flags that belong to some formats only."""


def chosen(given: Mapping[str, str]) -> str:
    """What `--format` says, or nothing for plain parameters; `UserError` for another word, and for
    flags that do not belong to it."""
    form = given.get("format", "")
    if "format" in given and form not in FORMATS:
        raise UserError(
            f"export --format={messages.shown(form)}: unknown; valid: {', '.join(FORMATS)}"
            f"{messages.did_you_mean(form, FORMATS)}"
        )
    for name, forms in BELONG.items():
        if name in given and form not in forms:
            raise UserError(
                f"export --{name}={messages.printable(given[name])}: belongs to"
                f" --format={' or '.join(forms)}; add it, or drop --{name}"
            )
    return form


def new_folder(given: Mapping[str, str]) -> Path:
    """The folder that `--to` names; `UserError` if there is none, or it is there and not empty."""
    for name in ("out", "overwrite"):
        if name in given:
            raise UserError(
                f"export --{name}: belongs to a file; --format={given['format']} writes a folder,"
                " named by --to=DIR"
            )
    if "to" not in given:
        raise UserError(f"export --format={given['format']}: needs --to=DIR, a new folder")
    path = Path(given["to"]).expanduser()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        shown = messages.printable(given["to"])
        raise UserError(f"export --to={shown}: is there already; choose another, or delete it")
    return path


def write(
    form: str, path: Path, record: Mapping[str, Any], values: Mapping[str, Any], given: Any
) -> str:
    """Writes the variables of a run; what they became, in words."""
    from jaxtrain.inference import trained

    model = trained.component(record, "model", None, f"{messages.printable(str(path))}: run.json")
    writers: dict[str, Callable[..., str]] = {
        "hugging_face": _hugging_face,
        "peft": _peft,
        "torch": _torch,
    }
    return writers[form](path, model, record, values, given)


def _params(model: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters by slash path; `UserError` if the run has other variables."""
    if other := sorted(name for name in values if not name.startswith("params/")):
        raise UserError(
            f"export: {other[0]} is no parameter, and no family of Hugging Face's has it;"
            f" {type(model).__name__} goes into --format=torch, or a file"
        )
    return {name.removeprefix("params/"): value for name, value in values.items()}


def _hugging_face(
    path: Path, model: Any, record: Mapping[str, Any], values: Mapping[str, Any], given: Any
) -> str:
    from jaxtrain import weights
    from jaxtrain.models.lora import ADAPTERS
    from jaxtrain.weights import config

    _check_kind(model, "hugging_face", "Transformer", "Encoder")
    params = _params(model, values)
    if any(re.search(ADAPTERS, path) for path in params):
        raise UserError(
            "export --format=hugging_face: the run trained adapters; add --merge for the whole"
            " model, or write them alone: --format=peft"
        )
    try:
        config.write(model)
    except UserError as error:
        raise UserError(
            f"export --format=hugging_face: {error}; write a file: --out=FILE.safetensors without"
            " --format"
        ) from error
    tokenizer = _tokenizer_of(record, given.get("tokenizer"))
    dtype = given.get("dtype", "float32")
    count = weights.save(path, model, params, dtype=dtype, tokenizer=tokenizer)
    files = [file.name for file in weights.tokenizer_files(path)]
    told = ", ".join(files) or "none (--tokenizer=DIR says where they are)"
    return f"{count} tensors of {dtype}, tokenizer's files: {told}"


def _peft(
    path: Path, model: Any, record: Mapping[str, Any], values: Mapping[str, Any], given: Any
) -> str:
    from jaxtrain.inference import trained
    from jaxtrain.weights import peft_files

    _check_kind(model, "peft", "Transformer", "Encoder")
    lora = trained.lora_of(record, None, "run.json")
    if lora is None or "merge" in given:
        remedy = "drop --merge" if "merge" in given else "use --format=hugging_face"
        raise UserError(f"export --format=peft: there are no adapters to write; {remedy}")
    if lora.also:
        raise UserError(
            f"export --format=peft: {', '.join(lora.also)} were trained besides the adapters"
            " (--lora.also), which PEFT's files do not hold; use --format=hugging_face --merge"
        )
    base = record["config"].get("init_from") or ""
    count = peft_files.write(path, model, _params(model, values), lora, base=base)
    return f"adapters of {count} layers"


def _torch(
    path: Path, model: Any, record: Mapping[str, Any], values: Mapping[str, Any], given: Any
) -> str:
    from jaxtrain.weights import torch_names

    del record, given
    _check_kind(model, "torch", "ResNet", "ViT")
    return f"{torch_names.write(path, model, values)} tensors"


def _check_kind(model: Any, form: str, *kinds: str) -> None:
    if type(model).__name__ not in kinds:
        raise UserError(
            f"export --format={form}: is for {' and '.join(kinds)}, the run's model is"
            f" {type(model).__name__}; write a file: --out=FILE.safetensors without --format"
        )


def _tokenizer_of(record: Mapping[str, Any], asked: str | None) -> Path | None:
    """The folder with the tokenizer's files, or the GGUF file that holds it: what was asked for, or
    what the run read its text or its first parameters by."""
    if asked is not None:
        path = Path(asked).expanduser()
        if not _has_tokenizer(path):
            raise UserError(
                f"export --tokenizer={messages.printable(asked)}: no folder with a tokenizer.json"
                " or the like; give that of the model"
            )
        return path
    settings = record["config"]
    data = settings.get("data")
    named = [data.get("tokenizer")] if isinstance(data, Mapping) else []
    for place in (*named, settings.get("init_from")):
        if not isinstance(place, str) or not place:
            continue
        path = Path(place).expanduser()
        path = path.parent if path.is_file() and path.suffix != ".gguf" else path
        if _has_tokenizer(path):
            return path
    return None


def _has_tokenizer(path: Path) -> bool:
    """Whether a folder has files of a tokenizer, or a GGUF file, which holds one."""
    from jaxtrain import weights

    return path.is_file() and path.suffix == ".gguf" or bool(weights.tokenizer_files(path))
