"""One optimizer for the whole model, driven by OptimConfig: Muon (or AdamW) for hidden matrices, AdamW for everything else.

AdamW (arXiv 1711.05101) is torch's fused implementation. Learning rates are peaks; `schedule` scales all of them alike.
Which group a parameter is in follows from its name and rank alone, so a checkpoint needs no groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparing.config import OptimConfig
from sparing.run import DamagedError
from sparing.train.muon import Muon


def group_of(name: str, parameter: Tensor) -> str:
    """embed, head, router, norm or matrix."""
    if name.endswith("embed_tokens.weight"):
        return "embed"  # tied weights are in this group: the rows that are read decide how far they may move
    if name.endswith("lm_head.weight"):
        return "head"
    if name.endswith("mlp.gate.weight"):
        return "router"  # a handful of logits per token: orthogonalising it would make every expert equally wanted
    return "matrix" if parameter.ndim >= 2 else "norm"


class Optimizer:
    """All updates of one model. `step` applies the gradients; `state`/`load` move its state as a flat dict of named tensors."""

    def __init__(self, model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.bfloat16):
        """dtype: the compute type; Newton-Schulz runs in it."""
        self.config = config
        self.parameters = dict(model.named_parameters())
        groups: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(group_of(name, parameter), {})[name] = parameter
        matrices = groups.pop("matrix", {}) if config.matrix == "muon" else {}
        self.muon = Muon(matrices, steps=config.ns_steps, weight_decay=config.weight_decay, dtype=dtype) if matrices else None
        peaks = {"embed": config.lr_embed, "head": config.lr_head, "router": config.lr_router, "norm": config.lr_norm, "matrix": config.lr}
        decays = {"matrix": config.weight_decay}
        self.adamw = torch.optim.AdamW(
            [{"params": list(named.values()), "peak": peaks[g], "weight_decay": decays.get(g, 0.0)} for g, named in groups.items()],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def grad_norm(self) -> Tensor:
        """Global L2 norm of all gradients, a scalar tensor."""
        return nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    @torch.no_grad()
    def clip(self, norm: float) -> None:
        """Scale all gradients so that their global norm, which is `norm`, is at most `config.clip`; 0: leave them."""
        if 0 < self.config.clip < norm:
            torch._foreach_mul_([p.grad for p in self.parameters.values() if p.grad is not None], self.config.clip / norm)

    def step(self, lr_scale: float, momentum: float) -> None:
        """One update: lr_scale (0..1) times every group's peak; momentum is Muon's. Gradients are freed."""
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * lr_scale
        self.adamw.step()
        if self.muon is not None:
            self.muon.step(self.config.lr * lr_scale, momentum)
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Flat and live (no copies): optimizer/momentum/NAME, optimizer/exp_avg/NAME, optimizer/exp_avg_sq/NAME, optimizer/step/NAME."""
        momentum = self.muon.momentum if self.muon else {}
        flat = {f"optimizer/momentum/{name}": tensor for name, tensor in momentum.items()}
        for name, parameter in self.parameters.items():
            for kind, tensor in sorted(self.adamw.state.get(parameter, {}).items()):  # sorted: equal states are equal files
                flat[f"optimizer/{kind}/{name}"] = tensor
        return flat

    def load(self, name: str, tensor: Tensor) -> None:
        """Take back one tensor of `state`. Raises DamagedError for a tensor that this model has no place for."""
        _, kind, parameter_name = name.split("/", 2)
        parameter = self.parameters.get(parameter_name)
        if parameter is None or (kind != "step" and parameter.shape != tensor.shape):
            raise DamagedError(f"optimizer state {name} {tuple(tensor.shape)} does not belong to this model")
        if kind == "momentum":
            if self.muon is None or parameter_name not in self.muon.momentum:
                raise DamagedError(f"optimizer state {name} is Muon's, but the config has optim.matrix = {self.config.matrix}")
            self.muon.momentum[parameter_name].copy_(tensor)
        else:
            self.adamw.state[parameter][kind] = tensor.to(parameter.device)

    def reset(self) -> None:
        """Forget all moments, as before the first step."""
        self.adamw.state.clear()
        for tensor in self.muon.momentum.values() if self.muon else ():
            tensor.zero_()
