"""Remedies: what a message says to write is written, and is then accepted, or the next thing that
is wrong is another thing.

`follow` does what a reader does: it takes the remedy out of the line and changes the command. A
message whose remedy it cannot take out has its row in `BY_HAND`.
"""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import test_bad_inputs
from test_bad_inputs import Source, toy_run

from jaxtrain import augment, config, data, models, optimizers, schedules, tasks
from jaxtrain.config import flags


def rich_run(**changes: Any) -> config.Run:
    """A run of which only the flags are looked at, with everything on offer that there is."""
    settings = {
        "name": "rich",
        "model": models.NAMES["vit_ti4"],
        "data": data.NAMES["images"],
        "task": tasks.Classification(),
        "optimizer": optimizers.AdamW(),
        "schedule": schedules.Cosine(),
        "augment": augment.ImageAugment(),
        "steps": 100,
        "batch_size": 32,
        "offers": {
            "model": models.NAMES,
            "data": data.NAMES,
            "task": tasks.NAMES,
            "optimizer": optimizers.NAMES,
            "schedule": schedules.NAMES,
            "augment": augment.NAMES,
        },
    }
    return config.Run(**(settings | changes))


def outcome(arguments: Sequence[str], run: config.Run) -> str | None:
    """What is wrong with a command line, or None."""
    try:
        flags.parse(run, arguments)
    except ValueError as error:
        return str(error)
    return None


def follow(arguments: Sequence[str], line: str) -> list[str]:
    """The command line after the first remedy of `line` that there is a rule for; the same one if
    there is none."""
    joined = list(arguments) if line.startswith("unexpected") else _joined(arguments)
    for pattern, change in RULES:
        if match := re.search(pattern, line):
            return change(joined, match)
    return joined


def _joined(arguments: Sequence[str]) -> list[str]:
    """Flags and values that stand apart, as one argument each."""
    joined: list[str] = []
    for argument in arguments:
        apart = joined and joined[-1].startswith("-") and "=" not in joined[-1]
        if apart and (not argument.startswith("-") or re.match(r"-\d", argument)):
            joined[-1] = f"{joined[-1]}={argument}"
        else:
            joined.append(argument)
    return joined


def _name(argument: str) -> str:
    return argument.lstrip("-").partition("=")[0]


def _subject(match: re.Match[str]) -> str:
    """The flag, or the word, that the line is about."""
    found = re.match(
        r"(?:\S+:\d+: )?(?:unknown flag )?--([\w.\-]*\w)|unexpected argument '?([^']*?)'?;",
        match.string,
    )
    return (found[1] or found[2] or "") if found else ""


def _is_subject(argument: str, match: re.Match[str]) -> bool:
    subject = _subject(match)
    return subject in (_name(argument), argument) or f"no{subject}" == _name(argument)


def _renamed(arguments: list[str], match: re.Match[str]) -> list[str]:
    """Writes another name, with the value that was there, or the whole flag that is said."""
    ours = match[1]
    return [
        (
            argument
            if not _is_subject(argument, match)
            else ours
            if "=" in ours or ours.startswith("--no") or not argument.startswith("-")
            else ours + argument[len(argument.partition("=")[0]) :]
        )
        for argument in arguments
    ]


def _written(arguments: list[str], match: re.Match[str]) -> list[str]:
    """Writes the flags that are said in the place of the one that is wrong."""
    said = [word.rstrip(",") for word in match[1].split() if word.startswith("--")]
    names = {_name(flag) for flag in said}
    kept = [each for each in arguments if not _is_subject(each, match) and _name(each) not in names]
    return kept + said


def _without(arguments: list[str], match: re.Match[str]) -> list[str]:
    return [each for each in arguments if not _is_subject(each, match)]


def _with_value(number: int = 1) -> Callable[[list[str], re.Match[str]], list[str]]:
    def change(arguments: list[str], match: re.Match[str]) -> list[str]:
        value = match[number].strip("'")
        return [
            f"--{_subject(match)}={value}" if _is_subject(each, match) else each
            for each in arguments
        ]

    return change


def _with(value: str) -> Callable[[list[str], re.Match[str]], list[str]]:
    def change(arguments: list[str], match: re.Match[str]) -> list[str]:
        return [
            f"--{_subject(match)}={value}" if _is_subject(each, match) else each
            for each in arguments
        ]

    return change


def _next_up(arguments: list[str], match: re.Match[str]) -> list[str]:
    return _with(str(int(match[1]) + 1))(arguments, match)


def _once(arguments: list[str], match: re.Match[str]) -> list[str]:
    """Leaves one out of two."""
    found = False
    kept = []
    for argument in arguments:
        if re.sub(r"^--?(?:no)?", "", argument).partition("=")[0] == _subject(match):
            if found:
                continue
            found = True
        kept.append(argument)
    return kept


def _drop_first(arguments: list[str], match: re.Match[str]) -> list[str]:
    return [each for each in arguments if _name(each) != match[1]]


def _added(arguments: list[str], match: re.Match[str]) -> list[str]:
    added = match[1]
    return [each for each in arguments if _name(each) != _name(added)] + [added]


def _own_name(arguments: list[str], match: re.Match[str]) -> list[str]:
    family = _subject(match).partition(".")[0]
    ours = f"--{family}.{match[1]}"
    return [f"{ours}=0.1" if _is_subject(each, match) else each for each in arguments]


