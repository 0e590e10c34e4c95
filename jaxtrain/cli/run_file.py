"""`python -m jaxtrain FILE.py [flags]`: an experiment as `python FILE.py` runs it, but an interrupt
while it is still importing is one line. `scripts/train` runs experiments so."""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxtrain import messages
from jaxtrain.errors import UserError

INTERRUPTED = 130


def run(arguments: Sequence[str]) -> int:
    """Runs the file as a program; the exit status. `UserError` if there is no such file."""
    path = Path(arguments[0])
    if not path.is_file():
        near = messages.did_you_mean_path(str(path))
        raise UserError(f"{messages.shown(str(path))}: no such experiment{near}")
    sys.argv = list(arguments)
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE.py` does
    try:
        runpy.run_path(str(path), run_name="__main__")
    except KeyboardInterrupt:
        print("jaxtrain: interrupted before the run began; nothing to save", file=sys.stderr)
        return INTERRUPTED
    return 0
