"""Dirt, the corpora of `benchmarks.curation_pays`, and what is said of each kind of dirt."""

import gzip
import json
import random

from tests.curate.prose import prose

from benchmarks import dirt
from benchmarks.curation_pays import CLEAN, DIRT, CurationPays, Row, _gain, _rows, cut, table
from sparing.curate.minhash import DuplicateSettings, jaccard, ngram_sets

PAGE = r""".\" a comment
.TH LS 1 "September 2022"
.SH BEZEICHNUNG
ls \- Verzeichnisinhalte auflisten
.PP
\fBls\fP [\fI\,OPTION\/\fP]…
.TP
\fB\-a\fP, \fB\-\-all\fP
Einträge nicht ignorieren, die
mit ».« beginnen
"""


def test_manual_pages_are_words_in_paragraphs(tmp_path):
    for name, text in (("ls", PAGE), ("dir", ".so man1/ls.1\n")):
        file = tmp_path / "de" / "man1" / f"{name}.1.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(text.encode()))
    wanted = "BEZEICHNUNG ls - Verzeichnisinhalte auflisten\n\nls [OPTION]…\n\n-a, --all Einträge nicht ignorieren, die mit ».« beginnen\n"
    assert list(dirt.manual_pages(str(tmp_path), "de")) == [wanted]


def test_near_duplicates_have_few_other_words():
    text = prose(2000)
    words = text.split()
    for seed in range(20):
        other = dirt.near_duplicate(random.Random(seed), text)
        assert other == dirt.near_duplicate(random.Random(seed), text)
        assert other != text
        assert abs(len(other.split()) - len(words)) <= dirt.CHANGED[1] * len(words) + 1


def test_mojibake_is_the_text_in_another_code():
    text = "\"It isn't,\" said the café's owner.\n\nNobody answered.\n"
    once = next(found for seed in range(20) if "â€™" in (found := dirt.as_cp1252(random.Random(seed), text)))
    assert once.startswith("â€œIt isnâ€™t,") and "cafÃ©" in once
    assert dirt.swapped_bytes(random.Random(0), text).encode("utf-16-be").decode("utf-16-le") == text
    assert dirt.from_ebcdic(random.Random(0), text).encode("latin-1").decode("cp500") == text
    assert "isn=E2=80=99t" in dirt.quoted_printable(random.Random(0), text)


def test_spam_and_boilerplate_are_never_the_same_twice():
    for make in (dirt.spam, dirt.boilerplate):
        texts = [make(random.Random(seed)) for seed in range(300)]
        assert len(set(texts)) == 300
        assert "{" not in "".join(texts)


def corpora(tmp_path):
    books = tmp_path / "books"
    for part, count in (("train", 24), ("val", 2)):
        (books / part).mkdir(parents=True)
        for number in range(count):
            paragraphs = prose(300, start=4 * number).split("\n")
            (books / part / f"{number}.md").write_text("\n\n".join([f"Book {part} {number}", *paragraphs]))
    page = tmp_path / "man" / "de" / "man1" / "ls.1.gz"
    page.parent.mkdir(parents=True)
    page.write_bytes(gzip.compress((PAGE * 300).encode()))
    figure = CurationPays(str(books), str(tmp_path / "man"), str(tmp_path / "out"), size=0.1, val_bytes=2000)
    figure.folder = tmp_path / "out"
    figure.folder.mkdir()
    return figure, figure._write_corpus()


def test_half_of_the_dirty_corpus_is_dirt(tmp_path):
    figure, sizes = corpora(tmp_path)
    for kind, part in DIRT.items():
        assert sizes["clean"] * part / CLEAN <= sizes[kind] < sizes["clean"] * part / CLEAN + 40_000
    dirty, clean = (list(_rows(figure.folder / f"{name}.jsonl")) for name in ("dirty", "clean"))
    assert [row for row in dirty if row.kind == "clean"] == clean
    assert sorted(row.number for row in dirty) == list(range(len(dirty)))
    by_number = {row.number: row for row in dirty}
    for row in dirty:
        if row.kind == "near-duplicate":
            assert jaccard(*ngram_sets([row.text, by_number[row.of].text], DuplicateSettings())) > 0.6
    others = {row.text for row in _rows(figure.folder / "sample.jsonl")}
    assert others and not others & {row.text for row in clean}


def test_of_a_text_and_its_near_duplicate_one_is_to_stay(tmp_path):
    figure = CurationPays("", "", str(tmp_path))
    figure.folder = tmp_path
    rows = [
        Row("clean", "a" * 100, number=0), Row("clean", "b" * 100, number=1), Row("clean", "c" * 100, number=2),
        Row("near-duplicate", "a" * 101, number=3, of=0), Row("near-duplicate", "b" * 101, number=4, of=1),
        Row("mojibake", "d" * 50, "as-cp1252", 5), Row("mojibake", "e" * 50, "from-ebcdic", 6),
    ]  # fmt: skip
    (tmp_path / "dirty.jsonl").write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows))
    gone = {0: "duplicate_near of dirty.jsonl:4 (J=0.9)", 2: "c4: min_sentences", 5: "language: languages"}
    for part in ("documents", "rejected"):
        (tmp_path / "curated-corpus" / part).mkdir(parents=True)
        some = [row for row in rows if (row.number in gone) == (part == "rejected")]
        lines = [
            {"text": row.text, "metadata": {"number": row.number} | ({"rejected": gone[row.number]} if row.number in gone else {})}
            for row in some
        ]
        (tmp_path / "curated-corpus" / part / "0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = figure._by_kind("curated")
    assert abs(found["clean"]["gone"] - 1 / 3) < 1e-9  # of the first a copy stays
    assert found["clean"]["reasons"] == {"duplicate_near": 1, "c4: min_sentences": 1}
    assert abs(found["near-duplicate"]["gone"] - 0.5) < 1e-9  # the second and its copy are both there
    assert found["mojibake"]["gone"] == 0.5 and found["mojibake as-cp1252"]["gone"] == 1 and found["mojibake from-ebcdic"]["gone"] == 0


def test_documents_are_as_long_as_chapters():
    text = "\n\n".join(prose(20 + at) for at in range(40))
    parts = list(cut(text))
    assert all(16_000 <= len(part) < 20_000 for part in parts[:-1])
    assert "\n\n".join(part.rstrip("\n") for part in parts).split() == text.split()


def test_the_table_says_what_curation_makes_good():
    kinds = {"spam": {"bytes": 2_000_000, "gone": 0.5, "reasons": {"quality: min_score": 7}}}
    arms = {"clean": {"bpb": [2.0], "tokens": [1e6]}, "dirty": {"bpb": [2.1], "tokens": [1e6]}}
    arms["curated"] = {"bpb": [2.02], "tokens": [1e6], "seconds": 9.0, "by_kind": kinds}
    lines = table({"corpus": {"clean": 1e6}, "arms": arms, **_gain(arms)})
    assert "+1.00% beside clean, 80% of what dirt costs (+5.00%) made good; curation took 9.0 s" in lines
    assert "2.00 MB,  50.00% gone  7 quality: min_score" in lines
