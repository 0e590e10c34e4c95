"""`python -m jaxtrain sample`: a run of ours and a folder of Hugging Face's say what the library
says, in whole characters; a chat reads lines; what cannot be is said in one line."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_run import start

import jaxtrain
from jaxtrain.cli import main as run_command
from jaxtrain.cli import sample
from jaxtrain.data.sources.text import Text
from jaxtrain.data.text.plain_tokenizers import Bytes
from jaxtrain.inference import sampling
from jaxtrain.models import Encoder, Transformer
from jaxtrain.optimizers import SGD
from jaxtrain.tasks import NextToken
from jaxtrain.weights import exporting

MODEL = Transformer(vocabulary=257, width=16, depth=1, heads=2, max_length=32)
TEMPLATE = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}[a]"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps on a small text."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("To be, or not to be: that is the quéstion.\n" * 40)
    source = Text(
        path=(str(folder / "text.txt"),),
        length=16,
        split_by="tokens",
        cache=str(folder / "cache"),
    )
    made: dict[str, Any] = {
        "model": MODEL,
        "data": source,
        "task": NextToken(),
        "optimizer": SGD(learning_rate=0.1),
        "augment": None,
        "steps": 2,
        "batch_size": 8,
        "offers": {},
    }
    assert start(folder / "work", **made) == 0
    return folder / "work"


def command(*arguments: str) -> int:
    """The exit status of the command."""
    return run_command(["sample", *arguments])


def test_a_run_says_what_the_library_says_of_it(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(str(workdir), "--prompt=To b", "--most=20", "--seed=4", "--top_k=9") == 0
    shown = capsys.readouterr().out
    trained = jaxtrain.load(workdir)
    [text] = sampling.generate(
        trained.model,
        trained.params,
        [Bytes().encode("To b")],
        most=20,
        seed=4,
        temperature=0.8,
        top_k=9,
        stop=Bytes().eos,
        slide=True,
        capacity=16,  # the length of the rows: later positions were never trained
    )
    assert shown == f"To b{Bytes().decode(text)}\n"


def test_a_prompt_may_come_by_a_pipe_and_positions_may_run_out(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("To be"))
    assert command(str(workdir), "--most=60", "--temperature=0") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("To be")
    assert shown.err == (
        "jaxtrain: note: the text is longer than the 16 positions that the model learned; it"
        " went on from the last half of its text\n"
    )
    assert command(str(workdir), "--prompt=To be", "--most=12") == 0
    assert not capsys.readouterr().err, "5 tokens and the 11 that are fed fit"


class Told:
    """A model's answers, given beforehand."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    def stream(self, *_: Any, **options: Any) -> Any:
        return (np.array([byte]) for byte in self.text)


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        ("", "aé##b###c€"),
        ("###", "aé##b"),
        ("#b#", "aé#"),
        ("zz", "aé##b###c€"),
        ("€", "aé##b###c"),
    ],
)
def test_text_comes_in_whole_characters_and_ends_before_a_stop_text(
    stop: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "stream", Told("aé##b###c€".encode()).stream)
    speaker = sample.Speaker(None, None, Bytes(), {}, stop)
    assert "".join(sample.said(speaker, [1])) == wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama at Hugging Face's names, with a tokenizer that has a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    pytest.importorskip("jinja2")
    where = tmp_path_factory.mktemp("model") / "model"
    words = ["<s>", "</s>", *"abcdefgh[] u"]
    model = Transformer(
        vocabulary=len(words),
        width=16,
        depth=1,
        heads=2,
        norm="rms",
        gated=True,
        bias="none",
        activation="silu",
        positions="rotary",
    )
    params = nn.meta.unbox(model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
    exporting.save(where, model, jax.tree.map(np.asarray, params))
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: index for index, word in enumerate(words)}, [])
    )
    made.decoder = tokenizers.decoders.Fuse()
    made.add_special_tokens(words[:2])
    made.save(str(where / "tokenizer.json"))
    described = {"chat_template": TEMPLATE, "eos_token": "</s>"}
    (where / "tokenizer_config.json").write_text(json.dumps(described))
    return where


