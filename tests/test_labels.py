"""Labels that are no classes are never free: nan in compiled code, a line that names the row on the
host; and those that are to be ignored are out of loss, accuracy and count, exactly.

Dims: B batch, C classes, T tokens, V vocabulary.
"""

import dataclasses
import re
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain
from jaxtrain import config, losses, metrics, models, optimizers
from jaxtrain.data import label_checks
from jaxtrain.data.sources.arrays import Arrays
from jaxtrain.data.splits import Splits
from jaxtrain.data.table import ArrayTable, JoinedTable, SliceTable
from jaxtrain.errors import UserError
from jaxtrain.parallel import mesh as meshes
from jaxtrain.runner import main as runner_main
from jaxtrain.runner import preflight
from jaxtrain.tasks import Binary, Classification, MultiLabel, NextToken, Regression

RANDOM = np.random.default_rng(0)
LOGITS_BC = RANDOM.normal(size=(6, 4)).astype(np.float32)


def nll(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The negative log-likelihood of each label, in float64."""
    wide = logits.astype(np.float64)
    return np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, labels[..., None], -1)[..., 0]


@pytest.mark.parametrize("bad", [-1, 4, 255, 300, -100, 2**31 - 1])
def test_a_label_that_is_no_class_makes_loss_and_accuracy_nan(bad: int) -> None:
    labels_B = jnp.array([0, 1, 2, 3, 0, bad], jnp.int32)
    sums = jax.jit(Classification(label_smoothing=0.1, top_k=(2,)).loss)(
        LOGITS_BC, {"label": labels_B}
    )
    assert all(np.isnan(float(total)) and float(count) == 6 for total, count in sums.values())


@pytest.mark.parametrize(
    "labels_B",
    [
        np.array([0, 1, 2, 3, 0, 1.5], np.float32),
        np.array([0, 1, 2, 3, 0, np.nan], np.float32),
        np.array([0, 1, 2, 3, 0, 255], np.uint8),
        np.array([0, 1, 2, 3, 0, 4], np.uint16),
    ],
)
def test_nor_are_fractions_nan_or_bytes_of_255(labels_B: np.ndarray) -> None:
    loss_B = losses.cross_entropy(jnp.asarray(LOGITS_BC), jnp.asarray(labels_B))
    np.testing.assert_allclose(
        loss_B[:5], nll(LOGITS_BC[:5], labels_B[:5].astype(np.int64)), rtol=1e-5
    )
    assert np.isnan(loss_B[5])


def test_labels_of_8_bits_do_not_wrap_round_at_256_classes() -> None:
    random = np.random.default_rng(2)
    logits_BC = random.normal(size=(2, 300)).astype(np.float32)
    loss_B = losses.cross_entropy(jnp.asarray(logits_BC), jnp.array([3, 250], jnp.uint8))
    np.testing.assert_allclose(loss_B, nll(logits_BC, np.array([3, 250])), rtol=1e-5)


def test_a_wrong_label_of_a_row_without_weight_poisons_nothing() -> None:
    """Neither the loss nor the gradient."""
    weight_B = jnp.array([1.0, 1, 1, 1, 1, 0])
    batch = {"label": jnp.array([0, 1, 2, 3, 0, -1]), "weight": weight_B}
    loss, gradient = jax.value_and_grad(lambda x: Classification().loss(x, batch)["loss"][0])(
        jnp.asarray(LOGITS_BC)
    )
    assert float(loss) == pytest.approx(nll(LOGITS_BC[:5], np.array([0, 1, 2, 3, 0])).sum())
    assert np.isfinite(gradient).all()
    assert not np.any(gradient[5])


@pytest.mark.parametrize("ignore", [-1, -100, 255, 2])
def test_ignored_labels_are_out_of_loss_accuracy_and_count(ignore: int) -> None:
    labels_B = np.array([0, ignore, 1, 3, ignore, 1])
    kept = labels_B != ignore
    weight_B = np.array([1, 1, 2, 0, 1, 0.5], np.float32)
    sums = Classification(ignore=ignore).loss(
        jnp.asarray(LOGITS_BC), {"label": jnp.asarray(labels_B), "weight": jnp.asarray(weight_B)}
    )
    kept_nll = nll(LOGITS_BC[kept], labels_B[kept])
    right = LOGITS_BC[kept].argmax(1) == labels_B[kept]
    for name, values in (("loss", kept_nll), ("accuracy", right)):
        assert float(sums[name][0]) == pytest.approx((values * weight_B[kept]).sum(), rel=1e-6)
        assert float(sums[name][1]) == weight_B[kept].sum()


@pytest.mark.parametrize(("mesh", "microbatches"), [(None, 1), ("data:2", 2)])
def test_ignored_rows_are_as_if_they_were_not_there(mesh: str | None, microbatches: int) -> None:
    """One step with them equals one without, over microbatches and meshes."""
    random = np.random.default_rng(2)
    labels_B = np.array([0, 3, -1, 1, -1, 2, -1, 0])
    images = random.normal(size=(8, 5)).astype(np.float32)
    parts = (models.MLP(num_classes=4, widths=(6,)), Classification(ignore=-1))
    parts = (*parts, optimizers.SGD(learning_rate=0.5))
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels_B, jnp.int32)}
    kept = {name: array[labels_B >= 0] for name, array in batch.items()}
    place = None if mesh is None else meshes.make(mesh)
    options = {"mesh": place, "microbatches": microbatches}
    state, sums = jaxtrain.make_train_step(*parts, **options)(
        jaxtrain.init_state(*parts, batch, **options), batch
    )
    alone, expected = jaxtrain.make_train_step(*parts)(jaxtrain.init_state(*parts, kept), kept)
    assert float(sums["loss"][1]) == 5
    assert float(sums["loss"][0]) == pytest.approx(float(expected["loss"][0]), rel=1e-6)
    for one, other in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_mixture_with_an_ignored_label_counts_the_other() -> None:
    share_B = np.array([0.7, 0.2], np.float32)
    batch = {
        "label": jnp.array([1, -1]),
        "label_other": jnp.array([-1, 1]),
        "label_weight": jnp.asarray(share_B),
    }
    sums = Classification(ignore=-1).loss(jnp.asarray(LOGITS_BC[:2]), batch)
    weights = np.array([0.7, 0.8])
    expected = (weights * nll(LOGITS_BC[:2], np.array([1, 1]))).sum()
    assert float(sums["loss"][0]) == pytest.approx(expected, rel=1e-6)
    assert float(sums["loss"][1]) == pytest.approx(1.5)
    assert float(sums["accuracy"][1]) == 2


def test_labels_at_every_place_of_an_example() -> None:
    """Segmentation, where 255 is ignored."""
    random = np.random.default_rng(2)
    logits = random.normal(size=(2, 3, 3, 4)).astype(np.float32)
    labels = random.integers(0, 4, size=(2, 3, 3)).astype(np.uint8)
    labels[0, 0] = 255
    batch = {"label": jnp.asarray(labels), "weight": jnp.array([1.0, 2.0])}
    sums = Classification(ignore=255).loss(jnp.asarray(logits), batch)
    weights = np.broadcast_to(np.array([1.0, 2.0])[:, None, None], labels.shape) * (labels != 255)
    safe = np.where(labels == 255, 0, labels).astype(np.int64)
    assert float(sums["loss"][1]) == weights.sum() == 24
    assert float(sums["loss"][0]) == pytest.approx((weights * nll(logits, safe)).sum(), rel=1e-5)


def test_labels_of_another_shape_are_refused_with_what_to_do() -> None:
    """Of (64, 1) against (64,) a comparison would make 64 x 64 losses."""
    logits = jnp.zeros((64, 10))
    with pytest.raises(
        UserError, match=r"labels have shape \(64, 1\).*drop their last dim, as lab"
    ):
        losses.cross_entropy(logits, jnp.zeros((64, 1), jnp.int32))
    assert losses.cross_entropy(logits, jnp.zeros((64, 1), jnp.int32)[..., 0]).shape == (64,)
    with pytest.raises(UserError, match=r"one-hot labels of 7 classes.*--model.num_classes=7\)$"):
        losses.cross_entropy(logits, jnp.zeros((64, 7)))
    assert losses.cross_entropy(jnp.zeros((64, 7)), jnp.zeros((64, 7))).shape == (64,)
    with pytest.raises(UserError, match=r"outputs have shape \(64,\), targets \(64, 1\)"):
        losses.squared_error(jnp.zeros(64), jnp.zeros((64, 1)))
    assert losses.squared_error(jnp.zeros(64), jnp.zeros((64, 1))[..., 0]).shape == (64,)
    with pytest.raises(UserError, match=r"weights have shape \(64, 1\), values \(64,\)"):
        metrics.weighted(jnp.zeros(64), jnp.zeros((64, 1)))
    assert metrics.weighted(jnp.zeros(64), jnp.ones(64))[1] == 64


TOKENS = np.array([[1, 2, 3, 0], [3, 2, 1, 1]])
LOGITS_BTV = RANDOM.normal(size=(2, 3, 4)).astype(np.float32)


@pytest.mark.parametrize("bad", [(0, 3, 4), (0, 3, -1), (1, 0, 4), (1, 0, -7)])
def test_tokens_outside_the_vocabulary(bad: tuple[int, int, int]) -> None:
    """Also the first of a sequence, which is only seen: an embedding takes some other for it."""
    tokens = TOKENS.copy()
    tokens[bad[:2]] = bad[2]
    sums = NextToken().loss(jnp.asarray(LOGITS_BTV), {"tokens": jnp.asarray(tokens)})
    assert np.isnan(float(sums["loss"][0]))
    assert np.isnan(float(sums["accuracy"][0]))


def test_ignored_tokens_are_not_asked_for() -> None:
    tokens = TOKENS.copy()
    tokens[0, 2:] = -100
    batch = {"tokens": jnp.asarray(tokens)}
    task = NextToken(ignore=-100)
    np.testing.assert_array_equal(task.inputs(batch), [[1, 2, 0], [3, 2, 1]])
    sums = task.loss(jnp.asarray(LOGITS_BTV), batch)
    kept = tokens[:, 1:] >= 0
    expected = nll(LOGITS_BTV, np.maximum(tokens[:, 1:], 0))[kept].sum()
    assert float(sums["loss"][0]) == pytest.approx(expected, rel=1e-6)
    assert float(sums["loss"][1]) == kept.sum() == 4
    # the id of padding is in the vocabulary: the model sees it
    padded = NextToken(ignore=0)
    np.testing.assert_array_equal(padded.inputs({"tokens": TOKENS}), TOKENS[:, :-1])
    assert float(padded.loss(jnp.asarray(LOGITS_BTV), {"tokens": TOKENS})["loss"][1]) == 5


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 4)])
def test_weights_of_sequences_and_of_tokens(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(2)
    weight = random.integers(0, 3, size=shape).astype(np.float32)
    sums = NextToken().loss(
        jnp.asarray(LOGITS_BTV), {"tokens": jnp.asarray(TOKENS), "weight": jnp.asarray(weight)}
    )
    each = {(2,): lambda: weight[:, None] + np.zeros((2, 3)), (2, 3): lambda: weight}
    each = each.get(shape, lambda: weight[:, 1:])()
    assert float(sums["loss"][1]) == each.sum()
    expected = (each * nll(LOGITS_BTV, TOKENS[:, 1:])).sum()
    assert float(sums["loss"][0]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(
        UserError, match=r"^weight has shape \(2, 2\); the task wants \(2,\), \(2, "
    ):
        NextToken().loss(LOGITS_BTV, {"tokens": jnp.asarray(TOKENS), "weight": jnp.ones((2, 2))})


@dataclasses.dataclass(frozen=True)
class Source:
    """What the messages name of a data source."""

    train: str = "train"
    validation: str = ""
    test: str = "test"


def checked(task, labels, test=None, *, width=4, field="label", streamed=False) -> Splits:
    """The splits with these labels, through the check before the training."""
    shape = (8, 2, width) if isinstance(task, NextToken) else (8, width)

    def table(values):
        arrays = {"image": np.zeros((len(values), 2), np.float32), field: np.asarray(values)}
        whole = ArrayTable(arrays)
        return SliceTable(whole, range(len(whole))) if streamed else whole

    good = [0, 1, 1, 0, 1]
    splits = Splits(table(labels), None, table(good if test is None else test), "")
    return label_checks.checked(splits, task, jax.ShapeDtypeStruct(shape, jnp.float32), Source())


@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "stream"])
@pytest.mark.parametrize(
    ("task", "labels", "line"),
    [
        (
            Classification(),
            [0, 3, -1, 2],
            (
                "label is -1 in row 2; there are 4 classes, 0..3; mend the data, or set"
                " --task.ignore=-1 to leave such labels out"
            ),
        ),
        (Classification(), [0, 3, 1, 255], "label is 255 in row 3; there are 4 classes, 0..3;"),
        (
            Classification(),
            np.array([0, 1.5, 1], np.float32),
            "label is 1.5 in row 1; there are 4 classes, 0..3; mend the data",
        ),
        (Classification(), np.array([0, np.nan], np.float32), "label is nan in row 1; "),
        (Classification(ignore=-1), [0, -1, -100], "label is -100 in row 2; there are 4 "),
        (
            Classification(),
            np.array([[0, 1, 0, 0], [0, 1, 1, 0]], np.float32),
            "label sums to 2 in row 1; the probabilities of an example must be >= 0 and sum to 1;",
        ),
        (Binary(), [0, 1, 2], "label is 2 in row 2; it must be 0 or 1; mend the data"),
        (MultiLabel(), [[0, 1, 0, 1], [0, 0, 3, 1]], "label is 3 in row 1; it must be 0 or 1;"),
        (
            Regression(target="label"),
            np.array([0.5, np.inf]),
            "label is inf in row 1; it must be finite; mend the data",
        ),
        (
            NextToken(input="label"),
            [[0, 1, 2], [3, 4, 2]],
            "label is 4 in row 1; there are 4 token",
        ),
    ],
)
def test_the_first_wrong_label_is_named_before_the_training(task, labels, line, streamed) -> None:
    good = np.asarray(labels)[:1].repeat(3, 0)
    for split, arguments in (("train", (labels, good)), ("test", (good, labels))):
        with pytest.raises(
            UserError, match=f"^{re.escape(f'--data.{split}={split}: {line}')}"
        ) as caught:
            checked(task, *arguments, streamed=streamed)
        # what the line says, done: the data mended, and the flag that it names
        said = str(caught.value)
        assert "mend the data" in said
        assert len(checked(task, good, good, streamed=streamed).train) == 3
        if ignore := re.search(r"or set --task\.ignore=(-?\d+) to leave", said):
            task_then = dataclasses.replace(task, ignore=int(ignore[1]))
            checked(task_then, *arguments, streamed=streamed)
        if "--task=multi_label" in said:
            checked(MultiLabel(), *arguments, streamed=streamed)


@pytest.mark.parametrize("ignore", [None, -1])
def test_a_test_split_without_labels_is_refused(ignore: int | None) -> None:
    with pytest.raises(
        UserError, match=r"^--data.test=test: has no labels \(label is -1 in row 0, "
    ):
        checked(Classification(ignore=ignore), [0, 1, 2], [-1] * 5)
    with pytest.raises(UserError, match=r"pass --data.test= to do without$"):
        checked(Classification(ignore=ignore), [0, 1, 2], [-1] * 5)
    task, shape = Classification(ignore=ignore), jax.ShapeDtypeStruct((8, 4), jnp.float32)
    alone = Splits(checked(task, [0, 1, 2]).train, None, None, "")  # the remedy
    assert label_checks.checked(alone, task, shape, Source(test="")).test is None
    found = checked(Classification(ignore=-1), [0, -1, 2], [-1, 1, -1])  # some are enough
    assert len(found.test) == 3


def test_a_stream_is_checked_as_it_is_read() -> None:
    labels = np.arange(1000) % 4
    labels[703] = 9
    train = checked(Classification(), labels, streamed=True).train
    assert train.read(np.arange(600, 700))["label"].tolist() == labels[600:700].tolist()
    with pytest.raises(UserError, match=r"^--data.train=train: label is 9 in row 703; there are 4"):
        train.read(np.array([5, 703, 3]))


def test_weights_that_are_none_are_refused() -> None:
    found = Classification().wrong_labels(
        {"label": np.array([0, 1]), "weight": np.array([1.0, -2.0])}, np.zeros((2, 4))
    )
    assert found is not None
    assert (found.problem, found.rule) == ("weight is -2", "it must be finite and >= 0")
    mended = {"label": np.array([0, 1]), "weight": np.array([1.0, 0.0])}
    assert Classification().wrong_labels(mended, np.zeros((2, 4))) is None


@dataclasses.dataclass(frozen=True)
class Streamed(Source):
    """9600 rows that are not in memory; that of `bad`, in the train split, has a label 9."""

    bad: int = 500
    test: str = ""

    def open(self) -> Splits:
        labels = np.where(np.arange(9600) == self.bad, 9, np.arange(9600) % 4)
        whole = ArrayTable({"image": np.zeros((9600, 2), np.float32), "label": labels}, 4)
        return Splits(SliceTable(whole, range(9600)), None, None, "")


@pytest.mark.parametrize("bad", [100, 500])
def test_a_run_over_a_stream_ends_with_the_row(tmp_path: Path, bad: int) -> None:
    """Before the training where it is among the rows that are looked at, the first ones and some
    all over the set, and else before the epoch's end."""
    run = config.Run(
        name="toy",
        model=models.MLP(num_classes=4, widths=()),
        task=Classification(),
        data=Streamed(bad=bad),
        optimizer=optimizers.SGD(learning_rate=0.1),
        steps=10,
        batch_size=960,
        workdir=str(tmp_path / "run"),
        tensorboard=False,
        report=False,
    )
    with pytest.raises(
        UserError, match=rf"^--data.train=train: label is 9 in row {bad}; there are"
    ):
        runner_main.launch(run, [])
    assert (tmp_path / "run" / "run.json").exists() == (bad == 500)


def test_a_file_of_tokens_is_checked_without_a_copy(tmp_path: Path) -> None:
    """64 MiB of them, of which no more than a little is in memory at once."""
    tokens = np.lib.format.open_memmap(tmp_path / "t.npy", "w+", np.uint16, (2**15, 2**10))
    tracemalloc.start()
    logits = jax.ShapeDtypeStruct((8, 3, 4), jnp.float32)
    assert NextToken().wrong_labels({"tokens": tokens}, logits, whole=True) is None
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    tokens[7, 9] = 4
    found = NextToken().wrong_labels({"tokens": tokens}, logits)
    assert found is not None
    assert (found.rows_N.tolist(), found.problem) == ([7], "tokens is 4")


def test_an_ignored_label_counts_as_no_class_in_tables_that_are_not_in_memory() -> None:
    """Three classes and 255, in the rows of a memory map that a stream or a part reads."""
    labels = np.arange(40) % 4
    whole = ArrayTable({"label": np.where(labels == 3, 255, labels)}, 256)
    part = SliceTable(whole, np.arange(0, 40))
    task = Classification(ignore=255)
    assert [preflight._classes(task, table) for table in (whole, part)] == [3, 3]
    assert preflight._classes(task, JoinedTable((part, part))) == 3
    assert preflight._classes(Classification(), SliceTable(whole, range(40))) is None

    @dataclasses.dataclass(frozen=True)
    class Stream:
        num_classes: int = 256
        arrays = class_names = None

    assert preflight._classes(task, Stream()) is None  # type: ignore[arg-type]
    assert preflight._classes(Classification(ignore=-1), Stream()) == 256  # type: ignore[arg-type]


def test_a_run_under_a_transfer_guard_of_the_users_own_trains(tmp_path: Path) -> None:
    data = Arrays.of({"x": np.zeros((8, 2), np.float32), "y": np.arange(8) % 2})
    run = config.Run(
        name="toy",
        model=models.MLP(num_classes=2, widths=()),
        task=Classification(),
        data=dataclasses.replace(data, test=""),
        optimizer=optimizers.SGD(learning_rate=0.1),
        steps=1,
        batch_size=8,
        workdir=str(tmp_path / "run"),
        tensorboard=False,
        report=False,
    )
    with jax.transfer_guard("disallow"):
        assert runner_main.launch(run, []) == 0
