"""Conversations and labelled texts in the cache of tokens: made once, anew where the file, the
template or the tokenizer is another, and gone on with after a kill."""

import dataclasses
import datetime
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_token_cache import KILLING

from jaxtrain.data import Conversations, LabelledText
from jaxtrain.data.splits import Splits
from jaxtrain.data.text import (
    formats,
    token_cache,
    token_shards,
    token_workers,
    tokenizers,
)
from jaxtrain.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [(f"How {number}?", "So " * (number % 7) + f"é{number}.") for number in range(40)]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FIELDS: dict[str, Any] = {"train": "all", "validation": "", "split_seed": None, "length": 80}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few hundred bytes, so that a small file has many."""
    monkeypatch.setattr(token_cache, "_part_bytes", lambda total: 150)


def write_chats(path: Path, pairs: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_texts(path: Path, pairs: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "label": len(text) % 3, "other": len(text) % 2} for _, text in pairs]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def conversations(folder: Path, **changes: Any) -> Conversations:
    (folder / "chat.jinja").write_text(changes.pop("template", TEMPLATE))
    fields = {"path": str(folder / "rows"), "template": str(folder / "chat.jinja")}
    fields |= {"tokenizer": "bytes", "layout": "padded", "show": False}
    return Conversations(**fields | {"cache": str(folder / "cache")} | FIELDS | changes)


def labelled(folder: Path, **changes: Any) -> LabelledText:
    fields = {"path": str(folder / "rows"), "cache": str(folder / "cache"), "test": ""}
    return LabelledText(**fields | FIELDS | changes)


SOURCES = pytest.mark.parametrize(
    ("write", "source"),
    [(write_chats, conversations), (write_texts, labelled)],
    ids=["conversations", "labelled_text"],
)


def rows_of(splits: Splits) -> dict[str, np.ndarray]:
    return splits.train.read(np.arange(len(splits.train)))


def check_same(found: Splits, wanted: Splits) -> None:
    rows, others = rows_of(found), rows_of(wanted)
    assert rows.keys() == others.keys() and found.fingerprint == wanted.fingerprint
    for name, array in rows.items():
        np.testing.assert_array_equal(array, others[name], name)


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files of which parts are tokenised, as they are."""
    names: list[str] = []
    real = token_shards._tokenize

    def note(unit: token_shards.Unit, *arguments: Any, **options: Any) -> Any:
        names.append(Path(unit.file.path).name)
        return real(unit, *arguments, **options)

    monkeypatch.setattr(token_shards, "_tokenize", note)
    return names


def test_parts_hold_what_a_loop_by_hand_finds(tmp_path: Path) -> None:
    write_chats(tmp_path / "rows" / "a.jsonl", PAIRS)
    rows = rows_of(conversations(tmp_path).open())
    assert len([*(tmp_path / "cache" / "shards").glob("*.json")]) > 3
    for row, (prompt, completion) in enumerate(PAIRS):
        head, answer = f"<user>{prompt}</><assistant>".encode(), f"{completion}</>".encode()
        ids = head + answer
        assert bytes(rows["tokens"][row][: len(ids)].astype(np.uint8)) == ids
        assert not rows["tokens"][row][len(ids) :].any()
        weight = np.array([0] * len(head) + [1] * len(answer) + [0] * (81 - len(ids)))
        np.testing.assert_array_equal(rows["weight"][row], weight)
    texts = [text for _, text in PAIRS]
    for name in ("a.jsonl", "a.parquet"):
        folder = tmp_path / name
        if name == "a.jsonl":
            write_texts(folder / "rows" / name, PAIRS)
        else:
            (folder / "rows").mkdir(parents=True)
            columns = {"label": [len(text) % 3 for text in texts]}
            _write_columns(folder / "rows" / name, {"text": texts} | columns)
        rows = rows_of(labelled(folder).open())
        for row, text in enumerate(texts):
            ids = [*text.encode(), 256]
            assert rows["tokens"][row].tolist() == ids + [0] * (80 - len(ids))
            assert rows["segments"][row].sum() == len(ids) and rows["label"][row] == len(text) % 3


def _write_columns(path: Path, columns: dict[str, Any]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=3)


