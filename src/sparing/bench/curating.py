"""How fast a corpus is curated here: all rules, near-duplicates and personal data, beside datatrove's pipeline of the same steps."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.messages import say
from sparing.bench.limit import LIMIT, Limit, Rounds
from sparing.bench.peers import available
from sparing.bench.results import paths_of, row
from sparing.bench.worker import Worker

SAME_WORK = 'all_scores = false\nencoding = "none"\nlanguage = "none"\n'
"""Rules as datatrove's pipeline has them: its model of languages is a download, and it stops at the first filter that rejects."""
OURS, DEFAULT, PEER = "ours", "by default", "datatrove"


def curate(data: str | Sequence[str], rounds: int = 2, megabytes: float = 10.0, limit: str = LIMIT) -> list[dict]:
    """MB of text a second by one process on one core, from JSON lines to what is kept; the sides take turns.

    data: texts, of which so many megabytes are curated. The first row is of the same work on both sides (Gopher's, C4's and FineWeb's rules
    up to the first that rejects), the second of all rules, as `data curate` has them by default. limit: time of the whole figure.
    Raises UserError where there is no text."""
    until, seconds, kept = Limit.of(limit), defaultdict(list), {}
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as scratch:
        corpus = Path(scratch, "corpus")
        size = gather(paths_of(data), corpus, float(megabytes)) / 1e6
        sides = [OURS, DEFAULT, *[PEER] * _has_peer()]
        made = Rounds(int(rounds), until)
        for number in made:
            for side in sides if number % 2 == 0 else reversed(sides):
                out = Path(scratch, "out")
                with Worker(1, until) as worker:
                    if side == PEER:
                        found = worker.run("benchmarks.curation_speed.datatrove", source=str(corpus), out=str(out))
                        found = {"seconds": sum(found["seconds"]), "kept": None}
                    else:
                        found = worker.run(curated, source=str(corpus), out=str(out), rules="" if side == DEFAULT else SAME_WORK)
                shutil.rmtree(out)
                seconds[side].append(found["seconds"])
                kept[side] = found["kept"]
    speed = {side: size / statistics.median(each) for side, each in seconds.items()}
    peer, name = speed.get(PEER), f"datatrove {_version()}" if PEER in speed else None
    more = {"megabytes": size} | made.more()
    return [
        row(f"rules and near-duplicates, {words}", speed[side], "MB/s", peer, name, made.made, kept=kept[side], **more)
        for side, words in ((OURS, "the same work"), (DEFAULT, DEFAULT))
    ]


def gather(paths: Sequence[str], folder: Path, megabytes: float) -> int:
    """Write the first megabytes of text as JSON lines; -> their bytes. Raises UserError where there is none."""
    from sparing.data.sources import documents

    if megabytes <= 0:
        raise UserError(f"--megabytes {megabytes:g}: must be more than 0")
    folder.mkdir()
    size = 0
    with open(folder / "0.jsonl", "w", encoding="utf-8") as file:
        for number, document in enumerate(documents(paths)):
            file.write(json.dumps({"id": str(number), "text": document.text}, ensure_ascii=False) + "\n")
            size += len(document.text.encode())
            if size >= 1e6 * megabytes:
                break
    if not size:
        raise UserError(f"{', '.join(paths)}: no usable text")
    return size


def curated(source: str, out: str, rules: str) -> dict:
    """Curate a folder in this process. rules: TOML."""
    from sparing.curate.pipeline import curate as pipeline
    from sparing.curate.recipe import Recipe

    file = Path(f"{out}-rules.toml")
    file.write_text(rules)
    begun = time.perf_counter()
    summary, _ = pipeline([source], out, Recipe.from_toml(file), workers=1)
    return {"seconds": time.perf_counter() - begun, "kept": summary["documents"]["out"] / summary["documents"]["in"]}


def _has_peer() -> bool:
    if not available(PEER):
        return False
    if find_spec(PEER) is None:
        say("datatrove is left out: it is not installed (pip install 'sparing[bench]')")
    return find_spec(PEER) is not None


def _version() -> str:
    from importlib.metadata import version

    return version(PEER)
