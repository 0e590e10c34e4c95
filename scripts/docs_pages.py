"""MkDocs' hook for mkdocs.yml: the pages that nobody writes under docs/, and links between all of
them.

README, CONTRIBUTING and the like become pages, and every room of the package gets one, made from
its docstrings. A link to a file of the repository leads to its page; where it has none, the words
stay without a link.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "scripts/slurm/README.md": "slurm.md",
    "scripts/kubernetes/README.md": "kubernetes.md",
}
"""Files of the repository that are pages of the site."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
SINGLE_FILES = "files"


def rooms() -> dict[str, list[str]]:
    """The modules of each room, highest first: the front door, the folders, and all single files as
    one room."""
    package = ROOT / "jaxtrain"
    found = {"jaxtrain": ["jaxtrain"]}
    for folder in sorted(path.parent for path in package.glob("*/__init__.py")):
        paths = sorted(folder.rglob("*.py"), key=lambda path: (path.parent, path.stem))
        found[folder.name] = [_module(path) for path in paths]
    single = sorted(path for path in package.glob("*.py") if not path.stem.startswith("__init__"))
    return found | {SINGLE_FILES: [_module(path) for path in single]}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def reference_page(room: str, modules: list[str]) -> str:
    """The Markdown of one room; mkdocstrings fills it in. The door of a room is words only, for the
    names that it passes on follow with their own files.

    >>> print(reference_page("models", ["jaxtrain.models", "jaxtrain.models.vit"]))
    # models
    <BLANKLINE>
    ::: jaxtrain.models
        options: {members: false}
    <BLANKLINE>
    ::: jaxtrain.models.vit
    <BLANKLINE>
    """
    doors = {module.rpartition(".")[0] for module in modules}
    parts = [
        f"::: {module}\n{'    options: {members: false}' if module in doors else ''}"
        for module in modules
    ]
    return f"# {room}\n\n" + "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def relinked(text: str, source: str, page: str) -> str:
    """The text of a page with links between files of the repository turned into links between
    pages.

    >>> relinked("[data](docs/data.md), [licence](LICENSE)", "README.md", "index.md")
    '[data](data.md), licence'
    """

    def replace(match: re.Match[str]) -> str:
        bang, words, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        wanted = _page_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        if wanted is None:
            return words
        relative = posixpath.relpath(wanted, posixpath.dirname(page) or ".")
        return f"{bang}[{words}]({relative}{'#' if anchor else ''}{anchor})"

    return LINK.sub(replace, text)


def _page_of(path: str) -> str | None:
    """The page, or the file of the site, that shows a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("jaxtrain/"):
        room = path.split("/")[1]
        return f"reference/{SINGLE_FILES if room.endswith('.py') else room}.md"
    return None


def on_config(config: Any) -> Any:
    """Puts the reference at the end of the navigation."""
    config.nav.append({"Reference": [{room: f"reference/{room}.md"} for room in rooms()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages."""
    from mkdocs.structure.files import File

    made = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in PAGES.items()}
    for room, modules in rooms().items():
        made[f"reference/{room}.md"] = reference_page(room, modules)
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns the links of one page."""
    uri = page.file.src_uri
    source = next((file for file, made in PAGES.items() if made == uri), f"docs/{uri}")
    return relinked(markdown, source, uri)
