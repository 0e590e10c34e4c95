"""The set-up of .venv by scripts/train and scripts/test, against a stand-in for Python, pip and
nvidia-smi, so nothing is installed.

The stand-in writes each `venv` and `pip` call into the file `calls`; `.ci/run` does the same set-up
once for real.
"""

import importlib.metadata
import os
import pathlib
import shutil
import signal
import subprocess
import time
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = [
    "bash",
    "dirname",
    "cat",
    "cksum",
    "stat",
    "mkdir",
    "find",
    "rm",
    "mv",
    "cp",
    "flock",
    "grep",
    "tail",
    "sleep",
    "timeout",
    "env",
]
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *sys.executable*) [[ $FAKE_VERSION != none ]] && echo "${FAKE_VERSION:-3.12.1} $0" ;;
    *'import pip, sys'*) echo "${FAKE_VERSION:-3.12.1}" ;;
    '-m venv '*) echo "venv" >> "$CALLS"; mkdir -p "$3/bin"; cp -p "$0" "$3/bin/python" ;;
    '-m pip '*) echo "pip ${@: -1}" >> "$CALLS"; [[ $* == *--requirement* ]] || exit 9
        echo 'WARNING: noise'
        sleep "${FAKE_PIP_SECONDS:-0}"; echo "$FAKE_PIP_OUTPUT"
        exit "${FAKE_PIP_STATUS:-0}" ;;
    '-P -c '*) ;;
    *) echo "ran ${*/#$ROOT/.}" ;;
esac
"""
NVIDIA = """#!/usr/bin/env bash
echo smi >> "$CALLS"
case "$*" in
    *compute_cap*)
        if [[ -z $FAKE_CARDS ]]; then
            echo 'Field "compute_cap" is not a valid field to query.'; exit 2
        fi
        echo "$FAKE_CARDS" ;;
    *) [[ -z $FAKE_DRIVER ]] && exit 9; echo "$FAKE_DRIVER" ;;
esac
"""


class Machine:
    """A fresh machine with a checkout, whose PATH holds the stand-ins and the few tools that the
    scripts may use."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.checkout, self.bin, self.calls_file = (
            folder / "check out",
            folder / "bin",
            folder / "calls",
        )
        for name in (
            "scripts/environment",
            "scripts/train",
            "scripts/test",
            "requirements.txt",
            "pyproject.toml",
        ):
            (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.checkout / name)
        self.bin.mkdir()
        for tool in TOOLS:
            if (path := shutil.which(tool)) is None:
                pytest.skip(f"{tool} is not on this machine")
            (self.bin / tool).symlink_to(path)
        self.write("python3", PYTHON)
        self.variables = {
            "PATH": str(self.bin),
            "CALLS": str(self.calls_file),
            "JAXTRAIN_NVIDIA_PROC": str(folder / "proc"),
        }

    def write(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        environment = {**self.variables, "ROOT": str(self.checkout), **variables}
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            start_new_session=True,
        )

    def run(
        self, script: str, *arguments: str, status: int = 0, **variables: str
    ) -> tuple[str, str]:
        process = self.start(str(self.checkout / "scripts" / script), *arguments, **variables)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, err
        return out, err

    def calls(self) -> list[str]:
        """What was called since the last look."""
        lines = (
            self.calls_file.read_text().replace(str(self.checkout), ".").splitlines()
            if self.calls_file.exists()
            else []
        )
        self.calls_file.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("cards", "wheels"),
    [
        ("580.65.06, 9.0", "cuda13"),
        ("580.65.06, 7.5\n580.65.06, 7.5", "cuda13"),
        ("590.10, 12.0\n590.10, 10.0", "cuda13"),
        ("580.65.06, 8.0\n580.65.06, 7.0", "cuda12"),
        ("580.65.06, 7.0\n580.65.06, 8.0", "cuda12"),
        ("580.65.06, [N/A]", "cuda12"),
        ("570.124.06, 9.0", "cuda12"),
        ("525.60.13, 8.6", "cuda12"),
        ("No devices were found", "cpu"),
    ],
)
def test_cards_and_driver_choose_the_wheels(machine: Machine, cards: str, wheels: str) -> None:
    machine.write("nvidia-smi", NVIDIA)
    out, err = machine.run("train", "--steps=2", FAKE_CARDS=cards)
    assert out == "ran -m jaxtrain ./experiments/digits.py --steps=2\n"
    extras = "" if wheels == "cpu" else f"[{wheels}]"
    assert [call for call in machine.calls() if call != "smi"] == ["venv", f"pip .{extras}"]
    assert f"with {wheels} wheels" in err


