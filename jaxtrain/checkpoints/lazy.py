"""Arrays that are still in their files: their shape is known, they can be transposed, split and
cut, and only the box that somebody asks for is read.

A mapping of names between two libraries is written with `.T`, `.reshape` and slices, as for NumPy
arrays, and costs no memory; `placed` then gives each device the part that it holds, so that no
device and no host ever holds the whole model.
"""

import dataclasses
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.errors import UserError

AGAIN = "download it again, or convert it anew"
Box = tuple[tuple[int, int], ...]
"""First and one past the last place of each dim."""


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array of which any box can be read.

    >>> whole = of(np.arange(12.0).reshape(4, 3))
    >>> other = whole.T.reshape(3, 2, 2)[1:]
    >>> other.shape, other.read()[0].tolist()
    ((2, 2, 2), [[1.0, 4.0], [7.0, 10.0]])
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read_box: Callable[[Box], np.ndarray]
    cost: Callable[[Box], int]
    """How many numbers have to be read for a box."""

    @property
    def ndim(self) -> int:
        """How many dims it has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> "Lazy":
        """With its dims the other way round."""
        return self.transpose()

    def transpose(self, *axes: Any) -> "Lazy":
        """With its dims in another order."""
        order = _integers(axes) or tuple(reversed(range(self.ndim)))
        order = tuple(axis % self.ndim for axis in order)

        def inner(box: Box) -> Box:
            return tuple(box[order.index(dim)] for dim in range(self.ndim))

        shape = tuple(self.shape[axis] for axis in order)
        return self._made(shape, inner, lambda found, box: found.transpose(order))

    def reshape(self, *shape: Any, order: str = "C") -> "Lazy":
        """With other dims of as many numbers; one may be -1."""
        assert order == "C", order
        wanted = _integers(shape)
        if -1 in wanted:
            rest = math.prod(size for size in wanted if size != -1)
            wanted = tuple(self.size // max(rest, 1) if size == -1 else size for size in wanted)
        if math.prod(wanted) != self.size:
            raise ValueError(f"cannot reshape {self.shape} into {wanted}")
        groups = _groups(self.shape, wanted)
        old = [[self.shape[dim] for dim in dims] for dims, _ in groups]
        new = [[wanted[dim] for dim in dims] for _, dims in groups]

        def inner(box: Box) -> Box:
            found: list[tuple[int, int]] = []
            for (_, dims), before, after in zip(groups, old, new, strict=True):
                found += _covering(before, after, [box[dim] for dim in dims])[0]
            return tuple(found)

        def outer(rows: np.ndarray, box: Box) -> np.ndarray:
            if not box_size(box):
                return np.empty([high - low for low, high in box], rows.dtype)
            covers = [
                _covering(before, after, [box[dim] for dim in dims])
                for (_, dims), before, after in zip(groups, old, new, strict=True)
            ]
            flat = rows.reshape([math.prod(b - a for a, b in inside) for inside, _ in covers])
            flat = flat[tuple(slice(low, high) for _, (low, high) in covers)]
            split, cut = [], []
            for (_, dims), after in zip(groups, new, strict=True):
                split += [box[dim][1] - box[dim][0] for dim in dims[:1]] + after[1:]
                cut += [slice(None) for _ in dims[:1]] + [slice(*box[dim]) for dim in dims[1:]]
            return flat.reshape(split)[tuple(cut)]

        return self._made(wanted, inner, outer)

    def __getitem__(self, index: Any) -> "Lazy":
        parts = index if isinstance(index, tuple) else (index,)
        if Ellipsis in parts:
            place = parts.index(Ellipsis)
            fill = (slice(None),) * (self.ndim - len(parts) + 1)
            parts = (*parts[:place], *fill, *parts[place + 1 :])
        parts += (slice(None),) * (self.ndim - len(parts))
        starts: list[int] = []
        shape: list[int] = []
        for part, size in zip(parts, self.shape, strict=True):
            if isinstance(part, slice):
                start, stop, step = part.indices(size)
                if step != 1:
                    raise IndexError("only slices of step 1")
                shape.append(max(0, stop - start))
            else:
                start = range(size)[part]
            starts.append(start)
        kept = [isinstance(part, slice) for part in parts]

        def inner(box: Box) -> Box:
            given = iter(box)
            spans = [next(given) if keep else (0, 1) for keep in kept]
            return tuple((s + a, s + b) for s, (a, b) in zip(starts, spans, strict=True))

        return self._made(
            tuple(shape), inner, lambda found, box: found.reshape([b - a for a, b in box])
        )

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Lazy":
        """With a function of each number, which keeps the dtype."""
        return self._made(self.shape, lambda box: box, lambda found, box: function(found))

    def astype(self, dtype: Any, **_: Any) -> "Lazy":
        """In another dtype."""
        target = np.dtype(dtype)
        cast = self._made(self.shape, lambda box: box, lambda found, box: found.astype(target))
        return dataclasses.replace(cast, dtype=target)

    def read(self) -> np.ndarray:
        """All numbers."""
        return self.read_box(tuple((0, size) for size in self.shape))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self.read()
        return found if dtype is None else found.astype(dtype)

    def _made(
        self,
        shape: tuple[int, ...],
        inner: Callable[[Box], Box],
        outer: Callable[[np.ndarray, Box], np.ndarray],
    ) -> "Lazy":
        """What `outer` makes of this array's box `inner(box)`."""
        return Lazy(
            shape,
            self.dtype,
            lambda box: outer(self.read_box(inner(box)), box),
            lambda box: self.cost(inner(box)),
        )


