"""Finds documents that are in a corpus more than once, exactly or nearly, on one machine and in bounded memory.

1. Every part of the corpus (a fixed number of documents, whatever the batches) gets a file of signatures, sorted by each key; an
   engine maps the parts.
2. The files are merged key by key, a range of keys at a time. Exact copies are set aside; the other documents that agree in the key of a
   band are a bucket.
3. The documents of all buckets are read again, and their sets of n-grams stored.
4. Each pair that a bucket proposes is verified by the real Jaccard similarity of these sets, and clusters grow from the verified pairs.
   Of a cluster the longest document stays, then those of the others which are not similar enough to one that stays.

Nothing here depends on the order of the input: documents are compared and kept in the order of their lengths and contents. Every step
leaves files in a work folder that are written whole or not at all; the same call goes on from them.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from array import array
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparing.base.config import UserError
from sparing.base.files import atomic_path, write_atomic
from sparing.curate.minhash import DuplicateSettings, jaccard, ngram_sets, signatures, texts_of
from sparing.curate.parts import Engine, Read, Stop, digest_of, open_table, parts_of, write_parts
from sparing.data.progress import check

VERSION = 1
"""Of the files in a work folder, which another version of this program does not read."""
RECORD_BYTES = 64
"""Memory for one key while keys are sorted: it, its document, their order and copies of all that."""
REPRESENTATIVES = 16
"""A document is compared with so many others of its bucket, or of its cluster. Without a limit a bucket of n would cost n^2."""
CHANGED = "duplicates: the input changed while it was being read; start again when it is complete"
LAST = np.uint64(2**64 - 1)
"""The key of what has none."""


class Decision(NamedTuple):
    """Whether a document stays."""

    source: str
    line: int
    kind: str = ""
    """Empty: it stays. "exact": it is a copy of one that stays; "near": nearly."""
    of_source: str = ""
    of_line: int = 0
    jaccard: float = 1.0
    """Of the two sets of n-grams."""

    @property
    def kept(self) -> bool:
        return not self.kind

    @property
    def reason(self) -> str:
        """`duplicate_exact of a.jsonl:3`, `duplicate_near of a.jsonl:3 (J=0.83)`; empty for a document that stays."""
        near = f" (J={self.jaccard:.2f})" if self.kind == "near" else ""
        return f"duplicate_{self.kind} of {self.of_source}:{self.of_line}{near}" if self.kind else ""


def find_duplicates(
    read: Read, work: Path, settings: DuplicateSettings | None = None, workers: Engine | int = 1, should_stop: Stop = None
) -> Iterator[Decision]:
    """A decision about each document, in the order of the input. All work but the reading of the result is done in the call.

    `read()` gives the batches (columns `text`, `source`, `line`); it is called twice and must give the same documents each time. `work`
    is a folder for files of about 0.3 kB a document and 1.5 times the text of possible duplicates; whoever calls removes it afterwards.
    Memory: two bytes a document, some 100 a possible duplicate, `settings.memory_mb`, and a few parts of 8 MB a process. `workers`
    sign the parts: processes of this machine, or another `Engine`. Raises Stopped, and UserError where `work` holds something
    else or the input changes.
    """
    settings = settings or DuplicateSettings()
    work = Path(work)
    claim(work, settings)
    digests = write_parts(partial(_signed, settings=settings), "signatures", read, work, workers, should_stop)
    corpus = _Corpus(work, len(digests))
    done = work / hashlib.sha256("".join(digests).encode()).hexdigest()[:16]  # what follows is of this input
    done.mkdir(exist_ok=True)
    exact = _exact_copies(corpus, done, settings, should_stop)
    buckets = _bucket_files(corpus, exact, done, settings, should_stop)
    candidates = _Candidates(corpus, buckets, done)
    candidates.write_sets(read, digests, settings, should_stop)
    pairs = _verify(candidates, buckets, done, settings, should_stop)
    return _decisions(corpus, exact, _near(candidates, pairs, done, settings, should_stop))


# the work folder


def claim(work: Path, settings: DuplicateSettings) -> None:
    """Claim a work folder for these settings. Raises UserError where it has another use."""
    ours = {"duplicates": VERSION, "unicode": unicodedata.unidata_version, **asdict(settings)}
    ours.pop("memory_mb")  # changes how the work is cut, and no result
    work.mkdir(parents=True, exist_ok=True)
    path = work / "settings.json"
    if not path.exists():
        if any(not entry.name.startswith(".") for entry in work.iterdir()):  # but for what a kill left of writing it
            raise UserError(f"{work}: holds something else already; name an empty folder to work in")
        write_atomic(path, json.dumps(ours))
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        theirs = None
    if theirs != ours:
        raise UserError(f"{work}: was begun with other settings or by another version; delete it or name another folder to work in")


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as beside, open(beside, "wb") as file:
        np.save(file, array, allow_pickle=False)


# signatures


def _signed(part: pa.RecordBatch, settings: DuplicateSettings) -> pa.RecordBatch:
    """Where each document is, its length and its exact hash; and of each key a sorted run, and which row each key of the run is of."""
    table = signatures(part, settings)
    columns = {name: table.column(name) for name in ("source", "line", "bytes", "exact")}
    for name in ("exact", *(f"band_{band}" for band in range(settings.bands))):
        keys = pc.fill_null(table.column(name), int(LAST)).to_numpy()
        rows = np.argsort(keys, kind="stable")
        columns |= {f"sorted_{name}": pa.array(keys[rows]), f"rows_{name}": pa.array(rows.astype(np.uint32))}
    return pa.RecordBatch.from_pydict(columns)


class _Corpus:
    """The signatures of all parts. Documents are numbered through, from 0."""

    def __init__(self, work: Path, parts: int):
        self.work, self.parts = work, parts
        sizes = []
        for number in range(parts):
            with self.part(number) as table:
                sizes.append(table.num_rows)
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self.documents = int(self.starts[-1])

    def part(self, number: int):
        return open_table(self.work / f"signatures-{number:05d}.arrow")

    def places(self, documents: np.ndarray) -> list[tuple[str, int]]:
        """Source and line of each of some documents, which ascend."""
        found: list[tuple[str, int]] = []
        for number, low, high in self.ranges(documents):
            with self.part(number) as table:
                rows = pa.array(documents[low:high] - self.starts[number])
                found += zip(*(table.column(name).take(rows).to_pylist() for name in ("source", "line")), strict=True)
        return found

    def numbers(self, name: str, documents: np.ndarray) -> np.ndarray:
        """A column of numbers for some documents, which ascend."""
        found = []
        for number, low, high in self.ranges(documents):
            with self.part(number) as table:
                found.append(table.column(name).to_numpy()[documents[low:high] - self.starts[number]])
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def ranges(self, documents: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(part, low, high): documents[low:high] are in that part. `documents` ascend."""
        bounds = np.searchsorted(documents, self.starts)
        for number in range(self.parts):
            if bounds[number] < bounds[number + 1]:
                yield number, int(bounds[number]), int(bounds[number + 1])

    def groups(self, name: str, removed: np.ndarray | None, memory_mb: int, should_stop: Stop) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(keys, documents), sorted by both, of the documents that share their key with another, a range of keys at a time. Documents for
        which `removed` is true are passed over."""
        ranges = max(1, -(-self.documents * RECORD_BYTES // (memory_mb << 20)))
        for index in range(ranges):
            check(should_stop)
            low, high = (np.uint64((2**64 - 1) * at // ranges) for at in (index, index + 1))  # LAST is never among them
            keys, documents = [], []
            for number in range(self.parts):
                with self.part(number) as table:
                    run = table.column(f"sorted_{name}").to_numpy()
                    begin, end = np.searchsorted(run, [low, high])
                    rows = table.column(f"rows_{name}").to_numpy()[begin:end]
                    documents.append(rows + self.starts[number])
                    keys.append(run[begin:end].copy())
            key, document = np.concatenate(keys or [[]]).astype(np.uint64), np.concatenate(documents or [[]]).astype(np.int64)
            if removed is not None:
                stays = ~removed[document]
                key, document = key[stays], document[stays]
            order = np.argsort(key, kind="stable")  # documents ascend already
            key, document = key[order], document[order]
            same = key[1:] == key[:-1]
            shared = np.zeros(len(key), bool)
            shared[1:] |= same
            shared[:-1] |= same
            yield key[shared], document[shared]


# exact copies


def _exact_copies(corpus: _Corpus, done: Path, settings: DuplicateSettings, should_stop: Stop) -> np.ndarray:
    """(copies, 2) int64: a document and the one that it is a copy of, ascending. Of equal documents the first by source and line stays."""
    path = done / "exact.npy"
    if not path.exists():
        found = array("q")
        for keys, documents in corpus.groups("exact", None, settings.memory_mb, should_stop):
            order = np.argsort(documents)
            places: list = [None] * len(documents)
            for at, place in zip(order.tolist(), corpus.places(documents[order]), strict=True):
                places[at] = (*place, int(documents[at]))
            for low, high in _runs(keys):
                first = min(places[low:high])[-1]
                for other in documents[low:high].tolist():
                    if other != first:
                        found.extend((other, first))
        copies = np.array(found, np.int64).reshape(-1, 2)
        _save(path, copies[np.argsort(copies[:, 0])])
    return np.load(path)


def _runs(keys: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of equal keys."""
    bounds = np.flatnonzero(np.diff(keys, prepend=keys[:1] + np.uint64(1), append=keys[-1:] + np.uint64(1))).tolist()
    yield from pairwise(bounds)


