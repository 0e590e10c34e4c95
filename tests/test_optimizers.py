"""Every named optimizer learns, equals Optax's own, keeps its state's types, and obeys the
rules."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jaxtrain import fields, optimizers, tree
from jaxtrain.optimizers import (
    NAMES,
    SGD,
    Adam,
    AdamW,
    Lion,
    Muon,
    ScheduleFreeAdamW,
    evaluation_params,
    match_table,
)
from jaxtrain.train import hyper

STEPS = 100


def make_params(dtype: Any = jnp.float32) -> tree.PyTree:
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "body": {
            "kernel": 0.5 * jax.random.normal(keys[0], (6, 5), dtype),
            "bias": jnp.zeros(5, dtype),
        },
        "head": {
            "kernel": 0.5 * jax.random.normal(keys[1], (5, 4), dtype),
            "bias": jnp.full(4, 0.1, dtype),
        },
    }


INPUTS = jax.random.normal(jax.random.key(1), (32, 6))
TARGETS = jnp.tanh(INPUTS @ jax.random.normal(jax.random.key(2), (6, 4)))
MASK = {"body": {"kernel": True, "bias": False}, "head": {"kernel": True, "bias": False}}


def loss_of(params: tree.PyTree) -> jax.Array:
    hidden = jnp.tanh(
        INPUTS @ params["body"]["kernel"].astype(jnp.float32)
        + params["body"]["bias"].astype(jnp.float32)[None]
    )
    outputs = (
        hidden @ params["head"]["kernel"].astype(jnp.float32)
        + params["head"]["bias"].astype(jnp.float32)[None]
    )
    return jnp.mean((outputs - TARGETS) ** 2)


def l2(alias: optax.GradientTransformation, o: Any) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(o.weight_decay, MASK), alias)


def decoupled(
    direction: optax.GradientTransformation, o: Any, rate: Any
) -> optax.GradientTransformation:
    """From an alias at the rate -1."""
    return optax.chain(
        direction,
        optax.add_decayed_weights(o.weight_decay, MASK),
        optax.scale_by_learning_rate(rate),
    )


# name: (settings under which it learns the toy problem, the same from Optax's alias at the rate of
# the step)
ROWS: dict[str, tuple[dict[str, Any], Callable[[Any, Any], optax.GradientTransformation]]] = {
    "sgd": ({}, lambda o, rate: l2(optax.sgd(rate), o)),
    "momentum": ({}, lambda o, rate: l2(optax.sgd(rate, o.momentum), o)),
    "nesterov": ({}, lambda o, rate: l2(optax.sgd(rate, o.momentum, nesterov=True), o)),
    "adam": ({"learning_rate": 1e-2}, lambda o, rate: l2(optax.adam(rate, o.b1, o.b2, o.eps), o)),
    "nadam": ({"learning_rate": 1e-2}, lambda o, rate: l2(optax.nadam(rate, o.b1, o.b2, o.eps), o)),
    "adamw": (
        {"learning_rate": 1e-2},
        lambda o, rate: optax.adamw(
            rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=MASK
        ),
    ),
    "nadamw": (
        {"learning_rate": 1e-2},
        lambda o, rate: optax.nadamw(
            rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=MASK
        ),
    ),
    "lion": (
        {"learning_rate": 1e-2},
        lambda o, rate: optax.lion(rate, o.b1, o.b2, weight_decay=o.weight_decay, mask=MASK),
    ),
    "lamb": (
        {"learning_rate": 1e-2},
        lambda o, rate: optax.chain(
            optax.scale_by_adam(o.b1, o.b2, o.eps),
            optax.add_decayed_weights(o.weight_decay, MASK),
            optax.masked(optax.scale_by_trust_ratio(), MASK),
            optax.scale_by_learning_rate(rate),
        ),
    ),
    "lars": (
        {"trust": 0.02},
        lambda o, rate: optax.lars(
            rate, o.weight_decay, MASK, o.trust, trust_ratio_mask=MASK, momentum=o.momentum
        ),
    ),
    "adafactor": (
        {"learning_rate": 3e-2, "min_factored_dim": 4, "momentum": 0.5},
        # Optax does not multiply this decay by the rate.
        lambda o, rate: optax.adafactor(
            rate,
            4,
            o.moment_power,
            clipping_threshold=o.clip,
            momentum=o.momentum,
            weight_decay_rate=rate * o.weight_decay,
            eps=o.eps,
            weight_decay_mask=MASK,
        ),
    ),
    "muon": (
        # Optax's own takes every array of two dims.
        {"muon": ("head/kernel",)},
        lambda o, rate: contrib.muon(
            rate, beta=o.beta, eps=o.eps, weight_decay=o.weight_decay, adam_b1=o.b1, adam_b2=o.b2
        ),
    ),
    "schedule_free_sgd": (
        {},
        lambda o, rate: contrib.schedule_free(l2(optax.sgd(rate), o), rate, o.b1, o.weight_power),
    ),
    "schedule_free_adamw": (
        {"learning_rate": 3e-2, "weight_decay": 0.0},
        lambda o, rate: contrib.schedule_free(
            optax.chain(
                optax.scale_by_rms(o.b2, o.eps, eps_in_sqrt=False, bias_correction=True),
                optax.scale(-rate),
            ),
            rate,
            o.b1,
            2.0,
        ),
    ),
    "prodigy": (
        {"weight_decay": 0.0},
        lambda o, rate: contrib.prodigy(
            rate, (o.b1, o.b2), eps=o.eps, estim_lr0=o.initial, safeguard_warmup=True
        ),
    ),
    "dadapt_adamw": (
        {"weight_decay": 0.0},
        lambda o, rate: contrib.dadapt_adamw(rate, (o.b1, o.b2), o.eps, o.initial),
    ),
    "dog": (
        {"initial": 1e-3},
        lambda o, rate: contrib.dog(rate, ("heuristic", o.initial), o.eps, o.weight_decay, MASK),
    ),
    "dowg": ({}, lambda o, rate: contrib.dowg(rate, None, o.eps, o.weight_decay, MASK)),
    "adabelief": (
        {"learning_rate": 1e-2},
        lambda o, rate: decoupled(optax.adabelief(-1.0, o.b1, o.b2, o.eps, o.eps_root), o, rate),
    ),
    "adadelta": (
        {"learning_rate": 10.0},
        lambda o, rate: optax.adadelta(rate, o.rho, o.eps, o.weight_decay, MASK),
    ),
    "adagrad": (
        {"learning_rate": 1e-1},
        lambda o, rate: l2(optax.adagrad(rate, o.initial, o.eps), o),
    ),
    "adamax": (
        {"learning_rate": 1e-2},
        lambda o, rate: optax.adamaxw(rate, o.b1, o.b2, o.eps, o.weight_decay, MASK),
    ),
    "adamaxw": (
        {"learning_rate": 1e-2},
        lambda o, rate: optax.adamaxw(rate, o.b1, o.b2, o.eps, o.weight_decay, MASK),
    ),
    "adan": (
        {"learning_rate": 1e-2},
        lambda o, rate: optax.adan(rate, o.b1, o.b2, o.b3, o.eps, o.eps_root, o.weight_decay, MASK),
    ),
    "ademamix": (
        {"learning_rate": 3e-3},
        lambda o, rate: contrib.ademamix(
            rate, o.b1, o.b2, o.b3, o.alpha, o.eps, weight_decay=o.weight_decay, mask=MASK
        ),
    ),
    "simplified_ademamix": (
        {"learning_rate": 3e-4, "alpha": 1.0},
        lambda o, rate: contrib.simplified_ademamix(
            rate, o.b1, o.b2, o.alpha, o.eps, weight_decay=o.weight_decay, mask=MASK
        ),
    ),
    "adopt": (
        {"learning_rate": 1e-2},
        lambda o, rate: decoupled(contrib.adopt(-1.0, o.b1, o.b2, o.eps), o, rate),
    ),
    "amsgrad": (
        {"learning_rate": 1e-2},
        lambda o, rate: l2(optax.amsgrad(rate, o.b1, o.b2, o.eps), o),
    ),
    "acprop": (
        {"learning_rate": 1e-2},
        lambda o, rate: contrib.acprop(rate, o.b1, o.b2, o.eps, o.eps_root, o.weight_decay, MASK),
    ),
    "cocob": ({}, lambda o, rate: contrib.cocob(rate, o.alpha, o.eps, o.weight_decay, MASK)),
    "fromage": ({"learning_rate": 3e-2}, lambda o, rate: optax.fromage(rate, o.min_norm)),
    "galore": (
        {"learning_rate": 1e-2, "rank": 4, "refresh_every": 10},
        lambda o, rate: contrib.galore(
            rate,
            4,
            10,
            1.0,
            optax.scale_by_adam(o.b1, o.b2, o.eps),
            weight_decay=o.weight_decay,
            mask=MASK,
        ),
    ),
    "madgrad": ({}, lambda o, rate: l2(contrib.madgrad(rate, o.momentum, 0.0, o.eps), o)),
    "noisy_sgd": ({}, lambda o, rate: l2(optax.noisy_sgd(rate, o.noise, o.fading, key=0), o)),
    "novograd": (
        {"learning_rate": 1e-2, "decay": ((".*", 1.0),)},
        lambda o, rate: optax.novograd(rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay),
    ),
    "optimistic_sgd": (
        {},
        lambda o, rate: optax.optimistic_gradient_descent(rate, o.alpha, o.optimism),
    ),
    "optimistic_adam": (
        {"learning_rate": 1e-2},
        lambda o, rate: decoupled(
            optax.optimistic_adam_v2(
                -1.0, alpha=o.alpha, beta=o.optimism, b1=o.b1, b2=o.b2, eps=o.eps
            ),
            o,
            rate,
        ),
    ),
    "radam": (
        {"learning_rate": 3e-2},
        lambda o, rate: decoupled(
            optax.radam(-1.0, o.b1, o.b2, o.eps, threshold=o.threshold), o, rate
        ),
    ),
    "rmsprop": (
        {"learning_rate": 3e-3, "momentum": 0.5, "centered": True},
        lambda o, rate: l2(
            optax.rmsprop(rate, o.rho, o.eps, centered=True, momentum=o.momentum), o
        ),
    ),
    "rprop": (
        {},
        lambda o, rate: optax.chain(
            optax.rprop(o.learning_rate, o.shrink, o.grow, o.min_step, o.max_step),
            optax.scale(rate / o.learning_rate),
        ),
    ),
    "sign_sgd": ({"learning_rate": 1e-2}, lambda o, rate: decoupled(optax.sign_sgd(-1.0), o, rate)),
    "signum": (
        {"learning_rate": 1e-2},
        lambda o, rate: decoupled(optax.signum(-1.0, o.momentum), o, rate),
    ),
    "sm3": ({}, lambda o, rate: optax.sm3(rate, o.momentum)),
    "yogi": ({}, lambda o, rate: optax.yogi(rate, o.b1, o.b2, o.eps)),
}


def configured(name: str) -> Any:
    decay = {"weight_decay": 0.01} if hasattr(NAMES[name], "weight_decay") else {}
    return dataclasses.replace(NAMES[name], **(decay | ROWS[name][0]))


def train_step(optimizer: Any, alias: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A donated step over (params, state), with every traced number an input; `alias` builds
    Optax's own in place of ours."""

    def step(
        params: Any, state: Any, values: dict[str, jax.Array], share: jax.Array
    ) -> tuple[Any, Any]:
        bound = hyper.bind(optimizer, values)
        rate = bound.learning_rate * share
        chain = alias(bound, rate) if alias else bound.transform(params, rate)
        updates, state = chain.update(jax.grad(loss_of)(params), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def begin(optimizer: Any, dtype: Any = jnp.float32) -> tuple[Any, Any, dict[str, jax.Array]]:
    params = make_params(dtype)
    values = {name: jnp.float32(value) for name, value in hyper.collect(optimizer).items()}
    return params, optimizer.transform(params, optimizer.learning_rate).init(params), values


def types_of(values: Any) -> Any:
    return jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)), values
    )


