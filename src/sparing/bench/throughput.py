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

from sparing.bench.peer import PeerSetting, all_settings
from sparing.bench.report import paths_of, row, say
from sparing.bench.worker import Worker, WorkerError
from sparing.budget.flops import train_flops
from sparing.config import DataConfig, ModelConfig, UserError

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
    precision: Literal["bfloat16", "float32"] = "bfloat16",
    peak_sizes: Sequence[int] = (1024, 1536, 2048, 3072, 4096),
) -> list[dict]:
    """Rows of the figure. data: text to train on, as `--data` (default: the standard library's source).

    The peer's settings are tried for `trial_steps` each and the fastest goes on; then the sides take turns for `rounds` rounds of `steps`
    steps, the machine's peak measured in between. `compile`: nobody, the peer too where that is faster, or both.
    Raises UserError when transformers is missing or no setting of the peer runs.
    """
    if rounds < 1 or steps < 1 or trial_steps < 1:
        raise UserError("bench train throughput: rounds, steps and trial_steps must be at least 1")
    from sparing.bench.ours import save_initial_weights

    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as folder, ExitStack() as stack:
        weights, batches = Path(folder, "weights.safetensors"), Path(folder, "batches.safetensors")
        parameters = save_initial_weights(model, 0, weights)
        save_batches(batches, data, WARM_UP + rounds * steps, batch_size, seq_len, model.vocab_size)
        files = {"model": model, "weights": weights, "batches": batches, "optimizer": OPTIMIZER}
        tokens = batch_size * seq_len
        trials = try_settings(settings or all_settings(compile != "none"), files, threads, trial_steps, tokens)
        best = max(trials, key=lambda trial: trial["tokens_per_s"] or 0.0)
        if not best["tokens_per_s"]:
            raise UserError(f"no setting of transformers trains here; the first one: {trials[0]['error']}")
        ours, peer, meter = (stack.enter_context(Worker(threads)) for _ in range(3))
        setting = {"precision": precision, "compile": compile == "both", "replicas": 1 if compile == "both" else threads}
        ours.build("ours", **files, setting=setting)
        peer.build("peer", **files, setting=best["setting"])
        measured = take_turns({"ours": ours, "peer": peer}, meter, rounds, steps, peak_sizes)
        memory = {name: side.ask("memory")["bytes"] for name, side in (("ours", ours), ("peer", peer))}
    peer_name = f"transformers, {PeerSetting(**best['setting'])}"
    flops, peak = train_flops(model, seq_len), measured["peak"]
    speeds = {side: [tokens * steps / seconds for seconds in measured[side]["seconds"]] for side in ("ours", "peer")}
    speed = {side: statistics.median(values) for side, values in speeds.items()}
    losses = {side: measured[side]["losses"] for side in ("ours", "peer")}
    gap = max(abs(a - b) / b for a, b in zip(losses["ours"], losses["peer"], strict=True))
    same = {"peer_name": peer_name, "runs": rounds}
    detail = {"parameters": parameters, "threads": threads, "compile": compile, "spread": {s: [min(v), max(v)] for s, v in speeds.items()}}
    return [
        row("training speed", speed["ours"], "tokens/s", speed["peer"], **same, settings=trials, **detail),
        row("MFU", speed["ours"] * flops / peak, "of the peak", speed["peer"] * flops / peak, **same, flops_per_token=flops),
        row("peak: best square bf16 product", peak / 1e9, "GFLOP/s", runs=rounds + 1),
        row("peak memory", memory["ours"] / 2**20, "MiB", memory["peer"] / 2**20, **same),
        row(f"largest difference of {len(losses['ours'])} losses", gap, "relative", 0.01, "allowed", losses=losses),
    ]


def try_settings(settings: Sequence[PeerSetting], files: dict, threads: int, steps: int, tokens: int) -> list[dict]:
    """Tokens/s of the peer in each setting over `steps` steps after a first one; `tokens_per_s` None and `error` where it does not run."""
    trials = []
    for setting in settings:
        trial: dict = {"setting": asdict(setting), "tokens_per_s": None, "error": None}
        with Worker(threads) as worker:
            try:
                worker.build("peer", **files, setting=asdict(setting))
                worker.ask("steps", first=0, count=1)
                trial["tokens_per_s"] = tokens * steps / worker.ask("steps", first=1, count=steps)["seconds"]
                say(f"transformers, {setting}: {trial['tokens_per_s']:,.0f} tokens/s")
            except WorkerError as error:
                trial["error"] = str(error)
                say(f"transformers, {setting}: skipped, {error}")
        trials.append(trial)
    return trials


def take_turns(sides: dict[str, Worker], meter: Worker, rounds: int, steps: int, peak_sizes: Sequence[int]) -> dict:
    """-> {side: {"seconds": one a round, "losses": all of them}, "peak": FLOP/s}. Who goes first changes every round."""
    first = {name: worker.ask("steps", first=0, count=WARM_UP)["losses"] for name, worker in sides.items()}
    result: dict = {name: {"seconds": [], "losses": losses} for name, losses in first.items()}
    peaks = [meter.ask("peak", sizes=list(peak_sizes))["flops"]]
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            answer = sides[name].ask("steps", first=WARM_UP + number * steps, count=steps)
            result[name]["seconds"].append(answer["seconds"])
            result[name]["losses"] += answer["losses"]
        peaks.append(meter.ask("peak", sizes=list(peak_sizes))["flops"])
        last = ", ".join(f"{name} {result[name]['seconds'][-1] / steps:.2f} s a step" for name in sides)
        say(f"round {number + 1} of {rounds}: {last}; peak {peaks[-1] / 1e9:,.0f} GFLOP/s")
    return result | {"peak": max(peaks)}


def save_batches(path: Path, data: str | Sequence[str], count: int, batch_size: int, seq_len: int, vocab_size: int) -> None:
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
