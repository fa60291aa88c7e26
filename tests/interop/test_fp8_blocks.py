"""Block-scaled FP8: the error it may have, blocks at the edges, blocks of zeros."""

from __future__ import annotations

import pytest
import torch

from sparing.interop.fp8_blocks import decode_scale, dequantise, quantise, scale_shape


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (300, 520), (5, 1000)])
def test_each_block_has_its_own_scale(shape):
    """Weights that differ a million-fold between blocks keep their relative precision: half a step of e4m3, or of its smallest number."""
    rows, columns = scale_shape(shape)
    assert (rows, columns) == (-(-shape[0] // 128), -(-shape[1] // 128))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    size = 10.0 ** torch.randint(-3, 4, (rows, columns), generator=generator)
    weight = weight * size.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    stored, scale = quantise(weight)
    assert stored.dtype == torch.float8_e4m3fn
    assert stored.shape == weight.shape
    assert scale.shape == (rows, columns)
    back = dequantise(stored, scale)
    for i in range(rows):
        for j in range(columns):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            assert torch.isclose(scale[i, j] * 448, weight[block].abs().max())
            assert stored[block].float().abs().max() == 448
            error = (back[block] - weight[block]).abs()
            assert (error <= weight[block].abs() * 2**-4 + scale[i, j] * 2**-10).all()


def test_zeros_and_huge_values():
    weight = torch.zeros(256, 128)
    weight[0, 0] = 3e38
    stored, scale = quantise(weight)
    back = dequantise(stored, scale)
    assert torch.isfinite(scale).all()
    assert torch.isclose(back[0, 0], weight[0, 0])
    assert (back.flatten()[1:] == 0).all()


def test_quantising_does_not_change_its_input():
    weight = torch.randn(128, 128)
    before = weight.clone()
    quantise(weight)
    assert torch.equal(weight, before)


def test_scales_as_exponents():
    assert decode_scale(torch.tensor([120, 127, 130], dtype=torch.uint8)).tolist() == [2.0**-7, 1.0, 8.0]
    assert decode_scale(torch.tensor([0.5, 4.0]).to(torch.float8_e8m0fnu)).tolist() == [0.5, 4.0]