# near duplicates


def _bucket_files(corpus: _Corpus, exact: np.ndarray, done: Path, settings: DuplicateSettings, should_stop: Stop) -> list[Path]:
    """One file a band: (2, documents) of the bands' keys and the documents that share them."""
    removed = np.zeros(corpus.documents, bool)
    removed[exact[:, 0]] = True
    paths = []
    for band in range(settings.bands):
        path = done / f"buckets-{band:03d}.npy"
        if not path.exists():
            found = [np.empty((2, 0), np.uint64)]
            for keys, documents in corpus.groups(f"band_{band}", removed, settings.memory_mb, should_stop):
                found.append(np.stack([keys, documents.astype(np.uint64)]))
            _save(path, np.concatenate(found, axis=1))
        paths.append(path)
    return paths


class _Candidates:
    """The documents that are in any bucket, numbered through in the order of the corpus, and their sets of n-grams on disk."""

    def __init__(self, corpus: _Corpus, buckets: list[Path], done: Path):
        self.corpus, self.done = corpus, done
        chosen = np.zeros(corpus.documents, bool)
        for path in buckets:
            chosen[np.load(path, mmap_mode="r")[1].astype(np.int64)] = True
        self.documents = np.flatnonzero(chosen)

    def write_sets(self, read: Read, digests: list[str], settings: DuplicateSettings, should_stop: Stop) -> None:
        """Read the corpus again and store the candidates' sets: of each part the sizes, then the hashes, uint64."""
        ranges = {number: (low, high) for number, low, high in self.corpus.ranges(self.documents)}
        if not all(self._sets(number).exists() for number in ranges):
            number = -1
            for number, part in enumerate(parts_of(read, should_stop)):
                if number >= len(digests) or digest_of(part) != digests[number]:
                    raise UserError(CHANGED)
                if number in ranges and not self._sets(number).exists():
                    low, high = ranges[number]
                    rows = pa.array(self.documents[low:high] - self.corpus.starts[number])
                    self._write_sets(self._sets(number), texts_of(part.take(rows)), settings)
            if number + 1 < len(digests):
                raise UserError(CHANGED)
        sizes = [np.fromfile(self._sets(number), np.uint64, high - low) for number, (low, high) in ranges.items()]
        self.sizes = np.concatenate(sizes or [[]]).astype(np.int64)
        """N-grams of each candidate."""
        self._offsets = np.concatenate([len(part) + np.cumsum(part) - part for part in sizes] or [[]]).astype(np.int64)
        self._paths = [str(self._sets(number)) for number in ranges]
        self._parts = np.repeat(np.arange(len(ranges)), [high - low for low, high in ranges.values()])

    @staticmethod
    def _write_sets(path: Path, texts: list[str], settings: DuplicateSettings) -> None:
        sizes = np.zeros(len(texts), np.uint64)
        with atomic_path(path) as beside, open(beside, "wb") as file:
            sizes.tofile(file)
            for index, grams in enumerate(ngram_sets(texts, settings)):
                sizes[index] = len(grams)
                grams.tofile(file)
            file.seek(0)
            sizes.tofile(file)

    def _sets(self, number: int) -> Path:
        return self.done / f"sets-{number:05d}.bin"

    def set(self, candidate: int) -> np.ndarray:
        path = self._paths[self._parts[candidate]]
        return np.fromfile(path, np.uint64, int(self.sizes[candidate]), offset=8 * int(self._offsets[candidate]))

    @cached_property
    def ranks(self) -> np.ndarray:
        """Place of each candidate in the order in which documents are kept: the longest first, then by content. int64."""
        order = np.lexsort((self.corpus.numbers("exact", self.documents), -self.corpus.numbers("bytes", self.documents)))
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.arange(len(order))
        return ranks

    def similarity(self, one: int, other: int, grams: np.ndarray, least: float) -> float:
        """Of two candidates, `grams` being the set of the first; 0 where their sizes alone say that it is below `least`."""
        small, large = sorted((int(self.sizes[one]), int(self.sizes[other])))
        return jaccard(grams, self.set(other)) if small >= least * large else 0.0


