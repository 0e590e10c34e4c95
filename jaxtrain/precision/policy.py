"""The precision policy: what a model computes in, which card can do it, and which one `auto` takes.

Parameters, gradients and the optimizer are float32 under every policy. A policy says in what the
model's own arithmetic is done: its parameters and inputs are cast on the way in, so gradients come
back as float32 through the cast. Batch statistics stay float32, and losses are computed in float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.adapters import Apply, Variables
from jaxtrain.errors import UserError
from jaxtrain.precision import fp8
from jaxtrain.tree import PyTree

Capability = float | str | None
"""CUDA compute capability as jax words it (`device.compute_capability`, such as "8.0"), as a
number, or None where there is none."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a model computes in.

    >>> POLICIES["bf16"].cast({"kernel": jnp.ones(2), "count": jnp.int32(3)})["kernel"].dtype
    dtype(bfloat16)
    """

    name: str
    dtype: Any
    """Of the model's arithmetic."""
    fp8: bool = False
    """Whether dense products have operands of eight bits, see `fp8.py`."""
    scaled: bool = False
    """Whether the loss is scaled, see `loss_scale.py`."""

    def cast(self, tree: PyTree) -> PyTree:
        """The tree with its float32 arrays in the policy's dtype; integers, bools, keys and other
        floats as they are."""
        return jax.tree.map(
            lambda leaf: (
                leaf.astype(self.dtype) if getattr(leaf, "dtype", None) == jnp.float32 else leaf
            ),
            tree,
        )


POLICIES: dict[str, Policy] = {
    "fp32": Policy("fp32", jnp.float32),
    "bf16": Policy("bf16", jnp.bfloat16),
    "fp16": Policy("fp16", jnp.float16, scaled=True),
    "fp8": Policy("fp8", jnp.bfloat16, fp8=True),
}
"""By the names of --precision."""


def apply_in(policy: Policy, apply: Apply) -> Apply:
    """A model's `apply` that computes as the policy says.

    >>> apply = apply_in(
    ...     POLICIES["bf16"],
    ...     lambda variables, inputs, *, train, key=None: (variables["params"] * inputs, {}),
    ... )
    >>> apply({"params": jnp.ones(2)}, jnp.ones(2), train=True)[0].dtype
    dtype(bfloat16)

    Parameters and inputs are cast, other collections (batch statistics) are not, and come back in
    the dtypes they were given in. Outputs are low precision; a loss that sums them has to widen
    them first.
    """
    if policy.dtype == jnp.float32 and not policy.fp8:
        return apply

    def cast_apply(
        variables: Variables, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Variables]:
        def run(variables: Variables, inputs: Any) -> tuple[Any, Variables]:
            return apply(variables, inputs, train=train, key=key)

        cast = variables | {"params": policy.cast(variables["params"])}
        outputs, changed = (fp8.with_fp8_products(run) if policy.fp8 else run)(
            cast, policy.cast(inputs)
        )
        return outputs, {
            name: _as_stored(tree, variables.get(name)) for name, tree in changed.items()
        }

    return cast_apply


def _as_stored(new: PyTree, old: PyTree) -> PyTree:
    """A collection in the dtypes it was stored in; one that was not stored as the model gave it."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        return new
    return jax.tree.map(
        lambda after, before: after if after.dtype == before.dtype else after.astype(before.dtype),
        new,
        old,
    )


def choose(platform: str, capability: Capability) -> str:
    """What `--precision=auto` takes: the fastest policy that trains as float32 does on this device.

    >>> (
    ...     choose("cpu", None),
    ...     choose("gpu", "6.1"),
    ...     choose("gpu", "7.0"),
    ...     choose("gpu", "7.5"),
    ...     choose("gpu", "8.0"),
    ... )
    ('fp32', 'fp32', 'fp16', 'fp16', 'bf16')

    `platform` is jax's (`device.platform`). fp8 is never chosen: it is a rounding that a user
    should know of. A TPU takes bf16. A GPU that tells no CUDA compute capability takes fp32, which
    all can do.
    """
    if platform == "tpu":
        return "bf16"
    found = None if platform == "cpu" else version(capability)
    if found is None or found < (7, 0):
        return "fp32"
    return "fp16" if found < (8, 0) else "bf16"


def check(name: str, platform: str, capability: Capability, device_kind: str) -> None:
    """`UserError` if a card cannot compute in this policy; the message says which one it can.

    >>> check("bf16", "gpu", "7.0", "Tesla V100-SXM2-16GB")
    Traceback (most recent call last):
    jaxtrain.errors.UserError: --precision=bf16: Tesla V100-SXM2-16GB (compute
    capability 7.0) has no bfloat16; use --precision=fp16, which scales its loss

    `device_kind` is what messages call the card. On CPU every policy is allowed, as a rehearsal.
    fp16 is allowed on every GPU: below 7.0 it has no tensor cores and saves memory only. A GPU that
    tells no CUDA compute capability is not judged: its compiler will say.
    """
    if name not in POLICIES:
        raise UserError(f"--precision={name}: not a precision; choose auto, {', '.join(POLICIES)}")
    found = None if platform in ("cpu", "tpu") else version(capability)
    if found is None:
        return
    lacks = {"bf16": ("bfloat16", (8, 0)), "fp8": ("fp8 products", (8, 9))}.get(name)
    if lacks is None or found >= lacks[1]:
        return
    other = choose(platform, capability)
    remedy = f"--precision={other}" + (", which scales its loss" if POLICIES[other].scaled else "")
    said = ".".join(map(str, found))
    raise UserError(
        f"--precision={name}: {device_kind} (compute capability {said}) has no {lacks[0]}; use"
        f" {remedy}"
    )


def version(capability: Capability) -> tuple[int, int] | None:
    """Major and minor compute capability, or None where it is none of CUDA's (an AMD card says
    `gfx942`).

    >>> version("8.6"), version("gfx942"), version(None)
    ((8, 6), None, None)
    """
    major, _, minor = str(capability).partition(".")
    return (int(major), int(minor or 0)) if major.isdigit() and (minor or "0").isdigit() else None
