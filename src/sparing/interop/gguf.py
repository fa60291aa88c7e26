"""A GGUF file out, for llama.cpp and the programs built on it: metadata, tokenizer and tensors of one of its architectures.

Format and keys: github.com/ggml-org/ggml, docs/gguf.md. Names and shapes are what llama.cpp's loader asks for (llama.cpp's src/models,
src/llama-vocab.cpp). Latent attention is in its absorbed form (`deepseek2`), so `kv_b_proj` is split into heads and its key half
transposed. An MTP module is the block behind the last layer, and shares embedding and head. Rotary dimensions are interleaved pairs, as
ours are, in `deepseek2` and `llama`, and halves in the other architectures.
"""

from __future__ import annotations

import contextlib
import errno
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sparing.base.config import ModelConfig, TokensConfig, UserError, YarnConfig
from sparing.base.files import atomic_path, output_file
from sparing.base.layers import EMBED, HEAD, SELECTION_BIAS, Attention, layers, mixtures, shapes
from sparing.base.origin import Origin
from sparing.data.tokenizer import BYTE_PIECE, END_NAMES, PATTERN, Tokenizer
from sparing.interop.hf_config import read_json, yarn_temperature
from sparing.interop.hf_tensors import LAYER, rotated_rows
from sparing.model.rope import rotary_frequencies, rotated_width, yarn_mscale

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}
"""Types of the matrices, and llama.cpp's number of a file of each (LLAMA_FTYPE_*)."""
GATES = {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}
"""llama.cpp's expert_gating_func; a file without the key is read as softmax."""
TOP = {EMBED: "token_embd.weight", HEAD: "output.weight", "model.norm.weight": "output_norm.weight"}
IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
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
class Architecture:
    """One of llama.cpp's model architectures, as far as it differs from the others."""

    name: str
    halves: bool = False
    """Rotary dimensions are paired (i, i + d/2); otherwise (2i, 2i + 1), as ours."""
    names: dict[str, str] = field(default_factory=dict)
    """Names in a layer that differ from IN_LAYER's."""


DEEPSEEK2 = Architecture("deepseek2")
LLAMA = Architecture("llama")
QWEN2 = Architecture("qwen2", halves=True)
QWEN3 = Architecture("qwen3", halves=True)
QWEN3_MOE = Architecture("qwen3moe", halves=True)
GLM4_MOE = Architecture("glm4moe", halves=True, names={"post_attention_layernorm.weight": "post_attention_norm.weight"})
QWEN3_GATE = {
    "scoring_func": "softmax", "selection_bias": False, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_shared_experts": 0,
    "num_dense_layers": 0, "n_group": 1, "head_norm": True, "partial_rotary_factor": 1.0,
}  # fmt: skip
"""What `qwen3moe` computes and no other than that."""


def architecture_of(c: ModelConfig) -> Architecture:
    """The architecture for a model of this shape: the one of its family in transformers where it computes the same."""
    if c.attention == "mla":
        return DEEPSEEK2
    if mixtures(c):
        return QWEN3_MOE if all(getattr(c, name) == value for name, value in QWEN3_GATE.items()) else GLM4_MOE
    if c.head_norm:
        return QWEN3
    # llama.cpp's llama has biases too, and the heads of any width and the rotary factors that its qwen2 has not
    return QWEN2 if c.attention_bias and c.num_heads * c.head_dim == c.hidden_size and not c.llama3 else LLAMA


