"""Which steps a folder of checkpoints holds, as the disk says at this moment; a step exists only if
its COMMIT and the checksum of every file are right."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from jaxtrain.checkpoints import manifest
from jaxtrain.checkpoints.manifest import Damaged, Record
from jaxtrain.errors import CheckpointError


def numbered(folder: Path) -> list[int]:
    """The steps of all numbered entries, ascending, committed or damaged. Other names are not ours,
    and are left alone.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("9", "10", "007", "5.tmp", "abc"):
    ...     (folder / name).mkdir()
    >>> numbered(folder)
    [9, 10]
    """
    if not folder.is_dir():
        return []
    return sorted(
        int(entry.name)
        for entry in os.scandir(folder)
        if re.fullmatch("0|[1-9][0-9]{0,17}", entry.name, re.ASCII)
    )


def records(folder: Path) -> dict[int, Record]:
    """The manifests of the committed steps, ascending. Files other than COMMIT and manifest are not
    looked at."""
    found = {}
    for step in numbered(folder):
        try:
            found[step] = manifest.read(folder / str(step))
        except (Damaged, OSError):
            # damage is the business of `verify`; here it only means that there is no such commit
            continue
    return found


def verify(folder: Path, step: int, *, base: bool = True) -> list[str]:
    """What is wrong with a step, every byte read, and unless `base` is False those of the base that
    it stands on; empty if nothing is."""
    path = folder / str(step)
    if not path.is_dir() and not path.is_symlink():
        return ["is a file, not a directory" if path.exists() else "no such checkpoint"]
    return problems(path, step, base=base)


def problems(path: Path, step: int | None = None, *, base: bool = True) -> list[str]:
    """What is wrong with the folder of a step, wherever it lies; with `step`, also if it is not
    that one. The base that it stands on is looked at unless `base` is False."""
    if found := manifest.problems(path) or _record_problems(manifest.read(path), step):
        return found
    stands_on = manifest.read(path).get("base")
    return [] if stands_on is None or not base else _base_problems(path.parent, stands_on)


def _base_problems(folder: Path, record: Record) -> list[str]:
    """What is wrong with the folder of what no step changes, which lies beside the step."""
    name = record["name"]
    if not (folder / name).is_dir():
        return [f"{name}: no such folder beside it; put it back, for it holds the frozen arrays"]
    if found := manifest.problems(folder / name):
        return [f"{name}: {problem}" for problem in found]
    if manifest.commit(folder / name) != record["commit"]:
        return [f"{name}: is another one than the step was written on"]
    return []


def newest(folder: Path, on_problem: Callable[[str], None]) -> int | None:
    """The newest step that verifies, or None if there is no numbered entry at all.

    Each damaged one above it is told to `on_problem`, as one line. `CheckpointError` if there are
    some and none verifies: a run must not start from scratch without anybody having said so.
    """
    damaged: list[tuple[int, str]] = []
    gone = False
    for step in reversed(numbered(folder)):
        if found := verify(folder, step):
            if not os.path.lexists(folder / str(step)):
                gone = True  # a living run has let go of it while it was read
                continue
            damaged.append(
                (step, found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else ""))
            )
            continue
        following = [bad for bad, _ in damaged[1:]] + [step]
        for (bad, problem), lower in zip(damaged, following, strict=False):
            on_problem(f"step {bad}: {problem}; falling back to step {lower}")
        return step
    if gone and (later := numbered(folder)) and max(later) not in dict(damaged):
        return newest(folder, on_problem)
    if damaged:
        listed = "; ".join(f"step {step}: {problem}" for step, problem in damaged)
        raise CheckpointError(
            f"{folder}: no checkpoint verifies ({listed}); put back a copy, or start anew in"
            " another --workdir"
        )
    return None


def _record_problems(record: Record, step: int | None) -> list[str]:
    """Whether a manifest that matches its COMMIT describes a checkpoint: other programs may have
    written both."""
    if step is not None and record.get("step") != step:
        return [f"{manifest.MANIFEST}: is of step {record.get('step')}; was the folder renamed?"]
    arrays = record.get("tree")
    if (
        not isinstance(record.get("loop"), dict)
        or not isinstance(arrays, dict)
        or not all(map(_is_spec, arrays.values()))
    ):
        return [f"{manifest.MANIFEST}: does not describe a checkpoint"]
    if "base" in record and not _is_base(record["base"], arrays):
        return [f"{manifest.MANIFEST}: does not describe a checkpoint"]
    return []


def _is_base(value: object, arrays: Record) -> bool:
    match value:
        case {"name": str(name), "commit": str(), "arrays": list(paths)}:
            # a name, and no path to somewhere else
            plain = re.fullmatch(r"base-[0-9a-f]{16}", name, re.ASCII)
            return bool(plain) and all(path in arrays for path in paths)
    return False


def _is_spec(value: object) -> bool:
    match value:
        case [str(), list(shape)]:
            return all(type(size) is int and size >= 0 for size in shape)
    return False
