"""Run records without addresses: the same value has the same record in every process, another
value another one, and what an error says about going on can be done."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_run import lines, start, toy

from jaxtrain import config
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.config import flags, settings
from jaxtrain.config import record as run_record
from jaxtrain.config.identity import identity
from jaxtrain.models import MLP

ROOT = Path(__file__).resolve().parents[1]

VALUES = """
import dataclasses, enum, functools, pathlib
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, optax
from jaxtrain.config.identity import identity
from jaxtrain.models import MLP


class Color(enum.Enum):
    RED = 1


class Holder:
    def __init__(self, scale):
        self.scale, self.words = scale, {"c", "a", "b"}

    def act(self, x):
        return x * self.scale


def scaled(by):
    def act(x):
        return x * by

    return act


class Net(nn.Module):
    activation: object = nn.gelu
    norm: type = nn.LayerNorm


VALUES = {
    "function": nn.gelu, "jitted": nn.silu, "custom_jvp": nn.relu, "class": nn.LayerNorm,
    "partial": functools.partial(nn.gelu, approximate=False), "method": Holder(2.0).act,
    "classmethod": dict.fromkeys, "builtin": [].append, "closure": scaled(3.0),
    "initializer": nn.initializers.normal(0.02), "optax": optax.adamw(1e-3, weight_decay=0.1),
    "schedule": optax.warmup_cosine_decay_schedule(0, 1, 10, 100), "vmap": jax.vmap(jnp.sin),
    "lambda": lambda x: x in {"tanh", "relu", "gelu"} or x + 1, "ufunc": np.tanh,
    "jit_lambda": jax.jit(lambda x: x * 2), "dtype": jnp.bfloat16, "numpy_dtype": np.dtype("int8"),
    "array": jnp.arange(3.0), "key": jax.random.key(3), "number": np.float32(0.5),
    "enum": Color.RED, "path": pathlib.Path("/a/b"), "set": {"x", "y", "zz"},
    "mapping": {"b": {1, 2}, "a": nn.relu}, "module": Net(), "object": Holder(1.0),
}
"""
SHOW = "import json; print(json.dumps({name: identity(value) for name, value in VALUES.items()}))"


def in_a_process(hash_seed: int) -> dict[str, str]:
    """What a new process says of all values."""
    environ = os.environ | {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", VALUES + SHOW],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_a_value_has_one_identity_in_all_processes() -> None:
    first, second = in_a_process(1), in_a_process(2)
    assert first == second
    assert not [text for text in first.values() if re.search(r"0x[0-9a-f]{5,}", text)]
    assert len(set(first.values())) == len(first)
    assert first["function"] == "jax._src.nn.functions.gelu"
    assert first["closure"] == "__main__.scaled.<locals>.act(by=3.0)"
    assert first["initializer"].startswith("jax._src.nn.initializers.normal.<locals>.init(stddev=")
    assert (
        first["method"]
        == "__main__.Holder.act of __main__.Holder(scale=2.0, words={'a', 'b', 'c'})"
    )


def _scaled(by: float) -> Callable[[Any], Any]:
    return lambda x: x * by


DIFFERENT: list[tuple[Any, Any]] = [
    (lambda x: x + 1, lambda x: x + 2),
    (lambda x: jnp.sin(x), lambda x: jnp.cos(x)),
    (lambda x, y=1: x + y, lambda x, y=2: x + y),
    (_scaled(1.0), _scaled(2.0)),
    (jax.jit(lambda x: x), jax.jit(lambda x: -x)),
    (jax.vmap(jnp.sin), jnp.sin),
    (nn.initializers.normal(0.02), nn.initializers.normal(0.05)),
    (functools.partial(nn.gelu, approximate=True), functools.partial(nn.gelu, approximate=False)),
    (optax.adam(1e-3), optax.adam(1e-4)),
    (optax.chain(optax.sgd(0.1)), optax.chain(optax.sgd(0.1), optax.sgd(0.1))),
    (np.zeros(3), np.zeros(3, np.float32)),
    (np.array([1.0, 2.0]), np.array([1.0, 3.0])),
    (MLP(num_classes=3), MLP(num_classes=4)),
    ({"a": 1}, {"a": 2}),
    ((1, 2), [1, 2]),
    (1, True),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_values_have_different_identities(one: Any, other: Any) -> None:
    assert identity(one) != identity(other)
    assert identity(one) == identity(one)


def test_what_is_named_like_a_secret_is_not_shown() -> None:
    def with_key(api_key: str) -> Callable[[], str]:
        return lambda: api_key

    assert "hunter2" not in identity(with_key("hunter2"))
    assert "hunter2" not in identity(functools.partial(print, token="hunter2"))


class Lambdas(nn.Module):
    """A model with every kind of field that JSON cannot hold."""

    num_classes: int = 4
    activation: Any = lambda x: nn.relu(x) + 0.1
    kernel_init: Any = nn.initializers.normal(0.1)
    norm: Any = functools.partial(nn.LayerNorm, epsilon=1e-5)
    widths: Any = frozenset({8})
    dtype: Any = jnp.float32
    depth: int = np.int64(1)  # type: ignore[assignment]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = self.activation(self.norm()(nn.Dense(width, kernel_init=self.kernel_init)(x)))
        return nn.Dense(self.num_classes)(x)


def test_a_run_with_functions_in_its_parts_survives_json() -> None:
    run = toy(model=Lambdas(), offers={})
    record = json.loads(json.dumps(run_record.to_json(run)))
    assert record["model"]["depth"] == 1
    assert run_record.from_json(run, record) == run
    other = toy(model=Lambdas(activation=lambda x: nn.relu(x) + 0.2), offers={})
    changed = run_record.differences(record, run_record.to_json(other))
    assert [name for name, _, _ in changed] == ["model.activation"]


def test_a_model_that_is_no_component_is_identified() -> None:
    one, other = (toy(model=jax.tree_util.Partial(nn.relu, scale), offers={}) for scale in (1, 2))
    changed = run_record.differences(run_record.to_json(one), run_record.to_json(other))
    assert [name for name, _, _ in changed] == ["model"]


def test_what_an_older_version_did_not_record_is_at_its_default() -> None:
    run = toy()
    old = run_record.to_json(run)
    del old["model"]["dropout"], old["keep"], old["optimizer"]["b2"]
    known = run_record.completed(run, old)
    # The toy's own dropout is not the default of its class.
    assert run_record.differences(known, run_record.to_json(run)) == [("model.dropout", 0.0, 0.1)]


SCRIPT = """
import flax.linen as nn, jax, jax.numpy as jnp, jaxtrain
from jaxtrain import augment, optimizers, schedules
from jaxtrain.data.sources.synthetic import Synthetic
from jaxtrain.tasks import Classification


