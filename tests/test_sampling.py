"""Sampling: greedy texts are those of a loop without a cache, draws are those of probabilities that
NumPy computes, and depend on seed, row and place alone; what cannot be is said in one line.

Dims: B batch, T tokens, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxtrain.errors import UserError
from jaxtrain.inference import drawing, sampling
from jaxtrain.inference.exact import exactly
from jaxtrain.inference.sampling import generate, stream
from jaxtrain.models import Transformer
from jaxtrain.parallel import mesh as meshes
from jaxtrain.parallel import sharding

VOCABULARY = 23
MODEL = Transformer(
    vocabulary=VOCABULARY,
    width=16,
    depth=2,
    heads=4,
    key_heads=2,
    norm="rms",
    gated=True,
    bias="none",
    positions="rotary",
    pattern=("window", "full"),
    window=6,
)
LEARNED = Transformer(vocabulary=VOCABULARY, width=16, depth=1, heads=2, max_length=24)
PROMPTS = [
    np.random.default_rng(row).integers(0, VOCABULARY, length).tolist()
    for row, length in enumerate((11, 1, 23))
]


def random_params(model: Transformer) -> Any:
    """Numbers for every parameter, biases and scales included."""
    generator = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * generator.normal(size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes),
    )


PARAMS = random_params(MODEL)


@jax.jit(static_argnums=0)
def next_logits(model: Transformer, params: Any, tokens: Any, length: Any) -> jax.Array:
    """The logits after the first `length` of the tokens, without a cache."""
    return model.apply({"params": params}, tokens[None])[0, length - 1]


def greedy_loop(model: Transformer, params: Any, prompt: Any, most: int) -> list[int]:
    """The likeliest token again and again, each time by a whole pass."""
    text = list(prompt)
    for _ in range(most):
        padded = np.zeros(64 if model is MODEL else 24, np.int32)
        padded[: len(text)] = text
        text.append(int(np.argmax(next_logits(model, params, padded, len(text)))))
    return text[len(prompt) :]


def as_lists(texts: Any) -> list[list[int]]:
    return [text.tolist() for text in texts]


# --- texts


def test_greedy_texts_of_unequal_prompts_are_those_of_whole_passes() -> None:
    texts = generate(MODEL, PARAMS, PROMPTS, most=40, temperature=0.0)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text.tolist() == greedy_loop(MODEL, PARAMS, prompt, 40)
        assert text.dtype == np.int32


def test_a_batch_gives_what_single_prompts_give_and_a_stream_what_comes_at_once() -> None:
    options: Any = {"most": 30, "temperature": 1.3, "top_k": 9, "top_p": 0.95, "seed": 5}
    texts = as_lists(generate(MODEL, PARAMS, PROMPTS, **options))
    assert len({*map(tuple, texts)}) == 3
    for row, prompt in enumerate(PROMPTS):
        assert as_lists(generate(MODEL, PARAMS, [prompt], rows=[row], **options)) == [texts[row]]
    assert np.stack(list(stream(MODEL, PARAMS, PROMPTS, **options))).T.tolist() == texts
    assert as_lists(generate(MODEL, PARAMS, PROMPTS, **options | {"seed": 6})) != texts


@pytest.mark.slow
def test_reproducible_texts_are_those_of_whole_passes_with_sums_in_one_order() -> None:
    """Of unequal prompts in a batch, with rings, and alone."""
    options: Any = {"most": 40, "temperature": 0.0, "reproducible": True}
    texts = as_lists(generate(MODEL, PARAMS, PROMPTS, **options))
    assert as_lists(generate(MODEL, PARAMS, PROMPTS[2:], **options)) == texts[2:]
    apply = jax.jit(exactly(lambda params, tokens: MODEL.apply({"params": params}, tokens)))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(prompt) + 40] = prompt + text
        wanted = apply(PARAMS, padded)[0].argmax(-1)
        assert wanted[len(prompt) - 1 : len(prompt) + 39].tolist() == text


def test_a_text_ends_before_any_of_several_stop_tokens() -> None:
    whole = as_lists(generate(MODEL, PARAMS, PROMPTS, most=40, seed=1))
    stop = [whole[0][17], whole[1][3], 2]
    cut = [
        text[: min([text.index(token) for token in stop if token in text], default=40)]
        for text in whole
    ]
    assert len({*map(len, cut)}) > 1
    assert as_lists(generate(MODEL, PARAMS, PROMPTS, most=40, seed=1, stop=stop)) == cut
    arrived = np.stack(list(stream(MODEL, PARAMS, PROMPTS, most=40, seed=1, stop=stop))).T
    for row, text in zip(arrived.tolist(), cut, strict=True):
        assert row == text + [sampling.ENDED] * (len(row) - len(text))
    assert arrived.shape[1] == max(map(len, cut))


def test_a_prompt_longer_than_a_piece_fills_the_cache_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = as_lists(generate(MODEL, PARAMS, PROMPTS, most=8, temperature=0))
    monkeypatch.setattr(sampling, "LONGEST", 8)
    monkeypatch.setattr(sampling, "SHORTEST", 8)
    assert as_lists(generate(MODEL, PARAMS, PROMPTS, most=8, temperature=0)) == whole


def test_a_prompt_may_take_all_learned_positions_but_few() -> None:
    """Its bucket, 32, is more than the model's 24 places, and the shortest more than 10."""
    params, prompt = random_params(LEARNED), PROMPTS[2][:20]
    found = as_lists(generate(LEARNED, params, [prompt], most=5, temperature=0))
    assert found == [greedy_loop(LEARNED, params, prompt, 5)]
    shorter = LEARNED.clone(max_length=10)
    (slid,) = generate(shorter, random_params(shorter), [prompt[:8]], most=20, slide=True)
    assert len(slid) == 20


