"""Language models by the names that people know: the settings that their authors published.

Each is a `Transformer` or an `Encoder` with the numbers of its `config.json`, so weights from there
fit (`jaxtrain.weights`), and every one is a starting point whose fields are still flags.
"""

from typing import Any

from flax import linen as nn

from jaxtrain.models.encoder import Encoder
from jaxtrain.models.transformer import Transformer


def _gpt2(width: int, depth: int, heads: int) -> Transformer:
    """Radford et al. 2019."""
    return Transformer(
        vocabulary=50257, width=width, depth=depth, heads=heads, norm_epsilon=1e-5, max_length=1024
    )


def _llama(**settings: Any) -> Transformer:
    """What Llama and its relatives share."""
    common: dict[str, Any] = {
        "activation": "silu",
        "gated": True,
        "bias": "none",
        "norm": "rms",
        "norm_epsilon": 1e-5,
        "positions": "rotary",
        "tied": False,
    }
    return Transformer(**(common | settings))


def _llama3(**settings: Any) -> Transformer:
    """Llama 3 (Meta 2024): a larger vocabulary, slower rotations, 8 heads of keys."""
    common = {"vocabulary": 128256, "key_heads": 8, "rotary_base": 500000.0, "max_length": 8192}
    return _llama(**(common | settings))


LLAMA3_1 = {
    "rotary_scaling": "llama3",
    "rotary_factor": 8.0,
    "rotary_length": 8192,
    "max_length": 131072,
}
"""How Llama 3.1 reads 128k tokens; 3.2 takes the factor 32."""


def _smollm2(width: int, depth: int, heads: int, key_heads: int, hidden: int) -> Transformer:
    """Hugging Face 2024."""
    return _llama(
        vocabulary=49152,
        width=width,
        depth=depth,
        heads=heads,
        key_heads=key_heads,
        hidden=hidden,
        max_length=8192,
        rotary_base=100000.0 if width < 2048 else 130000.0,
        tied=True,
    )


def _qwen2_5(
    width: int, depth: int, heads: int, key_heads: int, hidden: int, **settings: Any
) -> Transformer:
    """Qwen team 2024."""
    common: dict[str, Any] = {
        "vocabulary": 151936,
        "width": width,
        "depth": depth,
        "heads": heads,
        "key_heads": key_heads,
        "hidden": hidden,
        "bias": "qkv",
        "norm_epsilon": 1e-6,
        "rotary_base": 1000000.0,
        "max_length": 32768,
    }
    return _llama(**(common | settings))


def _qwen3(
    width: int, depth: int, heads: int, hidden: int, *, key_heads: int = 8, tied: bool = False
) -> Transformer:
    """Qwen team 2025: norms on queries and keys, heads of 128 whatever the width."""
    return _llama(
        vocabulary=151936,
        width=width,
        depth=depth,
        heads=heads,
        key_heads=key_heads,
        head_dim=128,
        hidden=hidden,
        qk_norm="head",
        norm_epsilon=1e-6,
        rotary_base=1000000.0,
        max_length=40960,
        tied=tied,
    )


def _gemma(**settings: Any) -> Transformer:
    """What Gemma 2 and 3 share (Google 2024, 2025)."""
    common: dict[str, Any] = {
        "activation": "gelu",
        "norm_epsilon": 1e-6,
        "norm_offset": True,
        "arrangement": "sandwich",
        "embed_scale": True,
        "tied": True,
        "head_dim": 256,
        "attention_scale": 256**-0.5,
    }
    return _llama(**(common | settings))


def _gemma2(**settings: Any) -> Transformer:
    common: dict[str, Any] = {
        "vocabulary": 256000,
        "max_length": 8192,
        "pattern": ("window", "full"),
        "window": 4096,
        "attention_cap": 50.0,
        "logit_cap": 30.0,
    }
    return _gemma(**(common | settings))


def _gemma3(**settings: Any) -> Transformer:
    common: dict[str, Any] = {
        "vocabulary": 262144,
        "max_length": 32768,
        "qk_norm": "head",
        "pattern": ("window",) * 5 + ("full",),
        "window": 512,
        "rotary_base": 1000000.0,
        "window_rotary_base": 10000.0,
    }
    return _gemma(**(common | settings))


GEMMA3_4B = {
    "vocabulary": 262208,
    "max_length": 131072,
    "window": 1024,
    "rotary_scaling": "linear",
    "rotary_factor": 8.0,
}
"""The text part of the larger ones, which see pictures, too."""