class Net(nn.Module):
    activation: object = nn.gelu
    kernel_init: object = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    names: object = frozenset({"one", "two", "three"})
    squash: object = lambda x: x if "a" in {"a", "b", "c"} else -x

    @nn.compact
    def __call__(self, x):
        x = self.activation(nn.Dense(8, kernel_init=self.kernel_init)(x.reshape(len(x), -1)))
        return nn.Dense(4)(self.squash(x))


if __name__ == "__main__":
    jaxtrain.main(
        jaxtrain.Run(
            name="lambdas", model=Net(), task=Classification(), batch_size=16,
            data=Synthetic(shape=(4, 4, 1), num_classes=4, examples=64, test_examples=16),
            optimizer=optimizers.SGD(), schedule=schedules.Constant(), steps=4,
            augment=augment.NoAugment(), tensorboard=False, report=False, mesh="data:1",
        )
    )
"""


@pytest.mark.slow
def test_a_run_with_functions_goes_on_in_another_process(tmp_path: Path) -> None:
    script = tmp_path / "lambdas.py"
    script.write_text(SCRIPT)
    for seed, steps in ((1, 4), (2, 8)):
        environ = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, str(script), f"--workdir={tmp_path}/run", f"--steps={steps}"],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert "resumed from step 4\n" in done.stdout
    assert "0x" not in (tmp_path / "run" / "run.json").read_text()


def remedy_of(said: str) -> str:
    """The flag that an error offers."""
    [flag] = re.findall(r"or (--allow_config_change=\S+)$", said.strip())
    return flag


def restored(folder: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, by path."""
    checkpoints = Checkpoints(folder)
    return checkpoints._read(step, checkpoints.specs(step))


def test_what_the_error_offers_can_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arguments = tmp_path / "run", ["--keep=9", "--checkpoint_every=9"]
    assert start(folder, *arguments, "--steps=2") == 0
    for steps, change in ((4, "--ema_decay=none"), (6, "--optimizer=sgd"), (7, "--ema_decay=0.5")):
        name = change.partition("=")[0]
        arguments = [each for each in arguments if not each.startswith(name)] + [change]
        capsys.readouterr()
        assert start(folder, *arguments, f"--steps={steps}") == 2
        flag = remedy_of(capsys.readouterr().err)
        assert flag == f"--allow_config_change={name[2:]}"
        assert start(folder, *arguments, f"--steps={steps}", flag) == 0
        assert lines(folder)[-1]["step"] == steps
    assert "optimizer" not in capsys.readouterr().err
    before, after = restored(folder, 6), restored(folder, 7)
    assert not [path for path in before if path.startswith("ema")]
    # An average that begins on the way begins at the parameters of that moment.
    name = "head/kernel"
    decay = (1 + 6) / (10 + 6)  # as it is after step 6, where 0.5 would be more
    wanted = decay * before[f"params/{name}"] + (1 - decay) * after[f"params/{name}"]
    np.testing.assert_allclose(after[f"ema/{name}"], wanted, rtol=1e-6)


