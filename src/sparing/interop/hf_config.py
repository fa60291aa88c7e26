"""config.json both ways: `ModelConfig` and transformers' own model types.

`deepseek_v3` says everything that multi-head latent attention with a sigmoid gate can be, all-dense models included. Grouped-query
attention goes out as `llama` (all dense) or `glm4_moe` (with experts), whose rotary layout is halves. Other gates have no type that
computes the same, so they are refused. Keys are those of DeepSeek's published config.json; transformers 4 and 5 both read them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sparing.base.config import ModelConfig, UserError
from sparing.base.config_limits import contradiction
from sparing.base.layers import layers, mixtures
from sparing.interop.hf_fields import Fields
from sparing.interop.hf_rope import rope_from_hf, rope_to_hf

ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "llama": "LlamaForCausalLM", "glm4_moe": "Glm4MoeForCausalLM"}
LATENT_NORM_EPS = 1e-6
"""transformers gives the norms of MLA's latents this epsilon whatever `rms_norm_eps` says."""


# Named alike on both sides.
MLA_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
MOE_KEYS = (
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)


@dataclass(frozen=True)
class Layout:
    """How a checkpoint's tensors are to be read, besides the model's shape."""

    halves: bool = False
    """Rotary dimensions paired (i, i + d/2) and not (2i, 2i + 1)."""
    block: tuple[int, int] = (128, 128)
    """Rows and columns that share one FP8 factor."""


def hf_type(config: ModelConfig) -> str:
    """transformers' model type that computes the same; UserError if there is none."""
    dense = not mixtures(config)
    if not dense and config.scoring_func != "sigmoid":
        raise UserError(f"--format hf: no transformers type has a {config.scoring_func} gate with a selection bias; only sigmoid exports")
    if config.attention == "mla":
        return "deepseek_v3"
    if dense and config.hidden_size % config.num_heads:
        raise UserError(
            f"--format hf: transformers' llama wants hidden_size ({config.hidden_size}) to be a multiple of num_heads ({config.num_heads})"
        )
    return "llama" if dense else "glm4_moe"


