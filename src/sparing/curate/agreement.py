"""Whether answers agree: with each other, and with a text that they are about.

Answers are compared by their words without case, punctuation, accents and articles, much as SQuAD's evaluation does (Rajpurkar et al. 2016,
arXiv 1606.05250, section 6.1), and numbers by their values.
"""

from __future__ import annotations

import re
from fractions import Fraction

from sparing.curate.contamination import normalise

NUMBER = re.compile(r"(?:(?<![\w.])-)?\d[\d,]*(?:\.\d+)?")
ARTICLES = frozenset(("a", "an", "the"))
COMMON = ARTICLES | frozenset(
    "and are as at be been by did do does for from had has have in is it its of on or that their them they this to was were which who "
    "with".split()
)
"""Words that say nothing about what an answer rests on."""
OTHERWISE = frozenset(("no", "not", "never", "none", "nor", "neither", "or", "except", "but", "unless"))
"""Words that make another answer of one that is otherwise contained in it."""
BESIDE = 8
"""Words that an answer may have beside the other's."""
SUPPORTED = 0.75
"""Of the words of an answer that are no COMMON ones, this share must be in the text."""
LONGEST_NUMBER = 40


def words(text: str) -> list[str]:
    """The words that answers are compared by; a number is one word, the same for the same value."""
    text = NUMBER.sub(lambda found: f" {_value(found[0])} ", text)
    return [word for word in normalise(text, numbers=True) if word not in ARTICLES]


def _value(digits: str) -> str:
    plain = digits.replace(",", "").strip("-")
    if len(plain) > LONGEST_NUMBER:
        return digits
    value = Fraction(plain)
    name = str(value.numerator) if value.denominator == 1 else f"{value.numerator}over{value.denominator}"
    return f"minus{name}" if digits.startswith("-") and value else name


def is_number(word: str) -> bool:
    return word.removeprefix("minus")[:1].isdigit()


def agree(one: str, other: str) -> bool:
    """Whether two short answers say the same: the same words, or one in a sentence around the other."""
    short, long = sorted((words(one), words(other)), key=len)
    if short == long:
        return bool(short)
    if not short or len(long) > len(short) + BESIDE:
        return False
    for at in range(len(long) - len(short) + 1):
        if long[at : at + len(short)] == short:
            beside = long[:at] + long[at + len(short) :]
            return not OTHERWISE & set(beside) and not (any(map(is_number, beside)) and any(map(is_number, short)))
    return False


def supported(answer: str, text: str) -> bool:
    """Whether a text has all numbers of an answer, and most of its other words."""
    known = set(words(text))
    found = [word for word in words(answer) if word not in COMMON]
    if not all(word in known for word in found if is_number(word)):
        return False
    return bool(found) and sum(word in known for word in found) >= SUPPORTED * len(found)


def new_numbers(made: str, text: str) -> list[str]:
    """Numbers of two digits or more that a text does not have. Smaller ones may be written as words."""
    known = set(words(text))
    return [word for word in words(made) if is_number(word) and len(word) > 1 and word not in known]
