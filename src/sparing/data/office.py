"""Reads the files that people have, PDF, DOCX, PPTX, EPUB and HTML, as Markdown, by markitdown in a process of its own (`apart`)."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Iterator
from typing import Any

from sparing.data import apart
from sparing.data.blocks import Damaged, blocks
from sparing.data.document import Document, Reject, Rejected, Tick, Unreadable, documents_of, metadata
from sparing.data.files import kind_of
from sparing.data.web import check_depth

KINDS = ("pdf", "docx", "pptx", "epub", "html", "htm", "xhtml")
FILE_BYTES, HTML_BYTES = 128 << 20, 16 << 20
"""Larger files are not read."""
MEMBERS, MEMBER_BYTES = 10_000, 512 << 20
"""A file that is an archive may have so many members, and so many bytes in all when they are decompressed."""
OLD = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
"""How old Office files begin, and new ones that are encrypted ([MS-CFB], [MS-OFFCRYPTO])."""
FONTS = (b"http://www.idpf.org/2008/embedding", b"http://ns.adobe.com/pdf/enc#RC")
"""EPUB's ways of hiding fonts, which leave the text as it is."""


def office(path: str, text_key: str, reject: Reject, tick: Tick) -> Iterator[Document]:
    """The document in a file."""
    if reason := apart.missing("documents", "markitdown"):
        return reject(Rejected(path, None, f"PDF, DOCX, PPTX, EPUB and HTML {reason}"))
    size, limit = os.path.getsize(path), HTML_BYTES if _is_html(kind_of(path)) else FILE_BYTES
    tick(size)
    if size > limit:
        return reject(Rejected(path, None, f"larger than {limit >> 20} MiB"))
    with open(path, "rb"):  # what this process may not read is no parser's affair
        pass
    try:
        text, meta = apart.parse("office", b"", {"path": os.path.abspath(path), "limit": limit})
    except Unreadable as error:
        reject(Rejected(path, None, str(error)))
    else:
        yield from documents_of(text, path, 1, reject, meta)


def _is_html(kind: str) -> bool:
    return kind.endswith(("html", "htm"))


# in a process of its own


def parse(raw: bytes, settings: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """(Markdown, metadata) of the file `settings["path"]`. Raises Unreadable."""
    path, limit = settings["path"], settings["limit"]
    kind, content = kind_of(path), bytearray()
    try:
        for block in blocks(path, lambda size: None):
            content += block
            if len(content) > limit:
                raise Unreadable(f"larger than {limit >> 20} MiB when decompressed")
    except Damaged as damage:
        raise Unreadable(str(damage)) from None
    if not content:
        raise Unreadable("empty")
    raw = bytes(content)
    if raw.startswith(OLD):
        raise Unreadable("encrypted, or of an Office older than 2007")
    if kind in ("docx", "pptx", "epub"):
        _check_archive(raw)
    elif kind == "pdf" and not raw[:1024].lstrip().startswith(b"%PDF"):
        raise Unreadable("no PDF")
    from markitdown import StreamInfo, converters

    html = _is_html(kind)
    converter = {"pdf": "Pdf", "docx": "Docx", "pptx": "Pptx", "epub": "Epub"}.get(kind, "Html")
    if html:
        check_depth(raw)
        raw = _utf8(raw)
    info = StreamInfo(extension=".html" if html else f".{kind}", charset="utf-8" if html else None)
    try:
        result = getattr(converters, f"{converter}Converter")().convert(io.BytesIO(raw), info)
    except RecursionError:
        raise
    except Exception as error:
        if "Password" in repr(error) or "ncrypt" in repr(error):  # pdfminer's, under the names of several of its versions
            raise Unreadable("encrypted") from None
        raise
    text, title = result.markdown, result.title
    known = {}
    if kind == "epub":  # begins with what is known of the book
        head, _, text = text.partition("\n\n")
        known = dict(re.findall(r"^\*\*(\w+):\*\* (.+)$", head, re.M))
    elif kind == "pptx":
        text = re.sub(r"<!--.*?-->\n?", "", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|data:[a-z]+/[a-z+.-]+;base64,[A-Za-z0-9+/=]+", "", text).replace("\0", "")
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text.replace("\f", "\n"))).strip()
    if not text:
        raise Unreadable("no text in it" + (" (scanned pages?)" if kind == "pdf" else ""))
    meta = {"title": " ".join((title or "").split()), "language": known.get("Language"), "date": known.get("Date")}
    return text, metadata(meta, {"format": "html" if html else kind})


def _check_archive(raw: bytes) -> None:
    """Raises Unreadable for what is no archive, is encrypted, or would become too large."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = archive.infolist()
            if len(members) > MEMBERS or sum(member.file_size for member in members) > MEMBER_BYTES:
                raise Unreadable(f"more than {MEMBER_BYTES >> 20} MiB or {MEMBERS:,} members when decompressed: a zip bomb?")
            if any(member.flag_bits & 1 for member in members):
                raise Unreadable("encrypted")
            names = {member.filename for member in members}
            if "META-INF/rights.xml" in names:
                raise Unreadable("encrypted")
            if "META-INF/encryption.xml" in names:
                ways = re.findall(rb'EncryptionMethod[^>]*Algorithm="([^"]+)"', archive.read("META-INF/encryption.xml"))
                if any(way not in FONTS for way in ways):
                    raise Unreadable("encrypted")
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError) as error:
        raise Unreadable(f"damaged: no archive ({error})") from None


def _utf8(raw: bytes) -> bytes:
    """HTML in UTF-8: as it says what it is, or else as Windows' Latin letters."""
    if b"\0" in raw[:8192] and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Unreadable("binary: it holds NUL bytes")
    from bs4 import UnicodeDammit

    text = UnicodeDammit(raw, ["utf-8"], is_html=True).unicode_markup
    if text is None:
        raise Unreadable("wrong encoding")
    return text.encode("utf-8", "replace")