def export_gguf(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: str | Path | None,
    out: str | Path,
    type: str = "f32",
    chat_template: str | None = None,
    name: str = "",
    tokens: TokensConfig | None = None,
    origin: Origin | None = None,
) -> list[str]:
    """Write the model as one GGUF file, MTP module included where llama.cpp has one; -> notes for the user.

    weights: by our names, as `base.run.tensors_of` gives them. tokenizer: a tokenizer.json, or None. tokens: what begins and ends a text;
    None: what the tokenizer's names say. type: of the matrices; norms, routers and selection biases stay float32. Raises UserError: `out`
    exists, llama.cpp computes no such model, rows no multiple of 32 (q8_0, q4_0), the `gguf` package is missing, weights are not this
    model's, disk full.
    """
    named, out = out, output_file(out, "--out")
    if type not in TYPES:
        raise UserError(f"--type {type}: choose one of {', '.join(TYPES)}")
    if out.exists():
        raise UserError(f"{named} already exists: choose a new file for --out")
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError:
        raise UserError("--format gguf needs the gguf package: pip install 'sparing[gguf]'") from None
    architecture = architecture_of(config)
    exported, notes = _exportable(config)
    tensors = gguf_tensors(exported, architecture)
    types = {one.name: GGMLQuantizationType.F32 if one.float32 else GGMLQuantizationType[type.upper()] for one in tensors}
    for one in tensors:
        if types[one.name].name.startswith("Q") and one.shape[-1] % 32:
            raise UserError(f"--type {type} needs rows of a multiple of 32 numbers; {one.name} has rows of {one.shape[-1]}: use f16")

    try:
        with atomic_path(out) as beside, _closing(GGUFWriter(beside, architecture.name)) as writer:
            writer.add_type("model")
            writer.add_name(name or out.stem)
            if origin:
                _add_origin(writer, origin)
            writer.add_file_type(TYPES[type])
            writer.add_quantization_version(2)
            _add_shape(writer, exported)
            if tokenizer is None:
                writer.add_tokenizer_model("none")
                notes.append("there is no tokenizer: the file has weights only")
            else:
                notes += _add_tokenizer(writer, Path(tokenizer), config.vocab_size, chat_template, tokens)
            _write_tensors(writer, tensors, types, config, weights)
            writer.close()
    except PermissionError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    return notes


@contextlib.contextmanager
def _closing(writer: GGUFWriter) -> Iterator[GGUFWriter]:
    try:
        yield writer
    finally:
        with contextlib.suppress(OSError):  # a full disk again: what was in its buffer
            writer.close()


def _add_origin(writer: GGUFWriter, origin: Origin) -> None:
    said = ((writer.add_license, origin.licence), (writer.add_organization, origin.publisher), (writer.add_source_url, origin.url))
    for add, value in said:
        if value:
            add(value)


