"""Weights in bfloat16 that still learn from updates smaller than half of their last bit.

Rounded to nearest, such updates are lost for good. `stochastic` rounds up or down with the probability that makes the expected weight the
exact one (Gupta et al., arXiv 1502.02551); its errors are a random walk of the weight. `kahan` keeps what rounding cut off and adds it to
the next update (Zamirai et al., arXiv 2010.06192): not in a second bfloat16 number, with which a weight would take the memory of a float32
one again, but the next 8 bits of it, so that the walk is in steps of 1/256 of the last bit. The random bits are a function of (seed, step,
name, position): whoever repeats a step repeats its rounding.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

SLICE = 1 << 16
"""Numbers that an update works on at a time in float32: they stay in cache, and no whole copy exists."""
MASK = 0xFFFFFFFF


def rows_of(tensor: Tensor) -> Tensor:
    """(rows, last dimension) view; a vector is one row."""
    return tensor.detach().view(-1, tensor.shape[-1])


def slices(rows: int, columns: int) -> list[slice]:
    """Consecutive rows, about SLICE numbers each."""
    height = max(1, SLICE // columns)
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def key_of(seed: int, step: int, name: str) -> int:
    """32 bits that belong to this tensor in this step."""
    return int.from_bytes(blake2b(f"{seed} {step} {name}".encode(), digest_size=4).digest(), "little")


def random_bits(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,) int32 in [0, 65536) for positions start, start + 1, ...: Wellons' 32-bit mixer `lowbias32` (nullprogram.com/blog/2018/07/31)
    of a Weyl sequence. storage.c has the same function."""
    x = torch.arange(start, start + count, dtype=torch.int64, device=device).mul_(0x9E3779B9).add_(key).bitwise_and_(MASK)
    x ^= x >> 16
    x.mul_(0x7FEB352D).bitwise_and_(MASK)
    x ^= x >> 15
    x.mul_(0x846CA68B).bitwise_and_(MASK)
    return (x >> 16).to(torch.int32)  # the mixer's last line only touches the lower half


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bfloat16: one of the two neighbours, the upper with the probability that makes the mean exact. bits: of x's shape, in
    [0, 65536). What is not finite stays as it is."""
    raised = x.view(torch.int32) + bits
    return raised.bitwise_and_(-65536).view(torch.float32).where(x.isfinite(), x).to(torch.bfloat16)


def split(x: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> (the nearest bfloat16, the 8 bits behind it as uint8); rounded to the 24 bits of both like `round_stochastically`. Weights
    that are not finite stay so in the bfloat16."""
    whole = x.view(torch.int32)
    kept = (whole + (bits >> 8)).bitwise_and_(-256).where(x.isfinite(), whole)
    return (kept + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16), (kept >> 8).bitwise_and_(255).to(torch.uint8)


def join(near: Tensor, remainder: Tensor) -> Tensor:
    """What `split` kept, as float32."""
    low = remainder.int()
    return (near.view(torch.int16).int() - (low >> 7) << 16).bitwise_or_(low << 8).view(torch.float32)


class Master:
    """A parameter's weights for its optimizer: float32, a few rows at a time."""

    def __init__(self, name: str, parameter: Tensor, compensation: str):
        self.name, self.weight = name, rows_of(parameter)
        rounded = parameter.dtype == torch.bfloat16
        self.remainder = torch.zeros_like(self.weight, dtype=torch.uint8) if rounded and compensation == "kahan" else None

    def read(self, rows: slice) -> Tensor:
        """(rows, columns) float32; the parameter's own memory where it is float32."""
        return self.weight[rows].float() if self.remainder is None else join(self.weight[rows], self.remainder[rows])

    def write(self, rows: slice, value: Tensor, seed: int, step: int) -> None:
        if self.weight.dtype == torch.float32:
            self.weight[rows] = value
            return
        bits = random_bits(key_of(seed, step, self.name), rows.start * value.shape[1], value.numel(), value.device).view_as(value)
        if self.remainder is None:
            self.weight[rows] = round_stochastically(value, bits)
        else:
            self.weight[rows], self.remainder[rows] = split(value.contiguous(), bits)

    def address(self, seed: int, step: int) -> tuple:
        """As the compiled updates take it: numbers, whether they are float32, remainder, key of the random bits."""
        return self.weight, int(self.weight.dtype == torch.float32), self.remainder, key_of(seed, step, self.name)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the weights."""
        return {} if self.remainder is None else {"remainder": self.remainder}
