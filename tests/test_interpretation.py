"""What arrays are taken for: the values and dtypes that reach the batch against NumPy, what is said
of them, and one line for each array that is none. All of it was cast, standardized or passed over
in silence at ab710df."""

import json
import pathlib
import re
import types
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxtrain.data import checks, pipeline, statistics
from jaxtrain.data.sources.arrays import Arrays
from jaxtrain.data.sources.records import Records
from jaxtrain.data.splits import choose
from jaxtrain.data.table import ArrayTable, ScaledTable
from jaxtrain.errors import UserError

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)
TOKENS = RANDOM.integers(0, 90, (40, 7))
LABELS = np.arange(40) % 4
ROWS = np.array([3, 39, 3])
ALL = {"test": ""}


def opened(arrays: dict[str, Any], **settings: Any) -> Any:
    return Arrays.of(arrays, **(ALL | settings)).open()


def batch(arrays: dict[str, Any], **settings: Any) -> dict[str, np.ndarray]:
    """What the model and the task see of ROWS, standardized where that is done."""
    train = opened(arrays, **settings).train
    prepare = statistics.preparation(train, lambda: statistics.measure(train))
    rows = train.read(ROWS)
    return {
        name: np.asarray(value)
        for name, value in (rows if prepare is None else prepare(rows)).items()
    }


# --- whole numbers and several inputs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"])
def test_whole_numbers_stay_whole(dtype: str) -> None:
    found = batch({"x": TOKENS.astype(dtype), "y": LABELS})
    assert found["image"].dtype == np.int32
    assert np.array_equal(found["image"], TOKENS[ROWS])


def test_several_inputs_reach_the_batch_under_their_own_names() -> None:
    arrays = {
        "tokens": TOKENS,
        "lengths": np.arange(40, dtype=np.uint32),
        "attention_mask": TOKENS > 9,
        "speed": RANDOM.standard_normal((40, 2)),
        "label": LABELS,
    }
    found = batch(arrays)
    assert {name: str(value.dtype) for name, value in found.items()} == {
        "tokens": "int32",
        "lengths": "int32",
        "attention_mask": "bool",
        "speed": "float32",
        "label": "int32",
    }
    for name, array in arrays.items():
        assert np.array_equal(found[name], array[ROWS].astype(found[name].dtype))


def test_features_are_still_standardized_beside_other_inputs() -> None:
    features = RANDOM.standard_normal((40, 9)) * 7 + 3
    found = batch({"x": features, "lengths": LABELS, "y": LABELS})
    expected = (features - features.mean()) / features.std()
    assert np.allclose(found["image"], expected[ROWS], atol=1e-6)
    assert np.array_equal(found["lengths"], LABELS[ROWS])


def test_a_row_without_weight_may_hold_anything_and_weighs_nothing() -> None:
    features = RANDOM.standard_normal((40, 9))
    features[5] = np.nan
    weight = np.ones(40)
    weight[5] = 0
    train = opened({"x": features, "y": LABELS, "weight": weight}).train
    found = statistics.measure(train)
    assert np.isclose(found.mean_C[0], np.delete(features, 5, axis=0).mean())
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = list(pipeline.evaluation_batches(train, 16, sharding))
    weights = np.concatenate([np.asarray(each["weight"]) for each in batches])
    assert weights.tolist() == [*weight.tolist(), *[0.0] * 8]  # the table's own, and padding


# --- labels and targets
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["y", "target", "targets", "label"])
@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 3)])
def test_float_labels_are_targets_as_they_are(name: str, shape: tuple[int, ...]) -> None:
    values = RANDOM.standard_normal(shape)
    splits = opened({"x": PIXELS, name: values})
    assert splits.train.num_classes is None and splits.notes == ()
    found = splits.train.read(ROWS)
    assert "label" not in found and found["target"].dtype == np.float32
    assert np.array_equal(found["target"], values[ROWS].astype(np.float32))


def test_whole_numbers_called_target_are_classes_and_targets() -> None:
    found = opened({"data": PIXELS, "target": LABELS[:, None]}).train.read(ROWS)
    assert found["label"].tolist() == LABELS[ROWS].tolist()
    assert found["target"].dtype == np.float32 and found["target"].shape == (3, 1)


def test_several_labels_an_example_keep_their_width() -> None:
    several = RANDOM.integers(0, 2, (40, 5))
    for array in (several, several.astype(bool), several.astype(np.uint8)):
        train = opened({"x": PIXELS, "y": array}).train
        assert train.num_classes is None and train.fields["label"].dtype == np.int32
        assert np.array_equal(train.read(ROWS)["label"], several[ROWS])


