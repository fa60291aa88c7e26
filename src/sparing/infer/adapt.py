"""Choices that follow the live load: keep to what measures best, and now and then measure the others again.

For draft lengths this is the test-and-set control of Cascade (arXiv 2506.20675), with tokens per second as the utility, so acceptance and
the cost of verifying are both in it. Every option gives the same text; only the speed differs.
"""

from __future__ import annotations

from collections.abc import Sequence

BURST = 8
"""Steps for which an option is tried."""
SELDOM, SELDOMEST = 256, 4096
"""Steps between tries; doubled while the choice stays."""
MEMORY = 0.9
"""Weight of what was measured before, a step ago."""


class Chooser:
    """One choice among `options`, the first of which is preferred until the others have been measured."""

    def __init__(self, options: Sequence[int]):
        self.options = list(options)
        self.best = self.options[0]
        self._gain = dict.fromkeys(options, 0.0)
        self._time = dict.fromkeys(options, 0.0)
        self._steps, self._interval = 0, SELDOM
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
                before, self.best = self.best, max(self.options, key=self.rate)
                self._interval = min(2 * self._interval, SELDOMEST) if before == self.best else SELDOM
                self._steps = 0
        elif self._steps >= self._interval and len(self.options) > 1:
            # Two at most, the likeliest: each trial of a bad option costs.
            others = sorted((o for o in self.options if o != self.best), key=self.rate, reverse=True)[:2]
            for option in others:
                self._gain[option] = self._time[option] = 0.0
            self._trials = [o for o in others for _ in range(BURST)]


class Choosers:
    """A `Chooser` for each size of step: sizes that share a power of two share one."""

    def __init__(self, options: Sequence[int]):
        self.options = list(options)
        self._by_size: dict[int, Chooser] = {}
        self.last = self.options[0]

    def of(self, size: int) -> Chooser:
        return self._by_size.setdefault(size.bit_length(), Chooser(self.options))

    def pick(self, size: int) -> int:
        self.last = self.of(size).pick()
        return self.last
