"""The `config.json` of a Hugging Face folder as a model of ours, and back.

Every key is used, is known to change no number, or is refused by name; nothing is passed over.
Both spellings are read: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of
transformers 5. What is written is read alike by both.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxtrain.errors import UserError
from jaxtrain.messages import did_you_mean
from jaxtrain.models.encoder import Encoder
from jaxtrain.models.transformer import Transformer, period

Model = Transformer | Encoder

_SAID_OF_ITSELF = """_name_or_path architectures auto_map bos_token_id decoder_start_token_id dtype
eos_token_id finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label
initializer_range label2id language model_type num_labels pad_token_id problem_type prefix
sep_token_id task_specific_params tokenizer_class torch_dtype torchscript transformers_version
transformers.js_config unsloth_fixed unsloth_version use_bfloat16 use_cache
_attn_implementation_autoset _attn_implementation attn_implementation"""
"""What a file says of itself, its program and its tokenizer."""
_OF_ITS_MODULE = """chunk_size_feed_forward output_attentions output_hidden_states output_past
output_scores pretraining_tp reorder_and_upcast_attn return_dict return_dict_in_generate
tie_encoder_decoder tf_legacy_loss cross_attention_hidden_size cache_implementation"""
"""How its module is called, and how it splits its work."""
_OF_SAMPLING = """bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty max_length min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values
repetition_penalty suppress_tokens temperature top_k top_p typical_p"""
"""From files of before `generation_config.json`."""
_OF_OTHER_HEADS = """summary_activation summary_first_dropout summary_proj_to_labels summary_type
summary_use_proj classifier_dropout n_ctx"""
"""Of heads that we do not have; and the length under its older name."""
HARMLESS = frozenset(f"{_SAID_OF_ITSELF} {_OF_ITS_MODULE} {_OF_SAMPLING} {_OF_OTHER_HEADS}".split())
"""Keys that change no number of a forward pass."""
OFF = frozenset(
    (
        "add_cross_attention",
        "is_decoder",
        "is_encoder_decoder",
        "pruned_heads",
        "use_bidirectional_attention",
        "scale_attn_by_inverse_layer_idx",
    )
)
"""Keys of what we do not have, which must be off."""
ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
KINDS = {"full_attention": "full", "sliding_attention": "window"}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a `config.json` describes."""

    model_type: str
    """The family, as Hugging Face calls it."""
    model: Model
    notes: tuple[str, ...] = ()
    """What is said once: settings of training that are not taken over."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What Hugging Face's class assumes where a key is absent, and what sets a family apart."""

    architecture: str
    """The class with a head."""
    tied: bool = False
    base: float = 10000.0
    epsilon: float = 1e-6
    max_length: int = 2048
    key_heads: int = 0
    """0: as many as the heads."""
    head_dim: int = 0
    """0: width / heads."""
    window: int = 0
    gemma: bool = False
    layer_types: bool = False
    """The kinds of blocks may be listed by name."""


FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", tied=True, epsilon=1e-5, max_length=1024),
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", max_length=131072, key_heads=8, window=4096),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        tied=True,
        base=2000000.0,
        max_length=32768,
        key_heads=4,
        layer_types=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", max_length=32768, key_heads=32, window=4096, layer_types=True
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        max_length=32768,
        key_heads=32,
        head_dim=128,
        window=4096,
        layer_types=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        tied=True,
        max_length=8192,
        key_heads=4,
        head_dim=256,
        window=4096,
        gemma=True,
        layer_types=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        tied=True,
        base=1000000.0,
        max_length=131072,
        key_heads=4,
        head_dim=256,
        window=4096,
        gemma=True,
        layer_types=True,
    ),
    "olmo2": Family("Olmo2ForCausalLM", epsilon=1e-5),
    "bert": Family("BertForMaskedLM", tied=True, epsilon=1e-12, max_length=512),
}
"""By Hugging Face's `model_type`; the first that can say a model is the one that it is written
as."""
ENCODERS: dict[str, dict[str, Any]] = {
    "BertModel": {"head": "states", "pooler": True},
    "BertForMaskedLM": {"head": "tokens"},
    "BertForPreTraining": {"head": "tokens"},
    "BertForSequenceClassification": {"head": "classes", "pooler": True},
}
"""What comes out of an encoder, by the class that its file was saved from."""


