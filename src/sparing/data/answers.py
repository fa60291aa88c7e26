"""Conversations as token sequences in which the answers are marked: the very ids that the server would read and the model would write.

An answer follows the prompt that the server makes of the messages before it, token for token. No marks in the template are needed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sparing.base.config import UserError
from sparing.base.run import read_tensors
from sparing.data.chat import REASONING, ChatTemplate, Known, token_ids
from sparing.data.chats import Chat, answers
from sparing.data.tokenizer import Tokenizer
from sparing.data.traced import Traced, concat, own

TEMPLATE_FAILS = "the chat template refuses it"


class Sequenced(NamedTuple):
    """Part of a conversation, or all of it."""

    ids: list[int]
    trained: list[bool]
    """Which of them the model is to learn to write: every answer and the token that ends it."""


def sequences(chat: Chat, template: ChatTemplate, tokenizer: Tokenizer, first: int = 0) -> list[Sequenced]:
    """One sequence for the conversation; more where the template shows an answer otherwise once it is history (without its reasoning).

    Then each answer is learnt behind the prompt that the server would have made for it. first: answers among the messages before this one
    are not learnt. Raises UserError where the template refuses.
    """
    made: list[Sequenced] = []
    known: Known = {}
    for at, message in enumerate(chat.messages):
        if at < first or not answers(message):
            continue
        before = chat.messages[:at]
        asked = template.text(tokenizer, before, chat.tools)
        prompt = [*template.start(tokenizer), *token_ids(tokenizer, asked, known=known)]
        answer = _answer(template, tokenizer, chat, at, asked, prompt[-1] if prompt else None)
        last = made[-1] if made else None
        if last is None or prompt[: len(last.ids)] != last.ids:
            made.append(last := Sequenced([], []))
        new = prompt[len(last.ids) :]
        last.ids.extend([*new, *answer])
        last.trained.extend([False] * len(new) + [True] * len(answer))
    return made


def _answer(template: ChatTemplate, tokenizer: Tokenizer, chat: Chat, at: int, asked: Traced, before: int | None) -> list[int]:
    """Ids of message `at` as the model would write it behind `asked`, whose last token is `before`, up to the token that ends it."""
    whole = template.text(tokenizer, chat.messages[: at + 1], chat.tools, ask=False)
    shared = _shared(asked, whole)
    extra, said = asked[shared:], whole[shared:]
    if not all(extra.own):  # it shows what was asked otherwise once it is answered (the system's words go with the last question only)
        extra, said = own(""), whole[_end_of_question(asked, whole) :]
    if all(said.own):
        raise UserError("the chat template does not show the answer behind the question")
    if extra.rstrip().endswith("<think>"):  # the prompt begins the reasoning, which the template leaves out of answers
        said = concat((_reasoning(chat.messages[at]), own("\n</think>\n\n"), said))
    ids = token_ids(tokenizer, said, before)
    end = next((place for place, number in enumerate(ids) if number in tokenizer.eos_ids), None)
    if end is not None:
        return ids[: end + 1]
    blank = max(len(said.rstrip()), said.own.rfind(0) + 1)  # the template's blanks behind the answer are no part of it
    return [*token_ids(tokenizer, said[:blank], before), tokenizer.eos_ids[0]]


def _shared(left: Traced, right: Traced) -> int:
    """How many leading characters are the same, and of the same origin."""
    low, high = 0, min(len(left), len(right))
    a, b = left.plain, right.plain
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle] and left.own[:middle] == right.own[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _end_of_question(asked: Traced, whole: Traced) -> int:
    """Where in `whole` the longest ending of `asked` ends that reaches into a message; its own end where none is in it. The time is linear
    in both lengths."""
    behind = len(asked) - 1 - asked.own.rfind(0)  # characters of the template's behind the last one of a message
    text = asked.plain[::-1] + whole.plain[::-1]
    marks = asked.own[::-1] + whole.own[::-1]
    best, place = behind, len(whole)
    for end, length in enumerate(reversed(_beginnings(text, marks)[len(asked) :]), 1):
        length = min(length, len(asked))
        if length > behind and length >= best:
            best, place = length, end
    return place


def _beginnings(text: str, marks: bytes) -> list[int]:
    """For each place, how many characters from there are those (and have the marks) that the text begins with.

    The "Z algorithm" (Gusfield, Algorithms on Strings, Trees, and Sequences, 1997, section 1.4): what is inside of a stretch that is known
    to repeat the beginning is not compared again."""
    found = [len(text)] * len(text)
    left = right = 0
    for at in range(1, len(text)):
        length = min(found[at - left], right - at) if at < right else 0
        if at + length >= right:
            while at + length < len(text) and text[length] == text[at + length] and marks[length] == marks[at + length]:
                length += 1
            left, right = at, at + length
        found[at] = length
    return found


def _reasoning(message: dict) -> str:
    found = next((message[name] for name in REASONING if isinstance(message.get(name), str)), None)
    if found is None:
        found = message["content"].partition("</think>")[0] if "</think>" in message["content"] else ""
        found = re.sub(r"^\s*<think>", "", found)
    return found.strip("\n")


@dataclass(frozen=True)
class Pieces:
    """Sequences with their answers marked, laid end to end."""

    tokens: np.ndarray
    """(N,) int32."""
    trained: np.ndarray
    """(N,) bool."""
    starts: np.ndarray
    """(P + 1,) int64: where each piece begins, and the end of the last."""

    @classmethod
    def of(cls, parts: Sequence[Sequenced]) -> Pieces:
        lengths = np.array([len(part.ids) for part in parts], np.int64)
        tokens = np.array([number for part in parts for number in part.ids], np.int32)
        trained = np.array([mark for part in parts for mark in part.trained], bool)
        return cls(tokens, trained, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, trained) of one piece."""
        part = slice(self.starts[number], self.starts[number + 1])
        return self.tokens[part], self.trained[part]

    @property
    def trained_tokens(self) -> int:
        return int(self.trained.sum())

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(value) for name, value in vars(self).items()}

    @classmethod
    def load(cls, path: Path) -> Pieces:
        """From a safetensors file of `tensors`. Raises DamagedError for a file that is none."""
        return cls(**{name: tensor.numpy() for name, tensor in read_tensors(path)})


