"""One optimizer for what learns of a model, driven by OptimConfig: Muon (or AdamW) for hidden matrices, AdamW for everything else.

AdamW (arXiv 1711.05101) is torch's fused implementation, or `stored`'s where weights or averages are not float32. Learning rates are peaks;
`lr_scale` scales all of them alike, over the run. Which group a parameter is in follows from its name and rank alone, so a checkpoint needs
no groups. A parameter that requires no gradient when the optimizer is made is in no group: it has no state and does not decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from sparing.base.config import Config, OptimConfig, PrecisionConfig
from sparing.base.files import DamagedError
from sparing.kernels import native, products
from sparing.model.transformer import Transformer
from sparing.precision.compensation import rows_of, slices
from sparing.train.stored import StoredAdamW, StoredMuon
from sparing.train.threads import count, divided, shares

FACTORS = 0.05
"""Peak learning rate of low-rank factors as a share of Muon's: 1e-3 at its default, which LoRA is trained with at AdamW's."""


def group_of(name: str, parameter: Tensor) -> str:
    """embed, head, router, norm, factor or matrix."""
    if name.endswith("embed_tokens.weight"):
        return "embed"  # tied weights are in this group: the rows that are read decide how far they may move
    if name.endswith("lm_head.weight"):
        return "head"
    if name.endswith("mlp.gate.weight"):
        return "router"  # a handful of logits per token: orthogonalising it would make every expert equally wanted
    if name.endswith(("lora_A.weight", "lora_B.weight")):
        return "factor"  # Muon's step is measured in the norm of a whole matrix, and the matrix here is the factors' product
    return "matrix" if parameter.ndim >= 2 else "norm"


def learning_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns of a model, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def keep_as(model: Transformer, config: Config) -> None:
    """Keep a model's numbers as `config.precision` says: weights (routers, norms and low-rank factors stay float32) and activations.

    In place, before anything shares the weights."""
    precision = config.precision
    model.set_int8_activations(precision.activations == "int8")
    for name, parameter in model.named_parameters():
        if group_of(name, parameter) not in ("router", "norm", "factor"):
            parameter.data = parameter.data.to(getattr(torch, precision.weights))


class Optimizer:
    """All updates of one model. `step` applies the gradients; `state`/`load` move its state as a flat dict of named tensors."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        dtype: torch.dtype = torch.bfloat16,
        precision: PrecisionConfig | None = None,
        seed: int = 0,
        mine: Mapping[str, nn.Parameter] | None = None,
    ):
        """dtype: the compute type; Newton-Schulz runs in it. precision: how its state is kept, after `keep_as`. seed: of rounding. mine:
        what this rank updates of all that learns, where other ranks update the rest."""
        self.config = config
        learning = learning_of(model)
        self.parameters = learning if mine is None else dict(mine)
        self.elsewhere = learning.keys() - self.parameters.keys()
        groups: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(group_of(name, parameter), {})[name] = parameter
        matrices = groups.pop("matrix", {}) if config.matrix == "muon" else {}
        precision = precision or PrecisionConfig()
        stored = precision.weights != "float32" or precision.moments != "float32"
        self.updates = torch.zeros((), dtype=torch.int64) if stored else None
        small = {"compensation": precision.compensation, "eight_bit": precision.moments == "int8", "seed": seed} if stored else {}
        settings = {"steps": config.ns_steps, "weight_decay": config.weight_decay, "dtype": dtype}
        self.muon = (StoredMuon if stored else Muon)(matrices, **settings, **small) if matrices else None
        peaks = {"embed": config.lr_embed, "head": config.lr_head, "router": config.lr_router, "norm": config.lr_norm, "matrix": config.lr}
        peaks["factor"] = config.lr * (FACTORS if config.matrix == "muon" else 1.0)
        decays = {"matrix": config.weight_decay}
        chosen = [{"params": named, "peak": peaks[g], "weight_decay": decays.get(g, 0.0)} for g, named in groups.items()]
        betas = config.beta1, config.beta2
        if stored:
            self.adamw = StoredAdamW(chosen, betas, config.eps, **small)
        else:
            chosen = [group | {"params": list(group["params"].values())} for group in chosen]
            self.adamw = AdamW(chosen, betas, config.eps)

    def grad_norm(self) -> Tensor:
        """Global L2 norm of all gradients of what learns, a float32 scalar tensor."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not grads:
            return torch.zeros(())
        if all(grad.dtype == torch.float32 for grad in grads):
            found: dict[int, Tensor] = {}
            parts = shares(grads)
            jobs = [partial(torch._foreach_norm, [grads[i] for i in share]) for share in parts]
            for share, norms in zip(parts, divided(jobs), strict=True):
                found |= dict(zip(share, norms, strict=True))
            return torch.linalg.vector_norm(torch.stack([found[i] for i in range(len(grads))]))
        # Some rows at a time: the sums are float32 without a float32 copy of a whole gradient. All in one place: small results
        # among pieces that come and go would keep the heap from using a piece's memory again (390 MiB for SmolLM2, LAB.md).
        pieces = [part[rows] for part in map(rows_of, grads) for rows in slices(*part.shape)]
        room = torch.empty(max(piece.numel() for piece in pieces), device=grads[0].device)
        norms = torch.empty(len(pieces), device=room.device)
        for piece, norm in zip(pieces, norms, strict=True):
            torch.linalg.vector_norm(room[: piece.numel()].view(piece.shape).copy_(piece), out=norm)
        return torch.linalg.vector_norm(norms)

    @torch.no_grad()
    def clip(self, norm: float) -> None:
        """Scale all gradients so that their global norm, which is `norm`, is at most `config.clip`; 0: leave them."""
        if 0 < self.config.clip < norm:
            grads = [p.grad for p in self.parameters.values() if p.grad is not None]
            divided([partial(torch._foreach_mul_, [grads[i] for i in share], self.config.clip / norm) for share in shares(grads)])

    def step(self, lr_scale: float, momentum: float) -> None:
        """One update: lr_scale (0..1) times every group's peak; momentum is Muon's. Gradients are freed."""
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * lr_scale
        number = () if self.updates is None else (int(self.updates.add_(1)),)
        self.adamw.step(*number)
        if self.muon is not None:
            self.muon.step(self.config.lr * lr_scale, momentum, *number)
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Flat and live (no copies): optimizer/momentum/NAME, optimizer/exp_avg/NAME, optimizer/exp_avg_sq/NAME, optimizer/step/NAME.

        Kept in few bits: their scales too, and optimizer/updates/all instead of step."""
        if self.updates is not None:
            flat = {"updates/all": self.updates, **self.adamw.state(), **(self.muon.state() if self.muon else {})}
            return {f"optimizer/{name}": tensor for name, tensor in flat.items()}
        momentum = self.muon.momentum if self.muon else {}
        flat = {f"optimizer/momentum/{name}": tensor for name, tensor in momentum.items()}
        for name, parameter in self.parameters.items():
            for kind, tensor in sorted(self.adamw.state.get(parameter, {}).items()):  # sorted: equal states are equal files
                flat[f"optimizer/{kind}/{name}"] = tensor
        return flat

    def load(self, name: str, tensor: Tensor) -> None:
        """Take back one tensor of `state`, or pass over one of another rank's. Raises DamagedError for a tensor that this model has no
        place for."""
        if name.split("/", 2)[-1] in self.elsewhere:
            return
        if self.updates is not None:
            place = self.state().get(name)
            if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
                raise DamagedError(f"optimizer state {name} {tuple(tensor.shape)} {tensor.dtype} does not belong to this model")
            place.copy_(tensor)
            return
        _, kind, parameter_name = name.split("/", 2)
        parameter = self.parameters.get(parameter_name)
        if parameter is None or (kind != "step" and parameter.shape != tensor.shape):
            raise DamagedError(f"optimizer state {name} {tuple(tensor.shape)} does not belong to this model")
        if kind == "momentum":
            if self.muon is None or parameter_name not in self.muon.momentum:
                raise DamagedError(f"optimizer state {name} is Muon's, but the config has optim.matrix = {self.config.matrix}")
            self.muon.momentum[parameter_name].copy_(tensor)
        else:
            self.adamw.state.setdefault(parameter, {})[kind] = tensor.to(parameter.device)

    def reset(self) -> None:
        """Forget all moments, as before the first step."""
        if self.updates is not None:
            for tensor in self.state().values():
                tensor.zero_()
            return
        self.adamw.state.clear()
        for tensor in self.muon.momentum.values() if self.muon else ():
            tensor.zero_()


