"""Reads documents from files. What cannot be used is reported with file, line and reason, and never stops the rest."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import zstandard

from sparing.base.files import POINTER, is_pointer
from sparing.data.files import SourceFile, find_files, kind_of

BLOCK = 1 << 20
"""Bytes of text at a time."""
ZSTD_READ = 4096
"""Compressed bytes at a time: zstandard's decompressor cannot bound its output, and one byte can become tens of kilobytes."""
WHOLE_BYTES = 2 << 20
"""A text up to this size is one document; a longer one is read as consecutive documents of about a megabyte, cut at line ends."""
PIECE_BYTES = 1 << 20
LINE_BYTES = 16 << 20
"""A longer JSON line is not read."""
JSON, PARQUET = ("jsonl", "json", "ndjson"), ("parquet", "pq")
"""Suffixes (`files.kind_of`) of what is read row by row."""
JSON_BYTES = 64 << 20
"""A `.json` file that is not JSON lines is read whole, up to this size."""


class Damaged(Exception):
    """The rest of the file cannot be read; the message is the reason."""


class Document(NamedTuple):
    """A text, and where it was found."""

    text: str
    """Never empty; always encodable as UTF-8."""
    source: str
    line: int
    """Line of the file from 1 (row of a Parquet file from 0) at which the document begins."""


class Row(NamedTuple):
    """One value of a file of JSON or Parquet, and where it was found, as `Document` says it."""

    value: object
    source: str
    line: int


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

    def __init__(self):
        self.reasons: Counter[str] = Counter()
        """Without what differs from document to document, in brackets."""
        self._first: dict[str, Rejected] = {}

    def __call__(self, rejected: Rejected) -> None:
        reason = rejected.reason.split(" (")[0]
        self.reasons[reason] += 1
        self._first.setdefault(reason, rejected)

    @property
    def total(self) -> int:
        return self.reasons.total()

    def __str__(self) -> str:
        return "; ".join(f"{count} × {self._first[reason]}" for reason, count in self.reasons.most_common(3))


Reject = Callable[[Rejected], None]
Tick = Callable[[int], None]


def documents(
    paths: Sequence[str] | Sequence[SourceFile], text_key: str = "text", reject: Reject | None = None, tick: Tick | None = None
) -> Iterator[Document]:
    """Every usable document behind `paths` (see `files.find_files`), in sorted order of the files, in bounded memory.

    Text, Markdown and source code: a file is a document. `.jsonl`, `.json`: an object a line, its `text_key` is the document (a `.json`
    file may also hold one array of objects). `.parquet`: a row is a document. `.gz` and `.zst` around any but Parquet.
    `reject` receives what was skipped; `tick(bytes)` hears of the bytes read from the disk, about once a megabyte, and may raise to
    end the reading. Raises UserError for paths that name nothing.
    """

    def read(path: str, reject: Reject, tick: Tick) -> Iterator[Document]:
        kind = kind_of(path)
        reader = _parquet if kind in PARQUET else _json if kind in JSON else _text
        return reader(path, text_key, reject, tick)

    return _each_file(paths, read, reject, tick)


def rows(paths: Sequence[str] | Sequence[SourceFile], reject: Reject | None = None, tick: Tick | None = None) -> Iterator[Row]:
    """Every row behind `paths` as it is: JSON lines, arrays in `.json` files, Parquet. Otherwise as `documents`."""

    def read(path: str, reject: Reject, tick: Tick) -> Iterator[Row]:
        if kind_of(path) in PARQUET:
            values = ((dict(zip(batch, row, strict=True)), at) for batch, row, at in _parquet_rows(path, None, reject, tick))
        elif kind_of(path) in JSON:
            values = _json_values(path, reject, tick)
        else:
            return reject(Rejected(path, None, "neither JSON lines nor Parquet"))
        for value, line in values:
            yield Row(value, path, line)

    return _each_file(paths, read, reject, tick)


def _each_file(paths, read: Callable, reject: Reject | None, tick: Tick | None) -> Iterator:
    """What `read(path, reject, tick)` finds in each of the files, in sorted order."""
    reject, tick = reject or (lambda rejected: None), tick or (lambda size: None)
    for file in paths if paths and isinstance(paths[0], SourceFile) else find_files(paths):
        try:
            if file.bytes < 1024 and is_pointer(file.path):
                reject(Rejected(file.path, 1, POINTER))
                continue
            yield from read(file.path, reject, tick)
        except OSError as error:
            reject(Rejected(file.path, None, f"cannot be read: {error.strerror or error}"))


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