class _Clusters:
    """Sets of candidates that grow together (union-find, Tarjan 1975)."""

    def __init__(self, size: int):
        self.parents = np.arange(size, dtype=np.int64)

    def find(self, one: int) -> int:
        parents = self.parents
        while (parent := int(parents[one])) != one:
            parents[one] = parents[parent]
            one = parent
        return one

    def join(self, one: int, other: int) -> None:
        self.parents[self.find(one)] = self.find(other)


def _verify(candidates: _Candidates, buckets: list[Path], done: Path, settings: DuplicateSettings, should_stop: Stop) -> np.ndarray:
    """Pairs of candidates that are similar enough, (pairs, 2) int64: no more than it takes to connect each cluster.

    In a bucket each document, in the order of `ranks`, is compared with the representatives before it until one is similar enough; if
    none is, it becomes one, up to REPRESENTATIVES.
    """
    clusters = _Clusters(len(candidates.documents))
    pairs = [np.empty((0, 2), np.int64)]
    for path in buckets:
        stored = path.with_name(path.name.replace("buckets", "pairs"))
        if not stored.exists():
            keys, documents = np.load(path)
            members = np.searchsorted(candidates.documents, documents.astype(np.int64))
            found = array("q")
            for count, (low, high) in enumerate(_runs(keys)):
                if count % 256 == 0:
                    check(should_stop)
                bucket = members[low:high]
                found.extend(_joined(bucket[np.argsort(candidates.ranks[bucket])].tolist(), candidates, clusters, settings, should_stop))
            _save(stored, np.array(found, np.int64).reshape(-1, 2))
            pairs.append(np.load(stored))
        else:
            pairs.append(np.load(stored))
            for one, other in pairs[-1].tolist():
                clusters.join(one, other)
    return np.concatenate(pairs)


