"""The parts of a run, built from its configuration: lengths, recipe, data feeds and evaluators."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain import config, messages, optimizers, precision, schedules, tasks
from jaxtrain.config import record as run_record
from jaxtrain.config import values
from jaxtrain.config.step_options import options_of
from jaxtrain.data import checks, label_checks, mixture, pipeline, statistics
from jaxtrain.data.pipeline import BatchLoader
from jaxtrain.data.splits import Splits
from jaxtrain.data.table import Table
from jaxtrain.errors import RowsTooLong, UserError, greatest_length
from jaxtrain.fields import fields_of
from jaxtrain.parallel import sharding
from jaxtrain.processes import group
from jaxtrain.runner.compile import Execution, Reproducible, Sharded
from jaxtrain.train import loop
from jaxtrain.train import selection as best
from jaxtrain.train.lowering import Programs
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.selection import Selection
from jaxtrain.train.state import TrainState
from jaxtrain.tree import Batch

MOST_LOG_STEPS = 50
"""The most steps between two lines of metrics, unless --log_every says otherwise."""
MOST_STEPS = 2**31 - 1
"""The step is an int32, on every device."""
MOST_MEASURED = 10_000
"""How many examples of a data set that is not in memory its statistics are measured on."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A run's horizons in steps; 0 is never."""

    total: int
    per_epoch: float
    evaluate: int
    save: int
    keep_every: int | None
    log: int
    tokens_per_step: int | None = None
    """How many tokens a step is trained on, where the task counts tokens."""
    sample: int = 0


def accepted(run: config.Run) -> config.Run:
    """The run with components in place of Optax transformations and functions of the step, among
    what it offers, too; `UserError` for what is neither."""
    for family in config.FAMILIES:
        given = getattr(run, family)
        if given is None and family not in ("augment", "lora"):
            example = "Constant(warmup=0.0)" if family == "schedule" else "one of its kind"
            raise UserError(f"{family}=None: a run needs one; give {example}")
        # A class can be a model: of NNX or Equinox, made by the run (`adapters`).
        if isinstance(given, type) and family != "model":
            raise UserError(
                f"{family}={given.__name__}: a class; give one of its kind, such as"
                f" {given.__name__}()"
            )
    of = {"optimizer": optimizers.of, "schedule": schedules.of}
    changes = {
        family: of[family](getattr(run, family))
        for family in of
        if getattr(run, family) is not None
    }
    offers = {
        family: {name: of[family](each) if family in of else each for name, each in named.items()}
        for family, named in run.offers.items()
    }
    return config.replaced(run, {**changes, "offers": offers})


def open_data(run: config.Run) -> Splits:
    """The data of a run; rows of text that are too long are refused with the greatest length that
    the text, the batch and the model allow."""
    try:
        return run.data.open()
    except RowsTooLong as error:
        seen = getattr(run.model, "max_length", None)
        learned = getattr(run.model, "positions", "learned") == "learned"
        most = error.greatest(run.batch_size)
        most = min(most, seen) if learned and isinstance(seen, int) else most
        if most < 1:
            raise UserError(
                f"{error.what}; give it more of the text, or lower --batch_size={run.batch_size}"
            ) from None
        rows = messages.counted(run.batch_size, "row")
        raise UserError(f"{error.what}; use <= {most} for a batch of {rows}") from None


def tokens_per_step(run: config.Run, train: Table) -> int | None:
    """How many tokens a batch holds; None if the task counts none, or not in such data."""
    if getattr(run.task, "unit", "") != "tokens":
        return None
    shapes = {
        name: jax.ShapeDtypeStruct((run.batch_size, *field.shape), field.dtype)
        for name, field in train.fields.items()
    }
    try:
        return tasks.units_of(run.task, shapes)[1]
    except (KeyError, ValueError):
        return None  # the check of task and data says what does not fit


def _shorter_rows(run: config.Run, rows: int) -> str:
    """That shorter windows of a text give enough of them for a batch, if they do."""
    length, stride = getattr(run.data, "length", None), getattr(run.data, "stride", None)
    if getattr(run.data, "layout", "") != "windows" or not isinstance(length, int):
        return ""
    least = length + (stride or length) * (rows - 2) + 1  # to predict, at least
    most = greatest_length(max(least, length), run.batch_size, stride)
    return f", or --data.length={most}" if most > 0 else ""


