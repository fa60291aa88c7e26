"""Compares the held-out loss after equal tokens in 8 bits and without: paired seeds, the same batches and budget, runs in turn."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from sparing.base.config import UserError
from sparing.base.config_file import read_recipe
from sparing.base.messages import say
from sparing.bench.eight_bits import slow_kind
from sparing.bench.limit import Limit, in_parallel, run_seconds
from sparing.bench.results import paths_of, results_folder, row, stored_result
from sparing.bench.worker import Worker
from sparing.kernels.formats import this_machine

SIDES: dict[str, dict] = {
    "none": {},
    "int8": {"linear": "int8"},
    "fp8": {"linear": "fp8"},
    "storage": {"weights": "bfloat16", "moments": "int8", "activations": "int8"},
}
SIDES |= {f"{kind}+storage": SIDES[kind] | SIDES["storage"] for kind in ("int8", "fp8")}
MODEL = {
    "hidden_size": 192, "num_layers": 5, "num_dense_layers": 5, "intermediate_size": 576, "num_heads": 3, "q_lora_rank": 96,
    "kv_lora_rank": 48, "mtp_depth": 0, "vocab_size": 4096,
}  # fmt: skip
"""3 million parameters, the embedding among them. Dense: two runs of a mixture of this size drift 0.4 % apart whatever distinguishes them,
twice as far or more (LAB.md), which five pairs cannot see through."""
TRAIN = {"seq_len": 256, "batch_size": 16, "micro_batch_size": 16, "replicas": 1, "compile": False, "evals": 0, "short_seq_len": None}
REQUIRED, MOONSHOT = 0.0025, 0.001
FAR = 3.0
"""By default int8 is left out where the processor multiplies it so many times slower than float32."""
T_975 = (0.0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, 97.5 %, by degrees of freedom up to 10."""


