"""What a budget buys from an open model and from scratch: forecast, runs, scores outside the budget. What is in --out is not done again.

python -m benchmarks.going_on --data BOOKS/train --val BOOKS/val --base RUN --budget 5m --out FOLDER
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

import sparing
from sparing.base.files import write_atomic
from sparing.base.messages import say
from sparing.bench.results import stored_result
from sparing.data.sources import documents
from sparing.evals.select import select


@dataclass
class GoingOn:
    """Forecast, train and score a run from an open model, and runs from scratch beside it."""

    data: str
    """What both are trained on."""
    val: str
    """What all are scored on: equal beginnings of its documents."""
    base: str
    """The run folder of the open model (`sparing import`)."""
    out: str
    """Folder for runs and results."""
    budget: str = "5m"
    val_bytes: int = 300_000
    scratch: tuple[str, ...] = ("5m", "20m")
    """Budgets of the runs from scratch beside it."""

    def __call__(self) -> dict:
        """The figure's numbers, also in OUT/result.json."""
        folder = Path(self.out)
        (folder / "val").mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(select((document.text for document in documents([self.val])), self.val_bytes)):
            write_atomic(folder / "val" / f"{number:03d}.txt", text)
        runs = {"from the open model": (self.budget, ["--from", self.base])}
        runs |= {f"from scratch {budget}": (budget, []) for budget in self.scratch}
        plan = self._kept("plan", "plan", "--data", self.data, "--budget", self.budget, "--compare", "--from", self.base)
        rows = [self._scored("the base", self.base)]
        for name, (budget, more) in runs.items():
            run = folder / f"run-{name.replace(' ', '-')}"
            if not (run / "state" / "summary.json").exists():
                shutil.rmtree(run, ignore_errors=True)
            summary = self._kept(f"{run.name}", "train", "--data", self.data, "--budget", budget, "--out", str(run), *more)
            forecast = json.loads((run / "state" / "prediction.json").read_text())
            numbers = {key: forecast[key] for key in ("gain", "tokens", "tokens_per_s", "bpb") if key in forecast}
            measured = {key: summary.get(key) for key in ("tokens", "tokens_per_s", "seconds", "bpb", "before", "after")}
            rows.append(self._scored(name, str(run)) | {"forecast": numbers, "measured": measured})
        result = {"buy": plan["buy"], "why": plan["why"], "scored": plan["scored"], "rows": rows}
        write_atomic(folder / "result.json", json.dumps(result, indent=1))
        return result

    def _scored(self, name: str, run: str) -> dict:
        score = self._kept(f"score-{name.replace(' ', '-')}", "eval", run, "--data", str(Path(self.out) / "val"))
        return {"name": name, **{key: score[key] for key in ("bpb", "bytes", "context", "dtype")}}

    def _kept(self, name: str, *command: str) -> dict:
        """What `sparing COMMAND --json` says, in a process of its own with a home of its own; kept as OUT/NAME.json."""

        def ask() -> dict:
            say(f"sparing {' '.join(command)}")
            source = str(Path(sparing.__file__).parent.parent)
            environment = os.environ | {"SPARING_HOME": str(Path(self.out) / "home"), "PYTHONPATH": source}
            words = [sys.executable, "-m", "sparing", *command, "--json"]
            return json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True, env=environment).stdout)

        return stored_result(Path(self.out) / f"{name}.json", ask)


if __name__ == "__main__":
    print(json.dumps(tyro.cli(GoingOn)(), indent=1))