def test_booleans_are_two_classes_and_ignored_labels_stay_negative() -> None:
    train = opened({"x": PIXELS, "y": LABELS > 1}).train
    assert train.num_classes == 2
    assert train.read(ROWS)["label"].tolist() == (LABELS[ROWS] > 1).tolist()
    train = opened({"x": PIXELS, "y": LABELS - 1}).train
    assert (train.num_classes, train.read(np.arange(3))["label"].tolist()) == (3, [-1, 0, 1])


@pytest.mark.parametrize("kind", ["U", "S", object])
def test_texts_are_the_classes_of_their_sorted_names(kind: Any) -> None:
    words = np.array(["pear", "fig", "apple", "fig"] * 10).astype(kind)
    arrays = {"x": PIXELS, "y": words, "x_test": PIXELS[:4], "y_test": words[:4][::-1]}
    splits = Arrays.of(arrays).open()
    assert splits.train.class_names == splits.test.class_names == ("apple", "fig", "pear")
    assert splits.train.read(np.arange(4))["label"].tolist() == [2, 1, 0, 1]
    assert splits.test.read(np.arange(4))["label"].tolist() == [1, 0, 1, 2]


def test_what_is_not_used_is_not_looked_at() -> None:
    arrays = {
        "x": PIXELS,
        "y": np.array(["a", "b"] * 20),
        "x_test": np.full((3, 9), np.nan),
        "y_test": np.array(["?"] * 3),
    }
    assert opened(arrays).train.num_classes == 2


# --- pixels
# --------------------------------------------------------------------------------------------------

DEEP = RANDOM.integers(0, 65536, (40, 6, 5), dtype=np.uint16)
HOUNSFIELD = RANDOM.integers(-1000, 3000, (40, 6, 5), dtype=np.int16)


class Pixels(NamedTuple):
    """An array, settings, what the field is, and what is said; `scale` and `offset` make the
    array what the field must hold."""

    array: np.ndarray
    settings: dict[str, Any]
    dtype: str
    low: float
    high: float
    note: str
    followed: tuple[tuple[np.ndarray, dict[str, Any]], ...] = ()
    """What the note says to save or to set if it is wrong; then it is said no more."""


PIXEL_ROWS = [
    Pixels(DEEP, {}, "float32", 0, 65535, "x: uint16: divided by 65535, its whole range"),
    Pixels(
        DEEP >> 4,
        {},
        "float32",
        0,
        65535,
        f"x: uint16: divided by 65535, its whole range; its values are {(DEEP >> 4).min()}.."
        f"{(DEEP >> 4).max()}, --data.image_range=0,4095 if that is their range",
        ((DEEP >> 4, {"image_range": (0, 4095)}),),
    ),
    Pixels(DEEP >> 4, {"image_range": (0.0, 4095.0)}, "float32", 0, 4095, ""),
    Pixels(HOUNSFIELD, {"image_range": (-1000.0, 3000.0)}, "float32", -1000, 3000, ""),
    Pixels(
        PIXELS.astype(np.int64), {}, "uint8", 0, 1, "x: int64 (6, 5, 3) in 0..255: taken as pixels"
    ),
    Pixels(
        PIXELS[..., 0].astype(np.int32), {}, "uint8", 0, 1, "x: int32 (6, 5) in 0..255: taken as"
    ),
    Pixels(
        PIXELS.astype(np.float64),
        {},
        "float32",
        0,
        1,
        "x: float64 in 0..255: taken as they are; --data.image_range=0,255 scales them to 0..1",
        ((PIXELS.astype(np.float64), {"image_range": (0, 255)}),),
    ),
    Pixels(PIXELS.astype(np.float32), {"image_range": (0.0, 255.0)}, "float32", 0, 255, ""),
    Pixels(
        PIXELS / np.float32(127.5) - 1,
        {},
        "float32",
        0,
        1,
        "x: float32 in -1..1: taken as they are",
    ),
    Pixels(PIXELS / np.float32(255), {}, "float32", 0, 1, ""),
    Pixels(
        PIXELS * 3.0,
        {},
        "float32",
        0,
        1,
        "x: float64 in 0..765, which is no usual range: taken as they are",
    ),
    Pixels(
        np.moveaxis(np.tile(PIXELS, (1, 2, 2, 1)), -1, 1),
        {},
        "uint8",
        0,
        1,
        "x: (3, 12, 10): read as height 3, width 12, 10 channels; if channels come first, save"
        " x.transpose(0, 2, 3, 1)",
        ((np.tile(PIXELS, (1, 2, 2, 1)), {}),),
    ),
    Pixels(
        PIXELS.reshape(40, 90),
        {},
        "uint8",
        0,
        1,
        "x: uint8 (90,): taken as pixels of 0..255 and standardized; if these are tokens or ids,"
        " save them as int32",
        ((PIXELS.reshape(40, 90).astype(np.int32), {}),),
    ),
    Pixels(
        TOKENS,
        {},
        "int32",
        0,
        1,
        "x: int64 (7,) in 0..89: whole numbers stay whole (tokens, ids), not standardized; for"
        " features save float32, for pixels give --data.image_range=LOW,HIGH",
        ((TOKENS.astype(np.float32), {}), (TOKENS, {"image_range": (0, 89)})),
    ),
    Pixels(
        np.tile(PIXELS[:, :5, :, 0], (1, 2, 2)) / 255,
        {},
        "float32",
        0,
        1,
        "x: float64 (10, 10): read as a signal of length 10 with 10 channels; for gray images save"
        " x[..., None]",
        ((np.tile(PIXELS[:, :5, :, :1], (1, 2, 2, 1)) / 255, {}),),
    ),
    Pixels(TOKENS > 40, {}, "bool", 0, 1, ""),
]


