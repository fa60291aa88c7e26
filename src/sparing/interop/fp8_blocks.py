"""Block-scaled FP8 weights as DeepSeek-V3 publishes them (arXiv 2412.19437 §3.3; `X.weight` with `X.weight_scale_inv`).

Each block of 128x128 weights is stored as e4m3 next to one float32 factor that multiplies it back: w = float(w_e4m3) * scale_inv.
V3.1 and later restrict the factors to powers of two (`scale_fmt: ue8m0`), stored as float32, as float8_e8m0fnu or as raw exponents.
"""

from __future__ import annotations

import torch

from sparing.precision import quantise as blocks
from sparing.precision.formats import E4M3

BLOCK = blocks.TILE


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = (BLOCK, BLOCK)) -> tuple[int, int]:
    """Shape of the factors of a weight (out, in): one per block, the last ones partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def quantise(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (out, in) -> (e4m3 of the same shape, float32 factors of `scale_shape`); the largest of each block lands on 448. A block with
    an infinity or NaN has the factor NaN."""
    values, scale, _ = blocks.quantise(weight_OI, E4M3, (BLOCK, BLOCK))
    return values, scale


def dequantise(weight_OI: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> torch.Tensor:
    """e4m3 weight (out, in) and its factors (one per block, or a single one) -> float32 weight."""
    scale = decode_scale(scale)
    if scale.numel() == 1:
        return weight_OI.float().mul_(scale.reshape(()))
    return blocks.dequantise(blocks.Quantised(weight_OI, scale, block))


def decode_scale(scale: torch.Tensor) -> torch.Tensor:
    """Factors as stored -> float32; uint8 is a bare ue8m0 exponent (bias 127)."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - 127.0)
    return scale.float()
