"""Hugging Face's configurations and tensor names: both spellings, every key accounted for, every
tensor accounted for, and what cannot be said refused by name."""

import copy
from typing import Any

import numpy as np
import pytest
import transformers_oracle as oracle

from jaxtrain.errors import UserError
from jaxtrain.models.encoder import Encoder
from jaxtrain.models.transformer import Transformer
from jaxtrain.weights import config, names

LLAMA, GEMMA3 = oracle.CASES["llama"], oracle.CASES["gemma3"]
TINY = Transformer(vocabulary=5, width=4, depth=1, heads=2, max_length=6)


def changed(case: str, **changes: Any) -> dict[str, Any]:
    """The config of a case with other values; None takes a key away."""
    found = copy.deepcopy(oracle.CASES[case]) | changes
    return {name: value for name, value in found.items() if value is not None}


def said(case: str, **changes: Any) -> str:
    with pytest.raises(UserError) as raised:
        config.read(changed(case, **changes))
    return str(raised.value)


def random_file(model: names.Model) -> dict[str, np.ndarray]:
    return {row.name: oracle.weight("any", row.name, row.stored) for row in names.rows(model)}


def shapes(file: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in file.items()}


def load(model: names.Model, file: dict[str, np.ndarray], **options: Any) -> Any:
    return names.to_ours(model, file.__getitem__, shapes(file), **options)


# --- configurations
# --------------------------------------------------------------------------------------------------


def test_both_spellings_are_one_model() -> None:
    new = changed("llama", rope_theta=None, rope_scaling=None, dtype="float32")
    new["rope_parameters"] = {**oracle.LLAMA3, "rope_theta": 700.0}
    assert config.read(new).model == config.read(LLAMA).model
    newer = changed("gemma3", rope_theta=None, rope_scaling=None, rope_local_base_freq=None)
    newer |= {"sliding_window_pattern": None}
    newer["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    newer["rope_parameters"] = {
        "full_attention": {**oracle.LINEAR, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 60.0},
    }
    assert config.read(newer).model == config.read(GEMMA3).model


@pytest.mark.parametrize("case", oracle.CASES)
def test_what_is_written_is_read_as_the_same(case: str) -> None:
    model = config.read(oracle.CASES[case]).model
    written = config.write(model, keep={"eos_token_id": 2}, dtype="bfloat16")
    assert config.canonical(config.read(written).model) == config.canonical(model)
    assert (written["eos_token_id"], written["dtype"]) == (2, "bfloat16")


def test_how_a_program_runs_is_in_no_config() -> None:
    model = config.read(LLAMA).model
    other = model.clone(scan=True, chunk=8, dropout=0.1, padded_vocabulary=64)
    assert config.write(other) == config.write(model)


def test_dropout_is_said_and_not_taken_over() -> None:
    found = config.read(changed("gpt2", resid_pdrop=0.1))
    assert found.model.dropout == 0.0
    assert found.notes == (
        "config.json: resid_pdrop=0.1 is not taken over; say --model.dropout if it shall train so",
    )


