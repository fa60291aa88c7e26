"""A teacher behind OpenAI's HTTP interface: its answers to the questions of conversations, which a student then learns (`adapt.sft`).

What it says is not to be trusted (`base.endpoint`): what cannot be used is counted and left out. Answers are kept under $SPARING_HOME as
they come, so that none is paid for twice, and those that a run learns from are copied into it.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from sparing.adapt.sft import GIVEN, keep_quarantine
from sparing.base.config import Budget, UserError
from sparing.base.endpoint import CHARACTERS, TOKENS, Endpoint, Failed, patiently
from sparing.base.files import append_durably, read_lines, write_atomic
from sparing.base.hardware import home
from sparing.base.messages import say
from sparing.data.accounts import Accounts
from sparing.data.chats import Unusable, answers, chat_of
from sparing.data.sources import Rejected, Tally, rows
from sparing.data.split import content_hash
from sparing.job.begin import Job

AT_ONCE = 4
PATIENCE = 8
"""Failures before the first usable answer, and at any time questions in a row to which the model says nothing, after which a teacher is
given up."""
SHARE = 0.5
"""Of a time budget, for asking."""
QUESTIONS = ("prompt", "question", "instruction")


def questions(paths: Sequence[str], accounts: Accounts) -> list[list[dict]]:
    """Messages up to the first answer of each conversation, each question once, in the order of their hashes. accounts: count rows in, and
    those without a question as quarantined."""
    found: dict[int, list[dict]] = {}
    for row in rows(paths, accounts):
        try:
            messages = chat_of(row).messages
            asked = messages[: next(number for number, message in enumerate(messages) if answers(message))]
        except Unusable:
            asked = _only_asked(row.value)
        if asked:
            accounts.into += 1
            found[content_hash(json.dumps(asked, sort_keys=True).encode())] = asked
        else:
            accounts(Rejected(row.source, row.line, "no question"))
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
    lost: list[Rejected] = []
    accounts = Accounts(lost.append)
    asked = questions(paths, accounts)
    tally = Tally()
    for rejected in lost:
        tally(rejected)
    if not asked:
        raise UserError(f"--data: no question for {url} in {', '.join(paths[:3])}: {tally if lost else 'no rows'}")
    if lost:
        say(f"{len(lost):,} rows cannot be used: {tally}")
    lasts, began = job.lasts(budget), job.clock.seconds()
    ends = None if lasts is None else began + SHARE * max(0.0, lasts - began)

    def late() -> bool:
        return ends is not None and job.clock.seconds() > ends

    wanted = CHARACTERS * budget.amount if budget.unit == "tok" else float("inf")
    key = hashlib.sha256(repr((endpoint.url, endpoint.model, TOKENS)).encode()).hexdigest()[:32]
    file = home() / "answers" / f"{key}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = {json.dumps(line["messages"][:-1], sort_keys=True): line for line in read_lines(file)}
    lines: list[dict] = []
    say(f"{endpoint.url} ({endpoint.model}) is asked {len(asked):,} questions, {AT_ONCE} at a time; answers are kept in {file}")
    left, failures, silent = threading.Event(), 0, 0
    try:
        for messages, found in _asking(endpoint, asked, known, left):
            while isinstance(found, Future) and not found.done() and not late():
                job.signals.check()
                time.sleep(0.01)
            if isinstance(found, Future) and not found.done():
                break
            line, failure = _outcome(messages, found)
            if line is not None:
                lines.append(line)
                wanted -= len(line["messages"][-1]["content"])
                if isinstance(found, Future):
                    append_durably(file, json.dumps(line))
            if failure is not None:
                counts[str(failure)] += 1
                failures += 1
            if isinstance(found, Future):
                silent = 0 if failure is None or failure.said else silent + 1
            if silent == PATIENCE and lines:
                say(f"{endpoint.url} is given up: {PATIENCE} questions in a row without an answer, the last one: {failure}")
            if silent == PATIENCE or (not lines and failures == PATIENCE) or wanted <= 0 or late():
                break
    finally:
        left.set()
    told = {"url": endpoint.url, "model": endpoint.model, "answers": len(lines), "failed": dict(counts)}
    failed = ", ".join(f"{count:,} × {why}" for why, count in counts.most_common())
    if not lines:
        raise UserError(f"--teacher {url}: no usable answer ({failed or 'none in its share of the budget'})")
    say(f"{len(lines):,} answers" + (f"; left out: {failed}" if failed else ""))
    write_atomic(job.run.state / "asked.json", json.dumps(told, indent=1))
    accounts.out, accounts.rejected = len(lines), accounts.into - accounts.quarantined - len(lines)
    write_atomic(job.run.state / f"{GIVEN}.json", json.dumps(accounts.balance()))
    keep_quarantine(job.run, lost)
    target = job.run.path / "answers.jsonl"
    write_atomic(target, "".join(json.dumps(line) + "\n" for line in lines))
    return target


def _asking(
    endpoint: Endpoint, asked: list[list[dict]], known: dict[str, dict], left: threading.Event
) -> Iterator[tuple[list[dict], Future | dict]]:
    """(question, its answer to come, or the line that is known) in the order of the questions; AT_ONCE are under way. left: no more is."""
    waiting: deque[tuple[list[dict], Future | dict]] = deque()
    turns = threading.Semaphore(AT_ONCE)

    def work(messages: list[dict], future: Future) -> None:
        with turns:
            if left.is_set():
                return
            try:
                future.set_result(patiently(lambda: endpoint.answer(messages), left))
            except Exception as error:
                future.set_exception(error)

    for messages in asked:
        found = known.get(json.dumps(messages, sort_keys=True))
        if found is None:
            found = Future()
            threading.Thread(target=work, args=(messages, found), daemon=True, name="sparing-asking").start()  # no exit waits for it
        waiting.append((messages, found))
        if len(waiting) >= 2 * AT_ONCE:
            yield waiting.popleft()
    yield from waiting


def _outcome(messages: list[dict], found: Future | dict) -> tuple[dict | None, Failed | None]:
    """The conversation, or why there is none."""
    if isinstance(found, dict):
        return found, None
    try:
        return {"messages": [*messages, {"role": "assistant", "content": found.result().text}]}, None
    except Failed as failure:
        return None, failure
