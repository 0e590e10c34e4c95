"""The check before the first step: the real training and evaluation passes on shapes alone, so that
whatever can be found out is found out in one line before anything is compiled."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain import adapters, precision, rng, tree
from jaxtrain.errors import RunError, UserError
from jaxtrain.precision.loss_scale import LossScale
from jaxtrain.train import auxiliary_losses, explain, hyper, train_step
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.state import TrainState, initial_numbers
from jaxtrain.tree import Batch, Shapes


@dataclasses.dataclass(frozen=True)
class Checked:
    """What the check found out."""

    outputs: Any
    """Shapes and dtypes of what the model gives in evaluation."""
    notes: tuple[str, ...]
    """What should be said once: a line each."""
    batch: dict[str, jax.ShapeDtypeStruct]
    """Shapes and dtypes of a training batch."""
    state: TrainState
    """Shapes and dtypes of the parameters and collections; the optimizer's state is left out."""
    reads_weight: bool = True
    """Whether the task's loss looks at `weight`, which is 0 for padding, in evaluation."""


@dataclasses.dataclass
class _Seen:
    """What ran while a pass was traced."""

    doing: str = "the model"
    sown: dict[str, Any] = dataclasses.field(default_factory=dict)
    quiet: dict[str, bool] = dataclasses.field(default_factory=dict)
    """Dropouts and batch norms of Linen by name, and whether they are as in evaluation."""
    drew_in_evaluation: bool = False
    read: set[str] = dataclasses.field(default_factory=set)
    """Fields of the batch that the loss looked at in evaluation."""


def check(recipe: Recipe, batch: Shapes) -> Checked:
    """Runs a recipe on the shapes of a raw batch: initialisation, evaluation, training with
    its gradient.

    >>> from jaxtrain.models import MLP
    >>> from jaxtrain.optimizers import SGD
    >>> from jaxtrain.tasks import Classification
    >>> shapes = {
    ...     "image": jax.ShapeDtypeStruct((8, 4), jnp.float32),
    ...     "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    ... }
    >>> check(Recipe(MLP(num_classes=3), Classification(), SGD()), shapes).outputs.shape
    (8, 3)

    `UserError` in one line for what is understood; any other exception of the model, the task or
    the augmentation is raised with a note on what ran (see `explain.note`).
    """
    check_task(recipe.task)
    batch = dict(batch)
    state = initial(recipe, batch)
    seen = _Seen()
    outputs = evaluated(recipe, state, batch, seen=seen)
    ids = {"id": jax.ShapeDtypeStruct((_rows(batch),), jnp.int32)}
    with _told(recipe, batch, seen, train=True), nn.intercept_methods(_noting_layers(seen)):
        total = jax.eval_shape(functools.partial(_training, recipe, seen), state, {**ids, **batch})
    _check_collections(recipe, state.collections, total.collections)
    return Checked(outputs, tuple(_notes(recipe, seen)), batch, state, "weight" in seen.read)


def evaluated(
    recipe: Recipe, state: TrainState, batch: Shapes, *, seen: _Seen | None = None
) -> Any:
    """Shapes and dtypes of the outputs in evaluation, for a raw batch of these shapes; the errors
    are those of `check`."""
    seen, rows = seen or _Seen(), _rows(batch)
    more = {
        "id": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "weight": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }
    with _told(recipe, batch, seen, train=False):
        return jax.eval_shape(
            functools.partial(_evaluation, recipe, seen), state, {**more, **batch}
        )


def check_task(task: Any) -> None:
    """`UserError` if a task lacks what the step asks of it."""
    kind = type(task).__name__
    for name in ("inputs", "loss"):
        if not callable(getattr(task, name, None)):
            raise UserError(
                f"task={kind}: has no {name}; a task has inputs(batch) and loss(outputs, batch, *,"
                " train=True)"
            )
    parameters = inspect.signature(task.loss).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "train" not in parameters and not takes_all:
        raise UserError(
            f"task={kind}: loss takes ({', '.join(parameters)}) and no train=, which is False in"
            " evaluation; write def loss(self, outputs, batch, *, train=True)"
        )


