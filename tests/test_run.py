"""A whole run in one process: what it writes, that its numbers are right, and that nothing beside
the training can end it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain import config
from jaxtrain.augment import ImageAugment
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.config import flags
from jaxtrain.data import statistics
from jaxtrain.data.sources.synthetic import Synthetic
from jaxtrain.errors import UserError
from jaxtrain.horizon import Horizon
from jaxtrain.models import MLP, ConvNet
from jaxtrain.optimizers import SGD, AdamW
from jaxtrain.processes import group, heartbeat
from jaxtrain.processes.group import StopAgreement
from jaxtrain.processes.signals import StopSignals
from jaxtrain.report.metrics_file import JsonlWriter, Writers, is_clock, read_metrics
from jaxtrain.report.page import html
from jaxtrain.report.terminal.progress import Progress
from jaxtrain.runner import main as runner_main
from jaxtrain.runner import workdir as workdirs
from jaxtrain.schedules import Constant, Cosine
from jaxtrain.tasks import Classification
from jaxtrain.train import cadence, compare_meshes, evaluate, loop, lowering
from jaxtrain.train.metrics_log import MetricsLog
from jaxtrain.train.selection import Standing

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = [sys.executable, str(ROOT / "experiments" / "digits.py")]
TINY = [
    "--steps=20",
    "--batch_size=16",
    "--model=mlp",
    "--model.widths=8",
    "--platform=cpu",
    "--mesh=data:1",
    "--tensorboard=false",
]


def toy(**changes: Any) -> config.Run:
    """A run of a second with everything on that keeps state: dropout, augmentation, averaging,
    clipping, an unfinished interval."""
    settings: dict[str, Any] = {
        "model": MLP(num_classes=4, widths=(16,), dropout=0.1),
        "data": Synthetic(
            shape=(4, 4, 1),
            num_classes=4,
            examples=120,
            test_examples=30,
            noise=0.5,
            train="train[:80%]",
            validation="train[80%:]",
        ),
        "task": Classification(),
        "optimizer": AdamW(learning_rate=1e-2, weight_decay=0.01),
        "schedule": Cosine(),
        "augment": ImageAugment(crop_padding=1),
        "steps": 24,
        "batch_size": 16,
        "clip_norm": 1.0,
        "ema_decay": 0.9,
        "mesh": "data:1",
        "eval_every": Horizon(6, "steps"),
        "eval_batch_size": 16,  # 24 validation examples, so the last batch is ragged
        "checkpoint_every": Horizon(4, "steps"),
        "log_every": 5,
        "tensorboard": False,
        "report": False,
        "offers": {
            "model": {
                "mlp": MLP(num_classes=4, widths=(16,), dropout=0.1),
                "convnet": ConvNet(num_classes=4, widths=(4,), depth=1),
            },
            "optimizer": {"adamw": AdamW(learning_rate=1e-2, weight_decay=0.01), "sgd": SGD()},
            "schedule": {"cosine": Cosine(), "constant": Constant()},
        },
    }
    return config.Run(**({"name": "toy"} | settings | changes))


def start(workdir: Path | str, *argv: str, **changes: Any) -> int:
    """The exit status of a start, as `run.main` would have it."""
    arguments = [f"--workdir={workdir}", *argv] if workdir else list(argv)
    return runner_main.guarded(
        lambda: runner_main.launch(flags.parse(toy(**changes), arguments), arguments)
    )


def wrong_at_start(workdir: Path | str, *argv: str, **changes: Any) -> str:
    """What is said to be wrong with a run before its state would be made; empty if nothing is."""

    class Reached(Exception):
        pass

    def reached(*_: Any, **__: Any) -> None:
        raise Reached

    arguments = [f"--workdir={workdir}", *argv]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering.Programs, "initialize", reached)
        try:
            runner_main.launch(flags.parse(toy(**changes), arguments), arguments)
        except UserError as error:
            return str(error)
        except Reached:
            return ""
    raise AssertionError("no state was made")


def lines(workdir: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without what comes from a clock."""
    return [
        {key: value for key, value in line.items() if not is_clock(key)}
        for line in read_metrics(workdir / "metrics.jsonl")
    ]


