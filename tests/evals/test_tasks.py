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
    arc = [
        {"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        {"question": "Q", "choices": {"text": ["3", "2", "1"], "label": ["1", "2", "3"]}, "answerKey": "3"},
        {"question": "Q", "choices": [10, 20], "answer": 20},
        {"question": "Q", "choices": ["a", " b"], "answer": " b"},
    ]
    assert [row["right"] for row in read(written(tmp_path / "arc.jsonl", *arc))[1]] == [1, 2, 1, 1]
    assert read(written(tmp_path / "w.jsonl", {"text": "a b\nc"})) == ("word", [{"before": "a b", "word": "c"}])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"question": "Q", "choices": ["a", "b"], "answer": 2}], "row 1: answer 2 is none of its 2 choices"),
        ([{"question": "Q", "choices": ["a", "b"], "answer": "c"}], "row 1: answer 'c' is none"),
        ([{"question": "Q", "choices": ["a", "b"]}], "row 1: answer None is none"),
        ([{"text": "a b"}, {"question": "Q"}], r"row 2: has neither .* \(keys: question\)"),
        ([{"question": "Q", "choices": ["", "yes"], "answer": 1}], "row 1: choice 0 is empty"),
        ([{"question": "Q", "choices": ["yes"], "answer": "yes"}], "row 1: there is 1 choice, expected two"),
        ([{"question": "Q", "choices": {"A": "x", "B": "y"}, "answer": "A"}], "row 1: choices is .*, expected a list of texts"),
        ([{"question": "Q", "choices": "yes no", "answer": "no"}], "row 1: choices is 'yes no', expected a list"),
        ([{"question": "Q", "choices": ["no", None], "answer": 0}], "row 1: choices is .*, expected a list of texts"),
        ([{"question": "Q", "choices": ["no", "yes"], "answer": True}], "row 1: answer True is none of its 2 choices"),
        ([{"question": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "E"}], "answer 'E' is none"),
        ([{"question": "Q", "answer": ["a", "b"]}], r"row 1: answer is \['a', 'b'\], expected text or a number"),
        ([{"text": ["a", "b c"]}], "row 1: has neither"),
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
    (tmp_path / "p.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    with pytest.raises(UserError, match=r"Git LFS pointer.*git lfs pull"):
        read(tmp_path / "p.jsonl")


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