def _olmo2(width: int, depth: int, heads: int, hidden: int, **settings: Any) -> Transformer:
    """Ai2 2024: norms on what leaves a branch, and on all queries and keys as one."""
    return _llama(
        vocabulary=100352,
        width=width,
        depth=depth,
        heads=heads,
        hidden=hidden,
        norm_epsilon=1e-6,
        arrangement="output",
        qk_norm="all",
        rotary_base=500000.0,
        max_length=4096,
        **settings,
    )


def _bert(width: int, depth: int, heads: int, **settings: Any) -> Encoder:
    """Devlin et al. 2018."""
    return Encoder(
        vocabulary=30522, width=width, depth=depth, heads=heads, max_length=512, **settings
    )


NAMES: dict[str, nn.Module] = {
    "gpt2_124m": _gpt2(768, 12, 12),
    "gpt2_355m": _gpt2(1024, 24, 16),
    "gpt2_774m": _gpt2(1280, 36, 20),
    "gpt2_1_5b": _gpt2(1600, 48, 25),
    "llama2_7b": _llama(
        vocabulary=32000, width=4096, depth=32, heads=32, hidden=11008, max_length=4096
    ),
    "llama3_8b": _llama3(width=4096, depth=32, heads=32, hidden=14336),
    "llama3_70b": _llama3(width=8192, depth=80, heads=64, hidden=28672),
    "llama3_1_8b": _llama3(width=4096, depth=32, heads=32, hidden=14336, **LLAMA3_1),
    "llama3_2_1b": _llama3(
        width=2048,
        depth=16,
        heads=32,
        hidden=8192,
        tied=True,
        **(LLAMA3_1 | {"rotary_factor": 32.0}),
    ),
    "llama3_2_3b": _llama3(
        width=3072,
        depth=28,
        heads=24,
        hidden=8192,
        tied=True,
        **(LLAMA3_1 | {"rotary_factor": 32.0}),
    ),
    "smollm2_135m": _smollm2(576, 30, 9, 3, 1536),
    "smollm2_360m": _smollm2(960, 32, 15, 5, 2560),
    "smollm2_1_7b": _smollm2(2048, 24, 32, 32, 8192),
    "smollm3_3b": _llama(
        vocabulary=128256,
        width=2048,
        depth=36,
        heads=16,
        key_heads=4,
        hidden=11008,
        norm_epsilon=1e-6,
        pattern=("full", "full", "full", "unrotated"),
        rotary_base=5000000.0,
        max_length=65536,
        tied=True,
    ),
    "tinyllama_1_1b": _llama(
        vocabulary=32000,
        width=2048,
        depth=22,
        heads=32,
        key_heads=4,
        hidden=5632,
        max_length=2048,
    ),
    "mistral_7b": _llama(
        vocabulary=32000,
        width=4096,
        depth=32,
        heads=32,
        key_heads=8,
        hidden=14336,
        pattern=("window",),
        window=4096,
        max_length=32768,
    ),
    "qwen2_5_0_5b": _qwen2_5(896, 24, 14, 2, 4864, tied=True),
    "qwen2_5_1_5b": _qwen2_5(1536, 28, 12, 2, 8960, tied=True, max_length=131072),
    "qwen2_5_3b": _qwen2_5(2048, 36, 16, 2, 11008, tied=True),
    "qwen2_5_7b": _qwen2_5(3584, 28, 28, 4, 18944, vocabulary=152064, max_length=131072),
    "qwen3_0_6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3_1_7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3_4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3_8b": _qwen3(4096, 36, 32, 12288),
    "gemma2_2b": _gemma2(width=2304, depth=26, heads=8, key_heads=4, hidden=9216),
    "gemma2_9b": _gemma2(width=3584, depth=42, heads=16, key_heads=8, hidden=14336),
    "gemma3_270m": _gemma3(width=640, depth=18, heads=4, key_heads=1, hidden=2048),
    "gemma3_1b": _gemma3(width=1152, depth=26, heads=4, key_heads=1, hidden=6912),
    "gemma3_4b": _gemma3(width=2560, depth=34, heads=8, key_heads=4, hidden=10240, **GEMMA3_4B),
    "olmo2_1b": _olmo2(2048, 16, 16, 8192),
    "olmo2_7b": _olmo2(4096, 32, 32, 11008),
    "minilm_l6": _bert(384, 6, 12, head="states", pooler=True),
    "minilm_l12": _bert(384, 12, 12, head="states", pooler=True),
    "bert_base": _bert(768, 12, 12),
    "bert_large": _bert(1024, 24, 16),
}
"""The numbers stand in the `config.json` of each at Hugging Face; tests/test_sizes.py says where
the parameters are counted."""
