"""Verifiers that may hang."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparing.base.config import UserError
from sparing.evals import judge
from sparing.evals.judge import parse_json
from sparing.evals.verifiers import Problem, check, verify

R1 = Problem("", r"<think>.*</think>\s*<answer>.*</answer>", "format")
NUMBER = Problem("", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}', "schema")


@pytest.fixture(autouse=True, scope="module")
def _ended():
    yield
    from sparing.evals.verifiers import JUDGE

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
    assert verify(Problem("", answer, "math"), text).reward == reward


@pytest.mark.parametrize("verifier, package", [("math", "math-verify"), ("schema", "jsonschema-rs")])
def test_without_its_package_it_is_one_line(monkeypatch, verifier, package):
    monkeypatch.setattr("sparing.evals.verifiers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"needs the {package} package"):
        check(Problem("", "1", verifier))


@pytest.mark.parametrize(
    "schema",
    [{"type": "text"}, [], {"$ref": "#/$defs/a"}, {"$ref": "http://localhost/x"}, {"minimum": "1"}, {"pattern": "("}, {"anyOf": []}],
)
def test_a_schema_that_cannot_be_used(schema):
    with pytest.raises(UserError, match="is no JSON schema that can be used") as refusal:
        check(Problem("", json.dumps(schema), "schema"))
    assert "\n" not in str(refusal.value)


def test_a_schema_without_end_is_no_hang():
    problem = Problem("", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}', "schema")
    check(problem)
    assert verify(problem, "1").reason in ("right", "against the schema")


@given(st.text(max_size=200))
def test_json_is_read_or_refused(text):
    try:
        value = parse_json(text)
    except ValueError:
        return
    assert parse_json(json.dumps(value)) == value
