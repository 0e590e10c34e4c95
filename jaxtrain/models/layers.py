"""Layers that the model families share, and the vocabulary of logical axes.

Every parameter is born in a box that names its dims by meaning; a table elsewhere maps these
logical axes to mesh axes. The words:

    embed     width of a transformer's residual stream        heads, head_dim   attention heads, and
              the width of one
    mlp       hidden width of a dense block                    mlp_in            what enters a dense
              block
    conv_in   channels into a convolution                      conv_out          channels out of it
              (norms and biases, too)
    position  places of a learned position embedding           patch             numbers of one
              image patch
    classes   outputs of the head                            vocab             tokens that there
              are, into a model and out of it
    None      a dim nobody shards: kernel height and width

Dims in names: B batch, H height, W width, L length or places, C channels, D features or model
width, N heads, K head width; `spatial` dims are all between B and C.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.errors import UserError

Initializer = Callable[..., Any]
Activation = Literal["relu", "gelu", "gelu_exact", "silu"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
    "silu": nn.silu,
}
"""By name; `gelu` is the approximation by tanh, `gelu_exact` is made of the error function."""
HE_FAN_IN = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
LECUN = nn.initializers.lecun_normal()
XAVIER = nn.initializers.xavier_uniform()
ZEROS = nn.initializers.zeros
ONES = nn.initializers.ones


def boxed(initializer: Initializer, *axes: str | None) -> Initializer:
    """An initializer whose arrays are born with the names of their logical axes.

    >>> value = boxed(ZEROS, "mlp_in", "mlp")(jax.random.key(0), (2, 3), jnp.float32)
    >>> value.names, value.value.shape
    (('mlp_in', 'mlp'), (2, 3))
    """
    return nn.with_logical_partitioning(initializer, axes)


class Dropout(nn.Module):
    """Sets each number to zero with probability `rate`, which may be traced; a Python 0 costs
    nothing.

    >>> Dropout(rate=0.5).apply({}, jnp.ones((2, 3)), train=False).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]

    In training it draws from the random stream `dropout`. (`nn.Dropout` raises for a traced rate.)
    """

    rate: Any = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or (isinstance(self.rate, int | float) and self.rate == 0):
            return x
        return dropped(x, self.rate, self.make_rng("dropout"))


def dropped(x: jax.Array, rate: Any, key: jax.Array) -> jax.Array:
    """Each number set to zero with probability `rate`, and the others divided by 1 - rate.

    >>> sorted(set(dropped(jnp.ones(64), 0.5, jax.random.key(0)).tolist()))
    [0.0, 2.0]
    """
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    kept = jax.random.uniform(key, x.shape) < keep
    return jnp.where(kept, x * (1.0 / keep).astype(x.dtype), jnp.zeros_like(x))


def conv(
    features: int,
    kernel: Sequence[int],
    *,
    stride: int = 1,
    bias: bool = False,
    circular: bool = False,
    initializer: Initializer = HE_FAN_OUT,
    name: str | None = None,
) -> nn.Conv:
    """A convolution padded by half its kernel on both sides, so that stride s turns n places into
    ceil(n / s) (odd kernels).

    >>> conv(4, (3, 3), stride=2).init_with_output(jax.random.key(0), jnp.ones((1, 7, 7, 2)))[
    ...     0
    ... ].shape
    (1, 4, 4, 4)

    XLA's "SAME" pads even sizes by less before than after; ours is what the ResNets' published
    weights were trained with.
    """
    return nn.Conv(
        features,
        tuple(kernel),
        strides=stride,
        padding="CIRCULAR" if circular else [(size // 2, (size - 1) // 2) for size in kernel],
        use_bias=bias,
        kernel_init=boxed(initializer, *(None,) * len(kernel), "conv_in", "conv_out"),
        bias_init=boxed(ZEROS, "conv_out"),
        name=name,
    )


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """The bias added along the last dims of `x`, in float32 and back in the dtype of `x`.

    >>> gradient = jax.grad(lambda bias: add_bias(jnp.zeros((4096, 1), jnp.bfloat16), bias).sum())(
    ...     jnp.zeros(1, jnp.bfloat16)
    ... )
    >>> float(gradient[0])
    4096.0

    A bias's gradient is a sum over batch and places, and XLA on CPU adds bfloat16 to bfloat16: of
    4,096 equal numbers it made 40% of their sum.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(wide) + bias.astype(wide)[(None,) * (x.ndim - bias.ndim)]).astype(x.dtype)


def dot_general_by_rows(
    x: jax.Array, kernel: jax.Array, dims: Any = None, precision: Any = None, **options: Any
) -> jax.Array:
    """The product over the last dim of `x` and the first of `kernel`, as one of rows; has the
    arguments of `lax.dot_general`.

    >>> dot_general_by_rows(jnp.ones((2, 3, 4)), jnp.ones((4, 5, 6))).shape
    (2, 3, 5, 6)

    With (B, L, D) as it is, XLA on CPU transposes a copy of what comes back for the kernel's
    gradient: 16 ms there and back, where rows take 7 (64 x 64 places, widths 64 and 256, two
    cores). A batch split over devices stays as it is; places that are split would have to be
    gathered.
    """
    assert dims in (None, (((x.ndim - 1,), (0,)), ((), ()))), dims
    y = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), precision=precision, **options
    )
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


