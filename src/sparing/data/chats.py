"""Reads conversations from JSON lines and Parquet, in the forms in which they are published, as OpenAI's messages."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from sparing.base.config import UserError
from sparing.data.accounts import Accounts
from sparing.data.chat import ROLES, flat
from sparing.data.document import too_deep
from sparing.data.files import SourceFile, find_files
from sparing.data.progress import Progress, check
from sparing.data.sources import Reject, Rejected, Row, Tally, Tick, rows
from sparing.data.split import HashHistogram, Split, choose_split, content_hash, mix, threshold

PAIRS = (("prompt", "completion"), ("question", "answer"), ("prompt", "response"))
"""Keys of rows that hold one question and its answer."""
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bard": "assistant", "bing": "assistant", "system": "system", "developer": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "function_call",
}  # fmt: skip
"""What ShareGPT's `from` says, as OpenAI's roles; a call of a function is a message of its own there."""
SAMPLE = 256
"""Conversations of which the lengths are measured before it is known how many are needed."""
ROW_BYTES = 4 << 20
"""A longer row is not used: no context holds it."""


class Chat(NamedTuple):
    """One conversation."""

    messages: list[dict[str, Any]]
    """As OpenAI's interface takes them, content as text."""
    tools: list[dict] | None
    kind: str
    """How its row was written: messages, ShareGPT, Alpaca, or a pair of keys."""
    source: str
    line: int
    rejected: list[dict[str, Any]] | None = None
    """Of a preference, the same conversation with the worse answer; `messages` has the better one."""

    @property
    def common(self) -> int:
        """How many leading messages a preference's two conversations share."""
        pairs = zip(self.messages, self.rejected or (), strict=False)
        return next((at for at, (chosen, rejected) in enumerate(pairs) if chosen != rejected), len(self.rejected or ()))

    @property
    def first(self) -> str:
        """The first turn of the user: what decides whether it is held out, so that no question is on both sides."""
        return next((message["content"] for message in self.messages if message["role"] == "user"), self.messages[0]["content"])

    @property
    def first_hash(self) -> int:
        return content_hash(self.first.encode())

    @property
    def raw(self) -> bytes:
        """All that it says, the same for equal conversations."""
        parts = [self.messages, self.tools] if self.rejected is None else [self.messages, self.tools, self.rejected]
        return json.dumps(parts, sort_keys=True).encode()


class Unusable(ValueError):
    """Why a row is no conversation to learn from; details in brackets."""


def chats(paths: Sequence[str] | Sequence[SourceFile], reject: Reject | None = None, tick: Tick | None = None) -> Iterator[Chat]:
    """Every usable conversation behind `paths` (see `files.find_files`), in order; `reject` and `tick` as `sources.documents` has them.

    Each row is recognised by its own keys. Raises UserError for paths that name nothing.
    """
    reject = reject or (lambda rejected: None)
    for row in rows(paths, reject, tick):
        try:
            yield chat_of(row)
        except Unusable as error:
            reject(Rejected(row.source, row.line, str(error)))


def looks_like_chats(paths: Sequence[str], text_key: str) -> bool:
    """Whether the first row behind the paths is a conversation, and no document under `text_key`."""
    for row in rows(paths):
        return isinstance(row.value, dict) and text_key not in row.value and _form(row.value) is not None
    return False


def chat_of(row: Row) -> Chat:
    """The conversation of one row. Raises Unusable."""
    value = row.value
    if not isinstance(value, dict):
        raise Unusable("not a JSON object")
    form = _form(value)
    if form is None:
        raise Unusable(f"no conversation in it (keys: {', '.join(map(str, list(value)[:8]))})")
    messages, kind = form(value)
    messages, rejected = _talk(messages), _talk(_preference(value, "rejected")[0]) if form is _preference else None
    tools = value.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools")
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unusable("tools are no list of objects")
    chat = Chat(messages, [_without_nulls(tool) for tool in tools] if tools else None, kind, row.source, row.line, rejected)
    if rejected is not None and not all(any(map(answers, side[chat.common :])) for side in (messages, rejected)):
        raise Unusable("the chosen and the rejected answer are the same, or one is no answer")
    try:
        if len(json.dumps([*chat[:2], rejected], ensure_ascii=False).encode()) > ROW_BYTES:
            raise Unusable(f"longer than {ROW_BYTES >> 20} MiB")
    except UnicodeEncodeError:
        raise Unusable("not Unicode text (half of a surrogate pair)") from None
    except (TypeError, RecursionError):
        raise Unusable("holds what is no JSON (dates, bytes)") from None
    return chat


