"""Folders of images as people have them: pixels of any depth against the arrays that were written,
and one line, before the training, for what would be left out or cannot be decoded. At ab710df
pixels of 16 bits were clipped to 255, floats to 0, and half of a folder was left out in silence."""

import json
import pathlib
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxtrain.data.sources import image_files
from jaxtrain.data.sources.images import Images
from jaxtrain.errors import UserError

RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(0, 256, (6, 5), dtype=np.uint8)
DEEP = RANDOM.integers(0, 65536, (6, 5), dtype=np.uint16)
COLOURS = RANDOM.integers(0, 256, (6, 5, 3), dtype=np.uint8)


def save(root: pathlib.Path, place: str, image: Any) -> pathlib.Path:
    file = root / place
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(file)
    return file


def fill(root: pathlib.Path, *splits: str) -> None:
    """Two classes of three images in each split, all of them different."""
    for split in splits or (".",):
        for name in ("cat", "dog"):
            for row in range(3):
                pixels = RANDOM.integers(0, 256, (6, 5, 3), dtype=np.uint8)
                save(root, f"{split}/{name}/{row}.png", pixels)


def source(root: pathlib.Path, **settings: Any) -> Images:
    return Images(path=str(root), **({"size": (6, 5), "test": ""} | settings))


# What a file holds, its name, how it is read, and what the gray table must hold.
MODES: list[tuple[str, Any, dict[str, Any], np.ndarray]] = [
    ("png16.png", Image.fromarray(DEEP), {}, DEEP / 65535),
    ("tiff16.tif", Image.fromarray(DEEP), {}, DEEP / 65535),
    ("tiff16.tif", Image.fromarray(DEEP.astype(">u2")), {}, DEEP / 65535),
    ("twelve.tif", Image.fromarray(DEEP >> 4), {"image_range": (0, 4095)}, (DEEP >> 4) / 4095),
    ("unit.tif", Image.fromarray(DEEP / np.float32(65535)), {"image_range": (0, 1)}, DEEP / 65535),
    (
        "int32.tif",
        Image.fromarray(DEEP * np.int32(-2)),
        {"image_range": (-131070, 0)},
        1 - DEEP / 65535,
    ),
    ("eight.png", Image.fromarray(BYTES), {}, BYTES),
    ("eight.png", Image.fromarray(BYTES), {"image_range": (0, 9)}, BYTES),
    ("alpha.png", Image.fromarray(np.stack([BYTES, BYTES // 2], -1), "LA"), {}, BYTES),
    ("one.png", Image.fromarray(BYTES > 99), {}, (BYTES > 99) * 255),
    ("palette.png", Image.fromarray(BYTES).convert("P"), {}, BYTES),
    ("cmyk.tif", Image.fromarray(BYTES).convert("RGB").convert("CMYK"), {}, BYTES),
    ("wrong.jpg", Image.fromarray(BYTES), {}, BYTES),  # a PNG by another name
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Pillow's, of modes that are given
@pytest.mark.parametrize(("name", "image", "settings", "expected"), MODES)
@pytest.mark.parametrize("color", ["gray", "rgb"])
def test_pixels_of_any_depth_are_scaled_by_their_own_range(
    name: str, image: Any, settings: Any, expected: np.ndarray, color: Any, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "cat" / name
    file.parent.mkdir()
    image.save(file, format="PNG" if name == "wrong.jpg" else None)
    opened = source(tmp_path, color=color, **settings).open()
    found = opened.train.read(np.array([0]))["image"][0]
    assert found.dtype == opened.train.fields["image"].dtype
    assert found.dtype == (np.float32 if expected.dtype.kind == "f" else np.uint8)
    for channel in range(found.shape[-1]):
        assert np.array_equal(found[..., channel], expected.astype(found.dtype))


def test_deep_images_are_resized_as_floats_and_stand_beside_bytes(tmp_path: pathlib.Path) -> None:
    wide = np.repeat(np.repeat(DEEP, 4, axis=0), 4, axis=1)
    save(tmp_path, "cat/deep.png", wide)
    save(tmp_path, "cat/eight.png", COLOURS)
    opened = source(tmp_path).open()
    deep, eight = opened.train.read(np.arange(2))["image"]
    assert np.array_equal(eight, COLOURS / np.float32(255))
    # Pillow's triangle over blocks of four: within the neighbours' differences
    assert abs(deep[..., 0] - DEEP / 65535).max() < 0.5 and deep.max() <= 1
    assert opened.notes == (
        "1 images have more than 8 bits and 1 have 8; each is scaled to 0..1 by its own range",
    )
    table = image_files.read_image(tmp_path / "cat" / "deep.png", (6, 5), "gray")
    assert table.dtype == np.uint8 and np.array_equal(table[..., 0], np.round(deep[..., 0] * 255))


def test_what_has_no_known_range_is_refused_and_the_remedy_works(tmp_path: pathlib.Path) -> None:
    file = save(tmp_path, "cat/a.tif", DEEP / np.float32(256))
    low, high = (DEEP / np.float32(256)).min(), (DEEP / np.float32(256)).max()
    with pytest.raises(UserError) as raised:
        source(tmp_path).open()
    assert str(raised.value) == (
        f"{file}: 32-bit floats ({low:g}..{high:g} here) have no known range; give that of all"
        f" images, e.g. --data.image_range=0,{high}"
    )
    opened = source(tmp_path, image_range=(0, 256), color="gray").open()
    assert np.allclose(opened.train.read(np.array([0]))["image"][0, ..., 0], DEEP / 65536)
    with pytest.raises(
        UserError, match=r"a.tif: holds .*, which is not in --data.image_range=0,1;"
    ):
        source(tmp_path, image_range=(0, 1)).open()


# What a folder holds, what is said of it, and commands that do what is said.
REFUSALS: list[tuple[str, str, tuple[str, ...]]] = [
    (
        "train, bird",
        (
            "bird beside train would be left out; move class folders into train, and all else out"
            " of the folder"
        ),
        ("mv bird train", "rm -r bird"),
    ),
    (
        "train, val, valid",
        "val and valid are folders of one split; put all into one",
        ("cd valid; for file in */*; do mv $file ../val/${file%.png}-2.png; done; rm -r ../valid",),
    ),
    (
        "Train, Test",
        "Test, Train would be taken for classes; rename Test to test, Train to train",
        ("mv Train train; mv Test test",),
    ),
    (
        "training, testing",
        "testing, training would be taken for classes; rename testing to test, training to train",
        ("mv training train; mv testing test",),
    ),
    (
        "a.png, cat",
        (
            "1 image is in no class folder, e.g. {root}/a.png; move each into the folder of its"
            " class, e.g. {root}/cat/a.png"
        ),
        ("mv a.png cat",),
    ),
    (
        "train, train/a.png",
        (
            "1 image is in no class folder, e.g. {root}/train/a.png; move each into the folder of"
            " its class, e.g. {root}/train/cat/a.png"
        ),
        ("mv train/a.png train/cat",),
    ),
    (
        "train, train/cat/more",
        (
            "{root}/train/cat/more is a folder in the folder of a class; move its images up, or"
            " remove it"
        ),
        ("mv train/cat/more/1.png train/cat/9.png; rmdir train/cat/more", "rm -r train/cat/more"),
    ),
    (
        "train, train/bird -> nowhere",
        "{root}/train/bird is a link that leads nowhere; mend or remove it",
        (
            "rm train/bird",
            "mkdir ../birds; cp train/cat/1.png ../birds; ln -sfn ../../birds train/bird",
        ),
    ),
    (
        "train, train/bird -> bird",
        "{root}/train/bird is a link that leads nowhere; mend or remove it",
        ("rm train/bird",),
    ),
    (
        "train, train/cat/9.png -> 9.png",
        "{root}/train/cat/9.png is a link that leads nowhere; mend or remove it",
        ("rm train/cat/9.png", "cp train/cat/1.png train/9; mv train/9 train/cat/9.png"),
    ),
]


@pytest.mark.parametrize(
    ("places", "line", "followed"), REFUSALS, ids=[places for places, *_ in REFUSALS]
)
def test_what_would_be_left_out_is_refused_and_the_remedies_work(
    places: str, line: str, followed: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    assert followed
    for number, commands in enumerate(followed):
        root = tmp_path / str(number)
        lay_out(root, places)
        with pytest.raises(UserError) as raised:
            source(root).open()
        assert str(raised.value) == f"--data.path='{root}': {line.format(root=root)}"
        subprocess.run(commands, shell=True, check=True, cwd=root)
        opened = source(root).open()
        train = root / "train" if (root / "train").exists() else root
        assert len(opened.train) == len([*train.glob("*/*.png")])


def lay_out(root: pathlib.Path, places: str) -> None:
    for place in places.split(", "):
        name, _, target = place.partition(" -> ")
        if target:
            (root / name).symlink_to(root / name if target in name else target)
        elif name.endswith(".png"):
            save(root, name, COLOURS)
        elif name in ("cat", "bird") or "/" in name:
            save(root, f"{name}/1.png", COLOURS)
        else:
            fill(root, name)


def test_other_files_and_unused_splits_are_no_obstacle(tmp_path: pathlib.Path) -> None:
    fill(tmp_path, "train")
    save(tmp_path, "test/1.jpg", COLOURS)  # as Kaggle has them
    (tmp_path / "README.md").write_text("hello")
    assert len(source(tmp_path).open().train) == 6
    with pytest.raises(UserError, match=r"1 image is in no class folder, e.g. .*test/1.jpg; move"):
        source(tmp_path, test="test").open()
    (tmp_path / "test" / "cat").mkdir()
    (tmp_path / "test" / "1.jpg").rename(tmp_path / "test" / "cat" / "1.jpg")
    assert len(source(tmp_path, test="test").open().test) == 1


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_image_of_any_split_is_found_before_the_training(
    split: str, damage: str, tmp_path: pathlib.Path
) -> None:
    fill(tmp_path, "train", "val", "test")
    file = tmp_path / split / "dog" / "1.png"
    content = {"cut": file.read_bytes()[:70], "empty": b"", "text": b"hello"}[damage]
    file.write_bytes(content)
    used = source(tmp_path, validation="validation", test="test")
    reason = (
        r"is empty \(0 bytes\)" if damage == "empty" else r"not an image that Pillow reads \(.*\)"
    )
    with pytest.raises(UserError, match=rf"^{file}: {reason}; mend or remove it$"):
        used.open()
    file.unlink()  # the remedy
    assert len(used.open().train) >= 5


def test_classes_without_images_and_images_in_two_splits_are_said(tmp_path: pathlib.Path) -> None:
    fill(tmp_path, "train", "test")
    (tmp_path / "train" / "bird").mkdir()
    save(tmp_path, "test/bird/1.png", COLOURS)
    shutil.rmtree(tmp_path / "test" / "dog")
    shutil.copy(tmp_path / "train" / "cat" / "2.png", tmp_path / "test" / "cat" / "9.png")
    opened = source(tmp_path, test="test").open()
    assert opened.notes == (
        (
            f"1 images of test are also in train, e.g. {tmp_path}/test/cat/9.png is"
            f" {tmp_path}/train/cat/2.png"
        ),
        "train has no images of class bird (of 3 classes)",
        "test has no images of class dog (of 3 classes)",
    )


def test_that_many_images_were_looked_at_is_remembered_until_they_change(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(image_files, "MANY", 6)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = tmp_path / "set"
    fill(root)
    save(root, "dog/8.png", DEEP)
    looks = image_files._look
    looked: list[int] = []
    monkeypatch.setattr(image_files, "_look", lambda *of: looked.append(1) or looks(*of))
    first = source(root).open()
    assert "jaxtrain: looking at 7 images before the training, once\n" == capsys.readouterr().err
    again = source(root).open()
    assert (len(looked), capsys.readouterr().err) == (7, "")
    assert again.notes == first.notes
    assert again.train.fields == first.train.fields
    (kept,) = (tmp_path / "home/.cache/jaxtrain/images").iterdir()
    kept.write_text(json.dumps({"key": "another"}))
    source(root).open()
    assert len(looked) == 14
    (root / "dog" / "8.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"is empty"):
        source(root).open()


def test_of_very_many_train_images_a_part_is_decoded_and_the_others_when_they_are_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "MOST_DECODED", 3)
    fill(tmp_path, "train", "test")
    file = tmp_path / "train" / "cat" / "1.png"
    file.write_bytes(b"")
    opened = source(tmp_path, test="test").open()
    with pytest.raises(UserError, match=rf"^{file}: is empty"):
        opened.train.read(np.arange(6))
    (tmp_path / "test" / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"test/cat/1.png: is empty"):
        source(tmp_path, test="test").open()


def test_upper_bits_and_several_pictures_are_said(tmp_path: pathlib.Path) -> None:
    save(tmp_path, "cat/1.png", COLOURS)
    frames = [Image.fromarray(BYTES), Image.fromarray(BYTES // 2)]
    frames[0].save(tmp_path / "cat" / "2.tif", save_all=True, append_images=frames[1:])
    glass = np.concatenate([COLOURS, BYTES[..., None] // 2], axis=-1)
    save(tmp_path, "cat/3.png", glass)
    opened = source(tmp_path).open()
    assert opened.notes == (
        (
            f"1 images are transparent in places, which is not seen; the colours below are, e.g."
            f" {tmp_path}/cat/3.png"
        ),
        f"1 images hold several pictures; the first is taken, e.g. {tmp_path}/cat/2.tif",
    )
    assert np.array_equal(opened.train.read(np.array([2]))["image"][0], COLOURS)
