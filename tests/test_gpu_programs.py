"""Programs compiled for GPUs that are not here: what they send and hold against counts by hand, and
which precision each card takes.

All compiling is done by children of this file (`python tests/test_gpu_programs.py NAME`), for the
compiler's own words are on stderr of its process.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from jaxtrain import hardware
from jaxtrain.plan import gpu_target

ROOT = Path(__file__).resolve().parent.parent
REASON = gpu_target.unavailable_reason()
NEEDS_COMPILER = pytest.mark.skipif(REASON is not None, reason=str(REASON))
CARDS = ("v100", "titan_rtx", "rtx_3090", "a100", "h100", "h200")
EIGHT = 8


# What the children do.


def facts(
    model: Any,
    task: Any,
    batch: dict[str, Any],
    mesh_text: str,
    *,
    card: str = "h100",
    **options: Any,
) -> dict[str, Any]:
    """One training step compiled for eight cards of one host: what it sends by kind, what it holds,
    and the parameters it is made of."""
    from jaxtrain import tree
    from jaxtrain.optimizers import AdamW
    from jaxtrain.parallel import mesh as meshes
    from jaxtrain.plan import collectives
    from jaxtrain.train import lowering
    from jaxtrain.train.recipe import Recipe

    grid = meshes.make(mesh_text, gpu_target.devices(card, EIGHT))
    programs = lowering.lower(Recipe(model, task, AdamW(), **options), batch, grid)
    compiled = programs.lower_train_step().compile()
    found = collectives.read(compiled.as_text())
    memory = compiled.memory_analysis()
    return {
        "parameters": 4 * tree.size(programs.state.params),
        "state": programs.state_bytes(),
        "batch": programs.batch_bytes(),
        "wire": {
            kind: collectives.wire_bytes(found, kind)
            for kind in sorted({each.kind for each in found})
        },
        "arrays": {path: leaf.shape for path, leaf in tree.flatten(programs.state.params).items()},
        "arguments": memory.argument_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
    }


def evaluation(model: Any, task: Any, batch: dict[str, Any], mesh_text: str) -> dict[str, Any]:
    """The same of one evaluation step: what it sends, and the parameters."""
    from jaxtrain import tree
    from jaxtrain.optimizers import AdamW
    from jaxtrain.parallel import mesh as meshes
    from jaxtrain.plan import collectives
    from jaxtrain.train import lowering
    from jaxtrain.train.recipe import Recipe

    grid = meshes.make(mesh_text, gpu_target.devices("h100", EIGHT))
    programs = lowering.lower(Recipe(model, task, AdamW()), batch, grid)
    rows = lowering.laid_out(batch, grid)
    found = collectives.read(programs.eval_step.lower(programs.state, rows).compile().as_text())
    return {
        "wire": {
            kind: collectives.wire_bytes(found, kind)
            for kind in sorted({each.kind for each in found})
        },
        "arrays": {path: leaf.shape for path, leaf in tree.flatten(programs.state.params).items()},
    }


def images(side: int) -> dict[str, Any]:
    """An abstract batch of images."""
    import jax

    return {
        "image": jax.ShapeDtypeStruct((64, side, side, 1), "float32"),
        "label": jax.ShapeDtypeStruct((64,), "int32"),
    }


def tokens() -> dict[str, Any]:
    """An abstract batch of tokens."""
    import jax

    return {"tokens": jax.ShapeDtypeStruct((32, 65), "int32")}


def quick() -> dict[str, Any]:
    """A small dense model in two layouts; the precision that each card takes, and the step in it
    for the oldest."""
    from jaxtrain import precision
    from jaxtrain.models import MLP
    from jaxtrain.tasks import Classification

    model, task, batch = MLP(num_classes=16, widths=(256,)), Classification(), images(16)
    found = {text: facts(model, task, batch, text) for text in ("data:8", "fsdp:8")}
    for card in CARDS:
        capability = ".".join(map(str, gpu_target.find(card).capability))
        chosen = precision.choose("gpu", capability)
        if card == "v100":
            facts(model, task, batch, "data:8", card=card, precision=chosen)
        found[card] = {
            "capability": gpu_target.devices(card, 1)[0].compute_capability,
            "chosen": chosen,
        }
    return found


def transformers() -> dict[str, Any]:
    """A small decoder and a small ViT in every layout, and the decoder in bf16, rematerialised and
    not."""
    from jaxtrain.models.transformer import Transformer
    from jaxtrain.models.vit import ViT
    from jaxtrain.tasks import Classification, NextToken

    decoder = Transformer(vocabulary=512, width=128, depth=2, heads=4, max_length=64)
    vit = ViT(num_classes=16, patch=4, width=256, depth=2, heads=8)
    found = {
        f"decoder {text}": facts(decoder, NextToken(), tokens(), text)
        for text in ("data:8", "fsdp:8", "data:2,fsdp:4", "fsdp:4,tensor:2")
    }
    found |= {
        f"vit {text}": facts(vit, Classification(), images(32), text)
        for text in ("data:8", "fsdp:8")
    }
    found["decoder evaluated"] = evaluation(decoder, NextToken(), tokens(), "fsdp:8")
    for remat in ("none", "blocks"):
        found[f"bf16 {remat}"] = facts(
            decoder, NextToken(), tokens(), "fsdp:8", precision="bf16", remat=remat
        )
    return found


def cards() -> dict[str, Any]:
    """A small decoder for each card, in each precision: compiled, or refused in these words."""
    import jax

    from jaxtrain.models import attention
    from jaxtrain.models.transformer import Transformer
    from jaxtrain.tasks import NextToken

    # cuDNN's is a call that the compiler does not look into: with it nothing is refused
    attention._why_no_cudnn = lambda: "it is looked away from here"
    model, found = Transformer(vocabulary=64, width=64, depth=1, heads=2, max_length=64), {}
    for card in CARDS:
        for precision in ("fp32", "bf16", "fp16"):
            found[f"{card} {precision}"] = ""
            try:
                facts(model, NextToken(), tokens(), "data:8", card=card, precision=precision)
            except jax.errors.JaxRuntimeError as error:
                found[f"{card} {precision}"] = str(error).splitlines()[0]
    return found


def products() -> dict[str, str]:
    """A lone bfloat16 product for the cards that lack it."""
    import jax

    found = {}
    for card in ("v100", "titan_rtx"):
        place = jax.sharding.SingleDeviceSharding(gpu_target.devices(card, 1)[0])
        array = jax.ShapeDtypeStruct((64, 64), "bfloat16", sharding=place)
        found[card] = jax.jit(lambda x, y: x @ y).lower(array, array).compile().as_text()
    return found


def attentions() -> dict[str, Any]:
    """Attention forward and backward for an H100: the library kernels in it, and of one with
    segments which of the program's arguments its mask is made of."""
    import jax

    from jaxtrain.models import attention
    from jaxtrain.plan import buffers, collectives

    place = jax.sharding.SingleDeviceSharding(gpu_target.devices("h100", 1)[0])
    cases: dict[str, dict[str, Any]] = {
        "causal": {"causal": True},
        "window": {"causal": True, "window": 32},
        "whole": {},
        "segments": {"causal": True},
        "segments and window": {"causal": True, "window": 32},
        "cap": {"causal": True, "cap": 50.0},
        "float32": {"causal": True},
    }
    found: dict[str, Any] = {"why no cuDNN": attention._why_no_cudnn()}
    for name, options in cases.items():
        dtype = "float32" if name == "float32" else "bfloat16"
        query = jax.ShapeDtypeStruct((2, 128, 4, 64), dtype, sharding=place)
        key = jax.ShapeDtypeStruct((2, 128, 2, 64), dtype, sharding=place)
        segments = jax.ShapeDtypeStruct((2, 128), "int32", sharding=place)

        def loss(
            query: Any,
            key: Any,
            value: Any,
            segments: Any,
            name: str = name,
            options: Any = options,
        ) -> Any:
            marks = {"segments": segments} if "segments" in name else {}
            out = attention.attention(query, key, value, **options, **marks)
            return (out.astype("float32") ** 2).sum()

        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        text = step.lower(query, key, key, segments).compile().as_text()
        program, entry = collectives.computations(text)
        assert entry is not None
        found[name] = {
            "kernels": buffers.kernels(text),
            "written": [str(each) for each in buffers.read(text)],
            "of segments": [
                each.opcode == "custom-call" and "segments" in roots(program[entry], each.name)
                for each in program[entry]
                if "fmha" in each.line and each.opcode == "custom-call"
            ],
        }
    return found


