"""Chooses from a pool, up to a budget, the documents that are most like a sample: the verb `data select`.

A document is scored as its pieces of PIECE_BYTES are, by their mean, and stays or goes whole: so a book is compared with a sample of short
answers at the length of the answers, and no score depends on a document's length. Ways to score a piece (`BY`):

    quality   probability that it is from the sample and not from a random draw of the pool, by `quality.train`, as DCLM (Li et al. 2024,
              arXiv 2406.11794) chose its texts. The draw has some of the sample's kind in it; that moves all scores, and not their order.
    overlap   which of its words and pairs of words the sample has more often than the pool: mean logarithm of the ratio of their
              frequencies, the importance weight of DSIR (Xie et al. 2023, arXiv 2302.03169, section 4). Two things differ: the mean and
              not the sum, because pieces are not equally long, and the highest weights stay, where DSIR draws by them.
    loss      bits per byte under a model, minus those under a reference that is good at what is wanted: what the model has still to learn
              and the reference shows to be learnable (RHO-LOSS, Mindermann et al. 2022, arXiv 2206.07137).
    random    by a hash of the text: the order to be beaten.
    mixture   no score: of each path of the pool a share, in the proportions that small models find best for the sample (`mixture`), and of
              each the documents with the smallest hashes.

The pool is read once, into parts; scored part by part; and written by a threshold. Memory: 50 bytes a document, and two samples of
SAMPLE_BYTES.
"""

from __future__ import annotations

import hashlib
import heapq
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa

from sparing.account.meter import NoMeter
from sparing.base.config import UserError
from sparing.base.messages import say
from sparing.budget.units import parse_budget, parse_size
from sparing.curate.document import Document
from sparing.curate.parts import Stop, open_table, part_file, write_parts
from sparing.curate.pipeline import WORK, Fate, Row, judge_parts, rows, shown, summary_of, vacant, write_rows
from sparing.curate.quality import BITS, features, train
from sparing.data.document import pieces
from sparing.data.files import find_files
from sparing.data.progress import check
from sparing.data.sources import Tally, documents
from sparing.data.split import content_hash, mix
from sparing.data.tokenizer import Tokenizer
from sparing.data.web import EXTRACTORS
from sparing.resolve import BYTES_PER_TOKEN

if TYPE_CHECKING:
    from sparing.infer.generate import Model

BY = ("quality", "overlap", "loss", "random", "mixture")
PIECE_BYTES = 2048
SAMPLE_BYTES = 4 << 20
"""Of the sample, and of the pool, a scorer learns from no more than this; of more, from pieces drawn by their hashes."""
HELD_OUT = 0.2
"""Share of both on which the first fit is tried."""
OVERLAP_BITS = 14
"""2^14 frequencies; DSIR has 10,000."""
ESTIMATED = BYTES_PER_TOKEN[8192]
"""Bytes per token where no tokenizer is named."""
REASON = "select: score"
FORMS = "2Mtok, 20MB, 10%"


class Scorer(Protocol):
    """It can be pickled."""

    def score(self, document: Document) -> float:
        """How like the sample a piece of text is; more is more alike."""


@dataclass(frozen=True)
class Selection:
    """What to select. Raises UserError for a budget or a way that is none, and where the sample is missing."""

    budget: str
    """Tokens, bytes, or a share of the pool's bytes."""
    sample: tuple[str, ...] = ()
    """Files of text that the user cares about; for `quality` and `overlap`."""
    by: str = "quality"
    tokenizer: str | None = None
    """A run, or its tokenizer.json, to count tokens with."""
    model: str | None = None
    """For `loss`: a run."""
    reference: str | None = None
    """For `loss`: a run, or imported model, that is good at what is wanted."""
    proxies: int | None = None
    """For `mixture`: how many small models are trained; None: `mixture.PER_SOURCE` for each path."""

    def __post_init__(self):
        if self.by not in BY:
            raise UserError(f"--by {self.by}: not known; choose {', '.join(BY)}")
        if self.by in (*FITS, "mixture") and not self.sample:
            raise UserError(f"--by {self.by} needs --for SAMPLE: some text of the kind that is wanted")
        for name in ("model", "reference"):
            if (getattr(self, name) is None) == (self.by == "loss"):
                raise UserError(f"--by loss needs --{name} RUN" if self.by == "loss" else f"--{name} goes with --by loss")
        if self.proxies is not None and self.by != "mixture":
            raise UserError("--proxies goes with --by mixture")
        _, unit = parse_amount(self.budget)
        if self.tokenizer is not None and unit != "tok":
            raise UserError(f"--tokenizer counts tokens, and --budget {self.budget} is not in tokens: write one as 2Mtok")

    def load(self) -> None:
        """Say what is missing before any text is read. Raises UserError."""
        if self.sample:
            find_files(self.sample)
        if self.by == "loss":
            for run in (self.model, self.reference):
                _run(run)
        if self.tokenizer is not None:
            _tokenizer(self.tokenizer)


