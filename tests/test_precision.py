"""The precision policy: what `auto` takes and what is refused, by card, and what models of every
kind compute in."""

import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtrain import adapters, config, hardware, models, precision
from jaxtrain.precision import POLICIES
from jaxtrain.runner import build, describe
from jaxtrain.train import compare_meshes


@pytest.mark.parametrize(
    ("card", "policy"),
    [
        ("V100 SXM", "fp16"),
        ("TITAN RTX", "fp16"),
        ("T4", "fp16"),
        ("RTX 3090", "bf16"),
        ("A100", "bf16"),
        ("H100 SXM", "bf16"),
        ("H200 SXM", "bf16"),
        ("B200", "bf16"),
        ("RTX 5090", "bf16"),
    ],
)
def test_auto_by_card(card, policy):
    major, minor = hardware.compute_capability(card)
    assert precision.choose("gpu", f"{major}.{minor}") == policy
    assert precision.choose("gpu", float(f"{major}.{minor}")) == policy
    precision.check(policy, "gpu", f"{major}.{minor}", card)


def test_auto_elsewhere():
    assert precision.choose("cpu", None) == "fp32"
    assert precision.choose("tpu", None) == "bf16"
    assert precision.choose("gpu", "6.1") == "fp32"
    assert precision.choose("gpu", None) == "fp32"
    assert precision.choose("gpu", "gfx942") == "fp32"


class Card:
    """A device of a kind that is not here."""

    platform, device_kind = "gpu", "NVIDIA A card"

    def __init__(self, capability: str) -> None:
        self.compute_capability = capability


def test_the_oldest_card_of_a_mesh_decides():
    """Also where it is another process's: all run one program."""
    run = types.SimpleNamespace(
        precision="auto", matmul_precision="default", optimizer_state="fp32"
    )
    cards = types.SimpleNamespace(devices=np.array([Card("8.6"), Card("7.5")], dtype=object))
    assert build.chosen_precision(run, cards) == "fp16"
    run.precision = "bf16"
    with pytest.raises(
        ValueError,
        match=(
            r"^--precision=bf16: NVIDIA A card \(compute capability 7.5\) has no bfloat16; use"
            r" --precision=fp16, which"
        ),
    ):
        build.chosen_precision(run, cards)


def test_what_a_run_says_of_its_precision():
    run = types.SimpleNamespace(
        precision="fp32", matmul_precision="default", optimizer_state="fp32"
    )
    assert describe.precision_words(run, Card("gfx942"), asked="auto") == "fp32 (auto)"
    assert (
        describe.precision_words(run, Card("8.0"), asked="fp32") == "fp32, float32 products in TF32"
    )
    run.matmul_precision, run.optimizer_state = "fp32", "bf16"
    assert (
        describe.precision_words(run, Card("8.0"), asked="fp32")
        == "fp32, float32 products in full, optimizer state in bf16"
    )


@pytest.mark.parametrize(
    ("name", "capability", "card", "message"),
    [
        (
            "bf16",
            "7.0",
            "Tesla V100-SXM2-16GB",
            "has no bfloat16; use --precision=fp16, which scales its loss",
        ),
        ("bf16", 7.5, "TITAN RTX", "has no bfloat16; use --precision=fp16, which scales its loss"),
        ("bf16", "6.1", "NVIDIA GeForce GTX 1080", "has no bfloat16; use --precision=fp32"),
        ("fp8", "8.0", "NVIDIA A100-SXM4-80GB", "has no fp8 products; use --precision=bf16"),
        ("fp8", "8.6", "NVIDIA GeForce RTX 3090", "has no fp8 products; use --precision=bf16"),
        (
            "fp8",
            "7.5",
            "Tesla T4",
            "has no fp8 products; use --precision=fp16, which scales its loss",
        ),
    ],
)
def test_what_a_card_lacks(name, capability, card, message):
    with pytest.raises(ValueError, match="^--precision") as caught:
        precision.check(name, "gpu", capability, card)
    assert (
        str(caught.value)
        == f"--precision={name}: {card} (compute capability {capability}) {message}"
    )


