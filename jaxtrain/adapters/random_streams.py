"""Random streams of a model by name, all from the one key of a pass."""

import zlib
from typing import Any

import jax


def stream(key: jax.Array, name: str) -> jax.Array:
    """The key of the stream `name`: of `dropout` the key itself, of any other the key folded with
    its name.

    >>> key = jax.random.key(0)
    >>> stream(key, "dropout") is key, bool(stream(key, "noise") == key)
    (True, False)
    """
    return key if name == "dropout" else jax.random.fold_in(key, zlib.crc32(name.encode()))


@jax.tree_util.register_pytree_node_class
class Streams(dict[str, jax.Array]):
    """The streams of one key as a mapping that holds every name, as functions take it that name an
    argument `rngs`.

    >>> streams = Streams(jax.random.key(0))
    >>> "noise" in streams, list(streams), streams["noise"].shape
    (True, ['dropout'], ())
    """

    def __init__(self, key: jax.Array) -> None:
        super().__init__(dropout=key)

    def __missing__(self, name: str) -> jax.Array:
        return stream(self["dropout"], name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str)

    def get(self, name: str, default: Any = None) -> Any:
        """The stream of this name; there is always one."""
        del default
        return self[name]

    def tree_flatten(self) -> tuple[tuple[jax.Array], None]:
        """The key, as jax asks for it."""
        return (self["dropout"],), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: tuple[jax.Array]) -> "Streams":
        """The streams of the key, as jax asks for them."""
        return cls(*leaves)
