"""Measures how long `sparing --help` takes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from sparing.bench.limit import LIMIT, Limit, Rounds
from sparing.bench.results import row
from sparing.bench.worker import WorkerError


def startup(runs: int = 10, limit: str = LIMIT) -> list[dict]:
    """One row: median seconds of `sparing --help`, the interpreter's start included. limit: time of all runs together."""
    seconds, until = [], Limit.of(limit)
    rounds = Rounds(runs, until)
    for _ in rounds:
        before = time.perf_counter()
        try:
            command = [sys.executable, "-m", "sparing", "--help"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=max(0.0, until.left()))
        except subprocess.TimeoutExpired:
            raise WorkerError(f"not done within {until}") from None
        seconds.append(time.perf_counter() - before)
    return [row("sparing --help", statistics.median(seconds), "s", 0.3, "allowed", runs=rounds.made, **rounds.more())]
