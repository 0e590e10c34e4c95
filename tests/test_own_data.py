"""Training on one's own data without writing Python: what is read off the files, what is held out,
and one line for what poses no problem that can be told."""

import csv
import pathlib
import runpy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxtrain.config import flags
from jaxtrain.data.problem import Problem
from jaxtrain.data.sources.own import Own
from jaxtrain.data.sources.records import write_records
from jaxtrain.data.table import ArrayTable
from jaxtrain.errors import UserError
from jaxtrain.report.metrics_file import read_metrics
from jaxtrain.runner import main as runner_main

ROOT = pathlib.Path(__file__).parents[1]
experiment = runpy.run_path(str(ROOT / "experiments" / "own.py"))["experiment"]
RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
ROWS = RANDOM.standard_normal((60, 5)) * [1, 10, 100, 1e4, 1e-3] + [0, 0, 7, 1e5, 0]
TOKENS = RANDOM.integers(0, 30, (60, 12))
CLASSES = np.arange(60) % 3
SEVERAL = RANDOM.integers(0, 2, (60, 4))
NUMBERS = RANDOM.standard_normal(60) * 20 + 150

# Arrays, then: kind, inputs, their field, the field to predict, outputs, class of the model
KINDS: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
    (
        {"x": PIXELS, "y": CLASSES},
        ("classification", "images", "image", "label", 3, "ConvNet", "Classification"),
    ),
    (
        {"images": PIXELS[..., 0], "labels": np.array(["a", "b", "c"])[CLASSES]},
        ("classification", "images", "image", "label", 3, "ConvNet", "Classification"),
    ),
    (
        {"x": PIXELS, "y": np.eye(3, dtype=np.float32)[CLASSES]},
        ("classification", "images", "image", "target", 3, "ConvNet", "Classification"),
    ),
    (
        {"x": ROWS, "y": SEVERAL},
        ("several labels", "features", "features", "label", 4, "Fitted", "MultiLabel"),
    ),
    (
        {"data": ROWS, "target": NUMBERS},
        ("regression", "features", "features", "target", 1, "Fitted", "Regression"),
    ),
    (
        {"x": ROWS, "y": ROWS[:, :2]},
        ("regression", "features", "features", "target", 2, "Fitted", "Regression"),
    ),
    (
        {"x": PIXELS, "y": NUMBERS[:, None]},
        ("regression", "images", "image", "target", 1, "Fitted", "Regression"),
    ),
    (
        {"x": ROWS.reshape(20, 15, 1), "y": CLASSES[:20]},
        ("classification", "signals", "image", "label", 3, "Fitted", "Classification"),
    ),
    (
        {"tokens": TOKENS, "lengths": CLASSES, "y": CLASSES > 0},
        ("classification", "tokens", "tokens", "label", 2, "Fitted", "Classification"),
    ),
    (
        {"x": TOKENS},
        ("next token", "tokens", "image", "image", 30, "Transformer", "NextToken"),
    ),
]


@pytest.mark.parametrize(("arrays", "expected"), KINDS)
def test_the_kind_of_problem_is_read_off_the_data(
    arrays: dict[str, Any], expected: tuple[Any, ...], tmp_path: pathlib.Path, capsys: Any
) -> None:
    np.savez(tmp_path / "my.npz", **arrays)
    run = experiment([f"--data.path={tmp_path}/my.npz", "--data.split_seed", "3"])
    found = Problem.of(run.data.open())
    kind, inputs, field, target, outputs, model, task = expected
    assert (found.kind, found.inputs, found.input, found.target, found.outputs) == expected[:5]
    assert (type(run.model).__name__, type(run.task).__name__) == (model, task)
    assert run.task.input == field
    assert getattr(run.model, "num_classes", outputs) == outputs
    assert run.data.split_seed == 3
    lines = capsys.readouterr().out.splitlines()
    assert 5 <= len(lines) <= 6
    assert lines[2].startswith(f"  inputs    {field}: {inputs}, ")
    assert lines[3].startswith(f"  task      {kind}: ") and lines[3].endswith(f"from {target}")


