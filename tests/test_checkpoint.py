"""Checkpoints against real damage: what is restored is what was saved, or it is said why not."""

import ctypes
import json
import mmap
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain import durable_files
from jaxtrain.checkpoints import (
    arrays as host_arrays,
)
from jaxtrain.checkpoints import (
    checkpoints as checkpoint,
)
from jaxtrain.checkpoints import (
    committed,
    manifest,
)
from jaxtrain.checkpoints.checkpoints import (
    CheckpointError,
    Checkpoints,
    NonFinite,
    digest,
    verify_command,
)

LOOP = {"metrics_bytes": 120, "interval": [1, 2.5], "best": None}


def small(step: int) -> dict[str, Any]:
    return {
        "step": np.int32(step),
        "params": {
            "w": np.full((3, 4), step, np.float32),
            "b": np.arange(5.0, dtype=np.float32) * step,
        },
    }


def filled(workdir: Path, steps: tuple[int, ...] = (70, 75, 80), **options: Any) -> Checkpoints:
    checkpoints = Checkpoints(workdir, **({"keep": 9, "run_id": "r1"} | options))
    for step in steps:
        checkpoints.save(step, small(step), LOOP, wait=True)
    return checkpoints


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)
        ),
        state,
    )


def assert_equal(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert digest(got) == digest(expected)


def mesh(**axes: int) -> Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def full_state(mesh_: Mesh, *axes: str) -> dict[str, Any]:
    def place(array: Any, *axes: Any) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh_, P(*axes)))

    params = {
        "w": place(np.arange(32.0, dtype=np.float32).reshape(8, 4), *axes),
        "half": place(jnp.arange(3, dtype=jnp.bfloat16)),
    }
    return {
        "params": params,
        "opt_state": jax.tree.map(place, optax.adamw(1e-3).init(params)),
        "collections": {},
        "ema": None,
        "hyper": {
            "optimizer.learning_rate": place(np.float32(0.1)),
            "clip": place(np.float32(np.inf)),
        },
        "key": place(jax.random.key(3)),
        "keys": place(jax.random.split(jax.random.key(4, impl="rbg"), 2)),
        "odd": [
            place(np.zeros((0, 3), np.int8)),
            place(np.array([True, False])),
            place(np.float16(1.5)),
            place(np.uint8(255)),
        ],
    }


# What is saved is what is restored.


def test_every_kind_of_leaf_comes_back_on_another_mesh(tmp_path: Path) -> None:
    saved = full_state(mesh(data=8), "data")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, saved, LOOP, wait=True)
    like = abstract(full_state(mesh(data=2, fsdp=2), "fsdp", "data"))
    state, loop = checkpoints.restore(3, like)
    assert loop == LOOP
    assert_equal(state, saved)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
        lambda leaf: leaf.sharding, like
    )
    assert jax.random.key_impl(state["keys"]) == "rbg"
    assert checkpoints.digest(3) == digest(saved)


def test_the_copy_is_its_own_when_the_step_donates(tmp_path: Path) -> None:
    update = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 2 + 1, state), donate_argnums=0)
    state = update({"params": jnp.arange(100_000.0), "step": jnp.int32(1)})
    expected = jax.tree.map(np.array, state)
    address = state["params"].unsafe_buffer_pointer()
    checkpoints = Checkpoints(tmp_path)
    with jax.transfer_guard("disallow"):
        checkpoints.save(1, state, {})
        for _ in range(5):
            state = update(state)
    # the update did overwrite what was saved
    assert state["params"].unsafe_buffer_pointer() == address
    checkpoints.wait()
    assert_equal(checkpoints.restore(1, abstract(expected))[0], jax.tree.map(jnp.asarray, expected))


def test_restored_arrays_may_be_donated(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, (5,))
    state, _ = checkpoints.restore(5, abstract(small(5)))
    update = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    for _ in range(3):
        state = update(state)
    assert float(state["params"]["w"][0, 0]) == 8.0
    assert_equal(checkpoints.restore(5, abstract(small(5)))[0], small(5))


