"""The projection that every layer uses, and the norm: master weights in float32, arithmetic in the activations' type."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.kernels.norm import rms_norm


class Linear(nn.Module):
    """y = x Wᵀ, weight (out, in), no bias (DeepSeek-V3 has none)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a learned gain."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
