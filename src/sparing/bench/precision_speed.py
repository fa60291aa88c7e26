"""Compares the speed of training in 8 bits with the format that this machine trains in: whole steps of a model, and products alone."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from statistics import median

from sparing.base.config import Config, ModelConfig, PrecisionConfig, TrainConfig
from sparing.base.config_file import build
from sparing.base.messages import say
from sparing.bench.eight_bits import fast_kind, few_bits, slow_kind
from sparing.bench.limit import LIMIT, Limit, Rounds
from sparing.bench.results import row
from sparing.bench.worker import Worker
from sparing.kernels.formats import this_machine
from sparing.precision.eight_bit import speed_note

REQUIRED = {"cpu": {512: 1.15, 1024: 1.15}, "cuda": {2048: 1.15, 4096: 1.3}}
"""Speed in 8 bits / speed in 16 that the figure should reach, by device and width."""
LAYERS = 4
WIDTHS, SMALL_WIDTHS = ("256, 512, 1024", 16), ("64", 2)
"""(widths, sequences in a batch). SMALL_WIDTHS is for machines without 8-bit arithmetic."""


def model_of(width: int) -> ModelConfig:
    """A mixture of this width: MLA, one dense layer and three of 16 experts, top 2."""
    return ModelConfig(
        vocab_size=4096, hidden_size=width, num_layers=LAYERS, num_dense_layers=1, intermediate_size=3 * width, num_heads=width // 64,
        q_lora_rank=width // 2, kv_lora_rank=width // 4, n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=width // 2,
    )  # fmt: skip


def precision_speed(
    widths: str | None = None, kind: str | None = None, rounds: int = 7, rows: int | None = None, limit: str = LIMIT
) -> list[dict]:
    """Measure tokens/s of whole optimizer steps in 8 bits and in 16 (or float32, where this machine trains in that).

    Rows: 8-bit products, 8-bit products with 8-bit storage (that of the memory figure), and the ratio of the products alone. A step has
    forward and backward pass, clipping, Muon and AdamW, and the routers' biases. Steps that measure errors (one in a hundred) are not
    timed. Each side is a process; ratios are medians over `rounds` turns.

    widths: default 256, 512, 1024. kind: int8 or fp8; default: the format that this machine multiplies fast. Without one, the defaults are
    int8 and a small model; `--kind int8` then measures the usual widths. rows: sequences of 512 tokens in a batch, default 16: the 8,192
    tokens that `resolve` chooses on a CPU for runs of more than 20 M tokens; in smaller batches the optimizer would weigh more than in a
    run. limit: time of the whole figure, shared by the widths.
    """
    lines, until, threads = [], Limit.of(limit), this_machine().cores_physical
    fact = facts(kind)
    plain, chosen = fact["dtype"], fact["kind"]
    if fact["slow"] and kind:
        say(f"--kind {fact['slow']}")
    elif fact["slow"]:
        say(f"no 8-bit arithmetic here that is faster ({fact['slow']}): a small model only; --kind {chosen} measures larger ones")
    usual = WIDTHS if kind or not fact["slow"] else SMALL_WIDTHS
    widths, rows = widths or usual[0], rows or usual[1]
    sides = {
        plain: PrecisionConfig(),
        f"{chosen} products": PrecisionConfig(linear=chosen),
        f"{chosen} and storage": few_bits(chosen, plain),
    }
    wanted = [int(width) for width in str(widths).split(",")]
    for number, width in enumerate(wanted):
        share = until.within(until.left() / (len(wanted) - number))
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker(threads, share)) for _ in sides]
            needs = 0.0
            for worker, precision in zip(workers, sides.values(), strict=True):
                worker.make(PrecisionSide, precision=asdict(precision), width=width, rows=rows)
                part = [worker.call("step", rows=1) for _ in range(2)][1]
                needs += 2 * (rows * part["passes_s"] + part["update_s"])
            if needs > share.left():
                why = f"d {width}: a round would take about {needs:,.0f} s, of {share} {share.left():,.0f} s are left"
                say(f"skipped: {why}")
                lines.append(row(f"whole step, {chosen} products, d {width}", None, "tokens/s", runs=0, cut_short=why))
                continue
            speeds: dict[str, list[float]] = {side: [] for side in sides}
            turns = Rounds(rounds, share)
            for _ in turns:
                for side, worker in zip(sides, workers, strict=True):
                    worker.call("step")  # warms the caches up again after the other sides
                    speeds[side].append(worker.call("step")["tokens_per_s"])
            least = workers[1].call("step", rows=1)["share"]
            products = workers[0].run(products_alone, width=width, kind=chosen, dtype=plain, rounds=turns.made)
        need = REQUIRED[fact["device"]].get(width)
        formats = {"formats": {"ours": chosen, "peer": plain}, **turns.more()}
        for side in list(sides)[1:]:
            ratios = [a / b for a, b in zip(speeds[side], speeds[plain], strict=True)]
            values = median(speeds[side]), "tokens/s", median(speeds[plain]), f"{plain}, the same model", turns.made
            more = {"ratio": median(ratios), "ratios": ratios, "required": need, "share": least, "how": fact["how"], **formats}
            lines.append(row(f"whole step, {side}, d {width}", *values) | more)
            say(f"d {width}, {side}: {median(ratios):.3f} times {plain}" + (f" (required {need})" if need else ""))
        for shape, ratio in products.items():
            name = f"products {shape}, {chosen}, d {width}"
            lines.append(row(name, ratio, f"times {plain}", 1.0, "kernels.products", turns.made, **formats))
    return lines


def facts(kind: str | None) -> dict[str, str | None]:
    """{"device"; "dtype": format of ordinary training; "kind": 8-bit format; "how": how that runs here, in words; "slow": the same if it is
    not faster, else None}."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = kind or fast_kind(device) or "int8"
    dtype = this_machine().training_dtype(device)
    return {"device": device, "dtype": dtype, "kind": kind, "how": speed_note(kind, device), "slow": slow_kind(kind, device)}


