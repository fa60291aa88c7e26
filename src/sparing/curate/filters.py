"""The published heuristics that most open corpora were made with: Gopher's, C4's and FineWeb's.

Each rule decides as datatrove's filter of the same name does (src/datatrove/pipeline/filters), with the thresholds of the papers; a
threshold of None is not applied. Scores are counts and shares, rounded to six decimals, that no threshold changes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

import numpy as np

from sparing.curate.document import Document
from sparing.curate.words import SENTENCE_ENDS, pauses

Scores = dict[str, float]


class Rule(Protocol):
    """Judges a document. Its fields are its thresholds.

    A rule that changes texts has `edit(document) -> Document` too. It is asked after `scores`, whatever the verdict is. One that reads
    files or needs a package has `load()`, which raises UserError where they are missing, and `files()`, which names them.
    """

    name: ClassVar[str]

    def scores(self, document: Document) -> Scores:
        """Numbers that no threshold changes. The text is never empty."""

    def verdict(self, scores: Scores) -> str | None:
        """None: the document is kept. Else why not: "gopher_quality: min_words"."""


def _outside(rule: Rule, scores: Scores, *checks: tuple[str, str]) -> str | None:
    """The first of (threshold, score) that is crossed; a field that begins with min_ is crossed from above, any other from below."""
    for field, score in checks:
        limit = getattr(rule, field)
        if limit is not None and (scores[score] < limit if field.startswith("min_") else scores[score] > limit):
            return f"{rule.name}: {field}"
    return None


def _share(part: float, whole: float) -> float:
    return round(float(part / whole), 6) if whole else 0.0


@dataclass(frozen=True)
class GopherQuality:
    """Documents look like prose (Rae et al. 2021, arXiv 2112.11446, appendix A1.1; datatrove, gopher_quality_filter.py)."""

    name: ClassVar[str] = "gopher_quality"

    min_words: int | None = 50
    """Words that are not all punctuation."""
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3.0
    max_mean_word_length: float | None = 10.0
    max_hashes: float | None = 0.1
    """# per word."""
    max_ellipses: float | None = 0.1
    """... and … per word."""
    max_bullet_lines: float | None = 0.9
    """Share of lines that begin with • or -."""
    max_ellipsis_lines: float | None = 0.3
    """Share of lines that end with ... or …."""
    min_words_with_letter: float | None = 0.8
    """Share of all words."""
    min_stop_words: int | None = 2
    """How many of `stop_words` occur."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")

    def scores(self, document: Document) -> Scores:
        text, words, vocabulary = document.text, document.words, document.vocabulary
        real = vocabulary.is_word[words]
        count = int(np.count_nonzero(real))
        lines = text.splitlines()
        bullets = ends = 0
        if "•" in text or "-" in text:
            bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
        if "..." in text or "…" in text:
            ends = sum(line.rstrip().endswith(("...", "…")) for line in lines)
        stop_words = np.array([vocabulary.number(word) for word in dict.fromkeys(self.stop_words)], np.int64)
        return {
            "words": count,
            "mean_word_length": _share(vocabulary.lengths[words] @ real, count),
            "hashes": _share(text.count("#"), words.size),
            "ellipses": _share(text.count("...") + text.count("…"), words.size),
            "bullet_lines": _share(bullets, len(lines)),
            "ellipsis_lines": _share(ends, len(lines)),
            "words_with_letter": _share(np.count_nonzero(vocabulary.has_letter[words]), words.size),
            "stop_words": int(np.count_nonzero((stop_words[:, None] == words).any(axis=1))),
        }

    def verdict(self, scores: Scores) -> str | None:
        return _outside(
            self,
            scores,
            ("min_words", "words"),
            ("max_words", "words"),
            ("min_mean_word_length", "mean_word_length"),
            ("max_mean_word_length", "mean_word_length"),
            ("max_hashes", "hashes"),
            ("max_ellipses", "ellipses"),
            ("max_bullet_lines", "bullet_lines"),
            ("max_ellipsis_lines", "ellipsis_lines"),
            ("min_words_with_letter", "words_with_letter"),
            ("min_stop_words", "stop_words"),
        )


_PARAGRAPHS = re.compile(r"\n{2,}")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that no word of an n-gram is lost; 2^64 over the golden ratio."""


