"""`python -m jaxtrain COMMAND`: list, verify and report. Help answers without importing jax."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain import extras, messages
from jaxtrain.errors import RunError, UserError

HELP = """jaxtrain: train JAX models from one command

  python experiments/NAME.py [--flag=value ...]   train; --help lists the experiment's flags
  python -m jaxtrain list [FAMILY ...]            every named component: {families}
  python -m jaxtrain verify WORKDIR               check every file of every checkpoint
  python -m jaxtrain report WORKDIR [WORKDIR ...] write report.html and plots, of one run or several
"""
FAMILIES = {
    "models": "jaxtrain.models",
    "data": "jaxtrain.data",
    "tasks": "jaxtrain.tasks",
    "optimizers": "jaxtrain.optimizers",
    "schedules": "jaxtrain.schedules",
    "augment": "jaxtrain.augment",
}
"""Where each family has its table of names."""


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit status."""
    arguments = [argument for argument in argv if argument != "--traceback"]
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except RunError as error:
        if len(arguments) < len(argv):
            raise
        print(f"jaxtrain: error: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:
        # `| head` has read enough. What is still buffered must not raise again when Python closes
        # the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(arguments: Sequence[str]) -> int:
    if not arguments or any(
        argument in ("--help", "-h", "-help", "--helpfull", "help") for argument in arguments
    ):
        print(HELP.format(families=", ".join(FAMILIES)), end="")
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        raise UserError(
            f"unknown command {messages.shown(command)}; valid:"
            f" {', '.join(COMMANDS)}{messages.did_you_mean(command, COMMANDS)}"
        )
    if flag := next((argument for argument in rest if argument.startswith("-")), None):
        raise UserError(f"{command}: unknown flag {messages.printable(flag)}; it takes none")
    return COMMANDS[command](rest)


def list_names(families: Sequence[str]) -> int:
    """Prints the named components of the families, or of all, a line each."""
    for family in families:
        if family not in FAMILIES:
            near = messages.did_you_mean(family, FAMILIES)
            raise UserError(
                f"list {messages.printable(family)}: unknown; valid: {', '.join(FAMILIES)}{near}"
            )
    for family in dict.fromkeys(families or FAMILIES):
        names: Mapping[str, Any] = importlib.import_module(FAMILIES[family]).NAMES
        print(f"{family}  (--{'data' if family == 'data' else family.removesuffix('s')}=NAME)")
        width = max(map(len, names), default=0)
        for name, component in names.items():
            print(f"  {name.ljust(width)}  {_line(component)}")
    return 0


def _line(component: Any) -> str:
    """What a component is, and how it differs from its class's defaults."""
    settings = importlib.import_module("jaxtrain.config.settings")
    cls = component if isinstance(component, type) else type(component)
    own = [] if isinstance(component, type) else settings.of_component(component)
    texts = importlib.import_module("jaxtrain.config.values")
    changed = [
        f"{setting.name}={texts.text(setting.value)}"
        for setting in own
        if setting.value != setting.field.default
    ]
    return f"{settings.summary(cls) or cls.__name__}" + (
        f" [{', '.join(changed)}]" if changed else ""
    )


def verify(arguments: Sequence[str]) -> int:
    """Checks a workdir's checkpoints; 74 if a numbered step does not verify."""
    if len(arguments) != 1:
        raise UserError(
            f"verify: takes one WORKDIR, got {len(arguments)}; e.g. python -m jaxtrain verify"
            " runs/digits/today"
        )
    workdir = _workdir("verify", arguments[0])
    extras.require("verify", "orbax.checkpoint", "xxhash")
    # Reading files needs no card, and a run may be using it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return importlib.import_module("jaxtrain.checkpoints.checkpoints").verify_command(workdir)


def report(arguments: Sequence[str]) -> int:
    """Writes the report of one run into its folder, or of several into the working directory."""
    if not arguments:
        raise UserError(
            "report: takes at least one WORKDIR, got 0; e.g. python -m jaxtrain report"
            " runs/digits/today"
        )
    workdirs = [_workdir("report", argument) for argument in arguments]
    for workdir in workdirs:
        if not (workdir / "metrics.jsonl").is_file():
            raise UserError(
                f"report {messages.printable(str(workdir))}: holds no metrics.jsonl; is it the"
                " folder of a run?"
            )
    extras.require("report", "rich", "matplotlib")
    print(importlib.import_module("jaxtrain.report.page.html").write_report(workdirs))
    return 0


def _workdir(command: str, text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        what = "is a file, not a directory" if path.exists() else "no such directory"
        names = (
            [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
            if path.parent.is_dir()
            else []
        )
        raise UserError(
            f"{command} {messages.printable(text)}: {what}{messages.did_you_mean(path.name, names)}"
        )
    return path


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "list": list_names,
    "verify": verify,
    "report": report,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