def _joined(bucket: list[int], candidates: _Candidates, clusters: _Clusters, settings: DuplicateSettings, should_stop: Stop) -> array:
    """The pairs that join documents of a bucket to its representatives, one after the other; `clusters` grow by them."""
    found = array("q")
    representatives: dict[int, np.ndarray | None] = {}  # sets are read when they are needed
    for count, one in enumerate(bucket, 1):
        if count % 64 == 0:
            check(should_stop)
        root = clusters.find(one)
        if any(clusters.find(other) == root for other in representatives):
            continue
        for other, grams in representatives.items():
            if grams is None:
                grams = representatives[other] = candidates.set(other)
            if candidates.similarity(other, one, grams, settings.jaccard) >= settings.jaccard:
                clusters.join(one, other)
                found.extend((one, other))
                break
        else:
            if len(representatives) < REPRESENTATIVES:
                representatives[one] = None
    return found


def _near(candidates: _Candidates, pairs: np.ndarray, done: Path, settings: DuplicateSettings, should_stop: Stop) -> np.ndarray:
    """A document, the one that stays for it, their similarity: (documents, 3) float64, ascending by the first.

    A chain of pairs can connect documents that have little in common. So the first of a cluster stays, those similar to it go, and the
    first of the others stays, and so on, up to REPRESENTATIVES; of what is left those go that are in a pair with one that stays.
    """
    path = done / "near.npy"
    if path.exists():
        return np.load(path)
    clusters = _Clusters(len(candidates.documents))
    for one, other in pairs.tolist():
        clusters.join(one, other)
    members = np.unique(pairs)
    roots = np.array([clusters.find(one) for one in members.tolist()], np.uint64)
    order = np.lexsort((candidates.ranks[members], roots))
    members, roots = members[order], roots[order]
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]  # the second of each ranks before the first
    removed = np.zeros(len(candidates.documents), bool)
    found = array("d")  # a double holds the number of any document

    def remove_similar(first: int, others: list[int]) -> None:
        grams = candidates.set(first)
        for other in others:
            if (similarity := candidates.similarity(first, other, grams, settings.jaccard)) >= settings.jaccard:
                removed[other] = True
                found.extend((candidates.documents[other], candidates.documents[first], similarity))

    for low, high in _runs(roots):
        rest = members[low:high].tolist()
        for _ in range(REPRESENTATIVES):
            check(should_stop)
            if len(rest) < 2:
                break
            remove_similar(rest[0], rest[1:])
            rest = [one for one in rest[1:] if not removed[one]]
        for one in rest:
            begin, end = np.searchsorted(pairs[:, 0], [one, one + 1])
            for first in pairs[begin:end, 1].tolist():
                if not removed[first]:
                    remove_similar(first, [one])
                    break
    near = np.array(found).reshape(-1, 3)
    _save(path, near[np.argsort(near[:, 0])])
    return np.load(path)


