"""The marks of the fields of `Run`: what is true of a field besides its type and its bounds.

They stand in the field's own annotation, where flags, help, run.json and resuming find them:

    keep: Annotated[Count, Group.CHECKPOINTS, FREE] = 2
"""

import enum

from jaxtrain.fields import Bound, Public, Secret, Traced, fields_of


class Mark(enum.Enum):
    """What is true of one field of `Run`."""

    EXPERIMENT = "belongs to the experiment alone: no flag sets it, run.json does not hold it"
    FAMILY = "a component, which --FIELD=NAME swaps for a named one that the experiment offers"
    FREE = "may differ from the run that goes on, and a line says so; others need a permission"
    INVOCATION = "says how this one start behaves: always may differ, --from_run leaves it alone"
    PATH = "names a place on the disk; on the command line it may begin with ~"


EXPERIMENT = Mark.EXPERIMENT
FAMILY = Mark.FAMILY
FREE = Mark.FREE
INVOCATION = Mark.INVOCATION
PATH = Mark.PATH


class Group(enum.Enum):
    """The groups of a run's own flags in `--help`, in their order."""

    TRAINING = "Training"
    DEVICES = "Devices"
    PROCESSES = "Processes"
    WORKDIR = "The run's folder"
    CHECKPOINTS = "Evaluation and checkpoints"
    OUTPUT = "What is shown and written"


def check(cls: type) -> None:
    """Raises `TypeError` unless each field of a run bears marks that there are and that go
    together: one group if it is a plain flag, none otherwise."""
    for field in fields_of(cls):
        own = {mark for mark in field.marks if isinstance(mark, Mark)}
        groups = [mark for mark in field.marks if isinstance(mark, Group)]
        others = [mark for mark in field.marks if mark not in own and mark not in groups]
        for mark in others:
            if not isinstance(mark, Bound | Traced | Secret | Public):
                raise TypeError(f"{cls.__name__}.{field.name}: {mark!r} is no mark of a field")
        if own >= {FREE, INVOCATION}:
            raise TypeError(
                f"{cls.__name__}.{field.name}: bears FREE and INVOCATION; one start's own fields"
                " are free anyway"
            )
        wanted = 0 if own & {EXPERIMENT, FAMILY} else 1
        if len(groups) != wanted:
            raise TypeError(
                f"{cls.__name__}.{field.name}: bears {len(groups)} help groups; expected {wanted}:"
                " plain flags have one, components and the experiment's own fields none"
            )
