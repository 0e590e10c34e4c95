"""The processes of a run: which of how many this one is, as flags or a scheduler say, and how they
find one another.

One process a host drives all of its GPUs; where a scheduler starts several on a host, each takes
its share of them.
"""

import dataclasses
import inspect
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from jaxtrain import messages
from jaxtrain.errors import PeerLost, UserError
from jaxtrain.processes import join as rendezvous

PROCESSES, PROCESS, COORDINATOR = "JAXTRAIN_PROCESSES", "JAXTRAIN_PROCESS", "JAXTRAIN_COORDINATOR"
"""The environment's words for --processes, --process and --coordinator; scripts/launch_local sets
them, and so may you."""
LOCAL_PROCESS, LOCAL_PROCESSES = "JAXTRAIN_LOCAL_PROCESS", "JAXTRAIN_LOCAL_PROCESSES"
"""Which of how many on this host, where they share its GPUs."""

JOIN_SECONDS = 540.0
"""How long processes wait for one another; a little less than the supervisor's limit, for they can
say who is missing."""
HEARTBEAT_SECONDS = 30
"""After this silence jax takes a peer for dead, and aborts. Its own 100 s leave GPUs idle; a
heartbeat is a thread of C++, so it needs no step."""
_PORTS = 61440, 4096
"""Schedulers give no port, so one is derived from the job, above those that systems hand out to
outgoing connections."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of how many processes this is, and where the first one is to be found.

    `coordinator` is HOST:PORT; `source` says who told; `local` of `local_count` is its place among
    those on the same host.
    """

    count: int
    index: int
    coordinator: str
    source: str
    local: int = 0
    local_count: int = 1


def find(
    environ: Mapping[str, str],
    *,
    processes: int | None = None,
    process: int | None = None,
    coordinator: str = "",
) -> Processes | None:
    """The place of this process in its group, or None if it is alone.

    >>> find({}, processes=2, process=1, coordinator="10.0.0.1:7000").index
    1
    >>> slurm = {
    ...     "SLURM_JOB_ID": "7",
    ...     "SLURM_NTASKS": "2",
    ...     "SLURM_PROCID": "1",
    ...     "SLURM_STEP_NODELIST": "gpu[07-08]",
    ... }
    >>> find(slurm)
    Processes(count=2, index=1, coordinator='gpu07:61447', source='SLURM', local=0, local_count=1)

    Flags come first, then JAXTRAIN_..., Open MPI, SLURM, Kubernetes; `coordinator` alone replaces
    the one that a scheduler leads to, and `processes=1` keeps a process alone anywhere.
    `ValueError` for what is missing or contradicts.
    """
    if processes == 1:
        return None
    given = {"--processes": processes, "--process": process, "--coordinator": coordinator or None}
    if processes is not None and process is not None and coordinator:
        return _checked(
            Processes(processes, process, coordinator, "flags"),
            names=("--processes", "--process", "--coordinator"),
        )
    found = next(
        (
            each
            for each in (read(environ) for read in (_environment, _open_mpi, _slurm, _kubernetes))
            if each is not None
        ),
        None,
    )
    if found is None:
        missing = [name for name, value in given.items() if value is None]
        if len(missing) < len(given):
            have = " ".join(f"{name}={value}" for name, value in given.items() if value is not None)
            raise UserError(
                f"{have}: needs {' and '.join(missing)} too; or let scripts/launch_local or a"
                " scheduler start all processes"
            )
        return None
    for name, value, theirs in (
        ("--processes", processes, found.count),
        ("--process", process, found.index),
    ):
        if value is not None and value != theirs:
            raise UserError(f"{name}={value}: {found.source} says {theirs}; drop the flag")
    if coordinator:
        found = dataclasses.replace(found, coordinator=coordinator)
    return _checked(
        found, names=(PROCESSES, PROCESS, "--coordinator" if coordinator else COORDINATOR)
    )


