"""The training switch of anybody's model, by any name and in any place, against the model itself
called by hand."""

import functools
import re
from typing import Any, Literal

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxtrain import adapters
from jaxtrain.adapters import training_switch

KEY = jax.random.key(7)
X = jnp.linspace(-1.0, 1.0, 24).reshape(6, 4)


def noisy(x: jax.Array, act: Any) -> jax.Array:
    """Three times the input in training: what a switch does, without a random number."""
    return x * 3.0 if act else x


class ByArgument(nn.Module):
    """What every Linen model below does with its switch."""

    def act(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return noisy(nn.Dense(2, name="head")(x), train)


class Train(ByArgument):
    @nn.compact
    def __call__(self, x, train):
        return self.act(x, train)


class Training(ByArgument):
    @nn.compact
    def __call__(self, x, *, training=False):
        return self.act(x, training)


class IsTraining(ByArgument):
    @nn.compact
    def __call__(self, x, is_training: bool, /):
        return self.act(x, is_training)


class Deterministic(ByArgument):
    @nn.compact
    def __call__(self, x, deterministic: bool | None = None):
        return self.act(x, not deterministic)


class Inference(ByArgument):
    @nn.compact
    def __call__(self, x, *, inference: bool):
        return self.act(x, not inference)


class RunningAverage(ByArgument):
    @nn.compact
    def __call__(self, x, use_running_average=True):
        return self.act(x, not use_running_average)


class EvalMode(ByArgument):
    @nn.compact
    def __call__(self, x, eval_mode: bool = True):
        return self.act(x, not eval_mode)


class ByTest(ByArgument):
    @nn.compact
    def __call__(self, x, test=True):
        return self.act(x, not test)


class InTheMiddle(ByArgument):
    @nn.compact
    def __call__(self, x, train: bool, scale=2.0):
        return self.act(x, train) * scale / 2.0


class Both(ByArgument):
    @nn.compact
    def __call__(self, x, train: bool = False, deterministic: bool = True):
        assert train != deterministic
        return self.act(x, train)


class EnableDropout(ByArgument):
    @nn.compact
    def __call__(self, x, enable_dropout: bool = True):
        return self.act(x, enable_dropout)


class Field(ByArgument):
    train: bool

    @nn.compact
    def __call__(self, x):
        return self.act(x, self.train)


class NoneField(ByArgument):
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x):
        assert self.deterministic is not None
        return self.act(x, not self.deterministic)


class Merged(ByArgument):
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic: bool | None = None):
        off = nn.merge_param("deterministic", self.deterministic, deterministic)
        return self.act(x, not off)


class Outer(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner(x)


LINEN: dict[str, nn.Module] = {
    "train": Train(),
    "training": Training(),
    "is_training, positional only": IsTraining(),
    "deterministic, None": Deterministic(),
    "inference, keyword only": Inference(),
    "use_running_average": RunningAverage(),
    "eval_mode": EvalMode(),
    "test": ByTest(),
    "before another argument": InTheMiddle(),
    "two of them": Both(),
    "enable_dropout": EnableDropout(),
    "a required field": Field(train=False),
    "a field that is None": NoneField(),
    "field or argument: argument": Merged(),
    "field or argument: field": Merged(deterministic=True),
    "a field of a field": Outer(Field(train=True)),
    "a subclass made by remat": nn.remat(Train, static_argnums=(2,))(),
}


@pytest.mark.parametrize("name", LINEN)
def test_a_linen_switch_of_any_name_acts_and_its_averages_move(name: str) -> None:
    net = adapters.functions(LINEN[name])
    variables = net.init(KEY, X)
    flat = variables["params"]
    flat = flat.get("inner", flat)
    stats = variables["batch_stats"].get("inner", variables["batch_stats"])["norm"]
    kernel, bias = np.asarray(flat["head"]["kernel"]), np.asarray(flat["head"]["bias"])
    x = np.asarray(X, np.float64)
    normal = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    trained, changed = net.apply(variables, X, train=True, key=KEY)
    np.testing.assert_allclose(trained, 3 * (normal @ kernel + bias), rtol=1e-4, atol=1e-5)
    moved = changed["batch_stats"].get("inner", changed["batch_stats"])["norm"]["mean"]
    np.testing.assert_allclose(
        moved, 0.99 * np.asarray(stats["mean"]) + 0.01 * x.mean(0), rtol=1e-5
    )
    evaluated, kept = net.apply(variables, X, train=False)
    np.testing.assert_allclose(evaluated, x / np.sqrt(1 + 1e-5) @ kernel + bias, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], variables["batch_stats"])


