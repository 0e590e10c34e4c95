"""What each extra of the package brings, and the one line that names one that is not installed.

The core is enough for a model, an optimizer or a step in somebody's own code. Reading data, reports
and checkpoints need more, imported where it is used; `require` stands before such an import, and at
the start of a run for what it will need at its end.
"""

from importlib import util

from jaxtrain.errors import UserError

MODULES = {
    "sklearn": ("scikit-learn", "data"),
    "PIL": ("pillow", "data"),
    "tensorflow_datasets": ("tensorflow-datasets", "data"),
    "grain": ("grain", "data"),
    "array_record": ("array_record", "data"),
    "tensorflow": ("tensorflow-cpu", "tensorflow"),
    "rich": ("rich", "report"),
    "matplotlib": ("matplotlib", "report"),
    "tensorboard": ("tensorboard", "report"),
    "orbax.checkpoint": ("orbax-checkpoint", "checkpoints"),
    "xxhash": ("xxhash", "checkpoints"),
    "safetensors": ("safetensors", "safetensors"),
    "tokenizers": ("tokenizers", "text"),
    "sentencepiece": ("sentencepiece", "text"),
    "jinja2": ("jinja2", "text"),
    "pyarrow": ("pyarrow", "text"),
    "gguf": ("gguf", "gguf"),
    "lm_eval": ("lm_eval", "lm_eval"),
}
"""The package and the extra behind each module that is not part of the core."""


def require(what: str, *modules: str) -> None:
    """Refuses, in one line with the command, where a module that `what` needs is not installed.

    >>> require("a model", "flax")
    """
    if absent := [module for module in modules if not _is_there(module)]:
        raise UserError(missing(what, *absent))


def missing(what: str, *modules: str) -> str:
    """The line that says what `what` needs, and how to get it.

    >>> missing("a report", "matplotlib", "xxhash")
    "a report needs matplotlib, xxhash; pip install 'jaxtrain[report,checkpoints]'"
    """
    packages, extras = zip(*(MODULES[module] for module in modules), strict=True)
    return (
        f"{what} needs {', '.join(packages)};"
        f" pip install 'jaxtrain[{','.join(dict.fromkeys(extras))}]'"
    )


def _is_there(module: str) -> bool:
    """Whether a module can be imported, found out without importing it."""
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is a part of
        return False
