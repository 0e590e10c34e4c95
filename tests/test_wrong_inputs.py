"""A table of wrong inputs by their sources: the arguments, the exact line, a remedy that the line
says, and what following it gives (most often nothing: it is accepted).

What flags and data alone decide is here; status 2 is theirs all. Files are those of `write_files`,
`{tmp}` is their folder. What more there is: test_bad_inputs.py (the first table of flags),
test_other_toolkits.py, test_flagfile.py, test_bad_runs.py, test_bad_data.py, test_python_values.py,
test_environment.py.
"""

import ast
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_remedies import rich_run

from jaxtrain import config
from jaxtrain.config import flags
from jaxtrain.data.sources.records import write_records
from jaxtrain.data.table import ArrayTable
from jaxtrain.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "wrong_inputs.md"
TABLE = Path(__file__).with_name("wrong_inputs.json")
RANDOM = np.random.default_rng(0)


def write_files(folder: Path) -> None:
    """Data of every kind, right and wrong."""
    pixels = RANDOM.integers(0, 256, (40, 4, 4, 1), dtype=np.uint8)
    labels = np.arange(40) % 4
    halves = {"x_test": pixels[:8], "y_test": labels[:8]}

    def save(name: str, **arrays: np.ndarray) -> None:
        np.savez(folder / f"{name}.npz", **arrays)

    save("good", x=pixels, y=labels, **halves)
    save("untested", x=pixels, y=labels)
    save("uneven", x=pixels, y=labels[:39], **halves)
    save("uneven_test", x=pixels, y=labels, x_test=pixels[:8], y_test=labels[:7])
    save("empty", x=pixels[:0], y=labels[:0], **halves)
    save("none")
    save("scalar", x=np.float32(3), y=labels, **halves)
    save("objects", x=np.array([{}] * 40, object), y=labels, **halves)
    save("complex", x=pixels.astype(complex), y=labels, **halves)
    save("names", data=pixels, target=labels)
    save("two", x=pixels, x_train=pixels, y=labels, **halves)
    save("nan", x=np.where(pixels > 250, np.nan, pixels / 255.0), y=labels, **halves)
    save("other_shape", x=pixels, y=labels, x_test=pixels[:8, :3], y_test=labels[:8])
    save("float_in_test", x=pixels, y=labels, x_test=pixels[:8] / 255.0, y_test=labels[:8])
    whole = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.npz").write_bytes(b"")
    (folder / "text.npz").write_text("x,y\n1,2\n", encoding="utf-8")
    (folder / "table.csv").write_text("x,y\n1,2\n", encoding="utf-8")
    mails = '{"text": "hello there", "label": "ham"}\n{"text": "you won", "label": "spam"}\n'
    (folder / "mails.jsonl").write_text(mails * 5, encoding="utf-8")
    (folder / "odd_mails.jsonl").write_text(f'{mails}{{"text": ""}}\n' * 5, encoding="utf-8")
    (folder / "gone.npz").symlink_to("nowhere.npz")
    (folder / "nothing").mkdir()

    def images(name: str, classes: Sequence[str], count: int = 4) -> Path:
        for split in ("train", "test"):
            for label in classes:
                (folder / name / split / label).mkdir(parents=True)
                for row in range(count):
                    image = RANDOM.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                    Image.fromarray(image).save(folder / name / split / label / f"{row}.png")
        return folder / name

    images("pictures", ["cat", "dog"])
    (images("one_empty", ["cat", "dog"]) / "train" / "mouse").mkdir()
    (images("beside", ["cat", "dog"]) / "mouse").mkdir()
    (images("corrupt", ["cat", "dog"]) / "train" / "cat" / "0.png").write_bytes(b"no image")
    (images("corrupt_test", ["cat", "dog"]) / "test" / "dog" / "1.png").write_bytes(b"")
    (folder / "loose").mkdir()
    Image.fromarray(pixels[0, :, :, 0]).save(folder / "loose" / "0.png")
    (folder / "loose_train" / "train").mkdir(parents=True)
    Image.fromarray(pixels[0, :, :, 0]).save(folder / "loose_train" / "train" / "0.png")

    table = ArrayTable({"image": pixels / np.float32(255), "label": labels}, 4)
    write_records(folder / "records", {"train": table, "test": table})
    write_records(folder / "cut_records", {"train": table, "test": table})
    for path in (folder / "cut_records").iterdir():
        if path.is_file() and path.stat().st_size > 1000:
            os.truncate(path, path.stat().st_size // 2)


def wrong(arguments: Sequence[str], run: config.Run) -> str | None:
    """What is wrong with a command line, up to the opening of its data; None if nothing is."""
    try:
        parsed = flags.parse(run, arguments)
        if any(argument.startswith("--data.path=") for argument in arguments):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                parsed.data.open()
    except UserError as error:
        return str(error)
    return None


ROWS: list[tuple[str, str, str]] = [
    tuple(row) for row in json.loads(TABLE.read_text(encoding="utf-8"))
]
"""Arguments, the line, and the arguments after the remedy; blanks separate arguments."""
RUN = rich_run()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `write_files`."""
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


# NumPy leaves a damaged .npz open when it refuses it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("row", ROWS, ids=[row[0][:70] for row in ROWS])
def test_wrong_inputs(row: tuple[str, str, str], files: Path) -> None:
    typed, line, remedy = (text.replace("{tmp}", str(files)) for text in row)
    assert wrong(typed.split(), RUN) == line  # a `UserError`, whose status is 2
    assert wrong(remedy.split(), RUN) is None


def test_the_table_holds_every_source() -> None:
    for source in ("arrays", "images", "records", "tfds"):
        assert sum(f"--data={source}" in row[0] for row in ROWS) >= 7
    assert len(ROWS) >= 230
    assert len({row[0] for row in ROWS}) == len(ROWS)
    for family in ("optimizer", "schedule", "model", "task", "augment"):
        assert sum(row[0].startswith(f"--{family}") for row in ROWS) >= 5


# --- the page


def pieces(text: str) -> list[str]:
    """A line without the marks of Markdown, cut where a value or something longer stands."""
    return re.split(r"\.\.\.|\{\w+\}", text.replace("\\", ""))


def strings(path: Path) -> list[str]:
    """All texts in a file of Python; a blank of an f-string is 0."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def sections() -> dict[str, tuple[list[str], list[str]]]:
    """Of each part of the page that names its tests: their files, and its lines."""
    found = {}
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        head, _, rows = part.partition("| Input | Message |\n|---|---|\n")
        files = re.findall(r"`(tests/test_\w+\.py)`", head)
        lines = [re.split(r"(?<!\\)\|", row)[2].strip() for row in rows.strip().split("\n")]
        if files:
            found[head.partition("\n")[0]] = (files, lines)
    return found


@pytest.mark.parametrize("name", sections())
def test_lines_of_the_page_stand_in_the_tests_that_it_names(name: str) -> None:
    """As much of each as a test matches: a piece, or twenty characters of it in a row."""
    files, lines = sections()[name]
    texts = [text.replace("\\", "") for file in files for text in strings(ROOT / file)]
    whole = "\n".join(texts)
    for line in lines:
        long = [piece for piece in pieces(line) if len(piece) >= 12] or [line]
        parts = [
            piece[start : start + 20] for piece in long for start in range(max(1, len(piece) - 19))
        ]
        assert any(part in whole for part in parts), line


ROOMS = (
    *("weights", "data/text", "inference", "tasks/picking.py", "gguf_header.py"),
    *(f"models/{name}.py" for name in ("attention", "cache", "encoder", "lora", "pretrained")),
    *(f"models/{name}.py" for name in ("token_inputs", "transformer")),
)


def refusals(path: Path) -> Iterator[tuple[int, str]]:
    """The longest text of each `UserError` that a file raises, by line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
            said = node.args[0]
            values = said.values if isinstance(said, ast.JoinedStr) else [said]
            texts = [str(each.value) for each in values if isinstance(each, ast.Constant)]
            yield node.lineno, max(texts, key=len, default="")


def test_every_refusal_of_texts_weights_and_models_has_its_line() -> None:
    page = PAGE.read_text(encoding="utf-8").replace("\\", "")
    for room in ROOMS:
        place = ROOT / "jaxtrain" / room
        for path in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            missing = [
                (line, text) for line, text in refusals(path) if text.strip(": ") not in page
            ]
            assert not missing, (path, missing)