def split(name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices inside a parameter, as views, each (n, R, C): the experts' fused (E, 2F, D) holds two, gate and up.

    Orthogonalised together, gate and up would have to share F directions of the input; they are different matrices.
    """
    if tensor.ndim == 2:
        return [tensor.unsqueeze(0)]
    assert tensor.ndim == 3, name
    return list(tensor.chunk(2, dim=1)) if name.endswith("gate_up_proj") else [tensor]


class AdamW:
    """AdamW (arXiv 1711.05101) of float32 parameters: torch's fused update, to the bit, from states as torch.optim has them.
    Its own class imports torch's compiler when it is made, which takes 70 to 150 MB of memory and a second."""

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float):
        """groups: "params" (list), "lr" before each step, "weight_decay"."""
        self.param_groups, self.betas, self.eps = groups, betas, eps
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        """exp_avg, exp_avg_sq and step (a float32 scalar) of each parameter that had a gradient."""

    def step(self) -> None:
        jobs = []
        for group in self.param_groups:
            learning = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in learning:
                if parameter not in self.state:
                    moments = {kind: torch.zeros_like(parameter.detach()) for kind in ("exp_avg", "exp_avg_sq")}
                    self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
            jobs += [partial(self._update, [learning[i] for i in share], group["lr"], group["weight_decay"]) for share in shares(learning)]
        divided(jobs)

    def _update(self, parameters: list[nn.Parameter], lr: float, decay: float) -> None:
        states = [self.state[parameter] for parameter in parameters]
        first, second, steps = ([state[kind] for state in states] for kind in ("exp_avg", "exp_avg_sq", "step"))
        torch._foreach_add_(steps, 1)
        (beta1, beta2), grads = self.betas, [parameter.grad for parameter in parameters]
        torch._fused_adamw_(
            parameters, grads, first, second, [], steps, lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=self.eps, amsgrad=False,
            maximize=False,
        )  # fmt: skip


