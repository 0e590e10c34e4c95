"""Models for `jax.pmap`: collectives over a named axis run over the whole batch, on any mesh equal
to one device and to the model without the axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from jaxtrain.errors import UserError
from jaxtrain.optimizers import SGD
from jaxtrain.parallel import mesh
from jaxtrain.tasks import Regression
from jaxtrain.train import compare_meshes, reproducible, steps
from jaxtrain.train.state import init_state


def batch_of(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(3 + rng.normal(size=(16, 8)), jnp.float32),
        "target": jnp.asarray(rng.normal(size=(16, 2)), jnp.float32),
    }


class Synchronised(nn.Module):
    """As its users write it for many devices; `axis` None is the same for one."""

    axis: str | None = "batch"
    groups: Any = None

    @nn.compact
    def __call__(self, x_BD: jax.Array, train: bool = True) -> jax.Array:
        x_BD = nn.Dense(6)(x_BD)
        x_BD = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.5,
            axis_name=self.axis,
            axis_index_groups=self.groups,
        )(x_BD)
        return nn.Dense(2)(nn.relu(x_BD))


class Centered(nn.Module):
    """Asks for its axes at initialisation too, for their sizes, and for two of them."""

    named: bool = True

    @nn.compact
    def __call__(self, x_BD: jax.Array) -> jax.Array:
        x_BD = nn.Dense(2)(x_BD)
        mean_D = jnp.mean(x_BD, axis=0)
        if self.named:
            mean_D = jax.lax.pmean(jax.lax.psum(mean_D, "hosts"), "devices")
            mean_D = mean_D / jax.lax.axis_size("hosts") + jax.lax.axis_index("devices")
            everyone = jax.lax.all_gather(x_BD, "devices", tiled=True)
            assert everyone.shape == x_BD.shape
        return x_BD - mean_D[None]


class SynchronisedNNX(nnx.Module):
    def __init__(self, axis: str | None = "batch", *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(8, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.5, axis_name=axis, rngs=rngs)
        self.last = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x_BD: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.norm(self.first(x_BD))))


def contrastive(named: bool) -> Any:
    """A pair of functions that compares each example with those of all devices."""

    def init(key: jax.Array, x: jax.Array) -> dict[str, Any]:
        return {"w": jax.random.normal(key, (x.shape[-1], 2))}

    def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
        z = jnp.tanh(x @ params["w"])
        others = jax.lax.all_gather(z, "i", tiled=True) if named else z
        return jax.nn.softmax(z @ others.T) @ others

    return init, apply


KINDS: dict[str, Callable[[bool], Any]] = {
    "linen": lambda named: Synchronised("batch" if named else None),
    "linen at initialisation": Centered,
    "nnx": lambda named: lambda rngs: SynchronisedNNX("batch" if named else None, rngs=rngs),
    "functions": contrastive,
}


def run(model: Any, text: str | None, **options: Any) -> tuple[Any, list[float], float]:
    parts = model, Regression(), SGD(0.1)
    where = None if text is None else mesh.make(text)
    state = init_state(*parts, batch_of(), mesh=where, **options)
    step, losses = steps.make_train_step(*parts, mesh=where, **options), []
    for index in range(3):
        state, sums = step(state, batch_of(index))
        losses.append(float(sums["loss"][0]))
    evaluated = steps.make_eval_step(*parts, mesh=where, **options)(state, batch_of())
    return (state.params, state.collections), losses, float(evaluated["loss"][0])


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_named_axis_is_the_whole_batch(kind: str) -> None:
    plain = run(KINDS[kind](False), None)
    for text in (None, "data:2,fsdp:4"):
        found = run(KINDS[kind](True), text)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, plain
        )


@pytest.mark.slow
def test_with_microbatches_and_remat() -> None:
    options = {"microbatches": 2, "remat": "dots"}
    plain = run(Synchronised(None), None, **options)
    found = run(Synchronised(), "data:8", **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, plain)


def test_equals_a_loop_under_pmap() -> None:
    parts = Synchronised(), Regression(), SGD(0.1)
    state = init_state(*parts, batch_of())
    variables = {"params": state.params, **state.collections}
    variables = jax.device_get(variables)
    step = steps.make_train_step(*parts)

    def loss(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> Any:
        out, changed = Synchronised().apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return jnp.mean(jnp.square(out - y)), changed["batch_stats"]

    def one(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> Any:
        (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params, stats, x, y)
        gradients = jax.lax.pmean(gradients, "batch")
        updates, _ = optax.sgd(0.1).update(gradients, optax.sgd(0.1).init(params))
        return optax.apply_updates(params, updates), stats, jax.lax.pmean(value, "batch")

    everywhere = jax.jit(jax.vmap(one, (None, None, 0, 0), axis_name="batch"))  # as pmap does
    params, stats = variables["params"], variables["batch_stats"]
    for index in range(5):
        batch = batch_of(index)
        state, sums = step(state, batch)
        x, y = (batch[name].reshape(8, 2, -1) for name in ("image", "target"))
        params, stats, value = jax.tree.map(lambda leaf: leaf[0], everywhere(params, stats, x, y))
        np.testing.assert_allclose(sums["loss"][0] / 16, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (state.params, state.collections["batch_stats"]),
        (params, stats),
    )


@pytest.mark.slow
def test_compared_meshes_agree() -> None:
    batches = ({k: np.asarray(v) for k, v in batch_of(i).items()} for i in range(2))
    compared = compare_meshes.compare(
        Synchronised(), Regression(), SGD(0.1), batches, ["data:8"], steps=2
    )
    assert compared.agree, compared.summary()


def exchange(pairs: list[tuple[int, int]] | None) -> Any:
    """Sends to others; None is to the next one in a ring of any size."""

    def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
        size = jax.lax.axis_size("i") if pairs is None else 0
        ring = [(member, (member + 1) % size) for member in range(size)]
        return jax.lax.ppermute(x @ params["w"], "i", pairs or ring)

    return lambda key, x: {"w": jnp.ones((x.shape[-1], 2))}, apply


def test_a_ring_of_one_is_the_identity() -> None:
    found = run(exchange(None), None)
    plain = run((exchange(None)[0], lambda params, x: x @ params["w"]), None)
    assert found[1] == plain[1]


@pytest.mark.parametrize(
    ("model", "said", "followed"),
    [
        (
            Synchronised(groups=[[0, 1], [2, 3]]),
            "over the axis 'batch' run over the whole batch, as one member, and psum has"
            + " axis_index_groups; leave them out, so that it takes the whole batch",
            Synchronised(),
        ),
        (
            exchange([(0, 1), (1, 0)]),
            "over the axis 'i' run over the whole batch, as one member, and ppermute sends to"
            + " others; let its pairs follow jax.lax.axis_size, which is 1",
            exchange(None),
        ),
    ],
    ids=["groups", "ring"],
)
def test_collectives_among_some_members_are_refused(model: Any, said: str, followed: Any) -> None:
    parts = model, Regression(), SGD(0.1)
    state = init_state(*parts, batch_of())
    with pytest.raises(UserError) as caught:
        steps.make_train_step(*parts)(state, batch_of())
    assert str(caught.value) == f"model: its collectives {said}"
    jax.eval_shape(steps.make_train_step(followed, *parts[1:]), state, batch_of())


def test_reproducible_refuses_and_the_remedies_work() -> None:
    where = mesh.make("data:8")
    for axis in ("batch", None):
        parts = Synchronised(axis), Regression(), SGD(0.1)
        step = reproducible.make_train_step(*parts, mesh=where)
        state = init_state(*parts, batch_of(), mesh=where)
        if axis is None:
            state, sums = step(state, batch_of())
            assert np.isfinite(sums["loss"][0])
            continue
        with pytest.raises(UserError) as caught:
            step(state, batch_of())
        assert str(caught.value) == (
            "--reproducible: the model has collectives over the axis 'batch', and its logical"
            " shards are programs of their own; build it without (axis_name=None: batch statistics"
            " of each shard), or leave --reproducible out"
        )


def test_other_name_errors_are_the_users() -> None:
    def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
        return x @ params["w"] + unknown  # pyright: ignore  # noqa: F821

    parts = (lambda key, x: {"w": jnp.ones((x.shape[-1], 2))}, apply), Regression(), SGD(0.1)
    with pytest.raises(NameError, match="name 'unknown' is not defined"):
        steps.make_train_step(*parts)(init_state(*parts, batch_of()), batch_of())


def test_models_without_names_are_not_run_twice() -> None:
    calls = []

    def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
        calls.append(1)
        return x @ params["w"]

    made = (lambda key, x: {"w": jnp.ones((x.shape[-1], 2))}, apply), Regression(), SGD(0.1)
    steps.make_train_step(*made)(init_state(*made, batch_of()), batch_of())
    assert len(calls) == 1