def test_an_empty_prompt_begins_as_every_text(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(str(workdir), "--prompt=", "--most=4", "--temperature=0") == 0
    said = capsys.readouterr().out
    assert command(str(workdir), "--prompt=\n", "--most=4", "--temperature=0") == 0
    assert capsys.readouterr().out == "\n" + said


def test_a_chat_answers_line_by_line_and_remembers(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    whole = sampling.stream

    def watched(model: Any, params: Any, prompts: Any, **options: Any) -> Any:
        asked.append("".join(made.decode(prompts[0], special=True)))
        return whole(model, params, prompts, **options)

    from jaxtrain.data.text.tokenizers import open_tokenizer

    made = open_tokenizer(folder)
    monkeypatch.setattr(sampling, "stream", watched)
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n\nfed\n"))
    assert command(str(folder), "--chat", "--most=6") == 0
    asked_first, first, none, asked_second, second, last = capsys.readouterr().out.splitlines()
    assert (asked_first, none, asked_second, last) == ("> abc", "", "> fed", "")
    assert asked == ["[u]abc[a]", f"[u]abc[a]{first}[u]fed[a]"]
    assert set(first + second) <= set("abcdefgh[] u")


def test_another_tokenizer_is_refused_before_a_word_is_said(
    workdir: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that kept its own; the run's own is taken. Of a folder, whose ids it has not."""
    from jaxtrain.data.text.plain_tokenizers import Characters
    from jaxtrain.data.text.tokenizers import save

    save(Characters(" Tbo"), tmp_path)
    named = [str(workdir), "--prompt=To b", "--most=2"]
    assert command(*named, f"--tokenizer={tmp_path}") == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.count("\n") == 1
    assert (
        " is not the one that the run was trained with (257 ids), which lies in its folder; drop"
        " --tokenizer" in shown.err
    )
    assert command(*named) == 0 and command(*named, "--tokenizer=bytes") == 0
    capsys.readouterr()
    assert command(str(folder), "--prompt=hello", "--tokenizer=bytes") == 2
    shown = capsys.readouterr()
    assert not shown.out and "is it encoded by the model's tokenizer?" in shown.err


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_says_no_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Encoder(
        vocabulary=257, width=16, depth=1, heads=2, max_length=8, head="states", pooler=True
    )
    params = nn.meta.unbox(model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
    exporting.save(tmp_path / "model", model, jax.tree.map(np.asarray, params))
    assert command(str(tmp_path / "model"), "--prompt=a", "--tokenizer=bytes") == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.count("\n") == 1
    assert (
        "its model is Encoder, which says no texts; give a decoder, such as Llama; vectors of"
        " texts: jaxtrain.inference.embedding.embed" in shown.err
    )


def test_a_terminal_is_told_what_takes_a_while(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert command(str(workdir), "--prompt=To b", "--most=2") == 0
    reading, compiling = capsys.readouterr().err.splitlines()
    assert reading == f"jaxtrain: reading {workdir}" and compiling.startswith("jaxtrain: compiling")


def test_a_language_model_is_sampled_and_not_asked_for_predictions(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["predict", str(workdir), f"--out={tmp_path / 'p.csv'}"]) == 2
    said = capsys.readouterr().err
    remedy = f"python -m jaxtrain sample {workdir} --prompt=TEXT"
    assert said.endswith(f": a language model says texts, and no rows: {remedy}\n")
    assert command(*remedy.split()[4:], "--most=2") == 0


def test_errors_are_one_line(workdir: Path, folder: Path, tmp_path: Path) -> None:
    """Each with what to do."""
    cases = {
        (str(workdir), "--chat"): "its tokenizer has no chat template, so it was not taught to chat"
        "; give it --prompt",
        (str(workdir), "--chat", "--prompt=a"): "sample --chat: reads what you say line by line;"
        " drop --prompt",
        (str(workdir), "--system=a", "--prompt=a"): "sample --system: belongs to --chat",
        (str(workdir), "--prompt=a", "--most=x"): "sample --most=x: must be a whole number, e.g."
        " --most=200",
        (str(workdir), "--prompt=a", "--most=0"): "sample --most=0: must be at least 1",
        (str(workdir), "--prompt=a", "--seed=-1"): "sample --seed=-1: must be from 0 to 4294967295",
        (str(workdir), "--prompt=a", "--top_p=2"): "sample --top_p=2.0: must be above 0 and at",
        (str(workdir), "--prompt=a", "--temperature=hot"): "must be a number, e.g."
        " --temperature=0.8",
        (str(workdir), "--prompt=a", "--topk=2"): "unknown flag --topk; did you mean --top_k?",
        (
            str(workdir),
            f"--prompt={'a' * 40}",
        ): "a prompt of 40 tokens is longer than the 16 positions that the model learned; shorten"
        " it to 16 tokens at most",
        (
            str(workdir),
            "--prompt=a",
            "--tokenizer=byte",
        ): "tokenizer 'byte': no such file or folder",
        (str(folder), "--prompt=a", "--checkpoint=3"): "sample --checkpoint: belongs to the folder",
        (str(tmp_path), "--prompt=a"): "holds neither a run.json nor a config.json; give the folder"
        " of a run, of a Hugging Face model, or a .gguf file",
        (str(tmp_path / "x"), "--prompt=a"): "no such directory",
        (str(workdir / "run.json"), "--prompt=a"): "is a file; give the folder of a run, of a"
        " Hugging Face model, or a .gguf file; a text to go on from: --prompt=TEXT, or < FILE",
        (str(workdir), "--max_new_tokens=3"): "sample: unknown flag --max_new_tokens; did you mean"
        " --most?",
    }
    for arguments, message in cases.items():
        with pytest.raises(jaxtrain.errors.UserError) as raised:
            sample.run(arguments)
        said = str(raised.value)
        assert message in said and "\n" not in said, said
