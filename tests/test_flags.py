"""Flags and configuration: fields become flags with help, swaps bring their own, and run.json
repeats a run exactly."""

import contextlib
import dataclasses
import functools
import importlib
import json
import math
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.linen as nn
import hypothesis
import pytest
from absl import flags as absl_flags
from hypothesis import strategies

from jaxtrain import cli, config, fields, models
from jaxtrain.cli.main import help_text
from jaxtrain.cli.main import main as run_command
from jaxtrain.config import flags, marks, secrets, settings, values
from jaxtrain.config import record as run_record
from jaxtrain.errors import UserError
from jaxtrain.horizon import Horizon
from jaxtrain.runner import elsewhere, workdir


def relu(value: float) -> float:
    """Something that only Python can say."""
    return max(value, 0.0)


class Network(nn.Module):
    """A small network. It has no layers."""

    depth: fields.Count = 3
    """How deep it is."""
    widths: tuple[fields.Count, ...] = (8, 4)
    "How wide it is,\n    layer by layer."
    activation: Callable[[float], float] = relu
    dropout: fields.DropRate = 0.0
    """Share that is dropped."""


@dataclasses.dataclass(frozen=True)
class Cutting:
    """A part of a component."""

    size: fields.Count = 4
    """How large a cut is."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples from nowhere."""

    validation: str = "test"
    kind_of_noise: Literal["none", "white", 3] = "none"
    """What is added."""
    cutting: Cutting = Cutting()
    download: bool = False
    path: str = ""
    image_key: Annotated[str, fields.Public()] = ""


@dataclasses.dataclass(frozen=True)
class Base:
    """Every optimizer."""

    learning_rate: fields.Positive = 1e-3
    """The peak rate."""
    decay: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Adam(Base):
    """Adam."""

    b1: fields.Decay = 0.9
    token: str = ""
    vault: Annotated[str, fields.Secret()] = ""


@dataclasses.dataclass(frozen=True)
class Sgd(Base):
    """Plain descent."""

    momentum: fields.DropRate = 0.0
    """How much of the last step stays."""


def make_run(**changes: Any) -> config.Run:
    """A toy experiment."""
    run = config.Run(
        name="toy",
        model=Network(),
        data=Source(),
        task=None,
        optimizer=Adam(),
        schedule=None,
        augment=None,
        steps=100,
        offers={
            "model": {"small": Network(depth=1), "deep": Network(depth=9)},
            "optimizer": {"adam": Adam(), "sgd": Sgd(momentum=0.9)},
        },
    )
    return dataclasses.replace(run, **changes)


def test_fields_become_flags_of_their_types() -> None:
    run = flags.parse(
        make_run(),
        [
            "--batch_size=64",
            "--eval_only",
            "--notensorboard",
            "--eval_every",
            "2.5epochs",
            "--clip_norm=1e-1",
            "--profile_steps=3,5",
            "--allow_config_change=model.depth,seed",
            "-seed=7",
            "--model.depth=5",
            "--model.widths=1,2,3",
            "--data.cutting.size=9",
            "--data.download",
            "--data.kind_of_noise=3",
            "--optimizer.decay=a=b=0.5,.*=1",
            "--checkpoint_every=10%",
            "--ema_decay=none",
        ],
    )
    assert (
        run.batch_size,
        run.eval_only,
        run.tensorboard,
        run.clip_norm,
        run.profile_steps,
        run.seed,
    ) == (64, True, False, 0.1, (3, 5), 7)
    assert run.allow_config_change == ("model.depth", "seed")
    assert (run.eval_every, run.checkpoint_every) == (
        Horizon(2.5, "epochs"),
        Horizon(10, "percent"),
    )
    assert isinstance(run.model, Network)
    assert (run.model.depth, run.model.widths, run.model.activation) == (5, (1, 2, 3), relu)
    assert run.data == Source(cutting=Cutting(9), download=True, kind_of_noise=3)
    assert run.optimizer.decay == (("a=b", 0.5), (".*", 1.0))
    assert make_run().model.depth == 3  # the experiment's own run is untouched


