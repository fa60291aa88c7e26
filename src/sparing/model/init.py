"""Initial weights, a pure function of the seed."""

from __future__ import annotations

import torch
from torch import nn

from sparing.model.transformer import Transformer


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fill every parameter. `deepseek`: normal(0, 0.006) (DeepSeek-V3 §4.2); `scaled`: unit-scale projections of 1/sqrt(fan-in).

    In `scaled` each layer starts as the identity (output projections of attention and feed-forward are zero), the head near zero
    and embeddings at unit scale, nanochat's choice; LAB.md has the comparison.
    """
    generator = torch.Generator().manual_seed(seed)
    published = model.config.init == "deepseek"
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        elif published:
            nn.init.normal_(parameter, std=0.006, generator=generator)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            nn.init.zeros_(parameter)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.02 if model.config.tie_word_embeddings else 1.0, generator=generator)
        elif "lm_head" in name:
            nn.init.normal_(parameter, std=0.001, generator=generator)
        else:
            nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "tokens_per_expert")):
            buffer.zero_()
