"""The runner: flags to parts to loop, and the one place that turns what went wrong into a line and
an exit status."""

import contextlib
import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import jax
from jax.sharding import Mesh

from jaxtrain import config, extras, host_memory, messages
from jaxtrain.checkpoints.lock import Lock
from jaxtrain.config import flags
from jaxtrain.data import checks
from jaxtrain.data.table import Table
from jaxtrain.errors import (
    DIFFERENT,
    DIVERGED,
    INTERRUPTED,
    IO_ERROR,
    OUT_OF_MEMORY,
    TRY_AGAIN,
    PeerLost,
    RunError,
    UserError,
)
from jaxtrain.parallel import mesh as meshes
from jaxtrain.processes import cluster, group, heartbeat
from jaxtrain.processes.signals import StopSignals
from jaxtrain.report.terminal import tables
from jaxtrain.report.terminal.progress import Progress
from jaxtrain.runner import (
    build,
    devices,
    elsewhere,
    jax_settings,
    preflight,
    pretrained,
    samples,
    unusual,
    workdir,
)
from jaxtrain.runner.run import Opened, start
from jaxtrain.train import compare_meshes, explain, lowering
from jaxtrain.train.recipe import Recipe

OLDEST_JAX = (0, 10, 2)

SILENT_SECONDS = 10.0
"""A process that has waited so long for the others says so."""
PEER_LOST = re.compile(
    r"gloo [\w -]+ failed: |connection (?:closed|reset) by peer|heartbeat timeout|coordination"
    r" service|barrier (?:timed out|failed)"
    r"|remote process exited|ncclremoteerror",
    re.IGNORECASE,
)
"""What jax's errors say when another process is gone: gloo, XLA's coordination service
(libjax_common.so of 0.10.2), and NCCL (`ncclRemoteError`)."""
XLA_STATUS = re.compile(
    r"(?:ABORTED|ALREADY_EXISTS|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION"
    r"|INTERNAL|INVALID_ARGUMENT|NOT_FOUND|OUT_OF_RANGE"
    r"|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE|UNIMPLEMENTED|UNKNOWN): "
)
"""How its errors begin: a jitted function that is called for the second time raises them as a plain
ValueError."""


def main(
    run: config.Run | Callable[[Sequence[str]], config.Run], argv: Sequence[str] | None = None
) -> NoReturn:
    """Runs an experiment as the command line says, and exits with its status (see
    `jaxtrain/errors.py`). A run that depends on the command line is given as a function of it."""
    messages.open_standard_streams()
    argv = sys.argv[1:] if argv is None else argv
    try:
        status = guarded(
            lambda: _start(
                _parsed(build.accepted(run(argv) if callable(run) else run), argv), argv
            ),
            show_traceback=flags.wants_traceback(argv),
        )
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    if jax.distributed.is_initialized():
        # The group broke: jax would wait at its exit for processes that no longer come, five
        # minutes long.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _parsed(run: config.Run, argv: Sequence[str]) -> config.Run:
    try:
        return flags.parse(run, argv)
    except flags.UnknownModel as error:
        raise UserError(f"{error}{elsewhere.model_elsewhere(error.name)}") from None


def guarded(action: Callable[[], int], *, show_traceback: bool = False) -> int:
    """The exit status of `action`; what it raises becomes one line on stderr, unless it is a fault
    of ours or of the user's own code.

    >>> guarded(lambda: 0)
    0
    """
    try:
        return _own_code(action, show_traceback)
    except RunError as error:
        return _say(str(error), error.status, show_traceback)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED, show_traceback)
    except FloatingPointError as error:  # --debug_nans: where it happened is what was asked for
        return _say(str(error).splitlines()[0], DIVERGED, show_traceback=True)
    except MemoryError as error:
        return _say(
            f"out of memory in the host ({error}); lower --batch_size or raise --microbatches",
            OUT_OF_MEMORY,
            show_traceback,
        )
    except OSError as error:
        full = error.filename and error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free space, and the same command goes on from the last checkpoint"
        said = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _say(said + (remedy if full else ""), IO_ERROR, show_traceback)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) or XLA_STATUS.match(str(error)):
            return _failed_on_device(error, show_traceback)
        raise


