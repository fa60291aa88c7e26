"""Small programs to write from a description, judged by tests that a program which is not shown passes.

A description is a chain of steps, each a sentence and an expression of Python. The chains differ in what is done to what, and in the
numbers. Every step matters to the tests: a program that leaves one out fails.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from sparing.curate.exercises import Exercise
from sparing.data.worked import thought

NUMBERS, NUMBER, TEXT, WORDS = "a list of whole numbers", "a whole number", "a text", "a list of words"


class Step(NamedTuple):
    """What can be done to a value."""

    takes: str
    gives: str
    says: str
    """With {k} for a number, where it has one."""
    code: str
    """An expression of `value` and {k}."""
    low: int = 0
    high: int = 0
    """Least and most of {k}; 0: it has none."""

    def of(self, k: int) -> Step:
        return self._replace(says=self.says.format(k=k), code=self.code.replace("{k}", str(k)))


STEPS = (
    Step(NUMBERS, NUMBERS, "keep only the even numbers", "[n for n in value if n % 2 == 0]"),
    Step(NUMBERS, NUMBERS, "keep only the odd numbers", "[n for n in value if n % 2 == 1]"),
    Step(NUMBERS, NUMBERS, "keep only numbers greater than {k}", "[n for n in value if n > {k}]", 1, 9),
    Step(NUMBERS, NUMBERS, "keep only numbers less than {k}", "[n for n in value if n < {k}]", 3, 15),
    Step(NUMBERS, NUMBERS, "leave out the multiples of {k}", "[n for n in value if n % {k} != 0]", 2, 5),
    Step(NUMBERS, NUMBERS, "add {k} to each number", "[n + {k} for n in value]", 1, 9),
    Step(NUMBERS, NUMBERS, "multiply each number by {k}", "[n * {k} for n in value]", 2, 9),
    Step(NUMBERS, NUMBERS, "square each number", "[n * n for n in value]"),
    Step(NUMBERS, NUMBERS, "subtract each number from {k}", "[{k} - n for n in value]", 1, 30),
    Step(NUMBERS, NUMBERS, "replace each number above {k} by {k}", "[min(n, {k}) for n in value]", 5, 15),
    Step(NUMBERS, NUMBERS, "halve the even numbers and leave the odd ones", "[n // 2 if n % 2 == 0 else n for n in value]"),
    Step(NUMBERS, NUMBERS, "reverse the order", "value[::-1]"),
    Step(NUMBERS, NUMBERS, "sort from the smallest to the largest", "sorted(value)"),
    Step(NUMBERS, NUMBERS, "remove numbers that occurred earlier in the list", "list(dict.fromkeys(value))"),
    Step(NUMBERS, NUMBERS, "keep every second number, beginning with the first", "value[::2]"),
    Step(NUMBERS, NUMBERS, "drop the first {k} numbers", "value[{k}:]", 1, 3),
    Step(NUMBERS, NUMBERS, "keep only the first {k} numbers", "value[:{k}]", 2, 5),
    Step(NUMBERS, NUMBERS, "replace each number by the sum so far, itself included", "[sum(value[:i + 1]) for i in range(len(value))]"),
    Step(NUMBERS, NUMBERS, "take the differences of neighbours, each minus the one before",
         "[b - a for a, b in zip(value, value[1:])]"),
    Step(NUMBERS, NUMBER, "take the sum, 0 for an empty list", "sum(value)"),
    Step(NUMBERS, NUMBER, "take how many numbers there are", "len(value)"),
    Step(NUMBERS, NUMBER, "take the largest number, 0 for an empty list", "max(value, default=0)"),
    Step(NUMBERS, NUMBER, "take the smallest number, 0 for an empty list", "min(value, default=0)"),
    Step(NUMBERS, NUMBER, "count the numbers greater than {k}", "sum(n > {k} for n in value)", 1, 9),
    Step(NUMBER, NUMBER, "add {k}", "value + {k}", 1, 30),
    Step(NUMBER, NUMBER, "multiply by {k}", "value * {k}", 2, 9),
    Step(NUMBER, NUMBER, "take the remainder of dividing by {k}, which is not negative", "value % {k}", 3, 12),
    Step(NUMBER, NUMBER, "take the absolute value", "abs(value)"),
    Step(NUMBER, NUMBER, "take the sum of the decimal digits, without the sign", "sum(map(int, str(abs(value))))"),
    Step(NUMBER, NUMBERS, "make the list of its decimal digits, without the sign", "[int(d) for d in str(abs(value))]"),
    Step(TEXT, WORDS, "split it into words at spaces", "value.split()"),
    Step(TEXT, TEXT, "reverse it", "value[::-1]"),
    Step(TEXT, TEXT, "make all letters small", "value.lower()"),
    Step(TEXT, TEXT, "remove the small vowels a, e, i, o, u", "''.join(c for c in value if c not in 'aeiou')"),
    Step(TEXT, TEXT, "keep only the first {k} characters", "value[:{k}]", 3, 12),
    Step(TEXT, TEXT, "drop the first {k} characters", "value[{k}:]", 1, 5),
    Step(TEXT, NUMBER, "take its number of characters", "len(value)"),
    Step(TEXT, NUMBER, "count the small vowels a, e, i, o, u", "sum(c in 'aeiou' for c in value)"),
    Step(WORDS, WORDS, "keep only words of more than {k} letters", "[w for w in value if len(w) > {k}]", 2, 6),
    Step(WORDS, WORDS, "keep only words of fewer than {k} letters", "[w for w in value if len(w) < {k}]", 4, 8),
    Step(WORDS, WORDS, "write each word backwards", "[w[::-1] for w in value]"),
    Step(WORDS, WORDS, "write each word in capital letters", "[w.upper() for w in value]"),
    Step(WORDS, WORDS, "keep the first {k} letters of each word", "[w[:{k}] for w in value]", 1, 4),
    Step(WORDS, WORDS, "reverse the order of the words", "value[::-1]"),
    Step(WORDS, WORDS, "sort by length, keeping the order of equally long words", "sorted(value, key=len)"),
    Step(WORDS, WORDS, "drop the first {k} words", "value[{k}:]", 1, 2),
    Step(WORDS, WORDS, "remove words that occurred earlier in the list", "list(dict.fromkeys(value))"),
    Step(WORDS, NUMBERS, "replace each word by its number of letters", "[len(w) for w in value]"),
    Step(WORDS, TEXT, "join the words with hyphens", "'-'.join(value)"),
    Step(WORDS, TEXT, "join the words without spaces", "''.join(value)"),
    Step(WORDS, NUMBER, "take how many words there are", "len(value)"),
)  # fmt: skip
LENGTHS = (2, 3, 4, 6, 8)
"""Steps, by difficulty."""
TESTS, VARIOUS = 8, 4
"""Inputs, besides an empty one; different outputs at least."""
LARGEST = 10**6
"""Of a number in a test."""
TEXT_WORDS = (
    "river Stone garden table a of Winter bread captain candle Hill hill green old letter to in Summer umbrella engine orange idea tree"
).split()


def programs(rng: random.Random, difficulty: int) -> Exercise:
    """A function to write. Answer: none, but tests."""
    while True:
        begins = rng.choice((NUMBERS, NUMBERS, TEXT))
        steps = _chain(rng, begins, LENGTHS[difficulty - 1])
        inputs = [_input(rng, begins) for _ in range(TESTS)] + ([[]] if begins == NUMBERS else [""])
        outputs = [_run(steps, value) for value in inputs]
        various = len(set(map(repr, outputs))) >= VARIOUS
        if various and all(map(_small, outputs)) and all(_matters(steps, at, inputs[1:], outputs[1:]) for at in range(len(steps))):
            break
    told = "; ".join(f"({number}) {step.says}" for number, step in enumerate(steps, 1))
    example, result = inputs[0], outputs[0]
    question = f"Step by step: {told}. So {example!r} becomes {result!r}."
    form = f"Write a Python function solve(value) that does this to {begins}, and answer with it in a block of code: ```python ... ```"
    lines = ["def solve(value):", *(f"    value = {step.code}" for step in steps), "    return value"]
    thoughts = [f"({number}) {step.code} gives {_run(steps[:number], example)!r}" for number, step in enumerate(steps, 1)]
    worked = thought([f"With value = {example!r}", *thoughts], "```python\n" + "\n".join(lines) + "\n```")
    tests = tuple(f"assert solve({value!r}) == {output!r}" for value, output in zip(inputs[1:], outputs[1:], strict=True))
    return Exercise(question, "", worked, f"program {begins} {[step.code for step in steps]}", form, "code", tests)


def _chain(rng: random.Random, begins: str, length: int) -> list[Step]:
    """Steps, each of which takes what the one before it gives; none comes twice in a row."""
    steps: list[Step] = []
    kind, before = begins, None
    while len(steps) < length:
        step = rng.choice([step for step in STEPS if step.takes == kind and step is not before])
        steps.append(step.of(rng.randint(step.low, step.high)))
        kind, before = step.gives, step
    return steps


def _input(rng: random.Random, kind: str) -> Any:
    if kind == TEXT:
        return " ".join(rng.choices(TEXT_WORDS, k=rng.randint(3, 8)))
    numbers = [rng.randint(-9, 20) for _ in range(rng.randint(4, 9))]
    return numbers + rng.sample(numbers, 2)  # so that some occur twice


@cache
def _function(code: str) -> Callable[[Any], Any]:
    """Of an expression of STEPS with its number put in, so that what a worked answer shows is what ran. Nothing that a user writes gets
    here; answers are judged in a contained process (`evals/contained.py`)."""
    return eval(f"lambda value: {code}")


def _run(steps: Sequence[Step], value: Any) -> Any:
    for step in steps:
        value = _function(step.code)(value)
    return value


def _small(value: Any) -> bool:
    return not isinstance(value, int | list) or all(
        not isinstance(item, int) or abs(item) <= LARGEST for item in (value if isinstance(value, list) else [value])
    )


def _matters(steps: Sequence[Step], at: int, inputs: Sequence[Any], outputs: Sequence[Any]) -> bool:
    """Whether a program without this step gives something else for some input."""
    rest = [*steps[:at], *steps[at + 1 :]]
    try:
        return any(_run(rest, value) != output for value, output in zip(inputs, outputs, strict=True))
    except (TypeError, AttributeError, ValueError):  # what the next step takes is made by this one
        return True
