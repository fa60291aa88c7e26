"""Where each tensor of a GGUF file of llama.cpp's `deepseek2` architecture lies in ours.

Names and shapes are what llama.cpp's loader asks for (github.com/ggml-org/llama.cpp, src/models/deepseek2.cpp): attention in its absorbed
form, so `kv_b_proj` is split into heads and its key half transposed; an MTP module is the block behind the last layer, and shares embedding
and head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sparing.base.config import ModelConfig
from sparing.base.layers import EMBED, HEAD, Attention, layers, shapes
from sparing.interop.hf_names import LAYER

TOP = {EMBED: "token_embd.weight", HEAD: "output.weight", "model.norm.weight": "output_norm.weight"}
IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
}


@dataclass(frozen=True)
class Piece:
    """One tensor of the file. `make` gets our tensor `ours` and returns it in `shape` (row length last; GGUF itself counts backwards)."""

    name: str
    ours: str
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor]

    @property
    def float32(self) -> bool:
        """Norms, routers and selection biases stay float32 in every file: llama.cpp multiplies them in float32."""
        return len(self.shape) == 1 or self.name.endswith("ffn_gate_inp.weight")


def _same(tensor: Tensor) -> Tensor:
    return tensor


def pieces(config: ModelConfig) -> list[Piece]:
    """All tensors of the file, in our order."""
    found = []
    for ours, shape in shapes(config).items():
        if ours in TOP:
            found.append(Piece(TOP[ours], ours, shape, _same))
            continue
        match = LAYER.fullmatch(ours)
        block, inner = f"blk.{match[1]}.", match[2]
        if inner == "self_attn.kv_b_proj.weight":
            found += _absorbed(layers(config)[int(match[1])].attention, block, ours)
        elif inner == "mlp.experts.gate_up_proj":
            E, width, D = shape[0], shape[1] // 2, shape[2]
            found.append(Piece(block + "ffn_gate_exps.weight", ours, (E, width, D), lambda t, w=width: t[:, :w]))
            found.append(Piece(block + "ffn_up_exps.weight", ours, (E, width, D), lambda t, w=width: t[:, w:]))
            if not config.n_shared_experts:
                found += _no_shared_expert(block, ours, width, D)
        else:
            found.append(Piece(block + IN_LAYER[inner], ours, shape, _same))
    return found


def _absorbed(a: Attention, block: str, ours: str) -> list[Piece]:
    """attn_k_b (H, latent, nope) takes a query into the latent's space, attn_v_b (H, v, latent) takes the latent out of it."""
    H, nope, v, latent = a.heads, a.nope, a.value, a.latent
    return [
        Piece(block + "attn_k_b.weight", ours, (H, latent, nope), lambda t: t.view(H, nope + v, latent)[:, :nope].transpose(1, 2)),
        Piece(block + "attn_v_b.weight", ours, (H, v, latent), lambda t: t.view(H, nope + v, latent)[:, nope:]),
    ]


def _no_shared_expert(block: str, ours: str, width: int, hidden: int) -> list[Piece]:
    """llama.cpp always adds a shared expert: one of zeros adds nothing."""
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return [Piece(f"{block}ffn_{name}_shexp.weight", ours, shape, lambda t, s=shape: t.new_zeros(s)) for name, shape in shapes.items()]
