"""Memory that goes back to the system when a tensor dies, where memory is what one wants to save.

glibc keeps freed blocks of up to 32 MB in its heap, among blocks that live on: the resident peak is then nearer the sum of activations and
gradients than the larger of them. Large tensors in pages of their own cost the mapping and clearing of those pages at every step
(docs/precision.md): not for small models. Pages of 2 MB make less than half of the page faults.
"""

from __future__ import annotations

import ctypes
import os
import platform

LARGE = 1 << 20
"""Bytes of a tensor that gets pages of its own."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h (man 3 mallopt)."""


def large_pages() -> None:
    """Ask PyTorch to keep tensors of 2 MB and more in large pages (Linux, unless /sys/kernel/mm/transparent_hugepage/enabled is `never`).

    It looks when it makes the first tensor of a process: later, this does nothing. The user's own setting stays."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def give_back() -> bool:
    """From here on, in this process. False where malloc is not glibc's: nothing was changed."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE) and mallopt(M_TRIM_THRESHOLD, LARGE))
