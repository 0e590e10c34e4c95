"""More of Optax's optimizers: signs, rules of thumb and research; see `adaptive.py` for the
adaptive ones and what is left out."""

import dataclasses
from collections.abc import Hashable
from typing import Annotated, ClassVar

import jax
import optax
from optax import contrib

from jaxtrain.errors import UserError
from jaxtrain.fields import Above, Count, Decay, NonNegative, Positive, Traced
from jaxtrain.optimizers.adaptive import Betas, Momentum, velocity
from jaxtrain.optimizers.base import Decaying, Number, Optimizer, Transformation, descend, is_off
from jaxtrain.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Cocob(Decaying):
    """Learns by betting on coins, without a rate (Orabona and Tommasi), with L2 decay; the schedule
    weights the gradients."""

    takes_complex: ClassVar[bool] = False
    keeps_parameters: ClassVar[bool] = True
    learning_rate: Positive = 1.0
    alpha: Positive = 100.0
    """How cautious the first bets are."""

    eps: Positive = 1e-8
    """What the largest gradient begins with."""

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        refuse_rates(self)
        return optax.chain(
            self.decayed(params),
            optax.scale(learning_rate),
            contrib.scale_by_cocob(self.alpha, self.eps),
        )


@dataclasses.dataclass(frozen=True)
class Madgrad(Decaying):
    """Momentumised dual averaging (Defazio and Jelassi), with L2 decay."""

    takes_complex: ClassVar[bool] = False
    keeps_parameters: ClassVar[bool] = True
    learning_rate: Positive = 1e-2
    momentum: Decay = 0.9
    """How slowly the parameters follow the dual average."""

    eps: Positive = 1e-6
    """Added to the rate and to the denominator."""

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        refuse_rates(self)
        return optax.chain(
            self.decayed(params), contrib.scale_by_madgrad(learning_rate, self.momentum, self.eps)
        )


@dataclasses.dataclass(frozen=True)
class Fromage(Optimizer):
    """Steps relative to the size of each array, which stays bounded without decay (Bernstein et
    al.)."""

    learning_rate: Positive = 1e-2
    min_norm: Positive = 1e-6
    """The least norm that an array counts as having."""

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        return optax.chain(
            optax.fromage(learning_rate, self.min_norm), descend(-1.0, self.rate_factors(params))
        )


@dataclasses.dataclass(frozen=True)
class GaLore(Betas):
    """Adam in a low-rank projection of the gradients of kernels of two dims (Zhao et al.), plain
    Adam for other arrays."""

    takes_complex: ClassVar[bool] = False
    rank: Count = 128
    """Rank of the projection."""

    refresh_every: Count = 200
    """Steps between new projections (each an SVD)."""

    scale: Positive = 1.0
    """Factor of the projected updates."""

    def direction(self, params: PyTree) -> Transformation:
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        projected = contrib.scale_by_galore(self.rank, self.refresh_every, self.scale, adam)
        labels = jax.tree.map(
            lambda leaf: "matrix" if leaf.decays and len(leaf.shape) == 2 else "other", params
        )
        # GaLore would handle the others too, but with arrays of no elements in its state, which
        # cannot be stored.
        return optax.partition({"matrix": projected, "other": adam}, labels)


@dataclasses.dataclass(frozen=True)
class NoisySGD(Decaying):
    """SGD with Gaussian noise that fades (Neelakantan et al.), with L2 decay."""

    learning_rate: Positive = 0.1
    noise: Annotated[float, Above(0), Traced()] = 0.01
    """Variance of the noise at the first step."""

    fading: NonNegative = 0.55
    """The variance at step t is divided by t to this power."""

    noise_seed: int = 0
    """Seed of the noise."""

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        noise = optax.add_noise(self.noise, self.fading, self.noise_seed)
        return optax.chain(
            self.decayed(params), noise, descend(learning_rate, self.rate_factors(params))
        )


@dataclasses.dataclass(frozen=True)
class NovoGrad(Betas):
    """Momentum of gradients scaled by the norm of each array (Ginsburg et al.); the decay joins the
    momentum, as in the paper."""

    b2: Decay = 0.25
    eps: Positive = 1e-6

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        factors = self.decay_factors(params)

        def with_decay(factor: float) -> Transformation:
            return optax.scale_by_novograd(
                self.b1, self.b2, self.eps, weight_decay=self.weight_decay * factor
            )

        # Optax decays all arrays alike; each array's moments are its own, so the rules become one
        # transformation for each factor.
        groups: dict[Hashable, Transformation] = {
            str(factor): with_decay(factor) for factor in sorted(set(jax.tree.leaves(factors)))
        }
        return optax.chain(
            optax.partition(groups, jax.tree.map(str, factors)),
            descend(learning_rate, self.rate_factors(params)),
        )


