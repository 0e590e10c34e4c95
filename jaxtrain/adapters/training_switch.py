"""The training switch of a model, whatever its name: which argument or field says that this is
training, and which of its two values says so."""

import inspect
import re
import typing
from typing import Any

from jaxtrain.errors import UserError

TRAINING = {"train", "training", "learning", "fitting"}
EVALUATION = {
    *("eval", "evaluate", "evaluating", "evaluation", "test", "testing", "validation"),
    *("inference", "infer", "inferring", "deterministic"),
}
_FILLERS = {"is", "in", "mode", "do", "for", "phase", "now", "flag", "the", "at", "time"}
_SWITCHED_ON = {"use", "enable", "enabled", "apply", "with", "on", "run"}
_SWITCHED_OFF = {"not", "no", "disable", "disabled", "without", "skip", "off"}
_WHOLE: dict[frozenset[str], bool] = {
    frozenset(("running", "average")): False,
    frozenset(("running", "averages")): False,
    frozenset(("running", "stats")): False,
    frozenset(("running", "statistics")): False,
    frozenset(("global", "stats")): False,
    frozenset(("update", "stats")): True,
    frozenset(("update", "statistics")): True,
    frozenset(("update", "batch", "stats")): True,
    frozenset(("batch", "stats")): True,
    frozenset(("stochastic",)): True,
}
"""Names of several words, and their value in training."""
_LOOKS_LIKE = TRAINING | EVALUATION | {"dropout", "dropping", "stochastic"} - {"learning"}
_ASKS_FOR_OUTPUT = {"return", "output", "outputs", "capture", "pretrained"}
_ARRAYS = ("Array", "ndarray", "Tree", "Batch", "Float[", "Int[")


def value_in_training(name: str, *, argument: bool = True) -> bool | None:
    """What a switch of this name is in training; None if the name is not known as one.

    >>> [
    ...     value_in_training(name)
    ...     for name in ("is_training", "deterministic", "enable_dropout", "mask")
    ... ]
    [True, False, True, None]

    As a field (`argument=False`) a name that may be a choice of architecture, such as
    `use_dropout`, is not known.
    """
    words = set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()))
    words -= _FILLERS
    positive = not words & _SWITCHED_OFF
    core = words - _SWITCHED_ON - _SWITCHED_OFF
    if core and core <= TRAINING:
        return positive
    if core and core <= EVALUATION:
        return not positive
    if argument and core == {"dropout"}:
        return positive
    known = _WHOLE.get(frozenset(core))
    return known if known is None or positive else not known


def is_switch(parameter: inspect.Parameter) -> bool:
    """Whether an argument of a call is a training switch that can be set."""
    value, name = parameter.default, parameter.name
    if value_in_training(name) is None or isinstance(value, str):
        return False
    said = _annotation(parameter)
    if any(word in said for word in _ARRAYS) or "str" in said or "Literal" in said:
        return False
    if "float" in said or (isinstance(value, float)):
        return False
    if isinstance(value, int) and not isinstance(value, bool) and value not in (0, 1):
        return False
    # a bare `dropout` may be a rate, or an array
    return name != "dropout" or "bool" in said or isinstance(value, bool)


def is_unknown_switch(parameter: inspect.Parameter) -> bool:
    """Whether an argument that is no known switch nevertheless looks like one: a bool of such a
    name, or a text such as `mode="train"`."""
    said, value = _annotation(parameter), parameter.default
    words = set(re.findall(r"[a-z]+", parameter.name.lower()))
    texts = TRAINING | EVALUATION
    if isinstance(value, str) or "Literal" in said or said in ("str", "<class 'str'>"):
        spoken = {value.lower()} if isinstance(value, str) else set()
        spoken |= set(re.findall(r"[a-z]+", said.lower())) if "Literal" in said else set()
        required = value is inspect.Parameter.empty and "Literal" not in said
        return bool(spoken & texts) or (required and bool(words & {"mode", "phase", *texts}))
    is_bool = isinstance(value, bool) or "bool" in said
    if value is inspect.Parameter.empty and is_bool:
        return True  # nobody would set it
    return is_bool and bool(words & _LOOKS_LIKE) and not words & _ASKS_FOR_OUTPUT


def is_text_switch(name: str, value: Any) -> bool:
    """Whether a field is a switch in words, such as `mode="train"`."""
    words = set(re.findall(r"[a-z]+", name.lower()))
    return (
        isinstance(value, str)
        and value.lower() in TRAINING | EVALUATION
        and bool(words & (TRAINING | EVALUATION | {"mode", "phase"}))
    )


def refusal(model: str, name: str, *, kind: str, parameter: inspect.Parameter | None) -> UserError:
    """The line about an argument that looks like a training switch and cannot be set, with what
    would make it one."""
    text = parameter is not None and (
        isinstance(parameter.default, str) or "str" in _annotation(parameter)
    )
    text = text or (parameter is not None and "Literal" in _annotation(parameter))
    value = "'train' if train else 'eval'" if text else "train"
    what = f"model={model}: the argument {name!r} looks like a training switch"
    if kind == "function":
        remedy = f"(init, lambda params, x, train: apply(params, x, {name}={value}))"
    else:
        remedy = (
            f"class Switched({model}): __call__ = lambda self, x, train: {model}.__call__(self, x,"
            f" {name}={value})"
        )
    other = "" if text else f" (or `not train`, or a constant if {name!r} is none)"
    return UserError(f"{what} and is none that jaxtrain knows; say what it is: {remedy}{other}")


def _annotation(parameter: inspect.Parameter) -> str:
    said = parameter.annotation
    if said is inspect.Parameter.empty:
        return ""
    if isinstance(said, str):
        return said
    return said.__name__ if isinstance(said, type) and not typing.get_args(said) else str(said)