def to_hf(config: ModelConfig, dtype: str, eos: int | None) -> tuple[dict, list[str]]:
    """-> (config.json, notes). dtype: float32, bfloat16 or float8. eos: id of the end-of-text token, which also begins documents."""
    kind = hf_type(config)
    notes = []
    depth = config.mtp_depth
    if depth and kind == "llama":
        notes.append(f"llama has no multi-token prediction: the {depth} MTP module(s) are left out, the logits do not change")
        depth = 0
    raw: dict = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads if config.attention == "mla" else config.num_kv_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **rope_to_hf(config),
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": 0.006 if config.init == "deepseek" else 0.02,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "bos_token_id": eos,
        "eos_token_id": eos,
        "torch_dtype": "bfloat16" if dtype == "float8" else dtype,
    }
    if kind == "deepseek_v3":
        raw |= {key: getattr(config, key) for key in MLA_KEYS}
        if abs(config.rms_norm_eps - LATENT_NORM_EPS) > 1e-12:
            notes.append(f"transformers uses an epsilon of {LATENT_NORM_EPS} in the latents' norms; this model's is {config.rms_norm_eps}")
    else:
        raw["head_dim"] = config.head_dim
    if kind == "llama":
        raw["mlp_bias"] = False
    else:
        raw |= {key: getattr(config, key) for key in MOE_KEYS}
        # An all-dense model's MTP modules are dense too, and they are layers num_layers, num_layers + 1, ...
        raw["first_k_dense_replace"] = sum(not layer.mixture for layer in layers(config))
        raw |= {"moe_layer_freq": 1, "ep_size": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": depth}
    if kind == "glm4_moe":
        raw |= {"use_qk_norm": False, "partial_rotary_factor": 1.0}
    if dtype == "float8":
        raw["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    return raw, notes


def from_hf(raw: dict, where: Path) -> tuple[ModelConfig, Layout]:
    """config.json -> (our config, how to read its tensors); UserError for what this model cannot compute. `where` is for messages."""
    fields = Fields(raw, where)
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise fields.fail(f"model_type is {kind!r}, supported: {', '.join(ARCHITECTURES)}")
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    heads = fields.get("num_attention_heads", int)
    config = ModelConfig(
        vocab_size=fields.get("vocab_size", int),
        hidden_size=fields.get("hidden_size", int),
        num_layers=fields.get("num_hidden_layers", int),
        num_dense_layers=fields.get("num_hidden_layers", int),
        intermediate_size=fields.get("intermediate_size", int),
        num_heads=heads,
        max_position_embeddings=fields.get("max_position_embeddings", int),
        rms_norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        tie_word_embeddings=fields.get("tie_word_embeddings", bool, False),
    )
    halves = kind != "deepseek_v3"
    if kind == "deepseek_v3":
        fields.only("num_key_value_heads", heads)
        halves = not fields.get("rope_interleave", bool, True)
        sizes = {key: fields.get(key, int) for key in MLA_KEYS if key != "q_lora_rank"}
        config = replace(config, attention="mla", num_kv_heads=heads, q_lora_rank=fields.get("q_lora_rank", int, None), **sizes)
    else:
        fields.only("partial_rotary_factor", 1.0)
        head_dim = fields.get("head_dim", int, config.hidden_size // max(heads, 1))
        config = replace(config, attention="gqa", num_kv_heads=fields.get("num_key_value_heads", int, heads), head_dim=head_dim)
    if kind == "llama":
        fields.only("mlp_bias", False)
    else:
        config = _moe_from(fields, config)
    if kind == "glm4_moe":
        fields.only("use_qk_norm", False)
        rope = raw.get("rope_parameters")
        if raw.get("partial_rotary_factor") is None and not (isinstance(rope, dict) and "partial_rotary_factor" in rope):
            raise fields.fail("partial_rotary_factor is absent, which means 0.5 for glm4_moe; supported: 1.0")
    config = rope_from_hf(fields, config)
    _check(fields, config)
    return config, Layout(halves, _block_from(fields))


def _check(fields: Fields, c: ModelConfig) -> None:
    """Sizes that contradict each other or that no tensor can have."""
    theirs = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
    wrong = contradiction(c, lambda name: theirs.get(name, name))
    if wrong:
        raise fields.fail(wrong)


def _moe_from(fields: Fields, config: ModelConfig) -> ModelConfig:
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    fields.only("moe_layer_freq", 1)
    # transformers 5 names the same thing num_mtp_layers in its Python class, and writes either.
    depth = fields.get("num_nextn_predict_layers", int, fields.get("num_mtp_layers", int, 0))
    return replace(
        config,
        num_dense_layers=min(fields.get("first_k_dense_replace", int), config.num_layers),
        n_routed_experts=fields.get("n_routed_experts", int),
        n_shared_experts=fields.get("n_shared_experts", int, 0),
        num_experts_per_tok=fields.get("num_experts_per_tok", int),
        moe_intermediate_size=fields.get("moe_intermediate_size", int),
        n_group=fields.get("n_group", int, 1),
        topk_group=fields.get("topk_group", int, 1),
        scoring_func="sigmoid",
        norm_topk_prob=fields.get("norm_topk_prob", bool, True),
        routed_scaling_factor=fields.get("routed_scaling_factor", float),
        mtp_depth=depth,
    )


def _block_from(fields: Fields) -> tuple[int, int]:
    quantisation = fields.raw.get("quantization_config")
    if quantisation is None:
        return Layout.block
    if not isinstance(quantisation, dict) or quantisation.get("quant_method") != "fp8":
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise fields.fail(f"quantization_config has the method {method!r}, supported: 'fp8' (block-scaled)")
    block = quantisation.get("weight_block_size") or list(Layout.block)
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise fields.fail(f"weight_block_size is {block!r}, expected two whole numbers such as [128, 128]")
    return block[0], block[1]
