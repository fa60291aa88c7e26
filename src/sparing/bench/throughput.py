"""Compares our training with transformers' DeepseekV3, in turn on the same CPU threads: speed, MFU, peak memory, losses."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from sparing.account.power import peak_memory, reset_peak_memory, resident_memory
from sparing.base.config import DataConfig, ModelConfig, UserError
from sparing.base.config_file import build
from sparing.base.messages import say
from sparing.bench.limit import LIMIT, Limit, Rounds
from sparing.bench.peers import available
from sparing.bench.results import paths_of, row
from sparing.bench.worker import Worker
from sparing.budget.flops import train_flops
from sparing.kernels.formats import this_machine, warning
from sparing.planning.places import SHORT

MODEL = ModelConfig(
    vocab_size=4096, hidden_size=256, num_layers=6, num_dense_layers=1, intermediate_size=768, num_heads=4, q_lora_rank=128,
    kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=16, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=128, mtp_depth=0,
)  # fmt: skip
"""The model that docs/benchmarks.md quotes, whatever the defaults become."""
OPTIMIZER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
"""torch.optim.AdamW of every parameter, on both sides."""
WARM_UP = 2
"""Steps that are trained and compared but not timed: the first ones set kernels up."""
TRIAL_STEPS = 2
"""Timed steps of each setting of the peer's."""
PEAK_SIZES = (1024, 1536, 2048, 3072, 4096)
PEAK_S, PEAK_SHARE = 10.0, 0.02
"""Each measurement of the peak takes at most this many seconds, and this share of the limit."""
PEER = "benchmarks.transformers_training"


class TrainingSide:
    """One model in training, in a worker. Subclasses say how it is made and what one step is.

    weights, batches: safetensors files, of a state dict and of `tokens` (N, B, T). optimizer: arguments of AdamW. setting: the subclass's.
    """

    def __init__(self, model: dict, weights: str, batches: str, optimizer: dict, setting: dict):
        from safetensors.torch import load_file

        self.batches = load_file(batches)["tokens"].long()
        self.import_libraries()
        import torch._dynamo  # noqa: F401  any optimizer of torch's imports it at its first step: memory of a library too, on both sides

        self.baseline = resident_memory()
        self.build(build(ModelConfig, model), load_file(weights), optimizer, **setting)
        reset_peak_memory()

    def import_libraries(self) -> None:
        """Import what the model needs: that memory isn't the model's."""
        raise NotImplementedError

    def build(self, config: ModelConfig, weights: dict, optimizer: dict, **setting) -> None:
        raise NotImplementedError

    def step(self, tokens_BT) -> float:
        """One whole training step -> the loss in nats."""
        raise NotImplementedError

    def steps(self, first: int, count: int, rows: int | None = None) -> dict:
        """Train on the batches first ... first + count - 1 (the list starts over at its end), or on their first `rows` rows.

        -> seconds of the steps alone, and their losses.
        """
        start = time.perf_counter()
        losses = [self.step(self.batches[i % len(self.batches)][:rows]) for i in range(first, first + count)]
        return {"seconds": time.perf_counter() - start, "losses": losses}

    def memory(self) -> int:
        """The most bytes that were resident since the model was built, beyond those before it was built."""
        return peak_memory()[0] - self.baseline


class Ours(TrainingSide):
    """The model that `sparing train` trains, with the peer's optimizer and without a schedule: AdamW for every parameter, causal attention
    over the whole row, router biases as they are (the peer has no update for them)."""

    def import_libraries(self) -> None:
        import sparing.train.replicas  # noqa: F401

    def build(self, config: ModelConfig, weights: dict, optimizer: dict, precision: str, compile: bool = False, replicas: int = 1) -> None:
        """precision: bfloat16 or float32, over float32 weights. replicas: threads that divide the rows among them."""
        import torch

        from sparing.kernels import native
        from sparing.kernels.products import fitting
        from sparing.model.transformer import Transformer
        from sparing.train.objective import NextToken
        from sparing.train.replicas import Replicas

        native.open_pool()  # as a run does
        self.model = Transformer(config)
        self.model.load_state_dict(weights)
        self.model.train()
        self.model.compute_dtype = getattr(torch, precision)
        kernels = fitting(replicas, torch.get_num_threads(), "cpu", precision, config)[0]
        self.replicas = Replicas(self.model, NextToken(config), replicas, compile, kernels)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **optimizer)

    def step(self, tokens_BT) -> float:
        from sparing.data.loader import Batch

        self.optimizer.zero_grad(set_to_none=True)
        loss = self.replicas.gradients(Batch(tokens_BT, next_tokens(tokens_BT, 1 + self.model.config.mtp_depth)))[0]
        self.optimizer.step()
        return loss.item()


