"""What a model is called with, and which of its outputs are meant.

Dims: B batch, C classes, T tokens, V vocabulary.
"""

import collections
import dataclasses
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import config
from jaxtrain.config import record
from jaxtrain.errors import UserError
from jaxtrain.tasks import Binary, Classification, MultiLabel, NextToken, Regression, picking

BATCH = {
    "tokens": jnp.array([[1, 2, 3]]),
    "lengths": jnp.array([3]),
    "attention_mask": jnp.ones((1, 3)),
    "label": jnp.array([2]),
}
STOCK = (Classification, Binary, MultiLabel, Regression)


@pytest.mark.parametrize("task", STOCK)
def test_inputs_by_position_and_by_name(task) -> None:
    assert task(input="lengths").inputs(BATCH) is BATCH["lengths"]
    several = task(input="tokens,lengths").inputs(BATCH)
    assert isinstance(several, tuple)
    assert [part is BATCH[name] for part, name in zip(several, ("tokens", "lengths"))] == [True] * 2
    named = task(input="ids=tokens,mask=attention_mask").inputs(BATCH)
    assert list(named) == ["ids", "mask"]
    assert named["mask"] is BATCH["attention_mask"]
    assert list(task(input="ids=tokens").inputs(BATCH)) == ["ids"]


def test_inputs_of_language_models_are_cut_as_the_tokens_are() -> None:
    task = NextToken(input="ids=tokens,mask=attention_mask,n=lengths")
    found = task.inputs(BATCH)
    assert {name: array.shape for name, array in found.items()} == {
        "ids": (1, 2),
        "mask": (1, 2),
        "n": (1,),
    }
    assert task.units(BATCH) == 2
    assert NextToken(input="tokens,lengths").inputs(BATCH)[1] is BATCH["lengths"]


@pytest.mark.parametrize(
    ("names", "line", "followed"),
    [
        (
            "image",
            "batch has keys attention_mask, label, lengths, tokens; the task wants 'image';",
            "tokens",
        ),
        (
            "tokens,length",
            "the task wants 'length'; set --task.input; did you mean 'lengths'?",
            "tokens,lengths",
        ),
        ("tokens,", "the task wants ''; set --task.input", "tokens"),
        (
            "tokens,mask=attention_mask",
            "--task.input=tokens,mask=attention_mask: names some argu",
            "ids=tokens,mask=attention_mask",
        ),
        (
            "a=tokens,a=lengths",
            "--task.input=a=tokens,a=lengths: names an argument twice; name each",
            "a=tokens,b=lengths",
        ),
        (
            "=tokens",
            "--task.input==tokens: names some arguments of the model, and others not;",
            "tokens",
        ),
        (
            "1x=tokens",
            "names some arguments of the model, and others not; name all, as in ids=tok",
            "ids=tokens",
        ),
    ],
)
def test_inputs_that_do_not_go_together(names: str, line: str, followed: str) -> None:
    """And what the line says to write instead gives the inputs."""
    with pytest.raises(UserError, match=re.escape(line)):
        Classification(input=names).inputs(BATCH)
    found = Classification(input=followed).inputs(BATCH)
    first = found["ids" if "ids" in found else "a"] if isinstance(found, dict) else found
    assert (first[0] if isinstance(first, tuple) else first) is BATCH["tokens"]


def test_python_may_name_inputs_by_a_tuple_or_a_dict() -> None:
    """Which are the same run as the text, so that it is recorded and resumed."""
    by_tuple = Classification(input=("tokens", "lengths"))  # pyright: ignore
    assert by_tuple == Classification(input="tokens,lengths")
    with pytest.raises(UserError, match=r"input=\(\): a model needs an input; name a field of the"):
        Classification(input=())  # pyright: ignore
    by_name = {"ids": "tokens", "mask": "attention_mask"}
    task = Classification(input=by_name)  # pyright: ignore
    assert list(task.inputs(BATCH)) == ["ids", "mask"]
    run = config.Run(name="toy", steps=1, **dict.fromkeys(config.FAMILIES) | {"task": task})
    assert record.from_json(run, record.to_json(run)).task == task


class Pair(NamedTuple):
    logits: Any
    features: Any


