"""Checkpoints: saved in the background with a manifest of checksums, kept by rule, and verified
before they are restored.

Saving, in order: copy the state to the host (all that the loop waits for), refuse what is not
finite, write under a temporary name, write the manifest, rename, read all of it back from the disk
(where the system lets us pass by its page cache, see `manifest.evict_from_page_cache`), and only
then delete what the rules no longer keep. So a kill at any moment leaves every committed step
whole.
"""

import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from jaxtrain import durable_files, tree
from jaxtrain.checkpoints import arrays, committed, manifest
from jaxtrain.checkpoints.arrays import HostState
from jaxtrain.checkpoints.manifest import Record
from jaxtrain.errors import CheckpointError, NonFinite, UserError
from jaxtrain.messages import bytes_text, one_line
from jaxtrain.tree import PyTree

FOLDER = "checkpoints"
PAYLOAD = "state"
BASE = "base-"
"""How the names of folders begin that hold what no step changes, such as the frozen parameters
under adapters: written once, and named by its digest in every step that needs it."""
TEMPORARY = ".jaxtrain-tmp-"
"""How the names of folders begin that are being written or deleted. With the workdir locked, those
found at the start are of dead processes."""
FINITE = ("params", "opt_state", "collections", "ema")
"""The parts of a state in which everything must be finite; a hyper-parameter may be infinite."""
SPARE_BYTES = 1 << 20  # for manifest, metadata and directories
MOST_SCANS = 20
"""How often `verify` looks again where a living run deletes faster than it reads."""
CLOSE_SECONDS = 1200.0
"""How long a save in flight may take when the run ends by an error: less than the supervisor waits
for a process that is saving (`failure.LIMITS`), so that the error still gets its exit status."""


