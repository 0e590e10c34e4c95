"""The optimizers in daily use, and the table of all names.

Each is a frozen dataclass over Optax's own transformations. Weight decay is what the literature of
each means by it: SGD and Adam add it to the gradient (an L2 penalty, as in the ResNet papers), LARS
and LAMB to what the trust ratio measures, all others to the update (decoupled, times the learning
rate as in PyTorch). Kernels decay; biases, norms, embeddings, positions and class tokens do not,
whatever their number of dims, unless the `decay` rules say so (see `parameters.py`). The rarer
ones: `adaptive.py` and `rare.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import jax
import optax

from jaxtrain import tree
from jaxtrain.errors import UserError
from jaxtrain.fields import Above, AtLeast, Between, Count, Decay, NonNegative, Positive, Traced
from jaxtrain.optimizers import adaptive as zoo
from jaxtrain.optimizers import rare
from jaxtrain.optimizers.adaptive import Betas, Momentum, velocity
from jaxtrain.optimizers.base import (
    Decaying,
    Number,
    Optimizer,
    Transformation,
    descend,
    is_off,
    map_present,
    match_table,
)
from jaxtrain.optimizers.parameters import Parameter
from jaxtrain.tree import PyTree

__all__ = [
    "NAMES",
    "SGD",
    "Adafactor",
    "Adam",
    "AdamW",
    "Lamb",
    "Lars",
    "Lion",
    "Muon",
    "Optimizer",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "evaluation_params",
    "match_table",
]


@dataclasses.dataclass(frozen=True)
class SGD(Decaying):
    """Stochastic gradient descent with L2 decay; with momentum, plain or Nesterov's."""

    learning_rate: Positive = 0.1
    momentum: Momentum = 0.0
    """Decay of the velocity; 0 keeps none and takes no memory."""

    nesterov: bool = False
    """Whether the momentum looks ahead."""

    coupled: ClassVar[bool] = True

    def direction(self, params: PyTree) -> Transformation:
        return velocity(self.momentum, self.nesterov)


@dataclasses.dataclass(frozen=True)
class Adam(Betas):
    """Adam, with L2 decay as in its paper; see adamw for decoupled decay."""

    nesterov: bool = False
    """Whether the momentum looks ahead (NAdam)."""

    coupled: ClassVar[bool] = True

    def direction(self, params: PyTree) -> Transformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps, nesterov=self.nesterov)


@dataclasses.dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter)."""

    weight_decay: NonNegative = 1e-2

    coupled: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Lion(Decaying):
    """The sign of an interpolated momentum (Chen et al.); takes rates 3 to 10 times smaller than
    adamw and decay larger by as much."""

    learning_rate: Positive = 1e-4
    b1: Decay = 0.9
    """Weight of the momentum in the update."""

    b2: Decay = 0.99
    """Decay of the momentum."""

    def direction(self, params: PyTree) -> Transformation:
        return optax.scale_by_lion(self.b1, self.b2)


@dataclasses.dataclass(frozen=True)
class Lamb(Betas):
    """Adam with a trust ratio for each array that decays (You et al. 2020), for large batches."""

    eps: Positive = 1e-6

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        adapted = jax.tree.map(bool, self.decay_factors(params))
        return optax.chain(
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            self.decayed(params),
            optax.masked(optax.scale_by_trust_ratio(), adapted),
            descend(learning_rate, self.rate_factors(params)),
        )


@dataclasses.dataclass(frozen=True)
class Lars(Decaying):
    """Momentum SGD with a trust ratio for each array that decays (You et al. 2017), for large
    batches."""

    learning_rate: Positive = 1.0
    momentum: Decay = 0.9
    """Decay of the velocity."""

    nesterov: bool = False
    """Whether the momentum looks ahead."""

    trust: Positive = 1e-3
    """The trust coefficient: how far an array may move for its size."""

    eps: NonNegative = 0.0
    """Added to the norm of the gradient."""

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        adapted = jax.tree.map(bool, self.decay_factors(params))
        ratio = optax.scale_by_trust_ratio(trust_coefficient=self.trust, eps=self.eps)
        return optax.chain(
            self.decayed(params),
            optax.masked(ratio, adapted),
            # The velocity holds steps, not gradients, so a falling rate does not shrink the ones
            # already in it.
            optax.scale(learning_rate),
            optax.trace(self.momentum, self.nesterov),
            descend(1.0, self.rate_factors(params)),
        )


@dataclasses.dataclass(frozen=True)
class Adafactor(Decaying):
    """Second moments as row and column sums: almost no memory (Shazeer and Stern). The decay is
    decoupled, times the rate."""

    learning_rate: Positive = 1e-2
    min_factored_dim: Count = 128
    """Arrays whose second largest dim is smaller keep whole second moments."""

    moment_power: Annotated[float, Between(0, 1), Traced()] = 0.8
    """The second moment's decay at step t is 1 - t to minus this power."""

    clip: Positive | None = 1.0
    """Largest root mean square of an array's update; none: no limit."""

    relative: bool = True
    """Whether the rate is relative to the size (RMS) of each array."""

    momentum: Momentum = 0.0
    """Decay of an average of the updates; 0 keeps none."""

    eps: Positive = 1e-30
    """Added to the squared gradient."""

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        averaged = not is_off(self.momentum)
        return optax.chain(
            optax.scale_by_factored_rms(
                decay_rate=self.moment_power,
                min_dim_size_to_factor=self.min_factored_dim,
                epsilon=self.eps,
            ),
            optax.clip_by_block_rms(self.clip) if self.clip is not None else optax.identity(),
            optax.scale(learning_rate),
            optax.scale_by_param_block_rms() if self.relative else optax.identity(),
            optax.ema(self.momentum, debias=False) if averaged else optax.identity(),
            self.decayed(params, learning_rate * self.weight_decay),
            descend(1.0, self.rate_factors(params)),
        )


