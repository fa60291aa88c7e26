"""The model over a paged cache in plain PyTorch: the reference for the compiled network, and what runs on GPUs and without a C compiler.

Attention is the absorbed form (DeepSeek-V2 §2.1.2, arXiv 2405.04434): queries are carried into the latent space, so that a cached token
is its latent and shared rotated key, and keys and values are never expanded. Grouped queries are the same with several key heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.base.config import ModelConfig
from sparing.base.layers import layers
from sparing.infer.cache import BLOCK
from sparing.model.experts import MoE
from sparing.model.rope import rotary_table, rotate, softmax_scale
from sparing.model.transformer import Transformer


@dataclass
class Rows:
    """One step's work: tokens of several texts side by side, those of one text together and in order."""

    tables: list[list[int]] = field(default_factory=list)
    """Each text's cache blocks."""
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    """Index into `tables`."""
    wanted: list[int] = field(default_factory=list)
    """Rows whose logits are wanted."""
    first: list[int] = field(default_factory=list)
    """The first position that each row sees; empty: 0 for all."""
    shares: dict[int, np.ndarray] = field(default_factory=dict)
    """`thinned` shares of every layer, MTP's included, (layers,) float32, of texts that do not use all experts that the router chose."""

    def add(self, table: list[int], tokens: list[int], start: int, wanted: int, shares: np.ndarray | None = None) -> None:
        """`tokens` of the text with this table, from position `start`; logits of the last `wanted` of them."""
        first, count = len(self.tokens), len(tokens)
        self.tokens += tokens
        self.positions += range(start, start + count)
        self.owners += [len(self.tables)] * count
        if shares is not None:
            self.shares[len(self.tables)] = shares
        self.tables.append(table)
        self.wanted += range(first + count - wanted, first + count)


def thinned(weights_NK: Tensor, share_N: Tensor, floor: int) -> Tensor:
    """Gate weights, 0 for the experts left out: what stays are the fewest of a row, heaviest first, that carry its share of the row's
    weight, `floor` at the least. A share of 1 or more leaves none out."""
    ranked, order = weights_NK.sort(dim=-1, descending=True, stable=True)
    carried = ranked.cumsum(-1) - ranked  # by those before
    kept = carried < share_N[:, None] * ranked.sum(-1, keepdim=True)
    kept[:, :floor] = True
    kept[share_N >= 1] = True
    return weights_NK * torch.zeros_like(weights_NK).scatter_(-1, order, kept.float())


def cache_width(c: ModelConfig) -> int:
    """Numbers that a cached token needs in each layer."""
    return layers(c)[0].attention.cache_width


