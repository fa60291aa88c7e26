"""Seconds of the budget used so far, over all attempts of a run: work lost to a kill counts, the time it lay dead does not."""

from __future__ import annotations

import json
import time

from sparing.base.files import read_lines, write_atomic
from sparing.base.run import RunFolder

_BEFORE: dict[tuple[str, float], float] = {}
"""(run, started) -> what earlier attempts used: read once an attempt, for what is found later is this attempt's own record."""


class Clock:
    """`seconds()` = what earlier attempts used + the time since `started` (a `time.monotonic()` reading of the caller's start).

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