@pytest.mark.parametrize("row", PIXEL_ROWS, ids=[row.note[:30] or "-" for row in PIXEL_ROWS])
@pytest.mark.parametrize("mapped", [False, True])
def test_pixels_are_scaled_by_a_known_range_and_what_was_understood_is_said(
    row: Pixels, mapped: bool, tmp_path: pathlib.Path
) -> None:
    if mapped:
        np.save(tmp_path / "x.npy", row.array)
        splits = Arrays(path=str(tmp_path), test="", **row.settings).open()
    else:
        splits = opened({"x": row.array}, **row.settings)
    found = splits.train.read(ROWS)["image"]
    expected = (row.array[ROWS].astype(np.float64) - row.low) / (row.high - row.low)
    if mapped and row.dtype == "uint8" and row.array.dtype != np.uint8:
        expected, row = expected / 255, row._replace(dtype="float32")
    assert found.dtype == splits.train.fields["image"].dtype == row.dtype
    assert np.array_equal(found.reshape(expected.shape), expected.astype(row.dtype))
    assert bool(splits.notes) == bool(row.note)
    assert not mapped or row.note[:9] in "".join(splits.notes)  # ranges are those of some rows
    assert mapped or any(note.startswith(row.note) for note in splits.notes or ("",))
    if row.array.ndim == 3 and row.array.dtype.kind in "iu":
        assert found.ndim == 4
    assert bool(row.followed) == ("--data" in row.note or "save" in row.note)
    for array, settings in row.followed:
        assert not any(row.note.startswith(note) for note in opened({"x": array}, **settings).notes)


def test_standardized_pixels_are_the_same_whatever_they_were_saved_as() -> None:
    expected = batch({"x": PIXELS})["image"]
    for array, atol in [
        (PIXELS.astype(np.int64), 0),
        (PIXELS.astype(np.float64), 2e-6),
        (PIXELS / 255, 2e-6),
        (PIXELS / np.float32(127.5) - 1, 2e-6),
        (PIXELS.astype(np.uint16) * 257, 2e-6),
    ]:
        assert np.allclose(batch({"x": array})["image"], expected, rtol=0, atol=atol)


# --- refusals
# --------------------------------------------------------------------------------------------------


def bad(value: Any, row: int = 3, dtype: str = "float32") -> np.ndarray:
    array = np.ones((40, 6, 5, 3), dtype)
    array[row, 2, 2, 1] = value
    return array


