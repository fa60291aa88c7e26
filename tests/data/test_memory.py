"""The data stage needs the same memory whatever the size of the corpus."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from sparing.data.workers import _python_path

LIMIT_MB = 1500


def write_corpus(folder: Path, megabytes: int) -> None:
    """Half JSON lines of 2 kB (a tenth of it compressed), half one long text; words from a vocabulary that grows, as real ones do."""
    folder.mkdir()
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(50_000)]
    paragraphs = [" ".join(rng.choices(words, k=330)) for _ in range(500)]
    size = sum(map(len, paragraphs))
    with (
        open(folder / "a.jsonl", "w") as lines,
        gzip.open(folder / "b.jsonl.gz", "wt", compresslevel=1) as packed,
        open(folder / "c.txt", "w") as text,
    ):
        for index in range(megabytes * 1_000_000 // (2 * size)):
            for number, paragraph in enumerate(paragraphs):
                (packed if number % 10 == 0 else lines).write(json.dumps({"text": f"{index} {number} {paragraph}"}) + "\n")
                text.write(f"{number} {index} {paragraph}\n")


def probe(corpus: Path, root: Path, max_tokens: str) -> int:
    """Peak of parent and workers together, MB."""
    command = [sys.executable, str(Path(__file__).with_name("memory_probe.py")), str(corpus), str(root), max_tokens, str(LIMIT_MB)]
    environment = dict(os.environ, PYTHONPATH=_python_path(), OPENBLAS_NUM_THREADS="1")
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    print(result.stdout)
    peak, tokens, _, workers = result.stdout.split()
    assert int(tokens) > 0 and int(workers) == 2
    return int(peak)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    write_corpus(tmp_path / "small", 20)
    write_corpus(tmp_path / "large", 50)
    small, large = probe(tmp_path / "small", tmp_path / "1", "1000000"), probe(tmp_path / "large", tmp_path / "2", "1000000")
    assert large < small + 60 and large < LIMIT_MB / 2


@pytest.mark.slow
def test_a_gigabyte_passes_under_a_limit_of_one_and_a_half(tmp_path):
    write_corpus(tmp_path / "corpus", 1000)
    assert probe(tmp_path / "corpus", tmp_path / "home", "all") < LIMIT_MB / 2
