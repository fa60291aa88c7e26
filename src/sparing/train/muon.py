"""Muon: momentum whose every matrix is replaced by the nearest (semi-)orthogonal one.

Keller Jordan, "Muon: an optimizer for hidden layers" (kellerjordan.github.io/posts/muon, 2024): the quintic Newton-Schulz iteration and
the scale sqrt(max(1, rows/columns)). Weight decay is cautious: only weights that the update shrinks anyway (arXiv 2510.12402).
Matrices of one shape, whichever layer or expert they belong to, are one batch of products: small ones are far from filling a machine
alone. R rows, C columns, N matrices of the batch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from sparing.kernels import native, products

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # largest slope at zero that still lands singular values in about [0.7, 1.2]


def orthogonalise(x_NRC: Tensor, steps: int) -> Tensor:
    """U V^T (approximately) of each matrix U S V^T in the batch, in the batch's own dtype; a zero matrix stays zero."""
    a, b, c = COEFFICIENTS
    tall = x_NRC.shape[-2] > x_NRC.shape[-1]
    x = x_NRC.mT if tall else x_NRC  # the Gram matrix is that of the shorter side
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = x / norm.clamp(min=1e-7).to(x.dtype)  # Frobenius >= spectral norm: the iteration needs singular values <= 1
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def split(name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices inside a parameter, as views, each (n, R, C): the experts' fused (E, 2F, D) holds two, gate and up.

    Orthogonalised together, gate and up would have to share F directions of the input; they are different matrices.
    """
    if tensor.ndim == 2:
        return [tensor.unsqueeze(0)]
    assert tensor.ndim == 3, name
    return list(tensor.chunk(2, dim=1)) if name.endswith("gate_up_proj") else [tensor]


class Muon:
    """Muon over named parameters of 2 or 3 dimensions. State: one float32 momentum of the parameter's shape each."""

    def __init__(self, parameters: dict[str, Tensor], *, steps: int = 5, weight_decay: float = 0.0, dtype: torch.dtype = torch.bfloat16):
        self.parameters, self.steps, self.weight_decay, self.dtype = parameters, steps, weight_decay, dtype
        self.momentum = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        # The compiled products take pairs of numbers, and neither other devices nor other types.
        self._compiled = dtype == torch.bfloat16 and all(
            p.device.type == "cpu" and p.shape[-1] % 2 == 0 and p.shape[-2] % 4 == 0 for p in parameters.values()
        )
        self._pool: ThreadPoolExecutor | None = None
        self.groups: dict[tuple[int, int], list[tuple[str, int]]] = {}
        for name, parameter in parameters.items():
            for part, matrix in enumerate(split(name, parameter)):
                self.groups.setdefault(tuple(matrix.shape[-2:]), []).append((name, part))

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        """One update from the parameters' `.grad` (which may be overwritten). lr: peak x schedule."""
        if self._compiled and products.available():
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
        count = torch.get_num_threads()
        if self._pool is None and count > 1:
            self._pool = ThreadPoolExecutor(count, "sparing-muon")

        def update(share: int) -> None:
            for weight, grad, average in matrices[share::count]:
                rows, columns = weight.shape
                scale = lr * max(1.0, rows / columns) ** 0.5
                sizes = (rows, columns, float(momentum), self.steps, float(scale), 1.0 - lr * self.weight_decay)
                native.call("muon", None, weight, grad, average, *sizes)

        if self._pool is None:
            update(0)
        else:
            list(self._pool.map(update, range(count)))

    def _batched_step(self, lr: float, momentum: float) -> None:
        names = list(self.parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters.values()]
        averages = [self.momentum[name] for name in names]
        torch._foreach_lerp_(averages, grads, 1.0 - momentum)
        torch._foreach_lerp_(grads, averages, momentum)  # Nesterov: where the average will be, from where it is
        directions = dict(zip(names, grads, strict=True))
        for (rows, columns), members in self.groups.items():
            batch = torch.cat([split(name, directions[name])[part].to(self.dtype) for name, part in members])
            batch = orthogonalise(batch, self.steps)
            scale = lr * max(1.0, rows / columns) ** 0.5
            done = 0
            for name, part in members:
                weight = split(name, self.parameters[name])[part]
                update = batch[done : done + len(weight)].to(weight.dtype)
                done += len(weight)
                if self.weight_decay:
                    weight.mul_(torch.where(update * weight > 0, 1.0 - lr * self.weight_decay, 1.0))
                weight.sub_(update, alpha=scale)
