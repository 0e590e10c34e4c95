"""Writers and trackers: nothing lost, nothing repeated, and no tracker that can end a run."""

import json
import math
import os
import sys
import time
import types

import numpy as np
import pytest

from jaxtrain.report.metrics_file import JsonlWriter, Writers, is_clock, read_metrics
from jaxtrain.report.trackers import TensorBoardWriter, WandbWriter


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def test_keys_stand_in_order_and_clock_keys_last(path):
    writer = JsonlWriter(path)
    writer.write(
        5,
        "train",
        {
            "step_seconds": 0.1,
            "b": 1,
            "examples_per_second": 3.5,
            "accuracy": 0.5,
            "a": 2,
            "loss": 1.5,
        },
    )
    writer.close()
    assert list(json.loads(path.read_text())) == [
        "step",
        "split",
        "loss",
        "accuracy",
        "a",
        "b",
        "examples_per_second",
        "step_seconds",
    ]


def test_floats_keep_every_bit_and_non_finite_ones_come_back(path):
    values = {
        "a": 0.1 + 0.2,
        "b": np.float32(0.1),
        "c": 5e-324,
        "d": math.inf,
        "e": -math.inf,
        "f": math.nan,
        "n": np.int32(3),
    }
    writer = JsonlWriter(path)
    writer.write(1, "test", values)
    writer.close()
    strict = json.loads(
        path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert (strict["d"], strict["e"], strict["f"], strict["n"]) == (
        "Infinity",
        "-Infinity",
        "NaN",
        3,
    )
    (line,) = read_metrics(path)
    assert all(line[key] == float(values[key]) for key in "abcde")
    assert math.isnan(line["f"])


def test_a_resume_truncates_to_the_committed_offset(path):
    writer = JsonlWriter(path)
    writer.write(1, "train", {"loss": 1.0})
    offset = writer.sync()
    writer.write(2, "train", {"loss": 0.5})
    writer.close()
    again = JsonlWriter(path)
    again.truncate(offset)
    again.write(2, "train", {"loss": 0.25})
    assert again.sync() == path.stat().st_size
    again.close()
    again.close()
    assert [line["loss"] for line in read_metrics(path)] == [1.0, 0.25]


def test_truncate_refuses_a_file_that_is_not_the_committed_one(path):
    writer = JsonlWriter(path)
    writer.write(1, "train", {"loss": 1.0})
    size = writer.sync()
    with pytest.raises(
        ValueError, match=f"{size} bytes, but the checkpoint was committed at {size + 1}"
    ):
        writer.truncate(size + 1)
    with pytest.raises(ValueError, match="not the end of a line"):
        writer.truncate(size - 3)
    writer.truncate(0)
    assert path.read_bytes() == b""
    writer.close()


def test_steps_ascend(path):
    writer = JsonlWriter(path)
    writer.write(2, "train", {})
    writer.write(2, "validation", {})
    with pytest.raises(ValueError, match="step 1 after step 2"):
        writer.write(1, "train", {})
    writer.close()


def test_a_torn_last_line_is_left_out_and_a_broken_one_is_named(path):
    path.parent.mkdir()
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        read_metrics(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error():
    writer = JsonlWriter.__new__(JsonlWriter)
    writer.path, writer._last_step = "/dev/full", -1
    with (
        open("/dev/full", "ab", buffering=0) as writer._file,
        pytest.raises(OSError, match="No space left"),
    ):
        writer.write(1, "train", {"loss": 1.0})


def test_clock_keys():
    assert [
        is_clock(key) for key in ("step_seconds", "examples_per_second", "seconds", "loss")
    ] == [True, True, False, False]


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_reads_back_what_was_written_and_drops_what_a_resume_voids(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, "train", {"loss": 1 / step, "bad": math.nan})
    writer.write(30, "validation", {"accuracy": 0.5})
    writer.close()
    assert [step for step, _ in scalars(tmp_path, "loss/train")] == [10, 20, 30]
    assert scalars(tmp_path, "accuracy/validation") == [(30, 0.5)]
    again = TensorBoardWriter(tmp_path)
    again.rewind(20)
    again.write(30, "train", {"loss": 7.0})
    again.close()
    again.close()
    assert [step for step, _ in scalars(tmp_path, "loss/train")] == [10, 20, 30]
    assert scalars(tmp_path, "loss/train")[-1] == (30, 7.0)
    assert "tensorflow" not in sys.modules


class FakeWandb(types.ModuleType):
    """Takes what wandb takes; raises `error` in the named calls."""

    def __init__(self, failing=(), error=RuntimeError, slow_seconds=0.0):
        super().__init__("wandb")
        self.failing, self.error, self.slow_seconds = failing, error, slow_seconds
        self.settings, self.lines, self.finished = None, [], False

    def _call(self, name):
        time.sleep(self.slow_seconds)
        if name in self.failing:
            raise self.error(f"{name}\nfailed")

    def init(self, **settings):
        self._call("init")
        self.settings = settings
        return self

    def define_metric(self, *_, **__):
        self._call("define_metric")

    def log(self, line):
        self._call("log")
        self.lines.append(line)

    def finish(self):
        self._call("finish")
        self.finished = True


def wandb_run(monkeypatch, tmp_path, fake, **options):
    monkeypatch.setitem(sys.modules, "wandb", fake)
    notes = []
    writer = WandbWriter(
        "project", name="run", run_id="id", folder=tmp_path, note=notes.append, **options
    )
    for step in range(3):
        writer.write(step, "train", {"loss": 0.5})
    writer.rewind(1)
    writer.close()
    writer.close()
    return writer, notes


def test_wandb_gets_every_line_and_stays_offline_without_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake = FakeWandb()
    writer, notes = wandb_run(monkeypatch, tmp_path, fake)
    assert fake.lines == [{"step": step, "train/loss": 0.5} for step in range(3)]
    assert (fake.finished, fake.settings["mode"], fake.settings["resume"], fake.settings["id"]) == (
        True,
        "offline",
        "allow",
        "id",
    )
    assert (writer.failures, notes) == (0, [])


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize(
    "failing",
    [
        ("init",),
        ("define_metric",),
        ("log",),
        ("finish",),
        ("init", "define_metric", "log", "finish"),
    ],
)
def test_wandb_cannot_end_a_run(monkeypatch, tmp_path, failing, error):
    writer, notes = wandb_run(monkeypatch, tmp_path, FakeWandb(failing, error))
    assert writer.failures >= 1
    (note,) = notes
    assert note == f"wandb: {error.__name__}: {failing[0]} failed; training goes on without it"


def test_wandb_that_is_absent_or_hangs_is_left_behind(monkeypatch, tmp_path):
    writer, notes = wandb_run(monkeypatch, tmp_path, None)
    assert writer.failures == 1
    assert "ModuleNotFoundError" in notes[0]
    start = time.monotonic()
    writer, notes = wandb_run(
        monkeypatch, tmp_path, FakeWandb(slow_seconds=1.0), patience_seconds=0.1
    )
    assert time.monotonic() - start < 1.0
    assert "left behind" in notes[0]


def test_wandb_that_does_not_keep_up_drops_lines(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(slow_seconds=0.3))
    notes = []
    writer = WandbWriter(
        "project", name="run", run_id="id", folder=tmp_path, note=notes.append, patience_seconds=0.1
    )
    for step in range(1100):
        writer.write(step, "train", {"loss": 0.5})
    assert 90 <= writer.failures <= 100
    assert "does not keep up" in notes[0]
    writer.close()


class Failing:
    """A writer that raises always."""

    def write(self, *_):
        raise OSError("gone")

    rewind = close = write


def test_writers_isolate_failures_and_say_so_once(path, tmp_path):
    notes = []
    board = TensorBoardWriter(tmp_path / "board")
    writers = Writers(JsonlWriter(path), [Failing(), board], note=notes.append)
    offset = writers.sync()
    for step in (1, 2):
        writers.write(step, "train", {"loss": 1.0})
    writers.resume(0, offset)
    writers.write(1, "train", {"loss": 3.0})
    writers.close()
    assert [line["loss"] for line in read_metrics(path)] == [3.0]
    assert scalars(tmp_path / "board", "loss/train") == [(1, 3.0)]
    assert writers.failures == {"Failing": 5}
    assert notes == ["Failing: OSError: gone; training goes on without it"]


def test_a_tensorboard_folder_that_cannot_be_made_does_not_end_a_run(path, tmp_path):
    (tmp_path / "file").write_text("in the way")
    notes = []
    writers = Writers(
        JsonlWriter(path), [TensorBoardWriter(tmp_path / "file" / "board")], note=notes.append
    )
    writers.write(1, "train", {"loss": 1.0})
    writers.close()
    assert len(read_metrics(path)) == 1
    assert writers.failures == {"TensorBoardWriter": 1}
