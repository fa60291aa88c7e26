"""Reads web crawls: WARC (pages as servers sent them, of which the main text is taken) and WET (their text).

A document's place is the byte offset of its record in the file, compressed as it is. FastWARC reads the records, Resiliparse or trafilatura
the pages, in a process of their own (`apart`).
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from sparing.data import apart
from sparing.data.document import Document, Reject, Rejected, Tick, Unreadable, documents_of, metadata

RECORD_BYTES = 16 << 20
"""A longer record is not read, nor a page that is longer when it is decompressed."""
DEPTH = 3000
"""A page whose elements are nested deeper is not read: the time that extraction takes grows with the square of it."""
KINDS = ("response", "resource", "conversion")
"""Types of records that may hold documents; the last is that of WET files."""
EXTRACTORS = ("resiliparse", "trafilatura")
PAGES = ("text/html", "application/xhtml+xml")
BLOCK = 1 << 18
GZIP, PLAIN = b"\x1f\x8b\x08", b"\nWARC/1."
"""How a record begins: after damage, reading goes on at the next one."""


class Record(NamedTuple):
    """A WARC record that may hold a document."""

    offset: int
    kind: str
    """Of KINDS."""
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes | None
    """None: it is longer than RECORD_BYTES."""


def web(path: str, text_key: str, reject: Reject, tick: Tick, extract: str = EXTRACTORS[0]) -> Iterator[Document]:
    """The pages of a WARC or WET file. Requests and the like are no documents. Answers of another status than 200, files that are no HTML
    and what is damaged are quarantined."""
    if reason := apart.missing("web", "fastwarc", "resiliparse", extract):
        return reject(Rejected(path, None, f"WARC and WET {reason}"))
    for record in records(path, reject, tick):
        try:
            if record.body is None:
                raise Unreadable(f"record longer than {RECORD_BYTES >> 20} MiB")
            text, meta = apart.parse("web", record.body, {"kind": record.kind, "headers": record.headers, "extract": extract})
        except Unreadable as error:
            reject(Rejected(path, record.offset, str(error)))
        else:
            yield from documents_of(text, path, record.offset, reject, meta)


def records(path: str, reject: Reject, tick: Tick) -> Iterator[Record]:
    """The records of a file that may hold documents. One that is damaged or cut is rejected, and reading goes on at the next."""
    from fastwarc.warc import ArchiveIterator

    with open(path, "rb") as file:
        mark = GZIP if file.read(3) == GZIP else PLAIN
        counted, start, sound = _Counted(file, tick), 0, True
        while start is not None:
            file.seek(start)
            last, inside = None, False  # (offset, length) of the record that was found last, and whether it is being read
            try:
                for record in ArchiveIterator(counted, parse_http=False):
                    last, inside, sound = (record.stream_pos, record.content_length), True, True
                    headers = {key.lower(): value for key, value in record.headers.to_tuples()}
                    if "content-length" not in headers:
                        raise OSError("a record without its length")
                    body = _body(record)
                    inside = False
                    if (kind := headers.get("warc-type")) in KINDS:
                        yield Record(last[0], kind, headers, body)
                if last is None and sound:
                    raise OSError("no record in it")
                if last is not None and _goes_on(file, mark, _behind(file, mark, *last)):
                    raise OSError("it ends in the middle of a record")
                return
            except BaseException as error:  # FastWARC's own failures (PanicException) are no Exception
                if type(error).__name__ != "PanicException" and not (isinstance(error, OSError) and error.errno is None):
                    raise  # the disk's errors have a number
                bad = start if last is None else last[0] if inside else _behind(file, mark, *last)
                if sound:
                    reject(Rejected(path, bad, f"damaged or truncated WARC ({error})"))
                start, sound = _next(file, mark, bad + 1), False


def _body(record) -> bytes | None:
    """Raises OSError where the file ends before the record does."""
    left, parts = record.content_length, []
    while left and (part := record.reader.read(min(left, BLOCK))):
        left -= len(part)
        if record.content_length <= RECORD_BYTES:
            parts.append(part)
    if left:
        raise OSError("it ends in the middle of a record")
    return b"".join(parts) if record.content_length <= RECORD_BYTES else None


def _behind(file, mark: bytes, offset: int, length: int) -> int:
    """Where the record behind one at `offset` begins, whose body has `length` bytes."""
    if mark == GZIP:
        found = _next(file, mark, offset + 1)
        return file.seek(0, os.SEEK_END) if found is None else found
    file.seek(offset)
    return offset + max(0, file.read(1 << 16).find(b"\r\n\r\n")) + 4 + length + 4


def _goes_on(file, mark: bytes, offset: int) -> bool:
    """Whether there is the beginning of another record behind the last whole one, of which nothing can be read."""
    file.seek(offset)
    rest = file.read(BLOCK)
    if mark == PLAIN:
        return bool(rest.strip())
    if not rest:  # a part of the mark, which no member of less than 500 MB ends with
        file.seek(max(0, offset - 2))
        return file.read().endswith((GZIP[:1], GZIP[:2]))
    member = zlib.decompressobj(wbits=31)
    try:
        member.decompress(rest, BLOCK)
    except zlib.error:  # no member: the mark stands within compressed data by chance
        return False
    return bool(rest) and not member.eof


class _Counted:
    """A file that tells `tick` of each byte once, though reading may go back after damage."""

    def __init__(self, file, tick: Tick):
        self.file, self.tick, self.furthest = file, tick, 0

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        place = self.file.tell()
        self.tick(max(0, place - self.furthest))
        self.furthest = max(self.furthest, place)
        return data

    def tell(self) -> int:
        return self.file.tell()


def _next(file, mark: bytes, place: int) -> int | None:
    """Where a record may begin at `place` or later."""
    lead = 1 if mark == PLAIN else 0  # the line end before it
    place = max(0, place - lead)
    file.seek(place)
    rest = b""
    while block := file.read(BLOCK):
        rest += block
        if (found := rest.find(mark)) >= 0:
            return place + found + lead
        keep = len(mark) - 1
        place += max(0, len(rest) - keep)
        rest = rest[-keep:]
    return None


# in a process of its own


def parse(raw: bytes, settings: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """(text, metadata) of a record's body. Raises Unreadable."""
    headers, kind = settings["headers"], settings["kind"]
    meta = {
        "id": headers.get("warc-record-id", "").strip("<>"),
        "url": headers.get("warc-target-uri", "").strip("<>"),
        "date": headers.get("warc-date", ""),
        "language": headers.get("warc-identified-content-language", ""),
        "format": {"conversion": "wet"}.get(kind, "warc"),
    }
    if kind == "conversion":
        try:
            return raw.decode(), metadata(meta)
        except UnicodeDecodeError as error:
            raise Unreadable(f"not UTF-8 (byte 0x{raw[error.start]:02x})") from None
    content_type, charset = headers.get("content-type", ""), None
    if kind == "response":
        if not content_type.startswith("application/http"):
            raise Unreadable(f"an answer of another protocol than HTTP ({content_type[:60]})")
        content_type, charset, raw = _answer(raw)
    content_type = content_type.split(";")[0].strip().lower()
    if content_type and content_type not in PAGES:
        raise Unreadable(f"no HTML ({content_type[:60]})")
    return _page(raw, charset, settings["extract"], meta)