def _text(path: str, text_key: str, reject: Reject, tick: Tick) -> Iterator[Document]:
    line, rest, whole = 1, b"", True
    try:
        for block in _blocks(path, tick):
            rest += block
            if len(rest) > WHOLE_BYTES:
                whole = False
                *full, rest = pieces(rest, PIECE_BYTES)
                for piece in full:
                    yield from _decoded(piece, path, line, reject)
                    line += piece.count(b"\n")
    except Damaged as damage:
        reject(Rejected(path, line + rest.count(b"\n"), str(damage)))
        rest, whole = rest[: rest.rfind(b"\n") + 1], False  # the last line may be cut anywhere
    if rest or whole:
        yield from _decoded(rest, path, line, reject)


def _decoded(raw: bytes, path: str, line: int, reject: Reject) -> Iterator[Document]:
    if b"\0" in raw[:8192]:
        return reject(Rejected(path, line, "binary or UTF-16: it holds NUL bytes"))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return reject(Rejected(path, line + raw.count(b"\n", 0, error.start), f"not UTF-8 (byte 0x{raw[error.start]:02x})"))
    if not text.strip():
        return reject(Rejected(path, line, "empty"))
    yield Document(text, path, line)


def _json(path: str, text_key: str, reject: Reject, tick: Tick) -> Iterator[Document]:
    for value, line in _json_values(path, reject, tick):
        yield from _field(value, path, line, text_key, reject)


def _json_values(path: str, reject: Reject, tick: Tick) -> Iterator[tuple[object, int]]:
    """(value, line) of JSON lines, or of the array that a `.json` file holds."""
    number, first = 0, kind_of(path) == "json"  # JSON lines unless the first line says otherwise
    try:
        for number, line in _lines(_blocks(path, tick), LINE_BYTES):
            if line is not None and not line.strip():
                continue
            value, reason = (None, f"line longer than {LINE_BYTES >> 20} MiB") if line is None else _parsed(line.strip())
            if first and (isinstance(value, list) or (reason and not reason.startswith("not UTF-8"))):
                yield from _json_whole(path, reject, lambda size: tick(0))
                return
            first = False
            if reason:
                reject(Rejected(path, number, reason))
            else:
                yield value, number
    except Damaged as damage:
        return reject(Rejected(path, number + 1, str(damage)))
    if number == 0:
        reject(Rejected(path, None, "empty"))


def _parsed(line: bytes) -> tuple[object, str]:
    """(value, "") of a JSON line, or (None, why there is none)."""
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf").decode()), ""
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte 0x{line[error.start]:02x})"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({str(error).split(':')[0].lower()})"


def _json_whole(path: str, reject: Reject, tick: Tick) -> Iterator[tuple[object, int]]:
    """One value over many lines: an object, or an array of objects."""
    raw = bytearray()
    try:
        for block in _blocks(path, tick):
            raw += block
            if len(raw) > JSON_BYTES:
                return reject(Rejected(path, None, f"one JSON value larger than {JSON_BYTES >> 20} MiB: write it as one object a line"))
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return reject(Rejected(path, None, "not UTF-8"))
    except (ValueError, RecursionError) as error:
        return reject(Rejected(path, getattr(error, "lineno", None), f"not JSON ({str(error).split(':')[0].lower()})"))
    except Damaged as damage:
        return reject(Rejected(path, None, str(damage)))
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        yield item, index + 1


def _field(value: object, path: str, line: int, text_key: str, reject: Reject) -> Iterator[Document]:
    if not isinstance(value, dict):
        return reject(Rejected(path, line, "not a JSON object"))
    if text_key not in value:
        return reject(Rejected(path, line, f"no key {text_key!r} (keys: {', '.join(map(str, list(value)[:8]))})"))
    yield from _value(value[text_key], path, line, text_key, reject)


def _value(text: object, path: str, line: int, text_key: str, reject: Reject) -> Iterator[Document]:
    if not isinstance(text, str):
        return reject(Rejected(path, line, f"{text_key!r} is not text but {type(text).__name__}"))
    if not text.strip():
        return reject(Rejected(path, line, "empty"))
    try:
        raw = text.encode() if not text.isascii() or len(text) > WHOLE_BYTES else b""
    except UnicodeEncodeError:
        return reject(Rejected(path, line, "not Unicode text (half of a surrogate pair)"))
    if len(raw) > WHOLE_BYTES:
        for piece in pieces(raw, PIECE_BYTES):
            yield from _decoded(piece, path, line, reject)
    else:
        yield Document(text, path, line)


