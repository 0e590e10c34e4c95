"""One start of a run with its workdir locked: what lies there, the state, the compiled programs,
the loop, the end."""

import contextlib
import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain import config, hardware, messages, tasks, tree
from jaxtrain.checkpoints import arrays
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.checkpoints.lock import Lock
from jaxtrain.config import flags
from jaxtrain.config import record as run_record
from jaxtrain.config import values as flag_values
from jaxtrain.data.splits import Splits
from jaxtrain.errors import CheckpointError, UserError
from jaxtrain.models.lora import ADAPTERS
from jaxtrain.parallel import sharding
from jaxtrain.parallel.mesh import Device
from jaxtrain.processes import group, heartbeat
from jaxtrain.processes.signals import StopSignals
from jaxtrain.report import changes_file
from jaxtrain.report.changes_file import Change
from jaxtrain.report.metrics_file import JsonlWriter, Writers
from jaxtrain.report.terminal import tables
from jaxtrain.report.terminal.progress import Progress
from jaxtrain.report.trackers import TensorBoardWriter, WandbWriter
from jaxtrain.runner import (
    build,
    closing,
    describe,
    finish,
    kept_tokenizer,
    restore,
    samples,
    workdir,
)
from jaxtrain.runner.compile import Execution, Training
from jaxtrain.runner.profiler import Profiler
from jaxtrain.train import changes, hyper, loop, metrics_log
from jaxtrain.train import selection as best
from jaxtrain.train.cadence import Cadence
from jaxtrain.train.frozen import frozen_notes
from jaxtrain.train.hooks import Hooks
from jaxtrain.train.lowering import Programs
from jaxtrain.train.selection import Selection, Standing
from jaxtrain.train.state import TrainState, initial_numbers


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a run holds once it is open: its data, its programs (not yet compiled) and its
    folder."""

    run: config.Run
    argv: Sequence[str]
    splits: Splits
    length: build.Lengths
    programs: Programs
    execution: Execution
    selection: Selection
    """What the best checkpoint is chosen by."""
    folder: Path
    lock: Lock | None
    """None in a process that does not write: if process 0 loses the lock, the group ends."""
    stop: StopSignals
    began: float
    asked_precision: str
    """What --precision said, before `auto` was decided."""

    @property
    def mesh(self) -> Mesh:
        """The devices of the run."""
        return self.programs.mesh


def start(opened: Opened) -> int:
    """Resumes or starts, trains or evaluates, and sums up; the exit status."""
    heartbeat.send_workdir(opened.folder)
    run, total = opened.run, opened.length.total
    found = restore.inspect(
        run,
        opened.folder,
        opened.splits.fingerprint,
        opened.programs.state,
        flags.given(opened.argv),
    )
    # Only process 0 writes: the others help to gather, and leave no trace.
    checkpoints = Checkpoints(
        opened.folder,
        keep=run.keep,
        keep_every=opened.length.keep_every,
        run_id=found.run_id,
        writes=group.is_main(),
        fixed=_fixed(opened),
    )
    unit, _ = tasks.units_of(run.task, opened.programs.batch)
    progress = Progress(total, quiet=not group.is_main(), unit=unit)
    with closing.closed_in_order(progress.stop, functools.partial(_close, checkpoints)):
        # rules that do not fit are told before anything else is
        warm_from = found.newest is None and run.init_from
        planned = restore.warm_plan(run, opened.programs) if warm_from else None
        _banner(opened, found, progress)
        if found.newest is not None and found.newest >= total and not run.eval_only:
            return _nothing_to_do(opened, found.newest, progress)
        if found.newest is not None and _ended_early(opened, found.loop) and not run.eval_only:
            return _no_better(opened, found, progress)
        if not run.eval_only:
            # What a killed start left half written would count as used space.
            checkpoints.delete_leftovers()
            arrays.check_paths(opened.programs.state)
            checkpoints.check_space(opened.programs.state)
        stop = group.StopAgreement(opened.stop, functools.partial(changes.waiting, opened.folder))
        stop.synchronize()
        if stop.status is not None:
            return _stopped(opened, found.newest or 0, stop, progress)
        state, kept, warm = _beginning(opened, found, checkpoints, planned, progress)
        stop.synchronize()  # the first program was compiled
        if stop.status is not None:
            return _stopped(opened, found.newest or 0, stop, progress)
        if run.eval_only:
            return _evaluate_only(opened, state, progress)
        return _train(opened, found, state, kept, checkpoints, progress, stop, warm)


def _fixed(opened: Opened) -> list[str]:
    """The arrays that lie under adapters: they are written once, not with every checkpoint."""
    if opened.run.lora is None or not opened.run.lora.rank:
        return []
    trains = opened.programs.recipe.optimizer.trained(opened.programs.state.params)
    frozen = [path for path, keep in tree.flatten(trains).items() if not keep]
    return [f"{part}/{path}" for part in ("params", "ema") for path in frozen]


def _beginning(
    opened: Opened,
    found: restore.Found,
    checkpoints: Checkpoints,
    planned: restore.Planned | None,
    progress: Progress,
) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    """The state to begin with, what its checkpoint says besides, and what run.json keeps of a warm
    start."""
    run = opened.run
    if planned is not None:
        state, warm = restore.warm_state(run, opened.programs, opened.execution, planned)
        for line in warm.lines():
            progress.line(line)
        # adapters are new as a matter of course; a line counts them
        rows = [row for row in warm.plan.rows if not re.search(ADAPTERS, row.path)]
        if any(row.what != "taken" or row.source != row.path for row in rows):
            progress.show(tables.warm_start_table(warm.table()))
        return state, {}, {"init": warm.record()}
    numbers = initial_numbers(opened.programs.recipe)
    changed, notes = changes.since(_journal(opened), found.newest or 0, numbers)
    for line in notes:
        progress.line(line)
    state, kept = restore.starting_state(
        run, opened.programs, opened.execution, checkpoints, found.newest, changed
    )
    if line := group.on_main(lambda: restore.set_aside(opened.folder, found)):
        progress.line(line)
    earlier = found.record or {}
    return state, kept, {"init": earlier["init"]} if "init" in earlier else {}


def _journal(opened: Opened) -> list[Change]:
    """What was changed in this folder so far, as process 0 reads it."""
    lines = group.on_main(
        lambda: [dataclasses.asdict(change) for change in changes_file.read(opened.folder)]
    )
    return [Change(**line) for line in lines]


def _live(opened: Opened, found: restore.Found, progress: Progress) -> changes.Live:
    """What changes the numbers of the run while it trains."""

    def forget() -> None:
        # a run of other flags that had no checkpoint: what was changed in it is of no use
        anew = found.record is None and workdir.read(opened.folder) is not None
        if anew and changes_file.read(opened.folder):
            changes_file.write(opened.folder, [])

    group.on_main(forget)
    journal, recipe = _journal(opened), opened.programs.recipe
    if found.newest is None and journal:
        progress.line(
            f"note: {changes_file.NAME}: {messages.counted(len(journal), 'change')} there, made"
            " again at the same steps"
        )
    numbers, rules = initial_numbers(recipe), hyper.rules(recipe)
    return changes.Live(opened.folder, numbers, rules, journal, progress.line)


def _close(checkpoints: Checkpoints) -> None:
    """Waits for the save in flight, which after an error may take longer than a step may."""
    if checkpoints.is_saving():
        heartbeat.beat("saving")
    checkpoints.close()


def _banner(opened: Opened, found: restore.Found, progress: Progress) -> None:
    for note in found.notes:
        progress.line(note)
    rows = describe.start_banner(
        opened.run,
        opened.splits,
        opened.length,
        opened.mesh,
        str(opened.folder),
        asked=opened.asked_precision,
    )
    progress.show(tables.named_values(f"jaxtrain {opened.run.name}", rows))


def _nothing_to_do(opened: Opened, newest: int, progress: Progress) -> int:
    run = opened.run
    given = next(name for name in config.LENGTHS if getattr(run, name) is not None)
    flag = f"--{given}={flag_values.text(getattr(run, given))}"
    progress.line(
        f"{flag}: checkpoint is already at step {newest}; nothing to do, raise it to go on"
    )
    if group.is_main():
        finish.write_report(run, opened.folder)
    return 0


def _ended_early(opened: Opened, loop: dict[str, Any]) -> bool:
    """Whether the run that is there has ended because it got no better, by today's flags too."""
    patience = best.evaluations(opened.run.stop_after)
    same = (loop.get("best_by") or "") == opened.selection.text
    long_enough = patience is not None and loop.get("since_best", 0) >= patience
    return bool(loop.get("ended_early")) and same and long_enough


