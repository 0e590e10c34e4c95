"""The configuration of a run: its fields, their flags, their help, and their record in run.json."""

from jaxtrain.config.run import (
    FAMILIES as FAMILIES,
    NOT_FLAGS as NOT_FLAGS,
    PATHS as PATHS,
    Run as Run,
    check as check,
    check_paths as check_paths,
    replaced as replaced,
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
