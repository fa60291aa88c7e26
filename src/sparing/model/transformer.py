"""The whole model: embedding, layers, norm, head, and the multi-token-prediction modules behind them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.config import ModelConfig
from sparing.kernels.attention import DocumentMask
from sparing.kernels.cross_entropy import IGNORE, linear_cross_entropy, token_nll
from sparing.kernels.embedding import embedding
from sparing.layers import layers
from sparing.model.attention import LayerCache
from sparing.model.block import Block, MTPBlock
from sparing.model.linear import Linear, RMSNorm
from sparing.model.rope import rotary_table


class LossOutput(NamedTuple):
    """Float32 scalars. `total` is what to differentiate; the others are parts of it, detached."""

    total: Tensor
    loss: Tensor
    """Main-token cross-entropy, nats."""
    mtp_loss: Tensor
    """Mean cross-entropy over MTP depths, unweighted."""
    balance: Tensor
    """Sequence-wise balance loss, summed over layers, unweighted."""


class Decoder(nn.Module):
    """Named `model` in checkpoints."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
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
    def head_weight(self) -> Tensor:
        """(V, D) weights of the output head."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def new_cache(self) -> list[LayerCache]:
        """An empty cache for `forward`, one entry per main layer."""
        return [LayerCache() for _ in range(self.config.num_layers)]

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
            self.rotary = rotary_table(self.config, max(length, self.config.max_position_embeddings)).to(self.model.norm.weight.device)
        return self.rotary

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        return embedding(tokens_BT, self.model.embed_tokens.weight).to(self.compute_dtype)

    def hidden(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None = None,
        positions: Tensor | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Tensor:
        """(B, T) token ids -> (B, T, D) hidden states after the last norm."""
        table, mask = self._context(tokens_BT, documents_BT, positions, cache)
        x, _ = self._run(self._embed(tokens_BT), table, mask, cache, want_balance=False)
        return x

    def _context(self, tokens_BT, documents_BT, positions, cache) -> tuple[Tensor, DocumentMask | None]:
        start = cache[0].length if cache else 0
        T = tokens_BT.shape[1]
        if positions is None:
            table = self._table(start + T)[start : start + T]
        else:
            table = self._table(int(positions.max()) + 1)[positions]
        return table, DocumentMask.of(documents_BT, self.compute_dtype)

    def _run(self, x: Tensor, table: Tensor, mask: DocumentMask | None, cache, want_balance: bool) -> tuple[Tensor, list[Tensor]]:
        losses = []
        for i in range(self.config.num_layers):
            x, loss = self.model.layers[i](x, table, mask, cache[i] if cache else None, want_balance)
            if loss is not None:
                losses.append(loss)
        return self.model.norm(x), losses

    def forward(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None = None,
        positions: Tensor | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Tensor:
        """(B, T) token ids -> (B, T, V) float32 logits. positions: (T,) or (B, T), default 0.. (continuing the cache)."""
        x = self.hidden(tokens_BT, documents_BT, positions, cache)
        return F.linear(x, self.head_weight.to(x.dtype)).float()

    @torch.no_grad()
    def nll(self, tokens_BT: Tensor, targets_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Cross-entropy of every target, (B, T) float32 nats; 0 where the target is -100."""
        x = self.hidden(tokens_BT, documents_BT)
        return token_nll(x.flatten(0, 1), self.head_weight, targets_BT.flatten()).view_as(targets_BT)

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BTK: Tensor,
        documents_BT: Tensor | None = None,
        mtp_weight: float = 0.3,
        sequence_balance: float = 0.0,
        denominator: int | None = None,
        share: float = 1.0,
    ) -> LossOutput:
        """Training loss of a micro-batch.

        targets_BTK: K = 1 + mtp_depth targets a position (the token 1, 2, ... ahead), -100 where ignored. denominator: valid main targets
        of the whole optimizer step (default: of this micro-batch), so that losses and gradients add up over micro-batches exactly;
        share: of the step's sequences, how many are here; the balance loss, a mean over sequences, counts by it.
        """
        c = self.config
        table, mask = self._context(tokens_BT, documents_BT, None, None)
        if denominator is None:
            denominator = max(1, int((targets_BTK[..., 0] != IGNORE).sum()))
        x, balances = self._run(self._embed(tokens_BT), table, mask, None, want_balance=sequence_balance > 0)
        loss = linear_cross_entropy(x.flatten(0, 1), self.head_weight, targets_BTK[..., 0].flatten(), denominator)
        total, zero = loss, loss.new_zeros(())
        mtp_loss = zero
        for k in range(c.mtp_depth):
            block: MTPBlock = self.model.layers[c.num_layers + k]
            ahead = targets_BTK[..., k].clamp(min=0)  # ignored positions embed word 0: their own loss is masked
            x, balance = block(block.join(self._embed(ahead), x), table, mask, None, sequence_balance > 0)
            if balance is not None:
                balances.append(balance)
            x = block.shared_head.norm(x)  # the next depth gets it normed, as the first gets the main model's
            targets = targets_BTK[..., k + 1].flatten()
            mtp_loss = mtp_loss + linear_cross_entropy(x.flatten(0, 1), self.head_weight, targets, denominator) / c.mtp_depth
        if c.mtp_depth:
            total = total + mtp_weight * mtp_loss
        balance = torch.stack(balances).sum() * share if balances else zero
        if balances:
            total = total + sequence_balance * balance
        return LossOutput(total, loss.detach(), mtp_loss.detach(), balance.detach())
