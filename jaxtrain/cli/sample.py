"""`python -m jaxtrain sample WORKDIR|DIR --prompt=TEXT`: what a language model says, as it says it;
`--chat` talks with one that was taught to."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtrain import extras, messages
from jaxtrain.cli.command import Command, options
from jaxtrain.errors import UserError

if TYPE_CHECKING:  # heavy, and help must answer at once
    from jaxtrain.data.text.protocol import Tokenizer
    from jaxtrain.inference.trained import Trained

FLAGS = {
    "prompt": "'Once upon a time'",
    "chat": None,
    "reproducible": None,
    "system": "'Answer briefly.'",
    "most": "200",
    "temperature": "0.8",
    "top_k": "50",
    "top_p": "0.95",
    "min_p": "0.05",
    "seed": "1",
    "stop": "'###'",
    "checkpoint": "best",
    "tokenizer": "bytes",
}
OTHERS = dict.fromkeys(
    ("max_tokens", "max_new_tokens", "max_length", "num_tokens", "length", "tokens", "n"), "most"
) | {"temp": "temperature", "topk": "top_k", "topp": "top_p", "input": "prompt", "text": "prompt"}
"""What other toolkits call these flags."""
WHOLE = {"most": 200, "top_k": 0, "seed": 0}
REAL = {"temperature": 0.8, "top_p": 1.0, "min_p": 0.0}
CHAT_ROOM = 1024
"""Tokens that the cache of a chat has room for at first; it doubles."""


class Speaker(NamedTuple):
    """A model that can be asked."""

    model: Any
    params: Any
    tokenizer: "Tokenizer"
    options: dict[str, Any]
    """How tokens are drawn."""
    stop: str
    """A text that ends what it says, or none."""
    room: int = 0
    """Tokens that it sees at once; 0 for any number."""


def run(arguments: Sequence[str]) -> int:
    """Says what follows the prompt, or talks until the input ends."""
    place, given = options(
        "sample", arguments, FLAGS, files=(".gguf",), empty=("prompt",), others=OTHERS
    )
    if "chat" in given and "prompt" in given:
        raise UserError("sample --chat: reads what you say line by line; drop --prompt")
    if "system" in given and "chat" not in given:
        raise UserError("sample --system: belongs to --chat, which is not given")
    if "prompt" not in given and "chat" not in given and sys.stdin.isatty():
        raise UserError("sample: needs --prompt=TEXT, a text on its input, or --chat")
    drawing = _drawing(given)
    model, params, tokenizer, room = opened("sample", place, given)
    from jaxtrain.inference import prompts

    drawing["reproducible"] = "reproducible" in given
    drawing["stop"] = prompts.ends(model, tokenizer)
    speaker = Speaker(model, params, tokenizer, drawing, given.get("stop", ""), room)
    if "chat" in given:
        return _chat(speaker, str(place), given.get("system", ""))
    prompt = given["prompt"] if "prompt" in given else sys.stdin.read()
    ids, notes = prompts.beginning(tokenizer, prompt), list[str]()
    _check(speaker, ids)  # before anything of it is shown
    tell("compiling, once for a length of prompts")
    print(prompt, end="", flush=True)
    try:
        for piece in said(speaker, ids, notes):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print()
        return 130
    print(flush=True)
    for note in notes:
        messages.warn(note)
    return 0


def said(
    speaker: Speaker, ids: Sequence[int], notes: list[str] | None = None, **further: Any
) -> Iterator[str]:
    """What the model says after these ids, piece by piece, whole characters only; `notes` gets a
    line if the text becomes longer than the model can see."""
    from jaxtrain.data.text.protocol import TextStream
    from jaxtrain.inference import prompts, sampling

    prompts.check_fits(ids, speaker.room)
    shown = TextStream(speaker.tokenizer)
    waiting, stop = "", speaker.stop
    chosen = _options(speaker, **further)
    tokens = sampling.stream(speaker.model, speaker.params, [ids], **chosen)
    for count, token_B in enumerate(tokens):
        if notes is not None and speaker.room and len(ids) + count == speaker.room + 1:
            notes.append(
                messages.Note(
                    f"the text is longer than the {speaker.room} positions that the model learned;"
                    " it went on from the last half of its text"
                )
            )
        waiting += shown.push(int(token_B[0]))
        if stop and stop in waiting:
            yield waiting[: waiting.index(stop)]
            return
        held = _held_back(waiting, stop)
        yield waiting[: len(waiting) - held]
        waiting = waiting[len(waiting) - held :]
    yield (waiting + shown.flush()).split(stop or None, 1)[0] if stop else waiting + shown.flush()


def _options(speaker: Speaker, **further: Any) -> Any:
    """How a speaker's tokens are drawn."""
    return speaker.options | {"slide": True, "capacity": speaker.room} | further


