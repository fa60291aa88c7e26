"""Tool calls: the JSON schema that forces one, and the reader that finds them in an answer."""

from __future__ import annotations

import json
import uuid

from sparing.serve.errors import bad

OPEN, CLOSE = "<tool_call>", "</tool_call>"


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


def call_schema(functions: list[dict]) -> dict:
    """The JSON schema of {"name": ..., "arguments": {...}} for any of the functions."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": function.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def read_call(text: str) -> dict | None:
    """A call in OpenAI's form; None if the text is not one (cut short, for example)."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": arguments}}


class CallReader:
    """Splits an answer, while it is written, into text and the calls between <tool_call> and </tool_call>."""

    def __init__(self, all_of_it: bool = False):
        """all_of_it: the whole answer is one call, without the tags."""
        self._held = ""
        self._inside = self._all = all_of_it

    def push(self, text: str, last: bool = False) -> tuple[str, list[dict]]:
        """-> (text to show, complete calls). last: no text follows, so what was held back is shown or read now."""
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
            call = read_call(rest) if self._inside else None
            calls += [call] if call else []
            shown += "" if call else (OPEN + rest if self._inside and not self._all else rest)
        elif not self._inside:
            keep = next((size for size in range(min(len(OPEN) - 1, len(self._held)), 0, -1) if self._held.endswith(OPEN[:size])), 0)
            cut = len(self._held) - keep
            shown, self._held = shown + self._held[:cut], self._held[cut:]
        return shown, calls