def _no_better(opened: Opened, found: restore.Found, progress: Progress) -> int:
    since, run = found.loop["since_best"], opened.run
    progress.line(
        f"--stop_after={run.stop_after}: ended at step {found.newest}, after {since} evaluations"
        " that were no better; nothing to do, raise or drop it to go on"
    )
    if group.is_main():
        finish.write_report(run, opened.folder)
    return 0


def _evaluate_only(opened: Opened, state: TrainState, progress: Progress) -> int:
    evaluators = build.evaluators(opened.run, opened.splits, opened.programs, opened.execution)
    if not evaluators:
        raise UserError(
            "--eval_only: the data has neither a validation nor a test split; set --data.validation"
            " or --data.test"
        )
    results = {name: evaluate(state) for name, evaluate in evaluators.items()}
    step = int(jax.device_get(state.step))
    progress.line(f"evaluated step {step}")
    for name, values in results.items():
        progress.evaluation(step, name, values)
    return 0


def _train(
    opened: Opened,
    found: restore.Found,
    state: TrainState,
    kept: dict[str, Any],
    checkpoints: Checkpoints,
    progress: Progress,
    stop: group.StopAgreement,
    warm: dict[str, Any],
) -> int:
    """Compiles, runs the loop, and writes what a finished run leaves."""
    run, first = opened.run, found.newest or 0
    earlier = {"run_id": found.run_id} | (found.record or {})
    _show_parameters(opened, state, first, progress)
    progress.start(first)
    trained = _compile(opened, state, earlier, progress)
    stop.synchronize()
    if stop.status is not None:  # before there is a run.json: nothing of this start is kept
        trained.feed.close()
        return _stopped(opened, first, stop, progress)
    live = _live(opened, found, progress)  # before run.json, which may be of a former run here
    profiler = Profiler(run.profile_steps, opened.folder / "profile")
    evaluators = build.evaluators(run, opened.splits, opened.programs, opened.execution)
    # run.json comes first: metrics in a folder without one are somebody else's.
    if group.is_main():
        record = describe.record(
            run,
            opened.argv,
            opened.splits,
            opened.length,
            opened.programs,
            trained,
            earlier,
            step=first,
        )
        workdir.write(opened.folder, record | warm)
        kept_tokenizer.keep(opened.folder, opened.splits.train)
    writers = _writers(opened, found.run_id)
    said = samples.Samples(run, opened.folder, opened.splits.train, opened.programs, progress)
    hooks = Hooks(run.at_step, run.at_evaluation)
    with closing.closed_in_order(profiler.close, trained.feed.close, writers.close, said.close):
        writers.resume(first, int(kept.get("metrics_bytes", 0)))
        said.resume(int(kept.get("samples_bytes", 0)))
        outcome = loop.train(
            state,
            step=first,
            feed=trained.feed,
            writers=writers,
            checkpoints=checkpoints,
            progress=progress,
            stop=stop,
            log=_metrics_log(opened, writers, progress, first, kept, trained),
            cadence=_cadence(opened, trained, live.steps),
            validate=evaluators.get("validation"),
            test=evaluators.get("test"),
            sets={name: evaluators[name] for name in opened.splits.evaluate},
            selection=opened.selection,
            standing=_standing(opened, kept),
            patience=best.evaluations(run.stop_after),
            evaluation_due=kept.get("evaluation_due", False),
            samples=said,
            sample_due=kept.get("sample_due", False),
            hooks=hooks,
            at_step=_dispatch_hook(opened, profiler),
            changes=live,
        )
    progress.stop()
    if not outcome.finished:
        return _stopped(opened, outcome.step, stop, progress)
    if outcome.step < opened.length.total:
        progress.line(_why_early(opened, outcome))
    finish.finish(
        run,
        opened.folder,
        opened.splits,
        opened.programs,
        opened.execution,
        outcome.state,
        progress,
        seconds=time.monotonic() - opened.began,
        more={f"{name} (yours)": text for name, text in hooks.summary().items()},
    )
    return 0


