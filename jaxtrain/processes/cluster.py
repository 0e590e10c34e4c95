"""Cluster detection: the index of this process, the number of processes and the coordinator's
address, from flags, the environment or a scheduler; and how jax is started with them.

One process per host drives all GPUs of the host. Where a scheduler starts several processes on a
host, each takes its share of the GPUs.
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
from jaxtrain.processes import rendezvous

PROCESS_COUNT_ENV = "JAXTRAIN_PROCESSES"
"""The environment variable for --processes. You may set it and the next two, as the supervisor
does."""
PROCESS_INDEX_ENV = "JAXTRAIN_PROCESS"
"""The environment variable for --process."""
COORDINATOR_ENV = "JAXTRAIN_COORDINATOR"
"""The environment variable for --coordinator."""
LOCAL_INDEX_ENV, LOCAL_COUNT_ENV = "JAXTRAIN_LOCAL_PROCESS", "JAXTRAIN_LOCAL_PROCESSES"
"""The environment variables for the index of this process among those of its host, and their
number; the processes of a host share its GPUs."""

JOIN_TIMEOUT_SECONDS = 540.0
"""How long processes wait for one another: a little less than the supervisor's limit, because they
can name the missing ones and the supervisor cannot."""
JAX_HEARTBEAT_TIMEOUT_SECONDS = 30
"""After this silence jax takes a peer for dead, and aborts. Its default of 100 s leaves GPUs idle.
A C++ thread sends jax's heartbeats, so they need no step."""
_FIRST_PORT, _NUM_PORTS = 61440, 4096
"""Schedulers assign no port, so one is derived from the job's number; this range lies above the
ports that systems hand out to outgoing connections."""


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """The number of processes, the index of this one, and the address of process 0.

    `coordinator` is HOST:PORT. `source` names where the values come from. `local_index` and
    `local_count` are the same for the processes of this host alone.
    """

    count: int
    index: int
    coordinator: str
    source: str
    local_index: int = 0
    local_count: int = 1


