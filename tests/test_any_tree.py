"""Parameters in a tree of any kind: lists of pairs, named tuples, dataclasses, Equinox models,
numbers without dims, leaves that are no floats, keys with slashes. Each trains on every mesh as on
one device, and comes back from a checkpoint."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxtrain import adapters, tree
from jaxtrain.checkpoints import arrays
from jaxtrain.optimizers import AdamW, parameters
from jaxtrain.parallel import mesh, sharding
from jaxtrain.tasks import Regression
from jaxtrain.train.state import init_state, place
from jaxtrain.train.steps import Recipe, make_train_step


@pytest.fixture(autouse=True)
def as_people_write() -> Iterator[None]:
    """Models that are brought broadcast as NumPy does."""
    with jax.numpy_rank_promotion("allow"):
        yield


BATCH = {
    "image": np.linspace(-1, 1, 16 * 8, dtype=np.float32).reshape(16, 8),
    "label": np.linspace(0, 1, 16, dtype=np.float32).reshape(16, 1),
}
TASK = Regression(target="label")


class Layer(typing.NamedTuple):
    w: Any
    b: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Net:
    first: Layer
    gate: Any
    absent: Any
    name: str = dataclasses.field(default="net", metadata={"static": True})


def dense(key: Any, width: int) -> tuple[Any, Any]:
    return jax.random.normal(key, (8, width)) * 0.3, jnp.zeros(width)


def stax(key: Any, inputs: Any) -> Any:
    """As `jax.example_libraries.stax` has it."""
    first, last = jax.random.split(key)
    return [dense(first, 8), (), dense(last, 1)]


def apply_stax(params: Any, x: Any) -> Any:
    (w, b), (), (v, c) = params
    return jnp.tanh(x @ w + b) @ v + c


def named(key: Any, inputs: Any) -> Any:
    layer, head = Layer(*dense(key, 8)), Layer(*dense(key, 1))
    return (Net(layer, jnp.ones(()), None), {"b": head, "a": {}}, {3: jnp.ones(8)})


def apply_named(params: Any, x: Any) -> Any:
    net, heads, scales = params
    hidden = jnp.tanh(x @ net.first.w + net.first.b) * net.gate * scales[3]
    return hidden @ heads["b"].w + heads["b"].b


def awkward(key: Any, inputs: Any) -> Any:
    """Keys with slashes and dots, and `b` under `mu`, which is also what Adam calls an average."""
    w, b = dense(key, 8)
    v, c = dense(key, 1)
    return {"a/~/b": {"w.0": w}, "b": b, "mu": {"b": b + 1, "v": v}, "nu": c}


def apply_awkward(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["a/~/b"]["w.0"] + params["b"] * params["mu"]["b"])
    return hidden @ params["mu"]["v"] + params["nu"]


class Small(eqx.Module):
    layers: list[Any]
    act: Any
    width: int = eqx.field(static=True)

    def __init__(self, key: Any) -> None:
        self.width = 8
        self.layers = [eqx.nn.Linear(8, 8, key=key), eqx.nn.Linear(8, 1, use_bias=False, key=key)]
        self.act = jnp.tanh

    def __call__(self, x: Any) -> Any:
        return self.layers[1](self.act(self.layers[0](x)))


def equinox(key: Any, inputs: Any) -> Any:
    return eqx.filter(Small(key), eqx.is_inexact_array)


def apply_equinox(params: Any, x: Any) -> Any:
    model = eqx.combine(params, eqx.filter(Small(jax.random.key(0)), eqx.is_inexact_array, True))
    return jax.vmap(model)(x)


def bare(key: Any, inputs: Any) -> Any:
    return jax.random.normal(key, (8, 1))


def mixed(key: Any, inputs: Any) -> Any:
    """Integers, booleans, random keys, half floats and Python numbers beside what is trained."""
    return {
        "dense": dense(key, 8),
        "half": jnp.ones((8, 1), jnp.bfloat16),
        "ids": jnp.arange(8)[::-1],
        "mask": jnp.arange(8) < 6,
        "keys": jax.random.split(jax.random.key(3), 8),
        "power": 2,
    }


def apply_mixed(params: Any, x: Any) -> Any:
    w, b = params["dense"]
    hidden = (x[:, params["ids"]] @ w + b) ** params["power"] * params["mask"]
    noise = jax.vmap(jax.random.normal)(params["keys"])
    return (hidden + noise) @ params["half"].astype(jnp.float32)


MODELS: dict[str, Any] = {
    "list of pairs": (stax, apply_stax),
    "named tuples and dataclasses": (named, apply_named),
    "awkward keys": (awkward, apply_awkward),
    "equinox": (equinox, apply_equinox),
    "one array": (bare, lambda w, x: x @ w),
    "mixed": (mixed, apply_mixed),
}
PATHS = {
    "list of pairs": ["0/0", "0/1", "2/0", "2/1"],
    "named tuples and dataclasses": [
        "0/first/w",
        "0/first/b",
        "0/gate",
        "1/b/w",
        "1/b/b",
        "2/3",
    ],
    "awkward keys": ["a/~/b/w.0", "b", "mu/b", "mu/v", "nu"],
    "equinox": ["layers/0/weight", "layers/0/bias", "layers/1/weight"],
    "one array": [""],
    "mixed": ["dense/0", "dense/1", "half", "ids", "keys", "mask"],
}
GRIDS = ("fsdp:8", "data:2,fsdp:4", "tensor:2")


def trained(model: Any, text: str, *, steps: int = 3) -> Any:
    grid = mesh.make(text)
    options: dict[str, Any] = {"mesh": grid, "ema_decay": 0.9, "clip_norm": 1.0}
    parts = model, TASK, AdamW(learning_rate=0.01)
    state, step = init_state(*parts, BATCH, **options), make_train_step(*parts, **options)
    for _ in range(steps):
        state, _ = step(state, BATCH)
    return state


def check_equal(one: Any, many: Any) -> None:
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
        one, many = jax.random.key_data(one), jax.random.key_data(many)
    exact = 1e-2 if one.dtype == jnp.bfloat16 else 2e-5
    one, many = (np.asarray(each, np.float64) for each in (one, many))
    np.testing.assert_allclose(many, one, rtol=exact, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_trains_on_a_mesh_as_on_one_device(name: str) -> None:
    alone = trained(MODELS[name], "data:1")
    assert list(tree.flatten(alone.params)) == PATHS[name]
    for text in GRIDS[:1] if name != "list of pairs" else GRIDS:
        state = trained(MODELS[name], text)
        jax.tree.map(
            check_equal,
            (alone.params, alone.opt_state, alone.ema),
            (state.params, state.opt_state, state.ema),
        )
        if "fsdp" in text:
            largest = max(jax.tree.leaves(state.params), key=lambda leaf: leaf.size)
            assert "fsdp" in largest.sharding.spec
    stored = arrays.to_host(state)
    back = arrays.to_devices(stored, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert arrays.misfit(arrays.specs(back), arrays.specs(state)) == ""


def test_a_checkpoint_of_any_tree_is_read_back_bit_by_bit(tmp_path: Any) -> None:
    states = {
        name: jax.tree.map(jnp.asarray, init(jax.random.key(0), None))
        for name, (init, _) in MODELS.items()
    } | {"others": (jnp.arange(3), jnp.array(True), jax.random.key(3), {"": jnp.ones(2)})}
    stored = arrays.to_host({"params": states})
    arrays.write(tmp_path / "arrays", stored)
    read = arrays.read(tmp_path / "arrays", arrays.specs({"params": states}))
    assert arrays.digest(read) == arrays.digest(stored)


def test_one_state_of_the_optimizer_never_lies_as_another_parameter_does() -> None:
    """Adam's average of `b` ends in `mu/b`, which is a parameter of the same shape."""
    grid = mesh.make("fsdp:4,tensor:2")
    params = {
        "b": jax.ShapeDtypeStruct((8,), "float32"),
        "mu": {"b": jax.ShapeDtypeStruct((8,), "float32")},
    }
    placed = sharding.parameters(params, None, grid, rules=(("mu/b", "tensor"), (".*", "fsdp")))
    state = jax.eval_shape(AdamW().transform(params, 1.0).init, params)
    found = tree.flatten(sharding.like_parameters(state, params, placed, grid))
    specs = {path: place.spec for path, place in found.items() if "mu" in path or "nu" in path}
    assert specs == {
        "0/mu/b": PartitionSpec("fsdp"),
        "0/mu/mu/b": PartitionSpec("tensor"),
        "0/nu/b": PartitionSpec("fsdp"),
        "0/nu/mu/b": PartitionSpec("tensor"),
    }


