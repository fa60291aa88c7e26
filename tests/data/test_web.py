"""WARC and WET. The archives are made here, by hand where they are damaged."""

import gzip
from pathlib import Path

import pytest

from sparing.data import apart, web
from sparing.data.sources import documents

pytest.importorskip("fastwarc", reason="needs the extra web")
pytest.importorskip("resiliparse", reason="needs the extra web")

REAL = Path(__file__).parents[3] / "shared" / "data" / "common-crawl"
WORDS = "The old lighthouse keeper wrote a long letter about the storm that had carried away his only boat. "


def article(number: int, words: str = WORDS) -> bytes:
    body = "".join(f"<p>{words}Paragraph {number}-{part}.</p>" for part in range(6))
    return (
        f"<html lang='en'><head><title>Page {number}</title><script>var hidden = 1;</script></head><body><nav><ul><li>Home</li>"
        f"<li>Contact</li></ul></nav><main><article><h1>Heading {number}</h1>{body}</article></main><footer>imprint</footer></body></html>"
    ).encode()


def http(body: bytes, kind="text/html; charset=utf-8", status="200 OK", more="") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}\r\n".encode() + body


def record(body: bytes, kind="response", number=0, content="application/http; msgtype=response") -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://example.org/{number}\r\nWARC-Date: 2024-05-18T01:58:10Z\r\n"
        f"WARC-Record-ID: <urn:uuid:{number}>\r\nContent-Type: {content}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def read(path, **options):
    rejected = []
    return list(documents([str(path)], reject=rejected.append, **options)), [(item.line, item.reason) for item in rejected]


def test_pages_become_their_main_text_with_metadata_and_offset(tmp_path):
    members = [
        record(b"software: test\r\n", "warcinfo", content="application/warc-fields"),
        record(b"GET / HTTP/1.1\r\n\r\n", "request"),
        record(http(article(1)), number=1),
        record(b"fetchTimeMs: 3\r\n", "metadata", content="application/warc-fields"),
        record(http(article(2)), number=2),
    ]
    for name, compress in (("a.warc", bytes), ("a.warc.gz", gzip.compress)):
        (tmp_path / name).write_bytes(b"".join(map(compress, members)))
        found, rejected = read(tmp_path / name)
        assert rejected == [] and len(found) == 2
        assert found[0].line == sum(len(compress(member)) for member in members[:2])
        text = found[0].text
        assert WORDS.strip() in text and "Heading 1" in text
        assert not any(word in text for word in ("hidden", "Contact", "imprint", "<p>"))
        expected = {"title": "Page 1", "language": "en", "format": "warc", "url": "http://example.org/1", "id": "urn:uuid:1"}
        assert found[0].meta == expected | {"date": "2024-05-18T01:58:10Z"}


def test_trafilatura_is_the_other_extractor(tmp_path):
    pytest.importorskip("trafilatura", reason="needs the extra web")
    (tmp_path / "a.warc").write_bytes(record(http(article(1))))
    found, rejected = read(tmp_path / "a.warc", extract="trafilatura")
    assert rejected == [] and WORDS.strip() in found[0].text and "Contact" not in found[0].text


def test_wet_is_read_as_it_is(tmp_path):
    text = "Ünder the\nlighthouse"
    raw = record(text.encode(), "conversion", content="text/plain") + record(b"caf\xe9", "conversion", content="text/plain")
    (tmp_path / "a.warc.wet.gz").write_bytes(gzip.compress(raw))
    found, rejected = read(tmp_path / "a.warc.wet.gz")
    assert [document.text for document in found] == [text] and found[0].meta["format"] == "wet"
    assert [reason for _, reason in rejected] == ["not UTF-8 (byte 0xe9)"]


BOMB = http(gzip.compress(b"<p>" + b"bomb " * 8_000_000), more="Content-Encoding: gzip\r\n")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (record(http(b"gone", status="404 Not Found")), "HTTP status is not 200 (404)"),
        (record(http(b"\x89PNG", "image/png")), "no HTML (image/png)"),
        (record(http(b"<p> </p>")), "no text in the page"),
        (record(b"\0\0garbage"), "HTTP status is not 200 (None)"),
        (record(http(b"<p>plain", more="Content-Encoding: gzip\r\n")), "damaged HTTP answer"),
        (record(http(b"<p>plain", more="Transfer-Encoding: chunked\r\n")), "damaged HTTP answer"),
        (record(b"x", content="text/dns"), "another protocol"),
        (record(http(b"<div>" * 100_000 + b"deep")), "nested deeper"),
        (
            record(BOMB),
            "longer than 16 MiB when decompressed",
        ),
        (record(http(b"<p>" + b"x" * (17 << 20))), "record longer than 16 MiB"),
    ],
)
def test_what_is_no_page_is_quarantined_and_the_next_is_read(tmp_path, raw, reason):
    (tmp_path / "a.warc").write_bytes(raw + record(http(article(2))))
    found, rejected = read(tmp_path / "a.warc")
    assert [document.meta["title"] for document in found] == ["Page 2"]
    assert len(rejected) == 1 and rejected[0][0] == 0 and reason in rejected[0][1]


