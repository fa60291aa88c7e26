"""Stores an optimizer's moving averages in 8 bits. Up to BLOCK numbers of a row share a float32 scale, their largest magnitude.

The blocks are those of Dettmers et al. (arXiv 2110.02861). Two things differ:

- A code c stands for a power instead of an entry of a table. A signed number is (c / 127)^2 times the scale, which covers 4 decades. An
  unsigned number is (c / 255)^4 times the scale, which covers 9 decades; second moments need them, because an update divides by the root.
- Rounding is stochastic and unbiased in the number itself. With rounding to nearest, an average that moves by 1 % a step (beta2 = 0.99)
  would never leave its code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.kernels.sizes import MOMENT_BLOCK as BLOCK
from sparing.precision.compensation import key_of, random_bits, rows_of


def _blocks(x_RC: Tensor) -> Tensor:
    """(rows, columns) -> (rows, blocks, BLOCK), padded with zeros."""
    width = min(BLOCK, x_RC.shape[1])
    return F.pad(x_RC, (0, -x_RC.shape[1] % width)).unflatten(1, (-1, width))


def quantise(x_RC: Tensor, signed: bool, bits_RC: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (rows, columns) -> (codes of the same shape, int8 if signed, else uint8; scales (rows, blocks) float32).

    bits: random numbers in [0, 65536), of the same shape. In an unsigned tensor zero alone becomes zero, because an update divides by its
    root."""
    top, power = (127.0, 2) if signed else (255.0, 4)
    x, chance = _blocks(x_RC), _blocks(bits_RC.float() / 65536.0)
    scale = x.abs().amax(2, keepdim=True)
    share = x.abs() / scale.where(scale > 0, 1.0)
    code = ((share.sqrt() if signed else share.sqrt().sqrt()) * top).floor_().clamp_(max=top - 1)
    low, high = code**power, (code + 1) ** power
    code += chance * (high - low) < share * top**power - low
    code = code * x.sign() if signed else code.clamp(min=1.0).where(x > 0, 0.0)
    return code.flatten(1)[:, : x_RC.shape[1]].to(torch.int8 if signed else torch.uint8), scale.squeeze(2)


def dequantise(code_RC: Tensor, scale_RB: Tensor) -> Tensor:
    """Codes and scales of `quantise` -> (rows, columns) float32."""
    x = _blocks(code_RC.float() / (127.0 if code_RC.dtype == torch.int8 else 255.0))
    x = x * x.abs() if code_RC.dtype == torch.int8 else x.square().square()
    return (x * scale_RB.unsqueeze(2)).flatten(1)[:, : code_RC.shape[1]]


class Average:
    """A moving average of one parameter, in float32 or 8 bits. Optimizers read and write it in float32, a few rows at a time."""

    def __init__(self, name: str, parameter: Tensor, signed: bool, eight_bit: bool):
        """name: KIND/PARAMETER, such as exp_avg/model.norm.weight."""
        self.name, self.signed, self.scale = name, signed, None
        like = rows_of(parameter)
        if not eight_bit:
            self.value = torch.zeros_like(like, dtype=torch.float32)
            return
        self.value = torch.zeros_like(like, dtype=torch.int8 if signed else torch.uint8)
        blocks = -(-like.shape[1] // min(BLOCK, like.shape[1]))
        self.scale = torch.zeros(len(like), blocks, dtype=torch.float32, device=like.device)

    def read(self, rows: slice) -> Tensor:
        """(rows, columns) float32; a view if the average is stored in float32."""
        return self.value[rows] if self.scale is None else dequantise(self.value[rows], self.scale[rows])

    def write(self, rows: slice, value: Tensor, seed: int, step: int) -> None:
        """Store float32 `value`. seed and step choose the random bits of rounding."""
        if self.scale is None:
            self.value[rows] = value
            return
        bits = random_bits(key_of(seed, step, self.name), rows.start * value.shape[1], value.numel(), value.device)
        self.value[rows], self.scale[rows] = quantise(value, self.signed, bits.view_as(value))

    def address(self, seed: int, step: int) -> tuple:
        """Arguments of storage.c's updates: numbers or codes, scales (None: float32), key of the random bits."""
        return self.value, self.scale, key_of(seed, step, self.name)

    def state(self) -> dict[str, Tensor]:
        """Its tensors for a checkpoint, by kind. They are not copies."""
        kind = self.name.split("/")[0]
        return {kind: self.value} if self.scale is None else {kind: self.value, f"{kind}_scale": self.scale}
