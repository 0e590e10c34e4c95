"""Recorded loss curves: a tidy-up changes no number.

Each is of a tiny run with dropout, augmentation, averaging and clipping on. A change that is meant
to move numbers records new ones (`python tests/test_recorded_curves.py`, from the folder of the
project) and says so in CHANGELOG.md. CPUs round in their own ways, hence the tolerance; what a
change of behaviour does is far larger.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_run import lines, start

from jaxtrain.models import ConvNet, ViT
from jaxtrain.optimizers import Muon

RECORD = Path(__file__).with_name("recorded_curves.json")
CASES: dict[str, dict[str, Any]] = {
    "mlp": {},
    "convnet_muon": {
        "model": ConvNet(num_classes=4, widths=(4, 8), dropout=0.1),
        "optimizer": Muon(learning_rate=0.02, weight_decay=0.01),
    },
    "vit": {"model": ViT(num_classes=4, patch=2, width=8, depth=1, heads=2)},
    "microbatches": {"microbatches": 2},
    "fp16": {"precision": "fp16"},
}


def curve(name: str, folder: Path) -> list[list[Any]]:
    """(step, split, loss) of every line of metrics."""
    assert start(folder, "--mesh=data:1", **CASES[name]) == 0
    return [[line["step"], line["split"], line["loss"]] for line in lines(folder)]


@pytest.mark.parametrize("name", CASES)
def test_a_curve_is_what_it_was(name: str, tmp_path: Path) -> None:
    recorded = json.loads(RECORD.read_text())[name]
    found = curve(name, tmp_path / "run")
    assert [line[:2] for line in found] == [line[:2] for line in recorded]
    np.testing.assert_allclose(
        [line[2] for line in found], [line[2] for line in recorded], rtol=2e-4
    )


if __name__ == "__main__":
    curves = {name: curve(name, Path(tempfile.mkdtemp()) / "run") for name in CASES}
    RECORD.write_text(json.dumps(curves, indent=1) + "\n")
    sys.exit(0)
