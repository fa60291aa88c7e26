"""Each rule on documents that sit on both sides of every threshold."""

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.curate.prose import prose, sentence, words

from sparing.curate.document import Document
from sparing.curate.filters import C4, FineWeb, GopherQuality, GopherRepetition


def verdict(rule, text):
    return rule.verdict(rule.scores(Document(text)))


def lines(count, text="{}"):
    return [text.format(word) for word in words(count)]


def stopped(*rest):
    """100 words in one line, two of them stop words, with `rest` before the last."""
    return " ".join(["the", *words(98 - len(rest)), *rest, "of"])


QUALITY = {
    "min_words": (" ".join(["the", "of", *words(48)]), " ".join(["the", "of", *words(47), "!", "—"])),
    "max_words": (" ".join(["the of", *words(98)]), " ".join(["the of", *words(99)])),
    "min_mean_word_length": ("of to " + "abcd " * 48 + "ab", "of to " + "abc " * 40 + "ab " * 20),
    "max_mean_word_length": ("have that " + "a" * 12 + " " + "b" * 10 + " " + "abcdefghij " * 50, "have that " + "abcdefghijk " * 60),
    "max_hashes": (stopped(*["#"] * 10), stopped(*["#"] * 11)),
    "max_ellipses": (stopped(*["..."] * 5, *["…"] * 5), stopped(*["..."] * 5, *["…"] * 6)),
    "max_bullet_lines": (
        "\n".join(["the of", *[f"  - {sentence(start=index)}" for index in range(9)]]),
        "\n".join([f"• {sentence(start=index)}" for index in range(10)]),
    ),
    "max_ellipsis_lines": (
        "\n".join([sentence(start=index) + "..." * (index < 3) for index in range(10)]),
        "\n".join([sentence(start=index) + " … " * (index < 4) for index in range(10)]),
    ),
    "min_words_with_letter": (stopped(*["1234"] * 20), stopped(*["1234"] * 21)),
    "min_stop_words": ("the with " + " ".join(words(50)), "the the The " + " ".join(words(50))),
}
REPETITION = {
    # 10 lines of which 3 and 4 repeat an earlier one, as short as can be
    "dup_line_fraction": (
        "\n".join([*lines(6), "q", "q", "q", "q", prose(20).replace("\n", " ")][:11]),
        "\n".join([*lines(4), "q", "q", "q", "q", prose(20).replace("\n", " ")]),
    ),
    "dup_line_chars": (
        "\n".join([*lines(16, "a line of {}"), "again again", "again again"]),
        "\n".join([*lines(3, "a line of {}"), "again again again more", "again again again more"]),
    ),
    "dup_paragraph_fraction": (
        "\n\n".join([*lines(6), "q", "q", "q", "q", prose(20)]),
        "\n\n\n".join([*lines(4), "q", "q", "q", "q", prose(20)]),
    ),
    "dup_paragraph_chars": (
        "\n\n".join([*lines(16, "a line of {}"), "again again", "again again"]),
        "\n\n".join([*lines(3, "a line of {}"), "again again again more", "again again again more"]),
    ),
    "top_2_gram": (
        " ".join([*words(40), *(f"xyz uvw {word}" for word in words(4, 100))]),
        " ".join([*words(10), *(f"xyz uvw {word}" for word in words(6, 100))]),
    ),
    "top_3_gram": (
        " ".join([*words(60), *(f"xyz uvw rst {word}" for word in words(4, 100))]),
        " ".join([*words(34), *(f"xy uv rs {word}" for word in words(7, 100))]),
    ),
    "top_4_gram": (
        " ".join([*words(60), *(f"xyz uvw rst opq {word}" for word in words(2, 100))]),
        " ".join([*words(30), *(f"x u r o {word}" for word in words(7, 100))]),
    ),
}


@pytest.mark.parametrize("field", QUALITY)
def test_gopher_quality(field):
    kept, rejected = QUALITY[field]
    rule = GopherQuality(max_words=100 if field == "max_words" else 100_000)
    assert verdict(rule, kept) is None
    assert verdict(rule, rejected) == f"gopher_quality: {field}"
    assert verdict(GopherQuality(**{field: None}), rejected) is None


def test_every_threshold_of_gopher_quality_is_tried():
    assert set(QUALITY) == {field.name for field in fields(GopherQuality)} - {"stop_words"}


