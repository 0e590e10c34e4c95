"""GGUF files, for reading: a model's settings as the `config.json` that they were made from, and
its tensors under Hugging Face's names, dequantised as they are read.

The package `gguf` dequantises (F32, F16, BF16, the old kinds such as Q4_1 and Q8_0, the K-quants).
The header is walked here: the package's own reader trusts the lengths in it, and a damaged one
makes it count for ever. What `llama.cpp`'s converter did to the tensors is undone: queries and keys
of Llama are interleaved there, norms of Gemma hold 1 + scale, kernels of GPT-2 are turned.
"""

import dataclasses
import functools
import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain import extras
from jaxtrain.checkpoints import lazy
from jaxtrain.errors import CheckpointError, UserError
from jaxtrain.messages import one_line, printable

MAGIC = b"GGUF"
ALIGNMENT = 32
AGAIN = "download it again"
STRING, ARRAY = 8, 9
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""The kinds of numbers of the header, by the letters of `struct`."""

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
class Tensor:
    """A tensor as the header describes it."""

    shape: tuple[int, ...]
    kind: int
    """Number of `gguf.GGMLQuantizationType`."""
    start: int
    """Its first byte in the file."""
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    fields: Mapping[str, Any]
    """By name, such as `llama.block_count`, `tokenizer.ggml.tokens`, `tokenizer.chat_template`."""
    tensors: Mapping[str, Tensor]


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
    extras.require(shown, "gguf")
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


def read_header(path: Path) -> Header:
    """All that a file says of itself, checked against its size before anything is allocated."""
    shown = printable(str(path))
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{shown}: cannot be read ({one_line(str(error))})") from None
    try:
        with data, memoryview(data) as view:
            return _parsed(view)
    except (struct.error, UnicodeDecodeError, _DamagedError) as error:
        said = str(error) if isinstance(error, _DamagedError) else "it ends in its header"
        raise UserError(f"{shown}: is no whole GGUF file: {said}; {AGAIN}") from None


class _DamagedError(Exception):
    """What is wrong with a header, in words."""


class _Walk:
    """A place in the header, which moves on with all that is read."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.place = data, 0

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.place)
        self.place += struct.calcsize(f"<{letter}")
        return value

    def count(self, each: int) -> int:
        """A number of things, which at least must have room for so many bytes each."""
        count = self.number("Q")
        if count * each > len(self.data) - self.place:
            raise _DamagedError(f"it says that {count} more things follow in its header")
        return count

    def string(self) -> str:
        size = self.count(1)
        text = bytes(self.data[self.place : self.place + size]).decode("utf-8", "surrogateescape")
        self.place += size
        return text

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise _DamagedError(f"a value of the unknown kind {kind}")
        inner = self.number("I")
        if inner == ARRAY:
            return [self.value(ARRAY) for _ in range(self.count(12))]
        if inner == STRING:
            return [self.string() for _ in range(self.count(8))]
        if inner not in SCALARS:
            raise _DamagedError(f"an array of the unknown kind {inner}")
        size = struct.calcsize(f"<{SCALARS[inner]}")
        count = self.count(size)
        values = struct.unpack_from(f"<{count}{SCALARS[inner]}", self.data, self.place)
        self.place += count * size
        return list(values)


def _parsed(data: memoryview) -> Header:
    walk = _Walk(data)
    if bytes(data[:4]) != MAGIC:
        raise _DamagedError("it does not begin with GGUF")
    walk.place = 4
    version = walk.number("I")
    if version not in (2, 3):
        raise _DamagedError(f"version {version}, known are 2 and 3, little-endian")
    tensors, fields = walk.count(24), walk.count(12)
    found: dict[str, Any] = {}
    for _ in range(fields):
        name = walk.string()
        if name in found:
            raise _DamagedError(f"{printable(name)} is there twice")
        found[name] = walk.value(walk.number("I"))
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name = walk.string()
        dims = walk.number("I")
        if dims > 4 or name in infos:
            raise _DamagedError(f"{printable(name)} is there twice, or has {dims} dims")
        shape = tuple(walk.number("Q") for _ in range(dims))[::-1]
        infos[name] = (shape, walk.number("I"), walk.number("Q"))
    alignment = found.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _DamagedError(f"general.alignment is {alignment}")
    base = -(-walk.place // alignment) * alignment
    return Header(found, _placed(infos, base, len(data)))


def _placed(
    infos: Mapping[str, tuple[tuple[int, ...], int, int]], base: int, size: int
) -> dict[str, Tensor]:
    """The tensors with their bytes, none over another or past the end."""
    sizes = _block_sizes()
    tensors: dict[str, Tensor] = {}
    for name, (shape, kind, offset) in infos.items():
        if kind not in sizes:
            raise _DamagedError(f"{printable(name)} is of the unknown kind {kind}")
        block, nbytes = sizes[kind]
        if not shape or shape[-1] % block:
            raise _DamagedError(f"{printable(name)} of {shape} is not made of blocks of {block}")
        tensors[name] = Tensor(shape, kind, base + offset, math.prod(shape) // block * nbytes)
    end, before = base, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise _DamagedError(f"{printable(name)} and {printable(before)} overlap")
        end, before = tensor.start + tensor.nbytes, name
    if tensors and end > size:
        raise _DamagedError(f"its tensors end at byte {end}, it has {size}")
    return tensors


@functools.cache
def _block_sizes() -> dict[int, tuple[int, int]]:
    """Numbers and bytes of a block, by the kind of a tensor."""
    import gguf

    return {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


def _lazy(path: Path, name: str, tensor: Tensor) -> lazy.Lazy:
    """A tensor in float32, whose rows are dequantised as they are read."""
    import gguf
    from gguf import quants

    kind = gguf.GGMLQuantizationType(tensor.kind)
    width = tensor.shape[-1]
    block, nbytes = _block_sizes()[tensor.kind]
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
                raise UserError(f"{self.shown}: {self.word}.{name} differs between blocks: {value}")
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
                " which is not known; take the model's safetensors files"
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
            " take the model's safetensors files"
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
            raise UserError(f"{fields.shown}: heads of {head_dim} x {heads} are not {width} wide")
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
            f" {family.model_type}; take the model's safetensors files"
        )
    return config


def _gemma(
    fields: _Fields, family: Family, config: Mapping[str, Any], window: int | None
) -> dict[str, Any]:
    """What Gemma has besides; the scale of the largest is not in the file, as little as there."""
    newer = family.model_type == "gemma3_text"
    largest = config["num_hidden_layers"] == (62 if newer else 46)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    own = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width // heads if largest else config["head_dim"],
        "sliding_window": window,
        "attn_logit_softcapping": fields.get("attn_logit_softcapping"),
        "final_logit_softcapping": fields.get("final_logit_softcapping"),
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
        raise UserError(f"{fields.shown}: rotations are scaled by {kind}, which is not known")
    return None


def llama3_scaling(shown: str, factors_R: np.ndarray, base: float) -> dict[str, Any]:
    """The settings that divide the rates of rotations by these factors.

    >>> llama3_scaling("a file", _llama3_factors(32, 10000.0, 8.0), 10000.0)["factor"]
    8.0
    """
    factor = round(float(factors_R.max()), 4)
    if not np.allclose(factors_R, _llama3_factors(factors_R.size, base, factor), rtol=1e-3):
        raise UserError(
            f"{shown}: rotations are scaled by factors that are not Llama 3's; take the model's"
            " safetensors files"
        )
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