def test_they_are_real_absl_flags() -> None:
    flag = flags.flags_of(make_run())["optimizer.learning_rate"]
    assert isinstance(flag, absl_flags.Flag)
    assert (flag.name, flag.default, flag.help, flag.serialize()) == (
        "optimizer.learning_rate",
        1e-3,
        "The peak rate.",
        "--optimizer.learning_rate=1e-3",
    )


def test_swapped_components_bring_their_own_flags() -> None:
    run = flags.parse(
        make_run(), ["--optimizer.momentum=0.5", "--optimizer", "sgd", "--model=deep"]
    )
    assert run.optimizer == Sgd(momentum=0.5)
    assert run.model.depth == 9


def test_steps_and_epochs_replace_each_other() -> None:
    assert (
        flags.parse(make_run(), ["--epochs=2"]).steps,
        flags.parse(make_run(), ["--epochs=2"]).epochs,
    ) == (None, 2.0)
    run = flags.parse(make_run(steps=None, epochs=3.0), ["--steps=7"])
    assert (run.steps, run.epochs) == (7, None)
    assert flags.parse(make_run(), ["--epochs=none"]).steps == 100


def test_help_lists_every_flag_with_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        flags.parse(make_run(), ["--model=deep", "--help", "--nonsense"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for expected in [
        "Training",
        "Model: A small network",
        "--model.depth=9",
        "How deep it is (int >= 1)",
        "--optimizer=adam",
        "(adam, sgd)",
        "--model.widths=8,4",
        "How wide it is, layer by layer",
        "--[no]data.download",
        "--data.cutting.size=4",
        "(none|white|3)",
        "Examples from nowhere",
        "--batch_size=128",
        "How many examples one step sees",
    ]:
        assert expected in " ".join(said.split()), expected
    assert "momentum" not in said
    assert "activation" not in said
    assert max(map(len, said.splitlines())) <= 140
    with pytest.raises(SystemExit):
        flags.parse(make_run(), ["--helpfull"])
    assert "With --optimizer=sgd: Plain descent\n" in (said := capsys.readouterr().out)
    assert "How much of the last step stays" in said


def test_every_flag_of_a_run_has_words() -> None:
    for setting in settings.of_run(make_run()):
        assert setting.help or "." in setting.name, setting.name


def test_every_field_of_a_run_bears_its_marks() -> None:
    """A field has a group in the help exactly if it is a plain flag."""
    groups = {
        field.name: [mark for mark in field.marks if isinstance(mark, config.Group)]
        for field in fields.fields_of(config.Run)
    }
    apart = {
        "name",
        "offers",
        "at_step",
        "at_evaluation",
        "model",
        "data",
        "task",
        "optimizer",
        "schedule",
        "augment",
        "lora",
    }
    assert {name for name, found in groups.items() if not found} == apart
    assert all(len(found) <= 1 for found in groups.values())
    assert {setting.name for setting in settings.of_run(make_run()) if "." not in setting.name} == (
        groups.keys() - apart
    )


# Written out once more, so that a mark is not changed by accident.
FREE_AT_RESUME = {
    *(
        "steps",
        "epochs",
        "tokens",
        "init_from",
        "init_rules",
        "mesh",
        "shard",
        "remat",
        "offload",
        "platform",
    ),
    *(
        "init_params",
        "init_checkpoint",
        "device_data",
        "debug_nans",
        "steps_per_call",
        "eval_every",
        "eval_batch_size",
    ),
    *("checkpoint_every", "keep", "keep_every", "log_every", "tensorboard", "wandb", "report"),
    *("evaluate", "best", "stop_after", "sample_every", "sample_prompt", "sample_tokens"),
}
ONE_STARTS_OWN = {
    *("compare_meshes", "compare_steps", "processes", "process", "coordinator", "hang_seconds"),
    *("max_restarts", "workdir", "resume", "from_run", "allow_config_change", "force_unlock"),
    *("eval_only", "profile_steps", "traceback", "checkpoint", "rewind"),
}


@pytest.mark.parametrize(
    "name", [setting.name for setting in settings.of_run(make_run()) if "." not in setting.name]
)
def test_what_may_change_at_resume(name: str) -> None:
    old, new = run_record.to_json(make_run()), make_run()
    old[name] = "something else"
    said = {"name": "toy", "config": old}
    if name in ONE_STARTS_OWN:
        assert workdir.check_drift(Path("W"), said, new) == []
    elif name in FREE_AT_RESUME:
        [line] = workdir.check_drift(Path("W"), said, new)
        assert line.startswith(f"note: {name} changes from something else to ")
    else:
        with pytest.raises(UserError, match=rf"--allow_config_change={name}$"):
            workdir.check_drift(Path("W"), said, new)


@pytest.mark.parametrize(
    ("annotation", "line"),
    [
        (int, "Made.size: bears 0 help groups; expected 1: "),
        (Annotated[int, config.Mark.FREE], "Made.size: bears 0 help groups; expected 1: "),
        (
            Annotated[int, config.Group.OUTPUT, config.Group.DEVICES],
            "Made.size: bears 2 help groups; expected 1: ",
        ),
        (
            Annotated[Any, config.Group.OUTPUT, config.Mark.FAMILY],
            "Made.size: bears 1 help groups; expected 0: ",
        ),
        (Annotated[int, config.Group.OUTPUT, "free"], "Made.size: 'free' is no mark of a field"),
        (
            Annotated[int, config.Group.OUTPUT, config.Mark.FREE, config.Mark.INVOCATION],
            "Made.size: bears FREE and INVOCATION; ",
        ),
    ],
)
def test_wrong_marks_are_refused(annotation: Any, line: str) -> None:
    with pytest.raises(TypeError, match=f"^{line}"):
        marks.check(dataclasses.make_dataclass("Made", [("size", annotation)]))


def test_marks_that_go_together_are_taken() -> None:
    good = Annotated[fields.Count | None, config.Group.OUTPUT, config.Mark.FREE]
    marks.check(dataclasses.make_dataclass("Made", [("size", good)]))


def test_docs_of_inherited_and_missing_fields() -> None:
    assert settings.field_docs(Sgd) == {
        "learning_rate": "The peak rate.",
        "momentum": "How much of the last step stays.",
    }
    made = dataclasses.make_dataclass("Made", [("size", int, 3)])
    assert (settings.field_docs(made), settings.summary(made)) == ({}, "")


# Everything that a flag can hold, by its type.
VALUES: dict[Any, strategies.SearchStrategy[Any]] = {
    int: strategies.integers(-(2**63) + 1, 2**63 - 1),
    float: strategies.floats(allow_nan=False, allow_infinity=False),
    bool: strategies.booleans(),
    Horizon: (
        strategies.builds(Horizon, strategies.floats(0, 1e300), strategies.just("epochs"))
        | strategies.builds(
            Horizon, strategies.integers(0, 10**15).map(float), strategies.just("steps")
        )
        | strategies.builds(Horizon, strategies.floats(0, 100), strategies.just("percent"))
    ),
    float | None: strategies.none() | strategies.floats(allow_nan=False, allow_infinity=False),
    Literal["a", "b", 3]: strategies.sampled_from(["a", "b", 3]),
    tuple[int, ...]: strategies.lists(strategies.integers(0, 99), max_size=4).map(tuple),
    tuple[int, float]: strategies.tuples(strategies.integers(0, 99), strategies.floats(0, 1)),
    tuple[tuple[str, float], ...]: (
        strategies.lists(
            strategies.tuples(strategies.text("ab=.*", min_size=1), strategies.floats(-1, 1))
        ).map(tuple)
    ),
}


@pytest.mark.parametrize("kind", VALUES, ids=str)
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=strategies.data())
def test_values_survive_text_and_json(kind: Any, data: strategies.DataObject) -> None:
    value = data.draw(VALUES[kind])
    for back in (
        values.read(values.text(value), kind),
        values.from_json(json.loads(json.dumps(values.to_json(value))), kind),
    ):
        assert back == value
        assert type(back) is type(value)
        assert not isinstance(value, float) or math.copysign(1, back) == math.copysign(1, value)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    text=strategies.text(max_size=12),
    name=strategies.sampled_from([setting.name for setting in settings.of_run(make_run())]),
)
def test_any_text_gives_a_value_or_one_line(text: str, name: str) -> None:
    if name in config.marked(config.Mark.PATH):
        return
    try:
        flags.parse(make_run(), [f"--{name}={text}"])
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).startswith("--")


