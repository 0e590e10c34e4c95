"""`python -m jaxtrain set WORKDIR NAME=VALUE ...`: changes numbers of a run while it trains."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain import extras, messages
from jaxtrain.cli.command import Command, refuse_flags, workdirs
from jaxtrain.errors import UserError

WAIT_SECONDS = 10.0
"""How long it waits for the run to take the change."""
_EXAMPLE = "e.g. python -m jaxtrain set runs/digits/today optimizer.learning_rate=1e-4"


def run(arguments: Sequence[str]) -> int:
    """Leaves a request in the folder of a run, and says what became of it."""
    dashed = [each.lstrip("-") for each in arguments if each.startswith("-") and "=" in each]
    if dashed:
        raise UserError(f"set: write {messages.printable(dashed[0])} without --; {_EXAMPLE}")
    refuse_flags("set", arguments)
    places = [each for each in arguments if "=" not in each or Path(each).is_dir()]
    pairs = [each for each in arguments if each not in places]
    [folder] = workdirs("set", places, several=False)
    extras.require("set", "jax")
    # The run has the card.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxtrain.checkpoints import committed, lock
    from jaxtrain.inference import trained
    from jaxtrain.train import changes

    record = trained.read_record(folder)
    values = _values(pairs, record)
    newest = max(committed.numbered(folder / "checkpoints"), default=0)
    holder = lock.holder(folder)
    if not holder and newest >= record.get("total_steps", newest + 1):
        raise UserError(
            f"set {messages.printable(str(folder))}: the run has ended at step {newest:,}; go on"
            " with more --steps and the flags that you want"
        )
    request = changes.ask(folder, values)
    if not holder:
        print("no run is at work there; it takes the change when it goes on")
        return 0
    return _wait(folder, request)


def _values(pairs: Sequence[str], record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that were given; `UserError` for what the run cannot take."""
    from jaxtrain.train import changes

    numbers, rules = record.get("hyper", {}), record.get("hyper_rules", {})
    if not pairs:
        shown = ", ".join(f"{name}={value:g}" for name, value in numbers.items())
        raise UserError(f"set: needs NAME=VALUE; this run began with {shown}")
    values: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        flag = f"set {messages.printable(name)}={messages.shown(text)}"
        if name in rules and name not in numbers:
            raise UserError(
                f"{flag}: is off in this run, and no input of its step; stop it, and go on with"
                f" --{name}={messages.printable(text)} --allow_config_change={name}"
            )
        if name not in numbers and _has(record.get("config", {}), name):
            raise UserError(
                f"{flag}: is part of the program, not a number that it takes in; what can change:"
                f" {', '.join(numbers)}"
            )
        try:
            value: Any = float(text)
        except ValueError:
            value = text
        if why := changes.problem(name, value, numbers, rules):
            raise UserError(f"{flag}: {why}")
        if values.get(name, value) != value:
            raise UserError(f"{flag}: {name} is given twice; give it once")
        values[name] = value
    return values


def _has(config: Any, name: str) -> bool:
    """Whether a configuration has a setting of this dotted name."""
    first, _, rest = name.partition(".")
    return (
        isinstance(config, Mapping) and first in config and (not rest or _has(config[first], rest))
    )


def _wait(folder: Path, request: Path) -> int:
    """Waits until the run has taken the request, and says from which step on it holds."""
    from jaxtrain.checkpoints import lock
    from jaxtrain.report import changes_file

    until = time.monotonic() + WAIT_SECONDS
    while request.exists() and time.monotonic() < until and lock.holder(folder):
        time.sleep(0.05)
    if request.exists() and not lock.holder(folder):
        print("the run stopped before it took the change; it does when it goes on")
        return 0
    if request.exists():
        print("asked; the run takes it at the end of the dispatch that it is in")
        return 0
    for change in changes_file.read(folder):
        if change.request == request.stem:
            for name, value in change.values.items():
                before = change.before[name]
                print(f"{name}: {before:g} -> {value:g} after step {change.step:,}")
            return 0
    raise UserError("set: the run did not take it; its last lines say why")


COMMAND = Command(
    "WORKDIR NAME=VALUE [NAME=VALUE ...]",
    "change numbers of a run while it trains, e.g. optimizer.learning_rate=1e-4",
    run,
)
