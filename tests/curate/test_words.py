import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.curate import words
from sparing.curate.words import Pauses, Vocabulary, split, split_piece, stable_hash

SPLITS = {
    "Hello, world!": "Hello , world !",
    "(it's)": "( it 's )",
    "I don't know; we'll see.": "I do n't know ; we 'll see .",
    "Dr. Smith's state-of-the-art": "Dr. Smith 's state - of - the - art",
    "U.S.A. e.g. Mr.": "U.S.A. e.g. Mr.",
    "$5.50 10km 20%": "$ 5.50 10 km 20 %",
    "see https://example.com/a-b?c=d, now": "see https://example.com/a-b?c=d , now",
    "end...": "end ...",
    "yes.No": "yes . No",
    "a,b 1,000": "a , b 1,000",
    "cannot it’s 3pm": "can not it ’s 3 pm",
    "“Quoted—text”": "“ Quoted — text ”",
    "C++ :)": "C++ :)",
    "its well were": "its well were",
    "☃snow": "☃ snow",
}


@pytest.mark.parametrize(("text", "expected"), SPLITS.items())
def test_split(text, expected):
    assert split(text) == expected.split()


@settings(deadline=None)
@given(st.text(max_size=40))
def test_no_character_is_lost_and_no_word_is_empty(text):
    for piece in text.split():
        parts = split_piece(piece)
        assert "".join(parts) == piece
        assert all(parts)


@pytest.mark.parametrize("unit", ["=", "(a", ".", "a.", "-", "a-", "@a", "1.", "ab://", "'s", "é́"])
def test_long_pieces(unit):
    """They must not take the square of their length: a rule of = signs across a page is one piece."""
    piece = unit * (100_000 // len(unit))
    parts = split_piece(piece)
    assert "".join(parts) == piece
    assert parts == (piece,) or len(parts) > 1


@pytest.mark.parametrize("text", SPLITS)
def test_against_spacy(text):
    """Where spaCy is installed: the convention that the filters' thresholds were chosen with."""
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed: pip install 'sparing[bench]'")
    assert split(text) == [token.text for token in spacy.blank("en")(text) if not token.is_space]


def test_a_vocabulary_knows_what_rules_ask_of_words():
    vocabulary = Vocabulary()
    numbers = vocabulary.of("Ab12, — 34 é!".split())
    assert vocabulary.lengths[numbers].tolist() == [4, 1, 1, 2, 1, 1]
    assert vocabulary.is_word[numbers].tolist() == [True, False, False, True, True, False]
    assert vocabulary.has_letter[numbers].tolist() == [True, False, False, False, True, False]
    assert vocabulary.hashes[numbers].tolist() == [stable_hash(word) for word in ("Ab12", ",", "—", "34", "é", "!")]


def test_hashes_are_the_same_everywhere():
    assert stable_hash("word") == 0x958EC7D727CFA44A


def test_a_vocabulary_grows_and_does_not_keep_long_pieces():
    vocabulary = Vocabulary()
    pieces = [f"w{index}x" for index in range(5000)]
    numbers = vocabulary.of(pieces)
    assert np.array_equal(numbers, vocabulary.of(pieces))
    assert len(set(numbers.tolist())) == 5000
    long = vocabulary.of(["y" * 1000])
    assert "y" * 1000 not in vocabulary and "y" * 1000 not in vocabulary.numbers
    assert vocabulary.of(["y" * 1000]) == long and vocabulary.lengths[long] == 1000


def test_a_full_vocabulary_is_replaced_and_the_old_one_still_answers(monkeypatch):
    monkeypatch.setattr(words, "MAX_PIECES", 3)
    first = words.vocabulary()
    first.of(["one", "two", "three", "four", "five"])
    second = words.vocabulary()
    assert second is not first
    assert first.hashes[first.of(["one"])] == second.hashes[second.of(["one"])]


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("", 1),
        ("One sentence", 1),
        ("One. Two.", 2),
        ("What?! Yes.", 2),
        ("He said “Go.” And left.", 2),
        ("Mr. Smith went.", 1),
        ("One... two", 1),
        ("नमस्ते। दूसरा", 2),
    ],
)
def test_sentences(line, count):
    assert Pauses().sentences(line.split()) == count


def test_marks_that_end_sentences_are_punctuation():
    unassigned = {"\U00011f43", "\U00011f44"}  # newer than this Python's Unicode
    assert all(unicodedata.category(char)[0] == "P" or char in unassigned for char in words.SENTENCE_ENDS)
    assert {".", "?", "!", "。", "؟", "।"} <= words.PAUSES < words.SENTENCE_ENDS < words.SYMBOLS
