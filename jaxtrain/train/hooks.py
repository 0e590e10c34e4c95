"""A user's own functions, called at steps and at evaluations with a copy of the state.

They can neither change the training nor end it: what they get is a copy that is theirs to keep, and
what they raise is said once and counted.
"""

import collections
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxtrain import messages
from jaxtrain.train.selection import Results
from jaxtrain.train.state import TrainState

Hook = Callable[[int, Any, Mapping[str, float]], Any]
"""`(step, state, metrics)`; what it returns is not looked at."""


class Hooks:
    """Calls the functions of a run, in every process; counts calls and failures by name.

    >>> hooks = Hooks(at_evaluation=lambda step, state, metrics: print(step, dict(metrics)))
    >>> hooks.evaluation(5, None, {"validation": {"loss": 0.5}})
    5 {'validation/loss': 0.5}
    """

    def __init__(
        self,
        at_step: Hook | None = None,
        at_evaluation: Hook | None = None,
        *,
        note: Callable[[str], None] = messages.warn,
    ) -> None:
        self.at_step, self.at_evaluation = at_step, at_evaluation
        self.calls: collections.Counter[str] = collections.Counter()
        self.failures: collections.Counter[str] = collections.Counter()
        self._note = note

    def step(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Calls `at_step` with the means of the line of metrics that was just written."""
        if self.at_step is not None:
            self._call("at_step", self.at_step, step, state, metrics)

    def evaluation(self, step: int, state: TrainState, results: Results) -> None:
        """Calls `at_evaluation` with all that was found, by `SET/METRIC`."""
        if self.at_evaluation is not None:
            flat = {
                f"{split}/{name}": value
                for split, values in results.items()
                for name, value in values.items()
            }
            self._call("at_evaluation", self.at_evaluation, step, state, flat)

    def summary(self) -> dict[str, str]:
        """A line for each function that failed, by its name."""
        return {
            name: f"failed {count} of {self.calls[name]} times"
            for name, count in self.failures.items()
        }

    def _call(
        self, name: str, hook: Hook, step: int, state: TrainState, metrics: Mapping[str, float]
    ) -> None:
        self.calls[name] += 1
        try:
            # A copy: the next step takes over the buffers of the state itself, and what a hook
            # donates or deletes must not be missed. The loop's guard is for the loop.
            with jax.transfer_guard("allow"):
                copy = jax.tree.map(lambda leaf: leaf.copy(), state)
                hook(step, copy, dict(metrics))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - none is worth a run
            self.failures[name] += 1
            if self.failures[name] == 1:
                frames = traceback.extract_tb(error.__traceback__)
                theirs = [each for each in frames if "site-packages" not in each.filename]
                where = theirs[-1]  # their own line, not that of a library which it called
                said = messages.one_line(f"{type(error).__name__}: {error}")
                self._note(
                    f"{name}: step {step}: {said} ({where.filename}:{where.lineno}); training goes"
                    " on"
                )
