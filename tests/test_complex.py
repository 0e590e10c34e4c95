"""Complex parameters: trained downhill, equal to the loop over their real and imaginary parts; and
the optimizers whose equations know real numbers only refuse them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import optimizers
from jaxtrain.errors import UserError
from jaxtrain.optimizers import SGD, Adam, Muon
from jaxtrain.parallel import mesh
from jaxtrain.precision import loss_scale
from jaxtrain.tasks import Regression
from jaxtrain.train import compare_meshes, reproducible, steps
from jaxtrain.train.state import init_state

REAL_ONLY = {
    *("prodigy", "dadapt_adamw", "adadelta", "adopt", "cocob", "galore", "madgrad", "rprop"),
    *("simplified_ademamix", "sm3"),
}


DEFAULT = {"momentum", "adamw", "lion", "lamb", "dowg", "muon", "novograd"}
"""What is tried in every run of the tests; the others cost as much and are `slow`."""


def batch_of(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
        "target": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
    }


def init(key: jax.Array, x: jax.Array) -> dict[str, Any]:
    one, other = jax.random.normal(key, (2, 8))
    return {"filter": jax.lax.complex(one, other), "bias": jnp.zeros(8)}


def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """A filter in the frequency domain, as in Fourier neural operators."""
    assert params["filter"].dtype == jnp.complex64
    seen = jnp.fft.ifft(jnp.fft.fft(x.astype(jnp.float32)) * params["filter"][None])
    # The imaginary part counts, so that a gradient that is not conjugated goes uphill.
    return jnp.real(seen) + jnp.imag(seen) + params["bias"][None].astype(jnp.float32)


def by_parts(params: dict[str, Any], chain: Any, clip: float, count: int) -> Any:
    """The same run over real numbers only, written by hand."""

    def joined(split: dict[str, Any]) -> dict[str, Any]:
        return {"filter": jax.lax.complex(split["re"], split["im"]), "bias": split["bias"]}

    def loss(split: dict[str, Any], batch: Any) -> jax.Array:
        return jnp.mean(jnp.square(apply(joined(split), batch["image"]) - batch["target"]))

    split = {"re": params["filter"].real, "im": params["filter"].imag, "bias": params["bias"]}
    state, losses, norms = chain.init(split), [], []
    for step in range(count):
        value, gradients = jax.value_and_grad(loss)(split, batch_of(step))
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in gradients.values()))
        shrink = jnp.minimum(1.0, clip / norm)
        updates, state = chain.update(
            {name: leaf * shrink for name, leaf in gradients.items()}, state, split
        )
        split = optax.apply_updates(split, updates)
        losses.append(float(value))
        norms.append(float(norm))
    return joined(split), losses, norms


@pytest.mark.parametrize("text", [None, "data:2,fsdp:4"])
def test_equals_the_loop_over_real_and_imaginary_parts(text: str | None) -> None:
    parts = (init, apply), Regression(), SGD(0.4, momentum=0.9, weight_decay=0.01)
    options = {"clip_norm": 0.3, "ema_decay": 0.5, "microbatches": 1 if text is None else 2}
    where = None if text is None else mesh.make(text)
    state = init_state(*parts, batch_of(), mesh=where, **options)
    chain = optax.chain(
        optax.add_decayed_weights(0.01, {"re": False, "im": False, "bias": False}),
        optax.sgd(0.4, momentum=0.9),
    )
    wanted, losses, norms = by_parts(jax.device_get(state.params), chain, 0.3, 5)
    step = steps.make_train_step(*parts, mesh=where, **options)
    for index in range(5):
        state, sums = step(state, batch_of(index))
        np.testing.assert_allclose(sums["loss"][0] / sums["loss"][1], losses[index], rtol=1e-5)
        np.testing.assert_allclose(sums["grad_norm"][0], norms[index], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, wanted
    )
    assert losses[-1] < losses[0]
    assert state.ema["filter"].dtype == jnp.complex64
    assert np.all(np.asarray(state.ema["filter"]).imag != 0)
    evaluated = steps.make_eval_step(*parts, mesh=where, **options)(state, batch_of())
    assert np.isfinite(evaluated["loss"][0])


def test_adam_scales_by_the_absolute_square() -> None:
    w = np.array([1 + 2j, -0.5j, 0.1], np.complex64)
    gradients = np.array([[0.3 - 0.1j, 2j, 1.0], [0.2 + 0.5j, -1j, 0.5]], np.complex64)
    chain = Adam(0.1, weight_decay=0.1, decay=((".*", 1.0),)).transform({"w": jnp.asarray(w)}, 0.1)
    params, state = {"w": jnp.asarray(w)}, chain.init({"w": jnp.asarray(w)})
    wanted, m, v = w.astype(np.complex128), np.zeros(3, np.complex128), np.zeros(3)
    for count, gradient in enumerate(gradients, start=1):
        updates, state = chain.update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        decayed = gradient.astype(np.complex128) + 0.1 * wanted
        m, v = 0.9 * m + 0.1 * decayed, 0.999 * v + 0.001 * np.abs(decayed) ** 2
        unbiased = np.sqrt(v / (1 - 0.999**count)) + 1e-8
        wanted = wanted - 0.1 * m / (1 - 0.9**count) / unbiased
    np.testing.assert_allclose(params["w"], wanted, rtol=5e-5)  # float32's 1 - 0.999


def descent(optimizer: Any, start: Any, target: Any, steps: int = 3) -> tuple[Any, list[float]]:
    def loss(params: Any) -> jax.Array:
        return jnp.sum(jnp.square(jnp.abs(params["kernel"] - target)))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = chain.update(jax.tree.map(jnp.conj, gradients), state, params)
        return optax.apply_updates(params, updates), state, value

    params, losses = {"kernel": jnp.asarray(start)}, []
    chain = optimizer.transform(params, optimizer.learning_rate)
    state = chain.init(params)
    types = jax.tree.map(lambda leaf: leaf.dtype, state)
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == types
    return np.asarray(params["kernel"]), losses


@pytest.mark.parametrize(
    "name",
    [
        name if name in DEFAULT | REAL_ONLY else pytest.param(name, marks=pytest.mark.slow)
        for name in optimizers.NAMES
    ],
)
def test_every_optimizer_is_right_or_refuses(name: str) -> None:
    rng = np.random.default_rng(0)
    start, target = (
        (rng.normal(size=(4, 3)) + 1j * rng.normal(size=(4, 3))).astype(np.complex64)
        for _ in range(2)
    )
    optimizer = optimizers.NAMES[name]
    if name == "dog":
        optimizer = dataclasses.replace(optimizer, initial=0.01)  # else it moves by rounding only
    if name in REAL_ONLY:
        with pytest.raises(UserError) as caught:
            descent(optimizer, start, target)
        assert str(caught.value) == (
            f"optimizer={type(optimizer).__name__}: kernel is complex64, and its equations are for"
            " real numbers only; use SGD, Adam or AdamW, or freeze it (--optimizer.frozen=kernel)"
        )
        # the remedy; SGD, Adam and AdamW are other cases of this test
        params = {"kernel": jnp.asarray(start), "head": jnp.ones((4, 3))}
        frozen = dataclasses.replace(optimizer, frozen=("kernel",)).transform(params, 1.0)
        shapes = jax.eval_shape(frozen.update, params, jax.eval_shape(frozen.init, params), params)
        assert shapes[0]["head"].dtype == jnp.float32
        return
    # No direction of the plane is special: turned by an angle, all turns.
    turn = np.exp(0.7j).astype(np.complex64)
    end, losses = descent(optimizer, start, target)
    turned, _ = descent(optimizer, start * turn, target * turn)
    size = np.abs(end - start).max()
    if name != "noisy_sgd":
        assert np.abs(end * turn - turned).max() < 1e-3 * size + 1e-6
        # On the real axis it is what it is for real numbers.
        real, _ = descent(optimizer, start.real, target.real)
        there, _ = descent(optimizer, start.real.astype(np.complex64), target.real)
        np.testing.assert_allclose(there, real, rtol=1e-4, atol=1e-3 * size)
    assert losses[-1] < losses[0]


def test_muon_makes_complex_matrices_unitary() -> None:
    rng = np.random.default_rng(1)
    kernel = (rng.normal(size=(5, 3)) + 1j * rng.normal(size=(5, 3))).astype(np.complex64)
    params = {"kernel": jnp.asarray(kernel)}
    chain = Muon(1.0, newton_schulz_steps=5).transform(params, 1.0)
    updates, _ = chain.update({"kernel": jnp.asarray(kernel)}, chain.init(params), params)
    u, _, v = np.linalg.svd(kernel.astype(np.complex128), full_matrices=False)
    # Five iterations bring the singular values near 1; the directions are exact.
    turned = u.conj().T @ -np.asarray(updates["kernel"]) / np.sqrt(5 / 3) @ v.conj().T
    np.testing.assert_allclose(turned - np.diag(np.diag(turned)), 0, atol=1e-4)
    assert np.all(np.abs(np.diag(turned) - 1) < 0.6)


def test_meshes_and_shards_and_precisions() -> None:
    parts = (init, apply), Regression(), SGD(0.1)
    batches = ({k: np.asarray(v) for k, v in batch_of(i).items()} for i in range(2))
    compared = compare_meshes.compare(*parts, batches, ["data:2,fsdp:4"], steps=2)
    assert compared.agree, compared.summary()
    found = compare_meshes.gradient_differences({"a": np.array([1 + 1j])}, {"a": np.array([1.0])})
    assert found == {"a": 1.0}
    where = mesh.make("data:8")
    state, _ = reproducible.make_train_step(*parts, mesh=where)(
        init_state(*parts, batch_of(), mesh=where), batch_of()
    )
    plain, _ = steps.make_train_step(*parts)(init_state(*parts, batch_of()), batch_of())
    np.testing.assert_allclose(state.params["filter"], plain.params["filter"], rtol=1e-5)
    for precision in ("bf16", "fp16"):
        low, _ = steps.make_train_step(*parts, precision=precision)(
            init_state(*parts, batch_of(), precision=precision), batch_of()
        )
        np.testing.assert_allclose(low.params["filter"], plain.params["filter"], rtol=2e-2)
    assert not loss_scale.all_finite({"a": jnp.array([jnp.nan + 1j])})