def test_every_name_has_a_row() -> None:
    assert set(ROWS) == set(NAMES)


@pytest.mark.parametrize("name", ROWS)
def test_learns_as_optax_and_keeps_its_types(name: str) -> None:
    optimizer = configured(name)
    fields.check(optimizer)
    params, state, values = begin(optimizer)
    types, first_loss = types_of((params, state)), float(loss_of(params))
    alias = ROWS[name][1]
    theirs = make_params()
    # Copied, since some of Optax's states hold the parameters themselves, which are donated.
    their_state = jax.tree.map(jnp.copy, alias(optimizer, optimizer.learning_rate).init(theirs))
    step, their_step = train_step(optimizer), train_step(optimizer, alias)
    for index in range(STEPS):
        share = jnp.float32(1 - 0.5 * index / STEPS)
        params, state = step(params, state, values, share)
        if index < 5:
            theirs, their_state = their_step(theirs, their_state, values, share)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), params, theirs
            )
    assert types_of((params, state)) == types
    assert step._cache_size() == 1
    assert float(loss_of(evaluation_params(optimizer, state, params))) < 0.5 * first_loss


@pytest.mark.parametrize(
    "name",
    [
        "adamw",
        "muon",
        "adafactor",
        "novograd",
        "schedule_free_adamw",
        "prodigy",
        "lars",
        "noisy_sgd",
    ],
)
def test_bfloat16_parameters_keep_their_types(name: str) -> None:
    optimizer = dataclasses.replace(
        configured(name), frozen=("head/bias",), rates=(("head", 0.5), (".*", 1.0))
    )
    params, state, values = begin(optimizer, jnp.bfloat16)
    types = types_of((params, state))
    step = train_step(optimizer)
    for _ in range(2):
        params, state = step(params, state, values, jnp.float32(1))
    assert types_of((params, state)) == types
    assert params["body"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "optimizer",
    [SGD(momentum=0.9, weight_decay=0.1), AdamW(), Lion(weight_decay=0.1)],
    ids=lambda o: type(o).__name__,
)
def test_works_under_vmap_over_its_numbers(optimizer: Any) -> None:
    values = hyper.collect(optimizer)
    stacked = {name: jnp.float32([value, 0.5 * value]) for name, value in values.items()}
    step = train_step(optimizer).__wrapped__
    params, state, _ = begin(optimizer)
    many, _ = jax.vmap(step, in_axes=(None, None, 0, None))(params, state, stacked, jnp.float32(1))
    for index in range(2):
        one, _ = step(
            params, state, {name: value[index] for name, value in stacked.items()}, jnp.float32(1)
        )
        jax.tree.map(
            lambda a, b, i=index: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6),
            many,
            one,
        )


