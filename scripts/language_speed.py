#!/usr/bin/env python3
"""How fast texts are read and written; prints a table and writes docs/benchmarks/NAME.json.

    .venv/bin/python scripts/language_speed.py text             # 3 minutes on two CPU cores
    .venv/bin/python scripts/language_speed.py sampling         # a minute for a tiny model
    .venv/bin/python scripts/language_speed.py sampling --model=SmolLM2-135M-Instruct.gguf

`text` is the way from files to batches: tokenising with one process and with one a core, planning
of packed rows, and reading of batches, beside what steps eat: that of the character model on this
machine, and of GPT-2 on eight H100 by the mark in design.md (475,000 tokens a second a card).

`sampling` draws greedily after prompts of unequal lengths: whole texts out of one dispatch, token
by token, and without a cache, where every token is one pass over the whole text. `transformers`
draws beside it, with its own cache, from the same weights in PyTorch, where that is installed; the
first texts of all are compared token for token before anything is timed. Contestants take turns.

B: prompts, T: tokens of a text
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench import OurCharacters, spread, surroundings
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxtrain import host_memory, messages, weights
from jaxtrain.data.sources.text import python_library
from jaxtrain.data.text import packing, token_cache, tokenizers
from jaxtrain.data.text.pieces import documents_of
from jaxtrain.data.text.windows import Windows
from jaxtrain.inference import sampling
from jaxtrain.models.transformer import Transformer

CARDS_EAT = 8 * 475_000
"""Tokens a second of GPT-2 124M on eight H100, by the mark for one."""
COPIES = 8
"""Of Python's own library, each with other words, so that no cache of words knows them all."""
Row = dict[str, Any]


def text(blocks: int, options: argparse.Namespace) -> list[Row]:
    """Tokens a second of every stage from files to batches."""
    with tempfile.TemporaryDirectory(prefix="jaxtrain-text-") as folder:
        corpus = Path(folder) / "corpus.jsonl"
        _write_corpus(corpus, options.copies)
        rows = [_eaten_here(blocks)]
        for spec in ("bytes", "bpe:8192", *([options.tokenizer] if options.tokenizer else [])):
            rows += _tokenised(corpus, spec, Path(folder), blocks)
        tokens = token_cache.open_tokens(
            str(corpus), "bytes", cache_dir=Path(folder) / "read", say=lambda _: None
        )
        return rows + _planned(tokens, blocks) + _read(tokens, blocks)


def _write_corpus(path: Path, copies: int) -> None:
    """JSON lines, a document for each file of Python's library in each copy."""
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for source in python_library():
                words = Path(source).read_text(encoding="utf-8", errors="replace")
                file.write(json.dumps({"text": words.replace("self", f"self{copy}")}) + "\n")


def _eaten_here(blocks: int) -> Row:
    """What the step of the character model on this machine takes in."""
    contestant = OurCharacters()
    contestant.block(20)
    batch = 12 * 64
    speeds = [batch * 100 / _seconds(lambda: contestant.block(100)) for _ in range(blocks)]
    return {"stage": "the character step here eats", "tokens_per_second": spread(speeds)}


def _tokenised(corpus: Path, spec: str, folder: Path, blocks: int) -> list[Row]:
    """Tokenising into an empty cache; a tokenizer that is learned is learned before."""
    where = folder / "learned"
    learned = token_cache.open_tokens(str(corpus), spec, cache_dir=where, say=lambda _: None)
    rows = []
    cores = len(os.sched_getaffinity(0))
    for processes in sorted({1, cores}):
        speeds, megabytes = [], []
        for _ in range(min(blocks, 3)):
            with tempfile.TemporaryDirectory(dir=folder) as empty:
                # one of its own, that remembers no words of the turn before
                fresh = tokenizers.from_record(learned.tokenizer.record())
                seconds = _seconds(
                    lambda empty=empty, fresh=fresh, processes=processes: token_cache.open_tokens(
                        str(corpus),
                        fresh,
                        cache_dir=empty,
                        processes=processes,
                        say=lambda _: None,
                    )
                )
            speeds.append(len(learned) / seconds)
            megabytes.append(corpus.stat().st_size / 1e6 / seconds)
        stage = f"tokenising, {Path(spec).name}, {processes} process{'es' * (processes > 1)}"
        rows.append(
            {
                "stage": stage,
                "tokens_per_second": spread(speeds),
                "megabytes_per_second": spread(megabytes),
            }
        )
    return rows


