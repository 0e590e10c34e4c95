"""Warm starts: what --init_from takes of another run, by rules; against the arrays themselves and
interpolation written by hand."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from test_run import ROOT, quiet_environment, start, toy, wrong_at_start

from jaxtrain.checkpoints import positions, warm_start, weights_file
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.config import replaced
from jaxtrain.data.sources.synthetic import Synthetic
from jaxtrain.errors import UserError
from jaxtrain.horizon import Horizon
from jaxtrain.models import ViT
from jaxtrain.optimizers import SGD, ScheduleFreeSGD
from jaxtrain.runner import restore


class Normed(nn.Module):
    """A network with statistics of its own."""

    num_classes: int = 4
    trunk: str = "trunk"

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(8, name=self.trunk)(inputs.reshape(len(inputs), -1))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(self.num_classes, name="head")(nn.relu(x))


def data(num_classes: int = 4, side: int = 4) -> Synthetic:
    """A few images."""
    return Synthetic(
        shape=(side, side, 1),
        num_classes=num_classes,
        examples=32,
        test_examples=16,
        train="train",
        validation="",
        test="",
    )


QUICK: dict[str, Any] = {
    "data": data(),
    "model": Normed(),
    "optimizer": SGD(learning_rate=0.1),
    "augment": None,
    "clip_norm": None,
    "batch_size": 16,
    "steps": 4,
    "eval_every": Horizon(0, "steps"),
    "checkpoint_every": Horizon(2, "steps"),
    "offers": {},
}


def quick(workdir: Path, *argv: str, **changes: Any) -> int:
    """The status of a run of four steps with an average, two of them committed."""
    return start(workdir, *argv, **(QUICK | changes))


def stored(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a step, by the path under which they are stored."""
    checkpoints = Checkpoints(workdir)
    return checkpoints._read(step, checkpoints_tree(workdir, step))


