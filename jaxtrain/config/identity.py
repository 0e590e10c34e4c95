"""What identifies a value that JSON cannot hold, as text that is the same in every process.

Functions and classes are known by module and name; what a name does not say stands in brackets
behind it: the values that a closure has captured, the arguments of a partial, the code of a lambda.
No address in memory, no order of a set or mapping, and no hash that differs from process to process
is in it.
"""

import contextlib
import dataclasses
import enum
import functools
import hashlib
import inspect
import types
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import PurePath
from typing import Any

import numpy as np

from jaxtrain.config.secrets import HIDDEN
from jaxtrain.fields import is_component, named_like_a_secret

MOST_CHARACTERS = 300
"""What is longer ends in a hash of the whole, so that run.json stays readable."""
MOST_DEPTH = 12
MOST_BYTES = 1 << 26
"""Of larger arrays only some rows are looked at."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))


def identity(value: Any) -> str:
    """The text that identifies a value.

    >>> import operator
    >>> identity(operator.add), identity(functools.partial(max, 2)), identity({"b": 1, "a": 2})
    ('_operator.add', 'functools.partial(builtins.max, 2)', "{'a': 2, 'b': 1}")

    A function of a module is its name alone: like the classes of a model it may be edited, which
    is the business of the commit in run.json. Two lambdas differ if their code or what they
    captured does.
    """
    text = _identity(value, ())
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}... sha256:{_digest(text.encode())}"


def name_of_class(kind: type) -> str:
    """The name of a class; of one that a function made, with what its methods took from there.

    >>> def made(scale):
    ...     class Net:
    ...         def __call__(self, x):
    ...             return scale * x
    ...
    ...     return Net
    >>> name_of_class(made(2)), name_of_class(int)
    ('Net(scale=2)', 'int')
    """
    details = _named(_captured(kind), lambda part: _identity(part, (id(kind),)))
    return f"{kind.__name__}({', '.join(details)})" if details else kind.__name__


def _captured(kind: type) -> dict[str, Any]:
    """What the methods of a class hold of the function that made it, by the names there."""
    found: dict[str, Any] = {}
    if "<locals>" not in kind.__qualname__:
        return found
    for member in vars(kind).values():
        inner = getattr(member, "fget", None) or getattr(member, "__func__", None) or member
        function = inspect.unwrap(inner) if callable(inner) else None
        # what `dataclasses` writes stands in no file, and holds the types of the fields
        if isinstance(function, types.FunctionType) and function.__code__.co_filename != "<string>":
            found |= _cells(function)
    return {name: value for name, value in found.items() if name != "__class__"}


def _cells(function: types.FunctionType) -> dict[str, Any]:
    """The variables of its surroundings that a function holds; those not yet filled are left
    out."""
    found = {}
    names = function.__code__.co_freevars
    for variable, cell in zip(names, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):
            found[variable] = cell.cell_contents
    return found


def _identity(value: Any, above: tuple[int, ...]) -> str:
    """`above` holds the ids of the values that this one is part of: a closure may hold itself."""
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    if type(value) in _PLAIN:
        return repr(value)
    if id(value) in above or len(above) > MOST_DEPTH:
        return "..."

    def inner(part: Any) -> str:
        return _identity(part, (*above, id(value)))

    for row in (_of_function, _of_object):
        if (text := row(value, inner)) is not None:
            return text
    return _of_container(value, inner)


def _of_function(value: Any, inner: Any) -> str | None:
    """Functions, classes, and what wraps or binds a function; None for anything else."""
    if isinstance(value, functools.partial):
        arguments = [inner(part) for part in (value.func, *value.args)]
        arguments += _named(value.keywords, inner)
        return f"{_name(type(value))}({', '.join(arguments)})"
    if isinstance(value, type):
        return _of_class(value, inner)
    if isinstance(value, types.MethodType):
        if isinstance(value.__self__, type):
            return f"{_name(value.__self__)}.{value.__name__}"
        return f"{inner(value.__func__)} of {inner(value.__self__)}"
    if isinstance(value, types.FunctionType):
        return _of_python_function(value, inner)
    wrapped = getattr(value, "__wrapped__", None)
    if callable(wrapped) and not isinstance(wrapped, type):  # jax.jit, jax.custom_jvp
        return inner(wrapped)
    if isinstance(getattr(value, "__qualname__", None) or getattr(value, "__name__", None), str):
        return _name(value)
    return None


def _of_class(kind: type, inner: Any) -> str:
    details = _named(_captured(kind), inner)
    return f"{_name(kind)}({', '.join(details)})" if details else _name(kind)


def _of_python_function(function: types.FunctionType, inner: Any) -> str:
    code = function.__code__
    # What a decorator copied the name of another function to is known by its own code.
    own = code.co_qualname == function.__qualname__
    module = function.__module__ if own else function.__globals__.get("__name__", "")
    name = f"{module}.{code.co_qualname}"
    details = _named(_cells(function), inner)
    if "<" in name:  # no other module can say this name, so its defaults may be anything, too
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        details += [f"default {inner(part)}" for part in defaults]
    if "<lambda>" in name:
        details.append(f"code {_digest(_of_code(code).encode())}")
    return f"{name}({', '.join(details)})" if details else name


def _of_code(code: types.CodeType) -> str:
    """Code without the place where it stands: its instructions, names and constants."""
    constants = [_of_constant(constant) for constant in code.co_consts]
    parts = (code.co_code.hex(), code.co_argcount, code.co_names, code.co_varnames, constants)
    return repr(parts)


def _of_constant(constant: Any) -> str:
    if isinstance(constant, types.CodeType):
        return _of_code(constant)
    if isinstance(constant, frozenset | tuple):
        return _sorted(map(_of_constant, constant), keep=isinstance(constant, tuple))
    return repr(constant)


def _of_object(value: Any, inner: Any) -> str | None:
    """Arrays, dtypes, paths and components; None for anything else."""
    if isinstance(value, np.generic):
        return f"{value.dtype}({value.item()!r})"
    if isinstance(value, np.dtype):
        return f"numpy.dtype({value.name!r})"
    if isinstance(value, PurePath):
        return repr(str(value))
    if hasattr(value, "dtype") and hasattr(value, "shape") and not hasattr(value, "__dict__"):
        return _of_array(value)
    if type(value).__module__.startswith(("numpy", "jaxlib", "jax.")) and hasattr(value, "shape"):
        return _of_array(value)
    if is_component(value):
        # Of a Linen module `parent` and `name` say where it hangs, not what it is.
        skipped = ("parent", "name") if hasattr(value, "scope") else ()
        parts = {
            field.name: getattr(value, field.name, None)
            for field in dataclasses.fields(value)
            if field.name not in skipped
        }
        return f"{_of_class(type(value), inner)}({', '.join(_named(parts, inner))})"
    return None


def _of_array(array: Any) -> str:
    import jax
    import jax.numpy as jnp

    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.nbytes > MOST_BYTES:  # whole data sets: rows far apart tell them apart
        shape = f"{array.dtype}{list(array.shape)} of which "
        return shape + _of_array(array[:: max(1, len(array) // 64)][:64])
    host = np.ascontiguousarray(array)
    content = _digest(host.reshape(-1).view(np.uint8).data if host.size else b"")
    return f"array({host.dtype}{list(host.shape)}, sha256:{content})"


def _of_container(value: Any, inner: Any) -> str:
    """Mappings and sets without their order, sequences, and any other object by what it holds."""
    if isinstance(value, Mapping):
        return _sorted((f"{inner(key)}: {inner(part)}" for key, part in value.items()), "{}")
    if isinstance(value, AbstractSet):
        return _sorted(map(inner, value), "{}")
    if isinstance(value, tuple | list):
        fields = getattr(value, "_fields", None)
        parts = [inner(part) for part in value]
        if fields is not None:
            named = zip(fields, parts, strict=True)
            return f"{_name(type(value))}({', '.join('='.join(pair) for pair in named)})"
        return _sorted(parts, "()" if isinstance(value, tuple) else "[]", keep=True)
    held = {
        name: part
        for name, part in getattr(value, "__dict__", {}).items()
        if not name.startswith("__")
    }
    shown = ", ".join(_named(held, inner))
    kind = _of_class(type(value), inner)
    return f"{kind}({shown})" if held else kind


def _named(parts: Mapping[str, Any], inner: Any) -> list[str]:
    """Each part behind its name, sorted; what is named like a secret is not shown."""
    return [
        f"{name}={HIDDEN if named_like_a_secret(name) else inner(part)}"
        for name, part in sorted(parts.items())
    ]


def _sorted(parts: Iterable[str], brackets: str = "()", *, keep: bool = False) -> str:
    return brackets[0] + ", ".join(parts if keep else sorted(parts)) + brackets[1]


def _name(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or value.__name__
    module = getattr(value, "__module__", None)
    return f"{module}.{name}" if isinstance(module, str) else name


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
