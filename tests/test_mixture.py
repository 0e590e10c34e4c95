"""Mixtures: shares kept to within an example or two, every source through its own epochs, the
same bits on the host and on a device, whatever a run is stopped, resumed and told on the way."""

import dataclasses
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import values
from jaxtrain.data import mixture
from jaxtrain.data.mixture import Mixed, MixedPosition, MixedTable, parse_weights
from jaxtrain.data.order import Shuffled
from jaxtrain.data.sources.text import Mixture, Rows
from jaxtrain.data.table import ArrayTable, SliceTable
from jaxtrain.errors import UserError
from jaxtrain.fields import fields_of
from jaxtrain.horizon import Horizon

THREE = Mixed(("a", "b", "c"), (7, 11, 5), ((0, (0.5, 0.3, 0.2)),))


def drawn(mixed: Mixed, count: int, seed: int = 0, batch: int = 8) -> np.ndarray:
    """The ids of the first examples, batch by batch."""
    position, ids = mixed.start(seed), []
    while len(ids) < count:
        ids += mixed.ids(position, batch).tolist()
        position = mixed.advance(position, batch)
    return np.array(ids[:count])


def sources_of(mixed: Mixed, ids: np.ndarray) -> np.ndarray:
    """The source of each id."""
    return np.searchsorted(np.cumsum(mixed.lengths), ids, side="right")


@pytest.mark.parametrize(
    "weights",
    [
        (0.5, 0.5),
        (1 / 3, 2 / 3),
        (0.999, 0.001),
        (0.5, 0.3, 0.2),
        (0.7, 0.0, 0.3),
        (0.98, 0.015, 0.005),
        tuple(np.random.default_rng(0).dirichlet(np.ones(4))),
        tuple(np.random.default_rng(1).dirichlet(np.ones(8))),
    ],
)
def test_any_number_of_examples_holds_its_shares(weights: tuple[float, ...]) -> None:
    """To within half an example for each time that the list of sources was halved."""
    count = len(weights)
    mixed = Mixed(tuple("abcdefgh"[:count]), (5,) * count, ((0, weights),))
    bound = (count - 1).bit_length() / 2 + 1e-3
    source_N = mixed.sources(mixed.start(0), 200_000)
    for place, weight in enumerate(weights):
        error_N = np.cumsum(source_N == place) - weight * np.arange(1, len(source_N) + 1)
        assert np.abs(error_N).max() <= bound
        if weight == 0:
            assert not (source_N == place).any()


def test_every_source_goes_through_its_own_epochs() -> None:
    ids = drawn(THREE, 2000)
    first = 0
    for place, length in enumerate(THREE.lengths):
        own = ids[sources_of(THREE, ids) == place] - first
        epochs = [own[start : start + length] for start in range(0, len(own) - length, length)]
        assert len(epochs) > 50
        for epoch in epochs:
            assert sorted(epoch.tolist()) == list(range(length))
        assert len({tuple(epoch.tolist()) for epoch in epochs}) > 10, "each in an order of its own"
        first += length


def test_another_source_moves_no_order() -> None:
    """The k-th example of a source is the same, whatever is mixed with it in what shares."""
    other = Mixed(("b", "d"), (11, 3), ((0, (0.1, 0.9)),))
    one = drawn(THREE, 900)
    one = one[sources_of(THREE, one) == 1] - 7
    two = drawn(other, 900)
    two = two[sources_of(other, two) == 0]
    assert len(two) > 80
    np.testing.assert_array_equal(one[: len(two)], two)
    assert not np.array_equal(drawn(THREE, 50), drawn(THREE, 50, seed=1))


def test_the_size_of_batches_and_where_they_are_cut_change_nothing() -> None:
    whole = drawn(THREE, 200, batch=200)
    for batch in (1, 3, 7, 64):
        np.testing.assert_array_equal(drawn(THREE, 200, batch=batch), whole)


