"""Choices that follow the live load: keep to what measures best, and now and then measure the others again.

For draft lengths this is the test-and-set control of Cascade (arXiv 2506.20675), with tokens per second as the utility, so acceptance and
the cost of verifying are both in it. Every option gives the same text; only the speed differs.
"""

from __future__ import annotations

from collections.abc import Sequence

BURST, ROUNDS = 8, 6
"""Steps for which an option is tried, and how often in turn with the others: the machine's moods last longer than a step."""
SELDOM, SELDOMEST = 1024, 16384
"""Steps between tries; doubled while the choice stays."""
BETTER = 1.03
"""How much faster another option must have been, over all rounds and in all but one of them: tries are short and their gains random."""


class Chooser:
    """One choice among `options`, which are in order: tries are of a neighbour of the present one, in turn. At first all are tried, and the
    first is preferred."""

    def __init__(self, options: Sequence[int]):
        self.options = list(options)
        self.best = self.options[0]
        self._steps, self._interval, self._side = 0, SELDOM, 1
        self._try(self.options)

    def _try(self, options: Sequence[int]) -> None:
        self._found = {o: [(0.0, 0.0)] * ROUNDS for o in options}  # gain and seconds of each round
        self._trials = [(o, n) for n in range(ROUNDS) for o in options for _ in range(BURST)] if len(options) > 1 else []

    def pick(self) -> int:
        """The option for the next step."""
        return self._trials[0][0] if self._trials else self.best

    def report(self, option: int, gain: float, seconds: float) -> None:
        """What a step with `option` brought, and how long it took."""
        self._steps += 1
        if self._trials:
            tried, n = self._trials[0]
            if tried != option:
                return
            self._trials.pop(0)
            self._found[option][n] = tuple(map(sum, zip(self._found[option][n], (gain, seconds), strict=True)))
            if not self._trials:
                each = {o: [gain / seconds for gain, seconds in rounds] for o, rounds in self._found.items()}
                over_all = {o: sum(gain for gain, _ in rounds) / sum(s for _, s in rounds) for o, rounds in self._found.items()}
                found = max(over_all, key=over_all.__getitem__)
                wins = sum(a > b for a, b in zip(each[found], each[self.best], strict=True))
                stays = wins < ROUNDS - 1 or over_all[found] < BETTER * over_all[self.best]
                self._interval = min(2 * self._interval, SELDOMEST) if stays else SELDOM
                self.best = self.best if stays else found
                self._steps = 0
        elif self._steps >= self._interval and len(self.options) > 1:
            self._side = -self._side
            at = self.options.index(self.best)
            near = at + self._side if 0 <= at + self._side < len(self.options) else at - self._side
            self._try([self.best, self.options[near]])


class Choosers:
    """A `Chooser` for each size of step: sizes that share a power of two share one."""

    def __init__(self, options: Sequence[int]):
        self.options = list(options)
        self._by_size: dict[int, Chooser] = {}

    def of(self, size: int) -> Chooser:
        key = size.bit_length()
        if key not in self._by_size:
            self._by_size[key] = Chooser(self.options)
        return self._by_size[key]
