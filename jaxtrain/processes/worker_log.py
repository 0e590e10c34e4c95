"""A worker's log: the output of a process without a terminal, copied into the run's folder once
that is known."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

_TAIL_BYTES = 65536


class WorkerLog:
    """A file that a worker writes into. The supervisor appends its new content to
    WORKDIR/logs/PROCESS.txt.

    The file is copied, not moved: the worker writes before anybody knows the workdir, and that may
    lie on another disk.
    """

    def __init__(self, folder: Path, index: int) -> None:
        self.path = folder / f"log-{index}"
        self._name = f"{index}.txt"
        self._copied_bytes = 0

    def clear(self) -> None:
        """Empties the file for another attempt. The copy in the run's folder keeps the output of
        earlier attempts."""
        self.path.write_bytes(b"")
        self._copied_bytes = 0

    def copy_to(self, workdir: str) -> bool:
        """Appends new output to the copy in the run's folder, if that folder exists; returns
        whether all output is there now."""
        folder = Path(workdir, "logs")
        with contextlib.suppress(OSError):  # a full disk need not end the supervisor
            if workdir and Path(workdir).is_dir():
                folder.mkdir(exist_ok=True)
                with open(self.path, "rb") as source, open(folder / self._name, "ab") as target:
                    source.seek(self._copied_bytes)
                    shutil.copyfileobj(source, target)
                    self._copied_bytes = source.tell()
            return self._copied_bytes == self.path.stat().st_size
        return False

    def error_lines(self, max_lines: int = 20) -> list[str]:
        """The lines that say why the process failed: its last line "jaxtrain: error: ...", else its
        last traceback, else its last lines; `max_lines` at most."""
        try:
            with open(self.path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
                tail = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return []
        errors = [line for line in tail if line.startswith("jaxtrain: error: ")]
        tracebacks = [
            number
            for number, line in enumerate(tail)
            if line.startswith("Traceback (most recent call last)")
        ]
        return errors[-1:] or tail[tracebacks[-1] if tracebacks else 0 :][-max_lines:]


def print_line(text: str) -> None:
    """Prints one line on stderr. It first clears the live line of a killed worker and shows the
    cursor, which that line hides."""
    with contextlib.suppress(OSError):
        restore = "\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else ""
        print(f"{restore}{text}", file=sys.stderr, flush=True)
