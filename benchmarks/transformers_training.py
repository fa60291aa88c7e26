"""transformers' DeepseekV3ForCausalLM in training, in every setting that it can train in on this machine.

Our state dict has the names of its state dict, fused experts included, so both load the same file of weights.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.trials import Task, fastest, import_transformers, try_settings
from sparing.base.config import ModelConfig, TokensConfig, UserError
from sparing.base.layers import mixtures
from sparing.bench.limit import Limit
from sparing.bench.throughput import TrainingSide
from sparing.interop.families import family_of
from sparing.interop.hf_config import to_hf
from sparing.kernels.formats import this_machine

PRECISIONS = ("float32", "bfloat16", "autocast")


@dataclass(frozen=True)
class PeerSetting:
    """How transformers trains: `attn_implementation`, `experts_implementation` and the number format."""

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
    """The grid that the fastest setting is taken from, on every processor; `compile` adds the compiled half."""
    grid = itertools.product((False, True) if compile else (False,), PRECISIONS, ("eager", "sdpa"), ("grouped_mm", "eager"))
    return [PeerSetting(attention, experts, precision, compiled) for compiled, precision, attention, experts in grid]


def best(files: dict, threads: int, batch_size: int, tokens: int, repeats: int, compile: bool, seconds: float) -> dict:
    """The fastest setting -> {"setting", "name", "trials": of all settings}. files: arguments of `Peer`. tokens: of a batch. seconds: the
    time that is left for the whole figure. Raises UserError where no setting runs."""
    task = Task(
        build=lambda worker, setting: worker.make(Peer, **files, setting=asdict(setting)),
        part=lambda worker: batch_size * worker.call("steps", first=0, count=1, rows=1)["seconds"],
        whole=lambda worker, number: worker.call("steps", first=number, count=1)["seconds"],
        tokens=tokens,
    )
    trials = try_settings("transformers", all_settings(compile), task, repeats, threads, Limit(seconds), this_machine())
    setting = fastest(trials, "trains")
    return {"setting": setting, "name": str(PeerSetting(**setting)), "trials": trials}


def peer_config(model: ModelConfig):
    """The DeepseekV3Config that computes what `model` computes without its MTP modules; UserError for what that type cannot express."""
    if family_of(model) != "deepseek_v3" or not mixtures(model):
        raise UserError("the peer DeepseekV3ForCausalLM needs attention mla, scoring_func sigmoid and at least one MoE layer")
    raw, _ = to_hf(replace(model, mtp_depth=0), dtype="float32", tokens=TokensConfig())
    return import_transformers().DeepseekV3Config.from_dict(raw)


class Peer(TrainingSide):
    """One transformers model in training."""

    def import_libraries(self) -> None:
        import_transformers().DeepseekV3ForCausalLM  # noqa: B018

    def build(self, config: ModelConfig, weights: dict, optimizer: dict, **setting) -> None:
        self.setting = PeerSetting(**setting)
        theirs = peer_config(config)
        theirs._attn_implementation, theirs._experts_implementation = self.setting.attention, self.setting.experts
        model = import_transformers().DeepseekV3ForCausalLM(theirs)
        model.load_state_dict(weights, strict=not config.tie_word_embeddings)
        if self.setting.precision == "bfloat16":
            model.to(torch.bfloat16)
        model.train()
        self.forward = torch.compile(model) if self.setting.compile else model
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True, **optimizer)

    def step(self, tokens_BT: torch.Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if self.setting.precision == "autocast" else nullcontext():
            loss = self.forward(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        return loss.item()