def _write_tensors(
    writer: GGUFWriter,
    tensors: list[GgufTensor],
    types: dict[str, GGMLQuantizationType],
    config: ModelConfig,
    weights: Mapping[str, Tensor],
) -> None:
    import numpy as np
    from gguf.quants import quant_shape_to_byte_shape, quantize

    for one in tensors:
        shape, type = one.shape, types[one.name]
        if type.name not in ("F32", "F16"):
            shape = quant_shape_to_byte_shape(shape, type)
        dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(type.name, np.uint8))
        writer.add_tensor_info(one.name, shape, dtype, prod(shape) * dtype.itemsize, type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    expected = shapes(config)
    ours, tensor = None, None
    try:
        for one in tensors:
            if one.ours != ours:
                ours, tensor = one.ours, weights[one.ours].float()
                if tuple(tensor.shape) != expected[ours]:
                    raise UserError(f"{ours} has shape {list(tensor.shape)}, config.toml makes it {list(expected[ours])}")
            writer.write_tensor_data(quantize(one.make(tensor).contiguous().numpy(), types[one.name]))
    except OSError as error:  # numpy's tofile tells a short write without its number
        raise error if error.errno else OSError(errno.ENOSPC, "a tensor was not written whole") from None


def _exportable(config: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """-> (the model as the file will have it, notes). Raises UserError for what its architecture does not compute."""
    if mixtures(config) and config.n_group > 1 and not config.selection_bias:
        raise UserError(
            "--format gguf: llama.cpp scores a group of experts by its two best, this model by its best one (selection_bias false)"
        )
    return _latent_exportable(config) if config.attention == "mla" else _grouped_exportable(config)


def _latent_exportable(c: ModelConfig) -> tuple[ModelConfig, list[str]]:
    notes = []
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


def _grouped_exportable(c: ModelConfig) -> tuple[ModelConfig, list[str]]:
    name = architecture_of(c).name
    if c.llama3 and name != "llama":
        raise UserError(
            f"--format gguf: llama.cpp's {name} has no llama3 scaling of the rotary embedding; its llama has, without these parts"
        )
    if c.partial_rotary_factor != 1.0 and name != "glm4moe":
        raise UserError(f"--format gguf: llama.cpp's {name} rotates whole heads, this model rotates {c.partial_rotary_factor:g} of each")
    if not c.mtp_depth:
        return c, []
    return replace(c, mtp_depth=0), ["llama.cpp has no MTP modules with grouped queries: they are left out, the logits do not change"]


def _add_shape(writer: GGUFWriter, c: ModelConfig) -> None:
    from gguf import RopeScalingType

    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(len(layers(c)))
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    a = layers(c)[0].attention
    writer.add_head_count(a.heads)
    if a.kind == "mla":
        writer.add_head_count_kv(1)  # absorbed: every head reads the one latent
        writer.add_q_lora_rank(a.query_rank or 0)
        writer.add_kv_lora_rank(a.latent)
        writer.add_key_length(a.cache_width)
        writer.add_value_length(a.latent)
        writer.add_key_length_mla(a.key)
        writer.add_value_length_mla(a.value)
    else:
        writer.add_head_count_kv(a.kv_heads)
        writer.add_key_length(a.key)
        writer.add_value_length(a.value)
    writer.add_rope_dimension_count(rotated_width(c))
    writer.add_rope_freq_base(c.rope_theta)
    if c.yarn:
        _add_yarn(writer, c.yarn, latent=a.kind == "mla")
    if c.linear_rope_factor != 1.0:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.linear_rope_factor)
    if mixtures(c) or a.kind == "mla":  # llama.cpp asks for these three of dense deepseek2 models too
        writer.add_leading_dense_block_count(sum(not layer.mixture for layer in layers(c)))
        writer.add_expert_feed_forward_length(c.moe_intermediate_size)
        writer.add_expert_shared_count(c.n_shared_experts if writer.arch == QWEN3_MOE.name else max(1, c.n_shared_experts))
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


def _add_yarn(writer: GGUFWriter, yarn: YarnConfig, latent: bool) -> None:
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn.factor)
    writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
    writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
    if latent:
        writer.add_rope_scaling_yarn_log_mul(0.1 * yarn.mscale_all_dim)  # the loader divides by 0.1 again
    elif yarn.factor > 1:  # llama.cpp has a factor of its own on queries and keys, and multiplies it by this
        writer.add_rope_scaling_attn_factors(yarn_temperature(yarn) / yarn_mscale(yarn.factor, 1.0))


def _add_tokenizer(writer: GGUFWriter, path: Path, vocab_size: int, chat_template: str | None, tokens: TokensConfig | None) -> list[str]:
    """BPE of bytes or of pieces; -> notes. Raises UserError for another kind, and for what llama.cpp would cut into other tokens."""
    from gguf import TokenType

    tokenizer, raw = Tokenizer.load(path, tokens), read_json(path)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{path}: has a token with id {tokenizer.vocab_size - 1}, the model's vocabulary ends at {vocab_size - 1}")
    if raw["model"].get("type") != "BPE":
        raise UserError(f"{path}: --format gguf takes BPE tokenizers, this is {raw['model'].get('type')}")
    pieces = bool(raw["model"].get("byte_fallback"))
    words = {number: word for word, number in raw["model"]["vocab"].items()}
    added = {token["id"]: token for token in raw.get("added_tokens", [])}
    names, kinds = [], []
    for number in range(vocab_size):
        if number in added:
            names.append(added[number]["content"])
            kinds.append(TokenType.CONTROL if added[number].get("special") else TokenType.USER_DEFINED)
            if pieces and names[-1] == raw["model"].get("unk_token"):
                kinds[-1] = TokenType.UNKNOWN
                writer.add_unk_token_id(number)
        else:
            names.append(words.get(number, f"[PAD{number}]"))
            kinds.append(TokenType.NORMAL if number in words else TokenType.UNUSED)
            if pieces and BYTE_PIECE.fullmatch(names[-1]):
                kinds[-1] = TokenType.BYTE
    if pieces:
        notes = []
        writer.add_tokenizer_model("llama")
        prefix, scores = _scores(raw, path)
        writer.add_add_space_prefix(prefix)
        writer.add_token_scores([scores.get(name, 0.0) for name in names])
    else:
        writer.add_tokenizer_model("gpt2")
        pre, notes = _pre_tokenizer(raw, path)
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]])
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_add_bos_token(bool(tokenizer.start))
    if chat_template:
        writer.add_chat_template(chat_template)
    eos, *others = tokenizer.eos_ids
    writer.add_eos_token_id(eos)
    others.sort(key=lambda number: tokenizer.token_name(number) not in END_NAMES)  # a turn's end first
    for add, number in zip((writer.add_eot_token_id, writer.add_eom_token_id), others):  # end of a turn, end of a message
        add(number)
    left = ", ".join(str(tokenizer.token_name(number)) for number in others[2:])
    return [*notes, f"a GGUF file names three tokens that end an answer: {left} is left out"] if left else notes


GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel of the `tokenizers` library cuts by where it is not told otherwise."""
DIGITS = r"\p{N}"
PRE_TOKENIZERS = {
    "qwen2": (PATTERN,),
    "gpt-2": (GPT_2,),
    "smollm": (DIGITS, GPT_2),
    "llama-bpe": (PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1),),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
"""llama.cpp's name -> what cuts text into words before merging, one expression after the other. A wrong name would give other tokens
without any warning."""
WHOLE_WORDS = ("llama-bpe",)
"""Names with which llama.cpp takes a word that is a token as it is, whatever the merges say (`ignore_merges`)."""


BLANK = "▁"
"""Stands for a blank in sentencepiece's pieces."""
BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
PREFIX = {"type": "Prepend", "prepend": BLANK}


def halves(piece: str, pieces: Container[str]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others. The longer left part first: neighbours are joined from the left, so that is what a run of
    equal characters consists of."""
    cuts = ((piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1))
    return [(left, right) for left, right in cuts if left in pieces and right in pieces]


def _scores(raw: dict, path: Path) -> tuple[bool, dict[str, float]]:
    """-> (whether a blank is put before a text, each piece's score): llama.cpp joins the neighbours whose piece has the highest one. Raises
    UserError for merges that no scores can say, and for another treatment of blanks."""
    steps = (raw.get("normalizer") or {}).get("normalizers")
    if steps not in ([PREFIX, BLANKS], [BLANKS]) or raw.get("pre_tokenizer"):
        raise UserError(f"{path}: --format gguf knows pieces with {BLANK} for blanks; this tokenizer changes texts otherwise")
    special = {token["content"] for token in raw.get("added_tokens", [])}
    names = [name for name in raw["model"]["vocab"] if name not in special and not BYTE_PIECE.fullmatch(name)]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in raw["model"]["merges"]]
    order = list(dict.fromkeys(left + right for left, right in merges))
    known = set(names)
    if (
        Counter(merges) != Counter(pair for name in names for pair in halves(name, known))
        or [name for name, _ in groupby(left + right for left, right in merges)] != order
    ):
        raise UserError(f"{path}: --format gguf takes pieces that are made in every way there is, the best first")
    return steps[0] == PREFIX, {name: -float(len(order)) for name in names} | {name: -float(rank) for rank, name in enumerate(order)}


def _pre_tokenizer(raw: dict, path: Path) -> tuple[str, list[str]]:
    """-> (llama.cpp's name for how text is cut into words, notes)."""
    cuts, normalizer = _cuts(raw.get("pre_tokenizer") or {}), raw.get("normalizer")
    name = next((name for name, expressions in PRE_TOKENIZERS.items() if cuts == expressions), None)
    if name is None or (normalizer or {"type": "NFC"}) != {"type": "NFC"}:
        raise UserError(f"{path}: --format gguf knows the pre-tokenisers that llama.cpp calls {', '.join(PRE_TOKENIZERS)}; this is another")
    if bool(raw["model"].get("ignore_merges")) != (name in WHOLE_WORDS):
        raise UserError(f"{path}: ignore_merges is {raw['model'].get('ignore_merges')}, llama.cpp's {name} means the opposite")
    return name, ["llama.cpp does not compose characters (NFC) before it cuts text into tokens"] if normalizer else []


def _cuts(steps: dict) -> tuple[str, ...] | None:
    """Expressions that a tokenizer.json's pre-tokeniser cuts by, each match a word of its own; None for other kinds."""
    *first, last = steps.get("pretokenizers") or [steps]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    found = []
    for step in first:
        kind, expression = step.get("type"), step.get("pattern", {}).get("Regex")
        if kind == "Digits" and step.get("individual_digits"):
            found.append(DIGITS)
        elif kind == "Split" and expression and step.get("behavior") == "Isolated" and not step.get("invert"):
            found.append(expression)
        else:
            return None
    return (*found, GPT_2) if last.get("use_regex", True) else tuple(found)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file. `make` gets our tensor `ours` and returns it in `shape` (row length last; GGUF itself counts backwards)."""

    name: str
    ours: str
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @property
    def float32(self) -> bool:
        """Norms, routers and selection biases stay float32 in every file: llama.cpp multiplies them in float32."""
        return len(self.shape) == 1 or self.name.endswith("ffn_gate_inp.weight")


def gguf_tensors(config: ModelConfig, architecture: Architecture) -> list[GgufTensor]:
    """All tensors of the file, in our order."""
    tensors, names = [], IN_LAYER | architecture.names
    for ours, shape in shapes(config).items():
        if ours in TOP:
            tensors.append(GgufTensor(TOP[ours], ours, shape))
            continue
        match = LAYER.fullmatch(ours)
        block, inner = f"blk.{match[1]}.", match[2]
        attention = layers(config)[int(match[1])].attention
        if inner == "mlp.gate.weight" and not config.selection_bias and architecture is GLM4_MOE:
            zeros = (shape[0],)  # it asks for biases
            tensors.append(GgufTensor(block + names[f"mlp.gate.{SELECTION_BIAS}"], ours, zeros, lambda t, s=zeros: t.new_zeros(s)))
        if inner == "self_attn.kv_b_proj.weight":
            tensors += _absorbed(attention, block, ours)
        elif inner == "mlp.experts.gate_up_proj":
            E, width, D = shape[0], shape[1] // 2, shape[2]
            tensors.append(GgufTensor(block + "ffn_gate_exps.weight", ours, (E, width, D), lambda t, w=width: t[:, :w]))
            tensors.append(GgufTensor(block + "ffn_up_exps.weight", ours, (E, width, D), lambda t, w=width: t[:, w:]))
            if not config.n_shared_experts and architecture is not QWEN3_MOE:
                tensors += _no_shared_expert(block, ours, width, D)
        elif architecture.halves and (rotary := rotated_rows(config, attention, inner)):
            tensors.append(GgufTensor(block + names[inner], ours, shape, lambda t, r=rotary: r.permute(t, halves=True)))
        else:
            tensors.append(GgufTensor(block + names[inner], ours, shape))
    if config.llama3:  # what llama.cpp divides each pair's angle by
        slower = rotary_frequencies(replace(config, llama3=None)) / rotary_frequencies(config)
        tensors.append(GgufTensor("rope_freqs.weight", "model.norm.weight", tuple(slower.shape), lambda _: slower))
    return tensors


def _absorbed(a: Attention, block: str, ours: str) -> list[GgufTensor]:
    """attn_k_b (H, latent, nope) takes a query into the latent's space, attn_v_b (H, v, latent) takes the latent out of it."""
    H, nope, v, latent = a.heads, a.nope, a.value, a.latent
    return [
        GgufTensor(block + "attn_k_b.weight", ours, (H, latent, nope), lambda t: t.view(H, nope + v, latent)[:, :nope].transpose(1, 2)),
        GgufTensor(block + "attn_v_b.weight", ours, (H, v, latent), lambda t: t.view(H, nope + v, latent)[:, nope:]),
    ]


def _no_shared_expert(block: str, ours: str, width: int, hidden: int) -> list[GgufTensor]:
    """llama.cpp's deepseek2 and glm4moe always add a shared expert, so a model without one gets one of zeros."""
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return [GgufTensor(f"{block}ffn_{name}_shexp.weight", ours, shape, lambda t, s=shape: t.new_zeros(s)) for name, shape in shapes.items()]