def next_tokens(tokens_BT, depth: int):
    """Targets (B, T, depth): the token 1, 2, ... ahead, -100 past the end of the row."""
    import torch

    padded = torch.nn.functional.pad(tokens_BT, (0, depth), value=-100)
    return torch.stack([padded[:, k + 1 : k + 1 + tokens_BT.shape[1]] for k in range(depth)], dim=-1)


def throughput(
    data: str | Sequence[str] = (),
    rounds: int = 8,
    steps: int = 6,
    threads: int = 2,
    compile: Literal["none", "peer", "both"] = "none",
    batch_size: int = 8,
    seq_len: int = 512,
    model: ModelConfig = MODEL,
    precision: Literal["bfloat16", "float32"] | None = None,
    limit: str = LIMIT,
) -> list[dict]:
    """Rows: speed, MFU, the peak, memory, and the largest difference of the losses.

    The peer's settings are tried and the fastest goes on. Then the sides take turns for `rounds` rounds of `steps` steps, and the
    machine's peak is measured in between. data: text to train on, by default the standard library's source. compile: nobody, the peer
    where that is faster, or both. precision: ours; by default what training multiplies in on this machine, as the peak is. limit: time of
    the whole figure; what doesn't fit is left out, and a line says so. Raises UserError where transformers isn't installed or no setting
    of it runs.
    """
    if rounds < 1 or steps < 1:
        raise UserError("bench train throughput: rounds and steps must be at least 1")
    until, tokens, native = Limit.of(limit), batch_size * seq_len, this_machine().training_dtype("cpu")
    if precision and (slow := warning(precision, this_machine())):
        say(f"--precision {slow}")
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as folder, ExitStack() as stack:
        weights, batches = str(Path(folder, "weights.safetensors")), str(Path(folder, "batches.safetensors"))
        files = {"model": asdict(model), "weights": weights, "batches": batches, "optimizer": OPTIMIZER}
        with Worker(threads, until) as worker:
            size = {"count": WARM_UP + rounds * steps, "batch_size": batch_size, "seq_len": seq_len, "vocab_size": model.vocab_size}
            worker.run(save_batches, path=batches, data=paths_of(data), **size)
            parameters = worker.run(save_initial_weights, model=asdict(model), seed=0, path=weights)
        whole = compile == "both"
        settings = {"ours": {"precision": precision or native, "compile": whole, "replicas": 1 if whole else threads}}
        makers, best = {"ours": Ours}, None
        if available("transformers"):
            with Worker(threads, until) as worker:
                shape = {"threads": threads, "batch_size": batch_size, "tokens": tokens, "repeats": TRIAL_STEPS}
                best = worker.run(f"{PEER}.best", files=files, compile=compile != "none", seconds=until.left(), **shape)
            settings["peer"], makers["peer"] = best["setting"], f"{PEER}.Peer"
        workers = {side: stack.enter_context(Worker(threads, until)) for side in settings}
        meter = stack.enter_context(Worker(threads, until))
        for side, worker in workers.items():
            worker.make(makers[side], **files, setting=settings[side])
        look = {"dtype": native, "seconds": min(PEAK_S, PEAK_SHARE * until.seconds)}
        measured = take_turns(workers, meter, rounds, steps, look, until)
        memory = {side: worker.call("memory") / 2**20 for side, worker in workers.items()}
    flops, peak = train_flops(model, seq_len), measured["peak"]
    speeds = {side: [tokens * steps / seconds for seconds in measured[side]["seconds"]] for side in settings}
    speed = {side: statistics.median(values) for side, values in speeds.items()}
    mfu = {side: value * flops / peak for side, value in speed.items()}
    losses = {side: measured[side]["losses"] for side in settings}
    turns = measured["rounds"]
    formats = {"formats": {side: setting["precision"] for side, setting in settings.items()} | {"peak": native}}
    same = {"peer_name": f"transformers, {best['name']}" if best else None, "runs": turns.made, **formats, **turns.more()}
    detail = {"settings": best["trials"] if best else [], "parameters": parameters, "threads": threads, "compile": compile}
    detail |= {"spread": {side: [min(values), max(values)] for side, values in speeds.items()}}
    untried = {"cut_short": measured["peak_cut_short"]} if measured["peak_cut_short"] else {}
    rows = [
        row("training speed", speed["ours"], "tokens/s", speed.get("peer"), **same, **detail),
        row("MFU", mfu["ours"], "of the peak", mfu.get("peer"), **same, flops_per_token=flops),
        row(f"peak: best square {SHORT[native]} product", peak / 1e9, "GFLOP/s", runs=turns.made + 1, **formats, **untried),
        row("peak memory", memory["ours"], "MiB", memory.get("peer"), **same),
    ]
    if best:
        gap = max(abs(a - b) / b for a, b in zip(losses["ours"], losses["peer"], strict=True))
        rows.append(row(f"largest difference of {len(losses['ours'])} losses", gap, "relative", 0.01, "allowed", losses=losses, **formats))
    return rows


