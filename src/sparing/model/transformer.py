"""The whole model: embedding, layers, norm, head, and the multi-token-prediction modules behind them (DeepSeek-V3 §2.2)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparing.base.config import ModelConfig
from sparing.base.layers import Layer, layers
from sparing.kernels.attention import DocumentMask
from sparing.kernels.products import Frozen
from sparing.kernels.vocabulary import logits_of, token_nll
from sparing.model.attention import GQA, MLA
from sparing.model.experts import MLP, MoE, not_counting
from sparing.model.linear import Embedding, Linear, RMSNorm
from sparing.model.rope import rotary_table
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

    def _forward(self, x: Tensor, table: Tensor, mask: DocumentMask | None, want_balance: bool):
        x = self.self_attn.residual(x, self.input_layernorm, table, mask)
        losses: list[Tensor] | None = [] if want_balance else None
        x = self.mlp.residual(x, self.post_attention_layernorm, losses)
        return x, (losses[0] if losses else None)

    def forward(
        self, x_BTD: Tensor, table: Tensor, mask: DocumentMask | None = None, want_balance: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """-> (x (B,T,D), the sequence-wise balance loss of a MoE layer where wanted)."""
        if self.recompute and torch.is_grad_enabled():
            rest = (table, mask, want_balance)
            if torch.compiler.is_compiling():  # it knows this one
                return checkpoint(
                    self._forward, x_BTD, *rest, use_reentrant=False, context_fn=lambda: (torch.enable_grad(), not_counting(self))
                )
            modules = self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp
            return _Again.apply(self, rest, x_BTD, *(p for module in modules for p in module.parameters() if p.requires_grad))
        with kept_in_int8() if self.int8_activations and torch.is_grad_enabled() else nullcontext():
            return self._forward(x_BTD, table, mask, want_balance)


class _Again(torch.autograd.Function):
    """A block that keeps its input alone, and makes the rest again in the backward pass. `torch.utils.checkpoint` does the
    same, and imports torch's compiler for it, which takes about as much memory as a small model then saves."""

    @staticmethod
    def forward(ctx, block: Block, rest: tuple, x_BTD: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor | None]:
        """rest: what `block` takes besides x; parameters: those that `_forward` uses and that learn."""
        ctx.save_for_backward(x_BTD)
        ctx.block, ctx.rest, ctx.parameters = block, rest, parameters
        return block._forward(x_BTD, *rest)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor, grad_balance: Tensor | None):
        x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[2])
        with torch.enable_grad(), not_counting(ctx.block):  # tokens were counted for the balance in the first pass
            out, balance = ctx.block._forward(x, *ctx.rest)
        outputs, given = ((out,), (grad_BTD,)) if balance is None else ((out, balance), (grad_BTD, grad_balance))
        inputs = (x, *ctx.parameters) if x.requires_grad else ctx.parameters
        grads = torch.autograd.grad(outputs, inputs, given, allow_unused=True)
        return None, None, *(grads if x.requires_grad else (None, *grads))


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


class States(NamedTuple):
    """What a forward pass leaves: hidden states, and what a multi-token-prediction module needs to go on from them."""

    hidden: Tensor
    """(B, T, D), normed: what the output head multiplies."""
    balances: list[Tensor]
    """Sequence-wise balance losses of the mixtures so far, float32 scalars; empty where none were wanted."""
    table: Tensor
    """Rotary table of the positions."""
    mask: DocumentMask | None
    want_balance: bool


class Decoder(nn.Module):
    """Named `model` in checkpoints."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList((MTPBlock if layer.mtp else Block)(c, layer) for layer in layers(c))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Transformer(nn.Module):
    """DeepSeek-V3 by `ModelConfig`. Parameters are uninitialised: use `init_weights` or load a checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.compute_dtype = torch.float32
        self.register_buffer("rotary", rotary_table(config, 0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.rotary.device

    @property
    def head_weight(self) -> Tensor | Frozen:
        """(V, D) weights of the output head, as they are held."""
        return (self.lm_head or self.model.embed_tokens).alone(self.compute_dtype)

    def set_recompute(self, on: bool) -> None:
        """Recompute each layer's activations in the backward pass instead of keeping them."""
        for block in self.model.layers:
            block.recompute = on

    def set_int8_activations(self, on: bool) -> None:
        """Keep what each layer needs for its backward pass in int8 (`sparing.precision.activations`); not where it is recomputed."""
        for block in self.model.layers:
            block.int8_activations = on

    def _table(self, length: int) -> Tensor:
        if len(self.rotary) < length:
            self.rotary = rotary_table(self.config, max(length, self.config.max_position_embeddings)).to(self.device)
        return self.rotary

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, D) in the compute type."""
        return self.model.embed_tokens(tokens_BT).to(self.compute_dtype)

    def hidden(self, tokens_BT: Tensor, documents_BT: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, D) hidden states after the last norm."""
        return self.states(tokens_BT, documents_BT, positions).hidden

    def states(
        self, tokens_BT: Tensor, documents_BT: Tensor | None = None, positions: Tensor | None = None, want_balance: bool = False
    ) -> States:
        """(B, T) token ids through the main layers. documents_BT: pieces with different numbers do not see each other. positions: (T,) or
        (B, T), default 0, 1, 2, ..."""
        everything = range(self.config.num_layers)
        states = self.through(everything, self.embed(tokens_BT), documents_BT, positions, want_balance)
        return states._replace(hidden=self.model.norm(states.hidden))

    def through(
        self, layers: Iterable[int], x_BTD: Tensor, documents_BT: Tensor | None = None, positions: Tensor | None = None,
        want_balance: bool = False,
    ) -> States:  # fmt: skip
        """Hidden states through some of the main layers, by number. What it gives is not normed."""
        length = x_BTD.shape[1]
        table = self._table(length)[:length] if positions is None else self._table(int(positions.max()) + 1)[positions]
        mask, balances = DocumentMask.of(documents_BT, self.compute_dtype), []
        for i in layers:
            x_BTD, balance = self.model.layers[i](x_BTD, table, mask, want_balance)
            if balance is not None:
                balances.append(balance)
        return States(x_BTD, balances, table, mask, want_balance)

    def next_depth(self, before: States, k: int, tokens_BT: Tensor) -> States:
        """One token further by MTP module `k`, from the depth before it. tokens_BT: the token after each position of that depth."""
        block: MTPBlock = self.model.layers[self.config.num_layers + k]
        x = block.join(self.embed(tokens_BT), before.hidden)
        x, balance = block(x, before.table, before.mask, before.want_balance)
        balances = before.balances if balance is None else [*before.balances, balance]
        # The next depth gets it normed, as the first gets the main model's.
        return before._replace(hidden=block.shared_head.norm(x), balances=balances)

    def forward(self, tokens_BT: Tensor, documents_BT: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, V) float32 logits."""
        x = self.hidden(tokens_BT, documents_BT, positions)
        return logits_of(x, self.head_weight).float()

    @torch.no_grad()
    def nll(self, tokens_BT: Tensor, targets_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Cross-entropy of every target, (B, T) float32 nats; 0 where the target is -100."""
        x = self.hidden(tokens_BT, documents_BT)
        return token_nll(x.flatten(0, 1), self.head_weight, targets_BT.flatten()).view_as(targets_BT)
