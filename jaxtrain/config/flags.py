"""Flags: the fields of a run and of its components as absl flags, and one clear line for each thing
that can be wrong with them.

`parse` goes over the command line twice: first for `--from_run` and for swaps such as
`--model=resnet20`, since they decide which flags exist; then absl parses flags for exactly the
fields that there are. Values are strict (see `values.py`), nothing is given twice, nothing is
left over.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from jaxtrain import config, messages
from jaxtrain.config import help as flag_help
from jaxtrain.config import record, secrets, settings
from jaxtrain.config import values as flag_values
from jaxtrain.errors import UserError
from jaxtrain.fields import Field
from jaxtrain.messages import warn

HELP = ("help", "helpfull", "helpshort", "h", "?")
_ALIASES = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "batch": "batch_size",
    "grad_accum": "microbatches",
    "dataset": "data",
    "accumulate_steps": "microbatches",
    "total_steps": "steps",
    "num_steps": "steps",
    "max_steps": "steps",
    "train_steps": "steps",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "grad_clip": "clip_norm",
    "output_dir": "workdir",
    "logdir": "workdir",
    "log_dir": "workdir",
    "beta1": "b1",
    "beta2": "b2",
    "epsilon": "eps",
}
"""Names that other toolkits use, for suggestions only."""


class _Parser(absl_flags.ArgumentParser):
    """Lets absl keep the text; the flag itself reads it, for absl would add its own words to our
    messages."""

    def parse(self, argument: Any) -> Any:
        """The argument itself."""
        return argument

    def flag_type(self) -> str:
        """What absl calls the type."""
        return "jaxtrain value"


class _Serializer(absl_flags.ArgumentSerializer):
    def serialize(self, value: Any) -> str:
        """The value as it would be typed."""
        return flag_values.text(value)


class SettingFlag(absl_flags.Flag):
    """An absl flag for one setting, read strictly, that remembers what was typed."""

    def __init__(self, setting: settings.Setting) -> None:
        self.setting = setting
        self.typed: str | None = None
        boolean = setting.field.type is bool
        super().__init__(
            _Parser(),
            _Serializer(),
            setting.name,
            setting.value,
            setting.help,
            boolean=boolean,
            allow_using_method_names=True,
        )

    def parse(self, argument: str) -> None:
        """Reads one value from the command line; `UserError` with the whole line that the user
        sees."""
        if argument.startswith("--"):
            raise UserError(
                f"--{self.name}: needs a value before {argument.partition('=')[0]}, e.g."
                f" --{self.name}={self._example()}"
            )
        value = self.read(argument)
        if self.present and value != self.value:
            raise UserError(
                f"--{self.name} is given twice, as {self._shown(self.typed)} and"
                f" {self._shown(argument)}; give it once"
            )
        self.value, self.typed = value, argument
        self.present += 1

    def read(self, argument: str) -> Any:
        """The value that `argument` means here."""
        try:
            return flag_values.read(argument, self.setting.field.type, self.setting.field.marks)
        except ValueError as problem:
            raise UserError(f"--{self.name}={self._shown(argument)}: {problem}") from None

    def _shown(self, argument: str | None) -> str:
        return secrets.HIDDEN if self.setting.field.secret else messages.shown(argument or "")

    def _example(self) -> str:
        return flag_values.text(self.setting.value) or "TEXT"


class FamilyFlag(SettingFlag):
    """The flag that swaps a whole component for a named one."""

    def __init__(self, family: str, kind: str, names: Sequence[str]) -> None:
        self.names = names
        super().__init__(settings.Setting(family, Field(family, str, (), kind), kind, ""))

    def read(self, argument: str) -> str:
        """One of the offered names."""
        if argument in self.names:
            return argument
        shown, near = messages.shown(argument), messages.did_you_mean(argument, self.names)
        if not self.names:
            raise UserError(f"--{self.name}={shown}: this experiment offers no other {self.name}")
        if self.name == "data":  # names of data sets are often looked for here
            valid = near or f"; valid: {', '.join(self.names)}"
            raise UserError(
                f"--data={shown}: not offered by this experiment{valid} (all: python -m jaxtrain"
                " list data)"
            )
        raise UserError(f"--{self.name}={shown}: unknown; valid: {', '.join(self.names)}{near}")


def parse(
    run: config.Run, argv: Sequence[str], environ: Mapping[str, str] = os.environ
) -> config.Run:
    """The run that the command line asks for, given the experiment's own.

    >>> run = config.Run(name="toy", steps=100, **dict.fromkeys(config.FAMILIES))
    >>> parse(run, ["--batch_size=32", "--epochs=2.5"]).batch_size
    32

    `argv` holds the arguments only (`sys.argv[1:]`). `UserError`, with the one line that the user
    sees, for anything wrong; help prints and raises `SystemExit(0)`.
    """
    scanned = list(_scan(argv))
    wanted = {name: value for name, value in scanned if value is not None}
    earlier = os.path.expanduser(wanted.get("from_run") or "")
    base = record.load(run, earlier) if earlier else run
    swaps = {family: wanted[family] for family in config.FAMILIES if family in wanted}
    defined = _define(base)
    chosen = {
        family: defined[family].read(name) for family, name in swaps.items() if family in defined
    }
    base = config.replaced(
        base, {family: run.offers[family][name] for family, name in chosen.items()}
    )
    if asked := next((name for name, _ in scanned if name in HELP), None):
        print(
            flag_help.help_text(
                base,
                full=asked == "helpfull",
                about=getattr(sys.modules["__main__"], "__doc__", "") or "",
            )
        )
        raise SystemExit(0)
    defined = _define(base)
    _absl_parse(defined, argv, base)
    typed = {name: flag.typed for name, flag in defined.items() if flag.present}
    own = (name for name in typed if name not in config.FAMILIES)
    values: dict[str, Any] = {name: defined[name].value for name in own}
    paths = config.marked(config.Mark.PATH)  # the shell leaves --workdir=~/x alone
    values |= {name: os.path.expanduser(values[name]) for name in typed if name in paths}
    values |= _from_environment(defined, typed, environ)
    finished = _finish(base, values, typed)
    _warn_of_secrets(flag for flag in defined.values() if flag.present)
    return finished


def wants_traceback(argv: Sequence[str]) -> bool:
    """Whether errors shall show their traceback; asked before anything is parsed.

    >>> wants_traceback(["--seed=x", "--traceback"])
    True
    """
    return any(
        name == "traceback" and value in (None, "true", "True", "1") for name, value in _scan(argv)
    )


def _scan(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Names and values as written; a value that stands apart is told by not starting with a
    dash."""
    for index, argument in enumerate(argv):
        if argument == "--":
            return
        if argument.startswith("-") and argument.strip("-"):
            name, equals, value = argument.lstrip("-").partition("=")
            following = argv[index + 1] if index + 1 < len(argv) else "-"
            yield name, value if equals else None if following.startswith("-") else following


