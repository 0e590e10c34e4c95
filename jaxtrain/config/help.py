"""The layout of `--help`: every flag of a run in groups, in columns as wide as the terminal."""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxtrain import config
from jaxtrain.config import record, secrets, settings, values


class Entry(NamedTuple):
    """One flag in the help."""

    name: str
    default: str
    takes: str
    help: str
    boolean: bool = False


def help_text(run: config.Run, *, full: bool = False, width: int = 0, about: str = "") -> str:
    """The flags in groups; with `full`, also those that the other offered components would bring.

    >>> run = config.Run(name="toy", steps=100, **dict.fromkeys(config.FAMILIES))
    >>> print(help_text(run, width=80)[:115])
    toy
    <BLANKLINE>
      python experiments/toy.py [--flag=value ...]
    <BLANKLINE>
    Training
      --steps=100                 How many steps to train
    """
    groups = _own_groups(run)
    for family in config.FAMILIES:
        component, offered = getattr(run, family), run.offers.get(family, {})
        if component is None:
            continue
        swap = Entry(
            family,
            record.kind_of(run, family),
            ", ".join(offered),
            f"Which {family}; each brings its own flags.",
        )
        rows = [_entry(setting) for setting in settings.of_component(component, f"{family}.")]
        words = settings.summary(type(component)) or type(component).__name__
        groups.append((f"{family.capitalize()}: {words}", [*([swap] if offered else []), *rows]))
        for name, other in offered.items() if full else ():
            heading = f"With --{family}={name}: {settings.summary(type(other))}"
            groups.append(
                (
                    heading,
                    [_entry(setting) for setting in settings.of_component(other, f"{family}.")],
                )
            )
    head = about.strip() or run.name
    tail = (
        ""
        if full
        else "\n\n--helpfull also lists the flags of all other components that can be chosen."
    )
    return (
        f"{head}\n\n  python experiments/{run.name}.py [--flag=value"
        f" ...]\n\n{layout(groups, width=width)}{tail}"
    )


def layout(groups: Iterable[tuple[str, Sequence[Entry]]], *, width: int = 0) -> str:
    """The groups as text: a heading each, then one flag a row with its default, its help and what
    it takes, wrapped to the terminal."""
    width = min(width or shutil.get_terminal_size((120, 24)).columns, 140)
    groups = [(heading, entries) for heading, entries in groups if entries]
    longest = max((len(_flag(entry)) for _, entries in groups for entry in entries), default=0)
    column = min(longest, max(24, width // 3)) + 4
    return "\n\n".join(
        "\n".join([_bold(heading), *(_row(entry, column, width) for entry in entries)])
        for heading, entries in groups
    )


def _own_groups(run: config.Run) -> list[tuple[str, list[Entry]]]:
    own = settings.of_run(run)
    return [
        (group.value, [_entry(setting) for setting in own if group in setting.field.marks])
        for group in config.Group
    ]


def _bold(heading: str) -> str:
    fancy = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\033[1m{heading}\033[0m" if fancy else heading


def _flag(entry: Entry) -> str:
    return f"--{'[no]' if entry.boolean else ''}{entry.name}" + (
        "" if entry.boolean else f"={entry.default}"
    )


def _row(entry: Entry, column: int, width: int) -> str:
    """One flag: its help stands in a column of its own, and below it where the flag is too long."""
    takes = f"{entry.takes}; default {entry.default}" if entry.boolean else entry.takes
    text = f"{entry.help.rstrip('.')} ({takes})" if entry.help else f"({takes})"
    lines = textwrap.wrap(text, max(20, width - column), break_on_hyphens=False) or [""]
    flag = f"  {_flag(entry)}"
    head = [flag] if len(flag) > column - 2 else [flag.ljust(column) + lines.pop(0)]
    return "\n".join([*head, *(" " * column + line for line in lines)])


def _entry(setting: settings.Setting) -> Entry:
    takes = values.describe(setting.field.type, setting.field.marks)
    default = values.text(secrets.hide(setting.value, setting.field.secret))
    return Entry(setting.name, default, takes, setting.help, boolean=setting.field.type is bool)
