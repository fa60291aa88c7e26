"""The machine's peak, which MFU is quoted against: the best square matrix product in the format that training multiplies in.

Sizes grow from small ones. The next one is tried only if it fits into the limit in seconds, by the speed of those before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparing.base.hardware import Machine, home, load_calibration, save_calibration

PEAK_SIZES = (256, 512, 1024, 2048, 4096)
PEAK_S = 3.0
"""For measuring the peak, where no budget says less."""
PEAK_SHARE = 0.01
"""Of a time budget, for measuring the peak."""
LOOK_AGAIN_S = 60.0
"""A look at a known peak is not repeated within this time."""


@dataclass(frozen=True)
class Peak:
    """The best square matrix product that was measured."""

    flops: float
    """Per second."""
    size: int
    """Of the largest product that was tried."""
    next_s: float | None = None
    """Seconds that the next size would have taken, where measuring stopped before it because of its limit."""

    def cut_short(self) -> str | None:
        """What to tell the user where the limit left sizes untried."""
        more = f"larger ones would have taken {self.next_s:.1f} s more" if self.next_s else ""
        return f"the peak was measured with products up to {self.size} x {self.size} only: {more}" if more else None


def measure_peak(
    device: str = "cpu", dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = PEAK_SIZES, repeats: int = 3, seconds: float = PEAK_S
) -> Peak:
    """FLOP/s of the best square product in `dtype` on this process's threads, within about `seconds`. sizes: tried in their order, the next
    one only if it will fit by the speed of those before."""
    best, size, start = 0.0, 0, time.perf_counter()
    for following in sizes:
        needs = (repeats + 1) * 2.0 * following**3 / best if best else 0.0
        if best and time.perf_counter() - start + needs > seconds:
            return Peak(best, size, needs)
        size = following
        a, b = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
        for turn in range(repeats + 1):
            wait(device)
            before = time.perf_counter()
            a @ b
            wait(device)
            took = time.perf_counter() - before
            if turn or took > seconds:  # the first one also makes the kernel
                best = max(best, 2.0 * size**3 / took)
            if time.perf_counter() - start > seconds and best:
                break
    return Peak(best, size)


def peak_seconds(budget_s: float | None) -> float:
    """What measuring the peak may take of a budget; None: of a verb without one in time."""
    return PEAK_S if budget_s is None else min(PEAK_S, max(0.2, PEAK_SHARE * budget_s))


_looked: dict[tuple[str, str], float] = {}
"""(machine, key) -> `time.monotonic()` of this process's last look."""


def peak_flops(
    machine: Machine,
    device: str = "cpu",
    dtype: str | None = None,
    seconds: float = PEAK_S,
    cut_short: Callable[[str], None] = lambda _: None,
) -> float:
    """`measure_peak` in `dtype` (default: what training multiplies in on this machine), remembered per machine. The larger of what was
    measured before and what a quick look shows now: a machine that was busy the first time must not set the yardstick low for good.
    cut_short: told where the limit of `seconds` left sizes untried."""
    dtype = dtype or machine.training_dtype(device)
    key = f"peak_flops_{device}_{dtype}"
    known = load_calibration(machine).get(key, 0.0)
    looked = (str(home()), key)
    if known and time.monotonic() - _looked.get(looked, -math.inf) < LOOK_AGAIN_S:
        return known
    sizes = PEAK_SIZES if not known else tuple(size for size in (512, 1024, 2048) if 3 * 2.0 * size**3 / known < seconds)[-1:]
    found = measure_peak(device, getattr(torch, dtype), sizes, repeats=2, seconds=seconds) if sizes else Peak(known, 0)
    if not known and (message := found.cut_short()):
        cut_short(message)
    if found.flops > known:
        save_calibration(machine, {key: found.flops})
    _looked[looked] = time.monotonic()
    return max(found.flops, known)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
