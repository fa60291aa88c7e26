"""The models against a real JSON Schema implementation on the document's schemas, and what becomes of pydantic's errors."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette")

from sparing.serve.errors import ApiError
from sparing.serve.requests import MAX_ERRORS, Chat, Completion, check

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-3, 3) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "role", "type", "text"]), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.just("user") | VALUES, "content": VALUES}), max_size=2)
BODIES = {
    Chat: st.fixed_dictionaries({"messages": MESSAGES}, optional={name: VALUES for name in Chat.model_fields if name != "messages"}),
    Completion: st.fixed_dictionaries({"prompt": VALUES}, optional={name: VALUES for name in Completion.model_fields if name != "prompt"}),
}
SAY = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("model", [Chat, Completion])
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_it_accepts_what_the_schema_accepts(model, data):
    """The reference is jsonschema-rs, which comes with schemathesis."""
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    body = data.draw(BODIES[model])
    good = jsonschema_rs.is_valid(model.model_json_schema(), body)
    try:
        check(body, model)
        assert good, body
    except ApiError as error:
        assert not good, (body, error.message)
        assert error.status == 400 and error.message and "\n" not in error.message


def test_nulls_vanish_and_whole_floats_become_integers():
    found = check({"model": "m", "prompt": [1.0, 2], "seed": 3.0, "temperature": None, "stop": None}, Completion)
    assert found == {"model": "m", "prompt": [1, 2], "seed": 3}
    assert type(found["seed"]) is int


@pytest.mark.parametrize("empty", [None, "", []])
def test_empty_is_as_absent_and_the_schema_says_so(empty):
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    for model, name in ((Completion, "suffix"), (Chat, "functions")):
        body = ({"prompt": "a"} if model is Completion else SAY) | {name: empty}
        assert jsonschema_rs.is_valid(model.model_json_schema(), body) and name not in check(body, model)
        assert not jsonschema_rs.is_valid(model.model_json_schema(), body | {name: "b"})


def test_the_rest_is_as_the_client_sent_it():
    """Templates write messages and tools into the prompt: order, fields of others' and nulls inside a schema are the client's."""
    parameters = {"required": ["a"], "properties": {"a": {"enum": ["x", None]}}, "default": None}
    tool = {"function": {"strict": True, "parameters": parameters, "description": None, "name": "f"}, "type": "function"}
    messages = [{"content": "hi", "reasoning": {"x": None}, "role": "user", "tool_calls": None, "weight": None}]
    found = check({"tools": [tool], "messages": messages}, Chat)
    assert found["messages"] == [{"content": "hi", "reasoning": {"x": None}, "role": "user"}]
    assert str(found["tools"]) == str([{"function": {"strict": True, "parameters": parameters, "name": "f"}, "type": "function"}])
    schema = {"type": "json_schema", "json_schema": {"schema": parameters}}
    assert check(SAY | {"response_format": schema}, Chat)["response_format"] == schema


@pytest.mark.parametrize(
    ("change", "says", "param"),
    [
        ({"stop": ["a", 5]}, "'stop[1]' must be a string, not 5.", "stop[1]"),
        ({"stop": 5}, "'stop' must be a string or an array, not 5.", "stop"),
        ({"stop": ["a", None]}, "'stop[1]' must be a string, not null.", "stop[1]"),
        ({"temperature": True}, "'temperature' must be a number, not true.", "temperature"),
        ({"stop": False}, "'stop' must be a string or an array, not false.", "stop"),
        ({"stop": ["a"] * 17}, "'stop' must have at most 16 entries, not 17.", "stop"),
        ({"prompt": ["a", 5]}, "'prompt[1]' must be a string or an array, not 5.", "prompt[1]"),
        ({"prompt": [5, "a"]}, "'prompt[1]' must be an integer, not \"a\".", "prompt[1]"),
        ({"prompt": ["a", [5, -1]]}, "'prompt[1][1]' must be at least 0, not -1.", "prompt[1][1]"),
        ({"temperature": "1"}, "'temperature' must be a number, not \"1\".", "temperature"),
        ({"logit_bias": {"5": 0, "x": 0}}, "A key of 'logit_bias' must match ^[0-9]{1,9}$, not \"x\".", "logit_bias"),
        ({"response_format": {}}, "Missing required parameter: 'response_format.type'.", "response_format.type"),
        (
            {"response_format": {"type": "xml"}},
            "'response_format.type' must be one of text, json_object, json_schema, grammar, not \"xml\".",
            "response_format.type",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "'response_format.json_schema.schema' must be an object, not 5.",
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": "true"}}},
            "'response_format.json_schema.strict' must be true or false, not \"true\".",
            "response_format.json_schema.strict",
        ),
        (
            {"response_format": {"type": None}},
            "'response_format.type' must be one of text, json_object, json_schema, grammar, not null.",
            "response_format.type",
        ),
        (
            {"response_format": {"type": "text", "schema": {"type": "object"}}},
            "Unrecognized request argument supplied: schema",
            "response_format.schema",
        ),
        ({"stop": ""}, "'stop' must not be empty.", "stop"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "Missing required parameter: 'response_format.json_schema.schema'.",
            "response_format.json_schema.schema",
        ),
    ],
)
def test_the_complaint_is_about_what_came_furthest(change, says, param):
    with pytest.raises(ApiError) as error:
        check({"prompt": "hi"} | change, Completion)
    assert (error.value.message, error.value.param) == (says, param)


def test_bodies_of_nothing_but_mistakes_are_refused_in_a_moment():
    """A server that wrote an error for each would answer nobody else for seconds."""
    many = dict.fromkeys(map(str, range(20 * MAX_ERRORS)), "x")
    for body in (many, SAY | {"logit_bias": many}, {"messages": [many] * 3}, {"messages": [5] * 200_000}, SAY | {"tools": [5] * 200_000}):
        start = time.process_time()
        with pytest.raises(ApiError) as error:
            check(body, Chat)
        assert len(error.value.message) < 200 and time.process_time() - start < 2


def test_a_long_chat_is_checked_in_a_moment():
    body = {"messages": [{"role": "user", "content": "some words of a chat " * 10}] * 100}
    times = []
    for _ in range(20):
        start = time.process_time()
        check(body, Chat)
        times.append(time.process_time() - start)
    assert min(times) < 2e-3, "half a millisecond on an idle core"
