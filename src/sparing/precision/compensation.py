"""Lets bfloat16 weights learn from updates smaller than half of their last bit. Rounding to nearest would lose such updates.

- `stochastic` rounds up or down at random, such that the expected weight is the exact one (Gupta et al., arXiv 1502.02551). The weight's
  error is a random walk.
- `kahan` keeps what rounding cuts off and adds it to the next update (Zamirai et al., arXiv 2010.06192). It keeps the next 8 bits, not a
  second bfloat16 number, with which a weight would need the memory of float32 again. The random walk has steps of 1/256 of the last bit.

The random bits are a function of (seed, step, name, position), so a repeated step repeats its rounding.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

SLICE = 1 << 16
"""How many numbers an update holds in float32 at a time: they fit into the cache, and no whole float32 copy is made."""
MASK = 0xFFFFFFFF


def rows_of(tensor: Tensor) -> Tensor:
    """A (rows, last dimension) view of a tensor; a vector is one row."""
    return tensor.detach().view(-1, tensor.shape[-1])


def slices(rows: int, columns: int) -> list[slice]:
    """Cut `rows` into consecutive slices of about SLICE numbers each."""
    height = max(1, SLICE // columns)
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def key_of(seed: int, step: int, name: str) -> int:
    """The 32-bit key of the random numbers for this tensor in this step."""
    return int.from_bytes(blake2b(f"{seed} {step} {name}".encode(), digest_size=4).digest(), "little")


def random_bits(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,) int32 in [0, 65536), random numbers of the positions start, start + 1, ...

    They are a Weyl sequence mixed by Wellons' `lowbias32` (nullprogram.com/blog/2018/07/31). storage.c has the same function."""
    x = torch.arange(start, start + count, dtype=torch.int64, device=device).mul_(0x9E3779B9).add_(key).bitwise_and_(MASK)
    x ^= x >> 16
    x.mul_(0x7FEB352D).bitwise_and_(MASK)
    x ^= x >> 15
    x.mul_(0x846CA68B).bitwise_and_(MASK)
    return (x >> 16).to(torch.int32)  # the mixer's last line changes the lower half only


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> one of the two neighbours in bfloat16, chosen such that the expected value is exact. bits: random numbers in [0, 65536) of
    x's shape. Infinities and NaNs stay."""
    raised = x.view(torch.int32) + bits
    return raised.bitwise_and_(-65536).view(torch.float32).where(x.isfinite(), x).to(torch.bfloat16)


def split(x: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> (the nearest bfloat16, the 8 bits below it as uint8). Rounding to these 24 bits is stochastic. bits: as of
    `round_stochastically`. Infinities and NaNs stay in the bfloat16."""
    whole = x.view(torch.int32)
    rounded = (whole + (bits >> 8)).bitwise_and_(-256).where(x.isfinite(), whole)
    return (rounded + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16), (rounded >> 8).bitwise_and_(255).to(torch.uint8)


def join(near: Tensor, remainder: Tensor) -> Tensor:
    """The float32 number that `split` took apart, to 24 bits."""
    low = remainder.int()
    return (near.view(torch.int16).int() - (low >> 7) << 16).bitwise_or_(low << 8).view(torch.float32)


class Master:
    """A parameter's master weights. Optimizers read and write them in float32, a few rows at a time."""

    def __init__(self, name: str, parameter: Tensor, compensation: str):
        self.name, self.weight = name, rows_of(parameter)
        rounded = parameter.dtype == torch.bfloat16
        self.remainder = torch.zeros_like(self.weight, dtype=torch.uint8) if rounded and compensation == "kahan" else None

    def read(self, rows: slice) -> Tensor:
        """(rows, columns) float32; a view of the parameter if it is float32."""
        return self.weight[rows].float() if self.remainder is None else join(self.weight[rows], self.remainder[rows])

    def write(self, rows: slice, value: Tensor, seed: int, step: int) -> None:
        """Store float32 `value`. seed and step choose the random bits of rounding."""
        if self.weight.dtype == torch.float32:
            self.weight[rows] = value
            return
        bits = random_bits(key_of(seed, step, self.name), rows.start * value.shape[1], value.numel(), value.device).view_as(value)
        if self.remainder is None:
            self.weight[rows] = round_stochastically(value, bits)
        else:
            self.weight[rows], self.remainder[rows] = split(value.contiguous(), bits)

    def address(self, seed: int, step: int) -> tuple:
        """Arguments of storage.c's updates: weights, 1 if they are float32, remainder or None, key of the random bits."""
        return self.weight, int(self.weight.dtype == torch.float32), self.remainder, key_of(seed, step, self.name)

    def state(self) -> dict[str, Tensor]:
        """Its tensors for a checkpoint, besides the weights."""
        return {} if self.remainder is None else {"remainder": self.remainder}
