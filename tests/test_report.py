"""The live line, tables, plots and the page, also on runs that are short, odd or hostile."""

import html.parser
import io
import itertools
import json
import math
import os
import pty
import re
import subprocess
import sys
import time
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxtrain.hardware import CARDS, peak_flops
from jaxtrain.report.page import history, plots, style
from jaxtrain.report.page.html import write_report
from jaxtrain.report.terminal.progress import Progress
from jaxtrain.report.terminal.tables import (
    memory_table,
    named_values,
    parameter_rows,
    parameter_table,
)

VALUES = {"loss": 0.3124, "accuracy": 0.912, "learning_rate": 1e-3, "step_seconds": 0.1}
SPEED = {"per_second": 48210.0, "eta_seconds": 34.0, "memory_bytes": 1.2e9, "mfu": 0.413}


# The live line


def test_plain_lines_are_limited_but_the_last_step_is_printed():
    stream = io.StringIO()
    progress = Progress(100, stream=stream, plain_seconds=3600)
    progress.start()
    for step in range(10, 101, 10):
        progress.update(step, VALUES, **SPEED)
    progress.stop()
    progress.stop()
    assert stream.getvalue().splitlines() == [
        "step 10/100  loss 0.3124  accuracy 91.20%  48.2k examples/s  1.2 GB  MFU 41.3%  0:34 left",
        "step 100/100  loss 0.3124  accuracy 91.20%  48.2k examples/s  1.2 GB  MFU 41.3%",
    ]


def test_notes_show_control_characters_and_take_no_markup():
    stream = io.StringIO()
    progress = Progress(1, stream=stream)
    progress.line("[red]\x1b[2Jname :smile:")
    progress.evaluation(3, "[b]test", {"loss": math.nan, "eval_seconds": 1.0})
    assert stream.getvalue().splitlines() == [
        "[red]\\x1b[2Jname :smile:",
        "step 3  [b]test  loss nan",
    ]


@pytest.mark.parametrize("width", [1, 8, 20, 40, 60, 80, 100, 140, 200])
@pytest.mark.parametrize("unicode", [True, False])
def test_the_line_fits_any_width(width, unicode):
    line = Progress(2000, stream=io.StringIO())._line
    line.unicode = unicode
    line.begin(0, "compiling")
    assert line.draw(width).cell_len <= width
    for step, loss in enumerate([3.0, math.nan, 2.0, math.inf, 1.0, 0.5], start=1):
        line.set(
            100 * step,
            {"loss": loss, "accuracy": 0.5},
            {k: SPEED[k] for k in ("per_second", "memory_bytes", "mfu")},
            7.0,
        )
        drawn = line.draw(width)
        assert drawn.cell_len <= width
        assert "\n" not in drawn.plain
    if width >= 40:
        assert "600/2,000" in drawn.plain
        assert "loss 0.5000" in drawn.plain
    if width == 140:
        assert ("█" in drawn.plain) is unicode


def test_a_line_without_numbers_and_a_run_of_no_steps():
    progress = Progress(0, stream=io.StringIO(), live=True)
    progress.start()
    progress.update(0, {})
    progress.phase("evaluating")
    progress.stop()


SCRIPT = """
import time
from jaxtrain.report.terminal.progress import Progress
progress = Progress(30, plain_seconds=0)
progress.start()
for step in range(1, 31):
    progress.update(step, {"loss": 1 / step}, per_second=1e4, eta_seconds=3)
    progress.line(f"note {step} " + "x" * 5000)
    time.sleep(0.01)
progress.stop()
with open(PATH, "w") as file:
    file.write("done")
"""


def script(tmp_path):
    done = tmp_path / "done"
    return done, [sys.executable, "-W", "error", "-c", SCRIPT.replace("PATH", repr(str(done)))]


def test_a_closed_pipe_does_not_end_the_run(tmp_path):
    done, command = script(tmp_path)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors, done.read_text()) == (0, b"", "done")


def test_no_standard_output_at_all(tmp_path):
    done, command = script(tmp_path)
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, check=False
    )
    assert (result.returncode, result.stderr, done.read_text()) == (0, b"", "done")


def test_a_terminal_that_goes_away_does_not_end_the_run(tmp_path):
    done, command = script(tmp_path)
    leader, follower = pty.openpty()
    with subprocess.Popen(
        command, stdout=follower, stderr=subprocess.PIPE, env=os.environ | {"TERM": "xterm"}
    ) as process:
        os.close(follower)
        seen = os.read(leader, 4096)
        os.close(leader)
        errors = process.stderr.read()
    assert (process.returncode, errors, done.read_text()) == (0, b"", "done")
    assert b"\x1b[" in seen


