"""Predicts decoding speed when a model's experts do not all fit into memory, from the bytes a token reads from memory and disk."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass

import numpy as np

from sparing.base.config import ModelConfig
from sparing.base.layers import layers, mixtures
from sparing.infer.packed_weights import PackedWeights

PROBES = 24
"""Reads of one layer's experts that measure the disk."""
STEP = 1.1e-4
"""Seconds of a token that are neither reading nor products: the engine's own work around a step (LAB.md)."""
DISK_S = 2.0
"""Seconds after which no further read begins."""
SWEEP = 64 << 20
"""Bytes that measure the memory: more than the processor's caches hold."""


@dataclass(frozen=True)
class Forecast:
    """For one request alone, without drafts. Assumes even routing, the worst case: a text that uses few experts is faster."""

    tokens_per_s: float
    reads: float
    """Experts that a token reads from disk."""
    expert_bytes: int
    memory_rate: float
    disk_rate: float
    """Bytes per second, with an empty page cache."""


def forecast(c: ModelConfig, weights: PackedWeights, expert_limit: int, threads: int) -> Forecast:
    """expert_limit: bytes of experts that may stay in memory. Takes about a second, and drops the file from the page cache."""
    stacks = [weights.parts[f"{layer.index}.expert_gate_up"] for layer in mixtures(c) if not layer.mtp]
    size = max(part.stride for part in stacks)
    routed = sum(part.stride * part.count for part in stacks)
    inside = ("expert_gate_up", "expert_down", "embed")  # an expert's down projection lies in the stride of its gate
    drafts = tuple(f"{layer.index}." for layer in layers(c) if layer.mtp)
    always = sum(part.bytes for name, part in weights.parts.items() if not name.endswith(inside) and not name.startswith(drafts))
    chosen = len(stacks) * c.num_experts_per_tok
    reads = chosen * max(0.0, 1 - expert_limit // size * size / routed)
    memory_rate, disk_rate = _memory_rate() * threads, _disk_rate(weights, c, size)
    seconds = STEP + (always + chosen * size) / memory_rate + reads * size / disk_rate
    return Forecast(1 / seconds, reads, size, memory_rate, disk_rate)


def _memory_rate() -> float:
    """Bytes per second that one thread reads, the best of three."""
    numbers = np.ones(SWEEP // 8)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        numbers.sum()
        took.append(time.perf_counter() - start)
    return SWEEP / min(took)


def _disk_rate(weights: PackedWeights, c: ModelConfig, size: int) -> float:
    """Bytes per second of experts read as the compiled step does: one token and layer's prefetched together, then read in turn."""
    stacks = [part for name, part in weights.parts.items() if name.endswith("expert_gate_up")]
    draw, buffer, read, took = random.Random(0), bytearray(size), 0, 0.0
    drop_cached(weights)
    for _ in range(PROBES):
        stack = draw.choice(stacks)
        places = [stack.offset + e * stack.stride for e in draw.sample(range(stack.count), c.num_experts_per_tok)]
        start = time.perf_counter()
        for place in places:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(weights.file, place, size, os.POSIX_FADV_WILLNEED)
        for place in places:
            read += os.preadv(weights.file, [buffer], place)
        took += time.perf_counter() - start
        if took > DISK_S:
            break
    drop_cached(weights)
    return read / took


def drop_cached(weights: PackedWeights) -> None:
    """Drop the file from the page cache, except pages that a process has mapped; where the system cannot, do nothing."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(weights.file, 0, 0, os.POSIX_FADV_DONTNEED)
