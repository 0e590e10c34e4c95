"""`python -m jaxtrain report WORKDIR ...`: writes the report of one run, or of several side by
side."""

from collections.abc import Sequence
from pathlib import Path

from jaxtrain import extras, messages
from jaxtrain.cli.command import Command, workdirs
from jaxtrain.errors import UserError

FOLDER = "comparison"
"""Where the report of several runs goes, unless --out says otherwise: never among other files of
the working directory, which may have their own report.html and plots."""


def run(arguments: Sequence[str]) -> int:
    """Writes the report of one run into its folder, or of several into a folder of their own."""
    out, rest = _out(arguments)
    folders = workdirs("report", rest, several=True, takes="none but --out")
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            above = folder.parent
            inner = folder.name == "checkpoints" and (above / "metrics.jsonl").is_file()
            raise UserError(
                f"report {messages.printable(str(folder))}: holds no metrics.jsonl; "
                + (
                    f"give {messages.printable(str(above))}"
                    if inner
                    else "is it the folder of a run?"
                )
            )
    extras.require("report", "rich", "matplotlib")
    from jaxtrain.report.page import html

    if out is None and len(folders) > 1:
        out = Path(FOLDER)
    print(html.write_report(folders, None if out is None else out / "report.html"))
    return 0


def _out(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The folder that --out names, and the other arguments."""
    rest, given = [], []
    waiting = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if waiting:
            given.append(argument)
        elif name == "--out" and equals:
            given.append(value)
        elif name != "--out":
            rest.append(argument)
        waiting = argument == "--out" and not waiting
    if waiting or "" in given or any(value.startswith("-") for value in given):
        raise UserError("report --out: needs a folder, e.g. --out=comparison")
    if len(given) > 1:
        raise UserError("report --out: is given twice; give it once")
    return (Path(given[0]).expanduser() if given else None), rest


COMMAND = Command(
    "WORKDIR [WORKDIR ...] [--out=FOLDER]",
    "report.html and plots: in the run's folder; of several in comparison/",
    run,
)