@dataclass
class Cutting:
    """Makes pieces of conversations, and counts what becomes of them."""

    template: ChatTemplate
    tokenizer: Tokenizer
    length: int
    """Most inputs of a piece: what is longer loses its end."""
    counts: Counter[str] = field(default_factory=Counter)
    """chats, pieces, tokens, trained (tokens), lost (trained tokens that were cut off); truncated and empty (pieces); refused (chats), and
    unused (chats): those of which no piece is left."""
    refusal: str = ""
    """What the template said of the first conversation that it refused."""

    def __call__(self, chat: Chat) -> list[Sequenced]:
        """Its pieces; none where the template refuses it, or nothing to learn is left."""
        try:
            found = sequences(chat, self.template, self.tokenizer)
        except UserError as error:
            self.counts["refused"] += 1
            self.refusal = self.refusal or f"{error}, {chat.source}:{chat.line}"
            return []
        kept = []
        for piece in found:
            cut = Sequenced(piece.ids[: self.length + 1], [False, *piece.trained[1 : self.length + 1]])  # nothing predicts the first token
            self.counts["truncated"] += len(cut.ids) < len(piece.ids)
            self.counts["lost"] += sum(piece.trained) - sum(cut.trained)
            if any(cut.trained[1:]):
                kept.append(cut)
            else:
                self.counts["empty"] += 1
        self.counts["chats" if kept else "unused"] += 1
        self.counts["pieces"] += len(kept)
        self.counts["tokens"] += sum(len(piece.ids) for piece in kept)
        self.counts["trained"] += sum(sum(piece.trained) for piece in kept)
        return kept

    def pieces(self, chats: Iterable[Chat]) -> Pieces:
        return Pieces.of([piece for chat in chats for piece in self(chat)])
