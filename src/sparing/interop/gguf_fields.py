"""A GGUF file's metadata: the model's shape in `deepseek2.*` keys, and the tokenizer.

Keys: github.com/ggml-org/ggml/blob/master/docs/gguf.md and what llama.cpp's loader reads (src/models/deepseek2.cpp, src/llama-vocab.cpp).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparing.base.config import ModelConfig, UserError
from sparing.base.layers import layers, mixtures
from sparing.data.tokenizer import PATTERN, Tokenizer
from sparing.interop.hf_fields import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

GATES = {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}
"""llama.cpp's expert_gating_func; a file without the key is read as softmax."""


def exportable(config: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """-> (the model as the file will have it, notes). UserError for what `deepseek2` does not compute."""
    c, notes = config, []
    if c.attention != "mla":
        raise UserError("--format gguf is for latent attention (mla); a grouped-query model: --format hf, then llama.cpp's own converter")
    if c.q_lora_rank and (c.num_layers in (26, 27) or (c.num_layers, c.vocab_size) == (48, 128256)):
        raise UserError(
            f"--format gguf: llama.cpp takes {c.num_layers} layers (with this vocabulary) for a model without q_lora_rank, this one has one"
        )
    if c.yarn and (not c.yarn.mscale or c.yarn.mscale != c.yarn.mscale_all_dim):
        raise UserError(f"--format gguf: llama.cpp's YaRN needs mscale = mscale_all_dim, not {c.yarn.mscale} and {c.yarn.mscale_all_dim}")
    if c.mtp_depth and (not mixtures(c) or c.q_lora_rank is None):
        reason = "MTP modules without q_lora_rank" if mixtures(c) else "dense MTP modules"
        notes.append(f"llama.cpp has no {reason}: they are left out, the logits do not change")
        c = replace(c, mtp_depth=0)
    if c.mtp_depth > 1:
        notes.append(f"llama.cpp drafts with one MTP module: the first of {c.mtp_depth} is written")
        c = replace(c, mtp_depth=1)
    return c, notes


def add_shape(writer: GGUFWriter, c: ModelConfig) -> None:
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(len(layers(c)))
    writer.add_leading_dense_block_count(sum(not layer.mixture for layer in layers(c)))
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    a = layers(c)[0].attention
    writer.add_head_count(a.heads)
    writer.add_head_count_kv(1)  # absorbed: every head reads the one latent
    writer.add_q_lora_rank(a.query_rank or 0)
    writer.add_kv_lora_rank(a.latent)
    writer.add_key_length(a.cache_width)
    writer.add_value_length(a.latent)
    writer.add_key_length_mla(a.key)
    writer.add_value_length_mla(a.value)
    writer.add_rope_dimension_count(a.rope)
    writer.add_rope_freq_base(c.rope_theta)
    if c.yarn:
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(c.yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(c.yarn.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(c.yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(c.yarn.beta_slow)
        writer.add_rope_scaling_yarn_log_mul(0.1 * c.yarn.mscale_all_dim)  # the loader divides by 0.1 again
    # llama.cpp asks for these two of dense models too.
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_shared_count(max(1, c.n_shared_experts))
    if mixtures(c):
        writer.add_expert_count(c.n_routed_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
        writer.add_expert_group_count(c.n_group)
        writer.add_expert_group_used_count(c.topk_group)
        writer.add_expert_weights_scale(c.routed_scaling_factor)
        writer.add_expert_weights_norm(c.norm_topk_prob)
        writer.add_uint32(f"{writer.arch}.expert_gating_func", GATES[c.scoring_func])
    if c.mtp_depth:
        writer.add_nextn_predict_layers(c.mtp_depth)


def add_tokenizer(writer: GGUFWriter, path: Path, vocab_size: int, chat_template: str | None) -> None:
    """Byte-level BPE. UserError for another kind, and for a pre-tokeniser whose name in llama.cpp is not known here."""
    from gguf import TokenType

    tokenizer, raw = Tokenizer.load(path), read_json(path)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{path}: has a token with id {tokenizer.vocab_size - 1}, the model's vocabulary ends at {vocab_size - 1}")
    if raw["model"].get("type") != "BPE" or raw["model"].get("byte_fallback"):
        raise UserError(f"{path}: --format gguf takes byte-level BPE tokenizers, this is {raw['model'].get('type')}")
    words = {number: word for word, number in raw["model"]["vocab"].items()}
    added = {token["id"]: token for token in raw.get("added_tokens", [])}
    names, kinds = [], []
    for number in range(vocab_size):
        if number in added:
            names.append(added[number]["content"])
            kinds.append(TokenType.CONTROL if added[number].get("special") else TokenType.USER_DEFINED)
        else:
            names.append(words.get(number, f"[PAD{number}]"))
            kinds.append(TokenType.NORMAL if number in words else TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(raw, path))
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.eot_id)  # every document begins with the end-of-text token
    writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_add_bos_token(True)
    if chat_template:
        writer.add_chat_template(chat_template)


def _pre_tokenizer(raw: dict, path: Path) -> str:
    """llama.cpp's name for how text is cut into words before merging: the wrong one gives other tokens without a word of warning."""
    steps = raw.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if raw.get("normalizer") is None and steps and steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        patterns = [step.get("pattern", {}).get("Regex") for step in steps[:-1]]
        if patterns == [PATTERN] and not steps[-1].get("use_regex", True):
            return "qwen2"
        if not patterns and steps[-1].get("use_regex", True):
            return "gpt-2"
    raise UserError(f"{path}: --format gguf knows llama.cpp's names for this program's own pre-tokeniser and GPT-2's; this is another")
