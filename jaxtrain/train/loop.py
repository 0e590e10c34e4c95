"""The loop: every effect of training, in order.

The step is pure; this is where time passes. The host runs one dispatch behind the device: it starts
the next steps, then reads the numbers of those before. It waits only where it says so.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import jax

from jaxtrain import tree
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.processes import heartbeat
from jaxtrain.processes.group import StopAgreement
from jaxtrain.report.metrics_file import Writers
from jaxtrain.report.terminal.progress import Progress
from jaxtrain.tasks import score_of
from jaxtrain.train.cadence import Cadence
from jaxtrain.train.changes import Changes, no_changes
from jaxtrain.train.feeds import Feed
from jaxtrain.train.hooks import Hooks
from jaxtrain.train.metrics_log import MetricsLog
from jaxtrain.train.selection import Selection, Standing
from jaxtrain.train.state import TrainState

MAX_AWAITED_NUMBERS = 4_000_000
"""Numbers in a state whose commit is waited for: some 30 ms, after which a kill costs at most one
interval. What is larger is written in the background, and a kill may then also cost the steps done
meanwhile."""
Evaluate = Callable[[TrainState], dict[str, float]]


class Samples(Protocol):
    """What draws texts on the way, and keeps them."""

    def __call__(self, state: TrainState, step: int) -> None:
        """Draws with the parameters that evaluation uses; called in every process."""
        ...

    def sync(self) -> int:
        """Makes what was drawn durable; the offset to store in the commit."""
        ...


@dataclasses.dataclass(frozen=True)
class NoSamples:
    """Draws nothing."""

    def __call__(self, state: TrainState, step: int) -> None:
        """Nothing."""

    def sync(self) -> int:
        """Nothing was written."""
        return 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended: at the last step, early because it got no better, or by a signal."""

    state: TrainState
    step: int
    finished: bool
    standing: Standing


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and what follows from it."""

    on_the_way: Mapping[str, Evaluate]
    """The sets that are evaluated at every evaluation, by name."""
    test: Evaluate | None
    """The set that is evaluated at the end alone."""
    selection: Selection
    patience: int | None
    """After how many evaluations that were no better the run ends; None is never."""
    hooks: Hooks
    writers: Writers
    progress: Progress

    def __call__(
        self, state: TrainState, step: int, standing: Standing
    ) -> tuple[float | None, Standing]:
        """Evaluates all sets on the way, a line each; the score, and the standing after it."""
        results = {name: self._one(state, step, name) for name in self.on_the_way}
        score = self.selection.of(results)
        after = standing.after(score)
        for name, values in results.items():
            best = name == self.selection.split and standing.best is not None and not after.since
            self.progress.evaluation(step, name, values, best=best)
        self.hooks.evaluation(step, state, results)
        return score, after

    def at_end(self, state: TrainState, step: int) -> None:
        """Evaluates the test set, if there is one."""
        if self.test is not None:
            values = self._one(state, step, "test")
            self.progress.evaluation(step, "test", values)
            self.hooks.evaluation(step, state, {"test": values})

    def ends(self, standing: Standing) -> bool:
        """Whether the run has got no better for long enough."""
        return self.patience is not None and standing.since >= self.patience

    def _one(self, state: TrainState, step: int, name: str) -> dict[str, float]:
        self.progress.phase("evaluating")
        evaluate = self.test if name == "test" else self.on_the_way[name]
        assert evaluate is not None
        values = evaluate(state)
        self.writers.write(step, name, values)
        self.progress.phase("")
        return values


def train(
    state: TrainState,
    *,
    step: int,
    feed: Feed,
    cadence: Cadence,
    log: MetricsLog,
    writers: Writers,
    checkpoints: Checkpoints,
    progress: Progress,
    stop: StopAgreement,
    validate: Evaluate | None,
    test: Evaluate | None,
    sets: Mapping[str, Evaluate] = MappingProxyType({}),
    selection: Selection = Selection(score_of(None)),  # noqa: B008 - a pure function of nothing
    standing: Standing = Standing(),  # noqa: B008 - frozen
    patience: int | None = None,
    evaluation_due: bool = False,
    samples: Samples = NoSamples(),
    sample_due: bool = False,
    hooks: Hooks | None = None,
    at_step: Callable[[int, TrainState], None] = lambda step, state: None,
    changes: Changes = no_changes,
    fetch: Callable[[Any], Any] = jax.device_get,
) -> Outcome:
    """Trains from `step` to the end of the cadence, until it gets no better or until asked to stop;
    the last step's state is always committed.

    `evaluation_due` and `sample_due` say that a signal put off the evaluation, or the sample, of
    `step`. `at_step` is called with every step at which a dispatch ends (the profiler, the lock),
    `changes` before it, and may change numbers of the state; `hooks` are the user's. `fetch` reads
    numbers from the device. Raises `Diverged`, `CheckpointError`, and what the feed raises; nothing
    that is not finite is committed.
    """
    pending: tuple[int, Any] | None = None
    saved = step if step else None
    hooks = Hooks() if hooks is None else hooks
    own = {} if validate is None else {"validation": validate}
    evaluate = Evaluation({**own, **sets}, test, selection, patience, hooks, writers, progress)
    commit = functools.partial(
        _commit,
        log=log,
        writers=writers,
        checkpoints=checkpoints,
        by=selection.text,
        samples=samples,
    )
    early = False
    # What a signal leaves out here is still due when the run goes on: nothing is committed then.
    if cadence.sample and (step == 0 or sample_due) and stop.status is None:
        samples(state, step)
    due = (step == 0 or evaluation_due) and bool(evaluate.on_the_way) and stop.status is None
    if due and cadence.evaluate:
        reached, after = evaluate(state, step, standing)
        # Before the first step there is nothing to keep, so it cannot be the best either.
        standing = after if step else standing
        if early := bool(step) and evaluate.ends(standing):
            evaluate.at_end(state, step)
        if step:  # the commit of this step lacks its score
            commit(state, step, reached, standing, early=early)
    log.resume(late=feed.compiles_late)
    heartbeat.beat("compiling", step)  # some programs are compiled only at their first call

    # --debug_nans runs a bad step again operation by operation, and each of them brings its
    # constants along.
    with jax.transfer_guard("allow" if jax.config.values["jax_debug_nans"] else "disallow"):
        while step < cadence.total and stop.status is None and not early:
            state = changes(step, state, asked=stop.asked)
            at_step(step, state)
            count = cadence.next(step) - step
            state, sums = feed.advance(state, count)  # dispatched, not awaited
            step += count
            # 1. The numbers of the dispatch before: the host waits for those, while the device
            # works on the new ones.
            if pending is not None:
                log.take(pending[0], fetch(pending[1]))
            pending = (step, sums)
            stop.exchange()  # all processes stop at the same step
            heartbeat.beat("training", step)
            checkpoints.check()  # a background save that failed is said now, not at the next save
            evaluates = bool(evaluate.on_the_way) and cadence.evaluates(step)
            saves = cadence.saves(step)
            hooked = hooks.at_step is not None and cadence.logs(step)
            samples_now = cadence.samples(step)
            if not (evaluates or saves or hooked or samples_now or stop.status is not None):
                continue
            # 2. Here the host waits for the device: what follows speaks of this step, so its
            # numbers must be known (and finite) first.
            log.take(step, fetch(sums))
            pending = None
            log.pause()
            if hooked:
                hooks.step(step, state, log.means)
            reached = None
            # Who sends a signal grants seconds, and an evaluation may take minutes: it is put off,
            # and done first when the run goes on.
            late = stop.status is not None and step < cadence.total
            put_off = evaluates and late
            if evaluates and not put_off:
                # 3. Evaluation before the commit: the commit holds the offset of its line, and
                # whether it is the best.
                before = standing.best
                reached, standing = evaluate(state, step, standing)
                early = step < cadence.total and evaluate.ends(standing)
                saves = saves or early or standing.best != before
            if cadence.sample and (samples_now or early) and not late:
                samples(state, step)
            if step == cadence.total or early:
                # 4. The last line of a finished run; also before the commit, so that a finished run
                # is never without it.
                evaluate.at_end(state, step)
            if saves or stop.status is not None:
                # 5. Metrics durable before the commit that refers to them.
                commit(
                    state,
                    step,
                    reached,
                    standing,
                    evaluation_due=put_off,
                    sample_due=samples_now and late,
                    early=early,
                )
                saved = step
            heartbeat.beat("training", step)
            log.resume()
        if pending is not None:
            # a signal came while nothing was due: the host waits, then saves
            log.take(pending[0], fetch(pending[1]))
        if step and saved != step:
            commit(state, step, None, standing)
    at_step(step, state)
    progress.phase("saving")
    heartbeat.beat("saving", step)
    checkpoints.wait()
    heartbeat.beat("ending", step)
    return Outcome(state, step, finished=early or step >= cadence.total, standing=standing)


def _commit(
    state: TrainState,
    step: int,
    score: float | None,
    standing: Standing,
    *,
    log: MetricsLog,
    writers: Writers,
    checkpoints: Checkpoints,
    by: str,
    samples: Samples,
    evaluation_due: bool = False,
    sample_due: bool = False,
    early: bool = False,
) -> None:
    heartbeat.beat("saving", step)
    record = {
        "metrics_bytes": writers.sync(),
        "interval": log.record(),
        "best": standing.best,
        "best_by": by,
        "since_best": standing.since,
        "ended_early": early,
        "evaluation_due": evaluation_due,
        "samples_bytes": samples.sync(),
        "sample_due": sample_due,
    }
    checkpoints.save(
        step, state, record, metric=score, wait=tree.size(state) <= MAX_AWAITED_NUMBERS
    )
