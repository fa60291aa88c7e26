"""Memory at peak of training in few bits, against float32 weights, gradients and averages as by default: counted and measured."""

from __future__ import annotations

from dataclasses import asdict, replace

from sparing.base.config import Config, ModelConfig, TrainConfig, UserError
from sparing.base.config_file import build
from sparing.bench.eight_bits import fast_kind, few_bits, slow_kind
from sparing.bench.limit import LIMIT, Limit
from sparing.bench.report import row, say
from sparing.bench.worker import Worker, forget_peak, resident_bytes
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
    """Resident bytes of whole optimizer steps on random tokens in this process, over what was resident after importing (`imported`, of
    which `compiler` is what torch's AdamW imports): the `peak`, and how much was there `built`, at the end of the last backward pass and
    after its update. pages: see `native.give_back`."""
    import torch

    from sparing.budget.memory import gives_back
    from sparing.kernels.native import give_back
    from sparing.train.practice import LR_SCALE, MOMENTUM, trainer_of

    before = resident_bytes("VmRSS")
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)  # imports torch's compiler: on one side alone it would count
    chosen = build(Config, config)
    imported = resident_bytes("VmRSS")
    found = {"compiler": imported - before}
    if pages or gives_back(chosen.precision):
        give_back()
    trainer = trainer_of(chosen)
    found["built"] = resident_bytes("VmRSS") - imported
    forget_peak()
    for step in range(steps):
        losses = trainer.gradients(trainer.feed.batch(step), step)
        found["backward"] = resident_bytes("VmRSS") - imported
        trainer.update(losses["grad_norm"], LR_SCALE, MOMENTUM)
        found["updated"] = resident_bytes("VmRSS") - imported
    return {"peak": resident_bytes("VmHWM") - imported, "imported": imported, **found}


def precision_memory(
    models: str = ",".join(MODELS), batch_size: int = 4, seq_len: int = 512, steps: int = 2, linear: str | None = None,
    recompute: bool = False, limit: str = LIMIT,
) -> list[dict]:  # fmt: skip
    """Rows: resident bytes at peak over those after importing, and the plan's count by part; each side in a process of its own, in turn.

    Both sides compute in what training multiplies in on this machine: the question is what few bits save of the memory that training takes
    here. In float32 activations stay full on our side too: only 16-bit ones are kept in int8. linear: arithmetic of our side (none, int8,
    fp8); default: int8 where the processor has it, else none. The full side runs twice: as it is by default, and with our side's pages
    (`native.give_back`). recompute: every layer's activations, on both sides; without it ours makes norms again, which is below 0.1 %
    of the FLOPs. limit: of all that in time.
    """
    lines, until, dtype = [], Limit.of(limit), this_machine().training_dtype("cpu")
    if linear is None:
        linear = fast_kind("cpu") or "none"
    elif slow := slow_kind(linear, "cpu"):
        say(f"--linear {slow}")
    for name in models.split(","):
        if name not in MODELS:
            raise UserError(f"bench precision memory: no model {name!r}; choose from {', '.join(MODELS)}")
        train = TrainConfig(
            seq_len=seq_len,
            batch_size=batch_size,
            dtype=dtype,
            replicas=1,
            threads=1,
            device="cpu",
            recompute=recompute,
            document_mask=False,
        )
        full = Config(model=MODELS[name], train=train)
        small = replace(full, precision=few_bits(linear, dtype))
        found = {}
        for side, config, pages in (("full", full, False), ("ours", small, True), ("full, pages", full, True)):
            with Worker(1, until) as worker:
                asked = {"function": "precision_memory.measure", "config": asdict(config), "steps": steps, "pages": pages}
                found[side] = worker.ask("run", **asked)
            say(f"{name}, {side}: {found[side]['peak'] / MIB:,.0f} MiB")
        size = parameters(full.model).total
        formats = {"formats": {"ours": dtype, "peer": dtype}, "linear": linear}
        more = {**formats, "parameters": size, "required": 0.5, "tokens": batch_size * seq_len, "recompute": recompute, "found": found}
        title, ours = f"{name}, {size / 1e6:.0f}M", found["ours"]["peak"] / MIB
        peer = "float32 weights, gradients, averages"
        lines.append(row(f"{title}: peak", ours, "MiB", found["full"]["peak"] / MIB, peer, **more))
        lines.append(row(f"{title}: peak", ours, "MiB", found["full, pages"]["peak"] / MIB, f"{peer}; our allocation", **more))
        planned = [training_memory(config) for config in (small, full)]
        for part in ("weights", "gradients", "optimizer", "activations"):
            lines.append(row(f"{title}: {part}, counted", *_of(planned, part), peer, **formats))
        sums = [sum(getattr(memory, part) for part in ("weights", "gradients", "optimizer", "activations")) / MIB for memory in planned]
        lines.append(row(f"{title}: all four, counted", sums[0], "MiB", sums[1], peer, required=0.5, **formats))
        for side, memory in zip(("ours", "full"), planned, strict=True):
            # Our updates do without torch's, and a run of them without that import.
            measured = (found[side]["peak"] + found[side]["imported"] - (side == "ours") * found[side]["compiler"]) / MIB
            plan = f"{title}: plan of the process, {side}"
            lines.append(row(plan, memory.total / MIB, "MiB", measured, "measured", required=0.1, **formats))
    return lines


def _of(planned: list, part: str) -> tuple[float, str, float]:
    ours, peer = (getattr(memory, part) / MIB for memory in planned)
    return ours, "MiB", peer
