"""The task of hidden tokens against loops in NumPy: which are chosen, what stands in their place,
what is asked for, and that neither the batch nor the mesh matters.

Dims: B batch, T tokens, V vocabulary, D width.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import tasks
from jaxtrain.data.sources.text import Mixture, Text
from jaxtrain.data.table import ArrayTable
from jaxtrain.errors import UserError
from jaxtrain.late_logits import LateLogits
from jaxtrain.optimizers import SGD
from jaxtrain.parallel import mesh as meshes
from jaxtrain.parallel import sharding
from jaxtrain.tasks import MaskedLanguage
from jaxtrain.train import check, state, steps, train_step
from jaxtrain.train.recipe import Recipe

RANDOM = np.random.default_rng(0)
B, T, V, D = 8, 12, 11, 4
MASK = V  # one more than the data has
TASK = MaskedLanguage(mask_token=MASK, special=(0, 3), vocabulary=V, mask_share=0.4)
TOKENS_BT = RANDOM.integers(0, V, (B, T)).astype(np.int32)
SEGMENTS_BT = np.sort(RANDOM.integers(0, 3, (B, T)), axis=1)[:, ::-1].astype(np.int32)
WEIGHT_BT = RANDOM.integers(0, 3, (B, T)).astype(np.float32)
KEYS_B = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(7), number))(jnp.arange(B))


def oracle(
    task: MaskedLanguage, batch: dict[str, Any], keys_B: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    """What the model sees and which tokens are asked for, token by token from the same numbers."""
    tokens_BT = np.asarray(batch["tokens"])
    seen_BT, masked_BT = tokens_BT.copy(), np.zeros(tokens_BT.shape, bool)
    for row, key in enumerate(keys_B):
        uniform, other = jax.random.split(key)
        chosen, how = np.asarray(jax.random.uniform(uniform, (2, tokens_BT.shape[1])))
        others = np.asarray(jax.random.randint(other, tokens_BT.shape[1:], 0, task.vocabulary))
        for place, token in enumerate(tokens_BT[row]):
            padding = "segments" in batch and batch["segments"][row, place] == 0
            weight = batch.get("weight", np.ones(tokens_BT.shape))
            padding |= (weight[row] if weight.ndim == 1 else weight[row, place]) == 0
            if padding or token in (*task.special, task.mask_token):
                continue
            if chosen[place] < task.mask_share:
                masked_BT[row, place] = True
                if how[place] < 0.8:
                    seen_BT[row, place] = task.mask_token
                elif how[place] < 0.9:
                    seen_BT[row, place] = others[place]
    return seen_BT, masked_BT


@pytest.mark.parametrize("fields", ["", "segments", "weight", "segments,weight", "rows"])
def test_what_is_hidden_is_as_a_loop_has_it(fields: str) -> None:
    """Special tokens, padding and tokens that hide already are never chosen."""
    whole = {"segments": SEGMENTS_BT, "weight": WEIGHT_BT}
    tokens_BT = TOKENS_BT.copy()
    tokens_BT[:, 2] = MASK
    batch = {"tokens": tokens_BT} | {
        name: whole[name] for name in fields.split(",") if name in whole
    }
    if fields == "rows":
        batch["weight"] = np.array([1, 0] * (B // 2), np.float32)
    drawn = jax.jit(TASK.draw)(batch, KEYS_B)
    seen_BT, masked_BT = oracle(TASK, batch, KEYS_B)
    np.testing.assert_array_equal(drawn["tokens"], seen_BT)
    np.testing.assert_array_equal(drawn["masked"], masked_BT)
    np.testing.assert_array_equal(drawn["original"], tokens_BT)
    assert 0 < masked_BT.sum() < masked_BT.size and not np.array_equal(seen_BT, tokens_BT)


def test_the_shares_are_those_of_the_paper() -> None:
    """15% chosen; of those 80% hidden, 10% by any token (which a tenth of the time is the same),
    10% as they are: within four standard deviations over 200,000 tokens."""
    task = MaskedLanguage(mask_token=V, vocabulary=V)
    tokens_BT = jnp.asarray(RANDOM.integers(0, V, (400, 500)).astype(np.int32))
    keys_B = jax.random.split(jax.random.key(1), 400)
    drawn = jax.device_get(jax.jit(task.draw)({"tokens": tokens_BT}, keys_B))
    masked, seen, before = drawn["masked"], drawn["tokens"], drawn["original"]
    count = masked.sum()
    assert abs(count / masked.size - 0.15) < 4 * np.sqrt(0.15 * 0.85 / masked.size)
    assert (seen[~masked] == before[~masked]).all()
    for found, share in (
        (seen[masked] == V, 0.8),
        ((seen != before)[masked] & (seen[masked] != V), 0.1 * (V - 1) / V),
        ((seen == before)[masked], 0.1 + 0.1 / V),
    ):
        assert abs(found.mean() - share) < 4 * np.sqrt(share * (1 - share) / count)
    places = np.bincount(before[masked & (seen != before) & (seen != V)], minlength=V)
    assert places.min() > 0


@pytest.mark.parametrize("late", [False, True])
def test_only_hidden_tokens_are_asked_for(late: bool) -> None:
    """The loss in float64 by hand, weights of tokens included; accuracy and sources too."""
    states = RANDOM.normal(size=(B, T, D)).astype(np.float32)
    kernel = RANDOM.normal(size=(D, V + 1)).astype(np.float32)
    source_B = np.arange(B) % 2
    batch = jax.tree.map(
        jnp.asarray, {"tokens": TOKENS_BT, "weight": WEIGHT_BT, "source": source_B}
    )
    drawn = TASK.draw(batch, KEYS_B)
    logits = LateLogits(jnp.asarray(states), jnp.asarray(kernel), None, V + 1, chunk=5)
    task = dataclasses.replace(TASK, sources=("books", "letters"))
    sums = task.loss(logits if late else logits.logits(), drawn)
    wide = states.astype(np.float64) @ kernel
    chosen = np.take_along_axis(wide, TOKENS_BT[..., None], -1)[..., 0]
    nats_BT = np.log(np.exp(wide).sum(-1)) - chosen
    counts_BT = np.where(np.asarray(drawn["masked"]), WEIGHT_BT, 0)
    right_BT = wide.argmax(-1) == TOKENS_BT
    np.testing.assert_allclose(
        sums["loss"], ((nats_BT * counts_BT).sum(), counts_BT.sum()), rtol=1e-6
    )
    np.testing.assert_allclose(sums["accuracy"][0], (right_BT * counts_BT).sum(), rtol=1e-6)
    own_BT = counts_BT * (source_B == 1)[:, None]
    np.testing.assert_allclose(
        sums["loss_letters"], ((nats_BT * own_BT).sum(), own_BT.sum()), rtol=1e-6
    )


def test_a_token_beyond_the_vocabulary_is_nan_wherever_it_counts() -> None:
    """Also where it is only seen; not where it is padding."""
    logits = jnp.zeros((B, T, V + 1))
    for place, weight, wrong in ((3, 1.0, True), (3, 0.0, False)):
        tokens_BT, weight_BT = TOKENS_BT.copy(), np.ones((B, T), np.float32)
        tokens_BT[0, place], weight_BT[0, place] = V + 5, weight
        batch = {"tokens": jnp.asarray(tokens_BT), "weight": jnp.asarray(weight_BT)}
        drawn = TASK.draw(batch, KEYS_B)
        masked = drawn["masked"].at[0].set(False).at[0, place - 1].set(True)
        loss = TASK.loss(logits, drawn | {"masked": masked})["loss"][0]
        assert np.isnan(float(loss)) == wrong


class Tokenizer:
    """As far as the task asks."""

    special: ClassVar = {"mask_token": "[MASK]", "pad_token": "[PAD]", "bos_token": "<s>"}

    def token_id(self, token: str) -> int | None:
        return {"[MASK]": 4, "[PAD]": 0}.get(token)


@dataclasses.dataclass(frozen=True)
class TextTable(ArrayTable):
    """A table that has a tokenizer."""

    tokenizer: Any = dataclasses.field(default_factory=Tokenizer)
    source_names: tuple[str, ...] = ("books",)


def test_the_data_says_what_the_tokens_are() -> None:
    table = TextTable({"tokens": TOKENS_BT}, num_classes=V)
    task = MaskedLanguage(special=(2,)).with_data(table)
    assert task == MaskedLanguage(mask_token=4, special=(0, 2, 4), vocabulary=V, sources=("books",))
    own = dataclasses.replace(task, mask_token=7, vocabulary=3)
    assert own.with_data(table) == own
    plain = MaskedLanguage().with_data(ArrayTable({"tokens": TOKENS_BT}, num_classes=V))
    assert plain == MaskedLanguage(vocabulary=V, mask_token=V)  # a token of its own


@pytest.mark.parametrize("layout", ["windows", "packed"])
def test_tables_of_text_bring_their_tokenizer(layout: Any, tmp_path: Path) -> None:
    """A tokenizer.json without further files: its tokens are known by how they are written."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    words = ["[PAD]", "a", "b", "[MASK]", "[CLS]", "c"]
    library = Library(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[PAD]")
    )
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(tmp_path / "tokenizer.json"))
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("a b c b a c b a " * 40)
    options: dict[str, Any] = {
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "length": 8,
        "layout": layout,
        "cache": str(tmp_path / "cache"),
        "split_by": "tokens",
    }
    files = [(name, str(tmp_path / f"{name}.txt")) for name in ("one", "two")]
    for source, names in (
        (Text(path=(files[0][1],), **options), ()),
        (Mixture(sources=tuple(files), **options), ("one", "two")),
    ):
        task = MaskedLanguage().with_data(source.open().train)
        assert task == MaskedLanguage(mask_token=3, special=(0, 3, 4), vocabulary=6, sources=names)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (
            lambda: MaskedLanguage().draw({"tokens": TOKENS_BT}, KEYS_B),
            "--task.mask_token: the data does not say the token that hides others; set it",
        ),
        (
            lambda: MaskedLanguage(mask_token=1).draw({"tokens": TOKENS_BT}, KEYS_B),
            "--task.vocabulary: the data does not say the number of tokens; set it",
        ),
        (
            lambda: TASK.check(jnp.zeros((1, T, V)), V),
            (
                "--model.vocabulary=11: the task has a token 11; set --model.vocabulary=12, or"
                " --task.mask_token=TOKEN"
            ),
        ),
        (
            lambda: TASK.check(jnp.zeros((1, T, V - 1)), V),
            "--model.vocabulary=10: the data has 11 tokens; set --model.vocabulary=11",
        ),
        (
            lambda: MaskedLanguage(hidden_share=0.8, random_share=0.3),
            "--task.hidden_share=0.8, --task.random_share=0.3: are more than 1 together; lower one",
        ),
        (
            lambda: TASK.inputs({"tokens": TOKENS_BT[0]}),
            (
                "'tokens' has shape (12,); the task wants (batch, length); give it such tokens, or"
                " set --task.input"
            ),
        ),
        (
            lambda: TASK.draw({"tokens": TOKENS_BT, "segments": SEGMENTS_BT[:, 1:]}, KEYS_B),
            "segments has shape (8, 11); the task wants (8, 12), a number for each token",
        ),
        (
            lambda: TASK.draw({"tokens": TOKENS_BT, "weight": WEIGHT_BT[:, 1:]}, KEYS_B),
            "weight has shape (8, 11); the task wants (8,) or (8, 12)",
        ),
        (
            lambda: TASK.loss(jnp.zeros((B, T, V)), {"tokens": TOKENS_BT}),
            (
                "the batch has no 'masked': nothing was hidden; call the task's draw(batch, keys)"
                " first, as a step does"
            ),
        ),
        (
            lambda: TASK.loss(jnp.zeros((B, V)), TASK.draw({"tokens": TOKENS_BT}, KEYS_B)),
            (
                "outputs have shape (8, 11); the task wants (8, 12) and the vocabulary; the model"
                " must answer at every place"
            ),
        ),
    ],
)
def test_what_the_task_cannot_use_is_named(action: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    assert str(caught.value) == message


# --- in a step
# --------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """Each token from the sum of all embeddings."""

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, train: bool = False) -> jax.Array:
        table_VD = self.param("table", nn.initializers.normal(1.0), (V + 1, D))
        states_BTD = table_VD[tokens_BT]
        mixed_BTD = states_BTD + states_BTD.sum(axis=1, keepdims=True)
        return mixed_BTD @ self.param("head", nn.initializers.normal(1.0), (D, V + 1))


