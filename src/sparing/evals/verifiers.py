"""Verifiers: what an answer to a problem is worth, 0 or 1, and why.

`number` and `countdown` are computed here, exactly. `math` (by the math-verify package), `format` (a regular expression) and `schema` may
take for ever, so a process that can be ended does them (`judge`). `code` runs contained (`contained`), or not at all.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.util import find_spec
from typing import NamedTuple

from sparing.base.config import UserError
from sparing.evals.contained import Outcome, run, uncontained
from sparing.evals.judge import Judge, parse_json, schema_validator

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
LONGEST_NUMBER, LONGEST_EXPRESSION = 40, 200
"""Characters; a longer one is wrong without being computed."""
MARKS = (("<answer>", "</answer>"), ("####", "\n"), ("\\boxed{", "}"))
"""What is written before a final answer and behind it (R1's, GSM8K's, LaTeX's)."""
LONGEST_TEXT = 1 << 20
BLANKED = re.compile(r"<think>.*?</think>", re.DOTALL)
CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """A question whose answers a program can judge."""

    prompt: str
    answer: str = ""
    """number, math: the right one; countdown: the target; format: a regular expression for the whole text; schema: a JSON schema."""
    verifier: str = "number"
    tests: tuple[str, ...] = ()
    """code: Python statements that fail where the code is wrong, or JSON objects with input and output; countdown: the numbers."""
    worked: str = field(default="", repr=False, compare=False)
    """A right answer with the steps that lead to it; empty where none is known. No part of what is asked or judged."""


class Verdict(NamedTuple):
    """What a text is worth."""

    reward: float
    """1 right, 0 wrong."""
    reason: str


def verify(problem: Problem, text: str) -> Verdict:
    """Judge one answer. It never raises for what a model may write."""
    return VERIFIERS[problem.verifier](problem, text)


def check(problem: Problem) -> None:
    """Raises UserError, one line, where the problem cannot be judged here: an unknown verifier, a missing package, a bad answer."""
    if problem.verifier not in VERIFIERS:
        raise UserError(f"verifier {problem.verifier!r}: choose {', '.join(VERIFIERS)}")
    CHECKS[problem.verifier](problem)


# number


def final(text: str) -> str:
    """The part of a text that holds its answer: the last one between marks, else all that is not thinking."""
    for begins, ends in MARKS:
        if begins in text:
            return text.rpartition(begins)[2].partition(ends)[0]
    return BLANKED.sub("", text)


def number_of(text: str) -> Fraction | None:
    """The last number of a text."""
    found = NUMBER.findall(text)
    digits = found[-1].replace(",", "") if found else ""
    return Fraction(digits) if 0 < len(digits) <= LONGEST_NUMBER else None


def _number(problem: Problem, text: str) -> Verdict:
    found = number_of(final(text))
    if found is None:
        return Verdict(0.0, "no number")
    return Verdict(1.0, "right") if found == number_of(problem.answer) else Verdict(0.0, "another number")


def _check_number(problem: Problem) -> None:
    if number_of(problem.answer) is None:
        raise UserError(f"answer {problem.answer!r}: has no number in it")


# countdown

OPERATIONS = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b, ast.Div: lambda a, b: a / b,
}  # fmt: skip


def _countdown(problem: Problem, text: str) -> Verdict:
    lines = [line.strip() for line in final(text).splitlines() if line.strip()]
    expression = lines[-1].partition("=")[0].strip() if lines else ""
    if not 0 < len(expression) <= LONGEST_EXPRESSION:
        return Verdict(0.0, "no expression")
    try:
        used: list[int] = []
        value = _value(ast.parse(expression, mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return Verdict(0.0, "no expression")
    if Counter(used) != Counter(map(int, problem.tests)):
        return Verdict(0.0, "other numbers")
    return Verdict(1.0, "right") if value == int(problem.answer) else Verdict(0.0, "another value")


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """The value of a sum or product, exactly; its numbers are added to `used`. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError("neither a number nor an operation")


def _check_countdown(problem: Problem) -> None:
    for text in (problem.answer, *problem.tests):
        if not re.fullmatch(r"\d{1,9}", text):
            raise UserError(f"countdown: {text!r} is no whole number")


# by the judge: format, schema, math

JUDGE = Judge()


def _judged(problem: Problem, text: str) -> Verdict:
    good, reason = JUDGE.ask(problem.verifier, problem.answer, text[:LONGEST_TEXT])
    return Verdict(float(good), reason)


def _check_format(problem: Problem) -> None:
    try:
        re.compile(problem.answer, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"answer {problem.answer[:60]!r}: is no regular expression ({error})") from None


def _need(verifier: str, module: str, package: str) -> None:
    if find_spec(module) is None:
        raise UserError(f"verifier {verifier} needs the {package} package: pip install 'sparing[{verifier}]'")


def _check_schema(problem: Problem) -> None:
    _need("schema", "jsonschema_rs", "jsonschema-rs")
    try:
        schema_validator(parse_json(problem.answer))
    except ValueError as error:
        raise UserError(f"answer {problem.answer[:60]!r}: is no JSON schema that can be used ({str(error).splitlines()[0]})") from None


def _check_math(problem: Problem) -> None:
    _need("math", "math_verify", "math-verify")
    if not problem.answer.strip():
        raise UserError("math: no answer")


# code


def _code(problem: Problem, text: str) -> Verdict:
    """1 where the last block of code in the text passes all tests: statements in its names, or {"input", "output"} of a whole program."""
    blocks = CODE.findall(text)
    program = blocks[-1] if blocks else text
    statements, pairs = _tests(problem)
    if statements:
        outcome = run(program, statements)
        if not outcome.passed:
            return Verdict(0.0, _why(outcome))
    for given, wanted in pairs:
        outcome = run(program, stdin=given)
        if not outcome.passed:
            return Verdict(0.0, _why(outcome))
        if outcome.output.decode(errors="replace").split() != wanted.split():
            return Verdict(0.0, "another output")
    return Verdict(1.0, "right")


def _why(outcome: Outcome) -> str:
    return {"time": "out of time", "memory": "out of memory", "output": "too much output", "ended": "ended early"}.get(
        outcome.reason, "a test failed" if outcome.detail.startswith("test") else "the code failed"
    )


def _tests(problem: Problem) -> tuple[list[str], list[tuple[str, str]]]:
    """(statements, pairs of input and output)."""
    statements, pairs = [], []
    for test in problem.tests:
        try:
            value = json.loads(test)
        except ValueError:
            value = None
        if isinstance(value, dict) and value.keys() == {"input", "output"}:
            pairs.append((str(value["input"]), str(value["output"])))
        else:
            statements.append(test)
    return statements, pairs


def _check_code(problem: Problem) -> None:
    if not problem.tests:
        raise UserError("code: no tests")
    for test in _tests(problem)[0]:
        try:
            compile(test, "test", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UserError(f"test {test[:60]!r}: is no Python ({error})") from None
    if reason := uncontained():
        raise UserError(f"verifier code: {reason}")


VERIFIERS: dict[str, Callable[[Problem, str], Verdict]] = {
    "math": _judged, "code": _code, "format": _judged, "schema": _judged, "number": _number, "countdown": _countdown,
}  # fmt: skip
CHECKS: dict[str, Callable[[Problem], None]] = {
    "math": _check_math, "code": _check_code, "format": _check_format, "schema": _check_schema, "number": _check_number,
    "countdown": _check_countdown,
}  # fmt: skip