@dataclasses.dataclass
class Output:
    logits: Any
    past: Any = None


LOGITS_BC, FEATURES = np.eye(3, dtype=np.float32)[:1], np.zeros((1, 7), np.float32)
MODELS = [
    ((LOGITS_BC, FEATURES), "0", "0 (1, 3), 1 (1, 7); choose one, e.g. --task.output=0"),
    (
        Pair(LOGITS_BC, FEATURES),
        "logits",
        "logits (1, 3), features (1, 7); choose one, e.g. --task.output=logits",
    ),
    (Pair(FEATURES, LOGITS_BC), "1", "logits (1, 7), features (1, 3); choose one"),
    (
        {"aux": FEATURES, "logits": LOGITS_BC},
        "logits",
        "aux (1, 7), logits (1, 3); choose one, e.g. --task.output=logits",
    ),
    (
        {"head": {"logits": LOGITS_BC}, "all": [FEATURES, FEATURES]},
        "head.logits",
        "head.logits (1, 3), all.0 (1, 7), all.1 (1, 7); choose one, e.g. --task.output=head.logi",
    ),
    (Output(LOGITS_BC), "logits", "logits (1, 3); choose one, e.g. --task.output=logits"),
    (
        collections.OrderedDict(logits=LOGITS_BC, hidden=(FEATURES,)),
        "logits",
        "logits (1, 3), hidden.0 (1, 7); choose one",
    ),
    ((LOGITS_BC,), "0", "0 (1, 3); choose one, e.g. --task.output=0"),
]


@pytest.mark.parametrize(("outputs", "path", "listed"), MODELS)
def test_a_part_of_the_outputs(outputs: Any, path: str, listed: str) -> None:
    task = Classification(output=path)
    sums = task.loss(outputs, BATCH)
    expected = Classification().loss(LOGITS_BC, BATCH)
    assert {name: float(pair[0]) for name, pair in sums.items()} == {
        name: float(pair[0]) for name, pair in expected.items()
    }
    assert float(task.examine(outputs, BATCH)["loss"][0]) == float(expected["loss"][0])
    task.check(outputs, 3)
    with pytest.raises(UserError, match="set --model.num_classes=4"):
        task.check(outputs, 4)
    for call in (lambda task: task.loss(outputs, BATCH), lambda task: task.check(outputs, 3)):
        line = f"the model gives several outputs; its outputs are {listed}"
        with pytest.raises(UserError, match=f"^{re.escape(line)}"):
            call(Classification())
        line = f"--task.output=nothing: no such array; its outputs are {listed}"
        with pytest.raises(UserError, match=f"^{re.escape(line)}") as caught:
            call(Classification(output="nothing"))
        said = re.search(r"e\.g\. --task\.output=(\S+)$", str(caught.value))
        assert said, "a remedy, which is followed"
        assert Classification(output=said[1]).loss(outputs, BATCH)


def test_other_tasks_pick_theirs() -> None:
    pair = (FEATURES, jnp.ones((1, 3)))
    batch = {"label": jnp.ones((1, 3)), "target": jnp.zeros((1, 3)), "tokens": jnp.array([[1, 2]])}
    assert float(MultiLabel(output="1").loss(pair, batch)["accuracy"][0]) == 1
    assert float(Regression(output="1").loss(pair, batch)["loss"][0]) == 1
    logits = (FEATURES, jnp.zeros((1, 1, 3)))
    assert float(NextToken(output="1").loss(logits, batch)["loss"][1]) == 1
    one = {"label": jnp.ones(1)}
    assert float(Binary(output="p").loss({"p": jnp.ones(1)}, one)["accuracy"][0]) == 1


def test_one_array_has_no_parts() -> None:
    with pytest.raises(
        UserError, match=r"^--task.output=0: the model gives one array; set --task.ou"
    ):
        picking.output_of(LOGITS_BC, "0")
    assert picking.output_of(LOGITS_BC, "") is LOGITS_BC  # the remedies
    assert picking.output_of((LOGITS_BC, None), "0") is LOGITS_BC
    with pytest.raises(
        UserError, match=r"^the model gives NoneType, which has no arrays; have it "
    ):
        picking.output_of(None, "")
