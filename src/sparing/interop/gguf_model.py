"""The model in a GGUF file: its shape from the metadata, and its tensors under our names. What it cannot be computed by is refused by key.

Keys and defaults are those that llama.cpp's loader reads (llama.cpp's src/llama-arch.cpp, src/llama-model.cpp, src/models). A key of the
architecture that is not in the tables here is refused, because a model that is computed without it would be another one.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparing.base.config import Llama3RopeConfig, ModelConfig, TokensConfig, UserError, YarnConfig
from sparing.base.config_file import nearest
from sparing.base.config_limits import contradiction
from sparing.base.files import file_sha256
from sparing.base.layers import layers, shapes
from sparing.base.origin import Origin
from sparing.interop.gguf import DEEPSEEK2, GATES, LLAMA, QWEN2, QWEN3, QWEN3_GATE, QWEN3_MOE, GgufTensor, gguf_tensors
from sparing.interop.gguf_reader import GgufFile
from sparing.interop.gguf_tokenizer import read_tokenizer
from sparing.interop.hf_tensors import LAYER, rotated_rows
from sparing.interop.imported import Imported, spdx
from sparing.model.rope import rotary_frequencies, yarn_mscale

ARCHITECTURES = {one.name: one for one in (LLAMA, QWEN2, QWEN3, QWEN3_MOE, DEEPSEEK2)}
MIXTURES = (QWEN3_MOE.name, DEEPSEEK2.name)
SHAPE = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
)  # fmt: skip
"""Keys of any architecture."""
EXPERTS = (
    "leading_dense_block_count", "expert_count", "expert_used_count", "expert_shared_count", "expert_feed_forward_length",
    "expert_weights_scale", "expert_weights_norm", "expert_gating_func", "expert_group_count", "expert_group_used_count",
    "nextn_predict_layers",
)  # fmt: skip
LATENT = (
    "attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla",
    "rope.scaling.yarn_log_multiplier",
)  # fmt: skip
WITHOUT_EFFECT = ("rope.scaling.finetuned", "tensor_data_layout", "use_parallel_residual", "attention.causal", "attention.sliding_window")
"""Keys that change nothing with the values that are let through."""
ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3.1's stretching of the rotary embedding, as a divisor of each frequency."""
COPIES = re.compile(r"blk\.\d+\.nextn\.(embed_tokens|shared_head_head)\.weight")


class Keys:
    """Checked access to the metadata of one architecture; each complaint is one line that names file and key."""

    def __init__(self, file: GgufFile, architecture: str):
        self.file, self.architecture = file, architecture

    def fail(self, key: str, message: str) -> UserError:
        return UserError(f"{self.file.path}: {self.architecture}.{key} {message}")

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.file.metadata

    def get(self, key: str, kind: type, *default):
        """A value of the type; `default` where it is absent (without one, absence is an error)."""
        if not self.has(key):
            if default:
                return default[0]
            raise self.fail(key, "is missing")
        value = self.file.metadata[f"{self.architecture}.{key}"]
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():  # one for each layer, all the same
            value = value[0].item()
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is int and not 0 <= value < 1 << 31) or (kind is float and not math.isfinite(value)):
            expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
            raise self.fail(key, f"is {_shown(value)}, expected {expected}")
        return value


def _shown(value: Any) -> str:
    return f"{len(value)} different values" if isinstance(value, np.ndarray | list) else repr(value)[:80]


def read_gguf(path: str | Path) -> Imported:
    """A GGUF file, checked before the first tensor is read. Raises UserError for what is damaged and what our model cannot compute."""
    try:
        import gguf  # noqa: F401  (what turns quantised blocks into floats)
    except ImportError:
        raise UserError(f"{path}: GGUF files need the gguf package: pip install 'sparing[gguf]'") from None
    model = GgufModel(GgufFile(path))
    tokenizer, tokens, chat, notes = _tokenizer(model)
    return Imported(model.config, model.tensors(), tokenizer, tokens, chat, _origin(model), [*model.notes, *notes])


def _tokenizer(model: GgufModel) -> tuple[str | None, TokensConfig | None, str | None, list[str]]:
    if model.file.metadata.get("tokenizer.ggml.model") in (None, "none"):
        return None, None, None, ["the file has no tokenizer: logits work, whatever needs text does not"]
    return read_tokenizer(model.file, model.config.vocab_size)


ADDRESSES = ("source.url", "url", "source.huggingface.repository", "repo_url", "base_model.0.repo_url")


def _origin(model: GgufModel) -> Origin:
    def text(*keys: str) -> str:
        return next((value for key in keys if isinstance(value := model.file.metadata.get(f"general.{key}"), str) and value), "")

    return Origin(
        name=text("name", "basename"),
        source=model.file.path.name,
        sha256=file_sha256(model.file.path),
        licence=spdx(text("license")),
        publisher=text("organization", "author"),
        url=text(*ADDRESSES),
    )