class _Biased(nn.Module):
    """Flax's product without its bias, and ours."""

    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        if not self.bias:
            return y
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        return add_bias(y, self.param("bias", self.bias_init, features, self.param_dtype))


class Dense(_Biased, nn.Dense):
    """Flax's `Dense` with the bias of `add_bias`; `dense` makes it with named axes."""

    use_bias: bool = False


class DenseGeneral(_Biased, nn.DenseGeneral):
    """Flax's `DenseGeneral` with the bias of `add_bias`; `head_projection` and `output_projection`
    make it with named axes."""

    use_bias: bool = False


def dense(
    features: int,
    axes: tuple[str, str],
    *,
    bias: bool = True,
    initializer: Initializer = LECUN,
    name: str | None = None,
) -> Dense:
    """A dense layer whose kernel has these two logical axes, and whose bias the second."""
    kernel_init, bias_init = boxed(initializer, *axes), boxed(ZEROS, axes[1])
    return Dense(
        features,
        bias=bias,
        dot_general=dot_general_by_rows,
        kernel_init=kernel_init,
        bias_init=bias_init,
        name=name,
    )


def head_projection(heads: int, head_dim: int, *, bias: bool = True, name: str) -> DenseGeneral:
    """The product that makes the queries, keys or values (B, L, N, K) of the stream (B, L, D), with
    a kernel (D, N, K) and a bias (N, K) of its own.

    >>> layer = head_projection(2, 4, name="query")
    >>> variables = nn.meta.unbox(layer.init(jax.random.key(0), jnp.ones((1, 3, 6))))
    >>> jax.tree.map(jnp.shape, variables["params"])
    {'bias': (2, 4), 'kernel': (6, 2, 4)}

    Keys and values may have fewer heads than queries: `attention` then shares each of them among as
    many queries as there are to one.
    """
    kernel_init = boxed(XAVIER, "embed", "heads", "head_dim")
    return DenseGeneral(
        (heads, head_dim),
        bias=bias,
        dot_general=dot_general_by_rows,
        kernel_init=kernel_init,
        bias_init=boxed(ZEROS, "heads", "head_dim"),
        name=name,
    )


def check_heads(kind: str, heads: int, width: int, remedy: str = "choose a divisor of it") -> None:
    """`UserError` if the heads of a model of this kind cannot share its width."""
    if width % heads:
        raise UserError(f"{kind}.heads={heads}: does not divide width={width}; {remedy}")


