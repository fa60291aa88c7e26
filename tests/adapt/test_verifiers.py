"""Verifiers that may hang, and the checker of JSON schemas beside another one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.adapt import judge
from sparing.adapt.json_schema import BadSchema, check_schema, keeps_to, parse_json
from sparing.adapt.verifiers import Problem, check, verify
from sparing.base.config import UserError

R1 = Problem("", r"<think>.*</think>\s*<answer>.*</answer>", "format")
NUMBER = Problem("", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}', "schema")


@pytest.fixture(autouse=True, scope="module")
def _ended():
    yield
    from sparing.adapt.verifiers import JUDGE

    JUDGE.end()


@pytest.mark.parametrize(
    "problem, text, verdict",
    [
        (R1, "<think>so\nit is</think> <answer>5</answer>", (1, "right")), (R1, "5", (0, "another form")),
        (NUMBER, '{"a": 1}', (1, "right")), (NUMBER, 'Here:\n```json\n{"a": "1"}\n```', (0, "against the schema")),
        (NUMBER, '{"a": NaN}', (0, "no JSON")), (NUMBER, "[" * 100_000, (0, "no JSON")), (NUMBER, '{"a": "\ud800', (0, "no JSON")),
    ],
)  # fmt: skip
def test_form_and_schema(problem, text, verdict):
    check(problem)
    assert verify(problem, text) == verdict


def test_a_verifier_that_hangs_is_ended_and_the_next_one_is_not(monkeypatch):
    asked = judge.Judge()
    monkeypatch.setattr(judge, "WALL_S", 1.0)
    try:
        assert asked.ask("format", "a", "a") == (True, "right")
        assert asked.ask("format", "(a+)+b", "a" * 40) == (False, "out of time")
        assert asked.ask("format", "(?s).*", "x" * 100_000) == (True, "right")
    finally:
        asked.end()


@pytest.mark.parametrize(
    "answer, text, reward",
    [
        ("\\frac{1}{2}", "so it is $0.5$", 1), ("\\frac{1}{2}", "\\boxed{\\frac{2}{4}}", 1), ("\\frac{1}{2}", "\\boxed{2}", 0),
        ("72", "#### 72", 1), ("72", "nothing", 0), ("x+1", "$1 + x$", 1),
    ],
)  # fmt: skip
def test_formulas_by_math_verify(answer, text, reward):
    pytest.importorskip("math_verify")
    assert verify(Problem("", answer, "math"), text).reward == reward


def test_without_math_verify_it_is_one_line(monkeypatch):
    monkeypatch.setattr("sparing.adapt.verifiers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the math-verify package"):
        check(Problem("", "1", "math"))


@pytest.mark.parametrize(
    "schema, said",
    [
        ({"typ": "object"}, "not known"), ({"type": "text"}, "type is"), ([], "no schema"), ({"$ref": "#/$defs/a"}, "names nothing"),
        ({"$ref": "http://x"}, "not within"), ({"minimum": "1"}, "minimum is"), ({"pattern": "("}, "pattern is"),
        ({"anyOf": []}, "no list"),
        ({"properties": []}, "no object"), ({"required": "a"}, "required is"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_used(schema, said):
    with pytest.raises(BadSchema, match=said):
        check_schema(schema)


def test_a_schema_without_end_is_no_hang():
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    check_schema(schema)
    assert verify(Problem("", json.dumps(schema), "schema"), "1") == (0, "a schema without end")


numbers = st.integers(-9, 9)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.sampled_from([0.5, 1.0, 2.5]) | st.text("abé", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
small = st.integers(0, 3)


def entries(inner):
    """Schemas of a few keywords."""
    keywords = {
        "type": st.sampled_from(["null", "boolean", "string", "array", "object", "number", "integer"]),
        "enum": st.lists(values, min_size=1, max_size=3), "const": values, "minimum": numbers, "exclusiveMaximum": numbers,
        "multipleOf": st.integers(1, 4), "minLength": small, "maxLength": small, "pattern": st.sampled_from(["a", "^b", "a+b?$"]),
        "minItems": small, "maxItems": small, "uniqueItems": st.booleans(), "required": st.lists(st.sampled_from("abc"), unique=True),
        "minProperties": small, "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=2), "additionalProperties": inner,
        "items": inner, "prefixItems": st.lists(inner, min_size=1, max_size=2), "not": inner,
        "allOf": st.lists(inner, min_size=1, max_size=2), "anyOf": st.lists(inner, min_size=1, max_size=2),
        "oneOf": st.lists(inner, min_size=1, max_size=3), "$ref": st.just("#/$defs/x"),
    }  # fmt: skip
    return st.fixed_dictionaries({}, optional=keywords) | st.booleans()


schemas = st.recursive(st.booleans() | st.builds(lambda kind: {"type": kind}, st.sampled_from(["string", "number"])), entries, max_leaves=5)


@settings(max_examples=300, deadline=None)
@given(entries(schemas), values)
def test_the_checker_agrees_with_another_one(schema, value):
    theirs = pytest.importorskip("jsonschema_rs")
    if isinstance(schema, dict):
        schema = schema | {"$defs": {"x": {"type": "integer"}}}
    check_schema(schema)
    assert keeps_to(value, schema) == theirs.Draft202012Validator(schema).is_valid(value)


@given(st.text(max_size=200))
def test_json_is_read_or_refused(text):
    try:
        value = parse_json(text)
    except ValueError:
        return
    assert parse_json(json.dumps(value)) == value
