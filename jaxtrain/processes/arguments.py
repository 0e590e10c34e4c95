"""What the supervisor's command line asks for: which experiment, with which flags, in how many
processes."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence

from jaxtrain.errors import UserError


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    script: str
    flags: tuple[str, ...]
    processes: int = 1
    devices: int | None = None

    @property
    def hang_seconds(self) -> float | None:
        """The value of --hang_seconds; None if it is not there, or no number, of which the worker
        will complain."""
        with contextlib.suppress(ValueError, TypeError):
            # None raises TypeError.
            return float(value_of(self.flags, "hang_seconds"))  # type: ignore[arg-type]
        return None

    @property
    def max_restarts(self) -> int:
        """The value of --max_restarts; 0 if it is not there, or no number, of which the worker will
        complain."""
        with contextlib.suppress(ValueError, TypeError):
            return int(value_of(self.flags, "max_restarts"))  # type: ignore[arg-type]
        return 0

    def command(self, workdir: str) -> list[str]:
        """What a worker runs; into `workdir` at a restart, where it goes on instead of beginning
        anew."""
        flags = list(self.flags)
        if workdir:
            flags = without(flags, "resume") if value_of(flags, "resume") == "never" else flags
            flags += [] if value_of(flags, "workdir") else [f"--workdir={workdir}"]
        return [sys.executable, self.script, *flags]


def parse(argv: Sequence[str]) -> Plan:
    """Reads the command line; flags after the file are the worker's own.

    >>> parse(["--processes=2", "--max_restarts", "3", __file__, "--steps=9"]).flags
    ('--steps=9', '--max_restarts=3')

    `ValueError` for anything wrong with the flags that stand before it.
    """
    own: dict[str, str] = {}
    left = list(argv)
    while left and left[0].startswith("-"):
        name, equals, value = left.pop(0).lstrip("-").partition("=")
        if name not in ("processes", "devices", "hang_seconds", "max_restarts"):
            raise UserError(
                f"--{name}: not a flag of the supervisor; flags of the experiment come after its"
                " FILE.py"
            )
        if not equals and not left:
            raise UserError(f"--{name}: needs a value, e.g. --{name}=2")
        own[name] = value if equals else left.pop(0)
    if not left:
        raise UserError(
            "no FILE.py given; python -m jaxtrain.processes.supervisor --processes=2"
            " experiments/digits.py [flags]"
        )
    script, *flags = left
    if not os.path.isfile(script):
        raise UserError(f"{script}: no such experiment")
    flags += [f"--{name}={own[name]}" for name in ("hang_seconds", "max_restarts") if name in own]
    counts = {name: _count(name, own[name]) for name in ("processes", "devices") if name in own}
    if counts.get("processes", 1) > 1 and (
        name := next((name for name in ("process", "coordinator") if value_of(flags, name)), None)
    ):
        raise UserError(
            f"--processes={counts['processes']}: starts all processes here, so --{name} has no"
            " meaning; drop one of them"
        )
    if "devices" in counts and value_of(flags, "platform") == "gpu":
        raise UserError(
            f"--devices={counts['devices']}: makes devices of the CPU, so --platform=gpu has no"
            " meaning; drop one of them"
        )
    return Plan(script, tuple(flags), **counts)


def value_of(argv: Sequence[str], name: str) -> str | None:
    """The value of a flag as it stands among arguments, in either form.

    >>> value_of(["--seed", "3", "--workdir=x"], "seed"), value_of(["--seed", "3"], "workdir")
    ('3', None)
    """
    for place, argument in enumerate(argv):
        if argument in (f"--{name}", f"-{name}") and place + 1 < len(argv):
            return argv[place + 1]
        if argument.startswith((f"--{name}=", f"-{name}=")):
            return argument.partition("=")[2]
    return None


def without(argv: Sequence[str], name: str) -> list[str]:
    """The arguments without one flag, in either form.

    >>> without(["--resume", "never", "--seed=3"], "resume")
    ['--seed=3']
    """
    alone = [place for place, argument in enumerate(argv) if argument in (f"--{name}", f"-{name}")]
    gone = {*alone, *(place + 1 for place in alone)}
    return [
        argument
        for place, argument in enumerate(argv)
        if place not in gone and not argument.startswith((f"--{name}=", f"-{name}="))
    ]


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise UserError(f"--{name}={text}: must be an integer >= 1")
    return int(text)
