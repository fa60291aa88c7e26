"""Rotary position embedding on interleaved pairs, with YaRN (arXiv 2104.09864; 2309.00071 §3.2; DeepSeek-V3 §4.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparing.config import ModelConfig, YarnConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1, or 1 when nothing is extended."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Scale of the attention logits: width^-1/2, times m² of `mscale_all_dim` under YaRN."""
    width = config.head_dim if config.attention == "gqa" else config.qk_nope_head_dim + config.qk_rope_head_dim
    m = yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) if config.yarn and config.yarn.mscale_all_dim else 1.0
    return width**-0.5 * m * m


def _yarn_frequencies(frequencies: Tensor, dim: int, theta: float, yarn: YarnConfig) -> Tensor:
    """Interpolate the slow dimensions by `factor`, keep the fast ones, ramp between beta_fast and beta_slow rotations."""

    def dimension(rotations: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies / yarn.factor * ramp + frequencies * (1 - ramp)


def rotary_table(config: ModelConfig, length: int) -> Tensor:
    """(length, dim/2, 2) float32: cosine and sine of every position and pair, YaRN's cos/sin factor applied."""
    dim = config.head_dim if config.attention == "gqa" else config.qk_rope_head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    factor = 1.0
    if config.yarn:
        frequencies = _yarn_frequencies(frequencies, dim, config.rope_theta, config.yarn)
        y = config.yarn
        factor = yarn_mscale(y.factor, y.mscale) / yarn_mscale(y.factor, y.mscale_all_dim) if y.mscale and y.mscale_all_dim else yarn_mscale(y.factor, 1.0)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()), -1) * factor


def rotate(x_BTHR: Tensor, table_TR2: Tensor) -> Tensor:
    """Rotate pairs (x0, x1), (x2, x3), ... of the last dimension by the position's angle; table (T, R/2, 2) or (B, T, R/2, 2)."""
    table = table_TR2.to(x_BTHR.dtype if x_BTHR.dtype == torch.float64 else torch.float32).unsqueeze(-3)
    cos, sin = table[..., 0], table[..., 1]
    x0, x1 = x_BTHR.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1).flatten(-2).to(x_BTHR.dtype)
