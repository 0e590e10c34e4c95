"""`python -m jaxtrain report WORKDIR ...`: writes the report of one run, or of several side by
side."""

from collections.abc import Sequence

from jaxtrain import extras, messages
from jaxtrain.cli.command import Command, workdirs
from jaxtrain.errors import UserError


def run(arguments: Sequence[str]) -> int:
    """Writes the report of one run into its folder, or of several into the working directory."""
    folders = workdirs("report", arguments, several=True)
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise UserError(
                f"report {messages.printable(str(folder))}: holds no metrics.jsonl; is it the"
                " folder of a run?"
            )
    extras.require("report", "rich", "matplotlib")
    from jaxtrain.report.page import html

    print(html.write_report(folders))
    return 0


COMMAND = Command(
    "WORKDIR [WORKDIR ...]", "report.html and plots: in the run's folder; of several here", run
)
