"""When what happens in a run: log lines, evaluations, commits, profiles, as functions of the
step."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cadence:
    """When what happens, as a function of the step alone, so that a resumed run cuts its dispatches
    where the first one did.

    >>> cadence = Cadence(total=100, per_call=8, log=50, evaluate=30, save=0)
    >>> [cadence.next(step) for step in (0, 24, 30, 48, 96)]
    [8, 30, 32, 50, 100]
    """

    total: int
    """The last step of the run."""
    per_call: int = 1
    """Steps of one dispatch."""
    log: int = 50
    """Steps between two lines of metrics."""
    evaluate: int = 0
    """Steps between two evaluations; 0 is never."""
    save: int = 0
    """Steps between two commits; 0 is at the end only."""
    sample: int = 0
    """Steps between two samples of text; 0 is never."""
    marks: tuple[int, ...] = ()
    """Steps at which something begins or ends, such as a profile."""

    def next(self, step: int) -> int:
        """The next step after `step` at which anything is due: a multiple of an interval, a mark or
        the end; a dispatch goes no further."""
        multiples = [
            every * (step // every + 1)
            for every in (self.per_call, self.log, self.evaluate, self.save, self.sample)
            if every
        ]
        return min([*multiples, *(mark for mark in self.marks if mark > step), self.total])

    def logs(self, step: int) -> bool:
        """Whether a line of metrics is due; the end always is."""
        return step == self.total or step % self.log == 0

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due; the end counts, if there are any at all."""
        return bool(self.evaluate) and (step % self.evaluate == 0 or step == self.total)

    def samples(self, step: int) -> bool:
        """Whether a sample is due; the end counts, if there are any at all."""
        return bool(self.sample) and (step % self.sample == 0 or step == self.total)

    def saves(self, step: int) -> bool:
        """Whether a commit is due; the end always is."""
        return step == self.total or (bool(self.save) and step % self.save == 0)
