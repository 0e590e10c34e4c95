"""The public names: a type checker sees what Python finds, the package is typed, importing it costs
and changes nothing, and what is missing is named with the command that brings it."""

import ast
import importlib
import importlib.metadata
import json
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from jaxtrain import __main__ as command
from jaxtrain import data, extras
from jaxtrain.checkpoints import manifest
from jaxtrain.data.sources.records import write_records
from jaxtrain.errors import UserError
from jaxtrain.report.trackers import TensorBoardWriter
from jaxtrain.runner import main as runner_main

ROOT = Path(__file__).resolve().parent.parent
LAZY = ("jaxtrain", "jaxtrain.models", "jaxtrain.data")
"""The packages whose names are imported when they are first used."""
TABLE = "NAMES"
"""Made by these packages themselves, so it has no file."""


def seen_by_checkers(package: str) -> dict[str, str]:
    """Each name under `if TYPE_CHECKING:` of a package with the module that it is imported from."""
    file = importlib.import_module(package).__file__
    tree = ast.parse(Path(str(file)).read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    return {
        alias.asname or alias.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("jaxtrain")
        for alias in node.names
    }


@pytest.mark.parametrize("package", LAZY)
def test_checkers_see_the_names_that_python_finds(package: str) -> None:
    module, seen = importlib.import_module(package), seen_by_checkers(package)
    assert {*seen, TABLE} - {*module.__all__} <= {TABLE}
    assert {*module.__all__} - {*seen} <= {TABLE}
    assert {*module._FILES} == {name for name, source in seen.items() if source != package}
    assert dir(module) == sorted(module.__all__)
    for name, source in seen.items():
        assert getattr(module, name) is getattr(importlib.import_module(source), name), name
    with pytest.raises(AttributeError, match="no attribute 'Rnu'"):
        module.Rnu  # noqa: B018


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "jaxtrain" / "py.typed").is_file()
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in setuptools["package-data"]["jaxtrain"]


def test_importing_the_package_costs_and_changes_nothing() -> None:
    code = (
        "import json, os, sys; before = dict(os.environ); import jaxtrain, jaxtrain.models;"
        " import jaxtrain.data, jaxtrain.__main__; print(json.dumps([sorted(sys.modules),"
        " dict(os.environ) == before]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    modules, unchanged = json.loads(done.stdout)
    assert unchanged
    assert not {"jax", "flax", "numpy", "rich"} & {*modules}


def test_the_extras_are_those_of_the_project() -> None:
    """Every module in the table belongs to a package that its extra names."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for module, (package, extra) in extras.MODULES.items():
        names = {Requirement(line).name for line in groups["optional-dependencies"][extra]}
        assert package in names, module
        if module not in ("tensorflow", "lm_eval"):  # not installed for the tests
            brought = importlib.metadata.packages_distributions()[module.partition(".")[0]]
            assert package in map(str.lower, brought), module


NEEDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "sklearn": (lambda folder: data.Digits().open(), "scikit-learn; pip install 'jaxtrain[data]'"),
    "PIL": (
        lambda folder: data.Images(path=str(folder)).open(),
        "pillow; pip install 'jaxtrain[data]'",
    ),
    "tensorflow_datasets": (
        lambda folder: data.Tfds(name="mnist", data_dir=str(folder)).open(),
        "tensorflow-datasets; pip install 'jaxtrain[data]'",
    ),
    "array_record": (
        lambda folder: write_records(folder, {}),
        "array_record; pip install 'jaxtrain[data]'",
    ),
    "grain": (
        lambda folder: data.Records(path=str(folder)).open(),
        "grain; pip install 'jaxtrain[data]'",
    ),
    "tensorboard": (TensorBoardWriter, "tensorboard; pip install 'jaxtrain[report]'"),
    "xxhash": (
        lambda folder: manifest.checksum(folder / "dataset.json"),
        "xxhash; pip install 'jaxtrain[checkpoints]'",
    ),
}


@pytest.mark.parametrize("module", NEEDS)
def test_a_missing_extra_is_named_with_its_command(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    monkeypatch.setitem(sys.modules, module, None)
    action, words = NEEDS[module]
    with pytest.raises(UserError) as caught:
        action(tmp_path)
    assert str(caught.value).endswith(words)


@pytest.mark.parametrize(
    ("arguments", "module", "said"),
    [
        (["verify"], "xxhash", "verify needs xxhash; pip install 'jaxtrain[checkpoints]'"),
        (
            ["verify"],
            "orbax",
            "verify needs orbax-checkpoint; pip install 'jaxtrain[checkpoints]'",
        ),
        (["report"], "matplotlib", "report needs matplotlib; pip install 'jaxtrain[report]'"),
    ],
)
def test_commands_name_what_is_missing(
    arguments: list[str],
    module: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.checkpoint", raising=False)
    assert command.main([*arguments, str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"jaxtrain: error: {said}\n"


def test_a_run_says_at_its_start_what_it_will_miss_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("matplotlib", "tensorboard", "xxhash"):
        monkeypatch.setitem(sys.modules, module, None)
    opened: list[str] = []
    monkeypatch.setattr(data.Digits, "open", lambda self: opened.append("data"))
    run = runpy.run_path(str(ROOT / "experiments" / "digits.py"))
    with pytest.raises(SystemExit) as ending:
        runner_main.main(run["experiment"](), [f"--workdir={tmp_path / 'W'}"])
    assert ending.value.code == 2 and not opened and not (tmp_path / "W").exists()
    assert capsys.readouterr().err == (
        "jaxtrain: error: this run needs xxhash, matplotlib, tensorboard;"
        " pip install 'jaxtrain[checkpoints,report]'\n"
    )


def test_a_model_and_a_step_need_the_core_only() -> None:
    """The other packages cannot be imported here: a model, an optimizer and a step still work."""
    # Flax itself needs these two.
    others = {module.partition(".")[0] for module in extras.MODULES} - {"orbax", "rich"}
    code = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(others)!r}))
import jax.numpy as jnp
import jaxtrain
from jaxtrain import optimizers, tasks
from jaxtrain.models import MLP
parts = MLP(num_classes=3, widths=(4,)), tasks.Classification(), optimizers.AdamW()
batch = {{"image": jnp.ones((4, 5)), "label": jnp.zeros(4, jnp.int32)}}
state = jaxtrain.init_state(*parts, batch)
state, sums = jaxtrain.make_train_step(*parts)(state, batch)
print(int(state.step), sorted(sums))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout == "1 ['accuracy', 'grad_norm', 'learning_rate', 'loss']\n", done.stderr
