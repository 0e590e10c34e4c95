"""A trained model put to use: `jaxtrain.load`, `python -m jaxtrain predict` and `export`, against
the run's own evaluation and against flax with the stored arrays."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image
from test_run import lines, start, toy
from test_warm_start import stored

import jaxtrain
from jaxtrain.cli import main as run_command
from jaxtrain.data.sources.arrays import Arrays
from jaxtrain.errors import UserError
from jaxtrain.horizon import Horizon
from jaxtrain.inference import tables
from jaxtrain.inference.inputs import Field, Inputs
from jaxtrain.models import MLP
from jaxtrain.optimizers import SGD
from jaxtrain.tasks import Regression

ROOT = Path(__file__).resolve().parent.parent
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (64, 4, 4, 1)).astype(np.uint8)
LABELS = (IMAGES.reshape(64, -1).astype(int).sum(1) > 16 * 128).astype(np.int64)
QUICK: dict[str, Any] = {
    "model": MLP(num_classes=2, widths=(8,)),
    "optimizer": SGD(learning_rate=0.1),
    "augment": None,
    "clip_norm": None,
    "batch_size": 16,
    "eval_batch_size": 12,
    "eval_every": Horizon(2, "steps"),
    "steps": 4,
    "keep": 9,
    "checkpoint_every": Horizon(2, "steps"),
    "offers": {},
}


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, which is closed again."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with two named classes, in one file."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    parts = {"x_train": IMAGES[:32], "y_train": LABELS[:32], "x_test": IMAGES[32:]}
    np.savez(path, **parts, y_test=LABELS[32:], class_names=np.array(["dark", "light"]))
    return path


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on them, with an average."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    source = Arrays(path=str(data), train="train[:24]", validation="train[24:]", test="test")
    assert start(folder, **(QUICK | {"data": source})) == 0
    return folder


def by_flax(folder: Path, step: int, images: np.ndarray) -> np.ndarray:
    """The logits by flax alone, with the averaged arrays and the standardisation by hand."""
    arrays = stored(folder, step)
    params: dict[str, Any] = {}
    for path, array in arrays.items():
        if path.startswith("ema/"):
            _, layer, name = path.split("/")
            params.setdefault(layer, {})[name] = array
    train = IMAGES[:24].astype(np.float64) / 255
    scaled = ((images / 255.0 - train.mean()) / train.std()).astype(np.float32)
    return np.asarray(MLP(num_classes=2, widths=(8,)).apply({"params": params}, scaled))


def said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status and output of a command."""
    capsys.readouterr()
    status = run_command(argv)
    shown = capsys.readouterr()
    return status, shown.out + shown.err


def test_predictions_of_the_test_split_are_those_of_the_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predictions.npz"
    status, text = said(["predict", str(trained), f"--out={out}"], capsys)
    assert status == 0, text
    assert text == f"step 4 (its average (ema_decay)): its test split -> {out}\n"
    found, own = arrays_of(out), arrays_of(trained / "predictions.npz")
    assert sorted(found) == [
        *("class_names", "id", "logits", "prediction", "probability", "step"),
    ]
    np.testing.assert_array_equal(found["prediction"], own["prediction"])
    [last] = [line for line in lines(trained) if line["split"] == "test"]
    assert (found["prediction"] == LABELS[32:]).mean() == last["accuracy"]
    assert found["class_names"].tolist() == ["dark", "light"] and found["id"].tolist() == [
        *range(32)
    ]
    shares = np.exp(found["logits"]) / np.exp(found["logits"]).sum(1, keepdims=True)
    np.testing.assert_allclose(found["probability"], shares, rtol=1e-6)
    np.testing.assert_allclose(found["logits"], by_flax(trained, 4, IMAGES[32:]), atol=1e-5)
    # of the label's probability the run keeps what its own program gave
    of_label = np.take_along_axis(found["probability"], LABELS[32:, None], 1)[:, 0]
    np.testing.assert_allclose(of_label, own["probability"], rtol=2e-6)


