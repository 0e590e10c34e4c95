"""Where a run starts: what lies in its folder, whether it may go on from there, and the state to
begin with (new, resumed, or with parameters from elsewhere)."""

import contextlib
import dataclasses
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import config, messages, rng, tree, weights
from jaxtrain.checkpoints import arrays, committed, positions, variables, warm_start, weights_file
from jaxtrain.checkpoints.checkpoints import BASE, Checkpoints
from jaxtrain.data.text.tokenizers import SAVED
from jaxtrain.errors import CheckpointError, UserError
from jaxtrain.models.lora import ADAPTERS
from jaxtrain.precision.loss_scale import LossScale
from jaxtrain.processes import group
from jaxtrain.report import changes_file
from jaxtrain.runner import workdir
from jaxtrain.runner.compile import Execution
from jaxtrain.train.lowering import Programs
from jaxtrain.train.state import TrainState, initial_numbers

_MODEL = ("params", "collections")
"""The parts of a state that a checkpoint must hold as they are; what is missing of the others can
be begun anew."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What lies in the folder of a run, as process 0 sees it; the others take its word, for it may
    be writing there already when they look."""

    record: dict[str, Any] | None
    """run.json, if a run is there."""
    notes: list[str]
    run_id: str
    newest: int | None
    """The step to go on from."""
    loop: dict[str, Any]
    """What the loop said of itself when it committed that step."""
    later: list[int]
    """The steps after it, which --rewind sets aside."""


def inspect(
    run: config.Run,
    folder: Path,
    fingerprint: str,
    abstract: TrainState,
    given: Collection[str] = (),
) -> Found:
    """What lies in the folder; `UserError`, in every process, if the run may not go on from it.
    `abstract` is the shape of its state, `given` the names of the flags that were given."""
    found = group.on_main(
        lambda: dataclasses.asdict(_inspect(run, folder, fingerprint, abstract, given))
    )
    return Found(**found)


def _inspect(
    run: config.Run, folder: Path, fingerprint: str, abstract: TrainState, given: Collection[str]
) -> Found:
    record = workdir.read(folder)
    # A numbered folder is a checkpoint, be it damaged by now.
    notes: list[str] = []
    if record is not None and not committed.numbered(folder / "checkpoints"):
        notes = workdir.begun_anew(folder, record, run, fingerprint=fingerprint)
    if notes:
        record = None
    else:
        notes = _check_folder(run, folder, record, fingerprint, abstract, given)
    run_id = (record or {}).get("run_id") or os.urandom(8).hex()
    checkpoints = Checkpoints(folder, run_id=run_id)
    newest = _newest(run, folder, checkpoints, record)
    loop = {} if newest is None else checkpoints.loop(newest)
    later = _later(run, checkpoints, newest) if run.checkpoint != "last" else []
    return Found(record, notes, run_id, newest, loop, later)


def _check_folder(
    run: config.Run,
    folder: Path,
    record: dict[str, Any] | None,
    fingerprint: str,
    abstract: TrainState,
    given: Collection[str],
) -> list[str]:
    """What differs from the run that is there; `UserError` if it may not."""
    if record is None:
        for name in ("metrics.jsonl", "samples.jsonl", SAVED):
            if (folder / name).exists():
                raise UserError(
                    f"--workdir={folder}: holds {name} but no run.json; restore it, or use a new"
                    " workdir"
                )
        count = workdir.foreign_files(folder)
        return [f"note: {count} files not made by jaxtrain are left alone"] if count else []
    return workdir.check_drift(
        folder,
        record,
        run,
        fingerprint=fingerprint,
        misfit=lambda: _misfit(folder, abstract),
        given=given,
    )


def _misfit(folder: Path, abstract: TrainState) -> str:
    """How the parameters of the newest checkpoint do not fit a state, or nothing if they do, or if
    there is none."""
    checkpoints = Checkpoints(folder)
    step = max(checkpoints.steps(), default=None)
    if step is None:
        return ""
    stored = checkpoints.specs(step)
    wanted = arrays.specs({"params": abstract.params, "collections": abstract.collections})
    kept = {path: spec for path, spec in stored.items() if path.partition("/")[0] in _MODEL}
    if problem := arrays.misfit(kept, wanted):
        return problem
    return next(
        (
            f"{path} {kept[path][0]} vs {spec[0]}"
            for path, spec in wanted.items()
            if kept[path][0] != spec[0]
        ),
        "",
    )