@dataclasses.dataclass(frozen=True)
class Bounded:
    """A field of each bound."""

    above: fields.Positive = 1.0
    at_least: fields.Count = 1
    optional: fields.Count | None = None
    outside: Annotated[fields.Count | None, fields.Public()] = None
    between: fields.Probability = 0.0
    open_above: fields.DropRate = 0.0
    whole: Annotated[int, fields.Between(0, 9, whole=True)] = 0
    items: tuple[fields.Count, ...] = ()
    pairs: tuple[tuple[str, fields.NonNegative], ...] = ()
    length: Horizon = Horizon(1)
    number: int | float = 0


INSIDE_AND_OUTSIDE: dict[str, tuple[list[Any], list[Any]]] = {
    "above": ([1e-9, 2.0], [0.0, -1.0, math.inf, math.nan]),
    "at_least": ([1, 2**63 - 1], [0, -1, 2**63]),
    "optional": ([1, None], [0, 2**63]),
    "outside": ([1, None], [0]),
    "between": ([0.0, 1.0], [-0.1, 1.1, math.nan]),
    "open_above": ([0.0, 0.9], [1.0, -0.1]),
    "whole": ([0, 9], [-1, 10]),
    "items": ([(), (1, 2)], [(0,), (1, 0)]),
    "pairs": ([(("a", 0.0),)], [(("a", -1.0),), (("a", 1.0), ("b", math.inf))]),
    "length": ([Horizon(0), Horizon(5, "percent")], [Horizon(-1), Horizon(math.inf, "epochs")]),
    "number": ([0.5], [math.nan]),
}


