"""Compares the held-out bits per byte that a budget of minutes buys, all work counted: our models and the yardstick, run in turn."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict

from sparing.base.config import UserError
from sparing.base.config_file import read_recipe
from sparing.base.messages import say
from sparing.bench.limit import Limit, run_seconds
from sparing.bench.peers import available
from sparing.bench.results import paths_of, results_folder, row, stored_result
from sparing.bench.worker import Worker
from sparing.budget.units import parse_budget
from sparing.kernels.formats import this_machine

RUNS = "dense:2m, moe:2m, dense:5m, moe:5m, dense+mtp:5m, moe+mtp:5m, dense:20m, moe:20m, yardstick:20m"
WISHES: dict[str, dict] = {
    "auto": {},
    # More leading dense layers than any model has: no layer is left for experts, whatever depth is resolved.
    "dense": {"num_dense_layers": 1000, "mtp_depth": 0},
    "dense+mtp": {"num_dense_layers": 1000, "mtp_depth": 1},
    "moe": {"n_routed_experts": 16, "mtp_depth": 0},
    "moe+mtp": {"n_routed_experts": 16, "mtp_depth": 1},
}
"""What each of our sides sets of the model; all else is derived from the budget."""
SIDES = (*WISHES, "yardstick")
PEER = "benchmarks.yardstick"


def quality(
    data: str | Sequence[str],
    val: str | Sequence[str],
    runs: str = RUNS,
    yardstick: str = "256x6@2e-3",
    yardstick_batch: int = 16,
    context: int = 512,
    val_bytes: int | None = None,
    recipe: str | None = None,
    threads: int = 2,
    seed: int = 0,
    out: str | None = None,
    limit: str | None = None,
) -> list[dict]:
    """One row for each of `runs` ("SIDE:BUDGET, ...", sides: auto dense dense+mtp moe moe+mtp yardstick).

    Each run is a process of its own with an empty $SPARING_HOME, so that its budget pays for tokenising and calibrating too. All are
    scored on the same documents in windows of `context` tokens, outside the budget; ours in windows of their own context too.
    recipe: a TOML file of wishes for all of ours. out: a folder that keeps runs and results; results that are there are not measured again.
    Each side trains in its own fastest number format: ours as `resolve` chooses, the yardstick in what this machine trains in.
    limit: time of the whole figure; default: what runs with these budgets may take, each its own share.
    """
    plan = parse_runs(runs)
    if not (yardsticks := "yardstick" in dict(plan) and available("the yardstick, which is trained in transformers,")):
        plan = [(side, budget) for side, budget in plan if side != "yardstick"]
    wishes = read_recipe(recipe).wishes
    until = Limit.of_runs(limit, (budget for _, budget in plan))
    dtype = this_machine().training_dtype("cpu")
    if yardsticks:
        with Worker(threads, until) as worker:
            shape = worker.run(f"{PEER}.shape_of", text=yardstick, batch=yardstick_batch)
    results = []
    with results_folder(out) as folder:
        for side, budget in plan:
            arguments = {"data": paths_of(data), "val": paths_of(val), "budget": budget, "contexts": [context], "val_bytes": val_bytes}
            if side == "yardstick":
                train, arguments = f"{PEER}.train_yardstick", arguments | {"yardstick": shape | {"seed": seed}, "dtype": dtype}
            else:
                train, arguments = train_ours, arguments | {"side": side, "wishes": wishes, "seed": seed}
            # The name holds all that shapes a result, so that one is found again only where it would come out alike.
            digest = hashlib.sha256(json.dumps([arguments, threads, dtype], sort_keys=True).encode()).hexdigest()[:8]
            file = folder / f"{side.replace('+', '-')}-{budget.replace('$', 'usd')}-{digest}.json"
            if side != "yardstick":
                arguments["out"] = str(file.with_suffix(""))

            def measure(budget=budget, file=file, train=train, arguments=arguments) -> dict:
                """One run in a fresh process and a fresh $SPARING_HOME; its budget starts before the process does."""
                shutil.rmtree(file.with_suffix(""), ignore_errors=True)  # of an attempt that did not end
                with tempfile.TemporaryDirectory(prefix="sparing-home-") as home:
                    started = time.monotonic()
                    with Worker(threads, until.within(run_seconds(budget)), {"SPARING_HOME": home}) as worker:
                        return worker.run(train, started=started, **arguments)

            results.append(stored_result(file, measure))
            score, tokens, seconds = (results[-1][key] for key in ("bpb", "tokens", "seconds"))
            say(f"{side}, {budget}: {score:.4f} bits per byte, {tokens:,} tokens in {seconds:.0f} s")
    return rows_of(plan, results)


def train_ours(
    side: str,
    data: Sequence[str],
    val: Sequence[str],
    budget: str,
    out: str,
    started: float,
    contexts: Sequence[int],
    val_bytes: int | None = None,
    wishes: dict | None = None,
    seed: int = 0,
) -> dict:
    """`sparing train` as one of SIDES, then its score on `val`; the same keys as `train_yardstick`."""
    import torch

    from sparing.api import load, train
    from sparing.data.sources import documents
    from sparing.evals.bpb import bpb

    wishes = {**(wishes or {}), "model": {**(wishes or {}).get("model", {}), **WISHES[side]}}
    summary = train(list(data), budget, out, wishes, seed=seed, started=started, samples=0)
    spent = time.monotonic() - started
    model = load(out)
    trained = model.config.train
    model.network.compute_dtype = getattr(torch, trained.dtype)  # each side is scored in the arithmetic that it was trained in
    scores = {}
    for context in dict.fromkeys((*contexts, trained.seq_len)):
        texts = (document.text for document in documents(val))
        nll = model.network.nll
        scores[context] = bpb(nll, model.tokenizer, texts, context, batch=max(1, 8192 // context), max_bytes=val_bytes)
    return {
        "bpb": next(iter(scores.values()))["bpb"],
        "bpb_by_context": {context: score["bpb"] for context, score in scores.items()},
        "held_out_bpb": summary["bpb"],
        "loss": summary["loss"],
        "tokens": summary["tokens"],
        "steps": summary["steps"],
        "seconds": spent,
        "tokens_per_s": summary["tokens_per_s"],
        "parameters": summary["parameters"],
        "dtype": trained.dtype,
        "recipe": {"model": asdict(model.config.model), "train": asdict(trained), "optim": asdict(model.config.optim)},
    }


def parse_runs(text: str) -> list[tuple[str, str]]:
    """`dense:5m, yardstick:20m` -> [("dense", "5m"), ("yardstick", "20m")]."""
    plan = []
    for entry in text.split(","):
        side, _, budget = entry.strip().partition(":")
        if side not in SIDES or not re.fullmatch(r"[\w.+$]+", budget):
            raise UserError(f"bench train quality: {entry.strip()!r} is not SIDE:BUDGET, such as dense:5m; sides: {', '.join(SIDES)}")
        parse_budget(budget)
        plan.append((side, budget))
    return plan


def rows_of(plan: list[tuple[str, str]], results: list[dict]) -> list[dict]:
    """Each run of ours beside the yardstick's longest run, where there is one; and the least time in which one of ours was as good."""
    runs = list(zip(plan, results, strict=True))
    yardsticks = [(parse_budget(budget).amount, budget, result) for (side, budget), result in runs if side == "yardstick"]
    _, length, best = max(yardsticks, key=lambda entry: entry[0], default=(0.0, "", None))
    goal = best["bpb"] if best else None
    peer_name = f"Llama-style in transformers, {length}" if best else None
    rows = []
    for (side, budget), result in runs:
        if side != "yardstick":
            formats = {"ours": result["dtype"]} | ({"peer": best["dtype"]} if best else {})
            values = result["bpb"], "bits per byte", goal, peer_name
            rows.append(row(f"held-out text, {side}, {budget}", *values, result=result, formats=formats))
    reached = [(r["seconds"], side, r["dtype"]) for (side, _), r in runs if side != "yardstick" and goal and r["bpb"] <= goal]
    if best:
        seconds, side, ours = min(reached, default=(None, "none of these runs", None))
        more = {"result": best, "formats": {"ours": ours, "peer": best["dtype"]}}
        rows.append(row(f"time to the yardstick's bits per byte, {side}", seconds, "s", best["seconds"], peer_name, **more))
    return rows
