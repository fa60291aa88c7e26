"""How long a figure may take: every wait for a side ends with its limit, and rounds that no longer fit are left out and said to be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sparing.base.config import UserError
from sparing.bench.report import say
from sparing.budget.units import parse_budget

LIMIT = "30m"
"""Of a figure that trains no run of its own."""
RUN_SLACK, RUN_EXTRA_S = 1.25, 1200.0
"""What a run with a budget in time may take besides it: a busy machine, starting, being scored."""
RUN_S = 6 * 3600.0
"""What a run with a budget in tokens or operations may take."""
MARGIN = 1.5
"""A round is begun if this many of the longest so far would fit."""
Item, Result = TypeVar("Item"), TypeVar("Result")


class Limit:
    """Until when workers may answer. One that was made `within` another ends with it too."""

    def __init__(self, seconds: float, outer: Limit | None = None):
        self.seconds, self.outer = seconds, outer
        self.end = time.monotonic() + seconds

    @classmethod
    def of(cls, text: str) -> Limit:
        """`30m`. Raises UserError."""
        try:
            amount = parse_budget(str(text))
        except UserError:
            amount = None
        if amount is None or amount.unit != "s":
            raise UserError(f"--limit {text}: must be a time, such as 90s, 30m or 2h")
        return cls(amount.amount)

    @classmethod
    def of_runs(cls, text: str | None, budgets: Iterable[str]) -> Limit:
        """`text`, or what runs with these budgets may take one after another."""
        return cls.of(text) if text else cls(sum(map(run_seconds, budgets)))

    def within(self, seconds: float) -> Limit:
        return Limit(seconds, self)

    def __str__(self) -> str:
        return f"{self.seconds:,.0f} s (--limit)"

    def left(self) -> float:
        """Seconds; negative when it is over."""
        here = self.end - time.monotonic()
        return min(here, self.outer.left()) if self.outer else here

    def over(self) -> None:
        """End it now, for whoever waits in another thread too."""
        self.end = 0.0


def run_seconds(budget: str) -> float:
    """What a training run with this budget may take, from the start of its process to its score."""
    amount = parse_budget(budget)
    return RUN_SLACK * amount.amount + RUN_EXTRA_S if amount.unit == "s" else RUN_S


class Rounds:
    """0, 1, 2, ... up to `wanted`, as long as the next round is expected to fit into the limit.

    made: rounds that are complete. cut_short: why there are not more, which is also said at once.
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

    def said(self) -> dict[str, str]:
        """`cut_short`, for a row."""
        return {"cut_short": self.cut_short} if self.cut_short else {}


def in_parallel(jobs: int, limit: Limit, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`function` of every item, `jobs` at a time, begun in their order. If one fails, or the user interrupts, all workers with this limit
    are ended at once."""
    pool = ThreadPoolExecutor(max(1, jobs))
    try:
        return [future.result() for future in [pool.submit(function, item) for item in items]]
    except BaseException:
        limit.over()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
