"""Bad input: a table of (arguments, the exact line, exit status). A new row is one line; a table
for each stage that decides."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import pytest

from jaxtrain import config
from jaxtrain.config import flags
from jaxtrain.config import run as config_run
from jaxtrain.fields import (
    Between,
    Count,
    DropRate,
    Length,
    NonNegative,
    Positive,
    Probability,
    Public,
)
from jaxtrain.horizon import Horizon


class Network(nn.Module):
    """A model that is never called."""

    num_classes: Count = 10
    widths: tuple[Count, ...] = (32, 64)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    dropout: DropRate = 0.0


@dataclasses.dataclass(frozen=True)
class Source:
    """Data that is never read."""

    train: str = "train"
    validation: str = ""
    image_key: Annotated[str, Public()] = "image"
    download: bool = False
    classes: Annotated[int | None, Between(2, 100)] = None


@dataclasses.dataclass(frozen=True)
class Adam:
    """An optimizer that is never stepped."""

    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 0.0
    decay: tuple[tuple[str, float], ...] = ()
    label_share: Probability = 0.0


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Another one, with a rule between its fields."""

    learning_rate: Positive = 1e-3
    momentum: DropRate = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=true: needs momentum > 0; set --optimizer.momentum")


@dataclasses.dataclass(frozen=True)
class Cosine:
    """A schedule that is never asked."""

    warmup: Length = Horizon(5, "percent")


@dataclasses.dataclass(frozen=True)
class Logger:
    """A task with a secret, for want of a better place."""

    logger_token: str = ""


def toy_run(**changes: Any) -> config.Run:
    """A run of which only the flags are looked at."""
    run = config.Run(
        name="toy",
        model=Network(),
        data=Source(),
        task=Logger(),
        optimizer=Adam(),
        schedule=Cosine(),
        augment=None,
        steps=100,
        batch_size=32,
        offers={
            "model": {
                "mlp": Network(widths=(8,)),
                "cnn": Network(),
                "gpt2": Network(num_classes=7),
                "vit": Network(num_classes=8),
            },
            "optimizer": {"adam": Adam(), "adamw": Adam(weight_decay=0.1), "sgd": Sgd()},
            "data": {"digits": Source(), "cifar10": Source(validation="test")},
        },
    )
    return dataclasses.replace(run, **changes)


class Row(NamedTuple):
    """One thing that a user can get wrong."""

    arguments: str
    line: str
    status: int = 2


