"""The verdict: which worker of a group has failed, and by what; from what was seen of them alone,
without clock or process.

A failure spreads: peers of a dead worker abort, peers of a hung one wait for ever. So what is
judged is not who looks bad, but who came first.
"""

import dataclasses
import signal
from collections.abc import Mapping, Sequence

from jaxtrain.errors import BAD_INPUT, FINAL, INTERRUPTED, TRY_AGAIN

LIMITS: Mapping[str, float] = {
    "starting": 300,
    "joining": 600,
    "data": 3600,
    "compiling": 3600,
    "training": 600,
    "evaluating": 600,
    "saving": 1800,
    "ending": 1800,
}
"""Seconds without a beat after which a worker counts as hung, by the phase that it is in."""
SHORTENED = ("training", "evaluating")
"""The phases that beat often, so whose limits --hang_seconds sets; in the others, long silence is
not strange."""
STOPPED_SECONDS = 2.0
"""How long a worker may be stopped by a signal."""
GRACE_SECONDS, GRACE_BAD_INPUT = 1.0, 5.0
"""How long other deaths are waited for after the first one; peers refuse the same flags seconds
apart, for they import at their own pace."""

CONSEQUENCES = (TRY_AGAIN, -signal.SIGABRT)
"""How a worker ends that lost its peers: by its own decision, or jax's coordination service aborts
it."""
ASKED = (0, TRY_AGAIN, INTERRUPTED, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)
"""How a worker may end that was asked to."""
DOING = {
    "starting": "while starting",
    "joining": "while waiting for the others",
    "data": "while opening its data",
    "compiling": "while compiling",
    "training": "while training",
    "evaluating": "while evaluating",
    "saving": "while saving",
    "ending": "while ending",
}


@dataclasses.dataclass(frozen=True)
class Observation:
    """What is known of one worker; times are seconds of one clock.

    `status` is None while the worker lives, and minus the signal's number if it died of one, as
    `subprocess` has it.
    """

    index: int
    beat_at: float
    phase: str = "starting"
    step: int | None = None
    stopped_since: float | None = None
    status: int | None = None
    ended_at: float | None = None

    @property
    def doing(self) -> str:
        """What the worker was last at, in words.

        >>> Observation(0, 0.0, "training", 37).doing
        'while training at step 37'
        """
        return DOING[self.phase] + ("" if self.step is None else f" at step {self.step}")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The worker that failed first, in words, and its exit status if that settles the whole run."""

    index: int
    words: str
    final: int | None = None


def limits(hang_seconds: float | None = None) -> Mapping[str, float]:
    """Seconds without a beat that each phase may last.

    >>> limits(8)["training"], limits(8)["compiling"]
    (8, 3600)
    """
    return LIMITS if hang_seconds is None else {**LIMITS, **dict.fromkeys(SHORTENED, hang_seconds)}


def judge(
    observed: Sequence[Observation], now: float, limits: Mapping[str, float], *, asked: bool = False
) -> Verdict | None:
    """The first failure in a group, or None while there is none, or while it is too early to say
    whose it is.

    >>> seen = [
    ...     Observation(0, 9.0, "training", 38),
    ...     Observation(1, 9.0, "training", 37, status=-9, ended_at=9.5),
    ... ]
    >>> judge(seen, 11.0, LIMITS).words
    'was killed by SIGKILL while training at step 37'

    `asked` says that the workers were told to end, so that those who do are not at fault.
    """
    dead = [
        each
        for each in observed
        if each.status is not None and each.status not in (ASKED if asked else (0,))
    ]
    return (
        _by_death(dead, observed, now)
        if dead
        else _by_stop(observed, now) or _by_silence(observed, now, limits)
    )


def cause(status: int) -> str:
    """How a process ended, in words.

    >>> cause(-11), cause(1), cause(75)
    ('was killed by SIGSEGV', 'ended with status 1', 'ended with status 75 (it lost a peer, or was
    asked to end)')
    """
    if status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"
    why = "it lost a peer, or was asked to end" if status == TRY_AGAIN else FINAL.get(status)
    return f"ended with status {status}" + (f" ({why})" if why else "")


def _by_death(
    dead: Sequence[Observation], observed: Sequence[Observation], now: float
) -> Verdict | None:
    alive = [each for each in observed if each.status is None]
    grace = GRACE_BAD_INPUT if all(each.status == BAD_INPUT for each in dead) else GRACE_SECONDS
    if alive and now - min(map(_ended, dead)) < grace:
        return None
    culprit = min(dead, key=lambda each: (each.status in CONSEQUENCES, _ended(each), each.index))
    if culprit.status in CONSEQUENCES and any(each.stopped_since is not None for each in alive):
        return _by_stop(observed, now)  # they died of its silence
    # the same happened to all: the first worker has already said so on the terminal
    if culprit.status in FINAL:
        culprit = min(
            (each for each in dead if each.status == culprit.status), key=lambda each: each.index
        )
    assert culprit.status is not None
    return Verdict(
        culprit.index,
        f"{cause(culprit.status)} {culprit.doing}",
        culprit.status if culprit.status in FINAL else None,
    )


def _by_stop(observed: Sequence[Observation], now: float) -> Verdict | None:
    stopped = {
        each.index: each
        for each in observed
        if each.status is None and each.stopped_since is not None
    }
    since = {
        index: each.stopped_since
        for index, each in stopped.items()
        if each.stopped_since is not None
    }
    longest = min(since, key=lambda index: (since[index], index), default=None)
    if longest is None or now - since[longest] <= STOPPED_SECONDS:
        return None
    return Verdict(longest, f"was stopped by a signal {stopped[longest].doing}")


def _by_silence(
    observed: Sequence[Observation], now: float, limits: Mapping[str, float]
) -> Verdict | None:
    """Those furthest behind are the ones that the others wait for: while one of them is within its
    limit, nothing is wrong."""
    alive = [each for each in observed if each.status is None]
    behind = [each for each in alive if _place(each) == min(map(_place, alive))]
    if not behind or any(now - each.beat_at <= limits[each.phase] for each in behind):
        return None
    early = [each for each in observed if each.status == 0 and each.phase != "ending"]
    if early:  # it left before its work was done, and the others wait for it in vain
        left = min(early, key=_ended)
        return Verdict(left.index, f"ended with status 0 before the others {left.doing}")
    culprit = min(behind, key=lambda each: (each.stopped_since is None, each.beat_at, each.index))
    if culprit.stopped_since is not None:
        return Verdict(culprit.index, f"was stopped by a signal {culprit.doing}")
    seconds = now - culprit.beat_at
    return Verdict(culprit.index, f"hung {culprit.doing} (no progress for {seconds:.0f} s)")


def _place(worker: Observation) -> int:
    return -1 if worker.step is None else worker.step


def _ended(worker: Observation) -> float:
    assert worker.ended_at is not None
    return worker.ended_at
