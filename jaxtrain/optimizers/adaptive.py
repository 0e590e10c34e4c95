"""The rarer optimizers that Optax ships, each as Optax has it; the common ones and all names are in
`common.py`.

Left out are those that ask for more than gradients: L-BFGS, Polyak's and MoMo (loss values), Sophia
(curvature), SAM (further gradients). Those without `weight_decay` have none in Optax nor in their
papers.
"""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import optax
from optax import contrib

from jaxtrain.fields import Between, Decay, NonNegative, Positive, Traced
from jaxtrain.optimizers.base import Decaying, Number, Transformation, add_decay, descend, is_off
from jaxtrain.tree import PyTree

Momentum = Annotated[float, Between(0, 1, open_above=True), Traced(off=0.0)]
"""A decay rate whose 0 means that there is no momentum, and no memory for one."""


@dataclasses.dataclass(frozen=True)
class Betas(Decaying):
    """Two moments of the gradient: what the Adam family shares."""

    b1: Decay = 0.9
    """Decay of the first moment (the momentum)."""

    b2: Decay = 0.999
    """Decay of the second moment (the scale)."""

    eps: Positive = 1e-8
    """Added to the denominator."""


def velocity(momentum: Number, nesterov: bool) -> Transformation:
    """The gradient's trace, or nothing where momentum is off."""
    return optax.identity() if is_off(momentum) else optax.trace(momentum, nesterov)


