"""What a table's order and scales do to a run is said before it trains: rows that lie class by
class, columns of different scales, images read as signals."""

import numpy as np
import pytest
from sklearn.datasets import load_wine

from jaxtrain.data import Arrays, Digits, checks
from jaxtrain.data.table import ArrayTable
from jaxtrain.report.page import plots

X, Y = load_wine(return_X_y=True)
HALVES = {"train": "train[:80%]", "test": "train[80%:]"}
SHUFFLE = "since the rows of train lie class by class; shuffle them before they are saved"


def test_a_slice_of_rows_that_lie_class_by_class_is_said_and_the_remedy_works() -> None:
    (note,) = Arrays.of({"x": X, "y": Y}, **HALVES).open().notes
    assert note.startswith(f"--data.test=train[80%:] holds 1 of 3 classes, {SHUFFLE}")
    down = Arrays.of({"x": X, "y": Y[::-1].copy()}, train="train[:50%]", test="").open()
    assert [each[:40] for each in down.notes] == [
        "--data.train=train[:50%] holds 2 of 3 classe"[:40]
    ]
    rows = np.random.default_rng(0).permutation(len(Y))
    assert Arrays.of({"x": X[rows], "y": Y[rows]}, **HALVES).open().notes == ()


@pytest.mark.parametrize("label", [Y, np.arange(178) % 3, np.zeros(178, int), Y.astype(float)])
def test_whole_splits_shuffled_rows_and_numbers_are_no_news(label: np.ndarray) -> None:
    whole = label is Y
    source = Arrays.of({"x": X, "target" if label.dtype == float else "y": label}, test="")
    source = source if whole else Arrays.of(dict(source._arrays or {}), **HALVES)
    assert not [note for note in source.open().notes if "class by class" in note]
    assert Digits(train="train[:90%]", validation="train[90%:]").open().notes == ()


def test_columns_of_different_scales_are_said_and_scaled_ones_are_not() -> None:
    (note,) = checks.column_notes(ArrayTable({"image": X}))
    low, high = np.std(X, axis=0).min(), np.std(X, axis=0).max()
    words = f"its 13 columns differ in scale (deviations {low:.3g} to {high:.3g})"
    assert words in note
    scaled = (X - X.mean(0)) / X.std(0)
    constant = np.concatenate([scaled, np.ones((len(X), 1))], axis=1)
    for quiet in (scaled, constant, X[:, None, :], np.uint8(X % 256)):
        assert checks.column_notes(ArrayTable({"image": quiet})) == []
    assert checks.column_notes(ArrayTable({"features": X})) == []


def test_thousands_at_the_end_of_a_curve_are_written_out() -> None:
    write = plots._writer_of("loss")
    assert [write(value) for value in (0.12345, 999.4, 999.7, 3912.64, 5000.0)] == [
        "0.123",
        "999",
        "999.70",
        "3,912.64",
        "5,000",
    ]


def test_a_range_of_pixels_does_not_hide_that_they_are_read_as_a_signal() -> None:
    images = np.linspace(0, 16, 5 * 64).reshape(5, 8, 8)
    gray = "x: float64 (8, 8): read as a signal of length 8 with 8 channels; for gray images save"
    opened = Arrays.of({"x": images}, test="", image_range=(0, 16)).open()
    assert [note[: len(gray)] for note in opened.notes] == [gray]
    mended = Arrays.of({"x": images[..., None]}, test="", image_range=(0, 16)).open()
    assert mended.notes == ()
    assert mended.train.fields["image"].shape == (8, 8, 1)