def test_the_live_line_is_drawn_on_a_terminal(tmp_path):
    _, command = script(tmp_path)
    leader, follower = pty.openpty()
    with subprocess.Popen(
        command, stdout=follower, env=os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    ) as process:
        os.close(follower)
        seen = b""
        while True:
            try:
                seen += os.read(leader, 65536)
            except OSError:
                break
    os.close(leader)
    assert process.returncode == 0
    assert "✓" in seen.decode()
    assert seen.count(b"note ") == 30


def test_progress_imports_no_jax():
    heavy = "any(m in sys.modules for m in ('jax', 'matplotlib', 'numpy', 'tensorboard'))"
    code = (
        "import sys, jaxtrain.report.terminal.progress, jaxtrain.report.trackers;"
        f" sys.exit({heavy})"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Tables


def text_of(renderable, width=100):
    stream = io.StringIO()
    progress = Progress(1, stream=stream)
    progress.console.width = width
    progress.show(renderable)
    return stream.getvalue()


def transformer(blocks):
    shapes = {
        "attention/kernel": (8, 24),
        "attention/bias": (24,),
        "mlp/up": (8, 32),
        "mlp/down": (32, 8),
    }
    return {
        f"block_{i}/{path}": np.zeros(shape, np.float32)
        for i in range(blocks)
        for path, shape in shapes.items()
    }


def test_the_parameter_summary_merges_what_is_alike_and_loses_no_number():
    parameters = transformer(12) | {
        "head/kernel": np.zeros((8, 10), np.float16),
        "scale": np.zeros((), np.float32),
    }
    for limit in (100, 30, 3, 1):
        rows = parameter_rows(parameters, limit=limit)
        assert sum(row.count for row in rows) == 12 * (192 + 24 + 256 + 256) + 81
        assert sum(row.bytes for row in rows) == 12 * 4 * 728 + 160 + 4
        assert sum(row.arrays for row in rows) == 50
    assert parameter_rows(parameters)[0].path == "block_*/attention/kernel"
    assert [row.path for row in parameter_rows(parameters, limit=3)] == [
        "block_*",
        "head/kernel",
        "scale",
    ]
    assert "8,817" in text_of(parameter_table(parameters))


@pytest.mark.parametrize("width", [1, 10, 30, 120])
def test_tables_survive_any_width_and_no_rows(width):
    for table in (
        parameter_table(transformer(2)),
        parameter_table({}),
        memory_table({"parameters": 4e9, "[b]": 0}, device_bytes=141e9),
        memory_table({}),
        named_values("run [x]", {"model": "[red]" + "x" * 300, "": ""}),
        named_values("", {}),
    ):
        text_of(table, width)
    assert "2.8%" in text_of(memory_table({"parameters": 4e9}, device_bytes=141e9))
    assert "[red]" in text_of(named_values("run", {"model": "[red]"}))


# Hardware


@pytest.mark.parametrize(
    ("kind", "precision", "teraflops"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA H100 80GB HBM3", "fp8", 1978.9),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", 156.0),
        ("NVIDIA A100-SXM4-40GB", "fp8", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-PCIE-32GB", "fp16", 112.0),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA TITAN RTX", "fp16", 130.5),
        ("Tesla T4", "fp16", 65.0),
        ("Tesla T4", "fp32", 8.1),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L40", "bf16", 181.0),
        ("NVIDIA A10G", "bf16", 70.0),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA GeForce RTX 3090", "bf16", 71.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA RTX A4000", "bf16", None),
        ("cpu", "fp32", None),
        ("", "bf16", None),
        ("TPU v4", "bf16", None),
        ("NVIDIA A1000", "bf16", None),
    ],
)
def test_peak_flops_by_device_kind(kind, precision, teraflops):
    assert peak_flops(kind, precision) == (None if teraflops is None else teraflops * 1e12)


def test_the_card_table_is_consistent():
    for card in CARDS:
        assert (
            re.search(card.pattern, f"nvidia {card.name.lower()}")
            or "SXM" in card.name
            or "PCIe" in card.name
        )
        assert card.fp32 <= (card.tf32 or card.fp32) <= card.fp16
        assert card.bf16 in (None, card.fp16)