@SOURCES
def test_only_a_file_that_changed_is_tokenised_again(
    write: Callable[..., None], source: Callable[..., Any], tmp_path: Path, tokenized: list[str]
) -> None:
    for number in range(3):
        write(tmp_path / "rows" / f"{number}.jsonl", PAIRS[number * 10 : number * 10 + 10])
    first = source(tmp_path).open()
    assert {*tokenized} == {"0.jsonl", "1.jsonl", "2.jsonl"}
    tokenized.clear()
    check_same(source(tmp_path).open(), first)
    # how rows are cut is no part of it
    source(tmp_path, length=90, train="all[:50%]").open()
    assert not tokenized
    changed = PAIRS[11:20] + PAIRS[30:33]
    write(tmp_path / "rows" / "1.jsonl", changed)
    found = source(tmp_path).open()
    assert {*tokenized} == {"1.jsonl"}
    assert found.fingerprint != first.fingerprint
    check_same(found, source(tmp_path, cache=str(tmp_path / "anew")).open())


def test_another_template_tokenizer_or_day_makes_other_tokens(
    tmp_path: Path, tokenized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chats(tmp_path / "rows" / "a.jsonl", PAIRS[:5])
    bpe = tokenizers.train_bpe([text for pair in PAIRS for text in pair], 280)
    (tmp_path / "bpe").mkdir()
    tokenizers.save(bpe, tmp_path / "bpe")
    other = TEMPLATE.replace("</>", "<end>")
    dated = "{{ strftime_now('%Y') }}" + TEMPLATE
    first = conversations(tmp_path).open()
    for changes in ({"template": other}, {"tokenizer": str(tmp_path / "bpe")}, {"template": dated}):
        tokenized.clear()
        found = conversations(tmp_path, **changes).open()
        assert tokenized and found.fingerprint != first.fingerprint
        check_same(found, conversations(tmp_path, **changes, cache=str(tmp_path / "anew")).open())
        tokenized.clear()
        conversations(tmp_path, **changes).open()
        assert not tokenized

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> "Tomorrow":
            return cls(2999, 1, 1)

    monkeypatch.setattr(datetime, "date", Tomorrow)
    conversations(tmp_path).open()
    assert not tokenized
    conversations(tmp_path, template=dated).open()
    assert tokenized
    # a template may write special tokens, which the fingerprint of a tokenizer leaves out
    special = dataclasses.replace(bpe, special={"bos_token": "<s>"})
    assert special.fingerprint == bpe.fingerprint
    identities = [formats.Chats(TEMPLATE, dict(each.special)).identity for each in (bpe, special)]
    assert identities[0] != identities[1]


def test_another_column_or_tokenizer_makes_other_rows(tmp_path: Path, tokenized: list[str]) -> None:
    write_texts(tmp_path / "rows" / "a.jsonl", PAIRS)
    first = labelled(tmp_path).open()
    for changes in ({"label_key": "other"}, {"tokenizer": "characters"}, {"tokenizer": "bpe:270"}):
        tokenized.clear()
        found = labelled(tmp_path, **changes).open()
        assert tokenized and found.fingerprint != first.fingerprint
        tokenized.clear()
        check_same(labelled(tmp_path, **changes).open(), found)
        assert not tokenized
        check_same(found, labelled(tmp_path, **changes, cache=str(tmp_path / "anew")).open())
    learned = tokenizers.Characters.of([text for _, text in PAIRS])
    rows = rows_of(labelled(tmp_path, tokenizer="characters").open())
    text = PAIRS[6][1]
    assert rows["tokens"][6][: len(text)].tolist() == learned.encode(text).tolist()


def test_files_of_one_text_in_two_classes_keep_their_classes(tmp_path: Path) -> None:
    for label in ("ham", "spam"):
        (tmp_path / "rows" / label).mkdir(parents=True)
        (tmp_path / "rows" / label / "0.txt").write_text("the same words")
    (tmp_path / "rows" / "spam" / "1.txt").write_text("you have won")
    for _ in range(2):
        splits = labelled(tmp_path).open()
        names = splits.train.class_names
        assert [names[label] for label in rows_of(splits)["label"]] == ["ham", "spam", "spam"]


def test_rows_that_were_left_out_are_refused_once_that_is_not_said_any_more(
    tmp_path: Path,
) -> None:
    write_chats(tmp_path / "rows" / "a.jsonl", PAIRS)
    with open(tmp_path / "rows" / "a.jsonl", "a") as file:
        file.write("{\n")
    for _ in range(2):
        notes = conversations(tmp_path, bad="skip").open().notes
        assert any("a.jsonl:41 is no JSON" in note for note in notes)
        with pytest.raises(UserError, match=r"a.jsonl:41: is no JSON .*--data.bad=skip$"):
            conversations(tmp_path).open()


def test_a_row_is_named_by_its_line_though_it_lies_in_a_later_part(tmp_path: Path) -> None:
    write_chats(tmp_path / "rows" / "a.jsonl", [*PAIRS, ("x" * 90, "y")])
    with pytest.raises(UserError, match=r"a.jsonl:41 has 114 tokens; make it 113, or choose"):
        conversations(tmp_path).open()
    conversations(tmp_path, length=113).open()
    write_texts(tmp_path / "rows" / "a.jsonl", [*PAIRS, ("x", "y" * 90)])
    with pytest.raises(UserError, match=r"a.jsonl:41 has 91 tokens; raise it, or choose"):
        labelled(tmp_path).open()


CHILD = """
from pathlib import Path
import test_formats
test_formats.{source}(Path({folder!r})).open()
"""


@SOURCES
def test_what_was_killed_goes_on(
    write: Callable[..., None], source: Callable[..., Any], tmp_path: Path, tokenized: list[str]
) -> None:
    write(tmp_path / "rows" / "a.jsonl", PAIRS)
    code = KILLING.format(tests=str(ROOT / "tests"), part=150, left=7)
    code += CHILD.format(source=source.__name__, folder=str(tmp_path))
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, check=False)
    assert done.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_ino for path in (tmp_path / "cache" / "shards").glob("*.json")}
    assert len(kept) == 2  # three files a shard
    found = source(tmp_path).open()
    shards = [*(tmp_path / "cache" / "shards").glob("*.json")]
    units = {path: len(json.loads(path.read_text())["units"]) for path in shards}
    assert len(tokenized) == sum(units.values()) - sum(units[path] for path in kept)
    assert kept == {path: path.stat().st_ino for path in kept}
    check_same(found, source(tmp_path, cache=str(tmp_path / "anew")).open())


