"""Numbers of the step that change while a run trains: requests that lie in its folder, and the
state with the numbers of a step.

`python -m jaxtrain set` leaves a request. The run takes it when a dispatch ends, writes it into the
journal (`report/changes_file.py`), and goes on with the new numbers, which are inputs of the
compiled step: nothing is compiled again. All processes do so at the same step.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxtrain import durable_files, messages
from jaxtrain.errors import UserError
from jaxtrain.processes import group
from jaxtrain.report import changes_file
from jaxtrain.report.changes_file import Change
from jaxtrain.train import hyper
from jaxtrain.train.state import TrainState

REQUESTS = "requests"
FIXED = "total_steps"
"""The number that follows from the length of the run, which other things follow from, too."""


class Changes(Protocol):
    """What changes the numbers of a state between two dispatches."""

    def __call__(self, step: int, state: TrainState, *, asked: bool) -> TrainState:
        """The state to go on with from `step`; `asked` says that a request may be there."""
        ...


def no_changes(step: int, state: TrainState, *, asked: bool) -> TrainState:
    """Changes nothing."""
    del step, asked
    return state


def ask(folder: Path, values: Mapping[str, float]) -> Path:
    """Leaves a request in the folder of a run; its file is gone when the run has taken it."""
    place = folder / REQUESTS
    place.mkdir(exist_ok=True)
    path = place / f"{time.time_ns():020d}-{os.getpid()}.json"
    durable_files.write_json(path, dict(values))
    return path


def requests(folder: Path) -> list[Path]:
    """The requests that lie in the folder of a run, the oldest first."""
    try:
        names = sorted(os.listdir(folder / REQUESTS))
    except OSError:
        return []
    return [folder / REQUESTS / name for name in names if name.endswith(".json")]


def waiting(folder: Path) -> bool:
    """Whether requests lie there; some microseconds, for it is asked at every dispatch."""
    try:
        return any(name.endswith(".json") for name in os.listdir(folder / REQUESTS))
    except OSError:
        return False


def problem(name: str, value: Any, numbers: Mapping[str, Any], rules: hyper.Rules) -> str | None:
    """Why a number cannot be changed to a value, or None; `numbers` are those of the run."""
    if name not in numbers:
        near = messages.did_you_mean(name, numbers)
        return f"is none of the numbers that can be changed{near}"
    if name == FIXED:
        return "is the length of the run; stop it, and go on with another --steps"
    if type(value) not in (int, float):
        return "must be a number"
    return hyper.problem(value, rules.get(name, ()))


def since(
    changes: Sequence[Change], step: int, flags: Mapping[str, np.float32]
) -> tuple[dict[str, float], list[str]]:
    """The numbers that the journal gives to the state of `step`, and a line for each, or for what
    no longer holds; `flags` are those of today's flags."""
    values: dict[str, tuple[float, int]] = {}
    dropped: dict[str, str] = {}
    for change in changes:
        for name, value in change.values.items():
            why = _overruled(change, name, flags)
            if why:
                dropped[name] = f"note: {changes_file.NAME}: {name} at step {change.step}: {why}"
            elif change.step < step:
                values[name] = (value, change.step)
    lines = [
        f"note: {name} is {value:g}, set at step {at:,} ({changes_file.NAME})"
        for name, (value, at) in values.items()
    ]
    return {name: value for name, (value, _) in values.items()}, [*lines, *dropped.values()]


def _overruled(change: Change, name: str, flags: Mapping[str, np.float32]) -> str:
    """Why a change does not count today, or nothing."""
    if name not in flags:
        return "is no number of this run any more, and is left out"
    if np.float32(change.flags[name]) != flags[name]:
        return f"--{name}={flags[name]:g} is newer, and holds"
    return ""


def with_numbers(state: TrainState, values: Mapping[str, float]) -> TrainState:
    """The state with some of its numbers replaced, each where it was."""
    new = {
        name: group.place(np.asarray(value, np.float32), state.hyper[name].sharding)
        for name, value in values.items()
    }
    return dataclasses.replace(state, hyper={**state.hyper, **new})


@dataclasses.dataclass
class Live:
    """The changes of a run that trains in `folder`: those of its journal, each at its step, and
    whatever is asked for meanwhile. All processes call it at the same steps."""

    folder: Path
    flags: Mapping[str, np.float32]
    """The numbers of the recipe, by today's flags."""
    rules: hyper.Rules
    journal: list[Change]
    say: Callable[[str], None]

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps at which the journal changes something; a dispatch has to end there."""
        return tuple(change.step for change in self.journal)

    def __call__(self, step: int, state: TrainState, *, asked: bool) -> TrainState:
        """The state to go on with from `step`."""
        values: dict[str, float] = {}
        for change in self.journal:
            if change.step == step:
                counts = [
                    name for name in change.values if not _overruled(change, name, self.flags)
                ]
                values |= {name: change.values[name] for name in counts}
        if asked:
            now = {name: float(jax.device_get(leaf)) for name, leaf in state.hyper.items()}
            with jax.transfer_guard("allow"):  # what is said to the others goes by their devices
                taken = group.on_main(lambda: self._taken(step, now | values))
            for change in [Change(**each) for each in taken]:
                self.journal = changes_file.after(self.journal, change)
                values |= change.values
                for name, value in change.values.items():
                    self.say(f"step {step:,}: {name} {change.before[name]:g} -> {value:g} (set)")
        return with_numbers(state, values) if values else state

    def _taken(self, step: int, now: dict[str, float]) -> list[dict[str, Any]]:
        """What lies there, as lines of the journal, where each is written before it counts."""
        taken, journal = [], self.journal
        known = {change.request for change in self.journal}
        for path in requests(self.folder):
            if path.stem not in known:
                try:
                    values = self._read(path, now)
                except UserError as error:
                    self.say(f"note: {error}")
                else:
                    change = Change(
                        step=step,
                        request=path.stem,
                        values=values,
                        before={name: now[name] for name in values},
                        flags={name: float(self.flags[name]) for name in values},
                    )
                    journal = changes_file.after(journal, change)
                    changes_file.write(self.folder, journal)
                    now |= values
                    taken.append(dataclasses.asdict(change))
            path.unlink(missing_ok=True)
        return taken

    def _read(self, path: Path, now: Mapping[str, float]) -> dict[str, float]:
        """The numbers of a request; `UserError` if it asks for what cannot be."""
        try:
            values = json.loads(path.read_bytes())
            items = list(values.items())
        except (OSError, ValueError, AttributeError, RecursionError):
            raise UserError(f"{path.name} in {REQUESTS}: is no request, and was left out") from None
        for name, value in items:
            if why := problem(name, value, now, self.rules):
                shown = messages.shown(str(value))
                raise UserError(f"set {messages.printable(name)}={shown}: {why}; it was left out")
        return {name: float(np.float32(value)) for name, value in items}