def initial(recipe: Recipe, batch: dict[str, Any]) -> TrainState:
    """Shapes and dtypes of what the two passes need of a state."""

    def initialize(batch: Batch, numbers: Mapping[str, jax.Array]) -> TrainState:
        bound = hyper.bind(recipe, numbers)
        variables = adapters.functions(bound.model).init(rng.root(0), bound.inputs(batch))
        params = variables.pop("params")
        # a rule that decides no parameter is an error
        recipe.optimizer.check(params)
        recipe.optimizer.transform(params, 1.0).init(params)
        scaled = precision.POLICIES[recipe.precision].scaled
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=None,
            collections=variables,
            ema=params,  # so that evaluation asks no optimizer for its own
            hyper=dict(numbers),
            key=rng.root(0),
            position=None,
            scaling=LossScale.new() if scaled else None,
        )

    with _told(recipe, batch, _Seen("the initialisation of the model"), train=False):
        return jax.eval_shape(initialize, batch, initial_numbers(recipe))


def _training(recipe: Recipe, seen: _Seen, state: TrainState, batch: Batch) -> train_step.Total:
    # A part of a batch is like the whole, and what is computed again is computed as it was.
    bound = dataclasses.replace(_watched(recipe, state, seen), microbatches=1, remat="none")
    return train_step.gradients(bound, dataclasses.replace(state, hyper={}), batch)


def _evaluation(recipe: Recipe, seen: _Seen, state: TrainState, batch: Batch) -> Any:
    bound = _watched(recipe, state, seen)
    batch = train_step.to_evaluate(bound, state, batch, None)
    outputs = train_step.outputs(bound, dataclasses.replace(state, hyper={}), batch)
    bound.task.loss(outputs, _NotedBatch(batch, seen.read), train=False)
    return outputs


class _NotedBatch(dict[str, Any]):
    """A batch that notes which of its fields are read; whoever copies it reads all of them."""

    def __init__(self, batch: Batch, read: set[str]) -> None:
        super().__init__(batch)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or the default."""
        self._read.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self._read.add(str(name))
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        self._read.update(super().__iter__())
        return super().__iter__()

    def items(self) -> Any:
        """All fields."""
        self._read.update(super().__iter__())
        return super().items()

    def values(self) -> Any:
        """All fields."""
        self._read.update(super().__iter__())
        return super().values()


class _WatchedTask:
    """A task whose sums are looked at, and that says when its turn is."""

    def __init__(self, task: Any, seen: _Seen) -> None:
        self._task, self._seen = task, seen

        @functools.wraps(task.loss)
        def loss(*arguments: Any, **options: Any) -> Any:
            seen.doing = f"the loss of the task {type(task).__name__}"
            return checked_sums(task, task.loss(*arguments, **options))

        self.loss = loss
        if hasattr(task, "draw"):
            self.draw = task.draw

    def inputs(self, batch: Batch) -> Any:
        """Those of the task."""
        self._seen.doing = f"the inputs of the task {type(self._task).__name__}"
        return self._task.inputs(batch)


def checked_sums(task: Any, sums: Any) -> Any:
    """The sums of a task; `UserError` if they are none."""
    what = f"task={type(task).__name__}: loss"
    rule = "it must give {'loss': (sum, count), ...}, for example"
    example = "{'loss': metrics.weighted(loss_B, batch.get('weight'))}"
    if not isinstance(sums, Mapping):
        raise UserError(f"{what} gave {_shown(sums)}; {rule} {example}")
    if "loss" not in sums:
        given = ", ".join(map(str, sums)) or "nothing"
        raise UserError(f"{what} gave {given} and no 'loss'; {rule} {example}")
    for name, pair in sums.items():
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise UserError(f"{what} gave {_shown(pair)} as {name!r}; {rule} {example}")
        for word, part in zip(("sum", "count"), pair, strict=True):
            if getattr(part, "shape", ()) != ():
                raise UserError(
                    f"{what}: the {word} of {name!r} is {_shown(part)}; it must be one number, so"
                    f" add it up, for example {example}"
                )
    return sums


def _watched(recipe: Recipe, state: TrainState, seen: _Seen) -> Recipe:
    """The recipe with its numbers, whose parts say when their turn is."""
    bound = hyper.bind(recipe, state.hyper)
    net = adapters.functions(bound.model)

    def apply(
        variables: adapters.Variables, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, adapters.Variables]:
        seen.doing = "the model"
        outputs, changed = net.apply(variables, inputs, train=train, key=key)
        if train:
            seen.sown = adapters.split_sown(changed, variables)[1]
        seen.drew_in_evaluation |= not train and key is not None
        return outputs, changed

    return dataclasses.replace(
        bound,
        model=adapters.Functions(net.init, apply, net.model),
        task=_WatchedTask(bound.task, seen),
        prepare=_noting(bound.prepare, "the preparation of a batch", seen),
        augment=_noting(bound.augment, "the augmentation", seen),
    )


def _noting(function: Any, doing: str, seen: _Seen) -> Any:
    if function is None:
        return None

    def noting(*arguments: Any) -> Any:
        seen.doing = doing
        return function(*arguments)

    return noting


def _noting_layers(seen: _Seen) -> Any:
    """Notes of each dropout and batch norm of Linen whether it is switched off in training."""

    def note(following: Any, arguments: Any, options: Any, context: Any) -> Any:
        layer = context.module
        name = {nn.Dropout: "deterministic", nn.BatchNorm: "use_running_average"}.get(type(layer))
        if name is not None and context.method_name == "__call__":
            off = options.get(name, arguments[1] if len(arguments) > 1 else None)
            off = getattr(layer, name) if off is None else off
            if getattr(layer, "rate", 1.0):
                seen.quiet["/".join(layer.path)] = bool(off)
        return following(*arguments, **options)

    return note


@contextlib.contextmanager
def _told(recipe: Recipe, batch: Shapes, seen: _Seen, *, train: bool) -> Iterator[None]:
    """Turns what goes wrong into one line, or notes at it what ran."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        fields = ", ".join(f"{name} {_shown(leaf)}" for name, leaf in batch.items())
        doing = f"while running {seen.doing} on shapes, train={train}: {fields}"
        wide = dataclasses.replace(recipe, precision="fp32")
        again = (_again(each, batch, train) for each in (recipe, wide))
        line = explain.line(recipe, error, *again)
        if line is not None:
            raise UserError(f"{line} ({doing})") from error
        explain.note(error, doing)
        raise


