"""Lines that many documents of a corpus have, such as menus and notices: counted exactly, in bounded memory, and taken out."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from sparing.curate.duplicates import RECORD_BYTES, claim
from sparing.curate.minhash import DuplicateSettings, texts_of
from sparing.curate.parts import Engine, Read, Stop, open_table, write_parts
from sparing.data.progress import check
from sparing.data.split import content_hash


def repeated_lines(read: Read, work: Path, settings: DuplicateSettings, workers: Engine | int = 1, should_stop: Stop = None) -> np.ndarray:
    """The hashes of the lines that at least `settings.lines` documents have, ascending, uint64; counted exactly (as CCNet counts
    paragraphs: Wenzek et al. 2020, section 3.1). Works, stops and goes on like `duplicates.find_duplicates`; may use the same folder."""
    if not settings.lines:
        return np.empty(0, np.uint64)
    work = Path(work)
    claim(work, settings)
    parts = len(write_parts(partial(_lines, settings=settings), "lines", read, work, workers, should_stop))
    total = 0
    for number in range(parts):
        with open_table(work / f"lines-{number:05d}.arrow") as table:
            total += table.num_rows
    ranges = max(1, -(-total * RECORD_BYTES // (settings.memory_mb << 20)))
    found = [np.empty(0, np.uint64)]
    for index in range(ranges):
        check(should_stop)
        low, high = (np.uint64((2**64 - 1) * at // ranges) for at in (index, index + 1))
        hashes, counts = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for number in range(parts):
            with open_table(work / f"lines-{number:05d}.arrow") as table:
                run = table.column("hash").to_numpy()
                begin, end = np.searchsorted(run, [low, high])
                hashes.append(run[begin:end].copy())
                counts.append(table.column("documents").to_numpy()[begin:end].copy())
        distinct, inverse = np.unique(np.concatenate(hashes), return_inverse=True)
        total_counts = np.bincount(inverse, weights=np.concatenate(counts), minlength=len(distinct))
        found.append(distinct[total_counts >= settings.lines])
    return np.concatenate(found)


def remove_lines(batch: pa.RecordBatch, repeated: np.ndarray, settings: DuplicateSettings) -> tuple[pa.RecordBatch, np.ndarray]:
    """`batch` with those lines left out of its texts, wherever they are, and how many lines each text lost, int64. A pure function; a text
    may become empty."""
    known, texts, lost = set(repeated.tolist()), [], []
    for text in texts_of(batch):
        lines = text.split("\n")
        stay = [line for line in lines if (hash := _line_hash(line, settings)) is None or hash not in known]
        texts.append(text if len(stay) == len(lines) else "\n".join(stay))
        lost.append(len(lines) - len(stay))
    at = batch.schema.get_field_index("text")
    column = pa.array(texts, batch.schema.field(at).type)
    return batch.set_column(at, batch.schema.field(at), column), np.array(lost, np.int64)


def _line_hash(line: str, settings: DuplicateSettings) -> int | None:
    """None: too short to count."""
    line = line.strip()
    return content_hash(line.encode()) if len(line) >= settings.line_chars else None


def _lines(part: pa.RecordBatch, settings: DuplicateSettings) -> pa.RecordBatch:
    """Of each line that is long enough its hash and how many documents of the part have it, in the order of the hashes."""
    found: list[int] = []
    for text in texts_of(part):
        found += {_line_hash(line, settings) for line in text.split("\n")} - {None}
    hashes, counts = np.unique(np.array(found, np.uint64), return_counts=True)
    return pa.RecordBatch.from_pydict({"hash": pa.array(hashes), "documents": pa.array(counts)})
