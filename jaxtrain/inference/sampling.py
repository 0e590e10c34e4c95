"""Texts from a decoder: prompts go into a cache, then each token is drawn from what the model says
after the ones before it.

Programs are compiled once for a batch size, a capacity of the cache and a bucket of prompt lengths,
whatever the settings. The last token of each prompt is fed by the program that feeds the tokens
that are drawn, so prompts need no logits at all; and a whole text may come out of one dispatch, or
a token out of each: it is the same program.

Dims: B batch, T tokens of a piece of the prompts, V vocabulary, S tokens that end a text.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain import messages, rng, tree
from jaxtrain.errors import UserError
from jaxtrain.inference import drawing, exact
from jaxtrain.inference.drawing import Drawing
from jaxtrain.models import cache
from jaxtrain.models.cache import Cache
from jaxtrain.parallel import mesh as meshes
from jaxtrain.parallel import sharding

ENDED = -1
"""What `stream` yields for a row whose text has ended."""
ROUND = 64
"""Room in a cache is a multiple of it, so that lengths share programs."""
DISPATCH = 64
"""How many tokens one dispatch draws at most."""
SHORTEST, LONGEST = 16, 512
"""Pieces of prompts have lengths between the two, powers of two."""


class Options(TypedDict, total=False):
    """What `generate` and `stream` may be told."""

    most: int
    """Tokens to draw; 200 unless given."""
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    """See `Drawing`."""
    stop: Sequence[int]
    """Tokens that end a text; they are not part of it."""
    seed: int
    """Of the draws. They depend on it, the row and the place in the text, and on nothing else."""
    rows: Sequence[int]
    """The number of each prompt for its draws; 0, 1, ... unless given."""
    capacity: int
    """Tokens that the cache has room for; 0 for as many as needed, rounded up."""
    slide: bool
    """Where learned positions run out, go on from the last half of the text."""
    reproducible: bool
    """All sums in one order (`exact.exactly`): logits are then to the bit those of one pass,
    whatever the batch, the lengths and the capacity; slower, on one CPU device."""


@dataclasses.dataclass(frozen=True)
class _Job:
    """Checked settings of one call."""

    most: int
    drawing: Drawing
    stop: tuple[int, ...]
    seed: int
    rows: tuple[int, ...]
    capacity: int
    slide: bool
    reproducible: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """What goes from dispatch to dispatch."""

    cache: Cache
    token_B: jax.Array
    """Fed next."""
    ended_B: jax.Array
    place: jax.Array
    """Tokens drawn so far."""


def generate(
    model: Any, params: tree.PyTree, prompts: Sequence[Any], **options: Unpack[Options]
) -> list[np.ndarray]:
    """What follows each prompt, int32 arrays without the prompt and without the stop token.

    >>> from jaxtrain.models import Transformer
    >>> model = Transformer(vocabulary=7, width=8, depth=1, heads=2)
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    >>> [len(text) for text in generate(model, params, [[1, 2, 3], [4]], most=5)]
    [5, 5]

    Prompts are sequences of ids, of any lengths. Each row is drawn as if it were alone. `params`
    may lie on a mesh. `UserError` for a prompt that is empty, holds an id that the model does not
    know, or has no room, and for logits that are nan.
    """
    pieces = list(_pieces(model, params, prompts, DISPATCH, options))
    texts_BT = np.concatenate(pieces, axis=1)
    return [text[: np.argmax(text < 0) if (text < 0).any() else None] for text in texts_BT]


def stream(
    model: Any, params: tree.PyTree, prompts: Sequence[Any], **options: Unpack[Options]
) -> Iterator[np.ndarray]:
    """The same as it arrives: the next token of each row, int32 (B,), `ENDED` for rows that have.

    Ends when all have, or after `most` tokens.
    """
    for piece_BT in _pieces(model, params, prompts, 1, options):
        if (piece_BT[:, 0] == ENDED).all():
            return
        yield piece_BT[:, 0]


def bucket(length: int, shortest: int = SHORTEST) -> int:
    """The next power of two, at least `shortest`: few programs for many lengths.

    >>> bucket(3), bucket(17), bucket(0, 8)
    (16, 32, 8)
    """
    return max(shortest, 2 ** max(length - 1, 0).bit_length())


def check(model: Any, prompts: Sequence[Any], **options: Unpack[Options]) -> None:
    """`UserError` for prompts and options that `generate` would refuse; nothing is computed."""
    _job(model, _checked_prompts(model, prompts), options)


def _pieces(
    model: Any, params: tree.PyTree, prompts: Sequence[Any], each: int, options: Options
) -> Iterator[np.ndarray]:
    """New tokens (B, at most `each`) of all rows, dispatch by dispatch."""
    params = nn.meta.unbox(params)
    texts = _checked_prompts(model, prompts)
    job = _job(model, texts, options)
    mesh = mesh_of(params)
    if job.reproducible and mesh is not None:
        raise UserError(
            "reproducible=True: the parameters lie on a mesh, which adds in an order of its own;"
            " put them on one device"
        )
    programs = _programs(
        model, len(texts), job.capacity, str(params["embed"].dtype), mesh, job.reproducible
    )
    program = programs.drawing(job.drawing.greedy, job.drawing.filtered)
    keys_B = rng.per_example(rng.root(job.seed), jnp.asarray(job.rows, jnp.uint32))
    stop_S = np.full(bucket(len(job.stop), 8), ENDED, np.int32)
    stop_S[: len(job.stop)] = job.stop
    state = _filled(programs, params, texts, np.zeros(len(texts), bool), 0)
    done = 0
    while done < job.most:
        room = job.capacity - max(len(text) for text in texts) + 1
        if room < 1:
            half = job.capacity // 2 + 1
            texts = [text[-half:] if len(text) > job.capacity else text for text in texts]
            state = _filled(programs, params, texts, np.asarray(state.ended_B), done)
            continue
        count = min(each, job.most - done, room)
        state, piece = program(params, state, keys_B, stop_S, job.drawing.numbers(), count)
        piece_BT = np.asarray(piece)[:, :count]
        _check_known(piece_BT, job, done)
        yield piece_BT
        texts = [np.append(text, row[row >= 0]) for text, row in zip(texts, piece_BT, strict=True)]
        done += count
        if (piece_BT[:, -1] == ENDED).all():
            return


def _filled(
    programs: "_Programs",
    params: tree.PyTree,
    texts: Sequence[np.ndarray],
    ended_B: np.ndarray,
    place: int,
) -> _State:
    """A cache with all but the last token of each text, which is the next one fed."""
    state = programs.start(
        np.array([text[-1] for text in texts], np.int32), ended_B, np.array(place, np.int32)
    )
    longest = max(len(text) for text in texts) - 1
    for start in range(0, longest, LONGEST):
        # no more than there is room for, which is no more than learned positions
        length = min(bucket(min(longest - start, LONGEST), SHORTEST), programs.capacity)
        tokens_BT = np.zeros((len(texts), length), np.int32)
        segments_BT = np.zeros_like(tokens_BT)
        for row, text in enumerate(texts):
            part = text[:-1][start : start + LONGEST]
            tokens_BT[row, : len(part)], segments_BT[row, : len(part)] = part, 1
        state = programs.fill(params, state, tokens_BT, segments_BT)
    return state


@dataclasses.dataclass(frozen=True)
class _Programs:
    """The compiled functions for one model, batch size, capacity and mesh."""

    model: Any
    batch: int
    capacity: int
    dtype: str
    mesh: Mesh | None
    reproducible: bool = False

    @functools.cached_property
    def start(self) -> Callable[[np.ndarray, np.ndarray, np.ndarray], _State]:
        """`(token_B, ended_B, place)` as a state that has seen nothing."""
        return jax.jit(self._started, out_shardings=self._shardings)

    @functools.cached_property
    def fill(self) -> Callable[..., _State]:
        """`(params, state, tokens_BT, segments_BT)` as the state with a piece of the prompts in its
        cache; the state is taken over."""
        return jax.jit(self._filled, donate_argnums=1, out_shardings=self._shardings)

    def drawing(self, greedy: bool, filtered: bool) -> Callable[..., tuple[_State, jax.Array]]:
        """`(params, state, keys_B, stop_S, numbers, count)` as the state after `count` more tokens
        of each row, and those, (B, `DISPATCH`); the state is taken over."""
        return self._drawing[greedy, filtered]

    @functools.cached_property
    def _drawing(self) -> dict[tuple[bool, bool], Callable[..., tuple[_State, jax.Array]]]:
        places = None if self._shardings is None else (self._shardings, self._whole)
        return {
            (greedy, filtered): jax.jit(
                functools.partial(self._drawn, greedy, filtered),
                donate_argnums=1,
                out_shardings=places,
            )
            for greedy in (False, True)
            for filtered in (False, True)
        }

    @functools.cached_property
    def _whole(self) -> NamedSharding | None:
        return None if self.mesh is None else sharding.replicated(self.mesh)

    @functools.cached_property
    def _shardings(self) -> Any:
        """Where a state lies: the same for every program, or each would be compiled again for the
        state of another."""
        if self.mesh is None:
            return None
        mesh = self.mesh
        rows = meshes.BATCH_AXES if self.batch % meshes.batch_shards(mesh) == 0 else None
        heads = self.model.block_settings().key_heads
        axis = "tensor" if heads % mesh.shape["tensor"] == 0 else None
        held = NamedSharding(mesh, PartitionSpec(rows, None, axis))
        token_B = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        state = jax.eval_shape(self._started, token_B, token_B, token_B)
        return jax.tree.map(lambda leaf: held if leaf.ndim == 4 else self._whole, state)

    def _started(self, token_B: jax.Array, ended_B: jax.Array, place: jax.Array) -> _State:
        ordered = self.reproducible
        held = cache.empty(self.model, self.batch, self.capacity, self.dtype, ordered=ordered)
        return _State(held, token_B, ended_B, place)

    def _applied(
        self, params: tree.PyTree, tokens_BT: jax.Array, segments_BT: jax.Array, held: Cache
    ) -> tuple[jax.Array, Cache]:
        """The logits of the next tokens, and the cache with them."""

        def apply(params: tree.PyTree, tokens: jax.Array, segments: jax.Array, held: Cache) -> Any:
            return self.model.apply({"params": params}, tokens, segments=segments, cache=held)

        chosen = exact.exactly(apply) if self.reproducible else apply
        return chosen(params, tokens_BT, segments_BT, held)

    def _filled(
        self, params: tree.PyTree, state: _State, tokens_BT: jax.Array, segments_BT: jax.Array
    ) -> _State:
        # nothing looks at the logits, so the compiler leaves the head out
        _, held = self._applied(params, tokens_BT, segments_BT, state.cache)
        return dataclasses.replace(state, cache=held)

    def _drawn(
        self,
        greedy: bool,
        filtered: bool,
        params: tree.PyTree,
        state: _State,
        keys_B: jax.Array,
        stop_S: jax.Array,
        numbers: Any,
        count: jax.Array,
    ) -> tuple[_State, jax.Array]:
        def unfinished(carry: tuple[_State, jax.Array, jax.Array]) -> jax.Array:
            state, _, index = carry
            return (index < count) & ~state.ended_B.all()

        def step(
            carry: tuple[_State, jax.Array, jax.Array],
        ) -> tuple[_State, jax.Array, jax.Array]:
            state, tokens_BT, index = carry
            segments_B1 = jnp.where(state.ended_B, 0, 1)[:, None]
            logits_B1V, held = self._applied(
                params, state.token_B[:, None], segments_B1, state.cache
            )
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.place)
            token_B = drawing.drawn(
                logits_B1V[:, 0], keys, numbers, greedy=greedy, filtered=filtered
            )
            stops_B = (token_B[:, None] == stop_S[None]).any(axis=1)
            shown_B = jnp.where(state.ended_B | stops_B, ENDED, token_B)
            ended_B = shown_B < 0
            tokens_BT = jax.lax.dynamic_update_index_in_dim(tokens_BT, shown_B, index, axis=1)
            fed_B = jnp.maximum(shown_B, 0)
            return _State(held, fed_B, ended_B, state.place + 1), tokens_BT, index + 1

        none_BT = jnp.full((self.batch, DISPATCH), ENDED, jnp.int32)
        state, tokens_BT, _ = jax.lax.while_loop(unfinished, step, (state, none_BT, jnp.int32(0)))
        return state, tokens_BT


@functools.lru_cache(maxsize=8)
def _programs(
    model: Any,
    batch: int,
    capacity: int,
    dtype: str,
    mesh: Mesh | None,
    reproducible: bool,
) -> _Programs:
    return _Programs(model, batch, capacity, dtype, mesh, reproducible)


def mesh_of(params: tree.PyTree) -> Mesh | None:
    """The mesh that the parameters lie on, if they lie on more than one device."""
    for leaf in jax.tree.leaves(params):
        place = getattr(leaf, "sharding", None)
        if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh):
            return place.mesh
    return None


def _checked_prompts(model: Any, prompts: Sequence[Any]) -> list[np.ndarray]:
    """The prompts as int32 arrays; `UserError` if one cannot be fed."""
    if not isinstance(model, cache.Decoder):
        raise UserError(
            f"{type(model).__name__}: takes no cache, which sampling needs; give a Transformer"
        )
    if not len(prompts):
        raise UserError("no prompts; give at least one, as ids of tokens")
    texts = []
    for row, prompt in enumerate(prompts):
        text = np.asarray(prompt)
        if text.ndim != 1 or (text.size and text.dtype.kind not in "iu"):
            raise UserError(
                f"prompt {row}: {text.dtype}{list(text.shape)} is no sequence of token ids; encode"
                " it with the model's tokenizer"
            )
        if not text.size:
            raise UserError(f"prompt {row}: is empty; give it a token, such as the tokenizer's BOS")
        if wrong := text[(text < 0) | (text >= model.vocabulary)].tolist():
            raise UserError(
                f"prompt {row}: token {wrong[0]} is none of the model's {model.vocabulary}"
                f" (0..{model.vocabulary - 1}); is it encoded by the model's tokenizer?"
            )
        texts.append(text.astype(np.int32))
    return texts


def _job(model: Any, texts: Sequence[np.ndarray], options: Options) -> _Job:
    """The options with what they are if not given; `UserError` if one is none, or there is no
    room."""
    given: dict[str, Any] = dict(options)
    for name in given:
        if name not in (known := Options.__annotations__):
            raise UserError(f"{name}: no option of sampling{messages.did_you_mean(name, known)}")
    most, rows = given.get("most", 200), tuple(given.get("rows", range(len(texts))))
    if most < 1:
        raise UserError(f"most={most}: must be at least 1")
    if len(rows) != len(texts):
        raise UserError(f"rows={list(rows)}: must be a number for each of {len(texts)} prompts")
    stop = tuple(dict.fromkeys(int(token) for token in given.get("stop", ())))
    if wrong := [token for token in stop if not 0 <= token < model.vocabulary]:
        raise UserError(
            f"stop={list(stop)}: token {wrong[0]} is none of the model's {model.vocabulary}"
            f" (0..{model.vocabulary - 1})"
        )
    names = [field.name for field in dataclasses.fields(Drawing)]
    settings = Drawing(**{name: given[name] for name in names if name in given})
    slide = bool(given.get("slide", False))
    capacity = _capacity(model, max(map(len, texts)), most, given.get("capacity", 0), slide)
    seed, reproducible = given.get("seed", 0), bool(given.get("reproducible", False))
    return _Job(most, settings, stop, seed, rows, capacity, slide, reproducible)


def _capacity(model: Any, longest: int, most: int, asked: int, slide: bool) -> int:
    """Tokens that the cache has room for; the last token drawn is never fed."""
    needed = longest + most - 1
    learned = model.positions == "learned"
    limit = model.max_length if learned else None
    if learned and asked > model.max_length:
        raise UserError(
            f"capacity={asked}: the model has max_length={model.max_length} learned positions; ask"
            " for no more than that"
        )
    room = asked or limit or needed
    where = f"capacity={asked}" if asked else f"the model's max_length={limit}"
    if longest > room:
        raise UserError(
            f"a prompt of {longest} tokens is longer than the cache ({where}); shorten it to"
            f" {room} tokens at most"
        )
    if needed > room and not slide:
        fits = f"most={room - longest + 1}, or " if room >= longest else ""
        raise UserError(
            f"a prompt of {longest} tokens and most={most} new ones need room for {needed}, more"
            f" than {where}; set {fits}slide=True, which goes on from the last half of the text"
        )
    rounded = asked or -(-needed // ROUND) * ROUND
    return min(rounded, room) if asked or limit else rounded


def _check_known(piece_BT: np.ndarray, job: _Job, done: int) -> None:
    """`UserError` if the model said nan."""
    rows, places = np.nonzero(piece_BT == drawing.UNKNOWN)
    if rows.size:
        first = np.argmin(places)
        raise UserError(
            f"prompt {rows[first]}: after {done + places[first]} new tokens the model's logits are"
            " nan; its parameters are damaged, or their dtype is too narrow"
        )
