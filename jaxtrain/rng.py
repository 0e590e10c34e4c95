"""Random streams by name: the root key folded with a name and a step, so that adding a stream never
moves another."""

import zlib

import jax
from jax.typing import ArrayLike


def root(seed: ArrayLike) -> jax.Array:
    """The root key of a run: typed, threefry (the one generator whose bits do not depend on the
    layout of the arrays)."""
    return jax.random.key(seed, impl="threefry2x32")


def stream(key: jax.Array, name: str, step: ArrayLike) -> jax.Array:
    """The key of the stream `name` at `step`.

    >>> first, second = (stream(root(0), name, 3) for name in ("dropout", "augment"))
    >>> bool((jax.random.key_data(first) == jax.random.key_data(second)).all())
    False
    """
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), step)


def per_example(key: jax.Array, ids_B: jax.Array) -> jax.Array:
    """One key for each example id, (B,): what happens to an example does not depend on its place in
    the batch."""
    return jax.vmap(lambda example: jax.random.fold_in(key, example))(ids_B)
