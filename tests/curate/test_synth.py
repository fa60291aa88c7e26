"""Exercises: each is right by its own verifier, none comes twice, and the same seed gives the same bytes."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from functools import cache
from itertools import pairwise, permutations, product
from statistics import mean

import pytest

from sparing.adapt.rewards import load_task, verify
from sparing.base.config import UserError
from sparing.cli.main import main
from sparing.curate.exercises import DIFFICULTIES, NAMES
from sparing.curate.relations import ENDS, OPENINGS
from sparing.curate.synth import KINDS, make, synth
from sparing.curate.worlds import WORLDS
from sparing.data.chats import chats
from sparing.evals.contained import uncontained
from sparing.evals.verifiers import Problem


@pytest.fixture(autouse=True, scope="module")
def _ended():
    yield
    from sparing.evals.verifiers import JUDGE

    JUDGE.end()


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def problem(exercise) -> Problem:
    return Problem(exercise.prompt, exercise.answer, exercise.verifier, exercise.tests, exercise.worked)


def made(kind: str, difficulty: int, count: int = 25) -> list:
    return [make(kind, difficulty, 3, number) for number in range(count)]


# by kind


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("kind", ["words", "countdown", "puzzles"])
def test_worked_answers_are_right_and_those_of_others_are_not(kind, difficulty):
    exercises = made(kind, difficulty)
    for one, other in pairwise(exercises):
        assert verify(problem(one), one.worked) == (1, "right"), one
        assert re.fullmatch("<think>.+</think>.+", one.worked)
        if one.answer != other.answer or one.tests != other.tests:
            assert verify(problem(one), other.worked).reward == 0, (one, other)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("kind", ["words", "countdown"])
def test_each_step_of_a_calculation_is_right(kind, difficulty):
    for exercise in made(kind, difficulty):
        for left, right in re.findall(r"([-\d]+ [-+*/] [-\d]+) = ([-\d]+)", exercise.worked):
            assert eval(left) == int(right), exercise.worked


@cache
def word_problems(difficulty: int) -> list:
    return made("words", difficulty, 2000)


OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": lambda a, b: a // b if a % b == 0 else None}
IN_WORDS = {"twice": "2", "half": "2", "a third": "3", "a quarter": "4", "a fifth": "5"}


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_a_word_problem_has_the_operations_of_its_difficulty_and_sometimes_a_number_too_many(difficulty):
    beside, exercises = 0, word_problems(difficulty)
    for exercise in exercises:
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+) [a-z]", exercise.worked)
        assert len(steps) == exercise.worked.count("=") == (1, 2, 3, 5, 8)[difficulty - 1]
        assert all(OPERATIONS[sign](int(a), int(b)) == int(result) for a, sign, b, result in steps), exercise
        assert steps[-1][-1] == exercise.answer == exercise.worked.partition("</think>")[2]
        question = re.sub(r"\b(twice|half|a (third|quarter|fifth))\b", lambda part: IN_WORDS[part[0]], exercise.question)
        told = Counter(re.findall(r"\d+", question))
        needed = Counter(re.findall(r"\d+", exercise.subject.replace("1/", "")))
        assert needed <= told and told.total() - needed.total() in (0, 1), exercise
        beside += told.total() - needed.total()
        known = needed + Counter(result for *_, result in steps)
        assert all(known[number] for a, _, b, _ in steps for number in (a, b)) or "remainder" in exercise.subject, exercise
    assert 0.27 < beside / len(exercises) < 0.4


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_a_word_problem_is_a_text_without_gaps_or_wrong_plurals(difficulty):
    for exercise in word_problems(difficulty):
        assert not re.search(r"[{}\[\]|_]|  | [.,?]|\b[01] [a-z]+s\b", exercise.question + exercise.worked), exercise
        assert re.fullmatch(r"[A-Z][^?]*\?", exercise.question) and all(
            sentence[0].isupper() or sentence[0].isdigit() for sentence in re.split(r"(?<=\.) ", exercise.question)
        )
        last: set[str] = set()
        for sentence in re.split(r"(?<=[.?]) ", exercise.question):
            names = set(re.findall(r"\w+", sentence)) & set(NAMES)
            if re.search(r"\b(s?he)\b", sentence, re.IGNORECASE):
                assert len(last) == 1, exercise  # whom else it could mean
                names |= last
            last = names or last


def test_there_are_thousands_of_different_word_problems_of_one_operation():
    assert len({make("words", 1, 0, number).subject for number in range(12_000)}) > 8000


def test_word_problems_are_of_all_kinds():
    asked = Counter()
    for exercise in word_problems(1):
        asked.update({kind for kind, question in ASKS.items() if re.search(question, exercise.question)})
    assert asked.keys() == ASKS.keys() and min(asked.values()) >= 5, asked
    labels = " ".join(exercise.subject for difficulty in (1, 2, 3) for exercise in word_problems(difficulty))
    assert not [one for one in (*OPENINGS, *ENDS, *(world.label for world in WORLDS)) if one not in labels]


ASKS = {
    "result unknown": r"(find|buy|get|lose|sell|give)s? .* have now\?|are( there)?.* now\b.*\?",
    "change unknown": r"some .*Now .*\d+.*How many",
    "start unknown": r"ha[sd] some .*(at first|at the start)\?",
    "whole unknown": r"\d+ (\w+) \w+ and also \d+ (?!\1)\w+ \w+\. ",
    "part unknown": r"\d+ of (them|.*) (are|were) .*(others|rest)",
    "difference unknown": r"How many (more|fewer) \w+ (do|did|does|are|were) .* than",
    "compared unknown": r"(\w+) ha[sd] \d+ (more|fewer) .* than \w+\. .*How many \w+ (does|did) \1 have\?",
    "referent unknown": r"ha[sd] \d+ (more|fewer) .* than (\w+)\. .*How many \w+ (does|did) \2 have\?",
    "equalise": r"need.* as many as|to have as many .* how many more",
    "product": r"\d+ (bags|boxes|jars) with \d+ \w+ in each",
    "size of a group": r"into \d+ \w+, the same number",
    "number of groups": r"into \w+, \d+ into each",
    "multiple": r"(times|twice) as many .* as .*\. .*How many \w+ ",
    "ratio": r"How many times as many",
    "rate": r"a day for \d+ days",
    "price": r"for \d+ dollars each",
    "change from a note": r"paid with \d+ dollars",
    "rows": r"\d+ rows of \d+",
}


def test_a_countdown_has_one_number_more_than_its_difficulty():
    for difficulty in DIFFICULTIES:
        assert {len(exercise.tests) for exercise in made("countdown", difficulty)} == {difficulty + 1}


CLUES = {
    r"(\w+) is somewhere to the left of (\w+)": lambda at, a, b: at[a] < at[b],
    r"(\w+) is directly to the left of (\w+)": lambda at, a, b: at[a] == at[b] - 1,
    r"(\w+) and (\w+) are side by side": lambda at, a, b: abs(at[a] - at[b]) == 1,
    r"(\w+) and (\w+) are not side by side": lambda at, a, b: abs(at[a] - at[b]) > 1,
    r"Between (\w+) and (\w+) are exactly (\d)": lambda at, a, b, n: abs(at[a] - at[b]) - 1 == int(n),
    r"(\w+) is at one of the ends": lambda at, a: at[a] in (1, len(at)),
    r"(\w+) is not in place (\d)": lambda at, a, n: at[a] != int(n),
}
CLAIMS = {
    r"(\w+) is a knight": lambda is_, me, a: is_[a],
    r"(\w+) is a knave": lambda is_, me, a: not is_[a],
    r"(\w+) and I are of different kinds": lambda is_, me, a: is_[a] != is_[me],
    r"(\w+) and (\w+) are of the same kind": lambda is_, me, a, b: is_[a] == is_[b],
    r"At least one of (\w+) and (\w+) is a knave": lambda is_, me, a, b: not (is_[a] and is_[b]),
    r"At least one of (\w+) and (\w+) is a knight": lambda is_, me, a, b: is_[a] or is_[b],
    r"If (\w+) is a knight, so is (\w+)": lambda is_, me, a, b: is_[b] if is_[a] else True,
    r"Exactly (\d) of us are knights": lambda is_, me, n: sum(is_.values()) == int(n),
}


def said(sentence: str, table: dict):
    """(what it says, as a function; its words)"""
    ((holds, match),) = [(holds, match) for pattern, holds in table.items() if (match := re.fullmatch(pattern, sentence))]
    return holds, match.groups()


def solutions(question: str) -> list[list[str]]:
    """Every answer to a puzzle, from its text alone."""
    if row := re.fullmatch(r"(.+) stand in a row\. (.+) In which order do they stand, from left to right\?", question):
        names = re.split(", | and ", row[1])
        clues = [said(clue, CLUES) for clue in re.findall(r"\(\d+\) ([^.]+)\.", row[2])]
        orders = ({name: place for place, name in enumerate(order, 1)} for order in permutations(names))
        return [list(at) for at in orders if all(holds(at, *words) for holds, words in clues)]
    names = re.split(", | and ", re.search(r"lie\. (.+) are knights or knaves", question)[1])
    claims = [(me, *said(claim, CLAIMS)) for me, claim in re.findall(r'(\w+) says: "([^."]+)\."', question)]
    kinds = (dict(zip(names, kinds, strict=True)) for kinds in product((True, False), repeat=len(names)))
    found = [is_ for is_ in kinds if all(holds(is_, me, *words) == is_[me] for me, holds, words in claims)]
    return [[name for name in names if is_[name]] or ["nobody"] for is_ in found]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_a_puzzle_has_one_solution_by_its_text_alone(difficulty):
    sorts = set()
    for exercise in made("puzzles", difficulty, 12):
        assert [f"<answer>{', '.join(names)}</answer>" for names in solutions(exercise.question)] == [
            exercise.worked.partition("</think>")[2]
        ]
        sorts.add(exercise.subject.split()[0])
    assert sorts == {"row", "island"}


def test_a_puzzle_has_two_people_more_than_its_difficulty():
    for difficulty in DIFFICULTIES:
        for exercise in made("puzzles", difficulty):
            people = re.search(r"(?:^|lie\. )([\w, ]+?) (?:stand|are knights)", exercise.question)[1]
            assert len(re.split(", | and ", people)) == difficulty + 2


def test_names_in_another_order_or_fewer_of_them_are_wrong():
    for exercise in made("puzzles", 3, 20):
        names = re.search("<answer>(.+)</answer>", exercise.worked)[1].split(", ")
        for wrong in (names[::-1], names[1:], [*names, "Zoe"]):
            if wrong != names:
                assert verify(problem(exercise), f"<answer>{', '.join(wrong)}</answer>").reward == 0
        right = f"<answer>{', '.join(names)}</answer>"
        assert verify(problem(exercise), f"<answer>{names[0]}?</answer>\nNo:\n{right}.\n").reward == 1
        assert verify(problem(exercise), f"{right} or <answer>Zoe</answer>").reward == 0


def program(exercise) -> list[str]:
    """The lines of the worked answer's function."""
    return re.search("```python\n(.+)\n```", exercise.worked, re.DOTALL)[1].splitlines()


