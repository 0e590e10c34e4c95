"""GGUF files, for reading: a model's settings as the `config.json` that they were made from, and
its tensors under Hugging Face's names, dequantised as they are read.

The package `gguf` dequantises (F32, F16, BF16, the old kinds such as Q4_1 and Q8_0, the K-quants).
What `llama.cpp`'s converter did to the tensors is undone: queries and keys
of Llama are interleaved there, norms of Gemma hold 1 + scale, kernels of GPT-2 are turned.

Dims: R pairs of a head that rotations turn.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.checkpoints import lazy
from jaxtrain.errors import CheckpointError, UserError
from jaxtrain.gguf_header import AGAIN, Header, Tensor, block_sizes, read_header
from jaxtrain.messages import one_line, printable

LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FOUR_NORMS = LAYERS | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
GPT2_LAYERS = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
GPT2_WHOLE = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
FREQUENCIES = "rope_freqs.weight"
"""By what Llama 3 divides the rates of its rotations."""
FILES = "take the model's safetensors files"


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets an architecture of GGUF apart."""

    model_type: str
    """Of Hugging Face."""
    architecture: str
    interleaved: bool = False
    """Queries and keys are interleaved, as Meta's weights are."""
    gemma: bool = False
    layers: Mapping[str, str] = dataclasses.field(default_factory=lambda: LAYERS)


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", interleaved=True),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", interleaved=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM"),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", gemma=True, layers=FOUR_NORMS),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", gemma=True, layers=FOUR_NORMS),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", layers=FOUR_NORMS),
    "gpt2": Family("gpt2", "GPT2LMHeadModel", layers=GPT2_LAYERS),
}
"""By `general.architecture`."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in a GGUF file, not read yet."""

    path: Path
    config: Mapping[str, Any]
    """What `config.json` would say."""
    tensors: Mapping[str, lazy.Lazy]
    """By Hugging Face's names."""
    fields: Mapping[str, Any]
    """All that the file says of itself, its tokenizer among it."""


def open_model(path: str | Path) -> Model:
    """The model in a GGUF file; `UserError` if it is damaged, or of a kind that is not known."""
    place = Path(path).expanduser()
    shown = printable(str(place))
    header = read_header(place)
    word = header.fields.get("general.architecture")
    if word not in FAMILIES:
        raise UserError(
            f"{shown}: is of the architecture {printable(str(word))}; known are"
            f" {', '.join(FAMILIES)}"
        )
    config = _config(shown, word, header)
    if FREQUENCIES in header.tensors:
        factors_R = _lazy(place, FREQUENCIES, header.tensors[FREQUENCIES]).read()
        config["rope_scaling"] = llama3_scaling(shown, factors_R, config["rope_theta"])
    return Model(place, config, _tensors(place, word, config, header), header.fields)


def _lazy(path: Path, name: str, tensor: Tensor) -> lazy.Lazy:
    """A tensor in float32, whose rows are dequantised as they are read."""
    import gguf
    from gguf import quants

    kind = gguf.GGMLQuantizationType(tensor.kind)
    width = tensor.shape[-1]
    block, nbytes = block_sizes()[tensor.kind]
    row = width // block * nbytes

    def read_box(box: lazy.Box) -> np.ndarray:
        inner = math.prod(tensor.shape[1:-1])
        first, last = box[0] if len(tensor.shape) > 1 else (0, 1)
        count = (last - first) * inner
        try:
            raw = np.fromfile(
                path, np.uint8, count * row, offset=tensor.start + first * inner * row
            )
        except OSError as error:
            raise CheckpointError(f"{path}: {name}: {one_line(str(error))}") from error
        if raw.size != count * row:
            raise CheckpointError(f"{path}: became shorter while it was read; {AGAIN}")
        try:
            rows = quants.dequantize(raw.reshape(count, row), kind)
        except NotImplementedError:
            raise UserError(
                f"{printable(str(path))}: {name} is {kind.name}, which the package gguf does not"
                " dequantise; take a file of another quantisation, e.g. Q8_0"
            ) from None
        if len(tensor.shape) == 1:
            return rows.reshape(width)[slice(*box[0])].astype(np.float32, copy=False)
        rows = rows.reshape(last - first, *tensor.shape[1:])
        cut = (slice(None), *(slice(*span) for span in box[1:]))
        return rows[cut].astype(np.float32, copy=False)

    def cost(box: lazy.Box) -> int:
        return (box[0][1] - box[0][0]) * math.prod(tensor.shape[1:])

    return lazy.Lazy(tensor.shape, np.dtype(np.float32), read_box, cost)


