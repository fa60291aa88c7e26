"""What failures cost: a run of several ranks that are killed, told to stop, stopped, or find a full disk or a damaged checkpoint.

python -m benchmarks.chaos --data BOOKS --out FOLDER [--time 20m] [--every 180]

The same run is made twice, undisturbed and with a failure about every three minutes; after each the same command is given again, where it
has ended. Said are the failures with the seconds until the next new step, whether losses and weights are the undisturbed ones to the bit,
and the goodput: the time that the steps take undisturbed, by the time that it took. What is in --out is not done again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import tyro

import sparing
from sparing.base.files import file_sha256, read_lines, write_atomic
from sparing.base.messages import say
from sparing.base.run import RunFolder
from sparing.bench.results import stored_result
from sparing.budget.units import parse_budget

KINDS = ("kill", "term", "stop", "disk", "shard")
"""SIGKILL of a rank; SIGTERM of one, as a machine's notice; SIGSTOP of one; no more room on the disk; a file of the newest checkpoint cut
in half, and then SIGKILL: not of the only one, without which nothing is left to go on from."""
SMALL = """\
[model]
hidden_size = 192
num_layers = 4
num_heads = 3
vocab_size = 4096
"""
ROOM = 10_000
"""Bytes that a file may have where the disk is full."""
END = 8192
"""Bytes of the metrics' end that have a line of a step."""
SETTLED = 5
"""A failure comes when so many steps at least were made since the last."""


@dataclass
class Chaos:
    """Disturb a run of several ranks again and again, and compare it with the undisturbed one."""

    data: str
    out: str
    """Folder for runs and results."""
    time: str = "20m"
    """About what the undisturbed run takes."""
    every: float = 180.0
    """Seconds between failures, on average."""
    interval: float = 6.0
    """Seconds between checkpoints: sqrt(2 x 0.1 x 180), what loses least (Young, Daly) where saving takes 0.1 s. A budget in tokens has
    the same steps between checkpoints throughout."""
    ranks: int = 2
    seed: int = 0
    kinds: tuple[str, ...] = KINDS

    def __call__(self) -> dict:
        """The figure's numbers, also in OUT/result.json."""
        folder = Path(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "recipe.toml", SMALL)
        tokens = stored_result(folder / "tokens.json", self._tokens)["tokens"]
        runs = [RunFolder(folder / name) for name in ("undisturbed", "disturbed")]
        words = self._words("undisturbed", f"{tokens}tok", folder / "recipe.toml")
        undisturbed = stored_result(folder / "undisturbed.json", lambda: self._timed(words))
        # What was measured at its start, such as the fastest kernels, is in its configuration: both round alike.
        words = self._words("disturbed", f"{tokens}tok", runs[0].config_file)
        disturbed = stored_result(folder / "disturbed.json", lambda: self._disturbed(words))
        lines = [[line for line in read_lines(run.metrics_file) if "loss" in line] for run in runs]
        step_s = median(tokens / len(lines[0]) / line["tokens_per_s"] for line in lines[0])
        result = {
            "steps": len(lines[0]),
            "step_s": step_s,
            "same_losses": [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]],
            "same_weights": file_sha256(runs[0].weights_file) == file_sha256(runs[1].weights_file),
            "bpb": [one["summary"]["bpb"] for one in (undisturbed, disturbed)],
            "seconds": [one["seconds"] for one in (undisturbed, disturbed)],
            "goodput": len(lines[1]) * step_s / disturbed["seconds"],
            "undisturbed_goodput": len(lines[0]) * step_s / undisturbed["seconds"],
            "failures": disturbed["failures"],
        }
        write_atomic(folder / "result.json", json.dumps(result, indent=1))
        return result

    def _tokens(self) -> dict:
        """What a run of two minutes learns a second, for as long as is asked."""
        budget = parse_budget(self.time)
        if budget.unit != "s":
            raise SystemExit(f"--time {self.time}: must be a time")
        learnt = self._timed(self._words("first", "120s", Path(self.out) / "recipe.toml"))["summary"]
        return {"tokens": round(learnt["tokens_per_s"] * budget.amount)}

    def _words(self, name: str, budget: str, recipe: Path) -> list[str]:
        more = ("--data", self.data, "--budget", budget, "--seed", "0", "--samples", "0", "--out", str(Path(self.out) / name), "--json")
        often = ("--train.checkpoint-interval-s", str(self.interval))
        return ["launch", "-n", str(self.ranks), "train", str(recipe), *often, *more]

    def _start(self, words: list[str]) -> subprocess.Popen:
        say(f"sparing {' '.join(words)}")
        source = str(Path(sparing.__file__).parent.parent)
        environment = os.environ | {"SPARING_HOME": str(Path(self.out) / "home"), "PYTHONPATH": source}
        return subprocess.Popen([sys.executable, "-m", "sparing", *words], stdout=subprocess.PIPE, env=environment)

    def _timed(self, words: list[str]) -> dict:
        began, process = time.monotonic(), self._start(words)
        told = process.communicate()[0]
        if process.returncode:
            raise SystemExit(f"sparing {' '.join(words)} ended with status {process.returncode}")
        return {"seconds": time.monotonic() - began, "summary": json.loads(told)}

    def _disturbed(self, words: list[str]) -> dict:
        """The run with failures. An interrupted one begins anew, so that its time is counted."""
        run, dice = RunFolder(Path(self.out) / "disturbed"), random.Random(self.seed)
        shutil.rmtree(run.path, ignore_errors=True)
        began, process, failures = time.monotonic(), self._start(words), []
        due, kinds, before = began + dice.expovariate(1 / self.every), [], None
        while True:
            status = process.poll()
            if status == 0:
                break
            if status is not None:
                say(f"it ended with status {status}")
                if (ended := (status, len(failures))) == before:
                    raise SystemExit(f"it ends with status {status} again and again, without a further failure")
                process, before = self._start(words), ended
            now, steps = time.monotonic(), _steps(run)
            open_ = failures[-1] if failures and "again_s" not in failures[-1] else None
            if open_ and steps > open_["step"]:
                open_["again_s"] = now - began - open_["at_s"]
            elif not open_ and now >= due and steps >= (failures[-1]["step"] if failures else 0) + SETTLED and (ranks := _ranks(process)):
                kinds = kinds or dice.sample(self.kinds, len(self.kinds))
                kind = next((kind for kind in reversed(kinds) if kind != "shard" or len(_checkpoints(run)) > 1), None)
                if kind is not None:
                    kinds.remove(kind)
                    failures.append({"kind": kind, "at_s": now - began, "step": steps})
                    say(f"step {steps}: {kind}")
                    _disturb(kind, run, ranks, dice)
                due = max(due + dice.expovariate(1 / self.every), now)
            time.sleep(0.2)
        seconds = time.monotonic() - began
        return {"seconds": seconds, "summary": json.loads(process.communicate()[0]), "failures": failures}


