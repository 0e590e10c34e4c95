"""Tiny random models of every family, as `transformers` computes them: what ours must equal.

    python tests/transformers_oracle.py          # writes tests/golden/*.npz

It runs where torch and transformers are (4.57 or 5); tests/test_transformers_equality.py uses it
there. Settings differ from their defaults wherever a family has a choice. Weights come from NumPy,
seeded by the tensor's name, so that a golden file needs none: tests/test_golden_logits.py makes the
same again without torch.
"""

import copy
import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
WINDOW, ORIGINAL, LONGEST = 16, 32, 160
VOCABULARY = 61
LENGTHS = (8, WINDOW + 8, ORIGINAL + 16, 128)
"""A short one, one past the window, one past the length before rotations are slowed down."""
GOLDEN_LENGTH = ORIGINAL + 6

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": ORIGINAL,
}
YARN = {
    "rope_type": "yarn",
    "factor": 3.0,
    "original_max_position_embeddings": ORIGINAL,
    "beta_fast": 1.5,
    "beta_slow": 0.25,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 3e-3,
}
BERT = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
    "type_vocab_size": 3,
    "layer_norm_eps": 2e-3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": LONGEST,
    "layer_norm_epsilon": 2e-3,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2 | {"architectures": ["GPT2LMHeadModel"], "n_inner": 40},
    "gpt2_untied": GPT2
    | {
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu",
        "tie_word_embeddings": False,
        "scale_attn_weights": False,
    },
    "llama": SHARED
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "head_dim": 12,
        "rope_theta": 700.0,
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": False,
    },
    "llama_biased": SHARED
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": 1,
        "rope_theta": 500.0,
        "rope_scaling": LINEAR,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama_attention_biased": SHARED
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": 2,
        "rope_theta": 500.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "smollm3": SHARED
    | {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "rope_theta": 900.0,
        "no_rope_layers": [1, 0, 1],
        "rope_scaling": YARN,
    },
    "mistral": SHARED
    | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "head_dim": 10,
        "rope_theta": 300.0,
        "sliding_window": WINDOW,
        "hidden_act": "relu",
    },
    "qwen2": SHARED
    | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_theta": 1100.0,
        "rope_scaling": YARN,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": SHARED
    | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 24,
        "rope_theta": 1300.0,
        "rope_scaling": YARN,
        "tie_word_embeddings": False,
    },
    "gemma2": SHARED
    | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 12,
        "rope_theta": 400.0,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3": SHARED
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 12,
        "rope_theta": 5000.0,
        "rope_local_base_freq": 60.0,
        "rope_scaling": LINEAR,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 9,
        "hidden_activation": "gelu",
        "final_logit_softcapping": 3.0,
    },
    "olmo2": SHARED
    | {
        "model_type": "olmo2",
        "architectures": ["Olmo2ForCausalLM"],
        "rope_theta": 600.0,
        "rope_scaling": {"type": "linear", "factor": 5.0},
    },
    "bert": BERT | {"architectures": ["BertForMaskedLM"]},
    "bert_states": BERT | {"architectures": ["BertModel"], "hidden_act": "gelu_new"},
    "bert_classes": BERT
    | {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {str(index): f"c{index}" for index in range(5)},
        "label2id": {f"c{index}": index for index in range(5)},
    },
}
"""`config.json` of each, as transformers 4 spells it."""


def weight(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a random model, the same wherever it is made."""
    generator = np.random.default_rng(zlib.crc32(f"{case}/{name}".encode()))
    values = generator.normal(size=shape).astype(np.float32)
    if "norm" in name.lower() or "ln_" in name:
        gemma = case.startswith("gemma")
        centre = 0.0 if gemma or name.endswith("bias") else 1.0
        return np.float32(centre) + np.float32(0.2) * values
    if len(shape) == 1:
        return np.float32(0.1) * values
    if "emb" in name or "wte" in name or "wpe" in name:
        # gemma multiplies by sqrt(width)
        return np.float32(0.06 if case.startswith("gemma") else 0.2) * values
    return np.float32(0.9 / np.sqrt(shape[-1])) * values


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random tokens, none of them padding."""
    generator = np.random.default_rng(seed)
    return generator.integers(3, VOCABULARY, (batch, length)).astype(np.int32)


# --- with torch
# --------------------------------------------------------------------------------------------------


def save_config(case: str, folder: Path) -> None:
    """The `config.json` of a case."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CASES[case]))


def theirs(case: str) -> Any:
    """The torch model of a case, with the weights that NumPy gives."""
    import torch
    import transformers

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    # a copy: transformers 5 writes into what it is given
    config = transformers.AutoConfig.for_model(**copy.deepcopy(CASES[case]))
    config._attn_implementation = "eager"
    model = getattr(transformers, CASES[case]["architectures"][0])(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(case, name, tuple(parameter.shape))))
    return model


def state(model: Any) -> dict[str, np.ndarray]:
    """Parameters of a torch model, as its file has them: a tied head once."""
    # copies: torch updates in place, and JAX may keep what NumPy holds
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def outputs(model: Any, tokens_BT: np.ndarray, **options: Any) -> Any:
    """Everything that a torch model gives for tokens."""
    import torch

    given = {name: torch.from_numpy(np.asarray(value)) for name, value in options.items()}
    given = {name: value.long() for name, value in given.items()}
    return model(torch.from_numpy(tokens_BT).long(), output_hidden_states=True, **given)


def answer(found: Any) -> Any:
    """Logits, or states where there are none."""
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def with_gradients(model: Any) -> list[tuple[str, Any]]:
    """The parameters that a loss depends on, by name."""
    named = sorted(model.named_parameters())
    return [(name, parameter) for name, parameter in named if parameter.grad is not None]


def golden(case: str) -> dict[str, np.ndarray]:
    """What a golden file of a case holds: logits of tokens, and the norm of each gradient, sorted
    by name."""
    import torch

    model = theirs(case)
    logits = answer(outputs(model, tokens(1, GOLDEN_LENGTH)))
    probe = torch.from_numpy(np.random.default_rng(1).normal(size=tuple(logits.shape)))
    (logits * probe.float()).sum().backward()
    norms = [parameter.grad.norm().item() for _, parameter in with_gradients(model)]
    # one place in nine: the file stays small, and late places are in it
    kept = logits.detach().numpy()
    kept = kept[:, 1::9] if kept.ndim == 3 else kept
    return {"logits": kept, "gradients": np.asarray(norms, np.float32)}


def main() -> None:
    """Writes the golden files."""
    import transformers

    GOLDEN.mkdir(exist_ok=True)
    for case in sys.argv[1:] or CASES:
        np.savez_compressed(GOLDEN / f"{case}.npz", **golden(case))
        size = (GOLDEN / f"{case}.npz").stat().st_size
        print(f"{case}: {size} bytes by transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