def _planned(tokens: token_cache.Tokens, blocks: int) -> list[Row]:
    """Best fit of all documents into rows."""
    pieces = documents_of(tokens)
    speeds = [
        pieces.tokens / _seconds(lambda: packing.plan(pieces, 1025)) for _ in range(min(blocks, 3))
    ]
    return [{"stage": "a plan of packed rows of 1,024", "tokens_per_second": spread(speeds)}]


def _read(tokens: token_cache.Tokens, blocks: int) -> list[Row]:
    """Batches of 131,072 tokens in a random order, out of the mapped files."""
    pieces = documents_of(tokens)
    tables = {
        "windows of 1,024": Windows(tokens, pieces, 1024),
        "packed rows of 1,024": packing.Packed(tokens, packing.plan(pieces, 1025)),
    }
    rows = []
    for name, table in tables.items():
        random = np.random.default_rng(0)
        draws = [random.integers(0, len(table), 128) for _ in range(50)]
        table.read(draws[0])

        def read(table: Any = table, draws: Any = draws) -> None:
            for each in draws:
                table.read(each)

        speeds = [50 * 128 * 1024 / _seconds(read) for _ in range(blocks)]
        rows.append({"stage": f"reading {name}", "tokens_per_second": spread(speeds)})
    return rows


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def sampled(blocks: int, options: argparse.Namespace) -> list[Row]:
    """New tokens a second of all texts together, each way and each number of prompts."""
    warnings.simplefilter("ignore")  # what torch and transformers say of themselves
    with tempfile.TemporaryDirectory(prefix="jaxtrain-sampling-") as folder:
        model, params = _model(options.model)
        theirs = _in_transformers(model, params, Path(folder))
        return [
            row
            for prompts in options.prompts
            for row in _ways(model, params, theirs, prompts, blocks, options.most)
        ]


def _model(path: str) -> tuple[Any, Any]:
    """A folder or file of weights, or a small Llama with random ones."""
    if path:
        return weights.load(path)[:2]
    model = Transformer(
        vocabulary=512,
        width=128,
        depth=4,
        heads=4,
        key_heads=2,
        hidden=384,
        activation="silu",
        gated=True,
        bias="none",
        norm="rms",
        norm_epsilon=1e-5,
        positions="rotary",
    )
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return model, params


def _in_transformers(model: Any, params: Any, folder: Path) -> Any:
    """The same weights as a model of theirs; None where it is not installed."""
    if not (util.find_spec("torch") and util.find_spec("transformers")):
        return None
    import transformers

    weights.save(folder, model, params)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def _ways(model: Any, params: Any, theirs: Any, count: int, blocks: int, most: int) -> list[Row]:
    """Each way to draw, in turns, for so many prompts."""
    random = np.random.default_rng(count)
    prompts = [random.integers(3, model.vocabulary, 8 + 4 * row) for row in range(count)]

    def whole() -> Any:
        return sampling.generate(model, params, prompts, most=most, temperature=0)

    def by_token() -> Any:
        drawn = sampling.stream(model, params, prompts, most=most, temperature=0)
        return list(np.stack(list(drawn), axis=1))

    ways = {"one dispatch": whole, "a token a dispatch": by_token}
    if count == 1:
        ways["without a cache"] = _without_cache(model, params, prompts[0], most)
    if theirs is not None:
        ways["transformers, its cache"] = _by_transformers(theirs, prompts, most)
    texts = {name: way() for name, way in ways.items()}
    for name, drawn in texts.items():
        for row, (mine, other) in enumerate(zip(texts["one dispatch"], drawn, strict=True)):
            if not np.array_equal(mine, other):
                raise SystemExit(f"language_speed: {name}: text {row} of {count} differs")
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(blocks):
        for name, way in ways.items():
            speeds[name].append(count * most / _seconds(way))
    asked = messages.counted(count, "prompt")
    return [
        {"stage": f"{asked}, {name}", "tokens_per_second": spread(values)}
        for name, values in speeds.items()
    ]