def _newest(
    run: config.Run, folder: Path, checkpoints: Checkpoints, record: dict[str, Any] | None
) -> int | None:
    """The step to go on from; `UserError` where --resume forbids or demands it."""
    place = folder / "checkpoints"
    if run.resume == "never":
        if checkpoints.steps():
            raise UserError(
                f"--resume=never: {place} holds checkpoints up to step"
                f" {max(checkpoints.steps())}; use a new --workdir"
            )
        return None
    newest = checkpoints.resume_step(run.resume, messages.warn)
    if newest is None and run.eval_only:
        raise UserError(f"--eval_only: no committed checkpoint in {place}")
    if run.checkpoint != "last":
        newest = _chosen(run, checkpoints)
    if newest is not None and record is None:
        raise UserError(
            f"--workdir={folder}: holds checkpoints but no run.json; restore it, or use a new"
            " workdir"
        )
    return newest


def _chosen(run: config.Run, checkpoints: Checkpoints) -> int:
    """The step that --checkpoint names, verified; `UserError` if it is not there."""
    flag = f"--checkpoint={run.checkpoint}"
    step = checkpoints.chosen_step(run.checkpoint, flag, messages.warn)
    if step is None:
        raise UserError(f"{flag}: no committed checkpoint in {checkpoints.folder}")
    if problems := checkpoints.verify(step):
        raise CheckpointError(f"{flag}: step {step}: {problems[0]}")
    return step


def _later(run: config.Run, checkpoints: Checkpoints, chosen: int | None) -> list[int]:
    """The steps after the chosen one; `UserError` if going on would replace them and nobody said
    that it may."""
    later = [step for step in committed.numbered(checkpoints.folder) if step > (chosen or 0)]
    if run.eval_only or not later:
        return []
    if not run.rewind:
        workdir = checkpoints.folder.parent
        raise UserError(
            f"--checkpoint={run.checkpoint}: going on from step {chosen} would replace the later"
            f" steps {', '.join(map(str, later))}; add --rewind to set them aside, or take a new"
            f" --workdir with --init_from={workdir} --init_checkpoint={chosen}"
        )
    return later


def set_aside(folder: Path, found: Found) -> str | None:
    """Moves the checkpoints after the chosen one, and a copy of the metrics, into a folder of their
    own; what was done, in words."""
    if not found.later:
        return None
    place = folder / f"rewound-{time.strftime('%Y%m%d-%H%M%S')}"
    kept = place / "checkpoints"
    kept.mkdir(parents=True)
    for name in ("metrics.jsonl", "samples.jsonl", changes_file.NAME):
        if (folder / name).is_file():
            shutil.copy2(folder / name, place / name)
    if (folder / changes_file.NAME).is_file():
        changes_file.rewind(folder, found.newest or 0)
    # What the steps stand on lies beside them, here and there; links cost nothing.
    for base in (folder / "checkpoints").glob(f"{BASE}*"):
        shutil.copytree(base, kept / base.name, copy_function=os.link)
    # The newest first: a kill on the way leaves a folder that can be gone on from.
    for step in reversed(found.later):
        os.rename(folder / "checkpoints" / str(step), kept / str(step))
    steps = ", ".join(map(str, found.later))
    return f"back to step {found.newest}: steps {steps} and the metrics so far are in {place}"


def starting_state(
    run: config.Run,
    programs: Programs,
    execution: Execution,
    checkpoints: Checkpoints,
    newest: int | None,
    changed: Mapping[str, float],
) -> tuple[TrainState, dict[str, Any]]:
    """The state to begin with and what its checkpoint says besides: restored, or new. `changed` are
    the numbers that are not those of the flags."""
    if newest is None:
        return execution.initialize(programs, run.seed), {}
    # The numbers of the recipe are those of today's flags; the checkpoint has its own, of other
    # names if a part was switched on or off since. What an allowed change adds (a loss scale, an
    # average) begins now, and what it takes away is not read.
    abstract, stored = programs.state, checkpoints.specs(newest)
    there = {path.partition("/")[0] for path in stored}
    wanted = dataclasses.replace(
        abstract,
        hyper={},
        scaling=abstract.scaling if "scaling" in there else None,
        ema=_as_stored("ema", abstract.ema, stored),
        opt_state=_as_stored("opt_state", abstract.opt_state, stored),
    )
    restored, kept = checkpoints.restore(newest, wanted, partial=True)
    values = {**initial_numbers(programs.recipe), **changed}
    numbers = {
        name: group.place(np.asarray(values[name], np.float32), where.sharding)
        for name, where in abstract.hyper.items()
    }
    restored = dataclasses.replace(restored, hyper=numbers)
    return _completed(restored, run, programs, execution), kept