@pytest.mark.parametrize(
    ("case", "changes", "part"),
    [
        ("llama", {"model_type": "mamba"}, "model_type='mamba': we have gpt2, llama"),
        ("gemma3", {"model_type": "gemma3"}, "sees pictures, too; save its text part by"),
        ("llama", {"model_type": "lama"}, "did you mean 'llama'?"),
        ("llama", {"hidden_size": None}, "hidden_size=None: must be there, a whole number >= 1"),
        ("llama", {"hidden_size": 32.0}, "hidden_size=32.0: must be there, a whole number >= 1"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: must be there, a number > 0"),
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu': we have gelu"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3: does not divide 4"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True: our block has such biases only beside those"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: llama turns whole"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}: not a"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings=1: must be true or false"),
        ("llama", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters says 5.0; remove one"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "rope_type='longrope': we have default, linear, llama3, yarn",
        ),
        (
            "llama",
            {"rope_scaling": {**oracle.LINEAR, "long_factor": [1]}},
            "long_factor=[1]: not a key of rope_type linear",
        ),
        (
            "qwen3",
            {"rope_scaling": {**oracle.YARN, "attention_factor": 1.5}},
            "attention_factor=1.5: our YaRN has 0.1 ln(factor) + 1 = 1.10986",
        ),
        ("qwen3", {"rope_scaling": {**oracle.YARN, "truncate": False}}, "truncate=False"),
        ("qwen3", {"rope_scaling": {"rope_type": "linear"}}, "factor=None: must be there"),
        ("qwen2", {"layer_types": ["full_attention"]}, "must be num_hidden_layers=3 of"),
        ("qwen2", {"sliding_window": 0}, "sliding_window=0: must be there, a whole number >= 1"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0]: must be a list of at"),
        (
            "smollm3",
            {"use_sliding_window": True, "sliding_window": 4},
            "our blocks have a window or no positions, never both",
        ),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True: we"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "we have no model of this kind"),
        ("gpt2", {"n_head": 5}, "n_head=5: does not divide 32"),
        ("bert", {"is_decoder": True}, "is_decoder=True: we have no model of this kind"),
        ("bert", {"position_embedding_type": "relative_key"}, "we have absolute"),
        ("bert", {"architectures": ["BertForQuestionAnswering"]}, "we have BertModel"),
    ],
)
def test_what_we_cannot_say_is_refused_by_name(
    case: str, changes: dict[str, Any], part: str
) -> None:
    assert part in said(case, **changes)


@pytest.mark.parametrize("case", oracle.CASES)
def test_no_key_is_passed_over(case: str) -> None:
    """A key that nobody knows, in every family; and every key of a case is read or harmless."""
    assert "temperature_of_attention=2: not a key of" in said(case, temperature_of_attention=2)


@pytest.mark.parametrize(
    ("model", "part"),
    [
        (TINY.clone(gated=True), "nearest is gpt2, which cannot say gated=True"),
        (config.read(LLAMA).model.clone(rotary_share=0.5), "cannot say rotary_share=0.5"),
        (config.read(LLAMA).model.clone(qk_norm="all", bias="qkv"), "cannot say"),
        (Encoder(head="states"), "nearest is bert, which cannot say pooler=False"),
    ],
)
def test_a_model_of_no_family_is_not_written(model: Any, part: str) -> None:
    with pytest.raises(UserError, match="no Hugging Face family that we know is like it") as raised:
        config.write(model)
    assert part in str(raised.value)


# --- tensors
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", oracle.CASES)
def test_there_and_back_is_bit_for_bit(case: str) -> None:
    model = config.read(oracle.CASES[case]).model
    file = random_file(model)
    back = names.to_hugging_face(model, load(model, file))
    assert list(back) == list(dict.fromkeys(row.name for row in names.rows(model)))
    for name, array in file.items():
        np.testing.assert_array_equal(back[name], array)


def test_a_bare_file_with_buffers_and_a_copy_of_the_head() -> None:
    """As the first GPT-2 files are: no prefix, and the causal mask beside the parameters."""
    file = {name.removeprefix("transformer."): a for name, a in random_file(TINY).items()}
    plain = load(TINY, file)
    file |= {"h.0.attn.bias": np.tril(np.ones((1, 1, 6, 6))), "h.0.attn.masked_bias": np.zeros(())}
    file["lm_head.weight"] = file["wte.weight"].copy()
    found = load(TINY, file)
    assert found["embed"] is file["wte.weight"] or np.array_equal(found["embed"], plain["embed"])
    file["lm_head.weight"][0, 0] += 1
    with pytest.raises(UserError, match=r'lm_head.weight differs from wte.weight.*"tie_word_emb'):
        load(TINY, file)


def test_heads_are_where_the_fused_kernel_has_them() -> None:
    file = random_file(TINY)
    found = load(TINY, file)["block0"]["attention"]
    fused = file["transformer.h.0.attn.c_attn.weight"]
    # value, second head, first number: column 2 * 4 + 2
    np.testing.assert_array_equal(found["value"]["kernel"][:, 1, 0], fused[:, 10])


def test_a_padded_vocabulary_is_not_in_files() -> None:
    model = config.read(LLAMA).model
    file, padded = random_file(model), model.clone(padded_vocabulary=64)
    params = load(padded, file)
    assert params["embed"].shape == (64, 32) and params["head"]["kernel"].shape == (32, 64)
    assert not params["embed"][61:].any() and not params["head"]["kernel"][:, 61:].any()
    back = names.to_hugging_face(padded, params)
    np.testing.assert_array_equal(back["lm_head.weight"], file["lm_head.weight"])


def test_one_error_for_all_that_does_not_fit() -> None:
    file = random_file(TINY)
    del file["transformer.ln_f.weight"]
    file["transformer.wpe.weight"] = np.zeros((7, 4), np.float32)
    file["transformer.h.1.ln_1.weight"] = np.zeros(4, np.float32)
    with pytest.raises(UserError) as raised:
        load(TINY, file, what="DIR")
    assert str(raised.value) == (
        "DIR is not the model of its config.json: missing: transformer.ln_f.weight; left over:"
        " transformer.h.1.ln_1.weight; misshapen: transformer.wpe.weight (7, 4), must be (6, 4)"
    )


def test_old_names_and_other_heads_of_bert() -> None:
    model = Encoder(vocabulary=5, width=4, depth=1, heads=2, max_length=6)
    file = random_file(model)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for name, array in file.items()
    }
    old |= {
        "bert.pooler.dense.weight": np.zeros((4, 4)),
        "cls.seq_relationship.bias": np.zeros(2),
        "cls.predictions.decoder.bias": file["cls.predictions.bias"],
        "bert.embeddings.position_ids": np.arange(6)[None],
    }
    planned = names.plan(model, shapes(old), what="DIR")
    (note,) = planned.notes
    assert note == (
        "DIR: left out, for this model has no place for it: bert.pooler.dense.weight,"
        " cls.seq_relationship.bias"
    )
    for name, array in names.to_hugging_face(model, load(model, old)).items():
        np.testing.assert_array_equal(array, file[name])


def test_a_new_head_may_be_missing() -> None:
    whole = Encoder(vocabulary=5, width=4, depth=1, heads=2, max_length=6, head="classes")
    file = random_file(whole.clone(head="states"))
    with pytest.raises(UserError, match=r"missing: classifier.weight, classifier.bias"):
        load(whole, file)
    planned = names.plan(whole, shapes(file), new=("head",))
    assert planned.new == ("head/kernel", "head/bias")
    assert "head" not in load(whole, file, new=("head",))


def test_parameters_of_another_model_are_not_written() -> None:
    params = load(TINY, random_file(TINY))
    with pytest.raises(UserError, match=r"are not those of the model: head/kernel"):
        names.to_hugging_face(TINY.clone(tied=False), params)
    with pytest.raises(UserError, match="Transformer.norm=rms: no Hugging Face family"):
        names.rows(TINY.clone(norm="rms"))
