"""Weights as 4-bit codes with a bfloat16 scale for each 32 numbers of a row, as the engine and frozen matrices have them.

Blocks of 16 rows (outputs) and 32 columns (inputs) lie row by row of blocks. A block has 256 bytes of codes and its
rows' 16 scales. A byte has two codes of a row, 16 columns apart, the first one in its low half. Bytes are ordered by
four columns, by row, by column: so 16 words of 32 bits have the same columns of 16 rows. A code c stands for (c - 8)
times the scale, as in llama.cpp's Q4_0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.base.held import BLOCK_BYTES, GROUP, PANEL

PIECE = 1 << 20
"""Numbers that are converted at a time: the copies that it takes stay small."""


def to_int4(weight: Tensor) -> Tensor:
    """(..., rows, columns) -> (..., rows of blocks, blocks of a row, BLOCK_BYTES) uint8. columns: a multiple of 32.

    The largest number of each 32 becomes -8 and is exact up to the scale's digits. Rows that fill a block up are zeros."""
    *experts, rows, columns = weight.shape
    panels, groups = -(-rows // PANEL), columns // GROUP
    out = torch.empty(*experts, panels, groups, BLOCK_BYTES, dtype=torch.uint8, device=weight.device)
    step = max(1, PIECE // (PANEL * columns))
    matrices, stored = weight.reshape(-1, rows, columns), out.view(-1, panels, groups, BLOCK_BYTES)
    for matrix, blocks in zip(matrices, stored, strict=True):
        for start in range(0, panels, step):
            piece = matrix[start * PANEL : (start + step) * PANEL].float()
            piece = F.pad(piece, (0, 0, 0, -len(piece) % PANEL))
            blocks[start : start + step] = _blocks(piece.view(-1, PANEL, groups, GROUP))
    return out


def _blocks(groups: Tensor) -> Tensor:
    """(rows of blocks, PANEL, blocks of a row, GROUP) float32 -> (rows of blocks, blocks of a row, BLOCK_BYTES)."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (extreme / -8).bfloat16()
    divisor = torch.where(scale == 0, torch.ones((), dtype=scale.dtype, device=scale.device), scale).float()
    q = (groups / divisor).round_().clamp_(-8, 7).add_(8).to(torch.uint8).unflatten(-1, (2, 4, 4))
    halves = (q[..., 0, :, :] | q[..., 1, :, :] << 4).permute(0, 2, 3, 1, 4).flatten(2)  # ..., quad, row, column
    return torch.cat((halves, scale.squeeze(-1).transpose(1, 2).contiguous().view(torch.uint8)), -1)


def from_int4(blocks: Tensor, rows: int) -> Tensor:
    """What `to_int4` makes of (..., rows, columns), or some of its blocks -> (..., rows, columns) float32."""
    *experts, panels, groups, _ = blocks.shape
    out = torch.empty(*experts, panels * PANEL, groups * GROUP, device=blocks.device)
    step = max(1, PIECE // (PANEL * GROUP * groups))
    flat, floats = blocks.reshape(-1, groups, BLOCK_BYTES), out.view(-1, PANEL, groups * GROUP)
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        codes, scale = flat[part].split((PANEL * GROUP // 2, 2 * PANEL), -1)
        codes = codes.unflatten(-1, (4, PANEL, 4))
        codes = torch.stack((codes & 15, codes >> 4), 2).permute(0, 4, 1, 2, 3, 5).flatten(3)  # ..., row, group, column
        scale = scale.contiguous().view(torch.bfloat16).float().transpose(1, 2).unsqueeze(-1)
        floats[part] = codes.float().sub_(8).mul_(scale).flatten(2)
    return out[..., :rows, :]
