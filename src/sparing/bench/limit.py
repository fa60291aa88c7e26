"""The time limit of a figure. Every wait for a worker ends with it; rounds that no longer fit are left out, and a line says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sparing.base.config import UserError
from sparing.base.messages import say
from sparing.budget.units import parse_budget

LIMIT = "30m"
"""Default of figures that train no whole run."""
RUN_SLACK, RUN_EXTRA_S = 1.25, 1200.0
"""A run with a budget of S seconds may take S * RUN_SLACK + RUN_EXTRA_S: the machine is busy, the run starts and is scored."""
RUN_S = 6 * 3600.0
"""Seconds that a run with a budget in tokens or operations may take."""
MARGIN = 1.5
"""A round starts if this many times the longest round so far would fit."""
Item, Result = TypeVar("Item"), TypeVar("Result")


class Limit:
    """A point in time until which workers may answer. A limit made `within` another ends with that one too."""

    def __init__(self, seconds: float, outer: Limit | None = None):
        self.seconds, self.outer = seconds, outer
        self.end = time.monotonic() + seconds

    @classmethod
    def of(cls, text: str) -> Limit:
        """The limit that a text such as `30m` gives. Raises UserError."""
        try:
            amount = parse_budget(str(text))
        except UserError:
            amount = None
        if amount is None or amount.unit != "s":
            raise UserError(f"--limit {text}: must be a time, such as 90s, 30m or 2h")
        return cls(amount.amount)

    @classmethod
    def of_runs(cls, text: str | None, budgets: Iterable[str]) -> Limit:
        """`text`, or without one the time that runs with these budgets may take one after another."""
        return cls.of(text) if text else cls(sum(map(run_seconds, budgets)))

    def within(self, seconds: float) -> Limit:
        return Limit(seconds, self)

    def __str__(self) -> str:
        return f"{self.seconds:,.0f} s (--limit)"

    def left(self) -> float:
        """Seconds that are left; negative when it is over."""
        here = self.end - time.monotonic()
        return min(here, self.outer.left()) if self.outer else here

    def over(self) -> None:
        """End the limit now, in all threads that wait for it."""
        self.end = 0.0


def run_seconds(budget: str) -> float:
    """Seconds that a training run with this budget may take, from the start of its process to its score."""
    amount = parse_budget(budget)
    return RUN_SLACK * amount.amount + RUN_EXTRA_S if amount.unit == "s" else RUN_S


class Rounds:
    """Iterates over 0, 1, 2, ... up to `wanted`, as long as the next round is expected to fit into the limit.

    made: how many rounds are complete. cut_short: why there are not more; a line says it at once.
    """

    def __init__(self, wanted: int, limit: Limit):
        self.wanted, self.limit = wanted, limit
        self.made = 0
        self.cut_short: str | None = None

    def __iter__(self) -> Iterator[int]:
        longest = 0.0
        for number in range(self.wanted):
            if number and MARGIN * longest > self.limit.left():
                self.cut_short = f"{number} of {self.wanted} rounds: the limit (--limit) has no room for another of {longest:.1f} s"
                say(f"cut short: {self.cut_short}")
                return
            before = time.monotonic()
            yield number
            longest = max(longest, time.monotonic() - before)
            self.made += 1

    def more(self) -> dict[str, str]:
        """The key `cut_short` of a row, where rounds were left out."""
        return {"cut_short": self.cut_short} if self.cut_short else {}


def in_parallel(jobs: int, limit: Limit, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`function` of every item, `jobs` at a time, started in order. If one fails, or the user interrupts, all workers with this limit are
    killed at once."""
    pool = ThreadPoolExecutor(max(1, jobs))
    try:
        return [future.result() for future in [pool.submit(function, item) for item in items]]
    except BaseException:
        limit.over()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
