"""What people said of answers, made fit to learn from: each question once, with one answer, and none that is checked.

An answer that comes again and again, to one question or to many, counts once or a few times, so that whoever repeats it gains nothing by
that. Where one question has several answers nobody knows which is right: a corrected one wins, else none is learnt.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sparing.base.config import UserError
from sparing.base.files import write_atomic
from sparing.base.messages import say
from sparing.data.accounts import Accounts
from sparing.data.chats import Chat, answers, chats
from sparing.data.files import find_files
from sparing.data.sources import Rejected, Tally, rows
from sparing.data.split import content_hash

REPEATED = 0.02
"""Share of the conversations that may have one and the same answer, and at least REPEATED_LEAST."""
REPEATED_LEAST = 2


class Feedback(NamedTuple):
    """Conversations to learn from, in the order of a hash of their questions."""

    chats: list[Chat]
    left_out: Counter[str]
    """Why others are not among them."""


def exchanges(paths: Sequence[str], option: str, accounts: Accounts) -> list[Chat]:
    """Every conversation up to its first answer, counted as it comes in. Raises UserError where there is none."""
    tally = Tally()

    def reject(rejected: Rejected) -> None:
        accounts(rejected)
        tally(rejected)

    found = [_first_exchange(chat) for chat in accounts.reading(chats(find_files(paths), reject))]
    if not found:
        raise UserError(f"{option}: no usable conversation in {', '.join(paths[:3])}: {tally if tally.total else 'no files'}")
    if tally.total:
        say(f"{option}: {tally.total:,} rows cannot be used: {tally}")
    return found


def _first_exchange(chat: Chat) -> Chat:
    at = next(number for number, message in enumerate(chat.messages) if answers(message))
    return chat._replace(messages=chat.messages[: at + 1])


def question_of(chat: Chat) -> str:
    """What an answer is to, in a form in which equal ones are equal."""
    return json.dumps([[message["role"], " ".join(message["content"].split()).casefold()] for message in chat.messages[:-1]])


def answer_of(chat: Chat) -> str:
    return json.dumps([" ".join(chat.messages[-1]["content"].split()), chat.messages[-1].get("tool_calls")])


def in_order(found: Iterable[Chat]) -> list[Chat]:
    """By a hash of the question: the same whatever order the files have."""
    return sorted(found, key=lambda chat: (content_hash(question_of(chat).encode()), answer_of(chat)))


def read(paths: Sequence[str], checked: Iterable[Chat], accounts: Accounts) -> Feedback:
    """What of the feedback may be learnt. checked: trusted conversations, whose questions are none to learn from.
    accounts: count what comes in.

    Raises UserError where nothing is left."""
    verdicts = _verdicts(paths)
    earlier = accounts.quarantined
    found = exchanges(paths, "--data", accounts)
    left_out = Counter({"unusable": accounts.quarantined - earlier})
    known = {question_of(chat) for chat in checked}
    by_question: dict[str, dict[str, list[Chat]]] = defaultdict(lambda: defaultdict(list))
    for chat in found:
        if verdicts.get((chat.source, chat.line)) == "rejected":
            left_out["rejected"] += 1
        elif question_of(chat) in known:
            left_out["asked in --check too"] += 1
        else:
            by_question[question_of(chat)][answer_of(chat)].append(chat)
    single = []
    for said in by_question.values():
        everything = [chat for same in said.values() for chat in same]
        corrected = {answer_of(chat) for chat in everything if verdicts.get((chat.source, chat.line)) == "corrected"}
        right = said.keys() if len(said) == 1 else corrected
        if len(right) != 1:
            left_out["of two answers to one question"] += len(everything)
            continue
        single.append(said[next(iter(right))][0])
        left_out["said again"] += len(everything) - 1
    kept, times, most = [], Counter(), max(REPEATED_LEAST, int(REPEATED * len(single)))
    for chat in in_order(single):
        times[answer_of(chat)] += 1
        if times[answer_of(chat)] <= most:
            kept.append(chat)
        else:
            left_out["the same answer to other questions"] += 1
    if not kept:
        raise UserError(f"--data {', '.join(paths[:3])}: nothing to learn from is left: {told(+left_out)}")
    return Feedback(kept, +left_out)


def _verdicts(paths: Sequence[str]) -> dict[tuple[str, int], str]:
    """(file, line) -> the verdict that `serve --collect` writes beside an answer."""
    return {
        (row.source, row.line): row.value["verdict"]
        for row in rows(find_files(paths))
        if isinstance(row.value, dict) and isinstance(row.value.get("verdict"), str)
    }


def told(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {why}" for why, count in counts.most_common())


def crossed(found: Sequence[Chat]) -> list[Chat]:
    """The same answers, each behind the question of another conversation, the one half of them on."""
    count = len(found)
    return [chat._replace(messages=[*found[(at + count // 2) % count].messages[:-1], chat.messages[-1]]) for at, chat in enumerate(found)]


def keep(path: Path, found: Iterable[Chat]) -> None:
    """Write conversations as JSON lines."""
    lines = ({"messages": chat.messages} | ({"tools": chat.tools} if chat.tools else {}) for chat in found)
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
