"""A group of processes is ended within a bound, by the name of the one that failed, and starts
again; shown with workers that import no jax."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jaxtrain import errors
from jaxtrain.processes import arguments as supervisor_arguments
from jaxtrain.processes import failure, heartbeat, rendezvous
from jaxtrain.processes import workers as worker_processes
from jaxtrain.processes.failure import SILENCE_LIMITS, Failure, Observation, first_failure
from jaxtrain.processes.heartbeat import Heartbeat, SupervisorOptions
from jaxtrain.processes.worker_log import WorkerLog

ROOT = Path(__file__).resolve().parent.parent
BOUND = 5.0
"""Seconds from a death to the end of the whole group; the issue asks for 20 with a real model."""

WORKER = '''
"""A stand-in for an experiment: it sends heartbeats, and one process has the fault of --fault."""
import os, signal, sys, time
from pathlib import Path
from jaxtrain.processes import heartbeat

flags = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:])
index, steps = int(os.environ.get("JAXTRAIN_PROCESS", 0)), int(flags.get("steps", 8))
folder = Path(flags["folder"])
with open(folder / f"argv-{index}", "a") as file:
    print(*sys.argv[1:], file=file)
with open(folder / f"environ-{index}", "a") as file:
    told = map(os.environ.get, ("JAXTRAIN_COORDINATOR", "JAX_PLATFORMS", "XLA_FLAGS"))
    print(os.getpid(), *told, file=file)
attempt = len((folder / f"argv-{index}").read_text().splitlines())
asked = []
signal.signal(signal.SIGTERM, lambda *seen: asked.append("TERM"))
signal.signal(signal.SIGINT, lambda *seen: asked.append("INT"))
heartbeat.beat("starting")
if "options" in flags:
    restarts, seconds = flags["options"].split(",")
    heartbeat.send_options(int(restarts), float(seconds))
if "sent_workdir" in flags:
    heartbeat.send_workdir(flags["sent_workdir"])

def the_place_where_it_hangs():
    (folder / "hangs").touch()
    while True:
        time.sleep(60)

def wait_for_peers():
    """A collective whose peer is gone."""
    while not asked and not any((folder / f"gone-{other}").exists() for other in range(4)):
        time.sleep(0.02)

heartbeat.beat("compiling")
time.sleep(float(flags.get("compile", 0)))
print("process", index, "attempt", attempt, flush=True)
kind, _, where = flags.get("fault", "none:0").partition(":")
for step in range(1, steps + 1):
    heartbeat.beat("training", step)
    time.sleep(0.02)
    if asked:
        heartbeat.beat("saving", step)
        (folder / f"saved-{index}").write_text(",".join(asked))
        sys.exit(130 if "INT" in asked else 75)
    if step == 5 and str(index) in where.split(",") and attempt <= int(flags.get("attempts", 1)):
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "raise":
            raise RuntimeError("a fault of this very kind")
        if kind == "hang":
            the_place_where_it_hangs()
        if kind == "early":
            sys.exit(0)
        if kind.isdecimal():
            said = f"jaxtrain: error: this is status {kind} of process {index}"
            print(said, file=sys.stderr, flush=True)
            sys.exit(int(kind))
    fails = step == 6 and kind not in ("none", "slow") and where
    if fails and attempt <= int(flags.get("attempts", 1)):
        wait_for_peers()
    if kind == "slow":
        time.sleep(0.1)
heartbeat.beat("ending", steps)
'''


class Group:
    """A supervisor with its workers, in a folder of their own."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        own: tuple[str, ...] = (),
        before: tuple[str, ...] = (),
        **environ: str,
    ) -> None:
        (folder / "temporary").mkdir(exist_ok=True)
        self.folder, self.began = folder, time.monotonic()
        script = folder / "worker.py"
        script.write_text(WORKER)
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JAXTRAIN_", "SLURM_", "XLA_", "JAX_"))
        }
        environment |= {"TMPDIR": str(folder / "temporary"), "PYTHONPATH": str(ROOT), **environ}
        command = [
            sys.executable,
            "-m",
            "jaxtrain.processes.supervisor",
            *own,
            str(script),
            f"--folder={folder}",
            *arguments,
        ]
        self.process = subprocess.Popen(
            [*before, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, status: int, seconds: float = 20.0) -> tuple[str, str]:
        """Its output, after it ended with this status."""
        out, err = self.process.communicate(timeout=seconds)
        self.seconds = time.monotonic() - self.began
        assert self.process.returncode == status, err
        for worker in self.workers():
            assert not alive(worker), "a worker is left"
        return out, err

    def workers(self) -> list[int]:
        """The pids of all workers that there were."""
        return [
            int(line.split()[0])
            for file in sorted(self.folder.glob("environ-*"))
            for line in file.read_text().splitlines()
        ]

    def wait_for_workers(self, count: int, step: int = 1) -> None:
        """Returns when the workers have started to train."""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            beats = [
                heartbeat.read(path)
                for path in (self.folder / "temporary").glob("jaxtrain-*/heartbeat-*")
            ]
            if sum(beat is not None and (beat.step or 0) >= step for beat in beats) == count:
                return
            time.sleep(0.02)
        raise AssertionError("the workers do not start")

    def left(self) -> list[str]:
        """What is left in the temporary folder."""
        return [path.name for path in (self.folder / "temporary").rglob("*") if path.is_file()]


def alive(process: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return b") Z" not in Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return False


@contextlib.contextmanager
def group(folder: Path, *arguments: str, processes: int = 2, **more: object) -> Iterator[Group]:
    own = (f"--processes={processes}",)
    made = Group(folder, *arguments, own=own, **more)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()
        for worker in made.workers():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker, signal.SIGKILL)


SEEN = Observation(0, 10.0, "training", 38)
DEAD = replace(SEEN, exit_status=1, exit_time=10.0)


@pytest.mark.parametrize(
    ("observed", "now", "found"),
    [
        ([SEEN, replace(SEEN, index=1)], 11.0, None),
        # A failure is named when the others have had time to exit too.
        ([SEEN, replace(DEAD, index=1)], 10.5, None),
        (
            [SEEN, replace(DEAD, index=1)],
            11.1,
            Failure(1, "ended with status 1 while training at step 38"),
        ),
        (
            [replace(DEAD, exit_status=-9)],
            10.0,
            Failure(0, "was killed by SIGKILL while training at step 38"),
        ),
        # What comes after is not the cause, even where it was seen first.
        (
            [replace(DEAD, exit_status=-6), replace(DEAD, index=1, exit_time=10.1)],
            10.1,
            Failure(1, "ended with status 1 while training at step 38"),
        ),
        (
            [
                replace(DEAD, exit_status=75),
                replace(DEAD, index=1, exit_status=-11, exit_time=10.9),
            ],
            11,
            Failure(1, "was killed by SIGSEGV while training at step 38"),
        ),
        (
            [replace(DEAD, exit_time=10.2), replace(DEAD, index=1)],
            11,
            Failure(1, "ended with status 1 while training at step 38"),
        ),
        (
            [replace(DEAD, exit_status=-6), replace(SEEN, index=1, stopped_since=8.5)],
            12.0,
            Failure(1, "was stopped by a signal while training at step 38"),
        ),
        # Flags are refused by all, seconds apart; the first worker has said why.
        ([SEEN, replace(DEAD, index=1, exit_status=2, step=None)], 13.0, None),
        (
            [replace(DEAD, exit_status=2), replace(DEAD, index=1, exit_status=2, exit_time=9)],
            10,
            Failure(0, "ended with status 2 (bad input) while training at step 38", 2),
        ),
        (
            [SEEN, replace(DEAD, index=1, exit_status=71)],
            12,
            Failure(1, "ended with status 71 (out of memory) while training at step 38", 71),
        ),
        # Stopped for a moment, and for longer.
        ([SEEN, replace(SEEN, index=1, stopped_since=9.0)], 10.5, None),
        (
            [SEEN, replace(SEEN, index=1, stopped_since=9.0)],
            11.5,
            Failure(1, "was stopped by a signal while training at step 38"),
        ),
        # Hung: the one furthest behind, and among equals the one that stopped first.
        ([SEEN, replace(SEEN, index=1, last_progress=9.0)], 17.5, None),
        (
            [SEEN, replace(SEEN, index=1, last_progress=9.0)],
            18.5,
            Failure(1, "hung while training at step 38 (no progress for 10 s)"),
        ),
        (
            [replace(SEEN, step=37, last_progress=10.4), replace(SEEN, index=1)],
            18.5,
            Failure(0, "hung while training at step 37 (no progress for 8 s)"),
        ),
        # Whoever is behind may take the time of its own phase, and the others wait for it as long.
        ([SEEN, replace(SEEN, index=1, phase="saving")], 1000.0, None),
        ([SEEN, replace(SEEN, index=1, phase="compiling", step=None)], 3000.0, None),
        (
            [SEEN, replace(SEEN, index=1, phase="compiling", step=None)],
            3700.0,
            Failure(1, "hung while compiling (no progress for 3690 s)"),
        ),
        (
            [replace(SEEN, phase="evaluating", last_progress=99), replace(SEEN, index=1)],
            100.0,
            None,
        ),
        # One that has finished is not behind; one that left early is what the others wait for.
        ([SEEN, replace(DEAD, index=1, exit_status=0, phase="ending")], 15.0, None),
        (
            [SEEN, replace(DEAD, index=1, exit_status=0, step=37)],
            19.0,
            Failure(1, "ended with status 0 before the others while training at step 37"),
        ),
        ([replace(DEAD, exit_status=0, phase="ending")], 15.0, None),
    ],
)
def test_the_first_failure_is_named(
    observed: list[Observation], now: float, found: Failure | None
) -> None:
    assert first_failure(observed, now, failure.silence_limits(8)) == found


def test_those_who_were_asked_to_end_are_not_at_fault() -> None:
    for status in (0, 75, 130, -signal.SIGTERM):
        ended = replace(DEAD, index=1, exit_status=status, phase="ending")
        assert first_failure([SEEN, ended], 15.0, SILENCE_LIMITS, stop_requested=True) is None
    assert (
        first_failure(
            [SEEN, replace(DEAD, index=1, exit_status=-9)],
            15.0,
            SILENCE_LIMITS,
            stop_requested=True,
        )
        is not None
    )
    assert first_failure([SEEN], 700.0, SILENCE_LIMITS, stop_requested=True) is not None


def test_limits_are_those_of_the_issue_and_cover_every_phase() -> None:
    assert tuple(SILENCE_LIMITS) == heartbeat.PHASES == tuple(failure.ACTIVITIES)
    assert {
        phase
        for phase in heartbeat.PHASES
        if failure.silence_limits(8)[phase] != SILENCE_LIMITS[phase]
    } == {
        "training",
        "evaluating",
    }


def test_a_heartbeat_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, workdir = tmp_path / "heartbeat", "/a place/näme"
    writer = heartbeat.HeartbeatWriter(path)
    assert heartbeat.read(path) == Heartbeat(1)
    writer.beat("evaluating", 10**12)
    writer.send_workdir(workdir)
    assert heartbeat.read(path) == Heartbeat(2, "evaluating", 10**12, workdir)
    writer.beat("saving")
    assert heartbeat.read(path) == Heartbeat(3, "saving", 10**12, workdir)
    writer.send_options(SupervisorOptions(10**30, 0.25))
    sent = Heartbeat(3, "saving", 10**12, workdir, SupervisorOptions(10**30, 0.25))
    assert heartbeat.read(path) == sent
    writer.send_options(SupervisorOptions(2, None))
    writer.send_workdir("/b")
    sent = Heartbeat(3, "saving", 10**12, "/b", SupervisorOptions(2, None))
    assert heartbeat.read(path) == sent
    path.write_bytes(b"half a l")
    assert heartbeat.read(path) is None


def test_a_heartbeat_without_a_supervisor_is_nothing(tmp_path: Path) -> None:
    """Also in a child that inherited the environment of a worker: its heartbeats would hide that
    the worker hangs."""
    code = (
        "import os; from jaxtrain.processes import heartbeat; heartbeat.beat('training', 3);"
        " heartbeat.send_workdir('/x'); assert heartbeat._writer() is None"
    )
    for inherited in (
        {},
        {
            "JAXTRAIN_HEARTBEAT_FILE": str(tmp_path / "heartbeat"),
            "JAXTRAIN_SUPERVISOR_PID": str(os.getppid()),
        },
    ):
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith("JAXTRAIN_")
        }
        subprocess.run(
            [sys.executable, "-c", code], env={**clean, **inherited}, check=True, cwd=ROOT
        )
    assert not (tmp_path / "heartbeat").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [],
            (
                "no FILE.py given; python -m jaxtrain.processes.supervisor --processes=2"
                " experiments/digits.py [flags]"
            ),
        ),
        (
            ["--processes=2"],
            (
                "no FILE.py given; python -m jaxtrain.processes.supervisor --processes=2"
                " experiments/digits.py [flags]"
            ),
        ),
        (["--processes"], "--processes: needs a value, e.g. --processes=2"),
        (["--processes=0", __file__], "--processes=0: must be an integer >= 1"),
        (["--devices=two", __file__], "--devices=two: must be an integer >= 1"),
        (
            ["--seed=3", __file__],
            "--seed: not a flag of the supervisor; flags of the experiment come after its FILE.py",
        ),
        (["no/such.py"], "no/such.py: no such experiment"),
        (
            ["--devices=4", __file__, "--platform=gpu"],
            (
                "--devices=4: makes devices of the CPU, so --platform=gpu has no meaning; drop one"
                " of them"
            ),
        ),
        (
            ["--processes=2", __file__, "--process=1"],
            (
                "--processes=2: starts all processes here, so --process has no meaning; drop one of"
                " them"
            ),
        ),
    ],
)
def test_a_command_line_that_cannot_be(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        supervisor_arguments.parse(argv)


def test_the_flags_of_both_are_read_in_either_form() -> None:
    parsed = supervisor_arguments.parse(
        ["--processes", "2", __file__, "--hang_seconds", "8", "--max_restarts=3", "--resume=never"]
    )
    assert (parsed.processes, parsed.devices) == (2, None)
    assert parsed.options == SupervisorOptions(max_restarts=3, hang_seconds=8.0)
    assert parsed.worker_command("")[2:] == [
        "--hang_seconds",
        "8",
        "--max_restarts=3",
        "--resume=never",
    ]
    assert parsed.worker_command("/run")[2:] == [
        "--hang_seconds",
        "8",
        "--max_restarts=3",
        "--workdir=/run",
    ]
    assert replace(parsed, flags=("--workdir", "/mine")).worker_command("/run")[2:] == [
        "--workdir",
        "/mine",
    ]
    wrong = replace(parsed, flags=("--hang_seconds=soon", "--max_restarts=many"))
    assert wrong.options == SupervisorOptions()


def test_the_error_lines_of_a_log(tmp_path: Path) -> None:
    log = WorkerLog(tmp_path, 1)
    assert log.error_lines() == []
    log.path.write_text("noise\n" * 30 + "the end\n")
    assert log.error_lines(2) == ["noise", "the end"]
    log.path.write_text("noise\nTraceback (most recent call last):\n  File x\nRuntimeError: why\n")
    assert log.error_lines() == [
        "Traceback (most recent call last):",
        "  File x",
        "RuntimeError: why",
    ]
    log.path.write_text("jaxtrain: error: --seed=x: no number\nnoise of the machine\n")
    assert log.error_lines() == ["jaxtrain: error: --seed=x: no number"]
    (tmp_path / "run").mkdir()
    assert log.copy_to(str(tmp_path / "run")) and log.copy_to(str(tmp_path / "run"))
    log.clear()
    log.path.write_text("again\n")
    assert log.copy_to(str(tmp_path / "run")) and not WorkerLog(tmp_path, 1).copy_to("")
    assert (
        (tmp_path / "run" / "logs" / "1.txt").read_text().endswith("noise of the machine\nagain\n")
    )


def test_all_end_well(tmp_path: Path) -> None:
    with group(tmp_path, own_file := f"--sent_workdir={tmp_path / 'run'}") as made:
        (tmp_path / "run").mkdir()
        out, err = made.finish(0)
    assert (out, err) == ("process 0 attempt 1\n", "")
    assert (tmp_path / "run" / "logs" / "1.txt").read_text() == "process 1 attempt 1\n"
    assert made.left() == [] and own_file in (tmp_path / "argv-1").read_text()


FAULTS = {
    "kill": "was killed by SIGKILL",
    "raise": "ended with status 1",
    "stop": "was stopped by a signal",
    "hang": "hung",
}


@pytest.mark.parametrize(("processes", "failed"), [(2, 1), (4, 0)])
def test_a_fault_ends_the_group_by_its_name_and_it_starts_again(
    tmp_path: Path, processes: int, failed: int
) -> None:
    with contextlib.ExitStack() as stack:
        made = {}
        for kind in FAULTS:  # at once, since most of it is waiting
            folder = tmp_path / kind
            (folder / "run" / "checkpoints" / "4").mkdir(parents=True)
            (folder / "run" / "checkpoints" / "4" / "COMMIT").touch()
            flags = (
                f"--fault={kind}:{failed}",
                f"--sent_workdir={folder / 'run'}",
                "--hang_seconds=2",
                "--max_restarts=3",
            )
            made[kind] = stack.enter_context(group(folder, *flags, processes=processes))
        for kind, each in made.items():
            _, err = each.finish(0)
            check_restart(each, kind, processes, failed, err)


def check_restart(made: Group, kind: str, processes: int, failed: int, err: str) -> None:
    """What a group must have said and left that failed once and then ended well."""
    line, run = err.splitlines()[-1], made.folder / "run"
    named = rf"jaxtrain: process {failed} of {processes} {FAULTS[kind]} while training at step 5"
    told = (
        rf"( \(no progress for \d+ s\))?; stacks: {run}/stacks/\S+\.txt; restarting from the last"
        r" commit \(1 of 3\)"
    )
    assert re.fullmatch(named + told, line), err
    [stacks] = (run / "stacks").iterdir()
    said = stacks.read_text()
    assert said.startswith(line.partition(";")[0])
    # every living peer, at the place where it waits
    assert said.count("wait_for_peers") == processes - 1
    assert ("the_place_where_it_hangs" in said) == (kind == "hang")
    for index in range(processes):
        first, second = (made.folder / f"argv-{index}").read_text().splitlines()
        assert second == f"{first} --workdir={run}"
    assert (err.count("RuntimeError: a fault of this very kind") == 1) == (
        kind == "raise" and failed == 0
    )
    assert made.left() == []


def test_each_group_is_gone_within_the_bound(tmp_path: Path) -> None:
    """From the fault on, to the death of all; a hung process is given a second, a stopped one as
    much."""
    with contextlib.ExitStack() as stack:
        for kind in FAULTS:
            (tmp_path / kind).mkdir()
        made = [
            stack.enter_context(group(tmp_path / kind, f"--fault={kind}:1", "--hang_seconds=1"))
            for kind in FAULTS
        ]
        for each in made:
            each.wait_for_workers(2, step=1)
        began = time.monotonic()
        for each in made:
            each.finish(75)
        assert time.monotonic() - began < BOUND


def test_what_the_experiment_asks_for_counts_like_flags(tmp_path: Path) -> None:
    """The supervisor reads no experiment: its worker tells it what `Run(max_restarts=1,
    hang_seconds=1)` says."""
    with group(tmp_path, "--fault=hang:1", "--options=1,1.0") as made:
        _, err = made.finish(0)
    assert re.fullmatch(
        r"jaxtrain: process 1 of 2 hung while training at step 5 .*; restarting from the beginning,"
        r" .* \(1 of 1\)",
        err.splitlines()[0],
    ), err


def test_no_restarts_are_left(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with group(
        tmp_path,
        "--fault=raise:1",
        "--attempts=9",
        f"--sent_workdir={tmp_path / 'run'}",
        "--max_restarts=1",
    ) as made:
        _, err = made.finish(75)
    first, *words, last = err.splitlines()
    assert first.endswith("; restarting from the beginning, for nothing was committed (1 of 1)")
    assert (
        words[0] == "process 1: Traceback (most recent call last):"
        and words[-1] == "process 1: RuntimeError: a fault of this very kind"
    )
    assert last.endswith("; no restarts left (--max_restarts=1)")
    assert (tmp_path / "run" / "logs" / "1.txt").read_text().count(
        "RuntimeError: a fault of this very kind"
    ) == 2


@pytest.mark.parametrize("status", [2, 3, 71])
def test_a_final_status_is_passed_on_at_once(tmp_path: Path, status: int) -> None:
    with group(
        tmp_path,
        f"--fault={status}:0,1",
        "--max_restarts=3",
        JAXTRAIN_FINAL_STATUS=str(tmp_path / "final"),
    ) as made:
        _, err = made.finish(status)
    assert err == f"jaxtrain: error: this is status {status} of process 0\n"
    assert (tmp_path / "final").read_text() == f"{status}\n"
    assert len(made.workers()) == 2
    assert made.left() == [] and not any((tmp_path / "temporary").iterdir())


def test_final_statuses_are_known_to_the_script_of_slurm() -> None:
    assert errors.FINAL.keys() == {2, 3, 70, 71, 74, 130}
    script = (ROOT / "scripts" / "slurm" / "train.sbatch").read_text()
    assert f"case $status in 0 | {' | '.join(map(str, errors.FINAL))}) exit" in script


def test_a_worker_without_a_terminal_has_its_error_shown(tmp_path: Path) -> None:
    with group(tmp_path, "--fault=71:1") as made:
        _, err = made.finish(71)
    first, second, third = err.splitlines()
    assert first == "process 1: jaxtrain: error: this is status 71 of process 1"
    assert second.startswith(
        "jaxtrain: process 1 of 2 ended with status 71 (out of memory) while training at step 5;"
        " stacks: "
    )
    assert second.endswith("; a restart would not help")
    [folder] = (tmp_path / "temporary").iterdir()  # there is no workdir to keep the log in
    assert (
        third
        == f"jaxtrain: what the processes printed is kept in {folder}, for it does not lie in the"
        " run's folder"
    )
    assert "log-1" in made.left()
    assert not {"heartbeat-1", "stacks-1"} & set(made.left())


def test_where_children_are_ignored_their_status_is_still_known(tmp_path: Path) -> None:
    """Some launchers ignore SIGCHLD, which goes on to what they start; the kernel then forgets how
    children ended."""
    ignore = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
        " os.execv(sys.argv[1], sys.argv[1:])"
    )
    with group(tmp_path, "--fault=71:0", before=(sys.executable, "-c", ignore)) as made:
        made.finish(71)


LEAVES_A_CHILD = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"


def test_a_dead_worker_keeps_its_number_until_its_children_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later the number may be a stranger's, so nothing is sent to it any more."""
    worker = worker_processes.Worker(
        0, [sys.executable, "-c", LEAVES_A_CHILD], os.environ, tmp_path, tmp_path / "log", 0.0
    )
    until = time.monotonic() + 10
    while worker.observe(1.0).exit_status is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    child, own = int((tmp_path / "log").read_text()), worker._process.pid
    assert worker.observe(2.0).exit_status == 0 and Path(f"/proc/{own}").exists() and alive(child)
    sent: list[int] = []
    monkeypatch.setattr(
        worker_processes.os,
        "killpg",
        lambda group, number, kill=os.killpg: (sent.append(group), kill(group, number)),
    )
    monkeypatch.setattr(worker_processes.os, "kill", lambda process, number: sent.append(process))
    assert (
        worker_processes.kill_all([worker]) == []
        and sent == [own]
        and not Path(f"/proc/{own}").exists()
    )
    while alive(child):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert worker_processes.kill_all([worker]) == [] and not worker.request_stacks()
    worker.send_signal(signal.SIGTERM)
    assert sent == [own]


def test_a_long_compilation_is_no_hang(tmp_path: Path) -> None:
    with group(tmp_path, "--compile=1", "--hang_seconds=0.5") as made:
        _, err = made.finish(0)
    assert err == ""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_worker_once(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    with group(tmp_path, "--steps=1000", "--max_restarts=3") as made:
        made.wait_for_workers(2)
        made.process.send_signal(number)
        _, err = made.finish(status)
    assert err == ""
    assert [(tmp_path / f"saved-{index}").read_text() for index in range(2)] == [
        number.name.removeprefix("SIG")
    ] * 2


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_after_a_stop_signal_ends_all_at_once(
    tmp_path: Path, first: signal.Signals
) -> None:
    with group(tmp_path, "--fault=hang:0") as made:
        made.wait_for_workers(2, step=5)
        while not (tmp_path / "hangs").exists():
            time.sleep(0.02)
        for number in (first, signal.SIGINT):
            made.process.send_signal(number)
            time.sleep(0.7)  # sooner it would be the same Ctrl-C
        _, err = made.finish(130)
    assert err == "jaxtrain: interrupted twice; nothing more is saved\n"


def test_hangup_is_ignored_where_it_was_before(tmp_path: Path) -> None:
    with group(tmp_path, "--steps=20", before=("nohup",)) as made:
        made.wait_for_workers(2)
        made.process.send_signal(signal.SIGHUP)
        made.finish(0)


def test_workers_do_not_outlive_their_supervisor(tmp_path: Path) -> None:
    with group(tmp_path, "--steps=100000") as made:
        made.wait_for_workers(2)
        made.process.kill()
        until = time.monotonic() + 5
        while any(map(alive, made.workers())) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(map(alive, made.workers()))


def test_a_supervisor_that_was_stopped_itself_gives_no_alarm(tmp_path: Path) -> None:
    with group(tmp_path, "--fault=slow:0", "--steps=15", "--hang_seconds=2") as made:
        made.wait_for_workers(2)
        made.process.send_signal(signal.SIGSTOP)
        for worker in made.workers():
            os.kill(worker, signal.SIGSTOP)
        time.sleep(2.2)
        made.process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        for worker in made.workers():
            os.kill(worker, signal.SIGCONT)
        _, err = made.finish(0)
    assert err == ""


def test_the_devices_and_the_coordinator_of_a_rehearsal(tmp_path: Path) -> None:
    made = Group(
        tmp_path, own=("--processes=2", "--devices=4"), XLA_FLAGS="--xla_cpu_enable_fast_math=false"
    )
    made.finish(0)
    lines = [(tmp_path / f"environ-{index}").read_text().split(maxsplit=3) for index in range(2)]
    for _, coordinator, platforms, flags in lines:
        assert rendezvous.split_address(coordinator)[0] == "127.0.0.1"
        assert platforms == "cpu"  # else jax takes the GPU of a machine that has one
        assert (
            flags.strip()
            == "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=4"
        )
    assert lines[0][1] == lines[1][1]
    # whoever says so himself means it
    Group(tmp_path, own=("--devices=4",), JAX_PLATFORMS="cuda").finish(0)
    assert (tmp_path / "environ-0").read_text().splitlines()[-1].split()[2] == "cuda"


def test_one_worker_of_a_larger_group_is_named_by_its_own_number(tmp_path: Path) -> None:
    theirs = {
        "JAXTRAIN_PROCESS": "3",
        "JAXTRAIN_PROCESSES": "8",
        "JAXTRAIN_COORDINATOR": "10.0.0.1:7000",
    }
    made = Group(tmp_path, "--fault=kill:3", **theirs)
    _, err = made.finish(75)
    assert (
        err
        == "jaxtrain: process 3 of 8 was killed by SIGKILL while training at step 5; no restarts"
        " left (--max_restarts=0)\n"
    )
    alone = Group(tmp_path, "--fault=kill:0")
    _, err = alone.finish(75)
    assert (
        err
        == "jaxtrain: the process was killed by SIGKILL while training at step 5; no restarts left"
        " (--max_restarts=0)\n"
    )


LAUNCHES = [
    (["--processes=2"], ["--processes=2", "ROOT/experiments/digits.py"]),
    (
        ["--processes", "2", "--steps=9", "--devices=4"],
        ["--processes=2", "--devices=4", "ROOT/experiments/digits.py", "--steps=9"],
    ),
    (
        ["--steps", "9", "--processes=2"],
        ["--processes=2", "ROOT/experiments/digits.py", "--steps", "9"],
    ),
    (
        ["EXPERIMENT", "--processes=2", "--hang_seconds=8"],
        ["--processes=2", "EXPERIMENT", "--hang_seconds=8"],
    ),
    (["--devices=2", "EXPERIMENT"], ["--devices=2", "EXPERIMENT"]),
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environment is ready, and whose interpreter only says what it is asked to
    run."""
    for name in ("scripts", "experiments", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "launch_local", tmp_path / "scripts")
    words = (ROOT / "scripts" / "environment").read_text()
    (tmp_path / "scripts" / "environment").write_text(f"{words}\nprepare_environment() {{ :; }}\n")
    (tmp_path / ".venv" / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    (tmp_path / "experiments" / "own.py").touch()
    return tmp_path


@pytest.mark.parametrize(("arguments", "expected"), LAUNCHES)
def test_launch_local_tells_the_supervisor(
    checkout: Path, arguments: list[str], expected: list[str]
) -> None:
    experiment = str(checkout / "experiments" / "own.py")
    given = [experiment if word == "EXPERIMENT" else word for word in arguments]
    done = subprocess.run(
        [checkout / "scripts" / "launch_local", *given], capture_output=True, text=True, check=True
    )
    said = [word.replace(str(checkout), "ROOT") for word in done.stdout.splitlines()]
    assert said == [
        "-m",
        "jaxtrain.processes.supervisor",
        *(word.replace("EXPERIMENT", "ROOT/experiments/own.py") for word in expected),
    ]


def test_launch_local_says_what_is_misspelt(checkout: Path) -> None:
    for words, message in [
        (["no/such.py"], "no/such.py: no such experiment; there are experiments/own.py"),
        (["--processes"], "--processes: needs a value, e.g. --processes=2"),
    ]:
        done = subprocess.run(
            [checkout / "scripts" / "launch_local", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (2, f"jaxtrain: error: {message}\n")


def test_the_supervisor_loads_nothing_heavy() -> None:
    code = (
        "import sys, jaxtrain.processes.supervisor; print(sorted({'jax', 'numpy', 'absl'} &"
        " set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout == "[]\n"