def of(array: Any) -> Lazy:
    """An array that is there already, of NumPy or of JAX."""

    def read_box(box: Box) -> np.ndarray:
        return np.asarray(array[tuple(slice(low, high) for low, high in box)])

    return Lazy(tuple(array.shape), np.dtype(array.dtype), read_box, box_size)


def check_floating(shown: str, name: str, tensor: Any) -> None:
    """`UserError` for a weight of whole numbers, such as a quantised file has without its scales.

    >>> check_floating("m.safetensors", "a", np.ones(2, np.float16))
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(
            f"{shown}: {name} is {tensor.dtype}, and weights are floats; take the files that are"
            " not quantised, in BF16 or F32"
        )


def box_size(box: Box) -> int:
    """How many numbers a box has.

    >>> box_size(((0, 2), (3, 6)))
    6
    """
    return math.prod(high - low for low, high in box)


def placed(path: str, source: Any, like: Any) -> jax.Array:
    """The array where `like` says, in its dtype: each device gets its own part, and this process
    reads no more than its devices hold.

    A part that several devices hold is read once. Where parts lie across the rows of the file, so
    that each would read the same rows again, they are read at once and then cut: that is one whole
    array at most, let go before the next. `UserError` for another shape, and for values that the
    dtype cannot hold, or that are not finite.
    """
    lazy = source if isinstance(source, Lazy) else of(np.asarray(source))
    if lazy.shape != tuple(like.shape):
        raise UserError(f"{path}: the file has {lazy.shape}, the model {tuple(like.shape)}")
    where = getattr(like, "sharding", None)
    if where is None:
        return jax.device_put(_cast(path, lazy.read(), like.dtype))
    holders: dict[Box, list[Any]] = {}
    for device, index in where.addressable_devices_indices_map(lazy.shape).items():
        box = tuple(
            part.indices(size)[:2] for part, size in zip(index or (), lazy.shape, strict=True)
        )
        holders.setdefault(box, []).append(device)
    parts: list[jax.Array] = []
    for box, value in _boxes(lazy, list(holders)):
        part = _cast(path, value, like.dtype)
        for device in holders[box]:
            alone = jax.sharding.SingleDeviceSharding(device, memory_kind=where.memory_kind)
            parts.append(jax.device_put(part, alone))
        jax.block_until_ready(parts[-1])
        del value, part
    # jax lets go of the memory that it has copied only when Python collects garbage
    gc.collect(0)
    return jax.make_array_from_single_device_arrays(lazy.shape, where, parts, dtype=like.dtype)


def _boxes(lazy: Lazy, boxes: Sequence[Box]) -> Iterator[tuple[Box, np.ndarray]]:
    """The numbers of each box, read one by one, or at once if that reads less."""
    if not boxes:
        return
    hull = tuple(
        (min(low for low, _ in spans), max(high for _, high in spans))
        for spans in zip(*boxes, strict=True)
    )
    if sum(map(lazy.cost, boxes)) <= lazy.cost(hull) * 1.25:
        for box in boxes:
            yield box, lazy.read_box(box)
        return
    whole = lazy.read_box(hull)
    for box in boxes:
        spans = zip(box, hull, strict=True)
        yield box, whole[tuple(slice(a - first, b - first) for (a, b), (first, _) in spans)]


def _cast(path: str, value: np.ndarray, dtype: Any) -> np.ndarray:
    target = np.dtype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.ascontiguousarray(value.astype(target, copy=False)).reshape(value.shape)
    if cast.dtype.kind in "fcV" and not np.isfinite(cast).all():
        if np.isfinite(value).all():
            raise UserError(f"{path}: values of {value.dtype} do not fit into {target}")
        raise UserError(f"{path} holds NaN or infinity; {AGAIN}")
    return cast


def _integers(given: Sequence[Any]) -> tuple[int, ...]:
    """The arguments of `reshape(2, 3)` as well as of `reshape((2, 3))`."""
    if len(given) == 1 and not isinstance(given[0], int | np.integer):
        return tuple(int(each) for each in given[0] or ())
    return tuple(int(each) for each in given)


Groups = list[tuple[list[int], list[int]]]


def _groups(old: Sequence[int], new: Sequence[int]) -> Groups:
    """Dims before and after a reshape that are made of the same numbers.

    >>> _groups((4, 6), (2, 2, 6))
    [([0], [0, 1]), ([1], [2])]
    """
    if 0 in old or 0 in new:
        return [(list(range(len(old))), list(range(len(new))))]
    groups: Groups = []
    first = second = 0
    while first < len(old) or second < len(new):
        befores, afters = [], []
        sizes = [1, 1]
        while not (befores or afters) or sizes[0] != sizes[1]:
            if second < len(new) and (sizes[1] <= sizes[0] and afters == [] or sizes[1] < sizes[0]):
                afters.append(second)
                sizes[1] *= new[second]
                second += 1
            elif first < len(old):
                befores.append(first)
                sizes[0] *= old[first]
                first += 1
            else:
                afters.append(second)
                sizes[1] *= new[second]
                second += 1
        groups.append((befores, afters))
    return groups


def _covering(
    old: Sequence[int], new: Sequence[int], spans: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Of one group: the spans of the old dims that hold those of the new ones, and which of their
    numbers, in a row, the first of the new dims takes.

    >>> _covering([6], [3, 2], [(1, 2), (0, 1)])
    ([(2, 4)], (0, 2))
    """
    row = math.prod(old[1:])
    low, high = (edge * math.prod(new[1:]) for edge in spans[0]) if spans else (0, math.prod(old))
    if not old:
        return [], (0, 1)
    first, last = (low // row, -(-high // row)) if row else (0, old[0])
    rest = [(0, size) for size in old[1:]]
    return [(first, last), *rest], (low - first * row, high - first * row)
