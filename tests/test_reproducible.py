"""Reproducible training: the same bits on every number of devices and processes, and the
mathematics that logical shards are.

The default tests compare layouts inside this process; the slow ones start whole runs by their
command lines, as users do.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import augment
from jaxtrain.adapters import functions
from jaxtrain.checkpoints import arrays, checkpoints
from jaxtrain.data.order import Shuffled
from jaxtrain.losses import cross_entropy
from jaxtrain.models import convnet, mlp, vit
from jaxtrain.optimizers import SGD, AdamW
from jaxtrain.parallel import mesh, sharding
from jaxtrain.tasks import Classification
from jaxtrain.train import lowering, reproducible, state, train_step
from jaxtrain.train import steps as train_steps
from jaxtrain.train.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
RANDOM = np.random.default_rng(0)
DATA = {
    "image": RANDOM.normal(size=(48, 8, 8, 1)).astype(np.float32),
    "label": RANDOM.integers(0, 10, 48).astype(np.int32),
}
LAYOUTS = ("data:1", "fsdp:2", "data:4")


class Dividing:
    """A model that divides by a broadcast number, which XLA rewrites differently in programs for
    one device and for many; a pair of functions."""

    def init(self, key: jax.Array, inputs: jax.Array) -> dict[str, jax.Array]:
        """One matrix and one bias."""
        return {"kernel": jax.random.normal(key, (64, 10)) * 0.1, "bias": jnp.zeros(10)}

    def apply(self, params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
        """Features divided by their norm, times the matrix."""
        flat = inputs.reshape(inputs.shape[0], -1)
        scaled = flat / (jnp.sqrt(jnp.sum(flat * flat, axis=1, keepdims=True)) + 0.1)
        return jnp.tanh(scaled @ params["kernel"]) / 0.3 + params["bias"][None]


DIVIDING = Dividing()
MODELS: dict[str, Any] = {
    "mlp": mlp.MLP(widths=(16,), norm="layer", dropout=0.1),
    "cnn": convnet.ConvNet(widths=(4, 8), dropout=0.2),
    "vit": vit.ViT(patch=4, width=12, depth=1, heads=3, dropout=0.1),
    "own": (DIVIDING.init, DIVIDING.apply),
}


def trained(
    model: Any, layout: str, *, steps: int = 3, shards: int = 8, **options: Any
) -> tuple[str, dict[str, tuple[float, float]], Any]:
    """Digest, last sums and evaluation sums after a few steps over resident data on one layout."""
    where = mesh.make(layout)
    parts = (model, Classification(label_smoothing=0.1), AdamW(learning_rate=0.01))
    options = {
        "clip_norm": 0.5,
        "ema_decay": 0.9,
        "augment": augment.ImageAugment(crop_padding=1, mixup=0.4),
        "order": Shuffled(48),
    } | options
    batch = {
        name: jax.ShapeDtypeStruct((16, *array.shape[1:]), array.dtype)
        for name, array in DATA.items()
    }
    whole = state.init_state(*parts, batch, **options)
    like = lowering.lower(Recipe(*parts, **options), batch, where).state
    now = arrays.to_devices(arrays.to_host(whole), like)
    trainer = reproducible.Trainer(Recipe(*parts, **options), where, shards)
    data = jax.device_put(DATA, sharding.replicated(where))
    copies = trainer.copies(now)
    for _ in range(steps):
        copies, sums = trainer.step(copies, trainer.draw(copies, data, 16))
    now = trainer.joined(copies, now)
    assert [leaf.sharding for leaf in jax.tree.leaves(now)] == [
        leaf.sharding for leaf in jax.tree.leaves(like)
    ]
    held_out = {name: array[:16] for name, array in DATA.items()}
    evaluated = reproducible.make_eval_step(*parts, mesh=where, shards=shards, **options)(
        now, held_out
    )
    return checkpoints.digest(now), jax.device_get(sums), jax.device_get(evaluated)


@pytest.mark.parametrize(
    "name",
    [
        "own",
        pytest.param("cnn", marks=pytest.mark.slow),
        pytest.param("vit", marks=pytest.mark.slow),
    ],
)
def test_the_same_bits_on_other_meshes(name: str) -> None:
    """Every program is compiled for each device, hence the slow marks; whole runs are compared
    below."""
    first, *others = (trained(MODELS[name], layout) for layout in LAYOUTS)
    for other in others:
        assert other == first


@pytest.mark.slow
def test_the_same_bits_in_bf16() -> None:
    first, other = (
        trained(MODELS["vit"], layout, precision="bf16") for layout in ("data:1", "data:2")
    )
    assert other == first


class Narrow:
    """A model whose parameters, and so its gradients, are bfloat16; a pair of functions."""

    def init(self, key: jax.Array, inputs: jax.Array) -> dict[str, jax.Array]:
        """One matrix."""
        return {"kernel": (jax.random.normal(key, (64, 10)) * 0.1).astype(jnp.bfloat16)}

    def apply(self, params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
        """A product."""
        return inputs.reshape(inputs.shape[0], -1).astype(jnp.bfloat16) @ params["kernel"]


def test_parameters_of_16_bits_are_summed_in_32() -> None:
    narrow = Narrow()
    first, other = (
        trained((narrow.init, narrow.apply), layout, ema_decay=None, augment=None)
        for layout in ("data:1", "data:4")
    )
    assert other == first
    packed = reproducible.pack(
        {"a": jnp.full(2, 1.5, jnp.bfloat16), "b": jnp.ones(1), "c": jnp.ones(1, jnp.int32)}
    )
    assert {name: row.shape for name, row in packed.items()} == {"float32": (1, 3), "int32": (1, 1)}


def test_an_fsdp_step_compiles_once() -> None:
    parts, where = (MODELS["own"], Classification(), SGD(learning_rate=0.1)), mesh.make("fsdp:2")
    batch = {name: array[:16] for name, array in DATA.items()}
    now = state.init_state(*parts, batch, mesh=where)
    made = reproducible.make_train_step(*parts, mesh=where)
    seen: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: seen.append(event))

    def compiled() -> int:
        return sum("backend_compile" in event for event in seen)

    now, _ = made(now, batch)
    first = compiled()
    made(now, batch)
    assert first > 0 and compiled() == first


def test_a_batch_that_cannot_be_cut_is_refused_and_examples_draw_their_own() -> None:
    recipe = Recipe(
        MODELS["own"], Classification(), SGD(), augment=augment.ImageAugment(crop_padding=2)
    )
    trainer = reproducible.Trainer(recipe, mesh.make("data:1"), 8)
    with pytest.raises(
        ValueError, match=r"^--logical_shards=8: must divide --batch_size=12; use another of both$"
    ):
        trainer.cut({name: array[:12] for name, array in DATA.items()})
    batch = {name: jnp.asarray(array[:16]) for name, array in DATA.items()}
    now = state.init_state(
        recipe.model, recipe.task, recipe.optimizer, batch, augment=recipe.augment
    )
    whole = train_step.augmented(recipe, now, batch)["image"]
    parts = [
        train_step.augmented(
            recipe,
            now,
            {name: array[4 * shard : 4 * shard + 4] for name, array in batch.items()},
            jnp.uint32(shard),
        )["image"]
        for shard in range(4)
    ]
    np.testing.assert_array_equal(jnp.concatenate(parts), whole)


def test_shards_that_are_no_power_of_two() -> None:
    """12 shards on 1, 2 and 3 devices: subtrees that no device holds whole."""

    def run(layout: str) -> Any:
        where = mesh.make(layout)
        parts = (MODELS["own"], Classification(), SGD(learning_rate=0.1))
        batch = {name: array[:24] for name, array in DATA.items()}
        now = arrays.to_devices(
            arrays.to_host(state.init_state(*parts, batch)),
            jax.eval_shape(lambda: state.init_state(*parts, batch, mesh=where)),
        )
        now = jax.device_put(now, sharding.replicated(where))
        made = reproducible.make_train_step(*parts, mesh=where, shards=12)
        for _ in range(2):
            now, _ = made(now, batch)
        return checkpoints.digest(now)

    assert run("data:1") == run("data:2") == run("data:3")


def test_a_step_is_the_plain_step_where_nothing_draws_or_averages() -> None:
    """Without dropout, mixtures and batch statistics, logical shards are the plain mathematics,
    summed in another order."""
    parts = (
        vit.ViT(patch=4, width=12, depth=1, heads=3),
        Classification(),
        AdamW(learning_rate=0.01),
    )
    batch = {name: array[:16] for name, array in DATA.items()}
    where = mesh.make("data:2")
    one, sums = reproducible.make_train_step(*parts, mesh=where)(
        jax.device_put(state.init_state(*parts, batch), sharding.replicated(where)), batch
    )
    other, plain = train_steps.make_train_step(*parts)(state.init_state(*parts, batch), batch)
    for name, (total, count) in jax.device_get(plain).items():
        np.testing.assert_allclose(jax.device_get(sums[name]), (total, count), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        jax.device_get(one.params),
        jax.device_get(other.params),
    )


def test_batch_statistics_are_those_of_each_shard() -> None:
    """Ghost batch norm by hand: each shard normalised alone, the loss summed, the running averages
    averaged."""
    model = convnet.ConvNet(widths=(4,))
    parts = (model, Classification(), SGD(learning_rate=0.1))
    batch = {name: array[:16] for name, array in DATA.items()}
    where = mesh.make("data:1")
    start = state.init_state(*parts, batch)
    before = jax.device_get(start)
    after, sums = reproducible.make_train_step(*parts, mesh=where, shards=4)(
        jax.device_put(start, sharding.replicated(where)), batch
    )
    losses, averages = [], []
    for part in range(4):
        rows = slice(4 * part, 4 * part + 4)
        outputs, found = functions(model).apply(
            {"params": before.params} | before.collections, batch["image"][rows], train=True
        )
        losses.append(float(cross_entropy(outputs, jnp.asarray(batch["label"][rows])).sum()))
        averages.append(jax.device_get(found["batch_stats"]))
    assert float(sums["loss"][0]) == pytest.approx(sum(losses), rel=1e-5)
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *averages)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.device_get(after.collections["batch_stats"]),
        expected,
    )


def test_mixup_partners_and_weights_are_of_the_shard() -> None:
    mixed = augment.ImageAugment(mixup=0.4)
    recipe = Recipe(MODELS["mlp"], Classification(), SGD(), augment=mixed)
    batch = {name: array[:16] for name, array in DATA.items()}
    now = state.init_state(recipe.model, recipe.task, recipe.optimizer, batch, augment=mixed)
    parts = [
        {name: jnp.asarray(array[4 * shard : 4 * shard + 4]) for name, array in batch.items()}
        for shard in range(4)
    ]
    found = [
        train_step.augmented(recipe, now, part, jnp.uint32(shard))
        for shard, part in enumerate(parts)
    ]
    assert [each["label_other"].tolist() for each in found] == [
        part["label"][::-1].tolist() for part in parts
    ]
    assert len({float(each["label_weight"][0]) for each in found}) == 4
    trainer = reproducible.Trainer(recipe, mesh.make("data:2"), 4)
    assert [[part["label"].tolist() for part in parts] for parts in trainer.cut(batch)] == [
        [batch["label"][:4].tolist(), batch["label"][4:8].tolist()],
        [batch["label"][8:12].tolist(), batch["label"][12:].tolist()],
    ]


def test_the_tree_of_additions() -> None:
    """Against the same tree in NumPy; the plain order gives other bits, or this would prove
    nothing."""
    values = RANDOM.normal(size=(8, 1000)).astype(np.float32)
    pairs = [values[i] + values[i + 1] for i in range(0, 8, 2)]
    expected = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3])
    assert np.asarray(reproducible.tree_sum(list(values))).tobytes() == expected.tobytes()
    in_order = values[0]
    for row in values[1:]:
        in_order = in_order + row
    assert in_order.tobytes() != expected.tobytes()


@pytest.mark.parametrize(
    ("layout", "shards", "batch", "message"),
    [
        (
            "tensor:2",
            8,
            16,
            (
                "--reproducible: the mesh axis tensor splits single sums, whose bits then depend on"
                " it; use data and fsdp"
            ),
        ),
        (
            "data:8",
            4,
            16,
            (
                "--logical_shards=4: must be a multiple of the 8 devices; use --logical_shards=8 or"
                " fewer devices"
            ),
        ),
        (
            "data:3",
            8,
            24,
            (
                "--logical_shards=8: must be a multiple of the 3 devices; use --logical_shards=3 or"
                " fewer devices"
            ),
        ),
    ],
)
def test_what_cannot_be_reproduced_is_refused(
    layout: str, shards: int, batch: int, message: str
) -> None:
    recipe = Recipe(MODELS["mlp"], Classification(), SGD())
    for refused in (
        lambda: reproducible.check(mesh.make(layout), shards, batch),
        lambda: reproducible.Trainer(recipe, mesh.make(layout), shards),
    ):
        with pytest.raises(ValueError, match="^--") as caught:
            refused()
        assert str(caught.value) == message


EXPERIMENTS = {
    "mlp": ["experiments/digits.py", "--model=mlp", "--model.widths=32"],
    "cnn": [
        "experiments/digits.py",
        "--model.widths=8,16",
        "--model.dropout=0.2",
        "--augment.mixup=0.2",
    ],
    "transformer": [
        "experiments/markov.py",
        "--model.width=16",
        "--model.depth=1",
        "--model.heads=2",
        "--data.examples=512",
        "--data.length=16",
        "--data.test_examples=64",
        "--model.dropout=0.1",
    ],
}
PLACES = [
    (1, 1, "data:1"),
    (1, 2, "fsdp:2"),
    (1, 4, "data:2,fsdp:2"),
    (1, 8, "data:8"),
    (2, 1, "data:2"),
    (2, 4, "data:2,fsdp:4"),
    (4, 1, "data:4"),
]
"""Processes, devices of each, and the mesh."""


def group_command(arguments: list[str], processes: int, devices: int, workdir: Path) -> list[str]:
    """What starts a group of processes under a supervisor."""
    return [
        sys.executable,
        "-m",
        "jaxtrain.processes.supervisor",
        f"--processes={processes}",
        f"--devices={devices}",
        *arguments,
        f"--workdir={workdir}",
    ]


def group_environment(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of such a group: CPUs, compiled as a user's are, and what is given."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {"JAX_PLATFORMS": "cpu"} | dict(more)


def launch(
    arguments: list[str],
    processes: int,
    devices: int,
    workdir: Path,
    *,
    more: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """One run by its command line."""
    command = group_command(arguments, processes, devices, workdir)
    environ = group_environment(more or {})
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=900, check=False
    )


def digest_of(workdir: Path) -> str:
    """The digest that verify prints of the newest state, which must verify."""
    found = checkpoints.Checkpoints(workdir)
    problems: list[str] = []
    step = found.newest_verified(problems.append)
    assert step is not None and not problems
    return found.digest(step)


def metrics_of(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics without what a clock said."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: value
            for name, value in line.items()
            if not name.endswith(("_seconds", "_per_second"))
        }
        for line in lines
    ]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_whole_runs_are_equal_on_1_to_8_devices_and_1_to_4_processes(
    name: str, precision: str, tmp_path: Path
) -> None:
    found = []
    for processes, devices, layout in PLACES:
        workdir = tmp_path / f"{processes}x{devices}"
        arguments = [
            *EXPERIMENTS[name],
            "--steps=200",
            "--batch_size=32",
            "--reproducible",
            f"--precision={precision}",
            f"--mesh={layout}",
        ]
        done = launch(
            [*arguments, "--clip_norm=1", "--eval_every=0", "--noreport", "--notensorboard"],
            processes,
            devices,
            workdir,
        )
        assert done.returncode == 0, done.stderr
        found.append((digest_of(workdir), metrics_of(workdir)))
        print(name, precision, processes, devices, layout, found[-1][0], flush=True)
        assert found[-1] == found[0]


def test_a_run_of_two_processes_is_the_run_of_one(tmp_path: Path) -> None:
    arguments = [
        *EXPERIMENTS["mlp"],
        "--steps=4",
        "--eval_every=4",
        "--data.train=train[:20%]",
        "--batch_size=32",
        "--log_every=1",
        "--reproducible",
        "--noreport",
        "--notensorboard",
    ]
    # Code that is not optimised is made sooner; the slow sweep above has the users' flags.
    more = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    found = []
    for processes, devices in ((1, 1), (2, 1)):
        done = launch(arguments, processes, devices, tmp_path / str(processes), more=more)
        assert done.returncode == 0, done.stderr
        found.append((digest_of(tmp_path / str(processes)), metrics_of(tmp_path / str(processes))))
    assert found[0] == found[1]
