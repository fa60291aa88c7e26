"""Four bits a number: the layout of blocks, number by number, and what is lost."""

import pytest
import torch

from sparing.base.held import BLOCK_BYTES, GROUP, PANEL, held_as, held_bytes_of
from sparing.base.int4_groups import from_int4, to_int4


def number(blocks: torch.Tensor, row: int, column: int) -> float:
    """One number of a matrix, read from the bytes as the docstring describes them."""
    block = blocks[row // PANEL, column // GROUP]
    half, quad, inside = column % GROUP // 16, column % 16 // 4, column % 4
    code = int(block[(quad * PANEL + row % PANEL) * 4 + inside]) >> 4 * half & 15
    at = PANEL * GROUP // 2 + row % PANEL * 2
    return (code - 8) * float(block[at : at + 2].clone().view(torch.bfloat16))


@pytest.mark.parametrize("shape", [(16, 32), (50, 64), (3, 33, 96)])
def test_blocks_are_as_described(shape, monkeypatch):
    monkeypatch.setattr("sparing.base.int4_groups.PIECE", 2 * PANEL * shape[-1])  # several pieces
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[..., 3, :] = 0
    blocks = to_int4(weight)
    assert blocks.dtype == torch.uint8 and blocks.numel() == held_bytes_of(shape, "int4")
    back = from_int4(blocks, shape[-2])
    assert back.shape == weight.shape and not back[..., 3, :].any()
    for matrix, stored in zip(back.view(-1, *shape[-2:]), blocks.view(-1, *blocks.shape[-3:]), strict=True):
        expected = [[number(stored, row, column) for column in range(shape[-1])] for row in range(shape[-2])]
        assert torch.equal(matrix, torch.tensor(expected))
    groups, near = weight.unflatten(-1, (-1, GROUP)), back.unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    assert ((near - groups).abs() <= largest / 8 * 1.01).all(), "a step at most: at the far end there is no code for +8"
    at = groups.abs().argmax(-1, keepdim=True)
    assert torch.allclose(near.gather(-1, at), groups.gather(-1, at), rtol=0.005)
    assert torch.equal(from_int4(to_int4(back), shape[-2]), back), "what is held once is held again without loss"


def test_what_is_held_in_which_bits():
    shape = (48, 64)
    assert BLOCK_BYTES / (PANEL * GROUP) == 4.5 / 8
    for base in ("float32", "bfloat16", "int8", "int4"):
        assert held_as("model.layers.0.mlp.up_proj.weight", shape, base) == base
        assert held_as("model.layers.0.mlp.experts.down_proj", (4, *shape), base) == base
        assert held_as("model.layers.0.mlp.gate.weight", shape, base) == "float32"
        assert held_as("model.norm.weight", (64,), base) == "float32"
    for fine in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.3.self_attn.q_proj.weight"):
        assert held_as(fine, shape, "int4") == "int8" and held_as(fine, shape, "bfloat16") == "bfloat16"
    assert held_as("model.layers.0.mlp.up_proj.weight", (48, 72), "int4") == "int8", "no whole groups"
