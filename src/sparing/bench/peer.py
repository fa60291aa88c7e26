"""The throughput peer: `transformers`' DeepseekV3ForCausalLM built from our ModelConfig, in every setting it can train in on this machine.

Our state dict already carries the names of its state dict (fused experts included), so the same file of weights loads into both.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sparing.base.config import ModelConfig, UserError
from sparing.base.layers import mixtures
from sparing.interop.families import family_of
from sparing.interop.hf_config import to_hf

PRECISIONS = ("float32", "bfloat16", "autocast")


@dataclass(frozen=True)
class PeerSetting:
    """How transformers runs: what `attn_implementation` and `experts_implementation` are set to, and which numbers it computes in."""

    attention: str = "eager"
    """`eager` or `sdpa`."""
    experts: str = "grouped_mm"
    """`grouped_mm` or `eager` (a Python loop over the experts)."""
    precision: str = "float32"
    """`float32` or `bfloat16`: the parameters themselves; `autocast`: float32 parameters under torch.autocast to bfloat16."""
    compile: bool = False

    @property
    def format(self) -> str:
        return "float32" if self.precision == "float32" else "bfloat16"

    def __str__(self) -> str:
        return f"{self.attention} attention, {self.experts} experts, {self.precision}" + (", compiled" if self.compile else "")


def all_settings(compile: bool) -> list[PeerSetting]:
    """The grid that the peer's best is taken from, on every processor; `compile` adds the compiled half."""
    grid = itertools.product((False, True) if compile else (False,), PRECISIONS, ("eager", "sdpa"), ("grouped_mm", "eager"))
    return [PeerSetting(attention, experts, precision, compiled) for compiled, precision, attention, experts in grid]


def import_transformers():
    """The module, quietened; UserError when it is not installed (it is a development dependency, never needed to train)."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("this figure compares with transformers, which is not installed: pip install 'sparing[dev]'") from error
    transformers.logging.set_verbosity_error()
    return transformers


def peer_config(model: ModelConfig):
    """The DeepseekV3Config that computes what `model` computes without its MTP modules; UserError for what that type cannot express."""
    if family_of(model) != "deepseek_v3" or not mixtures(model):
        raise UserError("the peer DeepseekV3ForCausalLM needs attention mla, scoring_func sigmoid and at least one MoE layer")
    raw, _ = to_hf(replace(model, mtp_depth=0), dtype="float32", eos=None)
    return import_transformers().DeepseekV3Config.from_dict(raw)


class PeerSide:
    """One transformers model with its optimizer; `step` is a whole training step on tokens (B, T) and returns the loss in nats."""

    def __init__(self, model: ModelConfig, setting: PeerSetting, weights: Path, optimizer: dict):
        from safetensors.torch import load_file

        self.setting = setting
        config = peer_config(model)
        config._attn_implementation = setting.attention
        config._experts_implementation = setting.experts
        self.model = import_transformers().DeepseekV3ForCausalLM(config)
        self.model.load_state_dict(load_file(weights), strict=not model.tie_word_embeddings)
        if setting.precision == "bfloat16":
            self.model.to(torch.bfloat16)
        self.model.train()
        self.forward = torch.compile(self.model) if setting.compile else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **optimizer)

    def step(self, tokens_BT: torch.Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if self.setting.precision == "autocast" else nullcontext():
            loss = self.forward(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        return loss.item()
