#!/usr/bin/env python3
"""What the steps of large language models hold, send and run on many cards that are not here.

    .venv/bin/python scripts/large_programs.py                      # 20 minutes on two CPU cores
    .venv/bin/python scripts/large_programs.py --only=decoder --out=/tmp/programs

It needs the extra `plan`, which brings cuDNN for the attention of H100s. It writes
docs/benchmarks/large_programs.json, and the table of docs/scaling.md between its two marks.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxtrain.plan import gpu_target

gpu_target.prepare()  # before jax looks for its plugins

import jax
import jax.numpy as jnp

from jaxtrain import tree
from jaxtrain.models import sizes
from jaxtrain.models.transformer import Transformer
from jaxtrain.optimizers import AdamW
from jaxtrain.parallel import mesh as meshes
from jaxtrain.plan import buffers, collectives
from jaxtrain.tasks import NextToken
from jaxtrain.train import lowering
from jaxtrain.train.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
MARKS = ("<!-- programs: begin -->", "<!-- programs: end -->")
PACKAGES = ("jax", "jaxlib", "nvidia-cuda-nvcc-cu12", "nvidia-cudnn-cu12")
PER_HOST = 8
DECODER = Transformer(vocabulary=50304, width=2048, depth=24, heads=16, max_length=2048, tied=False)
"""That of the table of bytes on the wire."""
GPT2 = sizes.NAMES["gpt2_124m"].clone(padded_vocabulary=50304, scan=True, chunk=128)
LLAMA = sizes.NAMES["llama3_8b"].clone(scan=True, chunk=512)


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile."""

    name: str
    model: Any
    mesh: str
    cards: int
    sequences: int
    """Of the whole batch."""
    length: int
    remat: str
    packed: bool = False
    """Whether the batch has segments."""


CASES = (
    Case("decoder 1.4B", DECODER, "fsdp:8", 8, 32, 2048, "blocks"),
    Case(
        "decoder 1.4B, looped", DECODER.clone(scan=True, chunk=512), "data:8", 8, 32, 2048, "blocks"
    ),
    Case(
        "decoder 1.4B, looped", DECODER.clone(scan=True, chunk=512), "fsdp:8", 8, 32, 2048, "blocks"
    ),
    Case(
        "decoder 1.4B, looped", DECODER.clone(scan=True, chunk=512), "fsdp:8", 8, 32, 2048, "dots"
    ),
    Case("gpt2_124m", GPT2, "data:8", 8, 128, 1024, "dots"),
    Case("gpt2_124m", GPT2, "data:64", 64, 1024, 1024, "dots"),
    Case("llama3_8b", LLAMA, "fsdp:4,tensor:2", 8, 8, 8192, "blocks"),
    Case("llama3_8b, packed", LLAMA, "fsdp:4,tensor:2", 8, 8, 8192, "blocks", packed=True),
    Case("llama3_8b", LLAMA, "fsdp:32,tensor:2", 64, 64, 8192, "blocks"),
    Case("llama3_8b", LLAMA, "data:8,fsdp:4,tensor:2", 64, 64, 8192, "blocks"),
)


def measure(case: Case, *, card: str = "h100") -> dict[str, Any]:
    """Compiles one case and reads it."""
    hosts = max(1, case.cards // PER_HOST)
    mesh = meshes.make(case.mesh, gpu_target.devices(card, case.cards, hosts=hosts))
    batch = {"tokens": jax.ShapeDtypeStruct((case.sequences, case.length + 1), jnp.int32)}
    task = NextToken()
    if case.packed:
        batch["segments"] = batch["tokens"]
        task = NextToken(input="tokens=tokens,segments=segments")
    recipe = Recipe(case.model, task, AdamW(), precision="bf16", remat=case.remat)
    began = time.monotonic()
    programs = lowering.lower(recipe, batch, mesh)
    compiled = programs.lower_train_step().compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    written, found = buffers.read(text), collectives.read(text)
    # of a card: the batch is split over data and fsdp
    tokens = case.sequences * case.length // (mesh.shape["data"] * mesh.shape["fsdp"])
    rows = case.model.padded_vocabulary or case.model.vocabulary
    return {
        "name": case.name,
        "mesh": case.mesh,
        "cards": case.cards,
        "tokens": tokens,
        "remat": case.remat,
        "seconds": time.monotonic() - began,
        "parameters": tree.size(programs.state.params),
        "state_bytes": programs.state_bytes(),
        "peak_bytes": memory.peak_memory_in_bytes,
        "wire_bytes": {kind: collectives.wire_bytes(found, kind) for kind in collectives.KINDS},
        "gathers": sorted(
            {(each.bytes, each.count) for each in found if each.kind == "all-gather"}, reverse=True
        )[:6],
        "kernels": buffers.kernels(text),
        "largest": [(str(each), each.bytes) for each in written[:8]],
        "full_logits": [str(each) for each in buffers.full_logits(written, tokens, rows)],
    }


HEADS = (
    *("model", "mesh", "tokens a card", "remat", "peak GiB", "state GiB", "all-gather MB"),
    *("reduce-scatter MB", "all-reduce MB", "attention", "logits of all tokens", "largest buffers"),
)


def row(result: dict[str, Any]) -> list[str]:
    """A result as a line of the table."""
    sent = [result["wire_bytes"][kind] for kind in ("all-gather", "reduce-scatter", "all-reduce")]
    fused = any("fmha" in name for name in result["kernels"])
    return [
        result["name"],
        f"`{result['mesh']}`",
        f"{result['tokens']:,}",
        result["remat"],
        f"{result['peak_bytes'] / 2**30:.1f}",
        f"{result['state_bytes'] / 2**30:.1f}",
        *(f"{number / 1e6:,.0f}" for number in sent),
        "cuDNN" if fused else "XLA",
        ", ".join(f"`{each}`" for each in result["full_logits"][:1]) or "none",
        ", ".join(f"`{each}`" for each, _ in result["largest"][:3]),
    ]


def page(results: Sequence[dict[str, Any]], record: dict[str, Any]) -> str:
    """The table as the page holds it."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n".join(
        [
            f"H100; `{record['command']}`; {record['date'][:10]}, {versions}.",
            "",
            "| " + " | ".join(HEADS) + " |",
            "|:---|:---|---:|:---|" + "---:|" * 5 + ":---|:---|:---|",
            *("| " + " | ".join(row(result)) + " |" for result in results),
        ]
    )


def put_into(path: Path, table: str) -> bool:
    """Replaces what stands between the marks of a page; False where there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begin, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (begin and end):
        return False
    path.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
    return True


def main(argv: Sequence[str]) -> int:
    """Compiles every case, one after another, and keeps what was read after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name has this word")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="(default: docs)")
    options = parser.parse_args(argv)
    if reason := gpu_target.unavailable_reason():
        parser.error(reason)
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot be read from again
    record: dict[str, Any] = {
        "command": " ".join(["python", "scripts/large_programs.py", *argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "results": [],
    }
    path = options.out / "benchmarks" / "large_programs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if options.only not in case.name:
            continue
        record["results"].append(measure(case))
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(" | ".join(row(record["results"][-1])), flush=True)
    table = page(record["results"], record)
    if not put_into(options.out / "scaling.md", table):
        print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
