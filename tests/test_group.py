"""Groups of real training processes: one of them fails in every way that a process can, layouts
change between kills, and nothing is lost."""

import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_reproducible import digest_of, group_command, group_environment, launch, metrics_of

from jaxtrain.report import changes_file

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES, BATCH = 96, 32
EXPERIMENT = '''"""A tiny run whose metrics say which examples each step saw.

Its data can be made to fail in one process."""

import dataclasses
import os
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxtrain
from jaxtrain import augment, optimizers, schedules
from jaxtrain.data.splits import Splits
from jaxtrain.data.sources.synthetic import Synthetic
from jaxtrain.data.table import ArrayTable
from jaxtrain.models import mlp
from jaxtrain.tasks import Classification


class Failing(ArrayTable):
    """Raises or hangs at a read when a file says so, once."""

    def read(self, ids):
        import jax

        order = Path(os.environ.get("FAULT", "/nowhere"))
        if order.exists() and jax.process_index() == min(1, jax.process_count() - 1):
            kind = order.read_text()
            order.unlink()
            if kind == "hang":
                time.sleep(1000)
            raise RuntimeError("the data went away")
        return super().read(ids)


@dataclasses.dataclass(frozen=True)
class Source(Synthetic):
    """Synthetic data in failing tables."""

    def open(self):
        splits = super().open()
        if "FAULT" not in os.environ:
            return splits
        name = os.environ.get("FAULT_IN", "train")
        table = getattr(splits, name)
        return dataclasses.replace(splits, **{name: Failing(dict(table.arrays), table.num_classes)})


@dataclasses.dataclass(frozen=True)
class Seen(Classification):
    """Classification that also counts each example."""

    def loss(self, outputs, batch, *, train=True):
        sums = super().loss(outputs, batch, train=train)
        if train:
            rows = jnp.float32(outputs.shape[0])
            # Shapes are checked on the table's own fields, which have no id.
            ids = batch.get("id", jnp.zeros(outputs.shape[0], jnp.int32))
            for index in range(96):
                sums[f"seen_{index}"] = jnp.sum(ids == index).astype(jnp.float32), rows
        return sums


def experiment():
    return jaxtrain.Run(
        name="toy",
        model=mlp.MLP(widths=(8,), dropout=0.1),
        data=Source(shape=(4, 4, 1), examples=96, test_examples=16, num_classes=10, test=""),
        task=Seen(), optimizer=optimizers.AdamW(), schedule=schedules.Cosine(),
        augment=augment.NoAugment(), steps=300, batch_size=32, log_every=1,
        checkpoint_every=jaxtrain.Horizon(10), eval_every=jaxtrain.Horizon(0),
        reproducible=True, report=False, tensorboard=False,
        steps_per_call=1, offers={},
    )


if __name__ == "__main__":
    jaxtrain.main(experiment())
'''


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy run's file."""
    path = tmp_path_factory.mktemp("toy") / "toy.py"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture(scope="module")
def golden(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one piece, on one device."""
    workdir = tmp_path_factory.mktemp("golden") / "run"
    done = launch([str(experiment), "--mesh=data:1"], 1, 1, workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def begin(
    arguments: list[str], processes: int, devices: int, workdir: Path, errors: Path, **more: str
) -> subprocess.Popen[bytes]:
    """A run in the background."""
    command = group_command(arguments, processes, devices, workdir)
    environ = group_environment(more)
    with errors.open("ab") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=file
        )


def committed(workdir: Path) -> int:
    """The newest committed step."""
    return max(
        (
            int(path.parent.name)
            for path in workdir.glob("checkpoints/*/COMMIT")
            if path.parent.name.isdecimal()
        ),
        default=0,
    )


def workers(supervisor: int) -> list[int]:
    """The processes that a supervisor started, in their order."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    place = {
        pid: int(
            dict(part.split("=", 1) for part in _environ(pid) if "=" in part).get(
                "JAXTRAIN_PROCESS", "0"
            )
        )
        for pid in map(int, children)
    }
    return sorted(place, key=place.__getitem__)


