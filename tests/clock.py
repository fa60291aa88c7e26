"""A clock that stands still until a test moves it, for whatever depends on how long things take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ManualClock:
    """Stands in for `time.monotonic`."""

    def __init__(self, now: float = 1000.0):
        self.now = now
        self._calls: list[list] = []

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass; calls that fall due on the way are made at their times."""
        end = self.now + seconds
        while due := min((call for call in self._calls if call[0] <= end), default=None, key=lambda call: call[0]):
            self.now = due[0]
            due[0] += due[1]
            due[2]()
        self.now = end

    @contextmanager
    def calling(self, function: Callable[[], None], every: float) -> Iterator[None]:
        """Meanwhile, call `function` now and again `every` so many seconds."""
        call = [self.now, every, function]
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.remove(call)
