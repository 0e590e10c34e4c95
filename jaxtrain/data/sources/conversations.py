"""Conversations for fine-tuning: JSON lines of messages as rows of tokens, of which only what the
assistant says is learned.

N: tokens of a conversation, or conversations; D, P: conversations
"""

import dataclasses
import datetime
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from jaxtrain import messages
from jaxtrain.data.sources.text import cache_folder, in_flags
from jaxtrain.data.splits import Splits, choose, digest_of_tables
from jaxtrain.data.table import ArrayTable
from jaxtrain.data.text import chat_template
from jaxtrain.data.text import conversations as chats
from jaxtrain.data.text.conversations import Tokenized
from jaxtrain.data.text.formats import Chats, split_codes
from jaxtrain.data.text.packing import best_fit
from jaxtrain.data.text.protocol import Tokenizer
from jaxtrain.data.text.token_cache import Tokens, open_corpus
from jaxtrain.data.text.tokenizers import open_tokenizer
from jaxtrain.errors import UserError
from jaxtrain.fields import AtLeast, Count, Public
from jaxtrain.processes import group


@dataclasses.dataclass(frozen=True)
class Conversations:
    """Conversations in JSON lines: `messages` of role and content, ShareGPT's `conversations` of
    from and value, or `prompt` and `completion`.

    Fields: `tokens` int32 (length + 1,); `segments` int32 (length + 1,), 1, 2, ... by the
    conversations of the row, 0 for padding; `weight` float32 (length + 1,), 1 for what the
    assistant says and 0 for all else.
    """

    path: str = ""
    """A file of JSON lines, a folder or a glob"""
    tokenizer: Annotated[str, Public()] = ""
    """The folder of a model, a .gguf, or a tokenizer.json, with its chat template"""
    template: str = ""
    """A file with another chat template (Jinja); empty for the tokenizer's own"""
    length: Count = 512
    """Tokens to predict in each row"""
    layout: Literal["packed", "padded"] = "packed"
    """packed: several conversations side by side in a row, which do not see one another; padded:
    one a row"""
    learn: Literal["assistant", "all"] = "assistant"
    """What is learned: what the assistant says, or every token"""
    any_share: bool = False
    """Takes a set of which no token, or every token, is learned"""
    too_long: Literal["error", "cut", "skip"] = "error"
    """What becomes of conversations that are longer than a row"""
    bad: Literal["error", "skip"] = "error"
    """What becomes of rows that hold no conversation; skip leaves them out and says how many"""
    show: bool = True
    """Prints one conversation with what is learned of it marked"""
    split_seed: Annotated[int | None, AtLeast(0)] = 0
    """In which random order conversations are counted below, the same for every --seed; none = that
    of the files"""
    train: str = "all[:90%]"
    """Part to train on"""
    validation: str = "all[90%:]"
    """Part to evaluate on while training; empty for none"""
    test: str = ""
    """Part to evaluate on at the end; empty for none"""
    cache: str = ""
    """Folder that keeps the tokens; empty = ~/.cache/jaxtrain/tokens"""

    def open(self) -> Splits:
        """Renders and tokenises what is not in the cache yet; `UserError`, with file and row, for
        what cannot be learned from."""
        if not self.path:
            raise UserError("--data.path='': no file given; give JSON lines, a folder or a glob")
        tokenizer, template = self._tokenizer()
        tokens = self._tokens(tokenizer, template)
        found, notes = self._chosen(tokens)
        order_N = np.arange(len(found))
        if self.split_seed is not None:
            order_N = np.random.Generator(np.random.Philox(self.split_seed)).permutation(len(found))
        parts = choose(
            {"all": ArrayTable({"number": order_N})},
            train=self.train,
            validation=self.validation,
            test=self.test,
            fingerprint="",
            origin=f"--data.path={self.path!r}",
        )
        tables = {
            name: self._table(
                [found[number] for number in table.read(np.arange(len(table)))["number"]], tokenizer
            )
            for name, table in {
                "train": parts.train,
                "validation": parts.validation,
                "test": parts.test,
            }.items()
            if table is not None
        }
        self._show(tokenizer, found[int(order_N[0])])
        rows = tables["train"].arrays["segments"]
        notes += [
            *parts.notes,
            messages.Note(
                f"train: {messages.counted(len(rows), 'row')},"
                f" {100 * float((rows > 0).mean()):.1f}% full"
            ),
        ]
        return Splits(
            tables["train"],
            tables.get("validation"),
            tables.get("test"),
            fingerprint=digest_of_tables(tables),
            notes=tuple(notes),
            modified_ns=tokens.modified_ns,
        )

    def _tokenizer(self) -> tuple[Tokenizer, str]:
        """The tokenizer, and the chat template that is used."""
        if not self.tokenizer:
            raise UserError(
                "--data.tokenizer='': none given; give the folder of a model, a .gguf, or a"
                " tokenizer.json"
            )
        tokenizer = open_tokenizer(self.tokenizer)
        template, flag = self._template(tokenizer)
        try:
            chat_template.check(template)
        except UserError as error:
            raise UserError(f"{flag}: {error}") from error
        return tokenizer, template

    def _template(self, tokenizer: Tokenizer) -> tuple[str, str]:
        """The chat template, and the flag that it comes from."""
        if self.template:
            flag = f"--data.template={self.template}"
            try:
                return Path(self.template).expanduser().read_text(encoding="utf-8"), flag
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", None) or "no UTF-8"
                near = messages.did_you_mean_path(self.template)
                raise UserError(f"{flag}: cannot be read ({why}){near}") from None
        if tokenizer.chat_template is None:
            raise UserError(
                f"--data.tokenizer={self.tokenizer}: has no chat template; give one by"
                " --data.template=FILE.jinja, or the tokenizer of a model that was taught to chat"
            )
        return tokenizer.chat_template, f"--data.tokenizer={self.tokenizer}"

    def _tokens(self, tokenizer: Tokenizer, template: str) -> Tokens:
        """All conversations as ids, from the cache or made now."""
        today = datetime.date.today().isoformat() if "strftime_now" in template else ""
        try:
            return open_corpus(
                [self.path],
                chats.find_conversations(self.path),
                Chats(template, dict(tokenizer.special), today),
                tokenizer,
                cache_dir=cache_folder(self.cache),
                stop_at_bad=self.bad == "error",
            )
        except UserError as error:
            raise in_flags(error) from error

    def _chosen(self, tokens: Tokens) -> tuple[list[Tokenized], list[str]]:
        """The conversations that are learned from, and what is to be said of them."""
        found: list[Tokenized] = []
        long = 0
        for number, (start, stop) in enumerate(itertools.pairwise(tokens.offsets_D1.tolist())):
            one = split_codes(tokens.read(start, stop))
            if stop - start > self.length + 1:
                long += 1
                if self.too_long == "error":
                    raise UserError(
                        f"--data.length={self.length}: {tokens.place(number)} has {stop - start}"
                        f" tokens; make it {stop - start - 1}, or choose --data.too_long=cut or"
                        " skip"
                    )
                if self.too_long == "skip":
                    continue
                one = Tokenized(one.ids_N[: self.length + 1], one.supervised_N[: self.length + 1])
            found.append(one)
        if not found:
            raise UserError(f"--data.path={self.path!r}: holds no conversation that can be used")
        notes = [*tokens.notes]
        if long:
            what = "cut" if self.too_long == "cut" else "left out"
            notes.append(
                f"{messages.counted(long, 'conversation')} longer than {self.length + 1} tokens"
                f" {'is' if long == 1 else 'are'} {what}"
            )
        if self.learn == "all":
            found = [Tokenized(one.ids_N, np.ones(len(one.ids_N), bool)) for one in found]
        return found, [*notes, self._share(found)]

    def _share(self, found: Sequence[Tokenized]) -> str:
        """How much is learned, in words; `UserError` for nothing and, unasked, for everything."""
        learned = sum(int(one.supervised_N[1:].sum()) for one in found)
        predicted = sum(len(one.ids_N) - 1 for one in found)
        asked = self.any_share or (self.learn == "all" and learned)
        if not asked and learned in (0, predicted):
            what = "no token" if learned == 0 else "every token"
            why = (
                "the chat template's {% generation %} markers are around nothing, or all answers"
                " are cut off"
                if learned == 0
                else "the chat template's {% generation %} markers are around everything"
            )
            raise UserError(
                f"--data.path={self.path!r}: {what} of {predicted:,} is learned ({why}); mend the"
                " template (--data.template), or say that it is meant: --data.any_share"
            )
        return messages.Note(
            f"{messages.counted(len(found), 'conversation')}; {learned:,} of {predicted:,} tokens"
            f" ({learned / max(predicted, 1):.1%}) are learned"
        )

    def _table(self, found: Sequence[Tokenized], tokenizer: Tokenizer) -> ArrayTable:
        """Conversations as rows."""
        row_P = np.arange(len(found))
        if self.layout == "packed":
            row_P = best_fit(np.array([len(one.ids_N) for one in found]), self.length + 1)
        shape = int(row_P.max()) + 1, self.length + 1
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        weight, used = np.zeros(shape, np.float32), np.zeros(shape[0], int)
        for one, row in zip(found, row_P, strict=True):
            place = slice(used[row], used[row] + len(one.ids_N))
            tokens[row, place], weight[row, place] = one.ids_N, one.supervised_N
            segments[row, place] = segments[row].max() + 1
            weight[row, used[row]] = 0  # nothing predicts the first token
            used[row] = place.stop
        return ArrayTable(
            {"tokens": tokens, "segments": segments, "weight": weight},
            num_classes=tokenizer.vocabulary,
            origin=f"--data.path={self.path!r}",
            tokenizer=tokenizer,
        )

    def _show(self, tokenizer: Tokenizer, one: Tokenized) -> None:
        if self.show and group.is_main():
            colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
            messages.print_out(
                "a conversation, and what is learned of it {+so+}:\n"
                f"{chats.marked(tokenizer, one, colour=colour).rstrip()}\n"
            )
