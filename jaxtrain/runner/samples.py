"""Samples: what a language model says on the way (--sample_every), on the terminal and in
samples.jsonl.

The same prompt and the same seed at every step, so that texts differ by the parameters alone.
"""

import functools
from pathlib import Path
from typing import Any

import jax

from jaxtrain import config, tree
from jaxtrain.config import values
from jaxtrain.data.table import Table
from jaxtrain.data.text.protocol import Tokenizer
from jaxtrain.errors import UserError
from jaxtrain.inference import prompts, sampling
from jaxtrain.models.cache import Decoder
from jaxtrain.precision.policy import POLICIES
from jaxtrain.processes import group, heartbeat
from jaxtrain.report.metrics_file import AppendedLines
from jaxtrain.report.terminal.progress import Progress
from jaxtrain.runner.kept_tokenizer import tokenizer_of
from jaxtrain.tasks import MaskedLanguage
from jaxtrain.train import train_step
from jaxtrain.train.lowering import Programs
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.state import TrainState

FILE = "samples.jsonl"
SEED = 0


def check(run: config.Run, train: Table, recipe: Recipe) -> None:
    """`UserError` if --sample_every is on and the model says no texts, or cannot go on from the
    prompt."""
    if not run.sample_every.value:
        return
    flag = f"--sample_every={run.sample_every}"
    off = "--sample_every=0 does without"
    model: Any = recipe.model
    if not isinstance(model, Decoder):
        raise UserError(
            f"{flag}: the model {type(model).__name__} says no texts, a Transformer does; {off}"
        )
    if isinstance(run.task, MaskedLanguage):
        raise UserError(
            f"{flag}: the task {type(run.task).__name__} teaches no next token, so nothing can be"
            f" drawn; {off}"
        )
    tokenizer = tokenizer_of(train)
    if tokenizer is None:
        raise UserError(
            f"{flag}: the data has no tokenizer, so tokens are no text; train on --data=text,"
            f" or {off}"
        )
    prompt = f"--sample_prompt={values.text(run.sample_prompt)}"
    try:
        ids = prompts.beginning(tokenizer, run.sample_prompt)
        prompts.check_fits(ids, prompts.room(model, train.fields))
        sampling.check(model, [ids], **_options(run, train, model, tokenizer))
    except UserError as error:
        raise UserError(f"{prompt}: {error}") from None


def _options(run: config.Run, train: Table, model: Any, tokenizer: Tokenizer) -> sampling.Options:
    return {
        "most": run.sample_tokens,
        "temperature": prompts.TEMPERATURE,
        "seed": SEED,
        "stop": prompts.ends(model, tokenizer),
        "capacity": prompts.room(model, train.fields),
        "slide": True,
    }


class Samples:
    """Draws, shows and keeps texts; the first process alone writes.

    A file of an earlier start is cut back as metrics.jsonl is, even if nothing is drawn any more.
    """

    def __init__(
        self, run: config.Run, folder: Path, train: Table, programs: Programs, progress: Progress
    ) -> None:
        self._run, self._train, self._progress = run, train, progress
        self._programs, self._compiled = programs, False
        path = folder / FILE
        wanted = group.is_main() and (bool(run.sample_every.value) or path.exists())
        self._lines = AppendedLines(path) if wanted else None

    def resume(self, offset: int) -> None:
        """Drops what was drawn after the step that the run goes on from, whose commit stores
        `offset`."""
        if self._lines is not None:
            self._lines.truncate(offset)

    def __call__(self, state: TrainState, step: int) -> None:
        """Draws a text, in every process together."""
        self._progress.phase("sampling")
        heartbeat.beat("evaluating" if self._compiled else "compiling", step)
        tokenizer, model = tokenizer_of(self._train), self._programs.recipe.model
        assert tokenizer is not None, "checked before the first step"
        prompt = self._run.sample_prompt
        ids = prompts.beginning(tokenizer, prompt)
        options = _options(self._run, self._train, model, tokenizer)
        try:
            # The loop's guard is for the loop: prompts come from the host.
            with jax.transfer_guard("allow"):
                [ids_N] = sampling.generate(model, self._params(state), [ids], **options)
        except UserError as error:
            raise UserError(f"step {step}: --sample_every: {error}") from error
        self._compiled = True
        text = prompts.text_of(tokenizer, ids_N.tolist())
        if self._lines is not None:
            self._lines.append(step, {"step": step, "prompt": prompt, "text": text})
        self._progress.sample(step, prompt, text)
        self._progress.phase("")

    def sync(self) -> int:
        """Makes all lines durable; the offset to store in the commit of this step."""
        return 0 if self._lines is None else self._lines.sync()

    def close(self) -> None:
        """Makes all durable and closes the file."""
        if self._lines is not None:
            self._lines.close()

    @functools.cached_property
    def _params(self) -> Any:
        """The parameters that evaluation uses, in the precision that the model computes in, where
        they lie."""
        recipe = self._programs.recipe
        cast = POLICIES[recipe.precision].cast

        def params(state: TrainState) -> tree.PyTree:
            return cast(train_step.evaluated_params(recipe, state))

        return jax.jit(params, out_shardings=self._programs.places.state.params)
