"""Low-rank adapters on dense layers (LoRA, Hu et al. 2021, arXiv 2106.09685): the kernels stay, and
beside each of them two thin matrices are trained.

A layer of kernel W gives x W + scale * (x A) B. `lora_a` and `lora_b` lie beside `kernel` in the
tree of parameters; B is born zero, so that the first output is the base model's. A and B are
multiplied with what goes through, never with one another, so no array of W's size is made for
them, and W, which is frozen, has no gradient. An adapted model is of a class made here, a subclass
of its own: it has the same fields and the same name, and whoever knows the model knows it.

Dims: R rank.
"""

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from jaxtrain.errors import UserError
from jaxtrain.fields import Above, AtLeast, Between
from jaxtrain.models import layers

A, B = "lora_a", "lora_b"
_NAME = r"lora_[ab]$"
ADAPTERS = rf"(^|/){_NAME}"
"""What the paths of adapters look like, for rules."""
UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's initialisation of a linear layer (Kaiming, a = sqrt(5)), which PEFT gives to A."""


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which dense layers of a model get adapters, and of what kind; all other parameters are
    frozen.

    >>> import jax
    >>> from jaxtrain.models import MLP
    >>> model = LoRA(rank=2, pattern=("hidden",)).on(MLP(3, widths=(4,)))
    >>> params = nn.meta.unbox(model.init(jax.random.key(0), jnp.ones((1, 5))))["params"]
    >>> jax.tree.map(jnp.shape, params["hidden0"])
    {'bias': (4,), 'kernel': (5, 4), 'lora_a': (5, 2), 'lora_b': (2, 4)}
    """

    rank: Annotated[int, AtLeast(0)] = 8
    """inner width of the adapters; 0 for none, so that the whole model is trained"""
    alpha: Annotated[float, Above(0)] = 16.0
    """adapters are multiplied by alpha / rank"""
    rank_stabilized: bool = False
    """by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)"""
    pattern: tuple[str, ...] = ("attention/", "mlp_")
    """which dense layers, by patterns found in their paths, e.g. attention/(query|value)"""
    dropout: Annotated[float, Between(0, 1, open_above=True)] = 0.0
    """share of an adapter's inputs dropped in training"""
    also: tuple[str, ...] = ()
    """patterns of parameters that are trained beside the adapters, e.g. head or norm"""

    @property
    def scale(self) -> float:
        """What the product of an adapter is multiplied by.

        >>> LoRA(16, 32.0).scale, LoRA(16, 32.0, rank_stabilized=True).scale
        (2.0, 8.0)
        """
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The rule of the optimizer that leaves the adapters to be trained, and `also`; none at
        rank 0.

        >>> [bool(re.search(LoRA().frozen[0], path)) for path in ("q/kernel", "q/lora_a")]
        [True, False]
        """
        if not self.rank:
            return ()
        trained = "".join(f"(?!.*(?:{pattern}))" for pattern in self.also)
        return (rf"^(?!.*{_NAME}){trained}",)

    def on(self, model: Any) -> Any:
        """The model with adapters; itself at rank 0. `UserError` if it is no Linen module, or a
        pattern is no regular expression."""
        if not self.rank:
            return model
        if not isinstance(model, nn.Module):
            name = getattr(model, "__name__", None) or type(model).__name__
            raise UserError(
                f"--lora: model={name} is no Linen module, whose dense layers could be found; give"
                " one, or train all of it: --lora.rank=0"
            )
        for pattern in (*self.pattern, *self.also):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"--lora.pattern={pattern}: is not a regular expression ({error})"
                ) from error
        own = {
            field.name: getattr(model, field.name)
            for field in dataclasses.fields(model)
            if field.init and field.name not in ("parent", "name")
        }
        return _adapted(type(model))(**own, name=model.name, _lora=self)


def merged(params: Any, scale: float) -> Any:
    """The parameters of the plain model: each adapter multiplied out and added to its kernel.

    >>> layer = {"kernel": jnp.ones((1, 2)), "lora_a": jnp.ones((1, 1)), "lora_b": jnp.ones((1, 2))}
    >>> merged({"query": layer}, 0.5)["query"]["kernel"].tolist()
    [[1.5, 1.5]]

    Sums are in float32 at least, and rounded once to the dtype of the kernel. `params` may also be
    flat, by slash path.
    """
    if not isinstance(params, Mapping):
        return params
    plain = {
        name: merged(part, scale)
        for name, part in params.items()
        if name.rpartition("/")[2] not in (A, B)
    }
    for name in params:
        if name.rpartition("/")[2] == A:
            before = name.removesuffix(A)
            kernel = f"{before}kernel"
            plain[kernel] = _sum(params[kernel], params[name], params[f"{before}{B}"], scale)
    return plain


def split(params: Any) -> tuple[Any, Any]:
    """The base's parameters, and the adapters, both without empty parts.

    >>> split({"query": {"kernel": 0, "lora_a": 1, "lora_b": 2}, "norm": {"scale": 3}})
    ({'query': {'kernel': 0}, 'norm': {'scale': 3}}, {'query': {'lora_a': 1, 'lora_b': 2}})
    """

    def part(tree: Any, adapters: bool) -> Any:
        found = {
            name: part(value, adapters) if isinstance(value, Mapping) else value
            for name, value in tree.items()
            if isinstance(value, Mapping) or (name in (A, B)) == adapters
        }
        return {name: value for name, value in found.items() if not _is_empty(value)}

    return part(params, False), part(params, True)


def _is_empty(value: Any) -> bool:
    return isinstance(value, Mapping) and not value


def _sum(kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """A kernel with its adapter multiplied out; layers stacked by `nn.scan` one by one."""
    if kernel.shape != (*a.shape[:-1], *b.shape[1:]):
        assert kernel.shape[0] == a.shape[0] == b.shape[0], (kernel.shape, a.shape, b.shape)
        return jax.vmap(functools.partial(_sum, scale=scale))(kernel, a, b)
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    product = jnp.tensordot(
        jnp.asarray(a, wide), jnp.asarray(b, wide), axes=1, precision=jax.lax.Precision.HIGHEST
    )
    return (jnp.asarray(kernel, wide) + scale * product).astype(kernel.dtype)


@functools.cache
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of models of this kind with adapters."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        adapting = _Adapting(self._lora)
        with nn.intercept_methods(adapting):
            outputs = kind.__call__(self, *arguments, **options)
        if self.is_initializing():
            adapting.check(type(self).__name__)
        return outputs

    # what the outside sees: adapters look for inputs and switches in the signature
    named: Any = call
    named.__signature__ = inspect.signature(kind.__call__)
    named.__doc__, named.__module__ = kind.__call__.__doc__, kind.__call__.__module__
    members = {
        "__annotations__": {"_lora": Any},
        "_lora": None,
        "__call__": call,
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    return type(kind.__name__, (kind,), members)


class _Adapting:
    """Adds adapters to the dense layers that a model runs: those that have them, or, while
    parameters are made, those that a pattern names."""

    def __init__(self, lora: LoRA) -> None:
        self._lora = lora
        self._running: list[nn.Module] = []  # a layer of ours calls that of Flax, which it is
        self._dense: list[str] = []
        self._idle = set(lora.pattern)

    def __call__(
        self,
        next_function: Callable[..., Any],
        arguments: Sequence[Any],
        options: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if context.method_name != "__call__" or any(module is one for one in self._running):
            return next_function(*arguments, **options)
        if not isinstance(module, nn.Dense | nn.DenseGeneral):
            if module.scope is not None and module.has_variable("params", A):
                raise UserError(
                    f"--lora.pattern: {'/'.join(module.path)} has an adapter, and is computed here"
                    " by other means than as a dense layer (a head in chunks?); set --model.chunk=0"
                )
            return next_function(*arguments, **options)
        self._running.append(module)
        try:
            y = next_function(*arguments, **options)
        finally:
            self._running.pop()
        return self._added(module, y, *arguments, **options)

    def check(self, model: str) -> None:
        """`UserError` for a pattern that named no dense layer."""
        if self._idle:
            known = ", ".join(self._dense[:8]) + (", ..." if len(self._dense) > 8 else "")
            raise UserError(
                f"--lora.pattern={min(self._idle)}: found in no dense layer of {model} (they are:"
                f" {known or 'none'}); remove it or mend it"
            )

    def _added(self, module: Any, y: Any, inputs: jax.Array) -> Any:
        if module.is_initializing() and self._is_named(module):
            self._make(module, inputs)
        elif not module.has_variable("params", A):
            return y
        a, b = (nn.meta.unbox(module.get_variable("params", name)) for name in (A, B))
        x, a, b = promote_dtype(inputs, a, b, dtype=module.dtype)
        if self._lora.dropout and module.has_rng("dropout"):  # there is one in training only
            x = layers.dropped(x, self._lora.dropout, module.make_rng("dropout"))
        h = self._lora.scale * _through(x, a, _axes(module, inputs.ndim), module.precision)
        return y + _through(h, b, (h.ndim - 1,), module.precision).astype(y.dtype)

    def _is_named(self, module: nn.Module) -> bool:
        path = "/".join(module.path)
        self._dense += [] if path in self._dense else [path]
        found = {pattern for pattern in self._lora.pattern if re.search(pattern, path)}
        self._idle -= found
        return bool(found)

    def _make(self, module: Any, inputs: jax.Array) -> None:
        """The two parameters, with the axes that the kernel has."""
        if getattr(module, "batch_dims", ()):
            raise UserError(
                f"--lora.pattern: {'/'.join(module.path)} has a kernel for each member of a batch"
                " (batch_dims), to which no adapter is added; leave it out"
            )
        kernel = module.get_variable("params", "kernel")
        count, rank = len(_axes(module, inputs.ndim)), self._lora.rank
        shape = nn.meta.unbox(kernel).shape
        entering, leaving = shape[:count], shape[count:]

        def boxed(value: jax.Array, axes: Callable[[Any], Any]) -> Any:
            names = getattr(kernel, "names", None)
            return value if names is None else kernel.replace(value=value, names=axes(names))

        def make_a(key: jax.Array) -> Any:
            a = UNIFORM(key, (math.prod(entering), rank), module.param_dtype)
            return boxed(a.reshape(*entering, rank), lambda names: (*names[:count], None))

        def make_b(key: jax.Array) -> Any:
            del key
            b = jnp.zeros((rank, *leaving), module.param_dtype)
            return boxed(b, lambda names: (None, *names[count:]))

        module.param(A, make_a)
        module.param(B, make_b)


def _axes(module: Any, ndim: int) -> tuple[int, ...]:
    """The dims of the input that a dense layer sums over."""
    axis = getattr(module, "axis", -1)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    return tuple(axis % ndim for axis in axes)


def _through(x: jax.Array, kernel: jax.Array, axes: tuple[int, ...], precision: Any) -> jax.Array:
    """The product over these dims of `x` and the first ones of `kernel`."""
    if axes == (x.ndim - 1,):
        return layers.dot_general_by_rows(x, kernel, precision=precision)
    dims = ((axes, tuple(range(len(axes)))), ((), ()))
    return jax.lax.dot_general(x, kernel, dims, precision=precision)


NAMES: dict[str, LoRA] = {"lora": LoRA()}
