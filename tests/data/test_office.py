"""PDF, DOCX, PPTX, EPUB and HTML, made here."""

import io
import zipfile

import pytest

from sparing.data import apart, office
from sparing.data.sources import documents

pytest.importorskip("markitdown", reason="needs the extra documents")

TYPES = (
    '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Default Extension="rels" '
    'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/word/document.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>'
)
RELATIONS = (
    '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="r1" Target="word/document.xml" '
    'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"/></Relationships>'
)
WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
CONTAINER = (
    '<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="c.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
)
OPF = (
    '<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
    "<dc:title>A Book</dc:title><dc:language>de</dc:language></metadata><manifest>"
    '<item id="a" href="a.xhtml" media-type="application/xhtml+xml"/></manifest><spine><itemref idref="a"/></spine></package>'
)


def archive(**members: str) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in members.items():
            file.writestr(name, text)
    return raw.getvalue()


def docx(text: str) -> bytes:
    body = f"<w:document {WORD}><w:body><w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:body></w:document>"
    return archive(**{"[Content_Types].xml": TYPES, "_rels/.rels": RELATIONS, "word/document.xml": body})


def epub(text: str, **more: str) -> bytes:
    page = f"<html><body><h1>Chapter</h1><p>{text}</p></body></html>"
    return archive(**{"mimetype": "application/epub+zip", "META-INF/container.xml": CONTAINER, "c.opf": OPF, "a.xhtml": page, **more})


def pptx(text: str) -> bytes:
    from pptx import Presentation

    shown, raw = Presentation(), io.BytesIO()
    slide = shown.slides.add_slide(shown.slide_layouts[1])
    slide.shapes.title.text, slide.placeholders[1].text = "Title", text
    shown.save(raw)
    return raw.getvalue()


def pdf(text: str, encrypted=False) -> bytes:
    drawn = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(drawn), drawn),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        b"<</Filter/Standard/V 1/R 2/O<" + b"41" * 32 + b">/U<" + b"42" * 32 + b">/P -4>>",
    ]
    raw, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(b"%010d 00000 n \n" % len(raw))
        raw += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    end = b"xref\n0 7\n0000000000 65535 f \n" + b"".join(places) + b"trailer<</Size 7/Root 1 0 R"
    return raw + end + (b"/Encrypt 6 0 R/ID[<01><01>]" if encrypted else b"") + b">>\nstartxref\n%d\n%%%%EOF\n" % len(raw)


def test_files_that_people_have_and_what_is_wrong_with_some(tmp_path):
    """All in one folder: the parser's process takes seconds to start."""
    locked = bytearray(docx("x"))
    locked[6] |= 1  # of the first member
    locked[locked.index(b"PK\1\2") + 8] |= 1
    drm = {"META-INF/encryption.xml": '<EncryptionMethod Algorithm="http://www.w3.org/2001/04/xmlenc#aes128-cbc"/>'}
    fonts = {"META-INF/encryption.xml": '<EncryptionMethod Algorithm="http://www.idpf.org/2008/embedding"/>'}
    files = {
        "a.docx": docx("The docx text"), "a.pdf": pdf("The pdf text"), "a.epub": epub("The epub text", **fonts),
        "a.pptx": pptx("The pptx text"), "a.html": b"<html><head><title>T</title><script>no</script></head><body><p>The html text",
        "b.html": "<html><head><meta charset='latin-1'></head><body><p>caf\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin-1"),
        "bad/bomb.docx": archive(**{f"{number}": "0" * (60 << 20) for number in range(9)}),
        "bad/cut.docx": docx("x")[:-40], "bad/deep.html": b"<div>" * 100_000, "bad/drm.epub": epub("x", **drm), "bad/empty.pdf": b"",
        "bad/encrypted.docx": bytes.fromhex("d0cf11e0a1b11ae1") + bytes(600), "bad/encrypted.pdf": pdf("x", encrypted=True),
        "bad/locked.docx": bytes(locked), "bad/no.pdf": b"not a pdf", "bad/odd.epub": archive(x="y"),
    }  # fmt: skip
    for name, raw in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    rejected = []
    found = {document.source.rpartition("/")[2]: document for document in documents([str(tmp_path)], reject=rejected.append)}
    texts = {name: document.text for name, document in found.items()}
    assert texts == {
        "a.docx": "The docx text", "a.epub": "# Chapter\n\nThe epub text", "a.html": "The html text", "a.pdf": "The pdf text",
        "a.pptx": "# Title\nThe pptx text", "b.html": "caf\N{LATIN SMALL LETTER E WITH ACUTE}",
    }  # fmt: skip
    assert found["a.epub"].meta == {"title": "A Book", "language": "de", "format": "epub"}
    assert found["a.html"].meta == {"title": "T", "format": "html"}
    reasons = {item.source.rpartition("/")[2]: item.reason.split(" (")[0] for item in rejected}
    assert reasons.pop("odd.epub") == "its parser failed"
    assert "a zip bomb?" in reasons.pop("bomb.docx")
    assert reasons == {
        "cut.docx": "damaged: no archive", "deep.html": "nested deeper than 3,000 elements", "drm.epub": "encrypted", "empty.pdf": "empty",
        "encrypted.docx": "encrypted, or of an Office older than 2007", "encrypted.pdf": "encrypted", "locked.docx": "encrypted",
        "no.pdf": "no PDF",
    }  # fmt: skip


def test_too_large_and_without_the_extra(tmp_path, monkeypatch):
    with open(tmp_path / "large.pdf", "wb") as file:
        file.truncate(office.FILE_BYTES + 1)
    rejected = []
    assert list(documents([str(tmp_path)], reject=rejected.append)) == [] and rejected[0].reason == "larger than 128 MiB"
    monkeypatch.setattr(apart, "version", lambda package: None)
    assert list(documents([str(tmp_path)], reject=rejected.append)) == []
    assert rejected[1].reason == "PDF, DOCX, PPTX, EPUB and HTML needs the markitdown package: pip install 'sparing[documents]'"


def crash(raw, settings):
    """A parser: what it does with the text."""
    import os
    import signal

    if raw == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if raw == b"hang":
        while True:
            pass
    if raw == b"memory":
        bytearray(apart.MEMORY)
    if raw == b"print":
        print("noise on standard output")
    return raw.decode(), {}


def test_a_parser_that_crashes_or_hangs_costs_a_document(monkeypatch, tmp_path):
    """The parser is `crash` above, in the process that reads documents."""
    (tmp_path / "crashing.py").write_text(
        "import sparing.data.apart as apart\napart.CPU_S = 1\n" + __import__("inspect").getsource(crash).replace("def crash", "def parse")
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(apart, "WALL_S", 30.0)
    code = f"import sparing.data; sparing.data.__path__.append({str(tmp_path)!r})\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    assert apart.parse("crashing", b"one", {}) == ("one", {})
    for raw, reason in ((b"crash", "its parser crashed"), (b"memory", "its parser needs more than"), (b"\xff", "its parser failed")):
        with pytest.raises(apart.Unreadable, match=reason):
            apart.parse("crashing", raw, {})
        assert apart.parse("crashing", b"print", {}) == ("print", {})
    monkeypatch.setattr(apart, "WALL_S", 4.0)  # the process has started
    with pytest.raises(apart.Unreadable, match=r"more than \d+ s|killed"):
        apart.parse("crashing", b"hang", {})
    apart.end()
