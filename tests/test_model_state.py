"""Collections of any kind, what models sow, and their random streams: each against a loop written
by hand with the model's own library."""

import dataclasses
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxtrain import adapters, init_state, make_eval_step, make_train_step, metrics, rng
from jaxtrain.optimizers import SGD
from jaxtrain.parallel import mesh as meshes
from jaxtrain.train import reproducible

RATE, STEPS = 0.1, 3


@dataclasses.dataclass(frozen=True)
class Squares:
    """The squared error of one number an example."""

    def inputs(self, batch: Any) -> Any:
        return batch["x"]

    def loss(self, outputs: Any, batch: Any, *, train: bool = True) -> Any:
        loss_B = jnp.square(outputs[:, 0].astype(jnp.float32) - batch["y"])
        return {"loss": metrics.weighted(loss_B, batch.get("weight"))}


def batch_of(rows: int = 8) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    x = generator.normal(size=(rows, 4)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1), "weight": np.ones(rows, np.float32)}


def trained(model: Any, batch: Any, task: Any = None, **options: Any) -> tuple[Any, list[Any]]:
    """The state after a few steps of plain gradient descent, and the sums of each."""
    parts = (model, task or Squares(), SGD(learning_rate=RATE, momentum=0.0))
    state = init_state(*parts, batch, **options)
    step, seen = make_train_step(*parts, **options), []
    for _ in range(STEPS):
        state, sums = step(state, batch)
        seen.append(jax.device_get(sums))
    assert "mesh" in options or step._cache_size() == 1  # nothing grows
    return state, seen


def by_hand(loss: Any, params: Any, collections: Any, keys: Any = None) -> tuple[Any, Any, list]:
    """Gradient descent on `loss(params, collections, key) -> (loss, collections)`."""
    seen = []
    gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for index in range(STEPS):
        key = None if keys is None else keys(index)
        (value, collections), gradient = gradients(params, collections, key)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, gradient)
        seen.append(float(value))
    return params, collections, seen


def assert_near(one: Any, other: Any) -> None:
    for path, (a, b) in enumerate(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=str(path))


def squares(outputs: Any, batch: Any) -> Any:
    return jnp.mean(jnp.square(outputs[:, 0] - batch["y"]))


def start(state_or_parts: Any, model: Any, batch: Any) -> Any:
    """The parameters before the first step, as jaxtrain makes them."""
    return init_state(model, Squares(), SGD(learning_rate=RATE), batch)


# --- what is sown


class Router(nn.Module):
    """Two layers that sow the size of what they give, as experts do with their balance."""

    collection: str = "losses"

    @nn.compact
    def __call__(self, x, train: bool = False):
        for index in range(2):
            x = nn.Dense(4, name=f"d{index}")(x)
            self.sow(self.collection, "balance", jnp.mean(jnp.square(x)))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(1, name="out")(x)


@pytest.mark.parametrize(
    ("collection", "weight", "rules"),
    [
        ("losses", 1.0, ()),
        ("losses", 0.01, (("balance", 0.01),)),
        ("intermediates", 0.3, (("balance", 0.3),)),
        ("intermediates", 0.0, ()),
    ],
)
def test_sown_losses_are_added_by_weight_and_enter_no_state(collection, weight, rules) -> None:
    model, batch = Router(collection), batch_of()
    options = {"aux_losses": rules}
    first = start(None, model, batch)
    assert first.collections == {}
    state, seen = trained(model, batch, **options)
    assert state.collections == {}

    def loss(params, _, __):
        outputs, sown = model.apply({"params": params}, batch["x"], mutable=[collection])
        return squares(outputs, batch) + weight * sum(sown[collection]["balance"]), {}

    params, _, losses = by_hand(loss, first.params, {})
    assert_near(state.params, params)
    found = [float(sums["loss"][0] / sums["loss"][1]) for sums in seen]
    np.testing.assert_allclose(found, losses, rtol=1e-6)
    assert ("aux_balance" in seen[0]) == bool(weight)


