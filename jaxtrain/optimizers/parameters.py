"""What each parameter is: a kernel, a head, an embedding, a bias, the scale of a norm; and which of
its dims make it a matrix.

Weight decay and Muon ask this, not how many dims an array has: attention's biases have two or three
dims, a stack of layers has one more than a layer, and a 1-D convolution as many as attention's
query. Three sources have their say, in this order:

1. The name at the end of the path (`KINDS`, rules of the house's one rule language): Flax's own
   names and the usual ones of Haiku, Equinox and PyTorch.
2. The logical axes that the model gave (`adapters.logical_axes`): a stacked dim (`layers`) is no
   dim of the matrix, `vocab` or `classes` at the end make a head, `vocab` at the start an
   embedding.
3. The shape, and the shapes beside it: the bias of a layer has the dims of its outputs.

What none of them knows counts as a kernel if it has two dims and more, as a vector otherwise.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from jaxtrain import tree
from jaxtrain.tree import PyTree, Rules

Kind = Literal["kernel", "head", "embedding", "position", "token", "norm", "bias", "vector"]
Axes = tree.Axes

KINDS: Rules[str] = (
    (r"(^|/)((\w*_)?(bias|biases|bias_table|offset|beta|shift)_?\d*|b\d*)$", "bias"),
    (r"(^|/)(\w*_)?(scale|gain|gamma|negative_slope|temperature)_?\d*$", "norm"),
    (r"(norm|Norm|(^|/)ln)\w*/weight$", "norm"),
    (r"(^|[/_])(pos|posemb\w*|position\w*|relpos|wpe)(_\w*)?(/embeddings?|/weight)?$", "position"),
    (r"(^|/)(?!embed_)(\w*_)?(tokens?|cls|registers?|probes?|latents?|prompts?)$", "token"),
    (r"(^|/)A_log$", "vector"),  # of state-space models, whose authors do not decay it
    (r"(^|/)(\w*_)?(head|logits|classifier|unembed|unembedding)(/(kernel|w|weight))?$", "head"),
    (
        r"(^|/)(?!\w*patch)\w*(embed|embeddings?|embed_tokens|wte|codebooks?)(/weight)?$",
        "embedding",
    ),
    (r"(^|/)(kernel|w|weight)$", "kernel"),
)
"""What a parameter is by its path; the first pattern that is found in it decides."""

STACKED = frozenset(
    {"layers", "layer", "blocks", "stack", "stage", "stages", "expert", "experts", "qkv"}
)
"""Logical axes that count matrices: layers under `nn.scan`, experts, query and key and value."""
HEADS = frozenset({"heads", "q_heads", "kv_heads", "head_dim", "kv", "joined_kv"})
"""Logical axes of attention's heads: two dims that are one side of a matrix."""
OUTPUTS = frozenset({"classes", "labels", "vocab", "vocabulary"})
"""Logical axes of what a model says; the kernel that ends in one is a head."""
PLACES = frozenset({"position", "positions", "relpos_buckets"})
"""Logical axes of learned positions."""

_QUERY = re.compile(r"(^|/)(query|key|value|[qkv]|[qkv]_proj)/(kernel|w)$")
_TRANSFORMED = re.compile(r"^(Scan|Vmap)")
"""What Flax calls a module under `nn.scan` or `nn.vmap` that was given no name."""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Which dims of an array are the inputs and which the outputs of a linear map; all others count
    matrices."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What an optimizer knows of one parameter; stands in the tree where the array does."""

    path: str
    shape: tuple[int, ...]
    axes: Axes | None
    """Its logical axes, or None where the model gave none."""
    kind: Kind
    matrix: Matrix | None
    """As a matrix, or None for what has no two sides."""

    @property
    def decays(self) -> bool:
        """Whether it decays where no rule says otherwise: kernels and heads do.

        Not so embeddings, positions and class tokens. big_vision decays what is called kernel, timm
        spares the last two, and OLMo 2 (arXiv 2501.00656) the first: decay makes embeddings small,
        and what the first norm sends back to a small vector is large.
        """
        return self.kind in ("kernel", "head")

    @property
    def hidden(self) -> bool:
        """Whether it is a matrix between features: what Muon is for."""
        return self.kind == "kernel" and self.matrix is not None


