"""Large intermediates from a pool, for runs that want freed memory back but not to pay for it at every tensor.

Where each tensor has pages of its own, mapping and clearing them is a fifth of a small step; glibc's heap keeps pages, but grows a quarter
larger than what lives in it (docs/precision.md). The pool hands a dead tensor's memory to the next of that size and never holds
more than tensors alone have held at once. Closed, as it is at first, `new` is `torch.empty`.
"""

from __future__ import annotations

import ctypes
from math import prod

import torch
from torch import Tensor

from sparing.kernels import native

LEAST = 1 << 18
"""Bytes of a tensor that is taken from the pool."""
CODES = {torch.bfloat16: (4, 16), torch.float32: (2, 32), torch.int8: (0, 8)}
"""dlpack.h: DLDataTypeCode, bits."""
NAME = b"dltensor"
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", ctypes.pythonapi))
_open = False


def open_pool() -> None:
    """From here on, in this process; without a C compiler it stays closed."""
    global _open
    _open = native.library("pool") is not None


def new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """(shape) uninitialised, contiguous, in the type of `like` (or dtype) and on its device; handed over by DLPack (dmlc/dlpack, dlpack.h)
    where it is the pool's."""
    dtype = dtype or like.dtype
    if _open and like.device.type == "cpu" and dtype in CODES and prod(shape) * dtype.itemsize >= LEAST:
        out, sizes = ctypes.c_void_p(), (ctypes.c_int64 * len(shape))(*shape)
        native.call("pool_take", None, ctypes.addressof(out), ctypes.addressof(sizes), len(shape), *CODES[dtype], of="pool")
        if out.value:
            return torch.from_dlpack(_capsule(out.value, NAME, None))
    return like.new_empty(shape, dtype=dtype)


def new_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`new` of x's shape."""
    return new(x, *x.shape, dtype=dtype)


def trim() -> None:
    """What the pool keeps for later tensors, to the system: a part of the work ends here whose tensors the next has not."""
    if _open:
        native.call("pool_trim", None, of="pool")


def held() -> tuple[int, int, int]:
    """Bytes (of live tensors, kept for later ones, the most that tensors had at once)."""
    found = (ctypes.c_int64 * 3)()
    if _open:
        native.call("pool_bytes", None, ctypes.addressof(found), of="pool")
    return tuple(found)
