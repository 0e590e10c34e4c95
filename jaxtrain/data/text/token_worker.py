"""A process that makes shards of tokens for another: jobs come in as lines of JSON, results go out
so, and it ends when the lines do."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Reads the tokenizer and the format, then a job a line."""
    # Ctrl-C is for the process that started this one, which then closes the lines.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a library prints must not stand between the results.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from jaxtrain.data.text import formats, token_shards, tokenizers
    from jaxtrain.errors import UserError

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=results, flush=True)

    head = json.loads(sys.stdin.readline())
    tokenizer = tokenizers.from_record(head["tokenizer"])
    folder, how = Path(head["folder"]), formats.from_record(head["format"])
    try:
        for line in sys.stdin:
            try:
                summary = token_shards.make_shard(
                    folder,
                    token_shards.Job.of(json.loads(line)),
                    tokenizer,
                    how,
                    stop_at_bad=head["stop_at_bad"],
                    report=lambda size: answer({"bytes": size}),
                )
                answer({"summary": summary})
            except UserError as error:
                answer({"refused": str(error)})
            except OSError as error:
                answer({"os_error": [error.errno, error.strerror, error.filename]})
    except BrokenPipeError:  # the other process is gone
        os._exit(1)


if __name__ == "__main__":
    main()