def test_what_is_allowed():
    for name in POLICIES:
        precision.check(name, "cpu", None, "cpu")
        precision.check(name, "gpu", "8.9", "NVIDIA L4")
        precision.check(name, "gpu", "10.0", "NVIDIA B200")
        precision.check(name, "gpu", "gfx942", "AMD Instinct MI300X")
    precision.check("fp16", "gpu", "6.0", "Tesla P100")
    with pytest.raises(
        ValueError, match=r"^--precision=int8: not a precision; choose auto, fp32, bf16, fp16, fp8$"
    ):
        precision.check("int8", "cpu", None, "cpu")


def test_cast_touches_float32_only():
    tree = {
        "a": jnp.ones(2),
        "double": np.ones(2),
        "half": jnp.ones(2, jnp.float16),
        "count": jnp.arange(2),
        "mask": jnp.ones(2, bool),
        "key": jax.random.key(0),
        "none": None,
    }
    cast = POLICIES["bf16"].cast(tree)
    assert cast["a"].dtype == jnp.bfloat16
    assert all(cast[name] is tree[name] for name in tree if name != "a")


class Net(nnx.Module):
    """Two dense layers with batch normalisation and dropout between them."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.first, self.second = nnx.Linear(64, 8, rngs=rngs), nnx.Linear(8, 10, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x.reshape(x.shape[0], -1))
        return self.second(self.dropout(nnx.relu(self.norm(x))))


NETS: dict[str, Any] = {
    "mlp": models.MLP(widths=(8,), dropout=0.1),
    "mlp with layer norm": models.MLP(widths=(8,), norm="layer"),
    "mlp with batch norm": models.MLP(widths=(8,), norm="batch"),
    "convnet": models.ConvNet(widths=(4, 8), dropout=0.1),
    "convnet without norm": models.ConvNet(
        widths=(4,), norm="none", pool="mean", padding="circular"
    ),
    "resnet": models.ResNet(stages=(1, 1), width=4, stem_width=4),
    "bottlenecks": models.ResNet(
        stages=(1, 1),
        width=4,
        stem_width=4,
        stem="imagenet",
        block="bottleneck",
        shortcut="project",
    ),
    "wide resnet": models.ResNet(
        stages=(1, 1), width=4, stem_width=4, block="preactivation", dropout=0.1
    ),
    "vit": models.ViT(patch=4, width=8, depth=1, heads=2, dropout=0.1),
    "vit with fixed positions": models.ViT(
        patch=4, width=8, depth=1, heads=2, positions="sincos", pool="mean"
    ),
    "decoder": models.Transformer(width=8, depth=1, heads=2),
    "nnx": Net,
    "pair": (
        lambda key, x: {"w": jax.random.normal(key, (64, 10))},
        lambda params, x: x.reshape(x.shape[0], -1) @ params["w"],
    ),
}


def products(jaxpr: Any) -> Iterator[tuple[str, ...]]:
    """(primitive, dtypes of its operands) of every product and convolution in a jaxpr, at any
    depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            # jax's attention goes back through float32 scores, and asks for an algorithm that
            # narrows them before they are multiplied.
            narrowed = {"BF16_BF16_F32": "bfloat16", "F16_F16_F32": "float16"}.get(
                getattr(equation.params["precision"], "name", "")
            )
            yield (
                equation.primitive.name,
                *(narrowed or operand.aval.dtype.name for operand in equation.invars),
            )
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns"):
                    yield from products(inner)


Gradients = Callable[[dict[str, Any], jax.Array], Any]


def inputs_of(name: str) -> jax.Array:
    return (
        jnp.arange(16, dtype=jnp.int32).reshape(4, 4)
        if name == "decoder"
        else jax.random.normal(jax.random.key(7), (16, 8, 8, 1))
    )


def training(name: str, policy: str) -> Gradients:
    """`(variables, inputs) -> gradients, (outputs, collections)` of a net under a policy."""
    apply = precision.apply_in(POLICIES[policy], adapters.functions(NETS[name]).apply)

    def loss(params: Any, variables: dict[str, Any], inputs: jax.Array) -> tuple[jax.Array, Any]:
        outputs, collections = apply(
            variables | {"params": params}, inputs, train=True, key=jax.random.key(1)
        )
        return jnp.square(outputs.astype(jnp.float32)).sum(), (outputs, collections)

    return lambda variables, inputs: jax.grad(loss, has_aux=True)(
        variables["params"], variables, inputs
    )