def _again(recipe: Recipe, batch: Shapes, train: bool) -> Callable[[], Any]:
    """What runs a pass once more, to look at it closer."""

    def run() -> Any:
        state = initial(recipe, dict(batch))
        function = _training if train else _evaluation
        return jax.eval_shape(functools.partial(function, recipe, _Seen()), state, dict(batch))

    return run


def _check_collections(recipe: Recipe, before: Any, after: Any) -> None:
    """`UserError` if a training step changes the structure, a shape or a dtype of what the model
    keeps: the next step could not take it."""
    old, new = tree.flatten(before), tree.flatten(after)
    kind = explain.name_of(recipe.model)
    for path in sorted(old.keys() ^ new.keys()):
        what = "is there after a training step only" if path in new else "is gone after a step"
        raise UserError(
            f"model={kind}: {path} {what}; what a model keeps must be there at initialisation, and"
            " stay"
        )
    for path, leaf in old.items():
        if (leaf.shape, leaf.dtype) != (new[path].shape, new[path].dtype):
            raise UserError(
                f"model={kind}: {path} is {_shown(leaf)} and after a training step"
                f" {_shown(new[path])}; it must keep its shape and dtype (x.astype(old.dtype))"
            )


def _notes(recipe: Recipe, seen: _Seen) -> Iterator[str]:
    if seen.drew_in_evaluation:
        yield (
            "the model draws random numbers in evaluation: there each example has a key of its own,"
            " made of --seed and its id; if that is dropout, it has no training switch"
        )
    quiet = [name for name, off in seen.quiet.items() if off]
    if quiet and all(seen.quiet.values()):
        more = f" and {len(quiet) - 1} more" if len(quiet) > 1 else ""
        yield (
            f"{quiet[0]}{more}: does in training what it does in evaluation; nothing tells the"
            " model that it is trained (a switch that is called train, deterministic, ...)"
        )
    if not auxiliary_losses.takes_sown(recipe.task):
        for name in auxiliary_losses.ignored(seen.sown, recipe.aux_losses):
            yield (
                f"the model sows {name!r}, which is not added to the loss; to add it,"
                f" --aux_losses='{name}=1'"
            )


def _rows(batch: Shapes) -> int:
    return next(iter(batch.values())).shape[0]


def _shown(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{jnp.dtype(value.dtype).name if _plain(value) else value.dtype}{list(value.shape)}"
    return type(value).__name__


def _plain(value: Any) -> bool:
    return not jnp.issubdtype(value.dtype, jax.dtypes.extended)
