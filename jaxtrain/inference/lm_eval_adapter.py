"""A language model as `lm_eval` asks one: how likely a text is after another, how likely a whole
text is, and what follows a text.

`lm_eval` is EleutherAI's language model evaluation harness (Gao et al.), whose tasks define how
models are compared. Its class stands in `adapter`, the only thing here that needs it; the answers
come from `LanguageModel`. They follow the rules of its own class for `transformers` (HFLM): texts
are encoded with the tokenizer's BOS and with special tokens read, spaces at the end of a context
belong to what follows, and what is too long for the model is cut from the left.

Dims: B requests of a batch, T tokens of a request.
"""

import collections
import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain import extras, messages, tree, vocabulary_loss
from jaxtrain.data.text import chat_template
from jaxtrain.data.text.protocol import TextStream, Tokenizer
from jaxtrain.errors import UserError
from jaxtrain.inference import sampling
from jaxtrain.inference.drawing import Drawing
from jaxtrain.models.cache import Decoder
from jaxtrain.parallel import mesh as meshes

CHUNK = 64
"""Of so many tokens of each request the logits exist at once."""
MOST = 256
"""Tokens that are drawn for a task that does not say how many, as in lm_eval."""
MOST_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call that number, the first one given counts, as in lm_eval."""
END = "\U0010fff2"
"""Marks the end of a message on its way through a template: a character of private use."""

Done = Callable[[int, Any], object]
"""Called with the index of a request and its answer, as soon as it is there."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """How a task wants texts to go on."""

    until: tuple[str, ...]
    """Texts that end one; they are not part of it."""
    most: int
    drawing: Drawing

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Generation":
        """What a task's `generation_kwargs` say; `UserError` for what sampling here has not.

        >>> Generation.of({"until": ["\\n"], "max_gen_toks": 8}).drawing.greedy
        True

        As in lm_eval `do_sample: false` takes the likeliest tokens whatever the temperature, and
        so do tasks that say nothing.
        """
        rest = dict(given)
        until = rest.pop("until", None) or []
        counts = [rest.pop(name) for name in MOST_NAMES if rest.get(name) is not None]
        samples = rest.pop("do_sample", None)
        temperature = float(rest.pop("temperature", None) or 0.0)
        if samples and not temperature:
            raise UserError(
                "generation_kwargs: do_sample is true, but temperature is 0 or not given; give a"
                " temperature above 0, or do_sample: false"
            )
        names = ("top_k", "top_p", "min_p")
        others = {name: rest.pop(name) for name in names if name in rest}
        rest = {name: value for name, value in rest.items() if (name, value) != ("num_beams", 1)}
        if rest:
            known = ("until", "do_sample", "temperature", *names, MOST_NAMES[0])
            raise UserError(
                f"generation_kwargs: {next(iter(rest))} is not what sampling here can do; valid:"
                f" {', '.join(known)}"
            )
        drawing = Drawing(temperature=0.0 if samples is False else temperature, **others)
        texts = (until,) if isinstance(until, str) else until
        return cls(tuple(text for text in texts if text), int([*counts, MOST][0]), drawing)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Token ids of a text and of what stands before it."""

    index: int
    """Of the request that it belongs to."""
    context: list[int]
    continuation: list[int]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model, and how it is asked.

    `max_length` are the tokens it sees at most (0: its own `max_length`), `prefix` the token that
    stands where nothing does (None: the tokenizer's BOS, or EOS if it has none), `seed` that of
    draws, which depend on it and on the request's index. Parameters may lie on a mesh.
    """

    model: Any
    params: tree.PyTree
    tokenizer: Tokenizer
    batch_size: int = 8
    max_length: int = 0
    prefix: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.model, Decoder):
            raise UserError(
                f"{type(self.model).__name__}: says no texts, which lm_eval asks for; give a"
                " Transformer"
            )
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: must be at least 1")
        most = self.model.max_length if self.model.positions == "learned" else self.max_length
        if not 0 <= self.max_length <= most:
            raise UserError(
                f"max_length={self.max_length}: must be from 0 (all) to the model's {most}"
            )

    @property
    def length(self) -> int:
        """Tokens that the model sees at most."""
        return self.max_length or self.model.max_length

    @functools.cached_property
    def first(self) -> int:
        """The token that stands where nothing does."""
        tokenizer = self.tokenizer
        if self.prefix is not None:
            return self.prefix
        named = tokenizer.special.get("bos_token")
        token = None if named is None else tokenizer.token_id(named)
        if token is not None:
            return token
        if found := (*tokenizer.bos[:1], *tokenizer.eos[:1]):
            return found[0]
        raise UserError(
            f"tokenizer {tokenizer.name!r}: has neither BOS nor EOS to stand before a text; name a"
            " token for it, as prefix=0"
        )

    def encoded(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of a text, after the tokenizer's own BOS unless the text begins with it."""
        ids = self.tokenizer.encode(text, special=True).tolist()
        if wrong := [token for token in ids if token >= self.model.vocabulary]:
            raise UserError(
                f"tokenizer {self.tokenizer.name!r}: token {wrong[0]} is none of the model's"
                f" {self.model.vocabulary}; give the model's own tokenizer"
            )
        before = list(self.tokenizer.bos) if bos else []
        return ids if ids[: len(before)] == before else before + ids

    def loglikelihood(
        self, requests: Sequence[tuple[str, str]], done: Done | None = None
    ) -> list[tuple[float, bool]]:
        """Of (context, continuation) each: the log-probability of the continuation in nats, and
        whether it is what greedy sampling says."""
        pairs = [self._pair(index, *request) for index, request in enumerate(requests)]
        return self._scores(pairs, done)

    def loglikelihood_rolling(self, texts: Sequence[str], done: Done | None = None) -> list[float]:
        """The log-probability of each whole text in nats.

        What is longer than the model goes through it window by window. Each token counts once; the
        last window reaches back as far as the model sees.
        """
        pairs = [
            pair
            for index, text in enumerate(texts)
            for pair in _windows(index, self.encoded(text), self.first, self.length)
        ]
        sums, left = [0.0] * len(texts), collections.Counter(pair.index for pair in pairs)

        def count(place: int, score: tuple[float, bool]) -> None:
            index = pairs[place].index
            sums[index] += score[0]
            left[index] -= 1
            if not left[index] and done is not None:
                done(index, sums[index])

        self._scores(pairs, count)
        return sums

    def generate_until(
        self, requests: Sequence[tuple[str, Mapping[str, Any]]], done: Done | None = None
    ) -> list[str]:
        """What follows each context, told by its task's `generation_kwargs`."""
        found = [""] * len(requests)
        groups: dict[Generation, list[int]] = {}
        for index, (_, given) in enumerate(requests):
            groups.setdefault(Generation.of(given), []).append(index)
        for generation, members in groups.items():
            room = self.length - generation.most
            if room < 1 or generation.most < 1:
                raise UserError(
                    f"generation_kwargs: max_gen_toks={generation.most} must be at least 1 and less"
                    f" than the {self.length} tokens that the model sees; set it in the task"
                )
            prompts = {index: self._prompt(requests[index][0]) for index in members}
            _say_if_cut([len(prompt) > room for prompt in prompts.values()], room)
            members = sorted(members, key=lambda index: -len(prompts[index]))
            for start in range(0, len(members), self.batch_size):
                rows = members[start : start + self.batch_size]
                texts = self._generated(rows, [prompts[row][-room:] for row in rows], generation)
                for index, text in zip(rows, texts, strict=True):
                    found[index] = text
                    if done is not None:
                        done(index, text)
        return found

    def _prompt(self, context: str) -> list[int]:
        return self.encoded(context) or [self.first]

    def _pair(self, index: int, context: str, continuation: str) -> _Pair:
        """A request as ids; where their border is inside a token, it belongs to the context."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if kept:
            before = self.encoded(kept)
            after = self.encoded(kept + continuation)[len(before) :]
        else:
            after = self.encoded(continuation, bos=False)
            before = after[:1] if after[:1] == [self.first] else [self.first]
            after = after[1:] if after[:1] == [self.first] else after
        if not 0 < len(after) <= self.length:
            raise UserError(
                f"request {index}: the continuation {messages.shown(continuation)} is"
                f" {len(after)} tokens; must be from 1 to the {self.length} that the model sees"
            )
        return _Pair(index, before, after)

    def _scores(self, pairs: Sequence[_Pair], done: Done | None) -> list[tuple[float, bool]]:
        """The sum of log-probabilities of each continuation, and whether all are the likeliest."""
        texts = [[*pair.context, *pair.continuation][-self.length - 1 :] for pair in pairs]
        wholes = [len(pair.context) + len(pair.continuation) for pair in pairs]
        _say_if_cut([whole > self.length + 1 for whole in wholes], self.length)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        params = nn.meta.unbox(self.params)
        model = self.model.clone(chunk=CHUNK)
        for length, rows in _batches(
            [len(text) - 1 for text in texts], self.length, self.batch_size
        ):
            tokens_BT = np.zeros((self.batch_size, length), np.int32)
            labels_BT = np.zeros_like(tokens_BT)
            for row, index in enumerate(rows):
                text = texts[index]
                tokens_BT[row, : len(text) - 1], labels_BT[row, : len(text) - 1] = (
                    text[:-1],
                    text[1:],
                )
            placed = _placed(params, tokens_BT, labels_BT)
            loss_BT, right_BT = jax.device_get(_scored(model, params, *placed))
            for row, index in enumerate(rows):
                end = len(texts[index]) - 1
                asked = slice(end - len(pairs[index].continuation), end)
                total = -float(loss_BT[row, asked].astype(np.float64).sum())
                if np.isnan(total):
                    raise UserError(
                        f"request {pairs[index].index}: the model's logits are nan; its parameters"
                        " are damaged, or their dtype is too narrow"
                    )
                found[index] = total, bool(right_BT[row, asked].all())
                if done is not None:
                    done(index, found[index])
        return found

    def _generated(
        self, rows: list[int], prompts: list[list[int]], generation: Generation
    ) -> list[str]:
        """What follows each prompt of a batch."""
        missing = self.batch_size - len(
            rows
        )  # the last ones again, so that the program is the same
        needed = len(prompts[0]) + generation.most
        options = dataclasses.asdict(generation.drawing)
        streamed = sampling.stream(
            self.model,
            self.params,
            [*prompts, *prompts[-1:] * missing],
            rows=[*rows, *rows[-1:] * missing],
            most=generation.most,
            stop=self._stop_tokens(generation.until),
            seed=self.seed,
            capacity=min(sampling.bucket(needed), self.length),
            **options,
        )
        texts = [_Text(TextStream(self.tokenizer)) for _ in rows]
        for token_B in streamed:
            for text, token in zip(texts, token_B.tolist(), strict=False):
                # rows of a table that is larger than the tokenizer have no text
                text.take(token, generation.until, token < self.tokenizer.vocabulary)
            if all(text.ended for text in texts):
                break
        found = [self.tokenizer.decode(text.ids) for text in texts]
        for stop in generation.until:
            found = [text.split(stop, 1)[0] for text in found]
        return found

    def _stop_tokens(self, until: Sequence[str]) -> list[int]:
        """EOS, and the texts that are special tokens, which no decoded text shows."""
        tokens = list(self.tokenizer.eos)
        for text in until:
            token = self.tokenizer.token_id(text)
            if token is not None and not self.tokenizer.decode([token]):
                tokens.append(token)
        return [token for token in tokens if token < self.model.vocabulary]


@dataclasses.dataclass
class _Text:
    """A text while it comes."""

    stream: TextStream
    ids: list[int] = dataclasses.field(default_factory=list)
    shown: str = ""
    ended: bool = False

    def take(self, token: int, until: Sequence[str], known: bool) -> None:
        """One more token, or its end."""
        self.ended |= token == sampling.ENDED
        if known and not self.ended:
            self.ids.append(token)
            self.shown += self.stream.push(token)
            self.ended = any(stop in self.shown for stop in until)


def adapter(model: Any, params: tree.PyTree, tokenizer: Tokenizer, **settings: Any) -> Any:
    """A model as an `lm_eval.api.model.LM`; the settings are those of `LanguageModel`.

        lm = adapter(model, params, tokenizer)
        results = lm_eval.simple_evaluate(lm, tasks=["my_task"])

    `UserError` if lm_eval is not installed.
    """
    extras.require("an lm_eval adapter", "lm_eval")
    return _adapter_class()(LanguageModel(model, params, tokenizer, **settings))


@functools.cache
def _adapter_class() -> Any:
    """The class, made where lm_eval is first needed."""
    base: Any = importlib.import_module("lm_eval.api.model").LM
    tqdm: Any = importlib.import_module("tqdm").tqdm

    class JaxtrainLM(base):
        """What lm_eval calls; a `LanguageModel` answers."""

        def __init__(self, asked: LanguageModel) -> None:
            super().__init__()
            self.asked = asked
            self.batch_size = asked.batch_size

        def _asked(self, name: str, requests: Sequence[Any], given: Sequence[Any]) -> list[Any]:
            with tqdm(total=len(requests), desc=f"jaxtrain {name}", disable=None) as bar:

                def done(index: int, answer: Any) -> None:
                    self.cache_hook.add_partial(name, requests[index].args, answer)
                    bar.update()

                return getattr(self.asked, name)(given, done)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return self._asked("loglikelihood", requests, [each.args for each in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            texts = [each.args[0] for each in requests]
            return self._asked("loglikelihood_rolling", requests, texts)

        def generate_until(self, requests: list[Any]) -> list[str]:
            return self._asked("generate_until", requests, [each.args for each in requests])

        @property
        def tokenizer_name(self) -> str:
            return f"{self.asked.tokenizer.name} {self.asked.tokenizer.fingerprint}"

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return self.asked.tokenizer.chat_template if chat_template else None

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return rendered(self.asked.tokenizer, chat_history, add_generation_prompt)

    return JaxtrainLM


def rendered(
    tokenizer: Tokenizer, conversation: Sequence[Mapping[str, str]], add_generation_prompt: bool
) -> str:
    """A conversation by the tokenizer's template; without the prompt for an answer it ends inside
    the last message, which is to go on."""
    if tokenizer.chat_template is None:
        raise UserError(f"tokenizer {tokenizer.name!r}: has no chat template; ask without one")
    *told, last = conversation
    if not add_generation_prompt:
        # the template's own words behind it may be those of the message
        last = {**last, "content": f"{last['content'].rstrip()}{END}"}
    text = chat_template.render(
        tokenizer.chat_template,
        [*told, last],
        add_generation_prompt=add_generation_prompt,
        special=tokenizer.special,
    )
    if add_generation_prompt:
        return text
    before, *behind = text.split(END)
    if len(behind) != 1 or not f"{before}{END}".endswith(last["content"].lstrip()):
        raise UserError(
            f"tokenizer {tokenizer.name!r}: its chat template does not write the last message as it"
            " is, so nothing can go on from it"
        )
    return before


def _windows(index: int, ids: list[int], first: int, length: int) -> list[_Pair]:
    """A text as pieces that the model can see, each token once in a continuation.

    >>> [(pair.context, pair.continuation) for pair in _windows(0, [1, 2, 3, 4, 5], 9, 3)]
    [([9], [1, 2, 3]), ([2, 3], [4, 5])]
    """
    found = [_Pair(index, [first], ids[:length])] if ids else []
    for start in range(length, len(ids), length):
        end = min(start + length, len(ids))
        found.append(_Pair(index, ids[end - length - 1 : start], ids[start:end]))
    return found


def _batches(lengths: Sequence[int], most: int, size: int) -> list[tuple[int, list[int]]]:
    """A padded length and the requests of each batch, the longest first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups: dict[int, list[int]] = {}
    for index in order:
        groups.setdefault(min(sampling.bucket(lengths[index]), most), []).append(index)
    return [
        (length, members[start : start + size])
        for length, members in groups.items()
        for start in range(0, len(members), size)
    ]


def _say_if_cut(cut: Sequence[bool], length: int) -> None:
    """Says how many requests have lost their beginning."""
    if any(cut):
        messages.warn(
            f"lm_eval: {sum(cut)} of {len(cut)} requests are longer than the {length} tokens that"
            " the model has room for; their beginnings are cut off, as lm_eval does for others"
        )


def _placed(params: tree.PyTree, *arrays_BT: np.ndarray) -> tuple[Any, ...]:
    """Arrays split by row over the mesh that the parameters lie on."""
    mesh = sampling.mesh_of(params)
    if mesh is None or len(arrays_BT[0]) % meshes.batch_shards(mesh):
        return arrays_BT
    return tuple(jax.device_put(arrays_BT, NamedSharding(mesh, PartitionSpec(meshes.BATCH_AXES))))


@functools.partial(jax.jit, static_argnums=0)
def _scored(
    model: Any, params: tree.PyTree, tokens_BT: jax.Array, labels_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Nats of each label, and 1 where it is the likeliest.

    Padding stands behind what is asked, where a causal model does not look.
    """
    found = vocabulary_loss.scores(model.apply({"params": params}, tokens_BT), labels_BT)
    return found.loss_BT, found.right_BT
