"""Losses of every head against NumPy in float64 and Optax, and metrics of whole sets against
scikit-learn.

Dims: B batch, C classes or labels, D features, N examples.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics as sklearn_metrics

from jaxtrain import optimizers
from jaxtrain.data import pipeline
from jaxtrain.data.table import ArrayTable
from jaxtrain.errors import UserError
from jaxtrain.metrics import weighted
from jaxtrain.parallel import mesh as meshes
from jaxtrain.parallel import sharding
from jaxtrain.report.page import history, prediction_plots
from jaxtrain.runner import compile as compiling
from jaxtrain.runner import finish
from jaxtrain.tasks import Binary, Classification, MultiLabel, Regression
from jaxtrain.train import lowering
from jaxtrain.train.recipe import Recipe

RANDOM = np.random.default_rng(1)
LOGITS_BC = RANDOM.normal(size=(12, 4)).astype(np.float32)
LABELS_B = RANDOM.integers(0, 4, 12).astype(np.int32)
WEIGHT_B = RANDOM.integers(0, 3, 12).astype(np.float32)


def log_softmax(logits_BC: np.ndarray) -> np.ndarray:
    wide_BC = logits_BC.astype(np.float64)
    return wide_BC - np.log(np.exp(wide_BC).sum(1, keepdims=True))


def mean(pair) -> float:
    return float(pair[0]) / float(pair[1])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_hot_and_soft_labels(smoothing: float) -> None:
    random = np.random.default_rng(2)
    task = Classification(label_smoothing=smoothing)
    hard = task.loss(LOGITS_BC, {"label": jnp.asarray(LABELS_B)})
    one_hot_BC = np.eye(4, dtype=np.int32)[LABELS_B]
    for labels_BC in (one_hot_BC, one_hot_BC.astype(np.float32)):
        sums = task.loss(LOGITS_BC, {"label": jnp.asarray(labels_BC)})
        assert mean(sums["loss"]) == pytest.approx(mean(hard["loss"]), rel=1e-6)
        assert mean(sums["accuracy"]) == mean(hard["accuracy"])
    soft_BC = random.dirichlet(np.ones(4), size=12).astype(np.float32)
    sums = task.loss(LOGITS_BC, {"label": jnp.asarray(soft_BC)})
    target_BC = (1 - smoothing) * soft_BC.astype(np.float64) + smoothing / 4
    expected = -(target_BC * log_softmax(LOGITS_BC)).sum(1).mean()
    assert mean(sums["loss"]) == pytest.approx(expected, rel=1e-6)
    assert mean(sums["accuracy"]) == (LOGITS_BC.argmax(1) == soft_BC.argmax(1)).mean()
    soft_BC[3, 0] += 0.1
    wrong = task.loss(LOGITS_BC, {"label": jnp.asarray(soft_BC)})
    assert np.isnan(float(wrong["loss"][0]))


@pytest.mark.parametrize("one_hot", [False, True])
def test_class_weights_make_a_weighted_mean(one_hot: bool) -> None:
    class_weights = (1.0, 0.0, 2.5, 0.5)
    labels = np.eye(4, dtype=np.float32)[LABELS_B] if one_hot else LABELS_B
    batch = {"label": jnp.asarray(labels), "weight": jnp.asarray(WEIGHT_B)}
    sums = Classification(class_weights=class_weights).loss(LOGITS_BC, batch, train=False)
    own_B = -log_softmax(LOGITS_BC)[np.arange(12), LABELS_B]
    w_B = np.array(class_weights)[LABELS_B] * WEIGHT_B
    assert mean(sums["loss"]) == pytest.approx((w_B * own_B).sum() / w_B.sum(), rel=1e-6)
    assert float(sums["accuracy"][1]) == WEIGHT_B.sum()
    bad = Classification(class_weights=class_weights).loss(LOGITS_BC, {"label": LABELS_B - 4})
    assert np.isnan(mean(bad["loss"]))
    with pytest.raises(
        UserError, match=r"^--task.class_weights=1.0,2.0: has 2 numbers, the model 4"
    ):
        Classification(class_weights=(1.0, 2.0)).loss(LOGITS_BC, batch)


def test_top_k_accuracy() -> None:
    sums = Classification(top_k=(1, 2, 4)).loss(LOGITS_BC, {"label": jnp.asarray(LABELS_B)})
    for count in (1, 2, 4):
        expected = np.mean(
            [label in row for label, row in zip(LABELS_B, np.argsort(-LOGITS_BC)[:, :count])]
        )
        assert mean(sums[f"top{count}"]) == expected
    # a model that says the same of all classes is right by their numbers only, as argmax has it
    dead = Classification(top_k=(2,)).loss(jnp.zeros((12, 4)), {"label": jnp.asarray(LABELS_B)})
    assert mean(dead["top2"]) == (LABELS_B < 2).mean()
    lost = Classification(top_k=(2,)).loss(
        jnp.full((12, 4), jnp.nan), {"label": jnp.asarray(LABELS_B)}
    )
    assert mean(lost["top2"]) == 0
    with pytest.raises(UserError, match=r"^--task.top_k=5: the model has 4 classes; use <= 4$"):
        Classification(top_k=(5,)).loss(LOGITS_BC, {"label": LABELS_B})


def test_one_output_has_no_classes() -> None:
    with pytest.raises(
        UserError, match=r"^outputs have shape \(3, 1\): classes need .*task=binary"
    ):
        Classification().loss(jnp.zeros((3, 1)), {"label": jnp.zeros(3, jnp.int32)})


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", [np.int32, np.float32, np.bool_, np.uint8])
def test_a_binary_head_is_a_sigmoid(kind, smoothing: float) -> None:
    random = np.random.default_rng(2)
    logits = random.normal(scale=40, size=12).astype(np.float32)
    labels = random.integers(0, 2, 12)
    task = Binary(label_smoothing=smoothing)
    targets = labels * (1 - smoothing) + smoothing / 2
    expected = np.mean(optax.sigmoid_binary_cross_entropy(jnp.asarray(logits), targets))
    for shape in ((12,), (12, 1)):
        batch = {"label": jnp.asarray(labels.astype(kind)).reshape(shape)}
        for outputs in (logits, logits[:, None]):
            sums = task.loss(jnp.asarray(outputs), batch)
            assert mean(sums["loss"]) == pytest.approx(float(expected), rel=1e-5)
            assert mean(sums["accuracy"]) == ((logits > 0) == labels).mean()
    with pytest.raises(
        UserError, match=r"^outputs have shape \(12, 4\); the task Binary wants one"
    ):
        task.loss(LOGITS_BC, batch)


def test_binary_labels_weights_and_what_is_ignored() -> None:
    logits, labels = LOGITS_BC[:, 0], np.array([0, 1, -1, 1, 0, 1] * 2)
    sums = Binary(ignore=-1, class_weights=(1.0, 3.0)).loss(
        jnp.asarray(logits), {"label": jnp.asarray(labels)}
    )
    own = np.log1p(np.exp(np.where(labels == 1, -1, 1) * logits.astype(np.float64)))
    w = np.where(labels == 1, 3.0, 1.0) * (labels >= 0)
    assert mean(sums["loss"]) == pytest.approx((w * own).sum() / w.sum(), rel=1e-6)
    assert float(sums["accuracy"][1]) == 10
    for task in (Binary(), Binary(class_weights=(0.0, 0.0))):
        assert np.isnan(float(task.loss(jnp.asarray(logits), {"label": labels})["loss"][0]))


MULTI_BC = RANDOM.integers(0, 2, (12, 4))


def test_several_labels_an_example() -> None:
    batch = {"label": jnp.asarray(MULTI_BC), "weight": jnp.asarray(WEIGHT_B)}
    sums = MultiLabel().loss(jnp.asarray(LOGITS_BC), batch)
    each_BC = np.asarray(optax.sigmoid_binary_cross_entropy(LOGITS_BC, MULTI_BC), np.float64)
    right_BC = (LOGITS_BC > 0) == MULTI_BC
    share_B = WEIGHT_B / WEIGHT_B.sum()
    assert mean(sums["loss"]) == pytest.approx((share_B * each_BC.mean(1)).sum(), rel=1e-6)
    assert mean(sums["accuracy"]) == pytest.approx((share_B * right_BC.mean(1)).sum(), rel=1e-6)
    assert mean(sums["exact_match"]) == pytest.approx((share_B * right_BC.all(1)).sum())
    with pytest.raises(UserError, match=r"labels \(12, 3\).*give the model 3 outputs"):
        MultiLabel().loss(LOGITS_BC, {"label": jnp.zeros((12, 3), jnp.int32)})


def test_unknown_ones_of_several_labels_count_nothing() -> None:
    random = np.random.default_rng(2)
    labels_BC = np.where(random.random((12, 4)) < 0.3, -1, MULTI_BC)
    labels_BC[0] = -1
    known_BC = labels_BC >= 0
    sums = MultiLabel(ignore=-1).loss(jnp.asarray(LOGITS_BC), {"label": jnp.asarray(labels_BC)})
    each_BC = np.asarray(optax.sigmoid_binary_cross_entropy(LOGITS_BC, MULTI_BC), np.float64)
    assert mean(sums["loss"]) == pytest.approx(each_BC[known_BC].mean(), rel=1e-6)
    right_BC = (LOGITS_BC > 0) == labels_BC
    assert mean(sums["accuracy"]) == pytest.approx(right_BC[known_BC].mean(), rel=1e-6)
    assert mean(sums["exact_match"]) == pytest.approx(
        (right_BC | ~known_BC)[known_BC.any(1)].all(1).mean()
    )
    assert np.isnan(float(MultiLabel().loss(LOGITS_BC, {"label": labels_BC})["loss"][0]))


@pytest.mark.parametrize("error", ["squared", "absolute", "huber"])
def test_errors_of_numbers(error) -> None:
    random = np.random.default_rng(2)
    outputs, targets = random.normal(scale=2, size=(2, 12, 3)).astype(np.float32)
    sums = Regression(error=error, huber_delta=0.7).loss(
        jnp.asarray(outputs), {"target": jnp.asarray(targets)}
    )
    expected = {
        "squared": (outputs - targets) ** 2,
        "absolute": abs(outputs - targets),
        "huber": np.asarray(optax.huber_loss(jnp.asarray(outputs), targets, delta=0.7)),
    }[error]
    assert mean(sums["loss"]) == pytest.approx(expected.astype(np.float64).mean(), rel=1e-5)


@pytest.mark.parametrize("outputs_shape", [(12,), (12, 1)])
@pytest.mark.parametrize("targets_shape", [(12,), (12, 1)])
def test_one_number_an_example_has_one_meaning(outputs_shape, targets_shape) -> None:
    outputs, targets = LOGITS_BC[:, 0], LABELS_B  # whole targets, too
    sums = Regression().loss(
        jnp.asarray(outputs).reshape(outputs_shape),
        {"target": jnp.asarray(targets).reshape(targets_shape)},
    )
    expected = ((outputs.astype(np.float64) - targets) ** 2).mean()
    assert mean(sums["loss"]) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(
        UserError, match=r"^outputs have shape \(12, 4\), targets \(12,\); they must"
    ):
        Regression().loss(LOGITS_BC, {"target": jnp.asarray(targets)})


def test_mixed_yes_and_no_weigh_both() -> None:
    share_B = np.linspace(0, 1, 12).astype(np.float32)
    one, other = MULTI_BC[:, :2], MULTI_BC[::-1, :2]
    mixed_B2 = share_B[:, None] * one + (1 - share_B[:, None]) * other
    each_B2 = np.asarray(optax.sigmoid_binary_cross_entropy(LOGITS_BC[:, :2], mixed_B2))
    greater_B2 = np.where(share_B[:, None] >= 0.5, one, other)
    right_B2 = (LOGITS_BC[:, :2] > 0) == greater_B2
    batch = {"label": one, "label_other": other, "label_weight": share_B}
    several = MultiLabel().loss(LOGITS_BC[:, :2], jax.tree.map(jnp.asarray, batch))
    assert mean(several["loss"]) == pytest.approx(each_B2.mean(), rel=1e-5)
    assert mean(several["accuracy"]) == pytest.approx(right_B2.mean())
    batch |= {"label": one[:, :1], "label_other": other[:, :1]}
    single = Binary().loss(LOGITS_BC[:, 0], jax.tree.map(jnp.asarray, batch))
    assert mean(single["loss"]) == pytest.approx(each_B2[:, 0].mean(), rel=1e-5)
    assert mean(single["accuracy"]) == pytest.approx(right_B2[:, 0].mean())


def test_mixed_labels_are_refused_where_they_are_not_the_truth() -> None:
    zeros = jnp.zeros(12)
    batch = {"label": zeros, "label_other": zeros, "label_weight": zeros + 1, "y": zeros}
    for task, why in (
        (Regression(target="label"), "mix class labels, which this task does not have"),
        (Binary(target="y"), "mix the field label, not y"),
        (Binary(ignore=-1), "do not go with ignore or class_weights of this task"),
        (Binary(class_weights=(1.0, 2.0)), "do not go with ignore or class_weights of this"),
        (Classification(target="y"), "mix the field label, not y"),
    ):
        outputs = jnp.zeros((12, 3)) if isinstance(task, Classification) else zeros
        line = f"^--augment.mixup, --augment.cutmix: {why}.*; set both to 0$"
        with pytest.raises(UserError, match=line):
            task.loss(outputs, batch)


N = 22
IMAGES = RANDOM.normal(size=(N, 3)).astype(np.float32)
KERNEL = RANDOM.normal(size=(3, 4)).astype(np.float32)


def linear(width: int):
    """A model that is a constant, as init and apply."""
    kernel = KERNEL[:, :width]
    return (lambda key, x: {"k": jnp.asarray(kernel)}, lambda params, x: x @ params["k"])


def measured(task, labels, *, mesh="data:2", size=8, width=4, reproducible=False, **fields):
    """What a run's evaluation says of a set of 22 examples."""
    table = ArrayTable({"image": IMAGES, getattr(task, "target", "label"): labels, **fields})
    place = meshes.make(mesh)
    recipe = Recipe(linear(width), task, optimizers.SGD())
    shapes = {
        name: jax.ShapeDtypeStruct((size, *field.shape), field.dtype)
        for name, field in table.fields.items()
    }
    programs = lowering.lower(recipe, shapes, place)
    execution = compiling.Reproducible(place, 4) if reproducible else compiling.Sharded(place)
    state = execution.initialize(programs, 0)
    batches = pipeline.evaluation_batches(table, size, sharding.batch(place))
    return execution.evaluation(programs)(state, batches)


