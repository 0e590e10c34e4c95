"""Jobs of tokenising, shared by processes: a library may not let two threads at a text, and reading
and parsing take as long as some tokenizers."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

from jaxtrain.data.text import token_shards
from jaxtrain.data.text.formats import Format
from jaxtrain.data.text.protocol import Tokenizer
from jaxtrain.data.text.token_shards import Job
from jaxtrain.errors import UserError
from jaxtrain.messages import bytes_text, scaled

SMALL_BYTES = {"bytes": 64 << 20, "characters": 64 << 20}
"""Texts that one process has done before others have started, by the kind of the tokenizer."""
_SMALL_BYTES = 2 << 20
_KNOWN = ("bytes", "characters", "tokenizer.json", "sentencepiece")
"""Kinds that another process can make from their record."""


class Progress:
    """Says how far it is, at most every ten seconds; nothing of what takes less than two."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say, self._done = total, say, 0
        self._start = time.monotonic()
        self._next = self._start + 2.0

    def __call__(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 10.0
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate
            self._say(
                f"jaxtrain: tokenising: {bytes_text(self._done)} of {bytes_text(self._total)},"
                f" {bytes_text(rate)}/s, {left:.0f} s left"
            )

    def finish(self, tokens: int) -> None:
        """Says what it made, and how fast."""
        seconds = time.monotonic() - self._start
        if seconds >= 2.0:
            count = scaled(tokens, ("", "k", "M", "B", "T")).strip()
            rate = scaled(tokens / seconds, ("", "k", "M", "B")).strip()
            self._say(
                f"jaxtrain: tokenised {bytes_text(self._total)} into {count} tokens in"
                f" {seconds:.0f} s, {bytes_text(self._total / seconds)}/s, {rate} tokens/s"
            )


class _Worker:
    """A process of `token_worker`, and a thread that listens to it."""

    def __init__(self, index: int, head: dict[str, Any], answers: "_Answers") -> None:
        # The package is found where this one was, and nothing in the current folder by mistake.
        package = str(Path(__file__).resolve().parents[3])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        environ = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "TOKENIZERS_PARALLELISM": "false",
            "RAYON_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jaxtrain.data.text.token_worker"],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._index, self._answers = index, answers
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.send(head)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._listener.join()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def send(self, value: dict[str, Any]) -> None:
        """One line of JSON."""
        assert self.process.stdin is not None
        # one that is gone says so by the end of its answers
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(value).encode() + b"\n")
            self.process.stdin.flush()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put((self._index, json.loads(line)))
        self._answers.put((self._index, {}))


_Answers: TypeAlias = "queue.SimpleQueue[tuple[int, dict[str, Any]]]"


def tokenize(
    jobs: Sequence[Job],
    tokenizer: Tokenizer,
    how: Format,
    *,
    folder: Path,
    stop_at_bad: bool,
    processes: int,
    report: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Makes the shards of all jobs; their summaries, in any order.

    Small work is done here, larger work by up to `processes` others. `UserError` as from
    `token_shards.make_shard`, or if a process is lost.
    """
    kind = str(tokenizer.record().get("kind"))
    total = sum(unit.size for job in jobs for unit in job.units if unit.key not in job.taken)
    processes = min(processes, len(jobs))
    if processes < 2 or total < SMALL_BYTES.get(kind, _SMALL_BYTES) or kind not in _KNOWN:
        return [
            token_shards.make_shard(
                folder, job, tokenizer, how, stop_at_bad=stop_at_bad, report=report
            )
            for job in jobs
        ]
    head = {
        "tokenizer": tokenizer.record(),
        "folder": str(folder),
        "format": how.record(),
        "stop_at_bad": stop_at_bad,
    }
    answers: _Answers = queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        pool = [stack.enter_context(_Worker(index, head, answers)) for index in range(processes)]
        return _shared_out(jobs, pool, answers, report)


def _shared_out(
    jobs: Sequence[Job], pool: Sequence[_Worker], answers: _Answers, report: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Gives each process a job whenever it has none, in order."""
    waiting, made = list(reversed(jobs)), list[dict[str, Any]]()
    for worker in pool:
        worker.send(waiting.pop().as_json())
    while len(made) < len(jobs):
        index, answer = answers.get()
        if "bytes" in answer:
            report(answer["bytes"])
        elif "summary" in answer:
            made.append(answer["summary"])
            if waiting:
                pool[index].send(waiting.pop().as_json())
        elif "refused" in answer:
            raise UserError(answer["refused"])
        elif "os_error" in answer:
            raise OSError(*answer["os_error"])
        else:
            status = pool[index].process.wait()
            raise UserError(
                f"a process that tokenises ended with status {status} (-9: out of memory?); with"
                " processes=1 it takes the least memory"
            )
    return made
