"""Each source against data written by other means, each message against its exact line."""

import dataclasses
import gzip
import importlib.machinery
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxtrain import data, fields
from jaxtrain.data import splits as splits_lib
from jaxtrain.data.sources.arrays import Arrays
from jaxtrain.data.sources.digits import Digits, stratified_rows
from jaxtrain.data.sources.images import Images
from jaxtrain.data.sources.records import Records, write_records
from jaxtrain.data.sources.synthetic import Synthetic
from jaxtrain.data.sources.tfds_sets import Tfds
from jaxtrain.data.splits import Splits
from jaxtrain.data.table import ArrayTable

ROOT = pathlib.Path(__file__).parents[1]
RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (50, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(50) % 4
# TFDS and what it imports warn about their own innards.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def message(source: Any) -> str:
    with pytest.raises(ValueError) as raised:
        source.open()
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- splits
# --------------------------------------------------------------------------------------------------

EXPRESSIONS = [
    "train",
    "train[:90%]",
    "train[55:]",
    "train[10%:20%]",
    "train[-7:]",
    "train[:-7]",
    "train[33%:66%]",
    "train[1%:99%]",
    "test+train[:3]",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_mean_what_they_mean_in_tfds(expression: str) -> None:
    import tensorflow_datasets as tfds

    for length in (60, 100, 1437, 60001):
        lengths = {"train": length, "test": 10}
        infos = {
            name: tfds.core.SplitInfo(
                name=name, shard_lengths=[size], num_bytes=0, filename_template=None
            )
            for name, size in lengths.items()
        }
        absolute = tfds.core.ReadInstruction.from_spec(expression).to_absolute(infos)
        theirs = [
            (one.splitname, one.from_ or 0, lengths[one.splitname] if one.to is None else one.to)
            for one in absolute
        ]
        assert list(splits_lib.parse(expression, lengths)) == theirs


def test_parts_are_the_slices_of_the_arrays() -> None:
    source = Arrays.of(
        {"x": PIXELS, "y": LABELS},
        train="train[10:40]+train[:20%]",
        validation="train[-5:]",
        test="",
    )
    opened = source.open()
    assert np.array_equal(
        opened.train.arrays["image"], np.concatenate([PIXELS[10:40], PIXELS[:10]])
    )
    assert np.array_equal(opened.validation.read(np.arange(5))["label"], LABELS[45:])
    assert opened.test is None
    assert opened.notes == ()


SPLIT_ERRORS = [
    ("train[:0]", "--data.train='train[:0]': 0 of 1437 examples; take a larger part"),
    ("train[9:3]", "--data.train='train[9:3]': 0 of 1437 examples; take a larger part"),
    (
        "",
        (
            "--data.train='': not a split; expected e.g. train, train[:90%], train[55000:] or"
            " train+test"
        ),
    ),
    (
        "train[",
        (
            "--data.train='train[': not a split; expected e.g. train, train[:90%], train[55000:] or"
            " train+test"
        ),
    ),
    (
        "train[:1.5]",
        (
            "--data.train='train[:1.5]': not a split; expected e.g. train, train[:90%],"
            " train[55000:] or train+test"
        ),
    ),
    (
        "train+",
        (
            "--data.train='train+': not a split; expected e.g. train, train[:90%], train[55000:] or"
            " train+test"
        ),
    ),
    (
        "trian",
        "--data.train='trian': unknown split 'trian'; valid: train, test; did you mean 'train'?",
    ),
    ("train[:2000]", "--data.train='train[:2000]': past the end; train has 1437 examples"),
    ("train[:101%]", "--data.train='train[:101%]': past the end; train has 1437 examples"),
    (
        "train+train[5:]",
        (
            "--data.train='train+train[5:]': names examples of train twice, so an epoch would hold"
            " them twice"
        ),
    ),
]


@pytest.mark.parametrize(("expression", "line"), SPLIT_ERRORS)
def test_bad_splits_are_named(expression: str, line: str) -> None:
    assert message(Digits(train=expression)) == line


def test_overlaps_are_noted_and_a_missing_test_split_says_what_to_do() -> None:
    assert Digits(train="train[:90%]", validation="train[80%:]").open().notes == (
        "train[:90%] and train[80%:] share 10 % of examples",
    )
    assert Digits(validation="test").open().notes == ("test and test share 100 % of examples",)
    remedy = (
        "--data.test='test': unknown split 'test'; valid: train only; cut a part off, e.g."
        " train[:90%] and train[90%:]"
    )
    assert message(Arrays.of({"x": PIXELS})) == remedy


# --- digits, synthetic, all
# --------------------------------------------------------------------------------------------------


def test_digits_are_stratified_and_whole_and_as_good_as_published() -> None:
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    whole = load_digits()
    for seed in (0, 1):
        opened = Digits(split_seed=seed).open()
        train, test = opened.train.arrays, opened.test.arrays
        assert (len(opened.train), len(opened.test)) == (1437, 360)
        shares = np.bincount(test["label"]) / np.bincount(whole.target)
        assert np.all(abs(shares - 0.2) < 0.004)
        everything = np.concatenate([train["image"], test["image"]]).reshape(1797, 64)
        assert np.array_equal(
            np.sort(everything @ np.arange(1, 65)),
            np.sort(whole.data.astype(np.int64) @ np.arange(1, 65)),
        )
    assert (
        Digits().open().fingerprint
        == Digits(train="train[:90%]").open().fingerprint
        != opened.fingerprint
    )
    train, test = Digits().open().train.arrays, Digits().open().test.arrays
    machine = SVC(gamma=0.001).fit(train["image"].reshape(-1, 64).astype(float), train["label"])
    # marks.md: 98.89 on the 80/20 split of seed 0.
    assert (
        round(100 * machine.score(test["image"].reshape(-1, 64).astype(float), test["label"]), 2)
        == 98.89
    )


def test_digits_are_cut_as_scikit_learn_cuts_them() -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    for seed in range(5):
        opened = Digits(split_seed=seed).open()
        expected = train_test_split(
            images, labels, test_size=0.2, stratify=labels, random_state=seed
        )
        tables = opened.train.arrays, opened.test.arrays
        found = [table[name] for name in ("image", "label") for table in tables]
        for ours, theirs in zip(found, expected, strict=True):
            assert np.array_equal(ours.reshape(theirs.shape), theirs)
    random = np.random.default_rng(0)
    for seed in range(40):  # odd sizes, where remainders are equal and lots decide
        labels = np.concatenate([np.arange(4), np.arange(4), random.integers(0, 4, 40 + seed)])
        expected = train_test_split(
            np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed
        )
        assert all(map(np.array_equal, stratified_rows(labels, seed), expected))


@pytest.mark.parametrize(
    "settings", [{}, {"shape": (40,), "dtype": "float32"}, {"shape": (4, 4, 1), "seed": 7}]
)
def test_synthetic_classes_can_be_learnt_and_come_out_the_same(settings: dict[str, Any]) -> None:
    one, two = (
        Synthetic(examples=300, test_examples=100, num_classes=3, **settings).open()
        for _ in range(2)
    )
    assert one.fingerprint == two.fingerprint != Synthetic(examples=300, seed=8).open().fingerprint
    images, labels = (one.train.arrays[name] for name in ("image", "label"))
    centres = np.stack(
        [images[labels == label].astype(float).mean(0) for label in range(3)]
    ).reshape(3, -1)
    tests = one.test.arrays["image"].astype(float).reshape(100, -1)
    nearest = ((tests[:, None] - centres[None]) ** 2).sum(-1).argmin(-1)
    assert (nearest == one.test.arrays["label"]).mean() > 0.95


def test_every_source_is_a_frozen_component_with_words_for_its_flags() -> None:
    assert list(data.NAMES) == [
        "digits",
        "arrays",
        "tfds",
        "records",
        "images",
        "synthetic",
        "tokens",
        "text",
        "mixture",
        "own",
        "conversations",
        "labelled_text",
    ]
    for source in data.NAMES.values():
        names = [field.name for field in fields.fields_of(source)]
        assert {"train", "validation", "test"} <= set(names)
        fields.check(source)
        with pytest.raises(dataclasses.FrozenInstanceError):
            source.train = "test"
        assert isinstance(hash(source), int)


def test_heavy_packages_stay_out_until_a_source_is_opened() -> None:
    heavy = "{'tensorflow_datasets', 'tensorflow', 'grain', 'sklearn', 'PIL', 'array_record'}"
    code = (
        f"import sys; from jaxtrain import data; data.NAMES; data.BatchLoader; assert not {heavy} &"
        " set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- arrays
# --------------------------------------------------------------------------------------------------


def test_one_set_read_from_npz_folder_and_dict_is_the_same(tmp_path: pathlib.Path) -> None:
    arrays = {
        "x_train": PIXELS[:40],
        "y_train": LABELS[:40],
        "x_test": PIXELS[40:],
        "y_test": LABELS[40:],
    }
    np.savez(tmp_path / "set.npz", **arrays)
    (tmp_path / "folder").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "folder" / name, array)
    sources = [
        Arrays(path=str(tmp_path / "set.npz")),
        Arrays(path=str(tmp_path / "folder")),
        Arrays.of(arrays),
    ]
    for opened in (source.open() for source in sources):
        assert np.array_equal(opened.train.read(np.array([3, 1]))["image"], PIXELS[[3, 1]])
        assert np.array_equal(opened.test.read(np.arange(10))["label"], LABELS[40:])
        assert opened.test.read(np.arange(10))["label"].dtype == np.int32
        assert opened.train.num_classes == opened.test.num_classes == 4
    assert len({source.open().fingerprint for source in (sources[0], sources[2])}) == 1
    changed = Arrays.of(
        arrays
        | {"x_test": PIXELS[40:] ^ (np.arange(10) == 3).astype(np.uint8)[:, None, None, None]}
    )
    assert changed.open().fingerprint != sources[0].open().fingerprint


def test_memory_maps_are_read_lazily_also_in_parts(tmp_path: pathlib.Path) -> None:
    # A sparse file of 64 GiB, which takes no room on the disk: whoever reads it whole will not live
    # to tell.
    huge = np.lib.format.open_memmap(tmp_path / "image.npy", "w+", np.uint8, (2**22, 128, 128))
    huge[2**22 - 1] = 7
    huge.flush()
    opened = Arrays(path=str(tmp_path), train="train[:-1]", validation="train[-1:]", test="").open()
    assert opened.train.fields["image"].shape == (128, 128, 1)
    assert opened.validation.read(np.array([0]))["image"].min() == 7
    assert opened.train.read(np.array([2**22 - 2, 5]))["image"].max() == 0
    joined = Arrays(path=str(tmp_path), train="train[-1:]+train[:5]", test="").open().train
    assert joined.arrays is None
    assert joined.read(np.array([0, 1]))["image"].max(axis=(1, 2, 3)).tolist() == [7, 0]


def test_names_shapes_and_dtypes_of_other_peoples_files() -> None:
    cifar = Arrays.of(
        {
            "train_images": PIXELS,
            "train_labels": LABELS[:, None],
            "val_images": PIXELS[:3],
            "val_labels": LABELS[:3, None],
        },
        validation="validation",
        test="",
    )
    assert cifar.open().validation.arrays["label"].tolist() == [0, 1, 2]
    gray = Arrays.of(
        {
            "data": PIXELS[..., 0],
            "target": LABELS,
            "class_names": np.array(list("abcd")),
            "t": np.zeros(3),
        },
        test="",
    ).open()
    assert gray.train.fields["image"].shape == (6, 5, 1)
    assert gray.train.class_names == ("a", "b", "c", "d")
    assert gray.notes == ("t: shape (3,) is not one row an example; left out",)
    wide = Arrays.of(
        {"signal": np.zeros((5, 40)), "kind": np.arange(5)},
        image_key="signal",
        label_key="kind",
        test="",
    ).open()
    assert wide.train.read(np.arange(2))["image"].dtype == np.float32


ARRAY_ERRORS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"a": PIXELS, "b": LABELS},
        {},
        "arrays: split train has no inputs among a, b; name one by --data.image_key",
    ),
    (
        {"x": PIXELS, "y": LABELS},
        {"image_key": "xx"},
        "--data.image_key='xx': no such array in split train; valid: x, y; did you mean 'x'?",
    ),
    (
        {"x": PIXELS, "y": LABELS[:9]},
        {},
        "arrays: train: label has shape (9,), image (50, 6, 5, 3); both need one row an example",
    ),
    (
        {"x": PIXELS, "y": LABELS - 2**32},
        {"test": ""},
        (
            "arrays: train: label has values -4294967296..-4294967293; classes are 0..2147483647;"
            " map them by numpy.unique(y, return_inverse=True)"
        ),
    ),
    (
        {"x": np.array(["a"])},
        {},
        "arrays: train: image has dtype <U1; expected integers, floats or booleans",
    ),
    (
        {"x": PIXELS, "y": LABELS, "class_names": np.array(["a"])},
        {},
        "arrays: label 3 has no name; class_names has 1",
    ),
    ({"x\n": PIXELS}, {}, "arrays: 'x\\n' cannot name an array; rename it"),
]