def test_a_device_computes_the_same_bits() -> None:
    mixed = dataclasses.replace(
        THREE, pieces=((0, (0.5, 0.3, 0.2)), (40, (0.0, 1.0, 0.0)), (90, (0.1, 0.1, 0.8)))
    )
    step = jax.jit(lambda position: (mixed.ids(position, 16, jnp), mixed.advance(position, 16)))
    there = jax.jit(mixed.start)(jnp.uint32(7))
    here = mixed.start(7)
    for _ in range(20):
        ids, there = step(there)
        np.testing.assert_array_equal(ids, mixed.ids(here, 16))
        assert ids.dtype == mixed.ids(here, 16).dtype == np.int32
        here = mixed.advance(here, 16)
        for one, other in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype == np.uint32
    fetched: Any = jax.device_get(there)  # as the loader has it
    np.testing.assert_array_equal(mixed.ids(fetched, 16), mixed.ids(here, 16))


def test_weights_change_at_their_example_and_no_source_loses_its_place() -> None:
    mixed = dataclasses.replace(THREE, pieces=((0, (0.5, 0.3, 0.2)), (100, (0.0, 0.2, 0.8))))
    ids = drawn(mixed, 600, batch=7)
    np.testing.assert_array_equal(ids[:100], drawn(THREE, 100))
    shares = Counter(sources_of(mixed, ids[100:]).tolist())
    assert 0 not in shares and abs(shares[2] - 400) < 3
    own = ids[sources_of(mixed, ids) == 2] - 18
    alone = drawn(THREE, 2500)
    alone = alone[sources_of(THREE, alone) == 2] - 18
    np.testing.assert_array_equal(own, alone[: len(own)])


def test_more_examples_than_32_bits_count() -> None:
    """The count goes on in a second number, and so does the sequence."""
    near = MixedPosition(
        np.uint32(0),
        np.uint32(2**32 - 5),
        np.uint32(0),
        np.ones(2, np.uint32),
        *[np.ones(3, np.uint32)] * 2,
    )
    later = dataclasses.replace(THREE, pieces=((0, (0.5, 0.3, 0.2)), (2**32 + 3, (0.0, 0.0, 1.0))))
    source_N = later.sources(near, 16)
    assert (source_N[8:] == 2).all() and not (source_N[:8] == 2).all()
    np.testing.assert_array_equal(source_N, later.sources(near, 16, jnp))
    after = later.advance(near, 16)
    assert (int(after.drawn), int(after.wraps)) == (11, 1)
    assert (later.sources(after, 9) == 2).all()


# --- the table


def tables(**more: np.ndarray) -> dict[str, ArrayTable]:
    """Two sources whose rows say which they are."""
    return {
        "a": ArrayTable({"tokens": np.arange(12).reshape(6, 2)}, num_classes=30),
        "b": ArrayTable({"tokens": np.arange(20, 28).reshape(4, 2)}, num_classes=30),
    }


def test_rows_say_their_source() -> None:
    whole = MixedTable(tables())
    slow = MixedTable({n: SliceTable(t, range(len(t))) for n, t in tables().items()})
    assert whole.arrays is not None and slow.arrays is None
    assert whole.source_names == ("a", "b") and len(whole) == 10
    for table in (whole, slow):
        rows = table.read(np.array([9, 0, 6]))
        assert rows["source"].tolist() == [1, 0, 1] and rows["source"].dtype == np.int32
        assert rows["tokens"].tolist() == [[26, 27], [0, 1], [20, 21]]
        assert {name: (a.shape[1:], a.dtype) for name, a in rows.items()} == {
            name: (field.shape, field.dtype) for name, field in table.fields.items()
        }
    assert whole.arrays["source"].tolist() == [0] * 6 + [1] * 4
    assert whole.where(7) == "b: row 1"


def test_weights_are_by_size_unless_given_and_begin_at_steps() -> None:
    def order(text: str, **given: Any) -> Mixed:
        weights = parse_weights(text, ["a", "b"]) if text else ()
        found = mixture.order_of(
            MixedTable(tables(), weights), batch_size=4, total_steps=200, **given
        )
        assert isinstance(found, Mixed)
        return found

    assert order("").pieces == ((0, (0.6, 0.4)),)
    assert order("a=1,b=0/50%:b=1,a=0").pieces == ((0, (1.0, 0.0)), (400, (0.0, 1.0)))
    assert order("a=1,b=0/2:b=1,a=0/2epochs:a=0.5,b=0.5").pieces[1:] == (
        (8, (0.0, 1.0)),
        (20, (0.5, 0.5)),
    )
    later = order("a=1,b=0/1Ktokens:b=1,a=0", tokens_per_step=8)
    assert later.pieces[1][0] == 125 * 4
    assert mixture.order_of(tables()["a"], batch_size=4, total_steps=9) == Shuffled(6)
    with pytest.raises(
        UserError,
        match=r"--data.weights: those from 5% on begin at step 10, not after those before them"
        r" \(step 10\); put them in order",
    ):
        order("a=1,b=0/10:b=1,a=0/5%:a=0.5,b=0.5")