@SOURCES
def test_processes_share_the_work_and_make_the_same_bytes(
    write: Callable[..., None],
    source: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "rows" / "a.jsonl", PAIRS)
    monkeypatch.setattr(token_workers, "SMALL_BYTES", {"bytes": 0})
    shards: list[dict[str, bytes]] = []
    for processes in (1, 2):
        monkeypatch.setattr(token_cache._Work, "_processes", lambda _, count=processes: count)
        cache = tmp_path / str(processes)
        source(tmp_path, cache=str(cache)).open()
        shards.append({path.name: path.read_bytes() for path in (cache / "shards").iterdir()})
    assert len(shards[0]) > 9 and shards[0] == shards[1]


def test_a_template_that_is_none_is_said_before_any_row(tmp_path: Path) -> None:
    write_chats(tmp_path / "rows" / "a.jsonl", PAIRS[:2])
    said = f"--data.template={tmp_path}/chat.jinja: the chat template is no Jinja template: line 1"
    with pytest.raises(UserError, match=re.escape(said)):
        conversations(tmp_path, template="{% for %}", bad="skip").open()


def test_a_compressed_file_of_conversations_is_unpacked(tmp_path: Path) -> None:
    import pyarrow

    write_chats(tmp_path / "a.jsonl", PAIRS)
    (tmp_path / "rows").mkdir()
    with pyarrow.output_stream(str(tmp_path / "rows" / "a.jsonl.zst"), compression="zstd") as file:
        file.write((tmp_path / "a.jsonl").read_bytes())
    found = conversations(tmp_path).open()
    check_same(found, conversations(tmp_path, path=str(tmp_path / "a.jsonl")).open())


def test_a_format_goes_to_another_process_as_json() -> None:
    for how in (
        formats.Documents("body", "\n\n"),
        formats.Chats(TEMPLATE, {"bos_token": "<s>"}, "2026-11-28"),
        formats.LabelledTexts("a", "b", whole_files=True),
    ):
        assert formats.from_record(json.loads(json.dumps(how.record()))) == how