def precision_loss(
    data: str | Sequence[str],
    val: str | Sequence[str],
    tokens: str = "6Mtok",
    seeds: int = 5,
    sides: str | None = None,
    val_bytes: int = 1_000_000,
    recipe: str | None = None,
    out: str | None = None,
    jobs: int = 1,
    limit: str | None = None,
) -> list[dict]:
    """Rows for each of `sides`: the relative difference of the held-out loss to 16 bits, as the upper end of its 95 % interval over seeds,
    which counts, and as its mean; and the least share of the linears' multiplications that was in 8 bits at any measurement.

    The other side, and what is not in 8 bits on our side, computes in what training multiplies in on this machine. sides: default: int8 and
    fp8, without int8 where the processor multiplies it far slower than float32. Every run is one thread in a process of its own, scored on
    `val` with the weights as saved. recipe: a TOML file of wishes over the figure's model. out: a folder that keeps the runs: finished
    ones are not made again, others go on. jobs: runs at a time. limit: time of the whole figure; default: what runs with this budget may
    take, each its own share.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = [side.strip() for side in sides.split(",")] if sides else _sides_here(device)
    for side in wanted:
        if side not in SIDES or side == "none":
            raise UserError(f"bench precision loss: {side!r} is no side; choose from {', '.join(s for s in SIDES if s != 'none')}")
        if sides and (slow := slow_kind(SIDES[side].get("linear", "none"), device)):
            say(f"--sides {slow}")
    if not 2 <= seeds <= len(T_975):
        raise UserError(f"bench precision loss: --seeds {seeds}: give 2 to {len(T_975)}")
    wishes = read_recipe(recipe).wishes
    sides_of_a_pair, dtype = ("none", *wanted), this_machine().training_dtype(device)
    with results_folder(out) as folder:
        arguments = {"data": paths_of(data), "val": paths_of(val), "budget": tokens, "wishes": wishes, "val_bytes": val_bytes}
        arguments["dtype"] = dtype
        # A pair is complete before the next begins: what is there can be looked at.
        runs = [{**arguments, "seed": seed, "side": side} for seed in range(seeds) for side in sides_of_a_pair]
        until = Limit.of_runs(limit, [tokens] * len(runs))
        made = in_parallel(jobs, until, partial(_run, folder, until), runs)
        results = {side: made[i :: len(sides_of_a_pair)] for i, side in enumerate(sides_of_a_pair)}
    return [line for side in wanted for line in rows_of(side, results["none"], results[side], tokens)]


def _sides_here(device: str) -> list[str]:
    slow = slow_kind("int8", device)
    if slow and device == "cpu" and this_machine().slowness("int8") > FAR:
        say(f"skipped: {slow}; --sides int8 trains in it all the same")
        return ["fp8"]
    return ["int8", "fp8"]


def _run(folder: Path, until: Limit, arguments: dict) -> dict:
    """`train_side` in a process with one thread, unless the folder has its result."""
    side, seed = arguments["side"], arguments["seed"]
    digest = hashlib.sha256(json.dumps([arguments, SIDES[side], MODEL, TRAIN], sort_keys=True).encode()).hexdigest()[:8]
    file = folder / f"{side}-{seed}-{digest}.json"

    def measure() -> dict:
        limit = until.within(run_seconds(arguments["budget"]))
        with Worker(1, limit, {"SPARING_HOME": str(folder / "home")}) as worker:
            return worker.run(train_side, out=str(file.with_suffix("")), **arguments)

    result = stored_result(file, measure)
    say(f"{side}, seed {seed}: loss {result['loss']:.5f}, {result['tokens_per_s']:,.0f} tokens/s")
    return result


def train_side(
    data: Sequence[str], val: Sequence[str], budget: str, seed: int, side: str, dtype: str, wishes: dict, val_bytes: int, out: str
) -> dict:
    """`sparing train` with one precision over `dtype`, then its loss on `val`. A run that was interrupted goes on."""
    from sparing.api import load, resume, train
    from sparing.base.config_file import Wishes
    from sparing.base.files import read_lines
    from sparing.base.run import RunFolder
    from sparing.data.sources import documents
    from sparing.evals.bpb import bpb

    base = {"model": MODEL, "train": {**TRAIN, "threads": 1, "dtype": dtype}, "precision": SIDES[side]}
    finished = Path(out, "state/summary.json")
    if finished.exists():
        summary = json.loads(finished.read_text())
    elif Path(out, "config.toml").exists():
        summary = resume(out, samples=0)
    else:
        shutil.rmtree(out, ignore_errors=True)
        summary = train(list(data), budget, out, Wishes.of(base, wishes), seed=seed, samples=0)
    model = load(out)
    texts = (document.text for document in documents(val))
    score = bpb(model.network.nll, model.tokenizer, texts, model.config.train.seq_len, batch=32, max_bytes=val_bytes)
    lines = read_lines(RunFolder.open(out).metrics_file)
    shares = [line[f"eight_bit_{d}"] for line in lines for d in ("forward", "dgrad", "wgrad") if f"eight_bit_{d}" in line]
    return {
        "loss": score["loss"], "bpb": score["bpb"], "train_loss": summary["loss"], "tokens": summary["tokens"], "seed": seed,
        "tokens_per_s": summary["tokens_per_s"], "skipped": summary["skipped"], "active": summary["active_parameters"],
        "dtype": model.config.train.dtype, "share": min(shares, default=0.0), "moves": sum("precision" in line for line in lines),
    }  # fmt: skip


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval), by Student's t: pairs are few."""
    n = len(differences)
    mean = sum(differences) / n
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    return mean, T_975[n - 1] * deviation / math.sqrt(n)


def rows_of(side: str, plain: list[dict], ours: list[dict], tokens: str) -> list[dict]:
    """The upper end against what is required; the mean beside it."""
    mean, half = interval([mine["loss"] / theirs["loss"] - 1 for mine, theirs in zip(ours, plain, strict=True)])
    formats, paired = {"formats": {"ours": side, "peer": plain[0]["dtype"]}}, f"the same seeds in {plain[0]['dtype']}"
    more = {"mean": mean, "low": mean - half, "high": mean + half, "moonshot": MOONSHOT, "results": ours, "peer_results": plain, **formats}
    name = f"loss, {side}, {tokens}: relative difference, upper end of 95 %"
    lines = [row(name, mean + half, "of the loss", REQUIRED, f"required; {paired}", len(ours), **more)]
    lines.append(row(f"loss, {side}, {tokens}: mean of the difference", mean, "of the loss", None, paired, len(ours), half=half, **formats))
    if SIDES[side].get("linear"):
        least = min(result["share"] for result in ours)
        name = f"share in 8 bits, {side}, least of any direction"
        lines.append(row(name, least, "of the linears' FLOPs", 0.9, "required", len(ours), **formats))
    return lines
