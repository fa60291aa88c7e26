"""Reads documents from files. What cannot be used is reported with file, line and reason, and never stops the rest."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sparing.base.files import POINTER, is_pointer
from sparing.base.messages import say
from sparing.data import apart
from sparing.data.blocks import Damaged, blocks, lines
from sparing.data.document import (
    DEPTH,
    PIECE_BYTES,
    WHOLE_BYTES,
    Document,
    Reject,
    Rejected,
    Tally,
    Tick,
    decoded,
    documents_of,
    metadata,
    numbered,
    pieces,
    too_deep,
)
from sparing.data.files import SourceFile, find_files, kind_of
from sparing.data.office import KINDS as OFFICE
from sparing.data.office import office
from sparing.data.web import web
from sparing.data.wiki import is_dump, wiki

__all__ = ["FORMATS", "Document", "Reject", "Rejected", "Row", "Tally", "Tick", "documents", "pieces", "readers", "rows", "texts"]

LINE_BYTES = 16 << 20
"""A longer JSON line is not read."""
ROWS_AT_ONCE, DECODED_BYTES = 64, 1 << 28
"""Of Parquet: rows that are decoded at once, and what they may take if each of them is as large as it can be."""
JSON, PARQUET = ("jsonl", "json", "ndjson"), ("parquet", "pq")
"""Suffixes (`files.kind_of`) of what is read row by row."""
METADATA_COLUMNS = (
    "id", "url", "title", "date", "language", "lang", "licence", "license", "source", "added", "created", "timestamp", "meta", "metadata",
)  # fmt: skip
"""Columns of Parquet that are read beside the text's."""
DEEP = f"nested deeper than {DEPTH} levels"
JSON_BYTES = 64 << 20
"""A `.json` file that is not JSON lines is read whole, up to this size."""


class Row(NamedTuple):
    """One value of a file of JSON or Parquet, and where it was found, as `Document` says it."""

    value: object
    source: str
    line: int


def documents(
    paths: Sequence[str] | Sequence[SourceFile],
    text_key: str = "text",
    reject: Reject | None = None,
    tick: Tick | None = None,
    *,
    extract: str = "resiliparse",
) -> Iterator[Document]:
    """Every usable document behind `paths` (see `files.find_files`), in sorted order of the files, in bounded memory.

    FORMATS says how each kind of file is read; any other one is text: Markdown and source code too, a file is a document.
    `extract` is what takes the text out of web pages, resiliparse or trafilatura.
    `reject` receives what was skipped; `tick(bytes)` hears of the bytes read from the disk, about once a megabyte, and may raise to
    end the reading. Raises UserError for paths that name nothing.
    """

    def read(file: SourceFile, reject: Reject, tick: Tick) -> Iterator[Document]:
        reader = FORMATS.get(kind_of(file.path), _text)
        found = reader(file.path, text_key, reject, tick, extract) if reader is web else reader(file.path, text_key, reject, tick)
        if not file.licence:
            return found
        return (document._replace(meta=metadata(document.meta, {"licence": file.licence})) for document in found)

    return _each_file(paths, read, reject, tick)


def texts(paths: Sequence[str], option: str, text_key: str = "text") -> Iterator[str]:
    """The texts of all usable documents behind the paths of an option; what cannot be used of them is said when all are read."""
    tally = Tally()
    yield from (document.text for document in documents(paths, text_key, tally))
    if tally.total:
        say(f"{option}: {tally.total:,} documents cannot be used: {tally}")


def rows(paths: Sequence[str] | Sequence[SourceFile], reject: Reject | None = None, tick: Tick | None = None) -> Iterator[Row]:
    """Every row behind `paths` as it is: JSON lines, arrays in `.json` files, Parquet. Otherwise as `documents`."""

    def read(file: SourceFile, reject: Reject, tick: Tick) -> Iterator[Row]:
        path = file.path
        if kind_of(path) in PARQUET:
            values = ((dict(zip(batch, row, strict=True)), at) for batch, row, at in _parquet_rows(path, None, reject, tick))
        elif kind_of(path) in JSON:
            values = _json_values(path, reject, tick)
        else:
            return reject(Rejected(path, None, f"rows are read from JSON lines, JSON and Parquet and not from .{kind_of(path)} files"))
        for value, line in values:
            yield Row(value, path, line)

    return _each_file(paths, read, reject, tick)


