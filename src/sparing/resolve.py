"""Derives a complete configuration from the user's wishes, budget, machine and corpus. Every derived value carries its reason.

Pure: nothing is measured or read here. The rules are fitted to the experiments in LAB.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from sparing.base.config import Budget, Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig, UserError
from sparing.base.config_file import Wishes, build
from sparing.base.config_limits import checked, contradiction
from sparing.base.hardware import Machine
from sparing.base.layers import mixtures
from sparing.budget.flops import parameters, train_flops
from sparing.budget.ranks import bubble_of, fitting_parts, needed, sent
from sparing.budget.units import format_budget
from sparing.data.scan import CorpusFacts
from sparing.parallel.schedules import CHUNKS, microbatches_of

TRAINING_SHARE = 0.9
"""Of the time that is left after measuring the machine: tokenising, choosing, evaluating and sampling take the rest."""
MARGIN = 1.2
"""Tokenise this many times what the plan can consume."""
BYTES_PER_TOKEN = {1024: 2.7, 2048: 3.16, 4096: 3.58, 8192: 4.0, 16384: 4.3, 32768: 4.6}
"""Of English books; 2048 and 4096 words measured (LAB.md)."""


class Resolved(NamedTuple):
    """A complete configuration (but for what is measured at the start: micro-batch, threads, compile), and why."""

    config: Config
    reasons: dict[str, str]


@dataclass(frozen=True)
class Shape:
    """A rung of the ladder of model sizes."""

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int


LADDER = (
    Shape(64, 2, 2, 32),
    Shape(96, 3, 2, 48),
    Shape(128, 4, 2, 64),
    Shape(192, 4, 3, 64),
    Shape(256, 4, 4, 64),
    Shape(320, 6, 5, 64),
    Shape(384, 6, 6, 64),
    Shape(512, 8, 8, 64),
    Shape(768, 12, 12, 64),
    Shape(1024, 16, 16, 64),
    Shape(1536, 20, 16, 96),
    Shape(2048, 24, 16, 128),
)
TOKENS_PER_PARAMETER = 2.0
"""Of active parameters, head included: below about this the next smaller size won at equal time (LAB.md, 2026-11-21)."""
MOE_FROM_FLOPS: float | None = 2e13
"""Training FLOPs from which a mixture beat our own dense model at equal minutes: the shortest runs compared (LAB.md); None: never."""
MANY_TOKENS = 2e7
BATCH_TOKENS = {"cpu": (4096, 8192), "cuda": (65536, 65536)}
"""Tokens of a batch, in runs of fewer than MANY_TOKENS and of more."""
ADAPTER_OPTIM = {"matrix": "adamw", "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "warmup": 0.03, "decay": 0.97, "final_lr": 0.0}
"""How low-rank updates learn ("LoRA without regret", thinkingmachines.ai 2025: ten times the rate of full fine-tuning)."""
LR_TOKENS, LR_PEAK, LR_EXPONENT = 1.2e6, 0.04, -0.3
"""The best of 0.01, 0.02, 0.04 at 1.2 M tokens; falling with the length of the run, slightly slower than Marin's tokens^-0.395."""

GOING_ON_ROWS, GOING_ON_STEPS = 2, 64
"""Of a run that starts from an imported model: rows of the smallest batch, and the least number of steps that a larger one is to leave."""
SCORED_SHARE, SCORED_BYTES_PER_TOKEN, LEAST_SCORED_BYTES = 0.12, 4.0, 16_000
"""Tokens that it is scored on before and after, as a share of what it is trained on; a forward pass is about a third of a step."""
RATES = ("lr", "lr_embed", "lr_head", "lr_router", "lr_norm")
GOING_ON_LR = 1e-4
GOING_ON = {
    "matrix": "adamw", "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "warmup": 0.05, "final_lr": 0.0,
}  # fmt: skip
GOING_ON_REASONS = {
    "matrix": "a model that AdamW trained goes on under AdamW; Muon's products would take as long as the batch",
    "lr": "of a model that is trained already: the best of 0.00005, 0.0001 and 0.0003 on one of 135 M parameters (LAB.md)",
    "warmup": "its averages begin anew",
    "final_lr": "the decay ends at zero, with the budget",
}
"""Of a run that starts from an imported model (LAB.md)."""


