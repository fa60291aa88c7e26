"""Texts that know which of their characters the template wrote: each operation gives str's text, and the right owner of each character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.data.traced import Traced, TracedEnvironment, concat, own

# Capitals, digits and line ends are the template's, the rest comes from outside: so the text itself shows whose it is.
OWN = "ABX1\n"
texts = st.text(st.sampled_from("ABX1\nabx ,"), max_size=12)
OPERATIONS = [
    lambda s, t: s + t, lambda s, t: "x" + s, lambda s, t: s * 3, lambda s, t: s[1:], lambda s, t: s[::-1], lambda s, t: s[:3],
    lambda s, t: s.join([t, s, t]), lambda s, t: s.strip(), lambda s, t: s.lstrip("Aa"), lambda s, t: s.rstrip("\n"),
    lambda s, t: s.removeprefix("A"), lambda s, t: s.removesuffix("a"), lambda s, t: s.split(), lambda s, t: s.split(None, 1),
    lambda s, t: s.split("a"), lambda s, t: s.split("AB", 1), lambda s, t: s.rsplit(), lambda s, t: s.rsplit(None, 2),
    lambda s, t: s.rsplit("a", 1), lambda s, t: s.partition("X"), lambda s, t: s.rpartition("X"), lambda s, t: s.splitlines(),
    lambda s, t: s.splitlines(True), lambda s, t: s.replace("a", t), lambda s, t: s.replace("AB", "x", 1), lambda s, t: list(s),
]  # fmt: skip


def traced(text: str) -> Traced:
    return Traced(text, bytes(char in OWN for char in text))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(texts, texts)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_character_keeps_its_owner(operation, s, t):
    found, want = operation(traced(s), traced(t)), operation(s, t)
    assert found == want and type(found) in (Traced, list, tuple)
    for text in found if isinstance(found, list | tuple) else [found]:
        assert text.own == bytes(char in OWN for char in text)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.text(max_size=8))
@pytest.mark.parametrize("name", ["lower", "upper", "title", "capitalize", "swapcase", "casefold", "expandtabs"])
def test_changed_characters_are_the_templates_only_where_each_stands_for_one(name, text):
    found = getattr(own(text), name)()
    assert found == getattr(text, name)()
    assert not isinstance(found, Traced) or found.own == b"\1" * len(text)


def test_what_comes_from_outside():
    assert concat([own("<"), "user", own(">")]).own == b"\1\0\0\0\0\1"
    assert Traced("abc").own == bytes(3) and str(own("a")).own == b"\1"
    render = TracedEnvironment().from_string("{{ x }}{{ 5 }}{{ none }}T{{ 'T' ~ x ~ 1 }}{{ ['a', x] | join('-') }}").render
    assert (render(x="u"), render(x="u").own) == ("u5NoneTTu1a-u", bytes([0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0]))