def _talk(messages: list) -> list[dict]:
    """Messages as templates get them, with a question and an answer among them. Raises Unusable."""
    messages = [_checked(message) for message in messages]
    if not any(map(answers, messages)):
        raise Unusable("no answer: no turn of the assistant says or calls anything")
    if not any(message["role"] != "system" for message in messages[: next(i for i, m in enumerate(messages) if answers(m))]):
        raise Unusable("no question before the first answer")
    return messages


def answers(message: dict) -> bool:
    """Whether a message is one to learn: the assistant's, and not empty."""
    return message["role"] == "assistant" and bool(message["content"].strip() or message.get("tool_calls"))


# one function for each form: row -> (messages, its name)


def _form(value: dict) -> Callable[[dict], tuple[list, str]] | None:
    if "chosen" in value and "rejected" in value:
        return _preference
    if isinstance(value.get("messages"), list):
        return _messages
    if isinstance(value.get("conversations"), list):
        return _sharegpt
    if "instruction" in value and "output" in value:
        return _alpaca
    return next((lambda row, keys=keys: _pair(row, *keys) for keys in PAIRS if all(key in value for key in keys)), None)


def _messages(value: dict) -> tuple[list, str]:
    return value["messages"], "messages"


def _sharegpt(value: dict) -> tuple[list, str]:
    messages: list = [{"role": "system", "content": value["system"]}] if value.get("system") else []
    for turn in value["conversations"]:
        if not isinstance(turn, dict):
            raise Unusable("a turn is no object")
        if "role" in turn and "from" not in turn:
            messages.append(turn)
            continue
        role = SPEAKERS.get(str(turn.get("from")).lower())
        if role is None:
            raise Unusable(f"unknown speaker ({str(turn.get('from'))[:40]!r})")
        if role == "function_call":
            called = _json(turn.get("value"), "a function call")
            calls = called if isinstance(called, list) else [called]
            messages.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]})
        else:
            messages.append({"role": role, "content": turn.get("value")})
    return messages, "ShareGPT"


