"""Block-scaled FP8 weights as DeepSeek-V3 publishes them (arXiv 2412.19437 §3.3; `X.weight` with `X.weight_scale_inv`).

Each block of 128x128 weights is stored as e4m3 next to one float32 factor that multiplies it back: w = float(w_e4m3) * scale_inv.
V3.1 and later restrict the factors to powers of two (`scale_fmt: ue8m0`), stored as float32, as float8_e8m0fnu or as raw exponents.
"""

from __future__ import annotations

import torch

BLOCK = 128
E4M3_MAX = 448.0


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = (BLOCK, BLOCK)) -> tuple[int, int]:
    """Shape of the factors of a weight (out, in): one per block, the last ones partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def quantise(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (out, in) -> (e4m3 of the same shape, float32 factors of `scale_shape`); the largest of each block lands on 448."""
    rows, columns = scale_shape(tuple(weight_OI.shape))
    out, width = weight_OI.shape
    padded = weight_OI.new_zeros(rows * BLOCK, columns * BLOCK, dtype=torch.float32)
    padded[:out, :width] = weight_OI
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / E4M3_MAX
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a block of zeros: any factor gives zeros back
    blocks /= scale[:, None, :, None]
    return padded.clamp_(-E4M3_MAX, E4M3_MAX)[:out, :width].to(torch.float8_e4m3fn), scale


def dequantise(weight_OI: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> torch.Tensor:
    """e4m3 weight (out, in) and its factors (one per block, or a single one) -> float32 weight."""
    scale = decode_scale(scale)
    weight = weight_OI.float()
    if scale.numel() == 1:
        return weight.mul_(scale.reshape(()))
    for row, factors in enumerate(scale):  # a stripe of blocks at a time: the factors are never expanded to the weight's size
        weight[row * block[0] : (row + 1) * block[0]] *= factors.repeat_interleave(block[1])[: weight.shape[1]]
    return weight


def decode_scale(scale: torch.Tensor) -> torch.Tensor:
    """Factors as stored -> float32; uint8 is a bare ue8m0 exponent (bias 127)."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - 127.0)
    return scale.float()
