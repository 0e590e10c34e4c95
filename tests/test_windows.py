"""Windows over a text, against a loop over its tokens: every token is predicted once, whatever the
shards, the pieces and the length."""

import dataclasses
import itertools

import numpy as np
import pytest

from jaxtrain.data.text import windows as windows_file
from jaxtrain.data.text.pieces import Pieces, TextBytes, documents_of, within
from jaxtrain.data.text.token_cache import Tokens, in_memory
from jaxtrain.data.text.tokenizers import Bytes, Characters
from jaxtrain.data.text.windows import Windows, windows
from jaxtrain.errors import UserError

TEXTS = ["the cat", "", "sat on é", "x", "a longer piece of text, on and on", "end"]


def corpus(texts: list[str] = TEXTS, shards: int = 1) -> Tokens:
    """A corpus whose ids are cut into so many files."""
    tokens = in_memory(texts, Bytes())
    parts = np.array_split(tokens.shards[0], shards)
    return dataclasses.replace(tokens, shards=tuple(parts))


def ids(tokens: Tokens) -> list[int]:
    """All ids, in order."""
    return tokens.read(0, len(tokens)).tolist()


def predicted(rows: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """Each token that is predicted, behind the one before it."""
    tokens, weight = rows["tokens"], rows.get("weight", np.ones(rows["tokens"].shape))
    return [
        (int(row[place - 1]), int(row[place]))
        for row, weights in zip(tokens, weight, strict=True)
        for place in range(1, len(row))
        if weights[place]
    ]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("shards", [1, 5])
def test_every_token_but_the_first_is_predicted_once_and_in_order(whole: bool, shards: int) -> None:
    tokens = corpus(shards=shards)
    flat = ids(tokens)
    for length in range(1, len(flat) + 3):
        table = Windows(tokens, documents_of(tokens), length)
        rows = (table.whole() if whole else table).read(np.arange(len(table)))
        assert predicted(rows) == list(itertools.pairwise(flat)), length
        fields = {name: (array.shape[1:], array.dtype) for name, array in rows.items()}
        assert fields == {name: (f.shape, f.dtype) for name, f in table.fields.items()}
        assert ("weight" in rows) == ((len(flat) - 1) % length != 0)


def test_pieces_that_are_no_neighbours_follow_one_another() -> None:
    tokens = corpus(shards=3)
    pieces = documents_of(tokens, np.array([0, 2, 3, 5]))
    flat = [
        token
        for document in (0, 2, 3, 5)
        for token in tokens.read(*tokens.offsets_D1[document : document + 2].tolist())
    ]
    for length in (1, 3, 4, 7, 30):
        table = Windows(tokens, pieces, length)
        there = table.read(np.arange(len(table)))
        assert predicted(there) == list(itertools.pairwise(flat))
        for name, array in table.whole().read(np.arange(len(table))).items():
            np.testing.assert_array_equal(array, there[name], err_msg=name)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_with_a_smaller_stride_rows_begin_at_every_such_place(stride: int) -> None:
    tokens = corpus()
    flat = np.array(ids(tokens))
    table = Windows(tokens, documents_of(tokens), 5, stride)
    for rows in (table, table.whole()):
        read = rows.read(np.arange(len(table)))
        for number, row in enumerate(read["tokens"]):
            full = flat[number * stride : number * stride + 6]
            assert row[: len(full)].tolist() == full.tolist()
        covered = {number * stride + place for number in range(len(table)) for place in range(6)}
        assert covered >= set(range(len(flat)))
    if stride == 1:  # nanoGPT's places: as many as there are, all full
        assert len(table) == len(flat) - 5 and "weight" not in table.fields


def test_a_small_table_is_whole_and_shares_the_memory_of_overlaps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = corpus()
    table = windows(tokens, documents_of(tokens), 5, 1)
    assert table.arrays is not None and table.arrays["tokens"].strides[0] == 2
    monkeypatch.setattr(windows_file, "WHOLE", 10)
    assert windows(tokens, documents_of(tokens), 5, 1).arrays is None


def test_bytes_of_text_add_up_to_those_of_the_documents() -> None:
    """A byte a token in this tokenizer, and none for the end of a text."""
    tokens = corpus()
    flat = np.array(ids(tokens))
    table = Windows(tokens, documents_of(tokens), 4)
    for rows in (table, table.whole()):
        read = rows.read(np.arange(len(table)))
        for row, size in enumerate(read["bytes"]):
            targets = flat[4 * row + 1 : 4 * row + 5]
            assert size == (targets < 256).sum()
    everything = TextBytes(tokens).before(np.array([0, len(tokens)]))
    assert everything.tolist() == [0, sum(len(text.encode()) for text in TEXTS)]


def test_bytes_are_spread_over_the_tokens_of_a_document() -> None:
    tokens = in_memory(["éé", "ab"], Characters("abé"))
    assert TextBytes(tokens).before(np.arange(5)).tolist() == [0, 2, 4, 5, 6]


def test_a_range_of_tokens_is_cut_out_of_its_documents() -> None:
    tokens = corpus(["abc", "de", "f"])  # 4 + 3 + 2 tokens
    for start in range(9):
        for stop in range(start + 1, 10):
            pieces = within(tokens, start, stop)
            places = [
                place
                for first, length in zip(pieces.starts_P, pieces.lengths_P, strict=True)
                for place in range(first, first + length)
            ]
            assert places == list(range(start, stop))
            ends = {4, 7} & set(range(start + 1, stop))
            assert len(pieces.starts_P) == 1 + len(ends)
    assert len(within(tokens, 0, 9).merged().starts_P) == 1


def test_a_row_names_its_place() -> None:
    tokens = corpus(["abc", "de"])
    assert Windows(tokens, documents_of(tokens), 5).where(1) == "document 1, token 1"


def test_one_token_is_too_few() -> None:
    tokens = in_memory(["a"], Characters("a"))
    with pytest.raises(UserError, match="1 tokens; there must be 2 or more to predict one"):
        windows(tokens, documents_of(tokens), 3)
    nothing = Pieces(np.zeros(0, np.int64), np.zeros(0, np.int64))
    with pytest.raises(UserError, match="0 tokens; there must be 2 or more"):
        windows(tokens, nothing, 3)
