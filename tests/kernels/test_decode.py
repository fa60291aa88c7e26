"""Which instructions multiply int8 in the compiled step; tests/infer/test_network.py compares what they give."""

import subprocess

import pytest

from sparing.base.hardware import cpu_flags
from sparing.kernels import decode, native

pytestmark = pytest.mark.skipif(decode.library() is None, reason="there is no C compiler")
SETS = {"x86-64-v3": ("AVX2", {"avx2", "fma"}), "alderlake": ("AVX-VNNI", {"avx2", "fma", "avx_vnni"})}


def available() -> list[str]:
    return [name for name, (_, needed) in SETS.items() if needed <= cpu_flags() and decode.library(name)]


def test_each_processor_has_its_products():
    for name in available():
        assert decode.PRODUCTS[decode.library(name).products()] == SETS[name][0]
    flags = cpu_flags()
    if native.processor() == "native" and {"avx512_vnni", "avx512bw"} <= flags:
        assert decode.PRODUCTS[decode.library().products()] == "AVX512-VNNI"


@pytest.mark.skipif("alderlake" not in available(), reason="this processor or compiler has no AVX-VNNI")
def test_the_faster_of_avx_vnni_and_avx2_is_kept(monkeypatch):
    monkeypatch.setenv("SPARING_PROCESSOR", "alderlake")
    for winner in ("AVX-VNNI", "AVX2"):
        decode.library.cache_clear()
        monkeypatch.setattr(decode, "product_seconds", lambda step, w=winner: decode.PRODUCTS[step.products()] != w)
        assert decode.PRODUCTS[decode.library().products()] == winner
    monkeypatch.undo()
    decode.library.cache_clear()


@pytest.mark.skipif("alderlake" not in available(), reason="this processor or compiler has no AVX-VNNI")
def test_avx_vnni_is_in_the_code():
    """The instruction in its AVX form, on registers of 256 bits, and nothing wider."""
    path = native.build("decode", decode.SOURCES, (*decode.FLAGS, "-march=alderlake"))
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True).stdout
    assert "vpdpbusd" in code and "{vex}" in code and "zmm" not in code
