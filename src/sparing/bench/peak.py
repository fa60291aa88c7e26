"""This machine's peak: the number that MFU is a fraction of."""

from __future__ import annotations

import time

import torch


def measure_peak(sizes: tuple[int, ...] = (1024, 1536, 2048, 3072, 4096), device: str = "cpu", seconds: float = 0.25) -> float:
    """FLOP/s of the best square bfloat16 product over `sizes`, on the threads that torch has now, each size tried for about `seconds`."""
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)
        spent, runs = 0.0, 0
        while spent < seconds or runs < 2:
            _wait(device)
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            _wait(device)
            elapsed = time.perf_counter() - start
            best = max(best, 2 * size**3 / elapsed)
            spent, runs = spent + elapsed, runs + 1
    return best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
