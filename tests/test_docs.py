"""The words are true: code in the guides runs, commands of the README too, flags exist, links lead
somewhere, and the notebook is its guide.

`python tests/test_docs.py` writes docs/step_as_a_library.ipynb anew from docs/step.md and runs it,
so that it holds its outputs.
"""

import ast
import contextlib
import dataclasses
import io
import math
import re
import runpy
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
import yaml

from jaxtrain import __main__ as command
from jaxtrain.config import flags
from jaxtrain.train.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
GUIDE, NOTEBOOK = ROOT / "docs" / "step.md", ROOT / "docs" / "step_as_a_library.ipynb"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
GUIDES = [
    page for page in PAGES if page != GUIDE and "```python" in page.read_text(encoding="utf-8")
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")

SHRUNKEN = {
    "--steps=100": "--steps=2",
    "--steps=300": "--steps=4",
    "--steps=1500": "--steps=6",
    "--compare_meshes=data:8,fsdp:4xtensor:2": "--compare_meshes=data:2",
    "--model=vit_ti2": "--model=vit_ti2 --model.width=12 --model.heads=3",
    "--model.depth=2": "--model.depth=1",
    "--compare_steps=3": "--compare_steps=1",
    "--workdir=L": (
        "--workdir=L --data.path=experiments/*.py --data.cache=tokens --data.validation=all[99%:]"
        " --model=decoder_tiny --model.vocabulary=257 --model.depth=1"
    ),
    "--most=200": "--most=8",
}
"""Flags of the README's trainings that are too long for a test, and what stands for them."""
SHORTER = ["--steps=4", "--batch_size=64", "--mesh=data:1", "--log_every=2"]
"""What is added to its trainings; the length only where the command says nothing of it."""
SMALLER = ["--data.train=train[:20%]", "--model.widths=8,8"]
"""What is added to those that say nothing of their model, unless they repeat a run."""
NOT_RUN = {
    "git clone": "this is the clone",
    "scripts/test": (
        "it runs this test; tests/test_setup.py tests the script itself, .ci/run runs it for real"
    ),
    "scripts/prepare_fashion_mnist": "it needs the files; tests/test_data_sources.py tests it",
    "scripts/launch_local": (
        "it makes .venv first; tests/test_supervisor.py and tests/test_group.py test what it starts"
    ),
    "python experiments/finetune.py --model.path=SmolLM2": "it needs the weights; its small form"
    " runs in tests/test_house.py",
    "python -m jaxtrain export F": "it needs that run; tests/test_pretrained.py exports one",
    "tensorboard": "it would not end",
    "pip install": "it needs the network; .ci/run does the same",
}
"""The commands that are shown but not run here, and why."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return [
        text for found, text in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language
    ]


def commands(page: Path) -> Iterator[list[str]]:
    """Every command in the bash blocks of a page, as words; comments and continued lines are
    understood."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def alike(said: str, shown: str) -> bool:
    """Whether an output is the one on the page; numbers may differ a little between machines."""
    if NUMBER.sub("#", said).split() != NUMBER.sub("#", shown).split():
        return False
    pairs = zip(NUMBER.findall(said), NUMBER.findall(shown), strict=True)
    return all(
        math.isclose(float(one), float(other), rel_tol=0.02, abs_tol=1e-6) for one, other in pairs
    )


def python_and_text(page: Path) -> Iterator[tuple[str, str | None]]:
    """Each python block of a page with the text block right after it, if there is one: its
    output."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    for index, (language, code) in enumerate(found):
        if language == "python":
            following = found[index + 1] if index + 1 < len(found) else ("", "")
            yield code, following[1] if following[0] == "text" else None


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_code_in_the_guides_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # A module of its own: dataclasses look up their annotations there.
    namespace: dict[str, Any] = {"__name__": "guide"}
    monkeypatch.setitem(sys.modules, "guide", type(sys)("guide"))
    for number, (code, shown) in enumerate(python_and_text(page)):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            compiled = compile(code, f"{page.name}, python block {number}", "exec")
            exec(compiled, namespace)  # noqa: S102
        assert shown is None or alike(said.getvalue(), shown), (
            f"{page.name}, python block {number} printed\n{said.getvalue()}"
        )


def experiment_of(words: list[str]) -> tuple[Path, list[str]] | None:
    """The experiment that a command trains, and its flags; None for other commands."""
    while words and (re.match(r"[A-Z_]+=", words[0]) or words[0] in ("do", "time", "nice")):
        words = words[1:]
    end = next(
        (
            place
            for place, word in enumerate(words)
            if word.endswith((";", "|", "&")) or word.startswith((">", "2>"))
        ),
        len(words),
    )
    words = [
        word.removesuffix(";")
        for word in words[: end + 1]
        if not re.fullmatch(r"\||&+|\d?>.*", word)
    ]
    if words and words[0] == "scripts/train":
        named = len(words) > 1 and words[1].endswith(".py")
        return ROOT / (words[1] if named else "experiments/digits.py"), words[1 + named :]
    if len(words) > 1 and words[0].endswith("python") and words[1].startswith("experiments/"):
        return ROOT / words[1], words[2:]
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_flag_on_the_page_exists(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each training command is parsed as it stands, with its values; only paths to earlier runs and
    values that the shell fills in are left out."""
    monkeypatch.setattr(flags.config, "check_paths", lambda run: None)
    for words in commands(page):
        found = experiment_of(words)
        if found is None:
            continue
        path, argv = found
        assert path.is_file(), f"{page.name}: {shlex.join(words)}: no such experiment"
        kept = [
            word
            for word in argv
            if not word.startswith(("--from_run=", "--flagfile="))
            and "$" not in word
            and word not in ("--help", "--helpfull")
        ]
        flags.parse(runpy.run_path(str(path))["experiment"](), kept)


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a command in this process, as the shell would, and returns its exit status."""
    found = experiment_of(words)
    if found is not None:
        path, argv = found
        argv = [part for word in argv for part in SHRUNKEN.get(word, word).split()]
        has_length = {"--steps", "--epochs", "--eval_only", "--from_run"} & {
            word.partition("=")[0] for word in argv
        }
        shorter = [] if "--help" in argv else SHORTER[bool(has_length) :]
        own = path.stem == "own"  # which chooses its model, and its parts of the data
        if not own and not any(
            word.startswith(("--help", "--from_run", "--model")) for word in argv
        ):
            shorter = shorter + SMALLER
        argv += [
            word
            for word in shorter
            if not any(given.startswith(word.partition("=")[0] + "=") for given in argv)
        ]
        monkeypatch.setattr(sys, "argv", [str(path), *argv])
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(path), run_name="__main__")
        return int(ending.value.code or 0)
    if words[:2] == ["python", "-c"]:
        exec(words[2], {})  # noqa: S102
        return 0
    assert words[:3] == [
        "python",
        "-m",
        "jaxtrain",
    ], f"{shlex.join(words)}: say in NOT_RUN why it is not run"
    return command.main([SHRUNKEN.get(word, word) for word in words[3:]])


def test_commands_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In order, in one folder; trainings are shrunken by the two tables above. `scripts/train` is
    taken as what it starts once .venv is there."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for words in commands(ROOT / "README.md"):
        line = shlex.join(words)
        if any(line.startswith(start) for start in NOT_RUN) or words[0] == "cd":
            continue
        assert run_command(words, monkeypatch) == 0, f"{line}\n{capfd.readouterr().err}"
        ran += 1
    assert ran >= 5
    assert (tmp_path / "W" / "report.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"https?://|mailto:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_named_in_the_text_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:jaxtrain|experiments|scripts|tests|docs)/[\w./-]+\w)`",
        page.read_text(encoding="utf-8"),
    ):
        assert name.endswith("NAME.py") or (ROOT / name).exists(), f"{page.name}: {name}"


def definitions(path: Path) -> dict[str, str]:
    """Every function of a file, methods too, with the words of its body."""
    source = path.read_text(encoding="utf-8")
    return {
        node.name: ast.get_source_segment(source, node) or ""
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tests_named_in_the_text_exist(page: Path) -> None:
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
        assert name in definitions(ROOT / file), f"{page.name}: {file}::{name}"


def test_every_option_of_a_step_is_in_its_guide() -> None:
    """The table at the end of docs/step.md has the fields of a recipe besides its three parts."""
    text = GUIDE.read_text(encoding="utf-8")
    rows = text[text.index("## All options") :].splitlines()
    cells = [row.split("|")[1] for row in rows if row.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert named == fields - {"model", "task", "optimizer"}


def test_moved_modules_are_where_the_changelog_says() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    moved = re.findall(r"^\| `(jaxtrain[\w.]*)` \| `(jaxtrain[\w.]*)` \|$", text, re.MULTILINE)
    assert len(moved) > 50
    for before, now in moved:
        assert util.find_spec(now) is not None, f"CHANGELOG: {before} is not in {now}"
        assert not (ROOT / f"{before.replace('.', '/')}.py").exists(), f"CHANGELOG: {before}"


def test_the_house_in_the_readme_is_the_house() -> None:
    """Every folder and file of the package stands in the README's plan, and nothing else does."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    plan = next(body for _, body in BLOCK.findall(text) if "jaxtrain/\n" in body)
    inside = plan[plan.index("jaxtrain/\n") : plan.index("\nscripts/")]
    named = {word for word in re.findall(r"(?<![\w.])(\w+(?:/|\.py))(?![\w.])", inside)}
    package = ROOT / "jaxtrain"
    real = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    real |= {path.name for path in package.glob("*.py") if not path.stem.startswith("__")}
    assert named - {"jaxtrain/"} == real


SITE = runpy.run_path(str(ROOT / "scripts" / "docs_pages.py"))
"""What makes the pages of the site that nobody writes."""


def test_every_page_and_every_room_is_in_the_navigation() -> None:
    config = types.SimpleNamespace(**yaml.safe_load((ROOT / "mkdocs.yml").read_text()))
    SITE["on_config"](config)

    def pages(item: Any) -> Iterator[str]:
        if isinstance(item, str):
            yield item
        else:
            for part in item.values() if isinstance(item, dict) else item:
                yield from pages(part)

    shown = list(pages(config.nav))
    package = ROOT / "jaxtrain"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")} | {"jaxtrain", "files"}
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert len(shown) == len({*shown})
    assert {*shown} == written | {*SITE["PAGES"].values()} | {
        f"reference/{room}.md" for room in rooms
    }
    modules = [module for found in SITE["rooms"]().values() for module in found]
    files = {path.relative_to(ROOT).with_suffix("") for path in package.rglob("*.py")}
    assert {*modules} | {"jaxtrain.__main__"} == {
        ".".join(path.parts).removesuffix(".__init__") for path in files
    }
    assert len(modules) == len({*modules})


def test_links_of_the_site_lead_to_its_pages() -> None:
    relinked = SITE["relinked"]
    text = (
        "[a](docs/data.md#order) ![b](docs/images/report.png) [c](jaxtrain/losses.py) [d](LICENSE)"
    )
    assert relinked(text, "README.md", "index.md") == (
        "[a](data.md#order) ![b](images/report.png) [c](reference/files.md) d"
    )
    assert relinked("[r](../README.md) [w](https://a.b)", "docs/step.md", "step.md") == (
        "[r](index.md) [w](https://a.b)"
    )
    assert relinked("[m](../jaxtrain/models/vit.py)", "docs/models.md", "models.md") == (
        "[m](reference/models.md)"
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning() -> None:
    """By `scripts/docs`, which installs its tools from the network at first."""
    done = subprocess.run(
        [ROOT / "scripts" / "docs"], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (ROOT / "build" / "docs" / "reference" / "models.html").read_text(encoding="utf-8")
    assert "jaxtrain.models.vit" in page and "&gt;&gt;&gt; " in page


def notebook_of(page: Path) -> nbformat.NotebookNode:
    """A guide as a notebook: its text as it is, its python blocks as cells, without the outputs
    that it shows."""
    cells, text = [], page.read_text(encoding="utf-8")
    for part in re.split(r"(^```(?:python|text)\n.*?^```$)", text, flags=re.MULTILINE | re.DOTALL):
        language, _, body = part.partition("\n")
        if language == "```python":
            cells.append(nbformat.v4.new_code_cell(body.removesuffix("```").strip()))
        elif language != "```text" and part.strip():
            cells.append(nbformat.v4.new_markdown_cell(part.strip()))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(
        cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}}
    )


def executed(page: Path) -> nbformat.NotebookNode:
    """The notebook of a guide with its outputs, run in a kernel of its own."""
    notebook = notebook_of(page)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    return notebook


def test_the_notebook_is_its_guide() -> None:
    kept, wanted = nbformat.read(NOTEBOOK, as_version=4), notebook_of(GUIDE)
    said = "python tests/test_docs.py writes it anew"
    assert [(cell.cell_type, cell.source) for cell in kept.cells] == [
        (cell.cell_type, cell.source) for cell in wanted.cells
    ], said


@pytest.mark.filterwarnings("default")  # of the notebook's own tools
def test_the_notebook_runs() -> None:
    notebook = executed(GUIDE)
    printed = {
        cell.source: "".join(out.get("text", "") for out in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    for code, shown in python_and_text(GUIDE):
        assert shown is None or alike(printed[code.strip()], shown), printed[code.strip()]


if __name__ == "__main__":
    made = executed(GUIDE)
    for made_cell in made.cells:
        made_cell.get("metadata", {}).pop("execution", None)  # times of this machine
    nbformat.write(made, NOTEBOOK)
    print(NOTEBOOK)