def test_a_model_in_python(trained: Path) -> None:
    model = jaxtrain.load(trained)
    many = model.predict(IMAGES[32:])
    one = model.predict(IMAGES[32])
    assert model.class_names == ("dark", "light") and model.step == 4
    assert one["logits"].shape == (2,) and one["prediction"].shape == ()
    np.testing.assert_allclose(one["logits"], many["logits"][0], atol=1e-6)
    np.testing.assert_allclose(many["logits"], by_flax(trained, 4, IMAGES[32:]), atol=1e-5)
    np.testing.assert_array_equal(
        np.asarray(model.params["head"]["kernel"]), stored(trained, 4)["ema/head/kernel"]
    )
    earlier = jaxtrain.load(trained, checkpoint=2)
    np.testing.assert_allclose(
        earlier.predict({"image": IMAGES[:5]})["logits"], by_flax(trained, 2, IMAGES[:5]), atol=1e-5
    )
    assert model.names_of(np.array([1, 0])) == ["light", "dark"]


WRONG_INPUTS: list[tuple[Any, str, Any]] = [
    (
        IMAGES[..., 0],
        "image has shape (64, 4, 4); the model takes (N, 4, 4, 1), or one example of",
        IMAGES[..., 0][..., None],
    ),
    (
        IMAGES / 255.0,
        "image is float64, the run was trained on uint8; give it the same numbers",
        IMAGES,
    ),
    (IMAGES[:0], "0 examples; give some", IMAGES[:1]),
    ({"images": IMAGES}, "images: the model takes image; did you mean 'image'?", {"image": IMAGES}),
    ({}, "lacks image; the model takes image", {"image": IMAGES}),
]
"""What is given, what is said, and what is given then."""


@pytest.mark.parametrize(
    ("given", "line", "followed"), WRONG_INPUTS, ids=[row[1][:20] for row in WRONG_INPUTS]
)
def test_inputs_that_are_wrong(given: Any, line: str, followed: Any, trained: Path) -> None:
    model = jaxtrain.load(trained)
    with pytest.raises(UserError) as raised:
        model.predict(given)
    assert str(raised.value).startswith(line) and "\n" not in str(raised.value)
    assert np.isfinite(model.predict(followed)["logits"]).all()


