"""Curation's speed per core beside datatrove's, and its memory: `python -m benchmarks.curation speed`.

One corpus, of real text varied so that no two documents are duplicates. `sparing data curate` goes through all of it and through a tenth,
datatrove through the same tenth; each in one process on one core. Both apply the Gopher, C4 and FineWeb rules up to the first that rejects,
take near-duplicates out and mask personal data in what stays. Ours also looks for exact copies, verifies what it removes, and writes down
scores and what is rejected. One arm more is ours as it is by default, with the language and all scores of what is rejected.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks.curation import MANGLINGS, pieces_in_turn
from sparing.base.files import write_atomic
from sparing.base.messages import say
from sparing.bench.curating import SAME_WORK
from sparing.bench.results import stored_result

FILE_BYTES = 10_000_000
"""Text of a file of the corpus."""
TENTH, WHOLE = "tenth", "whole"
ARMS = {"ours before": TENTH, "datatrove": TENTH, "ours after": TENTH, "ours": WHOLE, "ours by default": TENTH}
"""What each goes through, in the order of the measurement: ours stands on both sides of datatrove, should the machine change its speed."""
CHANGED = 0.1
"""Of the words, when a text is used again: of the runs of five words about 0.9^5 stay, which is a Jaccard similarity of 0.42, and of two
such texts 0.21. Duplicates begin at 0.7."""
CPU = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
MANGLED = 0.25
"""Of the documents: as for `decisions`, so that rules have something to reject."""
LEAST = 1000
"""Characters of a document before it is varied: shorter ones have too few sentences for the rules, and a crawl has few of them left."""


@dataclass
class Speed:
    """Full rules and near-duplicates per core, ours beside datatrove's, and ours at ten times as much text."""

    data: tuple[str, ...]
    """Files and folders of text; of JSON, all text of a row is a document."""
    out: str
    """Folder for the corpus and the results."""
    megabytes: float = 1000.0
    """Of the corpus; datatrove gets a tenth."""
    cpu: int = CPU
    """The core that everything runs on (taskset)."""

    def __call__(self) -> dict:
        """{"corpus", "arms": {name: {"wall_s", "cpu_s", "peak_mb", "mb", "documents", "kept"}}, "mb_per_cpu_s", "times", "peak_mb"}; it is
        in OUT/speed.json too."""
        folder = Path(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        corpus = stored_result(folder / "corpus.json", lambda: make_corpus(self.data, folder / "corpus", 1e6 * self.megabytes))
        (folder / "speed").mkdir(exist_ok=True)
        arms = {}
        for arm, part in ARMS.items():
            file = folder / "speed" / f"{arm.replace(' ', '-')}.json"
            arms[arm] = stored_result(file, lambda arm=arm, part=part: self._measure(arm, folder, part))
            row = arms[arm] | {"mb": sum(corpus[name]["bytes"] for name in (TENTH, WHOLE)[: 1 + (part == WHOLE)]) / 1e6}
            arms[arm] = row
            rate, kept = row["mb"] / row["cpu_s"], row["kept"] / row["documents"]
            say(f"{arm}: {row['mb']:.0f} MB, {rate:.2f} MB a CPU second, {row['wall_s']:.0f} s, {row['peak_mb']:.0f} MB of memory, "
                f"{kept:.0%} of {row['documents']:,} documents kept")  # fmt: skip
        speed = {arm: row["mb"] / row["cpu_s"] for arm, row in arms.items()}
        tenth = (speed["ours before"] + speed["ours after"]) / 2
        result = {
            "corpus": corpus, "arms": arms, "mb_per_cpu_s": speed,
            "times": {"whole": speed["ours"] / speed["datatrove"], "tenth": tenth / speed["datatrove"],
                      "by default": speed["ours by default"] / speed["datatrove"]},
            "peak_mb": {"tenth": max(arms["ours before"]["peak_mb"], arms["ours after"]["peak_mb"]), "whole": arms["ours"]["peak_mb"]},
        }  # fmt: skip
        write_atomic(folder / "speed.json", json.dumps(result, indent=1))
        return result

    def _measure(self, arm: str, folder: Path, part: str) -> dict:
        """Run one arm. What an interrupted attempt left is taken away first, and what it makes at the end."""
        made, corpus = folder / "made" / arm.replace(" ", "-"), folder / "corpus"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        if arm == "datatrove":
            command = ["-m", "benchmarks.curation_speed", corpus / TENTH, made]
        else:
            sources = [corpus / TENTH] if part == TENTH else [corpus / TENTH, corpus / WHOLE]
            write_atomic(folder / "rules.toml", SAME_WORK)
            rules = [] if arm == "ours by default" else ["--rules", folder / "rules.toml"]
            command = ["-m", "sparing", "data", "curate", *sources, "--out", made / "out", "--workers", "1", *rules, "--json"]
        row = run_on(self.cpu, [sys.executable, *map(str, command)], made / "log.txt")
        row["documents"], row["kept"] = _counts(json.loads(row.pop("said")), made)
        shutil.rmtree(made)
        return row

    @staticmethod
    def told(result: dict) -> None:
        times, peak = result["times"], result["peak_mb"]
        say(f"{times['whole']:.1f} × as fast per core as datatrove ({times['tenth']:.1f} × on the same tenth, "
            f"{times['by default']:.1f} × by default); "
            f"{peak['tenth']:.0f} MB of memory for a tenth, {peak['whole']:.0f} MB for all")  # fmt: skip


def make_corpus(data: tuple[str, ...], folder: Path, size: float) -> dict:
    """Write JSON lines until their texts come to `size` bytes: a tenth of the documents, drawn, in `tenth`, the others in `whole`. -> of
    both the documents and bytes."""
    counts = {name: {"documents": 0, "bytes": 0} for name in (TENTH, WHOLE)}
    shutil.rmtree(folder, ignore_errors=True)
    files: dict = {}
    dice = random.Random(0)
    for number, text in enumerate(varied(data)):
        name = TENTH if dice.random() < 0.1 else WHOLE
        counted = counts[name]
        place = folder / name / f"{counted['bytes'] // FILE_BYTES:05d}.jsonl"
        if name not in files or files[name].name != str(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            if name in files:
                files[name].close()
            files[name] = open(place, "w", encoding="utf-8")
        files[name].write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n")
        counted["documents"] += 1
        counted["bytes"] += len(text.encode())
        if sum(row["bytes"] for row in counts.values()) >= size:
            break
    for file in files.values():
        file.close()
    return counts


def varied(data: tuple[str, ...]) -> Iterator[str]:
    """The documents behind `data` over and over, always the same ones in the same order; each time with other words for CHANGED of them,
    drawn as often as the data has them."""
    known = [word for text in islice(_long(data), 2000) for word in text.split(" ") if word and "\n" not in word]
    number = 0
    while True:
        before = number
        for text in _long(data):
            dice = random.Random(number)
            words = text.split(" ")
            for at in dice.sample(range(len(words)), max(1, round(CHANGED * len(words)))):
                if "\n" not in words[at]:
                    words[at] = dice.choice(known)
            text = " ".join(words)
            if dice.random() < MANGLED:
                text = MANGLINGS[dice.choice(list(MANGLINGS))](text, dice)
            number += 1
            if text.strip():
                yield text
        if number == before:
            raise SystemExit(f"no text in {', '.join(data)}")


def _long(data: tuple[str, ...]) -> Iterator[str]:
    """With LF for line ends, which datatrove's filters take for granted."""
    return (text.replace("\r\n", "\n") for _, text in pieces_in_turn(data) if len(text) >= LEAST)


def run_on(cpu: int, command: list[str], log: Path) -> dict:
    """Run a command on one core. -> wall and CPU seconds and the peak of the resident memory, of it and its children; and `said`, what it
    printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    begun = time.perf_counter()
    with open(log, "wb") as errors:
        command = ["taskset", "-c", str(cpu), *command]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}: {log}")
    seconds = time.perf_counter() - begun
    return {"wall_s": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024, "said": said.decode()}


def _counts(said: dict, made: Path) -> tuple[int, int]:
    """Documents in and kept."""
    if "documents" in said:
        return said["documents"]["in"], said["documents"]["out"]
    lines = dict.fromkeys(("ruled", "kept"), 0)
    for name in lines:
        for file in (made / name).glob("*.jsonl.gz"):
            with gzip.open(file) as rows:
                lines[name] += sum(1 for _ in rows)
    return said["in"], lines["kept"]


def datatrove(source: str, out: str) -> dict:
    """Its pipeline, in the steps of FineWeb's: rules, the four steps of MinHash, personal data."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    at = {name: str(Path(out) / name) for name in ("ruled", "signatures", "buckets", "removed", "kept", "logs")}
    rules = [GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter()]
    steps = [
        [JsonlReader(source), *rules, JsonlWriter(at["ruled"])],
        [JsonlReader(at["ruled"]), MinhashDedupSignature(at["signatures"])],
        [MinhashDedupBuckets(at["signatures"], at["buckets"])],
        [MinhashDedupCluster(at["buckets"], at["removed"])],
        [JsonlReader(at["ruled"]), MinhashDedupFilter(at["removed"]), PIIFormatter(), JsonlWriter(at["kept"])],
    ]
    seconds = []
    for number, step in enumerate(steps):
        begun = time.perf_counter()
        tasks = 14 if number == 2 else 1  # a task for each band
        LocalPipelineExecutor(step, tasks=tasks, workers=1, logging_dir=f"{at['logs']}/{number}").run()
        seconds.append(time.perf_counter() - begun)
    return {"in": sum(sum(1 for _ in open(file, "rb")) for file in Path(source).glob("*.jsonl")), "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(datatrove(sys.argv[1], sys.argv[2])))