def _tensors(
    path: Path, word: str, config: Mapping[str, Any], header: Header
) -> dict[str, lazy.Lazy]:
    """All tensors under Hugging Face's names, laid out as there."""
    family = FAMILIES[word]
    found: dict[str, lazy.Lazy] = {}
    for name, tensor in header.tensors.items():
        if name == FREQUENCIES:
            continue  # in the configuration
        there = _name(family, name)
        if there is None:
            raise UserError(
                f"{printable(str(path))}: has {printable(name)}, for which {word} has no place; it"
                " is another model than it says"
            )
        value = _lazy(path, name, tensor)
        found[there] = _undone(family, name, value, config)
    return found


def _name(family: Family, name: str) -> str | None:
    """Hugging Face's name of a tensor."""
    gpt2 = family.model_type == "gpt2"
    whole = GPT2_WHOLE if gpt2 else WHOLE
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None:
        return None
    index, part, end = match.groups()
    if index is None:
        return f"{whole[part]}.{end}" if part in whole else None
    if part not in family.layers:
        return None
    return f"{'transformer.h' if gpt2 else 'model.layers'}.{index}.{family.layers[part]}.{end}"


def _undone(family: Family, name: str, value: lazy.Lazy, config: Mapping[str, Any]) -> lazy.Lazy:
    """A tensor as it was before it was converted."""
    if family.gemma and name.endswith("norm.weight"):
        return value.map(lambda scale: scale - 1)
    if family.model_type == "gpt2" and name.startswith("blk") and value.ndim == 2:
        return value.T
    if family.interleaved and (match := re.search(r"\.attn_([qk])\.(weight|bias)$", name)):
        names = {"q": "num_attention_heads", "k": "num_key_value_heads"}
        heads = config[names[match[1]]]
        half = value.shape[0] // heads // 2
        rest = value.shape[1:]
        pairs = value.reshape(heads, half, 2, *rest)
        return pairs.transpose(0, 2, 1, *range(3, 3 + len(rest))).reshape(value.shape)
    return value


class _Fields:
    """The settings of an architecture, of which each must be asked for."""

    def __init__(self, shown: str, word: str, fields: Mapping[str, Any]) -> None:
        self.shown, self.word = shown, word
        self.left = {
            name.removeprefix(f"{word}."): value
            for name, value in fields.items()
            if name.startswith(f"{word}.")
        }

    def get(self, name: str, default: Any = None) -> Any:
        """A setting; of one that is listed by block, the one that all have."""
        value = self.left.pop(name, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UserError(
                    f"{self.shown}: {self.word}.{name} differs between blocks: {value}; {FILES}"
                )
            value = value[0]
        # a float32 says more digits than it has
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, name: str) -> Any:
        """A setting that must be there."""
        if (value := self.get(name)) is None:
            raise UserError(f"{self.shown}: does not say {self.word}.{name}; {AGAIN}")
        return value

    def check_none_is_left(self) -> None:
        for name in ("vocab_size", "tensor_data_layout", "attention.causal"):
            self.left.pop(name, None)
        if self.left:
            raise UserError(
                f"{self.shown}: says {', '.join(f'{self.word}.{name}' for name in self.left)},"
                f" which is not known; {FILES}"
            )


def _config(shown: str, word: str, header: Header) -> dict[str, Any]:
    """What `config.json` says of the same model."""
    fields, family = _Fields(shown, word, header.fields), FAMILIES[word]
    if "token_embd.weight" not in header.tensors:
        raise UserError(f"{shown}: has no token_embd.weight; give a whole model")
    vocabulary = header.tensors["token_embd.weight"].shape[0]
    common = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": vocabulary,
        "torch_dtype": "float32",
    }
    for name in ("bos_token_id", "eos_token_id"):
        if (token := header.fields.get(f"tokenizer.ggml.{name}")) is not None:
            common[name] = token
    make: Callable[..., dict[str, Any]] = _gpt2 if word == "gpt2" else _llama
    config = common | make(fields, family, header)
    fields.check_none_is_left()
    return config


