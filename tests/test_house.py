"""The house itself: imports run downhill, files and functions stay small, every public thing has
its words, and every experiment runs."""

import ast
import dataclasses
import graphlib
import importlib
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxtrain import config, weights
from jaxtrain.config import flags
from jaxtrain.models import transformer
from jaxtrain.runner import main as runner_main

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "jaxtrain").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file())
BASH = [
    path
    for path in [*SCRIPTS, ROOT / ".ci" / "run"]
    if path.read_text().startswith("#!/usr/bin/env bash") or path.name == "environment"
]
PYTHON = [
    *PACKAGE,
    *EXPERIMENTS,
    *(path for path in SCRIPTS if path not in BASH),
    *sorted((ROOT / "tests").glob("*.py")),
]
OURS = [path for path in PYTHON if path.parent.name != "tests"]
"""Everything that is not a test."""

LONGEST_LINE, LONGEST_FUNCTION, LONGEST_LOOP = 100, 80, 150
LOOPS = {"jaxtrain/train/loop.py: train", "jaxtrain/runner/run.py: _train"}
"""The one honest long function."""
FLOORS = (
    ("main", {"__init__", "__main__"}),
    ("commands", {"runner", "cli"}),
    ("use", {"inference"}),
    ("training", {"train"}),
    ("weights", {"weights"}),
    ("parts", {"models", "data", "augment", "optimizers", "checkpoints", "config"}),
    ("machine", {"precision", "parallel", "plan", "processes", "report"}),
    ("models of others", {"adapters"}),
    (
        "single files",
        {
            *("tasks", "losses", "metrics", "schedules", "fields", "horizon"),
            *(
                "tree",
                "rng",
                "hardware",
                "errors",
                "messages",
                "extras",
                "durable_files",
                "gguf_header",
                "host_memory",
            ),
            *("late_logits", "vocabulary_loss", "block_loop"),
        },
    ),
)
"""The plan of the house, highest floor first: a room imports only from floors below its own. The
single files may use one another."""
KNOW_THE_RUN = {"runner", "cli", "inference", "__init__"}
"""The only rooms above `config` that see the configuration of a whole run, besides the front door,
which passes its name on; every other one asks for the few things it needs."""
MODELS_MAY_IMPORT = {"errors", "fields", "horizon", "late_logits", "messages", "block_loop"}
STORY_WORDS = re.compile(
    r"(^|_)(born|owed|knock|guest|robbed|culprit|last_words|immortal|forgive|wish|turned|witness"
    r"|verdict|pulse)(e?s)?(?=_|$)"
)
"""Words of a story where a field has a term: state what a thing is or does (heartbeat, rendezvous,
failure, follower)."""
STORY_WORDS_LEFT: set[str] = set()
"""Names that still hold one. Add none; when one is mended, take it off."""
FORBIDDEN_IMPORTS = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "tarfile",
    "yaml",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {"extract", "extractall", "unpack_archive", "system", "popen"}


def name_of(path: Path) -> str:
    """A file as messages show it."""
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    """The dotted name of a file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE}


def parsed(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


def imports(path: Path) -> Iterator[str]:
    """Everything that a file imports, wherever the statement stands; of `from a import b` the
    module a.b, if there is one."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: write imports in full, not with dots"
            yield from (
                whole if (whole := f"{node.module}.{alias.name}") in MODULES else str(node.module)
                for alias in node.names
            )
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.args[0].value