def _steps(run: RunFolder) -> int:
    """The last step of which there are metrics, of the file's end: it is asked often."""
    if not run.metrics_file.exists():
        return 0
    with open(run.metrics_file, "rb") as file:
        file.seek(max(0, run.metrics_file.stat().st_size - END))
        lines = file.read().splitlines()
    found = [json.loads(line) for line in lines[1:] if line.endswith(b"}")]
    return max((line["step"] for line in found if "loss" in line), default=0)


def _checkpoints(run: RunFolder) -> list[Path]:
    """Oldest first."""
    return sorted(run.state.glob("step-*"))


def _ranks(process: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if child.is_running()]


def _disturb(kind: str, run: RunFolder, ranks: list[psutil.Process], dice: random.Random) -> None:
    one = dice.choice(ranks)
    if kind == "disk":
        for rank in ranks:
            rank.rlimit(psutil.RLIMIT_FSIZE, (ROOM, psutil.RLIM_INFINITY))
        return
    if kind == "shard":
        file = dice.choice(sorted(_checkpoints(run)[-1].glob("*.safetensors")))
        half = file.read_bytes()[: file.stat().st_size // 2]
        file.unlink()  # the model for others is the same file
        file.write_bytes(half)
    one.send_signal({"term": signal.SIGTERM, "stop": signal.SIGSTOP}.get(kind, signal.SIGKILL))


def table(result: dict) -> str:
    """The figure as lines of text."""
    lines = [
        f"{one['kind']:>6}  after {one['at_s']:6.0f} s, at step {one['step']:6,}: new steps {one.get('again_s', float('nan')):5.1f} s later"
        for one in result["failures"]
    ]
    same = [what for what in ("losses", "weights") if result[f"same_{what}"]]
    bpb, seconds = ([f"{value:.4f}" for value in result["bpb"]], [f"{value:.0f} s" for value in result["seconds"]])
    lines.append(f"the same to the bit: {' and '.join(same) or 'nothing'}; bits per byte {bpb[0]} undisturbed, {bpb[1]} disturbed")
    lines.append(f"{result['steps']:,} steps of {result['step_s']:.3f} s, in {seconds[0]} and {seconds[1]}")
    lines.append(f"goodput {result['goodput']:.1%} ({result['undisturbed_goodput']:.1%} undisturbed)")
    return "\n".join(lines)


if __name__ == "__main__":
    say(table(tyro.cli(Chaos)()))
