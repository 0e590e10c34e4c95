"""Where a run starts: what lies in its folder, whether it may go on from there, and the state to
begin with (new, resumed, or with parameters from elsewhere)."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import config, messages, rng, tree
from jaxtrain.checkpoints import arrays
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.errors import CheckpointError, UserError
from jaxtrain.precision.loss_scale import LossScale
from jaxtrain.processes import group
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


def inspect(run: config.Run, folder: Path, fingerprint: str, abstract: TrainState) -> Found:
    """What lies in the folder; `UserError`, in every process, if the run may not go on from it.
    `abstract` is the shape of its state."""
    found = group.on_main(lambda: dataclasses.asdict(_inspect(run, folder, fingerprint, abstract)))
    return Found(**found)


def _inspect(run: config.Run, folder: Path, fingerprint: str, abstract: TrainState) -> Found:
    record = workdir.read(folder)
    notes = _check_folder(run, folder, record, fingerprint, abstract)
    run_id = (record or {}).get("run_id") or os.urandom(8).hex()
    checkpoints = Checkpoints(folder, run_id=run_id)
    newest = _newest(run, folder, checkpoints, record)
    return Found(record, notes, run_id, newest, {} if newest is None else checkpoints.loop(newest))


def _check_folder(
    run: config.Run,
    folder: Path,
    record: dict[str, Any] | None,
    fingerprint: str,
    abstract: TrainState,
) -> list[str]:
    """What differs from the run that is there; `UserError` if it may not."""
    if record is None:
        if (folder / "metrics.jsonl").exists():
            raise UserError(
                f"--workdir={folder}: holds metrics.jsonl but no run.json; restore it, or use a new"
                " workdir"
            )
        count = workdir.foreign_files(folder)
        return [f"note: {count} files not made by jaxtrain are left alone"] if count else []
    return workdir.check_drift(
        folder, record, run, fingerprint=fingerprint, misfit=lambda: _misfit(folder, abstract)
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
    if newest is not None and record is None:
        raise UserError(
            f"--workdir={folder}: holds checkpoints but no run.json; restore it, or use a new"
            " workdir"
        )
    return newest


def starting_state(
    run: config.Run,
    programs: Programs,
    execution: Execution,
    checkpoints: Checkpoints,
    newest: int | None,
) -> tuple[TrainState, dict[str, Any]]:
    """The state to begin with and what its checkpoint says besides: restored, or new (perhaps with
    parameters from elsewhere)."""
    if newest is None:
        warm = _warm(run.init_from, programs.state) if run.init_from else {}
        return dataclasses.replace(execution.initialize(programs, run.seed), **warm), {}
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
    values = initial_numbers(programs.recipe)
    numbers = {
        name: group.place(np.asarray(values[name]), where.sharding)
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
    if restored.opt_state is None or new_seed:
        fresh = execution.initialize(programs, run.seed)
        if restored.opt_state is None:
            messages.warn("the optimizer's state in the checkpoint is another's; it begins anew")
            changes["opt_state"] = fresh.opt_state
        if new_seed:
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


def _warm(source: str, abstract: TrainState) -> dict[str, Any]:
    """The parameters, and the model's other variables, of another run or of one of its checkpoints;
    an average starts from them too."""
    path, flag = Path(source), f"--init_from={source}"
    single = path.name.isdecimal() and path.parent.name == "checkpoints"
    checkpoints = Checkpoints(path.parent.parent if single else path)
    try:
        newest = int(path.name) if single else checkpoints.newest_verified(messages.warn)
        if newest is None:
            raise UserError(
                f"{flag}: no committed checkpoint there; give a workdir, or"
                " WORKDIR/checkpoints/STEP"
            )
        wanted = {"params": abstract.params, "collections": abstract.collections}
        restored, _ = checkpoints.restore(newest, wanted, partial=True)
    except (CheckpointError, ValueError) as error:
        text = str(error)
        raise UserError(text if text.startswith(flag) else f"{flag}: {text}") from error
    if abstract.ema is None:
        return restored
    return restored | {"ema": jax.tree.map(lambda leaf: leaf.copy(), restored["params"])}