# Plots and the page


def line(step, split="train", **values):
    return {"step": step, "split": split, **values}


def make_run(folder, lines, *, run=None, predictions=None):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"name": "run", "config": {"seed": 0}, "parameters": 10} | (run or {}))
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    if predictions is not None:
        np.savez(folder / "predictions.npz", **predictions)
    return folder


def full_lines(count=40):
    lines = [
        line(s, loss=3 / s, accuracy=1 - 1 / s, learning_rate=1e-3, examples_per_second=100.0 + s)
        for s in range(1, count)
    ]
    return [
        *lines,
        line(count, "validation", loss=0.3, accuracy=0.9),
        line(count, "test", loss=0.4, accuracy=0.875),
    ]


def digit_predictions(classes=10, shape=(8, 8, 1), dtype=np.uint8, names=None):
    random = np.random.default_rng(0)
    label = random.integers(0, classes, 60, dtype=np.int32)
    prediction = np.where(random.random(60) < 0.3, (label + 1) % classes, label).astype(np.int32)
    worst = np.nonzero(label != prediction)[0].astype(np.int32)
    names = np.array([f"class {i}" for i in range(classes)] if names is None else names)
    images = (random.random((len(worst), *shape)) * 16).astype(dtype)
    probability = random.random(60, dtype=np.float32)
    found = {
        "label": label,
        "prediction": prediction,
        "probability": probability,
        "loss": probability,
    }
    return found | {"worst_id": worst, "worst_image": images, "class_names": names}


class Checker(html.parser.HTMLParser):
    """Tags balance, nothing is fetched, nothing is run."""

    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        for name, value in attrs:
            if name in ("src", "href"):
                inside = value.startswith("#") and tag == "use"
                assert inside or value.startswith("data:image/png;base64,")
        if tag not in ("meta", "img", "br", "link", "line", "circle", "path", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            assert tag in ("line", "circle", "path", "polyline"), (tag, self.open)


def check_page(path):
    text = path.read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert not {"script", "iframe", "object", "link", "base"} & set(checker.tags)
    assert "http" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
    assert "NaN" not in "".join(re.findall(r'\b(?:d|x|y|x1|y1|cx|cy|points)="([^"]*)"', text))
    return text


def test_one_run_makes_a_page_and_all_plots(tmp_path):
    page = write_report([make_run(tmp_path / "run", full_lines(), predictions=digit_predictions())])
    text = check_page(page)
    assert page == tmp_path / "run" / "report.html"
    assert {path.name for path in (tmp_path / "run" / "plots").iterdir()} == {
        "loss.png",
        "accuracy.png",
        "learning_rate.png",
        "throughput.png",
        "confusion.png",
        "mistakes.png",
    }
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    for words in (
        "87.50%",
        "test accuracy",
        "Confusion",
        "Worst mistakes",
        "best validation 90.00% at step 40",
        "prefers-color-scheme: dark",
    ):
        assert words in text


def test_several_runs_are_compared(tmp_path):
    runs = []
    for seed in range(10):
        lines = [*full_lines(20), line(20, "test", loss=1.0, accuracy=0.5 + seed / 100)]
        runs.append(
            make_run(
                tmp_path / f"run{seed}",
                lines,
                run={"config": {"seed": seed, "model": {"depth": 2}}},
            )
        )
    out = tmp_path / "out" / "page.html"
    text = check_page(write_report(runs, out))
    assert "10 runs compared" in text
    assert "<td class='number best'>59.00%</td>" in text
    assert ">seed</th>" in text
    assert ">model.depth</th>" not in text.split("</table>")[0]
    assert (tmp_path / "out" / "plots" / "loss.png").exists()


HOSTILE = "<script>alert(1)</script>\"' onload=x $\\frac{ 漢字 \x1b[0m &amp;"


def test_text_of_a_run_is_escaped(tmp_path):
    lines = [
        line(1, loss=1.0, **{HOSTILE: 1.0}),
        line(2, loss=0.5, **{HOSTILE: 2.0}),
        line(2, HOSTILE, loss=1.0),
    ]
    run = {
        "name": HOSTILE,
        "command": [HOSTILE],
        "started": HOSTILE,
        "hardware": {"device": HOSTILE},
        "devices": HOSTILE,
        "config": {HOSTILE: HOSTILE},
    }
    names = [HOSTILE] * 3
    folders = [
        make_run(
            tmp_path / name,
            lines,
            run=run | {"git": {HOSTILE: name}},
            predictions=digit_predictions(3, names=names),
        )
        for name in ("a", "b")
    ]
    for chosen, out in ((folders[:1], None), (folders, tmp_path / "both.html")):
        text = check_page(write_report(chosen, out))
        assert "&lt;script&gt;" in text
        assert "<script" not in text


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [line(1)],
        [line(0, loss=1.0)],
        [line(1, loss=1.0)],
        [line(1, "test", loss=0.0)],
        [line(1, "validation", mean_absolute_error=0.5)],
        [line(1, loss="NaN"), line(2, loss="Infinity")],
        [line(1, loss=1.0), line(2, loss="NaN"), line(3, loss=2.0), line(4, loss="-Infinity")],
        [line(1, loss=1e300), line(2, loss=1e-300)],
        [line(1, loss=-1e308), line(2, loss=1e308)],
        [line(1, loss=0.0), line(2, loss=0.0)],
        [line(1, loss=[1], accuracy=None, note="text", flag=True)],
        [{"loss": 1.0}, {"step": "x", "split": 3, "loss": 1.0}],
        [line(step, loss=1 / step, rmse=1.0) for step in range(1, 4000)],
        [line(10**12, loss=1.0), line(10**12 + 1, loss=2.0)],
    ],
)
def test_short_and_odd_metrics_do_not_break_the_page(tmp_path, lines):
    one = make_run(tmp_path / "a", lines)
    check_page(write_report([one]))
    check_page(write_report([one, make_run(tmp_path / "b", full_lines(5))], tmp_path / "both.html"))


