"""Stages as steps of a datatrove pipeline: a `functools.partial` of one of these stands between any of its readers and writers.

A step takes datatrove's documents and gives them on. Text is handled in Arrow batches, as everywhere here; the order of documents stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from sparing.curate.minhash import DuplicateSettings, minima_of
from sparing.curate.pipeline import BATCH_BYTES, BATCH_DOCUMENTS, SCHEMA


def mapped(
    documents: Iterable, rank: int = 0, world_size: int = 1, *, stage: Callable[[pa.RecordBatch], pa.RecordBatch], drop: bool = True
) -> Iterator:
    """Documents as a stage makes them, one that keeps the rows of its batch: `partial(judge, rules=rules)`.

    The stage gets the columns text, source (the document's id), line (its place in the batch) and meta (JSON text). `text` is replaced, and
    the columns that the stage adds go into the metadata by their names. A document for which `rejected` says why goes no further, unless
    `drop` is False.
    """
    for some in _batches(documents):
        for one, row in zip(some, stage(_arrow(some)).to_pylist(), strict=True):
            one.text = row["text"]
            one.metadata |= {name: value for name, value in row.items() if name not in SCHEMA.names}
            if not (drop and row.get("rejected")):
                yield one


def signed(documents: Iterable, rank: int = 0, world_size: int = 1, *, folder: str, settings: DuplicateSettings | None = None) -> Iterator:
    """The documents as they are, while their MinHash signatures are written to `folder` for datatrove's `MinhashDedupBuckets`: this stands
    in place of its `MinhashDedupSignature`, which is of another family of hash functions, so all tasks take the same of the two.

    `folder` is any that datatrove takes. A document without n-grams has no signature, as there. The settings' bands and rows are the
    `num_buckets` and `hashes_per_bucket` of datatrove's `MinhashConfig`, whose hashes have 64 bits (its default; ours fill 32 of them).
    Memory: 450 bytes a document of the task with the default settings.
    """
    from datatrove.io import get_datafolder

    settings = settings or DuplicateSettings()
    least, numbers, before = [np.empty((settings.bands * settings.rows, 0), np.uint32)], [np.empty(0, np.int64)], 0
    for some in _batches(documents):
        found, counts = minima_of([one.text for one in some], settings)
        least.append(found)
        numbers.append(before + np.flatnonzero(counts))
        before += len(some)
        yield from some
    values = np.concatenate(least, axis=1).reshape(settings.bands, settings.rows, -1)
    records = np.empty(values.shape[2], [(f"minimum_{row}", "<u8") for row in range(settings.rows)] + [("document", "<u4")])
    records["document"] = np.concatenate(numbers)
    for band in range(settings.bands):
        for row in range(settings.rows):
            records[f"minimum_{row}"] = values[band, row]
        with get_datafolder(folder).open(f"bucket_{band:03d}/{rank:05d}.minhash.sig", mode="wb") as file:
            file.write(np.sort(records, order=records.dtype.names).tobytes())


def _batches(documents: Iterable) -> Iterator[list[Any]]:
    some, size = [], 0
    for one in documents:
        some.append(one)
        size += len(one.text)
        if len(some) >= BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def _arrow(documents: list[Any]) -> pa.RecordBatch:
    columns = {
        "text": [one.text for one in documents],
        "source": [str(one.id) for one in documents],
        "line": list(range(len(documents))),
        "meta": [json.dumps(one.metadata, default=str) for one in documents],
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)