@pytest.mark.parametrize(("arrays", "settings", "line"), ARRAY_ERRORS)
def test_arrays_that_make_no_set_are_named(
    arrays: dict[str, Any], settings: dict[str, Any], line: str
) -> None:
    assert message(Arrays.of(arrays, **settings)) == line


def test_files_that_hold_no_arrays_are_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    np.save(tmp_path / "whole.npy", PIXELS)
    (tmp_path / "short.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:999])
    at = f"--data.path='{tmp_path}"
    assert (
        message(Arrays())
        == "--data.path='': no file given; give an .npz or .npy file or a folder of .npy files"
    )
    assert (
        message(Arrays(path=f"{tmp_path}/objets.npz"))
        == f"{at}/objets.npz': no such file or folder; in {tmp_path}: objects.npz; did you mean it?"
    )
    assert (
        message(Arrays(path=f"{tmp_path}/objects.npz"))
        == f"{at}/objects.npz': objects.npz, array x: holds Python objects, which are not loaded;"
        " save plain arrays"
    )
    assert (
        message(Arrays(path=f"{tmp_path}/text.npz"))
        == f"{at}/text.npz': text.npz: not a readable NumPy file (neither .npy nor .npz)"
    )
    assert "short.npy: not a readable NumPy file" in message(Arrays(path=f"{tmp_path}/short.npy"))


# --- images
# --------------------------------------------------------------------------------------------------


def write_images(root: pathlib.Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for label, name in enumerate(("cat", "ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for row in range(4):
                pixels = (
                    PIXELS[4 * label + row]
                    if split == "train"
                    else np.full((12, 20, 3), 40 * label, np.uint8)
                )
                Image.fromarray(pixels).save(root / split / name / f"{row}.png")
    (root / "train" / "cat" / ".DS_Store").write_text("")


def test_image_folders_give_sorted_classes_and_exact_pixels(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path)
    opened = Images(path=str(tmp_path), size=(6, 5), validation="validation", test="").open()
    assert opened.train.class_names == ("ant", "bee", "cat")
    rows = opened.train.read(np.array([11, 0, 4]))
    assert np.array_equal(rows["image"], PIXELS[[3, 4, 8]])
    assert rows["label"].tolist() == [2, 0, 1]
    assert opened.validation.read(np.array([0, 4, 8]))["image"].max(axis=(1, 2, 3)).tolist() == [
        40,
        80,
        0,
    ]
    gray = Images(path=str(tmp_path / "train"), size=(3, 3), color="gray", test="").open()
    assert gray.train.read(np.arange(2))["image"].shape == (2, 3, 3, 1)


def test_images_are_cut_at_the_centre_and_turned_upright(tmp_path: pathlib.Path) -> None:
    from PIL import Image

    from jaxtrain.data.sources.image_files import read_image

    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert np.array_equal(read_image(tmp_path / "wide.png", (10, 10)), np.full((10, 10, 3), 200))
    turned = Image.fromarray(PIXELS[0])
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png", (5, 6)), np.rot90(PIXELS[0], -1))


def test_files_that_are_no_images_are_named(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path)
    source = Images(path=str(tmp_path), size=(6, 5), test="")
    bad = tmp_path / "train" / "cat" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(
        ValueError,
        match=rf"^{re.escape(str(bad))}: not an image that Pillow reads \(.*\); mend or remove it$",
    ):
        source.open().train.read(np.arange(12))
    (bad.parent / "notes.txt").write_text("hello")
    assert message(source).startswith(
        f"--data.path='{tmp_path}': {bad.parent}/notes.txt is not an image file ("
    )
    assert (
        message(Images(path=str(tmp_path / "no")))
        == f"--data.path='{tmp_path}/no': no such folder; give one that holds a folder of images"
        " for each class"
    )


# --- records
# --------------------------------------------------------------------------------------------------


def write_set(folder: pathlib.Path) -> dict[str, ArrayTable]:
    signals = RANDOM.standard_normal((50, 3)).astype(np.float32)
    rows = {"train": slice(0, 40), "test": slice(40, 50)}
    tables = {
        split: ArrayTable(
            {"image": PIXELS[part], "label": LABELS[part], "signal": signals[part]},
            4,
            ("a", "b", "c", "d"),
        )
        for split, part in rows.items()
    }
    write_records(folder, tables, examples_per_file=15)
    return tables


def test_records_come_back_as_they_were_written(tmp_path: pathlib.Path) -> None:
    tables = write_set(tmp_path)
    opened = Records(path=str(tmp_path)).open()
    wanted = RANDOM.integers(0, 40, 100)
    for name, values in tables["train"].read(wanted).items():
        found = opened.train.read(wanted)[name]
        assert found.dtype == values.dtype
        assert np.array_equal(found, values)
    assert (
        len(opened.train),
        len(opened.test),
        opened.train.num_classes,
        opened.train.class_names,
    ) == (40, 10, 4, ("a", "b", "c", "d"))
    assert opened.train.fields == tables["train"].fields


def test_damaged_records_are_named_by_file_and_number(tmp_path: pathlib.Path) -> None:
    tables = write_set(tmp_path)
    file = tmp_path / "train-00001.array_record"
    whole = file.read_bytes()
    marker = PIXELS[22].tobytes()  # the eighth example of the second file
    at = whole.index(marker)
    file.write_bytes(whole[: at + 5] + bytes([whole[at + 5] ^ 1]) + whole[at + 6 :])
    table = Records(path=str(tmp_path)).open().train
    assert np.array_equal(table.read(np.arange(15, 22))["image"], PIXELS[15:22])
    with pytest.raises(
        ValueError,
        match=rf"^{re.escape(str(file))}: corrupt record 7 \(.*hash mismatch.*\); fetch or write",
    ):
        table.read(np.arange(40))
    file.write_bytes(whole[:100])
    assert message(Records(path=str(tmp_path))).startswith(f"{file}: ")
    file.unlink()
    assert (
        message(Records(path=str(tmp_path))) == f"{file}: named by dataset.json, but no file there"
    )
    write_records(tmp_path, tables, examples_per_file=15)
    index = json.loads((tmp_path / "dataset.json").read_text())
    index["splits"]["train"]["train-00001.array_record"] = 14
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    assert (
        message(Records(path=str(tmp_path)))
        == f"{file}: holds 15 records, dataset.json says 14; write it anew"
    )
    index["splits"]["train"] = {"../secret": 1}
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    assert "named by dataset.json, but no file there" in message(Records(path=str(tmp_path)))
    (tmp_path / "dataset.json").write_text("{}")
    assert "dataset.json is not a jaxtrain-records-1 index (KeyError: 'format')" in message(
        Records(path=str(tmp_path))
    )


# --- TFDS
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepare() -> Any:
    """scripts/prepare_fashion_mnist as a module."""
    loader = importlib.machinery.SourceFileLoader(
        "prepare_fashion_mnist", str(ROOT / "scripts/prepare_fashion_mnist")
    )
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    dont_write, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = dont_write
    return module


def idx(images: np.ndarray, labels: np.ndarray) -> tuple[bytes, bytes]:
    return bytes(16) + images.tobytes(), bytes(8) + labels.astype(np.uint8).tobytes()


IMAGES = RANDOM.integers(0, 256, (60, 28, 28, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def data_dir(prepare: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tfds")
    contents = dict(
        zip(prepare.FILES, (*idx(IMAGES[:50], LABELS), *idx(IMAGES[50:], LABELS[:10])), strict=True)
    )
    prepare.build(contents, folder)
    return str(folder)


@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_a_prepared_set_reads_without_tensorflow_in_the_order_of_its_files(
    data_dir: str, in_memory: Any
) -> None:
    opened: Splits = Tfds(
        name="fashion_mnist",
        data_dir=data_dir,
        train="train[:40]",
        validation="train[40:]",
        in_memory=in_memory,
    ).open()
    assert "tensorflow" not in sys.modules
    assert (opened.train.arrays is None) == (in_memory == "no")
    wanted = RANDOM.integers(0, 40, 100)
    assert np.array_equal(opened.train.read(wanted)["image"], IMAGES[wanted])
    assert np.array_equal(opened.train.read(wanted)["label"], LABELS[wanted])
    assert np.array_equal(opened.validation.read(np.arange(10))["image"], IMAGES[40:50])
    assert np.array_equal(opened.test.read(np.arange(10))["image"], IMAGES[50:])
    assert (opened.train.num_classes, opened.train.class_names[9]) == (10, "Ankle boot")
    resized = (
        Tfds(name="fashion_mnist", data_dir=data_dir, size=(14, 14), in_memory=in_memory)
        .open()
        .train
    )
    assert resized.read(np.arange(3))["image"].shape == (3, 14, 14, 1)


def test_sets_that_are_not_there_say_what_to_do(data_dir: str) -> None:
    at = f"--data.data_dir={data_dir}"
    lines: list[tuple[dict[str, Any], str]] = [
        ({"name": ""}, "--data.name='': no set named; e.g. --data.name=fashion_mnist"),
        (
            {"name": "cifra10"},
            (
                f"--data.name='cifra10': unknown; prepared in {data_dir}: fashion_mnist; did you"
                " mean 'cifar10'?"
            ),
        ),
        (
            {"name": "cifar10"},
            f"--data.name=cifar10: not in {at} and downloads are off; "
            + "run tfds build cifar10 --file_format=array_record, or pass --data.data_dir or"
            " --data.download",
        ),
        (
            {"name": "fashion_mnist", "image_key": "x"},
            "--data.image_key='x': fashion_mnist has no such feature; valid: image, label",
        ),
        (
            {"name": "fashion_mnist", "validation": "val"},
            "--data.validation='val': unknown split 'val'; valid: train, test",
        ),
    ]
    for settings, line in lines:
        assert message(Tfds(data_dir=data_dir, **settings)) == line
    nowhere = message(Tfds(name="fashion_mnist", data_dir="/nowhere"))
    assert (
        nowhere
        == "--data.name=fashion_mnist: not in --data.data_dir=/nowhere and downloads are off; run"
        " scripts/prepare_fashion_mnist, or pass --data.data_dir or --data.download"
    )


def test_a_damaged_record_of_a_set_is_named(data_dir: str) -> None:
    file = next(pathlib.Path(data_dir).glob("fashion_mnist/*/*train.array_record*"))
    whole = file.read_bytes()
    fingerprint = Tfds(name="fashion_mnist", data_dir=data_dir).open().fingerprint
    try:
        file.write_bytes(whole[:9000] + bytes([whole[9000] ^ 4]) + whole[9001:])
        line = message(Tfds(name="fashion_mnist", data_dir=data_dir))
        assert re.fullmatch(
            rf"{re.escape(str(file))}: corrupt record \d+ \(.*mismatch.*\); fetch or write the file"
            r" anew",
            line,
        )
        assert (
            Tfds(name="fashion_mnist", data_dir=data_dir, in_memory="no").open().fingerprint
            != fingerprint
        )
    finally:
        file.write_bytes(whole)


def test_debians_copies_are_known_by_the_sums_that_the_authors_publish(
    prepare: Any, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    import hashlib

    name = "t10k-labels-idx1-ubyte.gz"
    with gzip.GzipFile(tmp_path / name, "wb", mtime=1504176627) as file:
        file.write(b"labels")
    theirs = (tmp_path / name).read_bytes()
    assert theirs[10:33] == b"t10k-labels-idx1-ubyte\0"
    monkeypatch.setitem(prepare.FILES, name, (hashlib.md5(theirs).hexdigest(), 1504176627))
    assert prepare.verified(tmp_path / name) == b"labels"
    # as Debian's build leaves it
    (tmp_path / name).write_bytes(theirs[:3] + b"\0" + b"\1\2\3\4" + theirs[8:10] + theirs[33:])
    assert prepare.verified(tmp_path / name) == b"labels"
    (tmp_path / name).write_bytes(gzip.compress(b"Labels"))
    with pytest.raises(
        ValueError, match="is not the [0-9a-f]{32} that the authors publish; fetch it anew"
    ):
        prepare.verified(tmp_path / name)


def test_prepare_says_where_the_files_come_from(
    prepare: Any, tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_fashion_mnist", f"--source={tmp_path}"])
    assert prepare.main() == 1
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err

    def offline(*_: Any, **__: Any) -> Callable[..., None]:
        raise OSError("Name or service not known")

    monkeypatch.setattr(prepare.urllib.request, "urlopen", offline)
    monkeypatch.setattr(prepare, "FOLDERS", (str(tmp_path / "none"),))
    monkeypatch.setattr(sys, "argv", ["prepare_fashion_mnist", f"--data_dir={tmp_path}"])
    assert prepare.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (
        "no download (Name or service not known); apt-get install dataset-fashion-mnist (as root)"
        in error
    )


PREPARED = pathlib.Path("~/tensorflow_datasets/fashion_mnist").expanduser()


@pytest.mark.skipif(not PREPARED.exists(), reason="run scripts/prepare_fashion_mnist")
def test_the_real_fashion_mnist() -> None:
    opened = Tfds(name="fashion_mnist").open()
    assert np.bincount(opened.train.arrays["label"]).tolist() == [6000] * 10
    assert np.bincount(opened.test.arrays["label"]).tolist() == [1000] * 10
    # The published mean and deviation of the pixels.
    assert round(opened.train.arrays["image"].mean() / 255, 4) == 0.2860
    assert round(opened.train.arrays["image"].std() / 255, 4) == 0.3530
