"""Adapters as PEFT keeps them: read and written, held to kernels that are merged by hand; and, in a
slow test, to PEFT."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors import numpy as reference

from jaxtrain import tree
from jaxtrain.errors import UserError
from jaxtrain.models import Transformer
from jaxtrain.models.lora import LoRA
from jaxtrain.weights import names, peft_files

LLAMA = Transformer(
    vocabulary=11,
    width=8,
    depth=2,
    heads=4,
    key_heads=2,
    hidden=12,
    positions="rotary",
    norm="rms",
    gated=True,
    activation="silu",
    bias="none",
)
GPT2 = Transformer(vocabulary=11, width=8, depth=2, heads=2, max_length=16)
TOKENS = np.arange(12).reshape(2, 6) % 11
DRAW = np.random.default_rng(0)


def tensors_of(model: Transformer) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return {
        row.name: draw.standard_normal(row.stored).astype(np.float32) * 0.3
        for row in names.rows(model)
    }


def ours(model: Transformer, tensors: dict[str, np.ndarray]) -> Any:
    shapes = {name: array.shape for name, array in tensors.items()}
    return names.to_ours(model, tensors.__getitem__, shapes)


def random(*shape: int) -> np.ndarray:
    return DRAW.standard_normal(shape).astype(np.float32)


def saved(folder: Path, tensors: dict[str, np.ndarray], **said: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", **said}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefixed = {f"base_model.model.{name}": array for name, array in tensors.items()}
    reference.save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def filled(params: Any, adapters: dict[str, np.ndarray]) -> Any:
    flat = tree.flatten(params) | adapters
    whole: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        place = whole
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = jnp.asarray(leaf)
    return whole


def logits(model: Any, params: Any) -> np.ndarray:
    return np.asarray(model.apply({"params": params}, TOKENS))


Q0, V1, UP0 = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.0.mlp.up_proj",
)


def merged_by_hand(
    tensors: dict[str, np.ndarray], adapters: dict[str, np.ndarray], scales: dict[str, float]
) -> dict[str, np.ndarray]:
    """PyTorch's W + scale B A, in float64."""
    found = dict(tensors)
    for name, scale in scales.items():
        a, b = (adapters[f"{name}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        found[f"{name}.weight"] = (tensors[f"{name}.weight"] + scale * (b @ a)).astype(np.float32)
    return found


def llama_adapters(ranks: dict[str, int]) -> dict[str, np.ndarray]:
    sizes = {Q0: (8, 8), V1: (8, 4), UP0: (8, 12)}
    found = {}
    for name, rank in ranks.items():
        into, out = sizes[name]
        found[f"{name}.lora_A.weight"] = random(rank, into)
        found[f"{name}.lora_B.weight"] = random(out, rank)
    return found


@pytest.mark.parametrize(
    ("said", "ranks", "scales"),
    [
        ({}, {Q0: 2, V1: 2, UP0: 2}, {Q0: 2.0, V1: 2.0, UP0: 2.0}),
        ({"use_rslora": True}, {Q0: 2, V1: 2}, {Q0: 4 / 2**0.5, V1: 4 / 2**0.5}),
        (
            {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 1}},
            {Q0: 2, V1: 3},
            {Q0: 0.5, V1: 4 / 3},
        ),
    ],
)
def test_an_adapter_of_peft_is_what_it_would_be_if_merged(
    tmp_path: Path, said: dict[str, Any], ranks: dict[str, int], scales: dict[str, float]
) -> None:
    base, adapters = tensors_of(LLAMA), llama_adapters(ranks)
    lora, found = peft_files.read(saved(tmp_path / "a", adapters, **said), LLAMA)
    assert len(found) == 2 * len(ranks) and lora.rank == max(ranks.values())
    got = logits(lora.on(LLAMA), filled(ours(LLAMA, base), found))
    want = logits(LLAMA, ours(LLAMA, merged_by_hand(base, adapters, scales)))
    np.testing.assert_allclose(got, want, atol=2e-5)
    made = jax.eval_shape(lora.on(LLAMA).init, jax.random.key(0), TOKENS)["params"]
    made = nn.meta.unbox(made)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(made).items() if "lora" in path}
    assert shapes == {path: array.shape for path, array in found.items()}  # its pattern is theirs


