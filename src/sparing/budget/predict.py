"""Predicts what a run takes and reaches: applies the models of memory, time, money and loss to a resolved configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sparing.account.prices import Rates
from sparing.base.config import Budget, Config, ModelConfig, UserError
from sparing.budget.estimate import Estimate, around, exactly
from sparing.budget.flops import kv_cache_bytes, parameters, train_flops
from sparing.budget.gain import GainLaw
from sparing.budget.memory import SPREAD, KernelPath, Memory, optimizer_bytes, weight_bytes
from sparing.budget.ranks import needed
from sparing.budget.scaling import Law, effective_bytes
from sparing.budget.selecting import SCORED_BYTES
from sparing.budget.spot import INTERVAL_S
from sparing.budget.units import format_budget

START_S = 4.0
"""Starting, building the model, saving at the end."""
END_S = 1.5
"""Model card, summary, and sample texts of a small model; of a large one they take as long as reading its weights once a token."""
SAMPLE_TOKENS, SAMPLE_BYTES_PER_S = 192, 2e10
TOKENISE_BYTES_PER_S = 2e6
"""A core."""
TOKENISER_S = 4.0
"""Training the tokenizer and starting the processes that apply it."""
CALIBRATION = (0.02, 10.0)
"""Choosing micro-batch and threads: this share of a time budget, these seconds of any other."""
CALIBRATION_STEPS, LEAST_PASSES, UNCHOSEN_S = 10, 3, 0.5
"""It takes at least about as long as this many steps; where not even so many passes fit into it, almost no time."""
SAVE_BYTES_PER_S, SAVING_SHARE = 4e8, 0.05
"""Of a checkpoint, its checksums included; periodic ones may take this share of the time (`train.pace`)."""
AIM = 0.99
"""Share of a time budget that plans, and the run itself, aim at: misses are more often late than early."""
FEWEST_STEPS = 20
AGAIN, GAIN_SPREAD = 0.65, 0.5
"""What a run that is begun anew on a finished one gains of what the loss law says that more text is worth (LAB.md): its weights had come to
rest. The spread: it is a small difference of two predictions."""
WATTS_SPREAD = 0.4
"""Power is a model of the processor, not a measurement."""


class TooShort(UserError):
    """A budget that what a run does in any case does not fit into; it names the nearest that works."""


class Corpus(Protocol):
    """What is needed of `sparing.data.scan.CorpusFacts`."""

    train_bytes: float
    kinds: dict[str, int]


@dataclass(frozen=True)
class Beginning:
    """The model that a run starts from, where that is not noise."""

    gains: GainLaw | None
    """None: Sparing trained it from noise, and the loss law holds."""
    read: float
    """Bytes of text that it has read under Sparing."""
    before: float | None = None
    """Its bits per byte on held-out text; None: not measured yet."""


@dataclass(frozen=True)
class PlannedRun:
    """Everything a prediction is made of."""

    config: Config
    corpus: Corpus
    law: Law
    speed: Estimate
    """Tokens per second while training."""
    rates: Rates
    bytes_per_token: float
    memory_limit: float
    """Bytes that the device may fill; 0: unknown."""
    budget_s: float | None
    """Of a budget in time, money or energy."""
    cores: int = 2
    """Of the processor: they tokenise."""
    start_s: float = START_S
    """Seconds before tokenising: importing, reading the corpus, measuring a new machine."""
    beginning: Beginning | None = None
    """None: noise."""
    path: KernelPath | None = None
    """Which kernels run; None: as the configuration says, with a C compiler and bfloat16."""
    selecting: Estimate | None = None
    """Seconds of choosing texts from a pool, which come on top of `start_s`; None: nothing is chosen."""
    ranks: int = 1
    """As many processes train together; memory is of one of them."""

    @property
    def before_s(self) -> float:
        """Seconds before tokenising."""
        return self.start_s + (self.selecting.value if self.selecting else 0.0)

    def memory(self) -> Memory:
        return needed(self.config, self.ranks, self.path)


def in_seconds(budget: Budget, rates: Rates) -> float | None:
    """Seconds that a budget in time, money or energy lasts at full power; None for tokens and FLOP.

    Raises UserError where money or energy would last less than a second or more than ten years.
    """
    if budget.unit == "s":
        return budget.amount
    if budget.unit in ("tok", "flop"):
        return None
    hourly = rates.per_hour() if budget.unit == "usd" else rates.watts_busy * rates.pue / 1000
    seconds = 3600 * budget.amount / hourly
    if not 1 <= seconds <= 10 * 365 * 86400:
        least = format_budget(Budget(float(f"{hourly / 60:.2g}"), budget.unit))
        raise UserError(f"budget {format_budget(budget)} lasts {seconds:.3g} s here; a minute costs {least}")
    return seconds


def tokenising_s(run: PlannedRun) -> float:
    data = run.config.data
    needed = math.inf if data.max_tokens is None else data.max_tokens * run.bytes_per_token
    return TOKENISER_S + min(run.corpus.train_bytes, needed) / (run.cores * TOKENISE_BYTES_PER_S)


def _choosing_s(run: PlannedRun, tokens_per_s: float) -> float:
    """Choosing micro-batch and threads, which is left out where a few passes take longer than it may."""
    share = CALIBRATION[1] if run.config.budget.unit != "s" else CALIBRATION[0] * run.config.budget.amount
    t = run.config.train
    batch_s = t.batch_size * t.seq_len / tokens_per_s
    return UNCHOSEN_S if LEAST_PASSES * batch_s > share else max(share, CALIBRATION_STEPS * batch_s)


def _saving_s(run: PlannedRun) -> float:
    """Checkpoints: weights before the first step, then weights and moments before the decay, at the end, and once an interval."""
    c, p = run.config.model, run.config.precision
    first = weight_bytes(c, p)
    whole = (first + optimizer_bytes(c, run.config.optim.matrix, p)) / SAVE_BYTES_PER_S
    wished = run.config.train.checkpoint_interval_s
    interval = max(INTERVAL_S if wished is None else wished, whole / SAVING_SHARE)
    return first / SAVE_BYTES_PER_S + (2 + (run.budget_s or 0.0) / interval) * whole


def _evaluating_s(run: PlannedRun, tokens_per_s: float) -> float:
    """All evaluations: a forward pass is a third of a training step; at most a twentieth of a time budget, the last one and that of the
    model that a run starts from not counted."""
    once = _evaluated_s(run, tokens_per_s)
    every = (run.config.train.evals + 1) * once
    every = every if run.budget_s is None else min(every, 0.05 * run.budget_s + once)
    return every + (once if run.beginning else 0.0)


def _evaluated_s(run: PlannedRun, tokens_per_s: float) -> float:
    """One evaluation; beside conversations, of old text too, half as much."""
    read = min(run.config.train.eval_bytes, 0.05 * run.corpus.train_bytes)
    read += SCORED_BYTES if run.config.data.sample else 0
    return (1.0 if run.config.chats is None else 1.5) * read / run.bytes_per_token / (3 * tokens_per_s)


def _ending_s(run: PlannedRun) -> float:
    """Sample texts, model card, summary."""
    return END_S + SAMPLE_TOKENS * 4 * parameters(run.config.model).active / SAMPLE_BYTES_PER_S


def tokens_and_time(run: PlannedRun) -> tuple[Estimate, Estimate]:
    """(tokens trained on, seconds of everything)."""
    budget, tokenising = run.config.budget, tokenising_s(run)
    per_token = train_flops(run.config.model, run.config.train.seq_len, adapter=run.config.adapter, esft=run.config.esft)
    if run.budget_s is not None:

        def trained(speed: float, slower: float) -> float:
            around_it = run.before_s + slower * tokenising + _choosing_s(run, speed) + _evaluating_s(run, speed)
            rest = AIM * run.budget_s - around_it - _saving_s(run) - _ending_s(run)
            return max(0.0, rest) * speed

        tokens = Estimate(trained(run.speed.value, 1), trained(run.speed.low, 1.5), trained(run.speed.high, 0.5), run.speed.source)
        return tokens, Estimate(AIM * run.budget_s, 0.95 * run.budget_s, 1.02 * run.budget_s, "the budget: training ends on it")
    tokens = budget.amount if budget.unit == "tok" else budget.amount / per_token

    def seconds(speed: float, other: float) -> float:
        return tokens / speed + other * (
            run.before_s + tokenising + _choosing_s(run, speed) + _evaluating_s(run, speed) + _saving_s(run) + _ending_s(run)
        )

    return exactly(tokens, "the budget"), Estimate(
        seconds(run.speed.value, 1), seconds(run.speed.high, 0.6), seconds(run.speed.low, 1.5), run.speed.source
    )


def check(run: PlannedRun) -> None:
    """Raises UserError, with the nearest budget or change that works, for what cannot work."""
    t = run.config.train
    batch = t.batch_size * t.seq_len
    if run.corpus.train_bytes < batch * run.bytes_per_token:
        need = batch * run.bytes_per_token
        raise UserError(
            f"the data have {run.corpus.train_bytes:,.0f} bytes to train on, less than one batch: give {need:,.0f} bytes or more"
        )
    if run.budget_s is not None:
        least = (run.before_s + _ending_s(run) + tokenising_s(run) + (FEWEST_STEPS + CALIBRATION_STEPS) * batch / run.speed.value) / (
            AIM - CALIBRATION[0] - 0.05
        )
        if run.budget_s < least:
            megabytes = run.corpus.train_bytes / 1e6
            raise _too_short(run, f"starting, tokenising {megabytes:.1f} MB and {FEWEST_STEPS} steps take about {least:.0f} s", least)
    need = run.memory().total
    if run.memory_limit and need > run.memory_limit:
        raise UserError(
            f"training needs {need / 1e9:.1f} GB, {run.memory_limit / 1e9:.1f} GB are there; what fits: {_smaller(run)}"
        )  # fmt: skip


def check_begun(run: PlannedRun) -> None:
    """For a run that began `start_s` ago. Raises TooShort where a budget in time, money or energy leaves no room for what it does in any
    case, one step included."""
    if run.budget_s is None:
        return
    t = run.config.train
    tokenising = 0.0 if run.config.chats is not None else tokenising_s(run)  # conversations are tokenised by now
    scoring = _evaluated_s(run, run.speed.value) * (1 if run.beginning is None else 2)
    saved = 0.0 if run.config.adapter is not None else weight_bytes(run.config.model, run.config.precision)
    rest = tokenising + scoring + t.batch_size * t.seq_len / run.speed.value + saved / SAVE_BYTES_PER_S + _ending_s(run)
    ahead = "scoring, one step and saving"
    if run.selecting is not None:
        rest, ahead = rest + run.selecting.value, f"choosing texts, {ahead}"
    if run.start_s + rest > run.budget_s:
        gone = f"{run.start_s:.0f} s have gone by now, and {ahead} take about {rest:.0f} s more"
        raise _too_short(run, gone, run.start_s + rest)


def _too_short(run: PlannedRun, why: str, least: float) -> TooShort:
    """least: seconds that it takes."""
    assert run.budget_s is not None
    budget = run.config.budget
    # More than needed here: what a longer budget resolves to may take longer to start.
    works = Budget(float(f"{1.2 * least * budget.amount / run.budget_s:.2g}"), budget.unit)
    return TooShort(f"budget {format_budget(budget)}: {why}; nearest that works: {format_budget(works)}")


def _smaller(run: PlannedRun) -> str:
    """The first change that makes it fit."""
    t, adapter = run.config.train, run.config.adapter

    def fits(config: Config) -> bool:
        return needed(config, run.ranks, measured=False).total <= run.memory_limit

    few = ("int8", "int4")
    for base in few[few.index(adapter.base) + 1 if adapter.base in few else 0 :] if adapter is not None else ():
        if fits(replace(run.config, adapter=replace(adapter, base=base))):
            return f"--adapter.base {base}"
    micro = t.micro_batch_size or t.batch_size
    while micro > 1:
        micro //= 2
        for recompute in (False, True):
            config = replace(run.config, train=replace(t, micro_batch_size=micro, recompute=recompute))
            if fits(config):
                return f"--train.micro-batch-size {micro}" + (" --train.recompute true" if recompute else "")
    c = run.config.model
    for share in (0.75, 0.5, 0.25, 0.125):
        width = max(32, int(c.hidden_size * share) // 32 * 32)
        thinner = replace(
            c, hidden_size=width, intermediate_size=int(c.intermediate_size * share), num_layers=max(2, int(c.num_layers * share))
        )
        config = replace(run.config, model=thinner, train=replace(t, micro_batch_size=1, recompute=True))
        if fits(config):
            return f"--model.hidden-size {width} --model.num-layers {thinner.num_layers} --train.micro-batch-size 1"
    return "a machine with more memory"


def counted(c: ModelConfig) -> dict[str, Any]:
    """The keys of `plan --json` that the model's configuration alone decides."""
    counts, source = parameters(c), "counted from the configuration"
    return {
        "parameters": {name: exactly(getattr(counts, name), source) for name in ("total", "active", "mtp")},
        "kv_cache_bytes_per_token": exactly(kv_cache_bytes(c), source),
    }


