"""Calls of functions read out of an answer as it comes, wherever the pieces are cut."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette")

from sparing.serve.tools import CallReader, call_schema, read_call

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
    assert reader.push("", last=True) == (CALL[:9], []), "cut short: shown as it is"


def test_what_is_no_call():
    for text in ("", "5", "[]", "{}", '{"name": 5}', '{"arguments": {}}', "[" * 5000):
        assert read_call(text) is None
    assert read_call('{"name": "f", "arguments": "{}"}')["function"]["arguments"] == "{}"


def test_schemas_of_calls():
    one = call_schema([{"name": "f", "parameters": {"type": "object", "required": ["x"]}}])
    assert one["properties"]["arguments"]["required"] == ["x"] and one["properties"]["name"] == {"const": "f"}
    assert len(call_schema([{"name": "f"}, {"name": "g"}])["anyOf"]) == 2
