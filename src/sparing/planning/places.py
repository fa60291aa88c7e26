"""Resolves a run for a place: this machine, or one of the hardware table."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from sparing.account.prices import Rates, Rent, device, device_of, rates_for
from sparing.base import hardware
from sparing.base.config import Budget, Config, UserError
from sparing.base.config_file import Wishes
from sparing.base.hardware import Gpu, Machine, load_calibration
from sparing.budget.estimate import DESCRIPTION, Estimate, StepModel, fit, profile_model
from sparing.budget.memory import KernelPath, path_of
from sparing.budget.predict import Corpus, PlannedRun, in_seconds, tokens_and_time
from sparing.budget.ranks import bubble_of, needed
from sparing.budget.scaling import kind_of, law_of
from sparing.budget.selecting import kept_bytes, selecting_s
from sparing.data.scan import CorpusFacts, load_sample
from sparing.data.tokenizer import Tokenizer
from sparing.planning.start import beginning
from sparing.resolve import BYTES_PER_TOKEN, Resolved, memory_limit, resolve

MEASURE_S = 6.5
"""Seconds for timing training steps on a machine that was not seen before."""
SAMPLED = 16
"""Documents on which a tokenizer's bytes per token are measured."""
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
"""The hardware table's names of number formats."""


@dataclass(frozen=True)
class Given:
    """A corpus that a recipe states by its size alone."""

    train_bytes: float
    kinds: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a run would happen: this machine, or a device of the hardware table."""

    machine: Machine
    name: str | None
    rent: Rent
    country: str | None
    step: StepModel | None
    """Timed steps; None: a machine that is not here."""
    peak_flops: float
    ranks: int = 1
    """As many of these work together, each on its rows of a batch."""

    @property
    def rates(self) -> Rates:
        """Of all ranks."""
        return rates_for(self.machine, self.name, self.country, self.rent).times(self.ranks)

    @property
    def memory_limit(self) -> float:
        return memory_limit(self.machine)

    def speed(self, config: Config) -> Estimate:
        """Tokens per second of all ranks; replicas left open: one a core."""
        if self.ranks > 1:
            rows = max(1, config.train.batch_size // self.ranks)
            alone = replace(self, ranks=1).speed(replace(config, train=replace(config.train, batch_size=rows)))
            waiting, longest = bubble_of(config, self.ranks)
            return alone.times(self.ranks * (1 - waiting) / longest)
        if config.train.replicas is None and config.train.device == "cpu":
            replicas = min(config.train.threads or self.machine.cores_physical, config.train.batch_size)
            config = replace(config, train=replace(config.train, replicas=replicas))
        if self.step is not None:
            return self.step.tokens_per_second(config)
        return profile_model(config, self.peak_flops, "gpu" if self.machine.gpus else "cpu", self.name or "")

    def tokens_per_second(self, config: Config) -> float:
        """The middle of `speed`."""
        return self.speed(config).value

    @property
    def label(self) -> str:
        what = self.name or (self.machine.gpus[0].name if self.machine.gpus else f"{self.machine.cpu}, {self.machine.cores_physical} cores")
        return f"{what} ({'owned' if self.rent == 'own' else self.rent.replace('_', '-')})"


def this_machine() -> Machine:
    """This machine; torch is asked for GPUs only where there may be one."""
    return hardware.machine(with_gpus=Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists())


def here(
    rent: Rent = "own",
    country: str | None = None,
    say: Callable[[str], None] | None = None,
    machine: Machine | None = None,
) -> Place:
    """This machine by its calibration; without one, about MEASURE_S of measuring that `say` is told of (say None: default rates)."""
    machine = machine or this_machine()
    kind = "cuda" if machine.gpus else "cpu"
    timings = load_calibration(machine).get(f"step_timings_{kind}") or {}
    timings = timings if timings.get("description") == DESCRIPTION else None
    if (not timings or timings["limit"] < MEASURE_S) and say is not None:
        from sparing.kernels.formats import measured  # torch is loaded only to measure
        from sparing.train.profile import step_timings

        machine = measured(machine)
        timings = step_timings(machine, kind, MEASURE_S, say)
    known = load_calibration(machine)
    row = device(device_of(machine))
    dtype = machine.training_dtype(kind)
    table = row.peak[SHORT[dtype]] if machine.gpus else row.peak[SHORT[dtype]] / row.cores * machine.cores_physical
    peak = known.get(f"peak_flops_{kind}_{dtype}") or (timings or {}).get("peak_flops") or table
    step = fit((timings or {}).get("rows", []), (timings or {}).get("peak_flops", peak), kind)
    return Place(machine, None, rent, country, step, peak)


def elsewhere(name: str, rent: Rent, country: str | None = None) -> Place:
    """A device of the hardware table."""
    row = device(name)
    if row.kind == "gpu":
        machine = Machine("Linux", "", 8, 16, int(64e9), (Gpu(row.name, int(row.memory_bytes), ""),))
    else:
        wide, narrow = row.peak["fp32"], row.peak["bf16"]
        formats = {"float32": wide} | ({"bfloat16": narrow} if narrow > wide else {})  # where it has none, the table repeats float32's
        machine = Machine("Linux", row.name, row.cores, 2 * row.cores, int(row.memory_bytes), formats=formats)
    return Place(machine, row.name, rent, country, None, row.peak[SHORT[machine.training_dtype("cuda" if machine.gpus else "cpu")]])


def with_vocabulary(wishes: Wishes) -> Wishes:
    """Wishes with `model.vocab_size`, where the user brings a tokenizer. Raises UserError for a smaller one that is asked for."""
    path = wishes.value("data.tokenizer")
    if not path:
        return wishes
    words = Tokenizer.load(path).vocab_size
    size = -(-words // 64) * 64
    if (wished := wishes.value("model.vocab_size", size)) < words:
        raise UserError(f"model.vocab_size {wished}: the tokenizer {path} needs at least {size}")
    return Wishes.of({"model": {"vocab_size": size}}, wishes)


def resolve_run(wishes: Wishes, budget: Budget, corpus: Corpus, place: Place, before: float | None = None) -> tuple[PlannedRun, Resolved]:
    """The resolved run and all that predicting it takes. before: bits per byte of the model that it starts from."""
    seconds = in_seconds(budget, place.rates)
    left = seconds
    if seconds is not None and wishes.value("data.sample"):
        left = seconds - selecting_s(corpus.train_bytes, seconds, wishes.value("data.workers") or 1).value
    spends = budget if left is None else Budget(max(0.1, left), "s")
    config, reasons = resolve(wishes, spends, place.machine, corpus, place.tokens_per_second, place.ranks)
    config = replace(config, budget=budget)
    run = planned_run(config, corpus, place, seconds, before)
    return (selecting(run) if config.data.sample else run), Resolved(config, reasons)


def selecting(run: PlannedRun) -> PlannedRun:
    """The same run where it first chooses its texts, from what is its corpus here; as it is where it would keep all of them."""
    pool, data = run.corpus, run.config.data
    chooses = replace(run, selecting=selecting_s(pool.train_bytes, run.budget_s, data.workers or 1))
    kept = kept_bytes(tokens_and_time(chooses)[0].value, run.bytes_per_token, 0.0)  # the pool's bytes are without what is held out
    return run if kept >= pool.train_bytes else replace(chooses, corpus=Given(kept, pool.kinds))


def planned_run(config: Config, corpus: Corpus, place: Place, budget_s: float | None, before: float | None = None) -> PlannedRun:
    """For a configuration that is resolved already; replicas and micro-batch left open: one a core, the largest that fits. before: bits per
    byte of the model that it starts from."""
    if config.train.replicas is None and config.train.device == "cpu":
        config = replace(
            config, train=replace(config.train, replicas=min(config.train.threads or place.machine.cores_physical, config.train.batch_size))
        )
    compiled = place.name is not None or any(shutil.which(name) for name in ("cc", "gcc", "clang"))  # other machines: taken to have one
    bf16 = place.machine.fast("bfloat16") and (place.name is not None or "avx512_bf16" in hardware.cpu_flags())
    own = config.train.dtype == "float32" or bf16
    path = path_of(config, compiled, own)
    if config.train.micro_batch_size is None:
        micro = -(-config.train.batch_size // place.ranks)
        while micro > 1 and place.memory_limit and _needs(config, micro, path, place.ranks) > place.memory_limit:
            micro //= 2
        if _needs(config, micro, path, place.ranks) <= place.memory_limit:
            config = replace(config, train=replace(config.train, micro_batch_size=micro))
    kind, bytes_per_token = kind_of(corpus.kinds), _bytes_per_token(config, corpus)
    return PlannedRun(
        config=config,
        corpus=corpus,
        law=law_of(kind),
        speed=place.speed(config),
        rates=place.rates,
        bytes_per_token=bytes_per_token,
        memory_limit=place.memory_limit,
        budget_s=budget_s,
        cores=place.machine.cores_logical,
        beginning=beginning(config, kind, bytes_per_token, before),
        path=path,
        ranks=place.ranks,
    )


def _bytes_per_token(config: Config, corpus: Corpus) -> float:
    """Of a tokenizer that is there already: measured on a sample of the corpus; else by its size."""
    if config.data.tokenizer and isinstance(corpus, CorpusFacts):
        return _measured_bytes_per_token(config.data.tokenizer, corpus.fingerprint)
    vocab = min(BYTES_PER_TOKEN, key=lambda size: abs(size - config.model.vocab_size))
    return BYTES_PER_TOKEN[vocab]


@cache
def _measured_bytes_per_token(tokenizer: str, fingerprint: str) -> float:
    return Tokenizer.load(tokenizer).bytes_per_token(load_sample(fingerprint)[:SAMPLED])


def _needs(config: Config, micro: int, path: KernelPath, ranks: int) -> float:
    return needed(replace(config, train=replace(config.train, micro_batch_size=micro)), ranks, path).total
