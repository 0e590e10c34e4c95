"""torchvision's ResNets and timm's ViTs: every tensor has a place and back; held to networks that
are written out in NumPy, and, in a slow test, to PyTorch."""

import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from safetensors import numpy as reference

from jaxtrain import tree
from jaxtrain.errors import UserError
from jaxtrain.models import ResNet, ViT, resnet, vit
from jaxtrain.weights import torch_names

TINY: dict[str, Any] = {
    "basic": ResNet(5, (1, 2), 4, "basic", "imagenet", 4, "project"),
    "bottleneck": ResNet(5, (2, 1), 4, "bottleneck", "imagenet", 4, "project"),
    "small_stem": ResNet(5, (1, 1), 4, "basic", "small", 4, "project"),
    "vit": ViT(num_classes=5, patch=4, width=8, depth=2, heads=2, activation="gelu_exact"),
}
COUNTS = {"resnet18": 11689512, "resnet34": 21797672, "resnet50": 25557032, "resnet101": 44549160}
"""Parameters of torchvision's, as its pages say."""


def stored(model: Any) -> dict[str, np.ndarray]:
    """Random tensors as PyTorch would save them."""
    draw = np.random.default_rng(0)
    places = {"pos_embed": (1, 5, 8)}
    found: dict[str, np.ndarray] = {}
    for row in torch_names.rows(model):
        shape = places.get(row.name, row.stored)
        array = draw.standard_normal(shape).astype(np.float32) * 0.3
        found[row.name] = np.abs(array) + 0.5 if "var" in row.name else array
        if "var" in row.name:
            counter = row.name.replace("running_var", "num_batches_tracked")
            found[counter] = np.array(7, np.int64)
    return found


def nested(flat: dict[str, Any]) -> Any:
    whole: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        place = whole
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf.read() if hasattr(leaf, "read") else leaf
    return whole


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_has_a_place_and_comes_back(tmp_path: Path, name: str) -> None:
    model, file = TINY[name], tmp_path / "m.safetensors"
    tensors = stored(model)
    reference.save_file(tensors, file)
    flat = torch_names.read(file, model)
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
    made = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image))
    shapes = {path: leaf.shape for path, leaf in tree.flatten(made).items()}
    assert {path: leaf.shape for path, leaf in flat.items()} == shapes
    count = torch_names.write(tmp_path / "back.safetensors", model, nested(flat))
    back = reference.load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys() and count == len(tensors)
    for key, array in tensors.items():
        if key.endswith("num_batches_tracked"):
            assert back[key] == 0 and back[key].dtype == np.int64
        else:
            np.testing.assert_array_equal(back[key], array)


@pytest.mark.parametrize("name", COUNTS)
def test_torchvisions_sizes(name: str) -> None:
    names = {row.name: row.stored for row in torch_names.rows(resnet.NAMES[name])}
    assert COUNTS[name] == sum(
        math.prod(shape) for key, shape in names.items() if "running" not in key
    )