LABELS_N = np.where(np.arange(N) == 5, -1, RANDOM.integers(0, 4, N)).astype(np.int32)
SCORES_NC = (IMAGES @ KERNEL).astype(np.float64)
NAMES = ("auc", "f1_macro", "f1_micro", "balanced_accuracy", "per_class")


@pytest.mark.parametrize(
    ("mesh", "size", "reproducible"),
    [("data:1", 22, False), ("data:4", 8, False), ("data:2", 8, True)],
)
def test_metrics_of_a_whole_set_are_those_of_scikit_learn(mesh, size, reproducible) -> None:
    """On any mesh, with any batch size, without padding, without the ignored row."""
    task = Classification(ignore=-1, metrics=NAMES)
    found = measured(task, LABELS_N, mesh=mesh, size=size, reproducible=reproducible)
    kept = LABELS_N >= 0
    labels, scores = LABELS_N[kept], SCORES_NC[kept]
    guess = scores.argmax(1)
    recall = sklearn_metrics.recall_score(labels, guess, average=None)
    expected = {
        "auc": sklearn_metrics.roc_auc_score(
            labels, np.exp(log_softmax(scores)), multi_class="ovr", average="macro"
        ),
        "f1_macro": sklearn_metrics.f1_score(labels, guess, average="macro"),
        "f1_micro": sklearn_metrics.f1_score(labels, guess, average="micro"),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(labels, guess),
        "accuracy": (labels == guess).mean(),
        **{f"accuracy_class_{place}": recall[place] for place in range(4)},
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    plain = measured(Classification(ignore=-1), LABELS_N, mesh=mesh, size=size)
    assert plain.keys() == {"loss", "accuracy"}
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-6)


