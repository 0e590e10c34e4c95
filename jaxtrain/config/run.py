"""A run: everything that decides what is trained and how, as one frozen value.

An experiment is plain Python that returns a `Run`; the command line (`flags.py`) only overrides its
fields, and `record.py` writes them down. `check` holds the rules between fields, `check_paths`
those that ask the disk.
"""

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxtrain import fields, messages
from jaxtrain.config import values
from jaxtrain.errors import UserError
from jaxtrain.fields import Above, AtLeast, Between, Count, Decay, Traced
from jaxtrain.horizon import Horizon
from jaxtrain.tree import Rules

FAMILIES = ("model", "data", "task", "optimizer", "schedule", "augment")
"""The fields of `Run` that hold a component, which `--FAMILY=NAME` swaps for a named one that the
experiment offers."""
NOT_FLAGS = ("name", "offers")
"""The fields of `Run` that belong to the experiment alone."""
PATHS = ("workdir", "init_from", "from_run")
"""The fields of `Run` that name a place on the disk; on the command line they may begin with ~."""


BatchSize = Annotated[int, AtLeast(1, whole=True)]
Seed = Annotated[int, Between(0, 2**32 - 1, whole=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What one experiment trains, on which data, for how long, and what it writes.

    >>> run = Run(
    ...     name="toy",
    ...     model=None,
    ...     data=None,
    ...     task=None,
    ...     optimizer=None,
    ...     schedule=None,
    ...     augment=None,
    ...     steps=100,
    ... )
    >>> run.batch_size, str(run.eval_every)
    (128, '1epochs')
    """

    name: str
    """The experiment's name; the default workdir is runs/NAME/TIME."""
    model: Any
    """The network."""
    data: Any
    """Where examples come from."""
    task: Any
    """What is learnt: the loss and the metrics."""
    optimizer: Any
    """How gradients become updates."""
    schedule: Any
    """How the learning rate changes over the run."""
    augment: Any
    """What is done to training examples on the device."""

    steps: Count | None = None
    """How many steps to train; replaces the experiment's own --steps or --epochs."""
    epochs: Annotated[float | None, Above(0)] = None
    """How many passes over the train split, fractions allowed; replaces the experiment's own
    --steps or --epochs."""
    batch_size: BatchSize = 128
    """How many examples one step sees, over all devices."""
    microbatches: Count = 1
    """Into how many parts a batch is cut to save memory; sums stay exact, but dropout draws anew
    for each part and batch norm takes each part's statistics. Must divide --batch_size."""
    seed: Seed = 0
    """The root of every random stream of the run."""
    clip_norm: Annotated[float | None, Above(0), Traced()] = None
    """Scales gradients down to this global norm; none = never."""
    ema_decay: Decay | None = None
    """Also keeps, and evaluates, an exponential moving average of the parameters with this decay;
    none = no average."""
    normalize: bool = True
    """Standardizes images by the mean and deviation of the train split; otherwise they are only
    scaled to 0..1."""
    init_from: str = ""
    """A workdir or checkpoint whose parameters the run starts from (a warm start, not a resume)."""

    mesh: str = "data:-1"
    """The devices as named axes, e.g. data:2,fsdp:4; one size may be -1, which takes what is
    left."""
    shard: Rules[str] = ()
    """Where parameters lie, by path pattern, before what their models say: a mesh axis or - for
    each dim, e.g. head/kernel=-:tensor."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """What the model computes in; parameters stay float32. auto = by the card: fp32 on CPUs and old
    cards, fp16 on V100 and Turing, bf16 from Ampere on."""
    matmul_precision: Literal["default", "tf32", "fp32"] = "default"
    """How products of float32 are computed on GPUs; default = TF32 where the card has it."""
    optimizer_state: Literal["fp32", "bf16"] = "fp32"
    """What the optimizer's averages are stored in; bf16 halves them, rounded stochastically."""
    remat: Literal["none", "dots", "dense", "blocks"] = "none"
    """What the backward pass computes again, to save memory: all but matrix products, all but
    products of dense layers, or all within a block."""
    offload: Literal["none", "optimizer"] = "none"
    """What lives in the memory of the host instead of the GPU's."""
    reproducible: bool = False
    """The same bits on any number of devices and processes, at some cost; for the axes data and
    fsdp."""
    logical_shards: Count = 8
    """Into how many parts --reproducible cuts every batch; a multiple of the devices, and part of
    the mathematics."""
    platform: Literal["auto", "cpu", "gpu"] = "auto"
    """Which devices to use; auto takes the best there is."""
    steps_per_call: Count | None = None
    """How many steps one dispatch runs over data in device memory; none = chosen by the work of a
    step."""
    device_data: Literal["auto", "yes", "no"] = "auto"
    """Whether the train split lives in device memory; auto = if it fits."""
    debug_nans: bool = False
    """Stops at the operation that first makes a NaN (slow)."""

    compare_meshes: tuple[str, ...] = ()
    """Trains nothing, but compares these meshes with one device and names what differs, e.g.
    data:8,fsdp:4xtensor:2."""
    compare_steps: Count = 20
    """How many steps --compare_meshes compares."""
    processes: Count | None = None
    """How many processes the run has; none = as SLURM, Open MPI, Kubernetes or scripts/launch_local
    say, else one."""
    process: Annotated[int | None, AtLeast(0, whole=True)] = None
    """Which of them this one is, from 0."""
    coordinator: str = ""
    """HOST:PORT where process 0 is to be found."""
    hang_seconds: Annotated[float | None, Above(0)] = None
    """Seconds without progress after which a process counts as hung; none = by phase, where the run
    is supervised."""
    max_restarts: Annotated[int, AtLeast(0, whole=True)] = 0
    """How often a run that lost a process starts again from its last commit."""

    workdir: str = ""
    """The run's folder; empty = runs/NAME/TIME."""
    resume: Literal["auto", "must", "never"] = "auto"
    """Whether to go on from the workdir's newest verified checkpoint: if there is one, or else
    fail, or never."""
    from_run: str = ""
    """The workdir of an earlier run whose configuration this one repeats; other flags override
    it."""
    allow_config_change: tuple[str, ...] = ()
    """Names of flags that may differ from those of the run being resumed, e.g.
    optimizer.learning_rate."""
    force_unlock: bool = False
    """Takes over a workdir whose owner is surely dead."""

    eval_every: Horizon = Horizon(1, "epochs")
    """How often the validation split is evaluated; 0 = never."""
    eval_batch_size: BatchSize = 512
    """How many examples one step of evaluation sees, over all devices."""
    eval_only: bool = False
    """Restores and evaluates, without training."""
    checkpoint_every: Horizon = Horizon(1, "epochs")
    """How often the state is committed; 0 = at the end only."""
    keep: Count = 2
    """How many of the newest checkpoints stay, besides the best."""
    keep_every: Horizon | None = None
    """Also keeps a checkpoint of each such interval for ever; none = no."""

    log_every: Count = 50
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Writes TensorBoard event files."""
    wandb: str = ""
    """The Weights & Biases project to log to (its key comes from the environment); empty = none."""
    report: bool = True
    """Writes report.html and plots at the end."""
    profile_steps: tuple[int, int] | None = None
    """The first and last step of a profiler trace, e.g. 20,25; none = no trace."""
    traceback: bool = False
    """Shows the Python traceback of an error."""

    offers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, repr=False)
    """The named components of each family that flags may choose: family -> name -> component."""


def replaced(component: Any, changes: Mapping[str, Any]) -> Any:
    """The same component with other values in some fields; a Linen module is cloned, for it knows
    more than its fields."""
    if not changes:
        return component
    return (
        component.clone(**changes)
        if hasattr(component, "clone")
        else dataclasses.replace(component, **changes)
    )


def check(run: Run) -> None:
    """Raises `ValueError`, naming the flag, if a field is out of its bounds or two of them cannot
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
    if run.steps is not None and run.epochs is not None:
        raise UserError("--epochs and --steps are both set; give one")
    if run.steps is None and run.epochs is None:
        raise UserError("--steps and --epochs are both unset; give one")
    if run.batch_size % run.microbatches:
        near = nearest_divisors(run.batch_size, run.microbatches)
        raise UserError(
            f"--microbatches={run.microbatches}: must divide --batch_size={run.batch_size};"
            f" nearest: {near}"
        )
    if run.profile_steps is not None and not 0 <= run.profile_steps[0] < run.profile_steps[1]:
        raise UserError(
            f"--profile_steps={values.text(run.profile_steps)}: must be FIRST,LAST with 0 <= FIRST"
            " < LAST"
        )
    if run.keep_every is not None and run.keep_every.value == 0:
        raise UserError("--keep_every=0steps: must be > 0; to keep none for ever, give none")
    if run.reproducible and run.compare_meshes:
        raise UserError(
            "--compare_meshes: compares plain steps, which layouts change by rounding; drop"
            " --reproducible, whose digests `verify` compares"
        )
    if run.reproducible and run.batch_size % run.logical_shards:
        near = nearest_divisors(run.batch_size, run.logical_shards)
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


def nearest_divisors(whole: int, value: int) -> str:
    """The divisors of `whole` next to `value`, in words.

    >>> nearest_divisors(32, 3), nearest_divisors(32, 100)
    ('2 or 4', '32')
    """
    divisors = [
        number
        for small in range(1, int(whole**0.5) + 1)
        if whole % small == 0
        for number in (small, whole // small)
    ]
    below = max((number for number in divisors if number <= value), default=None)
    above = min((number for number in divisors if number > value), default=None)
    return " or ".join(str(number) for number in (below, above) if number is not None)


def check_paths(run: Run) -> None:
    """Raises `ValueError` if the workdir cannot be written or `init_from` is not there; leaves no
    trace on the disk."""
    if run.workdir:
        _check_workdir(run.workdir)
    if run.init_from and not os.path.exists(run.init_from):
        raise UserError(
            f"--init_from={messages.one_line(run.init_from)}: no such file or"
            f" directory{siblings(run.init_from)}"
        )


def siblings(path: str) -> str:
    """The end of a message about a missing path: the nearest name in its folder, if one is near."""
    parent = Path(path).parent
    names = (
        [entry.name for entry in os.scandir(parent)]
        if parent.is_dir() and os.access(parent, os.R_OK)
        else []
    )
    match = messages.nearest(Path(path).name, names)
    return (
        ""
        if match is None
        else f"; in {messages.one_line(str(parent))}: {messages.one_line(match)}; did you mean it?"
    )


def _check_workdir(workdir: str) -> None:
    flag = f"--workdir={messages.one_line(workdir)}"
    place = Path(workdir)
    try:
        while not os.path.lexists(place) and place != place.parent:
            place.stat() if len(place.name) > 255 else None  # raises `File name too long`
            place = place.parent
        if place.exists() and not place.is_dir():
            raise UserError(
                f"{flag}: {'' if place == Path(workdir) else f'{messages.one_line(str(place))} '}is"
                " a file, not a directory"
            )
        if not place.exists():
            raise UserError(
                f"{flag}: {messages.one_line(str(place))} is a link to nothing; remove it or make"
                " its target"
            )
        # asking is not enough: the superuser may do anything, but not on a read-only disk
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{flag}: cannot write ({error.strerror})") from None
