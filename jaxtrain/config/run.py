"""A run: everything that decides what is trained and how, as one frozen value.

An experiment is plain Python that returns a `Run`; the command line (`flags.py`) only overrides its
fields, and `record.py` writes them down. `check` holds the rules between fields, `check_paths`
those that ask the disk.
"""

import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxtrain import fields, messages
from jaxtrain.config import marks, values
from jaxtrain.config.marks import EXPERIMENT, FAMILY, FREE, INVOCATION, PATH, Group, Mark
from jaxtrain.config.step_options import StepOptions
from jaxtrain.errors import UserError
from jaxtrain.fields import Above, AtLeast, Between, Count
from jaxtrain.horizon import Horizon, TokenCount
from jaxtrain.schedules import Constant
from jaxtrain.tree import Rules

LENGTHS = ("steps", "epochs", "tokens")
"""The fields that say how long a run is; one of them is given."""
STOP_AFTER = r"[1-9][0-9]{0,8}(evals?)?"
Hook = Callable[[int, Any, Mapping[str, float]], Any]
BatchSize = Annotated[int, AtLeast(1, whole=True)]
Seed = Annotated[int, Between(0, 2**32 - 1, whole=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(StepOptions):
    """What one experiment trains, on which data, for how long, and what it writes.

    >>> run = Run(name="toy", steps=100, **dict.fromkeys(FAMILIES))
    >>> run.batch_size, str(run.eval_every)
    (128, '1epochs')
    """

    name: Annotated[str, EXPERIMENT]
    """The experiment's name; the default workdir is runs/NAME/TIME."""
    model: Annotated[Any, FAMILY]
    """The network."""
    data: Annotated[Any, FAMILY]
    """Where examples come from."""
    task: Annotated[Any, FAMILY]
    """What is learnt: the loss and the metrics."""
    optimizer: Annotated[Any, FAMILY]
    """How gradients become updates."""
    schedule: Annotated[Any, FAMILY] = Constant()
    """How the learning rate changes over the run."""
    augment: Annotated[Any, FAMILY] = None
    """What is done to training examples on the device."""
    lora: Annotated[Any, FAMILY] = None
    """Adapters of low rank, which are trained in place of the model."""

    steps: Annotated[Count | None, Group.TRAINING, FREE] = None
    """How many steps to train; replaces the experiment's own --steps or --epochs."""
    epochs: Annotated[float | None, Above(0), Group.TRAINING, FREE] = None
    """How many passes over the train split, fractions allowed; replaces the experiment's own
    --steps or --epochs."""
    tokens: Annotated[TokenCount | None, AtLeast(1), Group.TRAINING, FREE] = None
    """How many tokens to train on, for tasks that count them, e.g. 10M or 1.5B; replaces the
    experiment's own --steps or --epochs."""
    batch_size: Annotated[BatchSize, Group.TRAINING] = 128
    """How many examples one step sees, over all devices."""
    seed: Annotated[Seed, Group.TRAINING] = 0
    """The root of every random stream of the run."""
    stop_after: Annotated[str | None, Group.TRAINING, FREE] = None
    """Ends the run early once so many evaluations in a row were no better than the best before
    them, e.g. 5evals; none = never."""
    normalize: Annotated[bool, Group.TRAINING] = True
    """Standardizes images by the mean and deviation of the train split; otherwise they are only
    scaled to 0..1."""
    init_from: Annotated[str, Group.TRAINING, FREE, PATH] = ""
    """A workdir, checkpoint or safetensors file whose parameters the run starts from (a warm start,
    not a resume)."""
    init_rules: Annotated[Rules[str], Group.TRAINING, FREE] = ()
    """What --init_from leaves out, resizes or renames, by path pattern: PATTERN=skip,
    PATTERN=resize or OLD=NEW, e.g. head=skip,encoder=backbone."""
    init_params: Annotated[Literal["auto", "average", "raw"], Group.TRAINING, FREE] = "auto"
    """Which parameters --init_from takes: the average where there is one, the average or none, or
    the raw ones."""
    init_checkpoint: Annotated[str, Group.TRAINING, FREE] = "last"
    """Which step of a workdir --init_from takes: best, last or a number."""

    mesh: Annotated[str, Group.DEVICES, FREE] = "data:-1"
    """The devices as named axes, e.g. data:2,fsdp:4; one size may be -1, which takes what is
    left."""
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16", "fp8"], Group.DEVICES] = "auto"
    """What the model computes in; parameters stay float32. auto = by the card: fp32 on CPUs and old
    cards, fp16 on V100 and Turing, bf16 from Ampere on."""
    matmul_precision: Annotated[Literal["default", "tf32", "fp32"], Group.DEVICES] = "default"
    """How products of float32 are computed on GPUs; default = TF32 where the card has it."""
    reproducible: Annotated[bool, Group.DEVICES] = False
    """The same bits on any number of devices and processes, at some cost; for the axes data and
    fsdp."""
    logical_shards: Annotated[Count, Group.DEVICES] = 8
    """Into how many parts --reproducible cuts every batch; a multiple of the devices, and part of
    the mathematics."""
    platform: Annotated[Literal["auto", "cpu", "gpu"], Group.DEVICES, FREE] = "auto"
    """Which devices to use; auto takes the best there is."""
    steps_per_call: Annotated[Count | None, Group.DEVICES, FREE] = None
    """How many steps one dispatch runs over data in device memory; none = chosen by the work of a
    step."""
    device_data: Annotated[Literal["auto", "yes", "no"], Group.DEVICES, FREE] = "auto"
    """Whether the train split lives in device memory; auto = if it fits."""
    debug_nans: Annotated[bool, Group.DEVICES, FREE] = False
    """Stops at the operation that first makes a NaN (slow)."""

    compare_meshes: Annotated[tuple[str, ...], Group.DEVICES, INVOCATION] = ()
    """Trains nothing, but compares these meshes with one device and names what differs, e.g.
    data:8,fsdp:4xtensor:2."""
    compare_steps: Annotated[Count, Group.DEVICES, INVOCATION] = 20
    """How many steps --compare_meshes compares."""
    processes: Annotated[Count | None, Group.PROCESSES, INVOCATION] = None
    """How many processes the run has; none = as SLURM, Open MPI, Kubernetes or scripts/launch_local
    say, else one."""
    process: Annotated[int | None, AtLeast(0, whole=True), Group.PROCESSES, INVOCATION] = None
    """Which of them this one is, from 0."""
    coordinator: Annotated[str, Group.PROCESSES, INVOCATION] = ""
    """HOST:PORT where process 0 is to be found."""
    hang_seconds: Annotated[float | None, Above(0), Group.PROCESSES, INVOCATION] = None
    """Seconds without progress after which a process counts as hung; none = by phase, where the run
    is supervised."""
    max_restarts: Annotated[int, AtLeast(0, whole=True), Group.PROCESSES, INVOCATION] = 0
    """How often a run that lost a process starts again from its last commit."""

    workdir: Annotated[str, Group.WORKDIR, INVOCATION, PATH] = ""
    """The run's folder; empty = runs/NAME/TIME."""
    resume: Annotated[Literal["auto", "must", "never"], Group.WORKDIR, INVOCATION] = "auto"
    """Whether to go on from the workdir's newest verified checkpoint: if there is one, or else
    fail, or never."""
    from_run: Annotated[str, Group.WORKDIR, INVOCATION, PATH] = ""
    """The workdir of an earlier run whose configuration this one repeats; other flags override
    it."""
    allow_config_change: Annotated[tuple[str, ...], Group.WORKDIR, INVOCATION] = ()
    """Names of flags that may differ from those of the run being resumed, e.g.
    optimizer.learning_rate."""
    checkpoint: Annotated[str, Group.WORKDIR, INVOCATION] = "last"
    """Which checkpoint to go on from or to evaluate: best, last or a step."""
    rewind: Annotated[bool, Group.WORKDIR, INVOCATION] = False
    """Lets --checkpoint go on from an earlier step: later checkpoints and the metrics are set aside
    in WORKDIR/rewound-TIME."""
    force_unlock: Annotated[bool, Group.WORKDIR, INVOCATION] = False
    """Takes over a workdir whose owner is surely dead."""

    eval_every: Annotated[Horizon, Group.CHECKPOINTS, FREE] = Horizon(1, "epochs")
    """How often the validation split is evaluated; 0 = never."""
    evaluate: Annotated[values.EvaluationSets, Group.CHECKPOINTS, FREE] = ()
    """Further sets that are evaluated whenever the validation split is, by name: splits of the
    data, e.g. rotated=test[:50%], or in Python data sources of their own."""
    best: Annotated[str, Group.CHECKPOINTS, FREE] = ""
    """What the best checkpoint is chosen by: METRIC or SET/METRIC, e.g. loss, rotated/accuracy or
    error,min; empty = the accuracy on the validation split, or else its loss."""
    eval_batch_size: Annotated[BatchSize, Group.CHECKPOINTS, FREE] = 512
    """How many examples one step of evaluation sees, over all devices."""
    eval_only: Annotated[bool, Group.CHECKPOINTS, INVOCATION] = False
    """Restores and evaluates, without training."""
    checkpoint_every: Annotated[Horizon, Group.CHECKPOINTS, FREE] = Horizon(1, "epochs")
    """How often the state is committed; 0 = at the end only."""
    keep: Annotated[Count, Group.CHECKPOINTS, FREE] = 2
    """How many of the newest checkpoints stay, besides the best."""
    keep_every: Annotated[Horizon | None, Group.CHECKPOINTS, FREE] = None
    """Also keeps a checkpoint of each such interval for ever; none = no."""

    log_every: Annotated[Count | None, Group.OUTPUT, FREE] = None
    """Steps between lines of metrics; none = a fiftieth of the run, at most 50."""
    sample_every: Annotated[Horizon, Group.OUTPUT, FREE] = Horizon(0, "steps")
    """How often a language model says a text, which is shown, kept in samples.jsonl and put into
    the report; 0 = never."""
    sample_prompt: Annotated[str, Group.OUTPUT, FREE] = ""
    """What --sample_every goes on from; empty = as a text begins."""
    sample_tokens: Annotated[Count, Group.OUTPUT, FREE] = 200
    """How many tokens --sample_every draws at most."""
    tensorboard: Annotated[bool, Group.OUTPUT, FREE] = True
    """Writes TensorBoard event files."""
    wandb: Annotated[str, Group.OUTPUT, FREE] = ""
    """The Weights & Biases project to log to (its key comes from the environment); empty = none."""
    report: Annotated[bool, Group.OUTPUT, FREE] = True
    """Writes report.html and plots at the end."""
    profile_steps: Annotated[tuple[int, int] | None, Group.OUTPUT, INVOCATION] = None
    """The first and last step of a profiler trace, e.g. 20,25; none = no trace."""
    traceback: Annotated[bool, Group.OUTPUT, INVOCATION] = False
    """Shows the Python traceback of an error."""

    at_step: Annotated[Hook | None, EXPERIMENT] = dataclasses.field(default=None, repr=False)
    """Called with step, a copy of the state, and the means at every line of metrics."""
    at_evaluation: Annotated[Hook | None, EXPERIMENT] = dataclasses.field(default=None, repr=False)
    """Called with step, a copy of the state, and `SET/METRIC` -> value after every evaluation."""
    offers: Annotated[Mapping[str, Mapping[str, Any]], EXPERIMENT] = dataclasses.field(
        default_factory=dict, repr=False
    )
    """The named components of each family that flags may choose: family -> name -> component."""

    def __post_init__(self) -> None:
        """Sets may be given as a mapping; they are kept as pairs, as flags give them."""
        if isinstance(self.evaluate, Mapping):
            object.__setattr__(self, "evaluate", tuple(self.evaluate.items()))


marks.check(Run)


def marked(mark: Mark) -> tuple[str, ...]:
    """The names of the fields of `Run` that bear a mark, in their order.

    >>> marked(Mark.PATH)
    ('init_from', 'workdir', 'from_run')
    """
    return tuple(field.name for field in fields.fields_of(Run) if mark in field.marks)


FAMILIES = marked(Mark.FAMILY)
"""The fields that hold a component."""


def check(run: Run) -> None:
    """Raises `UserError`, naming the flag, if a field is out of its bounds or two of them cannot
    go together.

    >>> check(
    ...     Run(
    ...         name="toy",
    ...         model=0,
    ...         data=0,
    ...         task=0,
    ...         optimizer=0,
    ...         schedule=0,
    ...         augment=0,
    ...         steps=9,
    ...         batch_size=32,
    ...         microbatches=3,
    ...     )
    ... )
    Traceback (most recent call last):
    ...
    jaxtrain.errors.UserError: --microbatches=3: must divide --batch_size=32; nearest: 2 or 4
    """
    for name, value, problem in fields.out_of_bounds(run):
        raise UserError(f"--{name}={values.text(value)}: {problem}")
    lengths = sorted(name for name in LENGTHS if getattr(run, name) is not None)
    if len(lengths) > 1:
        both = "both" if len(lengths) == 2 else "all"
        raise UserError(f"--{' and --'.join(lengths)} are {both} set; give one")
    if not lengths:
        raise UserError("--steps and --epochs are both unset; give one")
    if run.batch_size % run.microbatches:
        near = messages.nearest_divisors(run.batch_size, run.microbatches)
        raise UserError(
            f"--microbatches={run.microbatches}: must divide --batch_size={run.batch_size};"
            f" nearest: {near}"
        )
    if run.profile_steps is not None and not 0 <= run.profile_steps[0] < run.profile_steps[1]:
        raise UserError(
            f"--profile_steps={values.text(run.profile_steps)}: must be FIRST,LAST with 0 <= FIRST"
            " < LAST"
        )
    _check_evaluation(run)
    if run.keep_every is not None and run.keep_every.value == 0:
        raise UserError("--keep_every=0steps: must be > 0; to keep none for ever, give none")
    if run.reproducible and run.compare_meshes:
        raise UserError(
            "--compare_meshes: compares plain steps, which layouts change by rounding; drop"
            " --reproducible, whose digests `verify` compares"
        )
    if run.reproducible and run.batch_size % run.logical_shards:
        near = messages.nearest_divisors(run.batch_size, run.logical_shards)
        raise UserError(
            f"--logical_shards={run.logical_shards}: must divide --batch_size={run.batch_size};"
            f" nearest: {near}"
        )
    for other, clash in (("--debug_nans", run.debug_nans), ("--offload", run.offload != "none")):
        if run.reproducible and clash:
            raise UserError(f"--reproducible and {other}: cannot go together; drop one of them")
    if run.eval_only and run.resume == "never":
        raise UserError(
            "--eval_only and --resume=never: evaluating needs a checkpoint; drop one of them"
        )
    _check_start(run)


def _check_start(run: Run) -> None:
    """The rules between the flags that say where a run starts."""
    for name in ("checkpoint", "init_checkpoint"):
        word = getattr(run, name)
        if word not in ("best", "last") and not re.fullmatch("0|[1-9][0-9]{0,17}", word):
            near = messages.did_you_mean(word, ("best", "last"))
            raise UserError(f"--{name}={messages.shown(word)}: must be best, last or a step{near}")
    defaults = {"init_rules": (), "init_params": "auto", "init_checkpoint": "last"}
    for name, default in defaults.items():
        if not run.init_from and getattr(run, name) != default:
            text = values.text(getattr(run, name))
            raise UserError(f"--{name}={text}: belongs to --init_from, which is not given")
    if run.checkpoint != "last" and run.resume == "never":
        raise UserError(
            f"--checkpoint={run.checkpoint} and --resume=never: cannot go together; drop one of"
            " them"
        )
    if run.checkpoint != "last" and run.max_restarts and not run.eval_only:
        raise UserError(
            f"--checkpoint={run.checkpoint}: every restart would go back to it; drop"
            f" --max_restarts={run.max_restarts}"
        )
    if run.rewind and (run.eval_only or run.checkpoint == "last"):
        raise UserError(
            "--rewind: goes on from an earlier step; give it with --checkpoint=best or a step, and"
            " without --eval_only"
        )


def _check_evaluation(run: Run) -> None:
    """The rules for what is evaluated, and called, on the way."""
    if isinstance(run.evaluate, str):
        raise UserError(
            f"evaluate={run.evaluate!r}: must be a dict of names and splits, such as"
            f" {{'other': {run.evaluate!r}}}"
        )
    names = [name for name, _ in run.evaluate]
    for name in names:
        taken = name in ("train", "validation", "test") or names.count(name) > 1
        if taken or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
            rule = "is the name of another set" if taken else "use letters, digits, points, - and _"
            raise UserError(f"--evaluate={messages.printable(name)}=...: {rule}; rename the set")
    if run.stop_after is not None and not re.fullmatch(STOP_AFTER, run.stop_after):
        raise UserError(
            f"--stop_after={messages.shown(run.stop_after)}: not a number of evaluations; expected"
            " e.g. 5evals, or none"
        )
    if run.stop_after is not None and not run.eval_every.value:
        raise UserError(
            f"--stop_after={run.stop_after} and --eval_every=0: nothing is evaluated on the way;"
            " set --eval_every or drop --stop_after"
        )
    for name in ("at_step", "at_evaluation"):
        hook = getattr(run, name)
        if hook is not None and not callable(hook):
            raise UserError(
                f"{name}={hook!r}: is a {type(hook).__name__}; give a function of (step, state,"
                " metrics)"
            )


def check_paths(run: Run) -> None:
    """Raises `UserError` if the workdir cannot be written or `init_from` is not there; leaves no
    trace on the disk."""
    if run.workdir:
        _check_workdir(run.workdir)
    # a run that goes on does not read it again
    begun = run.workdir and os.path.exists(os.path.join(run.workdir, "run.json"))
    if run.init_from and not begun and not os.path.exists(run.init_from):
        raise UserError(
            f"--init_from={messages.printable(run.init_from)}: no such file or"
            f" directory{messages.did_you_mean_path(run.init_from)}"
        )


def _check_workdir(workdir: str) -> None:
    flag = f"--workdir={messages.printable(workdir)}"
    place = Path(workdir)
    try:
        while not os.path.lexists(place) and place != place.parent:
            place.stat() if len(place.name) > 255 else None  # raises `File name too long`
            place = place.parent
        name = messages.printable(str(place))
        if place.exists() and not place.is_dir():
            above = "" if place == Path(workdir) else f"{name} "
            raise UserError(f"{flag}: {above}is a file, not a directory")
        if not place.exists():
            raise UserError(f"{flag}: {name} is a link to nothing; remove it or make its target")
        # asking is not enough: the superuser may do anything, but not on a read-only disk
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{flag}: cannot write ({error.strerror})") from None
