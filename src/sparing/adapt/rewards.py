"""Tasks: problems to learn from and others to score on, with a verifier each. From JSON lines, or built in: add, countdown, gsm8k.

Built-in problems have worked answers too: steps by a rule between <think> marks, as DeepSeek-R1 has them, and then what is asked for.

Whether a problem is held out is decided by a hash of what it is about, so that none is on both sides: for `add`, of each operand, for
`countdown`, of its numbers, else of the prompt.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.files import alike
from sparing.base.messages import say
from sparing.data.accounts import Accounts
from sparing.data.files import find_files
from sparing.data.sources import Rejected, Row, Tally, rows
from sparing.data.split import SPACE, content_hash
from sparing.data.worked import countdown, thought
from sparing.evals import verifiers
from sparing.evals.verifiers import Problem, Verdict, check

PROBLEMS, HELD_OUT = 8192, 512
"""Most problems of a built-in task."""
SHARE = 0.28
"""Of the operands that are held out: of two digits 25 of 90, which make 625 sums."""
FILE_SHARE = 0.1
"""Of a file's problems."""
TRIES = 60_000
"""Of two numbers there are few countdown problems."""
DIGITS, COUNT = (1, 18), (2, 6)
"""Least and most of an operand's digits in `add`, and of numbers in `countdown`."""

STOPPED = ("out of time", "out of memory", "too much output", "ended early", "broke the verifier")
"""Beginnings of reasons why a verdict has not come by itself."""

CALCULATED = re.compile("<<.*?>>")
"""What GSM8K's answers have for a calculator, behind each step that says the same."""


@dataclass(frozen=True)
class Task:
    """Problems of one kind."""

    name: str
    problems: list[Problem]
    """To learn from; never empty."""
    held_out: list[Problem]
    """To score on; never empty, and disjoint from the others."""
    counts: dict[str, int] | None = None
    """`data.accounts`' of the file's rows: what comes again is rejected. None: the problems are made here."""
    lost: tuple[Rejected, ...] = ()
    """Of the file: what could not be read."""


def load_task(path_or_name: str, data: Sequence[str] = ()) -> Task:
    """A built-in task by its name (add, add:3 for three digits, countdown, countdown:4 for four numbers, gsm8k), else a file of JSON lines.

    data: gsm8k's own files. Each line has `prompt`, `verifier`, and, as the verifier has it, `answer` and `tests`; it may have `worked`, an
    answer with its steps.
    Raises UserError, one line, for what cannot be read or cannot be judged here.
    """
    name, _, number = path_or_name.partition(":")
    if name in BUILT_IN and not Path(path_or_name).exists():
        if data and name != "gsm8k":
            raise UserError(f"--data is for gsm8k; {name} makes its own problems")
        return BUILT_IN[name](path_or_name, number, data)
    if not Path(path_or_name).exists():
        like = alike(path_or_name)
        raise UserError(
            f"task {path_or_name}: neither a file nor one of {', '.join(BUILT_IN)}" + (f" (did you mean {like}?)" if like else "")
        )
    return _read(path_or_name, [path_or_name], problem_of)


_stopped: Counter[str] = Counter()


def verify(problem: Problem, text: str) -> Verdict:
    """Judge one answer, as `evals.verifiers` does. Answers whose judging had to be stopped are counted and told of, in a line each for
    the first, the tenth, the hundredth of this process and so on."""
    verdict = verifiers.verify(problem, text)
    if verdict.reason.startswith(STOPPED):
        _stopped[verdict.reason] += 1
        if re.fullmatch("10*", str(_stopped.total())):
            say(f"judging was stopped, and the answer is worth 0: {', '.join(f'{n:,} × {why}' for why, n in _stopped.most_common())}")
    return verdict


def _held_out(subject: str, share: float) -> bool:
    return content_hash(subject.encode()) < share * SPACE


# add


def _add(name: str, number: str, _data: Sequence[str]) -> Task:
    digits = _within(name, number, 2, DIGITS, "digits")
    low, high = (0, 9) if digits == 1 else (10 ** (digits - 1), 10**digits - 1)
    sides = []
    for held_out, most in ((False, PROBLEMS), (True, HELD_OUT)):
        pairs = _some(_operands(low, high, held_out, 2 * most), most)
        asked = "What is {} + {}? Answer with the number alone."
        sides.append([Problem(asked.format(a, b), str(a + b), worked=_in_columns(a, b)) for a, b in pairs])
    return Task(name, *sides)


def _in_columns(a: int, b: int) -> str:
    """The sum of two numbers of as many digits, digit by digit from the right."""
    steps, carry, columns = [], 0, list(zip(reversed(str(a)), reversed(str(b)), strict=True))
    for place, (x, y) in enumerate(columns, 1):
        total = int(x) + int(y) + carry
        steps.append(f"{x} + {y}{' + 1' if carry else ''} = {total}")
        carry = int(total >= 10)
        if carry and place < len(columns):
            steps[-1] += f", write {total - 10}, carry 1"
    return thought(steps, str(a + b))


