"""The journal of a run: which numbers of the step were changed at which step, while it trained.

A line of `changes.jsonl` is one request of `python -m jaxtrain set`, written to the disk before
the first step that computes with it. So a run that was killed goes on with the same bits, and a
new workdir that holds a copy of the journal repeats the run.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from jaxtrain import durable_files
from jaxtrain.errors import UserError
from jaxtrain.messages import printable

NAME = "changes.jsonl"


@dataclasses.dataclass(frozen=True)
class Change:
    """What one request changed."""

    step: int
    """The last step with the numbers of before; the next computes with the new ones."""
    request: str
    """Which request it was, so that none counts twice."""
    values: Mapping[str, float]
    before: Mapping[str, float]
    flags: Mapping[str, float]
    """What the flags of the run said of these numbers then: with other flags it says nothing."""

    def line(self) -> str:
        """The line of the journal."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False) + "\n"

    @classmethod
    def parse(cls, line: bytes | str) -> Self:
        """Reads a line; `ValueError` for anything else."""
        found = json.loads(line)
        if not isinstance(found, dict) or set(found) != {
            field.name for field in dataclasses.fields(cls)
        }:
            raise ValueError("other keys")
        names = set(_numbers(found["values"]))
        if names != set(_numbers(found["before"])) or names != set(_numbers(found["flags"])):
            raise ValueError("other names")
        if type(found["step"]) is not int or found["step"] < 0:
            raise ValueError("no step")
        if not isinstance(found["request"], str):
            raise ValueError("no request")
        return cls(**found)


def _numbers(values: Any) -> Mapping[str, float]:
    if not isinstance(values, dict) or not all(
        type(each) in (int, float) for each in values.values()
    ):
        raise ValueError("no numbers")
    return values


def read(folder: str | os.PathLike[str]) -> list[Change]:
    """The changes of a run in the order of their steps; none without a journal.

    >>> read("/nonexistent")
    []

    `UserError` for a line that is none, for the file is written whole or not at all.
    """
    path = Path(folder) / NAME
    try:
        lines = path.read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    changes: list[Change] = []
    for number, line in enumerate(lines, 1):
        try:
            change = Change.parse(line)
        except (ValueError, RecursionError):
            raise UserError(
                f"{printable(str(path))}:{number}: is no change; restore the file from a copy"
            ) from None
        if changes and change.step < changes[-1].step:
            raise UserError(
                f"{printable(str(path))}:{number}: step {change.step} comes after step"
                f" {changes[-1].step}; restore the file from a copy"
            )
        changes.append(change)
    return changes


def after(journal: Sequence[Change], new: Change) -> list[Change]:
    """The journal with a change more. It is the newest wish, so what an earlier start of the run
    changed of the same numbers at later steps is taken out.

    >>> def at(step: int, **values: float) -> Change:
    ...     return Change(step, str(step), values, values, values)
    >>> [(each.step, each.values) for each in after([at(2, a=1), at(9, a=2, b=3)], at(5, a=4))]
    [(2, {'a': 1}), (5, {'a': 4}), (9, {'b': 3})]
    """
    kept = [change for change in journal if change.step <= new.step]
    later = [_without(change, new.values) for change in journal if change.step > new.step]
    return [*kept, new, *(change for change in later if change.values)]


def _without(change: Change, names: Mapping[str, float]) -> Change:
    def rest(numbers: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in numbers.items() if name not in names}

    return dataclasses.replace(
        change,
        values=rest(change.values),
        before=rest(change.before),
        flags=rest(change.flags),
    )


def rewind(folder: Path, step: int) -> None:
    """Takes out the changes at `step` and after it, as a run does that goes on from there anew."""
    kept = [change for change in read(folder) if change.step < step]
    write(folder, kept)


def write(folder: Path, changes: Sequence[Change]) -> None:
    """Replaces the journal, durably, whole or not at all."""
    path = folder / NAME
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(change.line() for change in changes))
    durable_files.publish(temporary, path)
