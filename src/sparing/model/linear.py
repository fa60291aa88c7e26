"""The projection that every layer uses, and the norm: master weights in float32, arithmetic in the activations' type."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.kernels import products
from sparing.kernels.norm import rms_norm
from sparing.kernels.operands import Operand, Weight
from sparing.precision.linear import EightBit


class Linear(nn.Module):
    """y = x Wᵀ, weight (out, in), no bias (DeepSeek-V3 has none)."""

    eight_bit: EightBit | None = None
    """Set by `precision.linear.install`; used in training, so that evaluations show the model as it is saved."""
    active = 1.0
    """Share of the weights that a token meets."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    @classmethod
    def shaped(cls, shape: tuple[int, ...]) -> Linear:
        """One whose weight has the shape (out, in)."""
        return cls(shape[1], shape[0])

    @property
    def operand(self) -> Operand:
        """The weight with its products."""
        return Weight(self.weight, self.eight_bit if self.eight_bit and self.training else products)

    def forward(self, x: Tensor) -> Tensor:
        return self.operand(x)


def side_by_side(x: Tensor, *linears: Linear) -> Tensor:
    """Several linears of one input, (..., sum of their widths). Plain weights are joined into one product: the input is read once, and its
    gradient needs no addition. Other operands have each their own."""
    operands = [linear.operand for linear in linears]
    if not all(operand.joins for operand in operands):
        return torch.cat([operand(x) for operand in operands], -1)
    return F.linear(x, torch.cat([linear.weight for linear in linears]).to(x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a learned gain."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
