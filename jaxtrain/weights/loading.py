"""A model of another toolkit, opened from its folder or file: what it is, where its parameters are,
and which tokenizer belongs to it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain import adapters, tree
from jaxtrain.checkpoints import lazy
from jaxtrain.errors import UserError
from jaxtrain.messages import printable
from jaxtrain.models.resnet import ResNet
from jaxtrain.models.vit import ViT
from jaxtrain.parallel import sharding
from jaxtrain.weights import config, gguf_file, names, peft_files, safetensors_files, torch_names

GGUF = ".gguf"
NAMED_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model")


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model that is described, and not read yet."""

    path: Path
    model: Any
    """A `Transformer` or `Encoder`."""
    config: Mapping[str, Any]
    """Its `config.json`."""
    tensors: Mapping[str, lazy.Lazy]
    """By Hugging Face's names."""
    tokenizer: Path | None
    """A folder or file from which its tokenizer can be read."""
    notes: tuple[str, ...]
    """What should be said once."""

    @property
    def folder(self) -> Path:
        """Where its other files are."""
        return self.path if self.path.is_dir() else self.path.parent

    def params(self) -> tree.PyTree:
        """The parameters as a tree, still in their file (`lazy.Lazy`); `UserError` unless they are
        exactly the model's."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        what = printable(str(self.path))
        return names.to_ours(self.model, self.tensors.__getitem__, shapes, what=what)


def is_model(path: Path) -> bool:
    """Whether there is a model of another toolkit: a folder or file beside its `config.json`, or a
    GGUF file."""
    if path.suffix == GGUF:
        return path.is_file()
    described = (_folder(path) / safetensors_files.CONFIG).is_file()
    return described and (path.is_dir() or (path.is_file() and not _is_ours(path)))


def open_model(path: str | Path) -> Opened:
    """The model in a folder with its `config.json`, in one safetensors file beside it, or in a GGUF
    file; nothing is read but headers. `UserError` if there is none, or it is none that we have."""
    place = Path(path).expanduser()
    if place.suffix == GGUF and place.exists():
        found = gguf_file.open_model(place)
        described = config.read(found.config, printable(str(place)))
        notes = described.notes
        return Opened(place, described.model, found.config, found.tensors, place, notes)
    _refuse_adapters(place)
    stored = safetensors_files.open_weights(place)
    folder = _folder(place)
    described_at = folder / safetensors_files.CONFIG
    if not described_at.is_file():
        raise UserError(
            f"{printable(str(folder))}: has no {safetensors_files.CONFIG}, which says what model"
            " its weights are of; copy it there"
        )
    said = safetensors_files.read_json(described_at)
    described = config.read(said, printable(str(described_at)))
    tokenizer = any((folder / name).is_file() for name in NAMED_TOKENIZERS)
    return Opened(
        place, described.model, said, stored.tensors, folder if tokenizer else None, described.notes
    )


def _refuse_adapters(place: Path) -> None:
    """`UserError` for a folder of PEFT, which has the adapters and not the model."""
    if (place / peft_files.CONFIG).is_file() and not (place / safetensors_files.CONFIG).is_file():
        raise UserError(
            f"{printable(str(place))}: holds adapters alone, without the model that they are of;"
            f" {peft_files.REMEDY}"
        )


def variables(path: Path, model: Any) -> dict[str, Any] | None:
    """The variables in files of another toolkit, by slash path and still in them (`lazy.Lazy`);
    None if there are none of such.

    `model` is the one that they are for: a ResNet or ViT may take a file with torchvision's or
    timm's names. `UserError` if the files are not what they must be.
    """
    if is_model(path):
        return tree.flatten({"params": open_model(path).params()})
    _refuse_adapters(path)
    if isinstance(model, ResNet | ViT) and path.is_file() and not _is_ours(path):
        return dict(torch_names.read(path, model)) if _has_torch_names(path, model) else None
    return None


def load(
    path: str | Path,
    mesh: Mesh | None = None,
    *,
    rules: tree.Rules[str] = (),
    dtype: Any = jnp.float32,
) -> tuple[Any, tree.PyTree, Path | None]:
    """The model in a folder or file, its parameters on a mesh, and where its tokenizer is, or None.

        model, params, tokenizer = weights.load("SmolLM2-135M-Instruct")
        logits = model.apply({"params": params}, tokens)

    Without a mesh parameters lie on the first device; `rules` are those of `--shard`. Each is read
    by itself, and only the parts that this process's devices hold.
    """
    opened = open_model(path)
    where = places(opened.model, mesh, rules=rules, dtype=dtype)
    params = jax.tree.map(
        lambda at, source, like: lazy.placed(at, source, like),
        _paths(where),
        opened.params(),
        where,
    )
    return opened.model, params, opened.tokenizer


def places(
    model: Any, mesh: Mesh | None, *, rules: tree.Rules[str] = (), dtype: Any = jnp.float32
) -> tree.PyTree:
    """Shape, dtype and sharding of each parameter of a model of tokens."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(adapters.functions(model).init, key, tokens)["params"]
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = jax.tree.map(lambda _: device, shapes)
    else:
        axes = adapters.logical_axes(model, tokens)["params"]
        placed = sharding.parameters(shapes, axes, mesh, rules=rules)
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=at), shapes, placed
    )


def _paths(params: tree.PyTree) -> tree.PyTree:
    """The path of each leaf, in its place."""
    return jax.tree.unflatten(jax.tree.structure(params), list(tree.flatten(params)))


def _is_ours(path: Path) -> bool:
    """Whether a file was written by `export` as plain parameters; what cannot be read is not."""
    try:
        return safetensors_files.read_header(path)[1].get("format") == "jaxtrain"
    except UserError:
        return False


def _has_torch_names(path: Path, model: Any) -> bool:
    try:
        return torch_names.fits(model, safetensors_files.read_header(path)[0])
    except UserError:  # `checkpoints.weights_file` says what is wrong with it
        return False


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