def _round(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)


def shaped(shape: Shape, vocab_size: int, seq_len: int, moe: bool) -> ModelConfig:
    """A model of this size whose exports stay open: row lengths multiples of 32, queries compressed, one group."""
    d, head = shape.hidden_size, shape.head_dim
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=d,
        num_layers=shape.num_layers,
        num_dense_layers=1 if moe else shape.num_layers,
        intermediate_size=_round(8 * d / 3, 32),
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_heads,
        head_dim=head,
        q_lora_rank=_round(d / 2, 32),
        kv_lora_rank=_round(d / 4, 32),
        qk_nope_head_dim=head,
        qk_rope_head_dim=max(32, _round(head / 2, 32)),
        v_head_dim=head,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=_round(d / 2, 32),
        mtp_depth=0,
        max_position_embeddings=seq_len,
    )


def _largest(vocab_size: int, seq_len: int, tokens_of: Callable[[ModelConfig], float]) -> tuple[Shape, float]:
    """(the largest shape that the budget can feed, its training FLOPs). tokens_of: what the budget trains a model on."""
    best = None
    for shape in LADDER:
        candidate = shaped(shape, vocab_size, seq_len, moe=False)
        tokens = tokens_of(candidate)
        if best is None or tokens >= TOKENS_PER_PARAMETER * parameters(candidate).active:
            best = (shape, tokens * train_flops(candidate, seq_len))
    return best


def vocabulary(train_bytes: float, tokens: float) -> int:
    """Words: a larger vocabulary shortens the text but costs a larger head, and its rare words need data."""
    for size, least in ((32768, 3e9), (16384, 4e8), (8192, 4e7), (4096, 3e6), (2048, 5e5)):
        if tokens >= least and train_bytes >= 100 * size:
            return size
    return 1024