def functions(
    tree: ast.AST, owner: ast.ClassDef | None = None
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, ast.ClassDef | None, bool]]:
    """Every function with its class, and whether it stands inside another function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, owner, False
            yield from (
                (inner, None, True)
                for inner in ast.walk(node)
                if inner is not node and isinstance(inner, ast.FunctionDef)
            )
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, node)
        elif not isinstance(node, ast.expr):
            yield from functions(node, owner)


def room_of(module: str) -> str:
    """The room of a module: the folder, or the single file, under jaxtrain/."""
    return module.split(".")[1] if "." in module else "__init__"


def rooms() -> dict[str, set[str]]:
    """What each room of the house imports of the others."""
    graph: dict[str, set[str]] = {room_of(module): set() for module in MODULES}
    for module, path in MODULES.items():
        graph[room_of(module)] |= {room_of(name) for name in imports(path) if name in MODULES}
    return {room: used - {room} for room, used in graph.items()}


def test_imports_run_downhill() -> None:
    graph = {
        module: {name for name in imports(path) if name in MODULES}
        for module, path in MODULES.items()
    }
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"imports go round in a circle: {' <- '.join(error.args[1])}")
    for module, used in graph.items():
        assert "jaxtrain" not in used, (
            f"{module}: import the file that has the name, not the package that passes it on"
        )


def test_the_plan_of_the_house(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the rooms by floors; `pytest -rP -k the_plan_of_the_house` shows them."""
    graph = {room: used for room, used in rooms().items() if room != "__init__"}
    floor = {room: number for number, (_, here) in enumerate(FLOORS) for room in here}
    assert graph.keys() <= floor.keys(), f"no floor for {graph.keys() - floor.keys()}"
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"rooms go round in a circle: {' <- '.join(error.args[1])}")
    single = len(FLOORS) - 1
    up = [
        f"{room} -> {other}"
        for room, used in graph.items()
        for other in used
        if floor[other] <= floor[room] and not floor[room] == floor[other] == single
    ]
    assert not up, f"arrows up, or between rooms of one floor: {up}"
    for name, here in FLOORS:
        print(f"{name:13} {' '.join(sorted(here & graph.keys()))}")
    arrows = sum(map(len, graph.values()))
    print(f"{len(graph)} rooms, {len(FLOORS)} floors, {arrows} arrows; up: {len(up)}, circles: 0")


def test_models_know_nothing_of_the_house() -> None:
    for module, path in MODULES.items():
        if module.startswith("jaxtrain.models"):
            ours = {
                name
                for name in imports(path)
                if name.startswith("jaxtrain") and not name.startswith("jaxtrain.models")
            }
            assert ours <= {f"jaxtrain.{name}" for name in MODELS_MAY_IMPORT}, module