@pytest.mark.slow
def test_other_settings_and_lengths_are_no_other_programs() -> None:
    programs = sampling._programs(MODEL, 1, 50, "float32", None, False)
    for length, temperature in ((3, 0.5), (9, 2.0), (16, 1.0)):
        prompt, options = PROMPTS[2][:length], {"temperature": temperature, "capacity": 50}
        generate(MODEL, PARAMS, [prompt], most=20, **options)
    assert programs.drawing(False, False)._cache_size() == 1
    assert programs.fill._cache_size() == 1


@pytest.mark.slow
def test_where_learned_positions_run_out_a_text_slides_on_from_its_last_half() -> None:
    params = random_params(LEARNED)
    text = generate(LEARNED, params, [PROMPTS[0]], most=40, temperature=0, slide=True)[0].tolist()
    whole, room = list(PROMPTS[0]), 24
    shown = list(whole)
    while len(whole) < 11 + 40:
        shown = shown[-(room // 2 + 1) :] if len(shown) > room else shown
        found = greedy_loop(LEARNED, params, shown, 1)
        shown, whole = shown + found, whole + found
    assert text == whole[11:]


@pytest.mark.slow
def test_parameters_on_a_mesh_give_the_same_texts() -> None:
    mesh = meshes.make("data:2,fsdp:2,tensor:2")
    boxed = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    axes = nn.get_partition_spec(boxed)
    places = sharding.parameters(
        PARAMS, jax.tree.map(tuple, axes, is_leaf=lambda leaf: isinstance(leaf, tuple)), mesh
    )
    laid = jax.tree.map(jax.device_put, PARAMS, places)
    prompts = [*PROMPTS, PROMPTS[0]]
    options: Any = {"most": 20, "temperature": 0.8, "seed": 3}
    wanted = as_lists(generate(MODEL, PARAMS, prompts, **options))
    assert as_lists(generate(MODEL, laid, prompts, **options)) == wanted
    programs = sampling._programs(MODEL, 4, 64, "float32", mesh, False)
    assert programs.drawing(False, False)._cache_size() == 1
    assert not programs._shardings.cache.blocks[0].key_BSMK.is_fully_replicated


# --- draws


def numpy_shares(logits_V: np.ndarray, temperature: float, k: int, p: float, m: float) -> Any:
    """The probabilities, token by token from the likeliest down, in float64."""
    shares_V = np.exp(logits_V.astype(np.float64) / temperature)
    order = np.argsort(-shares_V)
    order = order[: k or None]
    shares = shares_V[order] / shares_V[order].sum()
    kept, mass = [], 0.0
    for token, share in zip(order, shares, strict=True):
        if mass < p and share >= m * shares[0]:
            kept.append(token)
        mass += share
    found_V = np.zeros_like(shares_V)
    found_V[kept] = shares_V[kept] / shares_V[kept].sum()
    return found_V


@pytest.mark.parametrize(
    "settings",
    [(1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.5, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.2)]
    + [(1.2, 7, 0.7, 0.1), (1.0, 1, 1.0, 0.0), (1.0, 0, 1e-6, 0.0), (1.0, 99, 1.0, 1.0)],
)
def test_draws_have_the_probabilities_of_numpy(settings: tuple[float, int, float, float]) -> None:
    logits_V = np.random.default_rng(0).normal(size=12).astype(np.float32) * 1.5
    temperature, k, p, m = settings
    given = drawing.Drawing(temperature, k, p, m)
    draws = 20_000
    tokens = drawing.drawn(
        jnp.tile(logits_V, (draws, 1)),
        jax.random.split(jax.random.key(0), draws),
        given.numbers(),
        greedy=given.greedy,
        filtered=given.filtered,
    )
    found = np.bincount(np.asarray(tokens), minlength=12) / draws
    wanted = numpy_shares(logits_V, *settings)
    assert ((found > 0) <= (wanted > 0)).all()
    np.testing.assert_allclose(found, wanted, atol=4 * 0.5 / draws**0.5)


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_at_a_tiny_temperature_the_likeliest_token_is_drawn(settings: dict[str, Any]) -> None:
    logits_BV = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32) * 5
    logits_BV[0, 3], logits_BV[1, 2] = 3e30, -np.inf
    for temperature in (1e-6, 1e-38, 1e-300):  # float32 ends at 1e-38
        given = drawing.Drawing(temperature, **settings)
        tokens_B = drawing.drawn(
            jnp.asarray(logits_BV),
            jax.random.split(jax.random.key(0), 8),
            given.numbers(),
            greedy=given.greedy,
            filtered=given.filtered,
        )
        np.testing.assert_array_equal(tokens_B, logits_BV.argmax(-1))


def test_equal_logits_at_the_edge_all_stay() -> None:
    kept = drawing.likely(jnp.array([[1.0, 2.0, 1.0, 0.0]]), top_k=2, top_p=1.0, min_p=0.0)
    assert np.isfinite(kept).tolist() == [[True, True, True, False]]


# --- what cannot be

REFUSED = {
    "no prompts; give at least one": ([], {}),
    "prompt 0: is empty; give it a token, such as the tokenizer's BOS": ([[]], {}),
    "prompt 1: token 23 is none of the model's 23 (0..22); is it encoded by the model's"
    " tokenizer?": ([[0], [3, 23]], {}),
    "prompt 0: token -1 is none of the model's 23": ([[-1]], {}),
    "prompt 0: float64[1] is no sequence of token ids; encode it": ([[0.5]], {}),
    "prompt 0: int64[1, 1] is no sequence of token ids; encode it": ([[[1]]], {}),
    "most=0: must be at least 1": ([[0]], {"most": 0}),
    "temperature=-1: must be >= 0 (0 takes the likeliest token)": ([[0]], {"temperature": -1}),
    "temperature=nan: must be >= 0": ([[0]], {"temperature": float("nan")}),
    "top_k=-1: must be >= 0 (0 for all tokens)": ([[0]], {"top_k": -1}),
    "top_p=0: must be above 0 and at most 1 (1 for all tokens)": ([[0]], {"top_p": 0}),
    "min_p=2: must be from 0 (all tokens) to 1": ([[0]], {"min_p": 2}),
    "stop=[1, 40]: token 40 is none of the model's 23 (0..22)": ([[0]], {"stop": [1, 40]}),
    "rows=[0, 1]: must be a number for each of 1 prompts": ([[0]], {"rows": [0, 1]}),
    "topk: no option of sampling; did you mean 'top_k'?": ([[0]], {"topk": 3}),
    "a prompt of 30 tokens is longer than the cache (capacity=16); shorten it to 16 tokens at"
    " most": ([[0] * 30], {"capacity": 16}),
    "a prompt of 9 tokens and most=20 new ones need room for 28, more than capacity=16; set most=8,"
    " or slide=True, which goes on from the last half of the text": (
        [[0] * 9],
        {"capacity": 16, "most": 20},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_said_in_one_line(message: str) -> None:
    prompts, options = REFUSED[message]
    with pytest.raises(UserError) as raised:
        generate(MODEL, PARAMS, prompts, **options)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_model_says_how_many_learned_positions_it_has() -> None:
    with pytest.raises(
        UserError, match=r"most=200 new ones need room for 200, more than the model's max_length=24"
    ):
        generate(LEARNED, PARAMS, [[0]])
    with pytest.raises(UserError, match=r"longer than the cache \(the model's max_length=24\)"):
        generate(LEARNED, PARAMS, [[0] * 25], slide=True)
    with pytest.raises(UserError, match=r"capacity=30: the model has max_length=24 learned"):
        generate(LEARNED, PARAMS, [[0]], capacity=30)


def test_parameters_on_a_mesh_add_in_no_order_of_one_device() -> None:
    mesh = meshes.make("data:2")
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    line = "reproducible=True: the parameters lie on a mesh, which adds in an order of its own; put"
    with pytest.raises(UserError, match=line):
        generate(MODEL, jax.device_put(PARAMS, whole), [[0]], reproducible=True)


def test_logits_that_are_nan_are_no_token() -> None:
    damaged = PARAMS | {"norm": {"scale": PARAMS["norm"]["scale"].at[0].set(jnp.nan)}}
    with pytest.raises(UserError, match=r"prompt 0: after 0 new tokens the model's logits are nan"):
        generate(MODEL, damaged, [[0]], most=3)


def test_a_model_without_a_cache_is_refused() -> None:
    from jaxtrain.models import MLP

    with pytest.raises(UserError, match=r"MLP: takes no cache, which sampling needs; give a Trans"):
        generate(MLP(), {}, [[0]])
