"""A loop over the blocks of a model: their parameters stacked, and one block's at a time looked at.

Blocks that are alike run as one `lax.scan`, so a program is as long as one of them. What the model
cannot know it is told by the training step, for the time of one trace (`told`): how the stacks lie
on the mesh, how one block's parameters are gathered in the loop, and what the backward pass may
keep of a block. Outside of a training step nothing is told, and the loop is a plain one.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtrain import tree
from jaxtrain.errors import UserError

GATHERED = "gathered parameters"
"""The name under which a rematerialisation policy knows them."""
Block = Callable[[jax.Array, tree.PyTree, Any], jax.Array]
"""`(x, parameters, extra) -> x`."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a parameter lies on the mesh, by its path."""

    stacked: Callable[[str, jax.Array], jax.Array]
    """A stack of parameters, each laid out as the one at this path is."""
    gathered: Callable[[str, jax.Array], jax.Array]
    """One of them as a product wants it."""


@dataclasses.dataclass(frozen=True)
class Told:
    """What holds for the loops that are traced now."""

    layout: Layout | None = None
    keep: Any = None
    """The rematerialisation policy of each block; None for all that the backward pass asks for."""


NOTHING = Told()
_TOLD: contextvars.ContextVar[Told] = contextvars.ContextVar("block_loop")


@contextlib.contextmanager
def told(**changes: Any) -> Iterator[None]:
    """Changes what the loops are told, field by field of `Told`, while it is open."""
    token = _TOLD.set(dataclasses.replace(_TOLD.get(NOTHING), **changes))
    try:
        yield
    finally:
        _TOLD.reset(token)


def looped(model: Any) -> tuple[str, ...]:
    """The names of the top-level parameters that this model gives to `run` in its forward pass.

    >>> looped(object())
    ()

    A model says so with an attribute `looped_blocks`. These are not gathered before the model, and
    `--remat` reaches them in the loop.
    """
    return tuple(getattr(model, "looped_blocks", ()))


def run(
    blocks: Sequence[Block],
    x: jax.Array,
    parameters: Sequence[tree.PyTree],
    extras: tree.PyTree = None,
    *,
    names: Sequence[str],
) -> jax.Array:
    """`x` through all blocks, one after another.

    >>> doubled, added = (lambda x, w, _: 2 * x * w), (lambda x, w, _: x + w)
    >>> ones = [jnp.ones(())] * 5
    >>> float(run([doubled, added], jnp.ones(()), ones, names=["a", "b", "c", "d", "e"]))
    14.0

    `blocks` repeat until each of `parameters` has been used; in one turn of the loop each runs
    once, and those that are left after the last whole turn run after it. `extras` has a leading dim
    with an entry for each block. `names` are the paths of the parameters within the model's.
    """
    now, depth, period = _TOLD.get(NOTHING), len(parameters), len(blocks)
    turns = depth // period
    # A loop of one turn is none to the compiler, which would then find the second gather needless.
    alone = turns == 1

    def call(index: int, x: jax.Array, leaves: tree.PyTree, extra: Any, *, lone: bool) -> jax.Array:
        def block(x: jax.Array, leaves: tree.PyTree, extra: Any) -> jax.Array:
            return blocks[index % period](x, _gathered(now, names[index], leaves), extra)

        policy = now.keep
        if policy is None and now.layout is not None:
            policy = all_but_gathered
        if policy is not None:
            block = jax.checkpoint(block, policy=policy, prevent_cse=lone)
        return block(x, leaves, extra)

    def body(x: jax.Array, turn: Any) -> tuple[jax.Array, None]:
        for place, (leaves, extra) in enumerate(zip(*turn, strict=True)):
            x = call(place, x, leaves, extra, lone=alone)
        return x, None

    def extras_of(entry: Any) -> Any:
        return jax.tree.map(lambda array: array[entry], extras)

    whole = turns * period
    if turns:
        places = range(period)
        stacks = [_stacked(now, names[place], parameters[place:whole:period]) for place in places]
        along = [extras_of(slice(place, whole, period)) for place in places]
        x, _ = jax.lax.scan(body, x, (stacks, along))
    for index in range(whole, depth):
        x = call(index, x, parameters[index], extras_of(index), lone=True)
    return x


def all_but_gathered(primitive: Any, *_: Any, call_jaxpr: Any = None, **params: Any) -> bool:
    """The rematerialisation policy that keeps everything but gathered parameters: what has their
    name, and what it is the name of, a call that does nothing but lay an array out."""
    if call_jaxpr is not None and primitive.name.startswith("custom_vjp"):
        return any(each.primitive.name != "sharding_constraint" for each in call_jaxpr.eqns)
    return primitive.name != "sharding_constraint" and params.get("name") != GATHERED


def _stacked(now: Told, name: str, trees: Sequence[tree.PyTree]) -> tree.PyTree:
    if len({jax.tree.structure(each) for each in trees}) > 1:
        raise UserError(
            f"--model.scan: {name} and others of its kind hold different parameters, which one loop"
            " cannot run over; adapt all of them (--lora.pattern), or set --model.scan=false"
        )

    def one(path: Any, *leaves: jax.Array) -> jax.Array:
        stack = jnp.stack(leaves)
        return stack if now.layout is None else now.layout.stacked(_path(name, path), stack)

    return jax.tree_util.tree_map_with_path(one, *trees)


def _gathered(now: Told, name: str, leaves: tree.PyTree) -> tree.PyTree:
    layout = now.layout
    if layout is None:
        return leaves
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: checkpoint_name(layout.gathered(_path(name, path), leaf), GATHERED),
        leaves,
    )


def _path(name: str, path: Any) -> str:
    return "/".join(part for part in (name, tree.path_text(path)) if part)