@dataclasses.dataclass(frozen=True)
class Adaptive(Betas):
    """AdamW that estimates its own rate; the learning rate is a factor of it, and the decay follows
    it."""

    takes_complex: ClassVar[bool] = False
    learning_rate: Positive = 1.0
    initial: Positive = 1e-6
    """The first guess of the distance to the solution."""

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        adaptive, factors = self.adaptive(learning_rate), self.decay_factors(params)

        def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
            result: tuple[PyTree, Any] = adaptive.update(updates, state, params)
            new_updates, new_state = result
            if not is_off(self.weight_decay):
                # Optax can only decay all parameters alike, so this is its own formula for those
                # that the rules choose.
                correction = (1 - self.b2**new_state.count) ** 0.5 / (1 - self.b1**new_state.count)
                rate = state.estim_lr * learning_rate * correction
                new_updates = add_decay(new_updates, params, -self.weight_decay * rate, factors)
            return new_updates, new_state

        return optax.chain(
            optax.GradientTransformation(adaptive.init, update),
            descend(-1.0, self.rate_factors(params)),
        )

    def adaptive(self, learning_rate: Number) -> Transformation:
        """The optimizer without decay."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Prodigy(Adaptive):
    """AdamW that finds its own rate (Mishchenko and Defazio)."""

    keeps_parameters: ClassVar[bool] = True
    growth: Positive = 1.0
    """Factor of the rate found."""

    safeguard_warmup: bool = True
    """Whether a warm-up is kept from inflating the estimate."""

    def adaptive(self, learning_rate: Number) -> Transformation:
        return contrib.prodigy(
            learning_rate,
            (self.b1, self.b2),
            eps=self.eps,
            estim_lr0=self.initial,
            estim_lr_coef=self.growth,
            safeguard_warmup=self.safeguard_warmup,
        )


@dataclasses.dataclass(frozen=True)
class DAdaptAdamW(Adaptive):
    """AdamW that finds its own rate by D-Adaptation (Defazio and Mishchenko)."""

    def adaptive(self, learning_rate: Number) -> Transformation:
        return contrib.dadapt_adamw(
            learning_rate, (self.b1, self.b2), eps=self.eps, estim_lr0=self.initial
        )


@dataclasses.dataclass(frozen=True)
class DoG(Decaying):
    """SGD whose rate is distance over gradients (Ivgi et al.), with L2 decay."""

    keeps_parameters: ClassVar[bool] = True
    learning_rate: Positive = 1.0
    start: Literal["heuristic", "distance", "learning_rate"] = "heuristic"
    """What the first value means: times 1 + the norm of the parameters, the distance, or the first
    rate."""

    initial: Positive = 1e-6
    """The first value."""

    eps: Positive = 1e-8
    """Added to the sum of squared gradients."""

    coupled: ClassVar[bool] = True

    def direction(self, params: PyTree) -> Transformation:
        return contrib.dog(-1.0, (self.start, self.initial), self.eps)


@dataclasses.dataclass(frozen=True)
class DoWG(Decaying):
    """SGD whose rate is distance over weighted gradients (Khaled et al.), with L2 decay."""

    keeps_parameters: ClassVar[bool] = True
    learning_rate: Positive = 1.0
    initial: Positive | None = None
    """The first guess of the squared distance; none: eps."""

    eps: Positive = 1e-4
    """Added to the norm of the gradients."""

    coupled: ClassVar[bool] = True

    def direction(self, params: PyTree) -> Transformation:
        return contrib.dowg(-1.0, self.initial, self.eps)


@dataclasses.dataclass(frozen=True)
class AdaBelief(Betas):
    """Adam scaled by how far gradients are from their average (Zhuang et al.), with decoupled
    decay."""

    eps: Positive = 1e-16
    eps_root: Positive = 1e-16
    """Added to the second moment."""

    def direction(self, params: PyTree) -> Transformation:
        return optax.scale_by_belief(self.b1, self.b2, self.eps, self.eps_root)


@dataclasses.dataclass(frozen=True)
class AdaDelta(Decaying):
    """Steps sized by past steps over past gradients (Zeiler), with L2 decay."""

    takes_complex: ClassVar[bool] = False
    learning_rate: Positive = 1.0
    rho: Decay = 0.9
    """Decay of both averages."""

    eps: Positive = 1e-6
    """Added to both averages."""

    coupled: ClassVar[bool] = True

    def direction(self, params: PyTree) -> Transformation:
        return optax.scale_by_adadelta(self.rho, self.eps)


@dataclasses.dataclass(frozen=True)
class AdaGrad(Decaying):
    """Scaled by the sum of all squared gradients (Duchi et al.), with L2 decay."""

    learning_rate: Positive = 1e-2
    initial: NonNegative = 0.1
    """What the sum begins with."""

    eps: Positive = 1e-7
    """Added to the sum."""

    coupled: ClassVar[bool] = True

    def direction(self, params: PyTree) -> Transformation:
        return optax.scale_by_rss(self.initial, self.eps)


@dataclasses.dataclass(frozen=True)
class AdaMax(Betas):
    """Adam scaled by the largest recent gradient (Kingma and Ba), with decoupled decay."""

    def direction(self, params: PyTree) -> Transformation:
        return optax.scale_by_adamax(self.b1, self.b2, self.eps)


@dataclasses.dataclass(frozen=True)
class Adan(Betas):
    """Adaptive Nesterov momentum (Xie et al.), with decoupled decay."""

    b1: Decay = 0.98
    b2: Decay = 0.92
    """Decay of the average change of the gradient."""

    b3: Decay = 0.99
    """Decay of the second moment (the scale)."""

    eps_root: Positive = 1e-8
    """Added to the second moment."""

    def direction(self, params: PyTree) -> Transformation:
        return optax.scale_by_adan(self.b1, self.b2, self.b3, self.eps, self.eps_root)


@dataclasses.dataclass(frozen=True)
class AdEMAMix(Betas):
    """Adam with a second, slow momentum (Pagliardini et al.)."""

    b3: Decay = 0.9999
    """Decay of the slow momentum."""

    alpha: NonNegative = 5.0
    """Weight of the slow momentum."""

    def direction(self, params: PyTree) -> Transformation:
        return contrib.scale_by_ademamix(self.b1, self.b2, self.b3, self.alpha, self.eps)


@dataclasses.dataclass(frozen=True)
class SimplifiedAdEMAMix(Betas):
    """AdEMAMix with one accumulated momentum (Morwani et al.); takes rates about 1 - b1 of
    adamw's."""

    takes_complex: ClassVar[bool] = False
    learning_rate: Positive = 1e-5
    b1: Decay = 0.99
    b2: Decay = 0.95
    alpha: NonNegative = 0.0
    """Weight of the gradient itself beside the momentum."""

    def direction(self, params: PyTree) -> Transformation:
        return contrib.scale_by_simplified_ademamix(self.b1, self.b2, self.alpha, self.eps)


@dataclasses.dataclass(frozen=True)
class Adopt(Betas):
    """Adam that normalises before it averages (Taniguchi et al.), with decoupled decay."""

    takes_complex: ClassVar[bool] = False
    b2: Decay = 0.9999
    eps: Positive = 1e-6

    def direction(self, params: PyTree) -> Transformation:
        return contrib.scale_by_adopt(self.b1, self.b2, self.eps)


@dataclasses.dataclass(frozen=True)
class AMSGrad(Betas):
    """Adam whose second moment never falls (Reddi et al.), with L2 decay."""

    coupled: ClassVar[bool] = True

    def direction(self, params: PyTree) -> Transformation:
        return optax.scale_by_amsgrad(self.b1, self.b2, self.eps)


@dataclasses.dataclass(frozen=True)
class AcProp(Betas):
    """AdaBelief's scale, one step late, without momentum (Zhuang et al.), with decoupled decay."""

    eps: Positive = 1e-16
    eps_root: Positive = 1e-16
    """Added to the second moment."""

    def direction(self, params: PyTree) -> Transformation:
        return contrib.scale_by_acprop(self.b1, self.b2, self.eps, self.eps_root)
