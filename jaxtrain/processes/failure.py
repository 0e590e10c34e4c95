"""Failure attribution: which worker of a group failed first, and how. The functions here decide
from observations alone and use neither a clock nor a process.

A failure spreads: when one worker dies its peers abort, when one hangs its peers wait for ever. So
the rules look for the first failure, not for every worker in a bad state.
"""

import dataclasses
import signal
from collections.abc import Mapping, Sequence

from jaxtrain.errors import BAD_INPUT, FINAL, INTERRUPTED, TRY_AGAIN

SILENCE_LIMITS: Mapping[str, float] = {
    "starting": 300,
    "joining": 600,
    "data": 3600,
    "compiling": 3600,
    "training": 600,
    "evaluating": 600,
    "saving": 1800,
    "ending": 1800,
}
"""Seconds without a heartbeat after which a worker counts as hung, by the phase that it is in."""
FREQUENT_PHASES = ("training", "evaluating")
"""The phases with frequent heartbeats: --hang_seconds sets their limits. In the other phases a long
silence is normal."""
STOPPED_SECONDS = 2.0
"""How long a worker may be stopped by a signal before that counts as a failure."""
GRACE_SECONDS, BAD_INPUT_GRACE_SECONDS = 1.0, 5.0
"""How long the supervisor waits for more workers to exit after the first one. Workers refuse the
same bad flags seconds apart, because each imports at its own pace."""