def test_gopher_quality_of_text_without_words():
    assert verdict(GopherQuality(), "\n\n") == "gopher_quality: min_words"
    assert verdict(GopherQuality(), "—— !!") == "gopher_quality: min_words"


@pytest.mark.parametrize("field", REPETITION)
def test_gopher_repetition(field):
    kept, rejected = REPETITION[field]
    # only this threshold: a text that repeats lines repeats n-grams too
    rule = GopherRepetition(**({one.name: None for one in fields(GopherRepetition)} | {field: getattr(GopherRepetition(), field)}))
    assert verdict(rule, kept) is None
    assert verdict(rule, rejected) == f"gopher_repetition: {field}"


@pytest.mark.parametrize("n", range(5, 11))
def test_repeated_n_grams(n):
    """10 characters of each word; a repeat of exactly n words, and not of n - 1, counts."""
    other = [word * 2 for word in words(400)]
    phrase = [word * 2 for word in words(n, 450)]
    text = " ".join([*phrase, *other[:40], *phrase])
    scores = GopherRepetition().scores(Document(text))
    assert scores[f"dup_{n}_gram"] == pytest.approx(10 * n / len(text), abs=1e-6)
    assert n == 10 or scores[f"dup_{n + 1}_gram"] == 0
    limit = getattr(GopherRepetition(), f"dup_{n}_gram")
    for extra, expected in ((-2, f"gopher_repetition: dup_{n}_gram"), (3, None)):
        many = int(10 * n / limit / 11) - 2 * n + extra
        nothing_else = {one.name: None for one in fields(GopherRepetition)} | {f"dup_{n}_gram": limit}
        assert verdict(GopherRepetition(**nothing_else), " ".join([*phrase, *other[:many], *phrase])) == expected


def slow_scores(tokens: list[str], size: int) -> dict[str, float]:
    """The definition, n-gram by n-gram."""
    found = {}
    for n in range(2, 5):
        grams = [" ".join(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
        best = max(grams, key=grams.count) if grams else ""  # the first of equally common ones
        found[f"top_{n}_gram"] = round(len(best) * grams.count(best) / size, 6) if grams else 0.0
    for n in range(5, 11):
        seen, at, chars = set(), 0, 0
        while at <= len(tokens) - n:
            gram = tuple(tokens[at : at + n])
            if gram in seen:
                chars += len("".join(gram))
                at += n
            else:
                seen.add(gram)
                at += 1
        found[f"dup_{n}_gram"] = round(chars / size, 6)
    return found


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), min_size=1, max_size=60) | st.lists(st.sampled_from(["a", "bb"]), min_size=1))
def test_n_grams_as_they_are_defined(tokens):
    text = " ".join(tokens)
    scores = GopherRepetition().scores(Document(text))
    assert slow_scores(tokens, len(text)).items() <= scores.items()


@settings(deadline=None)
@given(st.text("ab\n", min_size=1, max_size=30))
def test_repeated_lines_as_they_are_defined(text):
    import re

    scores = GopherRepetition().scores(Document(text))
    for name, parts in (("line", re.split("\n+", text)), ("paragraph", re.split("\n{2,}", text.strip()))):
        repeats = [part for at, part in enumerate(parts) if part in parts[:at]]
        assert scores[f"dup_{name}_fraction"] == round(len(repeats) / len(parts), 6)
        assert scores[f"dup_{name}_chars"] == round(sum(map(len, repeats)) / len(text), 6)


GOOD = "\n".join(sentence(start=10 * index) for index in range(5))


@pytest.mark.parametrize(
    ("text", "reason", "changed"),
    [
        (GOOD, None, {}),
        ("\n".join(GOOD.splitlines()[:4]), "min_sentences", {"min_sentences": 4}),
        (GOOD + "\nLorem Ipsum dolor sit.", "lorem_ipsum", {"lorem_ipsum": False}),
        (GOOD + "\nfor each { of these.", "curly_bracket", {"curly_bracket": False}),
    ],
)
def test_c4_rejects(text, reason, changed):
    assert verdict(C4(), text) == (reason and f"c4: {reason}")
    assert verdict(C4(**changed), text) is None


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("two words.", "min_words_per_line", 2),
        ("no end of a sentence", "line_end", False),
        ("an ellipsis ends this...", "line_end", False),
        (f"a word of {'x' * 1000}.", "max_word_length", 1001),
        ("Please enable JavaScript to see.", "javascript", False),
        ("This site Uses Cookies for you.", "policy", False),
        ("We have a privacy policy here.", "policy", False),
    ],
)
def test_c4_removes_lines(line, field, value):
    document = Document(f"{GOOD}\n  {line}\n")
    rule = C4()
    scores = rule.scores(document)
    assert (scores["lines"], scores["removed_lines"]) == (6, 1)
    assert rule.edit(document).text == GOOD
    other = C4(**{field: value})
    assert other.scores(document)["removed_lines"] == 0
    assert other.edit(document).text == f"{GOOD}\n{line}"


