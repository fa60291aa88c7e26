"""Chat templates: they turn messages into the text that a model was taught to answer. Templates are Jinja, run in its sandbox.

A run folder holds one as chat_template.jinja or inside tokenizer_config.json (Hugging Face's places). A run without one gets PLAIN.
"""

from __future__ import annotations

import json
import re
from typing import Any

import jinja2

from sparing.base.config import UserError
from sparing.base.files import read_text
from sparing.base.run import RunFolder
from sparing.data.tokenizer import Tokenizer
from sparing.data.traced import Traced, TracedEnvironment, concat, own

MAX_BYTES = 1 << 20
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "model")
"""Roles that count as the template's own words: some templates write control tokens around them (`<|{{ role }}|>`)."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients send a message's reasoning; templates read the first two."""
PLAIN = r"""{%- if tools %}System: Functions that you can call, as JSON:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
To call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call>{{ "\n\n" }}{% endif %}
{%- for message in messages %}{{ message.role | capitalize }}: {{ message.content or "" }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{{ "\n\n" }}
{%- endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""
PLAIN_STOPS = ("\nUser:", "\nSystem:")
"""Stop strings for the plain template: a model that was never taught to chat would go on with the next speaker's words."""


def template_text(run: RunFolder) -> str | None:
    """The run folder's own template. Raises UserError for a file that cannot be read."""
    alone, settings = run.path / "chat_template.jinja", run.path / "tokenizer_config.json"
    try:
        if alone.exists():
            return read_text(alone, limit=MAX_BYTES)
        if settings.exists():
            template = json.loads(read_text(settings, limit=MAX_BYTES)).get("chat_template")
            if isinstance(template, list):  # several under names
                template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
            return template if isinstance(template, str) else None
    except UserError:
        raise
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{run}: its chat template cannot be read: {error}") from None
    return None


class Arguments(dict):
    """Arguments of a tool call in the history: an object for templates that iterate or dump them, the client's text for those that print
    them."""

    def __init__(self, values: dict, text: str):
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other):
        return self._text + other

    def __radd__(self, other):
        return other + self._text


def _arguments(text: Any) -> Any:
    """An object for the text of one; anything else as it is."""
    try:
        values = json.loads(text or "{}") if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return text
    return Arguments(values, text or "{}") if isinstance(values, dict) else text


def flat(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its content as one text, which is what templates expect. Content parts are objects with a text each."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return {**message, "content": content, "role": "system" if message["role"] == "developer" else message["role"]}


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates expect it."""
    role, calls = message.get("role"), message.get("tool_calls")
    message = message | ({"role": own(role)} if role in ROLES else {})
    if reasoning := next((message[name] for name in REASONING if message.get(name) is not None), None):
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    if not isinstance(calls, list):
        return message
    functions = [call["function"] | {"arguments": _arguments(call["function"].get("arguments"))} for call in calls]
    return message | {"tool_calls": [call | {"function": function} for call, function in zip(calls, functions, strict=True)]}


class ChatTemplate:
    """`render` turns messages into text. `plain`: the run has no template of its own."""

    def __init__(self, text: str | None):
        """Raises UserError for text that is no Jinja template."""
        self.plain = text is None
        environment = TracedEnvironment()
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(PLAIN if text is None else text)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is no Jinja template: {error}") from None

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict] | None = None, bos_token: str = "", eos_token: str = "", ask: bool = True
    ) -> Traced:
        """The text of the messages. ask: with the words that begin an answer. Raises UserError when the template refuses."""
        try:
            return self._template.render(
                messages=[_for_template(message) for message in messages], tools=tools, documents=None, add_generation_prompt=ask,
                bos_token=own(bos_token), eos_token=own(eos_token),
            )  # fmt: skip
        except UserError:
            raise
        except Exception as error:  # a template is a program: it can fail in every way that one can
            raise UserError(f"the chat template cannot show these messages: {str(error)[:200]}") from None

    def text(self, tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict] | None = None, ask: bool = True) -> Traced:
        """`render` with the names of the tokenizer's tokens."""
        bos, eos = tokenizer.bos_id, tokenizer.eos_ids[0]
        bos_token = "" if bos is None else tokenizer.token_name(bos)
        return concat((self.render(messages, tools or None, bos_token, tokenizer.token_name(eos), ask),))

    def encode(self, tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict] | None = None) -> list[int]:
        """Token ids of the text before the answer.

        A run's own template says everything, its beginning too; before the plain one goes the token that begins any prompt.
        """
        return [*self.start(tokenizer), *token_ids(tokenizer, self.text(tokenizer, messages, tools))]

    def start(self, tokenizer: Tokenizer) -> list[int]:
        """What goes before the text."""
        return list(tokenizer.start) if self.plain else []


Known = dict[tuple[str, bool], list[int]]
"""Token ids by text, and whether it goes on what stands before it."""


def token_ids(tokenizer: Tokenizer, rendered: Traced, before: int | None = None, known: Known | None = None) -> list[int]:
    """Token ids of a rendered text. Special tokens are those that the template writes: their names inside a message stay text.

    before: the token that the text stands behind, where there is one. known: ids of texts between special tokens, which this call adds to:
    a conversation is rendered once for each of its answers."""
    known = {} if known is None else known

    def encode(part: str, goes_on: bool) -> list[int]:
        if (part, goes_on) not in known:
            known[part, goes_on] = tokenizer.encode(part, goes_on)
        return known[part, goes_on]

    goes_on = before is not None and before not in tokenizer.special.values()
    names = sorted(tokenizer.special, key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, names)) or "(?!)")
    text, ids, begin, at = rendered.plain, [], 0, 0
    while match := special.search(text, at):
        at = match.start() + 1
        if all(rendered.own[match.start() : match.end()]):
            ids += [*encode(text[begin : match.start()], goes_on), tokenizer.special[match[0]]]
            begin, at, goes_on = match.end(), match.end(), False
    return [*ids, *encode(text[begin:], goes_on)]


def taught(tokenizer: Tokenizer) -> str:
    """The plain template for a run that learns to chat: as PLAIN, but with the tokens that begin a text and end an answer.

    A run that has it as its own needs no stop strings."""
    end = r'{% endfor %}{{ "\n\n" }}'
    ended = PLAIN.replace(end, end.replace("{{", '{{ eos_token if message.role == "assistant" }}{{', 1))
    assert ended != PLAIN
    return ("{{ bos_token }}" if tokenizer.start else "") + ended


def _refuse(message: str):
    raise UserError(f"the chat template refuses these messages: {message[:200]}")
