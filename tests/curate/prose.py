"""Text that no rule objects to, made from nothing."""

import itertools

STOP = ("the", "of", "and", "to")


def words(count: int, start: int = 0) -> list[str]:
    """Different words of five letters."""
    letters = itertools.islice(itertools.product("bcdfg", "aeiou", "lmnrs", "aeiou", "tvwxz"), start, start + count)
    return ["".join(word) for word in letters]


def sentence(length: int = 12, start: int = 0) -> str:
    """A sentence of different words, two of which are stop words."""
    inside = words(length - 2, start)
    return " ".join([*inside[:3], STOP[start % 4], *inside[3:6], STOP[(start + 1) % 4], *inside[6:]]).capitalize() + "."


def prose(sentences: int = 12, start: int = 0) -> str:
    """A paragraph of sentences, each on its line."""
    return "\n".join(sentence(start=start + 10 * index) for index in range(sentences))
