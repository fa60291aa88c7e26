"""The meter counts the time, energy, money, tokens and memory of each stage of a verb, and writes them to the ledgers while it runs.

A thread looks once a second (process times, counters, memory) and writes what has changed every two; the main thread is only asked
for a reading where a stage begins or ends. Stages nest, and each second belongs to the innermost: an attempt's stages add up to it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Protocol

from sparing.account.history import TRAINING, books, entries_of
from sparing.account.ledger import Entry, complain
from sparing.account.power import PowerModel, cpu_seconds, cuda_memory, peak_memory, reset_peak_memory, resident_memory, sources
from sparing.account.tariff import Tariff
from sparing.base.hardware import Machine
from sparing.base.messages import say
from sparing.base.run import RunFolder

SAMPLE_S = 1.0
WRITE_S = 2.0
RATE_WINDOW = 30
"""Samples over which `per_second` averages."""
RELOAD_S = 5.0
"""Between looks at the price file."""


def metered(
    verb: str, run: RunFolder | None = None, first: str = "setup", started: float | None = None, others: Others | None = None
) -> Meter:
    """A meter on this machine, to be entered. Raises UserError for a price file that cannot be used."""
    from sparing.kernels.formats import this_machine  # loads torch, which a plan or a receipt does without

    return Meter(verb, this_machine(), run, first=first, started=started, say=say, others=others)


class Others(Protocol):
    """The other ranks of a job: each meters its own share of its host, and rank 0 keeps the ledgers."""

    rank: int

    def send_rows(self, rows: list[dict]) -> None:
        """Hand rank 0 what this one has used so far."""

    def rows_of_others(self) -> list[dict]:
        """What the others have handed over."""


class NoMeter:
    """The interface of `Meter`, counting nothing: for callers without one."""

    watts: float | None = None
    memory_bytes: int | None = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        yield

    def add(self, tokens: int = 0, flops: float = 0.0) -> None:
        """Work done by the stage under way."""

    def now(self) -> dict[str, float]:
        """The last second's watts and memory_bytes, where they are known."""
        return {name: value for name in ("watts", "memory_bytes") if (value := getattr(self, name)) is not None}


