#!/usr/bin/env python3
"""Measures jaxtrain side by side with what it is compared to, in one process; prints a table and
writes docs/benchmarks/NAME.json.

    .venv/bin/python scripts/bench.py overhead                 # some four minutes on two CPU cores
    .venv/bin/python scripts/bench.py overhead --blocks=3 --out=/tmp/bench
    .venv/bin/python scripts/bench.py reproducible             # what the same bits on any layout
    cost, on one device
    .venv/bin/python scripts/bench.py characters               # the step of a small language model
    beside one in PyTorch, which must be installed, on one core and on two

Contestants take turns, block by block, so that what else the machine does hits all of them; the
verdict is the median of the ratios of neighbouring blocks. Times are the wall clock's, from the
first dispatch to the moment when the last update is done; the processor time of all threads is
recorded beside them, as it hardly changes when other processes take their share of the cores.
"""

import argparse
import dataclasses
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from jaxtrain import config, host_memory, tree
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.data import order
from jaxtrain.data.sources.synthetic import Synthetic
from jaxtrain.horizon import Horizon
from jaxtrain.models.convnet import ConvNet
from jaxtrain.models.mlp import MLP
from jaxtrain.models.transformer import Transformer
from jaxtrain.models.vit import NAMES as VITS
from jaxtrain.models.vit import ViT
from jaxtrain.optimizers import AdamW
from jaxtrain.parallel import mesh as meshes
from jaxtrain.processes.group import StopAgreement
from jaxtrain.processes.signals import StopSignals
from jaxtrain.report.metrics_file import JsonlWriter, Writers, read_metrics
from jaxtrain.report.terminal.progress import Progress, make_console
from jaxtrain.report.trackers import TensorBoardWriter
from jaxtrain.runner import build, preflight
from jaxtrain.runner.profiler import Profiler
from jaxtrain.schedules import Constant
from jaxtrain.tasks import Classification, NextToken, score_of
from jaxtrain.train import cadence, loop, lowering, metrics_log, state, steps
from jaxtrain.train.selection import Selection

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
RATE, WEIGHT_DECAY = 1e-3, 1e-2
CHECKED_STEPS = 4
"""Over how many first steps both loops must give the same losses on the same batches."""
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Case:
    """One model on one kind of data, and the least ratio of speeds that we ask of ourselves."""

    name: str
    model: nn.Module
    shape: tuple[int, ...]
    steps: int
    """Steps of a block; some seconds."""
    least: float
    log_every: int
    batch_size: int = 32
    examples: int = 2048


OVERHEAD = (
    Case("ViT-Ti/4 32x32", VITS["vit_ti4"], (32, 32, 3), steps=10, least=0.98, log_every=5),
    Case("MLP 64-32-10", MLP(widths=(32,)), (64,), steps=30_000, least=2.5, log_every=50),
)
REPRODUCIBLE = (
    Case("MLP 64-256-256-10", MLP(), (64,), steps=200, least=0.0, log_every=50, batch_size=128),
    Case(
        "ConvNet 8x8",
        ConvNet(widths=(32, 64, 96), dropout=0.2),
        (8, 8, 1),
        steps=20,
        least=0.0,
        log_every=10,
        batch_size=128,
    ),
    Case(
        "ViT 2 x 96, 8x8",
        ViT(patch=2, width=96, depth=2, heads=3),
        (8, 8, 1),
        steps=20,
        least=0.0,
        log_every=10,
        batch_size=128,
    ),
    Case("ViT-Ti/4 32x32", VITS["vit_ti4"], (32, 32, 3), steps=4, least=0.0, log_every=2),
)


@dataclasses.dataclass(frozen=True)
class Cores:
    """On how many cores the step of the character model is measured, and the least ratio."""

    name: str
    cores: int
    least: float = 1.0
    steps: int = 10


CHARACTERS = (Cores("characters, one core", 1), Cores("characters, two cores", 2))


