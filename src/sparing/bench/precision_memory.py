"""Memory at peak of training in few bits, against bfloat16 compute over float32 weights, gradients and averages: counted and measured."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from sparing.bench.report import row, say
from sparing.bench.worker import Worker, forget_peak, resident_bytes
from sparing.budget.flops import parameters
from sparing.budget.memory import training_memory
from sparing.config import Config, ModelConfig, PrecisionConfig, TrainConfig
from sparing.config_file import build

DENSE = ModelConfig(
    vocab_size=8192, hidden_size=768, num_layers=12, num_dense_layers=12, intermediate_size=2304, num_heads=12, q_lora_rank=384,
    kv_lora_rank=192, max_position_embeddings=512,
)  # fmt: skip
MODELS = {
    "dense": DENSE,
    "mixture": replace(DENSE, hidden_size=640, num_layers=10, num_dense_layers=1, intermediate_size=1920, num_heads=10, q_lora_rank=320,
                       kv_lora_rank=160, n_routed_experts=16, moe_intermediate_size=320),
}  # fmt: skip
"""110 and 125 million parameters."""
FULL, SMALL = PrecisionConfig(), PrecisionConfig(weights="bfloat16", moments="int8", activations="int8")


def measure(config: dict, steps: int) -> dict:
    """Bytes of whole optimizer steps in this process, over what was resident after importing: at the peak, and at moments of the last step."""
    import torch

    from sparing.model.init import init_weights
    from sparing.model.router import update_biases
    from sparing.model.transformer import Transformer
    from sparing.train.optim import Optimizer, store_weights
    from sparing.train.replicas import Replicas

    chosen = build(Config, config)
    c, t = chosen.model, chosen.train
    baseline, moments = resident_bytes("VmRSS"), {}
    model = Transformer(c)
    init_weights(model, 0)
    store_weights(model, chosen.precision)
    model.compute_dtype = getattr(torch, t.dtype)
    model.set_recompute(t.recompute)
    model.set_int8_activations(chosen.precision.activations == "int8")
    model.train()
    optimizer = Optimizer(model, chosen.optim, model.compute_dtype, chosen.precision)
    replicas = Replicas(model, t.replicas or 1)
    tokens = torch.randint(0, c.vocab_size, (t.batch_size, t.seq_len + 1), generator=torch.Generator().manual_seed(0))
    moments["start"] = resident_bytes("VmRSS") - baseline
    forget_peak()
    for _ in range(steps):
        for micro in tokens.split(t.micro_batch_size or t.batch_size):
            replicas.backward(micro[:, :-1], micro[:, 1:, None], None, denominator=tokens.numel(), sequence_balance=t.sequence_balance)
        moments["backward"] = resident_bytes("VmHWM") - baseline
        optimizer.clip(float(optimizer.grad_norm()))
        optimizer.step(1e-3, 0.95)
        moments["step"] = resident_bytes("VmRSS") - baseline
        update_biases(model, t.bias_update_rate)
    return {"peak": resident_bytes("VmHWM") - baseline, **moments}
