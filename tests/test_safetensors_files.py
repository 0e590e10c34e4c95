"""Hugging Face folders: read by parts onto a mesh, written whole or not at all, and refused in one
line where they are damaged."""

import gc
import json
import os
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import numpy as reference

from jaxtrain.checkpoints import lazy
from jaxtrain.errors import CheckpointError, UserError
from jaxtrain.parallel import mesh as meshes
from jaxtrain.weights import safetensors_files


def random_shape(numbers: random.Random, size: int) -> tuple[int, ...]:
    shape = []
    while size > 1:
        shape.append(numbers.choice([each for each in range(2, size + 1) if size % each == 0]))
        size //= shape[-1]
    for _ in range(numbers.randint(0, 2)):
        shape.insert(numbers.randint(0, len(shape)), 1)
    return tuple(shape)


def random_index(numbers: random.Random, shape: tuple[int, ...]) -> tuple[Any, ...]:
    index: list[Any] = []
    for size in shape:
        low, high = sorted(numbers.sample(range(size + 1), 2))
        index.append(numbers.choice([numbers.randrange(size), slice(low, high), slice(None)]))
    return tuple(index)


def test_lazy_arrays_are_numpys_after_any_turns_splits_and_cuts() -> None:
    numbers = random.Random(0)
    for _ in range(500):
        shape = random_shape(numbers, numbers.choice([1, 6, 12, 24, 30]))
        array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
        held = lazy.of(array)
        for _ in range(numbers.randint(1, 4)):
            what = numbers.choice(["turn", "split", "cut"])
            if what == "turn":
                order = numbers.sample(range(array.ndim), array.ndim)
                array, held = array.transpose(order), held.transpose(*order)
            elif what == "split":
                shape = random_shape(numbers, array.size)
                array, held = array.reshape(shape), held.reshape(shape)
            else:
                index = random_index(numbers, array.shape)
                array, held = array[index], held[index]
        assert held.shape == array.shape
        np.testing.assert_array_equal(held.read(), array)
        box = tuple(tuple(sorted(numbers.choices(range(s + 1), k=2))) for s in array.shape)
        want = array[tuple(slice(*span) for span in box)]
        np.testing.assert_array_equal(held.read_box(box), want)


def saved(folder: Path, **arrays: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    reference.save_file(arrays, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("spec", "mesh"),
    [
        ((), "data:8"),
        (("fsdp",), "fsdp:8"),
        ((None, "fsdp"), "data:2,fsdp:4"),
        (("fsdp", "tensor"), "data:2,fsdp:2,tensor:2"),
        ((None, "tensor", None), "fsdp:4,tensor:2"),
        ((None, None, "fsdp"), "fsdp:4,tensor:2"),
    ],
)
def test_parameters_are_born_where_they_belong(
    tmp_path: Path, spec: tuple[Any, ...], mesh: str, dtype: str
) -> None:
    array = np.arange(16 * 24, dtype=np.float32).reshape(16, 24).astype(jnp.dtype(dtype))
    path = saved(tmp_path / "m", weight=array)
    # as a projection of queries: (out, in) there, (in, heads, width of a head) here
    tensor = safetensors_files.open_weights(path).tensors["weight"].T.reshape(24, 4, 4)
    where = NamedSharding(meshes.make(mesh), PartitionSpec(*spec))
    placed = lazy.placed("w", tensor, jax.ShapeDtypeStruct((24, 4, 4), jnp.float32, sharding=where))
    assert placed.sharding == where and placed.dtype == jnp.float32
    want = array.astype(np.float32).T.reshape(24, 4, 4)
    np.testing.assert_array_equal(np.asarray(placed), want)
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), want[shard.index])


def test_placed_arrays_may_be_donated(tmp_path: Path) -> None:
    path = saved(tmp_path / "m", weight=np.ones((64, 64), np.float32))
    tensor = safetensors_files.open_weights(path).tensors["weight"]
    where = NamedSharding(meshes.make("data:8"), PartitionSpec())
    like = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=where)
    placed = lazy.placed("w", tensor, like)
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(placed)
    assert placed.is_deleted() and float(doubled.sum()) == 2 * 64 * 64


