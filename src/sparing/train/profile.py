"""Times whole optimizer steps of a few small models on this machine, for the planner; kept in the machine's calibration.

Short by design: about ten seconds. Data and weights are random; nothing is written but the timings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from sparing.account.hardware import Machine, load_calibration, save_calibration
from sparing.budget.estimate import DESCRIPTION, features
from sparing.config import Config, OptimConfig, TrainConfig
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.resolve import LADDER, shaped
from sparing.train.calibrate import peak_flops
from sparing.train.optim import Optimizer
from sparing.train.replicas import Replicas

KEY = "step_timings"
TOKENS = 4096
PROBES = (
    (2, False, 256, 4096), (2, True, 256, 4096), (0, False, 256, 2048), (4, True, 256, 4096), (2, False, 512, 2048), (3, False, 512, 8192),
    (3, True, 512, 1024),
)  # fmt: skip
"""(rung of resolve's ladder, mixture, sequence, vocabulary): what the ladder is made of, most telling first."""


def step_timings(
    machine: Machine, device: str = "cpu", seconds: float = 12.0, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """For `budget.estimate.fit`: {"description", "peak_flops", "rows": [{"features", "seconds"}]}; measured once, then remembered."""
    known = load_calibration(machine).get(f"{KEY}_{device}")
    if isinstance(known, dict) and known.get("description") == DESCRIPTION:
        return known
    say(f"measuring training steps on this machine, once, for about {seconds:.0f} s")
    dtype = "bfloat16" if device == "cuda" or machine.cpu_bf16 else "float32"
    peak = peak_flops(machine, device, getattr(torch, dtype))
    start, rows = time.monotonic(), []
    cores = machine.cores_physical if device == "cpu" else 1
    for rung, moe, seq_len, vocab in PROBES:
        if rows and time.monotonic() - start > seconds:
            break
        config = Config(
            model=shaped(LADDER[rung], vocab, seq_len, moe),
            train=TrainConfig(
                seq_len=seq_len, batch_size=TOKENS // seq_len, dtype=dtype, device=device, replicas=min(cores, TOKENS // seq_len)
            ),
        )
        rows.append({"features": features(config, seq_len, peak).tolist(), "seconds": _step(config, 4)})
    found = {"description": DESCRIPTION, "peak_flops": peak, "rows": rows}
    save_calibration(machine, {f"{KEY}_{device}": found})
    return found


def _step(config: Config, repeats: int) -> float:
    """Mean seconds of an optimizer step, the first not counted: on a shared machine a run pays for the slow ones too."""
    t, c = config.train, config.model
    model = Transformer(c)
    init_weights(model, 0)
    model.to(t.device)
    model.compute_dtype = getattr(torch, t.dtype)
    model.train()
    replicas, optimizer = Replicas(model, t.replicas or 1), Optimizer(model, OptimConfig(), model.compute_dtype)
    tokens = torch.randint(0, c.vocab_size, (t.batch_size, t.seq_len), device=t.device)
    targets = torch.randint(0, c.vocab_size, (t.batch_size, t.seq_len, 1), device=t.device)
    # Two documents a row, as in real data: the mask is part of the work.
    documents = (torch.arange(t.seq_len, device=t.device) >= t.seq_len // 2).long().expand(t.batch_size, -1)
    took = []
    for _ in range(repeats):
        if t.device == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        replicas.backward(
            tokens, targets, documents, denominator=tokens.numel(), mtp_weight=t.mtp_weight, sequence_balance=t.sequence_balance
        )
        optimizer.clip(float(optimizer.grad_norm()))
        optimizer.step(1e-3, 0.95)
        if t.device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - before)
    return sum(took[1:]) / (repeats - 1)
