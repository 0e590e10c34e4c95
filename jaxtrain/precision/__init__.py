"""What the model computes in, by card: policies, fp8 products, loss scaling, stochastic
rounding."""

from jaxtrain.precision.policy import POLICIES, Policy, apply_in, check, choose, version

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
