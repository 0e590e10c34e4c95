"""`python -m jaxtrain FILE.py`: what `python FILE.py` does, and one line for an early interrupt."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtrain.cli.main import main


def test_an_interrupt_while_importing_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-m", "jaxtrain", "slow.py", "--steps=2"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert said == "jaxtrain: interrupted before the run began; nothing to save\n"
    assert process.returncode == 130


def test_a_file_sees_its_own_arguments_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside.py").write_text("WORD = 'hello'\n")
    (tmp_path / "own.py").write_text(
        "import sys\nimport beside\nprint(beside.WORD, sys.argv[1:], __name__)\n"
    )
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main([str(tmp_path / "own.py"), "--seed=1"]) == 0
    assert capsys.readouterr().out == "hello ['--seed=1'] __main__\n"
    assert main([str(tmp_path / "owm.py")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxtrain: error: ") and "owm.py': no such experiment" in said
    assert os.linesep not in said.rstrip()