def test_metrics_of_binary_several_labels_and_numbers() -> None:
    random = np.random.default_rng(2)
    labels = (LABELS_N > 1).astype(np.int32)
    weight = random.integers(0, 3, N).astype(np.float32)
    task = Binary(metrics=("auc", "f1", "precision", "recall"))
    examined = task.examine(SCORES_NC[:, 0], {"label": jnp.asarray(labels)})
    examined = {name: np.asarray(array) for name, array in examined.items()} | {"weight": weight}
    guess, scores = SCORES_NC[:, 0] > 0, SCORES_NC[:, 0].astype(np.float32)
    options = {"sample_weight": weight}
    assert task.evaluate(examined) == pytest.approx(
        {
            "auc": sklearn_metrics.roc_auc_score(labels, scores, **options),
            "f1": sklearn_metrics.f1_score(labels, guess, **options),
            "precision": sklearn_metrics.precision_score(labels, guess, **options),
            "recall": sklearn_metrics.recall_score(labels, guess, **options),
        },
        rel=1e-12,
    )
    several = random.integers(0, 2, (N, 4))
    found = measured(MultiLabel(metrics=("auc", "f1_micro", "f1_macro", "per_class")), several)
    guess_NC = SCORES_NC > 0
    assert found["auc"] == pytest.approx(sklearn_metrics.roc_auc_score(several, SCORES_NC))
    for kind in ("micro", "macro"):
        expected = sklearn_metrics.f1_score(several, guess_NC, average=kind)
        assert found[f"f1_{kind}"] == pytest.approx(expected)
    assert found["accuracy_class_2"] == pytest.approx((several == guess_NC)[:, 2].mean())
    numbers = random.normal(size=(N, 2)).astype(np.float32)
    found = measured(Regression(metrics=("mae", "rmse", "r2")), numbers, width=2, mesh="data:1")
    guessed = SCORES_NC[:, :2].astype(np.float32)
    assert {name: found[name] for name in ("mae", "r2")} == pytest.approx(
        {
            "mae": sklearn_metrics.mean_absolute_error(numbers, guessed),
            "r2": sklearn_metrics.r2_score(numbers, guessed),
        },
        rel=1e-5,
    )
    assert found["rmse"] == pytest.approx(found["loss"] ** 0.5, rel=1e-6)


