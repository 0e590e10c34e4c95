"""What a command of `python -m jaxtrain` is, and the arguments that several of them take."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxtrain import messages
from jaxtrain.errors import UserError


@dataclasses.dataclass(frozen=True)
class Command:
    """One command. Its file imports what is heavy inside `run`, so that help answers at once."""

    arguments: str
    """What it takes, as the help shows it."""
    help: str
    """What it does."""
    run: Callable[[Sequence[str]], int]
    """Does it, with what stood behind its name; returns the exit status."""


def refuse_flags(command: str, arguments: Sequence[str], takes: str = "none") -> None:
    """Raises `UserError` for a flag that the command does not take."""
    if flag := next((argument for argument in arguments if argument.startswith("-")), None):
        raise UserError(f"{command}: unknown flag {messages.printable(flag)}; it takes {takes}")


def workdirs(
    command: str, arguments: Sequence[str], *, several: bool, takes: str = "none"
) -> list[Path]:
    """The folders of runs that a command was given, at least one; `UserError` for anything
    else."""
    refuse_flags(command, arguments, takes)
    if not arguments or (len(arguments) > 1 and not several):
        raise UserError(
            f"{command}: takes {'at least one' if several else 'one'} WORKDIR, got"
            f" {len(arguments)}; e.g. python -m jaxtrain {command} runs/digits/today"
        )
    return [_folder(command, argument) for argument in arguments]


def _folder(command: str, text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        return path
    missing = f"no such directory{messages.did_you_mean_path(text)}"
    what = "is a file, not a directory" if path.exists() else missing
    raise UserError(f"{command} {messages.printable(text)}: {what}")
