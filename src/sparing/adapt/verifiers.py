"""Verifiers: what an answer to a problem is worth, 0 or 1, and why.

`number` and `countdown` are exact and need nothing else. `format` is a regular expression, `math` compares formulas through the
math-verify package.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from sparing.base.config import UserError

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
LONGEST_NUMBER, LONGEST_EXPRESSION = 40, 200
"""Characters; a longer one is wrong without being computed."""
MARKS = (("<answer>", "</answer>"), ("####", "\n"), ("\\boxed{", "}"))
"""What is written before a final answer and behind it (R1's, GSM8K's, LaTeX's)."""
BLANKED = re.compile(r"<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """A question whose answers a program can judge."""

    prompt: str
    answer: str = ""
    """number, math: the right one; countdown: the target; format: a regular expression; schema: a JSON schema."""
    verifier: str = "number"
    tests: tuple[str, ...] = ()
    """code: Python statements that fail where the code is wrong; countdown: the numbers."""


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
    if problem.verifier in CHECKS:
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


# format


def _format(problem: Problem, text: str) -> Verdict:
    return Verdict(1.0, "right") if re.fullmatch(problem.answer, text.strip(), re.DOTALL) else Verdict(0.0, "another form")


def _check_format(problem: Problem) -> None:
    try:
        re.compile(problem.answer, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"answer {problem.answer[:60]!r}: is no regular expression ({error})") from None


# math


def _math(problem: Problem, text: str) -> Verdict:
    from math_verify import parse
    from math_verify import verify as equal

    found = parse(text)
    if not found:
        return Verdict(0.0, "no formula")
    return Verdict(1.0, "right") if equal(parse(problem.answer), found) else Verdict(0.0, "another formula")


def _check_math(problem: Problem) -> None:
    try:
        import math_verify  # noqa: F401
    except ImportError:
        raise UserError("verifier math needs the math-verify package: pip install 'sparing[math]'") from None


VERIFIERS: dict[str, Callable[[Problem, str], Verdict]] = {
    "number": _number, "countdown": _countdown, "format": _format, "math": _math,
}  # fmt: skip
CHECKS: dict[str, Callable[[Problem], None]] = {
    "number": _check_number, "countdown": _check_countdown, "format": _check_format, "math": _check_math,
}  # fmt: skip
