"""What the arms of `benchmarks.exercises` learn, and how they are compared."""

import json
import random

from benchmarks.exercises import FORM, Exercises, beside, in_lines, table
from sparing.adapt.rewards import Problem, verify
from sparing.curate.word_problems import words

LONG = "Anna has 12 red apples and 30 green ones in the cellar, and Ben brings her 7 more on every day of the week."


def figure(tmp_path, **more):
    (tmp_path / "svamp.jsonl").write_text(
        "".join(
            json.dumps({"Body": body, "Question": "How many are there?", "Answer": answer}) + "\n"
            for body, answer in ((LONG, 91.0), ("Two boxes hold 4.5 kg each.", 4.5), ("A third is left.", 0.3333333333))
        )
    )
    rows = [("How many legs do 3 dogs have?", "3 * 4 = <<3*4=12>>12\n#### 12"), (f"{LONG} How many after a week?", "#### 91")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    made = Exercises("", str(tmp_path / "train.jsonl"), str(tmp_path / "svamp.jsonl"), "", str(tmp_path / "out"), **more)
    made.folder = tmp_path / "out"
    made.folder.mkdir()
    return made


def test_worked_answers_are_right_in_the_other_form_too():
    for difficulty in range(1, 6):
        for seed in range(20):
            exercise = words(random.Random(seed), difficulty)
            text = in_lines(exercise.worked, exercise.answer)
            assert verify(Problem("", exercise.answer), text).reward == 1
            assert "<" not in text and text.splitlines()[-1] == f"#### {exercise.answer}"
            assert all(" = " in line for line in text.splitlines()[:-1])


def test_problems_have_answers_that_can_be_written(tmp_path):
    found = {one.answer: one.prompt for one in figure(tmp_path)._chosen("svamp")}
    assert found.keys() == {"91", "4.5"}
    assert found["4.5"] == "Two boxes hold 4.5 kg each. How many are there?"


def test_what_is_scored_is_not_learnt(tmp_path):
    made = figure(tmp_path, count=10)
    texts = tmp_path / "scored.jsonl"
    texts.write_text("".join(json.dumps({"question": one.prompt}) + "\n" for one in made._chosen("svamp")))
    file, counts = made._gsm8k(texts)
    assert counts == {"in": 2, "out": 1}
    (row,) = map(json.loads, file.read_text().splitlines())
    assert [turn["content"] for turn in row["messages"]] == [f"How many legs do 3 dogs have?\n{FORM}", "3 * 4 = 12\n#### 12"]


def test_exercises_are_asked_as_gsm8k_is(tmp_path):
    made = figure(tmp_path, count=4)
    texts = tmp_path / "scored.jsonl"
    texts.write_text(json.dumps({"question": LONG}) + "\n")
    file, documents = made._made_up("easy", texts)
    assert documents["out"] == 4
    for row in map(json.loads, file.read_text().splitlines()):
        asked, said = (turn["content"] for turn in row["messages"])
        assert asked.endswith(f"\n{FORM}") and "####" in said


def test_the_table_has_points_and_their_error():
    assert beside([1, 1, 0, 1], [0, 1, 0, 0])[0] == 50
    score = {"accuracy": 0.75, "length": 20.0, "cut": 1, "right": [1, 1, 0, 1]}
    worse = score | {"accuracy": 0.25, "right": [0, 1, 0, 0]}
    arms = {"gsm8k": {"svamp": worse, "mawps": worse, "tokens": 5000, "seconds": 60.0}, "words": {"svamp": score, "mawps": worse}}
    lines = table({"data": {"gsm8k": {"in": 2, "out": 1}}, "arms": arms}).splitlines()
    assert "svamp 75.0% of 4, 20 tokens an answer, 1 cut (+50.0 ± 28.9 points beside gsm8k)" in lines[2]
    assert "(+0.0 ± 0.0 points beside gsm8k)" in lines[2] and "5 k tokens in 60 s" in lines[1]
