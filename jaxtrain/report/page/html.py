"""The page: report.html shows one run or several in one self-contained document; the PNG plots lie
beside it.

Everything is inline and nothing is a script, so the file can be mailed, archived and opened
offline. All text from a run is escaped.
"""

import base64
import html
import io
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain import extras
from jaxtrain.errors import UserError
from jaxtrain.messages import bytes_text
from jaxtrain.report.page import history, plots, prediction_plots
from jaxtrain.report.page.history import History
from jaxtrain.report.page.style import SHEET, curve_color
from jaxtrain.report.page.svg import inline_svg
from jaxtrain.report.terminal.tables import clean, count_text, rate_text, value_text

MARK = "Made by jaxtrain."
"""What tells a page of ours from a user's own, which is never overwritten."""
MOST_CLASSES_IN_TABLE = 30
MOST_PAIRS = 15
MOST_SAMPLES = 9
"""Texts of a language model that are shown, from the first to the last."""


def write_report(
    workdirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None
) -> Path:
    """Writes the page of one run or several, and plots/*.png beside it; returns the page's path.

    `out` is the page's file; by default report.html in the run's folder, or in `comparison/` for
    several runs. `UserError` if a folder holds no run, or if what would be written over was not
    made here.
    """
    extras.require("a report", "matplotlib")
    histories = [history.load(workdir) for workdir in workdirs]
    if not histories:
        raise UserError("report: no run given; give the folder of one run or several")
    out = (
        Path(out)
        if out is not None
        else (histories[0].folder if len(histories) == 1 else Path("comparison")) / "report.html"
    )
    _refuse_to_overwrite(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: a reader never sees half a page.
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    with plots.plot_style():
        curves = plots.draw_curves(histories)
        page = render(histories, [inline_svg(plot) for plot in curves])
        draft.write_text(page, encoding="utf-8")
        draft.replace(out)
        plots.write_png(
            [*curves, *prediction_plots.draw_predictions(histories)], out.parent / "plots"
        )
    return out


def _refuse_to_overwrite(out: Path) -> None:
    """`UserError` if the page or the folder of plots is there and somebody else's; a page of ours
    says so in its last line, and plots beside it are ours."""
    try:
        if MARK in out.read_text(encoding="utf-8", errors="replace"):
            return
        raise UserError(
            f"{out}: was not made by jaxtrain and is left alone; rename it, or give another folder"
            " by `python -m jaxtrain report ... --out=FOLDER`"
        )
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        raise UserError(f"{out}: is a folder; give another by --out=FOLDER") from None
    except NotADirectoryError:
        raise UserError(f"{out.parent}: is a file, not a folder; give another --out") from None
    images = out.parent / "plots"
    if images.is_dir() and not all(map(plots.is_ours, images.iterdir())):
        raise UserError(
            f"{images}: holds files that were not made by jaxtrain; rename it, or give another"
            " folder by `python -m jaxtrain report ... --out=FOLDER`"
        )


def render(histories: Sequence[History], curves: Sequence[str] = ()) -> str:
    """The page as text, with `curves` as SVG elements.

    >>> page = render([History(Path("r"), {"name": "<b>"}, [], {})])
    >>> "&lt;b&gt;" in page and "<b>" not in page
    True
    """
    single = len(histories) == 1
    title = histories[0].name if single else f"{len(histories)} runs compared"
    sections = [_main_numbers(histories[0])] if single else [_comparison(histories)]
    sections.append(_curves(curves))
    if single:
        sections += [
            _samples(histories[0]),
            _confusion(histories[0]),
            _mistakes(histories[0]),
            _configuration(histories[0]),
        ]
    else:
        labels = history.names(histories)
        sections += [_run_details(run, label) for run, label in zip(histories, labels, strict=True)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light'
        f' dark"><title>{_text(title)}</title><style>{SHEET}</style></head><body><main>'
        f"<header><h1>{_text(title)}</h1>{_subtitle(histories)}</header>{''.join(sections)}"
        f"<footer>{MARK} Hover a curve for its values.</footer></main></body></html>\n"
    )


def _subtitle(histories: Sequence[History]) -> str:
    if len(histories) > 1:
        return f"<p>{_text(', '.join(dict.fromkeys(run.name for run in histories)))}</p>"
    run = histories[0].run
    hardware = run.get("hardware")
    device = (
        hardware.get("device") or hardware.get("device_kind")
        if isinstance(hardware, dict)
        else hardware
    )
    parts = [
        f"{run['devices']} × {device}" if device and run.get("devices") else device,
        run.get("started"),
        histories[0].folder,
    ]
    return f"<p>{' · '.join(_text(part) for part in parts if part)}</p>"


def _main_numbers(run: History) -> str:
    """The main numbers of a run: its last metric and loss, steps, parameters and speed."""
    shown: list[tuple[str, str, str]] = []
    for key in dict.fromkeys([run.metric, "loss"]):
        last = ((split, run.last(key, split)) for split in _by_weight(run) if key)
        split, value = next((found for found in last if found[1] is not None), ("", None))
        if key and value is not None:
            best = run.best(key, "validation") if split == "test" else None
            note = f"best validation {value_text(key, best[1])} at step {best[0]:,}" if best else ""
            shown.append((f"{split} {_words(key)}", value_text(key, value), note))
    steps = max(
        (line["step"] for line in run.metrics if isinstance(line.get("step"), int)), default=0
    )
    shown.append(("steps", f"{steps:,}", ""))
    if isinstance(run.run.get("parameters"), int):
        size = run.run.get("state_bytes_per_device")
        note = f"{bytes_text(size)} of state a device" if isinstance(size, int | float) else ""
        count = run.run["parameters"]
        shown.append(("parameters", f"{count:,}" if count < 1e6 else count_text(count), note))
    seen = run.last("tokens", "train")
    if seen is not None:
        shown.append(("tokens seen", rate_text(seen), ""))
    if (rate := _rate(run)) is not None:
        shown.append(("examples a second", rate_text(rate), "median"))
    items = (
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd><dd class=note>{_text(note)}</dd></div>"
        for name, value, note in shown
    )
    return f"<dl class=numbers>{''.join(items)}</dl>"


def _by_weight(run: History) -> list[str]:
    """The sets of a run, the one that its result is read from first."""
    found = history.splits([run])
    return sorted(found, key=lambda name: {"test": 0, "validation": 1, "train": 3}.get(name, 2))


def _comparison(histories: Sequence[History]) -> str:
    """What differs first: a table with the mean of each setting over its seeds, if there are any,
    and one with a row for each run. The best of a column is bold."""
    columns = history.results(histories)
    rates = [_rate(run) for run in histories]
    if any(rate is not None for rate in rates):
        columns.append(("", "examples_per_second", rates))
    settings = history.differing(histories)
    seeds = _seeds(histories, columns)
    names = history.names(histories)
    rows: list[tuple[str, list[str], list[tuple[str, float | None]]]] = []
    for index, (run, label) in enumerate(zip(histories, names, strict=True)):
        chip = f'<i class=chip style="--c:var(--{curve_color(index)})"></i>'
        cells = [
            ("" if values[index] is None else _number(key, values[index]), values[index])
            for _, key, values in columns
        ]
        rows.append(
            (f"{chip}{_text(label)}", [_value(run.config.get(key)) for key in settings], cells)
        )
    more = "" if settings else "<p>The runs have the same settings.</p>"
    return seeds + _section("Runs", more, _table("run", settings, columns, rows))


Columns = Sequence[tuple[str, str, Sequence[float | None]]]
"""What is compared: set, metric, and the value of each run."""


def _seeds(histories: Sequence[History], columns: Columns) -> str:
    """Mean and standard deviation of each setting over its seeds; nothing without any."""
    groups = history.groups(histories)
    if all(len(group.runs) == 1 for group in groups):
        return ""
    settings = list(groups[0].settings)
    rows = []
    for group in groups:
        cells = []
        for _, key, values in columns:
            found = history.statistic([values[index] for index in group.runs])
            cells.append((_statistic(key, found), None if found is None else found.mean))
        shown = [_value(group.settings[key]) for key in settings]
        rows.append((str(len(group.runs)), shown, cells))
    lead = (
        "<p>Mean over seeds ± sample standard deviation (n - 1), and the number of runs that have"
        " the value.</p>"
    )
    return _section("Settings", lead, _table("runs", settings, columns, rows))


def _statistic(key: str, found: history.Statistic | None) -> str:
    if found is None:
        return ""
    mean = _number(key, found.mean)
    spread = "" if found.deviation is None else f" ± {_number(key, found.deviation)}"
    return f"{mean}{spread} <span class=note>({found.count})</span>"


def _number(key: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return _text(rate_text(value) if key.endswith("_per_second") else value_text(key, value))


def _table(
    first: str,
    settings: Sequence[str],
    columns: Columns,
    rows: Sequence[tuple[str, Sequence[str], Sequence[tuple[str, float | None]]]],
) -> str:
    """A table of settings and numbers; `rows` hold what stands first, the settings, and each number
    as text and as what it is compared by."""
    titles = [f"{split} {_words(key)}".strip() for split, key, _ in columns]
    head = "".join(f"<th>{_text(key.removesuffix('.python'))}</th>" for key in settings)
    head += "".join(f"<th class=number>{_text(title)}</th>" for title in titles)
    body = []
    for label, shown, cells in rows:
        line = f"<th scope=row>{label}</th>" + "".join(f"<td>{value}</td>" for value in shown)
        for place, (text, value) in enumerate(cells):
            every = [other[2][place][1] for other in rows]
            finite = [each for each in every if each is not None and math.isfinite(each)]
            smaller = history.smaller_is_better(columns[place][1])
            best = len(rows) > 1 and finite and value == (min if smaller else max)(finite)
            line += f"<td class='number{' best' if best else ''}'>{text}</td>"
        body.append(f"<tr>{line}</tr>")
    return (
        f"<div class=wide><table><thead><tr><th>{_text(first)}</th>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _curves(curves: Sequence[str]) -> str:
    figures = "".join(f"<figure>{curve}</figure>" for curve in curves)
    return _section("Curves", f"<div class=charts>{figures}</div>") if curves else ""


def _confusion(run: History) -> str:
    found = history.confusion(run.predictions)
    if found is None:
        return ""
    counts, names = found
    wrong = int(counts.sum() - np.trace(counts))
    lead = f"<p>{wrong:,} of {counts.sum():,} predictions are wrong.</p>"
    if len(names) > MOST_CLASSES_IN_TABLE:
        return _section("Confusion", lead + _pairs(counts, names))
    most_wrong = max(int((counts - np.diag(np.diag(counts))).max()), 1)
    head = "".join(f"<th class=number>{_text(name)}</th>" for name in names)
    rows = []
    for row, name in enumerate(names):
        total = int(counts[row].sum())
        cells = "".join(
            _cell(int(count), total, most_wrong, right=row == column)
            for column, count in enumerate(counts[row])
        )
        recall = f"{100 * counts[row, row] / total:.1f}%" if total else ""
        rows.append(
            f"<tr><th scope=row>{_text(name)}</th>{cells}<td class='number note'>{recall}</td></tr>"
        )
    table = (
        f"<table class=confusion><thead><tr><th>label ↓ prediction →</th>{head}<th"
        " class=number>recall</th></tr></thead>"
    )
    return _section(
        "Confusion", f"{lead}<div class=wide>{table}<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(count: int, total: int, most_wrong: int, *, right: bool) -> str:
    """A count, shaded: what is right by its share of the label, what is wrong by comparison with
    the commonest mistake."""
    if not count:
        return "<td class='number none'>·</td>"
    heat = 0.35 * count / total if right else 0.15 + 0.5 * count / most_wrong
    return (
        f"<td class='number {'right' if right else 'wrong'}'"
        f" style='--h:{100 * heat:.0f}%'>{count:,}</td>"
    )


def _pairs(counts: np.ndarray, names: Sequence[str]) -> str:
    """The commonest mistakes as a list, where there are too many classes for a table."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    found = [
        (names[row], names[column], int(wrong[row, column]))
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
    ]
    rows = "".join(
        f"<tr><td>{_text(a)}</td><td>{_text(b)}</td><td class=number>{n:,}</td></tr>"
        for a, b, n in found
        if n
    )
    return (
        "<table><thead><tr><th>label</th><th>taken for</th><th"
        f" class=number>times</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _samples(run: History) -> str:
    """What a language model said: its last text, and above it some of those before, the first
    among them."""
    if not run.samples:
        return ""
    count = len(run.samples)
    shown = sorted(
        {round(place * (count - 1) / (MOST_SAMPLES - 1)) for place in range(MOST_SAMPLES)}
    )
    items = []
    for place in shown:
        sample = run.samples[place]
        prompt, said = (clean(sample[part].expandtabs(4)) for part in ("prompt", "text"))
        text = f"<b>{_text(prompt)}</b>{_text(said)}"
        title = f"<summary>step {sample['step']:,}</summary>"
        # the first newline in a pre is not shown, so that one of the text's own stays
        items.append(
            f"<details{' open' if place == count - 1 else ''}>{title}"
            f"<pre class=sample>\n{text}</pre></details>"
        )
    some = "" if len(shown) == count else f" {len(shown)} of {count:,}; all are in samples.jsonl."
    lead = f"<p>What the model says after the prompt, which is bold.{some}</p>"
    return _section("Samples", lead, *items)


def _mistakes(run: History) -> str:
    found = history.mistakes(run.predictions)
    if not found:
        return ""
    pictures = history.grey(np.stack([mistake["image"] for mistake in found]))
    items = []
    for mistake, picture in zip(found, pictures, strict=True):
        words = f"<b>{_text(mistake['prediction'])}</b> <span>is {_text(mistake['label'])}</span>"
        note = (
            f"example {mistake['id']}: labelled {mistake['label']}, taken for"
            f" {mistake['prediction']}"
        )
        share = (
            ""
            if math.isnan(mistake["probability"])
            else f"<small>p(label) {mistake['probability']:.2g}</small>"
        )
        items.append(
            f"<figure title='{_text(note)}'>{_picture(picture, note)}"
            f"<figcaption>{words}{share}</figcaption></figure>"
        )
    lead = (
        "<p>Prediction in bold, then the label, and the probability that the model gave it; worst"
        " first.</p>"
    )
    return _section("Worst mistakes", f"{lead}<div class=mistakes>{''.join(items)}</div>")


def _picture(picture: np.ndarray, note: str) -> str:
    """An example as an inline PNG, or a signal (L,) or (L, C) as a small line."""
    if picture.ndim <= 2:
        signal_L = picture if picture.ndim == 1 else picture[:, 0]
        path = " ".join(
            f"{100 * x / max(len(signal_L) - 1, 1):.1f},{64 - 60 * y / 255:.1f}"
            for x, y in enumerate(signal_L.tolist())
        )
        return (
            f'<svg viewBox="0 0 100 68" role="img"><title>{_text(note)}</title><polyline'
            f' class="signal" points="{path}"/></svg>'
        )
    from PIL import Image

    channels = picture.shape[-1]
    image = Image.fromarray(picture[..., :3] if channels >= 3 else picture[..., 0])
    file = io.BytesIO()
    image.save(file, "PNG")
    pixels = " class=pixels" if max(picture.shape[:2]) < 64 else ""
    return (
        f'<img{pixels} alt="{_text(note)}"'
        f' src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
    )


def _configuration(run: History) -> str:
    rows = {**run.config}
    apart = {
        key: run.run[key]
        for key in ("git", "versions", "hardware", "mesh", "data")
        if isinstance(run.run.get(key), dict)
    }
    shown = " open" * (len(rows) <= 20)
    settings = f"<details{shown}><summary>Settings</summary>{_named_values(rows)}</details>"
    blocks = [settings] if rows else []
    changed = {
        f"after step {change.step:,}: {name}": f"{change.before[name]:g} → {value:g}"
        for change in run.changes
        for name, value in change.values.items()
    }
    if changed:
        blocks.insert(0, f"<h3>Changed while it trained</h3>{_named_values(changed)}")
    if apart:
        blocks.append(
            "<details><summary>Versions, hardware,"
            f" data</summary>{_named_values(history.flat(apart))}</details>"
        )
    command = run.run.get("command")
    if command:
        words = " ".join(map(str, command)) if isinstance(command, list) else command
        blocks.insert(0, f"<pre><code>{_text(words)}</code></pre>")
    return _section("How it was made", "".join(blocks)) if blocks else ""


def _run_details(run: History, label: str) -> str:
    inner = _main_numbers(run) + _samples(run) + _confusion(run) + _mistakes(run)
    inner += _configuration(run)
    return f"<details class=run><summary>{_text(label)}</summary>{inner}</details>"


def _named_values(rows: Mapping[str, Any]) -> str:
    cells = (
        f"<tr><th scope=row>{_text(key)}</th><td>{_value(value)}</td></tr>"
        for key, value in rows.items()
    )
    return f"<div class=wide><table class=settings><tbody>{''.join(cells)}</tbody></table></div>"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{''.join(parts)}</section>"


def _rate(run: History) -> float | None:
    values: Iterable[float] = (
        value for value in run.series("examples_per_second", "train")[1] if math.isfinite(value)
    )
    return statistics.median(found) if (found := list(values)) else None


def _words(key: str) -> str:
    return key.replace("_", " ")


def _value(value: Any) -> str:
    words = (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else "–"
        if value is None or value == ""
        else str(value)
    )
    return _text(words)


def _text(value: Any) -> str:
    """Text made safe for any place in the page, attributes included."""
    return html.escape(str(value), quote=True)