class OurLoop:
    """`loop.train` as a run calls it: data in device memory, metrics file, TensorBoard, progress;
    evaluation and saves are off."""

    name = "jaxtrain"

    def __init__(self, case: Case, folder: Path, total_steps: int, **changes: Any) -> None:
        self._case, self.step = case, 0
        self.run = config.Run(
            name="bench",
            model=case.model,
            task=Classification(),
            optimizer=AdamW(learning_rate=RATE, weight_decay=WEIGHT_DECAY),
            data=Synthetic(shape=case.shape, examples=case.examples, test_examples=1, noise=4.0),
            schedule=Constant(),
            augment=None,
            steps=total_steps,
            batch_size=case.batch_size,
            log_every=case.log_every,
            eval_every=Horizon(0),
            checkpoint_every=Horizon(0),
            precision="fp32",
            **changes,
        )
        self.table = self.run.data.open().train
        mesh = meshes.make(self.run.mesh, jax.devices()[:1])
        recipe = build.recipe_of(self.run, self.table, build.lengths(self.run, len(self.table)))
        self.prepare = recipe.prepare
        execution = build.execution(self.run, mesh)
        batch = preflight.model(self.run, self.table, recipe, execution).batch
        programs = lowering.lower(recipe, batch, mesh)
        self.state = execution.initialize(programs, self.run.seed)
        data = build.place_data(self.run, self.table, mesh)
        assert data is not None
        self.training = execution.training(programs, data, per_call=None, most=self.run.log_every)
        self._writers = Writers(
            JsonlWriter(folder / "metrics.jsonl"), [TensorBoardWriter(folder / "tensorboard")]
        )
        self._progress = Progress(total_steps, stream=io.StringIO(), live=False)
        self._log = metrics_log.MetricsLog(
            self._writers,
            self._progress,
            every=case.log_every,
            step=0,
            total_steps=total_steps,
            batch_size=case.batch_size,
            flops_per_step=self.training.flops_per_step,
        )
        self._checkpoints, self._profiler = Unsaved(folder), Profiler(None, folder)

    def block(self, steps: int) -> None:
        """Trains on for so many steps."""
        with StopSignals() as stop:
            ending = loop.train(
                self.state,
                step=self.step,
                feed=self.training.feed,
                writers=self._writers,
                checkpoints=self._checkpoints,
                cadence=cadence.Cadence(
                    self.step + steps, self.training.per_call, self._case.log_every
                ),
                log=self._log,
                progress=self._progress,
                stop=StopAgreement(stop),
                validate=None,
                test=None,
                selection=Selection(score_of(self.run.task)),
                at_step=self._profiler,
            )
        self.state, self.step = ending.state, ending.step

    def losses(self) -> list[float]:
        """The logged losses, each the mean of an interval."""
        return [line["loss"] for line in read_metrics(self._writers.metrics.path)]

    def updates(self) -> int:
        """How many updates the state has seen."""
        return int(self.state.step)

    def close(self) -> None:
        """Ends what runs in the background."""
        self.training.feed.close()
        self._writers.close()


class Unsaved(Checkpoints):
    """Saves nothing: the loop always commits its last step, and a commit is no part of what is
    measured."""

    def save(
        self, step: int, state: Any, loop: Any, *, metric: float | None = None, wait: bool = False
    ) -> None:
        """Does nothing."""


class HandLoop:
    """What one writes by hand: a donated `jax.jit` step, the data in NumPy as the model wants it, a
    shuffle an epoch, the loss now and then."""

    name = "by hand"

    def __init__(
        self,
        model: nn.Module,
        images: np.ndarray,
        labels: np.ndarray,
        params: Any,
        *,
        batch_size: int,
        log_every: int,
    ) -> None:
        self._images, self._labels, self._batch_size, self._log_every = (
            images,
            labels,
            batch_size,
            log_every,
        )
        decays = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
        optimizer = optax.adamw(RATE, weight_decay=WEIGHT_DECAY, mask=decays)
        self.params, self.opt_state = params, optimizer.init(params)
        self.step, self._losses = 0, []
        self._random = np.random.default_rng(0)
        self._order, self._place = self._random.permutation(len(labels)), 0

        def update(
            params: Any, opt_state: Any, images: jax.Array, labels: jax.Array
        ) -> tuple[Any, Any, jax.Array]:
            def mean_loss(params: Any) -> jax.Array:
                logits = model.apply({"params": params}, images, train=True)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            loss, gradients = jax.value_and_grad(mean_loss)(params)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        self._update = jax.jit(update, donate_argnums=(0, 1))

    def one(self, ids: np.ndarray) -> jax.Array:
        """One update; its loss, still on the device."""
        self.params, self.opt_state, loss = self._update(
            self.params, self.opt_state, self._images[ids], self._labels[ids]
        )
        return loss

    def block(self, steps: int) -> None:
        """Trains on for so many steps."""
        for _ in range(steps):
            if self._place + self._batch_size > len(self._order):
                self._order, self._place = self._random.permutation(len(self._labels)), 0
            loss = self.one(self._order[self._place : self._place + self._batch_size])
            self._place += self._batch_size
            self.step += 1
            if self.step % self._log_every == 0:
                self._losses.append(float(loss))
        jax.block_until_ready(self.params)

    def losses(self) -> list[float]:
        """The losses that were read."""
        return self._losses

    def updates(self) -> int:
        """How many updates the optimizer has counted."""
        return int(optax.tree.get(self.opt_state, "count"))


