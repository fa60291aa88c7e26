import json

import pytest

from sparing.curate.document import Document
from sparing.curate.lists import UrlList, WordList


@pytest.fixture
def lists(tmp_path):
    def write(name, *lines):
        path = tmp_path / name
        path.write_text("\n".join(lines))
        return str(path)

    return UrlList(
        domains=write("domains", "# comment", "Bad.example", "", "co.example"),
        urls=write("urls", "https://good.example/one"),
        words=write("words", "poker"),
        soft_words=write("soft", "free", "win", "cash"),
    )


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://bad.example/", "domains"),
        ("http://user:pw@WWW.Bad.Example:8080/x?y", "domains"),
        ("bad.example/path", "domains"),
        ("https://notbad.example/", None),
        ("https://a.co.example", "domains"),
        ("https://example", None),
        ("https://good.example/one", "urls"),
        ("https://good.example/one/two", None),
        ("https://good.example/online-poker", "words"),
        ("https://good.example/pokerface", None),
        ("https://good.example/free", None),
        ("https://good.example/free-cash", "max_soft_words"),
        ("//bad.example", "domains"),
        ("???", None),
        ("  ", None),
        (None, None),
        (7, None),
    ],
)
def test_url_list(lists, url, reason):
    document = Document("text", json.dumps({"url": url}))
    assert lists.verdict(lists.scores(document)) == (reason and f"url_list: {reason}")


def test_a_document_without_metadata_is_kept(lists):
    for meta in (None, "", "{}", "[]", "broken"):
        assert lists.verdict(lists.scores(Document("text", meta))) is None


def test_without_lists_nothing_is_rejected():
    scores = UrlList().scores(Document("text", '{"url": "https://bad.example"}'))
    assert scores == {"domains": 0, "urls": 0, "words": 0, "soft_words": 0}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("All is Well.", 0),
        ("BAD things", 1),
        ("badly", 0),
        ("bad, bad; bad", 3),
        ("a very bad-thing", 1),
        ("Very  bad very bad", 3),
        ("été", 1),
    ],
)
def test_word_list(tmp_path, text, found):
    path = tmp_path / "words"
    path.write_text("bad\nvery bad\nÉté\n", encoding="utf-8")
    rule = WordList(words=str(path))
    scores = rule.scores(Document(text))
    found += text == "a very bad-thing"  # the phrase, and the word in it
    assert scores == {"found": found}
    assert (rule.verdict(scores) is None) == (found == 0)
    assert WordList(words=str(path), max_found=found).verdict(scores) is None
