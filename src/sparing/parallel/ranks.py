"""The ranks that torchrun started, as the trainer sees them (`train.world.World`), through `torch.distributed`.

Rank 0 prepares a run alone, which may take long; the others wait for its word in torchrun's own store, where a wait can be left at any
time. From the first batch on all ranks call the same collectives in the same order.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparing.base.hardware import gpu_numbers
from sparing.base.rank import NEW_STORE, Rank, RankLost, elastic, machine, started_anew, this_rank

BUCKET_BYTES = 32 << 20
"""Tensors are added up in buckets of about this size: a call for each would take as long as its bytes."""
PATIENCE_S = 600.0
"""Until a rank that does not answer ends the others."""
POLL_S, LEAVING_S = 0.1, 5.0
GO, STOP = "go", "stop"


class Ranks:
    """All ranks of a torchrun."""

    def __init__(self, rank: Rank, store: dist.Store):
        """Meets the others; returns when all are there."""
        self.rank, self.size, self.store = rank.number, rank.size, store
        gpus = gpu_numbers()
        if gpus:
            torch.cuda.set_device(gpus[0])
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank.number, world_size=rank.size, timeout=timedelta(seconds=PATIENCE_S))
        self._gathered = 0

    # before and after training

    def release(self, word: str) -> None:
        """Tell the ranks that wait what to do: GO, the run is ready; STOP, there is none."""
        self.store.set("word", word)

    def wait(self, check: Callable[[], None]) -> bool:
        """Wait for rank 0's word; -> whether it was GO. check: called ten times a second; may raise."""
        try:
            while not self.store.check(["word"]):
                check()
                time.sleep(POLL_S)
            return self.store.get("word").decode() == GO
        except RuntimeError as error:
            raise RankLost(f"rank 0 is gone ({error})") from error

    def left(self) -> None:
        """Of rank 0: wait until the others have sent their last rows, but not for those that have died. Of another one: it has."""
        if self.rank:
            with suppress(RuntimeError):
                self.store.set(f"left/{self.rank}", "")
        else:
            until = time.monotonic() + LEAVING_S
            names = [f"left/{number}" for number in range(1, self.size)]
            while not self.store.check(names) and time.monotonic() < until:
                time.sleep(POLL_S)

    # the meters (`account.meter.Others`)

    def send_rows(self, rows: list[dict]) -> None:
        with suppress(RuntimeError):  # rank 0, which keeps the store, has died: so does this one
            self.store.set(f"rows/{self.rank}", json.dumps(rows))

    def rows_of_others(self) -> list[dict]:
        names = [f"rows/{number}" for number in range(1, self.size)]
        return [row for name in names if self.store.check([name]) for row in json.loads(self.store.get(name))]

    # while training

    def agree(self, values: Sequence[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        with answering():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def leaving(self, told: bool) -> None:
        if elastic():
            here, count = machine()
            leave = self.agree([float(told and number == here) for number in range(count)])
            if not leave[here]:
                raise RankLost("another machine was told to leave: the run is saved, and goes on with those that stay")

    def sum(self, tensors: Sequence[Tensor], group: Any = None) -> None:
        self._each(tensors, lambda flat: dist.all_reduce(flat, group=group))

    def reduce(self, tensors: Sequence[Tensor], rank: int, group: Any = None) -> None:
        self._each(tensors, lambda flat: dist.reduce(flat, rank, group=group), changes=rank == self.rank)

    def broadcast(self, tensors: Sequence[Tensor], rank: int, group: Any = None) -> None:
        self._each(tensors, lambda flat: dist.broadcast(flat, rank, group=group), changes=rank != self.rank)

    def gather(self, text: str) -> list[str]:
        """All ranks' texts, by rank, on rank 0; nothing on the others."""
        self._gathered += 1
        with answering():
            self.store.set(f"text/{self._gathered}/{self.rank}", text)
            names = [] if self.rank else [f"text/{self._gathered}/{rank}" for rank in range(self.size)]
            texts = [self.store.get(name).decode() for name in names]
            for name in names:
                self.store.delete_key(name)
            return texts

    def _each(self, tensors: Sequence[Tensor], call: Callable[[Tensor], object], changes: bool = True) -> None:
        """Call a collective on buckets of tensors. changes: whether it changes them here."""
        for bucket in _buckets(tensors):
            flat = bucket[0].reshape(-1) if len(bucket) == 1 else torch.cat([tensor.reshape(-1) for tensor in bucket])
            with answering():
                call(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                if changes and part.data_ptr() != tensor.data_ptr():
                    tensor.copy_(part.view_as(tensor))


@contextmanager
def answering() -> Iterator[None]:
    """Around collectives: raises RankLost where another rank is gone."""
    try:
        yield
    except RuntimeError as error:  # gloo's are no more than that; NCCL's are a kind of it
        what = re.sub(r"^\[\S+\] |\. This is typically.*", "", str(error).splitlines()[0])
        raise RankLost(f"another rank is gone, or did not answer ({what})") from error


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one type and device together, in their order, up to BUCKET_BYTES; larger ones alone."""
    full, open_ = [], defaultdict(list)
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        if open_[kind] and sum(one.nbytes for one in open_[kind]) + tensor.nbytes > BUCKET_BYTES:
            full.append(open_.pop(kind))
        open_[kind].append(tensor)
    return full + [bucket for bucket in open_.values() if bucket]


@cache
def ranks() -> Ranks | None:
    """The ranks of this process's torchrun, met once; None: it is alone."""
    rank = this_rank()
    if rank.size == 1:
        return None
    store, _, _ = next(iter(dist.rendezvous("env://")))
    # A store may outlive the ranks, and then knows dead ones. That of `launch` does not; a machine that comes later counts otherwise there.
    attempt = 0 if os.environ.get(NEW_STORE) == "1" else started_anew()
    return Ranks(rank, dist.PrefixStore(f"sparing/{attempt}", store))
