"""A corpus through its stages: documents are read, judged by rules and compared with each other; each one's fate is written down.

    OUT/documents/   what stays, JSON lines as Dolma has them: id, text, source, line, metadata
    OUT/attributes/  id, and the scores of every document that was judged, whether or not it stays
    OUT/rejected/    as in documents/, and `rejected`: the rule that did it
    OUT/quarantine.jsonl, card.html, ledger.sqlite; curated.json, written last: the summary

A stage is a pure function of Arrow batches (`rules.judge`, `minhash.signatures`), so an engine maps it (`parts.Engine`). What a stage has
done lies in OUT/.work until the end: the same command goes on from there. Memory does not grow with the corpus, but for two bytes a
document.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import zstandard

from sparing.account.meter import NoMeter
from sparing.base.config import UserError
from sparing.base.files import atomic_path, output_folder, write_atomic
from sparing.curate.duplicates import find_duplicates
from sparing.curate.lines import remove_lines, repeated_lines
from sparing.curate.minhash import DuplicateSettings
from sparing.curate.parts import Engine, Stop, open_table, part_file, write_parts
from sparing.curate.recipe import Recipe
from sparing.curate.rules import Rules, judge
from sparing.data.accounts import balanced
from sparing.data.files import CURATED, find_files
from sparing.data.progress import Bars, check
from sparing.data.sources import Document, Tally, documents
from sparing.data.split import content_hash
from sparing.data.web import EXTRACTORS

BATCH_DOCUMENTS, BATCH_BYTES = 1024, 4 << 20
"""A batch ends with the document that brings it to either."""
FILE_BYTES = 64 << 20
"""Text of an output file."""
SAMPLES, SAMPLE_CHARS = 3, 400
"""Of each reason, for the card: those with the smallest hashes."""
WORK, QUARANTINE = ".work", "quarantine.jsonl"
FOLDERS = ("documents", "attributes", "rejected")
EMPTIED = "repeated_lines: nothing else"
"""Why a document goes that had no other lines."""
SCHEMA = pa.schema([("text", pa.large_string()), ("source", pa.large_string()), ("line", pa.int64()), ("meta", pa.large_string())])


def batches(found: Iterable[Document]) -> Iterator[pa.RecordBatch]:
    """Documents as Arrow batches: text, source, line and meta (a JSON object as text)."""
    rows: list[tuple[str, str, int, str]] = []
    size = 0
    for document in found:
        rows.append((document.text, shown(document.source), document.line, json.dumps(dict(document.meta), ensure_ascii=False)))
        size += len(document.text)
        if len(rows) >= BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield _batch(rows)
            rows, size = [], 0
    if rows:
        yield _batch(rows)


def shown(path: str) -> str:
    """A path as Arrow and JSON take it: names of files may be no Unicode text."""
    return path.encode("utf-8", "backslashreplace").decode()


def _batch(rows: list[tuple[str, str, int, str]]) -> pa.RecordBatch:
    columns = [pa.array(list(column), kind) for column, kind in zip(zip(*rows, strict=True), SCHEMA.types, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


@dataclass
class Fate:
    """What became of the documents, for the summary and the card."""

    documents: Counter[str] = field(default_factory=Counter)
    """out, edited; and by reason without its details."""
    bytes: Counter[str] = field(default_factory=Counter)
    """The same, of UTF-8 text as it was read (`out`: as it is written)."""
    lengths: dict[str, Counter[int]] = field(default_factory=lambda: {"out": Counter(), "rejected": Counter()})
    """Documents by the power of two below their characters."""
    languages: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)
    """By reason: (hash, where, the beginning)."""

    read: int = 0
    """Bytes of all, as they were read."""
    edited: int = 0

    def add(self, row: Row) -> None:
        name, stays = _short(row.reason) or "out", not row.reason
        self.read += row.bytes
        self.edited += row.edited and stays
        self.documents[name] += 1
        self.bytes[name] += len(row.text.encode()) if stays else row.bytes
        self.lengths["out" if stays else "rejected"][max(1, len(row.text)).bit_length() - 1] += 1
        if stays:
            self.languages[str(row.meta.get("language") or _likeliest(row.attributes.get("language")) or "not known")] += 1
            self.licences[str(row.meta.get("licence") or "not known")] += 1
            return
        first = self.samples.setdefault(name, [])
        first.append((content_hash(row.text.encode()), f"{row.source}:{row.line}: {row.reason}", row.text[:SAMPLE_CHARS]))
        first.sort()
        del first[SAMPLES:]

    @property
    def rejected(self) -> Counter[str]:
        """Documents by what rejected them."""
        return Counter({name: count for name, count in self.documents.items() if name != "out"})


def _short(reason: str) -> str:
    """A reason without what differs from document to document."""
    return reason.partition(" of ")[0] if reason.startswith("duplicate_") else reason


def _likeliest(scores: dict[str, float] | None) -> str:
    return max(scores, key=scores.__getitem__) if scores else ""


def curate(
    paths: Sequence[str],
    out: str | Path,
    recipe: Recipe,
    text_key: str = "text",
    workers: Engine | int = 1,
    meter: NoMeter | None = None,
    should_stop: Stop = None,
    keep_texts: bool = True,
    extract: str = EXTRACTORS[0],
) -> tuple[dict, Fate]:
    """Judge the documents behind `paths`, take duplicates out, and write the folder `out` (see above).

    workers: what judges and signs the documents, processes of this machine or another `Engine`. keep_texts: False writes no texts
    (`data stats`). extract: what takes the text out of web pages. -> (the summary: `documents` in, out, rejected and quarantined, `bytes`
    in and out, what rejected how many, languages, licences; more of it for the card). Raises UserError; Stopped, then the same call goes
    on.
    """
    folder, meter = vacant(out), meter or NoMeter()
    work, digest, reader = folder / WORK, recipe.digest, partial(documents, extract=extract)
    with meter.stage("judge"):
        judged, tally, came_in = judge_parts(paths, text_key, work, recipe.rules, digest, workers, should_stop, reader)
    settings, decisions = recipe.duplicates, None
    repeated, read = None, partial(_kept, judged)
    if settings is not None:
        with meter.stage("duplicates"):
            if settings.lines:
                repeated = repeated_lines(read, work / f"duplicates-{digest}", settings, workers, should_stop)
                read = partial(_kept, judged, partial(remove_lines, repeated=repeated, settings=settings))
            decisions = find_duplicates(read, work / f"duplicates-{digest}", settings, workers, should_stop)
    with meter.stage("write"):
        fate = write_rows(folder, rows(judged, repeated, settings, decisions), should_stop, keep_texts)
    return summary_of(fate, tally, came_in), fate


def judge_parts(
    paths: Sequence[str],
    text_key: str,
    work: Path,
    rules: Rules | None,
    digest: str,
    workers: Engine | int = 1,
    should_stop: Stop = None,
    reader: Callable[..., Iterator[Document]] = documents,
) -> tuple[list[Path], Tally, int]:
    """Read the documents behind `paths` into files of `work`, each document judged by `rules` (None: by none).

    digest: of all settings; under other rules it is other work. reader: gives the documents, called as `data.sources.documents`. -> (the
    files, in the order of the input; what could not be read, which is also listed in `work`; how many documents could be). Raises
    UserError, Stopped.
    """
    work.mkdir(parents=True, exist_ok=True)
    with Bars() as bars, open(work / QUARANTINE, "w", encoding="utf-8") as quarantine:
        tally = Tally(quarantine)
        files = find_files(paths)
        total, done, came_in = max(1, sum(file.bytes for file in files)), 0, 0

        def tick(size: int) -> None:
            nonlocal done
            check(should_stop)
            done += size
            bars("scan", done, total)

        def read() -> Iterator[pa.RecordBatch]:
            nonlocal came_in
            for batch in batches(reader(files, text_key, tally, tick)):
                came_in += batch.num_rows
                yield batch

        name = f"judged-{digest}"
        digests = write_parts(partial(_judged, rules=rules), name, read, work, workers, should_stop)
    return [part_file(work, name, number) for number in range(len(digests))], tally, came_in


def write_rows(
    folder: Path, found: Iterable[Row], should_stop: Stop = None, keep_texts: bool = True, line_of: Callable[[Row], dict] | None = None
) -> Fate:
    """Write every document where it belongs in `folder`, and the list of what could not be read. line_of: a document as a line of a file;
    default: as Dolma has it. Raises Stopped."""
    fate = Fate()
    with ExitStack() as around:
        lines = {name: around.enter_context(_Lines(folder / name)) if keep_texts else None for name in FOLDERS}
        for row in found:
            check(should_stop)
            fate.add(row)
            if keep_texts:
                _write_row(row, lines, line_of or _line_of)
    (folder / WORK / QUARANTINE).replace(folder / QUARANTINE)
    return fate


def summary_of(fate: Fate, tally: Tally, came_in: int) -> dict:
    """What `curate` says of a corpus."""
    counts = {"in": came_in + tally.total, "out": fate.documents["out"], "rejected": fate.rejected.total(), "quarantined": tally.total}
    balanced(counts)
    return {
        "documents": counts, "bytes": {"in": fate.read, "out": fate.bytes["out"]}, "edited": fate.edited,
        "rejected": dict(fate.rejected.most_common()), "quarantined": dict(tally.reasons.most_common()),
        "languages": dict(fate.languages.most_common()), "licences": dict(fate.licences.most_common()),
    }  # fmt: skip


def vacant(out: str | Path) -> Path:
    """Where a corpus can be written: a new folder, or one in which the same command was interrupted. Raises UserError."""
    folder = output_folder(out, "--out")
    if (folder / CURATED).exists():
        raise UserError(f"{out} holds a curated corpus already: choose a new folder for --out")
    names = {entry.name for entry in folder.glob("[!.]*") if not entry.name.startswith("ledger.")}
    if others := names - {QUARANTINE, *FOLDERS}:
        raise UserError(f"{out} is not empty (it has {min(others)}): choose a new folder for --out")
    return folder


def finish(out: str | Path, summary: dict) -> None:
    """Mark the folder as a whole corpus, and take away what is no longer needed."""
    write_atomic(Path(out) / CURATED, json.dumps(summary, indent=1))
    shutil.rmtree(Path(out) / WORK, ignore_errors=True)


# stages


def _judged(part: pa.RecordBatch, rules: Rules | None) -> pa.RecordBatch:
    """One part, judged, with the bytes of the text as it was read, and whether a rule has changed it."""
    if rules is None:
        none = pa.nulls(part.num_rows, pa.string())
        columns = dict(zip(part.schema.names, part.columns, strict=True)) | {"attributes": none, "rejected": none}
    else:
        found = judge(part, rules)
        columns = dict(zip(found.schema.names, found.columns, strict=True))
    columns["bytes"] = pc.cast(pc.binary_length(part.column("text")), pa.int64())
    columns["edited"] = pc.not_equal(pc.cast(columns["text"], pa.large_string()), part.column("text"))
    return pa.RecordBatch.from_pydict(columns)


def _kept(judged: list[Path], edit: Callable[[pa.RecordBatch], tuple[pa.RecordBatch, Any]] | None = None) -> Iterator[pa.RecordBatch]:
    """What no rule has rejected, with less text where `edit` takes some away."""
    for path in judged:
        with open_table(path) as batch:
            kept = batch.filter(pc.is_null(batch.column("rejected"))).select(["text", "source", "line"])
            yield kept if edit is None else edit(kept)[0]


@dataclass
class Row:
    """A document at the end."""

    text: str
    source: str
    line: int
    meta: dict
    attributes: dict
    bytes: int
    """Of its text as it was read."""
    edited: bool
    reason: str
    """Why it goes; empty: it stays."""

    @property
    def id(self) -> str:
        return str(self.meta.get("id") or f"{self.source}:{self.line}")


def rows(
    judged: list[Path], repeated: Any = None, settings: DuplicateSettings | None = None, decisions: Iterator | None = None
) -> Iterator[Row]:
    """Every document, in the order of the input. decisions: about those that no rule rejects; None: all of them stay."""
    for path in judged:
        with open_table(path) as batch:
            found = batch.to_pylist()
            kept = batch.filter(pc.is_null(batch.column("rejected")))
        texts = kept.column("text").to_pylist()
        if repeated is not None:
            texts = remove_lines(kept, repeated, settings)[0].column("text").to_pylist()
        left = iter(texts)
        for row in found:
            reason, text, edited = row["rejected"] or "", row["text"], row["edited"]
            if not reason:
                text = next(left)
                edited |= text != row["text"]
                decision = next(decisions) if decisions is not None else None
                reason = EMPTIED if not text.strip() else "" if decision is None else decision.reason
            meta, attributes = (json.loads(row.get(name) or "{}") for name in ("meta", "attributes"))
            yield Row(text, row["source"], row["line"], meta, attributes, row["bytes"], edited, reason)


# files


class _Lines:
    """Compressed JSON lines in a folder of files, each of about FILE_BYTES of text and whole or absent; a context manager."""

    def __init__(self, folder: Path):
        self.folder, self.number, self.size = folder, 0, 0
        self.open: ExitStack | None = None

    def __enter__(self) -> _Lines:
        shutil.rmtree(self.folder, ignore_errors=True)  # of an earlier attempt
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.open is not None:
            self.open.__exit__(kind, error, trace)

    def write(self, value: dict) -> None:
        if self.open is None:
            self.open = ExitStack()
            beside = self.open.enter_context(atomic_path(self.folder / f"part-{self.number:05d}.jsonl.zst"))
            file = self.open.enter_context(open(beside, "wb"))
            self.stream = self.open.enter_context(zstandard.ZstdCompressor().stream_writer(file))
        line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        self.stream.write(line)
        self.size += len(line)
        if self.size >= FILE_BYTES:
            self.open.close()
            self.open, self.number, self.size = None, self.number + 1, 0


def _line_of(row: Row) -> dict:
    return {"id": row.id, "text": row.text, "source": row.source, "line": row.line, "metadata": row.meta}


def _write_row(row: Row, lines: dict[str, _Lines], line_of: Callable[[Row], dict]) -> None:
    if row.attributes:
        lines["attributes"].write({"id": row.id, "attributes": row.attributes})
    if row.reason:
        lines["rejected"].write({**line_of(row), "rejected": row.reason})
    else:
        lines["documents"].write(line_of(row))
