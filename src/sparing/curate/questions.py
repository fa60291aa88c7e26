"""Questions and their answers from documents, by a teacher. An answer stays if the document has it and most further answers agree."""

from __future__ import annotations

import re
from itertools import pairwise

from sparing.curate.agreement import agree, supported
from sparing.curate.agreement import words as words_of
from sparing.curate.making import STEADY, How, Made, Piece, Steps, said
from sparing.curate.teachers import Ask

PIECE_BYTES = 4000
ASKING = (
    "Write {pairs} different questions that the text below answers, each with its short answer in the words of the text. Whoever reads a "
    "question does not know the text, so say what it is about. Begin each question's line with Q: and its answer's line with A:\n\n{text}"
)
ANSWERING = (
    "Text:\n{text}\n\nQuestion: {question}\n\nAnswer with a few words of the text, and nothing else. If the text does not answer it, "
    "write: not in the text."
)
MARK = re.compile(
    r"^[^\w\n]{0,8}(?:\d{1,3}\s?[.):]\s?)?(Q(?:uestion)?|A(?:nswer)?)\s?\d{0,3}\s?:\s*(?:\d{1,3}[.)]\s)?\s*(.*)", re.IGNORECASE
)
BARE = re.compile(
    r"\b(?:this|the|that|given) (?:text|passage|article|document|excerpt|paragraph|author|narrator|speaker)\b(?! of\b)", re.IGNORECASE
)
"""What a question says that cannot be understood by itself."""
LEAST_WORDS = 3


def questions(piece: Piece, how: How) -> Steps:
    """Up to how.pairs conversations of one question and its answer."""
    if how.leaks(piece.text):
        return [Made(piece.text, rejected="contamination: its source")]
    (answer,) = yield [Ask(ASKING.format(pairs=how.pairs, text=piece.text), how.tokens, STEADY)]
    if answer.failed:
        return [Made(piece.text, rejected=f"teacher: {answer.failed}")]
    text = said(answer)
    found = pairs_of(text)[: how.pairs]
    if not found:
        return [Made(text, rejected="form: no question with an answer")]
    made: list[Made] = []
    votes_on: list[tuple[int, str]] = []
    for asked, told in found:
        made.append(_looked_at(asked, told, piece.text, how))
        if not made[-1].rejected:
            votes_on.append((len(made) - 1, told))
    if not votes_on:
        return made
    prompts = [ANSWERING.format(text=piece.text, question=made[at].text) for at, _ in votes_on]
    votes = iter((yield [ask for prompt in prompts for ask in how.again(prompt)]))
    for at, told in votes_on:
        agreeing = sum(agree(said(next(votes)), told) for _ in range(how.votes))
        scores = {"agree": agreeing, "votes": how.votes}
        good = 2 * agreeing > how.votes
        checks = (*made[at].checks, f"vote {agreeing}/{how.votes}") if good else ()
        made[at] = Made(made[at].text, made[at].value, checks, scores, "" if good else "vote: no majority for the answer")
    return made


def _looked_at(asked: str, told: str, text: str, how: How) -> Made:
    """A pair, with what is wrong with it before anybody is asked."""
    value = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]}
    why = ""
    if len(words_of(asked)) < LEAST_WORDS:
        why = "form: no whole question"
    elif BARE.search(asked):
        why = "form: it cannot be understood without the text"
    elif how.leaks(asked, LEAST_WORDS) or how.leaks(told) or how.leaks(f"{asked} {told}"):
        why = "contamination: what was made"
    elif not supported(told, text):
        why = "support: the answer is not in the text"
    return Made(asked, value, ("support", *how.leak_check()), rejected=why)


def pairs_of(text: str) -> list[tuple[str, str]]:
    """(question, answer), as a teacher writes them: marked lines, which further lines may go on."""
    found: list[list[str]] = []
    for line in text.splitlines():
        line = line.replace("**", "")
        if (match := MARK.match(line)) is not None:
            found.append([match[1][0].upper(), match[2].strip()])
        elif found and line.strip():
            found[-1][1] += " " + line.strip()
    return [(one[1], other[1]) for one, other in pairwise(found) if one[0] == "Q" and other[0] == "A" and one[1] and other[1]]
