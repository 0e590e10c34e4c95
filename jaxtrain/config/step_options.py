"""The options of one training step, declared once: a run has them as flags, a recipe as fields."""

import dataclasses
from typing import Annotated, Any, Literal

from jaxtrain.config.marks import FREE, Group
from jaxtrain.fields import Above, Count, Decay, Traced
from jaxtrain.tree import Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What one step does, besides its model, task, optimizer and data.

    >>> StepOptions(microbatches=2).remat
    'none'
    """

    microbatches: Annotated[Count, Group.TRAINING] = 1
    """Into how many parts a batch is cut to save memory; sums stay exact, but dropout draws anew
    for each part and batch norm takes each part's statistics. Must divide --batch_size."""
    clip_norm: Annotated[float | None, Above(0), Traced(), Group.TRAINING] = None
    """Scales gradients down to this global norm; none = never."""
    ema_decay: Annotated[Decay | None, Group.TRAINING] = None
    """Also keeps, and evaluates, an exponential moving average of the parameters with this decay;
    none = no average."""
    aux_losses: Annotated[Rules[float], Group.TRAINING] = ()
    """Weights of the auxiliary losses that a model sows, by path pattern, e.g. balance=0.01; those
    in a collection named losses count 1 without a rule, others nothing."""

    precision: Annotated[str, Group.DEVICES] = "fp32"
    """What the model computes in: fp32, bf16, fp16 (with loss scaling) or fp8; parameters stay
    float32."""
    shard: Annotated[Rules[str], Group.DEVICES, FREE] = ()
    """Where parameters lie, by path pattern, before what their models say: a mesh axis or - for
    each dim, e.g. head/kernel=-:tensor."""
    optimizer_state: Annotated[Literal["fp32", "bf16"], Group.DEVICES] = "fp32"
    """What the optimizer's averages are stored in; bf16 halves them, rounded stochastically."""
    remat: Annotated[Literal["none", "dots", "dense", "blocks"], Group.DEVICES, FREE] = "none"
    """What the backward pass computes again, to save memory: all but matrix products, all but
    products of dense layers, or all within a block."""
    offload: Annotated[Literal["none", "optimizer"], Group.DEVICES, FREE] = "none"
    """What lives in the memory of the host instead of the GPU's."""


def options_of(other: StepOptions) -> dict[str, Any]:
    """The options of a step that a run or a recipe holds, by name.

    >>> options_of(StepOptions(clip_norm=1.0))["clip_norm"]
    1.0
    """
    return {field.name: getattr(other, field.name) for field in dataclasses.fields(StepOptions)}
