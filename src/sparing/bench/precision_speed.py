"""Speed of training in 8 bits beside 16: whole steps of the same model on the same batch, in turn; and the products alone."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from statistics import median

from sparing.base.hardware import machine
from sparing.bench.precision_memory import SMALL
from sparing.bench.report import row, say
from sparing.bench.worker import Worker
from sparing.config import Config, ModelConfig, PrecisionConfig, TrainConfig
from sparing.config_file import build

REQUIRED = {"cpu": {512: 1.15, 1024: 1.15}, "cuda": {2048: 1.15, 4096: 1.3}}
"""8 bits against 16, by width."""
LAYERS = 4


def model_of(width: int) -> ModelConfig:
    """A mixture of this width: MLA, one dense layer and three of 16 experts, top 2."""
    return ModelConfig(
        vocab_size=4096, hidden_size=width, num_layers=LAYERS, num_dense_layers=1, intermediate_size=3 * width, num_heads=width // 64,
        q_lora_rank=width // 2, kv_lora_rank=width // 4, n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=width // 2,
    )  # fmt: skip


def precision_speed(widths: str = "256, 512, 1024", kind: str | None = None, rounds: int = 7, rows: int = 16) -> list[dict]:
    """Rows: tokens/s of whole optimizer steps (forward, backward, clipping, Muon and AdamW, router biases) with 8-bit products, and with
    the memory figure's storage besides, each beside bfloat16 over float32: median of the ratios of `rounds` turns, every side in a process
    of its own; and the products' own ratio. kind: int8 or fp8; default: what this machine has.

    rows: sequences of 512 in a batch. 16 are the 8,192 tokens that `resolve` chooses on a CPU for runs of more than 20 M tokens, as these
    widths have, in one micro-batch, which calibration tries first: with smaller batches the optimizer would weigh more than in a run.
    Steps that measure errors (one in a hundred) are not among those timed.
    """
    lines = []
    for width in (int(w) for w in str(widths).split(",")):
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker(machine().cores_physical)) for _ in range(3)]
            fact = workers[0].ask("run", function="precision_speed.facts", kind=kind)
            sides = {"bfloat16": PrecisionConfig(), f"{fact['kind']} products": PrecisionConfig(linear=fact["kind"])}
            sides[f"{fact['kind']} and storage"] = replace(SMALL, linear=fact["kind"])
            for worker, precision in zip(workers, sides.values(), strict=True):
                worker.ask("make", function="precision_speed.Side", precision=asdict(precision), width=width, rows=rows)
            speeds: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(rounds):
                for side, worker in zip(sides, workers, strict=True):
                    worker.ask("step")  # another side's working memory has left the caches
                    speeds[side].append(worker.ask("step")["tokens_per_s"])
            share = workers[1].ask("step")["share"]
            products = workers[0].ask("run", function="precision_speed.products_alone", width=width, kind=fact["kind"], rounds=rounds)
        plain, *ours = sides
        need = REQUIRED[fact["device"]].get(width)
        for side in ours:
            ratios = [a / b for a, b in zip(speeds[side], speeds[plain], strict=True)]
            values = median(speeds[side]), "tokens/s", median(speeds[plain]), "bfloat16, the same model", rounds
            more = {"ratio": median(ratios), "ratios": ratios, "required": need, "share": share, "how": fact["how"]}
            lines.append(row(f"whole step, {side}, d {width}", *values) | more)
            say(f"d {width}, {side}: {median(ratios):.3f} times bfloat16" + (f" (required {need})" if need else ""))
        for shape, ratio in products.items():
            lines.append(row(f"products {shape}, {fact['kind']}, d {width}", ratio, "times bfloat16", 1.0, "kernels.products", rounds))
    return lines


def facts(kind: str | None) -> dict[str, str]:
    """The device, the format (`kind`, or what this machine has), and how it runs here, in words."""
    import torch

    from sparing.precision.linear import fastest_kind, speed_note

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = kind or fastest_kind(device) or "int8"
    return {"device": device, "kind": kind, "how": speed_note(kind, device)}


class Side:
    """A model in training on random tokens, its state kept and its products made as `precision` says; `step` is a whole optimizer step."""

    def __init__(self, precision: dict, width: int, rows: int, length: int = 512):
        import torch

        from sparing.kernels import native
        from sparing.model.init import init_weights
        from sparing.model.transformer import Transformer
        from sparing.precision.policy import Policy
        from sparing.train.optim import Optimizer, keep_as
        from sparing.train.replicas import Replicas

        device = "cuda" if torch.cuda.is_available() else "cpu"
        threads = torch.get_num_threads()
        self.config = Config(
            model=model_of(width), precision=build(PrecisionConfig, precision), train=TrainConfig(batch_size=rows, seq_len=length)
        )
        self.model = Transformer(self.config.model)
        init_weights(self.model, 0)
        self.model.to(device).train()
        self.model.compute_dtype = torch.bfloat16
        keep_as(self.model, self.config)
        self.policy = Policy.of(self.model, self.config)
        self.replicas = Replicas(self.model, threads if device == "cpu" and native.passes() and rows >= threads else 1)
        self.optimizer = Optimizer(self.model, self.config.optim, torch.bfloat16, self.config.precision)
        self.tokens = torch.randint(self.config.model.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0)).to(device)

    def step(self) -> dict[str, float]:
        """-> tokens/s, and the least share of any direction's multiplications in 8 bits."""
        from sparing.model.router import update_biases
        from sparing.train.peak import wait

        t, size = self.config.train, self.config.train.batch_size * self.config.train.seq_len
        before = time.perf_counter()
        self.policy.begin(1)  # measures nothing: 0 would
        targets = self.tokens[:, 1:, None]
        self.replicas.backward(self.tokens[:, :-1], targets, None, denominator=size, sequence_balance=t.sequence_balance)
        self.policy.end()
        self.optimizer.clip(float(self.optimizer.grad_norm()))
        self.optimizer.step(0.01, 0.95)
        update_biases(self.model, t.bias_update_rate)
        wait(self.tokens.device.type)
        return {"tokens_per_s": size / (time.perf_counter() - before), "share": min(self.policy.shares().values())}


def products_alone(width: int, kind: str, rounds: int) -> dict[str, float]:
    """Median ratio of 16-bit to 8-bit time, one thread, in turn: forward, input gradient, weight gradient of a square weight."""
    import torch

    from sparing.kernels import products
    from sparing.precision import products as eight
    from sparing.precision.products import SCHEMES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, g = (torch.randn(2048, width, device=device).bfloat16() for _ in range(2))
    w, found, out = torch.randn(width, width, device=device), torch.zeros(2, dtype=torch.int64, device=device), {}
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