def test_the_digest_depends_on_paths_dtypes_shapes_and_bytes_only() -> None:
    base = {"a": np.zeros((2, 3), np.float32), "b": np.int32(1)}
    sharded = jax.device_put(base, NamedSharding(mesh(data=2), P()))
    assert digest(base) == digest(sharded) == digest(dict(reversed(base.items())))
    others = [
        base | {"a": np.zeros((3, 2), np.float32)},
        base | {"a": np.zeros((2, 3), np.int32)},
        {"c": base["a"], "b": base["b"]},
        base | {"a": -base["a"]},
    ]
    assert len({digest(base), *map(digest, others)}) == 5


@pytest.mark.parametrize(
    "state, words",
    [
        ({"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)}, "two arrays have this path"),
        ({"..": np.zeros(1)}, r"path '\.\.' cannot be stored"),
        (np.zeros(1), "path '' cannot be stored"),
    ],
)
def test_paths_that_cannot_be_stored(tmp_path: Path, state: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Checkpoints(tmp_path).save(1, state, {})


# Damage.


def test_a_hundred_bit_flips_none_silent(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path / "run")
    files = sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file())
    rng = random.Random(0)
    fallen = 0
    for trial in range(100):
        # Every second file is chosen by name and not by size: most bytes are in few files, but
        # small files decide what is read.
        path = (
            rng.choice(files)
            if trial % 2
            else rng.choices(files, [path.stat().st_size for path in files])[0]
        )
        whole = path.read_bytes()
        bit = rng.randrange(len(whole) * 8)
        path.write_bytes(
            whole[: bit // 8] + bytes([whole[bit // 8] ^ (1 << bit % 8)]) + whole[bit // 8 + 1 :]
        )
        struck = int(path.relative_to(checkpoints.folder).parts[0])
        said: list[str] = []
        step = checkpoints.newest_verified(said.append)
        assert step is not None
        assert_equal(checkpoints.restore(step, abstract(small(step)))[0], small(step))
        if struck == 80:
            assert step == 75 and re.fullmatch(r"step 80: .+; falling back to step 75", said[0]), (
                said
            )
            fallen += 1
        else:
            assert step == 80 and not said
            with pytest.raises(CheckpointError, match=f"^step {struck}: "):
                checkpoints.restore(struck, abstract(small(struck)))
        assert verify_command(tmp_path / "run") == 74
        path.write_bytes(whole)
    assert fallen > 20
    assert verify_command(tmp_path / "run") == 0


def payload_file(folder: Path) -> Path:
    return max(
        (path for path in (folder / "state").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )


def truncate(folder: Path) -> None:
    os.truncate(payload_file(folder), 100)


def zero(folder: Path) -> None:
    path = payload_file(folder)
    path.write_bytes(bytes(path.stat().st_size))


def append(folder: Path) -> None:
    with payload_file(folder).open("ab") as file:
        file.write(b"x")


def swap(folder: Path) -> None:
    one, two = folder / "state" / "_METADATA", folder / "state" / "manifest.ocdbt"
    one.rename(folder / "spare")
    two.rename(one)
    (folder / "spare").rename(two)


def transplant(folder: Path) -> None:
    """Files of another step, whole in themselves."""
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.parent / "75" / "state", folder / "state")


def rename_older(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "75", folder)


def make_folder_of_file(folder: Path) -> None:
    path = payload_file(folder)
    path.unlink()
    path.mkdir()


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def link_out(folder: Path) -> None:
    path = payload_file(folder)
    path.unlink()
    path.symlink_to("/etc/passwd")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "state" / "pipe")


def rewrite_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A hostile maker's manifest, with a COMMIT that fits it."""

    def damage(folder: Path) -> None:
        record = json.loads((folder / "MANIFEST.json").read_text())
        change(record)
        text = json.dumps(record).encode()
        (folder / "MANIFEST.json").write_bytes(text)
        (folder / "COMMIT").write_bytes(manifest._commit_of(text))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, r"state/\S+: 100 bytes, not \d+"),
    "zeroed": (zero, r"state/\S+: checksum mismatch"),
    "appended": (append, r"state/\S+: \d+ bytes, not \d+"),
    "swapped": (swap, r"state/\S+: \d+ bytes, not \d+ \(and 1 more\)"),
    "transplanted": (transplant, r"state/\S+: .+"),
    "another step": (rename_older, r"MANIFEST.json: is of step 75; was the folder renamed\?"),
    "missing file": (lambda folder: payload_file(folder).unlink(), r"state/\S+: missing"),
    "extra file": (
        lambda folder: (folder / "state" / "new\nline").touch(),
        r"'state/new\\nline': not in the manifest",
    ),
    "folder for file": (make_folder_of_file, r"state/\S+: missing"),
    "no COMMIT": (lambda folder: (folder / "COMMIT").unlink(), "no COMMIT"),
    "empty COMMIT": (
        lambda folder: (folder / "COMMIT").write_text(""),
        "COMMIT: does not match MANIFEST.json",
    ),
    "huge COMMIT": (
        lambda folder: (folder / "COMMIT").write_text("0" * 9999),
        "COMMIT: 9999 bytes, more than the 1024 it may have; refused",
    ),
    "no manifest": (lambda folder: (folder / "MANIFEST.json").unlink(), "no MANIFEST.json"),
    "empty folder": (empty_folder, "no COMMIT"),
    "file for folder": (
        lambda folder: (shutil.rmtree(folder), folder.touch()),
        "is a file, not a directory",
    ),
    "symlink": (link_out, r"holds symlink state/\S+ -> /etc/passwd; refused"),
    "pipe": (pipe, "holds special file state/pipe; refused"),
    "other format": (
        rewrite_manifest(lambda record: record.update(format=99)),
        r"MANIFEST.json: not of format 1; made by another version of jaxtrain\?",
    ),
    "no tree": (
        rewrite_manifest(lambda record: record.update(tree=[])),
        "MANIFEST.json: does not describe a checkpoint",
    ),
    "odd tree": (
        rewrite_manifest(lambda record: record["tree"].update(step=["int32", [-1]])),
        "MANIFEST.json: does not describe a checkpoint",
    ),
    "names outside": (
        rewrite_manifest(lambda record: record["files"].update({"../../x": [0, ""]})),
        r"\.\./\.\./x: missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_step_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    checkpoints = filled(tmp_path, (75, 80))
    damage, words = DAMAGES[name]
    damage(checkpoints.folder / "80")
    said: list[str] = []
    assert checkpoints.newest_verified(said.append) == 75
    assert len(said) == 1 and re.fullmatch(f"step 80: {words}; falling back to step 75", said[0]), (
        said
    )
    with pytest.raises(CheckpointError, match="^step 80: "):
        checkpoints.restore(80, abstract(small(80)))
    assert verify_command(tmp_path) == 74
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"digest {digest(small(75))}" and any(
        line.startswith("step 80: ") for line in lines
    )
    # Going on from 75, the run comes to 80 again: what is there is set aside, not overwritten, and
    # the workdir is whole again.
    checkpoints.save(80, small(80), LOOP, wait=True)
    assert checkpoints.newest_verified(said.append) == 80 and len(said) == 1
    assert verify_command(tmp_path) == 0
    assert len(list(checkpoints.folder.glob("damaged-80-*"))) == 1


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda tree: tree.update(step=["int32", [10**12]]),
            r"declares \d+ bytes of arrays, this machine has \d+ bytes of memory; refused",
        ),
        (
            lambda tree: tree.update(step=["int32", [7]]),
            "its arrays are not those of its manifest; refused",
        ),
        (
            lambda tree: tree.update(more=["int32", [7]]),
            "its arrays are not those of its manifest; refused",
        ),
        (
            lambda tree: tree.update(step=["object", []]),
            "its arrays are not those of its manifest; refused",
        ),
        (lambda tree: tree.update(step=["no such dtype", []]), ".+"),
    ],
)
def test_a_manifest_that_lies_about_the_arrays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, words: str
) -> None:
    checkpoints = filled(tmp_path, (75, 80))
    rewrite_manifest(lambda record: change(record["tree"]))(checkpoints.folder / "80")
    assert verify_command(tmp_path) == 74
    said = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(f"step 80: state: {words}", line) for line in said)
    assert said[-1] == f"digest {digest(small(75))}"
    with pytest.raises(
        ValueError,
        match="does not fit the model|is object, model wants|is no such dtype, model wants",
    ):
        checkpoints.restore(80, abstract(small(80)))


