"""The examples: five steps equal their own hand-written loops, on one device and on every mesh, and
each runs as a program.

`keys` are what the step gives the model at each step, see `jaxtrain/rng.py`; batches come as the
model sees them, prepared.
"""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain import rng
from jaxtrain.parallel import mesh as meshes
from jaxtrain.runner import build
from jaxtrain.train import compare_meshes, lowering
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.state import TrainState
from jaxtrain.tree import Batch

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "examples").glob("*.py"))
MESHES = ("data:8", "fsdp:8", "data:2xfsdp:4")
STEPS = 5
pytestmark = pytest.mark.usefixtures("rank_promotion")


@pytest.fixture
def rank_promotion() -> Iterator[None]:
    """People's own code adds a bias as NumPy does."""
    with jax.numpy_rank_promotion("allow"):
        yield


@dataclasses.dataclass(frozen=True)
class Opened:
    """An example with its data, its recipe and the first batches of its run."""

    module: ModuleType
    run: Any
    recipe: Recipe
    batches: list[dict[str, Any]]


@functools.cache
def opened(path: Path) -> Opened:
    spec = importlib.util.spec_from_file_location(f"examples.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their annotations there
    spec.loader.exec_module(module)
    run = dataclasses.replace(module.experiment(), precision="fp32")
    train = run.data.open().train
    recipe = build.recipe_of(run, train, build.lengths(run, len(train)))
    stream = build.host_batches(run, train, recipe)
    return Opened(module, run, recipe, [next(stream) for _ in range(STEPS)])


def trained(example: Opened, mesh: str) -> tuple[TrainState, list[float]]:
    """The first state, and the loss of each step on a mesh."""
    shapes = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype)
        for name, array in example.batches[0].items()
    }
    programs = lowering.lower(example.recipe, shapes, meshes.make(mesh))
    state = programs.initialize(example.run.seed)
    first, losses = jax.tree.map(np.asarray, dataclasses.replace(state, key=None)), []
    first = dataclasses.replace(first, key=state.key)
    for batch in example.batches:
        placed = {
            name: jax.device_put(
                array, lowering.laid_out({name: array}, programs.mesh)[name].sharding
            )
            for name, array in batch.items()
        }
        state, sums = programs.train_step(state, placed)
        total, count = sums["loss"]
        losses.append(float(total) / float(count))
    return first, losses


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_five_steps_equal_the_hand_written_loop(path: Path) -> None:
    example = opened(path)
    state, losses = trained(example, "data:1")
    root = rng.root(example.run.seed)
    keys = [
        jax.random.fold_in(rng.stream(root, "dropout", np.int32(step)), 0) for step in range(STEPS)
    ]

    def prepared(batch: Batch) -> Batch:
        return batch if example.recipe.prepare is None else example.recipe.prepare(dict(batch))

    batches = [prepared(jax.tree.map(jax.numpy.asarray, batch)) for batch in example.batches]
    start = jax.tree.map(jax.numpy.asarray, (state.params, state.collections))
    by_hand = example.module.by_hand(*start, batches, keys)
    np.testing.assert_allclose(losses, np.float64(list(by_hand)), rtol=1e-6)
    assert losses[-1] != losses[0]


def test_examples_are_short() -> None:
    assert len(FILES) == 10
    for path in FILES:
        assert len(path.read_text().splitlines()) < 60, path.name


def on_meshes(path: Path, steps: int) -> None:
    """Trains on each mesh and compares it with one device, as --compare_meshes does."""
    example = opened(path)
    found = compare_meshes.compare_recipe(
        example.recipe, iter(example.batches), MESHES, seed=example.run.seed, steps=steps
    )
    assert len(found.meshes) == len(MESHES)
    for each in found.meshes:
        assert found.agrees(each), f"{path.stem}: {each}"


@pytest.mark.parametrize("name", ["regression", "pmap_style"])
def test_trains_on_every_mesh(name: str) -> None:
    on_meshes(ROOT / "examples" / f"{name}.py", steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_five_steps_on_every_mesh(path: Path) -> None:
    on_meshes(path, steps=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_is_a_program(path: Path, tmp_path: Path) -> None:
    """As its first lines say, on eight devices and by --compare_meshes; the body of fine-tuning is
    trained first."""
    flags = ["--steps=2", "--mesh=data:2,fsdp:4", "--noreport"]
    compared = ["--compare_meshes=data:8,fsdp:8,data:2xfsdp:4", "--compare_steps=2"]
    runs = [flags, compared] if path.stem != "fine_tune" else [flags, flags, compared]
    environment = dict(os.environ)
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    for each in runs:
        done = subprocess.run(
            [sys.executable, str(path), *each],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
