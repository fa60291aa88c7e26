"""Rotary position embedding on interleaved pairs (arXiv 2104.09864), with YaRN (2309.00071 §3.2; DeepSeek-V3 §4.3), Llama 3.1's and linear
stretching of its waves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparing.base.config import Llama3RopeConfig, ModelConfig, YarnConfig
from sparing.base.layers import layers


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1, or 1 when nothing is extended."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Scale of the attention logits: width^-1/2, times m² of `mscale_all_dim` under YaRN."""
    m = yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) if config.yarn and config.yarn.mscale_all_dim else 1.0
    return layers(config)[0].attention.key ** -0.5 * m * m


def rotated_width(config: ModelConfig) -> int:
    """Numbers of a head's rotary part that are turned: all of them, or GQA's `partial_rotary_factor`."""
    width = layers(config)[0].attention.rope
    return width if config.attention == "mla" else int(width * config.partial_rotary_factor)


def _yarn_frequencies(frequencies: Tensor, dim: int, theta: float, yarn: YarnConfig) -> Tensor:
    """Interpolate the slow dimensions by `factor`, keep the fast ones, ramp between beta_fast and beta_slow rotations."""

    def dimension(rotations: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies / yarn.factor * ramp + frequencies * (1 - ramp)


def _llama3_frequencies(frequencies: Tensor, rope: Llama3RopeConfig) -> Tensor:
    """Waves are stretched the more, the fewer times they turn in the original context: `ROPE_INIT_FUNCTIONS["llama3"]` of transformers."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return frequencies / rope.factor * (1 - kept) + frequencies * kept


def rotary_table(config: ModelConfig, length: int) -> Tensor:
    """(length, R/2) complex64: the rotation of every position and pair, YaRN's cos/sin factor applied. Pairs behind the rotated share of a
    head are turned by nothing."""
    width = layers(config)[0].attention.rope
    dim = rotated_width(config)
    frequencies = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    factor = 1.0
    if config.yarn:
        frequencies = _yarn_frequencies(frequencies, dim, config.rope_theta, config.yarn)
        y = config.yarn
        if y.mscale and y.mscale_all_dim:
            factor = yarn_mscale(y.factor, y.mscale) / yarn_mscale(y.factor, y.mscale_all_dim)
        else:
            factor = yarn_mscale(y.factor, 1.0)
    elif config.llama3:
        frequencies = _llama3_frequencies(frequencies, config.llama3)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies / config.linear_rope_factor)
    turns = torch.polar(torch.full_like(angles, factor), angles)
    return turns if dim == width else torch.cat((turns, turns.new_ones(length, (width - dim) // 2)), 1)


class _Rotate(torch.autograd.Function):
    """Pairs as complex numbers: on a CPU over ten times faster than strided real arithmetic. The gradient turns the other way."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _turn(x, table)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _turn(grad, ctx.saved_tensors[0].conj_physical()), None


def _turn(x: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def rotate(x_BTHR: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs (x0, x1), (x2, x3), ... of the last dimension by the position's angle; table (T, R/2) or (B, T, R/2) complex."""
    return _Rotate.apply(x_BTHR, table.unsqueeze(-2))
