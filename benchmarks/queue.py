"""Twelve real jobs of mixed kinds in one queue: how busy it keeps the machine, and what its plan was worth.

python -m benchmarks.queue --books BOOKS/train --val BOOKS/val --out FOLDER

The same command goes on where it was interrupted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

import sparing
from sparing.base.files import write_atomic
from sparing.base.messages import say
from sparing.bench.results import stored_result

REQUIRED = 0.95
"""Of cores x time until the last job starts."""


@dataclass
class Queue:
    """A queue of twelve jobs that curate, make exercises, train, fine-tune and score: about 17 core-minutes."""

    books: str
    """Folder of texts to train on."""
    val: str
    """Folder of texts to curate and to score on."""
    out: str
    """Folder for the queue, its runs and the result."""
    scale: float = 1.0
    """Of all budgets: 0.5 takes half as long."""

    def __call__(self) -> dict:
        """{"busy", "required", "cpu_share", "jobs", ...}; also in OUT/result.json."""
        folder = Path(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        return stored_result(folder / "result.json", lambda: self._run(folder))

    def _run(self, folder: Path) -> dict:
        file = folder / "jobs.toml"
        if not file.exists():
            write_atomic(file, self._text())
        environment = os.environ | {"SPARING_HOME": str(folder.resolve() / "home"), "PYTHONPATH": str(Path(sparing.__file__).parent.parent)}
        words = [sys.executable, "-m", "sparing", "launch", "--queue", "jobs.toml", "--json"]
        process = subprocess.run(words, stdout=subprocess.PIPE, cwd=folder, env=environment)
        if process.returncode not in (0, 1):
            say(f"the queue ended with status {process.returncode}: give the same command again")
            sys.exit(process.returncode)
        summary = json.loads(process.stdout)
        core_s, cpu_s = (sum(row[key] for row in summary["jobs"]) for key in ("core_s", "cpu_s"))
        predicted = [abs(row["seconds"] / row["predicted_s"] - 1) for row in summary["jobs"] if row["seconds"]]
        result = {"busy": summary["busy"], "required": REQUIRED, "cpu_share": cpu_s / core_s, "worst_prediction": max(predicted)}
        if process.returncode:
            say(f"{summary['failed']} jobs failed: {folder}/jobs.toml.queue has their logs; the same command tries them again")
            print(json.dumps(result | summary, indent=1))
            sys.exit(1)
        return result | summary

    def _text(self) -> str:
        """The queue's file: on two cores each job but one has one core."""
        books, val = str(Path(self.books).resolve()), str(Path(self.val).resolve())

        def s(seconds: float) -> str:
            return f"{max(20, round(self.scale * seconds))}s"

        def train(out: str, budget: str, *more: str, data: str = books) -> list[str]:
            return ["train", "--data", data, "--budget", budget, "--out", f"runs/{out}", "--samples", "0", *more]

        small = ["--model.hidden-size", "128", "--model.num-layers", "2", "--model.vocab-size", "1024"]
        jobs: list[dict] = [
            {"command": ["data", "curate", val, "--out", "clean"]},
            {"command": "data synth countdown words --count 600 --form chats --out chats", "time": "20s"},
            {"command": train("base", s(150)), "priority": 1},
            {"command": train("further", s(60), "--from", "runs/base"), "cores": 2, "priority": 1},
            {"command": ["sft", "runs/base", "--data", "chats", "--budget", s(60), "--out", "runs/taught"]},
            {"command": ["eval", "runs/base", "--data", val], "name": "score", "deadline": s(1200)},
            {"command": train("curated", s(60), "--from", "runs/base", data="clean")},
            {"command": train("tokens", f"{max(100, round(self.scale * 400))}ktok", *small)},
            {"command": train("small", s(45), *small), "deadline": s(240)},
            {"command": train("due", s(60), "--from", "runs/base"), "deadline": s(1200)},
            {"command": train("background", s(240)), "preemptible": True},
            {"command": train("more-background", s(150), *small), "preemptible": True},
        ]
        lines = [f'least_run = "{s(30)}"']
        for job in jobs:
            lines += ["", "[[job]]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in job.items())]
        return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(json.dumps(tyro.cli(Queue)(), indent=1))
