"""The cache of tokens: exactly the tokens of a loop by hand, whatever is killed, changed, damaged
or done twice at once."""

import fcntl
import functools
import itertools
import json
import operator
import os
import shutil
import signal
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_documents import write_lines, write_parquet

from jaxtrain import durable_files
from jaxtrain.data.text import documents, token_cache, token_shards, tokenizers
from jaxtrain.data.text.long_text import encode_long, file_cuts, keeps_ids
from jaxtrain.data.text.protocol import Tokenizer
from jaxtrain.data.text.token_cache import Tokens, open_tokens
from jaxtrain.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
BYTES = tokenizers.Bytes()
TEXTS = [
    f"Document {number}: " + "words, words\n" * (number * 7 % 19) + "漢" for number in range(80)
]


@pytest.fixture(scope="module")
def bpe() -> tokenizers.TokenizerJson:
    return tokenizers.train_bpe(TEXTS, 300)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a few hundred bytes, so that a small corpus has many."""
    monkeypatch.setattr(token_cache, "_part_bytes", lambda total: 1500)


def write_corpus(folder: Path, texts: Sequence[str] = TEXTS) -> Path:
    """The texts in files of every kind, in order."""
    folder.mkdir(exist_ok=True)
    write_lines(folder / "0.jsonl", texts[:30])
    write_parquet(folder / "1.parquet", texts[30:50], row_group_size=3)
    for number, text in enumerate(texts[50:]):
        (folder / f"2-{number:02}.txt").write_text(text)
    return folder


def by_hand(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Document by document: what stands before, the text, what stands behind."""
    return [
        [*tokenizer.bos, *tokenizer.encode(text).tolist(), *tokenizer.eos[:1]] for text in texts
    ]


def check(tokens: Tokens, texts: Sequence[str], tokenizer: Tokenizer) -> None:
    wanted = by_hand(texts, tokenizer)
    offsets = tokens.offsets_D1
    found = [tokens.read(int(a), int(b)).tolist() for a, b in itertools.pairwise(offsets)]
    assert found == wanted
    assert tokens.read(0, len(tokens)).tolist() == functools.reduce(operator.iadd, wanted, [])
    assert tokens.bytes_D.tolist() == [len(text.encode()) for text in texts]
    assert offsets.dtype == tokens.bytes_D.dtype == np.int64
    assert all(shard.dtype == tokens.dtype for shard in tokens.shards)


def made(folder: Path) -> set[tuple[str, int]]:
    """Every shard that is kept, with the file that holds its ids."""
    return {(path.name, path.stat().st_ino) for path in (folder / "shards").glob("*.ids.npy")}


# What is in it.


