"""Memory that goes back to the system when a tensor dies, where memory is what one wants to save.

glibc keeps freed blocks of up to 32 MB in its heap, among blocks that live on: the resident peak is then nearer the sum of activations and
gradients than the larger of them. Here intermediates of the compiled kernels share a pool (`kernels/pool.py`), and other tensors of
1 MB and more get pages of their own, which are mapped and cleared each time.
"""

from __future__ import annotations

import ctypes
import platform

from sparing.kernels.pool import open_pool

LARGE = 1 << 20
"""Bytes of a tensor that gets pages of its own."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h (man 3 mallopt)."""


def give_back() -> bool:
    """From here on, in this process. False where malloc is not glibc's: nothing was changed."""
    if platform.libc_ver()[0] != "glibc":
        return False
    open_pool()
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE) and mallopt(M_TRIM_THRESHOLD, LARGE))
