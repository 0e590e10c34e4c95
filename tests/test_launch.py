"""A launch in a process that goes on: a notebook finds jax and the environment as they were."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from test_run import toy

from jaxtrain.config import flags
from jaxtrain.plan import gpu_target
from jaxtrain.runner import main as runner_main

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
