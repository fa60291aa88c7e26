"""The data stage needs the same memory whatever the size of the corpus."""

import contextlib
import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sparing.data.pipes import python_path

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


PREPARE = """
import resource, sys
from pathlib import Path
from sparing.base.config import DataConfig
from sparing.data.prepare import prepare
corpus, root, max_tokens, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) or None, int(sys.argv[4]) << 20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # the workers inherit it
assert prepare(DataConfig(paths=(corpus,), max_tokens=max_tokens, workers=2), 4096, root).tokens
"""


def peak_mb(corpus: Path, root: Path, max_tokens: int) -> int:
    """The largest sum of resident memory, MB, of a process that prepares `corpus` under a limit on address space, and its workers."""
    environment = dict(os.environ, PYTHONPATH=python_path(), OPENBLAS_NUM_THREADS="1")
    command = [sys.executable, "-c", PREPARE, str(corpus), str(root), str(max_tokens), str(LIMIT_MB)]
    process = psutil.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    peak, most = 0, 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # one of them has just ended
            family = [process, *process.children()]
            peak, most = max(peak, sum(one.memory_info().rss for one in family)), max(most, len(family))
        time.sleep(0.02)
    assert process.returncode == 0, process.stderr.read()[-2000:]
    assert most == 3
    return peak >> 20


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    write_corpus(tmp_path / "small", 20)
    write_corpus(tmp_path / "large", 50)
    small, large = (peak_mb(tmp_path / name, tmp_path / f"home of {name}", 1_000_000) for name in ("small", "large"))
    assert large < small + 60 and large < LIMIT_MB / 2


@pytest.mark.slow
def test_a_gigabyte_passes_under_a_limit_of_one_and_a_half(tmp_path):
    write_corpus(tmp_path / "corpus", 1000)
    assert peak_mb(tmp_path / "corpus", tmp_path / "home", 0) < LIMIT_MB / 2
