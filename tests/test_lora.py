"""Low-rank adapters: against a forward pass and gradients written by hand, merged, in whole runs
over a base from elsewhere, and, in a slow test, against PEFT."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from test_run import start

import jaxtrain
from jaxtrain import adapters, tree
from jaxtrain.checkpoints import weights_file
from jaxtrain.checkpoints.arrays import digest as digest_of
from jaxtrain.checkpoints.arrays import read as read_arrays
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.cli import export
from jaxtrain.data.sources.markov import SyntheticTokens
from jaxtrain.errors import UserError
from jaxtrain.horizon import Horizon
from jaxtrain.models import Transformer
from jaxtrain.models.cache import empty
from jaxtrain.models.lora import LoRA, merged, split
from jaxtrain.optimizers import AdamW
from jaxtrain.tasks import NextToken
from jaxtrain.train import state as states
from jaxtrain.train import steps

SETTINGS: dict[str, Any] = {
    "vocabulary": 11,
    "width": 8,
    "depth": 2,
    "heads": 4,
    "key_heads": 2,
    "positions": "rotary",
    "norm": "rms",
    "gated": True,
    "bias": "none",
}
BASE = Transformer(**SETTINGS)
TOKENS = jnp.arange(12).reshape(2, 6) % 11
KEY = jax.random.key(0)


def moved(variables: Any, rng: int = 1) -> Any:
    """Variables whose adapters are no longer zero."""
    keys = iter(jax.random.split(jax.random.key(rng), 100))

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        here = "lora_b" in jax.tree_util.keystr(path)
        return 0.3 * jax.random.normal(next(keys), leaf.shape) if here else leaf

    return jax.tree_util.tree_map_with_path(one, variables)


class TwoLayers(nn.Module):
    """Dense layers of Flax itself, one of which sums over two dims."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.DenseGeneral((2, 3), name="wide")(x)
        return nn.DenseGeneral(4, axis=(-2, -1), name="out")(x)


def test_the_output_and_the_gradients_are_those_written_by_hand() -> None:
    lora = LoRA(2, 3.0, pattern=(".*",))
    x_BD = jax.random.normal(jax.random.key(3), (5, 4))
    net = adapters.functions(lora.on(TwoLayers()))
    params = moved(net.init(KEY, x_BD))["params"]
    assert jax.tree.map(jnp.shape, params["out"]) == {
        "bias": (4,),
        "kernel": (2, 3, 4),
        "lora_a": (2, 3, 2),
        "lora_b": (2, 4),
    }

    def by_hand(params: Any) -> jax.Array:
        h = x_BD
        for name, entering in (("wide", 4), ("out", 6)):
            layer = params[name]
            w, a, b = (
                layer["kernel"].reshape(entering, -1),
                layer["lora_a"].reshape(entering, 2),
                layer["lora_b"].reshape(2, -1),
            )
            h = h @ w + layer["bias"].reshape(1, -1) + 3.0 / 2 * (h @ a) @ b
        return jnp.sum(jnp.sin(h))

    def ours(params: Any) -> jax.Array:
        return jnp.sum(jnp.sin(net.apply({"params": params}, x_BD, train=True, key=KEY)[0]))

    (value, found), (wanted, expected) = (
        jax.value_and_grad(each)(params) for each in (ours, by_hand)
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )


def test_the_first_output_is_the_bases_and_the_base_is_born_as_without() -> None:
    plain, net = (adapters.functions(model) for model in (BASE, LoRA(2).on(BASE)))
    variables, base = jax.jit(net.init)(KEY, TOKENS), jax.jit(plain.init)(KEY, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, split(variables["params"])[0], base["params"])
    found, wanted = (
        each.apply(values, TOKENS, train=False)[0]
        for each, values in ((net, variables), (plain, base))
    )
    np.testing.assert_array_equal(found, wanted)
    # PyTorch's uniform numbers in +-1 / sqrt(inputs)
    a = np.asarray(
        LoRA(64, pattern=("x",)).on(Named()).init(KEY, jnp.ones((1, 100)))["params"]["x"]["lora_a"]
    )
    assert np.abs(a).max() <= 0.1 and abs(a.std() - 0.1 / np.sqrt(3)) < 2e-3