def read(config: Mapping[str, Any], what: str = "config.json") -> Architecture:
    """The model that `config` describes, with nothing random dropped.

    >>> sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 5}
    >>> read({"model_type": "gpt2", **sizes}).model.depth
    1
    >>> read({"model_type": "gpt2", **sizes, "n_heads": 2})
    Traceback (most recent call last):
    ...
    jaxtrain.errors.UserError: config.json: n_heads=2: not a key of gpt2 that we know; did you mean
    'n_head'? Remove it if it changes no number

    `UserError` for a family that we do not have, for a key that is not known, and for a value that
    the model cannot take.
    """
    keys = Keys(config, what)
    family = keys.text("model_type")
    if family == "gemma3":
        raise keys.refuse(
            "model_type",
            "this one sees pictures, too; save its text part by transformers' Gemma3ForCausalLM",
        )
    if family not in FAMILIES:
        raise UserError(
            f"{what}: model_type={family!r}: we have {', '.join(FAMILIES)}"
            f"{did_you_mean(family, FAMILIES)}"
        )
    keys.check_off()
    reader = {"gpt2": _read_gpt2, "bert": _read_bert}.get(family, _read_llama)
    model = reader(keys, family)
    keys.check_all_used(family)
    return Architecture(family, model, keys.notes())


