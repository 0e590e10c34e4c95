"""Linen modules: their switch as argument or field, streams by any name, collections of any
kind."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import errors as flax_errors
from flax import linen as nn
from flax.core import FrozenDict

from jaxtrain.adapters import calling, training_switch
from jaxtrain.adapters.interface import Functions, NeedsKey, Variables
from jaxtrain.adapters.random_streams import stream
from jaxtrain.errors import UserError


@dataclasses.dataclass
class _Seen:
    """What a module asked for while it ran."""

    sown: set[str] = dataclasses.field(default_factory=set)
    """Collections that something was sown into."""
    drawn: set[str] = dataclasses.field(default_factory=set)
    """Streams that a key was made of."""
    asked: set[str] = dataclasses.field(default_factory=set)
    """Streams that the module asked for (`has_rng`)."""


def functions(model: nn.Module) -> Functions:
    """The two pure functions of a Linen module."""

    def init(key: jax.Array, inputs: Any) -> Variables:
        return nn.meta.unbox(boxed_variables(model, key, inputs))

    def apply(
        variables: Variables, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Variables]:
        module, call = _switched(model, train=train), _call(model)
        arguments, options = call.arguments(
            inputs, train=train, given=call.keys(key, only_required=key is None)
        )
        state = {name: tree for name, tree in variables.items() if name != "params"}
        changes = nn.DenyList(("params", *_SPECIAL)) if train else False

        def run(names: set[str], changes: Any) -> tuple[Any, Any]:
            rngs = None if key is None else {name: stream(key, name) for name in sorted(names)}
            found = module.apply(variables, *arguments, rngs=rngs, mutable=changes, **options)
            return found if changes is not False else (found, {})

        try:
            (outputs, changed), seen = _with_streams(run, changes, key, train=train)
        except flax_errors.ModifyScopeVariableError:
            if train:
                raise
            # Some count in evaluation too; what they change then is dropped.
            (outputs, changed), _ = _with_streams(run, nn.DenyList("params"), key, train=False)
            _check_averages(type(model).__name__, state, changed)
            return outputs, state
        if not train:
            return outputs, state
        _check_new(type(model).__name__, set(changed) - set(state) - seen.sown)
        return outputs, state | dict(nn.meta.unbox(dict(changed)))

    # so that a model that is wrong is an error when it is looked at, not when it runs
    call = _call(model)
    asks = calling.asking_for_a_key(apply, call.name) if call.random else apply
    return Functions(init, asks, model)


def boxed_variables(model: nn.Module, key: jax.Array, inputs: Any) -> Variables:
    """The variables of a Linen module in the boxes that name their logical axes, without what was
    sown while they were made."""
    module, call = _switched(model, train=False), _call(model)
    arguments, options = call.arguments(
        inputs, train=False, given=call.keys(key, only_required=True)
    )
    with _watched() as seen:
        variables = dict(module.init(key, *arguments, **options))
    return {"params": {}} | {
        name: tree for name, tree in variables.items() if name not in seen.sown
    }


_SPECIAL = ("params_axes", "lora_params")
"""Collections that a module writes at initialisation only."""


def _call(model: nn.Module) -> calling.Call:
    call = calling.of(model.__call__, type(model).__name__)
    fields = {field.name for field in dataclasses.fields(model)} - {"parent", "name"}
    # `nn.merge_param` takes a switch from the field or from the call, never from both.
    taken = {
        name
        for name in call.switches
        if name in fields
        and isinstance(getattr(model, name, None), bool)
        and call.parameters[name].default is None
    }
    return dataclasses.replace(
        call, switches={name: on for name, on in call.switches.items() if name not in taken}
    )


def _switched(model: nn.Module, *, train: bool) -> nn.Module:
    """The module with its switches, and those of the modules among its fields, set."""
    has_argument = bool(calling.of(model.__call__, type(model).__name__, lenient=True).switches)
    return _set_fields(model, train, not has_argument, {})


def _set_fields(
    module: nn.Module, train: bool, none_too: bool, done: dict[int, nn.Module]
) -> nn.Module:
    """`none_too`: fields that hold None are set as well, for nobody will say it in the call."""
    if id(module) in done:
        return done[id(module)]
    changes: dict[str, Any] = {}
    in_sequence = isinstance(module, nn.Sequential)

    def visit(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return _set_fields(value, train, in_sequence, done)
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return _same_or(value, type(value)(visit(part) for part in value))
        if isinstance(value, dict | FrozenDict):
            new = {name: named(str(name), part) for name, part in value.items()}
            same = all(new[name] is value[name] for name in value)
            return value if same else type(value)(new)
        if isinstance(value, functools.partial) and value.keywords:
            # a layer to be made, such as partial(nn.BatchNorm, use_running_average=True)
            new = {name: named(name, part) for name, part in value.keywords.items()}
            same = all(new[name] is part for name, part in value.keywords.items())
            return value if same else functools.partial(value.func, *value.args, **new)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            # a configuration, as Flax's examples hand it to every layer
            held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
            new = {name: named(name, part) for name, part in held.items()}
            changed = {name: part for name, part in new.items() if part is not held[name]}
            return dataclasses.replace(value, **changed) if changed else value
        return value

    def named(name: str, value: Any) -> Any:
        on = training_switch.value_in_training(name, argument=False)
        return on == train if on is not None and isinstance(value, bool) else visit(value)

    for field in dataclasses.fields(module):
        value = getattr(module, field.name, None)
        if field.name in ("parent", "name") or not field.init:
            continue
        on = training_switch.value_in_training(field.name, argument=False)
        if training_switch.is_text_switch(field.name, value):
            raise _text_field(module, field.name, str(value))
        if on is not None and (isinstance(value, bool) or (value is None and none_too)):
            wanted = on if train else not on
            if value is not wanted:
                changes[field.name] = wanted
        elif (new := visit(value)) is not value:
            changes[field.name] = new
    done[id(module)] = module.clone(parent=None, **changes) if changes else module
    return done[id(module)]


def _same_or(old: Any, new: Any) -> Any:
    return old if all(one is other for one, other in zip(old, new, strict=True)) else new


def _text_field(module: nn.Module, name: str, value: str) -> UserError:
    kind = type(module).__name__
    return UserError(
        f"model={kind}: the field {name}={value!r} looks like a training switch, and only a bool is"
        f" one; wrap it: (lambda key, x: {kind}({name}='eval').init(key, x)['params'], lambda p, x,"
        f" train: {kind}({name}='train' if train else 'eval').apply({{'params': p}}, x))"
    )


def _check_new(model: str, new: set[str]) -> None:
    if new:
        raise UserError(
            f"model={model}: the collection {min(new)!r} is there in a training pass only, so no"
            " state can hold it; make it at initialisation too (train=False), or `sow` it"
        )


def _check_averages(model: str, before: Variables, after: Any) -> None:
    name = "batch_stats"
    old, new = jax.tree.leaves(before.get(name)), jax.tree.leaves(after.get(name))
    if any(one is not other for one, other in zip(old, new, strict=True)):
        raise UserError(
            f"model={model}: moves its averages ({name}) in evaluation too, so that what it gives"
            " would depend on the batch; let its training switch reach them"
            " (use_running_average=not train)"
        )


def _with_streams(
    run: Callable[[set[str], Any], Any], changes: Any, key: jax.Array | None, *, train: bool
) -> tuple[Any, _Seen]:
    """Runs a module with the streams that it wants: once, and once more for each name that only
    running it brought to light."""
    names = {"dropout"} if train else set()
    while True:
        with _watched() as seen:
            try:
                found = run(names, changes)
                missing = seen.asked - names - {"params"} if train and key is not None else set()
            except flax_errors.InvalidRngError as error:
                missing = seen.drawn - names
                if key is None and missing:
                    raise NeedsKey(
                        f"draws random numbers from the stream {min(missing)!r}; give key="
                    ) from error
                if not missing:
                    raise
                found = None
        if not missing:
            return found, seen
        names |= missing


@contextlib.contextmanager
def _watched() -> Iterator[_Seen]:
    """Notes which streams modules ask for, and into which collections they sow; Flax has no way to
    ask a module before it runs."""
    seen = _Seen()
    sow, make_rng, has_rng = nn.Module.sow, nn.Module.make_rng, nn.Module.has_rng

    def noting_sow(self: nn.Module, col: str, *arguments: Any, **options: Any) -> bool:
        seen.sown.add(col)
        return sow(self, col, *arguments, **options)

    def noting_make_rng(self: nn.Module, name: str = "params") -> jax.Array:
        seen.drawn.add(name)
        return make_rng(self, name)

    def noting_has_rng(self: nn.Module, name: str) -> bool:
        seen.asked.add(name)
        return has_rng(self, name)

    changed: Any = nn.Module
    changed.sow, changed.make_rng, changed.has_rng = noting_sow, noting_make_rng, noting_has_rng
    try:
        yield seen
    finally:
        changed.sow, changed.make_rng, changed.has_rng = sow, make_rng, has_rng


def is_bound_pair(model: Any) -> nn.Module | None:
    """The module whose own `(init, apply)` a pair is, if it is one."""
    owners = [getattr(part, "__self__", None) for part in model]
    names = [getattr(part, "__name__", "") for part in model]
    same = owners[0] is owners[1] and isinstance(owners[0], nn.Module)
    return owners[0] if same and names == ["init", "apply"] else None