class Muon:
    """Muon over named parameters of 2 or 3 dimensions: momentum whose every matrix is replaced by the nearest (semi-)orthogonal one.

    Keller Jordan, "Muon: an optimizer for hidden layers" (kellerjordan.github.io/posts/muon, 2024), with its scale
    sqrt(max(1, rows/columns)). Weight decay is cautious: only weights that the update shrinks anyway (arXiv 2510.12402). Matrices of one
    shape, whichever layer or expert they belong to, are one batch of products: small ones are far from filling a machine alone. State: one
    float32 momentum of the parameter's shape each.
    """

    def __init__(self, parameters: dict[str, Tensor], *, steps: int, weight_decay: float, dtype: torch.dtype = torch.bfloat16):
        self.parameters, self.steps, self.weight_decay, self.dtype = parameters, steps, weight_decay, dtype
        self.momentum = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        # The compiled products take pairs of numbers, and neither other devices nor other types.
        self._compiled = dtype in native.OWN and all(
            p.device.type == "cpu" and p.shape[-1] % 2 == 0 and p.shape[-2] % 4 == 0 for p in parameters.values()
        )
        self.groups: dict[tuple[int, int], list[tuple[str, int]]] = {}
        for name, parameter in parameters.items():
            for part, matrix in enumerate(split(name, parameter)):
                self.groups.setdefault(tuple(matrix.shape[-2:]), []).append((name, part))

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        """One update from the parameters' `.grad` (which may be overwritten). lr: peak x schedule."""
        if self._compiled and native.own_products(self.dtype):
            self._compiled_step(lr, momentum)
        else:
            self._batched_step(lr, momentum)

    def _compiled_step(self, lr: float, momentum: float) -> None:
        """Matrix by matrix, divided among as many threads as PyTorch would use inside its operations."""
        matrices = []
        for name, parameter in self.parameters.items():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            views = (split(name, tensor) for tensor in (parameter, grad, self.momentum[name]))
            matrices += [matrix for part in zip(*views, strict=True) for matrix in zip(*(t.unbind(0) for t in part), strict=True)]
        threads = count()

        def update(share: int) -> None:
            for weight, grad, average in matrices[share::threads]:
                rows, columns = weight.shape
                scale = lr * max(1.0, rows / columns) ** 0.5
                sizes = (rows, columns, float(momentum), self.steps, float(scale), 1.0 - lr * self.weight_decay)
                native.call("muon", None, weight, grad, average, *sizes, of=native.OWN[self.dtype])

        divided([partial(update, share) for share in range(threads)])

    def _batched_step(self, lr: float, momentum: float) -> None:
        names = list(self.parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters.values()]
        averages = [self.momentum[name] for name in names]
        torch._foreach_lerp_(averages, grads, 1.0 - momentum)
        torch._foreach_lerp_(grads, averages, momentum)  # Nesterov: where the average will be, from where it is
        directions = dict(zip(names, grads, strict=True))
        for (rows, columns), members in self.groups.items():
            batch = torch.cat([split(name, directions[name])[part].to(self.dtype) for name, part in members])
            batch = products.orthogonalise(batch, self.steps)
            scale = lr * max(1.0, rows / columns) ** 0.5
            done = 0
            for name, part in members:
                weight = split(name, self.parameters[name])[part]
                update = batch[done : done + len(weight)].to(weight.dtype)
                done += len(weight)
                if self.weight_decay:
                    weight.mul_(torch.where(update * weight > 0, 1.0 - lr * self.weight_decay, 1.0))
                weight.sub_(update, alpha=scale)