def passes(lines: list[str], tests) -> bool:
    names: dict = {}
    try:
        exec("\n".join([*lines, *tests]), names)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_a_program_passes_its_tests_and_without_any_of_its_steps_it_does_not(difficulty):
    for exercise in made("programs", difficulty):
        lines = program(exercise)
        assert lines[0] == "def solve(value):" and lines[-1] == "    return value"
        assert len(lines) - 2 == (2, 3, 4, 6, 8)[difficulty - 1] and len(exercise.tests) == 8
        assert passes(lines, exercise.tests)
        given, result = re.search(r"So (.+) becomes (.+)\.$", exercise.question).groups()
        assert passes(lines, [f"assert solve({given}) == {result}"])
        assert not any(given in test for test in exercise.tests)  # what is shown is not what is asked
        for at in range(1, len(lines) - 1):
            assert not passes([*lines[:at], *lines[at + 1 :]], exercise.tests), lines
        assert not passes(["def solve(value):", f"    return {exercise.tests[0].partition(' == ')[2]}"], exercise.tests)


@pytest.mark.skipif(uncontained() is not None, reason=f"code cannot be contained here: {uncontained()}")
def test_programs_are_judged_contained(tmp_path):
    synth(["programs"], 10, str(tmp_path / "task.jsonl"))
    task = load_task(str(tmp_path / "task.jsonl"))
    rows = {row["prompt"]: row for row in lines(tmp_path / "task.jsonl")}
    found = task.problems + task.held_out
    assert len(found) == 10
    for one, other in pairwise(found):
        assert verify(one, rows[one.prompt]["worked"]) == (1, "right")
        assert verify(one, rows[other.prompt]["worked"]).reward == 0
    assert verify(found[0], "<think>so</think>I do not know.").reward == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_harder_takes_more_work(kind):
    work = [mean(len(exercise.worked) for exercise in made(kind, difficulty)) for difficulty in DIFFICULTIES]
    assert all(more > 1.1 * less for less, more in pairwise(work)), work


