"""Pages whose main text is known, and the score of what readers keep of it."""

import json
from itertools import islice

import pytest
from tests.curate.prose import prose

from benchmarks import web_text
from benchmarks.web_text import ARMS, Site, extract, overlap, rendered, score, text_of, write_pages


@pytest.fixture
def source(tmp_path):
    parts = [f"# Chapter {at}\n\n{prose(20, start=60 * at)}\n\n- one point\n- another\n\n    code = {at}\n" for at in range(40)]
    (tmp_path / "a.md").write_text("\n\n".join(parts))
    return (str(tmp_path / "a.md"),)


def test_pages_are_the_same_every_time_and_their_main_text_is_known(source):
    pages = list(islice(rendered(source), 12))
    assert pages == list(islice(rendered(source), 12)) and len({page.url for page in pages}) == 12
    for number, page in enumerate(pages):
        site = Site(number)
        whole = text_of(page.html)
        assert set(web_text.tokens(page.text)) <= set(web_text.tokens(whole))
        for around in (site.name, site.cookies, site.legal, *site.menu):
            assert around in whole and around not in page.text
        assert "<" not in page.text and "margin" not in whole


def test_overlap_counts_words_as_often_as_they_occur():
    assert overlap("a b b", "b b c") == (2 / 3, 2 / 3, 2 / 3)
    assert overlap("", "b") == (0, 0, 0)
    assert overlap("B, b!", "b b") == (1, 1, 1)


def test_pages_without_text_count_as_nothing(tmp_path):
    own, found = tmp_path / "own.jsonl", tmp_path / "found.jsonl"
    own.write_text("".join(json.dumps({"url": url, "text": "a b"}) + "\n" for url in "xy"))
    found.write_text(json.dumps({"url": "x", "text": "a b c d"}) + "\n")
    assert score(own, found) == {"precision": 0.25, "recall": 0.5, "f1": pytest.approx(1 / 3), "without_text": 0.5}


def test_all_arms_read_the_pages(source, tmp_path):
    for package in ("warcio", "fastwarc", "resiliparse", "trafilatura"):
        pytest.importorskip(package, reason="pip install 'sparing[bench,web]'")
    made = write_pages(source, tmp_path, 8)
    assert made["pages"] == 8 and 0.1 < made["main_share_of_words"] < 0.9
    for arm in ARMS:
        said = extract(arm, tmp_path, tmp_path / f"{arm}.jsonl")
        assert said["texts"] == 8
        assert score(tmp_path / "pages.jsonl", tmp_path / f"{arm}.jsonl")["recall"] > 0.5