def test_a_sequence_of_linen_layers_is_switched_where_nobody_passes_arguments() -> None:
    model = nn.Sequential(
        [nn.Dense(4), nn.BatchNorm(), nn.Dropout(0.5, deterministic=True), nn.Dropout(0.5)]
    )
    net = adapters.functions(model)
    variables = net.init(KEY, X)
    trained, changed = net.apply(variables, X, train=True, key=KEY)
    by_hand = nn.Sequential(
        [
            nn.Dense(4),
            nn.BatchNorm(use_running_average=False),
            nn.Dropout(0.5, deterministic=False),
            nn.Dropout(0.5, deterministic=False),
        ]
    )
    wanted, moved = by_hand.apply(variables, X, rngs={"dropout": KEY}, mutable=["batch_stats"])
    np.testing.assert_array_equal(trained, wanted)
    jax.tree.map(np.testing.assert_array_equal, changed, dict(moved))
    evaluated, _ = net.apply(variables, X, train=False)
    assert not np.any(np.asarray(evaluated) == 0.0)


class Nnx(nnx.Module):
    def __init__(self, how: str, *, rngs: nnx.Rngs) -> None:
        self.how, self.head = how, nnx.Linear(4, 2, rngs=rngs)
        self.training, self.inference_mode = False, True

    def __call__(self, x, is_training=False, *, deterministic=True):
        act = {
            "argument": is_training,
            "inverted": not deterministic,
            "attribute": self.training,
            "inverted attribute": not self.inference_mode,
        }
        return noisy(self.head(x), act[self.how])


@pytest.mark.parametrize("how", ["argument", "inverted", "attribute", "inverted attribute"])
def test_an_nnx_switch_of_any_name_acts(how: str) -> None:
    model = Nnx(how, rngs=nnx.Rngs(0))
    net = adapters.functions(model)
    variables = net.init(KEY, X)
    wanted = np.asarray(X) @ np.asarray(model.head.kernel) + np.asarray(model.head.bias)
    for train, times in ((True, 3), (False, 1)):
        found = net.apply(variables, X, train=train, key=KEY)[0]
        np.testing.assert_allclose(found, times * wanted, rtol=1e-6, atol=1e-6)


class Eqx(eqx.Module):
    layer: eqx.nn.Linear
    training: bool
    how: str = eqx.field(static=True)

    def __init__(self, how: str, key: jax.Array) -> None:
        self.layer, self.training, self.how = eqx.nn.Linear(4, 2, key=key), False, how

    def __call__(self, x, *, inference: bool = True):
        return noisy(self.layer(x), self.training if self.how == "attribute" else not inference)


@pytest.mark.parametrize("how", ["argument", "attribute"])
def test_an_equinox_switch_of_any_name_acts(how: str) -> None:
    model = Eqx(how, KEY)
    net = adapters.functions(model)
    variables = net.init(KEY, X)
    wanted = np.asarray(X) @ np.asarray(model.layer.weight).T + np.asarray(model.layer.bias)
    for train, times in ((True, 3), (False, 1)):
        found = net.apply(variables, X, train=train, key=KEY)[0]
        np.testing.assert_allclose(found, times * wanted, rtol=1e-6, atol=1e-6)


def haiku_function(x, is_training):
    x = hk.BatchNorm(True, True, 0.9)(x, is_training)
    return noisy(hk.Linear(2)(x), is_training)