def test_one_layer_of_gpt2_is_three_here(tmp_path: Path) -> None:
    base = tensors_of(GPT2)
    name = "transformer.h.1.attn.c_attn"
    a, b = random(2, 8), random(24, 2)
    adapters = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    folder = saved(tmp_path / "a", adapters, fan_in_fan_out=True)
    lora, found = peft_files.read(folder, GPT2)
    assert sorted(found) == [
        f"block1/attention/{part}/lora_{end}" for part in ("key", "query", "value") for end in "ab"
    ]
    whole = dict(base)
    whole[f"{name}.weight"] = base[f"{name}.weight"] + 2 * (b @ a).T  # Conv1D is (in, out)
    got = logits(lora.on(GPT2), filled(ours(GPT2, base), found))
    np.testing.assert_allclose(got, logits(GPT2, ours(GPT2, whole)), atol=2e-5)
    peft_files.write(tmp_path / "b", GPT2, found, lora)
    back = reference.load_file(tmp_path / "b" / "adapter_model.safetensors")
    for end, array in (("A", a), ("B", b)):
        np.testing.assert_array_equal(back[f"base_model.model.{name}.lora_{end}.weight"], array)


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("parts", [("query", "key", "value"), ("query", "value")])
def test_adapters_that_differ_become_one_of_a_greater_rank(
    tmp_path: Path, parts: tuple[str, ...], stabilized: bool
) -> None:
    lora = LoRA(2, 6.0, rank_stabilized=stabilized, pattern=("attention/",))
    adapters = {}
    for part in parts:
        adapters[f"block0/attention/{part}/lora_a"] = random(8, 2)
        adapters[f"block0/attention/{part}/lora_b"] = random(2, 2, 4)
    assert peft_files.write(tmp_path / "a", GPT2, adapters, lora) == 1
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    [(pattern, rank)] = said["rank_pattern"].items()
    assert rank == 2 * len(parts) and re.fullmatch(pattern, "transformer.h.0.attn.c_attn")
    other, found = peft_files.read(tmp_path / "a", GPT2)
    params = ours(GPT2, tensors_of(GPT2))
    want = logits(lora.on(GPT2), filled(params, adapters))
    np.testing.assert_allclose(logits(other.on(GPT2), filled(params, found)), want, atol=2e-5)


