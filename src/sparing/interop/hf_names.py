"""Where each published tensor lies in ours: one list that the exporter walks forwards and the importer backwards.

Our names are the published ones, with two differences. Experts are fused, as `mlp.experts.gate_up_proj` (E, 2F, D) with the gate's rows
before the up projection's, and `mlp.experts.down_proj` (E, D, F); published are `mlp.experts.{j}.{gate,up,down}_proj.weight`.
The MTP modules share the embedding and the head; published are copies inside the module's layer (DeepSeek-V3's layer 61).

Rotary dimensions are interleaved pairs (2i, 2i+1) here and in DeepSeek's checkpoints; Llama's layout pairs i with i + d/2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from sparing.base.config import ModelConfig
from sparing.base.layers import EMBED, HEAD, SELECTION_BIAS, Attention, layers, shapes

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
EIGHT_BIT = re.compile(r"(self_attn\.(q_a|q_b|q|k|v|o|kv_b)_proj|self_attn\.kv_a_proj_with_mqa|mlp\..*(gate|up|down)_proj)\.weight$")


@dataclass(frozen=True)
class Rotary:
    """Rows of a projection that are rotated: in each of `heads` heads, `dim` rows after `skip` that are not."""

    heads: int
    skip: int
    dim: int

    def permute(self, weight: torch.Tensor, halves: bool) -> torch.Tensor:
        """Rows reordered from pairs to halves (`halves`), or back. `weight`: (heads * (skip + dim), in)."""
        grouped = weight.view(self.heads, self.skip + self.dim, -1)
        rotated = grouped[:, self.skip :]
        split = (self.dim // 2, 2) if halves else (2, self.dim // 2)
        rotated = rotated.unflatten(1, split).transpose(1, 2).flatten(1, 2)
        return torch.cat([grouped[:, : self.skip], rotated], dim=1).view_as(weight)


@dataclass(frozen=True)
class Piece:
    """One published tensor."""

    name: str
    ours: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] | None = None
    """Rows of the expert's matrix; None: all."""
    copy: bool = False
    """A second copy of a shared tensor, which an importer only checks."""
    rotary: Rotary | None = None
    """Set where the file's rotary layout is halves."""

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of our tensor that this one is."""
        if self.expert is None:
            return tensor
        matrix = tensor[self.expert]
        return matrix if self.rows is None else matrix[self.rows[0] : self.rows[1]]

    @property
    def float32(self) -> bool:
        """Selection biases keep float32 whatever the file's type: they are sums of steps of 0.001."""
        return self.name.endswith(SELECTION_BIAS)

    @property
    def eight_bit(self) -> bool:
        """Whether an FP8 checkpoint stores this tensor in 8 bits: the projections inside layers, not router, norms, `eh_proj`."""
        return EIGHT_BIT.search(self.name) is not None and not self.copy


def pieces(config: ModelConfig, halves: bool = False) -> list[Piece]:
    """All published tensors of a model, those of one of our tensors side by side, in our order. `halves`: the file's rotary layout."""
    ours = shapes(config)
    out = []
    for name, shape in ours.items():
        match = LAYER.fullmatch(name)
        if name.endswith("mlp.experts.gate_up_proj"):
            stem, width = name.removesuffix("gate_up_proj"), shape[1] // 2
            for j in range(shape[0]):
                out.append(Piece(f"{stem}{j}.gate_proj.weight", name, (width, shape[2]), j, (0, width)))
                out.append(Piece(f"{stem}{j}.up_proj.weight", name, (width, shape[2]), j, (width, 2 * width)))
        elif name.endswith("mlp.experts.down_proj"):
            stem = name.removesuffix("down_proj")
            out += [Piece(f"{stem}{j}.down_proj.weight", name, shape[1:], j) for j in range(shape[0])]
        else:
            rotary = _rotary(layers(config)[int(match[1])].attention, match[2]) if halves and match else None
            out.append(Piece(name, name, shape, rotary=rotary))
    head = HEAD if HEAD in ours else EMBED
    for module in layers(config)[config.num_layers :]:
        out.append(Piece(f"model.layers.{module.index}.embed_tokens.weight", EMBED, ours[EMBED], copy=True))
        out.append(Piece(f"model.layers.{module.index}.shared_head.head.weight", head, ours[head], copy=True))
    return out


def _rotary(a: Attention, name: str) -> Rotary | None:
    """Rotated rows of a layer's tensor, by its name inside the layer."""
    rotated = {
        "self_attn.q_proj.weight": (a.heads, a.nope),
        "self_attn.q_b_proj.weight": (a.heads, a.nope),
        "self_attn.k_proj.weight": (a.kv_heads, a.nope),
        "self_attn.kv_a_proj_with_mqa.weight": (1, a.latent),
    }
    return Rotary(*rotated[name], a.rope) if name in rotated else None