def test_frozen_parameters_stay_and_take_no_memory() -> None:
    for optimizer in (
        AdamW(frozen=("^body/",)),
        Muon(frozen=("^body/",)),
        ScheduleFreeAdamW(frozen=("^body/",)),
    ):
        params, state, values = begin(optimizer)
        head = {"head": params["head"]}
        free = type(optimizer)().transform(head, 0.1).init(head)
        assert tree.num_bytes(state) == tree.num_bytes(free)
        before = jax.tree.map(np.array, params)
        new_params, state = train_step(optimizer)(params, state, values, jnp.float32(1))
        jax.tree.map(np.testing.assert_array_equal, new_params["body"], before["body"])
        assert np.any(new_params["head"]["kernel"] != before["head"]["kernel"])
        np.testing.assert_array_equal(
            evaluation_params(optimizer, state, new_params)["body"]["kernel"],
            before["body"]["kernel"],
        )


def changes(optimizer: Any, gradient: float = 1.0) -> dict[str, float]:
    """The update of each parameter at the rate 0.1, where all parameters are 2."""
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, 2.0), make_params())
    chain = optimizer.transform(params, 0.1)
    updates, _ = chain.update(
        jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), params), chain.init(params), params
    )
    return {path: float(leaf.mean()) for path, leaf in tree.flatten(updates).items()}


