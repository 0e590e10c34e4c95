"""`python -m jaxtrain lm_eval WORKDIR|DIR --tasks=NAME,...`: a language model on the tasks of
EleutherAI's evaluation harness, or on one's own by its rules."""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain import extras, messages
from jaxtrain.cli import sample
from jaxtrain.cli.command import Command, new_file, options
from jaxtrain.errors import UserError

FLAGS = {
    "tasks": "hellaswag,arc_easy",
    "include_path": "my_tasks",
    "limit": "100",
    "num_fewshot": "5",
    "batch_size": "8",
    "chat": None,
    "out": "results.json",
    "overwrite": None,
    "checkpoint": "best",
    "tokenizer": "bytes",
}
LEAST = {"limit": 1, "num_fewshot": 0, "batch_size": 1}


def run(arguments: Sequence[str]) -> int:
    """Asks the model every question of the tasks, and prints lm_eval's table."""
    place, given = options("lm_eval", arguments, FLAGS, files=(".gguf",))
    if "tasks" not in given:
        raise UserError(f"lm_eval: needs --tasks=NAME,..., e.g. --tasks={FLAGS['tasks']}")
    numbers = {name: _number(name, given[name]) for name in LEAST if name in given}
    out = new_file("lm_eval", given, (".json",)) if "out" in given else None
    extras.require("lm_eval", "lm_eval")
    names, manager = _tasks(given)
    model, params, tokenizer, _ = sample.opened("lm_eval", place, given)
    from jaxtrain.inference.lm_eval_adapter import adapter

    lm_eval: Any = importlib.import_module("lm_eval")
    utils: Any = importlib.import_module("lm_eval.utils")
    asked = adapter(model, params, tokenizer, batch_size=numbers.pop("batch_size", 8))
    results: Any = lm_eval.simple_evaluate(
        asked,
        tasks=names,
        task_manager=manager,
        apply_chat_template="chat" in given,
        log_samples=False,
        **numbers,
    )
    print(utils.make_table(results))
    if out is not None:
        results["config"]["model"] = str(place)
        text = json.dumps(results, indent=2, default=utils.handle_non_serializable)
        out.write_text(text + "\n", encoding="utf-8")
    return 0


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < LEAST[name]:
        raise UserError(
            f"lm_eval --{name}={messages.printable(text)}: must be a whole number, at least"
            f" {LEAST[name]}"
        )
    return int(text)


def _tasks(given: Mapping[str, str]) -> tuple[list[str], Any]:
    """The names of tasks, and where lm_eval finds them; `UserError` for one that there is not."""
    folder = given.get("include_path")
    if folder is not None and not Path(folder).is_dir():
        raise UserError(
            f"lm_eval --include_path={messages.printable(folder)}: no such directory"
            f"{messages.did_you_mean_path(folder)}"
        )
    manager: Any = importlib.import_module("lm_eval.tasks").TaskManager(include_path=folder)
    names = [name for name in given["tasks"].split(",") if name]
    for name in names:
        if not manager.match_tasks([name]):
            raise UserError(
                f"lm_eval --tasks={messages.printable(name)}: no such task"
                f"{messages.did_you_mean(name, manager.all_tasks)}"
            )
    return names, manager


COMMAND = Command(
    "WORKDIR|DIR|FILE.gguf --tasks=NAME,... [--include_path=FOLDER] [--limit=100] ...",
    "a language model on lm_eval's tasks, or one's own",
    run,
    FLAGS,
)
