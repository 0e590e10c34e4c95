"""Samples on the way: what a run says every so often is what its parameters say, is kept to the
byte by a run that is stopped, and stands in the report; what cannot be said is an error at the
start."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from test_resume import stopped
from test_run import start, toy, wrong_at_start

import jaxtrain
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.cli import main as run_command
from jaxtrain.data.sources.markov import SyntheticTokens
from jaxtrain.data.sources.text import Text
from jaxtrain.data.text.tokenizers import SAVED, Bytes, Characters, open_tokenizer
from jaxtrain.errors import UserError
from jaxtrain.horizon import Horizon
from jaxtrain.inference import prompts, sampling
from jaxtrain.models import Transformer
from jaxtrain.models.encoder import Encoder
from jaxtrain.optimizers import SGD
from jaxtrain.report.page import history, html
from jaxtrain.report.terminal.progress import Progress
from jaxtrain.runner import samples
from jaxtrain.tasks import MaskedLanguage, NextToken
from jaxtrain.train.cadence import Cadence

WORDS = "To be, or not to be: <b>that</b> is the question & more.\n"
CHARACTERS = "".join(sorted(set(WORDS)))
MODEL = Transformer(vocabulary=len(CHARACTERS), width=16, depth=1, heads=2, max_length=32)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of six steps over the characters of a small text, sampled at every second."""
    text = folder / "text.txt"
    text.write_text(WORDS * 40)
    source = Text(
        path=(str(text),),
        tokenizer="characters",
        length=16,
        split_by="tokens",
        cache=str(folder / "cache"),
        train="all[:90%]",
        validation="",
        test="",
    )
    return {
        "model": MODEL,
        "data": source,
        "task": NextToken(),
        "optimizer": SGD(learning_rate=0.5),
        "augment": None,
        "steps": 6,
        "batch_size": 8,
        "checkpoint_every": Horizon(3, "steps"),
        "sample_every": Horizon(2, "steps"),
        "sample_prompt": "To",
        "sample_tokens": 30,
        "offers": {},
    } | changes


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run, whose cache of tokens is lost since."""
    folder = tmp_path_factory.mktemp("golden")
    assert start(folder / "run", **settings(folder)) == 0
    shutil.rmtree(folder / "cache")
    return folder / "run"


def said(workdir: Path) -> list[dict[str, Any]]:
    """The lines of the samples of a run."""
    return [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]


def test_a_sample_is_what_the_average_says(golden: Path) -> None:
    lines = said(golden)
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    trained = jaxtrain.load(golden)
    assert trained.averaged, "the run keeps an average"
    tokenizer = Characters(CHARACTERS)
    [ids_N] = sampling.generate(
        trained.model,
        trained.params,
        [tokenizer.encode("To")],
        most=30,
        temperature=0.8,
        seed=0,
        capacity=16,
        slide=True,
    )
    assert lines[-1] == {"step": 6, "prompt": "To", "text": tokenizer.decode(ids_N)}
    assert len({line["text"] for line in lines}) == 4


def test_the_command_says_the_same_by_the_tokenizer_that_the_run_kept(
    golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Learned from the text, and nowhere else any more."""
    assert open_tokenizer(golden / SAVED) == Characters(CHARACTERS)
    assert run_command(["sample", str(golden), "--prompt=To", "--most=30"]) == 0
    assert capsys.readouterr().out == f"To{said(golden)[-1]['text']}\n"


