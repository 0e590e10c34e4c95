"""How a launch ends: jax and the environment as they were, and, if two things go wrong at once, the
status of the first."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from test_run import start, toy

from jaxtrain.checkpoints import arrays, checkpoints, lock
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.config import flags
from jaxtrain.errors import Diverged, UserError
from jaxtrain.plan import gpu_target
from jaxtrain.runner import main as runner_main
from jaxtrain.runner import restore
from jaxtrain.train import evaluate, loop
from jaxtrain.train.metrics_log import MetricsLog

SETTINGS = ["--platform=cpu", "--matmul_precision=fp32", "--debug_nans"]


@pytest.fixture
def a_process_without_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """jax as somebody has it who has set nothing, and a home of its own."""
    before = dict(jax.config.values)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(gpu_target.SKIP_CHECK, raising=False)
    monkeypatch.setattr(
        gpu_target, "prepare", lambda: os.environ.setdefault(gpu_target.SKIP_CHECK, "1")
    )
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_platforms", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield {"jax": dict(jax.config.values), "environment": environment()}
    for name, value in before.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)
    compilation_cache.reset_cache()


def environment() -> dict[str, str]:
    """The environment, without pytest's own note of where it is."""
    return {name: text for name, text in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def launch(workdir: Path, *arguments: str) -> int:
    """A launch as a notebook calls it."""
    argv = [f"--workdir={workdir}", "--steps=2", *arguments]
    return runner_main.launch(flags.parse(toy(), argv), argv)


def test_a_launch_leaves_jax_and_the_environment_as_they_were(
    a_process_without_settings: dict[str, Any], tmp_path: Path
) -> None:
    assert launch(tmp_path / "run", *SETTINGS) == 0
    assert dict(jax.config.values) == a_process_without_settings["jax"]
    assert environment() == a_process_without_settings["environment"]
    # it was kept for the next run, and what the notebook compiles now goes elsewhere
    cache = tmp_path / "home" / ".cache" / "jaxtrain" / "xla"
    kept = sorted(cache.iterdir())
    jax.jit(lambda x: x * 3 + 1)(jax.numpy.arange(5))
    assert sorted(cache.iterdir()) == kept


def test_a_launch_that_is_refused_leaves_them_too(
    a_process_without_settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="--batch_size=1000: train split has 96 examples"):
        launch(tmp_path / "run", *SETTINGS, "--batch_size=1000")
    assert dict(jax.config.values) == a_process_without_settings["jax"]
    assert environment() == a_process_without_settings["environment"]


def test_the_import_sets_nothing() -> None:
    program = (
        "import os; before = dict(os.environ); import jaxtrain, jaxtrain.models;"
        " from jaxtrain import Run, main; assert dict(os.environ) == before"
    )
    environ = {name: text for name, text in os.environ.items() if name != gpu_target.SKIP_CHECK}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def diverges_after_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state is saved in the background, and the numbers of step 5 are not finite."""
    take = MetricsLog.take

    def diverge(self: MetricsLog, step: int, sums: Any) -> None:
        if step > 4:
            raise Diverged(f"step {step}: loss is nan")
        take(self, step, sums)

    monkeypatch.setattr(MetricsLog, "take", diverge)
    monkeypatch.setattr(loop, "MAX_AWAITED_NUMBERS", 0)


@pytest.mark.usefixtures("diverges_after_a_save")
def test_a_save_that_fails_meanwhile_does_not_hide_a_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(folder: Path, state: arrays.HostState) -> None:
        time.sleep(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays, "write", full)
    assert start(tmp_path / "run", "--eval_every=0") == 70
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("jaxtrain: error: step ") and said[-1].endswith("loss is nan")
    assert "step 4: not saved" in said[-2] and said[-2].startswith("jaxtrain: warning: ")


@pytest.mark.usefixtures("diverges_after_a_save")
def test_a_save_that_takes_minutes_is_committed_although_the_run_diverges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = arrays.write

    def slow(folder: Path, state: arrays.HostState) -> None:
        time.sleep(3)
        write(folder, state)

    class Thread(threading.Thread):
        """A minute is half a second."""

        def join(self, timeout: float | None = None) -> None:
            super().join(None if timeout is None else timeout / 120)

    monkeypatch.setattr(arrays, "write", slow)
    monkeypatch.setattr(checkpoints.threading, "Thread", Thread)
    assert start(tmp_path / "run", "--eval_every=0") == 70
    assert Checkpoints(tmp_path / "run").steps() == [4]


def test_a_refused_run_leaves_the_folder_to_the_one_that_took_the_lock_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run takes the lock at the very moment at which the first lets go of it."""
    second, release = lock.Lock(tmp_path / "run"), lock.Lock.__exit__

    def release_to_another(first: lock.Lock, *error: Any) -> None:
        release(first, *error)
        if first is not second:
            second.__enter__()

    def refuse(*_: Any) -> None:
        raise UserError("--data: refused")

    monkeypatch.setattr(lock.Lock, "__exit__", release_to_another)
    monkeypatch.setattr(restore, "inspect", refuse)
    assert start(tmp_path / "run") == 2
    assert second.held()
    second.__exit__(None, None, None)


def test_a_refused_run_takes_the_folder_along_that_was_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("--data: refused")

    monkeypatch.setattr(restore, "inspect", refuse)
    (tmp_path / "mine").mkdir()
    assert start(tmp_path / "run") == start(tmp_path / "mine") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("processes", [1, 2])
def test_predictions_that_fail_end_a_group_and_not_a_run_alone(
    processes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The others wait in the collective for the process that failed, so it must not go on."""

    def fail(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        raise RuntimeError("the data went away")

    monkeypatch.setattr(evaluate, "predictions", fail)
    if processes > 1:
        with pytest.raises(RuntimeError, match="the data went away"):
            start(tmp_path / "run", "--steps=2")
        return
    assert start(tmp_path / "run", "--steps=2") == 0
    assert "predictions not written: RuntimeError: the data went away" in capsys.readouterr().err
