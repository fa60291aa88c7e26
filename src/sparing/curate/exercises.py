"""Exercises that a program makes and can judge, and Countdown. `word_problems`, `puzzles` and `programs` make others.

A maker is a function of (random numbers, difficulty) -> Exercise, and of nothing else. Difficulty is 1 to 5: more steps, larger numbers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from sparing.data.worked import countdown as _countdown

DIFFICULTIES = range(1, 6)
NAMES = (
    "Ada Amir Anna Ben Carla Chen Clara David Dora Elif Emil Farah Felix Grace Hanna Hugo Ida Ivan Jana Jonas Kofi Lea Lena Luis Maria Max "
    "Mina Nadia Noah Olga Omar Paula Peter Rosa Ruth Sami Sara Simon Tara Theo Tim Uma Vera Victor Wanda Yara Yusuf Zoe"
).split()


@dataclass(frozen=True)
class Exercise:
    """A question, and all that is needed to judge answers to it, as the tasks of `grpo` have it."""

    question: str
    answer: str
    """By the verifier: number: the number; countdown: the target; format: a regular expression for the whole text; code: empty."""
    worked: str
    """A right answer with the steps that lead to it."""
    subject: str
    """What it is about. Exercises of one subject are the same, but for names and the like."""
    form: str = ""
    """How the answer is to be written."""
    verifier: str = "number"
    tests: tuple[str, ...] = ()
    """code: statements that fail where the code is wrong; countdown: the numbers."""

    @property
    def prompt(self) -> str:
        return f"{self.question} {self.form}".strip()


# Countdown

LARGEST, TARGETS = (99, 50, 25, 25, 25), range(1, 101)
"""Numbers, by difficulty: of two or three small ones there would be few exercises. What they make."""


def countdown(rng: random.Random, difficulty: int) -> Exercise:
    """An expression of difficulty + 1 numbers that makes a target, as the task `countdown` has it. Answer: the target."""
    while True:
        numbers = [rng.randint(1, LARGEST[difficulty - 1]) for _ in range(difficulty + 1)]
        target, question, form, worked = _countdown(numbers, rng)
        if target in TARGETS:
            subject = f"countdown {sorted(numbers)} {target}"
            return Exercise(question, str(target), worked, subject, form, "countdown", tuple(map(str, numbers)))
