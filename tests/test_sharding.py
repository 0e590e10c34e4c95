"""Which array goes where on a mesh, by rules, by logical axes and by the automatic rule, and how
many bytes a device then holds."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from rich.console import Console

from jaxtrain import adapters, tree
from jaxtrain.models import MLP, ViT
from jaxtrain.optimizers import AdamW
from jaxtrain.parallel import mesh, sharding
from jaxtrain.report.terminal import tables
from jaxtrain.tasks import Classification
from jaxtrain.train import state


@pytest.mark.parametrize(
    ("text", "shape", "axes", "spec"),
    [
        ("fsdp:8", (12, 64), None, PartitionSpec(None, "fsdp")),
        ("fsdp:8", (12, 7), None, PartitionSpec()),
        ("fsdp:4,tensor:2", (64, 32), ("embed", "mlp"), PartitionSpec("fsdp", "tensor")),
        ("fsdp:4,tensor:2", (64, 32), ("mlp_in", "mlp"), PartitionSpec("fsdp", "tensor")),
        ("tensor:2", (64, 32), ("embed", "mlp"), PartitionSpec(None, "tensor")),
        (
            "fsdp:8",
            (3, 3, 1, 16),
            (None, None, "conv_in", "conv_out"),
            PartitionSpec(None, None, None, "fsdp"),
        ),
        ("data:8", (64, 32), ("embed", "mlp"), PartitionSpec()),
    ],
)
def test_specs(text, shape, axes, spec):
    assert sharding.parameter("dense/kernel", shape, axes, mesh.make(text)) == spec


@pytest.mark.parametrize(
    ("text", "rule", "spec"),
    [
        ("fsdp:4,tensor:2", "tensor:fsdp", PartitionSpec("tensor", "fsdp")),
        ("fsdp:4,tensor:2", "-:tensor", PartitionSpec(None, "tensor")),
        ("fsdp:4,tensor:2", "tensor:-", PartitionSpec("tensor")),
        ("fsdp:4,tensor:2", "-:-", PartitionSpec()),
        ("fsdp:4,tensor:2", "-", PartitionSpec()),
        ("fsdp:4,tensor:2", "auto", PartitionSpec("fsdp", "tensor")),
        ("fsdp:8", "tensor:-", PartitionSpec()),
        ("data:4,tensor:2", "data:tensor", PartitionSpec("data", "tensor")),
    ],
)
def test_a_rule_comes_before_the_model(text, rule, spec):
    assert (
        sharding.parameter("dense/kernel", (64, 32), ("embed", "mlp"), mesh.make(text), rule)
        == spec
    )


def test_a_logical_dim_that_does_not_divide_is_an_error():
    grid = mesh.Mesh(
        np.asarray([jax.devices()[0]] * 16, dtype=object).reshape((1,) * 6 + (16,)), mesh.AXES
    )
    with pytest.raises(ValueError, match="^params") as caught:
        sharding.parameter("params/mlp/kernel", (64, 1000), ("embed", "mlp"), grid)
    assert (
        str(caught.value)
        == "params/mlp/kernel dim 1 (=1000, 'mlp') not divisible by axis tensor=16; change --mesh"
        " or make it 992 or 1008"
    )


def test_logical_axes_name_no_more_dims_than_there_are():
    with pytest.raises(
        ValueError,
        match=(
            r"^params/x: has logical axes \('embed', 'mlp'\) for dims \[8\]; its model must name at"
            r" most as many as there are$"
        ),
    ):
        sharding.parameter("params/x", (8,), ("embed", "mlp"), mesh.make("fsdp:8"))


PARAMS = {
    "head": {
        "kernel": jax.ShapeDtypeStruct((64, 10), jnp.float32),
        "bias": jax.ShapeDtypeStruct((10,), jnp.float32),
    }
}
NO_AXES = {"head": {"kernel": None, "bias": None}}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [("kernel", "-:tensr")],
            (
                "--shard: params/head/kernel: '-:tensr' has the unknown axis 'tensr'; give data,"
                " fsdp, tensor or - for each dim; did you mean 'tensor'?"
            ),
        ),
        (
            [("kernel", "")],
            (
                "--shard: params/head/kernel: '' has the unknown axis ''; give data, fsdp, tensor"
                " or - for each dim"
            ),
        ),
        (
            [("kernel", "tensor")],
            (
                "--shard: params/head/kernel: 'tensor' has 1 of 2 entries, one for each of its dims"
                " [64, 10]; a single - is a whole copy"
            ),
        ),
        (
            [(".*", "fsdp:-")],
            (
                "--shard: params/head/bias: 'fsdp:-' has 2 of 1 entries, one for each of its dims"
                " [10]; a single - is a whole copy"
            ),
        ),
        (
            [("kernel", "fsdp:fsdp")],
            (
                "--shard: params/head/kernel: 'fsdp:fsdp' has axis fsdp twice; an axis splits one"
                " dim of an array, give - for the other"
            ),
        ),
        (
            [("kernel", "-:fsdp")],
            (
                "--shard: params/head/kernel: '-:fsdp': dim 1 (=10) not divisible by axis fsdp=4;"
                " give - for it, or make it 8 or 12"
            ),
        ),
        (
            [("kernal", "-")],
            (
                "--shard: pattern 'kernal' decides no parameter (paths: head/bias, head/kernel,"
                " ...); remove it or mend it"
            ),
        ),
        (
            [("kernel", "-"), ("head/k", "-")],
            (
                "--shard: pattern 'head/k' decides no parameter (paths: head/bias, head/kernel,"
                " ...); remove it or mend it"
            ),
        ),
        (
            [("(", "-")],
            (
                "--shard: '(' is not a regular expression (missing ), unterminated subpattern at"
                " position 0)"
            ),
        ),
    ],
)
def test_bad_rules(rules, message):
    with pytest.raises(ValueError, match="^--shard") as caught:
        sharding.parameters(PARAMS, NO_AXES, mesh.make("fsdp:4,tensor:2"), rules=tuple(rules))
    assert str(caught.value) == message


def test_rules_choose_by_pattern_and_the_rest_stays():
    grid = mesh.make("fsdp:4,tensor:2")
    specs = jax.tree.map(
        lambda place: place.spec,
        sharding.parameters(PARAMS, NO_AXES, grid, rules=(("head/kernel", "tensor:-"),)),
    )
    assert specs == {"head": {"kernel": PartitionSpec("tensor"), "bias": PartitionSpec()}}
    specs = jax.tree.map(
        lambda place: place.spec,
        sharding.parameters(PARAMS, NO_AXES, grid, rules=(("bias", "auto"), (".*", "-"))),
    )
    assert specs == {"head": {"kernel": PartitionSpec(), "bias": PartitionSpec()}}


def rows_of(model: Any, text: str, rules: tree.Rules[str] = ()) -> dict[str, sharding.Row]:
    """The table of a model for 8 x 8 images, by path."""
    grid, images = mesh.make(text), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    params = jax.eval_shape(adapters.functions(model).init, jax.random.key(0), images)["params"]
    axes = adapters.logical_axes(model, images)["params"]
    rows = sharding.rows(
        params, axes, sharding.parameters(params, axes, grid, rules=rules), grid, rules
    )
    return {row.path: row for row in rows}


def test_a_vision_transformer_of_six_heads():
    """Heads and hidden width go to tensor, the stream to fsdp; head, norms and biases of the stream
    are whole on tensor."""
    model = ViT(width=48, depth=2, heads=6, patch=4)
    expected = {
        "block0/attention/query/kernel": "fsdp:tensor:-",
        "block0/attention/query/bias": "tensor:fsdp",
        "block0/attention/key/kernel": "fsdp:tensor:-",
        "block0/attention/value/kernel": "fsdp:tensor:-",
        "block0/attention/out/kernel": "tensor:-:fsdp",
        "block0/attention/out/bias": "fsdp",
        "block0/mlp_in/kernel": "fsdp:tensor",
        "block0/mlp_in/bias": "tensor",
        "block0/mlp_out/kernel": "tensor:fsdp",
        "block0/mlp_out/bias": "fsdp",
        "block0/norm0/scale": "fsdp",
        "head/kernel": "fsdp:-",
        "head/bias": "-",
        "positions": "-:-:fsdp",
    }
    rows = rows_of(model, "fsdp:4,tensor:2")
    assert {path: rows[path].spec for path in expected} == expected
    rows = rows_of(model, "tensor:2")
    assert {
        path: row.spec
        for path, row in rows.items()
        if "tensor" in row.spec and path.startswith("block1")
    } == {
        "block1/attention/query/kernel": "-:tensor:-",
        "block1/attention/query/bias": "tensor:-",
        "block1/attention/key/kernel": "-:tensor:-",
        "block1/attention/key/bias": "tensor:-",
        "block1/attention/value/kernel": "-:tensor:-",
        "block1/attention/value/bias": "tensor:-",
        "block1/attention/out/kernel": "tensor:-:-",
        "block1/mlp_in/kernel": "-:tensor",
        "block1/mlp_in/bias": "tensor",
        "block1/mlp_out/kernel": "tensor:-",
    }
    with pytest.raises(
        ValueError,
        match=(
            r"^params/block0/attention/key/bias dim 0 \(=6, 'heads'\) not divisible by axis"
            r" tensor=4; .* 4 or 8$"
        ),
    ):
        rows_of(model, "tensor:4")


def test_the_table_says_why():
    rows = rows_of(MLP(widths=(24, 9)), "fsdp:3", (("hidden0/kernel", "-"),))
    assert {path: (row.spec, row.bytes, row.why) for path, row in rows.items()} == {
        "hidden0/kernel": ("-", 64 * 24 * 4, "rule hidden0/kernel"),
        "hidden0/bias": ("fsdp", 8 * 4, "automatic: dim 0"),
        "hidden1/kernel": ("fsdp:-", 8 * 9 * 4, "automatic: dim 0"),
        "hidden1/bias": ("fsdp", 3 * 4, "automatic: dim 0"),
        "head/kernel": ("fsdp:-", 3 * 10 * 4, "automatic: dim 0"),
        "head/bias": ("-", 10 * 4, "whole: no dim divides by fsdp=3"),
    }
    rows = rows_of(MLP(widths=(24, 10)), "fsdp:4,tensor:2")
    assert rows["hidden0/kernel"][2:] == (
        "fsdp:tensor",
        16 * 12 * 4,
        "mlp->tensor, automatic: dim 0",
    )
    assert rows["hidden0/bias"].why == "mlp->tensor"
    assert (
        rows_of(MLP(widths=(9,)), "data:8")["hidden0/kernel"].why
        == "whole: the mesh splits batches only"
    )
    assert (
        rows_of(MLP(widths=(8,)), "tensor:2")["head/kernel"].why
        == "whole: no dim of it goes to tensor"
    )
    assert (
        rows_of(ViT(width=6, depth=1, heads=2), "tensor:2,fsdp:3")[
            "block0/attention/query/kernel"
        ].why
        == "embed->fsdp, heads->tensor"
    )


def test_the_printed_table_joins_equal_layers():
    rows = list(rows_of(ViT(width=48, depth=12, heads=6, patch=4), "fsdp:4,tensor:2").values())
    console = Console(width=160, file=io.StringIO())
    console.print(tables.sharding_table(rows))
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert (
        "block{0..11}/mlp_in/kernel 48×192 12 fsdp:tensor 55.3 kB embed->fsdp, mlp->tensor" in lines
    )
    assert "block{0..11}/norm{0,1}/bias 48 24 fsdp 1.2 kB embed->fsdp" in lines
    assert lines[-1].startswith(f"all {len(rows)} ")
    assert len(lines) < 28


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("fsdp:8", (8, 8, 8, 1)),
        ("fsdp:4,tensor:2", (8, 2, 4, 1)),
        ("data:2,fsdp:4", (4, 4, 4, 1)),
        ("data:8", (1, 1, 1, 1)),
    ],
)
def test_bytes_a_device_by_hand(text, parts):
    """Parameters, both moments of AdamW and their average; of the head's bias of 10, everyone has a
    copy. Said of shapes and true of arrays."""
    grid, model = mesh.make(text), MLP(widths=(32,))
    batch = {"image": jnp.zeros((8, 8, 8, 1)), "label": jnp.zeros(8, jnp.int32)}
    made = state.init_state(model, Classification(), AdamW(), batch, mesh=grid, ema_decay=0.99)
    kernel0, bias0, kernel1, bias1 = parts
    copies = 4
    hand = 4 * copies * (64 * 32 // kernel0 + 32 // bias0 + 32 * 10 // kernel1 + 10 // bias1)
    arrays = [
        leaf for leaf in jax.tree.leaves((made.params, made.opt_state, made.ema)) if leaf.ndim
    ]
    assert sharding.bytes_per_device(arrays, [leaf.sharding for leaf in arrays]) == hand
    device = grid.devices.flat[-1]
    assert (
        sum(
            shard.data.nbytes
            for leaf in arrays
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        == hand
    )


def test_a_key_counts_its_words():
    grid = mesh.make("fsdp:8")
    shapes = {
        "a": jax.ShapeDtypeStruct((16, 64), jnp.float32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    placed = {"a": sharding.parameters(shapes["a"], None, grid), "key": sharding.replicated(grid)}
    assert sharding.bytes_per_device(shapes, placed) == 16 * 64 * 4 // 8 + 8