@pytest.mark.parametrize("kind", KINDS)
def test_an_exercise_depends_on_its_seed_number_and_difficulty_alone(kind):
    one = make(kind, 3, 7, 12)
    random.seed(1)
    assert make(kind, 3, 7, 12) == one
    assert len({exercise.subject for exercise in (one, make(kind, 3, 7, 13), make(kind, 3, 8, 12), make(kind, 4, 7, 12))}) == 4


# the verb


def test_a_task_is_what_grpo_reads(tmp_path):
    out = tmp_path / "task.jsonl"
    summary = synth(["words", "countdown:2"], 40, str(out), seed=7)
    assert summary["documents"]["out"] == 40 and summary["documents"]["in"] == 40 + summary["documents"]["rejected"]
    assert summary["exercises"] == {"countdown/2": 20, **{f"words/{difficulty}": 4 for difficulty in DIFFICULTIES}}
    task, rows = load_task(str(out)), lines(out)
    assert len(task.problems) + len(task.held_out) == len(rows) == 40
    worked = {row["prompt"]: row["worked"] for row in rows}
    assert all(verify(one, worked[one.prompt]).reward == 1 for one in task.problems + task.held_out)
    assert rows[0]["source"] == "words/1 seed 7 number 0" and rows[0]["difficulty"] == 1
    kind, difficulty, seed, number = re.fullmatch(r"(\w+)/(\d) seed (\d+) number (\d+)", rows[-1]["source"]).groups()
    assert make(kind, int(difficulty), int(seed), int(number)).prompt == rows[-1]["prompt"]