def _decisions(corpus: _Corpus, exact: np.ndarray, near: np.ndarray) -> Iterator[Decision]:
    """A copy of a document that does not stay itself goes with it."""
    instead = exact[:, 1].copy()
    at = np.searchsorted(near[:, 0], instead)
    also = (at < len(near)) & (np.append(near[:, 0], -1)[at] == instead)
    instead[also] = near[at[also], 1].astype(np.int64)
    similarity = np.where(also, np.append(near[:, 2], 0.0)[at], np.nan)  # not a number: exact
    documents = np.concatenate([exact[:, 0], near[:, 0].astype(np.int64)])
    order = np.argsort(documents)
    documents, instead = documents[order], np.concatenate([instead, near[:, 1].astype(np.int64)])[order]
    similarity = np.concatenate([similarity, near[:, 2]])[order]
    ranges = {number: (low, high) for number, low, high in corpus.ranges(documents)}
    for number in range(corpus.parts):
        low, high = ranges.get(number, (0, 0))
        kept = np.unique(instead[low:high])
        places = dict(zip(kept.tolist(), corpus.places(kept), strict=True))
        removed = {
            document: ("exact", *places[of], 1.0) if np.isnan(value) else ("near", *places[of], value)
            for document, of, value in zip(*(part[low:high].tolist() for part in (documents, instead, similarity)), strict=True)
        }
        with corpus.part(number) as table:
            sources, lines = table.column("source").to_pylist(), table.column("line").to_pylist()
        for document, (source, line) in enumerate(zip(sources, lines, strict=True), int(corpus.starts[number])):
            yield Decision(source, line, *removed.get(document, ()))
