"""Hugging Face folders: one safetensors file, or several with an index, read lazily and written
whole or not at all.

Headers are checked before anything is allocated by them; tensors are read by box when somebody asks
(`lazy.Lazy`). The format is 8 bytes with the length of a JSON header, the header, and the tensors
one after another; reading and writing it takes no other library, and never more memory than a few
tensors.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtrain import durable_files
from jaxtrain.checkpoints import lazy
from jaxtrain.errors import CheckpointError, UserError
from jaxtrain.messages import bytes_text, did_you_mean_path, one_line, printable

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the format's own library."""
LONGEST_JSON = 64 << 20
CHUNK = 32 << 20
"""Bytes that are read at a time where only some columns of a tensor are wanted."""
SHARD = 5_000_000_000
"""Bytes of a file, from which on a model is written as several."""
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""By the words of the format."""
WORDS = {dtype: word for word, dtype in DTYPES.items()}
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files of a tokenizer, which are copied as they are."""
AGAIN = "download it again"
PICKLE = (
    "weights in pickle files are not read, for opening one runs code; convert it where you trust"
    " it: transformers' AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR)"
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor as the header of its file describes it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""
    stop: int


@dataclasses.dataclass(frozen=True)
class Stored:
    """The tensors of a file or a folder, not read yet."""

    path: Path
    tensors: Mapping[str, lazy.Lazy]
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max((tensor.nbytes for tensor in self.tensors.values()), default=0)


def open_weights(path: str | os.PathLike[str]) -> Stored:
    """The tensors of a Hugging Face folder, or of one safetensors file.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "model"
    >>> write(folder, {"a": ((2, 3), "float32")}, [("a", np.ones((2, 3), np.float32))], config={})
    >>> stored = open_weights(folder)
    >>> stored.tensors["a"][:1].read().tolist()
    [[1.0, 1.0, 1.0]]

    `UserError` if it is none, or is damaged, or has weights that only pickle can read.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        index, single = place / INDEX, place / ONE_FILE
        if index.exists() and single.exists():
            raise UserError(
                f"{_shown(place)}: has {ONE_FILE} and {INDEX}, two models; delete the one that is"
                " not meant"
            )
        return _of_index(place) if index.exists() else _of_file(_the_file(place), place)
    if not place.exists():
        near = did_you_mean_path(str(place))
        raise UserError(
            f"{_shown(place)}: no such file or folder{near}; give the folder of a model"
        )
    _refuse_pickle(place)
    return _of_file(place, place.parent)


def _the_file(folder: Path) -> Path:
    """The one file of weights of a folder without an index."""
    found = sorted(folder.glob("*.safetensors"))
    if (folder / ONE_FILE) in found:
        return folder / ONE_FILE
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{_shown(folder)}: has {len(found)} safetensors files and no {INDEX}, which says what"
            f" is where; {AGAIN}, or name one file"
        )
    for each in sorted(folder.iterdir()):
        if each.suffix in PICKLED and each.is_file():
            _refuse_pickle(each)
    raise UserError(f"{_shown(folder)}: has no {ONE_FILE} and no {INDEX}; give a model's folder")


def _refuse_pickle(path: Path) -> None:
    """`UserError` for a file of weights that is no safetensors file."""
    if path.suffix == ".gguf":
        raise UserError(f"{_shown(path)}: is a GGUF file; open it by weights.load")
    if path.suffix in PICKLED:
        raise UserError(f"{_shown(path)}: {PICKLE}")


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file of a model's folder; `UserError` if it is none, or has a name
    twice."""
    try:
        if path.stat().st_size > LONGEST_JSON:
            raise UserError(f"{_shown(path)}: {path.stat().st_size} bytes are too many; {AGAIN}")
        found = _parsed(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{_shown(path)}: cannot be read ({one_line(str(error))})") from None
    if not isinstance(found, dict):
        raise UserError(f"{_shown(path)}: is no JSON object; {AGAIN}")
    return found


def _parsed(text: str, path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{_shown(path)}: has {printable(twice)} twice; {AGAIN}")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{_shown(path)}: is not JSON ({one_line(str(error))}); {AGAIN}") from None


def _of_index(folder: Path) -> Stored:
    """The tensors of several files, each exactly where the index says."""
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not (isinstance(places, dict) and all(isinstance(each, str) for each in places.values())):
        raise UserError(f"{_shown(index)}: has no weight_map of names to files; {AGAIN}")
    files: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise UserError(
                f"{_shown(index)}: names the file {printable(name)}, which is not in its folder;"
                f" {AGAIN}"
            )
        if not (folder / name).exists():
            raise UserError(f"{_shown(index)}: names {printable(name)}, which is missing; {AGAIN}")
        files[name] = _of_file(folder / name, folder)
    for tensor, name in places.items():
        if tensor not in files[name].tensors:
            raise UserError(
                f"{_shown(index)}: {printable(tensor)} is not in {printable(name)}, where it"
                f" should be; {AGAIN}"
            )
    found: dict[str, lazy.Lazy] = {}
    for name, stored in files.items():
        for tensor, value in stored.tensors.items():
            if places.get(tensor) != name:
                raise UserError(
                    f"{_shown(folder / name)}: has {printable(tensor)}, of which {INDEX} says"
                    f" {places.get(tensor, 'nothing')}; {AGAIN}"
                )
            found[tensor] = value
    return Stored(folder, found, next(iter(files.values())).metadata if files else {})


def _of_file(path: Path, folder: Path) -> Stored:
    _check_place(path, folder)
    entries, metadata = read_header(path)
    tensors = {name: _lazy(path, name, entry) for name, entry in entries.items()}
    return Stored(path, tensors, metadata)


def _check_place(path: Path, folder: Path) -> None:
    """`UserError` for what is no plain file in the folder. The cache of Hugging Face's hub links
    each file of a snapshot to a blob beside it; any other link out of the folder is refused."""
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{_shown(path)}: leads nowhere ({one_line(str(error))}); {AGAIN}"
        ) from None
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(each) for each in homes):
        raise UserError(
            f"{_shown(path)}: is a link to {_shown(real)}, out of the folder; copy the file there"
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise UserError(f"{_shown(path)}: is no plain file; {AGAIN}")


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """What a file holds, and its few words about itself; checked against the file's size before
    anything is read."""
    shown = _shown(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if head == b"version ":
                raise UserError(f"{shown}: is a pointer of Git LFS; run git lfs pull")
            if len(head) < 8 or length > min(size - 8, LONGEST_HEADER):
                if head[:4] == b"PK\3\4" or head[:1] == b"\x80":
                    raise UserError(f"{shown}: {PICKLE}")
                raise UserError(
                    f"{shown}: is no whole safetensors file ({size} bytes, a header of"
                    f" {length if len(head) == 8 else '?'}); {AGAIN}"
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror})") from None
    try:
        header = _parsed(text.decode("utf-8"), path)
    except UnicodeDecodeError:
        raise UserError(f"{shown}: its header is not UTF-8; {AGAIN}") from None
    if not isinstance(header, dict):
        raise UserError(f"{shown}: its header is no JSON object; {AGAIN}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise UserError(f"{shown}: its __metadata__ is no JSON object; {AGAIN}")
    entries = {name: _entry(shown, name, given, 8 + length) for name, given in header.items()}
    _check_bytes(shown, entries, 8 + length, size)
    return entries, {str(name): str(value) for name, value in metadata.items()}


def _entry(shown: str, name: str, given: Any, base: int) -> Entry:
    said = f"{shown}: {printable(name)}"
    given = given if isinstance(given, dict) else {}
    shape: Any = given.get("shape")
    span: Any = given.get("data_offsets")
    if not (_are_counts(shape) and _are_counts(span) and len(span) == 2 and span[0] <= span[1]):
        raise UserError(f"{said} has no proper shape and data_offsets; {AGAIN}")
    word = given.get("dtype")
    if word not in DTYPES:
        raise UserError(
            f"{said} is {printable(str(word))}, which is not read; convert it to BF16 or F32"
        )
    wanted = math.prod(shape) * DTYPES[word].itemsize
    if span[1] - span[0] != wanted:
        raise UserError(
            f"{said} of {word}{shape} needs {wanted} bytes and has {span[1] - span[0]}; {AGAIN}"
        )
    return Entry(DTYPES[word], tuple(shape), base + span[0], base + span[1])


def _are_counts(given: Any) -> bool:
    return isinstance(given, list) and all(
        isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in given
    )


def _check_bytes(shown: str, entries: Mapping[str, Entry], base: int, size: int) -> None:
    """`UserError` unless the tensors lie one after another, to the end of the file."""
    end, before = base, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < end:
            raise UserError(f"{shown}: {printable(name)} and {printable(before)} overlap; {AGAIN}")
        if entry.start > end:
            raise UserError(
                f"{shown}: {entry.start - end} bytes before {printable(name)} belong to nothing;"
                f" {AGAIN}"
            )
        end, before = entry.stop, name
    if end > size:
        raise UserError(
            f"{shown}: is truncated: its tensors end at byte {end}, it has {size}; {AGAIN}"
        )
    if end < size:
        raise UserError(f"{shown}: {size - end} bytes after its tensors belong to nothing; {AGAIN}")


def _lazy(path: Path, name: str, entry: Entry) -> lazy.Lazy:
    def read_box(box: lazy.Box) -> np.ndarray:
        try:
            return _read_box(path, entry, box)
        except OSError as error:
            raise CheckpointError(f"{_shown(path)}: {name}: {one_line(str(error))}") from error

    def cost(box: lazy.Box) -> int:
        row = math.prod(entry.shape[1:])
        return (box[0][1] - box[0][0]) * row if box else 1

    return lazy.Lazy(entry.shape, entry.dtype, read_box, cost)


def _read_box(path: Path, entry: Entry, box: lazy.Box) -> np.ndarray:
    """A box of a tensor: its rows, some at a time, of which the columns are kept."""
    if not entry.shape:
        return _read(path, entry.start, 1, entry.dtype).reshape(())
    row = math.prod(entry.shape[1:])
    cut = tuple(slice(low, high) for low, high in box[1:])
    first, last = box[0]
    whole = all(span == (0, size) for span, size in zip(box[1:], entry.shape[1:], strict=True))
    step = last - first if whole else max(1, CHUNK // max(1, row * entry.dtype.itemsize))
    found = np.empty([high - low for low, high in box], entry.dtype)
    for place in range(first, last, max(step, 1)):
        count = min(step, last - place)
        start = entry.start + place * row * entry.dtype.itemsize
        if whole:
            return _read(path, start, count * row, entry.dtype).reshape(count, *entry.shape[1:])
        rows = _read(path, start, count * row, entry.dtype).reshape(count, *entry.shape[1:])
        found[place - first : place - first + count] = rows[(slice(None), *cut)]
    return found


def _read(path: Path, start: int, count: int, dtype: np.dtype[Any]) -> np.ndarray:
    """So many numbers from a byte on."""
    raw = np.fromfile(path, np.uint8, count * dtype.itemsize, offset=start)
    if raw.size != count * dtype.itemsize:
        raise CheckpointError(f"{_shown(path)}: became shorter while it was read; {AGAIN}")
    return raw.view(dtype)


Specs = Mapping[str, tuple[Sequence[int], Any]]
"""Shape and dtype of each tensor, by name."""


def write(
    folder: str | os.PathLike[str],
    specs: Specs,
    tensors: Iterable[tuple[str, Any]],
    *,
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    copies: Iterable[Path] = (),
    texts: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD,
    config_name: str = CONFIG,
    weights_name: str = ONE_FILE,
) -> None:
    """A folder that `transformers` loads, written whole or not at all, one tensor at a time.

    `specs` says what comes, `tensors` brings it in the same order, of NumPy or of JAX. A model of
    more than `shard_bytes` becomes several files with an index. `copies` are files that go along,
    such as a tokenizer's, `texts` are written by their names. `UserError` if the folder is there
    and not empty.
    """
    place = Path(folder).expanduser()
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UserError(f"{_shown(place)}: is there already; choose another name, or delete it")
    if not place.absolute().parent.is_dir():
        raise UserError(f"{_shown(place)}: no such directory: {_shown(place.absolute().parent)}")
    temporary = place.absolute().with_name(f".{place.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_files(temporary, specs, iter(tensors), shard_bytes, weights_name)
        durable_files.write_json(temporary / config_name, dict(config))
        if generation is not None:
            durable_files.write_json(temporary / GENERATION, dict(generation))
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        for path in copies:
            if not (temporary / path.name).exists():
                shutil.copyfile(path, temporary / path.name)
        with contextlib.suppress(FileNotFoundError):
            place.rmdir()
        durable_files.publish(temporary, place.absolute())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files of a model's folder."""
    return [folder / name for name in TOKENIZER if (folder / name).is_file()]


def _write_files(
    folder: Path, specs: Specs, tensors: Iterator[tuple[str, Any]], shard_bytes: int, one: str
) -> None:
    shards = _shards(specs, shard_bytes)
    names = (
        [one]
        if len(shards) == 1
        else [
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
    )
    for name, shard in zip(names, shards, strict=True):
        count = len(shard)
        write_file(folder / name, shard, itertools.islice(tensors, count))
    if extra := next(tensors, None):
        raise ValueError(f"{extra[0]} was not announced")
    if len(shards) > 1:
        total = sum(_bytes_of(spec) for spec in specs.values())
        places = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": places}
        durable_files.write_json(folder / INDEX, index)


def _shards(specs: Specs, shard_bytes: int) -> list[dict[str, tuple[Sequence[int], Any]]]:
    """The tensors of each file, in their order; a tensor larger than a file has one of its own."""
    shards: list[dict[str, tuple[Sequence[int], Any]]] = [{}]
    held = 0
    for name, spec in specs.items():
        if shards[-1] and held + _bytes_of(spec) > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = spec
        held += _bytes_of(spec)
    return shards


def _bytes_of(spec: tuple[Sequence[int], Any]) -> int:
    return math.prod(spec[0]) * np.dtype(spec[1]).itemsize


def write_file(
    path: Path,
    specs: Specs,
    tensors: Iterable[tuple[str, Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One safetensors file, whole or not at all, of tensors that come one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, spec in specs.items():
        dtype = np.dtype(spec[1])
        if dtype not in WORDS:
            raise UserError(f"{name} is {dtype}, which safetensors does not hold; cast it first")
        start, end = end, end + _bytes_of(spec)
        shape = [int(size) for size in spec[0]]
        header[name] = {"dtype": WORDS[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            coming = iter(tensors)
            for name, (shape, dtype) in specs.items():
                given, value = next(coming, ("nothing", 0))
                array = np.asarray(value)
                array = np.ascontiguousarray(array, np.dtype(dtype)).reshape(array.shape)
                if given != name or array.shape != tuple(shape):
                    raise ValueError(f"announced {name} {shape}, came {given} {array.shape}")
                file.write(array.reshape(-1).view(np.uint8).data if array.size else b"")
        durable_files.publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _shown(path: Path) -> str:
    return printable(str(path))


def size_text(stored: Stored) -> str:
    """How many tensors, and bytes.

    >>> size_text(Stored(Path("."), {}, {}))
    '0 tensors, 0 B'
    """
    total = sum(tensor.nbytes for tensor in stored.tensors.values())
    return f"{len(stored.tensors)} tensors, {bytes_text(total)}"