def _answer(raw: bytes) -> tuple[str, str | None, bytes]:
    """(content type, character set, body) of an HTTP answer, decompressed. Raises Unreadable."""
    from fastwarc.warc import WarcRecord, WarcRecordType

    record = WarcRecord()
    record.init_headers(WarcRecordType.response)
    record.is_http = True
    record.set_bytes_content(raw)
    try:
        record.parse_http(auto_decode="all")
        status = record.http_headers.status_code if record.http_headers else None
        if status != 200:
            raise Unreadable(f"HTTP status is not 200 ({status})")
        body = record.reader.read(RECORD_BYTES + 1)
    except OSError as error:
        raise Unreadable(f"damaged HTTP answer ({error})") from None
    if len(body) > RECORD_BYTES:
        raise Unreadable(f"page longer than {RECORD_BYTES >> 20} MiB when decompressed")
    return record.http_content_type or "", record.http_charset, body


def _page(raw: bytes, charset: str | None, extract: str, meta: dict[str, str]) -> tuple[str, dict[str, str]]:
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    from resiliparse.parse.html import HTMLTree

    check_depth(raw)
    html = None
    if charset:
        try:
            html = raw.decode(charset)
        except (LookupError, UnicodeDecodeError):  # not what it says
            pass
    if html is None:
        html = bytes_to_str(raw, detect_encoding(raw))
    tree = HTMLTree.parse(html)
    if not meta["language"] and tree.document and (root := tree.document.query_selector("html")):
        meta["language"] = root.getattr("lang", "") or ""
    found = metadata({**meta, "title": " ".join((tree.title or "").split())})
    if extract == "trafilatura":
        import trafilatura

        # As FineWeb's pages were read (arXiv 2406.17557): rather less text than menus in it. But without `deduplicate`, which remembers
        # other pages: what a page says must not depend on what was read before.
        text = trafilatura.extract(html, favor_precision=True, include_comments=False) or ""
    else:
        from resiliparse.extract.html2text import extract_plain_text

        # As DCLM's pages were read (arXiv 2406.11794): main content, without what stands for pictures.
        text = extract_plain_text(tree, main_content=True, preserve_formatting=True, alt_texts=False)
    if not text.strip():
        raise Unreadable("no text in the page")
    if text.count("\ufffd") > len(text) // 100:
        raise Unreadable("wrong encoding: more than 1 % of the text are bytes that it does not have")
    return text, found


TAG = re.compile(rb"<(/?)([a-zA-Z][a-zA-Z0-9-]*)")
CLOSES_ITSELF = frozenset(
    b"area base br col embed hr img input link meta param source track wbr p li dt dd td th tr option thead tbody tfoot path".split()
)


def check_depth(raw: bytes) -> None:
    """Raises Unreadable for HTML that nests elements deeper than DEPTH: an upper bound, exact where all that is opened is closed."""
    level = deepest = 0
    for match in TAG.finditer(raw):
        if match[2].lower() not in CLOSES_ITSELF:
            level = max(0, level - 1) if match[1] else level + 1
            deepest = max(deepest, level)
    if deepest > DEPTH:
        raise Unreadable(f"nested deeper than {DEPTH:,} elements")
