import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.curate.prose import words

from sparing.base.config import UserError
from sparing.curate.contamination import Contamination, evaluation_texts, index, n_grams, normalise
from sparing.curate.document import Document


@pytest.fixture
def rule(tmp_path):
    rows = [{"question": " ".join(words(13)).capitalize() + "?", "answer": ["3.5 apples", {"why": " ".join(words(20, 100))}], "id": 4}]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Contamination(evaluations=(str(tmp_path / "task.jsonl"),))


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        (" ".join(words(13)), 1),
        (" ".join(words(12)), 0),
        ("before " + ", ".join(words(13)).upper() + " — after", 1),
        (" ".join([*words(12), "2 apples"]), 0),
        (" ".join([*words(13), "2.5 apples"]), 3),  # numbers are equal to each other: 13 words, and two n-grams into the answer
        (" ".join(words(20, 100)), 8),
        ("", 0),
    ],
)
def test_shared_n_grams(rule, text, shared):
    scores = rule.scores(Document(text))
    assert scores == {"shared": shared}
    assert rule.verdict(scores) == ("contamination: max_shared" if shared else None)


def test_numbers_can_be_told_apart(rule):
    apart = Contamination(evaluations=rule.evaluations, numbers=True)
    text = " ".join([*words(13), "{} apples"])
    assert [apart.scores(Document(text.format(number)))["shared"] for number in ("3.5", "2.5")] == [4, 1]


def test_a_threshold(rule):
    assert Contamination(max_shared=3).verdict({"shared": 3}) is None
    assert Contamination(max_shared=3).verdict({"shared": 4}) == "contamination: max_shared"


@pytest.mark.parametrize(
    ("piece", "expected"),
    [("Café,", "cafe"), ("1,234.5", "0 0"), ("3.5", "0"), ("well-known", "well known"), ("—", ""), ("x=10;", "x 0"), ("İ", "i")],
)
def test_normalise(piece, expected):
    assert normalise(piece) == expected.split()


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=12), st.integers(1, 4))
def test_n_grams_are_equal_where_their_words_are(pieces, n):
    keys = n_grams(pieces, n).tolist()
    grams = [tuple(pieces[at : at + n]) for at in range(len(pieces) - n + 1)]
    assert len(keys) == len(grams)
    assert len(set(keys)) == len(set(grams))


def test_an_index_is_sorted_and_has_each_n_gram_once():
    found = index(["a b c d", "b c d e", "a b"], 3)
    assert found.size == 3
    assert np.all(found[1:] > found[:-1])
    assert index([], 3).size == 0


def test_evaluation_texts(tmp_path, rule):
    (tmp_path / "task.txt").write_text("plain text")
    found = list(evaluation_texts([str(tmp_path)]))
    assert found[1] == "plain text"
    assert found[0].splitlines()[1:] == ["3.5 apples", " ".join(words(20, 100))]


def test_evaluations_that_cannot_be_used_are_told(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(" ".join(words(13)))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    Contamination(evaluations=(str(tmp_path),)).load()
    assert "1 evaluation texts cannot be used: 1 × not UTF-8" in capsys.readouterr().err


def test_evaluations_that_say_nothing_are_refused(tmp_path):
    (tmp_path / "short.txt").write_text("few words")
    for wrong, message in (
        (Contamination(), "no files"),
        (Contamination(evaluations=(str(tmp_path / "short.txt"),)), "no text of 13 words"),
        (Contamination(evaluations=(str(tmp_path / "gone"),)), "gone"),
        (Contamination(evaluations=("x",), n=0), "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            wrong.load()