@dataclass(frozen=True)
class GopherRepetition:
    """Documents do not repeat themselves (Rae et al. 2021, table A1; datatrove, gopher_repetition_filter.py).

    Fields are the largest shares: of lines and paragraphs that occurred before, of characters in these, of characters in the commonest
    n-gram, of characters in n-grams that occurred before. Two n-grams are equal where their words are; datatrove compares longer ones
    (5 to 10) without the spaces, so that "a b" equals "ab" there.
    """

    name: ClassVar[str] = "gopher_repetition"

    dup_paragraph_fraction: float | None = 0.30
    dup_paragraph_chars: float | None = 0.20
    dup_line_fraction: float | None = 0.30
    dup_line_chars: float | None = 0.20
    top_2_gram: float | None = 0.20
    top_3_gram: float | None = 0.18
    top_4_gram: float | None = 0.16
    dup_5_gram: float | None = 0.15
    dup_6_gram: float | None = 0.14
    dup_7_gram: float | None = 0.13
    dup_8_gram: float | None = 0.12
    dup_9_gram: float | None = 0.11
    dup_10_gram: float | None = 0.10

    def scores(self, document: Document) -> Scores:
        text = document.text
        paragraphs = _PARAGRAPHS.split(text.strip())
        # re.split("\n+", text): what stands between runs of line ends, and nothing before the first and after the last
        lines = list(filter(None, text.split("\n"))) + [""] * (text.startswith("\n") + text.endswith("\n"))
        scores = {}
        for name, parts in (("paragraph", paragraphs), ("line", lines)):
            different = set(parts)
            scores[f"dup_{name}_fraction"] = _share(len(parts) - len(different), len(parts))
            scores[f"dup_{name}_chars"] = _share(sum(map(len, parts)) - sum(map(len, different)), len(text))
        return scores | _n_grams(document)

    def verdict(self, scores: Scores) -> str | None:
        return _outside(self, scores, *((field.name, field.name) for field in fields(self)))


def _n_grams(document: Document) -> Scores:
    """Shares of characters: of the commonest 2 to 4-gram, with its spaces; of the 5 to 10-grams that occurred before, none counted twice.

    An n-gram that occurs twice begins with an (n-1)-gram that does. So each n looks only where the last one found repeats.
    """
    hashes, size = document.hashes, len(document.text)
    ends = np.zeros(hashes.size + 1, np.int64)  # characters of the words before each
    np.cumsum(document.vocabulary.lengths[document.words], out=ends[1:])
    scores = dict.fromkeys(("top_2_gram", "top_3_gram", "top_4_gram", *(f"dup_{n}_gram" for n in range(5, 11))), 0.0)
    at, keys = np.arange(hashes.size), hashes
    for n in range(2, 11):
        if n <= 4 and hashes.size >= n:  # the first one, unless another is commoner
            scores[f"top_{n}_gram"] = _share(ends[n] + n - 1, size)
        if at.size and at[-1] > hashes.size - n:
            at = at[: np.searchsorted(at, hashes.size - n, side="right")]
        if at.size < 2:
            continue
        keys = keys[: at.size] * _MULTIPLIER + hashes[at + (n - 1)]
        order = keys.argsort()
        in_order = keys[order]
        edges = np.flatnonzero(in_order[1:] != in_order[:-1]) + 1
        if edges.size == at.size - 1:  # all differ
            at = at[:0]
            continue
        starts = np.concatenate(([0], edges))
        counts = np.concatenate((edges, [at.size])) - starts
        if n <= 4:
            most = int(counts.max())
            begin = int(at[order[np.repeat(counts == most, counts)].min()])  # of equally common ones, the one that occurs first
            scores[f"top_{n}_gram"] = _share((int(ends[begin + n] - ends[begin]) + n - 1) * most, size)
        repeated = np.sort(order[np.repeat(counts > 1, counts)])
        at, keys = at[repeated], keys[repeated]
        if n >= 5:
            scores[f"dup_{n}_gram"] = _share(_repeated_chars(at, keys, ends, n), size)
    return scores


def _repeated_chars(at: np.ndarray, keys: np.ndarray, ends: np.ndarray, n: int) -> int:
    """Characters of n-grams that occurred before. A repeat is skipped over whole, and the n-grams that overlap it are not remembered."""
    chars, free, seen = 0, 0, set()
    for place, key, length in zip(at.tolist(), keys.tolist(), (ends[at + n] - ends[at]).tolist()):
        if place < free:
            continue
        if key in seen:
            chars += length
            free = place + n
        else:
            seen.add(key)
    return chars