def _operands(low: int, high: int, held_out: bool, count: int) -> list[int]:
    """All numbers of this side, or `count` of them where there are many."""
    rng = random.Random(f"{low} {held_out}")
    many = high - low > 20 * count
    numbers: Iterator[int] = iter(lambda: rng.randint(low, high), None) if many else iter(range(low, high + 1))
    return list(itertools.islice((n for n in numbers if _held_out(f"add {n}", SHARE) == held_out), count if many else None))


def _some(numbers: list[int], most: int) -> list[tuple[int, int]]:
    """Different pairs of the numbers, in an order that looks random and is always the same."""
    rng, size = random.Random(len(numbers)), len(numbers)
    places = rng.sample(range(size * size), min(most, size * size))
    return [(numbers[place // size], numbers[place % size]) for place in places]


# countdown


def _countdown(name: str, number: str, _data: Sequence[str]) -> Task:
    count = _within(name, number, 3, COUNT, "numbers")
    rng, sides = random.Random(count), {False: [], True: []}
    wanted, seen = {False: PROBLEMS, True: HELD_OUT}, set()
    for _ in range(TRIES):
        if all(len(sides[side]) == most for side, most in wanted.items()):
            break
        numbers = [rng.randint(1, 25) for _ in range(count)]
        target, question, form, worked = countdown(numbers, rng)
        subject = f"countdown {sorted(numbers)}"
        side = _held_out(subject, SHARE)
        if not 1 <= target <= 100 or (subject, target) in seen or len(sides[side]) == wanted[side]:
            continue
        seen.add((subject, target))
        sides[side].append(Problem(f"{question} {form}", str(target), "countdown", tuple(map(str, numbers)), worked))
    return Task(name, sides[False], sides[True])


# gsm8k


def _gsm8k(name: str, number: str, data: Sequence[str]) -> Task:
    if number:
        raise UserError(f"task {name}: gsm8k takes no number")
    if not data:
        raise UserError("task gsm8k needs its file: --data train.jsonl, of github.com/openai/grade-school-math")
    return _read(name, data, _question_of)


def _question_of(value: dict) -> Problem:
    question, answer = value.get("question"), value.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
        raise UserError("no question, or no answer with ####")
    worked = CALCULATED.sub("", answer).strip()
    return Problem(f"{question.strip()}\nEnd with #### and the number.", answer.rpartition("####")[2].strip(), worked=worked)


# files


def problem_of(value: dict) -> Problem:
    """A problem from an object of a task's file. Raises UserError."""
    prompt, verifier, answer, worked = value.get("prompt"), value.get("verifier"), value.get("answer", ""), value.get("worked") or ""
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("no prompt")
    if not isinstance(verifier, str):
        raise UserError("no verifier")
    if not isinstance(worked, str):
        raise UserError("worked is no text")
    tests = value.get("tests") or ()
    if not isinstance(tests, list | tuple):
        tests = (tests,)
    return Problem(prompt, _as_text(answer), verifier, tuple(map(_as_text, tests)), worked)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _read(name: str, paths: Sequence[str], problem: Callable[[dict], Problem]) -> Task:
    lost: list[Rejected] = []
    accounts = Accounts(lost.append)
    found = [_problem(row, problem) for row in accounts.reading(rows(find_files(paths), accounts))]
    if not found:
        raise UserError(f"task {name}: no problems in it{f': {told(lost)}' if lost else ''}")
    found = sorted(dict.fromkeys(found), key=lambda one: content_hash(one.prompt.encode()))
    accounts.out, accounts.rejected = len(found), accounts.into - accounts.quarantined - len(found)
    prompts = list(dict.fromkeys(one.prompt for one in found))
    if len(prompts) < 2:
        raise UserError(f"task {name}: has one problem; one more is needed, to score on")
    held_out = set(prompts[: max(1, round(FILE_SHARE * len(prompts)))])
    learnt, scored = ([one for one in found if (one.prompt in held_out) == side] for side in (False, True))
    return Task(name, learnt, scored[:HELD_OUT], accounts.balance(), tuple(lost))


def told(lost: Sequence[Rejected]) -> str:
    """The commonest reasons."""
    tally = Tally()
    for rejected in lost:
        tally(rejected)
    return str(tally)


def _problem(row: Row, problem: Callable[[dict], Problem]) -> Problem:
    try:
        if not isinstance(row.value, dict):
            raise UserError("no JSON object")
        made = problem(row.value)
        check(made)
        return made
    except UserError as error:
        raise UserError(f"{row.source}:{row.line}: {error}") from None


def _within(name: str, number: str, default: int, limits: tuple[int, int], what: str) -> int:
    if not number:
        return default
    if not number.isdecimal() or not limits[0] <= int(number) <= limits[1]:
        raise UserError(f"task {name}: from {limits[0]} to {limits[1]} {what}, as {name.partition(':')[0]}:{default}")
    return int(number)


BUILT_IN: dict[str, Callable[[str, str, Sequence[str]], Task]] = {"add": _add, "countdown": _countdown, "gsm8k": _gsm8k}
