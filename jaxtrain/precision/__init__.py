"""What the model computes in, by card: policies, fp8 products, loss scaling, stochastic
rounding."""

from jaxtrain.precision.policy import (
    POLICIES as POLICIES,
)
from jaxtrain.precision.policy import (
    Policy as Policy,
)
from jaxtrain.precision.policy import (
    apply_in as apply_in,
)
from jaxtrain.precision.policy import (
    check as check,
)
from jaxtrain.precision.policy import (
    choose as choose,
)
from jaxtrain.precision.policy import (
    version as version,
)

__all__ = [
    "POLICIES",
    "Policy",
    "apply_in",
    "check",
    "choose",
    "fp8",
    "loss_scale",
    "stochastic_rounding",
    "version",
]
