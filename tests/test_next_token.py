"""The task of the next token on packed, mixed and unevenly cut data, against loops in float64: what
is asked for, losses by source, perplexity and bits per byte of a whole set.

Dims: B batch, T tokens to predict, V vocabulary, D width, N examples of a set.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain
from jaxtrain import config, tasks
from jaxtrain.data.splits import Splits
from jaxtrain.data.table import ArrayTable
from jaxtrain.errors import UserError
from jaxtrain.inference import answers
from jaxtrain.late_logits import LateLogits
from jaxtrain.models.transformer import Transformer
from jaxtrain.optimizers import SGD
from jaxtrain.report.metrics_file import read_metrics
from jaxtrain.runner.main import launch
from jaxtrain.tasks import NextToken

RANDOM = np.random.default_rng(0)
B, T, D, V = 4, 6, 3, 9
TOKENS = RANDOM.integers(0, V, (B, T + 1)).astype(np.int32)
SEGMENTS = np.array(
    [[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 3, 3, 0, 0], [1] * 7, [2, 1, 1, 1, 1, 0, 0]], np.int32
)
STATES = RANDOM.normal(size=(B, T, D)).astype(np.float32)
KERNEL = RANDOM.normal(scale=2, size=(D, V)).astype(np.float32)
LATE = LateLogits(jnp.asarray(STATES), jnp.asarray(KERNEL), cap=None, vocabulary=V, chunk=2)


def nats(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The loss of each token to predict, in float64."""
    wide = logits.astype(np.float64)
    log_z = np.log(np.exp(wide).sum(-1))
    return log_z - np.take_along_axis(wide, tokens[:, 1:, None], -1)[..., 0]


NATS = nats(STATES @ KERNEL, TOKENS)


def of(batch: dict[str, Any], task: NextToken | None = None, **options: Any) -> dict[str, Any]:
    """The sums of late logits, which must be those of whole ones."""
    task, arrays = task or NextToken(), jax.tree.map(jnp.asarray, {"tokens": TOKENS} | batch)
    late, whole = (task.loss(each, arrays, **options) for each in (LATE, LATE.logits()))
    assert list(late) == list(whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), dict(late), dict(whole))
    return {name: tuple(map(float, pair)) for name, pair in late.items()}


def test_across_documents_nothing_is_asked_for() -> None:
    """By a loop over places: the next token counts if it is of the same document and no padding.
    The weights that packed data bring, 0 at padding and first tokens, say the same."""
    asked = np.zeros((B, T))
    for row in range(B):
        for place in range(T):
            before, after = SEGMENTS[row, place : place + 2]
            asked[row, place] = before == after != 0
    firsts = np.concatenate([np.zeros((B, 1)), asked], axis=1)
    expected = ((NATS * asked).sum(), asked.sum())
    for batch in (
        {"segments": SEGMENTS},
        {"weight": firsts},
        {"segments": SEGMENTS, "weight": firsts},
    ):
        assert of(batch)["loss"] == pytest.approx(expected, rel=1e-6)
    half = of({"segments": SEGMENTS, "weight": np.array([1, 0, 0.5, 1])})
    weights = np.array([1, 0, 0.5, 1])[:, None] * asked
    assert half["loss"] == pytest.approx(((NATS * weights).sum(), weights.sum()), rel=1e-6)
    with pytest.raises(
        UserError, match=r"^segments has shape \(4, 6\); the task wants \(4, 7\), a"
    ):
        of({"segments": SEGMENTS[:, 1:]})


def test_the_model_gets_segments_cut_as_the_tokens_are() -> None:
    task = NextToken(input="tokens=tokens,segments=segments")
    given = task.inputs({"tokens": jnp.asarray(TOKENS), "segments": jnp.asarray(SEGMENTS)})
    np.testing.assert_array_equal(given["segments"], SEGMENTS[:, :-1])


def test_each_source_of_a_mixture_has_its_loss() -> None:
    """Padding and weights leave out of a source what they leave out of the whole; a source that a
    batch lacks has count 0, and is then no metric."""
    weight, source = np.array([1, 1, 0.5, 0]), np.array([2, 0, 2, 1])
    sums = of({"source": source, "weight": weight}, NextToken(sources=("books", "code", "letters")))
    by_hand = {"books": (NATS[1].sum(), 6), "letters": (NATS[0].sum() + 0.5 * NATS[2].sum(), 9)}
    for name, expected in by_hand.items():
        assert sums[f"loss_{name}"] == pytest.approx(expected, rel=1e-6)
    assert sums["loss_code"] == (0, 0)
    total, count = (sum(sums[f"loss_{name}"][part] for name in by_hand) for part in (0, 1))
    assert sums["loss"] == pytest.approx((total, count), rel=1e-6)
    assert not any("loss_" in name for name in of({"source": source}))  # nobody named them
    table = MixedTable({"tokens": TOKENS})
    named = NextToken().with_data(table)
    assert named.sources == ("prose", "verse")
    own = NextToken(sources=("others",))
    assert own.with_data(table) is own


def test_z_loss_and_smoothing_count_while_training_alone() -> None:
    task = NextToken(z_loss=0.01, label_smoothing=0.3)
    logits = (STATES @ KERNEL).astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    smooth = 0.7 * NATS + 0.3 * (log_z - logits.mean(-1))
    sums = of({}, task, train=True)
    assert sums["z_loss"] == pytest.approx((0.01 * (log_z**2).sum(), B * T), rel=1e-6)
    assert sums["loss"][0] == pytest.approx(smooth.sum() + sums["z_loss"][0], rel=1e-6)
    evaluated = of({}, task, train=False)
    assert evaluated["loss"] == pytest.approx((NATS.sum(), B * T), rel=1e-6)
    assert "z_loss" not in evaluated


