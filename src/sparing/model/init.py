"""Initial weights, a pure function of the seed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparing.base.config import ModelConfig
from sparing.model.transformer import Transformer


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fill every parameter. `deepseek`: normal(0, 0.006) (DeepSeek-V3 §4.2); `scaled`: unit-scale projections of 1/sqrt(fan-in).

    In `scaled` each layer starts as the identity (output projections of attention and feed-forward are zero), the head near zero
    and embeddings at unit scale, nanochat's choice; LAB.md has the comparison.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        _draw(name, parameter, model.config, generator)
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "tokens_per_expert")):
            buffer.zero_()


@torch.no_grad()
def initial(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the state dict that `init_weights` gives a whole model, to the bit, one tensor at a time."""
    model, generator = unfilled(config), torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        yield name, _draw(name, torch.empty(parameter.shape), config, generator)
    for name, buffer in model.state_dict().items():
        if name not in parameters:
            yield name, torch.zeros(buffer.shape)


def _draw(name: str, tensor: Tensor, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Fill the parameter of that name with its initial numbers."""
    if name.endswith(".bias"):
        return nn.init.zeros_(tensor)
    if tensor.dim() == 1:
        return nn.init.ones_(tensor)
    if config.init == "deepseek":
        return nn.init.normal_(tensor, std=0.006, generator=generator)
    if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
        return nn.init.zeros_(tensor)
    if "embed_tokens" in name:
        return nn.init.normal_(tensor, std=0.02 if config.tie_word_embeddings else 1.0, generator=generator)
    if "lm_head" in name:
        return nn.init.normal_(tensor, std=0.001, generator=generator)
    return nn.init.normal_(tensor, std=0.5 * tensor.shape[-1] ** -0.5, generator=generator)


def unfilled(config: ModelConfig) -> Transformer:
    """A model on torch's meta device: shapes and types without memory, to be divided before `give_memory`."""
    with torch.device("meta"):
        return Transformer(config)


@torch.no_grad()
def give_memory(model: nn.Module, device: torch.device) -> None:
    """Move a model from the meta device. Its parameters, which are new ones, have no values yet, its buffers are zeros."""
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
