"""Cluster detection by flags and by each scheduler's variables; and the rendezvous barrier, with
real sockets."""

import concurrent.futures
import errno
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxtrain import errors
from jaxtrain.processes import arguments, cluster, rendezvous, supervisor
from jaxtrain.processes.cluster import ProcessInfo, detect, local_gpus
from jaxtrain.processes.rendezvous import PeerLost, barrier

ROOT = Path(__file__).resolve().parent.parent
SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_ID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NUM_NODES": "2",
}
SLURM_PORT = 61440 + (4100 + 1009) % 4096
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "PMIX_NAMESPACE": "1531576321",
}
OPEN_MPI_PORT = 61440 + (1531576320 // 4096) % 4096
KUBERNETES = {
    "JOB_COMPLETION_INDEX": "1",
    "JAXTRAIN_PROCESSES": "2",
    "JAXTRAIN_COORDINATOR": "jaxtrain-0.jaxtrain:61500",
}
LOCAL = {
    "JAXTRAIN_PROCESSES": "2",
    "JAXTRAIN_PROCESS": "1",
    "JAXTRAIN_COORDINATOR": "127.0.0.1:61500",
}

SEVERAL = (
    "processes on several hosts, and this address leads each to itself; name the host of process 0"
)


def without(environ: dict[str, str], *names: str, **changes: str) -> dict[str, str]:
    """The environment without some names, and with others changed."""
    return {name: value for name, value in {**environ, **changes}.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "given", "expected"),
    [
        ({}, {}, None),
        ({}, {"processes": 1}, None),
        (SLURM, {"processes": 1}, None),
        (
            {},
            {"processes": 2, "process": 1, "coordinator": "a:7"},
            ProcessInfo(2, 1, "a:7", "flags"),
        ),
        (
            {},
            {"processes": 2, "process": 0, "coordinator": "[::1]:7"},
            ProcessInfo(2, 0, "[::1]:7", "flags"),
        ),
        (
            SLURM,
            {"processes": 2, "process": 1, "coordinator": "a:7"},
            ProcessInfo(2, 1, "a:7", "flags"),
        ),
        (LOCAL, {}, ProcessInfo(2, 1, "127.0.0.1:61500", "environment")),
        (
            {**SLURM, **LOCAL, "JAXTRAIN_LOCAL_PROCESS": "1", "JAXTRAIN_LOCAL_PROCESSES": "2"},
            {},
            ProcessInfo(2, 1, "127.0.0.1:61500", "environment", 1, 2),
        ),
        (SLURM, {}, ProcessInfo(4, 3, f"node07:{SLURM_PORT}", "SLURM", 1, 2)),
        (SLURM, {"processes": 4}, ProcessInfo(4, 3, f"node07:{SLURM_PORT}", "SLURM", 1, 2)),
        (SLURM, {"coordinator": "ib7:9000"}, ProcessInfo(4, 3, "ib7:9000", "SLURM", 1, 2)),
        (
            without(SLURM, SLURM_STEP_TASKS_PER_NODE="3,1"),
            {},
            ProcessInfo(4, 3, f"node07:{SLURM_PORT}", "SLURM", 1, 1),
        ),
        (
            without(SLURM, SLURM_STEP_TASKS_PER_NODE="4", SLURM_NODEID="0", SLURM_LOCALID="3"),
            {},
            ProcessInfo(4, 3, f"127.0.0.1:{SLURM_PORT}", "SLURM", 3, 4),
        ),
        # A batch script is no task; nor is a step of one task more than one process.
        (without(SLURM, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"), {}, None),
        (without(SLURM, SLURM_STEP_NUM_TASKS="1"), {}, None),
        (OPEN_MPI, {}, ProcessInfo(4, 2, f"10.96.0.1:{OPEN_MPI_PORT}", "Open MPI", 0, 2)),
        (
            {**SLURM, **OPEN_MPI},
            {},
            ProcessInfo(4, 2, f"10.96.0.1:{OPEN_MPI_PORT}", "Open MPI", 0, 2),
        ),
        (
            without(
                OPEN_MPI, OMPI_MCA_orte_hnp_uri="1531576320.0;tcp6://[fe80::b9b,2620:10d::2]:43370"
            ),
            {},
            ProcessInfo(4, 2, f"[fe80::b9b]:{OPEN_MPI_PORT}", "Open MPI", 0, 2),
        ),
        (
            without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri", PMIX_NAMESPACE="prterun-login-1-4711@1"),
            {},
            ProcessInfo(4, 2, f"login-1:{61440 + 4711 % 4096}", "Open MPI", 0, 2),
        ),
        (
            without(OPEN_MPI, OMPI_COMM_WORLD_LOCAL_SIZE="4"),
            {},
            ProcessInfo(4, 2, f"127.0.0.1:{OPEN_MPI_PORT}", "Open MPI", 0, 4),
        ),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, {}, None),
        (KUBERNETES, {}, ProcessInfo(2, 1, "jaxtrain-0.jaxtrain:61500", "Kubernetes")),
        # An Indexed Job of single runs.
        ({"JOB_COMPLETION_INDEX": "1"}, {}, None),
        (without(KUBERNETES, JAXTRAIN_PROCESSES="1", JOB_COMPLETION_INDEX="0"), {}, None),
    ],
)
def test_a_process_knows_its_place(
    environ: dict[str, str], given: dict[str, int | str], expected: ProcessInfo | None
) -> None:
    assert detect(environ, **given) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environ", "given", "message"),
    [
        (
            {},
            {"processes": 2},
            (
                "--processes=2: needs --process and --coordinator too; or let scripts/launch_local"
                " or a scheduler start all processes"
            ),
        ),
        (
            {},
            {"process": 1, "coordinator": "a:7"},
            (
                "--process=1 --coordinator=a:7: needs --processes too; or let scripts/launch_local"
                " or a scheduler start all processes"
            ),
        ),
        (
            {},
            {"processes": 2, "process": 2, "coordinator": "a:7"},
            "--process=2: must be 0..1, for --processes=2",
        ),
        (
            {},
            {"processes": 2, "process": 0, "coordinator": "a"},
            "--coordinator=a: must be HOST:PORT, e.g. node1:61500",
        ),
        (
            {},
            {"processes": 2, "process": 0, "coordinator": "a:70000"},
            "--coordinator=a:70000: must be HOST:PORT, e.g. node1:61500",
        ),
        (
            {},
            {"processes": 2, "process": 0, "coordinator": "http://a:70"},
            "--coordinator=http://a:70: must be HOST:PORT, e.g. node1:61500",
        ),
        (SLURM, {"processes": 2}, "--processes=2: SLURM says 4; drop the flag"),
        (SLURM, {"process": 1}, "--process=1: SLURM says 3; drop the flag"),
        (
            SLURM,
            {"coordinator": "127.0.0.1:7"},
            "--coordinator=127.0.0.1:7: SLURM runs 4 " + SEVERAL,
        ),
        (
            without(SLURM, SLURM_STEP_NODELIST="localhost,node2"),
            {},
            f"JAXTRAIN_COORDINATOR=localhost:{SLURM_PORT}: SLURM runs 4 {SEVERAL}",
        ),
        (
            without(SLURM, SLURM_PROCID="x"),
            {},
            (
                "SLURM_PROCID=x: must be a whole number; start one process without it, or mend what"
                " sets it"
            ),
        ),
        (
            without(LOCAL, "JAXTRAIN_PROCESS"),
            {},
            (
                "JAXTRAIN_PROCESSES and JAXTRAIN_COORDINATOR set without JAXTRAIN_PROCESS; set all"
                " three or none"
            ),
        ),
        (
            without(LOCAL, "JAXTRAIN_COORDINATOR"),
            {},
            "JAXTRAIN_PROCESS is set without JAXTRAIN_COORDINATOR; set all three or none",
        ),
        (
            without(LOCAL, JAXTRAIN_PROCESS="2"),
            {},
            "JAXTRAIN_PROCESS=2: must be 0..1, for JAXTRAIN_PROCESSES=2",
        ),
        (
            without(KUBERNETES, "JAXTRAIN_COORDINATOR"),
            {},
            (
                "JOB_COMPLETION_INDEX is set without JAXTRAIN_COORDINATOR; name it in the manifest,"
                " see scripts/kubernetes/job.yaml"
            ),
        ),
        (
            without(KUBERNETES, JAXTRAIN_COORDINATOR="localhost:61500"),
            {},
            "JAXTRAIN_COORDINATOR=localhost:61500: Kubernetes runs 2 " + SEVERAL,
        ),
        (
            without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"),
            {},
            "Open MPI does not say on which host process 0 is; give --coordinator=HOST:PORT",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    environ: dict[str, str], given: dict[str, int | str], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        detect(environ, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[001,007-015]", "node001"),
        ("gpu-a100-[3,5]", "gpu-a100-3"),
        ("rack[1-2]node[04-05]", "rack1node04"),
        ("n[7]-ib,n9", "n7-ib"),
        ("a.b.c", "a.b.c"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert cluster.first_host(nodes) == host


def test_gpus_are_shared_within_a_host() -> None:
    one_a_host, one_a_gpu = (
        ProcessInfo(2, 1, "a:1", "SLURM"),
        ProcessInfo(8, 5, "a:1", "SLURM", local_index=1, local_count=4),
    )
    assert local_gpus(one_a_host, 8) is None
    assert [local_gpus(one_a_gpu, gpus) for gpus in (4, 8)] == [[1], [2, 3]]
    assert local_gpus(one_a_gpu, 1) is None  # the scheduler has bound it to its own
    assert local_gpus(one_a_gpu, 0) is None
    message = (
        "--processes=8: 4 processes on this host cannot share 6 GPUs evenly; start one a host, one"
        " a GPU, or hide some with CUDA_VISIBLE_DEVICES"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        local_gpus(one_a_gpu, 6)


def test_processes_of_one_machine_cannot_share_its_only_gpu() -> None:
    rehearsed = detect({**LOCAL, "JAXTRAIN_LOCAL_PROCESS": "1", "JAXTRAIN_LOCAL_PROCESSES": "2"})
    assert rehearsed is not None and [local_gpus(rehearsed, gpus) for gpus in (0, 2, 4)] == [
        None,
        [1],
        [2, 3],
    ]
    with pytest.raises(
        ValueError,
        match=r"^--processes=2: cannot share 1 GPU; add --platform=cpu to rehearse on the CPU$",
    ):
        local_gpus(rehearsed, 1)


def test_gpus_are_counted_without_a_driver(tmp_path: Path) -> None:
    for gpu in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / gpu).mkdir()
    assert cluster.visible_gpus({}, str(tmp_path)) == 2
    assert cluster.visible_gpus({}, str(tmp_path / "none")) == 0
    assert [
        cluster.visible_gpus({"CUDA_VISIBLE_DEVICES": shown})
        for shown in ("", "-1", "3", "0,1", "GPU-1a,GPU-2b")
    ] == [0, 0, 1, 2, 2]


def free_coordinator(host: str = "127.0.0.1") -> str:
    """An address that nobody listens on."""
    return f"{host}:{supervisor.free_port()}"


def call(
    coordinator: str, *members: tuple[int, int], seconds: float = 10.0
) -> list[BaseException | None]:
    """The exception, if any, of each (count, index) at one barrier, each in a thread."""
    with concurrent.futures.ThreadPoolExecutor(len(members)) as pool:
        made = [
            pool.submit(barrier, count, index, coordinator, timeout=seconds)
            for count, index in members
        ]
        return [each.exception() for each in made]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", socket.gethostname()])
def test_all_come(host: str) -> None:
    assert call(free_coordinator(host), *((4, index) for index in range(4))) == [None] * 4


def test_the_first_process_may_come_last_and_go_again() -> None:
    coordinator, came = free_coordinator(), []
    other = threading.Thread(target=lambda: came.append(barrier(2, 1, coordinator, timeout=20)))
    other.start()
    # a process 0 that dies when it has been found
    with socket.create_server(rendezvous.split_address(coordinator)) as another:
        another.accept()[0].close()
    time.sleep(0.2)
    arrivals: list[int] = []
    barrier(2, 0, coordinator, timeout=20, on_arrival=lambda: arrivals.append(1))
    other.join()
    assert came == [None] and len(arrivals) == 2


def test_who_is_missing_is_named_by_all() -> None:
    coordinator = free_coordinator()
    message = (
        f"2 of 12 processes came to {coordinator} within 1 s; missing: 1, 2, 4, 5, 6, 7, 8, 9 and 2"
        " more"
    )
    assert [
        (type(error), str(error)) for error in call(coordinator, (12, 0), (12, 3), seconds=1)
    ] == [(PeerLost, message)] * 2


def test_nobody_is_there() -> None:
    coordinator = free_coordinator()
    message = (
        f"process 1 of 2 did not find process 0 at {coordinator} within 1 s (Connection refused); "
        "is it running there, and does the network let it through?"
    )
    with pytest.raises(PeerLost, match=f"^{re.escape(message)}$"):
        barrier(2, 1, coordinator, timeout=1)
    with pytest.raises(
        PeerLost, match=r"did not find process 0 at nowhere\.invalid:7 within 0 s \(.*\)"
    ):
        barrier(2, 1, "nowhere.invalid:7", timeout=0.2)


def test_a_port_in_use_is_said_before_jax_crashes_on_it() -> None:
    coordinator = free_coordinator()
    message = (
        f"--coordinator={coordinator}: process 0 cannot listen there (Address already in use); name"
        " a free port"
    )
    with (
        socket.create_server(rendezvous.split_address(coordinator)),
        pytest.raises(PeerLost, match=f"^{re.escape(message)}$"),
    ):
        barrier(2, 0, coordinator, timeout=1)


def test_those_who_contradict_one_another_are_told() -> None:
    for members, message in [
        (
            [(2, 0), (3, 1)],
            "--processes=3: said process 1, and process 0 said 2; start all with the same",
        ),
        (
            [(3, 0), (3, 1), (3, 1)],
            "--process=1: two processes say they are this one; give each its own, from 0 to 2",
        ),
    ]:
        assert [(type(error), str(error)) for error in call(free_coordinator(), *members)] == [
            (errors.UserError, message)
        ] * len(members)


def test_one_that_died_and_came_again_is_one() -> None:
    coordinator = free_coordinator()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(barrier, 3, 0, coordinator, timeout=20)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                with socket.create_connection(rendezvous.split_address(coordinator)) as dying:
                    dying.sendall(b"jaxtrain 1 of 3\n")
                    time.sleep(0.1)
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
        others = [pool.submit(barrier, 3, index, coordinator, timeout=20) for index in (1, 2)]
        assert [each.exception() for each in (first, *others)] == [None] * 3


TCP_REPAIR = 19
"""A socket of Linux in this state closes without a word, as that of a host without power does."""


def test_one_that_lost_its_power_and_came_again_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rendezvous, "_KEEP_ALIVE", {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 1}
    )
    coordinator, came = free_coordinator(), threading.Event()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(barrier, 3, 0, coordinator, timeout=20, on_arrival=came.set)
        until = time.monotonic() + 10
        while time.monotonic() < until and not came.is_set():
            try:
                with socket.create_connection(rendezvous.split_address(coordinator)) as dying:
                    dying.sendall(b"jaxtrain 1 of 3\n")
                    assert came.wait(10)
                    try:
                        dying.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
                    except OSError:
                        pytest.skip("only root of Linux can have a connection die without a word")
            except ConnectionRefusedError:
                time.sleep(0.02)
        time.sleep(2.5)  # the system asks after one second, and nobody answers
        others = [pool.submit(barrier, 3, index, coordinator, timeout=20) for index in (1, 2)]
        assert [each.exception() for each in (first, *others)] == [None] * 3


def test_connections_are_asked_whether_they_live() -> None:
    with socket.socket() as connection:
        rendezvous._keep_alive(connection)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        known = {
            name: getattr(socket, name) for name in rendezvous._KEEP_ALIVE if hasattr(socket, name)
        }
        assert {
            name: connection.getsockopt(socket.IPPROTO_TCP, number)
            for name, number in known.items()
        } == {name: rendezvous._KEEP_ALIVE[name] for name in known}


def test_strangers_are_sent_away() -> None:
    coordinator = free_coordinator()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(barrier, 2, 0, coordinator, timeout=20)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"x" * 1000, b"jaxtrain 1 of\n", b""):
            until = time.monotonic() + 10
            while time.monotonic() < until:
                try:
                    with socket.create_connection(
                        rendezvous.split_address(coordinator), timeout=10
                    ) as stranger:
                        stranger.sendall(words)
                        try:
                            stranger.shutdown(socket.SHUT_WR)
                            assert stranger.recv(100) == b""
                        except OSError as error:  # sent away before it had finished
                            assert error.errno in (errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.02)
        barrier(2, 1, coordinator, timeout=20)
        assert first.exception() is None


def test_waiting_may_be_given_up() -> None:
    def give_up() -> None:
        raise KeyboardInterrupt

    for index in range(2):
        with pytest.raises(KeyboardInterrupt):
            barrier(2, index, free_coordinator(), timeout=20, on_wait=give_up)


JOIN = """
import os, signal, sys, time
from jaxtrain.processes import cluster
found = cluster.detect(os.environ)
cluster.join(found, timeout=60)
import jax
import numpy as np
from jax.experimental import multihost_utils
got = []
signal.signal(signal.SIGTERM, lambda *seen: got.append("TERM"))
os.kill(os.getpid(), signal.SIGTERM)  # jax's own handler would swallow it
gathered = multihost_utils.process_allgather(np.float32(found.index)).tolist()
print(jax.process_index(), jax.process_count(), jax.device_count(), gathered, got)
"""


def test_two_processes_become_one_jax() -> None:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAXTRAIN_", "SLURM_", "XLA_FLAGS"))
    }
    clean |= {
        "JAXTRAIN_PROCESSES": "2",
        "JAXTRAIN_COORDINATOR": free_coordinator(),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", JOIN]
    made = [
        subprocess.Popen(
            command,
            env={**clean, "JAXTRAIN_PROCESS": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for index in range(2)
    ]
    for index, process in enumerate(made):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.splitlines()[-1] == f"{index} 2 2 [0.0, 1.0] ['TERM']"


def test_the_manifest_of_kubernetes_agrees_with_itself() -> None:
    """Without a parser of YAML: each value that must equal another is on a line of its own."""
    text = (ROOT / "scripts" / "kubernetes" / "job.yaml").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if not line.strip().startswith("#")]

    def values(key: str) -> list[str]:
        return [
            line.removeprefix("- ").partition(": ")[2].strip('"')
            for line in lines
            if line.removeprefix("- ").startswith(f"{key}: ")
        ]

    service, job = text.split("---\n")
    environ = dict(
        zip(
            [name for name in values("name") if name.startswith("JAXTRAIN")],
            values("value"),
            strict=True,
        )
    )
    assert list(environ) == ["JAXTRAIN_PROCESSES", "JAXTRAIN_COORDINATOR"]
    assert (
        values("completions") == values("parallelism") == [environ["JAXTRAIN_PROCESSES"]] == ["2"]
    )
    assert values("completionMode") == ["Indexed"]
    assert values("job-name") == values("subdomain") == ["jaxtrain"]
    assert "clusterIP: None" in service and "publishNotReadyAddresses: true" in service
    assert (
        values("restartPolicy") == ["Never"]
        and int(values("terminationGracePeriodSeconds")[0]) >= 60
    )
    assert [int(status) for status in values("values")[0].strip("[]").split(", ")] == sorted(
        errors.FINAL
    )
    command = [
        word.strip()
        for key in ("command", "args")
        for word in values(key)[0].strip("[]").split(",")
    ]
    assert command[:3] == ["python", "-m", "jaxtrain.processes.supervisor"]
    assert (
        arguments.parse(
            [str(ROOT / word) if word.endswith(".py") else word for word in command[3:]]
        ).options.max_restarts
        == 3
    )
    assert detect({"JOB_COMPLETION_INDEX": "0", **environ}) == ProcessInfo(
        2, 0, "jaxtrain-0.jaxtrain:61500", "Kubernetes"
    )
    assert "apiVersion: batch/v1" in job
