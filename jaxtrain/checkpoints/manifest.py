"""Whether a folder is whole: a manifest of every file's size and checksum, and a COMMIT with the
hash of the manifest.

A folder is written in this order: its files, `MANIFEST.json` over them, `COMMIT` with the SHA-256
of the manifest's bytes, then everything is forced to the disk; only then may it be renamed to its
final name (`durable_files.publish`). `problems` checks it: it looks at every entry of the folder,
without following links, before it opens a file, and says in words what is wrong. Nothing here knows
arrays or jax.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtrain import extras
from jaxtrain.durable_files import fsync
from jaxtrain.messages import printable

FORMAT = 1
MANIFEST = "MANIFEST.json"
COMMIT = "COMMIT"
MANIFEST_LIMIT = 256 << 20  # bytes; a forged manifest must not fill the memory before it is checked
CHUNK = 1 << 20

Record = dict[str, Any]


class Damaged(Exception):
    """A folder that is not whole; the text says which entry is wrong, and why."""


def write_manifest(folder: Path, record: Record) -> None:
    """Writes the manifest (`record` and all files of the folder) and COMMIT, and forces the whole
    folder to the disk."""
    files = {name: checksum(folder / name) for name in entries(folder)}
    text = (
        json.dumps(record | {"format": FORMAT, "files": files}, indent=1, allow_nan=False).encode()
        + b"\n"
    )
    (folder / MANIFEST).write_bytes(text)
    (folder / COMMIT).write_bytes(_commit_of(text))
    for name in entries(folder):
        fsync(folder / name)
    # deepest first: a folder is durable once its entries are
    for parent, _, _ in os.walk(folder, topdown=False):
        fsync(Path(parent))


def evict_from_page_cache(folder: Path) -> None:
    """Makes the system forget the contents of files that are on the disk already, so that whoever
    reads them next reads the disk and not what was just written to memory.

    A request, and only where the system knows it (Linux): a file system in memory (tmpfs) has no
    other copy, one in the network has its server's cache, and a disk its own.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for name in entries(folder):
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            with contextlib.suppress(OSError):  # not every file system takes the advice
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def checksum(path: Path) -> list[int | str]:
    """Size and XXH3-128 of a file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a"
    >>> _ = path.write_bytes(b"abc")
    >>> checksum(path)
    [3, '06b05ab6733a618578af5f94892f3950']
    """
    extras.require("a checkpoint", "xxhash")
    import xxhash

    size, state = 0, xxhash.xxh3_128()
    # O_NOFOLLOW: the entry was looked at before, but may have been swapped for a link since.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            state.update(chunk)
    return [size, state.hexdigest()]


def entries(folder: Path, prefix: str = "") -> Iterator[str]:
    """Names of all files below a folder, relative to it; `Damaged` at the first link or special
    file. Opens nothing."""
    if not prefix and folder.is_symlink():
        raise Damaged(f"is a symlink to {printable(os.readlink(folder))}; refused")
    with os.scandir(folder / prefix) as scan:
        found = sorted(scan, key=lambda entry: entry.name)
    for entry in found:
        name = f"{prefix}{entry.name}"
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            raise Damaged(
                f"holds symlink {printable(name)} -> {printable(os.readlink(entry.path))}; refused"
            )
        if stat.S_ISDIR(mode):
            yield from entries(folder, f"{name}/")
        elif stat.S_ISREG(mode):
            yield name
        else:
            raise Damaged(f"holds special file {printable(name)}; refused")


def read(folder: Path) -> Record:
    """The manifest's record, if COMMIT is the hash of its bytes; `Damaged` otherwise. Looks at no
    other file."""
    commit = _read_small(folder, COMMIT, 1 << 10)
    text = _read_small(folder, MANIFEST, MANIFEST_LIMIT)
    if commit != _commit_of(text):
        raise Damaged(f"{COMMIT}: does not match {MANIFEST}")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST}: not JSON ({str(error)[:80]})") from error
    if (
        not isinstance(record, dict)
        or record.get("format") != FORMAT
        or not isinstance(record.get("files"), dict)
    ):
        raise Damaged(f"{MANIFEST}: not of format {FORMAT}; made by another version of jaxtrain?")
    return record


def commit(folder: Path) -> str:
    """The hash of a folder's manifest, as its COMMIT has it; `Damaged` if there is none."""
    return _read_small(folder, COMMIT, 1 << 10).decode("ascii", "replace").strip()


def problems(folder: Path) -> list[str]:
    """What is wrong with a folder, one line for each problem; an empty list if every byte is the
    one that the manifest was written for.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "data").write_bytes(b"abc")
    >>> write_manifest(folder, {"step": 5})
    >>> problems(folder)
    []
    >>> _ = (folder / "data").write_bytes(b"abd")
    >>> problems(folder)
    ['data: checksum mismatch']
    """
    try:
        # The walk comes first: no file is opened while the folder may hold a link, a device or a
        # pipe.
        present = set(entries(folder)) - {MANIFEST, COMMIT}
        listed = read(folder)["files"]
    except Damaged as error:
        return [str(error)]
    except OSError as error:
        return [_unreadable(error, folder)]
    found = [f"{printable(name)}: missing" for name in sorted(listed.keys() - present)]
    found += [f"{printable(name)}: not in the manifest" for name in sorted(present - listed.keys())]
    for name in sorted(present & listed.keys()):
        try:
            size, digest = checksum(folder / name)
        except OSError as error:
            found.append(_unreadable(error, folder))
            continue
        if [size, digest] != listed[name]:
            expected = listed[name][0] if isinstance(listed[name], list) and listed[name] else "?"
            found.append(
                f"{printable(name)}: "
                + ("checksum mismatch" if size == expected else f"{size} bytes, not {expected}")
            )
    return found


def _read_small(folder: Path, name: str, limit: int) -> bytes:
    path = folder / name
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise Damaged(f"no {name}") from None
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{name}: not a file; refused")
    if status.st_size > limit:
        raise Damaged(f"{name}: {status.st_size} bytes, more than the {limit} it may have; refused")
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read(limit)


def _commit_of(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode() + b"\n"


def _unreadable(error: OSError, folder: Path) -> str:
    name = os.path.relpath(error.filename, folder) if error.filename else folder.name
    return f"{printable(name)}: cannot be read ({error.strerror})"
