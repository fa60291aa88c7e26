"""The model families of transformers that Sparing reads and writes, one table each.

A family says how its config.json spells our fields, which settings it must have for our model to compute the same, and how its rotary
dimensions are paired. `hf_config` and `hf_tensors` read these tables, so that a new family is a new entry here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    "num_kv_heads": ("num_key_value_heads", int),
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
    "routed_scaling_factor": ("routed_scaling_factor", float),
}
_V3_EXPERTS: Keys = _EXPERTS | {
    "norm_topk_prob": ("norm_topk_prob", bool, True),
    "mtp_depth": ("num_nextn_predict_layers", int, 0),
}
OTHER_SPELLINGS = {"num_nextn_predict_layers": "num_mtp_layers", "num_experts": "num_local_experts"}
"""Keys as transformers 5 writes some of them."""
_FIXED = {"hidden_act": "silu", "attention_bias": False}
_FIXED_BIAS = {"hidden_act": "silu", "mlp_bias": False}
_V3_FIXED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
_V3_GATE = {"scoring_func": "sigmoid", "selection_bias": True}
_SOFTMAX_GATE = {"scoring_func": "softmax", "selection_bias": False}

OPTIONAL = {"attention_bias": False, "head_norm": False, "partial_rotary_factor": 1.0}
"""Parts of a model that most families do not have: our field -> its value without the part."""


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
    ours: dict[str, object] = field(default_factory=dict)
    """Our fields that all its models agree in, and that no key says."""
    window: Literal["no", "yes", "switch"] = "no"
    """Whether config.json may ask for attention to the last `sliding_window` tokens only: by that key, or where `use_sliding_window` is
    true."""
    whole_heads: bool = False
    """transformers wants hidden_size to be a multiple of the number of heads."""

    @property
    def experts(self) -> bool:
        """Whether it has mixture-of-experts layers; without any it is a dense model all the same."""
        return "n_routed_experts" in self.keys

    def differences(self, config: ModelConfig) -> dict[str, object]:
        """What our config has to be changed in so that the family computes it: our field -> the family's value."""
        needed = {name: value for name, value in (OPTIONAL | self.ours).items() if name not in self.keys}
        if not mixtures(config):
            needed = {name: value for name, value in needed.items() if name in OPTIONAL}  # no layer has a gate
        return {name: value for name, value in needed.items() if getattr(config, name) != value}


FAMILIES = {
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM", "mla", {**_EVERY, **_LATENT, **_V3_EXPERTS}, {**_FIXED, **_V3_FIXED}, halves=False, ours=_V3_GATE
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        "mla",
        {**_EVERY, **_LATENT, **_EXPERTS},
        {**_FIXED, "mlp_bias": False, "scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1},
        halves=False,
        ours={**_SOFTMAX_GATE, "norm_topk_prob": False},
        whole_heads=True,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        "gqa",
        {**_EVERY, **_GROUPED, "num_kv_heads": ("num_key_value_heads", int, None)},  # None: as many as there are query heads
        {**_FIXED, "mlp_bias": False},
        halves=True,
        whole_heads=True,
    ),
    "mistral": Family("MistralForCausalLM", "gqa", {**_EVERY, **_GROUPED}, _FIXED, halves=True, window="yes"),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "gqa",
        {**_EVERY, **_GROUPED},
        _FIXED_BIAS,
        halves=True,
        ours={"attention_bias": True},
        window="switch",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "gqa",
        {**_EVERY, **_GROUPED, "head_dim": ("head_dim", int, 128)},
        _FIXED,
        halves=True,
        ours={"head_norm": True},
        window="switch",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "gqa",
        {
            **_EVERY,
            **_GROUPED,
            "n_routed_experts": ("num_experts", int),
            "num_experts_per_tok": ("num_experts_per_tok", int),
            "moe_intermediate_size": ("moe_intermediate_size", int),
            "norm_topk_prob": ("norm_topk_prob", bool, False),
        },
        {**_FIXED, "decoder_sparse_step": 1},
        halves=True,
        ours={"head_norm": True, **_SOFTMAX_GATE, "n_shared_experts": 0, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
        window="switch",
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        "gqa",
        {
            **_EVERY,
            "rms_norm_eps": ("rms_norm_eps", float, 1e-5),
            **_GROUPED,
            **_V3_EXPERTS,
            "attention_bias": ("attention_bias", bool, False),
            "head_norm": ("use_qk_norm", bool, False),
            "partial_rotary_factor": ("partial_rotary_factor", float, 0.5),
        },
        {"hidden_act": "silu", **_V3_FIXED},
        halves=True,
        ours=_V3_GATE,
    ),
}
"""By `model_type`. A model is exported as the first one that computes it; mistral's computes what llama's does."""


def family_of(config: ModelConfig) -> str:
    """The `model_type` that computes what `config` does. Raises UserError where there is none."""
    dense = not mixtures(config)
    candidates = {name: f for name, f in FAMILIES.items() if f.attention == config.attention and (f.experts or dense)}
    differences = {name: family.differences(config) for name, family in candidates.items()}
    nearest = min(differences, key=lambda name: len(differences[name]))
    if wrong := differences[nearest]:
        has = ", ".join(f"{name} {getattr(config, name)}" for name in wrong)
        needs = ", ".join(f"{name} {value}" for name, value in wrong.items())
        raise UserError(f"--format hf: no model type of transformers has {has} beside the rest; the nearest, {nearest}, has {needs}")
    if FAMILIES[nearest].whole_heads and config.hidden_size % config.num_heads:
        raise UserError(
            f"--format hf: transformers' {nearest} wants hidden_size ({config.hidden_size}) to be a multiple of num_heads"
            f" ({config.num_heads})"
        )
    return nearest
