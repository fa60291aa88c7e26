"""Teachers that texts are asked of: a server with OpenAI's interface, or a run, by our own engine. What they answered is kept, so that no
question is put twice.

What is asked is a prompt and a number; with the seed they give the seed by which the answer is sampled. So with a run as the teacher, all
answers are a function of (weights, seed, prompts).
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from sparing.account.meter import NoMeter
from sparing.base.config import Budget, CannotGoOn, UserError
from sparing.base.endpoint import QUIET, Endpoint, Failed, Reply, is_url, patiently
from sparing.base.files import append_durably
from sparing.base.run import RunFolder, weights_sha256
from sparing.curate.parts import Stop
from sparing.data.chat import PLAIN_STOPS, ChatTemplate, template_text
from sparing.data.progress import POLL_S, check
from sparing.data.split import content_hash

AT_ONCE = 8
"""Requests to a server under way."""
TIMEOUT_S = 300.0
"""Of a server's answer, from the request to its last byte."""
REFUSED = (400, 413, 422)
"""Statuses for a question that the server does not take, such as one that is too long for its model."""
PATIENCE = 8
"""Questions in a row without an answer of the model, after which a server is given up."""
LEAST_ROOM = 16
"""Tokens of the context for an answer."""


class Ask(NamedTuple):
    """A question, as one message."""

    prompt: str
    tokens: int
    """Of the answer, at most."""
    temperature: float
    number: int = 0
    """Tells apart what is asked more than once in the same words."""

    def seed(self, seed: int) -> int:
        """31 bits: there are servers that take no more."""
        return content_hash(f"{seed} {self.number} {self.prompt}".encode()) >> 33


class Answer(NamedTuple):
    """What became of a question."""

    text: str
    failed: str = ""
    """Why there is no text: empty, cut off, HTTP 400 and so on."""
    asked: int = 0
    """Tokens."""
    answered: int = 0
    said: bool = True
    """The model has answered, well or badly; it need not be asked again."""


class Teacher(Protocol):
    name: str
    facts: dict[str, str]
    """Which model it is, for the provenance of what it makes."""

    def answers(self, asks: Sequence[Ask], seed: int, should_stop: Stop = None) -> Iterator[tuple[int, Answer]]:
        """(place in `asks`, its answer), as they come. Raises Stopped; Gone where nobody answers any more."""

    def close(self) -> None: ...


class Gone(Exception):
    """A teacher that does not answer any more, and why in one line."""


def teacher_of(named: str) -> Teacher:
    """A URL such as http://127.0.0.1:8000/v1#MODEL, or a run folder. Raises UserError."""
    return Served(named) if is_url(named) else Run(named)


class Served:
    """A server with OpenAI's interface."""

    def __init__(self, url: str):
        self.endpoint = Endpoint(url, TIMEOUT_S)
        self.name = self.endpoint.model
        self.facts = {"teacher": self.name, "teacher_host": self.endpoint.host}

    def close(self) -> None:
        pass

    def answers(self, asks: Sequence[Ask], seed: int, should_stop: Stop = None) -> Iterator[tuple[int, Answer]]:
        todo, turn, left = iter(enumerate(asks)), threading.Lock(), threading.Event()
        found: queue.SimpleQueue[tuple[int, Answer | Failed]] = queue.SimpleQueue()

        def work() -> None:
            while not left.is_set():
                with turn:
                    place, ask = next(todo, (-1, None))
                if ask is None:
                    return
                found.put((place, self._one(ask, seed, left)))

        for _ in range(min(AT_ONCE, len(asks))):
            threading.Thread(target=work, daemon=True, name="sparing-asking").start()  # one that waits need not be waited for
        silent = 0
        try:
            for _ in asks:
                place, answer = _next(found, should_stop)
                if isinstance(answer, Failed):
                    silent = 0 if answer.said else silent + 1
                    self._give_up(answer, silent)
                    answer = Answer("", str(answer), said=answer.said)
                else:
                    silent = 0
                yield place, answer
        finally:
            left.set()

    def _one(self, ask: Ask, seed: int, left: threading.Event) -> Answer | Failed:
        def once() -> Reply:
            return self.endpoint.answer([{"role": "user", "content": ask.prompt}], ask.tokens, ask.temperature, ask.seed(seed))

        try:
            reply = patiently(once, left)
        except Failed as failure:
            return failure
        except Exception as error:  # nothing may leave the one who waits without a word
            return Failed(f"{type(error).__name__}: {error}"[:200])
        return Answer(reply.text, "", reply.asked, reply.answered)

    def _give_up(self, failure: Failed, silent: int) -> None:
        if failure.said:
            return
        if (failure.status and failure.status not in REFUSED) or (failure.passing and str(failure) not in QUIET):
            hint = "$OPENAI_API_KEY is what it is asked with" if failure.status in (401, 403) else failure.told
            raise Gone(f"{self.endpoint.host}: {failure}" + (f" ({hint})" if hint else ""))
        if silent == PATIENCE:
            told = f" ({failure.told})" if failure.told else ""
            raise Gone(f"{self.endpoint.host}: {PATIENCE} questions in a row without an answer, the last one: {failure}{told}")


def _next(found: queue.SimpleQueue, should_stop: Stop):
    while True:
        check(should_stop)
        try:
            return found.get(timeout=POLL_S)
        except queue.Empty:
            continue


