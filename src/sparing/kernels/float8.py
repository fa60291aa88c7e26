"""FP8 products on NVIDIA GPUs, DeepSeek-V3's recipe (arXiv 2412.19437 §3.3): e4m3 in tiles of 1x128 and blocks of 128x128, scales that
are powers of two, partial sums promoted to float32 every 128.

Dense products are torch's scaled product where it has these blocks (compute capability 9.0, CUDA 12.9); everywhere from 8.9 on, and for
groups, our Triton kernel. Triton also quantises, and joins that with SwiGLU. The plain form of all is precision/products.py; on a CPU the
kernels run through Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested. They have not run on a GPU yet.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.kernels.products import spans

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without
    triton = None

TILE = 128


@cache
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def usable(*operands: Tensor) -> bool:
    """Whether products of these bfloat16 (or weights' float32) operands should be done here: widths that are multiples of 128."""
    wide = all(size % TILE == 0 for x in operands for size in x.shape[1:])
    return triton is not None and operands[0].is_cuda and operands[0].dtype == torch.bfloat16 and wide and _capability() >= (8, 9)


if triton is not None:

    @triton.jit
    def _scale_of(bits):
        """Bits of a block's largest magnitude -> (scale, inverse): `precision.quantise.quantise` with powers."""
        amax = bits.to(tl.float32, bitcast=True)
        ratio = amax / 448.0
        code = ratio.to(tl.int32, bitcast=True)
        exponent = (code >> 23) + tl.where((code & 0x7FFFFF) != 0, 1, 0)
        broken, empty, lost = bits >= 0x7F800000, bits == 0, (bits > 0) & (exponent < 1) | (bits > 0) & (code < 0x800000)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        scale = tl.where(broken, float("nan"), tl.where(empty, 1.0, tl.where(lost, 0.0, scale)))
        return scale, tl.where(broken | empty | lost, 0.0, inverse)

    @triton.jit
    def _magnitudes(x):
        """As integers, so that infinity and NaN are the largest."""
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF

    @triton.jit
    def _scaled(x, inverse):
        """Rounded here, to nearest even, so that the conversion is exact: Triton's interpreter would cut the rest off."""
        x = tl.where(inverse == 0.0, 0.0, x * inverse)
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        denormal = (x + 24576.0) - 24576.0  # 1.5 * 2^23 steps of 2^-9
        return tl.where(tl.abs(x) < 0.015625, denormal, normal).to(tl.float8e4nv)

    @triton.jit
    def _tiles(x, values, scales, M, K, s_m, s_k, ROWS: tl.constexpr):
        """Tiles of 1x128 of x (M, K), strided as it likes -> values (M, K) contiguous, scales (K / 128, M)."""
        m, tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
        k = tile * 128 + tl.arange(0, 128)
        mask = (m < M)[:, None] & (k < K)[None, :]
        block = tl.load(x + m[:, None].to(tl.int64) * s_m + k[None, :].to(tl.int64) * s_k, mask=mask, other=0.0).to(tl.float32)
        scale, inverse = _scale_of(tl.max(_magnitudes(block), 1))
        tl.store(values + m[:, None].to(tl.int64) * K + k[None, :], _scaled(block, inverse[:, None]), mask=mask)
        tl.store(scales + tile * M + m, scale, mask=m < M)

    @triton.jit
    def _swiglu_tiles(h, gates, values, scales, N, F_, ROWS: tl.constexpr):
        """silu(gate) * up * gates[n] of h (N, 2F), gate's half first -> tiles of 1x128 as above."""
        n, tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
        f = tile * 128 + tl.arange(0, 128)
        mask = (n < N)[:, None] & (f < F_)[None, :]
        at = h + n[:, None].to(tl.int64) * 2 * F_ + f[None, :]
        gate, up = tl.load(at, mask=mask, other=0.0).to(tl.float32), tl.load(at + F_, mask=mask, other=0.0).to(tl.float32)
        block = gate / (1.0 + tl.exp(-gate)) * up * tl.load(gates + n, mask=n < N, other=0.0)[:, None]
        scale, inverse = _scale_of(tl.max(_magnitudes(block), 1))
        tl.store(values + n[:, None].to(tl.int64) * F_ + f[None, :], _scaled(block, inverse[:, None]), mask=mask)
        tl.store(scales + tile * N + n, scale, mask=n < N)

    @triton.jit
    def _blocks(w, values, scales, N, K, TURNED: tl.constexpr):
        """Blocks of 128x128 of matrices w (E, N, K) -> values as they lie, or each turned (K, N); scales (E, N / 128, K / 128) likewise."""
        e, i, j = tl.program_id(2).to(tl.int64), tl.program_id(0), tl.program_id(1)
        n, k = i * 128 + tl.arange(0, 128), j * 128 + tl.arange(0, 128)
        block = tl.load(w + e * N * K + n[:, None].to(tl.int64) * K + k[None, :]).to(tl.float32)
        scale, inverse = _scale_of(tl.max(tl.max(_magnitudes(block), 1), 0))
        block = _scaled(block, inverse)
        if TURNED:
            tl.store(values + e * N * K + k[None, :].to(tl.int64) * N + n[:, None], block)
            tl.store(scales + e * (N // 128) * (K // 128) + j * (N // 128) + i, scale)
        else:
            tl.store(values + e * N * K + n[:, None].to(tl.int64) * K + k[None, :], block)
            tl.store(scales + e * (N // 128) * (K // 128) + i * (K // 128) + j, scale)

    @triton.jit
    def _grouped(a, a_scale, b, b_scale, out, starts, stops, groups, S, N, K, SQUARE: tl.constexpr, ROWS: tl.constexpr):
        """Rows of a (S, K) by their group's b (N, K): program 0 is a stretch of rows starts to stops of one group, program 1 128 columns.
        a_scale (K / 128, S); b_scale (N / 128, K / 128), or (K / 128, N) where b is in tiles."""
        t, column = tl.program_id(0), tl.program_id(1)
        e = tl.load(groups + t).to(tl.int64)
        m, n = tl.load(starts + t) + tl.arange(0, ROWS), column * 128 + tl.arange(0, 128)
        rows, columns = m < tl.load(stops + t), n < N
        total = tl.zeros((ROWS, 128), dtype=tl.float32)
        for i in range(0, tl.cdiv(K, 128)):
            k = i * 128 + tl.arange(0, 128)
            inside = k < K
            left = tl.load(a + m[:, None].to(tl.int64) * K + k[None, :], mask=rows[:, None] & inside[None, :], other=0.0)
            right = tl.load(b + e * N * K + n[None, :].to(tl.int64) * K + k[:, None], mask=columns[None, :] & inside[:, None], other=0.0)
            part = tl.dot(left, right)  # at most 128 long; the sum over parts is float32's own
            scale = tl.load(a_scale + i * S + m, mask=rows, other=0.0)
            if SQUARE:
                total += part * (scale * tl.load(b_scale + e * (N // 128) * (K // 128) + column * (K // 128) + i))[:, None]
            else:
                total += part * scale[:, None] * tl.load(b_scale + i * N + n, mask=columns, other=0.0)[None, :]
        tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], total.to(out.dtype.element_ty), mask=rows[:, None] & columns[None, :])


def tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K), any strides -> (e4m3 (M, K), scales (K / 128, M)): 1x128 along K."""
    M, K = x.shape
    values = torch.empty(M, K, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(triton.cdiv(K, TILE), M, device=x.device)
    _tiles[triton.cdiv(M, 32), triton.cdiv(K, TILE)](x, values, scales, M, K, *x.stride(), ROWS=32)
    return values, scales


def swiglu_tiles(h: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """h (N, 2F), gates (N,) float32 -> `tiles` of silu(gate) * up * gates, which is itself never written."""
    N, width = h.shape[0], h.shape[1] // 2
    values = torch.empty(N, width, dtype=torch.float8_e4m3fn, device=h.device)
    scales = torch.empty(triton.cdiv(width, TILE), N, device=h.device)
    _swiglu_tiles[triton.cdiv(N, 32), triton.cdiv(width, TILE)](h, gates, values, scales, N, width, ROWS=32)
    return values, scales


def blocks(w: Tensor, turned: bool = False) -> tuple[Tensor, Tensor]:
    """w (N, K) or (E, N, K), multiples of 128 -> (e4m3, scales (.., N / 128, K / 128)); turned: of each matrix's transpose."""
    *E, N, K = w.shape
    shape, count = (K, N) if turned else (N, K), E[0] if E else 1
    values = torch.empty(*E, *shape, dtype=torch.float8_e4m3fn, device=w.device)
    scales = torch.empty(*E, *(size // TILE for size in shape), device=w.device)
    _blocks[N // TILE, K // TILE, count](w.contiguous(), values, scales, N, K, TURNED=turned)
    return values, scales


def count(found: Tensor | None, *scales: Tensor) -> None:
    """Faults that scales report: (NaN, 0)."""
    for scale in scales if found is not None else ():
        found += torch.stack((scale.isnan().sum(), (scale == 0).sum()))


def grouped(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], ends: list[int], dtype: torch.dtype, square: bool = True) -> Tensor:
    """`tiles` of a (S, K), whose groups end at `ends`, by `blocks` of each group's b (E, N, K) (or tiles of one b (N, K), square=False):
    (S, N)."""
    (values, scales), (right, right_scales), rows = a, b, 64
    S, K, N = *values.shape, right.shape[-2]
    stretches = [(r, stop, e) for e, (start, stop) in enumerate(zip([0, *ends], ends)) for r in range(start, stop, rows)]
    out = torch.empty(S, N, dtype=dtype, device=values.device)
    if stretches:
        starts, stops, groups = torch.tensor(stretches, dtype=torch.int32, device=values.device).t().contiguous()
        grid = len(stretches), triton.cdiv(N, TILE)
        _grouped[grid](values, scales, right, right_scales, out, starts, stops, groups, S, N, K, SQUARE=square, ROWS=rows)
    return out


def _dense(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, square: bool) -> Tensor:
    """(M, K) in tiles by (N, K) in blocks or tiles."""
    M, K = a[0].shape
    if _capability() == (9, 0) and M % 16 == 0 and K % TILE == 0 and len(b[0]) % 16 == 0:
        # torch's scales: tiles (M, K / 128) with the rows together in memory; blocks (K / 128, N / 128), as b itself is handed over turned.
        right = b[1].t() if square else b[1]
        return torch._scaled_mm(a[0], b[0].t(), a[1].t(), right, out_dtype=dtype)
    return grouped(a, b, [M], dtype, square)


def _finish(y: Tensor, out: Tensor | None, base: Tensor | None) -> Tensor:
    y = y if base is None else y + base
    return y if out is None else out.copy_(y)


def nt(a: Tensor, b: Tensor, found: Tensor | None, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
    """a (M, K) b (N, K)ᵀ (+ base)."""
    left, right = tiles(a), blocks(b)
    count(found, left[1], right[1])
    return _finish(_dense(left, right, a.dtype, True), out, base)


def nn(a: Tensor, b: Tensor, found: Tensor | None, base: Tensor | None = None) -> Tensor:
    """a (M, N) b (N, K) (+ base)."""
    left, right = tiles(a), blocks(b, turned=True)
    count(found, left[1], right[1])
    return _finish(_dense(left, right, a.dtype, True), None, base)


def tn(a: Tensor, b: Tensor, found: Tensor | None) -> Tensor:
    """a (T, N)ᵀ b (T, K) -> (N, K) float32: both in tiles along the tokens, filled up with zeros."""
    fill = (0, 0, 0, -len(a) % TILE)
    left, right = tiles(F.pad(a, fill).t()), tiles(F.pad(b, fill).t())
    count(found, left[1], right[1])
    return _dense(left, right, torch.float32, False)


def grouped_nt(a: Tensor, b: Tensor, ends: Tensor, found: Tensor | None) -> Tensor:
    """Rows of a (S, K) in groups by each group's b (E, N, K): (S, N)."""
    left, right = tiles(a), blocks(b)
    count(found, left[1], right[1])
    return grouped(left, right, ends.tolist(), a.dtype)


def swiglu_grouped_nt(h: Tensor, gates: Tensor, b: Tensor, ends: Tensor, found: Tensor | None) -> Tensor:
    """swiglu(h) * gates, h (S, 2F), gates (S,), by each group's b (E, N, F): (S, N)."""
    left, right = swiglu_tiles(h, gates), blocks(b)
    count(found, left[1], right[1])
    return grouped(left, right, ends.tolist(), h.dtype)


def grouped_nn(a: Tensor, b: Tensor, ends: Tensor, found: Tensor | None) -> Tensor:
    """The same with b (E, N, K) by its first dimension."""
    left, right = tiles(a), blocks(b, turned=True)
    count(found, left[1], right[1])
    return grouped(left, right, ends.tolist(), a.dtype)


def grouped_tn(a: Tensor, b: Tensor, ends: Tensor, found: Tensor | None) -> Tensor:
    """Each group's aᵀ b, (E, N, K) float32, group by group."""
    out = torch.zeros(len(ends), a.shape[1], b.shape[1], device=a.device)
    for e, rows in spans(ends):
        out[e] = tn(a[rows], b[rows], found)
    return out
