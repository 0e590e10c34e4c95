"""`python -m jaxtrain verify WORKDIR`: checks every file of every checkpoint of a run."""

import os
from collections.abc import Sequence

from jaxtrain import extras
from jaxtrain.cli.command import Command, workdirs


def run(arguments: Sequence[str]) -> int:
    """Checks a workdir's checkpoints; 74 if a numbered step does not verify."""
    [workdir] = workdirs("verify", arguments, several=False)
    extras.require("verify", "orbax.checkpoint", "xxhash")
    # Reading files needs no card, and a run may be using it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxtrain.checkpoints import checkpoints

    return checkpoints.verify_command(workdir)


COMMAND = Command("WORKDIR", "check every file of every checkpoint", run)