@pytest.mark.parametrize(
    "predictions",
    [
        digit_predictions(shape=(8, 8, 3)),
        digit_predictions(shape=(4, 6, 2), dtype=np.float32),
        digit_predictions(shape=(40, 1), dtype=np.float32),
        digit_predictions(shape=(40,), dtype=np.float64),
        digit_predictions(100),
        digit_predictions(names=[]),
        digit_predictions(2),
        digit_predictions()
        | {
            "worst_id": np.array([-1, 999]),
            "worst_image": np.zeros((2, 8, 8, 1)),
        },
        digit_predictions() | {"worst_image": np.full((30, 8, 8, 1), np.nan)},
        {"label": np.zeros(3, np.int32)},
        {"label": np.zeros(3, np.int32), "prediction": np.zeros(2, np.int32)},
        {"label": np.zeros(3), "prediction": np.zeros(3)},
        {"label": np.array([0, 2**30]), "prediction": np.array([0, 1])},
        {"label": np.zeros(3, np.int32), "prediction": np.zeros(3, np.int32)},
    ],
)
def test_odd_predictions_do_not_break_the_page(tmp_path, predictions):
    check_page(write_report([make_run(tmp_path / "a", [], predictions=predictions)]))


def test_damaged_files_are_named_or_left_out(tmp_path):
    folder = make_run(tmp_path / "a", full_lines(5))
    (folder / "predictions.npz").write_bytes(b"PK\x03\x04 torn")
    check_page(write_report([folder]))
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json: not JSON"):
        write_report([folder])
    (folder / "run.json").write_text("[]")
    check_page(write_report([folder]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="give the folder of a run"):
        write_report([tmp_path / "empty"])
    with pytest.raises(ValueError, match="no run given"):
        write_report([])


def curves_of(page):
    """The `<svg class="chart">` elements of a page, each parsed as XML."""
    texts = re.findall(r'<svg class="chart".*?</svg>', page, re.DOTALL)
    return [ElementTree.fromstring(text) for text in texts]


def test_a_long_run_is_simplified_but_keeps_its_spikes(tmp_path):
    count = 20_000
    values = [1.0 + step % 2 for step in range(count)]
    values[7777] = 1.9999e3  # 2% of the values may leave the axis at its upper end
    values[9999] = "NaN"
    lines = [
        line(step, loss=value, rate=0.0 if step != 5555 else 7.0)
        for step, value in enumerate(values)
    ]
    start = time.monotonic()
    text = check_page(write_report([make_run(tmp_path / "run", lines)]))
    assert time.monotonic() - start < 10
    assert len(text) < 60_000
    loss, rate = curves_of(text)
    assert [note.text for note in rate.iter("title")] == ["Rate: 0"]
    # The spike of one step in 20,000 reaches the top of the axes.
    path = max((node.get("d") for node in rate.iter("path")), key=len)
    heights = [float(y) for _, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)]
    box = next(rate.iter("rect"))
    assert min(heights) - float(box.get("y")) < 0.05 * float(box.get("height"))
    assert loss.findall(".//use"), "the mark of the value that is not a number"


