"""One run at a time in a folder, and no lock that outlives its process."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxtrain.checkpoints import lock
from jaxtrain.checkpoints.lock import NAME, Lock
from jaxtrain.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from jaxtrain.checkpoints.lock import Lock
try:
    with Lock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
except ValueError as error:
    print(error, flush=True)
"""


@contextlib.contextmanager
def hold(workdir: Path, seconds: float = 60) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(workdir), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_second_run_is_refused_and_a_killed_one_leaves_nothing_behind(tmp_path: Path) -> None:
    with hold(tmp_path) as holder:
        assert first_line(holder) == "held"
        who = (
            f"--workdir={tmp_path}: in use by pid {holder.pid} on host {socket.gethostname()}"
            " since "
        )
        line = re.escape(who) + r"\d\d:\d\d; use another, or --force_unlock if it is dead"
        with pytest.raises(ValueError, match=f"^{line}$"), Lock(tmp_path):
            pass
        with (
            pytest.raises(ValueError, match="it is alive: stop it first"),
            Lock(tmp_path, force=True),
        ):
            pass
    assert holder.returncode == -signal.SIGKILL
    # what it wrote is still there, and holds no lock
    assert json.loads((tmp_path / NAME).read_text())["pid"] == holder.pid
    with Lock(tmp_path) as lock:
        assert lock.held()
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert (tmp_path / NAME).read_text() == ""


def test_of_runs_that_start_at_once_one_wins(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        rivals = [stack.enter_context(hold(tmp_path)) for _ in range(4)]
        lines = [first_line(rival) for rival in rivals]
    assert lines.count("held") == 1, lines


def test_the_same_process_cannot_lock_twice(tmp_path: Path) -> None:
    with Lock(tmp_path), pytest.raises(ValueError, match="in use by pid"), Lock(tmp_path):
        pass


FAR = json.dumps({"pid": 1, "host": "elsewhere", "since": 0.0, "boot_id": "another"})


def test_force_takes_it_from_another_host_and_the_first_holder_can_tell(tmp_path: Path) -> None:
    with Lock(tmp_path) as first:
        (tmp_path / NAME).write_text(FAR)
        with (
            pytest.raises(
                ValueError,
                match=r"pid 1 on host elsewhere since 19(69|70)-\d\d-\d\d \d\d:\d\d; use another",
            ),
            Lock(tmp_path),
        ):
            pass
        with Lock(tmp_path, force=True) as second:
            assert second.held() and not first.held()
    # The first one's end leaves the second one's file alone, and the folder can be locked again.
    with Lock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "nan", '{"pid": "x"}', "\x00" * 10])
def test_nonsense_in_the_file_is_no_obstacle(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with Lock(tmp_path) as lock:
        assert lock.held()
        (tmp_path / NAME).write_text(text)
        with (
            pytest.raises(ValueError, match="in use by another process; use another"),
            Lock(tmp_path),
        ):
            pass


def test_a_folder_that_vanishes_is_noticed(tmp_path: Path) -> None:
    with Lock(tmp_path / "run") as lock:
        (tmp_path / "run").rename(tmp_path / "moved")
        assert not lock.held()
        (tmp_path / "run").mkdir()
        assert not lock.held()


def test_files_where_folders_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=f"^--workdir={tmp_path}/file: is a file, not a directory$"),
        Lock(tmp_path / "file"),
    ):
        pass
    with (
        pytest.raises(
            ValueError, match=f"cannot be made, {tmp_path}/file is a file, not a directory$"
        ),
        Lock(tmp_path / "file" / "run"),
    ):
        pass


def test_a_forked_child_that_outlives_its_parent_is_named_and_can_be_overruled(
    tmp_path: Path,
) -> None:
    """A worker that was forked keeps the lock of its dead parent: `force` is for this."""
    child = multiprocessing.get_context("spawn").Process(
        target=_hold_in_an_orphan, args=(str(tmp_path),)
    )
    child.start()
    child.join()
    orphan = int((tmp_path / "orphan").read_text())
    try:
        with pytest.raises(ValueError, match=f"in use by pid {child.pid} "), Lock(tmp_path):
            pass
        with Lock(tmp_path, force=True) as lock:
            assert lock.held()
    finally:
        os.kill(orphan, signal.SIGKILL)


def _hold_in_an_orphan(workdir: str) -> None:
    Lock(Path(workdir)).__enter__()
    orphan = os.fork()
    if orphan == 0:
        signal.pause()
    (Path(workdir) / "orphan").write_text(str(orphan))
    os._exit(0)


def test_of_forced_starts_at_once_one_wins(tmp_path: Path) -> None:
    """Six processes force the same forty locks, each of which another host seems to hold."""
    folders = [tmp_path / str(number) for number in range(40)]
    context = multiprocessing.get_context("spawn")
    barrier, won = context.Barrier(6, timeout=60), context.SimpleQueue()
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(Lock(folder))
            (folder / NAME).write_text(FAR)
        rivals = [
            context.Process(target=_force, args=(list(map(str, folders)), barrier, won))
            for _ in range(6)
        ]
        for rival in rivals:
            rival.start()
        for rival in rivals:
            rival.join()
    winners = [won.get() for _ in iter(won.empty, True)]
    assert sorted(winners) == sorted(folder.name for folder in folders)


def _force(folders: list[str], barrier: Any, won: Any) -> None:
    seen_alive = lock._is_alive_here

    def slowly(holder: dict[str, Any]) -> bool:
        time.sleep(0.001)  # so that the others get between looking and taking
        return seen_alive(holder)

    lock._is_alive_here = slowly
    for folder in folders:
        barrier.wait()
        taken = Lock(Path(folder), force=True)
        with contextlib.suppress(UserError):
            taken.__enter__()
        barrier.wait()
        if taken.held():
            won.put(Path(folder).name)
        elif taken._descriptor is not None:
            won.put(f"{Path(folder).name} lost again")
        barrier.wait()


def test_force_takes_nothing_from_who_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host forces the lock while this one waits for its turn: it was not asked to overrule
    that one."""
    with Lock(tmp_path), contextlib.ExitStack() as stack:
        (tmp_path / NAME).write_text(FAR)
        wait = Lock._wait_for_turn

        def come_second(self: Lock) -> int:
            monkeypatch.setattr(Lock, "_wait_for_turn", wait)
            with monkeypatch.context() as there:
                there.setattr(socket, "gethostname", lambda: "third")
                first = stack.enter_context(Lock(tmp_path, force=True))
            assert first.held()
            return wait(self)

        monkeypatch.setattr(Lock, "_wait_for_turn", come_second)
        with (
            pytest.raises(ValueError, match="on host third since .*; it came first: use another"),
            Lock(tmp_path, force=True),
        ):
            pass


def test_an_empty_folder_is_deleted_by_its_holder_alone(tmp_path: Path) -> None:
    with Lock(tmp_path / "run") as first:
        (tmp_path / "run" / "other").write_text("")
        first.delete_empty_folder()
        assert first.held()
        (tmp_path / "run" / "other").unlink()
        first.delete_empty_folder()
        assert not (tmp_path / "run").exists()
        with Lock(tmp_path / "run") as second:
            first.delete_empty_folder()
            assert second.held()
