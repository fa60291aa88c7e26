"""Chooses what a run learns from: of its pool the documents that are most like a sample, as `select` does by `quality` (`train --for`).

The run keeps the texts that it chose, so what it learns from no longer depends on the pool or on the sample.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from sparing.base.config import DataConfig, UserError
from sparing.base.files import write_atomic
from sparing.base.messages import say
from sparing.budget.selecting import SCORED_BYTES
from sparing.curate.pipeline import WORK, Row, judge_parts, write_rows
from sparing.curate.select import SAMPLE_BYTES, draw, fit, judged, scores_of
from sparing.data.accounts import Accounts, balanced
from sparing.data.document import PART
from sparing.data.files import SourceFile
from sparing.data.progress import check
from sparing.data.sources import Document, Reject, Tally, Tick, documents
from sparing.data.split import SPACE, content_hash, mix

BY = "quality"
"""The cheapest way; DCLM (Li et al. 2024, arXiv 2406.11794) chose by it."""
HARDLY = 0.6
"""A pool that is told from the sample no better than this is much of its kind, or the sample says too little."""


class Chooser:
    """A sample that was read, and the pool to choose from.

    pieces: of the sample. hashes: of its documents.
    """

    def __init__(self, data: DataConfig, should_stop: Callable[[], bool] | None = None):
        """Reads `data.sample`. Raises UserError where there is no text in it, Stopped."""
        self.data, tally = data, Tally()
        self.hashes: set[int] = set()

        def texts() -> Iterator[str]:
            for document in documents(data.sample, data.text_key, tally, lambda _: check(should_stop), extract=data.extract):
                self.hashes.add(content_hash(document.text.encode()))
                yield document.text

        self.pieces = draw(texts(), SAMPLE_BYTES)
        names = ", ".join(data.sample)
        if not self.pieces:
            raise UserError(f"--for {names}: no text in it" + (f": {tally}" if tally.total else ""))
        if tally.total:
            say(f"--for {names}: {tally.total} documents cannot be used: {tally}")

    def keep_sample(self, folder: Path) -> None:
        """Write the pieces of the sample that a run is scored on to `folder`/sample.jsonl."""
        lines = (json.dumps({"text": piece}, ensure_ascii=False) + "\n" for piece in draw(self.pieces, SCORED_BYTES))
        write_atomic(folder / "sample.jsonl", "".join(lines))

    def choose(
        self, folder: Path, others: list[str], size: float, looked: float = 1.0, should_stop: Callable[[], bool] | None = None
    ) -> dict:
        """Write the best documents of the pool to `folder`/documents, as `select` writes them: those with the highest scores that come to
        `size` bytes, the last one whole.

        others: texts of the pool, whichever. looked: share of the pool's documents that are scored, those with the smallest hashes. What
        is interrupted goes on from `folder`/.work. -> documents ({"in", "out", "rejected", "quarantined"}; a text that is read in pieces
        goes by its first one), bytes (in, out), looked, by, threshold, told_apart, in_sample (documents of the sample among those that were
        chosen). Raises UserError, Stopped.
        """
        data, work = self.data, folder / WORK
        scorer, told = fit(BY, self.pieces, draw(others, SAMPLE_BYTES))
        if told is not None and told < HARDLY:
            say(f"--for {', '.join(data.sample)}: hardly told from the data ({told:.2f}; 0.5 is guessing), so choosing will gain little")
        accounts = Accounts()
        in_bytes = 0

        def reader(files: Sequence[SourceFile], text_key: str, reject: Reject, tick: Tick, **_: str) -> Iterator[Document]:
            nonlocal accounts, in_bytes
            accounts, in_bytes = Accounts(reject), 0
            for document in accounts.reading(documents(files, text_key, accounts, tick, extract=data.extract)):
                raw = document.text.encode()
                in_bytes += len(raw)
                if looked == 1 or mix(content_hash(raw)) < looked * SPACE:
                    yield document

        parts, *_ = judge_parts(data.paths, data.text_key, work, None, f"pool-{looked:.6f}", 1, should_stop, reader=reader)
        if not parts:
            raise UserError(f"the budget leaves time to look at {looked:.1%} of the data, in which no document falls: allow more")
        scores, sizes = scores_of(parts, work, scorer, None, data.workers or 1, should_stop)
        kept = enough(scores, sizes, size)
        if kept.all():
            say("all that was looked at is kept: the budget trains on no less")
        out = in_sample = 0

        def best() -> Iterator[Row]:
            nonlocal out, in_sample
            for row in judged(parts, scores, kept):
                if not row.reason:
                    out += PART not in row.meta
                    in_sample += content_hash(row.text.encode()) in self.hashes
                    row.meta.pop(PART, None)  # from here on each is a text of its own
                    yield row

        fate = write_rows(folder, best(), should_stop)
        shutil.rmtree(folder / "rejected")  # empty: what is left is where it was
        shutil.rmtree(work, ignore_errors=True)
        if in_sample:
            say(f"{in_sample} documents of --for are in the data and were chosen: bits per byte on it are not of unseen text")
        rejected = accounts.into - accounts.quarantined - out
        return {
            "documents": balanced({"in": accounts.into, "out": out, "rejected": rejected, "quarantined": accounts.quarantined}),
            "bytes": {"in": in_bytes, "out": fate.bytes["out"]}, "looked": looked, "by": BY, "threshold": float(scores[kept].min()),
            "told_apart": told, "in_sample": in_sample,
        }  # fmt: skip


def enough(scores: np.ndarray, sizes: np.ndarray, size: float) -> np.ndarray:
    """bool [documents]: those with the highest scores that together have at least `size`, and none more; all where they have less."""
    order = np.argsort(-scores, kind="stable")
    kept = np.zeros(len(scores), bool)
    kept[order[: np.searchsorted(np.cumsum(sizes[order]), size) + 1]] = True
    return kept