def test_wrong_encodings(tmp_path):
    page = article(1, "Das Mädchen grüßt den König über die Brücke hinweg und läuft dann schnell zurück nach Hause. ").decode()
    declared = [("utf-8", "latin-1"), ("iso-8859-1", "latin-1"), ("no-such-charset", "utf-8"), ("utf-16", "utf-8")]
    records = [record(http(page.encode(actual), f"text/html; charset={name}"), number=at) for at, (name, actual) in enumerate(declared)]
    (tmp_path / "a.warc").write_bytes(b"".join(records))
    found, rejected = read(tmp_path / "a.warc")
    assert len(found) + len(rejected) == 4
    assert len(found) >= 3 and all("Mädchen grüßt den König" in document.text for document in found)


MEMBERS = [record(http(article(number)), number=number) for number in range(3)]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_cut_anywhere_is_counted(tmp_path, compress, monkeypatch):
    """Wherever a file is cut, what is whole is read, and what is not is one rejected record."""
    ends, raw = [0], b""
    for member in MEMBERS:
        raw += compress(member)
        ends.append(len(raw))
    monkeypatch.setattr(apart, "parse", lambda module, body, settings: (f"{len(body)}", {}))  # the cut is not the parser's affair
    path = tmp_path / ("a.warc.gz" if compress is gzip.compress else "a.warc")
    padding = 0 if compress is gzip.compress else 4  # the two line ends behind a record say nothing
    for cut in [*range(1, len(raw), 29), *(end + more for end in ends for more in (-1, 1, 2, 3, 11, 20, 60)), *ends[1:]]:
        if not 0 < cut <= len(raw):
            continue
        path.write_bytes(raw[:cut])
        found, rejected = read(path)
        whole = sum(end - padding <= cut for end in ends[1:])
        if compress is gzip.compress and whole < 3 and 0 < ends[whole + 1] - cut <= 20:
            continue  # only the end of the stream and its checksum are missing: the record may be whole all the same
        assert len(found) == whole, cut
        assert len(rejected) == (0 if cut <= ends[whole] else 1), cut
        assert all(ends[whole] <= line <= ends[whole] + 2 and "damaged or truncated" in reason for line, reason in rejected), cut


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_reading_goes_on_behind_a_damaged_record(tmp_path, compress):
    members = [bytearray(compress(member)) for member in MEMBERS]
    if compress is gzip.compress:
        members[1][40:60] = b"\0" * 20
    else:
        members[1][0:4] = b"WORK"
    path = tmp_path / ("a.warc.gz" if compress is gzip.compress else "a.warc")
    path.write_bytes(b"".join(members))
    found, rejected = read(path)
    assert [document.meta["title"] for document in found] == ["Page 0", "Page 2"]
    assert len(rejected) == 1 and "damaged or truncated WARC" in rejected[0][1]
    assert found[1].line == len(members[0]) + len(members[1])


def test_what_is_no_archive_at_all(tmp_path):
    for raw in (b"hello world\n" * 1000, gzip.compress(b"hello world\n"), b"\x1f\x8b\x08garbage", b"", b"\0" * 5000):
        (tmp_path / "a.warc.gz").write_bytes(raw)
        found, rejected = read(tmp_path / "a.warc.gz")
        assert found == [] and len(rejected) == 1


def test_bytes_are_told_once_though_reading_goes_back(tmp_path):
    raw = MEMBERS[0] + b"junk\r\n" * 100 + MEMBERS[1] + b"junk\r\n" * 100 + MEMBERS[2]
    (tmp_path / "a.warc").write_bytes(raw)
    sizes = []
    found = list(documents([str(tmp_path / "a.warc")], tick=sizes.append))
    assert len(found) == 3 and sum(sizes) == len(raw)


def test_without_the_extra_the_reason_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(apart, "version", lambda package: None)
    (tmp_path / "a.warc").write_bytes(MEMBERS[0])
    assert read(tmp_path / "a.warc")[1] == [(None, "WARC and WET needs the fastwarc package: pip install 'sparing[web]'")]


@pytest.mark.real_data
def test_real_archives():
    if not REAL.is_dir():
        pytest.skip(f"no {REAL}")
    found, rejected = read(REAL / "web-pages.warc.gz")
    assert len(found) + len(rejected) == 24 and len(found) >= 20
    assert all(document.meta["url"].startswith("https://") and document.text.strip() for document in found)
    wet, _ = read(REAL / "whirlwind.warc.wet.gz")
    assert wet[0].meta["language"] == "spa" and web.KINDS[-1] == "conversion"
