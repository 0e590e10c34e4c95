"""Suggestions: what was probably meant by a flag that does not exist, or by a word that is no flag.

In this order: the words of other toolkits, a `no` before a name, the names that there are, and the
names that other components of the same family have.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain import config, messages
from jaxtrain.config import other_toolkits, record, settings
from jaxtrain.config import values as flag_values

_SHORT, _CLOSE_IF_SHORT = 4, 0.8
"""Short names are like many others: `best` is no slip for `test`."""
_NEGATIONS = ("no-", "no_", "no.", "not_", "without_", "without-", "disable_", "disable-", "no")
_COMMANDS = ("report", "verify", "list", "predict")
_TRAIN = ("train", "fit", "run", "training", "launch", "start")
_EVALUATE = ("eval", "evaluate", "evaluation", "test", "validate")


def unknown_flag(name: str, value: str | None, run: config.Run) -> str:
    """The message for a flag that does not exist.

    >>> run = config.Run(name="toy", steps=100, **dict.fromkeys(config.FAMILIES))
    >>> unknown_flag("num_train_epochs", "3", run)
    'unknown flag --num_train_epochs; did you mean --epochs?'
    >>> unknown_flag("no-report", None, run)
    'unknown flag --no-report; did you mean --noreport?'
    """
    shown = f"unknown flag --{messages.printable(name)}"
    found = Flags(run)
    family, dot, rest = name.partition(".")
    if dot and found.has(family) and not _negated(rest, found):
        return shown + _of_family(family, rest, value, found)
    return f"{shown}; {instead_of(name, value, found) or '--help lists them all'}"


def unexpected_argument(argument: str, before: str, run: config.Run) -> str:
    """The message for a word that belongs to no flag; `before` is the flag that stands before it,
    without dashes, or nothing."""
    shown = f"unexpected argument {messages.shown(argument)}"
    found = Flags(run)
    if before in found.booleans:
        return f"{shown}; write --{before}={argument} or --no{before}"
    if argument.startswith("--") and not argument.startswith("--="):
        return f"{shown}; flags stand before --, which ends them; remove it"
    name, equals, value = argument.lstrip("+~").partition("=")
    if equals and name in found.names:
        return f"{shown}; did you mean --{name}={value}?"
    if equals and name:
        meant = instead_of(name, value, found)
        if meant and meant.endswith("?") and " or " not in meant:
            return f"{shown}; {meant.removesuffix('?')}={value}?"
        return f"{shown}; {meant or 'flags are written --name=value'}"
    if argument in _EVALUATE:
        return f"{shown}; write --eval_only to evaluate without training"
    if argument in _TRAIN:
        return f"{shown}; leave it out: an experiment trains by itself"
    if argument in _COMMANDS:
        return f"{shown}; leave it out: that is a command, python -m jaxtrain {argument}"
    return f"{shown}; flags are written --name=value"


def unknown_setting(name: str, known: Sequence[str]) -> str:
    """The end of a message about the name of a setting that does not exist: the nearest, or how
    such names look.

    >>> unknown_setting("lr", ["seed", "optimizer.learning_rate"])
    "; did you mean 'optimizer.learning_rate'?"
    """
    bare = name.strip().lstrip("-").partition("=")[0]
    match = bare if bare in known else next(iter(_named(bare, known) or ()), None)
    if match is None:
        return "; names are those of flags, e.g. optimizer.learning_rate"
    return f"; did you mean {match!r}?"


class Flags:
    """The flags of a run, as suggestions look at them."""

    def __init__(self, run: config.Run) -> None:
        self.run = run
        self.settings = {setting.name: setting for setting in settings.of_run(run)}
        families = [family for family in config.FAMILIES if self.has(family)]
        self.names = [*self.settings, *families]
        """Those that a run has; `flagfile` is one of every run, but no setting."""
        self.booleans = {
            name for name, setting in self.settings.items() if setting.field.type is bool
        }

    def has(self, family: str) -> bool:
        """Whether the run has a component of this family."""
        return family in config.FAMILIES and getattr(self.run, family) is not None

    def offers(self, family: str) -> Mapping[str, Any]:
        """The components that can be chosen by name."""
        return self.run.offers.get(family, {})


def _of_family(family: str, rest: str, value: str | None, found: Flags) -> str:
    """For `--optimizer.momentum`: what the component has, who has it, or the nearest."""
    own = [name.partition(".")[2] for name in found.names if name.startswith(f"{family}.")]
    if match := other_toolkits.RENAMED.get(other_toolkits.plain(rest)):
        rest = match if match in own else rest
    if rest in own:
        return f"; did you mean --{family}.{rest}?"
    owners = [
        f"--{family}={name}"
        for name, offered in found.offers(family).items()
        if _has(offered, rest)
    ]
    if not owners:
        if rest in ("name", "type", "kind", "class", "cls", "_target_"):
            return f"; did you mean --{family}?"
        if match := messages.nearest(rest, own):
            return f"; did you mean --{family}.{match}?"
        if meant := _exact(rest, value, found):
            return f"; {meant}"
    kind = record.kind_of(found.run, family)
    has = f": {family} {kind!r} has {', '.join(own) or 'no flags'}"
    if substance := getattr(getattr(found.run, family), "in_python", ""):
        has = f"{has}, and its {substance} is set in Python only"
    return has + (f"; {rest} comes with {', '.join(owners[:4])}" if owners else "")


def instead_of(name: str, value: str | None, found: Flags) -> str | None:
    """What to write instead of a flag that does not exist, or None: by other toolkits' words, by a
    negation, by the nearest name, whichever fits best."""
    if exact := _exact(name, value, found):
        return exact
    if other_toolkits.is_known(name):
        return None  # what it is called here is not in this run, and likeness would mislead
    negated = _negated(name, found)
    ratio, match = _closest(name, [*found.names, "flagfile"])
    if negated is not None and negated[0] >= ratio:
        return negated[1]
    head, dot, rest = name.partition(".")
    if dot and not found.has(head):
        return instead_of(rest, value, found)
    if owners := _owners(other_toolkits.plain(name), found):
        return owners
    return f"did you mean {_together(match)}?" if match else None


def _exact(name: str, value: str | None, found: Flags) -> str | None:
    """By a name that is known as it is: here, as the last part of one here, or elsewhere."""
    plain = other_toolkits.plain(name)
    for word in dict.fromkeys((name, plain)):
        if match := _by_last_part(found.names).get(word):
            return f"did you mean {_together(match)}?"
    ours = other_toolkits.RENAMED.get(plain)
    if ours and (match := _by_last_part(found.names).get(ours)):
        return f"did you mean {_together(match)}?"
    return other_toolkits.instead(name, value, found.names)


def _negated(name: str, found: Flags) -> tuple[float, str] | None:
    """How like a `no` before a flag a name is, and how that is written; None if it is not."""
    family, dot, rest = name.partition(".")
    inner = f"{family}." if dot and found.has(family) else ""
    word = rest if inner else name
    before = next((each for each in _NEGATIONS if word.startswith(each)), None)
    if before is None or word == before:
        return None
    ratio, match = _closest(inner + word.removeprefix(before).replace("-", "_"), found.names)
    if not match:
        return None
    return ratio, _off(match[0], found)


def _off(flag: str, found: Flags) -> str:
    """How a flag is switched off, or that it cannot be."""
    setting = found.settings.get(flag)
    if setting is None:
        offers = "none" in found.offers(flag)
        return f"did you mean --{flag}=none?" if offers else f"--{flag} cannot be switched off"
    takes = flag_values.describe(setting.field.type, setting.field.marks)
    if flag in found.booleans:
        return f"did you mean --no{flag}?"
    if takes.endswith("or none") or "none" in takes.split("|"):
        return f"did you mean --{flag}=none?"
    if flag == "eval_every":
        return "did you mean --eval_every=0?"
    if takes.startswith("text") and setting.name != "workdir":
        return f"did you mean --{flag}=?"
    return f"--{flag} takes {takes} and cannot be switched off"


def _owners(word: str, found: Flags) -> str | None:
    """For a bare name that only other components of a family have, such as `momentum`."""
    word = other_toolkits.RENAMED.get(word, word)
    for family in config.FAMILIES:
        owners = [name for name, offered in found.offers(family).items() if _has(offered, word)]
        if owners and found.has(family):
            choices = ", ".join(f"--{family}={owner}" for owner in owners[:4])
            return f"--{family}.{word} comes with {choices}"
    return None


def _closest(name: str, known: Sequence[str]) -> tuple[float, list[str]]:
    """How like `name` the nearest flag is, by its whole name or its last part, and the flags so
    called; 0 and none if it is not much like any."""
    by_last = _by_last_part(known)
    word = name.lower().replace("-", "_")
    if word in by_last:
        return 1.0, by_last[word]
    match = messages.nearest(word, [*known, *by_last])
    ratio = messages.likeness(word, match or "")
    if match is None or (len(word) <= _SHORT and ratio < _CLOSE_IF_SHORT):
        return 0.0, []
    return ratio, by_last[match]


def _named(word: str, known: Sequence[str]) -> list[str]:
    """The names that `word` means: by a last part, by another toolkit's word, by likeness."""
    by_last = _by_last_part(known)
    ours = other_toolkits.RENAMED.get(other_toolkits.plain(word), word)
    return by_last.get(ours) or _closest(ours, known)[1]


def _by_last_part(known: Sequence[str]) -> dict[str, list[str]]:
    by_last: dict[str, list[str]] = {}
    for flag in known:
        by_last.setdefault(flag.rpartition(".")[2], []).append(flag)
    return {**by_last, **{flag: [flag] for flag in known}}


def _together(flags: Sequence[str]) -> str:
    return " or ".join(f"--{flag}" for flag in flags[:3])


def _has(component: Any, name: str) -> bool:
    own = {field.name for field in dataclasses.fields(component)}  # cheap, and most often enough
    return name.partition(".")[0] in own and any(
        setting.name == name for setting in settings.of_component(component)
    )
