"""Begins a metered job on a run folder, and resolves the configuration of a new run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from sparing.account.meter import Meter, metered
from sparing.account.prices import home_rent
from sparing.account.receipt import read_state
from sparing.base.config import Budget, Config, DataConfig, UserError
from sparing.base.config_file import Wishes, refuse, write_config
from sparing.base.files import write_atomic
from sparing.base.hardware import Machine
from sparing.base.messages import say
from sparing.base.notices import notices
from sparing.base.preempt import Interrupted, Preempt
from sparing.base.run import RunFolder
from sparing.budget.estimate import Estimate
from sparing.budget.predict import Corpus, check_begun, in_seconds
from sparing.budget.selecting import looked_at, selecting_s
from sparing.budget.units import format_budget
from sparing.data.progress import Stopped
from sparing.data.scan import CorpusFacts, load_sample
from sparing.job.texts import Facts, bind, facts_of, facts_of_own, same_texts, with_absolute_paths
from sparing.parallel.ranks import GO, STOP, Ranks, ranks
from sparing.planning.places import MEASURE_S, Given, Place, here, planned_run, selecting, with_vocabulary
from sparing.planning.plan import foresee
from sparing.planning.start import SETTLED, with_start
from sparing.resolve import Resolved, resolve
from sparing.train.log import check_log
from sparing.train.pace import Clock
from sparing.train.peak import peak_flops, peak_seconds
from sparing.train.profile import step_timings

SOME_BYTES, SOME_SPEED = 1e8, 1e4
MEASURE_SHARE = 0.05
"""Of a time budget, for timing training steps on a machine that was not seen before."""
MEASURE_FROM_S = 60.0
"""A shorter budget is planned with default rates: the process that times steps takes seconds to start."""


Stop = Callable[[], bool]


class Chooser(Protocol):
    """Chooses texts that are most like a sample, which it has read (`curate.for_run`)."""

    def choose(self, folder: Path, others: list[str], size: float, looked: float, should_stop: Stop) -> dict:
        """Write to `folder`/documents the best documents of a pool, of `size` bytes together or a document more. others: texts that are any
        of the pool's. looked: share of its documents that are looked at. -> what `state/selected.json` says of it, `documents` first."""
        ...

    def keep_sample(self, folder: Path) -> None:
        """Write what of the sample a run is scored on to `folder`/sample.jsonl."""
        ...


@dataclass
class Job:
    """A verb at work on a run: the folder it holds the lock of, its meter, its signals and its clock, and the ranks that share the work.

    A rank that is not the first holds no lock, and writes nothing."""

    run: RunFolder
    meter: Meter
    signals: Preempt
    clock: Clock
    ranks: Ranks | None = None

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return 1 if self.ranks is None else self.ranks.size

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, or alone."""
        return self.ranks is None or self.ranks.rank == 0

    def ready(self) -> None:
        """The run is prepared: the other ranks may join."""
        if self.ranks is not None and self.leads:
            self.ranks.release(GO)

    @property
    def machine(self) -> Machine:
        return self.meter.machine

    def lasts(self, budget: Budget) -> float | None:
        """Seconds that a budget lasts at this machine's prices and power; None: it is in tokens or operations."""
        return in_seconds(budget, self.meter.tariff.rates.times(self.size))

    def cut_short(self, message: str) -> None:
        """Tell the user what a limit in seconds left undone, and keep it for the receipt."""
        say(message)
        before = read_state(self.run, "cut_short", list) or []
        write_atomic(self.run.state / "cut_short.json", json.dumps([*before, message]))

    def write(self, config: Config, reasons: dict[str, str]) -> None:
        """Keep a configuration and its reasons in the run folder."""
        write_atomic(self.run.state / "reasons.json", json.dumps(reasons))
        write_atomic(self.run.config_file, write_config(config, reasons))


def show(config: Config, reasons: dict[str, str]) -> None:
    """Tell the user what was chosen, and why. reasons: by dotted name."""
    for name, reason in reasons.items():
        section, field = name.split(".")
        say(f"  {name} = {getattr(getattr(config, section), field)}  # {reason}")


