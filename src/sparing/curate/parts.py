"""Cuts a stream of Arrow batches into parts and lets an engine make a file of each. What is there already, of the same input, stays.

A part is a fixed number of documents, whatever the batches were, so that files do not depend on how the input was cut.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparing.base.config import UserError
from sparing.base.files import atomic_path
from sparing.data.progress import check, result_of

PART_DOCUMENTS, PART_BYTES = 16_384, 8 << 20
"""A part ends with the document that brings it to either."""
SCHEMA = pa.schema([("text", pa.large_string()), ("source", pa.large_string()), ("line", pa.int64())])

Read = Callable[[], Iterator[pa.RecordBatch]]
"""Gives the batches of a corpus, the same documents in the same order each time."""
Stop = Callable[[], bool] | None
Stage = Callable[[pa.RecordBatch], pa.RecordBatch]
"""A pure function of a part: the same part always gives the same rows, as many as it likes. It can be pickled."""
Job = tuple[pa.RecordBatch, Path, str]
"""A part, the file to make of it, and the part's digest."""


class Engine(Protocol):
    """Where stages run."""

    def run(self, stage: Stage, jobs: Iterator[Job], should_stop: Stop) -> None:
        """Make the file of each job: `write_table(path, stage(part), digest)`. Raises Stopped."""


def write_parts(stage: Stage, name: str, read: Read, work: Path, workers: Engine | int = 1, should_stop: Stop = None) -> list[str]:
    """Make work/NAME-00000.arrow and so on of what `stage` gives for the parts of `read()`.

    workers: how many processes of this machine, or another `Engine`. -> the digest of each part. A file that is there, of the same part,
    stays. Raises Stopped."""
    digests: list[str] = []

    def jobs() -> Iterator[Job]:
        for part in parts_of(read, should_stop):
            path, digest = part_file(work, name, len(digests)), digest_of(part)
            digests.append(digest)
            if _digest_in(path) != digest:
                yield part, path, digest

    (Processes(workers) if isinstance(workers, int) else workers).run(stage, jobs(), should_stop)
    for path in work.glob(f"{name}-*.arrow"):
        if int(path.stem.rsplit("-", 1)[1]) >= len(digests):  # of an input that was longer
            path.unlink()
    return digests


class Processes:
    """Processes of this machine. They import the main module anew, as all of `multiprocessing` do; a single part is done in this process,
    before another one would have started."""

    def __init__(self, count: int):
        self.count = count

    def run(self, stage: Stage, jobs: Iterator[Job], should_stop: Stop) -> None:
        first = list(islice(jobs, 2))
        if self.count <= 1 or len(first) < 2:
            for job in chain(first, jobs):
                _write(stage, *job)
            return
        pending: deque = deque()
        pool = ProcessPoolExecutor(self.count, get_context("spawn"), _begin_worker)
        try:
            for job in chain(first, jobs):
                pending.append(pool.submit(_write, stage, *job))
                if len(pending) >= 2 * self.count:
                    result_of(pending.popleft(), should_stop)
            while pending:
                result_of(pending.popleft(), should_stop)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write(stage: Stage, part: pa.RecordBatch, path: Path, digest: str) -> None:
    write_table(path, stage(part), digest)


def part_file(work: Path, name: str, number: int) -> Path:
    return work / f"{name}-{number:05d}.arrow"


def write_table(path: Path, batch: pa.RecordBatch, digest: str) -> None:
    """A file of these rows, whole or not at all. digest: of the part that they are made of."""
    batch = batch.replace_schema_metadata({"input": digest})
    with atomic_path(path) as beside, pa.OSFile(str(beside), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


@contextmanager
def open_table(path: Path) -> Iterator[pa.RecordBatch]:
    """A file of `write_table`, mapped into memory, not read."""
    with pa.memory_map(os.fsencode(path)) as file, pa.ipc.open_file(file) as reader:
        yield reader.get_batch(0)


def _digest_in(path: Path) -> str | None:
    """Which input a file was made of; None: there is no whole file."""
    try:
        with open_table(path) as batch:
            return batch.schema.metadata[b"input"].decode()
    except (OSError, pa.ArrowException):
        return None


def parts_of(read: Read, should_stop: Stop) -> Iterator[pa.RecordBatch]:
    """The documents of all batches, cut where PART_DOCUMENTS and PART_BYTES say and nowhere else."""
    pending: list[pa.RecordBatch] = []
    documents = size = 0
    for batch in read():
        check(should_stop)
        batch = _columns(batch)
        sizes = np.cumsum(pc.fill_null(pc.binary_length(batch.column("text")), 0).to_numpy(zero_copy_only=False))
        start = 0
        while start < len(sizes):
            before = int(sizes[start - 1]) if start else 0
            end = 1 + int(np.searchsorted(sizes, PART_BYTES - size + before))
            full = end <= len(sizes)
            if start + PART_DOCUMENTS - documents <= min(end, len(sizes)):
                end, full = start + PART_DOCUMENTS - documents, True
            end = min(end, len(sizes))
            pending.append(batch.slice(start, end - start))
            documents, size = documents + end - start, size + int(sizes[end - 1]) - before
            start = end
            if full:
                yield pa.concat_batches(pending)
                pending, documents, size = [], 0, 0
    if pending:
        yield pa.concat_batches(pending)


def _columns(batch: pa.RecordBatch) -> pa.RecordBatch:
    """With its text and where it was found first, in the types that hold any size; other columns behind them."""
    missing = [name for name in SCHEMA.names if name not in batch.schema.names]
    if missing:
        raise UserError(f"a batch of documents has no column {missing[0]!r} (columns: {', '.join(batch.schema.names)})")
    columns = {field.name: pc.cast(batch.column(field.name), field.type) for field in SCHEMA}
    columns |= {name: batch.column(name) for name in batch.schema.names if name not in columns}
    return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))


def digest_of(part: pa.RecordBatch) -> str:
    """Of all columns."""
    hash = hashlib.blake2b(digest_size=16)
    for name, column in zip(part.schema.names, part.columns, strict=True):
        hash.update(name.encode())
        if pa.types.is_integer(column.type):
            hash.update(pc.fill_null(column, -1).to_numpy(zero_copy_only=False).tobytes())
        else:
            hash.update(pc.fill_null(pc.binary_length(column), -1).to_numpy(zero_copy_only=False).tobytes())
            hash.update("".join(pc.fill_null(column, "").to_pylist()).encode())
    return hash.hexdigest()


def _begin_worker() -> None:
    """An interrupt at the keyboard is for the parent, and a worker whose parent is gone would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