def test_the_scales_of_features_and_targets_are_those_of_the_train_split(
    tmp_path: pathlib.Path,
) -> None:
    np.savez(tmp_path / "my.npz", x=ROWS, y=NUMBERS)
    run = experiment([f"--data.path={tmp_path}/my.npz"])
    train = run.data.open().train
    rows = np.array([np.flatnonzero((ROWS == row).all(1))[0] for row in train.arrays["features"]])
    assert np.allclose(run.model.input_mean, ROWS[rows].mean(0), rtol=1e-4)
    assert np.allclose(run.model.input_deviation, ROWS[rows].std(0), rtol=1e-4)
    assert np.allclose(run.model.mean, NUMBERS[rows].mean(), rtol=1e-6)
    assert np.allclose(run.model.deviation, NUMBERS[rows].std(), rtol=1e-6)


# --- splits
# --------------------------------------------------------------------------------------------------


def test_what_is_missing_is_held_out_as_scikit_learn_holds_it_out(tmp_path: pathlib.Path) -> None:
    from sklearn.model_selection import train_test_split

    np.savez(tmp_path / "my.npz", x=np.arange(60.0)[:, None], y=np.sort(CLASSES))
    for seed in (0, 1):
        splits = Own(path=f"{tmp_path}/my.npz", split_seed=seed).open()
        train, test = train_test_split(
            np.arange(60), test_size=0.2, stratify=np.sort(CLASSES), random_state=seed
        )
        found = {
            name: table.arrays["features"][:, 0].astype(int)
            for name, table in (
                ("train", splits.train),
                ("validation", splits.validation),
                ("test", splits.test),
            )
        }
        assert found["test"].tolist() == sorted(test)
        assert sorted([*found["train"], *found["validation"]]) == sorted(train)
        assert (len(found["validation"]), f"split_seed {seed}" in splits.fingerprint) == (4, True)
    whole = Own(path=f"{tmp_path}/my.npz", validation="", test="").open()
    assert len(whole.train) == 60 and "split_seed" not in whole.fingerprint


def test_splits_that_are_there_are_kept_unless_they_have_no_labels(tmp_path: pathlib.Path) -> None:
    arrays = {"x_train": ROWS, "y_train": CLASSES, "x_test": ROWS[:7], "y_test": CLASSES[:7]}
    np.savez(tmp_path / "my.npz", **arrays)
    splits = Own(path=f"{tmp_path}/my.npz").open()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (54, 6, 7)
    del arrays["y_test"]
    np.savez(tmp_path / "my.npz", **arrays)
    splits = Own(path=f"{tmp_path}/my.npz").open()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (44, 4, 12)
    assert splits.notes == ("test has no labels; left out, a part of train is held out instead",)


def test_folders_of_images_arrays_and_records_are_told_apart(tmp_path: pathlib.Path) -> None:
    for row in range(40):
        folder = tmp_path / "images" / "ab"[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[row, ..., 0]).save(folder / f"{row}.png")
    splits = Own(path=f"{tmp_path}/images").open()
    assert splits.train.fields["image"].shape == (8, 8, 1)  # their own size, and gray
    assert splits.train.class_names == ("a", "b")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (29, 3, 8)
    assert Own(path=f"{tmp_path}/images", size=(4, 6), color="rgb").open().train.fields[
        "image"
    ].shape == (4, 6, 3)
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "x.npy", ROWS)
    np.save(tmp_path / "arrays" / "y.npy", CLASSES)
    splits = Own(path=f"{tmp_path}/arrays").open()
    assert (len(splits.train), splits.train.num_classes) == (44, 3)
    tables = {"train": ArrayTable({"image": PIXELS, "label": CLASSES}, 3)}
    write_records(tmp_path / "records", tables)
    splits = Own(path=f"{tmp_path}/records").open()
    assert (len(splits.train), len(splits.test)) == (44, 12)
    assert Problem.of(splits).kind == "classification"


# --- refusals
# --------------------------------------------------------------------------------------------------