def test_a_run_told_to_stop_where_a_sample_is_due_ends_with_the_same_bytes(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, made = tmp_path / "run", settings(tmp_path)
    assert stopped(run, monkeypatch, step=4, number=signal.SIGTERM, **made) == 75
    assert [line["step"] for line in said(run)] == [0, 2]
    kept = Checkpoints(run).loop(4)
    assert kept["sample_due"] and kept["samples_bytes"] == (run / "samples.jsonl").stat().st_size
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "prompt": "To", "text": "drawn before a ki')
    assert start(run, **made) == 0
    assert (run / "samples.jsonl").read_bytes() == (golden / "samples.jsonl").read_bytes()

    # nothing is drawn any more, and nothing that was is lost
    monkeypatch.setattr(sampling, "generate", None)
    assert start(run, **made | {"steps": 7, "sample_every": Horizon(0)}) == 0
    assert (run / "samples.jsonl").read_bytes() == (golden / "samples.jsonl").read_bytes()
    assert Checkpoints(run).loop(7)["samples_bytes"] == (run / "samples.jsonl").stat().st_size


def test_on_a_mesh_and_in_half_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = settings(tmp_path, steps=2, mesh="data:2,fsdp:2", precision="bf16")
    assert start(tmp_path / "mesh", **made) == 0
    assert [line["step"] for line in said(tmp_path / "mesh")] == [0, 2]
    first = said(tmp_path / "mesh")[0]["text"].split("\n")
    assert "step 0  sample\n  │ To" + "\n  │ ".join(first) in capsys.readouterr().out


def test_off_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    off = settings(tmp_path, sample_every=Horizon(0), sample_tokens=9)
    assert not wrong_at_start(tmp_path / "off", **off)
    assert (
        "--sample_tokens=9: nothing is sampled; set --sample_every, e.g. 10%"
        in capsys.readouterr().err
    )
    none: Any = None
    samples.Samples(toy(), tmp_path, none, none, none).resume(0)
    assert not (tmp_path / samples.FILE).exists()


def test_the_report_shows_samples_as_text(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    lines = [
        {"step": step, "prompt": "<To>", "text": f"\x1b[1m & be\n\t{step}</pre>"}
        for step in range(0, 1000, 10)
    ]
    broken = ["", "[]", '{"step": "x", "prompt": "", "text": ""}']
    content = "\n".join([*map(json.dumps, lines), *broken, '{"step": 1'])
    (tmp_path / "samples.jsonl").write_text(content)
    page = html.render([history.load(tmp_path)])
    assert (
        "<details open><summary>step 990</summary><pre class=sample>\n<b>&lt;To&gt;</b>\\x1b[1m"
        " &amp; be\n    990&lt;/pre&gt;</pre></details></section>" in page
    )
    assert page.count("<pre class=sample>") == 9 and "<summary>step 0</summary>" in page
    assert "9 of 100; all are in samples.jsonl." in page
    assert "Samples" not in html.render([history.History(Path("r"), {}, [], {})])


def test_the_terminal_shows_lines_behind_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(10, live=False).sample(1200, "A", "b\n\n\x1bc\n")
    assert capsys.readouterr().out == "step 1,200  sample\n  │ Ab\n  │ \n  │ \\x1bc\n  │ \n"


def test_cadence() -> None:
    when = Cadence(total=10, per_call=8, log=50, sample=4)
    assert [when.next(step) for step in (0, 4, 8)] == [4, 8, 10]
    assert [step for step in range(11) if when.samples(step)] == [0, 4, 8, 10]
    assert not Cadence(total=10).samples(10)


def test_ids_that_the_tokenizer_does_not_have() -> None:
    """The table of a model may have more rows: a text shows that one of them was drawn."""
    unknown = "\N{REPLACEMENT CHARACTER}"
    assert prompts.text_of(Characters("ab"), [0, 5, 1, 2]) == f"a{unknown}b{unknown}"
    # two of three bytes of a character, and then none of the text
    assert prompts.text_of(Bytes(), [0xE2, 0x82, 300, 0x61]) == f"{unknown}{unknown}a"


@pytest.mark.parametrize(
    ("tokenizer", "wanted"),
    [(Bytes(), [10]), (Characters("ab"), [0]), (Characters("\nab"), [0])],
)
def test_an_empty_prompt_begins_a_text(tokenizer: Any, wanted: list[int]) -> None:
    assert prompts.beginning(tokenizer, "") == wanted


def test_wrong_inputs(tmp_path: Path) -> None:
    assert wrong_at_start(tmp_path / "a", "--sample_every=5%") == (
        "--sample_every=5%: the model MLP says no texts, a Transformer does; --sample_every=0 does"
        " without"
    )
    made = settings(tmp_path)
    encoder = Encoder(vocabulary=len(CHARACTERS) + 1, width=16, depth=1, heads=2, max_length=32)
    masked = {"model": encoder, "task": MaskedLanguage(mask_token=len(CHARACTERS))}
    assert "the model Encoder says no texts" in wrong_at_start(tmp_path / "b", **made | masked)
    causal = masked | {"model": MODEL.copy(vocabulary=len(CHARACTERS) + 1)}
    assert wrong_at_start(tmp_path / "g", **made | causal) == (
        "--sample_every=2steps: the task MaskedLanguage teaches no next token, so nothing can be"
        " drawn; --sample_every=0 does without"
    )
    assert "--sample_prompt=Tä: 'ä' (U+00E4) is none of the" in wrong_at_start(
        tmp_path / "c", **made | {"sample_prompt": "Tä"}
    )
    assert wrong_at_start(tmp_path / "d", **made | {"sample_prompt": "To be, or not to be"}) == (
        "--sample_prompt=To be, or not to be: a prompt of 19 tokens is longer than the 16 positions"
        " that the model learned; shorten it to 16 tokens at most"
    )
    bare = made | {"data": SyntheticTokens(vocabulary=8), "model": MODEL.copy(max_length=64)}
    assert wrong_at_start(tmp_path / "e", **bare) == (
        "--sample_every=2steps: the data has no tokenizer, so tokens are no text; train on"
        " --data=text, or --sample_every=0 does without"
    )
    assert "--sample_tokens=0: must be" in wrong_at_start(
        tmp_path / "f", **made | {"sample_tokens": 0}
    )
    for name in (samples.FILE, SAVED):
        foreign = tmp_path / name
        foreign.mkdir()
        (foreign / name).write_text("{}")
        assert wrong_at_start(foreign, **made) == (
            f"--workdir={foreign}: holds {name} but no run.json; restore it, or use a new workdir"
        )
    with pytest.raises(UserError, match="most=0: must be at least 1"):
        sampling.check(MODEL, [[1]], most=0)
