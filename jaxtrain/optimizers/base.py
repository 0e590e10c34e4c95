"""What all optimizers share: weight decay, rates and freezing by path pattern, and a state that
keeps its types.

An optimizer is a frozen dataclass. `direction` says which way it goes (an Optax transformation);
this file puts the rest around it:

    gradients -> [coupled decay] -> direction -> [decoupled decay] -> times -rate of this step and
    parameter

The rate of the step, and every number that is `Traced`, may be a tracer: the chain is built inside
the compiled step, and no state depends in its structure, shapes or dtypes on a value.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxtrain import tree
from jaxtrain.errors import UserError
from jaxtrain.fields import NonNegative, Positive
from jaxtrain.optimizers import parameters, trained
from jaxtrain.tree import PyTree, Rules

Number = float | jax.Array
Transformation = optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The base of all optimizers; a subclass gives its `direction`, or its whole `chain` if the
    rate is part of its equations."""

    learning_rate: Positive = 1e-3
    """The peak learning rate, which the schedule multiplies."""

    rates: Rules[float] = ()
    """Factors of the learning rate by path pattern, first match wins, e.g. head=10,.*=1."""

    frozen: tuple[str, ...] = ()
    """Path patterns of parameters that never change and take no optimizer memory."""

    keeps_parameters: ClassVar[bool] = False
    """Whether the state holds copies of parameters, which must not be rounded as averages may
    be."""

    lower_rate: ClassVar[str] = "lower --optimizer.learning_rate"
    """What to do about a run that diverges, for messages."""

    takes_complex: ClassVar[bool] = True
    """Whether its equations hold for complex parameters; if not, they are refused."""

    def transform(
        self, params: PyTree, learning_rate: Number, axes: PyTree = None
    ) -> optax.GradientTransformationExtraArgs:
        """The Optax transformation of one step, at this step's learning rate (a scalar, also a
        tracer).

        >>> import jax.numpy as jnp
        >>> from jaxtrain.optimizers import SGD
        >>> params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
        >>> chain = SGD(frozen=("bias",)).transform(params, 0.5)
        >>> updates, _ = chain.update(params, chain.init(params), params)
        >>> updates["kernel"].tolist(), updates["bias"].tolist()
        ([-0.5, -0.5], [0.0, 0.0])

        Of `params` only paths, shapes and dtypes are read, so it may be abstract. `axes` are their
        logical axes (`adapters.logical_axes`), which help to tell what each is (see
        `parameters.py`); give the same ones at every step. State and updates keep the dtypes of the
        parameters; the arithmetic is in float32 at least. What is not trained (see `trained.py`)
        needs no gradient: None there gives None. `UserError` if a pattern decides nothing.
        """
        trains = self.trained(params)
        self._check_complex(params, trains)
        chain = _typed(self.chain(parameters.describe(params, axes), learning_rate))
        return chain if all(jax.tree.leaves(trains)) else _of_trained(chain, trains)

    def trained(self, params: PyTree) -> PyTree:
        """True for each parameter that is trained, False for each that is frozen by a rule or holds
        no floats; `params` may be abstract."""
        return trained.mask(params, self.frozen)

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        """The transformation of the parameters that are not frozen; `params` is a tree of
        `parameters.Parameter`, here and in all that follows."""
        return optax.chain(
            self.direction(params), descend(learning_rate, self.rate_factors(params))
        )

    def direction(self, params: PyTree) -> Transformation:
        """What the gradients are turned into before the rate is applied: the way up."""
        raise NotImplementedError

    def rate_factors(self, params: PyTree) -> PyTree | None:
        """A factor for every parameter, or None without rules, where nothing need be multiplied."""
        return _factors(self.rates, params, "--optimizer.rates") if self.rates else None

    def logged_rate(self, rate: Number, opt_state: PyTree) -> Number | None:
        """The learning rate of the step that led to `opt_state`, or None where nobody knows it."""
        del opt_state
        return rate

    def holds_parameters(self, params: PyTree) -> bool:
        """Whether the state for these parameters (abstract ones, too) holds copies of them."""
        del params
        return self.keeps_parameters

    def check(self, params: PyTree) -> None:
        """`UserError` if it cannot update these parameters, which may be abstract."""
        del params

    def decay_factors(self, params: PyTree) -> PyTree:
        """A factor of the weight decay for every parameter."""
        return jax.tree.map(lambda _: 0.0, params)

    def _check_complex(self, params: PyTree, trains: PyTree) -> None:
        if self.takes_complex:
            return
        for path, leaf in tree.flatten(trained.only(trains, params)).items():
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                raise UserError(
                    f"optimizer={type(self).__name__}: {path} is {leaf.dtype}, and its equations"
                    " are for real numbers only; use SGD, Adam or AdamW, or freeze it"
                    f" (--optimizer.frozen={path})"
                )


@dataclasses.dataclass(frozen=True)
class Decaying(Optimizer):
    """An optimizer with weight decay. `coupled` decay joins the gradient (the L2 penalty);
    otherwise it joins the update, times the rate."""

    weight_decay: NonNegative = 0.0
    """Strength of the weight decay."""

    decay: Rules[float] = ()
    """Factors of the weight decay by path pattern, first match wins; empty: 1 for kernels, 0 for
    biases, norms, embeddings, positions and class tokens."""

    coupled: ClassVar[bool] = False

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        stages = [self.direction(params), self.decayed(params)]
        # Decay that is off leaves its (empty) slot, so the paths of the state, and old checkpoints,
        # stay.
        return optax.chain(
            *(reversed(stages) if self.coupled else stages),
            descend(learning_rate, self.rate_factors(params)),
        )

    def decayed(self, params: PyTree, strength: Number | None = None) -> Transformation:
        """Adds the decayed weights to what comes in; the identity where decay is off."""
        # also when off, so that a bad pattern is always an error
        factors = self.decay_factors(params)
        if is_off(self.weight_decay):
            return optax.identity()
        strength = self.weight_decay if strength is None else strength
        return optax.stateless(
            lambda updates, params: add_decay(updates, params, strength, factors)
        )

    def decay_factors(self, params: PyTree) -> PyTree:
        if self.decay:
            return _factors(self.decay, params, "--optimizer.decay")
        return jax.tree.map(lambda parameter: float(parameter.decays), params)