def _define(run: config.Run) -> dict[str, SettingFlag]:
    """A flag for each setting and each family that can be swapped."""
    defined: dict[str, SettingFlag] = {
        setting.name: SettingFlag(setting) for setting in settings.of_run(run)
    }
    for family in config.FAMILIES:
        if getattr(run, family) is not None:
            defined[family] = FamilyFlag(
                family, record.kind_of(run, family), list(run.offers.get(family, ()))
            )
    return defined


def _absl_parse(defined: Mapping[str, SettingFlag], argv: Sequence[str], run: config.Run) -> None:
    """Has absl fill the flags; its own features that would let input pass unseen (`--undefok`,
    `--flagfile`) are off."""
    values = absl_flags.FlagValues()
    values.set_gnu_getopt(True)
    for name, flag in defined.items():
        values[name] = flag
    for name, _ in _scan(argv):
        if name in ("undefok", "flagfile"):
            raise UserError(_unknown(name, run))
    try:
        left = values(["jaxtrain", *argv])[1:]
    except absl_flags.UnrecognizedFlagError as error:
        raise UserError(_unknown(error.flagname, run)) from None
    except ValueError as error:
        name, refused, _ = str(error).partition(" does not take an argument")
        if not refused:
            raise
        bare = name.lstrip("-").partition("=")[0]
        raise UserError(
            f"--{bare}: takes no value; write --{bare}, or --{bare[2:]}=true|false"
        ) from None
    except absl_flags.Error as error:
        name = str(error).rpartition(" ")[2].lstrip("-")
        raise UserError(
            f"--{name}: needs a value, e.g. --{name}={defined[name]._example()}"
        ) from None
    if left:
        raise UserError(_left_over(left[0], argv, defined))


