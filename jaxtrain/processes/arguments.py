"""The supervisor's command line: which experiment, with which flags, in how many processes."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence

from jaxtrain.errors import UserError
from jaxtrain.processes.heartbeat import SupervisorOptions


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The supervisor's command line, parsed. `flags` are those of the experiment."""

    script: str
    flags: tuple[str, ...]
    processes: int = 1
    devices: int | None = None

    @property
    def options(self) -> SupervisorOptions:
        """The values of --max_restarts and --hang_seconds; a value that is no number counts as
        absent, because the worker will refuse it."""
        restarts, hang_seconds = 0, None
        with contextlib.suppress(ValueError):
            restarts = int(flag_value(self.flags, "max_restarts") or 0)
        with contextlib.suppress(ValueError):
            text = flag_value(self.flags, "hang_seconds")
            hang_seconds = None if text is None else float(text)
        return SupervisorOptions(restarts, hang_seconds)

    def worker_command(self, workdir: str) -> list[str]:
        """The command of a worker. At a restart `workdir` is the run's folder, in which the worker
        resumes; at the first start it is empty."""
        flags = list(self.flags)
        if workdir:
            if flag_value(flags, "resume") == "never":
                flags = without_flag(flags, "resume")
            flags += [] if flag_value(flags, "workdir") else [f"--workdir={workdir}"]
        return [sys.executable, self.script, *flags]


def parse(argv: Sequence[str]) -> Arguments:
    """Reads the command line; flags after the file belong to the experiment.

    >>> parse(["--processes=2", "--max_restarts", "3", __file__, "--steps=9"]).flags
    ('--steps=9', '--max_restarts=3')

    `UserError` if a flag before the file is wrong.
    """
    own: dict[str, str] = {}
    rest = list(argv)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).lstrip("-").partition("=")
        if name not in ("processes", "devices", "hang_seconds", "max_restarts"):
            raise UserError(
                f"--{name}: not a flag of the supervisor; flags of the experiment come after its"
                " FILE.py"
            )
        if not equals and not rest:
            raise UserError(f"--{name}: needs a value, e.g. --{name}=2")
        own[name] = value if equals else rest.pop(0)
    if not rest:
        raise UserError(
            "no FILE.py given; python -m jaxtrain.processes.supervisor --processes=2"
            " experiments/digits.py [flags]"
        )
    script, *flags = rest
    if not os.path.isfile(script):
        raise UserError(f"{script}: no such experiment")
    flags += [f"--{name}={own[name]}" for name in ("hang_seconds", "max_restarts") if name in own]
    counts = {
        name: _positive_integer(name, own[name]) for name in ("processes", "devices") if name in own
    }
    if counts.get("processes", 1) > 1 and (
        name := next((name for name in ("process", "coordinator") if flag_value(flags, name)), None)
    ):
        raise UserError(
            f"--processes={counts['processes']}: starts all processes here, so --{name} has no"
            " meaning; drop one of them"
        )
    if "devices" in counts and flag_value(flags, "platform") == "gpu":
        raise UserError(
            f"--devices={counts['devices']}: makes devices of the CPU, so --platform=gpu has no"
            " meaning; drop one of them"
        )
    return Arguments(script, tuple(flags), **counts)


def flag_value(argv: Sequence[str], name: str) -> str | None:
    """The value of a flag among arguments, written as --name=value or --name value.

    >>> argv = ["--seed", "3", "--workdir=x"]
    >>> flag_value(argv, "seed"), flag_value(argv, "workdir"), flag_value(argv, "steps")
    ('3', 'x', None)
    """
    for position, argument in enumerate(argv):
        if argument in (f"--{name}", f"-{name}") and position + 1 < len(argv):
            return argv[position + 1]
        if argument.startswith((f"--{name}=", f"-{name}=")):
            return argument.partition("=")[2]
    return None


def without_flag(argv: Sequence[str], name: str) -> list[str]:
    """The arguments without one flag, written as --name=value or --name value.

    >>> without_flag(["--resume", "never", "--seed=3"], "resume")
    ['--seed=3']
    """
    names = [
        position for position, argument in enumerate(argv) if argument in (f"--{name}", f"-{name}")
    ]
    removed = {*names, *(position + 1 for position in names)}
    return [
        argument
        for position, argument in enumerate(argv)
        if position not in removed and not argument.startswith((f"--{name}=", f"-{name}="))
    ]


def _positive_integer(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise UserError(f"--{name}={text}: must be an integer >= 1")
    return int(text)