@pytest.mark.parametrize(
    ("name", "policy"),
    [*((name, policy) for name in NETS for policy in ("bf16", "fp8")), ("vit", "fp16")],
)
def test_no_product_is_left_in_float32(name, policy, monkeypatch):
    """Forward and backward; gradients and statistics are float32 all the same. Nothing is
    computed."""
    # As on a GPU: the CPU has no such product of halves, so there attention is computed in float32.
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays)
    )
    inputs = jax.eval_shape(lambda: inputs_of(name))
    variables = jax.eval_shape(adapters.functions(NETS[name]).init, jax.random.key(0), inputs)
    closed, (gradient, (outputs, collections)) = jax.make_jaxpr(
        training(name, policy), return_shape=True
    )(variables, inputs)
    low = POLICIES[policy].dtype
    found = set(products(closed))
    assert found
    assert not {product for product in found if "float32" in product}
    if policy == "fp8":
        assert any(
            product[1].startswith("float8") for product in found if product[0] == "dot_general"
        )
    else:
        assert {dtype for product in found for dtype in product[1:]} == {jnp.dtype(low).name}
    assert outputs.dtype == low
    for given, stored in (
        (gradient, variables["params"]),
        (collections, {key: variables[key] for key in collections}),
    ):
        jax.tree.map(
            lambda one, other: (
                (one.shape, one.dtype) == (other.shape, other.dtype) or pytest.fail(str(one))
            ),
            given,
            stored,
        )


@pytest.mark.parametrize(
    ("name", "policy", "relative"), [("mlp with batch norm", "fp8", 0.15), ("nnx", "bf16", 0.02)]
)
def test_batch_statistics_and_gradients_are_near_those_of_float32(name, policy, relative):
    inputs = inputs_of(name)
    variables = jax.jit(adapters.functions(NETS[name]).init)(jax.random.key(0), inputs)
    (wanted, (_, right)), (found, (_, low)) = (
        jax.jit(training(name, each))(variables, inputs) for each in ("fp32", policy)
    )
    started = {key: variables[key] for key in right}
    for before, one, other in zip(*map(jax.tree.leaves, (started, low, right)), strict=True):
        assert one.dtype == np.float32
        assert np.abs(np.asarray(one) - np.asarray(before)).max() > 1e-3
        np.testing.assert_allclose(one, other, rtol=relative, atol=0.05 * relative)
    flat_wanted, flat_found = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (wanted, found)
    )
    assert np.linalg.norm(flat_found - flat_wanted) < 3 * relative * np.linalg.norm(flat_wanted)


def test_collections_come_back_in_the_dtype_they_were_stored_in():
    def apply(variables: Any, inputs: jax.Array, *, train: bool, key: Any = None) -> Any:
        kept = variables["averages"]
        assert (kept.dtype, variables["params"].dtype, inputs.dtype) == (
            jnp.float32,
            jnp.float16,
            jnp.float16,
        )
        return inputs * variables["params"], {
            "averages": kept.astype(jnp.float16) + 1.0,
            "seen": inputs,
        }

    low = precision.apply_in(POLICIES["fp16"], apply)
    outputs, changed = low(
        {"params": jnp.ones(2), "averages": jnp.zeros(2)}, jnp.ones(2), train=True
    )
    assert outputs.dtype == changed["seen"].dtype == jnp.float16
    assert changed["averages"].dtype == jnp.float32
    assert precision.apply_in(POLICIES["fp32"], apply) is apply


def test_every_policy_is_known_everywhere() -> None:
    """To flags, to comparisons of meshes, and to the table of cards."""
    names = set(POLICIES)
    offered = typing.get_args(typing.get_type_hints(config.Run)["precision"])
    assert names | {"auto"} == set(offered)
    assert names <= set(compare_meshes.TOLERANCES)
    for name in names:
        assert hardware.peak_flops("NVIDIA H100 80GB HBM3", name)
