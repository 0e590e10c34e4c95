"""The words of other toolkits: every suggestion names a flag that there is, and is accepted when
it is followed."""

import dataclasses
import re
from pathlib import Path

import pytest
from test_bad_inputs import Row
from test_remedies import follow, outcome, rich_run

from jaxtrain.config import flags, other_toolkits, suggestions
from jaxtrain.config.other_toolkits import RENAMED, TRANSLATED
from jaxtrain.errors import UserError

LATER = {"best", "stop_after", "data.length", "data.tokenizer", "lora.rank", "lora.alpha"}
"""Flags that some tables name and that need not be there: a suggestion for them is not given
then."""
VALUES = {
    "learning_rate": "1e-3",
    "schedule.warmup": "10",
    "data": "digits",
    "model": "mlp",
    "optimizer": "adamw",
    "schedule": "cosine",
    "augment": "none",
    "task": "classification",
    "rates": "head=10",
    "precision": "fp16",
    "mesh": "data:4",
    "init_from": "{tmp}",
    "workdir": "{tmp}/run",
    "data.train": "train",
    "data.validation": "test",
    "data.test": "test",
    "data.path": "x.npz",
    "size": "32,32",
    "coordinator": "localhost:1234",
    "wandb": "mine",
    "tensorboard": "true",
    "processes": "2",
    "process": "0",
}
"""A right value for the flags that take no small number; the others take this one:"""
SMALL = "1"
RATES = {"ema_decay", "b1", "b2", "label_smoothing", "dropout"}


RUN = rich_run()
FLAGS = suggestions.Flags(RUN)
DEFINED = flags.flags_of(RUN)


def suggestion(name: str, value: str) -> str:
    """The whole line about a flag that does not exist."""
    return f"unknown flag --{name}; {suggestions.instead_of(name, value or None, FLAGS)}"


def problem(arguments: list[str]) -> str | None:
    """What the flags say of the values that they are given, each for itself."""
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        off = name.removeprefix("no")
        try:
            if name == "flagfile":
                continue
            if equals or name in DEFINED:
                DEFINED[name].read(value if equals else "true")
            else:
                DEFINED[off].read("false")
        except UserError as error:
            return str(error)
    return None


@pytest.mark.parametrize("name", sorted(RENAMED.keys() - DEFINED.keys()))
def test_renamed_flags(name: str, tmp_path: Path) -> None:
    ours = RENAMED[name]
    value = VALUES.get(ours, "0.5" if ours in RATES else SMALL).replace("{tmp}", str(tmp_path))
    line = suggestion(name, value)
    assert "; did you mean --" in line or " comes with " in line
    followed = follow([f"--{name}={value}"], line)
    assert followed != [f"--{name}={value}"]
    if "comes with" in line:
        assert outcome(followed, RUN) is None, (line, followed)
    else:
        assert problem(followed) is None, (line, followed)


def _examples(name: str) -> list[str]:
    """A value for each row of a translation, found by trying typical ones."""
    typical = ["", "true", "false", "4", "100", "0.1", "0", "1.0", "0,1", "cpu", "gpu", "cuda:0"]
    typical += ["epoch", "steps", "no", "fp16", "bf16", "fp8", "fp32", "full", "minimal", "none"]
    typical += ["fsdp", "ddp", "tp", "runs/x", "best", "wandb", "all", "x.py", "x.yaml", "norm"]
    typical += ["value", "train", "eval", "localhost", "adamw", "mlp", "-1", "mine"]
    found = []
    for pattern, _ in TRANSLATED[name]:
        matching = [each for each in typical if re.fullmatch(pattern, each, re.IGNORECASE)]
        assert matching, f"{name}: no value is tried for {pattern!r}"
        found += matching
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("name", [name for name in TRANSLATED if name not in DEFINED])
def test_translated_flags(name: str) -> None:
    for value in _examples(name):
        line = suggestion(name, value)
        if line.endswith("; None"):
            assert LATER & set(re.findall(r"--([\w.]+)", str(TRANSLATED[name]))), (name, value)
            continue
        arguments = [f"--{name}={value}" if value else f"--{name}"]
        followed = follow(arguments, line)
        assert followed != arguments, line
        # What the value itself has wrong is told next, with what is right.
        then = problem(followed)
        ours = followed[0].partition("=")[0] if followed else ""
        assert then is None or then.startswith((f"{ours}=", f"{ours}: ")), (line, followed, then)


def test_every_flag_that_a_table_names_is_there() -> None:
    names = set(DEFINED)
    parts = names | {name.rpartition(".")[2] for name in names}
    for family in RUN.offers.values():
        parts |= {field.name for part in family.values() for field in dataclasses.fields(part)}
    written = {flag for rows in TRANSLATED.values() for _, text in rows for flag in _flags(text)}
    assert written - names <= LATER | {"flagfile"}
    assert set(RENAMED.values()) - parts <= LATER


def _flags(text: str) -> list[str]:
    return [flag.rstrip(".") for flag in re.findall(r"--(?:no(?=\w+))?([a-z][\w.]*)", text)]


def test_no_name_is_in_both_tables() -> None:
    assert not RENAMED.keys() & TRANSLATED.keys()
    for name in [*RENAMED, *TRANSLATED]:
        assert other_toolkits.plain(name) == name