def _parquet(path: str, text_key: str, reject: Reject, tick: Tick) -> Iterator[Document]:
    for _, (value,), row in _parquet_rows(path, text_key, reject, tick):
        if isinstance(value, UnicodeDecodeError):
            reject(Rejected(path, row, "not UTF-8"))
        elif isinstance(value, bytes):
            yield from _decoded(value, path, row, reject)
        else:
            yield from _value(value, path, row, text_key, reject)


def _parquet_rows(path: str, only: str | None, reject: Reject, tick: Tick) -> Iterator[tuple[list[str], tuple, int]]:
    """(columns, values, row from 0) of one column or of all (None). A text that is not UTF-8 is the error that says so."""
    import pyarrow
    import pyarrow.parquet

    try:
        name = os.fsencode(path)  # which may be no UTF-8: pyarrow would not take the text
        with pyarrow.memory_map(name) if os.path.getsize(path) else pyarrow.OSFile(name) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            names = file.schema_arrow.names
            if only is not None and only not in names:
                return reject(Rejected(path, None, f"no column {only!r} (columns: {', '.join(names[:8])})"))
            row, per_row, chosen = 0, os.path.getsize(path) / max(1, file.metadata.num_rows), names if only is None else [only]
            for batch in file.iter_batches(batch_size=256, columns=chosen, use_threads=False):
                tick(int(batch.num_rows * per_row))
                columns = []
                for column in batch.columns:
                    if pyarrow.types.is_dictionary(column.type):
                        column = column.dictionary_decode()
                    try:
                        columns.append(column.to_pylist())
                    except UnicodeDecodeError:  # one bad row must not take its neighbours along
                        columns.append([_scalar(item) for item in column])
                for values in zip(*columns, strict=True):
                    yield batch.schema.names, values, row
                    row += 1
    except pyarrow.ArrowException as error:
        reject(Rejected(path, None, f"damaged Parquet ({str(error).splitlines()[0][:120]})"))


def _scalar(item) -> object:
    try:
        return item.as_py()
    except UnicodeDecodeError as error:
        return error


def _blocks(path: str, tick: Tick) -> Iterator[bytes]:
    """The content of a file in blocks of about a megabyte; `.gz` and `.zst` decompressed. Raises Damaged, after all that is good in
    a damaged archive, and OSError."""
    with open(path, "rb") as file:

        def read(size: int) -> bytes:
            data = file.read(size)
            tick(len(data))
            return data

        suffix = path.lower().rsplit(".", 1)[-1]
        if suffix == "gz":
            yield from _decompress(lambda: read(BLOCK // 4), lambda: zlib.decompressobj(wbits=31), "gzip")
        elif suffix == "zst":
            window = zstandard.ZstdDecompressor(max_window_size=1 << 27)
            yield from _decompress(lambda: read(ZSTD_READ), window.decompressobj, "zstd")
        else:
            while block := read(BLOCK):
                yield block


def _decompress(read, start, name: str) -> Iterator[bytes]:
    """Any number of concatenated members; zero padding after the last is allowed."""
    member = None  # a decompressor between members is None: the file may end here
    first = True
    while data := read():
        while data:
            if member is None:
                if not first and not data.strip(b"\0"):
                    break
                member, first = start(), False
            try:
                out = member.decompress(data, BLOCK) if name == "gzip" else member.decompress(data)
            except (zlib.error, zstandard.ZstdError) as error:
                raise Damaged(f"damaged {name} data ({error})") from None
            if out:
                yield out
            if member.eof:
                data, member = member.unused_data, None
            else:
                data = getattr(member, "unconsumed_tail", b"")
    while member is not None and name == "gzip" and not member.eof and (out := member.flush(BLOCK)):
        yield out
    if member is not None and not member.eof:
        raise Damaged(f"truncated {name} file: it ends in the middle of its data")
    if first:
        raise Damaged(f"truncated {name} file: it is empty")


def _lines(stream: Iterator[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line without its newline); None in place of a line longer than `limit` bytes, which is never held whole.

    What follows the last newline is a line too, unless the stream is Damaged: then nobody knows how it would have ended.
    """
    number, rest, too_long = 1, b"", False
    for block in stream:
        parts = block.split(b"\n")
        for part in parts[:-1]:
            line = rest + part if rest else part
            yield number, None if too_long or len(line) > limit else line
            number, rest, too_long = number + 1, b"", False
        rest += parts[-1]
        if len(rest) > limit:
            rest, too_long = b"", True
    if rest or too_long:
        yield number, None if too_long else rest
