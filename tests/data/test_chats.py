"""Conversations: every published form becomes OpenAI's messages, what is none is counted, no question is on both sides."""

import gzip
import json

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.base.config import UserError
from sparing.data.chats import Unusable, chat_of, chats, looks_like_chats, order, scan_chats
from sparing.data.sources import Row, Tally

CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}


def read(value) -> list[dict]:
    return chat_of(Row(value, "a.jsonl", 1)).messages


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}, "messages"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "ShareGPT"),
        ({"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}, "ShareGPT"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "Alpaca"),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt/completion"),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}, "prompt/completion"),
        ({"question": "Hi", "answer": "Hello", "source": "x"}, "question/answer"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Hello"}]},
            "messages",
        ),
    ],
)
def test_forms_of_the_same_conversation(row, kind):
    chat = chat_of(Row(row, "a.jsonl", 1))
    assert chat.messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert (chat.kind, chat.first, chat.tools) == (kind, "Hi", None)


def test_what_surrounds_a_question():
    alpaca = {"system": "Be brief.", "instruction": "Add", "input": "1, 2", "output": "3", "history": [["a", "b"]]}
    assert [message["content"] for message in read(alpaca)] == ["Be brief.", "a", "b", "Add\n\n1, 2", "3"]
    developer = {"messages": [{"role": "developer", "content": "x"}, *read({"prompt": "a", "completion": "b"})]}
    assert read(developer)[0]["role"] == "system"


def test_calls_of_tools():
    """OpenAI's, with null content; ShareGPT's turns that are calls; definitions as the text of a list."""
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL, "extra": None}]}
    result = {"role": "tool", "content": "3", "tool_call_id": "1"}
    row = {"messages": [{"role": "user", "content": "1 + 2?"}, called, result], "tools": json.dumps([{"type": "function"}])}
    chat = chat_of(Row(row, "a", 1))
    assert chat.messages[1]["content"] == "" and chat.messages[1]["tool_calls"] == [{"id": "1", "type": "function", "function": CALL}]
    assert chat.tools == [{"type": "function"}]
    turns = [
        {"from": "human", "value": "1 + 2?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "3"},
    ]
    shared = read({"conversations": [*turns, {"from": "gpt", "value": "It is 3."}]})
    assert [message["role"] for message in shared] == ["user", "assistant", "tool", "assistant"]
    assert shared[1]["tool_calls"][0]["function"] == CALL


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "not a JSON object"),
        ({"text": "a document"}, r"no conversation in it \(keys: text\)"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no answer"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}]}, "no answer"),
        ({"messages": [{"role": "assistant", "content": "Hello"}]}, "no question before"),
        ({"messages": [{"role": "narrator", "content": "Hi"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text"),
        ({"messages": [{"role": "user", "content": 5}]}, "not text"),
        ({"messages": [["user", "Hi"]]}, "a message is no object"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]}, "names no function"),
        ({"conversations": [{"from": "moderator", "value": "Hi"}]}, "unknown speaker"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "a function call is not JSON"),
        ({"instruction": "Hi", "output": None}, "no answer"),
        ({"instruction": None, "input": "a text", "output": "b"}, "instruction or input is not text"),
        ({"instruction": "Hi", "input": {"a": 1}, "output": "b"}, "instruction or input is not text"),
        ({"prompt": "Hi", "completion": ""}, "no answer"),
        ({"prompt": "Hi", "completion": "half \ud83d"}, "not Unicode"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "{"}, "tools is not JSON"),
    ],
)
def test_what_is_no_conversation(row, reason):
    with pytest.raises(Unusable, match=reason):
        read(row)


def pairs(count: int, question: str = "What is {}?") -> str:
    return "".join(json.dumps({"prompt": question.format(i), "completion": f"Number {i}."}) + "\n" for i in range(count))