def join(
    found: Processes,
    *,
    init_timeout: float = JOIN_SECONDS,
    heartbeat: int = HEARTBEAT_SECONDS,
    arrived: Callable[[], None] = lambda: None,
    waiting: Callable[[], None] = lambda: None,
) -> None:
    """Waits for all processes, and makes one jax of them; after `jax_platforms` is set, before
    anything asks jax for a device.

    `arrived` is called when a process has come, `waiting` twice a second, and may raise. `PeerLost`
    with one line if one does not come within `init_timeout` seconds, `ValueError` if they were told
    different things.
    """
    # jax answers each of these faults with an abort and 30 lines of C++ stack, and a port in use
    # with a segmentation fault; so this comes first.
    rendezvous.roll_call(
        found.count,
        found.index,
        found.coordinator,
        timeout=init_timeout,
        arrived=arrived,
        waiting=waiting,
    )
    import jax

    if jax.config.jax_cpu_collectives_implementation in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler would take SIGTERM away from ours, and decide on a step to save that our loop
    # knows nothing of.
    if hasattr(jax.config, "jax_enable_preemption_service"):
        jax.config.update("jax_enable_preemption_service", False)
    cards = 0 if jax.config.jax_platforms == "cpu" else visible_cards(os.environ)
    options = {
        "local_device_ids": share_of_cards(found, cards),
        # it would take one GPU for each SLURM task, also where a task has the whole host
        "cluster_detection_method": "deactivate",
        "initialization_timeout": max(1, int(init_timeout)),
        "heartbeat_timeout_seconds": heartbeat,
        "coordinator_bind_address": found.coordinator if is_loopback(found.coordinator) else None,
    }
    known = inspect.signature(jax.distributed.initialize).parameters
    try:
        jax.distributed.initialize(
            found.coordinator,
            found.count,
            found.index,
            **{name: value for name, value in options.items() if name in known},
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise PeerLost(
            f"process {found.index} of {found.count} could not join at {found.coordinator}:"
            f" {reason}"
        ) from error


def share_of_cards(found: Processes, cards: int) -> list[int] | None:
    """Which of the GPUs that this process sees are its own; None for all of them.

    >>> share_of_cards(Processes(4, 3, "a:1", "SLURM", local=1, local_count=2), 8)
    [4, 5, 6, 7]

    A scheduler that binds tasks to GPUs shows each only its own, of which it then takes all;
    scripts/launch_local binds nothing. `ValueError` if they do not come out even.
    """
    if found.local_count == 1 or cards == 0 or (cards == 1 and found.source != "environment"):
        return None
    if cards == 1:
        raise UserError(
            f"--processes={found.count}: cannot share 1 GPU; add --platform=cpu to rehearse on"
            " the CPU"
        )
    if cards % found.local_count:
        raise UserError(
            f"--processes={found.count}: {found.local_count} processes on this host cannot share"
            f" {cards} GPUs evenly; start one a host, one a GPU, or hide some with"
            " CUDA_VISIBLE_DEVICES"
        )
    share = cards // found.local_count
    return list(range(found.local * share, (found.local + 1) * share))


def visible_cards(environ: Mapping[str, str], proc: str = "/proc/driver/nvidia/gpus") -> int:
    """How many NVIDIA GPUs this process sees, found without loading a driver.

    >>> visible_cards({"CUDA_VISIBLE_DEVICES": "0,1"})
    2
    """
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return len([card for card in shown.split(",") if card.strip() and card.strip() != "-1"])
    return len(list(Path(proc).iterdir())) if Path(proc).is_dir() else 0


def is_loopback(coordinator: str) -> bool:
    """Whether HOST:PORT can be reached from its own host only.

    >>> is_loopback("127.0.0.1:7000"), is_loopback("[::1]:7000"), is_loopback("node1:7000")
    (True, True, False)
    """
    host, _ = rendezvous.split(coordinator)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def first_host(nodes: str) -> str:
    """The first host of a SLURM list.

    >>> first_host("node[01-03,7],other"), first_host("a-b3"), first_host("r[1-2]n[05,9]-ib")
    ('node01', 'a-b3', 'r1n05-ib')
    """
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes}: names no host; give --coordinator=HOST:PORT")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _checked(found: Processes, names: tuple[str, str, str]) -> Processes | None:
    """The same, if it can be; None if the group has one member."""
    if found.count == 1:
        return None
    count_name, index_name, coordinator_name = names
    if not 0 <= found.index < found.count:
        raise UserError(
            f"{index_name}={found.index}: must be 0..{found.count - 1}, for"
            f" {count_name}={found.count}"
        )
    if not found.coordinator:
        raise UserError(
            f"{found.source} does not say on which host process 0 is; give --coordinator=HOST:PORT"
        )
    try:
        rendezvous.split(found.coordinator)
    except ValueError as problem:
        raise UserError(
            f"{coordinator_name}={messages.one_line(found.coordinator)}: {problem}"
        ) from None
    if (
        is_loopback(found.coordinator)
        and found.source not in ("flags", "environment")
        and found.local_count < found.count
    ):
        raise UserError(
            f"{coordinator_name}={found.coordinator}: {found.source} runs {found.count} processes"
            " on several hosts, and this address leads each to itself; name the host of process 0"
        )
    return found


