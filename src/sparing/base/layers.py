"""Describes each layer of a model: dense or mixture, heads and widths, names and shapes of its tensors. Without torch.

The model builds its modules from `layers(config)`; parameters, FLOPs, memory, the cluster model, packed weights and exports read it too.
Names are those of the state dict. Shapes are PyTorch's: a weight is (out, in), a stack of experts (experts, out, in).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Literal

from sparing.base.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SELECTION_BIAS = "e_score_correction_bias"
"""A router's buffer that loss-free balancing moves. It is not learned, so it does not count as a parameter."""


def _matrices(shapes: Shapes) -> int:
    """Weights of the tensors with two dimensions: all matrices but the experts', whose stacks have three."""
    return sum(prod(shape) for shape in shapes.values() if len(shape) == 2)


@dataclass(frozen=True)
class Attention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 §2.1) or grouped-query attention (arXiv 2305.13245)."""

    kind: Literal["mla", "gqa"]
    hidden: int
    heads: int
    """Query heads."""
    kv_heads: int
    """Key-value heads; MLA expands its latent into one for every query head."""
    nope: int
    """Width of the part of a query or key head that has no position; GQA has none."""
    rope: int
    """Width of the part that is rotated by its position."""
    value: int
    """Width of a value head."""
    query_rank: int | None = None
    """MLA: rank of the query compression; None: queries are projected directly."""
    latent: int = 0
    """MLA: rank of the key-value compression."""
    bias: bool = False
    """GQA: whether queries, keys and values have biases."""
    head_norm: bool = False
    """GQA: whether query and key heads are normed."""

    @property
    def key(self) -> int:
        """Width of a query or key head."""
        return self.nope + self.rope

    @property
    def cache_width(self) -> int:
        """Numbers that a decoder keeps of each token: keys and values (GQA), or the latent and the shared rotated key (MLA)."""
        return self.kv_heads * (self.key + self.value) if self.kind == "gqa" else self.latent + self.rope

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the projections of the layer's input. They are joined: into one product in training, into one packed matrix."""
        if self.kind == "gqa":
            return "q_proj.weight", "k_proj.weight", "v_proj.weight"
        return "q_proj.weight" if self.query_rank is None else "q_a_proj.weight", "kv_a_proj_with_mqa.weight"

    @cached_property
    def shapes(self) -> Shapes:
        """Shapes of the tensors below `self_attn.`, in the module's order."""
        D, H, G = self.hidden, self.heads, self.kv_heads
        output = {"o_proj.weight": (D, H * self.value)}
        if self.kind == "gqa":
            grouped: Shapes = {}
            for name, width in (("q_proj", H * self.key), ("k_proj", G * self.key), ("v_proj", G * self.value)):
                grouped |= {f"{name}.weight": (width, D)} | ({f"{name}.bias": (width,)} if self.bias else {})
            norms = {"q_norm.weight": (self.key,), "k_norm.weight": (self.key,)} if self.head_norm else {}
            return grouped | output | norms
        query = {"q_proj.weight": (H * self.key, D)}
        if rank := self.query_rank:
            query = {"q_a_proj.weight": (rank, D), "q_a_layernorm.weight": (rank,), "q_b_proj.weight": (H * self.key, rank)}
        latent = {
            "kv_a_proj_with_mqa.weight": (self.latent + self.rope, D),
            "kv_a_layernorm.weight": (self.latent,),
            "kv_b_proj.weight": (H * (self.nope + self.value), self.latent),
        }
        return query | latent | output

    @cached_property
    def weights(self) -> int:
        """Weights of all its matrices."""
        return _matrices(self.shapes)

    @cached_property
    def expansions(self) -> int:
        """Weights of the matrices that expand MLA's compressed queries and its latent into heads."""
        return sum(prod(shape) for name, shape in self.shapes.items() if name in ("q_b_proj.weight", "kv_b_proj.weight"))


