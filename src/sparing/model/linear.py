"""The projection that every layer uses, and the norm: master weights in float32, arithmetic in the activations' type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.base.held import GROUP
from sparing.base.int4_groups import to_int4
from sparing.base.int8_rows import to_int8
from sparing.kernels import products
from sparing.kernels.norm import rms_norm
from sparing.kernels.products import Frozen, LowRank, Operand, Weight
from sparing.kernels.vocabulary import embedding
from sparing.precision.eight_bit import EightBit


class Factor(nn.Module):
    """One factor of a low-rank update. A module, so that its tensor is named as PEFT names it: `lora_A.weight`."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class Adaptable(nn.Module):
    """A module whose weights can stop learning, be kept in few bits and get a low-rank update (LoRA, arXiv 2106.09685).

    A weight kept in few bits is a buffer of the parameter's name: int8 codes, with `NAME_scale` beside them, or int4's
    blocks. The factors of `weight` are `lora_A.weight` (rank, in) and `lora_B.weight` (out, rank). Those of experts' `NAME`
    (E, out, in) have PEFT's shapes for fused experts: `NAME_lora_A.weight` (E*rank, in), the expert slowest, and
    `NAME_lora_B.weight` (out, rank*E), the expert fastest.
    """

    weights: tuple[str, ...] = ("weight",)
    """Names of its weights, each (out, in), or (E, out, in) of a layer's experts."""
    low_rank_scale: float | None = None
    """alpha / rank, where there is a low-rank update."""
    _blocked: Mapping[str, torch.Size] = MappingProxyType({})
    """Shapes of weights that are blocks."""

    def shape(self, name: str = "weight") -> torch.Size:
        """Of a weight, whatever it is kept in."""
        return self._blocked.get(name) or getattr(self, name).shape

    def freeze(self, kind: Literal["int4", "int8", "bfloat16"] | None = None) -> None:
        """Stop learning. kind: what to keep the weights in from here on; None: what they are. Raises ValueError where
        weights are kept in few bits already."""
        self._freeze_bias()
        for name in self.weights:
            if kind is None:
                getattr(self, name).requires_grad_(False)
            else:
                self.keep(name, kind)

    @torch.no_grad()
    def keep(self, name: str, kind: Literal["int4", "int8", "bfloat16"]) -> None:
        """Keep one weight, which stops learning, in few bits. int8 has a float32 scale for each row, its largest
        magnitude / 127; int4 a bfloat16 scale for each 32 numbers of a row, and where rows have no whole 32s it is int8.
        Raises ValueError where the weight is kept in few bits already."""
        if name in self._buffers:
            raise ValueError(f"{name} is frozen in {getattr(self, name).dtype} already")
        weight = getattr(self, name).detach()
        delattr(self, name)
        for held, tensor in few_bits(name, weight, kind).items():
            self.register_buffer(held, tensor)
        if getattr(self, name).dtype == torch.uint8:
            self._blocked = {**self._blocked, name: weight.shape}

    def add_low_rank(self, rank: int, alpha: float, generator: torch.Generator | None = None) -> None:
        """Freeze the weights and learn alpha / rank · B A beside each. A is drawn from U(-1/√in, 1/√in), as PEFT does; B is zero, so that
        nothing changes at first. Raises ValueError where there is an update already."""
        if self.low_rank_scale is not None:
            raise ValueError("there is a low-rank update already: merge it first")
        self._freeze_bias()
        for name in self.weights:
            getattr(self, name).requires_grad_(False)
        for name, factor in self.factors(rank, generator):
            setattr(self, name, Factor(factor.to(getattr(self, self.weights[0]).device)))
        self.low_rank_scale = alpha / rank

    def factors(self, rank: int, generator: torch.Generator | None = None) -> Iterator[tuple[str, Tensor]]:
        """What `add_low_rank` adds, one by one, by the names of the modules that have them."""
        for name in self.weights:
            *stack, out, columns = self.shape(name)
            experts = prod(stack)
            yield _factor(name, "A"), torch.empty(experts * rank, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
            yield _factor(name, "B"), torch.zeros(out, rank * experts)

    def _freeze_bias(self) -> None:
        """A bias learns where the weights do."""
        if (bias := getattr(self, "bias", None)) is not None:
            bias.requires_grad_(False)

    def _operand(self, name: str, by) -> Operand:
        """A weight with its products. by: products of one that is not in few bits."""
        weight = getattr(self, name)
        scale = getattr(self, f"{name}_scale", None)
        operand = Frozen(weight, scale, self.shape(name)) if name in self._buffers else Weight(weight, by)
        if self.low_rank_scale is None:
            return operand
        down, up = (getattr(self, _factor(name, part)).weight for part in "AB")
        if len(operand.shape) == 3:
            down, up = down.unflatten(0, (len(weight), -1)), up.unflatten(1, (-1, len(weight))).permute(2, 0, 1).contiguous()
        return LowRank(operand, down, up, self.low_rank_scale)

    def alone(self, dtype: torch.dtype) -> Tensor | Frozen:
        """The only weight, for what has a product of its own, as the head's cross-entropy. Where it has an update: the
        sum of both, in `dtype`."""
        operand = self._operand("weight", products.FLOATS)
        if isinstance(operand, LowRank):
            return operand.whole(dtype)
        return self.weight if self.weight.is_floating_point() else operand


def few_bits(name: str, weight: Tensor, kind: Literal["int4", "int8", "bfloat16"]) -> dict[str, Tensor]:
    """What `Adaptable.keep` keeps of a weight, by name."""
    if kind == "bfloat16":
        return {name: weight.to(torch.bfloat16)}
    if kind == "int4" and not weight.shape[-1] % GROUP:
        return {name: to_int4(weight)}
    codes, scale = to_int8(weight)
    return {name: codes, f"{name}_scale": scale}


def _factor(name: str, part: str) -> str:
    return f"lora_{part}" if name == "weight" else f"{name}_lora_{part}"


class Linear(Adaptable):
    """y = x Wᵀ + b, weight (out, in); most have no bias b (out,), which stays float32."""

    eight_bit: EightBit | None = None
    """Set by `precision.eight_bit.install`; used in training, so that evaluations show the model as it is saved."""
    active = 1.0
    """Share of the weights that a token meets."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    @classmethod
    def shaped(cls, shape: tuple[int, ...], bias: bool = False) -> Linear:
        """One whose weight has the shape (out, in)."""
        return cls(shape[1], shape[0], bias)

    @property
    def operand(self) -> Operand:
        """The weight with its products."""
        return self._operand("weight", self.eight_bit if self.eight_bit and self.training else products.FLOATS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.operand(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Embedding(Adaptable):
    """A row of its weight (words, width) for each word. It can be frozen, and has no low-rank update."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(words, width))

    def add_low_rank(self, rank: int, alpha: float, generator: torch.Generator | None = None) -> None:
        raise ValueError("an embedding has no low-rank update")

    def forward(self, words: Tensor) -> Tensor:
        """(...,) integers -> (..., width), in the weight's type; of int8 codes float32."""
        if self.weight.requires_grad:
            return embedding(words, self.weight)
        scale = getattr(self, "weight_scale", None)
        rows = F.embedding(words, self.weight)
        return rows if scale is None else rows * scale[words].unsqueeze(-1)


def side_by_side(x: Tensor, *linears: Linear) -> Tensor:
    """Several linears of one input, without biases: (..., sum of their widths). Plain weights are joined into one product: the input is
    read once, and its gradient needs no addition. Other operands have each their own."""
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
