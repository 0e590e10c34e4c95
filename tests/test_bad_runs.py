"""Bad input that shows once devices, data, model and workdir are looked at: the exact line and
status, before anything is compiled.

Numbers are those of bad_inputs.md; what flags alone decide is in test_bad_inputs.py.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from test_run import EXPERIMENT, ROOT, TINY, quiet_environment, start

from jaxtrain.augment import NoAugment, SignalAugment
from jaxtrain.checkpoints.lock import Lock
from jaxtrain.data.sources.arrays import Arrays
from jaxtrain.data.sources.synthetic import Synthetic
from jaxtrain.errors import UserError
from jaxtrain.models import MLP, ConvNet, ViT
from jaxtrain.runner import build
from jaxtrain.runner import compile as programs
from jaxtrain.train import lowering

EIGHT = "--mesh=data:8"


class Row(NamedTuple):
    """Arguments (blanks separate them; `{tmp}` is a new folder), what the run itself has otherwise
    than the toy, and what is said."""

    arguments: str
    line: str
    status: int = 2
    changes: dict[str, Any] = {}  # noqa: RUF012 - nobody writes to it


def unlabelled() -> Arrays:
    return Arrays.of({"x": np.zeros((40, 4), np.float32)}, test="")


ROWS = [
    # 8-10: batches, devices and examples
    Row(
        f"{EIGHT} --batch_size=10", "--batch_size=10: not divisible by 8 devices; nearest: 8 or 16"
    ),
    Row(f"{EIGHT} --batch_size=3", "--batch_size=3: not divisible by 8 devices; nearest: 8"),
    Row(
        f"{EIGHT} --microbatches=4",
        "--microbatches=4: a part of 4 examples is not divisible by 8 devices; use fewer parts",
    ),
    Row(
        "--batch_size=1024",
        "--batch_size=1024: train split has 96 examples, so a batch would repeat some; use <= 96",
    ),
    Row(
        "--profile_steps=24,30",
        "--profile_steps=24,30: the run ends at step 24; profile earlier steps",
    ),
    # 12, 13, 62: meshes
    Row(
        "--mesh=dta:8",
        "--mesh: unknown axis 'dta'; axes used by this model: data, fsdp, tensor; did you mean"
        " 'data'?",
    ),
    Row("--mesh=xyz:8", "--mesh: unknown axis 'xyz'; axes used by this model: data, fsdp, tensor"),
    Row(
        "--mesh=data",
        "--mesh=data: 'data' needs a size >= 1, or -1 for all that is left, e.g. data:2",
    ),
    Row(
        "--mesh=data:0",
        "--mesh=data:0: 'data:0' needs a size >= 1, or -1 for all that is left, e.g. data:2",
    ),
    Row("--mesh=data:2,data:4", "--mesh=data:2,data:4: axis 'data' is given twice"),
    Row("--mesh=data:-1,fsdp:-1", "--mesh=data:-1,fsdp:-1: only one size may be -1"),
    Row(
        "--mesh=data:-1,fsdp:3",
        "--mesh=data:-1,fsdp:3: 8 devices are not a multiple of 3; nearest: data:-1,fsdp:2 or"
        " data:-1,fsdp:4",
    ),
    Row(
        "--mesh=data:16",
        "--mesh=data:16: needs 16 devices, there are only 8; nearest: data:8; for a dry run set"
        " XLA_FLAGS=--xla_force_host_platform_device_count=16",
    ),
    Row(
        "--mesh=tensor:8 --model.widths=12",
        "params/hidden0/bias dim 0 (=12, 'mlp') not divisible by axis tensor=8; change --mesh or"
        " make it 8 or 16",
    ),
    Row(
        "--optimizer.frozen=tail",
        "--optimizer.frozen: pattern 'tail' decides no parameter (paths: head/bias, head/kernel,"
        " hidden0/bias, hidden0/kernel, ...); remove it or mend it",
    ),
    # 51, 53, 54: data and model
    Row(
        "--data.train=train[:0]", "--data.train='train[:0]': 0 of 120 examples; take a larger part"
    ),
    Row(
        "--data.train=trian",
        "--data.train='trian': unknown split 'trian'; valid: train, test; did you mean 'train'?",
    ),
    Row(
        "--task.input=tokens",
        "batch has keys image, label; the task wants 'tokens'; set --task.input",
    ),
    Row(
        "",
        "batch has keys image; the task wants 'label'; the data has none: give it an array of that"
        " name",
        2,
        {"data": unlabelled()},
    ),
    Row(
        "--model.num_classes=3",
        "--model.num_classes=3: the data has 4 classes; set --model.num_classes=4",
    ),
    Row(
        "",
        "--model.patch=16: images of 4x4 cannot be cut into 16x16 patches; choose patch 2",
        2,
        {"model": ViT(num_classes=4, patch=16, width=8, depth=1, heads=2)},
    ),
    Row(
        "",
        "ConvNet: input shape (16, 2, 2, 2, 2) is neither (batch, length[, channels]) nor (batch,"
        " height, width, channels)",
        2,
        {
            "model": ConvNet(num_classes=4),
            "data": Synthetic(shape=(2, 2, 2, 2), num_classes=4, examples=40),
        },
    ),
    Row(
        "",
        "ImageAugment: image of shape (16, 4); expected (B, H, W, C); for signals take"
        " SignalAugment (--augment=signal, if it is offered)",
        2,
        {"data": Arrays.of({"x": np.zeros((40, 4), np.float32), "y": np.arange(40) % 4}, test="")},
    ),
    Row(
        "",
        "--data.test=test: has no label (it has image); give it labels, or pass --data.test= to do"
        " without",
        2,
        {
            "data": Arrays.of(
                {
                    "x": np.zeros((40, 4), np.float32),
                    "y": np.arange(40) % 4,
                    "x_test": np.zeros((8, 4), np.float32),
                }
            ),
            "augment": NoAugment(),
        },
    ),
    Row(
        "",
        "arrays: x_train is not the only 'x' of split train; rename one",
        2,
        {
            "data": Arrays.of(
                {"x": np.zeros((40, 4)), "x_train": np.zeros((40, 4)), "y": np.arange(40) % 4},
                test="",
            )
        },
    ),
    # 14 of schedules: longer than the run
    Row(
        "--schedule.warmup=100",
        "--schedule.warmup=100steps: 100 steps do not fit into a run of 24; shorten them or write"
        " e.g. 5%",
    ),
    # 40, 46: where to go on from
    Row("--resume=must", "--resume=must: no committed checkpoint in {tmp}/run/checkpoints"),
    Row("--eval_only", "--eval_only: no committed checkpoint in {tmp}/run/checkpoints"),
    Row(
        "--init_from={tmp}",
        "--init_from={tmp}: no committed checkpoint there; give a workdir, or"
        " WORKDIR/checkpoints/STEP",
    ),
    Row(
        "--device_data=yes",
        "--device_data=yes: the train split is not in host memory, or larger than half of what is"
        " free on the device; use auto",
    ),
    # 61
    Row(
        "--platform=gpu",
        "--platform=gpu: no GPU found (jax sees: cpu); install jax[cuda12] or use --platform=cpu",
    ),
]


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test if the training program or the initial state is compiled."""

    def compiled(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled before all input was looked at")

    platforms = jax.config.jax_platforms
    monkeypatch.setattr(lowering.Programs, "initialize", compiled)
    monkeypatch.setattr(lowering.Programs, "initialize_alone", compiled)
    for execution in (programs.Sharded, programs.Reproducible):
        monkeypatch.setattr(execution, "training", compiled)
    yield
    jax.config.update("jax_platforms", platforms)


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("row", ROWS, ids=[row.arguments[:50] or row.line[:50] for row in ROWS])
def test_bad_runs(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "device_data=yes" in row.arguments:
        monkeypatch.setattr(build.pipeline, "fits_on_device", lambda *_: False)
        # which data fits beside the state is asked when the state is there
        monkeypatch.setattr(lowering.Programs, "initialize", _initialize)
    arguments = row.arguments.replace("{tmp}", str(tmp_path)).split()
    assert start(tmp_path / "run", *arguments, **row.changes) == row.status
    assert capsys.readouterr().err == f"jaxtrain: error: {row.line}\n".replace(
        "{tmp}", str(tmp_path)
    )
    assert not (tmp_path / "run" / "run.json").exists()


_initialize = lowering.Programs.initialize

SIGNALS = {"x": np.zeros((40, 4), np.float32), "y": np.arange(40) % 4}
FOLLOWED: list[tuple[str, dict[str, Any]]] = [
    (f"{EIGHT} --batch_size=8", {}),
    (f"{EIGHT} --batch_size=16", {}),
    (f"{EIGHT} --microbatches=2", {}),
    ("--batch_size=96", {}),
    ("--profile_steps=20,23", {}),
    (EIGHT, {}),
    ("--mesh=fsdp:8", {}),
    ("--mesh=data:2", {}),
    ("--mesh=data:-1", {}),
    ("--mesh=data:-1,fsdp:2", {}),
    ("--mesh=data:-1,fsdp:4", {}),
    ("--mesh=tensor:8 --model.widths=8", {}),
    ("--mesh=tensor:8 --model.widths=16", {}),
    ("--optimizer.frozen=hidden0", {}),
    ("--data.train=train", {}),
    ("--task.input=image", {}),
    ("", {"data": Arrays.of(SIGNALS, test=""), "augment": NoAugment()}),
    ("--model.num_classes=4", {}),
    ("", {"model": ViT(num_classes=4, patch=2, width=8, depth=1, heads=2)}),
    ("", {"data": Arrays.of(SIGNALS, test=""), "augment": SignalAugment()}),
    (
        "--data.test=",
        {
            "data": Arrays.of(SIGNALS | {"x_test": np.zeros((8, 4), np.float32)}),
            "augment": NoAugment(),
        },
    ),
    ("--schedule.warmup=5%", {}),
    ("--device_data=auto", {}),
    ("--platform=cpu", {}),
]
"""What the lines of `ROWS` say to write instead, in their order."""


@pytest.mark.parametrize(("arguments", "changes"), FOLLOWED)
def test_the_remedies_are_accepted(
    arguments: str,
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is wrong before the state would be made."""

    def reached(*_: Any, **__: Any) -> None:
        raise UserError("reached")

    monkeypatch.setattr(lowering.Programs, "initialize", reached)
    assert start(tmp_path / "run", *arguments.split(), **changes) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "jaxtrain: error: reached"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert start(folder) == 0
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be hurt."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# 38, 40, 42: a folder that holds a run, and a start that does not fit to it.
WORKDIR_ROWS = [
    Row(
        "--model.widths=20",
        "--workdir={tmp}/run: holds run 'toy' with model.widths=[16], now [20]; the checkpoint does"
        " not fit then (missing: none, extra: none, shape: params/head/kernel (16,4) vs (20,4),"
        " params/hidden0/bias (16) vs (20), params/hidden0/kernel (16,16) vs (16,20)); use a new"
        " workdir",
    ),
    Row(
        "--optimizer=sgd",
        "--workdir={tmp}/run: holds run 'toy' with optimizer=adamw, now sgd; new workdir, or"
        " --allow_config_change=optimizer",
    ),
    Row(
        "--ema_decay=none",
        "--workdir={tmp}/run: holds run 'toy' with ema_decay=0.9, now null; new workdir, or"
        " --allow_config_change=ema_decay",
    ),
    Row(
        "--model.widths=20 --allow_config_change=model.dropout",
        "--workdir={tmp}/run: holds run 'toy' with model.widths=[16], now [20]; the checkpoint does"
        " not fit then (missing: none, extra: none, shape: params/head/kernel (16,4) vs (20,4),"
        " params/hidden0/bias (16) vs (20), params/hidden0/kernel (16,16) vs (16,20)); use a new"
        " workdir",
    ),
    Row(
        "--ema_decay=none --clip_norm=2 --batch_size=20 --allow_config_change=clip_norm",
        "--workdir={tmp}/run: holds run 'toy' with ema_decay=0.9, now null; batch_size=16, now 20;"
        " new workdir, or --allow_config_change=clip_norm,ema_decay,batch_size",
    ),
    Row(
        "--model.widths=20 --allow_config_change=model.depth",
        "--allow_config_change=model.depth: no such setting; did you mean 'model.widths'?",
    ),
    Row(
        "--seed=1",
        "--workdir={tmp}/run: holds run 'toy' with seed=0, now 1; new workdir, or"
        " --allow_config_change=seed",
    ),
    Row(
        "",
        "--workdir={tmp}/run: holds a run of 'toy', this is 'other'; use a new workdir",
        2,
        {"name": "other"},
    ),
    Row(
        "--resume=never",
        "--resume=never: {tmp}/run/checkpoints holds checkpoints up to step 24; use a new"
        " --workdir",
    ),
    Row(
        "--model.widths=16,8 --allow_config_change=model --steps=30",
        "checkpoint step 24 does not fit the model: missing params/hidden1 (2 arrays), extra: none,"
        " shape: params/head/kernel (16,4) vs (8,4)",
    ),
    Row(
        "--data.seed=1 --allow_config_change=data.seed",
        "--data: fingerprint differs from the run's",
    ),
]


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize(
    "row", WORKDIR_ROWS, ids=[row.arguments[:50] or row.line[:50] for row in WORKDIR_ROWS]
)
def test_a_workdir_that_does_not_fit(
    row: Row, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(
        (path.name, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.name != ".lock"
    )
    assert start(folder, *row.arguments.split(), **row.changes) == row.status
    said = capsys.readouterr().err
    if row.line.endswith("differs from the run's"):
        assert said.startswith(f"jaxtrain: error: {row.line}") and said.count("\n") == 1
    else:
        assert said == f"jaxtrain: error: {row.line}\n".replace("{tmp}", str(tmp_path))
    assert (
        sorted(
            (path.name, path.stat().st_mtime_ns)
            for path in folder.rglob("*")
            if path.name != ".lock"
        )
        == before
    )


def test_37_a_workdir_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Lock(tmp_path):
        clock = time.strftime(
            "%H:%M", time.localtime(json.loads((tmp_path / ".lock").read_text())["since"])
        )
        assert start(tmp_path) == 2
        who = f"pid {os.getpid()} on host {socket.gethostname()} since {clock}"
        assert (
            capsys.readouterr().err
            == f"jaxtrain: error: --workdir={tmp_path}: in use by {who}; use another, or"
            " --force_unlock if it is dead\n"
        )
        assert start(tmp_path, "--force_unlock") == 2
        assert (
            capsys.readouterr().err
            == f"jaxtrain: error: --workdir={tmp_path}: in use by {who}; it is alive: stop it"
            " first, or use another\n"
        )


@pytest.mark.usefixtures("nothing_compiles")
def test_36_too_little_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1_200_000))
    assert start(tmp_path / "run", "--keep=2") == 2
    said = capsys.readouterr().err
    expected = (
        rf"jaxtrain: error: --workdir={tmp_path}/run: 1\.2 MB free, needs 3\.2 MB \(3 checkpoints"
        r" of 1\.1 MB\); lower --keep or free space\n"
    )
    assert re.fullmatch(expected, said), said


def test_39_files_of_others_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    assert start(tmp_path, "--steps=1") == 0
    assert "note: 3 files not made by jaxtrain are left alone\n" in capsys.readouterr().out
    assert all((tmp_path / name).read_text() == name for name in ("a", "b", "c"))


def test_metrics_of_others_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("mine\n")
    assert start(tmp_path) == 2
    assert (
        capsys.readouterr().err
        == f"jaxtrain: error: --workdir={tmp_path}: holds metrics.jsonl but no run.json; restore"
        " it, or use a new workdir\n"
    )
    assert (tmp_path / "metrics.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"config": {}}', "{", '{"config": {}, "name": "toy", "data": {}}']
)
def test_a_damaged_run_json(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.json").write_text(text)
    assert start(folder) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"jaxtrain: error: --workdir={folder}: run.json is damaged ("
    ) and said.endswith("); restore it, or use a new workdir\n")


def test_a_lost_run_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.json").unlink()
    (folder / "metrics.jsonl").unlink()
    assert start(folder) == 2
    assert (
        capsys.readouterr().err
        == f"jaxtrain: error: --workdir={folder}: holds checkpoints but no run.json; restore it, or"
        " use a new workdir\n"
    )


@pytest.mark.parametrize("loss", ["gone", "short"])
def test_metrics_that_were_lost(
    loss: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = folder / "metrics.jsonl"
    text = metrics.read_bytes()
    metrics.unlink() if loss == "gone" else metrics.write_bytes(text[:100])
    assert start(folder, "--steps=30") == 2
    size = 0 if loss == "gone" else 100
    line = (
        f"{metrics}: {size} bytes, but the checkpoint was committed at {len(text)}; restore the"
        " file, or use a new --workdir"
    )
    assert capsys.readouterr().err == f"jaxtrain: error: {line}\n"


@pytest.mark.usefixtures("nothing_compiles")
def test_46_links_in_a_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    for step in (folder / "checkpoints").iterdir():
        (step / "state" / "zz").symlink_to(secret)
    warm = tmp_path / "warm"
    assert start(warm, f"--init_from={folder}/checkpoints/24") == 2
    assert (
        capsys.readouterr().err
        == f"jaxtrain: error: --init_from={folder}/checkpoints/24: step 24: holds symlink state/zz"
        f" -> {secret}; refused\n"
    )
    assert start(warm, f"--init_from={folder}") == 2
    said = capsys.readouterr().err
    assert (
        said.startswith(f"jaxtrain: error: --init_from={folder}: ")
        and f"holds symlink state/zz -> {secret}; refused" in said
    )
    assert start(folder, "--steps=30") == 74
    assert f"holds symlink state/zz -> {secret}; refused" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_compiles")
def test_42_parameters_of_another_model(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        start(
            tmp_path / "warm", f"--init_from={finished}", model=MLP(num_classes=4, widths=(16, 16))
        )
        == 2
    )
    line = (
        "checkpoint step 24 does not fit the model: missing params/hidden1 (2 arrays), extra: none,"
        " shape: none; to go on without: --init_rules='hidden1=skip'"
    )
    assert capsys.readouterr().err == f"jaxtrain: error: --init_from={finished}: {line}\n"
    assert (
        start(tmp_path / "warm", f"--init_from={finished}", model=MLP(num_classes=4, widths=()))
        == 2
    )
    line = (
        "checkpoint step 24 does not fit the model: missing: none, extra: params/hidden0 (2"
        " arrays), shape: none; to go on without: --init_rules='hidden0=skip'"
    )
    assert capsys.readouterr().err == f"jaxtrain: error: --init_from={finished}: {line}\n"


def test_52_parts_that_overlap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        start(tmp_path / "run", "--data.validation=train[70%:]", "--steps=4", "--eval_every=0") == 0
    )
    assert (
        capsys.readouterr().err
        == "jaxtrain: warning: train[:80%] and train[70%:] share 10 % of examples\n"
    )


def test_60_data_that_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.npz"

    def write(count: int) -> None:
        generator = np.random.default_rng(0)
        np.savez(
            path, x=generator.normal(size=(count, 4)).astype(np.float32), y=np.arange(count) % 4
        )

    write(40)
    parts = {"data": Arrays(path=str(path), test=""), "augment": NoAugment()}
    assert start(tmp_path / "run", "--steps=2", **parts) == 0
    write(48)
    capsys.readouterr()
    assert start(tmp_path / "run", "--steps=4", "--eval_every=0", **parts) == 2
    said = capsys.readouterr().err
    expected = (
        r"jaxtrain: error: --data: fingerprint differs from the run's \((.+) -> (.+)\); restore the"
        r" data or --allow_config_change=data\n"
    )
    found = re.fullmatch(expected, said)
    assert found and found[1] != found[2], said
    assert start(tmp_path / "run", "--steps=4", "--allow_config_change=data", **parts) == 0


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """One line, the status, no traceback; and `--traceback` shows it."""
    environment = quiet_environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    arguments = [
        argument for argument in TINY if not argument.startswith(("--mesh", "--batch_size"))
    ]
    command = [*EXPERIMENT, *arguments, "--batch_size=10", f"--workdir={tmp_path}/run"]
    line = "jaxtrain: error: --batch_size=10: not divisible by 8 devices; nearest: 8 or 16\n"
    quiet = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (quiet.returncode, quiet.stderr, quiet.stdout) == (2, line, "")
    loud = subprocess.run(
        [*command, "--traceback"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        loud.returncode == 2 and loud.stderr.startswith("Traceback") and loud.stderr.endswith(line)
    )
    assert not (tmp_path / "run").exists()


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    assert start(tmp_path / "new", "--resume=must") == 2
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    assert start(tmp_path / "mine", "--resume=must") == 2
    assert (tmp_path / "mine").is_dir()  # it was there before
