"""Our side of the throughput figure: the model that `sparing train` trains, with the peer's optimizer and without its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sparing.base.config import ModelConfig
from sparing.base.config_file import build
from sparing.data.loader import Batch
from sparing.kernels.products import fitting
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.train.objective import NextToken
from sparing.train.replicas import Replicas


@dataclass(frozen=True)
class OurSetting:
    """How our side runs: compute type over float32 master weights."""

    precision: str
    """`bfloat16` or `float32`."""
    compile: bool = False
    replicas: int = 1
    """Threads that divide the rows among them (`sparing.train.replicas`); calibration would choose it by measuring."""


class OursSide:
    """One model with its optimizer; `step` is a whole training step on tokens (B, T) and returns the loss in nats.

    Router biases keep their initial value (the peer has no update for them), every parameter is AdamW's, causal attention over the row.
    """

    def __init__(self, model: ModelConfig, setting: OurSetting, weights: Path, optimizer: dict):
        self.model = Transformer(model)
        self.model.load_state_dict(load_file(weights))
        self.model.train()
        self.model.compute_dtype = getattr(torch, setting.precision)
        kernels = fitting(setting.replicas, torch.get_num_threads(), "cpu", setting.precision)[0]
        self.replicas = Replicas(self.model, NextToken(model), setting.replicas, setting.compile, kernels)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **optimizer)

    def step(self, tokens_BT: torch.Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.replicas.gradients(Batch(tokens_BT, shifted(tokens_BT, 1 + self.model.config.mtp_depth)))[0]
        self.optimizer.step()
        return loss.item()


def shifted(tokens_BT: torch.Tensor, depth: int) -> torch.Tensor:
    """Targets (B, T, depth): the token 1, 2, ... ahead, -100 past the end of the row."""
    padded = torch.nn.functional.pad(tokens_BT, (0, depth), value=-100)
    return torch.stack([padded[:, k + 1 : k + 1 + tokens_BT.shape[1]] for k in range(depth)], dim=-1)


def save_initial_weights(model: dict, seed: int, path: str) -> dict:
    """Write the state dict that both sides start from; -> `parameters`, their number."""
    ours = Transformer(build(ModelConfig, model))
    init_weights(ours, seed)
    save_file({name: tensor.contiguous() for name, tensor in ours.state_dict().items()}, path)
    return {"parameters": sum(parameter.numel() for parameter in ours.parameters())}
