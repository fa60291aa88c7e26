"""Counts what a rank hands to the collectives of `torch.distributed`, of real ranks or of one that is alone on the meta device.

`Counter` counts. `Imagined` is one rank of a fake world of any size (`torch.testing._internal.distributed.fake_pg`), whose model is on the
meta device: the project's own code runs there step by step, without numbers and without memory. What code must know of numbers is answered
so: choices of experts are real, drawn at random; other ranks send as many tokens as they get; any other number is 1.
"""

from __future__ import annotations

import gc
import inspect
import weakref
from collections import Counter as Sums
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, wraps
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparing.base.config import Config, ModelConfig
from sparing.data.loader import Batch
from sparing.model.experts import Router
from sparing.model.transformer import Transformer
from sparing.parallel.ranks import Ranks
from sparing.train.objective import NextToken
from sparing.train.trainer import Trainer

NODE = 8
"""Ranks of a node: neighbours in number."""
KINDS = {
    "all_reduce": ("all_reduce", "tensor"),
    "reduce": ("reduce", "tensor"),
    "broadcast": ("broadcast", "tensor"),
    "gather": ("gather", "tensor"),
    "scatter": ("scatter", "tensor"),
    "all_to_all_single": ("all_to_all", "input"),
    "all_gather_into_tensor": ("all_gather", "output_tensor"),
    "all_gather_single": ("all_gather", "output_tensor"),
    "reduce_scatter_tensor": ("reduce_scatter", "input"),
    "reduce_scatter_single": ("reduce_scatter", "input"),
    "isend": ("send", "tensor"),
}
"""Functions of torch.distributed that are counted: as what, and which argument's bytes."""


@dataclass(frozen=True)
class Kind:
    """What is counted together."""

    name: str
    ranks: int
    """Of the process group."""
    apart: int
    """From one of its ranks to the next."""

    def __str__(self) -> str:
        return f"{self.name} among {self.ranks} ranks" + (f", every {self.apart}th" if self.apart > 1 else "")


