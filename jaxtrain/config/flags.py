"""Flags: the fields of a run and of its components as absl flags, and one clear line for each thing
that can be wrong with them.

`parse` goes over the command line twice: first for `--from_run` and for swaps such as
`--model=resnet20`, since they decide which flags exist; then absl parses flags for exactly the
fields that there are. Values are strict (see `values.py`), nothing is given twice, nothing is
left over.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from absl import flags as absl_flags

from jaxtrain import config, messages
from jaxtrain.config import flagfile, other_toolkits, record, secrets, settings, suggestions
from jaxtrain.config import help as flag_help
from jaxtrain.config import values as flag_values
from jaxtrain.errors import UserError
from jaxtrain.fields import Field, field_type
from jaxtrain.messages import warn

Component = TypeVar("Component")

HELP = ("help", "helpfull", "helpshort", "h", "?")
_NAMED_FLAG = re.compile(r"(?:unknown flag )?--([\w.\-]+)")
"""The flag that a message is about."""


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
            optional = (
                field_type(self.setting.field.type).optional and self.name not in config.LENGTHS
            )
            more = ", or none" if optional and argument in ("0", "0.0", "-1") else ""
            if self.name == "resume" and "did you mean" not in str(problem):
                said = other_toolkits.instead("resume", argument, ("workdir", "init_from"))
                more = f"; {said}" if said else ""
            said = (
                str(problem).replace(", or none", "")
                if self.name in config.LENGTHS
                else str(problem)
            )
            if self.name == "init_rules":  # whose rules are others than those of --shard
                said = said.replace("head/kernel=fsdp:-", "head=skip")
            raise UserError(f"--{self.name}={self._shown(argument)}: {said}{more}") from None

    def _shown(self, argument: str | None) -> str:
        return secrets.HIDDEN if self.setting.field.secret else messages.shown(argument or "")

    def _example(self) -> str:
        return flag_values.text(self.setting.value) or "TEXT"


MOST_NAMED = 50
"""How many names a line says; more are listed by a command."""


class UnknownModel(UserError):
    """A model's name that is like none that the experiment offers; another one may have it."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


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
        if meant := other_toolkits.same_value(argument, self.names):
            near = f"; did you mean {meant!r}?"
        if not self.names:
            raise UserError(f"--{self.name}={shown}: this experiment offers no other {self.name}")
        if self.name == "data":  # names of data sets are often looked for here
            valid = near or f"; valid: {', '.join(self.names)}"
            raise UserError(
                f"--data={shown}: not offered by this experiment{valid} (all: python -m jaxtrain"
                " list data)"
            )
        valid = ", ".join(self.names)
        if len(self.names) > MOST_NAMED:
            valid = f"the {len(self.names)} of python -m jaxtrain list {self.name}s"
        if "hf" in self.names and not near:
            near = "; a model that is stored is given by --model.path=DIR or FILE.gguf"
        said = f"--{self.name}={shown}: unknown; valid: {valid}{near}"
        if self.name == "model" and not near:
            raise UnknownModel(said, argument)
        raise UserError(said)


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
    read = flagfile.expand(argv)
    places = {argument.name: argument.place for argument in read if argument.place}
    try:
        return _parse(run, [argument.text for argument in read], environ, places)
    except UserError as error:
        # What a file of flags said is told with its line.
        named = _NAMED_FLAG.match(str(error))
        place = named and (places.get(named[1]) or places.get(f"no{named[1]}"))
        if not place:
            raise
        raise UserError(f"{place}: {error}") from None


def _parse(
    run: config.Run,
    argv: Sequence[str],
    environ: Mapping[str, str],
    places: Mapping[str, str],
) -> config.Run:
    """The run that arguments ask for, those of files in their places."""
    scanned = list(_scan(argv))
    wanted = {name: value for name, value in scanned if value is not None}
    earlier = os.path.expanduser(wanted.get("from_run") or "")
    base = record.load(run, earlier) if earlier else run
    swaps = {family: wanted[family] for family in config.FAMILIES if family in wanted}
    defined = flags_of(base)
    chosen = {
        family: defined[family].read(name) for family, name in swaps.items() if family in defined
    }
    base = config.replaced(
        base, {family: run.offers[family][name] for family, name in chosen.items()}
    )
    if asked := next((name for name, _ in scanned if name in HELP), None):
        messages.print_out(
            flag_help.help_text(
                base,
                full=asked == "helpfull",
                about=getattr(sys.modules["__main__"], "__doc__", "") or "",
            )
        )
        raise SystemExit(0)
    defined = flags_of(base)
    _absl_parse(defined, argv, base)
    typed = {name: flag.typed for name, flag in defined.items() if flag.present}
    own = (name for name in typed if name not in config.FAMILIES)
    values: dict[str, Any] = {name: defined[name].value for name in own}
    paths = config.marked(config.Mark.PATH)  # the shell leaves --workdir=~/x alone
    values |= {name: os.path.expanduser(values[name]) for name in typed if name in paths}
    values |= _from_environment(defined, typed, environ)
    finished = _finish(base, values, typed)
    _warn_of_secrets(flag for flag in defined.values() if flag.present and flag.name not in places)
    return finished


