"""Checkpoints of a former layout of attention: a resume and a warm start end with status 2, in one
line that names the old path, the new ones and a remedy."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from test_run import start

from jaxtrain.checkpoints import arrays, committed, former_layouts, manifest
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.models import ViT

NET = ViT(num_classes=4, patch=2, width=8, depth=1, heads=2)
SAID = (
    "checkpoint step 24 holds attention in a former layout: params/block0/attention/kernel"
    " (8,3,2,4); now query, key and value have a kernel each,"
    " params/block0/attention/query/kernel, params/block0/attention/key/kernel and"
    " params/block0/attention/value/kernel; train anew, or read it with jaxtrain's commit d0abf79"
)


def fused(state: arrays.HostState) -> arrays.HostState:
    """A state by path as it was when query, key and value were one kernel (D, 3, N, K) and one
    bias (3, N, K)."""
    kept = {}
    for path, array in state.items():
        folder, _, name = path.rpartition("/")
        attention, _, layer = folder.rpartition("/")
        if layer == "query":
            three = [state[f"{attention}/{each}/{name}"] for each in ("query", "key", "value")]
            kept[f"{attention}/{name}"] = np.stack(three, axis=1 if name == "kernel" else 0)
        elif layer not in ("key", "value"):
            kept[path] = array
    return kept


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose only checkpoint is of the former layout."""
    folder = tmp_path_factory.mktemp("former") / "run"
    assert start(folder, model=NET) == 0
    step = folder / "checkpoints" / "24"
    record = manifest.read(step)
    state = fused(arrays.read(step / "state", record["tree"]))
    keys = {path for path, (dtype, _) in record["tree"].items() if dtype.startswith("key<")}
    tree = {
        path: jax.random.wrap_key_data(array) if path in keys else array
        for path, array in state.items()
    }
    shutil.rmtree(folder / "checkpoints")
    Checkpoints(folder, run_id=record["run_id"]).save(24, tree, record["loop"], wait=True)
    assert not committed.verify(folder / "checkpoints", 24)
    return folder


@pytest.mark.parametrize("flag", ["--steps=30", "--eval_only"])
def test_a_resume_is_refused(former: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(former, flag, model=NET) == 2
    assert capsys.readouterr().err == f"jaxtrain: error: {SAID}\n"


def test_a_warm_start_is_refused(
    former: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path / "warm", f"--init_from={former}", model=NET) == 2
    assert capsys.readouterr().err == f"jaxtrain: error: --init_from={former}: {SAID}\n"


def test_parameters_are_named_first_and_the_others_counted() -> None:
    stored = {
        f"{part}/block{index}/attention/kernel": ["float32", [8, 3, 2, 4]]
        for part in ("ema", "params")
        for index in range(3)
    }
    wanted = {path.replace("kernel", "query/kernel"): ["float32", [8, 2, 4]] for path in stored}
    said = former_layouts.fused_attention(stored, wanted)
    assert "layout: params/block0/attention/kernel (8,3,2,4) and 2 more; now" in said


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        # A convolution of height 1 and width 3 is no attention, nor is what the model still wants.
        ({"a/kernel": [1, 3, 2, 4]}, {"a/kernel": [1, 3, 2, 4], "a/query/kernel": [8, 2, 4]}),
        ({"a/kernel": [1, 3, 2, 4]}, {"b/query/kernel": [8, 2, 4]}),
        ({"a/kernel": [8, 6]}, {"a/query/kernel": [8, 2, 3]}),
        ({"a/query/kernel": [8, 2, 4]}, {"a/query/kernel": [8, 4, 2]}),
    ],
)
def test_other_misfits_are_not_called_a_former_layout(
    stored: dict[str, list[int]], wanted: dict[str, list[int]]
) -> None:
    specs = (
        {path: ["float32", shape] for path, shape in each.items()} for each in (stored, wanted)
    )
    assert not former_layouts.fused_attention(*specs)