def _check(speaker: Speaker, ids: Sequence[int]) -> None:
    """`UserError` for a prompt that the model cannot go on from."""
    from jaxtrain.inference import prompts, sampling

    prompts.check_fits(ids, speaker.room)
    sampling.check(speaker.model, [ids], **_options(speaker))


def tell(what: str) -> None:
    """What takes a while, on a terminal, where someone waits."""
    if sys.stderr.isatty():
        print(f"jaxtrain: {what}", file=sys.stderr, flush=True)


def _held_back(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of `stop`.

    >>> _held_back("one #", "###"), _held_back("one", "###")
    (1, 0)
    """
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)


def _chat(speaker: Speaker, place: str, system: str) -> int:
    """Reads a line, answers it, and so on, until the input ends; Ctrl-C ends an answer."""
    from jaxtrain.data.text import chat_template

    tokenizer = speaker.tokenizer
    if tokenizer.chat_template is None:
        raise UserError(
            f"sample {messages.printable(place)} --chat: its tokenizer has no chat template, so it"
            " was not taught to chat; give it --prompt"
        )
    told: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    if sys.stdin.isatty():
        print("jaxtrain: a line each; Ctrl-C ends an answer, Ctrl-D the chat", file=sys.stderr)
    while (line := _line()) is not None:
        if not line.strip():
            continue
        told.append({"role": "user", "content": line})
        text = chat_template.render(
            tokenizer.chat_template, told, add_generation_prompt=True, special=tokenizer.special
        )
        ids = tokenizer.encode(text, special=True).tolist()
        notes: list[str] = []
        told.append({"role": "assistant", "content": _answer(speaker, ids, notes)})
        for note in notes:
            messages.warn(note)
    return 0


def _answer(speaker: Speaker, ids: Sequence[int], notes: list[str]) -> str:
    """Shows an answer as it comes, and returns it."""
    room, pieces = CHAT_ROOM, list[str]()
    while room < len(ids) + speaker.options["most"]:
        room *= 2
    if speaker.room:
        room = min(room, speaker.room)
    try:
        for piece in said(speaker, ids, notes, capacity=room):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print("\n", flush=True)  # an empty line stands between an answer and the next question
    return "".join(pieces)


def _line() -> str | None:
    """What the user says next; None at the end, which Ctrl-D and Ctrl-C are, too. What comes by a
    pipe is shown as if it were typed, so that a file has the same conversation as a terminal."""
    typed = sys.stdin.isatty()
    shown = typed and sys.stdout.isatty()  # a terminal shows by itself what is typed
    try:
        if typed and not shown:
            print("> ", end="", file=sys.stderr, flush=True)
        line = input("> " if shown else "")
    except (EOFError, KeyboardInterrupt):
        if typed:
            print(file=sys.stdout if shown else sys.stderr)
        return None
    if not shown and line.strip():
        print(f"> {line}", flush=True)
    return line


def _drawing(given: Mapping[str, str]) -> dict[str, Any]:
    """How tokens are drawn; `UserError` for a value that is no number, or none that it may be."""
    found: dict[str, Any] = WHOLE | REAL
    for kind, names, what in ((int, WHOLE, "a whole number"), (float, REAL, "a number")):
        for name in names:
            if name in given:
                try:
                    found[name] = kind(given[name])
                except ValueError:
                    raise UserError(
                        f"sample --{name}={messages.printable(given[name])}: must be {what}, e.g."
                        f" --{name}={FLAGS[name]}"
                    ) from None
    if not 0 <= found["seed"] < 2**32:
        raise UserError(f"sample --seed={found['seed']}: must be from 0 to {2**32 - 1}")
    if found["most"] < 1:
        raise UserError(f"sample --most={found['most']}: must be at least 1")
    from jaxtrain.inference.drawing import Drawing

    try:
        Drawing(**{name: found[name] for name in ("temperature", "top_k", "top_p", "min_p")})
    except UserError as error:
        raise UserError(f"sample --{error}") from None
    return found


def opened(
    command: str, place: Path, given: Mapping[str, str]
) -> "tuple[Any, Any, Tokenizer, int]":
    """The model that a command asks, its parameters, its tokenizer and how many tokens it sees (0
    for any number): of a run of ours, or of a Hugging Face folder or a GGUF file; `given` may hold
    `tokenizer` and `checkpoint`."""
    from jaxtrain import host_memory
    from jaxtrain.data.text import tokenizers

    host_memory.keep_freed()
    shown = messages.printable(str(place))
    named = tokenizers.open_tokenizer(given["tokenizer"]) if "tokenizer" in given else None
    if (place / "run.json").is_file():
        return _of_run(command, place, given.get("checkpoint", "last"), named)
    if place.is_dir() and not (place / "config.json").is_file():
        raise UserError(
            f"{command} {shown}: holds neither a run.json nor a config.json; give the folder of a"
            " run, of a Hugging Face model, or a .gguf file"
        )
    if "checkpoint" in given:
        raise UserError(f"{command} --checkpoint: belongs to the folder of a run, and this is none")
    tell(f"reading {shown}")
    from jaxtrain.inference import prompts
    from jaxtrain.models.cache import Decoder
    from jaxtrain.weights import loading

    model, params, at = loading.load(place)
    if not isinstance(model, Decoder):
        raise UserError(
            f"{command} {shown}: its model is {type(model).__name__}, which says no texts; give a"
            " decoder, such as Llama; vectors of texts: jaxtrain.inference.embedding.embed"
        )
    if named is None and at is None:
        raise UserError(f"{command} {shown}: has no tokenizer.json; give --tokenizer=DIR|FILE")
    return model, params, named or tokenizers.open_tokenizer(str(at)), prompts.room(model, {})


def _of_run(
    command: str, workdir: Path, checkpoint: str, named: "Tokenizer | None"
) -> "tuple[Any, Any, Tokenizer, int]":
    """What a run of ours trained, in the precision that it computes in."""
    from jaxtrain.precision.policy import POLICIES

    extras.require(command, "orbax.checkpoint")
    from jaxtrain.inference import prompts, trained
    from jaxtrain.models.cache import Decoder

    shown = messages.printable(str(workdir))
    tell(f"reading {shown}")
    found = trained.load(workdir, checkpoint=checkpoint)
    if not isinstance(found.model, Decoder):
        raise UserError(
            f"{command} {shown}: its model is {type(found.model).__name__}, which says no texts;"
            " give a run that trained a Transformer on tokens"
        )
    if named is not None:
        _check_same(command, workdir, named)
    params = POLICIES[found.recipe.precision].cast(found.params)
    room = prompts.room(found.model, found.inputs.fields)
    return found.model, params, named or _tokenizer_of(command, workdir, found), room


def _check_same(command: str, workdir: Path, named: "Tokenizer") -> None:
    """`UserError` for another tokenizer than the one that a run was trained with, if it kept it:
    the same ids would be other texts."""
    from jaxtrain.data.text import tokenizers

    if not (workdir / tokenizers.SAVED).is_file():
        return
    kept = tokenizers.open_tokenizer(workdir)
    if named.fingerprint != kept.fingerprint:
        raise UserError(
            f"{command} {messages.printable(str(workdir))} --tokenizer: {named.name}"
            f" ({named.vocabulary} ids) is not the one that the run was trained with"
            f" ({kept.vocabulary} ids), which lies in its folder; drop --tokenizer"
        )


def _tokenizer_of(command: str, workdir: Path, found: "Trained") -> "Tokenizer":
    """The tokenizer that a run kept in its folder; of older runs, the one that its data names."""
    from jaxtrain.data.text import tokenizers

    if (workdir / tokenizers.SAVED).is_file():
        return tokenizers.open_tokenizer(workdir)
    shown = messages.printable(str(workdir))
    data = found.record["config"]["data"]
    spec = data.get("tokenizer") if isinstance(data, Mapping) else None
    if not isinstance(spec, str) or not spec:
        raise UserError(
            f"{command} {shown}: was not trained on text, so it has no tokenizer; give"
            " --tokenizer=bytes, a tokenizer.json, a .model, a .gguf, or a folder with one"
        )
    if tokenizers.is_learned(spec):
        source = found.source(f"{shown}: run.json", None, needed=True)
        return source.tokens_of(source.path).tokenizer
    return tokenizers.open_tokenizer(spec)


COMMAND = Command(
    "WORKDIR|DIR|FILE.gguf --prompt=TEXT|--chat [--most=200] [--temperature=0.8] [--top_k=50] ...",
    "what a language model says, as it says it",
    run,
    FLAGS,
)