def test_ties_and_sets_of_one_class() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = Binary(metrics=("auc", "f1"))
        one = {"label": np.ones(3, int), "prediction": np.zeros(3, int), "logit": -np.ones(3)}
        assert task.evaluate(one) == pytest.approx({"auc": np.nan, "f1": 0.0}, nan_ok=True)
    tied = {"label": np.array([0, 1, 0, 1]), "prediction": np.zeros(4, int)}
    tied |= {"logit": np.array([0.5, 0.5, 0.1, 0.9])}
    expected = sklearn_metrics.roc_auc_score(tied["label"], tied["logit"])
    assert task.evaluate(tied)["auc"] == pytest.approx(expected)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """A user's task with a metric of its own."""

    clash: bool = False

    def inputs(self, batch):
        return batch["image"]

    def loss(self, outputs, batch, *, train=True):
        return {"loss": weighted(jnp.square(outputs[:, 0]), batch.get("weight"))}

    def examine(self, outputs, batch):
        return {"value": outputs[:, 0], "odd": batch["label"] % 2}

    def evaluate(self, examined):
        assert examined["id"].tolist() == list(range(N))
        median = np.median(examined["value"][examined["odd"] == 1])
        return {"loss" if self.clash else "median_of_odd": median}


def test_a_task_of_ones_own_measures_what_it_likes() -> None:
    labels = np.arange(N, dtype=np.int32)
    found = measured(Ranks(), labels, mesh="data:4")
    assert found["median_of_odd"] == pytest.approx(np.median(SCORES_NC[1::2, 0]), rel=1e-6)
    with pytest.raises(
        UserError, match=r"^task: loss is among the sums of its loss and in its eva"
    ):
        measured(Ranks(clash=True), labels, mesh="data:1")


