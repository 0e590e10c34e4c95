"""What a command of `python -m jaxtrain` is, and the arguments that several of them take."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

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
    flags: Mapping[str, str | None] = dataclasses.field(default_factory=dict[str, str | None])
    """The flags that it takes, each with an example, or None for one that takes no value."""


def refuse_flags(command: str, arguments: Sequence[str], takes: str = "none") -> None:
    """Raises `UserError` for a flag that the command does not take."""
    if flag := next((argument for argument in arguments if argument.startswith("-")), None):
        raise UserError(f"{command}: unknown flag {messages.printable(flag)}; it takes {takes}")


def options(
    command: str,
    arguments: Sequence[str],
    known: Mapping[str, str | None],
    *,
    files: Sequence[str] = (),
    empty: Sequence[str] = (),
    others: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Path, dict[str, str]]:
    """The folder of a run and the values of `--name=value` that a command was given; `known` holds
    each name with an example, or None for one that takes no value; a file with one of the suffixes
    `files` may stand for the folder, and values of the names `empty` may be empty; `others` are
    the words of other toolkits for them. `UserError` for anything else.

    >>> options("export", [".", "--out=w"], {"out": "weights.safetensors", "overwrite": None})
    (PosixPath('.'), {'out': 'w'})
    """
    places, given = [], dict[str, str]()
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("-"):
            places.append(argument)
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        if name not in known:
            near = others.get(name.replace("-", "_")) or messages.nearest(name, known)
            hint = f"did you mean --{near}?" if near else f"valid: --{', --'.join(known)}"
            raise UserError(f"{command}: unknown flag --{messages.printable(name)}; {hint}")
        example = known[name]
        if example is None and equals:
            raise UserError(f"{command} --{name}: takes no value")
        if example is not None and not equals:
            if not waiting or waiting[0].startswith("-"):
                raise UserError(f"{command} --{name}: needs a value, e.g. --{name}={example}")
            value = waiting.pop(0)
        if example is not None and not value and name not in empty:
            raise UserError(f"{command} --{name}=: needs a value, e.g. --{name}={example}")
        if given.get(name, value) != value:
            raise UserError(f"{command}: --{name} is given twice; give it once")
        given[name] = value
    if files and len(places) == 1 and Path(places[0]).is_file():
        if places[0].endswith(tuple(files)):
            return Path(places[0]), given
        prompt = "; a text to go on from: --prompt=TEXT, or < FILE" if "prompt" in known else ""
        raise UserError(
            f"{command} {messages.printable(places[0])}: is a file; give the folder of a run, of a"
            f" Hugging Face model, or a {' or '.join(files)} file{prompt}"
        )
    [workdir] = workdirs(command, places, several=False)
    return workdir, given


def new_file(command: str, given: Mapping[str, str], suffixes: Sequence[str]) -> Path:
    """The file that `--out` names; `UserError` if there is no such folder, its suffix is none of
    these, or it is there and nobody said `--overwrite`."""
    if "out" not in given:
        raise UserError(f"{command}: needs --out=FILE{suffixes[0]}")
    path = Path(given["out"]).expanduser()
    flag = f"{command} --out={messages.printable(given['out'])}"
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{flag}: must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{flag}: is a directory; name a file in it")
    if path.exists() and "overwrite" not in given:
        raise UserError(f"{flag}: is there already; choose another name, or add --overwrite")
    if not path.parent.is_dir():
        raise UserError(f"{flag}: no such directory: {messages.printable(str(path.parent))}")
    return path


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