@contextmanager
def begin(verb: str, run: RunFolder, started: float | None = None, ready: Callable[[], None] = lambda: None) -> Iterator[Job]:
    """Take the run's lock, start the meter and own the signals, until the job is left. Of a run that then has no configuration yet, nothing
    stays.

    started: `time.monotonic()` when the verb began. ready: called under the lock; what it refuses is not metered.
    Raises UserError where another process holds the lock, Interrupted (from inside) on a signal.
    """
    others = ranks()
    with _leading(others), run.making():
        ready()
        with metered(verb, run, started=started, others=others) as meter, _interrupted(run) as signals:
            try:
                yield Job(run, meter, signals, Clock(run, meter.started), others)
                if others is not None:
                    others.left()
            except Stopped:
                raise Interrupted(signals.message) from None


@contextmanager
def _interrupted(run: RunFolder) -> Iterator[Preempt]:
    """What stops a job from outside: signals, and notices that the machine goes away."""
    with Preempt(f"sparing resume {run}") as signals, notices(signals.leave_by):
        yield signals


@contextmanager
def _leading(others: Ranks | None) -> Iterator[None]:
    """Where rank 0 ends before the run is ready, the others end too."""
    try:
        yield
    finally:
        if others is not None:
            others.release(STOP)  # after GO nobody looks any more


@contextmanager
def follow(verb: str, run: RunFolder, started: float | None = None) -> Iterator[Job | None]:
    """The job of a rank that is not the first, once rank 0 has prepared the run; None: it has ended without. Raises Interrupted."""
    others = ranks()
    with metered(verb, run, started=started, others=others) as meter, _interrupted(run) as signals:
        go = others.wait(signals.check)
        try:
            yield Job(run, meter, signals, Clock(run, meter.started), others) if go else None
        except Stopped:
            raise Interrupted(signals.message) from None
    others.left()


def resolved(job: Job, wishes: Wishes, budget: Budget, chooser: Callable[[DataConfig, Stop], Chooser] | None = None) -> Config:
    """The configuration of a new run, written into its folder and shown with its reasons. chooser: reads `data.sample`, where the wishes
    have one. Raises UserError for what cannot be, before any text is read."""
    names_texts = bool(wishes.value("data.paths"))
    refuse(wishes, "train", "adapter")
    wishes = with_vocabulary(with_start(with_absolute_paths(wishes)))
    try_out(job, wishes, budget)
    choosing = None
    if wishes.value("data.sample"):
        with job.meter.stage("select"):
            choosing = chooser(wishes.config().data, job.signals.should_stop)
    with job.meter.stage("scan"):
        facts = facts_of(wishes.config().data, None, job.signals.should_stop)
    if wishes.value("start.run") and not names_texts:
        same_texts(RunFolder(wishes.value("start.run")), facts, "name the texts to go on with")
    if facts.quarantined:
        say(f"{facts.quarantined} documents cannot be used ({', '.join(facts.reasons)}): see quarantine.jsonl in the run folder")
    place = look_at(job, wishes, budget)
    took = None
    if choosing is not None:
        facts, took = chosen(job, wishes, budget, facts, place, choosing)
    config, reasons = derive(job, wishes, budget, facts, place)
    keep(job, config, reasons, facts, facts, place, f"{facts.documents:,} documents, {facts.bytes / 1e6:.1f} MB", took)
    return config


def chosen(
    job: Job, wishes: Wishes, budget: Budget, pool: CorpusFacts, place: Place, chooser: Chooser
) -> tuple[CorpusFacts, Estimate | None]:
    """Choose from the pool what the budget trains on (`budget.selecting`), and keep it in the run.

    -> (what there is of it; the seconds that were expected of choosing, None: all of the pool is used). Raises UserError; TooShort, before
    it chooses, where no time is left."""
    run, lasts, data = job.run, job.lasts(budget), wishes.config().data
    workers, names, folder = data.workers or 1, ", ".join(data.sample), job.run.state / "selected"
    config, _ = derive(job, wishes, budget, pool, place, selecting_s(pool.train_bytes, lasts, workers).value)
    planned = selecting(replace(planned_run(config, pool, place, lasts), start_s=job.clock.seconds()))
    folder.mkdir(parents=True, exist_ok=True)
    chooser.keep_sample(folder)
    if planned.selecting is None:
        say(f"the data have {pool.bytes / 1e6:.2g} MB, no more than the budget trains on: all of it is used, and nothing is chosen")
        write_atomic(run.state / "selected.json", json.dumps({"whole": True, "documents": pool.counts}))
        return pool, None
    check_begun(planned)
    size, looked = planned.corpus.train_bytes / (1 - data.holdout_fraction), looked_at(pool.train_bytes, lasts, workers)
    part = "" if looked == 1 else f"; of the pool {looked:.0%} is looked at, a random part: all would take too much of the budget"
    say(
        f"choosing {size / 1e6:.2g} of {pool.bytes / 1e6:.2g} MB, what is most like {names} and is trained on once, in about "
        f"{planned.selecting.value:.0f} s{part}"
    )
    with job.meter.stage("select"):
        found = chooser.choose(folder, load_sample(pool.fingerprint), size, looked, job.signals.should_stop)
        write_atomic(run.state / "selected.json", json.dumps({"whole": False} | found, indent=1))
        facts = facts_of_own(run, data, None, job.signals.should_stop)
    say(f"held-out text is of what was chosen; beside it the run is scored on {names}")
    return replace(facts, kinds=pool.kinds), planned.selecting