def overhead(blocks: int, folder: Path, cases: Sequence[Case] = OVERHEAD) -> list[dict[str, Any]]:
    """Our loop against one written by hand: same model, data, batch and optimizer."""
    return [measure(case, blocks, folder / str(number)) for number, case in enumerate(cases)]


def measure(case: Case, blocks: int, folder: Path) -> dict[str, Any]:
    """One case: checks that both loops compute the same, then times them in turns."""
    folder.mkdir(parents=True)
    ours = OurLoop(case, folder, total_steps=CHECKED_STEPS + blocks * case.steps)
    by_hand = HandLoop(
        case.model,
        *prepared(ours),
        jax.tree.map(jnp.copy, ours.state.params),
        batch_size=case.batch_size,
        log_every=case.log_every,
    )
    try:
        difference = check_same_losses(case, ours, by_hand)
        seconds, cpu_seconds = take_turns([ours, by_hand], case.steps, blocks)
        work = {
            loop.name: {"updates": loop.updates(), "loss": statistics.fmean(loop.losses()[-10:])}
            for loop in (ours, by_hand)
        }
    finally:
        ours.close()
    speeds = {name: [case.steps / each for each in times] for name, times in seconds.items()}
    ratios = [
        mine / other for mine, other in zip(speeds[ours.name], speeds[by_hand.name], strict=True)
    ]
    return {
        "case": case.name,
        "batch_size": case.batch_size,
        "steps_per_block": case.steps,
        "steps_per_dispatch": ours.training.per_call,
        "log_every": case.log_every,
        "largest_relative_difference_of_first_losses": difference,
        "work": work,
        "steps_per_second": {name: spread(values) for name, values in speeds.items()},
        "cpu_seconds_per_step": {
            name: spread([each / case.steps for each in times])
            for name, times in cpu_seconds.items()
        },
        "ratio": spread(ratios),
        "least": case.least,
        "holds": statistics.median(ratios) >= case.least,
    }


def reproducible(
    blocks: int, folder: Path, cases: Sequence[Case] = REPRODUCIBLE
) -> list[dict[str, Any]]:
    """The same run with and without --reproducible, on one device."""
    results = []
    for number, case in enumerate(cases):
        loops = {}
        for name, changes in (("reproducible", {"reproducible": True}), ("plain", {})):
            (folder / f"{number}-{name}").mkdir(parents=True)
            loops[name] = OurLoop(
                case, folder / f"{number}-{name}", (blocks + 1) * case.steps, **changes
            )
            loops[name].name = name
            loops[name].block(case.steps)  # compiles
        try:
            seconds, cpu_seconds = take_turns(list(loops.values()), case.steps, blocks)
        finally:
            for each in loops.values():
                each.close()
        speeds = {name: [case.steps / each for each in times] for name, times in seconds.items()}
        ratios = [mine / other for mine, other in zip(*speeds.values(), strict=True)]
        results.append(
            {
                "case": case.name,
                "batch_size": case.batch_size,
                "steps_per_block": case.steps,
                "steps_per_second": {name: spread(values) for name, values in speeds.items()},
                "cpu_seconds_per_step": {
                    name: spread([each / case.steps for each in times])
                    for name, times in cpu_seconds.items()
                },
                "ratio": spread(ratios),
                "least": case.least,
                "holds": statistics.median(ratios) >= case.least,
            }
        )
    return results


