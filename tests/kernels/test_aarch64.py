"""Our C on a processor of another kind: cross-compiled for aarch64 and run by qemu-user, against what it gives here.

Needs aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user).
"""

import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.losses import loss_of
from tests.model.shapes import TINY
from tests.model.test_frozen import filled

from sparing.kernels import native

KERNELS = Path(native.__file__).parent
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
FLAGS = [flag for flag in native.FLAGS if flag not in ("-shared", "-fPIC", "-mprefer-vector-width=512")]
KINDS = {torch.float32: 2, torch.bfloat16: 1}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (COMPILER and EMULATOR and native.passes()), reason="needs a C compiler, aarch64-linux-gnu-gcc and qemu-aarch64"
    ),
]

PLAYER = r"""
#include "LIBRARY"
#include <stdio.h>
#include <stdlib.h>
/* Repeats recorded calls and compares what they leave in memory. */
static int64_t take(FILE *f) { int64_t x; if (fread(&x, 8, 1, f) != 1) exit(3); return x; }
int main(int argc, char **argv) {
    FILE *f = fopen(argv[1], "rb");
    int64_t calls = take(f), bad = 0;
    for (int64_t n = 0; n < calls; n++) {
        char *buffer[48], *expected[48];
        int64_t size[48], kind[48], which = take(f), buffers = take(f);
        if (buffers > 48) return 4;
        for (int64_t b = 0; b < buffers; b++) {
            size[b] = take(f), kind[b] = take(f);
            buffer[b] = aligned_alloc(64, size[b] / 64 * 64 + 64), expected[b] = malloc(size[b]);
            if (fread(buffer[b], 1, size[b], f) != size[b] || fread(expected[b], 1, size[b], f) != size[b]) return 3;
        }
        void *p[48] = {0}; int64_t i[48]; float x[48];
        int64_t arguments = take(f);
        if (arguments > 48) return 4;
        for (int64_t a = 0; a < arguments; a++) {
            int64_t what = take(f), value = take(f);
            if (what == 0) p[a] = value < 0 ? 0 : buffer[value >> 40] + (value & ((1LL << 40) - 1));
            else if (what == 1) i[a] = value;
            else { uint32_t bits = (uint32_t)value; memcpy(x + a, &bits, 4); }
        }
        switch (which) {
CASES
        }
        for (int64_t b = 0; b < buffers; b++) {
            double worst = 0, most = 1e-6;
            for (int64_t k = 0; k < size[b] / (kind[b] == 1 ? 2 : 4) && kind[b]; k++) {
                float mine, theirs;
                if (kind[b] == 2) mine = ((float *)buffer[b])[k], theirs = ((float *)expected[b])[k];
                else mine = get_bf16(((bf16 *)buffer[b])[k]), theirs = get_bf16(((bf16 *)expected[b])[k]);
                if (!memcmp(&mine, &theirs, 4)) continue;
                double off = fabs((double)mine - theirs);
                worst = off > worst || off != off ? off : worst, most = fabs(theirs) > most ? fabs(theirs) : most;
            }
            if (kind[b] ? !(worst <= (kind[b] == 2 ? 1e-5 : 1e-2) * most) : memcmp(buffer[b], expected[b], size[b]) != 0)
                bad++, printf("call %d function %d buffer %d: off by %g of %g\n", (int)n, (int)which, (int)b, worst, most);
            free(buffer[b]), free(expected[b]);
        }
    }
    printf("%d calls, %d bad\n", (int)calls, (int)bad);
    return bad != 0;
}
"""
PRODUCTS = r"""
#include "decode.c"
#include <stdio.h>
/* Products of random rows with random packed weights, in every format: prints the results. */
static uint32_t state = 1;
static uint32_t next(void) { return state = state * 1664525u + 1013904223u; }
static float real(void) { return (float)(int32_t)next() * (1.0f / 2147483648.0f); }
int main(void) {
    enum { N = 48, K = 96, ROWS = 9 };
    for (int64_t format = F32; format <= INT4; format++) {
        static char data[(N * K + N) * 4 + 4096];
        state = 1 + format;
        if (format == F32) for (int i = 0; i < N * K; i++) ((float *)data)[i] = real();
        if (format == BF16) for (int i = 0; i < N * K; i++) ((bf16 *)data)[i] = put_bf16(real());
        if (format == INT8) {
            for (int i = 0; i < N * K; i++) data[i] = (char)(1 + (next() >> 8) % 255);
            for (int i = 0; i < N; i++) ((float *)(data + N * K))[i] = real() * 0.01f;
        }
        if (format == INT4)
            for (int64_t g = 0; g < N / PANEL * K / GROUP; g++) {
                for (int i = 0; i < 256; i++) data[g * GROUP_BYTES + i] = (char)(next() >> 8);
                for (int i = 0; i < PANEL; i++) ((bf16 *)(data + g * GROUP_BYTES + 256))[i] = put_bf16(real() * 0.01f);
            }
        static float x[ROWS * K], scale[ROWS], out[ROWS * N];
        static int8_t q[ROWS * 192];
        static int32_t sums[ROWS * 8];
        Input in = {x, K, q, scale, sums, 192, 8};
        for (int i = 0; i < ROWS * K; i++) x[i] = real();
        for (int i = 0; i < ROWS; i++) quantise(&in, i, x + i * K, K);
        Matrix m = {format, N, K, data, 0};
        for (int rows = 1; rows <= ROWS; rows += 4) {
            product(&m, &in, 0, 0, rows, out, N, 0, 0, 1);
            for (int i = 0; i < rows * N; i++) printf("%.9g\n", out[i]);
        }
    }
    return 0;
}
"""


