"""Where a run starts: what lies in its folder, whether it may go on from there, and the state to
begin with (new, resumed, or with parameters from elsewhere)."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain import config, messages
from jaxtrain.checkpoints import arrays
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.errors import CheckpointError, UserError
from jaxtrain.precision.loss_scale import LossScale
from jaxtrain.processes import group
from jaxtrain.runner import workdir
from jaxtrain.runner.compile import Execution
from jaxtrain.train.lowering import Programs
from jaxtrain.train.state import TrainState, initial_numbers


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


def inspect(run: config.Run, folder: Path, fingerprint: str) -> Found:
    """What lies in the folder; `UserError`, in every process, if the run may not go on from it."""
    return Found(**group.on_main(lambda: dataclasses.asdict(_inspect(run, folder, fingerprint))))


def _inspect(run: config.Run, folder: Path, fingerprint: str) -> Found:
    record = workdir.read(folder)
    notes = _check_folder(run, folder, record, fingerprint)
    run_id = (record or {}).get("run_id") or os.urandom(8).hex()
    newest = _newest(run, folder, Checkpoints(folder, run_id=run_id), record)
    return Found(record, notes, run_id, newest)


def _check_folder(
    run: config.Run, folder: Path, record: dict[str, Any] | None, fingerprint: str
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
    lines = workdir.check_drift(folder, record, run)
    old = record["data"]["fingerprint"]
    if old != fingerprint and "data" not in run.allow_config_change:
        raise UserError(
            f"--data: fingerprint differs from the run's ({old} -> {fingerprint}); restore the data"
            " or --allow_config_change=data"
        )
    return lines


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
    # names if a part was switched on or off since. A loss scale, too, is there or not by today's
    # precision.
    abstract = programs.state
    scaled = abstract.scaling is None or "scaling" in checkpoints.parts(newest)
    wanted = dataclasses.replace(abstract, hyper={}, scaling=abstract.scaling if scaled else None)
    restored, kept = checkpoints.restore(newest, wanted, partial=True)
    if not scaled:
        new = arrays.to_devices(arrays.to_host(LossScale.new()), abstract.scaling)
        restored = dataclasses.replace(restored, scaling=new)
    values = initial_numbers(programs.recipe)
    numbers = {
        name: group.place(np.asarray(values[name]), where.sharding)
        for name, where in abstract.hyper.items()
    }
    return dataclasses.replace(restored, hyper=numbers), kept


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