def _own_code(action: Callable[[], int], show_traceback: bool) -> int:
    """The exit status of `action`; of an exception of the user's own code that the check before the
    first step met, its lines and what was being done."""
    try:
        return action()
    except Exception as error:
        doing = explain.noted(error)
        if doing is None:
            raise
        if not show_traceback:
            with contextlib.suppress(OSError):
                print(explain.own_lines(error), file=sys.stderr)
        return _say(doing, 1, show_traceback)


def _failed_on_device(error: Exception, show_traceback: bool) -> int:
    """The exit status of an error of XLA: out of memory, or a lost peer; what is neither is raised
    again."""
    reason = str(error).splitlines()[0][:160]
    if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
        return _say(
            f"out of memory on the device ({reason}); lower --batch_size or raise --microbatches",
            OUT_OF_MEMORY,
            show_traceback,
        )
    if jax.distributed.is_initialized() and PEER_LOST.search(str(error)):
        # Should it be a fault after all, the logs of the processes say where; process 0 has none
        # but the terminal, which gets one line.
        return _say(
            f"lost another process of the run ({reason})",
            TRY_AGAIN,
            show_traceback or not group.is_main(),
        )
    raise error


def _start(run: config.Run, argv: Sequence[str]) -> int:
    """Launches, under a supervisor if the run asks for what only one can do."""
    if (
        (run.max_restarts or run.hang_seconds is not None)
        and heartbeat.SUPERVISOR_PID_ENV not in os.environ
        and Path(sys.argv[0]).is_file()
    ):
        sys.stdout.flush()
        # In this process's place, so that signals and the terminal are the supervisor's own.
        os.execv(
            sys.executable,
            [sys.executable, "-m", "jaxtrain.processes.supervisor", sys.argv[0], *argv],
        )
    heartbeat.send_options(run.max_restarts, run.hang_seconds)
    return launch(run, argv)


def launch(run: config.Run, argv: Sequence[str]) -> int:
    """Builds the parts of a run, trains or evaluates, and returns the exit status; jax's settings
    are afterwards as they were."""
    # The loop guards its transfers itself; what is set up before it has to transfer.
    with StopSignals() as stop, jax_settings.restored(), jax.transfer_guard("allow"):
        return _launch(run, argv, stop)


def _launch(run: config.Run, argv: Sequence[str], stop: StopSignals) -> int:
    began = time.monotonic()
    if jax.__version_info__ < OLDEST_JAX:
        raise UserError(
            f"needs jax >= {'.'.join(map(str, OLDEST_JAX))}; found {jax.__version__} (python -m pip"
            " install -U jax)"
        )
    extras.require("this run", *_extras(run))
    jax_settings.check_environment()
    heartbeat.beat("starting")
    _join(run, stop)
    mesh = _mesh(run)
    if mesh.devices.flat[0].platform == "cpu":
        host_memory.keep_freed()
    run, notes = pretrained.resolved(run)
    for note in notes:
        messages.warn(note)
    asked_precision = run.precision
    run = config.replaced(run, {"precision": build.chosen_precision(run, mesh)})
    execution = build.execution(run, mesh)  # before the data, which may take a while
    jax_settings.apply(debug_nans=run.debug_nans, matmul_precision=run.matmul_precision)
    heartbeat.beat("data")
    splits = build.with_evaluation_sets(run, build.open_data(run))
    columns = checks.column_notes(splits.train) if run.normalize else []
    for note in [*splits.notes, *columns]:
        messages.warn(note)
    length = build.lengths(
        run, len(splits.train), build.tokens_per_step(run, splits.train), splits.train
    )
    for note in unusual.notes(run, length):
        messages.warn(note)
    if run.profile_steps is not None and run.profile_steps[0] >= length.total:
        first, last = run.profile_steps
        raise UserError(
            f"--profile_steps={first},{last}: the run ends at step {length.total}; profile earlier"
            " steps"
        )
    recipe = build.recipe_of(run, splits.train, length, identity=build.identity_of(run, splits))
    found = preflight.model(run, splits.train, recipe, execution)
    splits = preflight.labels(run, splits, found)
    preflight.held_out(run, splits, recipe, execution, found)
    preflight.padding(run, splits, execution, found)
    samples.check(run, splits.train, recipe)
    if run.compare_meshes:
        return _compare(run, splits.train, recipe, jax.devices(mesh.devices.flat[0].platform))
    programs = lowering.lower(recipe, found.batch, mesh)
    selection = build.selection(run, splits, programs)
    folder_is_new = not run.workdir or not Path(run.workdir).exists()
    folder = Path(group.on_main(lambda: str(workdir.choose_folder(run))))
    # Only process 0 writes into the folder.
    mine = Lock(folder, force=run.force_unlock) if group.is_main() else contextlib.nullcontext()
    with mine as lock, _deleted_if_refused(lock if folder_is_new else None):
        opened = Opened(
            run,
            argv,
            splits,
            length,
            programs,
            execution,
            selection,
            folder,
            lock,
            stop,
            began,
            asked_precision,
        )
        status = start(opened)
    heartbeat.beat("ending")
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()  # all of them are here
    return status