def spent(hours: Estimate, rates: Rates, watts_spread: float, price_source: str) -> dict[str, Estimate]:
    """energy_kwh, co2e_g and cost_usd of so many hours of what `rates` are for, at full power give or take `watts_spread`."""
    watts = around(rates.watts_busy, watts_spread, f"estimated: {rates.sources['watts']}")
    bounds = ("value", "low", "high")
    energy = Estimate(*(getattr(hours, b) * getattr(watts, b) / 1000 * rates.pue for b in bounds), watts.source)
    cost = Estimate(*(getattr(hours, b) * rates.usd_per_hour + getattr(energy, b) * rates.usd_per_kwh for b in bounds), price_source)
    co2e = energy.times(rates.gco2e_per_kwh, rates.sources["gco2e_per_kwh"])
    return {"energy_kwh": energy, "co2e_g": co2e, "cost_usd": cost}


def predict(run: PlannedRun) -> dict[str, Any]:
    """The keys of `plan --json`; every number as {"value", "low", "high", "source"}."""
    c, t = run.config.model, run.config.train
    tokens, time_s = tokens_and_time(run)
    flops = tokens.times(train_flops(c, t.seq_len, t.recompute, run.config.adapter, run.config.esft), "counted, times tokens")
    memory = run.memory()
    hours = time_s.times(1 / 3600)
    price_source = f"{run.rates.sources['usd_per_hour']}; {run.rates.sources['usd_per_kwh']}"

    def size(value: float) -> Estimate:
        return around(value, SPREAD, "memory model (budget/memory.py)")

    numbers: dict[str, Any] = {
        **counted(c),
        "flops": flops,
        "tokens": tokens,
        "tokens_per_s": run.speed,
        "memory_bytes": {
            **{part: size(getattr(memory, part)) for part in vars(memory)},
            "total": size(memory.total),
        },
        "time_s": time_s,
        "device_hours": hours,
        **spent(hours, run.rates, WATTS_SPREAD, price_source),
        **_reached(run, tokens),
        "stages": {name: {"time_s": seconds} for name, seconds in _stages(run, tokens).items()},
    }
    return as_json(numbers)


