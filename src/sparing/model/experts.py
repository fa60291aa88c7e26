"""Feed-forward blocks: dense SwiGLU, and the mixture of fine-grained routed experts beside shared ones (DeepSeekMoE, arXiv 2401.06066)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparing.base.config import ModelConfig
from sparing.base.layers import FeedForward
from sparing.kernels import native, products
from sparing.kernels.experts import LOCAL, Dispatcher, Local, mixture, swiglu
from sparing.kernels.feed_forward import dense_feed_forward, mixture_feed_forward
from sparing.kernels.operands import Operand
from sparing.model.linear import Adaptable, Linear, RMSNorm, side_by_side
from sparing.model.router import Router, Routing, sequence_balance_loss
from sparing.precision.eight_bit import EightBit


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        """Gate, up, down."""
        return self.gate_proj.operand, self.up_proj.operand, self.down_proj.operand

    def residual(self, x_BTD: Tensor, norm: RMSNorm, balance: list[Tensor] | None = None) -> Tensor:
        """x + mlp(norm(x)); no experts, so nothing to balance."""
        if products.even(*self.gate_proj.weight.shape) and native.usable(x_BTD):
            return dense_feed_forward(x_BTD, norm.weight, norm.eps, self.operands)
        return x_BTD + self(norm(x_BTD))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(side_by_side(x, self.gate_proj, self.up_proj)))


class Experts(Adaptable):
    """The routed experts' weights: gate and up projections stacked (gate first), then the down projections.

    Tokens come and go by a dispatcher. Where that is another one than the default, which holds all experts, the weights are those of the
    experts that are held here.
    """

    weights = ("gate_up_proj", "down_proj")
    eight_bit: tuple[EightBit, EightBit] | None = None
    """As `Linear.eight_bit`, of each part."""

    def __init__(self, f: FeedForward, dispatcher: Dispatcher = LOCAL):
        super().__init__()
        self.dispatcher = dispatcher
        self.active = f.chosen / f.experts
        self.gate_up_proj = nn.Parameter(torch.empty(f.shapes["experts.gate_up_proj"]))
        self.down_proj = nn.Parameter(torch.empty(f.shapes["experts.down_proj"]))

    def forward(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        return mixture(x_ND, *self.operands(products.Plain), weights_NK, experts_NK, self.dispatcher)

    def operands(self, by=products) -> tuple[Operand, Operand]:
        """The gate and up projections (E, 2F, D) and the down projections (E, D, F). by: products of what is not in 8 bits."""
        gate_up, down = self.eight_bit if self.eight_bit and self.training else (by, by)
        return self._operand("gate_up_proj", gate_up), self._operand("down_proj", down)


class MoE(nn.Module):
    """Shared experts plus the chosen routed ones, weighted by their gates."""

    def __init__(self, c: ModelConfig, f: FeedForward):
        super().__init__()
        self.c = c
        self.gate = Router(c)
        self.experts = Experts(f)
        self.shared_experts = MLP(f.hidden, f.common_width) if f.shared else None

    def residual(self, x_BTD: Tensor, norm: RMSNorm, balance: list[Tensor] | None = None) -> Tensor:
        """x + experts(norm(x)). balance: where given, the layer appends its sequence-wise balance loss."""
        normed = norm(x_BTD)
        here = isinstance(self.experts.dispatcher, Local)
        if not here or not products.even(self.c.hidden_size, self.c.moe_intermediate_size) or not native.usable(x_BTD):
            return x_BTD + self(normed, balance)
        x_ND = normed.flatten(0, 1)
        routing = self._route(x_ND, x_BTD.shape[0], balance)
        operands = self.experts.operands() + (self.shared_experts.operands if self.shared_experts else ())
        return mixture_feed_forward(x_BTD.flatten(0, 1), x_ND, routing.weights_NK, routing.experts_NK, operands).view_as(x_BTD)

    def _route(self, x_ND: Tensor, sequences: int, balance: list[Tensor] | None) -> Routing:
        routing = self.gate(x_ND)
        if balance is not None:
            balance.append(sequence_balance_loss(routing.scores_NE, self.c, sequences))
        return routing

    def forward(self, x_BTD: Tensor, balance: list[Tensor] | None = None) -> Tensor:
        """balance: where given, the layer appends its sequence-wise balance loss."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self._route(x_ND, x_BTD.shape[0], balance)
        y = self.experts(x_ND, routing.weights_NK, routing.experts_NK).view_as(x_BTD)
        return y if self.shared_experts is None else y + self.shared_experts(x_BTD)
