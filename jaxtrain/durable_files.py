"""Files that survive a crash or a power cut whole: the old contents or the new, never a part."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file so that a crash or power cut leaves either the old or the new text.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run.json"
    >>> write_json(path, {"steps": 200})
    >>> json.loads(path.read_text())
    {'steps': 200}
    """
    # A fixed temporary name: what a killed process left is overwritten by the next, so nothing
    # piles up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
        publish(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # that of a write has none
        raise


def publish(temporary: Path, path: Path) -> None:
    """Renames a file, or a folder with its manifest, to its final name, and makes the name itself
    durable."""
    if temporary.is_file():
        fsync(temporary)
    os.rename(temporary, path)
    fsync(path.parent)  # without it, a power cut can forget the rename although the data is there


def fsync(path: Path) -> None:
    """Forces one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