@dataclass(frozen=True)
class FeedForward:
    """A SwiGLU (dense), or a mixture of routed SwiGLU experts beside shared ones (DeepSeekMoE, arXiv 2401.06066)."""

    mixture: bool
    hidden: int
    width: int
    """Width of the dense SwiGLU, or of one expert."""
    experts: int = 0
    """Routed experts."""
    chosen: int = 0
    """Routed experts that a token uses."""
    shared: int = 0
    """Shared experts, which every token uses; they are stored side by side as one SwiGLU."""
    selection_bias: bool = True
    """Whether the router has biases that balance its choice."""

    @property
    def common_width(self) -> int:
        """Width of the SwiGLU that every token uses: the dense one, or all shared experts together; 0: there is none."""
        return self.shared * self.width if self.mixture else self.width

    @property
    def router(self) -> int:
        """Weights of the router."""
        return self.experts * self.hidden

    @property
    def expert(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.width

    @property
    def routed(self) -> int:
        """Weights of all routed experts."""
        return self.experts * self.expert

    @property
    def routed_active(self) -> int:
        """Weights of the routed experts that one token uses."""
        return self.chosen * self.expert

    @cached_property
    def shapes(self) -> Shapes:
        """Shapes of the tensors below `mlp.`, in the module's order. In `gate_up_proj` the gate's rows come first."""
        D, E, F, common = self.hidden, self.experts, self.width, self.common_width
        swiglu = {"gate_proj.weight": (common, D), "up_proj.weight": (common, D), "down_proj.weight": (D, common)}
        if not self.mixture:
            return swiglu
        gate: Shapes = {"gate.weight": (E, D)} | ({f"gate.{SELECTION_BIAS}": (E,)} if self.selection_bias else {})
        routed = {"experts.gate_up_proj": (E, 2 * F, D), "experts.down_proj": (E, D, F)}
        return gate | routed | {f"shared_experts.{name}": shape for name, shape in swiglu.items() if common}

    @cached_property
    def common(self) -> int:
        """Weights of the matrices that every token uses: the router's, and those of the SwiGLU of `common_width`."""
        return _matrices(self.shapes)


@dataclass(frozen=True)
class Layer:
    """A decoder layer, or a multi-token-prediction module: a layer whose input joins two (DeepSeek-V3, arXiv 2412.19437 §2.2)."""

    index: int
    """Its number in names: `model.layers.INDEX.`"""
    mtp: bool
    """Whether it is a multi-token-prediction module."""
    hidden: int
    attention: Attention
    feed_forward: FeedForward

    @property
    def mixture(self) -> bool:
        return self.feed_forward.mixture

    @cached_property
    def shapes(self) -> Shapes:
        """Shapes of the tensors below `model.layers.INDEX.`, in the module's order."""
        D = self.hidden
        shapes: Shapes = {"input_layernorm.weight": (D,)}
        shapes |= {f"self_attn.{name}": shape for name, shape in self.attention.shapes.items()}
        shapes |= {"post_attention_layernorm.weight": (D,)}
        shapes |= {f"mlp.{name}": shape for name, shape in self.feed_forward.shapes.items()}
        if self.mtp:
            shapes |= {"enorm.weight": (D,), "hnorm.weight": (D,), "eh_proj.weight": (D, 2 * D), "shared_head.norm.weight": (D,)}
        return shapes

    @cached_property
    def common(self) -> int:
        """Weights of the matrices that every token uses: all but the routed experts'."""
        return _matrices(self.shapes)

    @cached_property
    def parameters(self) -> int:
        """Numbers that are learned: matrices, experts and norms."""
        return sum(prod(shape) for name, shape in self.shapes.items() if not name.endswith(SELECTION_BIAS))

    @property
    def active_parameters(self) -> int:
        """The parameters that one token uses."""
        return self.parameters - self.feed_forward.routed + self.feed_forward.routed_active


@lru_cache(maxsize=256)
def layers(c: ModelConfig) -> tuple[Layer, ...]:
    """All layers in order, MTP modules last: `layers(c)[: c.num_layers]` is the decoder, `layers(c)[c.num_layers :]` the modules.

    The first `num_dense_layers` are dense. All others are mixtures, MTP modules included; an all-dense model has dense MTP modules.
    """
    D = c.hidden_size
    if c.attention == "gqa":
        own = {"bias": c.attention_bias, "head_norm": c.head_norm}
        attention = Attention("gqa", D, c.num_heads, c.num_kv_heads, 0, c.head_dim, c.head_dim, **own)
    else:
        widths = (c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim)
        attention = Attention("mla", D, c.num_heads, c.num_heads, *widths, c.q_lora_rank, c.kv_lora_rank)
    dense = FeedForward(False, D, c.intermediate_size)
    counts = (c.n_routed_experts, c.num_experts_per_tok, c.n_shared_experts)
    mixture = FeedForward(True, D, c.moe_intermediate_size, *counts, c.selection_bias)
    count = c.num_layers + c.mtp_depth
    leading = count if c.num_dense_layers >= c.num_layers else c.num_dense_layers
    return tuple(Layer(i, i >= c.num_layers, D, attention, dense if i < leading else mixture) for i in range(count))


def mixtures(c: ModelConfig) -> tuple[Layer, ...]:
    """The layers with experts, in order, MTP modules last. Empty for a dense model."""
    return tuple(layer for layer in layers(c) if layer.mixture)


def shapes(c: ModelConfig) -> Shapes:
    """Shapes of the whole state dict by name, in the module's order."""
    all_shapes: Shapes = {EMBED: (c.vocab_size, c.hidden_size)}
    for layer in layers(c):
        all_shapes |= {f"model.layers.{layer.index}.{name}": shape for name, shape in layer.shapes.items()}
    all_shapes["model.norm.weight"] = (c.hidden_size,)
    return all_shapes if c.tie_word_embeddings else all_shapes | {HEAD: all_shapes[EMBED]}


def is_matrix(name: str, dimensions: int) -> bool:
    """Whether a weight may be held in few bits: all but norms, biases and routers."""
    return dimensions > 1 and not name.endswith("mlp.gate.weight")
