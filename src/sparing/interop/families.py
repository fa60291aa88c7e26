"""The model families of transformers that Sparing reads and writes, one table each.

A family says how its config.json spells our fields, which settings it must have for our model to compute the same, and how its rotary
dimensions are paired. `hf_config` and `hf_tensors` read these tables, so that a new family is a new entry here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparing.base.config import ModelConfig, UserError
from sparing.base.layers import mixtures

Keys = dict[str, tuple]
"""Our field -> (key in config.json, type[, default where it is absent or null])."""

_EVERY: Keys = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("hidden_size", int),
    "num_layers": ("num_hidden_layers", int),
    "intermediate_size": ("intermediate_size", int),
    "num_heads": ("num_attention_heads", int),
    "max_position_embeddings": ("max_position_embeddings", int),
    "rms_norm_eps": ("rms_norm_eps", float, 1e-6),
    "tie_word_embeddings": ("tie_word_embeddings", bool, False),
}
_LATENT: Keys = {
    "q_lora_rank": ("q_lora_rank", int, None),
    "kv_lora_rank": ("kv_lora_rank", int),
    "qk_nope_head_dim": ("qk_nope_head_dim", int),
    "qk_rope_head_dim": ("qk_rope_head_dim", int),
    "v_head_dim": ("v_head_dim", int),
}
_GROUPED: Keys = {
    "num_kv_heads": ("num_key_value_heads", int, None),  # None: as many as there are query heads
    "head_dim": ("head_dim", int, None),  # None: hidden_size / num_heads
}
_EXPERTS: Keys = {
    "num_dense_layers": ("first_k_dense_replace", int),
    "n_routed_experts": ("n_routed_experts", int),
    "n_shared_experts": ("n_shared_experts", int, 0),
    "num_experts_per_tok": ("num_experts_per_tok", int),
    "moe_intermediate_size": ("moe_intermediate_size", int),
    "n_group": ("n_group", int, 1),
    "topk_group": ("topk_group", int, 1),
    "norm_topk_prob": ("norm_topk_prob", bool, True),
    "routed_scaling_factor": ("routed_scaling_factor", float),
    "mtp_depth": ("num_nextn_predict_layers", int, None),  # None: the spelling of transformers 5, num_mtp_layers, or none at all
}
_FIXED = {"hidden_act": "silu", "attention_bias": False}
_FIXED_EXPERTS = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers."""

    architecture: str
    """The class in config.json's `architectures`."""
    attention: Literal["mla", "gqa"]
    keys: Keys
    fixed: dict[str, object]
    """Settings that our model has no choice about: written as they are here, and refused with any other value."""
    halves: bool
    """Rotary dimensions are paired (i, i + d/2), as Llama does; otherwise (2i, 2i + 1)."""
    rotated: float = 1.0
    """Share of a head that is rotated where `partial_rotary_factor` is absent. We rotate whole heads, so 1.0 alone is supported."""

    @property
    def experts(self) -> bool:
        """Whether it has mixture-of-experts layers and MTP modules; without any it is a dense model all the same."""
        return "n_routed_experts" in self.keys


FAMILIES = {
    "deepseek_v3": Family("DeepseekV3ForCausalLM", "mla", {**_EVERY, **_LATENT, **_EXPERTS}, {**_FIXED, **_FIXED_EXPERTS}, halves=False),
    "llama": Family("LlamaForCausalLM", "gqa", {**_EVERY, **_GROUPED}, {**_FIXED, "mlp_bias": False}, halves=True),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        "gqa",
        {**_EVERY, **_GROUPED, **_EXPERTS},
        {**_FIXED, **_FIXED_EXPERTS, "use_qk_norm": False, "partial_rotary_factor": 1.0},
        halves=True,
        rotated=0.5,
    ),
}
"""By `model_type`. A model is exported as the first one that computes it."""


def family_of(config: ModelConfig) -> str:
    """The `model_type` that computes what `config` does. Raises UserError where there is none."""
    dense = not mixtures(config)
    if not dense and config.scoring_func != "sigmoid":
        raise UserError(f"--format hf: no transformers type has a {config.scoring_func} gate with a selection bias; only sigmoid exports")
    name = next(name for name, family in FAMILIES.items() if family.attention == config.attention and (family.experts or dense))
    if name == "llama" and config.hidden_size % config.num_heads:
        raise UserError(
            f"--format hf: transformers' llama wants hidden_size ({config.hidden_size}) to be a multiple of num_heads ({config.num_heads})"
        )
    return name
