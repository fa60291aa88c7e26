"""Feed-forward blocks: dense SwiGLU, and the mixture of fine-grained routed experts beside shared ones (DeepSeekMoE, arXiv 2401.06066).

The router scores the experts, chooses by group-limited top-k, and is balanced without a loss (DeepSeek-V3 §2.1.2; arXiv 2408.15664). Its
selection bias, where it has one, decides which experts are used and never how much: gate weights come from the unbiased scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.base.config import ModelConfig
from sparing.base.layers import SELECTION_BIAS, FeedForward
from sparing.kernels import native, products
from sparing.kernels.feed_forward import LOCAL, Dispatcher, Local, dense_feed_forward, mixture, mixture_feed_forward, swiglu
from sparing.kernels.products import Chosen, Operand, Weight
from sparing.model.linear import Adaptable, Linear, RMSNorm, side_by_side
from sparing.precision.eight_bit import EightBit


class Routing(NamedTuple):
    weights_NK: Tensor
    """Gate weights, float32."""
    experts_NK: Tensor
    """Chosen experts, int64."""
    scores_NE: Tensor
    """Unbiased scores, float32."""


class Router(nn.Module):
    """Scores and choice in float32, whatever the compute type."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        # Without selection biases these stay zero, and no checkpoint has them.
        self.register_buffer(SELECTION_BIAS, torch.zeros(c.n_routed_experts), persistent=c.selection_bias)
        self.register_buffer("tokens_per_expert", torch.zeros(c.n_routed_experts), persistent=False)
        self.counting = True
        self.replayed_NK: Tensor | None = None
        """Experts to use instead of a choice, for as long as they are set."""

    def scores(self, x_ND: Tensor) -> Tensor:
        """(N, E) float32 scores in the gate's own function."""
        logits = F.linear(x_ND.float(), self.weight.float())
        match self.c.scoring_func:
            case "sigmoid":
                return logits.sigmoid()
            case "softmax":
                return logits.softmax(-1)
            case "sqrtsoftplus":
                return F.softplus(logits).sqrt()
        raise AssertionError(self.c.scoring_func)

    def select(self, scores_NE: Tensor) -> Tensor:
        """(N, K) experts with the highest biased score, among the topk_group groups whose two best experts (without selection biases: whose
        best expert) score highest."""
        c = self.c
        choice = scores_NE.detach() + self.e_score_correction_bias
        if c.n_group > 1:
            grouped = choice.unflatten(-1, (c.n_group, -1))
            best = grouped.topk(min(1 + c.selection_bias, grouped.shape[-1]), -1).values.sum(-1).topk(c.topk_group, -1).indices
            closed = torch.ones_like(choice[:, : c.n_group], dtype=torch.bool).scatter_(-1, best, False)
            choice = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
        return choice.topk(c.num_experts_per_tok, -1, sorted=False).indices

    def forward(self, x_ND: Tensor) -> Routing:
        scores = self.scores(x_ND)
        experts = self.select(scores) if self.replayed_NK is None else self.replayed_NK
        weights = scores.gather(-1, experts)
        if self.c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.training and self.counting:
            with torch.no_grad():
                self.tokens_per_expert += torch.bincount(experts.flatten(), minlength=self.c.n_routed_experts)
        return Routing(weights * self.c.routed_scaling_factor, experts, scores)


class RouterElsewhere(Router):
    """Stands for a router on another rank: it gets the counts that all ranks add up, and is neither learned nor saved."""

    def __init__(self, c: ModelConfig):
        super().__init__(c)
        del self.weight

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        pass

    def _load_from_state_dict(self, *_) -> None:
        pass


