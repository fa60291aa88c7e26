"""One decoder layer, and the multi-token-prediction module built from one (DeepSeek-V3 §2.2)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparing.base.config import ModelConfig
from sparing.base.layers import Layer
from sparing.kernels.attention import DocumentMask
from sparing.model.attention import GQA, MLA, LayerCache
from sparing.model.experts import MLP, MoE
from sparing.model.linear import Linear, RMSNorm
from sparing.model.router import not_counting
from sparing.precision.activations import kept_in_int8


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, c: ModelConfig, layer: Layer):
        super().__init__()
        attention, feed_forward = layer.attention, layer.feed_forward
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = (MLA if attention.kind == "mla" else GQA)(c, attention.shapes)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MoE(c, feed_forward) if layer.mixture else MLP(feed_forward.hidden, feed_forward.width)
        self.recompute = self.int8_activations = False

    def _forward(self, x: Tensor, table: Tensor, mask: DocumentMask | None, cache: LayerCache | None, want_balance: bool):
        x = self.self_attn.residual(x, self.input_layernorm, table, mask, cache)
        losses: list[Tensor] | None = [] if want_balance else None
        x = self.mlp.residual(x, self.post_attention_layernorm, losses)
        return x, (losses[0] if losses else None)

    def forward(
        self, x_BTD: Tensor, table: Tensor, mask: DocumentMask | None = None, cache: LayerCache | None = None, want_balance: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """-> (x (B,T,D), the sequence-wise balance loss of a MoE layer where wanted)."""
        if self.recompute and torch.is_grad_enabled():
            # The second pass must not count tokens for the balance again.
            return checkpoint(
                self._forward, x_BTD, table, mask, cache, want_balance,
                use_reentrant=False, context_fn=lambda: (torch.enable_grad(), not_counting(self)),
            )  # fmt: skip
        with kept_in_int8() if self.int8_activations and torch.is_grad_enabled() else nullcontext():
            return self._forward(x_BTD, table, mask, cache, want_balance)


class SharedHead(nn.Module):
    """The norm before the output head, which itself is the main model's."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class MTPBlock(Block):
    """Predicts one token further from the previous depth's hidden state and the embedding of the token in between.

    The projection takes [enorm(embedding); hnorm(hidden)], the published checkpoints' order, which is not the paper's.
    """

    def __init__(self, c: ModelConfig, layer: Layer):
        super().__init__(c, layer)
        self.enorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.hnorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.eh_proj = Linear.shaped(layer.shapes["eh_proj.weight"])
        self.shared_head = SharedHead(c)

    def join(self, embedded_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
        return self.eh_proj(torch.cat((self.enorm(embedded_BTD), self.hnorm(hidden_BTD)), -1))
