"""A recipe refuses what it cannot honour, in one line, for those who build steps by hand."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax
import pytest
from test_run import start

from jaxtrain.errors import UserError
from jaxtrain.models import MLP
from jaxtrain.optimizers import SGD
from jaxtrain.tasks import Classification
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.state import init_state
from jaxtrain.train.steps import make_train_step

PARTS = (MLP(num_classes=3, widths=(4,)), Classification(), SGD())
BATCH = {"image": jnp.ones((8, 5)), "label": jnp.zeros(8, jnp.int32)}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"optimizer_state": "bf61"},
            "optimizer_state='bf61': must be one of fp32, bf16; did you mean 'bf16'?",
        ),
        ({"offload": "x"}, "offload='x': must be one of none, optimizer"),
        (
            {"precision": "fp7"},
            "precision='fp7': must be one of fp32, bf16, fp16, fp8; did you mean 'fp8'?",
        ),
        (
            {"remat": "block"},
            "remat='block': must be one of none, dots, dense, blocks; did you mean 'blocks'?",
        ),
        ({"microbatches": 0}, "microbatches=0: must be >= 1"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0: must be > 0"),
    ],
)
def test_an_option_that_cannot_be(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe(*PARTS, **options)
    assert str(caught.value) == line


def test_parts_that_are_none_of_ours() -> None:
    with pytest.raises(UserError, match=r"^optimizer=EmptyState: not an optimizer of jaxtrain"):
        wrong: Any = optax.EmptyState()
        make_train_step(PARTS[0], PARTS[1], wrong)
    with pytest.raises(UserError, match=r"^model=MLP: a class; give a module, such as MLP\(\)$"):
        init_state(MLP, *PARTS[1:], BATCH)


def test_parts_of_a_batch_must_be_whole() -> None:
    state = init_state(*PARTS, BATCH)
    step = make_train_step(*PARTS, microbatches=3)
    line = "^microbatches=3: must divide the batch of 8 examples; nearest: 2 or 4"
    with pytest.raises(UserError, match=line):
        step(state, BATCH)


def test_labels_of_another_shape_are_not_broadcast() -> None:
    """The loss of (N, 1) labels was that of all pairs: an accuracy of 319%."""
    state = init_state(*PARTS, BATCH)
    column = BATCH | {"label": BATCH["label"][:, None]}
    with pytest.raises(UserError, match=r"^labels have shape \(8, 1\), logits \(8, 3\); expected"):
        make_train_step(*PARTS)(state, column)


def test_a_run_that_goes_on_takes_no_parameters_from_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were not read, and run.json said that the run had begun with them."""
    assert start(tmp_path / "run", "--steps=2") == 0
    assert start(tmp_path / "other", "--steps=2") == 0
    capsys.readouterr()
    assert start(tmp_path / "run", "--steps=4", f"--init_from={tmp_path}/other") == 2
    assert "which goes on from its own checkpoints" in capsys.readouterr().err
    assert start(tmp_path / "run", "--steps=4", "--allow_config_change=optimizer.learnin_rate") == 2
    said = capsys.readouterr().err
    assert "--allow_config_change=optimizer.learnin_rate: no such setting; did you mean" in said
