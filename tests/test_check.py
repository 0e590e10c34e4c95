"""What the check before the first step finds out on shapes alone, each in one line."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxtrain import config, metrics
from jaxtrain.data import Arrays
from jaxtrain.errors import UserError
from jaxtrain.optimizers import SGD
from jaxtrain.parallel import mesh as meshes
from jaxtrain.runner import build, main, preflight
from jaxtrain.tasks import Regression
from jaxtrain.train import check, explain
from jaxtrain.train.recipe import Recipe

SHAPES = {
    "x": jax.ShapeDtypeStruct((8, 4), jnp.float32),
    "y": jax.ShapeDtypeStruct((8,), jnp.float32),
}


@dataclasses.dataclass(frozen=True)
class Squares:
    """Gives what `how` says instead of sums."""

    how: str = "right"

    def inputs(self, batch: Any) -> Any:
        return batch["x"]

    def loss(self, outputs: Any, batch: Any, *, train: bool = True) -> Any:
        loss_B = jnp.square(outputs[:, 0].astype(jnp.float32) - batch["y"])
        pair = metrics.weighted(loss_B, batch.get("weight"))
        return {
            "right": {"loss": pair},
            "scalar": loss_B.mean(),
            "mean": {"loss": loss_B.mean()},
            "no loss": {"accuracy": pair},
            "not added up": {"loss": (loss_B, pair[1])},
            "three": {"loss": (*pair, pair[0])},
        }[self.how]


class NoTrain(Squares):
    def loss(self, outputs: Any, batch: Any) -> Any:
        return super().loss(outputs, batch)


class Required(Squares):
    def loss(self, outputs: Any, batch: Any, *, train: bool) -> Any:
        return super().loss(outputs, batch)


def checked(model: Any, task: Any = None, **options: Any) -> check.Checked:
    return check.check(Recipe(model, task or Squares(), SGD(), **options), SHAPES)


TASKS: dict[str, tuple[Any, str]] = {
    "scalar": (Squares("scalar"), "task=Squares: loss gave float32[]; it must give {'loss': (sum"),
    "mean": (Squares("mean"), "task=Squares: loss gave float32[] as 'loss'; it must give"),
    "no loss": (Squares("no loss"), "task=Squares: loss gave accuracy and no 'loss'; it must give"),
    "not added up": (Squares("not added up"), "the sum of 'loss' is float32[8]; it must be one"),
    "three": (Squares("three"), "task=Squares: loss gave tuple as 'loss'"),
    "no train": (NoTrain(), "task=NoTrain: loss takes (outputs, batch) and no train="),
    "no task": (object(), "task=object: has no inputs; a task has inputs(batch) and loss"),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_that_is_none_is_one_line(name: str) -> None:
    """And the task that the line writes out, word for word, is one."""
    task, text = TASKS[name]
    with pytest.raises(ValueError) as caught:
        checked(nn.Dense(1), task)
    said = str(caught.value)
    assert text in said and "\n" not in said
    head = re.search(r"(?:def )?loss\((?:self, )?outputs, batch, \*, train=True\)", said)
    sums = re.search(r"for example (.*)", said)
    assert head or sums
    body = sums[1] if sums else "{'loss': metrics.weighted(loss_B, batch.get('weight'))}"
    assert checked(nn.Dense(1), written(body)).outputs.shape == (8, 1)


def written(body: str) -> Any:
    """A task whose loss gives what is written."""
    names: dict[str, Any] = {"jnp": jnp, "metrics": metrics, "Squares": Squares}
    lines = (
        "class Written(Squares):",
        "    def loss(self, outputs, batch, *, train=True):",
        "        loss_B = jnp.square(outputs[:, 0] - batch['y'])",
        f"        return {body}",
    )
    exec("\n".join(lines), names)  # noqa: S102
    return names["Written"]()


def test_a_task_may_require_train() -> None:
    assert checked(nn.Dense(1), Required()).outputs.shape == (8, 1)


class OnlyInTraining(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dense(1)(nn.Dense(4, name="aux")(x) if train else x)


class InitialisedToo(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        use = train or self.is_initializing()
        return nn.Dense(1)(nn.Dense(4, name="aux")(x) if use else x)


class Growing(nn.Module):
    keep: bool = False

    @nn.compact
    def __call__(self, x, train: bool):
        seen = self.variable("memory", "seen", lambda: jnp.zeros((0, 4)))
        if train:
            seen.value = jnp.concatenate([seen.value, x])[: 0 if self.keep else None]
        return nn.Dense(1)(x)


class Widening(nn.Module):
    keep: bool = False

    @nn.compact
    def __call__(self, x, train: bool):
        count = self.variable("counters", "calls", lambda: jnp.int32(0))
        if train:
            new = count.value + 1.0
            count.value = new.astype(count.value.dtype) if self.keep else new
        return nn.Dense(1)(x)


class Cell(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, carry, x):
        carry = nn.Dense(4, dtype=self.dtype, name="hard")(carry + x)
        return carry, carry


class Scanned(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, length=3)
        cell = scan(self.dtype, name="cell")
        return cell(x, jnp.broadcast_to(x[None], (3, *x.shape)))[0][:, :1]


def scanned_pair(params: Any, x: Any) -> Any:
    def body(carry: Any, _: Any) -> Any:
        return (carry @ params["w"]).astype(jnp.float32), None

    return jax.lax.scan(body, x, None, length=2)[0]


def scanned_alike(params: Any, x: Any) -> Any:
    return jax.lax.scan(lambda carry, _: (carry @ params["w"], None), x, None, length=2)[0]


def transformed_pair(params: Any, x: Any) -> Any:
    return jnp.abs(jnp.fft.rfft(x))[:, :2] @ params["w"][:2]


def transformed_wide(params: Any, x: Any) -> Any:
    return transformed_pair(params, x.astype(jnp.float32))


class Spectrum(nn.Module):
    wide: bool = False

    @nn.compact
    def __call__(self, x):
        x = x.astype(jnp.float32) if self.wide else x
        return nn.Dense(1)(jnp.abs(jnp.fft.rfft(x)))


class Inverse(nn.Module):
    wide: bool = False

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", lambda key, shape: jnp.eye(4), (4, 4))
        kernel = kernel.astype(jnp.float32) if self.wide else kernel
        return nn.Dense(1)(x @ jnp.linalg.inv(kernel))[:, 0]


class NeverRuns(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jax.lax.dot(x, jnp.ones((4, 1), jnp.int32)) + jnp.float32(jax.lax.rem(x, 2))


def of_ones(width: int, apply: Any) -> Any:
    return (lambda key, x: {"w": jnp.ones((4, width))}, apply)


MODELS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "parameters of training": (
        OnlyInTraining(),
        {},
        "model=OnlyInTraining: Could not find parameter named",
    ),
    "growing": (Growing(), {}, "memory/seen is float32[0, 4] and after a training step float32[8"),
    "widening": (Widening(), {}, "counters/calls is int32[] and after a training step float32[]"),
    "scan in bf16": (
        Scanned(),
        {"precision": "bf16"},
        "--precision=bf16: dtypes part at Dense (cell/hard): ",
    ),
    "scan in fp16": (Scanned(), {"precision": "fp16"}, "--precision=fp16: dtypes part at Dense"),
    "fft in bf16": (
        of_ones(2, transformed_pair),
        {"precision": "bf16"},
        "RFFT input must be float32 or float64, got bfloat16; let it compute in float32 there",
    ),
    "scan of a pair": (
        of_ones(4, scanned_pair),
        {"precision": "bf16"},
        "--precision=bf16: dtypes part at scanned_pair (test_check.py:",
    ),
}


FOLLOWED: dict[str, Any] = {
    "parameters of training": InitialisedToo(),
    "growing": Growing(keep=True),
    "widening": Widening(keep=True),
    "scan in bf16": Scanned(dtype=None),
    "scan in fp16": Scanned(dtype=None),
    "fft in bf16": of_ones(2, transformed_wide),
    "scan of a pair": of_ones(4, scanned_alike),
}
"""The models of `MODELS` after what their lines say."""


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_train_is_one_line(name: str) -> None:
    model, options, text = MODELS[name]
    with pytest.raises(ValueError) as caught:
        checked(model, **options)
    words = str(caught.value)
    assert text in words and "\n" not in words, words
    if name != "growing" and name != "widening":
        train = "False" if "scan" in name or "fft" in name else "True"
        assert f"(while running the model on shapes, train={train}: x float32[8, 4], y" in words
    checked(FOLLOWED[name], **options)
    if "precision" in options:  # the other remedy
        assert "or use --precision=fp32" in words
        checked(model, precision="fp32")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_there_is_in_float32_only_is_one_line(precision: str) -> None:
    with pytest.raises(UserError) as caught:
        checked(Spectrum(), precision=precision)
    words = str(caught.value)
    rule = f"--precision={precision}: Spectrum.__call__ (test_check.py:"
    assert words.startswith(rule) and "runs in float32 only: RFFT input must be float32" in words
    assert "or use --precision=fp32 (while running the model on shapes" in words
    checked(Spectrum(), precision="fp32")  # the remedies
    checked(Spectrum(wide=True), precision=precision)


def test_what_only_lowering_finds_out_is_one_line(tmp_path: Path) -> None:
    arrays = {"image": np.eye(16, 4, dtype=np.float32), "target": np.eye(16, 1)[:, 0] / 2}
    run = config.Run(
        name="inverse",
        model=Inverse(),
        data=Arrays.of(arrays, train="train[:50%]", test=""),
        task=Regression(),
        optimizer=SGD(),
        steps=1,
        batch_size=8,
        precision="bf16",
        mesh="data:1",
        workdir=str(tmp_path),
    )
    with pytest.raises(
        UserError,
        match=r"^--precision=bf16: (model=Inverse runs in float32|dtypes part at Inverse)",
    ):
        main.launch(run, [])
    for change in ({"model": Inverse(wide=True)}, {"precision": "fp32"}):  # the remedies
        folder = str(tmp_path / next(iter(change)))
        assert main.launch(dataclasses.replace(run, workdir=folder, **change), []) == 0


def test_a_fault_in_every_precision_is_not_laid_to_the_precision() -> None:
    for precision in ("fp32", "bf16"):
        with pytest.raises(TypeError, match="rem requires arguments to have equal types|dtype"):
            checked(NeverRuns(), precision=precision)


class Broken(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dense(1)(x @ x if train else x)


def test_another_exception_is_the_users_own_with_a_note() -> None:
    with pytest.raises(TypeError) as caught:
        checked(Broken())
    said = explain.own_lines(caught.value)
    assert "return nn.Dense(1)(x @ x if train else x)" in said
    assert "flax" not in said and "jaxtrain/train" not in said
    wanted = "while running the model on shapes, train=True: x float32[8, 4], y float32[8]"
    assert explain.noted(caught.value) == wanted


class Sower(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "aux_loss", jnp.mean(x))
        noise = jax.random.normal(self.make_rng("z"), x.shape)
        return nn.Dense(1)(x + noise)


def test_notes_say_what_nobody_would_guess() -> None:
    notes = checked(Sower()).notes
    assert len(notes) == 2
    assert "draws random numbers in evaluation: there each example has a key of its own" in notes[0]
    assert notes[1].endswith("to add it, --aux_losses='aux_loss=1'")
    assert len(checked(Sower(), aux_losses=(("aux_loss", 1.0),)).notes) == 1


def test_the_model_is_traced_once_for_each_pass() -> None:
    traced: list[bool] = []

    def apply(params: Any, x: Any, train: bool) -> Any:
        traced.append(train)
        return x @ params["w"]

    checked((lambda key, x: {"w": jnp.ones((4, 1))}, apply))
    assert traced == [False, True]


@pytest.mark.slow
def test_digits_trains_in_64_bits(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "experiments/digits.py", "--steps=2", f"--workdir={tmp_path}/run"]
    command += ["--noreport", "--notensorboard", "--mesh=data:1"]
    environment = os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    environment |= {"PYTHONPATH": str(root)}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class HardCoded(nn.Module):
    """Its dropout and averages never hear of training."""

    @nn.compact
    def __call__(self, x, noisily=0):
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=True)(x))


def test_layers_that_no_switch_reaches_are_noted() -> None:
    (note,) = checked(HardCoded()).notes
    assert note.startswith("BatchNorm_0 and 1 more: does in training what it does in evaluation;")


class Moving(nn.Module):
    reached: bool = False

    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=self.reached and not train)(x))


def test_averages_that_move_in_evaluation_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model=Moving: moves its averages \(batch_stats\) in"):
        checked(Moving())
    checked(Moving(reached=True))  # the remedy


class CountsAll(Squares):
    def loss(self, outputs: Any, batch: Any, *, train: bool = True) -> Any:
        loss_B = jnp.square(outputs[:, 0] - batch["y"])
        return {"loss": (loss_B.sum(), jnp.float32(len(loss_B)))}


class Copying(CountsAll):
    def loss(self, outputs: Any, batch: Any, *, train: bool = True) -> Any:
        return Squares().loss(outputs, {**batch}, train=train)


@pytest.mark.parametrize(
    ("task", "size", "padded"),
    [(CountsAll(), 16, 2), (CountsAll(), 15, 0), (Squares(), 16, 0), (Copying(), 16, 0)],
)
def test_a_loss_that_counts_padding_is_refused_where_there_is_any(
    task: Any, size: int, padded: int
) -> None:
    arrays = {"x": np.zeros((70, 4), np.float32), "y": np.zeros(70, np.float32)}
    source = Arrays.of(arrays, train="train[:40]", validation="train[40:]", test="")
    run = config.Run(
        name="toy",
        model=nn.Dense(2),
        data=source,
        task=task,
        optimizer=SGD(),
        steps=2,
        eval_batch_size=size,
    )
    execution = build.execution(run, meshes.make("data:1"))
    said = ""
    try:
        preflight.padding(run, source.open(), execution, checked(nn.Dense(2), task))
    except UserError as error:
        said = str(error)
    assert said == (
        f"task=CountsAll: its loss does not look at batch['weight'], which is 0 for the {padded}"
        " rows that fill the last batch of validation (30 examples in batches of 16); give"
        " {'loss': metrics.weighted(loss_B, batch.get('weight'))}"
        if padded
        else ""
    )


class Cached(nn.Module):
    """Keeps the last batch, as a decoder keeps keys and values."""

    @nn.compact
    def __call__(self, x):
        last = self.variable("cache", "last", jnp.zeros_like, x)
        return nn.Dense(1)(x + 0 * last.value)[:, 0]


def test_a_cache_of_the_training_batch_is_found_out_before_the_training(tmp_path: Path) -> None:
    arrays = {"image": np.ones((40, 4), np.float32), "target": np.ones(40, np.float32)}
    run = config.Run(
        name="cached",
        model=Cached(),
        data=Arrays.of(arrays, train="train[:16]", validation="train[16:]", test=""),
        task=Regression(),
        optimizer=SGD(),
        steps=1,
        batch_size=8,
        mesh="data:1",
        workdir=str(tmp_path),
        report=False,
        tensorboard=False,
    )
    with pytest.raises(UserError) as caught:
        main.launch(run, [])
    said = str(caught.value)
    assert said.startswith(
        "--data.validation=train[16:]: the model cannot be run on its 24 rows at a time ("
    )
    assert said.endswith("so try --eval_batch_size=8")
    assert main.launch(dataclasses.replace(run, eval_batch_size=8), []) == 0  # the remedy
