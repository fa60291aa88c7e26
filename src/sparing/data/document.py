"""Documents as readers give them, and what becomes of text that cannot be used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TextIO

WHOLE_BYTES = 2 << 20
"""A text up to this size is one document; a longer one is read as consecutive documents of about a megabyte, cut at line ends."""
PIECE_BYTES = 1 << 20
META_KEYS, META_LENGTH = 32, 1000
"""Metadata of a document: at most this many keys, and characters of each value."""
DEPTH = 100
"""Levels of lists and objects that a value of JSON may have: each level costs every later look at it a call."""
PART = "part"
"""Key of the metadata of all documents but the first that were cut from one text: 2, 3, ..."""


class Unreadable(Exception):
    """Why a parser finds no text in a document; details in brackets."""


class Document(NamedTuple):
    """A text, where it was found, and what its format says about it."""

    text: str
    """Never empty; always encodable as UTF-8."""
    source: str
    line: int
    """Line of the file from 1 at which the document begins; row from 0 of a Parquet file; byte offset of a WARC record in the file."""
    meta: Mapping[str, str] = {}
    """id, url, title, date, language, licence, format and so on, see `metadata`."""


@dataclass(frozen=True)
class Rejected:
    """A document that cannot be used: one line of quarantine.jsonl."""

    source: str
    line: int | None
    reason: str

    def __str__(self) -> str:
        """With the place: `no key 'text' (keys: question, answer), in a.jsonl:1`."""
        return f"{self.reason}, in {self.source}" + ("" if self.line is None else f":{self.line}")

    def as_json(self) -> str:
        return json.dumps({"source": self.source, "line": self.line, "reason": self.reason}, ensure_ascii=True)


class Tally:
    """A `Reject` that counts documents by reason, and keeps the first of each; as text: the commonest reasons."""

    def __init__(self, file: TextIO | None = None):
        """file: gets a line of each, as quarantine.jsonl has them."""
        self._file = file
        self.reasons: Counter[str] = Counter()
        """Without what differs from document to document, in brackets."""
        self._first: dict[str, Rejected] = {}

    def __call__(self, rejected: Rejected) -> None:
        reason = rejected.reason.split(" (")[0]
        self.reasons[reason] += 1
        self._first.setdefault(reason, rejected)
        if self._file:
            self._file.write(rejected.as_json() + "\n")

    @property
    def total(self) -> int:
        return self.reasons.total()

    def __str__(self) -> str:
        return "; ".join(f"{count} × {self._first[reason]}" for reason, count in self.reasons.most_common(3))


Reject = Callable[[Rejected], None]
Tick = Callable[[int], None]


def metadata(*sources: Mapping[str, Any]) -> dict[str, str]:
    """One flat mapping of strings: nested values get keys like "a.b", nulls and empty values are left out, the first of equal keys stays.

    What is called `meta` or `metadata` is taken as if its keys stood beside it (the Pile, datatrove, Dolma). `lang` and `license` become
    `language` and `licence`. Keys and lengths are bounded by META_KEYS and META_LENGTH.
    """
    found: dict[str, str] = {}
    for source in sources:
        for key, value in _flat("", source):
            if len(found) >= META_KEYS:
                return found
            found.setdefault(key, value)
    return found


def _flat(prefix: str, value: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        name = str(key)[:100]
        if isinstance(item, Mapping):
            if depth < 8:
                yield from _flat(prefix if name in ("meta", "metadata") and not prefix else f"{prefix}{name}.", item, depth + 1)
            continue
        if item is None or item in ("", [], ()):
            continue
        if isinstance(item, list | tuple):
            item = ", ".join(str(part) for part in item[:META_KEYS])
        elif isinstance(item, bool):
            item = str(item).lower()
        text = item[:META_LENGTH] if isinstance(item, str) else str(item)[:META_LENGTH]
        if not text.isascii():
            text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair
        yield (prefix + ALIASES.get(name, name)).encode("utf-8", "replace").decode(), text


ALIASES = {"lang": "language", "license": "licence"}


def too_deep(value: object) -> bool:
    """Whether lists and objects are nested deeper than DEPTH."""
    level = [value]
    for _ in range(DEPTH + 1):
        level = [inner for item in level for inner in _inside(item) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _inside(value: object) -> Iterable:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def pieces(raw: bytes, size: int) -> Iterator[bytes]:
    """Cut UTF-8 into parts of at most `size` bytes, after a line end where the last half has one, never inside a character."""
    start = 0
    while len(raw) - start > size:
        cut = raw.rfind(b"\n", start + size // 2, start + size) + 1
        if not cut:
            cut = raw.rfind(b" ", start + size // 2, start + size) + 1
        if not cut:
            cut = start + size
            while cut > start + size - 4 and raw[cut] & 0xC0 == 0x80:  # a continuation byte
                cut -= 1
        yield raw[start:cut]
        start = cut
    yield raw[start:]


def numbered(parts: Iterable[Document]) -> Iterator[Document]:
    """The documents that one text was cut into, each but the first marked with its number, so that the text can be counted once."""
    for number, document in enumerate(parts, 1):
        yield document if number == 1 else document._replace(meta={**document.meta, PART: str(number)})


def decoded(raw: bytes, path: str, line: int, reject: Reject, meta: Mapping[str, str] = {}) -> Iterator[Document]:
    """The document in bytes of UTF-8, if it is one."""
    if b"\0" in raw[:8192]:
        return reject(Rejected(path, line, "binary or UTF-16: it holds NUL bytes"))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return reject(Rejected(path, line + raw.count(b"\n", 0, error.start), f"not UTF-8 (byte 0x{raw[error.start]:02x})"))
    if not text.strip():
        return reject(Rejected(path, line, "empty"))
    yield Document(text, path, line, meta)


def documents_of(
    text: object,
    path: str,
    line: int,
    reject: Reject,
    meta: Mapping[str, str] = {},
    key: str = "text",
) -> Iterator[Document]:
    """The document, or the parts of a long one, that a value is which should be text; `key` names it where it is none."""
    if not isinstance(text, str):
        return reject(Rejected(path, line, f"{key!r} is not text but {type(text).__name__}"))
    if not text.strip():
        return reject(Rejected(path, line, "empty"))
    try:
        raw = text.encode() if not text.isascii() or len(text) > WHOLE_BYTES else b""
    except UnicodeEncodeError:
        return reject(Rejected(path, line, "not Unicode text (half of a surrogate pair)"))
    if len(raw) > WHOLE_BYTES:
        yield from numbered(part for piece in pieces(raw, PIECE_BYTES) for part in decoded(piece, path, line, reject, meta))
    else:
        yield Document(text, path, line, meta)
