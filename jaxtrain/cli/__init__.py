"""The commands of `python -m jaxtrain`: one file a command, and `main`, which runs one of them."""

from jaxtrain.cli.command import Command as Command
from jaxtrain.cli.main import COMMANDS as COMMANDS
from jaxtrain.cli.main import main as main

__all__ = ["COMMANDS", "Command", "main"]