def test_what_is_written_has_the_names_and_shapes_of_peft(tmp_path: Path) -> None:
    lora = LoRA(3, 6.0, pattern=("query", "mlp_out"))
    init = jax.jit(lora.on(LLAMA).init)
    params = init(jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(np.asarray, nn.meta.unbox(params))
    folder = tmp_path / "a"
    assert peft_files.write(folder, LLAMA, params, lora, base="the/base") == 4
    found = reference.load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1"
    assert found[f"{prefix}.self_attn.q_proj.lora_A.weight"].shape == (3, 8)
    assert found[f"{prefix}.self_attn.q_proj.lora_B.weight"].shape == (8, 3)
    assert found[f"{prefix}.mlp.down_proj.lora_A.weight"].shape == (3, 12)
    a = params["block1"]["attention"]["query"]["lora_a"]
    np.testing.assert_array_equal(found[f"{prefix}.self_attn.q_proj.lora_A.weight"], a.T)
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["r"] == 3 and said["lora_alpha"] == 6.0 and said["rank_pattern"] == {}
    assert said["base_model_name_or_path"] == "the/base" and not said["fan_in_fan_out"]
    assert said["target_modules"] == sorted(
        f"model.layers.{index}.{name}"
        for index in (0, 1)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again, back = peft_files.read(folder, LLAMA)
    assert (again.rank, again.alpha) == (3, 6.0)
    assert again.pattern == ("(^|/)attention/query$", "(^|/)mlp_out$")
    for path, array in back.items():
        np.testing.assert_array_equal(array, tree.flatten(params)[path])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": (
        {"init_lora_weights": "pissa"},
        "init_lora_weights='pissa' is more than LoRA here has; merge it in PEFT",
    ),
    "dora": ({"use_dora": True}, "use_dora=True is more than LoRA here has; merge it in PEFT"),
    "bias": ({"bias": "lora_only"}, "bias='lora_only' is more than LoRA here has; merge it in"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'] is more than LoRA"),
    "unknown": (
        {"brand_new": {"rank": 3}},
        "brand_new={'rank': 3}: not a setting of LoRA that we know; take it out if it changes no",
    ),
    "misspelt": (
        {"lora_alhpa": 32},
        "lora_alhpa=32: not a setting of LoRA that we know; did you mean 'lora_alpha'?; take it",
    ),
    "zero": ({"brand_new": 0}, "brand_new=0: not a setting of LoRA that we know"),
    "kasa": ({"kasa_config": {"beta": 1e-4}}, "kasa_config={'beta': 0.0001} is more than LoRA"),
    "kind": ({"peft_type": "IA3"}, "is of the kind IA3, not LORA; merge it in PEFT"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_more_than_lora_is_refused(tmp_path: Path, name: str) -> None:
    said, text = REFUSED[name]
    folder = saved(tmp_path / "a", llama_adapters({Q0: 2}), **said)
    with pytest.raises(UserError, match=re.escape(text)):
        peft_files.read(folder, LLAMA)


_OF_ALL = json.loads("""
    {"auto_mapping": null, "base_model_name_or_path": "base", "revision": null, "r": 2,
     "task_type": "CAUSAL_LM", "inference_mode": true, "target_modules": ["q_proj"],
     "lora_alpha": 4, "lora_dropout": 0.0, "fan_in_fan_out": false, "bias": "none",
     "modules_to_save": null, "init_lora_weights": true, "layers_to_transform": null,
     "layers_pattern": null}""")
_PATTERNS = json.loads("""
    {"rank_pattern": {}, "alpha_pattern": {}, "megatron_config": null,
     "megatron_core": "megatron.core", "loftq_config": {}}""")
_MORE = {"use_rslora": False, "use_dora": False, "layer_replication": None}
_RECENT = {"exclude_modules": None, "eva_config": None, "lora_bias": False}
_NEWEST = json.loads("""
    {"peft_version": "0.21.2", "trainable_token_indices": null, "corda_config": null,
     "lora_ga_config": null, "velora_config": null, "alora_invocation_tokens": null,
     "use_qalora": false, "qalora_group_size": 16, "monteclora_config": null,
     "target_parameters": null, "use_bdlora": null, "arrow_config": null, "kasa_config": null,
     "ensure_weight_tying": false}""")
WRITTEN = {
    "0.4.0": _OF_ALL,
    "0.7.1": _OF_ALL | _PATTERNS,
    "0.11.1": _OF_ALL | _PATTERNS | _MORE,
    "0.14.0": _OF_ALL | _PATTERNS | _MORE | _RECENT,
    "0.21.2": _OF_ALL | _PATTERNS | _MORE | _RECENT | _NEWEST,
}
"""What `LoraConfig(r=2, target_modules=["q_proj"])` of these versions wrote."""


@pytest.mark.parametrize("version", WRITTEN)
def test_what_versions_of_peft_write_for_plain_lora_is_read(tmp_path: Path, version: str) -> None:
    folder = saved(tmp_path / "a", llama_adapters({Q0: 2}), **WRITTEN[version])
    lora, found = peft_files.read(folder, LLAMA)
    assert (lora.rank, lora.alpha, len(found)) == (2, 4.0, 2)


@pytest.mark.slow
def test_what_this_peft_writes_for_plain_lora_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tensors = llama_adapters({Q0: 2})
    theirs = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = saved(tmp_path / "a", tensors)
    theirs.save_pretrained(folder)  # over the settings that were there
    lora, found = peft_files.read(folder, LLAMA)
    assert (lora.rank, lora.alpha, len(found)) == (2, 4.0, 2)


def test_adapters_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    good = llama_adapters({Q0: 2})
    place = f"{Q0}.lora_A.weight"
    cases = {
        "base_model.model.model.layers.7.x.lora_A.weight belong to no dense layer": good
        | {"model.layers.7.x.lora_A.weight": random(2, 8)},
        "base_model.model.lm_head.weight belong to no dense layer of Transformer": good
        | {"lm_head.weight": random(11, 8)},
        f"{Q0} has {{'A': (2, 7), 'B': (8, 2)}}, must be A (rank, 8) and B (8, rank)": good
        | {place: random(2, 7)},
        f"{Q0} has {{'B': (8, 2)}}, must be A (rank, 8) and B (8, rank)": {
            name: array for name, array in good.items() if name != place
        },
    }
    for said, tensors in cases.items():
        with pytest.raises(UserError, match=re.escape(said)):
            peft_files.read(saved(tmp_path / "a", tensors), LLAMA)
    whole = {name: np.ones(part.shape, np.int8) for name, part in llama_adapters({Q0: 2}).items()}
    with pytest.raises(
        UserError, match="_A.weight is int8, and weights are floats; take the files"
    ):
        peft_files.read(saved(tmp_path / "a", whole), LLAMA)
    with pytest.raises(UserError, match="a: holds no adapters; give the folder of a PEFT adapter"):
        peft_files.read(saved(tmp_path / "a", {}), LLAMA)
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(UserError, match="weights in pickle files are not read"):
        peft_files.read(tmp_path / "a", LLAMA)
    with pytest.raises(UserError, match=r"has no adapter_config.json; give the folder of a PEFT"):
        peft_files.read(tmp_path, LLAMA)
    with pytest.raises(UserError, match=r"adapters of Transformer: no adapters; train some with"):
        peft_files.write(tmp_path / "b", LLAMA, {"embed": np.ones(1)}, LoRA())
    stray = {"other/lora_a": random(8, 2), "other/lora_b": random(2, 8)}
    with pytest.raises(UserError, match=r"no layer of Hugging Face's: other; train some with"):
        peft_files.write(tmp_path / "b", LLAMA, stray, LoRA(2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_and_ours_compute_the_same_both_ways(tmp_path: Path, kind: str, rslora: bool) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from jaxtrain import weights

    torch.manual_seed(0)
    model = LLAMA if kind == "llama" else GPT2
    base = tensors_of(model)
    weights.save(tmp_path / "base", model, ours(model, base))
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokens = torch.tensor(TOKENS)

    def run(net: Any) -> np.ndarray:
        with torch.no_grad():
            return net.eval()(tokens).logits.numpy()

    def fresh() -> Any:
        return load(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")

    targets = ["q_proj", "down_proj"] if kind == "llama" else ["c_attn", "c_fc"]
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, use_rslora=rslora)
    theirs = peft.get_peft_model(fresh(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    lora, found = peft_files.read(tmp_path / "theirs", model)
    params = filled(ours(model, base), found)
    np.testing.assert_allclose(logits(lora.on(model), params), run(theirs), atol=1e-4, rtol=1e-5)

    lora = LoRA(3, 6.0, rank_stabilized=rslora, pattern=("attention/", "mlp_"))
    init = nn.meta.unbox(jax.jit(lora.on(model).init)(jax.random.key(0), TOKENS)["params"])
    adapters = {
        path: random(*leaf.shape) * 0.3
        for path, leaf in tree.flatten(init).items()
        if "lora_" in path
    }
    peft_files.write(tmp_path / "mine", model, adapters, lora, base=str(tmp_path / "base"))
    loaded = peft.PeftModel.from_pretrained(fresh(), tmp_path / "mine")
    want = logits(lora.on(model), filled(ours(model, base), adapters))
    np.testing.assert_allclose(run(loaded), want, atol=1e-4, rtol=1e-5)