def test_files_of_inputs(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same rows as .npz under any name, with labels that are none, as .npy, as a folder of
    images, and one image."""
    expected = jaxtrain.load(trained).predict(IMAGES[32:40])["logits"]
    np.savez(tmp_path / "a.npz", pixels=IMAGES[32:40])
    np.savez(tmp_path / "b.npz", x_test=IMAGES[32:40], y_test=np.full(8, -1))
    np.save(tmp_path / "c.npy", IMAGES[32:40, ..., 0])
    (tmp_path / "d" / "sub").mkdir(parents=True)
    for row in range(8):
        image = Image.fromarray(IMAGES[32 + row, ..., 0])
        image.save(tmp_path / "d" / ("sub" if row > 3 else "") / f"{row}.png")
    for name in ("a.npz", "b.npz", "c.npy", "d", "d/3.png"):
        out = tmp_path / "out.npz"
        argv = ["predict", str(trained), f"--out={out}", f"--data.path={tmp_path / name}"]
        status, text = said([*argv, "--overwrite"], capsys)
        assert status == 0, text
        found = arrays_of(out)
        rows = expected[3:4] if name == "d/3.png" else expected
        np.testing.assert_allclose(found["logits"], rows, atol=1e-6, err_msg=name)
        if name == "d":
            assert found["filename"].tolist() == [
                *(f"{row}.png" for row in range(4)),
                *(f"sub/{row}.png" for row in range(4, 8)),
            ]
    out = tmp_path / "out.csv"
    assert said([*argv[:2], f"--out={out}", f"--data.path={tmp_path / 'd'}"], capsys)[0] == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert rows[5]["filename"] == "sub/5.png" and rows[5]["class"] in ("dark", "light")
    assert np.float32(rows[5]["logits_1"]) == expected[5, 1]


WRONG_COMMANDS: list[tuple[str, str]] = [
    ("predict", "predict: takes one WORKDIR, got 0; e.g. python -m jaxtrain predict runs/digits"),
    ("predict {W}", "predict: needs --out=FILE.npz"),
    ("predict {W} --out={tmp}/p.txt", "predict --out={tmp}/p.txt: must end in .npz or .csv"),
    ("predict {W} --out={tmp}", "predict --out={tmp}: must end in .npz or .csv"),
    (
        "predict {W} --out={tmp}/there.npz",
        "is there already; choose another name, or add --overwrite",
    ),
    ("predict {W} --out={tmp}/no/p.npz", "no such directory: {tmp}/no"),
    ("predict {W} --ot=p.npz", "predict: unknown flag --ot; did you mean --out?"),
    ("predict {W} --out", "predict --out: needs a value, e.g. --out=predictions.npz"),
    ("predict {W} --out=a.npz --out=b.npz", "predict: --out is given twice; give it once"),
    ("predict {W} --out={tmp}/p.npz --overwrite=1", "predict --overwrite: takes no value"),
    ("predict {tmp} --out={tmp}/p.npz", "{tmp}: holds no run.json; give the folder of a run"),
    ("predict {W}x --out={tmp}/p.npz", "predict {W}x: no such directory; in "),
    (
        "predict {W} --out={tmp}/p.npz --checkpoint=3",
        "--checkpoint=3: no such checkpoint; {W}/checkpoints holds 2, 4",
    ),
    (
        "predict {W} --out={tmp}/p.npz --checkpoint=lst",
        "must be best, last or a step; did you mean",
    ),
    ("predict {W} --out={tmp}/p.npz --data.split=tst", "--data.split=tst: the data of the run has"),
    (
        "predict {W} --out={tmp}/p.npz --data.path={tmp}/ther.npz",
        "no such file or folder; in {tmp}:",
    ),
    (
        "predict {W} --out={tmp}/p.npz --data.path={tmp}/there.npz",
        "--data.path={tmp}/there.npz: holds a, b; the model takes image; name the array so, or say",
    ),
    (
        "predict {W} --out={tmp}/p.npz --data.path={tmp}/both.npz",
        "--data.path={tmp}/both.npz: holds train and test; choose one, e.g. --data.split=test",
    ),
    (
        "predict {W} --out={tmp}/p.npz --data.path={tmp}/float.npz",
        "--data.path={tmp}/float.npz: image is float32, the run was trained on uint8",
    ),
    (
        "predict {W} --out={tmp}/p.npz --data.path={tmp}/nothing",
        "/nothing: holds neither images nor .npy files; give a folder of either",
    ),
    ("predict {W} --out={tmp}/p.npz --data.path={tmp}/text", "text/a.txt is not an image file"),
    ("predict {W} --out={tmp}/p.npz --experiment={tmp}/e.py", "e.py: no such file"),
    ("predict {W} --out={tmp}/p.npz --data.image_key=x", "belongs to --data.path, which is not"),
    ("export {W} --out={tmp}/w.npz", "export --out={tmp}/w.npz: must end in .safetensors"),
    ("export {W} --out={tmp}/w.safetensors --params=averge", "did you mean 'average'?"),
    (
        "exprt {W}",
        "unknown command 'exprt'; valid: list, verify, report, predict, sample, lm_eval, export",
    ),
]


PREDICT, EXPORT = "predict {W} --out={tmp}/p.npz", "export {W} --out={tmp}/w.safetensors"
FOLLOWED: list[str] = [
    *[PREDICT] * 4,
    "predict {W} --out={tmp}/there.npz --overwrite",
    *[PREDICT] * 4,
    f"{PREDICT} --overwrite",
    *[PREDICT] * 2,
    f"{PREDICT} --checkpoint=2",
    f"{PREDICT} --checkpoint=last",
    f"{PREDICT} --data.split=test",
    f"{PREDICT} --data.path={{tmp}}/there.npz --data.image_key=a",
    f"{PREDICT} --data.path={{tmp}}/there.npz --data.image_key=b",
    f"{PREDICT} --data.path={{tmp}}/both.npz --data.split=test",
    f"{PREDICT} --data.path={{tmp}}/both.npz --data.split=train",
    *[f"{PREDICT} --data.path={{tmp}}/images"] * 2,
    PREDICT,
    f"{PREDICT} --data.path={{tmp}}/there.npz --data.image_key=b",
    EXPORT,
    f"{EXPORT} --params=average",
    EXPORT,
]
"""What the lines of `WRONG_COMMANDS` say to write instead, in their order."""


@pytest.mark.parametrize("argv", list(dict.fromkeys(FOLLOWED)))
def test_the_remedies_are_accepted(
    argv: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(FOLLOWED) == len(WRONG_COMMANDS)
    write_inputs(tmp_path)
    status, text = said(argv.format(W=trained, tmp=tmp_path).split(), capsys)
    assert status == 0, text


def write_inputs(folder: Path) -> None:
    """Files that the commands below name."""
    np.savez(folder / "there.npz", a=IMAGES, b=IMAGES)
    np.savez(folder / "both.npz", x_train=IMAGES, x_test=IMAGES)
    np.savez(folder / "float.npz", x=IMAGES.astype(np.float32) / 255)
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("a")
    (folder / "images").mkdir()
    (folder / "nothing").mkdir()
    Image.fromarray(IMAGES[0, ..., 0]).save(folder / "images" / "0.png")


@pytest.mark.parametrize(
    ("argv", "line"), WRONG_COMMANDS, ids=[row[0][:60] for row in WRONG_COMMANDS]
)
def test_commands_that_are_wrong(
    argv: str, line: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path)
    known = {"W": trained, "tmp": tmp_path}
    status, text = said(argv.format(**known).split(), capsys)
    assert status == 2 and line.format(**known) in text and text.count("\n") == 1, text
    assert not (tmp_path / "p.npz").exists() and not (tmp_path / "w.safetensors").exists()


class Own(nn.Module):
    """A network that only this file knows."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return nn.Dense(2, name="head")(inputs.reshape(len(inputs), -1))


def test_a_model_that_only_python_knows(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Arrays(path=str(data), train="train", test="test")
    assert start(tmp_path / "run", **(QUICK | {"data": source, "model": Own()})) == 0
    with pytest.raises(UserError) as raised:
        jaxtrain.load(tmp_path / "run")
    assert str(raised.value) == (
        f"{tmp_path}/run: run.json: model 'Own' is none of jaxtrain's own, and nothing in a run is"
        " executed; give --experiment=FILE.py, or in Python load(..., model=...)"
    )
    found = jaxtrain.load(tmp_path / "run", model=Own()).predict(IMAGES[32:])
    own = arrays_of(tmp_path / "run" / "predictions.npz")
    np.testing.assert_array_equal(found["prediction"], own["prediction"])
    with pytest.raises(UserError, match="does not fit MLP: missing params/hidden0"):
        jaxtrain.load(tmp_path / "run", model=MLP(num_classes=2, widths=(8,)))
    with pytest.raises(UserError, match=r"model=Run.*give the run as experiment="):
        jaxtrain.load(tmp_path / "run", model=toy(**QUICK))
    other = toy(**(QUICK | {"name": "other", "data": source, "model": Own()}))
    with pytest.raises(
        UserError, match="is of experiment 'toy', the one given is 'other'; give its"
    ):
        jaxtrain.load(tmp_path / "run", experiment=other)
    remedy = toy(**(QUICK | {"data": source, "model": Own()}))
    assert jaxtrain.load(tmp_path / "run", experiment=remedy).step == 4
    file = tmp_path / "own.py"
    file.write_text("run = 1\n")
    argv = ["predict", str(tmp_path / "run"), f"--out={tmp_path / 'p.npz'}", f"--experiment={file}"]
    status, text = said(argv, capsys)
    assert status == 2
    assert "has no function `experiment`; write def experiment(): return jaxtrain.Run(" in text
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from test_inference import *\n"
        "def experiment():\n"
        f"    return toy(**(QUICK | dict(data=Arrays(path={str(data)!r}), model=Own())))\n"
    )
    out = tmp_path / "p.npz"
    argv = ["predict", str(tmp_path / "run"), f"--out={out}", f"--experiment={file}"]
    status, text = said(argv, capsys)
    assert status == 0, text
    np.testing.assert_array_equal(arrays_of(out)["prediction"], own["prediction"])


def test_inputs_of_two_fields_and_records_that_cannot_be_read() -> None:
    two = Inputs({"x": Field((2,), np.dtype("f4")), "y": Field((), np.dtype("i4"))}, None)
    with pytest.raises(
        UserError, match="^the model takes x, y; give them by name, as a dict of arr"
    ):
        two.rows([1.0, 2.0])
    uneven = {"x": np.ones((2, 2), "f4"), "y": np.ones(3, "i4")}
    with pytest.raises(
        UserError, match=r"^the inputs differ in length: \{'x': 2, 'y': 3\}; give one"
    ):
        two.rows(uneven)
    assert two.rows(uneven | {"y": np.ones(2, "i4")})[0].keys() == {"x", "y"}  # the remedy
    for record, line in (
        (
            {"fields": {"x": {}}, "prepare": None},
            r"run.json: its inputs cannot be read \('shape'\)",
        ),
        (
            {"fields": {}, "prepare": {"kind": "own"}},
            "its preparation is of kind 'own', which only",
        ),
    ):
        with pytest.raises(UserError, match=line):
            Inputs.from_record(record)


def test_data_of_a_run_that_cannot_be_predicted(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="^the data of the run: .*nowhere.*; or give --data.path=FIL"
    ):
        tables.of_run(Arrays(path=str(tmp_path / "nowhere.npz")), "", "")
    source = Arrays(path=str(data), train="train", test="")
    known = source.open().fingerprint
    with pytest.raises(
        UserError, match="^the run has no test split; give --data.path, or --data.sp"
    ):
        tables.of_run(source, "", known)
    assert tables.of_run(source, "train", known).what == "its train split"  # the remedy
    write_inputs(tmp_path)
    fields = Inputs({"x": Field((2,), np.dtype("f4")), "y": Field((), np.dtype("i4"))}, None)
    with pytest.raises(
        UserError, match=r"holds images; the model takes x \(2,\), y \(\); give an .npz"
    ):
        tables.open_path(str(tmp_path / "images"), fields)


def test_a_run_from_before(data: Path, trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    record = json.loads((folder / "run.json").read_text())
    del record["inputs"]
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="does not say what its inputs need .* go on with the run"):
        jaxtrain.load(folder)
    cut = Path(shutil.copytree(folder, tmp_path / "cut")) / "run.json"
    cut.write_text(cut.read_text()[:99])
    with pytest.raises(
        UserError, match=r"/cut: run.json is damaged \(JSONDecodeError\); restore it$"
    ):
        jaxtrain.load(tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut")
    shutil.copytree(trained, tmp_path / "cut", ignore=lambda *_: ["checkpoints"])
    with pytest.raises(
        UserError, match="no committed checkpoint in .*/checkpoints; train it first"
    ):
        jaxtrain.load(tmp_path / "cut")
    source = Arrays(path=str(data), train="train[:24]", validation="train[24:]", test="test")
    assert start(folder, "--steps=5", **(QUICK | {"data": source})) == 0  # the remedy
    assert jaxtrain.load(folder).step == 5


def test_regression_on_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Floats of a table: values, ranges, rows that are not finite."""
    rows = RANDOM.normal(size=(40, 3)).astype(np.float32)
    source = Arrays.of({"x": rows, "target": rows.sum(1, keepdims=True)}, test="")
    changes = {
        "data": source,
        "model": MLP(num_classes=1, widths=(4,)),
        "task": Regression(target="target"),
    }
    assert start(tmp_path / "run", **(QUICK | changes)) == 0
    model = jaxtrain.load(tmp_path / "run")
    assert model.predict(rows)["value"].shape == (40, 1)
    with pytest.raises(UserError, match="image: row 1 holds NaN or infinity; mend the data"):
        model.predict(np.where(np.arange(3)[:, None] == 1, np.nan, rows[:3]))
    with pytest.raises(
        UserError, match=r"image holds .*, training saw .*; scale it as in training"
    ):
        model.predict(rows * 1000)


def test_export_is_the_same_bits_and_comes_back(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "weights.safetensors"
    status, text = said(["export", str(trained), f"--out={out}"], capsys)
    assert status == 0 and text.startswith("step 4 (its average (ema_decay)): 4 arrays, "), text
    from safetensors import safe_open
    from safetensors.numpy import load_file

    arrays, old = load_file(out), stored(trained, 4)
    assert arrays.keys() == {f"params/{path[4:]}" for path in old if path.startswith("ema/")}
    for path, array in arrays.items():
        assert array.tobytes() == old[f"ema/{path.removeprefix('params/')}"].tobytes()
    with safe_open(out, framework="numpy") as file:
        words = file.metadata()
    assert json.loads(words["step"]) == 4 and json.loads(words["class_names"]) == ["dark", "light"]
    assert json.loads(words["config"])["batch_size"] == 16
    source = toy(**QUICK).data
    del source
    warm = tmp_path / "warm"
    changes = QUICK | {"data": Arrays.of({"x": IMAGES, "y": LABELS}, test="")}
    still = ("--steps=1", "--ema_decay=none", "--optimizer.learning_rate=1e-30")
    assert start(warm, f"--init_from={out}", *still, **changes) == 0
    for path, array in arrays.items():
        np.testing.assert_array_equal(stored(warm, 1)[path], array)


def test_help_names_the_commands_without_jax() -> None:
    code = (
        "import sys; from jaxtrain.cli import main; main(['--help']);"
        " assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "python -m jaxtrain predict WORKDIR --out=FILE.npz|.csv" in done.stdout
    assert "python -m jaxtrain export WORKDIR --out=FILE|" in done.stdout