@pytest.mark.parametrize("name", INSIDE_AND_OUTSIDE)
def test_flags_components_and_json_have_the_same_bounds(name: str) -> None:
    field = next(field for field in fields.fields_of(Bounded) if field.name == name)
    for number, valid in enumerate(INSIDE_AND_OUTSIDE[name]):
        for value in valid:
            component = dataclasses.replace(Bounded(), **{name: value})
            calls: list[Callable[[], Any]] = [
                functools.partial(fields.check, component),
                functools.partial(values.read, values.text(value), field.type, field.marks),
                functools.partial(values.from_json, values.to_json(value), field.type, field.marks),
            ]
            for call in calls:
                with contextlib.nullcontext() if number == 0 else pytest.raises(UserError):
                    call()


def test_every_bound_is_tried() -> None:
    assert set(INSIDE_AND_OUTSIDE) == {field.name for field in dataclasses.fields(Bounded)}


def test_a_run_survives_json() -> None:
    run = flags.parse(
        make_run(),
        [
            "--optimizer=sgd",
            "--optimizer.learning_rate=0.1",
            "--model.widths=3",
            "--eval_every=3",
            "--steps=12",
            "--seed=9",
        ],
    )
    record = json.loads(json.dumps(run_record.to_json(run)))
    again = run_record.from_json(make_run(), record)
    assert again == run
    assert run_record.to_json(again) == record
    assert record["model"] == {
        "kind": "small",
        "depth": 3,
        "widths": [3],
        "activation": {"python": f"{__name__}.relu"},
        "dropout": 0.0,
    }


