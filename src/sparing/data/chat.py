"""Chat templates: they turn messages into the text that a model was taught to answer. Templates are Jinja, run in its sandbox.

A run folder holds one as chat_template.jinja or inside tokenizer_config.json (Hugging Face's places). A run without one gets PLAIN.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sparing.base.config import UserError
from sparing.base.files import POINTER, is_pointer
from sparing.base.run import RunFolder
from sparing.data.tokenizer import Tokenizer

MAX_BYTES = 1 << 20
MARK = "\ufdd0"
"""A code point that is no character (Unicode 23.7). It splits names of special tokens inside messages, and is taken out again."""
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
            return _small(alone)
        if settings.exists():
            template = json.loads(_small(settings)).get("chat_template")
            if isinstance(template, list):  # several under names
                template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
            return template if isinstance(template, str) else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{run}: its chat template cannot be read: {error}") from None
    return None


def _small(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES >> 20} MiB: not a chat template")
    if is_pointer(path):
        raise UserError(f"{path}: {POINTER}")
    return path.read_text(encoding="utf-8")


class ChatTemplate:
    """`render` turns messages into text. `plain`: the run has no template of its own."""

    def __init__(self, text: str | None):
        """Raises UserError for text that is no Jinja template."""
        self.plain = text is None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(PLAIN if text is None else text)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is no Jinja template: {error}") from None

    def render(self, messages: list[dict[str, Any]], tools: list[dict] | None = None, bos_token: str = "", eos_token: str = "") -> str:
        """The text before the answer, with the words that begin one. Raises UserError when the template refuses."""
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token
            )
        except UserError:
            raise
        except Exception as error:  # a template is a program: it can fail in every way that one can
            raise UserError(f"the chat template cannot show these messages: {str(error)[:200]}") from None

    def encode(self, tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict] | None = None) -> list[int]:
        """Token ids of `render`. Special tokens are those that the template writes: their names inside a message stay text.

        A run's own template says everything, its beginning too; before the plain one goes the token that begins any prompt.
        """
        names = sorted(tokenizer.special, key=len, reverse=True)
        special = re.compile("|".join(map(re.escape, names)))

        def marked(value):
            if isinstance(value, str):
                return special.sub(lambda match: match[0][0] + MARK + match[0][1:], value.replace(MARK, ""))
            if isinstance(value, dict):
                return {key: marked(item) for key, item in value.items()}
            return [marked(item) for item in value] if isinstance(value, list) else value

        bos, eos = tokenizer.bos_id, tokenizer.eos_ids[0]
        ends = {"bos_token": "" if bos is None else tokenizer.token_name(bos), "eos_token": tokenizer.token_name(eos)}
        text = self.render(marked(messages), marked(tools) if tools else None, **ends)
        ids, at = list(tokenizer.start) if self.plain else [], 0
        for match in special.finditer(text):
            ids += [*tokenizer.encode(text[at : match.start()].replace(MARK, "")), tokenizer.special[match[0]]]
            at = match.end()
        return [*ids, *tokenizer.encode(text[at:].replace(MARK, ""))]


def _refuse(message: str):
    raise UserError(f"the chat template refuses these messages: {message[:200]}")