def query_key_value(x_BLD: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value (B, L, N, K) of each place, by the layers `query`, `key` and `value` of
    the module that calls."""
    head_dim = x_BLD.shape[-1] // heads
    query, key, value = (
        head_projection(heads, head_dim, name=name)(x_BLD) for name in ("query", "key", "value")
    )
    return query, key, value


def output_projection(width: int, *, bias: bool = True, name: str) -> DenseGeneral:
    """The product that makes the stream (B, L, D) of what the heads found (B, L, N, K)."""
    kernel_init, bias_init = boxed(XAVIER, "heads", "head_dim", "embed"), boxed(ZEROS, "embed")
    return DenseGeneral(
        width, axis=(-2, -1), bias=bias, kernel_init=kernel_init, bias_init=bias_init, name=name
    )


def batch_norm(
    train: bool, *, axis: str = "conv_out", scale: Initializer = ONES, name: str | None = None
) -> nn.BatchNorm:
    """Batch normalisation by the statistics of this batch in training, by the running averages
    otherwise.

    The running averages keep 0.9 of their value at each step, as in PyTorch's default; unlike there
    the variance is the biased one.
    """
    scale_init, bias_init = boxed(scale, axis), boxed(ZEROS, axis)
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        scale_init=scale_init,
        bias_init=bias_init,
        name=name,
    )


def layer_norm(axis: str, *, epsilon: float = 1e-6, name: str | None = None) -> nn.LayerNorm:
    """Layer normalisation over the last dim, whose logical axis is `axis`."""
    return nn.LayerNorm(
        epsilon=epsilon, scale_init=boxed(ONES, axis), bias_init=boxed(ZEROS, axis), name=name
    )


def norm(
    kind: Literal["layer", "rms"], epsilon: float, *, offset: bool = False, name: str | None = None
) -> nn.Module:
    """A norm over a transformer's stream, by its name."""
    if kind == "layer":
        return layer_norm("embed", epsilon=epsilon, name=name)
    return RMSNorm(epsilon, offset=offset, axes=("embed",), name=name)


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dims and multiplies by a scale (Zhang and
    Sennrich 2019, arXiv 1910.07467).

    >>> RMSNorm(1e-6).apply({"params": {"scale": jnp.ones(2)}}, jnp.array([[3.0, 3.0]])).round(
    ...     4
    ... ).tolist()
    [[1.0, 1.0]]

    The mean square is taken in float32. Llama rounds to the dtype of the input before it
    multiplies; with `offset` the scale is born 0, the factor is 1 + scale, and rounding comes last,
    as in Gemma.
    """

    epsilon: float = 1e-6
    offset: bool = False
    axes: tuple[str, ...] = ("head_dim",)
    "the logical axes of the dims that are one: the last, or the last two"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dims = tuple(range(-len(self.axes), 0))
        initializer = boxed(ZEROS if self.offset else ONES, *self.axes)
        scale = self.param("scale", initializer, x.shape[-len(self.axes) :])
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = jnp.mean(jnp.square(wide), axis=dims, keepdims=True)
        y = wide * jax.lax.rsqrt(mean + self.epsilon)
        scale = scale[(None,) * (x.ndim - scale.ndim)]
        if self.offset:
            return (y * (1.0 + scale.astype(y.dtype))).astype(x.dtype)
        return y.astype(x.dtype) * scale.astype(x.dtype)


def head(num_classes: int, axis: str, *, initializer: Initializer = LECUN) -> Dense:
    """The last dense layer, named `head` in every family so that rules and warm starts can find
    it."""
    return dense(num_classes, (axis, "classes"), initializer=initializer, name="head")


def block_end(x: jax.Array) -> jax.Array:
    """The same numbers, marked as the output of a block: a rematerialisation policy keeps these by
    the name `block`, and no others.

    >>> block_end(jnp.arange(3)).tolist()
    [0, 1, 2]

    Outside `jax.checkpoint` the mark does nothing and costs nothing.
    """
    return checkpoint_name(x, "block")


def as_float(inputs: jax.Array) -> jax.Array:
    """Integers as float32, numbers unchanged (scaling is the data's business); floats as they are.

    >>> as_float(jnp.array([255], jnp.uint8)).dtype
    dtype('float32')
    """
    return inputs if jnp.issubdtype(inputs.dtype, jnp.floating) else inputs.astype(jnp.float32)


def check_image(inputs: jax.Array, model: str) -> None:
    """`UserError` unless `inputs` are images (B, H, W, C)."""
    if inputs.ndim != 4:
        raise UserError(
            f"{model}: input shape {inputs.shape} is not (batch, height, width, channels); add the"
            " missing dim"
        )


def check_counts(counts: Sequence[int], name: str, *, example: str = "") -> None:
    """`UserError` if a count is below 1, or, where an `example` says that one is needed, if there
    is none."""
    if any(count < 1 for count in counts):
        raise UserError(f"{name}={tuple(counts)}: every entry must be >= 1")
    if example and not counts:
        raise UserError(f"{name}=(): needs at least one entry, e.g. {example}")


def space_to_depth(x: jax.Array, block: int) -> jax.Array:
    """Moves each block of neighbouring places into the channels: (B, H, W, C) -> (B, H/b, W/b,
    b*b*C), likewise in 1-D.

    >>> (
    ...     space_to_depth(jnp.zeros((2, 8, 6, 3)), 2).shape,
    ...     space_to_depth(jnp.zeros((2, 8, 3)), 4).shape,
    ... )
    ((2, 4, 3, 12), (2, 2, 12))

    `UserError` if a spatial size is no multiple of `block`.
    """
    spatial = x.shape[1:-1]
    if any(size % block for size in spatial):
        sizes = "x".join(map(str, spatial))
        raise UserError(
            f"input of {sizes}: not divisible into blocks of {block}; resize or crop it, or choose"
            " another size"
        )
    rank = len(spatial)
    split = x.reshape(
        x.shape[0], *(part for size in spatial for part in (size // block, block)), x.shape[-1]
    )
    order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    return split.transpose(order).reshape(
        x.shape[0], *(size // block for size in spatial), block**rank * x.shape[-1]
    )


def halve(x: jax.Array, kind: Literal["max", "mean"] = "max") -> jax.Array:
    """Pools each spatial dim by 2; a last odd place is dropped, a size of 1 stays.

    >>> halve(jnp.arange(6.0).reshape(1, 6, 1)).ravel().tolist()
    [1.0, 3.0, 5.0]

    Windows do not overlap, so a reshape does it: the gradient of XLA's own pooling is several times
    slower on CPU.
    """
    for dim in range(1, x.ndim - 1):
        size = x.shape[dim] // 2
        if size == 0:
            continue
        pairs = jax.lax.slice_in_dim(x, 0, 2 * size, axis=dim).reshape(
            *x.shape[:dim], size, 2, *x.shape[dim + 1 :]
        )
        first, second = (
            jax.lax.index_in_dim(pairs, place, axis=dim + 1, keepdims=False) for place in (0, 1)
        )
        x = jnp.maximum(first, second) if kind == "max" else (first + second) * 0.5
    return x


def global_average_pool(x: jax.Array) -> jax.Array:
    """Global average pooling: the mean over all spatial dims, (B, ..., C) -> (B, C)."""
    places = math.prod(x.shape[1:-1])
    return x.reshape(x.shape[0], places, x.shape[-1]).mean(axis=1)
