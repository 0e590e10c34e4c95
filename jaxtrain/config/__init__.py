"""The configuration of a run: its fields, their flags, their help, and their record in run.json."""

from jaxtrain.config.run import (
    FAMILIES as FAMILIES,
)
from jaxtrain.config.run import (
    NOT_FLAGS as NOT_FLAGS,
)
from jaxtrain.config.run import (
    PATHS as PATHS,
)
from jaxtrain.config.run import (
    Run as Run,
)
from jaxtrain.config.run import (
    check as check,
)
from jaxtrain.config.run import (
    check_paths as check_paths,
)
from jaxtrain.config.run import (
    replaced as replaced,
)
from jaxtrain.config.run import (
    siblings as siblings,
)

__all__ = [
    "FAMILIES",
    "NOT_FLAGS",
    "PATHS",
    "Run",
    "check",
    "check_paths",
    "flags",
    "help",
    "record",
    "replaced",
    "secrets",
    "settings",
    "siblings",
    "values",
]
