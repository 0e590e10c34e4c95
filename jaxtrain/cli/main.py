"""`python -m jaxtrain COMMAND`: finds the command and runs it. Help answers without importing jax.

A new command is a file with a `Command` and a line in `COMMANDS`.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxtrain import messages
from jaxtrain.cli import (
    export,
    list_components,
    lm_eval_tasks,
    predict,
    report,
    run_file,
    sample,
    set_numbers,
    verify,
)
from jaxtrain.errors import RunError, UserError

COMMANDS = {
    "list": list_components.COMMAND,
    "verify": verify.COMMAND,
    "report": report.COMMAND,
    "predict": predict.COMMAND,
    "sample": sample.COMMAND,
    "lm_eval": lm_eval_tasks.COMMAND,
    "export": export.COMMAND,
    "set": set_numbers.COMMAND,
}


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit status."""
    messages.open_standard_streams()
    if argv and argv[0].endswith(".py"):
        return _run_file(argv)
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


def help_text() -> str:
    """How to train, and every command, a line each."""
    train = "train; --help lists the experiment's flags"
    rows = {
        "python experiments/NAME.py [--flag=value ...]": train,
        "python -m jaxtrain FILE.py [--flag=value ...]": "the same, for any experiment's file",
    }
    for name, command in COMMANDS.items():
        rows[f"python -m jaxtrain {name} {command.arguments}".rstrip()] = command.help
    width = max(map(len, rows))
    lines = [f"  {usage.ljust(width)} {what}" for usage, what in rows.items()]
    return "\n".join(["jaxtrain: train JAX models from one command", "", *lines])


def command_help(name: str) -> str:
    """What one command does, and every flag of its with an example.

    >>> print(command_help("verify"))
    python -m jaxtrain verify WORKDIR
    <BLANKLINE>
    check every file of every checkpoint
    """
    command = COMMANDS[name]
    lines = [f"python -m jaxtrain {name} {command.arguments}", "", command.help]
    if command.flags:
        shown = [f"--{flag}" + f"={value}" * bool(value) for flag, value in command.flags.items()]
        lines += ["", "flags, with examples:", *(f"  {flag}" for flag in shown)]
    return "\n".join(lines)


def _meant(word: str) -> str:
    """What was probably meant by a word that is no command: one of them, or an experiment here."""
    if word in ("generate", "chat", "complete", "talk", "inference"):
        return "; did you mean 'sample'?"
    if near := messages.did_you_mean(word, COMMANDS):
        return near
    here = {path.stem: str(path) for path in sorted(Path("experiments").glob("*.py"))}
    match = messages.nearest(word, here)
    return "" if match is None else f"; did you mean {here[match]!r}?"


def _run_file(argv: Sequence[str]) -> int:
    try:
        return run_file.run(argv)
    except UserError as error:
        print(f"jaxtrain: error: {error}", file=sys.stderr)
        return error.status


def _run(arguments: Sequence[str]) -> int:
    helps = ("--help", "-h", "-help", "--helpfull")
    asked = arguments[-1:] == ["help"] and len(arguments) < 3  # else it may be a flag's value
    asked = asked or any(argument in helps for argument in arguments)
    if asked and arguments[0] in COMMANDS:
        print(command_help(arguments[0]))
        return 0
    if not arguments or asked:
        print(help_text())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        raise UserError(
            f"unknown command {messages.shown(name)}; valid:"
            f" {', '.join(COMMANDS)}, or FILE.py{_meant(name)}"
        )
    return COMMANDS[name].run(rest)