def parse_amount(text: str) -> tuple[float, str]:
    """(2e6, "tok"), (2e7, "bytes") or (0.1, "share") of `2Mtok`, `20MB`, `10%`. Raises UserError."""
    compact = re.sub(r"\s+", "", text)
    if compact.lower().rstrip("s").endswith(("tok", "token")):
        return parse_budget(compact).amount, "tok"
    if compact.lower().endswith("b"):  # not 20m: everywhere else that is twenty minutes
        return float(parse_size(compact)), "bytes"
    if match := re.fullmatch(r"(\d+\.?\d*|\.\d+)%", compact):
        if 0 < float(match[1]) <= 100:
            return float(match[1]) / 100, "share"
        raise UserError(f"--budget {text}: must be more than 0 % and at most 100 %")
    raise UserError(f"--budget {text}: not tokens, bytes or a share of the pool; write one of {FORMS}")


def select(
    paths: Sequence[str],
    out: str | Path,
    chosen: Selection,
    text_key: str = "text",
    workers: int = 1,
    meter: NoMeter | None = None,
    should_stop: Stop = None,
    extract: str = EXTRACTORS[0],
) -> tuple[dict, Fate]:
    """Write the best documents behind `paths` up to the budget to the folder `out`, as `pipeline.curate` does; the others are rejected.

    Documents are taken from the highest score down until the next one would not fit; of equal scores, the earlier one in the input first.
    A document that is larger than the whole budget goes.

    -> (`pipeline.summary_of`, and `by`, `budget`, `size`: {"unit": bytes or tokens, "limit", "in", "out"}, `threshold`: the lowest score
    that stays, `told_apart`: the area under the ROC curve of held-out sample against held-out pool, None where there is no text to hold
    out; more for the card). Raises UserError; Stopped, then the same call goes on.
    """
    folder, meter = vacant(out), meter or NoMeter()
    work = folder / WORK
    if chosen.by == "mixture":  # told before the pool is read
        owners, sample = _owners(paths, chosen), _sample(chosen, text_key, should_stop, extract)
    with meter.stage("read"):
        parts, tally, came_in = judge_parts(paths, text_key, work, None, "pool", 1, should_stop, partial(documents, extract=extract))
    if not came_in:
        raise UserError(f"no text to select from in {', '.join(paths)}" + (f": {tally}" if tally.total else ""))
    with meter.stage("score"):
        scorer, told = None, None
        if chosen.by in FITS:
            sample = _sample(chosen, text_key, should_stop, extract)
            scorer, told = fit(chosen.by, sample, draw(_texts(parts, should_stop), SAMPLE_BYTES))
        elif chosen.by == "loss":
            scorer, workers = ExcessLoss.of(chosen.model, chosen.reference), 1  # its products take all cores
        scores, sizes = scores_of(parts, work, scorer, chosen.tokenizer, workers, should_stop)
    limit, found = _limit(chosen, sizes), {}
    if chosen.by == "mixture":
        with meter.stage("proxies"):
            kept, found = _mixed(chosen, paths, owners, parts, scores, sizes, limit, sample, work, should_stop)
    else:
        kept = best(scores, sizes, limit)
    if not kept.any():
        raise UserError(f"--budget {chosen.budget} keeps nothing: the smallest document has {sizes.min():,} {_unit(chosen)}; allow more")
    if kept.all():
        say(f"--budget {chosen.budget} is as much as the pool has, {sizes.sum():,} {_unit(chosen)}, or more: all of it is kept")
    with meter.stage("write"):
        fate = write_rows(folder, judged(parts, scores, kept), should_stop)
    size = {"unit": _unit(chosen), "limit": int(limit), "in": int(sizes.sum()), "out": int(sizes[kept].sum())}
    more = {"by": chosen.by, "budget": chosen.budget, "size": size, "threshold": float(scores[kept].min()), "told_apart": told}
    return summary_of(fate, tally, came_in) | more | found, fate