def detect(
    environ: Mapping[str, str],
    *,
    processes: int | None = None,
    process: int | None = None,
    coordinator: str = "",
) -> ProcessInfo | None:
    """The index of this process and the size of its group, or None if it is alone.

    >>> detect({}, processes=2, process=1, coordinator="10.0.0.1:7000").index
    1
    >>> slurm = {
    ...     "SLURM_JOB_ID": "7",
    ...     "SLURM_NTASKS": "2",
    ...     "SLURM_PROCID": "1",
    ...     "SLURM_STEP_NODELIST": "gpu[07-08]",
    ... }
    >>> info = detect(slurm)
    >>> info.count, info.index, info.coordinator, info.source
    (2, 1, 'gpu07:61447', 'SLURM')

    Flags come first, then the variables JAXTRAIN_..., Open MPI, SLURM and Kubernetes. `coordinator`
    alone replaces the address that a scheduler implies. `processes=1` keeps a process alone
    anywhere. `UserError` if a value is missing or contradicts another.
    """
    if processes == 1:
        return None
    given = {"--processes": processes, "--process": process, "--coordinator": coordinator or None}
    if processes is not None and process is not None and coordinator:
        return _validated(
            ProcessInfo(processes, process, coordinator, "flags"),
            names=("--processes", "--process", "--coordinator"),
        )
    found = next(
        (
            each
            for each in (
                read(environ)
                for read in (_from_environment, _from_open_mpi, _from_slurm, _from_kubernetes)
            )
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
    for name, value, detected in (
        ("--processes", processes, found.count),
        ("--process", process, found.index),
    ):
        if value is not None and value != detected:
            raise UserError(f"{name}={value}: {found.source} says {detected}; drop the flag")
    if coordinator:
        found = dataclasses.replace(found, coordinator=coordinator)
    coordinator_name = "--coordinator" if coordinator else COORDINATOR_ENV
    return _validated(found, names=(PROCESS_COUNT_ENV, PROCESS_INDEX_ENV, coordinator_name))


def join(
    info: ProcessInfo,
    *,
    timeout: float = JOIN_TIMEOUT_SECONDS,
    heartbeat_timeout: int = JAX_HEARTBEAT_TIMEOUT_SECONDS,
    on_arrival: Callable[[], None] = lambda: None,
    on_wait: Callable[[], None] = lambda: None,
) -> None:
    """Waits for all processes, and starts jax's distributed runtime in them. Call it after
    `jax_platforms` is set and before anything asks jax for a device.

    `on_arrival` is called when a process comes, `on_wait` about twice a second; either may raise to
    give up. `PeerLost` if a process does not come within `timeout` seconds, `UserError` if the
    processes have contradicting flags.
    """
    # jax itself aborts on each of these faults with 30 lines of C++ stack, and on a port in use
    # with a segmentation fault; so the barrier comes first.
    rendezvous.barrier(
        info.count,
        info.index,
        info.coordinator,
        timeout=timeout,
        on_arrival=on_arrival,
        on_wait=on_wait,
    )
    import jax

    if jax.config.values["jax_cpu_collectives_implementation"] in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler would replace ours for SIGTERM, and choose a step to save that our loop does not
    # know.
    if hasattr(jax.config, "jax_enable_preemption_service"):
        jax.config.update("jax_enable_preemption_service", False)
    gpus = 0 if jax.config.values["jax_platforms"] == "cpu" else visible_gpus(os.environ)
    options = {
        "local_device_ids": local_gpus(info, gpus),
        # jax's own detection takes one GPU per SLURM task, also where a task has the whole host.
        "cluster_detection_method": "deactivate",
        "initialization_timeout": max(1, int(timeout)),
        "heartbeat_timeout_seconds": heartbeat_timeout,
        "coordinator_bind_address": info.coordinator if is_loopback(info.coordinator) else None,
    }
    known = inspect.signature(jax.distributed.initialize).parameters
    try:
        jax.distributed.initialize(
            info.coordinator,
            info.count,
            info.index,
            **{name: value for name, value in options.items() if name in known},
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise PeerLost(
            f"process {info.index} of {info.count} could not join at {info.coordinator}: {reason}"
        ) from error


def local_gpus(info: ProcessInfo, visible: int) -> list[int] | None:
    """The GPUs that belong to this process, of the `visible` ones; None for all of them.

    >>> local_gpus(ProcessInfo(4, 3, "a:1", "SLURM", local_index=1, local_count=2), 8)
    [4, 5, 6, 7]

    A scheduler that binds tasks to GPUs makes only these visible to each, which then takes all;
    scripts/launch_local binds nothing. `UserError` if the GPUs cannot be divided evenly.
    """
    bound_by_scheduler = visible == 1 and info.source != "environment"
    if info.local_count == 1 or visible == 0 or bound_by_scheduler:
        return None
    if visible == 1:
        raise UserError(
            f"--processes={info.count}: cannot share 1 GPU; add --platform=cpu to rehearse on the"
            " CPU"
        )
    if visible % info.local_count:
        raise UserError(
            f"--processes={info.count}: {info.local_count} processes on this host cannot share"
            f" {visible} GPUs evenly; start one a host, one a GPU, or hide some with"
            " CUDA_VISIBLE_DEVICES"
        )
    share = visible // info.local_count
    return list(range(info.local_index * share, (info.local_index + 1) * share))


def visible_gpus(
    environ: Mapping[str, str], driver_folder: str = "/proc/driver/nvidia/gpus"
) -> int:
    """How many NVIDIA GPUs this process sees, found without loading a driver.

    >>> visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"})
    2
    """
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return len([gpu for gpu in shown.split(",") if gpu.strip() and gpu.strip() != "-1"])
    return len(list(Path(driver_folder).iterdir())) if Path(driver_folder).is_dir() else 0


def is_loopback(coordinator: str) -> bool:
    """Whether HOST:PORT can be reached from its own host only.

    >>> is_loopback("127.0.0.1:7000"), is_loopback("[::1]:7000"), is_loopback("node1:7000")
    (True, True, False)
    """
    host, _ = rendezvous.split_address(coordinator)
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


def _validated(found: ProcessInfo, names: tuple[str, str, str]) -> ProcessInfo | None:
    """`found` if its values are possible; None if the group has one member."""
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
        rendezvous.split_address(found.coordinator)
    except ValueError as problem:
        raise UserError(
            f"{coordinator_name}={messages.printable(found.coordinator)}: {problem}"
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


def _from_environment(environ: Mapping[str, str]) -> ProcessInfo | None:
    texts = {
        name: environ.get(name, "")
        for name in (PROCESS_COUNT_ENV, PROCESS_INDEX_ENV, COORDINATOR_ENV)
    }
    if not texts[PROCESS_INDEX_ENV]:
        # Kubernetes sets a count and a coordinator alone.
        if any(texts.values()) and "JOB_COMPLETION_INDEX" not in environ:
            given = " and ".join(name for name in texts if texts[name])
            raise UserError(f"{given} set without {PROCESS_INDEX_ENV}; set all three or none")
        return None
    if missing := [name for name, text in texts.items() if not text]:
        raise UserError(
            f"{PROCESS_INDEX_ENV} is set without {' and '.join(missing)}; set all three or none"
        )
    local_index, local_count = (
        _integer(environ, LOCAL_INDEX_ENV, 0),
        _integer(environ, LOCAL_COUNT_ENV, 1),
    )
    return ProcessInfo(
        _integer(environ, PROCESS_COUNT_ENV),
        _integer(environ, PROCESS_INDEX_ENV),
        texts[COORDINATOR_ENV],
        "environment",
        local_index,
        local_count,
    )


def _from_open_mpi(environ: Mapping[str, str]) -> ProcessInfo | None:
    """The variables that mpirun sets. They come before those of SLURM: in a SLURM job mpirun starts
    one daemon per host, which looks like a task."""
    if _integer(environ, "OMPI_COMM_WORLD_SIZE", 1) == 1:
        return None
    count, index = (
        _integer(environ, "OMPI_COMM_WORLD_SIZE"),
        _integer(environ, "OMPI_COMM_WORLD_RANK"),
    )
    local_index, local_count = (
        _integer(environ, "OMPI_COMM_WORLD_LOCAL_RANK", 0),
        _integer(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 1),
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
    coordinator = f"{host}:{_derived_port(port)}" if host and (address or name) else ""
    return ProcessInfo(count, index, coordinator, "Open MPI", local_index, local_count)


def _from_slurm(environ: Mapping[str, str]) -> ProcessInfo | None:
    """The variables that srun sets in its tasks. A batch script itself is no task, and has no list
    of a step's hosts."""
    count = _integer(environ, "SLURM_STEP_NUM_TASKS", _integer(environ, "SLURM_NTASKS", 1))
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    if count == 1 or not nodes:
        return None
    port = _integer(environ, "SLURM_JOB_ID", 0) + 1009 * _integer(environ, "SLURM_STEP_ID", 0)
    local_count = _local_task_count(environ, count)
    # On one host no name must be looked up, and no other host can connect.
    host = "127.0.0.1" if local_count == count else first_host(nodes)
    index, local_index = _integer(environ, "SLURM_PROCID"), _integer(environ, "SLURM_LOCALID", 0)
    return ProcessInfo(
        count, index, f"{host}:{_derived_port(port)}", "SLURM", local_index, local_count
    )


def _local_task_count(environ: Mapping[str, str], count: int) -> int:
    """How many tasks of the step this host has, from a list by hosts such as 2(x3),1."""
    tasks_by_host: list[int] = []
    for part in filter(None, environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")):
        tasks, _, times = part.removesuffix(")").partition("(x")
        tasks_by_host += [int(tasks)] * int(times or 1)
    host = _integer(environ, "SLURM_NODEID", 0)
    return (
        tasks_by_host[host]
        if host < len(tasks_by_host)
        else max(1, count // _integer(environ, "SLURM_STEP_NUM_NODES", count))
    )


def _from_kubernetes(environ: Mapping[str, str]) -> ProcessInfo | None:
    """An Indexed Job whose manifest sets the number of processes and the coordinator. Without
    these, each of its pods is a run of its own."""
    if "JOB_COMPLETION_INDEX" not in environ or not (
        environ.get(PROCESS_COUNT_ENV) or environ.get(COORDINATOR_ENV)
    ):
        return None
    if missing := [name for name in (PROCESS_COUNT_ENV, COORDINATOR_ENV) if not environ.get(name)]:
        raise UserError(
            f"JOB_COMPLETION_INDEX is set without {missing[0]}; name it in the manifest, see"
            " scripts/kubernetes/job.yaml"
        )
    return ProcessInfo(
        _integer(environ, PROCESS_COUNT_ENV),
        _integer(environ, "JOB_COMPLETION_INDEX"),
        environ[COORDINATOR_ENV],
        "Kubernetes",
    )


def _derived_port(number: int) -> int:
    return _FIRST_PORT + number % _NUM_PORTS


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise UserError(
            f"{name}={text}: must be a whole number; start one process without it, or mend what"
            " sets it"
        )
    return int(text)