# Learning rate and momentum as pure functions of (step, total steps, OptimConfig). Warm-up, stable, decay (WSD): MiniCPM, arXiv 2404.06395
# §4; a long linear decay, to (nearly) zero: arXiv 2502.15938. A step is the 0-based number of the update about to be made; the last one,
# total - 1, is made at exactly `final_lr` of the peak.

MOMENTUM_START = 0.85
MOMENTUM_WARMUP = 0.15
"""Share of the run over which Muon's momentum rises: a young run's gradients turn quickly, an old average of them misleads."""


def decay_start(total: int, optim: OptimConfig) -> int:
    """The first step of the decay; the checkpoint kept for extending a run is the one with this many steps done."""
    return total - round(optim.decay * total)


def lr_scale(step: int, total: int, optim: OptimConfig) -> float:
    """Share of the peak learning rate for update `step` (0-based) of `total`."""
    warmup, start = round(optim.warmup * total), decay_start(total, optim)
    scale = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if step >= start:
        done = min(1.0, (step + 1 - start) / (total - start))
        scale = min(scale, 1.0 + (optim.final_lr - 1.0) * done)
    return scale


def momentum(step: int, total: int, optim: OptimConfig) -> float:
    """Muon's momentum for update `step`: linear from 0.85 (or less, where the configured value is) to `optim.momentum`."""
    start, warmup = min(MOMENTUM_START, optim.momentum), round(MOMENTUM_WARMUP * total)
    done = min(1.0, step / warmup) if warmup else 1.0
    return start + (optim.momentum - start) * done
