"""Texts with classes: what their rows hold, in which split they are, and one line with file and row
for whatever is no text with a class."""

import csv
import dataclasses
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_run import start

import jaxtrain
from jaxtrain import models
from jaxtrain.cli import main as run_command
from jaxtrain.data import LabelledText
from jaxtrain.data.sources import text as text_source
from jaxtrain.errors import UserError
from jaxtrain.models import Encoder
from jaxtrain.optimizers import AdamW
from jaxtrain.runner import preflight
from jaxtrain.schedules import Constant
from jaxtrain.tasks import Classification

HAM = "see you at noon"
SPAM = "you have won"
WHOLE: dict[str, Any] = {"train": "all", "validation": "", "test": "", "split_seed": None}
"""All rows in the order of the files."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are kept beside the test's own files."""
    monkeypatch.setattr(text_source, "CACHE", str(tmp_path_factory.mktemp("cache")))


def rows_of(source: LabelledText) -> list[tuple[str, str]]:
    """Text and class of each row of the train split."""
    table = source.open().train
    rows = table.read(np.arange(len(table)))
    texts = [
        bytes(int(each) for each in row[real > 0][:-1]).decode()
        for row, real in zip(rows["tokens"], rows["segments"], strict=True)
    ]
    return [
        (text, table.class_names[label]) for text, label in zip(texts, rows["label"], strict=True)
    ]


