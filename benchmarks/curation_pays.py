"""Does curation pay? Books, the same with as much dirt, and that curated, in equal time. What is in --out is not done again.

python -m benchmarks.curation_pays --books BOOKS --manuals /usr/share/man --out FOLDER [--budget 20m]

BOOKS has train and val. Books of train, cut at empty lines into documents as long as chapters, are the clean corpus, --size megabytes of
it. The dirty one has as many bytes of dirt beside them (`benchmarks.dirt`): near-duplicates of its documents, boilerplate, manual pages in
German, French and Spanish (Debian's manpages-de, -fr and -es), spam, and mojibake of the other books. The arms are

    clean    `sparing train` on the clean corpus
    dirty    on the dirty one
    curated  `sparing data curate` of the dirty one, and training on what stays in what is left of the budget
    quality  the same with one rule more: a quality model of 2 MB of other books and as much of the dirty corpus

all of one shape, which the clean one's budget chooses; each has the tokenizer of its own corpus. They are scored in bits per byte of val.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

from benchmarks.arms import asked, kept, made
from benchmarks.dirt import LANGUAGES, MOJIBAKE, boilerplate, manual_pages, near_duplicate, spam
from sparing.base.files import write_atomic
from sparing.base.messages import say
from sparing.bench.results import stored_result
from sparing.budget.units import parse_budget
from sparing.curate.quality import train
from sparing.data.sources import documents
from sparing.data.split import content_hash, mix
from sparing.evals.select import select

CHAPTER = 16_000
"""Characters from which a document ends at the next empty line."""
CLEAN, DIRT = 50, {"near-duplicate": 15, "boilerplate": 10, "language": 10, "spam": 10, "mojibake": 5}
"""Parts of the dirty corpus' bytes, of 100."""
SAMPLE = 2_000_000
"""Bytes of other books, and of the dirty corpus, that the quality model learns from: whole documents, as those that it judges."""
LEAST_GOOD = 1 / 3
"""Of the quality model. Half of its bad sample is as good as the good one, so a good text's probability is 2/3, and dirt's is 0."""
CURATED = ("curated", "quality")
ARMS = ("clean", "dirty", *CURATED)
WARM_UP = "50ktok"
"""Of a run before all arms, so that none of them compiles kernels and measures the machine for the others."""
RULES = """\
# FineWeb's rules, but for what they take for granted of web pages and books do not have.
[c4]
min_words_per_line = "none"  # else "No?" goes, and the empty lines between paragraphs
[fineweb]
max_short_lines = "none"     # verse and plays
max_line_ends = "none"       # two a paragraph here, and dialogue has short ones
max_dup_line_chars = "none"  # "Yes." and refrains; gopher_repetition looks for long repeats
[gopher_quality]
min_words_with_letter = 0.7  # marks are words too, and dialogue is full of them
"""
"""By what the rules measure and how books are laid out. The last one after a look at books: it is below 0.8 in 8 % of chapters, in 2 %
below 0.7."""


class Row(NamedTuple):
    """A document of a corpus; all but the text is metadata."""

    kind: str
    text: str
    form: str = ""
    """Of mojibake and languages: which."""
    number: int = -1
    of: int = -1
    """Of a near-duplicate: the number of the clean document."""


