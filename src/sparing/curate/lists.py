"""Lists of URLs and words that a document may not have.

A list is a text file with one entry a line, in any case; lines that begin with # are comments. Relative paths are relative to the working
folder, as on the command line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from sparing.base.files import read_text
from sparing.curate.document import Document
from sparing.curate.filters import Scores

LIST_BYTES = 256 << 20
"""Blocklists of domains are tens of megabytes."""
_HOST = re.compile(r"(?:[a-z][a-z0-9+.\-]*:)?//(?:[^/?#@]*@)?([^/?#:]+)|([^/?#:]+)", re.I)
_URL_WORD = re.compile(r"[a-z0-9]+")
_WORD = re.compile(r"\w+")


@cache
def entries(path: str | None) -> frozenset[str]:
    """The entries of a list, in lower case; none where there is no path. Raises UserError."""
    lines = map(str.strip, read_text(path, limit=LIST_BYTES).lower().splitlines()) if path else ()
    return frozenset(line for line in lines if line and not line.startswith("#"))


@dataclass(frozen=True)
class UrlList:
    """Documents are from none of the listed places (as FineWeb's rule; datatrove, url_filter.py).

    The URL is `url` in a document's metadata. Documents without one are kept.
    """

    name: ClassVar[str] = "url_list"

    domains: str | None = None
    """List of domains: "example.org" is www.example.org too."""
    urls: str | None = None
    """List of whole URLs."""
    words: str | None = None
    """List of words that a URL may not have, between characters that are neither letters nor digits."""
    soft_words: str | None = None
    """List of words of which a URL may have `max_soft_words` different ones."""
    max_soft_words: int = 1

    def files(self) -> list[str]:
        return [path for path in (self.domains, self.urls, self.words, self.soft_words) if path]

    def load(self) -> None:
        for path in self.files():
            entries(path)

    def scores(self, document: Document) -> Scores:
        """How many entries of each list the URL has; {} without a URL."""
        url = document.meta.get("url")
        if not isinstance(url, str) or not url.strip():
            return {}
        url = url.strip().lower()
        host = _HOST.match(url)
        labels = (host[1] or host[2]).strip(".").split(".") if host else []
        words = set(_URL_WORD.findall(url))
        return {
            "domains": sum(".".join(labels[at:]) in entries(self.domains) for at in range(len(labels))),
            "urls": int(url in entries(self.urls)),
            "words": len(words & entries(self.words)),
            "soft_words": len(words & entries(self.soft_words)),
        }

    def verdict(self, scores: Scores) -> str | None:
        found = (name for name in ("domains", "urls", "words") if scores.get(name))
        if scores.get("soft_words", 0) > self.max_soft_words:
            return f"{self.name}: {next(found, 'max_soft_words')}"
        return next((f"{self.name}: {name}" for name in found), None)


@dataclass(frozen=True)
class WordList:
    """Documents have none of the listed words and phrases (C4's rule of bad words, Raffel et al. 2020; the list is the user's)."""

    name: ClassVar[str] = "word_list"

    words: str | None = None
    """The list; the score depends on it."""
    max_found: int = 0
    """How often they may occur, all together."""

    def files(self) -> list[str]:
        return [self.words] if self.words else []

    def load(self) -> None:
        entries(self.words)

    def scores(self, document: Document) -> Scores:
        """How often entries occur, as whole words, in any case."""
        single, phrases = _by_length(self.words)
        found = sum(word in single for word in _WORD.findall(document.lower)) if single else 0
        for phrase, pattern in phrases:
            if phrase in document.lower:
                found += len(pattern.findall(document.lower))
        return {"found": found}

    def verdict(self, scores: Scores) -> str | None:
        return f"{self.name}: max_found" if scores["found"] > self.max_found else None


@cache
def _by_length(path: str | None) -> tuple[frozenset[str], list[tuple[str, re.Pattern]]]:
    """(words, (phrase, pattern) of what is no single word)."""
    single = frozenset(entry for entry in entries(path) if _WORD.fullmatch(entry))
    return single, [(entry, re.compile(rf"(?<!\w){re.escape(entry)}(?!\w)")) for entry in sorted(entries(path) - single)]
