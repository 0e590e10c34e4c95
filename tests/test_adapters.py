"""Models of every kind behind one interface: each trains, and each keeps its own collections."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from jaxtrain import adapters
from jaxtrain.models import MLP, ConvNet


class NnxNet(nnx.Module):
    """A small NNX network with running averages and dropout."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.again = nnx.Dropout(0.1, rngs=rngs)
        self.second = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.again(self.drop(nnx.relu(self.norm(self.first(x))))))


def pair_init(key: jax.Array, inputs: jax.Array) -> dict[str, jax.Array]:
    first, second = jax.random.split(key)
    return {
        "w": jax.random.normal(first, (inputs.shape[-1], 32)) / 2,
        "v": jax.random.normal(second, (32, 3)) / 6,
    }


def pair_apply(params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    return jnp.tanh(inputs @ params["w"]) @ params["v"]


def pair_apply_with_options(
    params: dict[str, jax.Array], inputs: jax.Array, *, train: bool, rngs: Any
) -> jax.Array:
    noise = jax.random.normal(rngs["dropout"], inputs.shape) if train else jnp.zeros_like(inputs)
    return pair_apply(params, inputs + 0.01 * noise)


MODELS = {
    "linen": MLP(num_classes=3, widths=(32,), norm="batch", dropout=0.1),
    "linen_without_train": nn.Dense(3),
    "nnx": NnxNet(rngs=nnx.Rngs(0)),
    "nnx_factory": NnxNet,
    "pair": (pair_init, pair_apply),
    "pair_with_options": (pair_init, pair_apply_with_options),
}


def data() -> tuple[jax.Array, jax.Array]:
    """Three classes that one linear map tells apart."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(96, 4)).astype(np.float32)
    labels = (inputs @ generator.normal(size=(4, 3))).argmax(axis=1)
    return jnp.asarray(inputs), jnp.asarray(labels)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_each_kind_trains(name: str) -> None:
    net = adapters.functions(MODELS[name])
    inputs, labels = data()
    variables = jax.jit(net.init)(jax.random.key(1), inputs)
    params, collections = (
        variables["params"],
        {key: tree for key, tree in variables.items() if key != "params"},
    )
    optimizer = optax.adam(0.03)

    def loss(params: Any, collections: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        outputs, collections = net.apply(
            {"params": params, **collections}, inputs, train=True, key=key
        )
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean(), collections

    @jax.jit
    def step(params: Any, collections: Any, state: Any, key: jax.Array) -> Any:
        (value, collections), gradients = jax.value_and_grad(loss, has_aux=True)(
            params, collections, key
        )
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), collections, state, value

    state = optimizer.init(params)
    structure = jax.tree.structure((params, collections))
    for index in range(120):
        params, collections, state, _ = step(
            params, collections, state, jax.random.fold_in(jax.random.key(2), index)
        )
    assert jax.tree.structure((params, collections)) == structure
    outputs, same = net.apply({"params": params, **collections}, inputs, train=False)
    assert np.mean(outputs.argmax(-1) == labels) > 0.9
    jax.tree.map(np.testing.assert_array_equal, same, collections)


@pytest.mark.parametrize("name", ["linen", "nnx", "nnx_factory"])
def test_collections_change_in_training_only(name: str) -> None:
    net = adapters.functions(MODELS[name])
    inputs, _ = data()
    variables = net.init(jax.random.key(0), inputs)
    assert set(variables) == {"params", "batch_stats"}
    _, trained = net.apply(variables, inputs, train=True, key=jax.random.key(0))
    _, kept = net.apply(variables, inputs, train=False)
    assert any(
        (old != new).any()
        for old, new in zip(
            jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(trained), strict=True
        )
    )
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], variables["batch_stats"])


def test_nnx_layers_draw_different_numbers_and_repeat_by_key() -> None:
    class TwoDrops(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            self.a, self.b = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self.a(x), self.b(x)

    net, ones = adapters.functions(TwoDrops), jnp.ones(64)
    variables = net.init(jax.random.key(0), ones)
    (a, b), _ = net.apply(variables, ones, train=True, key=jax.random.key(1))
    (again, _), _ = net.apply(variables, ones, train=True, key=jax.random.key(1))
    (other, _), _ = net.apply(variables, ones, train=True, key=jax.random.key(2))
    assert (a != b).any() and (a == again).all() and (a != other).any()
    with pytest.raises(ValueError, match="draws random numbers in training; give key="):
        net.apply(variables, ones, train=True)


def test_an_nnx_factory_is_seeded_by_the_key_and_a_made_module_keeps_its_numbers() -> None:
    inputs, _ = data()
    kernel = [
        adapters.functions(NnxNet).init(jax.random.key(seed), inputs)["params"]["first"]["kernel"]
        for seed in (0, 1)
    ]
    assert (kernel[0] != kernel[1]).any()
    made = NnxNet(rngs=nnx.Rngs(5))
    variables = adapters.functions(made).init(jax.random.key(0), inputs)
    np.testing.assert_array_equal(variables["params"]["first"]["kernel"], made.first.kernel[...])
    jax.tree.map(lambda array: array.delete(), variables)
    made.eval()
    assert made(inputs).shape == (96, 3)


def test_linen_variables_are_plain_arrays_also_on_a_mesh() -> None:
    inputs = jnp.zeros((1, 8, 8, 1))
    net = adapters.functions(ConvNet(widths=(8, 8)))
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        variables = jax.jit(net.init)(jax.random.key(0), inputs)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))
    expected = net.init(jax.random.key(0), inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), variables, expected)


def test_logical_axes_mirror_the_variables() -> None:
    inputs = jax.ShapeDtypeStruct((1, 4), "float32")
    axes = adapters.logical_axes(MODELS["linen"], inputs)
    assert axes["params"]["hidden0"] == {"kernel": ("mlp_in", "mlp"), "bias": ("mlp",)}
    assert axes["batch_stats"]["norm0"] == {"mean": None, "var": None}
    assert adapters.logical_axes(MODELS["pair"], inputs) == {"params": {"w": None, "v": None}}
    assert adapters.logical_axes(adapters.functions(MODELS["nnx_factory"]), inputs)["batch_stats"][
        "norm"
    ] == {"mean": None, "var": None}


def test_logical_axes_of_nnx_come_from_its_metadata() -> None:
    class Named(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            kernel_init = nnx.with_partitioning(nnx.initializers.ones, ("mlp_in", "mlp"))
            self.dense = nnx.Linear(4, 3, kernel_init=kernel_init, rngs=rngs)

    with nnx.use_eager_sharding(False):
        axes = adapters.logical_axes(Named(rngs=nnx.Rngs(0)), None)
    assert axes == {"params": {"dense": {"kernel": ("mlp_in", "mlp"), "bias": None}}}


@pytest.mark.parametrize("model", [3, (pair_init,), (pair_init, 2)])
def test_what_is_no_model_is_named(model: Any) -> None:
    with pytest.raises(ValueError, match="not a model; expected a Linen module, an NNX module"):
        adapters.functions(model)


def test_a_function_that_makes_no_nnx_module_is_named() -> None:
    with pytest.raises(ValueError, match="called with rngs it gave dict; expected an NNX module"):
        adapters.functions(lambda rngs: {})


class Forward(nn.Module):
    """A module without `__call__`."""

    @nn.compact
    def forward(self, x):
        return nn.Dense(3)(x)


class Sized(nnx.Module):
    """A module whose class wants more than `rngs`."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(4, width, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Forward(), "model=Forward: has no __call__; name the method that is one: class Called"),
        (Sized, r"model=Sized: is made with \(width, rngs\) and is called with rngs alone; give"),
        (lambda x: x, "model=<lambda>: not a model; expected a Linen module"),
    ],
)
def test_what_is_nearly_a_model_is_named(model: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        adapters.functions(model)


def test_the_remedies_for_what_is_nearly_a_model_work() -> None:
    inputs, _ = data()

    class Called(Forward):
        __call__ = Forward.forward

    for model in (Called(), lambda rngs: Sized(3, rngs=rngs)):
        net = adapters.functions(model)
        variables = net.init(jax.random.key(0), inputs)
        assert net.apply(variables, inputs, train=True, key=jax.random.key(0))[0].shape == (96, 3)


def test_python_numbers_in_a_state_are_arrays_from_the_start() -> None:
    net = adapters.functions(
        (
            lambda key, x: ({}, {"n": 3, "scale": 2.0}),
            lambda p, state, x: (x, {"n": state["n"] + 1, "scale": state["scale"]}),
        )
    )
    variables = net.init(jax.random.key(0), 1)
    changed = net.apply(variables, 1, train=True, key=jax.random.key(0))[1]["state"]
    for name, dtype in (("n", "int32"), ("scale", "float32")):
        for leaf in (variables["state"][name], changed[name]):
            assert leaf.dtype == dtype and not leaf.weak_type


def test_streams_are_what_flax_takes() -> None:
    model = nn.Dropout(0.5, deterministic=False)
    net = adapters.functions(
        (lambda key, x: {}, lambda params, x, rngs: model.apply({}, x, rngs=rngs))
    )
    ones, key = jnp.ones((4, 4)), jax.random.key(3)
    wanted = model.apply({}, ones, rngs={"dropout": key})
    found = net.apply({"params": {}}, ones, train=True, key=key)[0]
    np.testing.assert_array_equal(found, wanted)


class WithMethods:
    """An object of one's own with the two functions as methods."""

    def init(self, key, x):
        return {"w": jnp.full((4, 1), 2.0)}

    def apply(self, params, x, *, training):
        return x @ params["w"] * (3.0 if training else 1.0)


def test_an_object_with_init_and_apply_is_a_pair_of_functions() -> None:
    net, ones = adapters.functions(WithMethods()), jnp.ones((2, 4))
    variables = net.init(jax.random.key(0), ones)
    assert net.apply(variables, ones, train=True)[0].tolist() == [[24.0], [24.0]]
    assert net.apply(variables, ones, train=False)[0].tolist() == [[8.0], [8.0]]
    assert adapters.logical_axes(WithMethods(), ones) == {"params": {"w": None}}


class CalledWithStreams(nnx.Module):
    """Its dropout has no stream but the one that the call brings."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dropout = nnx.Dropout(0.5)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        return self.head(self.dropout(x, rngs=rngs))


class CalledWithKey(nn.Module):
    """Noise where there is a key."""

    @nn.compact
    def __call__(self, x: jax.Array, rng: Any = None) -> jax.Array:
        x = nn.Dense(2)(x)
        return x if rng is None else x + jax.random.normal(rng, x.shape)


@pytest.mark.parametrize("model", [CalledWithStreams, CalledWithKey()], ids=["nnx", "linen"])
def test_a_random_argument_with_a_default_is_given_in_training_only(model: Any) -> None:
    net, x, key = adapters.functions(model), jnp.ones((3, 4)), jax.random.key(5)
    variables = net.init(jax.random.key(0), x)
    params = variables["params"]
    layer = params["head" if model is CalledWithStreams else "Dense_0"]
    plain = x @ layer["kernel"] + layer["bias"][None]
    if model is CalledWithStreams:
        dropped = nnx.Dropout(0.5)(x, rngs=nnx.Rngs(key))
        expected = dropped @ layer["kernel"] + layer["bias"][None]
    else:
        expected = plain + jax.random.normal(key, plain.shape)
    outputs = net.apply(variables, x, train=True, key=key)[0]
    np.testing.assert_allclose(outputs, expected, rtol=1e-6)
    np.testing.assert_allclose(net.apply(variables, x, train=False)[0], plain, rtol=1e-6)


class PlainVariable(nnx.Module):
    """A variable of no kind beside one that is sown."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.count = nnx.Variable(jnp.array(0))
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.count[...] += 1
        self.sow(nnx.Intermediate, "seen", x)
        return self.head(x)


def test_what_is_sown_is_no_variable_of_a_broader_kind() -> None:
    net, x = adapters.functions(PlainVariable), jnp.ones((3, 4))
    variables = net.init(jax.random.key(0), x)
    changed = net.apply(variables, x, train=True, key=jax.random.key(1))[1]
    kept, sown = adapters.split_sown(changed, variables)
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    assert jax.tree.structure(kept) == jax.tree.structure(rest)
    assert [int(leaf) for leaf in jax.tree.leaves(kept)] == [1]
    assert jax.tree.leaves(sown)[0].shape == (3, 4)


@jax.numpy_rank_promotion("allow")  # stax has it in its layers
def test_a_pair_of_stax_is_a_model() -> None:
    from jax.example_libraries import stax

    pair = stax.serial(stax.Dense(3), stax.Relu, stax.Dropout(0.5), stax.Dense(2))
    net, x, key = adapters.functions(pair), jnp.ones((3, 4)), jax.random.key(5)
    variables = net.init(jax.random.key(0), x)
    params = pair[0](jax.random.key(0), (3, 4))[1]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, variables["params"], params))
    expected = pair[1](params, x, rng=key)
    np.testing.assert_array_equal(net.apply(variables, x, train=True, key=key)[0], expected)
    with pytest.raises(adapters.NeedsKey):  # it has no switch, and draws in evaluation too
        net.apply(variables, x, train=False)
