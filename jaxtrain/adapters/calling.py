"""How a model is called: inputs by position or by name, its training switch, its state and its
random keys, each where the signature of the model has it."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxtrain.adapters import training_switch
from jaxtrain.adapters.interface import Apply, NeedsKey, Variables
from jaxtrain.adapters.random_streams import Streams, stream
from jaxtrain.errors import UserError

_LIBRARIES = ("flax.", "equinox.", "haiku.", "jax.")
_KEY_WORDS = {"rng", "rngs", "prng", "prngkey"}
_KIND = inspect.Parameter


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of a model, sorted by what they are."""

    name: str
    """What messages call the model."""
    parameters: Mapping[str, inspect.Parameter]
    switches: Mapping[str, bool]
    """Training switches, and their value in training."""
    random: tuple[str, ...]
    """Arguments that take a random key, or a mapping of keys (`rngs`)."""

    def keys(self, key: jax.Array | None, *, only_required: bool = False) -> dict[str, Any]:
        """A value for each argument that takes a random key; None where there is no key.

        In evaluation Linen and NNX modules are given only what they require, None.
        """
        names = [
            name
            for name in self.random
            if not only_required or self.parameters[name].default is _KIND.empty
        ]
        if key is None:
            return dict.fromkeys(names)
        return {name: _key_for(name, key) for name in names}

    def arguments(
        self, inputs: Any, *, train: bool, given: Mapping[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Positional and named arguments for one call; `given` are values by name that are neither
        inputs nor switches. `UserError` if the inputs do not fit.

        A switch is given by position where it can be: `nn.remat` traces all that is named.
        """
        waiting, named = called_with(inputs)
        self._check_names(named)
        own = {name: value if train else not value for name, value in self.switches.items()}
        own |= {name: value for name, value in given.items() if name not in named}
        arguments: list[Any] = []
        options, by_position = dict(named), True
        for name, parameter in self.parameters.items():
            if parameter.kind is _KIND.VAR_KEYWORD:
                continue
            if parameter.kind is _KIND.VAR_POSITIONAL:
                arguments, waiting, by_position = arguments + waiting, [], False
                continue
            only_position = parameter.kind is _KIND.POSITIONAL_ONLY
            if name in own:
                value = own[name]
            elif name in named:
                value = options.pop(name)
            elif waiting and (
                parameter.kind is not _KIND.KEYWORD_ONLY or parameter.default is _KIND.empty
            ):
                value = waiting.pop(0)
            elif parameter.default is not _KIND.empty:
                by_position = by_position and only_position
                if only_position:
                    arguments.append(parameter.default)
                continue
            else:
                raise self._missing(parameter, inputs)
            if only_position or (by_position and parameter.kind is not _KIND.KEYWORD_ONLY):
                arguments.append(value)
            else:
                options[name] = value
        if waiting:
            raise self._misfit(inputs)
        return arguments, options

    def _check_names(self, named: Mapping[str, Any]) -> None:
        for name in named:
            if name in self.switches:
                raise UserError(
                    f"model={self.name}: {name!r} is its training switch, and the task gives an"
                    " input of that name; rename the input"
                )
        rest = any(p.kind is _KIND.VAR_KEYWORD for p in self.parameters.values())
        unknown = [name for name in named if name not in self.parameters]
        if unknown and not rest:
            raise self._misfit(named)

    def _missing(self, parameter: inspect.Parameter, inputs: Any) -> UserError:
        if training_switch.is_unknown_switch(parameter):
            return self.refusal(parameter)
        return self._misfit(inputs)

    def refusal(self, parameter: inspect.Parameter) -> UserError:
        """The line about an argument that looks like a switch and cannot be set."""
        kind = "function" if self.name.startswith("(") else "module"
        return training_switch.refusal(self.name, parameter.name, kind=kind, parameter=parameter)

    def _misfit(self, inputs: Any) -> UserError:
        waiting, named = called_with(inputs)
        wanted = [
            name + ("" if p.default is _KIND.empty else "=...")
            for name, p in self.parameters.items()
            if name not in self.switches and name not in self.random
        ]
        found = ", ".join(named) or f"{len(waiting)} input{'s' if len(waiting) != 1 else ''}"
        return UserError(
            f"model={self.name}: takes ({', '.join(wanted)}) and the task gives {found}; let the"
            " task's inputs be a tuple or a dict of what it takes (--task.input='a,b' or"
            " 'argument=field,...')"
        )


def of(function: Callable[..., Any], name: str, *, skip: int = 0, lenient: bool = False) -> Call:
    """The call of a function whose first `skip` arguments are none of the inputs.

    >>> call = of(lambda params, x, deterministic: x, "(init, apply)", skip=1)
    >>> call.arguments(3, train=True, given={})
    ([3, False], {})

    `UserError` for an argument that looks like a training switch and is none that can be set; not
    if `lenient`.
    """
    parameters = dict(list(_parameters(function).items())[skip:])
    switches = {
        key: bool(training_switch.value_in_training(key))
        for key, parameter in parameters.items()
        if training_switch.is_switch(parameter)
    }
    random = tuple(key for key in parameters if _is_random(key, parameters))
    call = Call(name, parameters, switches, random)
    if lenient:
        return call
    for key, parameter in parameters.items():
        optional = parameter.default is not _KIND.empty
        if optional and key not in switches and training_switch.is_unknown_switch(parameter):
            raise call.refusal(parameter)
    rest = [p for p in parameters.values() if p.kind is _KIND.VAR_KEYWORD]
    module = getattr(inspect.unwrap(function), "__module__", None) or ""
    if rest and not switches and not module.startswith(_LIBRARIES):
        raise _hidden_switch(call, rest[0].name)
    return call


def called_with(inputs: Any) -> tuple[list[Any], dict[str, Any]]:
    """Inputs as positional and named arguments: a tuple is several, a mapping several by name.

    >>> called_with((1, 2)), called_with({"x": 1}), called_with([1, 2])
    (([1, 2], {}), ([], {'x': 1}), ([[1, 2]], {}))
    """
    if isinstance(inputs, Mapping):
        return [], {str(name): value for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return list(inputs), {}
    return [inputs], {}


def asking_for_a_key(apply: Apply, name: str) -> Apply:
    """An `apply` that says `NeedsKey` where a pass without a key fails, and could have one.

    Whether a model that takes a key draws with it in evaluation is known only when it runs.
    """

    def asking(
        variables: Variables, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Variables]:
        try:
            return apply(variables, inputs, train=train, key=key)
        except UserError:
            raise
        except Exception as error:
            if key is None:
                raise NeedsKey(
                    f"model={name}: fails without a random key ({error}); give key="
                ) from error
            raise

    return asking


def check_factory(model: Any, argument: str) -> None:
    """`UserError` if a class or function cannot be called with `argument` alone."""
    function = model.__init__ if isinstance(model, type) else model  # a metaclass hides it
    missing = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in (argument, "self")
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    if missing:
        name = getattr(model, "__name__", "model")
        raise UserError(
            f"model={name}: is made with ({', '.join([*missing, argument])}) and is called with"
            f" {argument} alone; give lambda {argument}: {name}(...,"
            f" {argument}={argument})"
        )


def _hidden_switch(call: Call, name: str) -> UserError:
    what = f"model={call.name}: takes **{name}, which may hide a training switch"
    if call.name.startswith("("):
        remedy = "(init, lambda params, x, train: apply(params, x, train=train)), or without it"
    else:
        remedy = (
            f"class Named({call.name}): __call__ = lambda self, x, train:"
            f" {call.name}.__call__(self, x, train=train), or without train"
        )
    return UserError(f"{what}; name what it takes: {remedy}")


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some built-in functions nothing is known
        return {"inputs": inspect.Parameter("inputs", _KIND.POSITIONAL_ONLY)}


def _is_random(name: str, parameters: Mapping[str, inspect.Parameter]) -> bool:
    words = set(re.findall(r"[a-z]+", name.lower()))
    if parameters[name].kind in (_KIND.VAR_KEYWORD, _KIND.VAR_POSITIONAL):
        return False
    if words & _KEY_WORDS or (words & {"random", "dropout", "noise"} and words & {"key", "keys"}):
        return True
    # of attention, `key` is an array
    return name == "key" and not {"query", "value", "keys", "q", "v"} & parameters.keys()


def _key_for(name: str, key: jax.Array) -> Any:
    if name == "rngs":
        return Streams(key)
    return key if name in ("key", "rng") else stream(key, name)