def _environment(environ: Mapping[str, str]) -> Processes | None:
    texts = {name: environ.get(name, "") for name in (PROCESSES, PROCESS, COORDINATOR)}
    if not texts[PROCESS]:  # a count and a coordinator alone are the words of Kubernetes
        if any(texts.values()) and "JOB_COMPLETION_INDEX" not in environ:
            raise UserError(
                f"{' and '.join(name for name in texts if texts[name])} set without {PROCESS}; set"
                " all three or none"
            )
        return None
    if missing := [name for name, text in texts.items() if not text]:
        raise UserError(f"{PROCESS} is set without {' and '.join(missing)}; set all three or none")
    local, local_count = _number(environ, LOCAL_PROCESS, 0), _number(environ, LOCAL_PROCESSES, 1)
    return Processes(
        _number(environ, PROCESSES),
        _number(environ, PROCESS),
        texts[COORDINATOR],
        "environment",
        local,
        local_count,
    )


def _open_mpi(environ: Mapping[str, str]) -> Processes | None:
    """What mpirun says; it comes before SLURM, in whose jobs it starts one daemon a host that looks
    like a task."""
    if _number(environ, "OMPI_COMM_WORLD_SIZE", 1) == 1:
        return None
    count, index = (
        _number(environ, "OMPI_COMM_WORLD_SIZE"),
        _number(environ, "OMPI_COMM_WORLD_RANK"),
    )
    local, local_count = (
        _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK", 0),
        _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 1),
    )
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    # Open MPI 4: 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911, or tcp6://[fe80::b9b]:43370; a
    # job's number is a multiple of 4096.
    address = re.match(r"(\d+)\.\d+;(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    # Open MPI 5 names a job after the host and the process of mpirun: prterun-node1-4711@1.
    name = re.match(r"prterun-(.+)-(\d+)@", environ.get("PMIX_NAMESPACE", ""))
    if address:
        port, host = int(address[1]) // 4096, address[2] or f"[{address[3]}]"
    elif name:
        port, host = int(name[2]), name[1]
    else:
        port, host = 0, ""
    host = "127.0.0.1" if local_count == count else host
    coordinator = f"{host}:{_port(port)}" if host and (address or name) else ""
    return Processes(count, index, coordinator, "Open MPI", local, local_count)


def _slurm(environ: Mapping[str, str]) -> Processes | None:
    """What srun says to its tasks; a batch script itself is no task, and knows no step's list of
    hosts."""
    count = _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    if count == 1 or not nodes:
        return None
    port = _number(environ, "SLURM_JOB_ID", 0) + 1009 * _number(environ, "SLURM_STEP_ID", 0)
    local_count = _tasks_here(environ, count)
    # On one host no name needs to be looked up, and nobody outside gets in.
    host = "127.0.0.1" if local_count == count else first_host(nodes)
    index, local = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID", 0)
    return Processes(count, index, f"{host}:{_port(port)}", "SLURM", local, local_count)


def _tasks_here(environ: Mapping[str, str], count: int) -> int:
    """How many tasks of the step this host has, from a list by hosts such as 2(x3),1."""
    by_host: list[int] = []
    for part in filter(None, environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")):
        tasks, _, times = part.removesuffix(")").partition("(x")
        by_host += [int(tasks)] * int(times or 1)
    here = _number(environ, "SLURM_NODEID", 0)
    return (
        by_host[here]
        if here < len(by_host)
        else max(1, count // _number(environ, "SLURM_STEP_NUM_NODES", count))
    )


def _kubernetes(environ: Mapping[str, str]) -> Processes | None:
    """An Indexed Job, whose manifest says how many and where; without these, its pods are runs of
    their own."""
    if "JOB_COMPLETION_INDEX" not in environ or not (
        environ.get(PROCESSES) or environ.get(COORDINATOR)
    ):
        return None
    if missing := [name for name in (PROCESSES, COORDINATOR) if not environ.get(name)]:
        raise UserError(
            f"JOB_COMPLETION_INDEX is set without {missing[0]}; name it in the manifest, see"
            " scripts/kubernetes/job.yaml"
        )
    return Processes(
        _number(environ, PROCESSES),
        _number(environ, "JOB_COMPLETION_INDEX"),
        environ[COORDINATOR],
        "Kubernetes",
    )


def _port(number: int) -> int:
    first, count = _PORTS
    return first + number % count


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise UserError(
            f"{name}={text}: must be a whole number; start one process without it, or mend what"
            " sets it"
        )
    return int(text)
