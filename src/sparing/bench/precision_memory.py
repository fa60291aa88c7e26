"""Compares the peak memory of training in few bits, predicted and measured, with the default: float32 weights, gradients and averages."""

from __future__ import annotations

from dataclasses import asdict, replace

from sparing.account.power import peak_memory, reset_peak_memory, resident_memory
from sparing.base.config import Config, ModelConfig, TrainConfig, UserError
from sparing.base.config_file import build
from sparing.base.messages import say
from sparing.bench.eight_bits import fast_kind, few_bits, slow_kind
from sparing.bench.limit import LIMIT, Limit
from sparing.bench.results import row
from sparing.bench.worker import Worker
from sparing.budget.flops import parameters
from sparing.budget.memory import training_memory
from sparing.kernels.formats import this_machine

DENSE = ModelConfig(
    vocab_size=8192, hidden_size=768, num_layers=13, num_dense_layers=13, intermediate_size=2304, num_heads=12, q_lora_rank=384,
    kv_lora_rank=192, max_position_embeddings=512,
)  # fmt: skip
MODELS = {
    "dense": DENSE,
    "mixture": replace(DENSE, hidden_size=640, num_layers=10, num_dense_layers=1, intermediate_size=1920, num_heads=10, q_lora_rank=320,
                       kv_lora_rank=160, n_routed_experts=16, moe_intermediate_size=320),
}  # fmt: skip
"""105 and 121 million parameters."""
MIB = 2.0**20


def measure(config: dict, steps: int, pages: bool = False) -> dict:
    """Resident bytes of whole optimizer steps on random tokens in this process.

    -> `imported`: after importing, of which torch's AdamW imports `compiler`; and beyond that: the `peak`, and what was resident when the
    trainer was `built`, after the last `backward` pass and after its update (`updated`). pages: see `native.give_back`.
    """
    import torch

    from sparing.budget.memory import gives_back
    from sparing.kernels.native import give_back
    from sparing.train.practice import LR_SCALE, MOMENTUM, trainer_of

    before = resident_memory()
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)  # imports torch's compiler: on one side alone it would count
    chosen = build(Config, config)
    imported = resident_memory()
    bytes_at = {"compiler": imported - before}
    if pages or gives_back(chosen.precision):
        give_back()
    trainer = trainer_of(chosen)
    bytes_at["built"] = resident_memory() - imported
    reset_peak_memory()
    for step in range(steps):
        losses = trainer.gradients(trainer.feed.batch(step), step)
        bytes_at["backward"] = resident_memory() - imported
        trainer.update(losses["grad_norm"], LR_SCALE, MOMENTUM)
        bytes_at["updated"] = resident_memory() - imported
    return {"peak": peak_memory()[0] - imported, "imported": imported, **bytes_at}


def precision_memory(
    models: str = ",".join(MODELS), batch_size: int = 4, seq_len: int = 512, steps: int = 2, linear: str | None = None,
    recompute: bool = False, limit: str = LIMIT,
) -> list[dict]:  # fmt: skip
    """Rows: resident MiB at the peak beyond those after importing, and the plan's count of each part; each side in a process of its own.

    Both sides compute in what training multiplies in on this machine. Where that is float32, activations stay full on our side too: only
    16-bit ones are kept in int8. linear: products of our side (none, int8, fp8); default: int8 where the processor has it, else none. The
    full side runs twice: as it is by default, and with our side's pages (`native.give_back`). recompute: recompute every layer's
    activations, on both sides. limit: time of the whole figure.
    """
    lines, until, dtype = [], Limit.of(limit), this_machine().training_dtype("cpu")
    if linear is None:
        linear = fast_kind("cpu") or "none"
    elif slow := slow_kind(linear, "cpu"):
        say(f"--linear {slow}")
    for name in models.split(","):
        if name not in MODELS:
            raise UserError(f"bench precision memory: no model {name!r}; choose from {', '.join(MODELS)}")
        size = {"seq_len": seq_len, "batch_size": batch_size}
        train = TrainConfig(**size, dtype=dtype, replicas=1, threads=1, device="cpu", recompute=recompute, document_mask=False)
        full = Config(model=MODELS[name], train=train)
        small = replace(full, precision=few_bits(linear, dtype))
        memory_of = {}
        for side, config, pages in (("full", full, False), ("ours", small, True), ("full, pages", full, True)):
            with Worker(1, until) as worker:
                memory_of[side] = worker.run(measure, config=asdict(config), steps=steps, pages=pages)
            say(f"{name}, {side}: {memory_of[side]['peak'] / MIB:,.0f} MiB")
        size = parameters(full.model).total
        formats = {"formats": {"ours": dtype, "peer": dtype}, "linear": linear}
        more = {**formats, "parameters": size, "required": 0.5, "tokens": batch_size * seq_len, "recompute": recompute, "found": memory_of}
        title, ours = f"{name}, {size / 1e6:.0f}M", memory_of["ours"]["peak"] / MIB
        peer = "float32 weights, gradients, averages"
        lines.append(row(f"{title}: peak", ours, "MiB", memory_of["full"]["peak"] / MIB, peer, **more))
        lines.append(row(f"{title}: peak", ours, "MiB", memory_of["full, pages"]["peak"] / MIB, f"{peer}; our allocation", **more))
        planned = [training_memory(config) for config in (small, full)]
        for part in ("weights", "gradients", "optimizer", "activations"):
            lines.append(row(f"{title}: {part}, counted", *_of(planned, part), peer, **formats))
        sums = [sum(getattr(memory, part) for part in ("weights", "gradients", "optimizer", "activations")) / MIB for memory in planned]
        lines.append(row(f"{title}: all four, counted", sums[0], "MiB", sums[1], peer, required=0.5, **formats))
        for side, memory in zip(("ours", "full"), planned, strict=True):
            # Our updates do without torch's, and a run of them without that import.
            measured = (memory_of[side]["peak"] + memory_of[side]["imported"] - (side == "ours") * memory_of[side]["compiler"]) / MIB
            plan = f"{title}: plan of the process, {side}"
            lines.append(row(plan, memory.total / MIB, "MiB", measured, "measured", required=0.1, **formats))
    return lines


def _of(planned: list, part: str) -> tuple[float, str, float]:
    ours, peer = (getattr(memory, part) / MIB for memory in planned)
    return ours, "MiB", peer
