"""Quantises a matrix in blocks: 8 bits for each number, one float32 scale for each block.

One function for every scheme: a block is (rows, columns), None for all of them. Activations and gradients of DeepSeek-V3 (1, 128), weights
(128, 128) (arXiv 2412.19437 §3.3.2); per token (1, None), per channel (None, 1), a whole tensor (None, None).

A scale also reports: NaN, the block held an infinity or NaN; 0, a block of numbers too small for float32 to scale ("dead"). Nothing is
clamped: the first turns the block into NaN, and `eight_bit.count` counts both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.precision.formats import Format, power_of_two

Block = tuple[int | None, int | None]
TILE = 128
LEAST = 2.0**-126
"""Of a scale: float32's smallest normal number, so that its inverse is a number too."""


class Quantised(NamedTuple):
    """value = values * scale of its block."""

    values: Tensor
    """(M, N) in the format's type."""
    scale: Tensor
    """float32, one a block: (ceil(M / rows), ceil(N / columns))."""
    block: Block


def quantise(x: Tensor, format: Format, block: Block, powers: bool = False) -> Quantised:
    """x (M, N) -> its blocks; the largest number of a block becomes the format's largest. powers: scales are powers of two, rounded up
    (UE8M0 of DeepSeek-V3.1; exact to multiply with, and half a bit of the range is lost)."""
    rows, columns = _sizes(x, block)
    padded = F.pad(x.float(), (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    # (`maximum` and `amax` pass NaN on, so one look at the scale is enough.)
    amax = tiles.abs().amax((1, 3)) if x.numel() else tiles.new_zeros(tiles.shape[0], tiles.shape[2])
    scale = amax / format.most
    empty, lost, broken = amax == 0, (amax > 0) & (scale < LEAST), ~amax.isfinite()
    if powers:
        mantissa, exponent = torch.frexp(scale)
        scale = power_of_two(exponent - (mantissa == 0.5).int())
        inverse = 1.0 / scale
    else:
        inverse = amax.new_full((), format.most) / amax  # a plain number would be multiplied by the reciprocal: two roundings
    scale = scale.masked_fill(empty, 1.0).masked_fill(lost, 0.0).masked_fill(broken, torch.nan)
    inverse = inverse.masked_fill(empty | lost | broken, 0.0)
    scaled = tiles * inverse[:, None, :, None]
    values = format.round(scaled.masked_fill(broken[:, None, :, None], 0.0)).flatten(2, 3).flatten(0, 1)
    return Quantised(values[: x.shape[0], : x.shape[1]].contiguous(), scale, block)


def dequantise(q: Quantised) -> Tensor:
    """-> (M, N) float32."""
    return q.values.float() * spread(q)


def spread(q: Quantised) -> Tensor:
    """Each number's scale, (M, N)."""
    M, N = q.values.shape
    rows, columns = _sizes(q.values, q.block)
    return q.scale.repeat_interleave(rows, 0)[:M].repeat_interleave(columns, 1)[:, :N]


def _sizes(x: Tensor, block: Block) -> tuple[int, int]:
    """Of its blocks; none reaches beyond x, which would only be padded."""
    rows, columns = (max(1, have if want is None else min(want, have)) for have, want in zip(x.shape, block, strict=True))
    return rows, columns