SYNTAX = "NAME=SHARE,NAME=SHARE, and for later other shares WHEN:NAME=SHARE,... behind a slash"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=0.5,b=0.6", "sum to 1.1; they are shares of 1, so write a=0.454545,b=0.545455"),
        ("a=7,b=3", "sum to 10; they are shares of 1, so write a=0.7,b=0.3"),
        ("a=-0.5,b=1.5", "the weight of a is -0.5; must be >= 0"),
        ("a=0,b=0", "all weights are 0; they are shares of 1"),
        ("a=0,b=1", "a has the weight 0 throughout; leave the source out"),
        ("a=0,b=1/5%:a=0,b=1", "a has the weight 0 throughout; leave the source out"),
        ("a=1", "no weight for b; give one, or 0"),
        ("a=0.5,books=0.5", "unknown source 'books'; valid: a, b"),
        ("a=0.5,a=0.5", "a has two weights; give one"),
        ("a=0.5,b=half", "'half' is no number; expected e.g. b=0.5"),
        ("a=0.5,b=nan", "'nan' is no number; expected e.g. b=0.5"),
        ("0.5,0.5", f"'0.5' is no share; expected {SYNTAX}"),
        ("a=0.5,b=0.5,", f"'' is no share; expected {SYNTAX}"),
        ("5:a=1,b=0", f"'5:a=1,b=0' holds from the first step on; expected {SYNTAX}"),
        ("a=1,b=0/a=0,b=1", f"'a=0,b=1' begins later, so say when; expected {SYNTAX}"),
        (
            "a=1,b=0/soon:a=0,b=1",
            "'soon': not a horizon; expected e.g. 200, 200steps, 2epochs or 5%",
        ),
    ],
)
def test_weights_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_weights(text, ["a", "b"])
    assert str(caught.value) == f"--data.weights={text!r}: {message}"


def test_names_of_sources() -> None:
    with pytest.raises(UserError, match="--data.sources: 'a b' is no name of a source; use"):
        mixture.check_names(["a b", "c"], "--data.sources")
    with pytest.raises(UserError, match="--data.sources: a is there twice; give each source a"):
        mixture.check_names(["a", "a"], "--data.sources")


def test_horizons_of_weights() -> None:
    assert parse_weights("a=0.25,b=0.75/2e2:a=1,b=0", ["b", "a"]) == (
        (Horizon(0), (0.75, 0.25)),
        (Horizon(200), (0.0, 1.0)),
    )


def test_an_experiment_that_offers_a_mixture_gives_it_its_own_rows() -> None:
    found = []
    for path in sorted((Path(__file__).parents[1] / "experiments").glob("*.py")):
        if "Mixture" not in path.read_text(encoding="utf-8"):
            continue
        run = runpy.run_path(str(path))["experiment"]()
        mixed = run.offers["data"]["mixture"]
        assert all(
            getattr(mixed, each.name) == getattr(run.data, each.name)
            for each in dataclasses.fields(Rows)
        ), path.name
        found.append(path.stem)
    assert found == ["bert_mlm", "gpt2_124m", "llama3_8b", "shakespeare_char"]


def test_sources_without_names_are_told_how_they_are_given() -> None:
    field = next(each for each in fields_of(Mixture()) if each.name == "sources")
    with pytest.raises(UserError) as refusal:
        values.read("texts/a b.jsonl,b=b.jsonl", field.type, field.marks)
    line = str(refusal.value)
    assert line.endswith("has no name; expected NAME=FILES, e.g. a_b=texts/a b.jsonl")
    remedy = line.partition("e.g. ")[2]
    read = values.read(f"{remedy},b=b.jsonl", field.type, field.marks)
    assert read == (("a_b", "texts/a b.jsonl"), ("b", "b.jsonl"))
