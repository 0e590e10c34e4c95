"""What an exception out of somebody's model means, in one line; and which lines of its traceback
are the user's own."""

import re
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors as flax_errors
from flax import linen as nn

from jaxtrain import messages
from jaxtrain.train.recipe import Recipe

_NOTE = "jaxtrain: "
_HOUSE = Path(__file__).resolve().parent.parent
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_DTYPES = re.compile(r"d(?:ata )?types?\b|equal types|differ in type", re.IGNORECASE)
_CARRY = re.compile(
    r"carry|body_fun|branch(?:es)?\b.*(?:equal|same|identical) types|true_fun|cond branch",
    re.IGNORECASE | re.DOTALL,
)


def line(
    recipe: Recipe, error: Exception, again: Callable[[], Any], in_float32: Callable[[], Any]
) -> str | None:
    """What an exception means, or None if it is not known; `again` runs the pass once more,
    `in_float32` does so in that precision."""
    model, text = name_of(recipe.model), _first(error)
    if isinstance(error, NameError) and (
        axis := re.search(r"unbound axis name:? (\S+?)[.\s]", text)
    ):
        return (
            f"model={model}: reduces over the axis {axis[1].strip(repr(''))!r}, which is not there;"
            " averages here are those of the whole batch anyway, so leave axis_name out"
        )
    if isinstance(error, flax_errors.ScopeParamNotFoundError | flax_errors.ScopeCollectionNotFound):
        return (
            f"model={model}: {text}; what only training uses must be made at initialisation, too:"
            " `if train or self.is_initializing():`"
        )
    if isinstance(error, flax_errors.FlaxError) and not own_frames(error):
        return f"model={model}: {text}"
    narrow = recipe.precision != "fp32"
    if narrow and not _runs(in_float32):
        return None  # the precision is not to blame
    if isinstance(error, TypeError) and (_CARRY.search(str(error)) or _DTYPES.search(str(error))):
        return _dtypes(recipe, model, error, again)
    if narrow:
        where = _innermost(error.__traceback__) or f"model={model}"
        return needs_float32(recipe.precision, where, error)
    return None


def needs_float32(precision: str, where: str, error: Exception) -> str:
    """The line about what there is in float32 and not in the precision of the run.

    >>> needs_float32("bf16", "model=Net", NotImplementedError("Unsupported dtype bfloat16"))[:58]
    '--precision=bf16: model=Net runs in float32 only: Unsuppor'
    """
    return (
        f"--precision={precision}: {where} runs in float32 only: {_first(error)}; let it compute in"
        " float32 there (x.astype(jnp.float32)), or use --precision=fp32"
    )


def note(error: BaseException, doing: str) -> None:
    """Notes at an exception of the user's own code what jaxtrain was doing."""
    error.add_note(_NOTE + doing)


def noted(error: BaseException) -> str | None:
    """What jaxtrain was doing when the user's own code raised this, or None if it is none of
    that."""
    found = [text for text in getattr(error, "__notes__", ()) if text.startswith(_NOTE)]
    return found[0].removeprefix(_NOTE) if found else None


def own_lines(error: BaseException) -> str:
    """The traceback of an exception, cut to the user's own lines."""
    frames = own_frames(error) or traceback.extract_tb(error.__traceback__)[-1:]
    kept = traceback.StackSummary.from_list(frames)
    last = "".join(traceback.TracebackException.from_exception(error).format_exception_only())
    last = last.split("\n--------------------\nFor simplicity")[0].split("\n" + _NOTE)[0].rstrip()
    head = "Traceback (most recent call last; only lines of your own code):\n"
    return head + "".join(kept.format()) + last


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of an exception that belong neither to jaxtrain nor to a library."""
    return [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]


def name_of(model: Any) -> str:
    """What messages call a model."""
    if isinstance(model, tuple):
        return "(init, apply)"
    return getattr(model, "__name__", None) or type(model).__name__


def _is_own(filename: str) -> bool:
    path = Path(filename)
    if filename.startswith("<") or path.is_relative_to(_HOUSE):
        return False
    return not any(filename.startswith(str(folder)) for folder in _LIBRARIES)


def _runs(pass_: Callable[[], Any]) -> bool:
    try:
        pass_()
    except Exception:  # noqa: BLE001  of a model of the user's own
        return False
    return True


def _dtypes(recipe: Recipe, model: str, error: TypeError, again: Callable[[], Any]) -> str | None:
    """The line about dtypes that part under a precision that is not float32."""
    if recipe.precision == "fp32" and not jax.config.values["jax_enable_x64"]:
        return None
    where = _where_dtypes_part(again) or _innermost(error.__traceback__)
    said = "--precision=" + recipe.precision if recipe.precision != "fp32" else "JAX_ENABLE_X64=1"
    remedy = "--precision=fp32" if recipe.precision != "fp32" else "JAX_ENABLE_X64=0"
    return (
        f"{said}: dtypes part at {where or f'model={model}'}: {_first(error)}; let it compute in"
        f" the dtype of its inputs (dtype=None), or use {remedy}"
    )


def _where_dtypes_part(again: Callable[[], Any]) -> str | None:
    """The first Linen module that makes wide numbers of narrow ones."""
    found: list[str] = []

    def look(following: Any, arguments: Any, options: Any, context: Any) -> Any:
        result = following(*arguments, **options)
        given, made = (_floats(each) for each in ((arguments, options), result))
        widens = bool(given) and max(given) < max(made, default=0)
        if widens and not found and context.method_name == "__call__":
            path = "/".join(context.module.path)
            found.append(f"{type(context.module).__name__} ({path or 'the whole model'})")
        return result

    try:
        with nn.intercept_methods(look):
            again()
    except Exception:  # noqa: BLE001  the one that is being explained
        return found[0] if found else None
    return None


def _floats(values: Any) -> set[int]:
    return {
        jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(values)
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def _innermost(trace: TracebackType | None) -> str | None:
    """The innermost line of the user's own code, with its function."""
    found = None
    while trace is not None:
        code = trace.tb_frame.f_code
        if _is_own(code.co_filename) and code.co_name != "<module>":
            name = Path(code.co_filename).name
            found = f"{code.co_qualname} ({name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return found


def _first(error: BaseException) -> str:
    """The message of an exception on one line."""
    text = str(error).split("\n--------------------\nFor simplicity")[0]
    return messages.one_line(text.split(" (https://")[0]).rstrip(" .")
