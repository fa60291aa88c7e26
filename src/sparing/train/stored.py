"""AdamW and Muon for weights or averages that are not kept in float32; `train/optim.py` uses them where `[precision]` asks.

What an update needs is brought to float32 a few rows or one matrix at a time, so that no whole copy of weights, gradients or averages ever
exists. `step` takes the number of the update: bias correction and the random bits of rounding are functions of it. On a CPU with a compiler
the same is done by kernels/storage.c, and products.c.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from sparing.kernels import native, products
from sparing.kernels.native import new
from sparing.precision.compensation import Master, rows_of, slices
from sparing.precision.moments import Average
from sparing.train.threads import divided


def _kept(parameters: dict[str, Tensor], averages: dict[str, bool], compensation: str, eight_bit: bool) -> dict[str, tuple]:
    """Each parameter's weights and averages ({kind: signed})."""
    return {
        name: (Master(name, p, compensation), *(Average(f"{kind}/{name}", p, signed, eight_bit) for kind, signed in averages.items()))
        for name, p in parameters.items()
    }  # fmt: skip


def _state(kept: dict[str, tuple]) -> dict[str, Tensor]:
    """Live tensors by KIND/NAME."""
    return {f"{kind}/{name}": tensor for name, parts in kept.items() for part in parts for kind, tensor in part.state().items()}


class StoredAdamW:
    """AdamW (arXiv 1711.05101) over groups: "params" {name: tensor}, "lr", "weight_decay". All in float32 it is torch's, bit for bit."""

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float, compensation: str, eight_bit: bool, seed: int):
        self.param_groups, self.betas, self.eps, self.seed = groups, betas, eps, seed
        named = {name: p for group in groups for name, p in group["params"].items()}
        self.kept = _kept(named, {"exp_avg": True, "exp_avg_sq": False}, compensation, eight_bit)

    def state(self) -> dict[str, Tensor]:
        return _state(self.kept)

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Update `number` (the first is 1) from the parameters' `.grad`."""
        beta1, beta2 = self.betas
        root = math.sqrt(1.0 - beta2**number)
        jobs = []
        for group in self.param_groups:
            decay, size = 1.0 - group["lr"] * group["weight_decay"], group["lr"] / (1.0 - beta1**number)
            for name, parameter in group["params"].items():
                if parameter.grad is not None:
                    gradient = rows_of(parameter.grad.contiguous())
                    jobs += [partial(self._update, name, gradient, rows, number, root, decay, size) for rows in slices(*gradient.shape)]
        divided(jobs)

    def _update(self, name: str, gradient: Tensor, rows: slice, number: int, root: float, decay: float, size: float) -> None:
        (beta1, beta2), (master, first, second) = self.betas, self.kept[name]
        if _compiled(gradient):
            parts = [a for part in self.kept[name] for a in part.address(self.seed, number)]
            weight, averages = parts[:4], parts[4:]
            rest = (rows.start, rows.stop, gradient.shape[1], beta1, beta2, root, self.eps, decay, size)
            native.call("stored_adamw", None, *weight, gradient, int(gradient.dtype == torch.float32), *averages, *rest, of="storage")
            return
        g, w = gradient[rows].float(), master.read(rows).mul_(decay)
        m = first.read(rows).lerp_(g, 1.0 - beta1)
        v = second.read(rows).mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        w.addcdiv_(m, (v.sqrt() / root).add_(self.eps), value=-size)
        for part, value in ((first, m), (second, v), (master, w)):
            part.write(rows, value, self.seed, number)


class StoredMuon:
    """Muon (see `train/optim.py`), matrix by matrix."""

    def __init__(
        self, parameters: dict[str, Tensor], *, steps: int, weight_decay: float, dtype: torch.dtype, compensation: str, eight_bit: bool,
        seed: int,
    ):  # fmt: skip
        self.parameters, self.steps, self.weight_decay, self.dtype, self.seed = parameters, steps, weight_decay, dtype, seed
        self.kept = _kept(parameters, {"momentum": True}, compensation, eight_bit)

    def state(self) -> dict[str, Tensor]:
        return _state(self.kept)

    @torch.no_grad()
    def step(self, lr: float, momentum: float, number: int) -> None:
        """Update `number` from the parameters' `.grad`. lr: peak x schedule."""
        jobs = []
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient = rows_of(parameter.grad.contiguous())
            # Matrices are consecutive rows: an expert's fused gate and up projections are two of them.
            height = parameter.shape[-2] // (2 if name.endswith("gate_up_proj") else 1)
            jobs += [
                partial(self._update, name, gradient, slice(start, start + height), lr, momentum, number)
                for start in range(0, len(gradient), height)
            ]
        divided(jobs)

    def _update(self, name: str, gradient: Tensor, rows: slice, lr: float, momentum: float, number: int) -> None:
        (master, average), height = self.kept[name], rows.stop - rows.start
        scale, decay = lr * max(1.0, height / gradient.shape[1]) ** 0.5, 1.0 - lr * self.weight_decay
        even = height % 4 == 0 and gradient.shape[1] % 2 == 0
        if self.dtype == torch.bfloat16 and even and _compiled(gradient) and native.own_products():
            weight, mean = master.address(self.seed, number), average.address(self.seed, number)
            where, direction = (rows.start, height, gradient.shape[1]), new(average.value, height, gradient.shape[1], dtype=torch.float32)
            found, wide = torch.empty(1), int(gradient.dtype == torch.float32)
            native.call("stored_direction", None, gradient, wide, *mean, *where, float(momentum), direction, found, of="storage")
            native.call("orthogonalise", None, direction, float(found), *direction.shape, self.steps)
            native.call("stored_step", None, *weight, direction, *where, float(scale), float(decay), of="storage")
            return
        g = gradient[rows].float()
        m = average.read(rows).lerp_(g, 1.0 - momentum)
        average.write(rows, m, self.seed, number)
        update, w = products.orthogonalise(g.lerp(m, momentum).to(self.dtype)[None], self.steps)[0].float(), master.read(rows)
        w.mul_(torch.where(update * w > 0, decay, 1.0))
        master.write(rows, w.sub_(update, alpha=scale), self.seed, number)


def _compiled(gradient: Tensor) -> bool:
    """Whether storage.c does it; it divides rows among threads, so the threads inside PyTorch's operations do not matter."""
    return native.compiled() and gradient.device.type == "cpu" and gradient.dtype in native.SUFFIXES and bool(native.library("storage"))