RULES: tuple[tuple[str, Callable[[list[str], re.Match[str]], list[str]]], ...] = (
    # several remedies: the first that is said
    (r"unknown flag .*; (--\S+)\.\S+ comes with (--\S+?=\w+)", lambda arguments, match: [
        *(f"{each.replace(_name(each), _name(match[0].split('; ')[1].split()[0]), 1)}"
          if _is_subject(each, match) else each for each in arguments),
        match[2],
    ]),
    (
        r"in (\S+): (\S+); did you mean it\?",
        lambda arguments, match: [
            f"--{_subject(match)}={match[1]}/{match[2]}" if _is_subject(each, match) else each
            for each in arguments
        ],
    ),
    (r"comes with (--\w+=\w+)", _added),
    (r"did you mean (--[\w.]+(?:=[^\s?]*)?)(?:\?| or|,)", _renamed),
    (r"did you mean ('[^']*'|[\w.%\-]+?)(?: of the run)?\?", _with_value()),
    (r"leave it out", _without),
    (r"write (--\S+(?: --\S+)*)", _written),
    (r"needs a value(?: before --\w+)?, e\.g\. (--\S+)", _added),
    (r"give it once", _once),
    (r"^--(\w+) and --\w+ are both set; give one", _drop_first),
    (r"nearest: (\w+)", _with_value()),
    (r"set (--\S+) or (--\S+)", lambda arguments, match: _added(
        arguments, re.fullmatch(r"(.*)", match[2]) or match)),
    (r"drop (--\w+)", lambda arguments, match: [
        each for each in arguments if _name(each) != match[1].strip("-")]),
    (r"--(\w+) and --[\w=]+: .*drop one of them", _drop_first),
    (r"to keep none for ever, give (none)", _with_value()),
    (r", or (none)$", _with_value()),
    (r"expected PATTERN=VALUE, e\.g\. (\S+)", _with_value()),
    (r"expected e\.g\. ([\w=\[\]:%]+)", _with_value()),
    (r"must be at most (\d+)", _with_value()),
    (r"must be at most (100%)", _with_value()),
    (r"must be (?:an integer )?>= (\d+)", _with_value()),
    (r"must be > (\d+)", _next_up),
    (r"must be 0 <= value < 1", _with("0.5")),
    (r"must be in (\d+)\.\.", _with_value()),
    (r"must be (\d+)\.\.", _with_value()),
    (r"e\.g\. ([\d.e\-]+)", _with_value()),
    (r"valid: ([\w.]+)", _with_value()),
    (r"unknown flag --\S+: \w+ '\w+' has (\w+)", _own_name),
)  # fmt: skip
"""Remedies as they are said, and what a reader does."""

BY_HAND = {
    "--xyzzy=1": "",
    "--undefok=xyzzy --xyzzy=1": "",
    "--offers=x": "",
    "--=1": "--seed=1",
    "--flagfile=/etc/passwd": "",
    "--nobatch_size": "",
    "--model.widths=32,": "--model.widths=32",
    "--model.widths=,": "--model.widths=32",
    "--model.widths=32,x": "--model.widths=32,1",
    "--model.widths=32,0": "--model.widths=32,1",
    "--model.widths=(32,64)": "--model.widths=32,64",
    "--profile_steps=5": "--profile_steps=5,6",
    "--profile_steps=5,6,7": "--profile_steps=5,6",
    "--profile_steps=9,5": "--profile_steps=5,9",
    "--optimizer.decay=bias=x": "--optimizer.decay=bias=0.1",
    "--optimizer.learning_rate=nan": "--optimizer.learning_rate=1",
    "--optimizer.learning_rate=inf": "--optimizer.learning_rate=1",
    "--optimizer.learning_rate=-Infinity": "--optimizer.learning_rate=1",
    "--optimizer.learning_rate=1e999": "--optimizer.learning_rate=1",
    "--eval_every=1e999": "--eval_every=0",
    "--eval_every=1e999epochs": "--eval_every=0",
    "--steps=none": "--steps=3",
    "--schedule=linear": "",
    "--optimizer=sgd --optimizer.nesterov": "--optimizer=sgd --optimizer.nesterov"
    " --optimizer.momentum=0.9",
    "-": "--seed=1",
    "--workdir={tmp}/file": "--workdir={tmp}/other",
    "--workdir={tmp}/file/a/b": "--workdir={tmp}/other",
    "--workdir={tmp}/dangling": "--workdir={tmp}/nowhere",
    "--workdir={tmp}/" + "a" * 300: "--workdir={tmp}/a",
    "--init_from={tmp}/rums": "--init_from={tmp}/runs",
    "--init_from={tmp}/xyzzy/1": "--init_from={tmp}/runs",
    "--from_run={tmp}/rums": "--from_run={tmp}/runs",
    "--from_run={tmp}/runs": "",
    "--from_run={tmp}/broken": "",
    "--from_run={tmp}/other": "",
}
"""Rows whose line states a rule, or that a thing is not there, and what a reader then writes."""
NEXT = {
    "--from_run={tmp}/rums": "--from_run={tmp}/runs: holds no run.json",
}
"""Rows whose remedy, followed, shows the next thing that is wrong."""

folder = test_bad_inputs.folder


@pytest.mark.parametrize(
    "row",
    [row for row in test_bad_inputs.ROWS if row.status],
    ids=[row.arguments[:60] for row in test_bad_inputs.ROWS if row.status],
)
def test_a_remedy_is_accepted(row: test_bad_inputs.Row, folder: Path) -> None:
    def placed(text: str) -> str:
        return text.replace("{tmp}", str(folder))

    arguments, line = placed(row.arguments).split(" "), placed(row.line)
    by_hand = BY_HAND.get(row.arguments)
    followed = follow(arguments, line) if by_hand is None else shlex.split(placed(by_hand))
    assert followed != arguments, f"no rule for {line!r}; give it a row in BY_HAND"
    run = toy_run() if "no eval split" in line else toy_run(data=Source(validation="test"))
    then = outcome(followed, run)
    assert then == (placed(NEXT[row.arguments]) if row.arguments in NEXT else None), followed
