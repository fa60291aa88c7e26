"""Weights as int8 codes with a float32 scale for each row: what frozen matrices are held in, and what that makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 127
LEAST = 2.0**-126
"""Of a scale: float32's smallest normal number, so that its inverse is a number too; rows of smaller numbers become zeros."""
PIECE = 1 << 20
"""Numbers that are quantised at a time: the copies that it takes stay small."""


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(..., rows, columns) -> (codes, the same in int8; scales (..., rows) float32). The largest number of a row is +-127."""
    codes, scale = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(weight.shape[:-1], dtype=torch.float32)
    rows, step = weight.flatten(0, -2), max(1, PIECE // weight.shape[-1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        floats = rows[part].float()
        most = floats.abs().amax(1)
        some = most / MOST >= LEAST
        scale.view(-1)[part] = torch.where(some, most / MOST, 1.0)
        codes.view(rows.shape)[part] = (floats * torch.where(some, MOST / most, 0.0).unsqueeze(1)).round_()
    return codes, scale


def from_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """-> (..., rows, columns) float32."""
    return codes * scale.unsqueeze(-1)