@pytest.mark.parametrize(
    ("cards", "driver", "message"),
    [
        (
            "470.57.02, 8.0",
            "",
            (
                "driver 470.57.02, lowest compute capability 8.0: jax's CUDA wheels need driver 525"
                " or newer"
            ),
        ),
        (
            "",
            "470.57.02\n470.57.02",
            (
                "2 NVIDIA card(s), driver 470.57.02: jax's CUDA wheels need driver 525 or newer;"
                " update the driver"
            ),
        ),
        ("535.10.01, 3.5", "", "need 5.2 or more"),
    ],
)
def test_old_drivers_and_cards_are_explained(
    machine: Machine, cards: str, driver: str, message: str
) -> None:
    machine.write("nvidia-smi", NVIDIA)
    out, err = machine.run("train", status=2, FAKE_CARDS=cards, FAKE_DRIVER=driver)
    assert (
        message in err and "JAXTRAIN_WHEELS=cpu" in err and len(err.splitlines()) == 1 and not out
    )
    machine.run("train", FAKE_CARDS=cards, FAKE_DRIVER=driver, JAXTRAIN_WHEELS="cpu")


def test_a_failing_nvidia_smi_means_cpu_and_says_so(machine: Machine) -> None:
    machine.write(
        "nvidia-smi",
        "#!/usr/bin/env bash\necho 'NVIDIA-SMI has failed because it could not talk to the"
        " driver.'; exit 9",
    )
    _, err = machine.run("train")
    assert (
        "with cpu wheels (nvidia-smi fails: NVIDIA-SMI has failed because it could not talk to the"
        " driver.)" in err
    )


def test_wheels_by_hand(machine: Machine) -> None:
    _, err = machine.run("train", status=2, JAXTRAIN_WHEELS="rocm")
    assert err == "jaxtrain: error: JAXTRAIN_WHEELS=rocm: unknown; valid: cpu, cuda12, cuda13\n"
    machine.run("train", JAXTRAIN_WHEELS="cuda12")
    assert machine.calls() == ["venv", "pip .[cuda12]"]
    # CUDA wheels serve a machine without cards, such as a cluster's login node
    machine.run("train")
    machine.run("test", "-q")
    assert machine.calls() == ["pip .[cuda12,test]"]
    machine.run("train", JAXTRAIN_WHEELS="cpu")
    assert machine.calls() == ["venv", "pip .[test]"]


def test_new_cards_are_noticed_and_known_ones_are_not_asked_again(machine: Machine) -> None:
    machine.run("train")
    machine.write("nvidia-smi", NVIDIA)
    proc = pathlib.Path(machine.variables["JAXTRAIN_NVIDIA_PROC"])
    proc.mkdir()
    (proc / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06\nGCC version: 12\n"
    )
    machine.calls()
    machine.run("train", FAKE_CARDS="580.65.06, 9.0")
    assert [call for call in machine.calls() if call != "smi"] == ["pip .[cuda13]"]
    machine.run("train", FAKE_CARDS="580.65.06, 9.0")
    assert machine.calls() == []


def test_a_second_launch_does_nothing_but_run(machine: Machine) -> None:
    _, first = machine.run("train")
    assert "WARNING" not in first and len(first.splitlines()) == 2
    assert machine.calls() == ["venv", "pip ."]
    other = machine.checkout / "other.py"
    other.touch()
    assert machine.run("train", str(other), "--seed=1") == (
        "ran -m jaxtrain ./other.py --seed=1\n",
        "",
    )
    assert machine.run("test", "-k", "x")[0] == "ran -m pytest -k x\n"
    assert machine.calls() == ["pip .[test]"]
    assert machine.run("train")[1] == "" and machine.run("test")[1] == ""
    assert machine.calls() == []