def test_rates_multiply_the_update_of_each_parameter() -> None:
    found = changes(SGD(rates=(("head/kernel", 10.0), ("head", 0.0), (".*", 1.0))))
    assert found == pytest.approx(
        {"body/bias": -0.1, "body/kernel": -0.1, "head/bias": 0.0, "head/kernel": -1.0}
    )


def test_decay_is_coupled_for_adam_and_decoupled_for_adamw() -> None:
    rules = (("head/kernel", 3.0), ("bias", 0.0), (".*", 1.0))
    found = changes(AdamW(weight_decay=0.5, decay=rules), gradient=0.0)
    assert found == pytest.approx(
        {"body/bias": 0.0, "body/kernel": -0.1, "head/bias": 0.0, "head/kernel": -0.3}
    )
    # Adam divides the penalty by its own size, so its strength drops out.
    assert changes(Adam(weight_decay=0.5), gradient=0.0)["body/kernel"] == pytest.approx(
        -0.1, rel=1e-4
    )
    assert changes(SGD(weight_decay=0.5))["body/kernel"] == pytest.approx(-0.1 * (1 + 0.5 * 2))


def test_prodigy_decays_as_optax_where_all_decays() -> None:
    for name, alias in (("prodigy", contrib.prodigy), ("dadapt_adamw", contrib.dadapt_adamw)):
        optimizer = dataclasses.replace(
            NAMES[name], weight_decay=0.3, initial=0.1, decay=((".*", 1.0),)
        )
        options = {"safeguard_warmup": True} if name == "prodigy" else {}
        params = theirs = make_params()
        ours, reference = (
            optimizer.transform(params, 0.5),
            alias(0.5, estim_lr0=0.1, weight_decay=0.3, **options),
        )
        state, their_state = ours.init(params), reference.init(params)
        for _ in range(2):
            updates, state = ours.update(jax.grad(loss_of)(params), state, params)
            their_updates, their_state = reference.update(
                jax.grad(loss_of)(theirs), their_state, theirs
            )
            params, theirs = (
                optax.apply_updates(params, updates),
                optax.apply_updates(theirs, their_updates),
            )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, theirs
        )