def test_two_arrays_of_one_path_are_an_error() -> None:
    def init(key: Any, inputs: Any) -> Any:
        return {"a/b": jnp.ones((8, 1)), "a": {"b": jnp.ones(1)}}

    with pytest.raises(
        ValueError,
        match=(
            r"^a/b: two arrays have this path; rename a key, so that rules and checkpoints can tell"
            r" them apart(\n|$)"
        ),
    ):
        init_state((init, lambda params, x: x @ params["a/b"]), TASK, AdamW(), BATCH)


def partitioned(names: Any) -> nn.Module:
    init = nn.initializers.lecun_normal()
    return nn.Dense(4, kernel_init=nn.with_partitioning(init, names))


@pytest.mark.parametrize(
    ("names", "axes", "spec"),
    [
        (("embed",), ("embed",), PartitionSpec("fsdp")),
        ((None, "tensor"), (None, "tensor"), PartitionSpec("fsdp", "tensor")),
        ((None, "model"), (None, "model"), PartitionSpec("fsdp")),
        (PartitionSpec(None, "mlp"), (None, "mlp"), PartitionSpec("fsdp", "tensor")),
        (PartitionSpec(("data", "model")), (("data", "model"),), PartitionSpec("fsdp")),
        ((("embed", "mlp"), None), (("embed", "mlp"), None), PartitionSpec(("fsdp", "tensor"))),
        ((), (), PartitionSpec("fsdp")),
    ],
)
def test_what_flax_lets_models_say_of_dims(names: Any, axes: Any, spec: PartitionSpec) -> None:
    model, grid = partitioned(names), mesh.make("fsdp:4,tensor:2")
    inputs = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    shapes = jax.eval_shape(adapters.functions(model).init, jax.random.key(0), inputs)["params"]
    found = adapters.logical_axes(model, inputs)["params"]
    assert found["kernel"] == axes
    assert sharding.parameters(shapes, found, grid)["kernel"].spec == spec
    assert len(parameters.describe(shapes, found)["kernel"].axes) == 2
    assert len(parameters.table(shapes, found)) == len(
        sharding.rows(shapes, found, sharding.parameters(shapes, found, grid), grid)
    )


