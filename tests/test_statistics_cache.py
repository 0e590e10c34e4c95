"""The cache of statistics: what was measured is not decoded again, and a number that may be another
is never believed."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_run import toy

from jaxtrain.data import statistics
from jaxtrain.data.sources.arrays import Arrays
from jaxtrain.data.sources.images import Images
from jaxtrain.data.table import ArrayTable, SliceTable
from jaxtrain.processes import group
from jaxtrain.runner import build

IDENTITY = {"fingerprint": "9 bytes", "modified_ns": 5, "data": {"train": "train[:90%]"}}


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A table whose images are made when they are read; it counts them."""

    images: np.ndarray
    reads: list[int]

    arrays = num_classes = class_names = None

    @property
    def fields(self) -> Mapping[str, Any]:
        return ArrayTable({"image": self.images}).fields

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self.reads.append(len(indices))
        return {"image": self.images[indices]}


def decoded(seed: int = 0, dtype: str = "uint8") -> Decoded:
    return Decoded(np.random.default_rng(seed).integers(0, 255, (500, 3, 3, 2)).astype(dtype), [])


def test_what_was_measured_is_not_read_again(tmp_path: Path) -> None:
    for dtype in ("uint8", "float32"):
        table, again = decoded(dtype=dtype), decoded(dtype=dtype)
        first = statistics.measure_once(table, 400, identity=IDENTITY, folder=tmp_path)
        assert first == statistics.measure(table, 400)  # to the last bit
        assert statistics.measure_once(again, 400, identity=IDENTITY, folder=tmp_path) == first
        assert sum(again.reads) <= statistics.PROBED < 400
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("table", "most", "change"),
    [
        (decoded(), 400, {"fingerprint": "10 bytes"}),
        (decoded(), 400, {"modified_ns": 6}),
        (decoded(), 400, {"data": {"train": "train[:80%]"}}),
        (decoded(), 399, {}),
        (decoded(), None, {}),
        (decoded(seed=1), 400, {}),
        (decoded(dtype="float32"), 400, {}),
        (SliceTable(decoded(), range(499)), 400, {}),
    ],
)
def test_whatever_it_depends_on_is_in_the_key(
    table: Any, most: int | None, change: dict[str, Any], tmp_path: Path
) -> None:
    statistics.measure_once(decoded(), 400, identity=IDENTITY, folder=tmp_path)
    found = statistics.measure_once(table, most, identity=IDENTITY | change, folder=tmp_path)
    assert found == statistics.measure(table, most)
    assert len(list(tmp_path.iterdir())) == 2


def test_another_method_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics.measure_once(decoded(), 400, identity=IDENTITY, folder=tmp_path)
    monkeypatch.setattr(statistics, "METHOD", statistics.METHOD + 1)
    table = decoded()
    statistics.measure_once(table, 400, identity=IDENTITY, folder=tmp_path)
    assert sum(table.reads) >= 400


def test_a_damaged_file_is_measured_anew_and_mended(tmp_path: Path) -> None:
    first = statistics.measure_once(decoded(), 400, identity=IDENTITY, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    digit = repr(first.mean_C[0])[:6].encode()
    wrong = whole.replace(digit, digit[:-1] + (b"1" if digit[-1:] != b"1" else b"2"))
    assert wrong != whole and json.loads(wrong)
    for damage in (b"", whole[: len(whole) // 2], b"[]", b"{}", b"\x00" * len(whole), wrong):
        path.write_bytes(damage)
        table = decoded()
        assert statistics.measure_once(table, 400, identity=IDENTITY, folder=tmp_path) == first
        assert sum(table.reads) >= 400
        assert path.read_bytes() == whole
    path.unlink()
    path.mkdir()  # nothing can be written there
    assert statistics.measure_once(decoded(), 400, identity=IDENTITY, folder=tmp_path) == first


def test_arrays_in_memory_and_data_that_nobody_can_name_are_not_kept(tmp_path: Path) -> None:
    statistics.measure_once(decoded(), 400, identity=None, folder=tmp_path)
    plain = ArrayTable({"image": decoded().images})
    statistics.measure_once(plain, None, identity=IDENTITY, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    run = toy()
    assert build.identity_of(run, run.data.open()) is None  # made, not read from files


def image_run(tmp_path: Path) -> Any:
    for number in range(8):
        folder = tmp_path / "data" / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
    source = Images(path=str(tmp_path / "data"), size=(8, 8), test="")
    return toy(data=source, batch_size=4)


def test_a_run_over_files_decodes_them_once_and_again_when_one_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    measured: list[int] = []
    measure = statistics.measure
    monkeypatch.setattr(
        statistics, "measure", lambda table, *rest: measured.append(0) or measure(table, *rest)
    )

    run = dataclasses.replace(image_run(tmp_path), precision="fp32")

    def prepare() -> Any:
        splits = run.data.open()
        recipe = build.recipe_of(
            run,
            splits.train,
            build.lengths(run, len(splits.train)),
            identity=build.identity_of(run, splits),
        )
        return recipe.prepare.keywords["statistics"]

    first = prepare()
    assert prepare() == first and len(measured) == 1
    changed = tmp_path / "data" / "train" / "class0" / "0.png"
    size, status = changed.stat().st_size, changed.stat()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(changed)
    changed.write_bytes(changed.read_bytes().ljust(size, b"\0"))
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert prepare() != first and len(measured) == 2


def test_a_memory_map_is_known_by_the_time_of_its_file(tmp_path: Path) -> None:
    np.save(tmp_path / "train_image.npy", decoded().images)
    np.save(tmp_path / "train_label.npy", np.zeros(500, np.int32))
    run = toy(data=Arrays(path=str(tmp_path), test=""))
    splits = run.data.open()
    identity = build.identity_of(run, splits)
    assert identity is not None
    assert identity["modified_ns"] == max(path.stat().st_mtime_ns for path in tmp_path.iterdir())


def test_other_processes_take_the_numbers_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    first = statistics.measure(decoded())

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("measured in a process other than the first")

    monkeypatch.setattr(statistics, "measure_once", fail)
    monkeypatch.setattr(
        group, "on_main", lambda compute: json.loads(json.dumps(dataclasses.asdict(first)))
    )
    run = toy(precision="fp32")
    recipe = build.recipe_of(run, decoded(), build.lengths(run, 500))
    assert recipe.prepare.keywords["statistics"] == first


GROUP = """
import os, sys
import jax
from jaxtrain.errors import UserError
from jaxtrain.processes import group
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
assert group.on_main(lambda: [0.1, jax.process_index()]) == [0.1, 0]
def refuse():
    raise UserError("--data: refused")
def fail():
    raise KeyError("a fault")
for compute in (refuse, fail):
    try:
        group.on_main(compute)
    except Exception as error:
        print(type(error).__name__, str(error), flush=True)
jax.distributed.shutdown()
"""


def test_what_process_0_raises_is_raised_in_all(tmp_path: Path) -> None:
    from jaxtrain.processes.supervisor import free_port

    address = f"127.0.0.1:{free_port()}"
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", GROUP, address, str(index)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [[line for line in lines if "Gloo" not in line] for lines in said] == [
        ["UserError --data: refused", "KeyError 'a fault'"],
        ["UserError --data: refused", "PeerLost process 0 failed (KeyError: 'a fault')"],
    ]
