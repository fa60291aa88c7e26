"""Reads a corpus once to measure it: how much there is, of what kind, what is unusable, what is held out. The result is kept on disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from sparing.base.config import DataConfig, UserError
from sparing.base.files import FULL
from sparing.base.hardware import home
from sparing.data.accounts import Accounts
from sparing.data.files import SourceFile, find_files, fingerprint, kind_of
from sparing.data.progress import Progress, check
from sparing.data.sources import Tally, documents, pieces, readers
from sparing.data.split import SECTION_BYTES, HashHistogram, Split, choose_split, content_hash, mix

FORMAT = 1
"""Part of every fingerprint: raise it when the same input would be read, split or sampled differently."""
SAMPLE_BYTES = 10_000_000


@dataclass(frozen=True)
class CorpusFacts:
    """What `resolve` needs to know about the corpus. Sizes are bytes of UTF-8 text unless said otherwise."""

    documents: int
    bytes: int
    held_out_documents: int
    held_out_bytes: int
    files: int
    kinds: dict[str, int]
    """Bytes of text per kind of file: {"py": 31525224}."""
    quarantined: int
    reasons: dict[str, int]
    """Quarantined documents per reason, details left out."""
    counts: dict[str, int]
    """`accounts.Accounts.balance`: a text that is read in pieces counts once here, and each piece in `documents`."""
    fingerprint: str
    """Changes when a file, the text key or the held-out fraction does."""
    content: str
    """Changes when a text, their order, or what is held out of them does: of what a run learns from, wherever its files are."""
    split: Split = field(repr=False)
    hash_sizes: tuple[np.ndarray, ...] = field(repr=False, compare=False)
    """`HashHistogram.entries` of the documents."""
    section_sizes: tuple[np.ndarray, ...] = field(repr=False, compare=False)
    """`HashHistogram.entries` of the `sections`, by their order of sampling."""

    @property
    def train_bytes(self) -> int:
        return self.bytes - self.held_out_bytes


def sections(raw: bytes, hash: int) -> Iterator[tuple[int, bytes]]:
    """The parts of a document that are sampled one by one: (their place in the order of sampling, text of up to 64 kB).

    hash: the document's. It is scrambled, so that sampling is independent of what is held out.
    """
    for index, piece in enumerate(pieces(raw, SECTION_BYTES)):
        yield mix((hash + index) % (1 << 64)), piece


def data_home() -> Path:
    """`$SPARING_HOME/data`, default `~/.local/share/sparing/data`."""
    return home() / "data"


def corpus_fingerprint(config: DataConfig, files: list[SourceFile]) -> str:
    return fingerprint(files, FORMAT, config.text_key, config.holdout_fraction, *readers(files, config.extract))


def scan(
    config: DataConfig,
    root: Path | None = None,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
    files: list[SourceFile] | None = None,
) -> CorpusFacts:
    """Measure the corpus that `config` names, or read what `root` (default: `data_home()`) has of it when nothing has changed since.

    Raises UserError when nothing is usable, Stopped when asked to.
    """
    if not 0 <= config.holdout_fraction <= 0.5:
        raise UserError(f"data.holdout_fraction must be between 0 and 0.5, not {config.holdout_fraction}")
    files = find_files(config.paths) if files is None else files
    folder = (root or data_home()) / "scans" / corpus_fingerprint(config, files)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged: scan again
        return _load(folder)
    shutil.rmtree(folder, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    with room_in(root or data_home()):
        try:
            partial.mkdir(parents=True, exist_ok=True)
            facts = _pass(config, files, partial, folder.name, progress or (lambda *_: None), should_stop)
            _save(facts, partial)
            try:
                os.rename(partial, folder)
            except OSError:
                if not (folder / "facts.json").is_file():  # another process was quicker: its result is the same
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return facts


@contextlib.contextmanager
def room_in(root: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one line for the user. Raises UserError."""
    try:
        yield
    except OSError as error:
        advice = "set SPARING_HOME to a folder on another disk"
        if error.errno in FULL:
            raise UserError(f"no space left for the prepared corpus in {root}: free some, or {advice}") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EPERM):
            raise UserError(f"cannot write the prepared corpus to {root} ({error.strerror}): {advice}") from None
        raise


def load_sample(fingerprint: str, root: Path | None = None) -> list[str]:
    """About SAMPLE_BYTES of training text in the order of sampling of its `sections` (all of a smaller corpus)."""
    path = (root or data_home()) / "scans" / fingerprint / "sample.jsonl"
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def quarantine_path(fingerprint: str, root: Path | None = None) -> Path:
    """The list of what could not be used: {"source", "line", "reason"} a line."""
    return (root or data_home()) / "scans" / fingerprint / "quarantine.jsonl"