def test_changed_requirements_are_added_and_a_test_environment_stays_one(machine: Machine) -> None:
    machine.run("test")
    machine.calls()
    with (machine.checkout / "requirements.txt").open("a") as file:
        file.write("einops>=0.8\n")
    machine.run("train")
    assert machine.calls() == ["pip .[test]"]


def test_a_moved_or_broken_environment_is_made_anew(machine: Machine) -> None:
    machine.run("train")
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("elsewhere"))
    machine.calls()
    machine.run("train")
    assert machine.calls() == ["venv", "pip ."]
    venv = machine.checkout / ".venv"
    (venv / "bin" / "python").unlink()
    machine.run("train")
    assert machine.calls() == ["venv", "pip ."]
    (venv / "jaxtrain-stamp").unlink()
    machine.run("train")  # made by hand, or the user took the stamp away: sound, so only completed
    assert machine.calls() == ["pip ."]
    (venv / "jaxtrain-stamp").unlink()
    (venv / "jaxtrain-making").touch()
    machine.run("train")  # killed while it was being made
    assert machine.calls() == ["venv", "pip ."]


def test_another_python_makes_it_anew(machine: Machine) -> None:
    machine.run("train")
    machine.write("python3.13", PYTHON)
    machine.calls()
    machine.run("train", PYTHON="python3", FAKE_VERSION="3.12.1")
    assert machine.calls() == ["pip ."]
    (machine.checkout / ".venv/bin/python").write_text(PYTHON.replace(":-3.12.1", ":-3.10.0"))
    machine.run("train", PYTHON="python3.13")
    assert machine.calls() == ["venv", "pip ."]


@pytest.mark.parametrize(
    ("output", "status", "message"),
    [
        (
            "ERROR: HTTPSConnectionPool: Max retries exceeded",
            75,
            "a download failed; check the network",
        ),
        (
            "      ERROR: Could not find a version of setuptools>=77 (from versions: none)",
            75,
            "a download failed; check the network",
        ),
        (
            (
                "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on"
                " device"
            ),
            74,
            "no space left for",
        ),
        (
            "ERROR: Could not find a version that satisfies the requirement jax>=99",
            1,
            "the installation failed; log: ",
        ),
    ],
)
def test_failures_are_explained_and_the_next_launch_mends(
    machine: Machine, output: str, status: int, message: str
) -> None:
    out, err = machine.run("train", status=status, FAKE_PIP_OUTPUT=output, FAKE_PIP_STATUS="1")
    assert message in err and output in err and "noise" not in err and not out
    machine.calls()
    assert machine.run("train")[0].startswith("ran ")
    assert machine.calls() == ["pip ."]
    (machine.checkout / ".venv/jaxtrain-stamp").unlink()
    machine.run(
        "train",
        status=status,
        FAKE_PIP_OUTPUT=f"Installing collected packages: jax\n{output}",
        FAKE_PIP_STATUS="1",
    )
    machine.calls()
    machine.run("train")
    assert machine.calls() == ["venv", "pip ."]


def test_two_launches_at_once_install_once(machine: Machine) -> None:
    script = str(machine.checkout / "scripts/train")
    both = [machine.start(script, FAKE_PIP_SECONDS="1") for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(out.startswith("ran ") for out, _ in said)
    assert sum("another launch is making .venv" in err for _, err in said) == 1
    assert machine.calls() == ["venv", "pip ."]


def test_an_interrupted_installation_is_started_over(machine: Machine) -> None:
    process = machine.start(str(machine.checkout / "scripts/train"), FAKE_PIP_SECONDS="30")
    while not (machine.calls_file.exists() and "pip" in machine.calls_file.read_text()):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert (
        process.returncode == 130
        and err.splitlines()[-1] == "jaxtrain: interrupted; the same command starts over"
    )
    machine.calls()
    assert machine.run("train")[0].startswith("ran ")
    assert machine.calls() == ["venv", "pip ."]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"FAKE_VERSION": "3.9.2"},
            "Python 3.9.2 (python3) is too old: jaxtrain needs 3.11 to 3.13",
        ),
        ({"FAKE_VERSION": "2.7.18", "PYTHON": "python3"}, "Python 2.7.18 (python3) is too old"),
        ({"FAKE_VERSION": "none"}, "no Python found: jaxtrain needs 3.11 to 3.13; install one"),
        ({"PYTHON": "/no/python"}, "PYTHON=/no/python: cannot be run"),
    ],
)
def test_an_unfit_python_is_one_clear_line(
    machine: Machine, variables: dict[str, str], message: str
) -> None:
    out, err = machine.run("train", status=2, **variables)
    assert (
        err.startswith("jaxtrain: error: ")
        and message in err
        and len(err.splitlines()) == 1
        and not out
    )
    assert not (machine.checkout / ".venv").exists()


