"""Finds the fastest setting of another program by trying one after another, each in a worker."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Protocol

from sparing.base.config import UserError
from sparing.base.hardware import Machine
from sparing.base.messages import say
from sparing.bench.limit import Limit
from sparing.bench.worker import Worker, WorkerError
from sparing.kernels.formats import warning

FAR = 3.0
"""A number format that is so many times slower than float32 is not tried; a setting so many times slower than the best is timed once."""
SHARE = 0.5
"""Share of the time limit for all trials."""
EACH = 1 / 3
"""Share of what is left of that for each trial."""


class Setting(Protocol):
    """A frozen dataclass; `str` of it tells readers how the program ran."""

    compile: bool

    @property
    def format(self) -> str:
        """The number format that its products are in."""


@dataclass(frozen=True)
class Task:
    """The work that settings are timed at."""

    build: Callable[[Worker, Setting], object]
    part: Callable[[Worker], float]
    """Does a small part -> the seconds that the whole would take, judging by it."""
    whole: Callable[[Worker, int], float]
    """Does the whole for the nth time -> its seconds."""
    tokens: int
    """Tokens of the whole."""


def try_settings(
    peer: str, settings: Sequence[Setting], task: Task, repeats: int, threads: int, limit: Limit, machine: Machine
) -> list[dict]:
    """-> {"setting", "tokens_per_s", "error"} of each: the speed over `repeats` after a warm-up, or None and the reason.

    A setting in a format that `machine` multiplies far slower than float32 is skipped. Settings share a process, which is faster than
    starting one each, except after a failure and for compiled ones.
    """
    slow = {setting.format for setting in settings if machine.slowness(setting.format) > FAR}
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
    """The setting of the fastest trial. Raises UserError where none was timed."""
    best = max(trials, key=lambda trial: trial["tokens_per_s"] or 0.0)
    if best["tokens_per_s"] is None:
        raise UserError(f"no setting of transformers {does} here; the first one: {trials[0]['error']}")
    return best["setting"]


def _timed(worker: Worker, setting: Setting, task: Task, repeats: int, best: float) -> float:
    """Mean seconds of the whole."""
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


def import_transformers():
    """The module, with its logging reduced to errors; UserError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("this figure compares with transformers, which is not installed: pip install 'sparing[dev]'") from error
    transformers.logging.set_verbosity_error()
    return transformers