def checkpoints_tree(workdir: Path, step: int) -> Any:
    return json.loads((workdir / "checkpoints" / str(step) / "MANIFEST.json").read_text())["tree"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with an average and batch statistics."""
    folder = tmp_path_factory.mktemp("source") / "run"
    assert quick(folder) == 0
    return folder


STILL = ("--steps=1", "--ema_decay=none", "--optimizer.learning_rate=1e-30")
"""One step that moves no parameter."""


def test_an_average_is_taken_where_there_is_one(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = stored(source, 4)
    assert not np.array_equal(old["ema/head/kernel"], old["params/head/kernel"])
    for word, part in (("auto", "ema"), ("raw", "params")):
        folder = tmp_path / word
        assert quick(folder, *STILL, f"--init_from={source}", f"--init_params={word}") == 0
        new = stored(folder, 1)
        for path in ("head/kernel", "head/bias", "trunk/kernel", "norm/scale"):
            assert np.array_equal(new[f"params/{path}"], old[f"{part}/{path}"]), (word, path)
    said = capsys.readouterr().out.replace("\n", " ")
    assert "parameters of step 4 (its average (ema_decay)); arrays: 8 taken" in said
    assert "parameters of step 4 (the raw ones, by --init_params=raw); arrays:" in said
    record = json.loads((tmp_path / "auto" / "run.json").read_text())["init"]
    assert (record["step"], record["params"]) == (4, "its average (ema_decay)")
    assert {row["what"] for row in record["arrays"]} == {"taken"} and len(record["arrays"]) == 8


def test_another_number_of_classes_is_refused_with_the_rule_that_works(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"data": data(7), "model": Normed(num_classes=7)}
    assert quick(tmp_path / "run", f"--init_from={source}", **changes) == 2
    assert not (tmp_path / "run").exists()
    refused = capsys.readouterr()
    assert refused.out == "", "no header comes before it"
    assert refused.err == (
        f"jaxtrain: error: --init_from={source}: checkpoint step 4 does not fit the model: missing:"
        " none, extra: none, shape: params/head/bias (4) vs (7), params/head/kernel (8,4) vs (8,7);"
        " to go on without: --init_rules='head=skip'\n"
    )
    again = "--init_rules=head=skip"
    assert quick(tmp_path / "run", *STILL, f"--init_from={source}", again, **changes) == 0
    new, old = stored(tmp_path / "run", 1), stored(source, 4)
    assert np.array_equal(new["params/trunk/kernel"], old["ema/trunk/kernel"])
    assert new["params/head/kernel"].shape == (8, 7) and new["params/head/kernel"].std() > 0
    shown = capsys.readouterr().out
    assert re.search(r"head/kernel +8×7 +1 +new", shown)
    assert re.search(r"head/kernel +8×4 +1 +skipped", shown)
    # a fresh head is that of a run without a warm start
    fresh = tmp_path / "fresh"
    assert quick(fresh, *STILL, **changes) == 0
    np.testing.assert_array_equal(stored(fresh, 1)["params/head/kernel"], new["params/head/kernel"])
    # it goes on by itself, although the source is gone, and its table stays
    record = json.loads((tmp_path / "run" / "run.json").read_text())["init"]
    gone = f"--init_from={source}"
    source_there = source.with_name("elsewhere")
    source.rename(source_there)
    try:
        assert quick(tmp_path / "run", "--steps=2", *STILL[1:], gone, again, **changes) == 0
    finally:
        source_there.rename(source)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["init"] == record


def test_statistics_come_along_under_the_new_name(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    rules = "--init_rules=trunk=stem,head=skip"
    mesh = "--mesh=data:2,fsdp:2"
    frozen = quick(folder, *STILL, f"--init_from={source}", rules, mesh, model=Normed(trunk="stem"))
    assert frozen == 0
    new, old = stored(folder, 1), stored(source, 4)
    assert np.array_equal(new["params/stem/kernel"], old["ema/trunk/kernel"])
    # one step moves the statistics by a hundredth
    mean = old["collections/batch_stats/norm/mean"]
    assert np.abs(mean).max() > 0
    np.testing.assert_allclose(new["collections/batch_stats/norm/mean"], mean, atol=0.05)


def test_schedule_free_runs_give_and_take_the_average(tmp_path: Path) -> None:
    """Optax's own evaluation is the judge; and the copy that the optimizer keeps follows."""
    free: dict[str, Any] = {"optimizer": ScheduleFreeSGD(learning_rate=0.5), "ema_decay": None}
    assert quick(tmp_path / "free", **free) == 0
    old = stored(tmp_path / "free", 4)
    states = {name: old[f"opt_state/{name}"] for name in ("b1", "weight_sum", "step_count")}
    judge = optax.contrib.ScheduleFreeState(
        z=old["opt_state/z/head/kernel"], max_lr=1.0, base_optimizer_state=(), **states
    )
    expected = optax.contrib.schedule_free_eval_params(judge, old["params/head/kernel"])
    assert quick(tmp_path / "warm", *STILL, f"--init_from={tmp_path}/free") == 0
    taken = stored(tmp_path / "warm", 1)["params/head/kernel"]
    np.testing.assert_allclose(taken, expected, rtol=1e-6)
    assert np.abs(taken - old["params/head/kernel"]).max() > 1e-4
    still = ("--steps=1", "--optimizer.learning_rate=1e-30")
    again = tmp_path / "again"
    assert quick(again, *still, f"--init_from={tmp_path}/free", **free) == 0
    new = stored(again, 1)
    np.testing.assert_allclose(new["opt_state/z/head/kernel"], taken, rtol=1e-6)


def by_hand(grid_HWD: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Bilinear interpolation with half-pixel centres, written as loops, for grids that grow."""
    height, width, _ = grid_HWD.shape
    found = np.zeros((rows, columns, grid_HWD.shape[2]))
    for row in range(rows):
        for column in range(columns):
            y = min(max((row + 0.5) * height / rows - 0.5, 0), height - 1)
            x = min(max((column + 0.5) * width / columns - 0.5, 0), width - 1)
            top, left = int(y), int(x)
            down, right = min(top + 1, height - 1), min(left + 1, width - 1)
            a, b = y - top, x - left
            found[row, column] = (
                (1 - a) * (1 - b) * grid_HWD[top, left]
                + (1 - a) * b * grid_HWD[top, right]
                + a * (1 - b) * grid_HWD[down, left]
                + a * b * grid_HWD[down, right]
            )
    return found


def test_positions_of_a_vit_are_interpolated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model = ViT(num_classes=4, patch=2, width=8, depth=1, heads=2)
    variables = nn.meta.unbox(model.init(jax.random.key(1), np.zeros((1, 4, 4, 1), np.float32)))
    small = {
        "/".join(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    weights_file.write(tmp_path / "small.safetensors", small, {})
    larger: dict[str, Any] = {"model": model, "data": data(side=8)}
    warm = [*STILL, f"--init_from={tmp_path}/small.safetensors"]
    assert quick(tmp_path / "warm", *warm, **larger) == 2
    line = (
        "shape: params/positions (1,5,8) vs (1,17,8); to go on without:"
        " --init_rules='positions=resize'"
    )
    assert line in capsys.readouterr().err
    assert quick(tmp_path / "warm", *warm, "--init_rules=positions=resize", **larger) == 0
    old = small["params/positions"]
    new = stored(tmp_path / "warm", 1)["params/positions"]
    np.testing.assert_array_equal(new[:, :1], old[:, :1])
    expected = by_hand(old[0, 1:].reshape(2, 2, 8).astype(np.float64), 4, 4)
    np.testing.assert_allclose(new[0, 1:].reshape(4, 4, 8), expected, atol=1e-6)
    shown = capsys.readouterr().out
    assert re.search(r"params/positions +1×17×8 +1 +resized +2x2", shown), shown
    assert "params/block0/attention/key/kernel" in shown


F32 = "float32"
OLD = {
    "params/body/kernel": [F32, [3, 4]],
    "params/head/kernel": [F32, [4, 10]],
    "params/head/bias": [F32, [10]],
    "params/pos_embed": [F32, [1, 17, 8]],
    "batch_stats/norm/mean": [F32, [4]],
}


def wanted(**changes: Any) -> dict[str, Any]:
    """Variables of a model with five classes, and other changes by path."""
    base = OLD | {"params/head/kernel": [F32, [4, 5]], "params/head/bias": [F32, [5]]}
    return base | {path.replace("__", "/"): spec for path, spec in changes.items()}


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    ("hed=skip", {}, "--init_rules: hed=skip: no path holds 'hed'; did you mean 'head'? (paths: "),
    (
        "head=skp",
        {},
        "--init_rules: head=skp: the new model has no params/skp/kernel; did you mean 'skip'?",
    ),
    (
        "head=skip,body=trunk",
        {},
        "--init_rules: body=trunk: the new model has no params/trunk/kernel (paths: params/body/",
    ),
    (r"head=skip,body=\3", {}, r"--init_rules: body=\3: no such group"),
    ("(=skip", {}, "--init_rules: '(' is not a regular expression"),
    (
        ".=skip",
        {},
        "the stored model: nothing is left to take; drop --init_rules, or the warm start",
    ),
    (
        "head=skip,pos_embed=resize:cubic",
        {},
        "'cubic' is unknown; valid: bilinear, bicubic, and two grids",
    ),
    (
        "head=skip,body=resize",
        {"params__body__kernel": [F32, [6, 4]]},
        "is for images, and the model sees none",
    ),
    ("head=resize", {}, "are no position embeddings of one width"),
    ("head/kernel=skip,head/bias=head/kernel", {}, "shape: params/head/kernel (10) vs (4,5)"),
    (
        "head=skip,pos_embed=norm/mean,params/norm=batch_stats/norm",
        {},
        "both become batch_stats/norm/mean; skip one of them first: '",
    ),
    (
        "head=skip",
        {"params__body__kernel": [F32, [4, 3]]},
        (
            "params/body/kernel looks transposed, and nothing is turned on the way; to go on"
            " without: --init_rules='head=skip,body=skip'"
        ),
    ),
    (
        "head=skip",
        {"params__body__kernel": ["int32", [3, 4]]},
        "params/body/kernel is float32, the model wants int32; to go on without:",
    ),
    (
        "head=skip",
        {"params__new__kernel": [F32, [2]]},
        (
            "missing params/new, extra: none, shape: none; to go on without:"
            " --init_rules='head=skip,new=skip'"
        ),
    ),
]


FOLLOWED: dict[str, str] = {
    "hed=skip": "head=skip",
    "head=skp": "head=skip",
    "head=skip,body=trunk": "head=skip,body=body",
    r"head=skip,body=\3": r"head=skip,(params)/(b)(ody)=\1/\2\3",
    "(=skip": "(head)=skip",
    ".=skip": "",
    "head=skip,pos_embed=resize:cubic": "head=skip,pos_embed=resize:bicubic:4x4:4x4",
    "head=skip,body=resize": "head=skip,body=skip",
    "head=resize": "head=skip",
}
"""The rules after what the lines say, where that is not the rules themselves."""


def follow(text: str, line: str) -> str:
    """The rules that a line says, or those of `FOLLOWED`."""
    if whole := re.search(r"--init_rules='([^']*)'", line):
        return whole[1]
    if first := re.search(r"one of them first: '([^']*)'", line):
        return f"{first[1]},{text}"
    return FOLLOWED[text]


def rules_of(text: str) -> tuple[tuple[str, str], ...]:
    """Rules as the flag reads them."""
    return tuple(
        (pattern, value)
        for pattern, _, value in (rule.rpartition("=") for rule in text.split(",") if rule)
    )


@pytest.mark.parametrize(("text", "changes", "line"), WRONG, ids=[row[0] for row in WRONG])
def test_rules_that_are_wrong(text: str, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as raised:
        warm_start.plan(OLD, wanted(**changes), rules_of(text))
    said = str(raised.value)
    assert line in said and "\n" not in said
    # the remedy, and that of the next thing that is wrong
    text = follow(text, said)
    try:
        plan = warm_start.plan(OLD, wanted(**changes), rules_of(text))
    except UserError as error:
        assert str(error) != said and ("drop --init_rules" in said or "both become" in said)
        plan = warm_start.plan(OLD, wanted(**changes), rules_of(follow(text, str(error))))
    assert plan.count("taken")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"params__head2__kernel": [F32, [2]], "params__ahead__kernel": [F32, [2]]},
        {"params__pos_embed": [F32, [1, 65, 8]]},
        {"params__body__kernel": [F32, [9, 4]], "params__body__bias": [F32, [4]]},
        {"params__norm__scale": [F32, [4]], "batch_stats__norm__mean": [F32, [5]]},
        {"params__a,b=c__k'": [F32, [4]]},
    ],
    ids=str,
)
def test_the_remedy_works_when_it_is_followed(changes: dict[str, Any]) -> None:
    new = wanted(**changes)
    images = (None, (32, 32))
    with pytest.raises(UserError) as raised:
        warm_start.plan(OLD, new, images=images)
    [remedy] = re.findall(r"--init_rules='([^']*)'", str(raised.value))
    plan = warm_start.plan(OLD, new, rules_of(remedy), images=images)
    fits = {path for path in new if path in OLD and OLD[path] == new[path]}
    taken = {row.path for row in plan.rows if row.what == "taken"}
    assert taken == fits, "what fits is taken"
    assert {row.path for row in plan.rows if row.what != "skipped"} == new.keys()


def test_dtypes_that_differ_are_said_and_cast() -> None:
    new = OLD | {"params/body/kernel": ["bfloat16", [3, 4]]}
    plan = warm_start.plan(OLD, new)
    assert plan.notes == ["1 array cast from float32 to bfloat16, e.g. params/body/kernel"]
    values = {path: np.full(shape, 1 / 3, dtype) for path, (dtype, shape) in OLD.items()}
    cast = plan.values(values)["params/body/kernel"]
    assert str(cast.dtype) == "bfloat16" and float(cast[0, 0]) == 0.333984375
    half = warm_start.plan(OLD, OLD | {"params/body/kernel": ["float16", [3, 4]]})
    with pytest.raises(UserError, match="params/body/kernel: values of float32 do not fit into"):
        half.values(values | {"params/body/kernel": np.full((3, 4), 1e6, np.float32)})


@pytest.mark.parametrize(
    ("word", "old", "new", "images", "said"),
    [
        (
            "resize",
            [1, 17, 8],
            [1, 65, 8],
            (None, (32, 32)),
            "4x4 -> 8x8 places, bilinear, 1 token",
        ),
        (
            "resize",
            [18, 8],
            [66, 8],
            (None, (32, 32)),
            "4x4 -> 8x8 places, bilinear, 2 tokens kept",
        ),
        ("resize", [1, 16, 8], [1, 8, 8], ((8, 8), (8, 16)), "4x4 -> 2x4 places, bilinear"),
        ("resize", [1, 16, 8], [1, 32, 8], ((8, 32), (8, 16)), "2x8 -> 4x8 places, bilinear"),
        ("resize:bicubic", [1, 4, 4, 8], [1, 6, 5, 8], (None, None), "4x4 -> 6x5 places, bicubic"),
        ("resize:2x8:4x4", [1, 17, 8], [1, 17, 8], (None, None), "2x8 -> 4x4 places, bilinear, 1"),
    ],
)
def test_grids_of_positions(
    word: str, old: list[int], new: list[int], images: Any, said: str
) -> None:
    resize = positions.Resize.between("pos", word, old, new, images=images)
    assert str(resize).startswith(said)
    values = np.random.default_rng(0).normal(size=old).astype(np.float32)
    found = resize.of(values)
    assert list(found.shape) == new and found.dtype == np.float32
    if resize.method == "bicubic" or resize.new[0] < resize.old[0] or resize.new[1] < resize.old[1]:
        grid = values.reshape(-1, 8)[resize.tokens :].reshape(*resize.old, 8)
        expected: Any = jax.image.resize(
            grid, (*resize.new, 8), "cubic" if resize.method == "bicubic" else "linear"
        )
    else:
        grid = values.reshape(-1, 8)[resize.tokens :].reshape(*resize.old, 8)
        expected = by_hand(grid.astype(np.float64), *resize.new)
    np.testing.assert_allclose(
        found.reshape(-1, 8)[resize.tokens :], np.asarray(expected).reshape(-1, 8), atol=1e-6
    )
    np.testing.assert_array_equal(
        found.reshape(-1, 8)[: resize.tokens], values.reshape(-1, 8)[: resize.tokens]
    )


@pytest.mark.parametrize(
    ("word", "old", "new", "images", "line", "followed"),
    [
        (
            *("resize", [1, 15, 8], [1, 65, 8], (None, (32, 32))),
            *("15 places are not a square grid", "resize:2x7:8x8"),
        ),
        (
            *("resize", [1, 17, 8], [1, 64, 8], (None, (32, 32))),
            *("have 0; both must have the same", "skip"),
        ),
        (
            *("resize:2x2", [1, 17, 8], [1, 65, 8], (None, (8, 8))),
            *("give no grid or two", "resize:4x4:8x8"),
        ),
        (
            *("resize:2x2:9x9", [1, 17, 8], [1, 65, 8], (None, (8, 8))),
            *("have 13 tokens beside it", "skip"),
        ),
        (
            *("resize", [1024, 8], [2048, 8], (None, None)),
            *("is for images, and the model sees none", "resize:32x32:32x64"),
        ),
    ],
)
def test_positions_without_a_grid(
    word: str, old: list[int], new: list[int], images: Any, line: str, followed: str
) -> None:
    """And the remedy of the line, followed: both grids, or left out."""
    with pytest.raises(UserError, match=re.escape(line)) as raised:
        positions.Resize.between("pos", word, old, new, images=images)
    assert ("skip it" if followed == "skip" else "grid") in str(raised.value)
    stored, new_model = (
        {"params/pos": [F32, shape], "params/a": [F32, [2]]} for shape in (old, new)
    )
    plan = warm_start.plan(stored, new_model, (("pos", followed),), images=images)
    assert plan.count("resized") == (followed != "skip")


FLAGS: list[tuple[list[str], str]] = [
    (
        ["--init_rules=head=skip"],
        "--init_rules=head=skip: belongs to --init_from, which is not given",
    ),
    (["--init_params=raw"], "--init_params=raw: belongs to --init_from, which is not given"),
    (["--init_checkpoint=best"], "--init_checkpoint=best: belongs to --init_from, which is not"),
    (
        ["--init_from={source}", "--init_rules=head"],
        "--init_rules='head': item 1 ('head'): not a rule",
    ),
    (
        ["--init_from={source}", "--init_checkpoint=3"],
        (
            "--init_from={source}: --init_checkpoint=3: no such checkpoint; {source}/checkpoints"
            " holds 2, 4"
        ),
    ),
    (["--init_from={source}", "--init_checkpoint=bst"], "--init_checkpoint='bst': must be best,"),
    (
        ["--init_from={source}", "--init_checkpoint=best"],
        "--init_from={source}: --init_checkpoint=best: no checkpoint has a validation score;",
    ),
    (
        ["--init_from={source}/checkpoints/4", "--init_checkpoint=2"],
        "--init_from={source}/checkpoints/4: is one checkpoint already; drop --init_checkpoint=2",
    ),
    (["--init_from={source}/run.json"], "header too large); give a workdir, WORKDIR"),
]


FOLLOWED_FLAGS = [
    "--init_from={source} --init_rules=head=skip",
    "--init_from={source} --init_params=raw",
    "--init_from={source} --init_checkpoint=4",
    "--init_from={source} --init_rules=head=skip",
    "--init_from={source} --init_checkpoint=2",
    "--init_from={source} --init_checkpoint=last",
    "--init_from={source} --init_checkpoint=4",
    "--init_from={source}/checkpoints/4",
    "--init_from={source}",
]
"""What the lines of `FLAGS` say to write instead, in their order."""


@pytest.mark.parametrize(
    ("argv", "line", "followed"),
    [(*row, followed) for row, followed in zip(FLAGS, FOLLOWED_FLAGS, strict=True)],
    ids=[" ".join(row[0]) for row in FLAGS],
)
def test_flags_that_are_wrong(
    argv: list[str],
    line: str,
    followed: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [text.format(source=source) for text in argv]
    assert quick(tmp_path / "run", *argv) == 2
    said = capsys.readouterr().err
    assert line.format(source=source) in said and said.count("\n") == 1
    mended = followed.format(source=source).split()
    assert mended != argv and wrong_at_start(tmp_path / "run", *mended, **QUICK) == ""


def test_places_of_a_source(source: Path, tmp_path: Path) -> None:
    """A step, a copy of a step under another name, the folder of all steps, an older step."""
    shutil.copytree(source / "checkpoints" / "2", tmp_path / "copied")
    old = {step: stored(source, step)["ema/head/kernel"] for step in (2, 4)}
    run = toy(**QUICK)
    rows: list[tuple[str, str, int]] = [
        (str(source / "checkpoints" / "2"), "last", 2),
        (str(tmp_path / "copied"), "last", 2),
        (str(source / "checkpoints"), "last", 4),
        (str(source), "2", 2),
    ]
    for place, step, expected in rows:
        changed = replaced(run, {"init_from": place, "init_checkpoint": step})
        found, _ = restore._stored(changed, "--init_from")
        assert found.step == expected
        np.testing.assert_array_equal(found.read()["params/head/kernel"], old[expected])


@pytest.mark.slow
def test_two_processes_take_the_same(tmp_path: Path) -> None:
    """Process 0 chooses the step, and each places its own parts of the arrays."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    small = ["--model=mlp", "--model.widths=8", "--batch_size=32", "--notensorboard", "--noreport"]
    command = [sys.executable, str(ROOT / "experiments" / "digits.py"), *small, "--platform=cpu"]
    environment = quiet_environment()
    first = [*command, "--steps=5", "--mesh=data:1", f"--workdir={tmp_path}/a"]
    subprocess.run(first, env=environment, check=True, capture_output=True)
    warm = [
        *("--steps=1", "--ema_decay=none", "--optimizer.learning_rate=1e-30"),
        *(f"--workdir={tmp_path}/b", f"--init_from={tmp_path}/a", "--init_rules=head=skip"),
        *("--mesh=fsdp:-1", "--processes=2", f"--coordinator=localhost:{port}"),
    ]
    both = [
        subprocess.Popen([*command, *warm, f"--process={index}"], env=environment)
        for index in range(2)
    ]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    old, new = stored(tmp_path / "a", 5), stored(tmp_path / "b", 1)
    assert np.array_equal(old["ema/hidden0/kernel"], new["params/hidden0/kernel"])
    assert not np.array_equal(old["ema/head/kernel"], new["params/head/kernel"])
