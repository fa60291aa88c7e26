"""Calls of functions read out of an answer as it comes, wherever the pieces are cut."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette")

from sparing.serve.tools import CallReader, read_call

CALL = '{"name": "weather", "arguments": {"town": "Lima"}}'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "names"),
    [
        ("no call, a < b and <tool", "no call, a < b and <tool", []),
        (f"I look.<tool_call>{CALL}</tool_call>", "I look.", ["weather"]),
        (f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call> done", "\n done", ["weather", "weather"]),
        (f"<tool_call>{CALL}", "", ["weather"]),
        ('<tool_call>{"name": "wea', '<tool_call>{"name": "wea', []),
        ("<tool_call>nonsense</tool_call>!", "<tool_call>nonsense</tool_call>!", []),
    ],
)
def test_text_and_calls_are_told_apart(text, shown, names, size):
    reader, said, calls = CallReader(), "", []
    for at in range(0, len(text), size):
        more, found = reader.push(text[at : at + size])
        said, calls = said + more, calls + found
    more, found = reader.push("", last=True)
    assert said + more == shown
    assert [call["function"]["name"] for call in calls + found] == names
    assert len({call["id"] for call in calls + found}) == len(names)


def test_an_answer_that_must_be_a_call():
    reader = CallReader(all_of_it=True)
    assert reader.push(CALL[:9]) == ("", []) and reader.push(CALL[9:]) == ("", [])
    text, [call] = reader.push("", last=True)
    assert text == "" and call["function"] == {"name": "weather", "arguments": '{"town": "Lima"}'}
    reader = CallReader(all_of_it=True)
    reader.push(CALL[:9])
    assert reader.push("", last=True) == ("", []) and reader.unfinished, "cut before its name was known"


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("end", range(len(CALL) + 1))
def test_a_call_that_is_cut_is_a_call_without_its_end_and_no_text(forced, end):
    reader = CallReader(all_of_it=forced)
    said, calls = reader.push(("" if forced else "I look.<tool_call>") + CALL[:end])
    text, calls = reader.push("", last=True, cut=True)
    assert said + text == ("" if forced else "I look.") and reader.unfinished == (end < len(CALL))
    start = CALL.index('{"town"')
    arguments = CALL[start : min(end, len(CALL) - 1)]
    wanted = [{"name": "weather", "arguments": arguments}] if end >= start - 1 else []
    assert [call["function"] for call in calls] == wanted


def test_a_cut_inside_the_closing_tag_and_text_that_only_looks_like_a_call():
    reader = CallReader()
    reader.push(f"<tool_call>{CALL}</tool_")
    text, [call] = reader.push("", last=True, cut=True)
    assert text == "" and call["function"]["arguments"] == '{"town": "Lima"}' and not reader.unfinished
    reader = CallReader()
    reader.push("<tool_call> is a tag")
    assert reader.push("", last=True, cut=True) == ("<tool_call> is a tag", [])


def test_what_is_no_call():
    for text in ("", "5", "[]", "{}", '{"name": 5}', '{"arguments": {}}', "[" * 5000):
        assert read_call(text) is None
    assert read_call('{"name": "f", "arguments": "{}"}')["function"]["arguments"] == "{}"
