"""Keeps what the backward pass needs of a layer in int8 with a scale for each row: the inputs of its linears, norms and attention.

DeepSeek-V3 keeps linears' inputs in FP8 (arXiv 2412.19437 §3.3.3). Here a hook of autograd packs every bfloat16 tensor that a layer saves,
so that plain and compiled paths need no second version; weights, float32 statistics and small tensors stay as they are. The forward pass
is exact; gradients see activations with a relative error of about 1 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparing.kernels import native
from sparing.kernels.native import new_like

LEAST = 4096
"""Numbers of a tensor that is worth packing."""
CASTS = {"ToCopyBackward0", "CatBackward0", "TBackward0", "torch::autograd::AccumulateGrad"}


def _is_weight(tensor: Tensor) -> bool:
    """A parameter, or made from parameters alone by casting and joining them."""
    if tensor.is_leaf:
        return tensor.requires_grad
    nodes = [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node.name() not in CASTS:
            return False
        nodes += [] if node is None else [below for below, _ in node.next_functions]
    return True


def pack(tensor: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
    """bfloat16 (..., columns) -> (codes int8 of the same shape, scales (...) float32); what is not to be packed comes back as it is.

    A float32 copy of bfloat16 rows (a router's input) is kept as what it was made from."""
    if (
        tensor.dtype == torch.float32
        and tensor.grad_fn is not None
        and tensor.grad_fn.name() == "ToCopyBackward0"
        and not _is_weight(tensor)
    ):
        narrow = new_like(tensor, torch.bfloat16).copy_(tensor.detach())
        return (narrow, None) if torch.equal(narrow.float(), tensor) else tensor
    if tensor.dtype != torch.bfloat16 or tensor.numel() < LEAST or tensor.ndim < 2 or _is_weight(tensor):
        return tensor
    x = tensor.detach().contiguous()
    code, scale = new_like(x, torch.int8), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if native.usable(x, "storage"):
        native.call("pack_int8", None, x, code, scale, scale.numel(), x.shape[-1], of="storage")
        return code, scale
    rows, columns = x.view(-1, x.shape[-1]), x.shape[-1]
    height = max(1, (1 << 18) // columns)
    for start in range(0, len(rows), height):  # in pieces: the float32 copies are small
        part = rows[start : start + height].float()
        most = part.abs().amax(1, keepdim=True)
        code.view(-1, columns)[start : start + height] = part.mul_(127.0 / most.clamp(min=1e-30)).round_()
        scale.view(-1)[start : start + height] = most.squeeze(1) / 127.0
    return code, scale


def unpack(packed: Tensor | tuple[Tensor, Tensor | None]) -> Tensor:
    """The other way."""
    if isinstance(packed, Tensor):
        return packed
    code, scale = packed
    if scale is None:
        return new_like(code, torch.float32).copy_(code)
    x = new_like(code, torch.bfloat16)
    if native.usable(x, "storage"):
        native.call("unpack_int8", None, code, scale, x, scale.numel(), x.shape[-1], of="storage")
        return x
    return torch.mul(code, scale.unsqueeze(-1), out=x)


@contextmanager
def kept_in_int8() -> Iterator[None]:
    """Within it, what is saved for the backward pass is packed."""
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
