"""Tool calls: which functions must be called, and the reader that finds calls in an answer."""

from __future__ import annotations

import json
import re
import uuid

from sparing.serve.errors import bad

OPEN, CLOSE = "<tool_call>", "</tool_call>"
BEGUN = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(.*)', re.DOTALL)
"""A call whose end is missing: its name, and its arguments as far as they were written."""


def forced(body: dict) -> list[dict] | None:
    """The functions of which one must be called, None if no call is forced. Raises ApiError 400 for a choice that is not in `tools`."""
    choice, tools = body.get("tool_choice"), body.get("tools") or []
    if choice in (None, "none", "auto"):
        return None
    functions = [tool["function"] for tool in tools]
    if isinstance(choice, dict):
        functions = [function for function in functions if function["name"] == choice["function"]["name"]]
    if not functions:
        raise bad("'tool_choice' asks for a function that is not in 'tools'.", "tool_choice")
    return functions


def read_call(text: str) -> dict | None:
    """A call in OpenAI's form; None if the text is not one (cut short, for example)."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    return _call(name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def _mark_begun(text: str, mark: str) -> int:
    """Characters at the end of `text` that begin `mark`."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)


def _call(name: str, arguments: str) -> dict:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": arguments}}


class CallReader:
    """Splits an answer, while it is written, into text and the calls between <tool_call> and </tool_call>."""

    def __init__(self, all_of_it: bool = False):
        """all_of_it: the whole answer is one call, without the tags."""
        self.unfinished = False
        """Whether the last call lacks its end."""
        self._held = ""
        self._inside = self._all = all_of_it

    def push(self, text: str, last: bool = False, cut: bool = False) -> tuple[str, list[dict]]:
        """-> (text to show, calls). last: no text follows, so what was held back is shown or read now. cut: more was to come, so a call
        without its end is given as far as it was written, and is no text."""
        self._held += text
        shown, calls = "", []
        while not self._all:
            mark = CLOSE if self._inside else OPEN
            at = self._held.find(mark)
            if at < 0:
                break
            before, self._held = self._held[:at], self._held[at + len(mark) :]
            if self._inside:
                call = read_call(before)
                calls += [call] if call else []
                shown += "" if call else OPEN + before + CLOSE
            else:
                shown += before
            self._inside = not self._inside
        if last:
            rest, self._held = self._held, ""
            if self._inside and cut:
                rest = rest[: len(rest) - _mark_begun(rest, CLOSE)]
            call = read_call(rest) if self._inside else None
            if self._inside and not call and (self._all or (cut and rest.strip()[:1] in ("", "{"))):
                self.unfinished, begun = True, BEGUN.match(rest)
                calls += [_call(begun[1], begun[2])] if begun else []
            else:
                calls += [call] if call else []
                shown += "" if call else OPEN + rest if self._inside else rest
        elif not self._inside:
            size = len(self._held) - _mark_begun(self._held, OPEN)
            shown, self._held = shown + self._held[:size], self._held[size:]
        return shown, calls
