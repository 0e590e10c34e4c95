"""What is trained and what is not: gradients, norms, optimizers, averages and statistics see the
trained parameters only; integers, booleans, keys and Python numbers freeze themselves."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from jaxtrain import optimizers, tree
from jaxtrain.checkpoints import arrays as checkpoint_arrays
from jaxtrain.errors import UserError
from jaxtrain.optimizers import SGD, AdamW, Lamb, from_optax, match_table
from jaxtrain.parallel import mesh
from jaxtrain.tasks import Classification, Regression
from jaxtrain.train import compare_meshes, reproducible, steps
from jaxtrain.train.frozen import frozen_notes
from jaxtrain.train.state import init_state

ROWS = 16


def regression_batch(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(ROWS, 8)), jnp.float32),
        "target": jnp.asarray(rng.normal(size=(ROWS, 3)), jnp.float32),
    }


def init_two(key: jax.Array, x: jax.Array) -> dict[str, Any]:
    body, head = jax.random.split(key)
    # A body with a large gradient: it once filled the clipping norm.
    return {
        "body": {"kernel": 20 * jax.random.normal(body, (x.shape[-1], 8))},
        "head": {"kernel": 0.1 * jax.random.normal(head, (8, 3)), "bias": jnp.zeros(3)},
    }


def apply_two(params: dict[str, Any], x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["body"]["kernel"] / 20)
    return hidden @ params["head"]["kernel"] + params["head"]["bias"][None]


def hand_written(
    apply: Any, params: Any, trained: Any, chain: Any, clip: float, count: int
) -> tuple[Any, list[float], list[float]]:
    """Fine-tuning as people write it: the gradient of the trained part alone."""

    def loss(part: Any, rest: Any, batch: Any) -> jax.Array:
        outputs = apply(rest | part, batch["image"])
        return jnp.mean(jnp.square(outputs - batch["target"]))

    part = {name: params[name] for name in trained}
    opt_state, losses, norms = chain.init(part), [], []
    for step in range(count):
        value, gradients = jax.value_and_grad(loss)(part, params, regression_batch(step))
        norm = optax.tree.norm(gradients)
        scale = jnp.minimum(1.0, clip / norm)
        updates, opt_state = chain.update(
            jax.tree.map(lambda leaf, scale=scale: leaf * scale, gradients), opt_state, part
        )
        part = optax.apply_updates(part, updates)
        losses.append(float(value))
        norms.append(float(norm))
    return params | part, losses, norms


def trained_run(
    parts: Any, count: int, *, text: str | None = None, **options: Any
) -> tuple[Any, list[float], list[float]]:
    where = None if text is None else mesh.make(text)
    state = init_state(*parts, regression_batch(), mesh=where, **options)
    step = steps.make_train_step(*parts, mesh=where, **options)
    losses, norms = [], []
    for index in range(count):
        state, sums = step(state, regression_batch(index))
        losses.append(float(sums["loss"][0] / sums["loss"][1]))
        norms.append(float(sums["grad_norm"][0]))
    assert text is not None or step._cache_size() == 1
    return state, losses, norms


def assert_close(first: Any, second: Any, rtol: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), first, second)


@pytest.mark.parametrize("text", [None, "data:2,fsdp:4"])
def test_frozen_parameters_are_in_no_norm(text: str | None) -> None:
    parts = (init_two, apply_two), Regression(), SGD(0.3, momentum=0.9, frozen=("^body",))
    start = jax.device_get(init_state(*parts, regression_batch()).params)
    options = {"clip_norm": 0.05, "ema_decay": 0.5, "microbatches": 1 if text is None else 2}
    state, losses, norms = trained_run(parts, 5, text=text, **options)
    wanted = hand_written(apply_two, start, ["head"], optax.sgd(0.3, momentum=0.9), 0.05, 5)
    assert_close((state.params, losses, norms), wanted)
    np.testing.assert_array_equal(state.params["body"]["kernel"], start["body"]["kernel"])
    # the average of what does not move is what it is, to the bit
    np.testing.assert_array_equal(state.ema["body"]["kernel"], start["body"]["kernel"])
    assert np.any(np.asarray(state.ema["head"]["kernel"]) != start["head"]["kernel"])


def test_gradients_are_of_the_trained_parameters_only() -> None:
    parts = (init_two, apply_two), Regression(), AdamW(frozen=("^body",), weight_decay=0.5)
    state = init_state(*parts, regression_batch())
    gradients, _ = steps.make_gradients(*parts)(state, regression_batch())
    assert gradients["body"] == {"kernel": None}
    assert list(tree.flatten(gradients)) == ["head/bias", "head/kernel"]
    # not even computed: the tanh of a frozen body has no backward pass
    text = steps.make_gradients(*parts).lower(state, regression_batch()).as_text()
    assert text.count("stablehlo.dot_general") == 3  # two forward, one for the head's kernel


def test_fp16_looks_at_the_gradients_of_the_trained_only() -> None:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        # a gradient that is infinite, of a parameter that is frozen
        return apply_two(params, x) + jnp.sqrt(params["root"]).astype(x.dtype)

    model = (lambda key, x: init_two(key, x) | {"root": jnp.zeros(())}, apply)
    parts = model, Regression(), SGD(0.01, frozen=("^body", "root"))
    state = init_state(*parts, regression_batch(), precision="fp16")
    _, sums = steps.make_train_step(*parts, precision="fp16")(state, regression_batch())
    assert float(sums["skipped"][0]) == 0.0


@pytest.mark.parametrize("name", list(optimizers.NAMES))
def test_an_optimizer_sees_the_trained_parameters_only(name: str) -> None:
    optimizer = optimizers.NAMES[name]
    part = {"head": {"bias": jnp.ones(4), "kernel": jnp.linspace(-1, 1, 24).reshape(6, 4)}}
    rest = {
        "body": {"kernel": 30 * jnp.ones((5, 6))},
        "ids": jnp.arange(3),
        "key": jax.random.key(0),
        "use": jnp.array([True]),
    }
    gradients = jax.tree.map(lambda leaf: 0.1 * leaf + 0.3, part)
    alone = optimizer.transform(part, 0.1)
    frozen = dataclasses.replace(optimizer, frozen=("^body",))
    both = frozen.transform(part | rest, 0.1)
    state, wide = alone.init(part), both.init(part | rest)
    params = part
    for _ in range(2):
        wanted, state = alone.update(gradients, state, params)
        found, wide = both.update(
            gradients | jax.tree.map(lambda _: None, rest), wide, params | rest
        )
        jax.tree.map(np.testing.assert_array_equal, found["head"], wanted["head"])
        assert not tree.flatten({key: found[key] for key in rest})
        params = optax.apply_updates(params, wanted)
    assert tree.size(wide) == tree.size(state)


@pytest.mark.parametrize(
    "own",
    [
        optax.adamw(0.1),
        optax.contrib.prodigy(1.0),
        optax.polyak_sgd(),
        optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(0.1)),
    ],
    ids=["adamw", "prodigy", "polyak", "clipped lamb"],
)
def test_a_transformation_of_optax_sees_the_trained_parameters_only(own: Any) -> None:
    part = {"head": {"kernel": jnp.linspace(-1, 1, 24).reshape(6, 4)}}
    rest = {"body": 30 * jnp.ones(5), "ids": jnp.arange(3), "key": jax.random.key(0)}
    gradients = jax.tree.map(lambda leaf: 0.1 * leaf + 0.3, part)
    optimizer = dataclasses.replace(from_optax.of(own), frozen=("^body",))
    optimizer.check(jax.eval_shape(lambda: part | rest))
    chain, own = optimizer.transform(part | rest, 1.0), optax.with_extra_args_support(own)
    given = gradients | dict.fromkeys(rest)
    found, _ = chain.update(
        given, chain.init(part | rest), part | rest, value=jnp.float32(1), grad=given
    )
    wanted, _ = own.update(gradients, own.init(part), part, value=jnp.float32(1), grad=gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found["head"], wanted["head"]
    )


class Frozen(nn.Module):
    """A backbone with a batch norm that has no parameters of its own, another that has, a head."""

    @nn.compact
    def __call__(self, x_BD: jax.Array, train: bool = False) -> jax.Array:
        x_BD = nn.Dense(6, name="stem")(x_BD)
        x_BD = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="stem_norm")(x_BD)
        x_BD = nn.Dense(3, name="head")(x_BD)
        return nn.BatchNorm(use_running_average=not train, momentum=0.5, name="head_norm")(x_BD)


def test_frozen_modules_keep_their_statistics() -> None:
    parts = Frozen(), Regression(), SGD(0.1, frozen=("^stem",))
    state = init_state(*parts, regression_batch())
    before = jax.device_get(state.collections["batch_stats"])
    for part in (parts, (*parts[:2], SGD(0.1, frozen=("^stem/",)))):
        after, _ = steps.make_train_step(*part)(jax.tree.map(jnp.copy, state), regression_batch())
        stats = jax.device_get(after.collections["batch_stats"])
        kept = all(
            np.array_equal(stats["stem_norm"][name], before["stem_norm"][name])
            for name in ("mean", "var")
        )
        assert kept == (part is parts)  # a norm that is trained goes on
        assert np.any(stats["head_norm"]["mean"] != before["head_norm"]["mean"])
    (note,) = frozen_notes(parts[2], state.params, state.collections)
    assert note == (
        "note: frozen modules keep their running statistics: stem_norm; in training they normalise"
        " as the model says (by the batch, if it is not told otherwise), in evaluation by these"
        " statistics"
    )


class FrozenNNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Linear(8, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x_BD: jax.Array) -> jax.Array:
        return self.head(self.norm(self.stem(x_BD)))


def haiku_model() -> Any:
    hk = pytest.importorskip("haiku")

    def forward(x: jax.Array, is_training: bool) -> jax.Array:
        x = hk.BatchNorm(True, True, 0.9, name="norm")(hk.Linear(4, name="stem")(x), is_training)
        return hk.Linear(3, name="head")(x)

    return hk.transform_with_state(forward)


def equinox_model() -> Any:
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        stem: Any
        norm: Any
        head: Any

        def __init__(self, key: jax.Array) -> None:
            self.stem = eqx.nn.Linear(8, 4, key=key)
            self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
            self.head = eqx.nn.Linear(4, 3, key=key)

        def __call__(self, x_D: jax.Array, state: Any) -> Any:
            x_D, state = self.norm(self.stem(x_D), state)
            return self.head(x_D), state

    return eqx.nn.make_with_state(Net)(jax.random.key(0))


@pytest.mark.parametrize("kind", [lambda: FrozenNNX, haiku_model, equinox_model])
def test_frozen_modules_of_every_library_keep_their_statistics(
    kind: Any,
) -> None:
    with jax.numpy_rank_promotion("allow"):  # Haiku's own
        for frozen, moves in ((("^stem", "^norm"), False), (("^stem",), True)):
            parts = kind(), Regression(), SGD(0.1, frozen=frozen)
            state = init_state(*parts, regression_batch())
            before = jax.device_get(state.collections)
            notes = frozen_notes(parts[2], state.params, state.collections)
            after, _ = steps.make_train_step(*parts)(state, regression_batch())
            same = jax.tree.map(np.array_equal, jax.device_get(after.collections), before)
            assert (not all(jax.tree.leaves(same))) == moves
            assert [note.partition(";")[0] for note in notes] == (
                [] if moves else ["note: frozen modules keep their running statistics: norm"]
            )


MIXED = {"ids": np.arange(8, dtype=np.int32)[::-1].copy(), "use": np.array([True, False, True])}


def init_mixed(key: jax.Array, x: jax.Array) -> dict[str, Any]:
    head, noise = jax.random.split(key)
    return {
        "bias": jnp.asarray(0.0),  # of a weak type, as Python's numbers make it
        "depth": 2,
        "head": jax.random.normal(head, (x.shape[-1], 3)),
        "ids": jnp.asarray(MIXED["ids"]),
        "noise": noise,
        "scale": 0.5,
        "use": jnp.asarray(MIXED["use"]),
    }


def apply_mixed(params: dict[str, Any], x: jax.Array) -> jax.Array:
    x = x[:, params["ids"]] + 0.1 * jax.random.normal(params["noise"], (8,))[None, :]
    for _ in range(params["depth"]):  # a Python number, as the model made it
        x = jnp.tanh(x)
    out = jnp.where(params["use"][None, :], x @ params["head"], 0.0)
    return params["scale"] * out + params["bias"]


@pytest.mark.parametrize("text", [None, "fsdp:8"])
def test_what_holds_no_floats_freezes_itself(text: str | None) -> None:
    parts = (init_mixed, apply_mixed), Regression(), AdamW(0.02, weight_decay=0.1)
    start = init_state(*parts, regression_batch())
    found = tree.without_constants(start.params)
    assert (found["depth"], found["scale"]) == (2, 0.5)
    rest = {name: found[name] for name in ("depth", "scale", "ids", "use", "noise")}
    hand = hand_written(
        lambda params, x: apply_mixed(params | rest, x),
        {name: found[name] for name in ("bias", "head")},
        ["bias", "head"],
        optax.adamw(0.02, weight_decay=0.1, mask={"bias": False, "head": True}),
        1e9,
        5,
    )
    options = {"ema_decay": 0.9, "clip_norm": 1e9, "microbatches": 2}
    state, losses, norms = trained_run(parts, 5, text=text, **options)
    assert_close(({n: state.params[n] for n in hand[0]}, losses, norms), hand)
    for name, value in MIXED.items():
        np.testing.assert_array_equal(state.params[name], value)
        np.testing.assert_array_equal(state.ema[name], value)
    assert jnp.array_equal(
        jax.random.key_data(state.params["noise"]), jax.random.key_data(found["noise"])
    )
    restored = checkpoint_arrays.to_devices(checkpoint_arrays.to_host(state), state)
    assert restored.params["noise"].dtype == state.params["noise"].dtype
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    sums = steps.make_eval_step(*parts, **options)(restored, regression_batch())
    assert np.isfinite(float(sums["loss"][0]))


def test_what_holds_no_floats_is_said_in_one_line() -> None:
    parts = (init_mixed, apply_mixed), Regression(), AdamW()
    params = init_state(*parts, regression_batch()).params
    assert frozen_notes(parts[2], params, {}) == [
        "note: not trained, since they hold no floats: ids (int32), noise (key<fry>), use (bool)",
        (
            "note: not trained, since they are Python numbers: depth=2, scale=0.5; make them"
            " arrays, such as jnp.float32(0.5), to train them"
        ),
    ]
    assert [row for row in match_table(AdamW(), params) if row[2] == "frozen"] == [
        ("ids", "(8,)", "frozen", "-"),
        ("noise", "()", "frozen", "-"),
        ("use", "(3,)", "frozen", "-"),
    ]


def test_meshes_and_shards_agree_with_leaves_of_all_kinds() -> None:
    parts = (init_mixed, apply_mixed), Regression(), Lamb(0.01, frozen=("bias",))
    batches = ({k: np.asarray(v) for k, v in regression_batch(i).items()} for i in range(3))
    compared = compare_meshes.compare(*parts, batches, ["data:2,fsdp:4"], steps=2)
    assert compared.agree, compared.summary()
    states = []
    for text in ("data:1", "data:2,fsdp:4"):
        where = mesh.make(text, jax.devices()[: 1 if text == "data:1" else 8])
        step = reproducible.make_train_step(*parts, mesh=where, ema_decay=0.9)
        state = init_state(*parts, regression_batch(), mesh=where, ema_decay=0.9)
        state, _ = step(state, regression_batch())
        states.append(checkpoint_arrays.digest(checkpoint_arrays.to_host(state)))
    assert states[0] == states[1]


TABLE = np.array([2**32 - 5, 7], np.uint32)
"""Sums of such numbers overflow."""


def stateful() -> Any:
    def init(key: jax.Array, x: jax.Array) -> Any:
        state = {
            "count": jnp.int32(0),
            "key": jax.random.key(3),
            "left": jnp.asarray(TABLE),
            "seen": jnp.zeros((), bool),
        }
        return {"w": jnp.ones((x.shape[-1], 3))}, state

    def apply(params: Any, state: Any, x: jax.Array) -> Any:
        new = state | {
            "count": state["count"] + 1,
            "left": state["left"] - 1,
            "seen": jnp.ones((), bool),
        }
        return x @ params["w"], new

    return init, apply


@pytest.mark.parametrize("how", ["microbatches", "reproducible"])
def test_counts_and_keys_of_a_state_are_those_of_one_pass(how: str) -> None:
    parts, where = (stateful(), Regression(), SGD(0.1)), mesh.make("data:8")
    state = init_state(*parts, regression_batch(), mesh=where)
    if how == "microbatches":
        step = steps.make_train_step(*parts, mesh=where, microbatches=2)
    else:
        step = reproducible.make_train_step(*parts, mesh=where)
    for index in range(2):
        state, _ = step(state, regression_batch(index))
    found = state.collections["state"]
    assert (int(found["count"]), bool(found["seen"])) == (2, True)
    np.testing.assert_array_equal(found["left"], TABLE - 2)
    assert jnp.array_equal(
        jax.random.key_data(found["key"]), jax.random.key_data(jax.random.key(3))
    )


def test_nothing_to_train_is_an_error() -> None:
    model = (lambda key, x: {"ids": jnp.arange(3)}, lambda params, x: x[:, params["ids"]])
    with pytest.raises(UserError) as caught:
        init_state(model, Regression(), SGD(), regression_batch())
    assert str(caught.value) == (
        "model: none of its 1 parameters is an array of floats, such as ids; nothing can be trained"
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_average_of_narrow_parameters_moves(dtype: Any) -> None:
    def init(key: jax.Array, x: jax.Array) -> dict[str, Any]:
        return {"w": jnp.ones((8, 3), dtype), "b": jnp.zeros(3)}

    def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
        out = x.astype(dtype) @ params["w"]
        assert params["w"].dtype == dtype  # in evaluation as in training
        return out.astype(jnp.float32) + params["b"][None]

    decay = 0.999
    parts, options = ((init, apply), Regression(), SGD(0.1)), {"ema_decay": decay}
    state = init_state(*parts, regression_batch(), **options)
    assert (state.ema["w"].dtype, state.ema["b"].dtype) == (jnp.float32, jnp.float32)
    # past the warm-up of the decay, where it is what was asked for
    state = dataclasses.replace(state, step=jnp.int32(20_000))
    mean = np.asarray(state.ema["w"], np.float64)
    step = steps.make_train_step(*parts, **options)
    for index in range(8):
        state, _ = step(state, regression_batch(index))
        mean = decay * mean + (1 - decay) * np.asarray(state.params["w"], np.float64)
    np.testing.assert_allclose(state.ema["w"], mean, rtol=1e-6)
    assert np.abs(mean - 1).max() > 1e-4
    assert state.params["w"].dtype == dtype
    sums = steps.make_eval_step(*parts, **options)(state, regression_batch())
    wanted = apply(
        jax.tree.map(lambda a, p: a.astype(p.dtype), state.ema, state.params),
        regression_batch()["image"],
    )
    error = jnp.mean(jnp.square(wanted - regression_batch()["target"]), axis=1)
    np.testing.assert_allclose(sums["loss"][0], error.sum(), rtol=2e-3)


def test_classification_still_trains_with_a_frozen_backbone() -> None:
    batch = {"image": regression_batch()["image"], "label": jnp.arange(ROWS) % 3}
    parts = Frozen(), Classification(), AdamW(0.05, frozen=("^stem",))
    state = init_state(*parts, batch)
    step = steps.make_train_step(*parts)
    losses = []
    for _ in range(10):
        state, sums = step(state, batch)
        losses.append(float(sums["loss"][0]))
    assert losses[-1] < 0.8 * losses[0]