PEER_LOSS_STATUSES = (TRY_AGAIN, -signal.SIGABRT)
"""How a worker exits that lost its peers: it exits by itself, or jax's coordination service aborts
it."""
STOP_STATUSES = (0, TRY_AGAIN, INTERRUPTED, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)
"""How a worker may exit after it received a stop signal."""
ACTIVITIES = {
    "starting": "while starting",
    "joining": "while waiting for the others",
    "data": "while opening its data",
    "compiling": "while compiling",
    "training": "while training",
    "evaluating": "while evaluating",
    "saving": "while saving",
    "ending": "while ending",
}
"""What a worker does in each phase, in words."""


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the supervisor knows of one worker. All times are seconds of one clock.

    `exit_status` is None while the worker lives, and minus the signal's number if a signal killed
    it, as in `subprocess`.
    """

    index: int
    last_progress: float
    """When the supervisor last saw a new heartbeat; before the first one, when the worker
    started."""
    phase: str = "starting"
    step: int | None = None
    stopped_since: float | None = None
    exit_status: int | None = None
    exit_time: float | None = None

    @property
    def activity(self) -> str:
        """What the worker did last, in words.

        >>> Observation(0, 0.0, "training", 37).activity
        'while training at step 37'
        """
        return ACTIVITIES[self.phase] + ("" if self.step is None else f" at step {self.step}")


@dataclasses.dataclass(frozen=True)
class Failure:
    """The worker that failed first, and how, in words. `final_status` is its exit status if a
    restart cannot help, else None."""

    index: int
    description: str
    final_status: int | None = None


def silence_limits(hang_seconds: float | None = None) -> Mapping[str, float]:
    """Seconds without a heartbeat that each phase may last.

    >>> silence_limits(8)["training"], silence_limits(8)["compiling"]
    (8, 3600)
    """
    if hang_seconds is None:
        return SILENCE_LIMITS
    return {**SILENCE_LIMITS, **dict.fromkeys(FREQUENT_PHASES, hang_seconds)}


def first_failure(
    observations: Sequence[Observation],
    now: float,
    limits: Mapping[str, float],
    *,
    stop_requested: bool = False,
) -> Failure | None:
    """The first failure in a group; None while there is none, or while it is too early to name the
    worker.

    >>> observations = [
    ...     Observation(0, 9.0, "training", 38),
    ...     Observation(1, 9.0, "training", 37, exit_status=-9, exit_time=9.5),
    ... ]
    >>> first_failure(observations, 11.0, SILENCE_LIMITS).description
    'was killed by SIGKILL while training at step 37'

    `stop_requested` says that the workers received a stop signal, so an exit by it is no failure.
    """
    good_statuses = STOP_STATUSES if stop_requested else (0,)
    failed = [
        each
        for each in observations
        if each.exit_status is not None and each.exit_status not in good_statuses
    ]
    if failed:
        return _failure_by_exit(failed, observations, now)
    return _failure_by_stop(observations, now) or _failure_by_hang(observations, now, limits)


def describe_exit(status: int) -> str:
    """How a process exited, in words.

    >>> describe_exit(-11), describe_exit(1), describe_exit(75)
    ('was killed by SIGSEGV', 'ended with status 1', 'ended with status 75 (it lost a peer, or was
    asked to end)')
    """
    if status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"
    reason = "it lost a peer, or was asked to end" if status == TRY_AGAIN else FINAL.get(status)
    return f"ended with status {status}" + (f" ({reason})" if reason else "")


def _failure_by_exit(
    failed: Sequence[Observation], observations: Sequence[Observation], now: float
) -> Failure | None:
    alive = [each for each in observations if each.exit_status is None]
    only_bad_input = all(each.exit_status == BAD_INPUT for each in failed)
    grace = BAD_INPUT_GRACE_SECONDS if only_bad_input else GRACE_SECONDS
    if alive and now - min(map(_exit_time, failed)) < grace:
        return None
    first = min(
        failed,
        key=lambda each: (each.exit_status in PEER_LOSS_STATUSES, _exit_time(each), each.index),
    )
    lost_peers = first.exit_status in PEER_LOSS_STATUSES
    if lost_peers and any(each.stopped_since is not None for each in alive):
        return _failure_by_stop(observations, now)  # the stopped worker is the lost peer
    # Every worker exits with the same final status, and worker 0 has printed the reason on the
    # terminal.
    if first.exit_status in FINAL:
        same_status = [each for each in failed if each.exit_status == first.exit_status]
        first = min(same_status, key=lambda each: each.index)
    assert first.exit_status is not None
    return Failure(
        first.index,
        f"{describe_exit(first.exit_status)} {first.activity}",
        first.exit_status if first.exit_status in FINAL else None,
    )


def _failure_by_stop(observations: Sequence[Observation], now: float) -> Failure | None:
    stopped = [
        (each.stopped_since, each.index, each)
        for each in observations
        if each.exit_status is None and each.stopped_since is not None
    ]
    if not stopped:
        return None
    since, index, first = min(stopped, key=lambda entry: entry[:2])
    if now - since <= STOPPED_SECONDS:
        return None
    return Failure(index, f"was stopped by a signal {first.activity}")


def _failure_by_hang(
    observations: Sequence[Observation], now: float, limits: Mapping[str, float]
) -> Failure | None:
    """The other workers wait for those at the lowest step. While one of these is within its limit,
    nothing is wrong."""
    alive = [each for each in observations if each.exit_status is None]
    slowest = [each for each in alive if _last_step(each) == min(map(_last_step, alive))]
    if not slowest or any(now - each.last_progress <= limits[each.phase] for each in slowest):
        return None
    early = [each for each in observations if each.exit_status == 0 and each.phase != "ending"]
    if early:  # it exited before its work was done, and the others wait for it in vain
        first = min(early, key=_exit_time)
        return Failure(first.index, f"ended with status 0 before the others {first.activity}")
    first = min(
        slowest, key=lambda each: (each.stopped_since is None, each.last_progress, each.index)
    )
    if first.stopped_since is not None:
        return Failure(first.index, f"was stopped by a signal {first.activity}")
    seconds = now - first.last_progress
    return Failure(first.index, f"hung {first.activity} (no progress for {seconds:.0f} s)")


def _last_step(worker: Observation) -> int:
    return -1 if worker.step is None else worker.step


def _exit_time(worker: Observation) -> float:
    assert worker.exit_time is not None
    return worker.exit_time