class Checkpoints:
    """The checkpoints of one workdir.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()), keep=2, run_id="r1")
    >>> checkpoints.save(5, {"params": jnp.arange(3.0)}, {"best": None}, wait=True)
    >>> checkpoints.steps()
    [5]
    >>> state, loop = checkpoints.restore(5, {"params": jax.ShapeDtypeStruct((3,), jnp.float32)})
    >>> state["params"].tolist(), loop
    ([0.0, 1.0, 2.0], {'best': None})

    Writing is for the process that holds the workdir's `Lock`. `run_id` names the run that the
    workdir belongs to, the same after each resume: checkpoints of other runs are never deleted.
    `keep` newest ones stay, the best, and every multiple of `keep_every`. Every process of a run
    calls the same methods; with `writes=False`, for all but process 0, a save only gives this
    process's part of every array to the others. Not for several threads. `fixed` are the paths of
    arrays that no step changes: they are written once, beside the steps.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        run_id: str = "",
        writes: bool = True,
        fixed: Collection[str] = (),
    ) -> None:
        _refuse_inner_folder(Path(workdir))
        self.folder = Path(workdir) / FOLDER
        self._writes = writes
        self._keep, self._keep_every, self._run_id = max(keep, 1), keep_every, run_id
        self._fixed, self._base = frozenset(fixed), ""
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        # `folder`, once this process has written there: while it is open, its inode cannot be that
        # of another folder
        self._open_folder: int | None = None

    def save(
        self,
        step: int,
        state: PyTree,
        loop: Mapping[str, Any],
        *,
        metric: float | None = None,
        wait: bool = False,
    ) -> None:
        """Copies the state and commits it in the background, after an earlier save is through;
        `metric` (greater is better) decides the best.

        On return the state may be donated. `loop` is any JSON. `CheckpointError` if the save before
        this one failed.
        """
        self.wait()
        record = {"step": int(step), "run_id": self._run_id, "loop": dict(loop)}
        record["metric"] = float(metric) if metric is not None and math.isfinite(metric) else None
        # A copy, as it will be read back; and what JSON cannot hold is the caller's mistake, said
        # here and not in the background.
        record = json.loads(json.dumps(record, allow_nan=False))
        leaves = arrays.check_paths(state)
        copy = arrays.to_host({path: leaves[path] for path in leaves if path not in self._fixed})
        fixed = sorted(self._fixed & leaves.keys())
        # every process helps to gather, so all of them must know whether it is the first time
        base = {} if self._base else arrays.to_host({path: leaves[path] for path in fixed})
        self._base = self._base or (f"{BASE}{arrays.digest(base)[:16]}" if base else "")
        if not self._writes:
            return
        record["tree"] = arrays.specs(state)
        if fixed:
            record["base"] = {"name": self._base, "arrays": fixed}
        self._thread = threading.Thread(
            target=self._commit_in_background,
            args=(copy, record, base),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()
        if wait:
            self.wait()

    def check(self) -> None:
        """Raises the error of a background save that has failed; costs nothing, so call it each
        step."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Waits until the last save is committed; `CheckpointError` if it was not."""
        self.close(timeout=None)

    def is_saving(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def close(self, timeout: float | None = CLOSE_SECONDS) -> None:
        """Waits until the save in flight is committed, but not for ever; `CheckpointError` if it
        failed, or hangs."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise CheckpointError(
                    f"{self.folder}: still writing after {timeout:.0f} s; the newest committed"
                    " checkpoint is whole"
                )
            self._thread = None
        self.check()

    def delete_leftovers(self) -> None:
        """Deletes what killed processes of this workdir left half written or half deleted. Only
        with the workdir locked."""
        if not self._writes:
            return
        for leftover in self.folder.glob(f"{TEMPORARY}*"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)

    def check_space(self, like: PyTree) -> None:
        """`UserError` if the disk cannot hold as many checkpoints of this (abstract) state as will
        lie there at once."""
        if not self._writes:
            return
        leaves = tree.flatten(like)
        once = tree.num_bytes([leaves[path] for path in self._fixed & leaves.keys()])
        each = tree.num_bytes(like) - once + SPARE_BYTES
        count = max(self._keep + 1 - len(committed.numbered(self.folder)), 1)
        free, need = self._free_bytes(), count * each + once
        if free < need:
            checkpoints = f"{count} checkpoint{'s' if count > 1 else ''} of {bytes_text(each)}"
            checkpoints += f", and {bytes_text(once)} once" if once else ""
            workdir = self.folder.parent
            raise UserError(
                f"--workdir={workdir}: {bytes_text(free)} free, needs {bytes_text(need)}"
                f" ({checkpoints}); lower --keep or free space"
            )

    def steps(self) -> list[int]:
        """The committed steps, ascending: read from the COMMIT files on the disk at every call,
        never from memory."""
        return list(committed.records(self.folder))

    def best(self) -> int | None:
        """The committed step with the greatest metric, the earliest of equals; of metrics of
        different kinds (`best_by` of the loop's record) the newest kind counts."""
        scored = {
            step: (record["metric"], record["loop"].get("best_by") or "")
            for step, record in committed.records(self.folder).items()
            if record.get("metric") is not None
        }
        by = scored[max(scored)][1] if scored else None
        metrics = {step: metric for step, (metric, kind) in scored.items() if kind == by}
        return max(metrics, key=lambda step: (metrics[step], -step), default=None)

    def verify(self, step: int) -> list[str]:
        """What is wrong with a step's folder, every byte read; empty if nothing is."""
        return committed.verify(self.folder, step)

    def newest_verified(self, on_problem: Callable[[str], None]) -> int | None:
        """The newest step that verifies; see `committed.newest` for what is said of the others."""
        return committed.newest(self.folder, on_problem)

    def resume_step(
        self, resume: Literal["auto", "must", "never"], on_problem: Callable[[str], None]
    ) -> int | None:
        """The step to go on from as `--resume` says, or None for a start from scratch; errors as in
        `newest_verified`."""
        step = None if resume == "never" else self.newest_verified(on_problem)
        if step is None and resume == "must":
            raise UserError(f"--resume=must: no committed checkpoint in {self.folder}")
        return step

    def loop(self, step: int) -> dict[str, Any]:
        """What the loop said of itself when it committed a step."""
        return manifest.read(self.folder / str(step))["loop"]

    def specs(self, step: int) -> arrays.Specs:
        """Dtype and shape of every array that a step holds, by path."""
        return manifest.read(self.folder / str(step))["tree"]

    def chosen_step(self, word: str, flag: str, on_problem: Callable[[str], None]) -> int | None:
        """The step that `last`, `best` or a number names; None if there is no checkpoint at all.
        `UserError` naming `flag`, with the steps that there are, if that one is not there."""
        if word == "last":
            return self.newest_verified(on_problem)
        steps = self.steps()
        if not steps:
            # damage is said, not taken for a folder that holds nothing
            return self.newest_verified(on_problem)
        listed = f"{self.folder} holds {', '.join(map(str, steps))}"
        if word == "best":
            if (best := self.best()) is None:
                raise UserError(f"{flag}: no checkpoint has a validation score; {listed}")
            return best
        if int(word) not in steps:
            raise UserError(f"{flag}: no such checkpoint; {listed}")
        return int(word)

    def restore(
        self, step: int, like: PyTree, *, partial: bool = False
    ) -> tuple[PyTree, dict[str, Any]]:
        """The state of a verified step, laid out like `like` (shapes, dtypes, shardings), and its
        loop record; `partial`: `like` may lack whole parts (`params`) that the step holds.
        `CheckpointError` if it does not verify, `UserError` if its paths, shapes or dtypes are not
        those of `like`."""
        if found := self.verify(step):
            raise CheckpointError(f"step {step}: {found[0]}")
        record = manifest.read(self.folder / str(step))
        stored, wanted = record["tree"], arrays.specs(like)
        parts = {path.partition("/")[0] for path in (wanted if partial else stored)}
        arrays.check_fit(
            step,
            {path: spec for path, spec in stored.items() if path.partition("/")[0] in parts},
            wanted,
        )
        return arrays.to_devices(self._read(step, stored), like), record["loop"]

    def digest(self, step: int) -> str:
        """The digest of a step's state, see `digest`; `CheckpointError` if it cannot be read."""
        return arrays.digest(self._read(step, manifest.read(self.folder / str(step))["tree"]))

    def _read(self, step: int, stored: arrays.Specs) -> HostState:
        return read_step(self.folder / str(step), stored)

    def _own_digest(self, step: int, record: Record) -> str:
        """The digest of what a step holds itself, without the base."""
        fixed = set(record.get("base", {}).get("arrays", ()))
        own = {path: spec for path, spec in record["tree"].items() if path not in fixed}
        return arrays.digest(_read_payload(self.folder / str(step), own))

    def _commit_in_background(self, state: HostState, record: Record, base: HostState) -> None:
        """The background thread: everything after the copy; its error waits for the next call."""
        try:
            self._commit(record["step"], state, record, base)
        except CheckpointError as error:
            self._error = error

    def _commit(self, step: int, state: HostState, record: Record, base: HostState) -> None:
        temporary = self.folder / f"{TEMPORARY}{step}-{os.getpid()}"
        try:
            if path := arrays.not_finite(state | base, FINITE):
                raise NonFinite(f"step {step}: not saved: {path} holds NaN or infinity")
            self._prepare(step, sum(array.nbytes for array in (state | base).values()))
            if base:
                self._write_base(step, base)
            if "base" in record:
                record["base"]["commit"] = manifest.commit(self.folder / self._base)
            if self._is_there(step, state, record):
                return
            arrays.write(temporary / PAYLOAD, state)
            manifest.write_manifest(temporary, record | {"versions": _versions()})
            if os.path.lexists(self.folder / str(step)):
                # The same state, now with its score. A kill just here costs this one commit.
                self._delete(step)
            durable_files.publish(temporary, self.folder / str(step))
            manifest.evict_from_page_cache(self.folder / str(step))
            # the base was read back when it was written
            if found := committed.verify(self.folder, step, base=False):
                raise CheckpointError(
                    f"step {step}: written, but reads back wrong ({found[0]}); is the disk failing?"
                )
            self._prune(step)
        except CheckpointError:
            raise
        except Exception as error:  # whatever the storage library raises
            raise CheckpointError(
                f"step {step}: not saved in {self.folder}: {_reason(error)}"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write_base(self, step: int, base: HostState) -> None:
        """Writes what no step changes, if it is not there; damage of its name is set aside."""
        path = self.folder / self._base
        if os.path.lexists(path):
            if not manifest.problems(path):
                return
            os.rename(path, self.folder / f"damaged-{self._base}-{time.time_ns()}")
        temporary = self.folder / f"{TEMPORARY}{self._base}-{os.getpid()}"
        try:
            arrays.write(temporary / PAYLOAD, base)
            manifest.write_manifest(temporary, {"digest": arrays.digest(base)})
            durable_files.publish(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        manifest.evict_from_page_cache(path)
        if found := manifest.problems(path):
            raise CheckpointError(
                f"step {step}: {self._base} written, but reads back wrong ({found[0]}); is the disk"
                " failing?"
            )

    def _prepare(self, step: int, need: int) -> None:
        """The folder is there, is the one of the last save, and has room."""
        if self._open_folder is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            durable_files.fsync(self.folder.parent)
            self.delete_leftovers()
            self._open_folder = os.open(self.folder, os.O_RDONLY)
            weakref.finalize(self, os.close, self._open_folder)
        elif not self.folder.is_dir() or not os.path.samestat(
            self.folder.stat(), os.fstat(self._open_folder)
        ):
            raise CheckpointError(
                f"step {step}: not saved: {self.folder} was removed or replaced while the run was"
                " going"
            )
        need += SPARE_BYTES
        if (free := self._free_bytes()) < need:
            raise CheckpointError(
                f"step {step}: not saved: {bytes_text(free)} free, needs {bytes_text(need)} in"
                f" {self.folder}; lower --keep or free space"
            )

    def _is_there(self, step: int, state: HostState, record: Record) -> bool:
        """Whether this very commit exists already. Damage of its name is set aside; another state
        of its name is never overwritten."""
        path = self.folder / str(step)
        if not os.path.lexists(path):
            return False
        if self.verify(step):
            # Kept for whoever wants to look; without a number, nobody takes it for a checkpoint.
            os.rename(path, self.folder / f"damaged-{step}-{time.time_ns()}")
            return False
        old = manifest.read(path)
        same_arrays = (
            old.get("tree") == record["tree"]
            and old.get("base") == record.get("base")
            and self._own_digest(step, old) == arrays.digest(state)
        )
        if self._is_late_score(old, record) and same_arrays:
            return False
        same = all(old.get(key) == record[key] for key in ("run_id", "loop", "metric"))
        if not (same and same_arrays):
            raise CheckpointError(
                f"step {step}: not saved: {path} holds another state of that step; use another"
                " --workdir"
            )
        return True

    @staticmethod
    def _is_late_score(old: Record, record: Record) -> bool:
        """Whether a commit is that of a signal, whose evaluation was put off, and now is done."""
        same = all(old.get(key) == record[key] for key in ("run_id", "tree"))
        due = [bool(each["loop"].get("evaluation_due")) for each in (old, record)]
        return same and due == [True, False]

    def _free_bytes(self) -> int:
        # The folder may be a link to a larger disk.
        return shutil.disk_usage(self.folder if self.folder.exists() else self.folder.parent).free

    def _prune(self, newest: int) -> None:
        """Deletes what the rules do not keep; `newest` was just verified. Folders that are damaged,
        of other runs or of later steps stay."""
        own = [
            step
            for step, record in committed.records(self.folder).items()
            if step <= newest and record.get("run_id") == self._run_id
        ]
        kept = {*own[-self._keep :], newest, self.best()}
        for step in own:
            if step not in kept and not (self._keep_every and step % self._keep_every == 0):
                self._delete(step)
        self._prune_bases()

    def _prune_bases(self) -> None:
        """Deletes bases that no step needs any more: of this run, which froze other arrays once."""
        there = {path.name for path in self.folder.glob(f"{BASE}*")} - {self._base}
        if not there:
            return
        # a damaged step does not say what it needs
        if len(known := committed.records(self.folder)) < len(committed.numbered(self.folder)):
            return
        for name in there - {record.get("base", {}).get("name") for record in known.values()}:
            deleted = self.folder / f"{TEMPORARY}{name}-{time.time_ns()}"
            os.rename(self.folder / name, deleted)
            shutil.rmtree(deleted)

    def _delete(self, step: int) -> None:
        # Renamed first: a kill in the middle of deleting must not leave half a numbered folder,
        # which would be damage.
        deleted = self.folder / f"{TEMPORARY}{step}-{time.time_ns()}"
        os.rename(self.folder / str(step), deleted)
        shutil.rmtree(deleted)


def _refuse_inner_folder(folder: Path) -> None:
    """`UserError` if the folder is that of the checkpoints, or of one of them, instead of the
    workdir, for within it there would be none."""
    if (folder / FOLDER).is_dir():
        return
    inner = folder.parent if (folder / manifest.COMMIT).is_file() else folder
    if inner.name == FOLDER and (inner != folder or committed.numbered(folder)):
        what = "a checkpoint" if inner != folder else "the folder of the checkpoints"
        raise UserError(f"{folder}: is {what}; give the workdir, {inner.parent}")


def read_step(folder: Path, stored: arrays.Specs) -> HostState:
    """All arrays in the folder of a step, which are as `stored` says; `CheckpointError`, in one
    line, if they cannot be read."""
    base: dict[str, Any] = manifest.read(folder).get("base") or {"arrays": ()}
    fixed = set(base["arrays"])
    found = _read_payload(folder, {path: stored[path] for path in stored if path not in fixed})
    if fixed:
        found |= _read_payload(folder.parent / base["name"], {path: stored[path] for path in fixed})
    return {path: found[path] for path in stored}


def _read_payload(folder: Path, stored: arrays.Specs) -> HostState:
    try:
        return arrays.read(folder / PAYLOAD, stored)
    # the storage library has no error class of its own, and its texts are pages long
    except Exception as error:
        raise CheckpointError(f"step {folder.name}: {PAYLOAD}: {_reason(error)}") from error


def digest(state: PyTree) -> str:
    """SHA-256 over the sorted (path, dtype, shape, bytes) of a state; the same on any mesh.

    >>> digest({"step": jax.numpy.int32(7)})[:16]
    '83858e1265d0194a'
    """
    return arrays.digest(arrays.to_host(state))


def verify_command(workdir: Path) -> int:
    """Prints a line on every checkpoint of a run, and last the digest of the newest whole one; 74
    if one is damaged, 2 if there is none.

    The run may be going on: a step that it deletes meanwhile is gone, not damaged.
    """
    checkpoints = Checkpoints(workdir)
    # The storage library reads in many tasks; where a step goes away under it, one line is enough.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    lines, damaged, digested = _verified(checkpoints)
    # A run that keeps few and commits often may have deleted all that were listed.
    for _ in range(MOST_SCANS - 1):
        if digested is not None or damaged:
            break
        if not committed.numbered(checkpoints.folder):
            break
        lines, damaged, digested = _verified(checkpoints)
    for line in lines:
        print(line)
    if digested is None and not damaged:
        print(
            f"jaxtrain: error: {workdir}: no committed checkpoint in {checkpoints.folder}",
            file=sys.stderr,
        )
        return 2
    if digested is not None:
        step, text = digested
        newer = [bad for bad in damaged if bad > step]
        if newer:
            steps = ", ".join(map(str, newer))
            print(f"step {step} is the newest whole one ({steps} damaged); its digest:")
        print(f"digest {text}")
    return 74 if damaged else 0


def _verified(checkpoints: Checkpoints) -> tuple[list[str], list[int], tuple[int, str] | None]:
    """A line for each problem and each whole step, the damaged steps, and the newest whole step
    with its digest."""
    lines: list[str] = []
    damaged: list[int] = []
    whole: list[int] = []
    for step in committed.numbered(checkpoints.folder):
        try:
            # Once more before it is called damaged: a living run may be putting it back.
            found = checkpoints.verify(step) and checkpoints.verify(step)
            files = {} if found else manifest.read(checkpoints.folder / str(step))["files"]
        except (OSError, manifest.Damaged) as error:
            found, files = [f"cannot be read ({error})"], {}
        if _is_gone(checkpoints, step):
            continue
        if found:
            damaged.append(step)
            lines += [f"step {step}: {problem}" for problem in found]
            continue
        whole.append(step)
        size = sum(size for size, _ in files.values())
        lines.append(f"step {step}: ok, {len(files)} files, {bytes_text(size)}")
    for step in reversed(whole):
        try:
            return lines, damaged, (step, checkpoints.digest(step))
        except (CheckpointError, OSError, manifest.Damaged) as error:
            if not _is_gone(checkpoints, step):
                damaged.append(step)
                lines.append(str(error))
    return lines, damaged, None


def _is_gone(checkpoints: Checkpoints, step: int) -> bool:
    """Whether a step is no longer there: a living run has let go of it while it was read."""
    return not os.path.lexists(checkpoints.folder / str(step))


def _reason(error: Exception) -> str:
    """What failed, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error) or type(error).__name__
    # TensorStore's errors are pages long, and end in what the system said.
    code = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(code[1])) if code else one_line(text)


def _versions() -> dict[str, str]:
    import orbax.checkpoint as ocp

    return {"jax": jax.__version__, "orbax-checkpoint": ocp.__version__}
