"""Figure 1: tokens/s, MFU, peak memory and losses of training, ours and transformers' DeepseekV3 in turn on the same CPU threads."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from sparing.base.config import DataConfig, ModelConfig, UserError
from sparing.bench.limit import LIMIT, Limit, Rounds
from sparing.bench.peer import PeerSetting, all_settings
from sparing.bench.report import paths_of, row, say
from sparing.bench.trials import Task, fastest, try_settings
from sparing.bench.worker import Worker
from sparing.budget.flops import train_flops
from sparing.kernels.formats import this_machine, warning
from sparing.planning.places import SHORT

MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_layers=6,
    num_dense_layers=1,
    intermediate_size=768,
    num_heads=4,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    mtp_depth=0,
)
"""The shape that the figure is about, whatever the defaults become."""
OPTIMIZER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
"""torch.optim.AdamW of every parameter, on both sides."""
WARM_UP = 2
"""Steps that are trained and compared but not timed: the first ones pay for kernels being set up."""
PEAK_S, PEAK_SHARE = 10.0, 0.02
"""For measuring the peak, every time: so long, or this share of the limit."""


def throughput(
    data: str | Sequence[str] = (),
    rounds: int = 8,
    steps: int = 6,
    trial_steps: int = 2,
    threads: int = 2,
    compile: Literal["none", "peer", "both"] = "none",
    batch_size: int = 8,
    seq_len: int = 512,
    model: ModelConfig = MODEL,
    settings: Sequence[PeerSetting] | None = None,
    precision: Literal["bfloat16", "float32"] | None = None,
    peak_sizes: Sequence[int] = (1024, 1536, 2048, 3072, 4096),
    limit: str = LIMIT,
) -> list[dict]:
    """Rows of the figure. data: text to train on, as `--data` (default: the standard library's source).

    The peer's settings are tried for `trial_steps` each and the fastest goes on; then the sides take turns for `rounds` rounds of `steps`
    steps, the machine's peak measured in between. `compile`: nobody, the peer too where that is faster, or both. precision: ours; by
    default what training multiplies in on this machine, as the peak is. settings: the peer's, each tried whatever its number format;
    by default all but those in formats that are far slower here. limit: of all that in time; what does not fit is left out, and said to be.
    Raises UserError when transformers is missing or no setting of the peer runs.
    """
    if rounds < 1 or steps < 1 or trial_steps < 1:
        raise UserError("bench train throughput: rounds, steps and trial_steps must be at least 1")
    until, machine, tokens = Limit.of(limit), this_machine(), batch_size * seq_len
    native = machine.training_dtype("cpu")
    if precision and (slow := warning(precision, machine)):
        say(f"--precision {slow}")
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as folder, ExitStack() as stack:
        weights, batches = Path(folder, "weights.safetensors"), Path(folder, "batches.safetensors")
        files = {"model": model, "weights": weights, "batches": batches, "optimizer": OPTIMIZER}
        with Worker(threads, until) as worker:
            size = {"count": WARM_UP + rounds * steps, "batch_size": batch_size, "seq_len": seq_len, "vocab_size": model.vocab_size}
            worker.ask("run", function="throughput.save_batches", path=str(batches), data=paths_of(data), **size)
            initial = worker.ask("run", function="ours.save_initial_weights", model=asdict(model), seed=0, path=str(weights))
        task = Task(
            build=lambda worker, setting: worker.build("peer", **files, setting=asdict(setting)),
            part=lambda worker: batch_size * worker.ask("steps", first=0, count=1, rows=1)["seconds"],
            whole=lambda worker, number: worker.ask("steps", first=number, count=1)["seconds"],
            tokens=tokens,
        )
        among = settings or all_settings(compile != "none")
        trials = try_settings("transformers", among, task, trial_steps, threads, until, None if settings else machine)
        sides = {
            "ours": {"precision": precision or native, "compile": compile == "both", "replicas": 1 if compile == "both" else threads},
            "peer": fastest(trials, "trains"),
        }
        workers = {side: stack.enter_context(Worker(threads, until)) for side in sides}
        meter = stack.enter_context(Worker(threads, until))
        for side, worker in workers.items():
            worker.build(side, **files, setting=sides[side])
        look = {"dtype": native, "sizes": list(peak_sizes), "seconds": min(PEAK_S, PEAK_SHARE * until.seconds)}
        measured = take_turns(workers, meter, rounds, steps, look, until)
        memory = {side: worker.ask("memory")["bytes"] for side, worker in workers.items()}
    flops, peak = train_flops(model, seq_len), measured["peak"]
    speeds = {side: [tokens * steps / seconds for seconds in measured[side]["seconds"]] for side in sides}
    speed = {side: statistics.median(values) for side, values in speeds.items()}
    losses = {side: measured[side]["losses"] for side in sides}
    gap = max(abs(a - b) / b for a, b in zip(losses["ours"], losses["peer"], strict=True))
    made = measured["rounds"]
    formats = {"formats": {side: setting["precision"] for side, setting in sides.items()} | {"peak": native}}
    same = {"peer_name": f"transformers, {PeerSetting(**sides['peer'])}", "runs": made.made, **formats, **made.said()}
    detail = {"parameters": initial["parameters"], "threads": threads, "compile": compile}
    detail |= {"spread": {side: [min(values), max(values)] for side, values in speeds.items()}}
    untried = {"cut_short": measured["peak_cut_short"]} if measured["peak_cut_short"] else {}
    return [
        row("training speed", speed["ours"], "tokens/s", speed["peer"], **same, settings=trials, **detail),
        row("MFU", speed["ours"] * flops / peak, "of the peak", speed["peer"] * flops / peak, **same, flops_per_token=flops),
        row(f"peak: best square {SHORT[native]} product", peak / 1e9, "GFLOP/s", runs=made.made + 1, **formats, **untried),
        row("peak memory", memory["ours"] / 2**20, "MiB", memory["peer"] / 2**20, **same),
        row(f"largest difference of {len(losses['ours'])} losses", gap, "relative", 0.01, "allowed", losses=losses, **formats),
    ]


def take_turns(sides: dict[str, Worker], meter: Worker, rounds: int, steps: int, peak: dict, limit: Limit) -> dict:
    """-> {side: {"seconds": one a round, "losses": all of them}, "peak": FLOP/s, "peak_cut_short", "rounds": `Rounds`}. Who goes first
    changes every round. Raises UserError where the limit has no room for one."""
    result: dict = {}
    needs = 0.0
    for name, worker in sides.items():
        first = worker.ask("steps", first=0, count=WARM_UP)
        result[name] = {"seconds": [], "losses": first["losses"]}
        needs += steps * first["seconds"] / WARM_UP
    if needs > limit.left():
        raise UserError(
            f"bench train throughput: a round of {steps} steps would take about {needs:,.0f} s, but of {limit} only "
            f"{limit.left():,.0f} s are left: give more, or fewer --steps"
        )
    looks = [meter.ask("peak", **peak)]
    turns = Rounds(rounds, limit)
    for number in turns:
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            answer = sides[name].ask("steps", first=WARM_UP + number * steps, count=steps)
            result[name]["seconds"].append(answer["seconds"])
            result[name]["losses"] += answer["losses"]
        looks.append(meter.ask("peak", **peak))
        last = ", ".join(f"{name} {result[name]['seconds'][-1] / steps:.2f} s a step" for name in sides)
        say(f"round {number + 1} of {rounds}: {last}; peak {looks[-1]['flops'] / 1e9:,.0f} GFLOP/s")
    best = max(looks, key=lambda look: look["flops"])
    return result | {"peak": best["flops"], "peak_cut_short": best["cut_short"], "rounds": turns}


def save_batches(path: str, data: str | Sequence[str], count: int, batch_size: int, seq_len: int, vocab_size: int) -> None:
    """Write `tokens` (count, B, T) int32: the corpus as our data stage tokenises it, from its start, repeated if it is short."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from sparing.data.prepare import prepare

    needed = count * batch_size * seq_len
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as folder:
        config = DataConfig(paths=tuple(paths_of(data)), max_tokens=math.ceil(1.2 * needed), holdout_fraction=0.0)
        store = prepare(config, vocab_size, Path(folder))
        tokens = store.take(np.arange(needed) % store.tokens)
    save_file({"tokens": torch.from_numpy(tokens.astype(np.int32)).view(count, batch_size, seq_len)}, path)