def _gpt2(fields: _Fields, family: Family, header: Header) -> dict[str, Any]:
    return {
        "n_embd": fields.need("embedding_length"),
        "n_layer": fields.need("block_count"),
        "n_head": fields.need("attention.head_count"),
        "n_inner": fields.get("feed_forward_length"),
        "n_positions": fields.need("context_length"),
        "layer_norm_epsilon": fields.need("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    }


def _llama(fields: _Fields, family: Family, header: Header) -> dict[str, Any]:
    width, heads = fields.need("embedding_length"), fields.need("attention.head_count")
    rotated = fields.get("rope.dimension_count")
    head_dim = fields.get("attention.key_length", rotated or width // heads)
    if (
        rotated not in (None, head_dim)
        or fields.get("attention.value_length", head_dim) != head_dim
    ):
        raise UserError(
            f"{fields.shown}: heads of {head_dim}, of which {rotated} are rotated, are not known;"
            f" {FILES}"
        )
    depth = fields.need("block_count")
    config = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": fields.need("feed_forward_length"),
        "max_position_embeddings": fields.need("context_length"),
        "rms_norm_eps": fields.need("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "rope_scaling": _scaling(fields, header, head_dim),
    }
    if family.model_type not in ("llama", "olmo2", "qwen3", "smollm3"):
        del config["attention_bias"]
    if family.model_type == "qwen2":
        del config["head_dim"]
        if head_dim * heads != width:
            raise UserError(
                f"{fields.shown}: heads of {head_dim} x {heads} are not {width} wide; {FILES}"
            )
    if family.model_type == "olmo2":
        del config["head_dim"]
    window = fields.get("attention.sliding_window")
    if family.gemma:
        return config | _gemma(fields, family, config, window)
    if family.model_type == "smollm3":
        config["no_rope_layer_interval"] = 4
    if family.model_type == "llama" and window:
        del config["attention_bias"]
        return config | {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": window,
        }
    if window:
        raise UserError(
            f"{fields.shown}: attention.sliding_window={window} is not known of"
            f" {family.model_type}; {FILES}"
        )
    return config


def _gemma(
    fields: _Fields, family: Family, config: Mapping[str, Any], window: int | None
) -> dict[str, Any]:
    """What Gemma has besides; the scale of the largest is not in the file, as little as there.

    The first files of Gemma 2 say neither caps nor window, where llama.cpp takes these.
    """
    newer = family.model_type == "gemma3_text"
    largest = config["num_hidden_layers"] == (62 if newer else 46)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    own = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width // heads if largest else config["head_dim"],
        "sliding_window": window if newer or window is not None else 4096,
        "attn_logit_softcapping": fields.get("attn_logit_softcapping", None if newer else 50.0),
        "final_logit_softcapping": fields.get("final_logit_softcapping", None if newer else 30.0),
    }
    if newer:
        own |= {
            "rope_local_base_freq": fields.get("rope.freq_base_swa", 10000.0),
            "sliding_window_pattern": fields.get("attention.sliding_window_pattern", 6),
        }
    return own


def _scaling(fields: _Fields, header: Header, head_dim: int) -> dict[str, Any] | None:
    """How rotations are slowed down."""
    kind = fields.get("rope.scaling.type", "none")
    factor = fields.get("rope.scaling.factor", 1.0)
    length = fields.get("rope.scaling.original_context_length")
    fields.get("rope.scaling.finetuned")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": length,
            "beta_fast": fields.get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": fields.get("rope.scaling.yarn_beta_slow", 1.0),
        }
    if kind != "none":
        raise UserError(
            f"{fields.shown}: rotations are scaled by {kind}, which is not known; {FILES}"
        )
    return None


def llama3_scaling(shown: str, factors_R: np.ndarray, base: float) -> dict[str, Any]:
    """The settings that divide the rates of rotations by these factors.

    >>> llama3_scaling("a file", _llama3_factors(32, 10000.0, 8.0), 10000.0)["factor"]
    8.0
    """
    factor = round(float(factors_R.max()), 4)
    if not np.allclose(factors_R, _llama3_factors(factors_R.size, base, factor), rtol=1e-3):
        raise UserError(f"{shown}: rotations are scaled by factors that are not Llama 3's; {FILES}")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _llama3_factors(pairs: int, base: float, factor: float) -> np.ndarray:
    """By what Llama 3 divides each rate: nothing if it turns four times within the first 8,192
    places, `factor` if it does not turn once."""
    turns_R = 8192 * base ** (-np.arange(pairs) / pairs) / (2 * np.pi)
    smooth_R = np.clip((turns_R - 1) / 3, 0, 1)
    return 1 / ((1 - smooth_R) / factor + smooth_R)
