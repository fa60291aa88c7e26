"""What the plan says beforehand against what the run then takes and reaches: errors, and whether the stated intervals hold them."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from sparing.base.config import UserError
from sparing.base.files import write_atomic
from sparing.base.hardware import home
from sparing.bench.limit import Limit, run_seconds
from sparing.bench.report import paths_of, row, say
from sparing.bench.worker import Worker
from sparing.budget.units import parse_budget

RUNS = "auto:1m, auto:90s, auto:2m, auto:3m, auto:5m, auto:10m, dense64:1m, moe96:2m, dense192:2m, moe256:4m, dense384:3m, moe512:6m"
"""SIDE:BUDGET; a side is `auto` (resolved) or `dense` or `moe` with a hidden size."""
FIGURES = {"tokens_per_s": "tokens/s", "memory_bytes.total": "bytes", "bpb": "bits per byte"}
"""Compared, of `account.receipt.COMPARED`, with their units."""


def forecast(
    data: str | Sequence[str], runs: str = RUNS, threads: int = 2, seed: int = 0, out: str | None = None, limit: str | None = None
) -> list[dict]:
    """Predict every run, then make them, each in a process of its own; rows: each figure of each run, then each figure's median error.

    All predictions are made first, by the calibration and the laws of $SPARING_HOME (measured now where there are none), and no run
    changes those: each has a copy of them in a home of its own, where the corpus is not tokenised yet.
    out: a folder that keeps predictions and results; runs that are in it are not made again. limit: of all that in time; default: what
    runs with these budgets may take, each its own share.
    """
    sides = parse_sides(runs)
    until = Limit.of_runs(limit, (budget for _, budget in sides))
    with ExitStack() as stack:
        folder = Path(out or stack.enter_context(tempfile.TemporaryDirectory(prefix="sparing-bench-"))).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        recorded = folder / "predictions.json"
        if not recorded.exists():
            with Worker(threads, until) as worker:
                plans = worker.ask("run", function="forecast.foretell", data=paths_of(data), sides=sides)["plans"]
            _copy_knowledge(home(), folder / "home")
            write_atomic(recorded, json.dumps({"runs": runs, "plans": plans}, indent=1))
        known = json.loads(recorded.read_text())
        if known["runs"] != runs:
            raise UserError(f"--out {out}: its predictions are of other runs ({known['runs']}); choose another folder")
        results = []
        for number, ((side, budget), plan) in enumerate(zip(sides, known["plans"], strict=True)):
            kept = folder / f"{number:02d}-{side}-{budget}.json"
            if not kept.exists():
                shutil.rmtree(kept.with_suffix(""), ignore_errors=True)  # of an attempt that did not end
                share = until.within(run_seconds(budget))
                made = _made(plan, data, budget, kept.with_suffix(""), folder / "home", threads, seed, share)
                write_atomic(kept, json.dumps(made, indent=1))
            results.append(json.loads(kept.read_text()))
            misses = ", ".join(f"{name} {found['relative']:+.1%}" for name, found in results[-1]["difference"].items() if name in FIGURES)
            say(f"{side}, {budget}: {misses}")
    names = [f"{side}, {budget}" for side, budget in sides]
    return _rows(names, known["plans"], results)


def parse_sides(text: str) -> list[tuple[str, str]]:
    """`auto:1m, moe256:4m` -> [("auto", "1m"), ("moe256", "4m")]. Raises UserError."""
    sides = []
    for entry in text.split(","):
        side, _, budget = entry.strip().partition(":")
        if not re.fullmatch(r"auto|(dense|moe)[1-9]\d{1,3}", side):
            raise UserError(f"bench train forecast: {entry.strip()!r} is not SIDE:BUDGET, such as auto:1m, dense192:2m or moe256:4m")
        parse_budget(budget)
        sides.append((side, budget))
    return sides


def wishes_of(side: str) -> dict:
    """What a side forces; more leading dense layers than any model has leave none for experts."""
    kind, width = re.fullmatch(r"([a-z]+)(\d*)", side).groups()
    if kind == "auto":
        return {}
    return {"model": {"hidden_size": int(width), **({"n_routed_experts": 16} if kind == "moe" else {"num_dense_layers": 1000})}}


def foretell(data: Sequence[str], sides: Sequence[Sequence[str]]) -> dict:
    """{"plans": `sparing plan --json` of each side}; the calibration is measured first where there is none."""
    from sparing.planning.plan import plan

    return {"plans": [plan(data=list(data), budget=budget, wishes=wishes_of(side)) for side, budget in sides]}


def _copy_knowledge(source: Path, target: Path) -> None:
    """What a home knows of its machine, but no corpus."""
    for part in ("calibration", "laws", "native"):
        if (source / part).exists():
            shutil.copytree(source / part, target / part, dirs_exist_ok=True)


def _made(plan: dict, data: str | Sequence[str], budget: str, out: Path, known: Path, threads: int, seed: int, limit: Limit) -> dict:
    with tempfile.TemporaryDirectory(prefix="sparing-home-") as fresh:
        _copy_knowledge(known, Path(fresh))
        started = time.monotonic()
        with Worker(threads, limit, {"SPARING_HOME": fresh}) as worker:
            arguments = {"data": paths_of(data), "budget": budget, "out": str(out), "seed": seed, "started": started, "plan": plan}
            return worker.ask("run", function="forecast.train_as_planned", **arguments)


def train_as_planned(plan: dict, data: Sequence[str], budget: str, out: str, seed: int, started: float) -> dict:
    """`sparing train` with the configuration of the plan; -> its receipt's `actual`, and `difference` from the plan."""
    from sparing.account.receipt import difference, receipt
    from sparing.api import train
    from sparing.base.run import RunFolder

    sections = {name: {key: value for key, value in fields.items() if value is not None} for name, fields in plan["config"].items()}
    del sections["budget"]
    train(list(data), budget, out, sections, seed=seed, started=started, samples=0)
    actual = receipt(RunFolder.open(out))["actual"]
    return {"actual": actual, "difference": difference(plan, actual), "load": os.getloadavg()[0]}


def _rows(names: list[str], plans: list[dict], results: list[dict]) -> list[dict]:
    from sparing.account.receipt import at

    rows = []
    for name, unit in FIGURES.items():
        errors, inside, widths = [], [], []
        for what, plan, result in zip(names, plans, results, strict=True):
            before, after, found = at(plan, name), at(result["actual"], name), result["difference"][name]
            more = {"low": before["low"], "high": before["high"], "inside": found["inside"]}
            more["formats"] = dict.fromkeys(("ours", "peer"), plan["config"]["train"]["dtype"])
            rows.append(row(f"{what}, {unit}", before["value"], unit, after["value"], "the run", **more))
            errors.append(abs(found["relative"]))
            inside.append(found["inside"])
            widths.append((before["high"] - before["low"]) / 2 / before["value"])
        rest = {"half_width_percent": 100 * median(widths), "intervals_hold_percent": 100 * sum(inside) / len(inside)}
        rows.append(row(f"median error, {unit}", 100 * median(errors), "%", runs=len(errors), **rest))
        held = f"{sum(inside)} of {len(inside)} in the interval, its half-width {median(widths):.1%}"
        say(f"{unit}: median error {median(errors):.1%}, {held}")
    return rows
