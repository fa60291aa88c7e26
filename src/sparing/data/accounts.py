"""Counts what becomes of documents: what comes in is what goes out, is rejected, or is quarantined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from sparing.data.document import PART, Document, Reject, Rejected

Item = TypeVar("Item")


class Accounts:
    """Counts the documents, or conversations, of one reading. It is the reader's `Reject`: what that refuses came in and is quarantined.

    A text that is read in pieces counts once, and each stretch of it that cannot be used counts besides, in and quarantined.
    """

    def __init__(self, reject: Reject | None = None):
        """reject: hears of what is quarantined too."""
        self._reject = reject
        self.into = self.out = self.rejected = self.quarantined = 0

    def __call__(self, rejected: Rejected) -> None:
        self.into += 1
        self.quarantined += 1
        if self._reject:
            self._reject(rejected)

    def reading(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same documents, counted as they come in."""
        for item in items:
            self.into += not _goes_on(item)
            yield item

    def use(self, item: Item) -> Item:
        """Count a document as one that is used."""
        self.out += not _goes_on(item)
        return item

    def refuse(self, item: object) -> None:
        """Count a document as one that could be read and is not wanted."""
        self.rejected += not _goes_on(item)

    def balance(self) -> dict[str, int]:
        """{"in", "out", "rejected", "quarantined"}. Raises AssertionError where a document was lost on the way."""
        return balanced({"in": self.into, "out": self.out, "rejected": self.rejected, "quarantined": self.quarantined})


def balanced(counts: dict[str, int]) -> dict[str, int]:
    """The counts, checked."""
    lost = counts["in"] - counts["out"] - counts["rejected"] - counts["quarantined"]
    assert not lost, f"{lost} documents are neither used nor rejected nor quarantined: {counts}"
    return counts


def in_words(counts: dict[str, int]) -> str:
    """`documents: 1,204 in, 1,200 out, 0 rejected, 4 quarantined`."""
    return "documents: " + ", ".join(f"{counts[name]:,} {name}" for name in ("in", "out", "rejected", "quarantined"))


def _goes_on(item: object) -> bool:
    """Whether it is a further piece of a text that was counted."""
    return isinstance(item, Document) and PART in item.meta
