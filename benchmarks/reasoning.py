"""What rewards buy: pass@1 and pass@8 on held-out problems before and after `grpo`, and after `sft` on right answers in the same time.

python -m benchmarks.reasoning --base RUN --task add --warm 2m --budget 30m --out FOLDER [--mixture RUN]

What is in --out is not done again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

import sparing
from sparing.adapt.reason import as_chat
from sparing.adapt.rewards import load_task, verify
from sparing.adapt.rollouts import Asker
from sparing.base.files import write_atomic
from sparing.base.messages import say
from sparing.base.run import RunFolder
from sparing.bench.results import stored_result
from sparing.data.chat import template_text
from sparing.infer.engine import Engine
from sparing.infer.request import Sampling


@dataclass
class Reasoning:
    """Train by rewards and by right answers, and score all on the same held-out problems, outside the budget."""

    base: str
    """A run that solves the task now and then."""
    out: str
    """Folder for runs and results."""
    task: str = "add"
    budget: str = "30m"
    """Of each run."""
    warm: str | None = None
    """Budget of an `sft` on right answers that comes before all, where the base hardly ever solves the task."""
    seeds: int = 3
    problems: int = 512
    """Held-out ones that are scored."""
    samples: int = 8
    mixture: str | None = None
    """A run of a mixture: trained with and without replayed routes."""
    max_tokens: int = 64
    """Of an answer, in training and in scoring."""
    method: str = "lora"
    """Of learning, by rewards as by right answers: lora or full."""
    options: str = ""
    """More of them for `grpo`, such as "--grpo.problems 16 --optim.lr 3e-4"."""

    def __call__(self) -> dict:
        """The figure's numbers, also in OUT/result.json."""
        folder = Path(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        rows, base = [self._scored("base", self.base)], self.base
        answers = folder / "answers.jsonl"
        write_atomic(answers, "".join(json.dumps(line) + "\n" for line in self._answers()))
        if self.warm is not None:
            base = self._merged(self._trained("warm", "sft", base, "--data", str(answers), budget=self.warm))
            rows.append(self._scored(f"after {self.warm} of sft", base))
        for seed in range(self.seeds):
            run = self._trained(f"grpo-{seed}", "grpo", base, *self._options, "--seed", str(seed))
            rows.append(self._scored(f"grpo, seed {seed}", run) | self._of(run))
        run = self._trained("sft", "sft", base, "--data", str(answers), "--method", self.method)
        rows.append(self._scored("sft on right answers", run))
        if self.mixture is not None:
            rows.append(self._scored("mixture", self.mixture))
            for name, replay in (("with", "true"), ("without", "false")):
                run = self._trained(f"mixture-{name}", "grpo", self.mixture, *self._options, "--grpo.replay", replay)
                rows.append(self._scored(f"mixture, grpo {name} replay", run) | self._of(run))
        result = {"task": self.task, "budget": self.budget, "problems": self.problems, "rows": rows}
        write_atomic(folder / "result.json", json.dumps(result, indent=1))
        return result

    @property
    def _options(self) -> list[str]:
        return ["--task", self.task, "--grpo.max-tokens", str(self.max_tokens), "--method", self.method, *shlex.split(self.options)]

    def _answers(self) -> list[dict]:
        """The task's problems with their answers, as conversations."""
        return [as_chat(problem.prompt, problem.answer) for problem in load_task(self.task).problems]

    def _merged(self, run: str) -> str:
        """An adapter run with its base, as one run."""
        out = Path(f"{run}-merged")
        if not (out / "config.toml").exists():
            sparing.merge(run, str(out))
        return str(out)

    def _trained(self, name: str, verb: str, base: str, *more: str, budget: str | None = None) -> str:
        """A run of the budget; begun anew where one before was interrupted."""
        run = Path(self.out) / f"run-{name}"
        if not (run / "state" / "summary.json").exists():
            shutil.rmtree(run, ignore_errors=True)

        def ask() -> dict:
            command = [verb, base, "--budget", budget or self.budget, "--out", str(run), *more]
            say(f"sparing {' '.join(command)}")
            environment = os.environ | {"PYTHONPATH": str(Path(sparing.__file__).parent.parent)}
            words = [sys.executable, "-m", "sparing", *command, "--json"]
            return json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True, env=environment).stdout)

        stored_result(Path(self.out) / f"{name}.json", ask)
        return str(run)

    def _of(self, run: str) -> dict:
        """What the run's own metrics say: steps, mean mismatch, old text."""
        summary = json.loads((Path(run) / "state" / "summary.json").read_text())
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "mismatch" in line]
        mean = {name: sum(line[name] for line in steps) / max(1, len(steps)) for name in ("mismatch", "corrected", "no_signal", "length")}
        old = {when: summary[when].get("old", {}).get("loss") for when in ("before", "after")}
        return {"steps": summary["steps"], "seconds": summary["seconds"], "old_loss": old, **mean}

    def _scored(self, name: str, run: str) -> dict:
        """pass@1 by sampling at temperature 1 and by the likeliest answer, pass@k, and the mean length."""

        def ask() -> dict:
            say(f"scoring {run}")
            task, folder, most = load_task(self.task), RunFolder.open(run), self.max_tokens
            held_out = task.held_out[: self.problems]
            with Engine(run, weights="float32", max_batch=64, max_queue=1 << 20, speculate=False) as engine:
                prompt = Asker(engine.tokenizer, template_text(folder))
                asked = [prompt(problem) for problem in held_out]
                likeliest = [engine.submit(ids, Sampling(most, 0)) for ids in asked]
                sampled = [[engine.submit(ids, Sampling(most, seed=k)) for k in range(self.samples)] for ids in asked]
                greedy = [verify(problem, one.text()).reward for problem, one in zip(held_out, likeliest, strict=True)]
                found = [[verify(problem, one.text()).reward for one in some] for problem, some in zip(held_out, sampled, strict=True)]
                length = sum(one.usage["completion_tokens"] for some in sampled for one in some) / (len(held_out) * self.samples)
            flat = [reward for some in found for reward in some]
            passed = sum(any(some) for some in found) / len(found)
            scores = {"pass_at_1": sum(flat) / len(flat), "greedy": sum(greedy) / len(greedy), f"pass_at_{self.samples}": passed}
            return {"name": name, **scores, "length": length, "problems": len(held_out)}

        return stored_result(Path(self.out) / f"score-{name.replace(' ', '-').replace(',', '')}.json", ask)


if __name__ == "__main__":
    print(json.dumps(tyro.cli(Reasoning)(), indent=1))