class TorchNetwork:
    """`forward` and `draft` for `Rows`, on the device of the weights. Its products are PyTorch's: a row's result may differ in the last
    bit with the rows beside it."""

    exact = False
    """Whether a row's logits depend on nothing but its text."""
    threads = 1

    floor = 1
    """Experts that are used in every layer, whatever the shares of `Rows`."""

    def __init__(self, model: Transformer, blocks: int):
        self.model, self.c, self.device = model.eval(), model.config, model.head_weight.device
        shape = (len(layers(model.config)), blocks, BLOCK, cache_width(model.config))
        self.cache = torch.empty(shape, dtype=model.compute_dtype, device=self.device)
        self.table = rotary_table(model.config, model.config.max_position_embeddings).to(self.device)
        self.scale = softmax_scale(model.config)

    def close(self) -> None:
        """Nothing to give back."""

    def metrics(self) -> dict[str, int]:
        return {}

    @torch.inference_mode()
    def forward(self, rows: Rows) -> np.ndarray:
        """(wanted, V) float32 logits; the cache holds the rows afterwards, `hidden` their last hidden states (rows, D)."""
        x = self._run(self._embed(rows), rows, range(self.c.num_layers))
        return self._logits(self.model.model.norm(x), rows)

    @torch.inference_mode()
    def draft(self, rows: Rows, before: np.ndarray) -> np.ndarray:
        """The same from the MTP module: each row's token is the one after its position, `before` the hidden state at its position."""
        at = self.c.num_layers
        module = self.model.model.layers[at]
        x = module.join(self._embed(rows), torch.from_numpy(before).to(self.device, self.model.compute_dtype))
        return self._logits(module.shared_head.norm(self._run(x, rows, [at])), rows)

    def _embed(self, rows: Rows) -> Tensor:
        tokens = torch.tensor(rows.tokens, device=self.device)
        return F.embedding(tokens, self.model.model.embed_tokens.weight).to(self.model.compute_dtype)

    def _logits(self, x: Tensor, rows: Rows) -> np.ndarray:
        if self.c.mtp_depth:
            self.hidden = x.float().cpu().numpy()
        return F.linear(x[rows.wanted], self.model.head_weight.to(x.dtype)).float().cpu().numpy()

    def _run(self, x: Tensor, rows: Rows, layers: Iterable[int]) -> Tensor:
        positions = torch.tensor(rows.positions, device=self.device)
        blocks = [rows.tables[o][p // BLOCK] for o, p in zip(rows.owners, rows.positions, strict=True)]
        where = (torch.tensor(blocks, device=self.device), positions % BLOCK)
        spans, start = [], 0
        for owner, table in enumerate(rows.tables):
            end = start + rows.owners.count(owner)
            seen = range(rows.first[start] if rows.first else 0, rows.positions[end - 1] + 1)
            spans.append((slice(start, end), torch.tensor(table, device=self.device), seen))
            start = end
        attention = self._latent if self.c.attention == "mla" else self._grouped
        for i in layers:
            layer = self.model.model.layers[i]
            x = x + attention(layer.self_attn, layer.input_layernorm(x), self.cache[i], where, positions, spans)
            x = x + self._feed_forward(layer.mlp, layer.post_attention_layernorm(x), [rows.shares.get(o) for o in rows.owners], i)
        return x

    def _feed_forward(self, m, x_ND: Tensor, shares: list[np.ndarray | None], i: int) -> Tensor:
        if not isinstance(m, MoE) or all(share is None for share in shares):
            return m(x_ND[None])[0]
        routing = m.gate(x_ND)
        share_N = torch.tensor([1.0 if share is None else float(share[i]) for share in shares], device=self.device)
        y = m.experts(x_ND, thinned(routing.weights_NK, share_N, self.floor), routing.experts_NK)
        return y if m.shared_experts is None else y + m.shared_experts(x_ND)

    def _latent(self, m, x_ND: Tensor, cache: Tensor, where, positions: Tensor, spans) -> Tensor:
        c = self.c
        q = m.q_proj(x_ND) if c.q_lora_rank is None else m.q_b_proj(m.q_a_layernorm(m.q_a_proj(x_ND)))
        q_nope, q_rope = q.unflatten(-1, (c.num_heads, -1)).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = m.kv_a_proj_with_mqa(x_ND).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        table = self.table[positions]
        cache[where] = torch.cat((m.kv_a_layernorm(latent), rotate(k_rope[:, None], table)[:, 0]), -1)
        up_HCK, up_HCV = m.kv_b_proj.operand.whole(q.dtype).unflatten(0, (c.num_heads, -1)).split([c.qk_nope_head_dim, c.v_head_dim], 1)
        absorbed = torch.einsum("nhk,hkc->nhc", q_nope, up_HCK)
        q = torch.cat((absorbed, rotate(q_rope, table)), -1)
        mixed = torch.empty_like(absorbed)
        for mine, blocks, seen in spans:
            keys = cache[blocks].flatten(0, 1)[seen.start : seen.stop]
            scores = torch.einsum("nhc,sc->hns", q[mine], keys)
            mixed[mine] = self._weights(scores, positions[mine], seen, "hns,sc->nhc", keys[:, : c.kv_lora_rank])
        return m.o_proj(torch.einsum("nhc,hvc->nhv", mixed, up_HCV).flatten(1))

    def _grouped(self, m, x_ND: Tensor, cache: Tensor, where, positions: Tensor, spans) -> Tensor:
        c = self.c
        table = self.table[positions]
        q = rotate(m.q_proj(x_ND).unflatten(-1, (c.num_heads, -1)), table).unflatten(1, (c.num_kv_heads, -1))
        k = rotate(m.k_proj(x_ND).unflatten(-1, (c.num_kv_heads, -1)), table)
        cache[where] = torch.cat((k.flatten(1), m.v_proj(x_ND)), -1)
        out = torch.empty_like(q)
        for mine, blocks, seen in spans:
            cached = cache[blocks].flatten(0, 1)[seen.start : seen.stop]
            keys, values = cached.unflatten(-1, (2, c.num_kv_heads, c.head_dim)).unbind(1)
            scores = torch.einsum("nghd,sgd->ghns", q[mine], keys)
            out[mine] = self._weights(scores, positions[mine], seen, "ghns,sgd->nghd", values)
        return m.o_proj(out.flatten(1))

    def _weights(self, scores: Tensor, at: Tensor, seen: range, product: str, values: Tensor) -> Tensor:
        hidden = torch.arange(seen.start, seen.stop, device=self.device) > at[:, None]
        weights = (scores.float() * self.scale).masked_fill(hidden, float("-inf")).softmax(-1).to(values.dtype)
        return torch.einsum(product, weights, values)