@pytest.mark.parametrize(
    "row",
    [
        # the opposite is not suggested
        Row(
            "--no-report",
            "unknown flag --no-report; did you mean --noreport?",
        ),
        Row(
            "--no_report",
            "unknown flag --no_report; did you mean --noreport?",
        ),
        Row(
            "--noreprot",
            "unknown flag --noreprot; did you mean --noreport?",
        ),
        Row(
            "--disable_report",
            "unknown flag --disable_report; did you mean --noreport?",
        ),
        Row(
            "--without-tensorboard",
            "unknown flag --without-tensorboard; did you mean --notensorboard?",
        ),
        Row(
            "--nomalize",
            "unknown flag --nomalize; did you mean --normalize?",
        ),
        Row(
            "--noclip_norm",
            "unknown flag --noclip_norm; did you mean --clip_norm=none?",
        ),
        Row(
            "--noaugment",
            "unknown flag --noaugment; did you mean --augment=none?",
        ),
        Row(
            "--noeval_every",
            "unknown flag --noeval_every; did you mean --eval_every=0?",
        ),
        Row(
            "--nowandb",
            "unknown flag --nowandb; did you mean --wandb=?",
        ),
        Row(
            "--noseed",
            "unknown flag --noseed; --seed takes int 0..4294967295 and cannot be switched off",
        ),
        Row(
            "--nofp16",
            "unknown flag --nofp16; write --precision=fp32",
        ),
        Row(
            "--no-cuda",
            "unknown flag --no-cuda; write --platform=cpu",
        ),
        # values
        Row(
            "--precision=16-mixed",
            "--precision='16-mixed': unknown; valid: auto, fp32, bf16, fp16, fp8; did you mean"
            " 'fp16'?",
        ),
        Row(
            "--precision=bf16-mixed",
            "--precision='bf16-mixed': unknown; valid: auto, fp32, bf16, fp16, fp8; did you"
            " mean 'bf16'?",
        ),
        Row(
            "--precision=32",
            "--precision=32: unknown; valid: auto, fp32, bf16, fp16, fp8; did you mean 'fp32'?",
        ),
        Row(
            "--platform=cuda",
            "--platform='cuda': unknown; valid: auto, cpu, gpu; did you mean 'gpu'?",
        ),
        Row(
            "--remat=full",
            "--remat='full': unknown; valid: none, dots, dense, blocks; did you mean 'blocks'?",
        ),
        Row(
            "--resume=runs/x",
            "--resume='runs/x': unknown; valid: auto, must, never; write --workdir=runs/x to"
            " go on, or --init_from=runs/x to start from its parameters",
        ),
        Row(
            "--eval_every=epoch",
            "--eval_every='epoch': not a horizon; expected e.g. 200, 200steps, 2epochs or 5%;"
            " did you mean 1epochs?",
        ),
        Row(
            "--eval_every=never",
            "--eval_every='never': not a horizon; expected e.g. 200, 200steps, 2epochs or 5%;"
            " did you mean 0?",
        ),
        Row(
            "--eval_every=0.1",
            "--eval_every=0.1: steps must be a whole number; for a part of the run write e.g."
            " 5%; did you mean 10% of the run?",
        ),
        Row(
            "--steps=10k",
            "--steps='10k': must be an integer >= 1; did you mean 10000?",
        ),
        Row(
            "--steps=1,000",
            "--steps='1,000': must be an integer >= 1; did you mean 1000?",
        ),
        # where flags are called by longer names
        Row(
            "--trainer.max_epochs=3",
            "unknown flag --trainer.max_epochs; did you mean --epochs?",
        ),
        Row(
            "--config.lr=3",
            "unknown flag --config.lr; did you mean --optimizer.learning_rate?",
        ),
        Row(
            "--config.input.batch_size=3",
            "unknown flag --config.input.batch_size; did you mean --batch_size?",
        ),
        Row(
            "--model.lr=3",
            "unknown flag --model.lr; did you mean --optimizer.learning_rate?",
        ),
        Row(
            "--optimizer.name=adam",
            "unknown flag --optimizer.name; did you mean --optimizer?",
        ),
        Row(
            "--momentum=0.9",
            "unknown flag --momentum; --optimizer.momentum comes with --optimizer=sgd,"
            " --optimizer=momentum, --optimizer=nesterov, --optimizer=lars",
        ),
        # words that are no flags
        Row(
            "fit",
            "unexpected argument 'fit'; leave it out: an experiment trains by itself",
        ),
        Row(
            "eval",
            "unexpected argument 'eval'; write --eval_only to evaluate without training",
        ),
        Row(
            "lr=1e-3",
            "unexpected argument 'lr=1e-3'; did you mean --optimizer.learning_rate=1e-3?",
        ),
        Row(
            "optimizer.learning_rate=3e-4",
            "unexpected argument 'optimizer.learning_rate=3e-4'; did you mean"
            " --optimizer.learning_rate=3e-4?",
        ),
        Row(
            "++trainer.max_epochs=3",
            "unexpected argument '++trainer.max_epochs=3'; did you mean --epochs=3?",
        ),
        Row(
            "report",
            "unexpected argument 'report'; leave it out: that is a command, python -m jaxtrain"
            " report",
        ),
        # names of settings
        Row(
            "--allow_config_change=lr",
            "--allow_config_change=lr: no such setting; did you mean 'optimizer.learning_rate'?",
        ),
        Row(
            "--allow_config_change=seed,batchsize",
            "--allow_config_change=batchsize: no such setting; did you mean 'batch_size'?",
        ),
        Row(
            "--allow_config_change=all",
            "--allow_config_change=all: no such setting; names are those of flags, e.g."
            " optimizer.learning_rate",
        ),
    ],
    ids=lambda row: row.arguments,
)
def test_suggestions(row: Row) -> None:
    assert outcome([row.arguments], RUN) == row.line


@pytest.mark.parametrize("name", ["seed", "model", "model.widths", "data", "optimizer.momentum"])
def test_settings_that_may_change(name: str) -> None:
    assert outcome([f"--allow_config_change={name}"], RUN) is None