def _stages(run: PlannedRun, tokens: Estimate) -> dict[str, Estimate]:
    """Seconds by stage, named as in the ledger. Training's are those of its steps."""
    speed, rough = run.speed, "rule of thumb"
    # A time budget fixes the time whatever the speed is: then the tokens follow, not the seconds.
    train = exactly(tokens.value / speed.value, speed.source) if run.budget_s else Estimate(
        tokens.value / speed.value, tokens.value / speed.high, tokens.value / speed.low, speed.source
    )  # fmt: skip
    return {
        **({"select": run.selecting} if run.selecting else {}),
        "tokenise": around(tokenising_s(run), 1.0, rough),
        "calibrate": around(_choosing_s(run, speed.value), 0.5, rough),
        "train": around(train.value, 0.05, train.source) if run.budget_s else train,
        "evaluate": around(_evaluating_s(run, speed.value), 0.5, rough),
    }


def _reached(run: PlannedRun, tokens: Estimate) -> dict[str, Estimate]:
    """bpb; of a run that starts from another one also gain, the share of that one's bits per byte that it takes away."""
    if run.config.chats is not None:
        return {"bpb": Estimate(None, None, None, "the laws are of texts, not of answers")}
    if run.beginning is not None:
        gain = _gain(run, run.beginning, tokens)
        return {"bpb": after_gain(run.beginning.before, gain), "gain": gain}
    if run.config.adapter is not None:  # a plan that names no run to begin with
        return {"bpb": Estimate(None, None, None, "what low-rank updates reach depends on the model that they go beside")}
    counts = parameters(run.config.model)

    def bpb(count: float) -> Estimate:
        read = effective_bytes(max(1.0, count) * run.bytes_per_token, run.corpus.train_bytes)
        return run.law.bpb(counts.active, counts.total, read)

    return {"bpb": Estimate(*_joined(*map(bpb, (tokens.value, tokens.low, tokens.high))))}


