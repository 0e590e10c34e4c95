"""Best-fit packing, against a plain best fit one piece after the other: no token lost or doubled,
rows as full, the same plan everywhere."""

import collections
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.data.text import packing
from jaxtrain.data.text.packing import Packed, Plan, best_fit, cut, plan
from jaxtrain.data.text.pieces import Pieces, documents_of
from jaxtrain.data.text.token_cache import Tokens, in_memory
from jaxtrain.data.text.tokenizers import Bytes


def plain_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The lengths in each row: the longest piece first, into the row with the least room that takes
    it."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if capacity - sum(row) >= length]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def corpus(lengths: list[int], shards: int = 1, seed: int = 0) -> Tokens:
    """Documents of so many tokens, of which no two are alike: id = place."""
    tokens = in_memory(["" for _ in lengths], Bytes())
    flat = np.arange(sum(lengths), dtype=np.uint16)
    return dataclasses.replace(
        tokens,
        shards=tuple(np.array_split(flat, shards)),
        offsets_D1=np.cumsum([0, *lengths]),
        bytes_D=np.maximum(np.array(lengths) - 1, 0),
    )


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 16, 33])
def test_rows_are_those_of_best_fit_one_by_one(capacity: int) -> None:
    for seed in range(40):
        random = np.random.default_rng(seed)
        lengths = random.integers(1, capacity + 1, random.integers(1, 80))
        row_P = best_fit(lengths, capacity)
        rows = collections.defaultdict(list)
        for row, length in zip(row_P.tolist(), lengths.tolist(), strict=True):
            rows[row].append(length)
        expected = plain_best_fit(lengths.tolist(), capacity)
        # which of two rows with the same room takes a piece is anybody's choice
        assert sorted(map(sum, rows.values())) == sorted(map(sum, expected))
        assert sorted(rows) == list(range(len(expected)))


def test_every_token_is_a_target_once_or_the_head_of_a_document() -> None:
    """Each token has an id of its own here; all sets of up to three documents of up to nine tokens,
    in rows of two to six, over one file and over two."""
    for count in (1, 2, 3):
        for lengths in itertools.product((1, 2, 3, 5, 9), repeat=count):
            for capacity in (2, 3, 4, 6):
                _check(corpus(list(lengths), shards=1 + capacity % 2), capacity)


def _check(tokens: Tokens, capacity: int) -> None:
    table = Packed(tokens, plan(documents_of(tokens), capacity))
    rows = table.read(np.arange(len(table)))
    heads = set(tokens.offsets_D1[:-1].tolist())
    document = np.repeat(np.arange(len(heads)), np.diff(tokens.offsets_D1))
    targets: list[int] = []
    seen_heads: list[int] = []
    for ids, segments, weight in zip(rows["tokens"], rows["segments"], rows["weight"], strict=True):
        assert set(weight.tolist()) <= {0.0, 1.0}
        filled = int((segments > 0).sum())
        assert (segments[filled:] == 0).all() and (ids[filled:] == 0).all()
        assert not weight[filled:].any()
        assert (np.diff(segments[:filled]) >= 0).all() and segments[0] == 1
        for place in range(filled):
            first = place == 0 or segments[place] != segments[place - 1]
            assert weight[place] == (not first)
            if first:
                if int(ids[place]) in heads:
                    seen_heads.append(int(ids[place]))
            else:
                targets.append(int(ids[place]))
                # its context is what stands before it in its document
                assert ids[place - 1] == ids[place] - 1
                assert document[ids[place - 1]] == document[ids[place]]
    assert sorted(seen_heads) == sorted(heads)
    assert sorted(targets) == sorted(set(range(len(tokens))) - heads)
    assert rows["bytes"].sum() <= tokens.bytes_D.sum()


def test_a_document_that_fits_is_never_cut() -> None:
    lengths = [1, 2, 3, 4, 5, 6, 7, 8, 9, 20]
    pieces = cut(documents_of(corpus(lengths)), 9)
    assert pieces.lengths_P.tolist() == [*lengths[:-1], 9, 9, 4]
    assert plan(documents_of(corpus(lengths)), 9).cut == 1