def sequence_balance_loss(scores_NE: Tensor, c: ModelConfig, sequences: int) -> Tensor:
    """Sum_i f_i P_i of each sequence, averaged over sequences (DeepSeek-V3 eq. 17-20); f counts the top-k of the unbiased scores."""
    scores_BTE = scores_NE.unflatten(0, (sequences, -1))
    chosen = scores_BTE.detach().topk(c.num_experts_per_tok, -1).indices
    length = scores_BTE.shape[1]
    hits = torch.zeros(sequences, c.n_routed_experts, device=scores_NE.device).scatter_add_(
        1, chosen.flatten(1), torch.ones((), device=scores_NE.device).expand(sequences, chosen[0].numel())
    )
    f = hits * (c.n_routed_experts / (c.num_experts_per_tok * length))
    p = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    return (f * p).sum(-1).mean()


_known: WeakKeyDictionary[nn.Module, list[Router]] = WeakKeyDictionary()


def routers(model: nn.Module, anew: bool = False) -> list[Router]:
    """The routers of a model in layer order, those of MTP modules last. Remembered: a walk over all modules takes milliseconds. anew: its
    modules have changed."""
    if anew or model not in _known:
        _known[model] = [m for m in model.modules() if isinstance(m, Router)]
    return _known[model]


@contextmanager
def not_counting(model: nn.Module):
    """Forward passes that must not count towards the balance: recomputation, evaluation in training mode."""
    mine = routers(model)
    before = [r.counting for r in mine]
    for router in mine:
        router.counting = False
    try:
        yield
    finally:
        for router, value in zip(mine, before, strict=True):
            router.counting = value


@torch.no_grad()
def update_biases(model: nn.Module, rate: float) -> list[float]:
    """One loss-free step: b += rate * sign(mean load - load), centred so that the biases' sum stays 0; the counts start anew.

    Call once per optimizer step, with the counts summed over ranks where there are several. Returns each layer's MaxVio = max load / mean
    load - 1 (arXiv 2408.15664 §3). Layers that saw no token keep their bias, and routers without one have none to move.
    """
    violations = []
    for router in routers(model):
        load = router.tokens_per_expert
        mean = load.mean()
        if mean > 0:
            if router.c.selection_bias and rate:  # adding nothing would still make a negative zero positive
                delta = torch.sign(mean - load) * rate
                router.e_score_correction_bias += delta - delta.mean()
            violations.append(float(load.max() / mean - 1.0))
        else:
            violations.append(0.0)
        router.tokens_per_expert.zero_()
    return violations


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
        if products.even(*self.gate_proj.shape()) and native.usable(x_BTD):
            return dense_feed_forward(x_BTD, norm.weight, norm.eps, self.operands)
        return x_BTD + self(norm(x_BTD))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(side_by_side(x, self.gate_proj, self.up_proj)))


class ChosenExpert(nn.Module):
    """An expert that learns where others of its layer do not: parameters over the memory of the layer's stacks, (1, 2F, D) and (1, D, F).

    The stacks are what is saved and loaded, so a state dict has nothing of this."""

    def __init__(self, stacks: Experts, number: int):
        super().__init__()
        for name in stacks.weights:
            self.register_parameter(name, nn.Parameter(getattr(stacks, name).data[number : number + 1]))

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        pass

    def _load_from_state_dict(self, *_) -> None:
        pass


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
        self.chosen = nn.ModuleDict()
        """Where only some learn: those, by number."""

    def learn_only(self, numbers: Iterable[int]) -> None:
        """From here on these experts learn, and no other. Optimizers see a parameter of each, and nothing of the others."""
        for name in self.weights:
            getattr(self, name).requires_grad_(False)
        self.chosen = nn.ModuleDict({str(number): ChosenExpert(self, number) for number in numbers})

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for number, expert in self.chosen.items():  # on another device the stacks have other memory
            for name, parameter in expert.named_parameters():
                parameter.data = getattr(self, name).data[int(number) : int(number) + 1]
        return self

    def _operand(self, name: str, by) -> Operand:
        if not self.chosen:
            return super()._operand(name, by)
        return Chosen(Weight(getattr(self, name), by), {int(number): getattr(expert, name) for number, expert in self.chosen.items()})

    def forward(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        return mixture(x_ND, *self.operands(products.Plain), weights_NK, experts_NK, self.dispatcher)

    def operands(self, by=products.FLOATS) -> tuple[Operand, Operand]:
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
