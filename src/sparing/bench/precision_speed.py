"""Speed of training in 8 bits beside 16: whole steps of the same model on the same batch, in turn; and the products alone."""

from __future__ import annotations

import time
from functools import partial
from statistics import median

from sparing.account.hardware import machine
from sparing.bench.report import row, say
from sparing.bench.worker import Worker
from sparing.config import ModelConfig, PrecisionConfig, TrainConfig

REQUIRED = {"cpu": {512: 1.15, 1024: 1.15}, "cuda": {2048: 1.15, 4096: 1.3}}
"""8 bits against 16, by width."""
LAYERS = 4


def model_of(width: int) -> ModelConfig:
    """A mixture of this width: MLA, one dense layer and three of 16 experts, top 2."""
    return ModelConfig(
        vocab_size=4096, hidden_size=width, num_layers=LAYERS, num_dense_layers=1, intermediate_size=3 * width, num_heads=width // 64,
        q_lora_rank=width // 2, kv_lora_rank=width // 4, n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=width // 2,
    )  # fmt: skip


def precision_speed(widths: str = "256, 512, 1024", kind: str | None = None, rounds: int = 7, rows: int = 8) -> list[dict]:
    """Rows: tokens/s of whole optimizer steps (forward, backward, clipping, Muon and AdamW), 8 bits beside 16, median of the ratios of
    `rounds` turns; and the products' own ratio. kind: int8 or fp8; default: what this machine has. rows: sequences of 512 in a batch."""
    lines = []
    for width in (int(w) for w in str(widths).split(",")):
        with Worker(machine().cores_physical) as worker:
            result = worker.ask("run", function="precision_speed.measure", width=width, kind=kind, rounds=rounds, rows=rows)
        ratios = [a / b for a, b in zip(result["eight"], result["sixteen"], strict=True)]
        name, need = f"{result['kind']}, d {width}", REQUIRED[result["device"]].get(width)
        values = median(result["eight"]), "tokens/s", median(result["sixteen"]), "bfloat16, the same model", rounds
        more = {"ratio": median(ratios), "ratios": ratios, "required": need, "share": result["share"], "how": result["how"]}
        lines.append(row(f"whole step, {name}", *values) | more)
        for shape, ratio in result["products"].items():
            lines.append(row(f"products {shape}, {name}", ratio, "times bfloat16", 1.0, "kernels.products", rounds))
        say(f"{name}: {median(ratios):.3f} times bfloat16" + (f" (required {need})" if need else ""))
    return lines


def measure(width: int, kind: str | None, rounds: int, rows: int, length: int = 512) -> dict:
    """Both sides in this process, in turn, on the same weights: {"eight": tokens/s of each round, "sixteen": ...}."""
    import torch

    from sparing.config import OptimConfig
    from sparing.kernels import native
    from sparing.model.init import init_weights
    from sparing.model.transformer import Transformer
    from sparing.precision.linear import fastest_kind, install, speed_note
    from sparing.precision.policy import Policy
    from sparing.train.optim import Optimizer
    from sparing.train.replicas import Replicas

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = kind or fastest_kind(device) or "int8"
    config = model_of(width)
    model = Transformer(config)
    init_weights(model, 0)
    model.to(device).train()
    model.compute_dtype = torch.bfloat16
    threads = torch.get_num_threads()
    replicas = threads if device == "cpu" and native.passes() and rows >= threads else 1
    optimizer = Optimizer(model, OptimConfig())
    t = TrainConfig()
    tokens = torch.randint(config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
    sides = {}
    for side, wanted in (("sixteen", None), ("eight", kind)):
        sites = install(model, wanted)
        sides[side] = Replicas(model, replicas), [m.__dict__.get("eight_bit") for m in model.modules()], sites

    def step(side: str) -> float:
        divided, installed, _ = sides[side]
        for module, mine in zip(model.modules(), installed, strict=True):
            if hasattr(module, "eight_bit"):
                module.eight_bit = mine
        before = time.perf_counter()
        divided.backward(tokens[:, :-1], tokens[:, 1:, None], None, denominator=rows * length, sequence_balance=t.sequence_balance)
        optimizer.clip(float(optimizer.grad_norm()))
        optimizer.step(0.01, 0.95)
        if device == "cuda":
            torch.cuda.synchronize()
        return rows * length / (time.perf_counter() - before)

    for side in sides:
        step(side)
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            step(side)  # the other side's working memory has left the caches
            speeds[side].append(step(side))
    share = min(Policy(sides["eight"][2], PrecisionConfig()).shares().values())
    return speeds | {
        "kind": kind,
        "device": device,
        "share": share,
        "how": speed_note(kind, device),
        "products": _products(width, kind, rounds, device),
    }


def _products(width: int, kind: str, rounds: int, device: str) -> dict[str, float]:
    """Median ratio of 16-bit to 8-bit time, one thread, in turn: forward, input gradient, weight gradient of a square weight."""
    import torch

    from sparing.kernels import products
    from sparing.precision import products as eight
    from sparing.precision.products import SCHEMES

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, g = (torch.randn(2048, width, device=device).bfloat16() for _ in range(2))
    w, found, out = torch.randn(width, width, device=device), torch.zeros(2, dtype=torch.int64), {}
    for name, (a, b) in {"nt": (x, w), "nn": (g, w), "tn": (g, x)}.items():
        sides = partial(getattr(products, name), a, b), partial(getattr(eight, name), kind, SCHEMES[kind][0], found, a, b)
        ratios = []
        for turn in range(rounds + 1):
            took = [_seconds(side, device) for side in sides]
            if turn:
                ratios.append(took[0] / took[1])
        out[name] = median(ratios)
    torch.set_num_threads(threads)
    return out


def _seconds(function, device: str) -> float:
    import torch

    before = time.perf_counter()
    for _ in range(3):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - before