def test_when_all_are_damaged_each_is_listed(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, (75, 80))
    truncate(checkpoints.folder / "75")
    (checkpoints.folder / "80" / "COMMIT").unlink()
    for resume in ("auto", "must"):
        with pytest.raises(
            CheckpointError,
            match=(
                r"no checkpoint verifies \(step 80: no COMMIT; step 75: state/\S+: 100 bytes, not"
                r" \d+\); "
            ),
        ):
            checkpoints.resume_step(resume, pytest.fail)
    assert checkpoints.resume_step("never", pytest.fail) is None
    assert verify_command(tmp_path) == 74


def test_several_damaged_ones_fall_one_after_the_other(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    (checkpoints.folder / "9999").mkdir()
    zero(checkpoints.folder / "80")
    said: list[str] = []
    assert checkpoints.resume_step("auto", said.append) == 75
    assert said[0] == "step 9999: no COMMIT; falling back to step 80"
    assert said[1].endswith("checksum mismatch; falling back to step 75")
    # 80 has its COMMIT: only reading every byte shows the damage
    assert checkpoints.steps() == [70, 75, 80]


def test_names_that_are_not_ours_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.resume_step("auto", pytest.fail) is None
    with pytest.raises(
        ValueError, match=f"^--resume=must: no committed checkpoint in {tmp_path}/checkpoints$"
    ):
        checkpoints.resume_step("must", pytest.fail)
    assert verify_command(tmp_path) == 2 and "no committed checkpoint in" in capsys.readouterr().err
    junk = ["abc", "5.tmp", "007", "-3", "1e3", ".tmp-other", "7.orbax-checkpoint-tmp"]
    for name in junk:
        (checkpoints.folder / name).mkdir(parents=True)
    # of a killed process of ours
    (checkpoints.folder / ".jaxtrain-tmp-9-1" / "state").mkdir(parents=True)
    assert checkpoints.resume_step("auto", pytest.fail) is None
    filled(tmp_path, (1, 2, 3), keep=1)
    assert sorted(os.listdir(checkpoints.folder)) == sorted([*junk, "3"])
    assert verify_command(tmp_path) == 0


# Another model's state.


@pytest.mark.parametrize(
    "like, line",
    [
        (
            {
                "params": {
                    "emb": ((6, 2), "float32"),
                    "l12": {"a": ((2,), "float32"), "b": {"c": ((), "float32")}},
                },
                "step": ((), "int32"),
            },
            (
                "checkpoint step 80 does not fit the model: missing params/l12 (2 arrays), extra:"
                " none, shape: params/emb (5,2) vs (6,2)"
            ),
        ),
        (
            {"params": {"emb": ((5, 2), "float32")}},
            "checkpoint step 80 does not fit the model: missing: none, extra: step, shape: none",
        ),
        (
            {"params": {"emb": ((5, 2), "bfloat16")}, "step": ((), "int32")},
            (
                "checkpoint params/emb is float32, model wants bfloat16; use the model of that run,"
                " or a new workdir"
            ),
        ),
        (
            {"params": {"emb": ((5, 2), "int32")}, "step": ((), "int32")},
            (
                "checkpoint params/emb is float32, model wants int32; use the model of that run, or"
                " a new workdir"
            ),
        ),
    ],
)
def test_a_state_that_does_not_fit(tmp_path: Path, like: Any, line: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(
        80, {"params": {"emb": np.zeros((5, 2), np.float32)}, "step": np.int32(1)}, {}, wait=True
    )
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(*leaf), like, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        checkpoints.restore(80, shapes)


def test_a_part_of_a_state(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, (80,))
    like = {"params": abstract(small(80)["params"])}
    with pytest.raises(ValueError, match="missing: none, extra: step, shape: none"):
        checkpoints.restore(80, like)
    assert_equal(checkpoints.restore(80, like, partial=True)[0], {"params": small(80)["params"]})
    with pytest.raises(ValueError, match="missing ema, extra: none, shape: none"):
        checkpoints.restore(80, like | {"ema": like["params"]["w"]}, partial=True)


def test_a_key_of_another_kind_does_not_fit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"key": jax.random.key(0)}, {}, wait=True)
    with pytest.raises(ValueError, match=r"shape: key \(2\) vs \(4\)"):
        checkpoints.restore(1, abstract({"key": jax.random.key(0, impl="rbg")}))
    with pytest.raises(ValueError, match="checkpoint key is key<fry>, model wants uint32"):
        checkpoints.restore(1, abstract({"key": jnp.zeros(2, jnp.uint32)}))


