"""What the best checkpoint is chosen by, and when a run that gets no better stops early."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

from jaxtrain import messages
from jaxtrain.errors import UserError

Results = Mapping[str, Mapping[str, float]]
"""What one evaluation found: set -> metric -> value."""
Score = Callable[[Mapping[str, float]], float]
"""The metrics of one set as one number, greater is better."""
_KNOWN = {"loss": "min", "perplexity": "min", "accuracy": "max"}


@dataclasses.dataclass(frozen=True)
class Selection:
    """The set and the number in it that decide which checkpoint is the best, greater is better."""

    score: Score
    split: str = "validation"
    text: str = ""
    """What --best said, kept in every checkpoint: scores of different kinds are not compared."""

    def of(self, results: Results) -> float | None:
        """The score of an evaluation; None if it was of other sets only."""
        return self.score(results[self.split]) if self.split in results else None


@dataclasses.dataclass(frozen=True)
class Standing:
    """The best score so far, and how many evaluations there were since.

    >>> standing = Standing()
    >>> for score in (0.5, 0.7, float("nan"), 0.7):
    ...     standing = standing.after(score)
    >>> standing
    Standing(best=0.7, since=2)
    """

    best: float | None = None
    since: int = 0

    def after(self, score: float | None) -> "Standing":
        """The standing after one more evaluation. Only a finite score can be the best, and one
        that is only equal is no better."""
        if score is None:
            return self
        if math.isfinite(score) and (self.best is None or score > self.best):
            return Standing(score, 0)
        return Standing(self.best, self.since + 1)


def parse(text: str, sets: Iterable[str], default: Score) -> Selection:
    """The selection that --best asks for: `METRIC`, `SET/METRIC`, with `,min` or `,max` behind it
    where the name does not say which is better; empty is the task's own score.

    >>> parse("error,min", ["validation"], default=lambda values: 0.0).score({"error": 2.0})
    -2.0

    `UserError` for a set that is not evaluated on the way, or an unknown direction.
    """
    sets = list(sets)
    if not text:
        return Selection(default)
    name, comma, way = text.partition(",")
    split, slash, metric = name.rpartition("/")
    split = split if slash else "validation"
    flag = f"--best={messages.printable(text)}"
    if split not in sets:
        near = messages.did_you_mean(split, sets)
        listed = ", ".join(sets) if sets else "none; set --data.validation"
        raise UserError(f"{flag}: {split!r} is not evaluated on the way; there is {listed}{near}")
    known = _KNOWN.get(re.split("[_/]", metric)[-1])
    if comma and way not in ("min", "max"):
        raise UserError(f"{flag}: {way!r} is no direction; write {name},min or {name},max")
    if not metric or not (way or known):
        raise UserError(
            f"{flag}: is more or less of it better? write {name or 'loss'},min or"
            f" {name or 'accuracy'},max{messages.did_you_mean(metric, _KNOWN)}"
        )
    sign = -1.0 if (way or known) == "min" else 1.0

    def score(values: Mapping[str, float]) -> float:
        check_metric(flag, metric, values)
        return sign * values[metric]

    return Selection(score, split, text)


def check_metric(flag: str, metric: str, known: Iterable[str]) -> None:
    """Raises `UserError`, with those that there are, if a metric is none of an evaluation's."""
    known = list(known)
    if metric not in known:
        near = messages.did_you_mean(metric, known)
        raise UserError(
            f"{flag}: the task has no metric {metric!r}; it has {', '.join(known)}{near}"
        )


def evaluations(text: str | None) -> int | None:
    """How many evaluations --stop_after means; None is never.

    >>> evaluations("5evals"), evaluations("3"), evaluations(None)
    (5, 3, None)
    """
    return None if text is None else int(re.sub("evals?$", "", text))
