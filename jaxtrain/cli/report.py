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
    page = html.write_report(folders, None if out is None else out / "report.html")
    if len(folders) > 1:
        for line in _lines(folders):
            print(line)
    print(page)
    return 0


def _lines(folders: Sequence[Path]) -> list[str]:
    """A line for each setting: in what it differs, and its results over the seeds."""
    from jaxtrain.report.page import history
    from jaxtrain.report.terminal.tables import value_text

    histories = [history.load(folder) for folder in folders]
    lines = []
    for group in history.groups(histories):
        shown = [f"{key}={value}" for key, value in group.settings.items()]
        results = []
        for split, key, values in history.results(histories):
            found = history.statistic([values[index] for index in group.runs])
            if found is not None:
                spread = "" if found.deviation is None else f" ± {value_text(key, found.deviation)}"
                results.append(
                    f"{split} {key} {value_text(key, found.mean)}{spread} (n={found.count})"
                )
        names = " ".join(shown) or "all runs"
        lines.append(" ".join(f"{names}: {', '.join(results) or 'no results yet'}".split()))
    return lines


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