# What is kept.


def listed(checkpoints: Checkpoints) -> list[int]:
    return committed.numbered(checkpoints.folder)


def test_last_best_and_every(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=40, run_id="r1")
    scores = {10: 0.5, 20: 0.9, 30: None, 40: 0.9, 50: 0.1, 60: float("nan"), 70: 0.3, 100: 0.2}
    for step, score in scores.items():
        checkpoints.save(step, small(step), {}, metric=score)
        checkpoints.wait()
    assert checkpoints.steps() == listed(checkpoints) == [20, 40, 70, 100]
    assert checkpoints.best() == 20
    checkpoints.save(110, small(110), {}, metric=0.95, wait=True)
    assert listed(checkpoints) == [40, 100, 110] and checkpoints.best() == 110


def test_what_is_not_of_this_run_is_never_deleted(tmp_path: Path) -> None:
    filled(tmp_path, (1, 2), run_id="another")
    filled(tmp_path, (500,))
    checkpoints = filled(tmp_path, (3, 4, 5), keep=1)
    (checkpoints.folder / "6").mkdir()
    checkpoints.save(7, small(7), {}, wait=True)
    # 500 is this run's, but of a later step: whoever put it there must say what it is.
    assert listed(checkpoints) == [1, 2, 6, 7, 500]


