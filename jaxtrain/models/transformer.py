"""The transformer over tokens: one block whose settings are the families that people use.

GPT-2's arrangement (Radford et al. 2019) is the default; Llama, Mistral, Qwen, Gemma, OLMo and
SmolLM are other values of the same fields (`models.sizes` has them by name). Parameters are laid
out by block, `block0` to the last, whatever the program does with them: `scan` stacks them inside
the compiled step only, so checkpoints, optimizers and rules never see a difference. It computes in
the dtype of its parameters: tokens are integers, so the embedding decides the stream. Norms, the
softmax and rotations are float32 inside.

Dims: B batch, T tokens of a sequence, V vocabulary, D model width, N heads, M heads of keys and
values, K head width, F hidden width, R pairs that are turned, P learned positions.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from jaxtrain import block_loop
from jaxtrain.errors import UserError
from jaxtrain.fields import Above, AtLeast, Between, Count, DropRate
from jaxtrain.late_logits import LateLogits
from jaxtrain.models import layers, rotary, token_inputs
from jaxtrain.models.attention import attention
from jaxtrain.models.cache import BlockCache, Cache, extended

SMALL_NORMAL = nn.initializers.normal(0.02)
Kind = Literal["full", "window", "unrotated"]
Arrangement = Literal["pre", "post", "output", "sandwich"]
Bias = Literal["all", "qkv", "attention", "none"]
Norm = Literal["layer", "rms"]
NotNegative = Annotated[float, AtLeast(0)]
Whole = Annotated[int, AtLeast(0)]


class Transformer(nn.Module):
    """Tokens (B, T) in; for each place (B, T, V), the logits of the token that comes next.

    >>> model = Transformer(vocabulary=11, width=16, depth=1, heads=2)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    >>> model.apply(variables, jnp.zeros((2, 8), jnp.int32)).shape
    (2, 8, 11)

    A place sees itself and what is before it; with `segments` (B, T) only what has its number, and
    0 is padding. `positions` (B, T) count from 0, with segments the tokens of each, whatever stands
    between them, unless they are given; a negative one says nothing at padding, and makes the
    sequence of a token nan. A window is as wide with padding in it. Any length will do with rotary
    positions, up to `max_length` with learned ones. With a
    `cache` the tokens go on from what it holds, segments only tell padding from tokens, and
    (logits, cache) come back. With `chunk` the answer is `LateLogits`, which a loss goes over in
    parts. `UserError` if the input is no (batch, length) of integers or too long, or the settings
    do not fit together. A token beyond the vocabulary makes its sequence nan.
    """

    vocabulary: Count = 64
    "how many tokens there are"
    width: Count = 128
    "width of the residual stream"
    depth: Count = 4
    "transformer blocks"
    heads: Count = 4
    "attention heads; they share the width"
    key_heads: Whole = 0
    "heads of keys and values, a divisor of the heads; 0 for as many as those"
    head_dim: Whole = 0
    "width of a head; 0 for width / heads"
    hidden: Whole = 0
    "hidden width of each block's dense layers; 0 for 4 times the width"
    activation: layers.Activation = "gelu"
    "between a block's dense layers; gelu is the approximation by tanh"
    gated: bool = False
    "a third dense layer goes through the activation and multiplies the first (SwiGLU, GeGLU)"
    bias: Bias = "all"
    """which dense layers have a bias: all, those of queries, keys and values (qkv), those and the
    one behind attention (attention), or none"""
    norm: Norm = "layer"
    "centred and scaled (layer), or only scaled by the root mean square (rms)"
    norm_epsilon: Annotated[float, Above(0)] = 1e-6
    "added to the variance, or to the mean square"
    norm_offset: bool = False
    "an rms norm multiplies by 1 + scale, so that its scale is born 0 (Gemma)"
    arrangement: Arrangement = "pre"
    """where a block's norms stand: on what enters a branch (pre), on the sum (post, as BERT), on
    what leaves a branch (output, as OLMo 2), or on both sides of it (sandwich, as Gemma)"""
    qk_norm: Literal["none", "head", "all"] = "none"
    "an rms norm on queries and keys, before they are turned: of each head, or of all as one"
    positions: Literal["learned", "rotary"] = "learned"
    """how places are told apart: a learned embedding of each, or queries and keys rotated by
    their place (no parameters)"""
    max_length: Count = 1024
    """how many places a learned embedding has; of rotary models, which go on beyond it, only the
    length that exported files name"""
    pattern: tuple[Kind, ...] = ("full",)
    """the kinds of the blocks, repeated over the depth: full, window (sees the last places only) or
    unrotated (has no positions)"""
    window: Whole = 0
    "how many places a window block sees, itself included"
    rotary_base: Annotated[float, Above(1)] = 10000.0
    "the slowest pair turns by nearly 1/base a place"
    window_rotary_base: NotNegative = 0.0
    "the base of window blocks, which are never slowed down; 0 for all as the full blocks"
    rotary_scaling: rotary.Scaling = "none"
    "how rotations are slowed down for longer texts"
    rotary_factor: Annotated[float, Above(0)] = 1.0
    "how many times longer"
    rotary_low: NotNegative = 1.0
    "turns within the first length below which a pair is slowed down (llama3, yarn)"
    rotary_high: NotNegative = 4.0
    "turns above which it is left as it is (llama3, yarn)"
    rotary_length: Whole = 0
    "the length that the model was first trained on (llama3, yarn)"
    rotary_share: Annotated[float, Between(0.01, 1)] = 1.0
    "the share of each head that is rotated"
    attention_scale: NotNegative = 0.0
    "what products of queries and keys are multiplied by; 0 for 1 / sqrt(width of a head)"
    attention_cap: NotNegative = 0.0
    "those products go through cap * tanh(x / cap); 0 for none"
    logit_cap: NotNegative = 0.0
    "the same for the logits"
    embed_scale: bool = False
    "embeddings are multiplied by sqrt(width)"
    tied: bool = True
    "the head's kernel is the token embedding; otherwise it has its own"
    padded_vocabulary: Whole = 0
    "rows of the embedding and the head, a round number for the hardware; 0 for the vocabulary"
    dropout: DropRate = 0.0
    "share dropped in training after the embedding and in each branch"
    scan: bool = False
    """blocks run in a loop of the compiled program: it compiles faster, and FSDP gathers one block
    at a time"""
    chunk: Whole = 0
    "how many tokens of each sequence have their logits at once in a loss; 0 for all of them"

    @property
    def looped_blocks(self) -> tuple[str, ...]:
        """The parameters that a loop goes over, see `block_loop`."""
        return tuple(f"block{index}" for index in range(self.depth)) if self.scan else ()

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each block.

        >>> Transformer(depth=3, pattern=("window", "full")).kinds
        ('window', 'full', 'window')
        """
        return tuple(self.pattern[index % len(self.pattern)] for index in range(self.depth))

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        train: bool = False,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        self._check(tokens, segments, positions)
        rows = self.padded_vocabulary or self.vocabulary
        embed_VD = self.param(
            "embed", layers.boxed(SMALL_NORMAL, "vocab", "embed"), (rows, self.width)
        )
        x_BTD = token_inputs.look_up(embed_VD, tokens, self.vocabulary)
        if self.embed_scale:
            x_BTD = x_BTD * jnp.asarray(self.width**0.5, x_BTD.dtype)
        x_BTD = token_inputs.nan_where_placeless(x_BTD, segments, positions)
        if cache is None:
            places = token_inputs.places_of(tokens, segments, positions)
        else:
            places = _places_beside(cache, tokens, segments, positions)
        if self.positions == "learned":
            x_BTD = self._with_learned_positions(x_BTD, places)
        x_BTD = layers.Dropout(self.dropout)(x_BTD, train)
        x_BTD, cache = self._through_blocks(x_BTD, Surroundings(segments, places, cache), train)
        x_BTD = layers.norm(self.norm, self.norm_epsilon, offset=self.norm_offset, name="norm")(
            x_BTD
        )
        logits = self._head(x_BTD, embed_VD, whole=cache is not None)
        return logits if cache is None else (logits, cache)

    def _with_learned_positions(self, x_BTD: jax.Array, places: jax.Array) -> jax.Array:
        initializer = layers.boxed(SMALL_NORMAL, "position", "embed")
        table_PD = self.param("positions", initializer, (self.max_length, self.width))
        if places.ndim == 1:
            return layers.add_bias(x_BTD, table_PD[: places.shape[0]])
        return x_BTD + token_inputs.look_up(table_PD, jnp.maximum(places, 0))

    def _through_blocks(
        self, x_BTD: jax.Array, around: "Surroundings", train: bool
    ) -> tuple[jax.Array, Cache | None]:
        """The stream after all blocks, and the cache with what they saw."""
        waves: dict[Kind, Any] = {
            kind: self._waves(kind, around.places) for kind in dict.fromkeys(self.kinds)
        }
        if self.scan and around.cache is None and not self.is_initializing():
            return self._scanned(x_BTD, around, waves, train), None
        caches: list[BlockCache] = []
        for index, kind in enumerate(self.kinds):
            block = Block(self.block_settings(kind), name=f"block{index}")
            held = None if around.cache is None else around.cache.blocks[index]
            x_BTD, held = block(x_BTD, around, waves[kind], held, train)
            x_BTD = layers.block_end(x_BTD)
            if held is not None:
                caches.append(held)
        if around.cache is None:
            return x_BTD, None
        added_B = jnp.sum(around.places >= 0, axis=1, dtype=jnp.int32)
        return x_BTD, Cache(tuple(caches), around.cache.length_B + added_B)

    def _scanned(
        self,
        x_BTD: jax.Array,
        around: "Surroundings",
        waves: dict[Kind, Any],
        train: bool,
    ) -> jax.Array:
        """The stream after all blocks, in one loop that stacks their parameters; nothing outside of
        it knows."""
        if other := sorted(set(self.variables) - {"params"}):
            raise UserError(
                f"Transformer.scan=True: blocks keep {other[0]!r} besides their parameters, which"
                " a loop does not carry; set scan=False, or another precision"
            )
        draws = train and self.has_rng("dropout")
        keys = jax.random.split(self.make_rng("dropout"), self.depth) if draws else None

        def step(kind: Kind, x_BTD: jax.Array, params: Any, key: jax.Array | None) -> jax.Array:
            block = Block(self.block_settings(kind), parent=None)
            rngs = {} if key is None else {"dropout": key}
            variables = {"params": params}
            x_BTD, _ = block.apply(variables, x_BTD, around, waves[kind], None, train, rngs=rngs)
            return layers.block_end(x_BTD)

        names = [f"block{index}" for index in range(self.depth)]
        return block_loop.run(
            [functools.partial(step, kind) for kind in period(self.kinds)],
            x_BTD,
            [self.variables["params"][name] for name in names],
            keys,
            names=["/".join((*self.path, name)) for name in names],
        )

    @nn.nowrap
    def block_settings(self, kind: Kind = "full") -> "BlockSettings":
        """What a block of this kind is.

        >>> Transformer(width=12, heads=3).block_settings().head_dim
        4
        """
        return BlockSettings(
            heads=self.heads,
            key_heads=self.key_heads or self.heads,
            head_dim=self.head_dim or self.width // self.heads,
            hidden=self.hidden or 4 * self.width,
            activation=self.activation,
            gated=self.gated,
            bias=self.bias,
            norm=self.norm,
            norm_epsilon=self.norm_epsilon,
            norm_offset=self.norm_offset,
            arrangement=self.arrangement,
            qk_norm=self.qk_norm,
            window=self.window if kind == "window" else 0,
            attention_scale=self.attention_scale or None,
            attention_cap=self.attention_cap,
            dropout=self.dropout,
        )

    def _waves(self, kind: Kind, places: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """How a block of this kind turns queries and keys; None for not at all."""
        if self.positions != "rotary" or kind == "unrotated":
            return None
        rates = rotary.Rates(
            self.rotary_base,
            self.rotary_scaling,
            self.rotary_factor,
            self.rotary_low,
            self.rotary_high,
            self.rotary_length,
        )
        if kind == "window" and self.window_rotary_base:
            rates = rotary.Rates(self.window_rotary_base)
        return rotary.waves(jnp.maximum(places, 0), rates, self._rotated_dims)

    @property
    def _rotated_dims(self) -> int:
        return int(self.block_settings().head_dim * self.rotary_share)

    def _head(self, x_BTD: jax.Array, embed_VD: jax.Array, *, whole: bool) -> Any:
        rows, cap = embed_VD.shape[0], self.logit_cap or None
        if self.chunk and not whole:
            kernel_DV = embed_VD.T if self.tied else _Kernel(rows, name="head")(self.width)
            states_BTD, kernel_DV = promote_dtype(x_BTD, kernel_DV)
            return LateLogits(states_BTD, kernel_DV, cap, self.vocabulary, self.chunk)
        if self.tied:
            logits_BTV = jnp.einsum("btd,vd->btv", *promote_dtype(x_BTD, embed_VD))
        else:
            logits_BTV = layers.dense(
                rows, ("embed", "vocab"), bias=False, initializer=SMALL_NORMAL, name="head"
            )(x_BTD)
        if cap is not None:
            wide = logits_BTV.astype(jnp.float32)
            logits_BTV = (cap * jnp.tanh(wide / cap)).astype(logits_BTV.dtype)
        return logits_BTV[..., : self.vocabulary]

    def _check(
        self, tokens: jax.Array, segments: jax.Array | None, positions: jax.Array | None
    ) -> None:
        """What must fit, said by name before an index or a reshape says it in numbers."""
        token_inputs.check("Transformer", tokens, segments=segments, positions=positions)
        length = tokens.shape[1]
        if self.positions == "learned" and length > self.max_length:
            raise UserError(
                f"Transformer.max_length={self.max_length}: the input has {length} tokens; make it"
                f" {length}, or choose positions=rotary"
            )
        if not self.head_dim:
            remedy = "choose a divisor of it, or set head_dim"
            layers.check_heads("Transformer", self.heads, self.width, remedy)
        if self.heads % (self.key_heads or self.heads):
            raise UserError(
                f"Transformer.key_heads={self.key_heads}: does not divide heads={self.heads};"
                " choose a divisor of it"
            )
        if self.positions == "rotary" and self._rotated_dims % 2:
            raise UserError(
                f"Transformer.heads={self.heads}: heads of {self._rotated_dims} are odd, and"
                f" positions=rotary rotates pairs; choose heads so that width={self.width} / heads"
                " is even"
            )
        if "window" in self.pattern and not self.window:
            raise UserError(
                "Transformer.window=0: the pattern has window blocks; say how many places they see"
            )
        if self.rotary_scaling in ("llama3", "yarn") and not self.rotary_length:
            raise UserError(
                f"Transformer.rotary_length=0: rotary_scaling={self.rotary_scaling} needs the"
                " length that the model was first trained on"
            )
        if self.padded_vocabulary and self.padded_vocabulary < self.vocabulary:
            raise UserError(
                f"Transformer.padded_vocabulary={self.padded_vocabulary}: less than"
                f" vocabulary={self.vocabulary}; make it at least that, or 0"
            )


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What all blocks see besides the stream."""

    segments_BT: jax.Array | None
    places: jax.Array
    """Positions (T,) or (B, T); -1 for padding beside a cache."""
    cache: Cache | None = None


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """What one block is; the fields are `Transformer`'s, with the zeros resolved."""

    heads: int
    key_heads: int
    head_dim: int
    hidden: int
    activation: layers.Activation = "gelu"
    gated: bool = False
    bias: Bias = "all"
    norm: Norm = "layer"
    norm_epsilon: float = 1e-6
    norm_offset: bool = False
    arrangement: Arrangement = "pre"
    qk_norm: Literal["none", "head", "all"] = "none"
    causal: bool = True
    window: int = 0
    attention_scale: float | None = None
    attention_cap: float = 0.0
    dropout: Any = 0.0

    def make_norm(self, name: str) -> nn.Module:
        """A norm over the stream."""
        return layers.norm(self.norm, self.norm_epsilon, offset=self.norm_offset, name=name)


class Block(nn.Module):
    """Attention, then two or three dense layers, each as a branch that is added to the stream."""

    settings: BlockSettings

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        around: Surroundings,
        waves: tuple[jax.Array, jax.Array] | None,
        held: BlockCache | None,
        train: bool,
    ) -> tuple[jax.Array, BlockCache | None]:
        settings = self.settings
        attend = Attention(settings, name="attention")
        branch, held = attend(self._before(x_BTD, "norm0"), around, waves, held)
        x_BTD = self._added(x_BTD, branch, "norm0_out", train)
        hidden = functools.partial(
            layers.dense,
            settings.hidden,
            ("embed", "mlp"),
            bias=settings.bias == "all",
            initializer=layers.XAVIER,
        )
        entering = self._before(x_BTD, "norm1")
        act = layers.ACTIVATIONS[settings.activation]
        branch = hidden(name="mlp_in")(entering)
        branch = act(hidden(name="mlp_gate")(entering)) * branch if settings.gated else act(branch)
        branch = layers.dense(
            x_BTD.shape[-1],
            ("mlp", "embed"),
            bias=settings.bias == "all",
            initializer=layers.XAVIER,
            name="mlp_out",
        )(branch)
        return self._added(x_BTD, branch, "norm1_out", train), held

    def _before(self, x_BTD: jax.Array, name: str) -> jax.Array:
        """What enters a branch."""
        has_norm = self.settings.arrangement in ("pre", "sandwich")
        return self.settings.make_norm(name)(x_BTD) if has_norm else x_BTD

    def _added(self, x_BTD: jax.Array, branch: jax.Array, name: str, train: bool) -> jax.Array:
        """The stream with what a branch found."""
        if self.settings.arrangement in ("output", "sandwich"):
            branch = self.settings.make_norm(name)(branch)
        x_BTD = x_BTD + layers.Dropout(self.settings.dropout)(branch, train)
        return (
            self.settings.make_norm(name)(x_BTD) if self.settings.arrangement == "post" else x_BTD
        )