def write(folder: Path, name: str, *rows: Any) -> str:
    """A file of such rows; a row that is a text stands there as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(folder / name)


def pair(text: Any, label: Any) -> dict[str, Any]:
    return {"text": text, "label": label}


def test_a_row_is_a_text_its_padding_and_its_class(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", pair("abc", "spam"), pair("ö", "ham"))
    splits = LabelledText(path, length=5, **WHOLE).open()
    rows = splits.train.read(np.arange(2))
    # bytes end with 256
    assert rows["tokens"].tolist() == [[97, 98, 99, 256, 0], [0xC3, 0xB6, 256, 0, 0]]
    assert rows["segments"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert rows["label"].tolist() == [1, 0] and splits.train.class_names == ("ham", "spam")
    assert {array.dtype for array in rows.values()} == {np.dtype("int32")}
    assert splits.train.num_classes == 2 and splits.notes == ()


def test_all_kinds_of_files_hold_the_same(tmp_path: Path) -> None:
    texts = [(HAM, "ham"), ('with "quotes", a comma\nand a line', "spam"), ("ende ö", "ham")]
    want = sorted(texts)
    lines = "".join(json.dumps(pair(*each)) + "\n" for each in texts)
    cells = 'label,id,text\nham,1,see you at noon\nspam,2,"with ""quotes"", a comma\nand a line"\n'
    cells += "ham,3,ende ö\n"
    tabs = 'text\tlabel\nsee you at noon\tham\n"with ""quotes"", a comma\nand a line"\tspam\n'
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.csv").write_text("\ufeff" + cells, encoding="utf-8")
    (tmp_path / "a.tsv").write_text(f"{tabs}ende ö\tham\n", encoding="utf-8")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(cells.encode()))
    folder = tmp_path / "folder"
    for number, (text, label) in enumerate(texts):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "ham" / "0.json").write_text("{}")
    for path in ("a.jsonl", "a.csv", "a.tsv", "b.csv.gz", "a.j*", "folder"):
        source = LabelledText(str(tmp_path / path), **WHOLE)
        if path == "folder":  # .json is as good as .jsonl
            with pytest.raises(UserError, match=r"folder/ham/0.json:1: has no 'text', but none"):
                source.open()
            (folder / "ham" / "0.json").rename(folder / "ham" / "0.xml")
            assert "1 other file is left out" in source.open().notes[0]
        assert sorted(rows_of(source)) == want, path


def test_a_column_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    table = pyarrow.table({"body": [HAM, SPAM], "kind": pyarrow.array([3, 1], "int64")})
    parquet.write_table(table, tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    named = LabelledText(path, text_key="body", label_key="kind", **WHOLE)
    assert rows_of(named) == [(HAM, "3"), (SPAM, "1")]
    with pytest.raises(UserError, match=r"no column 'text', but 'body', 'kind'"):
        LabelledText(path, **WHOLE).open()
    with pytest.raises(UserError, match=r"no column 'kid', .*'kind'\?; name it by --data.label_k"):
        LabelledText(path, text_key="body", label_key="kid", **WHOLE).open()


def test_splits_are_what_files_and_folders_are_called(tmp_path: Path) -> None:
    for name, count in (("train.0", 4), ("train.1", 2), ("dev", 3), ("test", 2)):
        rows = [pair(f"{name} {row}", "ab"[row % 2]) for row in range(count)]
        write(tmp_path, f"{name}.jsonl", *rows)
    asked = LabelledText(str(tmp_path), train="train", validation="validation", test="test")
    splits = asked.open()
    assert (len(splits.train), len(splits.validation or ()), len(splits.test or ())) == (6, 3, 2)
    with pytest.raises(
        UserError, match=r"--data.train='all\[:80%\]': unknown split 'all'; valid: "
    ):
        LabelledText(str(tmp_path)).open()
    write(tmp_path, "more.jsonl", pair("a", "b"))
    with pytest.raises(
        UserError, match=r"dev.jsonl is of a split, more.jsonl of none; name all of"
    ):
        asked.open()


def test_rows_are_counted_in_one_random_order(tmp_path: Path) -> None:
    rows = [pair(f"text {row}", "ab"[row >= 50]) for row in range(100)]
    path = write(tmp_path, "a.jsonl", *rows)
    source = LabelledText(path, length=16)
    first, again = source.open(), source.open()
    assert first.fingerprint == again.fingerprint and first.notes == ()
    shares = [float(part.arrays["label"].mean()) for part in (first.train, first.test)]
    assert len(first.train) == 80 and all(0.2 < share < 0.8 for share in shares)
    assert LabelledText(path, length=16, split_seed=1).open().fingerprint != first.fingerprint
    in_order = LabelledText(path, length=16, split_seed=None).open()
    assert "--data.test=all[90%:] holds 1 of 2 classes" in " ".join(in_order.notes)
    assert in_order.train.tokenizer.vocabulary == 257


def test_texts_that_are_too_long_are_cut_only_if_that_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", pair("abcdef", "x"), pair("abc", "y"), pair("abcd", "x"))
    with pytest.raises(UserError) as refusal:
        LabelledText(path, length=5, **WHOLE).open()
    assert str(refusal.value) == (
        f"--data.length=5: {path}:1 has 7 tokens; raise it, or choose --data.too_long=cut or skip"
    )
    cut = LabelledText(path, length=5, too_long="cut", **WHOLE)
    assert [text for text, _ in rows_of(cut)] == ["abcd", "abc", "abcd"]
    assert cut.open().notes == ("1 text (33%) is longer than 5 tokens and is cut",)
    skip = LabelledText(path, length=5, too_long="skip", **WHOLE)
    assert [text for text, _ in rows_of(skip)] == ["abc", "abcd"]
    assert skip.open().notes == ("1 text (33%) is longer than 5 tokens and is left out",)


def test_classes_are_whole_numbers_in_their_order_or_names_as_given(tmp_path: Path) -> None:
    rows = [pair(f"t{number}", number) for number in (10, 2, -1, 10)]
    path = write(tmp_path, "a.jsonl", *rows)
    table = LabelledText(path, **WHOLE).open().train
    assert table.class_names == ("-1", "2", "10")
    assert table.read(np.arange(4))["label"].tolist() == [2, 1, 0, 2]
    given = LabelledText(path, classes=("10", "2", "-1", "7"), **WHOLE).open().train
    assert given.num_classes == 4 and given.read(np.arange(4))["label"].tolist() == [0, 1, 2, 0]
    truth = write(tmp_path, "b.jsonl", pair("a", True), pair("b", False))
    assert rows_of(LabelledText(truth, **WHOLE)) == [("a", "true"), ("b", "false")]


def test_the_tokenizers_own_tokens_stand_around_a_text(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = {word: number for number, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    path = write(tmp_path, "a.jsonl", pair("a b", "x"), pair("a a a a", "y"))
    asked = {"tokenizer": str(tmp_path / "tokenizer.json"), "too_long": "cut", **WHOLE}
    rows = LabelledText(path, length=5, **asked).open().train.read(np.arange(2))
    assert rows["tokens"].tolist() == [[1, 4, 3, 2, 0], [1, 4, 4, 4, 2]]
    with pytest.raises(UserError, match=r"--data.length=2: the tokenizer puts 2 tokens around a t"):
        LabelledText(path, length=2, **asked).open()


def test_held_out_texts_that_are_in_train_are_said(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", pair("a", "x"), pair("b", "y"), pair("c", "x"))
    write(tmp_path, "test.jsonl", pair("a", "x"), pair("d", "z"))
    asked = LabelledText(str(tmp_path), train="train", validation="", test="test")
    assert asked.open().notes == (
        "1 of the 2 texts of test in train, too",
        "class 'z' of test has no text in train",
    )


MEND = "; no other row can be used: mend it, or give other files"
WRONG: list[tuple[str, list[Any], str]] = [
    ("a.jsonl", [{"txt": "a", "label": 1}], "{path}:1: has no 'text', but 'txt', 'label'; did"),
    ("a.jsonl", [pair("a", 1), {"text": "b"}], "{path}:2: has no 'label', but 'text'"),
    ("a.jsonl", [pair(3, 1)], "{path}:1: 'text' is a int, no text" + MEND),
    ("a.jsonl", [pair(" ", 1)], "{path}:1: 'text' is empty" + MEND),
    ("a.jsonl", [pair("a", "")], "{path}:1: 'label' is empty" + MEND),
    ("a.jsonl", [pair("a", None)], "{path}:1: 'label' is null, no class: a class is a text or a"),
    ("a.jsonl", [pair("a", 0.5)], "{path}:1: 'label' is a float (0.5), no class: a class is a te"),
    ("a.jsonl", [pair("a", [1, 0])], "{path}:1: 'label' is a list ([1, 0]), no class: a class is"),
    ("a.jsonl", ["{"], "{path}:1: is no JSON (Expecting property name"),
    (
        "a.jsonl",
        ["[1]"],
        "{path}:1: is one JSON array, not an object with 'text' and 'label' (jq -c '.[]' takes one",
    ),
    (
        "a.json",
        ["[", "{}", "]"],
        "{path}:1: is no JSON (Expecting value: line 1 column 2 (char 1))",
    ),
    ("a.jsonl", ["3"], "{path}:1: is a JSON int, not an object with 'text' and 'label'"),
    ("a.jsonl", [pair("a\ud83d", 1)], "{path}:1: holds half a character (U+D83D)" + MEND),
    ("a.csv", ["text,label", "a,\0"], "{path}:2: holds NUL bytes, so it is no CSV; give another"),
    (
        "a.jsonl",
        [pair("a", 1), pair(" ", 1)],
        "{path}:2: 'text' is empty; mend it, or leave such rows out with --data.bad=skip",
    ),
    ("a.csv", ["text,label,text", "a,b,c"], "{path}: has 2 columns 'text'; rename one"),
    ("a.jsonl", [], "--data.path='{path}': holds no text with a class; give other files"),
    ("a.csv", ["a,b", "1,2"], "{path}: has no column 'text', but 'a', 'b'; name it by --data.text"),
    ("a.csv", ["text;label", "a;b"], "{path}: has no column 'text', but 'text;label'"),
    ("a.csv", ["text,label", "a, b,c"], "{path}:2: has 3 cells, the first line 2; a text that ho"),
    ("a.csv", ["text,label", '"a,b'], "{path}:2: is no CSV (unexpected end of data)"),
    ("a.txt", ["words"], "{path}: is no CSV (.csv, .tsv), JSON lines (.jsonl) or Parquet, so noth"),
    (
        "a.jsonl",
        [pair("a", "x"), pair("b", "x")],
        "--data.label_key=label: every label is 'x', so there is nothing to tell apart; give",
    ),
    (
        "a.jsonl",
        [pair(f"text {row}", f"id {row}") for row in range(20)],
        "--data.label_key=label: 20 different labels in 20 texts are no classes, e.g. 'id 0'; name",
    ),
    (
        "a.jsonl",
        [pair("a", "Spam"), pair("b", "spam "), pair("c", "ham")],
        "--data.label_key=label: 'Spam' and 'spam ' differ by spaces or capitals only; write them",
    ),
]


@pytest.mark.parametrize(("name", "rows", "said"), WRONG)
def test_what_is_no_text_with_a_class_is_one_line(
    name: str, rows: list[Any], said: str, tmp_path: Path
) -> None:
    path = write(tmp_path, name, *rows)
    with pytest.raises(UserError) as refusal:
        LabelledText(path, **WHOLE).open()
    assert str(refusal.value).startswith(said.format(path=path)), refusal.value
    assert "\n" not in str(refusal.value)


def test_remedies_are_taken(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", pair("a", "x"), pair("", "x"), pair("b", "y"), "{")
    found = LabelledText(path, bad="skip", **WHOLE)
    assert rows_of(found) == [("a", "x"), ("b", "y")]
    assert found.open().notes == (
        f"2 rows are left out, broken or empty, e.g. {path}:2 'text' is empty, {path}:4 is no JSON",
    )
    bad = write(tmp_path, "bad.jsonl", pair("", "x"))
    with pytest.raises(UserError, match=r"class \(1 row left out\); give other files"):
        LabelledText(bad, bad="skip", **WHOLE).open()
    odd = write(tmp_path, "odd.jsonl", pair("a", "Spam"), pair("b", "spam"))
    both = LabelledText(odd, classes=("Spam", "spam"), **WHOLE)
    assert rows_of(both) == [("a", "Spam"), ("b", "spam")]
    with pytest.raises(UserError, match=re.escape("odd.jsonl:2: 'spam' is no class; valid: Spam")):
        LabelledText(odd, classes=("Spam",), **WHOLE).open()
    with pytest.raises(UserError, match=r"--data.classes=a,a: names a class twice; drop one"):
        LabelledText(odd, classes=("a", "a"), **WHOLE).open()
    latin = tmp_path / "latin.csv"
    latin.write_bytes(b"text,label\nsch\xf6n,x\n")
    with pytest.raises(UserError, match=r"latin.csv:2: byte 0xf6 is no UTF-8; iconv -f LATIN1"):
        LabelledText(str(latin), **WHOLE).open()
    for path, said in {
        "": "--data.path='': no file given; give CSV, JSON lines or Parquet",
        str(tmp_path / "nowhere"): "nowhere: no such file or folder",
    }.items():
        with pytest.raises(UserError, match=said):
            LabelledText(path, **WHOLE).open()
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "a.txt").write_text("words")
    with pytest.raises(UserError, match=r"holds neither .* files nor a folder of .txt files for"):
        LabelledText(str(tmp_path / "loose"), **WHOLE).open()
    (tmp_path / "split" / "train").mkdir(parents=True)
    (tmp_path / "split" / "train" / "a.txt").write_text("words")
    with pytest.raises(UserError, match=r"train/a.txt: lies in no folder of a class; put it into"):
        LabelledText(str(tmp_path / "split"), **WHOLE).open()
    (tmp_path / "empty" / "x").mkdir(parents=True)
    (tmp_path / "empty" / "x" / "a.txt").touch()
    with pytest.raises(UserError, match=r"x/a.txt:1: is empty; no other row can be"):
        LabelledText(str(tmp_path / "empty"), **WHOLE).open()


def test_a_tokenizer_with_far_fewer_ids_than_the_stored_model_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", pair("a", "x"), pair("b", "y"))
    train = LabelledText(path, **WHOLE).open().train
    run = jaxtrain.Run(
        name="a",
        model=Encoder(vocabulary=30522),
        data=LabelledText(path),
        task=Classification(),
        optimizer=AdamW(),
        schedule=Constant(),
        steps=1,
        init_from="minilm",
    )
    [note] = preflight.token_notes(run, train)
    assert note.startswith(
        "the data's tokenizer (bytes) has 257 ids, the stored model 30522: is it"
    )
    [note] = preflight.token_notes(dataclasses.replace(run, init_from=""), train)
    assert note.startswith(
        "the data's tokenizer (bytes) has 257 ids, the new model 30522 embeddings, all random:"
    )
    assert note.endswith("--model.vocabulary=257 is enough for a new one")
    enough = dataclasses.replace(run, init_from="", model=Encoder(vocabulary=257))
    assert preflight.token_notes(enough, train) == []
    same = dataclasses.replace(run, model=Encoder(vocabulary=258))
    assert preflight.token_notes(same, train) == []


def test_a_tokenizer_with_more_ids_than_the_model_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "a.jsonl", *(pair(f"t {row}", row % 2) for row in range(20)))
    model = Encoder(vocabulary=99, width=8, depth=1, heads=2, head="classes", max_length=16)
    changes = {
        "model": model,
        "data": LabelledText(length=16),
        "task": Classification(input="tokens=tokens,segments=segments"),
        "augment": None,
        "optimizer": AdamW(),
        "steps": 1,
        "batch_size": 4,
        "report": False,
        "offers": {"model": models.NAMES | {"bytes_257": model.clone(vocabulary=257)}},
    }
    assert start(tmp_path / "run", f"--data.path={path}", **changes) == 2
    said = capsys.readouterr().err
    assert "--model.vocabulary=99: the data's tokenizer has 257 ids; give --data.tokenizer=" in said
    assert ", or choose --model=bytes_257, with as many\n" in said


TINY = Encoder(
    vocabulary=257, width=8, depth=1, heads=2, head="classes", pool="mean", max_length=16
)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step on texts of few letters."""
    folder = tmp_path_factory.mktemp("classifier")
    rows = [pair(f"{'abcd'[row % 4]} {row}", "ham" if row % 2 else "spam") for row in range(20)]
    changes = {
        "model": TINY,
        "data": LabelledText(write(folder, "a.jsonl", *rows), length=16, cache=str(folder / "c")),
        "task": Classification(input="tokens=tokens,segments=segments"),
        "augment": None,
        "optimizer": AdamW(),
        "steps": 1,
        "batch_size": 4,
        "report": False,
        "offers": {},
    }
    assert start(folder / "run", **changes) == 0
    return folder / "run"


