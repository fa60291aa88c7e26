"""What a cluster would do with this code, on paper: every rank's collectives are called on the meta device in a fake world of the real
size and counted (`benchmarks/collectives.py`), and held to the formulas of `budget/ranks.py`; memory and time follow from the latter.

python -m benchmarks.paper --out FOLDER               DeepSeek-V3 on 2,048 H800, layout by layout, beside what was published
python -m benchmarks.paper --preset node8|cluster     a dry run of a preset: its first and last rank

A step is traced with one micro-batch a rank, or as few as a pipeline's schedule runs, in all layers; the formula then gives the whole
step. One core, no GPU; a trace takes ten seconds, with weights cut into 2,048 pieces a few minutes. What is in --out is not done again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from benchmarks.collectives import NODE, step
from sparing.account.prices import device
from sparing.base.config import Budget, Config, ModelConfig, ParallelConfig, PrecisionConfig, UserError
from sparing.base.config_file import read_recipe
from sparing.base.messages import say
from sparing.bench.results import stored_result
from sparing.budget.cluster import device_hours, layout_of, memory_of
from sparing.budget.flops import train_flops
from sparing.budget.memory import PROCESS_BYTES, SPREAD
from sparing.budget.ranks import bubble_of, held, passes, sent
from sparing.model.experts import Router
from sparing.parallel.schedules import CLASSES, bubble, runs
from sparing.planning.places import Given, elsewhere
from sparing.resolve import resolve, words_of

LAYOUTS = tuple(
    ParallelConfig(*layout)
    for layout in (
        ("nothing",), ("optimizer",), ("optimizer", 64), ("optimizer", 256), ("weights", 64), ("weights", 256),
        *(("optimizer", 64, 8, schedule) for schedule in CLASSES), *(("optimizer", 64, 16, schedule) for schedule in CLASSES),
    )
)  # fmt: skip
TRACED = tuple(
    ParallelConfig(*layout) for layout in (("optimizer", 64), ("optimizer", 256), ("weights", 256), ("optimizer", 64, 8, "interleaved"))
)
MFU = 0.40
"""Assumed: share of the peak in bfloat16 that computing alone reaches. V3's whole run reached 39 % of it, with products in FP8."""
INSIDE, OUTSIDE = 160e9, 50e9
"""Bytes a second of a GPU to others of its node (NVLink) and to other nodes (InfiniBand): DeepSeek-V3 §3.2.2."""
PUBLISHED = 180e3
"""H800 hours for a trillion tokens (DeepSeek-V3 §3)."""
STAGES, BATCHES = 16, (32, 128)
"""Of the bubbles: DeepSeek-V3's pipeline, and micro-batches of it. A batch of 15,360 sequences is 120 for each of 128 pipelines."""


