"""Multi-head latent attention (DeepSeek-V2 §2.1, arXiv 2405.04434) and grouped-query attention (arXiv 2305.13245)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparing.base.config import ModelConfig
from sparing.base.layers import Shapes
from sparing.kernels import native, products
from sparing.kernels.attention import DocumentMask, causal_attention, grouped_attention, latent_attention
from sparing.model.linear import Linear, RMSNorm, side_by_side
from sparing.model.rope import rotate, softmax_scale


class MLA(nn.Module):
    """Multi-head latent attention; keys and values are expanded from the latent (the absorbed form belongs to inference)."""

    def __init__(self, c: ModelConfig, shapes: Shapes):
        """shapes: `layers.Attention.shapes`."""
        super().__init__()
        self.c = c
        self.scale = softmax_scale(c)
        if c.q_lora_rank is None:
            self.q_proj = Linear.shaped(shapes["q_proj.weight"])
        else:
            self.q_a_proj = Linear.shaped(shapes["q_a_proj.weight"])
            self.q_a_layernorm = RMSNorm(*shapes["q_a_layernorm.weight"], c.rms_norm_eps)
            self.q_b_proj = Linear.shaped(shapes["q_b_proj.weight"])
        self.kv_a_proj_with_mqa = Linear.shaped(shapes["kv_a_proj_with_mqa.weight"])
        self.kv_a_layernorm = RMSNorm(*shapes["kv_a_layernorm.weight"], c.rms_norm_eps)
        self.kv_b_proj = Linear.shaped(shapes["kv_b_proj.weight"])
        self.o_proj = Linear.shaped(shapes["o_proj.weight"])

    def residual(self, x_BTD: Tensor, norm: RMSNorm, table: Tensor, mask: DocumentMask | None) -> Tensor:
        """x + attention(norm(x))."""
        c = self.c
        even = products.even(c.hidden_size, c.q_lora_rank, c.kv_lora_rank, c.qk_nope_head_dim, c.v_head_dim)
        if not even or not native.usable(x_BTD):
            return x_BTD + self(norm(x_BTD), table, mask)
        if c.q_lora_rank is None:
            q = (self.q_proj.operand, None, None)
        else:
            q = (self.q_a_proj.operand, self.q_a_layernorm.weight, self.q_b_proj.operand)
        kv = (self.kv_a_proj_with_mqa.operand, self.kv_a_layernorm.weight, self.kv_b_proj.operand)
        widths = (c.num_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim)
        return latent_attention(x_BTD, norm.weight, q, kv, self.o_proj.operand, table, c.rms_norm_eps, widths, self.scale, mask)

    def forward(self, x_BTD: Tensor, table: Tensor, mask: DocumentMask | None) -> Tensor:
        c = self.c
        B, T, _ = x_BTD.shape
        first = self.q_proj if c.q_lora_rank is None else self.q_a_proj
        both = side_by_side(x_BTD, first, self.kv_a_proj_with_mqa)
        q, latent, k_rope = both.split([first.shape()[0], c.kv_lora_rank, c.qk_rope_head_dim], -1)
        if c.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q_nope, q_rope = q.unflatten(-1, (c.num_heads, -1)).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent = self.kv_a_layernorm(latent)
        k_rope = rotate(k_rope.unsqueeze(2), table).squeeze(2)
        k_nope, v = self.kv_b_proj(latent).view(B, T, c.num_heads, -1).split([c.qk_nope_head_dim, c.v_head_dim], -1)
        # Heads move to dimension 1 in the concatenation itself, so that q and k are laid out once, as attention wants them.
        q_BHTK = torch.cat((q_nope.transpose(1, 2), rotate(q_rope, table).transpose(1, 2)), -1)
        k_BHTK = torch.cat((k_nope.transpose(1, 2), k_rope.unsqueeze(1).expand(B, c.num_heads, T, -1)), -1)
        o = causal_attention(q_BHTK, k_BHTK, v.transpose(1, 2), self.scale, mask)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))


class GQA(nn.Module):
    """Grouped-query attention with the same interleaved rotary pairs; with biases and norms of the heads where the model has them."""

    def __init__(self, c: ModelConfig, shapes: Shapes):
        """shapes: `layers.Attention.shapes`."""
        super().__init__()
        self.c = c
        self.scale = softmax_scale(c)
        self.q_proj = Linear.shaped(shapes["q_proj.weight"], c.attention_bias)
        self.k_proj = Linear.shaped(shapes["k_proj.weight"], c.attention_bias)
        self.v_proj = Linear.shaped(shapes["v_proj.weight"], c.attention_bias)
        self.o_proj = Linear.shaped(shapes["o_proj.weight"])
        if c.head_norm:
            self.q_norm = RMSNorm(*shapes["q_norm.weight"], c.rms_norm_eps)
            self.k_norm = RMSNorm(*shapes["k_norm.weight"], c.rms_norm_eps)

    def residual(self, x_BTD: Tensor, norm: RMSNorm, table: Tensor, mask: DocumentMask | None) -> Tensor:
        """x + attention(norm(x))."""
        c = self.c
        if not products.even(c.hidden_size, c.head_dim) or not native.usable(x_BTD):
            return x_BTD + self(norm(x_BTD), table, mask)
        operands = (self.q_proj.operand, self.k_proj.operand, self.v_proj.operand, self.o_proj.operand)
        widths = (c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim)
        biases = (self.q_proj.bias, self.k_proj.bias, self.v_proj.bias)
        head_norms = (self.q_norm.weight, self.k_norm.weight) if c.head_norm else (None, None)
        return grouped_attention(x_BTD, norm.weight, operands, table, c.rms_norm_eps, widths, self.scale, mask, biases, head_norms)

    def queries(self, x_ND: Tensor, table: Tensor) -> Tensor:
        """(..., D) -> (..., H, K), normed and rotated."""
        q = self.q_proj(x_ND).unflatten(-1, (self.c.num_heads, self.c.head_dim))
        return rotate(self.q_norm(q) if self.c.head_norm else q, table)

    def keys(self, x_ND: Tensor, table: Tensor) -> Tensor:
        """(..., D) -> (..., key-value heads, K), normed and rotated."""
        k = self.k_proj(x_ND).unflatten(-1, (self.c.num_kv_heads, self.c.head_dim))
        return rotate(self.k_norm(k) if self.c.head_norm else k, table)

    def forward(self, x_BTD: Tensor, table: Tensor, mask: DocumentMask | None) -> Tensor:
        c = self.c
        B, T, _ = x_BTD.shape
        q, k = self.queries(x_BTD, table), self.keys(x_BTD, table)
        v = self.v_proj(x_BTD).view(B, T, c.num_kv_heads, c.head_dim)
        groups = c.num_heads // c.num_kv_heads
        k, v = (t.transpose(1, 2).repeat_interleave(groups, 1) for t in (k, v))
        o = causal_attention(q.transpose(1, 2), k, v, self.scale, mask)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))
