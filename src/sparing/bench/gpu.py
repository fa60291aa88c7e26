"""Measures training speed and MFU on one CUDA GPU with sequences of 2048 tokens: a mixture and two dense models."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from sparing.base.config import Config, ModelConfig, TrainConfig, UserError
from sparing.base.messages import say
from sparing.bench.limit import LIMIT, Limit
from sparing.bench.results import row
from sparing.bench.worker import Worker
from sparing.budget.flops import parameters, train_flops
from sparing.kernels.formats import this_machine

DENSE = ModelConfig(
    vocab_size=32768, hidden_size=768, num_layers=12, num_dense_layers=12, intermediate_size=2816, num_heads=12, q_lora_rank=384,
    kv_lora_rank=192, max_position_embeddings=2048,
)  # fmt: skip
MODELS = {
    "moe 124M active": replace(DENSE, num_dense_layers=1, n_routed_experts=64, num_experts_per_tok=8, moe_intermediate_size=320),
    "dense 124M": DENSE,
    "dense 1B": replace(DENSE, hidden_size=2048, num_layers=20, num_dense_layers=20, intermediate_size=5632, num_heads=16, q_lora_rank=1024,
                        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
}  # fmt: skip
AIMS = {"moe 124M active": 0.25, "dense 124M": 0.40, "dense 1B": 0.55}
"""MFU."""
SEQ_LEN, WARM_UP = 2048, 5


def gpu(models: str = ",".join(MODELS), batch_size: int = 16, steps: int = 20, compile: bool = True, limit: str = LIMIT) -> list[dict]:
    """Rows: tokens/s and MFU of each of `models` (comma-separated) over `steps` whole optimizer steps on random tokens, in bfloat16.

    limit: time of the whole figure. Raises UserError without a CUDA GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("bench train gpu: torch sees no CUDA GPU on this machine; `sparing bench train throughput` measures its CPU")
    names = [name.strip() for name in models.split(",")]
    if unknown := [name for name in names if name not in MODELS]:
        raise UserError(f"bench train gpu: no model {unknown[0]!r}; choose from {', '.join(MODELS)}")
    until, rows = Limit.of(limit), []
    for name in names:
        with Worker(this_machine().cores_physical, until) as worker:
            speed, peak = worker.run(measure, model=name, batch_size=batch_size, steps=steps, compile=compile)
        mfu, size = speed * train_flops(MODELS[name], SEQ_LEN) / peak, parameters(MODELS[name])
        more = {"runs": steps, "parameters": size.total, "active_parameters": size.active, "peak_flops": peak}
        more |= {"formats": {"ours": "bfloat16", "peak": "bfloat16"}}
        say(f"{name}: {speed:,.0f} tokens/s, MFU {mfu:.1%} of {peak / 1e12:,.0f} TFLOP/s")
        rows += [row(f"{name}, speed", speed, "tokens/s", **more), row(f"{name}, MFU", mfu, "of the peak", AIMS[name], "aim", **more)]
    return rows


def measure(model: str, batch_size: int, steps: int, compile: bool) -> tuple[float, float]:
    """-> (median tokens/s of whole optimizer steps, after WARM_UP; the best square product, FLOP/s)."""
    import torch

    from sparing.train.peak import measure_peak
    from sparing.train.practice import practise, trainer_of

    peak = measure_peak("cuda", torch.bfloat16, (4096, 8192, 16384), repeats=10).flops
    train = TrainConfig(batch_size=batch_size, seq_len=SEQ_LEN, device="cuda", compile=compile, document_mask=False)
    trainer = trainer_of(Config(model=MODELS[model], train=train))
    seconds = []
    for _ in range(WARM_UP + steps):
        torch.cuda.synchronize()
        before = time.perf_counter()
        practise(trainer)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    return batch_size * SEQ_LEN / statistics.median(seconds[WARM_UP:]), peak
