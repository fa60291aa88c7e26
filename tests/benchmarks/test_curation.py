"""The documents that both sides judge, and what is said of their decisions."""

from itertools import islice

from tests.curate.prose import prose

from benchmarks.curation import MANGLINGS, mangled, summary


def test_documents_are_the_same_every_time_and_of_every_kind(tmp_path):
    (tmp_path / "a.txt").write_text(prose(100) * 20)
    (tmp_path / "b.jsonl").write_text('{"question": "How many?", "answer": ["seven", "eight"], "id": 3}\n' * 200)
    paths = (str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"))
    some = list(islice(mangled(paths), 150))
    assert some == list(islice(mangled(paths), 150))
    assert {name for _, name, _ in some} == set(MANGLINGS)
    assert sum(name == "as it is" for _, name, _ in some) >= 75
    assert ("b.jsonl:1+0", "as it is", "How many?\nseven\neight") in some
    assert all(text.strip() for _, _, text in some)


def test_summary_counts_kinds_of_difference():
    def part(theirs, ours, **more):
        return {"place": "a:1+0", "mangling": "as it is", "chars": 10, "filters": {"c4": [theirs, ours]}} | more

    more = {"scores": {"c4": {"sentences": 4}}, "words": [9, 8], "text": "t"}
    said = summary([part(None, None), part("curly_bracket", "min_sentences", **more), part(None, "min_sentences", **more), part("a", "a")])
    assert said["documents"] == 4
    row = said["filters"]["c4"]
    assert row["equal"] == 0.75
    assert row["reasons_equal"] == 0.5
    assert [(kind["theirs"], kind["ours"], kind["count"]) for kind in row["differences"]] == [
        ("curly_bracket", "min_sentences", 1),
        (None, "min_sentences", 1),
    ]
    assert row["differences"][0]["example"]["words"] == [9, 8]