def try_out(job: Job, wishes: Wishes, budget: Budget) -> None:
    """Resolve for the checks alone, which hold for any text and any speed. Raises UserError."""
    check_log(wishes.value("train.log", "none"))
    resolve(wishes, _spends(job, budget), job.machine, Given(SOME_BYTES), lambda _: SOME_SPEED, job.size)


def look_at(job: Job, wishes: Wishes, budget: Budget) -> Place:
    """This machine with its measured speeds; a new one is measured within a small share of the budget."""
    machine, lasts = job.machine, job.lasts(budget)
    device = wishes.value("train.device") or ("cuda" if machine.gpus else "cpu")
    with job.meter.stage("calibrate"), job.signals.interruptible():
        if lasts is not None and lasts >= MEASURE_FROM_S:  # before the peak, which that process measures too, in memory of its own
            step_timings(machine, device, min(MEASURE_S, MEASURE_SHARE * lasts), say)
        peak_flops(machine, device if machine.gpus else "cpu", wishes.value("train.dtype"), peak_seconds(lasts), job.cut_short)
        return replace(here(home_rent(), machine=machine), ranks=job.size)


def derive(job: Job, wishes: Wishes, budget: Budget, corpus: Corpus, place: Place, aside: float = 0.0) -> Resolved:
    """What the wishes leave open, for what is left of the budget now. aside: seconds that something else is going to take."""
    lasts = job.lasts(budget)
    left = _spends(job, budget) if lasts is None else Budget(max(0.1, lasts - job.clock.seconds() - aside), "s")
    config, reasons = resolve(wishes, left, job.machine, corpus, place.tokens_per_second, job.size)
    if budget.unit in ("usd", "kwh"):
        reasons["budget.amount"] = f"lasts about {lasts:,.0f} s at the prices and the power of this machine"
    if config.start is not None:
        reasons |= dict.fromkeys(SETTLED, f"as in {config.start.run}")
    return Resolved(replace(config, budget=budget), reasons)


def keep(
    job: Job, config: Config, reasons: dict[str, str], facts: Facts, corpus: Corpus | None, place: Place, read: str,
    took: Estimate | None = None,
) -> None:  # fmt: skip
    """Write a new run's configuration, what it is trained on and what is expected of it; show what was derived. corpus: None where nothing
    can be expected. read: what it learns from, in words. took: seconds that were expected of choosing it, which have gone by. Raises
    TooShort, and writes nothing, where one step no longer fits the budget."""
    run, peak, gone = job.run, place.peak_flops, job.clock.seconds()
    planned = replace(planned_run(config, corpus or Given(1.0), place, job.lasts(config.budget)), start_s=gone)
    check_begun(planned)
    if took is not None:
        planned = replace(planned, start_s=gone - took.value, selecting=took)
    say(f"{read}; budget {format_budget(config.budget)}; peak {peak / 1e9:,.0f} GFLOP/s")
    show(config, reasons)
    run.tokenizer_file.unlink(missing_ok=True)  # of an import that died in this folder
    bind(run, config.data, facts, earlier=[])
    job.write(config, reasons)
    if corpus is None:
        return
    try:
        write_atomic(run.state / "prediction.json", json.dumps(foresee(planned), indent=1))
    except UserError as error:  # a forecast that cannot be made is no reason not to train
        say(f"no prediction: {error}")


def _spends(job: Job, budget: Budget) -> Budget:
    lasts = job.lasts(budget)
    return budget if lasts is None else Budget(lasts, "s")
