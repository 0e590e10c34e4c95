#!/usr/bin/env python3
"""Fault injection: runs are killed at random moments, and single bits of checkpoints are flipped.
Nothing may be lost, repeated or wrong without a message.

    # SIGKILL and restart until the run is done; it must equal an undisturbed run in every bit
    .venv/bin/python scripts/faults.py kills --trials=30 --seed=0
    # each restore falls back to another checkpoint with a warning, or is refused; verify exits 74
    .venv/bin/python scripts/faults.py flips --trials=100 --seed=0

Prints one JSON line per trial, then a table; the exit status is 1 if a trial fails.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain.checkpoints import checkpoints as checkpoint
from jaxtrain.checkpoints import committed, manifest
from jaxtrain.checkpoints.checkpoints import CheckpointError, Checkpoints
from jaxtrain.report.metrics_file import is_clock, read_metrics

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = [sys.executable, str(ROOT / "experiments" / "digits.py")]
STEPS, INTERVAL = 120, 10
COMMON = [
    f"--steps={STEPS}",
    f"--checkpoint_every={INTERVAL}",
    "--eval_every=20",
    "--log_every=7",
    "--batch_size=32",
    "--keep=3",
    "--ema_decay=0.9",
    "--clip_norm=1",
    "--model.dropout=0.2",
    "--augment.crop_padding=1",
    "--report=false",
]
RECIPES = {
    "mlp": ["--model=mlp", "--model.widths=64,64"],
    "convnet": ["--model=convnet", "--model.widths=8,16"],
}
"""The first runs many steps a dispatch, the second one; both with dropout, augmentation, averaging
and clipping."""


@dataclasses.dataclass(frozen=True)
class GoldenRun:
    """An undisturbed run, to which all others must be equal."""

    folder: Path
    seconds: float
    loop_seconds: float
    """From run.json, written before the first step, to the last commit."""
    digest: str
    metrics: list[dict[str, Any]]


def command(recipe: str, folder: Path, *more: str) -> list[str]:
    """How a run of the recipe is started, or started again."""
    return [*EXPERIMENT, *COMMON, *RECIPES[recipe], f"--workdir={folder}", *more]


def finish(recipe: str, folder: Path, *more: str) -> tuple[int, str]:
    """Runs to the end; the exit status and the output."""
    done = subprocess.run(
        command(recipe, folder, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        check=False,
    )
    return done.returncode, done.stdout


def golden(recipe: str, folder: Path) -> GoldenRun:
    """Makes the golden run of a recipe."""
    # The first run fills the compilation cache, so the second takes as long as those of the trials.
    finish(recipe, folder.with_name(f"warm-{recipe}"), "--steps=3")
    began = time.monotonic()
    status, output = finish(recipe, folder)
    seconds = time.monotonic() - began
    if status:
        sys.exit(f"the undisturbed run of {recipe} failed with status {status}:\n{output}")
    last = folder / "checkpoints" / str(STEPS) / manifest.COMMIT
    loop_seconds = last.stat().st_mtime - (folder / "run.json").stat().st_mtime
    return GoldenRun(folder, seconds, loop_seconds, verified(folder)[1], metrics_of(folder))


def verified(folder: Path) -> tuple[int, str]:
    """Status and digest by `python -m jaxtrain verify`."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = checkpoint.verify_command(folder)
    last = output.getvalue().strip().splitlines()[-1]
    return status, last.removeprefix("digest ") if last.startswith("digest ") else ""


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without what comes from a clock."""
    return [
        {key: value for key, value in line.items() if not is_clock(key)}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def start(recipe: str, folder: Path, seconds: float | None, in_loop: bool) -> dict[str, Any]:
    """Starts the run, kills it so many seconds later (or after its first step; None: not at all),
    and returns its output and what it left."""
    marker = folder / "run.json"
    before = marker.stat().st_mtime_ns if marker.exists() else 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command(recipe, folder), stdout=output, stderr=subprocess.STDOUT, cwd=ROOT
        )
        while (
            in_loop
            and process.poll() is None
            and (not marker.exists() or marker.stat().st_mtime_ns == before)
        ):
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.send_signal(signal.SIGKILL)
        status = process.wait()
        output.seek(0)
        text = output.read()
    problems: list[str] = []
    newest = committed.newest(folder / "checkpoints", problems.append)
    reached = max((line["step"] for line in read_metrics(folder / "metrics.jsonl")), default=0)
    found = {
        "status": status,
        "resumed": resumed(text),
        "reached": reached,
        "committed": newest,
        "problems": problems,
    }
    return found if status in (0, -signal.SIGKILL) else found | {"output": text[-2000:]}


def resumed(text: str) -> int | None:
    """The step from which a start resumed, by its own output."""
    match = re.search(r"resumed from step (\d+)", text)
    return int(match[1]) if match else None


def kill_trial(
    recipe: str, folder: Path, randomness: random.Random, golden_run: GoldenRun
) -> dict[str, Any]:
    """One run, killed one to four times before its last commit, and started again each time; the
    last start runs to the end."""
    starts: list[dict[str, Any]] = []
    wanted = randomness.randint(1, 4)
    while not starts or starts[-1]["status"] == -signal.SIGKILL:
        if len(starts) == wanted:
            seconds, in_loop = None, False
        else:
            # most kills where most can go wrong: between the first step and the last commit
            in_loop = randomness.random() < 0.75
            seconds = randomness.uniform(
                0, golden_run.loop_seconds if in_loop else golden_run.seconds
            )
        starts.append(start(recipe, folder, seconds, in_loop))
        if len(starts) == 1 and starts[0]["committed"] == STEPS:
            starts.clear()  # it was faster than its killer: again
            shutil.rmtree(folder)
    kills = starts[:-1]
    # A start that was killed early did not report where it resumed; one that
    # reports it must name the newest that verifies.
    pairs = [
        (after["resumed"], before["committed"]) for before, after in itertools.pairwise(starts)
    ]
    reported = starts[-1]["resumed"] is not None or kills[-1]["committed"] in (None, STEPS)
    result = {
        "status": starts[-1]["status"],
        "kills": kills,
        "resumed": starts[-1]["resumed"],
        "resumed_from_newest": reported and all(said in (None, due) for said, due in pairs),
        "undamaged": not any(kill["problems"] for kill in kills),
        "most_steps_repeated": max(kill["reached"] - (kill["committed"] or 0) for kill in kills),
        "digest_equal": verified(folder) == (0, golden_run.digest),
        "metrics_equal": metrics_of(folder) == golden_run.metrics,
    }
    # While a save is written in the background the next interval runs; its own save waits for the
    # one before.
    result["ok"] = result["status"] == 0 and result["most_steps_repeated"] <= INTERVAL
    result["ok"] &= all(
        result[key] for key in ("resumed_from_newest", "undamaged", "digest_equal", "metrics_equal")
    )
    return result if result["ok"] else result | {"output": starts[-1].get("output", "")}


def kills(trials: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """The campaign of SIGKILLs, the recipes in turn."""
    golden_runs = {recipe: golden(recipe, folder / f"golden-{recipe}") for recipe in RECIPES}
    rows = []
    for trial in range(trials):
        recipe = list(RECIPES)[trial % len(RECIPES)]
        trial_folder = folder / f"trial-{trial}"
        rows.append(
            {"trial": trial, "recipe": recipe}
            | kill_trial(
                recipe, trial_folder, random.Random(f"{seed} {trial}"), golden_runs[recipe]
            )
        )
        print(json.dumps(rows[-1]), flush=True)
        if rows[-1]["ok"]:
            shutil.rmtree(trial_folder)
    return rows


def show_kills(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    print(
        f"\n{'trial':>5}  {'recipe':8}  {'kills at step (newest committed)':52}  {'digest':8} "
        f" {'metrics':8}  says"
    )
    for row in rows:
        places = ", ".join(
            f"{kill['reached']} ({'-' if kill['committed'] is None else kill['committed']})"
            for kill in row["kills"]
        )
        equal = ["equal" if row[key] else "DIFFERS" for key in ("digest_equal", "metrics_equal")]
        says = "-" if row["resumed"] is None else f"resumed from step {row['resumed']}"
        print(
            f"{row['trial']:>5}  {row['recipe']:8}  {places:52}  {equal[0]:8}  {equal[1]:8} "
            f" {says}{'' if row['ok'] else '  FAILED'}"
        )
    count = sum(len(row["kills"]) for row in rows)
    most = max((row["most_steps_repeated"] for row in rows), default=0)
    ok = sum(row["ok"] for row in rows)
    again = f"{most} (a commit every {INTERVAL})"
    print(f"{len(rows)} runs, {count} kills, {ok} ok; steps run again at most {again}")


def flip(folder: Path, randomness: random.Random) -> tuple[Path, int]:
    """Flips one bit below `folder`: of a byte drawn from all, or of a file drawn from all, so that
    small files have their turn too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = [path.stat().st_size for path in files]
    path = randomness.choices(files, weights=sizes if randomness.random() < 0.5 else None)[0]
    data = bytearray(path.read_bytes())
    bit = randomness.randrange(len(data) * 8)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return path, bit