class Named(nn.Module):
    """One dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="x")(x)


@pytest.mark.parametrize("stabilized", [False, True])
def test_merged_parameters_give_the_plain_model_the_same(stabilized: bool) -> None:
    lora = LoRA(2, 5.0, stabilized, ("attention/(query|out)", "mlp_in"))
    assert lora.scale == pytest.approx(5 / 2**0.5 if stabilized else 2.5)
    net = adapters.functions(lora.on(BASE))
    variables = moved(jax.jit(net.init)(KEY, TOKENS))
    adapted = {path for path in tree.flatten(variables) if path.endswith("lora_a")}
    assert adapted == {
        f"params/block{index}/{layer}/lora_a"
        for index in range(2)
        for layer in ("attention/query", "attention/out", "mlp_in")
    }
    wanted = net.apply(variables, TOKENS, train=False)[0]
    plain = merged(variables["params"], lora.scale)
    found = adapters.functions(BASE).apply({"params": plain}, TOKENS, train=False)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(wanted - net.apply(net.init(KEY, TOKENS), TOKENS, train=False)[0]).max() > 0.01
    flat = merged(tree.flatten(variables["params"]), lora.scale)
    jax.tree.map(np.testing.assert_array_equal, flat, tree.flatten(plain))


def test_loops_chunks_and_caches_see_the_adapters() -> None:
    lora = LoRA(2, pattern=("attention/", "mlp_out"))
    net = adapters.functions(lora.on(BASE))
    variables = moved(jax.jit(net.init)(KEY, TOKENS))

    def summed(model: Any) -> Any:
        def loss(values: Any) -> Any:
            logits = adapters.functions(model).apply(values, TOKENS, train=True, key=KEY)[0]
            return jnp.sin(logits).sum(), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)

    one, other = (summed(lora.on(BASE.clone(scan=scan))) for scan in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one, other)
    wanted = one[0][1]
    model = lora.on(BASE)

    @jax.jit
    def others(values: Any) -> Any:
        held = empty(model, 2, 6, jnp.float32)
        first, held = model.apply(values, TOKENS[:, :4], cache=held)
        last, _ = model.apply(values, TOKENS[:, 4:], cache=held)
        chunked = lora.on(BASE.clone(chunk=4)).apply(values, TOKENS).logits()
        return jnp.concatenate([first, last], axis=1), chunked

    for found in others(variables):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_a_loop_or_a_head_in_chunks_cannot_adapt_is_refused() -> None:
    some = LoRA(2, pattern=("block1/",)).on(BASE.clone(scan=True))
    with pytest.raises(UserError) as refusal:
        jax.eval_shape(some.apply, jax.eval_shape(some.init, KEY, TOKENS), TOKENS)
    assert str(refusal.value) == (
        "--model.scan: block0 and others of its kind hold different parameters, which one loop"
        " cannot run over; adapt all of them (--lora.pattern), or set --model.scan=false"
    )
    untied = BASE.clone(tied=False)
    headed = LoRA(2, pattern=("head",))
    params = jax.eval_shape(headed.on(untied).init, KEY, TOKENS)
    with pytest.raises(UserError) as refusal:
        jax.eval_shape(headed.on(untied.clone(chunk=4)).apply, params, TOKENS)
    assert str(refusal.value) == (
        "--lora.pattern: head has an adapter, and is computed here by other means than as a dense"
        " layer (a head in chunks?); set --model.chunk=0"
    )


def test_dropout_is_of_the_adapters_inputs_in_training_only() -> None:
    net = adapters.functions(LoRA(2, pattern=("x",), dropout=0.5).on(Named()))
    variables, x_BD = moved(net.init(KEY, jnp.ones((1, 6)))), jnp.ones((40_000, 6))
    still = net.apply(variables, x_BD, train=False)[0]
    drawn = net.apply(variables, x_BD, train=True, key=jax.random.key(5))[0]
    assert np.unique(np.asarray(drawn)[:, 0]).size > 5
    np.testing.assert_allclose(drawn.mean(axis=0), still[0], atol=0.1)


def test_no_array_of_the_size_of_a_kernel_is_made_for_its_gradient() -> None:
    model = LoRA(2, pattern=("mlp_",)).on(Transformer(**SETTINGS | {"hidden": 37}))
    optimizer = dataclasses.replace(AdamW(), frozen=LoRA().frozen)
    batch = {"tokens": jax.ShapeDtypeStruct((4, 9), jnp.int32)}
    state = states.init_state(model, NextToken(), optimizer, batch)
    paths = set(tree.flatten(state.opt_state))
    assert {path.rpartition("/")[2] for path in paths if "block" in path} == {"lora_a", "lora_b"}
    step = steps.make_train_step(model, NextToken(), optimizer)
    text = jax.jit(step).lower(state, batch).as_text()
    products = re.findall(r"dot_general.*-> tensor<([0-9x]+)xf32>", text)
    assert products and not {"8x37", "37x8"} & set(products), products
    assert {"2x37", "37x2"} & set(products)


DATA = SyntheticTokens(11, order=1, length=6, examples=64, test_examples=16, test="")
RUN: dict[str, Any] = {
    "model": BASE,
    "data": DATA,
    "task": NextToken(),
    "optimizer": AdamW(1e-2),
    "augment": None,
    "batch_size": 8,
    "steps": 4,
    "eval_every": Horizon(0, "steps"),
    "checkpoint_every": Horizon(2, "steps"),
    "offers": {},
}


STILL = ("--steps=1", "--ema_decay=none", "--optimizer.learning_rate=1e-30")
"""One step that moves no parameter."""


def stored(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a step, by path."""
    checkpoints = Checkpoints(workdir)
    return checkpoints._read(step, checkpoints.specs(step))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained the plain model."""
    folder = tmp_path_factory.mktemp("base") / "run"
    assert start(folder, "--ema_decay=none", **RUN) == 0
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    """The folder of a run that trained adapters over it."""
    folder = base.parent / "tuned"
    assert start(folder, f"--init_from={base}", **RUN, lora=LoRA(2)) == 0
    return folder


def test_a_run_trains_adapters_over_another_runs_base(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = stored(base, 4), stored(tuned, 4)
    moved = {
        path
        for path in new
        if path.startswith("params/") and not np.array_equal(new[path], old.get(path))
    }
    assert moved == {path for path in new if re.search("^params/.*lora_[ab]$", path)} != set()
    trained = jaxtrain.load(tuned)
    plain = jaxtrain.load(base)
    tokens = np.asarray(TOKENS, np.int32)
    rows = {"tokens": np.concatenate([tokens, tokens[:, :1]], axis=1)}
    assert set(trained.predict(rows)) == set(plain.predict(rows))
    # merged and exported, it is a base like any other
    out = tmp_path / "merged.safetensors"
    capsys.readouterr()
    assert export.run([str(tuned), f"--out={out}", "--merge"]) == 0
    assert "its average (ema_decay), adapters merged" in capsys.readouterr().out
    values = weights_file.read(out).read()
    assert set(values) == {path for path in old if path.startswith("params/")}
    lora = LoRA(2)
    net = adapters.functions(lora.on(BASE))
    wanted = net.apply({"params": trained.params}, TOKENS, train=False)[0]
    nested: dict[str, Any] = {}
    for path, value in values.items():
        *folders, name = path.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = jnp.asarray(value)
    found = adapters.functions(BASE).apply(nested, TOKENS, train=False)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert (
        np.abs(
            wanted
            - adapters.functions(BASE).apply({"params": plain.params}, TOKENS, train=False)[0]
        ).max()
        > 1e-4
    )


def test_the_base_is_written_once_and_damage_of_either_is_found(
    tuned: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tuned / "checkpoints"
    [name] = [path.name for path in folder.iterdir() if path.name.startswith("base-")]
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4", name]
    record = json.loads((folder / "4" / "MANIFEST.json").read_text())
    fixed = record["base"]["arrays"]
    assert record["base"]["name"] == name and "params/embed" in fixed
    assert not any("lora" in path or path.startswith("opt_state/") for path in fixed)
    own = read_arrays(
        folder / "4" / "state", {p: s for p, s in record["tree"].items() if p not in fixed}
    )
    whole = stored(tuned, 4)
    assert set(own) | set(fixed) == set(whole) and not set(own) & set(fixed)
    assert digest_of(whole) == Checkpoints(tuned).digest(4)

    def damaged(what: str) -> Path:
        copy = tmp_path / what.replace("/", "-")
        shutil.copytree(tuned, copy)
        largest = max(
            (copy / "checkpoints" / what).rglob("d/*"), key=lambda path: path.stat().st_size
        )
        with open(largest, "r+b") as file:
            file.seek(largest.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        return copy

    assert Checkpoints(tuned).verify(4) == []
    assert re.fullmatch(
        r"state/(ocdbt[.]process_0/)?d/\w+: checksum mismatch", *Checkpoints(damaged("4")).verify(4)
    )
    base_gone = damaged(name)
    for step in (2, 4):
        assert re.fullmatch(
            rf"{name}: state/(ocdbt[.]process_0/)?d/\w+: checksum mismatch",
            *Checkpoints(base_gone).verify(step),
        )
    shutil.rmtree(base_gone / "checkpoints" / name)
    assert Checkpoints(base_gone).verify(4) == [
        f"{name}: no such folder beside it; put it back, for it holds the frozen arrays"
    ]
    assert start(base_gone, f"--init_from={base}", **RUN, lora=LoRA(2)) == 74
    assert "no checkpoint verifies (step 4: base-" in capsys.readouterr().err


def test_adapters_go_on_bit_for_bit_and_are_never_lost(
    tuned: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halfway = tmp_path / "run"
    shutil.copytree(tuned, halfway)
    shutil.rmtree(halfway / "checkpoints" / "4")
    assert start(halfway, f"--init_from={base}", **RUN, lora=LoRA(2)) == 0
    assert Checkpoints(halfway).digest(4) == Checkpoints(tuned).digest(4)
    capsys.readouterr()
    assert start(tmp_path / "plain", f"--init_from={tuned}", **RUN) == 2
    assert capsys.readouterr().err == (
        f"jaxtrain: error: --init_from={tuned}: holds adapters, and this run has none; merge them"
        f" (python -m jaxtrain export {tuned} --merge --out=FILE.safetensors) and start from FILE,"
        " train them on (--lora), or drop them: --init_rules='lora_[ab]=skip'\n"
    )


@pytest.mark.slow
def test_adapters_are_taken_over_and_rank_0_trains_all(
    tuned: Path, base: Path, tmp_path: Path
) -> None:
    assert start(tmp_path / "on", f"--init_from={tuned}", *STILL, **RUN, lora=LoRA(2)) == 0
    one, other = stored(tmp_path / "on", 1), stored(tuned, 4)
    for path in one:
        if path.startswith("params/"):
            np.testing.assert_array_equal(one[path], other[f"ema/{path.removeprefix('params/')}"])
    full = tmp_path / "full"
    assert start(full, f"--init_from={base}", "--lora.rank=0", **RUN, lora=LoRA(2)) == 0
    assert not any("lora" in path for path in stored(full, 4))


@pytest.mark.slow
def test_meshes_microbatches_remat_and_reproducible_agree(base: Path, tmp_path: Path) -> None:
    flags = {
        "one": (),
        "sharded": ("--mesh=fsdp:2,tensor:2", "--microbatches=2", "--remat=blocks"),
        "looped": ("--mesh=fsdp:4", "--model.scan=true", "--model.chunk=16"),
        "bits": ("--reproducible", "--mesh=data:1"),
        "same_bits": ("--reproducible", "--mesh=data:2"),
        "bf16": ("--precision=bf16",),
    }
    lora = LoRA(2, also=("norm",))
    for name, more in flags.items():
        assert start(tmp_path / name, f"--init_from={base}", *more, **RUN, lora=lora) == 0, name
    digests = [Checkpoints(tmp_path / name).digest(4) for name in ("bits", "same_bits")]
    assert digests[0] == digests[1]
    one = stored(tmp_path / "one", 4)
    for name, close in {"sharded": 2e-5, "looped": 2e-5, "bits": 2e-5}.items():
        other = stored(tmp_path / name, 4)
        for path in one:
            if path.startswith("params/"):
                np.testing.assert_allclose(one[path], other[path], atol=close, err_msg=path)
    old = stored(base, 4)
    assert not np.array_equal(one["params/norm/scale"], old["params/norm/scale"])


WRONG: list[tuple[LoRA, Any, str]] = [
    (
        LoRA(2, pattern=("attention/", "q_proj")),
        BASE,
        (
            "--lora.pattern=q_proj: found in no dense layer of Transformer (they are:"
            " block0/attention/query, block0/attention/key, block0/attention/value,"
            " block0/attention/out, block0/mlp_in, block0/mlp_gate, block0/mlp_out,"
            " block1/attention/query, ...); remove it or mend it"
        ),
    ),
    (
        LoRA(2, pattern=("(",)),
        BASE,
        (
            "--lora.pattern=(: is not a regular expression (missing ), unterminated subpattern at"
            " position 0)"
        ),
    ),
    (
        LoRA(2),
        lambda rngs: nnx.Linear(2, 2, rngs=rngs),
        (
            "--lora: model=<lambda> is no Linen module, whose dense layers could be found; give"
            " one, or train all of it: --lora.rank=0"
        ),
    ),
    (
        LoRA(2, pattern=("layers_",)),
        nn.Sequential([nn.DenseGeneral(2, batch_dims=(0,), axis=-1)]),
        (
            "--lora.pattern: layers_0 has a kernel for each member of a batch (batch_dims), to"
            " which no adapter is added; leave it out"
        ),
    ),
]


@pytest.mark.parametrize(("lora", "model", "said"), WRONG, ids=["none", "regex", "nnx", "batch"])
def test_what_cannot_be_adapted_is_refused_in_one_line(lora: LoRA, model: Any, said: str) -> None:
    inputs = TOKENS if model is BASE else jnp.ones((2, 3))
    with pytest.raises(UserError) as refusal:
        adapters.functions(lora.on(model)).init(KEY, inputs)
    assert str(refusal.value) == said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the two libraries at one another
@pytest.mark.parametrize("stabilized", [False, True])
def test_outputs_and_three_steps_of_adamw_are_those_of_peft(stabilized: bool) -> None:
    torch, peft = (pytest.importorskip(name) for name in ("torch", "peft"))
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    base = transformers.LlamaForCausalLM(config).float().eval()
    theirs = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=stabilized,
            target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
        ),
    )
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    lora = LoRA(4, 6.0, stabilized, ("attention/(query|value|out)", "mlp_(gate|out)"))
    model = lora.on(
        Transformer(
            17,
            16,
            2,
            4,
            2,
            hidden=24,
            activation="silu",
            gated=True,
            bias="none",
            norm="rms",
            norm_epsilon=1e-5,
            positions="rotary",
            tied=False,
        )
    )
    params = of_llama(dict(theirs.named_parameters()), heads=4, key_heads=2, head_dim=4)
    net = adapters.functions(model)
    tokens = np.random.default_rng(0).integers(0, 17, (3, 13))
    wanted = net.init(KEY, jnp.asarray(tokens[:, :-1], jnp.int32))["params"]
    assert jax.tree.map(jnp.shape, wanted) == jax.tree.map(jnp.shape, params)
    logits = theirs(torch.tensor(tokens[:, :-1])).logits
    found = net.apply({"params": params}, jnp.asarray(tokens[:, :-1]), train=False)[0]
    np.testing.assert_allclose(found, logits.detach().numpy(), atol=1e-5, rtol=1e-5)

    optimizer = torch.optim.AdamW(
        [parameter for parameter in theirs.parameters() if parameter.requires_grad],
        lr=0.01,
        weight_decay=0.1,
    )
    recipe = dataclasses.replace(AdamW(0.01, weight_decay=0.1), frozen=lora.frozen)
    batch = {"tokens": jnp.asarray(tokens, jnp.int32)}
    state = states.init_state(model, NextToken(), recipe, batch)
    state = dataclasses.replace(state, params=jax.tree.map(jnp.asarray, params))
    step = jax.jit(steps.make_train_step(model, NextToken(), recipe))
    for _ in range(3):
        optimizer.zero_grad()
        loss = theirs(torch.tensor(tokens), labels=torch.tensor(tokens)).loss
        loss.backward()
        optimizer.step()
        state, _ = step(state, batch)
    expected = of_llama(dict(theirs.named_parameters()), heads=4, key_heads=2, head_dim=4)
    for path, value in tree.flatten(expected).items():
        found = tree.flatten(state.params)[path]
        np.testing.assert_allclose(found, value, atol=1e-5, err_msg=path)
        assert ("lora" in path) == (not np.array_equal(value, tree.flatten(params)[path]))


def of_llama(weights: Any, *, heads: int, key_heads: int, head_dim: int) -> Any:
    """The parameters of transformers' Llama under PEFT's adapters as ours, by hand."""
    arrays = {
        re.sub(r"base_model\.model\.|base_layer\.|default\.", "", name): value.detach().numpy()
        for name, value in weights.items()
    }
    places = {
        "self_attn.q_proj": ("attention/query", (-1,), (heads, head_dim)),
        "self_attn.k_proj": ("attention/key", (-1,), (key_heads, head_dim)),
        "self_attn.v_proj": ("attention/value", (-1,), (key_heads, head_dim)),
        "self_attn.o_proj": ("attention/out", (heads, head_dim), (-1,)),
        "mlp.up_proj": ("mlp_in", (-1,), (-1,)),
        "mlp.gate_proj": ("mlp_gate", (-1,), (-1,)),
        "mlp.down_proj": ("mlp_out", (-1,), (-1,)),
    }
    flat = {
        "embed": arrays["model.embed_tokens.weight"],
        "norm/scale": arrays["model.norm.weight"],
        "head/kernel": arrays["lm_head.weight"].T,
    }
    for index in range(2):
        before = f"model.layers.{index}."
        flat[f"block{index}/norm0/scale"] = arrays[f"{before}input_layernorm.weight"]
        flat[f"block{index}/norm1/scale"] = arrays[f"{before}post_attention_layernorm.weight"]
        for theirs, (ours, entering, leaving) in places.items():
            w = arrays[f"{before}{theirs}.weight"]
            shape = (*(entering if entering != (-1,) else w.shape[1:]), *leaving)
            flat[f"block{index}/{ours}/kernel"] = w.T.reshape(shape)
            if f"{before}{theirs}.lora_A.weight" in arrays:
                a, b = (arrays[f"{before}{theirs}.lora_{side}.weight"].T for side in "AB")
                flat[f"block{index}/{ours}/lora_a"] = a.reshape(*entering, a.shape[1])
                flat[f"block{index}/{ours}/lora_b"] = b.reshape(b.shape[0], *leaving)
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = np.array(value)
    return nested
