"""The bench: shrunken, it runs, its contestants do the same work, and the file says what the
numbers hang on."""

import dataclasses
import doctest
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from jaxtrain.models.mlp import MLP
from jaxtrain.models.vit import ViT


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "bench", Path(__file__).resolve().parents[1] / "scripts" / "bench.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_cases(bench: ModuleType, *, least: float) -> list:
    vit = bench.Case(
        "tiny ViT",
        ViT(patch=4, width=16, depth=1, heads=2),
        (8, 8, 1),
        steps=3,
        least=least,
        log_every=2,
        batch_size=8,
        examples=64,
    )
    return [
        vit,
        bench.Case(
            "MLP",
            MLP(widths=(8,)),
            (16,),
            steps=30,
            least=least,
            log_every=5,
            batch_size=8,
            examples=64,
        ),
    ]


def test_overhead_writes_table_and_json(bench, monkeypatch, tmp_path, capsys):
    cases = small_cases(bench, least=0.0)
    monkeypatch.setitem(
        bench.BENCHES, "overhead", lambda blocks, folder: bench.overhead(blocks, folder, cases)
    )
    assert bench.main(["overhead", "--blocks=2", f"--out={tmp_path}"]) == 0
    record = json.loads((tmp_path / "overhead.json").read_text())
    assert (
        record["bench"] == "overhead"
        and record["blocks"] == 2
        and record["command"].startswith("python scripts/bench.py overhead")
    )
    assert (
        record["hardware"]["cores"] >= 1
        and record["hardware"]["cpu"]
        and record["versions"]["jax"]
        and record["date"]
    )
    assert [result["case"] for result in record["results"]] == ["tiny ViT", "MLP"]
    for case, result in zip(cases, record["results"], strict=True):
        updates = bench.CHECKED_STEPS + 2 * case.steps
        assert {work["updates"] for work in result["work"].values()} == {updates}
        assert all(0.1 < work["loss"] < 10 for work in result["work"].values())
        assert result["largest_relative_difference_of_first_losses"] < bench.TOLERANCE
        speeds = result["steps_per_second"]
        ratios = np.divide(speeds["jaxtrain"]["values"], speeds["by hand"]["values"])
        np.testing.assert_allclose(result["ratio"]["values"], ratios)
        assert result["ratio"]["min"] <= result["ratio"]["median"] <= result["ratio"]["max"]
    shown = capsys.readouterr().out
    assert "tiny ViT" in shown and "holds" in shown and str(tmp_path) in shown.replace("\n", "")


def test_a_ratio_that_falls_short_is_a_failure(bench, monkeypatch, tmp_path, capsys):
    cases = small_cases(bench, least=1e9)[1:]
    monkeypatch.setitem(
        bench.BENCHES, "overhead", lambda blocks, folder: bench.overhead(blocks, folder, cases)
    )
    assert bench.main(["overhead", "--blocks=1", f"--out={tmp_path}"]) == 1
    assert "fails" in capsys.readouterr().out


def test_loops_that_compute_different_things_are_not_compared(bench, monkeypatch, tmp_path):
    case = small_cases(bench, least=0.0)[1]
    right = bench.prepared
    monkeypatch.setattr(bench, "prepared", lambda ours: (2 * right(ours)[0], right(ours)[1]))
    with pytest.raises(
        SystemExit,
        match="MLP: the first losses differ by up to .*: the two loops do not compute the same",
    ):
        bench.measure(dataclasses.replace(case, steps=1), 1, tmp_path / "case")


def test_the_character_step_is_measured_beside_another(bench, monkeypatch):
    """With ours in the place of PyTorch, which the tests do not install, and one small block."""

    class Theirs(bench.OurCharacters):
        name, version = "PyTorch", "none"

        def __init__(self, params, *, threads):
            assert set(params) >= {"embed", "positions", "block0"} and threads == 2
            super().__init__()

    for name, value in (("TorchCharacters", Theirs), ("DEPTH", 1), ("WIDTH", 8), ("HEADS", 2)):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench.os, "sched_setaffinity", lambda process, cores: None)
    monkeypatch.setattr(bench.host_memory, "keep_freed", lambda: True)
    found = bench.characters_here(bench.Cores("small", 2, steps=1), 2)
    assert found["largest_relative_difference_of_first_losses"] == 0
    speeds = found["steps_per_second"]
    ratios = np.divide(speeds["jaxtrain"]["values"], speeds["PyTorch"]["values"])
    np.testing.assert_allclose(found["ratio"]["values"], ratios)


def test_turns_alternate(bench):
    begun = []

    class Contestant:
        def __init__(self, name: str) -> None:
            self.name = name

        def block(self, steps: int) -> None:
            begun.append(self.name * steps)

    seconds, cpu_seconds = bench.take_turns([Contestant("a"), Contestant("b")], 2, 3)
    assert begun == ["aa", "bb", "bb", "aa", "aa", "bb"]
    assert {name: len(times) for name, times in (seconds | cpu_seconds).items()} == {"a": 3, "b": 3}


def test_examples_in_docstrings(bench):
    assert doctest.testmod(bench).failed == 0


def test_bad_arguments_are_refused(bench, capsys):
    for argv, text in (
        (["speed"], "invalid choice: 'speed'"),
        (["overhead", "--blocks=0"], "--blocks=0: must be >= 1"),
        (["overhead", "--cores=1"], "--cores=1: is of characters"),
    ):
        with pytest.raises(SystemExit, match="2"):
            bench.main(argv)
        assert text in capsys.readouterr().err