def test_kinds_are_the_nearest_names() -> None:
    assert run_record.kind_of(make_run(model=Network(depth=9, dropout=0.5)), "model") == "deep"
    assert run_record.kind_of(make_run(), "data") == "Source"


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (["seed"], "1", "seed='1' is a str; expected int 0..4294967295"),
        (["seed"], True, "seed=true is a bool; expected int 0..4294967295"),
        (["seed"], -1, "seed=-1: must be 0..4294967295"),
        (["model", "depth"], 2.0, "model.depth=2.0 is a float; expected int >= 1"),
        (["model", "depth"], 0, "model.depth=0: must be >= 1"),
        (["model", "widths"], [1, "2"], 'model.widths=[1, "2"] is a str; expected int >= 1'),
        (
            ["model", "activation"],
            {"python": "os.system"},
            (
                'model.activation={"python": "os.system"}: only the experiment\'s Python can set'
                f' it, and it says {{"python": "{__name__}.relu"}}'
            ),
        ),
        (
            ["model", "kind"],
            "os.system",
            "model.kind='os.system': unknown; valid: Network, small, deep",
        ),
        (["model", "depht"], 3, "unknown field model.depht; did you mean 'depth'?"),
        (["model"], 3, "model is not a component; expected an object with a kind"),
        (
            ["data", "cutting", "size"],
            None,
            "data.cutting.size=null is a NoneType; expected int >= 1",
        ),
        (
            ["eval_every"],
            "often",
            "eval_every='often': not a horizon; expected e.g. 200, 200steps, 2epochs or 5%",
        ),
        (["eval_every"], 3, "eval_every=3 is a int; expected steps, epochs or %"),
        (
            ["data", "kind_of_noise"],
            True,
            "data.kind_of_noise=true: unknown; valid: none, white, 3",
        ),
        (["resume"], "perhaps", None),
        (["clip_norm"], float("nan"), "clip_norm=NaN: must be finite"),
    ],
)
def test_json_is_read_strictly(path: list[str], value: Any, line: str | None) -> None:
    record = run_record.to_json(make_run())
    inner = record
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    if line is None:  # how one start behaved is not taken over
        assert run_record.from_json(make_run(), record) == make_run()
        return
    with pytest.raises(ValueError) as caught:
        run_record.from_json(make_run(), record)
    assert str(caught.value) == line


def test_json_lacks_nothing() -> None:
    record = run_record.to_json(make_run())
    assert set(record) == {field.name for field in dataclasses.fields(config.Run)} - {
        "name",
        "offers",
        "at_step",
        "at_evaluation",
    }
    del record["optimizer"]["b1"]
    with pytest.raises(
        ValueError,
        match=r"^lacks optimizer.b1; it was written by another version of this experiment$",
    ):
        run_record.from_json(make_run(), record)


def test_paths_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.json").write_text(
        json.dumps({"name": "toy", "config": run_record.to_json(make_run())})
    )
    run = flags.parse(make_run(), ["--workdir=~/new", "--from_run=~", "--init_from", "~/run.json"])
    assert (run.workdir, run.from_run, run.init_from) == (
        f"{tmp_path}/new",
        str(tmp_path),
        f"{tmp_path}/run.json",
    )


def test_from_run_repeats_a_run_and_flags_override(tmp_path: Path) -> None:
    run = flags.parse(
        make_run(),
        [
            "--optimizer=sgd",
            "--optimizer.momentum=0.3",
            "--epochs=3",
            f"--workdir={tmp_path}",
            "--resume=never",
        ],
    )
    (tmp_path / "run.json").write_text(
        json.dumps({"name": "toy", "config": run_record.to_json(run)})
    )
    again = flags.parse(
        make_run(), [f"--from_run={tmp_path}", "--optimizer.decay=a=0", "--steps=5"]
    )
    assert again.optimizer == Sgd(momentum=0.3, decay=(("a", 0.0),))
    assert (again.steps, again.epochs, again.workdir, again.resume, again.from_run) == (
        5,
        None,
        "",
        "auto",
        str(tmp_path),
    )
    plain = flags.parse(make_run(), ["--from_run", str(tmp_path)])
    assert run_record.differences(run_record.to_json(run), run_record.to_json(plain)) == []
    swapped = flags.parse(make_run(), [f"--from_run={tmp_path}", "--optimizer=adam"])
    assert swapped.optimizer == Adam()


