"""Language models by name: as many parameters as their authors count, and settings that their
`config.json` says."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxtrain import adapters, models
from jaxtrain.models import sizes
from jaxtrain.weights import config, names

COUNTS = {
    # Radford et al. 2019 round; these are the tensors of openai-community/gpt2*, tied heads once
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1_5b": 1_557_611_200,
    # the pages of meta-llama/*: 6.74B, 8.03B, 70.6B, 8.03B, 1.24B, 3.21B
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    # HuggingFaceTB/SmolLM2-* (135M, 362M, 1.71B) and SmolLM3-3B (3.08B)
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "smollm3_3b": 3_075_098_624,
    # Zhang et al. 2024: 1.1B; TinyLlama/TinyLlama-1.1B-*
    "tinyllama_1_1b": 1_100_048_384,
    # Jiang et al. 2023: 7.24B; mistralai/Mistral-7B-v0.1
    "mistral_7b": 7_241_732_096,
    # Qwen2.5 technical report, table 1: 0.49B, 1.54B, 3.09B, 7.61B
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    # the pages of Qwen/Qwen3-*: 0.6B, 1.7B, 4.0B, 8.2B
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    # Gemma 2 report, table 2: 590M and 2,024M; 918M and 8,324M (embedding, the rest)
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    # Gemma 3 report, table 1: 302M and 698M; 675M and 3,209M. 270M: 170M and 100M (Google's blog)
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 3_880_263_168,
    # the pages of allenai/OLMo-2-*: 1.48B, 7.3B
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    # sentence-transformers/all-MiniLM-L6-v2 (22.7M) and L12 (33.4M), poolers included
    "minilm_l6": 22_713_216,
    "minilm_l12": 33_360_000,
    # Devlin et al. 2018: 110M and 340M; these are BertForMaskedLM, without pooler
    "bert_base": 109_514_298,
    "bert_large": 335_174_458,
}
EMBEDDINGS = {
    "gemma2_2b": 590e6,
    "gemma2_9b": 918e6,
    "gemma3_1b": 302e6,
    "gemma3_4b": 675e6,
    "gemma3_270m": 170e6,
}
"""What the reports give beside the rest."""


def count(model: Any) -> int:
    """The parameters of an abstract init."""
    tokens_BT = jnp.zeros((1, 4), jnp.int32)
    made = jax.eval_shape(adapters.functions(model).init, jax.random.key(0), tokens_BT)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made["params"]))


def test_every_size_has_its_count() -> None:
    assert set(sizes.NAMES) == set(COUNTS) and set(sizes.NAMES) <= set(models.NAMES)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    """Of one block and of two, for all blocks have as many: tracing 80 takes a second."""
    model: Any = sizes.NAMES[name]
    one, two = (count(model.clone(depth=depth)) for depth in (1, 2))
    assert one + (model.depth - 1) * (two - one) == COUNTS[name]
    assert sum(math.prod(row.shape) for row in names.rows(model)) == COUNTS[name]
    if name in EMBEDDINGS:
        assert abs(model.vocabulary * model.width / EMBEDDINGS[name] - 1) < 0.02


@pytest.mark.parametrize("name", COUNTS)
def test_a_size_is_what_its_config_says(name: str) -> None:
    model = sizes.NAMES[name]
    back = config.read(config.write(model)).model
    assert config.canonical(back) == config.canonical(model)


PUBLISHED: dict[str, dict[str, Any]] = {
    # as the files at Hugging Face have them, without what tokenizers need
    "gpt2_124m": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "llama3_2_1b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "mistral_7b": {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "qwen2_5_0_5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3_0_6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma2_2b": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma3_1b": {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "minilm_l6": {
        "_name_or_path": "nreimers/MiniLM-L6-H384-uncased",
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": 6,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": 30522,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_size_of_that_name(name: str) -> None:
    found = config.read(PUBLISHED[name])
    assert config.canonical(found.model) == config.canonical(sizes.NAMES[name])
    dropped = sum("_pdrop" in key or "dropout_prob" in key for key in PUBLISHED[name])
    assert len(found.notes) == dropped
