"""NNX modules through pure dicts: the graph is static, random streams are made anew from one key at
each call and are no variables."""

import inspect
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import jax

from jaxtrain.adapters import calling, training_switch
from jaxtrain.adapters.interface import Functions, NeedsKey, Variables, axes_named
from jaxtrain.errors import UserError
from jaxtrain.tree import PyTree


def is_nnx(model: Any) -> bool:
    """Whether something is an NNX module, a class of them, or a function of `rngs`."""
    from flax import nnx

    if isinstance(model, nnx.Module) or (isinstance(model, type) and issubclass(model, nnx.Module)):
        return True
    if not callable(model):
        return False
    try:
        parameters = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "rngs" or p.kind is p.VAR_KEYWORD for p in parameters)


def functions(model: Any) -> Functions:
    """The two pure functions of an NNX module, or of a function of rngs that makes one."""
    from flax import nnx  # heavy beside Linen, and only its users need it

    made = isinstance(model, nnx.Module)
    if not made:
        calling.check_factory(model, "rngs")
    example = model if made else nnx.eval_shape(lambda: model(rngs=nnx.Rngs(0)))
    if not isinstance(example, nnx.Module):
        raise UserError(
            f"model={model!r}: called with rngs it gave {type(example).__name__}; expected an NNX"
            " module"
        )
    example = _without_sown(example)
    graph, _, streams, rest = nnx.split(example, nnx.Param, nnx.RngState, ...)
    kinds = sorted(
        {type(variable) for _, variable in nnx.to_flat_state(rest)}, key=lambda kind: kind.__name__
    )
    names = ["params", *(_collection(kind) for kind in kinds)]
    call = calling.of(example.__call__, type(example).__name__)

    def pure(module: Any) -> tuple[Variables, Variables]:
        _, _, *states, new = nnx.split(module, nnx.RngState, nnx.Param, *map(_exactly, kinds), ...)
        found = {name: nnx.to_pure_dict(state) for name, state in zip(names, states, strict=True)}
        return found, _by_kind(new)

    def init(key: jax.Array, inputs: Any) -> Variables:
        source = _without_sown(model) if made else model(rngs=nnx.Rngs(key))
        # Copies, so that a step which donates its state leaves the caller's module alive.
        return jax.tree.map(_copied, pure(source)[0])

    def apply(
        variables: Variables, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Variables]:
        given = call.keys(key, only_required=key is None)
        if key is not None and "rngs" in given:
            given["rngs"] = key if _wants_key(call) else nnx.Rngs(key)
        arguments, options = call.arguments(inputs, train=train, given=given)
        seeded = _seeded(streams, key, needed=train)
        module = nnx.merge(graph, *(variables[name] for name in names), seeded)
        _switch(module, train=train)
        counts = list(_counts(module))
        with warnings.catch_warnings():
            # `nnx.capture` would want to know the kinds of what is sown beforehand.
            warnings.filterwarnings("ignore", r"Using 'Module.sow\(\)' outside", DeprecationWarning)
            outputs = module(*arguments, **options)
        if key is None and any(before is not after for before, after in _pairs(module, counts)):
            raise NeedsKey(f"model={call.name}: draws random numbers in evaluation; give key=")
        found, sown = pure(module)
        source = found | sown if train else variables
        return outputs, {name: source[name] for name in source if name != "params"}

    asks = calling.asking_for_a_key(apply, call.name) if call.random else apply
    return Functions(init, asks, model)


def logical_axes(model: Any) -> Variables:
    """Axes of an NNX module from what `nnx.with_partitioning` left on its variables."""
    from flax import nnx

    example = (
        model if isinstance(model, nnx.Module) else nnx.eval_shape(lambda: model(rngs=nnx.Rngs(0)))
    )
    _, state, _ = nnx.split(example, nnx.Not(nnx.Any(nnx.RngState, nnx.Intermediate)), ...)
    flat: dict[str, dict[Any, Any]] = {"params": {}}
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata().get("out_sharding")
        # as `functions` has it: kinds of parameters, such as LoRA's, are parameters
        name = "params" if isinstance(variable, nnx.Param) else _collection(type(variable))
        flat.setdefault(name, {})[path] = axes_named(axes)
    return {name: nnx.traversals.unflatten_mapping(leaves) for name, leaves in flat.items()}