def test_the_plan_hangs_on_the_lengths_alone_and_is_the_same_again() -> None:
    lengths = np.random.default_rng(3).integers(1, 200, 500).tolist()
    one, again = (plan(documents_of(corpus(lengths)), 64) for _ in range(2))
    for field in dataclasses.fields(Plan):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(again, field.name))


def test_rows_are_nearly_full_and_the_note_says_how_much() -> None:
    lengths = np.random.default_rng(0).integers(2, 90, 3000).tolist()
    planned = plan(documents_of(corpus(lengths)), 129)
    places = len(planned) * 129
    assert planned.fill == pytest.approx(sum(lengths) / places) and planned.fill > 0.995
    assert planned.note("train", 3000) == (
        f"train: 3,000 documents packed into {len(planned):,} rows of 129 tokens,"
        f" {100 * planned.fill:.2f}% full"
    )
    assert (
        plan(documents_of(corpus([300, 5])), 129)
        .note("test", 2)
        .endswith("full; 1 longer than a row is cut")
    )


def test_rows_in_memory_and_from_files_are_the_same() -> None:
    tokens = corpus(np.random.default_rng(1).integers(1, 40, 60).tolist(), shards=7)
    table = Packed(tokens, plan(documents_of(tokens), 17))
    whole = packing.packed(tokens, plan(documents_of(tokens), 17))
    order = np.random.default_rng(2).permutation(len(table))
    assert whole.arrays is not None and dict(whole.fields) == dict(table.fields)
    read = table.read(order)
    for name, array in whole.read(order).items():
        np.testing.assert_array_equal(array, read[name], err_msg=name)
        assert array.dtype == table.fields[name].dtype
    assert table.where(0).startswith("document ")


def test_bytes_of_predicted_text_add_up() -> None:
    texts = ["abc", "é", "a longer text, which is cut", "z"]
    tokens = in_memory(texts, Bytes())
    rows = Packed(tokens, plan(documents_of(tokens), 8)).read(np.arange(5))
    size = sum(len(text.encode()) for text in texts)
    assert rows["bytes"].sum() == size - len(texts)  # the first byte of each is not predicted


def test_a_plan_is_kept_and_a_damaged_one_made_anew(tmp_path: Path) -> None:
    documents = Pieces(np.array([0, 3, 5]), np.array([3, 2, 4]))
    made = []

    def make() -> Plan:
        made.append(1)
        return plan(documents, 5)

    def kept() -> Plan:
        return packing.kept_plan(tmp_path / "plans", "name", make)

    first, second = kept(), kept()
    assert len(made) == 1
    path = tmp_path / "plans" / "name.npz"
    path.write_bytes(path.read_bytes()[:-200])
    third = kept()
    assert len(made) == 2 and len(kept()) == len(first)
    path.write_bytes(path.read_bytes().replace(b"\x05", b"\x06"))  # a checksum is wrong
    kept()
    assert len(made) == 3
    for other in (second, third):
        assert (other.capacity, other.cut) == (first.capacity, first.cut)
        for name in ("first_R1", "starts_P", "lengths_P"):
            np.testing.assert_array_equal(getattr(other, name), getattr(first, name))
    assert [path.name for path in (tmp_path / "plans").iterdir()] == ["name.npz"]


def test_a_folder_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    documents = Pieces(np.array([0]), np.array([3]))
    assert len(packing.kept_plan(tmp_path / "file", "name", lambda: plan(documents, 5))) == 1


@pytest.mark.slow
def test_ten_million_documents_are_planned_in_seconds() -> None:
    import time

    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(5.5, 1.2, 10_000_000).astype(np.int64) + 2, 100_000)
    documents = Pieces(np.cumsum(lengths) - lengths, lengths)
    began = time.monotonic()
    planned = plan(documents, 2049)
    seconds = time.monotonic() - began
    print(f"{seconds:.1f} s, {100 * planned.fill:.3f}% full, {len(planned):,} rows")
    assert seconds < 60 and planned.fill > 0.999
