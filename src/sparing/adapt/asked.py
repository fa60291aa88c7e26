"""A teacher behind OpenAI's HTTP interface: its answers to the questions of conversations, which a student then learns (`adapt.sft`).

What it says is not to be trusted: an answer may come late, drip, never end, be cut off, be empty, or lie about its length. Each of these
is counted and left out. Answers are kept under $SPARING_HOME as they come, so that none is paid for twice, and those that a run learns
from are copied into it.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sparing.base.config import Budget, UserError
from sparing.base.files import append_durably, read_lines, write_atomic
from sparing.base.hardware import home
from sparing.base.messages import say
from sparing.data.chats import Unusable, answers, chat_of
from sparing.data.sources import rows
from sparing.data.split import content_hash
from sparing.job.begin import Job

TIMEOUT_S = 60.0
"""Of an answer, from the request to its last byte."""
AT_ONCE = 4
TOKENS = 512
"""Of an answer, at most; the teacher is told."""
MOST_CHARACTERS = 16
"""Characters of a token, at most, by which an answer is longer than was asked."""
MOST_BYTES = 4 << 20
PATIENCE = 8
"""Failures before the first usable answer after which a teacher is given up."""
SHARE = 0.5
"""Of a time budget, for asking."""
CHARACTERS = 4.0
"""Of a token, on average: by it answers are counted against a budget in tokens."""
QUESTIONS = ("prompt", "question", "instruction")


class Failed(Exception):
    """No usable answer, and why, in a few words that are counted."""


def is_url(teacher: str) -> bool:
    return teacher.startswith(("http://", "https://"))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key is for the server that the user named."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """URL is what OpenAI's clients call the base, such as http://127.0.0.1:8000/v1; behind a # the model's name (default: its first one).
    $OPENAI_API_KEY is sent where it is set."""

    def __init__(self, url: str, timeout: float = TIMEOUT_S):
        """Raises UserError where nobody answers there."""
        self.url, _, self.model = url.partition("#")
        self.url, self.timeout = self.url.rstrip("/"), timeout
        self._opener = urllib.request.build_opener(_NoRedirects)
        if not self.model:
            try:
                self.model = str(self._call("/models", None)["data"][0]["id"])
            except (Failed, KeyError, IndexError, TypeError) as error:
                why = error if isinstance(error, Failed) else "it names no model"
                raise UserError(f"--teacher {url}: {why}; expected OpenAI's interface, such as http://127.0.0.1:8000/v1#MODEL") from None

    def answer(self, messages: list[dict]) -> str:
        """Raises Failed."""
        body = {"model": self.model, "messages": messages, "max_tokens": TOKENS, "temperature": 1.0}
        found = self._call("/chat/completions", body)
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            text, reason = choice["message"].get("content"), choice.get("finish_reason")
            told = usage.get("completion_tokens")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Failed("no chat completion") from None
        if not isinstance(text, str) or not text.strip():
            raise Failed("empty")
        if reason == "length":
            raise Failed("cut off")
        if len(text) > MOST_CHARACTERS * TOKENS:
            raise Failed("longer than was asked")
        if told is not None and not (type(told) is int and len(text) / MOST_CHARACTERS <= told <= TOKENS):
            raise Failed("lies about its length")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Failed("not Unicode text") from None
        return text

    def _call(self, path: str, body: dict | None) -> dict:
        """One request; the whole of it ends in `timeout`."""
        ends = time.monotonic() + self.timeout
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with self._opener.open(request, timeout=self.timeout) as response:
                parts, size = [], 0
                while part := response.read1(1 << 16):
                    parts.append(part)
                    size += len(part)
                    if size > MOST_BYTES:
                        raise Failed("endless")
                    if time.monotonic() > ends:
                        raise Failed("timed out")
                promised = response.headers.get("Content-Length")
                if promised is not None and promised.strip() != str(size):
                    raise Failed("ended before its length")
            found = json.loads(b"".join(parts))
        except TimeoutError:
            raise Failed("timed out") from None
        except urllib.error.HTTPError as error:
            error.close()
            raise Failed(f"HTTP {error.code}") from None
        except (http.client.IncompleteRead, http.client.BadStatusLine):
            raise Failed("ended before its length") from None
        except urllib.error.URLError as error:
            raise Failed("timed out" if isinstance(error.reason, TimeoutError) else "nobody answers") from None
        except (OSError, http.client.HTTPException):
            raise Failed("the connection broke") from None
        except ValueError:
            raise Failed("no JSON") from None
        if not isinstance(found, dict):
            raise Failed("no chat completion")
        return found


def questions(paths: Sequence[str], unusable: Counter) -> list[list[dict]]:
    """Messages up to the first answer of each conversation, each question once, in the order of their hashes. unusable: counts others."""
    found: dict[int, list[dict]] = {}
    for row in rows(paths):
        try:
            messages = chat_of(row).messages
            asked = messages[: next(number for number, message in enumerate(messages) if answers(message))]
        except Unusable:
            asked = _only_asked(row.value)
        if asked:
            found[content_hash(json.dumps(asked, sort_keys=True).encode())] = asked
        else:
            unusable["no question"] += 1
    return [found[key] for key in sorted(found)]


def _only_asked(value: Any) -> list[dict]:
    """A row without an answer: messages, or a field that holds the question."""
    if not isinstance(value, dict):
        return []
    messages = value.get("messages")
    if messages is None:
        text = next((value[name] for name in QUESTIONS if isinstance(value.get(name), str)), "")
        messages = [{"role": "user", "content": text}]
    if not (isinstance(messages, list) and messages and all(map(_asks, messages))):
        return []
    return messages if messages[-1]["role"] == "user" and messages[-1]["content"].strip() else []


def _asks(message: Any) -> bool:
    """Whether it is a message that may stand before an answer."""
    return isinstance(message, dict) and message.get("role") in ("system", "user") and isinstance(message.get("content"), str)


def collect(job: Job, url: str, paths: Sequence[str], budget: Budget) -> Path:
    """Ask until all questions are answered or the share of the budget is used; -> the run's answers.jsonl, conversations of one answer.

    Raises UserError where nothing usable comes.
    """
    endpoint, counts = Endpoint(url), Counter()
    asked = questions(paths, counts)
    if not asked:
        raise UserError(f"--data: no question for {url} in {', '.join(paths[:3])}: {counts.total():,} rows hold none")
    lasts, began = job.lasts(budget), job.clock.seconds()
    ends = None if lasts is None else began + SHARE * max(0.0, lasts - began)
    wanted = CHARACTERS * budget.amount if budget.unit == "tok" else float("inf")
    key = hashlib.sha256(repr((endpoint.url, endpoint.model, TOKENS)).encode()).hexdigest()[:32]
    file = home() / "answers" / f"{key}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = {json.dumps(line["messages"][:-1], sort_keys=True): line for line in read_lines(file)}
    lines: list[dict] = []
    say(f"{endpoint.url} ({endpoint.model}) is asked {len(asked):,} questions, {AT_ONCE} at a time; answers are kept in {file}")
    with ThreadPoolExecutor(AT_ONCE, "sparing-asking") as pool:
        try:
            for messages, future in _asking(pool, endpoint, asked, known):
                while isinstance(future, Future) and not future.done():
                    job.signals.check()
                    time.sleep(0.01)
                line = _outcome(messages, future, counts)
                if line is not None:
                    lines.append(line)
                    if isinstance(future, Future):
                        append_durably(file, json.dumps(line))
                if (not lines and counts.total() >= PATIENCE) or (ends is not None and job.clock.seconds() > ends):
                    break
                wanted -= len(line["messages"][-1]["content"]) if line else 0
                if wanted <= 0:
                    break
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    told = {"url": endpoint.url, "model": endpoint.model, "answers": len(lines), "failed": dict(counts)}
    failed = ", ".join(f"{count:,} × {why}" for why, count in counts.most_common())
    if not lines:
        raise UserError(f"--teacher {url}: no usable answer ({failed})")
    say(f"{len(lines):,} answers" + (f"; left out: {failed}" if failed else ""))
    write_atomic(job.run.state / "asked.json", json.dumps(told, indent=1))
    target = job.run.path / "answers.jsonl"
    write_atomic(target, "".join(json.dumps(line) + "\n" for line in lines))
    return target


def _asking(
    pool: ThreadPoolExecutor, endpoint: Endpoint, asked: list[list[dict]], known: dict[str, dict]
) -> Iterator[tuple[list[dict], Future | dict]]:
    """(question, its answer to come, or the line that is known) in the order of the questions; AT_ONCE are under way."""
    waiting: deque[tuple[list[dict], Future | dict]] = deque()
    for messages in asked:
        line = known.get(json.dumps(messages, sort_keys=True))
        waiting.append((messages, line or pool.submit(endpoint.answer, messages)))
        if len(waiting) >= 2 * AT_ONCE:
            yield waiting.popleft()
    yield from waiting


def _outcome(messages: list[dict], found: Future | dict, counts: Counter) -> dict | None:
    """The conversation; None, and counted, where the teacher failed."""
    if isinstance(found, dict):
        return found
    try:
        return {"messages": [*messages, {"role": "assistant", "content": found.result()}]}
    except Failed as failure:
        counts[str(failure)] += 1
        return None