def _environ(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")


def wait_for(workdir: Path, step: int, process: subprocess.Popen[bytes], errors: Path) -> None:
    """Returns when `step` is committed."""
    until = time.monotonic() + 300
    while committed(workdir) < step:
        assert process.poll() is None, errors.read_text()
        assert time.monotonic() < until, errors.read_text()
        time.sleep(0.02)


@pytest.mark.slow
def test_layouts_change_between_kills_and_every_example_comes_once_an_epoch(
    experiment: Path, golden: Path, tmp_path: Path
) -> None:
    workdir, errors = tmp_path / "run", tmp_path / "errors"
    legs = [
        (1, 8, "data:2,fsdp:4"),
        (1, 2, "data:2"),
        (1, 4, "fsdp:4"),
        (1, 1, "data:1"),
        (2, 1, "data:2"),
        (4, 1, "data:4"),
    ]
    for processes, devices, layout in legs[:-1]:
        process = begin([str(experiment), f"--mesh={layout}"], processes, devices, workdir, errors)
        wait_for(workdir, committed(workdir) + 30, process, errors)
        os.kill(workers(process.pid)[-1], signal.SIGKILL)
        assert process.wait(60) == 75, errors.read_text()
        assert 0 < committed(workdir) < 300
    processes, devices, layout = legs[-1]
    done = launch([str(experiment), f"--mesh={layout}"], processes, devices, workdir)
    assert done.returncode == 0, done.stderr
    assert digest_of(workdir) == digest_of(golden)
    assert metrics_of(workdir) == metrics_of(golden)
    record = json.loads((workdir / "run.json").read_text())
    assert [each["processes"] for each in record["resumed"]] == [1, 1, 1, 2, 4]
    lines = [line for line in metrics_of(workdir) if line["split"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 301))
    seen = [
        index
        for line in lines
        for index in range(EXAMPLES)
        for _ in range(round(line.get(f"seen_{index}", 0) * BATCH))
    ]
    for epoch in range(300 * BATCH // EXAMPLES):
        assert collections.Counter(
            seen[epoch * EXAMPLES : (epoch + 1) * EXAMPLES]
        ) == dict.fromkeys(range(EXAMPLES), 1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("fault", ["killed", "stopped", "raising", "hung"])
def test_a_lost_process_ends_the_group_and_the_run_goes_on(
    fault: str, processes: int, experiment: Path, golden: Path, tmp_path: Path
) -> None:
    workdir, errors, order = tmp_path / "run", tmp_path / "errors", tmp_path / "fault"
    arguments = [
        str(experiment),
        f"--mesh=data:{processes}",
        "--device_data=no",
        "--hang_seconds=8",
        "--max_restarts=1",
    ]
    process = begin(arguments, processes, 1, workdir, errors, FAULT=str(order))
    wait_for(workdir, 20, process, errors)
    first = workers(process.pid)
    began = time.monotonic()
    if fault in ("killed", "stopped"):
        os.kill(first[1], signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    else:
        order.write_text({"raising": "raise", "hung": "hang"}[fault])
    while any(Path(f"/proc/{pid}").exists() for pid in first):
        assert time.monotonic() - began < 30, errors.read_text()
        time.sleep(0.05)
    seconds = time.monotonic() - began
    assert process.wait(300) == 0, errors.read_text()
    line = next(
        line for line in errors.read_text().splitlines() if line.startswith("jaxtrain: process ")
    )
    print(f"{fault}, {processes} processes: {seconds:.1f} s; {line}")
    assert seconds < 20
    assert (
        line.startswith(f"jaxtrain: process 1 of {processes} ")
        and "restarting from the last commit (1 of 1)" in line
    )
    assert digest_of(workdir) == digest_of(golden)
    assert metrics_of(workdir) == metrics_of(golden)


@pytest.mark.slow
def test_a_hang_in_an_evaluation_is_found_as_the_experiment_asks(
    experiment: Path, golden: Path, tmp_path: Path
) -> None:
    """Not the first evaluation, which compiles; and no flag is given: what stands in `Run` counts
    alike, also where the run starts its supervisor."""
    workdir, errors, order, own = (
        tmp_path / "run",
        tmp_path / "errors",
        tmp_path / "fault",
        tmp_path / "own.py",
    )
    own.write_text(
        experiment.read_text().replace(
            "eval_every=jaxtrain.Horizon(0)",
            "eval_every=jaxtrain.Horizon(20), max_restarts=1, hang_seconds=5.0",
        )
    )
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "FAULT": str(order),
        "FAULT_IN": "validation",
    }
    command = [
        sys.executable,
        str(own),
        "--mesh=data:1",
        "--data.validation=test",
        "--eval_batch_size=8",
        f"--workdir={workdir}",
    ]
    with errors.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=file
        )
    try:
        wait_for(workdir, 30, process, errors)
        order.write_text("hang")
        began = time.monotonic()
        assert process.wait(120) == 0, errors.read_text()
    finally:
        process.kill()
    print(
        f"hung in an evaluation: {time.monotonic() - began:.1f} s to the end of the run;"
        f" {errors.read_text()}"
    )
    line = (
        r"jaxtrain: the process hung while evaluating at step \d+ \(no progress for \d+ s\);"
        r" stacks: .*; restarting from the last commit \(1 of 1\)"
    )
    assert re.fullmatch(line, errors.read_text().strip())
    assert digest_of(workdir) == digest_of(golden)


@pytest.mark.slow
def test_data_in_device_memory_trains_in_two_processes(experiment: Path, tmp_path: Path) -> None:
    """Programs over resident data need each step's count on the devices of all; with the same
    numbers up to rounding."""
    losses = []
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        done = launch(
            [
                str(experiment),
                "--noreproducible",
                "--device_data=yes",
                "--steps=20",
                "--steps_per_call=4",
            ],
            processes,
            2 // processes,
            workdir,
        )
        assert done.returncode == 0, done.stderr
        losses.append([line["loss"] for line in metrics_of(workdir) if line["split"] == "train"])
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_the_same_step_in_all(
    experiment: Path, golden: Path, tmp_path: Path
) -> None:
    workdir, errors = tmp_path / "run", tmp_path / "errors"
    process = begin([str(experiment), "--mesh=data:2"], 2, 1, workdir, errors)
    wait_for(workdir, 20, process, errors)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, errors.read_text()
    assert 20 <= committed(workdir) < 300
    done = launch([str(experiment), "--mesh=data:1"], 1, 1, workdir)
    assert done.returncode == 0, done.stderr
    assert digest_of(workdir) == digest_of(golden)


@pytest.mark.slow
def test_predictions_that_fail_in_one_process_end_the_group(
    experiment: Path, tmp_path: Path
) -> None:
    """All is committed; the other process waits in the collective for the one that failed."""
    workdir, errors, order = tmp_path / "run", tmp_path / "errors", tmp_path / "fault"
    order.write_text("raise")
    # without evaluations, the predictions at the end are the first to read this split
    arguments = [str(experiment), "--mesh=data:2", "--data.validation=test", "--steps=20"]
    environ = {"FAULT": str(order), "FAULT_IN": "validation"}
    began = time.monotonic()
    process = begin(arguments, 2, 1, workdir, errors, **environ)
    try:
        status = process.wait(120)
    finally:
        process.kill()
    print(f"{time.monotonic() - began:.1f} s; status {status}; {errors.read_text()}")
    assert status == 75
    line = "jaxtrain: process 1 of 2 ended with status 1 while ending at step 20"
    assert line in errors.read_text()
    assert committed(workdir) == 20


@pytest.mark.slow
def test_the_statistics_are_those_of_process_0(experiment: Path, tmp_path: Path) -> None:
    """Process 1 reads nothing at all: its data is on its devices, and process 0 has measured."""
    order = tmp_path / "fault"
    order.write_text("raise")
    arguments = [
        *(str(experiment), "--mesh=data:2", "--noreproducible", "--device_data=yes"),
        *("--data.validation=", "--steps=20"),
    ]
    errors = tmp_path / "errors"
    process = begin(arguments, 2, 1, tmp_path / "run", errors, FAULT=str(order))
    assert process.wait(120) == 0, errors.read_text()
    assert order.exists()


@pytest.mark.slow
def test_a_change_holds_in_all_from_the_same_step(experiment: Path, tmp_path: Path) -> None:
    """Two processes are asked while they train; one process with their journal has their bits."""
    workdir, errors = tmp_path / "run", tmp_path / "errors"
    process = begin([str(experiment), "--mesh=data:2"], 2, 1, workdir, errors)
    wait_for(workdir, 20, process, errors)
    done = subprocess.run(
        [sys.executable, "-m", "jaxtrain", "set", workdir, "optimizer.learning_rate=0.0003"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "-> 0.0003 after step" in done.stdout, done
    assert process.wait(120) == 0, errors.read_text()
    [change] = changes_file.read(workdir)
    assert 20 <= change.step < 300
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(workdir / "changes.jsonl", again)
    done = launch([str(experiment), "--mesh=data:1"], 1, 1, again)
    assert done.returncode == 0, done.stderr
    assert digest_of(again) == digest_of(workdir)