class Attention(nn.Module):
    """Every place looks at those that it may see; queries and keys are turned if there are
    waves."""

    settings: BlockSettings

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        around: Surroundings,
        waves: tuple[jax.Array, jax.Array] | None,
        held: BlockCache | None,
    ) -> tuple[jax.Array, BlockCache | None]:
        settings = self.settings
        query, key, value = (
            layers.head_projection(
                count, settings.head_dim, bias=settings.bias != "none", name=name
            )(x_BTD)
            for name, count in (
                ("query", settings.heads),
                ("key", settings.key_heads),
                ("value", settings.key_heads),
            )
        )
        if settings.qk_norm != "none":
            query, key = (
                layers.RMSNorm(
                    settings.norm_epsilon,
                    offset=settings.norm_offset,
                    axes=("head_dim",) if settings.qk_norm == "head" else ("heads", "head_dim"),
                    name=name,
                )(array)
                for name, array in (("query_norm", query), ("key_norm", key))
            )
        if waves is not None:
            query, key = rotary.rotated(query, waves), rotary.rotated(key, waves)
        seen: dict[str, Any] = {"segments": around.segments_BT, "key_segments": around.segments_BT}
        if held is not None:
            key, value, positions, held = extended(held, key, value, around.places)
            seen = {"positions": around.places, "key_positions": positions}
        mixed_BTNK = attention(
            query,
            key,
            value,
            causal=settings.causal,
            window=settings.window,
            cap=settings.attention_cap,
            scale=settings.attention_scale,
            **seen,
        )
        out = layers.output_projection(
            x_BTD.shape[-1], bias=settings.bias in ("all", "attention"), name="out"
        )
        return out(mixed_BTNK), held


