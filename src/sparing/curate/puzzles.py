"""Logic puzzles with one solution: people in a row, and knights and knaves. That there is only one is shown by trying all assignments.

Each person gets a value: a place, or a kind. Rules say of some persons' values whether they can be. Worked answers are a search by hand:
always the person with the fewest values that no rule forbids, and back where there are none.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import combinations, permutations, product
from typing import NamedTuple

import numpy as np

from sparing.curate.exercises import NAMES, Exercise
from sparing.data.worked import thought

PEOPLE = 2
"""So many more than the difficulty says."""


class Rule(NamedTuple):
    """What a puzzle says. People are numbers from 0."""

    text: str
    """With {0}, {1}, ... for their names."""
    people: tuple[int, ...]
    holds: Callable
    """Of their values, as numbers or as arrays."""

    def among(self, values: np.ndarray) -> np.ndarray:
        """bool [assignments]: where it holds. values: [assignments, people]."""
        return self.holds(*(values[:, person] for person in self.people))


def puzzles(rng: random.Random, difficulty: int) -> Exercise:
    """A puzzle of one sort or the other, with difficulty + 2 people. Answer: a pattern for names between <answer> marks."""
    people = difficulty + PEOPLE
    return rng.choice((_row, _island))(rng, people, rng.sample(NAMES, people))


@cache
def _orders(people: int) -> np.ndarray:
    """int8 [orders, people]: each person's place, from 1."""
    return np.array(list(permutations(range(1, people + 1))), np.int8)


@cache
def _kinds(people: int) -> np.ndarray:
    """int8 [assignments, people]: 1 a knight, 0 a knave."""
    return np.array(list(product((1, 0), repeat=people)), np.int8)


# people in a row


def _row(rng: random.Random, people: int, names: list[str]) -> Exercise:
    everything = _orders(people)
    hidden = everything[rng.randrange(len(everything))]
    clues = [clue for clue in _clues(people) if clue.holds(*hidden[list(clue.people)])]
    rng.shuffle(clues)
    chosen, left = [], np.ones(len(everything), bool)
    for clue in clues:
        fewer = left & clue.among(everything)
        if fewer.sum() < left.sum():
            chosen, left = [*chosen, clue], fewer
        if left.sum() == 1:
            break
    for clue in list(chosen):  # what the others say already
        rest = [other for other in chosen if other is not clue]
        if np.all([other.among(everything) for other in rest], axis=0).sum() == 1:
            chosen = rest
    order = [names[person] for person in np.argsort(hidden)]
    told = " ".join(f"({number}) {_sentence(clue.text.format(*names))}" for number, clue in enumerate(chosen, 1))
    question = f"{_listed(names)} stand in a row. {told} In which order do they stand, from left to right?"
    labels = {place: f"in place {place}" for place in range(1, people + 1)}
    steps = _searched(chosen, names, labels, True, [f"against ({number})" for number in range(1, len(chosen) + 1)])
    subject = f"row {people} {sorted(clue.text for clue in chosen)}"
    return _named(question, order, steps, subject, "Write all names in this order as <answer>names</answer>.")


@cache
def _clues(people: int) -> tuple[Rule, ...]:
    """All that can be said of `people` in a row."""
    rules = []
    for a, b in permutations(range(people), 2):
        rules.append(Rule(f"{{{a}}} is somewhere to the left of {{{b}}}", (a, b), lambda x, y: x < y))
        rules.append(Rule(f"{{{a}}} is directly to the left of {{{b}}}", (a, b), lambda x, y: y - x == 1))
    for a, b in combinations(range(people), 2):
        rules.append(Rule(f"{{{a}}} and {{{b}}} are side by side", (a, b), lambda x, y: abs(x - y) == 1))
        rules.append(Rule(f"{{{a}}} and {{{b}}} are not side by side", (a, b), lambda x, y: abs(x - y) != 1))
        rules += [
            Rule(f"Between {{{a}}} and {{{b}}} are exactly {between}", (a, b), lambda x, y, between=between: abs(x - y) == between + 1)
            for between in range(2, people - 1)
        ]
    for a in range(people):
        rules.append(Rule(f"{{{a}}} is at one of the ends", (a,), lambda x: (x == 1) | (x == people)))
        rules += [Rule(f"{{{a}}} is not in place {place}", (a,), lambda x, place=place: x != place) for place in range(1, people + 1)]
    return tuple(rules)


# knights and knaves (Smullyan, What Is the Name of This Book?, 1978)


