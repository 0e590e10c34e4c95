"""A worker's log: what a process prints that has no terminal to print to, kept in the run's folder
once that is known."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

_TAIL = 65536


class WorkerLog:
    """A file that a worker writes into, copied behind it to WORKDIR/logs/PROCESS.txt as it grows.

    Copied, not moved: the worker is writing before anybody knows the workdir, which may lie on
    another disk.
    """

    def __init__(self, folder: Path, index: int) -> None:
        self.path = folder / f"log-{index}"
        self._name = f"{index}.txt"
        self._copied = 0

    def begin(self) -> None:
        """Empties the file for another attempt; what earlier ones said stays in the run's
        folder."""
        self.path.write_bytes(b"")
        self._copied = 0

    def follow(self, workdir: str) -> bool:
        """Appends what is new to the log in the run's folder, if that is there; whether all of it
        now lies there."""
        folder = Path(workdir, "logs")
        with contextlib.suppress(OSError):  # a full disk is the run's trouble, not its log's
            if workdir and Path(workdir).is_dir():
                folder.mkdir(exist_ok=True)
                with open(self.path, "rb") as source, open(folder / self._name, "ab") as target:
                    source.seek(self._copied)
                    shutil.copyfileobj(source, target)
                    self._copied = source.tell()
            return self._copied == self.path.stat().st_size
        return False

    def last_words(self, lines: int = 20) -> list[str]:
        """Its end, as far as that says why the process failed: its own line of error, else its
        traceback, at most `lines` lines."""
        try:
            with open(self.path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
                tail = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return []
        ours = [line for line in tail if line.startswith("jaxtrain: error: ")]
        begins = [
            number
            for number, line in enumerate(tail)
            if line.startswith("Traceback (most recent call last)")
        ]
        return ours[-1:] or tail[begins[-1] if begins else 0 :][-lines:]


def say(text: str) -> None:
    """One line on stderr; the live line of a killed worker may have left the cursor hidden."""
    with contextlib.suppress(OSError):
        shown = "\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else ""
        print(f"{shown}{text}", file=sys.stderr, flush=True)
