"""Our C: libraries built once per machine with the system's compiler and called through ctypes, and the memory of their results.

Which kernels run is an explicit choice, thread by thread, that a run keeps in `train.kernels` (see `Path`). Where there is no compiler
`passes()` is None and every kernel takes its plain path. The passes are serial: they are for rows divided among threads, which measured
fastest (LAB.md), or for one core.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from math import prod
from pathlib import Path as FilePath
from typing import Literal

import torch
from torch import Tensor

from sparing.base.hardware import cpu_flags, cpu_name, home
from sparing.base.messages import say
from sparing.kernels.sizes import CACHE_BLOCK, FLOAT_HEAD_TOKENS, MOMENT_BLOCK, NEWTON_SCHULZ, OWN_HEAD_TOKENS

Path = Literal["tiles", "vectors", "compiled", "plain"]
"""plain: PyTorch's operations. compiled: our passes, and matrix products by PyTorch. vectors: our passes with our own products, of float32
on any processor, of bfloat16 with AVX512_BF16. tiles: of bfloat16 by the matrix unit of Intel's servers (AMX), float32 as compiled."""
SOURCES = {
    "passes": (
        "native.c", "numbers.inc", "held.inc", "passes.inc", "norm.inc", "heads.inc", "cross_entropy.inc", "swiglu.inc",
        "scratch.inc", "vectors.inc", "products.c", "products.inc", "tiles.inc",
    ),
    "floats": (
        "floats.c", "numbers.inc", "held.inc", "scratch.inc", "norm.inc", "heads.inc", "cross_entropy.inc", "swiglu.inc", "products.inc",
        "latent.inc",
    ),
    "storage": ("storage.c", "numbers.inc"),
    "int8": ("int8.c", "numbers.inc", "scratch.inc", "vectors.inc", "tiles.inc"),
    "pool": ("pool.c",),
}  # fmt: skip
"""What each library is made of, first the file that includes the others.
floats: our own products of float32. All but the passes are compiled when asked for: those after it are for `[precision]`."""
UNUSED_S = 30 * 86400
"""Builds that nobody has used for so long are deleted when another is made."""
FLAGS = (
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),  # compilers prefer 256 (LAB.md)
    "-O3", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared",
    f"-DMOMENT_BLOCK={MOMENT_BLOCK}", f"-DCACHE_BLOCK={CACHE_BLOCK}", f"-DOWN_HEAD_TOKENS={OWN_HEAD_TOKENS}",
    f"-DFLOAT_HEAD_TOKENS={FLOAT_HEAD_TOKENS}",
    "-DNEWTON_SCHULZ=" + ",".join(f"{x}f" for x in NEWTON_SCHULZ),
)  # fmt: skip
SUFFIXES = {torch.bfloat16: "_bf16", torch.float32: "_f32"}
OWN = {torch.bfloat16: "passes", torch.float32: "floats"}
"""The libraries of our own products, by the type of the activations."""


def processor() -> str:
    """What our C is compiled for, as -march= takes it: $SPARING_PROCESSOR (x86-64-v3, say, to try a lesser processor), or "native"."""
    return os.environ.get("SPARING_PROCESSOR") or "native"


def _compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def build(stem: str, sources: tuple[str, ...], flags: tuple[str, ...]) -> FilePath | None:
    """The shared library of the first of `sources` (the others are included in it), for this compiler and this processor; compiled where
    it is not there yet (seconds). None without a compiler."""
    compiler = _compiler()
    if compiler is None or os.name == "nt":  # the sources use POSIX threads and files
        return None
    here = FilePath(__file__).parent
    cpu = [cpu_name(), *sorted(cpu_flags())]
    key = hashlib.sha256("\0".join([compiler, *flags, *cpu, *((here / name).read_text() for name in sources)]).encode()).hexdigest()[:16]
    target = FilePath(os.environ.get("SPARING_NATIVE") or home() / "native") / f"{stem}-{key}.so"
    try:
        if target.exists():
            with suppress(OSError):  # another user's
                target.touch()
            return target
        target = _writable(target.parent) / target.name
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = FilePath(scratch) / target.name
            subprocess.run([compiler, *flags, "-o", made, here / sources[0], "-lm"], check=True, capture_output=True, timeout=120)
            made.replace(target)
        with suppress(OSError):  # another process does the same; whoever runs one has it mapped and keeps it
            for old in target.parent.glob(f"{stem}-*.so"):
                if time.time() - old.stat().st_mtime > UNUSED_S:
                    old.unlink()
    except (OSError, subprocess.SubprocessError):
        return None
    return target


@cache
def _writable(folder: FilePath) -> FilePath:
    """`folder`, made where it is not there; where it cannot be written, a folder that goes when this process ends."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        return folder
    say(f"{folder} cannot be written: our C is compiled at every start, in seconds; set SPARING_HOME to a folder that can be written")
    return FilePath(_temporary().name)


@cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="sparing-native-")


@cache
def library(name: str) -> ctypes.CDLL | None:
    """One of SOURCES, or None on a machine without a C compiler."""
    path = build(name, SOURCES[name], (*FLAGS, f"-march={processor()}"))
    try:
        return ctypes.CDLL(str(path)) if path else None
    except OSError:
        return None


def passes() -> ctypes.CDLL | None:
    """The compiled passes, or None on a machine without a C compiler."""
    return library("passes")


_path: ContextVar[Path] = ContextVar("sparing_kernels", default="plain")


def choose(path: Path) -> None:
    """Which kernels run in this thread from here on. Where the processor cannot run them: the next ones that it can."""
    _path.set(path)
    if path != "plain" and can("vectors"):
        passes().use_tiles(int(path == "tiles" and can("tiles")))


@cache
def can(path: Path, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether kernels can run on this machine for activations of `dtype`."""
    if path == "plain":
        return True
    if passes() is None:
        return False
    if dtype == torch.float32:
        return path == "compiled" or (path == "vectors" and library("floats") is not None)
    if path == "tiles":
        return "amx_bf16" in cpu_flags() and can("vectors") and bool(passes().may_use_tiles())
    return path == "compiled" or hasattr(passes(), "use_tiles")