def _each_file(paths, read: Callable, reject: Reject | None, tick: Tick | None) -> Iterator:
    """What `read(file, reject, tick)` finds in each of the files, in sorted order."""
    reject, tick = reject or (lambda rejected: None), tick or (lambda size: None)
    try:
        for file in paths if paths and isinstance(paths[0], SourceFile) else find_files(paths):
            try:
                if file.bytes < 1024 and is_pointer(file.path):
                    reject(Rejected(file.path, 1, POINTER))
                    continue
                yield from read(file, reject, tick)
            except OSError as error:
                reject(Rejected(file.path, None, f"cannot be read: {error.strerror or error}"))
    finally:
        apart.end()


def _text(path: str, text_key: str, reject: Reject, tick: Tick) -> Iterator[Document]:
    return numbered(_text_parts(path, reject, tick, {"format": kind_of(path)}))


def _text_parts(path: str, reject: Reject, tick: Tick, meta: dict[str, str]) -> Iterator[Document]:
    line, rest, whole = 1, b"", True
    try:
        for block in blocks(path, tick):
            rest += block
            if len(rest) > WHOLE_BYTES:
                whole = False
                *full, rest = pieces(rest, PIECE_BYTES)
                for piece in full:
                    yield from decoded(piece, path, line, reject, meta)
                    line += piece.count(b"\n")
    except Damaged as damage:
        reject(Rejected(path, line + rest.count(b"\n"), str(damage)))
        rest, whole = rest[: rest.rfind(b"\n") + 1], False  # the last line may be cut anywhere
    if rest or whole:
        yield from decoded(rest, path, line, reject, meta)


def _xml(path: str, text_key: str, reject: Reject, tick: Tick) -> Iterator[Document]:
    return (wiki if is_dump(path) else _text)(path, text_key, reject, tick)


def _json(path: str, text_key: str, reject: Reject, tick: Tick) -> Iterator[Document]:
    for value, line in _json_values(path, reject, tick):
        yield from _field(value, path, line, text_key, reject)


def _json_values(path: str, reject: Reject, tick: Tick) -> Iterator[tuple[object, int]]:
    """(value, line) of JSON lines, or of the array that a `.json` file holds."""
    first, blank = kind_of(path) == "json", True  # JSON lines unless the first line says otherwise
    number = 0
    try:
        for number, line in lines(blocks(path, tick), LINE_BYTES):
            if line is not None and not line.strip():
                continue
            value, reason = (None, f"line longer than {LINE_BYTES >> 20} MiB") if line is None else _parsed(line.strip())
            if first and (isinstance(value, list) or (reason and not reason.startswith("not UTF-8"))):
                yield from _json_whole(path, reject, lambda size: tick(0))
                return
            first = blank = False
            if reason:
                reject(Rejected(path, number, reason))
            else:
                yield value, number
    except Damaged as damage:
        return reject(Rejected(path, number + 1, str(damage)))
    if blank:
        reject(Rejected(path, None, "empty"))


def _parsed(line: bytes) -> tuple[object, str]:
    """(value, "") of a JSON line, or (None, why there is none)."""
    try:
        value = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
        deep = line.count(b"{") + line.count(b"[") > DEPTH and too_deep(value)
        return (None, DEEP) if deep else (value, "")
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte 0x{line[error.start]:02x})"
    except RecursionError:
        return None, DEEP
    except ValueError as error:
        return None, f"not JSON ({str(error).split(':')[0].lower()})"


def _json_whole(path: str, reject: Reject, tick: Tick) -> Iterator[tuple[object, int]]:
    """One value over many lines: an object, or an array of objects."""
    raw = bytearray()
    try:
        for block in blocks(path, tick):
            raw += block
            if len(raw) > JSON_BYTES:
                return reject(Rejected(path, None, f"one JSON value larger than {JSON_BYTES >> 20} MiB: write it as one object a line"))
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return reject(Rejected(path, None, "not UTF-8"))
    except RecursionError:
        return reject(Rejected(path, None, DEEP))
    except ValueError as error:
        return reject(Rejected(path, getattr(error, "lineno", None), f"not JSON ({str(error).split(':')[0].lower()})"))
    except Damaged as damage:
        return reject(Rejected(path, None, str(damage)))
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        if too_deep(item):
            reject(Rejected(path, number, DEEP))
        else:
            yield item, number


