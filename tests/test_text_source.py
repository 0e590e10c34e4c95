"""Text and mixtures as data sources: how a corpus is cut, what is refused, and runs that are
stopped, resumed and changed anywhere, with every token as in the run that nobody disturbed."""

import dataclasses
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from test_reproducible import digest_of, launch, metrics_of
from test_resume import at_step
from test_run import digest, lines, wrong_at_start

from jaxtrain import config, messages
from jaxtrain.augment import NoAugment
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.config import flags
from jaxtrain.data import pipeline
from jaxtrain.data.mixture import MixedPosition, order_of
from jaxtrain.data.sources import text as text_source
from jaxtrain.data.sources.text import Mixture, Text, python_library
from jaxtrain.data.splits import Splits
from jaxtrain.data.text import packing
from jaxtrain.data.text import windows as windows_file
from jaxtrain.errors import RowsTooLong, UserError
from jaxtrain.horizon import Horizon
from jaxtrain.models import Transformer
from jaxtrain.optimizers import SGD
from jaxtrain.runner import main as runner_main
from jaxtrain.tasks import Classification, NextToken

TEXT = "the cat sat on a mat and looked at nothing in particular for a long while"
WORDS = TEXT.split()


def text_of(seed: int, words: int) -> str:
    """Some words in a row."""
    random = np.random.default_rng(seed)
    return " ".join(WORDS[index] for index in random.integers(0, len(WORDS), words))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of documents of 1 to 30 words, one with a long one, and a single text."""
    root = tmp_path_factory.mktemp("corpora")
    for name, count in (("prose", 14), ("verse", 9)):
        (root / name).mkdir()
        for number in range(count):
            text = text_of(number + 100 * len(name), 1 + 7 * number % 30)
            (root / name / f"{number:02}.txt").write_text(text)
    (root / "prose" / "long.txt").write_text(text_of(0, 90))
    (root / "one.txt").write_text(text_of(1, 200))
    return root


def source_of(corpora: Path, *names: str, **fields: Any) -> Text:
    """A source over some of the corpora, with a cache of its own."""
    paths = tuple(str(corpora / name) for name in names or ("prose",))
    return Text(**({"path": paths, "cache": str(corpora / "cache"), "length": 24} | fields))


def mixed(corpora: Path, **fields: Any) -> Mixture:
    """Both folders, packed."""
    given: dict[str, Any] = {
        "sources": tuple((name, str(corpora / name)) for name in ("prose", "verse")),
        "weights": "prose=0.7,verse=0.3",
        "cache": str(corpora / "cache"),
        "length": 24,
        "layout": "packed",
    }
    return Mixture(**(given | fields))


def targets(splits: Splits, role: str = "train") -> list[int]:
    """The tokens that a part asks for, in its order."""
    table = getattr(splits, role)
    rows = table.read(np.arange(len(table)))
    weight = rows.get("weight", np.ones(rows["tokens"].shape))
    return [
        int(token)
        for ids, weights in zip(rows["tokens"], weight, strict=True)
        for token in ids[1:][weights[1:] > 0]
    ]


# --- how a corpus is cut


def test_a_single_text_is_cut_by_its_tokens(corpora: Path) -> None:
    opened = source_of(corpora, "one.txt", tokenizer="characters").open()
    whole = (corpora / "one.txt").read_text()
    letters = sorted(set(whole))
    cut = round(0.9 * len(whole))
    assert opened.train.num_classes == len(letters)
    for role, part in (("train", whole[:cut]), ("validation", whole[cut:])):
        assert "".join(letters[token] for token in targets(opened, role)) == part[1:]
    assert opened.test is None and opened.notes == ()


def test_documents_are_held_out_whole_and_at_random(corpora: Path) -> None:
    parts = {"train": "all[:80%]", "validation": "all[80%:]", "layout": "packed"}
    opened = source_of(corpora, **parts).open()
    short = [file.read_bytes() for file in (corpora / "prose").iterdir()]
    short = [text for text in short if len(text) < 25]
    assert len(short) > 2
    found: list[bytes] = []
    for role in ("train", "validation"):
        rows = getattr(opened, role).read(np.arange(len(getattr(opened, role))))
        for ids, segments in zip(rows["tokens"], rows["segments"], strict=True):
            for number in range(1, segments.max() + 1):
                *text, end = ids[segments == number].tolist()
                found += [bytes(text)] if end == 256 else []
    for document in short:
        assert found.count(document) == short.count(document)
    in_order = source_of(corpora, split_seed=None, **parts).open()
    other = source_of(corpora, split_seed=1, **parts).open()
    assert len({tuple(targets(each, "validation")) for each in (opened, in_order, other)}) == 3
    assert opened.fingerprint == other.fingerprint


def test_windows_run_over_documents_and_parts_never_meet(corpora: Path) -> None:
    opened = source_of(corpora, split_by="tokens").open()
    flat = b"".join(f.read_bytes() + b"\0" for f in sorted((corpora / "prose").iterdir()))
    cut = round(0.9 * len(flat))
    expected = [256 if byte == 0 else byte for byte in flat]
    assert targets(opened) == expected[1:cut]
    assert targets(opened, "validation") == expected[cut + 1 :]


def test_overlapping_parts_and_packing_are_told(corpora: Path) -> None:
    opened = source_of(corpora, train="all[:90%]", validation="all[80%:]", layout="packed").open()
    assert opened.notes[0] == "all[:90%] and all[80%:] share 13 % of examples"
    assert re.fullmatch(
        r"train: 14 documents packed into \d+ rows of 25 tokens, 9\d\.\d\d% full; \d+ longer than"
        r" a row are cut",
        opened.notes[1],
    )
    assert opened.notes[2].startswith("validation: 3 documents packed into ")


def test_small_corpora_are_whole_in_memory_and_large_ones_read(
    corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = [source_of(corpora, layout=layout).open().train for layout in ("windows", "packed")]
    for file in (windows_file, packing):
        monkeypatch.setattr(file, "WHOLE", 10)
    for whole, layout in zip(opened, ("windows", "packed"), strict=True):
        read = source_of(corpora, layout=layout).open().train
        assert whole.arrays is not None and read.arrays is None
        rows = np.random.default_rng(0).permutation(len(whole))
        there = read.read(rows)
        for name, array in whole.read(rows).items():
            np.testing.assert_array_equal(array, there[name], err_msg=f"{layout} {name}")


def test_plans_of_many_documents_are_kept(corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_source, "KEPT_DOCUMENTS", 1)
    source = source_of(corpora, layout="packed")
    first = source.open()
    kept = sorted((corpora / "cache" / "plans").iterdir())
    assert len(kept) == 2  # of train and validation
    monkeypatch.setattr(packing, "plan", lambda *_: pytest.fail("made anew"))
    assert targets(source.open()) == targets(first)


def test_pythons_own_library_is_the_default_corpus() -> None:
    files = [Path(path) for path in python_library()]
    names = {file.name for file in files}
    assert {"dataclasses.py", "argparse.py", "decoder.py"} <= names
    assert 200 < len(files) == len(set(files)) and all(file.stat().st_size for file in files)
    for file in files:
        assert not {"test", "tests", "site-packages", "idlelib"} & {*file.parts}
        file.read_text(encoding="utf-8")


# --- mixtures


def test_a_mixture_has_the_rows_of_its_corpora(corpora: Path) -> None:
    opened = mixed(corpora).open()
    alone = {name: source_of(corpora, name, layout="packed").open() for name in ("prose", "verse")}
    for role in ("train", "validation"):
        rows = getattr(opened, role).read(np.arange(len(getattr(opened, role))))
        for place, name in enumerate(("prose", "verse")):
            table = getattr(alone[name], role)
            own = table.read(np.arange(len(table)))
            for field, array in own.items():
                np.testing.assert_array_equal(rows[field][rows["source"] == place], array)
    assert getattr(opened.train, "source_names", ()) == ("prose", "verse")
    assert opened.notes[0].startswith("prose train: ")
    assert opened.fingerprint == mixed(corpora, weights="verse=0.5,prose=0.5").open().fingerprint


def test_windows_of_a_mixture_have_the_same_fields(corpora: Path) -> None:
    """One corpus may fill its last row while another does not."""
    opened = mixed(corpora, layout="windows", weights="").open()
    assert set(opened.train.fields) == {"tokens", "bytes", "weight", "source"}


def test_a_learned_tokenizer_is_learned_from_all_corpora(corpora: Path) -> None:
    opened = mixed(corpora, tokenizer="characters").open()
    letters = {letter for word in WORDS for letter in word} | {" "}
    assert opened.train.num_classes == len(letters)


# --- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"length": 5000},
            r"--data.length=5000: --data.train=all\[:90%\] holds \d+ tokens, less than a row",
        ),
        ({"train": "all[:0%]"}, r"--data.train='all\[:0%\]': 0 of "),
        ({"validation": "all[100%:]"}, r"--data.validation='all\[100%:\]': 0 of "),
        ({"validation": "test"}, "--data.validation='test': unknown split 'test'; valid: all only"),
        ({"train": ""}, "--data.train='': not a split; expected e.g."),
        (
            {"split_by": "tokens", "test": "all[1:2]"},
            r"--data.test=all\[1:2\]: holds 1 token, so there is none to predict; give it more",
        ),
        (
            {"layout": "packed", "stride": 1},
            "--data.stride=1: belongs to --data.layout=windows; drop it",
        ),
        ({"path": ("nowhere.txt",)}, "nowhere.txt: no such file"),
        ({"tokenizer": "bite"}, "--data.tokenizer=bite: no such file or folder; valid: bytes"),
    ],
)
def test_texts_that_cannot_be_cut(corpora: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        source_of(corpora, **fields).open()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "prose=0.5,poems=0.5"}, "unknown source 'poems'; valid: prose, verse"),
        ({"weights": "prose=-1,verse=2"}, "the weight of prose is -1; must be >= 0"),
        ({"sources": ()}, "--data.sources: 0 corpora; a mixture has 2 or more, e.g. code="),
        ({"sources": (("a", "x"), ("a", "y"))}, "--data.sources: a is there twice; give each"),
        ({"length": 4000}, r"--data.length=4000: (prose|verse): --data.train=all\[:90%\] holds"),
    ],
)
def test_mixtures_that_are_none(corpora: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixed(corpora, **fields).open()


# --- runs


class Bigram(nn.Module):
    """Each token by the one before it alone, so that runs are quick."""

    vocabulary: int = 257

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return nn.Embed(self.vocabulary, self.vocabulary)(tokens_BT)


def start(workdir: Path, data: Any, *argv: str, **changes: Any) -> int:
    """The exit status of a run over a source."""
    given: dict[str, Any] = {
        "name": "text",
        "model": Bigram(),
        "data": data,
        "task": NextToken(input="tokens,-segments"),
        "optimizer": SGD(learning_rate=0.1),
        "steps": 12,
        "batch_size": 6,
        "mesh": "data:1",
        "checkpoint_every": Horizon(1),
        "keep": 100,
        "eval_every": Horizon(0),
        "log_every": 1,
        "device_data": "no",
        "tensorboard": False,
        "report": False,
    }
    run = config.Run(**(given | changes))
    arguments = [f"--workdir={workdir}", *argv]
    return runner_main.guarded(lambda: runner_main.launch(flags.parse(run, arguments), arguments))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, np.ndarray]]]:
    """What the steps of streamed runs were given, in order."""
    seen: list[dict[str, np.ndarray]] = []
    take = pipeline.BatchLoader.__next__

    def watched(self: pipeline.BatchLoader) -> Any:
        batch = take(self)
        seen.append({name: np.asarray(array) for name, array in batch.items()})
        return batch

    with jax.transfer_guard("allow"):
        monkeypatch.setattr(pipeline.BatchLoader, "__next__", watched)
        yield seen


def alike(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> None:
    """Every field of every batch is the same."""
    assert len(one) == len(other)
    for step, (these, those) in enumerate(zip(one, other, strict=True)):
        assert these.keys() == those.keys()
        for name, array in these.items():
            np.testing.assert_array_equal(array, those[name], err_msg=f"step {step}: {name}")


SCHEDULED = "prose=0.7,verse=0.3/5:prose=0.2,verse=0.8"


def test_every_checkpoint_stands_where_the_stream_goes_on(
    corpora: Path, tmp_path: Path, batches: list[dict[str, np.ndarray]]
) -> None:
    """Of each step of a packed, mixed run whose weights change: the position that its checkpoint
    holds, made on the device, opens the stream at the very next token."""
    source = mixed(corpora, weights=SCHEDULED)
    assert start(tmp_path / "run", source) == 0
    golden = list(batches)
    assert len(golden) == 12
    table = source.open().train
    order = order_of(table, batch_size=6, total_steps=12)
    like = jax.device_put({"position": order.start(0)})
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.steps() == list(range(1, 13))
    for step in range(1, 12):
        restored, _ = checkpoints.restore(step, like, partial=True)
        position = jax.device_get(restored["position"])
        assert isinstance(position, MixedPosition)
        loader = pipeline.BatchLoader(
            table,
            order=order,
            position=position,
            batch_size=6,
            sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        )
        with loader:
            batches.clear()
            for _ in range(12 - step):
                next(loader)
        alike(batches, golden[step:])


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, begin: Callable[[], int]) -> None:
    """A run that is told to stop at a step, and says that it is saved."""
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert begin() == 75
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stopped_and_resumed(
    steps: list[int],
    corpora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches: list[dict[str, np.ndarray]],
) -> None:
    source = mixed(corpora, weights=SCHEDULED)
    assert start(tmp_path / "whole", source) == 0
    golden, found = list(batches), digest(tmp_path / "whole")
    for step in steps:
        batches.clear()
        folder = tmp_path / f"stopped{step}"
        stop_at(step, monkeypatch, lambda folder=folder: start(folder, source))
        assert start(folder, source) == 0
        alike(batches, golden)
        assert digest(folder) == found and lines(folder) == lines(tmp_path / "whole")


def test_a_run_stopped_and_resumed_sees_every_token_as_if_never_stopped(
    corpora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches: list[dict[str, np.ndarray]],
) -> None:
    _stopped_and_resumed([5], corpora, tmp_path, monkeypatch, batches)


@pytest.mark.slow
def test_the_same_at_every_step(
    corpora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches: list[dict[str, np.ndarray]],
) -> None:
    _stopped_and_resumed(list(range(1, 12)), corpora, tmp_path, monkeypatch, batches)


def test_packed_documents_see_one_another_only_if_that_is_asked_for(
    corpora: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    packed, plain = source_of(corpora, layout="packed"), {"task": NextToken()}
    line = (
        "--task.input=tokens: the data has segments, without which the model sees padding and other"
        " documents of a row; write --task.input=tokens=tokens,segments=segments for a model that"
        " takes them, or --task.input=tokens,-segments if it shall see all"
    )
    assert start(tmp_path / "a", packed, "--steps=1", **plain) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"jaxtrain: error: {line}"
    assert start(tmp_path / "a", packed, "--steps=1", "--task.input=tokens,-segments", **plain) == 0
    given = "--task.input=tokens=tokens,segments=segments"
    apart = {**plain, "model": Transformer(vocabulary=257, width=8, depth=1, heads=1)}
    assert start(tmp_path / "b", packed, "--steps=1", given, **apart) == 0
    assert start(tmp_path / "c", source_of(corpora), "--steps=1", **plain) == 0


def test_a_vocabulary_of_fewer_tokens_than_the_data_is_refused(
    corpora: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    narrow = Bigram(vocabulary=100)
    assert start(tmp_path, source_of(corpora), "--steps=1", model=narrow) == 2
    assert "--model.vocabulary=100: the data has 257 tokens; set" in capsys.readouterr().err


def test_data_in_device_memory_gives_the_same_run(corpora: Path, tmp_path: Path) -> None:
    source = mixed(corpora, weights=SCHEDULED)
    for choice in ("no", "yes"):
        assert start(tmp_path / choice, source, device_data=choice, steps=8) == 0
    assert lines(tmp_path / "yes") == lines(tmp_path / "no")


def test_weights_may_change_when_a_run_goes_on_and_nothing_else_of_its_data(
    corpora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches: list[dict[str, np.ndarray]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, source = tmp_path / "run", mixed(corpora)
    stop_at(6, monkeypatch, lambda: start(folder, source))
    length = "--data.length=12"
    assert start(folder, source, length) == 2
    assert "--allow_config_change=data.length" in capsys.readouterr().err
    before = list(batches)
    batches.clear()
    assert start(folder, source, "--data.weights=prose=0.1,verse=0.9") == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "note: data.weights changes from prose=0.7,verse=0.3 to prose=0.1,verse=0.9" in said
    source_N = np.concatenate([batch["source"] for batch in batches])
    assert len(source_N) == 36 and abs((source_N == 1).sum() - 0.9 * 36) <= 1
    # each corpus goes on where it was: the next rows of its own order
    table = source.open().train
    order = order_of(table, batch_size=6, total_steps=12)
    ids = np.concatenate([batch["id"] for batch in [*before, *batches]])
    alone = order.ids(order.start(0), 2000)
    first = int((table.read(np.arange(len(table)))["source"] == 0).sum())
    for mine, theirs in ((ids < first, alone < first), (ids >= first, alone >= first)):
        own = ids[mine]
        np.testing.assert_array_equal(own, alone[theirs][: len(own)])


# --- lengths in tokens


def test_a_run_may_be_as_long_as_so_many_tokens(corpora: Path, tmp_path: Path) -> None:
    source = mixed(corpora)
    flags = ("--tokens=1K", "--eval_every=500tokens", "--schedule.warmup=288tokens")
    assert start(tmp_path / "run", source, *flags, steps=None, epochs=1.0) == 0
    found = lines(tmp_path / "run")
    train = [line for line in found if line["split"] == "train"]
    # 6 x 24 tokens a step, so 7 steps are the first that hold 1,000
    assert [line["step"] for line in train] == list(range(1, 8))
    assert [line["tokens"] for line in train] == [144 * step for step in range(1, 8)]
    assert [line["step"] for line in found if line["split"] == "validation"] == [0, 3, 6, 7]
    rates = [line["learning_rate"] for line in train]
    assert rates[0] == pytest.approx(0.1 / 3) and rates[2] == pytest.approx(0.1)


def test_tokens_are_those_of_tasks_that_count_them(tmp_path: Path) -> None:
    from jaxtrain.data.sources.synthetic import Synthetic
    from jaxtrain.models import MLP

    run = config.Run(
        name="toy",
        model=MLP(num_classes=4, widths=()),
        data=Synthetic(shape=(2, 2, 1), num_classes=4, examples=40, test_examples=10),
        task=Classification(),
        optimizer=SGD(),
        steps=3,
        batch_size=4,
        mesh="data:1",
    )
    for flag, message in (
        ("--tokens=1M", "--tokens=1M: the task Classification counts no tokens of this data; give"),
        (
            "--checkpoint_every=1Mtokens",
            "1Mtokens: no tokens are counted here; give steps, epochs or %",
        ),
    ):
        with pytest.raises(UserError, match=message):
            runner_main.launch(flags.parse(run, [flag, f"--workdir={tmp_path / 'x'}"]), [])


def test_lengths_in_tokens_are_read_and_written() -> None:
    run = config.Run(name="toy", steps=3, **dict.fromkeys(config.FAMILIES))
    for text, value, shown in (
        ("1B", 10**9, "1B"),
        ("1.5M", 1_500_000, "1500K"),
        ("123", 123, "123"),
        ("2e3", 2000, "2K"),
    ):
        parsed = flags.parse(run, [f"--tokens={text}"])
        assert parsed.tokens == value and parsed.steps is None
        assert config.values.text(parsed.tokens) == shown
        record = config.record.to_json(parsed)
        assert record["tokens"] == value
        assert config.record.from_json(run, record | {"steps": None}).tokens == value
    assert str(Horizon.parse("300Mtokens")) == "300Mtokens"
    assert (
        Horizon.parse("1Ktokens").steps(total_steps=1, steps_per_epoch=1, tokens_per_step=8) == 125
    )
    for wrong, message in (
        ("1G", "'1G': not a number of tokens; expected e.g. 300K, 10M or 1.5B; did you mean 1B?"),
        ("0", "must be >= 1"),
        ("0.5", "'0.5': must be a whole number of tokens"),
        ("many", "not a number of tokens; expected e.g. 300K, 10M or 1.5B"),
    ):
        with pytest.raises(UserError, match=f"--tokens={wrong}: |--tokens='?{wrong}'?: ") as caught:
            flags.parse(run, [f"--tokens={wrong}"])
        assert message.partition(": ")[2] in str(caught.value) or message in str(caught.value)
    with pytest.raises(UserError, match="--steps and --tokens are both set; give one"):
        flags.parse(run, ["--tokens=5", "--steps=2"])


# --- several processes


EXPERIMENT = '''"""A packed mixture whose metrics say which rows and tokens each step saw."""

import dataclasses
import os

import flax.linen as nn
import jax.numpy as jnp

import jaxtrain
from jaxtrain import optimizers
from jaxtrain.data.sources.text import Mixture
from jaxtrain.tasks import NextToken


class Bigram(nn.Module):
    @nn.compact
    def __call__(self, tokens_BT):
        return nn.Embed(257, 257)(tokens_BT)


@dataclasses.dataclass(frozen=True)
class Seen(NextToken):
    def loss(self, outputs, batch, *, train=True):
        sums = super().loss(outputs, batch, train=train)
        if train:
            rows = jnp.float32(outputs.shape[0])
            ids = batch.get("id", jnp.zeros(outputs.shape[0], jnp.int32))
            places = jnp.arange(batch["tokens"].shape[1])[None]
            for name, field in (("tokens", "tokens"), ("segments", "segments")):
                total = (batch[field] * (1 + places % 7)).sum(axis=1)
                for index in range(60):
                    one = jnp.where(ids == index, total, 0).sum()
                    sums[f"{name}_{index}"] = one.astype(jnp.float32), rows
        return sums


def experiment():
    root = os.environ["CORPORA"]
    return jaxtrain.Run(
        name="text",
        model=Bigram(),
        data=Mixture(
            sources=(("prose", f"{root}/prose"), ("verse", f"{root}/verse")),
            weights="prose=0.7,verse=0.3/5:prose=0.2,verse=0.8",
            cache=f"{root}/cache", length=24, layout="packed",
        ),
        task=Seen(input="tokens,-segments"), optimizer=optimizers.SGD(learning_rate=0.1),
        steps=12, batch_size=8,
        log_every=1, checkpoint_every=jaxtrain.Horizon(3), eval_every=jaxtrain.Horizon(0),
        device_data=os.environ.get("DEVICE_DATA", "no"), reproducible=True, report=False,
        tensorboard=False, offers={},
    )


if __name__ == "__main__":
    jaxtrain.main(experiment())
'''


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["no", "yes"])
def test_one_two_and_four_processes_see_the_same_tokens(
    choice: str, corpora: Path, tmp_path: Path
) -> None:
    """Also when a run goes on with another number of them; and the corpora were tokenised by all of
    them at once."""
    (tmp_path / "text.py").write_text(EXPERIMENT)
    script = str(tmp_path / "text.py")
    more = {"CORPORA": str(corpora), "DEVICE_DATA": choice}

    def run(name: str, processes: int, *arguments: str) -> Path:
        devices = {1: 1, 2: 2, 4: 1}[processes]
        done = launch(
            [script, f"--mesh=data:{processes * devices}", *arguments],
            processes,
            devices,
            tmp_path / name,
            more=more,
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    whole = run("one", 1)
    assert len(metrics_of(whole)) >= 12
    for processes in (2, 4):
        other = run(f"of{processes}", processes)
        assert metrics_of(other) == metrics_of(whole) and digest_of(other) == digest_of(whole)
    for first, second in ((4, 2), (1, 4)):
        name = f"from{first}to{second}"
        run(name, first, "--steps=6")
        run(name, second)
        assert metrics_of(tmp_path / name) == metrics_of(whole)
        assert digest_of(tmp_path / name) == digest_of(whole)


def test_the_help_of_every_field_is_written() -> None:
    from jaxtrain.config import settings

    for source in (Text, Mixture):
        docs = settings.field_docs(source)
        assert {field.name for field in dataclasses.fields(source)} <= docs.keys()


@pytest.mark.parametrize(("length", "stride"), [(5000, None), (5000, 7)])
def test_the_greatest_length_that_a_batch_allows(
    corpora: Path, length: int, stride: int | None
) -> None:
    with pytest.raises(RowsTooLong) as raised:
        source_of(corpora, length=length, stride=stride).open()
    for rows in (1, 2, 5, 12):
        most = raised.value.greatest(rows)
        fits = source_of(corpora, length=most, stride=stride).open()
        assert len(fits.train) >= rows
        if rows > 1:
            more = source_of(corpora, length=most + 1, stride=stride).open()
            assert len(more.train) < rows


def test_plain_notes_are_no_warnings(corpora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for note in source_of(corpora, layout="packed").open().notes:
        messages.warn(note)
    said = capsys.readouterr().err.splitlines()
    assert said and all(line.startswith("jaxtrain: note: ") for line in said)
    assert not any(" 1 documents" in line or " 1 rows" in line for line in said)


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("bpe", "; did you mean 'bpe:4096', learned from the text, with so many ids?"),
        ("char", "; did you mean 'characters'?"),
        ("gpt2", "hf download gpt2 tokenizer.json --local-dir DIR, then give DIR"),
        ("bpe:4k", "--data.tokenizer=bpe:4k: needs a whole number of ids, e.g. bpe:4096"),
    ],
)
def test_a_tokenizer_that_is_none_says_what_is(corpora: Path, spec: str, hint: str) -> None:
    with pytest.raises(UserError) as raised:
        source_of(corpora, tokenizer=spec).open()
    assert str(raised.value).endswith(hint)


def test_a_length_that_does_not_fit_is_told_with_one_that_does(
    corpora: Path, tmp_path: Path
) -> None:
    """By the text and the batch, or by the model; what the line says instead is well."""
    model = Transformer(vocabulary=258, width=8, depth=1, heads=2, max_length=16)
    given: dict[str, Any] = {"task": NextToken(), "model": model, "augment": NoAugment()}

    def wrong(length: int, **changes: Any) -> str:
        source = source_of(corpora, "one.txt", length=length)
        return wrong_at_start(tmp_path / "run", **(given | {"data": source} | changes))

    long = model.clone(max_length=5000)
    line = re.escape("--data.train=all[:90%] holds ") + r"\d+ tokens, less than a row; use <= (\d+)"
    said = re.fullmatch(f"--data.length=5000: {line} for a batch of 16 rows", wrong(5000))
    assert said and int(said[1]) == 16, "what the model sees at most"
    said = re.fullmatch(
        f"--data.length=5000: {line} for a batch of 16 rows", wrong(5000, model=long)
    )
    assert said
    assert not wrong(int(said[1]), model=long)
    assert wrong(24) == (
        "--model.max_length=16: the input has 24 tokens; make it 24, or choose"
        " --model.positions=rotary, or --data.length=16"
    )
    for changes in ({"max_length": 24}, {"positions": "rotary"}):
        assert not wrong(24, model=model.clone(**changes))
    assert not wrong(16)