_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@dataclass(frozen=True)
class C4:
    """Lines that are no sentences go; so do documents of which little is left, of filler text or of code.

    Raffel et al. 2020 (JMLR 21:140, section 2.2); datatrove, c4_filters.py. Lines with too few or too long words, with "javascript", with
    phrases of cookie banners, or without a sentence's end are removed, and Wikipedia's [1], [edit] within lines.
    """

    name: ClassVar[str] = "c4"

    min_sentences: int | None = 5
    """In the lines that stay."""
    lorem_ipsum: bool = True
    """Documents with "lorem ipsum" are rejected."""
    curly_bracket: bool = True
    """Documents with { are rejected."""
    line_end: bool = True
    """Lines end in . ? ! " or ', and not in an ellipsis. FineWeb leaves this one out. This and what follows decides which lines stay, so
    scores depend on it."""
    min_words_per_line: int | None = 3
    max_word_length: int | None = 1000
    """A line with a longer word is removed."""
    javascript: bool = True
    policy: bool = True
    citations: bool = True

    def scores(self, document: Document) -> Scores:
        scores, text, pieces = self._lines(document)
        document.memo[self] = text, pieces
        return scores

    def verdict(self, scores: Scores) -> str | None:
        if self.lorem_ipsum and scores["lorem_ipsum"]:
            return f"{self.name}: lorem_ipsum"
        if self.curly_bracket and scores["curly_bracket"]:
            return f"{self.name}: curly_bracket"
        return _outside(self, scores, ("min_sentences", "sentences"))

    def edit(self, document: Document) -> Document:
        """The document without the lines that are no sentences."""
        if self not in document.memo:
            self.scores(document)
        text, pieces = document.memo.pop(self)
        return document.edited(text, pieces)

    def _lines(self, document: Document) -> tuple[Scores, str, list[str] | None]:
        """(scores, the text of the lines that stay, what stands between spaces in it)."""
        text, lower = document.text, document.lower
        # Most documents have none of these, and most lines of the others neither.
        citations = self.citations and "[" in text
        javascript, policy = self.javascript and "javascript" in lower, self.policy and any(phrase in lower for phrase in _POLICIES)
        lorem, curly = "lorem ipsum" in lower, "{" in text
        longest = self.max_word_length
        long = longest is not None and len(text) > longest and max(map(len, document.pieces), default=0) > longest
        least = self.min_words_per_line or 0
        table = pauses()
        kept: list[str] = []
        all_pieces: list[str] = []
        sentences = 0
        scores: Scores = {"lorem_ipsum": 0, "curly_bracket": 0}
        lines = text.splitlines()
        for line in lines:
            line = line.strip()
            pieces = line.split()
            if len(pieces) < least or (long and any(len(piece) > longest for piece in pieces)):
                continue
            if citations and "[" in line:
                line = _CITATION.sub("", line)
                pieces = line.split()
            if self.line_end and (not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...")):
                continue
            if lorem and "lorem ipsum" in line.lower():
                scores["lorem_ipsum"] = 1
            if javascript and "javascript" in line.lower():
                continue
            if curly and "{" in line:
                scores["curly_bracket"] = 1
            if policy and any(phrase in line.lower() for phrase in _POLICIES):
                continue
            sentences += table.sentences(pieces)
            kept.append(line)
            all_pieces += pieces
        scores |= {"sentences": sentences, "lines": len(lines), "removed_lines": len(lines) - len(kept)}
        return scores, "\n".join(kept).strip(), all_pieces


@dataclass(frozen=True)
class FineWeb:
    """Lines are long, end like sentences and are not repeated (Penedo et al. 2024, arXiv 2406.17557; datatrove,
    fineweb_quality_filter.py)."""

    name: ClassVar[str] = "fineweb"

    min_ended_lines: float | None = 0.12
    """Share of lines that end in a mark that ends sentences, of any script."""
    max_short_lines: float | None = 0.67
    """Share of lines of at most `short_line` characters."""
    max_dup_line_chars: float | None = 0.01
    """Share of characters in lines that occurred before."""
    max_line_ends: float | None = 0.3
    """Line ends per word."""
    short_line: int = 30
    """Characters; the score depends on it."""

    def scores(self, document: Document) -> Scores:
        text = document.text
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        different = set(lines)
        repeated = sum(map(len, lines)) - sum(map(len, different)) if len(different) < len(lines) else 0
        ends = text.count("\n")
        return {
            "ended_lines": _share(sum(line[-1] in SENTENCE_ENDS for line in lines), len(lines)),
            "short_lines": _share(sum(len(line) <= self.short_line for line in lines), len(lines)),
            "dup_line_chars": _share(repeated, len(text) - ends),
            "line_ends": _share(ends, document.words.size),
        }

    def verdict(self, scores: Scores) -> str | None:
        return _outside(
            self,
            scores,
            ("min_ended_lines", "ended_lines"),
            ("max_short_lines", "short_lines"),
            ("max_dup_line_chars", "dup_line_chars"),
            ("max_line_ends", "line_ends"),
        )