def _standing(opened: Opened, kept: dict[str, Any]) -> Standing:
    """The best score so far; none if it was of another kind."""
    if (kept.get("best_by") or "") != opened.selection.text:
        return Standing()
    return Standing(kept.get("best"), kept.get("since_best", 0))


def _why_early(opened: Opened, outcome: loop.Outcome) -> str:
    chosen = opened.selection
    by = chosen.text or f"the score on {chosen.split}"
    return (
        f"--stop_after={opened.run.stop_after}: ended at step {outcome.step} of"
        f" {opened.length.total}: {outcome.standing.since} evaluations in a row were no better by"
        f" {by}"
    )


def _show_parameters(opened: Opened, state: TrainState, first: int, progress: Progress) -> None:
    """The table of parameters; where they are split over devices, it says how and why."""
    if first:
        progress.line(f"resumed from step {first}")
    rules, mesh = opened.run.shard, opened.mesh
    if rules or mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        places = opened.programs.places
        rows = sharding.rows(state.params, places.axes, places.state.params, mesh, rules)
        progress.show(tables.sharding_table(rows))
    elif opened.run.lora is None or not opened.run.lora.rank:
        progress.show(tables.parameter_table(tree.flatten(state.params)))
    optimizer = opened.programs.recipe.optimizer
    if opened.run.lora is not None:
        progress.line(describe.trained_share(optimizer, state.params))
    for note in frozen_notes(optimizer, state.params, state.collections):
        progress.line(note)
    for row in describe.rule_table(opened.run, state, opened.programs.places.axes):
        progress.line(row)


