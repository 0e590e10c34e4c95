"""Any Optax transformation as the optimizer of a run: `optimizer=optax.adamw(1e-3)`.

Its updates are taken as they are. The rate, its schedule and all other numbers lie inside it, so
they are constants of the compiled program and no flags; what `optax.inject_hyperparams` holds is
part of the state, and its `learning_rate` is logged.
"""

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.extend.core
import jax.numpy as jnp
import optax

from jaxtrain import tree
from jaxtrain.errors import UserError
from jaxtrain.optimizers.base import Number, Optimizer, Transformation, descend
from jaxtrain.tree import PyTree

Given = Optimizer | optax.GradientTransformation | optax.MultiSteps
"""What may be given as an optimizer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromOptax(Optimizer):
    """An Optax transformation, whose numbers only Python can set."""

    transformation: optax.GradientTransformation
    """What turns gradients into updates, its own learning rate included."""

    # The peak rate is the transformation's own: no field, and so neither a flag nor a number in the
    # state. A schedule that is not constant would multiply nothing, and is refused.
    learning_rate: ClassVar[float] = 1.0  # pyright: ignore[reportIncompatibleVariableOverride]

    lower_rate: ClassVar[str] = "lower the rate of the Optax optimizer"

    in_python: ClassVar[str] = "transformation"
    """The field that makes it what it is, and that no flag can set."""

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        factors = self.rate_factors(params)
        own = _given_what_it_takes(self.transformation)
        return own if factors is None else optax.chain(own, descend(-1.0, factors))

    def logged_rate(self, rate: Number, opt_state: PyTree) -> Number | None:
        """That of `optax.inject_hyperparams`, if the state holds exactly one."""
        found = [
            leaf
            for path, leaf in tree.flatten(opt_state).items()
            if f"/{path}".endswith("/hyperparams/learning_rate")
        ]
        return found[0] if len(found) == 1 and not found[0].shape else None

    def holds_parameters(self, params: PyTree) -> bool:
        """Whether a part of its first state is made of the parameters' values, or a part of a later
        one is the parameters themselves."""
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        transform = self.transform(shapes, 1.0)
        state = jax.eval_shape(transform.init, shapes)
        init = jax.make_jaxpr(transform.init)(shapes).jaxpr
        values = set(init.invars)
        for equation in init.eqns:
            if values & _variables(equation.invars):
                values |= set(equation.outvars)
        update = jax.make_jaxpr(lambda params, state: self._update(params, params, state)[1])(
            shapes, state
        ).jaxpr
        given = set(update.invars[: len(jax.tree.leaves(shapes))])
        return bool(values & _variables(init.outvars) or given & _variables(update.outvars))

    def check(self, params: PyTree) -> None:
        """`UserError` if it cannot update parameters of these shapes from a gradient, the loss and
        the parameters."""
        try:
            state = jax.eval_shape(self.transform(params, 1.0).init, params)
            updates, new = jax.eval_shape(self._update, params, params, state)
        except UserError:
            raise
        except Exception as error:  # whatever the transformation's own code raises
            raise UserError(_cannot(error)) from error
        if _specs((updates, new)) != _specs((params, state)):
            raise UserError(
                "optimizer: this Optax transformation changes the structure or shapes of updates or"
                " state; both must stay as they are"
            )

    def _update(self, gradients: PyTree, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        transform = self.transform(params, 1.0)
        return transform.update(gradients, state, params, value=jnp.float32(0), grad=gradients)


def of(given: Any) -> Optimizer:
    """What was given as an optimizer, as one of ours.

    >>> import jax.numpy as jnp
    >>> chain = of(optax.sgd(0.5)).transform({"w": jnp.ones(2)}, 1.0)
    >>> chain.update({"w": jnp.ones(2)}, chain.init({"w": jnp.ones(2)}))[0]["w"].tolist()
    [-0.5, -0.5]

    `UserError` for anything that is neither an optimizer of ours nor Optax's.
    """
    if isinstance(given, Optimizer):
        return given
    if isinstance(given, optax.GradientTransformation):
        return FromOptax(transformation=given)
    if isinstance(given, optax.MultiSteps):
        return FromOptax(transformation=given.gradient_transformation())
    if callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        raise UserError(f"optimizer={name}: a function or class; call it, such as {name}(1e-3)")
    raise UserError(
        f"optimizer={type(given).__name__}: not an optimizer of jaxtrain.optimizers, and no Optax"
        " transformation; give one, such as AdamW(1e-3)"
    )


def _variables(of_program: Iterable[Any]) -> set[Any]:
    """The variables among the inputs or outputs of a part of a program; the rest are literals."""
    return {each for each in of_program if not isinstance(each, jax.extend.core.Literal)}


def _specs(values: PyTree) -> tuple[Any, Any]:
    return jax.tree.structure(values), [leaf.shape for leaf in jax.tree.leaves(values)]


def _given_what_it_takes(
    own: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same transformation for any extra arguments; those that it does not name are dropped."""
    taken = inspect.signature(own.update).parameters.values()
    everything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken)
    names = [each.name for each in taken]

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        known = {name: each for name, each in extra.items() if everything or name in names}
        return own.update(updates, state, params, **known)

    return optax.GradientTransformationExtraArgs(own.init, update)


def _cannot(error: Exception) -> str:
    said = " ".join(str(error).split())[:160] or type(error).__name__
    for name in ("value_fn", "grad_fn", "obj_fn"):
        if name in said:
            return (
                f"optimizer: this Optax transformation needs {name}, a function that it can call"
                " again, which a step over batches does not have; take one that needs gradients,"
                " parameters and the loss only (of lbfgs: linesearch=None)"
            )
    if "has no attribute 'fast'" in said:
        return (
            "optimizer: optax.lookahead needs parameters of its own kind (LookaheadParams), which"
            " a model does not have; take its fast optimizer alone, with ema_decay for an average"
        )
    return (
        f"optimizer: this Optax transformation cannot update the parameters ({said}); it is given"
        " gradients, parameters and the loss as value"
    )