# Rows that flags alone decide. Numbers are those of bad_inputs.md; blanks separate arguments.
ROWS = [
    # 1: names
    Row(
        "--lerning_rate=1e-3",
        "unknown flag --lerning_rate; did you mean --optimizer.learning_rate?",
    ),
    Row(
        "--optimizer.lerning_rate=1e-3",
        "unknown flag --optimizer.lerning_rate; did you mean --optimizer.learning_rate?",
    ),
    Row(
        "--learning_rate=1e-3",
        "unknown flag --learning_rate; did you mean --optimizer.learning_rate?",
    ),
    Row("--batchsize=3", "unknown flag --batchsize; did you mean --batch_size?"),
    Row("-batchsize=3", "unknown flag --batchsize; did you mean --batch_size?"),
    Row("--lr=1e-3", "unknown flag --lr; did you mean --optimizer.learning_rate?"),
    Row(
        "--optimizer.lr=1e-3",
        "unknown flag --optimizer.lr; did you mean --optimizer.learning_rate?",
    ),
    Row("--total_steps=5", "unknown flag --total_steps; did you mean --steps?"),
    Row(
        "--nobatch_size",
        "unknown flag --nobatch_size; --batch_size takes int >= 1 and cannot be switched off",
    ),
    Row("--data.nodownload", "unknown flag --data.nodownload; did you mean --nodata.download?"),
    Row("--xyzzy=1", "unknown flag --xyzzy; --help lists them all"),
    Row("--=1", "unexpected argument '--=1'; flags are written --name=value"),
    Row("--undefok=xyzzy --xyzzy=1", "unknown flag --undefok; --help lists them all"),
    Row("--flagfile=/etc/passwd", "/etc/passwd:1: is no flag; write one flag a line, --name=value"),
    Row("--offers=x", "unknown flag --offers; --help lists them all"),
    Row(
        "--optimizer.momentum=0.9",
        "unknown flag --optimizer.momentum: optimizer 'adam' has learning_rate, weight_decay,"
        " decay, label_share; momentum comes with --optimizer=sgd",
    ),
    Row(
        "--optimizer.xyzzy=0.9",
        "unknown flag --optimizer.xyzzy: optimizer 'adam' has learning_rate, weight_decay, decay,"
        " label_share",
    ),
    Row(
        "--optimizer=sgd --optimizer.weight_decay=1",
        "unknown flag --optimizer.weight_decay: optimizer 'sgd' has learning_rate, momentum,"
        " nesterov; weight_decay comes with --optimizer=adam, --optimizer=adamw",
    ),
    Row("--logger_tken=abc", "unknown flag --logger_tken; did you mean --task.logger_token?"),
    # 2-4: floats
    Row(
        "--optimizer.learning_rate=1e-3s",
        "--optimizer.learning_rate='1e-3s': not a number; expected a float > 0, e.g. 1e-3",
    ),
    Row(
        "--optimizer.learning_rate=",
        "--optimizer.learning_rate='': not a number; expected a float > 0, e.g. 1e-3",
    ),
    Row(
        "--optimizer.learning_rate=none",
        "--optimizer.learning_rate='none': not a number; expected a float > 0, e.g. 1e-3",
    ),
    Row(
        "--optimizer.learning_rate=1_000",
        "--optimizer.learning_rate='1_000': not a number; expected a float > 0, e.g. 1e-3; did you"
        " mean 1000?",
    ),
    Row(
        "--optimizer.learning_rate=+1",
        "--optimizer.learning_rate='+1': not a number; expected a float > 0, e.g. 1e-3; did you"
        " mean 1?",
    ),
    Row(
        "--optimizer.learning_rate=0,1",
        "--optimizer.learning_rate='0,1': not a number; expected a float > 0, e.g. 1e-3; did you"
        " mean 0.1?",
    ),
    Row(
        "--optimizer.learning_rate=٣",
        "--optimizer.learning_rate='٣': not a number; expected a float > 0, e.g. 1e-3; did you"
        " mean 3?",
    ),
    Row(
        "--optimizer.learning_rate=0x1p-3",
        "--optimizer.learning_rate='0x1p-3': not a number; expected a float > 0, e.g. 1e-3",
    ),
    Row("--optimizer.learning_rate=-1", "--optimizer.learning_rate=-1: must be > 0"),
    Row("--optimizer.learning_rate -1", "--optimizer.learning_rate=-1: must be > 0"),
    Row("--optimizer.learning_rate=0", "--optimizer.learning_rate=0: must be > 0"),
    Row("--optimizer.learning_rate=1e-999", "--optimizer.learning_rate=1e-999: must be > 0"),
    Row("--optimizer.learning_rate=nan", "--optimizer.learning_rate=nan: must be finite"),
    Row("--optimizer.learning_rate=inf", "--optimizer.learning_rate=inf: must be finite"),
    Row(
        "--optimizer.learning_rate=-Infinity", "--optimizer.learning_rate=-Infinity: must be finite"
    ),
    Row("--optimizer.learning_rate=1e999", "--optimizer.learning_rate=1e999: must be finite"),
    Row("--optimizer.weight_decay=-0.1", "--optimizer.weight_decay=-0.1: must be >= 0"),
    Row("--optimizer.label_share=1.5", "--optimizer.label_share=1.5: must be in 0..1"),
    Row("--model.dropout=1", "--model.dropout=1: must be 0 <= value < 1"),
    Row("--clip_norm=0", "--clip_norm=0: must be > 0, or none"),
    Row(
        "--clip_norm=off",
        "--clip_norm='off': not a number; expected a float > 0, e.g. 1e-3, or none",
    ),
    Row("--ema_decay=1", "--ema_decay=1: must be 0 <= value < 1"),
    # 6, 28, 48: components by name
    Row(
        "--optimizer=adamW",
        "--optimizer='adamW': unknown; valid: adam, adamw, sgd; did you mean 'adamw'?",
    ),
    Row("--optimizer=", "--optimizer='': unknown; valid: adam, adamw, sgd"),
    Row(
        "--model=gtp2", "--model='gtp2': unknown; valid: mlp, cnn, gpt2, vit; did you mean 'gpt2'?"
    ),
    Row(
        "--model gtp2", "--model='gtp2': unknown; valid: mlp, cnn, gpt2, vit; did you mean 'gpt2'?"
    ),
    Row("--model=my.mod:Net", "--model='my.mod:Net': unknown; valid: mlp, cnn, gpt2, vit"),
    Row("--model", "--model: needs a value, e.g. --model=cnn"),
    Row("--model=mlp --model=cnn", "--model is given twice, as 'mlp' and 'cnn'; give it once"),
    Row(
        "--data=cifra10",
        "--data='cifra10': not offered by this experiment; did you mean 'cifar10'? (all: python -m"
        " jaxtrain list data)",
    ),
    Row(
        "--data=xyzzy",
        "--data='xyzzy': not offered by this experiment; valid: digits, cifar10 (all: python -m"
        " jaxtrain list data)",
    ),
    Row("--schedule=linear", "--schedule='linear': this experiment offers no other schedule"),
    # 7, 9, 14, 16, 27, 68: integers
    Row("--batch_size=0", "--batch_size=0: must be an integer >= 1"),
    Row("--batch_size=-8", "--batch_size=-8: must be an integer >= 1"),
    Row("--batch_size=1.5", "--batch_size=1.5: must be an integer >= 1"),
    Row("--batch_size=abc", "--batch_size='abc': must be an integer >= 1"),
    Row("--batch_size=", "--batch_size='': must be an integer >= 1"),
    Row("--batch_size=32.0", "--batch_size=32.0: must be an integer >= 1; did you mean 32?"),
    Row("--batch_size=1e3", "--batch_size=1e3: must be an integer >= 1; did you mean 1000?"),
    Row("--batch_size=1_000", "--batch_size='1_000': must be an integer >= 1; did you mean 1000?"),
    Row("--batch_size=0x20", "--batch_size='0x20': must be an integer >= 1; did you mean 32?"),
    Row("--batch_size=+32", "--batch_size='+32': must be an integer >= 1; did you mean 32?"),
    Row("--batch_size=032", "--batch_size=032: must be an integer >= 1; did you mean 32?"),
    Row("--batch_size=３２", "--batch_size='３２': must be an integer >= 1; did you mean 32?"),
    Row("--batch_size=nan", "--batch_size=nan: must be an integer >= 1"),
    Row(
        "--batch_size=9223372036854775808",
        "--batch_size=9223372036854775808: must be at most 9223372036854775807",
    ),
    Row(
        "--batch_size=" + "9" * 5000,
        f"--batch_size={'9' * 60}...{'9' * 10}: must be at most 9223372036854775807",
    ),
    Row("--microbatches=3", "--microbatches=3: must divide --batch_size=32; nearest: 2 or 4"),
    Row("--microbatches=64", "--microbatches=64: must divide --batch_size=32; nearest: 32"),
    Row("--microbatches=0", "--microbatches=0: must be >= 1"),
    Row("--steps=0", "--steps=0: must be >= 1"),
    Row("--steps=-1", "--steps=-1: must be >= 1"),
    Row("--steps=ten", "--steps='ten': must be an integer >= 1"),
    Row("--steps=none", "--steps and --epochs are both unset; give one"),
    Row("--epochs=0", "--epochs=0: must be > 0"),
    Row("--epochs=2 --steps=100", "--epochs and --steps are both set; give one"),
    Row("--seed=-1", "--seed=-1: must be 0..4294967295"),
    Row("--seed=4294967296", "--seed=4294967296: must be 0..4294967295"),
    Row(f"--seed={2**70}", f"--seed={2**70}: must be 0..4294967295"),
    Row("--seed=1 --seed=2", "--seed is given twice, as 1 and 2; give it once"),
    Row("--seed", "--seed: needs a value, e.g. --seed=0"),
    Row("--seed --steps=3", "--seed: needs a value before --steps, e.g. --seed=0"),
    Row("--workdir --steps=3", "--workdir: needs a value before --steps, e.g. --workdir=TEXT"),
    Row("--keep=0", "--keep=0: must be >= 1"),
    Row("--log_every=0", "--log_every=0: must be >= 1, or none"),
    Row("--steps_per_call=0", "--steps_per_call=0: must be >= 1, or none"),
    Row("--eval_batch_size=0", "--eval_batch_size=0: must be an integer >= 1"),
    Row("--data.classes=1", "--data.classes=1: must be in 2..100"),
    # 26: choices, booleans
    Row(
        "--model.dtype=float61",
        "--model.dtype='float61': unknown; valid: float32, bfloat16, float16; did you mean"
        " 'float16'?",
    ),
    Row("--platform=tpu", "--platform='tpu': unknown; valid: auto, cpu, gpu; did you mean 'auto'?"),
    Row(
        "--resume=Must", "--resume='Must': unknown; valid: auto, must, never; did you mean 'must'?"
    ),
    Row(
        "--device_data=true",
        "--device_data='true': unknown; valid: auto, yes, no; did you mean 'yes'?",
    ),
    Row(
        "--eval_only=yes",
        "--eval_only='yes': not a boolean; valid: true, false; did you mean 'true'?",
    ),
    Row("--eval_only=2", "--eval_only=2: not a boolean; valid: true, false"),
    Row("--eval_only=", "--eval_only='': not a boolean; valid: true, false"),
    Row("--eval_only true", "unexpected argument 'true'; write --eval_only=true or --noeval_only"),
    Row(
        "--noeval_only=true",
        "--noeval_only: takes no value; write --noeval_only, or --eval_only=true|false",
    ),
    Row("--report --noreport", "--report is given twice, as 'true' and 'false'; give it once"),
    Row(
        "--eval_only --resume=never",
        "--eval_only and --resume=never: evaluating needs a checkpoint; drop one of them",
    ),
    # tuples and rules
    Row(
        "--model.widths=32,",
        "--model.widths='32,': item 2 is empty; separate items by one comma, with none at the end",
    ),
    Row(
        "--model.widths=,",
        "--model.widths=',': item 1 is empty; separate items by one comma, with none at the end",
    ),
    Row("--model.widths=32,x", "--model.widths='32,x': item 2 ('x'): must be an integer >= 1"),
    Row("--model.widths=32,0", "--model.widths='32,0': item 2 (0): must be >= 1"),
    Row(
        "--model.widths=(32,64)",
        "--model.widths='(32,64)': item 1 ('(32'): must be an integer >= 1",
    ),
    Row("--profile_steps=5", "--profile_steps=5: has 1 items; expected 2, separated by a comma"),
    Row(
        "--profile_steps=5,6,7",
        "--profile_steps='5,6,7': has 3 items; expected 2, separated by a comma",
    ),
    Row("--profile_steps=9,5", "--profile_steps=9,5: must be FIRST,LAST with 0 <= FIRST < LAST"),
    Row(
        "--shard=head/kernel",
        "--shard='head/kernel': item 1 ('head/kernel'): not a rule; expected PATTERN=VALUE, e.g."
        " head/kernel=fsdp:-",
    ),
    Row(
        "--reproducible --compare_meshes=data:1",
        "--compare_meshes: compares plain steps, which layouts change by rounding; drop"
        " --reproducible, whose digests `verify` compares",
    ),
    Row(
        "--optimizer.decay=bias",
        "--optimizer.decay='bias': item 1 ('bias'): not a rule; expected PATTERN=VALUE, e.g."
        " bias=0",
    ),
    Row(
        "--optimizer.decay=bias=x",
        "--optimizer.decay='bias=x': item 1 ('bias=x'): not a number; expected a float, e.g. 0.1",
    ),
    # horizons
    Row(
        "--eval_every=often",
        "--eval_every='often': not a horizon; expected e.g. 200, 200steps, 2epochs or 5%",
    ),
    Row(
        "--eval_every=",
        "--eval_every='': not a horizon; expected e.g. 200, 200steps, 2epochs or 5%",
    ),
    Row("--eval_every=-1", "--eval_every=-1: must be >= 0"),
    Row(
        "--eval_every=٣",
        "--eval_every='٣': not a horizon; expected e.g. 200, 200steps, 2epochs or 5%",
    ),
    Row(
        "--eval_every=2.5",
        "--eval_every=2.5: steps must be a whole number; for a part of the run write e.g. 5%",
    ),
    Row("--eval_every=1e999", "--eval_every=1e999: must be finite"),
    Row("--eval_every=1e999epochs", "--eval_every='1e999epochs': must be finite"),
    Row("--schedule.warmup=200%", "--schedule.warmup='200%': must be at most 100%"),
    Row("--keep_every=0", "--keep_every=0steps: must be > 0; to keep none for ever, give none"),
    Row(
        "--keep_every=x",
        "--keep_every='x': not a horizon; expected e.g. 200, 200steps, 2epochs or 5%, or none",
    ),
    # 69: an evaluation of nothing
    Row(
        "--eval_every=100",
        "--eval_every=100: dataset has no eval split; set --data.validation or --eval_every=0",
    ),
    Row(
        "--eval_every=100 --data.validation=",
        "--eval_every=100: dataset has no eval split; set --data.validation or --eval_every=0",
    ),
    # a rule between fields of one component
    Row(
        "--optimizer=sgd --optimizer.nesterov",
        "--optimizer.nesterov=true: needs momentum > 0; set --optimizer.momentum",
    ),
    # left over
    Row("train", "unexpected argument 'train'; leave it out: an experiment trains by itself"),
    Row(
        "--steps=3 train",
        "unexpected argument 'train'; leave it out: an experiment trains by itself",
    ),
    Row("batch_size=8", "unexpected argument 'batch_size=8'; did you mean --batch_size=8?"),
    Row("-- train", "unexpected argument 'train'; leave it out: an experiment trains by itself"),
    Row("-", "unexpected argument '-'; flags are written --name=value"),
    # 34, 35 and other paths; {tmp} is a folder that holds the file `file` and the folder `runs`
    Row("--workdir={tmp}/file", "--workdir={tmp}/file: is a file, not a directory"),
    Row(
        "--workdir={tmp}/file/a/b",
        "--workdir={tmp}/file/a/b: {tmp}/file is a file, not a directory",
    ),
    Row(
        "--workdir={tmp}/dangling",
        "--workdir={tmp}/dangling: {tmp}/dangling is a link to nothing; remove it or make its"
        " target",
    ),
    Row(
        "--workdir={tmp}/" + "a" * 300,
        "--workdir={tmp}/" + "a" * 300 + ": cannot write (File name too long)",
    ),
    Row(
        "--init_from={tmp}/rums",
        "--init_from={tmp}/rums: no such file or directory; in {tmp}: runs; did you mean it?",
    ),
    Row("--init_from={tmp}/xyzzy/1", "--init_from={tmp}/xyzzy/1: no such file or directory"),
    Row(
        "--from_run={tmp}/rums",
        "--from_run={tmp}/rums: no such directory; in {tmp}: runs; did you mean it?",
    ),
    Row("--from_run={tmp}/runs", "--from_run={tmp}/runs: holds no run.json"),
    Row(
        "--from_run={tmp}/broken",
        "--from_run={tmp}/broken: run.json is not JSON (Expecting value: line 1 column 1 (char 0))",
    ),
    Row(
        "--from_run={tmp}/other",
        "--from_run={tmp}/other: holds a run of experiment 'mnist1d', this is 'toy'; start"
        " experiments/mnist1d.py",
    ),
    # what is right, so that the table itself is tested
    Row(
        "--steps=3 --optimizer=sgd --optimizer.momentum .9 --optimizer.nesterov --seed=3 --seed=3",
        "",
        0,
    ),
    Row("--data=cifar10 --eval_every=100 --workdir={tmp}/new/run --init_from={tmp}/runs", "", 0),
    Row(
        "--model.widths= --optimizer.decay=bias=0,.*=1 --profile_steps=2,5 --clip_norm=None"
        " --eval_only=TRUE",
        "",
        0,
    ),
    # 73: warnings
    Row(
        "--task.logger_token=abc",
        "warning: --task.logger_token holds a secret on the command line, seen by `ps`; use"
        " JAXTRAIN_TASK_LOGGER_TOKEN",
        0,
    ),
    Row("--task.logger_token=", "", 0),
    Row("--data.image_key=abc", "", 0),
]