def test_nothing_goes_before_its_successor_is_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = filled(tmp_path, (1,), keep=1)
    publish = durable_files.publish

    def publish_badly(temporary: Path, path: Path) -> None:
        truncate(temporary)
        publish(temporary, path)

    monkeypatch.setattr(durable_files, "publish", publish_badly)
    with pytest.raises(
        CheckpointError, match=r"^step 2: written, but reads back wrong \(state/\S+: 100 bytes"
    ):
        checkpoints.save(2, small(2), {}, wait=True)
    assert listed(checkpoints) == [1, 2] and checkpoints.newest_verified(lambda line: None) == 1


def test_the_same_commit_again_is_no_work_and_another_is_refused(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, (80,))
    before = (checkpoints.folder / "80").stat()
    checkpoints.save(80, small(80), LOOP, wait=True)
    assert (checkpoints.folder / "80").stat().st_ino == before.st_ino
    for state, loop in ((small(81), LOOP), (small(80), {})):
        with pytest.raises(
            CheckpointError, match="holds another state of that step; use another --workdir"
        ):
            checkpoints.save(80, state, loop, wait=True)
    assert_equal(checkpoints.restore(80, abstract(small(80)))[0], small(80))


# Failing, and saying so.


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_finite_is_not_committed(tmp_path: Path, value: float, dtype: str) -> None:
    checkpoints = filled(tmp_path, (1,))
    state = {
        "params": {"w": jnp.zeros(3)},
        "opt_state": [{"nu": jnp.array([0.0, value], dtype)}],
        "hyper": {"clip": jnp.float32(np.inf)},
    }
    checkpoints.save(2, state, {})
    with pytest.raises(
        NonFinite, match="^step 2: not saved: opt_state/0/nu holds NaN or infinity$"
    ):
        checkpoints.wait()
    assert os.listdir(checkpoints.folder) == ["1"]
    checkpoints.save(3, state | {"opt_state": []}, {}, wait=True)


def test_an_error_in_the_background_is_raised_once_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = filled(tmp_path, (1,))

    def fail(folder: Path, arrays: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "half").write_text("x")
        raise ValueError("RESOURCE_EXHAUSTED: pages\n of text [os_error_code='28']")

    monkeypatch.setattr(host_arrays, "write", fail)
    for call in (
        checkpoints.check,
        checkpoints.wait,
        checkpoints.close,
        lambda: checkpoints.save(3, small(3), {}),
    ):
        checkpoints.save(2, small(2), {})
        checkpoints._thread.join()  # type: ignore[union-attr]
        with pytest.raises(
            CheckpointError, match="^step 2: not saved in .+/checkpoints: No space left on device$"
        ):
            call()
        checkpoints.check()
        # nothing half written stays to fill the disk
        assert os.listdir(checkpoints.folder) == ["1"]


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = filled(tmp_path, (1,), keep=2)
    like = {"params": jax.ShapeDtypeStruct((300_000_000,), jnp.float32)}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 1_200_000_000)
    )
    with pytest.raises(
        ValueError,
        match=(
            r": 1\.2 GB free, needs 2\.4 GB \(2 checkpoints of 1\.2 GB\); lower --keep or free"
            r" space$"
        ),
    ):
        checkpoints.check_space(like)
    with pytest.raises(
        ValueError,
        match=(
            r"--workdir=.*: 1\.2 GB free, needs 3\.6 GB \(3 checkpoints of 1\.2 GB\); lower --keep"
            r" or free space$"
        ),
    ):
        Checkpoints(tmp_path / "new", keep=2).check_space(like)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 10**6)
    )
    with pytest.raises(
        CheckpointError,
        match=r"^step 2: not saved: 1\.0 MB free, needs 1\.0 MB in .*; lower --keep or free space$",
    ):
        checkpoints.save(2, small(2), {}, wait=True)