def test_bits_per_byte_count_the_bytes_of_what_counts() -> None:
    lengths, weight = np.array([11, 7, 20, 9], np.int32), np.array([1.0, 1, 0, 1])
    found = of({"bytes": lengths, "weight": weight}, train=False)["bits_per_byte"]
    expected = (NATS[[0, 1, 3]].sum() / math.log(2), 27)
    assert found == pytest.approx(expected, rel=1e-6)
    tokens = np.concatenate([np.zeros((B, 1)), np.ones((B, T))], axis=1) * weight[:, None]
    again = of({"bytes": lengths, "weight": tokens}, train=False)["bits_per_byte"]
    assert again == pytest.approx(expected, rel=1e-6)
    assert "bits_per_byte" not in of({"bytes": lengths})  # in training
    # whose bytes are unknown where tokens are left out
    assert "bits_per_byte" not in of({"bytes": lengths}, NextToken(ignore=3), train=False)


def test_a_perplexity_is_finite_infinite_or_nan_as_its_loss_is() -> None:
    task = NextToken()
    assert task.derived({"loss": 2.0})["perplexity"] == math.exp(2)
    assert task.derived({"loss": 1e4})["perplexity"] == math.inf
    assert math.isnan(task.derived({"loss": math.nan})["perplexity"])
    with pytest.raises(
        UserError, match="^task NextToken: derived gives perplexity, which is there"
    ):
        tasks.with_derived(task, {"loss": 1.0, "perplexity": 3.0})


@pytest.mark.parametrize("bad", [(0, 3, V), (0, 3, -1), (1, 0, V)])
def test_tokens_outside_the_vocabulary_of_late_logits(bad: tuple[int, int, int]) -> None:
    tokens = TOKENS.copy()
    tokens[bad[:2]] = bad[2]
    sums = NextToken().loss(LATE, {"tokens": jnp.asarray(tokens)})
    assert np.isnan(float(sums["loss"][0])) and np.isnan(float(sums["accuracy"][0]))
    found = NextToken().wrong_labels({"tokens": tokens}, jax.eval_shape(lambda: LATE))
    assert found is not None and found.rule == f"there are {V} tokens, 0..{V - 1}"


def test_answers_of_late_logits_are_those_of_whole_ones() -> None:
    late, whole = (answers.answers(NextToken(), each) for each in (LATE, LATE.logits()))
    np.testing.assert_array_equal(late["prediction"], whole["prediction"])
    np.testing.assert_allclose(late["probability"], whole["probability"], rtol=1e-6)


# --- a whole run
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MixedTable(ArrayTable):
    """A table that names its sources."""

    source_names: tuple[str, ...] = ("prose", "verse")


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Two sources, packed, with the bytes of each sequence."""

    def open(self) -> Splits:
        """13 examples to validate, which no batch of 4 divides."""
        random = np.random.default_rng(1)

        def table(count: int) -> MixedTable:
            segments = np.sort(random.integers(1, 3, (count, T + 1)), axis=1)
            segments[:, -1] *= random.integers(0, 2, count)
            first = np.diff(segments, axis=1, prepend=-1) != 0
            return MixedTable(
                {
                    "tokens": random.integers(0, V, (count, T + 1)).astype(np.int32),
                    "segments": segments.astype(np.int32),
                    "weight": (~first & (segments > 0)).astype(np.float32),
                    "source": random.integers(0, 2, count).astype(np.int32),
                    "bytes": random.integers(5, 30, count).astype(np.int32),
                },
                num_classes=V,
            )

        return Splits(table(8), table(13), None, "mixed")


def run_of(**changes: Any) -> config.Run:
    """Two steps on that."""
    settings: dict[str, Any] = {
        "model": Transformer(vocabulary=V, width=8, depth=1, heads=2, max_length=T, chunk=4),
        "data": Mixed(),
        "task": NextToken(input="tokens=tokens,segments=segments"),
        "optimizer": SGD(0.1),
        "augment": None,
        "steps": 2,
        "batch_size": 4,
        "eval_batch_size": 4,
        "mesh": "data:1",
        "tensorboard": False,
        "report": False,
        "normalize": False,
        "best": "perplexity",
    }
    return config.Run(**({"name": "mixed"} | settings | changes))


def test_a_run_tells_the_numbers_of_the_whole_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the model applied to the whole set at once: sums over batches of 4, of which the last
    is padded, make the perplexity of all tokens and not the mean of four."""
    run = run_of(workdir=str(tmp_path))
    assert launch(run, []) == 0
    lines = read_metrics(tmp_path / "metrics.jsonl")
    found = next(line for line in reversed(lines) if line["split"] == "validation")
    trained = jaxtrain.load(tmp_path, experiment=run)
    rows = run.data.open().validation.arrays
    model = dataclasses.replace(run.model, chunk=0)
    logits = model.apply(
        {"params": trained.state.params}, rows["tokens"][:, :-1], segments=rows["segments"][:, :-1]
    )
    loss, weight = nats(np.asarray(logits), rows["tokens"]), rows["weight"][:, 1:]
    mean = (loss * weight).sum() / weight.sum()
    assert found["loss"] == pytest.approx(mean, rel=1e-5)
    assert found["perplexity"] == math.exp(found["loss"])
    counts = weight.max(axis=1) > 0
    bits = (loss * weight).sum() / math.log(2) / rows["bytes"][counts].sum()
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    for place, name in enumerate(("prose", "verse")):
        own = weight * (rows["source"] == place)[:, None]
        assert found[f"loss_{name}"] == pytest.approx((loss * own).sum() / own.sum(), rel=1e-5)
    said = capsys.readouterr().out
    assert f"perplexity {found['perplexity']:.4f}" in said, said
    assert f"loss_verse {found['loss_verse']:.4f}" in said, said