@dataclass
class Paper:
    """Count a cluster's collectives, bytes of memory and hours before there is one."""

    preset: str | None = None
    """A dry run of this preset instead: node8 or cluster."""
    out: str | None = None
    """Folder for what was traced."""

    def __call__(self) -> dict:
        """The figure's numbers, also in OUT/result.json."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(self.out or temporary)
            folder.mkdir(parents=True, exist_ok=True)
            result = dry_run(self.preset, folder) if self.preset else figure(folder)
            (folder / f"{self.preset or 'result'}.json").write_text(json.dumps(result, indent=1))
            return result


def preset_config(name: str) -> tuple[Config, int, str]:
    """(configuration as `train` resolves it, ranks, kind of GPU) of a preset with [parallel] and [plan.layout]."""
    read = read_recipe(name)
    if "parallel" not in read.wishes or "layout" not in read.plan:
        raise UserError(f"{name}: no [parallel] and [plan.layout]; nearest: node8, cluster")
    layout = layout_of(read.plan["layout"], "")
    tokens, machine = read.plan["tokens"], elsewhere(layout.machine, "own").machine
    config = resolve(read.wishes, Budget(tokens, "tok"), machine, Given(4 * tokens), lambda _: 1.0, layout.devices).config
    return replace(config, train=replace(config.train, threads=1, replicas=1, compile=False)), layout.devices, layout.machine


def traced(config: Config, rank: int, ranks: int, folder: Path) -> dict:
    """A step of one rank, with one micro-batch, or as few as its schedule runs: bytes by kind of collective, and what the formulas say.
    Kept in `folder`."""
    t, p = config.train, config.parallel
    micro, alike = t.micro_batch_size or 1, ranks // p.stages
    times = next(count for count in range(1, 2 * p.stages + 1) if runs(p.schedule, p.stages, count)) if p.stages > 1 else 1
    short = replace(config, train=replace(t, batch_size=alike * times * micro, device=None, kernels="plain"))

    def trace() -> dict:
        say(f"tracing rank {rank} of {ranks}: {words_of(p)}")
        one = step(short, rank, ranks)
        kinds = [
            {"kind": str(kind), "name": kind.name, "calls": calls, "bytes": one.counter.bytes[kind], "ranks": kind.ranks,
             "apart": kind.apart, "near": one.counter.near[kind], "far": one.counter.far[kind]}
            for kind, calls in one.counter.calls.items()
        ]  # fmt: skip
        return {"kinds": kinds, "by_name": one.counter.by_name(), "weights": one.weights, "moments": one.moments, "peak": one.peak}

    kept = "" if t.recompute else "-kept"
    stages = f"-{p.stages}-{p.schedule}" if p.stages > 1 else ""
    name = f"{p.shard}-{p.experts}{stages}-{config.model.num_layers}-{rank}-of-{ranks}-x{micro}{kept}"
    found = stored_result(folder / f"{name}.json", trace)
    place = rank // alike
    expected, memory = sent(short, ranks, place), held(short, ranks, "plain", place)
    return found | {
        "formula": expected,
        "times": times,
        "largest_difference": max(abs(found["by_name"].get(kind, 0) / count - 1) for kind, count in expected.items()),
        "peak_formula": memory.total - PROCESS_BYTES["cpu"],
    }


def seconds(config: Config, ranks: int, shares: tuple[float, float], machine: str) -> dict[str, float]:
    """Of a whole step: computing, on the rank with most layers, and exchanging by what. shares: of an all-to-all's bytes, to this node and
    to others."""
    t, alike = config.train, ranks // config.parallel.stages
    tokens, (_, longest) = t.batch_size * t.seq_len / ranks, bubble_of(config, ranks)
    found = {"computing": longest * tokens * train_flops(config.model, t.seq_len, t.recompute) / (device(machine).peak["bf16"] * MFU)}
    wire = INSIDE if ranks <= NODE else OUTSIDE
    for kind, count in sent(config, ranks).items():
        if kind == "all_to_all":
            found[kind] = count * (shares[0] / INSIDE + shares[1] / OUTSIDE)
        elif kind == "send":
            found[kind] = count / wire
        else:
            found[kind] = count * (2 if kind == "all_reduce" else 1) * (alike - 1) / alike / wire
    return found


def hours(config: Config, ranks: int, step_s: float) -> float:
    """Of GPUs, for a trillion tokens."""
    return 1e12 / (config.train.batch_size * config.train.seq_len) * step_s * ranks / 3600


def visited(c: ModelConfig, experts: int, tokens: int = 4096) -> dict[str, float]:
    """By real routers and random scores: ranks and nodes that a token's experts are on, on average, the most nodes, and shares of its rows
    that go to another rank of the node and to other nodes, for the ranks of the first node."""
    router = Router(replace(c, hidden_size=1))
    chosen = router.select(torch.rand(tokens, c.n_routed_experts, generator=torch.Generator().manual_seed(0)))
    to = chosen // (c.n_routed_experts // experts)
    ranks = [len(set(row)) for row in to.tolist()]
    nodes = [len({rank // NODE for rank in row}) for row in to.tolist()]
    near = float(((to // NODE == 0) & (to != 0)).float().mean())
    return {
        "ranks": sum(ranks) / tokens, "nodes": sum(nodes) / tokens, "most_nodes": max(nodes), "near": near,
        "far": float((to // NODE != 0).float().mean()),
    }  # fmt: skip


def bubbles() -> dict[str, dict[str, dict[str, float]]]:
    """Idle share of each schedule, by number of micro-batches, where layers are kept and where they are computed again."""
    return {
        kept: {schedule: {str(many): bubble(schedule, STAGES, many, again) for many in BATCHES} for schedule in CLASSES}
        for kept, again in (("kept", False), ("computed again", True))
    }


def figure(folder: Path) -> dict:
    """DeepSeek-V3 on the cluster of the preset, in each layout."""
    base, ranks, machine = preset_config("cluster")
    limit = device(machine).memory_bytes
    rows = []
    for bits in ("float32", "bfloat16"):
        for parallel in LAYOUTS:
            if bits == "bfloat16" and (parallel.shard == "weights" or parallel.stages > 1):  # FSDP2 wants one type in a layer
                continue
            config, experts = replace(base, parallel=parallel, precision=PrecisionConfig(weights=bits)), parallel.experts
            memory, (waiting, longest) = held(config, ranks), bubble_of(config, ranks)
            row = {"layout": words_of(parallel), "weights_as": bits, "memory": memory.total, "parts": vars(memory)}
            row |= {"passes": passes(config, ranks), "bubble": waiting, "longest": longest}
            row["fits"] = "yes" if memory.total * (1 + SPREAD) < limit else "hardly" if memory.total < limit else "no"
            spread = visited(config.model, experts) if experts > 1 else {"near": 0.0, "far": 0.0}
            row["sent"], row["seconds"] = sent(config, ranks), seconds(config, ranks, (spread["near"], spread["far"]), machine)
            computing, exchanging = row["seconds"]["computing"], sum(row["seconds"].values()) - row["seconds"]["computing"]
            row["hours"] = {
                "waiting": hours(config, ranks, (computing + exchanging) / (1 - waiting)),
                "hidden": hours(config, ranks, max(computing, exchanging) / (1 - waiting)),
            }
            if bits == "float32" and parallel in TRACED:
                numbers = (0, ranks - 1) if parallel.stages > 1 else (0,)
                row["traced"] = {str(number): traced(config, number, ranks, folder) for number in numbers}
            rows.append(row)
    published = read_recipe("deepseek-v3")
    layout, c, t = layout_of(published.plan["layout"], ""), base.model, base.train
    return {
        "ranks": ranks, "machine": machine, "rows": rows, "bubbles": bubbles(), "visited": visited(c, 64),
        "published": {
            "hours": PUBLISHED, "memory": sum(memory_of(c, t.seq_len, layout).values()), "limit": limit,
            "modelled": device_hours(c, 1e12, t.seq_len, published.wishes["train"]["batch_size"], layout),
        },
    }  # fmt: skip


def dry_run(name: str, folder: Path) -> dict:
    """A preset's first and last rank: as they are built, a step with one micro-batch, and the whole step by formula."""
    config, ranks, machine = preset_config(name)
    memory = held(config, ranks)
    return {
        "preset": name, "ranks": ranks, "machine": machine, "memory": memory.total, "limit": device(machine).memory_bytes,
        "sent": sent(config, ranks), "passes": passes(config, ranks),
        "traced": {str(rank): traced(config, rank, ranks, folder) for rank in (0, ranks - 1)},
    }  # fmt: skip