class _Kernel(nn.Module):
    """The kernel of the head alone, under the name that the head's layer has."""

    rows: int

    @nn.compact
    def __call__(self, width: int) -> jax.Array:
        initializer = layers.boxed(SMALL_NORMAL, "embed", "vocab")
        return self.param("kernel", initializer, (width, self.rows))


def _places_beside(
    cache: Cache,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None,
    positions_BT: jax.Array | None,
) -> jax.Array:
    """The position of each token beside a cache (B, T), where rows have lengths of their own; what
    is padding has no place, -1."""
    real_BT = jnp.ones_like(tokens_BT, jnp.int32) if segments_BT is None else (segments_BT > 0) * 1
    places_BT = cache.length_B[:, None] + jnp.cumsum(real_BT, axis=1) - 1
    places_BT = places_BT if positions_BT is None else positions_BT
    return jnp.where(real_BT > 0, places_BT, -1).astype(jnp.int32)


def period(kinds: Sequence[Any]) -> tuple[Any, ...]:
    """The fewest kinds that, repeated, are all of them; the last time may end early.

    >>> period(("window", "full", "window")), period(("full",) * 3)
    (('window', 'full'), ('full',))
    """
    return next(
        tuple(kinds[:length])
        for length in range(1, len(kinds) + 1)
        if all(kind == kinds[index % length] for index, kind in enumerate(kinds))
    )


NAMES: dict[str, nn.Module] = {
    "decoder_tiny": Transformer(width=64, depth=2, heads=4),
    "decoder_small": Transformer(width=128, depth=4, heads=4),
    "decoder_medium": Transformer(width=384, depth=6, heads=6),
}
