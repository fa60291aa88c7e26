"""Worked answers, for problems that a program makes: steps between <think> marks, as DeepSeek-R1 has them (arXiv 2501.12948), and then
what is asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple


def thought(steps: Sequence[str], answer: str) -> str:
    """Each step a sentence, and the answer behind them."""
    return f"<think>{' '.join(f'{step}.' for step in steps)}</think>{answer}"


class Countdown(NamedTuple):
    """Numbers of which an expression is asked that uses each of them once."""

    target: int
    """What it is to make; it may be negative."""
    question: str
    form: str
    """How the answer is to be written."""
    worked: str


def countdown(numbers: Sequence[int], rng: random.Random) -> Countdown:
    """A problem that some expression of the numbers solves: two of them at a time are drawn, and an operation that has a whole result."""
    values, steps = [(number, str(number)) for number in numbers], []
    while len(values) > 1:
        (a, left), (b, right) = (values.pop(rng.randrange(len(values))) for _ in range(2))
        results = [(a + b, "+"), (a - b, "-"), (a * b, "*")] + ([(a // b, "/")] if b and a % b == 0 else [])
        value, operation = rng.choice(results)
        steps.append(f"{a} {operation} {b} = {value}")
        values.append((value, f"({left} {operation} {right})"))
    target, expression = values[0]
    question = f"Use each of the numbers {', '.join(map(str, numbers))} once, with +, -, * and /, to make {target}."
    form = "Write the expression as <answer>expression</answer>."
    return Countdown(target, question, form, thought(steps, f"<answer>{expression[1:-1]}</answer>"))
