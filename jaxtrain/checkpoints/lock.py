"""The lock on a run's folder: one run at a time, whatever killed the last one.

The kernel keeps it (`flock`), so it falls with its process and no stale lock can be left behind;
the text in the file only says who holds it.
"""

import contextlib
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

NAME = ".lock"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Lock:
    """Holds WORKDIR/.lock while the context is open; makes the folder if it is not there.

    >>> import tempfile
    >>> workdir = Path(tempfile.mkdtemp())
    >>> with Lock(workdir) as lock:
    ...     lock.held()
    True

    `force` takes the lock from a holder that this machine cannot see, such as one on another host.
    `ValueError` if the folder is in use, is a file, or cannot be written; a holder that is seen to
    be alive is never robbed.
    """

    def __init__(self, workdir: Path, force: bool = False) -> None:
        self._path = Path(workdir) / NAME
        self._force = force
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._acquire()
            _write_holder(self._descriptor)
        except OSError as error:
            self._release()
            raise UserError(
                f"--workdir={self._path.parent}: {_cause(error, self._path.parent)}"
            ) from error
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

    def _acquire(self) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._refuse_or_unlink(descriptor)
            except OSError:
                os.close(descriptor)
                raise
            # The file may have been replaced by force between opening and locking: then this lock
            # guards nothing.
            else:
                if _is_file_at(descriptor, self._path):
                    return descriptor
            os.close(descriptor)

    def _refuse_or_unlink(self, descriptor: int) -> None:
        holder = _read_holder(descriptor)
        alive = _is_alive_here(holder)
        if not self._force or alive:
            remedy = (
                "it is alive: stop it first, or use another"
                if self._force
                else "use another, or --force_unlock if it is dead"
            )
            os.close(descriptor)
            raise UserError(
                f"--workdir={self._path.parent}: in use by {_described(holder)}; {remedy}"
            )
        # The holder keeps its lock on the old file, which no longer has a name; `held` tells it so.
        self._path.unlink(missing_ok=True)

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _write_holder(descriptor: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.time(),
        "boot_id": _boot_id(),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)


def _read_holder(descriptor: int) -> dict[str, Any]:
    """Who wrote into the lock file; empty if it was read at the wrong moment."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
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