class Run:
    """A run, or an imported model, by our own engine. On the CPU its numbers have one format, so that the bits are those of its weights."""

    def __init__(self, path: str):
        import torch

        from sparing.base.config_file import read_config
        from sparing.infer.engine import Engine
        from sparing.infer.generate import MAX_REQUESTS
        from sparing.infer.network import cannot_compile

        run = RunFolder.open(path)
        fixed = not torch.cuda.is_available() and not cannot_compile(read_config(run.config_file).model)
        self.template = ChatTemplate(template_text(run))
        self.engine = Engine(path, weights="int8" if fixed else "auto", max_batch=MAX_REQUESTS // 2, speculate=False)
        digest = weights_sha256(run)
        self.name = digest
        self.facts = {"teacher": self.engine.name, "teacher_weights_sha256": digest}

    def close(self) -> None:
        self.engine.close()

    def answers(self, asks: Sequence[Ask], seed: int, should_stop: Stop = None) -> Iterator[tuple[int, Answer]]:
        from sparing.infer.generate import MAX_REQUESTS, finished_requests
        from sparing.infer.request import Sampling

        stops = PLAIN_STOPS if self.template.plain else ()
        for low in range(0, len(asks), MAX_REQUESTS):
            prompts, places = [], []
            for place, ask in islice(enumerate(asks), low, low + MAX_REQUESTS):
                ids = self.template.encode(self.engine.tokenizer, [{"role": "user", "content": ask.prompt}])
                if len(ids) + LEAST_ROOM > self.engine.context:
                    yield place, Answer("", "longer than the context", said=True)
                    continue
                prompts.append((ids, Sampling(ask.tokens, ask.temperature, seed=ask.seed(seed), stop=stops)))
                places.append(place)
            for place, (request, text) in zip(places, finished_requests(self.engine, prompts), strict=True):
                check(should_stop)
                used = request.usage["prompt_tokens"], request.usage["completion_tokens"]
                failed = "cut off" if request.finish_reason == "length" else "" if text.strip() else "empty"
                yield place, Answer("" if failed else text, failed, *used)


class Kept:
    """Answers in a file that only grows: a line for each, with its own checksum. What is damaged, or cut short by a kill, is no line."""

    def __init__(self, path: Path):
        self.path = path
        self._at: dict[str, int] = {}
        """Where each answer's line begins."""
        path.parent.mkdir(parents=True, exist_ok=True)
        at = 0
        with open(path, "a+b") as file:
            file.seek(0)
            for line in file:
                if (found := _line(line)) is not None:
                    self._at[found["of"]] = at
                at += len(line)

    def __len__(self) -> int:
        return len(self._at)

    def get(self, key: str) -> Answer | None:
        if key not in self._at:
            return None
        with open(self.path, "rb") as file:
            file.seek(self._at[key])
            found = _line(file.readline())
        return None if found is None else Answer(found["text"], found["failed"], found["asked"], found["answered"])

    def put(self, key: str, answer: Answer) -> None:
        value = {"of": key, "text": answer.text, "failed": answer.failed, "asked": answer.asked, "answered": answer.answered}
        line = json.dumps(value | {"sum": _sum(value)})
        append_durably(self.path, line)
        self._at[key] = self.path.stat().st_size - len(line) - 1


def _sum(value: dict) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _line(line: bytes) -> dict | None:
    try:
        value = json.loads(line)
        return value if value.pop("sum") == _sum(value) else None
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


@dataclass
class Asking:
    """Puts questions to a teacher, each once, and counts."""

    teacher: Teacher
    kept: Kept
    seed: int
    meter: NoMeter
    budget: Budget | None = None
    """In seconds, of this call; or in tokens, asked and answered, of all calls for this folder."""
    should_stop: Stop = None
    clock: Callable[[], float] = time.monotonic
    questions: int = 0
    earlier: int = 0
    """Of the questions those that were answered before this call."""
    asked: int = 0
    """Tokens."""
    answered: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set)

    def __post_init__(self):
        self.began = self.clock()

    def spent(self) -> bool:
        """Whether the budget is used up."""
        if self.budget is None:
            return False
        used = self.asked + self.answered if self.budget.unit == "tok" else self.clock() - self.began
        return used >= self.budget.amount

    def __call__(self, asks: Sequence[Ask]) -> list[Answer]:
        """The answer to each. Raises Stopped, UserError (nobody has ever answered) and CannotGoOn (nobody answers any more)."""
        keys = [self._key(ask) for ask in asks]
        found: dict[str, Answer] = {}
        new: dict[str, Ask] = {}
        for key, ask in zip(keys, asks, strict=True):
            if key in found or key in new:
                continue
            if (answer := self.kept.get(key)) is None:
                new[key] = ask
            else:
                found[key] = answer
                self._count(key, answer, earlier=True)
        names = list(new)
        try:
            for place, answer in self.teacher.answers(list(new.values()), self.seed, self.should_stop):
                if answer.said:
                    self.kept.put(names[place], answer)
                found[names[place]] = answer
                self._count(names[place], answer, earlier=False)
        except Gone as gone:
            if not len(self.kept):
                raise UserError(f"--teacher {gone}") from None
            raise CannotGoOn(f"--teacher {gone}; {len(self.kept):,} answers are kept, and the same command goes on") from None
        return [found[key] for key in keys]

    def _key(self, ask: Ask) -> str:
        about = [self.teacher.name, ask.prompt, ask.tokens, ask.temperature, ask.seed(self.seed)]
        return hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()

    def _count(self, key: str, answer: Answer, earlier: bool) -> None:
        if key in self._known:
            return
        self._known.add(key)
        self.questions += 1
        self.earlier += earlier
        self.asked += answer.asked
        self.answered += answer.answered
        if not earlier:
            self.meter.add(answer.asked + answer.answered)
        if answer.failed:
            self.failed[answer.failed] = self.failed.get(answer.failed, 0) + 1