BOTH = {"x": PIXELS, "y": LABELS, "y_test": LABELS[:20]}
HALF = {"y": LABELS, "y_test": LABELS[:20]}
# Arrays and settings, what is said, and the changes that it proposes (None: left out).
REFUSALS: list[tuple[dict[str, Any], dict[str, Any], str, tuple[dict[str, Any], ...]]] = [
    # values that are not finite, in every split
    (
        {"x": bad(np.nan), **HALF, "x_test": bad(1)[:20]},
        {},
        (
            "arrays: train: image holds nan in row 3; mend the data, or give such rows a weight of"
            " 0 (an array `weight`, 1 for the others)"
        ),
        ({"weight": np.arange(40) != 3},),
    ),
    (
        {"x": bad(1), **HALF, "x_test": bad(-np.inf, 11)[:20]},
        {"test": "test"},
        (
            "arrays: test: image holds -inf in row 11; mend the data, or give such rows a weight"
            " of 0 (an array `weight`, 1 for the others)"
        ),
        ({"weight_test": np.arange(20) != 11}, {"x_test": bad(1)[:20]}),
    ),
    (
        {"x": PIXELS, "y": np.where(LABELS == 2, np.nan, 1.0)},
        {},
        (
            "arrays: train: target holds nan in row 2 (and 9 more rows); mend the data, or give"
            " such rows a weight of 0 (an array `weight`, 1 for the others)"
        ),
        ({"weight": LABELS != 2},),
    ),
    (
        {"x": bad(1e39, dtype="float64")},
        {},
        "arrays: train: image holds 1e+39 in row 3, which is infinite in float32; scale the data",
        ({"x": bad(1e39, dtype="float64") / 1e39},),
    ),
    # beyond 32 bits
    (
        {"x": np.array([[1], [2**31]])},
        {},
        (
            "arrays: train: image holds 2147483648 in row 1; jax's integers have 32 bits,"
            " -2147483648..2147483647; map the values to smaller ones, e.g. by np.unique(values,"
            " return_inverse=True)"
        ),
        ({"x": np.unique([[1], [2**31]], return_inverse=True)[1]},),
    ),
    (
        {"x": TOKENS, "x_test": TOKENS, "user": LABELS, "user_test": LABELS.astype("u4") - 1},
        {"test": "test"},
        (
            "arrays: test: user holds 4294967295 in row 0; jax's integers have 32 bits,"
            " -2147483648..2147483647; map the values to smaller ones, e.g. by np.unique(values,"
            " return_inverse=True)"
        ),
        (
            dict(
                zip(
                    ("user", "user_test"),
                    np.unique([LABELS, LABELS.astype("u4") - 1], return_inverse=True)[1].reshape(
                        2, 40
                    ),
                    strict=True,
                )
            ),
        ),
    ),
    # dtypes and ranges that differ between splits
    (
        {**BOTH, "x_test": PIXELS[:20] / np.float32(255)},
        {"test": "test"},
        "arrays: test: image is float32, that of train uint8; save both in one dtype and range",
        ({"x_test": PIXELS[:20]}, {"x": PIXELS / np.float32(255)}),
    ),
    (
        {**BOTH, "x": PIXELS.astype(np.uint16) * 257, "x_test": PIXELS[:20]},
        {"test": "test"},
        "arrays: test: image is uint8, that of train uint16; save both in one dtype and range",
        ({"x": PIXELS}, {"x_test": PIXELS[:20].astype(np.uint16) * 257}),
    ),
    (
        {**BOTH, "x": PIXELS / 255, "x_test": PIXELS[:20] * 1.0},
        {"test": "test"},
        (
            "arrays: image is in 0..1 in train and in 0..255 in test: another scale; scale both"
            " alike, or give the range of both, --data.image_range=0,255"
        ),
        ({"x_test": PIXELS[:20] / 255}, {"image_range": (0, 255)}),
    ),
    (
        {**BOTH, "x": PIXELS / 255, "x_test": PIXELS[:20] / 127.5 - 1},
        {"test": "test"},
        (
            "arrays: image is in 0..1 in train and in -1..1 in test: another scale; scale both"
            " alike, or give the range of both, --data.image_range=-1,1"
        ),
        ({"x_test": PIXELS[:20] / 255}, {"image_range": (-1, 1)}),
    ),
    (
        {**BOTH, "x_test": PIXELS[:20] // 128},
        {"test": "test"},
        (
            "arrays: image is in 0..255 in train and in 0..1 in test: another scale; scale both"
            " alike, or give the range of both, --data.image_range=0,255"
        ),
        ({"x_test": PIXELS[:20]}, {"image_range": (0, 255)}),
    ),
    (
        {**BOTH, "x": (PIXELS / 255 - 0.5) / 0.25, "x_test": PIXELS[:20] * 1.0},
        {"test": "test"},
        (
            "arrays: image is in -2..2 in train and in 0..255 in test: 64 times as wide; scale"
            " both alike, or give the range of both, --data.image_range=-2,255"
        ),
        ({"x_test": (PIXELS[:20] / 255 - 0.5) / 0.25}, {"image_range": (-2, 255)}),
    ),
    (
        {**BOTH, "x": HOUNSFIELD, "x_test": HOUNSFIELD[:20]},
        {"test": "test", "image_range": (0.0, 4095.0)},
        (
            f"arrays: train: image: has values {HOUNSFIELD.min()}..{HOUNSFIELD.max()}, which are"
            f" not in 0..4095; scale all splits alike, or give the whole range, e.g."
            f" --data.image_range={HOUNSFIELD.min()},4095"
        ),
        (
            {"image_range": (-1000, 4095)},
            {"x": HOUNSFIELD.clip(0), "x_test": HOUNSFIELD[:20].clip(0)},
        ),
    ),
    (
        {"x": PIXELS, "x_test": PIXELS, "age": LABELS * 1.0, "age_test": LABELS},
        {"test": "test"},
        "arrays: age is float32 in train and int32 in test; save both in one dtype and range",
        ({"age_test": LABELS * 1.0}, {"age": LABELS}),
    ),
    (
        {
            "x": PIXELS,
            "x_test": PIXELS,
            "y": np.eye(4, dtype=int)[LABELS],
            "y_test": np.eye(40) > 0,
        },
        {"test": "test"},
        (
            "arrays: label has shape (4,) in train and (40,) in test, an example; give both the"
            " same width"
        ),
        ({"y_test": np.eye(4)[LABELS] > 0},),
    ),
    (
        {**BOTH, "x_test": PIXELS[:20], "y_test": LABELS[:20] * 1.0},
        {"test": "test"},
        (
            "arrays: test: label has dtype float64, the labels of train are whole numbers; save"
            " both as integers"
        ),
        ({"y_test": LABELS[:20]},),
    ),
    # texts
    (
        {
            "x": PIXELS,
            "y": np.array(["a", "b"] * 20),
            "x_test": PIXELS,
            "y_test": np.array(["b"] * 39 + ["c"]),
        },
        {"test": "test"},
        (
            "arrays: test: label holds 'c' in row 39, which is no class of train; its 2 classes"
            " are 'a', 'b'"
        ),
        ({"y_test": np.array(["b"] * 39 + ["a"])},),
    ),
    (
        {"x": PIXELS, "y": np.array(["a", "b"] * 20), "x_test": PIXELS, "y_test": LABELS},
        {"test": "test"},
        "arrays: test: label has dtype int64, the labels of train are texts; save both alike",
        ({"y": LABELS}, {"y_test": np.array(["a", "b"] * 20)}),
    ),
    # pixels of no known range
    (
        {"x": HOUNSFIELD},
        {},
        (
            f"arrays: x: int16 (6, 5) in {HOUNSFIELD.min()}..{HOUNSFIELD.max()}: pixels of this"
            f" type have no known range; give the whole range, e.g."
            f" --data.image_range={HOUNSFIELD.min()},{HOUNSFIELD.max()}"
        ),
        ({"image_range": (HOUNSFIELD.min(), HOUNSFIELD.max())},),
    ),
    (
        {"images": TOKENS.reshape(40, 7, 1) * 9},
        {},
        (
            f"arrays: images: int64 (7, 1) in 0..{TOKENS.max() * 9}: pixels of this type have no"
            f" known range; give the whole range, e.g. --data.image_range=0,{TOKENS.max() * 9}"
        ),
        ({"image_range": (0, TOKENS.max() * 9)},),
    ),
    (
        {"x": PIXELS},
        {"image_range": (1.0, 1.0)},
        "--data.image_range=1,1: the first must be less than the second",
        ({"image_range": (0, 255)},),
    ),
    # no numbers
    (
        {"x": PIXELS * 1j},
        {},
        (
            "arrays: train: image has dtype complex128; expected integers, floats or booleans;"
            " save its real and imaginary parts as two channels"
        ),
        ({"x": np.concatenate([PIXELS * 0, PIXELS], axis=-1)},),
    ),
    (
        {"x": PIXELS, "when": np.zeros(40, "datetime64[s]")},
        {},
        (
            "arrays: train: when has dtype datetime64[s]; expected integers, floats or booleans;"
            " convert it to numbers, e.g. by (x - x.min()) / numpy.timedelta64(1, 's')"
        ),
        ({"when": np.arange(40) * np.timedelta64(1, "s") / np.timedelta64(1, "s")},),
    ),
    (
        {"x": PIXELS, "y": np.array([{}] * 40)},
        {},
        (
            "arrays: train: label has dtype object; expected integers, floats or booleans; save"
            " plain numbers, or texts as classes"
        ),
        ({"y": LABELS}, {"y": np.array(["a", "b"] * 20, object)}),
    ),
    (
        {"x": np.zeros(40, [("a", "f4"), ("b", "f4")])},
        {},
        (
            "arrays: train: image has dtype [('a', '<f4'), ('b', '<f4')]; expected integers,"
            " floats or booleans; save each of its parts as an array of its own"
        ),
        ({"x": None, "a": np.zeros(40, "f4"), "b": np.zeros(40, "f4")},),
    ),
    # weights
    (
        {"x": PIXELS, "weight": LABELS - 1.0},
        {},
        "arrays: train: weight is -1 in row 0; weights are >= 0; mend it",
        ({"weight": LABELS * 1.0},),
    ),
    (
        {"x": PIXELS, "weight": LABELS * 0},
        {},
        "arrays: train: weight is 0 in every row, so nothing would count; leave the array out",
        ({"weight": None},),
    ),
]


@pytest.mark.parametrize(
    ("arrays", "settings", "line", "followed"), REFUSALS, ids=[row[2][8:50] for row in REFUSALS]
)
def test_what_is_wrong_in_any_split_is_refused_in_one_line_whose_remedies_work(
    arrays: dict[str, Any],
    settings: dict[str, Any],
    line: str,
    followed: tuple[dict[str, Any], ...],
) -> None:
    with pytest.raises(UserError) as raised:
        opened(arrays, **settings)
    assert str(raised.value) == line
    assert followed
    for changes in followed:
        after = {name: array for name, array in (arrays | changes).items() if array is not None}
        given = {"image_range": after.pop("image_range")} if "image_range" in after else {}
        opened(after, **(settings | given))


def test_the_remedies_work_when_followed() -> None:
    low, high = int(HOUNSFIELD.min()), int(HOUNSFIELD.max())
    assert opened({"x": HOUNSFIELD}, image_range=(low, high)).notes == ()
    _, numbers = np.unique(np.array([[1], [2**31]]), return_inverse=True)
    assert opened({"x": numbers.reshape(2, 1)}).train.read(np.arange(2))["image"].max() == 1
    when = np.arange(40).astype("datetime64[s]")
    seconds = (when - when.min()) / np.timedelta64(1, "s")
    assert opened({"x": PIXELS, "when": seconds}).train.read(ROWS)["when"].tolist() == [3, 39, 3]
    spectrum = np.fft.fft(PIXELS, axis=1)
    both = np.concatenate([spectrum.real, spectrum.imag], axis=-1)
    assert opened({"x": both}).train.fields["image"].shape == (6, 5, 6)
    shifted = {"x": PIXELS / 255, "x_test": PIXELS / 255 * 2}
    assert opened(shifted, test="test", image_range=(0.0, 2.0)).test is not None


def test_a_proposed_range_holds_all_values_and_is_proposed_where_it_can_be_given() -> None:
    """Six digits of 1234567 were out of it, and records have no --data.image_range."""
    large = {"images": TOKENS.reshape(40, 7, 1) + 1234567 - TOKENS.max()}
    with pytest.raises(UserError) as raised:
        opened(large)
    proposed = str(raised.value).rpartition("--data.image_range=")[2].split(",")
    assert proposed[1] == "1234567"
    low, high = map(float, proposed)
    assert opened(large, image_range=(low, high)).notes == ()
    tables = {
        "train": ArrayTable({"image": PIXELS / 255}),
        "test": ArrayTable({"image": PIXELS * 1.0}),
    }
    with pytest.raises(
        UserError, match=r"^--data: image is in .*: another scale; scale both alike$"
    ):
        checks.check_alike(tables, "--data")


def test_rows_of_weight_0_decide_no_range() -> None:
    weight = np.arange(40) != 3
    assert opened({"x": bad(np.nan), "weight": weight}).notes == ()
    with pytest.raises(UserError, match="image: has values 1..300, which are not in 0..255"):
        opened(
            {"x": np.where(weight[:, None, None, None], 300.0, bad(np.nan)), "weight": weight},
            image_range=(0, 255),
        )


def test_lost_digits_and_arrays_left_out_are_said() -> None:
    seconds = 1.7e9 + np.arange(40)[:, None] * np.array([1.0, 0.0])
    splits = opened(
        {"x": seconds, "id": LABELS, "name": np.array(["a"] * 40), "thumb": PIXELS, "y": LABELS}
    )
    assert list(splits.notes) == [
        "id: a batch has this field already; left out; rename it to use it",
        "name: texts (<U1) are no inputs; left out",
        (
            "thumb: uint8 (6, 5, 3): neither scaled nor standardized, as only `image` is; if these"
            " are pixels, save them as float32 of 0..1"
        ),
        (
            "arrays: train: image: float64 loses digits in float32: column 0 of it has values up to"
            " 1700000039, rounded by up to 39; take off an offset first, e.g. the smallest value"
        ),
    ]
    assert opened({"x": seconds - 1.7e9}).notes == ()
    ids = np.arange(2**24, 2**24 + 40) * 1.0
    assert "rounded by up to 1" in opened({"x": PIXELS, "user": ids}).notes[0]
    whole = opened({"x": PIXELS, "y": LABELS * 1.0})
    assert whole.notes == (
        (
            "y: float64 of whole numbers 0..3: taken as targets of a regression, since floats are"
            " no classes; for classes save integers"
        ),
    )


def test_files_are_read_before_the_training_unless_they_are_large(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = RANDOM.standard_normal((9000, 2)).astype(np.float32)
    features[8000] = np.nan
    np.save(tmp_path / "x.npy", features[:9])
    np.save(tmp_path / "x_test.npy", features)
    with pytest.raises(UserError, match="test: row 8000: image holds nan; mend the data, or give"):
        Arrays(path=str(tmp_path)).open()
    monkeypatch.setattr(checks, "READ_BYTES", 0)
    Arrays(path=str(tmp_path)).open()  # some rows only, and this is not among them


def test_batches_of_files_are_looked_at_as_they_are_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_check_files", lambda *_: None)  # large ones
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    features = RANDOM.standard_normal((40, 9)).astype(np.float32)
    features[33, 2] = np.inf
    users = np.arange(40) + 2**31 - 5
    np.save(tmp_path / "x.npy", features)
    train = Arrays(path=str(tmp_path), test="", train="train[10:]").open().train
    at = f"--data.path='{tmp_path}': train: row"
    pipeline.read_batch(train, {"id": np.arange(16)}, sharding)
    with pytest.raises(UserError, match=rf"^{at} 33: image holds inf; mend the data, or give"):
        pipeline.read_batch(train, {"id": np.arange(16, 24)}, sharding)
    np.save(tmp_path / "user.npy", users)
    train = Arrays(path=str(tmp_path), test="").open().train
    with pytest.raises(UserError, match=rf"^{at} 5: user holds 2147483648; jax's integers"):
        train.read(np.arange(6))
    (tmp_path / "user.npy").unlink()
    np.save(tmp_path / "x.npy", HOUNSFIELD)
    train = Arrays(path=str(tmp_path), test="", image_range=(-1000.0, 9.0)).open().train
    assert isinstance(train, ScaledTable)
    with pytest.raises(UserError, match=r"row \d+: image holds \d+, which is not in --data.image"):
        train.read(np.arange(6))


def test_of_few_or_empty_images_nothing_is_concluded() -> None:
    dark = np.zeros((40, 6, 5, 3), np.uint8)
    assert opened({"x": PIXELS, "x_test": dark}, test="test").notes == ()
    assert opened({"x": PIXELS, "x_test": PIXELS[:3] // 200}, test="test").notes == ()
    table = ArrayTable({"image": PIXELS / 100})
    assert checks.check_alike({"train": table, "test": table}, "arrays") == []


# --- records, TFDS, and tables of one's own
# --------------------------------------------------------------------------------------------------


def write_deep_records(folder: pathlib.Path, **fields: np.ndarray) -> None:
    """A folder of records as other programs write them: of the arrays' own dtypes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir()
    writer = ArrayRecordWriter(str(folder / "train-00000.array_record"), "group_size:1")
    for row in range(40):
        writer.write(b"".join(array[row].tobytes() for array in fields.values()))
    writer.close()
    index = {
        "format": "jaxtrain-records-1",
        "num_classes": 4,
        "class_names": None,
        "fields": {
            name: {"dtype": array.dtype.name, "shape": list(array.shape[1:])}
            for name, array in fields.items()
        },
        "splits": {"train": {"train-00000.array_record": 40}},
    }
    (folder / "dataset.json").write_text(json.dumps(index))


def test_records_of_16_bits_are_scaled_and_bad_values_are_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_check_files", lambda *_: None)  # large ones
    deep = DEEP[..., None]
    signal = RANDOM.standard_normal((40, 2)).astype(np.float32)
    signal[7, 1] = np.nan
    users = np.arange(40) + 2**31 - 5
    write_deep_records(tmp_path / "deep", image=deep, label=LABELS.astype(np.int16))
    train = Records(path=str(tmp_path / "deep"), test="").open().train
    assert train.fields["image"].dtype == np.float32
    assert np.array_equal(train.read(ROWS)["image"], (deep[ROWS] / 65535).astype(np.float32))
    assert train.read(ROWS)["label"].tolist() == LABELS[ROWS].tolist()
    write_deep_records(tmp_path / "signal", signal=signal, user=users)
    train = Records(path=str(tmp_path / "signal"), train="train[2:]", test="").open().train
    file = re.escape(f"{tmp_path}/signal/train-00000.array_record")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(UserError, match=rf"^{file}: record 5: user holds 2147483648; jax's"):
        train.read(np.arange(9))
    write_deep_records(tmp_path / "nan", signal=signal)
    train = Records(path=str(tmp_path / "nan"), train="train[2:]", test="").open().train
    pipeline.read_batch(train, {"id": np.arange(5)}, sharding)
    with pytest.raises(
        UserError, match=r"nan/train-00000.array_record: record 7: signal holds nan"
    ):
        pipeline.read_batch(train, {"id": np.arange(16)}, sharding)
    write_deep_records(tmp_path / "whole", image=PIXELS.astype(np.int32))
    with pytest.raises(
        UserError, match=r"image is int32 \(6, 5, 3\); pixels are uint8, or floats;"
    ):
        Records(path=str(tmp_path / "whole"), test="").open()


class Feature(NamedTuple):
    """What TFDS says of one feature."""

    shape: tuple[int | None, ...]
    np_dtype: Any


@pytest.mark.parametrize("size", [None, (3, 5)])
def test_tfds_images_of_16_bits_are_scaled_and_float_labels_are_targets(size: Any) -> None:
    from jaxtrain.data.sources import tfds_sets

    features = {"image": Feature((6, 5, 1), np.uint16), "label": Feature((), np.float64)}
    builder = types.SimpleNamespace(info=types.SimpleNamespace(features=features))
    described = tfds_sets._Description.of(builder, tfds_sets.Tfds(name="scans", size=size))
    pixels = np.full((6, 5, 1), 13107, np.uint16)
    rows = described.rows([{"image": pixels, "label": 0.5}] * 2)
    assert {name: str(value.dtype) for name, value in rows.items()} == {
        "image": "float32",
        "target": "float32",
    }
    assert np.allclose(rows["image"], 0.2) and rows["image"].shape[1:] == (*(size or (6, 5)), 1)
    features["label"] = Feature((), np.str_)
    with pytest.raises(UserError, match="--data.label_key='label': scans has <U0 there; expected"):
        tfds_sets._Description.of(builder, tfds_sets.Tfds(name="scans"))


def test_a_table_of_ones_own_is_looked_at_as_well() -> None:
    tables = {
        "train": ArrayTable({"image": np.ones((9, 4))}),
        "test": ArrayTable({"image": np.full((9, 4), np.inf)}),
    }
    parts = {"train": "train", "validation": "", "fingerprint": ""}
    assert choose(tables, test="", **parts).test is None
    with pytest.raises(UserError, match=r"^--data: test: image holds inf in row 0 \(and 8 more"):
        choose(tables, test="test", **parts)
    with pytest.raises(UserError, match="a table's array has dtype complex128; expected integers"):
        _ = ArrayTable({"image": np.ones(3) * 1j}).fields


def test_tables_that_are_read_in_order_only_are_left_until_they_are_loaded() -> None:
    class InOrder(ArrayTable):
        arrays, in_order = None, True

        def __init__(self) -> None:
            pass

        fields = ArrayTable({"image": np.ones((9, 4, 4, 1))}).fields
        num_classes = class_names = None

        def __len__(self) -> int:
            return 9

        def read(self, indices: np.ndarray) -> Any:
            raise AssertionError("read out of order")

    tables = {"train": InOrder(), "test": InOrder()}
    parts = {"train": "train", "validation": "", "test": "test", "fingerprint": ""}
    assert choose(tables, **parts).notes == ()
