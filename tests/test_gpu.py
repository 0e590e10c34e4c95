"""What only a GPU can show: run with `scripts/test -m gpu` on a machine that has one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain.report.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """The environment without what conftest sets for the CPU; skips where jax sees no GPU."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("JAX_PLATFORMS", "XLA_FLAGS")
    }
    asked = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"],
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.stdout.strip() != "gpu":
        pytest.skip(f"jax sees no GPU here (its backend is {asked.stdout.strip() or 'broken'})")
    return clean


@pytest.mark.parametrize(
    "flags",
    [("--model=convnet",), ("--model=mlp", "--model.widths=64,64"), ("--device_data=no",)],
    ids=["cnn", "mlp", "streamed"],
)
def test_digits_train_on_the_gpu(
    environment: dict[str, str], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    command = [
        sys.executable,
        str(ROOT / "experiments" / "digits.py"),
        "--platform=gpu",
        "--steps=300",
        f"--workdir={tmp_path}",
        *flags,
    ]
    subprocess.run(command, env=environment, check=True, timeout=600)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["hardware"]["platform"] == "gpu"
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["split"] == "test" and last["accuracy"] > 0.9
    verified = subprocess.run(
        [sys.executable, "-m", "jaxtrain", "verify", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert verified.stdout.splitlines()[-1].startswith("digest ")
