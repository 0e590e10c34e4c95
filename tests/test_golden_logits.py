"""Every family of language models against what `transformers` computed: logits past the window and
past the first length, and the norm of every gradient.

The files in tests/golden are written by tests/transformers_oracle.py, and hold no weights.
tests/test_transformers_equality.py compares more, where torch is.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers_oracle as oracle

from jaxtrain import adapters, tree
from jaxtrain.models.encoder import Encoder
from jaxtrain.weights import config, names


def stored(case: str, model: names.Model) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the torch model has them."""
    bare = oracle.CASES[case]["architectures"] == ["BertModel"]
    return {
        row.name.removeprefix("bert.") if bare else row.name: row.stored
        for row in names.rows(model)
    }


def ours(case: str) -> tuple[names.Model, dict[str, Any], dict[str, tuple[int, ...]]]:
    """Our model of a case, its parameters, and the tensors that they came from."""
    model = config.read(oracle.CASES[case]).model
    shapes = stored(case, model)

    def read(name: str) -> np.ndarray:
        return oracle.weight(case, name, shapes[name])

    return model, names.to_ours(model, read, shapes), shapes


def loss(model: Any, params: Any, tokens_BT: Any, probe: Any) -> Any:
    """One number that every output enters, and the outputs."""
    outputs = model.apply({"params": params}, tokens_BT)
    return (outputs * probe).sum(), outputs


@pytest.mark.parametrize("case", oracle.CASES)
def test_logits_and_gradients_are_those_of_transformers(case: str) -> None:
    model, params, shapes = ours(case)
    golden = np.load(oracle.GOLDEN / f"{case}.npz")
    tokens_BT = oracle.tokens(1, oracle.GOLDEN_LENGTH)
    shape = jax.eval_shape(lambda: model.apply({"params": params}, tokens_BT)).shape
    probe = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    step = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=0)
    (_, outputs), gradients = step(model, params, tokens_BT, probe)
    kept = np.asarray(outputs)
    kept = kept[:, 1::9] if kept.ndim == 3 else kept
    np.testing.assert_allclose(kept, golden["logits"], atol=1e-5, rtol=1e-5)
    named = names.to_hugging_face(model, gradients)
    named = {name if name in shapes else name.removeprefix("bert."): named[name] for name in named}
    norms = {name: float(np.linalg.norm(named[name])) for name in sorted(named)}
    norms = {name: norm for name, norm in norms.items() if not unused(model, name)}
    assert len(norms) == len(golden["gradients"])
    for (name, norm), wanted in zip(norms.items(), golden["gradients"], strict=True):
        # a key's bias moves all scores of a query alike, so its gradient is rounding
        limit = 1e-4 * wanted if wanted > 1e-4 else 1e-4
        assert abs(norm - wanted) <= limit, (name, norm, wanted)


def unused(model: names.Model, name: str) -> bool:
    """Whether no output depends on a tensor."""
    return isinstance(model, Encoder) and model.head == "states" and "pooler" in name


@pytest.mark.parametrize("case", oracle.CASES)
def test_the_names_are_those_of_every_parameter(case: str) -> None:
    model = config.read(oracle.CASES[case]).model
    tokens_BT = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(adapters.functions(model).init, jax.random.key(0), tokens_BT)
    flat = {path: leaf.shape for path, leaf in tree.flatten(shapes["params"]).items()}
    assert flat == {row.path: row.shape for row in names.rows(model)}