def test_the_curve_on_the_page_goes_through_its_points(tmp_path):
    """The places of the points are found apart from what matplotlib writes: the corners of its
    path are where the circles with the notes are."""
    values = [3.0, 1.0, 2.0, 2.5, 0.5]
    lines = [line(10 * index, loss=value) for index, value in enumerate(values)]
    lines.insert(2, line(15, loss="NaN"))
    (loss,) = curves_of(check_page(write_report([make_run(tmp_path / "run", lines)])))
    assert loss.get("role") == "img"
    assert loss[0].tag == "title"
    assert loss[0].text == "Loss: 0.5"
    circles = loss.findall("circle")
    assert [circle[0].text for circle in circles] == [
        "train, step 0: 3",
        "train, step 10: 1",
        "train, step 15: nan",
        "train, step 20: 2",
        "train, step 30: 2.5",
        "train, step 40: 0.5",
    ]
    places = [(float(circle.get("cx")), float(circle.get("cy"))) for circle in circles]
    (curve,) = [
        node for node in loss.iter("path") if "stroke: var(--c0)" in (node.get("style") or "")
    ]
    corners = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", curve.get("d"))]
    assert np.allclose(corners, places[:2] + places[3:], atol=0.11)
    assert curve.get("d").count("M") == 2, "a gap where the value is not a number"
    (mark,) = loss.iter("use")
    assert np.allclose([float(mark.get("x")), float(mark.get("y"))], places[2], atol=0.11)


def test_no_colour_of_a_curve_is_fixed(tmp_path):
    """Light and dark share one drawing, so that every colour in it must be a variable that the
    style sheet sets for both."""
    runs = [make_run(tmp_path / name, full_lines()) for name in ("a", "b", "c")]
    for chosen in (runs[:1], runs):
        text = check_page(write_report(chosen, tmp_path / "page.html"))
        charts = curves_of(text)
        assert len(charts) == 4
        for chart in charts:
            inside = ElementTree.tostring(chart, encoding="unicode")
            assert not re.search(r"#[0-9a-fA-F]{6}", inside)
            assert "black" not in inside
        used = set(re.findall(r"var\(--(\w+)\)", "".join(text.split("<body>")[1:])))
        assert used - {"c"} <= set(style.COLORS)
        assert {"ink", "muted", "rule", "c0"} <= used
        sheet = text.split("</style>")[0]
        assert all(len(re.findall(rf"--{name}: #", sheet)) == 2 for name in used - {"c"})
    assert len(set(style.LIGHT.values())) == len(style.LIGHT)


def test_the_same_run_makes_the_same_page(tmp_path):
    run = make_run(tmp_path / "run", full_lines())
    pages = [write_report([run]).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]


def test_labels_do_not_meet_and_stay_inside():
    random = np.random.default_rng(0)
    for _ in range(50):
        positions = random.uniform(0, 100, random.integers(1, 9)).tolist()
        placed = plots.spread(positions, 12.0, 0.0, 100.0)
        ordered = sorted(placed)
        assert all(b - a >= 12 - 1e-6 for a, b in itertools.pairwise(ordered))
        assert min(placed) >= -1e-6
        assert max(placed) <= 100 + 1e-6


def test_names_of_runs_are_told_apart(tmp_path):
    runs = [
        history.History(tmp_path / path, {"name": name}, [], {})
        for path, name in (("x", "a"), ("y", "a"), ("z", "b"))
    ]
    assert history.names(runs) == ["a x", "a y", "b z"]
    assert history.names(runs[1:]) == ["a", "b"]
    assert history.names([runs[0], runs[0]]) == ["a 1", "a 2"]


def test_a_picture_of_the_regression_has_no_accuracy(tmp_path):
    folder = make_run(
        tmp_path / "a",
        [line(step, loss=1 / step, mean_squared_error=2 / step) for step in range(1, 9)],
    )
    loaded = history.load(folder)
    assert loaded.metric == "mean_squared_error"
    assert loaded.best("mean_squared_error", "train") == (8, 0.25)
    assert [quantity.title for quantity in plots.quantities([loaded])] == [
        "Loss",
        "Mean squared error",
    ]