def _pass(config, files, folder, fingerprint, progress, should_stop) -> CorpusFacts:
    total, done = max(1, sum(file.bytes for file in files)), 0
    documents_seen = text_bytes = 0
    kinds: Counter[str] = Counter()
    table, section_table, content = HashHistogram(), HashHistogram(), hashlib.blake2b(digest_size=16)
    largest, largest_hash = b"", 0
    last = kind = ""
    sample = _Sample()

    def tick(size: int) -> None:
        nonlocal done
        check(should_stop)
        done += size
        progress("scan", done, total)

    with open(folder / "quarantine.jsonl", "w", encoding="utf-8") as quarantine:
        tally = Tally(quarantine)
        accounts = Accounts(tally)
        for document in accounts.reading(documents(files, config.text_key, accounts, tick, extract=config.extract)):
            text, source, *_ = accounts.use(document)
            raw = text.encode()
            size, hash = len(raw), content_hash(raw)
            documents_seen += 1
            text_bytes += size
            if source is not last:
                kind, last = kind_of(source), source
            kinds[kind] += size
            table.add(hash, size)
            content.update(hash.to_bytes(8, "little"))
            offset = 0
            for order, piece in sections(raw, hash):
                section_table.add(order, len(piece))
                sample.add(order, hash, offset, piece)
                offset += len(piece)
            if size > len(largest) or (size == len(largest) and hash < largest_hash):
                largest, largest_hash = raw, hash
    if not documents_seen:
        where = ", ".join(config.paths[:3]) or "the default corpus"
        raise UserError(f"no usable text in {where}: {tally if tally.total else 'no files'} (--data.text-key is {config.text_key!r})")
    entries = table.entries()
    split = choose_split(entries, config.holdout_fraction, largest)
    content.update(repr(split).encode())
    with open(folder / "sample.jsonl", "w", encoding="utf-8") as file:
        for text in sample.texts(split, split.cut(largest) if split.tail_hash is not None else 0):
            file.write(json.dumps(text, ensure_ascii=False) + "\n")
    return CorpusFacts(
        documents_seen, text_bytes, split.documents, split.bytes, len(files), dict(sorted(kinds.items())),
        tally.total, dict(tally.reasons.most_common()), accounts.balance(), fingerprint,
        content.hexdigest(), split, entries, section_table.entries(),
    )  # fmt: skip


class _Sample:
    """The sections with the smallest hashes, about SAMPLE_BYTES of them, whatever the order of arrival."""

    def __init__(self):
        self._sections: list[tuple[int, int, int, bytes]] = []
        self._bytes, self._bound = 0, 1 << 64

    def add(self, order: int, hash: int, offset: int, raw: bytes) -> None:
        if order < self._bound:
            self._sections.append((order, hash, offset, raw))
            self._bytes += len(raw)
            if self._bytes > 2 * SAMPLE_BYTES:
                self._trim()

    def _trim(self) -> None:
        self._sections.sort()
        size = 0
        for index, entry in enumerate(self._sections):
            size += len(entry[3])
            if size >= SAMPLE_BYTES:
                self._bound, self._bytes = entry[0] + 1, size
                del self._sections[index + 1 :]
                return

    def texts(self, split: Split, cut: int) -> Iterator[str]:
        """Without what is held out; `cut`: where the held-out end of the document `split.tail_hash` begins."""
        self._trim()
        for _, hash, offset, raw in self._sections:
            if hash == split.tail_hash:
                raw = raw[: max(0, cut - offset)]
            if raw and not split.holds_out(hash):
                yield raw.decode()


def _save(facts: CorpusFacts, folder: Path) -> None:
    plain = {name: value for name, value in asdict(facts).items() if not name.endswith("_sizes")}
    np.savez(folder / "tables.npz", *facts.hash_sizes, *facts.section_sizes)
    (folder / "facts.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")


def _load(folder: Path) -> CorpusFacts:
    plain = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    plain["split"]["never"] = tuple(map(tuple, plain["split"]["never"]))
    plain["split"] = Split(**plain["split"])
    with np.load(folder / "tables.npz", allow_pickle=False) as arrays:
        tables = tuple(arrays[name] for name in sorted(arrays, key=lambda name: int(name.rsplit("_", 1)[1])))
    return CorpusFacts(**plain, hash_sizes=tables[:4], section_sizes=tables[4:])
