"""A run that is stopped, killed, damaged or changed, and goes on: to the same bits, and with each
line of its metrics once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_run import ROOT, digest, lines, quiet_environment, start, toy

from jaxtrain.checkpoints import committed
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.horizon import Horizon
from jaxtrain.models import ConvNet
from jaxtrain.processes import heartbeat
from jaxtrain.processes.signals import WAITS, StopSignals
from jaxtrain.runner import compile, workdir
from jaxtrain.train import feeds

KINDS: dict[str, dict[str, Any]] = {
    "scanned": {},
    "single": {"model": ConvNet(num_classes=4, widths=(4,), depth=1, dropout=0.1)},
    "streamed": {"device_data": "no"},
    "spread": {"mesh": "data:2,fsdp:2", "microbatches": 2},
}
"""The ways in which steps are run; each has to resume to the same bits."""


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The workdir of an undisturbed run of one kind, made once."""
    folder = tmp_path_factory.mktemp("golden")

    def of(kind: str = "scanned") -> Path:
        if not (folder / kind).exists():
            assert start(folder / kind, **KINDS[kind]) == 0
        return folder / kind

    return of


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Does something as soon as the dispatch that reaches `step` is on its way, once."""
    left = [action]
    for kind in (feeds.ResidentFeed, feeds.LoaderFeed):
        advance = kind.advance

        def watched(self: Any, state: Any, count: int, advance: Any = advance) -> Any:
            before = int(jax.device_get(state.step))
            result = advance(self, state, count)
            if left and before < step <= before + count:
                left.pop()()
            return result

        monkeypatch.setattr(kind, "advance", watched)


def stopped(
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int = 9,
    number: int = signal.SIGTERM,
    **changes: Any,
) -> int:
    """The status of a run that gets a signal at a step."""
    # Ctrl-C is ignored in a process that a script has put into the background, pytest included.
    previous = signal.signal(number, signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: os.kill(os.getpid(), number))
            return start(workdir, **changes)
    finally:
        signal.signal(number, previous)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_told_to_stop_goes_on_to_the_same_bits(
    kind: str,
    golden: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = golden(kind)
    assert stopped(tmp_path / "run", monkeypatch, **KINDS[kind]) == 75
    # Dispatches end at multiples of the cadences (4, 5 and 6), so step 9 lies in one that ends at 9
    # or at 10.
    newest = Checkpoints(tmp_path / "run").steps()[-1]
    assert newest in (9, 10), "the step is finished and saved, though no checkpoint was due"
    assert (
        f"SIGTERM: saved at step {newest}; the same command with --workdir={tmp_path}/run goes on"
        " from there" in _unwrapped(capsys)
    )
    assert start(tmp_path / "run", **KINDS[kind]) == 0
    assert f"resumed from step {newest}\n" in capsys.readouterr().out
    assert lines(tmp_path / "run") == lines(whole)
    assert digest(tmp_path / "run") == digest(whole)


def _unwrapped(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 75)])
def test_other_signals(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stopped(tmp_path / "run", monkeypatch, number=number) == status
    assert Checkpoints(tmp_path / "run").steps()[-1] in (9, 10)


def test_a_signal_before_the_first_step_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        open_data = type(toy().data).open
        patch.setattr(
            type(toy().data),
            "open",
            lambda self: (os.kill(os.getpid(), signal.SIGTERM), open_data(self))[1],
        )
        assert start(tmp_path / "run") == 75
    assert (
        f"SIGTERM: no step done yet, nothing to save; the same command with"
        f" --workdir={tmp_path}/run starts anew" in _unwrapped(capsys)
    )
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("earlier", [0, 9], ids=["new", "resumed"])
def test_a_signal_while_the_step_is_compiled_is_answered_at_once(
    earlier: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The line comes while the compiler works, and no step, evaluation or sample comes after it."""
    if earlier:
        assert stopped(tmp_path / "run", monkeypatch) == 75
    saved = [*Checkpoints(tmp_path / "run").steps()]
    before = lines(tmp_path / "run") if earlier else []
    capfd.readouterr()
    said: list[str] = []
    with monkeypatch.context() as patch:
        training = compile.Sharded.training

        def slow(self: Any, *arguments: Any, **options: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 20
            while not (line := capfd.readouterr().err) and time.monotonic() < deadline:
                time.sleep(0.01)
            said.append(line)
            return training(self, *arguments, **options)

        patch.setattr(compile.Sharded, "training", slow)
        assert start(tmp_path / "run") == 75
    assert said == [f"jaxtrain: SIGTERM: {WAITS['compiling']}; Ctrl-C now ends it at once\n"]
    out = capfd.readouterr().out.replace("\n", " ")
    nothing = "no step done yet, nothing to save" if not earlier else f"saved at step {saved[-1]}"
    assert f"SIGTERM: {nothing}; the same command with --workdir=" in out
    assert "validation" not in out
    assert Checkpoints(tmp_path / "run").steps() == saved
    assert (tmp_path / "run" / "run.json").exists() == bool(earlier)
    if earlier:
        assert lines(tmp_path / "run") == before


def test_every_phase_has_its_words_for_a_stop() -> None:
    assert tuple(WAITS) == heartbeat.PHASES


def test_ignored_signals_stay_ignored() -> None:
    """As under nohup, or in the background of a script."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.status is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


STUCK = """
import hashlib, signal
from jaxtrain.processes.signals import StopSignals
# It is ignored in the background of a script.
signal.signal(signal.SIGINT, signal.default_int_handler)
with StopSignals():
    print(1, flush=True)
    hashlib.pbkdf2_hmac("md5", b"", b"", 2**31 - 1)
"""


def test_ctrl_c_twice_is_at_once_whatever_the_main_thread_does() -> None:
    # A long call into C without a look at signals: as a compilation is.
    with subprocess.Popen(
        [sys.executable, "-c", STUCK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        process_group=0,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        # to the process and to its group, as `timeout` sends it: one Ctrl-C
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.7)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert (
            process.stderr is not None
            and process.stderr.read()
            == "jaxtrain: SIGINT: ends before anything is trained; Ctrl-C now ends it at once\n"
            "jaxtrain: interrupted twice; nothing more is saved\n"
        )


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from test_run import start
from jaxtrain.train import feeds as feed
advance = feed.ResidentFeed.advance
def deadly(self, state, count):
    if int(__import__("jax").device_get(state.step)) >= 14:
        os.kill(os.getpid(), signal.SIGKILL)
    return advance(self, state, count)
feed.ResidentFeed.advance = deadly
start(sys.argv[1])
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    golden: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "run"],
        cwd=ROOT,
        env=quiet_environment(),
        capture_output=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    newest = Checkpoints(tmp_path / "run").steps()[-1]
    assert newest in (8, 12), "12 was being written when the kill came"
    assert lines(tmp_path / "run")[-1]["step"] >= newest
    assert start(tmp_path / "run") == 0
    assert f"resumed from step {newest}\n" in capsys.readouterr().out
    assert lines(tmp_path / "run") == lines(golden()) and digest(tmp_path / "run") == digest(
        golden()
    )


def test_an_error_in_the_middle_leaves_a_run_that_goes_on(
    golden: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("the user's own")

    for step in (2, 13):  # the first leaves run.json and metrics, but no checkpoint
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the user's own"):
            at_step(patch, step, fail)
            start(tmp_path / "run")
    assert start(tmp_path / "run", "--resume=must") == 0
    assert lines(tmp_path / "run") == lines(golden()) and digest(tmp_path / "run") == digest(
        golden()
    )


def copy(source: Path, target: Path) -> Path:
    """A copy of a workdir, to be hurt."""
    return Path(shutil.copytree(source, target))


def hurt(workdir: Path, step: int) -> str:
    """Flips a bit of a checkpoint's largest file; the file's name."""
    folder = workdir / "checkpoints" / str(step)
    path = max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    return str(path.relative_to(folder))


def test_a_damaged_checkpoint_is_passed_over_loudly(
    golden: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(golden(), tmp_path / "run")
    file = hurt(folder, 24)
    assert start(folder) == 0
    said = capsys.readouterr()
    assert (
        said.err
        == f"jaxtrain: warning: step 24: {file}: checksum mismatch; falling back to step 20\n"
    )
    assert "resumed from step 20\n" in said.out
    assert lines(folder) == lines(golden()) and digest(folder) == digest(golden())


def test_where_all_are_damaged_nothing_starts_anew(
    golden: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(golden(), tmp_path / "run")
    before = (folder / "metrics.jsonl").read_bytes()
    for step in committed.numbered(folder / "checkpoints"):
        hurt(folder, step)
    assert start(folder) == 74
    said = capsys.readouterr().err
    assert (
        said.startswith(f"jaxtrain: error: {folder}/checkpoints: no checkpoint verifies (step 24: ")
        and said.count("\n") == 1
    )
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_started_again_does_nothing(
    golden: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (golden() / "metrics.jsonl").read_bytes(), digest(golden())
    assert start(golden()) == 0
    assert (
        "--steps=24: checkpoint is already at step 24; nothing to do, raise it to go on\n"
        in capsys.readouterr().out
    )
    assert start(golden(), "--steps=10") == 0
    assert (
        "--steps=10: checkpoint is already at step 24; nothing to do, raise it to go on\n"
        in capsys.readouterr().out
    )
    assert ((golden() / "metrics.jsonl").read_bytes(), digest(golden())) == before


def test_more_steps_go_on(
    golden: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(golden(), tmp_path / "run")
    assert start(folder, "--steps=30") == 0
    said = capsys.readouterr().out
    assert "resumed from step 24\n" in said and "note: steps changes from 24 to 30\n" in said
    found, before = lines(folder), lines(golden())
    assert found[: len(before)] == before
    assert [(line["step"], line["split"]) for line in found[len(before) :]] == [
        (25, "train"),
        (30, "train"),
        (30, "validation"),
        (30, "test"),
    ]


def test_a_run_goes_on_with_another_mesh(
    golden: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stopped(tmp_path / "run", monkeypatch) == 75
    assert start(tmp_path / "run", "--mesh=data:2,fsdp:2") == 0
    for one, other in zip(lines(golden()), lines(tmp_path / "run"), strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-3)


def test_an_allowed_change_of_a_number_takes_effect(
    golden: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(golden(), tmp_path / "run")
    arguments = [
        "--steps=30",
        "--optimizer.learning_rate=1e-4",
        "--ema_decay=0.5",
        "--clip_norm=none",
    ]
    assert (
        start(
            folder, *arguments, "--allow_config_change=optimizer.learning_rate,ema_decay,clip_norm"
        )
        == 0
    )
    assert "note: optimizer.learning_rate changes from 0.01 to 0.0001\n" in capsys.readouterr().out
    rates = [
        line["learning_rate"]
        for line in lines(folder)
        if line["split"] == "train" and line["step"] > 24
    ]
    assert rates and max(rates) <= 1e-4


def test_a_run_goes_on_in_another_precision(
    golden: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on another generation of cards: a loss scale begins where there was none, and ends where
    none is wanted."""
    folder = copy(golden(), tmp_path / "run")
    assert start(folder, "--steps=26", "--precision=fp16") == 2
    assert "precision" in capsys.readouterr().err
    assert start(folder, "--steps=26", "--precision=fp16", "--allow_config_change=precision") == 0
    assert {line["loss_scale"] for line in lines(folder) if "loss_scale" in line} == {2.0**15}
    assert start(folder, "--steps=28", "--precision=fp32", "--allow_config_change=precision") == 0
    assert "loss_scale" not in lines(folder)[-3]


def test_the_best_is_kept_though_it_is_old(tmp_path: Path) -> None:
    # From the best step on, training is too fast to be any good.
    changes = {
        "eval_every": Horizon(2, "steps"),
        "checkpoint_every": Horizon(2, "steps"),
        "keep": 1,
        "steps": 12,
    }
    assert start(tmp_path / "run", **changes) == 0
    found = {
        line["step"]: line["accuracy"]
        for line in lines(tmp_path / "run")
        if line["split"] == "validation" and line["step"]
    }
    best = max(found, key=lambda step: (found[step], -step))
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.best() == best and checkpoints.steps() == sorted({best, 12})


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["kills --trials=3", "flips --trials=10 --runs=1"])
def test_faults_on_purpose(arguments: str) -> None:
    process = subprocess.run(
        [sys.executable, "scripts/faults.py", *arguments.split(), "--seed=7"],
        cwd=ROOT,
        env=quiet_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.fixture
def uncommitted(tmp_path: Path) -> Path:
    """The folder of a run that was killed before its first checkpoint."""
    assert start(tmp_path / "run") == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


def test_a_run_without_a_checkpoint_gives_way_to_another(
    uncommitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What trains then is what a new folder would have, and nothing of the other run is left."""
    before = workdir.read(uncommitted)
    assert start(uncommitted, "--model.widths=20", "--seed=1", "--allow_config_change=sed") == 2
    assert capsys.readouterr().err == (
        "jaxtrain: error: --allow_config_change=sed: no such setting; did you mean 'seed'?\n"
    )
    assert start(uncommitted, "--model.widths=20", "--seed=1") == 0
    assert (
        f"note: {uncommitted}: the run there has no checkpoint, so this one begins anew"
        " (model.widths was [16], now [20]; seed was 0, now 1)" in _unwrapped(capsys)
    )
    assert start(tmp_path / "new", "--model.widths=20", "--seed=1") == 0
    assert digest(uncommitted) == digest(tmp_path / "new")
    assert lines(uncommitted) == lines(tmp_path / "new")
    after = workdir.read(uncommitted)
    assert before is not None and after is not None
    assert after["run_id"] != before["run_id"] and "resumed" not in after


def test_a_run_without_a_checkpoint_of_the_same_configuration_is_the_same_run(
    uncommitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = workdir.read(uncommitted)
    assert start(uncommitted) == 0
    assert "begins anew" not in capsys.readouterr().out
    after = workdir.read(uncommitted)
    assert before is not None and after is not None and after["run_id"] == before["run_id"]


def test_a_forgotten_flag_is_restored_by_from_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert start(folder, "--model.widths=20", "--clip_norm=2") == 0
    capsys.readouterr()
    assert start(folder, "--steps=30") == 2
    said = capsys.readouterr().err
    assert said.endswith(f"; use a new workdir; --from_run={folder} goes on as it was\n")
    assert said.startswith(
        f"jaxtrain: error: --workdir={folder}: holds run 'toy' with clip_norm=2.0, now 1.0;"
        " model.widths=[20], now [16]; the checkpoint does not fit then ("
    )
    assert start(folder, "--steps=30", f"--from_run={folder}") == 0
    assert "resumed from step 24" in capsys.readouterr().out