class Counter:
    """Calls and bytes by kind, on this rank. Bytes are of the whole tensor that a collective is about: what is added up, broadcast, put
    together or cut into pieces; of an all-to-all, the rows that this rank sends, those to itself included."""

    def __init__(self):
        self.calls: Sums[Kind] = Sums()
        self.bytes: Sums[Kind] = Sums()
        self.far: Sums[Kind] = Sums()
        """Of an all-to-all: bytes to other nodes."""
        self.near: Sums[Kind] = Sums()
        """... and to other ranks of this node."""
        self._inside = False

    def by_name(self) -> dict[str, int]:
        """Bytes by kind of collective."""
        found: Sums[str] = Sums()
        for kind, count in self.bytes.items():
            found[kind.name] += count
        return dict(found)

    def count(self, name: str, given: dict) -> None:
        """given: the arguments by name."""
        members = dist.get_process_group_ranks(given["group"] or dist.group.WORLD)
        (name, argument), n = KINDS[name], len(members)
        kind, tensor = Kind(name, n, members[1] - members[0] if n > 1 else 1), given[argument]
        if name == "send" and tensor.numel() == 1:  # ranks of a pipeline find each other so, once in a run
            return
        self.calls[kind] += 1
        self.bytes[kind] += tensor.nbytes * (n if name in ("gather", "scatter") else 1)
        if name == "all_to_all":
            here, row = dist.get_rank(), tensor.nbytes // max(1, len(tensor))
            sizes = given["input_split_sizes"] or [len(tensor) // n] * n
            for rank, rows in zip(members, sizes, strict=True):
                if rank != here:
                    (self.near if rank // NODE == here // NODE else self.far)[kind] += rows * row

    @contextmanager
    def counting(self, imagined: bool = False) -> Iterator[Counter]:
        """Count the calls inside. imagined: nothing is really called; what other ranks would send is as this rank's own."""

        def counted(name: str, function):
            signature = inspect.signature(function)

            @wraps(function)
            def call(*args, **kwargs):
                if self._inside:
                    return function(*args, **kwargs)
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                given = bound.arguments
                self.count(name, given)
                if imagined and name != "isend":  # whose work is waited for
                    if name == "all_to_all_single" and not given["output"].is_meta:
                        given["output"].copy_(given["input"])
                    return None
                self._inside = True
                try:
                    return function(*args, **kwargs)
                finally:
                    self._inside = False

            return call

        with ExitStack() as stack:
            for name in KINDS:
                if hasattr(dist, name):
                    function = counted(name, getattr(dist, name))
                    for module in (dist, dist.distributed_c10d):  # each asks whether an operation is its own `isend`
                        stack.enter_context(mock.patch.object(module, name, function))
            yield self


PIECES = {"split", "split_with_sizes", "chunk", "unbind"}
"""Operations whose results are views of one storage."""


class Unreal(TorchDispatchMode):
    """Lets code that reads numbers run on the meta device, and counts the bytes of the tensors that are there."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat = [x for x in _flat((args, kwargs)) if isinstance(x, Tensor)]
        name = function.overloadpacket.__name__
        if any(x.is_meta for x in flat):
            if name == "_local_scalar_dense":
                return torch.ones((), dtype=flat[0].dtype, device="cpu").item()
            if name in ("_to_copy", "copy_") and torch.device(kwargs.get("device") or flat[0].device).type == "cpu":
                return torch.ones(flat[0].shape, dtype=kwargs.get("dtype") or flat[0].dtype) if name == "_to_copy" else flat[0].fill_(1)
            if name == "_unique2":  # the most that there can be
                words = flat[0].flatten()
                return words, torch.empty_like(flat[0]), torch.empty_like(words)
            args, kwargs = _moved(args), _moved(kwargs)
        made = function(*args, **kwargs)
        for tensor in _flat(made[:1] if name in PIECES else made):
            if type(tensor) in (Tensor, nn.Parameter) and tensor.is_meta:  # of a DTensor, only what is here
                self._there(tensor.untyped_storage())
        return made

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """Around everything: FSDP2 gives memory back by making storages empty."""
        real = torch.UntypedStorage.resize_

        def resize(storage, size: int):
            if storage._cdata in self._sizes:
                self._change(storage._cdata, size)
            return real(storage, size)

        with mock.patch.object(torch.UntypedStorage, "resize_", resize):
            yield

    def _there(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = 0
            weakref.finalize(storage, self._gone, storage._cdata)
        self._change(storage._cdata, storage.nbytes())

    def _change(self, key: int, size: int) -> None:
        self.bytes += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.bytes)

    def _gone(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)


def _flat(tree) -> Iterator:
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        yield tree
        return
    for part in tree:
        yield from _flat(part)


def _moved(tree):
    """The same with all tensors on the meta device."""
    if isinstance(tree, Tensor):
        return tree if tree.is_meta or not tree.ndim else torch.empty_like(tree, device="meta")
    if isinstance(tree, list | tuple):
        return type(tree)(_moved(part) for part in tree)
    return {key: _moved(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


class FakeRanks(Ranks):
    """One rank of a world in which nobody else is."""

    def __init__(self, rank: int, size: int):
        from torch.testing._internal.distributed.fake_pg import FakeStore

        self.rank, self.size = rank, size
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)


@contextmanager
def _unreal_torch() -> Iterator[None]:
    """Lets FSDP2 run on the meta device, which it takes for a place where weights only wait; and sends one by one, as no backend of that
    device says how several go together."""
    from torch.distributed import device_mesh
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fully_shard

    real = device_mesh.init_device_mesh
    with ExitStack() as stack:
        for where, name, new in (
            (device_mesh, "init_device_mesh", lambda _, shape, **more: real("cpu", shape, **more)),
            (_fully_shard, "_get_device_from_mesh", lambda mesh: torch.device("meta")),
            (_fsdp_param_group.FSDPParamGroup, "_validate_no_meta_params", lambda group: None),
            (dist, "batch_isend_irecv", lambda every: [one.op(one.tensor, one.peer, one.group, one.tag) for one in every]),
        ):
            stack.enter_context(mock.patch.object(where, name, new))
        stack.enter_context(mock.patch.object(torch, "meta", torch.cpu, create=True))  # of streams and events: there are none
        yield


@contextmanager
def _drawn(c: ModelConfig) -> Iterator[None]:
    """Experts are chosen by real routers from random scores."""
    router, select = Router(replace(c, hidden_size=1)), Router.select

    @cache
    def choices(tokens: int) -> Tensor:
        return select(router, torch.rand(tokens, c.n_routed_experts, generator=torch.Generator().manual_seed(tokens)))

    with mock.patch.object(Router, "select", lambda _, scores_NE: choices(len(scores_NE))):
        yield


@dataclass
class Step:
    """What one step of one rank was."""

    counter: Counter
    weights: int
    """Bytes of weights and buffers, after they were divided; where weights are, with the masters of what this rank owns."""
    moments: int
    """Bytes of this rank's averages."""
    peak: int
    """The most bytes that were there, averages included."""


def step(config: Config, rank: int, size: int) -> Step:
    """A step of a rank, as the trainer makes it, on the meta device."""
    t, c = config.train, config.model
    unreal = Unreal()
    with _unreal_torch(), _drawn(c), unreal.resizing(), Counter().counting(imagined=True) as counter:
        world = FakeRanks(rank, size)
        try:
            with unreal:
                with torch.device("meta"):
                    model = Transformer(c)
                trainer = Trainer(model, None, NextToken.of(config), world, config=config)
                gc.collect()  # as `Trainer.fit` does
                early = _moments(trainer)
                weights, unreal.peak = unreal.bytes - early, unreal.bytes
                part, parts, _ = trainer.rows
                rows = t.batch_size * (part + 1) // parts - t.batch_size * part // parts
                tokens = torch.empty(rows, t.seq_len, dtype=torch.long, device="meta")
                targets = torch.empty(*tokens.shape, 1 + c.mtp_depth, dtype=torch.long, device="meta")
                trainer.gradients(Batch(tokens, targets))
                passes, unreal.peak = unreal.peak, unreal.bytes
                trainer.update(1.0, 1.0, 0.9)
            moments = _moments(trainer)
        finally:
            dist.destroy_process_group()
    return Step(counter, weights, moments, max(unreal.peak, passes + moments - early))


def _moments(trainer: Trainer) -> int:
    return sum(tensor.nbytes for tensor in trainer.optimizer.state().values())
