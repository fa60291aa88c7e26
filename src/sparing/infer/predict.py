"""How fast a model will answer whose experts do not fit into memory, before it does: what a token reads, and from where."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass

import numpy as np

from sparing.base.config import ModelConfig
from sparing.base.layers import layers, mixtures
from sparing.infer.pack import Pack

PROBES = 24
"""Token-layers whose experts are read from the disk to see how long that takes."""
STEP = 1.1e-4
"""Seconds of a token that go neither into reading nor into products: the engine's own work around a step (LAB.md)."""
DISK_S = 2.0
"""On a slow disk fewer are read: no more are begun after so many seconds."""
SWEEP = 64 << 20
"""Bytes read from memory for the same purpose: more than the caches hold."""


@dataclass(frozen=True)
class Forecast:
    """Of one text alone, without drafts. Routing is taken to be even, the worst case: a text that keeps to few experts is faster."""

    tokens_per_s: float
    reads: float
    """Experts read from the disk for a token."""
    expert_bytes: int
    memory_rate: float
    disk_rate: float
    """Bytes a second; the disk's with the page cache empty."""


def forecast(c: ModelConfig, pack: Pack, expert_limit: int, threads: int) -> Forecast:
    """expert_limit: bytes of experts that may stay in memory. Takes about a second; the file leaves the page cache."""
    stacks = [pack.parts[f"{layer.index}.expert_gate_up"] for layer in mixtures(c) if not layer.mtp]
    size = max(part.stride for part in stacks)
    routed = sum(part.stride * part.count for part in stacks)
    inside = ("expert_gate_up", "expert_down", "embed")  # an expert's down projection lies in the stride of its gate
    drafts = tuple(f"{layer.index}." for layer in layers(c) if layer.mtp)
    always = sum(part.bytes for name, part in pack.parts.items() if not name.endswith(inside) and not name.startswith(drafts))
    chosen = len(stacks) * c.num_experts_per_tok
    reads = chosen * max(0.0, 1 - expert_limit // size * size / routed)
    memory_rate, disk_rate = _memory_rate() * threads, _disk_rate(pack, c, size)
    seconds = STEP + (always + chosen * size) / memory_rate + reads * size / disk_rate
    return Forecast(1 / seconds, reads, size, memory_rate, disk_rate)


def _memory_rate() -> float:
    """Bytes that one thread reads a second, the best of three."""
    numbers = np.ones(SWEEP // 8)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        numbers.sum()
        took.append(time.perf_counter() - start)
    return SWEEP / min(took)


def _disk_rate(pack: Pack, c: ModelConfig, size: int) -> float:
    """Bytes a second of experts read as the step reads them: those of a token and layer announced together, then one after the other."""
    stacks = [part for name, part in pack.parts.items() if name.endswith("expert_gate_up")]
    draw, buffer, read, took = random.Random(0), bytearray(size), 0, 0.0
    forget(pack)
    for _ in range(PROBES):
        stack = draw.choice(stacks)
        places = [stack.offset + e * stack.stride for e in draw.sample(range(stack.count), c.num_experts_per_tok)]
        start = time.perf_counter()
        for place in places:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(pack.file, place, size, os.POSIX_FADV_WILLNEED)
        for place in places:
            read += os.preadv(pack.file, [buffer], place)
        took += time.perf_counter() - start
        if took > DISK_S:
            break
    forget(pack)
    return read / took


def forget(pack: Pack) -> None:
    """Take what of a packed file is in no process's mapping out of the page cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(pack.file, 0, 0, os.POSIX_FADV_DONTNEED)
