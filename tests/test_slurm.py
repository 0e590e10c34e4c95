"""A real SLURM on loopback runs scripts/slurm/: two tasks, one of them killed, queued again, and
ended well.

It needs Debian's slurmctld, slurmd, slurm-client and munge, and root, for munged has a user of its
own.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxtrain.processes import heartbeat

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = (
    "munged",
    "mungekey",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "scancel",
    "squeue",
)
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
pytestmark = pytest.mark.slow

WORKER = '''
"""A stand-in for an experiment: it beats until the file `go` exists or a signal comes."""
import os, signal, sys, time
from pathlib import Path
from jaxtrain.processes import cluster, heartbeat, rendezvous

flags = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:])
folder, workdir = Path(flags["folder"]), Path(flags["workdir"])
asked = []
signal.signal(signal.SIGTERM, lambda *seen: asked.append(1))
found = cluster.detect(os.environ)
rendezvous.barrier(found.count, found.index, found.coordinator, timeout=60)
workdir.mkdir(parents=True, exist_ok=True)
heartbeat.send_workdir(workdir)
attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
told = f"{os.getpid()} {found.count} {found.source} {workdir}"
(folder / f"task-{found.index}-{attempt}").write_text(told)
if flags.get("status") and found.index == 1:
    print("jaxtrain: error: for good", file=sys.stderr)
    sys.exit(int(flags["status"]))
for step in range(100000):
    heartbeat.beat("training", step)
    time.sleep(0.05)
    if asked:
        (folder / f"saved-{found.index}").touch()
        sys.exit(75)
    if (folder / "go").exists():
        break
print("ended well", found.index, flush=True)
'''


class Cluster:
    """One controller and one node with two processors, on loopback, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, list[subprocess.Popen[bytes]]()
        self.environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "JAXTRAIN_", "XLA_FLAGS"))
        }
        self.environ |= {
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "JAXTRAIN_PYTHON": sys.executable,
            "JAXTRAIN_ROOT": str(ROOT),
        }
        self.environ |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def start(self) -> None:
        """Starts the daemons and waits until the node is idle."""
        self._start_munge()
        host, ports = socket.gethostname().split(".")[0], free_ports(2)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        lines = [
            "ClusterName=rehearsal",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            f"SlurmdPort={ports[1]}",
            f"NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000",
            f"PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={self.folder}/munge/socket",
            "CredType=cred/munge",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "JobRequeue=1",
            "ReturnToService=2",
            "MpiDefault=none",
            "KillWait=5",
            "SwitchType=switch/none",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/spool",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd.pid",
            f"SlurmctldLogFile={self.folder}/slurmctld.log",
            f"SlurmdLogFile={self.folder}/slurmd.log",
            "AccountingStorageType=accounting_storage/none",
            "JobAcctGatherType=jobacct_gather/none",
            "JobCompType=jobcomp/none",
        ]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D")
        wait_for(
            lambda: "idle" in self.ask("sinfo", "--noheader", "--format=%t", check=False),
            60,
            "the node is not idle",
        )

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir()
        for parent in (self.folder, *self.folder.parents):  # pytest's folders are for root alone
            if str(parent).startswith("/tmp/"):
                parent.chmod(parent.stat().st_mode | 0o011)
        subprocess.run(
            ["mungekey", "--create", f"--keyfile={folder}/key"], check=True, env=self.environ
        )
        shutil.chown(folder, "munge", "munge")
        shutil.chown(folder / "key", "munge", "munge")
        paths = {
            "key-file": "key",
            "socket": "socket",
            "log-file": "log",
            "pid-file": "pid",
            "seed-file": "seed",
        }
        options = [f"--{option}={folder / name}" for option, name in paths.items()]
        self.daemons.append(
            subprocess.Popen(
                ["munged", "--foreground", "--force", *options],
                env=self.environ,
                user="munge",
                group="munge",
            )
        )
        wait_for((folder / "socket").exists, 10, "munged does not start")

    def _daemon(self, *command: str) -> None:
        self.daemons.append(
            subprocess.Popen(
                command, env=self.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )

    def ask(self, *command: str, check: bool = True) -> str:
        """What one of SLURM's own commands prints."""
        return subprocess.run(
            command, env=self.environ, capture_output=True, text=True, check=check, cwd=self.folder
        ).stdout.strip()

    def submit(self, *arguments: str, **environ: str) -> str:
        """Submits scripts/slurm/train.sbatch with two tasks, and returns the number of the job."""
        script, before = str(ROOT / "scripts" / "slurm" / "train.sbatch"), dict(self.environ)
        self.environ |= environ
        try:
            output = f"--output={self.folder}/job-%j.txt"
            return self.ask(
                "sbatch",
                "--parsable",
                "--nodes=1",
                "--ntasks=2",
                "--ntasks-per-node=2",
                output,
                script,
                *arguments,
            )
        finally:
            self.environ = before

    def state(self, job: str) -> dict[str, str]:
        """What the controller says of a job."""
        return dict(
            word.partition("=")[::2]
            for word in self.ask("scontrol", "--oneliner", "show", "job", job).split()
        )

    def hurry(self, job: str) -> None:
        """Has a job start that was queued again, which SLURM holds back for two minutes."""
        wait_for(
            lambda: self.state(job)["JobState"] == "PENDING", 60, "the job is not queued again"
        )
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")

    def end(self, job: str, seconds: float = 120) -> tuple[str, str]:
        """The state and the output of a job that has ended."""
        wait_for(
            lambda: self.state(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"),
            seconds,
            "the job does not end",
        )
        return self.state(job)["JobState"] + " " + self.state(job)["ExitCode"], self.output(job)

    def output(self, job: str) -> str:
        """What the job has printed so far."""
        path = self.folder / f"job-{job}.txt"
        return path.read_text() if path.exists() else ""

    def stop(self) -> None:
        """Ends all daemons, and with the node's one its tasks."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                ["scancel", "--user=root"],
                env=self.environ,
                check=False,
                capture_output=True,
                timeout=10,
            )
            # a step that cannot report to the controller lives on
            with contextlib.suppress(AssertionError):
                wait_for(
                    lambda: not self.ask("squeue", "--noheader", check=False), 30, "jobs are left"
                )
            time.sleep(1)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def wait_for(true: Callable[[], object], seconds: float, otherwise: str) -> None:
    """Returns when `true` is so."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, otherwise
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        pytest.skip(
            f"no {', '.join(missing)} here; apt-get install slurmctld slurmd slurm-client munge"
        )
    if os.geteuid() != 0:
        pytest.skip("needs root, to run munged under its own user")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    """A script that trains nothing, but lives like a training."""
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path / "worker.py"


def test_a_killed_task_queues_the_job_again_and_it_ends_well(
    cluster: Cluster, worker: Path
) -> None:
    folder = worker.parent
    job = cluster.submit(
        str(worker), f"--folder={folder}", f"--workdir={folder}/run", JAXTRAIN_REQUEUES="1"
    )
    wait_for(
        lambda: (folder / "task-0-0").exists() and (folder / "task-1-0").exists(),
        60,
        "the tasks do not start",
    )
    killed, count, source, _ = (folder / "task-1-0").read_text().split()
    assert (count, source) == ("2", "SLURM")
    os.kill(int(killed), signal.SIGKILL)
    cluster.hurry(job)
    wait_for(
        lambda: (folder / "task-0-1").exists() and (folder / "task-1-1").exists(),
        60,
        "the tasks do not start again",
    )
    (folder / "go").touch()
    state, said = cluster.end(job)
    assert state == "COMPLETED 0:0", said
    assert "jaxtrain: process 1 of 2 was killed by SIGKILL while training at step " in said
    assert "queueing again (1 of 1)" in said and said.count("ended well") == 2
    # the workdir of the first attempt
    assert (folder / "task-0-1").read_text().split()[-1] == str(folder / "run")


def test_requeues_are_bounded_and_a_preempted_job_saves(cluster: Cluster, worker: Path) -> None:
    folder = worker.parent
    job = cluster.submit(
        str(worker), f"--folder={folder}", f"--workdir={folder}/run", JAXTRAIN_REQUEUES="0"
    )
    wait_for(
        lambda: (folder / "task-0-0").exists() and (folder / "task-1-0").exists(),
        60,
        "the tasks do not start",
    )
    # as --signal=B:TERM@120 does when time is nearly up
    cluster.ask("scancel", "--signal=TERM", "--batch", job)
    state, said = cluster.end(job)
    assert state == "FAILED 75:0", said
    assert (
        "asked to end; saving" in said
        and "status 75; no requeues left (JAXTRAIN_REQUEUES=0)" in said
    )
    assert (folder / "saved-0").exists() and (folder / "saved-1").exists()


def test_what_no_restart_mends_ends_the_job(cluster: Cluster, worker: Path) -> None:
    job = cluster.submit(
        str(worker), f"--folder={worker.parent}", "--status=71", f"--workdir={worker.parent}/run"
    )
    state, said = cluster.end(job)
    assert state == "FAILED 71:0", said
    assert "jaxtrain: error: for good" in said and "queueing again" not in said


def test_digits_train_in_two_tasks_and_survive_a_kill(cluster: Cluster, tmp_path: Path) -> None:
    """The same with real training: two processes of jax, one killed on the way, go on from the last
    commit."""
    workdir = tmp_path / "run"
    # Commits come early and often, and so many steps are left after the first that the kill cannot
    # come too late: the rest takes over ten seconds.
    flags = (
        "--model=mlp",
        "--steps=800",
        "--checkpoint_every=20steps",
        "--eval_every=0",
        "--platform=cpu",
        "--notensorboard",
        "--noreport",
    )
    job = cluster.submit(
        "experiments/digits.py", *flags, f"--workdir={workdir}", JAXTRAIN_REQUEUES="1"
    )

    def committed() -> bool:
        assert cluster.state(job)["JobState"] in (
            "PENDING",
            "RUNNING",
        ) and "queueing again" not in cluster.output(job), cluster.output(job)
        return any(workdir.glob("checkpoints/*/COMMIT"))

    wait_for(committed, 180, "nothing is committed")
    heartbeat_files = [
        path
        for path in Path("/tmp").glob("jaxtrain-*/heartbeat-0")
        if (latest := heartbeat.read(path)) and latest.workdir == str(workdir)
    ]
    assert len(heartbeat_files) == 2
    tasks = [
        int(task)
        for task in cluster.ask(
            "pgrep", "--full", f"^{sys.executable} experiments/digits.py.*{workdir}"
        ).split()
    ]
    assert len(tasks) == 2, cluster.output(job)
    os.kill(tasks[1], signal.SIGKILL)
    cluster.hurry(job)
    state, said = cluster.end(job, 300)
    assert state == "COMPLETED 0:0", said
    assert re.search(
        r"jaxtrain: process [01] of 2 was killed by SIGKILL while (training|saving) at step \d+",
        said,
    ), said
    assert "queueing again (1 of 1)" in said
    resumed = re.findall(r"resumed from step (\d+)", said)
    assert len(resumed) == 1 and 20 <= int(resumed[0]) < 800 and int(resumed[0]) % 20 == 0, said
    assert (workdir / "checkpoints" / "800" / "COMMIT").is_file()
    steps = [
        json.loads(line)["step"]
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
        if '"train"' in line
    ]
    assert steps == list(range(50, 801, 50))  # each line once, as if nothing had happened