def restored_digest(workdir: Path, messages: list[str]) -> tuple[int | None, str]:
    """Step and digest of the state that a restore gives, or why there is none; through the same
    calls as a run."""
    checkpoints = Checkpoints(workdir)
    try:
        step = checkpoints.newest_verified(messages.append)
        if step is None:
            return None, ""
        like = {
            path: _abstract(*spec)
            for path, spec in manifest.read(checkpoints.folder / str(step))["tree"].items()
        }
        return step, checkpoint.digest(checkpoints.restore(step, like)[0])
    except (CheckpointError, ValueError) as error:
        messages.append(str(error))
        return None, ""


def _abstract(dtype: str, shape: list[int]) -> jax.ShapeDtypeStruct:
    return (
        jax.eval_shape(lambda: jax.random.key(0))
        if dtype.startswith("key<")
        else jax.ShapeDtypeStruct(tuple(shape), dtype)
    )


def flip_trial(
    source: Path, trial_folder: Path, truth: dict[int, str], randomness: random.Random
) -> dict[str, Any]:
    """One bit flipped in a copy of a run's checkpoints, then a restore and a verify. One time in
    four there is nothing to fall back to."""
    shutil.copytree(source / "checkpoints", trial_folder / "checkpoints")
    newest = max(truth)
    only_newest = randomness.random() < 0.25
    for step in truth if only_newest else ():
        if step != newest:
            shutil.rmtree(trial_folder / "checkpoints" / str(step))
    where = (
        trial_folder / "checkpoints" / str(newest)
        if randomness.random() < 0.75
        else trial_folder / "checkpoints"
    )
    path, bit = flip(where, randomness)
    damaged = int(path.relative_to(trial_folder / "checkpoints").parts[0])
    messages: list[str] = []
    step, digest = restored_digest(trial_folder, messages)
    if step is None:
        outcome = "refused" if only_newest and messages else "WRONG"
    elif digest != truth[step] or step == damaged:
        outcome = "SILENTLY WRONG"
    elif damaged == newest:
        outcome = (
            "fell back"
            if messages and f"falling back to step {step}" in messages[-1]
            else "NO WARNING"
        )
    else:
        outcome = "not the newest"
    status = verified(trial_folder)[0]
    file = str(path.relative_to(trial_folder / "checkpoints"))
    return {
        "file": file,
        "bit": bit,
        "restored": step,
        "messages": messages,
        "outcome": outcome,
        "verify": status,
        "ok": outcome.islower() and status == 74,
    }


