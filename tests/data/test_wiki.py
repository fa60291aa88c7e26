"""MediaWiki dumps, made here but for the real one."""

import bz2
from pathlib import Path

import pytest

from sparing.data import wiki
from sparing.data.sources import documents

pytest.importorskip("mwparserfromhell", reason="needs the extra web")

REAL = Path(__file__).parents[3] / "shared" / "data" / "wikipedia" / "smallwiki-latest-pages-articles.xml"
HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo>
    <base>https://de.wikipedia.org/wiki/Wikipedia:Hauptseite</base>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces>
  </siteinfo>
"""
WIKITEXT = """{{Infobox|name=Leuchtturm|bild={{nested|x}}}}
[[Datei:Turm.jpg|mini|Ein [[Turm]] am Meer]]
Ein '''Leuchtturm''' ist ein [[Turm|hoher Turm]] mit [[Lampe]].<ref>{{cite|a}} Quelle</ref> Er kostet 5&nbsp;€.
<!-- nobody reads this -->
== Geschichte ==
* Der [https://example.org/pharos Pharos] von ''Alexandria''
* Zwei
{| class="wikitable"
| Zelle || andere
|}
<gallery>
Datei:B.jpg|Bild
</gallery>
=== Leer ===
== Siehe auch ==
== Einzelnachweise ==
<references />
[[Kategorie:Türme]]
[[en:Lighthouse]]
"""
PLAIN = """Leuchtturm & Co

Ein Leuchtturm ist ein hoher Turm mit Lampe. Er kostet 5\N{NO-BREAK SPACE}€.

Geschichte

* Der Pharos von Alexandria
* Zwei"""


def page(title: str, text: str, space=0, more="", model="wikitext") -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return (
        f"  <page>\n    <title>{title}</title>\n    <ns>{space}</ns>\n    <id>7</id>\n{more}    <revision>\n      <id>70</id>\n"
        f"      <timestamp>2024-01-02T03:04:05Z</timestamp>\n      <model>{model}</model>\n      <text>{text}</text>\n"
        "    </revision>\n  </page>\n"
    )


def read(path, raw: str | bytes):
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    rejected = []
    return list(documents([str(path)], reject=rejected.append)), [(item.line, item.reason) for item in rejected]


def dump(*pages: str) -> str:
    return HEAD + "".join(pages) + "</mediawiki>\n"


def test_articles_are_plain_text_under_their_titles(tmp_path):
    raw = dump(page("Leuchtturm &amp; Co", WIKITEXT)).encode()
    for name, data in (("a.xml", raw), ("a.xml.bz2", bz2.compress(raw))):
        found, rejected = read(tmp_path / name, data)
        assert rejected == [] and len(found) == 1
        assert found[0].text == PLAIN
        assert found[0].line == HEAD.count("\n") + 1
        assert found[0].meta == {
            "id": "7", "url": "https://de.wikipedia.org/wiki/Leuchtturm_%26_Co", "title": "Leuchtturm & Co", "date": "2024-01-02T03:04:05Z",
            "language": "de", "format": "mediawiki",
        }  # fmt: skip


def test_redirects_other_namespaces_and_other_models_are_quarantined(tmp_path):
    pages = [
        page("A", "Text."),
        page("B", "#REDIRECT [[A]]", more='    <redirect title="A" />\n'),
        page("Diskussion:A", "Worte", space=1),
        page("C", "{}", model="json"),
        page("D", "{{only|a template}}"),
    ]
    found, rejected = read(tmp_path / "a.xml", dump(*pages))
    assert [document.text for document in found] == ["A\n\nText."]
    assert [reason for _, reason in rejected] == ["a redirect", "no article (namespace 1)", "no wikitext (json)", "empty"]
    assert len({line for line, _ in rejected}) == 4


def test_what_is_no_xml_costs_a_page(tmp_path):
    broken = page("B", "x").replace("</text>", "")
    unended = page("C", "y").replace("  </page>\n", "")
    entity = page("E", "z").replace("z</text>", "&lol;</text>")
    latin = page("F", "caf\N{LATIN SMALL LETTER E WITH ACUTE}").encode("latin-1")
    bombs = '<!DOCTYPE x [<!ENTITY lol "ha"><!ENTITY lol2 "&lol;&lol;">]>\n'
    raw = (bombs + HEAD + page("A", "one") + broken + unended + page("D", "two") + entity).encode() + latin
    raw += page("G", "a\0b").encode() + (page("H", "three") + "</mediawiki>").encode()
    found, rejected = read(tmp_path / "a.xml", raw)
    assert [document.meta["title"] for document in found] == ["A", "D", "H"]
    assert len(rejected) == 5 and all(reason.startswith("invalid XML") for _, reason in rejected)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_cut_dump_gives_what_is_whole(tmp_path, compressed):
    raw = dump(*(page(f"A{number}", f"text {number}") for number in range(5))).encode()
    if compressed:
        _, rejected = read(tmp_path / "a.xml.bz2", bz2.compress(raw[:600]) + bz2.compress(raw[600:])[:-8])
        assert len(rejected) == 1 and rejected[0][1].startswith("truncated bzip2")
        return
    cuts = (raw.index(b"A3"), raw.rindex(b"<page>"), len(raw) - 5)
    results = [read(tmp_path / "a.xml", raw[:cut]) for cut in cuts]
    assert [len(found) for found, _ in results] == [3, 4, 5]
    assert [[reason for _, reason in rejected] for _, rejected in results] == [[wiki.CUT], *([["truncated: the dump has no end"]] * 2)]


def test_a_huge_page_is_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(wiki, "PAGE_BYTES", 3 << 20)
    raw = dump(page("A", "one"), page("B", "long " * (1 << 20)), page("C", "two"), page("D", "long " * (1 << 20)).replace("</page>", ""),
               page("E", "three"))  # fmt: skip
    found, rejected = read(tmp_path / "a.xml", raw)
    assert [document.meta["title"] for document in found] == ["A", "C", "E"] and [reason for _, reason in rejected] == [wiki.LONG] * 2


def test_other_xml_is_text_as_ever(tmp_path):
    found, rejected = read(tmp_path / "a.xml", "<note>\n<page>no dump</page>\n</note>\n")
    assert [(document.text, document.line) for document in found] == [("<note>\n<page>no dump</page>\n</note>\n", 1)] and rejected == []


def test_a_dump_without_pages(tmp_path):
    assert read(tmp_path / "a.xml", HEAD + "</mediawiki>")[1] == [(None, "no page in the dump")]


@pytest.mark.real_data
def test_a_real_dump():
    if not REAL.is_file():
        pytest.skip(f"no {REAL}")
    rejected = []
    found = list(documents([str(REAL)], reject=rejected.append))
    assert len(found) + len(rejected) == REAL.read_bytes().count(b"<page>")
    text = "".join(document.text for document in found)
    assert len(found) > 800 and not any(mark in text for mark in ("{{", "<ref", "[[", "''"))