def match_table(optimizer: Optimizer, params: PyTree, axes: PyTree = None) -> list[tuple[str, ...]]:
    """Rows (path, shape, rate factor, decay factor) that show what the rules decide for every
    parameter; see `Optimizer.transform` for `params` and `axes`.

    >>> import jax.numpy as jnp
    >>> from jaxtrain.optimizers import AdamW
    >>> match_table(AdamW(frozen=("bias",)), {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))})
    [('bias', '(3,)', 'frozen', '-'), ('kernel', '(2, 3)', '1', '1')]
    """
    trains = optimizer.trained(params)
    params = parameters.describe(params, axes)
    rates = optimizer.rate_factors(params) or jax.tree.map(lambda _: 1.0, params)
    show = {
        "rate": jax.tree.map(lambda keep, rate: f"{rate:g}" if keep else "frozen", trains, rates),
        "decay": jax.tree.map(
            lambda keep, decay: f"{decay:g}" if keep else "-",
            trains,
            optimizer.decay_factors(params),
        ),
    }
    return tree.rows_by_path(show, params)


def is_off(value: Number) -> bool:
    """Whether a number is switched off: a plain 0, which a tracer never is (see
    `fields.Traced`)."""
    return isinstance(value, int | float) and value == 0


def descend(learning_rate: Number, factors: PyTree | None) -> Transformation:
    """Turns a direction into an update: times minus the rate, and times the factor of each
    parameter."""
    if factors is None:
        return optax.scale_by_learning_rate(learning_rate)
    return optax.stateless(
        lambda updates, _: map_present(
            lambda factor, update: -learning_rate * factor * update, factors, updates
        )
    )


def add_decay(updates: PyTree, params: PyTree, strength: Number, factors: PyTree) -> PyTree:
    """updates + strength * factor * params, leaving alone what does not decay."""

    def add(factor: float, update: jax.Array, param: jax.Array) -> jax.Array:
        if factor == 0:
            return update
        return update + (strength if factor == 1 else strength * factor) * param

    return map_present(add, factors, updates, params)


def map_present(function: Callable[..., Any], factors: PyTree, *trees: PyTree) -> PyTree:
    """Maps over the factors of all parameters and trees from which Optax has masked some."""

    def apply(factor: Any, *leaves: Any) -> Any:
        return leaves[0] if isinstance(leaves[0], optax.MaskedNode) else function(factor, *leaves)

    return jax.tree.map(apply, factors, *trees)


def _factors(rules: Rules[float], params: PyTree, name: str) -> PyTree:
    for pattern, factor in rules:
        if not factor >= 0:
            raise UserError(f"{name}: {pattern}={factor}: must be >= 0")
    return tree.match(rules, params, name=name)


def _of_trained(
    chain: optax.GradientTransformationExtraArgs, trains: PyTree
) -> optax.GradientTransformationExtraArgs:
    """The same transformation, which sees the trained parameters only and keeps no state of the
    others; their updates are zeros, or None where no gradient is given."""
    labels = jax.tree.map(lambda keep: "trained" if keep else "frozen", trains)
    inner = optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels)

    def seen(values: PyTree) -> PyTree:
        return trained.only(trains, values, optax.MaskedNode())

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        own = None if params is None else seen(params)
        extra |= {name: seen(extra[name]) for name in ("grad",) if name in extra}
        new, state = inner.update(seen(updates), state, own, **extra)
        rest = jax.tree.map(
            lambda keep, old: old if keep or old is None else jnp.zeros_like(old), trains, updates
        )
        return trained.merged(trains, new, rest), state

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(seen(params)), update)


def _typed(inner: Transformation) -> optax.GradientTransformationExtraArgs:
    """The same transformation, computing in float32 at least and keeping every type of its state
    and parameters.

    Without it a float32 rate would turn bfloat16 moments into float32, and a weak type (Python's
    numbers have one) would become strong after a step: either compiles a second program and refuses
    donation. Where all is float32 already, this adds no operation.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(_own, inner.init(params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        new_updates, new_state = inner.update(
            _widen(updates), _widen(state), _widen(params), **extra
        )
        like = updates if params is None else params
        return jax.tree.map(_as, new_updates, like), jax.tree.map(_as, new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _own(leaf: Any) -> jax.Array:
    leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)  # Optax's may be Python numbers
    # Several optimizers keep the first parameters themselves, or one array twice: neither could be
    # donated along with the parameters.
    return leaf.copy() if tree.is_key(leaf) else jnp.array(leaf, leaf.dtype, copy=True)


def _widen(values: PyTree) -> PyTree:
    def widen(leaf: jax.Array) -> jax.Array:
        narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
        return leaf.astype(jnp.float32) if narrow else leaf

    return jax.tree.map(widen, values)


def _as(new: jax.Array, old: jax.Array) -> jax.Array:
    return new if tree.is_key(old) else jnp.asarray(new, old.dtype)