def digest(workdir: Path) -> str:
    """The digest of the newest state, which must verify."""
    checkpoints = Checkpoints(workdir)
    problems: list[str] = []
    step = checkpoints.newest_verified(problems.append)
    assert step is not None and not problems
    return checkpoints.digest(step)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("golden") / "run"
    assert start(folder) == 0
    return folder


def test_a_run_leaves_what_the_contract_says(golden: Path) -> None:
    record = json.loads((golden / "run.json").read_text())
    expected = {
        "name",
        "config",
        "command",
        "versions",
        "git",
        "hardware",
        "mesh",
        "devices",
        "state_bytes_per_device",
        "started",
        "data",
        "parameters",
    }
    assert expected <= record.keys()
    assert (
        record["name"] == "toy"
        and record["mesh"] == "data:1"
        and record["devices"] == 1
        and record["parameters"] == 17 * 16 + 17 * 4
    )
    found = lines(golden)
    train = [line["step"] for line in found if line["split"] == "train"]
    validation = [line["step"] for line in found if line["split"] == "validation"]
    assert train == [5, 10, 15, 20, 24] and validation == [0, 6, 12, 18, 24]
    assert found[-1]["split"] == "test" and found[-1]["step"] == 24
    assert [line["step"] for line in found] == sorted(line["step"] for line in found)
    assert all(0 <= line["accuracy"] <= 1 for line in found)
    assert found[-1]["accuracy"] > 0.5, "it learnt nothing"
    checkpoints = Checkpoints(golden)
    assert checkpoints.steps()[-2:] == [20, 24] and checkpoints.best() in checkpoints.steps()
    assert not [entry for entry in (golden / "checkpoints").iterdir() if not entry.name.isdecimal()]
    assert (
        (golden / "predictions.npz").is_file()
        and not (golden / "tensorboard").exists()
        and not (golden / "report.html").exists()
    )


def test_the_record_of_a_sharded_run_has_the_bytes_of_a_device_by_hand(
    golden: Path, tmp_path: Path
) -> None:
    """Of all 340 parameters, both moments and the average a fourth; the numbers that are no arrays
    are on every device."""
    assert start(tmp_path / "run", "--mesh=fsdp:4", "--steps=2") == 0
    whole, split = (
        json.loads((folder / "run.json").read_text())["state_bytes_per_device"]
        for folder in (golden, tmp_path / "run")
    )
    # 12 numbers of the recipe, from the rate to ema_decay
    step, count_of_adam, key, place, live = 4, 4, 2 * 4, 3 * 4, 12 * 4
    numbers = step + count_of_adam + key + place + live
    assert whole == 4 * 4 * (16 * 16 + 16 + 16 * 4 + 4) + numbers
    assert split == 4 * 4 * (16 * 16 + 16 + 16 * 4 + 4) // 4 + numbers


def test_the_same_run_twice_is_the_same_in_every_bit(golden: Path, tmp_path: Path) -> None:
    assert start(tmp_path / "again") == 0
    assert lines(tmp_path / "again") == lines(golden) and digest(tmp_path / "again") == digest(
        golden
    )


def test_from_run_repeats_a_run(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"seed": 3, "steps": 18, "ema_decay": None, "optimizer": SGD(learning_rate=0.1)}
    assert (
        start(
            tmp_path / "first",
            "--optimizer.momentum=0.8",
            "--model.widths=12",
            "--epochs=2",
            **(changes | {"steps": None, "epochs": 1.0}),
        )
        == 0
    )
    assert start(tmp_path / "second", f"--from_run={tmp_path / 'first'}") == 0
    assert lines(tmp_path / "second") == lines(tmp_path / "first") != lines(golden)
    assert digest(tmp_path / "second") == digest(tmp_path / "first")