class GgufModel:
    """`config`, `notes`, and `tensors()` of a file whose metadata, names, shapes and types are in order."""

    def __init__(self, file: GgufFile):
        self.file, self.notes = file, []
        name = file.metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            raise UserError(f"{file.path}: general.architecture is {name!r}, supported: {', '.join(ARCHITECTURES)}")
        if parts := file.metadata.get("split.count", 0):
            if type(parts) is not int or parts > 1:
                raise UserError(f"{file.path}: is one of {parts} parts: join them first (llama-gguf-split --merge)")
        self.architecture = ARCHITECTURES[name]
        self.keys = Keys(file, name)
        self._only_known_keys()
        self.config = self._config()
        if wrong := contradiction(self.config):
            raise UserError(f"{file.path}: {wrong}")
        self.stored = self._checked()

    def _only_known_keys(self) -> None:
        name = self.architecture.name
        known = {*SHAPE, *WITHOUT_EFFECT, *(EXPERTS if name in MIXTURES else ()), *(LATENT if name == DEEPSEEK2.name else ())}
        for key in self.file.metadata:
            inner = key.removeprefix(f"{name}.")
            if inner == key or inner in known:
                continue
            if inner in EXPERTS and self.file.metadata[key] == 0:
                continue
            raise self.keys.fail(inner, f"is not supported in {name} models; nearest key that is: {nearest(inner, known)}")
        if self.keys.get("attention.causal", bool, True) is False:
            raise self.keys.fail("attention.causal", "is false: such a model writes no text")
        if self.keys.get("use_parallel_residual", bool, False):
            raise self.keys.fail("use_parallel_residual", "is true, supported: false")
        window = self.keys.get("attention.sliding_window", int, 0)
        if 0 < window < self.keys.get("context_length", int):
            raise self.keys.fail("attention.sliding_window", f"is {window}, shorter than the context: sliding windows are not supported")

    def _config(self) -> ModelConfig:
        get, stored = self.keys.get, self.file.tensors
        count, heads = get("block_count", int), get("attention.head_count", int)
        if count * 2 > len(stored):  # a layer has nine tensors at least; nothing below may grow with a number that is not true
            raise self.keys.fail("block_count", f"is {count}, and there are {len(stored)} tensors: the file is damaged")
        embedding = stored.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise UserError(f"{self.file.path}: tensor token_embd.weight is missing, or no matrix")
        modules = get("nextn_predict_layers", int, 0)
        values: dict[str, Any] = {
            "vocab_size": embedding.shape[0],
            "hidden_size": get("embedding_length", int),
            "num_layers": count - modules,
            "mtp_depth": modules,
            "intermediate_size": get("feed_forward_length", int),
            "num_heads": heads,
            "max_position_embeddings": get("context_length", int),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
            "rope_theta": get("rope.freq_base", float, 10000.0),
            "tie_word_embeddings": "output.weight" not in stored,
        }
        if self.keys.has("vocab_size") and get("vocab_size", int) != values["vocab_size"]:
            raise self.keys.fail("vocab_size", f"is {get('vocab_size', int)}, token_embd.weight has {values['vocab_size']} rows")
        if not heads or modules > count:
            raise self.keys.fail("attention.head_count" if not heads else "nextn_predict_layers", "is not possible: the file is damaged")
        values |= self._latent(heads) if self.architecture == DEEPSEEK2 else self._grouped(heads, values["hidden_size"])
        config = ModelConfig(**{"num_dense_layers": values["num_layers"]} | values)
        config = self._stretched(config)
        if COPIES.fullmatch(next(filter(COPIES.fullmatch, stored), "")) and config.mtp_depth:
            self.notes.append("the MTP module has an embedding or a head of its own: imported without it, the logits do not change")
            config = replace(config, mtp_depth=0)
        return config

    def _grouped(self, heads: int, hidden: int) -> dict[str, Any]:
        get = self.keys.get
        width = get("attention.key_length", int, hidden // heads)
        if get("attention.value_length", int, width) != width:
            raise self.keys.fail("attention.value_length", f"differs from attention.key_length ({width}), supported: the same")
        if get("rope.dimension_count", int, width) != width:
            raise self.keys.fail("rope.dimension_count", f"is {get('rope.dimension_count', int)}, supported: the whole head, {width}")
        mixture = self._softmax_gate() if self.architecture == QWEN3_MOE else {}
        return mixture | {
            "attention": "gqa",
            "num_kv_heads": get("attention.head_count_kv", int, heads),
            "head_dim": width,
            "attention_bias": "blk.0.attn_q.bias" in self.file.tensors,
            "head_norm": "blk.0.attn_q_norm.weight" in self.file.tensors,
        }

    def _softmax_gate(self) -> dict[str, Any]:
        """Qwen3's mixtures: what llama.cpp computes of them is fixed."""
        get = self.keys.get
        for key, value in (("expert_weights_scale", 1.0), ("expert_weights_norm", True), ("expert_gating_func", GATES["softmax"])):
            if get(key, type(value), value) != value:
                raise self.keys.fail(key, f"is {get(key, type(value))}, supported: {value}")
        for key in ("leading_dense_block_count", "expert_shared_count", "nextn_predict_layers"):
            if get(key, int, 0):
                raise self.keys.fail(key, f"is {get(key, int)}, supported: 0")
        return QWEN3_GATE | {
            "n_routed_experts": get("expert_count", int),
            "num_experts_per_tok": get("expert_used_count", int),
            "moe_intermediate_size": get("expert_feed_forward_length", int),
        }

    def _latent(self, heads: int) -> dict[str, Any]:
        """Files have the absorbed form (`attn_k_b`; one key-value head), or, older, `attn_kv_b` and widths of whole heads."""
        get, stored = self.keys.get, self.file.tensors
        rope = get("rope.dimension_count", int)
        experts = get("expert_count", int, 0)
        gates = {number: name for name, number in GATES.items()}
        gate, bias = get("expert_gating_func", int, GATES["softmax"]), any(name.endswith("exp_probs_b.bias") for name in stored)
        if gate not in gates:
            raise self.keys.fail("expert_gating_func", f"is {gate}, supported: {', '.join(map(str, gates))}")
        groups, used = max(1, get("expert_group_count", int, 1)), max(1, get("expert_group_used_count", int, 1))
        if groups > 1 and not bias:
            raise self.keys.fail("expert_group_count", f"is {groups} in a model without selection biases, supported: 1")
        dense = get("block_count", int) - get("nextn_predict_layers", int, 0)
        values = {
            "attention": "mla",
            "num_kv_heads": heads,
            "q_lora_rank": get("attention.q_lora_rank", int, 0) or None,
            "kv_lora_rank": get("attention.kv_lora_rank", int),
            "qk_nope_head_dim": get("attention.key_length_mla", int, get("attention.key_length", int)) - rope,
            "qk_rope_head_dim": rope,
            "v_head_dim": get("attention.value_length_mla", int, get("attention.value_length", int)),
            "num_dense_layers": min(get("leading_dense_block_count", int, 0), dense) if experts else dense,
        }
        if experts:
            values |= {
                "n_routed_experts": experts,
                "n_shared_experts": get("expert_shared_count", int, 0),
                "num_experts_per_tok": get("expert_used_count", int),
                "moe_intermediate_size": get("expert_feed_forward_length", int),
                "n_group": groups,
                "topk_group": used,
                "scoring_func": gates[gate],
                "selection_bias": bias,
                "norm_topk_prob": get("expert_weights_norm", bool, False),
                "routed_scaling_factor": get("expert_weights_scale", float, 0.0) or 1.0,
            }
        return values

    def _stretched(self, config: ModelConfig) -> ModelConfig:
        """The config with the stretching of its rotary embedding."""
        get = self.keys.get
        factor = get("rope.scaling.factor", float, get("rope.scale_linear", float, 1.0)) or 1.0
        kind = get("rope.scaling.type", str, "none" if factor == 1.0 else "linear")
        if factor < 1:
            raise self.keys.fail("rope.scaling.factor", f"is {factor}, expected at least 1")
        original = get("rope.scaling.original_context_length", int, config.max_position_embeddings)
        if kind not in ("none", "linear", "yarn"):
            raise self.keys.fail("rope.scaling.type", f"is {kind!r}, supported: none, linear, yarn")
        if ROPE_FACTORS in self.file.tensors:
            if kind != "none" and factor != 1:
                raise self.keys.fail("rope.scaling.type", f"is {kind} beside {ROPE_FACTORS}: choose one")
            return self._llama3(config)
        if kind == "linear":
            return replace(config, linear_rope_factor=factor)
        if kind == "none":
            return config
        # llama.cpp multiplies cosine and sine by 1 + 0.1 ln(factor), and that by attn_factor.
        m = get("rope.scaling.yarn_log_multiplier", float, 0.0) / 0.1 if config.attention == "mla" else 1.0
        if config.attention == "mla" and not m:
            raise self.keys.fail("rope.scaling.yarn_log_multiplier", "is missing, which latent attention with YaRN needs")
        attention = get("rope.scaling.attn_factor", float, 1.0)
        if config.attention == "gqa" and factor > 1:
            m = (attention * yarn_mscale(factor, 1.0) - 1) / (0.1 * math.log(factor))
        elif attention != 1.0:
            raise self.keys.fail("rope.scaling.attn_factor", f"is {attention}, supported: 1")
        fast, slow = get("rope.scaling.yarn_beta_fast", float, 32.0), get("rope.scaling.yarn_beta_slow", float, 1.0)
        return replace(config, yarn=YarnConfig(factor, original, fast, slow, m, m))

    def _llama3(self, config: ModelConfig) -> ModelConfig:
        """Its parameters are in no key, only their result: the factor is in it, the others are as published."""
        stored = self.file.tensors[ROPE_FACTORS]
        if stored.shape != (config.head_dim // 2,) or config.attention != "gqa":
            raise UserError(f"{self.file.path}: tensor {ROPE_FACTORS} has shape {list(stored.shape)}, expected {[config.head_dim // 2]}")
        divisors = self.file.read(ROPE_FACTORS).double()
        rope = Llama3RopeConfig(float(f"{divisors.max().item():.6g}"))
        stretched = replace(config, llama3=rope)
        if rope.factor >= 1 and torch.allclose((rotary_frequencies(config) / rotary_frequencies(stretched)).double(), divisors, rtol=1e-3):
            return stretched
        raise UserError(f"{self.file.path}: {ROPE_FACTORS} is not Llama 3.1's stretching of the rotary embedding, which alone is supported")

    def _wanted(self) -> list[GgufTensor]:
        """Tensors of the file, each with what it is in ours. Their `make` gives views of ours, so that they can be copied into them."""
        in_halves = self.architecture.halves  # undone in `read`: a permutation is no view
        wanted = gguf_tensors(self.config, replace(self.architecture, halves=False) if in_halves else self.architecture)
        if self.config.attention == "mla" and "blk.0.attn_kv_b.weight" in self.file.tensors:
            ours = shapes(self.config)
            made = {
                one.ours: GgufTensor(one.name.replace("attn_k_b", "attn_kv_b"), one.ours, ours[one.ours])
                for one in wanted
                if one.name.endswith("attn_k_b.weight")
            }
            wanted = [made.get(one.ours, one) for one in wanted if not one.name.endswith("attn_v_b.weight")]
        return [one for one in wanted if one.name != ROPE_FACTORS and not self._without_shared(one)]

    def _without_shared(self, one: GgufTensor) -> bool:
        """Whether a tensor is a shared expert of a model that has none: exports add one of zeros."""
        return not self.config.n_shared_experts and one.name.endswith("_shexp.weight")

    def _checked(self) -> dict[str, list[GgufTensor]]:
        """Our name -> its parts. Raises UserError unless the file has them all, in their shapes, and nothing else."""
        wanted = {one.name: one for one in self._wanted()}
        present = self.file.tensors
        skipped = {ROPE_FACTORS} if self.config.llama3 else set()
        if not self.config.mtp_depth:
            first = f"blk.{self.config.num_layers}."
            skipped |= {name for name in present if name.startswith(first) and self.keys.get("nextn_predict_layers", int, 0)}
        for name, one in wanted.items():
            if name not in present:
                near = nearest(name, present) if present else "none"
                raise UserError(f"{self.file.path}: tensor {name} is missing (nearest present: {near})")
            if (shape := present[name].shape) != one.shape:
                raise UserError(f"{self.file.path}: tensor {name} has shape {list(shape)}, the file's keys make it {list(one.shape)}")
        unexpected = [name for name in present if name not in wanted and name not in skipped]
        if unexpected:
            more = f", and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
            raise UserError(f"{self.file.path}: tensor {unexpected[0]} is not part of this model{more}")
        parts: dict[str, list[GgufTensor]] = defaultdict(list)
        for one in wanted.values():
            parts[one.ours].append(one)
        return parts

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(our name, floats), one at a time."""
        for ours, shape in shapes(self.config).items():
            parts = self.stored[ours]
            if len(parts) == 1 and parts[0].shape == shape:
                yield ours, self._read(parts[0])
                continue
            tensor = torch.empty(shape)
            for one in parts:
                one.make(tensor).copy_(self._read(one))
            yield ours, tensor
            del tensor  # before the next one is allocated

    def _read(self, one: GgufTensor) -> Tensor:
        """A tensor of the file with rotary dimensions in our order."""
        tensor = self.file.read(one.name)
        match = LAYER.fullmatch(one.ours)
        if self.architecture.halves and match:
            if rotary := rotated_rows(self.config, layers(self.config)[int(match[1])].attention, match[2]):
                return rotary.permute(tensor, halves=False)
        return tensor