def test_chats_are_what_sft_reads(tmp_path):
    out = tmp_path / "chats.jsonl"
    synth(["words:2"], 10, str(out), seed=7, form="chats")
    refused = []
    found = list(chats([str(out)], refused.append))
    assert len(found) == 10 and not refused
    exercise = make("words", 2, 7, 0)
    assert [message["content"] for message in found[0].messages] == [exercise.prompt, exercise.worked]
    assert lines(out)[0]["source"] == "words/2 seed 7 number 0"


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        synth(list(KINDS), 20, str(file), seed=seed)
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert not {row["prompt"] for row in lines(files[0])} & {row["prompt"] for row in lines(files[2])}


def test_a_folder_has_a_file_for_each_kind_and_is_a_task(tmp_path):
    synth(["words", "countdown"], 10, str(tmp_path / "made"))
    assert {file.name: len(lines(file)) for file in (tmp_path / "made").iterdir()} == {"words.jsonl": 5, "countdown.jsonl": 5}
    task = load_task(str(tmp_path / "made"))
    assert len(task.problems) + len(task.held_out) == 10
    with pytest.raises(UserError, match="is not empty; choose a new folder"):
        synth(["words"], 1, str(tmp_path / "made"))


def test_none_comes_twice_and_what_was_left_out_is_counted(tmp_path):
    out = tmp_path / "many.jsonl"
    summary = synth(["words:1"], 2000, str(out))
    assert summary["rejected"]["made before"] == summary["documents"]["rejected"] > 0
    numbers = [int(row["source"].rpartition(" ")[2]) for row in lines(out)]
    assert len({make("words", 1, 0, number).subject for number in numbers}) == 2000