def best(scores: np.ndarray, sizes: np.ndarray, limit: float) -> np.ndarray:
    """bool [documents]: those with the highest scores that together have at most `limit`; one that is larger than that stands in no way."""
    order = np.argsort(-scores, kind="stable")
    order = order[sizes[order] <= limit]
    kept = np.zeros(len(scores), bool)
    kept[order[: np.searchsorted(np.cumsum(sizes[order]), limit, side="right")]] = True
    return kept


# scorers


@dataclass(frozen=True, eq=False)
class Overlap:
    """Importance weights of hashed words and pairs of words."""

    weights: np.ndarray
    """float32 [2^OVERLAP_BITS]: logarithm of the frequency in the sample over that in the pool."""

    def score(self, document: Document) -> float:
        """The mean over the words and pairs of words, each once; 0 without any."""
        buckets = features(document) >> (BITS - OVERLAP_BITS)
        return float(self.weights[buckets].mean(dtype=np.float64)) if buckets.size else 0.0

    @classmethod
    def of(cls, good: Iterable[str], bad: Iterable[str]) -> Overlap:
        """Of texts of the sample and of the pool; every bucket counts once more than it occurs, so that none is impossible."""
        logs = []
        for texts in (good, bad):
            counts = np.ones(1 << OVERLAP_BITS)
            for text in texts:
                np.add.at(counts, features(Document(text)) >> (BITS - OVERLAP_BITS), 1)
            logs.append(np.log(counts / counts.sum()))
        return cls((logs[0] - logs[1]).astype(np.float32))


FITS = {"quality": train, "overlap": Overlap.of}
"""By way, what learns a scorer from texts of the sample and of the pool."""


@dataclass(frozen=True)
class ExcessLoss:
    """Bits per byte under a run minus those under another."""

    runs: tuple[str, str]
    weights: tuple[str, str]
    """Their SHA-256: under other weights scores are others."""

    @classmethod
    def of(cls, model: str, reference: str) -> ExcessLoss:
        """Raises UserError for what is no run."""
        runs = (model, reference)
        from sparing.base.run import weights_sha256

        return cls(runs, tuple(weights_sha256(_run(run).run) for run in runs))

    def score(self, document: Document) -> float:
        from sparing.evals.bpb import bpb

        found = []
        for run in map(_run, self.runs):
            t = run.config.train
            found.append(bpb(run.network.nll, run.tokenizer, [document.text], t.eval_context or t.seq_len)["bpb"])
        return found[0] - found[1]


@cache
def _run(path: str) -> Model:
    from sparing.infer.generate import load  # here, because torch takes seconds to load

    return load(path)


def fit(by: str, good: list[str], bad: list[str]) -> tuple[Scorer, float | None]:
    """(a scorer that learnt from all pieces of the sample and of the pool; how well one that did not see the last fifth of both tells
    those apart, see `told_apart`, or None where a fifth is no piece). Pieces are in the order of `draw`."""
    fitted, told = FITS[by], None
    cuts = [len(texts) - int(HELD_OUT * len(texts)) for texts in (good, bad)]
    if cuts[0] < len(good) and cuts[1] < len(bad):
        trial = fitted(good[: cuts[0]], bad[: cuts[1]])
        told = told_apart(*([trial.score(Document(text)) for text in texts[cut:]] for texts, cut in zip((good, bad), cuts, strict=True)))
    return fitted(good, bad), told