def test_the_first_fitting_python_is_taken(machine: Machine) -> None:
    machine.write("python3", PYTHON.replace(":-3.12.1", ":-3.8.0"))
    machine.write("python3.11", PYTHON.replace(":-3.12.1", ":-3.11.9"))
    assert "for Python 3.11.9 with" in machine.run("train")[1]


def test_a_python_newer_than_tested_is_tried(machine: Machine) -> None:
    assert (
        "Python 3.14.0 is newer than those tested" in machine.run("train", FAKE_VERSION="3.14.0")[1]
    )


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required() -> list[Requirement]:
    """The lines of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_what_is_installed_here_meets_the_requirements() -> None:
    for requirement in [*required(), *map(Requirement, project()["optional-dependencies"]["test"])]:
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), (
            requirement
        )
        assert {specifier.operator for specifier in requirement.specifier} == {">="}, (
            f"{requirement}: not a lower bound"
        )


def test_the_requirements_are_the_core_and_its_three_extras() -> None:
    extras = project()["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    assert everything.name == "jaxtrain" and everything.extras == {"data", "report", "checkpoints"}
    core = [Requirement(line) for line in project()["dependencies"]]
    assert {item.name for item in core} == {"jax", "flax", "optax", "numpy", "absl-py"}
    parts = [Requirement(line) for extra in everything.extras for line in extras[extra]]
    assert sorted(map(str, core + parts)) == sorted(map(str, required()))


def test_extras_and_licence() -> None:
    assert set(project()["optional-dependencies"]) == {
        *("data", "report", "checkpoints", "all"),
        *("cuda12", "cuda13", "plan", "wandb", "tensorflow", "safetensors"),
        *("text", "gguf", "lm_eval"),
        *("test", "docs"),
    }
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence


@pytest.mark.parametrize(
    "script",
    [
        *("scripts/environment", "scripts/train", "scripts/test", "scripts/docs"),
        *("scripts/check_wheel", ".ci/run"),
    ],
)
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert script == "scripts/environment" or os.access(ROOT / script, os.X_OK)


def test_a_misspelt_experiment_is_told_before_anything_is_installed(machine: Machine) -> None:
    for name, meant in {
        "digits": "did you mean experiments/digits.py?\n",
        "shakespear_char": "did you mean experiments/shakespeare_char.py?\n",
        "experiments/gpt2_124.py": "did you mean experiments/gpt2_124m.py?\n",
        "experiments/nope.py": "there are experiments/bert_mlm.py experiments/",
    }.items():
        done = subprocess.run(
            [ROOT / "scripts" / "train", name], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"jaxtrain: error: {name}: no such experiment; {meant}")
    machine.run("train", "digits", status=2)
    assert machine.calls() == []


@pytest.mark.slow
def test_the_wheel_stands_on_its_own(tmp_path: pathlib.Path) -> None:
    """In an environment of its own, with packages from the network: the core makes a step, a run
    without the extras names them, and with them the digits train."""
    done = subprocess.run(
        [ROOT / "scripts" / "check_wheel", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "core: 1 step, accuracy, grad_norm, learning_rate, loss" in done.stdout
    assert "without extras: jaxtrain: error: this run needs " in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "20" / "COMMIT").is_file()