def test_sown_losses_are_exact_over_microbatches_and_padding() -> None:
    model, batch = Router(), batch_of()
    batch["weight"][6:] = 0.0
    state, seen = trained(model, batch, microbatches=2)

    def loss(params, _, __):
        total = 0.0
        for part in (slice(0, None, 2), slice(1, None, 2)):
            outputs, sown = model.apply({"params": params}, batch["x"][part], mutable=["losses"])
            error = jnp.square(outputs[:, 0] - batch["y"][part]) * batch["weight"][part]
            total += error.sum() + batch["weight"][part].sum() * sum(sown["losses"]["balance"])
        return total / 6.0, {}

    params, _, losses = by_hand(loss, start(None, model, batch).params, {})
    assert_near(state.params, params)
    np.testing.assert_allclose([s["loss"][0] / s["loss"][1] for s in seen], losses, rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Own(Squares):
    def loss(self, outputs, batch, *, train=True, sown=None):
        sums = super().loss(outputs, batch)
        if not sown:
            return sums
        total, count = sums["loss"]
        return {"loss": (total + 0.5 * sum(sown["losses"]["balance"]) * count, count)}


def test_a_task_may_add_what_was_sown_itself() -> None:
    batch = batch_of()
    own, _ = trained(Router(), batch, task=Own())
    ruled, _ = trained(Router(), batch, aux_losses=(("balance", 0.5),))
    assert_near(own.params, ruled.params)


def test_a_rule_for_what_nobody_sows_is_an_error() -> None:
    rules = (("blance", 0.5),)
    with pytest.raises(ValueError, match=r"=blance=0.5: the model sows no such value; it sows b"):
        trained(Router(), batch_of(), aux_losses=rules)
    with pytest.raises(ValueError, match=r"^--aux_losses=blance=0.5: the model sows nothing in"):
        trained(nn.Dense(1), batch_of(), aux_losses=rules)


class Summed(nn.Module):
    """Sows by a sum, whose structure does not grow: it would pile up from step to step."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            self.sow(
                "aux_loss",
                "l2",
                jnp.mean(jnp.square(x)),
                init_fn=lambda: jnp.float32(0),
                reduce_fn=lambda one, other: one + other,
            )
        return nn.Dense(1)(x)


def test_what_is_summed_while_sown_does_not_pile_up_over_steps() -> None:
    batch = batch_of()
    _, seen = trained(Summed(), batch)
    wanted = 2 * np.mean(np.square(batch["x"]))
    for sums in seen:
        np.testing.assert_allclose(sums["aux_l2"][0] / sums["aux_l2"][1], wanted, rtol=1e-6)


class NnxRouter(nnx.Module):
    def __init__(self, *, rngs):
        self.inner, self.out = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        x = self.inner(x)
        self.sow(nnx.Intermediate, "balance", jnp.mean(jnp.square(x)))
        return self.out(x)


def test_what_nnx_sows_is_added_by_a_rule() -> None:
    model, batch = NnxRouter(rngs=nnx.Rngs(0)), batch_of()
    with pytest.warns(DeprecationWarning, match="sow"):
        model(batch["x"])  # an earlier call has left its own there
    state, seen = trained(model, batch, aux_losses=(("balance", 0.5),))
    assert state.collections == {}

    def loss(params, _, __):
        inner = batch["x"] @ params["inner"]["kernel"] + params["inner"]["bias"][None]
        outputs = inner @ params["out"]["kernel"] + params["out"]["bias"][None]
        return squares(outputs, batch) + 0.5 * jnp.mean(jnp.square(inner)), {}

    params, _, losses = by_hand(loss, start(None, model, batch).params, {})
    assert_near(state.params, params)
    np.testing.assert_allclose([s["loss"][0] / s["loss"][1] for s in seen], losses, rtol=1e-6)


# --- collections


class Collections(nn.Module):
    """Spectral norm, batch norm, a counter that also counts in evaluation, and a cache of bools."""

    @nn.compact
    def __call__(self, x, train: bool):
        counter = self.variable("counters", "calls", lambda: jnp.int32(0))
        flag = self.variable("cache", "seen", lambda: jnp.zeros((), bool))
        if not self.is_initializing():
            counter.value = counter.value + 1
            flag.value = jnp.ones((), bool)
        x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return nn.Dense(1)(x)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_collections_of_any_kind_go_from_step_to_step(microbatches: int) -> None:
    model, batch = Collections(), batch_of()
    first = start(None, model, batch)
    assert set(first.collections) == {"counters", "cache", "batch_stats"}
    state, _ = trained(model, batch, microbatches=microbatches)
    assert int(state.collections["counters"]["calls"]) == STEPS
    assert state.collections["counters"]["calls"].dtype == jnp.int32
    assert bool(state.collections["cache"]["seen"])
    if microbatches == 2:
        return

    def loss(params, collections, _):
        outputs, changed = model.apply(
            {"params": params, **collections}, batch["x"], True, mutable=list(collections)
        )
        return squares(outputs, batch), changed

    params, collections, _ = by_hand(loss, first.params, first.collections)
    assert_near(state.params, params)
    assert_near(state.collections, collections)
    parts = (model, Squares(), SGD(learning_rate=RATE))
    sums = make_eval_step(*parts)(state, batch)
    outputs, _ = model.apply(
        {"params": params, **collections}, batch["x"], False, mutable=["counters", "cache"]
    )
    np.testing.assert_allclose(sums["loss"][0] / 8, squares(outputs, batch), rtol=1e-5)


class Late(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        if train:
            self.variable("moments", "mean", lambda: x.mean(0))
        return nn.Dense(1)(x)


def test_a_collection_that_only_training_makes_is_named() -> None:
    net = adapters.functions(Late())
    x = batch_of()["x"]
    with pytest.raises(ValueError, match="the collection 'moments' is there in a training pass"):
        net.apply(net.init(jax.random.key(0), x), x, train=True, key=jax.random.key(0))


# --- Haiku and Equinox


def haiku_function(x, is_training):
    x = hk.BatchNorm(True, True, 0.5)(hk.Linear(6)(x), is_training)
    if is_training:
        x = hk.dropout(hk.next_rng_key(), 0.25, x)
    return hk.Linear(1)(x)


def dropout_key(state: Any, index: int) -> Any:
    """The key of the only part of a step."""
    return jax.random.fold_in(rng.stream(state.key, "dropout", index), 0)


def test_haiku_with_state_is_its_own_loop() -> None:
    model, batch = hk.transform_with_state(haiku_function), batch_of()
    first = start(None, model, batch)
    state, seen = trained(model, batch)

    def loss(params, collections, key):
        outputs, new = model.apply(params, collections["state"], key, batch["x"], True)
        return squares(outputs, batch), {"state": new}

    params, collections, losses = by_hand(
        loss, first.params, first.collections, lambda index: dropout_key(first, index)
    )
    assert_near(state.params, params)
    assert_near(state.collections, collections)
    np.testing.assert_allclose([s["loss"][0] / s["loss"][1] for s in seen], losses, rtol=1e-6)
    sums = make_eval_step(model, Squares(), SGD())(state, batch)
    outputs, _ = model.apply(params, collections["state"], None, batch["x"], False)
    np.testing.assert_allclose(sums["loss"][0] / 8, squares(outputs, batch), rtol=1e-5)


class EqxNet(eqx.Module):
    layers: list
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.layers = [eqx.nn.Linear(4, 6, key=one), eqx.nn.Linear(6, 1, key=two)]
        self.norm = eqx.nn.BatchNorm(6, axis_name="rows", mode="batch", momentum=0.5)
        self.drop = eqx.nn.Dropout(0.25)

    def __call__(self, x, state, *, key=None):
        x, state = self.norm(self.layers[0](x), state)
        return self.layers[1](self.drop(jax.nn.relu(x), key=key)), state


@pytest.mark.parametrize("given", ["made", "factory"])
def test_equinox_with_state_is_its_own_loop(given: str) -> None:
    make, batch = eqx.nn.make_with_state(EqxNet), batch_of()
    model = make(jax.random.key(5)) if given == "made" else lambda key: make(key)
    first = start(None, model, batch)
    state, seen = trained(model, batch)
    if given == "factory":
        assert seen[-1]["loss"][0] < seen[0]["loss"][0]
        return
    module, carried = model
    dynamic, static = eqx.partition(module, eqx.is_inexact_array)

    def loss(dynamic, carried, key):
        whole = eqx.combine(dynamic, static)
        outputs, new = jax.vmap(whole, axis_name="rows", in_axes=(0, None), out_axes=(0, None))(
            batch["x"], carried, key=jax.random.split(key, 8)
        )
        return squares(outputs, batch), new

    params, carried, losses = by_hand(
        loss, dynamic, carried, lambda index: dropout_key(first, index)
    )
    np.testing.assert_allclose([s["loss"][0] / s["loss"][1] for s in seen], losses, rtol=1e-6)
    for index in (0, 1):
        assert_near(state.params["layers"][str(index)]["weight"], params.layers[index].weight)
    assert_near(state.collections["state"], list(jax.tree.leaves(carried)))
    sums = make_eval_step(model, Squares(), SGD())(state, batch)
    quiet = eqx.nn.inference_mode(eqx.combine(params, static))
    outputs, _ = jax.vmap(quiet, axis_name="rows", in_axes=(0, None), out_axes=(0, None))(
        batch["x"], carried
    )
    np.testing.assert_allclose(sums["loss"][0] / 8, squares(outputs, batch), rtol=1e-5)


def counting_init(key, x):
    return {"w": jnp.ones((4, 1))}, {"count": jnp.int32(0)}


def counting_apply(params, state, x, *, training, key):
    noise = jax.random.normal(key, x.shape) if training else 0.0
    return (x + noise) @ params["w"], {"count": state["count"] + 1}


def test_functions_with_a_state() -> None:
    batch = batch_of()
    state, _ = trained((counting_init, counting_apply), batch)
    assert int(state.collections["state"]["count"]) == STEPS
    first = start(None, (counting_init, counting_apply), batch)

    def loss(params, _, key):
        outputs, _ = counting_apply(params, {"count": 0}, batch["x"], training=True, key=key)
        return squares(outputs, batch), {}

    params, _, _ = by_hand(loss, first.params, {}, lambda index: dropout_key(first, index))
    assert_near(state.params, params)


def test_functions_with_a_state_must_give_it_back() -> None:
    with pytest.raises(ValueError, match=r"init must return \(params, state\); it gave dict"):
        trained((lambda key, x: {"w": 1}, counting_apply), batch_of())


# --- random streams


class Streams(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(6)(x)
        if train:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
            x = nn.Dropout(0.5, rng_collection="drop_path", deterministic=False)(x)
        if self.has_rng("mask"):
            x = x * jax.random.bernoulli(self.make_rng("mask"), 0.5, x.shape)
        return nn.Dense(1)(nn.Dropout(0.2, deterministic=not train)(x))


def test_linen_streams_of_any_name_come_from_one_key() -> None:
    model, batch = Streams(), batch_of()
    first = start(None, model, batch)
    state, _ = trained(model, batch)

    def loss(params, _, key):
        rngs = {name: adapters.stream(key, name) for name in ("noise", "drop_path", "mask")}
        outputs = model.apply({"params": params}, batch["x"], True, rngs=rngs | {"dropout": key})
        return squares(outputs, batch), {}

    params, _, _ = by_hand(loss, first.params, {}, lambda index: dropout_key(first, index))
    assert_near(state.params, params)


class Sampler(nn.Module):
    """A variational encoder, which draws in evaluation, too."""

    @nn.compact
    def __call__(self, x):
        mean, log_scale = jnp.split(nn.Dense(8)(x), 2, axis=-1)
        z = mean + jnp.exp(log_scale) * jax.random.normal(self.make_rng("z"), mean.shape)
        return nn.Dense(1)(z)


class NnxSampler(nnx.Module):
    def __init__(self, *, rngs):
        self.encode, self.out = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
        self.rngs = rngs.fork() if hasattr(rngs, "fork") else rngs

    def __call__(self, x):
        z = self.encode(x)
        return self.out(z + jax.random.normal(self.rngs.noise(), z.shape))


class EqxSampler(eqx.Module):
    out: eqx.nn.Linear

    def __call__(self, x, key):
        return self.out(x + jax.random.normal(key, x.shape))


class KeyArgument(nn.Module):
    """As the VAE of Flax's examples has it."""

    @nn.compact
    def __call__(self, x, z_rng):
        return nn.Dense(1)(x + jax.random.normal(z_rng, x.shape))


def drawing(x):
    return hk.Linear(1)(x + jax.random.normal(hk.next_rng_key(), x.shape))


SAMPLERS: dict[str, Any] = {
    "linen": Sampler(),
    "linen, a key as argument": KeyArgument(),
    "nnx": NnxSampler,
    "equinox": EqxSampler(eqx.nn.Linear(4, 1, key=jax.random.key(0))),
    "haiku": hk.transform(drawing),
    "pair": (
        lambda key, x: {"w": jnp.ones((4, 1))},
        lambda params, x, key: (x + jax.random.normal(key, x.shape)) @ params["w"],
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_draws_in_evaluation_does_so_by_seed_and_example(name: str) -> None:
    batch = batch_of() | {"id": np.arange(8, dtype=np.int32)}
    parts = (SAMPLERS[name], Squares(), SGD(learning_rate=RATE))
    state = init_state(*parts, batch, seed=1)
    evaluate = make_eval_step(*parts)
    whole = jax.device_get(evaluate(state, batch)["loss"])
    order = [3, 1, 7, 5, 0, 2, 4, 6]
    parted = [
        jax.device_get(evaluate(state, {k: v[order][i : i + 4] for k, v in batch.items()})["loss"])
        for i in (0, 4)
    ]
    np.testing.assert_allclose(sum(part[0] for part in parted), whole[0], rtol=1e-5)
    later = dataclasses.replace(state, step=state.step + 5)
    assert float(evaluate(later, batch)["loss"][0]) == whole[0]
    other = init_state(*parts, batch, seed=2)
    other = dataclasses.replace(state, key=other.key)
    assert float(evaluate(other, batch)["loss"][0]) != whole[0]
    if name == "pair":
        keys = [jax.random.fold_in(rng.stream(state.key, "evaluation", 0), i) for i in range(8)]
        noise = np.stack([jax.random.normal(key, (1, 4))[0] for key in keys])
        wanted = np.square((batch["x"] + noise).sum(1) - batch["y"]).sum()
        np.testing.assert_allclose(whole[0], wanted, rtol=1e-5)


# --- several inputs


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, tokens, mask, train: bool = False):
        x = nn.Embed(5, 4)(tokens) * mask[..., None]
        return nn.Dense(1)(x.sum(axis=1)) * (2.0 if train else 1.0)


@dataclasses.dataclass(frozen=True)
class Picked(Squares):
    by_name: bool = False

    def inputs(self, batch):
        if self.by_name:
            return {"mask": batch["mask"], "tokens": batch["tokens"]}
        return batch["tokens"], batch["mask"]


@pytest.mark.parametrize("kind", ["linen", "nnx", "equinox", "haiku", "pair"])
@pytest.mark.parametrize("by_name", [False, True])
def test_inputs_by_position_and_by_name(kind: str, by_name: bool) -> None:
    def plain(tokens, mask):
        return (tokens * mask).sum(axis=-1, keepdims=True) * 1.0

    class N(nnx.Module):
        def __call__(self, tokens, mask):
            return plain(tokens, mask)

    class E(eqx.Module):
        def __call__(self, tokens, mask):
            return plain(tokens, mask)

    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 5, (6, 3)).astype(np.int32)
    mask = generator.integers(0, 2, (6, 3)).astype(np.float32)
    inputs = {"mask": mask, "tokens": tokens} if by_name else (tokens, mask)
    model: Any = {
        "linen": TwoInputs(),
        "nnx": N(),
        "equinox": E(),
        "haiku": hk.transform(plain),
        "pair": (lambda key, tokens, mask: {}, lambda params, tokens, mask: plain(tokens, mask)),
    }[kind]
    net = adapters.functions(model)
    variables = net.init(jax.random.key(0), inputs)
    found, _ = net.apply(variables, inputs, train=True, key=jax.random.key(0))
    wanted = plain(tokens, mask)
    if kind == "linen":
        wanted = model.apply(variables, tokens, mask, True)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    adapters.logical_axes(model, inputs)
    with pytest.raises(ValueError, match=r"takes \(tokens, mask\) and the task gives 1 input"):
        net.apply(variables, (tokens,), train=True, key=jax.random.key(0))
    with pytest.raises(ValueError, match="and the task gives 3 inputs; let the task's inputs be"):
        net.apply(variables, (tokens, mask, mask), train=True, key=jax.random.key(0))


def test_draws_in_evaluation_are_the_same_on_any_mesh_and_among_shards() -> None:
    batch = batch_of() | {"id": np.arange(8, dtype=np.int32)}
    parts = (Sampler(), Squares(), SGD(learning_rate=RATE))
    alone = make_eval_step(*parts)(init_state(*parts, batch), batch)["loss"][0]
    mesh = meshes.make("data:2,fsdp:2", jax.devices()[:4])
    state = init_state(*parts, batch, mesh=mesh)
    found = make_eval_step(*parts, mesh=mesh)(state, batch)["loss"][0]
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    sharded = reproducible.make_eval_step(*parts, mesh=mesh, shards=4)
    np.testing.assert_allclose(sharded(state, batch)["loss"][0], alone, rtol=1e-5)


def test_sown_losses_are_the_same_on_a_mesh_and_in_evaluation_are_left_out() -> None:
    batch, mesh = batch_of(), meshes.make("data:4", jax.devices()[:4])
    alone, _ = trained(Router(), batch)
    state, _ = trained(Router(), batch, mesh=mesh)
    assert_near(state.params, alone.params)
    parts = (Router(), Squares(), SGD(learning_rate=RATE))
    sums = make_eval_step(*parts)(alone, batch)
    outputs = Router().apply({"params": alone.params}, batch["x"])
    np.testing.assert_allclose(sums["loss"][0] / 8, squares(outputs, batch), rtol=1e-5)
    assert set(sums) == {"loss"}