def _compile(
    opened: Opened, state: TrainState, earlier: dict[str, Any], progress: Progress
) -> Training:
    """The compiled training program behind its data, with what it needs on the terminal."""
    run, mesh = opened.run, opened.mesh
    heartbeat.beat("data")
    train = opened.splits.train
    resident = build.place_data(run, train, mesh)
    source = resident or build.open_loader(run, state, train, opened.programs.recipe, mesh)
    chosen = run.steps_per_call or describe.earlier_steps_per_call(earlier, run, mesh)
    heartbeat.beat("compiling")
    trained = opened.execution.training(
        opened.programs, source, per_call=chosen, most=run.log_every or build.MOST_LOG_STEPS
    )
    progress.show(tables.memory_table(trained.memory, device_bytes=_device_bytes(mesh)))
    if trained.copied:
        progress.line(
            f"note: {trained.copied:,} bytes a device of the state are kept twice: the program does"
            " not take them over"
        )
    if run.steps_per_call not in (None, trained.per_call):
        progress.line(
            f"note: --steps_per_call={run.steps_per_call} needs data in device memory and no"
            f" --debug_nans; {trained.per_call} a dispatch instead"
        )
    return trained


def _cadence(opened: Opened, trained: Training, changed: tuple[int, ...]) -> Cadence:
    length, run = opened.length, opened.run
    return Cadence(
        length.total,
        trained.per_call,
        length.log,
        length.evaluate if opened.splits.on_the_way else 0,
        length.save,
        length.sample,
        marks=(*(run.profile_steps or ()), *changed),
    )


def _stopped(opened: Opened, step: int, stop: group.StopAgreement, progress: Progress) -> int:
    status = stop.status
    assert status is not None
    then = f"the same command with --workdir={opened.folder}"
    saved = f"saved at step {step}; {then} goes on from there"
    nothing = f"no step done yet, nothing to save; {then} starts anew"
    progress.line(f"{stop.name}: {saved if step else nothing}")
    return status


def _dispatch_hook(opened: Opened, profiler: Profiler) -> Callable[[int, TrainState], None]:
    """What is called at the end of every dispatch: checks the lock and drives the profiler."""

    def at_step(step: int, state: TrainState) -> None:
        if opened.lock is not None and not opened.lock.held():
            raise CheckpointError(
                f"{opened.folder}: its lock is gone (the folder was removed, moved or taken over);"
                " nothing more is written there"
            )
        profiler(step, state)

    return at_step


def _metrics_log(
    opened: Opened,
    writers: Writers,
    progress: Progress,
    first: int,
    kept: dict[str, Any],
    trained: Training,
) -> metrics_log.MetricsLog:
    device, run = opened.mesh.local_devices[0], opened.run
    on_gpu = device.platform == "gpu"
    peak = hardware.peak_flops(device.device_kind, run.precision) if on_gpu else None
    unit, units = tasks.units_of(run.task, opened.programs.batch)
    return metrics_log.MetricsLog(
        writers,
        progress,
        every=opened.length.log,
        step=first,
        total_steps=opened.length.total,
        batch_size=run.batch_size,
        unit=unit,
        units=units,
        interval=kept.get("interval"),
        flops_per_step=trained.flops_per_step,
        peak_flops=peak and peak * opened.mesh.size,
        memory_bytes=lambda: _memory_in_use(device),
        lower_rate=run.optimizer.lower_rate,
    )


def _writers(opened: Opened, run_id: str) -> Writers:
    if not group.is_main():
        return Writers(None)
    run, folder = opened.run, opened.folder
    others: list[Any] = [TensorBoardWriter(folder / "tensorboard")] if run.tensorboard else []
    if run.wandb:
        record = run_record.to_json(run)
        others.append(
            WandbWriter(
                run.wandb,
                name=run.name,
                run_id=run_id,
                folder=folder,
                config=record,
                note=messages.warn,
            )
        )
    return Writers(JsonlWriter(folder / "metrics.jsonl"), others, note=messages.warn)


def _device_bytes(mesh: Mesh) -> int | None:
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def _memory_in_use(device: Device) -> int | None:
    """Bytes in use on the device; on CPU, where it does not say, those of the process."""
    stats = device.memory_stats()
    if stats:
        return stats.get("bytes_in_use")
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None