def _shape_of(
    wishes: Wishes, facts: CorpusFacts, seq_len: int, tokens_of: Callable[[ModelConfig], float], reasons: dict[str, str]
) -> tuple[ModelConfig, bool]:
    """(the model that the budget can feed, with what is wished of it; whether it is meant to be a mixture). reasons: gets those of its
    fields."""
    model_wishes = wishes.get("model", {})
    shape, dense_flops = _largest(model_wishes.get("vocab_size") or 4096, seq_len, tokens_of)
    if "hidden_size" in model_wishes:  # whatever else has a width follows it
        width = model_wishes["hidden_size"]
        near = min(LADDER, key=lambda rung: abs(rung.hidden_size - width))
        heads = max(1, round(width / near.head_dim))
        shape = replace(near, hidden_size=width, num_heads=heads)
    moe = "num_dense_layers" not in model_wishes and MOE_FROM_FLOPS is not None and dense_flops >= MOE_FROM_FLOPS
    moe = moe or any(key in model_wishes for key in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"))
    moe = moe and model_wishes.get("n_routed_experts") != 0
    vocab = model_wishes.get("vocab_size") or vocabulary(facts.train_bytes, tokens_of(shaped(shape, 4096, seq_len, moe)))
    derived = shaped(shape, vocab, seq_len, moe)
    if moe and "num_dense_layers" not in model_wishes:
        reasons["model.num_dense_layers"] = f"a mixture beat a dense model at equal minutes from {MOE_FROM_FLOPS:g} FLOPs on (LAB.md)"
    fields = {name: value for name, value in vars(derived).items() if name not in model_wishes}
    model = build(ModelConfig, {**fields, **model_wishes})
    if wrong := contradiction(model, lambda name: f"model.{name}"):
        raise UserError(wrong)
    tokens = tokens_of(model)
    ratio = tokens / parameters(model).active
    for name in ("hidden_size", "num_layers", "num_heads"):
        if name not in model_wishes:
            enough = f"largest size with {TOKENS_PER_PARAMETER:g} tokens or more per active parameter"
            reasons[f"model.{name}"] = f"{enough}: {tokens / 1e6:.1f} M tokens, {ratio:.1f} each"
    if "vocab_size" not in model_wishes:
        reasons["model.vocab_size"] = f"for about {tokens / 1e6:.1f} M tokens of training and {facts.train_bytes / 1e6:.1f} MB of text"
    return model, moe


def _pipelined(config: Config, train: TrainConfig, said: bool, ranks: int, reasons: dict[str, str]) -> TrainConfig:
    """What pipelines ask of a batch. said: whether the user gave its number of rows. Raises UserError for layouts that cannot be."""
    p, layers = config.parallel, config.model.num_layers
    what = f"parallel.stages {p.stages} with schedule = {p.schedule}"
    possible = [stages for stages in range(1, p.stages + 1) if ranks % stages == 0 and stages * CHUNKS[p.schedule] <= layers + 1]
    if possible[-1] != p.stages:
        needs = f"must divide {ranks} ranks, and needs {p.stages * CHUNKS[p.schedule] - 1} layers or more of {layers}"
        raise UserError(f"{what} {needs}; nearest: {possible[-1]}")
    pipelines = ranks // p.stages
    if train.batch_size % pipelines or not microbatches_of(p.schedule, p.stages, train.batch_size // pipelines):
        sizes = range(-(-train.batch_size // pipelines) * pipelines, 2**62, pipelines)
        fitting = next(size for size in sizes if microbatches_of(p.schedule, p.stages, size // pipelines))
        if said:
            raise UserError(f"train.batch_size {train.batch_size}: {what} on {ranks} ranks cannot divide so many rows; nearest: {fitting}")
        train = replace(train, batch_size=fitting)
        reasons["train.batch_size"] += f"; rows for {what}"
    rows = train.batch_size // pipelines
    wished = -(-rows // train.micro_batch_size) if train.micro_batch_size else None
    count = microbatches_of(p.schedule, p.stages, rows, wished)
    if train.micro_batch_size and count * train.micro_batch_size != rows:
        why = f"{what} cannot cut {rows} rows into micro-batches of so many"
        raise UserError(f"train.micro_batch_size {train.micro_batch_size}: {why}; nearest: {rows // count}")
    reasons["train.micro_batch_size"] = f"{count} micro-batches go through {p.stages} stages"
    reasons["train.replicas"] = reasons["train.compile"] = "the passes follow the pipeline's schedule"
    return replace(train, micro_batch_size=rows // count, replicas=1, compile=False)


def memory_limit(machine: Machine) -> float:
    """Bytes that training may fill; 0: unknown."""
    return 0.95 * (machine.gpus[0].memory_bytes if machine.gpus else machine.memory_bytes)


WIRE = {"cpu": 1e9, "cuda": 50e9}
"""Assumed where layouts are compared: bytes a second from a rank to others. Gloo on one host, and InfiniBand (DeepSeek-V3 §3.2.2)."""


def _fitting_layout(
    config: Config, ranks: int, limit: float, speed: Callable[[Config], float], reasons: dict[str, str], said: bool
) -> ParallelConfig:
    """How the work is divided where nothing is said of it: only the optimizer, if a rank has the memory for that with the smallest
    micro-batch. Else the layout that fits and takes least time for a token, by the formulas of `budget.ranks`. said: whether the number of
    rows is the user's. Raises UserError where none fits."""
    plain, gigabytes = replace(config.parallel, shard="optimizer"), f"{limit / 1e9:.1f} GB are there for each of {ranks} ranks"
    need = _least(replace(config, parallel=plain), ranks)
    if need <= limit:
        return config.parallel
    found: list[tuple[float, Config]] = []
    for one in _layouts(config, ranks, said):
        exchanging = sum(count * (2 if kind == "all_reduce" else 1) for kind, count in sent(one, ranks).items())
        tokens = one.train.batch_size * one.train.seq_len
        found.append((1 / speed(one) + exchanging / WIRE[one.train.device or "cpu"] / tokens, one))
    found.sort(key=lambda option: option[0])
    fitting = next((one for _, one in found if _least(one, ranks) <= limit), None)
    if fitting is None:
        least, best = min([(need, plain), *((_least(one, ranks), one.parallel) for _, one in found)], key=lambda option: option[0])
        again = replace(config, parallel=best, train=replace(config.train, recompute=True))
        lower = not config.train.recompute and _least(again, ranks) <= limit
        nearest = "--train.recompute true" if lower else "more ranks, ranks with more memory, or a smaller model"
        raise UserError(f"training needs {least / 1e9:.1f} GB with {words_of(best)}, and {gigabytes}: no layout fits; nearest: {nearest}")
    p = fitting.parallel
    reason = f"with the optimizer alone divided a rank needs {need / 1e9:.1f} GB, and {gigabytes}; of what fits this takes least time"
    told = f"{sum(sent(fitting, ranks).values()) / 1e9:.2g} GB go out of a rank in a step"
    if p.stages > 1:
        waiting, longest = bubble_of(fitting, ranks)
        told += f", of which it waits {waiting:.0%}, and the rank with most layers computes {longest - 1:.0%} longer than the mean"
    reasons |= {f"parallel.{name}": f"{reason}: {told}" for name, value in vars(p).items() if value != getattr(ParallelConfig(), name)}
    return p


def _may_divide(config: Config) -> bool:
    """Whether more than the optimizer may be divided without being asked for: all weights learn, and no rank needs all of them."""
    c = config
    frozen = any(part is not None for part in (c.adapter, c.esft, c.growth, c.drafts, c.dpo, c.grpo))
    return not frozen and not (c.distill is not None and c.distill.on_policy)


def words_of(parallel: ParallelConfig) -> str:
    """A layout in words: shard = optimizer, experts = 4."""
    return ", ".join(f"{name} = {value}" for name, value in vars(parallel).items() if value != getattr(ParallelConfig(), name))


def _least(config: Config, ranks: int) -> float:
    """Bytes that the fullest rank needs, with the micro-batch that is asked for, else the smallest."""
    return needed(replace(config, train=replace(config.train, micro_batch_size=config.train.micro_batch_size or 1)), ranks).total


def _layouts(config: Config, ranks: int, said: bool) -> Iterator[Config]:
    """The configuration in each layout that could be. Of experts, either all are on every rank, or they are divided as far as they can be,
    because the fewer of them a rank has, the less of their gradients it sends."""
    c, t = config.model, config.train
    options = [ParallelConfig("weights"), ParallelConfig("optimizer")]
    counts = [stages for stages in range(2, min(ranks, c.num_layers + 1) + 1) if ranks % stages == 0]
    options += [ParallelConfig("optimizer", stages=stages, schedule=schedule) for stages in counts for schedule in CHUNKS]
    for option in options:
        parts = fitting_parts(c.n_routed_experts, ranks // option.stages, c.n_routed_experts) if mixtures(c) else 1
        for experts in sorted({1, parts}):
            one = replace(config, parallel=replace(option, experts=experts))
            with suppress(UserError):
                train = _pipelined(checked(one), t, said, ranks, defaultdict(str)) if option.stages > 1 else t
                if train.batch_size == t.batch_size or not said:
                    yield checked(replace(one, train=train))


def resolve(
    wishes: Wishes, budget: Budget, machine: Machine, facts: CorpusFacts, speed: Callable[[Config], float], ranks: int = 1
) -> Resolved:
    """Derive what `wishes` leaves open. machine: of each rank. speed: tokens per second that all ranks together will train a configuration
    at (`planning.places.Place`).

    Raises UserError where the budget cannot work, and for wishes that contradict each other.
    """
    reasons: dict[str, str] = {}
    begun = bool(wishes.value("start.run"))
    opened = begun and bool(wishes.get("tokens"))  # what Sparing trained from noise goes on as it began
    device = wishes.value("train.device") or ("cuda" if machine.gpus else "cpu")
    if device == "cuda" and not machine.gpus:
        raise UserError("train.device cuda: torch sees no CUDA device here; use --train.device cpu")
    seq_len = wishes.value("train.seq_len") or (1024 if device == "cuda" else 512)
    if begun and not wishes.sets("train.seq_len"):
        seq_len = min(seq_len, wishes.value("model.max_position_embeddings", seq_len))
    dtype = machine.training_dtype(device)
    if budget.unit not in ("s", "flop", "tok"):
        raise UserError(
            f"budget in {budget.unit}: prices and energy are not known to this version; give time, tokens or FLOPs, such as 20m"
        )
    wished = wishes.config()
    if opened and wished.adapter is None:
        rates = dict.fromkeys(RATES, wishes.value("optim.lr", GOING_ON_LR))  # one for all, as under AdamW
        derived = {name: value for name, value in (GOING_ON | rates).items() if not wishes.sets(f"optim.{name}")}
        wished = replace(wished, optim=replace(wished.optim, **derived))
        reasons |= {f"optim.{name}": reason for name, reason in GOING_ON_REASONS.items() if name in derived}
    settings = replace(wished.train, device=device, seq_len=seq_len, dtype=wishes.value("train.dtype", dtype))
    if not wishes.sets("train.batch_size"):
        settings = replace(settings, batch_size=max(1, BATCH_TOKENS[device][0] // seq_len))
    if not wishes.sets("train.short_seq_len") and not opened and device == "cpu" and seq_len % 256 == 0 and seq_len > 256:
        settings = replace(settings, short_seq_len=256)
        reasons["train.short_seq_len"] = "cheaper attention and faster learning at first; the last part is on whole rows"

    def tokens_of(model: ModelConfig) -> float:
        """How many tokens the budget trains a model on."""
        if budget.unit == "tok":
            return budget.amount
        if budget.unit == "flop":
            return budget.amount / train_flops(model, seq_len, False, wished.adapter, wished.esft, wished.drafts)
        return TRAINING_SHARE * budget.amount * speed(replace(wished, model=model, train=settings))

    if opened and not wishes.sets("train.batch_size"):
        while settings.batch_size > GOING_ON_ROWS and tokens_of(wished.model) < GOING_ON_STEPS * settings.batch_size * seq_len:
            settings = replace(settings, batch_size=settings.batch_size // 2)  # the speed falls too
        reasons["train.batch_size"] = f"the largest that leaves {GOING_ON_STEPS} steps or more"
    model, moe = (wished.model, True) if begun else _shape_of(wishes, facts, seq_len, tokens_of, reasons)
    tokens = tokens_of(model)

    config, train = replace(wished, model=model, budget=budget), settings
    if not wishes.sets("train.dtype"):
        faster = "GPUs multiply it fastest" if device == "cuda" else "this processor multiplies it at least as fast as float32 (measured)"
        reasons["train.dtype"] = faster if dtype == "bfloat16" else "this processor multiplies bfloat16 slower than float32 (measured)"
    if begun and not wishes.sets("train.eval_bytes"):
        sample = int(float(f"{SCORED_SHARE * tokens * SCORED_BYTES_PER_TOKEN:.2g}"))
        train = replace(train, eval_bytes=min(train.eval_bytes, max(LEAST_SCORED_BYTES, sample)))
        reasons["train.eval_bytes"] = "scoring before and after takes about a tenth of the time"
    if not opened and not wishes.sets("train.batch_size"):
        few, many = BATCH_TOKENS[device]
        batch_tokens = few if tokens < MANY_TOKENS else many
        train = replace(train, batch_size=max(1, batch_tokens // seq_len))
        reasons["train.batch_size"] = f"{batch_tokens} tokens: small budgets want many small steps"
    step_tokens = train.batch_size * seq_len
    if train.batch_size % ranks and not wishes.sets("train.batch_size"):
        train = replace(train, batch_size=-(-train.batch_size // ranks) * ranks)
        reasons["train.batch_size"] += f"; as many rows for each of {ranks} ranks"
        step_tokens = train.batch_size * seq_len
    rows_said = wishes.sets("train.batch_size")
    if (limit := memory_limit(machine)) and ranks > 1 and not wishes.get("parallel") and train.batch_size >= ranks and _may_divide(config):
        parallel = _fitting_layout(replace(config, train=train), ranks, limit, speed, reasons, rows_said)
        config = replace(config, parallel=parallel)
    if config.parallel.stages > 1:
        train = _pipelined(checked(replace(config, train=train)), train, rows_said, ranks, reasons)
        step_tokens = train.batch_size * seq_len
    elif train.batch_size < ranks:
        raise UserError(f"train.batch_size {train.batch_size}: {ranks} ranks need a row each; nearest: {ranks}, or fewer ranks")
    if budget.unit in ("tok", "flop") and tokens < step_tokens:
        least = Budget(step_tokens if budget.unit == "tok" else float(f"{1.05 * budget.amount / tokens * step_tokens:.1e}"), budget.unit)
        raise UserError(f"budget {format_budget(budget)} is less than one batch; nearest that works: {format_budget(least)}")
    if not wishes.sets("train.bias_update_rate") and moe and mixtures(model):
        steps = tokens / step_tokens
        train = replace(train, bias_update_rate=round(min(0.01, max(0.001, 10 / steps)), 5))
        reasons["train.bias_update_rate"] = f"about {steps:,.0f} steps: the published 0.001 would move a bias by no more than that times it"
    parallel = config.parallel
    if parallel.shard is None:
        parallel = replace(parallel, shard="optimizer" if ranks > 1 else "nothing")
        why = "each rank makes its share of the updates, not all: as many bytes go between ranks, and it takes less work and memory"
        reasons |= {"parallel.shard": why} if ranks > 1 else {}
    if parallel.experts > 1 and not mixtures(model):
        raise UserError(f"parallel.experts {parallel.experts}: this model is dense, it has no experts to divide; nearest: 1")
    alike = ranks // parallel.stages
    if parallel.experts > 1 and (parts := fitting_parts(parallel.experts, alike, model.n_routed_experts)) != parallel.experts:
        layers = " that hold the same layers" if parallel.stages > 1 else ""
        what = f"must divide {alike} ranks{layers} and {model.n_routed_experts} experts of a layer"
        raise UserError(f"parallel.experts {parallel.experts} {what}; nearest: {parts}")
    if ranks > 1 and (parallel.shard == "weights" or parallel.experts > 1) and train.replicas is None:
        train = replace(train, replicas=1)
        reasons["train.replicas"] = "ranks exchange weights or tokens during the passes, each in one order"
    optim = config.optim
    if config.adapter is not None:
        config, train, optim = _adapting(config, train, wishes, reasons)
    elif opened:
        pass  # its optimizer is chosen above: its speed follows from it
    elif not wishes.sets("optim.lr") and optim.matrix == "adamw":
        optim = replace(optim, lr=0.004)
        reasons["optim.lr"] = "AdamW takes smaller steps than Muon"
    elif not wishes.sets("optim.lr"):
        optim = replace(optim, lr=round(min(0.05, max(0.005, LR_PEAK * (tokens / LR_TOKENS) ** LR_EXPONENT)), 4))
        reasons["optim.lr"] = f"{LR_PEAK} at {LR_TOKENS / 1e6} M tokens, falling as tokens^{LR_EXPONENT}"
    data = config.data
    if data.max_tokens is None:
        needed = int(float(f"{MARGIN * tokens:.1e}"))  # two digits: a slightly different budget finds the corpus ready
        if facts.train_bytes > needed * BYTES_PER_TOKEN.get(model.vocab_size, 3.4):
            data = replace(data, max_tokens=needed)
            reasons["data.max_tokens"] = f"{MARGIN} times the {tokens / 1e6:.1f} M tokens that the budget can train on"
    reasons = {name: reason for name, reason in reasons.items() if not wishes.sets(name)}
    return Resolved(checked(replace(config, train=train, data=data, optim=optim, parallel=parallel)), reasons)


def _adapting(config: Config, train: TrainConfig, wishes: Wishes, reasons: dict[str, str]) -> tuple[Config, TrainConfig, OptimConfig]:
    """What is different where low-rank updates learn and the weights stay: how those are held, learning rates, the balance of experts."""
    adapter = config.adapter
    if adapter.base is None:
        adapter = replace(adapter, base=train.dtype)
        reasons["adapter.base"] = f"products are computed in {train.dtype}: what is frozen needs no other digits"
    stays = {"bias_update_rate": 0.0, "sequence_balance": 0.0, "mtp_weight": 0.0}
    stays = {name: value for name, value in stays.items() if not wishes.sets(f"train.{name}")}
    for name in stays if mixtures(config.model) or config.model.mtp_depth else ():
        reasons[f"train.{name}"] = "routers and MTP modules stay as they are"
    derived = {name: value for name, value in ADAPTER_OPTIM.items() if not wishes.sets(f"optim.{name}")}
    if "lr" in derived:
        reasons["optim.lr"] = "of the factors under AdamW; they are scaled by alpha / rank, so it suits any rank"
    if "decay" in derived:
        reasons["optim.decay"] = "from the warm-up to the end, to zero"
    if not wishes.sets("train.short_seq_len"):
        train = replace(train, short_seq_len=None)
        reasons.pop("train.short_seq_len", None)
    return replace(config, adapter=adapter), replace(train, **stays), replace(config.optim, **derived)
