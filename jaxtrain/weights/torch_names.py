"""Names of torchvision's ResNets and of timm's vision transformers, from and to ours.

What is alike: paddings (half a kernel on both sides), the stride in the 3x3 convolution of a
bottleneck, epsilons (1e-5 in batch norms, 1e-6 in timm's layer norms), 0.9 of the running averages
kept at each step, the class token before the patches and with a position of its own. What is laid
out otherwise there, and mapped here: convolutions (out, in, height, width), dense layers (out, in),
query, key and value as one, the patch embedding as a convolution. What differs in what is computed:
timm's GELU is made of the error function (`ViT.activation=gelu_exact`), and PyTorch's running
variance is the unbiased one: it is taken as it is, which evaluation computes alike, and training
goes on with the biased one.

Dims: C channels, D model width, N heads, K head width, F hidden width.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain import tree
from jaxtrain.checkpoints import lazy
from jaxtrain.errors import UserError
from jaxtrain.messages import printable
from jaxtrain.models.resnet import EXPANSION, ResNet
from jaxtrain.models.vit import ViT
from jaxtrain.weights import safetensors_files

Shape = tuple[int, ...]
COUNTER = "num_batches_tracked"
"""How many batches a batch norm has seen: PyTorch's own, of no use here."""
MOST_NAMED = 6
CONV, DENSE = (2, 3, 1, 0), (1, 0)
"""In which order our kernels have their dims."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One variable of ours in a tensor of theirs."""

    path: str
    """Such as `params/stem_conv/kernel`."""
    shape: Shape
    name: str
    stored: Shape
    axes: Shape = ()
    """In which order our dims come; empty for theirs."""
    part: tuple[int, int] = (0, 1)
    """Which of how many parts along their first dim."""

    def ours(self, tensor: Any) -> Any:
        """The variable, from the tensor.

        >>> row = Row("query", (2, 1, 1), "qkv", (3, 2), DENSE, (1, 3))
        >>> row.ours(np.arange(6).reshape(3, 2)).ravel().tolist()
        [2, 3]
        """
        index, count = self.part
        size = self.stored[0] // count
        cut = tensor[index * size : (index + 1) * size] if count > 1 else tensor
        return (cut.transpose(*self.axes) if self.axes else cut).reshape(self.shape)

    def theirs(self, variable: np.ndarray) -> np.ndarray:
        """The part of the tensor, from the variable."""
        size = (self.stored[0] // self.part[1], *self.stored[1:])
        if not self.axes:
            return variable.reshape(size)
        transposed = variable.reshape([size[axis] for axis in self.axes])
        return transposed.transpose(np.argsort(self.axes))


def fits(model: Any, available: Mapping[str, Any]) -> bool:
    """Whether a file has torchvision's or timm's names for a model of this kind.

    >>> fits(ViT(), {"cls_token": ()}), fits(ViT(), {"conv1.weight": ()})
    (True, False)
    """
    if isinstance(model, ResNet):
        return "conv1.weight" in available and "bn1.weight" in available
    return isinstance(model, ViT) and "cls_token" in available


def rows(model: ResNet | ViT) -> tuple[Row, ...]:
    """Every variable of the model, and where it is in a file.

    >>> [row.name for row in rows(ViT(depth=0))][:2]
    ['patch_embed.proj.weight', 'patch_embed.proj.bias']

    `UserError` for settings that those libraries do not have.
    """
    return tuple(_resnet(model) if isinstance(model, ResNet) else _vit(model))


def to_ours(
    model: ResNet | ViT, tensors: Mapping[str, Any], what: str = "the file"
) -> dict[str, Any]:
    """The variables of the model by slash path, from all tensors of a file.

    The head may have any number of classes, and the images any number of channels. `UserError`, one
    for all, if a tensor is missing, is left over or has another shape; for weights of whole
    numbers; and for a ViT whose GELU is not timm's.
    """
    if isinstance(model, ViT) and model.activation != "gelu_exact":
        raise UserError(f"{what}: timm's GELU is the exact one; set --model.activation=gelu_exact")
    head = "fc.weight" if isinstance(model, ResNet) else "head.weight"
    first = "conv1.weight" if isinstance(model, ResNet) else "patch_embed.proj.weight"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    classes = shapes.get(head, (model.num_classes,))[0]
    channels = shapes.get(first, (0, 3))[1]
    places = shapes.get("pos_embed", (1, 197))[1]
    wanted = _of(model, classes, channels, places)
    stored = {row.name: row.stored for row in wanted}
    rest = [name for name in shapes if name not in stored and not name.endswith(COUNTER)]
    misshapen = [
        f"{name} {shapes[name]}, must be {shape}"
        for name, shape in stored.items()
        if name in shapes and shapes[name] != shape
    ]
    faults = {
        "missing": [name for name in stored if name not in shapes],
        "left over": rest,
        "misshapen": misshapen,
    }
    if any(faults.values()):
        listed = "; ".join(f"{word}: {_listed(names)}" for word, names in faults.items() if names)
        raise UserError(f"{what} is not the {type(model).__name__} of the run: {listed}")
    for name in stored:
        lazy.check_floating(what, name, tensors[name])
    return {row.path: row.ours(tensors[row.name]) for row in wanted}


def tensors_of(model: ResNet | ViT, variables: tree.PyTree) -> dict[str, Callable[[], np.ndarray]]:
    """What makes each tensor of a file, by name, from the variables of the model."""
    given = tree.flatten(variables)
    channels, places = _sizes_of(model, given)
    parts: dict[str, list[Row]] = {}
    for row in _of(model, model.num_classes, channels, places):
        parts.setdefault(row.name, []).append(row)
    own = {row.path: row.shape for together in parts.values() for row in together}
    odd = [path for path in {*own, *given} if own.get(path) != _shape(given.get(path))]
    if odd:
        raise UserError(f"the variables are not those of the model: {_listed(sorted(odd))}")

    def made(together: list[Row]) -> Callable[[], np.ndarray]:
        return lambda: np.concatenate([row.theirs(np.asarray(given[row.path])) for row in together])

    return {name: made(together) for name, together in parts.items()}


def write(path: Path, model: ResNet | ViT, variables: tree.PyTree) -> int:
    """Writes a safetensors file with those names, whole or not at all; how many tensors."""
    made = tensors_of(model, variables)
    channels, places = _sizes_of(model, tree.flatten(variables))
    stored = {row.name: row.stored for row in _of(model, model.num_classes, channels, places)}
    specs: dict[str, tuple[Shape, Any]] = {}
    counters: dict[str, np.ndarray] = {}
    for name, shape in stored.items():
        specs[name] = (shape, np.dtype(np.float32))
        if name.endswith("running_var"):
            counter = f"{name.removesuffix('running_var')}{COUNTER}"
            specs[counter], counters[counter] = ((), np.dtype(np.int64)), np.zeros((), np.int64)

    def coming() -> Iterator[tuple[str, np.ndarray]]:
        for name in specs:
            yield name, counters[name] if name in counters else made[name]().astype(np.float32)

    safetensors_files.write_file(path, specs, coming())
    return len(specs)


def read(path: Path, model: ResNet | ViT) -> dict[str, lazy.Lazy]:
    """The variables in a safetensors file with those names, by slash path, not read yet."""
    stored = safetensors_files.open_weights(path)
    return to_ours(model, stored.tensors, printable(str(path)))


def _shape(leaf: Any) -> Shape | None:
    return None if leaf is None else tuple(leaf.shape)


def _listed(names: list[str]) -> str:
    more = f", ... and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _of(model: ResNet | ViT, classes: int, channels: int, places: int) -> tuple[Row, ...]:
    model = model.clone(num_classes=classes)
    own = rows(model) if isinstance(model, ResNet) else tuple(_vit(model, channels, places))
    if isinstance(model, ViT) or channels == 3:
        return own
    stem = own[0]
    return (
        dataclasses.replace(
            stem,
            shape=(*stem.shape[:2], channels, stem.shape[3]),
            stored=(stem.stored[0], channels, *stem.stored[2:]),
        ),
        *own[1:],
    )


def _sizes_of(model: ResNet | ViT, given: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of the images, and places of a ViT, by the shapes of its variables."""
    if isinstance(model, ResNet):
        stem = given.get("params/stem_conv/kernel")
        return (3 if stem is None else stem.shape[2]), 0
    kernel, table = given.get("params/embed/kernel"), given.get("params/positions")
    channels = 3 if kernel is None else kernel.shape[0] // model.patch**2
    return channels, 197 if table is None else table.shape[1]


def _dense(path: str, name: str, into: int, out: int) -> Iterator[Row]:
    yield Row(f"params/{path}/kernel", (into, out), f"{name}.weight", (out, into), DENSE)
    yield Row(f"params/{path}/bias", (out,), f"{name}.bias", (out,))


def _conv(path: str, name: str, side: int, into: int, out: int) -> Row:
    shape, stored = (side, side, into, out), (out, into, side, side)
    return Row(f"params/{path}/kernel", shape, f"{name}.weight", stored, CONV)


def _batch_norm(path: str, name: str, width: int) -> Iterator[Row]:
    for ours, theirs in (
        ("params/{}/scale", "weight"),
        ("params/{}/bias", "bias"),
        ("batch_stats/{}/mean", "running_mean"),
        ("batch_stats/{}/var", "running_var"),
    ):
        yield Row(ours.format(path), (width,), f"{name}.{theirs}", (width,))


def _resnet(model: ResNet) -> Iterator[Row]:
    """torchvision's, or of that kind with a small stem."""
    if model.block == "preactivation":
        raise UserError("ResNet.block=preactivation: torchvision has basic and bottleneck only")
    if model.shortcut != "project":
        raise UserError("ResNet.shortcut=pad: torchvision's project; set shortcut=project")
    side = 7 if model.stem == "imagenet" else 3
    yield _conv("stem_conv", "conv1", side, 3, model.stem_width)
    yield from _batch_norm("stem_norm", "bn1", model.stem_width)
    into = model.stem_width
    for stage, blocks in enumerate(model.stages):
        width = model.width * 2**stage
        out = width * EXPANSION[model.block]
        for index in range(blocks):
            ours, theirs = f"stage{stage}_block{index}", f"layer{stage + 1}.{index}"
            sides = (3, 3) if model.block == "basic" else (1, 3, 1)
            widths = (into, *(width,) * (len(sides) - 1), out)
            for place, size in enumerate(sides):
                yield _conv(
                    f"{ours}/conv{place}",
                    f"{theirs}.conv{place + 1}",
                    size,
                    widths[place],
                    widths[place + 1],
                )
                yield from _batch_norm(
                    f"{ours}/norm{place}", f"{theirs}.bn{place + 1}", widths[place + 1]
                )
            if into != out or (stage > 0 and index == 0):
                yield _conv(f"{ours}/shortcut_conv", f"{theirs}.downsample.0", 1, into, out)
                yield from _batch_norm(f"{ours}/shortcut_norm", f"{theirs}.downsample.1", out)
            into = out
    yield from _dense("head", "fc", into, model.num_classes)


def _vit(model: ViT, channels: int = 3, places: int = 197) -> Iterator[Row]:
    """timm's `VisionTransformer` with a class token."""
    if model.pool != "token" or model.positions != "learned":
        raise UserError(
            f"ViT.pool={model.pool}, positions={model.positions}: timm's have pool=token (with the"
            " mean they normalise after it, ours before) and positions=learned"
        )
    D, side = model.width, model.patch
    heads = (model.heads, D // model.heads)
    patch = side * side * channels
    stored = (D, channels, side, side)
    yield Row("params/embed/kernel", (patch, D), "patch_embed.proj.weight", stored, CONV)
    yield Row("params/embed/bias", (D,), "patch_embed.proj.bias", (D,))
    yield Row("params/token", (1, 1, D), "cls_token", (1, 1, D))
    yield Row("params/positions", (1, places, D), "pos_embed", (1, places, D))
    for index in range(model.depth):
        ours, theirs = f"block{index}", f"blocks.{index}"
        for place in (0, 1):
            yield from _layer_norm(f"{ours}/norm{place}", f"{theirs}.norm{place + 1}", D)
        for place, name in enumerate(("query", "key", "value")):
            path, fused, part = f"params/{ours}/attention/{name}", f"{theirs}.attn.qkv", (place, 3)
            yield Row(f"{path}/kernel", (D, *heads), f"{fused}.weight", (3 * D, D), DENSE, part)
            yield Row(f"{path}/bias", heads, f"{fused}.bias", (3 * D,), (), part)
        out, there = f"params/{ours}/attention/out", f"{theirs}.attn.proj"
        yield Row(f"{out}/kernel", (*heads, D), f"{there}.weight", (D, D), DENSE)
        yield Row(f"{out}/bias", (D,), f"{there}.bias", (D,))
        hidden = model.mlp_ratio * D
        yield from _dense(f"{ours}/mlp_in", f"{theirs}.mlp.fc1", D, hidden)
        yield from _dense(f"{ours}/mlp_out", f"{theirs}.mlp.fc2", hidden, D)
    yield from _layer_norm("norm", "norm", D)
    yield from _dense("head", "head", D, model.num_classes)


def _layer_norm(path: str, name: str, width: int) -> Iterator[Row]:
    yield Row(f"params/{path}/scale", (width,), f"{name}.weight", (width,))
    yield Row(f"params/{path}/bias", (width,), f"{name}.bias", (width,))
