"""Figure 3: training speed and MFU on one CUDA GPU at sequence 2048, of a mixture and two dense models."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sparing.base.config import Config, ModelConfig, TrainConfig, UserError
from sparing.base.hardware import machine
from sparing.bench.limit import LIMIT, Limit
from sparing.bench.ours import shifted
from sparing.bench.report import paths_of, row, say
from sparing.bench.worker import Worker
from sparing.budget.flops import parameters, train_flops
from sparing.data.loader import Batch
from sparing.train.peak import measure_peak
from sparing.train.practice import MOMENTUM, trainer_of

DENSE = ModelConfig(
    vocab_size=32768,
    hidden_size=768,
    num_layers=12,
    num_dense_layers=12,
    intermediate_size=2816,
    num_heads=12,
    q_lora_rank=384,
    kv_lora_rank=192,
    max_position_embeddings=2048,
)
MODELS = {
    "moe 124M active": replace(DENSE, num_dense_layers=1, n_routed_experts=64, num_experts_per_tok=8, moe_intermediate_size=320),
    "dense 124M": DENSE,
    "dense 1B": replace(DENSE, hidden_size=2048, num_layers=20, num_dense_layers=20, intermediate_size=5632, num_heads=16, q_lora_rank=1024,
                        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
}  # fmt: skip
AIMS = {"moe 124M active": 0.25, "dense 124M": 0.40, "dense 1B": 0.55}
"""MFU."""
SEQ_LEN = 2048


def gpu(
    data: str | Sequence[str] = (),
    models: str = ",".join(MODELS),
    batch_size: int = 16,
    steps: int = 20,
    warm_up: int = 5,
    compile: bool = True,
    limit: str = LIMIT,
) -> list[dict]:
    """Rows of the figure: tokens/s and MFU of each of `models` (comma-separated) over `steps` whole steps, bfloat16, our optimizer.

    The text is tokenised beforehand. limit: of all that in time. Raises UserError without a CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("bench train gpu: torch sees no CUDA GPU on this machine; `sparing bench train throughput` measures its CPU")
    names = [name.strip() for name in models.split(",")]
    if unknown := [name for name in names if name not in MODELS]:
        raise UserError(f"bench train gpu: no model {unknown[0]!r}; choose from {', '.join(MODELS)}")
    until, threads, rows = Limit.of(limit), machine().cores_physical, []
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as folder:
        batches = str(Path(folder, "batches.safetensors"))
        with Worker(threads, until) as worker:
            size = {"count": warm_up + steps, "batch_size": batch_size, "seq_len": SEQ_LEN, "vocab_size": DENSE.vocab_size}
            worker.ask("run", function="throughput.save_batches", path=batches, data=paths_of(data), **size)
        for name in names:
            with Worker(threads, until) as worker:
                asked = {"model": name, "batches": batches, "warm_up": warm_up, "compile": compile}
                found = worker.ask("run", function="gpu.measure", **asked)
            speed, peak = found["tokens_per_s"], found["peak"]
            mfu = speed * train_flops(MODELS[name], SEQ_LEN) / peak
            counts = parameters(MODELS[name])
            more = {"runs": steps, "parameters": counts.total, "active_parameters": counts.active, "peak_flops": peak}
            more |= {"formats": {"ours": "bfloat16", "peak": "bfloat16"}}
            say(f"{name}: {speed:,.0f} tokens/s, MFU {mfu:.1%} of {peak / 1e12:,.0f} TFLOP/s")
            rows += [row(f"{name}, speed", speed, "tokens/s", **more), row(f"{name}, MFU", mfu, "of the peak", AIMS[name], "aim", **more)]
    return rows


def measure(model: str, batches: str, warm_up: int, compile: bool) -> dict:
    """`peak`: the best square product, FLOP/s; `tokens_per_s`."""
    from safetensors.torch import load_file

    peak = measure_peak("cuda", torch.bfloat16, (4096, 8192, 16384), repeats=10).flops
    tokens = load_file(batches)["tokens"].long().to("cuda")
    return {"peak": peak, "tokens_per_s": _speed(MODELS[model], tokens, warm_up, compile)}


def _speed(config: ModelConfig, batches: torch.Tensor, warm_up: int, compile: bool) -> float:
    """Median tokens/s of whole optimizer steps, after `warm_up`."""
    train = TrainConfig(batch_size=len(batches[0]), seq_len=batches.shape[-1], device="cuda", compile=compile, document_mask=False)
    trainer = trainer_of(Config(model=config, train=train))
    took = []
    for tokens in batches:
        torch.cuda.synchronize()
        before = time.perf_counter()
        losses = trainer.gradients(Batch(tokens, shifted(tokens, 1)))
        trainer.update(losses["grad_norm"], 1.0, MOMENTUM)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - before)
    return batches[0].numel() / statistics.median(took[warm_up:])
