"""What every test runs under: CPU, eight devices, a compilation cache, and strictness.

Warnings are errors by pyproject.toml. The whole suite runs on up to four processes, a few named
files in this one; `-n 0` and `-n 2` overrule that. JAXTRAIN_TEST_COSTS=FILE makes every test add a
JSON line to that file: the CPU seconds it took here and in its children, and the peak memory.
"""

import gc
import json
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before jax is imported, which reads them once. A user's XLA_FLAGS come last, so they win. Machine
# code that is not optimised is made in a third of the time, and most of the suite's time goes
# there; whole runs of the slow tests are children without these flags, optimised as a user's are.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAXTRAIN_TEST_PLATFORM", "cpu")
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jaxtrain" / "tests")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).resolve().parents[2] / "shared"
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MOST_WORKERS = 4
"""Tests that pretend to be many processes would starve beside more of their like."""
GROWN_BYTES = 1.5 * 2**30
"""Resident memory from which compiled programs are forgotten at the end of a file: they are what
grows, to 3 GiB in a worker. Forgetting them after every file would compile small ones again."""
COSTS = os.environ.get("JAXTRAIN_TEST_COSTS")
PEAKS: dict[str, float] = {}


def peak_gib() -> float:
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def resident_bytes() -> int:
    """The memory that this process holds now; 0 where the kernel does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs on every CPU; a few named tests start faster in this process, and those
    that are slow or need a GPU want the machine for themselves."""
    if hasattr(config, "workerinput"):
        return  # a worker, which would start workers of its own without end
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not option.keyword
    whole &= "not slow and not gpu" in option.markexpr and not option.usepdb
    if whole and CPUS > 1 and getattr(option, "numprocesses", 0) is None:
        option.numprocesses = min(CPUS, MOST_WORKERS)
        # Each starts with a part of the files in their order; who is done takes from others.
        option.dist = "worksteal"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Notes what a test costs, its fixtures included, and keeps the memory of a worker bounded."""
    before = _used()
    result = yield
    if COSTS:
        own, children, wall = (b - a for a, b in zip(before, _used(), strict=True))
        line = {"test": item.nodeid, "own": own, "children": children, "wall": wall}
        with open(COSTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"peak": peak_gib()}) + "\n")
    if nextitem is not None and nextitem.path != item.path and resident_bytes() > GROWN_BYTES:
        jax.clear_caches()
        gc.collect()
    return result


def _used() -> tuple[float, float, float]:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time(), children.ru_utime + children.ru_stime, time.monotonic()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells its peak to the process that started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak_gib"] = peak_gib()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Keeps what a worker told."""
    PEAKS[node.gateway.id] = getattr(node, "workeroutput", {}).get("peak_gib", 0.0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The peak memory of every process of the suite."""
    peaks = {"main": peak_gib()} | PEAKS
    told = ", ".join(f"{name} {peak:.2f} GiB" for name, peak in sorted(peaks.items()))
    terminalreporter.write_line(f"peak memory: {told}")


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """What a test started ends with it, also where it failed: a process that is forgotten would
    warn later, in an innocent test."""
    started: list[subprocess.Popen[Any]] = []
    plain = subprocess.Popen.__init__

    def note(self: subprocess.Popen[Any], *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        started.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", note)
        yield
    for process in started:
        process.kill()  # nothing, where it has been waited for
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def shared_data() -> Path:
    """The folder of data that is not committed; the test is skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"{SHARED / 'data'} is not here; it holds data that is not committed")
    return SHARED / "data"