def conv(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """PyTorch's convolution (C, H, W) with half a kernel of padding, one output at a time."""
    side = kernel.shape[-1]
    x = np.pad(x, ((0, 0), (side // 2, side // 2), (side // 2, side // 2)))
    size = (x.shape[1] - side) // stride + 1
    y = np.zeros((kernel.shape[0], size, size))
    for i in range(size):
        for j in range(size):
            part = x[:, i * stride : i * stride + side, j * stride : j * stride + side]
            y[:, i, j] = np.tensordot(kernel, part, 3)
    return y


def test_a_bottleneck_is_torchvisions(tmp_path: Path) -> None:
    """The network by torchvision's source, in float64."""
    model, file = TINY["bottleneck"], tmp_path / "m.safetensors"
    t = {name: array.astype(np.float64) for name, array in stored(model).items()}
    reference.save_file(stored(model), file)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scale = t[f"{name}.weight"] / np.sqrt(t[f"{name}.running_var"] + 1e-5)
        moved = x - t[f"{name}.running_mean"][:, None, None]
        return moved * scale[:, None, None] + t[f"{name}.bias"][:, None, None]

    def block(x: np.ndarray, name: str, stride: int) -> np.ndarray:
        y = np.maximum(norm(conv(x, t[f"{name}.conv1.weight"], 1), f"{name}.bn1"), 0)
        y = np.maximum(norm(conv(y, t[f"{name}.conv2.weight"], stride), f"{name}.bn2"), 0)
        y = norm(conv(y, t[f"{name}.conv3.weight"], 1), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in t:
            x = conv(x, t[f"{name}.downsample.0.weight"], stride)
            x = norm(x, f"{name}.downsample.1")
        return np.maximum(x + y, 0)

    image = np.random.default_rng(1).standard_normal((8, 8, 3))
    x = np.maximum(norm(conv(image.transpose(2, 0, 1), t["conv1.weight"], 2), "bn1"), 0)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    x = np.stack(
        [
            [x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(2)]
            for i in range(2)
        ]
    ).transpose(2, 0, 1)
    x = block(block(block(x, "layer1.0", 1), "layer1.1", 1), "layer2.0", 2)
    want = t["fc.weight"] @ x.mean((1, 2)) + t["fc.bias"]
    variables = nested(torch_names.read(file, model))
    got = jax.jit(model.apply)(variables, image[None].astype(np.float32))
    np.testing.assert_allclose(got[0], want, rtol=1e-4)


def test_a_vit_is_timms(tmp_path: Path) -> None:
    """The network by timm's source, in float64."""
    model, file = TINY["vit"], tmp_path / "m.safetensors"
    t = {name: array.astype(np.float64) for name, array in stored(model).items()}
    reference.save_file(stored(model), file)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    image = np.random.default_rng(1).standard_normal((8, 8, 3))
    rows = []
    for i in (0, 4):
        for j in (0, 4):
            part = image[i : i + 4, j : j + 4].transpose(2, 0, 1)
            rows.append(np.tensordot(t["patch_embed.proj.weight"], part, 3))
    x = np.stack(rows) + t["patch_embed.proj.bias"]
    x = np.concatenate([t["cls_token"][0], x]) + t["pos_embed"][0]
    for index in range(2):
        name = f"blocks.{index}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv.reshape(5, 3, 2, 4).transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) / 2
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        mixed = (weights @ v).transpose(1, 0, 2).reshape(5, 8)
        x = x + linear(mixed, f"{name}.attn.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / 2**0.5)) / 2
        x = x + linear(hidden, f"{name}.mlp.fc2")
    want = linear(norm(x, "norm")[0], "head")
    variables = nested(torch_names.read(file, model))
    got = jax.jit(model.apply)(variables, image[None].astype(np.float32))
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_one_line_for_all(tmp_path: Path) -> None:
    model, tensors = TINY["basic"], stored(TINY["basic"])
    tensors["layer9.0.conv1.weight"] = tensors.pop("bn1.bias")
    tensors["layer1.0.conv1.weight"] = np.ones((4, 4, 5, 5), np.float32)
    file = tmp_path / "m.safetensors"
    reference.save_file(tensors, file)
    said = (
        "is not the ResNet of the run: missing: bn1.bias; left over: layer9.0.conv1.weight;"
        " misshapen: layer1.0.conv1.weight (4, 4, 5, 5), must be (4, 4, 3, 3)"
    )
    with pytest.raises(UserError, match=re.escape(said)):
        torch_names.read(file, model)
    whole = stored(model) | {"fc.weight": np.ones((5, 8), np.int8)}
    reference.save_file(whole, file)
    said = f"{file}: fc.weight is int8, and weights are floats; take the files that are not quantis"
    with pytest.raises(UserError, match=re.escape(said)):
        torch_names.read(file, model)
    for other, said in (
        (
            ResNet(block="preactivation"),
            "block=preactivation: torchvision has basic and bottleneck",
        ),
        (ResNet(), "shortcut=pad: torchvision's project; set shortcut=project"),
        (
            ViT(pool="mean", activation="gelu_exact"),
            "ViT.pool=mean, positions=learned: timm's have",
        ),
        (ViT(), "timm's GELU is the exact one; set --model.activation=gelu_exact"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            torch_names.to_ours(other, tensors)
    with pytest.raises(UserError, match=r"the variables are not those of the model: batch_stats"):
        torch_names.write(file, model, {"params": {"x": np.ones(1)}})


def test_a_file_of_other_classes_and_channels_is_read(tmp_path: Path) -> None:
    model = TINY["vit"].clone(num_classes=7)
    tensors = stored(model)
    tensors["patch_embed.proj.weight"] = np.ones((8, 1, 4, 4), np.float32)
    reference.save_file(tensors, tmp_path / "m.safetensors")
    flat = torch_names.read(tmp_path / "m.safetensors", TINY["vit"])
    assert flat["params/head/kernel"].shape == (8, 7)
    assert flat["params/embed/kernel"].shape == (16, 8)


def test_which_files_are_meant() -> None:
    assert torch_names.fits(resnet.NAMES["resnet18"], {"conv1.weight": 0, "bn1.weight": 0})
    assert torch_names.fits(vit.NAMES["vit_ti16"], {"cls_token": 0})
    assert not torch_names.fits(vit.NAMES["vit_ti16"], {"conv1.weight": 0, "bn1.weight": 0})
    assert not torch_names.fits(resnet.NAMES["resnet18"], {"params/stem_conv/kernel": 0})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_resnet50_is_pytorchs(tmp_path: Path) -> None:
    """torchvision's ResNet-50 by its published structure, out of PyTorch's own layers."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from safetensors.torch import load_file, save_file

    layers = torch.nn

    class Bottleneck(layers.Module):
        def __init__(self, into: int, width: int, stride: int) -> None:
            super().__init__()
            out = 4 * width
            self.conv1 = layers.Conv2d(into, width, 1, bias=False)
            self.bn1 = layers.BatchNorm2d(width)
            self.conv2 = layers.Conv2d(width, width, 3, stride, 1, bias=False)
            self.bn2 = layers.BatchNorm2d(width)
            self.conv3 = layers.Conv2d(width, out, 1, bias=False)
            self.bn3 = layers.BatchNorm2d(out)
            self.downsample = None
            if stride > 1 or into != out:
                self.downsample = layers.Sequential(
                    layers.Conv2d(into, out, 1, stride, bias=False), layers.BatchNorm2d(out)
                )

        def forward(self, x: Any) -> Any:
            y = torch.relu(self.bn1(self.conv1(x)))
            y = torch.relu(self.bn2(self.conv2(y)))
            y = self.bn3(self.conv3(y))
            return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    class Net(layers.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = layers.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.bn1 = layers.BatchNorm2d(64)
            into = 64
            for stage, blocks in enumerate((3, 4, 6, 3)):
                parts = []
                for index in range(blocks):
                    width, stride = 64 * 2**stage, 2 if stage and not index else 1
                    parts.append(Bottleneck(into, width, stride))
                    into = 4 * width
                setattr(self, f"layer{stage + 1}", layers.Sequential(*parts))
            self.fc = layers.Linear(2048, 1000)

        def forward(self, x: Any) -> Any:
            x = torch.relu(self.bn1(self.conv1(x)))
            x = layers.functional.max_pool2d(x, 3, 2, 1)
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    net = Net().eval()
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    model = resnet.NAMES["resnet50"]
    variables = nested(torch_names.read(tmp_path / "m.safetensors", model))
    images = np.random.default_rng(0).standard_normal((2, 96, 96, 3)).astype(np.float32)
    with torch.no_grad():
        want = net(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    got = np.asarray(jax.jit(model.apply)(variables, images))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    torch_names.write(tmp_path / "back.safetensors", model, variables)
    net.load_state_dict(load_file(tmp_path / "back.safetensors"))