def _island(rng: random.Random, people: int, names: list[str]) -> Exercise:
    everything = _kinds(people)
    while True:
        hidden = everything[rng.randrange(len(everything))]
        said = [rng.choice([claim for claim in _claims(people, one) if claim.holds(*hidden[list(claim.people)])]) for one in range(people)]
        if np.all([claim.among(everything) for claim in said], axis=0).sum() == 1:
            break
    knights = [name for name, kind in zip(names, hidden, strict=True) if kind] or ["nobody"]
    told = " ".join(f'{name} says: "{_sentence(claim.text.format(*names))}"' for name, claim in zip(names, said, strict=True))
    question = f"Knights always tell the truth, knaves always lie. {_listed(names)} are knights or knaves. {told} Who are the knights?"
    steps = _searched(said, names, {1: "a knight", 0: "a knave"}, False, [f"against what {name} says" for name in names])
    subject = f"island {[claim.text for claim in said]}"
    return _named(
        question, knights, steps, subject, "Write their names, in the order above, as <answer>names</answer>, or <answer>nobody</answer>."
    )


@cache
def _claims(people: int, speaker: int) -> tuple[Rule, ...]:
    """All that one of them can say, as rules: a knight says what is true, and nobody else does."""
    others = [person for person in range(people) if person != speaker]
    everybody = tuple(range(people))
    found = []
    for a in others:
        found += [
            (f"{{{a}}} is a knight", (a,), lambda x: x == 1),
            (f"{{{a}}} is a knave", (a,), lambda x: x == 0),
            (f"{{{a}}} and I are of different kinds", (speaker, a), lambda me, x: me != x),
        ]
    for a, b in combinations(others, 2):
        found += [
            (f"{{{a}}} and {{{b}}} are of the same kind", (a, b), lambda x, y: x == y),
            (f"at least one of {{{a}}} and {{{b}}} is a knave", (a, b), lambda x, y: (x == 0) | (y == 0)),
            (f"at least one of {{{a}}} and {{{b}}} is a knight", (a, b), lambda x, y: (x == 1) | (y == 1)),
            (f"if {{{a}}} is a knight, so is {{{b}}}", (a, b), lambda x, y: (x == 0) | (y == 1)),
        ]
    found += [(f"exactly {count} of us are knights", everybody, lambda *all, count=count: sum(all) == count) for count in range(2, people)]
    return tuple(Rule(text, (speaker, *of), lambda me, *values, true=true: (me == 1) == true(*values)) for text, of, true in found)


# the answer


def _searched(rules: Sequence[Rule], names: Sequence[str], labels: dict[int, str], distinct: bool, against: Sequence[str]) -> list[str]:
    """The steps of a search for the solution. distinct: each value is one person's alone."""
    given: dict[int, int] = {}
    steps: list[str] = []

    def verdicts(person: int) -> dict[int, str]:
        """Of each value that a person can have, what it is against; empty: nothing."""
        found = {}
        for value in labels:
            if not distinct or value not in given.values():
                trial = given | {person: value}
                broken = (why for rule, why in zip(rules, against, strict=True) if not _possible(rule, trial, labels, distinct))
                found[value] = next(broken, "")
        return found

    def solved() -> bool:
        left = {person: verdicts(person) for person in range(len(names)) if person not in given}
        if not left:
            return True
        person = min(left, key=lambda one: sum(not why for why in left[one].values()))
        steps.extend(f"{names[person]} {labels[value]}: {why}" for value, why in left[person].items() if why)
        for value in (value for value, why in left[person].items() if not why):
            steps.append(f"{names[person]} {labels[value]}: possible")
            given[person] = value
            if solved():
                return True
            del given[person]
            steps.append(f"So {names[person]} is not {labels[value]}")
        return False

    assert solved()
    return steps


def _possible(rule: Rule, given: dict[int, int], labels: dict[int, str], distinct: bool) -> bool:
    """Whether a rule can still hold when the others get values too."""
    return any(rule.holds(*values) for values in _completed(rule, given, labels, distinct))


def _completed(rule: Rule, given: dict[int, int], labels: dict[int, str], distinct: bool) -> Iterator[list[int]]:
    free = [person for person in dict.fromkeys(rule.people) if person not in given]
    left = [value for value in labels if not distinct or value not in given.values()]
    for values in permutations(left, len(free)) if distinct else product(left, repeat=len(free)):
        known = given | dict(zip(free, values, strict=True))
        yield [known[person] for person in rule.people]


def _named(question: str, names: Sequence[str], steps: Sequence[str], subject: str, form: str) -> Exercise:
    pattern = r".*<answer>\s*" + r"\s*,\s*".join(names) + r"\s*</answer>\W*"
    answer = thought(steps, f"<answer>{', '.join(names)}</answer>")
    return Exercise(question, pattern, answer, subject, form, "format")


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
