"""The content of files in blocks of bounded size: compressed ones too, and damaged ones up to the damage."""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable, Iterator

import zstandard

BLOCK = 1 << 20
"""Bytes of text at a time."""
ZSTD_READ = 4096
"""Compressed bytes at a time: zstandard's decompressor cannot bound its output, and one byte can become tens of kilobytes."""
COMPRESSED = (".gz", ".zst", ".bz2")


class Damaged(Exception):
    """The rest of the file cannot be read; the message is the reason."""


def blocks(path: str, tick: Callable[[int], None]) -> Iterator[bytes]:
    """The content of a file in blocks of about a megabyte; `.gz`, `.bz2` and `.zst` decompressed. Raises Damaged, after all that is good in
    a damaged archive, and OSError."""
    with open(path, "rb") as file:

        def read(size: int) -> bytes:
            data = file.read(size)
            tick(len(data))
            return data

        suffix = path.lower().rsplit(".", 1)[-1]
        if suffix == "gz":
            yield from _decompress(lambda: read(BLOCK // 4), lambda: zlib.decompressobj(wbits=31), "gzip")
        elif suffix == "bz2":
            yield from _decompress(lambda: read(BLOCK // 4), bz2.BZ2Decompressor, "bzip2")
        elif suffix == "zst":
            window = zstandard.ZstdDecompressor(max_window_size=1 << 27)
            yield from _decompress(lambda: read(ZSTD_READ), window.decompressobj, "zstd")
        else:
            while block := read(BLOCK):
                yield block


def _decompress(read: Callable[[], bytes], start: Callable, name: str) -> Iterator[bytes]:
    """Any number of concatenated members; zero padding after the last is allowed."""
    member = None  # a decompressor between members is None: the file may end here
    first = True
    while data := read():
        more = False  # of what the decompressor holds back
        while data or more:
            if member is None:
                if not first and not data.strip(b"\0"):
                    break
                member, first = start(), False
            try:
                out = member.decompress(data) if name == "zstd" else member.decompress(data, BLOCK)
            except (zlib.error, zstandard.ZstdError, OSError) as error:
                raise Damaged(f"damaged {name} data ({error})") from None
            if out:
                yield out
            if member.eof:
                data, member, more = member.unused_data, None, False
            elif name == "bzip2":
                data, more = b"", not member.needs_input
            else:
                data = getattr(member, "unconsumed_tail", b"")
    while member is not None and name == "gzip" and not member.eof and (out := member.flush(BLOCK)):
        yield out
    if member is not None and not member.eof:
        raise Damaged(f"truncated {name} file: it ends in the middle of its data")
    if first:
        raise Damaged(f"truncated {name} file: it is empty")


def lines(stream: Iterator[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
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