@pytest.mark.usefixtures("small_shards")
def test_tokens_are_those_of_a_loop_by_hand(
    tmp_path: Path, bpe: tokenizers.TokenizerJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, cache = write_corpus(tmp_path / "texts"), tmp_path / "cache"
    for tokenizer in (BYTES, bpe, tokenizers.Characters.of(TEXTS)):
        tokens = open_tokens(str(corpus), tokenizer, cache_dir=cache)
        check(tokens, TEXTS, tokenizer)
        assert len(tokens.shards) >= 8
        with monkeypatch.context() as patch:
            patch.setattr(token_cache, "tokenize", None)  # not a token is made again
            again = open_tokens(str(corpus), tokenizer, cache_dir=cache)
        check(again, TEXTS, tokenizer)
        assert again.fingerprint == tokens.fingerprint
        assert again.modified_ns == max(path.stat().st_mtime_ns for path in corpus.iterdir())
    assert tokens.place(7) == f"{corpus}/0.jsonl:8"
    assert tokens.place(33) == f"{corpus}/1.parquet, row 3"
    assert tokens.place(79) == f"{corpus}/2-29.txt:1"
    assert tokens.notes == (
        (
            "the tokenizer characters has no token that ends a text: the 80 documents follow one"
            " another without a mark"
        ),
    )


def test_bos_and_eos_stand_around_every_document(
    tmp_path: Path, bpe: tokenizers.TokenizerJson
) -> None:
    import dataclasses

    tokenizer = dataclasses.replace(bpe, bos=(7, 8), eos=(9, 5))
    path = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    tokens = open_tokens(str(path), tokenizer, cache_dir=tmp_path / "c")
    check(tokens, ["one", "two"], tokenizer)
    assert tokens.read(0, 2).tolist() == [7, 8] and tokens.read(len(tokens) - 1, len(tokens)) == 9


def test_reads_across_shards(tmp_path: Path) -> None:
    arrays = [np.arange(a, b, dtype=np.uint16) for a, b in ((0, 3), (3, 3), (3, 9), (9, 10))]
    tokens = Tokens(tuple(arrays), np.array([0, 10]), np.array([10]), BYTES, "", None)
    for start in range(11):
        for stop in range(start, 11):
            assert tokens.read(start, stop).tolist() == list(range(start, stop))


@pytest.mark.usefixtures("small_shards")
def test_a_long_document_in_parts_has_the_ids_of_the_whole(
    tmp_path: Path, bpe: tokenizers.TokenizerJson
) -> None:
    """One file is one document, though several shards hold it."""
    text = "".join(f"{text}\n\n  x{number}\n" for number, text in enumerate(TEXTS * 2))
    assert len(text.encode()) > 20_000
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "short.txt").write_text("short")
    for tokenizer in (BYTES, bpe):
        tokens = open_tokens(str(tmp_path / "*.txt"), tokenizer, cache_dir=tmp_path / "cache")
        check(tokens, [text, "short"], tokenizer)
        assert len(tokens.shards) >= 8
        assert tokens.place(0) == f"{tmp_path}/long.txt:1"
        assert tokens.place(1) == f"{tmp_path}/short.txt:1"


def test_a_text_is_cut_only_where_no_id_changes(
    tmp_path: Path, bpe: tokenizers.TokenizerJson
) -> None:
    text = "".join(TEXTS) + "no line and no blank" * 300 + "漢字" * 900 + " \n \n\n  " * 200
    assert encode_long(bpe, text, length=700).tolist() == bpe.encode(text).tolist()
    assert not keeps_ids(bpe, "words, words\n", 3)
    (tmp_path / "a.txt").write_text(text)
    cuts = file_cuts(bpe, str(tmp_path / "a.txt"), 1000)
    parts = np.split(np.frombuffer(text.encode(), np.uint8), cuts)
    before = ["", *(part.tobytes().decode()[-1] for part in parts)]
    ids = [
        encode_long(bpe, part.tobytes().decode(), before=character).tolist()
        for part, character in zip(parts, before, strict=False)
    ]
    assert len(cuts) > 5 and functools.reduce(operator.iadd, ids, []) == bpe.encode(text).tolist()
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff")
    assert file_cuts(bpe, str(tmp_path / "a.txt"), 1000) == []


def test_no_cut_parts_a_letter_from_a_mark_that_it_is_composed_with(
    tmp_path: Path, bpe: tokenizers.TokenizerJson
) -> None:
    normalizer = {"normalizer": {"type": "NFC"}}
    composing = tokenizers.TokenizerJson(json.dumps(json.loads(bpe.text) | normalizer))
    text = "e\u0301" * 900 + "\u1112\u1161\u11ab" * 600 + "a\u0301\u0323=\u0338" * 400
    whole = composing.encode(text).tolist()
    assert whole == bpe.encode(unicodedata.normalize("NFC", text)).tolist()
    for length in (601, 602, 603, 604):
        assert encode_long(composing, text, length=length).tolist() == whole
    (tmp_path / "a.txt").write_text(text)
    for part_bytes in (1000, 1001, 1003):
        cuts = file_cuts(composing, str(tmp_path / "a.txt"), part_bytes)
        data = text.encode()
        parts = [data[a:b].decode() for a, b in itertools.pairwise([0, *cuts, len(data)])]
        ids = [
            encode_long(composing, part, before=before[-1:]).tolist()
            for before, part in itertools.pairwise(["", *parts])
        ]
        assert len(cuts) > 5 and functools.reduce(operator.iadd, ids, []) == whole
    assert not keeps_ids(composing, text, 901) and keeps_ids(composing, text, 902)


