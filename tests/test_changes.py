"""Numbers changed while a run trains: they are those of a run that was stopped and went on with
other flags, to the bit, whatever kills it; and nothing is compiled again."""

import dataclasses
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_run import EXPERIMENT, TINY, start

from jaxtrain.checkpoints import lock
from jaxtrain.checkpoints.checkpoints import Checkpoints, read_step
from jaxtrain.cli import set_numbers
from jaxtrain.cli.main import main as command
from jaxtrain.errors import UserError
from jaxtrain.horizon import Horizon
from jaxtrain.report import changes_file
from jaxtrain.report.changes_file import Change
from jaxtrain.report.metrics_file import is_clock, read_metrics
from jaxtrain.schedules import Constant
from jaxtrain.train import changes
from jaxtrain.train.state import TrainState

RATE = "optimizer.learning_rate"
ONE = Change(8, "a", {RATE: 0.5}, {RATE: 0.01}, {RATE: 0.01})


class Killed(BaseException):
    """Stands for a kill: nothing after it is done, and no run catches it."""


def asks(folder: Path, at: Mapping[int, dict[str, float]], dies: int = -1) -> dict[str, Any]:
    """Settings of a run in which somebody asks for changes while a step is computed, so that they
    hold from the next on, and which may be killed at a step; one step a dispatch."""

    def hook(step: int, state: Any, values: Any) -> None:
        if step + 1 in at:
            changes.ask(folder, at[step + 1])
        if step == dies:
            raise Killed

    return {
        "log_every": 1,
        "steps_per_call": 1,
        "checkpoint_every": Horizon(5, "steps"),
        "at_step": hook,
    }


def digest(folder: Path) -> str:
    """Of everything in the last checkpoint, the numbers of the recipe as well."""
    checkpoints = Checkpoints(folder)
    return checkpoints.digest(max(checkpoints.steps()))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of metrics, without what a clock says."""
    return [
        {key: value for key, value in line.items() if not is_clock(key)}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is changed twice: after step 10, which is committed, and after step 13."""
    folder = tmp_path_factory.mktemp("golden") / "W"
    at = {10: {RATE: 0.002, "clip_norm": 0.25}, 13: {"optimizer.weight_decay": 0.5, RATE: 0.02}}
    assert start(folder, **asks(folder, at)) == 0
    first, second = changes_file.read(folder)
    assert (first.step, second.step) == (10, 13) and not changes.requests(folder)
    assert first.before == {RATE: float(np.float32(0.01)), "clip_norm": 1.0}
    assert second.before[RATE] == float(np.float32(0.002))
    return folder


def test_a_change_is_a_stop_and_other_flags(golden: Path, tmp_path: Path) -> None:
    def killed(step: int, *argv: str) -> None:
        with pytest.raises(Killed):
            start(tmp_path / "W", *argv, **asks(tmp_path, {}, step))

    def words(*names: str) -> str:
        return f"--allow_config_change={','.join(names)}"

    first = [f"--{RATE}=0.002", "--clip_norm=0.25"]
    killed(11)
    killed(14, *first, words(RATE, "clip_norm"), "--checkpoint_every=13steps")
    second = [f"--{RATE}=0.02", "--clip_norm=0.25", "--optimizer.weight_decay=0.5"]
    assert start(tmp_path / "W", *second, words(RATE, "optimizer.weight_decay")) == 0
    assert digest(tmp_path / "W") == digest(golden)
    assert metrics(tmp_path / "W") != []