@dataclasses.dataclass(frozen=True)
class Muon(Betas):
    """Orthogonalised momentum for the kernels between features (Jordan et al.), Adam for all other
    arrays."""

    # A kernel is a matrix from all its inputs to its outputs: a convolution of (places * channels
    # in, channels out), as its authors flatten it; attention's query, key and value one matrix
    # (D, heads * width) each and its output one (heads * width, D), whole rather than by head:
    # Jordan found query, key and value apart better than fused, and Moonshot's models (arXiv
    # 2502.16982) were trained so. Layers that `nn.scan` stacked are matrices each on its own.
    # Embeddings and the head are Adam's, as with the authors (kellerjordan.github.io/posts/muon).
    # Theirs are also the first layers, which nothing in a tree of parameters sets apart: a first
    # convolution and ViT's patches are Muon's here; `adam` takes them from it.

    learning_rate: Positive = 2e-2
    beta: Decay = 0.95
    """Decay of the momentum of the matrices."""

    adam: tuple[str, ...] = ()
    """Path patterns of matrices that Adam takes too, such as the first layer."""

    muon: tuple[str, ...] = ()
    """Path patterns of embeddings and heads that Muon takes too."""

    newton_schulz_steps: Count = 5
    """Iterations of the orthogonalisation."""

    nesterov: bool = True
    """Whether the momentum looks ahead."""

    consistent_rms: NonNegative = 0.0
    """Size (RMS) that every matrix's update gets (Moonshot's convention); 0.2 allows AdamW's rates.
    0: the orthogonal matrix times sqrt(max(1, out / in)), as Jordan has it."""

    def direction(self, params: PyTree) -> Transformation:
        dims = self._dimension_numbers(params)

        def matrices(leaves: PyTree) -> PyTree:
            return map_present(lambda find, _: find(), dims, leaves)

        # At the rate -1 Optax's update is the direction itself; decay and rate are ours.
        return optax.contrib.muon(
            -1.0,
            ns_steps=self.newton_schulz_steps,
            beta=self.beta,
            eps=self.eps,
            nesterov=self.nesterov,
            adam_b1=self.b1,
            adam_b2=self.b2,
            consistent_rms=None if is_off(self.consistent_rms) else self.consistent_rms,
            muon_weight_dimension_numbers=matrices,
        )

    def _dimension_numbers(self, params: PyTree) -> PyTree:
        """For each parameter a function that gives Optax's words for its matrix, or None where it
        is Adam's: a function, since both would be nodes of the tree, not leaves."""

        def patterns(given: tuple[str, ...], name: str) -> PyTree:
            rules = tuple((pattern, True) for pattern in given)
            return tree.match(rules, params, name=f"--optimizer.{name}", default=False)

        def choose(parameter: Parameter, adam: bool, muon: bool) -> Callable[[], Any]:
            if adam or not (muon or parameter.hidden):
                return lambda: None
            if parameter.matrix is None:
                raise UserError(
                    f"--optimizer.muon={','.join(self.muon)}: {parameter.path} of shape"
                    f" {parameter.shape} is no matrix ({parameter.kind}); give patterns that take"
                    " matrices only, such as head/kernel"
                )
            sides = parameter.matrix
            return lambda: optax.contrib.MuonDimensionNumbers(sides.inputs, sides.outputs)

        return jax.tree.map(
            choose, params, patterns(self.adam, "adam"), patterns(self.muon, "muon")
        )


