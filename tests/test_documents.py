"""Documents out of text files: which files, in which order, cut how; and one line for each that is
wrong, with its file and line."""

import gzip
import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from jaxtrain.data.text.documents import (
    Bad,
    Document,
    Format,
    documents,
    place,
    read_part,
    survey,
)
from jaxtrain.data.text.text_files import find_files, text_file
from jaxtrain.errors import UserError

TEXTS = ["one", "two\nlines", "drei 漢字", "\x00", " four ", "five\r\n", "\u2028"]


def write_lines(path: Path, texts: Sequence[Any], key: str = "text") -> Path:
    lines = "".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts)
    path.write_text(lines, newline="")
    return path


def write_parquet(path: Path, texts: Sequence[Any], key: str = "text", **options: Any) -> Path:
    parquet.write_table(pyarrow.table({key: texts, "id": list(range(len(texts)))}), path, **options)
    return path


def read(path: Path, **options: Any) -> list[str]:
    return [document.text for _, document in documents(str(path), **options)]


# The same texts out of every format.


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", TEXTS)
    assert read(lines) == TEXTS
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    assert read(tmp_path / "b.jsonl.gz") == TEXTS
    with pyarrow.output_stream(str(tmp_path / "c.ndjson.zst"), compression="zstd") as file:
        file.write(lines.read_bytes())
    assert read(tmp_path / "c.ndjson.zst") == TEXTS
    assert read(write_parquet(tmp_path / "d.parquet", TEXTS, row_group_size=2)) == TEXTS
    binary = pyarrow.array([text.encode() for text in TEXTS])
    assert read(write_parquet(tmp_path / "e.parquet", binary)) == TEXTS
    assert read(write_lines(tmp_path / "f.jsonl", TEXTS, "story"), key="story") == TEXTS
    (tmp_path / "g.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.read_bytes().rstrip() + b"\n\n \n")
    assert read(tmp_path / "g.jsonl") == TEXTS  # blank lines at the end are nothing
    for number, text in enumerate(TEXTS):
        if "\0" in text:
            continue  # plain text has none
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
        assert read(tmp_path / f"{number}.txt") == [text]
    (tmp_path / "h.txt").write_bytes(b"\xef\xbb\xbf" + "é".encode())
    assert read(tmp_path / "h.txt") == ["é"]


@pytest.mark.parametrize(
    ("text", "separator", "found"),
    [
        ("a\n\nb", "", [("a\n\nb", 1)]),
        ("a\n\nb\nc\n\n\n\nd\n", r"\n\n", [("a", 1), ("b\nc", 3), ("d", 8)]),
        ("a\r\n\r\nb\r\n", r"\n\n", [("a", 1), ("b", 3)]),
        ("a\n<|end|>\nb<|end|>c\n<|end|>\n", "<|end|>", [("a", 1), ("b", 3), ("c", 3)]),
        ("<|end|>a<|end|>", "<|end|>", [("a", 1)]),
        ("x\n\n  y", "\n\n", [("x", 1), ("  y", 3)]),
        ("line\nline\n", r"\n", [("line", 1), ("line", 2)]),
    ],
)
def test_separators(
    text: str, separator: str, found: list[tuple[str, int]], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(text, newline="")
    read_ = [
        (document.text, document.row)
        for _, document in documents(str(tmp_path / "a.txt"), separator=separator)
    ]
    assert read_ == found


def test_lines_longer_than_what_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["x" * length for length in (1, 50, 3, 17, 200, 1)]
    path = write_lines(tmp_path / "a.jsonl", texts)
    for chunk in (1, 7, 16, 64):
        monkeypatch.setattr("jaxtrain.data.text.documents.CHUNK", chunk)
        assert read(path) == texts


def test_parts_of_a_file_are_the_whole(tmp_path: Path) -> None:
    """Wherever it is cut, the documents and their lines are those of the file read at once."""
    texts = [f"{'word ' * (number % 7)}{number}\nx" for number in range(60)]
    files = {
        write_lines(tmp_path / "a.jsonl", texts): Format(),
        write_parquet(tmp_path / "b.parquet", texts, row_group_size=4): Format(),
    }
    (tmp_path / "c.txt").write_text("\n<|end|>\n\n".join(texts))
    files[tmp_path / "c.txt"] = Format(separator="<|end|>")
    (tmp_path / "d.txt").write_text("\n\n\n".join(texts))
    files[tmp_path / "d.txt"] = Format(separator=r"\n\n")
    for path, how in files.items():
        file = text_file(str(path))
        whole = list(read_part(file, how))
        assert [each.text for each in whole if isinstance(each, Document)] == texts
        counts = set()
        for part_bytes in (1, 50, 333, 1000, 10**6):
            found = survey(file, how, part_bytes)
            parts = [each for part in found.parts for each in read_part(file, how, part)]
            assert parts == whole, (path, part_bytes)
            counts.add(len(found.parts))
            assert found.size == path.stat().st_size
        assert 1 in counts and max(counts) >= 15, (path, counts)


def expected(text: str, separator: str) -> list[str]:
    """The documents by the words of the page: the text split, without the newlines around them;
    one that is empty stays unless it is the first or the last."""
    count = separator.count("\\n")
    newlines = "(?:\r?\n){" + str(count) + ",}"
    split = re.split(newlines, text) if count else text.split(separator)
    pieces = [piece.strip("\r\n") for piece in split]
    ends = (0, len(pieces) - 1)
    return [piece for place, piece in enumerate(pieces) if piece or place not in ends]


def test_wherever_parts_begin_a_separator_cuts_as_in_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of "-----" the first three are "---", and not those that a part would begin with."""
    draw, path = random.Random(0), tmp_path / "a.txt"
    separators = ["---", "--", "-", "-a-", "a-a-a", "aab", r"\n", r"\n\n"]
    letters = ["-a", "-ab", "-a\n", "\r\n", "a\r\n"]
    cases = [("aaaa-----bbbb---cccc", "---", 5)]
    for _ in range(600):
        text = "".join(draw.choices(draw.choice(letters), k=draw.randint(1, 40)))
        cases.append((text, draw.choice(separators), draw.choice([1, 2, 5, 8])))
    file, several = text_file(str(path)), 0
    for text, separator, part_bytes in cases:
        path.write_bytes(text.encode())
        how = Format(separator=separator)
        monkeypatch.setattr("jaxtrain.data.text.documents.CHUNK", draw.choice([1, 2, 5, 64]))
        parts = survey(file, how, part_bytes).parts
        found = [each for part in parts for each in read_part(file, how, part)]
        assert found == list(read_part(file, how)), (text, how, part_bytes)
        texts = [each.text if isinstance(each, Document) else "" for each in found]
        assert texts == expected(text, separator), (text, how, part_bytes)
        several += len(parts) > 1
    assert several > 100


# Which files.


def test_folders_and_globs_are_sorted_and_say_what_they_leave_out(tmp_path: Path) -> None:
    for name in (
        *("b.txt", "a/z.txt", "a-b.txt", "a/y.jsonl", "B.TXT", "c.jsonl.gz", "README.md"),
        *("x.png", ".hidden.txt", ".git/c.txt", "info"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*paths: str) -> list[str]:
        found = find_files([str(tmp_path / path) for path in paths])
        return [os.path.relpath(file.path, tmp_path) for file in found.files]

    sorted_ = ["B.TXT", "a/y.jsonl", "a/z.txt", "a-b.txt", "b.txt", "c.jsonl.gz"]
    assert names("") == sorted_
    left, hidden = find_files(str(tmp_path)).notes
    assert left == (
        f"{tmp_path}: 3 other files are left out (1 .md, 1 .png, 1 without an ending);"
        " to read them, name them, e.g. by a glob"
    )
    assert hidden == f"{tmp_path}: 2 hidden files are left out"
    assert names("**/*.txt") == ["a/z.txt", "a-b.txt", "b.txt"]
    assert names("b.txt", "a") == ["b.txt", "a/y.jsonl", "a/z.txt"]  # as they are named
    assert names("README.md", ".hidden.txt") == ["README.md", ".hidden.txt"]
    assert names("*.t*") == ["a-b.txt", "b.txt"]
    assert names("a*") == ["a-b.txt"]
    assert "folders are left out, e.g." in find_files(str(tmp_path / "a*")).notes[0]
    assert names("[a]") == ["a/y.jsonl", "a/z.txt"]  # a glob of folders alone
    (tmp_path / "link.txt").symlink_to(tmp_path / "info")
    assert "link.txt" in names("")  # as the hub's own cache has them


def make_wrong(folder: Path) -> None:
    """Everything that can be wrong with a path or a document."""
    (folder / "good.txt").write_text("words")
    (folder / "same.txt").hardlink_to(folder / "good.txt")
    (folder / "nowhere.txt").symlink_to(folder / "gone")
    (folder / "circle.txt").symlink_to(folder / "circle.txt")
    (folder / "empty").mkdir()
    (folder / "code").mkdir()
    (folder / "code" / "a.py").write_text("pass")
    (folder / "linked").mkdir()
    (folder / "linked" / "folder").symlink_to(folder / "code")
    os.mkfifo(folder / "pipe.txt")
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("eins\nzw\xf6lf".encode("latin-1"))
    (folder / "utf16.txt").write_text("words", encoding="utf-16")
    (folder / "nul.txt").write_bytes(b"hello\n\x00world")
    (folder / "gap.txt").write_text("a\n\n<|end|>\n<|end|>b")
    lines = {
        "key": '{"text": "a"}\n{"txt": "b", "id": 1}\n',
        "null": '{"text": "a"}\n{"text": null}\n',
        "number": '{"text": 3}\n',
        "list": '{"text": ["a"]}\n',
        "void": '{"text": "a"}\n\n{"text": "b"}\n',
        "nothing": '{"text": "a"}\n{"text": ""}\n',
        "array": '[{"text": "a"}]\n',
        "string": '"a"\n',
        "cut": '{"text": "a"}\n{"text": "b',
        "half": '{"text": "a\\ud83d"}\n',
        "none": "",
        "chats": '{"messages": []}\n',
    }
    for name, text in lines.items():
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9999)[:-20])
    (folder / "no.jsonl.gz").write_bytes(b"no gzip")
    (folder / "more.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n') + b"more")
    with pyarrow.output_stream(str(folder / "all.zst"), compression="zstd") as file:
        file.write(b'{"text": "a"}\n' * 9999)
    (folder / "cut.jsonl.zst").write_bytes((folder / "all.zst").read_bytes()[:-20])
    (folder / "no.jsonl.zst").write_bytes(b"no zstd at all")
    write_parquet(folder / "good.parquet", ["a", None, ""])
    write_parquet(folder / "numbers.parquet", [1, 2])
    write_parquet(folder / "rows.parquet", ["a"])
    (folder / "no.parquet").write_bytes(b"no Parquet")
    (folder / "in.parquet.gz").write_bytes(gzip.compress(b"no matter"))
    (folder / "cut.parquet").write_bytes((folder / "rows.parquet").read_bytes()[:-30])


WRONG: list[tuple[Sequence[str], str, dict[str, str]]] = [
    ([], "^no text given; give a file, a folder or a glob such as", {}),
    (["god.txt"], r"god.txt: no such file or folder; in .*: good.txt; did you mean it\?$", {}),
    (["*.md"], r"\*\.md: no file matches$", {}),
    (["empty"], "empty: holds no .txt, .jsonl, .ndjson, .parquet file; give files, another", {}),
    (["code"], r"file, only 1 \.py; name them by a glob, e\.g\. '.*/code/\*\*/\*\.py'$", {}),
    (["linked"], "linked/folder: is a link to a folder; name that folder itself$", {}),
    (["nowhere.txt"], "nowhere.txt: is a link to nothing$", {}),
    (["circle.txt"], "circle.txt: is a link that goes round in a circle$", {}),
    (["pipe.txt"], "pipe.txt: is no regular file$", {}),
    (["good.txt", "good.txt"], "good.txt: is the same file as .*good.txt; name it once", {}),
    (["good.txt", "same.txt"], "same.txt: is the same file as .*good.txt; name it once", {}),
    (
        ["empty.txt"],
        "empty.txt:1: is empty; mend it, or leave such documents out with bad=skip",
        {},
    ),
    (["latin.txt"], "latin.txt:2: byte 0xf6 is no UTF-8; mend it", {}),
    (["utf16.txt"], r"utf16.txt:1: byte 0xff is no UTF-8 \(UTF-16\? iconv -f UTF-16", {}),
    (
        ["nul.txt"],
        "nul.txt:2: holds NUL bytes, so it is no text; mend it, or leave such documents out",
        {},
    ),
    (
        ["chats.jsonl"],
        "has no key 'text', but 'messages'; these are conversations: --data=conv",
        {},
    ),
    (["gap.txt"], "gap.txt:4: is empty", {"separator": "<|end|>"}),
    (["key.jsonl"], r"key.jsonl:2: has no key 'text', but 'id', 'txt'; did you mean 'txt'\?;", {}),
    (["null.jsonl"], "null.jsonl:2: 'text' is null, no text", {}),
    (["number.jsonl"], "number.jsonl:1: 'text' is a number, no text", {}),
    (["list.jsonl"], "list.jsonl:1: 'text' is an array, no text", {}),
    (["void.jsonl"], "void.jsonl:2: is a blank line", {}),
    (["nothing.jsonl"], "nothing.jsonl:2: 'text' is empty", {}),
    (["array.jsonl"], r"array.jsonl: is one JSON array; write an object a line: jq -c", {}),
    (["string.jsonl"], "string.jsonl:1: is a text, not an object with the key 'text'", {}),
    (["cut.jsonl"], "cut.jsonl:2: is no JSON", {}),
    (["half.jsonl"], r"half.jsonl:1: 'text' holds half a character \(U\+D83D\)", {}),
    (["none.jsonl"], "none.jsonl:1: is empty", {}),
    (["latin.jsonl"], "latin.jsonl:2: byte 0xff is no UTF-8", {}),
    (["cut.jsonl.gz"], r"cut.jsonl.gz: is cut off \(.*\); fetch it again$", {}),
    (["no.jsonl.gz"], "no.jsonl.gz: cannot be read", {}),
    (["more.jsonl.gz"], "more.jsonl.gz: cannot be read", {}),
    (["cut.jsonl.zst"], r"cut.jsonl.zst: cannot be read \(Truncated", {}),
    (["no.jsonl.zst"], "no.jsonl.zst: cannot be read", {}),
    (["good.parquet"], "good.parquet, row 1: 'text' is null, no text", {}),
    (
        ["good.parquet"],
        r"has no column 'txt', but 'text', 'id'; did you mean 'text'\?$",
        {"key": "txt"},
    ),
    (["numbers.parquet"], "numbers.parquet: column 'text' is int64, no text$", {}),
    (["no.parquet"], r"no.parquet: is no Parquet \(.*\); fetch it again$", {}),
    (["in.parquet.gz"], "in.parquet.gz: Parquet is compressed inside; unpack this file$", {}),
    (["cut.parquet"], "cut.parquet: is no Parquet", {}),
]


@pytest.mark.parametrize(("names", "words", "options"), WRONG, ids=[row[1][:40] for row in WRONG])
def test_what_is_wrong_is_one_line(
    names: Sequence[str], words: str, options: dict[str, str], tmp_path: Path
) -> None:
    make_wrong(tmp_path)
    with pytest.raises(UserError) as caught:
        list(documents([str(tmp_path / name) for name in names], **options))
    line = str(caught.value)
    assert re.search(words, line) and "\n" not in line, line


def test_an_unreadable_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)$"):
        find_files(str(tmp_path))
    monkeypatch.undo()
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"a.txt: cannot be read \(Permission denied\)$"):
        find_files(str(tmp_path))


def test_broken_documents_are_left_out_only_by_choice(tmp_path: Path) -> None:
    make_wrong(tmp_path)
    for name, kept in {"key": ["a"], "null": ["a"], "void": ["a", "b"], "latin": ["a"]}.items():
        path = tmp_path / f"{name}.jsonl"
        assert read(path, bad="skip") == kept
        file = text_file(str(path))
        (broken,) = [each for each in read_part(file, Format()) if isinstance(each, Bad)]
        assert place(file, broken.row) == f"{path}:2"