def roots(instructions: Any, name: str) -> set[str]:
    """The names of the arguments that a number is made of."""
    by_name = {each.name: each for each in instructions}
    waiting, seen = [name], set()
    while waiting:
        now = waiting.pop()
        if now in by_name and now not in seen:
            seen.add(now)
            waiting += by_name[now].operands
    return {name.split(".")[0] for name in seen if by_name[name].opcode == "parameter"}


def looped() -> dict[str, Any]:
    """Large language models with their blocks in a loop, as scripts/large_programs.py has them."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import large_programs

    wanted = {
        ("decoder 1.4B, looped", "fsdp:8", "blocks"),
        ("gpt2_124m", "data:8", "dots"),
        ("llama3_8b, packed", "fsdp:4,tensor:2", "blocks"),
    }
    return {
        case.name: large_programs.measure(case)
        for case in large_programs.CASES
        if (case.name, case.mesh, case.remat) in wanted
    }


CHILDREN: dict[str, Callable[[], dict[str, Any]]] = {
    "quick": quick,
    "transformers": transformers,
    "cards": cards,
    "products": products,
    "attentions": attentions,
    "looped": looped,
}


# The tests.


def child(name: str) -> tuple[dict[str, Any], str]:
    """What a child found, and all that the compiler said."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    }
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "0", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", __file__, name]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def small() -> tuple[dict[str, Any], str]:
    return child("quick")


@pytest.fixture(scope="module")
def large() -> tuple[dict[str, Any], str]:
    return child("transformers")


def bytes_of(found: dict[str, Any], *, at_least: int = 0) -> int:
    """Bytes of the float32 parameters with so many dims or more."""
    total = 0
    for shape in found["arrays"].values():
        size = 4
        for length in shape:
            size *= length
        total += size if len(shape) >= at_least else 0
    return total


def check(found: dict[str, Any], expected: dict[str, float]) -> None:
    """Within 2% of the count by hand, kind by kind; what is not counted sends nothing to speak
    of."""
    for kind in expected | found["wire"]:
        sent, by_hand = found["wire"].get(kind, 0.0), expected.get(kind, 0.0)
        assert abs(sent - by_hand) <= 0.02 * by_hand + 64, (
            f"{kind}: {sent:,.0f} bytes, by hand {by_hand:,.0f}"
        )


ONCE, TWICE = 7 / 8, 2 * 7 / 8
"""What a ring of eight sends of an array: to gather or scatter it, and to reduce it everywhere."""


@NEEDS_COMPILER
def test_a_dense_model_sends_what_it_must(small: tuple[dict[str, Any], str]) -> None:
    found, _ = small
    whole = bytes_of(found["data:8"])
    check(found["data:8"], {"all-reduce": TWICE * whole})
    check(found["fsdp:8"], {"all-gather": ONCE * whole, "reduce-scatter": ONCE * whole})


@NEEDS_COMPILER
def test_arguments_are_the_state_and_the_batch_to_the_byte(
    small: tuple[dict[str, Any], str],
) -> None:
    found, _ = small
    for text, share in (("data:8", 1), ("fsdp:8", 8)):
        each = found[text]
        assert each["arguments"] == each["state"] + each["batch"]
        assert each["aliased"] == each["state"], (
            "the new state must take the place of the old one, array by array"
        )
        # Parameters and two averages; every dim of this model divides by eight. The rest are
        # scalars.
        assert 0 <= each["state"] - 3 * bytes_of(each) // share < 128


@NEEDS_COMPILER
@pytest.mark.parametrize("card", CARDS)
def test_auto_takes_what_the_card_can_do(small: tuple[dict[str, Any], str], card: str) -> None:
    found, _ = small
    expected = {
        "v100": ("7.0", "fp16"),
        "titan_rtx": ("7.5", "fp16"),
        "rtx_3090": ("8.6", "bf16"),
        "a100": ("8.0", "bf16"),
    }
    assert (found[card]["capability"], found[card]["chosen"]) == expected.get(card, ("9.0", "bf16"))


@NEEDS_COMPILER
def test_nothing_is_replicated_for_want_of_a_way(small: tuple[dict[str, Any], str]) -> None:
    assert "deviceless compilation" in small[1], "the compiler's words did not come through"
    assert "nvoluntary full rematerialization" not in small[1]


@NEEDS_COMPILER
@pytest.mark.slow
def test_transformers_send_what_they_must(large: tuple[dict[str, Any], str]) -> None:
    found, said = large
    assert "nvoluntary full rematerialization" not in said
    whole, table = bytes_of(found["decoder data:8"]), 512 * 128 * 4
    # The table of embeddings is tied to the head: the gradients of both uses are summed apart, and
    # that of the look-up everywhere.
    check(found["decoder data:8"], {"all-reduce": TWICE * (whole + table)})
    check(
        found["decoder fsdp:8"],
        {"all-reduce": TWICE * table, "all-gather": ONCE * whole, "reduce-scatter": ONCE * whole},
    )
    # neither positions nor biases of query, key and value
    kernels = bytes_of(found["decoder data:8"], at_least=2) - table - (64 * 128 + 2 * 3 * 128) * 4
    hybrid = {
        "all-gather": 3 / 4 * whole,
        "reduce-scatter": 3 / 4 * kernels,
        "all-reduce": 2 * 1 / 2 * kernels / 4 + TWICE * (whole - kernels + table),
    }
    check(found["decoder data:2,fsdp:4"], hybrid)
    whole = bytes_of(found["vit data:8"])
    check(found["vit data:8"], {"all-reduce": TWICE * whole})
    check(found["vit fsdp:8"], {"all-gather": ONCE * whole, "reduce-scatter": ONCE * whole})


@NEEDS_COMPILER
@pytest.mark.slow
def test_evaluation_gathers_parameters_and_no_activations(
    large: tuple[dict[str, Any], str],
) -> None:
    found = large[0]["decoder evaluated"]
    check(found, {"all-gather": ONCE * bytes_of(found)})


@NEEDS_COMPILER
@pytest.mark.slow
def test_parameters_travel_in_bf16_and_again_when_rematerialised(
    large: tuple[dict[str, Any], str],
) -> None:
    found, _ = large
    whole = bytes_of(found["bf16 none"])
    assert found["bf16 none"]["wire"]["all-gather"] == pytest.approx(ONCE * whole / 2, rel=0.02)
    assert found["bf16 blocks"]["wire"]["all-gather"] == pytest.approx(
        2 * ONCE * whole / 2, rel=0.02
    )


@NEEDS_COMPILER
@pytest.mark.slow
def test_the_compiler_refuses_attention_in_bf16_where_the_card_lacks_it() -> None:
    found, _ = child("cards")
    refused = {name: words for name, words in found.items() if words}
    # So what `auto` takes for each of the six (a test above) compiles.
    assert set(refused) == {"v100 bf16", "titan_rtx bf16"}, refused
    assert all(
        words.startswith(
            "UNIMPLEMENTED: Unsupported algorithm on the current device(s): ALG_DOT_BF16_BF16_F32"
        )
        for words in refused.values()
    )


@NEEDS_COMPILER
@pytest.mark.slow
def test_the_compiler_lets_a_lone_product_in_bf16_through() -> None:
    """So a refusal cannot be left to it: `precision.check` asks the capability."""
    found, _ = child("products")
    assert all("bf16[64,64]" in text for text in found.values())


@pytest.fixture(scope="module")
def attended() -> tuple[dict[str, Any], str]:
    found, said = child("attentions")
    if reason := found["why no cuDNN"]:
        pytest.skip(reason)
    return found, said


FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
MASKED = ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]
SCORES = ("[2,4,128,128]", "[1,2,2,128,128]", "[2,2,2,128,128]", "[2,2,128,128]", "[4,128,128]")


@NEEDS_COMPILER
def test_attention_is_cudnns_where_its_masks_are_right(
    attended: tuple[dict[str, Any], str],
) -> None:
    found, said = attended
    for name in ("causal", "window", "whole"):
        assert found[name]["kernels"] == [FORWARD, BACKWARD], name
    for name in ("segments", "segments and window"):
        assert found[name]["kernels"] == MASKED, name
    for name in ("cap", "float32"):
        assert not any("fmha" in kernel for kernel in found[name]["kernels"]), name
    lines = [line for line in said.splitlines() if "cuDNN's fused kernel" in line]
    assert len(lines) == 2
    assert "it has no soft cap, and this one is 50; a model without one can use it" in lines[0]
    assert "it computes in bfloat16, and this is float32; --precision=bf16 is" in lines[1]


@NEEDS_COMPILER
def test_cudnns_attention_writes_no_scores(attended: tuple[dict[str, Any], str]) -> None:
    found, _ = attended
    for name in ("causal", "window", "whole", "segments", "segments and window"):
        written = found[name]["written"]
        assert not [each for each in written if each.endswith(SCORES)], name
        # a mask for all heads, two bytes a number, and none wider
        masks = [each for each in written if each.endswith("128,128]")]
        assert ("segments" in name) == bool(masks) and "f32" not in "".join(masks), masks
    assert any(each.endswith(SCORES) for each in found["cap"]["written"])


@NEEDS_COMPILER
def test_packed_segments_are_in_the_mask_of_cudnns_attention(
    attended: tuple[dict[str, Any], str],
) -> None:
    found, _ = attended
    for name in ("segments", "segments and window"):
        assert found[name]["of segments"] == [True, True], "forward and backward"
    assert found["causal"]["of segments"] == [False, False]


@NEEDS_COMPILER
@pytest.mark.slow
def test_large_models_gather_a_block_at_a_time_and_hold_no_logits() -> None:
    found, said = child("looped")
    assert "nvoluntary full rematerialization" not in said
    decoder, gpt2, llama = (
        found[name] for name in ("decoder 1.4B, looped", "gpt2_124m", "llama3_8b, packed")
    )
    gib = 2**30
    # 43.4 GiB without the loop, of which data:8 needs 34.1
    assert decoder["peak_bytes"] < 6 * gib
    assert gpt2["peak_bytes"] < 7 * gib
    assert llama["peak_bytes"] < 40 * gib
    for model, depth in ((decoder, 24), (llama, 32)):
        for size, count in model["gathers"]:
            # Of one block in each turn, there and back; or of what stands before and after them.
            assert count <= 2 or count % depth == 0, (size, count)
        assert not model["full_logits"]
    assert not [each for each in gpt2["full_logits"] if each.startswith("f32")]
    if not any("fmha" in kernel for kernel in decoder["kernels"]):
        pytest.skip("cuDNN is not here: pip install 'jaxtrain[plan]'")
    assert {FORWARD, BACKWARD} <= set(decoder["kernels"])
    assert {FORWARD, BACKWARD} <= set(gpt2["kernels"])
    assert set(MASKED) <= set(llama["kernels"])


def test_every_target_is_a_card_of_the_table() -> None:
    for name, target in gpu_target.TARGETS.items():
        assert target.capability in gpu_target.ARCHITECTURES, name
        assert (
            f"cuda_compute_capability {{ major: {target.capability[0]} minor:"
            f" {target.capability[1]} " in gpu_target.text(target)
        )
    assert set(CARDS) <= gpu_target.TARGETS.keys()
    assert all(hardware.compute_capability(card.name) == card.capability for card in hardware.CARDS)


def test_words_for_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError,
        match=r"^card 'h10': not known to the compiler; known: v100, .*; did you mean 'h100'\?$",
    ):
        gpu_target.devices("h10", 1)
    with pytest.raises(
        ValueError,
        match=(
            r"^12 h100 in 8 hosts: every host has the same number of cards; choose a multiple of 8$"
        ),
    ):
        gpu_target.devices("h100", 12, hosts=8)
    versions = {"jax": "0.10.2", "jax-cuda12-plugin": "0.10.1"}

    def version(name: str) -> str:
        if name == "nvidia-cuda-nvcc-cu12":
            raise metadata.PackageNotFoundError(name)
        return versions.get(name, "0.10.2")

    monkeypatch.setattr(metadata, "version", version)
    assert (
        gpu_target.unavailable_reason()
        == "nvidia-cuda-nvcc-cu12 is not installed; pip install 'jaxtrain[plan]'"
    )
    with pytest.raises(
        ValueError,
        match=(
            r"^compiling for h100: nvidia-cuda-nvcc-cu12 is not installed; pip install"
            r" 'jaxtrain\[plan\]'$"
        ),
    ):
        gpu_target.devices("h100", 8)
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name, "0.10.2"))
    assert (
        gpu_target.unavailable_reason()
        == "jax-cuda12-plugin is 0.10.1 but jax is 0.10.2; pip install 'jax-cuda12-plugin==0.10.2'"
    )


@NEEDS_COMPILER
@pytest.mark.parametrize("there", [False, True])
def test_the_check_is_left_out_only_where_there_is_no_card(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gpu_target.SKIP_CHECK, "")
    monkeypatch.delenv(gpu_target.SKIP_CHECK)
    gpu_target.prepare(exists=lambda path: there)
    assert (os.environ.pop(gpu_target.SKIP_CHECK, None) == "1") is not there


@NEEDS_COMPILER
@pytest.mark.skipif(
    any(map(os.path.exists, gpu_target.DEVICE_FILES)), reason="there is an NVIDIA device"
)
def test_a_default_process_says_nothing_of_the_compiler() -> None:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))
    }
    code = (
        "from jaxtrain.plan import gpu_target; gpu_target.prepare(); import jax;"
        " print(jax.devices()[0].platform)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("cpu\n", "")


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = CHILDREN[sys.argv[1]]()
    print(json.dumps(result))
