"""DeepSeek-V3's own config.json, and how many tensors its checkpoint has."""

from __future__ import annotations

from pathlib import Path

from sparing.base.config import TokensConfig, YarnConfig
from sparing.interop.hf_config import from_hf, to_hf
from sparing.interop.hf_tensors import published_tensors

PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
    "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def test_reading_and_writing_the_published_config():
    config, format = from_hf(PUBLISHED, Path("config.json"))
    assert (config.num_layers, config.num_dense_layers, config.mtp_depth) == (61, 3, 1)
    assert config.yarn == YarnConfig(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert format.block == (128, 128)
    assert not format.halves
    written, notes = to_hf(config, "float8", TokensConfig(0, True, (1,)))
    assert notes == []
    extra = {"aux_loss_alpha", "seq_aux", "pretraining_tp"}  # the business of training
    for key, value in PUBLISHED.items():
        if key == "rope_scaling":
            assert value.items() <= written[key].items()
        elif key not in extra:
            assert written[key] == value, key


def test_the_checkpoint_has_91991_tensors():
    """As many as the published index of DeepSeek-R1 (same shape) lists, FP8 factors and the MTP module's copies included."""
    tensors = published_tensors(from_hf(PUBLISHED, Path("config.json"))[0])
    assert len({one.name for one in tensors}) == len(tensors)
    assert len(tensors) + sum(one.eight_bit for one in tensors) == 91_991