def lines(result: dict) -> Iterator[str]:
    """The figure as text."""
    if "preset" in result:
        yield f"{result['preset']}: {result['ranks']:,} ranks; {_gb(result['memory'])} of {_gb(result['limit'])} of a {result['machine']}"
        yield f"a step of {result['passes']} micro-batches by formula: {_kinds(result['sent'])}"
        for rank, one in result["traced"].items():
            yield f"rank {rank}, {_traced(one)}"
            yield f"  weights {_gb(one['weights'])}, moments {_gb(one['moments'])}"
        return
    yield f"DeepSeek-V3, {result['ranks']:,} {result['machine']}; per rank, and its step"
    for row in result["rows"]:
        hours = row["hours"]
        yield f"{row['layout']}, {row['weights_as']}: {_gb(row['memory'])}, fits: {row['fits']}; {_kinds(row['sent'])}"
        told = ", ".join(f"{kind} {value:.1f}" for kind, value in row["seconds"].items() if value > 0.05)
        if row["bubble"]:
            told += f"; bubble {row['bubble']:.1%}, the rank with most layers computes {row['longest'] - 1:.0%} longer than the mean"
        told += f"; {row['passes']} micro-batches"
        yield f"  seconds: {told}; K hours: {hours['waiting'] / 1e3:,.0f} waiting, {hours['hidden'] / 1e3:,.0f} hidden"
        for rank, one in row.get("traced", {}).items():
            yield f"  rank {rank}, {_traced(one)}"
    told = result["visited"]
    yield f"experts among 64: a token's are on {told['ranks']:.2f} ranks and {told['nodes']:.2f} nodes, at most {told['most_nodes']}"
    for kept, schedules in result["bubbles"].items():
        for schedule, shares in schedules.items():
            told = ", ".join(f"{many}: {value:.1%}" for many, value in shares.items())
            yield f"bubble of {schedule}, {STAGES} stages, layers {kept}, by micro-batches: {told}"
    known, peak = result["published"], device(result["machine"]).peak["bf16"]
    yield f"published: {known['hours'] / 1e3:.0f} K hours for a trillion tokens"
    yield f"the plan's model of that layout, nothing fitted: {known['modelled'] / 1e3:.0f} K hours, {_gb(known['memory'])}"
    yield f"assumed: computing alone reaches {MFU:.0%} of the peak in bfloat16 ({peak / 1e12:.0f} TFLOP/s)"
    yield f"assumed: {INSIDE / 1e9:.0f} GB/s inside a node, {OUTSIDE / 1e9:.0f} GB/s between nodes, all of it (DeepSeek-V3 §3.2.2)"
    yield "assumed: waiting: nothing is exchanged while anything computes; hidden: the shorter of both behind the longer"
    yield "not counted: failures, evaluations, imbalance of experts, reading data"


def _traced(one: dict) -> str:
    told = f"{one['times']} micro-batches traced: {_kinds(one['by_name'])}; off the formula by at most {one['largest_difference']:.2g}"
    return f"{told}; peak with plain kernels {_gb(one['peak'])} (formula {_gb(one['peak_formula'])})"


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


def _kinds(found: dict[str, float]) -> str:
    return ", ".join(f"{kind} {_gb(count)}" for kind, count in found.items() if count > 5e6)


if __name__ == "__main__":
    for line in lines(tyro.cli(Paper)()):
        print(line)