def characters(
    blocks: int, folder: Path, cases: Sequence[Cores] = CHARACTERS
) -> list[dict[str, Any]]:
    """Our step of nanoGPT's character model (its setting for CPUs) beside one in PyTorch, each case
    in a process of its own, which begins on so many cores: both libraries make their threads once.
    """
    results = []
    for case in cases:
        out = folder / str(case.cores)
        command = [sys.executable, __file__, "characters", f"--cores={case.cores}"]
        done = subprocess.run(
            [*command, f"--blocks={blocks}", f"--out={out}"], stdout=subprocess.DEVNULL, check=False
        )
        if done.returncode not in (0, 1):
            raise SystemExit(f"bench: {case.name}: ended with status {done.returncode}")
        results += json.loads((out / "characters.json").read_text())["results"]
    return results


def characters_here(case: Cores, blocks: int) -> dict[str, Any]:
    """One case in this process: checks that both compute the same, then times them in turns.
    malloc keeps what is freed, for both, as in every run of ours on the CPU."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: case.cores])
    host_memory.keep_freed()
    ours = OurCharacters()
    theirs = TorchCharacters(jax.device_get(ours.state.params), threads=case.cores)
    pairs = [(ours.one(), theirs.one()) for _ in range(CHECKED_STEPS)]
    difference = max(abs(float(mine) - float(other)) / float(other) for mine, other in pairs)
    if difference > TOLERANCE:
        raise SystemExit(f"bench: {case.name}: the first losses differ by up to {difference:.1%}")
    seconds, cpu_seconds = take_turns([ours, theirs], case.steps, blocks)
    speeds = {name: [case.steps / each for each in times] for name, times in seconds.items()}
    ratios = [mine / other for mine, other in zip(*speeds.values(), strict=True)]
    return {
        "case": case.name,
        "batch_size": CHARACTER_BATCH,
        "cores": case.cores,
        "steps_per_block": case.steps,
        "largest_relative_difference_of_first_losses": difference,
        "torch": theirs.version,
        "steps_per_second": {name: spread(values) for name, values in speeds.items()},
        "cpu_seconds_per_step": {
            name: spread([each / case.steps for each in times])
            for name, times in cpu_seconds.items()
        },
        "ratio": spread(ratios),
        "least": case.least,
        "holds": statistics.median(ratios) >= case.least,
    }


VOCABULARY, LENGTH, CHARACTER_BATCH, DEPTH, WIDTH, HEADS = 65, 64, 12, 4, 128, 4


def character_batches() -> Iterator[np.ndarray]:
    """Windows at random places of a text, the same for everybody."""
    random = np.random.default_rng(0)
    text = random.integers(0, VOCABULARY, 100_000).astype(np.int32)
    while True:
        starts = random.integers(0, len(text) - LENGTH, CHARACTER_BATCH)
        yield text[starts[:, None] + np.arange(LENGTH + 1)]


class OurCharacters:
    """Our compiled step, one update a dispatch, fed from the host."""

    name = "jaxtrain"

    def __init__(self) -> None:
        parts = (
            Transformer(
                vocabulary=VOCABULARY, width=WIDTH, depth=DEPTH, heads=HEADS, max_length=LENGTH
            ),
            NextToken(),
            AdamW(learning_rate=RATE, b2=0.99, weight_decay=0.1),
        )
        self._batches = character_batches()
        batch = {"tokens": jnp.zeros((CHARACTER_BATCH, LENGTH + 1), jnp.int32)}
        self.state = state.init_state(*parts, batch, clip_norm=1.0)
        step = steps.make_train_step(*parts, clip_norm=1.0)
        self._step = step.lower(self.state, batch).compile()

    def one(self) -> jax.Array:
        """One update; its loss, still on the device."""
        batch = {"tokens": jnp.asarray(next(self._batches))}
        self.state, sums = self._step(self.state, batch)
        return sums["loss"][0] / sums["loss"][1]

    def block(self, steps: int) -> None:
        """Trains on for so many steps, and reads the last loss."""
        losses = [self.one() for _ in range(steps)]
        float(losses[-1])
        jax.block_until_ready(self.state)


class TorchCharacters:
    """The same model in PyTorch, with its fused attention and its fused AdamW."""

    name = "PyTorch"

    def __init__(self, params: Any, *, threads: int) -> None:
        try:
            import torch  # not of ours
        except ImportError:
            raise SystemExit("bench: characters: needs PyTorch; pip install torch") from None
        self.version = torch.__version__
        torch.set_num_threads(threads)
        self._torch, self._batches = torch, character_batches()
        self._weights = {
            path: torch.from_numpy(np.array(leaf)).requires_grad_()
            for path, leaf in tree.flatten(params).items()
        }
        kernels = [leaf for path, leaf in self._weights.items() if path.endswith("kernel")]
        others = [leaf for path, leaf in self._weights.items() if not path.endswith("kernel")]
        groups = [{"params": kernels, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), fused=True)

    def one(self) -> Any:
        """One update; its loss."""
        torch, tokens = self._torch, self._torch.from_numpy(next(self._batches)).long()
        logits = self._logits(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self._weights.values()), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def block(self, steps: int) -> None:
        """Trains on for so many steps, and reads the last loss."""
        losses = [self.one() for _ in range(steps)]
        float(losses[-1])

    def _logits(self, tokens: Any) -> Any:
        weights, functional = self._weights, self._torch.nn.functional
        x = functional.embedding(tokens, weights["embed"]) + weights["positions"]
        for block in range(DEPTH):
            x = x + self._attention(self._norm(x, f"block{block}/norm0"), f"block{block}/attention")
            hidden = self._dense(self._norm(x, f"block{block}/norm1"), f"block{block}/mlp_in")
            hidden = functional.gelu(hidden, approximate="tanh")
            x = x + self._dense(hidden, f"block{block}/mlp_out")
        return functional.linear(self._norm(x, "norm"), weights["embed"])

    def _attention(self, x: Any, path: str) -> Any:
        rows, length, _ = x.shape
        parts = [
            self._dense(x, f"{path}/{name}").view(rows, length, HEADS, -1).transpose(1, 2)
            for name in ("query", "key", "value")
        ]
        mixed = self._torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self._dense(mixed.transpose(1, 2).reshape(rows, length, WIDTH), f"{path}/out")

    def _dense(self, x: Any, path: str) -> Any:
        kernel, bias = self._weights[f"{path}/kernel"], self._weights[f"{path}/bias"]
        return x @ kernel.reshape(x.shape[-1], -1) + bias.reshape(-1)

    def _norm(self, x: Any, path: str) -> Any:
        scale, bias = self._weights[f"{path}/scale"], self._weights[f"{path}/bias"]
        return self._torch.nn.functional.layer_norm(x, (WIDTH,), scale, bias, 1e-6)


def prepared(ours: OurLoop) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the train split as the model wants them, in host memory."""
    arrays = ours.table.arrays
    assert arrays is not None and ours.prepare is not None
    images = np.asarray(ours.prepare({"image": jnp.asarray(arrays["image"])})["image"])
    return np.array(images), np.asarray(arrays["label"], np.int32)