def test_evaluation_data_is_left_out(tmp_path):
    evaluation, out = tmp_path / "evaluation.jsonl", tmp_path / "task.jsonl"
    wanted = list(KINDS)
    synth(wanted, 30, str(evaluation), seed=1)
    leaked = {row["prompt"] for row in lines(evaluation)}
    summary = synth(wanted, 60, str(out), seed=1, against=[str(evaluation)])
    assert summary["rejected"]["contamination"] >= 30 and not leaked & {row["prompt"] for row in lines(out)}
    others = synth(wanted, 60, str(out), seed=2, against=[str(evaluation)])  # they have the same words, but other numbers and names
    assert others["rejected"].get("contamination", 0) < 6


@pytest.mark.parametrize(
    "words, said",
    [
        ("synth word --count 3 --out {tmp}/x", "data synth word: no such kind; nearest: words; all: words, countdown, puzzles, programs"),
        ("synth words:6 --count 3 --out {tmp}/x", "data synth words:6: difficulty is 1 to 5, as words:3"),
        ("synth words: --count 3 --out {tmp}/x", "difficulty is 1 to 5"),
        ("synth --count 3 --out {tmp}/x", "data synth needs KIND"),
        ("synth words --out {tmp}/x", "data synth needs --count"),
        ("synth words --count -3 --out {tmp}/x", "--count -3: must be 1 or more"),
        ("synth words --count 3 --out {tmp}/x.txt", "x.txt: name a file that ends in .jsonl, or a folder"),
        ("synth words --count 3 --out {tmp}/no/x.jsonl", "there is no folder"),
        ("synth words --count 3 --out {tmp}/x --form table", "--form table: choose task or chats"),
        ("synth words --count 3 --out {tmp}/x --against {tmp}/gone", "no such file or folder"),
        ("synth words --count 3 --out {tmp}/x --workers 2", "data synth: unknown option --workers"),
        ("stats {tmp} --count 3 --out {tmp}/x", "data stats: unknown option --count"),
    ],
)  # fmt: skip
def test_a_slip_is_one_line(tmp_path, capsys, words, said):
    assert main(["data", *words.format(tmp=tmp_path).split()]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_more_than_there_are_is_one_line_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("sparing.curate.synth.TRIES", 5)
    with pytest.raises(UserError, match=r"countdown:1: no more of them \(5 in a row were made before\), \d+ of 100000 are made; ask for"):
        synth(["countdown:1"], 100_000, str(tmp_path / "x.jsonl"))
    assert not list(tmp_path.glob("*x.jsonl*"))


def test_the_command_line(tmp_path, capsys):
    command = ["data", "synth", "words:2", "countdown", "--count", "6", "--seed", "5", "--out", str(tmp_path / "x.jsonl"), "--json"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["documents"] == {"in": 6, "out": 6, "rejected": 0, "quarantined": 0}
    assert "documents: 6 in, 6 out" in captured.err