def test_c4_lines_at_the_limits_stay():
    text = f"{GOOD}\nthree words here.\n{'x' * 1000} is long."
    document = Document(text)
    assert C4().scores(document)["removed_lines"] == 0
    assert C4().edit(document) is document


def test_c4_removes_citations():
    document = Document(GOOD + "\nA fact[12] was found[citation needed] and more[edit] kept [a1].")
    assert C4().edit(document).text.endswith("\nA fact was found and more kept [a1].")
    assert C4(citations=False).edit(document) is document


def test_a_removed_line_is_not_judged():
    """datatrove asks in this order too: a bracket in a line that goes anyway is no reason."""
    assert verdict(C4(), GOOD + "\njavascript { is gone.\nshort {.\nno end here {") is None


def test_an_edited_document_knows_its_words_as_a_new_one_does():
    document = Document(GOOD.replace("\n", "\n\n") + "\n\nshort.")
    _ = document.words, document.hashes
    edited = C4().edit(document)
    fresh = Document(edited.text)
    assert edited.pieces == fresh.pieces
    assert edited.hashes.tolist() == fresh.hashes.tolist()
    spaced = Document(GOOD.replace("\n", "\n\n"))
    _ = spaced.words
    assert C4().edit(spaced).words is spaced.words  # only spaces changed


def ended(share, count=100):
    return "\n".join(f"{word} is a line of more than thirty characters{'.' * (at < share)}" for at, word in enumerate(words(count)))


FINEWEB = {
    "min_ended_lines": (ended(12), ended(11)),
    "max_short_lines": (
        "\n".join([f"{word} " + "x" * 23 + "." for word in words(67)] + [f"{word} " + "x" * 24 + "." for word in words(33, 100)]),
        "\n".join([f"{word} " + "x" * 23 + "." for word in words(68)] + [f"{word} " + "x" * 24 + "." for word in words(32, 100)]),
    ),
    "max_dup_line_chars": (
        "\n".join([f"{word} " + "x" * 92 + "." for word in words(99)] + [f"{words(1)[0]} " + "x" * 92 + "."]),
        "\n".join([f"{word} " + "x" * 92 + "." for word in words(98)] + [f"{words(1)[0]} " + "x" * 92 + "."]),
    ),
    "max_line_ends": (
        "\n".join(f"{word} extraordinarilylongwordsfollow here" for word in words(10)) + " one two." + "." * 0,
        "\n".join(f"{word}{'x' * 30}. a" for word in words(40)),
    ),
}


@pytest.mark.parametrize("field", FINEWEB)
def test_fineweb(field):
    kept, rejected = FINEWEB[field]
    nothing_else = dict.fromkeys(FINEWEB) | {field: getattr(FineWeb(), field)}
    assert verdict(FineWeb(**nothing_else), kept) is None
    assert verdict(FineWeb(**nothing_else), rejected) == f"fineweb: {field}"


def test_fineweb_at_its_limits():
    scores = FineWeb().scores(Document(FINEWEB["max_short_lines"][0]))
    assert scores["short_lines"] == 0.67
    scores = FineWeb().scores(Document(FINEWEB["max_dup_line_chars"][0]))
    assert scores["dup_line_chars"] == 0.01
    assert FineWeb().scores(Document("ab cd ef.\n" * 3 + "gh."))["line_ends"] == round(3 / 14, 6)


def test_fineweb_knows_marks_of_other_scripts_and_blank_lines_do_not_count():
    text = "これは文です。\n \nयह एक वाक्य है।\nno end"
    assert FineWeb().scores(Document(text))["ended_lines"] == round(2 / 3, 6)
    assert verdict(FineWeb(), " \n\n") == "fineweb: min_ended_lines"