def _unpacked(run: config.Run, train: Table | None) -> str:
    """That the rows are packed, and what gives enough of them for a batch; nothing of others."""
    length = getattr(run.data, "length", None)
    if getattr(run.data, "layout", "") != "packed" or train is None or not isinstance(length, int):
        return ""
    segments_NT = train.read(np.arange(len(train)))["segments"]
    sizes = np.concatenate([np.bincount(row_T)[1:] for row_T in segments_NT])
    whole = "padded" in values.describe(_type_of(run.data, "layout"))
    ways: list[str] = []
    # Rows that are full hold so many tokens at least, so there are more of shorter ones.
    shorter = int(sizes.sum()) // run.batch_size - 1
    if shorter > 0 and (not whole or shorter >= sizes.max() - 1):
        ways.append(f"--data.length={shorter}")
    if whole and len(sizes) >= run.batch_size:
        ways.append(f"--data.layout=padded for {messages.counted(len(sizes), 'row')}")
    return "".join(f", or {way}" for way in ways) + (
        f" ({messages.counted(len(sizes), 'text')} packed into"
        f" {messages.counted(len(train), 'row')})"
    )


def _type_of(component: Any, name: str) -> Any:
    return next(field.type for field in fields_of(component) if field.name == name)


def lengths(
    run: config.Run,
    num_examples: int,
    step_tokens: int | None = None,
    train: Table | None = None,
) -> Lengths:
    """Turns epochs, tokens, percentages and horizons into steps; `train` is what words of packed
    rows are made of.

    `UserError` if the batch is larger than the train split: it would hold an example twice.
    """
    if run.batch_size > num_examples:
        raise UserError(
            f"--batch_size={run.batch_size}: train split has"
            f" {messages.counted(num_examples, 'example')}, so a batch would repeat some; use <="
            f" {num_examples}{_shorter_rows(run, num_examples)}{_unpacked(run, train)}"
        )
    per_epoch = num_examples / run.batch_size
    given = next(name for name in config.LENGTHS if getattr(run, name) is not None)
    if run.tokens is not None and not step_tokens:
        raise UserError(
            f"--tokens={values.text(run.tokens)}: the task {type(run.task).__name__} counts no"
            " tokens of this data; give --steps or --epochs"
        )
    total = {
        "steps": run.steps or 1,
        "epochs": max(1, round((run.epochs or 0) * per_epoch)),
        "tokens": -(-(run.tokens or 0) // (step_tokens or 1)),  # at least so many
    }[given]
    if total > MOST_STEPS:
        raise UserError(
            f"--{given}={values.text(getattr(run, given))}: {total} steps are more than are"
            f" counted; must be at most {MOST_STEPS}"
        )

    def every(horizon: Any) -> int:
        return (
            max(
                1,
                round(
                    horizon.steps(
                        total_steps=total, steps_per_epoch=per_epoch, tokens_per_step=step_tokens
                    )
                ),
            )
            if horizon.value
            else 0
        )

    keep_every = None if run.keep_every is None else every(run.keep_every)
    # Short runs, too, have a curve of some fifty points.
    log = run.log_every or min(MOST_LOG_STEPS, max(1, total // 50))
    evaluate, save = every(run.eval_every), every(run.checkpoint_every)
    sample = every(run.sample_every)
    return Lengths(total, per_epoch, evaluate, save, keep_every, log, step_tokens, sample)


def chosen_precision(run: config.Run, mesh: Mesh) -> str:
    """The precision of the run on the devices of the mesh, with `auto` decided by the card;
    `UserError` if the card does not have it."""
    devices = [
        (device, getattr(device, "compute_capability", None) if device.platform == "gpu" else None)
        for device in mesh.devices.flat
    ]
    # Of all cards, also those of other processes: they run one program.
    device, capability = min(devices, key=lambda each: precision.version(each[1]) or (0, 0))
    if run.precision == "auto":
        return precision.choose(device.platform, capability)
    precision.check(run.precision, device.platform, capability, device.device_kind)
    return run.precision


def identity_of(run: config.Run, splits: Splits) -> dict[str, Any] | None:
    """What says which data a run is trained on, for what is kept of it from run to run; None if it
    comes from no files, so that nothing would tell a change."""
    if not splits.fingerprint or splits.modified_ns is None:
        return None
    return {
        "fingerprint": splits.fingerprint,
        "modified_ns": splits.modified_ns,
        "data": run_record.to_json(run)["data"],
    }


def recipe_of(
    run: config.Run, train: Table, length: Lengths, *, identity: Mapping[str, Any] | None = None
) -> Recipe:
    """What one step of the run does; with the `identity` of the data, its statistics are kept."""
    measure = functools.partial(_statistics, train, identity) if run.normalize else None
    task: Any = run.task
    model, optimizer = run.model, run.optimizer
    if run.lora is not None:
        model = run.lora.on(model)
        optimizer = dataclasses.replace(optimizer, frozen=(*optimizer.frozen, *run.lora.frozen))
    return Recipe(
        model,
        task.with_data(train) if hasattr(task, "with_data") else task,
        optimizer,
        schedule=schedules.resolve(
            run.schedule,
            total_steps=length.total,
            steps_per_epoch=length.per_epoch,
            tokens_per_step=length.tokens_per_step,
        ),
        total_steps=float(length.total),
        prepare=statistics.preparation(train, measure),
        augment=run.augment,
        order=mixture.order_of(
            train,
            batch_size=run.batch_size,
            total_steps=length.total,
            tokens_per_step=length.tokens_per_step,
        ),
        **options_of(run),
    )


def _statistics(train: Table, identity: Mapping[str, Any] | None) -> statistics.Statistics:
    """Mean and deviation, measured by process 0 for all: they are constants of the one program."""
    limit = None if train.arrays is not None else MOST_MEASURED
    found = group.on_main(
        lambda: dataclasses.asdict(statistics.measure_once(train, limit, identity=identity))
    )
    return statistics.Statistics(tuple(found["mean_C"]), tuple(found["std_C"]))


def execution(run: config.Run, mesh: Mesh) -> Execution:
    """How the programs of the run are executed; `UserError` if its batch does not fit the mesh."""
    chosen = (
        Reproducible(mesh, run.logical_shards)
        if run.reproducible
        else Sharded(mesh, debug_nans=run.debug_nans)
    )
    chosen.check(run.batch_size)
    return chosen


def expression_of(run: config.Run, name: str) -> str:
    """What a flag, or a field of the data, says of a set."""
    said = dict(run.evaluate).get(name, getattr(run.data, name, ""))
    return said if isinstance(said, str) else type(said).__name__


def with_evaluation_sets(run: config.Run, splits: Splits) -> Splits:
    """The splits with the sets of --evaluate opened; `UserError` for one that is not there, or that
    is none of the run's data."""
    sets: dict[str, Table] = {}
    notes = list(splits.notes)
    for name, source in run.evaluate:
        opened = _open_set(run, name, source)
        tables = (opened.test, opened.validation, opened.train)
        table = next(table for table in tables if table is not None)
        here, own = table.class_names, splits.train.class_names
        if here and own and tuple(here) != tuple(own):
            raise UserError(
                f"{label_checks.flag_of(name, expression_of(run, name))}: its classes are"
                f" {', '.join(here[:8])}, the run learns {', '.join(own[:8])}; give a set with the"
                " same classes in the same order"
            )
        if isinstance(source, str):
            notes += [note for note in opened.notes if note not in notes]
        else:
            # The splits of one source were compared when it was opened.
            flag = label_checks.flag_of(name, expression_of(run, name))
            alike = checks.check_alike({"train": splits.train, name: table}, flag)
            notes += [f"{name}: {note}" for note in (*opened.notes, *alike)]
        sets[name] = table
    return dataclasses.replace(splits, evaluate=sets, notes=tuple(notes))


def _open_set(run: config.Run, name: str, source: Any) -> Splits:
    """A set as the test split of some source: of the run's own, or of another."""
    if not isinstance(source, str):
        if not hasattr(source, "open"):
            raise UserError(
                f"evaluate={{{name!r}: {type(source).__name__}}}: give a split of the data as text,"
                " or a data source, which has open()"
            )
        return source.open()
    flag = f"--evaluate={name}="
    if not {"test", "validation"} <= {field.name for field in fields_of(run.data)}:
        raise UserError(
            f"{flag}{source}: the data source {type(run.data).__name__} has no split expressions;"
            " give a source of its own in Python, Run(evaluate={...})"
        )
    try:
        return config.replaced(run.data, {"test": source, "validation": ""}).open()
    except UserError as error:
        raise UserError(str(error).replace("--data.test=", flag)) from None


def selection(run: config.Run, splits: Splits, programs: Programs) -> Selection:
    """What the best checkpoint is chosen by; `UserError` if nothing that is evaluated on the way
    can say it."""
    sets = list(splits.on_the_way)
    chosen = best.parse(run.best, sets, tasks.score_of(run.task))
    if run.stop_after is not None and chosen.split not in sets:
        raise UserError(
            f"--stop_after={run.stop_after}: no validation split tells whether the run gets better;"
            " set --data.validation, or --best=SET/METRIC with a set of --evaluate"
        )
    if run.best:
        metric = run.best.partition(",")[0].rpartition("/")[2]
        batch = programs.batch_with_ids()
        found = jax.eval_shape(programs.eval_step, programs.state, batch)
        # What is computed from a whole set is known at the first evaluation.
        if not tasks.measures_whole_sets(run.task):
            known = tasks.with_derived(run.task, dict.fromkeys(found, 1.0))
            best.check_metric(f"--best={run.best}", metric, known)
    return chosen


def place_data(run: config.Run, train: Table, mesh: Mesh) -> Batch | None:
    """The train split in device memory, or None if it is to be streamed; `UserError` if it was
    asked for and cannot be."""
    if run.device_data == "no":
        return None
    stats = mesh.local_devices[0].memory_stats() or {}
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    # What process 0 decides holds for all: a program over resident data and one over batches do not
    # meet.
    if not group.from_main(pipeline.fits_on_device(train, free)):
        if run.device_data == "yes":
            raise UserError(
                "--device_data=yes: the train split is not in host memory, or larger than half of"
                " what is free on the device; use auto"
            )
        return None
    return pipeline.resident_arrays(train, sharding.replicated(mesh))


def evaluation_size(run: config.Run, table: Table, execution: Execution) -> int:
    """The batch size of evaluation: as asked for, but no larger than the set needs, and rounded up
    so that each device has its share."""
    return -(-min(run.eval_batch_size, len(table)) // execution.parts) * execution.parts


def evaluators(
    run: config.Run, splits: Splits, programs: Programs, execution: Execution
) -> dict[str, loop.Evaluate]:
    """What evaluates each held-out set that there is; one program for all."""
    means = execution.evaluation(programs)

    def evaluator(table: Table) -> loop.Evaluate:
        return lambda state: tasks.with_derived(
            programs.recipe.task, means(state, batches(run, table, execution))
        )

    return {name: evaluator(table) for name, table in splits.held_out.items()}


def open_loader(
    run: config.Run, state: TrainState, train: Table, recipe: Recipe, mesh: Mesh
) -> BatchLoader:
    """The train split as batches read ahead, from where the state stands."""
    return BatchLoader(
        train,
        order=recipe.order,
        position=jax.device_get(state.position),
        batch_size=run.batch_size,
        sharding=sharding.batch(mesh),
    )


def host_batches(run: config.Run, train: Table, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """The batches of a run in its order, in host memory."""
    position = recipe.order.start(run.seed)
    while True:
        ids_B = recipe.order.ids(position, run.batch_size)
        yield dict(train.read(ids_B)) | {"id": ids_B}
        position = recipe.order.advance(position, run.batch_size)


def batches(run: config.Run, table: Table, execution: Execution) -> Iterator[Batch]:
    """One pass over a table for evaluation."""
    return pipeline.evaluation_batches(
        table, evaluation_size(run, table, execution), sharding.batch(execution.mesh)
    )
