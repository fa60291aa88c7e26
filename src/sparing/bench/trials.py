"""A peer's settings, tried one after another: the fastest goes on to be measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Protocol

from sparing.base.config import UserError
from sparing.base.hardware import Machine
from sparing.bench.limit import Limit
from sparing.bench.report import say
from sparing.bench.worker import Worker, WorkerError
from sparing.kernels.formats import warning

FAR = 3.0
"""So many times slower than float32, a number format is not tried; than the best so far, a setting is not timed further."""
SHARE = 0.5
"""Of a figure's limit, for all trials."""
EACH = 1 / 3
"""Of what is left of that, for each of them."""


class Setting(Protocol):
    """A frozen dataclass whose text is what a reader needs to know of it."""

    compile: bool

    @property
    def format(self) -> str:
        """The number format that its products are in."""


@dataclass(frozen=True)
class Task:
    """What a setting is timed at."""

    build: Callable[[Worker, Setting], object]
    part: Callable[[Worker], float]
    """Does a small part of it; -> the seconds that all of it would take by that."""
    whole: Callable[[Worker, int], float]
    """Does it for the nth time; -> its seconds."""
    tokens: int
    """Of the whole."""


def try_settings(
    peer: str, settings: Sequence[Setting], task: Task, repeats: int, threads: int, limit: Limit, machine: Machine | None
) -> list[dict]:
    """-> one {"setting", "tokens_per_s", "error"} each: over `repeats` after one that warms up, or None and why.

    A setting in a format that `machine` multiplies far slower than float32 is skipped; machine None: they were chosen by name, none is.
    Settings share a process, which is faster than starting one each, except after a failure and for those that are compiled.
    """
    slow = {setting.format for setting in settings if machine and machine.slowness(setting.format) > FAR}
    for format in sorted(slow):
        say(f"{peer}, {sum(s.format == format for s in settings)} settings: skipped: {warning(format, machine)}")
    trials: list[dict] = []
    best, worker, ends, fresh = math.inf, None, limit.within(SHARE * limit.left()), True
    try:
        for setting in settings:
            trial: dict = {"setting": asdict(setting), "tokens_per_s": None, "error": None}
            trials.append(trial)
            if setting.format in slow:
                trial["error"] = warning(setting.format, machine)
                continue
            if worker and (fresh or setting.compile):
                worker.kill()
                worker = None
            try:
                worker = worker or Worker(threads, limit)
                worker.limit = ends.within(EACH * ends.left())
                took = _timed(worker, setting, task, repeats, best)
                best, trial["tokens_per_s"] = min(best, took), task.tokens / took
                say(f"{peer}, {setting}: {trial['tokens_per_s']:,.0f} tokens/s")
            except WorkerError as error:
                trial["error"] = str(error)
                say(f"{peer}, {setting}: skipped: {error}")
            fresh = setting.compile or trial["error"] is not None
    finally:
        if worker:
            worker.kill()
    return trials


def fastest(trials: list[dict], does: str) -> dict:
    """Its setting. Raises UserError where none was timed."""
    best = max(trials, key=lambda trial: trial["tokens_per_s"] or 0.0)
    if best["tokens_per_s"] is None:
        raise UserError(f"no setting of transformers {does} here; the first one: {trials[0]['error']}")
    return best["setting"]


def _timed(worker: Worker, setting: Setting, task: Task, repeats: int, best: float) -> float:
    """Mean seconds."""
    task.build(worker, setting)
    if not setting.compile:  # a part has another shape, and would be compiled as well
        needs = (1 + repeats) * min(task.part(worker) for _ in range(2))
        if needs > worker.limit.left():
            raise WorkerError(f"it would take about {needs:,.0f} s, and the limit (--limit) leaves {worker.limit.left():,.0f}")
    task.whole(worker, 0)
    took = [task.whole(worker, 1)]
    while len(took) < repeats and took[0] <= FAR * best:
        took.append(task.whole(worker, len(took) + 1))
    return mean(took)