def outcome(arguments: list[str], run: config.Run | None = None) -> int:
    """The exit status of a start, as `run.main` decides it; what it says goes to stderr."""
    try:
        flags.parse(run or toy_run(), arguments)
    except ValueError as error:
        print(f"jaxtrain: error: {error}", file=sys.stderr)
        return 2
    return 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with something of each kind in it."""
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, text in {
        "runs": None,
        "broken": "",
        "other": '{"name": "mnist1d", "config": {}}',
    }.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "run.json").write_text(text)
    return tmp_path


@pytest.mark.parametrize("row", ROWS, ids=[row.arguments[:60] for row in ROWS])
def test_flags_alone(row: Row, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = outcome(row.arguments.replace("{tmp}", str(folder)).split(" "))
    prefix = "jaxtrain: error: " if row.status else "jaxtrain: " if row.line else ""
    said = capsys.readouterr()
    assert said.err == (f"{prefix}{row.line}\n".replace("{tmp}", str(folder)) if row.line else "")
    assert status == row.status
    assert said.out == ""


def test_a_line_stays_one_line() -> None:
    for argument in (
        "--batch_size=1\n2",
        "--a\nb=3",
        "a\nb",
        "--model=a\nb",
        "--init_from=/a\nb",
        "--workdir=/dev/null/\n",
        "--from_run=\n",
    ):
        with pytest.raises(ValueError, match=".") as caught:
            flags.parse(toy_run(), [argument])
        assert "\n" not in str(caught.value)


def test_text_that_is_no_text() -> None:
    with pytest.raises(ValueError, match="must not hold a NUL character"):
        flags.parse(toy_run(), ["--data.train=a\0b"])
    with pytest.raises(ValueError, match="not valid UTF-8"):
        flags.parse(toy_run(), ["--data.train=\udcff"])


def test_a_workdir_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(30, os.strerror(30))

    # the superuser, who runs tests in containers, may write anywhere
    monkeypatch.setattr(config_run.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError) as caught:
        flags.parse(toy_run(), [f"--workdir={tmp_path}/run"])
    assert str(caught.value) == f"--workdir={tmp_path}/run: cannot write (Read-only file system)"


def test_looking_at_a_workdir_leaves_no_trace(tmp_path: Path) -> None:
    flags.parse(toy_run(), [f"--workdir={tmp_path}/a/b"])
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_secret_is_not_repeated() -> None:
    with pytest.raises(ValueError) as caught:
        flags.parse(toy_run(), ["--task.logger_token=abc", "--task.logger_token=def"])
    assert (
        str(caught.value)
        == "--task.logger_token is given twice, as <redacted> and <redacted>; give it once"
    )


def test_values_set_in_python_are_checked_too() -> None:
    for changes, line in [
        ({"batch_size": 0}, "--batch_size=0: must be an integer >= 1"),
        ({"optimizer": Adam(learning_rate=-1.0)}, "--optimizer.learning_rate=-1: must be > 0"),
        ({"epochs": 3.0}, "--epochs and --steps are both set; give one"),
    ]:
        with pytest.raises(ValueError) as caught:
            flags.parse(toy_run(**changes), [])
        assert str(caught.value) == line
