"""The checker against a real JSON Schema implementation, and what it adds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette")

from sparing.serve.errors import ApiError
from sparing.serve.requests import CHAT, COMPLETION, maybe
from sparing.serve.schema import check

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-3, 3) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "role", "type", "text"]), inner, max_size=3),
    max_leaves=6,
)
BODIES = st.fixed_dictionaries(
    {"messages": st.lists(st.fixed_dictionaries({"role": st.just("user") | VALUES, "content": VALUES}), max_size=2)},
    optional={name: VALUES for name in CHAT["properties"] if name != "messages"},
)


@given(BODIES)
@settings(max_examples=300, deadline=None)
def test_it_accepts_what_the_schema_accepts(body):
    """The reference is jsonschema-rs, which comes with schemathesis."""
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    good = jsonschema_rs.is_valid(CHAT, body)
    try:
        check(body, CHAT)
        assert good, body
    except ApiError as error:
        assert not good, (body, error.message)
        assert error.status == 400 and error.message


def test_nulls_vanish_and_whole_floats_become_integers():
    found = check({"model": "m", "prompt": [1.0, 2], "seed": 3.0, "temperature": None, "stop": None}, COMPLETION)
    assert found == {"model": "m", "prompt": [1, 2], "seed": 3}
    assert type(found["seed"]) is int


def test_the_complaint_is_about_what_came_furthest():
    for value, says in ((["a", 5], "'x[1]' must be a string"), (5, "'x' must be"), ([], "0 to 4")):
        schema = maybe({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 0, "maxItems": 4}]})
        if value == []:
            value = ["a"] * 5
        with pytest.raises(ApiError, match=says.replace("[", r"\[")):
            check(value, schema, "x")