@pytest.mark.parametrize("dies", [11, 14, 16], ids=["between", "after both", "later"])
def test_a_run_that_is_killed_makes_its_changes_again(
    golden: Path, tmp_path: Path, dies: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on from step 10, or 15, and changes what it had changed after it at the same step."""
    folder = tmp_path / "W"
    at = {10: {RATE: 0.002, "clip_norm": 0.25}, 13: {"optimizer.weight_decay": 0.5, RATE: 0.02}}
    with pytest.raises(Killed):
        start(folder, **asks(folder, at, dies))
    later = {step: values for step, values in at.items() if step > dies}
    assert start(folder, **asks(folder, later)) == 0
    assert digest(folder) == digest(golden) and metrics(folder) == metrics(golden)
    said = " ".join(capsys.readouterr().out.split())
    assert (f"note: {RATE} is 0.02, set at step 13 (changes.jsonl)" in said) == (dies > 15)


def test_a_copy_of_the_journal_repeats_the_run(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "W"
    folder.mkdir()
    (folder / "changes.jsonl").write_bytes((golden / "changes.jsonl").read_bytes())
    # as many steps a dispatch as it likes: the journal cuts them
    assert start(folder, "--log_every=1", "--checkpoint_every=5steps") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "note: changes.jsonl: 2 changes there, made again at the same steps" in said
    assert digest(folder) == digest(golden) and metrics(folder) == metrics(golden)


def test_newer_flags_hold(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "W"
    shutil.copytree(golden, folder)
    allowed = f"--allow_config_change={RATE}"
    assert start(folder, f"--{RATE}=0.005", "--steps=30", "--log_every=1", allowed) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"note: changes.jsonl: {RATE} at step 13: --{RATE}=0.005 is newer, and holds" in said
    assert "note: clip_norm is 0.25, set at step 10 (changes.jsonl)" in said
    hyper = {path: leaf for path, leaf in numbers(folder).items()}
    assert hyper[RATE] == np.float32(0.005) and hyper["clip_norm"] == np.float32(0.25)


def test_a_run_that_begins_anew_has_no_former_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was killed before its first checkpoint, and other flags are given: nothing is left of
    it. With the same flags it is the same run, and repeats them."""
    folder = tmp_path / "W"
    with pytest.raises(Killed):
        start(folder, **asks(folder, {2: {RATE: 0.002}}, 4))
    other = tmp_path / "V"
    shutil.copytree(folder, other)
    assert start(other, "--clip_norm=0.5", "--log_every=1") == 0
    assert changes_file.read(other) == []
    assert numbers(other)[RATE] == np.float32(0.01)
    assert start(folder, **asks(folder, {})) == 0
    assert len(changes_file.read(folder)) == 1
    assert numbers(folder)[RATE] == np.float32(0.002)


def numbers(folder: Path) -> dict[str, float]:
    """The numbers of the recipe in the last checkpoint."""
    checkpoints = Checkpoints(folder)
    step = max(checkpoints.steps())
    found = read_step(checkpoints.folder / str(step), checkpoints.specs(step))
    return {
        path.removeprefix("hyper/"): leaf.item()
        for path, leaf in found.items()
        if path.startswith("hyper/")
    }


def test_going_back_forgets_what_was_changed_later(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "W"
    shutil.copytree(golden, folder)
    kept = sorted(Checkpoints(folder).steps())
    assert start(folder, f"--checkpoint={kept[0]}", "--rewind", "--log_every=1") == 0
    [set_aside] = folder.glob("rewound-*")
    assert len(changes_file.read(set_aside)) == 2
    assert [change.step for change in changes_file.read(folder)] == [
        change.step for change in changes_file.read(golden) if change.step < kept[0]
    ]


def test_nothing_is_compiled_again(tmp_path: Path) -> None:
    compiled: list[str] = []
    before = {}

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    folder = tmp_path / "W"
    settings = asks(folder, {10: {RATE: 0.002}, 13: {RATE: 0.001, "clip_norm": 3.0}})
    asked = settings["at_step"]

    def hook(step: int, state: Any, values: Any) -> None:
        asked(step, state, values)
        before[step] = len(compiled)

    # an evaluation on the way would compile its own program
    assert start(folder, **{**settings, "at_step": hook, "eval_every": Horizon(0, "steps")}) == 0
    assert len(changes_file.read(folder)) == 2
    assert before[1] > 0 and before[24] == before[9]


def test_requests_that_cannot_be_are_left_out_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "W"
    settings = asks(folder, {})

    def hook(step: int, state: Any, values: Any) -> None:
        if step == 5:
            changes.ask(folder, {RATE: -1.0})
            changes.ask(folder, {"optimizer.rate": 1.0})
            (folder / "requests" / "0.json").write_text("[" * 100_000)
            (folder / "requests" / "note.txt").write_text("not ours")

    assert start(folder, **{**settings, "at_step": hook}) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"note: set {RATE}=-1.0: must be > 0; it was left out" in said
    assert "note: set optimizer.rate=1.0: is none of the numbers that can be changed" in said
    assert "note: 0.json in requests: is no request, and was left out" in said
    assert changes_file.read(folder) == [] and not changes.requests(folder)


def test_a_request_counts_once(tmp_path: Path) -> None:
    """A kill between the line of the journal and the end of the request's file."""
    path = changes.ask(tmp_path, {RATE: 0.5})
    journal = [dataclasses.replace(ONE, request=path.stem)]
    flags = {RATE: np.float32(0.01)}
    live = changes.Live(tmp_path, flags, {RATE: [["Above", 0]]}, journal, print)
    state: Any = dataclasses.replace(BLANK, hyper={RATE: jnp.float32(0.3)})
    assert live(9, state, asked=True).hyper[RATE] == np.float32(0.3)
    assert not changes.requests(tmp_path) and len(journal) == 1
    assert live(8, state, asked=False).hyper[RATE] == np.float32(0.5)


BLANK = TrainState(
    step=jnp.int32(0),
    params={},
    opt_state=(),
    collections={},
    ema=None,
    hyper={},
    key=jax.random.key(0),
    position=None,
)


def test_the_newest_wish_holds_over_changes_of_an_earlier_start(tmp_path: Path) -> None:
    """Killed after step 14, it goes on from step 10, and is asked for another rate at once: what it
    had changed of the rate at step 13 is no more, the decay of then is changed again."""
    folder, never = tmp_path / "W", {"eval_every": Horizon(0, "steps")}
    at = {8: {RATE: 0.002}, 13: {RATE: 0.02, "optimizer.weight_decay": 0.5}}
    with pytest.raises(Killed):
        start(folder, **never, **asks(folder, at, 14))
    assert start(folder, **never, **asks(folder, {12: {RATE: 0.004}})) == 0
    journal = changes_file.read(folder)
    assert [change.step for change in journal] == [8, 12, 13]
    assert dict(journal[2].values) == {"optimizer.weight_decay": 0.5}
    assert numbers(folder)[RATE] == np.float32(0.004)
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(folder / "changes.jsonl", again)
    assert start(again, **never, **asks(again, {})) == 0
    assert digest(again) == digest(folder) and metrics(again) == metrics(folder)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{}"], "changes.jsonl:1: is no change; restore the file from a copy"),
        ([ONE.line()[:-2]], "changes.jsonl:1: is no change; restore the file from a copy"),
        ([ONE.line().replace("0.5", "true")], "changes.jsonl:1: is no change"),
        ([ONE.line().replace('"step": 8', '"step": 8.0')], "changes.jsonl:1: is no change"),
        (
            [ONE.line().strip(), dataclasses.replace(ONE, step=7).line()],
            "changes.jsonl:2: step 7 comes after step 8; restore the file from a copy",
        ),
    ],
)
def test_damage_is_told(tmp_path: Path, lines: list[str], said: str) -> None:
    (tmp_path / "changes.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=re.escape(said)):
        changes_file.read(tmp_path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 11."""
    folder = tmp_path_factory.mktemp("stopped") / "W"
    with pytest.raises(Killed):
        start(folder, **asks(folder, {}, 11), schedule=Constant(warmup=2.0))
    return folder


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([], "needs NAME=VALUE; this run began with clip_norm=1, ema_decay=0.9, "),
        (
            ["learning_rate=1"],
            f"learning_rate=1: is none of the numbers that can be changed; did you mean '{RATE}'?",
        ),
        ([f"{RATE}=-1"], f"{RATE}=-1: must be > 0"),
        ([f"{RATE}=nan"], f"{RATE}=nan: must be finite"),
        ([f"{RATE}=1e-50"], f"{RATE}=1e-50: is 0 in float32"),
        ([f"{RATE}=fast"], f"{RATE}='fast': must be a number"),
        ([f"{RATE}="], f"{RATE}='': must be a number"),
        ([f"{RATE}=1", f"{RATE}=2"], f"{RATE}=2: {RATE} is given twice; give it once"),
        (["ema_decay=1"], "ema_decay=1: must be 0 <= value < 1"),
        (["schedule.warmup=2.5"], "schedule.warmup=2.5: steps must be a whole number"),
        (
            ["total_steps=30"],
            "total_steps=30: is the length of the run; stop it, and go on with another --steps",
        ),
        (
            ["model.widths=8"],
            (
                "model.widths=8: is part of the program, not a number that it takes in; what can"
                " change: clip_norm, ema_decay, "
            ),
        ),
        (
            ["task.label_smoothing=0.1"],
            (
                "task.label_smoothing=0.1: is off in this run, and no input of its step; stop it,"
                " and go on with --task.label_smoothing=0.1"
                " --allow_config_change=task.label_smoothing"
            ),
        ),
        ([f"--{RATE}=1"], f"write {RATE}=1 without --; e.g. python -m jaxtrain set runs/"),
        (["--now"], "unknown flag --now; it takes none"),
    ],
)
def test_wrong_words_are_one_line(
    stopped: Path, pairs: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["set", str(stopped), *pairs]) == 2
    error = capsys.readouterr().err
    assert re.match(f"jaxtrain: error: set:? {re.escape(said)}", error)
    assert error.count("\n") == 1
    assert not changes.requests(stopped)


def test_what_is_asked_of_a_stopped_run_waits(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "W"
    shutil.copytree(stopped, folder)
    assert command(["set", str(folder), f"{RATE}=0.25"]) == 0
    assert "no run is at work there; it takes the change when it goes on" in capsys.readouterr().out
    assert start(folder, schedule=Constant(warmup=2.0)) == 0
    assert f"step 10: {RATE} 0.01 -> 0.25 (set)" in capsys.readouterr().out
    assert command(["set", str(folder), f"{RATE}=0.25"]) == 2
    assert "the run has ended at step 24; go on with more --steps" in capsys.readouterr().err
    assert command(["set", str(tmp_path), f"{RATE}=0.25"]) == 2
    assert "holds no run.json; give the folder of a run" in capsys.readouterr().err


def test_the_command_changes_a_run_that_trains(tmp_path: Path) -> None:
    folder = tmp_path / "W"
    long = [each for each in TINY if "steps" not in each]
    argv = [*EXPERIMENT, *long, "--steps=2000000", f"--workdir={folder}"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        try:
            until = time.monotonic() + 120
            while not (folder / "metrics.jsonl").exists() and time.monotonic() < until:
                time.sleep(0.1)
            done = subprocess.run(
                [sys.executable, "-m", "jaxtrain", "set", str(folder), f"{RATE}=1e-5"],
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            )
        finally:
            run.terminate()
            assert run.wait(60) == 75
    [change] = changes_file.read(folder)
    assert f"{RATE}: {change.before[RATE]:g} -> 1e-05 after step {change.step:,}" in done.stdout
    assert numbers(folder)[RATE] == np.float32(1e-5)


def test_a_run_that_stops_or_computes_on_is_not_waited_for(
    stopped: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "W"
    shutil.copytree(stopped, folder)
    holders = ["somebody"]
    monkeypatch.setattr(lock, "holder", lambda _: holders.pop() if holders else "")
    assert command(["set", str(folder), f"{RATE}=0.25"]) == 0
    assert "the run stopped before it took the change; it does when" in capsys.readouterr().out
    monkeypatch.setattr(lock, "holder", lambda _: "somebody")
    monkeypatch.setattr(set_numbers, "WAIT_SECONDS", 0.1)
    assert command(["set", str(folder), f"{RATE}=0.5"]) == 0
    assert "asked; the run takes it at the end of the dispatch" in capsys.readouterr().out
    monkeypatch.setattr(changes, "ask", lambda *_: tmp_path / "gone.json")
    assert command(["set", str(folder), f"{RATE}=0.5"]) == 2
    assert "set: the run did not take it; its last lines say why" in capsys.readouterr().err
