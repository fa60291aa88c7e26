"""An optimizer's moving averages in 8 bits: blocks of up to BLOCK numbers of a row share a float32 scale, their largest magnitude.

Block-wise as in Dettmers et al. (arXiv 2110.02861), with two changes. Codes are powers instead of a table of 256 values: a signed number
is (c / 127)^2 of its block's largest, an unsigned one (second moments, whose root is what counts) (c / 255)^4; small numbers stay
distinguishable over 4 and 9 decades, and nothing is searched. And rounding is stochastic, unbiased in the number itself: rounded to
nearest, an average that moves by 1 % a step (beta2 = 0.99) never leaves its code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.kernels.sizes import MOMENT_BLOCK as BLOCK
from sparing.precision.compensation import key_of, random_bits, rows_of


def _blocks(x_RC: Tensor) -> Tensor:
    """(rows, blocks, BLOCK), zeros behind the last column."""
    width = min(BLOCK, x_RC.shape[1])
    return F.pad(x_RC, (0, -x_RC.shape[1] % width)).unflatten(1, (-1, width))


def quantise(x_RC: Tensor, signed: bool, bits_RC: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (rows, columns) -> (codes, int8 or uint8 of the same shape; scales (rows, blocks) float32). bits: [0, 65536) each.

    Zero stays zero and nothing else of an unsigned tensor becomes zero: an update is divided by its root."""
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
    """(rows, columns) float32."""
    x = _blocks(code_RC.float() / (127.0 if code_RC.dtype == torch.int8 else 255.0))
    x = x * x.abs() if code_RC.dtype == torch.int8 else x.square().square()
    return (x * scale_RB.unsqueeze(2)).flatten(1)[:, : code_RC.shape[1]]


class Average:
    """One moving average of a parameter, for its optimizer: float32, a few rows at a time. name: KIND/PARAMETER."""

    def __init__(self, name: str, parameter: Tensor, signed: bool, eight_bit: bool):
        self.name, self.signed, self.scale = name, signed, None
        like = rows_of(parameter)
        if not eight_bit:
            self.value = torch.zeros_like(like, dtype=torch.float32)
            return
        self.value = torch.zeros_like(like, dtype=torch.int8 if signed else torch.uint8)
        blocks = -(-like.shape[1] // min(BLOCK, like.shape[1]))
        self.scale = torch.zeros(len(like), blocks, dtype=torch.float32, device=like.device)

    def read(self, rows: slice) -> Tensor:
        """(rows, columns) float32; its own memory where it is kept like that."""
        return self.value[rows] if self.scale is None else dequantise(self.value[rows], self.scale[rows])

    def write(self, rows: slice, value: Tensor, seed: int, step: int) -> None:
        if self.scale is None:
            self.value[rows] = value
            return
        bits = random_bits(key_of(seed, step, self.name), rows.start * value.shape[1], value.numel(), value.device)
        self.value[rows], self.scale[rows] = quantise(value, self.signed, bits.view_as(value))

    def address(self, seed: int, step: int) -> tuple:
        """As the compiled updates take it: numbers or codes, scales, key of the random bits."""
        return self.value, self.scale, key_of(seed, step, self.name)

    def state(self) -> dict[str, Tensor]:
        """Live tensors by kind."""
        kind = self.name.split("/")[0]
        return {kind: self.value} if self.scale is None else {kind: self.value, f"{kind}_scale": self.scale}
