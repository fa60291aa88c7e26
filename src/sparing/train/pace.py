"""Turns a budget into a number of steps, `total`, which is all that the schedule needs to know.

Token and FLOP budgets fix the total at the start. A time budget is planned from measured step times: total = steps done + what fits
between now and the deadline minus what the end costs; planned again as the machine speeds up or slows down. A plan is on disk
(state/plan.jsonl: step, total_steps, seconds, step_seconds) before it takes effect; a resumed run replays it.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from sparing.base.files import append_durably, read_lines, write_atomic
from sparing.base.run import RunFolder
from sparing.budget.predict import AIM
from sparing.budget.spot import INTERVAL_S, young_daly

LATEST = 1.012
"""Share at which training stops whatever the plan says."""
TOLERANCE = 0.005
"""Plan again when the projected end is off by more than this share of the budget."""
WINDOW = 64
"""Steps whose mean time is believed."""
KNOWN = 16
"""Steps after which the machine's speed is known well enough for its changes to be news."""
WORTH_TELLING = 0.1
FIRST_SAVE_S = 0.25
"""What saving is taken to take until it was measured."""
SMALL_SHARE = 0.05
"""Evaluations, and checkpoints, may each take at most this share of the run."""


def fixed_steps(amount: float, unit: str, tokens_per_step: int, flops_per_token: float) -> int:
    """Steps that a token or FLOP budget pays for: never more than the budget, at least one."""
    assert unit in ("tok", "flop"), unit
    tokens = amount if unit == "tok" else amount / flops_per_token
    return max(1, int(tokens // tokens_per_step))


class PlanLog:
    """state/plan.jsonl: every plan of a run, in order."""

    def __init__(self, path: Path | None):
        """path: None for ranks that follow rank 0's plans; nothing is read or written."""
        self.path = path
        self.plans = [line for line in read_lines(path) if "step" in line and "total_steps" in line] if path else []

    def add(self, plan: dict) -> None:
        if self.path:
            append_durably(self.path, json.dumps(plan))
        self.plans.append(plan)

    def forget_after(self, step: int) -> None:
        """Drop plans made later than `step`: a resumed run that cannot afford to replay them makes its own."""
        self.plans = [plan for plan in self.plans if plan["step"] <= step]
        if self.path:
            write_atomic(self.path, "".join(json.dumps(plan) + "\n" for plan in self.plans))

    def at(self, step: int) -> dict | None:
        """The plan in force at `step`."""
        return next((plan for plan in reversed(self.plans) if plan["step"] <= step), None)


class Pace:
    """`total` steps, kept up to date by `advance`; fed with what things took. Seconds are budget seconds (see `Clock`)."""

    def __init__(
        self,
        log: PlanLog,
        *,
        step: int,
        seconds: float,
        budget_s: float | None,
        fixed: int | None = None,
        step_seconds: float = 1.0,
        reserve_s: float = 0.0,
        evals: int | None = None,
        interval_s: float | None = None,
        failures_per_hour: float = 0.0,
        name: float | None = None,
        say: Callable[[str], None] | None = None,
    ):
        """step: steps done; exactly one of budget_s and fixed (steps) is given. step_seconds: a first guess of a step's time.
        reserve_s: what the caller does after training; evals: evaluations inside the run besides the last one (None: not even that);
        interval_s: between checkpoints; None: what failures_per_hour, of this run so far, asks for. name: what the budget is recognised by
        when a run goes on, where budget_s itself may change (budgets in money and energy). say: told when the run becomes longer or
        shorter than it was said to be."""
        assert (budget_s is None) != (fixed is None)
        self.log, self.budget_s, self.reserve_s, self.interval_s = log, budget_s, reserve_s, interval_s
        self.failures_per_hour = failures_per_hour
        self.evals, self.evaluates = evals or 0, evals is not None
        self.guess = step_seconds
        self.durations: deque[float] = deque(maxlen=WINDOW)
        self.measured = 0  # steps measured in this process
        self.eval_s: float | None = None
        self.save_s = 0.0
        self.evals_done = 0
        self.looked = seconds  # when the plan was last compared with the clock
        self.budget = name if name is not None else fixed if fixed is not None else budget_s
        self.say = say or (lambda text: None)
        self.told: tuple[int, float, float] | None = None  # total, step_s, budget_s as the user knows them
        recorded = log.at(step)
        if recorded is not None and recorded.get("budget") != self.budget:  # the run is being extended: what was planned is void
            self.guess = recorded.get("step_seconds") or self.guess
            log.forget_after(step)
            recorded = None
        if recorded is not None:
            self.guess = recorded.get("step_seconds") or self.guess
            self.total = recorded["total_steps"]
            late = budget_s is not None and self._end(step, seconds, log.plans[-1]["total_steps"]) > LATEST * budget_s
            if late:
                log.forget_after(step)
                self._replan(step, seconds)
        else:
            self.total = fixed if fixed is not None else self._fitting(step, seconds)
            self._record(step, seconds)

    # what is measured

    def step_took(self, seconds: float) -> None:
        self.measured += 1
        if self.measured >= 3:  # the first two warm caches (and compile): they tell nothing about the others
            self.durations.append(seconds)

    def eval_took(self, seconds: float, planned: bool = True) -> None:
        """planned: it is one of the evenly spaced ones, or the last."""
        self.eval_s = seconds
        self.evals_done += planned

    def save_took(self, seconds: float) -> None:
        self.save_s = max(seconds, 0.5 * self.save_s)

    @property
    def step_s(self) -> float:
        """A step's time: the first guess until the third step, the first that tells anything."""
        return sum(self.durations) / len(self.durations) if self.measured >= 3 else self.guess

    # what follows from it

    def advance(self, step: int, seconds: float, budget_s: float | None = None) -> int:
        """The total to use from `step` (steps done) on: a recorded plan's, or, where the clock calls for it, a new one's.
        budget_s: how long the budget lasts, where that changes."""
        self.budget_s = self.budget_s if budget_s is None else budget_s
        recorded = self.log.at(step)
        if recorded is not None and recorded["step"] == step:
            self.total = recorded["total_steps"]
        if self.budget_s is None:
            return self.total
        if seconds + self.step_s + self.end_s > LATEST * self.budget_s and step < self.total and step > 0:
            if self.log.plans[-1]["step"] > step:
                self.log.forget_after(step)
            self.total = step  # out of time: better an unfinished decay than a budget overrun
            self._record(step, seconds)
        elif self.log.plans[-1]["step"] < step and self._worth_a_look(step, seconds):
            self.looked = seconds
            if abs(self._fitting(step, seconds) - self.total) * self.step_s > TOLERANCE * self.budget_s:
                self._replan(step, seconds)
            if self.measured >= KNOWN:
                self._tell()
        return self.total

    @property
    def end_s(self) -> float:
        """Seconds that the end of the run costs: last evaluation, last checkpoint, what the caller does."""
        assert self.budget_s is not None
        unknown = SMALL_SHARE / (self.evals + 1) * self.budget_s if self.evaluates else 0.0  # until the first: as much as one may take
        return (unknown if self.eval_s is None else self.eval_s) + self.save_s + self.reserve_s

    def evals_left(self) -> int:
        """Evaluations inside the run still to come: as configured, fewer where they would take more than 5 % of a time budget."""
        affordable = self.evals
        if self.budget_s is not None and self.eval_s:
            affordable = int(SMALL_SHARE * self.budget_s / self.eval_s) - 1  # the last one, after training, counts too
        return max(0, min(self.evals, affordable) - self.evals_done)

    def checkpoint_interval(self) -> float:
        """Seconds between checkpoints, long enough for saving to be a small share of the time."""
        interval = INTERVAL_S if self.interval_s is None else self.interval_s
        if self.interval_s is None and self.failures_per_hour and self.budget_s is not None:
            interval = young_daly(self.save_s or FIRST_SAVE_S, self.failures_per_hour)
        return max(interval, self.save_s / SMALL_SHARE)

    def checkpoint_due(self, step: int, since: float) -> bool:
        """since: seconds since the last one. A time budget goes by them; others by a number of steps, fixed after the first ones and
        written down, so that a run that goes back to a checkpoint does so to the same one however often it was killed."""
        if self.budget_s is not None:
            return since >= self.checkpoint_interval()
        every = next((plan["checkpoint_steps"] for plan in self.log.plans if "checkpoint_steps" in plan), None)
        if every is None and self.measured >= 8:
            every = max(1, round(self.checkpoint_interval() / self.step_s))
            self._record(step, self.looked, checkpoint_steps=every)
        return every is not None and step % every == 0

    def eval_due(self, step: int) -> bool:
        """After `step` steps: has another of the evenly spaced evaluations inside the run been reached?"""
        return 0 < step < self.total and step * (self.evals + 1) // self.total > self.evals_done and self.evals_left() > 0

    def _worth_a_look(self, step: int, seconds: float) -> bool:
        """Early, at 4, 8, 16, ... steps; later every 2 % of the time, and every 0.5 % in the last tenth."""
        if step & (step - 1) == 0 and 4 <= step <= 64:
            return True
        late = seconds > 0.9 * self.budget_s
        return self.measured >= 4 and seconds - self.looked > (0.005 if late else 0.02) * self.budget_s

    def _end(self, step: int, seconds: float, total: int) -> float:
        """Projected budget seconds at the very end, if `total` steps are made."""
        saves = max(0.0, (self.budget_s - seconds) / self.checkpoint_interval() - 1) * self.save_s
        evals = self.evals_left() * (0.0 if self.eval_s is None else self.eval_s)
        return seconds + (total - step) * self.step_s + evals + saves + self.end_s

    def _fitting(self, step: int, seconds: float) -> int:
        free = AIM * self.budget_s - self._end(step, seconds, step)
        return max(step, 1, step + round(free / self.step_s))

    def _replan(self, step: int, seconds: float) -> None:
        self.total = self._fitting(step, seconds)
        self._record(step, seconds)

    def _tell(self) -> None:
        """Say it once the run has become longer or shorter by `WORTH_TELLING` than was said before, and why."""
        now = (self.total, self.step_s, self.budget_s)
        before, self.told = self.told or now, self.told or now
        if abs(now[0] / before[0] - 1) > WORTH_TELLING:
            why = f"a step takes {now[1] / before[1]:.2f} times as long"
            if abs(now[2] / before[2] - 1) > abs(now[1] / before[1] - 1):
                why = f"the budget lasts {now[2]:,.0f} s, not {before[2]:,.0f} s"
            self.say(f"planned again: {now[0]:,} steps instead of {before[0]:,}, as {why}")
            self.told = now

    def _record(self, step: int, seconds: float, **more: int) -> None:
        plan = {"step": step, "total_steps": self.total, "seconds": round(seconds, 3), "step_seconds": self.step_s, "budget": self.budget}
        self.log.add(plan | more)


_BEFORE: dict[tuple[str, float], float] = {}
"""(run, started) -> what earlier attempts used: read once an attempt, for what is found later is this attempt's own record."""


class Clock:
    """Seconds of the budget used so far, over all attempts of a run: work lost to a kill counts, the time it lay dead does not.

    `seconds()` = what earlier attempts used + the time since `started` (a `time.monotonic()` reading of the caller's start).

    What earlier attempts used is the largest figure they left behind: the metrics' last line, a checkpoint's state (the caller passes
    it to `at_least`), or clock.json. Clocks of one attempt (the same run and `started`) agree, whenever they are made.
    """

    def __init__(self, run: RunFolder, started: float):
        self.file = run.state / "clock.json"
        self.started = started
        self._attempt = (str(run.path.resolve()), started)
        if self._attempt not in _BEFORE:
            lines = [line for file in (self.file, run.metrics_file) for line in read_lines(file)]
            _BEFORE[self._attempt] = max((float(line.get("seconds", 0.0)) for line in lines), default=0.0)

    def at_least(self, seconds: float) -> None:
        """Earlier attempts used at least this."""
        _BEFORE[self._attempt] = max(_BEFORE[self._attempt], seconds)

    def seconds(self) -> float:
        return _BEFORE[self._attempt] + time.monotonic() - self.started

    def record(self) -> None:
        """Write it down; also for callers whose work has no metrics (tokenising), now and then."""
        write_atomic(self.file, json.dumps({"seconds": self.seconds()}) + "\n")