def _left_over(argument: str, argv: Sequence[str], defined: Mapping[str, SettingFlag]) -> str:
    shown, name = messages.shown(argument), argument.partition("=")[0]
    before = argv[argv.index(argument) - 1].lstrip("-") if argument in argv[1:] else ""
    if before in defined and defined[before].boolean:
        return f"unexpected argument {shown}; write --{before}={argument} or --no{before}"
    hint = (
        f"; did you mean --{argument}?"
        if name in defined and name != argument
        else "; flags are written --name=value"
    )
    return f"unexpected argument {shown}{hint}"


def _unknown(name: str, run: config.Run) -> str:
    """The message for a flag that does not exist: what its component has, who has it, or the
    nearest name."""
    known = [setting.name for setting in settings.of_run(run)]
    known += [family for family in config.FAMILIES if getattr(run, family) is not None]
    shown = f"unknown flag --{messages.printable(name)}"
    family, dot, rest = name.partition(".")
    if dot and family in config.FAMILIES and getattr(run, family) is not None:
        owners = [
            f"--{family}={other}"
            for other, offered in run.offers.get(family, {}).items()
            if _has(offered, rest)
        ]
        own = [
            setting.removeprefix(f"{family}.")
            for setting in known
            if setting.startswith(f"{family}.")
        ]
        if not owners and (match := messages.nearest(_ALIASES.get(rest, rest), own)):
            return f"{shown}; did you mean --{family}.{match}?"
        has = f"{family} {record.kind_of(run, family)!r} has {', '.join(own) or 'no flags'}"
        if reason := getattr(getattr(run, family), "no_such_flag", ""):
            has = f"{has} and {reason}"
        return f"{shown}: {has}" + (
            f"; {rest} comes with {', '.join(owners[:4])}" if owners else ""
        )
    if match := _nearest_flag(name, known):
        return f"{shown}; did you mean {match}?"
    return f"{shown}; --help lists them all"


def _has(component: Any, name: str) -> bool:
    return any(setting.name == name for setting in settings.of_component(component))


def _nearest_flag(name: str, known: Sequence[str]) -> str | None:
    """The flag most like `name`, by its whole name or, for a bare name, by the last part; several
    if that is the same word."""
    negated = name.startswith("no") and messages.nearest(name, known) is None
    word = _ALIASES.get(name, name[2:] if negated else name)
    by_last: dict[str, list[str]] = {}
    for flag in known:
        by_last.setdefault(flag.rpartition(".")[2], []).append(flag)
    names = {**by_last, **{flag: [flag] for flag in known}}
    match = word if word in names else messages.nearest(word, [*known, *by_last])
    return None if match is None else " or ".join(f"--{flag}" for flag in names[match][:3])


def _from_environment(
    defined: Mapping[str, SettingFlag], typed: Mapping[str, Any], environ: Mapping[str, str]
) -> dict[str, Any]:
    """Secrets that were left in the environment, where `ps` does not show them."""
    secret = [
        name
        for name, flag in defined.items()
        if flag.setting.field.secret and name not in typed and secrets.variable(name) in environ
    ]
    return {name: defined[name].read(environ[secrets.variable(name)]) for name in secret}


def _warn_of_secrets(given: Iterable[SettingFlag]) -> None:
    for flag in given:
        if flag.typed and flag.setting.field.secret:
            warn(
                f"--{flag.name} holds a secret on the command line, seen by `ps`; use"
                f" {secrets.variable(flag.name)}"
            )


def _finish(run: config.Run, values: dict[str, Any], typed: Mapping[str, str | None]) -> config.Run:
    """Applies the values and checks what they say together."""
    if "steps" in typed and "epochs" in typed:
        raise UserError("--epochs and --steps are both set; give one")
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if given in typed and values[given] is not None:
            values[other] = None
    run = _apply(run, values, "")
    config.check(run)
    if (
        "eval_every" in typed
        and run.eval_every.value
        and getattr(run.data, "validation", None) == ""
    ):
        raise UserError(
            f"--eval_every={typed['eval_every']}: dataset has no eval split; set --data.validation"
            " or --eval_every=0"
        )
    config.check_paths(run)
    return run


def _apply(component: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """The component with the values of its own flags and of those below it."""
    changes: dict[str, Any] = {}
    for name in values:
        first, dot, _ = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and not dot:
            changes[first] = values[name]
        elif name.startswith(prefix) and first not in changes:
            changes[first] = _apply(getattr(component, first), values, f"{prefix}{first}.")
    try:
        return config.replaced(component, changes)
    except ValueError as problem:  # a component's own rule between its fields
        raise UserError(
            f"--{prefix}{problem}" if prefix and not str(problem).startswith("--") else str(problem)
        ) from None