def flip_run(
    source: Path, trial_folder: Path, golden_run: GoldenRun, randomness: random.Random
) -> dict[str, Any]:
    """One bit flipped in the newest checkpoint of a run that was stopped, which then goes on: it
    says so, and ends equal to the undisturbed one."""
    shutil.copytree(source, trial_folder)
    newest = max(committed.numbered(trial_folder / "checkpoints"))
    path, bit = flip(trial_folder / "checkpoints" / str(newest), randomness)
    before = verified(trial_folder)[0]
    status, output = finish("mlp", trial_folder)
    warnings = [line for line in output.splitlines() if "warning: step" in line]
    equal = (
        metrics_of(trial_folder) == golden_run.metrics
        and Checkpoints(trial_folder).digest(STEPS) == golden_run.digest
    )
    ok = status == 0 and before == 74 and bool(warnings) and equal
    row = {
        "file": str(path.relative_to(trial_folder / "checkpoints")),
        "bit": bit,
        "restored": resumed(output),
        "messages": warnings,
        "verify": before,
        "ok": ok,
    }
    return (
        row
        | {"outcome": "run fell back, equal" if ok else "RUN FAILED"}
        | ({} if ok else {"output": output[-2000:]})
    )


def stopped(recipe: str, folder: Path) -> None:
    """A run told to stop about half way."""
    process = subprocess.Popen(
        command(recipe, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    while (
        process.poll() is None and max(committed.numbered(folder / "checkpoints"), default=0) < 50
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    if (status := process.wait()) != 75:
        sys.exit(f"a run stopped by SIGTERM ended with status {status}, not 75")


def flips(trials: int, seed: int, folder: Path, runs: int) -> list[dict[str, Any]]:
    """The campaign of bit flips: `trials` restores, and `runs` whole runs."""
    golden_run = golden("mlp", folder / "golden-mlp")
    stopped("mlp", folder / "stopped-mlp")
    truth = {
        step: Checkpoints(golden_run.folder).digest(step)
        for step in committed.numbered(golden_run.folder / "checkpoints")
    }
    rows = []
    for trial in range(trials + runs):
        trial_folder, randomness = folder / f"trial-{trial}", random.Random(f"{seed} {trial}")
        found = (
            flip_trial(golden_run.folder, trial_folder, truth, randomness)
            if trial < trials
            else flip_run(folder / "stopped-mlp", trial_folder, golden_run, randomness)
        )
        rows.append({"trial": trial} | found)
        print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(trial_folder)
    return rows


def show_flips(rows: Sequence[dict[str, Any]]) -> None:
    """The table: what was hit, and what came of it."""
    kinds = Counter((_kind(row["file"]), row["outcome"], row["verify"]) for row in rows)
    print(f"\n{'file':16}  {'outcome':22}  {'verify':>6}  {'trials':>6}")
    for (kind, outcome, status), count in sorted(kinds.items()):
        print(f"{kind:16}  {outcome:22}  {status:>6}  {count:>6}")
    print(f"{len(rows)} flips, {sum(row['ok'] for row in rows)} ok")


def _kind(file: str) -> str:
    name = Path(file).name
    return (
        name
        if name in (manifest.MANIFEST, manifest.COMMIT)
        else "arrays"
        if "/d/" in file
        else "array metadata"
    )


@contextlib.contextmanager
def _scratch(folder: str) -> Iterator[Path]:
    if folder:
        Path(folder).mkdir(parents=True)
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="jaxtrain-faults-") as temporary:
        yield Path(temporary)


def main() -> int:
    """Reads the arguments, runs a campaign, and says how it went."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("campaign", choices=("kills", "flips"))
    parser.add_argument("--trials", type=int, default=None, help="how many (30 kills, 100 flips)")
    parser.add_argument("--runs", type=int, default=5, help="of flips: how many whole runs besides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", default="", help="a new folder that is kept; default: a temporary one"
    )
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with _scratch(options.folder) as folder:
        if options.campaign == "kills":
            rows = kills(30 if options.trials is None else options.trials, options.seed, folder)
            show_kills(rows)
        else:
            rows = flips(
                100 if options.trials is None else options.trials,
                options.seed,
                folder,
                options.runs,
            )
            show_flips(rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
