"""Synthetic tokens and the task of the next one: entropies against counting and enumeration,
determinism, losses against NumPy in float64.

Dims: N examples, B batch, T tokens to predict, V vocabulary, S states.
"""

import dataclasses
import itertools
import math
import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import tasks
from jaxtrain.config import flags
from jaxtrain.data.sources import markov
from jaxtrain.data.sources.markov import SyntheticTokens
from jaxtrain.report.page import history
from jaxtrain.runner.main import launch
from jaxtrain.tasks import NextToken

SMALL = SyntheticTokens(
    vocabulary=3, order=2, concentration=0.3, length=3, examples=20, test_examples=10
)
ROOT = Path(__file__).resolve().parent.parent


def drawn(source: SyntheticTokens, split: str = "train") -> np.ndarray:
    """The tokens (N, length + 1) of one split."""
    return getattr(source.open(), split).arrays["tokens"]


# --- the chain
# --------------------------------------------------------------------------------------------------


def test_every_row_of_the_chain_is_a_distribution_without_zeros() -> None:
    for concentration in (1e-4, 0.1, 100.0):
        chain_SV = dataclasses.replace(SMALL, concentration=concentration).chain()
        assert chain_SV.shape == (9, 3) and chain_SV.min() >= 0.99 * markov.EVEN / 3
        np.testing.assert_allclose(chain_SV.sum(axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("concentration", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_stationary_distribution_solves_its_equations(order: int, concentration: float) -> None:
    """Against a dense linear system over all states."""
    chain_SV = dataclasses.replace(SMALL, order=order, concentration=concentration).chain()
    states = len(chain_SV)
    moves_SS = np.zeros((states, states))
    for state, token in itertools.product(range(states), range(3)):
        moves_SS[state, (state * 3 + token) % states] += chain_SV[state, token]
    equations = np.vstack([moves_SS.T - np.eye(states), np.ones(states)])
    expected_S = np.linalg.lstsq(equations, np.append(np.zeros(states), 1.0), rcond=None)[0]
    np.testing.assert_allclose(markov.stationary(chain_SV), expected_S, atol=1e-10)


def test_the_best_loss_is_that_of_all_sequences_enumerated() -> None:
    for length in (1, 2, 3):
        source = dataclasses.replace(SMALL, length=length)
        chain_SV, joint, first = source.chain(), {}, np.zeros(3)
        share_S = markov.stationary(chain_SV)
        for sequence in itertools.product(range(3), repeat=max(2, length + 1)):
            chance = share_S[3 * sequence[0] + sequence[1]]
            for before, last, token in zip(sequence, sequence[1:], sequence[2:], strict=False):
                chance *= chain_SV[3 * before + last, token]
            joint[sequence[: length + 1]] = joint.get(sequence[: length + 1], 0) + chance
            first[sequence[0]] += chance
        entropy, of_first = (
            -sum(chance * math.log(chance) for chance in chances)
            for chances in (joint.values(), first)
        )
        assert source.best_loss() == pytest.approx((entropy - of_first) / length, rel=1e-9)


def test_the_entropy_rate_is_that_of_a_long_sequence() -> None:
    """Counted from the tokens alone; the estimate is too small by about (cells - states) / 2N,
    which is 2e-5 here."""
    source = dataclasses.replace(SMALL, vocabulary=4, length=10_000, examples=100)
    tokens_NT = drawn(source)
    counts_SV = np.bincount(
        (tokens_NT[:, :-2] * 16 + tokens_NT[:, 1:-1] * 4 + tokens_NT[:, 2:]).ravel(), minlength=64
    ).reshape(16, 4)
    share_SV = counts_SV / counts_SV.sum()
    rows_SV = counts_SV / counts_SV.sum(axis=1, keepdims=True)
    assert -(share_SV * np.log(rows_SV)).sum() == pytest.approx(source.entropy_rate(), abs=3e-3)
    np.testing.assert_allclose(rows_SV, source.chain(), atol=0.03)
    assert source.entropy_rate() < source.best_loss() < source.entropy_rate() + 1e-3


def test_the_first_tokens_are_those_of_a_chain_that_has_run_for_ever() -> None:
    source = dataclasses.replace(SMALL, examples=200_000)
    pairs = drawn(source)[:, :2] @ np.array([3, 1])
    np.testing.assert_allclose(
        np.bincount(pairs, minlength=9) / 200_000, markov.stationary(source.chain()), atol=5e-3
    )


def test_concentration_leads_from_certainty_to_chance() -> None:
    rates = [
        dataclasses.replace(SMALL, concentration=concentration).entropy_rate()
        for concentration in (0.01, 0.1, 1.0, 1e4)
    ]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(math.log(3), rel=1e-3)


# --- the source
# --------------------------------------------------------------------------------------------------


def test_a_source_is_the_same_each_time_and_another_for_another_seed() -> None:
    one, again, other = SMALL.open(), SMALL.open(), dataclasses.replace(SMALL, seed=1).open()
    assert one.fingerprint == again.fingerprint != other.fingerprint
    np.testing.assert_array_equal(one.train.arrays["tokens"], again.train.arrays["tokens"])
    field = one.train.fields["tokens"]
    assert (
        field.shape == (4,)
        and field.dtype == np.int32
        and one.train.num_classes == 3
        and len(one.test) == 10
    )


def test_more_examples_keep_those_that_were_there() -> None:
    more = dataclasses.replace(SMALL, examples=50)
    np.testing.assert_array_equal(drawn(more)[:20], drawn(SMALL))
    np.testing.assert_array_equal(drawn(more, "test"), drawn(SMALL, "test"))
    assert not np.array_equal(drawn(SMALL)[:10], drawn(SMALL, "test"))


@pytest.mark.parametrize("length", [1, 2, 5])
def test_sequences_may_be_shorter_than_the_order(length: int) -> None:
    source = dataclasses.replace(SMALL, order=4, length=length)
    assert drawn(source).shape == (20, length + 1) and 0 < source.best_loss() < math.log(3)


def test_splits_are_cut_as_elsewhere() -> None:
    splits = dataclasses.replace(
        SMALL, train="train[:90%]", validation="train[90%:]", test=""
    ).open()
    assert (len(splits.train), len(splits.validation), splits.test) == (18, 2, None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            SyntheticTokens(vocabulary=100, order=4),
            r"--data.order=4: a table of 100\^5 numbers, more than 4194304; use <= 2",
        ),
        (
            SyntheticTokens(vocabulary=5000, order=1),
            r"--data.order=1: a table of 5000\^2 numbers.*; use --data.vocabulary <= 2048",
        ),
    ],
)
def test_a_chain_too_large_to_hold_is_named(source: SyntheticTokens, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source.open()


# --- the task
# --------------------------------------------------------------------------------------------------

GENERATOR = np.random.default_rng(0)
BATCH = {"tokens": GENERATOR.integers(0, 7, (4, 6)).astype(np.int32)}
LOGITS_BTV = GENERATOR.normal(scale=4, size=(4, 5, 7)).astype(np.float32)


def numpy_loss() -> tuple[np.ndarray, np.ndarray]:
    """The loss and whether it is right, of each token (B, T), in float64."""
    wide_BTV, targets_BT = LOGITS_BTV.astype(np.float64), BATCH["tokens"][:, 1:]
    log_BTV = wide_BTV - np.log(np.exp(wide_BTV).sum(-1, keepdims=True))
    return (
        -np.take_along_axis(log_BTV, targets_BT[..., None], -1)[..., 0],
        wide_BTV.argmax(-1) == targets_BT,
    )


def test_the_task_shows_all_but_the_last_token_and_asks_for_all_but_the_first() -> None:
    np.testing.assert_array_equal(NextToken().inputs(BATCH), BATCH["tokens"][:, :-1])
    sums, (loss_BT, right_BT) = NextToken().loss(jnp.asarray(LOGITS_BTV), BATCH), numpy_loss()
    np.testing.assert_allclose(sums["loss"], (loss_BT.sum(), 20), rtol=1e-6)
    np.testing.assert_allclose(sums["accuracy"], (right_BT.sum(), 20))


def test_a_weight_counts_for_all_tokens_of_its_sequence() -> None:
    weights_B = np.array([1, 0.5, 0, 1], np.float32)
    logits_BTV = LOGITS_BTV.copy()
    logits_BTV[2] = np.nan  # padding may hold anything
    sums, (loss_BT, right_BT) = (
        NextToken().loss(jnp.asarray(logits_BTV), BATCH | {"weight": weights_B}),
        numpy_loss(),
    )
    np.testing.assert_allclose(
        sums["loss"], ((loss_BT * weights_B[:, None]).sum(), 12.5), rtol=1e-6
    )
    np.testing.assert_allclose(sums["accuracy"], ((right_BT * weights_B[:, None]).sum(), 12.5))


def test_halves_are_reduced_in_float32() -> None:
    sums = NextToken().loss(jnp.zeros((4, 5, 7), jnp.bfloat16), BATCH)
    assert (
        float(sums["loss"][0]) == pytest.approx(20 * math.log(7), rel=1e-6)
        and sums["loss"][0].dtype == jnp.float32
    )


def test_what_the_task_cannot_use_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"^batch has keys image; the task wants 'tokens'; set --task.input$"
    ):
        NextToken().inputs({"image": jnp.ones(1)})
    with pytest.raises(
        ValueError,
        match=(
            r"^'tokens' has shape \(4, 1\); the task wants \(batch, length\) with a length of 2 or"
            r" more; give it such tokens, or set --task.input$"
        ),
    ):
        NextToken().inputs({"tokens": jnp.ones((4, 1), jnp.int32)})
    with pytest.raises(
        ValueError,
        match=(
            r"^outputs have shape \(4, 7\); the task wants \(4, 5\) and the vocabulary; the model"
            r" must answer at every place$"
        ),
    ):
        NextToken().loss(jnp.ones((4, 7)), BATCH)
    assert isinstance(tasks.NAMES["next_token"], NextToken)


@pytest.mark.slow
def test_the_experiment_comes_near_the_entropy(tmp_path: Path) -> None:
    experiment = runpy.run_path(str(ROOT / "experiments" / "markov.py"))["experiment"]()
    argv = [f"--workdir={tmp_path}", "--noreport", "--notensorboard", "--mesh=data:1"]
    assert launch(flags.parse(experiment, argv), argv) == 0
    excess = history.load(tmp_path).last("loss", "test") - experiment.data.best_loss()
    assert -0.01 < excess < 0.05