def test_a_folder_that_vanishes_while_running(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, (1,))
    for again in (False, True):
        shutil.rmtree(checkpoints.folder)
        if again:
            # of the same name, and on many file systems it would be of the same inode
            checkpoints.folder.mkdir()
        with pytest.raises(
            CheckpointError, match="was removed or replaced while the run was going"
        ):
            checkpoints.save(2, small(2), {}, wait=True)
        checkpoints.folder.mkdir(exist_ok=True)


def test_a_hung_disk_does_not_hang_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(host_arrays, "write", lambda folder, arrays: release.wait())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(1), {})
    with pytest.raises(
        CheckpointError, match="still writing after 0 s; the newest committed checkpoint is whole"
    ):
        checkpoints.close(0.1)
    release.set()
    checkpoints._thread.join()  # type: ignore[union-attr]


def test_saves_return_early_and_never_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, active, most = host_arrays.write, [], []

    def slow(folder: Path, arrays: Any) -> None:
        active.append(folder)
        most.append(len(active))
        time.sleep(0.2)
        write(folder, arrays)
        active.remove(folder)

    monkeypatch.setattr(host_arrays, "write", slow)
    checkpoints = filled(tmp_path, (1,))
    start = time.monotonic()
    checkpoints.save(2, small(2), {})
    assert time.monotonic() - start < 0.1
    checkpoints.save(3, small(3), {})
    assert time.monotonic() - start > 0.2
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3] and max(most) == 1


def test_what_json_cannot_hold_is_said_at_once(tmp_path: Path) -> None:
    for loop in ({"x": float("nan")}, {"x": np.zeros(1)}):
        with pytest.raises((TypeError, ValueError), match="JSON"):
            Checkpoints(tmp_path).save(1, small(1), loop)


# Durability: the order in which things reach the disk.


def test_all_is_forced_to_the_disk_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = filled(tmp_path, (1,), keep=1)
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_rename(old: Any, new: Any, **rest: Any) -> None:
        if Path(new).parent == checkpoints.folder:
            events.append(("rename", f"{Path(old).name} {Path(new).name}"))
        rename(old, new, **rest)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    checkpoints.save(2, small(2), {}, wait=True)
    temporary = checkpoints.folder / f".jaxtrain-tmp-2-{os.getpid()}"
    named = events.index(("rename", f"{temporary.name} 2"))
    # Every file, then every folder from the deepest up, then the name, then the parent, and only
    # then does the old one go.
    before = [path for kind, path in events[:named] if kind == "fsync"]
    whole = checkpoints.folder / "2"
    for path in whole.rglob("*"):
        assert str(temporary / path.relative_to(whole)) in before
    assert before[-1] == str(temporary)
    folders = [
        path
        for path in before
        if path == str(temporary) or (whole / Path(path).relative_to(temporary)).is_dir()
    ]
    assert before[-len(folders) :] == folders
    assert events[named + 1] == ("fsync", str(checkpoints.folder))
    (deleted,) = [
        index
        for index, (kind, what) in enumerate(events)
        if kind == "rename" and what.startswith("1 .jaxtrain-tmp-1-")
    ]
    assert deleted > named + 1


