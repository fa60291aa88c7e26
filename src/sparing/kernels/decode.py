"""The compiled inference step (decode.c, decode_products.inc): its structures, and the library for this processor.

The plain reference is `sparing.infer.network.TorchNetwork`. One source serves every processor: vectors of 16 floats that the compiler
cuts to what there is, and integer products for AVX512-VNNI, AVX-VNNI, AVX2 or plain C, which give the same integers.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from sparing.base.hardware import cpu_flags
from sparing.kernels import native

SOURCES = ("decode.c", "decode_products.inc", "scratch.inc", "tiles.inc", "numbers.inc")
FLAGS = (*native.FLAGS, "-pthread", "-Wno-psabi")
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
PRODUCTS = ("plain C", "AVX2", "AVX-VNNI", "AVX512-VNNI")
"""What multiplies int8, by number; a processor with AMX reads prompts by that (`choose_tiles`)."""
TWO_DIGITS = {"down": 1, "o": 2, "first": 4, "gate_up": 8, "head": 16}
"""Products of all layers whose rows may be multiplied as two digits of 8 bits in int8 and int4; `gate_up` and `down` of mixtures are those
of their shared experts."""
SCORING = {"sigmoid": 0, "softmax": 1, "sqrtsoftplus": 2}


def _fields(**kinds: str) -> list[tuple[str, type]]:
    types = {"int": ctypes.c_int64, "at": ctypes.c_void_p, "float": ctypes.c_float}
    return [(name, types.get(kind)) for kind, names in kinds.items() for name in names.split()]  # type: ignore[misc]


class Matrix(ctypes.Structure):
    """One packed matrix, or a stack of them `stride` bytes apart."""

    _fields_ = _fields(int="format outputs inner") + _fields(at="data") + _fields(int="stride")


class Layer(ctypes.Structure):
    _fields_ = [
        *_fields(at="input_norm q_norm kv_norm post_norm first_bias"),
        *((name, Matrix) for name in "first q_b k_b v_b o gate_up down router expert_gate_up expert_down".split()),
        *_fields(at="bias enorm hnorm head_norm"),
        ("join", Matrix),
    ]


class Residency(ctypes.Structure):
    _fields_ = _fields(int="slots taken clock loads file", at="arena base place owner used")


class Update(ctypes.Structure):
    """The low-rank updates of a product, of each of its parts."""

    _fields_ = [
        *_fields(int="parts rank inner", at="down"),
        ("up", ctypes.c_void_p * 3),
        ("outputs", ctypes.c_int64 * 3),
    ]


class ModelStruct(ctypes.Structure):
    _fields_ = [
        *_fields(int="hidden heads nope rope value latent q_rank kv_heads head_dim latent_attention"),
        *_fields(int="experts chosen least groups chosen_groups scoring normalise expert_width digits"),
        *_fields(int="layers all_layers width embed_bf16 quantised", float="eps scale routed_scale"),
        *_fields(at="embed final_norm rotary cache"),
        ("head", Matrix),
        ("draft_head", Matrix),
        ("layer", ctypes.POINTER(Layer)),
        ("residency", Residency),
        ("updates", ctypes.POINTER(Update)),
        *_fields(int="narrow"),
        *_fields(at="pool"),
        *_fields(int="rows longest"),
        ("scratch", ctypes.c_void_p * 24),
    ]


class Batch(ctypes.Structure):
    _fields_ = _fields(
        int="rows wanted table_stride mtp",
        at="tokens positions owners tables wanted_rows first before shares used routes adapters after logits",
    )


_NOTHING = ctypes.c_char * 0


def address(array: np.ndarray) -> int:
    """Of the first number of a contiguous array; `ctypes.data` and `__array_interface__` take four times as long."""
    return ctypes.addressof(_NOTHING.from_buffer(array))


@cache
def library(processor: str | None = None) -> ctypes.CDLL | None:
    """The compiled step, for this processor or (to compare) for a lesser one such as "x86-64-v3"; None without a C compiler.

    Where int8 is multiplied by AVX-VNNI, AVX2 is tried too, and the faster of them kept (milliseconds, and once the compiler's seconds).
    """
    found = _load(processor or native.processor())
    if found and processor is None and PRODUCTS[found.products()] == "AVX-VNNI":
        found = min((found, _load(native.processor(), "-mno-avxvnni") or found), key=product_seconds)
    return found


def product_seconds(step: ctypes.CDLL) -> float:
    """Seconds that a row alone takes through 1024 x 1024 int8 weights, and a row of a prompt."""
    return step.probe(FORMATS["int8"], 1) + step.probe(FORMATS["int8"], 64) / 64


def _load(processor: str, *flags: str) -> ctypes.CDLL | None:
    path = native.build("decode", SOURCES, (*FLAGS, f"-march={processor}", *flags))
    try:
        found = ctypes.CDLL(str(path)) if path else None
    except OSError:
        return None
    if found:
        found.products.restype, found.products.argtypes = ctypes.c_int64, []
        found.pool_open.restype, found.pool_open.argtypes = ctypes.c_void_p, [ctypes.c_int64]
        found.pool_close.argtypes = [ctypes.c_void_p]
        found.forward.argtypes = [ctypes.POINTER(ModelStruct), ctypes.POINTER(Batch), ctypes.c_int64, ctypes.c_int64]
        found.release.argtypes = [ctypes.POINTER(ModelStruct)]
        found.draw = ctypes.PyDLL(str(path)).draw  # microseconds: to let go of the interpreter meanwhile would cost more
        found.draw.restype = ctypes.c_int64
        found.draw.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_uint32, ctypes.c_uint32]
        found.probe.restype, found.probe.argtypes = ctypes.c_double, [ctypes.c_int64, ctypes.c_int64]
        found.use_tiles.restype, found.use_tiles.argtypes = ctypes.c_int64, [ctypes.c_int64]
        for function in (found.pool_close, found.forward, found.release, found.choose_tiles):
            function.restype = None
        if "amx_int8" in cpu_flags():
            found.choose_tiles()
    return found