def take_turns(sides: dict[str, Worker], meter: Worker, rounds: int, steps: int, peak: dict, limit: Limit) -> dict:
    """Rounds of `steps` steps on each side; who goes first changes every round.

    -> {side: {"seconds": one a round, "losses": all of them}, "peak": FLOP/s, "peak_cut_short", "rounds": `Rounds`}. Raises UserError
    where the limit has no room for one round.
    """
    result: dict = {}
    needs = 0.0
    for name, worker in sides.items():
        first = worker.call("steps", first=0, count=WARM_UP)
        result[name] = {"seconds": [], "losses": first["losses"]}
        needs += steps * first["seconds"] / WARM_UP
    if needs > limit.left():
        raise UserError(
            f"bench train throughput: a round of {steps} steps would take about {needs:,.0f} s, but of {limit} only "
            f"{limit.left():,.0f} s are left: give more, or fewer --steps"
        )
    looks = [meter.run(square_product, **peak)]
    turns = Rounds(rounds, limit)
    for number in turns:
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            answer = sides[name].call("steps", first=WARM_UP + number * steps, count=steps)
            result[name]["seconds"].append(answer["seconds"])
            result[name]["losses"] += answer["losses"]
        looks.append(meter.run(square_product, **peak))
        last = ", ".join(f"{name} {result[name]['seconds'][-1] / steps:.2f} s a step" for name in sides)
        say(f"round {number + 1} of {rounds}: {last}; peak {looks[-1]['flops'] / 1e9:,.0f} GFLOP/s")
    best = max(looks, key=lambda look: look["flops"])
    return result | {"peak": best["flops"], "peak_cut_short": best["cut_short"], "rounds": turns}


def square_product(dtype: str, seconds: float, sizes: Sequence[int] = PEAK_SIZES) -> dict:
    """The best square product in `dtype` on this process's threads, FLOP/s, within about `seconds`; and which sizes were left out."""
    import torch

    from sparing.train.peak import measure_peak

    best = measure_peak("cpu", getattr(torch, dtype), tuple(sizes), seconds=seconds)
    return {"flops": best.flops, "cut_short": best.cut_short()}


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


def save_initial_weights(model: dict, seed: int, path: str) -> int:
    """Write the state dict that both sides start from -> the number of its parameters."""
    from safetensors.torch import save_file

    from sparing.model.init import init_weights
    from sparing.model.transformer import Transformer

    ours = Transformer(build(ModelConfig, model))
    init_weights(ours, seed)
    save_file({name: tensor.contiguous() for name, tensor in ours.state_dict().items()}, path)
    return sum(parameter.numel() for parameter in ours.parameters())