PLAIN = {
    "haiku": hk.transform_with_state(haiku_function),
    "haiku without a key": hk.without_apply_rng(hk.transform_with_state(haiku_function)),
    "pair": (lambda key, x: 2.0, lambda params, x, training: noisy(x * params, training)),
    "pair, inverted and optional": (
        lambda key, x: 2.0,
        lambda params, x, *, deterministic=True: noisy(x * params, not deterministic),
    ),
    "pair, positional": (
        lambda key, x: 2.0,
        lambda params, is_eval, x, /: noisy(x * params, not is_eval),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_switch_of_functions_acts(name: str) -> None:
    net = adapters.functions(PLAIN[name])
    variables = net.init(KEY, X)
    found = {train: net.apply(variables, X, train=train, key=KEY)[0] for train in (True, False)}
    if not name.startswith("haiku"):
        np.testing.assert_allclose(found[True], 6 * X)
        np.testing.assert_allclose(found[False], 2 * X)
        return
    f = hk.transform_with_state(haiku_function)
    for train, output in found.items():
        wanted, state = f.apply(variables["params"], variables["state"], None, X, train)
        np.testing.assert_array_equal(output, wanted)
        if train:
            _, changed = net.apply(variables, X, train=True, key=KEY)
            jax.tree.map(np.testing.assert_array_equal, changed["state"], state)


def test_a_pair_of_the_methods_of_a_linen_module_is_that_module() -> None:
    model = Training()
    net, wanted = (adapters.functions(each) for each in ((model.init, model.apply), model))
    variables = net.init(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, variables, wanted.init(KEY, X))
    for one, other in zip(
        jax.tree.leaves(net.apply(variables, X, train=True, key=KEY)),
        jax.tree.leaves(wanted.apply(variables, X, train=True, key=KEY)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    assert adapters.logical_axes((model.init, model.apply), X) == adapters.logical_axes(model, X)


class Dropping(ByArgument):
    @nn.compact
    def __call__(self, x, dropping: bool):
        return self.act(x, dropping)


class Optional(ByArgument):
    @nn.compact
    def __call__(self, x, with_stochastic_depth_and_dropout: bool = False):
        return self.act(x, with_stochastic_depth_and_dropout)


class Mode(ByArgument):
    @nn.compact
    def __call__(self, x, mode: str = "train"):
        return self.act(x, mode == "train")


class Literally(ByArgument):
    @nn.compact
    def __call__(self, x, phase: Literal["train", "eval"]):
        return self.act(x, phase == "train")


class Hidden(ByArgument):
    @nn.compact
    def __call__(self, x, **options):
        return self.act(x, options.get("train", False))


class TextField(ByArgument):
    mode: str = "train"

    @nn.compact
    def __call__(self, x):
        return noisy(nn.Dense(2, name="head")(x), self.mode == "train")


class NnxMode(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, dropping: bool):
        return noisy(self.head(x), dropping)


class EqxMode(eqx.Module):
    head: eqx.nn.Linear

    def __call__(self, x, dropping: bool):
        return noisy(self.head(x), dropping)


def annotated(params: Any, x: jax.Array, dropping: bool) -> jax.Array:
    return noisy(x * params, dropping)


REFUSED: dict[str, tuple[Any, str]] = {
    "required": (Dropping(), "model=Dropping: the argument 'dropping' looks like a training"),
    "optional": (Optional(), "argument 'with_stochastic_depth_and_dropout' looks like"),
    "text": (Mode(), "model=Mode: the argument 'mode' looks like a training switch"),
    "literal": (Literally(), "model=Literally: the argument 'phase' looks like"),
    "hidden": (Hidden(), r"model=Hidden: takes \*\*options, which may hide a training switch"),
    "text field": (TextField(), "model=TextField: the field mode='train' looks like"),
    "nnx": (NnxMode(rngs=nnx.Rngs(0)), "model=NnxMode: the argument 'dropping' looks like"),
    "equinox": (
        EqxMode(eqx.nn.Linear(4, 2, key=KEY)),
        "model=EqxMode: the argument 'dropping' looks like",
    ),
    "pair": (
        (lambda key, x: 2.0, lambda params, x, dropping: noisy(x, dropping)),
        r"model=\(init, apply\): takes \(x, dropping\) and the task gives 1 input",
    ),
    "pair, annotated": (
        (lambda key, x: jnp.ones(()), annotated),
        r"model=\(init, apply\): the argument 'dropping' looks like a training switch",
    ),
}


def written(remedy: str, model: Any) -> Any:
    """The model after what a line says to write."""
    names: dict[str, Any] = dict(globals())
    if not remedy.startswith("class "):
        if isinstance(model, tuple):
            names["init"], names["apply"] = model
        return eval(remedy, names)
    exec(remedy, names)  # noqa: S102
    made = names[remedy.split()[1].split("(")[0]]
    if isinstance(model, nnx.Module):
        return made(rngs=nnx.Rngs(0))
    return made(model.head) if isinstance(model, eqx.Module) else made()


@pytest.mark.parametrize("name", REFUSED)
def test_a_switch_that_cannot_be_set_is_refused_and_its_remedy_works(name: str) -> None:
    model, text = REFUSED[name]
    with pytest.raises(ValueError, match=text) as caught:
        net = adapters.functions(model)
        net.apply(net.init(KEY, X), X, train=True, key=KEY)
    words = str(caught.value)
    assert "\n" not in words
    if "let the task's inputs be a tuple" in words:
        net, inputs = adapters.functions(model), (X, True)
        with pytest.raises(
            ValueError, match=r"^model=\(init, apply\), its init: takes \(x\) and the"
        ):
            net.init(KEY, inputs)  # the next thing that is wrong
        net = adapters.functions((lambda key, x, dropping: 2.0, model[1]))
        np.testing.assert_array_equal(
            net.apply(net.init(KEY, inputs), inputs, train=True)[0], 3 * X
        )
        return
    found = re.search(
        r"(?:what it is|it takes|wrap it): (.*?)(?: \(or `not train`|, or without|$)", words
    )
    assert found, "every line says what to write"
    mended = written(found[1], model)
    net = adapters.functions(mended)
    variables = net.init(KEY, X)
    trained, evaluated = (net.apply(variables, X, train=t, key=KEY)[0] for t in (True, False))
    assert not np.allclose(trained, evaluated)
    if "batch_stats" not in variables:
        np.testing.assert_allclose(trained, 3 * evaluated, rtol=1e-5)


def test_what_is_no_switch_is_left_alone() -> None:
    def apply(params, x, causal=True, return_train_features=False, dropout=0.1, mode="bilinear"):
        return x, causal, return_train_features, dropout, mode

    net = adapters.functions((lambda key, x: {}, apply))
    assert net.apply({"params": {}}, 1, train=True)[0] == (1, True, False, 0.1, "bilinear")


def test_an_input_may_not_bear_the_name_of_the_switch() -> None:
    net = adapters.functions((lambda key, **inputs: {}, lambda params, x, train: x))
    with pytest.raises(ValueError, match="'train' is its training switch, and the task gives an"):
        net.apply({"params": {}}, {"x": X, "train": X}, train=True)
    net = adapters.functions((net.init, lambda params, x, trained, train: x))  # the remedy
    assert net.apply({"params": {}}, {"x": X, "trained": X}, train=True)[0] is X


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, True)
            for name in ("train", "training", "is_training", "isTraining", "in_training")
        ),
        *((name, False) for name in ("deterministic", "inference", "eval", "is_eval", "test_mode")),
        *((name, False) for name in ("use_running_average", "use_running_stats", "not_training")),
        *((name, True) for name in ("update_stats", "enable_dropout", "training_mode", "do_train")),
        *((name, False) for name in ("disable_dropout", "no_dropout", "inference_mode")),
        *((name, None) for name in ("mask", "causal", "trainable", "decode", "droppath", "key")),
    ],
)
def test_names(name: str, value: bool | None) -> None:
    assert training_switch.value_in_training(name) is value


class MadeByPartial(nn.Module):
    """A layer to be made is a field, with its switch."""

    norm: Any = functools.partial(nn.BatchNorm, use_running_average=True, momentum=0.5)

    @nn.compact
    def __call__(self, x):
        return self.norm(name="norm")(x)


@pytest.mark.parametrize("running", [True, False])
def test_the_switch_of_a_layer_to_be_made_acts(running: bool) -> None:
    norm = functools.partial(nn.BatchNorm, use_running_average=running, momentum=0.5)
    net = adapters.functions(MadeByPartial(norm=norm))
    variables = net.init(KEY, X)
    outputs, changed = net.apply(variables, X, train=True, key=KEY)
    mean, variance = X.mean(0, keepdims=True), X.var(0, keepdims=True)
    np.testing.assert_allclose(outputs, (X - mean) / jnp.sqrt(variance + 1e-5), atol=1e-5)
    np.testing.assert_allclose(changed["batch_stats"]["norm"]["mean"], 0.5 * mean[0], atol=1e-6)
    quiet = net.apply(variables, X, train=False)[0]
    np.testing.assert_allclose(quiet, X / jnp.sqrt(1 + 1e-5), atol=1e-6)