def chosen() -> Path:
    """The kernels of this thread."""
    return _path.get()


@contextmanager
def path(which: Path) -> Iterator[None]:
    """Which kernels run in this thread inside the context."""
    before = _path.get()
    choose(which)
    try:
        yield
    finally:
        choose(before)


def compiled() -> bool:
    """Whether this thread was told to run compiled kernels."""
    return _path.get() != "plain"


def own_products(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether this thread was told to run our own products of a number type, and can."""
    if dtype == torch.float32:
        return _path.get() == "vectors" and can("vectors", dtype)
    return dtype in OWN and _path.get() in ("tiles", "vectors") and can("vectors")


def arithmetic(kernels: Path) -> str:
    """What decides the last bits of a result here: processor, instruction set, versions, kernels."""
    compiler = "" if kernels == "plain" else f" by {FilePath(found).name if (found := _compiler()) else 'no compiler'} for {processor()}"
    return f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}, {kernels} kernels{compiler}"


def usable(x: Tensor, of: str = "passes") -> bool:
    """Whether a pass over `x` should be the compiled one; of: its library."""
    fits = compiled() and x.device.type == "cpu" and x.dtype in SUFFIXES
    return fits and not torch.compiler.is_compiling() and library(of) is not None


@cache
def _function(of: str, name: str, arguments: str):
    function = getattr(library(of), name)
    kinds = {"p": ctypes.c_void_p, "f": ctypes.c_float, "i": ctypes.c_int64}
    function.argtypes, function.restype = [kinds[c] for c in arguments], None
    return function


def call(name: str, dtype: torch.dtype | None, *arguments: Tensor | float | int | None, of: str = "passes") -> None:
    """Run one pass of a library, the one for `dtype` where there are several. Tensors go as the address of their first element: shapes and
    strides are the caller's business."""
    kinds, values = [], []
    for a in arguments:
        if isinstance(a, Tensor):
            kinds.append("p")
            values.append(a.data_ptr())
        elif a is None:
            kinds.append("p")
            values.append(None)
        else:
            kinds.append("f" if isinstance(a, float) else "i")
            values.append(a)
    _function(of, name + SUFFIXES.get(dtype, ""), "".join(kinds))(*values)


# Memory of large intermediates
#
# glibc keeps freed blocks of up to 32 MB in its heap, among blocks that live on: the resident peak is then nearer the sum of activations
# and gradients than the larger of them. Where each tensor has pages of its own, mapping and clearing them is a fifth of a small step. The
# pool (pool.c) hands a dead tensor's memory to the next of that size and never holds more than tensors alone have held at once.

POOLED_BYTES = 1 << 17
"""Bytes of a tensor that is taken from the pool."""
DLPACK_CODES = {torch.bfloat16: (4, 16), torch.float32: (2, 32), torch.int8: (0, 8)}
"""dlpack.h: DLDataTypeCode, bits."""
DLPACK_NAME = b"dltensor"
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", ctypes.pythonapi))
_open = False


def open_pool() -> None:
    """From here on, in this process. Without a C compiler it stays closed, and threads share one of glibc's heaps instead: what one of them
    has freed serves another (614 MB instead of 658 in runs of a minute, as fast: LAB.md)."""
    global _open
    _open = library("pool") is not None
    if not _open and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """(shape) uninitialised, contiguous, in the type of `like` (or dtype) and on its device; handed over by DLPack (dmlc/dlpack, dlpack.h)
    where it is the pool's."""
    dtype = dtype or like.dtype
    if _open and like.device.type == "cpu" and dtype in DLPACK_CODES and prod(shape) * dtype.itemsize >= POOLED_BYTES:
        out, sizes = ctypes.c_void_p(), (ctypes.c_int64 * len(shape))(*shape)
        call("pool_take", None, ctypes.addressof(out), ctypes.addressof(sizes), len(shape), *DLPACK_CODES[dtype], of="pool")
        if out.value:
            return torch.from_dlpack(_capsule(out.value, DLPACK_NAME, None))
    return like.new_empty(shape, dtype=dtype)


def new_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`new` of x's shape."""
    return new(x, *x.shape, dtype=dtype)


def trim() -> None:
    """What the pool keeps for later tensors, to the system: a part of the work ends here whose tensors the next has not."""
    if _open:
        call("pool_trim", None, of="pool")


def trim_heap() -> None:
    """Freed memory to the system, which glibc otherwise keeps, in an arena for each thread."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def held() -> tuple[int, int, int]:
    """Bytes (of live tensors, kept for later ones, the most that tensors had at once)."""
    found = (ctypes.c_int64 * 3)()
    if _open:
        call("pool_bytes", None, ctypes.addressof(found), of="pool")
    return tuple(found)


PAGES_BYTES = 1 << 20
"""Bytes of a tensor that gets pages of its own."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h (man 3 mallopt)."""


def give_back() -> bool:
    """From here on in this process, memory of large tensors goes back to the system when they die. No number changes. A job that wants
    little memory calls it at its beginning (`budget.memory.gives_back`). False where malloc is not glibc's: nothing was changed."""
    if platform.libc_ver()[0] != "glibc":
        return False
    open_pool()
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, PAGES_BYTES) and mallopt(M_TRIM_THRESHOLD, PAGES_BYTES))