def _without_cache(model: Any, params: Any, prompt: np.ndarray, most: int) -> Callable[[], Any]:
    """One pass over the padded text for each token; one program for all lengths."""

    @jax.jit
    def following(params: Any, text_BT: jax.Array, end: jax.Array) -> jax.Array:
        logits_BTV = model.apply({"params": params}, text_BT)
        return jnp.argmax(logits_BTV[0, end - 1])

    def draw() -> Any:
        text_BT = np.zeros((1, len(prompt) + most), np.int32)
        text_BT[0, : len(prompt)] = prompt
        for end in range(len(prompt), len(prompt) + most):
            text_BT[0, end] = following(params, text_BT, np.int32(end))
        return [text_BT[0, len(prompt) :]]

    return draw


def _by_transformers(theirs: Any, prompts: Sequence[np.ndarray], most: int) -> Callable[[], Any]:
    """Their `generate`, greedy, of a left-padded batch, on as many threads as there are cores."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    longest = max(map(len, prompts))
    ids_BT = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask_BT[row, longest - len(prompt) :] = 1

    def draw() -> Any:
        drawn_BT = theirs.generate(
            ids_BT,
            attention_mask=mask_BT,
            do_sample=False,
            min_new_tokens=most,
            max_new_tokens=most,
            eos_token_id=None,
            pad_token_id=0,
        )
        return list(drawn_BT[:, longest:].numpy())

    return draw


def render(name: str, rows: Sequence[Row]) -> Table:
    """A line a stage: tokens a second and its quartiles; of text also the part of what eight H100
    would eat."""
    eaten = ["of 8 x H100"] if name == "text" else []
    table = Table(name, "tokens/s", "quartiles", *eaten, box=SIMPLE_HEAD)
    for row in rows:
        speed = row["tokens_per_second"]
        low, high = speed["quartiles"]
        share = [f"{speed['median'] / CARDS_EAT:.1f}x"] if eaten else []
        table.add_row(row["stage"], f"{speed['median']:,.0f}", f"{low:,.0f} - {high:,.0f}", *share)
    return table


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=("text", "sampling"), help="what to measure")
    parser.add_argument("--blocks", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--copies", type=int, default=COPIES, help="of text: its corpus")
    parser.add_argument("--tokenizer", default="", help="of text: one more, e.g. a tokenizer.json")
    parser.add_argument("--model", default="", help="of sampling: a folder or a .gguf of weights")
    parser.add_argument("--most", type=int, default=200, help="of sampling: tokens of a text")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8], help="of sampling")
    parser.add_argument("--out", type=Path, help="the JSON file (default: docs/benchmarks/...)")
    options = parser.parse_args(argv)
    host_memory.keep_freed()  # as every run and command does
    rows = (text if options.name == "text" else sampled)(options.blocks, options)
    what = Path(options.model).stem.lower() if options.model else ""
    out = options.out or (
        Path(__file__).resolve().parents[1]
        / "docs/benchmarks"
        / f"{'_'.join(filter(None, (options.name, what)))}.json"
    )
    record = surroundings(argv) | {"bench": options.name, "results": rows}
    record["command"] = " ".join(["python", "scripts/language_speed.py", *argv])
    record["versions"] |= {
        name: metadata.version(name)
        for name in ("torch", "transformers", "tokenizers")
        if util.find_spec(name)
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    Console().print(render(options.name, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
