"""Exercises on topics, by a teacher: with a short answer, on which most solutions agree, or with code that is run, contained.

Of a program the tests decide, and so they are tested too: the teacher's own solution passes them, a function that does nothing does not,
and most of the further solutions, written from the description alone, do.
"""

from __future__ import annotations

import ast
import re
from itertools import pairwise

from sparing.curate.agreement import agree, is_number
from sparing.curate.agreement import words as words_of
from sparing.curate.exercises import Exercise
from sparing.curate.making import How, Made, Steps, said
from sparing.curate.synth import row
from sparing.curate.teachers import Answer, Ask
from sparing.data.worked import thought
from sparing.evals.verifiers import CODE, NUMBER, Problem, check, final, verify

SORTS = ("answer", "code")
VARIED = 1.0
"""Temperature, so that exercises on one topic differ."""
LEAST_WORDS, MOST_ANSWER_WORDS = 4, 6
LEAST_TESTS, MOST_TESTS = 3, 20
POSE = (
    "Write an exercise about {topic}. It has one right answer, which is a number or at most three words, and it says all that is needed to "
    "find it. Solve it step by step. Write the exercise behind Exercise:, the steps behind Solution:, and the answer alone behind Answer:"
)
SOLVE = "{question}\n\nThink step by step. Then write the answer alone, in a last line that begins with Answer:"
POSE_CODE = (
    "Write a programming exercise about {topic}: one Python function, described so exactly that it can be written from the description "
    "alone, with its name, what it takes and what it returns. Write the description behind Exercise:, then a solution in a block "
    "```python, and then, in a second block ```python, at least five tests, each a line that begins with assert."
)
FORM_CODE = "Write the function in a block ```python."
SECTION = re.compile(r"^[^\w\n]{0,8}(exercise|solution|answer|tests?)[^\w\n:]{0,8}:[ \t*]*", re.IGNORECASE | re.MULTILINE)
TASK, ANSWERED = "<answer>", "</answer>"


def exercise(topic: str, number: int, how: How) -> Steps:
    """The exercise with this number of a topic, judged by its answer."""
    (answer,) = yield [Ask(POSE.format(topic=topic), how.tokens, VARIED, number)]
    if answer.failed:
        return [Made(topic, rejected=f"teacher: {answer.failed}")]
    text = said(answer)
    parts = sections(text)
    question, told = parts.get("exercise", ""), _first_line(parts.get("answer", ""))
    words = words_of(told)
    if len(question.split()) < LEAST_WORDS or not 0 < len(words) <= MOST_ANSWER_WORDS:
        return [Made(text, rejected="form: no exercise with a short answer")]
    posed = _exercise(question, told, parts.get("solution", ""))
    value = row(posed, how.form, {})
    if how.leaks(question, LEAST_WORDS) or how.leaks(posed.worked):
        return [Made(question, value, rejected="contamination: what was made")]
    if not verify(_problem(posed), posed.worked).reward:
        return [Made(question, value, rejected="form: its answer cannot be judged")]
    votes = yield how.again(SOLVE.format(question=question))
    return [_voted(posed, how, ("verifier", *how.leak_check()), [not vote.failed and agree(last_answer(vote), told) for vote in votes])]


def program(topic: str, number: int, how: How) -> Steps:
    """The programming exercise with this number of a topic."""
    (answer,) = yield [Ask(POSE_CODE.format(topic=topic), how.tokens, VARIED, number)]
    if answer.failed:
        return [Made(topic, rejected=f"teacher: {answer.failed}")]
    text = said(answer)
    question, blocks = sections(text.partition("```")[0]).get("exercise", ""), CODE.findall(text)
    tests = tests_of(blocks[-1]) if len(blocks) > 1 else ()
    if len(question.split()) < LEAST_WORDS or len(tests) < LEAST_TESTS:
        return [Made(text, rejected="form: no exercise with a solution and tests")]
    worked = f"```python\n{blocks[0].strip()}\n```"
    posed = Exercise(question, "", worked, question, FORM_CODE, "code", tests)
    value, problem = row(posed, how.form, {}), _problem(posed)
    if how.leaks(question, LEAST_WORDS) or how.leaks(worked):
        return [Made(question, value, rejected="contamination: what was made")]
    if not (verdict := verify(problem, worked)).reward:
        return [Made(question, value, rejected=f"code: {verdict.reason}")]
    if verify(problem, empty(blocks[0])).reward:
        return [Made(question, value, rejected="code: its tests pass what does nothing")]
    votes = yield how.again(posed.prompt)
    checks = ("code", "tests", *how.leak_check())
    return [_voted(posed, how, checks, [bool(not vote.failed and verify(problem, said(vote)).reward) for vote in votes])]


def can_run() -> None:
    """Raises UserError, in one line, where code cannot be contained on this machine."""
    check(Problem("", verifier="code", tests=("assert True",)))


def _exercise(question: str, told: str, solution: str) -> Exercise:
    steps = [solution.strip().rstrip(".")] if solution.strip() else []
    words = words_of(told)
    if is_number(words[0]) and sum(map(is_number, words)) == 1:
        return Exercise(question, NUMBER.findall(told)[-1], thought(steps, told), question)
    pattern = r"(?i).*<answer>\s*(?:(?:an?|the)\s+)?" + r"\s+".join(map(re.escape, told.strip(" .").split())) + r"\s*</answer>\W*"
    form = f"Write the answer as {TASK}answer{ANSWERED}."
    return Exercise(question, pattern, thought(steps, f"{TASK}{told.strip(' .')}{ANSWERED}"), question, form, "format")


def _problem(posed: Exercise) -> Problem:
    return Problem(posed.prompt, posed.answer, posed.verifier, posed.tests, posed.worked)


def _voted(posed: Exercise, how: How, checks: tuple[str, ...], votes: list[bool]) -> Made:
    scores = {"agree": sum(votes), "votes": how.votes}
    good = 2 * scores["agree"] > how.votes
    passed = (*checks, f"vote {scores['agree']}/{how.votes}") if good else ()
    return Made(posed.question, row(posed, how.form, {}), passed, scores, "" if good else "vote: no majority for the answer")


def sections(text: str) -> dict[str, str]:
    """What is behind each mark; of equal marks the first."""
    found: dict[str, str] = {}
    marks: list[re.Match | None] = list(SECTION.finditer(text))
    for mark, following in pairwise([*marks, None]):
        found.setdefault(mark[1].lower(), text[mark.end() : following.start() if following else len(text)].strip(" \t\n*#"))
    return found


def last_answer(answer: Answer) -> str:
    """What a solution says behind its last mark, or else in its last line."""
    text = said(answer)
    behind = [text[mark.end() :] for mark in SECTION.finditer(text) if mark[1].lower() == "answer"]
    return _first_line(behind[-1]) if behind else (final(text).strip().splitlines() or [""])[-1]


def _first_line(text: str) -> str:
    return next((line.strip(" \t*`$") for line in text.splitlines() if line.strip(" \t*`$")), "")


def tests_of(block: str) -> tuple[str, ...]:
    """The assertions of a block of code, each as a line of its own; none where it is no Python."""
    try:
        body = ast.parse(block).body
        return tuple(dict.fromkeys(ast.unparse(node) for node in body if isinstance(node, ast.Assert)))[:MOST_TESTS]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()


def empty(code: str) -> str:
    """Functions of the same names that do nothing."""
    try:
        names = [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        names = []
    return "```python\n" + "\n".join(f"def {name}(*given, **named):\n    return None" for name in names) + "\n```"