RECIPE = Recipe(Around(), TASK, SGD(0.1))
BATCH = {"tokens": jnp.asarray(TOKENS_BT), "id": jnp.arange(100, 100 + B)}


def drawn_at(step: int, batch: dict[str, Any], *, evaluates: bool = False) -> np.ndarray:
    """Which tokens are asked for at a step."""
    now = state.init_state(*(RECIPE.model, TASK, RECIPE.optimizer), BATCH)
    now = dataclasses.replace(now, step=jnp.int32(step))
    return np.asarray(train_step.drawn(RECIPE, now, batch, evaluates=evaluates)["masked"])


def test_each_step_hides_others_and_evaluation_always_the_same() -> None:
    """By the example's id, not its place in the batch."""
    first, again, later = (drawn_at(step, BATCH) for step in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, later)
    one, two = (drawn_at(step, BATCH, evaluates=True) for step in (0, 5))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, first)
    turned = {name: array[::-1] for name, array in BATCH.items()}
    np.testing.assert_array_equal(drawn_at(0, turned), first[::-1])
    np.testing.assert_array_equal(drawn_at(0, turned, evaluates=True), one[::-1])


def test_steps_on_a_mesh_and_in_parts_are_those_of_one_device() -> None:
    """Training and evaluation; the same tokens are hidden, so the losses are equal."""
    parts = (RECIPE.model, TASK, RECIPE.optimizer)
    found = {}
    for text, parts_of_batch in (("data:1", 1), ("data:1", 2), ("data:4", 1)):
        mesh = meshes.make(text)
        batch = jax.device_put(BATCH, sharding.batch(mesh))
        options = {"mesh": mesh, "microbatches": parts_of_batch}
        now = state.init_state(*parts, BATCH, **options)
        evaluated = steps.make_eval_step(*parts, **options)(now, batch)["loss"]
        now, sums = steps.make_train_step(*parts, **options)(now, batch)
        found[text, parts_of_batch] = jax.device_get((evaluated, sums["loss"], sums["grad_norm"]))
    expected = found["data:1", 1]
    for each in found.values():
        np.testing.assert_allclose(each, expected, rtol=1e-5)
    assert expected[0][1] == drawn_at(0, BATCH, evaluates=True).sum()
    assert expected[1][1] == drawn_at(0, BATCH).sum()


def test_the_check_before_the_first_step_hides_too() -> None:
    shapes = {"tokens": jax.ShapeDtypeStruct((B, T), jnp.int32)}
    assert check.check(RECIPE, shapes).outputs.shape == (B, T, V + 1)
    assert isinstance(tasks.NAMES["masked_language"], MaskedLanguage)