def test_state_paths_do_not_depend_on_whether_decay_is_on() -> None:
    params = make_params()
    for cls in (SGD, AdamW, Muon, optimizers.Lars):
        states = [
            cls(weight_decay=strength).transform(params, 0.1).init(params)
            for strength in (0.0, 0.1)
        ]
        assert list(tree.flatten(states[0])) == list(tree.flatten(states[1]))


def test_muon_orthogonalises_convolutions_and_leaves_named_matrices_to_adam() -> None:
    params = {"conv": jnp.ones((3, 3, 4, 8)), "embed": jnp.ones((6, 5)), "bias": jnp.ones(8)}
    momentum = tree.flatten(Muon(adam=("embed",)).transform(params, 0.1).init(params))
    assert {path.split("/")[-1] for path in momentum if "/muon/" in path and "/mu/" in path} == {
        "conv"
    }
    assert {path.split("/")[-1] for path in momentum if "/adam/" in path and "/nu/" in path} == {
        "embed",
        "bias",
    }


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (AdamW(frozen=("tail",)), "--optimizer.frozen: pattern 'tail' decides no parameter"),
        (AdamW(frozen=(".*",)), "--optimizer.frozen=.*: freezes every parameter"),
        (
            AdamW(rates=(("head", 2.0),)),
            "--optimizer.rates: no pattern matches body/bias; add a last rule",
        ),
        (AdamW(rates=(("head", -2.0), (".*", 1.0))), "--optimizer.rates: head=-2.0: must be >= 0"),
        (
            AdamW(decay=((".*", 1.0), ("bias", 0.0))),
            "--optimizer.decay: pattern 'bias' decides no parameter",
        ),
        (SGD(decay=((".*", float("nan")),)), "--optimizer.decay: .*=nan: must be >= 0"),
        (Muon(adam=("embed",)), "--optimizer.adam: pattern 'embed' decides no parameter"),
        (
            dataclasses.replace(NAMES["cocob"], rates=((".*", 2.0),)),
            "--optimizer.rates=.*=2: cocob has no rate for each parameter",
        ),
    ],
)
def test_bad_rules_are_errors(optimizer: Any, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        optimizer.transform(make_params(), 0.1).init(make_params())
    assert text in str(caught.value)


def test_match_table_shows_what_the_rules_decide() -> None:
    optimizer = AdamW(
        frozen=("body/bias",),
        rates=(("head", 10.0), (".*", 1.0)),
        decay=(("head", 0.5), (".*", 1.0)),
    )
    assert match_table(optimizer, jax.eval_shape(make_params)) == [
        ("body/bias", "(5,)", "frozen", "-"),
        ("body/kernel", "(6, 5)", "1", "1"),
        ("head/bias", "(4,)", "10", "0.5"),
        ("head/kernel", "(5, 4)", "10", "0.5"),
    ]
