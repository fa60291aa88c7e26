"""Work on tensors that belong to nobody else, divided among threads of one operation thread each.

Two threads inside each operation wait for each other at its end. On a machine that does other work too, that took ten times as long as the
operations themselves (LAB.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from sparing.kernels import native

T = TypeVar("T")


def count() -> int:
    """How many threads share the work: as many as PyTorch would use inside its operations; 1 with plain kernels, as on other devices."""
    return torch.get_num_threads() if native.compiled() else 1


@torch.no_grad()
def divided(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """The results of all jobs, in their order; no gradients are recorded."""
    if count() == 1:
        return [job() for job in jobs]
    kernels = native.chosen()

    @torch.no_grad()
    def alone(job: Callable[[], T]) -> T:
        with native.path(kernels):
            return job()

    return list(_pool(count()).map(alone, jobs))


def shares(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of tensors, in order, in as many shares as there are threads, of about as many numbers."""
    sizes, found = [0] * count(), [[] for _ in range(count())]
    for place in sorted(range(len(tensors)), key=lambda place: -tensors[place].numel()):
        least = sizes.index(min(sizes))
        sizes[least] += tensors[place].numel()
        found[least].append(place)
    return [sorted(share) for share in found if share]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "sparing-update", torch.set_num_threads, (1,))