def _as_stored(part: str, abstract: tree.PyTree, stored: arrays.Specs) -> tree.PyTree:
    """A part of a state with the dtypes of the checkpoint (--optimizer_state may have changed
    them); None if the checkpoint holds no such part, or one of other arrays."""
    shapes = {path: shape for path, (_, shape) in arrays.specs({part: abstract}).items()}
    there = {path: spec for path, spec in stored.items() if path.partition("/")[0] == part}
    if shapes != {path: shape for path, (_, shape) in there.items()}:
        return None

    def as_stored(path: str, leaf: Any) -> Any:
        dtype = there[f"{part}/{path}"][0]
        if dtype == str(leaf.dtype):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)

    leaves = [as_stored(path, leaf) for path, leaf in tree.flatten(abstract).items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _completed(
    restored: TrainState, run: config.Run, programs: Programs, execution: Execution
) -> TrainState:
    """A restored state with what today's configuration has and its checkpoint had not: an average
    begins at the parameters, an optimizer's state anew, random streams with another seed."""
    abstract = programs.state
    changes: dict[str, Any] = {}
    if abstract.scaling is not None and restored.scaling is None:
        new = arrays.to_devices(arrays.to_host(LossScale.new()), abstract.scaling)
        changes["scaling"] = new
    if abstract.ema is not None:
        average = restored.params if restored.ema is None else restored.ema
        changes["ema"] = _cast(average, abstract.ema, copy=restored.ema is None)
    if restored.opt_state is not None:
        changes["opt_state"] = _cast(restored.opt_state, abstract.opt_state)
    seeded = jax.random.key_data(rng.root(run.seed))
    new_seed = not np.array_equal(seeded, group.fetch(jax.random.key_data(restored.key)))
    if restored.opt_state is None:
        messages.warn("the optimizer's state in the checkpoint is another's; it begins anew")
        changes["opt_state"] = programs.restart(restored).opt_state
    if new_seed:
        fresh = execution.initialize(programs, run.seed)
        changes["key"] = fresh.key
        changes["position"] = dataclasses.replace(restored.position, seed=fresh.position.seed)
    return dataclasses.replace(restored, **changes)


def _cast(values: tree.PyTree, like: tree.PyTree, *, copy: bool = False) -> tree.PyTree:
    """Arrays in the dtypes of others; what has them already stays as it is, unless a copy is
    wanted."""

    def cast(leaf: jax.Array, wanted: Any) -> jax.Array:
        same = leaf.dtype == wanted.dtype
        return jnp.array(leaf, wanted.dtype, copy=True) if copy or not same else leaf

    return jax.tree.map(cast, values, like)


@dataclasses.dataclass(frozen=True)
class Warm:
    """What a warm start took, and from where."""

    source: str
    step: int | None
    averaged: str
    """Which average its parameters are, in words; empty for the raw ones."""
    asked: str
    """What --init_params said."""
    plan: warm_start.Plan

    def lines(self) -> list[str]:
        """What was taken, in words."""
        step = "" if self.step is None else f" of step {self.step}"
        raw = "the raw ones, by --init_params=raw" if self.asked == "raw" else "there is no average"
        which = self.averaged or raw
        counts = [
            f"{count} {what}"
            for what in ("taken", "resized", "new", "skipped")
            if (count := self.plan.count(what))
        ]
        return [
            (
                f"warm start from {self.source}: parameters{step} ({which}); arrays:"
                f" {', '.join(counts)}"
            ),
            *(f"note: {note}" for note in self.plan.notes),
        ]

    def table(self) -> list[tuple[str, tuple[int, ...], str, str]]:
        """A row for each array: path, shape, what became of it, and where it came from."""
        rows = []
        for row in self.plan.rows:
            source = row.source if row.source != row.path else ""
            how = ", ".join(text for text in (row.cast and f"{row.cast}", row.note) if text)
            rows.append((row.path, row.shape, row.what, f"{source} {how}".strip()))
        return rows

    def record(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "source": self.source,
            "step": self.step,
            "params": self.averaged or "raw",
            "arrays": [
                {"path": path, "shape": list(shape), "what": what, "from": source}
                for path, shape, what, source in self.table()
            ],
        }


@dataclasses.dataclass(frozen=True)
class Planned:
    """What --init_from gives, before any of it is read, and what becomes of it."""

    stored: variables.Stored
    plan: warm_start.Plan
    what: str
    """What is read, in words."""


def warm_plan(run: config.Run, programs: Programs) -> Planned:
    """What is taken from another run or from a file; `UserError` for rules that do not fit it."""
    wanted = {"params": programs.state.params, **programs.state.collections}
    with _in_flag(run):
        stored, what = _stored(run, f"--init_from={run.init_from}")
        plan = warm_start.plan(
            stored.specs,
            arrays.specs(wanted),
            _rules(run, stored.specs),
            what=what,
            images=(stored.image, _image(programs.batch)),
        )
    return Planned(stored, plan, what)


@contextlib.contextmanager
def _in_flag(run: config.Run) -> Iterator[None]:
    """What is wrong with what --init_from names, with that flag."""
    flag = f"--init_from={run.init_from}"
    try:
        yield
    except (CheckpointError, ValueError) as error:
        text = str(error)
        raise UserError(text if text.startswith(flag) else f"{flag}: {text}") from error


def warm_state(
    run: config.Run, programs: Programs, execution: Execution, planned: Planned
) -> tuple[TrainState, Warm]:
    """A new state with the parameters, and the model's other variables, of another run or of a
    file; the optimizer and an average start from them."""
    stored, plan = planned.stored, planned.plan
    abstract = programs.state
    wanted = {"params": abstract.params, **abstract.collections}
    with _in_flag(run):
        taken = plan.values(stored.read())
        here = {path: value for path, value in taken.items() if isinstance(value, np.ndarray)}
        if path := arrays.not_finite(here, [path.partition("/")[0] for path in here]):
            raise UserError(f"{planned.what}: {path} holds NaN or infinity")
    fresh = execution.initialize(programs, run.seed)
    # made anew below, from what is taken; until then it would only fill memory
    fresh = dataclasses.replace(fresh, opt_state=(), ema=None)
    leaves = tree.flatten(wanted)
    whole = tree.flatten({"params": fresh.params, **fresh.collections})
    for path in taken:
        whole[path].delete()
    placed = arrays.to_devices(taken, {path: leaves[path] for path in taken})
    filled = [placed.get(path, leaf) for path, leaf in whole.items()]
    new = jax.tree.unflatten(jax.tree.structure(wanted), filled)
    state = dataclasses.replace(fresh, params=new.pop("params"), collections=new)
    return programs.restart(state), Warm(
        run.init_from, stored.step, stored.averaged, run.init_params, plan
    )


def _rules(run: config.Run, stored: arrays.Specs) -> tree.Rules[str]:
    """What --init_rules says; adapters over a base that has none are new. `UserError` for adapters
    that nobody has a place for."""
    have = any(map(re.compile(ADAPTERS).search, stored))
    wants = run.lora is not None and run.lora.rank > 0
    if have and not wants and not any("lora" in pattern for pattern, _ in run.init_rules):
        raise UserError(
            "holds adapters, and this run has none; merge them (python -m jaxtrain export"
            f" {run.init_from} --merge --out=FILE.safetensors) and start from FILE, train them on"
            " (--lora), or drop them: --init_rules='lora_[ab]=skip'"
        )
    fresh = wants and not have
    return (*run.init_rules, (ADAPTERS, warm_start.SKIP)) if fresh else run.init_rules


def _stored(run: config.Run, flag: str) -> tuple[variables.Stored, str]:
    """The variables that --init_from names, not read yet, and what they are called."""
    path = Path(run.init_from)
    found = weights.variables(path, run.model)
    if found is not None or path.is_file():
        kind = "file" if path.is_file() else "model's folder"
        if run.init_params == "average" or run.init_checkpoint != "last":
            raise UserError(
                f"{flag}: is a {kind}, which holds one set of parameters; drop --init_params and"
                " --init_checkpoint"
            )
        if found is None:
            return weights_file.read(path), "the file"
        specs: arrays.Specs = {
            name: [str(each.dtype), list(each.shape)] for name, each in found.items()
        }
        return variables.Stored(specs, lambda: found, None, ""), f"the {kind}"
    if (path / "MANIFEST.json").exists():
        if run.init_checkpoint != "last":
            raise UserError(
                f"{flag}: is one checkpoint already; drop --init_checkpoint={run.init_checkpoint}"
            )
        folder = path
    else:
        folder = _step_folder(run, path.parent if path.name == "checkpoints" else path, flag)
    stored = variables.of_step(folder, choice=run.init_params)
    return stored, f"checkpoint step {stored.step}"


def _step_folder(run: config.Run, workdir: Path, flag: str) -> Path:
    """The folder of the step of a workdir that --init_checkpoint names, which process 0 chooses."""
    checkpoints = Checkpoints(workdir)
    word = f"{flag}: --init_checkpoint={run.init_checkpoint}"

    def choose() -> int | None:
        return checkpoints.chosen_step(run.init_checkpoint, word, messages.warn)

    step = group.on_main(choose)
    if step is None:
        raise UserError(
            f"{flag}: no committed checkpoint there; give a workdir, or WORKDIR/checkpoints/STEP"
        )
    return checkpoints.folder / str(step)


def _image(batch: Mapping[str, Any]) -> positions.Grid | None:
    """Height and width of the images in a batch, if it holds any."""
    return next(
        ((leaf.shape[1], leaf.shape[2]) for leaf in batch.values() if len(leaf.shape) == 4), None
    )