def _wants_key(call: calling.Call) -> bool:
    """Whether the argument `rngs` of a call is said to be a key, not `nnx.Rngs`."""
    said = str(call.parameters["rngs"].annotation)
    return "Array" in said or "Key" in said


def _collection(kind: type) -> str:
    from flax import nnx

    return nnx.variablelib.variable_name_from_type(kind, allow_register=True)


def _exactly(kind: type) -> Any:
    """A filter for variables of a kind, and none of the kinds made of it: all of them are made of
    `nnx.Variable`, also what is sown."""
    return lambda _, variable: type(variable) is kind


def _by_kind(state: Any) -> Variables:
    """What a call has sown, by the names of its kinds."""
    from flax import nnx

    flat: dict[str, dict[Any, Any]] = {}
    for path, variable in nnx.to_flat_state(state):
        flat.setdefault(_collection(type(variable)), {})[path] = variable.get_value()
    return {name: nnx.traversals.unflatten_mapping(leaves) for name, leaves in flat.items()}


def _without_sown(module: Any) -> Any:
    """The module without what an earlier call has sown."""
    from flax import nnx

    if not jax.tree.leaves(nnx.state(module, nnx.Intermediate)):
        return module
    module = nnx.clone(module)
    nnx.pop(module, nnx.Intermediate)
    return module


def _copied(leaf: Any) -> Any:
    return jax.numpy.copy(leaf) if hasattr(leaf, "dtype") else leaf


def _switch(module: Any, *, train: bool) -> None:
    """Sets a module and all within it to training or evaluation, whatever their switch is
    called."""
    from flax import nnx

    module.train() if train else module.eval()
    for _, layer in nnx.iter_modules(module):
        for name, value in list(vars(layer).items()):
            on = training_switch.value_in_training(name, argument=False)
            if on is not None and isinstance(value, bool):
                setattr(layer, name, on if train else not on)
            elif training_switch.is_text_switch(name, value):
                kind = type(layer).__name__
                raise UserError(
                    f"model={kind}: the attribute {name}={value!r} looks like a training switch,"
                    f" and only a bool is one; call it `training` and let {name} be computed:"
                    f" {name} = property(lambda self: 'train' if self.training else 'eval')"
                )
        if isinstance(layer, nnx.BatchNorm) and layer.dtype is None:
            # Its float32 averages would make its output float32, and all that comes after.
            # Linen's averages do not. Flax declares this attribute as a method.
            layer.promote_dtype = _as_they_are  # pyright: ignore[reportAttributeAccessIssue]


def _as_they_are(arrays: tuple[Any, ...], **_: Any) -> tuple[Any, ...]:
    """Promotes no dtypes."""
    return arrays


def _counts(module: Any) -> Iterator[Any]:
    """How often each stream has been drawn from, as the arrays that say so: after a draw there is
    another array."""
    from flax import nnx

    for _, variable in nnx.to_flat_state(nnx.state(module, nnx.RngCount)):
        yield variable.get_value()


def _pairs(module: Any, before: list[Any]) -> Iterator[tuple[Any, Any]]:
    yield from zip(before, _counts(module), strict=False)


def _seeded(streams: Any, key: jax.Array | None, *, needed: bool) -> PyTree:
    """The random state of an NNX module: each stream's key is that of the pass, folded with its
    path, which holds its name; each count is zero."""
    from flax import nnx

    def fresh(path: tuple[Any, ...], variable: Any) -> jax.Array:
        if not isinstance(variable, nnx.RngKey):
            return jax.numpy.zeros(variable.get_value().shape, "uint32")
        if key is None and needed:
            raise NeedsKey(
                f"{'.'.join(map(str, path))}: draws random numbers in training; give key="
            )
        root = jax.random.key(0) if key is None else key
        root = jax.random.fold_in(root, zlib.crc32("/".join(map(str, path)).encode()))
        shape = variable.get_value().shape
        return jax.random.split(root, shape) if shape else root

    return nnx.traversals.unflatten_mapping(
        {path: fresh(path, variable) for path, variable in nnx.to_flat_state(streams)}
    )
