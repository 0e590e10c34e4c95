"""One pure interface to Linen modules, NNX modules and bare pairs of functions.

`functions(model)` gives `init(key, inputs) -> variables` and `apply(variables, inputs, train=...,
rngs=...) -> (outputs, collections)`. Variables are `{"params": tree, other collections: trees}` of
plain arrays; `collections` are all of them but the parameters, changed by a training pass (running
averages, say) and given back as they were by any other.
"""

import dataclasses
import inspect
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from flax import linen as nn

from jaxtrain.errors import UserError
from jaxtrain.tree import Axes, PyTree

Variables = dict[str, PyTree]
Keys = Mapping[str, jax.Array]


class Init(Protocol):
    """Makes the variables of a model for inputs of this shape and dtype."""

    def __call__(self, key: jax.Array, inputs: jax.Array) -> Variables: ...


class Apply(Protocol):
    """Runs a model; `rngs` holds a key by stream name, such as `dropout`."""

    def __call__(
        self, variables: Variables, inputs: jax.Array, *, train: bool, rngs: Keys | None = None
    ) -> tuple[Any, Variables]: ...


@dataclasses.dataclass(frozen=True)
class Functions:
    """A model as two pure functions, and the object they came from."""

    init: Init
    apply: Apply
    model: Any


def functions(model: Any) -> Functions:
    """The two pure functions of a model of any kind.

    >>> import jax.numpy as jnp
    >>> net = functions(
    ...     (lambda key, x: {"scale": jnp.ones(())}, lambda params, x: params["scale"] * x)
    ... )
    >>> variables = net.init(jax.random.key(0), jnp.ones(2))
    >>> net.apply(variables, jnp.ones(2), train=True)
    (Array([1., 1.], dtype=float32), {})

    `model` is a Linen module; an NNX module, or a function `rngs -> NNX module` (then `init` uses
    its key; a module that is already made keeps its own numbers); or a pair `(init, apply)` with
    `init(key, inputs) -> params` and `apply(params, inputs)`, whose `apply` may also take `train`
    and `rngs` by name. `UserError` for anything else.
    """
    if isinstance(model, Functions):
        return model
    if isinstance(model, nn.Module):
        return _linen(model)
    if _is_pair(model):
        return _pair(model)
    _check_instance(model)
    if callable(model):
        return _nnx(model)
    kinds = (
        "a Linen module, an NNX module, a function of rngs that makes one, or a pair (init, apply)"
    )
    raise UserError(f"model={type(model).__name__}: not a model; expected {kinds}")


def logical_axes(model: Any, inputs: Any) -> Variables:
    """The logical axes of every variable: a tuple of names (`tree.Axes`), or None where the model
    says nothing.

    >>> kernel_init = nn.with_logical_partitioning(nn.initializers.ones, ("mlp_in", "mlp"))
    >>> logical_axes(nn.Dense(3, kernel_init=kernel_init), jax.ShapeDtypeStruct((1, 2), "float32"))
    {'params': {'bias': None, 'kernel': ('mlp_in', 'mlp')}}

    `inputs` may be abstract: nothing is computed.
    """
    model = model.model if isinstance(model, Functions) else model
    _check_instance(model)
    if isinstance(model, nn.Module):
        options: dict[str, Any] = {"train": False} if _takes(model.__call__, "train") else {}
        boxes = jax.eval_shape(
            lambda key, x: model.init(key, x, **options), _abstract_key(), inputs
        )
        return jax.tree.map(
            lambda box: _axes(getattr(box, "names", None)), dict(boxes), is_leaf=_is_box
        )
    if _is_pair(model):
        return jax.tree.map(
            lambda _: None, jax.eval_shape(_pair(model).init, _abstract_key(), inputs)
        )
    return _nnx_axes(model)


def _linen(model: nn.Module) -> Functions:
    takes_train = _takes(model.__call__, "train")

    def init(key: jax.Array, inputs: jax.Array) -> Variables:
        options: dict[str, Any] = {"train": False} if takes_train else {}
        return nn.meta.unbox(dict(model.init(key, inputs, **options)))

    def apply(
        variables: Variables, inputs: jax.Array, *, train: bool, rngs: Keys | None = None
    ) -> tuple[Any, Variables]:
        collections = {name: tree for name, tree in variables.items() if name != "params"}
        options: dict[str, Any] = {"train": train} if takes_train else {}
        keys = None if rngs is None else dict(rngs)
        if not (train and collections):
            return model.apply(variables, inputs, rngs=keys, **options), collections
        outputs, changed = model.apply(
            variables, inputs, rngs=keys, mutable=list(collections), **options
        )
        return outputs, collections | dict(changed)

    return Functions(init, apply, model)


def _pair(model: tuple[Any, Any]) -> Functions:
    init_params, apply_params = model
    known = [name for name in ("train", "rngs") if _takes(apply_params, name)]

    def init(key: jax.Array, inputs: jax.Array) -> Variables:
        return {"params": init_params(key, inputs)}

    def apply(
        variables: Variables, inputs: jax.Array, *, train: bool, rngs: Keys | None = None
    ) -> tuple[Any, Variables]:
        offered = {"train": train, "rngs": rngs}
        return (
            apply_params(variables["params"], inputs, **{name: offered[name] for name in known}),
            {},
        )

    return Functions(init, apply, model)