def test_evaluation_is_exact(golden: Path) -> None:
    """Validation and test by hand, in float64: every example once, though the last batch is
    ragged."""
    splits = toy().data.open()
    checkpoints = Checkpoints(golden)
    # Averaged parameters are those that are evaluated.
    tree = {
        path.removeprefix("ema/"): value.astype(np.float64)
        for path, value in _arrays(checkpoints, 24).items()
        if path.startswith("ema/")
    }
    measured = statistics.measure(splits.train)
    for name, table in (("validation", splits.validation), ("test", splits.test)):
        assert table is not None and len(table) % 16
        examples = table.read(np.arange(len(table)))
        x = ((examples["image"] / 255 - measured.mean_C) / measured.std_C).reshape(len(table), -1)
        hidden = np.maximum(x @ tree["hidden0/kernel"] + tree["hidden0/bias"], 0)
        logits = hidden @ tree["head/kernel"] + tree["head/bias"]
        label = examples["label"]
        losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(table)), label]
        line = next(line for line in lines(golden) if line["split"] == name and line["step"] == 24)
        np.testing.assert_allclose(line["loss"], losses.mean(), rtol=2e-6)
        assert line["accuracy"] == (logits.argmax(1) == label).mean()


def _arrays(checkpoints: Checkpoints, step: int) -> dict[str, np.ndarray]:
    from jaxtrain.checkpoints import arrays, manifest

    folder = checkpoints.folder / str(step)
    return arrays.read(folder / "state", manifest.read(folder)["tree"])