def told_apart(good: Sequence[float], bad: Sequence[float]) -> float:
    """Probability that one of `good` is higher than one of `bad`, ties counting half: the area under the ROC curve."""
    ranked = np.sort(bad)
    below, upto = (np.searchsorted(ranked, good, side=side) for side in ("left", "right"))
    return float((below + upto).mean() / (2 * len(ranked)))


def cut(text: str) -> list[str]:
    """The pieces that a text is compared by."""
    return [piece.decode() for piece in pieces(text.encode(), PIECE_BYTES) if piece.strip()]


def score(scorer: Scorer | None, text: str) -> float:
    """Of a whole document. None: its place in a random order, from 0 to 1."""
    if scorer is None:
        return mix(content_hash(text.encode())) / 2**64  # mixed: `train` holds out what has the smallest hashes
    found = cut(text)
    return float(np.average([scorer.score(Document(piece)) for piece in found], weights=[len(piece) for piece in found]))


def draw(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Pieces of the texts, all of them or those with the smallest hashes that come to `max_bytes`.

    Texts are in the order of their hashes, so that another order gives the same; pieces of one text stay together, so that few texts are
    on both sides of a cut.
    """
    heap: list[tuple[int, int, int, str]] = []  # largest hash of a piece on top
    size = 0
    for text in texts:
        whole = content_hash(text.encode())
        for number, piece in enumerate(cut(text)):
            hash = mix(content_hash(piece.encode()))
            if size >= max_bytes and hash >= -heap[0][0]:
                continue
            heapq.heappush(heap, (-hash, whole, number, piece))
            size += len(piece.encode())
            while size - (top := len(heap[0][3].encode())) >= max_bytes:
                size -= top
                heapq.heappop(heap)
    return [piece for _, _, _, piece in sorted(heap, key=lambda entry: entry[1:3])]


# stages


def _sample(chosen: Selection, text_key: str, should_stop: Stop, extract: str) -> list[str]:
    tally = Tally()
    found = documents(chosen.sample, text_key, tally, lambda _: check(should_stop), extract=extract)
    texts = draw((document.text for document in found), SAMPLE_BYTES)
    if not texts:
        raise UserError(f"--for {' '.join(chosen.sample)}: no text in it" + (f": {tally}" if tally.total else ""))
    if tally.total:
        say(f"--for: {tally.total} documents cannot be used: {tally}")
    return texts


def _texts(parts: list[Path], should_stop: Stop) -> Iterator[str]:
    return (text for text, _ in _placed(parts, should_stop))


def _placed(parts: list[Path], should_stop: Stop) -> Iterator[tuple[str, str]]:
    """(text, its file) of every document."""
    for path in parts:
        check(should_stop)
        with open_table(path) as batch:
            yield from zip(*(batch.column(name).to_pylist() for name in ("text", "source")), strict=True)


def _owners(paths: Sequence[str], chosen: Selection) -> dict[str, int]:
    """Which of the paths each file is of. Raises UserError where that is not one, and for too few paths or proxies."""
    if len(paths) < 2:
        raise UserError("--by mixture needs two PATHs or more: each is a source, of which it finds the shares")
    if chosen.proxies is not None and chosen.proxies < len(paths) + 3:
        raise UserError(f"--proxies {chosen.proxies}: {len(paths)} sources need {len(paths) + 3} or more")
    owners: dict[str, int] = {}
    for number, path in enumerate(paths):
        for file in find_files([path]):
            if owners.setdefault(shown(file.path), number) != number:
                raise UserError(
                    f"--by mixture: {file.path} is in {paths[owners[shown(file.path)]]} and in {path}: every file needs one source"
                )
    return owners


def _mixed(
    chosen: Selection, paths: Sequence[str], owners: dict[str, int], parts: list[Path], order: np.ndarray, sizes: np.ndarray,
    limit: float, sample: list[str], work: Path, should_stop: Stop,
) -> tuple[np.ndarray, dict]:  # fmt: skip
    """(bool [documents]: which make the best mixture; what the summary says of it). order: of the documents within a source."""
    from sparing.curate import mixture

    numbers = np.array([owners[file] for _, file in _placed(parts, should_stop)])
    totals = np.bincount(numbers, sizes, len(paths))
    if not totals.all():
        raise UserError(f"{paths[int(np.argmin(totals))]}: no usable text: leave it out")
    if limit >= totals.sum():
        return np.ones(len(sizes), bool), {}
    sources = []
    for number in range(len(paths)):
        texts = (text for text, file in _placed(parts, should_stop) if owners[file] == number)
        sources.append(draw(texts, mixture.DRAWN_BYTES))
    count = chosen.proxies or max(mixture.FEWEST, mixture.PER_SOURCE * len(paths))
    sample = draw(sample, mixture.SCORED_BYTES)
    found = mixture.find_mixture(sources, sample, totals / totals.sum(), totals / limit, count, work, should_stop)
    kept = np.zeros(len(sizes), bool)
    for number, share in enumerate(found.shares):
        mine = np.flatnonzero(numbers == number)
        kept[mine] = best(order[mine], sizes[mine], share * limit)
    if (filled := found.shares.sum()) < 0.99:
        say(f"what lowers the loss on the sample comes to {filled:.0%} of the budget, and no more is kept")
    shares = {path: float(share) for path, share in zip(paths, found.shares, strict=True)}
    say("the best mixture: " + ", ".join(f"{share:.0%} {path}" for path, share in shares.items()))
    return kept, {"mixture": shares} | found.summary


def scores_of(
    parts: list[Path], work: Path, scorer: Scorer | None, tokenizer: str | None, workers: int, should_stop: Stop
) -> tuple[np.ndarray, np.ndarray]:
    """Of the documents of `judge_parts`: (float64 [documents] scores, int64 [documents] sizes), in the order of the input."""

    def read() -> Iterator[pa.RecordBatch]:
        for path in parts:
            with open_table(path) as batch:
                yield batch.select(["text", "source", "line"])

    counted = tokenizer and _tokenizer(tokenizer).to_json()
    name = "scored-" + hashlib.blake2b(pickle.dumps((scorer, counted)), digest_size=8).hexdigest()
    digests = write_parts(partial(_scored, scorer=scorer, tokenizer=tokenizer), name, read, work, workers, should_stop)
    found: tuple[list[np.ndarray], ...] = ([], [])
    for number in range(len(digests)):
        with open_table(part_file(work, name, number)) as batch:
            for column, arrays in zip(batch.columns, found, strict=True):
                arrays.append(column.to_numpy().copy())
    return np.concatenate(found[0]), np.concatenate(found[1])


def _scored(part: pa.RecordBatch, scorer: Scorer | None, tokenizer: str | None) -> pa.RecordBatch:
    """One part's scores and sizes: bytes, or tokens with one that ends the text."""
    texts = part.column("text").to_pylist()
    if tokenizer is None:
        sizes = [len(text.encode()) for text in texts]
    else:
        sizes = [len(_tokenizer(tokenizer).encode_array(text)) + 1 for text in texts]
    scores = pa.array([score(scorer, text) for text in texts], pa.float64())
    return pa.RecordBatch.from_pydict({"score": scores, "size": pa.array(sizes, pa.int64())})


@cache
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer.load(path)


def _unit(chosen: Selection) -> str:
    return "bytes" if chosen.tokenizer is None else "tokens"


def _limit(chosen: Selection, sizes: np.ndarray) -> float:
    """The budget in the unit of the sizes."""
    amount, unit = parse_amount(chosen.budget)
    if unit == "share":
        return amount * float(sizes.sum())
    return amount * ESTIMATED if unit == "tok" and chosen.tokenizer is None else amount


def judged(parts: list[Path], scores: np.ndarray, kept: np.ndarray) -> Iterator[Row]:
    for row, value, stays in zip(rows(parts), scores, kept, strict=True):
        row.attributes = {"select": {"score": round(float(value), 6)}}
        row.reason = "" if stays else REASON
        yield row
