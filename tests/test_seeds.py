"""Several runs compared: what differs, and mean, deviation and count over seeds; and curves that
show where they begin."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import line, make_run
from test_run import lines, start, toy

from jaxtrain import config
from jaxtrain.cli import main as cli_main
from jaxtrain.report.page import history, plots
from jaxtrain.report.page.html import write_report
from jaxtrain.runner import build

ACCURACY = {1e-3: [0.91, 0.93, 0.96], 1e-2: [0.80, 0.84]}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two rates, three and two seeds, each start with a workdir of its own."""
    found = []
    for rate, values in ACCURACY.items():
        for seed, accuracy in enumerate(values):
            folder = tmp_path / f"{rate:g}-{seed}"
            settings: dict[str, Any] = {
                "seed": seed,
                "workdir": str(folder),
                "processes": seed,
                "batch_size": 32,
                "optimizer": {"kind": "sgd", "learning_rate": rate, "momentum": 0.9},
            }
            metrics = [
                line(10, loss=2.0, accuracy=0.1),
                line(20, "test", loss=1 - accuracy, accuracy=accuracy),
            ]
            found.append(make_run(folder, metrics, run={"config": settings}))
    return found


def text_of(cell: str) -> str:
    """What a cell of a table shows."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", cell)).strip()


def table_after(page: str, title: str) -> list[list[str]]:
    """The first table after a title, as text."""
    table = page[page.index(f"<h2>{title}</h2>") :].split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [[text_of(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_seeds_are_one_setting(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = table_after(
        write_report(runs, tmp_path / "out" / "report.html").read_text(), "Settings"
    )
    assert found[0][:4] == ["runs", "optimizer.learning_rate", "test accuracy", "test loss"]
    assert cli_main(["report", *map(str, runs), f"--out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out.splitlines()
    for row, printed, (rate, values) in zip(found[1:], said, ACCURACY.items(), strict=False):
        mean, deviation = np.mean(values), np.std(values, ddof=1)
        wanted = f"{100 * mean:.2f}% ± {100 * deviation:.2f}%"
        assert row[:3] == [str(len(values)), str(rate), f"{wanted} ({len(values)})"]
        assert printed.startswith(f"optimizer.learning_rate={rate}: test accuracy {wanted} (n=")


def test_what_differs_comes_first_and_alone(runs: list[Path], tmp_path: Path) -> None:
    page = write_report(runs, tmp_path / "out" / "report.html").read_text()
    head, *rows = table_after(page, "Runs")
    assert head == ["run", "seed", "optimizer.learning_rate", "test accuracy", "test loss"]
    assert [row[1:3] for row in rows] == [
        [str(seed), str(rate)] for rate, values in ACCURACY.items() for seed in range(len(values))
    ]
    assert page.index("<h2>Settings</h2>") < page.index("<h2>Runs</h2>") < page.index("<h2>Curves<")


def test_runs_that_differ_in_nothing_but_their_starts(tmp_path: Path) -> None:
    same = [make_run(tmp_path / name, [line(5, "test", loss=0.5)]) for name in ("a", "b")]
    found = history.groups([history.load(run) for run in same])
    assert [group.runs for group in found] == [(0, 1)] and not found[0].settings
    assert set(history.NOT_SETTINGS) >= set(config.marked(config.Mark.INVOCATION))


def test_statistics_are_numpys() -> None:
    values = list(np.random.default_rng(0).normal(size=7))
    found = history.statistic([*values, None])
    assert found is not None and found.count == 7
    np.testing.assert_allclose(
        [found.mean, found.deviation], [np.mean(values), np.std(values, ddof=1)], rtol=1e-12
    )
    assert history.statistic([2.0]) == history.Statistic(2.0, None, 1)
    assert history.statistic([None]) is None
    diverged = history.statistic([1.0, float("nan")])
    assert diverged is not None and np.isnan(diverged.mean) and diverged.count == 2


def test_a_set_of_ones_own_has_curves_and_a_column(tmp_path: Path) -> None:
    metrics = [
        line(10, loss=2.0),
        *(line(step, "rotated", loss=1 / step) for step in (10, 20)),
    ]
    both = [history.load(make_run(tmp_path / name, metrics)) for name in ("a", "b")]
    assert [curve.label for curve in history.curves(both[:1], "loss")] == ["train", "rotated"]
    assert len(history.curves(both, "loss")) == 4
    assert [split for split, _, _ in history.results(both)] == ["rotated"]


@pytest.mark.parametrize("key", ["loss", "accuracy", "grad_norm", "learning_rate"])
@pytest.mark.parametrize("first", [0.004, 0.5, 4.0, 300.0])
def test_a_curve_shows_where_it_begins(key: str, first: float, tmp_path: Path) -> None:
    values = [first, *np.linspace(1.0, 0.9, 200)]
    metrics = [line(step, **{key: value}) for step, value in enumerate(values, 1)]
    run = history.load(make_run(tmp_path / "run", metrics))
    [plot] = plots.draw_curves([run])
    low, high = plot.figure.axes[0].get_ylim()
    assert low <= first <= high
    left, right = plot.figure.axes[0].get_xlim()
    assert left <= 1 and right >= len(values)


def test_short_runs_have_fifty_points(tmp_path: Path) -> None:
    for total, every in ((1, 1), (60, 1), (120, 2), (1200, 24), (2500, 50), (10**6, 50)):
        assert build.lengths(toy(log_every=None, steps=total), 96).log == every
        assert total < 50 or total // every >= 50
    assert build.lengths(toy(log_every=7), 96).log == 7
    assert start(tmp_path / "run", "--log_every=none") == 0
    train = [each["step"] for each in lines(tmp_path / "run") if each["split"] == "train"]
    assert train == list(range(1, 25))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["log_every"] is None