class Pairs(nn.Module):
    """A parameter that is a tuple of arrays, one of them with named axes."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        first, second = self.param("pair", self.both)
        return x @ nn.meta.unbox(first) + second

    def both(self, key: Any) -> Any:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", None))
        return init(key, (8, 4), jnp.float32), jnp.zeros(4)


def test_a_tuple_of_arrays_is_no_tuple_of_names() -> None:
    inputs = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    axes = adapters.logical_axes(Pairs(), inputs)["params"]
    assert tree.axes_by_path(axes) == {"pair/0": ("embed", None)}
    recipe = Recipe(Pairs(), TASK, AdamW())
    batch = BATCH | {"label": np.zeros((16, 4), np.float32)}
    state = init_state(Pairs(), TASK, AdamW(), batch)
    placed = place(recipe, state, batch, mesh.make("fsdp:2"))
    assert placed.state.params["pair"][0].spec == PartitionSpec("fsdp")


leaves = st.sampled_from([(), (1,), (8,), (3, 8), (8, 16), (2, 4, 8), (16, 3)])
trees = st.recursive(
    leaves.map(lambda shape: ("leaf", shape)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, min_size=1, max_size=3).map(lambda items: ("tuple", items)),
        st.dictionaries(st.sampled_from(["a", "b", "mu", "x/y", "0"]), inner, max_size=3),
        inner.map(lambda item: ("layer", item)),
    ),
    max_leaves=6,
)


def made(plan: Any) -> Any:
    """The tree of arrays that a plan describes."""
    if isinstance(plan, dict):
        return {key: made(item) for key, item in plan.items()}
    if isinstance(plan, list):
        return [made(item) for item in plan]
    kind, content = plan
    if kind == "layer":
        return Layer(made(content), None)
    if kind == "tuple":
        return tuple(made(item) for item in content)
    size = int(np.prod(content))
    return jnp.asarray(np.linspace(-1, 1, size, dtype=np.float32).reshape(content))


def of_plan(plan: Any) -> Any:
    def apply(params: Any, x: Any) -> Any:
        total = sum((jnp.sum(jnp.tanh(leaf)) for leaf in jax.tree.leaves(params)), jnp.float32(0))
        return x[:, :1] * total

    return lambda key, inputs: {"all": made(plan), "last": jnp.ones(8)}, apply


def check_plan(plan: Any, text: str) -> None:
    alone, state = trained(of_plan(plan), "data:1"), trained(of_plan(plan), text)
    for path, leaf in tree.flatten(alone.params).items():
        found = tree.flatten(state.params)[path]
        np.testing.assert_allclose(found, leaf, rtol=2e-5, atol=2e-6, err_msg=path)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(plan=trees, text=st.sampled_from(["data:8", *GRIDS]))
def test_a_tree_of_any_shape(plan: Any, text: str) -> None:
    check_plan(plan, text)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=trees, text=st.sampled_from(["data:8", *GRIDS]))
def test_many_trees_of_any_shape(plan: Any, text: str) -> None:
    check_plan(plan, text)
