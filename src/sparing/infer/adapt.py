"""Choices that follow the live load: keep to what measures best, and now and then measure the others again.

For draft lengths this is the test-and-set control of Cascade (arXiv 2506.20675), with tokens per second as the utility, so acceptance and
the cost of verifying are both in it. Every option gives the same text; only the speed differs.
"""

from __future__ import annotations

from collections.abc import Sequence

BURST = 16
"""Steps for which an option is tried."""
SELDOM, SELDOMEST = 1024, 16384
"""Steps between tries; doubled while the choice stays."""
MEMORY = 0.95
"""Weight of what was measured before, a step ago."""
BETTER = 1.05
"""How much faster another option must have been: tries are short and their gains random."""


class Chooser:
    """One choice among `options`, which are in order: tries go to the neighbours of the present one, in turn. At first it is the first."""

    def __init__(self, options: Sequence[int]):
        self.options = list(options)
        self.best = self.options[0]
        self._gain = dict.fromkeys(options, 0.0)
        self._time = dict.fromkeys(options, 0.0)
        self._steps, self._interval, self._side = 0, SELDOM, 1
        self._trials = [o for o in self.options for _ in range(BURST)] if len(self.options) > 1 else []

    def pick(self) -> int:
        """The option for the next step."""
        return self._trials[0] if self._trials else self.best

    def rate(self, option: int) -> float:
        """Gain per second, as last measured; 0: never."""
        return self._gain[option] / self._time[option] if self._time[option] else 0.0

    def report(self, option: int, gain: float, seconds: float) -> None:
        """What a step with `option` brought, and how long it took."""
        self._gain[option] = MEMORY * self._gain[option] + gain
        self._time[option] = MEMORY * self._time[option] + seconds
        self._steps += 1
        if self._trials:
            if self._trials[0] == option:
                self._trials.pop(0)
            if not self._trials:
                found = max(self.options, key=self.rate)
                stays = self.rate(found) < BETTER * self.rate(self.best)
                self._interval = min(2 * self._interval, SELDOMEST) if stays else SELDOM
                self.best = self.best if stays else found
                self._steps = 0
        elif self._steps >= self._interval and len(self.options) > 1:
            self._side = -self._side
            at = self.options.index(self.best)
            near = self.options[at + self._side] if 0 <= at + self._side < len(self.options) else self.options[at - self._side]
            self._gain[near] = self._time[near] = 0.0
            self._trials = [near] * BURST


class Choosers:
    """A `Chooser` for each size of step: sizes that share a power of two share one."""

    def __init__(self, options: Sequence[int]):
        self.options = list(options)
        self._by_size: dict[int, Chooser] = {}
        self.last = self.options[0]

    def of(self, size: int) -> Chooser:
        key = size.bit_length()
        if key not in self._by_size:
            self._by_size[key] = Chooser(self.options)
        return self._by_size[key]

    def pick(self, size: int) -> int:
        self.last = self.of(size).pick()
        return self.last