def run(source: str, folder: Path, name: str, *arguments: str, here: bool = False) -> str:
    (folder / f"{name}.c").write_text(source)
    program = folder / name
    compiler = ["cc", "-march=native"] if here else [COMPILER, "-static"]
    command = [*compiler, *FLAGS, f"-I{KERNELS}", "-pthread", "-Wno-psabi", "-o", program, folder / f"{name}.c", "-lm"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = subprocess.run([*([] if here else [EMULATOR]), program, *arguments], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    return found.stdout


def recorded(monkeypatch, library: str, steps) -> tuple[bytes, str, int]:
    """(all calls of a library of ours that `steps` makes, with the memory before and after each; the C that repeats one of them; how many
    functions there are)."""
    calls, functions = [], {}
    original = native.call

    def call(name, dtype, *arguments, of="passes"):
        if of != library:
            return original(name, dtype, *arguments, of=of)
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t for t in tensors}
        order = list(storages)

        def memory() -> list[bytes]:
            return [torch.tensor([], dtype=torch.uint8).set_(storages[at].untyped_storage()).numpy().tobytes() for at in order]

        before = memory()
        original(name, dtype, *arguments, of=of)
        after, values, kinds = memory(), [], ""
        for a in arguments:
            if isinstance(a, torch.Tensor):
                at = a.untyped_storage().data_ptr()
                kind, value = 0, (order.index(at) << 40) + a.data_ptr() - at
            elif a is None:
                kind, value = 0, -1
            elif isinstance(a, float):
                kind, value = 2, struct.unpack("<I", struct.pack("<f", a))[0]
            else:
                kind, value = 1, int(a)
            values += [kind, value]
            kinds += "pix"[kind]
        key = (name + native.SUFFIXES.get(dtype, ""), kinds)
        words = [functions.setdefault(key, len(functions)), len(order)]
        parts = [struct.pack("<2q", *words)]
        for at, old, new in zip(order, before, after, strict=True):
            parts += [struct.pack("<2q", len(old), KINDS.get(storages[at].dtype, 0)), old, new]
        parts.append(struct.pack(f"<{1 + len(values)}q", len(arguments), *values))
        calls.append(b"".join(parts))

    monkeypatch.setattr(native, "call", call)
    steps()
    cases = [
        f"case {number}: {name}({', '.join(f'{kind}[{a}]' for a, kind in enumerate(kinds))}); break;"
        for (name, kinds), number in functions.items()
    ]
    return struct.pack("<q", len(calls)) + b"".join(calls), "\n".join(cases), len(functions)


@pytest.mark.parametrize(("library", "kernels", "functions"), [("passes", "compiled", 20), ("floats", "vectors", 8)])
def test_training(library, kernels, functions, tmp_path, monkeypatch, one_thread):
    """Every call of a forward and backward pass: latent and grouped attention, mixture, MTP, documents; both number types of the passes."""

    def steps() -> None:
        for changes in ({"mtp_depth": 1}, {"attention": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}):
            model = filled(replace(TINY, **changes))
            c, generator = model.config, torch.Generator().manual_seed(2)
            tokens = torch.randint(c.vocab_size, (2, 30), generator=generator)
            targets = torch.randint(c.vocab_size, (2, 30, 1 + c.mtp_depth), generator=generator)
            documents = (torch.arange(30) // 12).to(torch.int32).expand(2, 30).contiguous()
            for dtype in (torch.float32, torch.bfloat16):
                model.compute_dtype = dtype
                with native.path(kernels):
                    loss_of(model, tokens, targets, documents, sequence_balance=0.01).total.backward()

    record, cases, found = recorded(monkeypatch, library, steps)
    assert found >= functions
    (tmp_path / "calls").write_bytes(record)
    player = PLAYER.replace("LIBRARY", native.SOURCES[library][0]).replace("CASES", cases)
    assert run(player, tmp_path, "player", str(tmp_path / "calls")).endswith(" 0 bad\n")


def test_inference_products(tmp_path):
    """float32, bfloat16, int8 and int4, of 1, 5 and 9 rows: the same sums as here."""
    here, there = (np.array(run(PRODUCTS, tmp_path, f"products{kind}", here=kind).split(), dtype=float) for kind in (True, False))
    assert len(here) == 4 * (1 + 5 + 9) * 48 and np.abs(here).max() > 0.1
    assert np.abs(here - there).max() <= 1e-5 * np.abs(here).max()