def test_the_contributors_guide_has_the_floors_and_what_models_import() -> None:
    guide = " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    row = guide[guide.index("| single files |") :].partition("`scripts/test")[0]
    assert {name.rstrip("/").removesuffix(".py") for name in re.findall(r"`([^`]+)`", row)} == (
        FLOORS[-1][1]
    )
    sentence = guide[guide.index("they import `") :].partition(" only (")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == MODELS_MAY_IMPORT


def test_the_step_knows_no_file_clock_or_logger() -> None:
    assert not set(imports(MODULES["jaxtrain.train.steps"])) & {
        "logging",
        "os",
        "time",
        "sys",
        "pathlib",
        "io",
    }


def identifiers(path: Path) -> Iterator[str]:
    """Every name that a file defines: its own, its classes, functions, arguments, variables and
    attributes."""
    yield path.stem
    for node in ast.walk(parsed(path)):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.alias(asname=str(name)):
                yield name


def snake_case(name: str) -> str:
    """A name in lower case, its words joined by underscores: `HeartbeatWriter` is
    `heartbeat_writer`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def test_story_words_are_found() -> None:
    for name in ("born", "_guests", "WitnessLock", "PULSE", "last_words", "was_turned", "wishes"):
        assert STORY_WORDS.search(snake_case(name)), name
    for name in ("allowed", "followed", "narrowed", "returned", "words", "impulse", "reborn"):
        assert not STORY_WORDS.search(snake_case(name)), name


def test_names_are_terms_and_no_story() -> None:
    found = {
        f"{name_of(path)}: {name}"
        for path in OURS
        for name in identifiers(path)
        if STORY_WORDS.search(snake_case(name))
    }
    new, mended = found - STORY_WORDS_LEFT, STORY_WORDS_LEFT - found
    assert not new, f"say what it is or does, in the field's term: {sorted(new)}"
    assert not mended, f"take these off STORY_WORDS_LEFT, for they are mended: {sorted(mended)}"


def test_messages_alone_know_near_names_and_units_of_bytes() -> None:
    """Names, values and sizes are shown in one way everywhere."""
    for module, path in MODULES.items():
        if module != "jaxtrain.messages":
            assert "difflib" not in imports(path), f"{module}: use messages.nearest"
            assert '"GB"' not in path.read_text(), f"{module}: use messages.bytes_text"
            assert "def one_line" not in path.read_text(), f"{module}: use messages.one_line"
            assert "def _one_line" not in path.read_text(), f"{module}: use messages.one_line"


def test_only_the_runner_sees_the_whole_run() -> None:
    """A recipe shares the options of a step with the run, and they say nothing of a run."""
    seen = {
        room_of(module)
        for module, path in MODULES.items()
        if room_of(module) != "config"
        and any(
            name.startswith("jaxtrain.config") and name != "jaxtrain.config.step_options"
            for name in imports(path)
        )
    }
    assert seen <= KNOW_THE_RUN


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_every_file_opens_with_its_own_sentence(path: Path) -> None:
    words = (ast.get_docstring(parsed(path)) or "").split("\n\n")[0]
    assert len(words) > 20 and words.endswith((".", ":")), (
        f"{name_of(path)}: opens with {words[:40]!r}"
    )


def test_no_two_files_open_alike() -> None:
    first = [(ast.get_docstring(parsed(path)) or "").splitlines()[0] for path in PYTHON]
    assert len(set(first)) == len(first)


def test_lines_and_functions_fit_the_eye() -> None:
    found = []
    for path in PYTHON:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > LONGEST_LINE:
                found.append(f"{name_of(path)}:{number}: {len(line)} characters")
    for path in PYTHON:
        for function, _, _ in functions(parsed(path)):
            lines = (function.end_lineno or 0) - function.lineno + 1
            name = f"{name_of(path)}: {function.name}"
            limit = LONGEST_LOOP if name in LOOPS else LONGEST_FUNCTION
            if lines > limit:
                found.append(f"{name} has {lines} lines, at most {limit}")
    assert not found, "\n".join(found)


def documented() -> set[tuple[str, str]]:
    """(class, method) of every method with a docstring in the house."""
    return {
        (owner.name, function.name)
        for path in OURS
        for function, owner, _ in functions(parsed(path))
        if owner and ast.get_docstring(function)
    }


def bases() -> dict[str, set[str]]:
    """The names of all classes above each class of the house."""
    direct = {
        node.name: {ast.unparse(base).rpartition(".")[2].partition("[")[0] for base in node.bases}
        for path in OURS
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef)
    }

    def above(name: str) -> set[str]:
        # a class may bear the name of the one that it extends in another house
        own = direct.get(name, set()) - {name}
        return own.union(*(above(base) for base in own))

    return {name: above(name) for name in direct}


def test_every_public_thing_has_its_words() -> None:
    """A method that overrides a documented one needs none of its own."""
    known, parents, found = documented(), bases(), []
    for path in OURS:
        tree = parsed(path)
        for function, owner, inner in functions(tree):
            hidden = (
                inner
                or function.name.startswith("_")
                or (owner is not None and owner.name.startswith("_"))
            )
            inherits = owner is not None and any(
                (base, function.name) in known for base in parents[owner.name]
            )
            if not (hidden or inherits or ast.get_docstring(function)):
                found.append(f"{name_of(path)}:{function.lineno}: {function.name} has no docstring")
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                found.append(f"{name_of(path)}:{node.lineno}: class {node.name} has no docstring")
    assert not found, "\n".join(found)


def test_everything_is_annotated() -> None:
    found = []
    for path in OURS:
        for function, _, _ in functions(parsed(path)):
            arguments = [
                *function.args.posonlyargs,
                *function.args.args,
                *function.args.kwonlyargs,
                function.args.vararg,
                function.args.kwarg,
            ]
            bare = [
                argument.arg
                for argument in arguments
                if argument is not None and argument.annotation is None
            ]
            bare = bare[1:] if bare[:1] in (["self"], ["cls"]) else bare
            bare += ["its result"] if function.returns is None else []
            if bare:
                found.append(
                    f"{name_of(path)}:{function.lineno}: {function.name}: {', '.join(bare)} without"
                    " a type"
                )
    assert not found, "\n".join(found)


def test_every_field_of_a_run_is_read() -> None:
    """A flag that nothing reads is a promise that nobody keeps."""
    read = {
        node.attr
        for path in PACKAGE
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # Two are looked for on the command line before there is a run.
    flags_file = parsed(MODULES["jaxtrain.config.flags"])
    read |= {node.value for node in ast.walk(flags_file) if isinstance(node, ast.Constant)}
    own = {field.name for field in dataclasses.fields(config.Run)}
    assert own <= read, f"nothing reads {own - read}"


def test_doors_name_files_that_are_there() -> None:
    for path in PACKAGE:
        if path.name != "__init__.py":
            continue
        module = importlib.import_module(module_of(path))
        for name in getattr(module, "__all__", ()):
            whole = f"{module_of(path)}.{name}"
            assert whole in MODULES or hasattr(module, name), f"{name_of(path)}: no {name}"


def test_every_file_compiles() -> None:
    for path in PYTHON:
        compile(path.read_text(encoding="utf-8"), name_of(path), "exec", dont_inherit=True)
    for path in BASH:
        subprocess.run(["bash", "-n", path], check=True)


def test_nothing_read_can_run_code() -> None:
    for path in OURS:
        used = {name.partition(".")[0] for name in imports(path)} & FORBIDDEN_IMPORTS
        assert not used, f"{name_of(path)}: {used}"
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call):
                continue
            written = ast.unparse(node.func)
            allowed = (
                written not in FORBIDDEN_CALLS
                and written.rpartition(".")[2] not in FORBIDDEN_METHODS
                and "builtins" not in written
            )
            assert allowed, f"{name_of(path)}:{node.lineno}: {written}"
            for keyword in node.keywords:
                bad = keyword.arg in ("allow_pickle", "shell") and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                )
                assert not bad, f"{name_of(path)}:{node.lineno}: {keyword.arg}"


@pytest.mark.parametrize("command", [("check", "--output-format=concise"), ("format", "--check")])
def test_ruff_has_nothing_to_say(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, ROOT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_type_checker_has_nothing_to_say() -> None:
    """pyright's rules at the level `standard`, over the package and the experiments."""
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--project", ROOT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


SMALL_IMAGES = [
    "--data=synthetic",
    "--data.shape=32,32,3",
    "--data.examples=48",
    "--data.test_examples=16",
    "--data.train=train",
    "--data.validation=",
]
SMALL_TEXT = [
    "--data.path={text}",
    "--data.cache={tokens}",
    "--data.tokenizer=bytes",
    "--data.length=16",
    "--model.vocabulary=258",
    "--model.width=16",
    "--model.depth=1",
    "--model.heads=2",
]
SHRUNKEN = {
    "bert_mlm": [*SMALL_TEXT, "--task.mask_token=257"],
    "classify_text": [
        "--data.path={classes}",
        "--model.vocabulary=257",
        "--model.width=16",
        "--model.depth=1",
        "--model.heads=2",
        "--model.hidden=32",
    ],
    "digits": ["--data.train=train[:20%]", "--model.widths=8,8,8"],
    "fashion_mnist": [
        "--data.data_dir={fashion_mnist}",
        "--data.train=train[:80%]",
        "--data.validation=train[80%:]",
        "--model.widths=4,4,8,8",
    ],
    "finetune": [
        "--model.path={hugging_face}",
        "--data.path={text}",
        "--data.cache={tokens}",
        "--data.length=16",
        "--lora.rank=2",
    ],
    "gpt2_124m": [*SMALL_TEXT, "--model.padded_vocabulary=264", "--microbatches=2"],
    "imagenet_resnet50": [
        *SMALL_IMAGES,
        "--model.stages=1,1",
        "--model.width=4",
        "--model.stem_width=4",
    ],
    "imagenet_vit": [*SMALL_IMAGES, "--model.width=24", "--model.depth=1", "--model.heads=3"],
    "llama3_8b": [
        *SMALL_TEXT,
        "--model.key_heads=1",
        "--model.hidden=32",
        "--microbatches=1",
        "--schedule.warmup=1",
    ],
    "markov": [
        "--data.examples=64",
        "--data.test_examples=16",
        "--data.length=8",
        "--model.width=16",
    ],
    "mnist1d": ["--data.path={mnist1d}", "--model.widths=8,8,8"],
    "own": [
        "--data=synthetic",
        "--data.shape=8,8,1",
        "--data.examples=64",
        "--data.test_examples=16",
        "--model.widths=8,8,8",
    ],
    "shakespeare_char": [*SMALL_TEXT],
}
"""What makes each experiment small enough for a test; everything that is not here is the
experiment's own."""
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small sets of the same shape as those that an experiment finds on the disk, by the name of
    the experiment."""
    folder = tmp_path_factory.mktemp("data")
    signals = {
        "x": RANDOM.normal(size=(60, 40)),
        "y": np.arange(60) % 10,
        "x_test": RANDOM.normal(size=(20, 40)),
        "y_test": np.arange(20) % 10,
    }
    np.savez(folder / "mnist1d.npz", **signals)
    prepare = runpy.run_path(str(ROOT / "scripts" / "prepare_fashion_mnist"))
    parts = [
        bytes(head) + bytes(RANDOM.integers(0, 10, size * count, np.uint8))
        for count in (60, 20)
        for head, size in ((16, 784), (8, 1))
    ]
    prepare["build"](dict(zip(prepare["FILES"], parts, strict=True)), folder / "tfds")
    (folder / "text").mkdir()
    for number in range(40):
        words = RANDOM.choice(["to", "be", "or", "not", "that", "is"], 40)
        (folder / "text" / f"{number}.txt").write_text(" ".join(words))
        kind = folder / "classes" / ("verse" if number % 2 else "prose")
        kind.mkdir(parents=True, exist_ok=True)
        (kind / f"{number}.txt").write_text(" ".join(words))
    model = transformer.Transformer(
        257,
        16,
        1,
        2,
        norm="rms",
        bias="none",
        gated=True,
        activation="silu",
        positions="rotary",
        norm_epsilon=1e-6,
    )
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = nn.meta.unbox(model.init(jax.random.key(0), tokens))["params"]
    weights.save(folder / "hugging_face", model, params)
    return {
        "hugging_face": str(folder / "hugging_face"),
        "mnist1d": str(folder / "mnist1d.npz"),
        "fashion_mnist": str(folder / "tfds"),
        "text": str(folder / "text"),
        "classes": str(folder / "classes"),
        "tokens": str(folder / "tokens"),
    }


def test_every_experiment_has_its_small_form() -> None:
    assert {path.stem for path in EXPERIMENTS} <= SHRUNKEN.keys()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_runs_two_steps(
    path: Path, stand_ins: dict[str, str], tmp_path: Path
) -> None:
    argv = [text.format(**stand_ins) for text in SHRUNKEN[path.stem]]
    argv += [
        "--steps=2",
        "--batch_size=16",
        "--eval_batch_size=16",
        "--log_every=1",
        "--mesh=data:2",
        f"--workdir={tmp_path}",
        "--notensorboard",
        "--noreport",
    ]
    experiment = runpy.run_path(str(path))["experiment"]()
    assert experiment.name == path.stem
    assert runner_main.launch(flags.parse(experiment, argv), argv) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2]
    assert lines[-1]["split"] == "test" or experiment.data.test == ""
    assert (tmp_path / "checkpoints" / "2" / "COMMIT").is_file()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_opens_with_its_command_and_is_short(path: Path) -> None:
    words = ast.get_docstring(parsed(path)) or ""
    assert f"python experiments/{path.name}" in words
    assert len(path.read_text().splitlines()) <= 100
