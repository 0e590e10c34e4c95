"""The loop: every effect of training, in order.

The step is pure; this is where time passes. The host runs one dispatch behind the device: it starts
the next steps, then reads the numbers of those before. It waits only where it says so.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxtrain import tree
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.processes import heartbeat
from jaxtrain.processes.group import StopAgreement
from jaxtrain.report.metrics_file import Writers
from jaxtrain.report.terminal.progress import Progress
from jaxtrain.tasks import score_of
from jaxtrain.train.cadence import Cadence
from jaxtrain.train.feeds import Feed
from jaxtrain.train.metrics_log import MetricsLog
from jaxtrain.train.state import TrainState

MAX_AWAITED_NUMBERS = 4_000_000
"""Numbers in a state whose commit is waited for: some 30 ms, after which a kill costs at most one
interval. What is larger is written in the background, and a kill may then also cost the steps done
meanwhile."""
Evaluate = Callable[[TrainState], dict[str, float]]
Score = Callable[[Mapping[str, float]], float]
"""What the best checkpoint is chosen by, greater is better."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended: at the last step, or earlier by a signal."""

    state: TrainState
    step: int
    finished: bool


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
    score: Score = score_of(None),  # noqa: B008 - a pure function of nothing
    best: float | None = None,
    evaluation_due: bool = False,
    at_step: Callable[[int, TrainState], None] = lambda step, state: None,
    fetch: Callable[[Any], Any] = jax.device_get,
) -> Outcome:
    """Trains from `step` to the end of the cadence, or until asked to stop; the last step's state
    is always committed.

    `evaluation_due` says that a signal put off the evaluation of `step`. `at_step` is called with
    every step at which a dispatch ends (the profiler, the lock). `fetch` reads numbers from the
    device. Raises `Diverged`, `CheckpointError`, and what the feed raises; nothing that is not
    finite is committed.
    """
    pending: tuple[int, Any] | None = None
    saved = step if step else None
    if (step == 0 or evaluation_due) and validate is not None and cadence.evaluate:
        best = _evaluate(state, step, "validation", validate, score, writers, progress, best)[1]
    log.resume(late=feed.compiles_late)
    heartbeat.beat("compiling", step)  # some programs are compiled only at their first call

    # --debug_nans runs a bad step again operation by operation, and each of them brings its
    # constants along.
    with jax.transfer_guard("allow" if jax.config.values["jax_debug_nans"] else "disallow"):
        while step < cadence.total and stop.status is None:
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
            evaluates, saves = validate is not None and cadence.evaluates(step), cadence.saves(step)
            if not (evaluates or saves or stop.status is not None):
                continue
            # 2. Here the host waits for the device: what follows speaks of this step, so its
            # numbers must be known (and finite) first.
            log.take(step, fetch(sums))
            pending = None
            log.pause()
            reached = None
            # Who sends a signal grants seconds, and an evaluation may take minutes: it is put off,
            # and done first when the run goes on.
            put_off = evaluates and stop.status is not None and step < cadence.total
            if validate is not None and evaluates and not put_off:
                # 3. Evaluation before the commit: the commit holds the offset of its line, and
                # whether it is the best.
                reached, higher = _evaluate(
                    state, step, "validation", validate, score, writers, progress, best
                )
                saves, best = saves or higher != best, higher
            if step == cadence.total and test is not None:
                # 4. The last line of a finished run; also before the commit, so that a finished run
                # is never without it.
                _evaluate(state, step, "test", test, score, writers, progress, None)
            if saves or stop.status is not None:
                # 5. Metrics durable before the commit that refers to them.
                _commit(
                    state, step, reached, best, log, writers, checkpoints, evaluation_due=put_off
                )
                saved = step
            heartbeat.beat("training", step)
            log.resume()
        if pending is not None:
            # a signal came while nothing was due: the host waits, then saves
            log.take(pending[0], fetch(pending[1]))
        if step and saved != step:
            _commit(state, step, None, best, log, writers, checkpoints)
    at_step(step, state)
    progress.phase("saving")
    heartbeat.beat("saving", step)
    checkpoints.wait()
    heartbeat.beat("ending", step)
    return Outcome(state, step, finished=step >= cadence.total)


def _evaluate(
    state: TrainState,
    step: int,
    split: str,
    evaluate: Evaluate,
    score: Score,
    writers: Writers,
    progress: Progress,
    best: float | None,
) -> tuple[float, float | None]:
    """Evaluates and writes one line; the score, and the best so far, which only a finite score can
    be."""
    progress.phase("evaluating")
    values = evaluate(state)
    reached = score(values)
    writers.write(step, split, values)
    progress.evaluation(step, split, values, best=best is not None and reached > best)
    progress.phase("")
    return reached, max(
        (each for each in (best, reached) if each is not None and math.isfinite(each)), default=None
    )


def _commit(
    state: TrainState,
    step: int,
    score: float | None,
    best: float | None,
    log: MetricsLog,
    writers: Writers,
    checkpoints: Checkpoints,
    *,
    evaluation_due: bool = False,
) -> None:
    heartbeat.beat("saving", step)
    record = {
        "metrics_bytes": writers.sync(),
        "interval": log.record(),
        "best": best,
        "evaluation_due": evaluation_due,
    }
    checkpoints.save(
        step, state, record, metric=score, wait=tree.size(state) <= MAX_AWAITED_NUMBERS
    )
