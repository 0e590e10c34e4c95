"""The lock on a run's folder: one run at a time, whatever killed the last one.

The kernel keeps it (`flock`), so it falls with its process and no stale lock can be left behind;
the text in the file only says who holds it. Starts take turns at the file, by a second lock that
each holds for a moment: so whoever replaces the file by force replaces the one it has looked at,
and of several that do so at once one wins.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jaxtrain.errors import UserError

NAME, TURN = ".lock", ".lock-turn"
"""The lock, held as long as the run; and the one that a start holds while it looks at the first."""
NAMES = (NAME, TURN)
TURN_SECONDS = 10.0
"""How long a start waits for its turn, which takes a millisecond unless a process was stopped in
it."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Lock:
    """Holds WORKDIR/.lock while the context is open; makes the folder if it is not there.

    >>> import tempfile
    >>> workdir = Path(tempfile.mkdtemp())
    >>> with Lock(workdir) as lock:
    ...     lock.held()
    True

    `force` takes the lock from a holder that this machine cannot see, such as one on another host.
    `UserError` if the folder is in use, is a file, or cannot be written. Force takes nothing from
    a holder that is seen to be alive, nor from one that came after this start began.
    """

    def __init__(self, workdir: Path, force: bool = False) -> None:
        self._folder, self._path = Path(workdir), Path(workdir) / NAME
        self._force = force
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        try:
            seen = _read_state(self._path)
            turn = self._wait_for_turn()
            try:
                self._descriptor = self._acquire(seen)
                _write_holder(self._descriptor)
            finally:
                os.close(turn)
        except OSError as error:
            self._release()
            raise UserError(f"--workdir={self._folder}: {_cause(error, self._folder)}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Emptied, not deleted: a file that another process has just opened must stay the one that
        # everybody locks.
        if self._descriptor is not None and self.held():
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
        self._release()

    def held(self) -> bool:
        """Whether the lock is still there and ours; not so if the folder was removed, moved or
        taken by force."""
        return self._descriptor is not None and _is_file_at(self._descriptor, self._path)

    def delete_empty_folder(self) -> None:
        """Deletes the folder that this lock is held on, if nothing else lies there."""
        with contextlib.suppress(OSError):  # another start has come for the folder: it stays
            turn = self._wait_for_turn()
            try:
                if self.held() and set(os.listdir(self._folder)) <= set(NAMES):
                    for name in NAMES:
                        (self._folder / name).unlink(missing_ok=True)
                    self._folder.rmdir()
            finally:
                os.close(turn)

    def _wait_for_turn(self) -> int:
        """Makes the folder, and waits until no other start looks at its lock; closing the
        descriptor ends the turn."""
        until = time.monotonic() + TURN_SECONDS
        while True:
            # In the loop, for a run that was refused may have deleted the folder meanwhile.
            self._folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:
                turn = _open(self._folder / TURN)
                stack.callback(os.close, turn)
                if _try_lock(turn) and _is_file_at(turn, self._folder / TURN):
                    stack.pop_all()
                    return turn
            if time.monotonic() > until:
                raise UserError(
                    f"--workdir={self._folder}: another start has been looking at its lock for"
                    f" {TURN_SECONDS:.0f} s; is it stopped? Use another"
                )
            time.sleep(0.01)

    def _acquire(self, seen: "_State | None") -> int:
        """The lock file, locked; in this start's turn, so no other changes its holder meanwhile."""
        while True:
            descriptor = _open(self._path)
            try:
                if not _try_lock(descriptor):
                    self._check_force(descriptor, seen)
                    # Its holder keeps a file without a name, as `held` tells it.
                    if _is_file_at(descriptor, self._path):
                        self._path.unlink()
                # Otherwise it was removed since it was opened, and this lock guards nothing.
                elif _is_file_at(descriptor, self._path):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _check_force(self, descriptor: int, seen: "_State | None") -> None:
        """`UserError` if the lock must not be taken from its holder."""
        now = _State.of(descriptor)
        holder = _parse_holder(now.text)
        if not self._force:
            remedy = "use another, or --force_unlock if it is dead"
        elif _is_alive_here(holder):
            remedy = "it is alive: stop it first, or use another"
        elif now.text and now != seen:  # without text, it is one that is just letting go
            remedy = "it came first: use another, or look again whether it is dead"
        else:
            return
        raise UserError(f"--workdir={self._folder}: in use by {_described(holder)}; {remedy}")

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def holder(workdir: Path) -> str:
    """Who works in a folder, in words; empty if nobody does, as far as this machine can see.

    >>> holder(Path("/nonexistent"))
    ''
    """
    state = _read_state(Path(workdir) / NAME)
    found = {} if state is None else _parse_holder(state.text)
    elsewhere = bool(found) and found.get("host") != socket.gethostname()
    return _described(found) if elsewhere or _is_alive_here(found) else ""


@dataclasses.dataclass(frozen=True)
class _State:
    """What a start sees of a lock file: which file it is, and what its holder wrote."""

    device: int
    inode: int
    text: bytes

    @classmethod
    def of(cls, descriptor: int) -> Self:
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, os.pread(descriptor, 4096, 0))


def _read_state(path: Path) -> _State | None:
    """The lock file as it is now; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return _State.of(descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


def _try_lock(descriptor: int) -> bool:
    """Takes the kernel's lock on an open file; False if another open file has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_holder(descriptor: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.time(),
        "boot_id": _boot_id(),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)


def _parse_holder(text: bytes) -> dict[str, Any]:
    """Who wrote into the lock file; empty if it was read at the wrong moment."""
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    known = {"pid": int, "host": str, "since": float, "boot_id": str}
    return (
        {key: holder[key] for key, kind in known.items() if isinstance(holder.get(key), kind)}
        if isinstance(holder, dict)
        else {}
    )


def _described(holder: dict[str, Any]) -> str:
    if not {"pid", "host", "since"} <= holder.keys():
        return "another process"
    since, today = time.localtime(holder["since"]), time.localtime()
    # The hour alone says nothing about a run of last week.
    clock = time.strftime("%H:%M" if since[:3] == today[:3] else "%Y-%m-%d %H:%M", since)
    return f"pid {holder['pid']} on host {holder['host']} since {clock}"


def _is_alive_here(holder: dict[str, Any]) -> bool:
    """Whether the holder is a living process of this boot of this machine; of other machines
    nothing is known."""
    if (
        not holder
        or holder.get("boot_id", "") != _boot_id()
        or holder.get("host") != socket.gethostname()
    ):
        return False
    return holder["pid"] > 0 and Path(f"/proc/{holder['pid']}").exists()


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


def _cause(error: OSError, workdir: Path) -> str:
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        if workdir.exists():
            return "is a file, not a directory"
        blocker = next(parent for parent in workdir.parents if parent.exists())
        return f"cannot be made, {blocker} is a file, not a directory"
    if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
        return f"its file system keeps no locks ({error.strerror}); use another"
    return f"cannot write ({error.strerror})"