# Arrays, what is said, and the arrays and flags that it proposes.
REFUSALS: list[tuple[dict[str, Any], str, tuple[dict[str, Any], ...]]] = [
    (
        {"x": ROWS},
        ("has no labels among features; name them by --data.label_key, or call them label,"
         " labels, y,"
        " target or targets"),
        (
            {"mine": CLASSES, "flag": "--data.label_key=mine"},
            *({name: CLASSES} for name in ("label", "labels", "y", "target", "targets")),
        ),
    ),
    (
        {"x": ROWS, "y": CLASSES * 0},
        "label has 1 classes; at least 2 are needed",
        ({"y": CLASSES > 0},),
    ),
    (
        {"x": ROWS, "y": TOKENS},
        ("label holds 0..29 in 12 places an example; expected one class, or 0 and 1 for several"
        " labels; save numbers to be predicted as floats"),
        ({"y": CLASSES}, {"y": TOKENS % 2}, {"y": TOKENS * 1.0}),
    ),
    (
        {"x": TOKENS[..., None], "y": CLASSES},
        ("image holds whole numbers of shape (12, 1) an example; expected tokens (length,), or"
        " features and pixels, which are floats or bytes"),
        ({"x": TOKENS}, {"x": TOKENS[..., None] * 1.0}, {"x": TOKENS[..., None].astype(np.uint8)}),
    ),
    (
        {"x": np.zeros((60, 2, 2, 2, 2)), "y": CLASSES},
        ("image has shape (2, 2, 2, 2) an example; expected (features,), (length, channels) or"
        " (height, width, channels); take an experiment with a model of your own"),
        tuple({"x": np.zeros((60, *shape))} for shape in ((16,), (4, 4), (4, 2, 2))),
    ),
    (
        {"x": TOKENS - 5, "y": CLASSES},
        "image holds -5; tokens are >= 0; for features save floats",
        ({"x": TOKENS - 5.0},),
    ),
    (
        {"x": TOKENS * 10**6, "y": CLASSES},
        ("image holds whole numbers up to 29000000, too many for tokens; map them by"
         " np.unique(values, return_inverse=True), or save features as floats"),
        ({"x": np.unique(TOKENS * 10**6, return_inverse=True)[1]},
         {"x": TOKENS * 1e6}),
    ),
    (
        {"x": ROWS, "y": np.zeros((60, 2, 2))},
        ("target has shape (2, 2) an example; expected one number, or several in a row; take an"
         " experiment with a task of your own"),
        ({"y": NUMBERS}, {"y": np.zeros((60, 4))}),
    ),
    (
        {"x": ROWS[:4], "y": NUMBERS[:4]},
        ("4 examples are too few to hold out test and validation; give --data.test= and"
        " --data.validation= to do without"),
        ({"flag": "--data.test= --data.validation="},),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arrays", "line", "followed"), REFUSALS, ids=[row[1][:30] for row in REFUSALS]
)
def test_what_poses_no_problem_is_refused_and_the_remedies_work(
    arrays: dict[str, Any], line: str, followed: tuple[dict[str, Any], ...], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "my.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError) as raised:
        experiment([f"--data.path={path}"])
    assert str(raised.value) == f"--data.path: {line}"
    assert followed
    for changes in followed:
        after = arrays | changes
        given = after.pop("flag", "").split()
        np.savez(path, **after)
        experiment([f"--data.path={path}", *given])


def test_tables_of_texts_say_how_to_save_arrays_and_that_works(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open("my.csv", "w", newline="") as file:
        csv.writer(file).writerows([["a", "b", "c", "d", "e", "class"], *np.c_[ROWS, CLASSES]])
    with pytest.raises(UserError) as raised:
        experiment(["--data.path=my.csv"])
    assert str(raised.value) == (
        "--data.path='my.csv': tables of texts are not read; save arrays, in Python: import numpy"
        " as"
        " np; t = np.genfromtxt('my.csv', delimiter=',', skip_header=1); np.savez('my.npz',"
        " x=t[:, :-1], y=t[:, -1]) (classes: y=t[:, -1].astype(int)); then --data.path=my.npz"
    )
    code = str(raised.value).partition("in Python: ")[2].partition(" (classes")[0]
    code = code.replace("y=t[:, -1]", "y=t[:, -1].astype(int)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    splits = Own(path="my.npz").open()
    assert splits.train.num_classes == 3 and splits.train.fields["features"].shape == (5,)


def test_paths_that_hold_nothing_are_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "my.npz").write_bytes(b"")
    at = f"--data.path='{tmp_path}"
    lines = {
        f"{tmp_path}/mi.npz": f"{at}/mi.npz': no such file or folder; in {tmp_path}: my.npz; did"
        f" you"
        " mean it?",
        f"{tmp_path}/empty": f"{at}/empty': holds neither .npy files nor folders of images; give an"
        " .npz file, or a folder that holds a folder of images for each class",
    }  # fmt: skip
    for path, line in lines.items():
        with pytest.raises(UserError) as raised:
            experiment([f"--data.path={path}"])
        assert str(raised.value) == line
    np.savez(tmp_path / "good.npz", x=ROWS, y=CLASSES)
    for name in "ab":
        (tmp_path / "empty" / name).mkdir()
        for row in range(20):
            Image.fromarray(PIXELS[row]).save(tmp_path / "empty" / name / f"{row}.png")
    for path in ("empty", "good.npz"):
        experiment([f"--data.path={tmp_path}/{path}"])  # the remedies
    with pytest.raises(UserError, match=r"my.npz: not a readable NumPy file \("):
        experiment([f"--data.path={tmp_path}/my.npz"])
    with pytest.raises(UserError, match=r"^--data.path='': no file given; give an .npz file"):
        experiment([]).data.open()


# --- runs
# --------------------------------------------------------------------------------------------------


def start(path: pathlib.Path, *more: str) -> tuple[int, list[dict[str, Any]]]:
    workdir = path.parent / "run"
    argv = [f"--data.path={path}", f"--workdir={workdir}", "--notensorboard", "--noreport"]
    argv += ["--mesh=data:1", *more]
    status = runner_main.guarded(
        lambda: runner_main.launch(flags.parse(experiment(argv), argv), argv)
    )
    return status, read_metrics(workdir / "metrics.jsonl") if status == 0 else []


def test_a_run_on_several_labels_ends_with_a_test_line(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "my.npz", x=ROWS, y=SEVERAL)
    status, lines = start(tmp_path / "my.npz", "--steps=2", "--model.widths=8")
    assert status == 0
    assert lines[-1]["split"] == "test" and 0 <= lines[-1]["accuracy"] <= 1


def test_errors_of_the_data_are_one_line_at_the_command(tmp_path: pathlib.Path) -> None:
    found = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "own.py"), f"--data.path={tmp_path}/no.npz"],
        capture_output=True,
        check=False,
        text=True,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert found.stderr.startswith(
        f"jaxtrain: error: --data.path='{tmp_path}/no.npz': no such file"
    )


@pytest.mark.slow
def test_three_public_sets_from_the_command_to_a_result(tmp_path: pathlib.Path) -> None:
    from sklearn.datasets import load_diabetes, load_digits, make_multilabel_classification

    digits, diabetes = load_digits(), load_diabetes()
    x, y = make_multilabel_classification(2000, 20, n_classes=6, random_state=0)
    sets = {
        "digits": {"images": digits.images.astype(np.uint8), "labels": digits.target},
        "diabetes": {"data": diabetes.data, "target": diabetes.target},
        "labels": {"x": x, "y": y},
    }
    results = {}
    for name, arrays in sets.items():
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "my.npz", **arrays)
        status, lines = start(tmp_path / name / "my.npz")
        assert status == 0
        results[name] = lines[-1]
    assert results["digits"]["accuracy"] > 0.97
    # The mean of the targets has 5,388 there, linear regression 2,900.
    assert results["diabetes"]["loss"] < 3200
    assert results["labels"]["accuracy"] > 0.78
