"""Compares a plan with the run that follows it: the errors, and whether they lie inside the stated intervals."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from sparing.base.config import UserError
from sparing.base.hardware import home
from sparing.base.messages import say
from sparing.bench.limit import Limit, run_seconds
from sparing.bench.results import paths_of, results_folder, row, stored_result
from sparing.bench.worker import Worker
from sparing.budget.units import parse_budget

RUNS = "auto:1m, auto:90s, auto:2m, auto:3m, auto:5m, auto:10m, dense64:1m, moe96:2m, dense192:2m, moe256:4m, dense384:3m, moe512:6m"
"""SIDE:BUDGET; a side is `auto` (resolved) or `dense` or `moe` with a hidden size."""
FIGURES = {"tokens_per_s": "tokens/s", "memory_bytes.total": "bytes", "bpb": "bits per byte"}
"""Compared, of `account.receipt.COMPARED`, with their units."""


def forecast(
    data: str | Sequence[str], runs: str = RUNS, threads: int = 2, seed: int = 0, out: str | None = None, limit: str | None = None
) -> list[dict]:
    """Predict every run, then make them, each in a process of its own. Rows: each figure of each run, then each figure's median error.

    All predictions are made first, from the calibration and the laws in $SPARING_HOME (measured now where there are none), and no run
    changes those: each has a copy of them in a home of its own, where the corpus is not tokenised yet.
    out: a folder that keeps predictions and results; runs that are in it are not made again. limit: time of the whole figure; default: what
    runs with these budgets may take, each its own share.
    """
    sides = parse_sides(runs)
    until = Limit.of_runs(limit, (budget for _, budget in sides))
    with results_folder(out) as folder:

        def plan_all() -> dict:
            with Worker(threads, until) as worker:
                plans = worker.run(plans_of, data=paths_of(data), sides=sides)
            _copy_knowledge(home(), folder / "home")
            return {"runs": runs, "plans": plans}

        predicted = stored_result(folder / "predictions.json", plan_all)
        if predicted["runs"] != runs:
            raise UserError(f"--out {out}: its predictions are of other runs ({predicted['runs']}); choose another folder")
        results = []
        for number, ((side, budget), plan) in enumerate(zip(sides, predicted["plans"], strict=True)):
            file = folder / f"{number:02d}-{side}-{budget}.json"

            def measure(budget=budget, plan=plan, file=file) -> dict:
                shutil.rmtree(file.with_suffix(""), ignore_errors=True)  # of an attempt that did not end
                with tempfile.TemporaryDirectory(prefix="sparing-home-") as fresh:
                    _copy_knowledge(folder / "home", Path(fresh))
                    arguments = {"data": paths_of(data), "budget": budget, "out": str(file.with_suffix("")), "seed": seed, "plan": plan}
                    started = time.monotonic()
                    with Worker(threads, until.within(run_seconds(budget)), {"SPARING_HOME": fresh}) as worker:
                        return worker.run(train_as_planned, started=started, **arguments)

            results.append(stored_result(file, measure))
            misses = ", ".join(f"{name} {miss['relative']:+.1%}" for name, miss in results[-1]["difference"].items() if name in FIGURES)
            say(f"{side}, {budget}: {misses}")
    return _rows([f"{side}, {budget}" for side, budget in sides], predicted["plans"], results)


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
    """What a side sets of the model. More leading dense layers than any model has leave no layer for experts."""
    kind, width = re.fullmatch(r"([a-z]+)(\d*)", side).groups()
    if kind == "auto":
        return {}
    return {"model": {"hidden_size": int(width), **({"n_routed_experts": 16} if kind == "moe" else {"num_dense_layers": 1000})}}


def plans_of(data: Sequence[str], sides: Sequence[Sequence[str]]) -> list[dict]:
    """`sparing plan --json` of each side; the calibration is measured first where there is none."""
    from sparing.planning.plan import plan

    return [plan(data=list(data), budget=budget, wishes=wishes_of(side)) for side, budget in sides]


def _copy_knowledge(source: Path, target: Path) -> None:
    """Copy what a home knows of its machine, but no corpus."""
    for part in ("calibration", "laws", "native"):
        if (source / part).exists():
            shutil.copytree(source / part, target / part, dirs_exist_ok=True)


def train_as_planned(plan: dict, data: Sequence[str], budget: str, out: str, seed: int, started: float) -> dict:
    """`sparing train` with the configuration of the plan -> its receipt's `actual`, its `difference` from the plan, the machine's load."""
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
            before, after, miss = at(plan, name), at(result["actual"], name), result["difference"][name]
            more = {"low": before["low"], "high": before["high"], "inside": miss["inside"]}
            more["formats"] = dict.fromkeys(("ours", "peer"), plan["config"]["train"]["dtype"])
            rows.append(row(f"{what}, {unit}", before["value"], unit, after["value"], "the run", **more))
            errors.append(abs(miss["relative"]))
            inside.append(miss["inside"])
            widths.append((before["high"] - before["low"]) / 2 / before["value"])
        rest = {"half_width_percent": 100 * median(widths), "intervals_hold_percent": 100 * sum(inside) / len(inside)}
        rows.append(row(f"median error, {unit}", 100 * median(errors), "%", runs=len(errors), **rest))
        held = f"{sum(inside)} of {len(inside)} in the interval, its half-width {median(widths):.1%}"
        say(f"{unit}: median error {median(errors):.1%}, {held}")
    return rows