@dataclasses.dataclass(frozen=True)
class OptimisticSGD(Optimizer):
    """Gradient descent that expects the next gradient (Mokhtari et al.), for games."""

    learning_rate: Positive = 0.1
    alpha: Positive = 1.0
    """Weight of the gradient."""

    optimism: NonNegative = 1.0
    """Weight of the change of the gradient."""

    def direction(self, params: PyTree) -> Transformation:
        return optax.scale_by_optimistic_gradient(self.alpha, self.optimism)


@dataclasses.dataclass(frozen=True)
class OptimisticAdam(Betas):
    """Adam that expects the next update (Daskalakis et al.), for games; with decoupled decay."""

    alpha: Positive = 1.0
    """Weight of the update."""

    optimism: NonNegative = 1.0
    """Weight of the change of the update."""

    nesterov: bool = True
    """Whether the momentum looks ahead."""

    def direction(self, params: PyTree) -> Transformation:
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, nesterov=self.nesterov)
        return optax.chain(adam, optax.scale_by_optimistic_gradient(self.alpha, self.optimism))


@dataclasses.dataclass(frozen=True)
class RAdam(Betas):
    """Adam that starts as momentum until its scale is trustworthy (Liu et al.), with decoupled
    decay."""

    threshold: Positive = 5.0
    """Degrees of freedom from which the scale is used."""

    def direction(self, params: PyTree) -> Transformation:
        return optax.scale_by_radam(self.b1, self.b2, self.eps, threshold=self.threshold)


@dataclasses.dataclass(frozen=True)
class RMSProp(Decaying):
    """Scaled by the root mean square of recent gradients (Hinton), with L2 decay."""

    rho: Decay = 0.9
    """Decay of the second moment."""

    eps: Positive = 1e-8
    """Added to the second moment, under the root."""

    centered: bool = False
    """Whether the scale is the standard deviation."""

    momentum: Momentum = 0.0
    """Decay of a velocity of steps; 0 keeps none."""

    nesterov: bool = False
    """Whether the momentum looks ahead."""

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        scale = (optax.scale_by_stddev if self.centered else optax.scale_by_rms)(self.rho, self.eps)
        velocity_of_steps = velocity(self.momentum, self.nesterov)
        last = descend(1.0, self.rate_factors(params))
        return optax.chain(
            self.decayed(params), scale, optax.scale(learning_rate), velocity_of_steps, last
        )


@dataclasses.dataclass(frozen=True)
class Rprop(Optimizer):
    """A step for each number, which grows while the gradient keeps its sign (Riedmiller and Braun);
    for whole-set gradients."""

    takes_complex: ClassVar[bool] = False
    shrink: Decay = 0.5
    """Factor of the step when the sign changes."""

    grow: Annotated[float, Above(1), Traced()] = 1.2
    """Factor of the step when it does not."""

    min_step: Positive = 1e-6
    """Smallest step."""

    max_step: Positive = 50.0
    """Largest step."""

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        rprop = optax.scale_by_rprop(
            self.learning_rate, self.shrink, self.grow, self.min_step, self.max_step
        )
        # The rate is only where the steps begin; the schedule is applied as a factor of them.
        return optax.chain(
            rprop, descend(learning_rate / self.learning_rate, self.rate_factors(params))
        )


@dataclasses.dataclass(frozen=True)
class Signum(Decaying):
    """The sign of the averaged gradient (Bernstein et al.), with decoupled decay; without momentum
    sign SGD."""

    learning_rate: Positive = 1e-4
    momentum: Momentum = 0.9
    """Decay of the average; 0 keeps none."""

    def direction(self, params: PyTree) -> Transformation:
        average = (
            optax.identity() if is_off(self.momentum) else optax.ema(self.momentum, debias=False)
        )
        return optax.chain(average, optax.scale_by_sign())


@dataclasses.dataclass(frozen=True)
class SM3(Optimizer):
    """AdaGrad with one number for each row, column and so on: almost no memory but momentum (Anil
    et al.)."""

    takes_complex: ClassVar[bool] = False
    learning_rate: Positive = 0.1
    momentum: Decay = 0.9
    """Decay of the average of the updates."""

    def direction(self, params: PyTree) -> Transformation:
        return optax.scale_by_sm3(self.momentum)


@dataclasses.dataclass(frozen=True)
class Yogi(Optimizer):
    """Adam whose second moment changes by additions (Zaheer et al.)."""

    learning_rate: Positive = 1e-2
    b1: Decay = 0.9
    """Decay of the first moment (the momentum)."""

    b2: Decay = 0.999
    """Decay of the second moment (the scale)."""

    eps: Positive = 1e-3
    """Added to the denominator."""

    def direction(self, params: PyTree) -> Transformation:
        return optax.scale_by_yogi(self.b1, self.b2, self.eps)


def refuse_rates(optimizer: Optimizer) -> None:
    """`UserError` for rules of rates where the update is not proportional to a rate."""
    if optimizer.rates:
        text = ",".join(f"{pattern}={factor:g}" for pattern, factor in optimizer.rates)
        name = type(optimizer).__name__.lower()
        raise UserError(
            f"--optimizer.rates={text}: {name} has no rate for each parameter; remove the rules or"
            " choose another optimizer"
        )
