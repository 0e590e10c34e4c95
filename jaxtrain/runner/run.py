"""A session: one start of a run with its workdir locked, from what lies there to the last
commit."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain import adapters, config, hardware, tree
from jaxtrain.checkpoints import arrays
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.checkpoints.lock import Lock
from jaxtrain.config import flags
from jaxtrain.config import record as run_record
from jaxtrain.data.splits import Splits
from jaxtrain.errors import CheckpointError, UserError
from jaxtrain.parallel import sharding
from jaxtrain.precision.loss_scale import LossScale
from jaxtrain.processes import group, heartbeat
from jaxtrain.processes.signals import Stop
from jaxtrain.report.metrics_file import JsonlWriter, Writers
from jaxtrain.report.terminal import tables
from jaxtrain.report.terminal.progress import Progress
from jaxtrain.report.trackers import TensorBoardWriter, WandbWriter
from jaxtrain.runner import build, describe, finish, workdir
from jaxtrain.runner import compile as programs
from jaxtrain.runner.followers import (
    WitnessCheckpoints,
    WitnessLock,
    WitnessWriters,
    witness_progress,
)
from jaxtrain.runner.profiler import Profiler
from jaxtrain.train import hyper, loop, metrics_log, steps
from jaxtrain.train.recipe import Options, Recipe
from jaxtrain.train.state import TrainState, init_state, state_shardings


@dataclasses.dataclass(frozen=True)
class Session:
    """One start of a run, with its workdir locked."""

    run: config.Run
    argv: Sequence[str]
    mesh: Mesh
    splits: Splits
    length: build.Lengths
    recipe: Options
    batch: dict[str, jax.ShapeDtypeStruct]
    folder: Path
    lock: Lock | WitnessLock
    stop: Stop
    began: float
    asked_precision: str
    """What --precision said, before `auto` was decided."""

    def go(self) -> int:
        """Resumes or starts, trains, and sums up."""
        heartbeat.workdir(self.folder)
        found = group.from_main(self._found() if group.is_main() else None)
        record, newest = found["record"], found["newest"]
        made = Checkpoints if group.is_main() else WitnessCheckpoints
        checkpoints = made(
            self.folder,
            keep=self.run.keep,
            keep_every=self.length.keep_every,
            run_id=found["run_id"],
        )
        progress = (
            Progress(self.length.total) if group.is_main() else witness_progress(self.length.total)
        )
        try:
            for note in found["notes"]:
                progress.line(note)
            rows = describe.welcome(
                self.run,
                self.splits,
                self.length,
                self.mesh,
                str(self.folder),
                asked=self.asked_precision,
            )
            progress.show(tables.facts(f"jaxtrain {self.run.name}", rows))
            if newest is not None and newest >= self.length.total and not self.run.eval_only:
                flag = (
                    f"--steps={self.run.steps}"
                    if self.run.steps is not None
                    else f"--epochs={self.run.epochs:g}"
                )
                progress.line(
                    f"{flag}: checkpoint is already at step {newest}; nothing to do, raise it to"
                    " go on"
                )
                if group.is_main():
                    finish.report(self.run, self.folder)
                return 0
            abstract = self._abstract_state()
            if not self.run.eval_only:
                # what a killed start left half written would count as used space
                checkpoints.sweep()
                checkpoints.check_space(abstract)
            stop = group.Agreement(self.stop)
            stop.settle()
            if stop.status is not None:
                progress.line(f"{stop.name}: nothing done yet, nothing to save")
                return stop.status
            state, kept = self._state(checkpoints, newest, abstract)
            if self.run.eval_only:
                return self._evaluate_only(state, progress)
            return self._train(
                state,
                kept,
                newest or 0,
                checkpoints,
                {"run_id": found["run_id"]} | (record or {}),
                progress,
                stop,
            )
        finally:
            progress.stop()
            checkpoints.close(timeout=60)

    def _found(self) -> dict[str, Any]:
        """What lies in the folder, as process 0 sees it; the others take its word, for it may be
        writing there already when they look."""
        record = workdir.read(self.folder)
        notes = self._drift(record)
        run_id = (record or {}).get("run_id") or os.urandom(8).hex()
        newest = self._newest(Checkpoints(self.folder, run_id=run_id), record)
        return {"record": record, "notes": notes, "run_id": run_id, "newest": newest}

    def _drift(self, record: dict[str, Any] | None) -> list[str]:
        """What differs from the run that is there; `ValueError` if it may not."""
        if record is None:
            if (self.folder / "metrics.jsonl").exists():
                raise UserError(
                    f"--workdir={self.folder}: holds metrics.jsonl but no run.json; restore it, or"
                    " use a new workdir"
                )
            count = workdir.foreign_files(self.folder)
            return [f"note: {count} files not made by jaxtrain are left alone"] if count else []
        lines = workdir.check_drift(self.folder, record, self.run)
        old, new = record["data"]["fingerprint"], self.splits.fingerprint
        if old != new and "data" not in self.run.allow_config_change:
            raise UserError(
                f"--data: fingerprint differs from the run's ({old} -> {new}); restore the data or"
                " --allow_config_change=data"
            )
        return lines

    def _newest(self, checkpoints: Checkpoints, record: dict[str, Any] | None) -> int | None:
        """The step to go on from; `ValueError` where --resume forbids or demands it."""
        place = self.folder / "checkpoints"
        if self.run.resume == "never":
            if checkpoints.steps():
                raise UserError(
                    f"--resume=never: {place} holds checkpoints up to step"
                    f" {max(checkpoints.steps())}; use a new --workdir"
                )
            return None
        newest = checkpoints.resume_step(self.run.resume, flags.warn)
        if newest is None and self.run.eval_only:
            raise UserError(f"--eval_only: no committed checkpoint in {place}")
        if newest is not None and record is None:
            raise UserError(
                f"--workdir={self.folder}: holds checkpoints but no run.json; restore it, or use a"
                " new workdir"
            )
        return newest

    def _abstract_state(self) -> TrainState:
        """Shapes and shardings of the state, before anything is compiled; `ValueError` if an array
        does not fit the mesh."""
        parts = (self.run.model, self.run.task, self.run.optimizer)
        state = jax.eval_shape(
            lambda: init_state(*parts, self.batch, seed=self.run.seed, **self.recipe)
        )
        places = state_shardings(Recipe(*parts, **self.recipe), self.batch, state, self.mesh)
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            state,
            places,
        )

    def _state(
        self, checkpoints: Checkpoints, newest: int | None, abstract: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state to begin with and what its checkpoint says besides: restored, or new (perhaps
        with parameters from elsewhere)."""
        if newest is None:
            warm = self._warm(abstract) if self.run.init_from else {}
            parts = (self.run.model, self.run.task, self.run.optimizer)
            if self.run.reproducible:
                # Born by a program for one device, which rounds alike on every mesh, and laid out
                # afterwards.
                whole = init_state(*parts, self.batch, seed=self.run.seed, **self.recipe)
                state = arrays.to_devices(arrays.to_host(whole), abstract)
            else:
                state = init_state(
                    *parts, self.batch, seed=self.run.seed, mesh=self.mesh, **self.recipe
                )
            return dataclasses.replace(state, **warm), {}
        # The numbers of the recipe are those of today's flags; the checkpoint has its own, of other
        # names if a part was switched on or off since. A loss scale, too, is there or not by
        # today's precision.
        scaled = abstract.scaling is None or "scaling" in checkpoints.parts(newest)
        wanted = dataclasses.replace(
            abstract, hyper={}, scaling=abstract.scaling if scaled else None
        )
        restored, kept = checkpoints.restore(newest, wanted, partial=True)
        if not scaled:
            restored = dataclasses.replace(
                restored,
                scaling=arrays.to_devices(arrays.to_host(LossScale.new()), abstract.scaling),
            )
        values = hyper.collect(
            Recipe(self.run.model, self.run.task, self.run.optimizer, **self.recipe)
        )
        numbers = {
            name: group.place(np.asarray(values[name], np.float32), place.sharding)
            for name, place in abstract.hyper.items()
        }
        return dataclasses.replace(restored, hyper=numbers), kept

    def _warm(self, abstract: TrainState) -> dict[str, Any]:
        """The parameters, and the model's other variables, of another run or of one of its
        checkpoints; an average starts from them too."""
        path, flag = Path(self.run.init_from), f"--init_from={self.run.init_from}"
        single = path.name.isdecimal() and path.parent.name == "checkpoints"
        source = Checkpoints(path.parent.parent if single else path)
        try:
            newest = int(path.name) if single else source.newest_verified(flags.warn)
            if newest is None:
                raise UserError(
                    f"{flag}: no committed checkpoint there; give a workdir, or"
                    " WORKDIR/checkpoints/STEP"
                )
            wanted = {"params": abstract.params, "collections": abstract.collections}
            restored, _ = source.restore(newest, wanted, partial=True)
        except (CheckpointError, ValueError) as error:
            raise UserError(
                str(error) if str(error).startswith(flag) else f"{flag}: {error}"
            ) from error
        return restored | (
            {}
            if abstract.ema is None
            else {"ema": jax.tree.map(lambda leaf: leaf.copy(), restored["params"])}
        )

    def _evaluate_only(self, state: TrainState, progress: Progress) -> int:
        results = {
            name: evaluator(state)
            for name, evaluator in build.evaluators(
                self.run, self.splits, self.recipe, self.mesh
            ).items()
        }
        if not results:
            raise UserError(
                "--eval_only: the data has neither a validation nor a test split; set"
                " --data.validation or --data.test"
            )
        progress.line(f"evaluated step {int(jax.device_get(state.step))}")
        for name, values in results.items():
            progress.evaluation(int(jax.device_get(state.step)), name, values)
        return 0

    def _train(
        self,
        state: TrainState,
        kept: dict[str, Any],
        start: int,
        checkpoints: Checkpoints,
        record: dict[str, Any],
        progress: Progress,
        stop: group.Agreement,
    ) -> int:
        run, length = self.run, self.length
        if start:
            progress.line(f"resumed from step {start}")
        progress.show(self._parameters(state))
        for row in describe.rule_table(run, state):
            progress.line(row)
        progress.start(start)
        heartbeat.beat("data")
        data = build.place_data(run, self.splits.train, self.mesh)
        chosen = run.steps_per_call or describe.earlier_steps_per_call(record, run, self.mesh)
        heartbeat.beat("compiling")
        compiled = programs.compile_training(
            run, state, self.splits.train, data, self.recipe, self.mesh, per_call=chosen
        )
        progress.show(tables.memory_table(compiled.memory, device_bytes=_device_bytes(self.mesh)))
        if compiled.copied:
            progress.line(
                f"note: {compiled.copied:,} bytes a device of the state are kept twice: the program"
                " does not take them over"
            )
        if run.steps_per_call not in (None, compiled.per_call):
            progress.line(
                f"note: --steps_per_call={run.steps_per_call} needs data in device memory and no"
                f" --debug_nans; {compiled.per_call} a dispatch instead"
            )
        profiler, evaluators = (
            Profiler(run.profile_steps, self.folder / "profile"),
            build.evaluators(self.run, self.splits, self.recipe, self.mesh),
        )
        # run.json comes first: metrics in a folder without one are somebody else's.
        if group.is_main():
            workdir.write(
                self.folder,
                describe.record(
                    run,
                    self.argv,
                    self.splits,
                    length,
                    self.recipe,
                    self.mesh,
                    state,
                    compiled,
                    record,
                ),
            )
        writers = self._writers(record["run_id"])
        try:
            writers.resume(start, int(kept.get("metrics_bytes", 0)))
            outcome = loop.train(
                state,
                step=start,
                feed=compiled.feed,
                writers=writers,
                checkpoints=checkpoints,
                progress=progress,
                stop=stop,
                journal=self._journal(writers, progress, start, kept, compiled),
                cadence=loop.Cadence(
                    length.total,
                    compiled.per_call,
                    run.log_every,
                    length.evaluate if self.splits.validation is not None else 0,
                    length.save,
                    marks=run.profile_steps or (),
                ),
                validate=evaluators.get("validation"),
                test=evaluators.get("test"),
                best=kept.get("best"),
                owed=kept.get("owed", False),
                at_step=self._watch(profiler),
            )
        finally:
            profiler.close()
            compiled.feed.close()
            writers.close()
        progress.stop()
        if not outcome.finished:
            status = stop.status
            assert status is not None
            saved = (
                f"saved at step {outcome.step}"
                if outcome.step
                else "no step done yet, nothing to save"
            )
            progress.line(
                f"{stop.name}: {saved}; the same command with --workdir={self.folder} goes on from"
                " there"
            )
            return status
        parts = (run.model, run.task, run.optimizer)
        predict = (
            steps.make_predict_step(*parts, mesh=self.mesh, **self.recipe)
            if hasattr(run.task, "examine")
            else None
        )
        finish.finish(
            run,
            self.folder,
            self.splits,
            self.mesh,
            predict,
            outcome.state,
            progress,
            seconds=time.monotonic() - self.began,
        )
        return 0

    def _parameters(self, state: TrainState) -> Any:
        """The table of parameters; where they are split over devices, it says how and why."""
        if not (self.run.shard or self.mesh.shape["fsdp"] * self.mesh.shape["tensor"] > 1):
            return tables.parameter_table(tree.flatten(state.params))
        inputs = jax.eval_shape(
            Recipe(self.run.model, self.run.task, self.run.optimizer, **self.recipe).inputs,
            self.batch,
        )
        axes = adapters.logical_axes(self.run.model, inputs)["params"]
        placed = jax.tree.map(lambda leaf: leaf.sharding, state.params)
        return tables.sharding_table(
            sharding.table(state.params, axes, placed, self.mesh, self.run.shard)
        )

    def _watch(self, profiler: Profiler) -> Callable[[int, TrainState], None]:
        """What is called at the end of every dispatch."""

        def at_step(step: int, state: TrainState) -> None:
            if not self.lock.held():
                raise CheckpointError(
                    f"{self.folder}: its lock is gone (the folder was removed, moved or taken"
                    " over); nothing more is written there"
                )
            profiler(step, state)

        return at_step

    def _journal(
        self,
        writers: Writers,
        progress: Progress,
        start: int,
        kept: dict[str, Any],
        compiled: programs.Training,
    ) -> metrics_log.Journal:
        device = self.mesh.local_devices[0]
        peak = (
            hardware.peak_flops(device.device_kind, self.run.precision)
            if device.platform == "gpu"
            else None
        )
        return metrics_log.Journal(
            writers,
            progress,
            every=self.run.log_every,
            step=start,
            total_steps=self.length.total,
            batch_size=self.run.batch_size,
            interval=kept.get("interval"),
            flops_per_step=compiled.flops_per_step,
            peak_flops=peak and peak * self.mesh.size,
            memory_bytes=lambda: _memory_in_use(device),
        )

    def _writers(self, run_id: str) -> Writers:
        if not group.is_main():
            return WitnessWriters()
        return Writers(
            JsonlWriter(self.folder / "metrics.jsonl"), self._trackers(run_id), note=flags.warn
        )

    def _trackers(self, run_id: str) -> list[Any]:
        found: list[Any] = (
            [TensorBoardWriter(self.folder / "tensorboard")] if self.run.tensorboard else []
        )
        if self.run.wandb:
            record = run_record.to_json(self.run)
            found.append(
                WandbWriter(
                    self.run.wandb,
                    name=self.run.name,
                    run_id=run_id,
                    folder=self.folder,
                    config=record,
                    note=flags.warn,
                )
            )
        return found


def _device_bytes(mesh: Mesh) -> int | None:
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def _memory_in_use(device: jax.Device) -> int | None:
    """Bytes in use on the device; on CPU, where it does not say, those of the process."""
    stats = device.memory_stats()
    if stats:
        return stats.get("bytes_in_use")
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None