def test_differences_name_what_changed() -> None:
    old = run_record.to_json(make_run())
    new = run_record.to_json(
        flags.parse(
            make_run(),
            [
                "--model.depth=8",
                "--optimizer=sgd",
                "--batch_size=4",
                "--resume=must",
                "--data.cutting.size=1",
            ],
        )
    )
    assert run_record.differences(old, old) == []
    # depth 8 is nearest to `small` still, by how many fields differ, so only the field counts
    assert sorted(run_record.differences(old, new)) == [
        ("batch_size", 128, 4),
        ("data.cutting.size", 4, 1),
        ("model.depth", 3, 8),
        ("optimizer", "adam", "sgd"),
    ]


def test_secrets_are_never_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are marked, and those that are only named so."""
    argv = ["--optimizer.token=abc", "--optimizer.vault", "xyz", "--data.image_key=pixels"]
    run = flags.parse(make_run(), [*argv, "--data.path=https://me:pw@host/x"])
    warned = capsys.readouterr().err
    assert "JAXTRAIN_OPTIMIZER_TOKEN\n" in warned and "JAXTRAIN_OPTIMIZER_VAULT\n" in warned
    assert "KEY" not in warned
    record = json.dumps(run_record.to_json(run))
    assert not any(secret in record for secret in ("abc", "xyz", "pw"))
    assert "https://<redacted>@host/x" in record and '"image_key": "pixels"' in record
    kept = run_record.from_json(
        make_run(optimizer=Adam(token="own", vault="mine")), json.loads(record)
    )
    assert (kept.optimizer.token, kept.optimizer.vault) == ("own", "mine")
    assert (kept.data.path, kept.data.image_key) == ("", "pixels")
    environment = {"JAXTRAIN_OPTIMIZER_VAULT": "from the environment"}
    assert flags.parse(make_run(), [], environment).optimizer.vault == "from the environment"
    assert secrets.redact(["x.py", *argv, "--data.path=s3://k:s@b/x", "--api_key=q"], run) == [
        "x.py",
        "--optimizer.token=<redacted>",
        "--optimizer.vault",
        "<redacted>",
        "--data.image_key=pixels",
        "--data.path=s3://<redacted>@b/x",
        "--api_key=<redacted>",
    ]


@pytest.mark.parametrize(
    "family", ["models", "data", "tasks", "optimizers", "schedules", "augment"]
)
def test_every_named_component_has_words_and_survives_text_and_json(family: str) -> None:
    names = importlib.import_module(f"jaxtrain.{family}").NAMES
    field = "data" if family == "data" else family.removesuffix("s")
    for name, component in names.items():
        run = make_run(**{field: component, "offers": {field: names}})
        for setting in settings.of_component(component):
            assert setting.help, (name, setting.name)
            assert (
                values.read(values.text(setting.value), setting.field.type, setting.field.marks)
                == setting.value
            ), (
                name,
                setting.name,
            )
        assert settings.summary(type(component)), name
        assert (
            run_record.from_json(
                make_run(**{field: next(iter(names.values())), "offers": {field: names}}),
                run_record.to_json(run),
            )
            == run
        )


def test_models_that_are_no_dataclass_have_no_flags() -> None:
    run = make_run(model=(relu, relu), offers={})
    assert flags.parse(run, ["--seed=1"]).model == (relu, relu)
    assert run_record.from_json(run, run_record.to_json(run)) == run
    with pytest.raises(
        ValueError, match=r"^--model='deep': this experiment offers no other model$"
    ):
        flags.parse(run, ["--model=deep"])


def test_traceback_is_asked_for_before_parsing() -> None:
    assert flags.wants_traceback(["--seed=x", "--traceback=true"])
    assert not flags.wants_traceback(["--notraceback", "--seed=1", "--", "--traceback"])


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m jaxtrain`."""
    return subprocess.run(
        [sys.executable, "-m", "jaxtrain", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_answers_at_once_and_without_jax() -> None:
    program = "import sys, runpy, time; start = time.perf_counter(); sys.argv[1:] = ['--help']\n"
    program += (
        "try: runpy.run_module('jaxtrain', run_name='__main__')\nexcept SystemExit as stop: assert"
        " not stop.code\n"
    )
    program += (
        "assert not {'jax', 'absl', 'numpy', 'flax'} & set(sys.modules), 'too much';"
        " print(time.perf_counter() - start)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert "python -m jaxtrain verify WORKDIR" in said
    assert float(said.splitlines()[-1]) < 0.5


def test_every_file_of_the_cli_is_a_command() -> None:
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    runs = {command.run.__module__.rpartition(".")[2] for command in cli.COMMANDS.values()}
    assert files - {"__init__", "main", "command", "run_file", "export_formats"} == runs
    assert "python -m jaxtrain FILE.py [--flag=value ...]" in help_text()
    for name, command in cli.COMMANDS.items():
        assert f"python -m jaxtrain {name} {command.arguments} " in help_text()


def test_help_of_a_command_lists_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["predict", "--help"], ["predict", "W", "-h"], ["predict", "help"]):
        assert run_command(arguments) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"python -m jaxtrain predict {cli.COMMANDS['predict'].arguments}\n")
        for flag in ("--out=predictions.npz", "--data.path=", "--checkpoint=best", "--overwrite"):
            assert f"\n  {flag}" in shown
        assert "export" not in shown
    for name, command in cli.COMMANDS.items():
        assert run_command([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(f"\n  --{flag}" in shown for flag in command.flags), name
    assert run_command(["sample", ".", "--prompt", "help"]) == 2  # a value, and no question
    assert "holds neither a run.json nor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["lst"],
            (
                "unknown command 'lst'; valid: list, verify, report, predict, sample, lm_eval,"
                " export, set, or FILE.py; did you mean 'list'?"
            ),
        ),
        (
            ["list", "optmizers"],
            (
                "list optmizers: unknown; valid: models, data, tasks, optimizers, schedules,"
                " augment; did you mean 'optimizers'?"
            ),
        ),
        (
            ["verify"],
            "verify: takes one WORKDIR, got 0; e.g. python -m jaxtrain verify runs/digits/today",
        ),
        (["verify", "/dev/null"], "verify /dev/null: is a file, not a directory"),
        (["report", "/nowhere/at all"], "report /nowhere/at all: no such directory"),
        (["report", "/"], "report /: holds no metrics.jsonl; is it the folder of a run?"),
        (["list", "--all"], "list: unknown flag --all; it takes none"),
    ],
)
def test_wrong_commands_get_one_line(arguments: list[str], line: str) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stderr, done.stdout) == (2, f"jaxtrain: error: {line}\n", "")