@dataclass
class CurationPays:
    """Train on clean, dirty and curated books in equal time, and compare bits per byte."""

    books: str
    """BOOKS/train is learnt from, BOOKS/val scored."""
    manuals: str
    """Folder with de, fr and es, each with man1 and so on."""
    out: str
    """Folder for corpora, runs and results."""
    budget: str = "20m"
    """Of each arm, curation included."""
    size: float = 40.0
    """Megabytes of clean text; about what the budget can read."""
    val_bytes: int = 1_000_000
    """Of val, that are scored."""
    seeds: int = 1
    arms: tuple[str, ...] = ARMS
    """The clean one always comes first: it settles the shape."""

    def __call__(self) -> dict:
        """The figure's numbers, also in OUT/result.json."""
        folder = self.folder = Path(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        corpus = stored_result(folder / "corpus.json", self._write_corpus)
        curated = {arm: self._curated(arm) for arm in self.arms if arm in CURATED}
        made(folder, "run-before", "train", "--data", str(folder / "val.jsonl"), "--budget", WARM_UP)
        arms = dict.fromkeys(("clean", *self.arms))
        rows: dict[str, dict] = {arm: {"bpb": [], "tokens": []} for arm in arms}
        for seed in range(self.seeds):
            for arm in arms:
                score, learnt = self._trained(arm, seed, curated.get(arm, {}).get("seconds", 0.0))
                rows[arm]["bpb"].append(score["bpb"])
                rows[arm]["tokens"].append(learnt["tokens"])
        for arm in curated:
            rows[arm] |= curated[arm] | {"by_kind": self._by_kind(arm)}
        result = {"budget": self.budget, "corpus": corpus, "arms": rows, **_gain(rows)}
        write_atomic(folder / "result.json", json.dumps(result, indent=1))
        return result

    # corpora

    def _write_corpus(self) -> dict:
        """OUT/clean.jsonl, dirty.jsonl, val.jsonl, and sample.jsonl of books that are in neither; -> bytes by kind."""
        folder, dice = self.folder, random.Random(0)
        books = sorted((text for text, *_ in documents([f"{self.books}/train"])), key=_place)
        clean, others, size = [], [], 0
        for text in books:  # whole books, in a random order that is the same every time
            chapters = list(cut(text))
            (clean if size < 1e6 * self.size else others).extend(chapters)
            size += sum(len(chapter.encode()) for chapter in chapters)
        size = sum(len(text.encode()) for text in clean)
        if len(others) < 10:
            raise SystemExit(f"--size {self.size:g}: leaves no other books; {size / 1e6:.1f} MB are all")
        dice.shuffle(others)
        rows = [Row("clean", text, number=at) for at, text in enumerate(clean)]
        for kind, part in DIRT.items():
            made = 0
            for row in self._dirt(kind, dice, clean, others):
                rows.append(row._replace(number=len(rows)))
                made += len(row.text.encode())
                if made >= size * part / CLEAN:
                    break
            else:
                raise SystemExit(f"{kind}: there are {made / 1e6:.1f} MB for --size {self.size:g}")
        dice.shuffle(rows)
        _write(folder / "dirty.jsonl", rows)
        _write(folder / "clean.jsonl", [row for row in rows if row.kind == "clean"])
        val = select((unified(text) for text, *_ in documents([f"{self.books}/val"])), self.val_bytes)
        _write(folder / "val.jsonl", [Row("val", text) for text in val])
        _write(folder / "sample.jsonl", [Row("sample", text) for text in _first(reversed(others), SAMPLE)])  # mojibake has the others
        sizes: Counter[str] = Counter()
        for row in rows:
            sizes[row.kind] += len(row.text.encode())
        return dict(sizes)

    def _dirt(self, kind: str, dice: random.Random, clean: list[str], others: list[str]) -> Iterator[Row]:
        """Documents of one kind."""
        if kind == "near-duplicate":
            for at in dice.sample(range(len(clean)), len(clean)):
                yield Row(kind, near_duplicate(dice, clean[at]), of=at)
        elif kind == "language":
            pages = [(one, part) for one in LANGUAGES for page in manual_pages(self.manuals, one) for part in cut(page)]
            for language, text in dice.sample(pages, len(pages)):
                yield Row(kind, text, form=language)
        elif kind == "mojibake":
            for text in others:
                form = dice.choice(["as-cp1252"] * 3 + list(MOJIBAKE))  # by far the commonest
                yield Row(kind, MOJIBAKE[form](dice, text), form=form)
        else:
            while True:
                yield Row(kind, {"spam": spam, "boilerplate": boilerplate}[kind](dice))

    def _curated(self, arm: str) -> dict:
        """OUT/ARM-corpus, and what that took: {"seconds", "documents", "rejected", "stages"}. An interrupted one begins anew, so that its
        time is counted."""
        out, rules = self.folder / f"{arm}-corpus", self.folder / f"{arm}.toml"

        def curate() -> dict:
            shutil.rmtree(out, ignore_errors=True)
            began, more = time.monotonic(), ""
            if arm == "quality":
                model = self.folder / "quality.safetensors"
                good, bad = (_first((row.text for row in _rows(self.folder / f"{name}.jsonl")), SAMPLE) for name in ("sample", "dirty"))
                train(good, bad).save(model)
                more = f'[quality]\nmodel = "{model}"\nmin_score = {LEAST_GOOD}\n'
            write_atomic(rules, RULES + more)
            dirty = str(self.folder / "dirty.jsonl")
            summary = asked(self.folder, "data", "curate", dirty, "--rules", str(rules), "--out", str(out))
            return {"seconds": time.monotonic() - began} | {key: summary[key] for key in ("documents", "bytes", "rejected", "stages")}

        return stored_result(self.folder / f"{arm}-corpus.json", curate)

    def _by_kind(self, arm: str) -> dict:
        """Of each kind of text (and form of it): bytes that came in, the share of them that is gone, and which rules took documents.

        Of a document and its near-duplicate one is to stay, whichever it is: both count as the original, or both as gone. What the
        stages have removed of a text that stays is gone too.
        """
        came = {row.number: row for row in _rows(self.folder / "dirty.jsonl")}
        stay: dict[int, int] = {}
        reasons: dict[int, str] = {}
        for part in ("documents", "rejected"):
            for one in documents([str(self.folder / f"{arm}-corpus" / part)]):
                number = int(one.meta["number"])
                if part == "documents":
                    stay[number] = len(one.text.encode())
                else:
                    reasons[number] = re.sub(" of .*", "", one.meta["rejected"])
        for row in came.values():
            if row.kind == "near-duplicate" and row.of not in stay and row.number in stay:
                stay[row.of] = stay.pop(row.number)
        found: dict[str, dict] = defaultdict(lambda: {"bytes": 0, "stay": 0, "reasons": Counter()})
        for number, row in came.items():
            for name in {row.kind, f"{row.kind} {row.form}".strip()}:
                size = len(row.text.encode())
                found[name]["bytes"] += size
                found[name]["stay"] += min(size, stay.get(number, 0))
                found[name]["reasons"][reasons.get(number, "")] += number in reasons
        return {
            name: {"bytes": row["bytes"], "gone": 1 - row["stay"] / row["bytes"], "reasons": dict((+row["reasons"]).most_common(6))}
            for name, row in sorted(found.items())
        }

    # runs

    def _trained(self, arm: str, seed: int, before: float) -> tuple[dict, dict]:
        """(the score of an arm, what `train` says), which has what `before` seconds have left of the budget."""
        name, data = f"run-{arm}-{seed}", self.folder / (f"{arm}-corpus" if arm in CURATED else f"{arm}.jsonl")
        budget = parse_budget(self.budget)
        if budget.unit != "s":
            raise SystemExit(f"--budget {self.budget}: must be a time, because curation takes time")
        recipe, first = self.folder / "shape.toml", self.folder / "run-clean-0" / "config.toml"
        if name != "run-clean-0":
            write_atomic(recipe, "[model]" + first.read_text().partition("[model]")[2].partition("\n[")[0] + "\n")
        shape = [str(recipe)] if name != "run-clean-0" else []
        words = ("train", *shape, "--data", str(data), "--budget", f"{budget.amount - before:.1f}s", "--seed", str(seed))
        run, learnt = made(self.folder, name, *words)
        return kept(self.folder, f"score-{arm}-{seed}", "eval", str(run), "--data", str(self.folder / "val.jsonl")), learnt


def cut(text: str) -> Iterator[str]:
    """The text in documents of CHAPTER characters or a little more, cut at empty lines; line ends are unified."""
    part: list[str] = []
    for paragraph in re.split(r"\n\n+", unified(text).strip()):
        part.append(paragraph)
        if sum(map(len, part)) >= CHAPTER:
            yield "\n\n".join(part) + "\n"
            part = []
    if part:
        yield "\n\n".join(part) + "\n"


def unified(text: str) -> str:
    """Lines end in a line feed and nothing else: rules see to that in what they keep, and no arm is to learn from it alone."""
    return "\n".join(line.rstrip() for line in text.split("\n"))


def _place(text: str) -> int:
    return mix(content_hash(text.encode()))


def _write(path: Path, rows: list[Row]) -> None:
    write_atomic(path, "".join(json.dumps(row._asdict()) + "\n" for row in rows))


def _rows(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8") as file:
        yield from (Row(**json.loads(line)) for line in file)


def _first(texts: Iterable[str], size: int) -> list[str]:
    """Texts from the beginning that come to `size` bytes, or all."""
    found: list[str] = []
    for text in texts:
        if size <= 0:
            break
        found.append(text)
        size -= len(text.encode())
    return found


def _gain(rows: dict[str, dict]) -> dict:
    """Of each curated arm: bits per byte beside the clean corpus', and which part of what dirt costs it makes good (required: 2/3)."""
    mean = {arm: sum(row["bpb"]) / len(row["bpb"]) for arm, row in rows.items()}
    if not {"clean", "dirty"} <= mean.keys():
        return {}
    costs = mean["dirty"] - mean["clean"]
    found = {
        arm: {"beside_clean": value / mean["clean"] - 1, "made_good": (mean["dirty"] - value) / costs if costs else None}
        for arm, value in mean.items()
        if arm in CURATED
    }
    return {"dirt_costs": costs / mean["clean"], "curation": found}


def table(result: dict) -> str:
    """The figure as lines of text."""
    lines = [f"{kind:>14}  {size / 1e6:8.2f} MB" for kind, size in result["corpus"].items()]
    for arm, row in result["arms"].items():
        bpb, tokens = sum(row["bpb"]) / len(row["bpb"]), sum(row["tokens"]) / len(row["tokens"])
        told = f"{arm:>14}  {bpb:.4f} bpb  {tokens / 1e6:.2f} M tokens"
        if arm in result.get("curation", {}):
            one = result["curation"][arm]
            told += (
                f"  {one['beside_clean']:+.2%} beside clean, {one['made_good'] or 0:.0%} of what dirt costs ({result['dirt_costs']:+.2%})"
            )
            told += f" made good; curation took {row['seconds']:.1f} s"
        lines.append(told)
        for kind, part in row.get("by_kind", {}).items():
            reasons = ", ".join(f"{count} {reason}" for reason, count in part["reasons"].items())
            lines.append(f"{kind:>32}  {part['bytes'] / 1e6:8.2f} MB, {part['gone']:7.2%} gone  {reasons}")
    return "\n".join(lines)


if __name__ == "__main__":
    say(table(tyro.cli(CurationPays)()))
