"""Planted near duplicates: how many are found, beside what the theory says, and what is merged that should not be.

python -m benchmarks.duplicates --data BOOKS/train --out FILE.json

Stretches of books become pairs by replacing words until the Jaccard similarity of their sets of 5-grams is 0.80 +- 0.01, counted over
plain words, without the code that is measured. What is finished stays in FILE.json.work: the same command goes on from there.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from sparing.base.config import UserError
from sparing.base.files import atomic_path, write_atomic
from sparing.base.messages import say
from sparing.curate.duplicates import find_duplicates
from sparing.curate.minhash import DuplicateSettings, signatures
from sparing.data.sources import documents

BLOCK = 1000
"""Pairs a file."""
SHORTEST, LONGEST = 100, 500
"""Words of an original."""


@dataclass
class Planted:
    """20,000 pairs at Jaccard 0.80."""

    data: str
    """Text to take stretches of: 6 million words for 20,000 pairs."""
    out: str
    """JSON file for the result."""
    pairs: int = 20_000
    jaccard: float = 0.8
    tolerance: float = 0.01
    seed: int = 1
    workers: int = 1

    def __call__(self) -> dict:
        settings = DuplicateSettings()
        work = Path(f"{self.out}.work")
        work.mkdir(parents=True, exist_ok=True)
        files = self._pairs(work, settings.ngram)
        similarities, met = [], []
        for file in files:
            table = pq.read_table(file)
            similarities += table.column("jaccard").to_pylist()[::2]
            found = signatures(table.select(["text", "source", "line"]).combine_chunks().to_batches()[0], settings)
            keys = np.stack([found.column(f"band_{band}").to_numpy() for band in range(settings.bands)])
            met += (keys[:, ::2] == keys[:, 1::2]).any(axis=0).tolist()
        say(f"{len(met)} pairs signed")
        theory = 1 - (1 - np.array(similarities) ** settings.rows) ** settings.bands

        def read() -> Iterator[pa.RecordBatch]:
            for file in files:
                yield from pq.ParquetFile(file).iter_batches(columns=["text", "source", "line"])

        removed = {one.line: one for one in find_duplicates(read, work / "search", settings, self.workers) if not one.kept}
        result = {
            "pairs": len(met),
            "jaccard": {"mean": float(np.mean(similarities)), "least": min(similarities), "most": max(similarities)},
            "recall": float(np.mean(met)),
            "theory": float(np.mean(theory)),
            "found": sum(2 * pair in removed or 2 * pair + 1 in removed for pair in range(len(met))),
            "removed": len(removed),
        } | self._merges(files, removed, settings.ngram)
        write_atomic(self.out, json.dumps(result, indent=1))
        shutil.rmtree(work)
        return result

    def _pairs(self, work: Path, n: int) -> list[Path]:
        """Parquet files of BLOCK pairs each: an original, its variation, and so on; `line` numbers them through."""
        files = [work / f"pairs-{number:03d}.parquet" for number in range(-(-self.pairs // BLOCK))]
        texts = [] if all(file.exists() for file in files) else [document.text for document in documents([self.data])]
        for number, file in enumerate(files):
            if file.exists():
                continue
            wanted = min(BLOCK, self.pairs - number * BLOCK)
            some = list(islice(self._stretches(texts[number :: len(files)], n), wanted))
            if len(some) < wanted:
                raise UserError(f"--data {self.data}: too little text for {self.pairs:,} pairs; choose fewer --pairs")
            rng, rows = random.Random(f"{self.seed} {number}"), []
            vocabulary = [word for words in some[:100] for word in words]
            for words in some:
                other, similarity = self._variation(words, vocabulary, rng, n)
                for text in (words, other):
                    line = 2 * number * BLOCK + len(rows)
                    rows.append({"text": " ".join(text), "source": "pairs", "line": line, "jaccard": similarity})
            with atomic_path(file) as beside:
                pq.write_table(pa.Table.from_pylist(rows), beside)
            say(f"{number * BLOCK + len(some)} pairs planted")
        return files

    def _stretches(self, texts: list[str], n: int) -> Iterator[list[str]]:
        """Words that lie one after the other in a text, no word in two stretches, no n-gram twice in one."""
        rng = random.Random(self.seed)
        for text in texts:
            words, start = re.findall("[a-z]+", text.lower()), 0
            while len(words) - start >= LONGEST:
                size = rng.randint(SHORTEST, LONGEST)
                if len(_grams(words[start : start + size], n)) == size - n + 1:
                    yield words[start : start + size]
                start += size

    def _variation(self, words: list[str], vocabulary: list[str], rng: random.Random, n: int) -> tuple[list[str], float]:
        """A copy with words replaced, and its similarity. A word by itself is in n n-grams; one that follows another replaced one at a
        distance of d < n is in d that the other is not in. So any number of n-grams can be changed."""
        grams = len(words) - n + 1
        whole, rest = divmod(round(grams * (1 - self.jaccard) / (1 + self.jaccard)), n)
        while True:
            places = [n + n * 2 * at for at in sorted(rng.sample(range((len(words) - 2 * n) // (2 * n)), whole))]
            changed = [*places, *([places[rng.randrange(whole)] + rest] if rest else [])]
            other = list(words)
            for at in changed:
                other[at] = rng.choice(vocabulary)
            if abs((similarity := _similarity(words, other, n)) - self.jaccard) <= self.tolerance:
                return other, similarity

    def _merges(self, files: list[Path], removed: dict, n: int) -> dict:
        """What documents other than their partner were removed for."""
        others = {line: one.of_line for line, one in removed.items() if line // 2 != one.of_line // 2}
        wanted, texts = {*others, *others.values()}, {}
        for file in files if others else ():
            table = pq.read_table(file, columns=["line", "text"])
            texts |= {line: text for line, text in zip(*table.to_pydict().values(), strict=True) if line in wanted}
        found = [_similarity(texts[line].split(), texts[of].split(), n) for line, of in others.items()]
        return {"other_merges": len(found), "false_merges": sum(similarity < 0.5 for similarity in found)}


def _grams(words: list[str], n: int) -> set[tuple[str, ...]]:
    return set(zip(*(words[at:] for at in range(n)), strict=False))


def _similarity(one: list[str], other: list[str], n: int) -> float:
    a, b = _grams(one, n), _grams(other, n)
    return len(a & b) / len(a | b)


if __name__ == "__main__":
    print(json.dumps(tyro.cli(Planted)(), indent=1))
