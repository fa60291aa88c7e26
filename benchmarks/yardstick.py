"""A dense Llama-style model trained by AdamW and a cosine in plain transformers, on our data stage and scored by our bits per byte."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.trials import import_transformers
from sparing.base.config import DataConfig, UserError
from sparing.base.hardware import cores
from sparing.base.messages import say
from sparing.bench.limit import Limit, in_parallel, run_seconds
from sparing.bench.results import paths_of, row
from sparing.bench.worker import Worker
from sparing.budget.units import parse_budget
from sparing.data.loader import Loader
from sparing.data.prepare import prepare
from sparing.data.sources import documents
from sparing.evals.bpb import bpb, nll_from_logits
from sparing.kernels.formats import this_machine

EVAL_BYTES = 200_000
"""What an evaluation inside the budget reads, as in our own runs."""
LEAST_TOKENS = 1 << 16
"""Tokenised for however short a run: text is sampled in parts of about 64 kB."""
FORWARD_SHARE = 0.4
"""A forward pass's share of a training step, generously."""


@dataclass(frozen=True)
class Yardstick:
    """Shape and recipe."""

    hidden_size: int = 256
    layers: int = 6
    lr: float = 2e-3
    batch: int = 16
    vocab_size: int = 4096
    seq_len: int = 512
    weight_decay: float = 0.1
    """Of the matrices."""
    clip: float = 1.0
    warmup: float = 0.03
    """Share of the run."""
    final_lr: float = 0.0
    """Where the cosine ends, as a share of the peak."""
    seed: int = 0

    def __str__(self) -> str:
        return f"Llama d {self.hidden_size}, {self.layers} layers, lr {self.lr:g}, batch {self.batch}"

    def build(self):
        """LlamaForCausalLM: heads of 64, feed-forward of 3 d, untied, attention by SDPA."""
        transformers = import_transformers()
        config = transformers.LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=3 * self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.hidden_size // 64),
            max_position_embeddings=self.seq_len,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(self.seed)
        return transformers.LlamaForCausalLM(config)