@pytest.mark.parametrize("devices", [1, 8])
def test_eval_only(golden: Path, devices: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = (golden / "metrics.jsonl").read_bytes()
    # 10 examples do not spread over 8 devices: evaluation rounds up, and is as exact.
    assert start(golden, "--eval_only", f"--mesh=data:{devices}", "--eval_batch_size=10") == 0
    said = capsys.readouterr().out
    test = next(line for line in lines(golden) if line["split"] == "test")
    assert (
        "evaluated step 24" in said
        and f"test  accuracy {100 * test['accuracy']:.2f}%  loss {test['loss']:.4f}" in said
    )
    assert (golden / "metrics.jsonl").read_bytes() == before and digest(golden)


def test_init_from_takes_parameters_only(golden: Path, tmp_path: Path) -> None:
    # Another optimizer, no average and another length: nothing but the parameters fits, and nothing
    # else is asked for.
    assert (
        start(
            tmp_path / "warm",
            f"--init_from={golden}",
            "--optimizer=sgd",
            "--optimizer.learning_rate=1e-30",
            "--ema_decay=none",
            "--steps=2",
        )
        == 0
    )
    old, new = _arrays(Checkpoints(golden), 24), _arrays(Checkpoints(tmp_path / "warm"), 2)
    # The golden run has an average, which is what evaluations saw of it, so it is what is taken.
    same = [path for path in new if path.startswith("params/")]
    averages = {path: old[path.replace("params/", "ema/", 1)] for path in same}
    assert len(same) == 4 and all(np.array_equal(averages[path], new[path]) for path in same)
    assert new["step"] == 2 and not [path for path in new if path.startswith("ema/")]


class _Recorder:
    """A feed that notes what is dispatched, in the order of what is read; its state is the step."""

    compiles_late = False

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def advance(self, state: Any, count: int) -> tuple[Any, dict[str, tuple[float, float]]]:
        state = dataclasses.replace(state, step=state.step + count)
        self.events.append(("dispatch", state.step))
        return state, {"loss": (float(state.step), 1.0)}

    def fetch(self, sums: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        self.events.append(("read", int(sums["loss"][0])))
        return sums

    def close(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Counting:
    step: int = 0
    size: int = 1


class _NoCheckpoints:
    """Saves nothing, but notes when it would, and what was durable then."""

    def __init__(self, events: list[tuple[str, int]]) -> None:
        self.events = events

    def save(self, step: int, state: Any, record: Any, **_: Any) -> None:
        json.dumps(record, allow_nan=False)  # as the real ones do
        self.events.append(("save", step))

    def check(self) -> None:
        pass

    def wait(self) -> None:
        pass


def _train(
    tmp_path: Path, cadence: cadence.Cadence, recorder: _Recorder, **options: Any
) -> list[tuple[str, int]]:
    progress = Progress(cadence.total, live=False)
    writers = Writers(JsonlWriter(tmp_path / "metrics.jsonl"))
    log = MetricsLog(
        writers, progress, every=cadence.log, step=0, total_steps=cadence.total, batch_size=1
    )
    checkpoints: Any = _NoCheckpoints(recorder.events)
    loop.train(
        _Counting(),
        step=0,
        feed=recorder,
        cadence=cadence,
        log=log,
        writers=writers,
        checkpoints=checkpoints,
        progress=progress,
        stop=StopAgreement(StopSignals()),
        fetch=recorder.fetch,
        **({"validate": None, "test": None} | options),
    )
    writers.close()
    return recorder.events


def test_the_host_stays_one_step_behind(tmp_path: Path) -> None:
    events = _train(tmp_path, cadence.Cadence(total=6, log=1), _Recorder())
    # Step n+1 is under way before the numbers of n are read; only the end waits for itself.
    first = [
        ("dispatch", 1),
        *(event for step in range(2, 7) for event in (("dispatch", step), ("read", step - 1))),
    ]
    assert events == [*first, ("read", 6), ("save", 6)]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_the_host_reads_each_dispatch_once_and_waits_where_it_must(tmp_path: Path) -> None:
    recorder = _Recorder()

    def validate(state: _Counting) -> dict[str, float]:
        recorder.events.append(("evaluate", state.step))
        return {"loss": 1.0}

    events = _train(
        tmp_path,
        cadence.Cadence(total=8, per_call=2, log=4, evaluate=4, save=8),
        recorder,
        validate=validate,
        test=validate,
    )
    assert events == [
        ("evaluate", 0),
        ("dispatch", 2),
        ("dispatch", 4),
        ("read", 2),
        ("read", 4),
        ("evaluate", 4),
        ("save", 4),  # the first score of a trained state is the best so far
        ("dispatch", 6),
        ("dispatch", 8),
        ("read", 6),
        ("read", 8),
        ("evaluate", 8),
        ("evaluate", 8),
        ("save", 8),
    ]
    assert [(line["step"], line["split"]) for line in read_metrics(tmp_path / "metrics.jsonl")][
        -3:
    ] == [(8, "train"), (8, "validation"), (8, "test")]


def test_a_dispatch_that_compiles_says_nothing_of_the_rate(tmp_path: Path) -> None:
    """Ten seconds for the first step, one for each of the next four."""
    with pytest.MonkeyPatch.context() as patch:
        now = [0.0]
        patch.setattr("jaxtrain.train.metrics_log.time.monotonic", lambda: now[0])
        writers = Writers(JsonlWriter(tmp_path / "metrics.jsonl"), [], note=print)
        log = MetricsLog(
            writers, Progress(9, live=False), every=5, step=0, total_steps=9, batch_size=8
        )
        log.resume(late=True)
        for step in range(1, 6):
            now[0] += 10.0 if step == 1 else 1.0
            log.take(step, {"loss": (1.0, 1.0)})
        writers.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["examples_per_second"] == pytest.approx(8.0)


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_a_validation_that_is_no_number_ends_nothing(tmp_path: Path, loss: float) -> None:
    values = iter([loss, 2.0, loss, 1.0])
    events = _train(
        tmp_path,
        cadence.Cadence(total=3, log=1, evaluate=1, save=9),
        _Recorder(),
        validate=lambda _: {"loss": next(values)},
    )
    # Only what is the best so far is saved, and the end.
    assert [event for event in events if event[0] == "save"] == [("save", 1), ("save", 3)]


def test_runs_of_one_second_have_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workdirs.time, "strftime", lambda _: "now")
    assert [str(workdirs.choose_folder(toy())) for _ in range(3)] == [
        "runs/toy/now",
        "runs/toy/now-2",
        "runs/toy/now-3",
    ]
    with pytest.raises(ValueError, match="^--eval_only: needs --workdir, the folder of a run$"):
        workdirs.choose_folder(toy(eval_only=True))
    assert (
        workdirs.choose_folder(toy(workdir="x")) == Path("x")
        and len(list((tmp_path / "runs" / "toy").iterdir())) == 3
    )


def test_an_evaluation_is_put_off_when_a_signal_came_and_done_first_on_the_way_back(
    tmp_path: Path,
) -> None:
    """Whoever sends the signal may wait for seconds only: the commit comes at once, and the lines
    are those of an undisturbed run."""
    stop: Any = types.SimpleNamespace(status=None, asked=False, exchange=lambda: None)
    recorder = _Recorder()
    checkpoints: Any = _NoCheckpoints(recorder.events)
    saved: list[dict[str, Any]] = []
    checkpoints.save = lambda step, state, record, **_: (
        recorder.events.append(("save", step)),
        saved.append(record),
    )
    when = cadence.Cadence(total=8, per_call=2, log=4, evaluate=4)

    def validate(state: _Counting) -> dict[str, float]:
        recorder.events.append(("evaluate", state.step))
        return {"loss": 1.0}

    def told(step: int, state: Any) -> None:
        if step == 2 and not saved:
            stop.status = 75

    def go(step: int, **options: Any) -> None:
        writers, progress = (
            Writers(JsonlWriter(tmp_path / "metrics.jsonl")),
            Progress(8, live=False),
        )
        log = MetricsLog(writers, progress, every=4, step=step, total_steps=8, batch_size=1)
        loop.train(
            _Counting(step),
            step=step,
            feed=recorder,
            cadence=when,
            log=log,
            writers=writers,
            checkpoints=checkpoints,
            progress=progress,
            stop=stop,
            validate=validate,
            test=validate,
            fetch=recorder.fetch,
            at_step=told,
            **options,
        )
        writers.close()

    go(0)
    assert recorder.events[-2:] == [("read", 4), ("save", 4)] and saved[-1]["evaluation_due"]
    stop.status = None
    del recorder.events[:]
    before = Standing(saved[-1]["best"], saved[-1]["since_best"])
    go(4, evaluation_due=saved[-1]["evaluation_due"], standing=before)
    # Committed once more, now with its score.
    assert recorder.events[:3] == [("evaluate", 4), ("save", 4), ("dispatch", 6)]
    assert not saved[-1]["evaluation_due"]
    lines = [(line["step"], line["split"]) for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert lines == [
        (0, "validation"),
        (4, "train"),
        (4, "validation"),
        (8, "train"),
        (8, "validation"),
        (8, "test"),
    ]


def test_every_line_is_durable_before_the_commit_that_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    save = Checkpoints.save

    def watched(self: Checkpoints, step: int, state: Any, record: Any, **options: Any) -> None:
        sizes.append((record["metrics_bytes"], (tmp_path / "run" / "metrics.jsonl").stat().st_size))
        save(self, step, state, record, **options)

    monkeypatch.setattr(Checkpoints, "save", watched)
    assert start(tmp_path / "run") == 0
    assert len(sizes) >= 6 and all(offset == size for offset, size in sizes)
    assert sizes[-1][0] == (tmp_path / "run" / "metrics.jsonl").stat().st_size, (
        "the test line belongs to the last commit"
    )


@pytest.mark.parametrize(
    "model",
    [MLP(num_classes=4, widths=(16,)), ConvNet(num_classes=4, widths=(4,), depth=1)],
    ids=["scanned", "single"],
)
def test_a_loss_that_is_no_number_ends_the_run(
    tmp_path: Path, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--optimizer=sgd",
        "--optimizer.learning_rate=1e30",
        "--clip_norm=none",
        "--schedule=constant",
        "--schedule.warmup=0",
    ]
    assert start(tmp_path / "run", *arguments, model=model) == 70
    warned, said = capsys.readouterr().err.splitlines()
    assert warned.startswith("jaxtrain: warning: --optimizer.learning_rate=1e+30: 1e+31 times")
    assert said.startswith("jaxtrain: error: ")
    assert "not finite" in said or "NaN or infinity" in said
    checkpoints = Checkpoints(tmp_path / "run")
    for step in checkpoints.steps():
        assert all(
            np.isfinite(value).all()
            for value in _arrays(checkpoints, step).values()
            if value.dtype.kind == "f"
        )
    assert all(
        np.isfinite(value)
        for line in lines(tmp_path / "run")
        for key, value in line.items()
        if key != "split" and line["split"] == "train"
    )


def test_debug_nans_shows_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--optimizer=sgd",
        "--optimizer.learning_rate=1e30",
        "--clip_norm=none",
        "--schedule=constant",
        "--schedule.warmup=0",
    ]
    try:
        assert start(tmp_path / "run", *arguments, "--debug_nans", "--steps_per_call=1") == 70
    finally:
        jax.config.update("jax_debug_nans", False)
    warned, said = capsys.readouterr().err.split("\n", 1)
    assert warned.startswith("jaxtrain: warning: --optimizer.learning_rate=1e+30")
    assert said.startswith("Traceback") and "jaxtrain: error: " in said.splitlines()[-1]


def test_a_report_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Path:
        raise RuntimeError("no ink")

    monkeypatch.setattr(html, "write_report", broken)
    assert start(tmp_path / "run", "--report", "--steps=4", "--eval_every=2") == 0
    assert (
        capsys.readouterr().err == "jaxtrain: warning: report not written: RuntimeError: no ink\n"
    )
    assert lines(tmp_path / "run")[-1]["split"] == "test"


def _wandb(**broken: Callable[..., Any]) -> types.ModuleType:
    module = types.ModuleType("wandb")

    class Run:
        def define_metric(self, *_: Any, **__: Any) -> None: ...
        def log(self, line: dict[str, Any]) -> None:
            broken.get("log", lambda line: None)(line)

        def finish(self) -> None: ...

    module.init = broken.get("init", lambda **_: Run())  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("where", ["import", "init", "log", "exit"])
def test_wandb_never_ends_a_run(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise SystemExit(3) if where == "exit" else RuntimeError("no network")

    module = None if where == "import" else _wandb(**{"log" if where == "log" else "init": fail})
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert start(tmp_path / "run", "--wandb=project", "--steps=4") == 0
    assert "wandb" in capsys.readouterr().err.lower()
    assert lines(tmp_path / "run")[-1]["split"] == "test"


def test_a_tracker_that_fails_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tensorboard").write_text("in the way")
    assert start(folder, "--tensorboard", "--steps=4") == 0
    assert "TensorBoardWriter" in capsys.readouterr().err
    assert lines(folder)[-1]["split"] == "test"


def test_tensorboard_and_report_are_written(tmp_path: Path) -> None:
    assert start(tmp_path / "run", "--tensorboard", "--report", "--steps=4") == 0
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


def test_streamed_data_trains_the_same(golden: Path, tmp_path: Path) -> None:
    assert start(tmp_path / "run", "--device_data=no", "--steps_per_call=1") == 0
    for one, other in zip(lines(golden), lines(tmp_path / "run"), strict=True):
        assert one.keys() == other.keys() and one["step"] == other["step"]
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-4)


def test_a_full_disk_is_status_74(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: JsonlWriter) -> int:
        raise OSError(28, os.strerror(28), str(self.path))

    monkeypatch.setattr(JsonlWriter, "sync", full)
    assert start(tmp_path / "run") == 74
    said = capsys.readouterr().err
    assert "No space left on device" in said and said.count("\n") == 1


def test_an_error_of_the_users_own_code_keeps_its_own_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(MLP):
        def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
            raise ValueError("my own mistake")

    assert start(tmp_path / "run", model=Broken(num_classes=4)) == 1
    said = capsys.readouterr().err
    assert '    raise ValueError("my own mistake")\nValueError: my own mistake\n' in said
    assert "site-packages" not in said and "/jaxtrain/" not in said
    assert said.endswith(
        "jaxtrain: error: while running the initialisation of the model on shapes, train=False:"
        " image uint8[16, 4, 4, 1], label int32[16]\n"
    )


def quiet_environment() -> dict[str, str]:
    """What a subprocess gets: one CPU device, and the tests' compilation cache."""
    # the other flags change bits
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONWARNINGS": ""}


def test_a_closed_pipe_does_not_end_a_run(tmp_path: Path) -> None:
    """As in `python experiments/digits.py 2>&1 | head -1`."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [*EXPERIMENT, *TINY, f"--workdir={tmp_path}/run"],
        stdout=writer,
        stderr=writer,
        cwd=ROOT,
        env=quiet_environment(),
    )
    os.close(writer)
    assert os.read(reader, 1)
    os.close(reader)
    assert process.wait(timeout=120) == 0
    assert lines(tmp_path / "run")[-1]["split"] == "test"


def test_an_old_jax_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 6, 1))
    monkeypatch.setattr(jax, "__version__", "0.6.1")
    # Said before the run is looked at.
    assert runner_main.guarded(lambda: runner_main.launch(None, [])) == 2  # type: ignore[arg-type]
    assert (
        capsys.readouterr().err
        == "jaxtrain: error: needs jax >= 0.10.2; found 0.6.1 (python -m pip install -U jax)\n"
    )


def test_only_what_compiles_has_the_long_limit_of_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first dispatch, and the first batch of each shape that a program evaluates; a hang
    anywhere else is found within --hang_seconds."""
    said = [""]
    known: set[evaluate.ShapeKey] = set()
    seen: list[tuple[str, int | str]] = []
    monkeypatch.setattr(heartbeat, "beat", lambda phase, step=None: said.append(phase))

    def eval_step(state: Any, batch: Any) -> Any:
        seen.append((f"batch of {len(batch['id'])}", said[-1]))
        return {"loss": (np.float32(1), np.float32(1))}

    def batches(size: int) -> list[dict[str, Any]]:
        return [{"id": np.zeros(size, np.int32)}] * 2

    class Feed(_Recorder):
        def advance(self, state: Any, count: int) -> Any:
            seen.append((f"step {state.step + count}", said[-1]))
            return super().advance(state, count)

    def validate(state: Any) -> dict[str, float]:
        return evaluate.evaluate(eval_step, state, batches(8), compiled=known)

    def test(state: Any) -> dict[str, float]:
        return evaluate.evaluate(eval_step, state, batches(6), compiled=known)

    _train(
        tmp_path,
        cadence.Cadence(total=5, log=1, evaluate=2, save=3),
        Feed(),
        validate=validate,
        test=test,
    )
    assert seen == [
        ("batch of 8", "compiling"),
        ("batch of 8", "evaluating"),
        ("step 1", "compiling"),
        ("step 2", "training"),
        ("batch of 8", "evaluating"),
        ("batch of 8", "evaluating"),
        ("step 3", "training"),
        ("step 4", "training"),  # after a save
        ("batch of 8", "evaluating"),
        ("batch of 8", "evaluating"),
        ("step 5", "training"),
        ("batch of 8", "evaluating"),
        ("batch of 8", "evaluating"),
        ("batch of 6", "compiling"),
        ("batch of 6", "evaluating"),
    ]
    assert said[-2:] == ["saving", "ending"]


def test_a_long_wait_for_peers_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner_main, "SILENT_SECONDS", 0.0)
    with StopSignals() as stop:
        threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        assert (
            runner_main.guarded(
                lambda: runner_main._join(
                    toy(processes=2, process=1, coordinator="127.0.0.1:9"), stop
                )
            )
            == 75
        )
    assert (
        capsys.readouterr().err.splitlines()[0] == "jaxtrain: waiting for process 0 at 127.0.0.1:9"
    )


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 75, "SIGTERM while waiting for the other processes; nothing done yet"),
    ],
)
def test_a_signal_while_waiting_for_peers(
    number: int, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a person stopped is not to be started again by a scheduler."""
    alone = toy(processes=2, process=1, coordinator="127.0.0.1:9")
    # a shell's job in the background ignores SIGINT, and so would we
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), number)
            assert runner_main.guarded(lambda: runner_main._join(alone, stop)) == status
    finally:
        signal.signal(number, before)
    # What the watching thread says goes past Python's streams; see test_resume.py.
    assert capsys.readouterr().err == f"jaxtrain: error: {line}\n"


PEER_LOST = [
    (
        "FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce failed:"
        " [external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:7"
    ),
    "INTERNAL: Gloo context initialization failed: Connect timeout",
    (
        "UNKNOWN: [external/gloo/gloo/transport/tcp/pair.cc:572] Read error [127.0.0.1]:40:"
        " Connection reset by peer"
    ),
    "UNAVAILABLE: Coordination service has stopped. RecordHeartbeat() from task: 1 failed.",
    (
        "DEADLINE_EXCEEDED: Barrier timed out. Id: jaxtrain/3. This usually happens because a task"
        " triggered the barrier too early or too slowly."
    ),
    (
        "INTERNAL: NCCL operation ncclAllReduce(...) failed: remote process exited or there was a"
        " network error."
    ),
]
OUR_FAULT = [
    "INVALID_ARGUMENT: an optimization barrier needs operands",
    "INTERNAL: NCCL operation ncclCommInitRank(...) failed: invalid usage (Duplicate GPU detected)",
    "UNIMPLEMENTED: Unknown datatype in reduction of gloo",
    "INTERNAL: peer access is not supported between these devices",
]


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
@pytest.mark.parametrize("text", PEER_LOST)
def test_a_lost_peer_is_one_line_and_the_traceback_in_the_log(
    text: str,
    kind: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def step() -> int:
        raise kind(text)

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert runner_main.guarded(step) == 75
    assert len(capsys.readouterr().err.splitlines()) == 1, "process 0 writes to the terminal"
    monkeypatch.setattr(group, "is_main", lambda: False)
    assert runner_main.guarded(step) == 75
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last)") and "in step" in said
    assert (
        said.splitlines()[-1] == f"jaxtrain: error: lost another process of the run ({text[:160]})"
    )
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    with pytest.raises(kind):
        runner_main.guarded(step)


@pytest.mark.parametrize("text", OUR_FAULT)
def test_a_fault_in_a_group_is_not_hidden_as_a_lost_peer(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step() -> int:
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(jax.errors.JaxRuntimeError):
        runner_main.guarded(step)


JITTED_TWICE = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1099511627776 bytes."


@pytest.mark.parametrize(
    ("text", "status"),
    [(JITTED_TWICE, 71), ("INVALID_ARGUMENT: Executable expected parameter 0 of size 8", None)],
)
def test_an_error_of_xla_is_no_bad_input_though_a_jitted_function_raises_it_as_value_error(
    text: str, status: int | None
) -> None:
    def step() -> int:
        raise ValueError(text)

    if status is None:
        with pytest.raises(ValueError, match=text):
            runner_main.guarded(step)
    else:
        assert runner_main.guarded(step) == status


def test_a_value_error_that_is_no_user_error_is_a_fault_and_no_bad_input() -> None:
    """Raised inside C code called by ours, it had the status of bad input: no traceback, and no
    restart ever."""
    with pytest.raises(ValueError, match="invalid literal"):
        runner_main.guarded(lambda: int("x"))


def test_meshes_that_differ_have_a_status_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = types.SimpleNamespace(agree=False, rows=list, summary=lambda: "data:2 differs")
    monkeypatch.setattr(compare_meshes, "compare_recipe", lambda *_, **__: report)
    monkeypatch.setattr(runner_main.tables, "comparison_table", lambda rows: "")
    assert runner_main.launch(toy(compare_meshes=("data:2",)), []) == 3
    assert "data:2 differs" in capsys.readouterr().out


def test_a_supervisor_is_told_what_the_experiment_itself_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = heartbeat.HeartbeatWriter(tmp_path / "heartbeat")
    monkeypatch.setattr(heartbeat, "_writer", lambda: writer)
    monkeypatch.setenv(heartbeat.SUPERVISOR_PID_ENV, "1")
    monkeypatch.setattr(runner_main, "launch", lambda run, argv: 0)
    assert runner_main._start(toy(max_restarts=2, hang_seconds=7.5), []) == 0
    sent = heartbeat.read(tmp_path / "heartbeat")
    assert sent is not None and sent.options == heartbeat.SupervisorOptions(2, 7.5)