def test_a_missing_folder_has_a_near_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "digits").mkdir()
    assert cli.main(["verify", f"{tmp_path}/digtis"]) == 2
    line = f"verify {tmp_path}/digtis: no such directory; in {tmp_path}: digits; did you mean it?"
    assert capsys.readouterr().err == f"jaxtrain: error: {line}\n"


def test_list_names_components() -> None:
    done = command("list", "schedules", "models")
    assert done.returncode == 0, done.stderr
    assert "schedules  (--schedule=NAME)\n" in done.stdout
    assert re.search(r"^  Stages of residual blocks", done.stdout, re.MULTILINE)
    assert re.search(r"^    resnet32 +stages=5,5,5$", done.stdout, re.MULTILINE)
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "max_length=8192, rotary_base=500000" in " ".join(done.stdout.split()), "nothing is cut"


@pytest.mark.parametrize("name", sorted(models.NAMES))
def test_a_model_that_another_experiment_offers_is_named_with_it(name: str) -> None:
    said = elsewhere.model_elsewhere(name)
    assert said.startswith(f"; did you mean {name!r}, which ")
    if "experiments/" not in said:
        return
    file = said.partition("experiments/")[2].partition(".py")[0]
    offered = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / f"{file}.py"))[
        "experiment"
    ]().offers
    assert name in offered["model"]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("lama3_8b", "; did you mean 'llama3_8b', which experiments/llama3_8b.py offers?"),
        ("gpt2", "; did you mean 'gpt2_124m', which experiments/gpt2_124m.py offers?"),
        ("xyzzy", "; python -m jaxtrain list models has those of all experiments"),
    ],
)
def test_a_model_of_elsewhere(word: str, line: str) -> None:
    assert elsewhere.model_elsewhere(word) == line
