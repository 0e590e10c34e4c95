"""What surrounds a run: platforms that are not there, variables that are wrong, folders that cannot
be written, streams that are closed, a disk that fills. One line each, and the right status."""

import json
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from test_run import EXPERIMENT, ROOT, TINY, quiet_environment, start

from jaxtrain import durable_files, messages
from jaxtrain.errors import UserError
from jaxtrain.report.metrics_file import JsonlWriter
from jaxtrain.runner import devices, jax_settings
from jaxtrain.runner import main as runner_main

COUNT = "--xla_force_host_platform_device_count"
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({}, None),
        ({"XLA_FLAGS": ""}, None),
        ({"XLA_FLAGS": f"{COUNT}=8 --xla_cpu_enable_fast_math=false"}, None),
        ({"XLA_FLAGS": str(ROOT / "README.md")}, None),  # a file of flags, which XLA reads
        ({"XLA_FLAGS": "nonsense"}, "XLA_FLAGS: 'nonsense' is no flag; unset it"),
        (
            {"XLA_FLAGS": "xla_dump_to=/tmp/x"},
            "XLA_FLAGS: 'xla_dump_to=/tmp/x' is no flag; write --xla_dump_to=/tmp/x",
        ),
        (
            {"XLA_FLAGS": "-xla_dump_to=/tmp/x"},
            "XLA_FLAGS: '-xla_dump_to=/tmp/x' is no flag; write --xla_dump_to=/tmp/x",
        ),
        *(
            (
                {"XLA_FLAGS": f"{COUNT}={count}"},
                f"XLA_FLAGS: {COUNT}={count}: must be an integer in 1..4096; write {COUNT}=8",
            )
            for count in ("", "0", "-1", "abc", "1.5", "99999")
        ),
        ({FRACTION: "0.5"}, None),
        ({FRACTION: ""}, None),
        *(
            (
                {FRACTION: share},
                f"{FRACTION}={share}: must be above 0 and at most 1, a share of the memory of the"
                + " GPU; unset it for 0.75",
            )
            for share in ("2", "0", "-1", "abc", "nan", "80%")
        ),
        ({FRACTION: "2", "TF_FORCE_UNIFIED_MEMORY": "1"}, None),
    ],
)
def test_variables(variables: dict[str, str], line: str | None) -> None:
    if line is None:
        jax_settings.check_environment(variables)
        return
    with pytest.raises(UserError) as caught:
        jax_settings.check_environment(variables)
    assert str(caught.value) == line
    # the remedy, followed
    assert "; write " in line or "; unset it" in line
    write = line.partition("; write ")[2]
    jax_settings.check_environment({"XLA_FLAGS": write} if write else {})


def test_without_jit() -> None:
    with jax.disable_jit(), pytest.raises(UserError, match=r"^JAX_DISABLE_JIT: .*; unset it, or"):
        jax_settings.check_environment({})
    jax_settings.check_environment({})  # unset


def backends(monkeypatch: pytest.MonkeyPatch, error: Exception | None, *logged: Any) -> None:
    """Has jax fail to find devices, or log what is wrong and find the CPU."""
    there = jax.devices()

    def find(platform: str | None = None) -> list[Any]:
        if error is not None and "cpu" in (platform, os.environ.get("JAX_PLATFORMS")):
            return there
        logger = logging.getLogger("jax._src.xla_bridge")
        for each in logged:
            logger.error("Jax plugin configuration error", exc_info=each) if isinstance(
                each, Exception
            ) else logger.warning(each)
        if error is not None:
            raise error
        return there

    monkeypatch.setattr(jax, "devices", find)


NO_TPU = RuntimeError(
    "Unable to initialize backend 'tpu': INTERNAL: Failed to open libtpu.so (set JAX_PLATFORMS=''"
    " to automatically choose an available backend)"
)
DEAD = RuntimeError("CUDA driver version is insufficient\nfor the runtime")