def _nnx(model: Any) -> Functions:
    """NNX through pure dicts: the graph is static, random streams are made anew from `rngs` at each
    call and are no variables."""
    from flax import nnx  # heavy beside Linen, and only its users need it

    made = isinstance(model, nnx.Module)
    example = model if made else nnx.eval_shape(lambda: model(rngs=nnx.Rngs(0)))
    if not isinstance(example, nnx.Module):
        raise UserError(
            f"model={model!r}: called with rngs it gave {type(example).__name__}; expected an NNX"
            " module"
        )
    graph, _, streams, rest = nnx.split(example, nnx.Param, nnx.RngState, ...)
    kinds = sorted(
        {type(variable) for _, variable in nnx.to_flat_state(rest)}, key=lambda kind: kind.__name__
    )
    names = [
        "params",
        *(nnx.variablelib.variable_name_from_type(kind, allow_register=True) for kind in kinds),
    ]
    takes_train = _takes(type(example).__call__, "train")

    def pure(module: Any) -> Variables:
        _, _, *states, _ = nnx.split(module, nnx.RngState, nnx.Param, *kinds, ...)
        return {name: nnx.to_pure_dict(state) for name, state in zip(names, states, strict=True)}

    def init(key: jax.Array, inputs: jax.Array) -> Variables:
        # Copies, so that a step which donates its state leaves the caller's module alive.
        return jax.tree.map(jax.numpy.copy, pure(model if made else model(rngs=nnx.Rngs(key))))

    def apply(
        variables: Variables, inputs: jax.Array, *, train: bool, rngs: Keys | None = None
    ) -> tuple[Any, Variables]:
        seeded = _seeded(streams, rngs or {}, needed=train)
        module = nnx.merge(graph, *(variables[name] for name in names), seeded)
        module.train() if train else module.eval()
        for _, layer in nnx.iter_modules(module):
            if isinstance(layer, nnx.BatchNorm) and layer.dtype is None:
                # Its float32 averages would make its output float32, and all that comes after.
                # Linen's averages do not. Flax declares this attribute as a method.
                layer.promote_dtype = _as_they_are  # pyright: ignore[reportAttributeAccessIssue]
        outputs = module(inputs, **({"train": train} if takes_train else {}))
        source = pure(module) if train else variables
        return outputs, {name: source[name] for name in names[1:]}

    return Functions(init, apply, model)


def _as_they_are(arrays: tuple[Any, ...], **_: Any) -> tuple[Any, ...]:
    """Promotes no dtypes."""
    return arrays


def _seeded(streams: Any, rngs: Keys, *, needed: bool) -> PyTree:
    """The random state of an NNX module: each stream's key is that of its name, folded with its
    path; each count is zero.

    A stream without a key of its own name takes `dropout`'s: NNX layers copy the stream `default`
    when there is no other.
    """
    from flax import nnx

    def fresh(path: tuple[Any, ...], variable: Any) -> jax.Array:
        if not isinstance(variable, nnx.RngKey):
            return jax.numpy.zeros(variable.get_value().shape, "uint32")
        key = rngs.get(variable.tag, rngs.get("dropout"))
        if key is None and needed:
            raise UserError(
                f"{'.'.join(map(str, path))}: draws random numbers in training; give"
                f" rngs={{{variable.tag!r}: key}}"
            )
        key = jax.random.key(0) if key is None else key
        key = jax.random.fold_in(key, zlib.crc32("/".join(map(str, path)).encode()))
        shape = variable.get_value().shape
        return jax.random.split(key, shape) if shape else key

    return nnx.traversals.unflatten_mapping(
        {path: fresh(path, variable) for path, variable in nnx.to_flat_state(streams)}
    )


def _nnx_axes(model: Any) -> Variables:
    """Axes of an NNX module from what `nnx.with_partitioning` left on its variables."""
    from flax import nnx

    example = (
        model if isinstance(model, nnx.Module) else nnx.eval_shape(lambda: model(rngs=nnx.Rngs(0)))
    )
    _, state, _ = nnx.split(example, nnx.Not(nnx.RngState), ...)
    flat: dict[str, dict[Any, Any]] = {}
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata().get("out_sharding")
        # as `_nnx` has it: kinds of parameters, such as LoRA's, are parameters
        name = (
            "params"
            if isinstance(variable, nnx.Param)
            else nnx.variablelib.variable_name_from_type(type(variable), allow_register=True)
        )
        flat.setdefault(name, {})[path] = _axes(axes)
    return {name: nnx.traversals.unflatten_mapping(leaves) for name, leaves in flat.items()}


def _check_instance(model: Any) -> None:
    if isinstance(model, type) and issubclass(model, nn.Module):
        name = model.__name__
        raise UserError(f"model={name}: a class; give a module, such as {name}()")


def _is_pair(model: Any) -> bool:
    return isinstance(model, tuple) and len(model) == 2 and all(callable(part) for part in model)


def _axes(names: Any) -> Axes | None:
    """The names that a model gave, also as a `PartitionSpec`; what is no name counts as none."""
    if names is None:
        return None
    return Axes(name if isinstance(name, str | tuple) and name else None for name in names)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _takes(function: Any, name: str) -> bool:
    """Whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters


def _abstract_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))