class Meter(NoMeter):
    """A context manager around one verb. `stage(name)` opens a stage inside it; whatever is in none is "setup".

    watts and memory_bytes are the last second's, for metrics; own_s is the CPU time that metering itself has taken, in seconds.
    """

    def __init__(
        self,
        verb: str,
        machine: Machine,
        run: RunFolder | None = None,
        *,
        first: str = "setup",
        started: float | None = None,
        say: Callable[[str], None] = complain,
        others: Others | None = None,
    ):
        """first: the stage of everything outside other stages. started: `time.monotonic()` when the verb began, if before now. others: that
        work on the same run.

        Raises UserError for a price file that cannot be used.
        """
        self.verb, self.machine, self.run, self.first, self.say, self.others = verb, machine, run, first, say, others
        self._others: dict[str, Entry] = {}
        self.devices = max(1, len(machine.gpus))
        self.tariff = Tariff(machine, say)
        self.started = time.monotonic() if started is None else started
        self.own_s = 0.0
        self._lock = threading.RLock()
        self._attempt = uuid.uuid4().hex
        self._entries: dict[str, Entry] = {}
        self._stack: list[str] = []
        self._dirty: set[str] = set()
        self._left = threading.Event()
        self._looked = self._written = -math.inf  # at the price file; to the ledgers
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=RATE_WINDOW)
        self._sources = sources(machine, self.tariff.rates, self.tariff.processor)
        self.energy_how = "measured" if all(source.how == "measured" for source in self._sources) else "estimated"
        self.energy_source = " + ".join(f"{source.part}: {source.name} ({source.how})" for source in self._sources)

    # the verb's side

    def __enter__(self) -> Meter:
        self._ledgers, self.run_id = ([], "") if self.others and self.others.rank else books(self.run, self.say)
        self._clock, self._cpu = time.monotonic(), cpu_seconds()
        self._joules = {}
        self._joules = self._count()
        self._push(self.first)
        self._before_the_meter()
        self._recent.append(self._total())
        self._thread = threading.Thread(target=self._watch, daemon=True, name="sparing-meter")
        self._thread.start()
        return self

    def __exit__(self, kind, error, _trace) -> None:
        self._left.set()
        self._thread.join()
        while len(self._stack) > 1:  # left by an exception between two instructions of `stage`
            self._pop()
        status = "done" if kind is None else "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        with self._lock:
            self._look()
            self._peak()
            for entry in self._entries.values():
                entry.status = status if entry.stage == self.first or entry.status == "running" else entry.status
                entry.error = str(error)[:500] if status == "failed" and entry.stage == self.first else entry.error
            self._dirty.update(self._entries)
        self._write()
        for ledger in self._ledgers:
            ledger.close()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens inside belongs to `name`; entered again later, it adds up in the same row."""
        self._push(name)
        status = "failed"
        try:
            yield
            status = "done"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            if self._stack and self._stack[-1] == name:
                self._pop(status)

    def add(self, tokens: int = 0, flops: float = 0.0) -> None:
        with self._lock:
            entry = self._entries[self._stack[-1]]
            entry.tokens += tokens
            entry.flops += flops
            self._dirty.add(entry.stage)

    def rows(self) -> list[Entry]:
        """Copies of this attempt's rows, up to now, and of the other ranks'."""
        with self._lock:
            self._look()
            return [replace(entry) for entry in (*self._entries.values(), *self._others.values())]

    def earlier(self) -> list[Entry]:
        """Rows of earlier attempts at training this run."""
        rows = entries_of(self.run) if self.run else []
        return [row for row in rows if row.verb in TRAINING and not row.uid.startswith(self._attempt) and row.uid not in self._others]

    def latest(self) -> tuple[float, float, float]:
        """(`time.monotonic()` of the last sample, US dollars, kWh of this attempt until then)."""
        return self._recent[-1]

    def per_second(self) -> tuple[float, float] | None:
        """(US dollars, kWh) a second over the last half minute; None in the first three seconds."""
        with self._lock:
            (t0, usd0, kwh0), (t1, usd1, kwh1) = self._recent[0], self._recent[-1]
        return ((usd1 - usd0) / (t1 - t0), (kwh1 - kwh0) / (t1 - t0)) if t1 - t0 >= 3 * SAMPLE_S else None

    # counting

    def _push(self, name: str) -> None:
        with self._lock:
            self._look()
            self._peak()
            self._stack.append(name)
            if name not in self._entries:
                folder = str(self.run.path.resolve()) if self.run else ""
                self._entries[name] = Entry(
                    f"{self._attempt}-{name}", self.run_id, folder, self.verb, name, started=time.time(), machine=self.machine.describe(),
                    host=socket.gethostname(), pid=os.getpid(), energy_how=self.energy_how, energy_source=self.energy_source,
                )  # fmt: skip
            self._entries[name].status = "running"
            self._dirty.add(name)

    def _pop(self, status: str = "done") -> None:
        with self._lock:
            self._look()
            self._peak()
            self._entries[self._stack.pop()].status = status

    def _look(self) -> None:
        """Add what was used since the last look to the stage under way."""
        begun = time.thread_time()
        now, cpu, joules = time.monotonic(), cpu_seconds(), self._count()
        wall, worked = now - self._clock, cpu - self._cpu
        part = {name: max(0.0, joules[name] - self._joules[name]) for name in joules}
        self._clock, self._cpu, self._joules = now, cpu, joules
        if self._stack:
            self._add(wall, worked, part.get("cpu", 0.0), part.get("gpu", 0.0))
            if wall > 0.5 * SAMPLE_S:
                self.watts = sum(part.values()) / wall
        self.own_s += time.thread_time() - begun

    def _count(self) -> dict[str, float]:
        """Joules by part so far."""
        counted = {}
        for source in self._sources:
            try:
                counted[source.part] = source.joules()
            except Exception as error:  # whatever a driver does, it must not end the verb that is metered
                counted[source.part] = self._joules.get(source.part, 0.0)
                if source.how == "measured":
                    source.how = self.energy_how = "estimated"
                    self.say(f"{source.name} no longer answers ({error}): the energy of the rest of this run is incomplete")
        return counted

    def _add(self, wall: float, cpu: float, cpu_j: float, gpu_j: float) -> None:
        rates, entry = self.tariff.rates, self._entries[self._stack[-1]]
        kwh = (cpu_j + gpu_j) * rates.pue / 3.6e6
        entry.wall_s += wall
        entry.device_s += wall * self.devices
        entry.core_s += wall * self.machine.cores_physical
        entry.cpu_s += cpu
        entry.kwh_cpu += cpu_j / 3.6e6
        entry.kwh_gpu += gpu_j / 3.6e6
        entry.kwh += kwh
        entry.co2e_g += kwh * rates.gco2e_per_kwh
        entry.usd += wall / 3600 * rates.usd_per_hour + kwh * rates.usd_per_kwh
        entry.updated = time.time()
        self._dirty.add(entry.stage)

    def _before_the_meter(self) -> None:
        """The seconds from `started` until now: nobody counted; starting Python and importing keeps one core busy."""
        gap, power = self._clock - self.started, self.tariff.processor
        if gap > 0:
            one_core = power.watts_idle + (power.watts_busy - power.watts_idle) / max(1, self.machine.cores_physical)
            self._add(gap, 0.0, gap * one_core, 0.0)
            self._entries[self.first].started -= gap

    def _peak(self) -> None:
        """Peaks belong to the stage under way until another one begins."""
        if self._stack:
            entry = self._entries[self._stack[-1]]
            main, cuda = peak_memory()
            entry.memory_bytes, entry.gpu_memory_bytes = max(entry.memory_bytes, main), max(entry.gpu_memory_bytes, cuda)
        reset_peak_memory()

    # the thread's side

    def _watch(self) -> None:
        self.sample()
        while not self._left.wait(SAMPLE_S):
            self.sample()

    def sample(self) -> None:
        """Look at everything once; look at the price file, and write, where that is due."""
        begun, own = time.thread_time(), self.own_s
        with self._lock:
            self._look()
            resident = resident_memory()
            self.memory_bytes = cuda_memory() or resident
            entry = self._entries[self._stack[-1]]
            entry.memory_bytes = max(entry.memory_bytes, resident)
            self._recent.append(self._total())
        now = time.monotonic()
        if now - self._looked >= RELOAD_S:
            self._looked = now
            self._reload()
        if now - self._written >= WRITE_S:
            self._write()
            self._written = now
        self.own_s += time.thread_time() - begun - (self.own_s - own)  # `_look` has counted its part

    def _total(self) -> tuple[float, float, float]:
        """(now, US dollars, kWh) of this attempt, of all ranks."""
        rows = [*self._entries.values(), *self._others.values()]
        return self._clock, sum(row.usd for row in rows), sum(row.kwh for row in rows)

    def _write(self) -> None:
        with self._lock:
            rates = json.dumps(asdict(self.tariff.rates))
            follows = self.others is not None and self.others.rank > 0
            written = self._entries if follows else self._dirty  # what is sent takes the place of all that was
            rows = [replace(self._entries[name], rates=rates, energy_how=self.energy_how) for name in written]
            self._dirty.clear()
        if follows:
            self.others.send_rows([asdict(replace(row, wall_s=0.0)) for row in rows])  # rank 0 counts the time
        elif self.others:
            with self._lock:
                folder = str(self.run.path.resolve()) if self.run else ""
                sent = [replace(Entry(**row), run_id=self.run_id, run=folder, verb=self.verb) for row in self.others.rows_of_others()]
                rows += [row for row in sent if row != self._others.get(row.uid)]
                self._others |= {row.uid: row for row in sent}
        for ledger in self._ledgers:
            for row in rows:
                ledger.put(row)

    def _reload(self) -> None:
        before = self.tariff.rates
        with self._lock:
            self._look()  # what was spent until now, was spent at the old prices
            if not self.tariff.reload(self.say):
                return
            for source in self._sources:
                if isinstance(source, PowerModel):
                    source.change(self.tariff.processor.watts_idle, self.tariff.processor.watts_busy, self.machine.cores_physical)
            self._recent.clear()
            self._recent.append(self._total())
        self.say(f"prices changed: ${before.per_hour():.4g} → ${self.tariff.rates.per_hour():.4g} an hour at full power")
