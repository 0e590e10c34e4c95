"""A run's folder: where it is, what its run.json says, and whether a run that is there may go on
under this configuration."""

import contextlib
import itertools
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxtrain import config, durable_files, fields, messages
from jaxtrain.checkpoints import lock
from jaxtrain.config import record as run_record
from jaxtrain.config import secrets, suggestions
from jaxtrain.errors import UserError
from jaxtrain.report import changes_file

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "jaxtrain")


def choose_folder(run: config.Run) -> Path:
    """The folder of a run: --workdir, or runs/NAME/TIME, made here and now so that runs started in
    one second have one each."""
    if run.workdir:
        return Path(run.workdir)
    if run.eval_only or run.resume == "must":
        raise UserError(
            f"{'--eval_only' if run.eval_only else '--resume=must'}: needs --workdir, the folder of"
            " a run"
        )
    folder = Path("runs") / run.name / time.strftime("%Y%m%d-%H%M%S")
    others = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([folder], others) if _create(each))


def read(folder: Path) -> dict[str, Any] | None:
    """What run.json says, or None if no run is there; `UserError` if it is damaged."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["config"].items()
        for name in ("name", "run_id", "started", "command"):
            record[name].strip()
        record["data"]["fingerprint"].strip()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--workdir={folder}: run.json is damaged ({type(error).__name__}); restore it, or use"
            " a new workdir"
        ) from None
    return record


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes run.json durably."""
    durable_files.write_json(folder / "run.json", record)


def foreign_files(folder: Path) -> int:
    """How many entries of a folder that holds no run were there before; they are left alone."""
    return (
        sum(
            entry.name not in (*lock.NAMES, "logs", "stacks", changes_file.NAME)
            for entry in folder.iterdir()
        )
        if folder.is_dir()
        else 0
    )


def check_drift(
    folder: Path,
    record: Mapping[str, Any],
    run: config.Run,
    *,
    fingerprint: str | None = None,
    misfit: Callable[[], str] = str,
    given: Collection[str] = (),
) -> list[str]:
    """Compares the run that is there with the one that wants to go on; returns a line for each
    harmless or allowed difference.

    `UserError` naming all that are neither, old and new, and what allows them. `fingerprint` is
    that of the data, if it is to be the same. `misfit` says how the checkpoint would not fit the
    new configuration, for then nothing allows it. `given` are the names of the flags that were
    given: what differs without them, --from_run restores.
    """
    if record.get("name") != run.name:
        raise UserError(
            f"--workdir={folder}: holds a run of {record.get('name')!r}, this is {run.name!r}; use"
            " a new workdir"
        )
    now, before = run_record.to_json(run), run_record.completed(run, record["config"])
    if run.init_from and run.init_from != record["config"].get("init_from"):
        raise UserError(
            f"--init_from={run.init_from}: {folder} holds a run, which goes on from its own"
            " checkpoints; for a warm start use a new workdir"
        )
    _check_words(run.allow_config_change, {*_paths(now), *_paths(before)})
    lines: list[str] = []
    refused: dict[str, str] = {}
    free = {*config.marked(config.Mark.FREE), *_free_parts(run)}
    for name, old, new in run_record.differences(before, now):
        if name in free or _is_allowed(name, run.allow_config_change):
            lines.append(f"note: {name} changes from {_shown(old)} to {_shown(new)}")
        else:
            refused[name] = f"{name}={_shown(old)}, now {_shown(new)}"
    old = record["data"]["fingerprint"] if fingerprint is not None else None
    other_data = old != fingerprint and not _is_allowed("data", run.allow_config_change)
    if refused:
        raise UserError(
            f"--workdir={folder}: holds run {record['name']!r} with {'; '.join(refused.values())};"
            f" {_remedy(refused, run, misfit(), other_data=other_data)}"
            f"{_as_it_was(folder, record, run, refused, given, other_data=other_data)}"
        )
    if other_data:
        raise UserError(
            f"--data: fingerprint differs from the run's ({old} -> {fingerprint}); restore the data"
            " or --allow_config_change=data"
        )
    return lines