def test_a_classifier_reads_new_texts_as_it_was_trained(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of letters that training never saw, without labels, and in the order of the file."""
    texts = ["zzz ☃", "b 3", "xyz"]
    (tmp_path / "mood.csv").write_text("number,text\n" + "".join(f"1,{one}\n" for one in texts))
    command = ["predict", str(classifier), f"--data.path={tmp_path / 'mood.csv'}"]
    assert run_command([*command, f"--out={tmp_path / 'p.csv'}"]) == 0
    shown = capsys.readouterr()
    assert "3 texts -> " in shown.out and "warning" not in shown.err
    with open(tmp_path / "p.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["filename"].rpartition(":")[2] for row in found] == ["2", "3", "4"]
    trained = jaxtrain.load(classifier)
    for text, row in zip(texts, found, strict=True):
        ids = [*text.encode(), 256]
        logits = trained.model.apply({"params": trained.params}, np.array([ids], np.int32))
        got = [float(row["logits_0"]), float(row["logits_1"])]
        np.testing.assert_allclose(got, np.asarray(logits)[0], atol=1e-5)
        assert row["class"] == ("ham", "spam")[int(np.argmax(got))]


def test_new_texts_that_cannot_be_are_one_line(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "text\n" + "a" * 30 + "\n": "a.csv:2: has 31 tokens, the run's rows have 16; shorten it",
        'text\nab\n""\n': "a.csv:3: 'text' is empty; mend the row, or remove it",
        "text\n": "a.csv: holds no text; give a file with rows",
        "words\nab\n": "a.csv: has no column 'text', but 'words'",
    }
    path, out = tmp_path / "a.csv", tmp_path / "p.csv"
    command = ["predict", str(classifier), f"--data.path={path}", f"--out={out}"]
    for text, message in rows.items():
        path.write_text(text)
        assert run_command(command) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    path.write_text("text\nab\n")
    assert run_command([*command, "--data.split=test"]) == 2
    assert "--data.split=test: texts of a file are all taken; drop it" in capsys.readouterr().err
    kept = classifier / "jaxtrain_tokenizer.json"
    kept.rename(tmp_path / "kept")
    assert run_command(command) == 2
    assert "holds texts, and the run kept no tokenizer (an older" in capsys.readouterr().err
    (tmp_path / "kept").rename(kept)
    assert run_command(command) == 0
    with pytest.raises(UserError, match=r"the model knows tokens 0\.\.256; encode the text by the"):
        jaxtrain.load(classifier).predict(
            {"tokens": np.full((1, 16), 300, np.int32), "segments": np.ones((1, 16), np.int32)}
        )


def test_export_of_a_classifier_names_what_works(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(classifier)]
    assert run_command([*command, "--format=hugging_face", f"--to={tmp_path / 'hf'}"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("; write a file: --out=FILE.safetensors without --format\n"), said
    assert not (tmp_path / "hf").exists()
    assert run_command([*command, f"--out={tmp_path / 'w.safetensors'}"]) == 0  # the remedy
    assert run_command(["sample", str(classifier), "--prompt=a"]) == 2
    shown = capsys.readouterr()
    assert "its model is Encoder, which says no texts; give a run that trained" in shown.err
    assert shown.err.count("\n") == 1 and "a" not in shown.out.splitlines()