@pytest.mark.parametrize(
    ("platform", "variables", "error", "logged", "line"),
    [
        (
            "gpu",
            {},
            AssertionError(),
            (),
            "--platform=gpu: no GPU found (jax sees: cpu); install jax[cuda12] or use"
            + " --platform=cpu",
        ),
        (
            "gpu",
            {"CUDA_VISIBLE_DEVICES": "-1"},
            RuntimeError("no"),
            (),
            "--platform=gpu: no GPU found (CUDA_VISIBLE_DEVICES=-1 hides them); unset it, or use"
            + " --platform=cpu",
        ),
        (
            "gpu",
            {"CUDA_VISIBLE_DEVICES": ""},
            RuntimeError("no"),
            (),
            "--platform=gpu: no GPU found (CUDA_VISIBLE_DEVICES= hides them); unset it, or use"
            + " --platform=cpu",
        ),
        (
            "gpu",
            {},
            AssertionError(),
            (DEAD,),
            "--platform=gpu: no GPU found (jax cannot use a plugin (RuntimeError: CUDA driver"
            + " version is insufficient for the runtime)); mend it, or use --platform=cpu",
        ),
        (
            "auto",
            {"JAX_PLATFORMS": "tpu"},
            NO_TPU,
            (),
            "JAX_PLATFORMS=tpu: no such device here (Unable to initialize backend 'tpu': INTERNAL:"
            + " Failed to open libtpu.so); unset it, or use JAX_PLATFORMS=cpu",
        ),
        (
            "auto",
            {"JAX_PLATFORMS": "cuda"},
            AssertionError(),
            (),
            "JAX_PLATFORMS=cuda: no such device here (no plugin for it); unset it, or use"
            + " JAX_PLATFORMS=cpu",
        ),
        (
            "auto",
            {},
            RuntimeError("Unable to initialize backend 'cpu': INVALID_ARGUMENT: broken"),
            (),
            "--platform=auto: no device found (Unable to initialize backend 'cpu':"
            + " INVALID_ARGUMENT: broken)",
        ),
    ],
)
def test_no_device(
    platform: str,
    variables: dict[str, str],
    error: Exception,
    logged: tuple[Exception, ...],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    backends(monkeypatch, error, *logged)
    with pytest.raises(UserError) as caught:
        devices.find(platform)
    assert str(caught.value) == line
    # the remedies: what hides them unset, another platform
    if "--platform=cpu" in line:
        assert devices.find("cpu") == jax.devices("cpu")
    if "JAX_PLATFORMS=cpu" in line:
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        assert devices.find("auto") == jax.devices("cpu")
    if "unset it" in line:
        monkeypatch.undo()
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert devices.find("auto") == jax.devices()


@pytest.mark.parametrize(
    ("logged", "line"),
    [
        (
            DEAD,
            "jax cannot use a plugin (RuntimeError: CUDA driver version is insufficient for the"
            + " runtime); training on cpu",
        ),
        (
            "An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not"
            + " installed. Falling back to cpu.",
            "An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not"
            + " installed. Falling back to cpu; training on cpu",
        ),
    ],
)
def test_a_dead_gpu_is_said_in_one_line(
    logged: Any,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    backends(monkeypatch, None, logged)
    assert devices.find("auto") == jax.devices()
    assert capsys.readouterr().err == f"jaxtrain: warning: {line}\n"


@pytest.mark.parametrize("place", ["a file", "nowhere", "no home"])
def test_a_cache_that_cannot_be_written(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    folder: str | None = {"a file": f"{tmp_path}/file", "nowhere": "/proc/nope"}.get(place)
    if folder is None:

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax_settings.use_compilation_cache()
        assert jax.config.values["jax_compilation_cache_dir"] is None
        said = capsys.readouterr().err
        jax.config.update("jax_compilation_cache_dir", f"{tmp_path}/cache")  # the remedy
        jax_settings.use_compilation_cache()
        assert jax.config.values["jax_compilation_cache_dir"] == f"{tmp_path}/cache"
        assert capsys.readouterr().err == ""
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    reason = {
        "a file": f"{tmp_path}/file: File exists",
        "nowhere": "/proc/nope: No such file or directory",
        "no home": "the home folder: Could not determine home directory.",
    }[place]
    assert said == (
        f"jaxtrain: warning: compiled programs are not kept: {reason}; set"
        " JAX_COMPILATION_CACHE_DIR to a folder that can be written\n"
    )


FULL = "No space left on device; free space, and the same command goes on from the last checkpoint"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_disk_that_fills_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The metrics of a run go to a device that is always full, from the first line on."""
    plain = JsonlWriter.__init__

    def on_full_disk(self: JsonlWriter, path: Any) -> None:
        plain(self, path)
        os.dup2(os.open("/dev/full", os.O_WRONLY), self._file.fileno())

    monkeypatch.setattr(JsonlWriter, "__init__", on_full_disk)
    monkeypatch.setattr(JsonlWriter, "truncate", lambda *_: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    assert start(tmp_path / "run") == 74
    name = tmp_path / "run" / "metrics.jsonl"
    assert capsys.readouterr().err == f"jaxtrain: error: {name}: {FULL}\n"
    monkeypatch.undo()  # space was freed
    assert start(tmp_path / "run") == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_record_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".run.json.tmp").symlink_to("/dev/full")

    def write() -> int:
        durable_files.write_json(tmp_path / "run.json", {"steps": 3})
        return 0

    assert runner_main.guarded(write) == 74
    assert capsys.readouterr().err == f"jaxtrain: error: {tmp_path}/run.json: {FULL}\n"
    (tmp_path / ".run.json.tmp").unlink()
    assert runner_main.guarded(write) == 0


def test_help_for_a_reader_that_has_seen_enough() -> None:
    """And for one that is a full disk: that is an error, but no traceback at the end of Python."""
    code = "from jaxtrain.messages import print_out; print_out('help' * 100_000)"
    run = [sys.executable, "-c", code]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(run, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_closed_streams_are_not_taken_by_files(tmp_path: Path) -> None:
    """A file that is opened after `>&- 2>&-` would get their numbers, and then what XLA prints."""
    code = (
        "import sys; from jaxtrain import messages; messages.open_standard_streams();"
        " file = open(sys.argv[1], 'w'); print('out'); print('err', file=sys.stderr);"
        " file.write(str(file.fileno()))"
    )
    path = tmp_path / "file"
    command = f'exec "{sys.executable}" -c "{code}" "{path}" >&- 2>&- <&-'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert int(path.read_text()) > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "arguments", "status", "said"),
    [
        (">&-", [], 0, ""),
        ("2>&-", [], 0, ""),
        (">&-", ["--help"], 0, ""),
        ("| head -1", ["--help"], 0, ""),
        ("| head -1", [], 0, ""),
        ("2>&-", ["--seed=x"], 2, ""),
        (">/dev/full", ["--help"], 74, "[Errno 28] No space left on device"),
        ("", ["--platform=gpu"], 2, "--platform=gpu: no GPU found (jax sees: cpu); install"
         + " jax[cuda12] or use --platform=cpu"),
        ("", ["--model.norm=\udcff"], 2, "--model.norm='\\udcff': "),
    ],
)  # fmt: skip
def test_a_process_and_its_streams(
    redirection: str, arguments: list[str], status: int, said: str, tmp_path: Path
) -> None:
    words = [*EXPERIMENT, *TINY, *arguments, f"--workdir={tmp_path}/run"]
    if "--platform=gpu" in arguments:
        words.remove("--platform=cpu")
    command = f'set -o pipefail; "$@" {redirection}'
    done = subprocess.run(
        ["bash", "-c", command, "bash", *map(os.fsencode, words)],
        cwd=ROOT,
        env=quiet_environment() | {"JAX_PLATFORMS": ""},
        capture_output=True,
        check=False,
    )
    assert done.returncode == status
    text = done.stderr.decode()
    assert text.count("\n") == bool(said) and said in text


def test_messages_of_a_run_json_hold_no_surrogates() -> None:
    assert messages.printable("a\udcff") == "'a\\udcff'"
    json.dumps(messages.printable("a\udcff")).encode()


FAULTS = """
import resource, sys
import numpy as np
from jaxtrain import host_memory
print(host_memory.keep_freed() if sys.argv[1] == "kept" else None)
def block():
    np.empty(48 * 2**20, np.uint8).fill(1)
block()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    block()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_scratch_memory_is_kept_from_one_use_to_the_next() -> None:
    """48 MiB, taken and given back four times: each page of it is a fault, or none is."""

    def faults(how: str, **more: str) -> list[str]:
        environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
        command = [sys.executable, "-c", FAULTS, how]
        return subprocess.run(
            command, env=environment | more, capture_output=True, text=True, check=True
        ).stdout.split()

    said, count = faults("kept")
    assert said == "True" and float(count) < 100
    said, count = faults("kept", MALLOC_MMAP_THRESHOLD_="131072")
    assert said == "False" and float(count) > 20  # at least one for each page of 2 MiB
