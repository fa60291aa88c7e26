"""Jinja in which a text knows which of its characters the template wrote, so that a message cannot pass for the template's words.

Whatever a template does to a message (replace, lower, reverse, join, slices), its characters stay the message's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Traced(str):
    """A text and, in `own`, one byte for each character: 1 if the template wrote it. Plain strings come from outside.

    Operations that are not listed here give plain strings: a control token may be lost by that, but none can be made.
    """

    own: bytes

    def __new__(cls, text: str = "", own: bytes | None = None):
        made = super().__new__(cls, text)
        made.own = bytes(len(text)) if own is None else own
        return made

    def __str__(self) -> Traced:
        return self

    @property
    def plain(self) -> str:
        """The text alone. (`"".join(self)` would make a `Traced` of each character.)"""
        return super().__str__()

    def __add__(self, other):
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other):
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times):
        return Traced(super().__mul__(times), self.own * times)

    __rmul__ = __mul__

    def __getitem__(self, key):
        return Traced(super().__getitem__(key), self.own[key] if isinstance(key, slice) else bytes([self.own[key]]))

    def __iter__(self) -> Iterator[Traced]:
        return (self[at] for at in range(len(self)))

    def join(self, parts: Iterable[str]) -> Traced:
        joined: list[str] = []
        for part in parts:
            joined += [self, part]
        return concat(joined[1:])

    # parts of the text

    def lstrip(self, chars=None):
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars=None):
        return self[: len(super().rstrip(chars))]

    def strip(self, chars=None):
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix):
        return self[len(prefix) :] if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix):
        return self[: -len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep=None, maxsplit=-1):
        return self._parts(super().split(sep, maxsplit), sep)

    def rsplit(self, sep=None, maxsplit=-1):
        return self._parts(super().rsplit(sep, maxsplit), sep)

    def partition(self, sep):
        return tuple(self._parts(super().partition(sep), ""))

    def rpartition(self, sep):
        return tuple(self._parts(super().rpartition(sep), ""))

    def splitlines(self, keepends=False):
        lines = self._parts(super().splitlines(True), "")
        return lines if keepends else [line[: len(short)] for line, short in zip(lines, super().splitlines(), strict=True)]

    def _parts(self, texts: Iterable[str], sep: str | None) -> list[Traced]:
        """`texts`, which follow each other in this one with `sep` (None: blanks) between them."""
        parts, at = [], 0
        for text in texts:
            at = self.index(text, at) if sep is None else at
            parts.append(self[at : at + len(text)])
            at += len(text) + len(sep or "")
        return parts

    def replace(self, old, new, count=-1):
        return concat((new,)).join(self.split(old, count)) if old else super().replace(old, new, count)

    # each character for itself

    def lower(self):
        return self._alike(super().lower())

    def upper(self):
        return self._alike(super().upper())

    def capitalize(self):
        return self._alike(super().capitalize())

    def title(self):
        return self._alike(super().title())

    def _alike(self, text: str) -> str:
        return Traced(text, self.own) if len(text) == len(self) else text


def own(text: str) -> Traced:
    """A text that the template wrote."""
    return Traced(text, b"\1" * len(text))


def concat(parts: Iterable[str]) -> Traced:
    """The parts as one text; plain strings come from outside."""
    parts = list(parts)
    return Traced("".join(parts), b"".join(part.own if isinstance(part, Traced) else bytes(len(part)) for part in parts))


class _Code(CodeGenerator):
    """Writes the literals of a template as its own words."""

    def visit_Const(self, node, frame) -> None:
        value = node.as_const(frame.eval_ctx)
        if isinstance(value, str):
            self.write(f"environment.own({value!r})")
        else:
            super().visit_Const(node, frame)

    def visit_Concat(self, node, frame) -> None:
        self.write("environment.join((")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write("))")

    def _output_const_repr(self, group) -> str:
        return f"environment.own({''.join(group)!r})"


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: marks an answer for training (transformers); here it changes nothing."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _join(values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> Traced:
    return concat((d,)).join(map(str, values))


@jinja2.pass_environment
def _join_filter(environment, value, d="", attribute=None):
    return _join(value if attribute is None else map(make_attrgetter(environment, attribute), value), d)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class TracedEnvironment(ImmutableSandboxedEnvironment):
    """What `apply_chat_template` of transformers gives a template, in Jinja's sandbox. Rendered texts are `Traced`."""

    code_generator_class = _Code
    concat = staticmethod(concat)
    own = staticmethod(own)
    join = staticmethod(_join)

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters |= {"tojson": _to_json, "join": _join_filter}
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
