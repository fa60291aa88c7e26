import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.base.config import UserError
from sparing.curate import encoding
from sparing.curate.document import Document
from sparing.curate.encoding import Encoding, suspect
from sparing.curate.rules import Rules, judge_document

TEXTS = [
    "café naïve — “quoted” text … it’s", "Größe für 5 €", "Привет, мир! Как дела?", "日本語の文章です。", "£5 – that’s “fine”",
    "Ça déjà vu, l’œuvre de Müller",
]  # fmt: skip


def read_as(text: str, table: str) -> str:
    return "".join(bytes([byte]).decode(table, "ignore") or chr(byte) for byte in text.encode())  # cp1252 has five holes


@pytest.mark.parametrize("table", ["cp1252", "latin-1"])
@pytest.mark.parametrize("text", TEXTS)
def test_what_one_wrong_table_has_done_is_undone(text, table):
    rule, document = Encoding(), Document(read_as(text, table))
    scores = rule.scores(document)
    assert rule.edit(document).text == text and scores["repaired"] > 0 and scores["bad"] == 0 and rule.verdict(scores) is None


@pytest.mark.parametrize(
    "text", [*TEXTS, "plain", "¿Qué? «Sí»", "naïve café, Ångström", "x² + y² ≥ 2·x·y", "“—Oui”, dit-il…", "🙂🙂 \ud800", ""]
)
def test_what_is_right_stays(text):
    document = Document(text)
    assert Encoding().scores(document) == {"repaired": 0, "bad": 0} and Encoding().edit(document) is document


def test_what_cannot_be_repaired_is_rejected():
    wrong = read_as(read_as("“Größe” für 5 € — Müller’s œuvre déjà vu. " * 5, "cp1252"), "cp1252")
    text = "".join(char for place, char in enumerate(wrong) if place % 7)  # characters have been lost since
    _, scores, why = judge_document(Document(text), Rules(encoding=Encoding()))
    assert why == "encoding: max_bad" and scores["encoding"]["bad"] > 0.002
    assert judge_document(Document(text), Rules(encoding=Encoding(max_bad=None)))[2] is None


@settings(max_examples=400, deadline=None)
@given(st.text(st.sampled_from("aé—“Ãâ€œ©Я日\x85\xa0 "), max_size=20))
def test_what_is_not_suspect_would_not_be_repaired(text):
    assert suspect(text) or encoding._ftfy().fix_encoding(text) == text


def test_without_the_package_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    encoding._ftfy.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'sparing\[curate\]'; or leave it out: encoding = \"none\""):
        Rules.default().load()
    encoding._ftfy.cache_clear()