def test_another_seed_is_another_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, arguments = tmp_path / "run", ["--keep=9", "--checkpoint_every=9"]
    assert start(folder, *arguments, "--steps=2") == 0
    assert start(folder, *arguments, "--steps=3", "--seed=7") == 2
    flag = remedy_of(capsys.readouterr().err)
    assert start(folder, *arguments, "--steps=3", "--seed=7", flag) == 0
    state = restored(folder, 3)
    assert state["position/seed"] == 7 and state["position/offset"] == 3 * 16
    assert (state["key"] == jax.random.key_data(jax.random.key(7, impl="threefry2x32"))).all()


def test_a_run_that_was_lengthened_says_so_when_it_is_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert start(folder, "--steps=2", "--keep=3") == 0
    assert start(folder, "--steps=3", "--keep=4") == 0
    record = json.loads((folder / "run.json").read_text())
    [again] = record["resumed"]
    assert again["step"] == 2 and again["changes"] == {"steps": [2, 3]}
    capsys.readouterr()
    run = flags.parse(toy(), [f"--from_run={folder}"])
    assert run.steps == 3
    assert capsys.readouterr().err == (
        f"jaxtrain: warning: --from_run={folder}: was changed on its way (at step 2: steps from 2"
        " to 3); this run takes the last values from its first step on; --steps=2 repeats the first"
        " start\n"
    )


OTHER: dict[str, str] = {
    "seed": "3",
    "optimizer_state": "bf16",
    "precision": "bf16",
    "matmul_precision": "fp32",
    "optimizer": "sgd",
    "schedule": "constant",
    "data.train": "train[:70%]",
    "data.validation": "train[90%:]",
    "data.test": "train[80%:90%]",
    "data.shape": "2,8,1",
    "data.num_classes": "3",
    "model.norm": "layer",
    "model.activation": "gelu",
    "model.num_classes": "5",
    "model.widths": "20",
    "microbatches": "2",
    "logical_shards": "4",
}
"""Another value for the fields whose type does not say one."""


def other_value(setting: settings.Setting) -> str | None:
    """Another value of a setting, as it would be typed; None if there is none to try."""
    if setting.name in OTHER:
        return OTHER[setting.name]
    if isinstance(setting.value, bool):
        return str(not setting.value).lower()
    if isinstance(setting.value, int):
        return str(setting.value + 8)
    if isinstance(setting.value, float):
        return str(setting.value / 2 or 0.1)
    return "0.5" if setting.value is None else None


FIXED = (*config.marked(config.Mark.FREE), *config.marked(config.Mark.INVOCATION))
SETTINGS = [
    (setting.name, value)
    for setting in settings.of_run(toy())
    if setting.name not in FIXED and (value := other_value(setting)) is not None
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_every_offer_can_be_followed(
    name: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, "--steps=2") == 0
    capsys.readouterr()  # what the first run warns of is not what the second is refused for
    arguments = ["--steps=4", f"--{name}={value}"]
    assert start(tmp_path, *arguments) == 2, capsys.readouterr()
    said = capsys.readouterr().err
    if "use a new workdir" in said:
        assert name.startswith(("model.", "data.")) and "does not fit" in said
        return
    if "--allow_config_change" not in said:
        assert said.count("\n") == 1 and name in said  # not one that this model or data can have
        return
    assert start(tmp_path, *arguments, remedy_of(said)) == 0, capsys.readouterr()
    assert lines(tmp_path)[-1]["step"] == 4


def layer_times(factor: float) -> Any:
    class Net(nn.Module):
        width: int = 3

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return factor * nn.Dense(self.width)(x)

    return Net()


def pytree_times(factor: float) -> Any:
    class Tree(eqx.Module):
        bias: float = 0.0

        def __call__(self, x: jax.Array) -> jax.Array:
            return factor * x + self.bias

    return Tree()


@pytest.mark.parametrize("made", [layer_times, pytree_times])
def test_a_class_is_known_by_what_it_took_from_the_function_that_made_it(made: Any) -> None:
    records = []
    for factor in (2.0, 2.0, 3.0):
        run = config.Run(name="toy", steps=1, **dict.fromkeys(config.FAMILIES))
        records.append(run_record.to_json(dataclasses.replace(run, model=made(factor))))
    assert records[0] == records[1] != records[2]
    assert "factor=2.0" in str(records[0]["model"]) and " at 0x" not in str(records[0])