def test_json_is_replaced_whole_and_durably(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    durable_files.write_json(path, {"a": 1})
    events: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append(f"{kind} {json.loads(path.read_text())['a']}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    durable_files.write_json(path, {"a": 2})
    # the new text is durable while the old name still says 1
    assert events == ["file 1", "folder 2"]
    assert os.listdir(tmp_path) == ["run.json"]
    with pytest.raises(ValueError, match="JSON"):
        durable_files.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 2}


# Killed at any moment.

LOOP_CODE = """
import sys
from pathlib import Path
import jax
import numpy as np
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.checkpoints.lock import Lock

workdir, total = Path(sys.argv[1]), int(sys.argv[2])
state = {"step": np.int32(0), "params": np.linspace(0, 1, 5000, dtype=np.float32)}
with Lock(workdir):
    checkpoints = Checkpoints(workdir, keep=2, run_id="r1")
    step = checkpoints.resume_step("auto", lambda line: sys.exit(f"fell back: {line}")) or 0
    if step:
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        state = jax.tree.map(np.asarray, checkpoints.restore(step, like)[0])
    print("resumed", step, flush=True)
    while step < total:
        step += 1
        state = {"step": np.int32(step), "params": np.sin(state["params"] * 3 + np.float32(step))}
        checkpoints.save(step, state, {"at": step}, metric=float(state["params"][0]))
    checkpoints.close()
    print("done", flush=True)
"""


def run_until_killed(workdir: Path, total: int, seconds: float | None) -> list[str]:
    """Runs the loop; kills it so long after it has resumed."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(checkpoint.__file__).parents[1]),
        "XLA_FLAGS": "",
    }
    command = [sys.executable, "-c", textwrap.dedent(LOOP_CODE), str(workdir), str(total)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        first = process.stdout.readline().strip()
        if seconds is not None:
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")
    assert process.returncode in (0, -signal.SIGKILL)
    return [first, *filter(None, rest)]


def kill_and_restart(workdir: Path, kills: int, total: int, golden: str) -> None:
    rng = random.Random(kills)
    seen = 0
    for _ in range(kills):
        newest = max(committed.numbered(workdir / "checkpoints"), default=0)
        assert newest >= seen
        lines = run_until_killed(workdir, total, rng.uniform(0, 1.0))
        # every numbered folder is a commit: none is half there, and none is lost
        assert lines[0] == f"resumed {newest}"
        seen = newest
    assert run_until_killed(workdir, total, None)[-1] == "done"
    checkpoints = Checkpoints(workdir)
    assert checkpoints.digest(total) == golden
    assert verify_command(workdir) == 0
    assert not list(checkpoints.folder.glob(".jaxtrain-tmp-*"))


def golden_digest(total: int) -> str:
    params = np.linspace(0, 1, 5000, dtype=np.float32)
    for step in range(1, total + 1):
        params = np.sin(params * 3 + np.float32(step))
    return digest({"step": np.int32(total), "params": params})


def test_killed_and_restarted_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    kill_and_restart(tmp_path, kills=3, total=15, golden=golden_digest(15))


@pytest.mark.slow
def test_thirty_kills(tmp_path: Path) -> None:
    kill_and_restart(tmp_path, kills=30, total=200, golden=golden_digest(200))


def share_in_page_cache(path: Path) -> float:
    """How much of a file the system's page cache holds."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | 2)
    pages = -(-len(mapped) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    assert (
        ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), len(mapped), found) == 0
    )
    return sum(page & 1 for page in found) / pages


def test_what_was_saved_is_read_back_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not from the memory in which the system keeps what was just written."""
    (tmp_path / "probe").write_bytes(bytes(1 << 20))
    assert share_in_page_cache(tmp_path / "probe") == 1
    durable_files.fsync(tmp_path / "probe")
    manifest.evict_from_page_cache(tmp_path)
    if share_in_page_cache(tmp_path / "probe"):
        pytest.skip("this file system keeps its files in memory")
    seen: dict[str, float] = {}
    verify = committed.verify

    def look(folder: Path, step: int, **options: bool) -> list[str]:
        files = [path for path in (folder / str(step)).rglob("*") if path.is_file()]
        seen.update({path.name: share_in_page_cache(path) for path in files if path.stat().st_size})
        return verify(folder, step, **options)

    monkeypatch.setattr(committed, "verify", look)
    Checkpoints(tmp_path).save(1, {"params": jnp.arange(1e6)}, {}, wait=True)
    assert seen and not any(seen.values()), seen