def _joined(middle: Estimate, slow: Estimate, fast: Estimate) -> tuple[float, float, float, str]:
    """One interval of two uncertainties that are independent of each other: the law's, and how much will be read. slow, fast: what the
    law says of the least and the most."""
    worse = math.hypot(middle.high - middle.value, slow.value - middle.value)
    better = math.hypot(middle.value - middle.low, middle.value - fast.value)
    return middle.value, middle.value - better, middle.value + worse, middle.source


def _gain(run: PlannedRun, beginning: Beginning, tokens: Estimate) -> Estimate:
    counts = parameters(run.config.model)

    def gain(count: float) -> Estimate:
        new = effective_bytes(max(1.0, count) * run.bytes_per_token, run.corpus.train_bytes)
        if beginning.gains is not None:
            return beginning.gains.gain(new, beginning.read)
        before, after = (run.law.bpb(counts.active, counts.total, max(1.0, read)) for read in (beginning.read, beginning.read + new))
        return around(AGAIN * (1 - after.value / before.value), GAIN_SPREAD, after.source)

    low, middle, high = map(gain, (tokens.low, tokens.value, tokens.high))
    value, least, most, source = _joined(middle, high, low)
    return Estimate(value, max(0.0, least), most, source)


def after_gain(before: float | None, gain: Estimate) -> Estimate:
    """Bits per byte after a gain, where those before it are known."""
    if before is None:
        return Estimate(None, None, None, "the model that it starts from is scored before the first step")
    ends = (before * (1 - share) for share in (gain.value, gain.high, gain.low))
    return Estimate(*ends, f"{before:.4f} measured before the first step, less what the {gain.source} says")


def as_json(numbers: dict[str, Any]) -> dict[str, Any]:
    return {key: as_json(value) if isinstance(value, dict) else value.to_dict() for key, value in numbers.items()}