FIELDS = (
    "messages", "tools", "conversations", "system", "instruction", "input", "output", "history", "prompt", "completion", "question",
    "answer", "response", "chosen", "rejected",
)  # fmt: skip
TURN_KEYS = ("role", "from", "content", "value", "tool_calls", "function", "name", "text")
FORMS = (
    ("messages",), ("conversations",), ("instruction", "output"), ("prompt", "completion"), ("question", "answer"),
    ("prompt", "chosen", "rejected"),
)  # fmt: skip
VALUES = st.recursive(
    st.sampled_from([None, True, 0, 1.5, "", "user", "assistant", "human", "gpt", "function_call", "[5]", "x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(TURN_KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from(FORMS))
def test_any_row_is_a_conversation_or_says_why_not(data, form):
    row = data.draw(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3)) | {name: data.draw(VALUES) for name in form}
    try:
        chat = chat_of(Row(row, "a.jsonl", 1))
    except Unusable:
        return
    assert chat.raw and isinstance(chat.first, str) and chat.common >= 0


def test_history_that_is_no_list():
    with pytest.raises(Unusable, match="history"):
        chat_of(Row({"instruction": "a", "output": "b", "history": 5}, "a.jsonl", 1))


def test_files(tmp_path):
    """Plain and compressed lines, an array in a .json, Parquet with its nulls; the rest is counted by reason."""
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text(pairs(2) + "{\n" + '{"text": "x"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(pairs(2).encode()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(pairs(2).encode()))
    (tmp_path / "d.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}], indent=1))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "name": "x"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "e.parquet")
    (tmp_path / "f.txt").write_text("text")
    tally = Tally()
    found = list(chats([str(tmp_path)], tally))
    assert len(found) == 8 and found[-1].messages == messages
    assert tally.total == 3 and {"not JSON", "no conversation in it"} < tally.reasons.keys()
    assert any("not from .txt files" in reason for reason in tally.reasons)
    assert looks_like_chats([str(tmp_path / "a.jsonl")], "text")
    assert not looks_like_chats([str(tmp_path / "a.jsonl")], "prompt") and not looks_like_chats([str(tmp_path / "f.txt")], "text")


def test_no_question_is_on_both_sides(tmp_path):
    (tmp_path / "a.jsonl").write_text(pairs(300) + pairs(300).replace("Number", "It is"))
    facts = scan_chats([str(tmp_path / "a.jsonl")], 0.05)
    out = [facts.split.holds_out(chat.first_hash) for chat in chats([str(tmp_path / "a.jsonl")])]
    assert out[:300] == out[300:], "the same questions"
    assert 2 * 5 <= sum(out) == facts.held_out_documents <= 2 * 30
    assert facts.documents == 600 and facts.kinds == {"prompt/completion": 600}


def test_what_is_known_of_them_changes_with_them(tmp_path):
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_text(pairs(50))
    other.write_text(pairs(5, "Who is {}?"))
    first = scan_chats([str(file)], 0.05)
    assert scan_chats([str(file)], 0.05).content == first.content
    with_val = scan_chats([str(file)], 0.05, [str(other)])
    assert with_val.content != first.content and with_val.held_out_documents == 5 and with_val.train_bytes > first.train_bytes
    other.write_text(pairs(6, "Who is {}?"))
    assert scan_chats([str(file)], 0.05, [str(other)]).content != with_val.content
    file.write_text(pairs(51))
    assert scan_chats([str(file)], 0.05).content != first.content
    assert first.bound(2.0) is None
    half = first.bound(0.5)
    assert 5 < sum(order(chat) < half for chat in first.sample) < 45


def test_refusals(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match=r"no usable conversation in .*1 × no conversation in it \(keys: text\), in .*a.jsonl:1"):
        scan_chats([str(file)], 0.05)
    file.write_text(pairs(1) * 9)
    with pytest.raises(UserError, match=r"all questions are alike: none can be held out; name .*--val"):
        scan_chats([str(file)], 0.05)