@dataclasses.dataclass(frozen=True)
class ScheduleFreeSGD(Decaying):
    """SGD that averages instead of following a schedule (Defazio et al.); use a constant schedule
    with warm-up."""

    keeps_parameters: ClassVar[bool] = True
    learning_rate: Positive = 1.0
    b1: Annotated[float, Above(0), Between(0, 1, open_above=True), Traced()] = 0.9
    """How near to the average the gradients are taken."""

    weight_power: Annotated[float, AtLeast(0), Traced()] = 2.0
    """The average weights each step by the largest rate so far to this power."""

    def chain(self, params: PyTree, learning_rate: Number) -> Transformation:
        # Rates per parameter belong inside: outside they would part the parameters from the
        # sequences they interpolate.
        step = descend(learning_rate, self.rate_factors(params))
        base = optax.chain(self.direction(params), self.decayed(params), step)
        return optax.contrib.schedule_free(base, learning_rate, self.b1, self.weight_power)

    def direction(self, params: PyTree) -> Transformation:
        return optax.identity()


@dataclasses.dataclass(frozen=True)
class ScheduleFreeAdamW(ScheduleFreeSGD):
    """AdamW that averages instead of following a schedule (Defazio et al.); use a constant schedule
    with warm-up."""

    learning_rate: Positive = 2.5e-3
    b2: Decay = 0.999
    """Decay of the second moment (the scale)."""

    eps: Positive = 1e-8
    """Added to the denominator."""

    def direction(self, params: PyTree) -> Transformation:
        return optax.scale_by_rms(self.b2, self.eps, eps_in_sqrt=False, bias_correction=True)


def evaluation_params(optimizer: Optimizer, opt_state: PyTree, params: PyTree) -> PyTree:
    """The parameters to evaluate and to keep: the average for the schedule-free ones, `params`
    themselves for all others."""
    leaves = jax.tree.leaves(
        opt_state, is_leaf=lambda node: isinstance(node, optax.contrib.ScheduleFreeState)
    )
    states = [leaf for leaf in leaves if isinstance(leaf, optax.contrib.ScheduleFreeState)]
    if len(states) != 1:  # of Optax's own there may be several, and then none is all parameters'
        return params
    (state,) = states
    b1 = optimizer.b1 if isinstance(optimizer, ScheduleFreeSGD) else state.b1

    def average(param: jax.Array, z: Any) -> jax.Array:
        if isinstance(z, optax.MaskedNode):  # frozen
            return param
        return ((param - (1 - b1) * z) / b1).astype(param.dtype)

    return jax.tree.map(average, params, state.z)


NAMES: dict[str, Optimizer] = {
    "sgd": SGD(),
    "momentum": SGD(momentum=0.9),
    "nesterov": SGD(momentum=0.9, nesterov=True),
    "adam": Adam(),
    "adamw": AdamW(),
    "nadam": Adam(nesterov=True),
    "nadamw": AdamW(nesterov=True),
    "lion": Lion(),
    "lamb": Lamb(),
    "lars": Lars(),
    "adafactor": Adafactor(),
    "muon": Muon(),
    "schedule_free_sgd": ScheduleFreeSGD(),
    "schedule_free_adamw": ScheduleFreeAdamW(),
    "prodigy": zoo.Prodigy(),
    "dadapt_adamw": zoo.DAdaptAdamW(),
    "dog": zoo.DoG(),
    "dowg": zoo.DoWG(),
    "adabelief": zoo.AdaBelief(),
    "adadelta": zoo.AdaDelta(),
    "adagrad": zoo.AdaGrad(),
    "adamax": zoo.AdaMax(),
    "adamaxw": zoo.AdaMax(weight_decay=1e-4),
    "adan": zoo.Adan(),
    "ademamix": zoo.AdEMAMix(),
    "adopt": zoo.Adopt(),
    "amsgrad": zoo.AMSGrad(),
    "acprop": zoo.AcProp(),
    "cocob": rare.Cocob(),
    "fromage": rare.Fromage(),
    "galore": rare.GaLore(),
    "madgrad": rare.Madgrad(),
    "noisy_sgd": rare.NoisySGD(),
    "novograd": rare.NovoGrad(),
    "optimistic_adam": rare.OptimisticAdam(),
    "optimistic_sgd": rare.OptimisticSGD(),
    "radam": rare.RAdam(),
    "rmsprop": rare.RMSProp(),
    "rprop": rare.Rprop(),
    "sign_sgd": rare.Signum(momentum=0.0),
    "signum": rare.Signum(),
    "simplified_ademamix": zoo.SimplifiedAdEMAMix(),
    "sm3": rare.SM3(),
    "yogi": rare.Yogi(),
}