def check_same_losses(case: Case, ours: OurLoop, by_hand: HandLoop) -> float:
    """Both take the same first steps on the same batches, which also warms them up; the largest
    relative difference of a loss."""
    differences = []
    for number in range(CHECKED_STEPS):
        ids = order.example_ids(
            ours.run.seed, 0, number * case.batch_size, case.batch_size, len(ours.table)
        )
        ours.state, sums = ours.training.feed.advance(ours.state, 1)
        total, count = jax.device_get(sums["loss"])
        other = float(by_hand.one(ids))
        differences.append(abs(float(total / count) - other) / abs(other))
    ours.step = by_hand.step = CHECKED_STEPS
    if max(differences) > TOLERANCE:
        difference = f"the first losses differ by up to {max(differences):.1%}"
        raise SystemExit(f"bench: {case.name}: {difference}: the two loops do not compute the same")
    return max(differences)


def take_turns(
    contestants: Sequence[Any], steps: int, blocks: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of the clock and of the processors for each block; who begins changes from one pair
    to the next."""
    seconds: dict[str, list[float]] = {each.name: [] for each in contestants}
    cpu_seconds: dict[str, list[float]] = {each.name: [] for each in contestants}
    for number in range(blocks):
        for each in contestants if number % 2 == 0 else reversed(contestants):
            began, cpu_began = time.perf_counter(), time.process_time()
            each.block(steps)
            seconds[each.name].append(time.perf_counter() - began)
            cpu_seconds[each.name].append(time.process_time() - cpu_began)
    return seconds, cpu_seconds


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and ends of some numbers, and the numbers.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'quartiles': [1.5, 2.5], 'min': 1.0, 'max': 3.0, 'values': [3.0, 1.0, 2.0]}
    """
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {
        "median": middle,
        "quartiles": [low, high],
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def surroundings(argv: Sequence[str]) -> dict[str, Any]:
    """What the numbers hang on: machine, versions, command and date."""
    device = jax.devices()[0]
    return {
        "command": " ".join(["python", "scripts/bench.py", *argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "hardware": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "platform": device.platform,
            "device": device.device_kind,
        },
        "versions": (
            {"python": platform.python_version()}
            | {name: metadata.version(name) for name in PACKAGES}
        ),
    }


def cpu_model() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def render(title: str, results: Sequence[dict[str, Any]]) -> Table:
    """The results for the terminal: speeds in steps a second, the ratio's median, quartiles and
    ends, and whether it is as asked."""
    table = Table(
        "case",
        *results[0]["steps_per_second"],
        "ratio",
        "quartiles",
        "ends",
        "asked",
        "",
        title=title,
        box=SIMPLE_HEAD,
        title_justify="left",
    )
    for result in results:
        speeds, ratio = result["steps_per_second"], result["ratio"]
        ours, by_hand = (
            f"{each['median']:,.{0 if each['median'] > 100 else 3}f}/s" for each in speeds.values()
        )
        quartiles, ends = (
            "-".join(f"{value:.3f}" for value in pair)
            for pair in (ratio["quartiles"], (ratio["min"], ratio["max"]))
        )
        outcome = Text("holds", "green") if result["holds"] else Text("fails", "red")
        table.add_row(
            result["case"],
            ours,
            by_hand,
            Text(f"{ratio['median']:.3f}", "bold"),
            quartiles,
            ends,
            f"{result['least']:g}",
            outcome,
        )
    return table


BENCHES: dict[str, Callable[[int, Path], list[dict[str, Any]]]] = {
    "overhead": overhead,
    "reproducible": reproducible,
    "characters": characters,
}


def main(argv: Sequence[str]) -> int:
    """Runs a bench; exit status 0 if every ratio holds, otherwise 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=BENCHES, help="what to measure")
    parser.add_argument(
        "--blocks",
        type=int,
        default=7,
        help="how often each contestant has its turn (default: %(default)s)",
    )
    default_out = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
    parser.add_argument(
        "--out",
        type=Path,
        default=default_out,
        help="folder of the JSON file (default: docs/benchmarks)",
    )
    parser.add_argument(
        "--cores", type=int, help="of characters: only the case of so many cores, in this process"
    )
    options = parser.parse_args(argv)
    if options.blocks < 1:
        parser.error(f"--blocks={options.blocks}: must be >= 1")
    if options.cores is not None and options.name != "characters":
        parser.error(f"--cores={options.cores}: is of characters")
    began = time.monotonic()
    if options.cores is not None:
        case = Cores(f"characters, {options.cores} cores", options.cores)
        case = next((each for each in CHARACTERS if each.cores == options.cores), case)
        results = [characters_here(case, options.blocks)]
    else:
        with tempfile.TemporaryDirectory(prefix="jaxtrain-bench-") as folder:
            results = BENCHES[options.name](options.blocks, Path(folder))
    # afterwards, for it asks jax for its devices, and a bench may choose its cores first
    record = surroundings(argv) | {
        "bench": options.name,
        "blocks": options.blocks,
        "seconds": time.monotonic() - began,
        "results": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    console = make_console()
    console.print(render(f"{options.name}, {options.blocks} alternating blocks", results))
    console.print(f"{path}")
    return 0 if all(result["holds"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
