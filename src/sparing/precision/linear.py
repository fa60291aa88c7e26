"""A linear's three products, each in 8 bits or in 16 as the policy says. A `kernels.operands.Weight` takes them instead of
`kernels.products`.

Embedding, head, router, norms, softmax and the MTP modules' joining projection never come here (arXiv 2412.19437 §3.3.1; the published
FP8 checkpoints leave out the same).
"""

from __future__ import annotations

import copy
import time
from typing import Literal

import torch
from torch import Tensor, nn

from sparing.kernels import float8, formats, int8
from sparing.kernels import products as sixteen
from sparing.kernels.experts import swiglu_reference
from sparing.precision import products as eight
from sparing.precision.compensation import rows_of, slices
from sparing.precision.products import SCHEMES, TILE, Kind

DIRECTIONS = ("forward", "dgrad", "wgrad")
Direction = Literal["forward", "dgrad", "wgrad"]
COARSE, FINE, SIXTEEN = range(3)
LEVELS = ("8 bit", "8 bit, finer blocks", "16 bit")


class EightBit:
    """`kernels.products`' functions for one weight, or for one layer's experts.

    levels: one of LEVELS a direction, changed between steps only. A copy (another thread's replica) shares them, has counters of its own,
    and does not measure.
    """

    def __init__(self, name: str, kind: Kind, size: float = 1.0, device: torch.device | str = "cpu"):
        """size: multiplications a token, for shares. device: where faults are counted."""
        self.name, self.kind, self.size = name, kind, size
        self.after_attention = name.endswith("o_proj")
        self.levels: dict[str, int] = dict.fromkeys(DIRECTIONS, COARSE)
        self.faults = {direction: torch.zeros(2, dtype=torch.int64, device=device) for direction in DIRECTIONS}
        self.copies = [self]
        self.errors: dict[tuple[str, int], list[float]] | None = None
        """While measuring: (direction, level) -> squared error and squared norm of the 16-bit product, summed."""

    def __deepcopy__(self, memo) -> EightBit:
        twin = copy.copy(self)
        twin.faults = {direction: torch.zeros_like(counts) for direction, counts in self.faults.items()}
        twin.errors = None
        self.copies.append(twin)
        return twin

    def take_faults(self, direction: str) -> tuple[int, int]:
        """(blocks with infinity or NaN, blocks all lost) since the last call, of all copies."""
        total = torch.stack([twin.faults[direction] for twin in self.copies]).sum(0)
        for twin in self.copies:
            twin.faults[direction].zero_()
        return tuple(total.tolist())

    def _run(self, direction: Direction, name: str, *arguments, **options):
        level = self.levels[direction]
        if self.errors is not None:
            self._measure(direction, name, level, arguments, options.get("dtype"))
        if level == SIXTEEN:
            return getattr(sixteen, name)(*arguments, **options)
        return self._eight(direction, name, level, self.faults[direction], arguments, options)

    def _eight(self, direction: Direction, name: str, level: int, found: Tensor, arguments: tuple, options: dict) -> Tensor:
        blocks, own = SCHEMES[self.kind][level], {}
        if name.endswith("tn") and self.kind == "fp8":
            own = {"kept_e5m6": self.after_attention}
        if not name.startswith("grouped"):
            return getattr(eight, name)(self.kind, blocks, found, *arguments, **options, **own)
        a, b, ends = arguments
        if self.kind == "int8" and int8.usable(a):
            return getattr(int8, name)(a, b, ends, blocks.inner, found, **options)
        if self.kind != "int8" and blocks.inner == TILE and float8.usable(a, b):
            return getattr(float8, name)(a, b, ends, found)
        one = getattr(eight, name.removeprefix("grouped_"))
        if name == "grouped_tn":
            out = a.new_zeros(len(ends), a.shape[1], b.shape[1], dtype=options.get("dtype", torch.float32))
            for e, rows in sixteen.spans(ends):
                out[e] = one(self.kind, blocks, found, a[rows], b[rows])
            return out
        out = a.new_empty(len(a), b.shape[1 if name == "grouped_nt" else 2])
        for e, rows in sixteen.spans(ends):
            out[rows] = one(self.kind, blocks, found, a[rows], b[e])
        return out

    def _measure(self, direction: Direction, name: str, level: int, arguments: tuple, dtype: torch.dtype | None) -> None:
        """The error of the level in use and of the one below, against 16 bits. Faults of a trial count for nobody. dtype: of a gradient."""
        options = {"dtype": dtype} if dtype else {}
        exact = rows_of(getattr(sixteen, name)(*arguments, **options))
        for trial in {level, max(level - 1, COARSE)} - {SIXTEEN}:
            mine = rows_of(self._eight(direction, name, trial, torch.zeros_like(self.faults[direction]), arguments, options))
            sums = self.errors.setdefault((direction, trial), [0.0, 0.0])
            # A few rows at a time: whole differences would be the peak of a run's memory.
            found = [torch.stack((_square(mine[rows].float() - exact[rows]), _square(exact[rows]))) for rows in slices(*exact.shape)]
            for i, total in enumerate(torch.stack(found).sum(0).tolist()):
                sums[i] += total

    def nt(self, a: Tensor, b: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        return self._run("forward", "nt", a, b, out=out, base=base)

    def nn(self, a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
        return self._run("dgrad", "nn", a, b, base=base)

    def tn(self, a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._run("wgrad", "tn", a, b, dtype=dtype)

    def grouped_nt(self, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        return self._run("forward", "grouped_nt", a, b, ends)

    def swiglu_grouped_nt(self, h: Tensor, gates: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        """swiglu(h) * gates (S, 1) by each group's b: in one go where a kernel does that, and nothing is being measured."""
        if self.kind == "fp8" and self.levels["forward"] == COARSE and self.errors is None and float8.usable(h, b):
            return float8.swiglu_grouped_nt(h, gates.squeeze(-1), b, ends, self.faults["forward"])
        return self.grouped_nt(swiglu_reference(h).mul_(gates), b, ends)

    def grouped_nn(self, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        return self._run("dgrad", "grouped_nn", a, b, ends)

    def grouped_tn(self, a: Tensor, b: Tensor, ends: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._run("wgrad", "grouped_tn", a, b, ends, dtype=dtype)


def _square(x: Tensor) -> Tensor:
    return x.float().square().sum(dtype=torch.float64)


def install(model: nn.Module, kind: Kind | None) -> list[EightBit]:
    """Give the decoder's linears and experts their `EightBit` (None: take it away); -> them, in the model's order. Weights frozen in few
    bits have none, nor have low-rank factors."""
    sites = []
    for name, module in model.named_modules():
        if not hasattr(module, "eight_bit") or name.endswith(("lm_head", "eh_proj")):
            continue
        parts = {f"{name}.{part}": weight for part, weight in module.named_parameters(recurse=False)}
        mine: list = [None]
        if kind and parts:
            mine = [EightBit(part.removesuffix(".weight"), kind, module.active * w.numel(), w.device) for part, w in parts.items()]
        module.eight_bit = tuple(mine) if len(mine) > 1 else mine[0]
        sites += mine
    return [site for site in sites if site]


def fastest_kind(device: str) -> Kind | None:
    """The 8-bit format that this machine multiplies faster than 16 bits, if any: FP8 from compute capability 9.0 on, with a scale a row at
    8.9, int8 from 8.0 on and with AVX512_VNNI."""
    if device == "cpu":
        return "int8" if int8.built() else None
    capability = torch.cuda.get_device_capability()
    return "fp8" if capability >= (9, 0) else "fp8_row" if capability >= (8, 9) else "int8" if capability >= (8, 0) else None


def speed_note(kind: Kind, device: str) -> str:
    """What to expect of 8-bit products here, in words."""
    if kind == fastest_kind(device):
        return f"{kind} products run on this machine's own 8-bit arithmetic"
    times = f", {slowness(kind):.1f} times slower than {formats.training_dtype()} (measured)" if device == "cpu" else ""
    return f"{kind} products run in their plain form here: the same numbers{times}"


def slowness(kind: Kind) -> float:
    """How many times longer than in training's own format a small product takes in `kind` on this processor: milliseconds of measuring."""
    a, b = torch.randn(2, 256, 256).to(getattr(torch, formats.training_dtype()))
    faults = torch.zeros(2, dtype=torch.int64)

    def least(product) -> float:
        took = []
        for _ in range(4):
            before = time.perf_counter()
            product()
            took.append(time.perf_counter() - before)
        return min(took)

    return least(lambda: eight.nt(kind, SCHEMES[kind][0], faults, a, b)) / least(lambda: sixteen.nt(a, b))
