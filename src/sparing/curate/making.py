"""What is made with a teacher: pieces of documents in, made texts out, each with the checks that it has passed or the one that it has not.

A maker is a generator: it gives the questions that it has, gets their answers, and in the end returns what it has made. So one piece may
take several rounds (a question, then votes on its answer), while the rounds of many pieces are asked together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sparing.curate.contamination import Contamination, normalise
from sparing.curate.document import Document
from sparing.curate.teachers import Answer, Ask
from sparing.data.document import PART, pieces
from sparing.data.sources import Document as Source

N_GRAM = 13
"""Words in a row that an evaluation text has too: a leak."""
THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
PREAMBLE = re.compile(r"\A(?:sure|certainly|of course|okay|ok|here (?:is|are)|here's)\b[^\n]{0,200}:[ \t]*\n+", re.IGNORECASE)
STEADY = 0.7
"""Temperature of rewritten texts and of votes (Wang et al. 2022, arXiv 2203.11171, section 3.1)."""


class Piece(NamedTuple):
    """A text of a size that a teacher rewrites without leaving things out, and where it is from."""

    text: str
    source: str
    line: int
    part: int = 1
    meta: Mapping[str, str] = {}


@dataclass(frozen=True)
class Made:
    """A text that a teacher wrote, or what became of the attempt."""

    text: str
    """By which near-duplicates are found."""
    value: dict[str, Any] = field(default_factory=dict)
    """What is written: text, messages, or the fields of a task."""
    checks: tuple[str, ...] = ()
    """Those that it has passed."""
    scores: dict[str, Any] = field(default_factory=dict)
    rejected: str = ""
    """The check that it has not passed."""


Steps = Generator[list[Ask], list[Answer], list[Made]]


class Leaks:
    """Finds evaluation texts: N_GRAM words in a row that one of them has too, numbers included. A shorter text leaks where all of it is in
    one."""

    def __init__(self, against: Sequence[str]):
        """Raises UserError for files that are not there, or hold no words."""
        self.against = tuple(against)
        if self.against:
            Contamination(evaluations=self.against, n=1, numbers=True).load()

    def __call__(self, text: str, least: int = N_GRAM) -> bool:
        """least: of fewer words than these nothing is said."""
        if not self.against:
            return False
        words = sum(len(normalise(piece, numbers=True)) for piece in text.split())
        if words < least:
            return False
        rule = Contamination(evaluations=self.against, n=min(N_GRAM, words), numbers=True)
        return rule.scores(Document(text))["shared"] > 0


@dataclass(frozen=True)
class How:
    """Settings of all makers."""

    leaks: Leaks
    votes: int = 3
    """How often an answer is asked for again."""
    pairs: int = 3
    """Questions for a piece."""
    tokens: int = 1024
    """Of an answer, at most."""
    form: str = "task"
    """Of exercises: task or chats."""

    def again(self, prompt: str) -> list[Ask]:
        """The votes on something."""
        return [Ask(prompt, self.tokens, STEADY, number) for number in range(1, self.votes + 1)]

    def leak_check(self) -> tuple[str, ...]:
        return ("contamination",) if self.leaks.against else ()


def said(answer: Answer) -> str:
    """An answer without its thinking, without a line that announces it, and without control characters."""
    answer = answer._replace(text=CONTROL.sub("", answer.text.replace("\r\n", "\n")))
    return PREAMBLE.sub("", THINKING.sub("", answer.text).strip()).strip()


def cut(found: Iterable[Source], size: int) -> Iterator[Piece]:
    """Documents as pieces of at most `size` bytes, cut at line ends or spaces. Those of one text are numbered through."""
    number = 0
    for document in found:
        number = number if PART in document.meta else 0
        for raw in pieces(document.text.encode(), size):
            if text := raw.decode().strip():
                number += 1
                yield Piece(text, document.source, document.line, number, document.meta)


def made_of(makers: Sequence[Steps], ask: Callable[[list[Ask]], list[Answer]]) -> list[list[Made]]:
    """What each maker makes. The questions of a round are put together."""
    made: list[list[Made]] = [[] for _ in makers]
    waiting: dict[int, list[Ask]] = {}

    def go_on(number: int, answers: list[Answer] | None) -> None:
        try:
            waiting[number] = makers[number].send(answers) if answers is not None else next(makers[number])
        except StopIteration as stop:
            made[number] = stop.value

    for number in range(len(makers)):
        go_on(number, None)
    while waiting:
        asked, waiting = waiting, {}
        answers = iter(ask([each for asks in asked.values() for each in asks]))
        for number, asks in asked.items():
            go_on(number, [next(answers) for _ in asks])
    return made