@dataclasses.dataclass(frozen=True)
class Blind(Ranks):
    examine = None


@dataclasses.dataclass(frozen=True)
class Summary(Ranks):
    def examine(self, outputs, batch):
        return {"value": outputs.mean()}


def test_a_task_that_cannot_be_measured_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^task Blind: has evaluate, but no examine\(outputs, batch"
    ):
        measured(Blind(), LABELS_N)
    with pytest.raises(
        UserError, match=r"^task Summary: examine gives 'value' of shape \(\); every "
    ):
        measured(Summary(), LABELS_N, mesh="data:1")


def test_an_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^evaluation: every example has weight 0 or a label that "
    ):
        measured(Classification(ignore=7), np.full(N, 7, np.int32), mesh="data:1")


def test_predictions_of_any_task_are_written_and_drawn(tmp_path) -> None:
    """Rows keep their numbers where some are left out."""
    table = ArrayTable({"image": IMAGES, "label": LABELS_N})
    kept = np.flatnonzero(LABELS_N >= 0)
    found = {
        "id": kept,
        "label": LABELS_N[kept],
        "prediction": (LABELS_N[kept] + (kept > 10)) % 4,
        "weight": np.ones(len(kept)),
    }
    finish.write_predictions(tmp_path, table, found)
    read = history._read_predictions(tmp_path / "predictions.npz")
    counts, names = history.confusion(read)
    assert np.trace(counts) == (kept <= 10).sum()
    assert names == ["0", "1", "2", "3"]
    worst = history.mistakes(read)
    assert [one["id"] for one in worst] == [number for number in kept if number > 10]
    assert [one["label"] for one in worst] == [str(LABELS_N[one["id"]]) for one in worst]
    np.testing.assert_array_equal(worst[0]["image"], IMAGES[worst[0]["id"]])
    numbers = {"id": kept, "target": IMAGES[kept], "prediction": IMAGES[kept] * 2}
    finish.write_predictions(tmp_path, table, numbers)
    read = history._read_predictions(tmp_path / "predictions.npz")
    run = history.History(tmp_path, {}, (), read)
    plots = prediction_plots.draw_predictions([run])
    assert [plot.name for plot in plots] == ["predictions"]


def test_of_one_example_there_is_no_r2() -> None:
    """As scikit-learn has it, which warns; a report of 0 would be taken for a bad model."""
    one = {"target": np.ones((1, 2)), "prediction": np.zeros((1, 2)), "weight": np.ones(1)}
    assert np.isnan(Regression(metrics=("r2",)).evaluate(one)["r2"])