def train_yardstick(
    yardstick: dict | Yardstick,
    data: Sequence[str],
    val: Sequence[str],
    budget: str,
    started: float | None = None,
    contexts: Sequence[int] = (),
    val_bytes: int | None = None,
    dtype: str | None = None,
) -> dict:
    """Train one yardstick and score it on `val` -> {"bpb": at the first context, "bpb_by_context", "tokens", "steps", "seconds", ...}.

    budget: a time, which covers everything from `started` (`time.monotonic()`) to the saved weights, an evaluation of 200 kB included,
    but not the scoring on `val`; or tokens, "5Mtok". contexts: windows of the scoring (default: the trained one). dtype: bfloat16, by
    autocast, or float32; default: what this machine multiplies faster.
    """
    started = time.monotonic() if started is None else started
    dtype = dtype or this_machine().training_dtype("cpu")
    y = yardstick if isinstance(yardstick, Yardstick) else Yardstick(**yardstick)
    amount = parse_budget(budget)
    if amount.unit not in ("s", "tok"):
        raise UserError(f"the yardstick's budget is a time or tokens, not {budget}")
    seconds, total = (amount.amount, None) if amount.unit == "s" else (None, max(1, int(amount.amount) // (y.batch * y.seq_len)))
    model = y.build()
    optimizer = _optimizer(model, y)
    step_tokens = y.batch * y.seq_len

    def forward(tokens: torch.Tensor, targets: torch.Tensor | None = None):
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            # shift_labels: the targets are shifted already, and end where their documents do.
            return model(input_ids=tokens, labels=targets, shift_labels=targets) if targets is not None else model(input_ids=tokens)

    step_s = _time_step(forward, optimizer, y) if seconds else 0.0
    wanted = int(1.2 * (step_tokens * (seconds - (time.monotonic() - started)) / step_s if seconds else total * step_tokens))
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as folder:
        store = prepare(DataConfig(paths=tuple(data), max_tokens=max(wanted, LEAST_TOKENS)), y.vocab_size, Path(folder))
        loader = Loader(store, y.seq_len, y.batch, 0, y.seed)
        held_out = list(store.held_out())
        reserve = 1.0 + (FORWARD_SHARE * step_s * EVAL_BYTES / 3.0 / step_tokens)
        step, losses, begun, used = 0, [], time.monotonic(), 0.0
        while step < total if seconds is None else time.monotonic() - started + reserve + used < seconds:
            before = time.monotonic()
            progress = step / total if seconds is None else (before - begun) / (seconds - reserve - (begun - started))
            batch = loader.batch(step)
            loss = forward(batch.tokens, batch.targets[..., 0]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), y.clip)
            for group in optimizer.param_groups:
                group["lr"] = y.lr * _scale(progress, y)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            step, used = step + 1, time.monotonic() - before
        trained = time.monotonic() - begun
        model.eval()
        nll = nll_from_logits(lambda tokens: forward(tokens).logits)
        inside = bpb(nll, store.tokenizer, held_out, y.seq_len, batch=y.batch, max_bytes=EVAL_BYTES)
        model.save_pretrained(Path(folder, "model"))
        spent = time.monotonic() - started
        scores = {}
        for context in contexts or (y.seq_len,):
            texts = (document.text for document in documents(val))
            scores[context] = bpb(nll, store.tokenizer, texts, context, batch=max(1, step_tokens // context), max_bytes=val_bytes)
    return {
        "bpb": next(iter(scores.values()))["bpb"],
        "bpb_by_context": {context: score["bpb"] for context, score in scores.items()},
        "held_out_bpb": inside["bpb"],
        "loss": sum(losses[-64:]) / len(losses[-64:]) if losses else math.nan,
        "tokens": step * step_tokens,
        "steps": step,
        "seconds": spent,
        "tokens_per_s": step * step_tokens / trained,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": dtype,
        "recipe": asdict(y),
    }


def _optimizer(model: torch.nn.Module, y: Yardstick) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": y.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=y.lr, betas=(0.9, 0.95), fused=True)


def _scale(progress: float, y: Yardstick) -> float:
    """Share of the peak learning rate: a linear warm-up, then a cosine to `final_lr`."""
    if progress < y.warmup:
        return (progress + 1e-3) / (y.warmup + 1e-3)
    angle = math.pi * min(1.0, (progress - y.warmup) / (1 - y.warmup))
    return y.final_lr + (1 - y.final_lr) * 0.5 * (1 + math.cos(angle))


def _time_step(forward, optimizer: torch.optim.Optimizer, y: Yardstick) -> float:
    """Seconds of forward and backward on random tokens, the second of two: how much text will be needed. Nothing is learnt from it."""
    tokens = torch.randint(0, y.vocab_size, (y.batch, y.seq_len))
    took = math.inf
    for _ in range(2):
        before = time.monotonic()
        forward(tokens, tokens).loss.backward()
        optimizer.zero_grad(set_to_none=True)
        took = min(took, time.monotonic() - before)
    return took


def tune(
    data: str | Sequence[str],
    val: str | Sequence[str],
    grid: str = "256x6@2e-3, 256x6@4e-3, 128x4@4e-3, 128x4@8e-3",
    budget: str = "2Mtok",
    batch: int = 16,
    parallel: int = 2,
    val_bytes: int = 1_000_000,
    limit: str | None = None,
) -> list[dict]:
    """Losses of yardsticks after equal tokens, `parallel` at a time on one thread each (nothing is timed). grid: "WIDTHxLAYERS@LR, ...".

    limit: time of the whole figure; default: what runs with this budget may take.
    """
    if parse_budget(budget).unit != "tok":
        raise UserError(f"bench train tune: runs at the same time cannot be timed; give a budget in tokens, such as 2Mtok, not {budget}")
    recipes = [asdict(parse_yardstick(text, batch)) for text in grid.split(",")]
    until = Limit.of_runs(limit, [budget] * len(recipes))
    arguments = {"data": paths_of(data), "val": paths_of(val), "budget": budget, "val_bytes": val_bytes}

    def one(recipe: dict) -> dict:
        with Worker(1, until.within(run_seconds(budget))) as worker:
            result = worker.run(train_yardstick, yardstick=recipe, **arguments)
        say(f"{Yardstick(**recipe)}: {result['bpb']:.4f} bits per byte")
        return result

    results = in_parallel(min(parallel, cores()), until, one, recipes)
    rows = []
    for recipe, result in zip(recipes, results, strict=True):
        more = {"result": result, "formats": {"peer": result["dtype"]}}
        rows.append(row(str(Yardstick(**recipe)), None, "bits per byte", result["bpb"], f"transformers, {budget}", **more))
    return rows


def parse_yardstick(text: str, batch: int = 16) -> Yardstick:
    """`256x6@2e-3` -> width, layers, learning rate."""
    try:
        shape, lr = text.strip().split("@")
        width, layers = shape.split("x")
        return Yardstick(hidden_size=int(width), layers=int(layers), lr=float(lr), batch=batch)
    except ValueError:
        raise UserError(f"{text.strip()!r} is not a yardstick; write WIDTHxLAYERS@LR, such as 256x6@2e-3") from None


def shape_of(text: str, batch: int) -> dict:
    """`parse_yardstick` for another process."""
    return asdict(parse_yardstick(text, batch))
