"""A trained model, read from the folder of its run: the averaged parameters, the preparation of its
inputs, the names of its classes, and `predict`.

Nothing in the folder is run or unpickled. A model of jaxtrain's own is built from run.json by its
kind; any other comes from Python: as `model=`, or with the experiment that holds it.
"""

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import config, messages, rng, tree
from jaxtrain.checkpoints import arrays, variables
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.config import record as run_record
from jaxtrain.data import pipeline
from jaxtrain.data.table import ArrayTable, Table
from jaxtrain.errors import UserError
from jaxtrain.inference import answers
from jaxtrain.inference.inputs import Inputs
from jaxtrain.models.lora import LoRA
from jaxtrain.optimizers import SGD
from jaxtrain.train import evaluate, train_step
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.state import TrainState, initial_numbers, initializer
from jaxtrain.tree import Batch

OWN = {
    "model": "jaxtrain.models",
    "task": "jaxtrain.tasks",
    "data": "jaxtrain.data",
    "lora": "jaxtrain.models.lora",
}
"""Where the components of each family are that run.json may name."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with its parameters, and all that its inputs need."""

    model: Any
    task: Any
    state: TrainState
    """Parameters (`state.params`), the model's other variables (`state.collections`)."""
    inputs: Inputs
    class_names: tuple[str, ...]
    """A word for each class, empty if there are none."""
    step: int
    averaged: str
    """Which average the parameters are, in words; empty for the raw ones."""
    record: Mapping[str, Any]
    """run.json."""
    recipe: Recipe
    batch_size: int

    @property
    def params(self) -> tree.PyTree:
        """The parameters that evaluation used."""
        return self.state.params

    def predict(self, given: Any) -> dict[str, np.ndarray]:
        """What the model says of an array of examples, of a dict of arrays by name, or of one
        example, which gives arrays without a batch dim; see `answers`.

        Inputs are raw, as the data was: they are prepared here. `UserError` for another shape,
        dtype or range than those of training.
        """
        rows, single = self.inputs.rows(given)
        found = self.predict_table(ArrayTable(rows))
        found.pop("id")
        return {name: value[0] for name, value in found.items()} if single else found

    def predict_table(self, table: Table) -> dict[str, np.ndarray]:
        """The same for every row of a table, with the row as `id`; only the model's fields are
        read."""
        self.inputs.check_fields(table.fields)
        size = min(self.batch_size, len(table))
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        batches = pipeline.evaluation_batches(_Checked(table, self.inputs), size, sharding)
        found = evaluate.predictions(self._step, self.state, batches)
        return {name: value for name, value in found.items() if name != "weight"}

    def source(self, where: str, experiment: config.Run | None, *, needed: bool) -> Any:
        """The data that the run was trained on, not opened; None if only Python knows it and it is
        not needed."""
        try:
            return component(self.record, "data", experiment, where)
        except UserError:
            if needed:
                raise
            return None

    def names_of(self, predictions: np.ndarray) -> list[str] | None:
        """The words of predicted classes, if they have any."""
        if not self.class_names or predictions.size and predictions.max() >= len(self.class_names):
            return None
        return [self.class_names[int(label)] for label in predictions.ravel()]

    @functools.cached_property
    def _step(self) -> Callable[[TrainState, Batch], dict[str, jax.Array]]:
        recipe = self.recipe

        def step(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
            kept = {name: batch[name] for name in ("id", "weight")}
            outputs = train_step.outputs(recipe, state, train_step.prepared(recipe, batch, None))
            return answers.answers(recipe.task, outputs) | kept

        return jax.jit(step)


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A table whose rows are checked as they are read, and of which only the model's fields are
    taken."""

    table: Table
    inputs: Inputs

    arrays = None
    num_classes = None
    class_names = None

    @property
    def fields(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct(field.shape, field.dtype)
            for name, field in self.inputs.fields.items()
        }

    def __len__(self) -> int:
        return len(self.table)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = self.table.read(indices)
        return {name: field.convert(name, rows[name]) for name, field in self.inputs.fields.items()}


def load(
    workdir: str | Path,
    *,
    checkpoint: str | int = "last",
    model: Any = None,
    task: Any = None,
    experiment: config.Run | None = None,
) -> Trained:
    """The trained model in the folder of a run.

        trained = jaxtrain.load("runs/digits/today")
        trained.predict(images)["prediction"]

    `checkpoint` is last, best or a step. `model` and `task` are for those that only Python knows,
    and so is `experiment`, what the experiment's own function returns. `UserError`, in one line, if
    the folder holds no run, or something that this cannot rebuild.
    """
    if isinstance(model, config.Run):
        raise UserError("load(model=Run): takes the model alone; give the run as experiment=")
    folder = Path(workdir)
    record = read_record(folder)
    where = f"{messages.printable(str(folder))}: run.json"
    if "inputs" not in record:
        raise UserError(
            f"{where} does not say what its inputs need (an older version wrote it); go on with the"
            " run for one step, which records it"
        )
    task = component(record, "task", experiment, where) if task is None else task
    model = component(record, "model", experiment, where) if model is None else model
    if (adapters := lora_of(record, experiment, where)) is not None:
        model = adapters.on(model)
    inputs = Inputs.from_record(record["inputs"]).of_model(model)
    step = chosen_step(folder, str(checkpoint))
    stored = variables.of_step(folder / "checkpoints" / str(step))
    settings = record["config"]
    recipe = Recipe(
        model, task, SGD(), prepare=inputs.prepare, precision=record.get("precision", "fp32")
    )
    return Trained(
        model,
        task,
        _state(recipe, inputs, stored, seed=settings["seed"], step=step),
        inputs,
        tuple(record["data"].get("class_names") or ()),
        step,
        stored.averaged,
        record,
        recipe,
        settings["eval_batch_size"],
    )


def read_record(folder: Path) -> dict[str, Any]:
    """The run.json of a folder; `UserError` if there is none, or it is damaged."""
    shown = messages.printable(str(folder))
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such directory"
        near = "" if folder.exists() else messages.did_you_mean_path(str(folder))
        raise UserError(f"{shown}: {what}{near}; give the folder of a run")
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        _ = record["config"]["seed"], record["data"].get("class_names")
    except FileNotFoundError:
        raise UserError(f"{shown}: holds no run.json; give the folder of a run") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{shown}: run.json is damaged ({type(error).__name__}); restore it"
        ) from error
    return record


def chosen_step(folder: Path, checkpoint: str) -> int:
    """The step that `last`, `best` or a number names; `UserError` listing those that there are."""
    if checkpoint not in ("last", "best") and not checkpoint.isdecimal():
        near = messages.did_you_mean(checkpoint, ("best", "last"))
        raise UserError(
            f"--checkpoint={messages.shown(checkpoint)}: must be best, last or a step{near}"
        )
    checkpoints = Checkpoints(folder)
    step = checkpoints.chosen_step(checkpoint, f"--checkpoint={checkpoint}", messages.warn)
    if step is None:
        raise UserError(
            f"{folder}: no committed checkpoint in {checkpoints.folder}; train it first"
        )
    return step


def component(
    record: Mapping[str, Any], family: str, experiment: config.Run | None, where: str
) -> Any:
    """A part of a run, built from run.json: from the experiment that is given, or by its kind if it
    is jaxtrain's own."""
    recorded = record["config"].get(family)
    if experiment is not None:
        if record.get("name") != experiment.name:
            raise UserError(
                f"{where} is of experiment {record.get('name')!r}, the one given is"
                f" {experiment.name!r}; give its own"
            )
        return run_record.family_from_json(experiment, family, recorded)
    known = _own(family, record.get("classes", {}).get(family, ""))
    if known is None:
        kind = recorded.get("kind") if isinstance(recorded, Mapping) else recorded
        raise UserError(
            f"{where}: {family} {kind!r} is none of jaxtrain's own, and nothing in a run is"
            f" executed; give --experiment=FILE.py, or in Python load(..., {family}=...)"
        )
    none: dict[str, Any] = dict.fromkeys(config.FAMILIES)
    offers = {family: {type(known).__name__: known}}
    template = config.Run(name="", steps=1, offers=offers, **none)
    try:
        return run_record.family_from_json(
            template, family, {**recorded, "kind": type(known).__name__}
        )
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def lora_of(record: Mapping[str, Any], experiment: config.Run | None, where: str) -> LoRA | None:
    """The adapters that a run trained, or None if it trained none."""
    if record["config"].get("lora") is None:
        return None
    lora: LoRA = component(record, "lora", experiment, where)
    return lora if lora.rank else None


def class_of(component: Any) -> str:
    """The class of a component by module and name, for run.json.

    >>> class_of(SGD())
    'jaxtrain.optimizers.common.SGD'
    """
    return f"{type(component).__module__}.{type(component).__qualname__}"


def _own(family: str, name: str) -> Any:
    """A component of jaxtrain of this class, if there is one: only public names are looked at."""
    module = importlib.import_module(OWN[family])
    components = [*module.NAMES.values()]
    for public in getattr(module, "__all__", dir(module)):
        found = getattr(module, public, None)
        if isinstance(found, type) and f"{found.__module__}.{found.__qualname__}" == name:
            components.append(found())
    return next((each for each in components if class_of(each) == name), None)


def _state(
    recipe: Recipe, inputs: Inputs, stored: variables.Stored, *, seed: int, step: int
) -> TrainState:
    """The stored variables as a state that the step can evaluate; `UserError` if they are not those
    of the model."""
    batch = {
        name: jax.ShapeDtypeStruct((1, *field.shape), field.dtype)
        for name, field in inputs.fields.items()
    }
    abstract = jax.eval_shape(initializer(recipe, batch), initial_numbers(recipe), np.uint32(seed))
    wanted = {"params": abstract.params, **abstract.collections}
    specs = arrays.specs(wanted)
    problem = arrays.misfit(stored.specs, specs) or next(
        (
            f"{path} is {stored.specs[path][0]}, not {dtype}"
            for path, (dtype, _) in specs.items()
            if not arrays.castable(stored.specs[path][0], dtype)
        ),
        "",
    )
    if problem:
        raise UserError(
            f"checkpoint step {step} does not fit {type(recipe.model).__name__}: {problem}; is it"
            " the model of that run?"
        )
    values = {
        # the average of narrow floats is kept wider than they are
        path: value if specs[path][0].startswith("key<") else value.astype(specs[path][0])
        for path, value in stored.read().items()
    }
    tree_of = arrays.to_devices(values, wanted)
    return dataclasses.replace(
        abstract,
        step=jnp.int32(step),
        params=tree_of.pop("params"),
        collections=tree_of,
        opt_state=(),
        ema=None,
        hyper={},
        key=rng.root(seed),
        position=(),
        scaling=None,
    )