def _extras(run: config.Run) -> list[str]:
    """The modules beyond the core that the run will import; what it needs only at its end is
    missed at its start."""
    if run.compare_meshes:
        return []
    needed = ["orbax.checkpoint", "xxhash"]
    if run.eval_only:
        return needed
    return needed + ["matplotlib"] * run.report + ["tensorboard"] * run.tensorboard


def _join(run: config.Run, stop: StopSignals) -> None:
    """Finds the other processes of the run, if there are any."""
    if run.platform != "auto":
        jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[run.platform])
    found = cluster.detect(
        os.environ, processes=run.processes, process=run.process, coordinator=run.coordinator
    )
    if found is None:
        return

    began, told = time.monotonic(), False

    def on_wait() -> None:
        nonlocal told
        if not told and time.monotonic() - began > SILENT_SECONDS:
            told = True
            who = f"all {found.count} processes" if found.index == 0 else "process 0"
            print(
                f"jaxtrain: waiting for {who} at {found.coordinator}", file=sys.stderr, flush=True
            )
        if stop.first is signal.SIGINT:
            raise KeyboardInterrupt
        if stop.status is not None:
            raise PeerLost(f"{stop.name} while waiting for the other processes; nothing done yet")

    heartbeat.beat("joining")
    cluster.join(found, on_arrival=lambda: heartbeat.beat("joining"), on_wait=on_wait)


def _compare(
    run: config.Run, train: Table, recipe: Recipe, devices: Sequence[meshes.Device]
) -> int:
    """Compares meshes instead of training; status 3 if one differs."""
    batches = build.host_batches(run, train, recipe)
    progress, count = Progress(run.compare_steps), len(run.compare_meshes)
    progress.line(
        f"{run.compare_steps} steps on one device and on {count} mesh{'es' if count > 1 else ''};"
        f" compiling {2 * count + 2} programs first"
    )
    report = compare_meshes.compare_recipe(
        recipe,
        batches,
        run.compare_meshes,
        seed=run.seed,
        steps=run.compare_steps,
        devices=devices,
    )
    progress.show(tables.comparison_table(report.rows()))
    progress.line(report.summary())
    return 0 if report.agree else DIFFERENT


@contextlib.contextmanager
def _deleted_if_refused(lock: Lock | None) -> Iterator[None]:
    """A run that is refused takes the folder with it that was made for it, if nothing else is
    there; while it holds the lock, for afterwards the folder may be another run's."""
    try:
        yield
    except UserError:
        if lock is not None:
            lock.delete_empty_folder()
        raise


def _mesh(run: config.Run) -> Mesh:
    return meshes.make(run.mesh, devices.find(run.platform))


def _say(text: str, status: int, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exc()
    # stderr may be a pipe that nobody reads any more; the status still says it
    with contextlib.suppress(OSError):
        print(f"jaxtrain: error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return status