def _alpaca(value: dict) -> tuple[list, str]:
    asked, beside = value["instruction"], value.get("input")
    if beside:
        if not isinstance(asked, str) or not isinstance(beside, str):
            raise Unusable("instruction or input is not text")
        asked = f"{asked}\n\n{beside}" if asked else beside
    messages = [{"role": "system", "content": value["system"]}] if value.get("system") else []
    history = value.get("history") or []
    if not isinstance(history, list):
        raise Unusable("history is no list of turns")
    for turn in history:
        if not (isinstance(turn, list) and len(turn) == 2):
            raise Unusable("a turn of history is no pair")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return [*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": value["output"]}], "Alpaca"


def _preference(value: dict, side: str = "chosen") -> tuple[list, str]:
    """Two answers to one question, as texts or as messages; messages may have the question in them instead of a prompt beside them (TRL's
    explicit and implicit prompts)."""
    asked, said = value.get("prompt"), value[side]
    if not isinstance(said, list):
        if asked is None:
            raise Unusable("chosen and rejected are texts without a prompt")
        said = [{"role": "assistant", "content": said}]
    elif asked is None or (said and isinstance(said[0], dict) and said[0].get("role") in ("user", "system", "developer")):
        return said, "preference"
    asked = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    return [*asked, *said], "preference"


def _pair(value: dict, question: str, answer: str) -> tuple[list, str]:
    asked, said = value[question], value[answer]
    asked = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    said = said if isinstance(said, list) else [{"role": "assistant", "content": said}]
    return [*asked, *said], f"{question}/{answer}"


# what a message must be


def _checked(message: Any) -> dict:
    """A message as templates get it from the server. Raises Unusable."""
    if not isinstance(message, dict):
        raise Unusable("a message is no object")
    message, role = _without_nulls(message), message.get("role")
    if role not in ROLES:
        raise Unusable(f"unknown role ({str(role)[:40]!r})")
    content = message.get("content", "")
    if isinstance(content, list) and not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise Unusable("content that is not text (images, sound)")
    if not isinstance(content, str | list):
        raise Unusable(f"content is not text ({type(content).__name__})")
    calls = message.get("tool_calls")
    if calls is not None:
        if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise Unusable("tool_calls is no list of objects")
        calls = [call if "function" in call else {"type": "function", "function": call} for call in calls]
        if not all(isinstance(call["function"], dict) and isinstance(call["function"].get("name"), str) for call in calls):
            raise Unusable("a tool call names no function")
        message = {**message, "tool_calls": calls} if calls else {key: value for key, value in message.items() if key != "tool_calls"}
    return flat(message)


def _without_nulls(value: Any) -> Any:
    """Objects without their nulls: in Parquet every key of a column is in every row."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _json(text: Any, what: str) -> Any:
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        raise Unusable(f"{what} is not JSON") from None
    if too_deep(found):
        raise Unusable(f"{what} is nested too deeply")
    return found


# how much there is


@dataclass(frozen=True)
class ChatFacts:
    """What is known of conversations before one is tokenised. Sizes are bytes of JSON."""

    documents: int
    bytes: int
    held_out_documents: int
    held_out_bytes: int
    kinds: dict[str, int]
    """Conversations by the form of their rows."""
    quarantined: int
    reasons: str
    """The commonest reasons for which rows cannot be used, each with a place; empty where all can."""
    counts: dict[str, int]
    """`accounts.Accounts.balance` of all conversations, those of `validation` among them."""
    sample: tuple[Chat, ...] = field(repr=False, compare=False)
    """The first conversations in the order of sampling, held-out ones among them."""
    content: str
    """Changes when a conversation, their order, or what is held out of them does."""
    split: Split = field(repr=False)
    """By hashes of `Chat.first`."""
    sizes: tuple[np.ndarray, ...] = field(repr=False, compare=False)
    """`HashHistogram.entries` of those that are not held out, by their order of sampling."""

    @property
    def train_bytes(self) -> int:
        return self.bytes - self.held_out_bytes

    def bound(self, share: float) -> int | None:
        """Below which order of sampling there is this share of what is not held out; None: all of it."""
        return None if share >= 1 else threshold(self.sizes, share * self.train_bytes)


def order(chat: Chat) -> int:
    """A conversation's place in the order of sampling."""
    return mix(content_hash(chat.raw))


def scan_chats(
    paths: Sequence[str],
    holdout_fraction: float,
    validation: Sequence[str] = (),
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> ChatFacts:
    """Read all conversations once. validation: files that are scored instead of a held-out part of the others.

    Raises UserError where there are none, or too few to hold one out; Stopped when asked to.
    """
    files = find_files(paths) if paths else []
    progress, total, done = progress or (lambda *_: None), max(1, sum(file.bytes for file in files)), 0
    tally, kinds, content = Tally(), Counter(), hashlib.blake2b(digest_size=16)
    table, seen, sample = HashHistogram(), [], []

    def tick(size: int) -> None:
        nonlocal done
        check(should_stop)
        done += size
        progress("scan", done, total)

    accounts = Accounts(tally)
    for chat in accounts.reading(chats(files, accounts, tick) if files else ()):
        accounts.use(chat)
        raw, first = chat.raw, chat.first_hash
        kinds[chat.kind] += 1
        entry = (-order(chat), len(seen), chat)
        if len(sample) < SAMPLE:
            heapq.heappush(sample, entry)
        elif entry > sample[0]:
            heapq.heapreplace(sample, entry)
        table.add(first, len(raw))
        content.update(content_hash(raw).to_bytes(8, "little"))
        seen.append((first, mix(content_hash(raw)), len(raw)))
    if not seen:
        raise UserError(f"no usable conversation in {', '.join(paths[:3])}: {tally if tally.total else 'no files'}")
    split = Split(reason="those of --val") if validation else choose_split(table.entries(), holdout_fraction, b"")
    if not validation and not split.documents:
        raise UserError("all questions are alike: none can be held out; name conversations to score on with --val FILE")
    sampled = HashHistogram()
    for first, place, size in seen:
        if not split.holds_out(first):
            sampled.add(place, size)
    content.update(repr(split).encode())
    split = replace(split, reason=split.reason.replace("documents", "conversations").replace("the content", "the first question"))
    held_out, held_out_bytes = split.documents, split.bytes
    for chat in accounts.reading(chats(find_files(validation), accounts) if validation else ()):
        accounts.use(chat)
        content.update(content_hash(chat.raw).to_bytes(8, "little"))
        held_out, held_out_bytes = held_out + 1, held_out_bytes + len(chat.raw)
    if not held_out:
        raise UserError(f"no usable conversation in {', '.join(validation[:3])}: {tally if tally.total else 'no files'}")
    every = sum(size for _, _, size in seen)
    return ChatFacts(
        len(seen) + (held_out if validation else 0), every + (held_out_bytes if validation else 0), held_out, held_out_bytes,
        dict(kinds.most_common()), tally.total, str(tally), accounts.balance(), tuple(chat for _, _, chat in sorted(sample, reverse=True)),
        content.hexdigest(), split, sampled.entries(),
    )  # fmt: skip