def describe(params: PyTree, axes: PyTree = None) -> PyTree:
    """A tree of `Parameter`: what each leaf of `params` is. Only paths and shapes are read.

    >>> import numpy as np
    >>> query = {"kernel": np.ones((8, 2, 4)), "bias": np.ones((2, 4))}
    >>> found = describe({"query": query})["query"]
    >>> found["kernel"].matrix, found["bias"].kind
    (Matrix(inputs=(0,), outputs=(1, 2)), 'bias')

    `axes` has the structure of `params`, with a tuple of names or None for each leaf; names for
    fewer dims than there are leave the last ones without. `UserError` if two leaves have one path.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in tree.flatten(params).items()}
    named = tree.axes_by_path(axes)
    kinds = tree.flatten(tree.match(KINDS, params, name="KINDS", default="", must_decide=False))
    stacks = _stacks(shapes, kinds)

    def describe_leaf(path: Sequence[Any], _: Any) -> Parameter:
        text = tree.path_text(path)
        names = named.get(text)
        if names is not None:
            unnamed = len(shapes[text]) - len(names)
            names = Axes((*names, *(None,) * unnamed)) if unnamed >= 0 else None
        if names is not None:
            own = [dim for dim, name in enumerate(names) if name not in STACKED]
        else:
            own = list(range(1 if _is_under(text, stacks) else 0, len(shapes[text])))
        kind = _kind(kinds[text], shapes[text], names, own)
        bias = shapes.get(_beside(text, "bias")) or shapes.get(_beside(text, "b"))
        matrix = None
        if kind in ("kernel", "head", "embedding", "position"):
            matrix = _matrix(text, shapes[text], names, own, bias)
        return Parameter(text, shapes[text], names, kind, matrix)

    return jax.tree_util.tree_map_with_path(describe_leaf, params)


def table(params: PyTree, axes: PyTree = None) -> list[tuple[str, str, str, str, str, str]]:
    """Rows (path, shape, axes, kind, decays, by Muon): what is decided where no rule is given.

    >>> import numpy as np
    >>> table({"head": {"kernel": np.ones((8, 3))}}, {"head": {"kernel": ("embed", "classes")}})
    [('head/kernel', '8x3', 'embed classes', 'head', 'yes', 'no')]
    """
    return [
        (
            leaf.path,
            "x".join(map(str, leaf.shape)),
            "none" if leaf.axes is None else " ".join(map(_axis_text, leaf.axes)),
            leaf.kind,
            "yes" if leaf.decays else "no",
            "yes" if leaf.hidden else "no",
        )
        for leaf in jax.tree.leaves(describe(params, axes))
    ]


def _kind(by_name: str, shape: tuple[int, ...], names: Axes | None, own: list[int]) -> Kind:
    """The kind of a parameter whose own dims (all but stacked ones) are `own`."""
    first, last = (names[own[0]], names[own[-1]]) if names and own else (None, None)
    if by_name in ("kernel", "head"):
        if len(own) < 2:
            return "vector"
        return "head" if by_name == "head" or last in OUTPUTS else "kernel"
    if by_name:
        return by_name  # type: ignore[return-value]
    if names and PLACES & {names[dim] for dim in own}:
        return "position"
    if len(own) > 1 and first in OUTPUTS:
        return "embedding"
    # Leading dims of 1 are there for broadcasting: an array (1, 1, D) is a vector.
    while own and shape[own[0]] == 1:
        own = own[1:]
    if len(own) < 2:
        return "vector"
    return "head" if last in OUTPUTS else "kernel"


def _matrix(
    path: str,
    shape: tuple[int, ...],
    names: Axes | None,
    own: list[int],
    bias: tuple[int, ...] | None,
) -> Matrix | None:
    """The two sides of an array whose own dims are `own`."""
    if len(own) < 2:
        return None
    if names is not None and any(names[dim] for dim in own):
        return _matrix_by_axes(names, own)
    if path.rsplit("/", 1)[-1] == "weight":  # as in PyTorch: outputs first
        return Matrix(tuple(own[1:]), (own[0],))
    outputs = 1
    if bias is not None:
        # The bias of a stack of layers has the stacked dim too.
        count = len(bias) - (len(shape) - len(own))
        if 0 < count < len(own) and shape[-count:] == bias[-count:]:
            outputs = count
    elif _QUERY.search(path):
        outputs = len(own) - 1
    return Matrix(tuple(own[:-outputs]), tuple(own[-outputs:]))


def _matrix_by_axes(names: Axes, own: list[int]) -> Matrix:
    """A convolution's places (dims without a name) belong to its inputs. Beside heads, a dim
    without a name is no place: it counts matrices, as the three of a fused query, key and value."""
    split = len(own) - 1
    if names[own[-1]] in HEADS:
        while split > 1 and names[own[split - 1]] in HEADS:
            split -= 1
    inputs, outputs = own[:split], own[split:]
    if HEADS & {names[dim] for dim in own}:
        inputs = [dim for dim in inputs if names[dim]] or inputs
    return Matrix(tuple(inputs), tuple(outputs))


def _stacks(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str]) -> set[str]:
    """Paths of modules all of whose arrays have one more dim in front: layers that `nn.scan` or
    `vmap` stacked, where no logical axis says so.

    All arrays under it begin with the same size, no kernel has fewer than three dims, and either
    its name is the one that Flax gives, or an array shows the dim: a norm's scale of two dims, or a
    bias with a dim that its kernel has in front, not behind.
    """
    modules: dict[str, list[str]] = {}
    for path in shapes:
        parts = path.split("/")[:-1]
        for end in range(len(parts) + 1):
            modules.setdefault("/".join(parts[:end]), []).append(path)
    found = set()
    for module, paths in modules.items():
        alike = len({shapes[path][:1] for path in paths}) == 1 and shapes[paths[0]]
        deep = all(len(shapes[path]) > 2 for path in paths if kinds[path] in ("kernel", "head"))
        if (
            alike
            and deep
            and (
                _TRANSFORMED.match(module.rsplit("/", 1)[-1])
                or any(_shows_a_stack(path, shapes, kinds) for path in paths)
            )
        ):
            found.add(module)
    return found


def _shows_a_stack(
    path: str, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str]
) -> bool:
    shape = shapes[path]
    if path.rsplit("/", 1)[-1] == "scale":
        return len(shape) == 2
    if kinds[path] != "bias" or len(shape) < 2:
        return False
    for name in ("kernel", "w"):
        kernel = shapes.get(_beside(path, name))
        if kernel is not None:
            behind = kernel[-len(shape) :] == shape
            in_front = kernel[:1] == shape[:1] and kernel[1 - len(shape) :] == shape[1:]
            return in_front and not behind
    weight = shapes.get(_beside(path, "weight"))
    return weight is not None and shape[1] > 1 and weight[: len(shape)] == shape


def _is_under(path: str, modules: set[str]) -> bool:
    parts = path.split("/")
    return any("/".join(parts[:end]) in modules for end in range(len(parts)))


def _beside(path: str, name: str) -> str:
    """The path of another parameter of the same module."""
    return "/".join([*path.split("/")[:-1], name])


def _axis_text(name: tree.AxisName) -> str:
    return "+".join(name) if isinstance(name, tuple) else name or "-"