class PrecisionSide:
    """A model that trains on random tokens, with storage and products as `precision` says."""

    def __init__(self, precision: dict, width: int, rows: int, length: int = 512):
        import torch

        from sparing.kernels import native
        from sparing.train.practice import trainer_of

        device = "cuda" if torch.cuda.is_available() else "cpu"
        threads = torch.get_num_threads()
        replicas = threads if device == "cpu" and native.passes() and rows >= threads else 1
        dtype = this_machine().training_dtype(device)
        train = TrainConfig(batch_size=rows, seq_len=length, dtype=dtype, device=device, replicas=replicas, document_mask=False)
        self.trainer = trainer_of(Config(model=model_of(width), precision=build(PrecisionConfig, precision), train=train))

    def step(self, rows: int | None = None) -> dict[str, float]:
        """One optimizer step on the first `rows` sequences (None: all). -> tokens/s, seconds of the passes and of the update, and the
        smallest share of 8-bit multiplications of any direction."""
        from sparing.train.peak import wait
        from sparing.train.practice import LR_SCALE, MOMENTUM

        batch = self.trainer.feed.batch(0)[:rows]
        before = time.perf_counter()
        losses = self.trainer.gradients(batch)  # of a step that measures no errors: the first would
        between = time.perf_counter()
        self.trainer.update(losses["grad_norm"], LR_SCALE, MOMENTUM)
        wait(self.trainer.device.type)
        after = time.perf_counter()
        share = min(self.trainer.policy.shares().values())
        size = batch.tokens.numel()
        return {"tokens_per_s": size / (after - before), "passes_s": between - before, "update_s": after - between, "share": share}


def products_alone(width: int, kind: str, dtype: str, rounds: int) -> dict[str, float]:
    """Time in `dtype` / time in 8 bits of the three products of a square weight, on one thread, both with the kernels that training would
    have: medians over `rounds` turns."""
    import torch

    from sparing.kernels import native, products
    from sparing.precision import eight_bit as eight
    from sparing.precision.eight_bit import SCHEMES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads, kernels = torch.get_num_threads(), products.fitting(1, 1, device, dtype)[0]
    torch.set_num_threads(1)
    x, g = (torch.randn(2048, width, device=device).to(getattr(torch, dtype)) for _ in range(2))
    w, faults, out = torch.randn(width, width, device=device), torch.zeros(2, dtype=torch.int64, device=device), {}
    for name, (a, b) in {"nt": (x, w), "nn": (g, w), "tn": (g, x)}.items():
        sides = partial(getattr(products, name), a, b), partial(getattr(eight, name), kind, SCHEMES[kind][0], faults, a, b)
        ratios = []
        for turn in range(rounds + 1):
            with native.path(kernels):
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
