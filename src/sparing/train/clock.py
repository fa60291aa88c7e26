"""Seconds of the budget used so far, over all attempts of a run: work lost to a kill counts, the time it lay dead does not."""

from __future__ import annotations

import json
import time

from sparing.run import RunFolder, read_lines, write_atomic


class Clock:
    """`seconds()` = what earlier attempts used + the time since `started` (a `time.monotonic()` reading of the caller's start).

    What earlier attempts used is the largest figure they left behind: the metrics' last line, a checkpoint's state (the caller passes
    it to `at_least`), or clock.json.
    """

    def __init__(self, run: RunFolder, started: float):
        self.file = run.state / "clock.json"
        self.started = started
        lines = [line for file in (self.file, run.metrics_file) for line in read_lines(file)]
        self.before = max((float(line.get("seconds", 0.0)) for line in lines), default=0.0)

    def at_least(self, seconds: float) -> None:
        """Earlier attempts used at least this."""
        self.before = max(self.before, seconds)

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def record(self) -> None:
        """Write it down; also for callers whose work has no metrics (tokenising), now and then."""
        write_atomic(self.file, json.dumps({"seconds": self.seconds()}) + "\n")