def write(
    model: Model, *, dtype: str = "float32", keep: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The `config.json` of `model`, for the first family that can say all of it.

    >>> config = write(Transformer(vocabulary=5, width=8, depth=1, heads=2))
    >>> config["model_type"], config["n_embd"]
    ('gpt2', 8)

    `keep` adds what a model does not know, such as `eos_token_id`. Fields that say how a program
    runs or trains (`scan`, `chunk`, `dropout`, `padded_vocabulary`) are left out. `UserError` for a
    model that is of no family, with what stands in the way.
    """
    wanted = canonical(model)
    kind = "bert" if isinstance(model, Encoder) else "gpt2" if wanted.positions == "learned" else ""
    obstacles = {}
    for family in [kind] if kind else [name for name in FAMILIES if name not in ("gpt2", "bert")]:
        writer = {"gpt2": _write_gpt2, "bert": _write_bert}.get(family, _write_llama)
        config = writer(wanted, family)
        try:
            back = canonical(read(config).model)
        except UserError as error:
            obstacles[family] = str(error)
            continue
        if not (odd := _differences(wanted, back)):
            return {**config, **(keep or {}), "dtype": dtype, "torch_dtype": dtype}
        obstacles[family] = ", ".join(odd)
    family = min(obstacles, key=lambda name: len(obstacles[name]))
    raise UserError(
        f"{type(model).__name__}: no Hugging Face family that we know is like it; nearest is"
        f" {family}, which cannot say {obstacles[family]}"
    )


def canonical(model: Model) -> Any:
    """The model with zeros resolved, and without what no `config.json` says.

    >>> canonical(Transformer(width=8, heads=2)).hidden
    32
    """
    resolved = {"hidden": model.block_settings().hidden, "dropout": 0.0}
    if isinstance(model, Encoder):
        # without classes nobody counts them
        classes = model.num_classes if model.head == "classes" else 2
        head = "states" if model.head == "pooled" else model.head
        return model.clone(**resolved, num_classes=classes, head=head)
    block, kinds = model.block_settings(), model.kinds
    rotary = model.positions == "rotary"
    scaling = model.rotary_scaling if rotary else "none"
    resolved |= {
        "key_heads": block.key_heads,
        "head_dim": block.head_dim,
        "pattern": period(kinds),
        "window": model.window if "window" in kinds else 0,
        "window_rotary_base": model.window_rotary_base if "window" in kinds else 0.0,
        "attention_scale": model.attention_scale or block.head_dim**-0.5,
        "scan": False,
        "chunk": 0,
        "padded_vocabulary": 0,
        "rotary_factor": model.rotary_factor if scaling != "none" else 1.0,
        "rotary_length": model.rotary_length if scaling in ("llama3", "yarn") else 0,
    }
    if scaling not in ("llama3", "yarn"):
        resolved |= {"rotary_low": 1.0, "rotary_high": 4.0}
    if not rotary:
        resolved |= {"rotary_base": 10000.0, "rotary_scaling": "none", "rotary_share": 1.0}
    return model.clone(**resolved)


def _differences(wanted: Model, back: Model) -> list[str]:
    if type(wanted) is not type(back):
        return [type(wanted).__name__]
    names = [field.name for field in dataclasses.fields(wanted) if field.init]
    return [
        f"{name}={getattr(wanted, name)}"
        for name in names
        if name not in ("parent", "name") and getattr(wanted, name) != getattr(back, name)
    ]


# --- reading
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Keys:
    """A configuration of which it is known what has been read."""

    config: Mapping[str, Any]
    what: str
    used: set[str] = dataclasses.field(default_factory=set)
    lines: list[str] = dataclasses.field(default_factory=list)

    def get(self, name: str, default: Any = None) -> Any:
        """The value; `default` where it is absent or null."""
        self.used.add(name)
        value = self.config.get(name)
        return default if value is None else value

    def refuse(self, name: str, rule: str, value: Any = None) -> UserError:
        """The error for a value that will not do."""
        value = self.config.get(name) if value is None else value
        return UserError(f"{self.what}: {name}={value!r}: {rule}")

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.refuse(name, "must be there, a string")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refuse(name, "must be there, a whole number >= 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        return self.positive(name, self.get(name, default))

    def positive(self, name: str, value: Any) -> float:
        """`value` as a finite number above 0."""
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not 0 < value < math.inf:
            raise self.refuse(name, "must be there, a number > 0", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "must be true or false")
        return value

    def activation(self, name: str, *, default: str) -> Any:
        """What is between dense layers."""
        value = self.text(name, default)
        if value not in ACTIVATIONS:
            raise self.refuse(name, f"we have {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def dropouts(self, *names: str) -> None:
        """Shares that are dropped in training, which is a run's to say."""
        for name in names:
            if value := self.get(name, 0.0):
                self.lines.append(
                    f"{self.what}: {name}={value} is not taken over; say --model.dropout if it"
                    " shall train so"
                )

    def notes(self) -> tuple[str, ...]:
        """What is said once."""
        return tuple(self.lines)

    def check_off(self) -> None:
        """`UserError` for something that we do not have and that is on."""
        self.used.update(OFF)
        for name in sorted(OFF & set(self.config)):
            if self.config[name]:
                raise self.refuse(name, "we have no model of this kind")

    def check_all_used(self, family: str) -> None:
        """`UserError` for the first key that nobody has read."""
        rest = sorted(set(self.config) - self.used - HARMLESS)
        if rest:
            near = did_you_mean(rest[0], self.used | HARMLESS)
            others = f" Likewise {', '.join(rest[1:])}." if rest[1:] else ""
            raise self.refuse(
                rest[0],
                f"not a key of {family} that we know{near or '.'}{others} Remove it if it changes"
                " no number",
            )


def _read_gpt2(keys: Keys, family: str) -> Transformer:
    width, heads = keys.count("n_embd"), keys.count("n_head")
    keys.dropouts("attn_pdrop", "embd_pdrop", "resid_pdrop")
    _check_divides(keys, width, "n_head", heads)
    return Transformer(
        vocabulary=keys.count("vocab_size"),
        width=width,
        depth=keys.count("n_layer"),
        heads=heads,
        key_heads=heads,
        head_dim=width // heads,
        hidden=keys.count("n_inner", 4 * width),
        activation=keys.activation("activation_function", default="gelu_new"),
        norm_epsilon=keys.number("layer_norm_epsilon", FAMILIES[family].epsilon),
        max_length=keys.count("n_positions", 1024),
        attention_scale=(width // heads) ** -0.5 if keys.flag("scale_attn_weights", True) else 1.0,
        tied=keys.flag("tie_word_embeddings", True),
    )


def _read_bert(keys: Keys, family: str) -> Encoder:
    saved = (keys.get("architectures") or ["BertModel"])[0]
    if saved not in ENCODERS:
        raise keys.refuse("architectures", f"we have {', '.join(ENCODERS)}")
    if keys.text("position_embedding_type", "absolute") != "absolute":
        raise keys.refuse("position_embedding_type", "we have absolute")
    if not keys.flag("tie_word_embeddings", True):
        raise keys.refuse("tie_word_embeddings", "our encoder's head is the embedding")
    keys.dropouts("attention_probs_dropout_prob", "hidden_dropout_prob")
    width, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    _check_divides(keys, width, "num_attention_heads", heads)
    labels = keys.get("id2label")
    return Encoder(
        vocabulary=keys.count("vocab_size"),
        width=width,
        depth=keys.count("num_hidden_layers"),
        heads=heads,
        hidden=keys.count("intermediate_size"),
        activation=keys.activation("hidden_act", default="gelu"),
        norm_epsilon=keys.number("layer_norm_eps", FAMILIES[family].epsilon),
        max_length=keys.count("max_position_embeddings", 512),
        token_types=keys.count("type_vocab_size", 2),
        num_classes=len(labels) if labels else keys.count("num_labels", 2),
        **ENCODERS[saved],
    )


def _read_llama(keys: Keys, family: str) -> Transformer:
    """Llama and its relatives, which name their keys alike."""
    known = FAMILIES[family]
    width, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    if not (known.head_dim or keys.get("head_dim")):
        _check_divides(keys, width, "num_attention_heads", heads)
    head_dim = keys.count("head_dim", known.head_dim or width // heads)
    key_heads = keys.count("num_key_value_heads", known.key_heads or heads)
    _check_divides(keys, heads, "num_key_value_heads", key_heads)
    keys.dropouts("attention_dropout")
    depth = keys.count("num_hidden_layers")
    kinds, window = _kinds(keys, family, depth)
    return Transformer(
        vocabulary=keys.count("vocab_size"),
        width=width,
        depth=depth,
        heads=heads,
        key_heads=key_heads,
        head_dim=head_dim,
        hidden=keys.count("intermediate_size"),
        activation=_gemma_activation(keys)
        if known.gemma
        else keys.activation("hidden_act", default="silu"),
        gated=True,
        bias=_bias(keys, family),
        norm="rms",
        norm_epsilon=keys.number("rms_norm_eps", known.epsilon),
        positions="rotary",
        max_length=keys.count("max_position_embeddings", known.max_length),
        pattern=kinds,
        window=window,
        tied=keys.flag("tie_word_embeddings", known.tied),
        **_rotary(keys, family),
        **_own_settings(keys, family, head_dim),
    )


def _gemma_activation(keys: Keys) -> Any:
    """Gemma's modules read `hidden_activation` only; older files have `hidden_act` beside it."""
    keys.get("hidden_act")
    return keys.activation("hidden_activation", default="gelu_pytorch_tanh")


def _own_settings(keys: Keys, family: str, head_dim: int) -> dict[str, Any]:
    """What only this family has."""
    if family == "olmo2":
        return {"arrangement": "output", "qk_norm": "all", "attention_scale": head_dim**-0.5}
    if family not in ("gemma2", "gemma3_text"):
        qk_norm = "head" if family == "qwen3" else "none"
        return {"qk_norm": qk_norm, "attention_scale": head_dim**-0.5}
    second = family == "gemma2"
    return {
        "arrangement": "sandwich",
        "qk_norm": "none" if second else "head",
        "norm_offset": True,
        "embed_scale": True,
        "attention_scale": keys.number("query_pre_attn_scalar", 256) ** -0.5,
        "attention_cap": _cap(keys, "attn_logit_softcapping", 50.0 if second else 0.0),
        "logit_cap": _cap(keys, "final_logit_softcapping", 30.0 if second else 0.0),
    }


def _cap(keys: Keys, name: str, default: float) -> float:
    """A soft cap; null switches it off, also where the family has one."""
    keys.used.add(name)
    value = keys.config.get(name, default)
    return keys.positive(name, value) if value else 0.0


def _bias(keys: Keys, family: str) -> Any:
    """Which dense layers have a bias."""
    if family == "qwen2":
        return "qkv"
    if family == "mistral":
        return "none"
    has_mlp = family in ("llama", "smollm3")
    attention = keys.flag("attention_bias", False)
    mlp = keys.flag("mlp_bias", False) if has_mlp else False
    if mlp and not attention:
        raise keys.refuse("mlp_bias", "our block has such biases only beside those of attention")
    return "all" if mlp else "attention" if attention else "none"


def _kinds(keys: Keys, family: str, depth: int) -> tuple[tuple[Any, ...], int]:
    """The kinds of the blocks and the window, 0 if nobody has one."""
    known = FAMILIES[family]
    if family in ("llama", "olmo2"):
        return ("full",), 0
    default = (known.window or None) if "sliding_window" not in keys.config else None
    window = keys.get("sliding_window", default)
    if window is not None:
        window = keys.count("sliding_window", default)
    if family == "mistral":
        return (("window",), window) if window else (("full",), 0)
    if family in ("smollm3", "qwen2", "qwen3") and not keys.flag("use_sliding_window", False):
        window = None
    names = _layer_types(keys, family, depth, window)
    kinds = [KINDS[name] for name in names]
    if family == "smollm3":
        kinds = _unrotated(keys, depth, kinds)
    if "window" in kinds and window is None:
        raise keys.refuse("sliding_window", "layer_types has sliding_attention, which needs it")
    return period(kinds), window if window and "window" in kinds else 0


def _layer_types(keys: Keys, family: str, depth: int, window: int | None) -> list[str]:
    """The name of each block's attention: listed, or as the family has it."""
    every = None
    if family == "gemma3_text":
        every = keys.get("sliding_window_pattern", keys.get("_sliding_window_pattern", 6))
        if not isinstance(every, int) or every < 1:
            raise keys.refuse("sliding_window_pattern", "must be a whole number >= 1")
    first = keys.count("max_window_layers", 28) if family in ("qwen2", "qwen3") else None
    listed = keys.get("layer_types")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != depth or set(listed) - set(KINDS):
            raise keys.refuse(
                "layer_types", f"must be num_hidden_layers={depth} of {', '.join(KINDS)}"
            )
        return listed
    if every is not None:
        slides = [(index + 1) % every != 0 for index in range(depth)]
    elif first is not None:
        slides = [window is not None and index >= first for index in range(depth)]
    elif family == "smollm3":
        rotated = _with_positions(keys, depth)
        slides = [window is not None and not turns for turns in rotated]
    else:
        slides = [(index + 1) % 2 != 0 for index in range(depth)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _unrotated(keys: Keys, depth: int, kinds: list[str]) -> list[str]:
    """SmolLM3's blocks without positions."""
    rotated = _with_positions(keys, depth)
    if any(kind == "window" and not turns for kind, turns in zip(kinds, rotated, strict=True)):
        raise keys.refuse("no_rope_layers", "our blocks have a window or no positions, never both")
    return [kind if turns else "unrotated" for kind, turns in zip(kinds, rotated, strict=True)]


def _with_positions(keys: Keys, depth: int) -> list[int]:
    """Which blocks of SmolLM3 have positions."""
    interval = keys.count("no_rope_layer_interval", 4)
    listed = keys.get("no_rope_layers")
    if listed is None:
        return [int((index + 1) % interval != 0) for index in range(depth)]
    if not isinstance(listed, list) or len(listed) < depth or set(listed) - {0, 1}:
        raise keys.refuse("no_rope_layers", f"must be a list of at least {depth} of 0 and 1")
    return listed[:depth]


# --- rotary positions
# --------------------------------------------------------------------------------------------------

ROTARY_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "beta_fast",
        "beta_slow",
        "original_max_position_embeddings",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""What a kind of scaling may say."""


def _rotary(keys: Keys, family: str) -> dict[str, Any]:
    """The fields `rotary_*`, from either spelling."""
    if keys.number("partial_rotary_factor", 1.0) != 1:
        raise keys.refuse("partial_rotary_factor", f"{family} turns whole heads")
    theta, local = keys.get("rope_theta"), keys.get("rope_local_base_freq")
    new, old = keys.get("rope_parameters"), keys.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise keys.refuse(name, "must be an object")
    found: dict[str, Any] = dict(new or {})
    if family == "gemma3_text":
        if set(found) & set(KINDS):
            sliding, found = found.get("sliding_attention") or {}, found.get("full_attention") or {}
            local = _agreed(keys, "rope_local_base_freq", local, sliding.get("rope_theta"))
            if _scaling(keys, sliding | {"rope_theta": None})["rotary_scaling"] != "none":
                raise keys.refuse("rope_parameters", "sliding_attention is never slowed down here")
        local = keys.positive("rope_local_base_freq", local or 10000.0)
    elif set(found) & set(KINDS):
        raise keys.refuse("rope_parameters", f"{family} has one for all blocks")
    theta = _agreed(keys, "rope_theta", theta, found.pop("rope_theta", None))
    if old is not None and found and _kind(old) != _kind(found):
        raise keys.refuse("rope_scaling", "rope_parameters says something else; remove one")
    return {
        "rotary_base": keys.positive("rope_theta", theta or FAMILIES[family].base),
        **({"window_rotary_base": local} if family == "gemma3_text" else {}),
        **_scaling(keys, {**(old or {}), **found}),
    }


def _agreed(keys: Keys, name: str, old: Any, new: Any) -> Any:
    """The one value of two spellings."""
    if old is not None and new is not None and old != new:
        raise keys.refuse(name, f"rope_parameters says {new}; remove one")
    return new if old is None else old


def _kind(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("rope_type", scaling.get("type", "default"))


def _scaling(keys: Keys, given: Mapping[str, Any]) -> dict[str, Any]:
    """How rotations are slowed down."""
    kind = _kind(given)
    if kind not in ROTARY_KEYS:
        raise keys.refuse("rope_type", f"we have {', '.join(ROTARY_KEYS)}", kind)
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("rope_type", "type"):
        given.pop(name, None)
    if given.pop("partial_rotary_factor", 1.0) != 1:
        raise keys.refuse("partial_rotary_factor", "whole heads are turned")
    if unknown := sorted(set(given) - set(ROTARY_KEYS[kind])):
        raise keys.refuse(unknown[0], f"not a key of rope_type {kind}", given[unknown[0]])
    if kind == "default":
        return {"rotary_scaling": "none"}

    def number(name: str, default: float | None = None) -> float:
        return keys.positive(name, given.get(name, default))

    found: dict[str, Any] = {"rotary_scaling": kind, "rotary_factor": number("factor")}
    if kind == "linear":
        return found
    length = number("original_max_position_embeddings", keys.get("max_position_embeddings"))
    found["rotary_length"] = int(length)
    if kind == "llama3":
        return found | {
            "rotary_low": number("low_freq_factor"),
            "rotary_high": number("high_freq_factor"),
        }
    _check_gain(keys, given, found["rotary_factor"])
    return found | {
        "rotary_low": number("beta_slow", 1.0),
        "rotary_high": number("beta_fast", 32.0),
    }


def _check_gain(keys: Keys, given: Mapping[str, Any], factor: float) -> None:
    """`UserError` for a YaRN that multiplies queries and keys by another number than the paper's,
    or does not round its bounds."""

    def gain(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    own = given.get("attention_factor")
    if own is None and given.get("mscale") and given.get("mscale_all_dim"):
        own = gain(given["mscale"]) / gain(given["mscale_all_dim"])
    if own is not None and not math.isclose(own, gain(1.0), rel_tol=1e-6):
        raise keys.refuse(
            "attention_factor", f"our YaRN has 0.1 ln(factor) + 1 = {gain(1.0):.6g}", own
        )
    if not given.get("truncate", True):
        raise keys.refuse("truncate", "our YaRN rounds its bounds", False)


def _check_divides(keys: Keys, whole: int, name: str, part: int) -> None:
    if whole % part:
        raise keys.refuse(name, f"does not divide {whole}", part)


# --- writing
# --------------------------------------------------------------------------------------------------


def _write_gpt2(model: Any, family: str) -> dict[str, Any]:
    return {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": model.vocabulary,
        "n_embd": model.width,
        "n_layer": model.depth,
        "n_head": model.heads,
        "n_inner": model.hidden,
        "n_positions": model.max_length,
        "activation_function": _theirs(model.activation, "gelu_new"),
        "layer_norm_epsilon": model.norm_epsilon,
        "scale_attn_weights": model.attention_scale != 1.0,
        "tie_word_embeddings": model.tied,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _write_bert(model: Any, family: str) -> dict[str, Any]:
    saved = {
        ("tokens", False): "BertForMaskedLM",
        ("states", True): "BertModel",
        ("classes", True): "BertForSequenceClassification",
    }.get((model.head, model.pooler), "BertModel")
    labels = {str(index): f"LABEL_{index}" for index in range(model.num_classes)}
    classes = {
        "id2label": labels,
        "label2id": {label: int(index) for index, label in labels.items()},
    }
    return {
        "architectures": [saved],
        "model_type": family,
        "vocab_size": model.vocabulary,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": model.hidden,
        "hidden_act": _theirs(model.activation, "gelu_new"),
        "layer_norm_eps": model.norm_epsilon,
        "max_position_embeddings": model.max_length,
        "type_vocab_size": model.token_types,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        **(classes if model.head == "classes" else {}),
    }


def _write_llama(model: Any, family: str) -> dict[str, Any]:
    known = FAMILIES[family]
    act = "hidden_activation" if known.gemma else "hidden_act"
    config = {
        "architectures": [known.architecture],
        "model_type": family,
        "vocab_size": model.vocabulary,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.hidden,
        act: _theirs(model.activation, "gelu_pytorch_tanh"),
        "rms_norm_eps": model.norm_epsilon,
        "max_position_embeddings": model.max_length,
        "rope_theta": model.rotary_base,
        "rope_scaling": _write_scaling(model, family),
        "tie_word_embeddings": model.tied,
        "attention_dropout": 0.0,
    }
    config |= _write_kinds(model, family)
    if family in ("llama", "smollm3"):
        config["mlp_bias"] = model.bias == "all"
    if family not in ("qwen2", "mistral"):
        config["attention_bias"] = model.bias in ("all", "attention")
    if known.gemma:
        config |= {
            "query_pre_attn_scalar": round(model.attention_scale**-2),
            "attn_logit_softcapping": model.attention_cap or None,
            "final_logit_softcapping": model.logit_cap or None,
        }
    if family == "gemma3_text":
        config["rope_local_base_freq"] = model.window_rotary_base or model.rotary_base
    return config


def _write_kinds(model: Any, family: str) -> dict[str, Any]:
    """What says which blocks have a window."""
    kinds, window = model.kinds, model.window or None
    if family == "mistral":
        return {"sliding_window": window}
    if not FAMILIES[family].layer_types:
        return {}
    found: dict[str, Any] = {
        "layer_types": [
            "sliding_attention" if kind == "window" else "full_attention" for kind in kinds
        ]
    }
    if family == "smollm3":
        found["no_rope_layers"] = [int(kind != "unrotated") for kind in kinds]
    if FAMILIES[family].gemma:
        # Theirs build a mask for windows also where no block has one.
        return found | {"sliding_window": window or FAMILIES[family].window}
    return found | {"sliding_window": window, "use_sliding_window": window is not None}


def _write_scaling(model: Any, family: str) -> dict[str, Any] | None:
    kind = model.rotary_scaling
    if kind == "none":
        return None
    # in transformers 4 OLMo 2 asks for the older name
    name = "type" if family == "olmo2" else "rope_type"
    found: dict[str, Any] = {name: kind, "factor": float(model.rotary_factor)}
    if kind == "linear":
        return found
    found["original_max_position_embeddings"] = model.rotary_length
    low, high = model.rotary_low, model.rotary_high
    if kind == "yarn":
        return found | {"beta_slow": low, "beta_fast": high}
    return found | {"low_freq_factor": low, "high_freq_factor": high}


def _theirs(activation: str, gelu: str) -> str:
    """Hugging Face's name of an activation; `gelu` is the family's for the one by tanh."""
    return {"gelu": gelu, "gelu_exact": "gelu"}.get(activation, activation)