def of_component(family: str, component: Component, argv: Sequence[str]) -> Component:
    """A component with its own flags of a command line, for an experiment that must know it before
    its run; unchanged where the command line names another by `--FAMILY=`.

    >>> from jaxtrain.optimizers import SGD
    >>> of_component("optimizer", SGD(), ["--optimizer.momentum=0.5", "--steps=3"]).momentum
    0.5
    """
    scanned = list(_scan(argv))
    if any(name == family for name, _ in scanned):
        return component
    prefix = f"{family}."
    given = [
        f"--{name}" if text is None else f"--{name}={text}"
        for name, text in scanned
        if name.removeprefix("no").startswith(prefix)
    ]
    others: dict[str, Any] = dict.fromkeys(config.FAMILIES) | {family: component}
    return getattr(parse(config.Run(name="component", steps=1, **others), given), family)


def wants_traceback(argv: Sequence[str]) -> bool:
    """Whether errors shall show their traceback; asked before anything is parsed.

    >>> wants_traceback(["--seed=x", "--traceback"])
    True
    """
    with contextlib.suppress(UserError):  # a file that cannot be read is told when it is parsed
        argv = [argument.text for argument in flagfile.expand(argv)]
    return any(
        name == "traceback" and value in (None, "true", "True", "1") for name, value in _scan(argv)
    )


def given(argv: Sequence[str]) -> set[str]:
    """The names of the flags that a command line gives, those of its files too.

    >>> sorted(given(["--seed=1", "--noreport", "--model=mlp"]))
    ['model', 'noreport', 'report', 'seed']
    """
    names = {name for name, _ in _scan([argument.text for argument in flagfile.expand(argv)])}
    return {*names, *(name.removeprefix("no") for name in names)}


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


def flags_of(run: config.Run) -> dict[str, SettingFlag]:
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
    """Has absl fill the flags; its own feature that would let input pass unseen (`--undefok`) is
    off, and files of flags have been read."""
    values = absl_flags.FlagValues()
    values.set_gnu_getopt(True)
    for name, flag in defined.items():
        values[name] = flag
    if any(name == "undefok" for name, _ in _scan(argv)):
        raise UserError(suggestions.unknown_flag("undefok", None, run))
    try:
        left = values(["jaxtrain", *argv])[1:]
    except absl_flags.UnrecognizedFlagError as error:
        value = dict(reversed(list(_scan(argv)))).get(error.flagname)
        raise UserError(suggestions.unknown_flag(error.flagname, value, run)) from None
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
        before = argv[argv.index(left[0]) - 1].lstrip("-") if left[0] in argv[1:] else ""
        raise UserError(suggestions.unexpected_argument(left[0], before, run))


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
    lengths = sorted(name for name in config.LENGTHS if name in typed)
    if len(lengths) > 1:
        raise UserError(f"--{lengths[0]} and --{lengths[1]} are both set; give one")
    if lengths and values[lengths[0]] is not None:
        values |= {name: None for name in config.LENGTHS if name != lengths[0]}
    run = _apply(run, values, "")
    config.check(run)
    if (
        "eval_every" in typed
        and run.eval_every.value
        and getattr(run.data, "validation", None) == ""
        and not run.evaluate
    ):
        raise UserError(
            f"--eval_every={typed['eval_every']}: dataset has no eval split; set --data.validation"
            " or --eval_every=0"
        )
    config.check_paths(run)
    _check_allowed(run)
    return run


def _check_allowed(run: config.Run) -> None:
    """Refuses a name in --allow_config_change that is no setting of the run or of a part that it
    may have; where the workdir holds a run, `workdir.check_drift` knows that one's names too."""
    if not run.allow_config_change or os.path.exists(os.path.join(run.workdir, "run.json")):
        return
    known = [setting.name for setting in settings.of_run(run)]
    offered = {
        setting.name
        for family in config.FAMILIES
        for component in run.offers.get(family, {}).values()
        for setting in settings.of_component(component, f"{family}.")
    }
    known = [*known, *sorted(offered.difference(known)), *config.FAMILIES]
    parents = {name.rpartition(".")[0] for name in known}
    for word in run.allow_config_change:
        if word not in known and word not in parents or not word:
            near = suggestions.unknown_setting(word, known)
            raise UserError(
                f"--allow_config_change={messages.printable(word)}: no such setting{near}"
            )


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
