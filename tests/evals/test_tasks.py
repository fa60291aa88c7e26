import json
from pathlib import Path

import pytest

from sparing.base.config import UserError
from sparing.evals.tasks import read


def written(path, *rows, lines=True):
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return path


def test_shapes_of_questions(tmp_path):
    quiz = [
        {"question": "Q\u2028?", "choices": ["a", " b"], "answer": 1},
        {"question": "Q", "choices": ["x", "y"], "answer": "x"},
        {"question": "Q", "choices": ["x", "y"], "answer": "B", "more": 1},
        {
            "instruction": "Choose the answer to the question: Why?\n\nAnswer1: one. Answer2: two\n\nAnswer format: answer1/answer2",
            "answer": "answer2",
        },
    ]
    form, rows = read(written(tmp_path / "quiz.json", *quiz, lines=False))
    assert form == "choices" and [row["right"] for row in rows] == [1, 0, 1, 1]
    assert rows[0] == {"question": "Q\u2028?", "choices": ["a", "b"], "right": 1}
    assert rows[3] == {"question": "Why?", "choices": ["one.", "two"], "right": 1}
    path = tmp_path / "raw.jsonl"
    path.write_text('{"question": "a\u2028b", "answer": 4}\n\n', encoding="utf-8")
    assert read(path) == ("answer", [{"question": "a\u2028b", "answer": "4"}])
    assert read(written(tmp_path / "w.jsonl", {"text": "a b\nc"})) == ("word", [{"before": "a b", "word": "c"}])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"question": "Q", "choices": ["a", "b"], "answer": 2}], "row 1: answer 2 is none of its 2 choices"),
        ([{"question": "Q", "choices": ["a", "b"], "answer": "c"}], "row 1: answer 'c' is none"),
        ([{"question": "Q", "choices": ["a", "b"]}], "row 1: answer None is none"),
        ([{"text": "a b"}, {"question": "Q"}], "row 2: has neither"),
        ([{"text": "a b"}, {"question": "Q", "answer": "a"}], "rows of different shapes"),
        ([{"text": "word"}], "row 1: has neither"),
        ([3], "row 1: has neither"),
        ([], "has no rows"),
    ],
)
def test_what_is_no_question_is_named(tmp_path, rows, says):
    with pytest.raises(UserError, match=says):
        read(written(tmp_path / "a.jsonl", *rows))


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "nothing.json")
    (tmp_path / "x.jsonl").write_text("{]")
    with pytest.raises(UserError, match="not JSON"):
        read(tmp_path / "x.jsonl")


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "form", "count"), [("arc_easy_test.json", "choices", 2376), ("piqa_test.json", "choices", 1838),
                                                     ("lambada_test.jsonl", "word", 5153)])  # fmt: skip
def test_published_files(name, form, count):
    path = Path(__file__).parents[3] / "shared" / "data" / "eval" / name
    if not path.exists():
        pytest.skip(f"no {path}")
    found, rows = read(path)
    assert (found, len(rows)) == (form, count)
    assert all(len(set(row.get("choices", "ab"))) > 1 for row in rows)