def test_a_learned_tokenizer_is_kept_with_its_corpus(tmp_path: Path) -> None:
    corpus, cache = write_corpus(tmp_path / "texts"), tmp_path / "cache"
    for spec in ("characters", "bpe:280"):
        tokens = open_tokens(str(corpus), spec, cache_dir=cache)
        check(tokens, TEXTS, tokenizers.learn(spec, TEXTS))
        assert open_tokens(str(corpus), spec, cache_dir=cache).tokenizer == tokens.tokenizer
    (corpus / "2-00.txt").write_text("ツ")
    changed = open_tokens(str(corpus), "characters", cache_dir=cache)
    texts = [*TEXTS[:50], "ツ", *TEXTS[51:]]
    check(changed, texts, tokenizers.Characters.of(texts))


# What changes.


@pytest.mark.usefixtures("small_shards")
def test_only_what_changed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, cache = write_corpus(tmp_path / "texts"), tmp_path / "cache"
    first = open_tokens(str(corpus), BYTES, cache_dir=cache)
    tokenized: list[str] = []
    tokenize = token_shards._tokenize

    def note(unit: token_shards.Unit, *arguments: Any, **options: Any) -> Any:
        tokenized.append(Path(unit.file.path).name)
        return tokenize(unit, *arguments, **options)

    monkeypatch.setattr(token_shards, "_tokenize", note)
    texts = [*TEXTS]
    texts[63] = "another text"
    status = (corpus / "2-13.txt").stat()
    (corpus / "2-13.txt").write_text(texts[63])
    changed = open_tokens(str(corpus), BYTES, cache_dir=cache)
    check(changed, texts, BYTES)
    assert tokenized == ["2-13.txt"] and changed.fingerprint != first.fingerprint
    # what no corpus needs any more is gone, what was open stays readable
    assert len(made(cache)) == len(changed.shards)
    check(first, TEXTS, BYTES)

    # of the same size and time: the system still knows that it was written to
    (corpus / "2-13.txt").write_text(texts[63].upper())
    os.utime(corpus / "2-13.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    texts[63] = texts[63].upper()
    check(open_tokens(str(corpus), BYTES, cache_dir=cache), texts, BYTES)
    assert tokenized == ["2-13.txt"] * 2

    # touched, but the same: nothing is made
    os.utime(corpus / "0.jsonl")
    check(open_tokens(str(corpus), BYTES, cache_dir=cache), texts, BYTES)
    # one more, one less, another place
    (corpus / "3.txt").write_text("new")
    check(open_tokens(str(corpus), BYTES, cache_dir=cache), [*texts, "new"], BYTES)
    assert tokenized == ["2-13.txt"] * 2 + ["3.txt"]
    (corpus / "2-00.txt").unlink()
    texts = [*texts[:50], *texts[51:], "new"]
    check(open_tokens(str(corpus), BYTES, cache_dir=cache), texts, BYTES)
    before = made(cache)
    corpus.rename(tmp_path / "elsewhere")
    moved = open_tokens(str(tmp_path / "elsewhere"), BYTES, cache_dir=cache)
    check(moved, texts, BYTES)
    assert made(cache) == before
    assert tokenized == ["2-13.txt"] * 2 + ["3.txt"]
    write_lines(tmp_path / "elsewhere" / "0.jsonl", texts[:29])
    check(
        open_tokens(str(tmp_path / "elsewhere"), BYTES, cache_dir=cache),
        [*texts[:29], *texts[30:]],
        BYTES,
    )


def test_everything_that_tokens_depend_on_is_in_their_fingerprint(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b", "other": "c d"}\n')
    (tmp_path / "a.txt").write_text("a\n\nb")
    prints = [
        open_tokens(str(path), BYTES, cache_dir=cache).fingerprint,
        open_tokens(str(path), BYTES, cache_dir=cache, key="other").fingerprint,
        open_tokens(str(path), tokenizers.Characters(" abcd"), cache_dir=cache).fingerprint,
        open_tokens(str(tmp_path / "a.txt"), BYTES, cache_dir=cache).fingerprint,
        open_tokens(str(tmp_path / "a.txt"), BYTES, cache_dir=cache, separator="\n\n").fingerprint,
    ]
    assert len({*prints}) == len(prints)
    shutil.rmtree(cache)
    assert open_tokens(str(path), BYTES, cache_dir=cache).fingerprint == prints[0]


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    read_part = documents.read_part

    def writing(*arguments: Any) -> Any:
        yield from read_part(*arguments)
        path.write_text(path.read_text() + '{"text": "three"}\n')

    with monkeypatch.context() as patch:
        patch.setattr(documents, "read_part", writing)
        with pytest.raises(UserError, match=r"a.jsonl: changed while it was read; start again"):
            open_tokens(str(path), BYTES, cache_dir=tmp_path / "cache")
    tokens = open_tokens(str(path), BYTES, cache_dir=tmp_path / "cache")
    check(tokens, ["one", "two", "three"], BYTES)


def test_a_change_in_the_tick_of_the_clock_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that stands still: size, times and all stay, and only the contents differ."""
    path = write_lines(tmp_path / "a.jsonl", ["one"])
    frozen = token_shards.identity_of(str(path))
    real = token_shards.identity_of
    monkeypatch.setattr(
        token_shards,
        "identity_of",
        lambda name: frozen if name == str(path) else real(name),
    )
    check(open_tokens(str(path), BYTES, cache_dir=tmp_path / "cache"), ["one"], BYTES)
    write_lines(path, ["two"])
    check(open_tokens(str(path), BYTES, cache_dir=tmp_path / "cache"), ["two"], BYTES)


# What is damaged.


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[:-2])
    elif how == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"")


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("how", ["cut", "changed", "gone", "empty"])
def test_damage_is_found_and_mended(how: str, tmp_path: Path) -> None:
    corpus, cache = write_corpus(tmp_path / "texts"), tmp_path / "cache"
    open_tokens(str(corpus), BYTES, cache_dir=cache)
    files = sorted((cache / "shards").iterdir())
    for kind in (".ids.npy", ".documents.npy", ".json"):
        path = next(path for path in files if path.name.endswith(kind))
        damage(path, how)
        lines: list[str] = []
        tokens = open_tokens(str(corpus), BYTES, cache_dir=cache, say=lines.append)
        check(tokens, TEXTS, BYTES)
        if kind != ".json" and how in ("cut", "changed"):
            why = "checksum mismatch" if how == "changed" else "bytes, not"
            assert len(lines) == 1 and path.name in lines[0] and why in lines[0]
            assert lines[0].endswith("; made again")
    (corpus_file,) = (cache / "corpora").glob("*.json")
    damage(corpus_file, how)
    check(open_tokens(str(corpus), BYTES, cache_dir=cache), TEXTS, BYTES)


@pytest.mark.usefixtures("small_shards")
def test_a_cache_that_was_copied_is_verified_whole(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "texts")
    open_tokens(str(corpus), BYTES, cache_dir=tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    before = made(tmp_path / "two")
    check(open_tokens(str(corpus), BYTES, cache_dir=tmp_path / "two"), TEXTS, BYTES)
    assert made(tmp_path / "two") == before


# Killed, and two at once.

KILLING = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from jaxtrain import durable_files
from jaxtrain.data.text import token_cache
token_cache._part_bytes = lambda total: {part}
left, publish = {left}, durable_files.publish
def killing(temporary, path):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    publish(temporary, path)
durable_files.publish = killing
"""
"""The beginning of a process that is killed when it would publish one file too many."""
CHILD = """
from jaxtrain.data.text.tokenizers import Bytes
token_cache.open_tokens({corpus!r}, Bytes(), cache_dir={cache!r})
print("done")
"""


def child(corpus: Path, cache: Path, left: int) -> list[str]:
    code = KILLING.format(tests=str(ROOT / "tests"), part=1500, left=left)
    code += CHILD.format(corpus=str(corpus), cache=str(cache))
    return [sys.executable, "-c", code]


@pytest.mark.usefixtures("small_shards")
def test_killed_at_any_write_it_goes_on_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "texts")
    golden = open_tokens(str(corpus), BYTES, cache_dir=tmp_path / "golden")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "golden" / "shards").iterdir()}
    writes = 3 * len(golden.shards) + 1
    for left in (0, 2, 3, writes // 2, writes - 1):
        cache = tmp_path / f"killed-{left}"
        done = subprocess.run(child(corpus, cache, left), cwd=ROOT, check=False)
        assert done.returncode == -signal.SIGKILL
        kept = {path.name for path in (cache / "shards").glob("*.json")}
        assert len(kept) == left // 3
        tokenized: list[str] = []
        make_shard = token_shards.make_shard

        def note(folder: Path, job: token_shards.Job, *rest: Any, **options: Any) -> Any:
            tokenized.append(f"{job.name}.json")  # noqa: B023 - called at once
            return make_shard(folder, job, *rest, **options)  # noqa: B023

        monkeypatch.setattr(token_shards, "make_shard", note)
        check(open_tokens(str(corpus), BYTES, cache_dir=cache), TEXTS, BYTES)
        monkeypatch.undo()
        monkeypatch.setattr(token_cache, "_part_bytes", lambda total: 1500)
        assert not kept & {*tokenized} and len(kept) + len(tokenized) == len(golden.shards)
        found = {
            path.name: path.read_bytes()
            for path in (cache / "shards").iterdir()
            if not path.name.endswith(".tmp")
        }
        assert found == wanted


@pytest.mark.usefixtures("small_shards")
def test_two_processes_at_once_make_everything_once(tmp_path: Path) -> None:
    corpus, cache = write_corpus(tmp_path / "texts"), tmp_path / "cache"
    command = child(corpus, cache, 10**6)
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [out for out, _ in outputs] == [b"done\n"] * 2, outputs
    waited = b"jaxtrain: another process tokenises this text; waiting for it\n"
    assert {err for _, err in outputs} <= {b"", waited}
    tokens = open_tokens(str(corpus), BYTES, cache_dir=cache)
    check(tokens, TEXTS, BYTES)
    assert len(made(cache)) == len(tokens.shards) and not list(cache.rglob("*.tmp"))


def test_whoever_comes_second_waits_and_says_so(tmp_path: Path) -> None:
    path, cache = write_lines(tmp_path / "a.jsonl", ["one"]), tmp_path / "cache"
    open_tokens(str(path), BYTES, cache_dir=cache)
    (lock,) = (cache / "corpora").glob("*.lock")
    write_lines(path, ["two"])
    lines: list[str] = []
    with open(lock, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def say(line: str) -> None:
            lines.append(line)
            fcntl.flock(file, fcntl.LOCK_UN)

        thread_result: list[Tokens] = []
        thread = threading.Thread(
            target=lambda: thread_result.append(
                open_tokens(str(path), BYTES, cache_dir=cache, say=say)
            )
        )
        thread.start()
        thread.join(60)
    assert lines == ["jaxtrain: another process tokenises this text; waiting for it"]
    check(thread_result[0], ["two"], BYTES)


# Where leaving out the broken would leave none, that is not advised.


@pytest.mark.parametrize(
    ("name", "texts", "said"),
    [
        ("a.txt", b"", ":1: is empty; no other document can be used: mend it, or give other files"),
        ("a.txt", b"a\n\0", ":2: holds NUL bytes, so it is no text; no other document can be used"),
        (
            "a.jsonl",
            b'{"txt": "a"}\n' * 3,
            "did you mean 'txt'?; name the key of the texts by key=",
        ),
        ("a.jsonl", b'{"body": "a"}\n' * 3, "but 'body'; take it by key=body"),
        ("a.jsonl", b'{"messages": []}\n', "these are conversations: --data=conversations reads"),
        (
            "a.jsonl",
            b'{"text": ""}\n{"text": "a\\u0000"}\n',
            ":1: 'text' is empty; mend it, or leave",
        ),
    ],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_leaving_out_is_advised_only_where_something_is_left(
    name: str, texts: bytes, said: str, tokenizer: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(texts)
    with pytest.raises(UserError) as refusal:
        open_tokens(str(tmp_path / name), tokenizer, cache_dir=tmp_path / "cache")
    assert said in str(refusal.value)
    left = "bad=skip" in str(refusal.value)
    assert left == (said.endswith("or leave"))
    if left:
        kept = open_tokens(str(tmp_path / name), tokenizer, cache_dir=tmp_path / "c", bad="skip")
        assert len(kept.offsets_D1) == 2


# Several processes.


@pytest.mark.usefixtures("small_shards")
def test_other_processes_make_the_same_shards(
    tmp_path: Path, bpe: tokenizers.TokenizerJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxtrain.data.text import token_workers

    corpus = write_corpus(tmp_path / "texts")
    alone = open_tokens(str(corpus), bpe, cache_dir=tmp_path / "one", processes=1)
    monkeypatch.setattr(token_workers, "_SMALL_BYTES", 0)
    shared = open_tokens(str(corpus), bpe, cache_dir=tmp_path / "two", processes=2)
    check(shared, TEXTS, bpe)
    assert shared.fingerprint == alone.fingerprint
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "shards").iterdir()}
        for name in ("one", "two")
    )
    assert one == two
    # an error over there is the same one line here, and nothing runs on
    (corpus / "2-29.txt").write_bytes(b"\xff")
    for processes in (1, 2):
        with pytest.raises(UserError, match=r"2-29.txt:1: byte 0xff is no UTF-8; mend it, or"):
            open_tokens(str(corpus), bpe, cache_dir=tmp_path / "two", processes=processes)


def test_a_process_that_is_lost_is_named(
    tmp_path: Path, bpe: tokenizers.TokenizerJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxtrain.data.text import token_workers

    monkeypatch.setattr(token_workers, "_SMALL_BYTES", 0)
    monkeypatch.setattr(token_cache, "_part_bytes", lambda total: 1500)
    monkeypatch.setattr(token_workers._Worker, "send", lambda self, value: self.process.kill())
    corpus = write_corpus(tmp_path / "texts")
    with pytest.raises(UserError, match=r"ended with status -9 \(-9: out of memory\?\); with proc"):
        open_tokens(str(corpus), bpe, cache_dir=tmp_path / "cache", processes=2)


# What is said.


def test_documents_that_are_left_out_are_counted(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', '{"txt": "b"}', '{"text": ""}', '{"text": "c"}', '{"txt": 1}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").touch()
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "bad": "skip"}
    for _ in range(2):  # made, and kept
        tokens = open_tokens(str(tmp_path / "?.*"), BYTES, **options)
        check(tokens, ["a", "c"], BYTES)
        (note,) = tokens.notes
        assert note.startswith("4 documents are left out, broken or empty, e.g. ")
        assert f"{tmp_path}/a.jsonl:2 has no key 'text', but 'txt'" in note
        assert f"{tmp_path}/b.txt:1 is empty" in note
    assert tokens.place(1) == f"{tmp_path}/a.jsonl:4"
    with pytest.raises(UserError, match=r"a.jsonl:2: has no key 'text'"):
        open_tokens(str(tmp_path / "?.*"), BYTES, cache_dir=tmp_path / "cache")


def test_special_tokens_in_plain_text_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<|endoftext|>two<|endoftext|>")
    tokens = open_tokens(str(tmp_path / "a.txt"), BYTES, cache_dir=tmp_path / "cache")
    assert 256 not in tokens.read(0, len(tokens) - 1)
    assert tokens.notes == (
        (
            "the texts hold <|endoftext|> 2 times, as plain text; with separator=<|endoftext|>"
            " documents end there"
        ),
    )
    tokens = open_tokens(
        str(tmp_path / "a.txt"), BYTES, cache_dir=tmp_path / "cache", separator="<|endoftext|>"
    )
    check(tokens, ["one", "two"], BYTES)
    assert tokens.notes == ()


class Broken(tokenizers.Characters):
    """One whose file does not fit: it gives an id that is none of its own."""

    name = "broken"

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        return np.array([0, 99])


def test_wrong_options_and_texts_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    path = write_lines(tmp_path / "a.jsonl", ["ab", "abc"])
    with pytest.raises(UserError, match="^bad='ignore': valid: error, skip$"):
        open_tokens(str(path), BYTES, cache_dir=cache, bad="ignore")
    with pytest.raises(UserError, match=r"a.jsonl:2: 'c' \(U\+0063\) is none of the 2 characters"):
        open_tokens(str(path), tokenizers.Characters("ab"), cache_dir=cache)
    with pytest.raises(UserError, match=r"^tokenizer 'bpe:x': needs a whole number of ids"):
        open_tokens(str(path), "bpe:x", cache_dir=cache)
    with pytest.raises(
        UserError, match=r"broken: gives id 99, which is not in its vocabulary, 0..2"
    ):
        open_tokens(str(path), Broken("abc"), cache_dir=cache)
    long = tmp_path / "long.txt"
    long.write_text("ab" * 2**20 + "c")
    with pytest.raises(UserError, match=r"long.txt(:1)?: 'c' \(U\+0063\) is none of the 2 charact"):
        open_tokens(str(long), tokenizers.Characters("ab"), cache_dir=cache)
    (tmp_path / "b.txt").touch()
    with pytest.raises(UserError, match=r"b.txt: holds no document; give a text$"):
        open_tokens(str(tmp_path / "b.txt"), BYTES, cache_dir=cache, bad="skip")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^token cache: .*file.*: Not a directory; give another"):
        open_tokens(str(path), BYTES, cache_dir=tmp_path / "file")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "new" / "shards" / "x"))

    gone = FileNotFoundError(2, "No such file or directory", str(path))
    with monkeypatch.context() as patch:
        patch.setattr(token_shards, "identity_of", lambda _: (_ for _ in ()).throw(gone))
        with pytest.raises(UserError, match=r"^\S+a.jsonl: No such file or directory$"):
            open_tokens(str(path), BYTES, cache_dir=tmp_path / "new")

    monkeypatch.setattr(durable_files, "publish", full)
    with pytest.raises(UserError, match=r"^token cache: .*x: No space left on device; give anoth"):
        open_tokens(str(path), BYTES, cache_dir=tmp_path / "new")


def test_a_kept_corpus_needs_no_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write_lines(tmp_path / "a.jsonl", ["one"]), tmp_path / "cache"
    open_tokens(str(path), BYTES, cache_dir=cache)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(durable_files, "write_json", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    os.utime(path)
    check(open_tokens(str(path), BYTES, cache_dir=cache), ["one"], BYTES)


def test_progress_is_said_of_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxtrain.data.text import token_workers

    now = [0.0]
    monkeypatch.setattr(token_workers.time, "monotonic", lambda: now[0])
    lines: list[str] = []
    progress = token_workers.Progress(40_000_000, lines.append)
    for seconds in (1.0, 4.0, 5.0, 16.0):
        now[0] = seconds
        progress(8_000_000)
    progress.finish(9_000_000)
    assert lines == [
        "jaxtrain: tokenising: 16.0 MB of 40.0 MB, 4.0 MB/s, 6 s left",
        "jaxtrain: tokenising: 32.0 MB of 40.0 MB, 2.0 MB/s, 4 s left",
        "jaxtrain: tokenised 40.0 MB into 9.0 M tokens in 16 s, 2.5 MB/s, 562 k tokens/s",
    ]


def test_nothing_of_it_imports_jax() -> None:
    code = (
        "import sys, json, jaxtrain.data.text.token_worker, jaxtrain.data.text.token_cache;"
        "print(json.dumps(sorted({'jax', 'tokenizers', 'sentencepiece', 'pyarrow', 'gguf'}"
        " & {*sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == []
