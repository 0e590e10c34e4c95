#!/usr/bin/env python3
"""Weak scaling on paper: what each device of a large run sends in a step, read from the training
step compiled for GPUs that are not here.

    .venv/bin/python scripts/wire.py                           # some half an hour on two CPU cores
    .venv/bin/python scripts/wire.py --devices=8 --layouts=fsdp --depth=4 --out=/tmp/wire

It needs the extra `plan`. The batch of each device is fixed, so the global batch grows with the
devices. Bytes are those that a device sends by the ring algorithm; they count as between hosts
where the devices of one group are in different hosts. Writes docs/benchmarks/wire.json, and the
table of docs/scaling.md between its two marks.
"""

import argparse
import dataclasses
import json
import platform
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
from rich.box import SIMPLE_HEAD
from rich.table import Table

from jaxtrain import tree
from jaxtrain.models.transformer import Transformer
from jaxtrain.optimizers import AdamW
from jaxtrain.parallel import mesh as meshes
from jaxtrain.plan import collectives
from jaxtrain.report.terminal.progress import make_console
from jaxtrain.tasks import NextToken
from jaxtrain.train import lowering
from jaxtrain.train.recipe import Recipe

PACKAGES = ("jax", "jaxlib", "flax", "optax", *gpu_target.WHEELS)
ROOT = Path(__file__).resolve().parents[1]
MARKS = ("<!-- wire: begin -->", "<!-- wire: end -->")
LAYOUTS = {"data": "data:{all}", "fsdp": "fsdp:{all}", "hybrid": "data:{hosts},fsdp:{host}"}
GATHERED = ("all-reduce", "all-gather", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile."""

    layout: str
    devices: int
    card: str
    per_host: int
    sequences: int
    """Of each device."""
    length: int
    options: dict[str, Any]
    """Of the recipe: precision, remat."""

    @property
    def mesh_text(self) -> str:
        """As --mesh says it."""
        host = min(self.per_host, self.devices)
        return LAYOUTS[self.layout].format(all=self.devices, hosts=self.devices // host, host=host)


def measure(case: Case, model: Transformer) -> dict[str, Any]:
    """Compiles one case and reads what it sends."""
    hosts = max(1, case.devices // case.per_host)
    mesh = meshes.make(case.mesh_text, gpu_target.devices(case.card, case.devices, hosts=hosts))
    batch = {
        "tokens": jax.ShapeDtypeStruct((case.sequences * case.devices, case.length + 1), jnp.int32)
    }
    began = time.monotonic()
    programs = lowering.lower(Recipe(model, NextToken(), AdamW(), **case.options), batch, mesh)
    compiled = programs.lower_train_step().compile()
    seconds = time.monotonic() - began
    found = collectives.read(compiled.as_text())
    memory = compiled.memory_analysis()
    return {
        "layout": case.layout,
        "mesh": case.mesh_text,
        "devices": case.devices,
        "seconds": seconds,
        "parameters": tree.size(programs.state.params),
        "bytes": {
            kind: {
                tier: sum(
                    each.wire_bytes
                    for each in found
                    if each.kind == kind and each.crosses_hosts(case.per_host) == far
                )
                for tier, far in TIERS
            }
            for kind in collectives.KINDS
            if any(each.kind == kind for each in found)
        },
        "argument_bytes": memory.argument_size_in_bytes,
        "argument_bytes_by_hand": programs.state_bytes() + programs.batch_bytes(),
        "peak_bytes": memory.peak_memory_in_bytes,
        "largest": [
            {
                "kind": each.kind,
                "bytes": each.bytes,
                "count": each.count,
                "group": each.group_size,
                "dtypes": each.dtypes,
                "source": each.source[:200],
            }
            for each in sorted(found, key=lambda each: -each.wire_bytes)[:8]
        ],
    }


TIERS = (("inside a host", False), ("between hosts", True))


def row(result: dict[str, Any]) -> list[str]:
    """A result as a line of the table: megabytes that a device sends in a step."""
    totals = {kind: sum(tiers.values()) for kind, tiers in result["bytes"].items()}
    others = sum(total for kind, total in totals.items() if kind not in GATHERED)
    tiers = [sum(parts[tier] for parts in result["bytes"].values()) for tier, _ in TIERS]
    numbers = [*(totals.get(kind, 0.0) for kind in GATHERED), others, *tiers, sum(tiers)]
    peak = f"{result['peak_bytes'] / 2**30:.1f}"
    return [
        f"{result['devices']:,}",
        f"`{result['mesh']}`",
        *(f"{number / 1e6:,.0f}" for number in numbers),
        peak,
    ]


HEADS = (
    "devices",
    "mesh",
    *GATHERED,
    "other",
    *(tier for tier, _ in TIERS),
    "total MB",
    "peak GiB",
)


def page(results: Sequence[dict[str, Any]], record: dict[str, Any]) -> str:
    """The table as the page holds it, with what it hangs on."""
    lines = [
        f"{results[0]['parameters']:,} parameters; `{record['command']}`; {record['date'][:10]}, "
        + ", ".join(
            f"{name} {version}"
            for name, version in record["versions"].items()
            if name in ("python", "jax", "nvidia-cuda-nvcc-cu12")
        )
        + ".",
        "",
        "| " + " | ".join(HEADS) + " |",
        "|---:|:---|" + "---:|" * (len(HEADS) - 2),
        *("| " + " | ".join(row(result)) + " |" for result in results),
    ]
    return "\n".join(lines)


def put_into(path: Path, table: str) -> bool:
    """Replaces what stands between the marks of a page; False where the page or its marks are
    missing."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begin, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (begin and end):
        return False
    path.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
    return True


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--devices", default="8,64,512,1024", help="numbers of devices (default: %(default)s)"
    )
    parser.add_argument(
        "--layouts", default=",".join(LAYOUTS), help="data, fsdp, hybrid (default: %(default)s)"
    )
    parser.add_argument(
        "--card", default="h100", choices=gpu_target.TARGETS, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--per_host", type=int, default=8, help="cards of a host (default: %(default)s)"
    )
    parser.add_argument("--precision", default="bf16", help="(default: %(default)s)")
    parser.add_argument("--remat", default="blocks", help="(default: %(default)s)")
    parser.add_argument(
        "--sequences", type=int, default=4, help="sequences of each device (default: %(default)s)"
    )
    for name, value in {
        "length": 2048,
        "width": 2048,
        "depth": 24,
        "heads": 16,
        "vocabulary": 50304,
    }.items():
        parser.add_argument(
            f"--{name}", type=int, default=value, help="of the model (default: %(default)s)"
        )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "docs",
        help="folder of benchmarks/wire.json and scaling.md (default: docs)",
    )
    options = parser.parse_args(argv)
    reason = gpu_target.unavailable_reason()
    if reason is not None:
        parser.error(reason)
    return options


def main(argv: Sequence[str]) -> int:
    """Compiles every case, one after another, and keeps what was read after each."""
    options = options_of(argv)
    # A program for a card that is not here is written to the cache but cannot be read from it
    # again, and jax warns.
    jax.config.update("jax_enable_compilation_cache", False)
    shape = {
        "vocabulary": options.vocabulary,
        "width": options.width,
        "depth": options.depth,
        "heads": options.heads,
    }
    model = Transformer(**shape, max_length=options.length, tied=False)
    recipe = {
        name: value
        for name, value in (("precision", options.precision), ("remat", options.remat))
        if value
    }
    record: dict[str, Any] = {
        "command": " ".join(["python", "scripts/wire.py", *argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": shape | {"length": options.length, "tied": False},
        "card": options.card,
        "per_host": options.per_host,
        "sequences_per_device": options.sequences,
        **recipe,
        "versions": (
            {"python": platform.python_version()}
            | {name: metadata.version(name) for name in PACKAGES}
        ),
        "results": [],
    }
    console = make_console()
    path = options.out / "benchmarks" / "wire.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for layout in options.layouts.split(","):
        for devices in map(int, options.devices.split(",")):
            if layout == "hybrid" and devices <= options.per_host:
                continue  # one host: the same as fsdp
            case = Case(
                layout,
                devices,
                options.card,
                options.per_host,
                options.sequences,
                options.length,
                recipe,
            )
            record["results"].append(measure(case, model))
            path.write_text(json.dumps(record, indent=2) + "\n")
            console.print(f"{case.mesh_text}: {record['results'][-1]['seconds']:.0f} s")
    table = Table(*HEADS, box=SIMPLE_HEAD)
    for result in record["results"]:
        table.add_row(*row(result))
    console.print(table)
    if not put_into(options.out / "scaling.md", page(record["results"], record)):
        console.print(page(record["results"], record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