@pytest.mark.parametrize("transposed", [False, True])
def test_reading_holds_no_more_than_two_tensors_besides_the_parts(
    tmp_path: Path, transposed: bool
) -> None:
    """On CPU jax keeps aligned memory of NumPy as the array itself, so the parts count here."""
    array = np.zeros((512, 512), np.float32)
    path = saved(tmp_path / "m", **{f"layer{place}": array for place in range(4)})
    stored = safetensors_files.open_weights(path)
    where = NamedSharding(meshes.make("fsdp:8"), PartitionSpec("fsdp"))
    like = jax.ShapeDtypeStruct(array.shape, jnp.float32, sharding=where)
    lazy.placed("first", stored.tensors["layer0"], like)  # what jax imports on its way
    tracemalloc.start()
    try:
        for name, tensor in stored.tensors.items():
            placed = lazy.placed(name, tensor.T if transposed else tensor, like)
            jax.block_until_ready(placed)
            del placed
            gc.collect()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < array.nbytes and peak < 2.5 * array.nbytes


def test_a_process_reads_only_what_its_devices_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.arange(800, dtype=np.float32).reshape(100, 8)
    tensor = safetensors_files.open_weights(saved(tmp_path / "m", weight=array)).tensors["weight"]
    counts = counted_reads(monkeypatch)
    rows = [((0, 25), (0, 8)), ((50, 75), (0, 8))]
    for box, found in lazy._boxes(tensor, rows):
        np.testing.assert_array_equal(found, array[slice(*box[0]), slice(*box[1])])
    assert counts == [200, 200]
    counts.clear()
    columns = [((10, 20), (0, 4)), ((10, 20), (4, 8))]
    for box, found in lazy._boxes(tensor, columns):
        np.testing.assert_array_equal(found, array[slice(*box[0]), slice(*box[1])])
    assert counts == [80]  # once for both
    counts.clear()
    for box, found in lazy._boxes(tensor.T, [((0, 8), (0, 30))]):
        np.testing.assert_array_equal(found, array.T[slice(*box[0]), slice(*box[1])])
    assert counts == [240]


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each read of a file asks for, from now on."""
    counts: list[int] = []
    read = safetensors_files._read

    def counted(path: Path, start: int, count: int, dtype: Any) -> np.ndarray:
        counts.append(count)
        return read(path, start, count, dtype)

    monkeypatch.setattr(safetensors_files, "_read", counted)
    return counts


def test_only_the_rows_of_a_part_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m", weight=np.arange(800, dtype=np.float32).reshape(100, 8))
    tensor = safetensors_files.open_weights(path).tensors["weight"]
    counts = counted_reads(monkeypatch)
    monkeypatch.setattr(safetensors_files, "CHUNK", 3 * 32)
    assert tensor[10:20].read().sum() == np.arange(80, 160).sum()
    assert counts == [80]
    counts.clear()
    np.testing.assert_array_equal(tensor[10:20, 2:4].read()[1], [90, 91])
    assert counts == [24, 24, 24, 8]


def written(folder: Path, arrays: dict[str, np.ndarray], **options: Any) -> Path:
    specs = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    safetensors_files.write(folder, specs, arrays.items(), config={"a": 1}, **options)
    return folder


def models(numbers: int = 5) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    made = {f"layer{place}.w": draw.standard_normal((4, place + 1)) for place in range(numbers)}
    arrays = {name: array.astype(np.float32) for name, array in made.items()}
    return arrays | {
        "scale": np.float32(3),
        "half": np.ones((3, 2), jnp.bfloat16),
        "none": np.zeros((0, 4), np.float16),
    }


def test_what_is_written_the_formats_own_library_reads(tmp_path: Path) -> None:
    arrays = {name: np.asarray(array) for name, array in models().items()}
    folder = written(tmp_path / "m", arrays)
    found = reference.load_file(folder / "model.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert json.loads((folder / "config.json").read_text()) == {"a": 1}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (
        (folder / "model.safetensors")
        .read_bytes()[8:]
        .startswith(b'{"__metadata__":{"format":"pt"')
    )


def test_shards_have_an_index_and_no_more_bytes_than_asked_for(tmp_path: Path) -> None:
    arrays = {name: np.asarray(array) for name, array in models(9).items()}
    folder = written(tmp_path / "m", arrays, shard_bytes=200)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert list(index["weight_map"]) == list(arrays)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
    for name in files:
        found = reference.load_file(folder / name)
        assert sum(array.nbytes for array in found.values()) <= 200
    stored = safetensors_files.open_weights(folder)
    assert stored.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(stored.tensors[name].read(), array)


def test_a_folder_that_could_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield "a", np.ones(2, np.float32)
        raise RuntimeError("out of power")

    specs = {"a": ((2,), "float32"), "b": ((2,), "float32")}
    with pytest.raises(RuntimeError, match="out of power"):
        safetensors_files.write(tmp_path / "m", specs, broken(), config={})
    assert list(tmp_path.iterdir()) == []
    written(tmp_path / "m", {"a": np.ones(2, np.float32)})
    with pytest.raises(UserError, match=r"m: is there already; choose another name, or delete it"):
        written(tmp_path / "m", {})


def test_files_that_go_along_are_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "README.md"):
        (source / name).write_text("{}")
    files = safetensors_files.tokenizer_files(source)
    generation = {"eos_token_id": 2}
    written(tmp_path / "m", {}, copies=files, generation=generation)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(start: int, stop: int, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


DAMAGED = {
    "empty": (b"", "is no whole safetensors file (0 bytes, a header of ?); download it again"),
    "short": (raw({}, length=99), "(10 bytes, a header of 99); download it again"),
    "absurd_header": (raw({}, length=2**63), "a header of 9223372036854775808); download it"),
    "no_json": (raw(b"{nonsense"), "is not JSON (Expecting property name"),
    "no_utf8": (raw(b'{"\xff": 1}'), "its header is not UTF-8; download it again"),
    "list": (raw([]), "its header is no JSON object"),
    "metadata": (raw({"__metadata__": 3}), "its __metadata__ is no JSON object"),
    "twice": (
        raw(b'{"a": {"dtype":"F32","shape":[],"data_offsets":[0,4]}, "a": 3}', bytes(4)),
        "has a twice; download it again",
    ),
    "truncated": (
        raw({"a": tensor(0, 400, [100])}, bytes(40)),
        "is truncated: its tensors end at byte 473, it has 113; download it again",
    ),
    "absurd_shape": (
        raw({"a": tensor(0, 8, [2**40, 2**40])}, bytes(8)),
        "a of F32[1099511627776, 1099511627776] needs 4835703278458516698824704 bytes and has 8",
    ),
    "negative": (raw({"a": tensor(0, 8, [-2, -1])}, bytes(8)), "a has no proper shape and data_"),
    "backwards": (raw({"a": tensor(8, 0, [2])}, bytes(8)), "a has no proper shape and data_offset"),
    "no_offsets": (raw({"a": {"dtype": "F32", "shape": []}}), "a has no proper shape and data_off"),
    "overlapping": (
        raw({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12)),
        "b and a overlap; download it again",
    ),
    "hole": (
        raw({"a": tensor(0, 8, [2]), "b": tensor(12, 20, [2])}, bytes(20)),
        "4 bytes before b belong to nothing; download it again",
    ),
    "rest": (
        raw({"a": tensor(0, 8, [2])}, bytes(9)),
        "1 bytes after its tensors belong to nothing",
    ),
    "fp8": (
        raw({"a": tensor(0, 8, [8], "F8_E4M3")}, bytes(8)),
        "a is F8_E4M3, which is not read; convert it to BF16 or F32",
    ),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1",
        "is a pointer of Git LFS; run git lfs pull",
    ),
    "zip": (b"PK\3\4\0\0\x08\x08" + bytes(60), "weights in pickle files are not read"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str) -> None:
    content, said = DAMAGED[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        safetensors_files.open_weights(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def sharded(folder: Path) -> tuple[Path, dict[str, Any]]:
    arrays = {name: np.ones(10, np.float32) for name in ("a", "b", "c")}
    written(folder, arrays, shard_bytes=40)
    index = folder / "model.safetensors.index.json"
    return index, json.loads(index.read_text())


def changed(index: dict[str, Any], **places: str | None) -> dict[str, Any]:
    found = index["weight_map"] | places
    return {"weight_map": {name: place for name, place in found.items() if place is not None}}


def test_an_index_that_does_not_fit_its_files_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    path, index = sharded(folder)
    first, second = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
    cases: dict[str, Any] = {
        "names the file ../x.safetensors, which is not in": changed(index, a="../x.safetensors"),
        "names the file /etc/passwd, which is not in its folder": changed(index, a="/etc/passwd"),
        "names x.safetensors, which is missing; download it again": changed(
            index, a="x.safetensors"
        ),
        f"d is not in {first}, where it should be": changed(index, d=first),
        f"a is not in {second}, where it should be": changed(index, a=second),
        f"{first}: has a, of which model.safetensors.index.json says nothing": None,  # below
        "has no weight_map of names to files; download it again": {"weight_map": [1]},
        "is no JSON object; download it again": [],
    }
    for said, value in cases.items():
        if value is None:
            value = changed(index, a=None)
            extra = {"aa": np.ones(1, np.float32), "a": np.ones(10, np.float32)}
            reference.save_file(extra, folder / first)
            value["weight_map"]["aa"] = first
        path.write_text(json.dumps(value))
        with pytest.raises(UserError, match=re.escape(said)):
            safetensors_files.open_weights(folder)
    path.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(UserError, match="has a twice; download it again"):
        safetensors_files.open_weights(folder)
    path.write_text('{"weight_map": {"a"')
    with pytest.raises(UserError, match=r"index.json: is not JSON \(Expecting ':' .*; download it"):
        safetensors_files.open_weights(folder)
    path.write_bytes(b'{"weight_map": {"\xff": "x"}}')
    with pytest.raises(UserError, match=r"index.json: cannot be read \('utf-8' codec can't decode"):
        safetensors_files.open_weights(folder)
    with open(path, "wb") as file:
        file.truncate(2**27)  # a hole, which takes no place on the disk
    with pytest.raises(UserError, match="134217728 bytes are too many; download it again"):
        safetensors_files.open_weights(folder)


def test_two_models_in_one_folder_are_refused(tmp_path: Path) -> None:
    sharded(tmp_path / "m")
    saved(tmp_path / "m", a=np.ones(1, np.float32))
    with pytest.raises(UserError, match="two models; delete the one that is not meant"):
        safetensors_files.open_weights(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"has 3 safetensors files and no model.safetensors.index"):
        safetensors_files.open_weights(tmp_path / "m")


def test_links_out_of_the_folder_are_refused_but_the_hubs_cache_is_read(tmp_path: Path) -> None:
    blobs = tmp_path / "models--x" / "blobs"
    snapshot = tmp_path / "models--x" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    os.rename(saved(tmp_path / "m", a=np.ones(2, np.float32)), blobs / "f00")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00")
    assert safetensors_files.open_weights(snapshot).shapes == {"a": (2,)}
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").symlink_to(blobs / "f00")
    with pytest.raises(UserError, match=r"is a link to .*f00, out of the folder; copy the file"):
        safetensors_files.open_weights(other)
    (other / "model.safetensors").unlink()
    (other / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"leads nowhere \(.*\); download it again"):
        safetensors_files.open_weights(other)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "model.pkl"])
def test_pickle_is_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(
            UserError, match=r"opening one runs code; convert it where you trust it: .*save_pretrai"
        ):
            safetensors_files.open_weights(place)


def test_a_path_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"has no model.safetensors and no .*; give a model's fold"):
        safetensors_files.open_weights(tmp_path / "model")
    with pytest.raises(UserError, match=r"no such file or folder.*; give the folder of a model"):
        safetensors_files.open_weights(tmp_path / "modle")


def test_what_is_no_file_of_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UserError, match="model.safetensors: is no plain file; download it again"):
        safetensors_files.open_weights(tmp_path)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UserError, match="m.gguf: is a GGUF file; open it by weights.load"):
        safetensors_files.open_weights(tmp_path / "m.gguf")
    specs = {"a": ((2,), "complex64")}
    with pytest.raises(UserError, match="a is complex64, which safetensors does not hold; cast it"):
        safetensors_files.write_file(tmp_path / "c.safetensors", specs, [])
    with pytest.raises(UserError, match=f"no such directory: {tmp_path}/no"):
        written(tmp_path / "no" / "m", {})


def test_a_file_that_shrinks_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    path = saved(tmp_path / "m", a=np.ones(100, np.float32))
    tensor = safetensors_files.open_weights(path).tensors["a"]
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        tensor.read()


def test_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m", a=np.full(4, 1e30, np.float32))
    tensor = safetensors_files.open_weights(path).tensors["a"]
    with pytest.raises(UserError, match="w: values of float32 do not fit into float16"):
        lazy.placed("w", tensor, jax.ShapeDtypeStruct((4,), jnp.float16))
    with pytest.raises(UserError, match=r"w: the file has \(4,\), the model \(5,\)"):
        lazy.placed("w", tensor, jax.ShapeDtypeStruct((5,), jnp.float32))