def _free_parts(run: config.Run) -> Iterator[str]:
    """The fields of components that a run which goes on may change, such as data.weights."""
    for family in config.FAMILIES:
        component = getattr(run, family)
        if fields.is_component(component):
            for field in fields.fields_of(component):
                if any(isinstance(mark, fields.Free) for mark in field.marks):
                    yield f"{family}.{field.name}"


def _is_allowed(name: str, words: Iterable[str]) -> bool:
    return any(name == word or name.startswith(f"{word}.") for word in words)


def _check_words(words: Iterable[str], known: Collection[str]) -> None:
    for word in words:
        if word not in known:
            near = suggestions.unknown_setting(word, sorted(known))
            raise UserError(
                f"--allow_config_change={messages.printable(word)}: no such setting{near}"
            )


def begun_anew(
    folder: Path, record: Mapping[str, Any], run: config.Run, *, fingerprint: str
) -> list[str]:
    """What becomes of a run of another configuration that has no checkpoint: nothing of it was
    kept, so this one may begin there."""
    if record.get("name") != run.name:
        return []
    now, before = run_record.to_json(run), run_record.completed(run, record["config"])
    found = run_record.differences(before, now)
    changes = [f"{name} was {_shown(old)}, now {_shown(new)}" for name, old, new in found]
    if record["data"]["fingerprint"] != fingerprint:
        changes.append("the data is another")
    if not changes:
        return []
    _check_words(run.allow_config_change, {*_paths(now), *_paths(before)})
    what = "the run there has no checkpoint, so this one begins anew"
    return [f"note: {folder}: {what} ({'; '.join(changes)})"]


def _as_it_was(
    folder: Path,
    record: Mapping[str, Any],
    run: config.Run,
    refused: Collection[str],
    given: Collection[str],
    *,
    other_data: bool,
) -> str:
    """The way back to the configuration that is there, if none of what differs was asked for."""
    if any(name in given or name.partition(".")[0] in given for name in refused):
        return ""
    if other_data and not any(_is_allowed(name, ["data"]) for name in refused):
        return ""
    try:
        run_record.from_json(run, record["config"])
    except UserError:
        return ""  # what only Python sets, or of another version
    return f"; --from_run={messages.printable(str(folder))} goes on as it was"


def _remedy(refused: Iterable[str], run: config.Run, misfit: str, *, other_data: bool) -> str:
    """What a user can do about settings that differ: one permission for all of them, if the
    checkpoint can be gone on from."""
    if misfit:
        return f"the checkpoint does not fit then ({misfit}); use a new workdir"
    # The files of other data have another fingerprint, too: one word allows both.
    names = [name for name in refused if not (other_data and _is_allowed(name, ["data"]))]
    words = [*run.allow_config_change, *names, *(["data"] if other_data else [])]
    return f"new workdir, or --allow_config_change={','.join(dict.fromkeys(words))}"


def describe(run: config.Run, argv: Sequence[str]) -> dict[str, Any]:
    """What is known of a run before anything is built: configuration, command, versions, code and
    machine."""
    return {
        "name": run.name,
        "config": run_record.to_json(run),
        "command": shlex.join(["python", sys.argv[0], *secrets.redact(argv, run)]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": (
            {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
        ),
        "git": _git(),
    }


def _paths(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings, and of the parts that hold them."""
    for name, value in settings.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")


def _create(folder: Path) -> bool:
    """Creates a folder; False if it was there already."""
    with contextlib.suppress(OSError):  # the lock, which comes next, says what is wrong
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            return False
    return True


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit and whether code differs from it, in the repository of the experiment; None outside
    one. New files count where they are Python: the folders of runs say nothing of the code."""
    folder = Path(sys.argv[0]).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", folder, "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()
        status = subprocess.run(
            ["git", "-C", folder, "status", "--porcelain"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    changed = [line for line in status.splitlines() if line[:2] != "??" or line.endswith(".py")]
    return {"commit": commit, "changed": bool(changed)}
