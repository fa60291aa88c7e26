"""Tasks and their verifiers: what is held out, what is right, what no text can break."""

from __future__ import annotations

import json
import re
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparing.adapt import rewards
from sparing.adapt.rewards import load_task, verify
from sparing.base.config import UserError
from sparing.evals.verifiers import Problem, Verdict


def operands(problem: Problem) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", problem.prompt)]


@pytest.mark.parametrize("name", ["add", "add:1", "add:3", "add:12"])
def test_operands_of_held_out_sums_are_in_no_problem(name):
    task = load_task(name)
    learnt, scored = ({number for problem in side for number in operands(problem)} for side in (task.problems, task.held_out))
    assert learnt and scored and not learnt & scored
    assert all(sum(operands(problem)) == int(problem.answer) for problem in task.problems + task.held_out)
    assert len(set(task.held_out)) == len(task.held_out) and (name == "add:1" or len(task.held_out) >= 500)
    assert load_task(name) == task


@pytest.mark.parametrize("name", ["countdown:2", "countdown"])
def test_numbers_of_a_held_out_countdown_are_in_no_problem(name):
    task = load_task(name)
    learnt, scored = ({tuple(sorted(problem.tests)) for problem in side} for side in (task.problems, task.held_out))
    assert learnt and scored and not learnt & scored


@pytest.mark.parametrize(
    "text, reward",
    [
        ("103", 1), ("The sum is 103.", 1), ("21 + 82 = 103", 1), ("1,03", 1), ("103.0", 1), ("<answer>103</answer> is it, not 5", 1),
        ("#### 103\nfrom 7 steps", 1), ("\\boxed{103} in 2 lines", 1), ("<think>103</think>", 0), ("104", 0), ("-103", 0), ("", 0),
        ("9" * 5000, 0), ("103 or 104", 0),
    ],
)  # fmt: skip
def test_the_last_number_counts(text, reward):
    assert verify(Problem("What is 21 + 82?", "103"), text).reward == reward


@pytest.mark.parametrize(
    "text, reward",
    [
        ("<answer>(25 + 3) - 6</answer>", 1), ("25+3-6 = 22", 1), ("I think so\n(25 - 6) + 3", 1), ("<answer>22</answer>", 0),
        ("25 + 3 - 6 + 0", 0), ("25 - 3 * 6", 0), ("25 / (3 - 3) - 6", 0), ("25 ** 3 ** 6", 0), ("__import__('os')", 0),
        ("(" * 199, 0), ("25+" * 4000, 0), ("True + 25", 0), ("", 0),
    ],
)  # fmt: skip
def test_a_countdown_uses_its_numbers_once(text, reward):
    assert verify(Problem("", "22", "countdown", ("25", "3", "6")), text).reward == reward


@given(st.text(max_size=300), st.sampled_from(["number", "countdown"]))
def test_no_text_breaks_a_verifier(text, verifier):
    problem = Problem("", "22", verifier, ("25", "3", "6") if verifier == "countdown" else ())
    assert verify(problem, text).reward in (0, 1)


def test_answers_whose_judging_is_stopped_are_counted_and_told_of(monkeypatch, capsys):
    reasons = ["right", "out of time", "a test failed", *["too much output"] * 8, "broke the verifier (MemoryError)", "out of time"]
    monkeypatch.setattr(rewards, "_stopped", Counter())
    monkeypatch.setattr(rewards.verifiers, "verify", lambda problem, text: Verdict(0.0, text))
    assert [verify(Problem(""), reason).reason for reason in reasons] == reasons
    first, tenth = capsys.readouterr().err.splitlines()
    assert first.endswith("worth 0: 1 × out of time")
    assert tenth.endswith("worth 0: 8 × too much output, 1 × out of time, 1 × broke the verifier (MemoryError)")


@pytest.mark.parametrize("operation, value", [("+", 9), ("-", 5), ("*", 14), ("/", Fraction(7, 2))])
def test_countdown_computes_exactly(operation, value):
    wanted = Problem("", str(int(value)), "countdown", ("7", "2"))
    assert verify(wanted, f"7 {operation} 2").reward == float(value == int(value))


def write(path, *values) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def test_a_file_is_a_task(tmp_path):
    values = [{"prompt": f"Say {n}.", "answer": n, "verifier": "number"} for n in range(20)]
    file = write(tmp_path / "task.jsonl", *values, values[0])
    with open(file, "a") as more:
        more.write("{\n")
    task = load_task(file)
    assert task.counts == {"in": 22, "out": 20, "rejected": 1, "quarantined": 1} and [lost.line for lost in task.lost] == [22]
    assert (len(task.problems), len(task.held_out)) == (18, 2)
    assert not {problem.prompt for problem in task.problems} & {problem.prompt for problem in task.held_out}


@pytest.mark.parametrize(
    "value, said",
    [
        ({"verifier": "number"}, "no prompt"), ({"prompt": "x"}, "no verifier"), ({"prompt": "x", "verifier": "luck"}, "choose math"),
        ({"prompt": "x", "verifier": "number", "answer": "many"}, "has no number"), ([1], "no JSON object"),
        ({"prompt": "x", "verifier": "number", "answer": "1", "worked": 1}, "worked is no text"),
        ({"prompt": "x", "verifier": "format", "answer": "("}, "no regular expression"),
        ({"prompt": "x", "verifier": "schema", "answer": {"type": "numbre"}}, "no JSON schema that can be used"),
    ],
)  # fmt: skip
def test_a_bad_line_is_told_with_its_place(tmp_path, value, said):
    file = write(tmp_path / "task.jsonl", {"prompt": "a", "answer": "1", "verifier": "number"}, value)
    with pytest.raises(UserError, match=rf"task\.jsonl:2: .*{said}"):
        load_task(file)


@pytest.mark.parametrize("name, said", [("ad", "neither a file"), ("add:0", "from 1 to 18 digits"), ("gsm8k", "needs its file")])
def test_a_slip_in_a_name_is_one_line(name, said):
    with pytest.raises(UserError, match=said):
        load_task(name)


def test_gsm8k_reads_its_own_form(tmp_path):
    values = [{"question": f"How many is {n}?", "answer": f"It is <<1+1=2>>\n#### {n},000"} for n in range(9)]
    task = load_task("gsm8k", [write(tmp_path / "train.jsonl", *values)])
    assert sorted(int(problem.answer.replace(",", "")) for problem in task.problems + task.held_out) == [1000 * n for n in range(9)]
    assert all(verify(problem, f"so it is\n#### {problem.answer}").reward == 1 for problem in task.problems)
