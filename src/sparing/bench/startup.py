"""Figure 4: how long `sparing --help` takes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from sparing.bench.report import row


def startup(runs: int = 10) -> list[dict]:
    """Median seconds of `sparing --help`, the start of the interpreter included."""
    took = []
    for _ in range(runs):
        before = time.perf_counter()
        subprocess.run([sys.executable, "-m", "sparing", "--help"], check=True, stdout=subprocess.DEVNULL)
        took.append(time.perf_counter() - before)
    return [row("sparing --help", statistics.median(took), "s", 0.3, "allowed", runs=runs)]