def _field(value: object, path: str, line: int, text_key: str, reject: Reject) -> Iterator[Document]:
    if not isinstance(value, dict):
        return reject(Rejected(path, line, "not a JSON object"))
    if text_key not in value:
        return reject(Rejected(path, line, f"no key {text_key!r} (keys: {', '.join(map(str, list(value)[:8]))})"))
    meta = metadata({key: item for key, item in value.items() if key != text_key}, {"format": "json"})
    yield from documents_of(value[text_key], path, line, reject, meta, text_key)


def _parquet(path: str, text_key: str, reject: Reject, tick: Tick) -> Iterator[Document]:
    for names, (value, *beside), row in _parquet_rows(path, text_key, reject, tick):
        known = ((name, item) for name, item in zip(names[1:], beside, strict=True) if not isinstance(item, Exception | bytes))
        meta = metadata(dict(known), {"format": "parquet"})
        if isinstance(value, Exception):
            reject(Rejected(path, row, "not UTF-8"))
        elif isinstance(value, bytes):
            yield from decoded(value, path, row, reject, meta)
        else:
            yield from documents_of(value, path, row, reject, meta, text_key)


def _parquet_rows(path: str, only: str | None, reject: Reject, tick: Tick) -> Iterator[tuple[list[str], tuple, int]]:
    """(columns, values, row from 0) of the column `only` and of METADATA_COLUMNS, or of all (None).

    A value that Python cannot hold, such as a text that is not UTF-8, is the error that says so."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        name = os.fsencode(path)  # which may be no UTF-8: pyarrow would not take the text
        with pyarrow.memory_map(name) if os.path.getsize(path) else pyarrow.OSFile(name) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            names = file.schema_arrow.names
            if only is not None and only not in names:
                return reject(Rejected(path, None, f"no column {only!r} (columns: {', '.join(names[:8])})"))
            per_row = os.path.getsize(path) / max(1, file.metadata.num_rows)
            chosen = names if only is None else [only, *(name for name in METADATA_COLUMNS if name in names and name != only)]
            for batch in file.iter_batches(batch_size=_at_once(file.metadata), columns=chosen, use_threads=False):
                tick(int(batch.num_rows * per_row))
                for at in range(batch.num_rows):  # one by one: a few kilobytes may say that all rows have the same long text
                    yield batch.schema.names, tuple(_scalar(column[at]) for column in batch.columns), row
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's errors have a number
            raise
        reject(Rejected(path, row or None, f"damaged Parquet ({str(error).splitlines()[0][:120]})"))


def _at_once(metadata) -> int:
    """Rows to decode at once, of a Parquet file. All of them may have the one value of a dictionary that is as large as its column."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(place) for group in groups for place in range(group.num_columns)]
    largest = max((column.total_uncompressed_size for column in columns if column.has_dictionary_page), default=0)
    return max(1, min(ROWS_AT_ONCE, DECODED_BYTES // max(1, largest)))


def _scalar(item) -> object:
    """A value of Arrow's as Python has it; a time that Python has none for, of another era, zone or precision, as text; else the error."""
    import pyarrow

    try:
        return item.as_py()
    except Exception as error:  # those of Python's own times: it has many kinds, some of them of packages for time zones
        with contextlib.suppress(Exception):
            if pyarrow.types.is_temporal(item.type):
                return str(item.cast(pyarrow.string()).as_py())
        return error


Reader = Callable[[str, str, Reject, Tick], Iterator[Document]]
"""(path, text_key, reject, tick) -> the documents of a file."""
FORMATS: dict[str, Reader] = {
    **dict.fromkeys(JSON, _json),
    **dict.fromkeys(PARQUET, _parquet),
    **dict.fromkeys(("warc", "wet"), web),
    "xml": _xml,
    **dict.fromkeys(OFFICE, office),
}
"""How each kind of file (`files.kind_of`: the suffix below .gz, .bz2 and .zst) is read; any other is text."""

PACKAGES = {
    web: ("fastwarc", "resiliparse", "trafilatura"),
    _xml: ("mwparserfromhell",),
    office: ("markitdown",),
}
"""What the text of other formats depends on."""


def readers(files: Sequence[SourceFile], extract: str) -> tuple[str, ...]:
    """What the texts of these files depend on besides the files: versions of packages, or that they are missing. Nothing where all of them
    are read by our own code."""
    kinds = {FORMATS.get(kind_of(file.path)) for file in files} & PACKAGES.keys()
    packages = sorted({name for reader in kinds for name in PACKAGES[reader]})
    return (*(f"{name} {apart.version(name)}" for name in packages), *([extract] if web in kinds else []))
