"""The configuration of a run: its fields, their flags, their help, and their record in run.json."""

from jaxtrain.config.marks import Group as Group
from jaxtrain.config.marks import Mark as Mark
from jaxtrain.config.run import FAMILIES as FAMILIES
from jaxtrain.config.run import LENGTHS as LENGTHS
from jaxtrain.config.run import Run as Run
from jaxtrain.config.run import check as check
from jaxtrain.config.run import check_paths as check_paths
from jaxtrain.config.run import marked as marked
from jaxtrain.fields import replaced as replaced

__all__ = [
    "FAMILIES",
    "LENGTHS",
    "Group",
    "Mark",
    "Run",
    "check",
    "check_paths",
    "flags",
    "help",
    "marked",
    "marks",
    "record",
    "replaced",
    "secrets",
    "settings",
    "step_options",
    "values",
]
