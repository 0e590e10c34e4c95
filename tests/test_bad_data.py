"""Bad data at the command: status 2 and one line, before anything is compiled, whichever source and
split it is in. What each line says in full is in test_interpretation.py, test_image_folders.py and
test_own_data.py."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_bad_runs import nothing_compiles  # noqa: F401 - a fixture
from test_run import start

from jaxtrain.data.sources.arrays import Arrays
from jaxtrain.data.sources.images import Images
from jaxtrain.data.sources.own import Own
from jaxtrain.data.sources.records import Records, write_records
from jaxtrain.data.table import ArrayTable
from jaxtrain.errors import UserError
from jaxtrain.train import lowering

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (40, 4, 4, 1), dtype=np.uint8)
GOOD = {"x": PIXELS, "y": np.arange(40) % 4, "x_test": PIXELS[:20], "y_test": np.arange(20) % 4}


WEIGHT = np.ones(20, np.float32)
WEIGHT[7] = 0


def nan() -> np.ndarray:
    array = np.ones((20, 4, 4, 1), np.float32)
    array[7] = np.nan
    return array


def arrays(folder: Path, **changes: Any) -> Arrays:
    np.savez(folder / "my.npz", **(GOOD | changes))
    return Arrays(path=f"{folder}/my.npz")


def mapped(folder: Path, **more: Any) -> Arrays:
    (folder / "maps").mkdir()
    for name, array in (GOOD | {"x": PIXELS / np.float32(255), "x_test": nan()} | more).items():
        np.save(folder / "maps" / name, array)
    return Arrays(path=f"{folder}/maps")


def records(folder: Path, *, train: Any = {}, test: Any = {}) -> Records:  # noqa: B006 - read
    tables = {
        "train": ArrayTable({"image": PIXELS / 255, "label": GOOD["y"]} | train, 4),
        "test": ArrayTable({"image": nan(), "label": GOOD["y_test"]} | test, 4),
    }
    write_records(folder / "records", tables)
    return Records(path=f"{folder}/records")


def images(folder: Path, *beside: str) -> Images:
    for split in ("train", "test"):
        for label in range(4):
            (folder / split / str(label)).mkdir(parents=True)
            for row in range(8):
                pixels = RANDOM.integers(0, 256, (4, 4), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / str(label) / f"{row}.png")
    for name in beside:
        (folder / name).mkdir()
    return Images(path=str(folder), size=(4, 4), color="gray")


def damaged(folder: Path, *, mended: bool) -> Images:
    source = images(folder)
    (folder / "test" / "3" / "7.png").write_bytes(b"")
    if mended:
        (folder / "test" / "3" / "7.png").unlink()
    return source


ROWS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nan": (
        lambda folder: arrays(folder, x=PIXELS / 255, x_test=nan()),
        (
            "--data.path='{tmp}/my.npz': test: image holds nan in row 7; mend the data, or give"
            " such"
            " rows a weight of 0 (an array `weight`, 1 for the others)"
        ),
    ),
    "nan in a memory map": (
        mapped,
        (
            "--data.path='{tmp}/maps': test: row 7: image holds nan; mend the data, or give such"
            " rows a"
            " weight of 0 (an array `weight`, 1 for the others)"
        ),
    ),
    "nan in records": (
        records,
        (
            "{tmp}/records/test-00000.array_record: record 7: image holds nan; mend the data, or"
            " give"
            " such rows a weight of 0 (an array `weight`, 1 for the others)"
        ),
    ),
    "floats beside bytes": (
        lambda folder: arrays(folder, x_test=PIXELS[:20] / np.float32(255)),
        (
            "--data.path='{tmp}/my.npz': test: image is float32, that of train uint8; save both"
            " in one"
            " dtype and range"
        ),
    ),
    "another range": (
        lambda folder: arrays(folder, x=PIXELS / 255, x_test=PIXELS[:20] * 1.0),
        (
            "--data.path='{tmp}/my.npz': image is in 0..1 in train and in 0..255 in test: another"
            " scale; scale both alike, or give the range of both, --data.image_range=0,255"
        ),
    ),
    "another text": (
        lambda folder: arrays(
            folder, y=np.array(list("abcd") * 10), y_test=np.array(list("abxd") * 5)
        ),
        (
            "--data.path='{tmp}/my.npz': test: label holds 'x' in row 2, which is no class of"
            " train;"
            " its 4 classes are 'a', 'b', 'c', 'd'"
        ),
    ),
    "a folder beside train": (
        lambda folder: images(folder, "bird"),
        (
            "--data.path='{tmp}': bird beside test, train would be left out; move class folders"
            " into"
            " train, and all else out of the folder"
        ),
    ),
    "a damaged test image": (
        lambda folder: damaged(folder, mended=False),
        "{tmp}/test/3/7.png: is empty (0 bytes); mend or remove it",
    ),
    "no file": (
        lambda folder: Own(path=f"{folder}/my.csv"),
        (
            "--data.path='{tmp}/my.csv': no such file or folder; give an .npz file, or a folder of"
            " images for each class"
        ),
    ),
}


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("name", ROWS)
def test_bad_data(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, line = ROWS[name]
    folder = tmp_path / "data"
    folder.mkdir()
    assert start(tmp_path / "run", data=source(folder)) == 2
    *notes, last = capsys.readouterr().err.splitlines()
    assert last == f"jaxtrain: error: {line}".replace("{tmp}", str(folder))
    assert all(note.startswith("jaxtrain: warning: ") for note in notes)
    assert not (tmp_path / "run" / "run.json").exists()


FOLLOWED: dict[str, tuple[Callable[[Path], Any], ...]] = {
    "nan": (lambda folder: arrays(folder, x=PIXELS / 255, x_test=nan(), weight_test=WEIGHT),),
    "nan in a memory map": (lambda folder: mapped(folder, weight_test=WEIGHT),),
    "nan in records": (
        lambda folder: records(folder, train={"weight": np.ones(40)}, test={"weight": WEIGHT}),
    ),
    "floats beside bytes": (arrays,),
    "another range": (
        lambda folder: arrays(folder, x=PIXELS / 255, x_test=PIXELS[:20] / 255),
        lambda folder: dataclasses.replace(
            arrays(folder, x=PIXELS / 255, x_test=PIXELS[:20] * 1.0), image_range=(0, 255)
        ),
    ),
    "another text": (
        lambda folder: arrays(
            folder, y=np.array(list("abcd") * 10), y_test=np.array(list("abcd") * 5)
        ),
    ),
    "a folder beside train": (images,),
    "a damaged test image": (lambda folder: damaged(folder, mended=True), images),
    "no file": (
        lambda folder: Own(path=arrays(folder).path),
        lambda folder: Own(path=f"{images(folder).path}/train"),
    ),
}
"""What the lines of `ROWS` say to do."""


@pytest.mark.parametrize("name", ROWS)
def test_the_remedies_are_accepted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is wrong before the state would be made."""

    def reached(*_: Any, **__: Any) -> None:
        raise UserError("reached")

    monkeypatch.setattr(lowering.Programs, "initialize", reached)
    assert FOLLOWED.keys() == ROWS.keys()
    for number, source in enumerate(FOLLOWED[name]):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert start(tmp_path / "run", data=source(folder)) == 2
        assert capsys.readouterr().err.splitlines()[-1] == "jaxtrain: error: reached"


def test_splits_that_do_not_fit_to_one_layout_are_not_written(tmp_path: Path) -> None:
    """The weights of a test split were left out, and floats were written as if they were bytes."""
    with pytest.raises(UserError) as raised:
        records(tmp_path, test={"weight": WEIGHT})
    assert str(raised.value) == (
        "write_records: test has a field 'weight', train has none; give every split the same"
        " fields, here 1 in every row"
    )
    with pytest.raises(UserError) as raised:
        records(tmp_path, train={"image": PIXELS})
    assert str(raised.value) == (
        "write_records: image is uint8 (4, 4, 1) in train and float32 (4, 4, 1) in test; give it"
        " one dtype and shape"
    )
    with pytest.raises(UserError, match="^write_records: no split given; give one at least, "):
        write_records(tmp_path / "records", {})
    assert not (tmp_path / "records").exists()
