"""Documents in other words, by a teacher: the same facts in a style that a small model learns more from (WRAP, Maini et al. 2024, arXiv
2401.16380, which also has the size of pieces, section 3: beyond some 300 tokens a teacher leaves things out)."""

from __future__ import annotations

import re

from sparing.curate.agreement import new_numbers
from sparing.curate.making import STEADY, How, Made, Piece, Steps, said
from sparing.curate.minhash import DuplicateSettings, jaccard, ngram_sets
from sparing.curate.teachers import Ask

PIECE_BYTES = 1200
STYLES = {
    "plain": "in short, plain sentences with common words, so that a child of ten understands it",
    "encyclopedic": "in clear, complete sentences, as an encyclopedia would have it",
    "dialogue": "as questions and answers that follow each other. Begin each question's line with Question: and each answer's with Answer:",
}
REWRITE = (
    "Write the text below anew, {style}. Keep all that it says, with all names and numbers, and add nothing. Give the new text alone."
    "\n\n{text}"
)
SAME = (
    "First text:\n{text}\n\nSecond text:\n{made}\n\nDoes the second text say anything that the first one does not say? "
    "Answer with one word, yes or no."
)
SHORTER, LONGER = 0.3, 3.0
"""Times the characters of its source: outside of these, something was left out or added."""
COPY = DuplicateSettings(numbers=True)
TURNS = re.compile(r"^[^\w\n]{0,8}(question|answer)[^\w\n:]{0,8}:", re.IGNORECASE | re.MULTILINE)
NO = re.compile(r"\W*no\b", re.IGNORECASE)


def rewrite(piece: Piece, style: str, how: How) -> Steps:
    """A piece in one of STYLES; how.votes = 0: nobody is asked whether it says the same."""
    if how.leaks(piece.text):
        return [Made(piece.text, {"text": piece.text}, rejected="contamination: its source")]
    (answer,) = yield [Ask(REWRITE.format(style=STYLES[style], text=piece.text), how.tokens, STEADY)]
    if answer.failed:
        return [Made(piece.text, {"text": piece.text}, rejected=f"teacher: {answer.failed}")]
    text = said(answer)
    value = {"text": text}
    if why := _wrong(text, piece.text, style):
        return [Made(text, value, rejected=why)]
    if how.leaks(text):
        return [Made(text, value, rejected="contamination: what was made")]
    checks, scores = ("length", "copy", "numbers", *how.leak_check()), {}
    if how.votes:
        votes = yield how.again(SAME.format(text=piece.text, made=text))
        scores = {"agree": sum(bool(NO.match(said(vote))) for vote in votes), "votes": how.votes}
        if 2 * scores["agree"] <= how.votes:
            return [Made(text, value, scores=scores, rejected="vote: it says something else")]
        checks = (*checks, f"vote {scores['agree']}/{how.votes}")
    return [Made(text, value, checks, scores)]


def _wrong(text: str, source: str, style: str) -> str:
    """Why a text is no rewriting of its source; empty: it may be one."""
    if not SHORTER * len(source) <= len(text) <= LONGER * len(source):
        return "length: much shorter or longer than its source"
    if style == "dialogue" and not {"question", "answer"} <= {turn.lower() for turn in TURNS.findall(text)}:
        return "form: no questions and answers"
    if new_numbers(text, source):
        return "numbers: one that its source does not have"
    if jaccard(*ngram_sets([text, source], COPY)) >= COPY.jaccard or text == source:
        return "copy: nearly its source"
    return ""
